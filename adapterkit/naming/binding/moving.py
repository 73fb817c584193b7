"""Move updates between namings: into and out of fused weights and stacks of experts.

The factors of an update are sliced and joined, but never multiplied with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...core.adapter import Adapter, Target
from ...core.updates import Update
from ...errors import (
    INJECT_INSTEAD,
    USE_ITS_BASE,
    AdapterkitError,
    NotMergeable,
    ShapeMismatch,
    Unsupported,
    UsageError,
)
from ...io import arrange
from ...io.lazy import Lazy, as_lazy
from ..architectures import Architecture, WeightPlace, with_stacks
from ..gguf import row_order
from ..heads import Heads, by_group, heads_of, undone
from ..moves import Move, Names, PathPart
from ..resolver import resolve, translate
from .fitting import Shapes, fits, paths_of

if TYPE_CHECKING:
    from ...io.lazy import Array, Leaf


# Move updates into and out of fused weights and stacks of experts.
#
# If the base stores a target's weight in several tensors, the target's update is split into one update per tensor. Each
# of the new updates changes some of the target's output rows, or one expert. If the base stores a stack of experts, the
# updates of single experts are joined into one update of the stack.


Config = Mapping[str, object] | None

Placed = tuple[Target, Target, tuple[Update, ...]]
"""(target in the adapter, target in the base, updates for the target in the base)."""

_LAYOUT_OF_ONE = {"e out *in": "out *in", "e in out *k": "in out *k"}
_LAYOUT_OF_STACK = {"out *in": "e out *in", "in out *k": "e in out *k"}


def moved(
    updates: Mapping[Target, tuple[Update, ...]],
    moves: Mapping[str, tuple[Move, ...]],
    shapes: Shapes,
    config: Mapping[str, object] | None = None,
) -> list[Placed]:
    """Split and join an adapter's updates so that each result fits one tensor of the base.

    Args:
        updates: a map from each target to its updates.
        moves: a map from each target's path to its moves, which state where the base stores the target's rows or
            experts. Targets without moves are left out of the result.
        shapes: the shapes of the base's tensors, by name.
        config: the base's config. Its numbers of heads determine the order of a projection's rows and the sizes of a
            fused projection's parts.

    Raises:
        UsageError: the numbers of heads are needed, and the config does not state them.
        NotMergeable: the formula of an update cannot be split along rows.
        ShapeMismatch: a fused weight cannot be divided into its parts, or the base and the adapter have different
            numbers of experts.
        Unsupported: updates of single experts cannot be joined into one stack; a target's rows are not exactly one part
            of a fused weight; or the base stores the queries, keys and values of a fused projection group by group.
    """
    placed: list[Placed | tuple[str, PathPart | None]] = []
    stacks: dict[tuple[str, PathPart | None], dict[int, tuple[Target, tuple[Update, ...]]]] = {}
    for target, given in updates.items():
        cut, own_moves = _of_rows(target, moves.get(target.path, ()), config)
        slices: dict[int, tuple[Update, ...]] = {}
        for move in own_moves:
            if move.plain:
                placed.append((target, cut if move.path == cut.path else replace(cut, path=move.path), given))
                continue
            there, part = _taken(cut, given, move, config, slices)
            if move.slot is None:
                placed.append((target, *_into(there, part, move, shapes, config)))
                continue
            key = move.path, move.into
            if key not in stacks:
                stacks[key] = {}
                placed.append(key)
            if move.slot in stacks[key]:
                raise Unsupported(
                    "another target updates the same expert", where=str(target), cure="Remove one of the two targets"
                )
            stacks[key][move.slot] = there, part
    return [_stacked(each, stacks[each], shapes) if len(each) == 2 else each for each in placed]


def _of_rows(target: Target, moves: tuple[Move, ...], config: Config) -> tuple[Target, tuple[Move, ...]]:
    """Find the part of a fused weight that has exactly the rows `target.rows`.

    Return the target without `rows`, and the moves of this part. If the target has no `rows`, or its moves do not
    divide it into parts, return the target and all its moves.

    Raises:
        Unsupported: no part has exactly these rows.
    """
    if target.rows is None or all(move.take is None for move in moves):
        return target, moves
    start, stop = target.rows
    moves_here, parts = [], set()
    for move in moves:
        if move.take is not None and not move.take.interleaved and not move.take.groups:
            shares = _shares(config, target) if move.take.heads else (1,) * move.take.of
            before, share = sum(shares[: move.take.number]), shares[move.take.number]
            if start * share == before * (stop - start):
                moves_here.append(replace(move, take=None))
                parts.add(move.take.number)
    if len(parts) != 1:  # Count parts, not moves: a part of a stack has one move per expert.
        raise Unsupported(
            "the base stores this weight in parts, and the update's rows are not exactly one of the parts",
            where=str(target), cure="Use one target per part, with the part's name in the base",
        )  # fmt: skip
    return replace(target, rows=None), tuple(moves_here)


def _taken(
    target: Target, updates: tuple[Update, ...], move: Move, config: Config, slices: dict[int, tuple[Update, ...]]
) -> tuple[Target, tuple[Update, ...]]:
    """Cut updates to the rows or the expert that a move selects; return the target in the base and its updates.

    `slices` caches the updates of each expert, because several moves may select rows of the same expert. For example,
    an expert's gate and up projections have separate moves.
    """
    layout, stack = target.layout, target.stacked
    if move.expert is not None:
        if not stack and _whole_stack(updates):
            layout, stack = _LAYOUT_OF_STACK[layout], True
        if move.expert not in slices:
            count = updates[0].dims(stack).get("e") if stack else 0
            if not isinstance(count, int) or move.expert >= count:
                why = f"the base has an expert with the index {move.expert}, but the update has {count or 'no'} experts"
                raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
            slices[move.expert] = tuple(
                [update.map(lambda leaf: _slice(leaf, move.expert or 0)) for update in updates]
            )  # fmt: skip
        updates = slices[move.expert]
        layout, stack = _LAYOUT_OF_ONE[layout], False
    if move.take is not None:
        updates = tuple(_rows(update, move.take, stack, target, config) for update in updates)
    if move.turn is not None:
        updates = tuple(_turned(update, move.turn, stack, target, config) for update in updates)
    return Target(move.path, layout, target.rows), updates


def _whole_stack(updates: tuple[Update, ...]) -> bool:
    """Return whether all updates replace whole weights that have at least three axes.

    PEFT's `modules_to_save=["experts"]` yields such updates. They change a stack of experts, although their targets are
    not `stacked`.
    """
    dims = [update.dims() for update in updates]
    return all("in" not in each and len(each.get("rest") or ()) > 1 for each in dims)  # type: ignore[arg-type]


def _slice(leaf: Leaf, index: int) -> Leaf:
    return arrange.item(leaf, index) if isinstance(leaf, Lazy) else leaf[index]


def _turned(
    update: Update, turn: tuple[WeightPlace, WeightPlace], stack: bool, target: Target, config: Config
) -> Update:
    """Reorder the output rows of an update from the adapter's order to the base's order."""
    rows = _outputs(update, stack, target)
    heads = heads_of(config, str(target))
    changes: dict[str, Any] = {}
    for name, leaf in update.tensors.items():
        at = _output_axis(update, name, leaf, stack)
        if at is not None:
            changes[name] = arrange.reordered(as_lazy(leaf), lambda: _order(turn, rows, heads, str(target)), at)
    return update.replace(**changes)


def _order(turn: tuple[WeightPlace, WeightPlace], rows: int, heads: Heads, where: str) -> Array:
    """Return `order`: row i of the base's tensor is row `order[i]` of the adapter's tensor."""
    import numpy as np

    plain = np.arange(rows)
    ours, theirs = (row_order(place, rows, heads, where) for place in turn)
    # Both orders are relative to the family's own order. So undo the adapter's order, then apply the base's order.
    plain_order = plain if ours is None else undone(ours)
    return plain_order[plain if theirs is None else theirs]


def _rows(update: Update, part: PathPart, stack: bool, target: Target, config: Config) -> Update:
    """Cut an update of a fused weight to the rows of one part."""
    size = _outputs(update, stack, target)
    if part.groups:
        update = ungrouped(update, lambda: _out_of_groups(size, config, target), stack)
    return cut_rows(update, *_steps(size, part, target, config), stack)


def ungrouped(update: Update, order: Callable[[], Array], stack: bool) -> Update:
    """Reorder the output rows of an update: row i of the result is row `order()[i]` of the update."""
    changes: dict[str, Any] = {}
    for name, leaf in update.tensors.items():
        at = _output_axis(update, name, leaf, stack)
        if at is not None:
            changes[name] = arrange.reordered(as_lazy(leaf), order, at)
    return update.replace(**changes)


def cut_rows(update: Update, start: int, stop: int, step: int, stack: bool) -> Update:
    """Cut an update to the output rows `start:stop:step`; call this only if `update.cuts("out")` is true."""
    changes: dict[str, Any] = {}
    for name, leaf in update.tensors.items():
        at = _output_axis(update, name, leaf, stack)
        if at is None:
            continue
        if isinstance(leaf, Lazy):
            changes[name] = arrange.part(leaf, start, stop, at, step)
        else:
            changes[name] = leaf[(slice(None),) * at + (slice(start, stop, step),)]
    return update.replace(**changes)


def _outputs(update: Update, stack: bool, target: Target) -> int:
    """Return an update's number of outputs; raise NotMergeable if the update cannot be split along its outputs."""
    out = update.dims(stack).get("out")
    if not isinstance(out, int) or not update.cuts("out"):
        why = f"{update.method} changes all outputs of a weight together, but the base stores the weight in parts"
        raise NotMergeable(why, where=str(target), cure=INJECT_INSTEAD)
    return out


def _output_axis(update: Update, name: str, leaf: Leaf, stack: bool) -> int | None:
    """Return the index of a tensor's output axis; None if the tensor has no such axis."""
    axis = update.tensor_fields()[name].metadata["axes"].index("out")
    if axis is None:
        return None
    return int(axis + stack if axis >= 0 else len(leaf.shape) + axis)


def _steps(size: int, part: PathPart, target: Target, config: Config) -> tuple[int, int, int]:
    """Return which of a fused weight's `size` rows belong to a part, as (start, stop, step)."""
    if part.heads:
        shares = _shares(config, target)
        if size % sum(shares):
            why = f"{size} outputs do not fit {shares[0]} query heads, {shares[1]} key and {shares[2]} value heads"
            raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
        unit = size // sum(shares)
        return sum(shares[: part.number]) * unit, sum(shares[: part.number + 1]) * unit, 1
    if size % part.of:
        raise ShapeMismatch(
            f"the {size} outputs cannot be divided into {part.of} equal parts", where=str(target), cure=USE_ITS_BASE
        )
    if part.interleaved:
        return part.number, size, part.of
    return part.number * size // part.of, (part.number + 1) * size // part.of, 1


def _out_of_groups(size: int, config: Config, target: Target) -> Array:
    """Return `order` for rows stored group by group: `rows[order]` are all queries, then all keys, then all values."""
    heads = heads_of(config, str(target))
    return undone(by_group(replace(heads, dim=size // (heads.query + 2 * heads.kv))))


def _shares(config: Config, target: Target) -> tuple[int, int, int]:
    """Return the ratio of query rows to key rows to value rows in a fused projection, as three integers."""
    heads = heads_of(config, str(target))
    return heads.query, heads.kv, heads.kv


def _into(
    there: Target, updates: tuple[Update, ...], move: Move, shapes: Shapes, config: Config
) -> tuple[Target, tuple[Update, ...]]:
    """Return a target for the rows of the base's weight that `move.into` selects, and the updates for these rows.

    A target can name only consecutive rows. If a part consists of every second row, the part's updates are extended to
    the whole weight, with zeros in all other rows. Only LoRA updates can be extended; for LoRA the result is exact.
    """
    if move.into is None:
        return there, updates
    if move.into.groups:
        why = "the base stores the queries, keys and values of this projection group by group"
        raise Unsupported(why, where=str(there), cure="First convert the base to transformers' names and layout")
    outs = {out for update in updates if isinstance(out := update.dims(there.stacked).get("out"), int)}
    shape = next((shapes[name] for name in (f"{move.path}.weight", move.path) if name in shapes), ())
    whole, share = move.into.of, 1
    if move.into.heads:
        shares = _shares(config, there)
        whole, share = sum(shares), shares[move.into.number]
    sizes = {out * whole // share for out in outs} or {shape[int(there.stacked)]}
    if len(sizes) != 1 or not sizes <= set(shape):
        kind = "parts (queries, keys, values)" if move.into.heads else "equal parts"
        counts = ", ".join(map(str, sorted(outs)))
        why = f"the update for one of {move.into.of} {kind} has {counts} outputs; the base's shape is {list(shape)}"
        raise ShapeMismatch(why, where=str(there), cure=USE_ITS_BASE)
    size = sizes.pop()
    start, stop, step = _steps(size, move.into, there, config)
    if step == 1:
        return replace(there, rows=(start, stop)), updates
    return there, tuple(_spread(update, size, start, step, there) for update in updates)


def _spread(update: Update, size: int, start: int, step: int, target: Target) -> Update:
    """Extend a LoRA that has only every `step`-th row of a weight. The result has all rows; the new rows are zero."""
    if update.method != "lora":
        why = f"the base interleaves gate and up; only LoRA, not {update.method}, can change one of every {step} rows"
        raise NotMergeable(
            why, where=str(target), cure="Train the adapter on the weight that the base stores, or use LoRA"
        )
    changes = {}
    for name, leaf in update.tensors.items():
        at = _output_axis(update, name, leaf, target.stacked)
        if at is not None:
            changes[name] = arrange.spread(as_lazy(leaf), size, start, step, at)
    return update.replace(**changes)


def _stacked(
    key: tuple[str, PathPart | None], slots: Mapping[int, tuple[Target, tuple[Update, ...]]], shapes: Shapes
) -> Placed:
    """Join the updates of single experts into updates of a stack of experts."""
    path, into = key
    shape = next(shapes[name] for name in (path, f"{path}.weight") if name in shapes)
    first, *_ = slots.values()
    if len(shape) < 3 or max(slots) >= shape[0]:
        why = f"the adapter has updates for {max(slots) + 1} experts; the base's tensor has shape {list(shape)}"
        raise ShapeMismatch(why, where=str(first[0]), cure=USE_ITS_BASE)
    counts = {len(updates) for _, updates in slots.values()}
    if len(counts) > 1:
        raise Unsupported("the experts have different numbers of updates", where=str(first[0]), cure=_ALIKE)
    columns = [[slots[e][1][n] if e in slots else None for e in range(shape[0])] for n in range(counts.pop())]
    layout = _LAYOUT_OF_STACK[first[0].layout]
    updates = tuple(_one(column, first[0]) for column in columns)
    there, updates = _into(Target(path, layout), updates, Move(path, into=into), shapes, None)
    return first[0], there, updates


def _one(updates: list[Update | None], target: Target) -> Update:
    """Join one update per expert into one update of a stack.

    An expert may have no update (None) only if the other experts have LoRAs. The stack then has zeros for this expert.
    """
    given = [update for update in updates if update is not None]
    first = given[0]
    kinds = {type(update) for update in given}
    scalings = {update.attributes.get("scaling") for update in given}
    others = [{k: v for k, v in update.attributes.items() if k != "scaling"} for update in given]
    if len(kinds) > 1 or any(other != others[0] for other in others):
        raise Unsupported("the experts' updates have different methods or settings", where=str(target), cure=_ALIKE)
    if first.method == "lora":
        return _one_lora(updates, first, scalings)
    shapes = {tuple((name, leaf.shape) for name, leaf in update.tensors.items()) for update in given}
    if len(given) < len(updates) or len(shapes) > 1 or len(scalings) > 1:
        why = f"{first.method} must adapt all experts of a stack, with equal shapes and scalings; {len(given)} of "
        why += f"{len(updates)} experts have updates, with {len(shapes)} different shapes and {len(scalings)} scalings"
        raise Unsupported(why, where=str(target), cure=_ALIKE)
    return first.replace(
        **{name: arrange.stacked([as_lazy(update.tensors[name]) for update in given]) for name in first.tensors}
    )


def _one_lora(updates: Iterable[Update | None], first: Update, scalings: Collection[object]) -> Update:
    """Join one LoRA per expert into a LoRA of a stack.

    LoRAs of a smaller rank are padded with zeros to the largest rank. If the scalings differ, each expert's B and bias
    are multiplied by the expert's scaling, and the stack has scaling 1.
    """
    given = [update for update in updates if update is not None]
    rank = max(int(update.tensors["A"].shape[0]) for update in given)
    scaling = first.attributes["scaling"] if len(scalings) == 1 else 1.0
    leaves_by_name: dict[str, list[Lazy]] = {name: [] for update in given for name in update.tensors}
    for update in updates:
        for name, leaves in leaves_by_name.items():
            leaf = None if update is None else update.tensors.get(name)
            like = next(each.tensors[name] for each in given if name in each.tensors)
            tensor = arrange.zeros(tuple(like.shape), as_lazy(like).dtype) if leaf is None else as_lazy(leaf)
            if name == "A":
                tensor = arrange.padded(tensor, rank, 0)
            elif name == "B":
                tensor = arrange.padded(tensor, rank, 1)
            if name != "A" and update is not None and update.attributes["scaling"] != scaling:
                # A stack has only one scaling. So multiply B and bias by this expert's scaling divided by the stack's
                # scaling. Compute in float64 for a float64 tensor, otherwise in float32.
                wide = arrange.widened(tensor, "F64" if tensor.dtype.name == "F64" else "F32")
                tensor = arrange.times(wide, update.attributes["scaling"] / scaling)
            leaves.append(tensor)
    return first.replace(scaling=scaling, **{name: arrange.stacked(leaves) for name, leaves in leaves_by_name.items()})


_ALIKE = "Convert the adapter to one method with the same settings for all experts of a layer"

# Translate an adapter's names to another naming of its family, without a base. Format writers use these functions.


def moves_of(
    updates: Mapping[Target, tuple[Update, ...]], architecture: Architecture, naming: str
) -> dict[str, tuple[Move, ...]]:
    """Return a map from each target's path to its moves into `naming`. Omit targets that have no name in `naming`.

    Raises:
        TargetNotFound: a name can mean two different weights.
    """
    by_path = {}
    for target, given in updates.items():
        experts = given[0].dims(True).get("e") if target.stacked else 0
        moves = translate(target.path, architecture, naming, experts if isinstance(experts, int) else 0)
        if moves is not None:
            by_path[target.path] = moves
    return by_path


def translated(
    updates: Mapping[Target, tuple[Update, ...]],
    moves: Mapping[str, tuple[Move, ...]],
    experts: int = 0,
    config: Mapping[str, object] | None = None,
) -> dict[Target, tuple[Update, ...]]:
    """Apply the result of `moves_of` to the updates: split updates of fused weights, and join or split stacks.

    Args:
        updates: a map from each target to its updates. Targets without moves are left out of the result.
        moves: the result of `moves_of`.
        experts: the number of experts in a stack; 0 for as many as the updates need.
        config: the base's config. Its numbers of heads determine the sizes of a fused projection's parts.

    Raises:
        UsageError: the numbers of heads are needed, and the config does not state them.
        NotMergeable, ShapeMismatch, Unsupported: an update cannot be split or joined.
    """
    translated_updates: dict[Target, tuple[Update, ...]] = {}
    for target, there, given in moved(updates, moves, _shapes(updates, moves, experts), config):
        # Use the layout [e, out, in] for all stacks. Some families store experts as [e, in, out], but only in their own
        # naming.
        layout = "e out *in" if there.stacked else "out *in"
        there = replace(there, layout=layout) if target.stacked else there
        translated_updates[there] = (*translated_updates.get(there, ()), *given)
    return translated_updates


def _shapes(
    updates: Mapping[Target, tuple[Update, ...]], moves: Mapping[str, tuple[Move, ...]], experts: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the new naming: `[out, in]`, or `[e, out, in]` for a stack.

    Sizes that no update shows are 0.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for target, given in updates.items():
        dims: dict[str, Any] = dict(given[0].dims(target.stacked))
        for move in moves.get(target.path, ()):
            out = dims.get("out")
            if isinstance(out, int):
                cut = move.take.of if move.take and target.rows is None else 1
                out = out // cut * (move.into.of if move.into else 1)
            counts[move.path] = max(counts.get(move.path, experts), 0 if move.slot is None else move.slot + 1)
            lead = (dims["e"],) if target.stacked and move.expert is None else ()
            shapes[move.path] = (*lead, out or 0, dims.get("in") or 0)
    slotted = {move.path for given in moves.values() for move in given if move.slot is not None}
    return {
        path: (counts[path], *shape) if counts[path] and len(shape) == 2 and path in slotted else shape
        for path, shape in shapes.items()
    }


# Match two adapters for the same mixture of experts, without the base.
#
# One adapter changes stacks of experts, the other adapter changes single experts. There is no base, so the functions
# use the names and shapes of the adapter with single experts instead of the base's. They try every family whose file
# has the names of the stacks. All families that fit must split the stacks in the same way.


Moves = dict[str, tuple[Move, ...]]


def by_expert(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Split updates of stacked experts if another adapter has separate updates for single experts.

    Args:
        adapters: adapters for the same unknown base.

    Returns:
        the adapters in the same order. Updates of stacks are split into updates of single experts. The new updates get
        the names that the first adapter with single experts uses. If there is no such adapter, all adapters are
        unchanged. An adapter is also unchanged if no family's file maps its stacks to these names.

    Raises:
        UsageError: several families' files map the stacks to these names, but split the stacks differently.
    """
    reference = next((adapter for adapter in adapters if _has_single_experts(adapter)), None)
    if reference is None:
        return list(adapters)
    shapes = _stored_shapes(reference)
    names = Names(paths_of(shapes))
    return [a if a is reference or not _has_stacks(a) else _in_parts(a, names, shapes) for a in adapters]


def by_rows(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Split updates of a whole weight if another adapter updates only parts of this weight, such as gate and up.

    Args:
        adapters: adapters for the same base. Their targets must have the base's names.

    Returns:
        the adapters in the same order. An update of a whole weight is split only if its formula can be split, and the
        parts of this weight that are updated separately cover each row exactly once.
    """
    spans: dict[str, set[tuple[int, int]]] = {}
    for adapter in adapters:
        for target in adapter.updates:
            if target.rows is not None:
                spans.setdefault(target.path, set()).add(target.rows)
    return [_at_rows(adapter, spans) for adapter in adapters] if spans else list(adapters)


def _at_rows(adapter: Adapter, spans: Mapping[str, set[tuple[int, int]]]) -> Adapter:
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, given in adapter.updates.items():
        rows = sorted(spans.get(target.path, ()))
        out = given[0].dims(target.stacked).get("out")
        tiles = [start for start, _ in rows] == [0, *(stop for _, stop in rows[:-1])] and rows and rows[-1][1] == out
        if target.rows is not None or not tiles or not all(update.cuts("out") for update in given):
            updates[target] = given
            continue
        for start, stop in rows:
            updates[replace(target, rows=(start, stop))] = tuple(
                cut_rows(update, start, stop, 1, target.stacked) for update in given
            )
    return adapter.replace(updates=updates)


def _has_single_experts(adapter: Adapter) -> bool:
    return any(
        word == "experts" and after.isdigit()
        for target in adapter.updates
        if not target.stacked
        for word, after in pairwise(target.path.split("."))
    )


def _has_stacks(adapter: Adapter) -> bool:
    return any(target.stacked for target in adapter.updates)


def _stored_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the shape `[out, in]` of each weight that an adapter changes; `()` if no update shows the shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target, updates in adapter.updates.items():
        dims = updates[0].dims(target.stacked)
        out, in_ = dims.get("out"), dims.get("in")
        known = isinstance(out, int) and isinstance(in_, int) and not target.stacked
        shapes[f"{target.path}.weight"] = (out, in_) if known else ()  # type: ignore[assignment]
    return shapes


def _in_parts(adapter: Adapter, names: Names, shapes: Shapes) -> Adapter:
    """Split the stacks of one adapter into single experts; return the adapter unchanged if no family's file fits."""
    stacks = {target: updates for target, updates in adapter.updates.items() if target.stacked}
    families_by_moves: dict[tuple[tuple[str, tuple[Move, ...]], ...], str] = {}
    paths = [target.path for target in stacks]
    for architecture in with_stacks(paths):
        try:
            moves = resolve(paths, names, architecture=architecture, partial=True).moves
            placed = moved(stacks, moves, shapes)
        except AdapterkitError:
            continue
        whole = all(_whole(target, given, moves) for target, given in stacks.items() if target.path in moves)
        if moves and whole and all(fits(there, part, shapes[f"{there.path}.weight"]) for _, there, part in placed):
            families_by_moves[tuple(sorted(moves.items()))] = architecture.family
    if not families_by_moves:
        return adapter
    if len(families_by_moves) > 1:
        why = f"the families {' and '.join(families_by_moves.values())} split the experts differently"
        raise UsageError(
            why, where=str(next(iter(stacks))), cure="Pass the base, whose config names the family: --base BASE (base=)"
        )
    (only,) = families_by_moves
    parts: dict[Target, list[Placed]] = {}
    for each in moved(stacks, dict(only), shapes):
        parts.setdefault(each[0], []).append(each)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, given in adapter.updates.items():
        places = parts.get(target, [(target, target, given)])
        updates |= {there: part for _, there, part in places}
    return adapter.replace(updates=updates)


def _whole(target: Target, updates: Sequence[Update], moves: Moves) -> bool:
    """Return whether the moves cover all of a stack: every expert, and every part of an expert."""
    given = moves[target.path]
    parts = {move.take for move in given}
    count = next((take.of for take in parts if take is not None), 1)
    experts = updates[0].dims(target.stacked).get("e")
    return len(parts) == count and {move.expert for move in given} == set(range(int(str(experts))))
