"""Run a layer once for a batch whose rows use different adapters, and add each row's change with batched products.

Punica (https://arxiv.org/abs/2310.18547) and S-LoRA (https://arxiv.org/abs/2311.03285) use the same idea. This module
runs additive updates that can be computed from a pair of low-rank factors (`Additive.thin`). If an adapter of the
batch has other updates at a layer, routing.py runs this layer once for each group of rows with the same adapter.

A `FactorStack` contains the factors of all adapters at a layer, padded to the highest rank. Each adapter has one slot
in the stack. The last slot contains only zeros, for rows without an adapter. The tensor `Route.table` contains the
index of each row's adapter, so torch.compile sees the same graph for all routings.

A stack of frozen adapters is kept between forwards, so the factors of these adapters are in memory twice. Before a kept
stack is used again, the adapters' tensors are checked: they must be the same objects, with the same addresses and the
same version counters. torch increments a tensor's version counter at each in-place change. The check misses only writes
through `tensor.data` into a buffer of a frozen adapter. The factors of trained adapters are stacked anew in each
forward.

On CUDA, if Triton can be imported (torch's Linux wheels include it), two kernels read each row's factors directly from
the stack: see kernels.py. Everywhere else, and whenever a gradient is needed or the code is compiled, torch's matrix
products are used. In both cases, the layer's output keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from math import prod
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.updates import Additive
from ..errors import ShapeMismatch
from .layers import TorchLayer, live_tensor
from .lean import is_eager, is_wide, may_overwrite
from .routing import check_switches
from .scopes import SETTINGS, Route, Scope, Switch

if TYPE_CHECKING:
    from .lean import LeanPlan
    from .leaves import Leaf
    from .parts import Part


class FactorStack:
    """The factors of several adapters at one layer.

    Attributes:
        switches: the on/off switches of the adapters, in the order of the slots. The last slot has no switch.
        A: `[slots, r, in * k]`, the factors A, padded with zeros to the highest rank r.
        B: `[slots, r, out]`, the factors B^T, also padded, and multiplied by the adapters' weights and scalings.
        bias: `[slots, out]`, the changes of the bias, multiplied by the adapters' weights; None if no adapter changes
            the bias.
        ranks: `[slots]`, the rank of each slot, at most r.
        leaves: the adapters' tensors from which the stack was made; None if the stack must not be kept.
    """

    def __init__(
        self, parts: Sequence[Part], A: Tensor, B: Tensor, bias: Tensor | None, ranks: Tensor,
        leaves: list[Leaf] | None,
    ) -> None:  # fmt: skip
        self.token: object = None
        self.switches = tuple(part.switch for part in parts)
        self.weights = [switch.weight for switch in self.switches]
        self.A, self.B, self.bias, self.ranks, self.leaves = A, B, bias, ranks, leaves
        self.all_A, self.all_B = A[:-1], B[:-1]
        # `_side_by_side` needs the factors of all adapters joined: `[in * k, adapters * r]` and `[adapters * r, out]`.
        self.joined_A, self.joined_B = self.all_A.flatten(0, 1).mT, self.all_B.flatten(0, 1)
        self.tensors: list[Tensor] = [leaf.tensor for leaf in leaves or ()]
        self.versions = [tensor._version for tensor in self.tensors] if leaves else []
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        homes = {id(leaf.module): leaf.module for leaf in leaves or ()}
        self.home: nn.Module | None = next(iter(homes.values())) if len(homes) == 1 else None
        self.buffers_read: list[Tensor | None] = []

    def is_current(self, switches: Sequence[Switch], like: Tensor) -> bool:
        """Whether the stack may be used again for the adapters with these switches.

        The stack must have the current factors and weights of these adapters, the device of `like`, and the dtype
        `_dtype_of(like)`.
        """
        if self.leaves is None or switches != self.switches:
            return False
        if self.A.dtype != _dtype_of(like) or self.A.device != like.device:
            return False
        token = SETTINGS.token
        if token is not self.token:
            if [switch.weight for switch in switches] != self.weights:
                return False
            self.token = token
        return self.is_unchanged()

    def is_unchanged(self) -> bool:
        """Whether the modules still hold the tensors from which the stack was made, and no code has changed them."""
        # With 50 adapters, this compares 300 values per layer and forward. Comparing whole lists is faster than a loop.
        tensors = self.tensors
        return (
            self._is_current()
            and [tensor._version for tensor in tensors] == self.versions
            and [tensor.data_ptr() for tensor in tensors] == self.addresses
        )

    def _is_current(self) -> bool:
        """Whether the modules still hold the tensors from which the stack was made."""
        # Copy the buffers: another thread may attach an adapter, and the dictionary must not change during the loop.
        buffers = None if self.home is None else list(self.home._buffers.values())
        # Fast path: one module holds all tensors, and its buffers are the same as at the last check.
        if buffers is not None and len(buffers) == len(self.buffers_read) and all(map(is_, buffers, self.buffers_read)):
            return True
        now = [leaf.module._buffers.get(leaf.name) for leaf in self.leaves or ()]
        if not all(map(is_, now, self.tensors)):
            return False
        self.buffers_read = buffers or []
        return True


class KeptStacks:
    """The stack and the plans that a hook keeps between forwards. A copied or unpickled model starts without them."""

    def __init__(self) -> None:
        self.stack: FactorStack | None = None
        self.plan: LeanPlan | None = None
        self.rows: RowPlan | None = None
        self.model: tuple[object, Sequence[object], dict[str, Switch]] | None = None  # See routing.py.

    def __deepcopy__(self, _memo: dict[int, object]) -> KeptStacks:
        return KeptStacks()

    def __reduce__(self) -> tuple[type[KeptStacks], tuple[()]]:
        return KeptStacks, ()


def _dtype_of(like: Tensor) -> torch.dtype:
    """Return the dtype of the stack for a layer whose weight has the dtype and device of `like`.

    It is the weight's dtype, except for a 16-bit weight on a CPU. For such a weight, eager code multiplies by the
    factors in float32, because 16-bit products are slow on some CPUs (see lean.py). Compiled code keeps the 16-bit
    dtype, because compilers fuse the products.
    """
    return torch.float32 if is_wide(like) and not torch.compiler.is_compiling() else like.dtype


def rank_of(part: Part, layer: TorchLayer) -> int:
    """Return the rank of a part's factors at a layer, or 0 if the part has no low-rank factors there.

    Also return 0 if multiplying by the factors costs more than the layer itself. This happens with some LoHa adapters.
    """
    if not all(isinstance(update, Additive) and update.thin for update in part.updates):
        return 0
    out, *rest = layer.shape
    ranks = [_rank(update, layer.shape) for update in part.updates if isinstance(update, Additive)]
    rank = 0 if None in ranks else sum(rank or 0 for rank in ranks)
    return rank if rank * (out + prod(rest)) <= out * prod(rest) else 0


@torch.no_grad()
def _rank(update: Additive, shape: tuple[int, ...]) -> int | None:
    """Return the rank of an update's factors at a layer of this shape, or None if the update has no factors.

    The result is cached with the key (`update.form`, shape), because a model has thousands of layers, but few shapes.
    The result is not cached if the formula reads values of tensors.
    """
    key = update.form, tuple(shape)
    if key not in _RANKS:
        try:
            pair = update.map(lambda leaf: live_tensor(leaf).to("meta")).pair(shape)
        # A meta tensor has no values, so torch raises one of these errors if the formula reads a value. For example,
        # NOLA's formula reads its seeds.
        except (RuntimeError, NotImplementedError, TypeError):
            pair = update.pair(shape)
            return None if pair is None else int(pair[0].shape[1])
        if len(_RANKS) >= MOST_RANKS:
            _RANKS.clear()
        _RANKS[key] = None if pair is None else int(pair[0].shape[1])
    return _RANKS[key]


_RANKS: dict[Hashable, int | None] = {}
MOST_RANKS = 4096
"""The maximum number of ranks in the cache `_RANKS`. A full cache is emptied."""


def add_by_row(
    layer: TorchLayer, parts: Sequence[Part], route: Route, scope: Scope, x: Tensor, kept: KeptStacks
) -> Tensor:
    """Run a layer once, and add to each row of its output the change that this row's adapter makes.

    Args:
        layer: the layer.
        parts: the parts of all adapters that have low-rank factors at the layer.
        route: the adapter of each row.
        scope: the scope that determines which adapters are on.
        x: the layer's input.
        kept: the hook's cache for the stack.

    Raises:
        ShapeMismatch: the number of rows in x does not fit the route, or the length of the last axis of x is not the
            layer's input size.
    """
    compiling = torch.compiler.is_compiling()
    # torch.jit.trace runs the code twice and compares the two graphs. If the first run kept a stack, the second graph
    # would lack the operations that make the stack.
    tracing = torch._C._get_tracing_state() is not None
    if layer.flat and x.shape[-1:] != layer.shape[1:]:
        why = f"the input has shape {list(x.shape)}, but the layer reads {layer.shape[1]} features"
        raise ShapeMismatch(why, cure=f"Pass an input whose last axis has length {layer.shape[1]}")
    like = layer.sample
    stack = None if compiling or tracing else kept.stack
    if stack is None or not stack.is_current(tuple([part.switch for part in parts]), like):
        # Compiled code stacks all adapters, so that its graph does not depend on the route.
        if not compiling and not all(map(_is_frozen, parts)):
            parts = [part for part in parts if part.switch.name in route.names and part.switch.acts(scope)]
        stack = _stacked(layer, parts, like, keep=not compiling and not tracing)
        if stack.leaves is not None:
            kept.stack = stack
    if compiling:
        names = [part.switch.name for part in parts]
        acting = {part.switch.name for part in parts if part.switch.acts(scope)}
        slots = [names.index(name) if name in acting else len(names) for name in route.known]
        table = torch.tensor([*slots, len(names)], device=x.device)
        index = table.index_select(0, route.table.to(x.device))
        return _gathered(layer, stack, index, route, x) if layer.flat else _masked(layer, stack, index, route, x)
    places = places_of(stack.switches, route, scope, x.device)
    if not layer.flat:
        return _masked(layer, stack, places.index, route, x)
    return add_to_rows(layer, stack, places, route, x)


def add_to_rows(
    layer: TorchLayer, stack: FactorStack, places: Places, route: Route, x: Tensor, kept: KeptStacks | None = None
) -> Tensor:
    """Run a layer that is a matrix product, and add to each row of its output the change of this row's adapter.

    Args:
        layer: the layer, which has `flat` set.
        stack: the factors of the layer's adapters.
        places: the slot of each row.
        route: the adapter of each row.
        x: the layer's input.
        kept: a cache that gets a `RowPlan` for the next forward; None if the layer's module does not support such a
            plan.
    """
    rows = len(route.names)
    tokens = x.numel() // max(x.shape[-1] * rows, 1)
    wide = stack.all_B.shape[0] * stack.A.shape[1]
    plain = stack.bias is None and not torch.is_autocast_enabled(x.device.type)
    plain = plain and (x.dtype == stack.A.dtype or (is_wide(x) and stack.A.dtype == torch.float32))
    if takes_kernel(x, x, stack.A, stack.B):
        return _gathered(layer, stack, places.index, route, x)
    few = wide <= WIDE and tokens == 1 and x.shape[0] == rows and not route.axis
    if plain and few and torch._C._get_tracing_state() is None:
        if kept is not None and x.dtype == stack.A.dtype and not route.axis:
            kept.rows = RowPlan(layer.module, stack)
        return _side_by_side(layer, stack, places, x)
    if places.count * tokens < rows * stack.A.shape[1] and x.shape[route.axis] == rows:
        return _grouped(layer, stack, places, route, x)
    return _gathered(layer, stack, places.index, route, x)


WIDE = 64
"""The largest joined rank (adapters * highest rank) at which multiplying all rows by all factors costs less than
grouping the rows by adapter."""


@dataclass(frozen=True, eq=False)
class Places:
    """The slot that each row of a batch uses in a stack, and the rows grouped by slot.

    Attributes:
        token: the value of `SETTINGS.token` immediately before the adapters' switches were read.
        active: the value of `Scope.active` when the slots were looked up.
        index: `[rows]`, the slot of each row.
        used: the slots that at least one row uses, in ascending order, without the last slot; None if rows use every
            slot before the last.
        padded: `[used * most]`, the indices of the rows, grouped by slot. `most` is the number of rows in the largest
            group. Each smaller group is padded with its first row. None if `padded` would list all rows in order.
        count: the number of indices in `padded`; if `padded` is None, the number of rows.
        back: for each row that has an adapter, its position in `padded`; None if `padded` is None.
        rows: the indices of the rows that have an adapter; None if all rows have one.
        masks: the cached masks of `_side_by_side`, keyed by (rank, dtype).
    """

    token: object
    active: Mapping[Switch, bool]
    index: Tensor
    used: Tensor | None
    padded: Tensor | None
    count: int
    back: Tensor | None
    rows: Tensor | None
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)


def places_of(switches: tuple[Switch, ...], route: Route, scope: Scope, device: torch.device) -> Places:
    """For each row of a route, look up its slot in a stack that contains the adapters with these switches.

    The route caches the result, so that layers with the same adapters share it.
    """
    key = switches, device
    if torch._C._get_tracing_state() is not None:
        return _placed(switches, route, scope, device)
    places = route.plans.get(key)
    if not isinstance(places, Places) or places.token is not SETTINGS.token or places.active is not scope.active:
        places = _placed(switches, route, scope, device)
        if type(places.index) is Tensor:
            route.plans[key] = places
    return places


def _placed(switches: tuple[Switch, ...], route: Route, scope: Scope, device: torch.device) -> Places:
    token = SETTINGS.token
    check_switches(route, switches, scope.active)
    slots = {switch.name: slot for slot, switch in enumerate(switches) if switch.acts(scope)}
    empty = len(switches)
    index = [empty if name is None else slots.get(name, empty) for name in route.names]
    groups: dict[int, list[int]] = {}
    for row, slot in enumerate(index):
        if slot != empty:
            groups.setdefault(slot, []).append(row)
    used = sorted(groups)
    most = max(map(len, groups.values()), default=0)
    padded = [row for slot in used for row in (groups[slot] + groups[slot][:1] * most)[:most]]
    places = {row: start * most + at for start, slot in enumerate(used) for at, row in enumerate(groups[slot])}
    rows = [row for row, slot in enumerate(index) if slot != empty]
    ordered = padded == list(range(len(index)))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.long)

    with torch.inference_mode(False):
        return Places(
            token,
            scope.active,
            tensor(index),
            None if used == list(range(empty)) else tensor(used),
            None if ordered else tensor(padded),
            len(padded),
            None if ordered else tensor([places[row] for row in rows]),
            None if len(rows) == len(index) else tensor(rows),
        )


class RowPlan:
    """A plan to run an `nn.Linear` as `_side_by_side` does.

    A plan is made if the layer has few frozen adapters and each row has one token. Without a plan, each forward of such
    a layer first chooses between `_side_by_side`, `_grouped` and `_gathered`. In a model of width 256, this choice
    takes 25 % of the forward's time. With a plan, a forward only checks whether settings, tensors, or the state of
    torch have changed.
    """

    def __init__(self, module: nn.Module, stack: FactorStack) -> None:
        self.token, self.module, self.stack = SETTINGS.token, module, stack
        self.W = module._parameters["weight"]
        self.device, self.dtype = stack.A.device, stack.A.dtype
        self.kind = self.device.type
        self.place, self.mask = (stack.switches, self.device), (stack.A.shape[1], self.dtype)

    def run(self, route: Route, scope: Scope, x: object) -> Tensor | None:
        """Return the layer's output; None if the plan does not apply to this call."""
        places = route.plans.get(self.place)
        token, parameters = SETTINGS.token, self.module._parameters
        if (
            not isinstance(places, Places)
            or token is not self.token
            or places.token is not token
            or places.active is not scope.active
        ):
            return None
        mask = places.masks.get(self.mask)
        if mask is None or type(x) is not Tensor or x.dtype is not self.dtype or torch.is_grad_enabled():
            return None
        W, rows = parameters.get("weight"), len(mask)
        if W is not self.W or W is None or x.shape[0] != rows or x.numel() != rows * W.shape[1] or not is_eager():
            return None
        if torch.is_autocast_enabled(self.kind) or x.device != self.device or not self.stack.is_unchanged():
            return None
        # A parametrized or pruned bias is not in `_parameters`; the module computes it on access.
        b: Any = parameters["bias"] if "bias" in parameters else self.module.bias  # noqa: SIM401
        y = functional.linear(x, W, b)
        h = (x.reshape(rows, -1) @ self.stack.joined_A).mul_(mask)
        y.view(rows, -1).addmm_(h, self.stack.joined_B)
        return y


def _is_frozen(part: Part) -> bool:
    """Whether the part's tensors are buffers, so that their stack may be kept."""
    return not any(isinstance(leaf.tensor, nn.Parameter) for fields in part.bound.leaves for leaf in fields.values())


def _stacked(layer: TorchLayer, parts: Sequence[Part], like: Tensor, keep: bool) -> FactorStack:
    """Stack the factors of parts in order, and pad them with zeros to the highest rank."""
    leaves = _leaves(parts) if keep else None
    # A stack that is kept must be made outside inference mode: a later training forward cannot use inference tensors.
    with torch.inference_mode(False) if leaves is not None and torch.is_inference_mode_enabled() else nullcontext():
        like = like.new_empty(0, dtype=_dtype_of(like))
        pairs = [_pair(layer, part, like) for part in parts]
        ranks = torch.tensor([*(len(A) for A, _, _ in pairs), 0], dtype=torch.int32, device=like.device)
        rank = max(len(A) for A, _, _ in pairs)
        factors = [A for A, _, _ in pairs], [B for _, B, _ in pairs]
        padded = [[functional.pad(each, (0, 0, 0, rank - len(each))) for each in some] for some in factors]
        stacked_A, stacked_B = (torch.stack([*some, torch.zeros_like(some[0])]) for some in padded)
        biases = [bias for _, _, bias in pairs]
        bias, zeros = None, stacked_B.new_zeros(stacked_B.shape[-1])
        if any(each is not None for each in biases):
            bias = torch.stack([*(zeros if each is None else each for each in biases), zeros])
        # Do not keep tensors that were made in a mode such as FakeTensorMode: they have no values for later forwards.
        return FactorStack(parts, stacked_A, stacked_B, bias, ranks, leaves if type(stacked_A) is Tensor else None)


def _leaves(parts: Sequence[Part]) -> list[Leaf] | None:
    """Return the tensors of parts; None if a tensor needs a gradient, or if changes of a tensor cannot be detected."""
    leaves = [leaf for part in parts for fields in part.bound.leaves for leaf in fields.values()]
    for leaf in leaves:
        tensor = leaf.module._buffers.get(leaf.name)
        if tensor is None or type(tensor) is not Tensor or tensor.is_inference() or tensor.requires_grad:
            return None
    return leaves


def factors_of(update: Additive, layer: TorchLayer, like: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return B `[out, r]`, A `[r, in * k]` and a scalar s. The update changes the weight by `s * B @ A`.

    The tensors have the device and dtype of `like`.
    """
    factors = update.factors(layer.shape)
    assert factors is not None
    B, A, weight = factors
    if A.dtype != like.dtype or B.dtype != like.dtype or A.device != like.device:
        A, B = A.to(like.device, like.dtype), B.to(like.device, like.dtype)
    return B, A, weight


def _pair(layer: TorchLayer, part: Part, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a part's A `[r, in * k]`, B^T `[r, out]` and bias change.

    B^T is multiplied by the updates' scalings and by the adapter's weight. The bias change is multiplied only by the
    adapter's weight.
    """
    all_A, all_B, bias = [], [], None
    for update in part.updates:
        assert isinstance(update, Additive)
        B, A, weight = factors_of(update, layer, like)
        all_A.append(A)
        all_B.append(B.mT * (weight * part.switch.weight))
        d = update.bias_delta()
        if d is not None:
            d = part.switch.weight * d.to(like.device, like.dtype)
            bias = d if bias is None else bias + d
    return torch.cat(all_A), torch.cat(all_B), bias


def _grouped(layer: TorchLayer, stack: FactorStack, places: Places, route: Route, x: Tensor) -> Tensor:
    """Group the rows by adapter, and apply each adapter to its group by two batched products.

    This reads the factors once per adapter, not once per row. It is the best choice if each row has few tokens.
    """
    y: Tensor = layer(x)
    if not places.count:
        route.rows_first(x)
        return y
    rows_of_x, rows_of_y = route.rows_first(x), route.rows_first(y)
    A, B, bias, used = stack.all_A, stack.all_B, stack.bias, places.used
    if used is not None:
        A, B = stack.A.index_select(0, used), stack.B.index_select(0, used)
    some = rows_of_x if places.padded is None else rows_of_x.index_select(0, places.padded)
    if A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        wide = is_wide(x) and A.dtype == torch.float32
        A, B, some = (A, B, some.float()) if wide else (A.to(x.dtype), B.to(x.dtype), some)
    # On a CPU, `A @ x^T` takes half the time of `x @ A^T` (torch 2.13 with MKL, 50 adapters with two rows each).
    h = torch.bmm(A, some.reshape(A.shape[0], -1, x.shape[-1]).mT).mT
    change = torch.bmm(h, B)
    if bias is not None:
        change = change + (bias[:-1] if used is None else bias.index_select(0, used))[:, None]
    change = change.reshape(places.count, *rows_of_y.shape[1:]).to(y.dtype)
    if places.back is not None:
        change = change.index_select(0, places.back)
    alone = layer.fresh and rows_of_y is y and y.dtype == change.dtype and may_overwrite(y)
    if places.rows is not None:
        add = rows_of_y.index_add_ if alone else rows_of_y.index_add
        return route.rows_back(add(0, places.rows, change), y)
    return y.add_(change) if alone else route.rows_back(rows_of_y + change, y)


def _side_by_side(layer: TorchLayer, stack: FactorStack, places: Places, x: Tensor) -> Tensor:
    """Multiply every row by the joined factors of all adapters, and mask the adapters that the row does not use.

    The mask is applied between the two products. The joined factors have the rank `adapters * r`. This function
    takes three operations, and `_grouped` takes five, so this function is faster if `adapters * r` is small (see
    `WIDE`).
    """
    y: Tensor = layer(x)
    rows, rank, dtype = x.shape[0], stack.A.shape[1], stack.A.dtype
    mask = places.masks.get((rank, dtype))
    if mask is None:
        with torch.inference_mode(False):
            slots = torch.arange(stack.all_B.shape[0], device=x.device)
            mask = (places.index[:, None] == slots).repeat_interleave(rank, 1).to(dtype)
        places.masks[rank, dtype] = mask
    flat = x.reshape(rows, -1)
    if x.dtype != dtype:
        change = ((flat.to(dtype) @ stack.joined_A) * mask) @ stack.joined_B
        return y + change.view(y.shape).to(y.dtype)
    h = (flat @ stack.joined_A) * mask
    if layer.fresh and not torch.is_grad_enabled() and may_overwrite(y) and y.dtype == dtype:
        y.view(rows, -1).addmm_(h, stack.joined_B)
        return y
    return torch.addmm(y.reshape(rows, -1), h, stack.joined_B).view(y.shape)


def _gathered(layer: TorchLayer, stack: FactorStack, index: Tensor, route: Route, x: Tensor) -> Tensor:
    """Run the layer, and add to each output row the product of the input row and the factors of the row's slot."""
    y = layer(x)
    rows_of_x, rows_of_y = route.rows_first(x), route.rows_first(y)
    flat_x = rows_of_x.reshape(len(index), -1, x.shape[-1])
    flat_y = rows_of_y.reshape(len(index), -1, y.shape[-1])
    alone = layer.fresh and rows_of_y is y and may_overwrite(y)
    out = add_gathered(flat_y, flat_x, stack.A, stack.B, index, stack.ranks, fresh=alone)
    if stack.bias is not None:
        out = out + stack.bias.index_select(0, index)[:, None]
    return route.rows_back(out.reshape(rows_of_y.shape), y)


def _masked(layer: TorchLayer, stack: FactorStack, index: Tensor, route: Route, x: Tensor) -> Tensor:
    """Apply the joined factors of all adapters to every row, and mask the adapters that the row does not use.

    The joined factors have the rank `adapters * r`. Convolutions and embeddings need this function, because they are
    not matrix products. Little time is lost on results that are then masked, because `adapters * r` is usually small
    compared with the number of the layer's outputs.
    """
    y = layer(x)
    slots, rank = stack.A.shape[:2]
    A = stack.A[:-1].reshape((slots - 1) * rank, *layer.shape[1:])
    B = stack.B[:-1].reshape((slots - 1) * rank, -1)
    h = route.rows_first(layer.op(x, A))
    chosen = (index[:, None] == torch.arange(slots - 1, device=x.device)).repeat_interleave(rank, 1).to(h.dtype)
    channel = layer.channel % h.ndim
    shape = [len(index), *[1] * (h.ndim - 1)]
    shape[channel] = chosen.shape[1]
    out = route.rows_first(y) + layer.mix(h * chosen.reshape(shape), B.mT)
    if stack.bias is not None:
        shape[channel] = stack.bias.shape[1]
        out = out + stack.bias.index_select(0, index).reshape(shape)
    return route.rows_back(out, y)


def add_gathered(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, ranks: Tensor, fresh: bool = False
) -> Tensor:
    """Return `y[i] + (x[i] @ A[index[i]]^T) @ B[index[i]]` for each row i.

    Args:
        y: `[rows, tokens, out]`.
        x: `[rows, tokens, in]`.
        A: `[slots, r, in]`, padded with zeros to the highest rank.
        B: `[slots, r, out]`, padded with zeros to the highest rank.
        index: `[rows]`, the slot of each row.
        ranks: `[slots]`, the rank of each slot, at most r; 0 for slots that change nothing.
        fresh: True if no other code holds y, so that the sum may overwrite y.
    """
    if takes_kernel(y, x, A, B):
        from .kernels import add_by_kernel

        return add_by_kernel(y if fresh and y.is_contiguous() else y.clone(), x, A, B, index, ranks)
    return add_by_products(y, x, A.index_select(0, index), B.index_select(0, index), fresh)


def add_by_products(y: Tensor, x: Tensor, A: Tensor, B: Tensor, fresh: bool = False) -> Tensor:
    """Return `y + (x @ A^T) @ B`, using torch's batched products. A is `[rows, r, in]` and B is `[rows, r, out]`."""
    if is_wide(y) and A.dtype == torch.float32:
        change = torch.bmm(torch.bmm(x.float(), A.mT), B).to(y.dtype)
        return y.add_(change) if fresh else y + change
    if A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        A, B = A.to(x.dtype), B.to(x.dtype)
    h = torch.bmm(x, A.mT)
    if fresh and y.dtype == h.dtype == B.dtype:
        return y.baddbmm_(h, B)
    return torch.baddbmm(y, h, B)


def takes_kernel(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the Triton kernels of kernels.py are available and support these tensors."""
    if not x.is_cuda or not _has_triton() or torch.compiler.is_compiling():
        return False
    graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, x, A, B))
    return not graph and all(tensor.is_cuda and tensor.dtype in _DTYPES for tensor in (y, x, A, B))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
