"""A different adapter for each row of a batch, against running each row by itself; and the compilers."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, Unsupported, UsageError
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 9], [2, 2, 7], [3, 1, 1], [8, 0, 4]])
NAMES = ["a", None, "b", "a"]
SMALL = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(out, into, *kernel, seed=0):
    return METHODS["lora"](A=draw(2, into, *kernel, seed=seed), B=draw(out, 2, seed=seed + 50), scaling=0.25)


def attach(model, make):
    """Two adapters, a and b, of what `make` gives for a seed."""
    return [ak.torch.inject(model, make(seed), name=name) for seed, name in enumerate("ab", 1)]


def row_by_row(run, handles, names):
    """What the model gives for each row alone, with that row's adapter alone."""
    out = []
    for row, name in enumerate(names):
        for handle in handles:
            handle.set_active(handle.name == name)
        out.append(run(row))
    for handle in handles:
        handle.set_active(True)
    return torch.cat(out)


def random(model, targets, seed, method="lora"):
    """A fresh adapter, then with all its leaves drawn anew."""
    fresh = ak.torch.create(model, method, targets=targets, rank=2)
    shift = iter(range(1000 * seed, 1000 * seed + 1000))
    return fresh.map(lambda leaf: leaf.double() + 0.3 * draw(*leaf.shape, seed=next(shift)))


WHOLE = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, SMALL, ["*_proj", "embed_tokens", "*norm"]),
    "gpt2": (
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ["c_attn", "wte", "wpe", "ln_1"],
    ),
    "bert": (
        transformers.BertConfig,
        transformers.BertForMaskedLM,
        SMALL,
        ["query", "*.dense", "position_embeddings", "token_type_embeddings", "LayerNorm"],
    ),
    "qwen2-moe": (
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        SMALL
        | {
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "num_experts": 4,
            "num_key_value_heads": 2,
        }
        | {"num_experts_per_tok": 2, "experts_implementation": "eager"},
        ["q_proj", "experts.gate_up_proj", "experts.down_proj", "shared_expert.*_proj"],
    ),
}


def build(name):
    config, cls, sizes, targets = WHOLE[name]
    torch.manual_seed(0)
    return cls(config(**sizes)).double().eval(), targets


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name, method, close):
    model, targets = build(name)
    targets = [target for target in targets if method == "ia3" or not any(w in target.lower() for w in ("norm", "ln_"))]
    handles = attach(model, lambda seed: random(model, targets, seed, method))
    plain = model(IDS).logits
    with ak.torch.route(model, NAMES, flattened="moe" in name):
        got = model(IDS).logits
    close(got, row_by_row(lambda row: model(IDS[row : row + 1]).logits, handles, NAMES), tolerance=1e-10)
    assert not torch.allclose(got[0], plain[0])
    assert torch.equal(model(IDS).logits, plain), "outside of the with, all adapters act on all rows"


def test_routes_are_pefts(tmp_path, close):
    """PEFT's own mixed batches: `adapter_names`, with `__base__` for rows without one."""
    model, _ = build("llama")
    model.float()
    configs = [LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False) for _ in "ab"]
    theirs = get_peft_model(copy.deepcopy(model), configs[0], adapter_name="a").eval()
    theirs.add_adapter("b", configs[1])
    theirs.save_pretrained(tmp_path)
    for name in "ab":
        ak.torch.inject(model, ak.read(tmp_path / name), name=name)
    wanted = theirs.eval()(IDS, adapter_names=[name or "__base__" for name in NAMES]).logits
    with ak.torch.route(model, NAMES):
        close(model(IDS).logits, wanted)


MODULES = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), (4, 4, 5, 5), {"0": (6, 4, 3, 3)}),
    "groups": (lambda: nn.Conv1d(8, 6, 3, groups=2), (4, 8, 7), {"0": (6, 4, 3)}),
    "rows of a fused weight": (lambda: nn.Linear(6, 8), (4, 6), {"0[2:6]": (4, 6)}),
    "recurrent": (lambda: nn.GRU(6, 4, batch_first=True), (4, 5, 6), {"0.weight_ih_l0": (12, 6)}),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules_whose_parameters_are_exchanged(kind, close):
    make, shape, places = MODULES[kind]
    model, x = nn.Sequential(make()).double(), draw(*shape, seed=3)
    target = Target("0", rows=(2, 6)) if "fused" in kind else Target(next(iter(places)))
    handles = attach(model, lambda seed: Adapter({target: (lora(*next(iter(places.values())), seed=seed),)}))

    def run(x):
        return model(x)[0] if kind == "recurrent" else model(x)

    with ak.torch.route(model, NAMES):
        got = run(x)
    close(got, row_by_row(lambda row: run(x[row : row + 1]), handles, NAMES), tolerance=1e-12)


@pytest.mark.parametrize("mask", [None, torch.eye(4).bool().logical_not()])
def test_attention_with_a_mask_that_looks_like_rows(mask, close):
    model, x = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).double(), draw(4, 4, 8, seed=3)
    handles = attach(model, lambda seed: Adapter({Target("attn.in_proj_weight"): (lora(24, 8, seed=seed),)}))
    padding = torch.tensor([[False] * 3 + [True]] * 2 + [[False] * 4] * 2) if mask is None else None

    def run(rows):
        inside = None if padding is None else padding[rows]
        return model.attn(x[rows], x[rows], x[rows], key_padding_mask=inside, attn_mask=mask)[0]

    with ak.torch.route(model, NAMES):
        got = run(slice(None))
    close(got, row_by_row(lambda row: run(slice(row, row + 1)), handles, NAMES), tolerance=1e-12)


def test_what_cannot_be_routed_says_so():
    attn = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}).double()
    attach(attn, lambda seed: Adapter({Target("attn.in_proj_weight"): (lora(24, 8, seed=seed),)}))
    with pytest.raises(Unsupported, match=r"attn: a MultiheadAttention has batch_first=False.*Pass axis=1"):
        ak.torch.route(attn, NAMES).__enter__()
    model = nn.Sequential(nn.Linear(6, 4)).double()
    attach(model, lambda seed: Adapter({Target("0"): (lora(4, 6, seed=seed),)}))
    for shape, more in (((8, 6), "flattened=True"), ((3, 6), "for each row")):
        with (
            ak.torch.route(model, NAMES),
            pytest.raises(ShapeMismatch, match=f"{shape[0]} rows.*the route has 4.*{more}"),
        ):
            model(draw(*shape))
    with (
        pytest.raises(UsageError, match=r"aa: row 0: no such adapter is attached. Nearest: a"),
        ak.torch.route(model, ["aa"]),
    ):
        pass


def test_a_route_ends_with_its_block_also_after_an_error():
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), draw(4, 6)
    attach(model, lambda seed: Adapter({Target("0"): (lora(4, 6, seed=seed),)}))
    y = model(x)
    with pytest.raises(ShapeMismatch), ak.torch.route(model, NAMES):
        model(x[:3])
    assert torch.equal(model(x), y)


class Odd(nn.Module):
    """A module whose parameter is no layer's weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(draw(4, 6))

    def forward(self, x):
        return x @ self.table.T


COMPILED = {
    "formula": (lambda: nn.Linear(6, 4), Target("0"), lora(4, 6)),
    "formula of the weight": (
        lambda: nn.Linear(6, 4),
        Target("0"),
        METHODS["dora"](A=draw(2, 6), B=draw(4, 2), magnitude=draw(4).abs()),
    ),
    "exchanged rows": (lambda: nn.Linear(6, 4), Target("0", rows=(1, 3)), lora(2, 6)),
    "exchanged parameter": (Odd, Target("0.table"), lora(4, 6)),
    "norm": (lambda: nn.LayerNorm(6), Target("0"), METHODS["ia3"](l=draw(6))),
}


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_whole_and_exported(kind, weight, close):
    make, target, update = COMPILED[kind]
    model, x = nn.Sequential(make(), nn.ReLU()).double(), draw(3, 6, seed=5)
    plain = model(x)
    ak.torch.inject(model, Adapter({target: (update,)}), weight=weight)
    wanted = model(x)
    assert not torch.allclose(wanted, plain)
    torch._dynamo.reset()
    close(torch.compile(model, backend="eager", fullgraph=True)(x), wanted, tolerance=1e-12)
    close(torch.export.export(model, (x,)).module()(x), wanted, tolerance=1e-12)


@pytest.mark.parametrize("kind", COMPILED)
def test_switches_and_routes_under_a_compiler(kind, close):
    """The same compiled model follows what the handle says, without a break in its graph."""
    make, target, update = COMPILED[kind]
    model, x = nn.Sequential(make()).double(), draw(2, 6, seed=5)
    plain = model(x)
    handle = ak.torch.inject(model, Adapter({target: (update,)}), name="a")
    whole = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), whole, tolerance=1e-12)
    with handle.disable():
        close(compiled(x), plain, tolerance=1e-12)
    handle.weight = 0.0
    close(compiled(x), plain, tolerance=1e-12)
    handle.weight = 1.0
    with ak.torch.route(model, [None, "a"]):
        close(compiled(x), torch.stack([plain[0], whole[1]]), tolerance=1e-12)
    close(compiled(x), whole, tolerance=1e-12)
    handle.remove()
    close(compiled(x), plain, tolerance=1e-12)


def test_a_routed_export(close):
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), draw(4, 6)
    attach(model, lambda seed: Adapter({Target("0"): (lora(4, 6, seed=seed),)}))
    with ak.torch.route(model, NAMES):
        wanted, exported = model(x), torch.export.export(model, (x,))
    close(exported.module()(x), wanted, tolerance=1e-12)


def test_training_through_a_compiler(close):
    """Gradients of the handle's parameters are those without the compiler."""
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), draw(3, 6, seed=5)
    handle = ak.torch.inject(model, Adapter({Target("0"): (lora(4, 6),)}), trainable=True)
    torch._dynamo.reset()
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in handle.parameters()])
        for p in handle.parameters():
            p.grad = None
    for got, wanted in zip(*gradients, strict=True):
        close(got, wanted, tolerance=1e-12)


@pytest.mark.long
def test_a_whole_model_compiled_with_a_route(close):
    config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 1, "use_cache": False})
    model = transformers.LlamaForCausalLM(config).double().eval()
    for seed, (name, method) in enumerate(zip("ab", ("lora", "dora"), strict=True), 1):
        ak.torch.inject(model, random(model, "all-linear", seed, method), name=name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(IDS).logits, model(IDS).logits, tolerance=1e-10)
    with ak.torch.route(model, NAMES):
        close(compiled(IDS).logits, model(IDS).logits, tolerance=1e-10)
