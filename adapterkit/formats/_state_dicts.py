"""State dicts of torch on disk, and the alpha that they do not hold, in a small file beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterkitError, Malformed, UsageError
from ..io import safetensors
from ..io.atomic import write_bytes
from ..io.checkpoint import read_json
from ..io.lazy import Lazy, as_torch
from ..io.staging import staged, unwritten
from ..io.torch_file import is_torch_file, read_torch_file
from ._pairs import finite


def keys_of(path: Path) -> list[str]:
    """The keys of a file of torch's or of safetensors, for detection; none where it is neither."""
    try:
        if not path.is_file():
            return []
        if is_torch_file(path):
            return list(read_torch_file(path))
        return list(safetensors.read_header(path).entries) if path.suffix == ".safetensors" else []
    except AdapterkitError:
        return []


def load(path: Path) -> dict[str, Lazy]:
    """The tensors of a file, by key.

    Raises:
        Malformed: it is damaged, or no state dict.
    """
    return safetensors.read(path) if path.suffix == ".safetensors" else read_torch_file(path)


def save(path: Path, tensors: Mapping[str, Lazy], wrapper: str | None = None) -> None:
    """Writes a state dict atomically: as safetensors by that suffix, else as `torch.save` does.

    Args:
        path: the file.
        tensors: by key, in the order in which they are to stand.
        wrapper: the one key of a dict around them.

    Raises:
        StorageError: it cannot be written.
        UsageError: the suffix asks for safetensors, which the format's reader does not take.
    """
    if path.suffix == ".safetensors":
        if wrapper is not None:
            why = f"safetensors files do not hold the dict {wrapper!r} around the tensors"
            raise UsageError(why, path=path, cure="Give the file a name that ends in .pt")
        return safetensors.write(path, tensors, {"format": "pt"})
    import torch

    loaded: dict[int, torch.Tensor] = {}
    state = {key: loaded.setdefault(id(leaf), as_torch(leaf)) for key, leaf in tensors.items()}
    # The archive's root is called after the file, so that the staged file must have its name.
    with staged(path) as part:
        try:
            torch.save(state if wrapper is None else {wrapper: state}, part)
        except RuntimeError as error:
            # torch's zip writer is C++ and hides the errno. Plain tensors in memory leave it no other reason to fail.
            raise unwritten(error, part) from error
    return None


def read_settings(file: Path, known: tuple[str, ...], example: str) -> dict[str, Any]:
    """What a file of settings beside a state dict says; `alpha` is among it, and not zero.

    Raises:
        UsageError: it is not there, and the state dict does not hold alpha.
        Malformed: it says something else, or an alpha that is none.
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
        why = "alpha is zero, so that the adapter would do nothing"
        raise Malformed(why, path=file, where="alpha", cure="Correct it")
    return settings


def write_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Writes a file of settings."""
    write_bytes(file, json.dumps(settings, indent=2, sort_keys=True, allow_nan=False).encode())
