"""Families whose code is published beside their weights: their names and rows in GGUF files of llama.cpp.

tools/foreign/check_gguf_published.py compares whole files with that converter.
"""

import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.errors import Unrepresentable
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
CASES = {
    # model_type: (class, config, module, shape of its weight, its tensor in a GGUF file, heads by which rows turn)
    "orion": ("OrionForCausalLM", HEADS, "model.layers.1.self_attn.k_proj", (8, 16), "blk.1.attn_k", 0),
    "xverse": ("XverseForCausalLM", HEADS, "model.layers.1.self_attn.q_proj", (16, 16), "blk.1.attn_q", 4),
    "arctic": ("ArcticForCausalLM", HEADS, "model.layers.0.self_attn.k_proj", (8, 16), "blk.0.attn_k", 2),
    "codeshell": ("CodeShellForCausalLM", HEADS, "transformer.h.1.attn.c_attn", (32, 16), "blk.1.attn_qkv", 0),
    "smallthinker": (
        "SmallThinkerForCausalLM", HEADS, "model.layers.0.block_sparse_moe.primary_router", (3, 16),
        "blk.0.ffn_gate_inp", 0,
    ),
    "Dream": ("DreamModel", HEADS, "model.layers.0.mlp.down_proj", (16, 24), "blk.0.ffn_down", 0),
    "llada": (
        "LLaDAModelLM", {"n_heads": 4, "n_kv_heads": 2, "d_model": 16}, "model.transformer.blocks.0.k_proj", (8, 16),
        "blk.0.attn_k", 2,
    ),
    "mpt": ("MPTForCausalLM", {}, "transformer.blocks.0.attn.Wqkv", (48, 16), "blk.0.attn_qkv", 0),
    "gemma3_text": ("Gemma3TextModel", HEADS, "layers.0.self_attn.v_proj", (8, 16), "blk.0.attn_v", 0),
}  # fmt: skip
ARCHITECTURES = {"Dream": "dream", "gemma3_text": "gemma-embedding"}


def base_of(folder, model_type, kind, config, weights):
    """A base with its config and these weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [kind], **config}))
    save_file({name: np.zeros(shape, "f4") for name, shape in weights.items()}, folder / "model.safetensors")
    return folder


def lora(out, in_, seed=3):
    """A LoRA of rank 2."""
    random = np.random.default_rng(seed)
    A, B = (random.normal(size=size).astype("f4") for size in ((2, in_), (out, 2)))
    return A, B, LoRA(A=from_numpy(A), B=from_numpy(B), scaling=1.0)


def written(path):
    """(general.architecture, tensors)."""
    reader = gguf.GGUFReader(path)
    name = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    return name, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("model_type", sorted(CASES))
def test_a_module_has_the_name_and_the_rows_of_llama_cpp(model_type, tmp_path):
    kind, config, module, shape, name, heads = CASES[model_type]
    base = base_of(tmp_path / "base", model_type, kind, config, {f"{module}.weight": shape})
    A, B, update = lora(*shape)
    ak.write(ak.Adapter({Target(module): (update,)}), tmp_path / "a.gguf", "gguf", base=base)
    architecture, tensors = written(tmp_path / "a.gguf")
    assert architecture == ARCHITECTURES.get(model_type, model_type)
    if heads:  # LlamaModel.permute of llama.cpp.
        B = B.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(B.shape)
    assert set(tensors) == {f"{name}.weight.lora_a", f"{name}.weight.lora_b"}
    np.testing.assert_array_equal(tensors[f"{name}.weight.lora_a"], A)
    np.testing.assert_array_equal(tensors[f"{name}.weight.lora_b"], B)


def test_a_fused_projection_is_cut_as_the_converter_cuts_it(tmp_path):
    names = {"transformer.h.0.attn.kv.weight": (8, 16), "transformer.h.0.mlp.gate_up_proj.weight": (512, 16)}
    config = {"n_embd": 16, "n_head": 4}
    base = base_of(tmp_path / "base", "gpt_refact", "GPTRefactForCausalLM", config, names)
    kv, mlp = lora(8, 16), lora(512, 16, seed=4)
    targets = {"transformer.h.0.attn.kv": kv[2], "transformer.h.0.mlp.gate_up_proj": mlp[2]}
    ak.write(ak.Adapter({Target(k): (u,) for k, u in targets.items()}), tmp_path / "a.gguf", "gguf", base=base)
    architecture, tensors = written(tmp_path / "a.gguf")
    assert architecture == "refact"
    for whole, names in ((kv, ("attn_k", "attn_v")), (mlp, ("ffn_gate", "ffn_up"))):
        half = len(whole[1]) // 2
        for number, name in enumerate(names):
            np.testing.assert_array_equal(tensors[f"blk.0.{name}.weight.lora_a"], whole[0])
            expected = whole[1][number * half : (number + 1) * half]
            np.testing.assert_array_equal(tensors[f"blk.0.{name}.weight.lora_b"], expected)


@pytest.mark.parametrize(
    ("model_type", "kind", "stem", "leaves", "files"),
    [
        ("arctic", "ArcticForCausalLM", "block_sparse_moe.experts", ("w1", "w2", "w3"), ("gate", "down", "up")),
        ("llada_moe", "LLaDAMoEModelLM", "mlp.experts", ("gate_proj",), ("gate",)),
        ("smallthinker", "SmallThinkerForCausalLM", "block_sparse_moe.experts", ("up", "down"), ("up", "down")),
    ],
)
def test_experts_are_stacked(model_type, kind, stem, leaves, files, tmp_path):
    modules = [f"model.layers.0.{stem}.{e}.{leaf}" for leaf in leaves for e in range(3)]
    base = base_of(tmp_path / "base", model_type, kind, HEADS, {f"{m}.weight": (16, 16) for m in modules})
    given = [lora(16, 16, seed) for seed, _ in enumerate(modules)]
    updates = {Target(module): (each[2],) for module, each in zip(modules, given, strict=True)}
    ak.write(ak.Adapter(updates), tmp_path / "a.gguf", "gguf", base=base)
    _, tensors = written(tmp_path / "a.gguf")
    assert len(tensors) == 2 * len(leaves)
    for number, file in enumerate(files):
        own = given[3 * number : 3 * number + 3]
        np.testing.assert_array_equal(tensors[f"blk.0.ffn_{file}_exps.weight.lora_a"], np.stack([a for a, _, _ in own]))
        np.testing.assert_array_equal(tensors[f"blk.0.ffn_{file}_exps.weight.lora_b"], np.stack([b for _, b, _ in own]))


def test_embeddings_that_the_converter_scales_have_no_place(tmp_path):
    """Jais: token embeddings and head are multiplied by numbers of its config."""
    names = {"lm_head.weight": (20, 16), "transformer.h.0.mlp.c_fc2.weight": (16, 24)}
    base = base_of(tmp_path / "base", "jais", "JAISLMHeadModel", {"n_embd": 16, "n_head": 4}, names)
    with pytest.raises(Unrepresentable, match="lm_head"):
        ak.write(ak.Adapter({Target("lm_head"): (lora(20, 16)[2],)}), tmp_path / "a.gguf", "gguf", base=base)
    target = Target("transformer.h.0.mlp.c_fc2", "in out *k")
    A, B, update = lora(24, 16)
    ak.write(ak.Adapter({target: (update,)}), tmp_path / "b.gguf", "gguf", base=base)
    _, tensors = written(tmp_path / "b.gguf")
    np.testing.assert_array_equal(tensors["blk.0.ffn_gate.weight.lora_a"], A)
    np.testing.assert_array_equal(tensors["blk.0.ffn_gate.weight.lora_b"], B)
