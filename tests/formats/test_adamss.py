"""AdaMSS against PEFT: the groups of rows that its file leaves out are found again, or refused with what is missing."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from peft import AdamssConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from torch import nn

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, Unsupported, UsageError
from adapterkit.formats.peft.families.adamss import k_means


def model_of():
    torch.manual_seed(4)
    return nn.ModuleDict({"a": nn.Linear(40, 64), "b": nn.Linear(20, 48, bias=False)}).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model, PEFT's folder, file of the base, an input of each layer, and PEFT's outputs for them."""
    folder, model = tmp_path_factory.mktemp("adamss"), model_of()
    config = AdamssConfig(r=8, num_subspaces=4, subspace_rank=2, random_seed=3, target_modules=["a", "b"])
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        inputs = {"a": torch.randn(5, 40), "b": torch.randn(2, 3, 20)}
        found = {name: wrapped.base_model.model[name](x) for name, x in inputs.items()}
    wrapped.save_pretrained(str(folder / "peft"))
    save_file(model.state_dict(), folder / "base.safetensors", {"format": "pt"})
    return model, folder, inputs, found


@torch.no_grad()
def test_peft_and_this_find_the_same_rows_again_whatever_the_seed_of_torch(made):
    model, folder, inputs, wanted = made
    torch.manual_seed(999)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder / "peft")).eval().base_model.model
    mine = copy.deepcopy(model)
    ak.torch.inject(mine, ak.read(folder / "peft", base=folder / "base.safetensors"))
    ak.merge(folder / "base.safetensors", folder / "peft", folder / "merged.safetensors", overwrite=True)
    merged = model_of()
    merged.load_state_dict(load_file(folder / "merged.safetensors"))
    for name, x in inputs.items():
        assert torch.equal(loaded[name](x), wanted[name])
        torch.testing.assert_close(mine[name](x), wanted[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged[name](x), wanted[name], rtol=1e-5, atol=1e-5)


def test_without_the_base_and_with_another_it_is_refused(made, tmp_path):
    model, folder, _, _ = made
    with pytest.raises(UsageError, match="the rows of each group depend on the base's weights") as raised:
        ak.read(folder / "peft")
    assert raised.value.cure == "Pass --base BASE (base=)"
    other = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(Unsupported, match=r"singular vectors.*differ by .* from those in the file.*on another base"):
        ak.read(folder / "peft", base=tmp_path / "other.safetensors")
    save_file({"a.weight": torch.randn(64, 50), "b.weight": torch.randn(48, 20)}, tmp_path / "wide.safetensors")
    with pytest.raises(ShapeMismatch, match="Use the base that"):
        ak.read(folder / "peft", base=tmp_path / "wide.safetensors")


def test_groups_of_other_sizes_than_the_files_are_refused(made, tmp_path):
    """The proof of what is found again: as many rows in each group as the file has."""
    _, folder, _, _ = made
    (tmp_path / "a").mkdir()
    tensors = load_file(folder / "peft" / "adapter_model.safetensors")
    stem = "base_model.model.b.adamss_B"
    tensors[f"{stem}.0"], tensors[f"{stem}.1"] = (
        tensors[f"{stem}.0"][1:],
        torch.cat([tensors[f"{stem}.1"], tensors[f"{stem}.0"][:1]]),
    )
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "a" / "adapter_config.json").write_text((folder / "peft" / "adapter_config.json").read_text())
    with pytest.raises(Unsupported, match=r"k-means of the base's singular vectors yields groups of .* the file has"):
        ak.read(tmp_path / "a", base=folder / "base.safetensors")


def test_a_base_in_16_bits_still_proves_the_file(made, tmp_path):
    """PEFT rounds the singular vectors to the base's type."""
    model, _, _, _ = made
    half = copy.deepcopy(model).to(torch.bfloat16)
    config = AdamssConfig(r=8, num_subspaces=4, random_seed=3, target_modules=["a", "b"], init_weights=None)
    get_peft_model(copy.deepcopy(half), config).save_pretrained(str(tmp_path / "peft"))
    save_file(half.state_dict(), tmp_path / "base.safetensors")
    adapter = ak.read(tmp_path / "peft", base=tmp_path / "base.safetensors")
    ak.write(adapter, tmp_path / "again", "peft", base=tmp_path / "base.safetensors")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


@pytest.mark.parametrize(("rows", "columns", "count"), [(20, 8, 5), (64, 40, 4), (300, 30, 10), (7, 3, 7), (9, 4, 1)])
def test_k_means_is_scikit_learns(rows, columns, count):
    points = np.linalg.qr(np.random.default_rng(rows).normal(size=(rows, columns)))[0].astype(np.float32)
    theirs = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    assert np.array_equal(k_means(points, count, 10, 123456789), theirs.fit_predict(points))


def test_k_means_of_ties_is_refused():
    """All rows of a square orthogonal matrix are equally far from each other: rounding alone decides."""
    square = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0].astype(np.float32)
    with pytest.raises(Unsupported, match="k-means depends on rounding"):
        k_means(square, 3, 10, 123456789)
