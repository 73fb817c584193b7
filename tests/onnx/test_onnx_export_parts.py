"""Exports of models that become several graphs: onnxruntime, part by part, writes and computes what PEFT does."""

import shutil

import numpy as np
import onnx_graphs as graphs
import onnxruntime
import peft
import pytest
import torch
import transformers
from command_line import run

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import CheckFailed, TargetNotFound, Unsupported
from adapterkit.io.lazy import as_array, from_numpy
from adapterkit.io.ort_adapter import read_ort_adapter
from adapterkit.methods.lora import LoRA
from adapterkit.methods.prompt import Prompt
from adapterkit.onnx import against_torch, pretrained_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|peft|torch)")

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

BART = {
    "vocab_size": 64, "max_position_embeddings": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "forced_eos_token_id": None, "decoder_start_token_id": 1, **ENDS,
}  # fmt: skip

TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip

TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "projection_dim": 16,
}  # fmt: skip

TOKENS = torch.tensor([[5, 9, 2, 33], [7, 8, 1, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])

NEW = 6


def made(model, targets, home):
    """Save a model with large random weights, and an adapter of PEFT's; return the model with the adapter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter)
    model.save_pretrained(home / "base")
    (home / "base" / "tokenizer.json").write_text("{}")
    (home / "base" / "processor_config.json").write_text("{}")
    changed = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))
    changed.save_pretrained(home / "lora")
    return changed


STEMS = ("encoder_model", "decoder_model", "decoder_with_past_model")


def held(file):
    return {name: as_array(leaf) for name, leaf in read_ort_adapter(file).tensors.items()}


def session(folder, name):
    return onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])


def written(folder, feeds, start=0):
    """Generate greedily by onnxruntime alone, over the three graphs that optimum's classes load; return all tokens."""
    encoder, first, later = (session(folder, name) for name in pretrained_parts.FILES[:3])
    ids, mask = TOKENS.numpy(), MASK.numpy()
    (hidden,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask, **feeds("encoder_model")})
    tokens = np.full((2, 1), start)
    more = {"input_ids": tokens, "encoder_attention_mask": mask}
    told = named(first, {**more, "encoder_hidden_states": hidden, **feeds("decoder_model")})
    past = {name.replace("present", "past_key_values"): told[name] for name in told if name != "logits"}
    for _ in range(NEW):
        tokens = np.concatenate([tokens, told["logits"][:, -1].argmax(-1)[:, None]], 1)
        told = named(later, {**more, "input_ids": tokens[:, -1:], **past, **feeds("decoder_with_past_model")})
        past |= {name.replace("present", "past_key_values"): told[name] for name in told if name != "logits"}
    return tokens


def named(graph, feeds):
    return dict(zip([entry.name for entry in graph.get_outputs()], graph.run(None, feeds), strict=True))


def theirs(model):
    with torch.no_grad():
        return model.generate(
            input_ids=TOKENS, attention_mask=MASK, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            eos_token_id=None,
        ).numpy()  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    home = tmp_path_factory.mktemp("t5")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    changed = made(model, ["q", "v", "wi_0", "wo"], home)
    report = ak.onnx.export_pretrained(home / "base", home / "out", adapter=home / "lora", mode="slots")
    return home, changed, report


def test_an_encoder_decoder_whose_tokens_are_int32(t5, tmp_path):
    home, changed, _ = t5
    folder = shutil.copytree(home / "out", tmp_path / "out")
    for name in pretrained_parts.FILES[:3]:
        graphs.with_int32(folder / name)
    session_ = ak.onnx.FolderSession(folder)
    session_.load("lora")
    assert session_.parts["encoder_model.onnx"].types["input_ids"][0] == "int32"
    for asked in ({"input_ids": TOKENS, "attention_mask": MASK}, {"input_ids": TOKENS.int(), "attention_mask": MASK}):
        np.testing.assert_array_equal(
            session_.generate(asked, max_new_tokens=NEW, adapter="lora", end=()), theirs(changed)
        )


def test_an_encoder_decoder_with_slots_writes_what_peft_writes(t5):
    home, changed, report = t5
    folder = home / "out"
    assert {file.name for file in report.files} >= {*pretrained_parts.FILES[:3], "config.json", "tokenizer.json"}
    assert (folder / "generation_config.json").is_file()
    assert (folder / "processor_config.json").is_file()
    adapters = {stem: held(folder / f"{stem}.lora.onnx_adapter") for stem in STEMS}
    with_adapter = written(folder, adapters.__getitem__)
    bare = written(folder, lambda _: {})
    np.testing.assert_array_equal(with_adapter, theirs(changed))
    with changed.disable_adapter():
        np.testing.assert_array_equal(bare, theirs(changed))
    assert not np.array_equal(with_adapter, bare)
    session_ = ak.onnx.FolderSession(folder, {"again": home / "lora"})
    session_.load("lora")
    asked = {"input_ids": TOKENS.numpy(), "attention_mask": MASK.numpy()}
    for name, wanted in (("lora", with_adapter), (None, bare), ("again", with_adapter)):
        got = session_.generate(asked, max_new_tokens=NEW, adapter=name, end=())
        np.testing.assert_array_equal(got, wanted)
    assert "adapters again, lora" in repr(session_)
    session_.unload("lora")
    assert session_.adapters == ("again",)
    # Each graph has the targets of its own part, and they are those that PEFT changed.
    counts = {name: len(part.found) for name, part in report.parts.items()}
    modules = [name for name, module in changed.named_modules() if hasattr(module, "lora_A")]
    assert counts["encoder_model.onnx"] == sum(".encoder." in name for name in modules)
    assert counts["decoder_model.onnx"] == sum(".decoder." in name for name in modules)


@pytest.mark.parametrize("missing", ["decoder_model", "decoder_with_past_model"])
def test_an_adapter_without_the_file_of_one_decoder_is_refused(t5, tmp_path, missing):
    folder = shutil.copytree(t5[0] / "out", tmp_path / "out")
    file = folder / f"{missing}.lora.onnx_adapter"
    file.rename(tmp_path / "kept")
    session_ = ak.onnx.FolderSession(folder)
    with pytest.raises(TargetNotFound, match=f"no file for {missing}") as told:
        session_.load("lora")
    assert file.name in told.value.cure
    (tmp_path / "kept").rename(file)
    session_.load("lora")


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))


def t5gemma():
    """Layers that see three tokens, and layers that see all; both caches are written token by token."""
    more = {"head_dim": 4, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
    part = transformers.T5GemmaModuleConfig(**{**TEXT, "num_hidden_layers": 2, **more, "query_pre_attn_scalar": 4})
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=64)
    return transformers.T5GemmaForConditionalGeneration(config)


@pytest.mark.parametrize("kind", [bart, t5gemma])
def test_a_merged_encoder_decoder_by_the_command(kind, tmp_path):
    model = kind().eval()
    model.generation_config.decoder_start_token_id = BART["decoder_start_token_id"]
    changed = made(model, ["q_proj", "v_proj", "fc1"], tmp_path)
    words = ["export", tmp_path / "base", "--adapter", tmp_path / "lora", "-o", tmp_path / "out"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "encoder_model.onnx" in done.stdout
    np.testing.assert_array_equal(
        written(tmp_path / "out", lambda _: {}, BART["decoder_start_token_id"]), theirs(changed)
    )
    again = run(*words)
    assert (again.exit_code, again.stdout.startswith("already done: ")) == (0, True), again


def test_a_model_that_reads_images_computes_as_in_peft(tmp_path):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=63, vision_feature_layer=-2,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    changed = made(model, ["q_proj", "down_proj", "fc1"], tmp_path)
    report = ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "lora", mode="slots")
    # The tower's last layer comes after the one whose features are read.
    assert len(report.warnings) == 1
    assert "no output of the model depends on them: model.vision_tower.encoder.layers.1" in report.warnings[0]
    pixels = torch.randn(1, 3, 8, 8)
    ids = torch.tensor([[5, 63, 63, 63, 63, 9, 4]])
    with torch.no_grad():
        wanted = changed(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits.numpy()
    folder = tmp_path / "out"
    vision, embed, decoder = (session(folder, name) for name in pretrained_parts.FILES[3:])

    def feeds(part):
        file = folder / f"{part}.lora.onnx_adapter"
        return held(file) if file.exists() else {}

    (features,) = vision.run(None, {"pixel_values": pixels.numpy(), **feeds("vision_encoder")})
    (embedded,) = embed.run(None, {"input_ids": ids.numpy()})
    embedded[ids.numpy() == 63] = features.reshape(-1, features.shape[-1])
    empty = {entry.name: np.zeros((1, 2, 0, 4), np.float32) for entry in decoder.get_inputs() if "past" in entry.name}
    told = named(decoder, {
        "inputs_embeds": embedded, "attention_mask": np.ones((1, 7), np.int64), "position_ids": np.arange(7)[None],
        **empty, **feeds("decoder_model_merged"),
    })  # fmt: skip
    np.testing.assert_allclose(told["logits"], wanted, atol=1e-5 * abs(wanted).max())


class TestRefusals:
    def test_an_adapter_of_another_model(self, t5, tmp_path):
        home, _, _ = t5
        lora = LoRA(A=from_numpy(np.ones((2, 16), np.float32)), B=from_numpy(np.ones((16, 2), np.float32)))
        for target in ("encoder.block.0.layer.0.SelfAttention.nothing", "encoder.block.7.layer.0.SelfAttention.q"):
            adapter = Adapter({Target(target): (lora,)})
            with pytest.raises(TargetNotFound) as told:
                ak.onnx.export_pretrained(home / "base", tmp_path / "out", adapter=adapter, mode="slots")
            assert target in str(told.value)
        assert not (tmp_path / "out").exists()

    def test_tokens(self, t5, tmp_path):
        home, _, _ = t5
        prompt = Prompt(P=from_numpy(np.ones((4, 16), np.float32)))
        with pytest.raises(Unsupported, match="prompt cannot be attached in a model of several graphs"):
            ak.onnx.export_pretrained(home / "base", tmp_path / "out", adapter=Adapter({Target(""): (prompt,)}))

    def test_an_encoder_that_reads_something_else(self, tmp_path):
        config = transformers.Speech2TextConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=4, decoder_attention_heads=4, conv_channels=16, input_feat_per_channel=8,
        )  # fmt: skip
        transformers.Speech2TextForConditionalGeneration(config).save_pretrained(tmp_path / "base")
        with pytest.raises(Unsupported, match="speech_to_text, whose encoder reads input_features"):
            ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out")

    def test_a_graph_that_computes_something_else(self, t5, tmp_path, monkeypatch):
        home, _, _ = t5
        theirs_too = against_torch.outputs_of

        def shifted(model, args, kwargs):
            return [one + 1 if one.dtype.kind == "f" else one for one in theirs_too(model, args, kwargs)]

        monkeypatch.setattr(against_torch, "outputs_of", shifted)
        with pytest.raises(CheckFailed):
            ak.onnx.export_pretrained(home / "base", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_first_token_that_a_config_forces(tmp_path):
    """mBART chooses the language by it; transformers' generate and the folder write the same texts."""
    model = bart()
    made(model, ["q_proj"], tmp_path)
    model.generation_config.forced_bos_token_id = 7
    model.generation_config.save_pretrained(tmp_path / "base")
    ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "lora")
    session = ak.onnx.FolderSession(tmp_path / "out")
    given = {"input_ids": TOKENS, "attention_mask": MASK}
    got = session.generate(given, max_new_tokens=NEW, end=np.array(2))
    with torch.no_grad():
        wanted = model.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=2).numpy()
    width = min(got.shape[1], wanted.shape[1])
    for ours, others in zip(got, wanted, strict=True):  # transformers pads a text that ended with another token.
        stop = [*others.tolist()[1:], 2].index(2) + 2
        np.testing.assert_array_equal(ours[:stop], others[:stop])
    assert width > 2
    assert (got[:, 1] == 7).all()
    with pytest.raises(ak.errors.UsageError, match="not an array of token ids"):
        session.generate([[1, 2], [3]])
