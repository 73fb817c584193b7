"""Read and write LoRA as TensorRT-LLM's two arrays, `model.lora_weights.npy` and `model.lora_config.npy`.

A row of the first array has A and B of one module, flattened and padded with zeros. B includes the scaling. The same
row of the second array has a number for the kind of module (1 for q, 2 for k, ...), the layer and the rank. The arrays
do not contain the modules' numbers of inputs and outputs, so reading needs the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import (
    PASS_BASE,
    USE_ITS_BASE,
    WRITE_AGAIN,
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    TargetNotFound,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from ..io.arrange import joined, padded, part, run, same_type
from ..io.inputs import is_npy
from ..io.lazy import DTYPES, Lazy, as_lazy
from ..io.numpy_files import read_npy, write_npy
from ..methods.lora import LoRA
from ..naming.architectures import namings_of
from ..naming.tool_names import LAYER_PATH, modules_of
from ._containers import folder_of, make_folder
from ._format import Format
from ._kit import Leftovers, Pairs, expressible, leftovers, of_no_number, rank_of, unfit

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._kit import Pair, Slots

FORMAT = "tensorrt_llm"
WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"
_REAL = ("F16", "BF16", "F32")


class TensorRTHints(Leftovers, total=False):
    """The sizes and the order of the source file's arrays, kept for the writer.

    Attributes:
        columns: the number of columns of the config array: 3, or 4 with a flag for DoRA.
        width: the length of a row of the weight array.
        paths: the module path of each row.
    """

    columns: int
    width: Annotated[int, msgspec.Meta(ge=0, le=1 << 28)]
    paths: list[str]


class TensorRtLlm(Format):
    """Folders from TensorRT-LLM's hf_lora_convert.py."""

    url = "https://github.com/NVIDIA/TensorRT-LLM/blob/v0.12.0/examples/hf_lora_convert.py"
    description = "TensorRT-LLM: model.lora_weights.npy with model.lora_config.npy"
    models = "language"
    methods = frozenset({"lora"})
    owns = frozenset({WEIGHTS, CONFIG})

    def sniff(self, path: Path) -> bool:
        folder = folder_of(path)
        return (path.is_dir() or path.name in (WEIGHTS, CONFIG)) and all(is_npy(folder / n) for n in (WEIGHTS, CONFIG))

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        folder = folder_of(path)
        weights, config = read_npy(folder / WEIGHTS), read_npy(folder / CONFIG)
        try:
            rows = _rows(weights, config)
            if base is None:
                why = "the arrays do not contain the modules' numbers of inputs, so A and B cannot be separated"
                raise UsageError(why, where=CONFIG, cure=PASS_BASE)
            updates = {t: (u,) for t, u in _decode(weights, rows, base)}
        except AdapterkitError as error:
            raise error.at(path=path) from None
        if len(updates) != len(rows):
            raise Malformed("two rows belong to the same module", path=path, where=CONFIG, cure=WRITE_AGAIN)
        data: dict[str, JsonValue] = {
            "columns": config.shape[2],
            "width": weights.shape[2],
            "paths": [target.path for target in updates],
        }
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, TensorRTHints)
        pairs, lines = expressible(adapter, "TensorRT-LLM", on_loss, _why_not)
        pairs, folded = of_no_number(pairs, format_name="TensorRT-LLM", on_loss=on_loss)
        order = {path: position for position, path in enumerate(hints.get("paths", ()))}
        pairs = dict(sorted(pairs.items(), key=lambda item: order.get(item[0].path, len(order))))
        weights, config = _encode(pairs, hints)
        make_folder(path)
        write_npy(path / WEIGHTS, weights)
        # Write the config last, so that a folder from an interrupted write is not read as complete.
        write_npy(path / CONFIG, config)
        return lines + folded


def _rows(weights: Lazy, config: Lazy) -> list[tuple[int, int, int]]:
    """Return (number of the module's kind, layer, rank) for each row."""
    if weights.dtype.name not in _REAL or config.dtype.name != "I32":
        raise Unsupported(
            f"the weights must be F16, BF16 or F32, and the config I32; they are {weights.dtype} and {config.dtype}",
            where=WEIGHTS,
            cure=WRITE_AGAIN,
        )
    if len(weights.shape) != 3 or len(config.shape) != 3 or weights.shape[:2] != config.shape[:2]:
        why = (
            "both arrays must have three axes, and the sizes of the first two axes must be equal; "
            f"the shapes are {list(weights.shape)} and {list(config.shape)}"
        )
        raise ShapeMismatch(why, where=CONFIG, cure=WRITE_AGAIN)
    if config.shape[0] != 1 or config.shape[2] not in (3, 4) or not config.shape[1]:
        raise ShapeMismatch(
            f"the shape is {list(config.shape)}, but it must be [1, rows, 3 or 4]", where=CONFIG, cure=WRITE_AGAIN
        )
    rows: list[tuple[int, int, int]] = []
    for module, layer, rank, *dora in config.numpy()[0].tolist():
        where = f"{CONFIG}: row {len(rows)}"
        if any(dora):
            raise Unsupported(
                "this row is a DoRA, whose magnitude was divided by norms of the base", where=where, cure=_PEFT
            )
        if module not in modules():
            raise Unsupported(
                f"the module number {module} is unknown", where=where, cure=f"Known: {', '.join(map(str, modules()))}"
            )
        if layer < 0 or rank < 1:
            raise Malformed(
                f"the layer must be at least 0, and the rank at least 1; they are {layer} and {rank}",
                where=where,
                cure=WRITE_AGAIN,
            )
        rows.append((module, layer, rank))
    return rows


def _decode(weights: Lazy, rows: list[tuple[int, int, int]], base: Checkpoint) -> Iterator[tuple[Target, LoRA]]:
    places = _places(base)
    for position, (module, layer, rank) in enumerate(rows):
        where = f"row {position}: module {module}, layer {layer}"
        path, fused = _place(places, module, layer, where)
        weight = base.tensors.get(f"{path}.weight")
        if weight is None or len(weight.shape) != 2:
            raise ShapeMismatch(
                "the base has no matrix with this name",
                where=path,
                cure=USE_ITS_BASE,
            )
        out, in_ = weight.shape
        if rank * (in_ + out) > weights.shape[2]:
            why = f"a row has {weights.shape[2]} values, too few for rank {rank} and a weight of shape {[out, in_]}"
            raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
        A, B = _factor(weights, position, 0, (rank, in_)), _factor(weights, position, rank * in_, (out, rank))
        slots: Slots = {"A": A, "B": _swapped(B) if fused else B}
        yield Target(path), LoRA(**slots)


def _places(base: Checkpoint) -> dict[tuple[str, int], list[str]]:
    """Return a map from (a module's name inside its layer, layer) to the paths of all such modules in the base."""
    places: dict[tuple[str, int], list[str]] = {}
    for name in dict.fromkeys(modules_of(base.tensors)):
        match = LAYER_PATH.fullmatch(name)
        if match is not None:
            places.setdefault((match["module"], int(match["n"])), []).append(name)
    return places


def _place(places: Mapping[tuple[str, int], list[str]], module: int, layer: int, where: str) -> tuple[str, bool]:
    names = [modules()[module], *([FUSED] if modules()[module] == "mlp.gate_proj" else [])]
    candidates = [(path, name == FUSED) for name in names for path in places.get((name, layer), [])]
    if len(candidates) != 1:
        why = f"exactly one module must have this name, but the base has {len(candidates)}"
        raise TargetNotFound(why, where=where, cure=USE_ITS_BASE)
    return candidates[0]


def _factor(weights: Lazy, row: int, start: int, shape: tuple[int, int]) -> Lazy:
    return run(weights, row * weights.shape[2] + start, shape)


def _swapped(B: Lazy) -> Lazy:
    """Swap the two halves of the outputs, gate and up, which TensorRT-LLM and the base store in opposite orders."""
    half = B.shape[0] // 2
    return joined([part(B, half, B.shape[0]), part(B, 0, half)])


def _encode(pairs: Pairs, hints: TensorRTHints) -> tuple[Lazy, Lazy]:
    flat = []
    records: list[int] = []
    for target, update in pairs.items():
        match = LAYER_PATH.fullmatch(target.path)
        assert match is not None
        module, layer = numbers()["mlp.gate_proj" if match["module"] == FUSED else match["module"]], int(match["n"])
        A, B = as_lazy(update.A), as_lazy(update.B)
        B = _swapped(B) if target.path.endswith(FUSED) else B
        A, B = same_type([A, B])
        flat.append(joined([A.reshape(-1), B.reshape(-1)]))
        records += [module, layer, rank_of(update), *([0] if hints.get("columns") == 4 else [])]
    width = max(int(hints.get("width", 0)), *(row.shape[0] for row in flat))
    rows = [padded(row, width, 0).reshape(1, 1, width) for row in same_type(flat)]
    if rows[0].dtype.name not in _REAL:
        items = [f"the factors have dtype {rows[0].dtype}"]
        raise Unrepresentable(
            "TensorRT-LLM stores only F16, BF16 and F32",
            items=items,
            cure="Convert the factors: adapterkit resize --rank R --dtype BF16",
        )
    weights = joined(rows, 1)
    config = (1, len(flat), len(records) // len(flat))
    return weights, Lazy(config, DTYPES["I32"], lambda: b"".join(n.to_bytes(4, "little") for n in records))


def _why_not(target: Target, update: Pair) -> str:
    match = LAYER_PATH.fullmatch(target.path)
    if target.stacked or ".experts." in target.path:
        return "these arrays cannot store experts; TensorRT-LLM reads experts from PEFT's folders: " + _EXPERTS
    if match is None or match["module"] not in (*numbers(), FUSED):
        return "TensorRT-LLM does not support LoRA on this module"
    return unfit(target, update)


_EXPERTS = "--to peft --profile tensorrt_llm (format='peft', profile='tensorrt_llm')"
_PEFT = "Pass the PEFT folder from which TensorRT-LLM's files were made"


# Define TensorRT-LLM's numbers for the kinds of modules that can have LoRA. TensorRT-LLM's names for these kinds are in
# spec/architectures/namings.
#
# Source: `LORA_MODULE_IDS` in tensorrt_llm/lora_manager.py.


NUMBERS = {
    "attn_qkv": 0, "attn_q": 1, "attn_k": 2, "attn_v": 3, "attn_dense": 4, "mlp_h_to_4h": 5, "mlp_4h_to_h": 6,
    "mlp_gate": 7,
}  # fmt: skip
"""A map from TensorRT-LLM's name for a kind of module, such as `attn_q`, to its number."""


@cache
def numbers() -> dict[str, int]:
    """Map our names of modules inside a layer, including `self_attn.qkv_proj`, to TensorRT-LLM's numbers."""
    places = namings_of("tensorrt_llm")[0].places()
    names = {key.rpartition("{n}.")[2]: place.name.rpartition("{n}.")[2] for key, place in places.items()}
    return {hub_path: NUMBERS[name] for hub_path, name in {"self_attn.qkv_proj": "attn_qkv", **names}.items()}


@cache
def modules() -> dict[int, str]:
    """Map TensorRT-LLM's numbers to our names of modules inside a layer."""
    return {number: name for name, number in numbers().items()}


FUSED = "mlp.gate_up_proj"
"""The module that fuses the gate projection and the up projection.

TensorRT-LLM gives this module the number of `mlp.gate_proj`, and stores the up projection before the gate projection.
"""
