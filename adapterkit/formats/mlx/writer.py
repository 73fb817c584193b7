"""An `Adapter` in, a config and tensors out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...adapter import Adapter, Target
from ...errors import Malformed, Unrepresentable
from ...metadata import with_metadata
from ...methods.dora import DoRA
from ...methods.lora import LoRA
from ...methods.replacement import Replacement
from ...tensors.arrange import stacked, turned
from ...tensors.lazy import Lazy, as_lazy
from ...tensors.strict_json import load_json
from .._leftovers import Leftovers, in_order, remembered
from .._one_number import one_number
from .._pairs import Pairs, expressible, rank_of, to_rank, unfit
from .reader import FORMAT, STACKS

if TYPE_CHECKING:
    from .._pairs import Pair

METADATA = {"format": "mlx"}


class Hints(Leftovers, total=False):
    """The config and its text, the tensors' metadata, own names -> MLX's."""

    config: dict[str, Any]
    text: str
    metadata: dict[str, str]
    names: dict[str, str]


def written(adapter: Adapter, on_loss: str) -> tuple[str, dict[str, Lazy], Mapping[str, str], list[str]]:
    """The config's text, the tensors, their metadata, and one line for each thing left out or rewritten.

    Raises:
        Unrepresentable: MLX-LM cannot say it, and `on_loss` does not allow otherwise.
    """
    hints = remembered(adapter, FORMAT, Hints)
    only = all(isinstance(update, Replacement) for _, update in adapter)
    config, tensors, lines = _whole(adapter, hints) if only else _encode(adapter, hints, on_loss)
    text = json.dumps(dict(sorted(config.items())), indent=4)
    return _as_read(config, hints) or text, in_order(tensors, hints), _metadata(adapter, hints), lines


def _metadata(adapter: Adapter, hints: Mapping[str, Any]) -> dict[str, str]:
    return dict(with_metadata(hints.get("metadata", METADATA).items(), adapter))


def _encode(
    adapter: Adapter, hints: Mapping[str, Any], on_loss: str
) -> tuple[dict[str, Any], dict[str, Lazy], list[str]]:
    """Config, tensors and lines of an adapter of LoRA, or of DoRA, whichever is more frequent.

    Raises:
        Unrepresentable: MLX-LM cannot say it.
    """
    kinds = Counter(type(update) for _, update in adapter if isinstance(update, LoRA | DoRA))
    dora = kinds[DoRA] > kinds[LoRA]

    def why(target: Target, update: Pair) -> str:
        if isinstance(update, DoRA) and target.layout != "out *in":
            return "DoRA of an embedding, for which MLX has another law"
        return unfit(Target(target.path, target.layout), update)

    pairs, lines = expressible(adapter, "MLX-LM", on_loss, why, (DoRA,) if dora else (LoRA,))
    first = _parameters(hints).get("scale")
    scale, pairs, folded = one_number(
        pairs, lambda u: u.scaling, lambda scale, _: scale, dialect="MLX-LM", on_loss=on_loss, default=1.0, first=first
    )
    tensors = _spelled(pairs, hints)
    return _config(hints, pairs, scale, "dora" if dora else "lora"), tensors, lines + folded


def _spelled(pairs: Pairs, hints: Mapping[str, Any]) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    stacks: dict[str, dict[int, Pair]] = {}
    slices: dict[str, list[tuple[tuple[int, int], Pair]]] = {}
    for target, update in pairs.items():
        name = _name(target, hints)
        stack = STACKS.there(name)
        if stack:
            stacks.setdefault(stack[0], {})[stack[1]] = update
        elif target.rows is not None:
            slices.setdefault(name, []).append((target.rows, update))
        else:
            ends = {"A": ".lora_a", "B": ".lora_b", "magnitude": ".m"}
            turn = {field: turned if field in "AB" else as_lazy for field in ends}
            tensors |= {name + ends[f]: turn[f](as_lazy(leaf)) for f, leaf in update.tensors.items()}
    for name, found in stacks.items():
        tensors |= _of_stack(name, found)
    for name, parts in slices.items():
        tensors |= _of_slices(name, sorted(parts, key=lambda item: item[0]))
    return tensors


def _of_stack(name: str, found: Mapping[int, Pair]) -> dict[str, Lazy]:
    if sorted(found) != list(range(len(found))) or any(isinstance(update, DoRA) for update in found.values()):
        items = [f"{name}: has experts {sorted(found)}"]
        raise Unrepresentable("MLX-LM holds a LoRA of all experts in one stack", items=items, cure=_EXPERTS)
    rank = max(rank_of(update) for update in found.values())
    own = [to_rank(found[index], rank) for index in range(len(found))]
    return {
        f"{name}.lora_a": stacked([as_lazy(u.A) for u in own]),
        f"{name}.lora_b": stacked([as_lazy(u.B) for u in own]),
    }


def _of_slices(name: str, parts: list[tuple[tuple[int, int], Pair]]) -> dict[str, Lazy]:
    ends = [0, *(rows[1] for rows, _ in parts)]
    if [rows[0] for rows, _ in parts] != ends[:-1] or len(parts) < 2 or any(isinstance(u, DoRA) for _, u in parts):
        items = [f"{name}: rows {', '.join(f'{a} to {b}' for (a, b), _ in parts)}"]
        raise Unrepresentable("MLX-LM holds a LoRA of all slices of a weight", items=items, cure=_EXPERTS)
    tensors: dict[str, Lazy] = {}
    for index, (_, update) in enumerate(parts):
        tensors |= {
            f"{name}.lora_a.{index}": turned(as_lazy(update.A)),
            f"{name}.lora_b.{index}": turned(as_lazy(update.B)),
        }
    return tensors


def _config(hints: Mapping[str, Any], pairs: Pairs, scale: float, kind: str) -> dict[str, Any]:
    """What was read where it still holds; else what MLX-LM needs to load the tensors."""
    read = dict(hints.get("config", {}))
    before = _parameters(hints)
    if read and before.get("scale") == scale and read.get("fine_tune_type", "lora") == kind and _same(hints, pairs):
        return read
    ranks = Counter(rank_of(update) for update in pairs.values())
    rank = min(ranks, key=lambda rank: (-ranks[rank], rank))
    keys = sorted({_key(_name(target, hints)) for target in pairs})
    parameters = {"dropout": 0.0, **before, "rank": rank, "scale": scale, "keys": keys}
    return {**read, "fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}


def _parameters(hints: Mapping[str, Any]) -> dict[str, Any]:
    found = hints.get("config", {}).get("lora_parameters")
    return dict(found) if isinstance(found, dict) else {}


def _same(hints: Mapping[str, Any], pairs: Pairs) -> bool:
    return {*hints.get("order", ())} == {*_spelled(pairs, hints)}


def _key(name: str) -> str:
    """A module as MLX-LM's config names it: below its block, a stack for an expert."""
    stack = STACKS.there(name)
    head, layers, rest = (stack[0] if stack else name).rpartition(".layers.")
    return rest.partition(".")[2] if layers else head + rest


def _whole(adapter: Adapter, hints: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Lazy], list[str]]:
    """Config, tensors and lines of an adapter of whole parameters alone.

    Raises:
        Unrepresentable: MLX-LM cannot say it.
    """
    stacks: dict[str, dict[int, Lazy]] = {}
    tensors: dict[str, Lazy] = {}
    for target, update in adapter:
        if target.rows is not None or target.layout not in ("out *in", "in out *k"):
            raise Unrepresentable("MLX-LM holds whole parameters", items=[str(target)], cure="Write another format")
        name = _name(target, hints)
        stack = STACKS.there(name)
        for field, leaf in update.tensors.items():
            stored = as_lazy(leaf)
            stored = turned(stored) if field == "weight" and target.layout == "in out *k" else stored
            if stack:
                stacks.setdefault(f"{stack[0]}.{field}", {})[stack[1]] = stored
            else:
                tensors[f"{name}.{field}"] = stored
    for name, found in stacks.items():
        if sorted(found) != list(range(len(found))):
            raise Unrepresentable("MLX-LM holds all experts in one stack", items=[name], cure=_EXPERTS)
        tensors[name] = stacked([found[index] for index in range(len(found))])
    config = {**hints.get("config", {}), "fine_tune_type": "full"}
    return {"num_layers": -1, **config}, tensors, []


def _name(target: Target, hints: Mapping[str, Any]) -> str:
    known = hints.get("names", {})
    return str(known.get(target.path, target.path))


def _as_read(config: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    """The text of the config that was read, where it says the same: its order of keys is in no other place."""
    text = str(hints.get("text", ""))
    try:
        return text if text and load_json(text) == config else ""
    except ValueError as error:
        raise Malformed(f"leftovers of MLX-LM are damaged ({error})", where="foreign", cure="Drop them") from None


_EXPERTS = "Train all of them, or write another format"
