"""The handle of an attached adapter: switch it, weigh it, train it, read it back, fold it in, take it off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Target
from ..errors import NotMergeable, UsageError
from ..updates import Update
from .layers import Quantized
from .outputs import Switch
from .station import Station
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
        """Folds the adapter into the base in place, computed in float64 and rounded once, and takes it off.

        Raises:
            NotMergeable: a law is not one of weights, a bias to change is missing, or a weight is tied to another.
        """
        changed = changes([self])
        with torch.no_grad():
            for parameter, value in changed:
                parameter.copy_(value)
        self.remove()

    def _folded(self, station: Station, switches: Sequence[Switch]) -> list[tuple[Tensor, Tensor]]:
        parts = [part for part in station.parts if part.switch in switches]
        for part in parts:
            if part.bias is None and any(u.changes_bias and u.needs_bias for u in part.updates):
                raise NotMergeable("changes a bias that the base does not have", where=str(part.target), cure=_KEEP)
            if isinstance(station.layer, Quantized):
                raise NotMergeable("a quantized weight would be quantized anew", where=str(part.target), cure=_KEEP)
        new = station.changed(parts, torch.float64)
        pairs: list[tuple[Tensor, Tensor]] = [(tensor_at(station.module, path), value) for path, value in new.items()]
        for parameter, _ in pairs:
            names = [n for n, p in self._model.named_parameters(remove_duplicate=False) if p is parameter]
            if len(names) > 1:
                raise NotMergeable(f"one tensor under the names {', '.join(names)}", cure=_KEEP)
        return pairs

    def _check(self) -> None:
        if self._removed:
            raise UsageError("this handle was removed or merged", where=self.name, cure="Inject the adapter again")


@torch.no_grad()
def changes(handles: Sequence[Handle]) -> list[tuple[Tensor, Tensor]]:
    """Parameters of one model, and what they are with the adapters of the handles folded in together, in float64.

    Raises:
        NotMergeable: a law is not one of weights, a bias to change is missing, or a weight is tied to another.
    """
    for handle in handles:
        handle._check()
        for target, update in handle._adapter:
            if update.kind in ("output", "context"):
                raise NotMergeable("is not a change of weights", where=str(target), cure=_KEEP)
    switches = [handle._switch for handle in handles]
    stations = dict.fromkeys(station for handle in handles for station in handle._stations)
    return [new for station in stations for new in handles[0]._folded(station, switches)]


def _name(target: Target, updates: tuple[Update, ...], position: int, field: str) -> str:
    method = updates[position].method
    return f"{target}.{position}.{method}.{field}" if len(updates) > 1 else f"{target}.{method}.{field}"


def _copy(leaf: object) -> Tensor:
    assert isinstance(leaf, Tensor)
    return leaf.detach().clone()


_KEEP = "Keep it injected instead"
