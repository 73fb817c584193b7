"""Read and write AdapterHub folders: `adapter_config.json` and `pytorch_adapter.bin` or `adapter.safetensors`.

A tensor's key contains the adapter's name and the path of a module in the saved model. This path begins with the path
of the base inside the saved model. The config's sub-dict `config` and the tensors determine the method. For each value
of `architecture` in this sub-dict, a class (the *family*) converts tensors to updates and back. See
spec/formats/adapterhub.toml.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import AdapterkitError, Malformed, StorageError, Unsupported
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.checkpoint import read_json
from ...io.inputs import open_input
from ...io.lazy import Lazy, as_torch
from ...io.strict_json import load_json
from .._containers import folder_of, make_folder, read_tensors
from .._format import FORMULA, Departure, Format, derived

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint


# Define the values of `compat`. `formula` selects the paper's formula for methods that the adapters library computes
# differently. `noreft` and `direft` select the method of an ambiguous file.


DEPARTURES = {
    "dora_norm_and_bias": Departure(
        "dora_outputs: the norm is that of W + B @ A, without the scaling; m / norm multiplies the weight and the bias",
        "dora: the norm is that of W + scaling * B @ A, and the bias is unchanged",
    ),
    "lora_before_1_1": Departure(
        "LoRA in files from before adapters 1.1 has the scaling 1, even inside a union",
        "alpha / r",
    ),
}

REFT = ("noreft", "direft")
"""The two ReFT methods without orthogonality. The adapters library writes the same file for both methods."""

# Load and save an AdapterHub folder: a JSON config, one tensor file, and optional further files.


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
"""The names of the files that mark a folder as a composition of adapters, each with a phrase for messages."""

OTHERS = ("peft_type", "fine_tune_type", "lora_parameters")
"""Keys that occur in configs of PEFT and MLX, but not of AdapterHub. All three tools name the config file `CONFIG`."""

MAX_SNIFF = 16 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """The contents of an AdapterHub folder.

    Attributes:
        config: the contents of `adapter_config.json`.
        tensors: the tensors by key.
        file: the name of the tensor file.
        interface: the contents of `adapter_interface.json`, or None if there is no such file. This file lists the
            module names of a model that the adapters library does not know.
        head: the config of the prediction head that was saved with the adapter; None if there is no head.
        head_tensors: the head's tensors by key.
        head_file: the name of the head's tensor file; None if there is no head.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Lazy]
    file: str = SAFETENSORS
    interface: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None
    head_tensors: Mapping[str, Lazy] = field(default_factory=dict)
    head_file: str | None = None


def sniff(path: Path) -> bool:
    """Whether `path` is an AdapterHub folder with an adapter or a composition, or a file in such a folder."""
    if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS, TORCH):
        return False
    folder = folder_of(path)
    try:
        with open_input(folder / CONFIG) as file:
            text = file.read(MAX_SNIFF).decode("utf-8", "replace")
    except (OSError, AdapterkitError):
        return any((folder / name).is_file() for name in COMPOSITIONS)
    try:
        config = load_json(text)
    except (ValueError, RecursionError):
        return '"adapters.' in text and not any(f'"{key}"' in text for key in OTHERS)
    return _is_config(config)


def load(path: Path) -> Content:
    """Load the contents of a folder.

    Args:
        path: the folder, its config or its tensor file. In a folder, the safetensors file takes precedence over `.bin`.

    Raises:
        StorageError: the config or the tensor file is missing.
        Malformed: one of the files is damaged, or the config is not AdapterHub's.
        Unsupported: the folder has a composition of adapters.
    """
    folder = folder_of(path)
    _check_single(folder)
    weights = path if path.is_file() and path.name != CONFIG else _first(folder, (SAFETENSORS, TORCH))
    if weights is None:
        why, cure = f"the folder has neither {SAFETENSORS} nor {TORCH}", "Download the tensor file, too"
        raise StorageError(why, path=folder, cure=cure)
    config = read_json(folder / CONFIG, strict=True)
    if not _is_config(config):
        why = "this is not an AdapterHub config: the config has no sub-dict `config`, or has keys of another tool"
        raise Malformed(
            why,
            path=folder / CONFIG,
            where="config",
            cure="Name the right format with --from (format=), or omit --from, so that adapterkit detects the format",
        )
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
    """Write the folder. Write the config last, so that readers reject an incomplete folder.

    Raises:
        StorageError: the folder cannot be created or written.
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
            why = f"this is {what}, not one adapter"
            cure = "Read the subfolders of its adapters one by one, or load the composition with ak.torch.compose.load"
            raise Unsupported(why, path=folder / name, cure=cure)
    raise StorageError(
        f"there is no {CONFIG} next to the tensor file",
        path=folder,
        cure="Download the config, which states the method and the settings",
    )


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


# The format.


def _methods() -> frozenset[str]:
    from .families import FAMILIES

    return frozenset(method for family in FAMILIES.values() for method in family.methods)


class AdapterHub(Format):
    """Folders from the `adapters` library, and from its predecessor adapter-transformers."""

    url = "https://docs.adapterhub.ml/loading.html"
    description = "AdapterHub's adapters: adapter_config.json with pytorch_adapter.bin or adapter.safetensors"
    models = "language"
    methods = derived(_methods)
    departures: ClassVar[Mapping[str, Departure]] = DEPARTURES
    compat = frozenset({FORMULA, *REFT})
    owns = frozenset({CONFIG, SAFETENSORS, TORCH, INTERFACE, HEAD_CONFIG, *HEADS})

    def sniff(self, path: Path) -> bool:
        return sniff(path)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        from .conversion import decode

        try:
            return decode(load(path), compat=compat, base=base)
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .conversion import encode

        content, lines = encode(adapter, on_loss=on_loss, base=base)
        save(path, content)
        return lines
