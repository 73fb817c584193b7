"""Fresh adapters: which targets are chosen, that they change nothing, that training them works and can go on later."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.core.updates import Additive, Update, tensor
from adapterkit.errors import ShapeMismatch, TargetNotFound, Unrepresentable, Unsupported, UsageError
from adapterkit.io.lazy import as_torch
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

LAYER_METHODS = [
    name
    for name, cls in METHODS.items()
    if cls.kind in ("additive", "weight") and cls.initial.__func__ is not Update.initial.__func__
]
"""Methods of weights that have a fresh value."""

NEEDS = {"rows": {"index": [1, 3, 5, 6]}}
"""What a method must be told besides a rank."""


def perceptron(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    return net.to(dtype)


def made(model, method, **more):
    return ak.torch.create(model, method, rank=4, **NEEDS.get(method, {}), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", LAYER_METHODS)
def test_training_a_fresh_adapter(method, dtype, close):
    """Nothing changes at first; the loss falls; only what is trained moved; what is read back computes the same."""
    model, x = perceptron(dtype), torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    goal = torch.tanh(x.float() @ torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = made(model, method)
    y = model(x)
    handle = ak.torch.inject(model, fresh, trainable=True)
    if METHODS[method].starts_at_base:
        close(model(x).float(), y.float(), tolerance=1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    else:
        assert not torch.allclose(model(x), y)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = functional.mse_loss(model(x).float(), goal)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in handle.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.999 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trained, now = handle.adapter(), model(x)
    for (target, update), (_, first) in zip(trained, fresh, strict=True):
        for name, leaf in update.tensors.items():
            fixed = name in update.frozen or not leaf.is_floating_point()
            moved = not torch.equal(leaf.double(), first.tensors[name].double())
            assert moved != fixed, f"{target}: {name}"
    handle.remove()
    assert torch.equal(model(x), y)
    ak.torch.inject(model, trained)
    close(model(x), now, y, tolerance=1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_a_fresh_adapter_of_a_convolution_changes_nothing_at_first(method, close):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(24, 36, 3)), torch.randn(2, 24, 7, 7)
    y = model(x)
    try:
        fresh = ak.torch.create(model, method, targets=["0"], rank=2, **NEEDS.get(method, {}))
    except (ShapeMismatch, Unsupported):
        return
    ((_, update),) = fresh
    # The factors are the method's, so far fewer numbers than one weight for each pair of its entries.
    assert sum(leaf.numel() for leaf in update.tensors.values()) <= 40 * model[0].weight.numel()
    ak.torch.inject(model, fresh)
    if METHODS[method].starts_at_base:
        close(model(x), y, tolerance=1e-5)


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_training_goes_on_after_it_was_written(method, tmp_path):
    """Ten steps and ten more after writing and reading are twenty steps, number for number."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))

    def train(handle, model, steps):
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            functional.mse_loss(model(x), x).backward()
            optimizer.step()
        return handle.adapter()

    model = perceptron()
    whole = train(ak.torch.inject(model, made(model, method), trainable=True), model, 20)
    model = perceptron()
    first = ak.torch.inject(model, made(model, method), trainable=True)
    ak.write(train(first, model, 10), tmp_path / "half.safetensors")
    first.remove()
    again = ak.torch.inject(model, ak.read(tmp_path / "half.safetensors"), trainable=True)
    assert [name for name, _ in again.named_parameters()] == _trained(whole)
    resumed = train(again, model, 10)
    ak.write(resumed, tmp_path / "whole.safetensors")
    for adapter in (resumed, ak.read(tmp_path / "whole.safetensors").load()):
        for (_, update), (_, wanted) in zip(adapter, whole, strict=True):
            for name, leaf in update.tensors.items():
                assert torch.equal(leaf, wanted.tensors[name]), name


def _trained(adapter):
    seen, names = set(), []
    for target, update in adapter:
        for name, leaf in update.tensors.items():
            if leaf.is_floating_point() and name not in update.frozen and id(leaf) not in seen:
                seen.add(id(leaf))
                names.append(f"{target}.{update.method}.{name}")
    return names


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_frozen_names_tensors(method):
    cls = METHODS[method]
    assert cls.frozen <= cls.tensor_fields().keys()


class Projected(Additive):
    """A made-up method with a fixed projection that all targets share."""

    frozen = frozenset({"A"})

    A: object = tensor("r in")
    B: object = tensor("out r")
    index: object = tensor("out", integer=True)

    def delta(self, shape):
        return (self.B @ self.A)[self.index]


def test_frozen_and_shared_tensors_stay_fixed_and_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    A, order = torch.randn(2, 8), torch.arange(8)
    updates = [Projected(A=A, B=torch.zeros(8, 2), index=order) for _ in range(2)]
    handle = ak.torch.inject(model, Adapter({Target(str(n)): (u,) for n, u in enumerate(updates)}), trainable=True)
    assert len(list(handle.parameters())) == 2
    model(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    (_, one), (_, two) = handle.adapter()
    assert one.A is two.A
    assert torch.equal(one.A, A)
    assert not one.A.requires_grad


def test_a_shared_trained_tensor_is_one_parameter():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    A = torch.randn(2, 8)
    updates = {Target(str(n)): (METHODS["lora"](A=A, B=torch.zeros(8, 2)),) for n in range(2)}
    handle = ak.torch.inject(model, Adapter(updates), trainable=True)
    assert [name for name, _ in handle.named_parameters()] == ["0.lora.A", "0.lora.B", "1.lora.B"]


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


LINEAR = {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
CHOICES = {
    "all linear layers but the head": ("all-linear", {f".{name}" for name in LINEAR}, 14),
    "the end of a name": ("q_proj", {".q_proj"}, 2),
    "a glob": ("model.layers.1.*_proj", {f"1.self_attn.{n}_proj" for n in "qkvo"} | {".mlp.*"}, 7),
    "a regular expression": (r"re:model\.layers\.\d+\.mlp\.(up|down)_proj", {".up_proj", ".down_proj"}, 4),
    "a compiled one": (re.compile(r".*\.[qv]_proj"), {".q_proj", ".v_proj"}, 4),
    "a class": (nn.Embedding, {"embed_tokens"}, 1),
    "several": (["lm_head", re.compile(r".*0\.self_attn\.o_proj"), nn.Embedding], {"lm_head"}, 3),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_choosing_targets(choice):
    targets, ends, count = CHOICES[choice]
    model = llama()
    found = [target.path for target in ak.torch.create(model, "lora", targets=targets, rank=2).updates]
    assert len(found) == count
    assert found == [name for name, _ in model.named_modules() if name in found], "in the order of the model"
    for end in ends:
        pattern = re.escape(end).replace(r"\*", ".*")
        assert any(re.search(f"{pattern}$", name) for name in found), end


def test_all_linear_is_pefts():
    """But for PEFT's own switch: it keeps a classifier's head out only if told the task."""
    from peft import LoraConfig, TaskType, get_peft_model

    for build, task in (
        (llama, TaskType.CAUSAL_LM),
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2)), None),
        (
            lambda: transformers.BertForSequenceClassification(
                transformers.BertConfig(
                    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
                )
            ),
            TaskType.SEQ_CLS,
        ),
    ):
        model = build()
        mine = {target.path for target in ak.torch.create(model, "lora", rank=2).updates}
        theirs = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type=task, r=2))
        wanted = {name.removesuffix(".lora_A.default") for name, _ in theirs.base_model.model.named_modules()}
        assert mine == {
            name for name in wanted if f"{name}.base_layer" in dict(theirs.base_model.model.named_modules())
        }


def moe(name, **sizes):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts_per_tok=2, **sizes,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


EXPERTS = {
    "Qwen2Moe": ({"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}, "e out *in"),
    "GptOss": ({"num_local_experts": 4, "head_dim": 8}, "e in out *k"),
}


@pytest.mark.parametrize("method", [m for m in LAYER_METHODS if m != "rows"])
@pytest.mark.parametrize("family", EXPERTS)
def test_stacked_experts(family, method, close):
    sizes, layout = EXPERTS[family]
    model, ids = moe(family, **sizes), torch.tensor([[1, 5, 9, 3]])
    plain = model(ids).logits
    fresh = ak.torch.create(model, method, targets=["experts.gate_up_proj", "experts.down_proj"], rank=2)
    assert {target.layout for target in fresh.updates} == {layout}
    handle = ak.torch.inject(model, fresh, trainable=True)
    if METHODS[method].starts_at_base:
        close(model(ids).logits, plain)
    model(ids).logits.square().sum().backward()
    assert all(p.grad is not None for p in handle.parameters())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_first_factors_of_stacked_experts_spread_as_those_of_one_layer(method: str) -> None:
    model = moe("Qwen2Moe", **EXPERTS["Qwen2Moe"][0])
    ((_, update),) = ak.torch.create(model, method, targets=["experts.down_proj"], rank=64)
    one = nn.Linear(12, 16, bias=False)
    ((_, single),) = ak.torch.create(nn.Sequential(one), method, targets=["0"], rank=64)
    assert float(update.A.std()) == pytest.approx(float(single.A.std()), rel=0.06)
    assert float(update.A.abs().max()) == pytest.approx(12**-0.5, rel=0.03)


def test_parameters_of_a_model_without_a_family():
    model = nn.Module()
    model.table = nn.Parameter(torch.randn(4, 6))
    model.attn = nn.MultiheadAttention(8, 2)
    with pytest.raises(UsageError, match=r"table: .*parameter of shape \[4, 6\] is unknown.*Pass layout="):
        ak.torch.create(model, "lora", targets="table", rank=2)
    ((target, update),) = ak.torch.create(model, "lora", targets="table", rank=2, layout="in out *k")
    assert (target.layout, update.A.shape, update.B.shape) == ("in out *k", (2, 4), (6, 2))
    ((target, update),) = ak.torch.create(model, "lora", targets="attn.in_proj_weight", rank=2)
    assert (target.layout, update.A.shape, update.B.shape) == ("out *in", (2, 8), (24, 2))
    ((_, update),) = ak.torch.create(model, "replacement", targets="in_proj_weight")
    assert torch.equal(update.bias, model.attn.in_proj_bias)


def test_the_seed_decides_and_the_model_stays_as_it_is():
    model = perceptron()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (ak.torch.create(model, "lora", rank=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), drawn), "torch's own generator is left alone"
    assert one.digest() == two.digest() != other.digest()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    ((_, copy), *_) = ak.torch.create(model, "replacement")
    copy.weight.zero_()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "no memory is shared"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"targets": "2x"}, TargetNotFound, "2x: no matching module"),
        ({"targets": ["0", "nothing"]}, TargetNotFound, "nothing: no matching module"),
        ({"targets": nn.Conv2d}, TargetNotFound, "Conv2d"),
        ({"targets": "re:("}, UsageError, r"re:\(: not a regular expression"),
        ({"rank": 0}, UsageError, "rank is below 1"),
        ({"alpha": 4, "scaling": 2.0}, UsageError, "both alpha and scaling"),
        ({"beta": 4}, UsageError, "lora has no attribute 'beta'. Choose among scaling"),
        ({"method": "lorra"}, Unsupported, "lorra"),
        ({"method": "rows"}, UsageError, "0: rows: .*index=|index"),
    ],
)
def test_what_is_asked_wrongly(arguments, error, words):
    with pytest.raises(error, match=words) as raised:
        ak.torch.create(perceptron(), **{"method": "lora", **arguments})
    assert raised.value.cure


def test_what_has_no_numbers_to_start_from():
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Unsupported, match=r"0: the weight has dtype torch.int8. Load the base unquantized"):
        ak.torch.create(model, "lora", rank=2)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_a_start_takes_from_the_base_is_written_as_lora_and_the_refusal_says_so(init, tmp_path):
    model = nn.Sequential(nn.Linear(16, 8))
    made = ak.torch.create(model, "lora", targets="0", rank=2, alpha=4, init=init)
    with pytest.raises(
        Unrepresentable, match=r"residual.*Convert the updates to another method.*on_loss='promote'/--on-loss promote"
    ):
        ak.write(made, tmp_path / "out", format="peft")
    ak.write(made, tmp_path / "out", format="peft", on_loss="promote")
    given, written = (each.load().delta("0") for each in (made, ak.read(tmp_path / "out")))
    torch.testing.assert_close(torch.as_tensor(written), torch.as_tensor(given))
    doubled = ak.torch.create(model, "dora", targets="0", rank=2, alpha=4, init=init)
    with pytest.raises(Unrepresentable, match=r"residual.*\. Omit them"):  # No LoRA is what a DoRA is.
        ak.write(doubled, tmp_path / "dora", format="peft")


STARTS = {
    "lora": lambda r: peft.LoraConfig(r=r, target_modules=["0"]),
    "dora": lambda r: peft.LoraConfig(r=r, target_modules=["0"], use_dora=True),
    "loha": lambda r: peft.LoHaConfig(r=r, target_modules=["0"]),
    "lokr": lambda r: peft.LoKrConfig(r=r, target_modules=["0"]),
}


FRESH = {
    "linear": nn.Linear(2048, 1024),
    "odd": nn.Linear(225, 225),  # LoKr's w2 is 15 x 15: a rank of 7 is below half of it, by half a number.
    "convolution": nn.Conv2d(64, 144, 3),
}


@pytest.mark.parametrize("rank", [7, 64])
@pytest.mark.parametrize("layer", FRESH.values(), ids=FRESH)
@pytest.mark.parametrize("method", STARTS)
def test_fresh_factors_spread_as_pefts(method: str, layer: nn.Module, rank: int, tmp_path: Path) -> None:
    """Uniform, and as wide as the inputs ask: a wider or narrower start trains otherwise, and nothing else tells."""
    torch.manual_seed(0)
    peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), STARTS[method](rank)).save_pretrained(tmp_path)
    ((_, theirs),) = ak.read(tmp_path)
    ((_, ours),) = ak.torch.create(nn.Sequential(layer), method, targets=["0"], rank=rank)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, leaf in ours.tensors.items():
        mine, wanted = (as_torch(each).float() for each in (leaf, theirs.tensors[name]))
        assert mine.shape == wanted.shape, name
        noise = 4 / mine.numel() ** 0.5
        assert float(mine.std()) == pytest.approx(float(wanted.std()), rel=noise), name
        assert float(mine.abs().max()) == pytest.approx(float(wanted.abs().max()), rel=noise), name
        assert float(mine.mean()) == pytest.approx(float(wanted.mean()), abs=2 * noise * float(wanted.std())), name


def test_a_fresh_adapter_names_the_base_that_it_is_for(tmp_path: Path) -> None:
    """As in PEFT, `adapter_config.json` holds what the model was loaded from, so that tools find the base."""
    model = nn.Sequential(nn.Linear(4, 8))
    model.config = SimpleNamespace(_name_or_path="org/model")
    adapter = ak.torch.create(model, "lora", targets="0", rank=2)
    assert adapter.base is not None
    assert adapter.base.id == "org/model"
    ak.write(adapter, tmp_path / "peft", format="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"
    model.config = SimpleNamespace(_name_or_path="")
    assert ak.torch.create(model, "lora", targets="0", rank=2).base is None
