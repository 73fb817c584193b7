"""Keras Hub's .lora.h5: the change of each kernel by Keras's formula, in float64; the rank; and hostile HDF5 files."""

import json
import subprocess
import sys

import h5py
import ml_dtypes
import numpy as np
import pytest
from llm_adapters import BASE, SHAPES, VECTORS, deltas, llama, lora, write_base

import adapterkit as ak
from adapterkit.errors import (
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from adapterkit.io.lazy import as_array, as_lazy, from_numpy
from adapterkit.methods.lora import LoRA

VECTOR = VECTORS / "formats" / "keras_hub" / "every" / "adapter.lora.h5"
HEADS, KV, DIM, STRIDE = 4, 2, 4, 11

NUMBERS = {
    "self_attn.q_proj": 11, "self_attn.k_proj": 10, "self_attn.v_proj": 9, "self_attn.o_proj": 8, "mlp.up_proj": 5,
    "mlp.gate_proj": 4, "mlp.down_proj": 3,
}  # fmt: skip
"""Keras Hub's numbers of the layers of the first block of a llama, as its backbone lists them."""


def changes(path, layers=2):
    """The change [out, in] of each weight: Keras adds matmul(lora_kernel_a, lora_kernel_b) to the kernel."""
    found = {}
    with h5py.File(path) as file:
        for layer in range(layers):
            for own, number in NUMBERS.items():
                group = file.get(f"lora/{number + STRIDE * layer}/vars")
                if group is not None:
                    a, b = (group[f"lora_kernel_{side}"][()].astype("f8") for side in "ab")
                    out, width = SHAPES[own]
                    found[f"model.layers.{layer}.{own}"] = np.matmul(a, b).reshape(width, out).T
    return found


def rank_of(path):
    with h5py.File(path) as file:
        rank = int(file["lora/vars/rank"][()])
        for number in set(file["lora"]) - {"vars"}:
            held = file[f"lora/{number}/vars"]
            assert held["lora_kernel_a"].shape[-1] == held["lora_kernel_b"].shape[0] == rank
    return rank


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.lora.h5"


@pytest.mark.parametrize("scaling", [2.5, -0.3, 1.0])
def test_the_change_of_every_kernel_is_exact(scaling, path):
    adapter = llama(scaling=scaling)
    ak.write(adapter, path, "keras_hub", BASE, on_loss="fold")
    expected, found = deltas(adapter), changes(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-6 * np.abs(value).max()
        assert np.abs(deltas(ak.read(path, base=BASE))[name] - value).max() <= 1e-6 * np.abs(value).max()


def test_a_scaling_is_refused_unless_folding_is_allowed(path):
    with pytest.raises(Unrepresentable, match="--on-loss fold"):
        ak.write(llama(), path, "keras_hub", BASE)
    assert not path.exists()


def test_the_rank_grows_to_the_width_of_a_head(path):
    lines = ak.write(llama(rank=3, scaling=1.0), path, "keras_hub", BASE)
    assert rank_of(path) == DIM
    assert any("the rank grew from 3 to 4" in line for line in lines)
    assert any("enable_lora(4, target_layer_names=['query', 'key'" in line for line in lines)


def test_layers_without_shared_heads_keep_their_rank(path):
    lines = ak.write(llama(names=("self_attn.o_proj", "mlp.up_proj"), scaling=1.0), path, "keras_hub", BASE)
    assert rank_of(path) == 2
    assert not any("grew" in line for line in lines)


def test_one_key_head_keeps_its_rank(path, tmp_path):
    config = json.loads((BASE / "config.json").read_text()) | {"num_key_value_heads": 1, "model_type": "gemma"}
    shapes = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (4, 16)}
    names = {f"model.layers.{n}.{own}.weight": shape for n in range(2) for own, shape in shapes.items()}
    base = write_base(tmp_path / "base", config, names)
    adapter = ak.Adapter({ak.Target(f"model.layers.{n}.self_attn.v_proj"): (lora(4, 16, 2, 1.0, n),) for n in range(2)})
    ak.write(adapter, path, "keras_hub", base)
    assert rank_of(path) == 2
    with h5py.File(path) as file:  # Gemma's kernels have the heads first; value is the eighth layer of a block.
        for n in range(2):
            held = file[f"lora/{8 + 11 * n}/vars"]
            change = np.matmul(held["lora_kernel_a"][0].astype("f8"), held["lora_kernel_b"][()])
            assert np.allclose(change.T, deltas(adapter)[f"model.layers.{n}.self_attn.v_proj"], rtol=0, atol=1e-6)


def test_heads_that_share_their_rows_keep_the_rank(path):
    rng = np.random.default_rng(0)
    shared, A = rng.normal(size=(DIM, 2)).astype("f4"), rng.normal(size=(2, 16)).astype("f4")
    ak.write(of_query(A, np.tile(shared, (HEADS, 1))), path, "keras_hub", BASE)
    assert rank_of(path) == 2
    expected = np.tile(shared, (HEADS, 1)).astype("f8") @ A
    assert np.allclose(changes(path)["model.layers.0.self_attn.q_proj"], expected, rtol=0, atol=1e-6)


def test_a_layer_is_adapted_in_all_blocks(path):
    lines = ak.write(llama(layers=(1,), names=("self_attn.k_proj",), scaling=1.0), path, "keras_hub", BASE)
    found = changes(path)
    assert {name: value.any() for name, value in found.items()} == {
        "model.layers.0.self_attn.k_proj": False, "model.layers.1.self_attn.k_proj": True,
    }  # fmt: skip
    assert any("enable_lora(4, target_layer_names=['key'])" in line for line in lines)


def test_query_and_value_need_no_call_before_loading(path):
    names = ("self_attn.q_proj", "self_attn.v_proj")
    assert not any("enable_lora" in line for line in ak.write(llama(names=names, scaling=1.0), path, "keras_hub", BASE))


def test_half_precision_is_widened_before_the_scaling_is_folded(path):
    adapter = llama(dtype="f2", scaling=0.3)
    ak.write(adapter, path, "keras_hub", BASE, on_loss="fold")
    expected, found = deltas(adapter), changes(path)
    assert all(np.abs(found[n] - value).max() <= 1e-6 * np.abs(value).max() for n, value in expected.items())


def of_query(A, B):
    factors = {name: from_numpy(np.asarray(value, "f4")) for name, value in (("A", A), ("B", B))}
    return ak.Adapter({ak.Target("model.layers.0.self_attn.q_proj"): (LoRA(**factors),)})


def test_an_update_without_effect_is_written(path):
    ak.write(of_query(np.ones((2, 16)), np.zeros((16, 2))), path, "keras_hub", BASE)
    assert not any(value.any() for value in changes(path).values())


BIG = np.random.default_rng(0).normal(size=(16, 2))


@pytest.mark.parametrize(
    ("A", "B", "error"),
    [
        (BIG.T * 1e30, BIG * 1e30, Malformed), (BIG.T * 1e-30, BIG * 1e-30, Malformed),
        (BIG.T, BIG * np.nan, Malformed), (BIG.T * np.inf, BIG, Malformed),
        (BIG.T, BIG[:12], ShapeMismatch), (BIG.T[:, :12], BIG, ShapeMismatch),
    ],
    ids=["overflow", "underflow", "nan", "infinity", "rows", "columns"],
)  # fmt: skip
def test_an_update_that_the_file_cannot_hold_is_refused(A, B, error, path):
    with pytest.raises(error, match=r"query|q_proj"):
        ak.write(of_query(A, B), path, "keras_hub", BASE)
    assert not path.exists()


def test_own_files_need_no_base_to_be_read_and_keras_files_do(path):
    ak.write(llama(scaling=1.0), path, "keras_hub", BASE)
    assert {str(target) for target, _ in ak.read(path)} == deltas(llama()).keys()
    with pytest.raises(UsageError, match="--base"):
        ak.read(VECTOR)


def test_writing_needs_the_base(path):
    with pytest.raises(UsageError, match="--base"):
        ak.write(llama(scaling=1.0), path, "keras_hub")


def test_a_name_that_keras_hub_refuses_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a\.lora\.h5"):
        ak.write(llama(scaling=1.0), tmp_path / "a.h5", "keras_hub", BASE)


def other_base(tmp_path, **fields):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((BASE / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((BASE / "config.json").read_text()) | fields))
    return folder


def test_an_unknown_model_type_is_refused_by_name(path, tmp_path):
    with pytest.raises(Unrepresentable, match=r"'falcon'.*adapterkit merge"):
        ak.write(llama(scaling=1.0), path, "keras_hub", other_base(tmp_path, model_type="falcon"))


def test_a_base_with_other_heads_is_refused(tmp_path):
    other = other_base(tmp_path, num_attention_heads=2, head_dim=8, num_key_value_heads=1)
    with pytest.raises(ShapeMismatch):
        ak.read(VECTOR, base=other)


def test_a_file_of_another_family_is_refused(path, tmp_path):
    ak.write(llama(scaling=1.0), path, "keras_hub", BASE)
    with pytest.raises(Malformed, match="the file is for a llama, and the base is a qwen3"):
        ak.read(path, base=other_base(tmp_path, model_type="qwen3"))


def test_a_module_without_a_layer_is_refused_or_left_out(path):
    head = {ak.Target("lm_head"): (lora(12, 16, scaling=1.0),)}
    adapter = ak.Adapter({**llama(scaling=1.0).updates, **head})
    with pytest.raises(Unrepresentable, match="lm_head"):
        ak.write(adapter, path, "keras_hub", BASE)
    assert any(
        line.startswith("left out lm_head") for line in ak.write(adapter, path, "keras_hub", BASE, on_loss="drop")
    )


def copied(path):
    path.write_bytes(VECTOR.read_bytes())
    return h5py.File(path, "r+")


LAYER = "lora/11/vars"


def soft_link(file):
    del file[f"{LAYER}/lora_kernel_b"]
    file[f"{LAYER}/lora_kernel_b"] = h5py.SoftLink("/lora/10/vars/lora_kernel_b")


def external_link(file):
    del file[f"{LAYER}/lora_kernel_b"]
    file[f"{LAYER}/lora_kernel_b"] = h5py.ExternalLink(str(VECTOR), f"/{LAYER}/lora_kernel_b")


def external_storage(file):
    del file[f"{LAYER}/lora_kernel_b"]
    file.create_dataset(f"{LAYER}/lora_kernel_b", (2, 4), "f4", external=[("/etc/hostname", 0, 32)])


def virtual(file):
    del file[f"{LAYER}/lora_kernel_b"]
    layout = h5py.VirtualLayout((2, 4), "f4")
    layout[:] = h5py.VirtualSource(str(VECTOR), f"{LAYER}/lora_kernel_b", (2, 4))
    file.create_virtual_dataset(f"{LAYER}/lora_kernel_b", layout)


def bomb(file):
    """A billion zeros, compressed."""
    del file[f"{LAYER}/lora_kernel_a"]
    file.create_dataset(f"{LAYER}/lora_kernel_a", (1 << 15, 1 << 15, 2), "f4", compression="gzip")


def cycle(file):
    """Groups in each other: a thousand names on each of eight levels would take years to visit."""
    for n in range(1000):
        file[f"lora/vars/{n}"] = file["lora"]


def unknown_key(file):
    file["lora/11/vars/alpha"] = np.float32(1)


def unknown_layer(file):
    file.copy("lora/11", "lora/13")


def other_rank(file):
    file["lora/vars/rank"][()] = 3


def no_rank(file):
    del file["lora/vars/rank"]


def odd_floats(file):
    """Floats that numpy lacks, and that h5py shows as float32."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    space = h5py.h5s.create_simple((2, 4))
    del file[f"{LAYER}/lora_kernel_b"]
    h5py.h5d.create(file[LAYER].id, b"lora_kernel_b", kind, space)


def half_a_layer(file):
    del file[f"{LAYER}/lora_kernel_b"]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (soft_link, Unsupported), (external_link, Unsupported), (external_storage, Unsupported), (virtual, Unsupported),
        (bomb, Unsupported), (cycle, Unsupported), (unknown_key, Malformed), (unknown_layer, Malformed),
        (other_rank, ShapeMismatch), (no_rank, Malformed), (half_a_layer, Malformed),
        (odd_floats, Unsupported),
    ],
)  # fmt: skip
def test_a_hostile_or_damaged_file_is_refused(damage, error, path):
    with copied(path) as file:
        damage(file)
    with pytest.raises(error) as refused:
        ak.read(path, base=BASE)
    assert refused.value.path == str(path)


@pytest.mark.parametrize("kind", ["opaque", "float"])
def test_bfloat16_factors_are_read(kind, path):
    """Keras stores two opaque bytes, and an attribute. HDF5 also has floats with these bits; h5py shows float32."""
    brain = h5py.h5t.IEEE_F16LE.copy()
    brain.set_fields(15, 7, 8, 0, 7)
    brain.set_ebias(127)
    expected = {}
    with copied(path) as file:
        for layer in range(2):
            for own, number in NUMBERS.items():
                group, values = file[f"lora/{number + STRIDE * layer}/vars"], []
                for name in ("lora_kernel_a", "lora_kernel_b"):
                    half = group[name][()].astype(ml_dtypes.bfloat16)
                    del group[name]
                    if kind == "opaque":
                        group.create_dataset(name, data=half).attrs["dtype"] = "bfloat16"
                    else:
                        space = h5py.h5s.create_simple(half.shape)
                        data = h5py.h5d.create(group.id, name.encode(), brain, space)
                        data.write(h5py.h5s.ALL, h5py.h5s.ALL, half.view("V2"), mtype=brain)
                    values.append(half.astype("f8"))
                out, width = SHAPES[own]
                expected[f"model.layers.{layer}.{own}"] = np.matmul(*values).reshape(width, out).T
    read = ak.read(path, base=BASE)
    assert {as_lazy(leaf).dtype.name for _, update in read for leaf in update.tensors.values()} == {"BF16"}
    found = {
        str(target): as_array(as_lazy(update.B)).astype("f8") @ as_array(as_lazy(update.A)).astype("f8")
        for target, update in read
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-6 * np.abs(value).max()


@pytest.mark.parametrize("size", [8, 100, 800, 2000, -1])
def test_a_truncated_file_is_refused(size, path):
    path.write_bytes(VECTOR.read_bytes()[:size])
    with pytest.raises(AdapterkitError):
        ak.read(path, "keras_hub", BASE)


def test_without_h5py_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "import adapterkit as ak\n"
        f"try: ak.read({str(VECTOR)!r}, base={str(BASE)!r})\n"
        "except ak.errors.Unsupported as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "pip install h5py" in shown.stdout
