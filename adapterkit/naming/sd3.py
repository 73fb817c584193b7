"""Stable Diffusion 3's transformer, as Stability names it and as diffusers does.

Sources: `mmdit.py` of Stability-AI/sd3.5; `transformer_sd3.py` of diffusers. `attn2` is the second attention of
SD 3.5 medium.
"""

from __future__ import annotations

from .pieces import Piece, Table, thirds, whole

_OURS, _THEIRS = "joint_blocks.#", "transformer_blocks.#"

TABLE: Table = {
    "context_embedder": whole("context_embedder"),
    "x_embedder.proj": whole("pos_embed.proj"),
    "t_embedder.mlp.0": whole("time_text_embed.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": whole("time_text_embed.timestep_embedder.linear_2"),
    "y_embedder.mlp.0": whole("time_text_embed.text_embedder.linear_1"),
    "y_embedder.mlp.2": whole("time_text_embed.text_embedder.linear_2"),
    f"{_OURS}.x_block.attn.qkv": thirds(*(f"{_THEIRS}.attn.to_{x}" for x in "qkv")),
    f"{_OURS}.context_block.attn.qkv": thirds(*(f"{_THEIRS}.attn.add_{x}_proj" for x in "qkv")),
    f"{_OURS}.x_block.attn.proj": whole(f"{_THEIRS}.attn.to_out.0"),
    f"{_OURS}.context_block.attn.proj": whole(f"{_THEIRS}.attn.to_add_out"),
    f"{_OURS}.x_block.attn2.qkv": thirds(*(f"{_THEIRS}.attn2.to_{x}" for x in "qkv")),
    f"{_OURS}.x_block.attn2.proj": whole(f"{_THEIRS}.attn2.to_out.0"),
    f"{_OURS}.x_block.adaLN_modulation.1": whole(f"{_THEIRS}.norm1.linear"),
    f"{_OURS}.x_block.mlp.fc1": whole(f"{_THEIRS}.ff.net.0.proj"),
    f"{_OURS}.x_block.mlp.fc2": whole(f"{_THEIRS}.ff.net.2"),
    f"{_OURS}.context_block.mlp.fc1": whole(f"{_THEIRS}.ff_context.net.0.proj"),
    f"{_OURS}.context_block.mlp.fc2": whole(f"{_THEIRS}.ff_context.net.2"),
    "final_layer.linear": whole("proj_out"),
    "final_layer.adaLN_modulation.1": (
        Piece("norm_out.linear", 0, 1, 2, there=1),
        Piece("norm_out.linear", 1, 2, 2, there=0),
    ),
}
"""Stability's pattern -> the pieces of it in diffusers."""

ALONE = (f"{_OURS}.context_block.adaLN_modulation.1",)
"""Stability's modules that are not translated: the last block has its halves the other way round."""
