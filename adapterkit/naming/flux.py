"""FLUX's transformer, as Black Forest Labs name it and as diffusers does.

Sources: `model.py` of black-forest-labs/flux; `transformer_flux.py` of diffusers. BFL's qkv holds queries, keys and
values in equal thirds, linear1 those and four times as many outputs of the MLP. The two halves of the last modulation
are shift and scale in one, scale and shift in the other.
"""

from __future__ import annotations

from .pieces import Piece, Table, thirds, whole

_SINGLE = "single_transformer_blocks.#"
_DOUBLE = "transformer_blocks.#"

TABLE: Table = {
    "img_in": whole("x_embedder"),
    "txt_in": whole("context_embedder"),
    **{
        f"{ours}.{layer}_layer": whole(f"time_text_embed.{theirs}.linear_{n}")
        for ours, theirs in (
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        )
        for n, layer in ((1, "in"), (2, "out"))
    },
    "double_blocks.#.img_attn.qkv": thirds(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv")),
    "double_blocks.#.txt_attn.qkv": thirds(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
    "double_blocks.#.img_attn.proj": whole(f"{_DOUBLE}.attn.to_out.0"),
    "double_blocks.#.txt_attn.proj": whole(f"{_DOUBLE}.attn.to_add_out"),
    "double_blocks.#.img_attn.norm.query_norm": whole(f"{_DOUBLE}.attn.norm_q"),
    "double_blocks.#.img_attn.norm.key_norm": whole(f"{_DOUBLE}.attn.norm_k"),
    "double_blocks.#.txt_attn.norm.query_norm": whole(f"{_DOUBLE}.attn.norm_added_q"),
    "double_blocks.#.txt_attn.norm.key_norm": whole(f"{_DOUBLE}.attn.norm_added_k"),
    "double_blocks.#.img_mod.lin": whole(f"{_DOUBLE}.norm1.linear"),
    "double_blocks.#.txt_mod.lin": whole(f"{_DOUBLE}.norm1_context.linear"),
    "double_blocks.#.img_mlp.0": whole(f"{_DOUBLE}.ff.net.0.proj"),
    "double_blocks.#.img_mlp.2": whole(f"{_DOUBLE}.ff.net.2"),
    "double_blocks.#.txt_mlp.0": whole(f"{_DOUBLE}.ff_context.net.0.proj"),
    "double_blocks.#.txt_mlp.2": whole(f"{_DOUBLE}.ff_context.net.2"),
    "single_blocks.#.linear1": (
        *(Piece(f"{_SINGLE}.attn.to_{x}", n, n + 1, 7) for n, x in enumerate("qkv")),
        Piece(f"{_SINGLE}.proj_mlp", 3, 7, 7),
    ),
    "single_blocks.#.linear2": whole(f"{_SINGLE}.proj_out"),
    "single_blocks.#.modulation.lin": whole(f"{_SINGLE}.norm.linear"),
    "single_blocks.#.norm.query_norm": whole(f"{_SINGLE}.attn.norm_q"),
    "single_blocks.#.norm.key_norm": whole(f"{_SINGLE}.attn.norm_k"),
    "final_layer.linear": whole("proj_out"),
    "final_layer.adaLN_modulation.1": (
        Piece("norm_out.linear", 0, 1, 2, there=1),
        Piece("norm_out.linear", 1, 2, 2, there=0),
    ),
}
"""BFL's pattern -> the pieces of it in diffusers."""

RATIOS = {
    **{f"double_blocks.#.{x}_mlp.0": 4.0 for x in ("img", "txt")},
    **{f"double_blocks.#.{x}_mlp.2": 1 / 4 for x in ("img", "txt")},
    "single_blocks.#.linear1": 7.0,
    "single_blocks.#.linear2": 1 / 5,
}
"""BFL's pattern -> outputs by input: FLUX.2 has the same names for weights of other shapes."""

BLOCKS = {"double_blocks": 19, "single_blocks": 38, "transformer_blocks": 19, "single_transformer_blocks": 38}
"""First word of a name -> how many blocks there are."""
