"""FLUX.2's transformer, as Black Forest Labs name it and as diffusers does, where it has FLUX.1's names.

Source: `transformer_flux2.py` and `lora_conversion_utils.py` of diffusers. The names of a double block are those of
FLUX.1, but its MLP is gated: `img_mlp.0` has six times as many outputs as inputs, not four. Only the attention is
translated here.
"""

from __future__ import annotations

from .pieces import Table, thirds, whole

_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"

TABLE: Table = {
    "img_in": whole("x_embedder"),
    "txt_in": whole("context_embedder"),
    "double_blocks.#.img_attn.qkv": thirds(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv")),
    "double_blocks.#.txt_attn.qkv": thirds(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
    "double_blocks.#.img_attn.proj": whole(f"{_DOUBLE}.attn.to_out.0"),
    "double_blocks.#.txt_attn.proj": whole(f"{_DOUBLE}.attn.to_add_out"),
    "double_blocks.#.img_attn.norm.query_norm": whole(f"{_DOUBLE}.attn.norm_q"),
    "double_blocks.#.img_attn.norm.key_norm": whole(f"{_DOUBLE}.attn.norm_k"),
    "double_blocks.#.txt_attn.norm.query_norm": whole(f"{_DOUBLE}.attn.norm_added_q"),
    "double_blocks.#.txt_attn.norm.key_norm": whole(f"{_DOUBLE}.attn.norm_added_k"),
    "final_layer.linear": whole("proj_out"),
}
"""BFL's pattern -> the pieces of it in diffusers."""

ALONE = (
    *(f"double_blocks.#.{x}_mlp.{n}" for x in ("img", "txt") for n in (0, 2)),
    *(f"single_blocks.#.{part}" for part in ("linear1", "linear2", "norm.query_norm", "norm.key_norm")),
    *(f"{x}.lin" for x in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")),
    *(f"{x}.{layer}_layer" for x in ("time_in", "guidance_in") for layer in ("in", "out")),
    "final_layer.adaLN_modulation.1",
)
"""BFL's modules that are not translated."""

THEIRS = (
    *(f"{_DOUBLE}.{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")),
    *(f"{_SINGLE}.attn.{part}" for part in ("to_qkv_mlp_proj", "to_out", "norm_q", "norm_k")),
    *(f"{x}.linear" for x in ("double_stream_modulation_img", "double_stream_modulation_txt")),
    *(f"time_guidance_embed.{x}_embedder.linear_{n}" for x in ("timestep", "guidance") for n in (1, 2)),
    "single_stream_modulation.linear",
    "norm_out.linear",
)
"""diffusers' modules that are not translated."""

RATIOS = {
    **{f"double_blocks.#.{x}_mlp.0": 6.0 for x in ("img", "txt")},
    **{f"double_blocks.#.{x}_mlp.2": 1 / 3 for x in ("img", "txt")},
    "single_blocks.#.linear1": 9.0,
    "single_blocks.#.linear2": 1 / 4,
}
"""BFL's pattern -> outputs by input."""
