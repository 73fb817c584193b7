"""Find CLIP's modules in checkpoints that store a text encoder with OpenCLIP's names, as SDXL's and SD 2's files do.

OpenCLIP stores queries, keys and values in one parameter, `attn.in_proj_weight`. An update of one of them changes a
third of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.adapter import Target
from ...naming.image import component_of, rooted

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint

_ROOTS = {
    "text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
"""A map from diffusers' component to the prefixes of this text encoder in single-file checkpoints.

SD 2 and SDXL's refiner have only an OpenCLIP; SDXL has it beside a CLIP.
"""

_WORDS = {
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}  # fmt: skip
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")


def in_open_clip(target: Target, updates: Iterable[Update], base: Checkpoint) -> Target | None:
    """Return the target in the base's OpenCLIP; None if the base has no such module.

    Also return None if an update of queries, keys or values changes their bias, because the fused bias is a separate
    parameter.
    """
    match = _LAYER.fullmatch(rooted(target.path)[1])
    if match is None or target.rows is not None:
        return None
    number, word = match.groups()
    for root in _ROOTS.get(component_of(target.path) or "", ()):
        block = f"{root}transformer.resblocks.{number}."
        fused = base.tensors.get(f"{block}attn.in_proj_weight")
        if word in _PARTS and fused is not None and not any(update.changes_bias for update in updates):
            size = fused.shape[0] // len(_PARTS)
            start = _PARTS.index(word) * size
            return replace(target, path=f"{block}attn.in_proj_weight", rows=(start, start + size))
        if word in _WORDS and f"{block}{_WORDS[word]}.weight" in base.tensors:
            return replace(target, path=block + _WORDS[word])
    return None
