"""Writes spec/vectors/formats/adapterhub: small folders that the `adapters` library itself saved.

    python tools/foreign/adapterhub_vectors.py [DEST]

Each holds the same adapter in native form, built by hand from the modules that the library holds in memory, and
`forward.safetensors`: an input and what the library's model makes of it. The models themselves lie in `models`, as
transformers saved them. Run it where `adapters` 1.3.0 is installed; it needs its own release of transformers.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters
import torch
from adapters import IA3Config, LoRAConfig
from adapters.configuration import AdapterConfig
from adapters.methods.lora import IA3, LoRALinear, LoRAMergedLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

import adapterkit as ak
from adapterkit.methods import METHODS

DEST = Path(__file__).resolve().parents[2] / "spec" / "vectors" / "formats" / "adapterhub"
NAME = "ad"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
COMMON = {"vocab_size": 11}

MODELS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(
        **COMMON, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    ),
    "gpt2": GPT2Config(**COMMON, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(
        **COMMON, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12, max_position_embeddings=16,
    ),
    "t5": T5Config(**COMMON, d_model=8, num_layers=2, num_heads=2, d_kv=4, d_ff=12, decoder_start_token_id=0),
}  # fmt: skip

Updates = Iterator[tuple[ak.Target, Any]]


@dataclass(frozen=True)
class Case:
    """A model, a config, and how the folder is saved."""

    model: str
    config: Callable[[], AdapterConfig]
    safetensors: bool = True
    headed: bool = False


CASES = {
    "lora_bert": Case("bert", lambda: LoRAConfig(r=2, alpha=3, intermediate_lora=True, output_lora=True)),
    "lora_bert_headed": Case("bert", lambda: LoRAConfig(r=2, alpha=2), headed=True),
    "lora_gpt2": Case("gpt2", lambda: LoRAConfig(r=2, alpha=3, intermediate_lora=True, output_lora=True)),
    "lora_gpt2_one": Case("gpt2", lambda: LoRAConfig(r=3, alpha=3, attn_matrices=["k"]), safetensors=False),
    "lora_llama": Case(
        "llama", lambda: LoRAConfig(r=2, alpha=5, attn_matrices=["q", "k", "v"], output_lora=True, leave_out=[0])
    ),
    "lora_t5": Case("t5", lambda: LoRAConfig(r=1, alpha=2, intermediate_lora=True), safetensors=False),
    "ia3_bert": Case("bert", IA3Config),
    "ia3_gpt2": Case("gpt2", IA3Config),
}


def updates(model: Any) -> Updates:
    """Every update of an adapted model, from its modules."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and NAME in module.loras:
            turned = getattr(module, "fan_in_fan_out", False)
            yield ak.Target(path, "in out *k" if turned else "out *in"), of_lora(module.loras[NAME])
        elif isinstance(module, LoRAMergedLinear) and NAME in module.loras:
            yield from of_merged(path, module, module.loras[NAME])


def of_lora(lora: Any) -> Any:
    """LoRA or IA3 on a plain layer."""
    if isinstance(lora, IA3):
        return METHODS["ia3"](l=lora.lora_B[:, 0] * lora.scaling)
    return METHODS["lora"](A=lora.lora_A, B=lora.lora_B, scaling=lora.scaling)


def of_merged(path: str, module: Any, lora: Any) -> Updates:
    """A fused weight, one enabled third at a time."""
    third = module.out_features // 3
    enabled = [position for position, on in enumerate(lora.enable_lora) if on]
    for group, position in enumerate(enabled):
        target = ak.Target(path, "in out *k", (position * third, (position + 1) * third))
        B = lora.lora_B[group * third : (group + 1) * third]
        if isinstance(lora, IA3):
            yield target, METHODS["ia3"](l=B[:, 0])
        else:
            A = lora.lora_A[group * lora.r : (group + 1) * lora.r]
            yield target, METHODS["lora"](A=A, B=B, scaling=lora.scaling)


def randomize(module: nn.Module, seed: int, spread: float) -> None:
    """Numbers that are none of an initialisation's, norms around 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            around = 1.0 if "orm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + spread * torch.randn(parameter.shape))


def own(model: nn.Module) -> nn.Module:
    """The adapter's parameters alone, as a module."""
    found = nn.ParameterDict()
    for name, parameter in model.named_parameters():
        if f".{NAME}." in f".{name}.":
            found[name.replace(".", "/")] = parameter
    return found


def run(model: Any, name: str) -> Tensor:
    """The last hidden states of the model without its head."""
    base = getattr(model, model.base_model_prefix, model)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS.flip(1)} if name == "t5" else {})
    with torch.no_grad():
        out: Tensor = base(**inputs).last_hidden_state
    return out


def make(name: str, case: Case, dest: Path) -> None:
    """One folder: what the library saved, the native form, and a forward pass."""
    model = AutoModel.from_pretrained(dest.parent / "models" / case.model)
    if case.headed:
        headed = BertForSequenceClassification(model.config)
        headed.bert.load_state_dict(model.state_dict(), strict=False)
        model = headed
    model.eval()
    adapters.init(model)
    model.add_adapter(NAME, config=case.config(), set_active=True)
    randomize(own(model), sum(name.encode()), 0.5)
    model.save_adapter(str(dest), NAME, with_head=False, use_safetensors=case.safetensors)
    found: dict[ak.Target, tuple[Any, ...]] = {}
    for target, update in updates(model):
        found[target] = (*found.get(target, ()), update.map(lambda leaf: leaf.detach().clone().contiguous()))
    adapter = ak.Adapter(found, recipe=(ak.Step("read", {"format": "adapterhub"}),))
    ak.write(adapter, dest / "expected.native.safetensors")
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS.flip(1).contiguous()} if case.model == "t5" else {})
    save_file(inputs | {"y": run(model, case.model)}, dest / "forward.safetensors")
    print(f"{name}: {sum(file.stat().st_size for file in dest.iterdir())} bytes")


def main() -> int:
    """Writes all models and cases, each folder anew."""
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    for name, config in MODELS.items():
        model = AutoModel.from_config(config)
        randomize(model, sum(name.encode()), 0.3)
        model.save_pretrained(dest / "models" / name)
    for name, case in CASES.items():
        shutil.rmtree(dest / name, ignore_errors=True)
        (dest / name).mkdir(parents=True)
        make(name, case, dest / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
