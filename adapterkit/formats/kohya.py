"""kohya's sd-scripts: LoRA, LoCon and OFT for Stable Diffusion, FLUX and their text encoders, in one file.

A key is a module's path with underscores for dots, behind a word for the part of the pipeline, and a slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter import Target
from ..methods.oft import OFT
from ..names.image import component_of, is_not_xl, is_xl, rooted
from ._image import container
from ._image.container import Metadata
from ._image.dialect import ImageFormat
from ._image.file import Key, Module, Rules
from ._image.hints import Hints
from ._image.translate import Changed, Losses, in_diffusers, in_native
from ._image.underscores import resolve, stem_of

if TYPE_CHECKING:
    from ..tensors.checkpoint import Checkpoint
    from ..updates import Update

    Updates = Mapping[Target, tuple[Update, ...]]

SLOTS = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha",
    "dora": "dora_scale", "oft_blocks": "oft_blocks",
}  # fmt: skip

_WORDS = {word: slot for slot, word in SLOTS.items()}
_KEY = re.compile(r"((?:lora_unet|lora_transformer|lora_te[123]?|oft_unet)_[^.]+)\.(.+)")


class Kohya(ImageFormat):
    """Files of sd-scripts, and of tools that write the same."""

    url = "https://github.com/kohya-ss/sd-scripts"
    description = "kohya's sd-scripts: LoRA, LoCon, DoRA and OFT for image models, modules named with underscores"
    file = "lora.safetensors"
    methods = frozenset({"dora", "lora", "oft"})
    rules = Rules(alpha_needed=True, oft_zero=False, slots=tuple(SLOTS))

    def sniff(self, path: Path) -> bool:
        keys = container.names(path)
        return any(map(self.parse, keys)) and not any(key.startswith("lycoris_") or _foreign(key) for key in keys)

    def parse(self, key: str) -> Key | None:
        found = _KEY.fullmatch(key)
        if found is None or found[2] not in _WORDS:
            return None
        turned = found[1].startswith("oft_unet_")
        if turned != (found[2] == "oft_blocks") and found[2] != "alpha":
            return None
        return Key(key, found[1], _WORDS[found[2]])

    def spell(self, stem: str, slot: str) -> str:
        return f"{stem}.{SLOTS.get(slot, slot)}"

    def targets(
        self, modules: Mapping[str, Module], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        return {stem: Target(path) for stem, path in resolve(modules, metadata, base).items()}

    def renamed(self, updates: Updates, kept: Iterable[str], *, fold: bool) -> tuple[Changed, Losses]:
        """XL's U-Net in LDM's naming, that of SD 1 and 2 in diffusers', transformers in their authors'."""
        inside = {target: each for target, each in updates.items() if component_of(target.path) == "unet"}
        others = {target: each for target, each in updates.items() if target not in inside}
        paths = [rooted(target.path)[1] for target in inside]
        moved, losses = in_native(others, kept, fold=fold)
        if is_xl(paths):
            unets, more = in_native(inside, kept, fold=fold)
        else:
            unets, more = in_diffusers(inside, kept) if is_not_xl(paths) else (inside, [])
        return {**unets, **moved}, [*losses, *more]

    def stem(self, target: Target, paths: Iterable[str], update: Update) -> str | None:
        turned = isinstance(update, OFT)
        stem = stem_of(target.path, paths, tag="oft_unet" if turned else "lora_unet")
        return None if target.rows or (turned and stem and not stem.startswith("oft_unet_")) else stem

    def metadata(self, updates: Updates, hints: Hints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("ss_network_module", "networks.lora")]), False


def _foreign(key: str) -> bool:
    """Whether a key with one of kohya's words before it has a slot of LyCORIS' own."""
    found = _KEY.fullmatch(key)
    slot = found[2] if found else ""
    return bool(found) and slot.startswith(LYCORIS) and not key.startswith("oft_unet_")


LYCORIS = (
    "hada_", "lokr_", "oft_blocks", "a1.", "a2.", "b1.", "b2.", "bm.", "w_norm", "b_norm", "diff", "on_input",
    "q_layer", "p_layer", "lambda_layer", "rescale",
)  # fmt: skip
"""What slots begin with that LyCORIS has and sd-scripts does not."""
