"""Read quantized bases. Each quantization scheme has one module, which reads the weights that the scheme packed.

A packed weight consists of several stored tensors, such as codes and scales. This package presents each packed weight
as one lazy tensor, which reads only the requested rows and returns the same values as the scheme's own library. So a
merge does not need to know how a weight is stored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.registry import Registry
from ..errors import Malformed, ShapeMismatch, Unsupported
from ..io.checkpoint import Checkpoint
from ..io.lazy import BY_TORCH, DTYPES, DType, Lazy, Shape
from ..native import loops

if TYPE_CHECKING:
    from ..io.lazy import Array as Array
    from ..io.lazy import Buffer
    from ..io.strict_json import JsonValue

    Merged = Callable[[int, int], Array]
    from ._calibration import Calibration


# The interface of a quantization scheme. The class of a scheme detects the bases that were packed with the scheme, and
# finds the packed weights in these bases.


DAMAGED = "Download the file again: it is damaged, or belongs to another scheme"

NO_PACKING = (
    "Merge with --quantized dequantize (quantized='dequantize'), and quantize the result with the scheme's own tool"
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen values of a 4-bit float with one sign bit, two exponent bits and one mantissa bit."""


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """A packed weight: one weight that a scheme stores as one or several tensors. Each scheme has a subclass.

    Attributes:
        name: the weight's name in the unquantized base.
        shape: the weight's shape in the unquantized base.
        dtype: the dtype to which the scheme's library dequantizes.
        members: the names of the weight's stored tensors. `Dequantized.tensors` lists the weight at the position of the
            first of these tensors.
    """

    name: str
    shape: Shape
    dtype: DType
    members: tuple[str, ...]

    @property
    def merged(self) -> str:
        """The dtype of the merged values that `pack` expects."""
        return "F32"

    @property
    def changes(self) -> bool:
        """Whether a merge changes the weight's stored type. This does not depend on the adapters."""
        return False

    @property
    def written(self) -> Lazy:
        """A placeholder for the tensor that a merge writes if `changes` is true.

        The placeholder has the size of this tensor, but not its bytes.

        Raises:
            Unsupported: the scheme cannot change a weight's stored type.
        """
        raise Unsupported("the scheme cannot write the weight in another type", where=self.name, cure=NO_PACKING)

    @property
    def share(self) -> Lazy | None:
        """This weight's part of a stored tensor that several weights share; None if there is no such tensor.

        If `changes` is true, the value is a placeholder with the size of the part that a merge writes.
        """
        return None

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed | None:
        """Return a copy of the weight that reads the stored tensors in `parts`.

        Return None if the class cannot make this copy. The caller must then create the weight with `Scheme.find`.
        """
        return None

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Return the dequantized rows `start` to `stop` as an array `[rows, width]`, in numpy's type for `dtype`.

        The width is the size of the weight's last axis.

        Raises:
            Malformed: a scale is a NaN or an infinity.
        """

    def pack(self, merged: Merged) -> dict[str, Array]:
        """Quantize new values for this weight with the scheme's formula.

        Args:
            merged: a function that returns rows `start` to `stop` as an array `[rows, width]`, in the dtype that the
                property `merged` names. The function may be called several times for the same rows.

        Returns:
            The stored tensors that change, in their stored dtypes and shapes.

        Raises:
            Unsupported: quantizing to this scheme is not implemented.
        """
        raise Unsupported("adapterkit cannot quantize to this scheme", where=self.name, cure=NO_PACKING)

    def lazy(self) -> Lazy:
        """Return the weight as a lazy tensor that reads only the requested rows."""
        return Lazy(self.shape, self.dtype, lambda: self._part(0, math.prod(self.shape)), part=self._part)

    def _part(self, first: int, count: int) -> Buffer:
        import numpy as np

        width = self.shape[-1] if self.shape else 1
        if not count or not width:
            return b""
        start, stop = first // width, -(-(first + count) // width)
        with np.errstate(all="ignore"):
            values = np.ascontiguousarray(self.rows(start, stop), dtype=self.dtype.array)
        flat = values.reshape(-1)[first - start * width :][:count]
        return flat.view("u1").tobytes()


class Rowwise(Packed):
    """A packed weight whose rows can be merged, packed and written in runs, without the other rows."""

    @property
    @abstractmethod
    def apart(self) -> bool:
        """Whether runs of this weight's rows can be packed separately."""

    @abstractmethod
    def closed(self, row: int) -> bool:
        """Whether a run of rows may begin at this row.

        The result is true if, in each stored tensor that a merge changes, the bytes of all earlier rows come before the
        bytes of this row and of all later rows.
        """

    @abstractmethod
    def places(self, row: int) -> dict[str, int]:
        """Return the byte offset at which a row will begin in each stored tensor that a merge changes.

        The keys of the result are the names of these tensors.

        Args:
            row: the index of the row; `closed(row)` must be true.
        """

    @abstractmethod
    def pack_rows(self, start: int, rows: Array) -> dict[str, bytes]:
        """Quantize a run of rows. Return the run's bytes for each stored tensor that a merge changes.

        The keys of the result are the names of these tensors. `closed` must be true for the first row of the run, and
        for the row that follows the run.

        Args:
            start: the index of the first row.
            rows: the rows `[rows, width]`, in the dtype that the property `merged` names.
        """

    @abstractmethod
    def unpack_rows(self, start: int, parts: Mapping[str, bytes]) -> Array:
        """Dequantize a run of rows to an array `[rows, width]`.

        Args:
            start: the index of the run's first row.
            parts: the bytes that `pack_rows` returned for the run.
        """


class Scheme:
    """A quantization scheme, which stores weights in tensors of integers or 8-bit floats.

    Define each subclass in a separate module; the module's name is the scheme's name. A base counts as unquantized if
    its config names no quantization and all its tensors have dtypes in `PLAIN`.

    Class attributes:
        url: the address of a description of the layout.
        description: a short description for the tables of schemes.
        oracle: the library or formula with which the tests compare the dequantized values.
    """

    url: ClassVar[str] = ""
    description: ClassVar[str] = ""
    oracle: ClassVar[str] = ""

    def detect(self, base: Checkpoint) -> bool:
        """Whether the headers and the config of the base show that this scheme packed it."""
        raise Unsupported(f"{type(self).__name__} cannot be detected")

    def config(self, base: Checkpoint) -> Mapping[str, JsonValue] | None:
        """Return the config that is used to match the module names in adapters with the names of packed weights."""
        return base.config

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        """Yield the packed weights.

        Raises:
            Malformed, ShapeMismatch: stored tensors of a weight are missing or damaged, or do not fit together.
        """
        raise Unsupported(f"{type(self).__name__} cannot be read")


def settings(base: Checkpoint) -> dict[str, Any]:
    """Return the `quantization_config` of the base's config; empty if there is none."""
    quantization = stated_quantization(base.config)
    return quantization if isinstance(quantization, dict) else {}


def stated_quantization(config: Mapping[str, JsonValue] | None) -> Any:
    """Return the `quantization_config` of a config, or None.

    A model with several parts may have this entry in `text_config`, the config of its language model, as in Kimi K2.5.
    """
    config = config or {}
    text = config.get("text_config")
    quantization = config.get(QUANTIZATION)
    return text.get(QUANTIZATION) if quantization is None and isinstance(text, dict) else quantization


QUANTIZATION = "quantization_config"


def sixteen_bits(base: Checkpoint, scale: Lazy | None = None) -> DType:
    """Return the 16-bit dtype to dequantize to.

    If the scale's dtype has 16 bits, return this dtype. Otherwise, return float16 if the config names float16, and
    bfloat16 if not.
    """
    if scale is not None and scale.dtype.name in ("F16", "BF16"):
        return scale.dtype
    config = base.config or {}
    dtype = BY_TORCH.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."))
    return dtype if dtype is not None and dtype.name == "F16" else DTYPES["BF16"]


def part_of(base: Checkpoint, weight: str, name: str, dtypes: tuple[str, ...]) -> Lazy:
    """Return a stored tensor that a packed weight needs.

    Raises:
        Malformed: the tensor is missing.
        ShapeMismatch: the tensor's dtype is not in `dtypes`.
    """
    tensor = base.tensors.get(name)
    if tensor is None:
        raise Malformed(f"the weight is quantized, but {name} is missing", path=base.root, where=weight, cure=DAMAGED)
    if tensor.dtype.name not in dtypes:
        why = f"the dtype is {tensor.dtype}, not {' or '.join(dtypes)}"
        raise ShapeMismatch(why, path=base.root, where=name, cure=DAMAGED)
    return tensor


def expect(shape: Shape, wanted: Shape, name: str) -> None:
    """Check the shape of a packed weight's stored tensor.

    Raises:
        ShapeMismatch: `shape` differs from `wanted`.
    """
    if shape != wanted:
        raise ShapeMismatch(f"the shape is {list(shape)}, not {list(wanted)}", where=name, cure=DAMAGED)


def numbers(tensor: Lazy, first: int = 0, count: int | None = None) -> Array:
    """Read elements of a stored tensor as a flat array.

    Args:
        tensor: the stored tensor.
        first: the flat index of the first element to read.
        count: the number of elements; None to read all elements from `first` to the end.
    """
    import numpy as np

    size = math.prod(tensor.shape) - first if count is None else count
    return np.frombuffer(tensor.read(first, size), dtype=tensor.dtype.array)


def from_bytes(data: bytes, dtype: DType, *rows: int) -> Lazy:
    """Return bytes as a tensor.

    The size of the first axis is computed from the number of bytes. `rows` contains the sizes of the other axes.
    """
    count = len(data) // dtype.itemsize // math.prod(rows)
    return Lazy((count, *rows), dtype, lambda: data)


def rows_of(tensor: Lazy, start: int, stop: int) -> Array:
    """Read rows `start` to `stop` of a stored tensor as `[rows, width]`."""
    width = tensor.shape[-1]
    return numbers(tensor, start * width, (stop - start) * width).reshape(stop - start, width)


def finite(scales: Array, name: str) -> Array:
    """Return the scales in float32; float64 scales stay float64.

    Raises:
        Malformed: a scale is a NaN or an infinity.
    """
    import numpy as np

    wide = scales if scales.dtype == np.float64 else scales.astype(np.float32)
    if not np.isfinite(wide).all():
        raise Malformed("a scale is not a finite number", where=name, cure=DAMAGED)
    return wide


def nibbles(packed: Array, *, high_first: bool = False) -> Array:
    """Split each byte into two 4-bit values, the low half first by default. The last axis becomes twice as long."""
    import numpy as np

    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, axis=-1).reshape(*packed.shape[:-1], -1)


STEP = 1 << 17
"""The approximate number of values to quantize in one step. That many values fit in a processor core's cache."""


def steps(shape: Shape, granule: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each run of rows to quantize in one step.

    The number of rows in a run is a multiple of `granule`, except in the last run.
    """
    rows = math.prod(shape[:-1])
    step = max(1, STEP // (max(shape[-1], 1) * granule)) * granule
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def divided(values: Array, scale: Array | float) -> Array:
    """Return `values / scale`, and 0 for elements whose scale is 0."""
    import numpy as np

    wide = np.broadcast_to(np.asarray(scale, np.float32), values.shape)
    return np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)


def nearest_e2m1(values: Array) -> Array:
    """Return the codes (uint8) of the nearest E2M1 values; ties go to the even mantissa."""
    import numpy as np

    loaded = loops() if values.dtype == np.float32 else None
    if loaded is not None:
        given, codes = np.ascontiguousarray(values), np.empty(values.shape, np.uint8)
        loaded.adapterkit_e2m1(given.ctypes.data, given.size, codes.ctypes.data)
        return codes
    levels = np.array(E2M1[:8], np.float32)
    middles, sizes = (levels[1:] + levels[:-1]) / 2, np.abs(values)
    low, high = (np.searchsorted(middles, sizes, side) for side in ("left", "right"))
    q = np.where(low % 2 == 0, low, high).astype(np.uint8)
    return np.asarray(q | np.signbit(values).astype(np.uint8) << 3)


def halves(q: Array, *, high_first: bool = False) -> Array:
    """Pack pairs of 4-bit values along the last axis (of even length) into bytes; the inverse of `nibbles`."""
    first, second = q[..., 0::2], q[..., 1::2]
    return (first << 4 | second) if high_first else (first | second << 4)


def joined(pieces: Sequence[Sequence[Array]], axes: Sequence[int]) -> list[Array]:
    """For each i, concatenate the arrays at index i of all `pieces` along `axes[i]`. Return the results as a list."""
    import numpy as np

    return [np.concatenate(parts, axis) for parts, axis in zip(zip(*pieces, strict=True), axes, strict=True)]


# The registry of schemes, and the functions that other packages call.


__all__ = [
    "SCHEMES",
    "Dequantized",
    "Packed",
    "Scheme",
    "config_file",
    "dequantized",
    "detect",
    "is_quantized",
    "stated_method",
]

SCHEMES: Registry[type[Scheme]] = Registry("quantization scheme", __name__, "adapterkit.quant", Scheme)

SIDE_FILES = frozenset({"quantize_config.json", "quant_config.json", "hf_quant_config.json"})
"""Files next to config.json that describe only how weights are packed."""

COMFYUI = "_quantization_metadata"
"""The metadata key under which ComfyUI's files may list the quantization format of each module."""

PLAIN = frozenset({"BF16", "F16", "F32", "F64"})
"""The dtypes of unquantized weights. If a base has only these dtypes, no scheme is imported."""


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized(Checkpoint):
    """A quantized base, as a checkpoint of dequantized weights.

    The keys of `tensors` and `home` are the names of the weights. A packed weight's stored tensors have no keys there.

    Attributes:
        scheme: the name of the scheme that packed the base.
        packed: a map from names of weights to packed weights.
        stored: the quantized base.
        packs: True if merged weights will be quantized again.
        keep: what to preserve when weights are quantized again: `adapter` preserves the adapters' change; None rounds
            each weight to the nearest value.
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
        """Return the stored tensors, with a placeholder for each weight whose stored type the merge changes."""
        changed = {w.members[0]: w.written for w in self.packed.values() if w.changes}
        return {name: changed.get(name, tensor) for name, tensor in self.stored.tensors.items()}

    def unpacked_again(self, weight: Packed, parts: Mapping[str, Lazy]) -> Packed:
        """Return a packed weight that is read from new stored tensors instead of the base's tensors."""
        repacked = weight.with_parts(parts)
        if repacked is not None:
            return repacked
        members = {name: parts.get(name, self.stored.tensors[name]) for name in weight.members}
        weights_found = SCHEMES[self.scheme]().find(replace(self.stored, tensors=members))
        return next(other for other in weights_found if other.name == weight.name)


def config_file(base: Checkpoint) -> Mapping[str, JsonValue] | None:
    """Return the config.json next to a base's weights. For a GGUF base, omit the keys that adapterkit added."""
    return base.stored.config if isinstance(base, Dequantized) and base.scheme == "gguf" else base.config


def stated_method(base: Checkpoint) -> str | None:
    """Return the quantization method in the base's config; None if the config has no quantization settings.

    If these settings do not name a method, return `of some kind`.
    """
    config = stated_quantization(base.config)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    return method if isinstance(method, str) else "of some kind"


def is_quantized(base: Checkpoint) -> bool:
    """Whether the config names a quantization, or a scheme recognises the names and dtypes of the tensors."""
    if stated_method(base) is not None:
        return True
    plain = all(tensor.dtype.name in PLAIN for tensor in base.tensors.values())
    return not plain and any(SCHEMES[name]().detect(base) for name in SCHEMES)


def detect(base: Checkpoint) -> str:
    """Return the name of the scheme that recognises the base by its headers and config.

    Raises:
        Unsupported: no scheme recognises the base, or several do.
    """
    schemes = [name for name in SCHEMES if SCHEMES[name]().detect(base)]
    if len(schemes) == 1:
        return schemes[0]
    method = stated_method(base)
    why = (
        f"the scheme could be {' or '.join(schemes)}"
        if schemes
        else f"the base is quantized ({method}) by an unknown scheme"
    )
    raise Unsupported(why, path=base.root, cure=f"Known: {', '.join(SCHEMES)}. {ORIGINAL}")


ORIGINAL = "Or merge into the 16-bit weights that the base was quantized from"


def dequantized(base: Checkpoint, *, packs: bool = False) -> Dequantized:
    """Return the base as a checkpoint whose weights are dequantized when they are read.

    Args:
        base: a quantized base.
        packs: True if merged weights will be quantized again.

    Raises:
        Unsupported: no scheme recognises the base, or several do.
        Malformed, ShapeMismatch: stored tensors of a packed weight are missing or damaged, or do not fit together.
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
                "the weight is stored both packed and unpacked", path=base.root, where=twice, cure="Remove one copy"
            )
        tensors |= seen
        if stored in base.home:
            home |= dict.fromkeys(seen, base.home[stored])
    metadata = (
        base.metadata if packs else {file: _plain(text_metadata) for file, text_metadata in base.metadata.items()}
    )
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
