"""Small random torch models of the kinds that are deployed as ONNX, and adapters for them by PEFT.

Weights of linear layers are whole numbers from -8 to 7 times a power of two, with both ends in each run of 32. Four
and eight bits hold them exactly, so that packed graphs compute what the torch model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip

METHODS = ("lora", "dora", "ia3")


@dataclass(frozen=True, slots=True)
class Deployed:
    """A model.

    Attributes:
        make: builds it.
        inputs: the names and values of its inputs.
        targets: the names of modules that an adapter targets; the last one counts as feed-forward.
        dynamo: whether torch's newer exporter writes it; the older one writes `eval` models of fixed sizes.
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: tuple[str, ...]
    dynamo: bool = True


class Logits(nn.Module):
    """A transformers model that takes token numbers and returns its first output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return out


class Denoised(nn.Module):
    """A U-Net of diffusers that returns its sample alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        out: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return out


class Encoded(nn.Module):
    """A BERT that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return out


def _bert() -> nn.Module:
    import transformers as t

    return Encoded(t.BertForSequenceClassification(t.BertConfig(**SIZES, attn_implementation="eager")))


def _llama() -> nn.Module:
    import transformers as t

    config = t.LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation="eager")
    return Logits(t.LlamaForCausalLM(config))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return make


def _unet() -> nn.Module:
    import diffusers

    return Denoised(
        diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        )
    )  # fmt: skip


TOKENS = {
    "input_ids": torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 7, dtype=torch.int64),
}


def _image(size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


CONVOLUTIONS = ("layer1.0.conv1", "layer2.0.conv2", "downsample.0", "fc")

MODELS: dict[str, Deployed] = {
    "bert": Deployed(_bert, TOKENS, ("query", "value", "output.dense"), dynamo=False),
    "llama": Deployed(_llama, TOKENS, ("q_proj", "v_proj", "down_proj")),
    "vit": Deployed(
        _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4),
        _image(32), ("attn.qkv", "attn.proj", "fc2"),
    ),
    "resnet": Deployed(_timm("resnet18"), _image(64), CONVOLUTIONS, dynamo=False),
    "resnet-dynamo": Deployed(_timm("resnet18"), _image(64), CONVOLUTIONS),
    "convnext": Deployed(
        _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(32, 32, 64, 64)), _image(64),
        ("stem.0", "downsample.1", "mlp.fc1", "mlp.fc2"),
    ),
    "swin": Deployed(
        _timm(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4)
        ),
        _image(64), ("attn.qkv", "reduction", "fc1", "fc2"),
    ),
    "unet": Deployed(
        _unet,
        {
            "sample": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([7]),
            "encoder_hidden_states": torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)),
        },
        ("to_q", "to_v", "conv1", "conv_out", "ff.net.2"),
    ),
}  # fmt: skip


def made(name: str) -> nn.Module:
    """Return a model with its weights on the grid, and with statistics and vectors that no initialization gives."""
    torch.manual_seed(len(name))
    model = MODELS[name].make().eval()
    with torch.no_grad():
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(_on_grid(module.weight))
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
            for word, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                assert parameter.isfinite().all(), f"{key}.{word}"
    return model


def _on_grid(weight: Tensor) -> Tensor:
    into = weight.shape[1]
    q = torch.randint(-8, 8, weight.shape).float()
    q[:, ::32], q[:, 1::32] = -8, 7
    # A random matrix of this scale keeps the size of what it multiplies.
    step = 2.0 ** round(float(torch.log2(torch.tensor(into**-0.5 / 4.6))))
    return q * step


def peft_config(kind: str, targets: tuple[str, ...]) -> Any:
    """Return PEFT's config of one method."""
    import peft

    names = list(targets)
    if kind == "ia3":
        return peft.IA3Config(target_modules=names, feedforward_modules=names[-1:], init_ia3_weights=False)
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False, use_dora=kind == "dora")


def inner_of(model: nn.Module) -> nn.Module:
    """Return the model that adapters are made for, whose names PEFT's folders and weight files have."""
    return model.model if isinstance(model, Logits | Denoised | Encoded) else model


def adapted(name: str, kind: str, folder: Path) -> tuple[Any, nn.Module]:
    """Write an adapter by PEFT; return the output of the torch model with it, and that model with merged weights."""
    import peft

    whole = made(name)
    inner = inner_of(whole)
    torch.manual_seed(7)
    changed = peft.get_peft_model(inner, peft_config(kind, MODELS[name].targets))
    with torch.no_grad():
        for key, parameter in changed.named_parameters():
            if "ia3_" in key:
                parameter.copy_(1 + 0.4 * torch.randn_like(parameter))
            elif "lora_A" in key or "lora_B" in key:
                parameter.mul_(0.3 / max(float(parameter.std()) * parameter.flatten(1).shape[1] ** 0.5, 1e-6))
            elif "lora_magnitude" in key:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    changed.save_pretrained(folder)
    wanted = answered(changed.eval() if inner is whole else whole.eval(), name)
    merged = changed.merge_and_unload()
    if inner is whole:
        return wanted, merged
    whole.model = merged
    return wanted, whole


def answered(model: nn.Module, name: str) -> Any:
    """Return the output of a torch model."""
    with torch.no_grad():
        return model(*MODELS[name].inputs.values()).double().numpy()
