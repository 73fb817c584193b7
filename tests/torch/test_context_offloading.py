"""All methods of context in models whose weights other tools keep elsewhere, or in 8 bits, between two forwards.

Tokens, keys and values of an adapter meet embeddings and keys that a model computes. Which device and dtype that will
be, a weight does not tell that accelerate has put on the meta device, or diffusers' layerwise casting in 8 bits.
"""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import pytest
import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.layerwise_casting import apply_layerwise_casting
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import adapterkit as ak
from adapterkit.errors import Unsupported
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

CONTEXT = [name for name in METHODS if METHODS[name].kind == "context"]
IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 4]])
CPU = torch.device("cpu")


def llama():
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=2, n_head=2))


def t5():
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


def to_cpu(model, **words):
    accelerate.cpu_offload(model, execution_device=CPU, **words)


def to_disk(model):
    accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=CPU)


def dispatch(model):
    """A device map that leaves every second module with weights on the CPU, and puts the others on the disk."""
    names = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    places = {name: ("cpu", "disk")[i % 2] for i, name in enumerate(names)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)


def cast(model):
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm", "ln_"))


TOOLS = {
    "accelerate.cpu_offload": to_cpu,
    "accelerate.cpu_offload with buffers": lambda model: to_cpu(model, offload_buffers=True),
    "accelerate.cpu_offload block by block": lambda model: to_cpu(
        model, preload_module_classes=["LlamaDecoderLayer", "GPT2Block", "T5Block"]
    ),
    "accelerate.disk_offload": to_disk,
    "accelerate.dispatch_model": dispatch,
    "group offloading": lambda model: apply_group_offloading(model, CPU, offload_type="leaf_level"),
    "group offloading block by block": lambda model: apply_group_offloading(
        model, CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "layerwise casting": cast,
}


def fresh(build, tool=None):
    """The model; after layerwise casting, one whose weights are the numbers that 8 bits left."""
    torch.manual_seed(5)
    model = build().eval()
    if tool == "layerwise casting":
        cast(model)
        rounded = {name: tensor.float() for name, tensor in model.state_dict().items()}
        model = build().eval()
        model.load_state_dict(rounded)
    return model


def adapter_of(model, method):
    """A fresh adapter with other numbers than those that change nothing."""
    made, generator = ak.torch.create(model, method, rank=3), torch.Generator().manual_seed(1)
    return made.map(lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=generator))


def run(model, method):
    """The model's output, for new tokens too where the method brings some."""
    ids = torch.where(IDS == 9, 20, IDS) if method == "textual_inversion" else IDS
    pair = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **pair).logits


def trained(model, handle, method):
    """The output, and the adapter's gradients."""
    y = run(model, method)
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad for parameter in handle.parameters())]


CASES = [*((llama, method) for method in CONTEXT), (gpt2, "adaption_prompt"), (gpt2, "prefix")]
"""GPT-2's projections have biases, and its cache moves positions."""


@pytest.mark.parametrize("first", [True, False], ids=["tool first", "adapter first"])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("build", "method"), CASES)
def test_outputs_gradients_and_undoing_are_as_without_the_tool(build, method, tool, first):
    twin = fresh(build, tool)
    adapter = adapter_of(twin, method)
    wanted = trained(twin, ak.torch.inject(twin, adapter, trainable=True), method)
    model = fresh(build)
    if first:
        TOOLS[tool](model)
    handle = ak.torch.inject(model, adapter, trainable=True)
    if not first:
        TOOLS[tool](model)
    for found, expected in zip(trained(model, handle, method), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(model, method), wanted[0], rtol=1e-5, atol=1e-5)
        handle.remove()
        torch.testing.assert_close(run(model, ""), run(fresh(build, tool), ""), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix", "gated_prefix"])
@pytest.mark.parametrize("tool", ["accelerate.cpu_offload", "accelerate.disk_offload"])
@pytest.mark.parametrize("build", [llama, t5])
def test_what_is_generated_is_what_is_generated_without_the_tool(build, method, tool):
    words = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    twin = fresh(build)
    adapter = adapter_of(twin, method)
    ak.torch.inject(twin, adapter)
    model = fresh(build)
    TOOLS[tool](model)
    ak.torch.inject(model, adapter)
    assert torch.equal(model.generate(IDS, **words), twin.generate(IDS, **words))


@pytest.mark.parametrize("method", CONTEXT)
def test_training_on_diffusers_disk_is_refused(method):
    model = fresh(llama)
    ak.torch.inject(model, adapter_of(model, method), trainable=True)
    apply_group_offloading(model, CPU, offload_type="leaf_level", offload_to_disk_path=tempfile.mkdtemp())
    with pytest.raises(Unsupported, match="a model that diffusers' group offloading keeps on disk cannot be trained"):
        run(model, method)


def test_positions_of_another_attention_that_is_offloaded_are_refused():
    model = fresh(t5)
    ak.torch.inject(model, adapter_of(model, "gated_prefix"))
    to_cpu(model, preload_module_classes=["T5Attention"])
    with pytest.raises(Unsupported, match=r"table of relative positions.* preload_module_classes="):
        run(model, "gated_prefix")
