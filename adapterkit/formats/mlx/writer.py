"""Encode an `Adapter` as a config and tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ...core.adapter import Adapter, Target
from ...core.metadata import with_metadata
from ...errors import Malformed, Unrepresentable
from ...io.arrange import turned
from ...io.lazy import Lazy, as_lazy
from ...io.strict_json import load_json
from ...methods.dora import DoRA
from ...methods.lora import LoRA
from ...methods.replacement import Replacement
from ...naming.architectures import expert_count
from ...naming.binding.translating import translated
from ...naming.mlx import is_absent, to_mlx
from .._joining import with_joined_rows
from .._leftovers import Leftovers, in_order, remembered
from .._one_number import one_number
from .._pairs import Pairs, expressible, rank_of, to_rank, unfit
from .reader import FORMAT

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue
    from ...naming.moves import Move
    from .._pairs import Pair

METADATA = {"format": "mlx"}


class MlxHints(Leftovers, total=False):
    """The leftovers of a folder: the config, its text, the tensors' metadata, and a map from our to MLX's names."""

    config: dict[str, Any]
    text: str
    metadata: dict[str, str]
    names: dict[str, str]


def written(
    adapter: Adapter, on_loss: str, base: Checkpoint | None = None
) -> tuple[str, dict[str, Lazy], Mapping[str, str], list[str]]:
    """Return the config's text, the tensors, the metadata, and one line for each omitted or rewritten update.

    Raises:
        Unrepresentable: MLX-LM cannot express an update, and `on_loss` does not allow rewriting or omitting the update.
    """
    hints = remembered(adapter, FORMAT, MlxHints)
    config_of_base = None if base is None else base.config
    adapter, absent = _without_absent(adapter, config_of_base, on_loss)
    adapter, joined = _stacked(adapter, config_of_base)
    only = all(isinstance(update, Replacement) for _, update in adapter)
    config, tensors, lines = _whole(adapter, hints) if only else _encode(adapter, hints, on_loss)
    text = json.dumps(dict(sorted(config.items())), indent=4)
    return _as_read(config, hints) or text, in_order(tensors, hints), _metadata(adapter, hints), absent + joined + lines


def _without_absent(
    adapter: Adapter, config: Mapping[str, JsonValue] | None, on_loss: str
) -> tuple[Adapter, list[str]]:
    """Omit targets that MLX-LM's model lacks; return the adapter without them, and a line for each of these targets.

    Raises:
        Unrepresentable: `on_loss` is not `drop`, or MLX-LM's model lacks all targets.
    """
    absent = [target for target in adapter.updates if is_absent(target.path, config)]
    if not absent:
        return adapter, []
    items = [
        f"{target}: MLX-LM's model has no separate layer for this weight that could have an adapter"
        for target in absent
    ]
    if on_loss != "drop" or len(absent) == len(adapter.updates):
        cure = (
            "Omit these with --on-loss drop (on_loss='drop'), or merge the adapter into the base and convert the base"
        )
        raise Unrepresentable("MLX-LM cannot express these updates", items=items, cure=cure)
    kept = {target: updates for target, updates in adapter.updates.items() if target not in absent}
    return adapter.replace(updates=kept), [f"left out {item}" for item in items]


def _stacked(adapter: Adapter, config: Mapping[str, JsonValue] | None) -> tuple[Adapter, list[str]]:
    """Stack experts and fuse weights as MLX-LM does; return the new adapter, and a line for each changed rank.

    Raises:
        UsageError: the possible families of models store experts differently, and no base shows which family is right.
        Unrepresentable: some experts have no updates, and no base shows the number of experts.
    """
    moves = {}
    for target, updates in adapter.updates.items():
        count = updates[0].dims(True).get("e") if target.stacked else 0
        found = to_mlx(target.path, config, count if isinstance(count, int) else 0)
        if found is not None:
            moves[target.path] = found
    if not moves:
        return adapter, []
    experts = expert_count(config)
    _check_all(moves, experts)
    own = {target: updates for target, updates in adapter.updates.items() if target.path not in moves}
    there = translated(adapter.updates, moves, experts)
    # Join the parts of a fused layer into one LoRA. Only MLX-LM's FusedLinear has a separate LoRA for each part.
    fused = {move.path: move.into.of for given in moves.values() for move in given if move.into is not None}
    sizes = {
        target.path: fused[target.path] * (target.rows[1] - target.rows[0])
        for target in there
        if target.path in fused and target.rows is not None
    }
    joined, lines = with_joined_rows(there, None, sizes)
    return adapter.replace(updates={**own, **joined}), lines


def _check_all(moves: Mapping[str, tuple[Move, ...]], experts: int) -> None:
    """Refuse a stack in which experts have no update, unless the base shows the number of experts."""
    slots: dict[str, set[int]] = {}
    for given in moves.values():
        for move in given:
            if move.slot is not None:
                slots.setdefault(move.path, set()).add(move.slot)
    gaps = [f"{name}: the adapter has experts {sorted(held)}" for name, held in slots.items() if len(held) <= max(held)]
    if gaps and not experts:
        raise Unrepresentable(
            "MLX-LM stores the LoRAs of all experts of a module in one stack", items=gaps, cure=_EXPERTS
        )


def _metadata(adapter: Adapter, hints: MlxHints) -> dict[str, str]:
    return dict(with_metadata(hints.get("metadata", METADATA).items(), adapter))


def _encode(adapter: Adapter, hints: MlxHints, on_loss: str) -> tuple[dict[str, JsonValue], dict[str, Lazy], list[str]]:
    """Write LoRA or DoRA, whichever has more updates, because a file has only one method.

    Return the config, the tensors, and a line for each change.

    Raises:
        Unrepresentable: MLX-LM cannot express an update, and `on_loss` does not allow omitting the update.
    """
    kinds = Counter(type(update) for _, update in adapter if isinstance(update, LoRA | DoRA))
    dora = kinds[DoRA] > kinds[LoRA]

    def why(target: Target, update: Pair) -> str:
        if isinstance(update, DoRA) and target.layout != "out *in":
            return "MLX has another formula, or none, for DoRA on an embedding or on stacked experts"
        return unfit(Target(target.path, target.layout), update, stacked=True)

    pairs, lines = expressible(adapter, "MLX-LM", on_loss, why, (DoRA,) if dora else (LoRA,))
    first = cast("float | None", _parameters(hints).get("scale"))
    scale, pairs, folded = one_number(
        pairs, lambda u: u.scaling, lambda scale, _: scale, dialect="MLX-LM", on_loss=on_loss, default=1.0, first=first
    )
    pairs, widened = _of_one_rank(pairs, hints)
    tensors = _spelled(pairs, hints)
    return _config(hints, pairs, scale, "dora" if dora else "lora"), tensors, lines + folded + widened


def _of_one_rank(pairs: Pairs, hints: MlxHints) -> tuple[Pairs, list[str]]:
    """Pad all updates with zeros to the largest rank, and return a line for each padded update.

    MLX-LM creates all layers with the one rank in the config, and since 0.32 refuses tensors of another rank. If the
    adapter still has exactly the targets of its source file, ranks stay as they are, because the source config is
    written unchanged.
    """
    ranks = {target: rank_of(update, target.stacked) for target, update in pairs.items()}
    rank = max(ranks.values(), default=0)
    narrow = [target for target in pairs if ranks[target] != rank]
    if not narrow or (hints.get("config") and _same(hints, pairs)):
        return pairs, []
    wide = {target: to_rank(update, rank, target.stacked) for target, update in pairs.items()}
    return wide, [f"padded {target} to rank {rank} with zeros" for target in narrow]


def _spelled(pairs: Pairs, hints: MlxHints) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    slices: dict[str, list[tuple[tuple[int, int], Pair]]] = {}
    for target, update in pairs.items():
        name = _name(target, hints)
        if target.rows is not None:
            slices.setdefault(name, []).append((target.rows, update))
        else:
            ends = {"A": ".lora_a", "B": ".lora_b", "magnitude": ".m"}
            # Transpose the factors. Factors of stacked experts are not transposed: A is [e, r, in], B is [e, out, r].
            turn = {field: turned if field in "AB" and not target.stacked else as_lazy for field in ends}
            tensors |= {name + ends[f]: turn[f](as_lazy(leaf)) for f, leaf in update.tensors.items()}
    for name, parts in slices.items():
        tensors |= _of_slices(name, sorted(parts, key=lambda item: item[0]))
    return tensors


def _of_slices(name: str, parts: list[tuple[tuple[int, int], Pair]]) -> dict[str, Lazy]:
    ends = [0, *(rows[1] for rows, _ in parts)]
    if [rows[0] for rows, _ in parts] != ends[:-1] or len(parts) < 2 or any(isinstance(u, DoRA) for _, u in parts):
        items = [f"{name}: rows {', '.join(f'{a} to {b}' for (a, b), _ in parts)}"]
        raise Unrepresentable("MLX-LM needs a LoRA for every slice of a fused weight", items=items, cure=_EXPERTS)
    tensors: dict[str, Lazy] = {}
    for index, (_, update) in enumerate(parts):
        tensors |= {
            f"{name}.lora_a.{index}": turned(as_lazy(update.A)),
            f"{name}.lora_b.{index}": turned(as_lazy(update.B)),
        }
    return tensors


def _config(hints: MlxHints, pairs: Pairs, scale: float, kind: str) -> dict[str, JsonValue]:
    """Return the source config if it is still correct; otherwise a config with the fields that MLX-LM needs."""
    read = dict(hints.get("config", {}))
    before = _parameters(hints)
    if read and before.get("scale") == scale and read.get("fine_tune_type", "lora") == kind and _same(hints, pairs):
        return read
    ranks = Counter(rank_of(update, target.stacked) for target, update in pairs.items())
    rank = min(ranks, key=lambda rank: (-ranks[rank], rank))
    keys = sorted({_key(_name(target, hints)) for target in pairs})
    parameters = {"dropout": 0.0, **before, "rank": rank, "scale": scale, "keys": keys}
    return {**read, "fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}


def _parameters(hints: MlxHints) -> dict[str, JsonValue]:
    found = hints.get("config", {}).get("lora_parameters")
    return dict(found) if isinstance(found, dict) else {}


def _same(hints: MlxHints, pairs: Pairs) -> bool:
    return {*hints.get("order", ())} == {*_spelled(pairs, hints)}


def _key(name: str) -> str:
    """Return the module's name in `lora_parameters.keys`: relative to its block.

    For an expert, return the name of the expert's stack.
    """
    head, layers, rest = name.rpartition(".layers.")
    return rest.partition(".")[2] if layers else head + rest


def _whole(adapter: Adapter, hints: MlxHints) -> tuple[dict[str, JsonValue], dict[str, Lazy], list[str]]:
    """Return the config, tensors and lines for an adapter that only replaces whole parameters.

    Raises:
        Unrepresentable: an update replaces only some rows of a parameter.
    """
    tensors: dict[str, Lazy] = {}
    for target, update in adapter:
        if target.rows is not None:
            raise Unrepresentable(
                "MLX-LM cannot replace only some rows of a parameter", items=[str(target)], cure="Write another format"
            )
        name = _name(target, hints)
        for field, leaf in update.tensors.items():
            stored = as_lazy(leaf)
            inputs_first = field == "weight" and target.layout in ("in out *k", "e in out *k")
            tensors[f"{name}.{field}"] = turned(stored) if inputs_first else stored
    config = {**hints.get("config", {}), "fine_tune_type": "full"}
    return {"num_layers": -1, **config}, tensors, []


def _name(target: Target, hints: MlxHints) -> str:
    known = hints.get("names", {})
    return str(known.get(target.path, target.path))


def _as_read(config: Mapping[str, JsonValue], hints: Mapping[str, object]) -> str:
    """Return the source config's text if it still has the same contents, because the text keeps the order of keys."""
    text = str(hints.get("text", ""))
    try:
        return text if text and load_json(text) == config else ""
    except ValueError as error:
        raise Malformed(
            f"the stored data of the MLX-LM file is damaged ({error})",
            where="foreign",
            cure="Remove the data: adapter.replace(foreign=None)",
        ) from None


_EXPERTS = "Train all experts, or all parts, of the module; or write another format"
