# ruff: noqa: F811 - a fixture is imported and then named
"""A family that nothing in the tree names takes one TOML file: every command knows it then, and no code changes."""

import json
import warnings
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from checkouts import checkout, run  # noqa: F401 - a fixture
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.methods.lora import LoRA
from adapterkit.naming import architectures

CONFIG = {"model_type": "zebra", "num_attention_heads": 2, "hidden_size": 8, "num_experts": 2}


@pytest.fixture
def zebra(checkout):
    """A base under the names of a hub, and an adapter under those of the live model, with experts in a stack."""
    rng = np.random.default_rng(0)
    shapes = {"herd.0.ask": (8, 8), **{f"herd.0.zebra.{e}.{name}": (6, 8) for e in range(2) for name in "ug"}}
    weights = {f"{name}.weight": rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    base = checkout / "base"
    base.mkdir()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(CONFIG))

    def lora(*lead, out):
        A, B = rng.standard_normal((*lead, 2, 8)), rng.standard_normal((*lead, out, 2))
        return LoRA(A=torch.tensor(A, dtype=torch.float32), B=torch.tensor(B, dtype=torch.float32), scaling=0.5)

    updates = {Target("net.0.mix.q"): (lora(out=8),), Target("net.0.x.both", "e out *in"): (lora(2, out=12),)}
    ak.write(ak.Adapter(updates), checkout / "a.safetensors", "adapterkit")
    whole = {target.path: (0.5 * (u.B.double() @ u.A.double())).numpy() for target, (u,) in updates.items()}
    deltas = {"herd.0.ask": whole["net.0.mix.q"]}
    for e in range(2):
        deltas[f"herd.0.zebra.{e}.u"], deltas[f"herd.0.zebra.{e}.g"] = np.split(whole["net.0.x.both"][e], 2)
    return checkout, weights, deltas


def test_merge_names_and_verify_know_it(zebra):
    checkout, weights, deltas = zebra
    base, adapter = checkout / "base", checkout / "a.safetensors"
    told = run(checkout, ("merge", base, adapter, "-o", checkout / "merged", "--verify"), ("names", base, adapter))
    merged = load_file(checkout / "merged" / "model.safetensors")
    for name, delta in deltas.items():
        np.testing.assert_allclose(merged[f"{name}.weight"], weights[f"{name}.weight"] + delta, atol=1e-5)
    assert "architecture zebra: live -> hub" in told


def test_convert_to_gguf_and_mlx_knows_it(zebra):
    checkout, _, deltas = zebra
    base, adapter = checkout / "base", checkout / "a.safetensors"
    back = [
        command
        for name, to in (("a.gguf", "gguf"), ("mlx", "mlx"))
        for command in (
            ("convert", adapter, checkout / name, "--to", to, "--base", base),
            ("convert", checkout / name, checkout / f"{name}.st", "--to", "adapterkit", "--base", base),
            ("merge", base, checkout / f"{name}.st", "-o", checkout / f"{name}.merged"),
        )
    ]
    run(checkout, *back)
    reader = gguf.GGUFReader(checkout / "a.gguf")
    held = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    scaling = float(reader.fields["adapter.lora.alpha"].parts[-1][0]) / 2
    q = scaling * held["blk.0.attn_q.weight.lora_b"] @ held["blk.0.attn_q.weight.lora_a"]
    pairs = deltas["herd.0.ask"].reshape(2, 2, 2, 8).swapaxes(1, 2).reshape(8, 8)
    np.testing.assert_allclose(q, pairs, atol=1e-5)
    for name, leaf in (("ffn_up_exps", "u"), ("ffn_gate_exps", "g")):
        A, B = (held[f"blk.0.{name}.weight.lora_{side}"] for side in "ab")
        wanted = np.stack([deltas[f"herd.0.zebra.{e}.{leaf}"] for e in range(2)])
        np.testing.assert_allclose(scaling * (B @ A), wanted, atol=1e-5)
    names = {key.rpartition(".")[0] for key in load_file(checkout / "mlx" / "adapters.safetensors")}
    assert names == {"stripes.0.query", "stripes.0.zebras.u", "stripes.0.zebras.g"}
    for name in ("a.gguf", "mlx"):
        merged = load_file(checkout / f"{name}.merged" / "model.safetensors")
        plain = load_file(base / "model.safetensors")
        for module, delta in deltas.items():
            np.testing.assert_allclose(merged[f"{module}.weight"] - plain[f"{module}.weight"], delta, atol=1e-5)


class Zebra(torch.nn.Module):
    """The base under a hub's names; every expert reads the input."""

    def __init__(self, weights):
        super().__init__()
        zebras = [torch.nn.ModuleDict({name: torch.nn.Linear(8, 6, bias=False) for name in "ug"}) for _ in range(2)]
        herd = torch.nn.ModuleDict({"ask": torch.nn.Linear(8, 8, bias=False), "zebra": torch.nn.ModuleList(zebras)})
        self.herd = torch.nn.ModuleList([herd])
        self.config = SimpleNamespace(to_dict=lambda: CONFIG)
        self.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})

    def forward(self, x):
        one = self.herd[0]
        return torch.cat([one["ask"](x), *(layer(x) for each in one["zebra"] for layer in each.values())], -1)


def computed(x, weights, deltas):
    """What the model gives with every change in its weights."""
    order = ["herd.0.ask", *(f"herd.0.zebra.{e}.{name}" for e in range(2) for name in "ug")]
    return np.concatenate([x @ (weights[f"{name}.weight"] + deltas[name]).T for name in order], -1)


def test_inject_knows_it_in_graphs(zebra):
    import onnxruntime

    checkout, weights, deltas = zebra
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Zebra(weights).eval(), (x,), checkout / "m.onnx", input_names=["x"], dynamo=False)
    out, base = checkout / "out.onnx", checkout / "base"
    run(checkout, ("inject", checkout / "m.onnx", checkout / "a.safetensors", "-o", out, "--base-weights", base))
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, computed(x.numpy(), weights, deltas), atol=1e-4)


def test_inject_knows_it_in_live_models(zebra, monkeypatch):
    checkout, weights, deltas = zebra
    monkeypatch.setattr(architectures, "folder", lambda: checkout / "spec" / "architectures")
    architectures._of_type.cache_clear()
    x, model = torch.randn(3, 8), Zebra(weights)
    try:
        ak.torch.inject(model, ak.read(checkout / "a.safetensors"))
    finally:
        architectures._of_type.cache_clear()
    found = model(x).detach().numpy()
    np.testing.assert_allclose(found, computed(x.numpy(), weights, deltas), atol=1e-4)
