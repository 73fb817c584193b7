"""The fused low-rank layer: the formula's values and gradients, and less kept for the backward pass than PEFT keeps."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError
from adapterkit.methods import METHODS
from adapterkit.torch import forward_hook as hooks
from adapterkit.torch import lean

pytestmark = pytest.mark.filterwarnings("ignore")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lora(out, into, rank=2, seed=0):
    return METHODS["lora"](A=draw(rank, into, seed=seed), B=draw(out, rank, seed=seed + 50), scaling=0.25)


@pytest.fixture
def fused(monkeypatch):
    """The fused functions run for inputs of any size."""
    monkeypatch.setattr(lean, "SMALL", 0)


@pytest.fixture
def calls(monkeypatch):
    """Which fused functions ran, for inputs of any size: names, in order."""
    monkeypatch.setattr(lean, "SMALL", 0)
    seen = []
    for name in ("_LowRankLinear", "_LowRankSum", "_ScaledLinear"):
        kind = getattr(lean, name)
        apply = kind.apply
        monkeypatch.setattr(kind, "apply", lambda *args, name=name, apply=apply: (seen.append(name), apply(*args))[1])
    return seen


def fresh(model, method):
    """An adapter of a method, with all that is trained moved away from its start; None where it has no fresh one."""
    try:
        adapter = ak.torch.create(model, method, targets="0", rank=1, seed=1)
    except AdapterkitError:
        return None
    ((_, update),) = adapter
    moved = {
        name: leaf.double() + (0.2 * draw(*leaf.shape, seed=3) if name not in update.frozen else 0)
        for name, leaf in update.tensors.items()
        if leaf.is_floating_point()
    }
    return Adapter({Target("0"): (update.replace(**moved),)})


def gradients(model, handle, x, out):
    leaves = [x, *handle.parameters()]
    return torch.autograd.grad((model(x) * out).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_every_thin_method_has_the_gradients_of_its_formula(weight, calls, close):
    seen, x, out = [], draw(2, 3, 24).requires_grad_(), draw(2, 3, 24, seed=9)
    for method, cls in METHODS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24)).double()
        if cls.kind != "additive" or (adapter := fresh(model, method)) is None:
            continue
        handle = ak.torch.inject(model, adapter, trainable=True, weight=weight)
        (hook,) = hooks.hooks_of(model)
        if not all(hook.ranks.values()):
            continue
        seen.append(method)
        y, got = model(x), gradients(model, handle, x, out)
        hook.ranks, hook.plain = dict.fromkeys(hook.ranks, 0), False  # The method's own forward, by autograd.
        close(y, model(x), tolerance=1e-12)
        for one, other in zip(got, gradients(model, handle, x, out), strict=True):
            assert (one is None) == (other is None), method
            if one is not None:
                close(one, other, out, tolerance=1e-10)
    assert {"lora", "vera", "adalora", "lora_xs", "nola"} <= set(seen)
    assert set(calls) == {"_LowRankLinear"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scaled_rows_have_the_gradients_of_their_new_weight(dtype, calls, monkeypatch):
    """Every method that says its formula as s * (W + B A): in training without a new weight, DoRA among them."""
    seen, x, out = [], draw(2, 3, 24, dtype=dtype).requires_grad_(), draw(2, 3, 24, seed=9, dtype=dtype)
    for method, cls in METHODS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24)).to(dtype)
        if cls.kind != "weight" or (adapter := fresh(model, method)) is None:
            continue
        ((_, update),) = adapter
        W = model[0].weight.detach().double()
        if (found := update.scaled_factors(W)) is None:
            continue
        s, B, A = found
        torch.testing.assert_close(s[:, None] * (W + B @ A), update.new_weight(W))
        handle = ak.torch.inject(
            model, adapter.map(lambda leaf: leaf.float().to(torch.promote_types(dtype, torch.float32))), trainable=True
        )
        del calls[:]
        y, got = model(x), gradients(model, handle, x, out)
        assert calls == ["_ScaledLinear"] * 2
        seen.append(method)
        with monkeypatch.context() as plain:
            plain.setattr(hooks.ForwardHook, "_scaled", lambda *_: None)
            z, wanted = model(x), gradients(model, handle, x, out)
        loose = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        for one, other in zip((y, *got), (z, *wanted), strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=loose, atol=loose * float(other.detach().abs().max()))
    assert "dora" in seen


def test_derivatives_of_scaled_rows():
    W, b = draw(8, 16), draw(8, seed=5)
    given = [draw(*shape, seed=n).requires_grad_() for n, shape in enumerate([(3, 16), (8,), (2, 16), (8, 2)])]
    for bias in (None, b):
        run = lambda x, s, A, B, bias=bias: lean.scaled_linear(x, W, bias, s, A, B)  # noqa: E731
        torch.testing.assert_close(
            run(*given), nn.functional.linear(given[0], given[1][:, None] * (W + given[3] @ given[2]), bias)
        )
        torch.autograd.gradcheck(run, given)
        torch.autograd.gradgradcheck(run, given)


class Conv1D(nn.Sequential):
    def __init__(self):
        super().__init__(transformers.pytorch_utils.Conv1D(8, 16))


KINDS = {
    "frozen linear": (lambda: nn.Sequential(nn.Linear(16, 8)), True, "out *in", "_LowRankLinear"),
    "no bias": (lambda: nn.Sequential(nn.Linear(16, 8, bias=False)), True, "out *in", "_LowRankLinear"),
    "trained linear": (lambda: nn.Sequential(nn.Linear(16, 8)), False, "out *in", "_LowRankSum"),
    "GPT-2's": (Conv1D, True, "in out *k", "_LowRankSum"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives(kind, calls, close):
    make, frozen, layout, name = KINDS[kind]
    torch.manual_seed(0)
    model = make().double()
    adapters = [Adapter({Target("0", layout=layout): (lora(8, 16, seed=s),)}) for s in (0, 1)]
    handles = [
        ak.torch.inject(model, adapter, name=str(s), trainable=True, freeze=frozen, weight=1 - s / 2)
        for s, adapter in enumerate(adapters)
    ]
    x = draw(3, 16).requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) >= 4
    run = lambda x, *_: model(x)  # noqa: E731
    torch.autograd.gradcheck(run, (x, *trained))
    torch.autograd.gradgradcheck(run, (x, *trained))
    assert name in calls
    W = model[0].weight.T if layout == "in out *k" else model[0].weight
    wanted = nn.functional.linear(x, W, model[0].bias)
    for handle, adapter in zip(handles, adapters, strict=True):
        ((_, update),) = adapter
        wanted = wanted + handle.weight * x @ update.delta((8, 16)).T
    close(model(x), wanted, tolerance=1e-12)


def trained(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    return model, ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16),)}), trainable=True)


def formula(model, handle, x):
    A, B = handle.parameters()
    return nn.functional.linear(x, model[0].weight + 0.25 * B @ A, model[0].bias)


def test_transforms_take_the_plain_formula(calls, close):
    model, handle = trained()
    x = draw(3, 16)
    parameters = dict(model.named_parameters())

    def loss(values, one):
        return torch.func.functional_call(model, values, (one,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            for row in range(3):
                (wanted,) = torch.autograd.grad(formula(model, handle, x[row]).square().sum(), [parameter])
                close(each[name][row], wanted, tolerance=1e-12)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, draw(3, 16, seed=4)))).tangent
    close(tangent, formula(model, handle, draw(3, 16, seed=4)) - model[0].bias, tolerance=1e-12)
    jacobian = torch.autograd.functional.jacobian(model, x[:1], vectorize=True)
    close(
        jacobian[0, :, 0],
        model[0].weight + 0.25 * list(handle.parameters())[1] @ next(handle.parameters()),
        tolerance=1e-12,
    )
    traced = torch.jit.trace(model, (x,), check_trace=False)
    close(traced(2 * x), formula(model, handle, 2 * x), tolerance=1e-12)
    del calls[:]
    model(x)
    assert calls == ["_LowRankLinear"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, calls, close):
    model, handle = trained()
    x = draw(3, 16).requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    wanted = torch.autograd.grad(formula(model, handle, x).square().sum(), [x, *handle.parameters()])
    for leaf, gradient in zip([x, *handle.parameters()], wanted, strict=True):
        close(leaf.grad, gradient, tolerance=1e-12)
    assert calls


@pytest.mark.parametrize("nested", [False, True])
def test_autocast_rounds_as_the_plain_formula(nested, calls, monkeypatch):
    model, handle = trained(torch.float32)
    x = draw(3, 16, dtype=torch.float32).requires_grad_()
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(lean, "_takes", lambda *_: False)
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.bfloat16, enabled=not nested):
            y = model(x)
        results.append((y, torch.autograd.grad(y.float().square().sum(), [x, *handle.parameters()])))
    assert calls
    (y, got), (z, wanted) = results
    assert y.dtype == z.dtype == (torch.float32 if nested else torch.bfloat16)
    for one, other in zip((y, *got), (z, *wanted), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.detach().abs().max()))


def saved(run):
    """Sizes in bytes of what autograd keeps of a forward, by storage, parameters and the input aside."""
    sizes, held = {}, []

    def pack(tensor):
        held.append(tensor)
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sizes, (out, held)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_numbers_of_16_bits_are_as_precise_as_with_factors_of_32(method, dtype, calls, monkeypatch):
    """A thin product in bfloat16 rounds three times, and is slow on a CPU without instructions for it."""
    monkeypatch.setattr(lean, "BLOCK", 5 * 48)  # Blocks of five rows, the last one shorter.
    monkeypatch.setattr(lean, "ROWS", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48)).to(dtype)
    adapter = ak.torch.create(model, method, targets="0", rank=4)
    moved = adapter.map(lambda leaf: leaf + 0.1 * draw(*leaf.shape, dtype=leaf.dtype))
    ((_, update),) = moved
    handle = ak.torch.inject(model, moved, trainable=True)
    x, out = draw(2, 6, 32, dtype=dtype).requires_grad_(), draw(2, 6, 48, seed=9, dtype=dtype)
    y = model(x)
    y.backward(out)
    assert calls
    exact = x.detach().double().requires_grad_()
    double = update.map(lambda leaf: leaf.double())
    leaves = {name: leaf.requires_grad_() for name, leaf in double.tensors.items()}
    W, b = model[0].weight.double(), model[0].bias.double()
    wanted = nn.functional.linear(exact, double.replace(**leaves).new_weight(W), b)
    wanted.backward(out.double())
    small = torch.finfo(dtype).eps
    assert float((y.double() - wanted).abs().max()) <= 2 * small * float(wanted.abs().max())
    assert float((x.grad.double() - exact.grad).abs().max()) <= 3 * small * float(exact.grad.abs().max())
    for name, parameter in handle.named_parameters():
        assert parameter.grad.dtype == torch.float32
        good = leaves[name.rpartition(".")[2]].grad
        loose = 2 * small if name.endswith("magnitude") else 1e-5  # Factors see exact inputs.
        if method == "dora":
            loose = 4 * small
        assert float((parameter.grad.double() - good).abs().max()) <= loose * float(good.abs().max()), name


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [5 * 48, 1 << 19])
def test_the_gradient_of_16_bit_inputs_is_rounded_once(block, dtype, native, calls, monkeypatch):
    """Without 16-bit instructions torch multiplies a gradient by a weight 50 times slower than in float32."""
    monkeypatch.setattr(lean, "BLOCK", block)
    monkeypatch.setattr(lean, "ROWS", 1)
    monkeypatch.setattr(lean, "_multiplies", lambda _: native)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48)).to(dtype)
    update = lora(48, 32, rank=4).map(lambda leaf: leaf.float())
    ak.torch.inject(model, Adapter({Target("0"): (update,)}), trainable=True)
    x, out = draw(2, 6, 32, dtype=dtype).requires_grad_(), draw(2, 6, 48, seed=9, dtype=dtype)
    model(x).backward(out)
    assert calls == ["_LowRankLinear"]
    W = model[0].weight.detach().double() + 0.25 * update.B.float().double() @ update.A.float().double()
    exact = out.double() @ W
    step = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()  # The distance of neighbours.
    error = (x.grad.double() - exact).abs()
    if native:  # The product with W is rounded by itself; its errors are of the size of its terms.
        assert float(error.max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    else:
        assert bool((error <= 0.502 * step + 1e-5).all())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.gate, self.up = (nn.Linear(32, 48) for _ in range(5))

    def forward(self, x):
        x = self.norm(x)
        return self.q(x), self.k(x), self.v(x), self.gate(x), self.up(x)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_input_is_kept_for_all_that_read_it(dtype, method):
    torch.manual_seed(0)
    model = Attention().to(dtype)
    ak.torch.inject(model, ak.torch.create(model, method, rank=4, alpha=8), trainable=True)
    x = draw(64, 32, dtype=dtype)
    sizes, _ = saved(lambda: model(x))
    factors = {4 * 32 * 4, 4 * 48 * 4}  # In float32, times a scaling.
    rows = [size for size in sizes.values() if size >= 64 * 4 * dtype.itemsize and size not in factors]
    wanted = [64 * 32 * dtype.itemsize]  # The norm's output, once; nothing of rank 4.
    if method == "dora":
        wanted += 5 * [64 * 48 * dtype.itemsize]  # Each layer's output before its magnitude, for the gradient of that.
    assert sorted(rows) == wanted


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_forward_keeps_less_than_pefts(dtype, method):
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).to(dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(target_modules=targets, r=4, lora_alpha=8, use_dora=method == "dora")
    theirs = get_peft_model(copy.deepcopy(model), config)
    ak.torch.inject(model, ak.torch.create(model, method, targets=targets, rank=4, alpha=8), trainable=True)
    ids = torch.arange(8 * 32).reshape(8, 32) % 29
    ours, _ = saved(lambda: model(ids).logits)
    peft, _ = saved(lambda: theirs(ids).logits)
    assert sum(ours.values()) < sum(peft.values())


def test_outputs_that_somebody_keeps_are_not_written_over():
    """A forward patched on the instance may return a tensor that it still has."""
    model, kept = nn.Sequential(nn.Linear(16, 8)).double(), []
    own = model[0].forward

    def forward(x):
        if not kept:
            kept.append(own(x))
        return kept[0]

    model[0].forward = forward
    ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16),)}))
    x = draw(3, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(x)
        before = nn.functional.linear(x, model[0].weight, model[0].bias)
        assert torch.equal(kept[0], before)
        assert not torch.allclose(y, before)


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (2, 3, 4, 16)])
def test_inputs_of_any_shape(shape, close):
    model, handle = trained()
    x = draw(*shape).requires_grad_()
    y = model(x)
    wanted = formula(model, handle, x)
    assert y.shape == wanted.shape
    if x.numel():
        close(y, wanted, tolerance=1e-12)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_inputs(close):
    model, handle = trained()
    x = draw(16, 5).T
    close(model(x), formula(model, handle, x), tolerance=1e-12)
    x = draw(1, 16).expand(7, 16).requires_grad_()
    model(x).sum().backward()
