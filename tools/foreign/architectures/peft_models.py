"""PEFT's adapters on tiny models, and what such models are called with; needs no adapterkit.

The tools that run under several versions of transformers share this.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model


def experts_of(model: torch.nn.Module) -> list[str]:
    """Names of the 3-D parameters that PEFT adapts as stacks of experts."""
    found = [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]
    return [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]


def linears_of(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers, without heads and routers that share a tensor with an embedding."""
    # PEFT refuses the output projection of Mamba, and subclasses of a linear layer that do more than one. The output
    # projection of torch's own attention is never called, so an adapter of PEFT there changes nothing before a merge.
    off = "out_proj" if "mamba" in repr(model).lower() else "?"
    odd = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    found = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "Linear" in type(m).__name__ and not isinstance(m, odd)
    ]
    found += [(n, m) for n, m in model.named_modules() if isinstance(m, transformers.pytorch_utils.Conv1D)]
    tied = {id(model.get_input_embeddings().weight)} if _embeds(model) else set()
    # Two layers of a detector may read one tensor; PEFT adapts each alone, and its own merge changes both.
    counts = Counter(id(m.weight) for _, m in found)
    tied |= {each for each, count in counts.items() if count > 1}
    return [n for n, m in found if id(m.weight) not in tied and not n.endswith(off)]


def _embeds(model: Any) -> bool:
    try:
        return getattr(model.get_input_embeddings(), "weight", None) is not None
    except NotImplementedError:
        return False


def adapted(model: Any) -> Any:
    """PEFT's model with random factors at every linear layer and every stack of experts."""
    torch.manual_seed(1)
    linears = linears_of(model)
    try:
        model.get_input_embeddings()
    except NotImplementedError:  # PEFT asks for them where a config ties, as those of detectors without any do.
        model.get_input_embeddings = torch.nn.Module
    # PEFT takes a name in a list for the end of any module's: GIT's head is called `output`, and so are other modules.
    ends = {f".{name}" for name in linears}
    clash = any(any(f".{n}".endswith(end) for end in ends) for n, _ in model.named_modules() if n not in set(linears))
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules="|".join(map(re.escape, linears)) if clash else linears,
        target_parameters=experts_of(model) or None,
        init_lora_weights=False,
    )  # fmt: skip
    found = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return found.eval()


def inputs_of(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """What such models are called with: tokens, pictures, sounds, and both at once; one of these fits most models."""
    made = torch.Generator().manual_seed(3)
    tokens = torch.arange(40, 52).reshape(2, 6)
    mask = torch.ones_like(tokens)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    yield {"input_ids": tokens}
    yield {"input_ids": tokens, "decoder_input_ids": tokens[:, :3]}
    yield {"input_ids": tokens, "attention_mask": mask}
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 16
    size = size if isinstance(size, int) else size[0]
    channels = getattr(vision, "num_channels", 3)
    pixels = noise(2, channels, size, size)
    yield {"pixel_values": pixels}
    yield {"pixel_values": noise(2, getattr(config, "num_frames", 4), channels, size, size)}
    yield {"pixel_values": pixels, "bool_masked_pos": torch.zeros(2, (size // 4) ** 2).bool()}
    for image in (pixels, pixels.unsqueeze(1)):
        both = {"input_ids": tokens, "attention_mask": mask, "pixel_values": image}
        yield both
        yield {**both, "image_attention_mask": torch.ones(2, 6, 1).long()}
        yield {**both, "qformer_input_ids": tokens[:, :2]}
        yield {
            **both,
            "image_embeds_position_mask": torch.arange(6).expand(2, 6) < getattr(config, "latent_query_num", 1),
        }
    # Some models want as many image tokens as the picture, or a Q-Former, gives them features.
    image_token = getattr(config, "image_token_index", None) or getattr(config, "image_token_id", None)
    for count in (1, 2, 4, 16) if isinstance(image_token, int) else ():
        held = torch.cat([torch.full((2, count), image_token), tokens], 1)
        both = {"input_ids": held, "attention_mask": torch.ones_like(held), "pixel_values": pixels}
        yield both
        yield {**both, "qformer_input_ids": tokens[:, :2]}
    # NaFlex pictures of SigLIP 2 are rows of patches.
    patches = {
        "pixel_values": noise(2, 16, 48), "pixel_attention_mask": torch.ones(2, 16).long(),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }  # fmt: skip
    yield {"input_ids": tokens, **patches}
    flat = torch.cat([torch.ones(2, 8, 2), noise(2, 8, 48)], 2)
    yield {"flattened_patches": flat, "decoder_input_ids": tokens[:, :3]}
    yield {"pixel_values": noise(2, channels, 64, 64)}
    bins = getattr(config, "num_mel_bins", 16)
    length = 2 * getattr(config, "max_source_positions", 32)
    yield {"input_values": noise(2, 400)}
    yield {"input_values": noise(2, 400), "decoder_input_ids": tokens[:, :3]}
    yield {"input_values": noise(2, 2000), "decoder_input_ids": tokens[:, :3]}
    yield {"input_values": noise(2, getattr(config, "max_length", 32), bins)}
    for width in dict.fromkeys((bins, getattr(config, "input_feat_per_channel", bins), 16, 80)):
        yield {"input_features": noise(2, width, length), "decoder_input_ids": tokens[:, :3]}
        yield {"input_features": noise(2, 32, width), "decoder_input_ids": tokens[:, :3]}
        yield {"input_features": noise(2, 32, width)}


def output_of(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What the model gives for some inputs; None where it does not take them."""
    torch.manual_seed(0)  # ViT-MAE masks patches at random.
    with torch.no_grad(), contextlib.suppress(Exception):
        result = model(**given)
        parts = ("logits", "logits_per_image", "last_hidden_state", "pooler_output")
        found = next((part for name in parts if (part := getattr(result, name, None)) is not None), None)
        if found is not None and torch.isfinite(found).all():
            return found.clamp(min=-100.0)  # Chameleon gives image tokens the smallest number there is.
    # Llama 4 of transformers 5.24 fails in the class around its language model.
    inner = getattr(model, "language_model", None)
    return None if inner is None or inner is model else output_of(inner, given)


def run(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    """The first inputs that a model takes, and what it gives for them; None for a model that takes none of these."""
    outputs = ((given, output_of(model, given)) for given in inputs_of(model))
    return next(((given, output) for given, output in outputs if output is not None), None)


def logits_of(model: Any) -> torch.Tensor | None:
    """What the model gives for a few tokens, or a picture or sound; None for a model that takes none of these."""
    found = run(model)
    return None if found is None else found[1]
