"""What is wrong with a PEFT folder, or with what should become one, is said by name; nothing is dropped unsaid."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Malformed, ShapeMismatch, StorageError, Unsupported, UsageError

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "org/base"}
TENSORS = {
    f"{PREFIX}{layer}.q.lora_{name}.weight": np.ones(shape, np.float32)
    for layer in ("a", "b")
    for name, shape in (("A", (2, 6)), ("B", (4, 2)))
}
A, B = list(TENSORS)[:2]


def folder(path, config=CONFIG, tensors=TENSORS):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


def ones(*shape):
    return np.ones(shape, np.float32)


TENSOR_FAULTS = {
    "A without B": (without(TENSORS, B), Malformed, A),
    "B without A": (without(TENSORS, A), Malformed, B),
    "a stray tensor": (TENSORS | {f"{PREFIX}a.q.lora_C.weight": ones(2)}, Malformed, f"{PREFIX}a.q.lora_C.weight"),
    "one of another tuner": (TENSORS | {f"{PREFIX}a.q.ia3_l": ones(4, 1)}, Malformed, f"{PREFIX}a.q.ia3_l"),
    "a magnitude without DoRA": (
        TENSORS | {f"{PREFIX}a.q.lora_magnitude_vector": ones(4)}, Malformed, f"{PREFIX}a.q.lora_magnitude_vector",
    ),
    "a bias without lora_bias": (
        TENSORS | {f"{PREFIX}a.q.lora_B.bias": ones(4)}, Malformed, f"{PREFIX}a.q.lora_B.bias",
    ),
    "a key without the prefix": (TENSORS | {"a.k.weight": ones(4, 4)}, Malformed, "a.k.weight"),
    "two adapters": (
        {f"{PREFIX}{layer}.q.lora_{n}.{name}.weight": ones(2, 2) for layer, name in ("ax", "by") for n in "AB"},
        Malformed, f"{PREFIX}b.q.lora_A.y.weight",
    ),
    "another rank": (TENSORS | {A: ones(3, 6), B: ones(4, 3)}, ShapeMismatch, A),
    "ranks that differ": (TENSORS | {B: ones(4, 3)}, ShapeMismatch, B),
    "a shard": (TENSORS | {A: ones(12)}, ShapeMismatch, A),
    "a convolution in no groups": (TENSORS | {A: ones(2, 6, 3), B: ones(4, 3, 1)}, ShapeMismatch, B),
    "an output that is no mix": (TENSORS | {A: ones(2, 6, 3), B: ones(4, 2, 3)}, ShapeMismatch, B),
    "a single number": (TENSORS | {f"{PREFIX}scale": np.array(1, np.float32)}, Unsupported, "scale"),
    "token rows without numbers": (
        TENSORS | {f"{PREFIX}emb.token_adapter.trainable_tokens_delta": ones(2, 4)}, Malformed,
        f"{PREFIX}emb.token_adapter.trainable_tokens_delta",
    ),
    "nested pairs of no parameter": (
        TENSORS | {f"{PREFIX}a.q.base_layer.lora_{n}.weight": TENSORS[k] for n, k in (("A", A), ("B", B))}, Malformed,
        f"{PREFIX}a.q.base_layer.lora_A.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faults_of_tensors(fault, tmp_path):
    tensors, error, where = TENSOR_FAULTS[fault]
    with pytest.raises(error) as raised:
        ak.read(folder(tmp_path / "a", tensors=tensors))
    assert type(raised.value) is error
    assert raised.value.where == where
    assert raised.value.cure
    assert raised.value.path == str(tmp_path / "a")


CONFIG_FAULTS = {
    "no type": (without(CONFIG, "peft_type"), Malformed, "peft_type"),
    "an unknown type": (CONFIG | {"peft_type": "FOO"}, Unsupported, "peft_type"),
    "an unknown field": (CONFIG | {"use_superlora": True}, Unsupported, "use_superlora"),
    "aLoRA of no tokens": (CONFIG | {"alora_invocation_tokens": []}, Malformed, None),
    "aLoRA with another formula": (
        CONFIG | {"alora_invocation_tokens": [1], "use_dora": True},
        Unsupported,
        "alora_invocation_tokens",
    ),
    "Arrow with a bias": (CONFIG | {"arrow_config": {"top_k": 1}, "lora_bias": True}, Unsupported, "arrow_config"),
    "a field of Arrow's": (CONFIG | {"arrow_config": {"top": 1}}, Malformed, "arrow_config"),
    "a field of KaSA's": (CONFIG | {"kasa_config": {"delta": 1}}, Malformed, "kasa_config"),
    "repeated layers": (CONFIG | {"layer_replication": [[0, 2]]}, Unsupported, "layer_replication"),
    "Megatron": (CONFIG | {"megatron_config": {"a": 1}}, Unsupported, "megatron_config"),
    "a field of BD-LoRA's": (CONFIG | {"use_bdlora": {"rows": 2}}, Malformed, "use_bdlora"),
    "QA-LoRA": (CONFIG | {"use_qalora": True}, Unsupported, "use_qalora"),
    "PiSSA by random numbers": (CONFIG | {"init_lora_weights": "pissa_niter_4"}, Unsupported, "init_lora_weights"),
    "two formulas": (CONFIG | {"init_lora_weights": "olora", "use_dora": True}, Unsupported, "init_lora_weights"),
    "KaSA with a bias": (CONFIG | {"kasa_config": {}, "lora_bias": True}, Unsupported, "kasa_config"),
    "CorDA": (CONFIG | {"init_lora_weights": "corda"}, Unsupported, "init_lora_weights"),
    "LoftQ": (CONFIG | {"init_lora_weights": "loftq"}, Unsupported, "init_lora_weights"),
    "LoRA-GA": (CONFIG | {"init_lora_weights": "lora_ga"}, Unsupported, "init_lora_weights"),
    "an unknown initialisation": (CONFIG | {"init_lora_weights": "zipf"}, Unsupported, "init_lora_weights"),
    "a rank of 0": (CONFIG | {"r": 0}, Malformed, "r"),
    "an alpha of words": (CONFIG | {"lora_alpha": "8"}, Malformed, "lora_alpha"),
    "no alpha": (CONFIG | {"lora_alpha": None}, Malformed, "lora_alpha"),
    "a pattern that is none": (CONFIG | {"alpha_pattern": {"(": 8}}, Malformed, None),
    "a magnitude that is missing": (CONFIG | {"use_dora": True}, Malformed, A),
    "a bias that is missing": (CONFIG | {"lora_bias": True}, Malformed, A),
    "not JSON": ('{"peft_type": "LORA",', Malformed, None),
    "infinity": ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', Malformed, None),
    "NaN": ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', Malformed, None),
    "a field twice": ('{"peft_type": "LORA", "r": 2, "r": 4, "lora_alpha": 2}', Malformed, None),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_faults_of_configs(fault, tmp_path):
    config, error, where = CONFIG_FAULTS[fault]
    with pytest.raises(AdapterkitError) as raised:
        ak.read(folder(tmp_path / "a", config=config), format="peft")
    assert type(raised.value) is error
    assert where is None or raised.value.where == where
    assert raised.value.cure


def test_a_file_without_its_config(tmp_path):
    source = folder(tmp_path / "a")
    (source / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match="adapter_config"):
        ak.read(source, format="peft")


def test_a_config_without_its_file(tmp_path):
    source = folder(tmp_path / "a")
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(StorageError, match="adapter_model"):
        ak.read(source)


def test_a_config_of_another_tool_is_not_taken(tmp_path):
    source = folder(tmp_path / "a", without(CONFIG, "peft_type"))
    with pytest.raises(AdapterkitError, match="not an adapter in any known format"):
        ak.detect(source)


@given(
    name=st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
                          "trainable_token_indices", "init_lora_weights", "use_dora", "peft_type", "x"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
)  # fmt: skip
def test_any_config_is_read_or_refused(name, value, tmp_path):
    source = folder(tmp_path / "a", CONFIG | {name: value})
    try:
        read = ak.read(source, format="peft")
    except AdapterkitError:
        return
    ak.write(read, tmp_path / "b", "peft")
    assert ak.read(tmp_path / "b").digest() == read.digest()


@given(parts=st.lists(st.sampled_from([
    "a", "q", "base_layer", "lora_A", "lora_B", "weight", "bias", "default", "token_adapter", "trainable_tokens_delta",
    "modules_to_save", "lora_embedding_A", "lora_magnitude_vector", "",
]), min_size=1, max_size=6))  # fmt: skip
def test_any_key_is_read_or_refused(parts, tmp_path):
    source = folder(tmp_path / "a", tensors=TENSORS | {PREFIX + ".".join(parts): ones(2, 2)})
    try:
        read = ak.read(source, format="peft")
    except AdapterkitError:
        return
    ak.write(read, tmp_path / "b", "peft")
    assert (tmp_path / "b" / "adapter_model.safetensors").read_bytes() == (
        source / "adapter_model.safetensors"
    ).read_bytes()


HADA = {
    f"{PREFIX}a.q.hada_{name}": ones(*shape)
    for name, shape in (("w1_a", (4, 2)), ("w1_b", (2, 6)), ("w2_a", (4, 2)), ("w2_b", (2, 6)))
}
LOHA = CONFIG | {"peft_type": "LOHA", "alpha": 4}
MISS = {"peft_type": "MISS", "r": 2, "target_modules": ["q"]}
BLOCK = {f"{PREFIX}a.q.miss_block": ones(2, 4)}
FAMILY_FAULTS = {
    "a missing factor": (LOHA, without(HADA, f"{PREFIX}a.q.hada_w2_b"), Malformed, f"{PREFIX}a.q.hada_w1_a"),
    "one core of two": (LOHA, HADA | {f"{PREFIX}a.q.hada_t1": ones(2, 2, 3)}, Malformed, f"{PREFIX}a.q.hada_t1"),
    "another rank": (LOHA | {"r": 3}, HADA, ShapeMismatch, f"{PREFIX}a.q.hada_w1_b"),
    "a leaf that is none": (
        LOHA,
        HADA | {f"{PREFIX}a.q.hada_t1.weight": ones(2)},
        Malformed,
        f"{PREFIX}a.q.hada_t1.weight",
    ),
    "a nested one": (LOHA, {k.replace("q.", "q.base_layer."): t for k, t in HADA.items()}, Malformed, None),
    "a field of another type": (LOHA | {"mini_r": 2}, HADA, Unsupported, "mini_r"),
    "an alpha that is none": (LOHA | {"alpha": "x"}, HADA, Malformed, "alpha"),
    "bat": (MISS | {"init_weights": "bat"}, BLOCK, ShapeMismatch, f"{PREFIX}a.q.miss_block"),
    "another width": (MISS | {"init_weights": "mini", "mini_r": 3}, BLOCK, ShapeMismatch, f"{PREFIX}a.q.miss_block"),
}


@pytest.mark.parametrize("fault", FAMILY_FAULTS)
def test_faults_of_families(fault, tmp_path):
    config, tensors, error, where = FAMILY_FAULTS[fault]
    with pytest.raises(error) as raised:
        ak.read(folder(tmp_path / "a", config, tensors))
    assert type(raised.value) is error
    assert raised.value.where == where or where is None
    assert raised.value.cure


@pytest.mark.parametrize("version", ["x", "0.²", "0." + "9" * 5000])
def test_a_version_that_is_no_number_counts_as_an_old_version(version, tmp_path):
    """Before 0.18, PEFT doubled the pairs of an OFT with a Cayley-Neumann series."""
    config = CONFIG | {"peft_type": "OFT", "oft_block_size": 0, "use_cayley_neumann": True, "peft_version": version}
    config = without(config, "lora_alpha")
    adapter = ak.read(folder(tmp_path / "a", config, {f"{PREFIX}a.q.oft_R.weight": ones(2, 6)}))
    assert [update.doubled for _, update in adapter] == [True]
