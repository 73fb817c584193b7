"""Adapters in graphs of every kind of layer, under onnxruntime, against torch in float64."""

import numpy as np
import onnx
import onnx_graphs as graphs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, Unsupported
from adapterkit.io.lazy import as_lazy, from_numpy
from adapterkit.methods import METHODS

OF_LAYERS = [name for name, cls in METHODS.items() if cls.kind in ("additive", "weight", "output")]
OPEN = ["adalora", "bottleneck", "dense", "hira", "ia3", "lora", "lora_xs", "vera"]
"""Methods that must have slots."""

WORKED_OUT = ["dora", "oft", "boft", "hra", "replacement"]
"""Methods whose slots hold what they come to at the base's weight."""


def adapter_of(update, kind):
    return Adapter({Target("0", "in out *k" if kind == "embedding" else "out *in"): (update,)})


def in_torch(model, adapter, x):
    """(y of the base, y with the adapter) in float64, or None where torch does not take it either."""
    x = torch.tensor(x)
    y = model(x)
    try:
        handle = ak.torch.inject(model, adapter)
        changed = model(x)
    except (AdapterkitError, RuntimeError, TypeError):
        return None
    handle.remove()
    return y, changed


def is_base(model, update, kind, x, fill):
    """Whether an update whose tensors hold nothing but `fill` leaves the model as it is, in torch."""
    filled = update.map(lambda leaf: from_numpy(np.full_like(as_lazy(leaf).numpy(), fill)))
    found = in_torch(model, adapter_of(filled, kind), x)
    return found is not None and torch.allclose(*found, rtol=1e-9, atol=1e-9)


MAIN = ["matmul", "gemm", "conv2d", "groups", "embedding"]
"""Kinds of layers that every method is tried on; the others differ in what the node looks like alone."""

PAIRS = [(method, kind) for method in OF_LAYERS for kind in MAIN] + [
    (method, kind) for method in ("lora", "dora", "ia3", "bottleneck") for kind in graphs.LAYERS if kind not in MAIN
]


@pytest.mark.parametrize(("method", "kind"), PAIRS)
@settings(max_examples=1)
@given(data=st.data())
def test_graphs_compute_what_torch_does(method, kind, data, made, close, tmp_path):
    model, x, proto = graphs.built(kind)
    update = data.draw(made.updates(method=method, kernel=tuple(model[0].weight.shape[2:])))
    adapter = adapter_of(update, kind)
    wanted = in_torch(model, adapter, x)
    if wanted is None:
        return
    path, out = graphs.saved(proto, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    ak.onnx.inject(path, adapter, out, check=False)
    onnx.checker.check_model(str(out))
    y, changed = wanted
    terms = (y, changed - y, torch.ones(1))
    close(torch.tensor(graphs.run(out, x)).double(), changed, *terms)
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()
    lost = update.changes_bias and update.needs_bias and getattr(model[0], "bias", None) is None
    if METHODS[method].kind != "output" and not lost:
        ak.onnx.merge(path, adapter, out, check=False)
        close(torch.tensor(graphs.run(out, x)).double(), changed, *terms)


@pytest.mark.parametrize("kind", ["matmul", "gemm", "conv2d", "embedding"])
@pytest.mark.parametrize("method", OPEN)
@settings(max_examples=2)
@given(data=st.data())
def test_slots_are_the_base_until_they_are_filled(method, kind, data, made, close, tmp_path):
    model, x, proto = graphs.built(kind)
    update = data.draw(made.updates(method=method, kernel=tuple(model[0].weight.shape[2:])))
    adapter = adapter_of(update, kind)
    wanted = in_torch(model, adapter, x)
    if wanted is None or update.attributes.get("residual") or update.attributes.get("norm"):
        return
    path, out = graphs.saved(proto, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    if not any(is_base(model, update, kind, x, fill) for fill in (0.0, 1.0)):
        # A bottleneck may read its layer norm, or add its input twice, whatever its matrices are.
        with pytest.raises(Unsupported, match="leave the base unchanged"):
            ak.onnx.inject(path, adapter, out, mode="slots")
        return
    ak.onnx.inject(path, adapter, out, mode="slots")
    np.testing.assert_array_equal(graphs.run(out, x), graphs.run(path, x))
    feeds = {f"0.{method}.{name}": as_lazy(leaf).numpy().astype("f4") for name, leaf in update.tensors.items()}
    if "scaling" in update.attributes:
        feeds[f"0.{method}.scaling"] = np.array([update.attributes["scaling"]], dtype="f4")
    y, changed = wanted
    close(torch.tensor(graphs.run(out, x, **feeds)).double(), changed, y, changed - y, torch.ones(1))


def test_a_slot_takes_any_rank(tmp_path, close):
    model, x, proto = graphs.built("matmul")
    path = graphs.saved(proto, tmp_path / "base.onnx")
    for rank in (2, 5):
        A, B = torch.randn(rank, 16, dtype=torch.float64), torch.randn(8, rank, dtype=torch.float64)
        adapter = adapter_of(METHODS["lora"](A=A, B=B, scaling=0.5), "matmul")
        if rank == 2:
            ak.onnx.inject(path, adapter, tmp_path / "out.onnx", mode="slots")
        scaling = np.array([0.5], dtype="f4")
        feeds = {"0.lora.A": A.numpy().astype("f4"), "0.lora.B": B.numpy().astype("f4"), "0.lora.scaling": scaling}
        got = torch.tensor(graphs.run(tmp_path / "out.onnx", x, **feeds)).double()
        y, changed = in_torch(model, adapter, x)
        close(got, changed, y, changed - y)


# Default values of size 0 are tried first. With no groups, AdaMSS reads a group that does not exist: numpy raises
# IndexError, which the injector expects, and numpy 2.0 only warns.
@pytest.mark.filterwarnings("ignore:Out of bound index found:DeprecationWarning")
@pytest.mark.parametrize("method", [name for name in OF_LAYERS if name not in OPEN])
@settings(max_examples=1)
@given(data=st.data())
def test_other_slots_are_the_base_too_or_refused_by_name(method, data, made, tmp_path, close):
    model, x, proto = graphs.built("matmul")
    adapter = adapter_of(data.draw(made.updates(method=method, kernel=())), "matmul")
    if in_torch(model, adapter, x) is None:
        return
    path, out = graphs.saved(proto, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    try:
        ak.onnx.inject(path, adapter, out, mode="slots", check=False)
    except Unsupported as error:
        refused = error.cure
    else:
        refused = None
    if refused is not None:
        assert refused == "Inject the adapter with --mode constant (mode='constant')"
        assert method not in WORKED_OUT
        return
    np.testing.assert_array_equal(graphs.run(out, x), graphs.run(path, x))
    y, changed = in_torch(model, adapter, x)
    feeds = ak.onnx.fit(out, adapter)
    close(torch.tensor(graphs.run(out, x, **feeds)).double(), changed, y, changed - y, torch.ones(1))
