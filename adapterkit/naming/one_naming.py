"""Image and video transformers whose authors' names are diffusers' too, and those that are only recognised.

Sources: the modules of diffusers' models of these names; the key maps of its `lora_conversion_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
_QWEN = "transformer_blocks.#"
_LTX = "transformer_blocks.#"
_MOE = ("gate", *(f"{part}.w{n}" for part in ("shared_experts", "experts.#") for n in (1, 2, 3)))


def _z_image() -> Iterator[str]:
    for blocks in ("layers", "noise_refiner", "context_refiner"):
        yield from (f"{blocks}.#.attention.{part}" for part in _ATTENTION)
        yield from (f"{blocks}.#.feed_forward.w{n}" for n in (1, 2, 3))
        yield from (f"{blocks}.#.{norm}{n}" for norm in ("attention_norm", "ffn_norm") for n in (1, 2))
        yield f"{blocks}.#.adaLN_modulation.0"
    yield from (f"{embedder}.{n}" for embedder in ("t_embedder.mlp", "cap_embedder") for n in (0, 1, 2))


def _hidream() -> Iterator[str]:
    for blocks in ("double_stream_blocks", "single_stream_blocks"):
        for text in ("", "_t"):
            yield from (f"{blocks}.#.block.attn1.{part}{text}" for part in ("to_q", "to_k", "to_v", "to_out"))
            yield from (f"{blocks}.#.block.attn1.{part}{text}" for part in ("q_rms_norm", "k_rms_norm"))
            yield from (f"{blocks}.#.block.ff_{part}" for part in _MOE if text)
        yield from (f"{blocks}.#.block.ff_{x}.w{n}" for x in ("i", "t") for n in (1, 2, 3))
        yield from (f"{blocks}.#.block.ff_i.{part}" for part in _MOE)
        yield f"{blocks}.#.block.adaLN_modulation.1"
    yield from (
        "caption_projection.#.linear",
        "x_embedder.proj",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    )
    yield from (f"{x}_embedder.{y}.linear_{n}" for x, y in (("t", "timestep_embedder"),) for n in (1, 2))
    yield from (f"p_embedder.pooled_embedder.linear_{n}" for n in (1, 2))


SAME = {
    "qwen_image": (
        *(f"{_QWEN}.attn.{part}" for part in _ATTENTION),
        *(f"{_QWEN}.attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{_QWEN}.attn.norm_added_{x}" for x in "qk"),
        *(f"{_QWEN}.{x}_{part}" for x in ("img", "txt") for part in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
        *(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
        *("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out"),
    ),
    "ltx": (
        *(f"{_LTX}.{attn}.{part}" for attn in ("attn1", "attn2") for part in _ATTENTION),
        *(f"{_LTX}.ff.net.{part}" for part in ("0.proj", "2")),
        *(f"caption_projection.linear_{n}" for n in (1, 2)),
        "proj_out",
    ),
    "z_image": tuple(_z_image()),
    "hidream": tuple(_hidream()),
}
"""Family -> its modules, which have one name in both namings."""

RECOGNISED = {
    "lumina2": (
        *(
            f"{blocks}.#.{part}"
            for blocks in ("layers", "noise_refiner", "context_refiner")
            for part in (
                "attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm", "adaLN_modulation.1",
                *(f"feed_forward.w{n}" for n in (1, 2, 3)),
                *(f"{norm}{n}" for norm in ("attention_norm", "ffn_norm") for n in (1, 2)),
            )
        ),
        *("x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1"),
        *("final_layer.linear", "final_layer.adaLN_modulation.1"),
    ),
}  # fmt: skip
"""Family -> its modules in its authors' naming; diffusers calls them otherwise, and nothing translates them yet."""
