"""Laws of plain weights: positions that are not on their axes, sizes of another base, kernels, and 16 bits."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.core.updates import Additive
from adapterkit.errors import AdapterkitError, Malformed, ShapeMismatch
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

PLANAR = [name for name, cls in METHODS.items() if issubclass(cls, Additive) and cls.linear_only]
ONES = {"values": np.ones(2), "spectrum": np.ones(2)}


def update(method, index, **others):
    fields = {name: from_numpy(ONES[name]) for name in METHODS[method].tensor_fields() if name in ONES}
    return METHODS[method](index=from_numpy(np.array(index)), **fields, **others)


SIZED = {"outputs": 4, "inputs": 6}
SPARSE = [("shira", {}), ("fourierft", SIZED), ("waveft", SIZED)]


@pytest.fixture
def base(tmp_path):
    save_file({"q.weight": np.zeros((4, 6))}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize(("method", "others"), SPARSE)
@pytest.mark.parametrize("index", [[[0, 4], [0, 1]], [[0, 1], [0, 6]], [[0, -1], [0, 1]]])
def test_positions_outside_of_the_weight_are_refused_before_anything_is_computed(method, others, index, base):
    adapter = Adapter({Target("q"): (update(method, index, **others),)})
    with pytest.raises(ShapeMismatch, match=r"index: position .* is outside out=4 and in=6") as raised:
        adapter.bind(base)
    assert raised.value.where == f"q: {method}"


@pytest.mark.parametrize(("method", "others"), SPARSE)
def test_a_position_that_comes_twice_is_refused(method, others, base, tmp_path):
    adapter = Adapter({Target("q"): (update(method, [[1, 1], [2, 2]], **others),)})
    with pytest.raises(Malformed, match="the same position occurs twice"):
        adapter.check_values()
    with pytest.raises(Malformed, match="the same position occurs twice"):
        ak.merge(base, adapter, tmp_path / "out.safetensors")
    Adapter({Target("q"): (update(method, [[1, 2], [2, 1]], **others),)}).check_values()


@pytest.mark.parametrize(("index", "why"), [([0, 24], "position 24"), ([0, -3], "position -3"), ([5, 5], "twice")])
def test_positions_that_count_elements(index, why, base, tmp_path):
    adapter = Adapter({Target("q"): (update("supertuning", index),)})
    with pytest.raises(AdapterkitError, match=why) as raised:
        ak.merge(base, adapter, tmp_path / "out.safetensors")
    assert raised.value.where.startswith("q: supertuning")


def test_positions_in_what_targets_share():
    three, four = (from_numpy(np.array([[0, n]])) for n in (3, 4))
    for index, right in ((three, True), (four, False)):
        lora = METHODS["unilora"](
            theta=from_numpy(np.ones(4)), indices_A=index, scales_A=from_numpy(np.ones((1, 2))),
            indices_B=from_numpy(np.array([[0]])), scales_B=from_numpy(np.ones((1, 1))),
        )  # fmt: skip
        if right:
            lora.check_values()
        else:
            with pytest.raises(Malformed, match="position 4 is outside d=4"):
                lora.check_values()


@pytest.mark.parametrize("method", ["fourierft", "waveft"])
def test_a_transform_is_of_one_size_of_weight(method, base, tmp_path):
    save_file({"q.weight": np.zeros((6, 4))}, tmp_path / "other.safetensors")
    adapter = Adapter({Target("q"): (update(method, [[0, 1], [0, 1]], **SIZED),)})
    assert adapter.bind(base).updates.keys() == {Target("q")}
    turned = adapter.bind(tmp_path / "other.safetensors")
    assert turned.updates.keys() == {Target("q", "in out *k")}
    save_file({"q.weight": np.zeros((4, 5))}, tmp_path / "third.safetensors")
    with pytest.raises(ShapeMismatch, match="the update has out=4, in=6"):
        adapter.bind(tmp_path / "third.safetensors")
    for size in (0, -1):
        with pytest.raises(Malformed, match=f"outputs: {size} is below 1"):
            update(method, [[0, 1], [0, 1]], outputs=size, inputs=1 << 30).check()
    with pytest.raises(Malformed, match=r"outputs \* inputs <= 2 \*\* 34 does not hold with outputs=1073741824"):
        update(method, [[0, 1], [0, 1]], outputs=1 << 30, inputs=1 << 30).dims()


@pytest.mark.parametrize("method", PLANAR)
def test_convolutions_are_refused_by_name(method):
    fresh = ak.torch.create(nn.Sequential(nn.Linear(8, 8)), method, rank=2)
    convolution = nn.Sequential(nn.Conv1d(8, 8, 1))
    with pytest.raises(AdapterkitError) as raised:
        ak.torch.inject(convolution, fresh)
    assert f"0: {method}" in raised.value.where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", PLANAR)
def test_laws_hold_in_16_bits(method, dtype):
    torch.manual_seed(2)
    wide = nn.Sequential(nn.Linear(12, 8))
    fresh = ak.torch.create(wide, method, rank=4)
    moved = Adapter({target: tuple(map(shifted, updates)) for target, updates in fresh.updates.items()})
    narrow, x = nn.Sequential(nn.Linear(12, 8)).to(dtype), torch.randn(5, 12)
    narrow.load_state_dict(wide.state_dict())
    expected = wide[0].weight.detach() + moved.updates[Target("0")][0].delta((8, 12)) @ torch.eye(12)
    ak.torch.inject(narrow, moved)
    got = narrow(x.to(dtype)).float()
    plain = nn.functional.linear(x, expected, wide[0].bias).detach()
    torch.testing.assert_close(got, plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))
    assert narrow(x.to(dtype)).dtype == dtype


def shifted(update):
    """Off its initial value, where that is trained."""
    moved = {
        name: leaf + 0.1 * torch.randn(leaf.shape)
        for name, leaf in update.tensors.items()
        if leaf.is_floating_point() and name not in update.frozen
    }
    return update.replace(**moved)
