"""Exports of models whose cache holds states of convolutions and recurrences: they write what PEFT writes."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers

import adapterkit as ak
from adapterkit.errors import Unsupported
from adapterkit.onnx import recurrences

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|peft|torch)")

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 128, **ENDS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
TWO = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def mamba():
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=4, **ENDS
    )
    return transformers.MambaForCausalLM(config)


def qwen3_next():
    config = transformers.Qwen3NextConfig(**SIZES, **HEADS, **LINEAR, **TWO, mlp_only_layers=[0, 1])
    return transformers.Qwen3NextForCausalLM(config)


def mamba2():
    sizes = {"num_heads": 8, "head_dim": 4, "n_groups": 2, "state_size": 4, "chunk_size": 8, "expand": 2}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SIZES, **sizes, num_hidden_layers=1))


def lfm2():
    config = transformers.Lfm2Config(**SIZES, num_hidden_layers=2, layer_types=["conv", "full_attention"], **HEADS)
    return transformers.Lfm2ForCausalLM(config)


def jamba():
    config = transformers.JambaConfig(
        **SIZES, **HEADS, **MAMBA, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
    )  # fmt: skip
    return transformers.JambaForCausalLM(config)


def falcon_h1():
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 8, "mamba_d_head": 4, "mamba_n_groups": 1, "mamba_d_state": 4}
    config = transformers.FalconH1Config(**SIZES, **HEADS, **sizes, num_hidden_layers=1, mamba_chunk_size=8)
    return transformers.FalconH1ForCausalLM(config)


def olmo_hybrid():
    config = transformers.OlmoHybridConfig(**SIZES, **HEADS, **LINEAR, **TWO)
    return transformers.OlmoHybridForCausalLM(config)


MODELS = [
    mamba, qwen3_next,
    *(pytest.param(kind, marks=pytest.mark.long) for kind in (mamba2, lfm2, jamba, falcon_h1, olmo_hybrid)),
]  # fmt: skip

PROMPTS = torch.tensor([[5, 9, 33, 12, 7, 40, 21], [0, 0, 0, 8, 50, 3, 61]])
MASK = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
NEW = 6


def peft_configs(model):
    """A config of each of three methods, for layers of its own, so that one export has slots for all of them."""
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    pure = model.config.model_type.startswith("mamba")
    # PEFT refuses `out_proj` of these models.
    refused = {"out_proj"} if pure or model.config.model_type == "falcon_h1" else set()
    rest = names & ({"x_proj"} if pure else {"out_proj", "o_proj"} - refused)
    scaled = set() if pure else names & {"x_proj", "v_proj", "down_proj"}
    first = sorted(name for name in names if name.startswith(("in_proj", "q_proj", "w1")))
    configs = {"lora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=first)}
    if rest:
        configs["dora"] = peft.LoraConfig(r=2, lora_alpha=4, target_modules=sorted(rest), use_dora=True)
    if scaled:
        configs["ia3"] = peft.IA3Config(target_modules=sorted(scaled), feedforward_modules=[])
    return configs


def made(kind, home):
    """Save a model with large random weights, and an adapter of PEFT's of each method; return their names."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter)
    model.save_pretrained(home / "base")
    configs = peft_configs(model)
    for name, config in configs.items():
        changed = peft.get_peft_model(loaded(kind, home), config)
        with torch.no_grad():
            for key, parameter in changed.named_parameters():
                if "lora_" in key or "ia3" in key:
                    parameter.copy_(0.4 * torch.randn_like(parameter) + ("ia3" in key))
        changed.save_pretrained(home / name)
    return list(configs)


def loaded(kind, home, adapter=None):
    model = type(kind()).from_pretrained(home / "base").eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, home / adapter).eval()


def theirs(model, ids, mask):
    """The tokens that transformers writes, and the logits of each step."""
    with torch.no_grad():
        told = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return told.sequences.numpy(), torch.stack(told.logits, 1).numpy()


def renamed(name):
    """The name of the output that continues an input, as transformers.js reads them."""
    return name.replace("past_key_values", "present").replace("past", "present")


def stepped(session, tokens, mask, length, adapter):
    """The logits of each step, token by token, for tokens that are known."""
    feeds, steps = {"input_ids": tokens[:, :length]}, []
    shapes = session.types
    batch = len(tokens)
    for name in session.inputs:
        if name.startswith("past"):
            sizes = [size if isinstance(size, int) else 0 for size in shapes[name][1][1:]]
            feeds[name] = np.zeros((batch, *sizes), np.float32)
    for at in range(length, tokens.shape[1]):
        seen = np.concatenate([mask, np.ones((batch, at - length), np.int64)], 1)
        places = np.maximum(seen.cumsum(1) - 1, 0)[:, -feeds["input_ids"].shape[1] :]
        more = {"attention_mask": seen, **({"position_ids": places} if "position_ids" in session.inputs else {})}
        told = session.run(feeds | more, adapter)
        steps.append(told["logits"][:, -1])
        feeds = {"input_ids": tokens[:, at : at + 1]}
        feeds |= {name: told[renamed(name)] for name in session.inputs if name.startswith("past")}
    return np.stack(steps, 1)


def in_pieces(session, model, adapter):
    """A prompt in two pieces computes what transformers does in one call; its Mamba forgets the first piece."""
    ids = np.random.default_rng(0).integers(3, 64, (1, 20))
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    first = session.run({"input_ids": ids[:, :12]}, adapter)
    past = {name: first[renamed(name)] for name in session.inputs if name.startswith("past")}
    places = {"position_ids": np.arange(12, 20)[None]} if "position_ids" in session.inputs else {}
    feeds = {"input_ids": ids[:, 12:], "attention_mask": np.ones((1, 20), np.int64), **places, **past}
    got = np.concatenate([first["logits"], session.run(feeds, adapter)["logits"]], 1)
    np.testing.assert_allclose(got, wanted, atol=1e-4 * abs(wanted).max())


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_writes_what_peft_writes_and_swaps_adapters(kind, tmp_path):
    names = made(kind, tmp_path)
    report = ak.onnx.export_pretrained(
        tmp_path / "base", tmp_path / "out", adapter=[tmp_path / name for name in names], mode="slots"
    )
    assert report.difference < 1e-4
    session = ak.onnx.Session(report.out, {name: tmp_path / "out" / f"{name}.onnx_adapter" for name in names})
    past = [name for name in session.inputs if name.startswith("past")]
    # transformers.js fills these by the name of the axis; onnxruntime-genai finds them by patterns.
    assert {session.types[name][1][0] for name in past} == {"batch_size"}
    file = tmp_path / "out" / "genai_config.json"
    assert file.exists() == (kind not in (mamba, mamba2))
    if file.exists():
        decoder = json.loads(file.read_text())["model"]["decoder"]
        patterns = [name for word, name in decoder["inputs"].items() if word.startswith("past")]
        assert {*past} <= {name % at for name in patterns for at in range(decoder["num_hidden_layers"])}
    texts = [(PROMPTS, MASK), (PROMPTS[:1], MASK[:1]), (PROMPTS[:1, :1], MASK[:1, :1])]
    written = []
    for name in (*names, None):
        model = loaded(kind, tmp_path, name)
        for ids, mask in texts:
            tokens, logits = theirs(model, ids, mask)
            got = session.generate(ids.numpy(), max_new_tokens=NEW, adapter=name, attention_mask=mask.numpy())
            np.testing.assert_array_equal(got, tokens)
            steps = stepped(session, tokens, mask.numpy(), ids.shape[1], name)
            np.testing.assert_allclose(steps, logits, atol=1e-4 * abs(logits).max())
            written.append(tokens[:, ids.shape[1] :].tolist())
    in_pieces(session, loaded(kind, tmp_path, names[0]), names[0])
    # Each adapter changes the tokens of the padded texts.
    assert len({str(tokens) for tokens in written[:: len(texts)]}) == len(names) + 1


def test_kernels_are_theirs_again_after_an_export():
    model = mamba()
    kernels = [getattr(module, name) for module, name, _ in recurrences.kernels_of(model)]
    assert kernels
    with recurrences.as_scans(model, recurrences.LastState()):
        inside = [getattr(module, name) for module, name, _ in recurrences.kernels_of(model)]
    assert all(one is not other for one, other in zip(kernels, inside, strict=True))
    assert [getattr(module, name) for module, name, _ in recurrences.kernels_of(model)] == kernels


def test_states_outside_of_the_cache_are_refused(tmp_path):
    config = transformers.RecurrentGemmaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=4, lru_width=16, num_hidden_layers=2,
        block_types=["recurrent", "attention"], attention_window_size=8,
    )  # fmt: skip
    transformers.RecurrentGemmaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(Unsupported, match=r"states outside of its cache, in model\.layers\.0\..*conv1d_state"):
        ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_class_is_refused(tmp_path):
    config = transformers.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(Unsupported, match="does not keep its past in transformers' DynamicCache"):
        ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out")
