"""Fold adapters into the weights of a live model, and take them out again with the exact bits from before.

`Handle.merge_` and `Handle.unmerge_` call this module. `foldable` refuses everything that cannot be folded before a
weight changes. `fold` adds the updates: sums where the weights lie, a block of rows at a time, everything else a module
at a time, in float64 with one rounding.

`Merged` holds what `unmerge_` needs. `copy` keeps the weights themselves. `recompute` keeps the adapter, which the
handle has anyway, and the bits that subtracting its change would not give back: a few numbers in a hundred where the
change is small beside the weight. The subtraction is the merge itself with the adapter's weight negated, so it gives
the same bits each time; a checksum of the result refuses any others.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import NotMergeable
from ..io.lazy import as_lazy, as_torch, dtype_of
from ..merging.arrays import TorchArrays, Workspace
from ..merging.blocks import blocks
from ..merging.compute import BlockMerger
from ..merging.planned import Output
from ..merging.planned_update import PlannedUpdate
from .forward_hook import ForwardHook
from .layers import Quantized
from .leaves import LiveUpdates, on_disk
from .outputs import Switch
from .parts import Part
from .sharding import gathered, is_sharded, put
from .weights import tensor_at


def fits(parameter: Tensor, parts: list[Part]) -> bool:
    """Whether the parts change this weight alone, by a sum, and it is one run of memory."""
    kinds = all(update.kind == "additive" and not update.changes_bias for part in parts for update in part.updates)
    return (
        kinds
        and not is_sharded(parameter)
        and parameter.is_contiguous()
        and parameter.dtype.itemsize > 1
        and parameter.numel() > 0
    )


@torch.no_grad()
def fold_in_place(name: str, parameter: Tensor, parts: list[Part]) -> None:
    """Adds the parts' changes to a weight as stored; no dense change is formed, but for laws that need a whole one."""
    shape = tuple(parameter.shape)
    folds = tuple(
        PlannedUpdate(part.target, part.updates, part.switch.weight, position, bias=False, shape=shape)
        for position, part in enumerate(parts)
    )
    output = Output(name, dtype_of(parameter), shape, 0, as_lazy(parameter), folds)
    folder = BlockMerger(output, Workspace(TorchArrays(str(parameter.device))))
    flat = parameter.detach().view(-1)
    for block in blocks(output):
        piece = flat[block.first : block.first + block.elements]
        folder.compute(piece, piece, block)


Folded = list[tuple[ForwardHook, list[Part]]]
"""Each hook with those of its parts that are folded."""

KEEPS = ("copy", "recompute")
"""Choices for what `merge_` keeps."""

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Merged:
    """A parameter that a merge changed, and what gives its bits from before.

    Attributes:
        parameter: it.
        before: its bits from before; None where they are computed again.
        places: flat positions where computing again gives other bits.
        values: the bits there.
        checksum: that of the bits from before.
        after: checksum of the merged bits, where those from before are kept: torch does not count changes of `.data`.
        version: torch's count of the parameter's changes after the merge.
        dtype: the parameter's, where its bits are computed again.
        stack: the merges into the parameter that can be undone, in their order; all of them hold the same list.
    """

    parameter: Tensor
    before: Tensor | None
    places: Tensor | None = None
    values: Tensor | None = None
    checksum: tuple[int, int] = (0, 0)
    after: tuple[int, int] | None = None
    version: int = -1
    dtype: torch.dtype | None = None
    stack: list[Merged] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "version": self.version - self.parameter._version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The parameter of a copied model counts its changes anew.
        self.__dict__.update(state, version=state["version"] + state["parameter"]._version)
        _MERGES.setdefault(self.parameter, self.stack)

    @property
    def is_last(self) -> bool:
        """Whether nothing changed the parameter since."""
        known = self.after is None or self.before is None or self.before.dtype is not self.parameter.dtype
        same = self.stack[-1] is self and self.parameter._version == self.version
        return same and (known or _checksum(_bits(self.parameter)) == self.after)

    @property
    def is_cast(self) -> bool:
        """Whether the parameter has another dtype since, in which its bits cannot be computed again."""
        return self.dtype not in (None, self.parameter.dtype)

    def push(self) -> None:
        """Note the merge as the last change of the parameter."""
        self.version = self.parameter._version
        if self.before is not None and not is_sharded(self.parameter):
            self.after = _checksum(_bits(self.parameter))
        self.stack = _MERGES.setdefault(self.parameter, self.stack)
        self.stack.append(self)

    def forget(self) -> None:
        """Take the merge off the list of those that can be undone, if it stands there."""
        if self in self.stack:
            self.stack.remove(self)

    def pop(self) -> None:
        """Note that the merge is undone; the merge before this one is then the parameter's last change."""
        self.stack.pop()
        if self.stack:
            self.stack[-1].version = self.parameter._version

    def slim(self, again: Tensor) -> None:
        """Keep only the places where the bits computed again differ, if that takes less memory.

        Args:
            again: what subtracting the change gave.
        """
        assert self.before is not None
        was, now = _bits(self.before), _bits(again)
        places = (was != now).nonzero().flatten()
        if len(places) * (8 + was.element_size()) < was.numel() * was.element_size():
            self.places, self.values, self.checksum, self.dtype = places, was[places], _checksum(was), self.before.dtype
            self.before = None

    def restored(self, again: Tensor) -> Tensor | None:
        """Return the bits from before, as a tensor; None where the checksum is another.

        Args:
            again: what subtracting the change gave.
        """
        if self.before is not None:
            return self.before
        assert self.places is not None
        assert self.values is not None
        found = again.detach().clone(memory_format=torch.contiguous_format)
        bits = _bits(found)
        bits[self.places.to(bits.device)] = self.values.to(bits.device)
        return found if _checksum(bits) == self.checksum else None


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_WHOLE[flat.element_size()])


def _checksum(bits: Tensor) -> tuple[int, int]:
    return int(torch.hash_tensor(bits).view(torch.int64)), int(bits.sum(dtype=torch.int64))


_MERGES: Any = WeakIdKeyDictionary()
"""Parameter -> the merges that can be undone, in their order."""


class Memory:
    """The bytes that a model's parameters lie in, to find those that share some: tied names, and views of one tensor.

    Ranges are compared, not storages: cuDNN keeps all weights of an LSTM side by side in one storage.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(_parameters(model))
        self.on_disk = on_disk(model.modules())
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


def changed_by(parts: Sequence[Part]) -> list[str]:
    """The paths of the parameters that parts change, below their hook's module."""
    weights = [p.weight for p in parts if p.weight and any(u.changes_weight for u in p.updates)]
    biases = [p.bias for p in parts if p.bias and any(u.changes_bias for u in p.updates)]
    return list(dict.fromkeys((*weights, *biases)))


@torch.no_grad()
def fold(hook: ForwardHook, parts: list[Part]) -> None:
    """Sums are folded where the weights lie; what looks at the whole weight, one hook at a time."""
    parts = [replace(part, bound=LiveUpdates([gathered(update) for update in part.updates])) for part in parts]
    weights = dict.fromkeys(part.weight for part in parts)
    alone = {path: [part for part in parts if part.weight == path] for path in weights if path}
    if len(alone) == len(weights) and all(fits(tensor_at(hook.module, p), own) for p, own in alone.items()):
        for path, own in alone.items():
            fold_in_place(path, tensor_at(hook.module, path), own)
        return
    changed = hook.changed(parts, torch.float64)
    for path, value in changed.items():
        put(tensor_at(hook.module, path), value)


def is_whole(model: nn.Module, folded: Folded, merged: Sequence[Merged]) -> bool:
    """Whether a model still has the modules and the parameters that a merge changed."""
    modules, parameters = {id(module) for module in model.modules()}, {id(each.parameter) for each in merged}
    if any(id(hook.module) not in modules for hook, _ in folded):
        return False
    return all(id(tensor_at(hook.module, p)) in parameters for hook, parts in folded for p in changed_by(parts))


def subtracted(folded: Folded, merged: list[Merged]) -> list[tuple[Merged, Tensor | None]]:
    """Each changed parameter with its bits from before; None where computing them again gives others."""
    found: list[tuple[Merged, Tensor | None]] = []
    by = {id(each.parameter): each for each in merged}
    for hook, parts in folded:
        mine = [by[key] for path in changed_by(parts) if (key := id(tensor_at(hook.module, path))) in by]
        values = _less(hook, parts) if any(each.before is None for each in mine) else {}
        found += [(each, each.restored(values.get(id(each.parameter), each.parameter))) for each in mine]
    return found


def _less(hook: ForwardHook, parts: list[Part]) -> dict[int, Tensor]:
    """Return a hook's parameters with the parts subtracted, by the parameters' ids; the parameters stay as they are."""
    mine = [tensor_at(hook.module, path) for path in changed_by(parts)]
    before = [parameter.detach().clone() for parameter in mine]
    negated = [replace(part, switch=Switch(part.switch.name, -part.switch.weight)) for part in parts]
    try:
        fold(hook, negated)
        return {id(parameter): parameter.detach().clone() for parameter in mine}
    finally:
        for parameter, value in zip(mine, before, strict=True):
            parameter.copy_(value)


def slim(hook: ForwardHook, parts: list[Part], merged: list[Merged]) -> None:
    """Keep of merged parameters only the places that subtracting their parts would not give back."""
    values = _less(hook, parts)
    for each in merged:
        each.slim(values[id(each.parameter)])


def restore(found: Sequence[tuple[Merged, Tensor | None]]) -> None:
    """Copy bits from before into their parameters."""
    for each, value in found:
        if value is not None:
            each.parameter.copy_(value)


class Unmerging:
    """Takes a merge out of one module after the other, and puts it back where that fails halfway.

    All bits from before at once would be the model a second time, and all merged bits a third time. So the merged bits
    are kept instead of the copy from before, which the parameter holds again. Bits that were computed again give the
    merged ones by the same sums.
    """

    def __init__(self) -> None:
        self._summed: Folded = []
        self._swapped: list[tuple[Merged, Tensor, bool]] = []
        self._current: list[tuple[Merged, Tensor | None]] = []

    def take_out(self, hook: ForwardHook, parts: list[Part], merged: list[Merged]) -> bool:
        """Give a module's parameters the bits from before; False, and nothing done, where they cannot be computed."""
        found = subtracted([(hook, parts)], merged)
        if any(value is None for _, value in found):
            return False
        kept = [(each, each.parameter.detach().clone(), each.before is not None) for each, _ in found]
        self._current = [(each, value) for each, value, _ in kept]
        restore(found)
        # Nothing can interrupt between the two halves of such a statement.
        if any(copied for _, _, copied in kept):
            self._swapped, self._current = [*self._swapped, *kept], []
            for each, _, _ in kept:
                each.before = None
        else:
            self._summed, self._current = [*self._summed, (hook, parts)], []
        return True

    def undo(self) -> None:
        """Give all parameters the merged bits back."""
        restore(self._current)
        for hook, parts in self._summed:
            fold(hook, parts)
        for each, value, copied in self._swapped:
            each.before = each.parameter.detach().clone() if copied else None
            restore([(each, value)])


def checked_folds(model: nn.Module, found: Folded) -> Folded:
    """Hooks of a model with parts of them, of layers that share a parameter only one.

    Raises:
        NotMergeable: a bias to change is missing, or a weight cannot be changed in place.
    """
    found, shared = _once(model, found)
    memory = Memory(model)
    for hook, parts in found:
        _check_parts(hook, parts, shared, memory)
    return found


def _check_parts(hook: ForwardHook, parts: list[Part], shared: set[int], memory: Memory) -> None:
    for part in parts:
        if part.bias is None and any(u.changes_bias and u.needs_bias for u in part.updates):
            raise NotMergeable("changes a bias that the base does not have", where=str(part.target), cure=KEEP_INJECTED)
        if isinstance(hook.layer, Quantized):
            raise NotMergeable("a quantized weight would be quantized anew", where=str(part.target), cure=KEEP_INJECTED)
    for path in changed_by(parts):
        parameter, where = tensor_at(hook.module, path), str(parts[0].target)
        owner, _, name = path.rpartition(".")
        holder = hook.module.get_submodule(owner)
        if name not in holder._parameters and name not in holder._buffers:
            cure = "Call torch.nn.utils.remove_weight_norm, prune.remove or the like first, or keep it injected"
            raise NotMergeable("a weight that is made from other tensors in each forward", where=where, cure=cure)
        if parameter.is_meta or id(parameter) in memory.on_disk:
            cure = "Load the weights first, or write handle.adapter() and merge the files of the base"
            raise NotMergeable("a weight that is offloaded, or on the meta device", where=where, cure=cure)
        if parameter.dtype.itemsize < 2:
            cure = "Merge before the base is cast to 8 bits, or write handle.adapter() and merge the files of the base"
            raise NotMergeable(f"a weight stored as {parameter.dtype}", where=where, cure=cure)
        if parameter.layout is not torch.strided:
            raise NotMergeable(f"a weight stored as {parameter.layout}", where=where, cure=KEEP_INJECTED)
        if any(stride == 0 < size - 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            raise NotMergeable("a weight whose elements share memory", where=where, cure=KEEP_INJECTED)
        if type(parameter) not in (Tensor, nn.Parameter) and not is_sharded(parameter):
            kind = type(parameter.data).__name__
            cure = "Write handle.adapter() and merge the file: adapterkit merge BASE ADAPTER -o OUT"
            raise NotMergeable(f"a weight that is a {kind}, no plain tensor", where=where, cure=cure)
        names = memory.beside(parameter)
        if len(names) > 1 and id(parameter) not in shared:
            raise NotMergeable(f"the same memory under the names {', '.join(names)}", where=where, cure=KEEP_INJECTED)


def _once(model: nn.Module, found: Folded) -> tuple[Folded, set[int]]:
    """Keep one of the equal parts at layers that share a parameter, where all layers that share it change alike.

    Returns:
        the hooks with the parts that are left, and the ids of those parameters.
    """
    names: dict[int, int] = {}
    for _, parameter in _parameters(model):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    alike: dict[tuple[int, int], list[Part]] = {}
    for hook, parts in found:
        for part in parts:
            packed = isinstance(hook.layer, Quantized)  # Such a module may have no `weight`.
            weight = tensor_at(hook.module, part.weight) if part.weight and not packed else None
            if weight is not None and names.get(id(weight), 1) > 1:
                alike.setdefault((id(weight), id(part.switch)), []).append(part)
    whole = {key: parts for key, parts in alike.items() if len(parts) == names[key[0]] and change_alike(parts)}
    shared = {tensor for tensor, _ in whole if all(key in whole for key in alike if key[0] == tensor)}
    again = [part for (tensor, _), parts in whole.items() if tensor in shared for part in parts[1:]]
    return [(hook, [part for part in parts if part not in again]) for hook, parts in found], shared


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


KEEP_INJECTED = "Keep it injected instead"
