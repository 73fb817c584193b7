"""Merges into GGUF models of families that transformers does not have, and compares with llama.cpp.

    python tools/foreign/check_gguf_published.py LLAMA_CPP [MODEL_TYPE...]

The code of these families is published with their weights. So a base here consists of random tensors with the names and
the config of the published files; llama.cpp's converter fails for a wrong name. The adapter is a LoRA of every linear
layer in PEFT's format. `merge`: adapterkit merges it into the GGUF file. This script computes W + alpha / r * B A in
float64, and the converter converts the result to GGUF. All tensors must be equal, except for the last bits of float32.
`lora`: the pairs that llama.cpp's convert_lora_to_gguf.py writes must be those that adapterkit writes.

Needs a checkout of llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent / "architectures"))

import gguf_models

import adapterkit
from adapterkit.errors import AdapterkitError

LIMIT = 2e-6

FAULTY = {"jais": "swaps the factors of transposed layers, so that they have the shape of the weight turned"}
"""Model types of which llama.cpp's own converter of adapters makes files that llama.cpp refuses."""

LAYERS, EXPERTS, RANK, ALPHA = 2, 3, 2, 6
Tensors = dict[str, np.ndarray[Any, Any]]

LLAMA = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
MLP = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
CONFIG: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A tiny model under published names.

    Attributes:
        classes: the class in its config.
        config: the rest of its config.
        layer: module of a layer `{n}`, of an expert `{e}` -> shape of its weight.
        ends: modules beside the layers -> shape of their weight.
        biases: words of the modules that have a bias.
        transposed: whether linear weights are stored with inputs before outputs.
    """

    classes: str
    config: dict[str, Any]
    layer: dict[str, tuple[int, ...]]
    ends: dict[str, tuple[int, ...]] = field(default_factory=lambda: ends())
    biases: tuple[str, ...] = ()
    transposed: bool = False

    def modules(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every module with the shape of its weight."""
        yield from self.ends.items()
        for n in range(LAYERS):
            for name, shape in self.layer.items():
                for e in range(EXPERTS) if "{e}" in name else [0]:
                    yield name.format(n=n, e=e), shape


def ends(embedding: str = "model.embed_tokens", norm: str = "model.norm", head: str = "lm_head") -> dict[str, Any]:
    """The modules beside the layers."""
    return {embedding: (40, 32), norm: (32,), head: (40, 32)}


def in_layers(stem: str, **groups: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Modules of a layer: group -> name -> shape; `_` stands for a dot in a group's name."""
    return {
        f"{stem}.{group.replace('__', '.') + '.' if group != 'own' else ''}{name}": shape
        for group, several in groups.items()
        for name, shape in several.items()
    }


NORMS = {"input_layernorm": (32,), "post_attention_layernorm": (32,)}
GPT = {"ln_1": (32,), "ln_2": (32,)}
GPT_CONFIG: dict[str, Any] = {
    "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 64, "layer_norm_epsilon": 1e-5, "vocab_size": 40,
}  # fmt: skip
EXPERT = {"w1": (24, 32), "w2": (32, 24), "w3": (24, 32)}

MODELS: dict[str, Published] = {
    "orion": Published(
        "OrionForCausalLM", CONFIG, in_layers("model.layers.{n}", self_attn=LLAMA, mlp=MLP, own=NORMS),
        biases=("norm", "layernorm"),
    ),
    "xverse": Published(
        "XverseForCausalLM", {**CONFIG, "num_key_value_heads": 4},
        in_layers("model.layers.{n}", self_attn=dict.fromkeys(LLAMA, (32, 32)), mlp=MLP, own=NORMS),
    ),
    "codeshell": Published(
        "CodeShellForCausalLM", {**GPT_CONFIG, "num_query_groups": 2},
        in_layers(
            "transformer.h.{n}", attn={"c_attn": (64, 32), "c_proj": (32, 32)},
            mlp={"c_fc": (128, 32), "c_proj": (32, 128)}, own=GPT,
        ),
        ends("transformer.wte", "transformer.ln_f"), biases=("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"),
    ),
    "gpt_refact": Published(
        "GPTRefactForCausalLM", GPT_CONFIG,
        in_layers(
            "transformer.h.{n}", attn={"q": (32, 32), "kv": (16, 32), "c_proj": (32, 32)},
            mlp={"gate_up_proj": (512, 32), "c_proj": (32, 256)}, own=GPT,
        ),
        ends("transformer.wte", "transformer.ln_f"),
    ),
    "jais": Published(
        "JAISLMHeadModel",
        {**GPT_CONFIG, "n_inner": 48, "activation_function": "swiglu", "position_embedding_type": "alibi",
         "mup_embeddings_scale": 2.0, "mup_output_alpha": 2.0, "mup_width_scale": 0.25},
        in_layers(
            "transformer.h.{n}", attn={"c_attn": (96, 32), "c_proj": (32, 32)},
            mlp={"c_fc": (48, 32), "c_fc2": (48, 32), "c_proj": (32, 48)}, own=GPT,
        ),
        ends("transformer.wte", "transformer.ln_f"), biases=("c_attn", "c_proj", "c_fc", "c_fc2", "ln_1", "ln_2"),
        transposed=True,
    ),
    "smallthinker": Published(
        "SmallThinkerForCausalLM",
        {**CONFIG, "moe_num_primary_experts": EXPERTS, "moe_num_active_primary_experts": 2, "moe_ffn_hidden_size": 24},
        in_layers(
            "model.layers.{n}", self_attn=LLAMA, block_sparse_moe={"primary_router": (EXPERTS, 32)}, own=NORMS,
        )
        | {
            f"model.layers.{{n}}.block_sparse_moe.experts.{{e}}.{name}": shape
            for name, shape in {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}.items()
        },
    ),
    "Dream": Published(
        "DreamModel", {**CONFIG, "mask_token_id": 5},
        in_layers("model.layers.{n}", self_attn=LLAMA, mlp=MLP, own=NORMS), biases=("q_proj", "k_proj", "v_proj"),
    ),
    "llada": Published(
        "LLaDAModelLM",
        {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": LAYERS, "mlp_hidden_size": 48, "vocab_size": 40,
         "max_sequence_length": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "hidden_size": 32},
        in_layers(
            "model.transformer.blocks.{n}",
            own={
                **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (32, 32)),
                "ff_proj": (48, 32), "up_proj": (48, 32), "ff_out": (32, 48), "attn_norm": (32,), "ff_norm": (32,),
            },
        ),
        ends("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out"),
    ),
    "llada_moe": Published(
        "LLaDAMoEModelLM", {**CONFIG, "num_experts": EXPERTS, "num_experts_per_tok": 2, "expert_intermediate_size": 24},
        in_layers(
            "model.layers.{n}", self_attn={**LLAMA, "q_norm": (8,), "k_norm": (8,)}, mlp={"gate": (EXPERTS, 32)},
            own=NORMS,
        )
        | {
            f"model.layers.{{n}}.mlp.experts.{{e}}.{name}": shape
            for name, shape in {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}.items()
        },
    ),
    "mpt": Published(
        "MPTForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64, "vocab_size": 40, "expansion_ratio": 4,
         "attn_config": {"clip_qkv": None, "alibi": True, "alibi_bias_max": 8}},
        in_layers(
            "transformer.blocks.{n}", attn={"Wqkv": (96, 32), "out_proj": (32, 32)},
            ffn={"up_proj": (128, 32), "down_proj": (32, 128)}, own={"norm_1": (32,), "norm_2": (32,)},
        ),
        {"transformer.wte": (40, 32), "transformer.norm_f": (32,)},
    ),
    "gemma3_text": Published(
        "Gemma3TextModel", {**CONFIG, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        in_layers(
            "layers.{n}", self_attn={**LLAMA, "q_norm": (8,), "k_norm": (8,)}, mlp=MLP,
            own={**NORMS, "pre_feedforward_layernorm": (32,), "post_feedforward_layernorm": (32,)},
        ),
        {"embed_tokens": (40, 32), "norm": (32,)},
    ),
    # Last: gguf-py's names for Arctic stay in the table that all other architectures of the process share.
    "arctic": Published(
        "ArcticForCausalLM", {**CONFIG, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        in_layers(
            "model.layers.{n}", self_attn=LLAMA, block_sparse_moe={"gate": (EXPERTS, 32)},
            residual_mlp={"w1": (32, 32), "w2": (32, 32), "w3": (32, 32)},
            own={**NORMS, "residual_layernorm": (32,)},
        )
        | {f"model.layers.{{n}}.block_sparse_moe.experts.{{e}}.{name}": shape for name, shape in EXPERT.items()},
    ),
}  # fmt: skip
"""model_type -> the tiny model."""


def tensors_of(model: Published, random: np.random.Generator) -> Tensors:
    """Random tensors of every module, as its files have them."""
    found: Tensors = {}
    for module, shape in model.modules():
        turned = model.transposed and len(shape) == 2 and module not in model.ends
        found[f"{module}.weight"] = random.normal(size=shape[::-1] if turned else shape).astype("f4")
        if module.rpartition(".")[2].endswith(model.biases or "no"):
            found[f"{module}.bias"] = random.normal(size=shape[0]).astype("f4")
    return found


def write(folder: Path, model_type: str, model: Published, tensors: Tensors) -> None:
    """A base as it is published."""
    folder.mkdir()
    config = {"model_type": model_type, "architectures": [model.classes], "torch_dtype": "float32", **model.config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def adapt(folder: Path, model: Published, tensors: Tensors, random: np.random.Generator) -> Tensors:
    """Write PEFT's LoRA of every linear layer inside the layers, and return the merged tensors."""
    folder.mkdir()
    merged, held = dict(tensors), {}
    targets = [module for module, shape in model.modules() if len(shape) == 2 and module not in model.ends]
    for module in targets:
        weight = tensors[f"{module}.weight"]
        out, in_ = weight.shape[::-1] if model.transposed else weight.shape
        A, B = (random.normal(size=size).astype("f4") * 0.3 for size in ((RANK, in_), (out, RANK)))
        held[f"base_model.model.{module}.lora_A.weight"], held[f"base_model.model.{module}.lora_B.weight"] = A, B
        change = ALPHA / RANK * (B.astype("f8") @ A)
        merged[f"{module}.weight"] = (weight + (change.T if model.transposed else change)).astype("f4")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none",
        "fan_in_fan_out": model.transposed, "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(held, folder / "adapter_model.safetensors")
    return merged


def check_merge(conversion: Any, model_type: str, folder: Path) -> str:
    """`right`, with how far the tensors are from each other, or what is wrong."""
    model, random = MODELS[model_type], np.random.default_rng(7)
    tensors = tensors_of(model, random)
    write(folder / "base", model_type, model, tensors)
    merged = adapt(folder / "adapter", model, tensors, random)
    write(folder / "merged", model_type, model, merged)
    gguf_models.convert(conversion, folder / "base", folder / "base.gguf", model_type)
    gguf_models.convert(conversion, folder / "merged", folder / "expected.gguf", model_type)
    report = adapterkit.merge(folder / "base.gguf", folder / "adapter", folder / "out.gguf")
    (name, expected), (_, got) = gguf_models.read(folder / "expected.gguf"), gguf_models.read(folder / "out.gguf")
    _, before = gguf_models.read(folder / "base.gguf")
    if expected.keys() != got.keys():
        return f"wrong: other tensors {sorted(expected.keys() ^ got.keys())[:3]}"
    worst = 0.0
    for each, tensor in expected.items():
        distance = float(np.abs(tensor - got[each]).max(initial=0)) / (float(np.abs(tensor).max(initial=0)) or 1.0)
        if not distance <= LIMIT:
            return f"wrong: {each} by {distance:.1e}"
        worst = max(worst, distance)
    changed = sum(not np.array_equal(before[each], tensor) for each, tensor in expected.items())
    return f"right: {name}, {report.plan.targets} targets, {changed} tensors changed, {worst:.1e}"


def check_lora(llama_cpp: Path, model_type: str, folder: Path) -> str:
    """`same`, with how many pairs of factors, or how adapterkit's file differs from the converter's."""
    model, random = MODELS[model_type], np.random.default_rng(7)
    tensors = tensors_of(model, random)
    write(folder / "base", model_type, model, tensors)
    adapt(folder / "adapter", model, tensors, random)
    argv, sys.argv = sys.argv, ["convert", "--base", str(folder / "base"), "--outfile", str(folder / "theirs.gguf")]
    sys.argv.append(str(folder / "adapter"))
    try:
        runpy.run_path(str(llama_cpp / "convert_lora_to_gguf.py"), run_name="__main__")
    except (Exception, SystemExit) as error:
        return f"llama.cpp refuses ({type(error).__name__}: {str(error)[:60]})"
    finally:
        sys.argv = argv
    if model_type in FAULTY:
        return f"llama.cpp {FAULTY[model_type]}"
    adapterkit.convert(folder / "adapter", folder / "ours.gguf", to="gguf", base=folder / "base")
    (_, theirs), (_, ours) = gguf_models.read(folder / "theirs.gguf"), gguf_models.read(folder / "ours.gguf")
    if theirs.keys() != ours.keys():
        return f"wrong: other keys {sorted(theirs.keys() ^ ours.keys())[:4]}"
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape or not np.array_equal(tensor, ours[name]):
            return f"wrong: {name} {tensor.shape} {ours[name].shape}"
    return f"same: {len(theirs) // 2} pairs"


def main() -> int:
    """Check the model types that were asked for, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("types", nargs="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    conversion = gguf_models.load(arguments.llama_cpp)
    failed = 0
    for model_type in arguments.types or MODELS:
        for kind in ("merge", "lora"):
            with tempfile.TemporaryDirectory() as held:
                try:
                    if kind == "merge":
                        verdict = check_merge(conversion, model_type, Path(held))
                    else:
                        verdict = check_lora(arguments.llama_cpp, model_type, Path(held))
                except AdapterkitError as error:
                    verdict = f"refused: {type(error).__name__}: {error}"
            failed += not verdict.startswith(("right", "same", "llama.cpp"))
            print(f"{model_type:14} {kind:6} {' '.join(verdict.split())[:220]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
