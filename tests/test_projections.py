"""Products and shared projections: what PEFT's files leave to the reader, where PEFT is wrong, fresh adapters."""

import copy
import itertools
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PveraConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lokr.layer import factorization
from peft_cases import Layers, gpt2
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Malformed, ShapeMismatch, Unrepresentable, Unsupported, UsageError
from adapterkit.methods import METHODS
from adapterkit.tensors.lazy import as_torch
from adapterkit.tensors.products import even_split

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""


@pytest.fixture
def trained(tmp_path):
    """What PEFT saves of a model with a config, its trained values moved: (plain model, folder, file of the base)."""

    def make(build, config, name="peft"):
        torch.manual_seed(3)
        model = build().eval()
        wrapped = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        wrapped.save_pretrained(str(tmp_path / name))
        save_file(model.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
        return model, tmp_path / name, tmp_path / "base.safetensors"

    return make


def merged(model, folder):
    """The weights that PEFT merges a folder to."""
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload().state_dict()


def edit(folder, **changes):
    """Changes fields of a folder's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sides_are_split_as_peft_splits_them():
    for size in (1, 2, 7, 12, 36, 64, 97, 128, 250, 768, 11008):
        for factor in (-1, 1, 2, 3, 4, 5, 7, 8, 16, 100, 20000):
            assert even_split(size, factor) == factorization(size, factor)


def test_peft_scrambles_whole_kernels_of_one_axis(trained):
    """LyCORIS multiplies each place of the kernel by itself; PEFT takes a matrix for a stack of kernels."""
    model, folder, base = trained(Layers, LoKrConfig(r=8, alpha=4, target_modules=["conv1"], init_weights=False))
    tensors = load_file(folder / "adapter_model.safetensors")
    w1, w2 = (tensors[f"base_model.model.conv1.lokr_{name}"] for name in ("w1", "w2"))
    W = model.conv1.weight
    right = W + 0.5 * torch.stack([torch.kron(w1, w2[..., k]) for k in range(w2.shape[2])], dim=2)
    wrong = W + 0.5 * torch.kron(w1, w2).reshape(W.shape)
    torch.testing.assert_close(merged(model, folder)["conv1.weight"], wrong)
    assert not torch.allclose(right, wrong, atol=0.05)
    for compat, expected in ((None, right), ("peft", wrong)):
        got = W + ak.read(folder, compat=compat).delta("conv1", base)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"decompose_factor": 2}, "factors that PEFT does not make"),
        ({"decompose_both": True, "r": 1}, "factors that PEFT does not make"),
        ({"r": 2, "alpha": 6}, "does not make with rank 2"),
        ({"rank_pattern": {"up": 3}}, "does not make with rank 3"),
    ],
)
def test_a_config_that_makes_other_factors_is_not_of_the_file(changes, why, trained):
    _, folder, base = trained(Layers, LoKrConfig(r=1, alpha=3, target_modules=["q", "up"], decompose_factor=4))
    assert ak.read(folder, base=base)
    edit(folder, **changes)
    with pytest.raises(ShapeMismatch, match=why):
        ak.read(folder, base=base)


def lokr(a, b, c, d, **options):
    return METHODS["lokr"](w1=random(a, c), w2=random(b, d, seed=1), **options)


def test_factors_that_no_config_makes_are_not_written(tmp_path):
    for odd in (lokr(8, 2, 4, 4), lokr(2, 8, 4, 2, scaling=2.0)):
        with pytest.raises(Unrepresentable, match="by any decompose_factor") as raised:
            ak.write(ak.Adapter({ak.Target("a"): (odd,)}), tmp_path / "a", "peft")
        assert [item.partition(":")[0] for item in raised.value.items] == ["a"]
    fine = ak.Adapter({ak.Target("a"): (lokr(4, 4, 4, 8),), ak.Target("b"): (lokr(4, 5, 4, 6),)})
    ak.write(fine, tmp_path / "a", "peft")
    assert ak.read(tmp_path / "a").digest() == fine.digest()


@pytest.mark.parametrize("kind", ["whole", "linear", "kernel", "core"])
def test_lokr_made_elsewhere_is_what_peft_loads(kind, tmp_path):
    """Factors below half of the larger side, split by a number that divides neither side of one of the weights."""
    model = nn.ModuleDict({"a": nn.Linear(36, 8), "c": nn.Conv2d(36, 8, 3)}).eval()
    save_file(model.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    w1 = random(2, 4)
    second = {
        "whole": {"w2": random(4, 9)},
        "linear": {"w2_a": random(4, 1), "w2_b": random(1, 9)},
        "kernel": {"w2_a": random(4, 1), "w2_b": random(1, 81)},
        "core": {"w2_a": random(4, 1), "t2": random(1, 1, 3, 3), "w2_in": random(1, 9)},
    }[kind]
    path = "a" if kind in ("whole", "linear") else "c"
    adapter = ak.Adapter({ak.Target(path): (METHODS["lokr"](w1=w1, **second, scaling=0.75),)})
    ak.write(adapter, tmp_path / "a", "peft", base=tmp_path / "base.safetensors")
    W = model[path].weight.detach()
    expected = adapter.delta(path, base=tmp_path / "base.safetensors")
    torch.testing.assert_close(merged(model, tmp_path / "a")[f"{path}.weight"] - W, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [Layers, gpt2])
@pytest.mark.parametrize(("kind", "r"), [(VeraConfig, 5), (PveraConfig, 3)])
def test_projections_are_drawn_again_bit_by_bit(kind, r, build, trained, tmp_path):
    targets = ["q", "up", "head.1"] if build is Layers else ["c_attn", "mlp.c_proj"]
    seed = {"projection_prng_key": 1234567890123}
    model, folder, base = trained(build, kind(r=r, target_modules=targets, save_projection=False, **seed))
    held = get_peft_model(copy.deepcopy(model), kind(r=r, target_modules=targets, **seed)).base_model
    adapter = ak.read(folder, base=base)
    word = "vera" if kind is VeraConfig else "pvera"
    for name in "AB":
        leaves = {id(update.tensors[name]): update.tensors[name] for _, update in adapter}
        assert len(leaves) == 1, "one tensor for all"
        assert torch.equal(as_torch(next(iter(leaves.values()))), getattr(held, f"{word}_{name}")["default"])
    expected = merged(model, folder)
    ak.merge(base, adapter, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "base.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    ak.write(adapter, tmp_path / "whole", "peft", base=base)
    assert ak.read(tmp_path / "whole").digest() == adapter.digest()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(model, tmp_path / "whole").items())


def test_what_only_the_base_tells_is_asked_for(trained, tmp_path):
    _, folder, _ = trained(Layers, VeraConfig(r=5, target_modules=["q", "up"], save_projection=False))
    with pytest.raises(UsageError, match=r"known to the base only.*Pass base=") as raised:
        ak.read(folder)
    assert raised.value.where == "block.0.q"
    names = [f"block.{n}.{module}.weight" for n in (0, 1) for module in ("q", "up")]
    save_file({name: torch.zeros(3, 3) for name in names}, tmp_path / "b.safetensors")
    with pytest.raises(ShapeMismatch, match="made for 8 outputs; the base has"):
        ak.read(folder, base=tmp_path / "b.safetensors")
    edit(folder, save_projection=True)
    with pytest.raises(Malformed, match="says that the file holds the projections, and it does not: vera_A"):
        ak.read(folder)


def test_projections_beside_a_config_without_are_refused(trained):
    """PEFT would draw its own, whatever is in the file."""
    _, folder, base = trained(Layers, VeraConfig(r=5, target_modules=["q", "up"]))
    edit(folder, save_projection=False)
    with pytest.raises(Malformed, match="does not hold the projections, and it does"):
        ak.read(folder, base=base)
    edit(folder, save_projection=True, r=4)
    with pytest.raises(ShapeMismatch, match="the config says rank 4"):
        ak.read(folder, base=base)


def test_drawing_at_inference_is_no_law(trained):
    _, folder, _ = trained(Layers, PveraConfig(r=2, target_modules=["q"], sample_at_inference=True))
    with pytest.raises(Unsupported, match="draws at random"):
        ak.read(folder)


def test_projections_that_peft_would_make_smaller_are_not_written(trained, tmp_path):
    _, folder, base = trained(Layers, VeraConfig(r=5, target_modules=["q", "up"]))
    adapter = ak.read(folder)
    small = adapter.replace(updates={t: u for t, u in adapter.updates.items() if t.path.endswith("q")})
    with pytest.raises(Unrepresentable, match="larger than the largest of these weights"):
        ak.write(small, tmp_path / "a", "peft")
    other = {t: tuple(u.replace(A=random(5, 8), B=random(12, 5)) for u in us) for t, us in small.updates.items()}
    with pytest.raises(Unrepresentable, match="shares one tensor over its modules"):
        ak.write(adapter.replace(updates={**adapter.updates, **other}), tmp_path / "a", "peft", base=base)


def test_bases_of_randlora_are_in_the_file_once_for_all(trained, tmp_path):
    _, folder, _ = trained(Layers, RandLoraConfig(r=3, target_modules=["q", "up"]))
    adapter = ak.read(folder)
    assert len({id(update.B) for _, update in adapter}) == 1
    ak.write(adapter, tmp_path / "a.safetensors")
    copies = sum(name.endswith(".B") for name in load_file(tmp_path / "a.safetensors"))
    assert (copies, sum(k.endswith("randlora_B") for k in load_file(folder / "adapter_model.safetensors"))) == (1, 5)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.block.1.up.randlora_B"] += 1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(Malformed, match="is not the same as") as raised:
        ak.read(folder)
    assert raised.value.where == "base_model.model.block.1.up.randlora_B"
    _, folder, _ = trained(Layers, RandLoraConfig(r=3, target_modules=["q"], save_projection=False), "without")
    with pytest.raises(Unsupported, match="whichever half precision"):
        ak.read(folder)


def test_peft_loads_a_pruned_adalora_without_alpha_with_another_factor(trained):
    """It trains with init_r for the factor, and loads what is left of it with the rank that is left."""
    left = {f"block.{n}.q.lora_E": [True, False, True, False] for n in (0, 1)}
    config = AdaLoraConfig(
        init_r=4, total_step=9, lora_alpha=0, target_modules=["q"], rank_pattern=left, init_lora_weights=False
    )
    model, folder, _ = trained(Layers, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B, E = (tensors[f"base_model.model.block.1.q.lora_{name}"].double() for name in "ABE")
    assert E.shape == (2, 1)
    loaded = merged(model, folder)["block.1.q.weight"] - model.block[1]["q"].weight
    for compat, alpha in ((None, 4), ("peft", 2)):
        expected = (alpha / 4.00001 * B @ (A * E)).float()
        torch.testing.assert_close(ak.read(folder, compat=compat).delta("block.1.q"), expected)
        assert torch.allclose(loaded, expected, rtol=1e-4, atol=1e-5) == (compat == "peft")


def test_a_rank_pattern_of_another_length_is_refused(trained):
    config = {"init_r": 4, "total_step": 9, "target_modules": ["q"], "init_lora_weights": False}
    _, folder, _ = trained(Layers, AdaLoraConfig(**config))
    edit(folder, rank_pattern={"block.0.q.lora_E": [True] * 5})
    with pytest.raises(Malformed, match="5 entries where init_r is 4"):
        ak.read(folder)
    edit(folder, rank_pattern={"block.0.q.lora_E": [True] * 3 + [False]})
    with pytest.raises(ShapeMismatch, match="the config says rank 3"):
        ak.read(folder)


@pytest.mark.parametrize(
    ("method", "leaves", "field"),
    [
        ("loha", {"w1_a": (4, 3), "w1_b": (3, 6), "w2_a": (4, 3), "w2_b": (3, 6)}, "w1_a"),
        ("lokr", {"w1_a": (8, 3), "w1_b": (3, 8), "w2_a": (8, 3), "w2_b": (3, 8)}, "w1_a"),
        ("lokr", {"w1": (4, 4), "w2": (5, 6)}, "w1"),
        ("randlora", {"B": (6, 2, 3), "lam": (3, 2), "A": (3, 1, 4), "gamma": (2, 4)}, "lam"),
        ("adalora", {"A": (3, 6), "B": (4, 3), "E": (3,)}, "E"),
    ],
)
def test_scalings_that_no_alpha_gives_are_folded_if_allowed(method, leaves, field, tmp_path):
    given = {name: random(*shape, seed=len(name)) for name, shape in leaves.items()}
    family = next(f for f in families() if f.method is METHODS[method])
    scaling = next(
        s for s in (*(0.1 * np.sqrt(n) for n in range(1, 99)), -0.5)
        if family.inexact({ak.Target("a"): (METHODS[method](**given, scaling=float(s)),)})
    )  # fmt: skip
    adapter = ak.Adapter({ak.Target("a"): (METHODS[method](**given, scaling=float(scaling)),)})
    with pytest.raises(Unrepresentable, match="a: no alpha gives its scaling exactly"):
        ak.write(adapter, tmp_path / "a", "peft")
    lines = ak.write(adapter, tmp_path / "a", "peft", on_loss="fold")
    assert lines == ["folded the scaling into a factor of a"]
    ((_, update),) = ak.read(tmp_path / "a")
    assert abs(update.scaling - 1) < 1e-4
    torch.testing.assert_close(as_torch(update.tensors[field]), (given[field].double() * scaling).float())


def families():
    from adapterkit.formats.peft.families import FAMILIES

    return FAMILIES.values()


def test_miss_of_several_ranks_is_dropped_or_refused(tmp_path):
    miss = METHODS["miss"]
    adapter = ak.Adapter({
        ak.Target("a"): (miss(D=random(2, 4)),), ak.Target("b"): (miss(D=random(3, 4)),),
        ak.Target("c"): (miss(D=random(2, 5)),), ak.Target("d"): (miss(mini=random(2, 2)),),
    })  # fmt: skip
    with pytest.raises(Unrepresentable) as raised:
        ak.write(adapter, tmp_path / "a", "peft")
    why = "miss of another rank or form than the others: the config has one for all"
    assert sorted(raised.value.items) == [f"b: {why}", f"d: {why}"]
    ak.write(adapter, tmp_path / "a", "peft", on_loss="drop")
    assert {target.path for target, _ in ak.read(tmp_path / "a")} == {"a", "c"}


@pytest.mark.parametrize("form", ["{}_lora_latent_mapping.weight", "{}.default_lora_latent_mapping.weight"])
def test_lora_xs_as_its_authors_save_it(form, trained, tmp_path):
    """No PEFT has the law: float64 numpy has."""
    _, folder, base = trained(Layers, LoraConfig(r=3, lora_alpha=5, target_modules=["q", "up"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = {key.partition(".lora_A")[0] for key in tensors if "lora_A" in key}
    tensors |= {form.format(path): random(3, 3, seed=len(path)) for path in paths}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    adapter = ak.read(folder)
    assert {update.method for _, update in adapter} == {"lora_xs"}
    for path in paths:
        A, B = (tensors[f"{path}.lora_{name}.weight"].double().numpy() for name in "AB")
        R = tensors[form.format(path)].double().numpy()
        expected = 5 / 3 * np.einsum("op,pq,qi->oi", B, R, A)
        got = adapter.delta(path.removeprefix("base_model.model."), base).double().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(Unrepresentable, match="lora_xs is not among the methods"):
        ak.write(adapter, tmp_path / "b", "peft")


FRESH = ["adalora", "loha", "lokr", "lora_xs", "miss", "pvera", "randlora", "vera"]
MODULES = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 8)), (16, 12)),
    "conv": (lambda: nn.Sequential(nn.Conv1d(12, 6, 3)), (4, 12, 7)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("method", FRESH)
def test_a_fresh_adapter_changes_nothing_and_learns(method, kind):
    """Every tensor that is trained has a gradient once the first step has been made, and the loss falls."""
    if kind == "conv" and method in ("miss", "pvera", "randlora", "vera"):
        return
    torch.manual_seed(0)
    build, shape = MODULES[kind]
    model = build().double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    goal = y + torch.randn_like(y)
    adapter = ak.torch.create(model, method, targets=type(model[0]), rank=2, seed=5)
    handle = ak.torch.inject(model, adapter, trainable=True)
    assert torch.equal(model(x), y)
    frozen = METHODS[method].frozen
    trained = {n: p for n, p in handle.named_parameters() if n.rpartition(".")[2] not in frozen}
    optimizer = torch.optim.Adam(trained.values(), lr=0.05)
    losses, reached = [], set()
    for _ in range(25):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), goal)
        loss.backward()
        reached |= {name for name, parameter in trained.items() if bool(parameter.grad.any())}
        optimizer.step()
        losses.append(loss.item())
    assert reached == set(trained)
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("method", ["pvera", "randlora", "vera"])
def test_fresh_adapters_share_their_projections(method, tmp_path):
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 9), nn.Linear(9, 9))
    adapter = ak.torch.create(model, method, rank=2)
    for name in METHODS[method].frozen:
        assert len({id(update.tensors[name]) for _, update in adapter}) == 1
    save_file(model.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    moved = adapter.replace(
        updates={
            target: tuple(
                u.replace(**{n: t + random(*t.shape) for n, t in u.tensors.items() if n not in u.frozen}) for u in us
            )
            for target, us in adapter.updates.items()
        }
    )
    ak.write(moved, tmp_path / "a", "peft", base=tmp_path / "base.safetensors")
    expected = merged(model.eval(), tmp_path / "a")
    for target in moved.updates:
        W = model[int(target.path)].weight.detach()
        got = moved.delta(target.path, tmp_path / "base.safetensors")
        torch.testing.assert_close(W + got, expected[f"{target.path}.weight"], rtol=1e-5, atol=1e-6)


def test_a_drawn_projection_costs_no_more_than_the_file_says(trained):
    """The rank is that of a tensor in the file, so a config cannot ask for more memory than that."""
    _, folder, base = trained(Layers, VeraConfig(r=5, target_modules=["q"], save_projection=False))
    edit(folder, r=1 << 30)
    with pytest.raises(ShapeMismatch, match="the config says rank"):
        ak.read(folder, base=base)


FOLDERS = sorted(
    path.parent for word in ("adalora*", "lokr*", "pvera", "randlora", "vera")
    for path in Path(__file__).parent.parent.glob(f"spec/vectors/formats/peft/{word}/adapter_config.json")
)  # fmt: skip
SHAPES = [(0, 4), (4, 0), (1 << 61, 0), (3,), (), (1, 1), (2, 2, 2), (5, 7)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tensors_of_other_shapes_are_refused_by_name(folder, tmp_path):
    """Whatever shape a file says: read as something valid, or a typed error with a place and a cure."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    refused = 0
    for key, shape in itertools.product(tensors, SHAPES):
        save_file(tensors | {key: torch.zeros(shape)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        try:
            ak.read(tmp_path).validate()
        except AdapterkitError as error:
            assert error.where and error.cure
            refused += 1
    assert refused > len(tensors) * len(SHAPES) / 2


@pytest.mark.parametrize(
    ("method", "leaves"),
    [
        ("lokr", {"w1_a": (2, 0), "w1_b": (0, 2), "w2": (2, 3)}),
        ("loha", {"w1_a": (4, 0), "w1_b": (0, 6), "w2_a": (4, 0), "w2_b": (0, 6)}),
        ("randlora", {"B": (6, 2, 0), "lam": (0, 2), "A": (0, 1, 4), "gamma": (2, 4)}),
        ("vera", {"A": (0, 6), "B": (4, 0), "b": (4,), "d": (0,)}),
    ],
)
def test_what_has_no_elements_is_not_written(method, leaves, tmp_path):
    update = METHODS[method](**{name: torch.zeros(shape) for name, shape in leaves.items()})
    with pytest.raises(Unrepresentable, match=f"a: {method} of a tensor without elements"):
        ak.write(ak.Adapter({ak.Target("a"): (update,)}), tmp_path / "a", "peft")
