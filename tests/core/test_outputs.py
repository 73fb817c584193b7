"""Output updates in live modules: against float64 formulas, against AdapterHub's own library, and what they refuse."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_vectors import vectors_of
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Malformed, NotMergeable, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import as_torch
from adapterkit.linalg.activations import ACTIVATIONS
from adapterkit.methods import METHODS

OUTPUTS = [name for name, cls in METHODS.items() if cls.kind == "output"]
VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "methods"
HUB = Path(__file__).parents[1] / "data" / "adapterhub_outputs"
CASES = [
    pytest.param(method, target.path, id=f"{method}-{target.path}")
    for method in vectors_of("output")
    for target in ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit").updates
]


class Closing(nn.Module):
    """A sub-layer that adds the residual and normalises the sum itself."""

    def __init__(self, dense, norm):
        super().__init__()
        self.dense, self.end_norm = dense, norm

    def forward(self, hidden_states, input_tensor):
        total = self.dense(hidden_states) + input_tensor
        return total if self.end_norm is None else self.end_norm(total)


class Block(nn.Module):
    """A block that adds what its first module read to what its second makes of it, and normalises the sum."""

    def __init__(self, dense, norm):
        super().__init__()
        self.first, self.dense, self.last = nn.Identity(), dense, norm

    def forward(self, x, residual):
        self.first(residual)
        total = self.dense(x) + residual
        return total if self.last is None else self.last(total)


class LayerNorm(nn.LayerNorm):
    """The norm of a vector."""

    def __init__(self, weight, bias):
        super().__init__(len(weight), dtype=weight.dtype)
        self.load_state_dict({"weight": weight, "bias": bias})


def layer(held, turned):
    """The torch layer that a vector's weight and input are of."""
    W, x = held["weight"], held["x"]
    if not x.is_floating_point():
        return nn.Embedding(*W.shape, _weight=W)
    if W.ndim > 2:
        kind, inputs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[W.ndim - 3], x.shape[1]
        made = kind(inputs, W.shape[0], W.shape[2:], groups=inputs // W.shape[1], bias="bias" in held)
    elif turned:
        made = Conv1D(W.shape[1], W.shape[0])
    else:
        made = nn.Linear(W.shape[1], W.shape[0], bias="bias" in held)
    made.double().load_state_dict({name: held[name] for name in ("weight", "bias") if name in held})
    return made


def built(update, held, turned):
    """A module around a vector's layer, the target's path in it, and its inputs."""
    if "added" not in held:
        return layer(held, turned), "m", (held["x"],)
    norm = LayerNorm(held["norm_weight"], held["norm_bias"]) if "norm_weight" in held else None
    inner = layer(held, turned)
    module, path = (Block(inner, norm), "m.dense") if update.residual else (Closing(inner, norm), "m")
    return module, path, (held["x"], held["added"])


class Called(nn.Module):
    """A model whose call brings more than its module reads."""

    def __init__(self, module, states=None):
        super().__init__()
        self.m, self.states = module, states

    def forward(self, *inputs, input_ids=None, output_hidden_states=False, **_):
        y = self.m(*inputs)
        return SimpleNamespace(hidden_states=(self.states,)) if output_hidden_states else y


def call_for(method, rows, tokens):
    """What a call brings for a method's updates."""
    brought = {"input_ids": torch.arange(tokens).repeat(rows, 1), "task_ids": torch.zeros(rows, dtype=torch.long)}
    return {name: brought[name] for name in METHODS[method.partition(".")[0]].asks if name in brought}


def states_for(update, rows, tokens):
    """What the last layer of a model gives, as wide as the update reads it."""
    reads = (
        getattr(update, "first", None) if getattr(update, "first", None) is not None else getattr(update, "last", None)
    )
    return None if reads is None else torch.randn(rows, tokens, reads.shape[1], dtype=torch.float64)


NEEDS = {"alora": {"invocation": [1, 2]}}
"""What a method must be told besides a rank."""


@pytest.mark.parametrize(("method", "path"), CASES)
@pytest.mark.parametrize("weight", [1.0, -0.75])
def test_a_live_module_gives_the_vectors_output(method, path, weight):
    tensors = open_checkpoint(VECTORS / f"{method}.expected.safetensors").tensors
    start = f"{path or '(model)'}."
    held = {name.removeprefix(start): t.torch() for name, t in tensors.items() if name.startswith(start)}
    ((target, (update,)),) = ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit").find(path).items()
    module, at, inputs = built(update, held, target.layout == "in out *k")
    model = Called(module, held.get("call.hidden_states"))
    if update.lacks_experts:
        with pytest.raises(UsageError, match="the router's experts are separate adapters"):
            ak.torch.inject(model, Adapter({Target(target.path and at): (update,)}))
        return
    call = {name.removeprefix("call."): value for name, value in held.items() if name.startswith("call.")}
    call.pop("hidden_states", None)
    keys, before, y = list(model.state_dict()), dict(module.__dict__), module(*inputs)
    handle = ak.torch.inject(model, Adapter({Target(at, target.layout): (update,)}), weight=weight)
    got = model(*inputs, **call)
    assert list(model.state_dict()) == keys
    with handle.disable():
        assert torch.equal(module(*inputs), y)
    handle.remove()
    assert module.__dict__ == before
    assert "forward" not in model.__dict__
    assert torch.equal(module(*inputs), y)
    if weight == 1 or at == "m":
        torch.testing.assert_close(got, y + weight * (held["y"] - y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers_and_torch(name):
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    other = {"leakyrelu": "leaky_relu", "gelu_tanh": "gelu_new"}.get(name, name)
    wanted = ACT2FN[other](x) if other in ACT2FN else getattr(functional, other)(x)
    torch.testing.assert_close(ACTIVATIONS[name](x), wanted, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(torch.from_numpy(ACTIVATIONS[name](x.numpy())), wanted, rtol=1e-8, atol=1e-12)


@pytest.fixture(scope="module")
def hub():
    """Inputs and outputs of AdapterHub's library."""
    return load_file(HUB / "expected.safetensors")


@pytest.fixture(scope="module")
def hub_model():
    """A tiny model as transformers loads it, once for each type of numbers."""
    made = {}

    def load(kind, dtype):
        if (kind, dtype) not in made:
            made[kind, dtype] = AutoModel.from_pretrained(HUB / "models" / kind).eval().to(dtype)
        return made[kind, dtype]

    return load


def run(model, kind, hub):
    names = ("input_ids", "decoder_input_ids", "pixel_values")
    inputs = {name: hub[f"{kind}.{name}"] for name in names if f"{kind}.{name}" in hub}
    cast = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        return model(**cast).last_hidden_state.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", sorted(HUB.glob("*.*.safetensors")), ids=lambda path: path.stem)
def test_forward_is_that_of_adapterhubs_library(path, dtype, hub, hub_model):
    kind = path.stem.partition(".")[0]
    model = hub_model(kind, dtype)
    own = float((run(model, kind, hub) - hub[f"{kind}.y"]).abs().max())
    handle = ak.torch.inject(model, ak.read(path))
    got = run(model, kind, hub)
    handle.remove()
    # Releases of transformers differ by `own` without any adapter: T5's norms compute in float32.
    tolerance = (1e-9 if dtype == torch.float64 else 1e-5) + 10 * own * (dtype == torch.float64)
    assert float((got - hub[path.stem]).abs().max()) <= tolerance


def bottleneck(hidden=8, seed=0, dtype=torch.float64, **attributes):
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(3, hidden, generator=g, dtype=dtype), torch.randn(hidden, 3, generator=g, dtype=dtype)
    return METHODS["bottleneck"](down=down, up=up, **attributes)


def change(update, h):
    return functional.relu(h @ update.down.mT) @ update.up.mT


class Pair(nn.Module):
    """A module without a weight of its own that returns more than its output."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, *, scale=1.0):
        return self.inner(x) * scale, "more"


def test_a_module_without_a_weight_that_is_called_by_name_and_returns_more():
    model, x, update = nn.ModuleDict({"pair": Pair()}).double(), torch.randn(2, 8).double(), bottleneck()
    y = model["pair"](x=x, scale=2.0)[0]
    ak.torch.inject(model, Adapter({Target("base.pair"): (update,)}))
    got, more = model["pair"](x=x, scale=2.0)
    assert more == "more"
    torch.testing.assert_close(got, y + change(update, y), rtol=1e-12, atol=1e-12)


def test_updates_of_one_target_follow_each_other_before_the_layer_closes():
    dense, norm, x, r = nn.Linear(5, 8), nn.LayerNorm(8), torch.randn(2, 5).double(), torch.randn(2, 8).double()
    model = nn.ModuleDict({"m": Closing(dense, norm)}).double()
    lora = METHODS["lora"](A=torch.randn(2, 5).double(), B=torch.randn(8, 2).double())
    one, two = bottleneck(seed=1, original_ln_before=True), bottleneck(seed=2)
    ak.torch.inject(model, Adapter({Target("m"): (one, two), Target("m.dense"): (lora,)}))
    h = functional.linear(x, dense.weight + lora.delta((8, 5)), dense.bias)
    h = h + change(one, norm(h + r))
    torch.testing.assert_close(model["m"](x, r), norm(h + change(two, h) + r), rtol=1e-12, atol=1e-12)


def test_a_weight_and_an_output_change_at_one_target():
    model, x = nn.Sequential(nn.Linear(8, 8)).double(), torch.randn(3, 8).double()
    lora = METHODS["lora"](A=torch.randn(2, 8).double(), B=torch.randn(8, 2).double())
    update = bottleneck()
    y = model(x) + x @ lora.delta((8, 8)).mT
    handle = ak.torch.inject(model, Adapter({Target("0"): (lora, update)}))
    torch.testing.assert_close(model(x), y + change(update, y), rtol=1e-12, atol=1e-12)
    assert [type(u) for _, u in handle.adapter()] == [type(lora), type(update)]
    with pytest.raises(NotMergeable, match="does not change weights"):
        handle.merge_()


@pytest.mark.parametrize("kind", ["closing", "block"])
def test_several_adapters_and_a_different_one_for_each_row(kind):
    dense, norm = nn.Linear(5, 8), nn.LayerNorm(8)
    module = Closing(dense, norm) if kind == "closing" else Block(dense, None)
    where, named = ("m", {}) if kind == "closing" else ("m.dense", {"residual": "first"})
    model = nn.ModuleDict({"m": module}).double()
    x, r = torch.randn(3, 5).double(), torch.randn(3, 8).double()
    y = module(x, r)
    alone, handles = [], []
    for name in "ab":
        update = bottleneck(seed=ord(name), original_ln_before=True, **named)
        handle = ak.torch.inject(model, Adapter({Target(where): (update,)}), name=name)
        alone.append(module(x, r))
        handle.set_active(False)
        handles.append(handle)
    for handle, weight in zip(handles, (0.5, 2.0), strict=True):
        handle.set_active(True)
        handle.weight = weight
    wanted = y + 0.5 * (alone[0] - y) + 2.0 * (alone[1] - y)
    torch.testing.assert_close(module(x, r), wanted, rtol=1e-10, atol=1e-10)
    for handle in handles:
        handle.weight = 1.0
    with ak.torch.route(model, ["b", None, "a"]):
        torch.testing.assert_close(module(x, r), torch.stack([alone[1][0], y[1], alone[0][2]]), rtol=1e-10, atol=1e-10)
    for handle in handles:
        handle.remove()
    assert torch.equal(module(x, r), y)


@pytest.mark.parametrize("method", OUTPUTS)
@settings(max_examples=10)
@given(data=st.data())
def test_any_update_runs_on_its_layer_or_is_refused_by_name(method, data, made):
    update = data.draw(made.updates(method=method, kernel=()))
    model, x = Called(nn.Linear(16, 8), states_for(update, 2, 3)).double(), torch.randn(2, 3, 16).double()
    live = update.replace(**{name: "" for name in ("residual", "norm") if hasattr(update, name)})
    if getattr(live, "parallel", False) or getattr(live, "reverse", False) or method == "shadow":
        with pytest.raises((ShapeMismatch, Unsupported)) as raised:
            ak.torch.inject(model, Adapter({Target("m"): (live,)}))
        assert raised.value.where == f"m: {method}"
        return
    if live.lacks_experts:
        with pytest.raises(UsageError, match="Pass experts="):
            ak.torch.inject(model, Adapter({Target("m"): (live,)}))
        return
    ak.torch.inject(model, Adapter({Target("m"): (live,)}))
    assert model(x, **call_for(method, 2, 3)).shape == (2, 3, 8)


@pytest.mark.parametrize("method", [m for m in OUTPUTS if "initial" in vars(METHODS[m])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_update_changes_nothing_and_trains_all_of_itself(method, dtype):
    torch.manual_seed(0)
    model, x = Called(nn.Linear(16, 8)).to(dtype).requires_grad_(False), torch.randn(8, 6, 16).to(dtype)
    goal, call = torch.randn(8, 6, 8).to(dtype), call_for(method, 8, 6)
    y = model(x)
    fresh = ak.torch.create(model, method, targets="m", rank=4, **NEEDS.get(method, {}))
    handle = ak.torch.inject(model, fresh, trainable=True)
    torch.testing.assert_close(model(x, **call), y, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    before = [parameter.detach().clone() for parameter in handle.parameters()]
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = functional.mse_loss(model(x, **call), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(handle.parameters(), before, strict=True))
    trained, now = handle.adapter(), model(x, **call)
    handle.remove()
    ak.torch.inject(model, trained)
    torch.testing.assert_close(model(x, **call), now)


@pytest.mark.parametrize(
    ("kind", "targets", "attributes"),
    [
        ("bert", "layer.*.output", {"original_ln_before": True}),
        ("gpt2", "h.*.mlp", {"residual": "ln_2", "original_ln_before": True}),
        ("llama", "layers.?", {}),
        ("t5", ["SelfAttention", "DenseReluDense"], {"residual": "layer_norm", "parallel": True}),
    ],
)
def test_fresh_bottlenecks_for_modules_without_a_weight(kind, targets, attributes, hub, hub_model):
    model = hub_model(kind, torch.float64)
    y = run(model, kind, hub)
    fresh = ak.torch.create(model, "bottleneck", targets=targets, rank=3, **attributes)
    assert {update.up.shape for _, update in fresh} == {(8, 3)}
    handle = ak.torch.inject(model, fresh)
    torch.testing.assert_close(run(model, kind, hub), y, rtol=1e-12, atol=1e-12)
    handle.remove()
    trained = fresh.map(lambda leaf: torch.randn_like(leaf, dtype=torch.float64))
    handle = ak.torch.inject(model, trained)
    assert (run(model, kind, hub) - y).abs().max() > 0.1
    handle.remove()


@pytest.mark.parametrize("kind", ["bert", pytest.param("gpt2", marks=pytest.mark.long)])
def test_a_whole_model_compiles(kind, hub, hub_model):
    model = hub_model(kind, torch.float64)
    handle = ak.torch.inject(model, ak.read(HUB / f"{kind}.pfeiffer.safetensors"))
    eager = run(model, kind, hub)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, kind, hub), eager, rtol=1e-9, atol=1e-9)
    handle.remove()


def test_a_closing_module_is_compiled_whole_and_exported():
    model = nn.ModuleDict({"m": Closing(nn.Linear(5, 8), nn.LayerNorm(8))}).double()
    inputs = torch.randn(2, 5).double(), torch.randn(2, 8).double()
    ak.torch.inject(model, Adapter({Target("m"): (bottleneck(original_ln_before=True),)}))
    wanted = model["m"](*inputs)
    compiled = torch.compile(model["m"], backend="eager", fullgraph=True)
    try:
        torch.testing.assert_close(compiled(*inputs), wanted, rtol=1e-12, atol=1e-12)
    except torch._dynamo.exc.Unsupported:
        # Before torch 2.13 the compiler cannot trace through some versions of array-api-compat, and says so.
        assert torch.__version__ < "2.13"
        torch.testing.assert_close(model["m"](*inputs), wanted)
    exported = torch.export.export(model["m"], inputs, strict=False).module()
    torch.testing.assert_close(exported(*inputs), wanted, rtol=1e-12, atol=1e-12)


REFUSED = [
    ("m.dense", {"hidden": 6}, ShapeMismatch, "made for another number of channels.*hidden=6"),
    ("m.dense", {"parallel": True}, Unsupported, "runs parallel"),
    ("m.dense", {"residual": "firts"}, TargetNotFound, "no module 'firts'"),
    ("m.dense", {"norm": "last", "original_ln_after": False}, Unsupported, "norm cannot be skipped"),
    ("m.dense", {"non_linearity": "snake"}, Unsupported, "the value 'snake' is unknown"),
    ("m.dense", {"residual_before_ln": "maybe"}, Unsupported, "the value 'maybe' is unknown"),
    ("m.nothing", {}, TargetNotFound, "not in the base"),
    ("listed", {}, Unsupported, "does not define a forward"),
    ("attn.out_proj", {}, Unsupported, "never calls its output projection"),
]


@pytest.mark.parametrize(("path", "attributes", "error", "why"), REFUSED, ids=[case[3] for case in REFUSED])
def test_what_cannot_be_attached_is_refused_with_target_and_cure(path, attributes, error, why):
    model = nn.ModuleDict(
        {
            "m": Block(nn.Linear(5, 8), nn.LayerNorm(8)),
            "listed": nn.ModuleList([nn.Linear(8, 8)]),
            "attn": nn.MultiheadAttention(8, 2),
        }
    ).double()
    with pytest.raises(error, match=why) as raised:
        ak.torch.inject(model, Adapter({Target(path): (bottleneck(**attributes),)}))
    assert path in str(raised.value.where)
    assert raised.value.cure
    assert "forward" not in {name for module in model.modules() for name in module.__dict__}


def test_order_and_places_that_contradict_each_other_are_refused():
    model = nn.ModuleDict({"m": Block(nn.Linear(8, 8), None)}).double()
    lora = METHODS["lora"](A=torch.randn(2, 8).double(), B=torch.randn(8, 2).double())
    reft = METHODS["reft"](source=torch.randn(2, 8).double(), projection=torch.randn(2, 8).double())
    placed = bottleneck(residual="first")
    for updates, why in (
        ((placed, bottleneck()), "name different modules"),
        ((reft, placed), "after the residual is added, and the next update changes it before"),
    ):
        with pytest.raises(Unsupported, match=why):
            ak.torch.inject(model, Adapter({Target("m.dense"): updates}))
    with pytest.raises(Malformed, match="an update of the weight follows an update of the output"):
        ak.torch.inject(model, Adapter({Target("m.dense"): (bottleneck(), lora)}))


def test_faults_that_only_a_pass_can_show_name_the_target():
    model, x = nn.ModuleDict({"m": Block(nn.Sequential(nn.Linear(8, 8)), None)}).double(), torch.randn(2, 8).double()
    handle = ak.torch.inject(model, Adapter({Target("m.dense"): (bottleneck(hidden=6),)}))
    with pytest.raises(ShapeMismatch, match=r"m\.dense: the update was made for 6 channels, but .* has 8"):
        model["m"](x, x)
    handle.remove()
    ak.torch.inject(model, Adapter({Target("m.dense"): (bottleneck(residual="first"),)}))
    with pytest.raises(Unsupported, match=r"m\.dense: the module whose input is the residual was not called"):
        model["m"].dense(x)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("bottleneck", ("norm_before",)),
        ("bottleneck", ("gate_bias",)),
        ("bottleneck", ("scaling_factor", "channel_scaling")),
        ("compacter", ("down_rule", "down_rule_left")),
        ("reft", ("suffix_source",)),
    ],
)
def test_tensors_that_do_not_go_together_are_named(method, fields):
    cls = METHODS[method]
    needed = {name for name, field in cls.tensor_fields().items() if not field.metadata["optional"]}
    with pytest.raises(ak.errors.Malformed, match="needs exactly one of"):
        cls(**dict.fromkeys({*needed, *fields}, as_torch(torch.ones(1)))).check()


@pytest.mark.parametrize("method", OUTPUTS)
def test_an_output_update_is_not_merged(method, tmp_path):
    adapter = ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit")
    path = next(target.path for target in adapter.updates)
    with pytest.raises(NotMergeable, match=re.escape(f"{method} changes {METHODS[method].acts_on}, not")):
        ak.merge(
            VECTORS / f"{method}.expected.safetensors", adapter.replace(updates=adapter.find(path)), tmp_path / "out"
        )


def test_a_module_of_a_base_is_found_and_not_merged(tmp_path):
    adapter = Adapter({Target("encoder.layer.0.output"): (bottleneck(),)})
    assert adapter.bind(HUB / "models" / "bert") is not adapter
    with pytest.raises(NotMergeable, match="changes the output of the layer"):
        ak.merge(HUB / "models" / "bert", adapter, tmp_path / "out")
