"""Make the plan of a merge from the files' headers. The plan and the input files determine every byte of the output.

The plan lists the output files, and the tensors of each file in order. An output tensor is computed from a stored
tensor of the base and from planned updates. If it has no updates and its dtype stays the same, its bytes are copied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter
from ..errors import Unsupported, UsageError
from ..io.checkpoint import INDEX, SINGLE, Checkpoint
from ..io.lazy import DTYPES, DType, Lazy, Shape, Span, dtype_named, read_span
from ..io.locations import source_of
from ..io.safetensors import encode_header
from ..io.stages import stage
from ..naming.renames import rule_texts
from ..quant import Dequantized, config_file
from .options import MergeOptions, allowed
from .planned import Output, OutputFile, Plan
from .planned_update import PlannedUpdate
from .planned_updates import folds_by_tensor
from .quantized import config_changes
from .ties import parse_tied

if TYPE_CHECKING:
    from .requantize import Repacked, RepackedStack


def make_plan(
    base: Checkpoint,
    adapters: Sequence[tuple[str, Adapter, float]],
    options: MergeOptions,
) -> Plan:
    """Plan the merge of (name, adapter, weight) tuples into a base; only headers are read.

    Raises:
        TargetNotFound, ShapeMismatch: an adapter does not fit the base.
        NotMergeable: an adapter's method changes outputs or the context, not weights.
        UsageError: it is unknown which layers an update of a tied weight changes (see `tied`); or an option is invalid,
            or contradicts another option or the base.
        Unsupported: a target's weight has no floating-point dtype.
        StorageError: the memory is too small for one worker.
    """
    stage("planning from headers")
    # Do not cast a GGUF output: `as_merged` has already chosen its types. `_dtype` would refuse GGUF types like Q8_0.
    cast = None if is_gguf_output(base) else _dtype(options.dtype)
    tied = parse_tied(options.tied)
    bound = folds_by_tensor(base, adapters, tied, options.allow_partial, rule_texts(options.rename), options.vocab)
    base, folds, names, changes = bound.base, bound.folds, bound.names, bound.config_changes
    tensors = {name: base.tensors[stored] for name, stored in names.items()}
    for name in folds:
        _check_floating(name, tensors[name], base)
    changes |= config_changes(base)
    before = config_file(base)
    if cast is not None and before is not None:
        # Use the key that the base's config has, because transformers renamed `torch_dtype` to `dtype`.
        key = "dtype" if "dtype" in before else "torch_dtype"
        changes[key] = cast.torch
    parts: dict[str, Repacked | RepackedStack] = {}
    kinds = {name: _output_dtype(tensor, cast, names[name], base) for name, tensor in tensors.items()}
    if isinstance(base, Dequantized) and base.packs:
        from .requantize import repacked

        if options.seed is not None:
            raise UsageError(
                "a seed selects stochastic rounding, but weights that are quantized again are rounded to the nearest",
                cure="Omit --seed (seed=), or choose --quantized dequantize (quantized=)",
            )
        tensors, folds, parts, kept = repacked(base, names, folds)
        kinds = {name: tensor.dtype if name in kept else kinds[name] for name, tensor in tensors.items()}
    files = tuple(_files(base, tensors, folds, kinds, options.shard_size, parts, options.seed))
    origin = source_of(base.folder)
    uri = None if origin is None else origin.uri
    planned = Plan(
        base, bound.sources, files, tied, changes, cast, options.seed, allowed(options.memory), options.link,
        uri, options.checksums, tuple(bound.warnings), vocabulary=bound.vocabulary,
    )  # fmt: skip
    planned.workers  # noqa: B018 - raises an error now if the memory is too small
    return planned


def index_of(plan: Plan) -> bytes | None:
    """Return the bytes of the output's index file, which maps tensors to weight files.

    If the base's index is correct for the output too, return its bytes unchanged. If the output has one weight file and
    the base has no index, or if this file is `model.safetensors`, return None.
    """
    # Loaders read `model.safetensors` without an index. `open_checkpoint` refuses folders that contain both files.
    if len(plan.files) == 1 and (plan.base.index is None or plan.files[0].name == SINGLE):
        return None
    weight_map = {output.name: file.name for file in plan.files for output in file.outputs}
    total = sum(output.nbytes for output in plan.outputs())
    old = plan.base.index or {}
    stated = old.get("metadata")
    metadata = stated if isinstance(stated, Mapping) else {}
    if old.get("weight_map") == weight_map and metadata.get("total_size") == total:
        return (plan.base.folder / INDEX).read_bytes()
    index = {**old, "metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _files(
    base: Checkpoint, tensors: Mapping[str, Lazy], folds: Mapping[str, tuple[PlannedUpdate, ...]],
    kinds: Mapping[str, DType], shard_size: int | None, parts: Mapping[str, Repacked | RepackedStack], seed: int | None,
) -> Iterator[OutputFile]:  # fmt: skip
    for name, members, metadata in _grouping(base, tensors, kinds, shard_size):
        header = _header(base, name, [(m, kinds[m], tensors[m].shape) for m in members], metadata)
        offset, outputs = len(header), []
        for member in members:
            source = tensors[member]
            details = folds.get(member, ()), parts.get(member), seed
            outputs.append(Output(member, kinds[member], source.shape, offset, source, *details))
            offset += outputs[-1].nbytes
        yield _untouched(name, outputs) or OutputFile(name, header, tuple(outputs))


def _untouched(name: str, outputs: list[Output]) -> OutputFile | None:
    """Return an output file that is a copy of the base's file with the same name, if the merge changes nothing in it.

    Return None if the base has no such file, if the merge changes one of the tensors, or if the two files do not have
    the same tensors.
    """
    spans = [output.source.span for output in outputs if output.copied]
    paths = {span.path for span in spans if span is not None}
    if len(spans) < len(outputs) or len(paths) != 1 or None in spans:
        return None
    # A copy keeps the header of the base's file. So the base's file must contain only the output file's tensors, and no
    # bytes after its last tensor.
    path = Path(paths.pop())
    start = min(span.offset for span in spans if span is not None)
    if path.name != name or start + sum(output.nbytes for output in outputs) != path.stat().st_size:
        return None
    placed = (replace(output, offset=output.source.span.offset) for output in outputs if output.source.span)
    return OutputFile(name, bytes(read_span(Span(str(path), 0, start))), tuple(placed), path)


def _header(base: Checkpoint, name: str, members: list[tuple[str, DType, Shape]], metadata: Mapping[str, str]) -> bytes:
    if is_gguf_output(base):
        from ..quant.gguf import header

        return header(base, next(file for file in base.files if file.name == name))  # type: ignore[arg-type]
    return encode_header(members, metadata)


def is_gguf_output(base: Checkpoint) -> bool:
    """Whether both the base and the output are GGUF models."""
    return isinstance(base, Dequantized) and base.scheme == "gguf" and base.packs


def _grouping(
    base: Checkpoint, tensors: Mapping[str, Lazy], kinds: Mapping[str, DType], shard_size: int | None
) -> Iterator[tuple[str, list[str], Mapping[str, str]]]:
    """Yield (file name, tensor names in order, metadata) of each output file.

    If `shard_size` is None, the output has one file for each file of the base.
    """
    common = next(iter(base.metadata.values()), {}) or {"format": "pt"}
    if is_gguf_output(base):
        if shard_size is not None:
            why = "the shard size has no effect: a merge into a GGUF model writes the same files as the base"
            raise UsageError(why, cure="Omit --shard-size (shard_size=)")
        for file, members in _by_home(base, tensors, None).items():
            yield file.name, members, {}
        return
    if shard_size is None:
        for file, members in _by_home(base, tensors, base.files[0]).items():
            yield _safetensors_name(file), members, base.metadata.get(file) or common
        return
    shards = _split(tensors, kinds, shard_size)
    for number, members in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        yield name, members, common


def _by_home(base: Checkpoint, names: Iterable[str], otherwise: Path | None) -> dict[Path, list[str]]:
    """Return a map from each file of the base to the names of its tensors, in order.

    A tensor that is not in the base is assigned to the file `otherwise`, or left out if `otherwise` is None.
    """
    members: dict[Path, list[str]] = {file: [] for file in base.files}
    # Group by the id of the Path object, because all tensors of a file have the same object. Hashing a path takes as
    # long as ten lookups by id, and a mixture of experts has 45,000 tensors.
    lists: dict[int, list[str]] = {}
    for name in names:
        home = base.home.get(name, otherwise)
        if home is None:
            continue
        if id(home) not in lists:
            lists[id(home)] = members[home]
        lists[id(home)].append(name)
    return members


def _split(tensors: Mapping[str, Lazy], kinds: Mapping[str, DType], shard_size: int) -> list[list[str]]:
    if shard_size <= 0:
        raise UsageError(
            f"the shard size is {shard_size} bytes",
            cure="Pass a positive size, such as --shard-size 5GB (shard_size=5 << 30)",
        )
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        nbytes = math.prod(tensor.shape) * kinds[name].itemsize
        if shards[-1] and filled + nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def _safetensors_name(file: Path) -> str:
    if file.suffix == ".safetensors":
        return file.name
    return file.with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)


def _dtype(name: str | None) -> DType | None:
    if name is None:
        return None
    dtype = dtype_named(name)
    if dtype is None or not _is_for_weights(dtype):
        known = ", ".join(each.name for each in DTYPES.values() if _is_for_weights(each))
        raise UsageError(f"weights cannot be cast to {name!r}", cure=f"Choose another --dtype (dtype=). Known: {known}")
    return dtype


def _is_for_weights(dtype: DType) -> bool:
    """Whether real weights can be cast to and from this dtype: it is floating-point, has a sign, and is not complex."""
    return dtype.floating and not dtype.torch.startswith(("complex", "float8_e8"))


def _output_dtype(tensor: Lazy, cast: DType | None, stored: str, base: Checkpoint) -> DType:
    if cast is None and isinstance(base, Dequantized) and stored in base.packed and tensor.dtype.name == "F32":
        return DTYPES["BF16"]  # Write 16 bits, although schemes dequantize to float32; see `quantized.WHY`.
    return cast if cast is not None and _is_for_weights(tensor.dtype) else tensor.dtype


def _check_floating(name: str, tensor: Lazy, base: Checkpoint) -> None:
    # Also refuse F8_E8M0. This type for scales has no sign and no 0, so it cannot represent a merged weight.
    if not tensor.dtype.floating or tensor.dtype.torch.startswith("float8_e8"):
        raise Unsupported(
            f"a weight with dtype {tensor.dtype} cannot take an update", path=base.root, where=name,
            cure="Merge into the floating-point weights from which this base was made",
        )  # fmt: skip
