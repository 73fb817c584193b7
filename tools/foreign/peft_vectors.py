"""Writes spec/vectors/formats/peft: small folders that PEFT itself saved, each with the same adapter in native form.

    python tools/foreign/peft_vectors.py [DEST]

The native form is built by hand from the modules that PEFT holds in memory, never by reading the files back: what the
reader makes of a folder can be held against it. Run it with the release of PEFT that a vector is to be of.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("PYTHONHASHSEED") != "0":
    # PEFT writes sets of names in the order of their hashes.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.tuners.adaption_prompt import AdaptedAttention
from peft.tuners.ia3 import IA3Layer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.miss.layer import MissLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import adapterkit as ak
from adapterkit.methods import METHODS

DEST = Path(__file__).resolve().parents[2] / "spec" / "vectors" / "formats" / "peft"
NAME = "default"
"""What PEFT calls the one adapter of a model."""

EMBEDDINGS = ("lm_head", "model.embed_tokens")
"""Modules of a transformers model that PEFT saves whole once they are adapted."""

Updates = Iterator[tuple[ak.Target, Any]]


class Layers(nn.Module):
    """One layer of most kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 4), "up": nn.Linear(4, 6)}) for _ in range(2))
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, (3, 2)), nn.Conv3d(2, 3, 2)
        self.point = nn.Conv2d(4, 3, 1)
        self.emb = nn.Embedding(7, 4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.experts = Experts()
        self.head = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


class Experts(nn.Module):
    """Three experts, stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 10, 4))
        self.down_proj = nn.Parameter(torch.zeros(3, 4, 5))


def llama() -> nn.Module:
    """A model with embeddings that transformers knows as such."""
    sizes = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    )


def t5() -> nn.Module:
    """A model with an encoder and a decoder, of three layers each."""
    sizes = {"vocab_size": 9, "d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PAIR: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}


@dataclass(frozen=True)
class Case:
    """A model, a config, and how the folder is saved."""

    model: Callable[[], nn.Module]
    config: PeftConfig
    options: dict[str, Any] = field(default_factory=dict)


def lora_config(*modules: str, **options: Any) -> LoraConfig:
    """A LoRA config whose values differ from PEFT's defaults."""
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(modules), **options})


CASES = {
    "lora_linear": Case(Layers, lora_config("q", "up")),
    "lora_rslora_patterns": Case(
        Layers,
        lora_config(
            "q",
            "up",
            use_rslora=True,
            r=3,
            rank_pattern={r"block\.1\..*": 1, "0.q": 2, "q": 4},
            alpha_pattern={"up": 5, r"1.\w": 7},
        ),
    ),
    "lora_conv": Case(Layers, lora_config("conv1", "conv2", "conv3", "point")),
    "lora_embedding": Case(llama, lora_config("embed_tokens", "lm_head")),
    "lora_mha": Case(Layers, lora_config("attn", "q", rank_pattern={"attn": 1}, bias="lora_only")),
    "lora_experts": Case(
        Layers,
        lora_config(
            "q", target_parameters=["experts.down_proj", "experts.gate_up_proj"], rank_pattern={"down_proj": 1}
        ),
    ),
    "lora_bias": Case(Layers, lora_config("q", "conv2", lora_bias=True)),
    "dora": Case(Layers, lora_config("q", "conv1", "conv2", "emb", use_dora=True)),
    "ia3": Case(Layers, IA3Config(target_modules=["q", "up", "conv2", "conv3"], feedforward_modules=["up", "conv3"])),
    "loha": Case(Layers, LoHaConfig(r=2, alpha=3, target_modules=["q", "conv1", "conv2"], alpha_pattern={"q": 5})),
    "loha_cores": Case(
        Layers, LoHaConfig(r=2, alpha=3, target_modules=["q", "conv1", "conv2", "point"], use_effective_conv2d=True)
    ),
    "miss": Case(Layers, MissConfig(r=4, target_modules=["q", "up"])),
    "miss_mini": Case(Layers, MissConfig(r=2, mini_r=2, target_modules=["q", "up"], init_weights="mini")),
    "modules_to_save": Case(Layers, lora_config("q", modules_to_save=["head"])),
    "trainable_tokens": Case(llama, TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"])),
    "lora_tokens": Case(llama, lora_config("q_proj", trainable_token_indices=[8, 0, 3])),
    "prompt": Case(llama, PromptTuningConfig(**CAUSAL)),
    "prompt_pair": Case(t5, PromptTuningConfig(**PAIR)),
    "prompt_classifier": Case(llama, PromptTuningConfig(**CAUSAL, modules_to_save=["lm_head"])),
    "p_tuning": Case(llama, PromptEncoderConfig(**CAUSAL, encoder_hidden_size=5)),
    "cpt": Case(
        llama,
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 1, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    ),
    "multitask_prompt": Case(llama, MultitaskPromptTuningConfig(**CAUSAL, num_tasks=2, num_ranks=2)),
    "multitask_prompt_pair": Case(t5, MultitaskPromptTuningConfig(**PAIR, num_tasks=2)),
    "prefix": Case(llama, PrefixTuningConfig(**CAUSAL)),
    "prefix_projected": Case(llama, PrefixTuningConfig(**CAUSAL, prefix_projection=True, encoder_hidden_size=5)),
    "prefix_pair": Case(t5, PrefixTuningConfig(**PAIR)),
    "cartridge": Case(llama, CartridgeConfig(**CAUSAL, num_frozen_tokens=2)),
    "adaption_prompt": Case(llama, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)),
    "bin_file": Case(Layers, lora_config("q", "conv2"), {"safe_serialization": False}),
}


def updates(model: Any, bias: str) -> Updates:
    """Every update of a PEFT model, from its modules; `bias` is its config's."""
    learned = model.active_peft_config.is_prompt_learning
    if learned:
        yield ak.Target(""), of_context(model, model.active_peft_config)
    for path, module in (model.base_model if learned else model.base_model.model).named_modules():
        if isinstance(module, AdaptedAttention):
            tensors = {"P": module.adaption_prompt[0], "gate": module.adaption_gate}
            yield ak.Target(path), METHODS["adaption_prompt"](**tensors)
        elif isinstance(module, ParamWrapper):
            yield from of_parameter(path, module)
        elif isinstance(module, LoraLayer) and NAME in (*module.lora_A, *module.lora_embedding_A):
            yield from of_lora(path, module, bias)
        elif isinstance(module, IA3Layer):
            vector = module.ia3_l[NAME].flatten()
            yield ak.Target(path), METHODS["ia3"](**{"l_in" if module.is_feedforward else "l": vector})
        elif isinstance(module, LoHaLayer):
            yield of_loha(path, module)
        elif isinstance(module, MissLayer):
            field = "mini" if module.miss_fn == "mini" else "D"
            yield ak.Target(path), METHODS["miss"](**{field: module.miss_block[NAME]})
        elif isinstance(module, TrainableTokensLayer):
            index = torch.tensor(module.token_indices[NAME])
            target = ak.Target(path.removesuffix(".token_adapter"), "in out *k")
            yield target, METHODS["rows"](index=index, values=module.trainable_tokens_delta[NAME])
        elif isinstance(module, ModulesToSaveWrapper):
            for inner, part in module.modules_to_save[NAME].named_modules():
                if own := dict(part.named_parameters(recurse=False)):
                    yield ak.Target(f"{path}.{inner}".rstrip(".")), METHODS["replacement"](**own)


def of_context(model: Any, config: Any) -> Any:
    """The virtual tokens as PEFT computes them; each layer's keys and values cut out one by one."""
    encoder, pair = model.prompt_encoder[NAME], config.num_transformer_submodules == 2
    if config.peft_type == "MULTITASK_PROMPT_TUNING":
        tensors = {"P": encoder.embedding.weight, "columns": encoder.prefix_task_cols, "rows": encoder.prefix_task_rows}
        return METHODS["multitask_prompt"](**tensors, decoder=pair)
    whole = model.get_prompt_embedding_to_save(NAME)
    if config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
        return METHODS["prompt"](P=whole, used=config.num_virtual_tokens if pair else 0)
    d, heads = config.token_dim // config.num_attention_heads, config.num_attention_heads
    P = torch.empty(config.num_layers, 2, heads, config.num_virtual_tokens, d)
    for layer in range(config.num_layers):
        for kind in range(2):
            for head in range(heads):
                start = ((layer * 2 + kind) * heads + head) * d
                P[layer, kind, head] = whole[:, start : start + d]
    return METHODS["prefix"](P=P, step=config.num_transformer_submodules)


def of_lora(path: str, module: Any, bias: str) -> Updates:
    """LoRA or DoRA on a module, after what PEFT saves of the module itself."""
    embedding = NAME in module.lora_embedding_A
    target = ak.Target(place(path, module), "in out *k" if embedding else "out *in")
    if path in EMBEDDINGS:
        weight = module.get_base_layer().weight
        yield target, METHODS["replacement"](weight=weight.T if embedding else weight)
    elif bias == "lora_only" and getattr(module.get_base_layer(), "bias", None) is not None:
        yield target, METHODS["replacement"](bias=module.get_base_layer().bias)
    tensors = {"A": module.lora_embedding_A[NAME], "B": module.lora_embedding_B[NAME]} if embedding else factors(module)
    if NAME in module.lora_magnitude_vector:
        tensors["magnitude"] = module.lora_magnitude_vector[NAME].weight.flatten()
    method = METHODS["dora" if "magnitude" in tensors else "lora"]
    yield target, method(**tensors, scaling=module.scaling[NAME])


def place(path: str, module: Any) -> str:
    """The path of what a wrapper adapts, in names of the base."""
    bare = path.replace(".base_layer", "")
    return f"{bare}.in_proj_weight" if isinstance(module, MultiheadAttention) else bare


def factors(module: Any) -> dict[str, Tensor]:
    """A and B of a linear layer or a convolution; B only mixes channels."""
    A, B = module.lora_A[NAME], module.lora_B[NAME]
    bias = {} if B.bias is None else {"bias": B.bias}
    return {"A": A.weight, "B": B.weight.reshape(B.weight.shape[:2]), **bias}


def of_loha(path: str, module: Any) -> tuple[ak.Target, Any]:
    """LoHa; a core swaps the axes of the factors on the side of the outputs."""
    held = {name: getattr(module, f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    tensors = {name: values[NAME] for name, values in held.items() if NAME in values}
    if "t1" in tensors:
        tensors = {name.replace("_b", "_in"): t.T if name.endswith("_a") else t for name, t in tensors.items()}
    return ak.Target(path), METHODS["loha"](**tensors, scaling=module.scaling[NAME])


def of_parameter(path: str, module: Any) -> Updates:
    """LoRA on a stack of experts, one expert at a time as PEFT's einsum takes them apart."""
    count, rank = module.num_experts, module.r[NAME]
    A, B = module.lora_A[NAME].weight, module.lora_B[NAME].weight
    each_A = [A[e * rank : (e + 1) * rank] for e in range(count)]
    each_B = [B[:, e::count] for e in range(count)]
    target = ak.Target(f"{place(path, module)}.{module.parameter_name}", "e out *in")
    yield target, METHODS["lora"](A=torch.stack(each_A), B=torch.stack(each_B), scaling=module.scaling[NAME])


def make(name: str, case: Case, dest: Path) -> None:
    """One folder: what PEFT saved, and the native form beside it."""
    torch.manual_seed(sum(name.encode()))
    model = get_peft_model(case.model(), case.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(str(dest), **case.options)
    (dest / "README.md").unlink()
    found: dict[ak.Target, tuple[Any, ...]] = {}
    for target, update in updates(model, getattr(case.config, "bias", "none")):
        found[target] = (*found.get(target, ()), update.map(lambda leaf: leaf.detach().clone()))
    adapter = ak.Adapter(found, recipe=(ak.Step("read", {"format": "peft"}),))
    ak.write(adapter, dest / "expected.native.safetensors")
    print(f"{name}: {sum(file.stat().st_size for file in dest.iterdir())} bytes")


def main() -> int:
    """Writes all cases, each folder anew."""
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    for name, case in CASES.items():
        shutil.rmtree(dest / name, ignore_errors=True)
        (dest / name).mkdir(parents=True)
        make(name, case, dest / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
