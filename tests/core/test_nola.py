"""NOLA: the generator that the spec defines, sums that are streamed, and files of the reference implementation."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, StorageError, Unrepresentable, Unsupported, UsageError
from adapterkit.formats import detect
from adapterkit.formats.nola import LARGEST
from adapterkit.io.lazy import as_array, from_numpy
from adapterkit.linalg import philox
from adapterkit.methods import METHODS

ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Counter, key and words: the known answers that the generator's authors publish."""


@pytest.mark.parametrize("array", [np.array, torch.tensor])
@pytest.mark.parametrize(("counter", "key", "words"), ANSWERS)
def test_the_generator_gives_its_authors_answers(array, counter, key, words):
    drawn = philox.philox(tuple(array([c]) for c in counter), tuple(array([k]) for k in key))
    assert " ".join(f"{int(word[0]):08x}" for word in drawn) == words


def test_numpy_and_torch_draw_the_same_bits():
    seeds = [0, 7, -1, 2**40 + 3, 2**63 - 1]
    for count in (1, 4, 9):
        one = philox.uniform(np.array(seeds), 1, 2, 5, count, np.float64)
        other = philox.uniform(torch.tensor(seeds), 1, 2, 5, count, torch.float64)
        assert one.shape == (3, 5, count)
        assert np.array_equal(one, other.numpy())
        assert np.array_equal(one.astype(np.float32), philox.uniform(np.array(seeds), 1, 2, 5, count, np.float32))


def test_the_numbers_are_even_and_of_no_other_seed_or_stream():
    drawn = philox.uniform(np.arange(4), 0, 0, 8, 2000, np.float64)
    assert -1 <= drawn.min() < -0.999
    assert 0.999 < drawn.max() < 1
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.var() - 1 / 3) < 0.01
    rows = np.concatenate(
        [drawn.reshape(32, -1), philox.uniform(np.arange(4), 1, 0, 8, 2000, np.float64).reshape(32, -1)]
    )
    assert np.abs(np.corrcoef(rows) - np.eye(64)).max() < 0.1


@pytest.mark.parametrize("size", [30, 1 << 16])
def test_sums_are_streamed_and_drawn_again_for_gradients(size, monkeypatch):
    largest, plain = [], philox.uniform

    def watched(*args):
        drawn = plain(*args)
        largest.append(math.prod(drawn.shape))
        return drawn

    seeds, n, count = torch.tensor([3, 5]), 40, 10
    whole = plain(seeds, 0, 0, n, count, torch.float64)
    monkeypatch.setattr(philox, "CHUNK", size)
    monkeypatch.setattr(philox, "uniform", watched)
    c = torch.randn(n, dtype=torch.float64, requires_grad=True)
    total = philox.combine(c, seeds, 0, count)
    torch.testing.assert_close(total, torch.einsum("n,nrc->rc", c, whole), rtol=1e-12, atol=1e-12)
    drawn = len(largest)
    weights = torch.randn(2, count, dtype=torch.float64)
    (total * weights).sum().backward()
    torch.testing.assert_close(c.grad, (whole * weights).sum((1, 2)), rtol=1e-12, atol=1e-12)
    assert max(largest) <= max(size, 2 * count)
    assert len(largest) == 2 * drawn


def test_a_fresh_one_is_trained_by_its_coefficients_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    x, goal = torch.randn(32, 16), torch.randn(32, 4)
    y, fresh = model(x), ak.torch.create(model, "nola", rank=3, beta=64)
    handle = ak.torch.inject(model, fresh, trainable=True)
    assert torch.equal(model(x), y), "before training nothing changes"
    assert {name.rpartition(".")[2] for name, _ in handle.named_parameters()} == {"alpha", "beta"}
    assert sum(p.numel() for p in handle.parameters()) == 2 * 2 * 64
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(x), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    seeds = [update.seeds.tolist() for _, update in fresh]
    assert [update.seeds.tolist() for _, update in handle.adapter()] == seeds
    assert seeds[0] != seeds[1]


class Reference(nn.Module):
    """One factor as the reference implementation computes it: bases drawn anew from a seed, by torch."""

    def __init__(self, in_features, out_features, bases):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.seed = nn.Parameter(torch.randint(int(1e10), (1,)), requires_grad=False)
        self.coefficients = nn.Parameter(torch.randn(bases))

    def matrix(self):
        torch.manual_seed(self.seed)
        bases = torch.zeros(len(self.coefficients), *self.weight.shape)
        nn.init.uniform_(bases, a=-1.0, b=1.0)
        return torch.einsum("b,boi->oi", self.coefficients, bases / math.sqrt(len(bases))) + self.weight


def checkpoint(prefix="transformer."):
    """Pairs by part, and the state dict of their parameters, of a GPT-2 of width 8 and rank 3."""
    torch.manual_seed(5)
    sizes = {"attn.nola_query": (8, 8), "attn.nola_value": (8, 8), "mlp.p1_nola": (8, 32), "mlp.p2_nola": (32, 8)}
    pairs = {
        f"h.{layer}.{part}": {"A": Reference(in_, 3, 5), "B": Reference(3, out, 4)}
        for layer in (0, 1)
        for part, (in_, out) in sizes.items()
    }
    state = {
        f"{prefix}{path}.lora_{factor}.{name}": tensor
        for path, pair in pairs.items()
        for factor, module in pair.items()
        for name, tensor in module.state_dict().items()
    }
    return pairs, state


def saved(folder, state, settings, wrapped=True):
    folder.mkdir(exist_ok=True)
    torch.save({"model_state_dict": state} if wrapped else state, folder / "model.5.pt")
    if settings is not None:
        (folder / "nola.json").write_text(json.dumps(settings))
    return folder / "model.5.pt"


CPU = {"alpha": 6, "device": "cpu"}


@pytest.mark.parametrize("prefix", ["transformer.", "module.transformer."])
def test_reads_files_of_the_reference_implementation(prefix, tmp_path):
    pairs, state = checkpoint(prefix)
    path = saved(tmp_path, state, CPU, wrapped=prefix == "transformer.")
    assert detect(path) == "nola"
    shapes = {"attn.c_attn": (8, 24), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}
    base = {f"transformer.h.{i}.{name}.weight": torch.randn(shape) for i in (0, 1) for name, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    adapter = ak.read(path)
    ak.merge(tmp_path / "base", adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    places = {
        "nola_query": ("c_attn", 0),
        "nola_value": ("c_attn", 16),
        "p1_nola": ("c_fc", 0),
        "p2_nola": ("c_proj", 0),
    }
    for name, pair in pairs.items():
        module, part = name.rsplit(".", 1)
        inner, first = places[part]
        change = 6 / 3 * pair["B"].matrix() @ pair["A"].matrix()
        base[f"transformer.{module}.{inner}.weight"][:, first : first + len(change)] += change.detach().T
    for name, expected in base.items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-5)
    ak.write(adapter, tmp_path / "native.safetensors")
    assert ak.read(tmp_path / "native.safetensors").digest() == adapter.digest()


def broken(change):
    _, state = checkpoint()
    change(state)
    return state


MANY = torch.ones(1).expand(LARGEST // 96 + 1)
FIRST = "transformer.h.0.attn.nola_query.lora_A."


@pytest.mark.parametrize(
    ("change", "error", "where"),
    [
        (lambda s: s.update({"transformer.wte.weight": torch.ones(2, 2)}), Malformed, "transformer.wte.weight"),
        (lambda s: s.pop(f"{FIRST}seed"), Malformed, "transformer.h.0.attn.nola_query"),
        (lambda s: s.update({f"{FIRST}seed": torch.tensor([1.5])}), ShapeMismatch, FIRST[:-1]),
        (lambda s: s.update({f"{FIRST}weight": torch.ones(3)}), ShapeMismatch, FIRST[:-1]),
        (lambda s: s.update({f"{FIRST}coefficients": torch.ones(5).half()}), Unsupported, FIRST[:-1]),
        (
            lambda s: s.update({f"{FIRST}coefficients": torch.ones(1).expand(LARGEST // 96 + 1)}),
            Unsupported,
            FIRST[:-1],
        ),
    ],
)
def test_refuses_files_that_are_not_quite_of_it(change, error, where, tmp_path):
    with pytest.raises(error) as raised:
        ak.read(saved(tmp_path, broken(change), CPU), format="nola")
    assert raised.value.where == where
    assert raised.value.path == str(tmp_path / "model.5.pt")


@pytest.mark.parametrize(
    ("settings", "error"),
    [(None, UsageError), ({"alpha": 6}, Malformed), ({"alpha": 6, "device": "tpu"}, Malformed), ([], Malformed)],
)
def test_asks_for_what_the_file_does_not_say(settings, error, tmp_path):
    path = saved(tmp_path, checkpoint()[1], settings)
    with pytest.raises(error, match=r'"device": "cuda" or "cpu"|not a JSON object'):
        ak.read(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_will_not_draw_on_the_cpu_what_a_gpu_drew(tmp_path):
    adapter = ak.read(saved(tmp_path, checkpoint()[1], CPU | {"device": "cuda"}))
    with pytest.raises(Unsupported, match="CUDA"):
        adapter.load()


@pytest.mark.parametrize("prefix", ["transformer.", "module.transformer."])
def test_is_written_with_the_seeds_that_it_was_read_with(prefix, tmp_path):
    _, state = checkpoint(prefix)
    ak.write(ak.read(saved(tmp_path, state, CPU)), tmp_path / "native.safetensors")
    ak.write(ak.read(tmp_path / "native.safetensors"), tmp_path / "out" / "model.5.pt", "nola")
    again = torch.load(tmp_path / "out" / "model.5.pt", weights_only=True)["model_state_dict"]
    assert list(again) == list(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    assert json.loads((tmp_path / "out" / "nola.json").read_text()) == CPU


def test_a_scaled_adapter_is_written_with_another_alpha(tmp_path):
    adapter = ak.read(saved(tmp_path, checkpoint()[1], CPU))
    scaled = adapter.replace(
        updates={target: (update.replace(scaling=0.5 * update.scaling),) for target, update in adapter}
    )
    ak.write(scaled, tmp_path / "out" / "half.pt", "nola")
    assert json.loads((tmp_path / "out" / "nola.json").read_text())["alpha"] == 3


def test_what_no_seed_says_is_refused(tmp_path):
    adapter = ak.read(saved(tmp_path, checkpoint()[1], CPU))
    with pytest.raises(Unrepresentable, match="seeds of torch's generator"):
        ak.write(adapter.replace(foreign=None), tmp_path / "x.pt", "nola")
    target, update = next(iter(adapter))
    other = update.replace(A_bases=from_numpy(as_array(update.A_bases) + 1))
    with pytest.raises(Unrepresentable, match="its random matrices differ"):
        ak.write(adapter.replace(updates={**adapter.updates, target: (other,)}), tmp_path / "x.pt", "nola")
    halved = update.replace(scaling=update.scaling / 2)
    with pytest.raises(Unrepresentable, match="more than one alpha"):
        ak.write(adapter.replace(updates={**adapter.updates, target: (halved,)}), tmp_path / "x.pt", "nola")
    assert not (tmp_path / "x.pt").exists()
    with pytest.raises(StorageError):
        ak.read(tmp_path / "nothing.pt", format="nola")


def test_without_coefficients_only_the_starts_are_left():
    A, B = torch.randn(2, 6), torch.randn(4, 2)
    empty = torch.zeros(0)
    update = METHODS["nola"](alpha=empty, beta=empty, seeds=torch.tensor([1, 2]), A0=A, B0=B)
    torch.testing.assert_close(update.delta((4, 6)), B @ A)


def test_a_name_of_a_safetensors_file_is_refused_before_anything_is_written(spec, tmp_path):
    adapter = ak.read(spec / "vectors" / "formats" / "nola" / "value" / "model.pt", "nola")
    with pytest.raises(UsageError, match="a dict 'model_state_dict'; safetensors files cannot store"):
        ak.write(adapter, tmp_path / "x.safetensors", "nola")
    assert not list(tmp_path.iterdir())
