"""Read and write XLabs' LoRA for FLUX (https://github.com/XLabs-AI/x-flux). The files have no alpha.

The keys name processors of attention modules. In a double block, `qkv_lora1` and `proj_lora1` adapt the image's stream,
and `qkv_lora2` and `proj_lora2` adapt the text's stream. In a single block, `qkv_lora` adapts q, k and v, which are the
first three sevenths of linear1's outputs, and `proj_lora` adapts linear2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Target
from ..errors import WRITE_AGAIN, ShapeMismatch
from ..naming.image import rooted
from ._image.file import ImageKey, ImageModule, Metadata, Rules, tensor_names
from ._image.hints import ImageHints
from ._image.image_format import ImageFormat

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ._image.underscores import TargetPaths

_PLACES = {
    "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj", "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj", "qkv_lora": "linear1", "proj_lora": "linear2",
}  # fmt: skip

_STEMS = {place: word for word, place in _PLACES.items()}
_KEY = re.compile(
    r"(?:diffusion_model\.)?((double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora([12]?))\.(down|up)\.weight"
)
_PATH = re.compile(r"((?:double|single)_blocks\.\d+)\.(.+)")


class Xlabs(ImageFormat):
    """Files from x-flux."""

    url = "https://github.com/XLabs-AI/x-flux"
    description = "XLabs' LoRA for FLUX, in the processors of attentions, without a scaling"
    file = "lora.safetensors"
    methods = frozenset({"lora"})
    rules = Rules(slots=("down", "up"))
    naming = "native"
    rows = True

    def sniff(self, path: Path) -> bool:
        return any(map(self.parse, tensor_names(path)))

    def parse(self, key: str) -> ImageKey | None:
        match = _KEY.fullmatch(key)
        fits = match is not None and (match[2] == "double") == bool(match[3])
        return ImageKey(key, match[1], match[4]) if match is not None and fits else None

    def spell(self, stem: str, slot: str) -> str:
        return f"{stem}.{slot}.weight"

    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        return {stem: _target(module) for stem, module in modules.items()}

    def stem(self, target: Target, paths: TargetPaths, update: Update) -> str | None:
        match = _PATH.fullmatch(rooted(target.path)[1])
        word = _STEMS.get(match[2]) if match else None
        width = update.tensors["A"].shape[1] if "A" in update.tensors else 0
        rows = (0, 3 * width) if word == "qkv_lora" else None
        return f"{match[1]}.processor.{word}" if match and word and target.rows == rows else None

    def metadata(
        self, updates: Mapping[Target, tuple[Update, ...]], hints: ImageHints, stems: Mapping[str, str]
    ) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("format", "pt")]), True


def _target(module: ImageModule) -> Target:
    block, _, word = module.stem.partition(".processor.")
    path = f"transformer.{block}.{_PLACES[word]}"
    if word != "qkv_lora":
        return Target(path)
    down, up = module.need("down", "up")
    if len(down.shape) != 2 or up.shape[:1] != (3 * down.shape[1],):
        why = f"up is {list(up.shape)}, down is {list(down.shape)}; there must be three times as many outputs as inputs"
        raise ShapeMismatch(why, where=module.where, cure=WRITE_AGAIN)
    return Target(path, rows=(0, up.shape[0]))
