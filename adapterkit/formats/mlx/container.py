"""Recognise and save an MLX-LM folder: a JSON config and one tensor file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AdapterkitError, StorageError
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.checkpoint import read_json
from .._folders import folder_of, make_folder

if TYPE_CHECKING:
    from ...io.lazy import Lazy

CONFIG = "adapter_config.json"
TENSORS = "adapters.safetensors"
MARKS = ("fine_tune_type", "lora_parameters")


def sniff(path: Path) -> bool:
    """Whether the folder at `path`, or around the file `path`, has a config with a field of MLX-LM.

    PEFT's config has the same file name.
    """
    if not path.is_dir() and path.name != CONFIG and not path.name.endswith(TENSORS):
        return False
    try:
        config = read_json(folder_of(path) / CONFIG)
    except AdapterkitError:
        return False
    return "peft_type" not in config and any(mark in config for mark in MARKS)


def tensors_of(path: Path) -> Path:
    """Return the tensor file, given the folder or one of its files.

    Raises:
        StorageError: the tensor file is missing.
    """
    tensors = folder_of(path) / TENSORS if path.is_dir() or path.name == CONFIG else path
    if not tensors.exists():
        raise StorageError(f"the folder has no {TENSORS}", path=folder_of(path), cure="Fetch the tensor file, too")
    return tensors


def save(folder: Path, text: str, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """Write the folder. The config is written last, so that readers reject a folder whose writing was interrupted."""
    make_folder(folder)
    safetensors.write(folder / TENSORS, tensors, metadata)
    write_bytes(folder / CONFIG, text.encode())
