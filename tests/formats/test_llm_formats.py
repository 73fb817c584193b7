"""Formats of language models: from each into each, what they cannot say, and what their own readers make of it."""

import io
import json
import tarfile
from itertools import permutations
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from llm_adapters import BASE, FILES, SHAPES, VECTORS, content, deltas, llama, lora, merged, place, write_base
from safetensors.numpy import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.errors import Malformed, Unrepresentable, Unsupported, UsageError
from adapterkit.formats import FORMATS
from adapterkit.formats.peft.profiles import profiles
from adapterkit.io.lazy import as_lazy, from_numpy
from adapterkit.methods.dora import DoRA
from adapterkit.methods.replacement import Replacement

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert np.abs(value - other[key]).max() <= tolerance * np.abs(value).max()


@pytest.mark.parametrize("name", FILES)
def test_is_detected_as_itself_and_nothing_else(name, tmp_path):
    adapter = with_head(llama()) if name == "tinker" else llama()
    path = place(tmp_path, name)
    ak.write(adapter, path, name, BASE, "fold")
    assert [known for known in FORMATS if FORMATS[known]().sniff(path)] == [name]


def with_head(adapter):
    """Only Tinker calls the head as it does."""
    return adapter.replace(updates={**adapter.updates, Target("lm_head"): (lora(12, 16, seed=50),)})


@pytest.mark.parametrize(("first", "second"), [*permutations([*FILES, "peft", "adapterkit"], 2)])
def test_from_each_into_each(first, second, tmp_path, request):
    expected = deltas(llama())
    path = request.getfixturevalue("written")[first]
    out = tmp_path / FILES.get(second, "out")
    ak.write(ak.read(path, first, BASE), out, second, BASE, "fold")
    same(expected, deltas(ak.read(out, second, BASE)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One adapter in every format, its scaling a power of two."""
    folder = tmp_path_factory.mktemp("written")
    paths = {name: place(folder, name) for name in FILES} | {"peft": folder / "p", "adapterkit": folder / "n"}
    for name, path in paths.items():
        ak.write(llama(), path, name, BASE, "fold")
    return paths


@pytest.mark.parametrize("name", FILES)
def test_native_and_back_gives_the_same_bytes(name, tmp_path):
    path, again = place(tmp_path / "one", name), place(tmp_path / "two", name)
    ak.write(llama(dtype="f2"), path, name, BASE, "fold")
    read = ak.read(path, name, BASE)
    ak.write(read, tmp_path / "native")
    ak.write(ak.read(tmp_path / "native"), again, name, BASE)
    assert content(again) == content(path)
    assert {as_lazy(leaf).dtype.name for _, u in read for leaf in u.tensors.values()} == {"F16"}


@pytest.mark.parametrize("name", FILES)
def test_scalings_and_ranks_that_differ_are_folded_or_refused(name, tmp_path):
    found = {
        **llama(layers=(0,), names=QKV[1:]).updates,
        Target("model.layers.0.mlp.down_proj"): (lora(16, 24, 4, 0.3),),
    }
    found |= llama(layers=(1,), names=QKV, scaling=0.3).updates
    adapter, path = ak.Adapter(found), place(tmp_path, name)
    if name != "onnx_adapter":
        with pytest.raises(Unrepresentable, match="on_loss='fold'"):
            ak.write(adapter, path, name, BASE)
        assert not content(path)
    lines = ak.write(adapter, path, name, BASE, "fold")
    assert name == "onnx_adapter" or any("folded" in line for line in lines)
    read = {key: value for key, value in deltas(ak.read(path, name, BASE)).items() if value.any()}
    same(deltas(adapter), read, 3e-7)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"onnx_adapter"}))
def test_other_methods_are_refused_by_name_or_dropped(name, tmp_path):
    other = {Target("model.norm"): (Replacement(weight=from_numpy(np.ones(16, "f4"))),)}
    adapter, path = ak.Adapter({**llama().updates, **other}), place(tmp_path, name)
    with pytest.raises(Unrepresentable, match=r"model\.norm: replacement"):
        ak.write(adapter, path, name, BASE, "fold")
    assert not content(path)
    baked = ak.Adapter({t: tuple(u.replace(scaling=1.0) for u in us) for t, us in llama().updates.items()} | other)
    lines = ak.write(baked, path, name, BASE, "drop")
    assert any(line.startswith("left out model.norm") for line in lines)
    assert len(deltas(ak.read(path, name, BASE))) == 14


@pytest.mark.parametrize("layers", [(0,), (1,)])
@pytest.mark.parametrize("names", [("mlp.down_proj", "self_attn.q_proj"), ("self_attn.v_proj", "mlp.down_proj")])
def test_litgpts_layers_without_an_update_hold_zeros_of_their_own_width(names, layers, tmp_path):
    adapter, path = llama(layers, names), place(tmp_path, "litgpt")
    ak.write(adapter, path, "litgpt", BASE)
    found = deltas(ak.read(path, "litgpt", BASE))
    for target, delta in deltas(adapter).items():
        np.testing.assert_allclose(found.pop(target), delta, rtol=1e-6)
    assert {target.split(".", 3)[3] for target in found} >= set(names)
    assert all(delta.shape == SHAPES[target.split(".", 3)[3]] for target, delta in found.items())
    assert not any(delta.any() for delta in found.values())


@pytest.mark.parametrize("name", ["gguf", "megatron", "torchtune"])
def test_heads_are_needed_where_they_decide(name, tmp_path):
    path = place(tmp_path, name)
    ak.write(shared_a(), path, name, BASE)
    with pytest.raises(UsageError, match="heads"):
        ak.read(path, name)
    with pytest.raises(UsageError, match="base"):
        ak.write(shared_a(), place(tmp_path / "b", name), name)
    assert not content(place(tmp_path / "b", name))


def shared_a():
    """q, k and v of both layers with one A each, as a fused weight has them."""
    found = {}
    for layer in (0, 1):
        first = lora(16, 16, seed=layer)
        for seed, name in enumerate(QKV):
            found[Target(f"model.layers.{layer}.{name}")] = (lora(*SHAPES[name], seed=10 + seed).replace(A=first.A),)
    return ak.Adapter(found)


@pytest.mark.parametrize("name", ["megatron", "nemo"])
def test_one_a_is_fused_by_groups_and_three_are_canonical(name, tmp_path):
    fused, canonical = place(tmp_path / "f", name), place(tmp_path / "c", name)
    ak.write(shared_a(), fused, name, BASE)
    ak.write(llama(names=QKV), canonical, name, BASE)
    one, other = ak.read(fused, name, BASE), ak.read(canonical, name, BASE)
    same(deltas(shared_a()), deltas(one))
    same(deltas(llama(names=QKV)), deltas(other))
    assert one.foreign.data["fused"]
    assert not other.foreign.data["fused"]
    if name == "megatron":
        rows = as_lazy(ak.io.safetensors.read(fused)[f"decoder.layers.0.{FUSED}"]).numpy()
        assert np.array_equal(rows, by_hand(shared_a(), 0))


FUSED = "self_attention.linear_qkv.adapter.linear_out.weight"


def by_hand(adapter, layer):
    """Rows of q, k and v: for each of two groups two heads that ask, one key, one value, of four rows each."""
    q, k, v = (as_lazy(adapter.updates[Target(f"model.layers.{layer}.{n}")][0].B).numpy() for n in QKV)
    return np.concatenate([q[0:8], k[0:4], v[0:4], q[8:16], k[4:8], v[4:8]])


def test_nemos_archive_holds_its_config_and_tensors(tmp_path):
    path = place(tmp_path, "nemo")
    ak.write(shared_a(), path, "nemo", BASE)
    with tarfile.open(path) as archive:
        config = yaml.safe_load(archive.extractfile("./model_config.yaml"))
        weights = archive.extractfile("./model_weights.ckpt").read()
    assert config["peft"]["lora_tuning"] | {"adapter_dim": 2, "alpha": 4} == config["peft"]["lora_tuning"]
    state = torch.load(io.BytesIO(weights), weights_only=True)
    assert all(".adapter_layer.lora_kqv_adapter.linear_" in key for key in state)


def test_onnxruntime_reads_what_is_written_and_the_other_way_round(tmp_path):
    import onnxruntime

    ak.write(llama(dtype="f2"), tmp_path / "a.onnx_adapter", "onnx_adapter")
    # Keep this object: the values point into its memory.
    opened = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter"))
    read = opened.get_parameters()
    ours = {f"{t.path}.{field}": as_lazy(leaf) for t, u in llama(dtype="f2") for field, leaf in u.tensors.items()}
    assert read.keys() == ours.keys()
    assert all(np.array_equal(value.numpy(), ours[name].numpy()) for name, value in read.items())
    theirs = onnxruntime.AdapterFormat()
    theirs.set_adapter_version(7)
    theirs.set_model_version(3)
    theirs.set_parameters(read)
    theirs.export_adapter(str(tmp_path / "b.onnx_adapter"))
    (tmp_path / "b.onnx_adapter.json").write_bytes((tmp_path / "a.onnx_adapter.json").read_bytes())
    adapter = ak.read(tmp_path / "b.onnx_adapter")
    assert adapter.digest() == llama(dtype="f2").digest()
    ak.write(adapter, tmp_path / "c.onnx_adapter", "onnx_adapter")
    again = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "c.onnx_adapter"))
    assert (again.get_adapter_version(), again.get_model_version()) == (7, 3)


def test_onnx_adapter_says_every_method(tmp_path):
    seen = set()
    for vector in sorted((VECTORS / "methods").glob("*.adapter.safetensors")):
        adapter = ak.read(vector)
        if any(as_lazy(leaf).dtype.name.startswith("C") for _, u in adapter for leaf in u.tensors.values()):
            continue
        ak.write(adapter, tmp_path / "a.onnx_adapter", "onnx_adapter")
        assert ak.read(tmp_path / "a.onnx_adapter").digest() == adapter.digest()
        seen |= {update.method for _, update in adapter}
    assert len(seen) > 20


@pytest.mark.parametrize("end", ["onnx_adapter", "npz", "safetensors"])
def test_olives_factors_are_turned_and_hold_the_scaling(end, tmp_path):
    path = tmp_path / f"a.{end}"
    ak.write(llama(), path, "olive", on_loss="fold")
    same(deltas(llama()), deltas(ak.read(path, "olive")))
    if end == "npz":
        with np.load(path) as file:
            stored = dict(file)
        own = llama().updates[Target("model.layers.0.mlp.down_proj")][0]
        assert np.array_equal(stored["model.layers.0.mlp.down_proj.lora_A.weight"], as_lazy(own.A).numpy().T)
        assert np.array_equal(stored["model.layers.0.mlp.down_proj.lora_B.weight"], 2 * as_lazy(own.B).numpy().T)
        assert ak.detect(path) == "olive"


def test_tensorrt_llms_arrays_are_those_of_its_script(tmp_path):
    found = llama(layers=(1,), names=("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"))
    ak.write(found, tmp_path, "tensorrt_llm", on_loss="fold")
    weights, config = np.load(tmp_path / "model.lora_weights.npy"), np.load(tmp_path / "model.lora_config.npy")
    assert config.tolist() == [[[1, 1, 2], [7, 1, 2], [5, 1, 2]]]
    assert (weights.shape, config.dtype) == ((1, 3, 2 * 16 + 24 * 2), np.int32)
    for row, (_, update) in zip(weights[0], found, strict=True):
        flat = np.concatenate([as_lazy(update.A).numpy().ravel(), 2 * as_lazy(update.B).numpy().ravel()])
        assert np.array_equal(row, np.pad(flat, (0, 80 - len(flat))))


def test_tensorrt_llm_has_a_fused_gate_and_up_the_other_way_round(tmp_path):
    base = write_base(tmp_path / "base", {}, {"model.layers.0.mlp.gate_up_proj.weight": (8, 6)})
    adapter = ak.Adapter({Target("model.layers.0.mlp.gate_up_proj"): (lora(8, 6, scaling=1.0),)})
    ak.write(adapter, tmp_path / "out", "tensorrt_llm")
    B = as_lazy(adapter.updates[Target("model.layers.0.mlp.gate_up_proj")][0].B).numpy()
    row = np.load(tmp_path / "out" / "model.lora_weights.npy")[0, 0]
    assert np.array_equal(row[12:].reshape(8, 2), np.concatenate([B[4:], B[:4]]))
    same(deltas(adapter), deltas(ak.read(tmp_path / "out", base=base)))


MOE = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3"), {"num_local_experts": 3}),
    "qwen3_moe": ("mlp", ("gate_proj", "down_proj", "up_proj"), {"num_experts": 3}),
}


def experts(model, count=3, ranks=(2, 3, 2)):
    block, names, _ = MOE[model]
    found = {}
    for number, name in enumerate(names):
        for e in range(count):
            path = f"model.layers.0.{block}.experts.{e}.{name}"
            found[Target(path)] = (lora(6, 8, ranks[e], 2.0 / ranks[e], seed=10 * number + e),)
    return ak.Adapter(found)


def moe_base(folder, model, prefix=""):
    config = {"model_type": model, "num_attention_heads": 2, "hidden_size": 8, **MOE[model][2]}
    return write_base(folder, config, {f"{prefix}{t.path}.weight": (6, 8) for t, _ in experts(model)})


@pytest.mark.parametrize("model", MOE)
@pytest.mark.parametrize("name", ["gguf", "mlx"])
def test_experts_are_stacked_and_taken_apart(name, model, tmp_path):
    base, path = moe_base(tmp_path / "base", model), place(tmp_path, name)
    ak.write(experts(model), path, name, base, "fold")
    read = ak.read(path, base=base)
    same(deltas(experts(model)), deltas(read), 3e-7)
    if name == "mlx":
        held = ak.io.safetensors.read(path / "adapters.safetensors")
        assert {leaf.shape for leaf in held.values()} == {(3, 3, 8), (3, 6, 3)}
        assert all(".switch_mlp." in key for key in held)
    lacking = ak.Adapter(dict(list(experts(model).updates.items())[1:]))
    # The base says how many experts there are: one without an update gets a change of zero.
    ak.write(lacking, place(tmp_path / "b", name), name, base, "fold")
    again = deltas(ak.read(place(tmp_path / "b", name), base=base))
    lost = again.keys() - deltas(lacking).keys()
    assert len(lost) == 1
    assert not again.pop(lost.pop()).any()
    same(deltas(lacking), again, 3e-7)


def test_tinkers_experts_share_a_factor(tmp_path):
    adapter = experts("qwen3_moe", ranks=(2, 2, 2))
    first = next(iter(adapter))[1].A
    found = {t: tuple(u.replace(A=first) for u in us) if "gate" in t.path else us for t, us in adapter.updates.items()}
    ak.write(with_head(ak.Adapter(found)), tmp_path / "t", "tinker", on_loss="fold")
    held = ak.io.safetensors.read(tmp_path / "t" / "adapter_model.safetensors")
    assert held["base_model.model.model.layers.0.mlp.experts.w1.lora_A.weight"].shape == (1, 2, 8)
    assert held["base_model.model.model.layers.0.mlp.experts.w1.lora_B.weight"].shape == (3, 6, 2)
    assert "base_model.model.model.unembed_tokens.lora_A.weight" in held
    read = ak.read(tmp_path / "t")
    same(deltas(with_head(ak.Adapter(found))), deltas(read))
    assert len({id(u.A) for t, u in read if "gate" in t.path}) == 1


def test_tinkers_experts_that_share_both_factors_keep_their_number(tmp_path):
    adapter = with_head(experts("qwen3_moe", ranks=(2, 2, 2)))
    one = next(iter(adapter))[1]
    found = {t: tuple(u.replace(A=one.A, B=one.B) for u in us) if "gate" in t.path else us
             for t, us in adapter.updates.items()}  # fmt: skip
    ak.write(ak.Adapter(found), tmp_path / "t", "tinker", on_loss="fold")
    same(deltas(ak.Adapter(found)), deltas(ak.read(tmp_path / "t")))


def test_tinkers_stacks_have_all_experts_of_the_base(tmp_path):
    base = moe_base(tmp_path / "base", "qwen3_moe")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_experts": 3}))
    ak.write(experts("qwen3_moe"), tmp_path / "all", "tinker", base, on_loss="fold")
    with pytest.raises(Unrepresentable, match="the adapter has 2 experts, and the base has 3"):
        ak.write(experts("qwen3_moe", count=2), tmp_path / "two", "tinker", base, on_loss="fold")
    assert not (tmp_path / "two").exists()


def test_tinkers_stacks_of_gpt_oss_reach_a_base_with_stacks(tmp_path):
    rng, layer = np.random.default_rng(8), "model.layers.0"
    config = {"model_type": "gpt_oss", "num_local_experts": 3, "hidden_size": 8, "num_attention_heads": 2}
    stacks = {"gate_up_proj": (3, 8, 12), "down_proj": (3, 6, 8)}
    shapes = {f"{layer}.mlp.experts.{name}": shape for name, shape in stacks.items()}
    base = write_base(tmp_path / "base", config, {**shapes, f"{layer}.self_attn.q_proj.weight": (10, 8)})
    sizes = {"attn.q_proj": ((2, 8), (10, 2)), "mlp.experts.w1": ((1, 2, 8), (3, 6, 2)),
             "mlp.experts.w2": ((3, 2, 6), (1, 8, 2)), "mlp.experts.w3": ((1, 2, 8), (3, 6, 2))}  # fmt: skip
    AB = {name: [rng.normal(size=size).astype("f4") for size in pair] for name, pair in sizes.items()}
    keys = {
        f"base_model.model.{layer}.{n}.lora_{end}.weight": f
        for n, fs in AB.items()
        for end, f in zip("AB", fs, strict=True)
    }
    (tmp_path / "t").mkdir()
    save_file(keys, tmp_path / "t" / "adapter_model.safetensors")
    (tmp_path / "t" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')

    # tinker-cookbook renames `.attn` to `.self_attn`. The columns of gate and up alternate.
    change = {name: 3.0 * B.astype("f8") @ A for name, (A, B) in AB.items()}
    wanted = {key: value.astype("f8") for key, value in load_file(base / "model.safetensors").items()}
    wanted[f"{layer}.self_attn.q_proj.weight"] += change["attn.q_proj"]
    wanted[f"{layer}.mlp.experts.down_proj"] += change["mlp.experts.w2"].swapaxes(1, 2)
    for start, name in enumerate(("w1", "w3")):
        wanted[f"{layer}.mlp.experts.gate_up_proj"][:, :, start::2] += change[f"mlp.experts.{name}"].swapaxes(1, 2)
    for number, given in enumerate((base, None)):
        same(wanted, merged(base, ak.read(tmp_path / "t", base=given), tmp_path / f"merged{number}"), 1e-6)

    ak.write(ak.read(tmp_path / "t"), tmp_path / "again", "tinker")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == keys.keys()


def test_tinkers_parts_of_a_fused_linear_attention_have_its_rows(tmp_path):
    rng, name = np.random.default_rng(3), "layers.0.linear_attn"
    fused = f"model.language_model.{name}.in_proj_qkv.weight"
    config = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "hidden_size": 8}}
    base = write_base(
        tmp_path / "base", config, {fused: (14, 8), f"model.language_model.{name}.out_proj.weight": (8, 6)}
    )
    AB = {part: (rng.normal(size=(2, 8)).astype("f4"), rng.normal(size=(size, 2)).astype("f4"))
          for part, size in {"v": 6, "k": 3, "q": 5}.items()}  # fmt: skip
    keys = {f"base_model.model.model.{name}.in_proj_{part}.lora_{end}.weight": factor
            for part, pair in AB.items() for end, factor in zip("AB", pair, strict=True)}  # fmt: skip
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    save_file(keys, tmp_path / "t" / "adapter_model.safetensors")
    assert ak.detect(tmp_path / "t") == "tinker"

    # tinker-cookbook: q, k and v are consecutive rows; their sizes are those of the parts' B.
    wanted = load_file(base / "model.safetensors")
    wanted[fused] += 3.0 * np.concatenate([AB[part][1].astype("f8") @ AB[part][0] for part in "qkv"])
    for given in (base, None):
        read = ak.read(tmp_path / "t", base=given)
        same(wanted, merged(base, read, tmp_path / f"merged {given is None}"), 1e-6)
        out = tmp_path / f"again {given is None}"
        ak.write(read.replace(foreign=None), out, "tinker", given)
        again = load_file(out / "adapter_model.safetensors")
        assert again.keys() == keys.keys()
        assert all(np.array_equal(again[key], value) for key, value in keys.items())

    lacking = {key: value for key, value in keys.items() if "in_proj_k" not in key}
    save_file(lacking, tmp_path / "t" / "adapter_model.safetensors")
    with pytest.raises(Malformed, match=r"in_proj_k, which the file lacks"):
        ak.read(tmp_path / "t")


def test_tinkers_adapters_of_nemotron_have_other_names(tmp_path):
    rng, layer = np.random.default_rng(4), "layers.{}.mixer."
    sizes = {"experts.0.up_proj": (6, 8), "experts.1.up_proj": (6, 8), "experts.0.down_proj": (8, 6),
             "experts.1.down_proj": (8, 6)}  # fmt: skip
    shapes = {f"backbone.{layer.format(1)}{name}.weight": shape for name, shape in sizes.items()}
    mamba, head = f"backbone.{layer.format(0)}in_proj.weight", "lm_head.weight"
    config = {"model_type": "nemotron_h", "n_routed_experts": 2, "hidden_size": 8}
    base = write_base(tmp_path / "base", config, {**shapes, mamba: (13, 8), head: (12, 8)})
    factors = {"0:gate_proj": ((2, 8), (4, 2)), "0:x_proj": ((2, 8), (5, 2)), "1:experts.w1": ((1, 2, 8), (2, 6, 2)),
               "1:experts.w2": ((2, 2, 6), (1, 8, 2)), "1:experts.w3": ((0,), (0,))}  # fmt: skip
    AB = {name: [rng.normal(size=size).astype("f4") for size in pair] for name, pair in factors.items()}
    keys = {}
    for name, pair in AB.items():
        stem = "base_model.model.model." + layer.format(name[0]) + name[2:]
        keys |= {f"{stem}.lora_{end}.weight": factor for end, factor in zip("AB", pair, strict=True)}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    save_file(keys, tmp_path / "t" / "adapter_model.safetensors")
    assert ak.detect(tmp_path / "t") == "tinker"

    # tinker-cookbook: w1 is up and w2 is down; gate_proj and x_proj are the first rows of Mamba's in_proj.
    wanted = load_file(base / "model.safetensors")
    change = {name: 3.0 * B.astype("f8") @ A for name, (A, B) in AB.items() if A.size}
    wanted[mamba][:9] += np.concatenate([change["0:gate_proj"], change["0:x_proj"]])
    for expert in range(2):
        for end, name in (("up_proj", "1:experts.w1"), ("down_proj", "1:experts.w2")):
            wanted[f"backbone.{layer.format(1)}experts.{expert}.{end}.weight"] += change[name][expert]
    for given in (base, None):
        same(wanted, merged(base, ak.read(tmp_path / "t", base=given), tmp_path / f"merged {given is None}"), 1e-6)
    ak.write(ak.read(tmp_path / "t").replace(foreign=None), tmp_path / "again", "tinker")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    same({key: value for key, value in keys.items() if value.size}, again)


def test_a_lora_of_mamba_is_not_tinkers(tmp_path):
    """Mamba has a module `mixer.x_proj`, which has the same name as a part of a fused weight in Tinker's files."""
    sizes = {"x_proj": (16, 12), "in_proj": (8, 32), "out_proj": (16, 8)}
    mixer = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
    layers = nn.ModuleList([nn.ModuleDict({"mixer": mixer})])
    config = peft.LoraConfig(r=2, target_modules=[*sizes])
    model = peft.get_peft_model(nn.ModuleDict({"backbone": nn.ModuleDict({"layers": layers})}), config)
    model.save_pretrained(tmp_path / "lora")
    assert ak.detect(tmp_path / "lora") == "peft"
    read = ak.read(tmp_path / "lora")
    assert {target.path for target in read.updates} == {f"backbone.layers.0.mixer.{name}" for name in sizes}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_loralibs_trained_biases_replace_the_bases(bias, tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 4))
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: leaf.detach().numpy() for name, leaf in model.state_dict().items()}, base / "model.safetensors")
    pairs = {path: (torch.randn(3, model[int(path)].in_features), torch.randn(model[int(path)].out_features, 3))
             for path in ("0", "2")}  # fmt: skip
    # As loralib's `lora_state_dict`, which keeps the biases of all layers, or of the layers with LoRA.
    trained = {f"{path}.bias": torch.randn(len(model[int(path)].bias))
               for path in (("0", "2") if bias == "lora_only" else ("0", "1", "2", "3"))}  # fmt: skip
    state = trained | {f"{path}.lora_{name}": leaf for path, pair in pairs.items()
                       for name, leaf in zip("AB", pair, strict=True)}  # fmt: skip
    torch.save(state, tmp_path / "lora.pt")
    (tmp_path / "loralib.json").write_text('{"alpha": 6}')
    x = torch.randn(4, 6)
    with torch.no_grad():
        for path, (A, B) in pairs.items():
            model[int(path)].weight += 2 * B @ A
        for name, leaf in trained.items():
            model[int(name[0])].bias.copy_(leaf)
        expected = model(x)
    assert ak.detect(tmp_path / "lora.pt") == "loralib"
    for options in ({}, {"base": base}):
        adapter = ak.read(tmp_path / "lora.pt", **options)
        ak.merge(base, [adapter], tmp_path / "merged", overwrite=True)
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        model.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in merged.items()})
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "again").mkdir()
    ak.write(adapter, tmp_path / "again" / "lora.pt", "loralib")
    again = torch.load(tmp_path / "again" / "lora.pt")
    assert list(again) == list(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["conv", "conv.conv"])
def test_loralibs_convolutions_are_found_in_both_bases(name, tmp_path):
    """In loralib, the weight and the bias of a Conv2d belong to an inner layer, `conv`."""
    (tmp_path / "base").mkdir()
    weight = {f"{name}.weight": np.ones((6, 4, 3, 3), "f4"), f"{name}.bias": np.ones(6, "f4")}
    save_file(weight, tmp_path / "base" / "model.safetensors")
    A, B, bias = torch.randn(6, 12), torch.randn(18, 6), torch.randn(6)
    torch.save({"conv.lora_A": A, "conv.lora_B": B, "conv.conv.bias": bias}, tmp_path / "lora.pt")
    (tmp_path / "loralib.json").write_text('{"alpha": 6}')
    ak.merge(tmp_path / "base", [ak.read(tmp_path / "lora.pt", base=tmp_path / "base")], tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected = 1 + 3 * (B.double() @ A.double()).reshape(6, 4, 3, 3).numpy()
    np.testing.assert_allclose(found[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[f"{name}.bias"], bias.numpy())


@pytest.mark.parametrize("name", ["gguf", "megatron", "mlx", "tinker", "torchtune"])
def test_a_prefix_of_the_base_is_found_by_walking_it(name, tmp_path):
    shapes = {f"language_model.model.layers.{n}.{m}.weight": s for n in (0, 1) for m, s in SHAPES.items()}
    config = json.loads((BASE / "config.json").read_text())
    base, path = (
        write_base(tmp_path / "base", {"text_config": config, "model_type": "llama"}, shapes),
        place(tmp_path, name),
    )
    ak.write(llama(), path, name, BASE, "fold")
    wanted = {f"language_model.{key}": value for key, value in deltas(llama()).items()}
    same(wanted, deltas(ak.read(path, name, base)))


@pytest.mark.parametrize("name", ["mlx", "torchtune"])
def test_dora_goes_there_and_back_with_its_magnitude(name, tmp_path):
    rng = np.random.default_rng(5)
    found = {
        t: (DoRA(A=u.A, B=u.B, scaling=2.0, magnitude=from_numpy(rng.random(u.B.shape[0], "f4") + 1)),)
        for t, u in llama()
    }
    path = place(tmp_path, name)
    ak.write(ak.Adapter(found), path, name, BASE)
    assert ak.read(path, base=BASE).digest() == ak.Adapter(found).digest()


def test_dora_of_torchtune_also_multiplies_a_bias(tmp_path):
    rng, name = np.random.default_rng(6), "model.layers.0.self_attn.v_proj"
    config = json.loads((BASE / "config.json").read_text()) | {"model_type": "qwen2"}
    base = write_base(tmp_path / "base", config, {f"{name}.weight": (8, 16), f"{name}.bias": (8,)})
    A, B, m = (rng.normal(size=size).astype("f4") for size in ((2, 16), (8, 2), (8,)))
    ends = {"lora_a.weight": A, "lora_b.weight": B, "magnitude": m}
    (tmp_path / "t").mkdir()
    file = tmp_path / "t" / "adapter_model.pt"
    torch.save({f"layers.0.attn.v_proj.{end}": torch.from_numpy(value) for end, value in ends.items()}, file)
    (tmp_path / "t" / "torchtune.json").write_text('{"alpha": 6}')
    before = {key: value.astype("f8") for key, value in load_file(base / "model.safetensors").items()}
    V = before[f"{name}.weight"] + 3.0 * B.astype("f8") @ A
    quotient = m / np.linalg.norm(V, axis=1)

    # torchtune's forward is quotient * (base(x) + scaling * B @ A @ x), and base(x) includes the bias.
    read = ak.read(file, base=base)
    ours = merged(base, read, tmp_path / "merged")
    same({"weight": quotient[:, None] * V, "bias": quotient * before[f"{name}.bias"]},
         {end: ours[f"{name}.{end}"] for end in ("weight", "bias")}, 1e-6)  # fmt: skip
    ak.write(read.replace(foreign=None), place(tmp_path, "torchtune"), "torchtune", base)
    again = merged(base, ak.read(place(tmp_path, "torchtune"), base=base), tmp_path / "again")
    same(ours, again, 1e-6)

    paper = ak.read(file, base=base, compat="formula")
    assert np.array_equal(merged(base, paper, tmp_path / "paper")[f"{name}.bias"], before[f"{name}.bias"])
    with pytest.raises(Unrepresentable) as caught:
        ak.write(paper.replace(foreign=None, recipe=()), tmp_path / "adapter_model.pt", "torchtune", base)
    assert "multiplies the module's bias" in str(caught.value.items)
    with pytest.raises(UsageError, match="only the base shows"):
        ak.read(file)


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_what_torchtune_converts_for_peft_wrongly_is_refused(model, tmp_path):
    config = json.loads((BASE / "config.json").read_text()) | {"model_type": model}
    base = write_base(
        tmp_path / "base", config, {f"{t.path}.weight": (u.B.shape[0], 16) for t, u in llama() if "attn" in t.path}
    )
    adapter = llama(names=("self_attn.q_proj", "self_attn.v_proj"))
    ak.write(adapter, tmp_path / "peft", "peft")
    (tmp_path / "peft" / "config.json").write_text(json.dumps(config))
    assert ak.read(tmp_path / "peft").digest() == adapter.digest()
    ak.write(adapter, tmp_path / "t" / "adapter_model.pt", "torchtune", base)
    own, settings = tmp_path / "peft" / "adapter_model.pt", tmp_path / "peft" / "adapter_config.json"
    fields = json.loads(settings.read_text())
    kept = {name: fields[name] for name in ("r", "lora_alpha", "target_modules", "peft_type")}
    settings.write_text(json.dumps(kept))
    own.write_bytes((tmp_path / "t" / "adapter_model.pt").read_bytes())
    for given in (None, base):
        if model == "llama":
            assert ak.read(tmp_path / "peft", base=given).digest() == adapter.digest()
            continue
        # Its conversion reorders the rows of q and k as for Llama, but Qwen 2's rows are in transformers' order.
        for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
            with pytest.raises(Unsupported, match="wrong order"):
                ak.read(path, base=given)
    assert ak.read(own, base=base).digest() == adapter.digest()

    # Of DoRA, torchtune's config lacks use_dora, even if only v has an adapter.
    stored, key = (
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
        "base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector",
    )
    only = {name: value for name, value in stored.items() if "v_proj" in name} | {key: np.ones(8, "f4")}
    save_file(only, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match="omits use_dora"):
        ak.read(tmp_path / "peft", base=base)


def test_mlx_gets_the_one_rank_that_its_layers_are_built_with(tmp_path):
    paths = [f"model.layers.{at}.self_attn.q_proj" for at in range(3)]
    updates = {Target(path): (lora(16, 16, rank=rank, seed=rank),) for path, rank in zip(paths, (2, 5, 3), strict=True)}
    wrote = ak.write(ak.Adapter(updates), tmp_path / "mlx", "mlx")
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 5
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert {path: stored[f"{path}.lora_a"].shape for path in paths} == dict.fromkeys(paths, (16, 5))
    assert sum("padded" in line for line in wrote) == 2
    same(deltas(ak.Adapter(updates)), deltas(ak.read(tmp_path / "mlx")), 1e-6)


def test_mlx_holds_whole_parameters_and_slices_of_fused_ones(tmp_path):
    whole = ak.Adapter({Target("model.norm"): (Replacement(weight=from_numpy(np.arange(16, dtype="f4"))),)})
    ak.write(whole, tmp_path / "whole", "mlx")
    assert ak.detect(tmp_path / "whole") == "mlx"
    assert ak.read(tmp_path / "whole").digest() == whole.digest()
    path = "model.layers.0.self_attn.qkv_proj"
    parts = {
        Target(path, rows=rows): (lora(rows[1] - rows[0], 16, seed=rows[0]),) for rows in ((0, 16), (16, 24), (24, 32))
    }
    ak.write(ak.Adapter(parts), tmp_path / "parts", "mlx")
    assert ak.read(tmp_path / "parts").digest() == ak.Adapter(parts).digest()
    assert f"{path}.lora_a.2" in ak.io.safetensors.read(tmp_path / "parts" / "adapters.safetensors")


def test_embeddings_are_what_each_has_them_as(tmp_path):
    found = {Target("model.embed_tokens", "in out *k"): (lora(16, 12, scaling=1.0),), **llama(scaling=1.0).updates}
    for name in ("gguf", "loralib", "minlora", "mlx", "torchtune"):
        path = place(tmp_path, name)
        ak.write(ak.Adapter(found), path, name, BASE)
        out = merged(BASE, ak.read(path, base=BASE), tmp_path / f"{name}-merged")
        expected = merged(BASE, ak.Adapter(found), tmp_path / f"{name}-expected")
        same(expected, out)


MINLORA = {
    "embedding": ("emb", torch.nn.Embedding(20, 8)),
    "embedding, square": ("emb", torch.nn.Embedding(8, 8)),
    "embedding, known name": ("wte", torch.nn.Embedding(20, 8)),
    "linear": ("l", torch.nn.Linear(12, 8, bias=False)),
    "linear, square, name of an embedding": ("shared", torch.nn.Linear(8, 8, bias=False)),
}
"""Kind -> a module's name, and the module."""


@pytest.mark.parametrize("kind", MINLORA)
def test_the_shapes_of_minlora_s_factors_show_an_embedding(kind, tmp_path):
    """minLoRA's `from_embedding` swaps the shapes of A and B, and its forward adds `alpha / r * A @ B`."""
    name, module = MINLORA[kind]
    swapped, weight = isinstance(module, torch.nn.Embedding), module.weight.detach().numpy()
    rng = np.random.default_rng(0)
    (out, in_), rank, alpha = weight.shape, 2, 5.0
    A, B = rng.normal(size=(rank, in_)), rng.normal(size=(out, rank))
    if swapped:
        A, B = rng.normal(size=(out, rank)), rng.normal(size=(rank, in_))
    change = alpha / rank * (A @ B if swapped else B @ A)
    stem = f"{name}.parametrizations.weight.0.lora_"
    state = {f"{stem}{field}": torch.from_numpy(value.astype("f4")) for field, value in (("A", A), ("B", B))}
    torch.save(state, tmp_path / "lora.pt")
    (tmp_path / "minlora.json").write_text(json.dumps({"alpha": alpha}))
    base = tmp_path / "base.safetensors"
    save_file({f"{name}.weight": weight}, base)
    ak.merge(base, tmp_path / "lora.pt", tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")[f"{name}.weight"] - weight
    assert np.abs(found - change).max() <= 1e-5 * np.abs(change).max()
    (tmp_path / "again").mkdir()
    adapter = ak.read(tmp_path / "lora.pt", base=base)
    ak.write(adapter, tmp_path / "again" / "lora.pt", "minlora", base)
    again = torch.load(tmp_path / "again" / "lora.pt", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def base_for(profile):
    """A base, for a consumer that reads its model type."""
    return BASE if profiles()[profile].model_type else None


@pytest.mark.parametrize("profile", sorted(name for name, each in profiles().items() if each.order is None))
def test_a_consumer_with_one_rank_and_alpha_computes_the_same(profile, tmp_path):
    found = {**llama(layers=(0,)).updates, **llama(layers=(1,), rank=4, scaling=4 / 4**0.5).updates}
    found[Target("model.layers.1.mlp.down_proj")] = (lora(16, 24, 3, 0.7),)
    lines = ak.write(ak.Adapter(found), tmp_path, "peft", profile=profile, base=base_for(profile))
    assert lines
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert not config.get("use_rslora")
    assert config["target_modules"] == sorted(name.rpartition(".")[2] for name in SHAPES)
    tensors = ak.io.safetensors.read(tmp_path / "adapter_model.safetensors")
    for path, delta in deltas(ak.Adapter(found)).items():
        A, B = (tensors[f"base_model.model.{path}.lora_{f}.weight"].numpy().astype("f8") for f in "AB")
        assert len(A) == config["r"]
        assert np.abs(config["lora_alpha"] / config["r"] * B @ A - delta).max() <= 1e-6 * np.abs(delta).max()


@pytest.mark.parametrize("profile", sorted(name for name, each in profiles().items() if each.order is None))
def test_what_a_consumer_cannot_run_is_refused_by_name(profile, tmp_path):
    q, k = (Target(f"model.layers.0.{name}") for name in QKV[:2])
    magnitude = from_numpy(np.ones(16, "f4"))
    plain = lora(16, 16)
    cannot = {
        "dora": {q: (DoRA(A=plain.A, B=plain.B, magnitude=magnitude),)},
        "replacement": {Target("model.norm"): (Replacement(weight=magnitude),)},
        "bias": {q: (lora(16, 16, bias=magnitude),)},
    }
    for word, updates in cannot.items():
        with pytest.raises(Unrepresentable, match=word):
            ak.write(
                ak.Adapter({**updates, k: (lora(8, 16),)}), tmp_path, "peft", profile=profile, base=base_for(profile)
            )
        assert not list(tmp_path.iterdir())
    head = ak.Adapter({Target("lm_head"): (lora(12, 16),)})
    if profile in ("nim", "tensorrt_llm", "executorch", "fireworks"):
        with pytest.raises(Unrepresentable, match="does not adapt this module"):
            ak.write(head, tmp_path, "peft", profile=profile)
    else:
        ak.write(head, tmp_path, "peft", profile=profile, base=base_for(profile))


@pytest.mark.parametrize("profile", ["openvino_genai", "maxtext"])
def test_a_consumer_that_ignores_alpha_gets_the_scale_in_b(profile, tmp_path):
    """B @ A alone is the change; read back, the file is the same function with alpha equal to r."""
    adapter = llama(scaling=3.5)
    lines = ak.write(adapter, tmp_path, "peft", profile=profile)
    assert len(lines) == len(adapter.updates)
    tensors = ak.io.safetensors.read(tmp_path / "adapter_model.safetensors")
    for path, delta in deltas(adapter).items():
        A, B = (tensors[f"base_model.model.{path}.lora_{f}.weight"].numpy().astype("f8") for f in "AB")
        assert np.abs(B @ A - delta).max() <= 1e-6 * np.abs(delta).max()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2
    same(deltas(adapter), deltas(ak.read(tmp_path)), 1e-6)
    assert not ak.write(llama(scaling=1.0), tmp_path / "plain", "peft", profile=profile)


def test_executorch_gets_zeros_for_layers_without_an_update(tmp_path):
    """Its model.py puts LoRA in every layer, and refuses a file that lacks the factors of one."""
    q, down = (Target(f"model.layers.{name}") for name in ("1.self_attn.q_proj", "0.mlp.down_proj"))
    adapter = ak.Adapter({q: (lora(16, 16, rank=2, scaling=3.0),), down: (lora(16, 24, rank=3),)})
    ak.write(adapter, tmp_path / "a", "peft", profile="executorch")
    there = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    names = {there.format(n, m, f) for n in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj") for f in "AB"}
    assert set(ak.io.safetensors.read(tmp_path / "a" / "adapter_model.safetensors")) == names
    found = deltas(ak.read(tmp_path / "a"))
    same(deltas(adapter), {path: delta for path, delta in found.items() if delta.any()}, 1e-6)
    # The base has one more layer than the adapter.
    lines = ak.write(ak.Adapter({down: adapter.updates[down]}), tmp_path / "b", "peft", BASE, profile="executorch")
    assert [line for line in lines if "zeros for model.layers.1.mlp.down_proj" in line]
    assert {path for path, delta in deltas(ak.read(tmp_path / "b")).items() if not delta.any()} == {
        "model.layers.1.mlp.down_proj"
    }


def test_limits_of_hosted_consumers(tmp_path):
    q = Target("model.layers.0.self_attn.q_proj")
    wide = ak.Adapter({q: (lora(256, 256, rank=70),)})
    with pytest.raises(Unrepresentable, match="accepts ranks up to 64") as refused:
        ak.write(wide, tmp_path / "f", "peft", profile="fireworks")
    assert refused.value.cure == "adapterkit resize --rank 64"
    ak.write(ak.Adapter({q: (lora(256, 256, rank=2),)}), tmp_path / "f", "peft", profile="fireworks")
    assert json.loads((tmp_path / "f" / "adapter_config.json").read_text())["r"] == 4
    same(deltas(ak.Adapter({q: (lora(256, 256, rank=2),)})), deltas(ak.read(tmp_path / "f")), 1e-6)
    with pytest.raises(UsageError, match="reads model_type"):
        ak.write(llama(), tmp_path / "c", "peft", profile="cloudflare")
    ak.write(llama(), tmp_path / "c", "peft", BASE, profile="cloudflare")
    told = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert told["model_type"] == json.loads((BASE / "config.json").read_text())["model_type"]
    large = {Target(f"model.layers.{n}.mlp.up_proj"): (lora(200_000, 16, rank=8),) for n in range(16)}
    with pytest.raises(Unrepresentable, match="at most 100,000,000"):
        ak.write(ak.Adapter(large), tmp_path / "l", "peft", BASE, profile="cloudflare")
    assert not (tmp_path / "l").exists()


def test_a_profile_is_data_that_is_checked(tmp_path):
    from adapterkit.formats.peft import profiles as module

    (tmp_path / "one.toml").write_text('format = 1\ntitle = "x"\nurl = "u"\nabout = "a"\nrank = 3\n')
    with pytest.raises(Malformed, match="unknown field `rank`"):
        module._load(tmp_path / "one.toml")
    (tmp_path / "two.toml").write_text('format = 2\ntitle = "x"\nurl = "u"\nabout = "a"\n')
    with pytest.raises(Malformed, match="this version reads format 1"):
        module._load(tmp_path / "two.toml")
    readme = (Path(module.__file__).parents[3] / "spec" / "profiles" / "README.md").read_text()
    for field in profiles()["vllm"].__struct_fields__:
        assert f"`{field}`" in readme, field


def test_tensorrt_llm_takes_experts_from_pefts_folders_alone(tmp_path):
    """Its lora_manager.py reads LAYER.mlp.experts.E.MODULE; the arrays of hf_lora_convert.py have no experts."""
    experts = {Target(f"model.layers.0.mlp.experts.{e}.up_proj"): (lora(24, 16),) for e in range(2)}
    ak.write(ak.Adapter(experts), tmp_path / "peft", "peft", profile="tensorrt_llm")
    keys = ak.io.safetensors.read(tmp_path / "peft" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight" in keys
    with pytest.raises(Unrepresentable, match="--to peft --profile tensorrt_llm"):
        ak.write(ak.Adapter(experts), tmp_path / "arrays", "tensorrt_llm")


def test_an_unknown_profile_names_those_there_are(tmp_path):
    with pytest.raises(UsageError, match="Known: cloudflare, executorch"):
        ak.write(llama(), tmp_path, "peft", profile="another")
    with pytest.raises(UsageError, match="Known: none"):
        ak.write(llama(), tmp_path, "mlx", profile="vllm")


def test_a_family_without_a_table_is_refused_by_name(tmp_path):
    base = write_base(
        tmp_path / "base", {"model_type": "mystery"}, {"model.layers.0.self_attn.q_proj.weight": (16, 16)}
    )
    with pytest.raises(Unsupported, match="mystery"):
        ak.write(llama(), tmp_path / "a.gguf", "gguf", base)
    with pytest.raises(Unsupported, match="mystery"):
        ak.write(llama(), tmp_path / "adapter_model.pt", "torchtune", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_gguf_says_which_tokens_activate(tmp_path):
    import gguf

    plain = llama(layers=(0,), names=("self_attn.q_proj", "mlp.up_proj"))
    tokens = from_numpy(np.array([7, 3, 11], dtype="i8"))
    made = {
        target: (ak.METHODS["alora"](A=u.A, B=u.B, invocation=tokens, scaling=u.scaling),) for target, (u,) in
        plain.updates.items()
    }  # fmt: skip
    ak.write(ak.Adapter(made), tmp_path / "a.gguf", "gguf", BASE)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    field = reader.get_field("adapter.alora.invocation_tokens")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.contents() == [7, 3, 11]
    ak.write(plain, tmp_path / "plain.gguf", "gguf", BASE)
    theirs = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
    assert all(np.array_equal(t.data, theirs[t.name]) for t in reader.tensors)
    again = ak.read(tmp_path / "a.gguf", base=BASE)
    assert {(u.method, tuple(as_lazy(u.invocation).numpy()), u.scaling) for _, u in again} == {
        ("alora", (7, 3, 11), 2.0)
    }
    assert again.digest() == ak.Adapter(made).digest()
    ak.write(again, tmp_path / "peft", "peft")
    ak.write(ak.read(tmp_path / "peft"), tmp_path / "b.gguf", "gguf", BASE)
    assert ak.read(tmp_path / "b.gguf", base=BASE).digest() == again.digest()


def test_gguf_has_one_invocation_for_all(tmp_path):
    plain = llama(layers=(0,), names=("self_attn.q_proj", "mlp.up_proj"))
    (one, (u,)), (other, (v,)) = plain.updates.items()
    tokens = from_numpy(np.array([5], dtype="i8"))
    mixed = ak.Adapter({one: (ak.METHODS["alora"](A=u.A, B=u.B, invocation=tokens),), other: (v.replace(scaling=1.0),)})
    with pytest.raises(Unrepresentable, match="one invocation for all"):
        ak.write(mixed, tmp_path / "a.gguf", "gguf", BASE)
    assert list(tmp_path.iterdir()) == []
    assert len(ak.write(mixed, tmp_path / "a.gguf", "gguf", BASE, "drop")) == 1
