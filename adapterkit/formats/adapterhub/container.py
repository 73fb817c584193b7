"""Load and save the folder: a config in JSON, one file of tensors, and optional files beside them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import AdapterkitError, Malformed, StorageError, Unsupported
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.checkpoint import read_json
from ...io.inputs import open_input
from ...io.lazy import Lazy, as_torch
from ...io.strict_json import load_json
from .._folders import folder_of, make_folder, read_tensors

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter.safetensors"
TORCH = "pytorch_adapter.bin"
INTERFACE = "adapter_interface.json"
HEAD_CONFIG = "head_config.json"
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
COMPOSITIONS = {
    "adapter_setup.json": "a composition of adapters",
    "adapter_fusion_config.json": "an AdapterFusion layer over several adapters",
}
"""Files of folders that contain no single adapter."""

OTHERS = ("peft_type", "fine_tune_type", "lora_parameters")
"""Keys of the configs of PEFT and MLX, whose files have the same name."""

MAX_SNIFF = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """The content of a folder.

    Attributes:
        config: the whole of `adapter_config.json`.
        tensors: key -> tensor.
        file: name of the file of tensors.
        interface: the plugin interface; it names the modules of models that the library does not know itself.
        head: config of the prediction head that was saved with the adapter, if any.
        head_tensors: the head's tensors, by key.
        head_file: name of the head's file of tensors.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Lazy]
    file: str = SAFETENSORS
    interface: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None
    head_tensors: Mapping[str, Lazy] = field(default_factory=dict)
    head_file: str | None = None


def sniff(path: Path) -> bool:
    """Whether a config of AdapterHub's is at or beside `path`, or a composition is."""
    if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS, TORCH):
        return False
    folder = folder_of(path)
    text = _start(folder / CONFIG)
    if text is None:
        return any((folder / name).is_file() for name in COMPOSITIONS)
    try:
        config = load_json(text)
    except (ValueError, RecursionError):
        return '"adapters.' in text and not any(f'"{key}"' in text for key in OTHERS)
    return _is_config(config)


def load(path: Path) -> Content:
    """Load the content of a folder.

    Args:
        path: the folder, its config or its file of tensors. In a folder, a safetensors file is preferred to a `.bin`.

    Raises:
        StorageError: the config or the file of tensors is missing.
        Malformed: one of them is damaged, or the config is not AdapterHub's.
        Unsupported: the folder holds a composition of adapters.
    """
    folder = folder_of(path)
    _check_single(folder)
    weights = path if path.is_file() and path.name != CONFIG else _first(folder, (SAFETENSORS, TORCH))
    if weights is None:
        why, cure = f"neither {SAFETENSORS} nor {TORCH}", "Fetch the file of tensors as well"
        raise StorageError(why, path=folder, cure=cure)
    config = read_json(folder / CONFIG, strict=True)
    if not _is_config(config):
        why = "not a config of AdapterHub's: no sub-dict `config` without another tool's keys"
        raise Malformed(why, path=folder / CONFIG, where="config", cure="Name its format, or let it be detected")
    head, head_weights = folder / HEAD_CONFIG, _first(folder, HEADS)
    return Content(
        config=config,
        tensors=read_tensors(weights),
        file=weights.name if weights.name in (SAFETENSORS, TORCH) else SAFETENSORS,
        interface=read_json(folder / INTERFACE, strict=True) if (folder / INTERFACE).exists() else None,
        head=read_json(head, strict=True) if head.exists() else None,
        head_tensors={} if head_weights is None else read_tensors(head_weights),
        head_file=None if head_weights is None else head_weights.name,
    )


def save(folder: Path, content: Content) -> None:
    """Write the folder, its config last: an interrupted folder without one is not taken for an adapter.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    make_folder(folder)
    _write(folder / content.file, content.tensors)
    if content.head_file is not None:
        _write(folder / content.head_file, content.head_tensors)
    for name, value in ((INTERFACE, content.interface), (HEAD_CONFIG, content.head), (CONFIG, content.config)):
        if value is not None:
            write_bytes(folder / name, json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode())


def _is_config(config: object) -> bool:
    if not isinstance(config, dict) or any(key in config for key in OTHERS):
        return False
    return isinstance(config.get("config"), dict) or str(config.get("version", "")).startswith("adapters.")


def _check_single(folder: Path) -> None:
    if (folder / CONFIG).exists():
        return
    for name, what in COMPOSITIONS.items():
        if (folder / name).exists():
            why = f"{what}, not one adapter"
            cure = "Read the sub-folders of its adapters one by one, or load it by ak.torch.compose.load"
            raise Unsupported(why, path=folder / name, cure=cure)
    raise StorageError(f"no {CONFIG} beside the tensors", path=folder, cure="Fetch it: it says what the tensors are")


def _start(path: Path) -> str | None:
    try:
        with open_input(path) as file:
            return file.read(MAX_SNIFF).decode("utf-8", "replace")
    except (OSError, AdapterkitError):
        return None


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _write(path: Path, tensors: Mapping[str, Lazy]) -> None:
    if path.suffix != ".bin":
        return safetensors.write(path, tensors, {})
    import torch

    loaded = {id(leaf): as_torch(leaf) for leaf in tensors.values()}
    buffer = io.BytesIO()
    torch.save({key: loaded[id(leaf)] for key, leaf in tensors.items()}, buffer)
    return write_bytes(path, buffer.getvalue())
