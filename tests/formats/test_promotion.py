"""Promotion: what a format has no words for is written as a LoRA of the same change, or of one as near as was asked."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from llm_adapters import BASE, FILES, content, deltas, llama, lora, place, write_base
from method_matrices import IMAGE, LANGUAGE, cases, model
from safetensors.numpy import load_file

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.core.adapter import Target
from adapterkit.core.updates import Additive
from adapterkit.errors import Miswritten, Unrepresentable, UsageError
from adapterkit.io.lazy import as_lazy, from_numpy
from adapterkit.methods import METHODS
from adapterkit.methods.dense import Dense
from adapterkit.methods.ia3 import IA3
from adapterkit.methods.lora import LoRA

OF_IMAGES = ("diffusers", "kohya")
WRITTEN = [*sorted(FILES.keys() - {"onnx_adapter"}), *OF_IMAGES, "adapterhub", "peft"]
THIN = [
    name for name in METHODS
    if issubclass(METHODS[name], Additive) and METHODS[name].pair is not Additive.pair and name != "lora"
]  # fmt: skip


def placed(name, method, folder):
    """An adapter of the method's matrices as layers of a model, the model, and the change expected of each layer."""
    # A residual may be a whole matrix, which is no product of factors.
    found = list(cases(method, "f4" if name == "tensorrt_llm" else "f8"))
    found = [each for each in found if method != "residual" or "D" not in each[0].tensors]
    # AdapterHub has one rank and one scaling for all.
    own = found[:1] if name == "adapterhub" else found
    adapter, base, merged = model(own, IMAGE if name in OF_IMAGES else LANGUAGE, folder)
    return adapter, base, {path: new - W for (path, new), (_, W, _) in zip(merged.items(), own, strict=True)}


@pytest.mark.parametrize("method", THIN)
@pytest.mark.parametrize("name", WRITTEN)
def test_thin_factors_become_a_lora_of_the_same_change(name, method, tmp_path):
    adapter, base, expected = placed(name, method, tmp_path / "base")
    out = place(tmp_path, name) if name in FILES else tmp_path / ("out.safetensors" if name in OF_IMAGES else "out")
    if method not in ak.FORMATS[name].methods:
        with pytest.raises(Unrepresentable, match=method):
            ak.write(adapter, out, name, base, "fold")
    lines = ak.write(adapter, out, name, base, "promote")
    read = ak.read(out, name, base)
    if method not in ak.FORMATS[name].methods:
        assert len([line for line in lines if line.startswith(f"wrote {method} at ")]) == len(expected)
        assert {type(update) for _, update in read} == {LoRA}
    for target in read.updates:
        if name == "litgpt" and target.path not in expected:
            continue  # it has all of a kind, those that are off with zeros
        D = expected.pop(target.path)
        delta = read.delta(target.path, base=base).numpy()
        assert np.abs(delta - D).max() <= (5e-6 if name == "tensorrt_llm" else 1e-6) * np.abs(D).max(), target
    assert not any(D.any() for D in expected.values())


@pytest.mark.parametrize("name", ["gguf", "torchtune", "peft"])
def test_what_has_no_thin_factors_needs_an_error_to_be_accepted(name, tmp_path):
    D = np.random.default_rng(1).normal(size=(16, 24)).astype("f4")
    target = Target("model.layers.0.mlp.down_proj")
    adapter = ak.Adapter({**llama(layers=(1,)).updates, target: (Dense(D=from_numpy(D)),)})
    out = place(tmp_path, name) if name in FILES else tmp_path / "out" / "peft"
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(Unrepresentable, match="--max-error"):
        ak.write(adapter, out, name, BASE, "promote")
    assert not content(out)
    (line,) = [a for a in ak.write(adapter, out, name, BASE, "promote", max_error=0.3) if "relative error" in a]
    got = deltas(ak.read(out, name, BASE))
    error = np.linalg.norm(got[str(target)] - D) / np.linalg.norm(D)
    S = np.linalg.svd(D, compute_uv=False)
    rank = next(r for r in range(17) if np.linalg.norm(S[r:]) <= 0.3 * np.linalg.norm(S))
    assert f"rank {rank}," in line
    assert float(line.rpartition(" ")[2]) == pytest.approx(error, rel=0.05)
    for path, delta in deltas(llama(layers=(1,))).items():
        assert np.abs(got[path] - delta).max() <= 1e-6 * np.abs(delta).max()


def test_a_formula_of_the_weight_is_taken_at_the_base(tmp_path):
    held = load_file(next(BASE.glob("*.safetensors")))
    path = "model.layers.0.mlp.down_proj"
    W, factors = held[f"{path}.weight"].astype("f8"), np.linspace(0.5, 2, 24)
    adapter = ak.Adapter({Target(path): (IA3(l_in=from_numpy(factors.astype("f4"))),)})
    expected = W * factors - W
    with pytest.raises(Unrepresentable, match="ia3"):
        ak.write(adapter, tmp_path / "a.onnx_adapter", "olive", None, "promote", max_error=0.01)
    ak.write(adapter, tmp_path / "a.onnx_adapter", "olive", BASE, "promote", max_error=0.01)
    got = deltas(ak.read(tmp_path / "a.onnx_adapter", "olive"))[path]
    assert np.linalg.norm(got - expected) <= 0.01 * np.linalg.norm(expected)
    there = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    other = ak.Adapter({Target(there): (IA3(l_in=from_numpy(factors.astype("f4"))),)})
    base = write_base(tmp_path / "base", {}, {f"{there}.weight": (6, 24)})
    W = load_file(base / "model.safetensors")[f"{there}.weight"].astype("f8")
    (line,) = ak.write(other, tmp_path / "d.safetensors", "comfyui", base, "promote")
    assert line == f"wrote ia3 at {there} as a weight difference"
    got = load_file(tmp_path / "d.safetensors")
    assert np.abs(next(v for k, v in got.items() if k.endswith(".diff")) - (W * factors - W)).max() < 1e-6


def test_several_updates_of_one_target_become_one_lora(tmp_path):
    target = Target("model.layers.0.mlp.up_proj")
    adapter = ak.Adapter({target: (lora(24, 16, 2, 0.5, seed=1), lora(24, 16, 3, 2.0, seed=2))})
    with pytest.raises(Unrepresentable, match="more than one update"):
        ak.write(adapter, tmp_path / "adapter_model.pt", "torchtune", BASE, "fold")
    ak.write(adapter, tmp_path / "adapter_model.pt", "torchtune", BASE, "promote")
    read = ak.read(tmp_path / "adapter_model.pt", "torchtune", BASE)
    assert read.updates[target][0].A.shape == (5, 16)
    (one,), (other,) = deltas(adapter).values(), deltas(read).values()
    assert np.abs(one - other).max() <= 1e-6 * np.abs(one).max()


def test_a_lora_beside_other_methods_makes_loras_of_those(tmp_path):
    adapter, _, expected = placed("peft", "loha", tmp_path / "base")
    few = dict(list(expected.items())[:2])
    path = list(expected)[2]
    updates = {t: u for t, u in adapter.updates.items() if t.path in few}
    adapter = ak.Adapter({**updates, Target(path): (lora(*expected[path].shape, 1),)})
    with pytest.raises(Unrepresentable, match="beside"):
        ak.write(adapter, tmp_path / "out", "peft", None, "fold")
    ak.write(adapter, tmp_path / "out", "peft", None, "promote")
    got = deltas(ak.read(tmp_path / "out", "peft"))
    for key, D in few.items():
        assert np.abs(got[key] - D).max() <= 1e-6 * np.abs(D).max()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(("on_loss", "error"), [("fold", 0.1), ("promote", 1.5)])
def test_an_error_is_accepted_for_promotion_alone(on_loss, error, tmp_path):
    with pytest.raises(UsageError, match="max_error"):
        ak.write(llama(), tmp_path / "out", "peft", None, on_loss, max_error=error)


def test_the_command_promotes_and_says_so(tmp_path):
    D = np.random.default_rng(1).normal(size=(16, 24)).astype("f4")
    ak.write(ak.Adapter({Target("model.layers.0.mlp.down_proj"): (Dense(D=from_numpy(D)),)}), tmp_path / "n")
    words = ["convert", str(tmp_path / "n"), str(tmp_path / "t.pt"), "--to", "torchtune", "--base", str(BASE)]
    words += ["--on-loss", "promote"]
    refused = CliRunner().invoke(adapterkit, words)
    assert refused.exit_code == 3
    assert not (tmp_path / "t.pt").exists()
    done = CliRunner().invoke(adapterkit, [*words, "--max-error", "0.2"])
    assert done.exit_code == 0, done.output
    assert "relative error" in done.output


def spoiled(update):
    """The same update, times 1.5."""
    name = "B" if isinstance(update, LoRA) else "D"
    return update.replace(**{name: from_numpy(1.5 * as_lazy(update.tensors[name]).numpy())})


@pytest.mark.parametrize("case", ["thin factors", "a difference", "the nearest LoRA"])
def test_what_is_promoted_is_compared_with_the_original(case, tmp_path, monkeypatch):
    """A fault of promotion itself, which the file repeats faithfully."""
    from adapterkit.ops import lowering, resizing

    for module, name in ((lowering, "low_rank"), (lowering, "dense"), (resizing, "low_rank")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real: spoiled(real(*args)))
    if case == "thin factors":
        adapter, base, _ = placed("peft", "loha", tmp_path / "base")
        words = "torchtune", base, "promote"
    elif case == "a difference":
        there = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        adapter = ak.Adapter({Target(there): (IA3(l_in=from_numpy(np.linspace(0.5, 2, 24).astype("f4"))),)})
        words = "comfyui", write_base(tmp_path / "base", {}, {f"{there}.weight": (6, 24)}), "promote"
    else:
        D = np.random.default_rng(1).normal(size=(16, 24)).astype("f4")
        adapter = ak.Adapter({Target("model.layers.0.mlp.down_proj"): (Dense(D=from_numpy(D)),)})
        words = "torchtune", BASE, "promote"
    error = 0.1 if case == "the nearest LoRA" else None
    with pytest.raises(Miswritten, match=r"the promoted update does not match the original (loha|ia3|dense)"):
        ak.write(adapter, tmp_path / "out.safetensors", *words, max_error=error)
    assert not (tmp_path / "out.safetensors").exists()
