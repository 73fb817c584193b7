"""Prefixes and wrappers: which of several places a name means, and what is refused because nothing proves it."""

import numpy as np
import pytest

from adapterkit.core.adapter import Adapter, Foreign, Target
from adapterkit.errors import TargetNotFound
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming.binding import find_sites

LoRA = METHODS["lora"]
ATTENTION = [f"layers.{n}.self_attn.{x}_proj" for n in range(2) for x in "qkv"]


def found(asked, stored, model_type=None, partial=False):
    """Name in the adapter -> name in the base, where all weights have one shape."""
    update = LoRA(A=from_numpy(np.zeros((1, 4), "f4")), B=from_numpy(np.zeros((4, 1), "f4")))
    adapter = Adapter({Target(name): (update,) for name in asked})
    config = {"model_type": model_type} if model_type else None
    bound = find_sites(adapter, {f"{name}.weight": (4, 4) for name in stored}, partial=partial, config=config)
    return {origin.path: site.target.path for origin, site in zip(bound.origins, bound.sites, strict=True)}


def below(prefix, names=ATTENTION):
    return [prefix + name for name in names]


def test_the_half_that_a_name_says_is_meant_and_not_the_other_one():
    """As Whisper's adapters of PEFT on a model without a head, in a checkpoint with one."""
    stored = below("model.encoder.") + below("model.decoder.")
    for half in ("encoder.", "decoder."):
        asked = below(half)
        assert found(asked, stored, "whisper") == dict(zip(asked, below(f"model.{half}"), strict=True))


def test_an_encoder_is_not_placed_in_the_encoder_of_a_decoder():
    """ViT-MAE's class without a head, in the base that its class for pretraining saved."""
    inner = [f"layer.{n}.attention.attention.{x}" for n in range(2) for x in ("query", "key", "value")]
    stored = below("vit.encoder.", inner) + below("decoder.decoder_encoder.", inner)
    asked = [f"layers.{n}.attention.{x}_proj" for n in range(2) for x in "qkv"]
    assert found(asked, stored, "vit_mae") == dict(zip(asked, stored[:6], strict=True))


@pytest.mark.parametrize("model_type", [None, "llava"])
def test_a_vision_tower_is_not_placed_in_the_language_model(model_type):
    """Names of LLaVA's authors; both parts have layers of the same names, and here of the same shapes."""
    language, vision = below("language_model.model."), below("vision_tower.vision_model.encoder.")
    asked = below("model.vision_tower.vision_tower.vision_model.encoder.")
    assert found(asked, language + vision, model_type) == dict(zip(asked, vision, strict=True))
    with pytest.raises(TargetNotFound):
        found(asked, language, model_type)
    asked = below("model.")
    assert found(asked, language + vision, model_type) == dict(zip(asked, language, strict=True))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.", "decoder."), ("model.encoder.", "decoder."), ("vision_model.", "text_model."),
        ("model.visual.", "language_model.model."), ("audio_tower.", "vision_tower."), ("thinker.", "talker."),
        ("bert.", "roberta."), ("model.vit.", "deit."),
    ],
)  # fmt: skip
def test_what_prefixes_name_as_two_things_is_not_exchanged(ours, theirs):
    with pytest.raises(TargetNotFound):
        found(below(ours), below(theirs))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.language_model.", "language_model.model."), ("model.text_model.", "language_model."),
        ("model.model.", "model."), ("base_model.model.model.", "model."),
        ("base_model.model.model.language_model.", "language_model.model."), ("0.auto_model.", "bert."),
        ("0.auto_model.", "model."), ("", "0.auto_model."), ("model.visual.", "vision_tower."),
        ("model.", "thinker.model."), ("bert.", ""), ("vision_model.encoder.", "encoder."),
    ],
)  # fmt: skip
def test_other_prefixes_are_exchanged(ours, theirs):
    assert found(below(ours), below(theirs)) == dict(zip(below(ours), below(theirs), strict=True))


@pytest.mark.parametrize("model_type", [None, "gemma3_text", "llama", "qwen2_5_omni_thinker"])
@pytest.mark.parametrize(
    "part", ["model.vision_tower.vision_model.encoder.", "model.audio_tower.", "vision_tower.", "talker.model."]
)
def test_a_tower_is_not_placed_in_a_text_model(part, model_type):
    """The text model's layers have the names of the tower's, and here its shapes."""
    if model_type != "qwen2_5_omni_thinker" and part.startswith("talker."):
        return
    with pytest.raises(TargetNotFound):
        found(below(part), below("model."), model_type)


def test_the_thinker_of_a_whole_model_is_the_thinker_alone():
    asked = below("thinker.model.")
    assert found(asked, below("model."), "qwen2_5_omni_thinker") == dict(zip(asked, below("model."), strict=True))


def test_two_places_that_names_do_not_tell_apart_are_refused():
    with pytest.raises(TargetNotFound, match="the name can mean several modules"):
        found(below("model."), below("thinker.model.") + below("talker.model."))


def test_of_two_towers_the_one_is_meant_whose_word_stays():
    """Video-LLaVA: transformers 4 has a word more in the paths of both towers than transformers 5."""
    towers = ("image_tower.", "video_tower.")
    stored = [name for tower in towers for name in below(f"model.{tower}encoder.")]
    for model_type in (None, "video_llava"):
        asked = [name for tower in towers for name in below(f"model.{tower}vision_model.encoder.")]
        assert found(asked, stored, model_type) == dict(zip(asked, stored, strict=True))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.branch.", ("model.", "tower.")),  # `model` names no part: either could be the branch.
        ("model.text_branch.", ("text_branch.model.", "model.text_branch.inner.")),
        ("left.right.", ("left.a.", "right.b.")),
    ],
)
def test_words_that_two_places_keep_alike_prove_nothing(ours, theirs):
    with pytest.raises(TargetNotFound, match="the name can mean several modules"):
        found(below(ours), [name for prefix in theirs for name in below(prefix)])


@pytest.mark.parametrize(
    ("ours", "theirs"), [("lm_head.dense", "pooler.dense"), ("entity_predictions.decoder", "lm_head.decoder")]
)
@pytest.mark.parametrize("partial", [False, True])
def test_one_head_is_not_placed_in_another(ours, theirs, partial):
    """As LUKE's heads in a base that its class without heads saved, where the pooler has the shape of the head."""
    layers = below("encoder.")
    if partial:
        assert found([*layers, ours], [*layers, theirs], partial=True) == dict(zip(layers, layers, strict=True))
        return
    with pytest.raises(TargetNotFound, match=ours):
        found([*layers, ours], [*layers, theirs])


@pytest.mark.parametrize(
    "stored",
    [
        [name.replace(".self_attn", "._fsdp_wrapped_module.self_attn") for name in below("model.")],
        [name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn") for name in below("_orig_mod.model.")],
        [f"base_model.model.{name}.base_layer" for name in below("model.")],
    ],
    ids=["fsdp", "compiled", "peft"],
)
def test_wrappers_in_the_names_of_a_base(stored):
    """State dicts that were saved inside of FSDP, torch.compile and PEFT."""
    for asked in (below("model."), stored):
        assert found(asked, stored, "llama") == dict(zip(asked, stored, strict=True))


def test_a_base_that_has_a_part_of_the_layers():
    asked, stored = below("model."), below("model.")[:3]
    with pytest.raises(TargetNotFound, match="3 of 6 targets") as raised:
        found(asked, stored, "llama")
    assert "--allow-partial (allow_partial=True)" in raised.value.cure
    assert found(asked, stored, "llama", partial=True) == dict(zip(stored, stored, strict=True))
    assert found(asked, below("language_model.model.")[:3], partial=True).keys() == set(asked[:3])


def test_shards_with_names_of_two_kinds():
    asked = below("model.")
    stored = asked[:3] + [f"language_model.{name}" for name in asked[3:]]
    assert found(asked, stored) == dict(zip(asked, stored, strict=True))


@pytest.mark.parametrize(
    ("classes", "fits"), [(["LlamaForCausalLM"], True), (["OtherForCausalLM"], False), (None, False)]
)
def test_a_base_of_the_class_that_the_adapter_names_is_of_its_family(classes, fits):
    """EXAONE is a Llama in transformers 5, under a model_type of its own."""
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    update = LoRA(A=from_numpy(np.zeros((1, 4), "f4")), B=from_numpy(np.zeros((4, 1), "f4")))
    foreign = Foreign("peft", {"config": {"auto_mapping": mapping}}, {})
    adapter = Adapter({Target("model.q_proj"): (update,)}, foreign=foreign)
    config = {"model_type": "exaone", "architectures": classes}
    if fits:
        assert find_sites(adapter, {"model.q_proj.weight": (4, 4)}, partial=False, config=config).sites
    else:
        with pytest.raises(TargetNotFound, match="family llama"):
            find_sites(adapter, {"model.q_proj.weight": (4, 4)}, partial=False, config=config)


def test_two_towers_of_one_shape_are_not_exchanged():
    """VibeVoice's towers lose `model.` in the file, and its language model moves: none may take another's place."""
    layers = [f"{n}.ffn.linear{m}" for n in range(2) for m in (1, 2)]
    towers = [f"{tower}_tokenizer_encoder.{layer}" for tower in ("acoustic", "semantic") for layer in layers]
    asked = [*(f"model.{name}" for name in towers), *below("model.language_model.")]
    stored = [*towers, *below("language_model.model.")]
    assert found(asked, stored) == dict(zip(asked, stored, strict=True))


def test_three_encoders_are_not_all_placed_in_the_one_that_a_base_has():
    """FLAVA's three encoders have the names of DPT's one; DPT's file takes any of them without its prefix."""
    layers = [f"encoder.layer.{n}.attention.attention.{x}" for n in range(2) for x in ("query", "key", "value")]
    stored = below("dpt.", layers)
    asked = [name for part in ("image_model.", "text_model.", "multimodal_model.") for name in below(part, layers)]
    with pytest.raises(TargetNotFound, match="of 18 targets"):
        found(asked, stored, "dpt")
    assert found(below("image_model.", layers), stored, "dpt") == dict(
        zip(below("image_model.", layers), stored, strict=True)
    )
