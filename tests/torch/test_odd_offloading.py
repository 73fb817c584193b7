"""Odd situations of models whose weights other tools keep elsewhere, or in fewer bits, between two forwards.

diffusers' group offloading leaves uninitialised memory where it writes weights to the disk, and its layerwise casting
8 bits. Each situation gives what the formula gives, or a typed error, as in test_odd_situations.py.
"""

import copy
import tempfile

import accelerate
import pytest
import torch
import transformers
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.hooks.layerwise_casting import apply_layerwise_casting
from situations import Situations, draw
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, Unsupported
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd

EIGHT = torch.float8_e4m3fn
UP = "block.up"


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.up = layer

    def forward(self, x):
        return self.up(x)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.block = Block(layer)

    def forward(self, x):
        return self.block(x)


KINDS = {
    "linear": (lambda: nn.Linear(16, 8), (3, 16)),
    "convolution": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 6, 6)),
    "convolution in groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6)),
    "embedding": (lambda: nn.Embedding(12, 8), None),
}


def model_of(kind):
    torch.manual_seed(0)
    layer, shape = KINDS[kind]
    x = torch.tensor([[1, 5, 3]]) if shape is None else draw(*shape, seed=7).float()
    return Model(layer()), x


def adapter_of(model, method):
    W = model.block.up.weight.detach()
    out, into, *kernel = W.mT.shape if isinstance(model.block.up, nn.Embedding) else W.shape
    if method == "ia3":
        scales = {"l": 1 + draw(out, seed=1).float()}
        update = METHODS[method](**scales)
    else:
        factors = {"A": draw(2, into, *kernel, seed=1).float(), "B": draw(out, 2, seed=2).float(), "scaling": 0.5}
        more = {"magnitude": 1 + draw(out, seed=3).float().abs()} if method == "dora" else {}
        update = METHODS[method](**factors, **more)
    return Adapter({Target(UP): (update,)})


def to_disk(model, folder):
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_type="leaf_level", offload_to_disk_path=folder)


def cast(model):
    apply_layerwise_casting(model, EIGHT, torch.float32, skip_modules_classes=())


def rounded(model):
    """The model with its weights as layerwise casting leaves them."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(EIGHT).float()
    return twin


def in_order(first, model, change, adapter, **rest):
    """Change a model before or after it gets an adapter."""
    if first:
        change(model)
    handle = ak.torch.inject(model, adapter, **rest)
    if not first:
        change(model)
    return handle


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_weights_on_the_disk(kind, method, first):
    (model, x), (twin, _) = model_of(kind), model_of(kind)
    adapter = adapter_of(model, method)
    ak.torch.inject(twin, adapter)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        in_order(first, model, lambda each: to_disk(each, folder), adapter)
        model(x)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_weights_in_eight_bits(kind, method, first):
    model, x = model_of(kind)
    twin, adapter = rounded(model), adapter_of(model, method)
    theirs = ak.torch.inject(twin, adapter, trainable=True)
    handle = in_order(first, model, cast, adapter, trainable=True)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    outputs = [each(own) for each, own in zip((model, twin), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for y in outputs:
        y.square().sum().backward()
    assert model.block.up.weight.dtype is EIGHT
    pairs = [*zip(handle.parameters(), theirs.parameters(), strict=True), *([inputs] if x.is_floating_point() else [])]
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [cast, lambda model: to_disk(model, tempfile.mkdtemp())])
def test_an_adapter_inside_of_hooks_leaves_nothing_behind(change):
    model, x = model_of("convolution")
    change(model)
    references = model.block.up._diffusers_hook._fn_refs
    before = [dict(each.__dict__) for each in references], dict(model.block.up.__dict__)
    with torch.no_grad():
        y = model(x)
        handle = ak.torch.inject(model, adapter_of(model, "lora"))
        assert not torch.equal(model(x), y)
        handle.remove()
        assert torch.equal(model(x), y)
    assert [each.__dict__ for each in references] == before[0]
    assert model.block.up.__dict__.keys() == before[1].keys()


def test_an_adapter_inside_of_hooks_is_undone_after_an_error(monkeypatch):
    model, _ = model_of("linear")
    cast(model)
    before = dict(model.block.up._diffusers_hook._fn_refs[0].__dict__)
    monkeypatch.setattr("adapterkit.torch.handle.Watch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ak.torch.inject(model, adapter_of(model, "lora"))
    assert model.block.up._diffusers_hook._fn_refs[0].__dict__ == before


def on_disk(trainable=False):
    """A model with an adapter, both on the disk, and its handle."""
    model, x = model_of("linear")
    handle = ak.torch.inject(model, adapter_of(model, "lora"), trainable=trainable)
    to_disk(model, tempfile.mkdtemp())
    return model, handle, x


@odd("an adapter on the disk, read and checkpointed")
def _():
    model, handle, _ = on_disk(trainable=True)
    wanted = adapter_of(model_of("linear")[0], "lora")
    handle.checkpoint = "adapter"
    found = [
        *(each for _, update in handle.adapter() for each in update.tensors.values()),
        *model.state_dict().values(),
    ]
    return torch.cat([each.flatten() for each in found]), torch.cat(
        [torch.as_tensor(each).flatten() for _, update in wanted for each in update.tensors.values()] * 2
    )


@odd("a bottleneck that goes to the disk with a layer inside of its block")
def _():
    outputs = []
    for disk in (True, False):
        model, x = model_of("linear")
        made = ak.torch.create(model, "bottleneck", targets=["block"])
        ak.torch.inject(model, made.map(lambda leaf: torch.as_tensor(leaf) + 0.1))
        if disk:
            to_disk(model, tempfile.mkdtemp())
        with torch.no_grad():
            model(x)
            outputs.append(model(x))
    return outputs[0], outputs[1]


@odd("a weight on the disk, merged", NotMergeable, "offloaded")
def _():
    on_disk()[1].merge_()


@odd("a weight on the disk, a fresh adapter that starts from it", Unsupported, "keeps this weight on disk")
def _():
    model, _ = model_of("linear")
    to_disk(model, tempfile.mkdtemp())
    ak.torch.create(model, "lora", targets=["up"], rank=2, init="pissa")


@odd("a prefix, its model put on the disk block by block, and removed")
def _():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([[1, 5, 3]])
    with torch.no_grad():
        y = model(ids).logits
        handle = ak.torch.inject(model, ak.torch.create(model, "prefix"))
        changed = model(ids).logits
        cpu, folder = torch.device("cpu"), tempfile.mkdtemp()
        apply_group_offloading(
            model, onload_device=cpu, offload_to_disk_path=folder, offload_type="block_level", num_blocks_per_group=1
        )
        on = model(ids).logits
        handle.remove()
        return torch.cat([on, model(ids).logits]), torch.cat([changed, y])


@odd("a trained adapter on the disk, trained", Unsupported, "on disk cannot be trained")
def _():
    model, _, x = on_disk(trainable=True)
    model(x).sum().backward()


@odd("a trained adapter on the disk, without gradients")
def _():
    model, _, x = on_disk(trainable=True)
    twin, _ = model_of("linear")
    ak.torch.inject(twin, adapter_of(twin, "lora"))
    with torch.no_grad():
        return model(x), twin(x)


@odd("casting and offloading at once, by diffusers and accelerate")
def _():
    model, x = model_of("convolution")
    twin, adapter = rounded(model), adapter_of(model, "dora")
    ak.torch.inject(twin, adapter)
    cast(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    ak.torch.inject(model, adapter)
    return model(x), twin(x)


@odd("offloading by accelerate, then hooks of diffusers")
def _():
    (model, x), (twin, _) = model_of("linear"), model_of("linear")
    adapter = adapter_of(model, "dora")
    ak.torch.inject(twin, adapter)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    HookRegistry.check_if_exists_or_initialize(model.block.up).register_hook(ModelHook(), "nothing")
    ak.torch.inject(model, adapter)
    return model(x), twin(x)


@odd("cast, then a fresh adapter that starts from the weight")
def _():
    model, x = model_of("convolution")
    twin = rounded(model)
    cast(model)
    for each in (model, twin):
        ak.torch.inject(each, ak.torch.create(each, "dora", targets=["up"], rank=2))
    return model(x), twin(x)


def tied():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def to_accelerates_disk(model):
    accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=torch.device("cpu"))


def to_accelerates_cpu(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("rest", [{"method": "rows", "index": [1, 5]}, {"method": "lora", "tied": "merge"}])
@pytest.mark.parametrize("change", [to_accelerates_cpu, to_accelerates_disk])
def test_a_tied_head_follows_its_offloaded_embedding(change, rest):
    """Both had a parameter of their own then, and the head was left as it was."""
    rest, words = dict(rest), {}
    if "tied" in rest:
        words["tied"] = rest.pop("tied")
    model, twin, ids = tied(), tied(), torch.tensor([[1, 5, 3]])
    adapter = ak.torch.create(twin, targets=["embed_tokens"], rank=2, **rest)
    adapter = adapter.map(lambda leaf: leaf + draw(*leaf.shape, seed=3).float() if leaf.is_floating_point() else leaf)
    plain = twin(ids).logits
    ak.torch.inject(twin, adapter, **words)
    change(model)
    ak.torch.inject(model, adapter, **words)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)
    assert (twin(ids).logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lora", "dora", "rows", "prompt", "cpt", "gated_prefix", "textual_inversion"])
@pytest.mark.parametrize("change", [to_accelerates_cpu, to_accelerates_disk])
def test_a_fresh_adapter_of_an_offloaded_model_is_that_of_the_model(change, method):
    model, twin = tied(), tied()
    change(model)
    words = {"targets": ["embed_tokens"], "index": [1, 5]} if method == "rows" else {}
    made, wanted = (ak.torch.create(each, method, rank=2, **words) for each in (model, twin))
    assert made.digest() == wanted.digest()


def test_a_fresh_adapter_of_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        model = tied()
    with pytest.raises(Unsupported, match="on the meta device"):
        ak.torch.create(model, "lora", rank=2)


def test_there_are_ten():
    assert len(SITUATIONS) >= 10


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)
