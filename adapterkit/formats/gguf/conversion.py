"""Decode llama.cpp's adapters (GGUF files, and older `ggla` files), and encode an `Adapter` as a GGUF file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ...core.adapter import Adapter, Foreign, Step, Target
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
from ...io.arrange import reordered, turned
from ...io.ggml_blocks import BLOCKS, decoded, encoded
from ...io.gguf_file import Gguf, GgufValue, read_ggla, write_gguf
from ...io.lazy import Lazy, as_array, as_lazy, from_numpy
from ...methods.alora import ALoRA
from ...methods.lora import LoRA
from ...naming.architectures import WEIGHT, Architecture, expert_count, of_gguf
from ...naming.binding import bind
from ...naming.binding.moving import moves_of, translated
from ...naming.gguf import NAMING, column_order, family_of, name_for, place_of, row_order
from ...naming.heads import LINEAR_FIELDS, Heads, heads_of, linear_of, sharing, undone
from ...naming.moves import stored_in_out
from ...naming.resolver import translate
from ...naming.ties import aliases, is_embedding
from ...naming.tool_names import modules_of, without_prefix
from .._kit import (
    Leftovers,
    Pairs,
    check_factors,
    expressible,
    grouped,
    in_order,
    in_row_order,
    leftovers,
    one_number,
    pair,
    unfit,
)

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...naming.architectures import WeightPlace as Where
    from ...naming.heads import Rows
    from ...naming.moves import Move
    from .._kit import Pair, Slots


# Translate an adapter to a GGUF file: rename modules, reorder rows, stack experts.


SLOTS = {".weight.lora_a": "A", ".weight.lora_b": "B"}
EMBEDDING = "token_embd"


@dataclass(slots=True, eq=False)
class GgufPlace:
    """The module names and the order of rows in GGUF files of one architecture.

    Attributes:
        name: the file's `general.architecture`.
        family: the family of models with this architecture.
        config: the base's config, which has the numbers of heads; None without a base.
        known: data about the heads, from the source file or the config. `query` and `kv` are numbers of heads, and
            `rotary` is the number of rotary rows per head. The other keys are `LINEAR_FIELDS`.
        experts: the number of experts in a stack; 0 if unknown.
    """

    name: str
    family: Architecture
    config: Mapping[str, Any] | None = None
    known: dict[str, int] = field(default_factory=dict)
    experts: int = 0

    @classmethod
    def of_base(cls, base: Checkpoint) -> GgufPlace:
        """Create a `GgufPlace` for writing, from the base's config.

        Raises:
            UsageError: the base has no config.
            Unsupported: llama.cpp is not known to support the base's family.
        """
        name, family = name_for(base.config)
        return cls(name, family, base.config, {}, expert_count(base.config))

    def where(self, foreign: str) -> Where | None:
        """Return the weight that `foreign` names in the file; None if it is unknown or names several weights."""
        place = place_of(self.family, foreign)
        return None if place is None else place[1]

    def order(self, foreign: str, rows: int) -> Rows | None:
        """Return the order in which the file stores a weight's rows; None if the base has the same order."""
        where = self.where(foreign)
        if where is None or where.rows is None:
            return None
        heads = self.heads(foreign)
        if where.rows == "rope" and self.config is not None:
            self._check_width(rows, sharing(heads, where.heads, foreign), foreign)
        return row_order(where, rows, heads, foreign)

    def _check_width(self, rows: int, count: int, foreign: str) -> None:
        """Check that `rows` is `count` times the config's head width. Otherwise the order of rows would be wrong."""
        dim = heads_of(self.config, foreign).dim
        if rows != count * dim:
            why = f"the base's config states {count} heads of width {dim}, which do not give {rows} rows"
            raise Unsupported(why, where=foreign, cure="Merge the adapter into the GGUF model")

    def columns(self, foreign: str, columns: int) -> Rows | None:
        """Return the order in which the file stores a weight's inputs; None if the base has the same order."""
        where = self.where(foreign)
        return (
            None
            if where is None or where.columns is None
            else column_order(where, columns, self.heads(foreign), foreign)
        )

    def heads(self, where: str) -> Heads:
        """Return the base's numbers of heads.

        Raises:
            UsageError: neither the source file nor a base's config contains the numbers.
        """
        if not {"query", "kv"} <= self.known.keys():
            heads = heads_of(self.config, where)
            self.known |= {"query": heads.query, "kv": heads.kv}
            self.known |= {"rotary": heads.rotary} if heads.rotary else {}
            if heads.linear is not None:
                counts = (heads.linear.keys, heads.linear.values, heads.linear.key_dim, heads.linear.value_dim)
                self.known |= dict(zip(LINEAR_FIELDS, counts, strict=True))
        return Heads(self.known["query"], self.known["kv"], 1, linear_of(self.known), self.known.get("rotary", 0))

    def moves(self, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, tuple[Move, ...]]:
        """Return a map from each target's path to the file's modules, rows and experts that store the target.

        The map omits targets that no file can contain.
        """
        return moves_of(updates, self.family, NAMING)

    def why_not(self, target: Target, update: Pair, moves: Mapping[str, tuple[Move, ...]]) -> str:
        """Return the reason why a GGUF file cannot contain an update; empty if it can."""
        if target.path not in moves:
            return f"its name in GGUF files of the architecture {self.name} is unknown"
        place = self.where(moves[target.path][0].path)
        if place is None:
            # Nomic: the base's GGUF file combines several weights in one tensor. An adapter file has no separate names
            # for these weights.
            return "its GGUF tensor combines several weights: merge the adapter into the GGUF model"
        if place.beside is not None:
            return (
                "llama.cpp splits this weight into two tensors and cannot adapt them: merge the adapter into the GGUF "
                "model"
            )
        if place.rows == "rotary":
            # Refuse: GLM-4 and GLM-4V have the same architecture name in GGUF files, but different orders of rows.
            why = "an adapter file does not state which of two orders its rows have"
            return f"{why}: merge the adapter into the GGUF model"
        if any(move.take is not None and move.take.groups for move in moves[target.path]):
            # InternLM2: the rows of the queries are not contiguous in the base's tensor, but `Target.rows` is a single
            # range of rows.
            why = "the base stores queries, keys and values group by group in one tensor"
            return f"{why}: merge the adapter into the GGUF model"
        experts = target.stacked or any(move.slot is not None for move in moves[target.path])
        if isinstance(update, ALoRA) and (target.layout != "out *in" or experts):
            return "an activated LoRA cannot adapt an embedding, a Conv1D or an expert"
        # Ignore `target.rows` here, because GGUF stores the parts of a fused weight as separate tensors. If the rows
        # are not exactly one part, `placed` refuses the update.
        return unfit(replace(target, rows=None), update, stacked=True)

    def placed(self, pairs: Pairs, moves: Mapping[str, tuple[Move, ...]]) -> Pairs:
        """Return a map from the file's module names to updates. Updates of single experts are joined into stacks.

        Raises:
            Unrepresentable: two updates adapt the same tensor of the GGUF model, or an update adapts only some rows of
                a tensor.
        """
        placed_updates = translated(
            {target: (update,) for target, update in pairs.items()}, moves, self.experts, self.config
        )
        twice = [
            f"{target}: {len(given)} updates"
            for target, given in placed_updates.items()
            if len(given) > 1 or target.rows
        ]
        if twice:
            why = "a GGUF adapter has one pair of factors per tensor, for all rows of the tensor"
            raise Unrepresentable(why, items=twice, cure="Combine the updates first, or write another format")
        return {target: given[0] for target, given in placed_updates.items()}  # type: ignore[misc]

    def spelled(self, target: Target, update: Pair) -> dict[str, Lazy]:
        """Return a map from the file's keys to A and B of an update.

        The weight's rows and inputs are in the order that the file uses.
        """
        A, B = as_lazy(update.A), as_lazy(update.B)
        if not target.stacked:
            order = self.order(target.path, B.shape[0])
            ordered = update if order is None else in_row_order(update, lambda: order)
            A, B = as_lazy(ordered.A), as_lazy(ordered.B)
            columns = self.columns(target.path, A.shape[-1])
            A = A if columns is None else reordered(A, lambda: columns, 1)
        return dict(zip(keys(target.path), (turned(A) if target.path == EMBEDDING else A, B), strict=True))


def keys(foreign: str) -> list[str]:
    """Return the file's keys for A and B of a module."""
    return [foreign + end for end in SLOTS]


# Decode a GGUF file into an `Adapter`.


FORMAT = "gguf"
ARCHITECTURE, TYPE, KIND, ALPHA = "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"


def decode(file: Gguf, base: Checkpoint | None, *, outline: bool = False) -> Adapter:
    """Return the adapter in a GGUF file.

    Args:
        file: the file.
        base: the base model. The order of some rows depends on the numbers of heads in its config.
        outline: whether to return an adapter even if the order of some rows is unknown without a base. The UsageError
            is then raised only when a tensor of a module with such rows is loaded.

    Raises:
        Malformed, Unsupported: the file is not a LoRA adapter for llama.cpp, or its architecture is unknown.
        TargetNotFound: the family or the base has no weight for a module name in the file.
        UsageError: the order of rows depends on the numbers of heads, which are unknown without a base.
    """
    name = _text(file, ARCHITECTURE)
    for key, word in ((TYPE, "adapter"), (KIND, "lora")):
        if _text(file, key) != word:
            raise Unsupported(f"{key} is {_text(file, key)!r}, not {word!r}", where=key, cure="Pass a LoRA adapter")
    invocation = invocation_of(file)
    alpha = file.values.get(ALPHA, GgufValue("f32", 0.0))
    if alpha.type != "f32" or not abs(alpha.value) < float("inf"):
        raise Malformed(f"{alpha.value!r} is not a finite f32", where=ALPHA, cure=WRITE_AGAIN)
    kept = {name: tensor for name, tensor in file.tensors.items() if name.endswith("_norm.weight")}
    pairs = {name: tensor for name, tensor in file.tensors.items() if name not in kept}
    groups = grouped(pairs, SLOTS, "a GGUF adapter")
    place = GgufPlace(name, _family(name, groups, base), None if base is None else base.config)
    pairs_by_target: dict[Target, tuple[Pair, ...]] = {}
    for foreign, slots in groups.items():
        target, update = _update(place, foreign, slots, alpha.value, outline)
        pairs_by_target[target] = (update,)
    updates = _with_names_of_the_family(pairs_by_target, place, invocation)
    if base is not None:
        _check_alone(updates, base)
        bound = bind(Adapter(updates), base, aliases=aliases(base))
        updates = dict(bound.adapter.updates)
    data = {
        "architecture": name, "alpha": alpha.value, "heads": place.known, "experts": place.experts,
        "values": [[key, value.type, value.value] for key, value in file.values.items()],
        "order": list(file.tensors), "types": {key: kind for key, kind in file.types.items() if kind == "Q8_0"},
    }  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data, kept))


def _check_alone(updates: Mapping[Target, object], base: Checkpoint) -> None:
    """Check that each module name of the file fits only one module of the base. Prefixes are ignored.

    Raises:
        TargetNotFound: a name in the file fits two modules of the base.
    """
    places: dict[str, list[str]] = {}
    for name in dict.fromkeys(modules_of(base.tensors)):
        for bare in dict.fromkeys(without_prefix(name)):
            places.setdefault(bare, []).append(name)
    for target in updates:
        if len(names := places.get(target.path, ())) > 1:
            why = f"the base has {len(names)} modules with this name: {', '.join(names)}"
            raise TargetNotFound(why, where=target.path, cure=USE_ITS_BASE)


def _family(name: str, modules: Collection[str], base: Checkpoint | None) -> Architecture:
    """Return the family of the models that an adapter file fits.

    If possible, the base's config decides, because the file alone does not identify families such as Granite 4.
    """
    with suppress(Unsupported, UsageError):
        architecture, family = name_for(None if base is None else base.config)
        if architecture == name and family.record.gguf_key is not None:
            return family
    return family_of(name, modules)


def _update(place: GgufPlace, foreign: str, slots: Slots, alpha: float, outline: bool) -> tuple[Target, Pair]:
    """Create the update of one module. The target has the file's module name, and the rows have the base's order.

    Raises:
        TargetNotFound: the family has no weight for this module name.
        ShapeMismatch: the tensors do not have the shapes of A and B.
    """
    where = place.where(foreign)
    if where is None:
        why = f"{place.family.family} has no known weight with this name"
        raise TargetNotFound(
            why, where=foreign, cure=f"If the architecture {place.name} is right, merge the adapter with llama.cpp"
        )
    if where.stacked:
        A, B = slots["A"], slots["B"]
        if len(A.shape) != 3 or len(B.shape) != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or not A.shape[1]:
            why = f"A is {list(A.shape)}, B is {list(B.shape)}; they must be [experts, r, in] and [experts, out, r]"
            raise ShapeMismatch(why, where=foreign, cure=WRITE_AGAIN)
        place.experts = A.shape[0]
        return Target(foreign, "e out *in"), LoRA(**slots, scaling=alpha / A.shape[1] if alpha else 1.0)
    if foreign == EMBEDDING and len(slots["A"].shape) == 2:
        slots = {**slots, "A": turned(slots["A"])}
    rank = check_factors(foreign, slots)
    update = pair(slots, alpha / rank if alpha else 1.0)
    try:
        order = place.order(foreign, update.B.shape[0])
        columns = place.columns(foreign, update.A.shape[-1])
    except UsageError as error:
        if not outline:
            raise
        return Target(foreign), _unordered(update, error)
    if columns is not None:
        update = update.replace(A=reordered(as_lazy(update.A), lambda: undone(columns), 1))
    return Target(foreign), update if order is None else in_row_order(update, lambda: undone(order))


def _unordered(update: Pair, error: UsageError) -> Pair:
    """Return a copy of an update. Its tensors have the same shapes, but loading their values raises `error`."""

    def order() -> NoReturn:
        raise error

    return update.replace(A=reordered(as_lazy(update.A), order, 1), B=reordered(as_lazy(update.B), order))


def _with_names_of_the_family(
    pairs: Mapping[Target, tuple[Pair, ...]], place: GgufPlace, invocation: Lazy | None
) -> dict[Target, tuple[Update, ...]]:
    """Rename targets to the family's names, and set each target's layout to the layout of the family's weight."""
    config = {"model_type": place.family.record.model_types[0]}
    renamed: dict[Target, tuple[Update, ...]] = {}
    for target, (update,) in translated(pairs, moves_of(pairs, place.family, WEIGHT)).items():
        inputs_first = is_embedding(f"{target.path}.weight") or stored_in_out(target.path, config)
        layout = "in out *k" if inputs_first and not target.stacked else target.layout
        target_here = Target(target.path, layout, target.rows)
        renamed[target_here] = (activated(target_here, update, invocation),)  # type: ignore[arg-type]
    return renamed


def _text(file: Gguf, key: str) -> str:
    value = file.values.get(key)
    if value is None or value.type != "string":
        raise Malformed("the file has no string under this key", where=key, cure="Pass an adapter for llama.cpp")
    return str(value.value)


# Read `ggla` files, llama.cpp's adapters before GGUF. They are only for Llama, store A transposed, and have one rank
# and one alpha for all modules.


def read_legacy(path: Path, compat: str | None, base: Checkpoint | None) -> Adapter:
    """Read the adapter in a `ggla` file. `compat` names the tool that wrote the file; None if unknown."""
    file = read_ggla(path)
    place = GgufPlace("llama", family_of("llama", ()), None if base is None else base.config)
    pairs: dict[Target, tuple[Pair, ...]] = {}
    for name, slots in grouped(file.tensors, {".weight.loraA": "A", ".weight.loraB": "B"}, "a ggla file").items():
        foreign = _modern(name)
        slots = {**slots, "A": turned(slots["A"])} if len(slots["A"].shape) == 2 else slots
        if check_factors(name, slots) != file.rank:
            why = f"the file's header states rank {file.rank}, but these tensors have another rank"
            raise ShapeMismatch(why, where=name, cure=WRITE_AGAIN)
        update = LoRA(**slots, scaling=file.alpha / file.rank)
        order = _legacy_order(place, name, foreign, compat, update.B.shape[0])
        pairs[Target(foreign)] = (
            update if order is None else in_row_order(update, lambda order=order: undone(order)),  # type: ignore[misc]
        )  # fmt: skip
    moves = moves_of(pairs, place.family, WEIGHT)
    if unknown := next((target.path for target in pairs if target.path not in moves), None):
        raise TargetNotFound("a Llama has no weight with this name", where=unknown, cure=WRITE_AGAIN)
    updates = translated(pairs, moves)
    if base is not None:
        updates = dict(bind(Adapter(updates), base).adapter.updates)
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT, "container": "ggla"}),))


def _legacy_order(place: GgufPlace, name: str, foreign: str, compat: str | None, rows: int) -> Rows | None:
    """Return the order of a weight's rows in a `ggla` file; None if the base has the same order.

    llama.cpp's converter kept PEFT's order of rows, but llama.cpp's training used the order of the GGUF base. If
    `compat` is None, a module name that begins with `layers.` shows that the converter wrote the file.
    """
    where = place.where(foreign)
    if where is None or where.rows is None or compat == "convert-lora-to-ggml":
        return None
    if name.startswith("layers.") and compat is None:
        return None
    if compat is None:
        why = "the order of these rows depends on the tool that wrote the file, and the file does not name this tool"
        cure = (
            "Pass --compat convert-lora-to-ggml (compat='convert-lora-to-ggml') if the file was converted from PEFT, "
            "or --compat finetune (compat='finetune') if llama.cpp trained the adapter"
        )
        raise UsageError(why, where=name, cure=cure)
    return place.order(foreign, rows)


_OLD = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip


def _modern(name: str) -> str:
    """Translate a module name of `ggla` files to the name in GGUF files."""
    first, _, rest = name.partition(".")
    number, _, module = rest.partition(".")
    return f"blk.{number}.{_OLD[module]}" if first == "layers" and module in _OLD else name


# Read and write the tokens that activate an activated LoRA. A file has one list of tokens for all modules.


INVOCATION = "adapter.alora.invocation_tokens"
LARGEST = (1 << 32) - 1
"""The largest token id in a file. Files store token ids as u32."""


def invocation_of(file: Gguf) -> Lazy | None:
    """Return the file's activation tokens as one tensor for all updates; None if the file has no activated LoRA.

    Raises:
        Malformed: the value is not a list of token ids, or the list is empty.
    """
    value = file.values.get(INVOCATION)
    if value is None:
        return None
    if value.type not in ("[u32]", "[i32]") or not value.value or min(value.value) < 0:
        raise Malformed(
            f"the value must be a non-empty list of token ids, as u32 or non-negative i32; its type is {value.type}",
            where=INVOCATION,
            cure=WRITE_AGAIN,
        )
    import numpy as np

    return from_numpy(np.array(value.value, dtype=np.int64))


def activated(target: Target, update: Pair, invocation: Lazy | None) -> Pair:
    """Return the update as an activated LoRA if the file has activation tokens. Otherwise return the update itself.

    Raises:
        Unsupported: the target is an embedding or a Conv1D, which an activated LoRA cannot adapt.
    """
    if invocation is None:
        return update
    if target.layout != "out *in":
        why = "an activated LoRA cannot adapt an embedding or a Conv1D"
        raise Unsupported(why, where=str(target), cure="Run the adapter with llama.cpp, or remove this module")
    leaves: dict[str, Any] = {"A": update.A, "B": update.B, "invocation": invocation}
    return ALoRA(**leaves, scaling=update.scaling)


class Invocation:
    """The activation tokens to write. These are the tokens of the adapter's first update."""

    def __init__(self, updates: Iterable[object]) -> None:
        first = next(iter(updates), None)
        self.tokens = _tokens(first)

    def why_not(self, update: Pair) -> str:
        """Return the reason why the file cannot store this update's activation tokens; empty if it can."""
        tokens = _tokens(update)
        if tokens != self.tokens:
            return "its invocation differs from the first update's, but a file has one invocation for all updates"
        return (
            "its invocation has token ids that do not fit u32"
            if any(not 0 <= n <= LARGEST for n in tokens or ())
            else ""
        )

    def values(self) -> dict[str, GgufValue]:
        """Return a dict with the key and value for the tokens; empty if there are no tokens."""
        return {} if self.tokens is None else {INVOCATION: GgufValue("[u32]", list(self.tokens))}


def _tokens(update: object) -> tuple[int, ...] | None:
    return tuple(as_lazy(update.invocation).numpy().tolist()) if isinstance(update, ALoRA) else None


# Encode an `Adapter` as a GGUF file.


METHODS = (LoRA, ALoRA)


class GgufHints(Leftovers, total=False):
    """The data that `Adapter.foreign` keeps from a GGUF file.

    `values` contains the file's metadata as (key, type, value) triples. `types` maps the name of each tensor with the
    block type Q8_0 to `"Q8_0"`. It omits all other tensors.
    """

    architecture: str
    alpha: float
    heads: dict[str, int]
    experts: int
    values: list[tuple[str, str, Any]]
    types: dict[str, Literal["Q8_0"]]


def save(adapter: Adapter, path: Path, on_loss: str, base: Checkpoint | None) -> list[str]:
    """Write the file, and return one line for each omitted or rewritten update.

    Raises:
        Unrepresentable: llama.cpp cannot express an update, and `on_loss` does not allow rewriting the update.
    """
    hints = leftovers(adapter, FORMAT, GgufHints)
    place = _place(hints, adapter, base)
    invocation = Invocation(update for _, update in adapter if isinstance(update, METHODS))
    moves = place.moves(adapter.updates)

    def why_not(target: Target, update: Pair) -> str:
        return place.why_not(target, update, moves) or invocation.why_not(update)

    pairs, lines = expressible(adapter, "llama.cpp", on_loss, why_not, METHODS)
    pairs = place.placed(pairs, moves)
    alpha, pairs, folded = one_number(
        pairs, _exact_alpha, _scaling, format_name="a GGUF adapter", on_loss=on_loss,
        default=float(_rank(next(iter(pairs.values())))), first=hints.get("alpha"),
    )  # fmt: skip
    tensors: dict[str, Lazy] = {}
    for target, update in pairs.items():
        tensors |= place.spelled(target, update)
    kept = {} if adapter.foreign is None or not hints else adapter.foreign.tensors
    tensors |= {name: as_lazy(leaf) for name, leaf in kept.items()}
    types = {
        name: kind for name, kind in hints.get("types", {}).items() if name in tensors and _holds(kind, tensors[name])
    }
    write_gguf(path, _values(hints, place.name, alpha) | invocation.values(), in_order(tensors, hints), types)
    return lines + folded


def _holds(kind: str, tensor: Lazy) -> bool:
    """Whether a quantized block type such as Q8_0 can store a tensor's values without rounding.

    It can if the values were read from a Q8_0 tensor and have not changed since, because each value is then a whole
    multiple of its block's scale. The writer stores all other tensors in their own dtype, to avoid rounding.
    """
    import numpy as np

    values = as_array(tensor)
    if values.size % BLOCKS[kind][1]:
        return False
    return np.array_equal(decoded(kind, encoded(kind, values)), values.reshape(-1))


def _place(hints: GgufHints, adapter: Adapter, base: Checkpoint | None) -> GgufPlace:
    """Create a new file's `GgufPlace` from the base's config. Without a config, use the data in `hints`."""
    if (base is not None and base.config is not None) or not hints:
        return GgufPlace.of_base(base) if base is not None else GgufPlace(*name_for(None))
    name = str(hints.get("architecture"))
    paths = {target.path for target in adapter.updates}
    families = of_gguf(name) or [family_of(name, ())]
    family = max(families, key=lambda each: sum(translate(path, each, NAMING, 1) is not None for path in paths))
    return GgufPlace(name, family, None, dict(hints.get("heads", {})), int(hints.get("experts", 0)))


def _rank(update: Pair) -> int:
    """Return the rank of an update. In a stack, this is the rank of each expert."""
    return int(update.B.shape[-1])


def _exact_alpha(update: Pair) -> float | None:
    """Return the float32 alpha for which `alpha / rank` is exactly the update's scaling; None if there is none.

    llama.cpp computes the scaling as `alpha / rank`.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        alpha = float(np.float32(update.scaling * _rank(update)))
    return alpha if alpha and alpha / _rank(update) == update.scaling else None


def _scaling(alpha: float, update: Pair) -> float:
    return alpha / _rank(update)


def _values(hints: GgufHints, architecture: str, alpha: float) -> dict[str, GgufValue]:
    read = {key: GgufValue(kind, value) for key, kind, value in hints.get("values", ()) if key != INVOCATION}
    start = read or {
        ARCHITECTURE: GgufValue("string", architecture),
        TYPE: GgufValue("string", "adapter"),
        KIND: GgufValue("string", "lora"),
    }
    alpha_stated = ALPHA in start or alpha != hints.get("alpha")
    return {
        **start,
        ARCHITECTURE: GgufValue("string", architecture),
        **({ALPHA: GgufValue("f32", alpha)} if alpha_stated else {}),
    }
