"""Real architectures with small random weights: adapters that PEFT made, live, against PEFT's own forward."""

import copy

import pytest
import torch
import transformers
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

import adapterkit as ak

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 0]])
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TEXT = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "use_cache": False,
}  # fmt: skip


def causal(name, **sizes):
    """A causal language model of transformers'."""
    config = getattr(transformers, f"{name}Config")(**TEXT | sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config), lambda model: model(IDS).logits


def llama():
    return causal("Llama")


def qwen_moe():
    return causal(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=12
    )


def qwen3_moe():
    return causal("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8)


def gpt_oss():
    return causal("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)


def gpt2():
    config = transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config), lambda model: model(IDS).logits


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**{name: value for name, value in TEXT.items() if "key_value" not in name})
    ), lambda model: model(IDS).logits


def t5():
    config = transformers.T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return (
        transformers.T5ForConditionalGeneration(config),
        lambda model: model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits,
    )


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config), lambda model: model(PIXELS).logits


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 16], depths=[1, 1, 1, 1], patch_size=2)
    return transformers.ConvNextForImageClassification(config), lambda model: model(PIXELS).logits


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config), lambda model: model(PIXELS).logits


class SmallUNet(nn.Module):
    """What diffusion U-Nets are made of: strided and plain convolutions, time and cross attention, a skip."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.time, self.norm = nn.Linear(4, 16), nn.GroupNorm(4, 16)
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, 16, bias=False) for n in (16, 6, 6))
        self.to_out = nn.Linear(16, 16)
        self.up, self.conv_out = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, time, text):
        first = self.conv_in(x)
        h = functional.silu(self.norm(self.down(first) + self.time(time)[:, :, None, None]))
        tokens = h.flatten(2).mT
        mixed = functional.scaled_dot_product_attention(self.to_q(tokens), self.to_k(text), self.to_v(text))
        h = h + self.to_out(mixed).mT.reshape(h.shape)
        return self.conv_out(torch.cat([functional.interpolate(self.up(h), scale_factor=2), first], 1))


def small_unet():
    time, text = torch.linspace(-1, 1, 8).reshape(2, 4), torch.linspace(-2, 2, 36).reshape(2, 3, 6)
    return SmallUNet(), lambda model: model(PIXELS, time, text)


def unet():
    import diffusers

    made = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    text = torch.linspace(-2, 2, 36).reshape(2, 3, 6)
    return made, lambda model: model(PIXELS, torch.tensor([3, 7]), text).sample


MODELS = {
    llama: (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    qwen_moe: (["q_proj", "o_proj", "shared_expert.up_proj", "shared_expert.down_proj"], ["shared_expert.down_proj"]),
    qwen3_moe: (["q_proj", "v_proj"], []),
    gpt_oss: (["q_proj", "v_proj", "o_proj"], ["o_proj"]),
    gpt2: (["c_attn", "c_proj", "c_fc"], ["c_proj"]),
    bert: (["query", "value", "output.dense"], ["output.dense"]),
    t5: (["q", "v", "wo"], ["wo"]),
    vit: (["q_proj", "v_proj", "fc1", "fc2", "projection"], ["fc2"]),
    convnext: (["pwconv1", "pwconv2", "downsampling_layer.1", "patch_embeddings"], ["pwconv2"]),
    resnet: (["convolution"], []),
    small_unet: (["conv_in", "down", "to_q", "to_k", "to_v", "to_out", "up", "conv_out"], ["to_out"]),
    unet: (["conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0", "proj_in", "time_emb_proj"], ["to_out.0"]),
}
"""Model -> targets, and those of them that IA3 scales on their input."""

BY_METHOD = {
    "lora": lambda targets, _: LoraConfig(target_modules=targets, r=4, lora_alpha=6, init_lora_weights=False),
    "dora": lambda targets, _: LoraConfig(target_modules=targets, r=2, use_dora=True, init_lora_weights=False),
    "loha": lambda targets, _: LoHaConfig(target_modules=targets, r=2, alpha=3, init_weights=False),
    "ia3": lambda targets, inputs: IA3Config(
        target_modules=targets, feedforward_modules=inputs, init_ia3_weights=False
    ),
}

CASES = [
    pytest.param(build, method, id=f"{build.__name__}-{method}")
    for build in MODELS
    for method in BY_METHOD
    if (build, method) != (gpt2, "loha")  # PEFT's LoHa takes no Conv1D
]


def peft_made(model, config, folder):
    """PEFT's model with every trainable number drawn anew, and its folder."""
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=drawn)
    theirs.save_pretrained(folder)
    return theirs


def same_outputs(model, run, theirs, adapter, close):
    """PEFT's forward and ours, and the plain model's again afterwards."""
    with torch.no_grad():
        plain, wanted = run(model), run(theirs)
        assert float((wanted - plain).abs().max()) > 0.01 * float(plain.abs().max()), "the adapter says something"
        handle = ak.torch.inject(model, adapter)
        close(run(model), wanted)
        handle.remove()
        assert torch.equal(run(model), plain)


@pytest.mark.parametrize(("build", "method"), CASES)
def test_forward_is_pefts(build, method, tmp_path, close):
    torch.manual_seed(0)
    model, run = build()
    theirs = peft_made(model.eval(), BY_METHOD[method](*MODELS[build]), tmp_path)
    same_outputs(model, run, theirs, ak.read(tmp_path), close)


@pytest.mark.parametrize("build", [qwen_moe, qwen3_moe, gpt_oss], ids=lambda build: build.__name__)
@pytest.mark.parametrize("beside", [[], ["q_proj"]])
def test_forward_on_stacked_experts_is_pefts(build, beside, tmp_path, close):
    torch.manual_seed(0)
    model, run = build()
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(target_modules=beside, target_parameters=experts, r=2, lora_alpha=3, init_lora_weights=False)
    theirs = peft_made(model.eval(), config, tmp_path)
    same_outputs(model, run, theirs, ak.read(tmp_path), close)


def test_embeddings_heads_and_saved_modules_are_pefts(tmp_path, close):
    torch.manual_seed(0)
    model, run = llama()
    config = LoraConfig(
        target_modules=["embed_tokens", "lm_head"], modules_to_save=["norm"], r=4, init_lora_weights=False
    )
    theirs = peft_made(model.eval(), config, tmp_path)
    same_outputs(model, run, theirs, ak.read(tmp_path), close)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_what_is_created_and_trained_here_is_computed_by_peft(method, tmp_path, close):
    torch.manual_seed(0)
    model, run = llama()
    fresh = ak.torch.create(model.eval(), method, targets=["q_proj", "v_proj"], rank=4)
    handle = ak.torch.inject(model, fresh, trainable=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ak.write(handle.adapter(), tmp_path / "out", format="peft")
    mine = run(model)
    handle.remove()
    close(run(PeftModel.from_pretrained(model, tmp_path / "out").eval()), mine)


def test_generation_with_a_cache_follows_the_adapter(close):
    """Step by step over a cache, as a user generates: the same as over the whole text."""
    model, _ = causal("Llama", use_cache=True)
    fresh = ak.torch.create(model.eval(), "lora", targets="all-linear", rank=4)
    ak.torch.inject(model, fresh.map(lambda leaf: leaf + 0.3 * torch.randn(leaf.shape)))
    whole = model(IDS).logits
    first = model(IDS[:, :2])
    second = model(IDS[:, 2:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), whole)
