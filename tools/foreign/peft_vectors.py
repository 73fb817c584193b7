"""Writes spec/vectors/formats/peft: small folders that PEFT saved, each with the same adapter in native form.

    python tools/foreign/peft_vectors.py [DEST]

The native form is built from PEFT's modules in memory, not from the files, so that the result of the reader can be
compared with it. Run the script with the release of PEFT for which you need a vector. Each family has a module in
peft_families, with `CASES`, a map from name to (model, config), and `update_of`. `NEEDS_BASE` is for families whose
files need the adapted weights, which are then saved beside the files. `KEEPS_BASE` is for families for
which PEFT computes parts of the adapter from these weights, which the script must then not change.

    python tools/foreign/peft_vectors.py DEST NAME...

writes just these.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("PYTHONHASHSEED") != "0":
    # PEFT writes sets of names in the order of their hashes.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import pkgutil
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import peft_families
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, MissConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.miss.layer import MissLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from peft_families import routed, shadow, virtual_tokens
from safetensors.torch import save_file
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


class Square(nn.Module):
    """One convolution of a square kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)


class Grouped(nn.Module):
    """Convolutions in groups, and one that is in none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 4, (1, 2), groups=4)
        self.plain = nn.Conv1d(3, 4, 2)


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


def uncached() -> nn.Module:
    """The same, without a cache."""
    model = llama()
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def t5() -> nn.Module:
    """A model with an encoder and a decoder, of three layers each."""
    sizes = {"vocab_size": 9, "d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@dataclass(frozen=True)
class Case:
    """A model, a config, how the folder is saved, and whether the adapted weights are saved beside it."""

    model: Callable[[], nn.Module]
    config: PeftConfig
    options: dict[str, Any] = field(default_factory=dict)
    base: bool = False
    kept: bool = False


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
    "lora_llama": Case(llama, lora_config("q_proj")),
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
    "miss_bat": Case(Layers, MissConfig(r=2, target_modules=["q", "up"], init_weights="bat")),
    "modules_to_save": Case(Layers, lora_config("q", modules_to_save=["head"])),
    "trainable_tokens": Case(llama, TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"])),
    "lora_tokens": Case(llama, lora_config("q_proj", trainable_token_indices=[8, 0, 3])),
    "bin_file": Case(Layers, lora_config("q", "conv2"), {"safe_serialization": False}),
}


FAMILIES = [import_module(f"peft_families.{m.name}") for m in pkgutil.iter_modules(peft_families.__path__)]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Layers": Layers,
    "Grouped": Grouped,
    "Square": Square,
    "llama": llama,
    "t5": t5,
    "uncached": uncached,
}
CASES |= {
    name: Case(
        MODELS[model], config, base=getattr(family, "NEEDS_BASE", False), kept=getattr(family, "KEEPS_BASE", False)
    )
    for family in FAMILIES
    for name, (model, config) in family.CASES.items()
}


def updates(model: Any, config: PeftConfig) -> Updates:
    """Every update of a PEFT model, from its modules."""
    bias = getattr(config, "bias", "none")
    if config.peft_type == "XLORA":
        yield ak.Target(""), routed.update_of_classifier(model, config)
        return
    if config.peft_type == "SHADOW":
        yield from shadow.updates_of_model(model, config)
        return
    learned = model.active_peft_config.is_prompt_learning
    if learned:
        yield ak.Target(""), virtual_tokens.update_of_model(model, config)
    for path, module in (model.base_model if learned else model.base_model.model).named_modules():
        own = [update for family in FAMILIES if (update := family.update_of(path, module, config)) is not None]
        if own:
            yield ak.Target(path), own[0]
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
            method, field = {"mini": ("miss", "mini"), "bat": ("miss_bat", "B")}.get(module.miss_fn, ("miss", "D"))
            yield ak.Target(path), METHODS[method](**{field: module.miss_block[NAME]})
        elif isinstance(module, TrainableTokensLayer):
            index = torch.tensor(module.token_indices[NAME])
            target = ak.Target(path.removesuffix(".token_adapter"), "in out *k")
            yield target, METHODS["rows"](index=index, values=module.trainable_tokens_delta[NAME])
        elif isinstance(module, ModulesToSaveWrapper):
            for inner, part in module.modules_to_save[NAME].named_modules():
                if own := dict(part.named_parameters(recurse=False)):
                    yield ak.Target(f"{path}.{inner}".rstrip(".")), METHODS["replacement"](**own)


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
    # The forward of an attention adds the change of its output projection twice.
    times = 2 if path.endswith(".base_layer.out_proj") else 1
    yield target, method(**tensors, scaling=times * module.scaling[NAME])


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
            if case.kept and not parameter.requires_grad:
                continue
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(str(dest), **case.options)
    if case.config.peft_type == "XLORA":
        routed.save_classifier(model, dest)
    (dest / "README.md").unlink()
    found: dict[ak.Target, tuple[Any, ...]] = {}
    for target, update in updates(model, case.config):
        found[target] = (*found.get(target, ()), update)
    adapter = ak.Adapter(found, recipe=(ak.Step("read", {"format": "peft"}),))
    adapter = adapter.map(lambda leaf: leaf.detach().clone())
    ak.write(adapter, dest / "expected.native.safetensors")
    if case.base:
        modules = dict(model.base_model.model.named_modules())
        weights = {f"{target.path}.weight": modules[target.path].base_layer.weight.detach() for target in found}
        biased = [target.path for target, each in found.items() if any(update.changes_bias for update in each)]
        biases = {f"{path}.bias": modules[path].base_layer.bias.detach() for path in biased}
        save_file({**weights, **biases}, dest / "base.safetensors")
    print(f"{name}: {sum(file.stat().st_size for file in dest.iterdir())} bytes")


def main() -> int:
    """Writes all cases, each folder anew."""
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    for name, case in CASES.items():
        if name not in (sys.argv[2:] or CASES):
            continue
        shutil.rmtree(dest / name, ignore_errors=True)
        (dest / name).mkdir(parents=True)
        make(name, case, dest / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
