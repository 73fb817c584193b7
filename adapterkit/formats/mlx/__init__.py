"""MLX-LM's adapters: a folder with `adapters.safetensors` and `adapter_config.json`; LoRA, DoRA and whole parameters.

Names are those of MLX's models, nearly all of them transformers' own. Factors of a linear layer stand the other way
round than in the papers, those of stacked experts do not. One scale serves all modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapter import Adapter
from ...errors import AdapterkitError, Malformed, StorageError, storage_error
from ...methods.replacement import Replacement
from ...tensors import safetensors
from ...tensors.atomic import write_bytes
from ...tensors.checkpoint import read_json
from ...tensors.lazy import Lazy
from ...tensors.strict_json import load_json
from .._format import Format
from .._pairs import Leftovers, in_order, remembered
from .reader import CONFIG, FORMAT, Modules, decode
from .writer import encode, whole

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint

TENSORS = "adapters.safetensors"
METADATA = {"format": "mlx"}
MARKS = ("fine_tune_type", "lora_parameters")


class Hints(Leftovers, total=False):
    """The config and its text, the tensors' metadata, own names -> MLX's."""

    config: dict[str, Any]
    text: str
    metadata: dict[str, str]
    names: dict[str, str]


class Mlx(Format):
    """Folders of MLX-LM."""

    url = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md"
    description = "MLX-LM: adapter_config.json beside adapters.safetensors"
    methods = frozenset({"lora", "dora", "replacement"})

    def sniff(self, path: Path) -> bool:
        if not path.is_dir() and path.name != CONFIG and not path.name.endswith(TENSORS):
            return False
        try:
            config = read_json(_folder(path) / CONFIG)
        except AdapterkitError:
            return False
        return "peft_type" not in config and any(mark in config for mark in MARKS)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        folder = _folder(path)
        tensors = folder / TENSORS if path.is_dir() or path.name == CONFIG else path
        if not tensors.exists():
            raise StorageError(f"no {TENSORS}", path=folder, cure="Fetch the file of tensors as well")
        try:
            config = read_json(folder / CONFIG, strict=True)
            return decode(config, (folder / CONFIG).read_text("utf-8"), tensors, Modules(base))
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = remembered(adapter, FORMAT, Hints)
        only = all(isinstance(update, Replacement) for _, update in adapter)
        config, tensors, lines = whole(adapter, hints) if only else encode(adapter, hints, on_loss)
        text = json.dumps(dict(sorted(config.items())), indent=4)
        _save(path, _as_read(config, hints) or text, in_order(tensors, hints), hints.get("metadata", METADATA))
        return lines


def _as_read(config: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    """The text of the config that was read, where it says the same: its order of keys is in no other place."""
    text = str(hints.get("text", ""))
    try:
        return text if text and load_json(text) == config else ""
    except ValueError as error:
        raise Malformed(f"leftovers of MLX-LM are damaged ({error})", where="foreign", cure="Drop them") from None


def _save(folder: Path, text: str, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """Writes the folder. Its config goes away first and comes back last: without one it is no adapter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    safetensors.write(folder / TENSORS, tensors, metadata)
    write_bytes(folder / CONFIG, text.encode())


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
