"""What PEFT leaves out of its files and draws again, what its numbers get wrong, and what is refused."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import C3AConfig, PeftModel, WaveFTConfig, get_peft_model
from peft.tuners.waveft.wavelet import Wavelet
from peft_cases import Layers
from peft_cases.fourierft import fourierft
from peft_cases.unilora import unilora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Malformed, ShapeMismatch, Unrepresentable, Unsupported, UsageError
from adapterkit.formats.peft.families._weights import ORDERS, in_order
from adapterkit.formats.peft.families.spectra import FAULTY, FILTERS
from adapterkit.io.lazy import as_lazy, from_numpy
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)
    model = Layers()
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def saved(config, base, folder):
    """A folder of PEFT's, and the weights that PEFT merges it to."""
    model = Layers()
    model.load_state_dict(load_file(base))
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    wrapped.save_pretrained(str(folder))
    return folder, wrapped.merge_and_unload().state_dict()


def rewritten(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def moments(taps, count):
    """How far the high-pass filter of these taps is from annihilating polynomials, up to a degree."""
    t = np.linspace(-1, 1, len(taps))
    high = np.array(taps)[::-1] * (-1.0) ** np.arange(len(taps))
    return max(abs(float(high @ t**power)) for power in range(count))


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_orthonormal_and_have_their_vanishing_moments(name):
    taps, order = np.array(FILTERS[name]), int(name.lstrip("dbsymcoif"))
    overlaps = [float(taps[shift:] @ taps[: len(taps) - shift]) for shift in range(0, len(taps), 2)]
    fault = max(abs(overlaps[0] - 1), *map(abs, overlaps[1:]), abs(taps.sum() - 2**0.5), 0)
    vanishing = 2 * order if name.startswith("coif") else order
    assert len(taps) == (6 if name.startswith("coif") else 2) * order
    if name == FAULTY:
        assert fault > 1e-2, "PEFT's numbers of coif4 are no wavelet's"
    else:
        assert fault < 1e-11
        assert moments(taps, vanishing) < 1e-11


def test_the_filter_that_is_no_wavelets_is_read_as_what_peft_trained_with(base, tmp_path):
    config = WaveFTConfig(n_frequency=20, wavelet_family=FAULTY, target_modules=["up"], init_weights=False)
    folder, expected = saved(config, base[1], tmp_path / "a")
    adapter = ak.read(folder, base=base[1])
    ak.merge(base[1], adapter, tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-6, atol=1e-6)
    formula = ak.read(folder, base=base[1], compat="formula")
    (taps,) = {tuple(update.low_pass.numpy().tolist()) for _, update in formula}
    assert moments(np.array(taps), 8) < 1e-9
    for number, read in enumerate((adapter, formula)):
        ak.write(read, tmp_path / f"again {number}", "peft", base=base[1])
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / f"again {number}" / name).read_bytes() == (folder / name).read_bytes()


def test_wavelets_that_peft_itself_cannot_compute_are_refused(base, tmp_path):
    """Of coif5 PEFT has 48 taps where the wavelet has 30, and of db11 none."""
    assert len(Wavelet("coif5").rec_lo) == 48
    config = WaveFTConfig(n_frequency=20, target_modules=["up"])
    folder, _ = saved(config, base[1], tmp_path / "a")
    for name in ("coif5", "db11"):
        with pytest.raises(Unsupported, match=name) as raised:
            ak.read(rewritten(folder, wavelet_family=name), base=base[1])
        assert raised.value.where == "wavelet_family"
        assert "sym10" in raised.value.cure


def test_the_order_of_modules_of_any_model_is_that_of_a_torch_file_of_it(tmp_path):
    """Uni-LoRA without its positions draws them in the order of the modules, which no table has of this model."""
    torch.manual_seed(3)
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("z", "a", "m")}).eval()
    wrapped = get_peft_model(copy.deepcopy(model), unilora(target_modules=["z", "a", "m"])).eval()
    wrapped.save_pretrained(str(tmp_path / "a"))
    torch.save(model.state_dict(), tmp_path / "base.bin")
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(Unsupported, match="order of the modules") as raised:
        ak.read(tmp_path / "a", base=tmp_path / "base.safetensors")
    assert "--base model.bin" in raised.value.cure
    ak.torch.inject(model, ak.read(tmp_path / "a", base=tmp_path / "base.bin"))
    x = torch.randn(3, 6)
    for name, layer in model.items():
        torch.testing.assert_close(layer(x), wrapped.base_model.model[name](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [fourierft(target_modules=["q"]), WaveFTConfig(n_frequency=9, target_modules=["q"])])
def test_positions_that_are_drawn_again_need_the_base(config, base, tmp_path):
    folder, _ = saved(config, base[1], tmp_path / "a")
    with pytest.raises(UsageError, match="positions depend on the size") as raised:
        ak.read(folder)
    assert raised.value.cure == "Pass --base BASE (base=)"
    adapter = ak.read(folder, base=base[1])
    ak.write(adapter, tmp_path / "native.safetensors")
    alone = ak.read(tmp_path / "native.safetensors")
    assert alone.digest() == adapter.digest(), "the native form holds the positions"
    torch.testing.assert_close(alone.delta("block.0.q"), adapter.delta("block.0.q", base=base[1]))


def test_positions_that_no_seed_draws_are_not_written(base, tmp_path):
    folder, _ = saved(fourierft(target_modules=["q"]), base[1], tmp_path / "a")
    adapter = ak.read(folder, base=base[1])
    moved = {
        target: tuple(update.replace(index=from_numpy(as_lazy(update.index).numpy()[:, ::-1].copy())) for update in us)
        for target, us in adapter.updates.items()
    }
    with pytest.raises(Unrepresentable):
        ak.write(adapter.replace(updates=moved), tmp_path / "b", "peft")
    fresh = ak.torch.create(base[0], "fourierft", targets=["q"], rank=4)
    ak.write(fresh, tmp_path / "fresh", "peft")
    assert ak.read(tmp_path / "fresh", base=base[1]).digest() == fresh.digest()


@pytest.mark.parametrize(
    ("changes", "error", "where"),
    [
        ({"n_frequency": 6}, ShapeMismatch, "fourierft_spectrum"),
        ({"random_loc_seed": None}, Malformed, "random_loc_seed"),
        ({"n_frequency_pattern": {"q": 6}}, ShapeMismatch, "fourierft_spectrum"),
        ({"n_frequency_pattern": {"(": 6}}, Malformed, "("),
    ],
)
def test_a_config_of_another_file_is_refused(changes, error, where, base, tmp_path):
    folder, _ = saved(fourierft(target_modules=["q"]), base[1], tmp_path / "a")
    with pytest.raises(error) as raised:
        ak.read(rewritten(folder, **changes), base=base[1])
    assert where in raised.value.where


def test_a_base_with_another_weight_there_is_refused(base, tmp_path):
    folder, _ = saved(fourierft(target_modules=["q"]), base[1], tmp_path / "a")
    save_file({"block.0.q.weight": torch.zeros(2, 2), "block.1.q.weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ShapeMismatch, match="5 coefficients for a weight with 4"):
        ak.read(folder, base=tmp_path / "b.safetensors")


def test_positions_of_unilora_need_an_order_that_sorted_names_do_not_tell(base, tmp_path):
    folder, _ = saved(unilora(target_modules=["q", "up"]), base[1], tmp_path / "a")
    with pytest.raises(UsageError) as needy:
        ak.read(folder)
    assert needy.value.cure == "Pass --base BASE (base=)"
    with pytest.raises(Unsupported, match="order of the modules") as raised:
        ak.read(folder, base=base[1])
    assert "save_indices=True" in raised.value.cure


def test_super_tunings_positions_of_the_base_are_refused_by_name(base, tmp_path):
    from peft import SupertuningConfig

    config = SupertuningConfig(sparsity=0.8, target_modules=["q"], save_precomputed_indices=False)
    folder, _ = saved(config, base[1], tmp_path / "a")
    with pytest.raises(Unsupported, match="equally large") as raised:
        ak.read(folder, base=base[1])
    assert raised.value.where == "save_precomputed_indices"


def test_numbers_of_elements_are_written_with_the_base_alone(base, tmp_path):
    """PEFT says how many elements are trained by the size of the weight."""
    for method in ("shira", "supertuning"):
        fresh = ak.torch.create(base[0], method, targets=["q"], rank=2)
        with pytest.raises(UsageError) as raised:
            ak.write(fresh, tmp_path / method, "peft")
        assert raised.value.cure == "Pass --base BASE (base=)"
        ak.write(fresh, tmp_path / method, "peft", base=base[1])
        PeftModel.from_pretrained(Layers(), str(tmp_path / method))
        assert ak.read(tmp_path / method).digest() == fresh.digest()


def test_mixtures_that_do_not_sum_to_one_are_not_written(tmp_path):
    g = torch.Generator().manual_seed(0)
    indices, weights = torch.zeros(1, 2, 2, dtype=torch.int64), torch.rand(1, 2, 2, generator=g)
    update = METHODS["vblora"](
        bank=torch.rand(3, 2, generator=g), indices_A=indices, weights_A=weights, indices_B=indices.mT.reshape(2, 1, 2),
        weights_B=torch.full((2, 1, 2), 0.5),
    )  # fmt: skip
    with pytest.raises(Unrepresentable, match="cannot express") as raised:
        ak.write(Adapter({Target("q"): (update,)}), tmp_path / "a", "peft")
    assert any("do not sum to 1" in item for item in raised.value.items)


@pytest.mark.parametrize("model_type", ORDERS)
def test_the_order_of_a_familys_modules_is_that_of_transformers(model_type):
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 11, "num_attention_heads": 4, "vocab_size": 32,
        "num_key_value_heads": 2, "pad_token_id": 0, "ffn_dim": 32, "word_embed_proj_dim": 16,
    }  # fmt: skip
    own = {"gpt2": ("n_embd", "n_layer", "n_head"), "gptj": ("n_embd", "n_layer", "n_head"), "bloom": ("hidden_size",)}
    if model_type in own:
        kept = dict(zip(("n_embd", "n_layer", "n_head"), (16, 11, 4), strict=True))
        sizes = {"vocab_size": 32, **kept, **({"rotary_dim": 4} if model_type == "gptj" else {})}
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)]
    order = ORDERS[model_type]
    placed = [name for name in modules if order.place(name) is not None]
    inside = [name for name in modules if ".1." in name or ".10." in name]
    assert set(inside) <= set(placed), "every linear layer of a block is in the table"
    assert in_order(sorted(placed), {"model_type": model_type}) == placed


def test_no_order_is_made_up():
    assert in_order(["a", "b"], None) is None
    assert in_order(["a", "b"], {"model_type": "llama"}) is None
    assert in_order(["a"], None) == ["a"]
    assert in_order([], {"model_type": "llama"}) is None


def test_two_c3a_adapters_of_peft_feed_each_other_where_the_formula_adds():
    """PEFT's forward gives the first adapter's output to the second as input; its own merge adds both."""
    model = nn.ModuleDict({"q": nn.Linear(8, 8, bias=False)})
    wrapped = get_peft_model(model, C3AConfig(block_size=4, target_modules=["q"], init_weights="gaussian"), "one")
    wrapped.add_adapter("two", C3AConfig(block_size=4, target_modules=["q"], init_weights="gaussian"))
    wrapped.base_model.set_adapter(["one", "two"])
    layer, x = wrapped.base_model.model["q"], torch.randn(3, 8)
    adapters = [Adapter({Target("q"): (METHODS["c3a"](kernel=layer.c3a_kernel[name]),)}) for name in ("one", "two")]
    plain = nn.ModuleDict({"q": nn.Linear(8, 8, bias=False)})
    plain["q"].load_state_dict(layer.get_base_layer().state_dict())
    theirs = layer(x)
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        ak.torch.inject(plain, adapter, name=name)
    ours = plain["q"](x)
    wrapped.merge_adapter(adapter_names=["one", "two"])
    torch.testing.assert_close(ours, layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "method",
    ["fourierft", "waveft", "c3a", "shira", "supertuning", "vblora", "unilora", "tinylora", "delora", "gralora"],
)
def test_fresh_updates_train(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 8)).requires_grad_(False), torch.randn(64, 12)
    goal = model(x) + torch.nn.functional.linear(x, torch.randn(8, 12))
    fresh = ak.torch.create(model, method, rank=4)
    y = model(x)
    handle = ak.torch.inject(model, fresh, trainable=True)
    torch.testing.assert_close(model(x), y, rtol=0, atol=0.05 if method in ("vblora", "unilora") else 0)
    optimizer = torch.optim.Adam(list(handle.parameters()), lr=0.05)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.mse_loss(model(x), goal)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in handle.parameters() if parameter.grad is not None)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(later != earlier for earlier, later in pairwise(losses))


@pytest.mark.parametrize(("method", "shared"), [("vblora", "bank"), ("unilora", "theta")])
def test_what_fresh_updates_share_is_one_tensor_in_peft_too(method, shared, base, tmp_path):
    fresh = ak.torch.create(base[0], method, targets=["q", "up"], rank=2)
    assert len({id(update.tensors[shared]) for _, update in fresh}) == 1
    ak.write(fresh, tmp_path / "a", "peft")
    assert ak.read(tmp_path / "a").digest() == fresh.digest()
    model = Layers()
    model.load_state_dict(base[0].state_dict())
    merged = PeftModel.from_pretrained(model, str(tmp_path / "a")).merge_and_unload().state_dict()
    for path in ("block.0.q", "block.1.up"):
        delta = merged[f"{path}.weight"] - base[0].state_dict()[f"{path}.weight"]
        torch.testing.assert_close(delta, fresh.delta(path), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fourierft", "waveft", "gralora", "supertuning"])
def test_scalings_that_one_config_cannot_say_are_folded_if_allowed(method, base, tmp_path):
    fresh = ak.torch.create(base[0], method, targets=["q"], rank=2)
    generator = torch.Generator().manual_seed(3)
    moved = {}
    for scaling, (target, update) in zip((0.1, 0.3), fresh, strict=True):
        fields = {n: t + torch.randn(t.shape, generator=generator) for n, t in update.tensors.items() if t.ndim == 3}
        if method == "supertuning":
            fields = {"A": torch.randn(3, 8, generator=generator), "B": torch.randn(8, 3, generator=generator)}
        elif method != "gralora":
            fields = {"spectrum": torch.randn(update.spectrum.shape, generator=generator)}
        moved[target] = (update.replace(**fields, scaling=scaling),)
    adapter = fresh.replace(updates=moved)
    with pytest.raises(Unrepresentable):
        ak.write(adapter, tmp_path / "a", "peft", base=base[1])
    assert len(ak.write(adapter, tmp_path / "a", "peft", base=base[1], on_loss="fold")) == 2
    read = ak.read(tmp_path / "a", base=base[1])
    for target in moved:
        torch.testing.assert_close(read.delta(target.path), adapter.delta(target.path), rtol=1e-6, atol=1e-7)
