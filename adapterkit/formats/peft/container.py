"""The folder: a config in JSON beside one file of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import AdapterkitError, Malformed, StorageError, storage_error
from ...names.tinker import is_tinker
from ...tensors import safetensors
from ...tensors.atomic import write_bytes
from ...tensors.checkpoint import read_json
from ...tensors.lazy import Lazy
from ...tensors.torch_file import is_torch_file, read_torch_file

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"

METADATA = {"format": "pt"}
"""All that PEFT puts into a file's metadata."""

MAX_SNIFF = 16 << 20


def sniff(path: Path) -> bool:
    """Whether a config that names a `peft_type` lies at or beside `path`; the same file without one is not PEFT's."""
    if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS, TORCH):
        return False
    config = _folder(path) / CONFIG
    try:
        with open(config, "rb") as file:
            if b'"peft_type"' not in file.read(MAX_SNIFF):
                return False
        # Tinker has PEFT's config beside tensors that PEFT does not know.
        return not is_tinker(safetensors.read_header(_folder(path) / SAFETENSORS).entries)
    except OSError:
        return False
    except AdapterkitError:
        return True


def load(path: Path) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """The config and the tensors, by key.

    Args:
        path: the folder, its config or its file of tensors. In a folder, a safetensors file goes before a `.bin`.

    Raises:
        StorageError: one of the two files is not there.
        Malformed: one of them is damaged.
    """
    folder = _folder(path)
    weights = path if path.is_file() and path.name != CONFIG else _weights(folder)
    if not (folder / CONFIG).exists():
        raise StorageError(f"no {CONFIG} beside the tensors", path=folder, cure="Fetch it: it holds rank and alpha")
    return read_json(folder / CONFIG, strict=True), _read(weights)


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> None:
    """Writes the folder. Its config goes away first and comes back last: without one it is no adapter.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    safetensors.write(folder / SAFETENSORS, tensors, METADATA)
    write_bytes(folder / CONFIG, text.encode())


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _weights(folder: Path) -> Path:
    for name in (SAFETENSORS, TORCH):
        if (folder / name).exists():
            return folder / name
    raise StorageError(f"neither {SAFETENSORS} nor {TORCH}", path=folder, cure="Fetch the file of tensors as well")


def _read(path: Path) -> dict[str, Lazy]:
    if path.is_dir():
        raise Malformed("a folder where the file of tensors should be", path=path, cure="Fetch the adapter again")
    if path.suffix == ".bin" or is_torch_file(path):
        return read_torch_file(path)
    return safetensors.read(path)
