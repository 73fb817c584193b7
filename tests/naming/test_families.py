"""A base of another family than the one that an adapter names is refused, also where all names and shapes fit."""

import json
import warnings

import numpy as np
import peft
import pytest
import transformers
from command_line import record, run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Step
from adapterkit.core.metadata import model_types_of
from adapterkit.errors import TargetNotFound
from adapterkit.naming.architectures import folder, load
from adapterkit.naming.binding.sites import table

H = 4
NAME = "model.layers.0.self_attn.q_proj"


def save_base(folder, config, name=NAME):
    folder.mkdir()
    save_file({f"{name}.weight": np.ones((H, H), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_adapter(folder, family, name=NAME):
    folder.mkdir()
    stem = f"base_model.model.{name}.lora_"
    save_file(
        {f"{stem}A.weight": np.ones((1, H), np.float32), f"{stem}B.weight": np.ones((H, 1), np.float32)},
        folder / "adapter_model.safetensors",
    )
    mapping = {"base_model_class": "X", "parent_library": f"transformers.models.{family}.modeling_{family}"}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config | ({"auto_mapping": mapping} if family else {})))
    return folder


def test_peft_says_the_family_of_a_model_without_a_task_type(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "a")
    assert model_types_of(ak.read(tmp_path / "a")) == ("llama",)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"model_type": "mistral"}),
        ("mixtral", {"model_type": "olmoe"}),
        ("llava", {"model_type": "llama"}),
        ("qwen2", {"model_type": "llava", "text_config": {"model_type": "llama"}}),
        ("speech_to_text", {"model_type": "m2m_100"}),
        ("marian", {"model_type": "speech_to_text"}),
        ("qwen2_audio", {"model_type": "qwen2"}),
        ("hrm_text", {"model_type": "llama"}),
        # Families whose module has another name than their file, or no file.
        ("apertus1p5", {"model_type": "olmo3"}),
        ("qwen2_5_omni", {"model_type": "qwen2_audio", "text_config": {"model_type": "qwen2"}}),
        ("parakeet", {"model_type": "wav2vec2-bert"}),
        ("speecht5", {"model_type": "hubert"}),
        ("llama", {"model_type": "timesfm"}),
    ],
)
def test_another_family_is_refused_and_taken_by_a_rule(family, config, tmp_path):
    base, adapter = save_base(tmp_path / "base", config), save_adapter(tmp_path / "a", family)
    with pytest.raises(TargetNotFound, match=f"of the family {family}") as raised:
        ak.merge(base, adapter, tmp_path / "out")
    assert "--rename 'model=model'" in raised.value.cure
    assert not (tmp_path / "out").exists()
    ak.merge(base, adapter, tmp_path / "out", rename="model=model")
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight"].tolist() == [[2.0] * H] * H


def test_every_verb_refuses_it(tmp_path):
    base, adapter = save_base(tmp_path / "base", {"model_type": "mistral"}), save_adapter(tmp_path / "a", "llama")
    for words in (
        ("merge", base, adapter, "-o", tmp_path / "out"), ("names", base, adapter),
        ("validate", adapter, "--base", base),
        ("convert", adapter, tmp_path / "b", "--to", "peft", "--base", base, "--match-base"),
        ("diff", adapter, adapter, "--base", base), ("combine", adapter, adapter, "--base", base, "-o", tmp_path / "c"),
    ):  # fmt: skip
        refused = run(*words)
        assert (refused.exit_code, "of the family llama" in refused.stderr) == (2, True), words
    assert record("diff", adapter, adapter, "--base", base, "--rename", "model=model")["equal"] is True


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"model_type": "llama"}),
        ("llama", {"model_type": "llava", "text_config": {"model_type": "llama"}}),
        ("gemma3", {"model_type": "gemma3_text"}),
        ("blip_2", {"model_type": "blip-2"}),
        ("kosmos2", {"model_type": "kosmos-2"}),
        ("openai", {"model_type": "openai-gpt"}),
        ("parakeet", {"model_type": "parakeet_ctc"}),
        ("data2vec", {"model_type": "data2vec-text"}),
        ("bert", {"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}}),
        ("llama", {"model_type": "a family of nobody"}),
        ("unheard_of", {"model_type": "llama"}),
        ("llama", {}),
        (None, {"model_type": "mistral"}),
    ],
)
def test_the_same_family_its_parts_and_unknown_ones_are_taken(family, config, tmp_path):
    base, adapter = save_base(tmp_path / "base", config), save_adapter(tmp_path / "a", family)
    ak.merge(base, adapter, tmp_path / "out")


def check_fit(base, adapter, trained_class, fits, family):
    """Merge an adapter that was trained on a class; where it does not fit, the error names its family."""
    said = json.loads((adapter / "adapter_config.json").read_text())
    said["auto_mapping"]["base_model_class"] = trained_class
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    if fits:
        ak.merge(base, adapter, adapter.parent / "out")
    else:
        with pytest.raises(TargetNotFound, match=f"of the family {family}"):
            ak.merge(base, adapter, adapter.parent / "out")


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        # MusicFlamingo has AudioFlamingo 3's encoder, and every module of the whole model has a place of its shape.
        ("audioflamingo3 AudioFlamingo3ForConditionalGeneration", False),
        ("audioflamingo3 AudioFlamingo3Encoder", True),
        ("siglip SiglipVisionModel", True), ("siglip SiglipModel", False), ("clip CLIPVisionModel", False),
        ("qwen2 Qwen2ForCausalLM", True), ("gemma3 Gemma3ForCausalLM", False), ("qwen2 OfANewVersion", True),
        ("musicflamingo MusicFlamingoForConditionalGeneration", True), ("musicflamingo OfANewVersion", True),
    ],
)  # fmt: skip
def test_a_part_of_a_base_is_of_the_family_of_adapters_of_that_part_only(kind, fits, tmp_path):
    config = {
        "model_type": "musicflamingo", "audio_config": {"model_type": "audioflamingo3_encoder"},
        "vision_config": {"model_type": "siglip_vision_model"}, "text_config": {"model_type": "qwen2"},
    }  # fmt: skip
    family, trained_class = kind.split()
    base, adapter = save_base(tmp_path / "base", config), save_adapter(tmp_path / "a", family)
    check_fit(base, adapter, trained_class, fits, family)


@pytest.mark.parametrize(
    ("kind", "model_type", "fits"),
    [
        ("parakeet ParakeetForCTC", "parakeet_ctc", True), ("parakeet ParakeetForCTC", "parakeet_tdt", False),
        ("data2vec Data2VecTextForMaskedLM", "data2vec-audio", False), ("gemma3 Gemma3ForCausalLM", "gemma3", True),
        ("gemma3 Gemma3ForCausalLM", "gemma3_text", True), ("siglip SiglipVisionModel", "siglip_text_model", False),
        ("siglip SiglipVisionModel", "siglip", True), ("siglip SiglipModel", "siglip_vision_model", True),
    ],
)  # fmt: skip
def test_one_part_of_a_module_is_not_another(kind, model_type, fits, tmp_path):
    family, trained_class = kind.split()
    base, adapter = save_base(tmp_path / "base", {"model_type": model_type}), save_adapter(tmp_path / "a", family)
    check_fit(base, adapter, trained_class, fits, family)


def test_every_family_of_transformers_is_in_the_table_of_model_types():
    known = table().modules
    for file in sorted(folder().glob("*.toml")):
        record = load(file).record
        if any(source.startswith("transformers ") for source in record.sources):
            assert record.pipeline is not None or known.keys() >= {*record.model_types}, file.name
    assert all(model_type in known for types in table().parts.values() for model_type in types)


def test_the_family_travels_through_formats_and_combinations(tmp_path):
    adapter = save_adapter(tmp_path / "a", "llama")
    ak.write(ak.read(adapter), tmp_path / "native", format="adapterkit")
    both = ak.ops.combine([tmp_path / "native", adapter], weights=[1, 1])
    assert model_types_of(ak.read(tmp_path / "native")) == model_types_of(both) == ("llama",)
    other = save_base(tmp_path / "base", {"model_type": "mistral"})
    for given in (tmp_path / "native", both):
        with pytest.raises(TargetNotFound, match="of the family llama, but the base is mistral"):
            ak.merge(other, given, tmp_path / "out")


def test_a_live_model_of_another_family_is_refused(tmp_path):
    config = transformers.MistralConfig(
        vocab_size=16, hidden_size=H, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    adapter = ak.read(save_adapter(tmp_path / "a", "llama"))
    with pytest.raises(TargetNotFound, match="of the family llama, but the base is mistral"):
        ak.torch.inject(model, adapter)
    ak.torch.inject(model, adapter, rename="model=model")


def test_an_extracted_adapter_names_the_family(tmp_path):
    base = save_base(tmp_path / "base", {"model_type": "llama"})
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    save_file({f"{NAME}.weight": np.full((H, H), 2, np.float32)}, tuned / "model.safetensors")
    made = ak.ops.extract(tuned, base, 1)
    assert model_types_of(made) == ("llama",)
    assert isinstance(made.recipe[-1], Step)


def test_a_prefix_of_one_family_is_not_exchanged_for_that_of_another(tmp_path):
    end = "encoder.layer.0.attention.self.query"
    base = save_base(tmp_path / "base", {"model_type": "roberta"}, f"roberta.{end}")
    with pytest.raises(TargetNotFound):
        ak.merge(base, save_adapter(tmp_path / "a", None, f"bert.{end}"), tmp_path / "out")
    ak.merge(base, save_adapter(tmp_path / "b", None, end), tmp_path / "out")


def test_a_live_model_is_of_the_family_that_its_config_object_names(tmp_path):
    """`LlamaForCausalLM.from_pretrained` of an EXAONE: the object says `exaone`, what `to_dict` gives says `llama`."""
    sizes = {"vocab_size": 16, "hidden_size": H, "intermediate_size": H, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=1))
    adapter = ak.read(save_adapter(tmp_path / "a", None, "transformer.h.0.attn.attention.q_proj"))
    with pytest.raises(TargetNotFound):
        ak.torch.inject(model, adapter)
    model.config.model_type = "exaone"
    assert model.config.to_dict()["model_type"] == "llama"
    ak.torch.inject(model, adapter)


SEEN, TOLD = (
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "language_model.model.layers.0.self_attn.q_proj",
)


def save_parts(folder, names):
    """An adapter without a word about its family, of several modules."""
    folder.mkdir()
    stems = [f"base_model.model.{name}.lora_" for name in names]
    tensors = {f"{stem}A.weight": np.ones((1, H), np.float32) for stem in stems}
    tensors |= {f"{stem}B.weight": np.ones((H, 1), np.float32) for stem in stems}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_parts_under_another_familys_names_are_not_those_of_this_one(tmp_path):
    """Two towers of the shapes of an Idefics' fit a LLaVA one by one, if one asks for shapes alone."""
    base = save_base(tmp_path / "base", {"model_type": "llava"}, TOLD)
    save_file({f"{name}.weight": np.ones((H, H), np.float32) for name in (SEEN, TOLD)}, base / "model.safetensors")
    theirs = ["model.text_model.layers.0.self_attn.q_proj", "model.vision_model.encoder.layers.0.self_attn.q_proj"]
    idefics = save_parts(tmp_path / "idefics", theirs)
    with pytest.raises(TargetNotFound, match="not in the base"):
        ak.merge(base, idefics, tmp_path / "out")
    rules = [
        "model.text_model=language_model.model",
        "model.vision_model=vision_tower.vision_model",
    ]
    assert ak.merge(base, idefics, tmp_path / "renamed", rename=rules).plan.targets == 2
    ours = ["model.language_model.layers.0.self_attn.q_proj", f"model.{SEEN}"]
    assert ak.merge(base, save_parts(tmp_path / "llava", ours), tmp_path / "own").plan.targets == 2
    alone = save_parts(tmp_path / "text", ["model.layers.0.self_attn.q_proj"])
    assert ak.merge(base, alone, tmp_path / "part").plan.targets == 1


def test_a_part_is_not_found_by_dropping_the_word_that_names_it(tmp_path):
    """Cosmos has `blocks.0` for what it calls `visual` when it is live; an ERNIE's vision tower is not that."""
    base = save_base(tmp_path / "base", {"model_type": "cosmos3_omni"}, "blocks.0.attn.qkv")
    ernie = save_parts(tmp_path / "ernie", ["model.vision_tower.blocks.0.attn.qkv"])
    with pytest.raises(TargetNotFound, match="not in the base"):
        ak.merge(base, ernie, tmp_path / "out")
    own = save_parts(tmp_path / "own", ["model.visual.blocks.0.attn.qkv"])
    assert ak.merge(base, own, tmp_path / "merged").plan.targets == 1
