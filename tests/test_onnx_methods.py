"""Adapters in graphs of every kind of layer, under onnxruntime, against torch in float64."""

import onnx
import onnx_graphs as graphs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, Unsupported
from adapterkit.methods import METHODS

OF_LAYERS = [name for name, cls in METHODS.items() if cls.kind in ("additive", "weight", "output")]


@pytest.mark.parametrize("kind", graphs.LAYERS)
@pytest.mark.parametrize("method", OF_LAYERS)
@settings(max_examples=4)
@given(data=st.data())
def test_graphs_compute_what_torch_does(method, kind, data, made, close, tmp_path):
    model, x, proto = graphs.built(kind)
    weight = model[0].weight
    update = data.draw(made.updates(method=method, kernel=tuple(weight.shape[2:])))
    layout = "in out *k" if kind == "embedding" else "out *in"
    adapter = Adapter({Target("0", layout): (update,)})
    x64 = torch.tensor(x)
    y = model(x64)
    try:
        ak.torch.inject(model, adapter)
        wanted = model(x64)
    except AdapterkitError:
        return
    path = graphs.saved(proto, tmp_path / "base.onnx")
    try:
        ak.onnx.inject(path, adapter, tmp_path / "out.onnx", check=False)
    except Unsupported as error:
        assert "reads other modules" in str(error) or "of weights" in str(error), error
        return
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    got = torch.tensor(graphs.run(tmp_path / "out.onnx", x)).double()
    close(got, wanted, y, wanted - y, torch.ones(1))
    ak.onnx.eject(tmp_path / "out.onnx", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()
