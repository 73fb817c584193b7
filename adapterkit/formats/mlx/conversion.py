"""Translate names between MLX-LM and the hub, decode MLX-LM's folders, and encode an `Adapter` as such a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...core.adapter import Adapter, Foreign, Step, Target
from ...core.metadata import with_metadata
from ...errors import (
    USE_ITS_BASE,
    WRITE_AGAIN,
    Malformed,
    ShapeMismatch,
    TargetNotFound,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from ...io import safetensors
from ...io.arrange import item, turned
from ...io.inputs import decimal_number
from ...io.lazy import Lazy, as_lazy
from ...io.strict_json import load_json
from ...methods.dora import DoRA
from ...methods.lora import LoRA
from ...methods.replacement import Replacement
from ...naming.architectures import (
    HOLE,
    WEIGHT,
    Architecture,
    WeightPlace,
    architecture_of,
    expert_count,
    shape_of,
    with_naming,
)
from ...naming.binding import bind
from ...naming.binding.moving import translated
from ...naming.moves import Move
from ...naming.resolver import translate, variants
from ...naming.ties import EMBEDDINGS
from ...naming.tool_names import modules_of, without_prefix
from .._joining import with_joined_rows
from .._kit import (
    Leftovers,
    Pairs,
    check_factors,
    expressible,
    grouped,
    in_order,
    is_finite,
    leftovers,
    one_number,
    pair,
    rank_of,
    to_rank,
    unfit,
)
from . import CONFIG

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue
    from .._kit import Pair, Slots


# Translate names between MLX-LM's models and the models on a hub.
#
# Most of the names that differ are names of experts, because MLX-LM stacks the experts' tensors.
#
# The files in spec/architectures contain MLX-LM's names; the naming is called `mlx`. MLX-LM's adapter folders do not
# state the family of the base. Without a base, all families that have the target's name are tried. If these families
# disagree on the translation of an expert's name, an error is raised. If they disagree on any other name, the name
# stays unchanged.


NAMING = "mlx"


def to_mlx(name: str, config: Mapping[str, object] | None, experts: int) -> tuple[Move, ...] | None:
    """Translate a target's name to its locations in MLX-LM's model. Return None if the name stays unchanged.

    Args:
        name: the target's name, in any naming of its family.
        config: the base's config, if known.
        experts: the number of experts in the stack, if the target is a stack of experts; otherwise 0.

    Raises:
        UsageError: `config` does not show the family, and families that have `name` disagree on its translation.
    """
    return _translated(name, config, experts, NAMING)


def from_mlx(name: str, config: Mapping[str, object] | None, experts: int) -> tuple[Move, ...] | None:
    """Translate a module's name in MLX-LM to its names on the hub. Return None if the name stays unchanged.

    If MLX-LM's module is a stack of experts or a fused weight, there is one hub name for each expert or part. The other
    arguments and the errors are those of `to_mlx`.
    """
    return _translated(name, config, experts, WEIGHT)


def _translated(name: str, config: Mapping[str, object] | None, experts: int, naming: str) -> tuple[Move, ...] | None:
    by_moves: dict[tuple[Move, ...], str] = {}
    family = _family(config)
    for each in _candidates(name, naming) if family is None else [family]:
        there = each.find(name, NAMING)
        if naming == WEIGHT and not there:
            continue
        same = naming == WEIGHT and all(each.place(weight, "hub") == place for weight, place, _ in there)
        # Keep the name if the hub's model fuses the same weights as MLX-LM, for example queries, keys and values.
        moves = (Move(name),) if same else translate(name, each, naming, experts)
        if moves:
            by_moves.setdefault(moves, each.family)
    if family is None and by_moves and any(shape_of(variant) in _kept() for variant in variants(name)):
        by_moves.setdefault((Move(name),), "other families")
    if len(by_moves) > 1 and any(move.plain for moves in by_moves for move in moves):
        # The families disagree, so keep the name. Example: for `model.layers.0.self_attn.q_proj`, MLX-LM uses another
        # prefix in vision-language models.
        return None
    if len(by_moves) > 1:
        why = (
            f"{' and '.join(by_moves.values())} translate this name differently: "
            f"{', '.join(m[0].path for m in by_moves)}"
        )
        raise UsageError(why, where=name, cure="Pass the base, which shows the family: --base BASE (base=)")
    return next(iter(by_moves), None)


def _candidates(name: str, naming: str) -> list[Architecture]:
    """Return the families that have a weight `name` for which MLX-LM and the hub use different names.

    If `naming` is `WEIGHT`, the caller translates `name` to hub names. In this case, prefer the families in which the
    hub stores the module's weights as separate tensors. In the other families, the hub has no names for single experts.
    """
    shapes = [shape_of(variant) for variant in variants(name)]
    architectures = [each for each, templates in _all() if any(shape in templates for shape in shapes)]
    apart = [each for each in architectures if naming == WEIGHT and each.find(name, NAMING) and _on_hub(each, name)]
    return apart or architectures


def is_absent(name: str, config: Mapping[str, object] | None) -> bool:
    """Whether MLX-LM cannot adapt the hub's weight `name`, because MLX-LM's model has no suitable layer for the weight.

    If `config` does not show the family, the function checks all possible families. It returns False if MLX-LM can
    adapt the weight in any of them.

    Examples: MLX-LM turns DeepSeek's `kv_b_proj` into two stacks with a matrix per head, which `load_adapters` cannot
    adapt. In `prism_hadamard_qwen35`, MLX-LM's model rotates the layers. In Muse Spark, MLX-LM fuses queries, keys,
    values and gates of unequal sizes.
    """
    family = _family(config)
    places = [
        each.record.weights[weight].get(NAMING)
        for each in ([family] if family is not None else _candidates(name, NAMING))
        for naming in each.namings_with(name)
        if naming != NAMING
        for weight, _, _ in each.find(name, naming)
    ]
    return bool(places) and all(place == "" for place in places)


def _on_hub(family: Architecture, name: str) -> bool:
    """Whether hubs store the weights of MLX-LM's module `name` as separate tensors, neither fused nor stacked."""
    places = [family.place(key, "hub") for key, _, _ in family.find(name, NAMING)]
    return all(place is not None and place.of is None and not place.stacked for place in places)


def _family(config: Mapping[str, object] | None) -> Architecture | None:
    for each in (config, (config or {}).get("text_config")):
        architecture = architecture_of(each) if isinstance(each, dict) else None
        if architecture is not None:
            return architecture
    return None


def _common() -> Iterator[Architecture]:
    """Yield the families that MLX-LM has, except those marked `rare`.

    In a rare family, MLX-LM's names for experts are the same as names of other weights in far more common families. So
    a rare family is used only if the base's config states this family.
    """
    return (each for each in with_naming(NAMING) if not each.record.rare)


@cache
def _all() -> tuple[tuple[Architecture, frozenset[str]], ...]:
    """Return (family, templates) for each family in which MLX-LM renames weights.

    A template is a name in which `#` replaces each number. There is a template for each renamed weight in each naming
    of the family.
    """
    entries = []
    for each in _common():
        changed = [weight for weight, places in each.record.weights.items() if not _same_place(each, weight)]
        places = (each.place(weight, naming) for weight in changed for naming in (*each.namings, WEIGHT))
        entries.append((each, frozenset(_shape(place) for place in places if place is not None)))
    return tuple(each for each in entries if each[1])


@cache
def _kept() -> frozenset[str]:
    """Return the templates of the weight names that MLX-LM and the naming `hub` share in at least one family."""
    return frozenset(
        _shape(WeightPlace(weight)) if place is None else _shape(place)
        for each in _common()
        for weight in each.record.weights
        if _same_place(each, weight)
        for place in [each.place(weight, "hub")]
    )


def _same_place(family: Architecture, weight: str) -> bool:
    """Whether MLX-LM and hubs have the same name for a weight."""
    return family.record.weights[weight].get(NAMING) is None


def _shape(place: WeightPlace) -> str:
    return shape_of(HOLE.sub("0", place.name))


# Decode a config and tensors into an `Adapter`.


FORMAT = "mlx"
KINDS = ("lora", "dora", "full")
_SLOTS = {".lora_a": "A", ".lora_b": "B", ".m": "magnitude"}


class Modules:
    """Translates MLX's module names to the base's names. Without a base, translates them to the hub's names."""

    def __init__(self, base: Checkpoint | None) -> None:
        self.base = base
        self.config = None if base is None else base.config
        self.names_of_base: dict[str, list[str]] | None = None
        if base is not None:
            self.names_of_base = {}
            for name in dict.fromkeys(modules_of(base.tensors)):
                for bare in dict.fromkeys(without_prefix(name)):
                    self.names_of_base.setdefault(bare, []).append(name)

    def placed(self, updates: dict[Target, tuple[Update, ...]]) -> dict[Target, tuple[Update, ...]]:
        """Split or stack the updates of experts, so that they match how the base stores the experts.

        Raises:
            TargetNotFound, ShapeMismatch: the base does not have one of the experts.
        """
        if self.base is None:
            return updates
        paths = {path for paths in (self.names_of_base or {}).values() for path in paths}
        lost = {target: group for target, group in updates.items() if target.path not in paths}
        if not lost:
            return updates
        bound = bind(Adapter(lost), self.base).adapter.updates
        return {target: group for target, group in updates.items() if target not in lost} | dict(bound)

    def named(self, name: str) -> str:
        """Return the base's name for a module of MLX-LM. Without a base, return the name in the hub's checkpoint.

        Raises:
            TargetNotFound: the base does not have the module, or has several modules with this name.
        """
        moves = from_mlx(name, self.config, 0)
        if moves is not None and len(moves) == 1 and moves[0].plain:
            name = moves[0].path
        if self.names_of_base is None:
            return name
        bare = list(without_prefix(name))
        candidates = next((self.names_of_base[each] for each in bare if each in self.names_of_base), [])
        exact = [candidate for candidate in candidates if candidate == name] or candidates
        if len(exact) != 1:
            why = f"exactly one module must have this name, but the base has {len(exact)}"
            raise TargetNotFound(why, where=name, cure=USE_ITS_BASE)
        return exact[0]


def decode(config: Mapping[str, JsonValue], text: str, file: Path, modules: Modules) -> Adapter:
    """Return the adapter in an MLX-LM folder.

    Raises:
        Malformed, Unsupported, ShapeMismatch: the tensors do not fit the config, or `fine_tune_type` is unknown.
        TargetNotFound: a module in the file is not in the base.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise Unsupported(f"fine_tune_type {kind!r} is unknown", where=CONFIG, cure=f"Known: {', '.join(KINDS)}")
    header = safetensors.read_header(file)
    tensors = safetensors.handles(header)
    names: dict[str, str] = {}
    decoded = _read_whole(tensors, modules, names) if kind == "full" else _pairs(config, kind, tensors, modules, names)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, update in decoded:
        if target in updates:
            raise TargetNotFound("two modules in the file adapt this target", where=str(target), cure=WRITE_AGAIN)
        updates[target] = (update,)
    updates = modules.placed(updates)
    data: dict[str, JsonValue] = {
        "config": dict(config), "text": text, "order": list(tensors), "metadata": dict(header.metadata),
        "names": {hub_name: name for hub_name, name in names.items() if hub_name != name},
    }  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))


TargetUpdates = Iterator[tuple[Target, "Update"]]


def _pairs(
    config: Mapping[str, JsonValue], kind: str, tensors: Mapping[str, Lazy], modules: Modules, names: dict[str, str]
) -> TargetUpdates:
    scale = _scale(config)
    for name, slots in grouped(_unlisted(tensors), _SLOTS, "MLX-LM").items():
        if ("magnitude" in slots) != (kind == "dora"):
            why = f"fine_tune_type is {kind}, but the module has {'a' if 'magnitude' in slots else 'no'} magnitude"
            raise Malformed(why, where=name, cure=WRITE_AGAIN)
        name, listed, part = name.partition("#")
        if listed:
            count = sum(1 for key in tensors if key.startswith(f"{name}.lora_b."))
            yield from _fused(name, int(part), count, slots, scale, tensors, modules, names)
        elif len(slots["A"].shape) == 3:
            yield from _stack(name, slots, scale, modules, names)
        elif parts := _parts(name, modules):
            # MLX-LM fuses some weights that hubs store separately, such as queries, keys and values. Split the rows of
            # B, to get one update for each of these weights.
            for target, given in translated({_target(name): (_one(name, slots, scale),)}, {name: parts}).items():
                names[target.path] = target.path
                yield target, given[0]
        else:
            hub_name = modules.named(name)
            names[hub_name] = name
            yield _target(hub_name), _one(name, slots, scale)


def _one(name: str, slots: Slots, scale: float) -> Pair:
    if any(len(slots[field].shape) != 2 for field in "AB"):
        why = f"A and B must be matrices, not {list(slots['A'].shape)} and {list(slots['B'].shape)}"
        raise ShapeMismatch(why, where=name, cure=WRITE_AGAIN)
    factors = {**slots, "A": turned(slots["A"]), "B": turned(slots["B"])}
    check_factors(name, factors)
    if "magnitude" in factors and (
        name.rpartition(".")[2] in EMBEDDINGS or factors["magnitude"].shape != factors["B"].shape[:1]
    ):
        why = "for an embedding, MLX computes a norm per token, but DoRA computes a norm per dimension"
        raise Unsupported(why, where=name, cure="Merge the adapter into the base with mlx_lm.fuse")
    return pair(factors, scale)


def _target(hub_name: str) -> Target:
    return Target(hub_name, "in out *k" if hub_name.rpartition(".")[2] in EMBEDDINGS else "out *in")


def _stack(name: str, slots: Slots, scale: float, modules: Modules, names: dict[str, str]) -> TargetUpdates:
    """Yield the updates of stacked experts, whose A (`[e, r, in]`) and B (`[e, out, r]`) are not transposed."""
    A, B = slots["A"].shape, slots["B"].shape
    if len(B) != 3 or A[0] != B[0] or A[1] != B[2] or "magnitude" in slots:
        raise ShapeMismatch(f"A {list(A)} and B {list(B)} do not fit stacked experts", where=name, cure=WRITE_AGAIN)
    for index, expert_name in enumerate(_experts(name, A[0], modules)):
        names[expert_name] = expert_name
        one: Slots = {field: item(leaf, index) for field, leaf in slots.items()}
        yield _target(expert_name), LoRA(**one, scaling=scale)


def _experts(name: str, count: int, modules: Modules) -> list[str]:
    """Return the names of a stack's experts in the hub's checkpoints, in the order of the expert index.

    Raises:
        TargetNotFound: no family has this stack.
        UsageError: several families have this stack, but their experts have different names.
    """
    moves = from_mlx(name, modules.config, count)
    if moves is None or [move.expert for move in moves] != list(range(count)):
        raise TargetNotFound("the name of this stack of experts is unknown", where=name, cure="Report the model")
    return [move.path for move in moves]


def _parts(name: str, modules: Modules) -> tuple[Move, ...]:
    """Return the hub's weights that MLX-LM fuses into the layer `name`.

    The result is empty if MLX-LM does not fuse this layer from several weights of the hub.
    """
    moves = from_mlx(name, modules.config, 0) or ()
    return moves if len(moves) > 1 and all(move.take is not None and move.expert is None for move in moves) else ()


def _is_stack(name: str, modules: Modules) -> bool:
    """Whether a module is a stack of experts, judged by its name.

    The number of axes does not show this, because the weight of a convolution can also have three axes.
    """
    moves = from_mlx(name, modules.config, 1)
    return moves is not None and moves[0].expert is not None


def _unlisted(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Rename keys of fused layers from `X.lora_a.0` to `X#0.lora_a`, so that each part becomes a separate pair."""
    changed = {}
    for key, tensor in tensors.items():
        if "#" in key:
            raise Malformed("the key contains #, which no module name contains", where=key, cure=WRITE_AGAIN)
        stem, _, last = key.rpartition(".")
        listed = decimal_number(last) is not None and stem.endswith((".lora_a", ".lora_b"))
        changed[f"{stem[:-7]}#{last}{stem[-7:]}" if listed else key] = tensor
    return changed


def _fused(
    name: str, part: int, count: int, slots: Slots, scale: float, tensors: Mapping[str, Lazy], modules: Modules,
    names: dict[str, str],
) -> TargetUpdates:  # fmt: skip
    """Yield the update of one part of a fused weight. The parts are consecutive blocks of rows."""
    keys = [f"{name}.lora_b.{index}" for index in range(count)]
    if part >= count or any(key not in tensors or len(tensors[key].shape) != 2 for key in keys):
        raise Malformed("lora_a.N and lora_b.N must be matrices, with N = 0, 1, 2, ...", where=name, cure=WRITE_AGAIN)
    start = sum(tensors[key].shape[1] for key in keys[:part])
    hub_name = modules.named(name)
    names[hub_name] = name
    update = _one(name, slots, scale)
    yield Target(hub_name, rows=(start, start + update.B.shape[0])), update


def _scale(config: Mapping[str, JsonValue]) -> float:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        cure = f"Add lora_parameters.scale to {CONFIG}; MLX-LM needs this field, too"
        raise Malformed(
            "the config has no scale, so the adapter's scaling is unknown", where="lora_parameters", cure=cure
        )
    return is_finite(parameters["scale"], "lora_parameters.scale")


def _read_whole(tensors: Mapping[str, Lazy], modules: Modules, names: dict[str, str]) -> TargetUpdates:
    by_module: dict[str, Slots] = {}
    for key, tensor in tensors.items():
        module, _, field = key.rpartition(".")
        if field not in ("weight", "bias") or not module:
            raise Malformed("the key ends with neither .weight nor .bias", where=key, cure=WRITE_AGAIN)
        by_module.setdefault(module, {})[field] = tensor
    for name, fields in by_module.items():
        if "weight" in fields and len(fields["weight"].shape) == 3 and _is_stack(name, modules):
            for index, expert_name in enumerate(_experts(name, fields["weight"].shape[0], modules)):
                names[expert_name] = expert_name
                part: Slots = {field: item(leaf, index) for field, leaf in fields.items()}
                yield Target(expert_name), Replacement(**part)
            continue
        expert_name = modules.named(name)
        names[expert_name] = name
        yield Target(expert_name), Replacement(**fields)


# Encode an `Adapter` as a config and tensors.


METADATA = {"format": "mlx"}


class MlxHints(Leftovers, total=False):
    """The data that the reader keeps for the writer.

    `text` is the JSON text of `config`. `metadata` is the metadata of the tensor file. `names` maps a target's path to
    the module's name in MLX. If the path and the name are equal, `names` has no entry for the target.
    """

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
    hints = leftovers(adapter, FORMAT, MlxHints)
    config_of_base = None if base is None else base.config
    adapter, absent = _without_absent(adapter, config_of_base, on_loss)
    adapter, joined = _stacked(adapter, config_of_base)
    only = all(isinstance(update, Replacement) for _, update in adapter)
    config, tensors, lines = _whole(adapter, hints) if only else _encode(adapter, hints, on_loss)
    text = json.dumps(dict(sorted(config.items())), indent=4)
    metadata = dict(with_metadata(hints.get("metadata", METADATA).items(), adapter))
    return _as_read(config, hints) or text, in_order(tensors, hints), metadata, absent + joined + lines


def _without_absent(
    adapter: Adapter, config: Mapping[str, JsonValue] | None, on_loss: str
) -> tuple[Adapter, list[str]]:
    """Remove the targets that MLX-LM's model lacks. Return the new adapter, and a line for each removed target.

    Raises:
        Unrepresentable: `on_loss` is not `drop`, or MLX-LM's model lacks all targets.
    """
    absent = [target for target in adapter.updates if is_absent(target.path, config)]
    if not absent:
        return adapter, []
    items = [
        f"{target}: MLX-LM's model has no separate layer for this weight, so the weight cannot have an adapter"
        for target in absent
    ]
    if on_loss != "drop" or len(absent) == len(adapter.updates):
        cure = (
            "Omit the updates with --on-loss drop (on_loss='drop'), or merge the adapter into the base and convert the "
            "base"
        )
        raise Unrepresentable("MLX-LM cannot express these updates", items=items, cure=cure)
    kept = {target: updates for target, updates in adapter.updates.items() if target not in absent}
    return adapter.replace(updates=kept), [f"left out {item}" for item in items]


def _stacked(adapter: Adapter, config: Mapping[str, JsonValue] | None) -> tuple[Adapter, list[str]]:
    """Join the updates of experts that MLX-LM stacks, and of weights that MLX-LM fuses.

    Also return a line for each update whose rank grows.

    Raises:
        UsageError: without a base, several families are possible, and MLX-LM stores their experts differently.
        Unrepresentable: some experts have no updates, and the number of experts is unknown without a base.
    """
    moves = {}
    for target, updates in adapter.updates.items():
        count = updates[0].dims(True).get("e") if target.stacked else 0
        move_to_mlx = to_mlx(target.path, config, count if isinstance(count, int) else 0)
        if move_to_mlx is not None:
            moves[target.path] = move_to_mlx
    if not moves:
        return adapter, []
    experts = expert_count(config)
    _check_all(moves, experts)
    plain = {target: updates for target, updates in adapter.updates.items() if target.path not in moves}
    there = translated(adapter.updates, moves, experts)
    # Join the updates of a fused layer's parts into one LoRA. MLX-LM supports one LoRA per part only in layers of its
    # class FusedLinear.
    fused = {move.path: move.into.of for given in moves.values() for move in given if move.into is not None}
    sizes = {
        target.path: fused[target.path] * (target.rows[1] - target.rows[0])
        for target in there
        if target.path in fused and target.rows is not None
    }
    joined, lines = with_joined_rows(there, None, sizes)
    return adapter.replace(updates={**plain, **joined}), lines


def _check_all(moves: Mapping[str, tuple[Move, ...]], experts: int) -> None:
    """Refuse a stack in which some experts have no updates, if the number of experts is unknown (`experts` is 0).

    If the number is known, experts without updates get zeros.
    """
    slots: dict[str, set[int]] = {}
    for given in moves.values():
        for move in given:
            if move.slot is not None:
                slots.setdefault(move.path, set()).add(move.slot)
    gaps = [
        f"{name}: the adapter has only experts {sorted(experts)}"
        for name, experts in slots.items()
        if len(experts) <= max(experts)
    ]
    if gaps and not experts:
        raise Unrepresentable(
            "MLX-LM stores a module's experts in one stack, so each expert needs a LoRA", items=gaps, cure=_EXPERTS
        )


def _encode(adapter: Adapter, hints: MlxHints, on_loss: str) -> tuple[dict[str, JsonValue], dict[str, Lazy], list[str]]:
    """Return the config, the tensors, and a line for each omitted or changed update.

    A file can have only one method: DoRA if the adapter has more DoRA than LoRA updates, otherwise LoRA.

    Raises:
        Unrepresentable: MLX-LM cannot express an update, and `on_loss` does not allow omitting the update.
    """
    kinds = Counter(type(update) for _, update in adapter if isinstance(update, LoRA | DoRA))
    dora = kinds[DoRA] > kinds[LoRA]

    def why(target: Target, update: Pair) -> str:
        if isinstance(update, DoRA) and target.layout != "out *in":
            return (
                "MLX has no DoRA on stacked experts, and its DoRA on an embedding has another formula than the paper's"
            )
        return unfit(Target(target.path, target.layout), update, stacked=True)

    pairs, lines = expressible(adapter, "MLX-LM", on_loss, why, (DoRA,) if dora else (LoRA,))
    first = cast("float | None", _parameters(hints).get("scale"))
    scale, pairs, folded = one_number(
        pairs,
        lambda u: u.scaling,
        lambda scale, _: scale,
        format_name="MLX-LM",
        on_loss=on_loss,
        default=1.0,
        first=first,
    )
    pairs, widened = _of_one_rank(pairs, hints)
    tensors = _spelled(pairs, hints)
    return _config(hints, pairs, scale, "dora" if dora else "lora"), tensors, lines + folded + widened


def _of_one_rank(pairs: Pairs, hints: MlxHints) -> tuple[Pairs, list[str]]:
    """Pad all updates with zeros to the largest rank, and return a line for each padded update.

    MLX-LM creates all layers with the rank in the config. Since version 0.32, it refuses tensors with another rank. If
    the adapter was read from an MLX-LM folder, and its tensors still have the same names, all ranks stay unchanged.
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
            # Transpose A and B, except in stacks of experts: there, A is `[e, r, in]` and B is `[e, out, r]`.
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
    """Return the config to write.

    If the config that was read still fits the tensors, it stays unchanged. Otherwise, the function sets the fields that
    MLX-LM needs, and keeps all other fields.
    """
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
    parameters = hints.get("config", {}).get("lora_parameters")
    return dict(parameters) if isinstance(parameters, dict) else {}


def _same(hints: MlxHints, pairs: Pairs) -> bool:
    return {*hints.get("order", ())} == {*_spelled(pairs, hints)}


def _key(name: str) -> str:
    """Return a module's name relative to its layer, as in the list `lora_parameters.keys` of the config."""
    head, layers, rest = name.rpartition(".layers.")
    return rest.partition(".")[2] if layers else head + rest


def _whole(adapter: Adapter, hints: MlxHints) -> tuple[dict[str, JsonValue], dict[str, Lazy], list[str]]:
    """Encode an adapter that only replaces whole parameters. Return the config, the tensors, and an empty list.

    The list is empty because no update is omitted or changed.

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
    """Return the text of the config that was read, if its contents equal `config`; otherwise an empty string.

    If the writer uses this text, the fields keep their order.
    """
    text = str(hints.get("text", ""))
    try:
        return text if text and load_json(text) == config else ""
    except ValueError as error:
        raise Malformed(
            f"the stored data of the MLX-LM file is damaged ({error})",
            where="foreign",
            cure="Remove the data: adapter.replace(foreign=None)",
        ) from None


_EXPERTS = "Train all experts and all parts of the module, or write another format"
