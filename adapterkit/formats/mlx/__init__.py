"""Read and write MLX-LM's adapters: a folder with `adapters.safetensors` and `adapter_config.json`.

The methods are LoRA, DoRA and the replacement of whole parameters. Module names are those of MLX's models; most of
these names are the same in transformers. For a linear layer, the stored A and B are the transposes of A and B in the
LoRA paper. For stacked experts, A and B are not transposed. The config has one scale for all modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AdapterkitError, StorageError
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.checkpoint import read_json
from ...io.inputs import read_input
from .._containers import folder_of, make_folder
from .._format import Format

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy


# Recognise and save an MLX-LM folder: a JSON config and one tensor file.


CONFIG = "adapter_config.json"
TENSORS = "adapters.safetensors"
MARKS = ("fine_tune_type", "lora_parameters")


def sniff(path: Path) -> bool:
    """Whether `path` is an MLX-LM folder, or a file in one.

    PEFT's config has the same file name. So the config must have a field that only MLX-LM writes, and no `peft_type`.
    """
    if not path.is_dir() and path.name != CONFIG and not path.name.endswith(TENSORS):
        return False
    try:
        config = read_json(folder_of(path) / CONFIG)
    except AdapterkitError:
        return False
    return "peft_type" not in config and any(mark in config for mark in MARKS)


def tensors_of(path: Path) -> Path:
    """Return the path of the tensor file, given the folder, its config, or the tensor file itself.

    Raises:
        StorageError: the tensor file is missing.
    """
    tensors = folder_of(path) / TENSORS if path.is_dir() or path.name == CONFIG else path
    if not tensors.exists():
        raise StorageError(f"the folder has no {TENSORS}", path=folder_of(path), cure="Download the tensor file, too")
    return tensors


def save(folder: Path, text: str, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """Write the folder. The config is written last, because readers reject a folder without a config as incomplete."""
    make_folder(folder)
    safetensors.write(folder / TENSORS, tensors, metadata)
    write_bytes(folder / CONFIG, text.encode())


# The format.


class Mlx(Format):
    """Folders from MLX-LM."""

    url = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md"
    description = "MLX-LM: adapter_config.json with adapters.safetensors"
    methods = frozenset({"lora", "dora", "replacement"})
    owns = frozenset({CONFIG, TENSORS})

    def sniff(self, path: Path) -> bool:
        return sniff(path)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        from .conversion import Modules, decode

        tensors, config = tensors_of(path), folder_of(path) / CONFIG
        try:
            return decode(read_json(config, strict=True), read_input(config).decode("utf-8"), tensors, Modules(base))
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .conversion import written

        text, tensors, metadata, lines = written(adapter, on_loss, base)
        save(path, text, tensors, metadata)
        return lines
