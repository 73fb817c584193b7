"""Open the weights of a base as a mapping of lazy tensors, and compute a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import DOWNLOAD_OR_WRITE_AGAIN, Malformed, StorageError, UsageError, shown, storage_error
from . import safetensors
from .inputs import is_gguf, open_input, read_input
from .lazy import DTYPES, Lazy, Span, files_kept_open
from .locations import check_exists, exists, located
from .stages import detail
from .strict_json import check_size, load_json
from .torch_file import is_torch_file, read_torch_file

if TYPE_CHECKING:
    from .lazy import Lazy
    from .strict_json import JsonValue


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"
LONGEST_NAME = 255
"""The longest file name in bytes on common file systems. `stat` raises an OSError for a longer name."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Checkpoint:
    """The weights of a base on disk.

    Attributes:
        root: the folder, or the single file.
        tensors: the lazy tensors, keyed by name. They are grouped by file, in the order of `files`. Within a group,
            they have the file's own order.
        files: the weight files, sorted by name.
        home: the weight file of each tensor, keyed by the tensor's name.
        metadata: the safetensors metadata of each weight file; empty for torch and GGUF files.
        config: the content of the model's `config.json`, if this file is next to the weights; otherwise None.
        index: the parsed index file of a sharded checkpoint; None if the checkpoint has no index.
    """

    root: Path
    tensors: Mapping[str, Lazy]
    files: tuple[Path, ...]
    home: Mapping[str, Path]
    metadata: Mapping[Path, Mapping[str, str]]
    config: Mapping[str, JsonValue] | None
    index: Mapping[str, JsonValue] | None

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.root)!r}: {len(self.tensors):,} tensors in {len(self.files):,} files)"

    @property
    def folder(self) -> Path:
        """The folder of the weight files, which also has the config and the tokenizer."""
        return self.root if self.root.is_dir() else self.root.parent


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder of safetensors or torch files, or a single safetensors, torch or GGUF file. Only headers are read.

    Raises:
        StorageError: the path does not exist or cannot be read, or a file of a split GGUF model is missing.
        Malformed: the files contradict each other or their index.
        UsageError: the folder has no weights, or has both a single file and an index, or has several safetensors files
            without an index.
    """
    root = located(path)
    check_exists(root, path)
    files, index = _weight_files(root) if root.is_dir() else (_splits(root), None)
    tensors, home, metadata = _read_files(files)
    if index is not None:
        _check_index(index[0], index[1], home)
    folder = root if root.is_dir() else root.parent
    config = folder / "config.json"
    detail(f"opened {root}: {len(tensors):,} tensors in {len(files)} weight files")
    return Checkpoint(
        root, tensors, tuple(files), home, metadata, read_json(config) if config.is_file() else None,
        None if index is None else index[1],
    )  # fmt: skip


def read_shards(index: Path) -> dict[str, Lazy]:
    """Return the tensors of all files that an index lists; only headers are read.

    Raises:
        Malformed: the index is damaged, or a listed file is missing or lacks a tensor.
    """
    files, (_, content) = _indexed_files(index)
    tensors, home, _ = _read_files(files)
    _check_index(index, content, home)
    return tensors


def opened(base: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    """Return a checkpoint unchanged; open a path with `open_checkpoint`."""
    return base if isinstance(base, Checkpoint) else open_checkpoint(base)


def read_json(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        strict: whether to refuse repeated keys and non-finite numbers. Use False for the config of a base, because some
            configs contain `Infinity`.

    Raises:
        Malformed: the file is not a JSON object, or is too large.
        StorageError: the file cannot be read.
    """
    data = read_input(path)
    try:
        check_size(data)
        value = (load_json if strict else json.loads)(data.decode("utf-8"))
        if path.name == "config.json" and b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()  # This raises a ValueError for a lone surrogate.
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the file is not valid JSON ({error})", path=path, cure=DOWNLOAD_OR_WRITE_AGAIN) from error
    if not isinstance(value, dict):
        raise Malformed("the file is not a JSON object", path=path, cure=DOWNLOAD_OR_WRITE_AGAIN)
    return value


def contained(folder: Path, name: str) -> Path:
    """Return `folder / name` for a name from an untrusted file.

    Raises:
        Malformed: the name is not a plain relative path, leads outside the folder, or is too long for a file system.
    """
    pure = PurePosixPath(name)
    strange = {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name or ":" in name
    if strange or not all(map(_is_file_name, pure.parts)):
        raise Malformed(
            f"{shown(name)} is not a plain relative path inside the folder",
            path=folder,
            where=name,
            cure="Do not use this model, or repack it with plain file names",
        )
    return folder / pure


def _is_file_name(part: str) -> bool:
    """Whether a string from JSON is short enough for a file name, and has no lone surrogates."""
    try:
        return len(part.encode()) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


_Index = tuple[Path, dict[str, Any]]
"""The path and the content of an index file."""


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], _Index | None]:
    for index_name, single in ((INDEX, SINGLE), (TORCH_INDEX, TORCH_SINGLE)):
        index, whole = folder / index_name, folder / single
        if index.is_file() and whole.is_file():
            raise UsageError(
                f"the folder holds both {single} and {index_name}", path=folder, cure="Remove the outdated file"
            )
        if index.is_file():
            return _indexed_files(index)
        if whole.is_file():
            return (whole,), None
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        cure = f"Pass a folder with {SINGLE}, with {INDEX} and its shards, or with {TORCH_SINGLE}"
        raise UsageError("this folder holds no weights", path=folder, cure=cure)
    if len(files) > 1:
        raise UsageError(
            f"the folder holds {len(files)} safetensors files and no {INDEX}",
            path=folder,
            cure="Pass one of the files, or restore the index",
        )
    return (files[0],), None


def _splits(file: Path) -> tuple[Path, ...]:
    """Return all files of a split GGUF model, given one of them. A file of any other kind is returned alone."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if match is None:
        return (file,)
    files = tuple(file.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, int(match[3]) + 1))
    lost = next((other for other in files if not other.is_file()), None)
    if lost is not None:
        why = f"the model is split into several files, and {lost.name} is missing"
        raise StorageError(why, path=file, cure="Download all files of the model")
    return files


def _indexed_files(path: Path) -> tuple[tuple[Path, ...], _Index]:
    index = read_json(path, strict=True)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        why = "the index has no valid weight_map, a map from tensor names to file names"
        raise Malformed(why, path=path, where="weight_map", cure="Download the index again")
    if not isinstance(index.get("metadata"), dict | None):
        why = f"metadata must be a JSON object, got {shown(index['metadata'])}"
        raise Malformed(why, path=path, where="metadata", cure="Download the index again")
    names = sorted(set(weight_map.values()))
    files = tuple(contained(path.parent, name) for name in names)
    for file in files:
        if not exists(file) or file.is_dir():
            why = f"the index lists {file.name}, which is missing"
            raise Malformed(why, path=path, where="weight_map", cure="Download the missing shard")
    return files, (path, index)


def _read_files(
    files: Sequence[Path],
) -> tuple[dict[str, Lazy], dict[str, Path], dict[Path, Mapping[str, str]]]:
    """Read the headers of files. Return the tensors by name, the file of each tensor, and the metadata of each file.

    Raises:
        Malformed: two files have a tensor of the same name.
    """
    tensors: dict[str, Lazy] = {}
    home: dict[str, Path] = {}
    metadata: dict[Path, Mapping[str, str]] = {}
    for file in files:
        part, metadata[file] = _read_file(file)
        twice = next((name for name in part if name in tensors), None)
        if twice:
            raise Malformed(
                f"the tensor is also in {home[twice].name}", path=file, where=twice, cure="Remove one of the copies"
            )
        tensors |= part
        home |= dict.fromkeys(part, file)
    return tensors, home, metadata


def _read_file(file: Path) -> tuple[dict[str, Lazy], Mapping[str, str]]:
    if file.is_dir():
        raise Malformed("a folder has the name of a weight file", path=file, cure="Download the weights again")
    if is_torch_file(file) or (file.suffix in {".bin", ".pt", ".pth"} and not _begins_as_safetensors(file)):
        return read_torch_file(file), {}
    if is_gguf(file):
        from .gguf_file import read_model

        return {name: raw(span) for name, span in read_model(file).spans.items()}, {}
    header = safetensors.read_header(file)
    return safetensors.handles(header), header.metadata


def _begins_as_safetensors(file: Path) -> bool:
    """Whether a file, with any extension, begins like a safetensors file: an 8-byte length, then JSON."""
    try:
        with open_input(file) as opened_file:
            return opened_file.read(9)[8:] in (b"{", b" ", b"\n", b"\r", b"\t")
    except OSError as error:
        raise storage_error(error, file) from error


def raw(span: Span) -> Lazy:
    """Return a byte range of a file as a tensor of uint8."""
    return Lazy((span.nbytes,), DTYPES["U8"], None, span)


def _check_index(path: Path, index: Mapping[str, Any], home: Mapping[str, Path]) -> None:
    weight_map = index["weight_map"]
    # Check each file name once, not once for each tensor. A check takes 15 us, and the index of a large
    # mixture-of-experts model lists 45,000 tensors in 163 files.
    files = {file: contained(path.parent, file) for file in dict.fromkeys(weight_map.values())}
    for name, file in weight_map.items():
        if name not in home or home[name] != files[file]:
            why = f"the index assigns this tensor to {file}, but the file does not have this tensor"
            raise Malformed(why, path=path, where=name, cure="Download the shards again")
    extra = next((name for name in home if name not in weight_map), None)
    if extra:
        why = f"{home[extra].name} has this tensor, but the index does not list it"
        raise Malformed(why, path=path, where=extra, cure="Rebuild the index")


# A fingerprint is a short hash of a base's weights. Computing it is so fast that every merge does it.
#
# The hash covers the names, shapes and dtypes of all tensors, and a sample of their bytes. File names and sharding do
# not affect the hash. If a base changes, its fingerprint changes:
#
# - always, if the name, the shape or the dtype of a tensor changed;
# - always, if any element changed in a tensor that is small enough to be read whole;
# - always, if a contiguous range of at least 1/63 of a tensor's elements changed, such as the rows of one of 32
#   attention heads. The reason is that 64 blocks are read, evenly spaced from the first element to the last;
# - almost always, if the changed elements are scattered over the model, as after training. If a fraction p of all
#   elements changed, and n elements are read, the fingerprint stays the same with probability `(1 - p) ** n`. For a
#   model of 13 billion bfloat16 parameters, n is about 7 million. If one in a million of its elements changed, this
#   probability is about 0.001;
# - seldom, if only a few elements or one row of a large table changed. Only a hash of all bytes detects such changes.


PREFIX = "sampled-2-sha256:"
"""The prefix of a fingerprint. It names the version of the sampling. Never compare fingerprints of two versions."""

SAMPLE = 16 << 20
"""About this many bytes are read from all tensors together. Reading and hashing them takes about 100 ms."""

LEAST, MOST = 256, 256 << 10
"""The minimum and the maximum number of bytes to sample from one tensor.

The number is `SAMPLE` divided by the number of tensors, within these limits. A tensor of at most that many bytes is
read whole.
"""

BLOCKS = 64
"""The number of blocks that are read from a tensor, unless it is so small that it is read whole."""


@files_kept_open()
def fingerprint(base: Checkpoint) -> str:
    """Return the fingerprint of a base's stored weights.

    Raises:
        StorageError: a file cannot be read.
    """
    share = min(max(SAMPLE // max(len(base.tensors), 1), LEAST), MOST)
    digest = hashlib.sha256()
    with files_kept_open():
        # Sort by name, so that shards and file order do not matter.
        for name in sorted(base.tensors):
            tensor = base.tensors[name]
            digest.update(f"{name}\0{tensor.dtype.name}\0{list(tensor.shape)}\0".encode())
            if tensor.span is None and tensor.part is None:
                # The tensor's bytes are not one range of a file, so each partial read would compute the whole tensor.
                # Compute the tensor only once.
                whole = bytes(tensor.fetch())
                tensor = replace(tensor, part=partial(_part, whole, tensor.dtype.itemsize))
            for start, count in _places(tensor, share):
                digest.update(bytes(tensor.read(start, count)))
    return PREFIX + digest.hexdigest()


SHAPES_PREFIX = "shapes-1-sha256:"


def shapes_digest(base: Checkpoint) -> str:
    """Return a digest of a base's tensor names and shapes. Two bases of the same architecture have the same digest.

    The digest omits dtypes: a copy of a base in another dtype has the same architecture, although its weights differ.
    """
    digest = hashlib.sha256()
    for name in sorted(base.tensors):
        digest.update(f"{name}\0{list(base.tensors[name].shape)}\0".encode())
    return SHAPES_PREFIX + digest.hexdigest()


def _part(whole: bytes, size: int, first: int, count: int) -> bytes:
    return whole[first * size : (first + count) * size]


def _places(tensor: Lazy, share: int) -> list[tuple[int, int]]:
    """Return the ranges of elements to read, each as (first index, count). They are evenly spaced in the tensor."""
    elements, size = math.prod(tensor.shape), max(tensor.dtype.itemsize, 1)
    if elements * size <= share:
        return [(0, elements)] if elements else []
    count = max(share // size // BLOCKS, 1)
    last = elements - count
    return [(last * block // (BLOCKS - 1), count) for block in range(BLOCKS)]
