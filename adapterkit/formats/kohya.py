"""kohya's sd-scripts: LoRA, LoCon and OFT for Stable Diffusion, FLUX and their text encoders, in one file.

A key joins three words: one for the part of the pipeline, the module's path with underscores for dots, and a slot.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.adapter import Target, Updates
from ..methods.oft import OFT
from ..naming.image import KOHYA, component_of, families, is_not_xl, is_xl, rooted
from ._format import FORMULA, Departure
from ._image import container, turned
from ._image.arguments import OPTIONS
from ._image.container import Metadata
from ._image.dialect import ALPHAS, PADDING, ImageFormat
from ._image.file import ImageKey, ImageModule, Rules
from ._image.hints import ImageHints
from ._image.underscores import prefixes_of, resolve, stem_of

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Lazy
    from ._image.deciding import Origin
    from ._image.translate import Changed, Losses


SLOTS = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha",
    "dora": "dora_scale", "oft_blocks": "oft_blocks",
}  # fmt: skip

_WORDS = {word: slot for slot, word in SLOTS.items()} | {"oft_R.weight": "oft_R", "oft_R.scaled_oft": "oft_scaled"}
"""A map from the endings of keys to slots; `oft_R` is OneTrainer's and is only read, not written."""

_KEY = re.compile(
    r"((?:lora_unet|lora_transformer|lora_te[1234]?|lora_prior_(?:unet|te)|oft_unet|Hunyuan_video_I2V_lora)_[^.]+)\.(.+)"
)


class Kohya(ImageFormat):
    """Files of sd-scripts, and of tools that write the same keys."""

    url = "https://github.com/kohya-ss/sd-scripts"
    description = "kohya's sd-scripts: LoRA, LoCon, DoRA and OFT for image models; module names have underscores"
    departures: ClassVar[Mapping[str, Departure]] = ALPHAS | OPTIONS | PADDING
    compat = frozenset({FORMULA})
    bundles = True
    file = "lora.safetensors"
    methods = frozenset({"dora", "lora", "oft", "weight_norm"})
    rules = Rules(alpha_needed=True, oft_zero=False, slots=tuple(SLOTS))

    def sniff(self, path: Path) -> bool:
        keys = container.names(path)
        return any(map(self.parse, keys)) and not any(key.startswith("lycoris_") or _foreign(key) for key in keys)

    def parse(self, key: str) -> ImageKey | None:
        found = _KEY.fullmatch(key)
        if found is None or not (found[2] in _WORDS or turned.PART.fullmatch(found[2])):
            return None
        if found[1].startswith("oft_unet_") != found[2].startswith("oft_blocks") and found[2] != "alpha":
            return None
        return ImageKey(key, found[1], _WORDS.get(found[2], found[2]))

    def spell(self, stem: str, slot: str) -> str:
        bare, _, part = stem.partition(".")
        word = SLOTS.get(slot, slot)
        return f"{bare}.{word}.{part}" if part and slot == "oft_blocks" else f"{bare}.{word}"

    def modules(self, tensors: Mapping[str, Lazy]) -> dict[str, ImageModule]:
        return {part.stem: part for module in super().modules(tensors).values() for part in turned.parts(module)}

    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        # Resolve whole modules: parts of one module, such as q, k and v, may be trained separately.
        whole = {stem.partition(".")[0]: module for stem, module in modules.items()}
        paths = resolve(whole, metadata, base)
        rows = turned.rows_of(modules)
        return {stem: Target(paths[stem.partition(".")[0]], rows=rows.get(stem)) for stem in modules}

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Translate targets: XL's U-Net to LDM's naming, SD 1 and 2 to diffusers', transformers to their authors'."""
        from ._image.deciding import candidates, denoiser_targets
        from ._image.translate import in_naming

        inside = {target: each for target, each in updates.items() if component_of(target.path) == "unet"}
        others = {target: each for target, each in updates.items() if target not in inside}
        paths = [rooted(target.path)[1] for target in inside]
        # Keep a base's names, whatever they are: a reader resolves stems against the names of the same base.
        origin = replace(origin, naming=KOHYA) if origin.inside else origin
        turned_there = [t for t, each in others.items() if any(isinstance(update, OFT) for update in each)]
        if turned_there and not origin.families:
            trained = tuple(family.name for family in families() if family.facts.sd_scripts)
            fitting = candidates(others, denoiser_targets(others, kept), origin)
            if fitting and not any(family.name in trained for family in fitting):
                why = f"sd-scripts has no OFT for {fitting[0].title}"
                return dict(updates), [(target, why) for target in turned_there]
            origin = replace(origin, families=trained)
        moved, losses = in_naming(others, KOHYA, kept, origin, fold=fold)
        told = is_xl(paths) or is_not_xl(paths) or prefixes_of([target.path for target in inside])
        unets, more = in_naming(inside, KOHYA, kept, origin, fold=fold) if told else (inside, [])
        changed = {**unets, **moved}
        return changed, [*losses, *more, *turned.uneven(changed)]

    def stem(self, target: Target, paths: Iterable[str], update: Update) -> str | None:
        if not isinstance(update, OFT):
            return None if target.rows else stem_of(target.path, paths)
        stem = stem_of(target.path, paths, tag="oft_unet")
        if stem is None or not stem.startswith("oft_unet_"):
            return None
        part = turned.number_of(target)
        if turned.of_flux(target):
            return None if part is None else f"{stem}.{part}"
        return None if target.rows else stem

    def metadata(self, updates: Updates, hints: ImageHints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("ss_network_module", "networks.lora")]), False


def _foreign(key: str) -> bool:
    """Whether a key with one of kohya's prefixes has a slot that only LyCORIS uses."""
    found = _KEY.fullmatch(key)
    slot = found[2] if found else ""
    return bool(found) and slot.startswith(LYCORIS) and not key.startswith("oft_unet_")


LYCORIS = (
    "hada_", "lokr_", "oft_blocks", "a1.", "a2.", "b1.", "b2.", "bm.", "w_norm", "b_norm", "diff", "on_input",
    "q_layer", "p_layer", "lambda_layer", "rescale",
)  # fmt: skip
"""Prefixes of the slots that LyCORIS has and sd-scripts lacks."""
