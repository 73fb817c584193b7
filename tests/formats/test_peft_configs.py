"""What fields of a config mean, those of old releases too."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import record
from peft import IA3Config, LoraConfig, TrainableTokensConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_folders import contents
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, Unsupported, UsageError
from adapterkit.formats.peft import config
from adapterkit.formats.peft.families import FAMILIES

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "org/base"}
TENSORS = {
    f"{PREFIX}{layer}.q.lora_{name}.weight": np.ones(shape, np.float32)
    for layer in ("a", "b")
    for name, shape in (("A", (2, 6)), ("B", (4, 2)))
}


def folder(path, config=CONFIG, tensors=TENSORS):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_arrays(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(("fields", "scaling"), [({}, 8.0), ({"use_rslora": True}, 16 / 2**0.5)])
def test_a_stated_alpha_replaces_the_zero_that_verl_writes(fields, scaling, tmp_path):
    path = folder(tmp_path / "zero", {**CONFIG, "lora_alpha": 0, **fields})
    assert {update.scaling for _, update in ak.read(path)} == {0.0}
    read = ak.read(path, alpha=16)
    assert [update.scaling for _, update in read] == pytest.approx([scaling] * 2)
    ak.write(read, tmp_path / "again", "peft")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_alpha"] == 16
    with pytest.raises(UsageError, match="states lora_alpha 4"):
        ak.read(folder(tmp_path / "four"), alpha=16)


@pytest.mark.parametrize(
    "harmless",
    [
        {"use_superlora": False, "some_list": [], "other": None, "lora_dropout": 0.3, "inference_mode": False},
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "mica"}, {"init_lora_weights": False}, {"corda_config": {"verbose": True}},
        {"monteclora_config": {"num_samples": 4}}, {"velora_config": {"num_groups": 2}},
        {"merge_weights": True, "enable_lora": None}, {"runtime_config": {"ephemeral_gpu_offload": True}},
    ],
)  # fmt: skip
def test_fields_that_change_nothing_are_kept(harmless, tmp_path):
    source = folder(tmp_path / "a", CONFIG | harmless)
    assert ak.read(source).digest() == ak.read(folder(tmp_path / "plain")).digest()
    ak.write(ak.read(source), tmp_path / "b", "peft")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()) == CONFIG | harmless


MARKERS = {
    "unsloth_version": "2026.4.2", "trainer_build": "v1.2.3+cu128", "run_id": "run 7 of may",
    "tags": ["unsloth", "trl"],
    "created_at": "Friday", "saved": "2026-09-18T10:00:00Z", "model_sha256": "ab" * 32, "lorap_emb_lr": 1e-6,
    "origin": {"commit": "main", "uuid": "0f8fad5b-d9cb-469f-a165-70867728950e", "parent": None},
}  # fmt: skip


def test_the_marks_of_other_tools_are_kept_and_named(tmp_path):
    source = folder(tmp_path / "a", CONFIG | MARKERS)
    (source / "adapter_config.json").write_text(
        json.dumps(CONFIG | MARKERS | {"later": None}, indent=2, sort_keys=True)
    )
    read = ak.read(source)
    assert read.digest() == ak.read(folder(tmp_path / "plain")).digest()
    assert read.recipe[-1].args["unknown_fields"] == sorted(MARKERS)
    ak.write(read, tmp_path / "native")
    ak.write(ak.read(tmp_path / "native"), tmp_path / "b", "peft")
    assert contents(tmp_path / "b") == contents(source)
    save_arrays({"a.q.weight": ones(4, 6), "b.q.weight": ones(4, 6)}, tmp_path / "base.safetensors")
    told = [
        record("inspect", source)["unknown_fields"], record("validate", source)["warnings"],
        record("convert", source, tmp_path / "c", "--to", "peft")["warnings"],
        record("merge", tmp_path / "base.safetensors", source, "-o", tmp_path / "m.safetensors")["warnings"],
    ]  # fmt: skip
    assert all(name in str(each) for each in told for name in MARKERS)
    with pytest.raises(Unsupported, match=r"--strict \(strict=True\)"):
        ak.read(source, strict=True)
    for command in (["inspect", source], ["merge", tmp_path / "base.safetensors", source, "-o", tmp_path / "n"]):
        assert record(*command, "--strict", code=3)
    assert ak.read(folder(tmp_path / "plain"), strict=True)


@pytest.mark.parametrize(
    "field",
    [
        {"use_superlora": True}, {"lora_gain": 2}, {"lora_gain": 0.5}, {"variant": "super"}, {"gain": "0.5"},
        {"lora_A_layout": "grouped_by_expert"}, {"origin": {"commit": "main", "experts": 4}}, {"tags": ["a", 1]},
        {"router_path": "/tmp/router.pt"},
    ],
)  # fmt: skip
def test_a_field_that_may_change_the_maths_is_refused(field, tmp_path):
    (name,) = field
    with pytest.raises(Unsupported, match=f"{name}: this version does not know this field"):
        ak.read(folder(tmp_path / "a", CONFIG | field))


def test_tensors_of_training_travel_along(tmp_path):
    extra = {f"{PREFIX}a.q.lora_velora_embed": ones(3), f"{PREFIX}a.q.lora_monteclora_sampler.std_prior": ones(2)}
    source = folder(tmp_path / "a", tensors=TENSORS | extra)
    read = ak.read(source)
    assert read.digest() == ak.read(folder(tmp_path / "plain")).digest()
    ak.write(read, tmp_path / "b", "peft")
    assert set(load_arrays(tmp_path / "b" / "adapter_model.safetensors")) == set(TENSORS | extra)


def test_an_old_config_has_fewer_fields(tmp_path):
    old = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "enable_lora": None, "merge_weights": False}
    read = ak.read(folder(tmp_path / "a", old))
    assert [update.scaling for _, update in read] == [1.5, 1.5]
    assert read.base is None


def test_an_alpha_of_0_is_a_scaling_of_0(tmp_path):
    read = ak.read(folder(tmp_path / "a", CONFIG | {"lora_alpha": 0, "alpha_pattern": {"a.q": 2.5}}))
    assert [update.scaling for _, update in read] == [1.25, 0.0]
    assert read.base == ak.BaseRef("org/base")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"q": 10, "a.q": 20}, [5, 5]),
        ({"a.q": 20, "q": 10}, [10, 5]),
        ({"^a.q": 20}, [10, 2]),
        ({"x|b.q": 20}, [2, 10]),
        ({"[ab]": 20}, [2, 2]),
        ({"layer.q": 20}, [2, 2]),
    ],
)
def test_the_first_pattern_that_fits_a_whole_ending_wins(patterns, expected, tmp_path):
    read = ak.read(folder(tmp_path / "a", CONFIG | {"alpha_pattern": patterns}))
    assert [update.scaling for _, update in read] == expected


def experts(path, names, **shapes):
    """Two nested pairs of one module, two experts of rank 2, and a base with parameters of the given shapes."""
    tensors = {}
    for stem, (out, in_) in (("ex.base_layer", (4, 6)), ("ex", (5, 4))):
        tensors |= {f"{PREFIX}{stem}.lora_A.weight": ones(4, in_), f"{PREFIX}{stem}.lora_B.weight": ones(out, 4)}
    config = CONFIG | {"target_modules": [], "target_parameters": [f"ex.{name}" for name in names]}
    save_arrays({f"ex.{name}": ones(*shape) for name, shape in shapes.items()}, path.with_suffix(".safetensors"))
    return folder(path, config, tensors)


def test_parameters_are_told_apart_by_the_base(tmp_path):
    source = experts(tmp_path / "a", ["one", "two"], one=(2, 5, 4), two=(2, 4, 6))
    with pytest.raises(UsageError, match="one or two") as raised:
        ak.read(source)
    assert raised.value.cure == "Pass --base BASE (base=)"
    read = ak.read(source, base=tmp_path / "a.safetensors")
    assert {target.path: update.B.shape for target, update in read} == {"ex.one": (2, 5, 2), "ex.two": (2, 4, 2)}


def test_parameters_of_another_base_do_not_fit(tmp_path):
    source = experts(tmp_path / "a", ["one", "two"], one=(2, 9, 4), two=(2, 4, 6))
    with pytest.raises(Malformed, match="none of the parameters one, two has a shape"):
        ak.read(source, base=tmp_path / "a.safetensors")


def test_parameters_of_one_shape_cannot_be_told_apart(tmp_path):
    tensors = {f"{PREFIX}{s}.lora_{n}.weight": ones(4, 4) for s in ("ex", "ex.base_layer") for n in "AB"}
    config = CONFIG | {"target_modules": [], "target_parameters": ["ex.one", "ex.two"]}
    save_arrays({"ex.one": ones(2, 4, 4), "ex.two": ones(2, 4, 4)}, tmp_path / "base.safetensors")
    with pytest.raises(Unsupported, match="does not show whether this pair adapts one or two"):
        ak.read(folder(tmp_path / "a", config, tensors), base=tmp_path / "base.safetensors")


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, True], [True, True]])
def test_merged_linear_of_peft_0_2(enabled, fan_in_fan_out, tmp_path):
    """Its forward: a convolution in two groups over A's outputs, spread over the enabled blocks of the weight."""
    generator = torch.Generator().manual_seed(3)
    size, rank, inputs = 5, 2, 7
    A = torch.randn(rank * sum(enabled), inputs, generator=generator)
    B = torch.randn(size * sum(enabled), rank * sum(enabled) // 2, 1, generator=generator)
    grouped = torch.nn.functional.conv1d(A[None], B, groups=2)[0]
    expected = torch.zeros(len(enabled), size, inputs)
    expected[torch.tensor(enabled)] = 6 / rank * grouped.reshape(sum(enabled), size, inputs)
    config = {
        "base_model_name_or_path": "gpt2", "bias": "none", "enable_lora": enabled, "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True, "lora_alpha": 6, "lora_dropout": 0.1, "merge_weights": False, "modules_to_save": None,
        "peft_type": "LORA", "r": rank, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    torch.save({f"{stem}A.weight": A, f"{stem}B.weight": B}, tmp_path / "adapter_model.bin")
    weight = torch.zeros(size * len(enabled), inputs)
    name = "transformer.h.0.attn.c_attn.weight"
    save_file({name: (weight.T if fan_in_fan_out else weight).contiguous()}, tmp_path / "base.safetensors")
    ak.merge(tmp_path / "base.safetensors", ak.read(tmp_path), tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")[name]
    torch.testing.assert_close(got.T if fan_in_fan_out else got, expected.reshape(weight.shape))


def test_the_specification_lists_the_same_fields():
    entry = tomllib.loads((Path(__file__).parents[2] / "spec" / "formats" / "peft.toml").read_text("utf-8"))
    assert entry["fields"] == {
        "read": config.READ, "harmless": config.HARMLESS, "refused": config.REFUSED, "tools": config.TOOLS,
    }  # fmt: skip
    assert tuple(entry["types"]) == config.PEFT_TYPES


def test_the_specification_has_a_file_for_each_family():
    folder = Path(__file__).parents[2] / "spec" / "formats" / "peft"
    assert {path.stem for path in folder.iterdir()} == set(FAMILIES)
    for name, family in FAMILIES.items():
        entry = tomllib.loads((folder / f"{name}.toml").read_text("utf-8"))
        assert entry["type"] == family.peft_type
        assert entry["methods"] == [method.__module__.rpartition(".")[2] for method in family.methods()]
        assert entry.get("read", {}) == family.read
        assert entry.get("harmless", {}) == family.harmless
        words = {word for tensors in entry["tensors"] for word in re.findall(r"[\w.*]+", tensors["key"])}
        assert {*family.parts, *family.shared} <= {word.removeprefix("base_model").removeprefix(".") for word in words}


def test_every_field_of_peft_is_known():
    """So that a release that adds one fails here, not in the hands of a user."""
    known = {**config.READ, **config.HARMLESS, **config.REFUSED}
    for cls in (LoraConfig, IA3Config, TrainableTokensConfig):
        assert {field.name for field in dataclasses.fields(cls)} <= set(known), cls
    for family in FAMILIES.values():
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[family.peft_type]
        own = {*family.read, *family.harmless}
        assert {field.name for field in dataclasses.fields(cls)} <= {*known, *own}, cls
        assert own & set(known) <= {"init_weights"}


def test_every_type_of_peft_is_read_or_refused_with_the_reason():
    others = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - set(config.peft_types())
    assert others <= set(config.OTHER_TYPES)
    for kind in (*others, "BONE"):
        with pytest.raises(Unsupported, match=kind) as raised:
            config.parse({"peft_type": kind})
        assert config.OTHER_TYPES[kind] in raised.value.why
