"""LoKr, AdaLoRA and what families of PEFT's say once for all modules: where PEFT is wrong, and what is refused."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoKrConfig
from peft.tuners.lokr.layer import factorization
from peft_cases import Layers
from peft_folders import contents, edit, merged, random, train
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Malformed, ShapeMismatch, Unrepresentable
from adapterkit.formats.peft.families import FAMILIES
from adapterkit.io.lazy import as_torch
from adapterkit.linalg.products import even_split
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""


@pytest.fixture
def trained(tmp_path):
    """What PEFT saves, in this test's folder."""
    return partial(train, tmp_path)


def test_sides_are_split_as_peft_splits_them():
    for size in (1, 2, 7, 12, 36, 64, 97, 128, 250, 768, 11008):
        for factor in (-1, 1, 2, 3, 4, 5, 7, 8, 16, 100, 20000):
            assert even_split(size, factor) == factorization(size, factor)


def test_whole_kernels_of_one_axis_mean_what_peft_trained(trained, tmp_path):
    """LyCORIS multiplies each place of the kernel by itself; PEFT takes w2 for a stack of matrices."""
    model, folder, base = trained(Layers, LoKrConfig(r=8, alpha=4, target_modules=["conv1"], init_weights=False))
    tensors = load_file(folder / "adapter_model.safetensors")
    w1, w2 = (tensors[f"base_model.model.conv1.lokr_{name}"] for name in ("w1", "w2"))
    W = model.conv1.weight
    right = W + 0.5 * torch.stack([torch.kron(w1, w2[..., k]) for k in range(w2.shape[2])], dim=2)
    wrong = W + 0.5 * torch.kron(w1, w2).reshape(W.shape)
    torch.testing.assert_close(merged(model, folder)["conv1.weight"], wrong)
    assert not torch.allclose(right, wrong, atol=0.05)
    for compat, expected in ((None, wrong), ("formula", right)):
        adapter = ak.read(folder, compat=compat, base=base)
        torch.testing.assert_close(W + adapter.delta("conv1", base), expected, rtol=1e-6, atol=1e-6)
        ak.write(adapter, tmp_path / f"again {compat}", "peft")
        assert contents(tmp_path / f"again {compat}") == contents(folder)


def test_a_kernel_of_one_axis_from_elsewhere_is_not_written_as_what_peft_takes_for_another(tmp_path):
    elsewhere = ak.Adapter({ak.Target("c"): (METHODS["lokr"](w1=random(2, 2), w2=random(2, 2, 3)),)})
    with pytest.raises(Unrepresentable):
        ak.write(elsewhere, tmp_path / "a", "peft")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"decompose_factor": 2}, "PEFT does not create these factors"),
        ({"decompose_both": True, "r": 1}, "PEFT does not create these factors"),
        ({"r": 2, "alpha": 6}, "does not create these factors with rank 2"),
        ({"rank_pattern": {"up": 3}}, "does not create these factors with rank 3"),
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
        with pytest.raises(Unrepresentable, match="no single pair of decompose_factor") as raised:
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


def test_a_pruned_adalora_without_alpha_is_what_was_trained_not_what_peft_loads(trained):
    """PEFT trains with init_r for the factor, and loads what is left of it with the rank that is left."""
    left = {f"block.{n}.q.lora_E": [True, False, True, False] for n in (0, 1)}
    config = AdaLoraConfig(
        init_r=4, total_step=9, lora_alpha=0, target_modules=["q"], rank_pattern=left, init_lora_weights=False
    )
    model, folder, _ = trained(Layers, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B, E = (tensors[f"base_model.model.block.1.q.lora_{name}"].double() for name in "ABE")
    assert E.shape == (2, 1)
    loaded = merged(model, folder)["block.1.q.weight"] - model.block[1]["q"].weight
    trained_with, loaded_with = ((alpha / 4.00001 * B @ (A * E)).float() for alpha in (4, 2))
    torch.testing.assert_close(ak.read(folder).delta("block.1.q"), trained_with)
    torch.testing.assert_close(loaded, loaded_with, rtol=1e-4, atol=1e-5)


def test_a_rank_pattern_of_another_length_is_refused(trained):
    config = {"init_r": 4, "total_step": 9, "target_modules": ["q"], "init_lora_weights": False}
    _, folder, _ = trained(Layers, AdaLoraConfig(**config))
    edit(folder, rank_pattern={"block.0.q.lora_E": [True] * 5})
    with pytest.raises(Malformed, match="5 entries, but init_r is 4"):
        ak.read(folder)
    edit(folder, rank_pattern={"block.0.q.lora_E": [True] * 3 + [False]})
    with pytest.raises(ShapeMismatch, match="the config states rank 3"):
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
    family = next(f for f in FAMILIES.values() if f.method is METHODS[method])
    scaling = next(
        s for s in (*(0.1 * np.sqrt(n) for n in range(1, 99)), -0.5)
        if family.inexact({ak.Target("a"): (METHODS[method](**given, scaling=float(s)),)})
    )  # fmt: skip
    adapter = ak.Adapter({ak.Target("a"): (METHODS[method](**given, scaling=float(scaling)),)})
    with pytest.raises(Unrepresentable, match="a: no alpha yields its exact scaling"):
        ak.write(adapter, tmp_path / "a", "peft")
    lines = ak.write(adapter, tmp_path / "a", "peft", on_loss="fold")
    assert lines == ["folded the scaling into a factor of a"]
    ((_, update),) = ak.read(tmp_path / "a")
    assert abs(update.scaling - 1) < 1e-4
    torch.testing.assert_close(as_torch(update.tensors[field]), (given[field].double() * scaling).float())


def test_miss_of_several_ranks_is_dropped_or_refused(tmp_path):
    miss = METHODS["miss"]
    adapter = ak.Adapter({
        ak.Target("a"): (miss(D=random(2, 4)),), ak.Target("b"): (miss(D=random(3, 4)),),
        ak.Target("c"): (miss(D=random(2, 5)),), ak.Target("d"): (miss(mini=random(2, 2)),),
    })  # fmt: skip
    with pytest.raises(Unrepresentable) as raised:
        ak.write(adapter, tmp_path / "a", "peft")
    why = "its rank or form differs from that of most miss updates, but the config has only one of each"
    assert sorted(raised.value.items) == [f"b: {why}", f"d: {why}"]
    ak.write(adapter, tmp_path / "a", "peft", on_loss="drop")
    assert {target.path for target, _ in ak.read(tmp_path / "a")} == {"a", "c"}


FOLDERS = sorted(
    path.parent for word in ("adalora*", "lokr*", "pvera", "randlora", "vera")
    for path in Path(__file__).parents[2].glob(f"spec/vectors/formats/peft/{word}/adapter_config.json")
)  # fmt: skip
SHAPES = [(0, 4), (4, 0), (1 << 61, 0), (3,), (), (1, 1), (2, 2, 2), (5, 7)]


def refuses(folder):
    try:
        ak.read(folder).validate()
    except AdapterkitError as error:
        return bool(error.where) and bool(error.cure)
    return False


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tensors_of_other_shapes_are_refused_by_name(folder, tmp_path):
    """Whatever shape a file says: read as something valid, or a typed error with a place and a cure."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    refused = 0
    for key, shape in itertools.product(tensors, SHAPES):
        save_file(tensors | {key: torch.zeros(shape)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        refused += refuses(tmp_path)
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
    with pytest.raises(Unrepresentable, match=f"a: its {method} has a tensor without elements"):
        ak.write(ak.Adapter({ak.Target("a"): (update,)}), tmp_path / "a", "peft")
