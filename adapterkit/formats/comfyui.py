"""ComfyUI's own names: the model's dotted paths behind `diffusion_model.`, with any of the slots its loader knows.

ai-toolkit, musubi-tuner and others write the same with `lora_A` and `lora_B`, and no alpha. DiffSynth, the Lightning
distillations, fal and ACE-Step leave the prefix out or write PEFT's; their names must all be those of one known family,
since nothing else tells such a file from one of another kind of model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter import Target
from ..errors import TargetNotFound
from ..naming.image import COMFYUI, component_of, denoiser_of, encoders, families, families_of, rooted
from ._image import container
from ._image.container import Metadata
from ._image.dialect import ImageFormat
from ._image.file import Key, Module, Rules
from ._image.hints import Hints

if TYPE_CHECKING:
    from ..tensors.checkpoint import Checkpoint
    from ..updates import Update

SLOTS = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha",
    "dora": "dora_scale",
    **{f"hada_{x}": f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{x: x for x in ("diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight")},
}  # fmt: skip

_WORDS = {word: slot for slot, word in SLOTS.items()} | {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up", "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
}  # fmt: skip

_ENDS = "|".join(re.escape(word) for word in sorted(_WORDS, key=len, reverse=True))
_KEY = re.compile(rf"((?:diffusion_model|text_encoders\.(?:clip_l|clip_g|t5xxl)\.transformer)\..+?)\.({_ENDS})")
_OTHER = re.compile(rf"((?:(?:base_model\.model|conditional_transformer|model\.diffusion_model)\.)?(.+?))\.({_ENDS})")
_DOTTED = re.compile(r"[A-Za-z]\w*(?:\.[\w-]+)*")

_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


class Comfyui(ImageFormat):
    """Files in ComfyUI's own names."""

    url = "https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/lora.py"
    description = "ComfyUI's own names behind diffusion_model., as ai-toolkit and others write them too"
    file = "lora.safetensors"
    differences = True
    methods = frozenset({"dense", "dora", "loha", "lokr", "lora", "replacement", "weight_norm"})
    rules = Rules(slots=(*SLOTS, "hada_", "lokr_"))
    naming = COMFYUI

    def sniff(self, path: Path) -> bool:
        keys = container.names(path)
        if any(map(_KEY.fullmatch, keys)):
            return True
        from .bfl_control import BflControl

        if BflControl().sniff(path):
            return False
        parsed = [_OTHER.fullmatch(key) for key in keys]
        return bool(parsed) and all(parsed) and bool(_families({each[2] for each in parsed if each is not None}))

    def parse(self, key: str) -> Key | None:
        found = _KEY.fullmatch(key)
        if found is not None:
            return Key(key, found[1], _WORDS[found[2]])
        other = _OTHER.fullmatch(key)
        return Key(key, other[1], _WORDS[other[3]]) if other and _DOTTED.fullmatch(other[2]) else None

    def spell(self, stem: str, slot: str) -> str:
        return f"{stem}.{SLOTS.get(slot, slot)}"

    def targets(
        self, modules: Mapping[str, Module], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        rests = [_rest(stem) for stem in modules if not stem.startswith("text_encoders.")]
        part, third = denoiser_of(rests), _third(rests)
        return {stem: Target(_path(stem, part, third)) for stem in modules}

    def stem(self, target: Target, paths: Iterable[str], update: Update) -> str | None:
        component, (_, rest) = component_of(target.path), rooted(target.path)
        if component is None or target.rows:
            return None
        if component in ("unet", "transformer"):
            return f"diffusion_model.{rest}"
        word = "t5xxl" if rest in encoders()["t5"] else _ENCODERS.get(component)
        return None if word is None else f"text_encoders.{word}.transformer.{rest}"

    def metadata(
        self, updates: Mapping[Target, tuple[Update, ...]], hints: Hints, stems: Mapping[str, str]
    ) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("format", "pt")]), False


_ROOTS = ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "conditional_transformer.")
"""What may stand before the names of a U-Net or a transformer; or nothing."""


def _rest(stem: str) -> str:
    """A module's name without what stands before it."""
    return stem.removeprefix(next((root for root in _ROOTS if stem.startswith(root)), ""))


def _families(names: Collection[str]) -> list[str]:
    """The families that have all of these names, generic ones aside."""
    return [f.name for f in families() if not f.facts.generic and all(name in f for name in names)]


def _path(stem: str, part: str, third: str) -> str:
    root, rest = rooted(stem)
    if not root.startswith("text_encoders."):
        return f"{part}.{_rest(stem)}"
    word = root.split(".")[1]
    encoder = third if word == "t5xxl" else {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}[word]
    if not encoder:
        why = "nothing in the file tells whose T5 this is: FLUX's second text encoder, or the third of SD 3"
        raise TargetNotFound(why, where=stem, cure="Read it together with the transformer's LoRA")
    return f"{encoder}.{rest}"


def _third(rests: Iterable[str]) -> str:
    """Where the T5 is, told by the transformer's names."""
    of = {"flux": "text_encoder_2", "sd3": "text_encoder_3"}
    fitting = [{family.name for family in families_of(rest, "native")} & of.keys() for rest in rests]
    known = {name for names in fitting if len(names) == 1 for name in names}
    return of[known.pop()] if len(known) == 1 else ""
