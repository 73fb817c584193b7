"""The handle of an attached adapter: switch it, weigh it, train it, read it back, fold it in, take it off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Target
from ..errors import NotMergeable, UsageError
from ..tensors.lazy import as_torch
from ..updates import Update
from .in_place import fits, fold_in_place
from .layers import Quantized
from .outputs import Switch
from .station import Part, Station
from .weights import tensor_at


class Handle:
    """An adapter attached to a model. After `remove` or `merge_` every use raises `UsageError`."""

    def __init__(self, adapter: Adapter, switch: Switch, stations: list[Station], model: nn.Module) -> None:
        self._adapter, self._switch, self._stations, self._model = adapter, switch, stations, model
        self._removed = False

    @property
    def name(self) -> str:
        return self._switch.name

    @property
    def weight(self) -> float:
        """How much of the adapter's change is added; may be set."""
        self._check()
        return self._switch.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._check()
        if value != 1 and any(update.kind == "context" for _, update in self._adapter):
            raise UsageError("context has no half measures", where=self.name, cure="Use set_active")
        self._switch.weight = value

    def set_active(self, active: bool) -> None:
        """Switches the adapter on or off."""
        self._check()
        self._switch.active = active

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The model without this adapter, for the length of a `with`."""
        self._check()
        before, self._switch.active = self._switch.active, False
        try:
            yield
        finally:
            self._switch.active = before

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable leaves by name, `target.method.field`; empty unless injected with `trainable=True`.

        Give these to the optimizer: the base's own `requires_grad` is left as it is.
        """
        self._check()
        seen: set[int] = set()
        for target, updates in self._adapter.updates.items():
            for position, update in enumerate(updates):
                for field, leaf in update.tensors.items():
                    if isinstance(leaf, nn.Parameter) and id(leaf) not in seen:
                        seen.add(id(leaf))
                        yield _name(target, updates, position, field), leaf

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable leaves, shared ones once."""
        return (parameter for _, parameter in self.named_parameters())

    def adapter(self) -> Adapter:
        """The adapter with the values of now: detached copies, in the model's names and layouts."""
        self._check()
        return self._adapter.map(_copy)

    def remove(self) -> None:
        """Takes the adapter off; the model's modules are what they were before."""
        self._check()
        for station in self._stations:
            station.detach(self._switch)
        self._removed = True

    def merge_(self) -> None:
        """Folds the adapter into the base in place, computed in float64 and rounded at the end, and takes it off.

        Raises:
            NotMergeable: a law is not one of weights, a bias to change is missing, or a weight is tied to another.
        """
        foldable = _foldable([self])
        for station, parts in foldable:
            _fold(station, parts)
        self.remove()

    def _check_parts(self, station: Station, parts: list[Part], shared: set[int]) -> None:
        for part in parts:
            if part.bias is None and any(u.changes_bias and u.needs_bias for u in part.updates):
                raise NotMergeable("changes a bias that the base does not have", where=str(part.target), cure=_KEEP)
            if isinstance(station.layer, Quantized):
                raise NotMergeable("a quantized weight would be quantized anew", where=str(part.target), cure=_KEEP)
        changed = {p.weight for p in parts if any(u.changes_weight for u in p.updates)}
        changed |= {p.bias for p in parts if any(u.changes_bias for u in p.updates)}
        for parameter in (tensor_at(station.module, path) for path in changed if path):
            names = [n for n, p in self._model.named_parameters(remove_duplicate=False) if p is parameter]
            if len(names) > 1 and id(parameter) not in shared:
                raise NotMergeable(f"one tensor under the names {', '.join(names)}", cure=_KEEP)

    def _check(self) -> None:
        if self._removed:
            raise UsageError("this handle was removed or merged", where=self.name, cure="Inject the adapter again")


@torch.no_grad()
def _fold(station: Station, parts: list[Part]) -> None:
    """Sums are folded where the weights lie; what looks at the whole weight, one station at a time."""
    weights = dict.fromkeys(part.weight for part in parts)
    alone = {path: [part for part in parts if part.weight == path] for path in weights if path}
    if len(alone) == len(weights) and all(fits(tensor_at(station.module, p), own) for p, own in alone.items()):
        for path, own in alone.items():
            fold_in_place(path, tensor_at(station.module, path), own)
        return
    changed = station.changed(parts, torch.float64)
    for path, value in changed.items():
        tensor_at(station.module, path).copy_(value)


def changes(handles: Sequence[Handle]) -> list[tuple[Tensor, Tensor]]:
    """Parameters of one model, and what they are with the adapters of the handles folded in together, in float64.

    Raises:
        NotMergeable: a law is not one of weights, a bias to change is missing, or a weight is tied to another.
    """
    return [
        (tensor_at(station.module, path), value)
        for station, parts in _foldable(handles)
        for path, value in station.changed(parts, torch.float64).items()
    ]


def _foldable(handles: Sequence[Handle]) -> list[tuple[Station, list[Part]]]:
    """The stations of the handles with their parts of it, all of which can be folded into weights."""
    for handle in handles:
        handle._check()
        for target, update in handle._adapter:
            if update.kind in ("output", "context"):
                raise NotMergeable("is not a change of weights", where=str(target), cure=_KEEP)
    switches = [handle._switch for handle in handles]
    stations = dict.fromkeys(station for handle in handles for station in handle._stations)
    found = [(station, [part for part in station.parts if part.switch in switches]) for station in stations]
    found, shared = _once(handles[0]._model, found)
    for station, parts in found:
        handles[0]._check_parts(station, parts, shared)
    return found


def _once(
    model: nn.Module, found: list[tuple[Station, list[Part]]]
) -> tuple[list[tuple[Station, list[Part]]], set[int]]:
    """Keep one of the equal parts at layers that share a parameter, where all layers that share it change alike.

    Returns:
        the stations with the parts that are left, and the ids of those parameters.
    """
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    alike: dict[tuple[int, int], list[Part]] = {}
    for station, parts in found:
        for part in parts:
            parameter = tensor_at(station.module, part.weight) if part.weight else None
            if parameter is not None and names.get(id(parameter), 1) > 1:
                alike.setdefault((id(parameter), id(part.switch)), []).append(part)
    whole = {key: parts for key, parts in alike.items() if len(parts) == names[key[0]] and _change_alike(parts)}
    shared = {parameter for parameter, _ in whole if all(key in whole for key in alike if key[0] == parameter)}
    again = [part for (parameter, _), parts in whole.items() if parameter in shared for part in parts[1:]]
    return [(station, [part for part in parts if part not in again]) for station, parts in found], shared


def _change_alike(parts: list[Part]) -> bool:
    """Whether parts at several layers that share a parameter are the same change of it."""
    first, *others = parts
    return all(
        (part.target.layout, part.target.rows) == (first.target.layout, first.target.rows)
        and [update.method for update in part.updates] == [update.method for update in first.updates]
        and all(
            a.attributes == b.attributes and a.tensors.keys() == b.tensors.keys()
            and all(torch.equal(as_torch(a.tensors[n]), as_torch(b.tensors[n])) for n in a.tensors)
            for a, b in zip(part.updates, first.updates, strict=True)
        )
        for part in others
    )  # fmt: skip


def _name(target: Target, updates: tuple[Update, ...], position: int, field: str) -> str:
    method = updates[position].method
    return f"{target}.{position}.{method}.{field}" if len(updates) > 1 else f"{target}.{method}.{field}"


def _copy(leaf: object) -> Tensor:
    assert isinstance(leaf, Tensor)
    return leaf.detach().clone()


_KEEP = "Keep it injected instead"
