"""Merges into GGUF files of each kind of row order, against what llama.cpp's converter makes of PEFT's merged model.

tests/data/gguf/KIND holds a tiny base that the converter wrote, the adapter that PEFT trained beside it, and the file
that the converter wrote of the model that PEFT merged. tools/foreign/check_gguf.py made them, and checks 66 models.
`grouped_rope`, `thirds_rope`, `qkv_apart` and `heads_by_block` are InternLM2, Baichuan, Ling and Nemotron NAS, which
transformers does not have: their bases are random tensors under the hub's names, and W + alpha / r * B A is what the
converter wrote the second file of.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.errors import TargetNotFound, Unrepresentable, Unsupported
from adapterkit.methods.lora import LoRA
from adapterkit.naming.gguf import name_for
from adapterkit.naming.heads import heads_of

DATA = Path(__file__).parents[1] / "data" / "gguf"
KINDS = sorted(folder.name for folder in DATA.iterdir())


def tensors(path):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_what_llama_cpp_makes_of_pefts_merged_model(kind, tmp_path):
    folder = DATA / kind
    ak.merge(folder / "base.gguf", folder, tmp_path / "out.gguf")
    before, expected, found = (
        tensors(p) for p in (folder / "base.gguf", folder / "merged.gguf", tmp_path / "out.gguf")
    )
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6 * np.abs(tensor).max(), err_msg=name)
        changed += not np.array_equal(before[name], tensor)
    assert changed >= 4
    assert ak.verify(tmp_path / "out.gguf", folder / "base.gguf", [folder]).ok


def joined(source, out, parts, whole):
    """A file of llama.cpp's converter with some tensors of each layer joined by rows, as its --fuse options do."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, bytes(reader.fields["general.architecture"].parts[-1]).decode())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    held = tensors(source)
    for name, tensor in held.items():
        if parts[0] in name.split("."):
            group = [held[name.replace(parts[0], part)] for part in parts]
            writer.add_tensor(name.replace(parts[0], whole), np.concatenate(group, tensor.ndim - 2))
        elif not set(parts) & set(name.split(".")):
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("kind", "parts", "whole"),
    [
        ("rope", ("attn_q", "attn_k", "attn_v"), "attn_qkv"),
        ("experts", ("attn_q", "attn_k", "attn_v"), "attn_qkv"),
        ("experts", ("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps"),
    ],
)
def test_tensors_that_the_converter_joined_are_merged_into(kind, parts, whole, tmp_path):
    folder = DATA / kind
    base = joined(folder / "base.gguf", tmp_path / "base.gguf", parts, whole)
    wanted = tensors(joined(folder / "merged.gguf", tmp_path / "merged.gguf", parts, whole))
    ak.merge(base, folder, tmp_path / "out.gguf")
    before, found = tensors(base), tensors(tmp_path / "out.gguf")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6 * np.abs(tensor).max(), err_msg=name)
        assert f".{whole}." not in name or not np.array_equal(before[name], tensor)
    assert ak.verify(tmp_path / "out.gguf", base, [folder]).ok
    ak.merge(base, folder, tmp_path / "small.gguf", dtype="F16")
    assert ak.verify(tmp_path / "small.gguf", base, [folder]).ok


def test_a_joined_tensor_of_other_heads_is_refused(tmp_path):
    parts = ("attn_q", "attn_k", "attn_v")
    base = joined(DATA / "rope" / "base.gguf", tmp_path / "base.gguf", (*parts, "attn_output"), "attn_qkv")
    with pytest.raises(Unsupported, match="the heads need"):
        ak.merge(base, DATA / "rope", tmp_path / "out.gguf")


def test_all_kinds_of_orders_are_among_the_cases():
    assert KINDS == [
        "dense_hybrid", "experts", "grouped_rope", "heads_by_block", "hybrid",
        "interleaved", "latent", "layers_twice", "linear", "linear_split",
        "qkv_apart", "qkv_by_group", "qkv_by_head", "rope", "rotary", "stack_in_parts", "thirds_rope", "turned",
    ]  # fmt: skip


def write(path, architecture, kind="model", names=("token_embd",)):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    for name in names:
        writer.add_tensor(f"{name}.weight", np.zeros((4, 4), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "kind"), [("clip", "mmproj"), ("clip", "model")])
def test_a_projector_is_left_alone_and_said(architecture, kind, tmp_path):
    base = write(tmp_path / "mmproj.gguf", architecture, kind, ["v.blk.0.attn_q"])
    before = base.read_bytes()
    with pytest.raises(Unsupported, match="mmproj file"):
        ak.merge(base, DATA / "rope", tmp_path / "out.gguf")
    assert base.read_bytes() == before
    assert not (tmp_path / "out.gguf").exists()


def test_one_of_the_two_tensors_of_a_weight_is_no_target(tmp_path):
    """llama.cpp keeps kv_b_proj of DeepSeek as two tensors, one of them turned head by head."""
    base = write(tmp_path / "a.gguf", "deepseek2", names=["blk.0.attn_k_b", "blk.0.attn_output"])
    adapter = ak.Adapter(
        {ak.Target("model.layers.0.self_attn.kv_b_proj"): next(iter(ak.read(DATA / "rope").updates.values()))}
    )
    with pytest.raises(TargetNotFound, match="kv_b_proj"):
        ak.merge(base, adapter, tmp_path / "out.gguf")


@pytest.mark.parametrize(("family", "fits"), [("mistral", True), ("llama", True), ("gemma", False)])
def test_adapters_of_all_families_of_an_architecture_fit_its_files(family, fits, tmp_path):
    """llama.cpp's converter makes files of the architecture llama from Mistral's models too."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((DATA / "rope" / "adapter_model.safetensors").read_bytes())
    config = json.loads((DATA / "rope" / "adapter_config.json").read_text())
    library = f"transformers.models.{family}.modeling_{family}"
    config["auto_mapping"] = {"base_model_class": "Any", "parent_library": library}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if fits:
        ak.merge(DATA / "rope" / "base.gguf", folder, tmp_path / "out.gguf")
        ak.merge(DATA / "rope" / "base.gguf", DATA / "rope", tmp_path / "plain.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    else:
        with pytest.raises(TargetNotFound, match="family gemma"):
            ak.merge(DATA / "rope" / "base.gguf", folder, tmp_path / "out.gguf")


def test_an_architecture_without_a_family_is_refused_by_name(tmp_path):
    base = write(tmp_path / "a.gguf", "zebra")
    with pytest.raises(Unsupported, match=r"'zebra'.*Known: .*granitemoe"):
        ak.merge(base, DATA / "rope", tmp_path / "out.gguf")


TWO = "llama.cpp splits this weight into two tensors"
APART = {
    "latent": (("kv_b_proj",), TWO), "linear_split": (("in_proj_qkvz",), TWO),
    "rotary": (("q_proj", "k_proj"), "does not state which of two orders"),
    "grouped_rope": (("attention.wqkv",), "group by group in one tensor"),
}  # fmt: skip
"""Kind -> the modules for which llama.cpp's files have no adapter, and why."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_to_llama_cpp_and_back(kind, tmp_path):
    """Factors in the file's row order and names, merged by numpy, are what the merged file holds."""
    folder = DATA / kind
    family = json.loads((folder / "config.json").read_text())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(family))
    shapes = json.loads((folder / "shapes.json").read_text())
    from safetensors.numpy import save_file

    save_file({n: np.zeros(s, "f4") for n, s in shapes.items()}, tmp_path / "base" / "model.safetensors")
    adapter = ak.read(folder, base=tmp_path / "base")
    if kind in APART:
        modules, why = APART[kind]
        with pytest.raises(Unrepresentable, match=f"{modules[-1]}: .*{why}"):
            ak.write(adapter, tmp_path / "a.gguf", "gguf", tmp_path / "base", "fold")
        updates = {target: given for target, given in adapter.updates.items() if not target.path.endswith(modules)}
        adapter = adapter.replace(updates=updates)
    ak.write(adapter, tmp_path / "a.gguf", "gguf", tmp_path / "base", "fold")
    again = ak.read(tmp_path / "a.gguf", base=tmp_path / "base")
    assert ak.ops.compare(again, adapter.bind(tmp_path / "base")).equal
    before, expected, factors = (
        tensors(p) for p in (folder / "base.gguf", folder / "merged.gguf", tmp_path / "a.gguf")
    )
    alpha = float(gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.lora.alpha"].parts[-1][0])
    names = {name.rpartition(".lora_")[0] for name in factors}
    assert names
    for name in names:
        A, B = (factors[f"{name}.lora_{side}"].astype("f8") for side in "ab")
        change = alpha / A.shape[-2] * (B @ A)
        got = before[name] + change.reshape(before[name].shape)
        np.testing.assert_allclose(got, expected[name], atol=2e-6 * np.abs(expected[name]).max(), err_msg=name)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "t5encoder"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "t5"),
        ({"model_type": "umt5", "architectures": ["UMT5EncoderModel"]}, "t5encoder"),
        ({"model_type": "nemotron_h", "num_experts_per_tok": 2}, "nemotron_h_moe"),
        ({"model_type": "nemotron_h"}, "nemotron_h"),
        ({"model_type": "exaone", "architectures": ["ExaoneForCausalLM"]}, "exaone"),
        ({"model_type": "gpt-sw3", "architectures": ["GPT2LMHeadModel"]}, "gpt2"),
    ],
)
def test_the_base_says_which_of_a_familys_architectures_is_written(config, name):
    assert name_for(config)[0] == name


def test_a_class_that_llama_cpp_takes_for_another_family_is_refused():
    with pytest.raises(Unsupported, match=r".*LlamaForCausalLM.* is not supported for a base with model_type exaone"):
        name_for({"model_type": "exaone", "architectures": ["LlamaForCausalLM"]})


def test_blocks_that_share_keys_differently_are_refused():
    blocks = [{"attention": {"n_heads_in_group": group}} for group in (4, 8)]
    config = {"num_attention_heads": 8, "hidden_size": 32, "block_configs": blocks}
    with pytest.raises(Unsupported, match="differ in query heads per key head: 4, 8"):
        heads_of(config, "blk.0.attn_k")


def test_a_config_with_other_heads_than_the_rows_is_refused(tmp_path):
    """Step 3.5 and others state their key heads under names of their own; half as many rows fit the queries' heads."""
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.0.self_attn.k_proj.weight": np.zeros((8, 16), np.float32)}, tmp_path / "model.safetensors")
    pair = LoRA(A=torch.randn(2, 16), B=torch.randn(8, 2), scaling=1.0)
    adapter = ak.Adapter({Target("model.layers.0.self_attn.k_proj"): (pair,)})
    with pytest.raises(Unsupported, match="the base's config states 4 heads of width 4, which do not give 8 rows"):
        ak.write(adapter, tmp_path / "out.gguf", "gguf", base=tmp_path)
