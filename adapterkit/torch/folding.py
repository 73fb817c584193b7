"""Merge adapters into the weights of a live model, and restore the exact bits from before the merge.

`Handle.merge_` and `Handle.unmerge_` use this module. Before any weight changes, `foldable` in handle.py raises an
error for updates that cannot be merged. `fold` computes the new weights in float64 and rounds them once. It merges
additive updates in place, one block of rows at a time, and all other updates one module at a time.

`Merged` holds the data for `unmerge_`. With `keep="copy"`, this is a copy of the old weights. With `keep="recompute"`,
`unmerge_` subtracts the adapter, so `Merged` only stores the elements that the subtraction would not restore exactly.
If the change is small compared with the weight, these are a few percent of the elements. `merge_` subtracts the adapter
once to find these elements. `unmerge_` runs the same code (`fold` with `Switch.weight` negated), so it gets the same
bits. If the restored bits still differ from the old ones (the adapter was changed, for example), a checksum of the old
bits detects it.
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
from .parts import Part
from .scopes import Switch
from .sharding import are_finite, gathered, is_sharded, put
from .weights import tensor_at


def fits(parameter: Tensor, parts: list[Part]) -> bool:
    """Whether the parts can be added to a weight in place.

    The updates must be additive and must not change the bias. The weight must be contiguous, have at least 16 bits per
    element, and be neither empty nor sharded.
    """
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
    """Add the parts' changes to a stored weight, block by block.

    The dense change of a whole weight is computed only if a formula needs it.
    """
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
"""Pairs of a hook and the hook's parts that a merge adds to the weights."""

KEEPS = ("copy", "recompute")
"""The values of `keep` in `Handle.merge_`, besides True and False."""

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Merged:
    """A parameter that a merge changed, with the data that restores the bits from before the merge.

    Attributes:
        parameter: the parameter, which has its merged values.
        before: a copy of the parameter from before the merge, or None if `unmerge_` recomputes the old bits.
        places: if the old bits are recomputed, the flat indices of the elements that a subtraction does not restore.
        values: the old bits of the elements at `places`.
        checksum: the checksum of all old bits, if they are recomputed.
        after: the checksum of the merged bits, if `before` is kept. It detects changes through `.data`, which torch
            does not count in `parameter._version`.
        version: torch's count of the parameter's in-place changes (`parameter._version`), right after the merge.
        dtype: the parameter's dtype before the merge, if the old bits are recomputed.
        stack: the merges into the parameter that can be undone, in order. All merges into one parameter share this
            list.
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

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "version": self.version - _version(self.parameter)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        # `__getstate__` stored `version` minus `_version`, because a copied parameter has another `_version`.
        self.version += _version(self.parameter)
        _MERGES.setdefault(self.parameter, self.stack)

    @property
    def is_last(self) -> bool:
        """Whether this merge is the last change of the parameter."""
        known = self.after is None or self.before is None or self.before.dtype is not self.parameter.dtype
        same = self.stack[-1] is self and _version(self.parameter) == self.version
        return same and (known or _checksum(_bits(self.parameter)) == self.after)

    @property
    def is_cast(self) -> bool:
        """Whether the parameter has another dtype now, so that its old bits cannot be recomputed.

        False if `before` keeps a copy of the old bits.
        """
        return self.dtype not in (None, self.parameter.dtype)

    @property
    def overflowed(self) -> bool:
        """Whether the merge created a NaN or an infinity. Those of the base are kept.

        For a DTensor, every process must read this property, and all get the same value.
        """
        assert self.before is not None
        now, before = are_finite([self.parameter, self.before])
        return before and not now

    def push(self) -> None:
        """Record the merge as the parameter's last change."""
        self.version = _version(self.parameter)
        if self.before is not None and not is_sharded(self.parameter):
            self.after = _checksum(_bits(self.parameter))
        self.stack = _MERGES.setdefault(self.parameter, self.stack)
        self.stack.append(self)

    def forget(self) -> None:
        """Remove the merge from the list of merges that can be undone, if it is there."""
        if self in self.stack:
            self.stack.remove(self)

    def pop(self) -> None:
        """Record that the merge is undone. The previous merge becomes the parameter's last change."""
        self.stack.pop()
        if self.stack:
            self.stack[-1].version = _version(self.parameter)

    def slim(self, again: Tensor) -> None:
        """Replace the copy of the old parameter by the data that recomputing needs.

        Recomputing may not restore some elements exactly. The data is the old bits of these elements, with their flat
        indices. If this data does not take less memory than the copy, keep the copy.

        Args:
            again: the parameter's values, recomputed by subtracting the merge's change.
        """
        assert self.before is not None
        was, now = _bits(self.before), _bits(again)
        places = (was != now).nonzero().flatten()
        if len(places) * (8 + was.element_size()) < was.numel() * was.element_size():
            self.places, self.values, self.checksum, self.dtype = places, was[places], _checksum(was), self.before.dtype
            self.before = None

    def restored(self, again: Tensor) -> Tensor | None:
        """Return the parameter's values from before the merge; None if the checksum does not match.

        Args:
            again: the parameter's values, recomputed by subtracting the merge's change.
        """
        if self.before is not None:
            return self.before
        assert self.places is not None
        assert self.values is not None
        restored = again.detach().clone(memory_format=torch.contiguous_format)
        bits = _bits(restored)
        bits[self.places.to(bits.device)] = self.values.to(bits.device)
        return restored if _checksum(bits) == self.checksum else None


def _version(tensor: Tensor) -> int:
    """Return torch's count of a tensor's in-place changes; 0 for inference tensors, whose changes torch does not count.

    For these, only the checksums detect changes.
    """
    return 0 if tensor.is_inference() else tensor._version


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_WHOLE[flat.element_size()])


def _checksum(bits: Tensor) -> tuple[int, int]:
    return int(torch.hash_tensor(bits).view(torch.int64)), int(bits.sum(dtype=torch.int64))


_MERGES: Any = WeakIdKeyDictionary()
"""Parameter -> the merges into this parameter that can be undone, in order."""


class Memory:
    """Find parameters of a model that share memory: tied parameters and views.

    Two parameters share memory if their address ranges overlap. Comparing their storages would be wrong: cuDNN puts all
    weights of an LSTM into one storage, but the weights do not overlap.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(_parameters(model))
        self.on_disk = on_disk(model.modules())
        self._sharded = [(name, p) for name, p in named if is_sharded(p)]
        watched = [(name, p) for name, p in named if type(p) is nn.Parameter and p.layout is torch.strided]
        self._ranges = sorted((*_range(p), name) for name, p in watched if p.numel() and p.device.type != "meta")
        self._longest = max((stop - start for start, stop, _ in self._ranges), default=0)

    def beside(self, tensor: Tensor) -> list[str]:
        """Return the names of all parameters that share memory with a tensor, including the tensor's own names."""
        if is_sharded(tensor):  # A DTensor has no address; two DTensors share memory only if they are the same object.
            return [name for name, other in self._sharded if other is tensor]
        start, stop = _range(tensor)
        first = bisect.bisect_left(self._ranges, (start - self._longest,))
        last = bisect.bisect_left(self._ranges, (stop,))
        return [name for begin, end, name in self._ranges[first:last] if end > start and begin < stop]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) for the parameters of all modules.

    A parameter that several modules share is yielded once for each module. A module that has several names is visited
    only once.
    """
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte, and the address after its last byte."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + span * tensor.element_size()


def changed_by(parts: Sequence[Part]) -> list[str]:
    """Return the paths of the parameters that the parts change. The paths are relative to the hook's module."""
    weights = [p.weight for p in parts if p.weight and any(u.changes_weight for u in p.updates)]
    biases = [p.bias for p in parts if p.bias and any(u.changes_bias for u in p.updates)]
    return list(dict.fromkeys((*weights, *biases)))


@torch.no_grad()
def fold(hook: ForwardHook, parts: list[Part]) -> None:
    """Merge parts into the parameters of a hook's module.

    If `fits` is true for all these parameters, the changes are added block by block. Otherwise, all new parameters are
    computed as a whole.
    """
    parts = [replace(part, bound=LiveUpdates([gathered(update) for update in part.updates])) for part in parts]
    weights = dict.fromkeys(part.weight for part in parts)
    alone = {path: [part for part in parts if part.weight == path] for path in weights if path}
    if len(alone) == len(weights) and all(
        fits(tensor_at(hook.module, p), changes_here) for p, changes_here in alone.items()
    ):
        for path, changes_here in alone.items():
            fold_in_place(path, tensor_at(hook.module, path), changes_here)
        return
    changed = hook.changed(parts, torch.float64)
    for path, value in changed.items():
        put(tensor_at(hook.module, path), value)


def is_whole(model: nn.Module, folded: Folded, merged: Sequence[Merged]) -> bool:
    """Whether a model still has the modules and parameters that a merge changed."""
    modules, parameters = {id(module) for module in model.modules()}, {id(each.parameter) for each in merged}
    if any(id(hook.module) not in modules for hook, _ in folded):
        return False
    return all(id(tensor_at(hook.module, p)) in parameters for hook, parts in folded for p in changed_by(parts))


def subtracted(folded: Folded, merged: list[Merged]) -> list[tuple[Merged, Tensor | None]]:
    """Return (merge, old values) for each merged parameter. If old values cannot be recomputed, they are None."""
    restored_values: list[tuple[Merged, Tensor | None]] = []
    by = {id(each.parameter): each for each in merged}
    for hook, parts in folded:
        mine = [by[key] for path in changed_by(parts) if (key := id(tensor_at(hook.module, path))) in by]
        values = _less(hook, parts) if any(each.before is None for each in mine) else {}
        restored_values += [(each, each.restored(values.get(id(each.parameter), each.parameter))) for each in mine]
    return restored_values


def _less(hook: ForwardHook, parts: list[Part]) -> dict[int, Tensor]:
    """Return the values of a hook's parameters after the parts are subtracted, keyed by `id(parameter)`.

    The parts are subtracted in place. Before this function returns, it gives the parameters their previous values back.
    """
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
    """Replace the copy of each old parameter by the data that recomputing needs; see `Merged.slim`.

    The old values are recomputed by subtracting the parts from the merged parameters.
    """
    values = _less(hook, parts)
    for each in merged:
        each.slim(values[id(each.parameter)])


def restore(restored_values: Sequence[tuple[Merged, Tensor | None]]) -> None:
    """Copy each value into the parameter of its `Merged`. Parameters whose value is None stay unchanged."""
    for each, value in restored_values:
        if value is not None:
            each.parameter.copy_(value)


class Unmerging:
    """Take a merge out of the weights, module by module. If `take_out` fails halfway, `undo` restores the merge.

    `undo` needs the merged bits of all parameters. To keep these bits in addition to the copies of the old bits would
    take twice the memory. So after a parameter's old bits are restored, a copy of its merged bits replaces the copy of
    its old bits. If the old bits are recomputed, no copy of the merged bits is needed, because merging again gives the
    same bits.
    """

    def __init__(self) -> None:
        self._summed: Folded = []
        self._swapped: list[tuple[Merged, Tensor, bool]] = []
        self._current: list[tuple[Merged, Tensor | None]] = []

    def take_out(self, hook: ForwardHook, parts: list[Part], merged: list[Merged]) -> bool:
        """Give a module's parameters the bits that they had before the merge, and return True.

        If the old bits of a parameter cannot be recomputed, return False and change nothing.
        """
        restored_values = subtracted([(hook, parts)], merged)
        if any(value is None for _, value in restored_values):
            return False
        kept = [(each, each.parameter.detach().clone(), each.before is not None) for each, _ in restored_values]
        self._current = [(each, value) for each, value, _ in kept]
        restore(restored_values)
        # Assign both attributes in one statement, so that an interrupt leaves them consistent.
        if any(copied for _, _, copied in kept):
            self._swapped, self._current = [*self._swapped, *kept], []
            for each, _, _ in kept:
                each.before = None
        else:
            self._summed, self._current = [*self._summed, (hook, parts)], []
        return True

    def undo(self) -> None:
        """Restore the merged weights in all parameters that `take_out` changed."""
        restore(self._current)
        for hook, parts in self._summed:
            fold(hook, parts)
        for each, value, copied in self._swapped:
            each.before = each.parameter.detach().clone() if copied else None
            restore([(each, value)])


def checked_folds(model: nn.Module, folded: Folded) -> Folded:
    """Check that all parts can be merged, and return the parts to merge.

    If all layers that share a parameter have equal parts, only one layer's parts are returned, so that the parameter
    changes only once.

    Raises:
        NotMergeable: an update needs a bias that the base does not have, or a weight cannot be changed in place.
    """
    folded, shared = _once(model, folded)
    memory = Memory(model)
    for hook, parts in folded:
        _check_parts(hook, parts, shared, memory)
    return folded


def _check_parts(hook: ForwardHook, parts: list[Part], shared: set[int], memory: Memory) -> None:
    for part in parts:
        if part.bias is None and any(u.changes_bias and u.needs_bias for u in part.updates):
            why = "the update changes a bias that the base does not have"
            raise NotMergeable(why, where=str(part.target), cure=KEEP_INJECTED)
        if isinstance(hook.layer, Quantized):
            why = "the weight is quantized, and would have to be quantized again"
            raise NotMergeable(why, where=str(part.target), cure=KEEP_INJECTED)
    for path in changed_by(parts):
        parameter, where = tensor_at(hook.module, path), str(parts[0].target)
        owner, _, name = path.rpartition(".")
        holder = hook.module.get_submodule(owner)
        if name not in holder._parameters and name not in holder._buffers:
            cure = "Call torch.nn.utils.remove_weight_norm or prune.remove first, or keep the adapter injected"
            raise NotMergeable("the weight is computed from other tensors in each forward", where=where, cure=cure)
        if parameter.is_meta or id(parameter) in memory.on_disk:
            cure = "Load the weights first, or write handle.adapter() and merge it into the base's files"
            raise NotMergeable("the weight is offloaded or on the meta device", where=where, cure=cure)
        if parameter.dtype.itemsize < 2:
            cure = "Merge before the base is cast to 8 bits, or write handle.adapter() and merge it into the base files"
            raise NotMergeable(f"the weight is stored as {parameter.dtype}", where=where, cure=cure)
        if parameter.layout is not torch.strided:
            raise NotMergeable(f"the weight is stored as {parameter.layout}", where=where, cure=KEEP_INJECTED)
        if any(stride == 0 < size - 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            raise NotMergeable("some elements of the weight share memory", where=where, cure=KEEP_INJECTED)
        if type(parameter) not in (Tensor, nn.Parameter) and not is_sharded(parameter):
            kind = type(parameter.data).__name__
            cure = "Write handle.adapter() and merge the file: adapterkit merge BASE ADAPTER -o OUT"
            raise NotMergeable(f"the weight is a {kind}, not a plain tensor", where=where, cure=cure)
        names = memory.beside(parameter)
        if len(names) > 1 and id(parameter) not in shared:
            why = f"the weight shares its memory: the parameters {', '.join(names)} overlap"
            raise NotMergeable(why, where=where, cure=KEEP_INJECTED)


def _once(model: nn.Module, folded: Folded) -> tuple[Folded, set[int]]:
    """If all layers that share a parameter have equal parts, keep the part of only one of these layers.

    Returns:
        The hooks with the remaining parts, and the ids of the shared parameters whose layers all have equal parts.
    """
    names: dict[int, int] = {}
    for _, parameter in _parameters(model):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    alike: dict[tuple[int, int], list[Part]] = {}
    for hook, parts in folded:
        for part in parts:
            packed = isinstance(hook.layer, Quantized)  # Some quantized modules have no `weight`.
            weight = tensor_at(hook.module, part.weight) if part.weight and not packed else None
            if weight is not None and names.get(id(weight), 1) > 1:
                alike.setdefault((id(weight), id(part.switch)), []).append(part)
    whole = {key: parts for key, parts in alike.items() if len(parts) == names[key[0]] and change_alike(parts)}
    shared = {tensor for tensor, _ in whole if all(key in whole for key in alike if key[0] == tensor)}
    again = [part for (tensor, _), parts in whole.items() if tensor in shared for part in parts[1:]]
    return [(hook, [part for part in parts if part not in again]) for hook, parts in folded], shared


def change_alike(parts: list[Part]) -> bool:
    """Whether all parts, which belong to layers that share a parameter, change this parameter in the same way."""
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


KEEP_INJECTED = "Keep the adapter injected instead"
