"""Routers of experts against PEFT: Arrow and X-LoRA, whose files do not hold the experts."""

import copy
import json
import os
import threading
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from peft_cases import llama
from peft_cases.built_in import lora
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import (
    Malformed,
    NotMergeable,
    ShapeMismatch,
    TargetNotFound,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from adapterkit.methods.lora import LoRA
from adapterkit.methods.xlora import XLoRA
from adapterkit.torch.inject import with_experts

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[3, 4, 1, 3, 4, 9], [3, 4, 2, 2, 7, 3]])
CLASSIFIER = "internal_xlora_classifier"

ROUTERS = {
    "best of three": ArrowConfig(top_k=1, rng_seed=1),
    "two of three": ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=1),
    "less the general": ArrowConfig(top_k=2, use_gks=True, rng_seed=1),
}

CLASSIFIERS = {
    "one layer": {"xlora_depth": 1},
    "two layers": {"xlora_depth": 2, "softmax_temperature": 0.3},
    "no dropout": {"xlora_depth": 3, "xlora_dropout_p": 0.0, "enable_softmax": False},
    "layerwise": {"xlora_depth": 4, "layerwise_scalings": True, "global_scaling_weight": 0.5},
    "best": {"top_k_lora": 2, "layerwise_scalings": True},
    "softmax of best": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
}


@cache
def base():
    torch.manual_seed(5)
    model = llama().eval()
    model.config.use_cache = False
    return model


def fresh():
    return copy.deepcopy(base())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Experts as PEFT wrote them, with one direction that is far ahead of the others; the last two less alike."""
    made = []
    for position, modules in enumerate((["q_proj", "up_proj"],) * 4 + (["q_proj", "v_proj"],)):
        torch.manual_seed(position)
        config = lora(target_modules=modules, r=2 + (position == 4), lora_alpha=3 + position)
        wrapped = get_peft_model(fresh(), config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
                if "lora_A" in name:
                    parameter[1:] *= 0.05
        made.append(tmp_path_factory.mktemp("expert"))
        wrapped.save_pretrained(str(made[-1]))
    return made


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def arrow(case, folders, dest):
    """PEFT's model of three experts and perhaps a general one, and the router's folder."""
    config = copy.deepcopy(ROUTERS[case])
    paths = [str(folder) for folder in folders]
    model = create_arrow_model(fresh(), paths[:3], config, general_adapter_paths=paths[3:4] if config.use_gks else None)
    model.save_pretrained(str(dest))
    return model.eval(), dest / "arrow_router"


@torch.no_grad()
@pytest.mark.parametrize("case", ROUTERS)
def test_arrow_computes_what_peft_computes(case, folders, tmp_path):
    theirs, router = arrow(case, folders, tmp_path)
    experts = [ak.read(folder) for folder in folders[: 4 if ROUTERS[case].use_gks else 3]]
    mine = fresh()
    plain = mine(IDS).logits
    handle = ak.torch.inject(mine, ak.read(router), experts=experts)
    got = mine(IDS).logits
    assert not torch.allclose(got, plain, rtol=1e-2)
    close(got, theirs(input_ids=IDS).logits)
    whole = handle.adapter()
    handle.remove()
    assert torch.equal(mine(IDS).logits, plain)
    # What was attached holds the experts: it can be written and attached by itself.
    ak.write(whole, tmp_path / "whole.safetensors")
    ak.torch.inject(mine, ak.read(tmp_path / "whole.safetensors"))
    close(mine(IDS).logits, got)
    with pytest.raises(Unrepresentable, match="this arrow stores its experts"):
        ak.write(whole, tmp_path / "again", "peft")


@pytest.mark.parametrize("case", ROUTERS)
def test_arrow_writes_back_the_bytes_of_peft(case, folders, tmp_path):
    _, router = arrow(case, folders, tmp_path / "made")
    assert ak.write(ak.read(router), tmp_path / "again", "peft") == []
    assert contents(tmp_path / "again") == contents(router)
    ak.write(ak.read(router), tmp_path / "native.safetensors")
    ak.write(ak.read(tmp_path / "native.safetensors"), tmp_path / "from native", "peft")
    assert contents(tmp_path / "from native") == contents(router)
    new = ak.read(router).replace(foreign=None)
    ak.write(new, tmp_path / "new", "peft")
    assert ak.read(tmp_path / "new").digest() == new.digest()
    said = [json.loads((f / "adapter_config.json").read_text())["arrow_config"] for f in (tmp_path / "new", router)]
    assert said[0] | {"rng_seed": 1} == said[1]


def xlora(case, folders, dest, paths=None):
    """PEFT's model of three experts, and a folder as it should be: its own saving loses layers of the classifier."""
    adapters = paths or {str(i): str(folder) for i, folder in enumerate(folders[2:])}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=8, xlora_size=5, adapters=adapters, **CLASSIFIERS[case])
    torch.manual_seed(1)
    model = get_peft_model(fresh(), config).eval()
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(dest))
    held = {f"base_model.{n.partition('base_model.')[2]}": t for n, t in model.state_dict().items() if CLASSIFIER in n}
    save_file(held, dest / "adapter_model.safetensors", {"format": "pt"})
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_xlora_computes_what_peft_computes(case, folders, tmp_path):
    """Experts of several ranks, at layers that not all of them change."""
    theirs, mine = xlora(case, folders, tmp_path), fresh()
    loaded = PeftModel.from_pretrained(fresh(), str(tmp_path)).eval()
    plain, expected = mine(IDS).logits, theirs(input_ids=IDS).logits
    close(loaded(input_ids=IDS).logits, expected)
    handle = ak.torch.inject(mine, ak.read(tmp_path), experts=[ak.read(folder) for folder in folders[2:]])
    got = mine(IDS).logits
    assert not torch.allclose(got, plain, rtol=1e-2)
    close(got, expected)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "pad_token_id": 0}
    assert torch.equal(mine.generate(**given, use_cache=False), theirs.generate(**given))
    with pytest.raises(Unsupported, match="Pass use_cache=False"):
        mine.generate(**given, use_cache=True)
    whole = handle.adapter()
    handle.remove()
    assert torch.equal(mine(IDS).logits, plain)
    ak.torch.inject(mine, whole)
    close(mine(IDS).logits, got)
    assert len({id(update.last) for _, update in whole}) == 1


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_experts_of_several_dtypes_are_not_rounded(dtypes):
    experts = [
        LoRA(A=torch.randn(3, 6).to(dtype), B=torch.randn(5, 3).to(dtype), scaling=4 / 3)
        for dtype in (getattr(torch, name) for name in dtypes)
    ]
    router = Adapter({Target(""): (XLoRA(last=torch.randn(2, 6), last_bias=torch.zeros(2)),)})
    together = with_experts(lambda: ["q"], router, [Adapter({Target("q"): (each,)}) for each in experts])
    ((_, update),) = together
    for position, each in enumerate(experts):
        assert torch.equal(update.A[position].double(), each.A.double())
        assert torch.equal(update.B[position].double(), each.B.double())
    assert update.strengths.tolist() == pytest.approx([4 / 3] * 2, rel=1e-6)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_xlora_writes_back_the_bytes(case, folders, tmp_path):
    xlora(case, folders, tmp_path / "a")
    assert ak.write(ak.read(tmp_path / "a"), tmp_path / "again", "peft") == []
    assert contents(tmp_path / "again") == contents(tmp_path / "a")
    ak.write(ak.read(tmp_path / "a"), tmp_path / "native.safetensors")
    ak.write(ak.read(tmp_path / "native.safetensors"), tmp_path / "from native", "peft")
    assert contents(tmp_path / "from native") == contents(tmp_path / "a")


def test_peft_saves_no_layer_of_a_classifier_that_is_called_like_an_expert(folders, tmp_path):
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=8, xlora_size=5, xlora_depth=2, adapters={"0": str(folders[0])}
    )
    get_peft_model(fresh(), config).save_pretrained(str(tmp_path))
    assert {key.rpartition(".")[0] for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        f"base_model.{CLASSIFIER}.layers.3"
    }
    with pytest.raises(Malformed, match="the file lacks a layer of the classifier") as raised:
        ak.read(tmp_path)
    assert raised.value.where == f"{CLASSIFIER}.layers.0.weight"


def test_paths_of_experts_are_never_followed(folders, tmp_path, monkeypatch):
    """Reading, writing and injecting open nothing but the folder itself."""
    xlora("one layer", folders, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["adapters"] = {"0": "/etc", "1": "../../secret", "2": "hf://who/what"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    opened, real = [], open
    monkeypatch.setattr(
        "builtins.open", lambda file, *args, **kw: (opened.append(str(file)), real(file, *args, **kw))[1]
    )
    adapter = ak.read(tmp_path / "a")
    with pytest.raises(UsageError, match="Pass experts="):
        ak.torch.inject(fresh(), adapter)
    ak.write(adapter, tmp_path / "b", "peft")
    assert all(name.startswith(str(tmp_path)) for name in opened)
    monkeypatch.undo()
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_router_without_its_experts_says_how_to_give_them(folders, tmp_path):
    xlora("layerwise", folders, tmp_path / "x")
    _, router = arrow("less the general", folders, tmp_path / "a")
    classifier, prototypes, experts = ak.read(tmp_path / "x"), ak.read(router), [ak.read(f) for f in folders]
    assert [str(target) for target in classifier.updates] == ["(model)"]
    model = fresh()
    save_file(model.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    for adapter, where in ((classifier, "(model): xlora"), (prototypes, "model.layers.0.mlp.up_proj: arrow")):
        with pytest.raises(UsageError, match=r"Pass experts=, a list of the expert adapters") as raised:
            ak.torch.inject(model, adapter)
        assert raised.value.where == where
        with pytest.raises(NotMergeable, match="each token's output"):
            ak.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out")
    with pytest.raises(ShapeMismatch, match="do not fit 2 experts at"):
        ak.torch.inject(model, classifier, experts=experts[:2])
    with pytest.raises(UsageError, match=r"3 task experts .* and 1 general"):
        ak.torch.inject(model, prototypes, experts=experts[:3])
    with pytest.raises(TargetNotFound, match="changes nothing at this target") as absent:
        ak.torch.inject(model, prototypes, experts=[*experts[:3], experts[4]])
    assert absent.value.where.startswith("experts[3]")
    with pytest.raises(UsageError, match="needs no separate experts"):
        ak.torch.inject(model, experts[0], experts=experts[1:])
    other = Adapter({Target("model.layers.0.self_attn.q_proj"): (ak.METHODS["ia3"](l=torch.ones(8)),)})
    with pytest.raises(Unsupported, match="the update is ia3, but a router needs plain LoRA"):
        ak.torch.inject(model, classifier, experts=[experts[0], experts[1], other])
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("change", "error", "where"),
    [
        ({"scaling_pass_value": 0.5}, Unsupported, "scaling_pass_value"),
        ({"xlora_depth": 2}, Malformed, "layers.3.weight"),
        ({"hidden_size": 9}, ShapeMismatch, "layers.0.weight"),
        ({"adapters": {"0": "a", "1": "b"}}, ShapeMismatch, "layers.0.weight"),
        ({"softmax_temperature": 0.0}, Malformed, "softmax_temperature"),
    ],
)
def test_a_config_that_is_not_of_the_file_is_refused(change, error, where, folders, tmp_path):
    xlora("one layer", folders, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(error) as raised:
        ak.torch.inject(fresh(), ak.read(tmp_path), experts=[ak.read(folder) for folder in folders[2:]])
    assert where in raised.value.where


@torch.no_grad()
@pytest.mark.parametrize("kind", ["arrow", "xlora"])
def test_threads_with_a_router_of_their_own_inputs(kind, folders, tmp_path):
    """Eight threads, each with other tokens, the router on or off."""
    if kind == "arrow":
        _, router = arrow("two of three", folders, tmp_path)
        experts = [ak.read(folder) for folder in folders[:3]]
    else:
        xlora("two layers", folders, tmp_path)
        router, experts = tmp_path, [ak.read(folder) for folder in folders[2:]]
    model = fresh()
    handle = ak.torch.inject(model, ak.read(router), experts=experts)
    inputs = (torch.arange(8)[:, None, None] + IDS) % 16
    on = [model(ids).logits for ids in inputs]
    with handle.disable():
        off = [model(ids).logits for ids in inputs]
    assert not torch.allclose(on[0], off[0], rtol=1e-2)
    faults, gate = [], threading.Barrier(8)

    @torch.no_grad()
    def work(number):
        gate.wait()
        try:
            for _ in range(30):
                close(model(inputs[number]).logits, on[number])
                with handle.disable():
                    close(model(inputs[number]).logits, off[number])
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
