"""Formulas that look at the base: biases that see the weight, decompositions, blocks; and what starts from the base."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, UsageError
from adapterkit.methods import METHODS, _in_place

INITIAL = ["bdlora", "deft", "glora", "olora", "peanut", "pissa"]
"""Methods that change nothing before training."""


def moved(adapter):
    generator = torch.Generator().manual_seed(1)
    return adapter.map(lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=generator))


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 12)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("method", INITIAL)
def test_a_fresh_one_changes_nothing_and_training_reaches_every_leaf(method):
    model, x = model_of(torch.float32), torch.randn(32, 16)
    y = model(x)
    fresh = ak.torch.create(model, method, rank=4)
    handle = ak.torch.inject(model, fresh, trainable=True)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    leaves = dict(handle.named_parameters())
    assert len(leaves) == sum(len(update.tensors) for _, update in fresh)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves.values())


def test_kasa_begins_without_the_smallest_singular_values():
    model = model_of()
    ((_, update), *_) = ak.torch.create(model, "kasa", targets=["0"], rank=3)
    values = torch.linalg.svdvals(update.new_weight(model[0].weight))
    torch.testing.assert_close(values[:5], torch.linalg.svdvals(model[0].weight)[:5])
    assert values[5:].max() < 1e-12


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_bias_that_sees_the_weight_is_the_same_merged_folded_and_live(weight, tmp_path):
    model, x = model_of(), torch.randn(5, 16, dtype=torch.float64)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    adapter = moved(ak.torch.create(model, "glora", rank=2))
    handle = ak.torch.inject(model, adapter, weight=weight)
    live = model(x)
    ak.merge(tmp_path / "model.safetensors", adapter, tmp_path / "out", weights=[weight])
    assert ak.verify(tmp_path / "out", tmp_path / "model.safetensors", adapter, weights=[weight]).ok
    handle.merge_()
    torch.testing.assert_close(model(x), live, rtol=1e-10, atol=1e-10)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-12, atol=1e-12)


def test_two_updates_of_one_target_see_what_the_first_left(tmp_path):
    model, x = model_of(), torch.randn(5, 16, dtype=torch.float64)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    glora = moved(ak.torch.create(model, "glora", targets=["0"], rank=2))
    lora = METHODS["lora"](A=torch.randn(2, 16).double(), B=torch.randn(8, 2).double())
    both = Adapter({Target("0"): (lora, *glora.updates[Target("0")])})
    handle = ak.torch.inject(model, both)
    live = model(x)
    ak.merge(tmp_path / "model.safetensors", both, tmp_path / "out")
    handle.merge_()
    torch.testing.assert_close(model(x), live, rtol=1e-10, atol=1e-10)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-12, atol=1e-12)


def _dora_outputs(rows, width):
    leaves = {"A": torch.randn(2, width), "B": torch.randn(rows, 2), "magnitude": torch.rand(rows) + 0.5}
    return METHODS["dora_outputs"](**{name: leaf.double() for name, leaf in leaves.items()}, scaling=0.5)


def _lora(rows, width):
    return METHODS["lora"](A=torch.randn(2, width).double(), B=torch.randn(rows, 2).double(), scaling=0.7)


def _changed(W, b, updates):
    """The layer after the updates of one target, by the formulas; W is `[out, in]`."""
    for update in updates:
        change = update.B.numpy() @ update.A.numpy()
        if update.method == "lora":
            W = W + update.scaling * change
        else:
            factors = update.magnitude.numpy() / np.linalg.norm(W + change, axis=1)
            W, b = factors[:, None] * (W + update.scaling * change), factors * b
    return W, b


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("case", ["one", "often", "rows", "turned", "two layouts"])
def test_a_bias_sees_the_weight_as_the_updates_before_it_left_it(case, weight, tmp_path):
    torch.manual_seed(3)
    targets = {
        "one": {Target("p"): (_lora(8, 8), _dora_outputs(8, 8))},
        "often": {Target("p"): (_dora_outputs(8, 8), _lora(8, 8), _dora_outputs(8, 8), _lora(8, 8))},
        "rows": {Target("p"): (_lora(8, 8),), Target("p", rows=(2, 7)): (_dora_outputs(5, 8), _dora_outputs(5, 8))},
        "turned": {Target("p", "in out *k"): (_lora(8, 8), _dora_outputs(8, 8))},
        "two layouts": {Target("p", "in out *k"): (_lora(8, 8),), Target("p"): (_dora_outputs(8, 8),)},
    }[case]
    adapter = Adapter(targets)
    W, b = torch.randn(8, 8).double().numpy(), torch.randn(8).double().numpy()
    save_file({"p.weight": torch.from_numpy(W), "p.bias": torch.from_numpy(b)}, tmp_path / "model.safetensors")
    exact_W, exact_b = W.copy(), b.copy()
    for target, updates in adapter.updates.items():
        rows, turned = slice(*(target.rows or (0, 8))), target.layout.startswith("in")
        view = (exact_W.T if turned else exact_W)[rows]
        view[...], exact_b[rows] = _changed(view.copy(), exact_b[rows].copy(), updates)
    ak.merge(tmp_path / "model.safetensors", adapter, tmp_path / "out", weights=[weight])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(merged["p.weight"].numpy(), W + weight * (exact_W - W), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged["p.bias"].numpy(), b + weight * (exact_b - b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "vocab"), [(6, "keep"), (10, "grow")])
def test_a_bias_of_another_vocabulary_sees_the_weight_of_its_own_rows(rows, vocab, tmp_path):
    torch.manual_seed(5)
    names = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "lm_head.bias": (8,)}
    base = {name: torch.randn(shape).double() for name, shape in names.items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    config = '{"model_type": "llama", "tie_word_embeddings": false, "vocab_size": 8}'
    (tmp_path / "base" / "config.json").write_text(config)
    targets = {Target("lm_head"): (_lora(rows, 4), _dora_outputs(rows, 4))}
    if vocab == "grow":
        table = torch.cat([base["model.embed_tokens.weight"], torch.randn(2, 4).double()])
        targets[Target("model.embed_tokens")] = (METHODS["replacement"](weight=table),)
    ak.merge(tmp_path / "base", Adapter(targets), tmp_path / "out", vocab=vocab)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    known = min(rows, 8)
    W, b = (base[name].numpy() for name in ("lm_head.weight", "lm_head.bias"))
    padded = np.concatenate([W[:known], np.ones((rows - known, 4))]), np.concatenate([b[:known], np.ones(rows - known)])
    exact = _changed(*padded, targets[Target("lm_head")])
    for name, before, after in zip(("lm_head.weight", "lm_head.bias"), (W, b), exact, strict=True):
        np.testing.assert_allclose(merged[name][:known].numpy(), after[:known], rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(merged[name][rows:].numpy(), before[rows:])


def test_a_bias_of_experts_sees_the_weights_as_the_updates_before_it_left_them(tmp_path):
    torch.manual_seed(4)
    experts = [(_lora(8, 6), _dora_outputs(8, 6), _dora_outputs(8, 6)) for _ in range(3)]
    stacks = [
        type(first)(
            **{name: torch.stack([one.tensors[name] for one in (first, *others)]) for name in first.tensors},
            scaling=first.scaling,
        )
        for first, *others in zip(*experts, strict=True)
    ]
    W, b = torch.randn(3, 8, 6).double(), torch.randn(3, 8).double()
    save_file({"p.weight": W, "p.bias": b}, tmp_path / "model.safetensors")
    ak.merge(tmp_path / "model.safetensors", Adapter({Target("p", "e out *in"): tuple(stacks)}), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for expert, updates in enumerate(experts):
        exact_W, exact_b = _changed(W[expert].numpy(), b[expert].numpy(), updates)
        np.testing.assert_allclose(merged["p.weight"][expert].numpy(), exact_W, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged["p.bias"][expert].numpy(), exact_b, rtol=1e-12, atol=1e-12)


def test_glora_asks_for_the_weight():
    with pytest.raises(UsageError, match="depends on W"):
        METHODS["glora"](C=torch.ones(4)).new_bias(torch.ones(3))


@pytest.mark.parametrize("decompose", [_in_place.svd, _in_place.qr])
def test_a_decomposition_is_kept_until_its_weight_changes(decompose):
    W = nn.Parameter(torch.randn(6, 4))
    first = decompose(W)
    assert all(one is other for one, other in zip(decompose(W), first, strict=True))
    assert not any(part.requires_grad for part in first)
    with torch.no_grad():
        W.mul_(2)
    torch.testing.assert_close(product(decompose(W)), W.detach(), rtol=1e-5, atol=1e-5)
    W.data = W.data.bfloat16()
    assert {part.dtype for part in decompose(W)} == {torch.bfloat16}
    W.data = 3 * W.data.double()
    torch.testing.assert_close(product(decompose(W)), W.detach())
    array = decompose(W.detach().numpy())
    np.testing.assert_allclose(product(array), W.detach().numpy(), rtol=1e-4, atol=1e-5)


def product(parts):
    return (parts[0] * parts[1]) @ parts[2] if len(parts) == 3 else parts[0] @ parts[1]


@pytest.mark.parametrize("method", ["kasa", "olora", "pissa"])
def test_formulas_that_take_a_base_apart_do_not_write_to_it(method):
    model, x = model_of(torch.float32), torch.randn(4, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = ak.torch.inject(model, moved(ak.torch.create(model, method, rank=2)))
    one, other = model(x), model(x)
    assert torch.equal(one, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    handle.remove()


@pytest.mark.parametrize(("attributes", "fields"), [({}, "A B_blocks"), ({"A_blocks": 4}, "A_blocks B")])
def test_bdlora_is_made_with_blocks_of_either_factor(attributes, fields):
    adapter = ak.torch.create(model_of(), "bdlora", rank=4, **attributes)
    assert {" ".join(sorted(update.tensors)) for _, update in adapter} == {fields}
    with pytest.raises(ShapeMismatch, match="rank 5 cannot be divided"):
        ak.torch.create(model_of(), "bdlora", rank=5)


def test_bitfit_replaces_biases_alone():
    model = model_of()
    adapter = ak.torch.create(model, "replacement", weight=False)
    assert [list(update.tensors) for _, update in adapter] == [["bias"], ["bias"]]
    with pytest.raises(UsageError, match="none of the parameters to replace"):
        ak.torch.create(nn.Sequential(nn.Linear(2, 2, bias=False)), "replacement", weight=False)
