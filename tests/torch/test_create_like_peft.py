"""The habits of PEFT's users in `create`: from one seed, factors and losses are PEFT's; the base is never changed."""

import copy
import re

import numpy as np
import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    EvaConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft_starts import IDS, llama
from torch import nn

import adapterkit as ak
from adapterkit.errors import TargetNotFound, Unsupported, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")


def losses(model, steps=6, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    torch.manual_seed(5)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def pefts(model, seed=3, **config):
    """PEFT's model over a copy of the base."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    return get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).train()


def factors(reference):
    """PEFT's factors by target and field."""
    found = {}
    for name, parameter in reference.named_parameters():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_(?:embedding_)?(A|B)\.default(?:\.weight)?", name)
        if match:
            found[match[1], match[2]] = parameter.detach().clone()
    return found


def mine(adapter):
    """The trained factors of an adapter by target and field."""
    found = {}
    for target, update in adapter:
        if update.method != "residual":
            found |= {(target.path, field): update.tensors[field] for field in ("A", "B")}
    return found


def assert_same(adapter, reference, close=1e-6):
    expected, got = factors(reference), mine(adapter)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=close)


INITS = ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", INITS)
def test_initialisers_and_dropout_equal_pefts_from_one_seed(init, use_dora):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fresh = ak.torch.create(model, "dora" if use_dora else "lora", rank=4, alpha=8, seed=3, init=init, dropout=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    reference = pefts(model, use_dora=use_dora, lora_dropout=0.3, init_lora_weights=True if init == "default" else init)
    assert_same(fresh, reference)
    base = model.eval()(IDS).logits
    handle = ak.torch.inject(model, fresh, trainable=True)
    torch.testing.assert_close(model(IDS).logits, base, rtol=1e-4, atol=1e-5)
    assert losses(model.train()) == pytest.approx(losses(reference), rel=1e-5)
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(IDS).logits, base)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_written_adapter_means_what_was_trained(init, tmp_path):
    model = llama()
    base = copy.deepcopy(model)
    handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=4, alpha=8, init=init), trainable=True)
    losses(model)
    y = model.eval()(IDS).logits
    ak.write(handle.adapter(), tmp_path / "native.safetensors")
    again = copy.deepcopy(base)
    ak.torch.inject(again, ak.read(tmp_path / "native.safetensors"))
    torch.testing.assert_close(again.eval()(IDS).logits, y)
    ak.write(handle.adapter(), tmp_path / "peft", format="peft", on_loss="promote")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    torch.testing.assert_close(loaded(IDS).logits, y, rtol=1e-4, atol=1e-5)
    handle.merge_()
    torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 6}}, {}),
        ({"alpha_pattern": {r"mlp\.(up|down)_proj": 3}}, {}),
        ({"rank_pattern": {"o_proj": 1}, "use_rslora": True}, {}),
        ({"exclude": ["down_proj", "k_proj"]}, {"exclude_modules": ["down_proj", "k_proj"]}),
        ({"layers": [0, 2]}, {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "up_proj"]}),
        ({"layers": 1}, {"layers_to_transform": 1, "target_modules": ["q_proj", "up_proj"]}),
    ],
)
def test_patterns_exclusions_and_layers_are_pefts(ours, theirs):
    model = llama()
    targets = theirs.get("target_modules", "all-linear")
    fresh = ak.torch.create(model, "lora", rank=4, alpha=8, seed=3, targets=targets, **ours)
    same = {name: value for name, value in ours.items() if name not in ("exclude", "layers")}
    reference = pefts(model, **theirs, **same)
    assert_same(fresh, reference)
    for target, update in fresh:
        layer = reference.get_submodule(f"base_model.model.{target.path}")
        assert update.scaling == pytest.approx(layer.scaling["default"])
    ak.torch.inject(model, fresh, trainable=True)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-5)


def test_embeddings_and_convolutions_begin_as_pefts():
    model = llama()
    targets = ["embed_tokens", "q_proj"]
    assert_same(
        ak.torch.create(model, "lora", rank=4, alpha=8, seed=3, targets=targets), pefts(model, target_modules=targets)
    )
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    fresh = ak.torch.create(net, "lora", rank=4, alpha=8, seed=3, targets=["0", "2"])
    assert_same(fresh.map(lambda leaf: leaf.reshape(*leaf.shape, 1, 1) if leaf.shape[1:] == (4,) else leaf),
                pefts(net, target_modules=["0", "2"]))  # fmt: skip
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    assert_same(
        ak.torch.create(gpt, "lora", rank=4, alpha=8, seed=3, targets="c_attn"), pefts(gpt, target_modules=["c_attn"])
    )


@pytest.mark.parametrize("kind", ["ipm", "kpm"])
def test_corda_begins_with_pefts_components(kind):
    model = llama()
    data = [row[None] for row in IDS]
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=kind),
    )  # fmt: skip
    changed = copy.deepcopy(model)
    preprocess_corda(changed, config, run_model=lambda: [changed(ids) for ids in data])
    reference = get_peft_model(changed, config).train()
    init = "corda" if kind == "ipm" else "corda_kpm"
    fresh = ak.torch.create(model, "lora", rank=4, alpha=8, targets=["q_proj", "down_proj"], init=init, data=data)
    assert model.training
    theirs = factors(reference)
    for target, update in fresh:
        if update.method == "lora":
            ours = update.B @ update.A
            torch.testing.assert_close(ours, theirs[target.path, "B"] @ theirs[target.path, "A"], rtol=1e-3, atol=1e-5)
    ak.torch.inject(model, fresh, trainable=True)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def test_eva_begins_with_the_principal_components_of_the_inputs():
    """PEFT finds them by a randomised method, which is far off where few are asked for; numpy's SVD is exact."""
    model, kept = llama().eval(), []
    data = [IDS[:4], IDS[4:]]
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in data:
            model(ids)
    hook.remove()
    X = torch.cat(kept).double().numpy()
    V = np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:3]
    fresh = ak.torch.create(
        model, "lora", rank=3, targets="re:.*layers.1.mlp.down_proj", init="eva", data=data, rho=1.0
    )
    ((_, update),) = fresh
    assert np.abs(np.abs((V * update.A.double().numpy()).sum(1)) - 1).max() < 1e-6


def test_eva_begins_with_pefts_components_and_ranks():
    model, rho = llama(), 2.0
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(0, 32, (16, 12)), "attention_mask": torch.ones(16, 12, dtype=torch.long)}
    batch["attention_mask"][3, :5] = 0
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig(rho=rho)
    )
    reference = get_peft_model(copy.deepcopy(model), config)
    initialize_lora_eva_weights(reference, [batch], show_progress_bar=False)
    fresh = ak.torch.create(model, "lora", rank=3, alpha=6, targets=targets, init="eva", data=[batch], rho=rho)
    expected, got = factors(reference), mine(fresh)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].shape == value.shape, key
        same = [(got[key] - sign * value).abs().amax(-1) for sign in (1, -1)]
        assert torch.minimum(*same).max() < 1e-3, key
    for target, update in fresh:
        assert update.scaling == pytest.approx(
            reference.get_submodule(f"base_model.model.{target.path}").scaling["default"]
        )


DROPPED = {
    "vera": (VeraConfig, {"r": 4, "vera_dropout": 0.3}),
    "hira": (HiraConfig, {"r": 4, "hira_dropout": 0.3}),
    "miss": (MissConfig, {"r": 4, "miss_dropout": 0.3}),
    "loha": (LoHaConfig, {"r": 4, "alpha": 8, "rank_dropout": 0.3}),
    "lokr": (LoKrConfig, {"r": 4, "alpha": 8, "rank_dropout": 0.3}),
    "lora": (LoraConfig, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3}),
    "oft": (OFTConfig, {"oft_block_size": 4, "r": 0, "module_dropout": 0.3, "use_cayley_neumann": False}),
    "boft": (BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 1, "boft_dropout": 0.3}),
    "adalora": (AdaLoraConfig, {"init_r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "total_step": 100}),
}


@pytest.mark.parametrize("method", DROPPED)
def test_dropout_of_other_methods_is_pefts(method, tmp_path):
    model = llama()
    kind, config = DROPPED[method]
    torch.manual_seed(3)
    reference = get_peft_model(copy.deepcopy(model), kind(target_modules=["q_proj", "up_proj"], **config)).train()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    reference.save_pretrained(tmp_path)
    told = {"dropout": 0.3} if method == "oft" else {}  # PEFT's files name it otherwise for each type.
    ak.torch.inject(model, ak.read(tmp_path), trainable=True, **told)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-4)


def test_peft_goes_on_with_the_dropout_of_an_adapter_that_was_created_here(tmp_path):
    model = llama()
    handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=4, dropout=0.3, seed=3), trainable=True)
    ak.write(handle.adapter(), tmp_path / "peft", format="peft")
    reference = PeftModel.from_pretrained(llama(), tmp_path / "peft", is_trainable=True).train()
    assert losses(model) == pytest.approx(losses(reference), rel=1e-5)


def test_dropout_acts_in_training_alone_and_where_it_can():
    model = llama().eval()
    fresh = ak.torch.create(model, "lora", rank=4, init="orthogonal", dropout=0.5)
    handle = ak.torch.inject(model, fresh, trainable=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    with ak.torch.route(model, ["default"] * 4 + [None] * 4):
        first, second = model(IDS).logits, model(IDS).logits
    assert not torch.equal(first[:4], second[:4]), "rows of a route are dropped too"
    assert torch.equal(first[4:], second[4:])
    trained = handle.adapter()
    handle.remove()
    ak.torch.inject(model, trained)
    assert torch.equal(model(IDS).logits, model(IDS).logits), "an adapter that is not trained has no dropout"
    with pytest.raises(UsageError, match="dropout must be"):
        ak.torch.create(llama(), "lora", dropout=1.0)
    with pytest.raises(Unsupported, match="no dropout"):
        ak.torch.create(llama(), "prompt", dropout=0.1)
    mha = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    with pytest.raises(Unsupported, match="runs its own forward on a changed weight"):
        ak.torch.inject(
            mha, ak.torch.create(mha, "lora", targets="a.in_proj_weight", rank=2), trainable=True, dropout=0.1
        )
    assert not ak.torch.handles(mha)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"init": "svd"}, "unknown initialiser"),
        ({"init": "orthogonal", "rank": 3}, "even rank"),
        ({"init": "eva"}, "needs data"),
        ({"data": [IDS]}, "does not use data"),
        ({"use_rslora": True}, "divides alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "below 1"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"init": "pissa", "method": "loha"}, "only one initialiser"),
        ({"rank_pattern": {"q_proj": 2}, "method": "vera"}, "one rank"),
        ({"layers": [0], "method": "prompt"}, "prompt does not use layers"),
        ({"init": "pissa", "targets": "embed_tokens"}, "linear layers"),
    ],
)  # fmt: skip
def test_arguments_that_contradict_each_other_are_refused(wrong, why):
    with pytest.raises(UsageError, match=why):
        ak.torch.create(llama(), wrong.pop("method", "lora"), **wrong)


def test_targets_that_are_left_out_must_be_there():
    with pytest.raises(TargetNotFound, match="no matching module"):
        ak.torch.create(llama(), "lora", exclude="q_prj")
    with pytest.raises(TargetNotFound, match="no target remains"):
        ak.torch.create(llama(), "lora", layers=[7])


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_groups_of_lora_plus_are_pefts(use_dora):
    model = llama()
    targets = ["q_proj", "up_proj", "embed_tokens"]
    fresh = ak.torch.create(model, "dora" if use_dora else "lora", rank=4, alpha=8, seed=3, targets=targets)
    reference = pefts(model, use_dora=use_dora, target_modules=targets)
    handle = ak.torch.inject(model, fresh, trainable=True)
    theirs = create_loraplus_optimizer(
        reference,
        torch.optim.AdamW,
        lr=0.01,
        loraplus_lr_ratio=8,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=1e-3,
    )
    groups = handle.parameter_groups(0.01, ratio=8, weight_decay=0.1, embedding_lr=1e-3)
    sizes = [(sorted(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in groups]
    assert sizes == [
        (sorted(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in theirs.param_groups if g["params"]
    ]
    got = losses(model, optimizer=torch.optim.AdamW(groups))
    assert got == pytest.approx(losses(reference, optimizer=theirs), rel=1e-5)
    model = llama()
    other = ak.torch.inject(model, ak.torch.create(model, "loha", rank=2), trainable=True)
    with pytest.raises(UsageError, match="needs a trained factor B"):
        other.parameter_groups(0.01)
