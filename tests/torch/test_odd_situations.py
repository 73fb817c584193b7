"""Odd situations of live models: each gives what the formula gives, or a typed error. None is silently wrong.

A situation is a function that returns what the model gave and what the formula gives, or that raises. `odd` lists it
by name, with the error that it must raise where it cannot be right.
"""

import copy
import io
import itertools
import pickle
import tempfile

import pytest
import torch
from situations import Situations, X, changed, draw, inject, lora, one
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import (
    AdapterkitError,
    Malformed,
    NotMergeable,
    ShapeMismatch,
    TargetNotFound,
    Unsupported,
    UsageError,
)
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).double()


def linear(layer, x=X):
    return functional.linear(x.to(layer.weight.dtype), changed(layer.weight), layer.bias)


# Wrapped, replaced, moved, deleted.


@odd("wrapped in DataParallel")
def _():
    model = one()
    inject(model)
    return nn.DataParallel(model)(X), linear(model[0])


@odd("injected into a wrapper")
def _():
    model = nn.DataParallel(one())
    ak.torch.inject(model, Adapter({Target("module.0"): (lora(8, 16),)}))
    return model(X), linear(model.module[0])


@odd("the adapted module is wrapped afterwards")
def _():
    model = one()
    inject(model)
    kept = model[0]
    model[0] = nn.Sequential(kept)
    return model(X), linear(kept)


@odd("the adapted module is replaced", raises=Unsupported, match="no longer in the model")
def _():
    model = one()
    inject(model)
    model[0] = nn.Linear(16, 8).double()
    model(X)


@odd("the adapted module is deleted", raises=Unsupported, match="no longer in the model")
def _():
    model = two()
    inject(model, "1", 8, 8)
    del model[1]
    model(X)


@odd("modules of a list change places")
def _():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).double()
    inject(model, "0", 16, 16)
    first, second = model[0], model[1]
    model[0], model[1] = second, first
    return model(X), linear(first, second(X))


@odd("the replaced module is put back")
def _():
    model = one()
    inject(model)
    kept = model[0]
    model[0] = nn.Linear(16, 8).double()
    with pytest.raises(Unsupported):
        model(X)
    model[0] = kept
    return model(X), linear(kept)


@odd("one module under two names")
def _():
    layer = nn.Linear(16, 16).double()
    model = nn.Sequential(layer, layer)
    inject(model, "0", 16, 16)
    return model(X), linear(layer, linear(layer))


@odd("one module under two names, an adapter with another update for each", raises=Unsupported, match="same module")
def _():
    layer = nn.Linear(16, 16).double()
    updates = {Target(str(seed)): (lora(16, 16, seed=seed),) for seed in (0, 1)}
    ak.torch.inject(nn.Sequential(layer, layer), Adapter(updates))


@odd("one module under two names, an adapter that names both, merged")
def _():
    layer = nn.Linear(16, 16).double()
    model, update = nn.Sequential(layer, layer), lora(16, 16)
    handle = ak.torch.inject(model, Adapter({Target("0"): (update,), Target("1"): (update,)}), trainable=True)
    assert len(handle.adapter().updates) == 2
    assert len(list(handle.parameters())) == 2
    wanted = linear(layer, linear(layer)).detach()
    handle.merge_()
    return model(X), wanted


@odd("one module under two names, an adapter that names both")
def _():
    layer = nn.Linear(16, 16).double()
    model = nn.Sequential(layer, layer)
    update = lora(16, 16)
    ak.torch.inject(model, Adapter({Target("0"): (update,), Target("1"): (update,)}))
    return model(X), linear(layer, linear(layer))


@odd("a module called twice in one forward")
def _():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice().double()
    inject(model, "layer", 16, 16)
    return model(X), linear(model.layer, linear(model.layer))


# Shared memory and tied parameters.


@odd("two parameters on one storage")
def _():
    model = two()
    model[1].weight = nn.Parameter(model[0].weight.data[:, :8])
    inject(model)
    return model[0](X), linear(model[0])


@odd("two parameters on one storage, merged", raises=NotMergeable, match="shares its memory")
def _():
    model = two()
    model[1].weight = nn.Parameter(model[0].weight.data[:, :8])
    inject(model).merge_()


@odd("a weight whose elements share memory, merged", raises=NotMergeable)
def _():
    model = one()
    model[0].weight = nn.Parameter(draw(1, 16).expand(8, 16))
    inject(model).merge_()


@odd("a weight stored transposed, merged")
def _():
    model = one()
    model[0].weight = nn.Parameter(draw(16, 8).T)
    wanted = linear(model[0])
    inject(model).merge_()
    return model(X), wanted


@odd("a tied head, merged alone", raises=NotMergeable)
def _():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8)).double()
    model[1].weight = model[0].weight
    inject(model).merge_()


@odd("a shared module in shared memory")
def _():
    model = one().share_memory()
    inject(model)
    return model(X), linear(model[0])


# Weights that are not there, or not plain.


@odd("a weight on the meta device", raises=Unsupported, match="meta device")
def _():
    inject(nn.Sequential(nn.Linear(16, 8, device="meta")))


@odd("meta, then load_state_dict(assign=True)")
def _():
    model = nn.Sequential(nn.Linear(16, 8, device="meta", dtype=torch.float64))
    model.load_state_dict(one().state_dict(), assign=True)
    inject(model)
    return model(X), linear(model[0])


@odd("load_state_dict(assign=True) after injecting")
def _():
    model = one()
    inject(model)
    model.load_state_dict({"0.weight": draw(8, 16, seed=3), "0.bias": draw(8, seed=4)}, assign=True)
    return model(X), functional.linear(X, changed(draw(8, 16, seed=3)), draw(8, seed=4))


@odd("moved to meta after injecting")
def _():
    model = one()
    inject(model)
    out = model.to("meta")(X.to("meta"))
    assert out.device.type == "meta"
    return torch.zeros(1), torch.zeros(1)


@odd("moved to meta and called with real numbers", raises=(Unsupported, RuntimeError))
def _():
    model = one()
    inject(model)
    model.to("meta")(X)


@odd("a weight that went to meta after injecting", raises=Unsupported, match="meta")
def _():
    model = one()
    inject(model)
    model[0].weight = nn.Parameter(model[0].weight.to("meta"))
    model(X)


@odd("a lazy module before its first forward", raises=Unsupported)
def _():
    inject(nn.Sequential(nn.LazyLinear(8)))


@odd("a lazy module after its first forward")
def _():
    model = nn.Sequential(nn.LazyLinear(8)).double()
    model(X)
    inject(model)
    return model(X), linear(model[0])


@odd("a sparse weight")
def _():
    model = one()
    dense = model[0].weight.detach()
    model[0].weight = nn.Parameter(dense.to_sparse_csr(), requires_grad=False)
    inject(model)
    return model(X), functional.linear(X, changed(dense), model[0].bias)


@odd("a sparse weight, merged", raises=NotMergeable)
def _():
    model = one()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr(), requires_grad=False)
    inject(model).merge_()


@odd("a complex weight", raises=AdapterkitError)
def _():
    model = nn.Sequential(nn.Linear(16, 8, dtype=torch.complex64))
    inject(model)
    model(X.to(torch.complex64))


@odd("an int8 weight with its scale beside it", raises=Unsupported)
def _():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
            self.register_buffer("scale", torch.ones(8, 1))

        def forward(self, x):
            return functional.linear(x, self.weight * self.scale)

    inject(nn.Sequential(Packed()))


@odd("a packed weight in a buffer", raises=(Unsupported, TargetNotFound, ShapeMismatch))
def _():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.ones(8, 2, dtype=torch.int32))

        def forward(self, x):
            return x

    inject(nn.Sequential(Packed()))


@odd("a weight of a tensor subclass, merged", raises=NotMergeable)
def _():
    class Own(torch.Tensor):
        pass

    model = one()
    handle = inject(model)
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Own))
    handle.merge_()


# Compilers, tracers and transforms.


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


@odd("compiled before injecting")
def _():
    model = one()
    fast = compiled(model)
    fast(X)
    inject(model)
    return fast(X), linear(model[0])


@odd("compiled after injecting, removed")
def _():
    model = one()
    handle = inject(model)
    fast = compiled(model)
    assert not torch.allclose(fast(X), model[0]._adapterkit_hook.original(X))
    handle.remove()
    return fast(X), functional.linear(X, model[0].weight, model[0].bias)


@odd("injected into a compiled model")
def _():
    model = compiled(one())
    ak.torch.inject(model, Adapter({Target("_orig_mod.0"): (lora(8, 16),)}))
    return model(X), linear(model._orig_mod[0])


@odd("compiled, then the weight is set")
def _():
    model = one()
    handle = inject(model)
    fast = compiled(model)
    fast(X)
    handle.weight = 0.0
    return fast(X), functional.linear(X, model[0].weight, model[0].bias)


@odd("torch.export")
def _():
    model = one()
    inject(model)
    return torch.export.export(model, (X,)).module()(2 * X), linear(model[0], 2 * X)


@odd("torch.jit.trace")
def _():
    model = one()
    inject(model)
    return torch.jit.trace(model, (X,), check_trace=False)(2 * X), linear(model[0], 2 * X)


@odd("a scripted module as target", raises=AdapterkitError)
def _():
    model = nn.Sequential(torch.jit.script(nn.Linear(16, 8).double()))
    inject(model)
    model(X)


@odd("a scripted module beside the target")
def _():
    model = nn.Sequential(nn.Linear(16, 8), torch.jit.script(nn.Linear(8, 4))).double()
    inject(model)
    return model(X), model[1](linear(model[0]))


@odd("torch.fx.symbolic_trace")
def _():
    model = one()
    inject(model)
    return torch.fx.symbolic_trace(model)(X), linear(model[0])


@odd("functional_call with other weights of the base")
def _():
    model = one()
    inject(model)
    given = {"0.weight": draw(8, 16, seed=3)}
    return torch.func.functional_call(model, given, (X,)), functional.linear(
        X, changed(given["0.weight"]), model[0].bias
    )


@odd("vmap")
def _():
    model = one()
    inject(model)
    return torch.func.vmap(model)(X), linear(model[0])


@odd("an ensemble by stack_module_state")
def _():
    models = [one() for _ in range(2)]
    for seed, model in enumerate(models):
        ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16, seed=seed),)}))
    values, buffers = torch.func.stack_module_state(models)
    skeleton = models[0]

    def run(v, b):
        return torch.func.functional_call(skeleton, (v, b), (X,))

    wanted = [functional.linear(X, changed(m[0].weight, seed=s), m[0].bias) for s, m in enumerate(models)]
    return torch.func.vmap(run)(values, buffers), torch.stack(wanted)


@odd("quantize_dynamic", raises=Unsupported, match="no longer in the model")
def _():
    torch.backends.quantized.engine = "fbgemm"
    model = one().float()
    inject(model)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)(X.float())


@odd("fuse_modules of a convolution and its norm", raises=Unsupported)
def _():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    inject(model, "0", 4, 3, 3, 3)
    torch.ao.quantization.fuse_modules(model, [["0", "1"]])(draw(2, 3, 5, 5))


@odd("fuse_modules in place", raises=Unsupported)
def _():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    inject(model, "0", 4, 3, 3, 3)
    torch.ao.quantization.fuse_modules(model, [["0", "1"]], inplace=True)(draw(2, 3, 5, 5))


# Copies.


@odd("deepcopy")
def _():
    model = one()
    inject(model)
    twin = copy.deepcopy(model)
    ak.torch.handles(model)["default"].remove()
    return twin(X), linear(twin[0])


@odd("deepcopy of the adapted module alone")
def _():
    model = one()
    inject(model)
    return copy.deepcopy(model[0])(X), linear(model[0])


@odd("copy.copy")
def _():
    model = one()
    inject(model)
    return copy.copy(model)(X), linear(model[0])


@odd("pickle")
def _():
    model = one()
    inject(model)
    twin = pickle.loads(pickle.dumps(model))
    return twin(X), linear(model[0])


@odd("torch.save of the whole model")
def _():
    model, file = one(), io.BytesIO()
    inject(model)
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(X), linear(model[0])


@odd("a strict state dict both ways")
def _():
    model = one()
    inject(model)
    model.load_state_dict(one().state_dict(), strict=True)
    other = one()
    other.load_state_dict(model.state_dict(), strict=True)
    return model(X), linear(other[0])


# Hooks and forwards of others.


@odd("a forward hook of another tool, before")
def _():
    model = one()
    model[0].register_forward_hook(lambda _m, _a, y: 2 * y)
    inject(model)
    return model(X), 2 * linear(model[0])


@odd("forward hooks of another tool, after")
def _():
    model = one()
    handle = inject(model)
    model[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda _m, _a, y: 2 * y)
    first, wanted = model(X), 2 * linear(model[0], X + 1)
    handle.remove()
    assert torch.equal(model(X), 2 * functional.linear(X + 1, model[0].weight, model[0].bias))
    return first, wanted


@odd("a full backward hook")
def _():
    model, seen = one(), []
    inject(model, trainable=True)
    model[0].register_full_backward_hook(lambda _m, into, _out: seen.append(into[0]))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    wanted = torch.ones(3, 8, dtype=torch.float64) @ changed(model[0].weight)
    return seen[0], wanted


@odd("a global forward hook")
def _():
    model = one()
    inject(model)
    hook = nn.modules.module.register_module_forward_hook(lambda m, _a, y: 2 * y if m is model[0] else y)
    out = model(X)
    hook.remove()
    return out, 2 * linear(model[0])


@odd("forward patched on the instance, before")
def _():
    model = one()
    own = model[0].forward
    model[0].forward = lambda x: 3 * own(x)
    inject(model)
    base = 3 * functional.linear(X, model[0].weight, model[0].bias)
    change = X @ lora(8, 16).delta((8, 16)).T
    return model(X) - base, change


@odd("forward patched on the instance, after")
def _():
    model = one()
    handle = inject(model)
    own = model[0].forward
    model[0].forward = lambda x: 3 * own(x)
    first, wanted = model(X), 3 * linear(model[0])
    handle.remove()
    assert torch.equal(model(X), 3 * functional.linear(X, model[0].weight, model[0].bias))
    return first, wanted


@odd("hooks of accelerate, before")
def _():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = one()
    add_hook_to_module(model[0], ModelHook())
    inject(model)
    return model(X), linear(model[0])


@odd("hooks of accelerate, after, and taken off again")
def _():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = one()
    inject(model)
    add_hook_to_module(model[0], ModelHook())
    assert torch.allclose(model(X), linear(model[0]))
    remove_hook_from_module(model[0])
    return model(X), linear(model[0])


@odd("offloaded by accelerate, before")
def _():
    from accelerate import cpu_offload

    model = two()
    wanted = linear(model[0])
    cpu_offload(model, torch.device("cpu"))
    inject(model)
    return model[0](X), wanted


@odd("offloaded to disk by accelerate, before")
def _():
    from accelerate import disk_offload

    model = two()
    wanted = model[1](linear(model[0])).detach()
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, torch.device("cpu"))
        handle = inject(model, trainable=True)
        out = model(X)
        out.sum().backward()
        assert all(p.grad is not None for p in handle.parameters())
        handle.remove()
    return out, wanted


@odd("offloaded to disk by accelerate, after")
def _():
    from accelerate import disk_offload

    model = two()
    inject(model)
    wanted = model[1](linear(model[0])).detach()
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, torch.device("cpu"))
        return model(X), wanted


@odd("offloaded to disk by accelerate, DoRA")
def _():
    from accelerate import disk_offload

    model = two()
    update = METHODS["dora"](A=draw(2, 16), B=draw(8, 2), magnitude=draw(8).abs())
    wanted = model[1](functional.linear(X, update.new_weight(model[0].weight), model[0].bias)).detach()
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, torch.device("cpu"))
        ak.torch.inject(model, Adapter({Target("0"): (update,)}), trainable=True)
        return model(X), wanted


@odd("offloaded to disk by accelerate, with a route")
def _():
    from accelerate import disk_offload

    model = two()
    plain, on = model(X).detach(), model[1](linear(model[0])).detach()
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, torch.device("cpu"))
        inject(model, name="a")
        with ak.torch.route(model, ["a", None, "a"]):
            return model(X), torch.stack([on[0], plain[1], on[2]])


@odd("offloaded by accelerate, merged", raises=NotMergeable)
def _():
    from accelerate import cpu_offload

    model = two()
    cpu_offload(model, torch.device("cpu"))
    inject(model).merge_()


# Fast paths of torch.


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()


@odd("TransformerEncoder with its fast path", raises=Unsupported, match="fused path")
def _():
    inject(encoder(), "layers.0.linear1", 32, 16)


@odd(
    "TransformerEncoder's fast path with nested tensors put back afterwards",
    raises=Unsupported, match="enable_nested_tensor=False",
)  # fmt: skip
def _():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).double().eval(), draw(2, 3, 16)
    padding = torch.tensor([[False] * 3, [False, False, True]])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inject(model, "layers.0.linear1", 32, 16)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        model(x, src_key_padding_mask=padding)


@odd("TransformerEncoder, its fast path put back afterwards")
def _():
    model, x = encoder(), draw(2, 3, 16)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inject(model, "layers.0.linear1", 32, 16)
        wanted = model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        return model(x), wanted


@odd("MultiheadAttention's fast path")
def _():
    model, x = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2, batch_first=True)}).double().eval(), draw(2, 3, 16)
    twin = copy.deepcopy(model)
    inject(model, "a.in_proj_weight", 48, 16)
    with torch.no_grad():
        twin.a.in_proj_weight.copy_(changed(twin.a.in_proj_weight))
        return model.a(x, x, x, need_weights=False)[0], twin.a(x, x, x)[0]


@odd("MultiheadAttention with masks of booleans")
def _():
    model, x = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2, batch_first=True)}).double(), draw(2, 3, 16)
    twin = copy.deepcopy(model)
    inject(model, "a.out_proj", 16, 16)
    mask, padding = torch.ones(3, 3).triu(1).bool(), torch.tensor([[False, False, True], [False] * 3])
    with torch.no_grad():
        twin.a.out_proj.weight.copy_(changed(twin.a.out_proj.weight))
    return (m.a(x, x, x, attn_mask=mask, key_padding_mask=padding)[0] for m in (model, twin))


# Reparametrized weights.


@odd("weight_norm before", raises=Unsupported, match="parametrized")
def _():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8))).double()
    inject(model)


@odd("spectral_norm before", raises=Unsupported, match="parametrized")
def _():
    inject(nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 8))).double())


@odd("weight_norm after")
def _():
    model = one()
    inject(model)
    parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    return model(X), linear(model[0])


@odd("a parametrization after that changes nothing but the weight")
def _():
    class Double(nn.Module):
        def forward(self, W):
            return 2 * W

    model = one()
    inject(model)
    parametrize.register_parametrization(model[0], "weight", Double())
    return model(X), linear(model[0])


@odd("parametrized after, merged", raises=NotMergeable)
def _():
    model = one()
    handle = inject(model)
    parametrizations.weight_norm(model[0])
    handle.merge_()


@odd("the old weight_norm after, merged", raises=NotMergeable)
def _():
    model = one()
    handle = inject(model)
    torch.nn.utils.weight_norm(model[0])
    handle.merge_()


@odd("the old weight_norm, by a hook", raises=Unsupported, match="hook computes")
def _():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(16, 8))).double()
    model(X)
    inject(model)


@odd("the old spectral_norm, by a hook", raises=Unsupported, match="hook computes")
def _():
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(16, 8))).double().eval()
    model(X)
    inject(model)


@odd("pruned before", raises=Unsupported, match="hook computes")
def _():
    model = one()
    prune.random_unstructured(model[0], "weight", 0.5)
    inject(model)


@odd("pruned after")
def _():
    model = one()
    inject(model)
    prune.random_unstructured(model[0], "weight", 0.5)
    out = model(X)
    return out, linear(model[0])


@odd("pruned after, merged", raises=NotMergeable, match="computed from other tensors")
def _():
    model = one()
    handle = inject(model)
    prune.random_unstructured(model[0], "weight", 0.5)
    handle.merge_()


# Weights, types and modes that change afterwards.


@odd("model.apply of an initialiser")
def _():
    model = one()
    inject(model)
    model.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None)
    return model(X), functional.linear(X, changed(torch.ones(8, 16, dtype=torch.float64)), model[0].bias)


@odd("the weight is written in place")
def _():
    model = one()
    inject(model)
    model[0].weight.data.copy_(draw(8, 16, seed=3))
    return model(X), functional.linear(X, changed(draw(8, 16, seed=3)), model[0].bias)


@odd("the weight is another parameter")
def _():
    model = one()
    inject(model)
    model[0].weight = nn.Parameter(draw(8, 16, seed=3))
    return model(X), linear(model[0])


@odd("the weight grows", raises=AdapterkitError)
def _():
    model = one()
    inject(model)
    model[0].weight, model[0].bias = nn.Parameter(draw(9, 16)), None
    model(X)


@odd("to another dtype")
def _():
    model = one().float()
    inject(model)
    model.double()
    return model(X), linear(model[0])


@odd("to bfloat16")
def _():
    model = one()
    inject(model)
    model.bfloat16()
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    assert float((out.double() - linear(one()[0])).abs().max()) < 0.2
    return out, out


@odd("channels_last")
def _():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).double(), draw(2, 3, 5, 5)
    inject(model, "0", 4, 3, 3, 3)
    model.to(memory_format=torch.channels_last)
    wanted = functional.conv2d(x, changed(model[0].weight), model[0].bias)
    return model(x.to(memory_format=torch.channels_last)), wanted


@odd("requires_grad_ of the whole model, off and on")
def _():
    model = one()
    handle = inject(model, trainable=True)
    model.requires_grad_(False)
    assert not model(X).requires_grad
    model.requires_grad_(True)
    model(X).sum().backward()
    A, B = handle.parameters()
    return torch.cat([A.grad, B.grad.T], 1), torch.cat(
        [0.25 * B.sum(0)[:, None] * X.sum(0), 0.25 * (X @ A.T).sum(0)[:, None].expand(2, 8)], 1
    )


@odd("no_grad and inference_mode")
def _():
    model = one()
    inject(model, trainable=True)
    with torch.no_grad():
        first = model(X)
    with torch.inference_mode():
        second = model(X)
    return torch.cat([first, second.clone()]), torch.cat([linear(model[0])] * 2)


@odd("injected under inference_mode")
def _():
    with torch.inference_mode():
        model = one()
        for name in "ab":
            inject(model, name=name)
        with ak.torch.route(model, ["a", None, "b"]):
            got = model(X)
        wanted = linear(model[0])
        wanted[1] = functional.linear(X[1], model[0].weight, model[0].bias)
    return got, wanted


@odd("autocast inside autocast")
def _():
    model = one().float()
    inject(model)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        return model(X.float()), linear(model[0])


@odd("autocast of half precision")
def _():
    model = one().float()
    inject(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X.float())
    assert out.dtype == torch.bfloat16
    assert float((out.float() - linear(model[0])).abs().max()) < 0.2
    return out, out


@odd("train and eval")
def _():
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5)).double()
    inject(model)
    return model.train().eval()(X), linear(model[0])


# Layers.


@odd("a sequence-first LSTM")
def _():
    model, x = nn.ModuleDict({"r": nn.LSTM(16, 4)}).double(), draw(5, 2, 16)
    twin = copy.deepcopy(model)
    inject(model, "r.weight_ih_l0", 16, 16)
    with torch.no_grad():
        twin.r.weight_ih_l0.copy_(changed(twin.r.weight_ih_l0))
    return model.r(x)[0], twin.r(x)[0]


@odd("a transposed convolution")
def _():
    model, x = nn.Sequential(nn.ConvTranspose1d(16, 8, 3)).double(), draw(2, 16, 5)
    ak.torch.inject(model, Adapter({Target("0", layout="in out *k"): (lora(8, 16, 3),)}))
    W = changed(model[0].weight.transpose(0, 1)).transpose(0, 1)
    return model(x), functional.conv_transpose1d(x, W, model[0].bias)


@odd("a convolution in groups")
def _():
    model, x = nn.Sequential(nn.Conv1d(8, 4, 3, groups=2)).double(), draw(2, 8, 6)
    inject(model, "0", 4, 4, 3)
    return model(x), functional.conv1d(x, changed(model[0].weight), model[0].bias, groups=2)


@odd("a convolution with reflected padding")
def _():
    model, x = nn.Sequential(nn.Conv1d(8, 4, 3, padding=1, padding_mode="reflect")).double(), draw(2, 8, 6)
    inject(model, "0", 4, 8, 3)
    return model(x), functional.conv1d(functional.pad(x, (1, 1), "reflect"), changed(model[0].weight), model[0].bias)


@odd("an embedding with padding_idx")
def _():
    model, ids = nn.Sequential(nn.Embedding(16, 8, padding_idx=0)).double(), torch.tensor([[0, 1, 5]])
    ak.torch.inject(model, Adapter({Target("0", layout="in out *k"): (lora(8, 16),)}), trainable=True)
    return model(ids), functional.embedding(ids, changed(model[0].weight.T).T)


@odd("an embedding with max_norm")
def _():
    model, ids = nn.Sequential(nn.Embedding(16, 8, max_norm=0.5)).double(), torch.tensor([[0, 1, 5]])
    ak.torch.inject(model, Adapter({Target("0", layout="in out *k"): (lora(8, 16),)}))
    table = changed(model[0].weight.detach().T).T.clone()
    return model(ids), functional.embedding(ids, table, max_norm=0.5)


@odd("a bag of embeddings")
def _():
    model, ids = nn.Sequential(nn.EmbeddingBag(16, 8)).double(), torch.tensor([[0, 1, 5]])
    ak.torch.inject(model, Adapter({Target("0", layout="in out *k"): (lora(8, 16),)}))
    return model(ids), functional.embedding_bag(ids, changed(model[0].weight.T).T)


@odd("a Linear with a forward of its own")
def _():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * functional.linear(x, self.weight, self.bias)

    model = nn.Sequential(Scaled(16, 8)).double()
    inject(model)
    return model(X), 2 * linear(model[0])


@odd("a target without a weight", raises=TargetNotFound)
def _():
    inject(nn.Sequential(nn.Identity()))


@odd("a target that is not there", raises=TargetNotFound)
def _():
    inject(one(), "7")


@odd("a rank that does not fit", raises=ShapeMismatch)
def _():
    inject(one(), "0", 8, 15)


@odd("a bilinear layer", raises=AdapterkitError)
def _():
    inject(nn.Sequential(nn.Bilinear(4, 4, 8)).double(), "0", 8, 16)


# Inputs and names.


@odd("an empty batch")
def _():
    model = one()
    inject(model, trainable=True)
    out = model(X[:0])
    out.sum().backward()
    assert out.shape == (0, 8)
    return out, linear(model[0], X[:0])


@odd("an empty batch with a route", raises=(UsageError, ShapeMismatch))
def _():
    model = one()
    inject(model, name="a")
    with ak.torch.route(model, ["a"]):
        model(X[:0])


@odd("a route of no rows", raises=UsageError)
def _():
    model = one()
    inject(model, name="a")
    with ak.torch.route(model, []):
        model(X[:0])


@odd("an adapter whose name has dots, slashes and spaces")
def _():
    model = one()
    inject(model, name="team/a.b c", trainable=True)
    with ak.torch.route(model, ["team/a.b c"] * 3):
        return model(X), linear(model[0])


@odd("an empty adapter name")
def _():
    model = one()
    inject(model, name="")
    with ak.torch.route(model, ["", None, ""]):
        got = model(X)
    wanted = linear(model[0])
    wanted[1] = functional.linear(X[1], model[0].weight, model[0].bias)
    return got, wanted


@odd("an argument by its name")
def _():
    model = one()
    inject(model)
    return model[0](input=X), linear(model[0])


@odd("two adapters of one name", raises=UsageError)
def _():
    model = one()
    inject(model)
    inject(model)


@odd("a handle used after it was removed", raises=UsageError)
def _():
    handle = inject(one())
    handle.remove()
    handle.merge_()


@odd("a weight that ZeRO has partitioned", raises=Unsupported, match=r"0\.weight: .*partitioned.*before deepspeed")
def _():
    model = one()
    # As deepspeed.zero.Init leaves it; `tools/foreign/check_deepspeed.py` runs DeepSpeed itself.
    model[0].weight.ds_status = type("ZeroParamStatus", (), {"name": "NOT_AVAILABLE"})()
    model[0].weight.data = torch.empty(0, dtype=torch.float64)
    inject(model)


@odd("a LoReFT whose rows depend on each other", raises=Malformed, match="are linearly dependent")
def _():
    row = draw(1, 16)
    update = METHODS["reft"](source=draw(2, 16), projection=torch.cat((row, 2 * row)), orthogonality=True)
    model = nn.Sequential(nn.Linear(16, 16)).double()
    ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    model(X[None])


# Functional transforms, averages, copies and tracing of trained adapters.


def attach(model, target, out, into, seed, **rest):
    """Another adapter beside that of `inject`."""
    return ak.torch.inject(model, Adapter({Target(target): (lora(out, into, seed=seed),)}), **rest)


def drawn_dora():
    return METHODS["dora"](A=draw(2, 16, seed=5), B=draw(8, 2, seed=6), magnitude=draw(8, seed=8).abs() + 1)


def in_a_route():
    """A model with two adapters, the names of three rows, and what the formula gives them."""
    model = one()
    for seed, name in enumerate("ab", 1):
        attach(model, "0", 8, 16, seed, name=name)
    W, b = model[0].weight, model[0].bias
    rows = (changed(W, seed=1), changed(W, seed=2), W)
    return model, ["a", "b", None], torch.stack([functional.linear(X[row], V, b) for row, V in enumerate(rows)])


@odd("functional_call with other tensors of the adapter")
def _():
    model = one()
    inject(model, trainable=True)
    held = {name: p.detach() * 2 if "adapterkit" in name else p.detach() for name, p in model.named_parameters()}
    delta = 4 * lora(8, 16).delta((8, 16))
    return torch.func.functional_call(model, held, (X,)), functional.linear(X, model[0].weight + delta, model[0].bias)


@odd("torch.func.grad of the adapter's tensors")
def _():
    model = one()
    handle = inject(model, trainable=True)
    held = {name: p.detach() for name, p in model.named_parameters()}
    made = torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).square().sum())(held)
    model(X).square().sum().backward()
    found = [made[name].flatten() for name in held if "adapterkit" in name]
    return torch.cat(found), torch.cat([p.grad.flatten() for p in handle.parameters()])


@odd("vmap of a Jacobian")
def _():
    model = one()
    inject(model)
    return torch.func.vmap(torch.func.jacrev(model))(X), changed(model[0].weight).expand(3, 8, 16)


@odd("a Hessian")
def _():
    model = one()
    inject(model, trainable=True)
    made = torch.autograd.functional.hessian(lambda x: model(x).pow(3).sum(), X[0])
    W = changed(model[0].weight.detach())
    return made, W.T @ torch.diag(6 * functional.linear(X[0], W, model[0].bias)) @ W


@odd("an exponential moving average of a training")
def _():
    model = one()
    handle = inject(model, trainable=True)
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    mean.update_parameters(model)  # The first update copies.
    wanted = [p.detach().clone() for p in handle.parameters()]
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        mean.update_parameters(model)
        wanted = [(old + p.detach()) / 2 for old, p in zip(wanted, handle.parameters(), strict=True)]
    with torch.no_grad():
        for parameter, value in zip(handle.parameters(), wanted, strict=True):
            parameter.copy_(value)
    return mean(X), model(X)


@odd("activation checkpointing, reentrant and not")
def _():
    found = []
    for reentrant in (None, True, False):
        model, x = two(), X.clone().requires_grad_()
        handle = inject(model, trainable=True)
        y = model(x) if reentrant is None else torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in (x, *handle.parameters())]))
    return torch.stack(found[1:]), found[0].expand(2, -1)


@odd("a gradient scaler")
def _():
    model = one().float()
    handle = inject(model, trainable=True)
    other = copy.deepcopy(model)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(handle.parameters(), lr=0.1)
    scaler.scale(model(X.float()).square().sum()).backward()
    scaler.step(optimizer)
    other(X.float()).square().sum().backward()
    torch.optim.SGD(ak.torch.handles(other)["default"].parameters(), lr=0.1).step()
    return model(X.float()), other(X.float())


@odd("adapters exchanged, weighed and switched off in a compiled model")
def _():
    model = one()
    handle = inject(model, name="first")
    compiled = torch.compile(model, backend="eager")
    found = [compiled(X)]
    handle.remove()
    second = attach(model, "0", 8, 16, 3, name="second")
    found.append(compiled(X))
    second.weight = 0.5
    found.append(compiled(X))
    second.set_active(False)
    found.append(compiled(X))
    W, b = model[0].weight, model[0].bias
    wanted = (changed(W), changed(W, seed=3), (W + changed(W, seed=3)) / 2, W)
    return torch.stack(found), torch.stack([functional.linear(X, V, b) for V in wanted])


@odd("the adapter's own tensor pruned")
def _():
    model = one()
    inject(model, trainable=True)
    name = next(name for name in model[0]._parameters if name.endswith("A"))
    prune.l1_unstructured(model[0], name, amount=0.5)
    delta = lora(8, 16).replace(A=getattr(model[0], name)).delta((8, 16))
    return model(X), functional.linear(X, model[0].weight + delta, model[0].bias)


@odd("the adapter's own tensor parametrized")
def _():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    model = one()
    inject(model, trainable=True)
    parametrize.register_parametrization(model[0], next(n for n in model[0]._parameters if n.endswith("A")), Twice())
    return model(X), functional.linear(X, 2 * changed(model[0].weight) - model[0].weight, model[0].bias)


@odd("deepcopy of a handle alone")
def _():
    model = one()
    with torch.no_grad():
        for parameter in copy.deepcopy(inject(model, trainable=True)).parameters():
            parameter.zero_()
    return model(X), linear(model[0])


@odd("deepcopy of a model with its handle")
def _():
    model = one()
    other, handle = copy.deepcopy((model, inject(model, trainable=True)))
    assert ak.torch.handles(other)["default"] is handle
    handle.set_active(False)
    return torch.stack([model(X), other(X)]), torch.stack([linear(model[0]), one()(X)])


@odd("a pickled model with its handle, which is then removed")
def _():
    model = one()
    other, handle = pickle.loads(pickle.dumps((model, inject(model, trainable=True))))
    handle.remove()
    return torch.stack([model(X), other(X)]), torch.stack([linear(model[0]), one()(X)])


@odd("three handles with overlapping targets, removed in every order")
def _():
    found = []
    for order in itertools.permutations(range(3)):
        model = two()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        both = {Target("0"): (drawn_dora(),), Target("1"): (lora(8, 8, seed=2),)}
        scale = METHODS["ia3"](l=draw(8, seed=9))
        handles = (
            attach(model, "0", 8, 16, 1, name="a", trainable=True),
            ak.torch.inject(model, Adapter(both), name="b"),
            ak.torch.inject(model, Adapter({Target("1"): (scale,)}), name="c", trainable=True),
        )
        for which in order:
            handles[which].remove()
        assert all(p.requires_grad for p in model.parameters())
        assert not model._forward_pre_hooks
        assert not [name for module in model.modules() for name in vars(module) if "adapterkit" in name]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        found.append(model(X))
    return torch.stack(found), two()(X).expand(6, 3, 8)


@odd("a route under inference_mode, then gradients")
def _():
    model, names, _ = in_a_route()
    with torch.inference_mode(), ak.torch.route(model, names):
        model(X)
    x = X.clone().requires_grad_()
    with ak.torch.route(model, names):
        return torch.autograd.grad(model(x).sum(), x)[0], torch.autograd.grad(_rows(model, x), x)[0]


def _rows(model, x):
    W, b = model[0].weight, model[0].bias
    rows = (changed(W, seed=1), changed(W, seed=2), W)
    return sum(functional.linear(x[row], V, b).sum() for row, V in enumerate(rows))


@odd("torch.export of a route")
def _():
    model, names, wanted = in_a_route()
    with ak.torch.route(model, names):
        made = torch.export.export(model, (X,)).module()
    return made(X), wanted


@odd("torch.jit.trace of a route, which traces twice and compares the graphs")
def _():
    model, names, wanted = in_a_route()
    with ak.torch.route(model, names), torch.no_grad():
        model(X)
        return torch.jit.trace(model, (X,))(X), wanted


@odd("torch.jit.trace of a route before any forward")
def _():
    model, names, wanted = in_a_route()
    with ak.torch.route(model, names), torch.no_grad():
        return torch.jit.trace(model, (X,))(X), wanted


@odd("torch.export with any number of rows")
def _():
    model = two()
    inject(model)
    more = draw(5, 16, seed=4)
    made = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=10)},)).module()
    return made(more), functional.linear(linear(model[0], more), model[1].weight, model[1].bias)


@odd("parameters swapped by .to(), as torch.__future__ has it")
def _():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = one().float()
        inject(model, trainable=True)
        model.double()
        return model(X).float(), linear(model[0]).float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@odd("an activation in place behind a DoRA in training")
def _():
    model = nn.Sequential(*one(), nn.ReLU(inplace=True))
    ak.torch.inject(model, Adapter({Target("0"): (drawn_dora(),)}), trainable=True)
    model(X).sum().backward()
    W = drawn_dora().new_weight(model[0].weight)
    return model(X), functional.relu(functional.linear(X, W, model[0].bias))


@odd("half precision by model.half() while an adapter is trained")
def _():
    model = one()
    inject(model, trainable=True)
    model.half()
    # Of one thousandth of 16 bits, not of the test's one millionth.
    wanted = functional.linear(X, changed(model[0].weight.double()), model[0].bias.double())
    got = model(X.half())
    assert (got.double() - wanted).abs().max() < 4e-3 * wanted.abs().max()
    return got, got


def test_there_are_sixty():
    assert len(SITUATIONS) >= 60


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)
