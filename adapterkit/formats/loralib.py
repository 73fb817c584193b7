"""Read and write loralib's checkpoints: a torch file with `lora_A` and `lora_B`, and `loralib.json` next to it.

For an embedding, the change of the weight is the transpose of `B @ A`.

The outputs of a `MergedLinear` consist of blocks of equal size, some of which are adapted. The factors of all adapted
blocks are stored in one A and one B. The torch file shows neither the number of blocks nor which blocks are adapted. So
`loralib.json` contains not only alpha, but also the list `enable_lora`, with one flag for each block.

For a `Conv2d`, A is `[r * k, in * k]` and B is `[out * k, r * k]`. loralib reshapes `B @ A` to `[out, in, k, k]`. The
reader converts A and B to an equivalent LoRA of rank `r * k * k`.

`lora_state_dict` with `bias="all"` or `bias="lora_only"` also stores trained biases. They replace the base's biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import PASS_BASE, WRITE_AGAIN, AdapterkitError, Malformed, ShapeMismatch, Unrepresentable, UsageError
from ..io.arrange import joined, part
from ..io.lazy import Lazy, as_lazy
from ..methods.lora import LoRA
from ..methods.replacement import Replacement
from ..naming.tool_names import is_litgpt
from ._containers import keys_of, load, read_settings, save, write_settings
from ._format import Format
from ._kit import (
    Leftovers,
    Pairs,
    check_factors,
    grouped,
    in_order,
    leftovers,
    of_one_alpha,
    rank_of,
    stored_layout,
    unfit,
)

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Array
    from ..io.strict_json import JsonValue
    from ._kit import Pair, Slots

FORMAT = "loralib"
SETTINGS = "loralib.json"
_EXAMPLE = '{"alpha": <lora_alpha>}, with "enable_lora": [true, false, true] if the model has a MergedLinear'
_SLOTS = {".lora_A": "A", ".lora_B": "B"}
_BIAS = ".bias"
_CONVOLUTION = ".conv"
"""The module inside loralib's `Conv2d` that has the weight and the bias; the factors belong to the `Conv2d` itself."""
_OTHERS = (".parametrizations.", ".loras.")
"""Substrings of keys from other tools, such as minLoRA. These keys have the same endings as loralib's keys."""


class LoralibSettings(TypedDict, total=False):
    """The contents of `loralib.json`: alpha, and a list of flags that mark the adapted blocks of a `MergedLinear`."""

    alpha: float
    enable_lora: list[bool]


class LoralibHints(Leftovers, total=False):
    """The data that `Adapter.foreign` keeps from a loralib checkpoint: the contents of `loralib.json`."""

    settings: LoralibSettings


class LoraLib(Format):
    """State dicts from `loralib.lora_state_dict`."""

    url = "https://github.com/microsoft/LoRA"
    description = "loralib: a torch file from lora_state_dict, with loralib.json"
    file = "lora.pt"
    methods = frozenset({"lora"})
    owns = frozenset({SETTINGS})

    def sniff(self, path: Path) -> bool:
        keys = keys_of(path) if path.suffix != ".safetensors" else []
        is_loralib = all(
            key.endswith((*_SLOTS, _BIAS)) and not any(word in key for word in _OTHERS) for key in keys
        ) and any(key.endswith(tuple(_SLOTS)) for key in keys)
        return is_loralib and not is_litgpt(keys)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        settings = read_settings(path.with_name(SETTINGS), ("alpha", "enable_lora"), _EXAMPLE)
        try:
            tensors = load(path)
            biases = {key: leaf for key, leaf in tensors.items() if key.endswith(_BIAS)}
            factors = {key: leaf for key, leaf in tensors.items() if key not in biases}
            updates: dict[Target, tuple[Update, ...]] = {
                t: (u,) for t, u in _decode(factors, cast(LoralibSettings, settings), base)
            }
            for target, bias in _biases(biases, {t.path: t for t in updates if t.rows is None}):
                updates[target] = (*updates.get(target, ()), bias)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        data: dict[str, JsonValue] = {"order": list(tensors), "settings": settings}
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, LoralibHints)
        read = hints.get("settings", {})
        biases = {
            f"{target.path}{_BIAS}": as_lazy(update.bias)
            for target, update in adapter
            if isinstance(update, Replacement) and _is_bias(target, update) and update.bias is not None
        }
        adapter = adapter.replace(
            updates={
                target: left
                for target, group in adapter.updates.items()
                if (left := tuple(update for update in group if not _is_bias(target, update)))
            }
        )
        alpha, pairs, lines = of_one_alpha(
            adapter, _why_not, format_name=FORMAT, on_loss=on_loss, first=read.get("alpha")
        )
        tensors, enabled = _spelled(pairs, read.get("enable_lora"), base)
        settings = {"alpha": alpha} | ({} if enabled is None else {"enable_lora": enabled})
        save(path, in_order(tensors | biases, hints))
        write_settings(path.with_name(SETTINGS), settings)
        return lines


def _biases(biases: Mapping[str, Lazy], adapted: Mapping[str, Target]) -> Iterator[tuple[Target, Replacement]]:
    """Yield the trained biases. `adapted` contains the targets of whole weights, by path."""
    for key, leaf in biases.items():
        path = key.removesuffix(_BIAS)
        if path not in adapted and path.removesuffix(_CONVOLUTION) in adapted:
            path = path.removesuffix(_CONVOLUTION)
        if not path or len(leaf.shape) != 1 or not leaf.dtype.floating:
            raise Malformed(
                f"this is not a bias; it has the shape {list(leaf.shape)} and the dtype {leaf.dtype}",
                where=key,
                cure=WRITE_AGAIN,
            )
        yield adapted.get(path, Target(path)), Replacement(weight=None, bias=cast(Any, leaf))


def _is_bias(target: Target, update: Update) -> bool:
    return isinstance(update, Replacement) and update.weight is None and target.rows is None and not target.stacked


def _decode(
    tensors: Mapping[str, Lazy], settings: LoralibSettings, base: Checkpoint | None
) -> Iterator[tuple[Target, LoRA]]:
    enabled, alpha = settings.get("enable_lora"), settings.get("alpha", 0.0)  # `read_settings` requires an alpha.
    if enabled is not None and not (isinstance(enabled, list) and all(type(flag) is bool for flag in enabled)):
        raise Malformed(
            f"enable_lora is {enabled!r}, not a list of true and false", where=SETTINGS, cure=f"Write {_EXAMPLE}"
        )
    for path, slots in grouped(tensors, _SLOTS, FORMAT).items():
        weight = None if base is None else base.tensors.get(f"{path}.weight")
        inner = None if base is None else base.tensors.get(f"{path}{_CONVOLUTION}.weight")
        if weight is None and inner is not None and len(inner.shape) == 4:
            # The base was saved from a model with loralib's layers.
            yield Target(path + _CONVOLUTION), _convolution(path, slots, alpha, inner.shape)
        elif weight is not None and len(weight.shape) == 4:
            yield Target(path), _convolution(path, slots, alpha, weight.shape)
        elif slots["A"].shape[:1] != slots["B"].shape[1:2] or _alone(path, slots, enabled, weight):
            yield from _merged(path, slots, alpha, enabled, base)
        else:
            update = LoRA(**slots, scaling=alpha / check_factors(path, slots))
            yield Target(path, stored_layout(path, update, base)), update


def _alone(path: str, slots: Slots, enabled: list[bool] | None, weight: Lazy | None) -> bool:
    """Whether the pair adapts a single block of a MergedLinear. False if the pair adapts a whole weight.

    Raises:
        UsageError: the answer depends on the shape of the base's weight, and no base is given.
    """
    if enabled is None or sum(enabled) != 1 or len(enabled) == 1:
        return False
    if weight is None:
        why = "only the base shows whether lora_A and lora_B adapt a whole layer or one block of a MergedLinear"
        raise UsageError(why, where=path, cure=PASS_BASE)
    return slots["B"].shape[0] * len(enabled) in weight.shape


def _merged(
    path: str, slots: Slots, alpha: float, enabled: list[bool] | None, base: Checkpoint | None
) -> Iterator[tuple[Target, LoRA]]:
    A, B = slots["A"], slots["B"]
    if len(A.shape) != 2 or len(B.shape) != 2 or not B.shape[1] or A.shape[0] % B.shape[1]:
        raise ShapeMismatch(
            f"A {list(A.shape)} and B {list(B.shape)} do not fit each other", where=path, cure=WRITE_AGAIN
        )
    if enabled is None:
        why = "the tensors of this MergedLinear do not show which blocks of its outputs are adapted"
        raise UsageError(why, where=path, cure=f"Write {SETTINGS}: {_EXAMPLE}")
    rank, count = B.shape[1], A.shape[0] // B.shape[1]
    if count != sum(enabled) or B.shape[0] % count:
        why = (
            f"A and B have the factors of {count} blocks, and enable_lora is true for {sum(enabled)} blocks; the two "
            f"numbers must be equal, and the {B.shape[0]} rows of B must split into blocks of equal size"
        )
        raise ShapeMismatch(why, where=path, cure=f"Correct {SETTINGS}")
    size, positions = B.shape[0] // count, [index for index, flag in enumerate(enabled) if flag]
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    in_out = weight is not None and weight.shape == (A.shape[1], size * len(enabled))
    for index, position in enumerate(positions):
        rows = (position * size, (position + 1) * size)
        one: Slots = {"A": part(A, index * rank, (index + 1) * rank), "B": part(B, index * size, (index + 1) * size)}
        yield Target(path, "in out *k" if in_out else "out *in", rows), LoRA(**one, scaling=alpha / rank)


def _convolution(path: str, slots: Slots, alpha: float, shape: tuple[int, ...]) -> LoRA:
    """Decode the pair of a Conv2d whose weight has the shape `shape`, `[out, in, k, k]`.

    loralib reshapes `B @ A` from `[out * k, in * k]` to the weight's shape. So each output has k consecutive rows of
    `B @ A`. Joined end to end, these rows are the output's `in * k * k` values.
    """
    out, in_, k, _ = shape
    A, B = slots["A"], slots["B"]
    rank = A.shape[0] // k
    if A.shape != (rank * k, in_ * k) or B.shape != (out * k, rank * k) or not rank or shape[3] != k:
        why = (
            f"A is {list(A.shape)}, B is {list(B.shape)}, and the base's weight is {list(shape)}; for a square kernel, "
            f"A must be [r * {k}, {in_ * k}], and B must be [{out * k}, r * {k}]"
        )
        raise ShapeMismatch(why, where=path, cure=WRITE_AGAIN)
    whole = A.map(lambda a: _kron(k, a), (k * rank * k, in_, k, k))
    wide: Slots = {"A": whole, "B": B.reshape(out, k * rank * k)}
    return LoRA(**wide, scaling=alpha / rank)


def _kron(k: int, A: Array) -> Array:
    import numpy as np

    whole = np.zeros((k, A.shape[0], k, A.shape[1]), A.dtype)
    for index in range(k):
        whole[index, :, index] = A
    return whole.reshape(k * A.shape[0], k * A.shape[1])


def _why_not(target: Target, update: Pair) -> str:
    return unfit(Target(target.path, target.layout), update)


def _spelled(
    pairs: Pairs, enabled: list[bool] | None, base: Checkpoint | None
) -> tuple[dict[str, Lazy], list[bool] | None]:
    tensors: dict[str, Lazy] = {}
    slices: dict[str, list[tuple[tuple[int, int], Pair]]] = {}
    for target, update in pairs.items():
        if target.rows is None:
            tensors |= {f"{target.path}.lora_{field}": as_lazy(update.tensors[field]) for field in "AB"}
        else:
            slices.setdefault(target.path, []).append((target.rows, update))
    for path, group in slices.items():
        group.sort(key=lambda item: item[0])
        enabled = _enabled(path, group, enabled, base)
        rank = {rank_of(update) for _, update in group}
        if len(rank) > 1:
            raise Unrepresentable(
                "all blocks of a MergedLinear must have the same rank", items=[path], cure="Write another format"
            )
        tensors |= {f"{path}.lora_{field}": joined([as_lazy(u.tensors[field]) for _, u in group]) for field in "AB"}
    return tensors, enabled


def _enabled(
    path: str, group: list[tuple[tuple[int, int], Pair]], enabled: list[bool] | None, base: Checkpoint | None
) -> list[bool]:
    """Return `enable_lora` for `loralib.json`: one flag for each block of the weight's outputs, true if it is adapted.

    `loralib.json` has only one list for all weights. So if the list `enabled` is given, it must match this weight: the
    flags of adapted blocks must be true, and all other flags must be false.
    """
    size = group[0][0][1] - group[0][0][0]
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    if enabled is None and weight is not None:
        width = group[0][1].A.shape[1]
        out = weight.shape[1] if weight.shape[0] == width else weight.shape[0]
        starts = range(0, out, size) if out % size == 0 else ()
        enabled = [any(rows[0] == start for rows, _ in group) for start in starts]
    if enabled is None:
        why = "only the base shows how many blocks of outputs this MergedLinear has"
        raise UsageError(why, where=path, cure=PASS_BASE)
    if [rows for rows, _ in group] != [(i * size, (i + 1) * size) for i, flag in enumerate(enabled) if flag]:
        items = [f"{path}: rows {', '.join(f'{a} to {b}' for (a, b), _ in group)}"]
        raise Unrepresentable(
            f"{SETTINGS} has one enable_lora, so all weights must have the same adapted blocks, of equal size",
            items=items,
            cure="Write another format",
        )
    return enabled
