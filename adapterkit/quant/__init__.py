"""Read quantized bases. Each quantization scheme has one module, which reads the weights that the scheme packed.

A packed weight consists of several stored tensors, such as codes and scales. It is offered as a lazy tensor, which
reads runs of rows and returns the same values as the scheme's own library. So a merge does not need to know how the
weight is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.registry import Registry
from ..errors import Malformed, Unsupported
from ..io.checkpoint import Checkpoint
from ._scheme import QUANTIZATION, Packed, Scheme, said_quantization

if TYPE_CHECKING:
    from ..io.lazy import Lazy
    from ..io.strict_json import JsonValue
    from ._calibration import Calibration

__all__ = [
    "SCHEMES",
    "Dequantized",
    "Packed",
    "Scheme",
    "config_file",
    "dequantized",
    "detect",
    "is_quantized",
    "said_method",
]

SCHEMES: Registry[type[Scheme]] = Registry("quantization scheme", __name__, "adapterkit.quant", Scheme)

SIDE_FILES = frozenset({"quantize_config.json", "quant_config.json", "hf_quant_config.json"})
"""Files next to a config that only describe packed weights."""

COMFYUI = "_quantization_metadata"
"""The header key under which ComfyUI's files may list each module's format."""

PLAIN = frozenset({"BF16", "F16", "F32", "F64"})
"""The dtypes of unquantized weights. If a base has only these dtypes, no scheme is imported."""


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized(Checkpoint):
    """A quantized base, as a checkpoint of dequantized weights.

    `tensors` and `home` list the weights, not the stored tensors.

    Attributes:
        scheme: the name of the scheme that packed the base.
        packed: a map from names of weights to packed weights.
        stored: the quantized base.
        packs: True if merged weights will be quantized again.
        keep: what to preserve when weights are quantized again: `adapter` for the adapters' change; None rounds to the
            nearest.
        calibration: the recorded inputs of the targets, used to round the weights; None to round without inputs.
    """

    scheme: str = ""
    packed: Mapping[str, Packed] = None  # type: ignore[assignment]
    stored: Checkpoint = None  # type: ignore[assignment]
    packs: bool = False
    keep: str | None = None
    calibration: Calibration | None = None

    @property
    def written(self) -> dict[str, Lazy]:
        """Return the tensors of the output, in which packed weights have their new sizes."""
        changed = {w.members[0]: w.written for w in self.packed.values() if w.changes}
        return {name: changed.get(name, tensor) for name, tensor in self.stored.tensors.items()}

    def unpacked_again(self, weight: Packed, parts: Mapping[str, Lazy]) -> Packed:
        """Return a packed weight that is read from new stored tensors instead of the base's."""
        own = weight.with_parts(parts)
        if own is not None:
            return own
        held = {name: parts.get(name, self.stored.tensors[name]) for name in weight.members}
        found = SCHEMES[self.scheme]().find(replace(self.stored, tensors=held))
        return next(other for other in found if other.name == weight.name)


def config_file(base: Checkpoint) -> Mapping[str, JsonValue] | None:
    """Return the config.json next to a base's weights; None for a GGUF file, whose config is built from key-values."""
    return base.stored.config if isinstance(base, Dequantized) and base.scheme == "gguf" else base.config


def said_method(base: Checkpoint) -> str | None:
    """Return the quantization method in the base's config, or None."""
    config = said_quantization(base.config)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    return method if isinstance(method, str) else "of some kind"


def is_quantized(base: Checkpoint) -> bool:
    """Whether the config names a quantization, or a scheme recognises the names and dtypes of the tensors."""
    if said_method(base) is not None:
        return True
    plain = all(tensor.dtype.name in PLAIN for tensor in base.tensors.values())
    return not plain and any(SCHEMES[name]().detect(base) for name in SCHEMES)


def detect(base: Checkpoint) -> str:
    """Return the name of the scheme that recognises the base by its headers and config.

    Raises:
        Unsupported: no scheme recognises the base, or several do.
    """
    found = [name for name in SCHEMES if SCHEMES[name]().detect(base)]
    if len(found) == 1:
        return found[0]
    method = said_method(base)
    why = (
        f"the scheme could be {' or '.join(found)}"
        if found
        else f"the base is quantized ({method}) by an unknown scheme"
    )
    raise Unsupported(why, path=base.root, cure=f"Known: {', '.join(SCHEMES)}. {ORIGINAL}")


ORIGINAL = "Or merge into the 16-bit weights that it was quantized from"


def dequantized(base: Checkpoint, *, packs: bool = False) -> Dequantized:
    """Return the base with all weights dequantized when they are read.

    Args:
        base: a quantized base.
        packs: True if merged weights will be quantized again.

    Raises:
        Unsupported: no scheme recognises the base, or several do.
        Malformed, ShapeMismatch: stored tensors of a packed weight are missing, damaged or do not fit together.
    """
    name = detect(base)
    packed = {weight.name: weight for weight in SCHEMES[name]().find(base)}
    whole: dict[str, list[Packed]] = {}
    for weight in packed.values():
        whole.setdefault(weight.members[0], []).append(weight)
    parts = {member for weight in packed.values() for member in weight.members}
    tensors: dict[str, Lazy] = {}
    home = dict(base.home)
    for stored, tensor in base.tensors.items():
        if stored not in whole and stored in parts:
            continue
        seen = {weight.name: weight.lazy() for weight in whole.get(stored, ())} or {stored: tensor}
        twice = next((named for named in seen if named in tensors), None)
        if twice is not None:
            raise Malformed(
                "the weight is stored twice, packed and plain", path=base.root, where=twice, cure="Remove one of them"
            )
        tensors |= seen
        if stored in base.home:
            home |= dict.fromkeys(seen, base.home[stored])
    metadata = base.metadata if packs else {file: _plain(said) for file, said in base.metadata.items()}
    config = SCHEMES[name]().config(base)
    config = config if packs or config is None else _without(config)
    return Dequantized(
        base.root, tensors, base.files, home, metadata, config, base.index, name, packed, base, packs
    )  # fmt: skip


def _plain(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a file's metadata without torchao's and ComfyUI's entries about single tensors."""
    torchao = "tensor_names" in metadata
    kept = {k: v for k, v in metadata.items() if not torchao or (k != "tensor_names" and '"_type"' not in v)}
    return {key: value for key, value in kept.items() if key != COMFYUI}


def _without(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    text = config.get("text_config")
    plain = {key: value for key, value in config.items() if key != QUANTIZATION}
    return {**plain, "text_config": _without(text)} if isinstance(text, dict) else plain
