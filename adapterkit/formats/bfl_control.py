"""Read and write Black Forest Labs' control LoRA for FLUX.

Modules have the names of Black Forest Labs' own code (native names). Each LoRA has a bias, `lora_B.bias`, but no alpha.
The file also has new scales of norms, which replace the base's scales. The LoRA of `img_in` has more input channels
than the base's `img_in`, so the LoRA only fits a base whose `img_in` was enlarged with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Target, Updates
from ..naming.image import component_of, families_of, rooted
from ._image.file import ImageKey, ImageModule, Metadata, Rules, tensor_names
from ._image.hints import ImageHints
from ._image.image_format import ImageFormat

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ._image.deciding import Origin
    from ._image.translate import Changed, Losses
    from ._image.underscores import TargetPaths

SLOTS = {"down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias"}

_WORDS = {word: slot for slot, word in SLOTS.items()}
_ROOT = r"(?:double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
_KEY = re.compile(rf"({_ROOT}(?:\..+)?)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)")
_NORM = re.compile(r"(?:double_blocks\.\d+\.(?:img|txt)_attn|single_blocks\.\d+)\.norm\.(?:query|key)_norm\.scale")


class BflControl(ImageFormat):
    """Black Forest Labs' control LoRAs, such as FLUX.1 Depth and FLUX.1 Canny."""

    url = "https://github.com/black-forest-labs/flux/blob/main/src/flux/modules/lora.py"
    description = "Black Forest Labs' control LoRA for FLUX: native names, biases, scales of norms"
    file = "lora.safetensors"
    methods = frozenset({"lora", "replacement"})
    rules = Rules(slots=(*SLOTS, "set_weight"))
    naming = "native"

    def sniff(self, path: Path) -> bool:
        keys = tensor_names(path)
        # Other models also have modules such as `final_layer`, so accept the file only if FLUX has every module that
        # the file names.
        parsed = list(map(self.parse, keys))
        stems = {key.stem for key in parsed if key is not None and key.slot != "set_weight"}
        return None not in parsed and bool(stems) and all(map(_of_flux, stems))

    def parse(self, key: str) -> ImageKey | None:
        if _NORM.fullmatch(key):
            return ImageKey(key, key, "set_weight")
        match = _KEY.fullmatch(key)
        return ImageKey(key, match[1], _WORDS[match[2]]) if match else None

    def spell(self, stem: str, slot: str) -> str:
        return stem if slot == "set_weight" else f"{stem}.{SLOTS.get(slot, slot)}"

    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        return {stem: Target(f"transformer.{stem}") for stem in modules}

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Translate targets to native names.

        If a target's updates replace a norm, append `.scale` to the target's path, because the norm's parameter has the
        native name `scale`.
        """
        changed, losses = super().renamed(updates, kept, origin, fold=fold)
        return {_scale(target, group): group for target, group in changed.items()}, losses

    def stem(self, target: Target, paths: TargetPaths, update: Update) -> str | None:
        rest = rooted(target.path)[1]
        if update.method == "replacement":
            return rest if _NORM.fullmatch(rest) else None
        return rest if _of_flux(rest) and target.rows is None and component_of(target.path) == "transformer" else None

    def metadata(
        self, updates: Mapping[Target, tuple[Update, ...]], hints: ImageHints, stems: Mapping[str, str]
    ) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("format", "pt")]), True


def _scale(target: Target, group: Iterable[Update]) -> Target:
    """If the updates replace a norm, return the target of the norm's parameter `scale`. Otherwise return `target`."""
    whole = all(update.method == "replacement" for update in group)
    norm = _NORM.fullmatch(f"{rooted(target.path)[1]}.scale")
    return replace(target, path=f"{target.path}.scale") if whole and norm else target


def _of_flux(name: str) -> bool:
    """Whether FLUX has a module with this name.

    A check of the prefix is not enough, because HunyuanVideo's blocks have the same prefixes as FLUX's blocks.
    """
    return any(family.name == "flux" for family in families_of(name, "native"))
