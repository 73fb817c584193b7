"""Writes tests/data/adapterhub_outputs: outputs of the `adapters` library for every option of its methods.

    python tools/foreign/adapterhub_outputs.py [DEST]

`models` has tiny random models that transformers saved. Each case is an adapter in native form, built from the
library's modules in memory; its outputs are in `expected.safetensors`, in float64. Targets have the names of
transformers 5. Run it in an environment with `adapters` 1.3.0, which needs an older release of transformers.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters
import torch
from adapters import (
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DiReftConfig,
    DoubleSeqBnConfig,
    LoReftConfig,
    NoReftConfig,
    ParBnConfig,
    SeqBnConfig,
    SeqBnInvConfig,
)
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import PHMLayer
from adapters.methods.reft import ReftLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, RobertaConfig, T5Config, ViTConfig

import adapterkit as ak
from adapterkit.methods import METHODS

DEST = Path(__file__).resolve().parents[2] / "tests" / "data" / "adapterhub_outputs"
NAME = "ad"
SMALL: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
TEXT: dict[str, Any] = SMALL | {"vocab_size": 11, "max_position_embeddings": 16}
CONFIGS = {
    "bert": BertConfig(**TEXT),
    "roberta": RobertaConfig(**TEXT),
    "gpt2": GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16),
    "llama": LlamaConfig(**TEXT, num_key_value_heads=1),
    "t5": T5Config(vocab_size=11, d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=12, decoder_start_token_id=0),
    "vit": ViTConfig(**SMALL, image_size=8, patch_size=4),
}

SHARED = {"phm_dim": 2, "reduction_factor": 2, "phm_rank": 1}
USUAL = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": SeqBnConfig(reduction_factor=4, mh_adapter=True),
    "parallel": ParBnConfig(reduction_factor=4, mh_adapter=True),
    "adapter_plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0, mh_adapter=True),
    "compacter": CompacterConfig(**SHARED),
    "loreft": LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
}
"""For every model."""

SEQUENTIAL: dict[str, Any] = {
    "mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "gelu_new",
}  # fmt: skip
NAMES = ("gelu", "leakyrelu", "mish", "quick_gelu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh", "laplace")
ALL = {
    "post_add": BnConfig(**SEQUENTIAL, original_ln_before=True, residual_before_ln="post_add"),
    "past_the_norm": BnConfig(**SEQUENTIAL, original_ln_before=True, residual_before_ln=False),
    "bare": BnConfig(**SEQUENTIAL, original_ln_after=False),
    "norms": BnConfig(**SEQUENTIAL, ln_before=True, ln_after=True),
    "norm_last": BnConfig(**SEQUENTIAL, ln_after=True, adapter_residual_before_ln=True),
    "parallel_bare": BnConfig(**SEQUENTIAL, is_parallel=True, ln_after=True, original_ln_after=False, scaling=0.5),
    "gated": BnConfig(**SEQUENTIAL, use_gating=True),
    "gated_parallel": BnConfig(**SEQUENTIAL, use_gating=True, is_parallel=True),
    "learned": BnConfig(**SEQUENTIAL, scaling="learned"),
    "channels": BnConfig(**SEQUENTIAL, scaling="channel"),
    "per_layer": BnConfig(**(SEQUENTIAL | {"reduction_factor": {"0": 2, "default": 8}}), leave_out=[1]),
    "compacter_plus": CompacterPlusPlusConfig(**SHARED, factorized_phm_W=False, phm_bias=False),
    "compacter_factors": CompacterConfig(**SHARED, factorized_phm_rule=True, shared_phm_rule=False),
    "compacter_shared": CompacterConfig(**SHARED, shared_W_phm=True, factorized_phm_rule=True),
    "noreft": NoReftConfig(r=2, prefix_positions=3, suffix_positions=4, tied_weights=True),
    "direft": DiReftConfig(r=2, prefix_positions=1, non_linearity="relu"),
    "invertible": SeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=2),
    **{name: BnConfig(**(SEQUENTIAL | {"non_linearity": name})) for name in NAMES},
}  # fmt: skip
"""For BERT: the options one by one."""

RESIDUALS = {
    ("gpt2", "mh"): ("attn", "ln_1"), ("gpt2", "output"): ("mlp", "ln_2"),
    ("llama", "mh"): ("self_attn", "input_layernorm"), ("llama", "output"): ("mlp", "post_attention_layernorm"),
    ("vit", "mh"): ("attention", "layernorm_before"), ("vit", "output"): ("mlp", "layernorm_after"),
}  # fmt: skip
"""In a block: the module that an adapter stands behind, and the one that reads the residual."""


def place(kind: str, path: str, module: Any) -> tuple[str, str]:
    """Target and residual of a bottleneck layer."""
    if kind in ("bert", "roberta"):
        return path, ""
    if kind == "t5":
        names = [
            name
            for name, child in module.named_children()
            if name in ("SelfAttention", "EncDecAttention", "DenseReluDense")
        ]
        return f"{path}.{names[0]}", "layer_norm"
    where = "mh" if path.endswith("attention_adapters") else "output"
    block = path.removesuffix(".output_adapters").removesuffix(".attention_adapters").removesuffix(".output")
    name, residual = RESIDUALS[kind, where]
    return f"{block.replace('encoder.layer', 'layers')}.{name}", residual


def updates(kind: str, model: Any) -> Iterator[tuple[str, Any]]:
    """Every update of an adapted model, from its modules."""
    shared = getattr(model, "shared_parameters", {})
    shared = dict(shared[NAME].items()) if NAME in shared else {}
    for path, module in model.named_modules():
        if isinstance(module, BottleneckLayer) and NAME in module.adapters:
            target, residual = place(kind, path, module)
            yield target, bottleneck(module.adapters[NAME], residual, shared)
        elif isinstance(module, ReftLayer) and NAME in module.refts:
            yield (
                path.removesuffix(".reft_layer").replace(
                    "encoder.layer", "layers" if kind == "vit" else "encoder.layer"
                ),
                reft(module.refts[NAME]),
            )
        elif path == "invertible_adapters" and NAME in module:
            yield "embeddings", invertible(module[NAME])


def bottleneck(adapter: Any, residual: str, shared: dict[str, Tensor]) -> Any:
    """A bottleneck or a Compacter."""
    config = dict(adapter_config(adapter))
    down = next(child for child in adapter.adapter_down if isinstance(child, nn.Linear | PHMLayer))
    fields: dict[str, Any] = {}
    if isinstance(down, PHMLayer):
        fields |= phm(down, "down", shared) | phm(adapter.adapter_up, "up", shared)
    else:
        fields |= {
            "down": down.weight,
            "down_bias": down.bias,
            "up": adapter.adapter_up.weight,
            "up_bias": adapter.adapter_up.bias,
        }
    for module, field in (
        ("adapter_norm_before", "norm_before"),
        ("adapter_norm_after", "norm_after"),
        ("gate", "gate"),
    ):
        if hasattr(adapter, module):
            fields |= {field: getattr(adapter, module).weight, f"{field}_bias": getattr(adapter, module).bias}
    if isinstance(adapter.scaling, Tensor):
        fields["scaling_factor" if len(adapter.scaling) == 1 else "channel_scaling"] = adapter.scaling
    else:
        fields["scaling"] = adapter.scaling
    return METHODS["compacter" if isinstance(down, PHMLayer) else "bottleneck"](
        **fields, **config, residual=residual, parallel=type(adapter).__name__ == "ParallelAdapter"
    )


def adapter_config(adapter: Any) -> Iterator[tuple[str, Any]]:
    """What the module says of where it stands."""
    yield "original_ln_before", bool(adapter.original_ln_before)
    yield "original_ln_after", bool(adapter.original_ln_after)
    yield "residual_before_ln", str(adapter.residual_before_ln).lower()
    yield "adapter_residual_before_ln", bool(adapter.adapter_residual_before_ln)
    yield "non_linearity", adapter.told


def phm(layer: Any, side: str, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """One PHM layer's tensors, shared ones from the model."""
    rules = {"phm_rule": "rule", "phm_rule_left": "rule_left", "phm_rule_right": "rule_right"}
    blocks = {"W": "W", "W_left": "left", "W_right": "right", "b": "bias"}
    found = {f"{side}_{field}": getattr(layer, name, None) for name, field in (rules | blocks).items()}
    found |= {f"{side}_{field}": shared[name] for name, field in rules.items() if name in shared}
    found |= {
        f"{side}_{f}": shared[n.replace("W", f"W_{side}")]
        for n, f in blocks.items()
        if n.replace("W", f"W_{side}") in shared
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def reft(module: Any) -> Any:
    """The units of one block."""
    fields: dict[str, Any] = {}
    for prefix, unit in zip(("", "suffix_"), module.units, strict=False):
        fields |= {
            f"{prefix}source": unit.learned_source.weight, f"{prefix}source_bias": unit.learned_source.bias,
            f"{prefix}projection": unit.projection.weight,
        }  # fmt: skip
    unit = module.units[0]
    return METHODS["reft"](
        **fields, prefix_positions=module.prefix_positions, suffix_positions=module.suffix_positions,
        subtract_projection=unit.subtract_projection, non_linearity=unit.told, orthogonality=unit.orthogonal,
    )  # fmt: skip


def invertible(block: Any) -> Any:
    """A NICE block."""
    fields = {}
    for half in ("F", "G"):
        for position, way in ((0, "down"), (2, "up")):
            linear = getattr(block, half)[position]
            fields |= {f"{half}_{way}": linear.weight, f"{half}_{way}_bias": linear.bias}
    return METHODS["invertible"](**fields, non_linearity="relu")


def randomize(module: nn.Module, seed: int, spread: float, only: str = "") -> None:
    """Numbers that are none of an initialisation's, exact in float32; norms and scales around 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if f".{only}." in f".{name}." or not only:
                around = 1.0 if name.endswith("scaling") or ("orm" in name and name.endswith("weight")) else 0.0
                parameter.copy_(around + spread * torch.randn(parameter.shape).float())


def inputs(kind: str) -> dict[str, Tensor]:
    """What a model reads."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    if kind == "vit":
        return {
            "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        }
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1).contiguous()} if kind == "t5" else {})


def adapted(folder: Path, config: Any, seed: int) -> Any:
    """The model with a random adapter, in float64."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    adapters.init(model)
    model.add_adapter(NAME, config=config, set_active=True)
    randomize(model, seed, 0.5, NAME)
    for module in model.modules():
        if NAME in getattr(module, "adapters", {}) or NAME in getattr(module, "refts", {}):
            some = module.adapters[NAME] if hasattr(module, "adapters") else module.refts[NAME]
            for each in (some, *getattr(some, "units", ())):
                each.told = (config.non_linearity or "linear").lower()
    model.eval().double()  # `init` leaves modules of its own in training, whose dropout then drops.
    for unit in (module for module in model.modules() if getattr(module, "orthogonal", False)):
        unit.projection.weight = torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64)).Q.T
    return model


def stored(leaf: Tensor) -> Tensor:
    """The values in float32, unless that rounds them."""
    narrow = leaf.detach().float()
    return (narrow if torch.equal(narrow.double(), leaf) else leaf.detach()).clone().contiguous()


@torch.no_grad()
def run(model: Any, kind: str) -> Tensor:
    """The last hidden states."""
    torch.set_default_dtype(torch.float64)  # ReFT makes tensors of the default's.
    out: Tensor = model(**inputs(kind)).last_hidden_state.contiguous()
    torch.set_default_dtype(torch.float32)
    return out


def main() -> int:
    """Writes all models and cases anew."""
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    shutil.rmtree(dest, ignore_errors=True)
    expected: dict[str, Tensor] = {}
    for kind, config in CONFIGS.items():
        base = AutoModel.from_config(config)
        randomize(base, sum(kind.encode()), 0.3)
        base.save_pretrained(dest / "models" / kind)
        expected |= {f"{kind}.{name}": value for name, value in inputs(kind).items()}
        expected[f"{kind}.y"] = run(base.eval().double(), kind)
        for name, case in (USUAL | (ALL if kind == "bert" else {})).items():
            model = adapted(dest / "models" / kind, case, sum(f"{kind}_{name}".encode()))
            found = {ak.Target(path): (update,) for path, update in updates(kind, model)}
            adapter = ak.Adapter(found).map(stored)
            ak.write(adapter, dest / f"{kind}.{name}.safetensors")
            expected[f"{kind}.{name}"] = run(model, kind)
            assert (expected[f"{kind}.{name}"] - expected[f"{kind}.y"]).abs().max() > 0.05
    save_file(expected, dest / "expected.safetensors")
    sizes = [file.stat().st_size for file in dest.rglob("*") if file.is_file()]
    print(f"{len(sizes)} files, {sum(sizes)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
