"""Load and save tensor files: safetensors with metadata, and torch files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from ...errors import AdapterkitError, Malformed, UsageError
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.lazy import Lazy, as_torch
from ...io.torch_file import is_torch_file, read_torch_file

TORCH = {".bin", ".ckpt", ".pt", ".pth"}
"""Suffixes of torch files."""

NATIVE = "adapterkit"
"""The metadata key of adapterkit's own files, which these formats do not read."""

Metadata = list[tuple[str, str]]
"""Metadata as (key, value) pairs in the file's order, because the writing libraries do not sort the keys."""


def load(path: Path) -> tuple[dict[str, Lazy], Metadata]:
    """Load the tensors and the metadata of a file.

    Raises:
        Malformed: the file is not a tensor file.
        StorageError: the file cannot be read.
    """
    if path.is_dir():
        raise UsageError("this is a folder; a tensor file is expected here", path=path, cure="Name the file itself")
    if path.suffix in TORCH or is_torch_file(path):
        return read_torch_file(path), []
    header = safetensors.read_header(path)
    if NATIVE in header.metadata:
        raise Malformed(
            "this file is in adapterkit's format",
            path=path,
            where="__metadata__",
            cure="Read the file with --from adapterkit (format='adapterkit')",
        )
    tensors = safetensors.handles(header)
    return tensors, list(header.metadata.items())


def names(path: Path) -> list[str]:
    """Return the keys of a file, for detection; an empty list if the file is not a tensor file."""
    try:
        if not path.is_file():
            return []
        if path.suffix in TORCH or is_torch_file(path):
            return list(read_torch_file(path))
        header = safetensors.read_header(path)
        return [] if NATIVE in header.metadata else list(header.entries)
    except AdapterkitError:
        return []


def save(path: Path, tensors: Mapping[str, Lazy], metadata: Metadata) -> None:
    """Write a file atomically: a torch file if its name has a torch suffix, otherwise safetensors."""
    if path.suffix not in TORCH:
        return safetensors.write(path, tensors, dict(metadata))
    import torch

    buffer = io.BytesIO()
    torch.save({key: as_torch(leaf) for key, leaf in tensors.items()}, buffer)
    return write_bytes(path, buffer.getvalue())
