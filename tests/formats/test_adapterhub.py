"""AdapterHub's folders: what configs of all releases mean, what is refused and where, and what is written anew."""

import json
import math
import shutil
import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import (
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    StorageError,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from adapterkit.formats.adapterhub import load
from adapterkit.formats.adapterhub.conversion import decode
from adapterkit.formats.adapterhub.families import FAMILIES
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import from_numpy

SPEC = Path(__file__).parents[2] / "spec"
VECTORS = SPEC / "vectors" / "formats" / "adapterhub"


def nothing(_):
    """No change."""


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text("utf-8"))


def tensors_of(folder):
    return load_file(folder / "adapter.safetensors")


@pytest.fixture
def changed(tmp_path):
    """A copy of a vector with another config and other tensors."""

    def change(name, config=nothing, tensors=nothing):
        folder = tmp_path / "changed"
        shutil.copytree(VECTORS / name, folder)
        said = config_of(folder)
        config(said)
        (folder / "adapter_config.json").write_text(json.dumps(said, indent=2, sort_keys=True))
        if (folder / "adapter.safetensors").exists():
            held = tensors_of(folder)
            tensors(held)
            save_file(held, folder / "adapter.safetensors")
        return folder

    return change


def own(**fields):
    """A change of fields of the method."""
    return lambda config: config["config"].update(fields)


def top(**fields):
    """A change of fields beside `config`."""
    return lambda config: config.update(fields)


def lora(out=8, in_=8, r=2, scaling=2.0, seed=0):
    rng = np.random.default_rng(seed)
    A, B = (from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((r, in_), (out, r)))
    return ak.METHODS["lora"](A=A, B=B, scaling=scaling)


def adapter(**updates):
    return ak.Adapter({ak.Target(path.replace("__", ".")): (update,) for path, update in updates.items()})


QUERY = "encoder__layer__0__attention__self__query"


def test_every_field_is_in_the_specification():
    entry = tomllib.loads((SPEC / "formats" / "adapterhub.toml").read_text("utf-8"))
    assert entry["architectures"] == sorted(FAMILIES)
    assert entry["families"] == {
        name: {"read": dict(family.read), "harmless": dict(family.harmless)} for name, family in FAMILIES.items()
    }
    for family in FAMILIES.values():
        assert set(family.fields.__struct_fields__) == set(family.read)
        assert not set(family.read) & set(family.harmless)


# Releases.


@pytest.mark.parametrize(
    ("version", "scaling"),
    [
        ("adapters.1.0.1", 1.0), ("adapters.0.2.2", 1.0), ("adapters.1.1.0.dev0", 1.0), ("adapters.1.1.0", 1.5),
        ("adapters.1.3.0", 1.5), ("adapters.2.0", 1.5), ("3.2.1", 1.5), ("2.3.0", 1.5), (None, 1.5),
    ],
)  # fmt: skip
def test_loras_of_adapters_before_1_1_were_trained_without_their_scaling(version, scaling, changed):
    folder = changed("lora_bert", lambda c: c.pop("version") if version is None else c.update(version=version))
    read = ak.read(folder)
    assert {update.scaling for _, update in read} == {scaling}
    ak.write(read, folder.parent / "again", "adapterhub")
    assert (folder.parent / "again" / "adapter_config.json").read_bytes() == (
        folder / "adapter_config.json"
    ).read_bytes()


@pytest.mark.parametrize(("compat", "scaling"), [(None, 1.0), ("formula", 2.0)])
def test_inside_a_union_that_rule_holds_too_though_the_library_forgets_it(compat, scaling, changed):
    folder = changed("union_bert", top(version="adapters.1.0.0"))
    found = {update.scaling for _, update in ak.read(folder, compat=compat) if update.method == "lora"}
    assert found == {scaling}


@pytest.mark.parametrize(("said", "meant"), [("gelu", "gelu_new"), ("gelu_orig", "gelu"), ("RELU", "relu")])
def test_activations_of_configs_without_a_version(said, meant, changed):
    folder = changed("pfeiffer_bert", lambda c: (c.pop("version"), c["config"].update(non_linearity=said)))
    assert {update.non_linearity for _, update in ak.read(folder)} == {meant}


def test_activations_of_configs_with_a_version_are_as_they_say(changed):
    folder = changed("pfeiffer_bert", lambda c: (c.update(version="2.3.0"), c["config"].update(non_linearity="gelu")))
    assert {update.non_linearity for _, update in ak.read(folder)} == {"gelu"}


def test_keys_of_adapter_transformers_1_are_read_and_written_again(changed, tmp_path):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace(".adapters.", ".layer_text_task_adapters.")] = tensors.pop(key)

    folder = changed("pfeiffer_bert", tensors=rename)
    assert ak.read(folder).digest() == ak.read(VECTORS / "pfeiffer_bert").digest()
    ak.write(ak.read(folder), tmp_path / "again", "adapterhub")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(folder).keys()


def test_reft_at_a_layer_whose_number_is_no_decimal_number_is_refused(tmp_path):
    source = ak.read(VECTORS / "loreft_bert")
    updates = {replace(target, path=target.path[:-1] + "²"): group for target, group in source.updates.items()}
    with pytest.raises(Unrepresentable) as raised:
        ak.write(ak.Adapter(updates), tmp_path / "a", "adapterhub")
    assert all("does not end in a layer number" in item for item in raised.value.items)


def test_a_file_that_does_not_tell_noreft_from_direft_is_refused_until_the_caller_says_it(tmp_path):
    with pytest.raises(Unsupported, match="NoReFT") as raised:
        ak.read(VECTORS / "noreft_gpt2")
    assert raised.value.where == "config.subtract_projection"
    assert "--compat noreft" in raised.value.cure
    for compat, subtracted in (("noreft", True), ("direft", False)):
        adapter = ak.read(VECTORS / "noreft_gpt2", compat=compat)
        assert {update.subtract_projection for _, update in adapter} == {subtracted}
        ak.write(adapter, tmp_path / compat, "adapterhub")
        config = "adapter_config.json"
        assert (tmp_path / compat / config).read_bytes() == (VECTORS / "noreft_gpt2" / config).read_bytes()
    assert {u.subtract_projection for _, u in ak.read(VECTORS / "direft_gpt2")} == {False}


# Detection.


@pytest.mark.parametrize("folder", sorted((SPEC / "vectors" / "formats" / "peft").iterdir()), ids=lambda p: p.name)
def test_pefts_folders_are_not_taken_for_its_own(folder):
    assert not ak.FORMATS["adapterhub"]().sniff(folder)


@pytest.mark.parametrize("other", [{"peft_type": "LORA"}, {"fine_tune_type": "lora"}, {"lora_parameters": {}}])
def test_a_config_with_another_tools_keys_is_not_its_own(other, changed):
    assert not ak.FORMATS["adapterhub"]().sniff(changed("lora_bert", top(**other)))


def test_a_damaged_config_is_still_recognised_and_then_refused(changed):
    folder = changed("lora_bert")
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text[:-40] + '"version": "adapters.1.3.0"')
    assert ak.detect(folder) == "adapterhub"
    with pytest.raises(Malformed, match="JSON") as raised:
        ak.read(folder)
    assert raised.value.path.endswith("adapter_config.json")


@pytest.mark.parametrize("name", ["adapter_setup.json", "adapter_fusion_config.json"])
def test_a_composition_is_recognised_and_refused_by_name(name, tmp_path):
    (tmp_path / name).write_text("{}")
    assert ak.detect(tmp_path) == "adapterhub"
    with pytest.raises(Unsupported, match="one by one") as raised:
        ak.read(tmp_path)
    assert raised.value.path.endswith(name)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_either_file_stands_for_the_folder(name):
    path = VECTORS / "lora_bert" / name
    assert ak.detect(path) == "adapterhub"
    assert ak.read(path).digest() == ak.read(path.parent).digest()


# Refusals: every fault by its place.


def without(*ends):
    def change(tensors):
        for key in [key for key in tensors if key.endswith(ends)][:1]:
            del tensors[key]

    return change


def beside(**more):
    return lambda tensors: tensors.update({key.replace("__", "."): value for key, value in more.items()})


def reshaped(end, *shape):
    def change(tensors):
        key = next(key for key in tensors if key.endswith(end))
        tensors[key] = np.ones(shape, np.float32)

    return change


ONE = np.ones((2, 2), np.float32)
BERT = "encoder__layer__0__attention__self__query"

FAULTS = {
    "architecture": ("lora_bert", own(architecture="lorax"), nothing, Unsupported, "config.architecture"),
    "architecture_number": ("lora_bert", own(architecture=3), nothing, Unsupported, "config.architecture"),
    "bottleneck_named": ("lora_bert", own(architecture="bottleneck"), nothing, Unsupported, "config."),
    "field": ("lora_bert", own(use_magic=True), nothing, Unsupported, "config.use_magic"),
    "rank_text": ("lora_bert", own(r="two"), nothing, Malformed, "config.r"),
    "rank_zero": ("lora_bert", own(r=0), nothing, Malformed, "config.r"),
    "rank_other": ("lora_bert", own(r=3), nothing, ShapeMismatch, "lora_A"),
    "mode": ("lora_bert", own(composition_mode="mix"), nothing, Unsupported, "config.composition_mode"),
    "two_laws": ("lora_bert", own(use_dora=True, use_gating=True), nothing, Unsupported, "config"),
    "magnitude_missing": ("lora_bert", own(use_dora=True), nothing, Malformed, "lora_A"),
    "ia3_alpha": ("ia3_bert", own(alpha=3), nothing, Unsupported, "config.alpha"),
    "ia3_for_lora": ("lora_bert", own(composition_mode="scale", r=1, alpha=1), nothing, ShapeMismatch, "lora_B"),
    "partner": ("lora_bert", nothing, without("lora_B"), Malformed, "lora_A"),
    "partner_bias": ("pfeiffer_bert", nothing, without("adapter_up.bias"), Malformed, "adapters.ad."),
    "foreign_key": ("lora_bert", nothing, beside(base_model__model__x__lora_A__weight=ONE), Malformed, "base_model"),
    "other_name": ("lora_bert", nothing, beside(x__loras__other__lora_A=ONE), Malformed, "x.loras.other.lora_A"),
    "extra_slot": ("lora_bert", nothing, beside(x__loras__ad__lora_A=ONE, x__loras__ad__lora_B=ONE,
                                                x__loras__ad__lora_C=ONE), Malformed, "x.loras.ad.lora_C"),
    "fusion_tensors": ("lora_bert", nothing, beside(x__adapter_fusion_layer__a=ONE), Malformed, "x.adapter_fusion"),
    "groups": ("lora_gpt2", own(attn_matrices=["q", "k", "v"]), nothing, ShapeMismatch, "c_attn"),
    "name_escapes": ("lora_bert", top(name="../../x"), nothing, Malformed, "name"),
    "name_dotted": ("lora_bert", top(name="a.b"), nothing, Malformed, "name"),
    "name_missing": ("lora_bert", lambda config: config.pop("name"), nothing, Malformed, "name"),
    "config_text": ("lora_bert", top(config="pfeiffer"), nothing, Malformed, "config"),
    "union_empty": ("lora_bert", top(config={"architecture": "union", "configs": []}), nothing, Malformed, "configs"),
    "union_member": ("union_bert", lambda c: c["config"]["configs"][1].update(r=5), nothing, ShapeMismatch, "lora_A"),
    "union_field": ("union_bert", lambda c: c["config"]["configs"][1].update(magic=1), nothing, Unsupported,
                    "config.configs[1].magic"),
    "non_linearity": ("pfeiffer_bert", own(non_linearity="wobble"), nothing, Unsupported, "config.non_linearity"),
    "scaling": ("pfeiffer_bert", own(scaling="guessed"), nothing, Unsupported, "config.scaling"),
    "residual": ("pfeiffer_bert", own(residual_before_ln="often"), nothing, Unsupported, "config.residual_before_ln"),
    "glow": ("invertible_bert", own(inv_adapter="glow"), nothing, Unsupported, "config.inv_adapter"),
    "unknown_model": ("pfeiffer_bert", top(model_type="deberta"), nothing, Unsupported, "output.adapters"),
    "location_off": ("pfeiffer_bert", own(output_adapter=False), nothing, Malformed, "output.adapters"),
    "shared_dropped": ("compacter_bert", nothing, without("phm_rule"), Malformed, "shared_parameters"),
    "vera_dropped": ("vera_bert", nothing, without("shared_parameters.ad.lora_A"), Malformed, "vera_D"),
    "reft_rank": ("loreft_bert", own(r=1), nothing, ShapeMismatch, "units.0"),
    "reft_half": ("loreft_bert", nothing, without("0.base"), Malformed, "units.0"),
    "reft_base": ("loreft_bert", nothing, reshaped("0.base", 4, 4), ShapeMismatch, "original"),
    "reft_unit": ("loreft_bert", own(tied_weights=True), nothing, Malformed, "units.1"),
    "reft_activation": ("loreft_bert", own(non_linearity="wobble"), nothing, Unsupported, "config.non_linearity"),
    "prompt_length": ("prompt_bert", own(prompt_length=4), nothing, ShapeMismatch, "prompt_embedding"),
    "prompt_combine": ("prompt_bert", own(combine="prefix_after_bos"), nothing, Unsupported, "config.combine"),
    "mtl_count": ("mtl_bert", own(n_up_projection=2), nothing, ShapeMismatch, "lora_B"),
    "mtl_linear": ("mtl_bert", own(task_specific_matrix_type="linear"), nothing, Unsupported, "matrix_type"),
    "prefix_gate": ("prefix_bert", own(use_gating=True), nothing, Malformed, "prefix_tunings"),
    "prefix_gates": ("unipelt_bert", lambda c: c["config"]["configs"][0].update(shared_gating=False), nothing,
                     ShapeMismatch, "prefix_gates.ad.weight"),
    "prefix_gate_off": ("unipelt_bert", lambda c: c["config"]["configs"][0].update(use_gating=False), nothing,
                        Malformed, "prefix_gates.ad"),
    "prefix_network": ("prefix_bert", own(non_linearity="relu"), nothing, Unsupported, "config.non_linearity"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name_and_place(fault, changed):
    name, config, tensors, error, where = FAULTS[fault]
    folder = changed(name, config, tensors)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error) as raised:
        ak.read(folder, format="adapterhub", base=VECTORS / "models" / "bert")
    assert type(raised.value) is error
    assert where in raised.value.where
    assert raised.value.path.startswith(str(folder))
    assert raised.value.cure
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


FOLDERS = sorted(path.parent for path in VECTORS.glob("*/adapter_config.json"))


def attempt(content, base):
    """Reads it, or does not: nothing but adapterkit's own errors may come out."""
    with suppress(AdapterkitError):
        decode(content, base=base).validate()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tensors_of_any_shape_are_read_or_refused(folder):
    content, base = load(folder), open_checkpoint(VECTORS / "models" / config_of(folder)["model_type"])
    for key in content.tensors:
        others = {name: tensor for name, tensor in content.tensors.items() if name != key}
        attempt(replace(content, tensors=others), base)
        for shape in ((), (3,), (3, 0), (3, 3, 3)):
            attempt(replace(content, tensors=others | {key: from_numpy(np.ones(shape, np.float32))}), base)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_fields_of_any_kind_are_read_or_refused(folder):
    content, base = load(folder), open_checkpoint(VECTORS / "models" / config_of(folder)["model_type"])
    whole = dict(content.config)
    for name in whole["config"]:
        for value in (None, -1, 0, 7, 2.5, 10**30, True, "x", ["q"], {"x": 1}):
            changed = whole | {"config": whole["config"] | {name: value}}
            attempt(replace(content, config=changed), base)
    for name in ("name", "model_type", "model_name", "version", "config"):
        for value in (None, 7, "x", ["x"], {"x": 1}):
            attempt(replace(content, config=whole | {name: value}), base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused_by_its_path(name, part, changed):
    folder = changed("lora_bert")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(Malformed) as raised:
        ak.read(folder, format="adapterhub")
    assert raised.value.path.endswith(name)
    assert raised.value.cure


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_a_missing_file_is_named(name, changed):
    folder = changed("lora_bert")
    (folder / name).unlink()
    with pytest.raises(StorageError, match=name):
        ak.read(folder, format="adapterhub")


def test_a_prefix_needs_the_base_for_its_heads():
    with pytest.raises(UsageError, match="heads") as raised:
        ak.read(VECTORS / "prefix_bert")
    assert "base=" in raised.value.cure


def test_a_copy_of_a_shared_tensor_that_differs_is_refused(tmp_path):
    folder = Path(shutil.copytree(VECTORS / "prefix_bert", tmp_path / "a"))
    held = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    key = next(key for key in held if key.startswith("encoder.layer.1"))
    held[key] = held[key] + 1
    torch.save(held, folder / "pytorch_adapter.bin")
    with pytest.raises(Malformed, match="the same tensor") as raised:
        ak.read(folder, base=VECTORS / "models" / "bert")
    assert raised.value.where == key


# What lies beside an adapter.


def test_a_prediction_head_and_an_interface_travel_along(changed, tmp_path):
    folder = changed("lora_bert")
    (folder / "head_config.json").write_text(
        json.dumps({"config": {"num_labels": 2}, "name": "ad"}, indent=2, sort_keys=True)
    )
    save_file({"heads.ad.1.weight": ONE}, folder / "model_head.safetensors")
    (folder / "adapter_interface.json").write_text(json.dumps({"attn_q_proj": "q"}, indent=2))
    ak.write(ak.read(folder), tmp_path / "native")
    assert ak.write(ak.read(tmp_path / "native"), tmp_path / "again", "adapterhub") == []
    for name in ("head_config.json", "model_head.safetensors", "adapter_interface.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gpt2", r"stored as \[in, out\].*over the wrong axis"), ("strange", "DoRA for the parts of a fused weight")],
)
def test_dora_on_a_fused_weight_is_refused_for_its_reason(model_type, why, changed):
    """GPT-2 stores its weights as [in, out]; another model may have a linear layer for queries, keys and values."""

    def magnitudes(tensors):
        for key in [key for key in tensors if key.endswith("lora_B")]:
            tensors[f"{key.removesuffix('lora_B')}m.weight"] = np.ones((1, 16), np.float32)

    def config(said):
        said["model_type"] = model_type
        said["config"]["use_dora"] = True

    folder = changed("lora_gpt2", config, magnitudes)
    (folder / "adapter_interface.json").write_text(json.dumps({"attn_qkv_proj": "attn.c_attn"}))
    with pytest.raises(Unsupported, match=why) as raised:
        ak.read(folder)
    assert "c_attn" in raised.value.where


def test_an_interface_names_a_fused_weight(changed):
    folder = changed("lora_gpt2_one", top(model_type="strange"))
    assert {target.rows for target in ak.read(folder).updates} == {None}
    (folder / "adapter_interface.json").write_text(json.dumps({"attn_qkv_proj": "attn.c_attn"}))
    assert {target.rows for target in ak.read(folder).updates} == {(8, 16)}


# Writing.


@pytest.mark.parametrize(
    ("model_type", "path", "shared"),
    [
        ("bert", "encoder.layer.0.attention.self.query", ""),
        ("bert", "bert.encoder.layer.0.attention.self.query", "bert."),
        ("distilbert", "transformer.layer.0.attention.q_lin", ""),
        ("distilbert", "distilbert.transformer.layer.0.attention.q_lin", "distilbert."),
        ("gpt2", "h.0.mlp.c_fc", ""),
        ("gpt2", "transformer.h.0.mlp.c_fc", "transformer."),
    ],
)
def test_shared_tensors_lie_at_the_base_inside_the_saved_model(model_type, path, shared, tmp_path):
    """DistilBERT's own layers are in `transformer.layer`; in GPT-2 with a head, `transformer` is the base."""
    tensors = {"A": np.ones((4, 8)), "B": np.ones((8, 4)), "D": np.eye(4), "E": np.eye(8)}
    vera = ak.METHODS["vera_matrices"](**{name: array.astype(np.float32) for name, array in tensors.items()})
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({f"{path}.weight": np.ones((8, 8), np.float32)}, base / "model.safetensors")
    target = ak.Target(path, "in out *k" if model_type == "gpt2" else "out *in")
    ak.write(ak.Adapter({target: (vera,)}), tmp_path / "a", "adapterhub", base=base)
    assert {key for key in tensors_of(tmp_path / "a") if "shared_parameters" in key} == {
        f"{shared}shared_parameters.adapter.lora_{field}" for field in "AB"
    }


def test_another_scaling_is_another_alpha(tmp_path):
    read = ak.read(VECTORS / "lora_bert")
    doubled = read.replace(
        updates={t: tuple(u.replace(scaling=2 * u.scaling) for u in us) for t, us in read.updates.items()}
    )
    ak.write(doubled, tmp_path / "a", "adapterhub")
    assert config_of(tmp_path / "a")["config"]["alpha"] == 6
    assert ak.read(tmp_path / "a").digest() == doubled.digest()
    assert config_of(tmp_path / "a")["name"] == "ad"


def test_an_old_file_that_changes_is_written_in_the_words_of_a_new_release(changed, tmp_path):
    read = ak.read(changed("lora_bert", top(version="adapters.1.0.0")))
    halved = read.replace(updates={t: tuple(u.replace(scaling=0.5) for u in us) for t, us in read.updates.items()})
    ak.write(halved, tmp_path / "a", "adapterhub")
    assert config_of(tmp_path / "a")["version"] == "adapters.1.3.0"
    assert {update.scaling for _, update in ak.read(tmp_path / "a")} == {0.5}


def test_an_adapter_of_another_format_becomes_a_folder_that_reads_the_same(tmp_path):
    source = adapter(**{QUERY: lora(), QUERY.replace("query", "value"): lora(seed=1)})
    ak.write(source, tmp_path / "peft", "peft")
    assert ak.write(ak.read(tmp_path / "peft"), tmp_path / "hub", "adapterhub") == []
    assert ak.detect(tmp_path / "hub") == "adapterhub"
    assert ak.read(tmp_path / "hub").digest() == source.digest()
    said = config_of(tmp_path / "hub")
    assert (said["model_type"], said["config"]["attn_matrices"]) == ("bert", ["q", "v"])


def test_a_changed_projection_is_taken_apart_anew(tmp_path):
    read = ak.read(VECTORS / "loreft_bert").load()
    turned = read.map(lambda leaf: leaf.flip(0) if leaf.shape == (2, 8) else leaf)
    ak.write(turned, tmp_path / "a", "adapterhub")
    again = ak.read(tmp_path / "a").load()
    for (_, before), (_, after) in zip(turned, again, strict=True):
        torch.testing.assert_close(after.projection, before.projection, rtol=0, atol=1e-6)
        torch.testing.assert_close(after.suffix_projection, before.suffix_projection, rtol=0, atol=1e-6)
    assert config_of(tmp_path / "a")["config"]["orthogonality"] is True


def near(value):
    """Every float within four units in the last place."""
    found = [value]
    for towards in (math.inf, -math.inf):
        step = value
        for _ in range(4):
            step = math.nextafter(step, towards)
            found.append(step)
    return found


NO_ALPHA = next(
    s for s in (0.1 * math.sqrt(n) for n in range(1, 400)) if not any(alpha / 3 == s for alpha in near(s * 3))
)
"""A scaling that no alpha divided by 3 is."""

GPT2 = "h__0__attn__c_attn"

LOSSES = {
    "method": (
        adapter(x=ak.METHODS["dense"](D=from_numpy(ONE))),
        "the adapters library does not have the method dense",
    ),
    "nowhere": (adapter(x__y=lora()), "the model type is unknown"),
    "ambiguous": (adapter(layers__0__mlp__up_proj=lora()), "the model type is unknown"),
    "ranks": (adapter(**{QUERY: lora(), QUERY.replace("0", "1"): lora(r=3)}), "its method, rank or scaling differs"),
    "scaling": (adapter(**{QUERY: lora(r=3, scaling=NO_ALPHA)}), "no alpha yields its exact scaling"),
    "whole_fused": (adapter(**{GPT2: lora(24)}), "all of a fused weight"),
    "direft": (ak.Adapter(ak.read(VECTORS / "direft_gpt2").updates), "DiReFT"),
    "bottleneck": (ak.Adapter(ak.read(VECTORS / "pfeiffer_bert").updates), "only the base shows"),
    "dora": (ak.Adapter(ak.read(VECTORS / "dora_llama", compat="formula").updates), "only the base shows"),
    "two_kinds": (ak.Adapter(ak.read(VECTORS / "two_kinds_bert").updates), "only the base shows"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_a_folder_cannot_say_is_refused_item_by_item(case, tmp_path):
    source, why = LOSSES[case]
    with pytest.raises(Unrepresentable) as raised:
        ak.write(source, tmp_path / "a", "adapterhub")
    assert any(why in item for item in raised.value.items)
    assert not (tmp_path / "a").exists()


def test_what_it_cannot_say_is_left_out_if_that_is_allowed(tmp_path):
    source = adapter(**{QUERY: lora(), "x": ak.METHODS["dense"](D=from_numpy(ONE))})
    lines = ak.write(source, tmp_path / "a", "adapterhub", on_loss="drop")
    assert lines == ["left out x: the adapters library does not have the method dense"]
    assert [str(target) for target in ak.read(tmp_path / "a").updates] == [QUERY.replace("__", ".")]


NEW = [
    "compacter_bert",
    "compacter_own_gpt2",
    "dora_llama",
    "gated_bert",
    "houlsby_bert",
    "houlsby_gpt2",
    "houlsby_t5",
    "ia3_gpt2",
    "invertible_bert",
    "lora_gpt2_one",
    "lora_llama",
    "lora_t5",
    "mam_bert",
    "mtl_bert",
    "normed_bert",
    "parallel_llama",
    "pfeiffer_bert",
    "prefix_bart",
    "prefix_bert",
    "prefix_flat_llama",
    "prefix_cross_t5",
    "prefix_gated_bart",
    "prefix_gated_llama",
    "prefix_t5",
    "prompt_bert",
    "union_bert",
    "unipelt_bert",
    "vera_bert",
]
"""Vectors that tools/foreign/check_adapterhub.py wrote anew, and the library computed the same with."""


@pytest.mark.parametrize("name", NEW)
def test_with_the_base_new_folders_say_what_vectors_say(name, tmp_path):
    base = next(path for path in (VECTORS / "models").iterdir() if path.name in name.split("_"))
    source = ak.Adapter(ak.read(VECTORS / name / "expected.native.safetensors").updates)
    assert ak.write(source, tmp_path / "a", "adapterhub", base=base) == []
    again = ak.read(tmp_path / "a", base=base)
    assert again.digest() == source.digest()


@pytest.mark.parametrize("name", ["prefix_bart", "prefix_gated_bart"])
def test_a_decoder_of_another_depth_than_its_config_names_is_counted(name, tmp_path):
    """BART's default is 12 layers: the base has 2 and 1, and its config need not say so."""
    base = tmp_path / "base"
    shutil.copytree(VECTORS / "models" / "bart", base)
    config = json.loads((base / "config.json").read_text())
    for field in ("encoder_layers", "decoder_layers", "num_hidden_layers"):
        del config[field]
    (base / "config.json").write_text(json.dumps(config))
    source = ak.Adapter(ak.read(VECTORS / name / "expected.native.safetensors").updates)
    assert ak.write(source, tmp_path / "a", "adapterhub", base=base) == []
    assert ak.read(tmp_path / "a", base=base).digest() == source.digest()
    part = {target: found for target, found in source.updates.items() if "encoder_attn" not in target.path}
    for lost in ("decoder.layers.0.self_attn", "encoder.layers.1.self_attn"):
        less = {target: found for target, found in part.items() if target.path != lost}
        with pytest.raises(Unrepresentable, match=r"(0 of 1|1 of 2) attention modules"):
            ak.write(ak.Adapter(less), tmp_path / "b", "adapterhub", base=base)


def test_a_decoder_of_other_heads_is_refused(tmp_path):
    """The library makes the decoder's keys of as many heads as the encoder has, and then cannot run them."""
    base = tmp_path / "base"
    shutil.copytree(VECTORS / "models" / "bart", base)
    config = json.loads((base / "config.json").read_text()) | {"encoder_attention_heads": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatch, match="4 heads, but the decoder has 2"):
        ak.read(VECTORS / "prefix_bart", base=base)


def test_a_dora_whose_bias_the_library_would_scale_is_not_written(tmp_path):
    source = ak.Adapter(ak.read(VECTORS / "dora_bert", compat="formula").updates)
    plain = source.replace(updates={t: (us[0].replace(scaling=1.0),) for t, us in source.updates.items()})
    with pytest.raises(Unrepresentable, match="the scaling of this dora is not 1"):
        ak.write(source, tmp_path / "a", "adapterhub", base=VECTORS / "models" / "bert")
    with pytest.raises(Unrepresentable, match="the layer has a bias"):
        ak.write(plain, tmp_path / "a", "adapterhub", base=VECTORS / "models" / "bert")
