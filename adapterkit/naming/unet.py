"""The U-Net of Stable Diffusion 1, 2 and XL, as LDM names it and as diffusers does.

Sources: `openaimodel.py` of CompVis' latent-diffusion and Stability's generative-models; `unet_2d_condition.py` of
diffusers. Blocks are counted through in LDM, by level in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

LAYERS, LEVELS = 2, 4
"""Layers a level on the way down, one more on the way up; levels of SD 1 and 2, of which XL has three."""

_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

_TRANSFORMER = (
    *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)

_ATTENTION = {name: name for name in ("norm", "proj_in", "proj_out")} | {
    name: name for name in (f"transformer_blocks.#.{part}" for part in _TRANSFORMER)
}


@cache
def pairs() -> tuple[tuple[str, str], ...]:
    """(LDM's pattern, diffusers' pattern) of every module; an upsampler's convolution is in two LDM places."""
    return (*_ENDS.items(), *_inside(_resnets(), _RESNET), *_inside(_attentions(), _ATTENTION), *_samplers())


@cache
def any_blocks() -> tuple[str, ...]:
    """diffusers' patterns with any numbers of blocks and layers: U-Nets that are neither of the three."""
    return tuple(dict.fromkeys(re.sub(r"(?<=s\.)\d+", "#", theirs) for _, theirs in pairs()))


def _inside(blocks: Iterator[tuple[str, str]], parts: dict[str, str]) -> Iterator[tuple[str, str]]:
    return ((f"{a}.{c}", f"{b}.{d}") for a, b in blocks for c, d in parts.items())


def _layers() -> Iterator[tuple[str, str, int]]:
    for level in range(LEVELS):
        for layer in range(LAYERS):
            yield f"input_blocks.{1 + level * (LAYERS + 1) + layer}", f"down_blocks.{level}", layer
        for layer in range(LAYERS + 1):
            yield f"output_blocks.{level * (LAYERS + 1) + layer}", f"up_blocks.{level}", layer


def _resnets() -> Iterator[tuple[str, str]]:
    yield from ((f"middle_block.{2 * n}", f"mid_block.resnets.{n}") for n in (0, 1))
    yield from ((f"{ldm}.0", f"{level}.resnets.{layer}") for ldm, level, layer in _layers())


def _attentions() -> Iterator[tuple[str, str]]:
    yield "middle_block.1", "mid_block.attentions.0"
    yield from ((f"{ldm}.1", f"{level}.attentions.{layer}") for ldm, level, layer in _layers())


def _samplers() -> Iterator[tuple[str, str]]:
    for level in range(LEVELS - 1):
        down, up = (level + 1) * (LAYERS + 1), level * (LAYERS + 1) + LAYERS
        yield f"input_blocks.{down}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        yield f"output_blocks.{up}.2.conv", f"up_blocks.{level}.upsamplers.0.conv"
    # The upsampler stands behind the attention, which the first level of SD 1 and 2 lacks.
    yield f"output_blocks.{LAYERS}.1.conv", "up_blocks.0.upsamplers.0.conv"


XL_ONLY = (
    "up_blocks.0.attentions.",
    "add_embedding.",
    "output_blocks.0.1.",
    "output_blocks.1.1.",
    "output_blocks.2.2.",
)
"""What names of XL alone begin with."""

NOT_XL = (
    "down_blocks.0.attentions.",
    "down_blocks.3.",
    "up_blocks.2.attentions.",
    "up_blocks.3.",
    *(f"input_blocks.{n}." for n in ("1.1", "2.1", "9", "10", "11")),
    *(f"output_blocks.{n}." for n in ("6.1", "7.1", "8.1", "8.2", "9", "10", "11")),
)
"""What names of SD 1 and 2 alone begin with."""
