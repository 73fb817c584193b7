"""What injection refuses: each with the target and a cure, and with nothing left attached."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.core.updates import ContextUpdate, OutputUpdate, tensor
from adapterkit.errors import (
    AdapterkitError,
    Corrupt,
    Malformed,
    NotMergeable,
    ShapeMismatch,
    TargetNotFound,
    Unsupported,
    UsageError,
)
from adapterkit.io.lazy import DTYPES, Lazy, from_numpy
from adapterkit.methods import METHODS


class Doubled(OutputUpdate):
    """A made-up formula on outputs: y' = y + v * y."""

    v: object = tensor("out")

    def forward(self, x, layer):
        y = layer(x)
        return y + layer.per_channel(self.v) * y


class Prompted(ContextUpdate):
    """A made-up formula on the context."""

    v: object = tensor("n")


class Biased(METHODS["dora"]):
    """A made-up formula of the weight that must change a bias."""

    @property
    def changes_bias(self):
        return True


class Packed(nn.Module):
    """A layer that keeps its weight in buffers of its own kind."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 2, dtype=torch.int32))


def model():
    net = nn.ModuleDict(
        {
            "fc": nn.Linear(6, 4), "bare": nn.Linear(6, 4, bias=False), "good": nn.Linear(6, 4),
            "norm": nn.LayerNorm(6), "conv": nn.Conv2d(6, 4, 3), "packed": Packed(), "eight": nn.Linear(6, 4),
            "whole": nn.Linear(6, 4), "normed": parametrizations.weight_norm(nn.Linear(6, 4)),
            "encoder": nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        }
    )  # fmt: skip
    net["eight"].weight = nn.Parameter(net["eight"].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    net["whole"].weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    return net


def lora(out=4, into=6, *kernel, **more):
    return METHODS["lora"](A=torch.ones(2, into, *kernel), B=torch.ones(out, 2), **more)


def wobbling():
    return METHODS["bottleneck"](down=torch.ones(2, 4), up=torch.ones(4, 2), non_linearity="wobble")


def torn():
    def fetch():
        raise Corrupt("3 bytes where 32 were", path="a.safetensors", cure="Read it anew")

    return METHODS["lora"](A=Lazy((2, 6), DTYPES["F32"], fetch), B=torch.ones(4, 2))


DORA = {"A": torch.ones(2, 6), "B": torch.ones(4, 2), "magnitude": torch.ones(4)}
REFUSED = {
    "another number of inputs": (Target("fc"), lora(into=7), ShapeMismatch, r"fc: lora.*in=7.*\[4, 6\]"),
    "another number of outputs": (Target("fc"), lora(out=5), ShapeMismatch, r"fc: lora.*out=5.*\[4, 6\]"),
    "a kernel at a linear layer": (Target("fc"), lora(4, 6, 3), ShapeMismatch, "fc: lora"),
    "another kernel": (Target("conv"), lora(4, 6, 5, 5), ShapeMismatch, "conv: lora"),
    "two axes at a norm": (Target("norm"), lora(6, 6), ShapeMismatch, r"norm: lora.*\[6\]"),
    "rows behind the last": (Target("fc", rows=(2, 6)), lora(), ShapeMismatch, r"fc\[2:6\]: lora"),
    "tensors that disagree": (Target("fc"), lora().replace(B=torch.ones(4, 3)), ShapeMismatch, r"fc: lora\.B"),
    "an unknown activation": (Target("fc"), wobbling(), Unsupported, r"fc: bottleneck\.non_linearity: .*wobble.*Known"),
    "a missing partner": (Target("fc"), METHODS["dense"](), Malformed, "fc: dense: .*needs at least one of: D, d"),
    "a scale that is none": (Target("fc"), lora(scaling=float("nan")), Malformed, r"fc: lora\.scaling"),
    "no such place": (Target("fcc"), lora(), TargetNotFound, r"fcc: .*Nearest: fc"),
    "a formula of outputs at rows": (Target("fc", rows=(0, 2)), Doubled(v=torch.ones(2)), Unsupported, r"fc\[0:2\]"),
    "a formula on the context": (Target("fc"), Prompted(v=torch.ones(3)), Unsupported, "fc: .*does not apply"),
    "a bias that is not there": (Target("bare"), Biased(**DORA), Unsupported, "bare: .*bias.*does not have.*Give"),
    "eight bits": (Target("eight"), lora(), Unsupported, "eight: .*float8.*Load the base unquantized"),
    "whole numbers": (Target("whole"), lora(), Unsupported, "whole: .*int8.*Load the base unquantized"),
    "a packed weight": (Target("packed"), lora(), Unsupported, "packed: this Packed stores.*Load the base"),
    "a parametrized weight": (Target("normed"), lora(), Unsupported, "normed: the layer is parametr.*Remove"),
    "torch's fused path": (Target("encoder.linear1"), lora(8), Unsupported, "encoder.linear1: .*set_fastpath"),
    "a file torn while in use": (Target("fc"), torn(), Corrupt, "a.safetensors: 3 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_adapter_leaves_no_trace(case):
    target, update, error, words = REFUSED[case]
    base = model()
    before = {name: dict(module.__dict__) for name, module in base.named_modules()}
    good = {Target("good", rows=(0, 2)): (lora(2),), Target("good", rows=(2, 4)): (lora(2),)}
    for updates in ({target: (update,)}, good | {target: (update,)}, {target: (update,)} | good):
        with pytest.raises(error, match=words) as raised:
            ak.torch.inject(base, Adapter(updates))
        assert raised.value.cure
        assert {name: dict(module.__dict__) for name, module in base.named_modules()} == before
    ak.torch.inject(base, Adapter(good))


@pytest.mark.parametrize("order", ["outer first", "inner first", "one adapter"])
def test_formulas_on_outputs_see_the_layer_with_its_parameters_exchanged(order, close):
    outer = {Target("fc"): (Doubled(v=torch.ones(4)),)}
    inner = {Target("fc", rows=(0, 2)): (lora(2),)}
    base, x = model(), torch.ones(3, 6)
    y = base["fc"](x)
    adapters = {"outer first": [outer, inner], "inner first": [inner, outer], "one adapter": [outer | inner]}[order]
    for number, updates in enumerate(adapters):
        ak.torch.inject(base, Adapter(updates), name=str(number))
    close(base["fc"](x), 2 * (y + torch.tensor([12.0, 12.0, 0.0, 0.0])))


def test_formulas_on_outputs_go_with_formulas_of_weights(close):
    base, x = model(), torch.ones(3, 6)
    y = base["fc"](x)
    handles = [
        ak.torch.inject(base, Adapter({Target("fc"): (Doubled(v=torch.full((4,), 0.5)),)}), name="a", weight=2.0),
        ak.torch.inject(base, Adapter({Target("fc"): (lora(),)}), name="b"),
    ]
    close(base["fc"](x), 2 * (y + 12))
    with pytest.raises(NotMergeable, match=r"fc: the update does not change weights. Keep the adapter injected"):
        handles[0].merge_()
    handles[1].merge_()
    close(base["fc"](x), 2 * (y + 12))


def test_names():
    base = model()
    handle = ak.torch.inject(base, Adapter({Target("fc"): (lora(),)}))
    with pytest.raises(UsageError, match=r"default: an adapter with this name is attached. Pass another name="):
        ak.torch.inject(base, Adapter({Target("bare"): (lora(),)}))
    handle.remove()
    with pytest.raises(UsageError, match="name: name None is not a string"):
        ak.torch.inject(base, Adapter({Target("bare"): (lora(),)}), name=None)
    ak.torch.inject(base, Adapter({Target("bare"): (lora(),)}))


@pytest.mark.parametrize("ended", ["remove", "merge_"])
def test_a_handle_is_of_no_use_once_it_is_off(ended):
    handle = ak.torch.inject(model(), Adapter({Target("fc"): (lora(),)}), name="mine", trainable=True)
    getattr(handle, ended)()
    for use in (
        handle.remove, handle.merge_, handle.adapter, lambda: handle.set_active(True), lambda: handle.weight,
        lambda: setattr(handle, "weight", 2.0), lambda: list(handle.parameters()),
        lambda: list(handle.named_parameters()), lambda: handle.disable().__enter__(),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"mine: this handle was removed or merged. Inject the adapter again"):
            use()
    assert handle.name == "mine"


def test_merging_what_cannot_be_folded_changes_nothing():
    tied = nn.ModuleDict({"one": nn.Linear(6, 4), "two": nn.Linear(6, 4)})
    tied["two"].weight = tied["one"].weight
    base = model()
    for net, updates, words in (
        (tied, {Target("one"): (lora(),)}, "one.weight, two.weight"),
        (
            base,
            {Target("fc"): (lora(),), Target("bare"): (lora(bias=torch.ones(4)),)},
            "bare: the update changes a bias",
        ),
    ):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        handle = ak.torch.inject(net, Adapter(updates))
        with pytest.raises(NotMergeable, match=words) as raised:
            handle.merge_()
        assert raised.value.cure
        same = [torch.equal(a.float(), before[name].float()) for name, a in net.state_dict().items()]
        assert all(same)
        handle.remove()


def test_every_refusal_is_a_typed_error():
    assert all(issubclass(error, AdapterkitError) for _, _, error, _ in REFUSED.values())


def test_integer_leaves_stay_integers():
    embedding = nn.ModuleDict({"e": nn.Embedding(9, 4)}).bfloat16()
    rows = METHODS["rows"](index=from_numpy(np.array([2, 5])), values=from_numpy(np.ones((2, 4), dtype=np.float32)))
    handle = ak.torch.inject(embedding, Adapter({Target("e", "in out *k"): (rows,)}), trainable=True)
    assert [name for name, _ in handle.named_parameters()] == ["e.rows.values"]
    assert embedding["e"](torch.tensor([1, 2, 5]))[1:].tolist() == [[1.0] * 4] * 2
    ((_, back),) = handle.adapter()
    assert back.index.tolist() == [2, 5]
    assert back.index.dtype == torch.int64


@pytest.mark.parametrize("path", ["w", "inner.w"])
def test_an_update_of_outputs_at_a_bare_parameter_is_refused(path):
    net = nn.Module()
    net.inner = nn.Module()
    net.w, net.inner.w = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    lora = Adapter({Target(path): (METHODS["lora"](A=torch.ones(2, 4), B=torch.ones(4, 2)),)})
    with pytest.raises(Unsupported, match="this target is a parameter, which has no output") as raised:
        ak.torch.inject(net, ak.torch.compose.average(lora, lora))
    assert raised.value.where == path
