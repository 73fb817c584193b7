"""PEFT's folders against PEFT itself: what it merges, what it saves, what it loads."""

import copy
import json
import os
import warnings
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_cases import Layers, every_case, gpt2, llama, outputs
from peft_cases.built_in import lora
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Unrepresentable, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""

CASES = every_case()


@cache
def base_of(model):
    torch.manual_seed(len(model.__name__))
    return model().eval()


def fresh(model):
    return copy.deepcopy(base_of(model))


def save(model, config, folder, **options):
    """What PEFT writes, after every trained parameter has moved off its initial value."""
    torch.manual_seed(7)
    wrapped = get_peft_model(fresh(model), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder), **options)
    return folder


def merged_by_peft(model, folder):
    """The weights that PEFT merges a folder to; it must know every tensor, and miss none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(fresh(model), str(folder))
    assert not [w for w in said if "adapter keys" in str(w.message) or "nexpected" in str(w.message)]
    return {name: tensor.clone() for name, tensor in loaded.merge_and_unload().state_dict().items()}


def read(folder, base):
    """Without the base, unless it is asked for."""
    try:
        return ak.read(folder)
    except UsageError as error:
        if error.cure != "Pass --base BASE (base=)":
            raise
        return ak.read(folder, base=base)


def merged_by_adapterkit(adapter, base, out):
    ak.merge(base, adapter, out, overwrite=True)
    return load_file(out / "model.safetensors")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def assert_same_weights(got, expected, base):
    """Relative to the largest weight of each tensor: float32 rounds at 6e-8."""
    for name in base:
        saved = expected.get(name, expected.get(name.replace(".weight", ".modules_to_save.default.weight")))
        error = (got[name].double() - saved.double()).abs().max() / saved.double().abs().max().clamp(min=1e-30)
        assert error <= 1e-6, (name, float(error))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model -> a folder with its weights, as any user has them."""
    folders = {}
    for model in dict.fromkeys((Layers, gpt2, llama, *(model for model, _ in CASES.values()))):
        folders[model] = tmp_path_factory.mktemp(model.__name__)
        save_file(base_of(model).state_dict(), folders[model] / "model.safetensors", {"format": "pt"})
        config = getattr(base_of(model), "config", None)
        (folders[model] / "config.json").write_text("{}" if config is None else config.to_json_string())
    return folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Case -> (model, the folder that PEFT wrote, the weights that PEFT merges it to)."""

    @cache
    def make(case):
        model, config = CASES[case]
        folder = save(model, config, tmp_path_factory.mktemp("peft"))
        return model, folder, merged_by_peft(model, folder)

    return make


@pytest.mark.parametrize("case", CASES)
def test_merges_to_the_weights_of_peft(case, made, bases, tmp_path):
    model, folder, expected = made(case)
    adapter = ak.read(folder, base=bases[model])
    got = merged_by_adapterkit(adapter, bases[model], tmp_path / "out")
    assert_same_weights(got, expected, base_of(model).state_dict())
    assert any(not torch.equal(got[name], tensor) for name, tensor in base_of(model).state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_computes(case, made, bases):
    """Injected, not merged, and gone without a trace."""
    model, folder, _ = made(case)
    base, mine = base_of(model), fresh(model)
    theirs = PeftModel.from_pretrained(fresh(model), str(folder)).eval()
    plain = outputs(base, mine)
    handle = ak.torch.inject(mine, ak.read(folder, base=bases[model]))
    with torch.no_grad():
        got, expected = outputs(base, mine), outputs(base, theirs.base_model.model)
    assert any(not torch.equal(one, other) for one, other in zip(got, plain, strict=True))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(outputs(base, mine), plain, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_writes_back_the_bytes_of_peft(case, made, bases, tmp_path):
    model, folder, _ = made(case)
    adapter = read(folder, bases[model])
    assert ak.write(adapter, tmp_path / "again", "peft", bases[model]) == []
    assert contents(tmp_path / "again") == contents(folder)
    ak.write(adapter, tmp_path / "native.safetensors")
    ak.write(ak.read(tmp_path / "native.safetensors"), tmp_path / "from native", "peft", bases[model])
    assert contents(tmp_path / "from native") == contents(folder)


@pytest.mark.parametrize("case", CASES)
def test_writes_what_peft_loads(case, made, bases, tmp_path):
    """Without the leftovers of PEFT, as for an adapter from anywhere else."""
    model, folder, expected = made(case)
    adapter = ak.read(folder, base=bases[model]).replace(foreign=None).bind(bases[model])
    ak.write(adapter, tmp_path / "new", "peft", base=bases[model])
    assert_same_weights(merged_by_peft(model, tmp_path / "new"), expected, base_of(model).state_dict())
    again = ak.read(tmp_path / "new", base=bases[model])
    assert again.bind(bases[model]).digest() == adapter.digest()


@pytest.mark.parametrize(
    ("case", "path", "name"),
    [
        ("linear", "block.1.q", "block.1.q.weight"),
        ("convolutions", "conv2", "conv2.weight"),
        ("dora", "block.0.up", "block.0.up.weight"),
        ("experts", "experts.down_proj", "experts.down_proj"),
        ("saved modules", "model.norm", "model.norm.weight"),
    ],
)
def test_the_difference_at_one_target(case, path, name, made, bases):
    model, folder, expected = made(case)
    adapter = ak.read(folder, base=bases[model])
    saved = expected.get(name, expected.get(name.replace(".weight", ".modules_to_save.default.weight")))
    difference = saved - base_of(model).state_dict()[name]
    got = adapter.delta(path, base=bases[model])
    torch.testing.assert_close(got, difference, rtol=0, atol=1e-6)


def test_the_output_projection_of_an_attention_is_added_twice_as_peft_trained_it(made, bases, tmp_path):
    model, folder, expected = made("attention")
    once = merged_by_adapterkit(ak.read(folder, compat="formula"), bases[model], tmp_path / "once")
    twice = merged_by_adapterkit(ak.read(folder), bases[model], tmp_path / "twice")
    name, tensors = "attn.out_proj.weight", load_file(folder / "adapter_model.safetensors")
    inner = "base_model.model.attn.base_layer.out_proj.lora_"
    change = 6 / 3 * tensors[f"{inner}B.weight"] @ tensors[f"{inner}A.weight"]
    weight = base_of(model).state_dict()[name]
    torch.testing.assert_close(expected[name], weight + 2 * change)
    torch.testing.assert_close(twice[name], weight + 2 * change)
    torch.testing.assert_close(once[name], weight + change)
    for compat in (None, "formula"):
        ak.write(ak.read(folder, compat=compat), tmp_path / f"again {compat}", "peft")
        assert contents(tmp_path / f"again {compat}") == contents(folder)


def test_the_adapters_bias_of_an_attention_has_no_effect_as_in_peft(bases, tmp_path):
    folder = save(Layers, lora(target_modules=["attn"], lora_bias=True), tmp_path / "a")
    name = "attn.in_proj_bias"
    bias = load_file(folder / "adapter_model.safetensors")["base_model.model.attn.lora_B.bias"]
    before = base_of(Layers).state_dict()[name]
    assert torch.equal(merged_by_peft(Layers, folder)[name], before)
    assert torch.equal(merged_by_adapterkit(ak.read(folder), bases[Layers], tmp_path / "out")[name], before)
    formula = ak.read(folder, compat="formula")
    by_formula = merged_by_adapterkit(formula, bases[Layers], tmp_path / "formula")[name]
    torch.testing.assert_close(by_formula, before + 6 / 4 * bias)
    for number, adapter in enumerate((ak.read(folder), formula)):
        ak.write(adapter, tmp_path / f"again {number}", "peft")
        assert contents(tmp_path / f"again {number}") == contents(folder)


def test_reads_bin_files_as_safetensors(made, tmp_path):
    model, folder, _ = made("dora")
    old = save(model, CASES["dora"][1], tmp_path / "old", safe_serialization=False)
    assert not (old / "adapter_model.safetensors").exists()
    assert ak.read(old).digest() == ak.read(folder).digest()
    ak.write(ak.read(old), tmp_path / "new", "peft")
    assert contents(tmp_path / "new") == contents(folder)


@pytest.mark.parametrize("case", ["linear", "patterns", "rslora", "dora", "experts", "attention"])
def test_a_scaled_adapter_is_not_written_with_its_old_alpha(case, made, bases, tmp_path):
    model, folder, _ = made(case)
    adapter = ak.read(folder, base=bases[model])
    scaled = adapter.replace(
        updates={
            target: tuple(u.replace(scaling=u.scaling / 2) if hasattr(u, "scaling") else u for u in updates)
            for target, updates in adapter.updates.items()
        }
    )
    ak.write(scaled, tmp_path / "scaled", "peft")
    assert ak.read(tmp_path / "scaled", base=bases[model]).digest() == scaled.digest()
    config, before = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "scaled", folder))
    numbers = dict.fromkeys(["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
    assert config | numbers == before | numbers
    read = ak.read(tmp_path / "scaled", base=bases[model])
    expected = merged_by_adapterkit(read, bases[model], tmp_path / "out")
    assert_same_weights(merged_by_peft(model, tmp_path / "scaled"), expected, base_of(model).state_dict())


def test_targets_that_are_gone_are_not_named(made, bases, tmp_path):
    model, folder, _ = made("linear")
    adapter = ak.read(folder)
    some = adapter.replace(updates={t: u for t, u in adapter.updates.items() if t.path != "block.0.q"})
    ak.write(some, tmp_path / "some", "peft", base=bases[model])
    loaded = PeftModel.from_pretrained(fresh(model), str(tmp_path / "some"))
    adapted = {name.split(".lora_A")[0] for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert adapted == {"base_model.model.block.0.up", "base_model.model.block.1.q", "base_model.model.block.1.up"}


def test_state_dicts_saved_by_hand_hold_the_adapters_name(made, tmp_path):
    """As from `model.state_dict()` of an injected model: a name in every key, and no prefix."""
    _, folder, _ = made("dora")
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {}
    for key, tensor in tensors.items():
        body = key.removeprefix("base_model.model.")
        module, _, tail = body.rpartition(".lora_")
        part, _, leaf = f"lora_{tail}".partition(".")
        named[f"{module}.{part}.style{'.' + leaf if leaf else ''}"] = tensor
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file(named, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    adapter = ak.read(tmp_path)
    assert adapter.digest() == ak.read(folder).digest()
    ak.write(adapter, tmp_path / "again", "peft")
    assert contents(tmp_path / "again") == contents(tmp_path)


def test_what_else_lies_in_a_wrapped_module_is_loaded_too(bases, tmp_path):
    """A bias that is replaced beside an adapted parameter, or inside an adapted attention."""

    def random(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    methods = ak.METHODS
    q, attn = "block.0.q.weight", "attn.in_proj_weight"
    adapter = ak.Adapter(
        {
            ak.Target(q): (methods["lora"](A=random(3, 8), B=random(8, 3), scaling=0.5),),
            ak.Target("block.0.q"): (methods["replacement"](bias=random(8)),),
            ak.Target(attn): (
                methods["replacement"](bias=random(24)), methods["lora"](A=random(2, 8), B=random(24, 2), scaling=3.0),
            ),
            ak.Target("attn.out_proj"): (methods["lora"](A=random(2, 8), B=random(8, 2), scaling=3.0),),
        }
    )  # fmt: skip
    with pytest.raises(Unrepresentable, match="alpha"):
        ak.write(adapter, tmp_path / "a", "peft", base=bases[Layers])
    ak.write(adapter, tmp_path / "a", "peft", base=bases[Layers], on_loss="fold")
    expected = merged_by_adapterkit(adapter, bases[Layers], tmp_path / "out")
    assert_same_weights(merged_by_peft(Layers, tmp_path / "a"), expected, base_of(Layers).state_dict())


def test_what_peft_cannot_wrap_is_loaded_by_its_name(bases, tmp_path):
    """PEFT wraps whole modules and asks the file for all they hold: the norm here lacks what was not replaced."""
    replacement = ak.METHODS["replacement"]
    adapter = ak.Adapter(
        {
            ak.Target("head.1"): (replacement(weight=torch.ones(3, 8), bias=torch.ones(3)),),
            ak.Target("norm"): (replacement(weight=torch.full((5,), 2.0)),),
            ak.Target("conv1"): (replacement(bias=torch.full((6,), 3.0)),),
            ak.Target("emb"): (replacement(weight=torch.full((10, 6), 4.0)),),
            ak.Target("block.0.q"): (ak.METHODS["lora"](A=torch.ones(1, 8), B=torch.ones(8, 1)),),
        }
    )
    ak.write(adapter, tmp_path / "a", "peft", base=bases[Layers])
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["modules_to_save"], written["bias"]) == (["emb", "head.1"], "all")
    expected = merged_by_adapterkit(adapter, bases[Layers], tmp_path / "out")
    assert_same_weights(merged_by_peft(Layers, tmp_path / "a"), expected, base_of(Layers).state_dict())


@pytest.mark.parametrize(
    ("paths", "config"),
    [
        (["up"], {"target_modules": "up"}),
        (["up", "block.up"], {"target_modules": ["block.up", "up"]}),
        (["block.up"], {"target_modules": ["block.up"]}),
    ],
)
def test_modules_that_end_alike_are_not_adapted_as_well(paths, config, tmp_path):
    """PEFT's lists name endings: `up` in a list would be `block.up` too."""
    sizes = {"block.up": (4, 6), "up": (4, 6)}
    save_file({f"{path}.weight": torch.zeros(size) for path, size in sizes.items()}, tmp_path / "base.safetensors")
    lora_ = ak.METHODS["lora"](A=torch.ones(2, 6), B=torch.ones(4, 2))
    adapter = ak.Adapter({ak.Target(path): (lora_,) for path in paths})
    ak.write(adapter, tmp_path / "a", "peft", base=tmp_path / "base.safetensors")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["target_modules"] == config["target_modules"]


def test_where_the_paths_lead(made):
    _, folder, _ = made("linear")
    digest = ak.read(folder).digest()
    for path in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors"):
        assert ak.detect(path) == "peft"
        assert ak.read(path).digest() == digest
    assert ak.read(folder).recipe[0] == ak.Step("read", {"format": "peft"})
    assert isinstance(folder, Path)
