"""MLX-LM's adapters: a folder with `adapters.safetensors` and `adapter_config.json`; LoRA, DoRA and whole parameters.

Module names are those of MLX's models, and mostly equal those in transformers. Factors of linear layers are transposed,
compared with the papers; factors of stacked experts are not. All modules share one scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AdapterkitError
from ...io.checkpoint import read_json
from ...io.inputs import read_input
from .._folders import folder_of
from .._format import Format
from .container import CONFIG, TENSORS, save, sniff, tensors_of

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint


class Mlx(Format):
    """Folders from MLX-LM."""

    url = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md"
    description = "MLX-LM: adapter_config.json with adapters.safetensors"
    methods = frozenset({"lora", "dora", "replacement"})
    owns = frozenset({CONFIG, TENSORS})

    def sniff(self, path: Path) -> bool:
        return sniff(path)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        from .reader import Modules, decode

        tensors, config = tensors_of(path), folder_of(path) / CONFIG
        try:
            return decode(read_json(config, strict=True), read_input(config).decode("utf-8"), tensors, Modules(base))
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .writer import written

        text, tensors, metadata, lines = written(adapter, on_loss, base)
        save(path, text, tensors, metadata)
        return lines
