"""The handle of an attached adapter: switch it, weigh it, train it, read it back, fold it in, take it off."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Target
from ..core.updates import Update
from ..errors import NotMergeable, ShapeMismatch, UsageError, nearest
from ..io.lazy import as_torch
from .checkpoints import CHOICES, HANDLES, leave_state, watch_state
from .in_place import fits, fold_in_place
from .layers import Quantized
from .leaves import Leaf, LiveUpdates, is_leaf_name
from .outputs import Switch
from .scopes import switched
from .sharding import gathered, is_partitioned, is_sharded, put, shape_of, whole
from .station import Part, Station
from .undo import KEEPS, Merged
from .watch import Watch
from .weights import tensor_at
from .wrappers import unwrapped


class Handle:
    """An adapter attached to a model. After `remove` or `merge_` every use raises `UsageError`.

    Attributes:
        frozen: names of the base's parameters whose `requires_grad` this handle took away; `remove` gives it back.
    """

    def __init__(
        self, adapter: Adapter, bound: Mapping[Target, tuple[LiveUpdates, ...]], switch: Switch,
        stations: list[Station], model: nn.Module, leaves: list[Leaf],
    ) -> None:  # fmt: skip
        self._source, self._bound, self._switch = adapter, dict(bound), switch
        self._stations, self._model, self._leaves = stations, model, leaves
        self._state, self._merged = "attached", list[Merged]()
        self._parts: list[tuple[Station, list[Part]]] = []
        self._folded: list[tuple[Station, list[Part]]] = []
        self.frozen: tuple[str, ...] = ()
        self._checkpoint = CHOICES[0]

    @property
    def _adapter(self) -> Adapter:
        """The adapter over the tensors that the model holds now."""
        now = {target: tuple(u for bound in each for u in bound.updates) for target, each in self._bound.items()}
        return self._source.replace(updates=now)

    def _enter(self, frozen: bool) -> None:
        """Take the place in the list of the model's handles, watch its modules, and freeze the base if asked to."""
        self._model.__dict__.setdefault(HANDLES, []).append(self)
        watch_state(self._model)
        self._watch = Watch(self._model, self.name, (station.module for station in self._stations), self._leaves)
        if frozen:
            held = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad and not is_leaf_name(n)]
            for _, parameter in held:
                parameter.requires_grad_(False)
            self.frozen = tuple(name for name, _ in held)

    def _leave(self) -> None:
        """Take this handle's traces off the model; another trained adapter keeps the base frozen."""
        self._watch.remove()
        for leaf in self._leaves:
            leaf.release()
        held = self._model.__dict__[HANDLES]
        held.remove(self)
        heir = next((other for other in held if any(True for _ in other.named_parameters())), None)
        if heir is not None:
            heir.frozen = (*heir.frozen, *self.frozen)
        else:
            parameters = dict(self._model.named_parameters())
            for name in self.frozen:
                if name in parameters:  # A module may have been replaced since.
                    parameters[name].requires_grad_(True)
        if not held:
            del self._model.__dict__[HANDLES]
            leave_state(self._model)

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

    @property
    def checkpoint(self) -> str:
        """What `model.state_dict()` holds: `base` (the default), `adapter` (this adapter alone) or `all`; may be set.

        Set it to `adapter` and every framework that saves the model's state dict (Trainer, Accelerate, Lightning,
        `torch.save`) writes checkpoints of the adapter alone. `model.load_state_dict()` takes them back, strictly too,
        and leaves the base as it is. With `base` such checkpoints do not hold the adapter.
        """
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, value: str) -> None:
        self._check()
        if value not in CHOICES:
            cure = f"Choose among {', '.join(CHOICES)}"
            raise UsageError(f"no such choice: {value!r}", where="checkpoint", cure=cure)
        self._checkpoint = value

    def set_active(self, active: bool) -> None:
        """Switch the adapter on or off, in every thread; see `disable` for this one alone."""
        self._check()
        self._switch.active = active

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Run the model without this adapter for the length of a `with`, in this thread or asyncio task alone."""
        self._check()
        with switched(self._switch, False):
            yield

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield trained tensors by name, `target.method.field`; none unless injected with `trainable=True`."""
        named = ((name, leaf.tensor) for name, leaf in self._named_leaves())
        return ((name, tensor) for name, tensor in named if isinstance(tensor, nn.Parameter))

    def _named_leaves(self) -> Iterator[tuple[str, Leaf]]:
        """All registered tensors by name, shared ones once."""
        self._check()
        seen: set[int] = set()
        for target, each in self._bound.items():
            updates = tuple(update for bound in each for update in bound.updates)
            leaves = [fields for bound in each for fields in bound.leaves]
            for position, fields in enumerate(leaves):
                for field, leaf in fields.items():
                    if id(leaf) not in seen:
                        seen.add(id(leaf))
                        yield _name(self._plain(target), updates, position, field), leaf

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained tensors by the names of `named_parameters()`: what a checkpoint of the training needs.

        The tensors are the model's own, detached, as `nn.Module.state_dict` gives them. Under FSDP2 they are DTensors:
        save them with `torch.distributed.checkpoint`. DeepSpeed's ZeRO stage 3 gathers them: call it in every process.
        For a file that other tools read, write `handle.adapter()`.
        """
        named = list(self.named_parameters())
        return {name: (whole(p) if is_partitioned(p) else p).detach() for name, p in named}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values from `state_dict()` into the trained tensors, in place: optimizers keep them.

        Raises:
            UsageError: names are missing or unknown; nothing is changed then.
            ShapeMismatch: a shape differs; nothing is changed then.
        """
        held = dict(self.named_parameters())
        for names, what in ((held.keys() - state.keys(), "missing"), (state.keys() - held.keys(), "unknown")):
            if names:
                first = min(names)
                cure = nearest(first, {*held, *state} - names) or "Pass what state_dict() of the same adapter returned"
                raise UsageError(f"{len(names)} tensors are {what} in the state", where=first, cure=cure)
        for name, parameter in held.items():
            if tuple(state[name].shape) != shape_of(parameter):
                why = f"{list(state[name].shape)} where the adapter has {list(shape_of(parameter))}"
                raise ShapeMismatch(why, where=name, cure="Pass what state_dict() of the same adapter returned")
        for name, parameter in held.items():
            put(parameter, state[name])

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable leaves, shared ones once."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(
        self, lr: float, *, ratio: float = 16.0, weight_decay: float = 0.0, embedding_lr: float = 1e-6
    ) -> list[dict[str, Any]]:
        """Return the trained tensors as groups for an optimizer, as LoRA+ (https://arxiv.org/abs/2402.12354) has them.

        B, and all tensors of one axis, learn at `lr * ratio`; A at `lr`; both factors of embeddings at `embedding_lr`.
        Biases have no weight decay.

        Args:
            lr: learning rate of A.
            ratio: how many times as fast B learns.
            weight_decay: of all but biases.
            embedding_lr: learning rate at embeddings.

        Raises:
            UsageError: no trained tensor is a factor B.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {
            (lr, weight_decay): [], (embedding_lr, weight_decay): [], (lr * ratio, weight_decay): [],
            (lr * ratio, 0.0): [],
        }  # fmt: skip
        named = list(self.named_parameters())
        if not any(name.endswith(".B") for name, _ in named):
            why = "no factor B is trained, for which LoRA+ has a learning rate"
            raise UsageError(why, where=self.name, cure="Pass handle.parameters() to the optimizer")
        homes = {id(leaf.tensor): leaf.module for leaf in self._leaves}
        for name, parameter in named:
            field = name.rpartition(".")[2]
            fast = field == "B" or parameter.ndim == 1
            if field in ("A", "B") and isinstance(homes[id(parameter)], nn.Embedding):
                groups[embedding_lr, weight_decay].append(parameter)
            else:
                groups[lr * ratio if fast else lr, 0.0 if field == "bias" else weight_decay].append(parameter)
        made = [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
        return [group for group in made if group["params"]]

    def adapter(self) -> Adapter:
        """Return the adapter with the values of now: detached copies, in the model's names and layouts.

        Names of wrappers (`torch.compile`, DDP, checkpoint wrappers, PEFT) are left out of the targets.

        Under FSDP2 and tensor parallelism this gathers sharded tensors: call it in every process.
        """
        self._check()
        now = self._adapter.map(_copy)
        return now.replace(updates={self._plain(target): updates for target, updates in now.updates.items()})

    def _plain(self, target: Target) -> Target:
        """The target without the wrappers that stand around modules of the model."""
        return replace(target, path=unwrapped(self._model, target.path))

    def remove(self) -> None:
        """Take the adapter off; the model's modules are what they were before."""
        self._check()
        for station in self._stations:
            station.detach(self._switch)
        self._leave()
        self._state = "removed"

    @torch.no_grad()
    def merge_(self, keep: bool | str = False) -> None:
        """Fold the adapter into the base in place, computed in float64 and rounded at the end, and take it off.

        It holds a copy of the weights that it changes until it is done, and puts them back if anything fails.

        Args:
            keep: for `unmerge_`, hold that copy (True or "copy"); or "recompute": hold the adapter, and of each weight
                the few numbers that subtracting its change would not round to what they were. That needs additive
                updates (LoRA and its like), and the adapter's tensors as they are now.

        Raises:
            NotMergeable: a formula is not one of weights, a bias to change is missing, a weight shares its memory with
                another, or its type is not a plain tensor (quantized by a library).
            UsageError: `keep` is another word, or "recompute" for updates that are not additive.

        Under FSDP2 and tensor parallelism this gathers one weight after the other: call it in every process.
        """
        if not isinstance(keep, bool) and keep not in KEEPS:
            raise UsageError(f"no such choice: {keep!r}", where="keep", cure=f"Choose among {', '.join(KEEPS)}")
        self._watch.check()
        foldable = _foldable([self])
        again = keep == "recompute"
        for part in (part for _, parts in foldable for part in parts) if again else ():
            if any(update.kind != "additive" for update in part.updates):
                why = "an update that cannot be subtracted again"
                raise UsageError(why, where=str(part.target), cure='Pass keep="copy"')
        kept: list[Merged] = []
        try:
            for station, parts in foldable:
                mine = [tensor_at(station.module, path) for path in _changed(parts)]
                kept += [Merged(parameter, parameter.detach().clone()) for parameter in mine]
                _fold(station, parts)
                if again:
                    _slim(station, parts, kept[-len(mine) :] if mine else [])
        except BaseException:
            for each in kept:
                if each.before is not None:
                    each.parameter.copy_(each.before)
            _restore([(each, found) for each, found in self._subtracted(foldable, kept) if found is not None])
            raise
        held = [(station, [p for p in station.parts if p.switch is self._switch]) for station in self._stations]
        self.remove()
        self._state = "merged"
        if keep:
            self._merged, self._parts, self._folded = kept, held, foldable
            for each in kept:
                each.push()

    @torch.no_grad()
    def unmerge_(self) -> None:
        """Give the base the exact bits back that it had before `merge_(keep=...)`, and attach the adapter again.

        Raises:
            UsageError: the adapter was not merged with `keep`, its weights were changed since, or, where they are
                recomputed, the adapter was. Nothing is changed then.
        """
        if self._state != "merged" or not self._merged:
            why = "there are no weights from before a merge"
            raise UsageError(why, where=self.name, cure="Merge with handle.merge_(keep=True)")
        if not all(each.is_last for each in self._merged):
            why = "the merged weights were changed after the merge"
            raise UsageError(why, where=self.name, cure="Undo that first: the last merge is unmerged first")
        found = self._subtracted(self._folded, self._merged)
        if any(value is None for _, value in found):
            why = "the adapter's tensors were changed after the merge, so that it cannot be subtracted"
            raise UsageError(why, where=self.name, cure="Load their values from then, or load the base again")
        _restore(found)
        for each in self._merged:
            each.pop()
        for leaf in self._leaves:
            leaf.register()
        for station, parts in self._parts:
            for part in parts:
                station.attach(part)
        self._state, self._merged, self._folded = "attached", [], []
        self._enter(frozen=bool(self.frozen))

    def _subtracted(
        self, folded: list[tuple[Station, list[Part]]], merged: list[Merged]
    ) -> list[tuple[Merged, Tensor | None]]:
        """Each changed parameter with its bits from before; None where computing them again gives others."""
        found: list[tuple[Merged, Tensor | None]] = []
        by = {id(each.parameter): each for each in merged}
        for station, parts in folded:
            mine = [by[key] for path in _changed(parts) if (key := id(tensor_at(station.module, path))) in by]
            values = _less(station, parts) if any(each.before is None for each in mine) else {}
            found += [(each, each.restored(values.get(id(each.parameter), each.parameter))) for each in mine]
        return found

    def _check_parts(self, station: Station, parts: list[Part], shared: set[int], memory: Memory) -> None:
        for part in parts:
            if part.bias is None and any(u.changes_bias and u.needs_bias for u in part.updates):
                raise NotMergeable("changes a bias that the base does not have", where=str(part.target), cure=_KEEP)
            if isinstance(station.layer, Quantized):
                raise NotMergeable("a quantized weight would be quantized anew", where=str(part.target), cure=_KEEP)
        for path in _changed(parts):
            parameter, where = tensor_at(station.module, path), str(parts[0].target)
            owner, _, name = path.rpartition(".")
            holder = station.module.get_submodule(owner)
            if name not in holder._parameters and name not in holder._buffers:
                cure = "Call torch.nn.utils.remove_weight_norm, prune.remove or the like first, or keep it injected"
                raise NotMergeable("a weight that is made from other tensors in each forward", where=where, cure=cure)
            if parameter.is_meta:
                cure = "Load the weights first, or write handle.adapter() and merge the files of the base"
                raise NotMergeable("a weight that is offloaded, or on the meta device", where=where, cure=cure)
            if parameter.layout is not torch.strided:
                raise NotMergeable(f"a weight stored as {parameter.layout}", where=where, cure=_KEEP)
            if any(stride == 0 < size - 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
                raise NotMergeable("a weight whose elements share memory", where=where, cure=_KEEP)
            if type(parameter) not in (Tensor, nn.Parameter) and not is_sharded(parameter):
                kind = type(parameter.data).__name__
                cure = "Write handle.adapter() and merge the file: adapterkit merge BASE ADAPTER -o OUT"
                raise NotMergeable(f"a weight that is a {kind}, no plain tensor", where=where, cure=cure)
            names = memory.beside(parameter)
            if len(names) > 1 and id(parameter) not in shared:
                raise NotMergeable(f"the same memory under the names {', '.join(names)}", where=where, cure=_KEEP)

    def _check(self) -> None:
        if self._state != "attached":
            raise UsageError("this handle was removed or merged", where=self.name, cure="Inject the adapter again")


class Memory:
    """The bytes that a model's parameters lie in, to find those that share some: tied names, and views of one tensor.

    Ranges are compared, not storages: cuDNN keeps all weights of an LSTM side by side in one storage.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(_parameters(model))
        self._sharded = [(name, p) for name, p in named if is_sharded(p)]
        held = [(name, p) for name, p in named if type(p) is nn.Parameter and p.layout is torch.strided]
        self._ranges = sorted((*_range(p), name) for name, p in held if p.numel() and p.device.type != "meta")
        self._longest = max((stop - start for start, stop, _ in self._ranges), default=0)

    def beside(self, tensor: Tensor) -> list[str]:
        """The names of all parameters that share memory with a tensor; its own are among them."""
        if is_sharded(tensor):  # A DTensor has no address; two of them share memory only if they are one.
            return [name for name, other in self._sharded if other is tensor]
        start, stop = _range(tensor)
        first = bisect.bisect_left(self._ranges, (start - self._longest,))
        last = bisect.bisect_left(self._ranges, (stop,))
        return [name for begin, end, name in self._ranges[first:last] if end > start and begin < stop]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters by name: a tied one under each module that has it, a module of two names once."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def _range(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one behind its last, on all devices together."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + span * tensor.element_size()


def _changed(parts: Sequence[Part]) -> list[str]:
    """The paths of the parameters that parts change, below their station's module."""
    weights = [p.weight for p in parts if p.weight and any(u.changes_weight for u in p.updates)]
    biases = [p.bias for p in parts if p.bias and any(u.changes_bias for u in p.updates)]
    return list(dict.fromkeys((*weights, *biases)))


@torch.no_grad()
def _fold(station: Station, parts: list[Part]) -> None:
    """Sums are folded where the weights lie; what looks at the whole weight, one station at a time."""
    parts = [replace(part, bound=LiveUpdates([gathered(update) for update in part.updates])) for part in parts]
    weights = dict.fromkeys(part.weight for part in parts)
    alone = {path: [part for part in parts if part.weight == path] for path in weights if path}
    if len(alone) == len(weights) and all(fits(tensor_at(station.module, p), own) for p, own in alone.items()):
        for path, own in alone.items():
            fold_in_place(path, tensor_at(station.module, path), own)
        return
    changed = station.changed(parts, torch.float64)
    for path, value in changed.items():
        put(tensor_at(station.module, path), value)


def _less(station: Station, parts: list[Part]) -> dict[int, Tensor]:
    """What a station's parameters are once the parts are subtracted, by the parameters' ids; they stay as they are."""
    mine = [tensor_at(station.module, path) for path in _changed(parts)]
    before = [parameter.detach().clone() for parameter in mine]
    negated = [replace(part, switch=Switch(part.switch.name, -part.switch.weight)) for part in parts]
    try:
        _fold(station, negated)
        return {id(parameter): parameter.detach().clone() for parameter in mine}
    finally:
        for parameter, value in zip(mine, before, strict=True):
            parameter.copy_(value)


def _slim(station: Station, parts: list[Part], merged: list[Merged]) -> None:
    values = _less(station, parts)
    for each in merged:
        each.slim(values[id(each.parameter)])


def _restore(found: Sequence[tuple[Merged, Tensor | None]]) -> None:
    for each, value in found:
        if value is not None:
            each.parameter.copy_(value)


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
        if any(map(is_partitioned, handle._model.parameters())):
            cure = "Write handle.adapter() and merge the file: adapterkit merge BASE ADAPTER -o OUT"
            raise NotMergeable("weights that DeepSpeed's ZeRO has partitioned", where=handle.name, cure=cure)
        # A LoRA may run as another method at a layer of its own kind; see `formats._trained`.
        live = [
            (part.target, update)
            for station in handle._stations
            for part in station.parts
            if part.switch is handle._switch
            for update in part.updates
        ]
        for target, update in (*handle._adapter, *live):
            if update.kind in ("output", "context"):
                raise NotMergeable("is not a change of weights", where=str(target), cure=_KEEP)
    switches = [handle._switch for handle in handles]
    stations = dict.fromkeys(station for handle in handles for station in handle._stations)
    found = [(station, [part for part in station.parts if part.switch in switches]) for station in stations]
    found, shared = _once(handles[0]._model, found)
    memory = Memory(handles[0]._model)
    for station, parts in found:
        handles[0]._check_parts(station, parts, shared, memory)
    return found


def _once(
    model: nn.Module, found: list[tuple[Station, list[Part]]]
) -> tuple[list[tuple[Station, list[Part]]], set[int]]:
    """Keep one of the equal parts at layers that share a parameter, where all layers that share it change alike.

    Returns:
        the stations with the parts that are left, and the ids of those parameters.
    """
    names: dict[int, int] = {}
    for _, parameter in _parameters(model):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    alike: dict[tuple[int, int], list[Part]] = {}
    for station, parts in found:
        for part in parts:
            packed = isinstance(station.layer, Quantized)  # Such a module may have no `weight`.
            weight = tensor_at(station.module, part.weight) if part.weight and not packed else None
            if weight is not None and names.get(id(weight), 1) > 1:
                alike.setdefault((id(weight), id(part.switch)), []).append(part)
    whole = {key: parts for key, parts in alike.items() if len(parts) == names[key[0]] and change_alike(parts)}
    shared = {tensor for tensor, _ in whole if all(key in whole for key in alike if key[0] == tensor)}
    again = [part for (tensor, _), parts in whole.items() if tensor in shared for part in parts[1:]]
    return [(station, [part for part in parts if part not in again]) for station, parts in found], shared


def change_alike(parts: list[Part]) -> bool:
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
    return whole(leaf).detach().clone()


def handles(model: nn.Module) -> dict[str, Handle]:
    """Return the handles of the adapters attached to a model, or to modules inside it, by name.

    A deep copy of a model has handles of its own. Wrappers (DDP, `torch.compile`) are looked through.

    Args:
        model: the model that `inject` got, or one around it.

    Returns:
        name -> handle, in the order of injection; names of adapters on parts of the model come after their path
        (`encoder:default`).
    """
    found: dict[str, Handle] = {}
    for path, module in model.named_modules():
        for handle in module.__dict__.get(HANDLES, ()):
            path = unwrapped(model, path)
            found[f"{path}:{handle.name}" if path else handle.name] = handle
    return found


_KEEP = "Keep it injected instead"
