"""llama.cpp's LoRA adapters: GGUF files whose `general.type` is `adapter`; the older `ggla` files are read, too.

Names are those of the base's GGUF file, so the architecture's table translates them, both ways. Where llama.cpp keeps
the rows of q and k in Meta's order, the base's config tells the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter, Foreign, Step, Target
from ..errors import AdapterkitError, Malformed, ShapeMismatch, TargetNotFound, Unrepresentable, Unsupported, UsageError
from ..methods.lora import LoRA
from ..names.gguf import ARCHITECTURES, OF_MODEL, Architecture
from ..names.heads import heads_of, rope_pairs, undone
from ..names.tables import Names, modules_of
from ..tensors.arrange import item, stacked, turned
from ..tensors.ggla import is_ggla, read_ggla
from ..tensors.gguf import Gguf, Value, is_gguf, read_gguf, write_gguf
from ..tensors.lazy import Lazy, as_lazy
from ._format import Format
from ._pairs import (
    DAMAGED,
    Pairs,
    check_factors,
    expressible,
    grouped,
    in_order,
    in_row_order,
    one_number,
    pair,
    rank_of,
    remembered,
    to_rank,
    unfit,
)  # fmt: skip

if TYPE_CHECKING:
    from ..tensors.checkpoint import Checkpoint
    from ._pairs import Pair, Slots

FORMAT = "gguf"
ARCHITECTURE, TYPE, KIND, ALPHA = "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"
_SLOTS = {".weight.lora_a": "A", ".weight.lora_b": "B"}
_EMBEDDING = "token_embd"


class GgufAdapter(Format):
    """LoRA adapters of llama.cpp."""

    url = "https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py"
    description = "llama.cpp: a GGUF file of type adapter; ggla files are read"
    methods = frozenset({"lora"})
    compat = frozenset({"convert-lora-to-ggml", "finetune"})

    def sniff(self, path: Path) -> bool:
        try:
            if is_ggla(path):
                return True
            return is_gguf(path) and read_gguf(path, tensors=False).values.get(TYPE) == Value("string", "adapter")
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            if is_ggla(path):
                return _read_legacy(path, compat, base)
            return _decode(read_gguf(path), base)
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = remembered(adapter, FORMAT)
        place = _Place.of(hints, base)
        pairs, lines = expressible(adapter, "llama.cpp", on_loss, place.why_not)
        pairs = _of_one_rank(pairs, place)
        alpha, pairs, folded = one_number(
            pairs, _exact_alpha, _scaling, dialect="a GGUF adapter", on_loss=on_loss,
            default=float(rank_of(next(iter(pairs.values())))), first=hints.get("alpha"),
        )  # fmt: skip
        tensors = place.spelled(pairs)
        kept = {} if adapter.foreign is None or not hints else adapter.foreign.tensors
        tensors |= {name: as_lazy(leaf) for name, leaf in kept.items()}
        types = {name: kind for name, kind in hints.get("types", {}).items() if name in tensors}
        write_gguf(path, _values(hints, place.name, alpha), in_order(tensors, hints), types)
        return lines + folded


class _Place:
    """Where an adapter lies: the architecture, the base's names, its heads."""

    def __init__(self, name: str, base: Checkpoint | None, heads: Mapping[str, int], experts: int) -> None:
        if name not in ARCHITECTURES:
            known = f"Known: {', '.join(ARCHITECTURES)}"
            raise Unsupported(f"the architecture {name!r}", where=ARCHITECTURE, cure=known)
        self.name, self.base, self.known, self.experts = name, base, dict(heads), experts
        self.architecture: Architecture = ARCHITECTURES[name]
        self.names = Names(self.architecture.table, None if base is None else modules_of(base.tensors))

    @classmethod
    def of(cls, hints: Mapping[str, Any], base: Checkpoint | None) -> _Place:
        """For writing: by the base's config, or by the file that was read."""
        if base is None or base.config is None:
            if not hints:
                why = "the base's architecture decides on names and the order of rows in a GGUF file"
                raise UsageError(
                    why, where=ARCHITECTURE, cure="Give the base, with its config.json, by base= or --base"
                )
            return cls(hints["architecture"], None, hints.get("heads", {}), hints.get("experts", 0))
        inner = base.config.get("text_config")
        config = inner if isinstance(inner, dict) else base.config
        model = config.get("model_type")
        if model not in OF_MODEL:
            known = f"Known: {', '.join(OF_MODEL)}"
            raise Unsupported(f"bases of model_type {model!r}", where="config.json", cure=known)
        experts = config.get("num_local_experts", config.get("num_experts", 0)) or 0
        return cls(OF_MODEL[model], base, {}, experts)

    def order(self, foreign: str, rows: int) -> Any:
        """The order of the file's rows, where it is not the base's own."""
        kind = self.architecture.turned.get(_template(foreign))
        return None if kind is None else rope_pairs(rows, self.heads(kind, foreign), foreign)

    def heads(self, kind: str, where: str) -> int:
        if kind not in self.known:
            found = heads_of(None if self.base is None else self.base.config, where)
            self.known |= {"query": found.query, "kv": found.kv}
        return self.known[kind]

    def why_not(self, target: Target, update: Pair) -> str:
        """Why a file has no name for an update."""
        if self.names.there(target.path) is None:
            return f"no name in the table of {self.name}"
        return unfit(target, update)

    def foreign(self, target: Target) -> str:
        name = self.names.there(target.path)
        assert name is not None
        return name

    def is_stack(self, foreign: str) -> bool:
        return _template(foreign) in self.architecture.experts.values()

    def spelled(self, pairs: Pairs) -> dict[str, Lazy]:
        """The tensors as the file has them."""
        stacks: dict[str, dict[int, Pair]] = {}
        tensors: dict[str, Lazy] = {}
        for target, update in pairs.items():
            foreign = self.foreign(target)
            if self.is_stack(foreign):
                stacks.setdefault(foreign, {})[_expert(target.path)] = update
                tensors |= dict.fromkeys(_keys(foreign), as_lazy(update.A))
            else:
                tensors |= self.one(foreign, update)
        for foreign, found in stacks.items():
            tensors |= self.stack(foreign, found)
        return tensors

    def one(self, foreign: str, update: Pair) -> dict[str, Lazy]:
        order = self.order(foreign, update.B.shape[0])
        held = update if order is None else in_row_order(update, lambda: order)
        A = as_lazy(held.A)
        return dict(zip(_keys(foreign), (turned(A) if foreign == _EMBEDDING else A, as_lazy(held.B)), strict=True))

    def stack(self, foreign: str, found: Mapping[int, Pair]) -> dict[str, Lazy]:
        count = self.experts or max(found) + 1
        lacking = [index for index in range(count) if index not in found]
        if lacking or max(found) >= count:
            why = f"one tensor holds all {count} experts, and the adapter has {len(found)} of them"
            raise Unrepresentable(why, items=[f"{foreign}: expert {n}" for n in lacking or [max(found)]], cure=_EXPERTS)
        own = [found[index] for index in range(count)]
        parts = [stacked([as_lazy(u.A) for u in own]), stacked([as_lazy(u.B) for u in own])]
        return dict(zip(_keys(foreign), parts, strict=True))


def _decode(file: Gguf, base: Checkpoint | None) -> Adapter:
    name = _text(file, ARCHITECTURE)
    for key, word in ((TYPE, "adapter"), (KIND, "lora")):
        if _text(file, key) != word:
            raise Unsupported(f"{key} is {_text(file, key)!r}, not {word!r}", where=key, cure="Give a LoRA adapter")
    if INVOCATION in file.values:
        why = "an activated LoRA acts only behind its invocation tokens; no method says that"
        raise Unsupported(why, where=INVOCATION, cure="Run it with llama.cpp, which knows the tokens")
    alpha = file.values.get(ALPHA, Value("f32", 0.0))
    if alpha.type != "f32" or not abs(alpha.value) < float("inf"):
        raise Malformed(f"{alpha.value!r} is no finite f32", where=ALPHA, cure=DAMAGED)
    place = _Place(name, base, {}, 0)
    kept = {name: tensor for name, tensor in file.tensors.items() if name.endswith("_norm.weight")}
    pairs = {name: tensor for name, tensor in file.tensors.items() if name not in kept}
    updates: dict[Target, tuple[LoRA, ...]] = {}
    for foreign, slots in grouped(pairs, _SLOTS, "a GGUF adapter").items():
        updates |= {target: (update,) for target, update in _updates(place, foreign, slots, alpha.value)}
    data = {
        "architecture": name, "alpha": alpha.value, "heads": place.known, "experts": place.experts,
        "values": [[key, value.type, value.value] for key, value in file.values.items()],
        "order": list(file.tensors), "types": {key: kind for key, kind in file.types.items() if kind == "Q8_0"},
    }  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data, kept))


def _updates(place: _Place, foreign: str, slots: Slots, alpha: float) -> Any:
    if place.is_stack(foreign):
        yield from _experts(place, foreign, slots, alpha)
        return
    if foreign == _EMBEDDING and len(slots["A"].shape) == 2:
        slots = {**slots, "A": turned(slots["A"])}
    rank = check_factors(foreign, slots)
    own = place.names.back(foreign)
    update = pair(slots, alpha / rank if alpha else 1.0)
    order = place.order(foreign, update.B.shape[0])
    layout = "in out *k" if foreign == _EMBEDDING or own.startswith("transformer.h.") else "out *in"
    yield Target(own, layout), update if order is None else in_row_order(update, lambda: undone(order))


def _experts(place: _Place, foreign: str, slots: Slots, alpha: float) -> Any:
    A, B = slots["A"], slots["B"]
    if len(A.shape) != 3 or len(B.shape) != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or not A.shape[1]:
        raise ShapeMismatch(f"A is {list(A.shape)}, B is {list(B.shape)}", where=foreign, cure=DAMAGED)
    count, rank = A.shape[:2]
    place.experts = count
    for index, own in enumerate(_expert_names(place, foreign, count)):
        one: Slots = {name: item(leaf, index) for name, leaf in slots.items()}
        yield Target(own), LoRA(**one, scaling=alpha / rank if alpha else 1.0)


def _expert_names(place: _Place, foreign: str, count: int) -> list[str]:
    """The modules of all experts of a stack, by number."""
    if place.names.walked is not None:
        found = sorted(place.names.walked.get(foreign, []), key=_expert)
        if [_expert(own) for own in found] != list(range(count)):
            why = f"{count} experts in the file, {len(found)} in the base"
            raise TargetNotFound(why, where=foreign, cure="Is this the base that the adapter was trained on?")
        return found
    own = [own for own, name in place.architecture.experts.items() if name == _template(foreign)]
    number = foreign.split(".")[1]
    return [own[0].replace("{n}", number).replace("{e}", str(index)) for index in range(count)]


def _read_legacy(path: Path, compat: str | None, base: Checkpoint | None) -> Adapter:
    """A `ggla` file: Llama alone; A is stored turned, r and alpha are one for all."""
    file = read_ggla(path)
    place = _Place("llama", base, {}, 0)
    updates: dict[Target, tuple[Pair, ...]] = {}
    for name, slots in grouped(file.tensors, {".weight.loraA": "A", ".weight.loraB": "B"}, "a ggla file").items():
        foreign = _modern(name)
        slots = {**slots, "A": turned(slots["A"])} if len(slots["A"].shape) == 2 else slots
        if check_factors(name, slots) != file.rank:
            raise ShapeMismatch(f"a rank other than the file's {file.rank}", where=name, cure=DAMAGED)
        update = LoRA(**slots, scaling=file.alpha / file.rank)
        order = _legacy_order(place, name, foreign, compat, update.B.shape[0])
        updates[Target(place.names.back(foreign))] = (
            update if order is None else in_row_order(update, lambda order=order: undone(order)),  # type: ignore[misc]
        )  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT, "container": "ggla"}),))


def _legacy_order(place: _Place, name: str, foreign: str, compat: str | None, rows: int) -> Any:
    """The converter left rows as PEFT had them; llama.cpp's own training has them as its base does."""
    if _template(foreign) not in place.architecture.turned or compat == "convert-lora-to-ggml":
        return None
    if name.startswith("layers.") and compat is None:
        return None
    if compat is None:
        why = "who wrote the file decides on the order of these rows, and it does not say"
        cure = "compat='convert-lora-to-ggml' if it was converted from PEFT, compat='finetune' if llama.cpp trained it"
        raise UsageError(why, where=name, cure=cure)
    return place.order(foreign, rows)


_OLD = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip


def _modern(name: str) -> str:
    """The name of today for one of before GGUF."""
    first, _, rest = name.partition(".")
    number, _, module = rest.partition(".")
    return f"blk.{number}.{_OLD[module]}" if first == "layers" and module in _OLD else name


def _of_one_rank(pairs: Pairs, place: _Place) -> Pairs:
    """The same pairs, with zeros so that the experts of one stack have one rank."""
    ranks: dict[str, int] = {}
    for target, update in pairs.items():
        foreign = place.foreign(target)
        ranks[foreign] = max(ranks.get(foreign, 0), rank_of(update))
    return {t: to_rank(u, ranks[place.foreign(t)]) if place.is_stack(place.foreign(t)) else u for t, u in pairs.items()}


def _exact_alpha(update: Pair) -> float | None:
    """The f32 that llama.cpp divides by the rank to exactly this scaling."""
    import numpy as np

    with np.errstate(over="ignore"):
        alpha = float(np.float32(update.scaling * rank_of(update)))
    return alpha if alpha and alpha / rank_of(update) == update.scaling else None


def _scaling(alpha: float, update: Pair) -> float:
    return alpha / rank_of(update)


def _values(hints: Mapping[str, Any], architecture: str, alpha: float) -> dict[str, Value]:
    read = {key: Value(kind, value) for key, kind, value in hints.get("values", ())}
    start = read or {
        ARCHITECTURE: Value("string", architecture), TYPE: Value("string", "adapter"), KIND: Value("string", "lora"),
    }  # fmt: skip
    told = ALPHA in start or alpha != hints.get("alpha")
    return {**start, ARCHITECTURE: Value("string", architecture), **({ALPHA: Value("f32", alpha)} if told else {})}


def _text(file: Gguf, key: str) -> str:
    value = file.values.get(key)
    if value is None or value.type != "string":
        raise Malformed("no such text", where=key, cure="This is no adapter of llama.cpp's")
    return str(value.value)


def _keys(foreign: str) -> list[str]:
    return [foreign + end for end in _SLOTS]


def _template(foreign: str) -> str:
    head, dot, rest = foreign.partition(".")
    return f"blk.{{n}}.{rest.partition('.')[2]}" if head == "blk" and dot else foreign


def _expert(path: str) -> int:
    return int(next(part for part in reversed(path.split(".")) if part.isdigit()))


_EXPERTS = "Give the base, train every expert, or write another format"
