"""Read and write litgpt's LoRA: `lit_model.pth.lora`, `hyperparameters.yaml` and `model_config.yaml` in a folder.

litgpt fuses q, k and v into one weight, in this order. The file has one A and one B for the fused weight: the
concatenated As and the concatenated Bs of the adapted parts (q, k or v).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, BaseRef, Foreign, Step, Target
from ..errors import (
    PASS_BASE,
    PASS_BASE_WITH_CONFIG,
    WRITE_AGAIN,
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    StorageError,
    Unsupported,
    UsageError,
)
from ..io.arrange import joined, part, zeros
from ..io.atomic import write_bytes
from ..io.inputs import decimal_number, read_input
from ..io.lazy import Lazy, as_lazy
from ..methods.lora import LoRA
from ..naming.heads import Heads, heads_of
from ..naming.tool_names import FLAGS, LITGPT_QKV, MLP, NameTable, is_litgpt, litgpt_parts, litgpt_table, without_prefix
from ._containers import LIMIT, dump_yaml, keys_of, load, load_yaml, make_folder, save
from ._format import Format
from ._kit import (
    Leftovers,
    Pairs,
    check_factors,
    grouped,
    in_order,
    is_finite,
    leftovers,
    of_one_alpha,
    rank_of,
    unfit,
    whole_number,
    whole_rank,
)

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ._kit import Pair, Slots

FORMAT = "litgpt"
TENSORS, SETTINGS, MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
_SLOTS = {".lora_A": "A", ".lora_B": "B"}
_FLAGS = tuple(f"lora_{name}" for name in ("query", "key", "value", "projection", "mlp", "head"))


@cache
def _qkv() -> NameTable:
    """Return a table that translates adapterkit's names of q, k and v to `WEIGHT.PART`.

    WEIGHT is litgpt's name of the fused weight, and PART is `query`, `key` or `value`.
    """
    return NameTable(
        {hub_path: f"transformer.h.{{n}}.{LITGPT_QKV}.{name}" for name, hub_path in litgpt_parts().items()}
    )


class LitgptHints(Leftovers, total=False):
    """The data that `Adapter.foreign` keeps from a litgpt checkpoint.

    It consists of the settings, the model config, the text of both files, and the heads as (query, kv, dim).
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    texts: dict[str, str]
    heads: tuple[int, int, int] | None


class Litgpt(Format):
    """litgpt's LoRA checkpoints."""

    url = "https://github.com/Lightning-AI/litgpt"
    description = "litgpt: lit_model.pth.lora with hyperparameters.yaml and model_config.yaml"
    models = "language"
    methods = frozenset({"lora"})
    owns = frozenset({TENSORS, SETTINGS, MODEL})

    def sniff(self, path: Path) -> bool:
        return is_litgpt(keys_of(path / TENSORS if path.is_dir() else path))

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        folder, file = (path, path / TENSORS) if path.is_dir() else (path.parent, path)
        texts = {name: _text(folder / name, needed=name == SETTINGS) for name in (SETTINGS, MODEL)}
        try:
            settings, model = (load_yaml(text.encode(), name) if text else {} for name, text in texts.items())
            tensors = load(file)
            updates = {t: (u,) for t, u in _decode(tensors, settings, model, base)}
        except AdapterkitError as error:
            raise error.at(path=path) from None
        heads = _heads(model, base) if any(LITGPT_QKV in key for key in tensors) else None
        data = {
            "order": list(tensors), "settings": settings, "model": model, "texts": texts,
            "heads": None if heads is None else [heads.query, heads.kv, heads.dim],
        }  # fmt: skip
        name = settings.get("checkpoint_dir")
        ref = BaseRef(str(name)) if name else None
        return Adapter(updates, ref, (Step("read", {"format": FORMAT}),), Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, LitgptHints)
        before = hints.get("settings", {})
        first = before.get("lora_alpha")
        alpha, pairs, lines = of_one_alpha(
            adapter, _why_not, format_name=FORMAT, on_loss=on_loss, first=first, one_rank=True
        )
        rank = rank_of(next(iter(pairs.values())))
        flags = {
            f"lora_{name}": any(_flag(target) == name for target in pairs)
            for name in (*litgpt_parts(), *FLAGS.values())
        }
        tensors = _LitgptWriter(
            pairs, flags, rank, _count(hints, base, pairs), _saved_heads(hints, base), _shapes(base)
        ).tensors()
        settings = {**before, "lora_r": rank, "lora_alpha": whole_number(alpha), **flags}
        _save(path, in_order(tensors, hints), {"lora_dropout": 0.0, **settings}, hints)
        return lines


def _decode(
    tensors: Mapping[str, Lazy], settings: Mapping[str, object], model: Mapping[str, object], base: Checkpoint | None
) -> Iterator[tuple[Target, LoRA]]:
    kind = model.get("mlp_class_name", MLP[0])
    if kind not in MLP:
        why = f"the model has an MLP of the class {kind}, whose module names are unknown"
        raise Unsupported(why, where=f"{MODEL}: mlp_class_name", cure=f"Known: {', '.join(MLP)}")
    rank = whole_rank(settings.get("lora_r"), f"{SETTINGS}: lora_r")
    alpha = is_finite(settings.get("lora_alpha"), f"{SETTINGS}: lora_alpha")
    if not alpha:
        raise Malformed("lora_alpha is 0, so the adapter would have no effect", where=SETTINGS, cure=WRITE_AGAIN)
    enabled = [name for name in litgpt_parts() if settings.get(f"lora_{name}")]
    for module, slots in grouped(tensors, _SLOTS, FORMAT).items():
        if module.endswith(LITGPT_QKV):
            yield from _split(module, slots, enabled, rank, alpha / rank, _heads(model, base))
            continue
        if module.endswith("attn.attn"):
            why = "q, k and v are ordered by groups of heads, as in litgpt before 0.5"
            raise Unsupported(why, where=module, cure="Load and save the checkpoint with a newer litgpt")
        hub_path = litgpt_table().back(module)
        if hub_path is None or check_factors(module, slots) != rank:
            raise Malformed(f"the module is unknown, or its rank is not {rank}", where=module, cure=WRITE_AGAIN)
        yield Target(hub_path), LoRA(**slots, scaling=alpha / rank)


def _split(
    module: str, slots: Slots, enabled: list[str], rank: int, scaling: float, heads: Heads
) -> Iterator[tuple[Target, LoRA]]:
    sizes = dict(zip(litgpt_parts(), heads.sizes, strict=True))
    A, B = slots["A"], slots["B"]
    rows = sum(sizes[name] for name in enabled)
    if len(A.shape) != 2 or A.shape[0] != rank * len(enabled) or B.shape != (rows, rank):
        why = (
            f"A is {list(A.shape)}, B is {list(B.shape)}; {SETTINGS} enables {' and '.join(enabled) or 'no part'} with "
            f"rank {rank}, so A must be [{rank * len(enabled)}, in] and B [{rows}, {rank}]"
        )
        raise ShapeMismatch(why, where=module, cure=f"Download the {SETTINGS} that belongs to this checkpoint")
    start = 0
    for index, name in enumerate(enabled):
        hub_path = _qkv().back(f"{module}.{name}")
        assert hub_path is not None
        one: Slots = {"A": part(A, index * rank, (index + 1) * rank), "B": part(B, start, start + sizes[name])}
        start += sizes[name]
        yield Target(hub_path), LoRA(**one, scaling=scaling)


class _LitgptWriter:
    """Encode pairs that all have the same rank and scaling.

    litgpt adapts a module either in all layers or in none. If the adapter lacks a pair for some layers, the file gets
    pairs of zeros there.
    """

    def __init__(
        self,
        pairs: Pairs,
        flags: Mapping[str, bool],
        rank: int,
        layers: int,
        heads: Heads | None,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.updates: dict[str, Any] = {
            next(filter(_named, without_prefix(target.path))): update for target, update in pairs.items()
        }
        self.flags, self.rank, self.layers, self.heads, self.shapes = flags, rank, layers, heads, shapes
        self.like = as_lazy(next(iter(pairs.values())).A)

    def tensors(self) -> dict[str, Lazy]:
        tensors: dict[str, Lazy] = {}
        for layer in range(self.layers):
            enabled = [name for name in litgpt_parts() if self.flags[f"lora_{name}"]]
            if enabled:
                tensors |= _named_pair(f"transformer.h.{layer}.{LITGPT_QKV}", *self.fused(layer, enabled))
            for end, flag in FLAGS.items():
                if end != "lm_head" and self.flags[f"lora_{flag}"]:
                    tensors |= self.plain(f"transformer.h.{layer}.{end}")
        return tensors | (self.plain("lm_head") if self.flags["lora_head"] else {})

    def fused(self, layer: int, enabled: list[str]) -> tuple[Lazy, Lazy]:
        updates_of_parts = [self.updates.get(litgpt_parts()[name].replace("{n}", str(layer))) for name in enabled]
        # Read the input size from an update of q, k or v; at least one layer has such an update. An update of another
        # module may have another input size. For example, the last module of the MLP has larger inputs.
        names = {_below(litgpt_parts()[name]) for name in enabled}
        width = next(update.A.shape[1] for path, update in self.updates.items() if _below(path) in names)
        sizes = dict(zip(litgpt_parts(), self.heads.sizes, strict=True)) if self.heads else {}
        pairs = []
        for name, update in zip(enabled, updates_of_parts, strict=True):
            if update is None and not sizes:
                why = f"layer {layer} has no update for {name}; the shape of its zeros depends on the base's heads"
                raise UsageError(why, where=LITGPT_QKV, cure=PASS_BASE_WITH_CONFIG)
            pairs.append(self.zero(sizes[name], width) if update is None else (as_lazy(update.A), as_lazy(update.B)))
        return joined([A for A, _ in pairs]), joined([B for _, B in pairs])

    def plain(self, foreign: str) -> dict[str, Lazy]:
        hub_path = str(litgpt_table().back(foreign))
        if hub_path in self.updates:
            return _named_pair(foreign, as_lazy(self.updates[hub_path].A), as_lazy(self.updates[hub_path].B))
        alike = (u for path, u in self.updates.items() if _below(path) == _below(hub_path))
        like = next(((u.B.shape[0], u.A.shape[1]) for u in alike), self.shapes.get(hub_path))
        if like is None:
            why = "litgpt needs a pair of zeros for this module, and only the base shows the module's shape"
            raise UsageError(why, where=foreign, cure=PASS_BASE)
        return _named_pair(foreign, *self.zero(*like))

    def zero(self, out: int, in_: int) -> tuple[Lazy, Lazy]:
        return zeros((self.rank, in_), self.like.dtype), zeros((out, self.rank), self.like.dtype)


def _below(hub_path: str) -> str:
    """Return a module's name relative to its layer."""
    return hub_path.partition("layers.")[2].partition(".")[2] or hub_path


def _shapes(base: Checkpoint | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's matrices by module name. The names have no prefix such as `language_model.`."""
    tensors = {} if base is None else base.tensors
    shapes = {name.removesuffix(".weight"): leaf.shape for name, leaf in tensors.items() if len(leaf.shape) == 2}
    return {bare: shape for name, shape in shapes.items() for bare in without_prefix(name)}


def _named_pair(module: str, A: Lazy, B: Lazy) -> dict[str, Lazy]:
    return {f"{module}.lora_A": A, f"{module}.lora_B": B}


def _named(path: str) -> str | None:
    return _qkv().there(path) or litgpt_table().there(path)


def _flag(target: Target) -> str:
    """Return the name of the setting that enables LoRA in the target's module, such as `query` or `mlp`.

    The name is returned without its prefix `lora_`.
    """
    foreign = next(filter(None, map(_named, without_prefix(target.path))))
    if f".{LITGPT_QKV}." in foreign:
        return foreign.rpartition(".")[2]
    return next(flag for end, flag in FLAGS.items() if foreign == end or foreign.endswith(f".{end}"))


def _why_not(target: Target, update: Pair) -> str:
    if not any(map(_named, without_prefix(target.path))):
        return "its module has no name in litgpt"
    return unfit(target, update)


def _heads(model: Mapping[str, object], base: Checkpoint | None) -> Heads:
    if "n_head" not in model:
        return heads_of(None if base is None else base.config, f"{MODEL}: n_head")
    groups = model.get("n_query_groups") or model["n_head"]
    config = {"num_attention_heads": model["n_head"], "num_key_value_heads": groups, "hidden_size": model.get("n_embd")}
    return heads_of({**config, "head_dim": model.get("head_size")}, f"{MODEL}: n_head")


def _saved_heads(hints: LitgptHints, base: Checkpoint | None) -> Heads | None:
    if base is not None and base.config is not None:
        return heads_of(base.config, "config.json")
    kept = hints.get("heads")
    return Heads(*kept) if kept else None


def _count(hints: LitgptHints, base: Checkpoint | None, pairs: Pairs) -> int:
    """Return the config's number of layers, or the adapter's largest layer index plus one if that is larger."""
    stated = ((None if base is None else base.config) or {}).get("num_hidden_layers") or hints.get("model", {}).get(
        "n_layer"
    )
    numbers = (decimal_number(word) for target in pairs for word in target.path.split("."))
    seen = [number for number in numbers if number is not None]
    return max(stated if type(stated) is int else 0, max(seen, default=-1) + 1)


def _text(path: Path, *, needed: bool) -> str:
    """Read the text of a settings file. If the file is missing and not `needed`, return an empty string."""
    if not path.exists():
        if needed:
            cure = "Download the file, because it states the rank, the alpha and the adapted modules"
            raise StorageError("the file is missing", path=path, cure=cure)
        return ""
    try:
        return read_input(path, LIMIT).decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("the file is not valid UTF-8", path=path, cure=WRITE_AGAIN) from None


def _save(path: Path, tensors: Mapping[str, Lazy], settings: Mapping[str, object], hints: LitgptHints) -> None:
    """Write the folder. The settings are written last, so that readers reject the folder after an interruption."""
    folder, file = (path.parent, path) if path.name.endswith(".lora") else (path, path / TENSORS)
    make_folder(folder)
    save(file, tensors, "model")
    texts = hints.get("texts", {})
    if model := hints.get("model"):
        write_bytes(folder / MODEL, dump_yaml(model, texts.get(MODEL, "")))
    write_bytes(folder / SETTINGS, dump_yaml(settings, texts.get(SETTINGS, "")))
