"""Writes spec/vectors/formats/adapterhub: small folders that the `adapters` library saved.

    python tools/foreign/adapterhub_vectors.py [DEST]

Each folder also has the same adapter in native form, built from the library's modules in memory, and
`forward.safetensors`, an input and the output of the library's model. transformers saved the models to `models`. Run it
in an environment with `adapters` 1.3.0, which needs an older release of transformers.
"""

from __future__ import annotations

import json
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
from adapters import (
    CompacterConfig,
    ConfigUnion,
    DiReftConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    MTLLoRAConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
    VeraConfig,
)
from adapters.configuration import AdapterConfig
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import IA3, LoRALinear, LoRAMergedLinear, MTLLoRA, Vera
from adapters.methods.prefix_tuning import FlatPrefixTuning, PrefixTuningLayer
from adapters.methods.prompt_tuning import PromptTuningLayer
from adapters.methods.reft import ReftLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BartConfig,
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
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
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
    "bart": BartConfig(
        **COMMON, d_model=8, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16, decoder_start_token_id=0, pad_token_id=0,
        bos_token_id=0, eos_token_id=1, forced_eos_token_id=None,
    ),
}  # fmt: skip

Updates = Iterator[tuple[ak.Target, Any]]


@dataclass(frozen=True)
class Case:
    """A model, a config, how the folder is saved, and whether rows are padded, one at either end."""

    model: str
    config: Callable[[], AdapterConfig]
    safetensors: bool = True
    headed: bool = False
    masked: bool = False


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
    "gated_bert": Case("bert", lambda: LoRAConfig(r=2, use_gating=True, intermediate_lora=True)),
    "vera_bert": Case("bert", lambda: VeraConfig(r=2, alpha=4), headed=True),
    "mtl_bert": Case("bert", lambda: MTLLoRAConfig(r=2, alpha=3, n_up_projection=3, weights_sharpness=0.5)),
    "dora_llama": Case("llama", lambda: DoRAConfig(r=2, alpha=2)),
    "dora_bert": Case("bert", lambda: DoRAConfig(r=2, alpha=4)),
    "pfeiffer_bert": Case("bert", lambda: SeqBnConfig(reduction_factor=4)),
    "houlsby_bert": Case("bert", lambda: DoubleSeqBnConfig(reduction_factor={"0": 2, "default": 4}, leave_out=[])),
    "houlsby_gpt2": Case("gpt2", lambda: DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu")),
    "houlsby_t5": Case("t5", lambda: DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True), safetensors=False),
    "normed_bert": Case(
        "bert",
        lambda: SeqBnConfig(
            reduction_factor=4, ln_before=True, ln_after=True, adapter_residual_before_ln=True, scaling="channel"
        ),
        safetensors=False,
    ),
    "post_add_bert": Case(
        "bert", lambda: SeqBnConfig(reduction_factor=4, residual_before_ln="post_add", use_gating=True, scaling=0.5)
    ),
    "parallel_llama": Case("llama", lambda: ParBnConfig(reduction_factor=4, scaling="learned", leave_out=[1])),
    "parallel_bert": Case("bert", lambda: ParBnConfig(reduction_factor=4)),
    "invertible_bert": Case("bert", lambda: SeqBnInvConfig(reduction_factor=4)),
    "compacter_bert": Case("bert", lambda: CompacterConfig(reduction_factor=2, phm_dim=2), headed=True),
    "compacter_own_gpt2": Case(
        "gpt2",
        lambda: CompacterConfig(
            reduction_factor=2, phm_dim=2, shared_phm_rule=False, factorized_phm_rule=True, factorized_phm_W=False
        ),
    ),
    "loreft_bert": Case("bert", lambda: LoReftConfig(r=2, suffix_positions=2)),
    "loreft_tied_llama": Case("llama", lambda: LoReftConfig(prefix_positions=1, suffix_positions=2, tied_weights=True)),
    "loreft_padded_bert": Case("bert", lambda: LoReftConfig(r=2, prefix_positions=1, suffix_positions=2), masked=True),
    "loreft_padded_llama": Case("llama", lambda: LoReftConfig(r=2, prefix_positions=2), masked=True),
    "noreft_gpt2": Case("gpt2", lambda: NoReftConfig(r=2, non_linearity="relu", layers=[1])),
    "direft_gpt2": Case("gpt2", lambda: DiReftConfig(r=2)),
    "prefix_bert": Case("bert", lambda: PrefixTuningConfig(prefix_length=3, bottleneck_size=5), safetensors=False),
    "prefix_flat_llama": Case("llama", lambda: PrefixTuningConfig(prefix_length=3, flat=True), safetensors=False),
    "prefix_t5": Case(
        "t5", lambda: PrefixTuningConfig(prefix_length=2, bottleneck_size=3, cross_prefix=False), safetensors=False
    ),
    "mam_bert": Case(
        "bert",
        lambda: MAMConfig(PrefixTuningConfig(prefix_length=2, bottleneck_size=3), ParBnConfig(reduction_factor=4)),
        safetensors=False,
    ),
    "unipelt_bert": Case(
        "bert",
        lambda: UniPELTConfig(
            PrefixTuningConfig(prefix_length=2, bottleneck_size=3), SeqBnConfig(reduction_factor=4), LoRAConfig(r=2)
        ),
        safetensors=False,
    ),
    "prefix_gated_llama": Case(
        "llama",
        lambda: PrefixTuningConfig(prefix_length=2, flat=True, use_gating=True, shared_gating=False, leave_out=[0]),
        safetensors=False,
    ),
    "prefix_cross_t5": Case(
        "t5", lambda: PrefixTuningConfig(prefix_length=2, flat=True, use_gating=True), safetensors=False
    ),
    "prefix_bart": Case("bart", lambda: PrefixTuningConfig(prefix_length=2, bottleneck_size=3), safetensors=False),
    "prefix_gated_bart": Case(
        "bart", lambda: PrefixTuningConfig(prefix_length=3, flat=True, use_gating=True), safetensors=False, masked=True
    ),
    "prompt_padded_bert": Case("bert", lambda: PromptTuningConfig(prompt_length=2), masked=True),
    "prompt_bert": Case("bert", lambda: PromptTuningConfig(prompt_length=3)),
    "two_kinds_bert": Case(
        "bert",
        lambda: ConfigUnion(
            SeqBnConfig(reduction_factor=4, mh_adapter=True, output_adapter=False, ln_after=True),
            ParBnConfig(reduction_factor=2, scaling="learned"),
        ),
    ),
    "union_bert": Case("bert", lambda: ConfigUnion(SeqBnConfig(reduction_factor=4), LoRAConfig(r=2, alpha=4))),
}


def updates(model: Any) -> Updates:
    """Every update of an adapted model, from its modules."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and NAME in module.loras:
            turned = getattr(module, "fan_in_fan_out", False)
            yield ak.Target(path, "in out *k" if turned else "out *in"), of_lora(module.loras[NAME], model)
        elif isinstance(module, LoRAMergedLinear) and NAME in module.loras:
            yield from of_merged(path, module, module.loras[NAME])
        elif isinstance(module, BottleneckLayer) and NAME in module.adapters:
            yield of_bottleneck(path, module.adapters[NAME], model)
        elif isinstance(module, ReftLayer) and NAME in module.refts:
            yield ak.Target(path.removesuffix(".reft_layer")), of_reft(module.refts[NAME])
        elif isinstance(module, PrefixTuningLayer) and NAME in module.prefixes:
            prefix = module.pool.prefix_tunings[NAME][module.location_key]
            yield ak.Target(path.removesuffix(".prefix_tuning")), of_prefix(prefix, module)
        elif isinstance(module, PromptTuningLayer) and NAME in module.prompt_tunings:
            weight = module.prompt_tunings[NAME].prompt_embedding.weight
            yield ak.Target("embeddings"), METHODS["prompt"](P=weight)
    for name, block in getattr(model, "invertible_adapters", {}).items():
        assert name == NAME
        yield ak.Target("embeddings"), of_coupling(block)


PLACES = {
    "gpt2": {"attention_adapters": ("attn", "ln_1"), "output_adapters": ("mlp", "ln_2")},
    "llama": {
        "attention_adapters": ("self_attn", "input_layernorm"),
        "output_adapters": ("mlp", "post_attention_layernorm"),
    },
}
"""Where a block's adapters act: the module whose output changes, and the one that reads the residual."""


def of_bottleneck(path: str, adapter: Any, model: Any) -> tuple[ak.Target, Any]:
    """A bottleneck adapter or Compacter."""
    kind, residual, target = model.config.model_type, "", path
    if kind in PLACES:
        block, _, layer = path.rpartition(".")
        name, residual = PLACES[kind][layer]
        target = f"{block}.{name}"
    elif kind == "t5":
        inner = {0: "SelfAttention", len(model.get_submodule(path.rpartition(".")[0])) - 1: "DenseReluDense"}
        target, residual = f"{path}.{inner.get(int(path[-1]), 'EncDecAttention')}", "layer_norm"
    first, scaling = adapter.adapter_down[int(adapter.add_layer_norm_before)], adapter.scaling
    vector = (
        {} if isinstance(scaling, float) else {"scaling_factor" if len(scaling) == 1 else "channel_scaling": scaling}
    )
    if hasattr(first, "weight"):
        layers = {"down": first.weight, "down_bias": first.bias, "up": adapter.adapter_up.weight}
        layers["up_bias"] = adapter.adapter_up.bias
    else:
        layers = {**of_phm(first, "down", model), **of_phm(adapter.adapter_up, "up", model)}
    pairs = {"norm_before": "adapter_norm_before", "norm_after": "adapter_norm_after", "gate": "gate"}
    held = {field: getattr(adapter, name) for field, name in pairs.items() if hasattr(adapter, name)}
    extra = {f: m.weight for f, m in held.items()} | {f"{f}_bias": m.bias for f, m in held.items()}
    update = METHODS["bottleneck" if "up" in layers else "compacter"](
        **layers, **extra, **vector, residual=residual,
        non_linearity="relu" if union(model) else model.adapters_config.get(NAME)["non_linearity"],
        scaling=scaling if isinstance(scaling, float) else 1.0,
        parallel=type(adapter).__name__ == "ParallelAdapter",
        original_ln_before=adapter.original_ln_before, original_ln_after=adapter.original_ln_after,
        residual_before_ln=str(adapter.residual_before_ln).lower(),
        adapter_residual_before_ln=adapter.adapter_residual_before_ln,
    )  # fmt: skip
    return ak.Target(target), update


def union(model: Any) -> bool:
    """Whether the adapter is of several methods."""
    return model.adapters_config.get(NAME).architecture == "union"


def of_phm(layer: Any, way: str, model: Any) -> dict[str, Tensor]:
    """A Compacter layer's tensors, shared ones too."""
    base = getattr(model, model.base_model_prefix, model)
    shared = dict(base.shared_parameters[NAME].items()) if NAME in base.shared_parameters else {}
    found = {"bias": layer.b}
    for field, name in (("rule", "phm_rule"), ("rule_left", "phm_rule_left"), ("rule_right", "phm_rule_right")):
        if name in shared or hasattr(layer, name):
            found[field] = shared.get(name, getattr(layer, name, None))
    for field, name in (("W", "W"), ("left", "W_left"), ("right", "W_right")):
        if hasattr(layer, name):
            found[field] = getattr(layer, name)
    return {f"{way}_{field}": tensor for field, tensor in found.items()}


def of_reft(reft: Any) -> Any:
    """ReFT, its projections as the library computes them."""
    tensors = {}
    for prefix, unit in zip(("", "suffix_"), reft.units, strict=False):
        tensors |= {f"{prefix}source": unit.learned_source.weight, f"{prefix}source_bias": unit.learned_source.bias}
        tensors[f"{prefix}projection"] = unit.projection.weight
    first, word = reft.units[0], getattr(reft.units[0].non_linearity.f, "__class__", None)
    return METHODS["reft"](
        **tensors, prefix_positions=reft.prefix_positions, suffix_positions=reft.suffix_positions,
        subtract_projection=first.subtract_projection, orthogonality=first.orthogonal,
        non_linearity={"Identity": "linear", "ReLU": "relu"}[word.__name__],
    )  # fmt: skip


def of_prefix(prefix: Any, module: Any) -> Any:
    """One layer's share of a prefix, with its gate."""
    layer, held = module.prefixes[NAME], module.prefix_gates
    gate = {"gate": held[NAME].weight, "gate_bias": held[NAME].bias} if NAME in held else {}
    word = "gated_" if gate else ""
    layers, heads, d = prefix.n_layers, prefix.n_heads, prefix.n_embd_per_head
    if isinstance(prefix, FlatPrefixTuning):
        whole = prefix.control_trans.reshape(-1, layers, 2, heads, d)
        return METHODS[f"{word}prefix"](P=whole[:, layer].permute(1, 2, 0, 3)[None], **gate)
    first, last = prefix.control_trans[0], prefix.control_trans[2]
    shares = {"W2": last.weight.reshape(layers, 2, heads, d, -1), "b2": last.bias.reshape(layers, 2, heads, d)}
    shares = {field: share[layer : layer + 1] for field, share in shares.items()}
    return METHODS[f"{word}prefix_mlp"](E=prefix.wte.weight, W1=first.weight, b1=first.bias, **shares, **gate)


def of_coupling(block: Any) -> Any:
    """An invertible adapter of the kind that the library calls NICE."""
    layers = {f"{half}_{way}": getattr(block, half)[at] for half in "FG" for way, at in (("down", 0), ("up", 2))}
    tensors = {name: layer.weight for name, layer in layers.items()}
    return METHODS["invertible"](**tensors, **{f"{name}_bias": layer.bias for name, layer in layers.items()})


def of_lora(lora: Any, model: Any) -> Any:
    """LoRA and its like on a plain layer."""
    if isinstance(lora, Vera):
        shared = getattr(model, model.base_model_prefix, model).shared_parameters[NAME]
        tensors = {"A": shared["lora_A"], "B": shared["lora_B"], "D": lora.vera_D, "E": lora.vera_B}
        return METHODS["vera_matrices"](**tensors, scaling=lora.scaling)
    if isinstance(lora, MTLLoRA):
        tensors = {"A": lora.lora_A, "B": lora.lora_B, "values": lora.task_specific.values, "weights": lora.weights}
        return METHODS["mtl_lora"](**tensors, scaling=lora.scaling, sharpness=lora.weights_sharpness)
    if lora.use_gating:
        gate = {"gate": lora.gate.weight, "gate_bias": lora.gate.bias}
        return METHODS["gated_lora"](A=lora.lora_A, B=lora.lora_B, **gate)
    if isinstance(lora, IA3):
        return METHODS["ia3"](l=lora.lora_B[:, 0] * lora.scaling)
    if lora.use_dora:
        factors = {"A": lora.lora_A, "B": lora.lora_B, "magnitude": lora.m.weight[:, 0]}
        return METHODS["dora_outputs"](**factors, scaling=lora.scaling)
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
            values = around + spread * torch.randn(parameter.shape)
            if name.endswith("original"):
                # Householder vectors lie above the diagonal, which holds signs.
                values = values.triu(1) + parameter * torch.eye(*parameter.shape)
            parameter.copy_(values)


def own(model: nn.Module) -> nn.Module:
    """The adapter's parameters alone, as a module."""
    found = nn.ParameterDict()
    for name, parameter in model.named_parameters():
        if f".{NAME}." in f".{name}.":
            found[name.replace(".", "/")] = parameter
    return found


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states of the model without its head."""
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        out: Tensor = base(**inputs).last_hidden_state
    return out


def tell(model: Any, path: Path) -> None:
    """What the library should have written of DiReFT, whose files it takes for NoReFT's."""
    config = json.loads(path.read_text("utf-8"))
    if not getattr(model.adapters_config.get(NAME), "subtract_projection", True):
        config["config"]["subtract_projection"] = False
        path.write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def make(name: str, case: Case, dest: Path) -> None:
    """One folder: what the library saved, the native form, and a forward pass."""
    # Under sdpa without a mask the library lets the causal mask begin at the prefix.
    model = AutoModel.from_pretrained(
        dest.parent / "models" / case.model, attn_implementation="eager", trust_remote_code=False
    )
    if case.headed:
        headed = BertForSequenceClassification(model.config)
        headed.bert.load_state_dict(model.state_dict(), strict=False)
        model = headed
    model.config.name_or_path = f"tiny/{case.model}"
    adapters.init(model)
    model.add_adapter(NAME, config=case.config(), set_active=True)
    model.eval()
    randomize(own(model), sum(name.encode()), 0.5)
    model.save_adapter(str(dest), NAME, with_head=False, use_safetensors=case.safetensors)
    tell(model, dest / "adapter_config.json")
    found: dict[ak.Target, tuple[Any, ...]] = {}
    for target, update in updates(model):
        found[target] = (*found.get(target, ()), update)
    adapter = ak.Adapter(found, recipe=(ak.Step("read", {"format": "adapterhub"}),))
    adapter = adapter.map(lambda leaf: leaf.detach().clone().contiguous())
    ak.write(adapter, dest / "expected.native.safetensors")
    inputs = {"input_ids": IDS} | (
        {"decoder_input_ids": IDS.flip(1).contiguous()} if case.model in ("t5", "bart") else {}
    )
    inputs |= {"attention_mask": MASK} if case.masked else {}
    save_file(inputs | {"y": run(model, inputs)}, dest / "forward.safetensors")
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
