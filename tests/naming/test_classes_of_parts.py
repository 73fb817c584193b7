"""Classes of transformers that store one part of their family's model, or the family's model with another head.

The names are those that `save_pretrained` of transformers 5.24 writes.
"""

from __future__ import annotations

import pytest

from adapterkit.naming.architectures import architecture_of
from adapterkit.naming.moves import Move, Names, PathPart
from adapterkit.naming.resolver import resolve

VISION = [f"vision_encoder.blocks.{n}.{name}" for n in range(2) for name in ("attn.qkv", "attn.proj", "mlp.c_fc")]


def placed(model_type: str, target: str, *stored: str) -> tuple[Move, ...]:
    """The places of a target in a base of these modules."""
    paths = {path for name in stored for path in (name, f"{name}.weight")}
    found = resolve([target], Names(paths), architecture=architecture_of({"model_type": model_type}))
    return found.moves.get(target, ())


def templates(model_type: str) -> list[str]:
    """All names of a family on hubs, of its first layers."""
    architecture = architecture_of({"model_type": model_type})
    assert architecture is not None
    return [name.replace("#", "0") for name in architecture.templates("hub")]


@pytest.mark.parametrize("head", ["depth_head", "normals_head", "segmentation_head"])
def test_each_head_of_tips_has_its_own_name(head: str) -> None:
    stored = (*VISION, f"{head}.{head}", f"{head}.project", f"{head}.reassemble.readout_projects.0")
    assert placed("tipsv2_dpt", "decoder.head", *stored) == (Move(f"{head}.{head}"),)
    (move,) = placed("tipsv2_dpt", "neck.reassemble_stage.readout_projects.0.layers.0", *stored)
    assert move == Move(f"{head}.reassemble.readout_projects.0")
    (move,) = placed("tipsv2_dpt", "backbone.encoder.layer.1.attention.k_proj", *stored)
    assert move == Move("vision_encoder.blocks.1.attn.qkv", into=PathPart(1, 3))


def test_instance_segmentation_has_weights_beside_those_of_detection() -> None:
    stored = [*templates("rf_detr"), "bbox_embed.layers.0", "class_embed"]
    moves = placed("rf_detr", "model.model.decoder.ref_point_head.layers.0", *stored)
    assert moves == (Move("transformer.decoder.ref_point_head.layers.0"),)
    assert placed("rf_detr", "blocks.0.pointwise_conv", *stored) == (Move("segmentation_head.blocks.0.pwconv1"),)


def thinker() -> list[str]:
    """Qwen3-Omni's thinker without its head: the towers as in the whole model, the text under a prefix of its own."""
    text = [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
        "self_attn.k_norm", "input_layernorm", "post_attention_layernorm", "mlp.gate",
    ]  # fmt: skip
    text += [f"mlp.experts.{e}.{name}" for e in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
    towers = [name for name in templates("qwen3_omni_moe_thinker") if not name.startswith(("model.", "lm_head"))]
    ends = ["language_model.embed_tokens", "language_model.norm"]
    return [*towers, *ends, *(f"language_model.layers.0.{name}" for name in text)]


def test_one_part_may_have_another_prefix() -> None:
    moves = placed(
        "qwen3_omni_moe_thinker", "language_model.layers.0.mlp.experts.gate_up_proj", *thinker()
    )  # fmt: skip
    assert [(move.path, move.take, move.expert) for move in moves] == [
        (f"language_model.layers.0.mlp.experts.{e}.{name}", PathPart(part, 2), e)
        for part, name in enumerate(("gate_proj", "up_proj"))
        for e in range(2)
    ]


def test_a_part_keeps_its_own_names_where_the_base_has_any_of_them() -> None:
    # One layer under the naming's own prefix: the other prefix is then no rule of this base.
    stored = [*thinker(), "model.layers.0.mlp.gate"]
    assert placed("qwen3_omni_moe_thinker", "language_model.layers.0.mlp.experts.gate_up_proj", *stored) == ()


def test_a_tower_that_transformers_4_named_twice() -> None:
    four, five = (f"model.vision_model.{inside}encoder.layers.0.mlp.fc1" for inside in ("vision_model.", ""))
    assert placed("deepseek_vl", four, five) == (Move(five),)
    assert placed("deepseek_vl", five, four) == (Move(four),)


def test_a_text_model_alone_lacks_the_prefix_of_its_part() -> None:
    stored = [f"layers.0.self_attn.{name}_proj" for name in "qkvo"] + ["embed_tokens", "norm"]
    stored += [f"layers.0.mlp.experts.{e}.{name}" for e in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
    moves = placed("unlimited_ocr_text", "layers.0.mlp.experts.down_proj", *stored)
    assert moves == tuple(Move(f"layers.0.mlp.experts.{e}.down_proj", expert=e) for e in range(2))


def test_a_module_with_a_bias_alone_is_not_the_place_of_its_weight() -> None:
    paths = {"proj", "proj.bias", "weight", "model.norm", "model.norm.weight"}
    architecture = architecture_of({"model_type": "jev"})
    found = resolve(["proj", "model.norm"], Names(paths), architecture=architecture)
    assert found.moves == {"proj": (Move("weight"),), "model.norm": (Move("model.norm"),)}
    # Without that weight the module itself is left, whose bias an update may change.
    found = resolve(["proj"], Names(paths - {"weight"}), architecture=architecture)
    assert found.moves == {"proj": (Move("proj"),)}
