"""Names of MLX-LM's models: facts that its `sanitize` gave for tiny models (`tools/foreign/check_mlx.py`)."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.errors import Unrepresentable, UsageError
from adapterkit.formats.mlx.conversion import is_absent, to_mlx
from adapterkit.methods.lora import LoRA
from adapterkit.naming.architectures import with_naming

PLACES = {
    ("qwen2_vl", "model.layers.3.self_attn.q_proj"): "language_model.model.layers.3.self_attn.q_proj",
    ("qwen2_vl", "model.language_model.layers.3.mlp.up_proj"): "language_model.model.layers.3.mlp.up_proj",
    ("qwen2_5_vl", "model.language_model.layers.3.mlp.up_proj"): "language_model.model.layers.3.mlp.up_proj",
    ("qwen3_vl", "model.language_model.layers.3.self_attn.o_proj"): "language_model.model.layers.3.self_attn.o_proj",
    ("qwen3_5", "model.language_model.layers.3.linear_attn.in_proj_z"):
        "language_model.model.layers.3.linear_attn.in_proj_z",
    ("gemma4", "model.language_model.layers.3.mlp.up_proj"): "language_model.model.layers.3.mlp.up_proj",
    ("gemma3", "model.language_model.layers.3.mlp.up_proj"): "language_model.model.layers.3.mlp.up_proj",
    ("gpt_neox", "gpt_neox.layers.3.mlp.dense_h_to_4h"): "model.h.3.mlp.dense_h_to_4h",
    ("gpt2", "transformer.h.3.attn.c_attn"): "model.h.3.attn.c_attn",
    ("gptj", "transformer.h.3.mlp.fc_in"): "model.h.3.mlp.fc_in",
    ("lfm2_moe", "model.layers.0.feed_forward.w1"): "model.layers.0.feed_forward.gate_proj",
    ("nanochat", "model.layers.3.self_attn.o_proj"): "transformer.h.3.attn.c_proj",
    ("kimi_linear", "model.layers.3.mlp.gate"): "model.layers.3.mlp.gate",
    ("kimi_linear", "model.layers.3.mlp.shared_experts.up_proj"): "model.layers.3.mlp.shared_experts.up_proj",
    ("bailing_hybrid", "model.layers.3.self_attn.q_proj"): "model.layers.3.attention.q_proj",
    ("bailing_hybrid", "model.layers.3.mlp.gate"): "model.layers.3.mlp.gate.gate_proj",
    ("laguna", "model.layers.3.mlp.gate"): "model.layers.3.mlp.gate.proj",
    ("muse_glimmer", "model.language_model.layers.3.mlp.up_proj"): "model.layers.3.mlp.up_proj",
    ("kimi_k3", "language_model.model.layers.3.block_sparse_moe.gate"): "language_model.model.layers.3.mlp.gate",
    ("kimi_k3", "language_model.model.layers.3.block_sparse_moe.shared_experts.up_proj"):
        "language_model.model.layers.3.mlp.shared_experts.up_proj",
    ("deepseek_v41", "layers.3.attn.wq_a"): "model.layers.3.self_attn.q_a_proj",
    ("deepseek_v41", "head"): "lm_head",
    ("Klear", "model.layers.3.mlp.coefficient"): "model.layers.3.mlp.coefficient",
    ("llama", "model.layers.3.mlp.up_proj"): "model.layers.3.mlp.up_proj",
}  # fmt: skip

STACKS = {
    ("nemotron_h", "backbone.layers.3.mixer.experts.2.up_proj"): "backbone.layers.3.mixer.switch_mlp.fc1",
    ("kimi_linear", "model.layers.3.block_sparse_moe.experts.2.w1"): "model.layers.3.mlp.switch_mlp.gate_proj",
    ("kimi_k3", "language_model.model.layers.3.block_sparse_moe.experts.2.w2"):
        "language_model.model.layers.3.mlp.switch_mlp.down_proj",
    ("deepseek_v41", "layers.3.ffn.experts.2.w3"): "model.layers.3.mlp.experts.switch_mlp.up_proj",
    ("Klear", "model.layers.3.mlp.experts.2.down_proj"): "model.layers.3.mlp.experts.down_proj",
    ("llama4", "language_model.model.layers.3.feed_forward.experts.2.up_proj"):
        "language_model.model.layers.3.feed_forward.experts.up_proj",
    ("qwen3_5_moe", "model.language_model.layers.3.mlp.experts.2.up_proj"):
        "language_model.model.layers.3.mlp.switch_mlp.up_proj",
    ("granitemoehybrid", "model.layers.3.block_sparse_moe.experts.2.up_proj"):
        "model.layers.3.block_sparse_moe.switch_mlp.up_proj",
    ("kimi_k25", "language_model.model.layers.3.mlp.experts.2.up_proj"):
        "language_model.model.layers.3.mlp.switch_mlp.up_proj",
}  # fmt: skip

ABSENT = {
    "deepseek_v3": "model.layers.3.self_attn.kv_b_proj", "glm4_moe_lite": "model.layers.3.self_attn.kv_b_proj",
    "kimi_k3": "language_model.model.layers.3.self_attn.kv_b_proj", "deepseek_v41": "layers.3.attn.wo_a",
    "prism_hadamard_qwen35": "model.language_model.layers.3.self_attn.q_proj",
    "muse_spark": "model.language_model.layers.3.self_attn.q_proj", "dbrx": "transformer.blocks.3.ffn.experts.mlp.w1",
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), PLACES)
def test_a_layer_is_where_mlx_lm_has_it(family, name):
    moves = to_mlx(name, {"model_type": family}, 0)
    assert [move.path for move in moves or ()] == [PLACES[family, name]]
    assert not is_absent(name, {"model_type": family})


@pytest.mark.parametrize(("family", "name"), STACKS)
def test_an_expert_is_in_the_stack_of_mlx_lm(family, name):
    (move,) = to_mlx(name, {"model_type": family}, 0)
    assert (move.path, move.slot) == (STACKS[family, name], 2)


def test_without_a_base_names_stay_where_families_differ():
    assert to_mlx("model.layers.3.self_attn.q_proj", None, 0) is None
    assert to_mlx("model.language_model.layers.3.self_attn.q_proj", None, 0) is None
    assert to_mlx("gpt_neox.layers.3.attention.dense", None, 0)[0].path == "model.h.3.attention.dense"
    with pytest.raises(UsageError, match="--base"):
        to_mlx("model.layers.3.mlp.experts.1.up_proj", None, 0)


def _pair(out: int, into: int) -> tuple[LoRA]:
    return (LoRA(A=torch.randn(2, into), B=torch.randn(out, 2), scaling=0.5),)


def _base(folder, family, names, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, **config}))
    save_file({f"{name}.weight": np.zeros((8, 8), np.float32) for name in names}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", ABSENT)
def test_what_mlx_lm_cannot_adapt_is_refused_by_name(family, tmp_path):
    name = ABSENT[family]
    base = _base(tmp_path / "base", family, [name])
    adapter = ak.Adapter({Target(name): _pair(8, 8)})
    with pytest.raises(Unrepresentable, match=rf"{name}: MLX-LM's model has no separate layer for this weight"):
        ak.write(adapter, tmp_path / "out", "mlx", base=base)


def test_what_mlx_lm_cannot_adapt_is_left_out_on_request(tmp_path):
    names = ["model.layers.0.self_attn.kv_b_proj", "model.layers.0.self_attn.o_proj"]
    base = _base(tmp_path / "base", "deepseek_v3", names)
    adapter = ak.Adapter({Target(name): _pair(8, 8) for name in names})
    (line,) = ak.write(adapter, tmp_path / "out", "mlx", base=base, on_loss="drop")
    assert line.startswith(f"left out {names[0]}")
    assert {key.rpartition(".")[0] for key in load_file(tmp_path / "out" / "adapters.safetensors")} == {names[1]}


@pytest.mark.parametrize("trained", ["qkv", "qv", "k"])
def test_queries_keys_and_values_become_one_layer_and_three_again(trained, tmp_path):
    names = [f"language_model.model.layers.0.self_attn.{word}_proj" for word in "qkv"]
    base = _base(tmp_path / "base", "kimi_k3", names)
    adapter = ak.Adapter({Target(name): _pair(8, 8) for name in names if name[-6] in trained})
    ak.write(adapter, tmp_path / "out", "mlx", base=base)
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    A, B = (tensors[f"language_model.model.layers.0.self_attn.qkv_proj.lora_{slot}"] for slot in "ab")
    whole = 0.5 * (A @ B).T
    again = ak.read(tmp_path / "out", base=base)
    for number, name in enumerate(names):
        rows = whole[8 * number : 8 * (number + 1)]
        expected = np.asarray(adapter.delta(name)) if name[-6] in trained else np.zeros((8, 8))
        assert np.abs(rows - expected).max() < 1e-6
        assert np.abs(np.asarray(again.delta(name)) - expected).max() < 1e-6


def test_what_a_hub_stores_as_one_tensor_stays_one(tmp_path):
    name = "model.layers.0.attention.wqkv"
    base = _base(tmp_path / "base", "internlm2", [name], num_attention_heads=2, num_key_value_heads=1)
    adapter = ak.Adapter({Target(name): _pair(8, 8)})
    ak.write(adapter, tmp_path / "out", "mlx", base=base)
    assert f"{name}.lora_a" in load_file(tmp_path / "out" / "adapters.safetensors")
    assert [target.path for target in ak.read(tmp_path / "out", base=base).updates] == [name]


def test_every_family_of_mlx_lm_says_where_its_other_weights_are():
    assert len(list(with_naming("mlx"))) > 125
