"""Read and write LoRA files of `olive convert-adapters`, whose factors are inputs of an ONNX graph.

Compared with PEFT, both factors are transposed, and B is already multiplied by the scaling. The file's suffix is
`.onnx_adapter`, `.npz` or `.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import AdapterkitError, Unsupported
from ..io import safetensors
from ..io.arrange import turned
from ..io.lazy import Lazy, as_lazy
from ..io.numpy_files import read_npz, write_npz
from ..io.ort_adapter import OrtAdapter, is_ort_adapter, read_ort_adapter, write_ort_adapter
from ..methods.lora import LoRA
from ._format import Format
from ._kit import (
    Leftovers,
    check_factors,
    expressible,
    grouped,
    in_order,
    leftovers,
    of_no_number,
    stored_layout,
    unfit,
)

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._kit import Pair, Slots

FORMAT = "olive"
_SLOTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_KEY = re.compile(r"model\.(?:\w+\.)+lora_[AB]\.(?:weight|quant\.(?:weight|scale|zero_point))")


class OliveHints(Leftovers, total=False):
    """The adapter's version and the model's version, as an `.onnx_adapter` file states them."""

    adapter_version: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
    model_version: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]


class Olive(Format):
    """Files from `olive convert-adapters`."""

    url = "https://microsoft.github.io/Olive/features/cli.html"
    description = "Olive: .onnx_adapter, .npz or .safetensors from convert-adapters; factors transposed, scaling in B"
    file = "adapter.onnx_adapter"
    methods = frozenset({"lora"})

    def sniff(self, path: Path) -> bool:
        if is_ort_adapter(path):
            return not path.with_name(path.name + ".json").exists() and has_olives_names(path)
        try:
            return path.suffix == ".npz" and path.is_file() and _all_olives(read_npz(path))
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            tensors, versions = _load(path)
            quantized = next((key for key in tensors if ".quant." in key), None)
            if quantized is not None:
                why = "the factors are quantized, so their values were rounded when the file was written"
                raise Unsupported(why, where=quantized, cure="Convert the adapter again, without quantization")
            updates: dict[Target, tuple[LoRA, ...]] = {}
            for name, slots in grouped(tensors, _SLOTS, "Olive").items():
                factors: Slots = {f: turned(leaf) if len(leaf.shape) == 2 else leaf for f, leaf in slots.items()}
                check_factors(name, factors)
                update = LoRA(**factors)
                updates[Target(name, stored_layout(name, update, base))] = (update,)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        data: dict[str, JsonValue] = {"order": list(tensors), **versions}
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, OliveHints)
        pairs, lines = expressible(adapter, "Olive", on_loss, _why_not)
        pairs, folded = of_no_number(pairs, format_name="Olive", on_loss=on_loss)
        tensors: dict[str, Lazy] = {}
        for target, update in pairs.items():
            tensors |= {target.path + end: turned(as_lazy(update.tensors[field])) for end, field in _SLOTS.items()}
        _save(path, in_order(tensors, hints), hints)
        return lines + folded


def has_olives_names(path: Path) -> bool:
    """Whether all values in an `.onnx_adapter` file have names in Olive's form, `model.<module>.lora_A.<...>`."""
    try:
        return _all_olives(read_ort_adapter(path).tensors)
    except AdapterkitError:
        return False


def _all_olives(tensors: Mapping[str, Lazy]) -> bool:
    return bool(tensors) and all(_KEY.fullmatch(key) for key in tensors)


def _load(path: Path) -> tuple[Mapping[str, Lazy], dict[str, int]]:
    if is_ort_adapter(path):
        file = read_ort_adapter(path)
        return file.tensors, {"adapter_version": file.adapter_version, "model_version": file.model_version}
    return (read_npz(path) if path.suffix == ".npz" else safetensors.read(path)), {}


def _save(path: Path, tensors: Mapping[str, Lazy], hints: OliveHints) -> None:
    if path.suffix == ".npz":
        write_npz(path, tensors)
    elif path.suffix == ".safetensors":
        safetensors.write(path, tensors, {})
    else:
        versions = (int(hints.get("adapter_version", 1)), int(hints.get("model_version", 1)))
        write_ort_adapter(path, OrtAdapter(tensors, *versions))


def _why_not(target: Target, update: Pair) -> str:
    if not _KEY.fullmatch(f"{target.path}.lora_A.weight"):
        return "the target's path must have the form model.<module>"
    return unfit(target, update)
