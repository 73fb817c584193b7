"""Combinations against what mergekit made of the same changes, and against PEFT's own where it is right."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Unsupported, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.ops.context import FormulaContext
from adapterkit.ops.parameters import MERGEKIT, PEFT
from adapterkit.ops.recipes import recipe

FILE = Path(__file__).parents[1] / "data" / "mergekit.safetensors"
VECTORS = load_file(FILE)
with safe_open(FILE, "np") as opened:
    CASES = json.loads(opened.metadata()["cases"])
RANDOM = [name for name in CASES if name.endswith(" one")]


def adapter(t):
    A, B = (from_numpy(VECTORS[f"{name}.{t}"]) for name in "AB")
    return Adapter({Target("q"): (METHODS["lora"](A=A, B=B),)})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What the changes were added to, for methods that look at it."""
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_file({"q.weight": VECTORS["base"]}, path)
    return path


def combined(case, **more):
    """What the case's recipe makes of the same changes, in mergekit's own words."""
    models = [{"model": str(t), "parameters": {}} for t in case["of"]]
    shared = {}
    for key, value in case["parameters"].items():
        if isinstance(value, list):
            for model, one in zip(models, value, strict=True):
                model["parameters"][key] = one
        else:
            shared[key] = value
    found = recipe({"merge_method": case["method"], "models": models, "parameters": shared, "compat": "mergekit"})
    return ak.ops.combine([adapter(t) for t in case["of"]], **found.options, **more)


@pytest.mark.parametrize("name", [name for name in CASES if name not in RANDOM])
def test_mergekit_makes_the_same(name, base):
    expected = VECTORS[f"case.{name}"]
    made = combined(CASES[name], base=base).delta("q").numpy()
    assert np.abs(made - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", RANDOM)
def test_mergekit_scales_what_chance_left_to_the_norm_it_had(name):
    """Which entries mergekit dropped is in its result; what the rest is scaled by must be ours for the same mask."""
    from adapterkit.ops.combiners._entrywise import rescaled

    D, expected = VECTORS["delta.0"], VECTORS[f"case.{name}"]
    mask = np.abs(expected) > 1e-9
    assert 0 < mask.sum() < mask.size
    assert np.abs(rescaled(D, mask, 1.0, "norm") - expected).max() <= 1e-6 * np.abs(expected).max()
    ours = combined(CASES[name]).delta("q").numpy()
    kept = np.abs(ours) > 1e-9
    assert np.abs(np.abs(ours).sum() - np.abs(D).sum()) <= 1e-5 * np.abs(D).sum()
    assert np.abs(ours - rescaled(D, kept, 1.0, "norm")).max() <= 1e-6 * np.abs(ours).max()


IN, OUT, RANK = 24, 16, 4


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = torch.nn.Linear(IN, OUT), torch.nn.Linear(IN, OUT)

    def forward(self, x):
        return self.q(x) + self.v(x)


@pytest.fixture(scope="module")
def peft_model(tmp_path_factory):
    """A PEFT model with two trained-looking adapters, and their folders."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["q", "v"])
    model = peft.get_peft_model(Model(), config, adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=RANK, lora_alpha=10, target_modules=["q", "v"]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    return model, [folder / "one", folder / "two"]


def peft_delta(model, path):
    return getattr(model.base_model.model, path).get_delta_weight("made").detach().numpy()


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]])
@pytest.mark.parametrize(
    "kind", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd", "ties frequency"]
)
def test_peft_makes_the_same(peft_model, kind, weights):
    model, folders = peft_model
    kind, _, vote = kind.partition(" ")
    pruned = {} if kind in ("linear", "cat", "svd") else {"density": 0.4}
    votes = {"majority_sign_method": vote} if vote else {}
    model.add_weighted_adapter(["one", "two"], weights, "made", combination_type=kind, **pruned, **votes)
    try:
        more = {"sign": vote} if vote else {}
        made = ak.ops.combine(folders, kind, weights, compat="peft", **pruned, **more)
        for path in ("q", "v"):
            expected = peft_delta(model, path)
            assert np.abs(made.delta(path).numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
    finally:
        model.delete_adapter("made")


KINDS = ("linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")


@pytest.mark.parametrize("where", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rank", [None, 3])
def test_peft_makes_the_same_of_rslora(tmp_path, where, rank):
    """The result has the first adapter's config, and with it the root in its scaling: also where alpha is the rank."""
    torch.manual_seed(1)
    ranks = {"q": 6} if rank is None else {}
    settings = [
        {"r": RANK, "lora_alpha": 3 + n, "use_rslora": on, "rank_pattern": ranks, "target_modules": ["q", "v"]}
        for n, on in enumerate(where)
    ]
    model = peft.get_peft_model(Model(), peft.LoraConfig(**settings[0]), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**settings[1]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn_like(tensor))
    model.save_pretrained(tmp_path)
    folders = [tmp_path / "one", tmp_path / "two"]
    for kind in KINDS:
        # PEFT cannot combine A and B apart where ranks differ from module to module.
        if rank is not None and not kind.endswith("svd"):
            continue
        if ranks and kind in ("linear", "ties", "magnitude_prune"):
            continue
        for count in (1, 2):
            pruned = {"density": 0.4} if "ties" in kind or "prune" in kind else {}
            names, weights = ["one", "two"][:count], [0.7, -0.4][:count]
            if count == 1 and ranks:
                continue
            cut = {} if rank is None else {"svd_rank": rank}
            model.add_weighted_adapter(names, weights, "made", combination_type=kind, **cut, **pruned)
            ours = {} if rank is None or count == 1 else {"rank": rank}
            made = ak.ops.combine(
                folders[:count], kind, weights, compat="peft", **ours, **({} if count == 1 else pruned)
            )
            for path in ("q", "v"):
                expected = peft_delta(model, path)
                close = np.abs(made.delta(path).numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
                assert close, (kind, count, path)
            model.delete_adapter("made")


@pytest.mark.parametrize("where", [(True, False), (False, True), (True, True)])
def test_peft_makes_the_same_of_rslora_on_factors(tmp_path, where):
    torch.manual_seed(2)
    model = peft.get_peft_model(
        Model(),
        peft.LoraConfig(r=RANK, lora_alpha=3, use_rslora=where[0], target_modules=["q", "v"]),
        adapter_name="one",
    )
    model.add_adapter("two", peft.LoraConfig(r=RANK, lora_alpha=7, use_rslora=where[1], target_modules=["q", "v"]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn_like(tensor))
    model.save_pretrained(tmp_path)
    for kind in ("linear", "ties", "magnitude_prune"):
        pruned = {} if kind == "linear" else {"density": 0.4}
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "made", combination_type=kind, **pruned)
        made = ak.ops.combine([tmp_path / "one", tmp_path / "two"], kind, [0.7, -0.4], compat="peft", **pruned)
        for path in ("q", "v"):
            expected = peft_delta(model, path)
            assert np.abs(made.delta(path).numpy() - expected).max() <= 2e-5 * np.abs(expected).max(), kind
        model.delete_adapter("made")


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_peft_cuts_to_the_same_rank(peft_model, kind):
    model, folders = peft_model
    pruned = {} if kind == "svd" else {"density": 0.4}
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "made", combination_type=kind, svd_rank=2, **pruned)
    try:
        made = ak.ops.combine(folders, kind, [1.0, 0.5], compat="peft", rank=2, **pruned)
        assert made.updates[Target("q")][0].A.shape == (2, IN)
        expected = peft_delta(model, "q")
        assert np.abs(made.delta("q").numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
    finally:
        model.delete_adapter("made")


def test_peft_sums_products_that_are_nobodys(peft_model):
    _, folders = peft_model
    exact = sum(ak.read(folder).delta("q").numpy() for folder in folders)
    ours = ak.ops.combine(folders, "linear").delta("q").numpy()
    theirs = ak.ops.combine(folders, "linear", compat="peft").delta("q").numpy()
    assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()
    assert np.linalg.norm(theirs - exact) > 0.3 * np.linalg.norm(exact)


def drawn(kind, density):
    """What ours keeps at random, in the order in which PEFT asks: target by target, A of each adapter, then B."""
    parts = {"weight": (OUT, IN)} if kind.endswith("svd") else {"weight A": (RANK, IN), "weight B": (OUT, RANK)}
    for path in ("q", "v"):
        for part, shape in parts.items():
            at = FormulaContext(Target(path), (OUT, IN), (0, 1), part)
            yield from (torch.from_numpy(at.uniform(t, shape) < density).float() for t in (0, 1))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]])
@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_peft_makes_the_same_of_the_same_random_masks(peft_model, monkeypatch, kind, weights):
    model, folders = peft_model
    masks = drawn(kind, 0.6)
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
    model.add_weighted_adapter(["one", "two"], weights, "made", combination_type=kind, density=0.6)
    try:
        assert next(masks, None) is None
        made = ak.ops.combine(folders, kind, weights, compat="peft", density=0.6)
        for path in ("q", "v"):
            expected = peft_delta(model, path)
            assert np.abs(made.delta(path).numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
    finally:
        model.delete_adapter("made")


def test_a_peer_and_its_names_are_checked():
    with pytest.raises(Unsupported, match="compat 'kohya' is not a known library"):
        ak.ops.combine([adapter(0), adapter(1)], "ties", compat="kohya")
    with pytest.raises(UsageError, match="mergekit has no method 'knots'"):
        ak.ops.combine([adapter(0), adapter(1)], "knots", compat="mergekit")


def test_every_method_of_mergekit_is_compared():
    """Names by the registry of mergekit 0.1.5, which does not go together with this environment."""
    registered = (
        "arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear model_stock "
        "multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties"
    )
    assert set(MERGEKIT) == set(registered.split())
    assert {case["method"] for case in CASES.values()} == MERGEKIT.keys() - {"passthrough"}
    alone = ak.ops.combine([adapter(0)], "passthrough", [0.5], compat="mergekit").delta("q").numpy()
    assert np.abs(alone - 0.5 * VECTORS["delta.0"]).max() <= 1e-6


def test_every_combination_type_of_peft_is_known():
    import inspect
    import re

    from peft.tuners.lora.model import LoraModel

    said = "".join(re.findall(r"combination_type (?:==|in) (.*)", inspect.getsource(LoraModel)))
    assert set(re.findall(r'"(\w+)"', said)) == PEFT.keys()


@pytest.mark.parametrize("unselected", ["drop", "keep"])
def test_sce_merges_what_was_selected_or_all_by_the_weights_of_what_was(unselected):
    """The paper's formula, and that of the authors' code, in float64."""
    D = np.stack([VECTORS[f"delta.{t}"] for t in range(3)])
    spread = D.var(0)
    selected = D * (spread >= np.sort(spread.ravel())[-int(0.3 * spread.size)])
    w = (selected**2).mean((1, 2))[:, None, None] / (selected**2).mean((1, 2)).sum()
    merged = selected if unselected == "drop" else D
    agree = w * (np.sign(merged) == np.where(merged.sum(0) >= 0, 1, -1))
    expected = (agree * merged).sum(0) / np.where(agree.sum(0) == 0, 1, agree.sum(0))
    made = ak.ops.combine([adapter(t) for t in range(3)], "sce", select=0.3, unselected=unselected)
    assert np.abs(made.delta("q").numpy() - expected).max() <= 1e-6 * np.abs(expected).max()
