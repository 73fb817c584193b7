"""Read and write torch state dicts, and the small file beside them with the alpha that they do not hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from ..errors import AdapterkitError, Malformed, UsageError
from ..io import safetensors
from ..io.atomic import write_bytes
from ..io.checkpoint import read_json
from ..io.lazy import Lazy, as_torch
from ..io.staging import staged, unwritten
from ..io.torch_file import is_torch_file, read_torch_file
from ._pairs import finite


def keys_of(path: Path) -> list[str]:
    """Return the keys of a torch or safetensors file, for detection; none if it is neither."""
    try:
        if not path.is_file():
            return []
        if is_torch_file(path):
            return list(read_torch_file(path))
        return list(safetensors.read_header(path).entries) if path.suffix == ".safetensors" else []
    except AdapterkitError:
        return []


def load(path: Path) -> dict[str, Lazy]:
    """Load the tensors of a file, by key.

    Raises:
        Malformed: it is damaged, or not a state dict.
    """
    return safetensors.read(path) if path.suffix == ".safetensors" else read_torch_file(path)


def save(path: Path, tensors: Mapping[str, Lazy], wrapper: str | None = None) -> None:
    """Write a state dict atomically: as safetensors if the path has that suffix, else as `torch.save` does.

    Args:
        path: the file.
        tensors: key -> tensor, in the order to write.
        wrapper: the one key of a dict around the tensors.

    Raises:
        StorageError: it cannot be written.
        UsageError: the suffix is of safetensors, which the format's reader does not accept.
    """
    if path.suffix == ".safetensors":
        if wrapper is not None:
            why = f"safetensors files do not hold the dict {wrapper!r} around the tensors"
            raise UsageError(why, path=path, cure="Give the file a name that ends in .pt")
        return safetensors.write(path, tensors, {"format": "pt"})
    import torch

    loaded: dict[int, torch.Tensor] = {}
    state = {key: loaded.setdefault(id(leaf), as_torch(leaf)) for key, leaf in tensors.items()}
    # The archive's root is named after the file, so the staged file must have the same name.
    with staged(path) as part:
        try:
            torch.save(state if wrapper is None else {wrapper: state}, part)
            # torch 2.7 ignores an error when it closes the file; the archive then lacks its end.
            if not is_zipfile(part):
                raise RuntimeError("the archive is not complete")
        except RuntimeError as error:
            # torch's zip writer is C++ and hides the errno. With plain tensors in memory, only the disk can fail.
            raise unwritten(error, part) from error
    return None


def read_settings(file: Path, known: tuple[str, ...], example: str) -> dict[str, Any]:
    """Read a file of settings beside a state dict; it must have an `alpha` that is not zero.

    Raises:
        UsageError: the file is missing, and the state dict does not hold alpha.
        Malformed: it has other content, or an invalid alpha.
    """
    if not file.exists():
        why = f"the tensors do not say alpha; {file.name} beside them must"
        raise UsageError(why, path=file, cure=f"Write it: {example}")
    settings = read_json(file, strict=True)
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None or "alpha" not in settings:
        why = "no alpha" if unknown is None else f"unknown name {unknown!r}"
        raise Malformed(why, path=file, cure=f"It is {example}")
    if not finite(settings["alpha"], f"{file.name}: alpha"):
        why = "alpha is zero, so the adapter would do nothing"
        raise Malformed(why, path=file, where="alpha", cure="Correct it")
    return settings


def write_settings(file: Path, settings: Mapping[str, object]) -> None:
    """Write a file of settings."""
    write_bytes(file, json.dumps(settings, indent=2, sort_keys=True, allow_nan=False).encode())
