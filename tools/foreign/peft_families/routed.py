"""Routed formulas: aLoRA, Arrow, Poly, Lily, X-LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LilyConfig, LoraConfig, PolyConfig, XLoraConfig
from peft.tuners.lily.layer import LilyLayer
from peft.tuners.lora.config import ArrowConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.poly.layer import PolyLayer
from safetensors.torch import save_file

from adapterkit.methods import METHODS

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "up_proj"]}
EXPERT = "spec/vectors/formats/peft/lora_llama"
"""Where an expert lies, seen from the folder in which the vectors are made."""

ROUTER = ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=3)
ROUTER.task_adapter_names = ["task_0", "task_1", "task_2"]

CASES = {
    "alora": ("llama", LoraConfig(**CAUSAL, lora_alpha=3, alora_invocation_tokens=[5, 2, 5], lora_bias=True)),
    "arrow": ("llama", LoraConfig(**CAUSAL, lora_alpha=3, arrow_config=ROUTER)),
    "poly": ("llama", PolyConfig(**CAUSAL, n_tasks=3, n_skills=2, n_splits=2)),
    "lily": ("llama", LilyConfig(**CAUSAL, num_B=3, stride_A=2, scaling=0.5)),
    "xlora": (
        "uncached",
        XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=4, xlora_size=3, xlora_depth=3, top_k_lora=1, softmax_temperature=0.5,
            adapters={"0": EXPERT, "1": EXPERT},
        ),
    ),
}  # fmt: skip


def update_of(_path: str, module: Any, config: Any) -> Any:
    """The update of a wrapped module."""
    if isinstance(module, PolyLayer):
        logits = module.poly_router["default"].module_logits
        return METHODS["poly"](A=module.poly_lora_A["default"], B=module.poly_lora_B["default"], logits=logits)
    if isinstance(module, LilyLayer):
        A, B, router = (getattr(module, f"lily_{name}")["default"].weight for name in ("A", "B", "router"))
        stacked = torch.stack(B.chunk(module.num_B["default"]))
        return METHODS["lily"](A=A, B=stacked, router=router, scaling=module.scaling["default"])
    if not isinstance(module, LoraLayer) or config.peft_type != "LORA":
        return None
    if config.alora_invocation_tokens is not None:
        A, B = module.lora_A["default"].weight, module.lora_B["default"]
        tokens = torch.tensor(config.alora_invocation_tokens)
        return METHODS["alora"](A=A, B=B.weight, bias=B.bias, invocation=tokens, scaling=module.scaling["default"])
    if config.arrow_config is not None:
        A, B, said = module.lora_A["default"].weight, module.lora_B["default"].weight, config.arrow_config
        numbers = {"top_k": said.top_k, "temperature": said.router_temperature, "tasks": len(said.task_adapter_names)}
        return METHODS["arrow"](idle_A=A, idle_B=B, scaling=module.scaling["default"], **numbers)
    return None


def update_of_classifier(model: Any, config: Any) -> Any:
    """X-LoRA's classifier, one linear layer behind the other."""
    layers = [m for m in model.base_model.internal_xlora_classifier.layers if isinstance(m, torch.nn.Linear)]
    first, *inner, last = layers
    return METHODS["xlora"](
        first=first.weight, first_bias=first.bias, inner=torch.stack([m.weight for m in inner]),
        inner_bias=torch.stack([m.bias for m in inner]), last=last.weight, last_bias=last.bias,
        softmax_temperature=config.softmax_temperature, top_k=config.top_k_lora,
    )  # fmt: skip


def save_classifier(model: Any, dest: Path) -> None:
    """All of X-LoRA's classifier, without the experts: PEFT leaves out layers that are called like one of these."""
    for name in model.peft_config.keys() - {"default"}:
        shutil.rmtree(dest / name)
    held = model.base_model.internal_xlora_classifier.state_dict()
    named = {f"base_model.internal_xlora_classifier.{name}": tensor for name, tensor in held.items()}
    save_file(named, dest / "adapter_model.safetensors", {"format": "pt"})
