"""Routing: a different adapter for each row of a batch, in one forward pass of the whole model.

A linear layer, convolution or embedding with low-rank adapters runs once, and batched.py adds the change of each row's
adapter to the output. Any other module with adapters runs once for each group of rows that use the same adapter. For
each group, the hook calls the module's own forward, or computes the layer's output with the methods' formulas. Modules
without adapters run once.

The *axis of rows* is the axis of a tensor along which the rows of the batch are stacked. It is the first axis, or the
axis that the argument `axis` gives. In torch's recurrent layers and attention, `batch_first` determines the axis of
rows. Routing raises an error for a module whose axis of rows is unknown. It also raises an error for an adapted expert
if the rows use different adapters, because an expert gets only the tokens that are routed to it, and not whole rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from ..core.arguments import checks_types
from ..errors import Unsupported, UsageError, nearest
from .parts import HOOK
from .scopes import SETTINGS, Route, Switch, current, routed

if TYPE_CHECKING:
    from .parts import Beside


@checks_types
@contextmanager
def route(
    model: nn.Module, names: Sequence[str | None], *, flattened: bool = False, axis: int | None = None
) -> Iterator[None]:
    """Use a different adapter for each row of a batch: inside the `with`, row i uses `names[i]` (None: the base).

    By default, the axis of rows is the first axis of each module's inputs and outputs. An argument is split if this
    axis has one entry for each row of the batch. With `flattened`, the axis may instead have several entries for each
    row. Any other argument is not split: every row gets the whole argument.

    The route applies only in this thread (and this asyncio task). Inside the route, `with handle.disable()` runs the
    rows of the handle's adapter through the unchanged base.

    Args:
        model: the model, with adapters attached.
        names: for each row, the name of an attached adapter, or None.
        flattened: whether some modules get the rows and the tokens joined in one axis `[rows * tokens, ...]`, with all
            tokens of row 0 first. Mixtures of experts do this.
        axis: the axis of the rows: 0, or 1 in a model with sequence-first tensors `[tokens, rows, ...]`. It must be
            given if the model has a module with `batch_first=False`.

    Raises:
        UsageError: `names` is empty, an adapter in `names` is not attached or is switched off, or `axis` is invalid.
        ShapeMismatch: raised by a forward if the batch's number of rows is not the length of `names`.
        Unsupported: a module of the model has `batch_first=False`, and `axis` is not given. A forward also raises
            Unsupported if it runs a module whose rows cannot be identified.
    """
    names = tuple(names)
    hooks, first = [], None
    for module in model.modules():
        attributes = module.__dict__
        if HOOK in attributes:
            hooks.append(attributes[HOOK])
        # Read the dictionary: getattr() is slow for a missing attribute, and most modules have no `batch_first`.
        if first is None and attributes.get("batch_first", getattr(type(module), "batch_first", None)) is False:
            first = module
    switches = _switches_of(hooks)
    _check_names(names, switches)
    if axis is None and first is not None:
        where = next(name for name, module in model.named_modules() if module is first)
        why = f"a {type(first).__name__} has batch_first=False, so rows may be the second axis"
        raise Unsupported(
            why, where=where, cure="Pass axis=1 if rows are the second axis of the tensors, axis=0 if the first"
        )
    if axis not in (None, 0, 1) or (axis and flattened):
        raise UsageError(
            "axis must be 0 or 1; with flattened=True it must be 0",
            cure="Pass axis=0, or axis=1 without flattened=True",
        )
    known = tuple(switches)
    slots = {name: slot for slot, name in enumerate(known)}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    table = torch.tensor([slots.get(name, len(known)) if name else len(known) for name in names], device=device)
    with routed(dict.fromkeys(hooks, Route(names, flattened, axis or 0, known, tuple(switches.values()), table))):
        yield


class _KeptSwitches(Protocol):
    model: tuple[object, Sequence[object], dict[str, Switch]] | None


class _RoutedHook(Protocol):
    """A module's forward hook, with the switches of the hook's adapters and the cache that `_switches_of` uses."""

    @property
    def kept(self) -> _KeptSwitches: ...

    @property
    def switches(self) -> Sequence[Switch]: ...


def _switches_of(hooks: list[_RoutedHook]) -> dict[str, Switch]:
    """Return the switches of a model's adapters, keyed by name. The result is cached until a switch changes."""
    if not hooks:
        return {}
    token, kept = SETTINGS.token, hooks[0].kept
    if kept.model is None or kept.model[0] is not token or kept.model[1] != hooks:
        kept.model = token, hooks, {switch.name: switch for hook in hooks for switch in hook.switches}
    return kept.model[2]


def _check_names(names: tuple[str | None, ...], switches: dict[str, Switch]) -> None:
    if not names:
        raise UsageError("the route has no rows", cure="Pass one name, or None, for each row of the batch")
    scope = current()
    for name in dict.fromkeys(names):
        if name is not None and name not in switches:
            cure = nearest(name, set(switches)) or "Inject the adapter first"
            raise UsageError(f"{_rows(names, name)}: no such adapter is attached", where=name, cure=cure)
        if name is not None and not switches[name].on(scope):
            raise _switched_off(names, name)


def check_switches(route: Route, switches: Sequence[Switch], active: Mapping[Switch, bool]) -> None:
    """Check that no adapter of a route was removed, or switched off for all threads, since the route was entered.

    Raises:
        UsageError: another thread removed or merged an adapter of the route, or `handle.set_active(False)` switched it
            off. Calling `handle.disable()` inside the route is allowed.
    """
    for switch in route.switches:
        name: str = switch.name
        if not switch.attached and name in route.names:
            why = f"{_rows(route.names, name)}: the adapter was removed since the route was entered"
            raise UsageError(why, where=name, cure="Pass names of attached adapters, or None for these rows")
    for switch in switches:
        name = switch.name
        if not switch.active and switch not in active and name in route.names:
            raise _switched_off(route.names, name)


def check_unrouted(switch: Switch) -> None:
    """Check that no route of this context names an adapter that is about to be removed.

    Raises:
        UsageError: a route names this adapter. After the removal, the adapter's rows would silently use only the base.
    """
    name: str = switch.name
    for route in current().routes.values():
        if switch in route.switches and name in route.names:
            why = f"the active route uses the adapter for {_rows(route.names, name)}"
            raise UsageError(why, where=name, cure="Exit the `with route(...)` block before remove() or merge_()")


def _switched_off(names: tuple[str | None, ...], name: str) -> UsageError:
    why = f"{_rows(names, name)}: the adapter is switched off, so these rows would get only the base"
    return UsageError(why, where=name, cure="Call handle.set_active(True), or pass None for these rows")


def _rows(names: Sequence[str | None], name: str) -> str:
    """Return the indices of the rows that use one adapter, as text: `rows 0, 3`."""
    rows = [str(row) for row, other in enumerate(names) if other == name]
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(rows[:8])}{more}"


def is_expert(where: str) -> bool:
    """Whether a target's path contains a numbered expert, such as `experts.3`.

    Such an expert gets only some tokens of each row, and may get these tokens in another order.
    """
    return _EXPERT.search(where) is not None


def check_expert(route: Route, where: str) -> None:
    """Raise an error if a target is an expert and the rows of a route use different adapters.

    The input of an expert does not show which token belongs to which row.

    Raises:
        Unsupported: the target is a numbered expert, and the rows of the route use different adapters (or some use an
            adapter and others the base).
    """
    if len(set(route.names)) > 1 and is_expert(where):
        why = "an expert gets only the tokens routed to it, and the rows of these tokens are unknown"
        raise Unsupported(why, where=where, cure=_ALONE)


def split(
    route: Route, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], beside: dict[str, Beside],
    where: str,
) -> Iterator[tuple[str | None, Sequence[object], dict[str, object], dict[str, Beside]]]:  # fmt: skip
    """Split the arguments of a module's forward into groups of rows that use the same adapter.

    For each group, yields the adapter's name (None for the base) and the group's share of `args`, `kwargs` and
    `beside`.

    Args:
        route: the adapter of each row.
        module: the module.
        args: the positional arguments of the module's forward.
        kwargs: the keyword arguments of the module's forward.
        beside: a map from each adapter's name to a pair: the adapter's residual (or None), and the arguments of the
            model's call. The tensors in this map are split like the tensors in `args`.
        where: the target, for errors.

    Raises:
        ShapeMismatch: the number of rows in the arguments does not fit the route; see `_count`.
        Unsupported: the axis of rows of the arguments is unknown, or the target is an expert (see `check_expert`).
    """
    check_expert(route, where)
    axes, same = _axes(route, module, args, kwargs, where)
    kwargs = {name: value for name, value in kwargs.items() if name not in same}
    turned = _turned((args, kwargs, beside), axes, front=True)
    count = _count(route, [leaf for leaf in pytree.tree_leaves(turned) if isinstance(leaf, Tensor)], where)
    for name, rows in route.groups().items():
        taken = partial(_taken, rows=rows, total=len(route.names), count=count)
        some, named, more = _turned(pytree.tree_map(taken, turned), axes, front=False)
        yield name, some, named | same, more


def join(route: Route, module: nn.Module, outputs: Sequence[object], where: str) -> object:
    """Join the outputs that the module returned for the groups of `split`, with the rows in their original order.

    Raises:
        Unsupported: an output is a tensor without an axis of rows. Or the groups returned different values for an
            output that is not a tensor.
    """
    axis = _axis_of_outputs(route, module)
    turned = [_turned(output, axis, front=True) for output in outputs]
    flat, (tree, *_) = zip(*(pytree.tree_flatten(output) for output in turned), strict=True)
    groups = list(route.groups().values())
    order = [row for rows in groups for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    joined = [_joined(leaves, groups, back, where) for leaves in zip(*flat, strict=True)]
    return _turned(pytree.tree_unflatten(joined, tree), axis, front=False)


Axis = Callable[[int, Tensor], int] | None
"""A function that returns a tensor's axis of rows. None means that every tensor's axis of rows is the first axis.

The function takes two arguments: the tensor's position among the tensors of the call, and the tensor.
"""


def _turned(tree: pytree.PyTree, axis: Axis, front: bool) -> pytree.PyTree:
    """Return the tree with each tensor's axis of rows moved to the front or, if `front` is False, moved back."""
    if axis is None:
        return tree
    leaves, spec = pytree.tree_flatten(tree)
    position, moved = 0, []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            at = axis(position, leaf)
            position += 1
            if 0 < at < leaf.ndim:
                leaf = leaf.movedim(at, 0) if front else leaf.movedim(0, at)
        moved.append(leaf)
    return pytree.tree_unflatten(moved, spec)


def _axes(
    route: Route, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], where: str
) -> tuple[Axis, dict[str, object]]:
    """Return the axis of rows of a module's arguments, and the keyword arguments that are the same for all rows."""
    given: list[Any] = [*args, *kwargs.values()]
    if isinstance(module, nn.MultiheadAttention):
        mask: Any = kwargs.get("attn_mask")
        if len(args) > 5 or (mask is not None and mask.ndim > 2):
            why = "attn_mask= is passed by position or has more than two axes"
            raise Unsupported(why, where=where, cure="Pass a two-dimensional mask by name: attn_mask=mask")
        if not given or given[0].ndim != 3:
            raise Unsupported("the input has no axis of rows", where=where, cure="Pass three-dimensional tensors")
        second = 0 if module.batch_first else 1
        # In queries, keys and values, batch_first gives the axis of rows; in a padding mask, rows are the first axis.
        return (lambda _, leaf: second if leaf.ndim == 3 else 0), {"attn_mask": mask} if "attn_mask" in kwargs else {}
    if isinstance(module, nn.RNNBase):
        if isinstance(given[0], PackedSequence) or given[0].ndim != 3:
            why = "the input has no axis of rows"
            raise Unsupported(why, where=where, cure="Pass a padded three-dimensional tensor")
        second = 0 if module.batch_first else 1
        return (lambda position, _: second if position == 0 else 1), {}
    return (lambda *_: route.axis) if route.axis else None, {}


def _axis_of_outputs(route: Route, module: nn.Module) -> Axis:
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        second = 0 if module.batch_first else 1
        others = 0 if isinstance(module, nn.MultiheadAttention) else 1
        return lambda position, _: second if position == 0 else others
    return (lambda *_: route.axis) if route.axis else None


def _count(route: Route, tensors: list[Tensor], where: str) -> int:
    """Return the length of the axis of rows in a call's arguments.

    Usually, this length is the route's number of rows. It is 1 if all rows share one input. If the route is
    `flattened`, it may be a multiple of the number of rows.
    """
    rows = len(route.names)
    sizes = [tensor.shape[0] for tensor in tensors if tensor.ndim]
    if rows in sizes:
        return rows
    if sizes and sizes[0] == 1:
        return 1
    if sizes and route.flattened and sizes[0] % rows == 0:
        return sizes[0]
    raise route.mismatch(sizes[0] if sizes else 0).at(where=where)


def _taken(leaf: object, rows: list[int], total: int, count: int) -> object:
    if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != count:
        return leaf
    if count == total:
        return leaf[rows]
    if count == 1:
        return leaf.expand(len(rows), *leaf.shape[1:])
    return leaf.reshape(total, count // total, *leaf.shape[1:])[rows].flatten(0, 1)


def _joined(leaves: Sequence[object], groups: list[list[int]], back: list[int], where: str) -> object:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) < len(leaves):
        if any(leaf is not leaves[0] and leaf != leaves[0] for leaf in leaves):
            raise Unsupported("the module returns a value without an axis of rows", where=where, cure=_ALONE)
        return leaves[0]
    pairs = list(zip(tensors, groups, strict=True))
    lengths = [tensor.shape[0] // len(rows) if tensor.ndim else 0 for tensor, rows in pairs]
    fits = all(tensor.ndim and tensor.shape[0] == lengths[0] * len(rows) for tensor, rows in pairs)
    if not fits or not lengths[0]:
        raise Unsupported("the module returns a value without an axis of rows", where=where, cure=_ALONE)
    whole = torch.cat(tensors)
    if lengths[0] == 1:
        return whole[back]
    return whole.reshape(len(back), lengths[0], *whole.shape[1:])[back].flatten(0, 1)


_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$|\[)")
_ALONE = "Call the model separately for the rows of each adapter"
