"""Read and write the containers that several libraries use: folders, state dicts with a settings file, YAML configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from ..errors import DOWNLOAD_OR_WRITE_AGAIN, AdapterkitError, Malformed, UsageError, storage_error
from ..io import safetensors, strict_yaml
from ..io.atomic import write_bytes
from ..io.checkpoint import read_json
from ..io.lazy import Lazy, as_torch
from ..io.staging import staged, unwritten
from ..io.torch_file import is_torch_file, read_torch_file
from ._format import TENSORS
from ._kit import is_finite

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


# Read and create adapter folders with a config and one tensor file, as several libraries write them.


def folder_of(path: Path) -> Path:
    """Return the adapter's folder, given the folder or one of its files."""
    return path if path.is_dir() else path.parent


def read_tensors(path: Path) -> dict[str, Lazy]:
    """Return the tensors of a safetensors file or a torch file, by key.

    Raises:
        Malformed: the file is damaged, or `path` is a folder.
    """
    if path.is_dir():
        raise Malformed("the path is a folder; it must be a tensor file", path=path, cure="Download the adapter again")
    if path.suffix == ".bin" or is_torch_file(path):
        return read_torch_file(path)
    return safetensors.read(path)


def make_folder(folder: Path) -> None:
    """Create the folder of an adapter, and its missing parent folders.

    Raises:
        UsageError: the path has the suffix of a tensor file.
        StorageError: the folder cannot be created.
    """
    if folder.suffix.lower() in TENSORS and not folder.is_dir():
        why = f"this format writes a folder, but {folder.suffix} is the suffix of a tensor file"
        cure = "Pass a folder, or choose a format that writes one file, such as --to adapterkit (format='adapterkit')"
        raise UsageError(why, path=folder, cure=cure)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


# Read and write torch state dicts, and the small settings file that stores alpha next to a state dict.


def keys_of(path: Path) -> list[str]:
    """Return the keys of a torch or safetensors file, for detection; an empty list for any other file."""
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
        Malformed: the file is damaged, or does not contain a state dict.
    """
    return safetensors.read(path) if path.suffix == ".safetensors" else read_torch_file(path)


def save(path: Path, tensors: Mapping[str, Lazy], wrapper: str | None = None) -> None:
    """Write a state dict atomically: a safetensors file if `path` ends in `.safetensors`, otherwise a torch file.

    Args:
        path: the file.
        tensors: the tensors by key, in the order to write.
        wrapper: the key of an outer dict that contains the state dict; None for no outer dict.

    Raises:
        StorageError: the file cannot be written.
        UsageError: the suffix is `.safetensors`, but the format needs the outer dict `wrapper`, which safetensors
            cannot store.
    """
    if path.suffix == ".safetensors":
        if wrapper is not None:
            why = f"this format nests the tensors in a dict {wrapper!r}; safetensors files cannot store nested dicts"
            raise UsageError(why, path=path, cure="Give the file a name that ends in .pt")
        return safetensors.write(path, tensors, {"format": "pt"})
    import torch

    loaded: dict[int, torch.Tensor] = {}
    state = {key: loaded.setdefault(id(leaf), as_torch(leaf)) for key, leaf in tensors.items()}
    # torch names the archive's root folder after the file, so the temporary file must have the final name.
    with staged(path) as part:
        try:
            torch.save(state if wrapper is None else {wrapper: state}, part)
            # torch 2.7 ignores errors while it closes the file, so the end of the archive may be missing.
            if not is_zipfile(part):
                raise RuntimeError("the archive is not complete")
        except RuntimeError as error:
            # torch's zip writer is C++ and hides the errno. All tensors are in memory, so the error must come from the
            # disk.
            raise unwritten(error, part) from error
    return None


def read_settings(file: Path, known: tuple[str, ...], example: str) -> dict[str, Any]:
    """Read the settings file next to a state dict. The file must have a nonzero `alpha`.

    Raises:
        UsageError: the settings file is missing. Alpha is then unknown, because the state dict does not store it.
        Malformed: the file has unknown settings, or an invalid alpha.
    """
    if not file.exists():
        why = "the settings file is missing, so alpha is unknown; this format's tensor files do not store alpha"
        raise UsageError(why, path=file, cure=f"Write this file with the content {example}")
    settings = read_json(file, strict=True)
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None or "alpha" not in settings:
        why = "the settings have no alpha" if unknown is None else f"unknown setting {unknown!r}"
        raise Malformed(why, path=file, cure=f"The file must contain {example}")
    if not is_finite(settings["alpha"], f"{file.name}: alpha"):
        why = "alpha is zero, so the adapter would do nothing"
        raise Malformed(why, path=file, where="alpha", cure="Set alpha to the value used in training")
    return settings


def write_settings(file: Path, settings: Mapping[str, object]) -> None:
    """Write the settings file next to a state dict."""
    write_bytes(file, json.dumps(settings, indent=2, sort_keys=True, allow_nan=False).encode())


# Read and write YAML configs. A config is a mapping with string keys.


LIMIT = strict_yaml.MAX_BYTES


def load_yaml(data: bytes, where: str) -> dict[str, JsonValue]:
    """Parse a YAML mapping with string keys.

    Raises:
        Malformed: the data is not a mapping, is too large, or has YAML features other than plain values.
    """
    value = strict_yaml.load_yaml(data, where=where)
    if not isinstance(value, dict):
        raise Malformed("the YAML document is not a mapping", where=where, cure=DOWNLOAD_OR_WRITE_AGAIN)
    return value


def dump_yaml(value: Mapping[str, object], read: str = "") -> bytes:
    """Return a mapping as YAML bytes, with the keys in the mapping's order.

    `read` is the YAML text of the source file, or empty. If this text contains an equal mapping, return the text's
    bytes unchanged, to keep its comments and layout.
    """
    import yaml

    if read and load_yaml(read.encode(), "what was read") == value:
        return read.encode()
    return bytes(yaml.safe_dump(value, sort_keys=False).encode())
