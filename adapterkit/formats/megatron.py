"""Read and write LoRA of Megatron-Bridge and NeMo 2: a state dict, and `megatron.json` with alpha next to it.

The state dict is a torch or safetensors file. Plain LoRA has one pair (A, B) for a fused weight; canonical LoRA has a
pair for each part of the weight. The reader needs a single file. If each process of a distributed training saved its
own file, merge these files first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import (
    PASS_BASE_WITH_CONFIG,
    USE_ITS_BASE,
    WRITE_AGAIN,
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    TargetNotFound,
    UsageError,
)
from ..io.arrange import equal
from ..io.lazy import Lazy, as_lazy
from ..methods.lora import LoRA
from ..naming.heads import Heads, by_group, undone
from ..naming.tool_names import LAYER, LAYER_PATH, QKV, bridge, modules_of
from ._containers import keys_of, load, read_settings, save, write_settings
from ._format import Format
from ._kit import (
    Leftovers,
    Pairs,
    check_factors,
    grouped,
    in_order,
    in_row_order,
    leftovers,
    of_one_alpha,
    of_rows,
    over_rows,
    unfit,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._kit import Pair


# Convert LoRA in Megatron's layout. Plain LoRA has one pair (A, B) for each fused weight. Canonical LoRA has one pair
# for each part of a fused weight.


SLOTS = {".linear_in.weight": "A", ".linear_out.weight": "B"}
Modules = Mapping[str, tuple[str, ...]]


def is_of(keys: list[str], modules: Modules) -> bool:
    """Whether at least one key names the A or B of a module in `modules`."""
    ends = tuple(module + end for module in modules for end in SLOTS)
    return any(key.endswith(ends) for key in keys)


def decode(
    tensors: Mapping[str, Lazy], modules: Modules, alpha: float, heads: Callable[[], Heads], base: Checkpoint | None
) -> tuple[dict[Target, tuple[Pair, ...]], dict[str, JsonValue]]:
    """Return the updates, and a dict that the reader stores in `adapter.foreign` for the writer.

    The dict describes the source file. It has the fields `prefix` (the start of the module names, such as
    `decoder.layers.`), `order` (the keys in the file's order) and `fused` (whether any pair adapts a fused weight).

    Raises:
        Malformed: a key belongs to no module in `modules`, or two pairs adapt the same weight.
        ShapeMismatch: A and B do not fit each other, or the rows of B cannot be split into the fused weight's parts.
        TargetNotFound: for a module name in the file, the base has no module, or several modules.
    """
    names_of_base = _BaseNames(base)
    updates: dict[Target, tuple[Pair, ...]] = {}
    prefix, fused = "", False
    for name, slots in grouped(tensors, SLOTS, "Megatron").items():
        match = LAYER.fullmatch(name)
        if match is None or match["module"] not in modules:
            raise Malformed("adapterkit does not know this module of Megatron", where=name, cure=WRITE_AGAIN)
        prefix, weights = match["prefix"], modules[match["module"]]
        fused = fused or len(weights) > 1
        update = LoRA(**slots, scaling=alpha / check_factors(name, slots))
        for weight, part in zip(weights, _split(name, update, weights, heads), strict=True):
            target = Target(names_of_base.named(f"model.layers.{match['n']}.{weight}"))
            if target in updates:
                raise Malformed(f"two modules in the file adapt {target}", where=name, cure=WRITE_AGAIN)
            updates[target] = (part,)
    return updates, {"prefix": prefix, "fused": fused, "order": list(tensors)}


def _split(name: str, update: LoRA, weights: tuple[str, ...], heads: Callable[[], Heads]) -> Iterator[Pair]:
    out = update.B.shape[0]
    if len(weights) == 1:
        yield update
        return
    sizes = heads().sizes if weights == QKV else (out // 2, out - out // 2)
    if sum(sizes) != out or (weights != QKV and out % 2):
        why = f"B has {out} rows, which cannot be split into {' and '.join(weights)}"
        raise ShapeMismatch(why, where=name, cure=USE_ITS_BASE)
    whole: Pair = update
    if weights == QKV:
        whole = in_row_order(update, lambda: undone(by_group(heads())))
    start = 0
    for size in sizes:
        yield of_rows(whole, start, start + size)
        start += size


def why_not(modules: Modules) -> Callable[[Target, Pair], str]:
    """Return a function that checks whether LoRA on `modules` can express an update; `expressible` calls the function.

    The function returns the reason why LoRA cannot express the update, or an empty string if LoRA can express it.
    """
    known = {weight for weights in modules.values() for weight in weights}

    def why(target: Target, update: Pair) -> str:
        match = LAYER_PATH.fullmatch(target.path)
        if match is None or match["module"] not in known:
            return "LoRA of Megatron has no module for this weight"
        return unfit(target, update)

    return why


def encode(
    pairs: Pairs, modules: Modules, prefix: str, heads: Callable[[], Heads], fused: bool | None
) -> tuple[dict[str, Lazy], bool]:
    """Return the tensors by key, and whether each fused weight has a single pair.

    A fused weight can have a single pair only if the pairs of all its parts have the same A and scaling. If any fused
    weight cannot have a single pair, or if `fused` is false, each part of each fused weight gets its own pair.
    """
    if LAYER.fullmatch(f"{prefix}0.x") is None:
        why = f"the stored data of the Megatron file is damaged: the prefix of the module names is {prefix!r}"
        raise Malformed(why, cure="Remove the data: adapter.replace(foreign=None)")
    layers = _by_layer(pairs)
    groups = [weights for weights in modules.values() if len(weights) > 1]
    possible = all(_fits(slots, weights) for slots in layers.values() for weights in groups)
    fuse = possible if fused is None else possible and fused
    tensors: dict[str, Lazy] = {}
    for layer, slots in layers.items():
        for module, weights in modules.items():
            single = len(weights) == 1
            in_group = single and any(weights[0] in group for group in groups)
            if not all(weight in slots for weight in weights) or (in_group if fuse else not single):
                continue
            update = slots[weights[0]] if single else _joined([slots[weight] for weight in weights], weights, heads)
            for end, field in SLOTS.items():
                tensors[f"{prefix}{layer}.{module}{end}"] = as_lazy(update.tensors[field])
    return tensors, fuse


def _joined(updates: list[Pair], weights: tuple[str, ...], heads: Callable[[], Heads]) -> Pair:
    whole = over_rows(updates)
    if weights != QKV:
        return whole
    if sum(heads().sizes) != whole.B.shape[0]:
        why = f"q, k and v together have {whole.B.shape[0]} outputs, but the base's heads have {sum(heads().sizes)}"
        raise ShapeMismatch(why, where="linear_qkv", cure=USE_ITS_BASE)
    return in_row_order(whole, lambda: by_group(heads()))


def _by_layer(pairs: Pairs) -> dict[int, dict[str, Pair]]:
    layers: dict[int, dict[str, Pair]] = {}
    for target, update in pairs.items():
        match = LAYER_PATH.fullmatch(target.path)
        assert match is not None
        layers.setdefault(int(match["n"]), {})[match["module"]] = update
    return layers


def _fits(slots: Mapping[str, Pair], weights: tuple[str, ...]) -> bool:
    """Whether the pairs of a fused weight's parts can be joined into one pair. True if none of the parts has a pair."""
    updates = [slots[weight] for weight in weights if weight in slots]
    if not updates:
        return True
    first = updates[0]
    return len(updates) == len(weights) and all(
        u.scaling == first.scaling and equal(as_lazy(u.A), as_lazy(first.A)) for u in updates[1:]
    )


class _BaseNames:
    """Translates module names to the base's names, which may have another prefix. Without a base, keeps the names."""

    def __init__(self, base: Checkpoint | None) -> None:
        self.modules: dict[str, list[str]] | None = None
        if base is not None:
            self.modules = {}
            for name in dict.fromkeys(modules_of(base.tensors)):
                match = LAYER_PATH.fullmatch(name)
                if match is not None:
                    self.modules.setdefault(f"model.layers.{match['n']}.{match['module']}", []).append(name)

    def named(self, name: str) -> str:
        if self.modules is None:
            return name
        names_here = self.modules.get(name, [])
        if len(names_here) != 1:
            why = f"exactly one module must have this name, but the base has {len(names_here)}"
            raise TargetNotFound(why, where=name, cure=USE_ITS_BASE)
        return names_here[0]


def heads_again(kept: tuple[int, int, int] | None, base: Checkpoint | None, where: str) -> Callable[[], Heads]:
    """Return a function that returns the numbers of attention heads and their size, as a `Heads`.

    The function reads them from the base's config. Without a base, it returns `kept`, which is (number of query heads,
    number of key-value heads, size of a head). If there is neither a base nor `kept`, it raises UsageError.
    """
    from ..naming.heads import heads_of

    def heads() -> Heads:
        if base is None and kept:
            return Heads(*kept)
        if base is None:
            why = "the order of this weight's rows depends on how many attention heads the base has"
            raise UsageError(why, where=where, cure=PASS_BASE_WITH_CONFIG)
        return heads_of(base.config, where)

    return heads


# The format.


FORMAT = "megatron"
SETTINGS = "megatron.json"
PREFIX = "decoder.layers."


class MegatronHints(Leftovers, total=False):
    """The data that the reader keeps for the writer.

    `prefix` is the prefix of the module names. `fused` is true if any pair adapts a fused weight. `heads` is (number of
    query heads, number of key-value heads, size of a head).
    """

    prefix: str
    fused: bool
    heads: tuple[int, int, int]
    alpha: float


class Megatron(Format):
    """Megatron-Bridge's LoRA and canonical LoRA."""

    url = "https://github.com/NVIDIA-NeMo/Megatron-Bridge"
    description = "Megatron-Bridge and NeMo 2: a state dict with adapter.linear_in and linear_out, with megatron.json"
    models = "language"
    file = "adapter.pt"
    methods = frozenset({"lora"})
    owns = frozenset({SETTINGS})

    def sniff(self, path: Path) -> bool:
        return is_of(keys_of(path), bridge())

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        alpha = float(read_settings(path.with_name(SETTINGS), ("alpha",), '{"alpha": <alpha>}')["alpha"])
        heads = heads_again(None, base, "linear_qkv")
        try:
            updates, data = decode(load(path), bridge(), alpha, heads, base)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        if data["fused"] and base is not None and base.config is not None:
            sizes = heads()
            data["heads"] = [sizes.query, sizes.kv, sizes.dim]
        data["alpha"] = alpha
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, MegatronHints)
        alpha, pairs, lines = of_one_alpha(
            adapter, why_not(bridge()), format_name="Megatron", on_loss=on_loss, first=hints.get("alpha"), one_rank=True
        )
        heads = heads_again(hints.get("heads"), base, "linear_qkv")
        tensors, _ = encode(pairs, bridge(), hints.get("prefix", PREFIX), heads, hints.get("fused"))
        save(path, in_order(tensors, hints))
        write_settings(path.with_name(SETTINGS), {"alpha": alpha})
        return lines
