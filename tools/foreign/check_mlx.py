"""Compares adapterkit's names for MLX-LM's models with the names in these models.

    python tools/foreign/check_mlx.py make FOLDER [MODEL_TYPE...]      tiny bases; needs transformers
    MLX/bin/python tools/foreign/check_mlx.py names FOLDER             MLX-LM's names; needs mlx and mlx-lm
    python tools/foreign/check_mlx.py check FOLDER                     compare; needs adapterkit

`make` writes a tiny random model of each model type that transformers and MLX-LM have, with `save_pretrained`. `names`
builds MLX-LM's model of the same config, renames the tensors with its `sanitize`, and finds them by their values.
`check` asks adapterkit for the name of each stored weight in MLX-LM's model: it must be the name at which the values
were found.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

FACTS = "mlx_names.json"

FIELDS: dict[str, Any] = {
    "attention_method": "MLA", "add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": False,
    "block_auto_adjust_ff_dim": False, "block_dim": 32, "first_k_dense_replace": 1, "group_norm_size": 1, "head_dim": 8,
    "hybrid_layer_pattern": [0, 1], "intermediate_size": 48, "is_moe_layer": [False, True], "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5, "max_position_embeddings": 64, "mla_scale_kv_lora": True, "mla_scale_q_lora": True,
    "mlp_bias": False, "moe_layer_freq": 1, "n_ctx": 64, "n_group": 1, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_experts": 4, "num_experts_per_tok": 2, "num_layers": 2, "partial_rotary_factor": 0.5, "post_norm": False,
    "qk_norm": False, "rope_scaling": None, "rope_theta": 10000.0, "rotary_dim": 4, "rotary_emb_base": 10000,
    "rotary_pct": 0.25, "scoring_func": "sigmoid", "shared_intermediate_size": 40, "sliding_window_size": 16,
    "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_rope_theta": 10000.0,
    "swa_v_head_dim": 8, "tie_word_embeddings": False, "topk_method": "noaux_tc", "zero_expert_type": "identity",
    "linear_attn_config": {
        "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4, "kda_layers": [1], "full_attn_layers": [2],
    },
}  # fmt: skip
"""Fields that MLX-LM's configs need and transformers' do not write, or write elsewhere."""

YARN = {
    "type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32,
    "beta_fast": 32, "beta_slow": 1, "long_factor": [1.0, 1.0], "short_factor": [1.0, 1.0],
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_scaling": YARN}, "minicpm3": {"rope_scaling": YARN},
    "exaone4": {"sliding_window_pattern": None}, "granitemoehybrid": {"layer_types": ["attention", "mamba"]},
    "llama4": {"text_config": {"num_experts_per_tok": 1}}, "qwen3_5": {"text_config": {"full_attention_interval": 2}},
    "qwen3_5_moe": {"text_config": {"full_attention_interval": 2}},
}  # fmt: skip

ALSO = ("mistral", "falcon_mamba", "qwen2_5_vl", "gemma4_unified", "minimax_m2", "lfm2_vl")
"""Model types that MLX-LM has in the module of another one."""


def make(folder: Path, types: list[str]) -> None:
    """Write the tiny bases."""
    sys.path.insert(0, str(Path(__file__).parent / "architectures"))
    import transformers
    from tiny import tiny
    from transformers import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    for model_type in types or [*CONFIG_MAPPING]:
        try:
            tiny(model_type).save_pretrained(folder / model_type)
        except Exception as error:  # One model type that cannot be made small must not stop the others.
            print(f"not made {model_type}: {type(error).__name__}: {str(error)[:100]}")


def names(folder: Path) -> None:
    """Write which of MLX-LM's tensors each stored tensor became: its name, and the number in a stack or None."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    facts: dict[str, Any] = {}
    for base in sorted(path.parent for path in folder.glob("*/config.json")):
        config = json.loads((base / "config.json").read_text())
        try:
            module = _module(config["model_type"])
            model = module.Model(module.ModelArgs.from_dict(_filled(config, base.name)))
            stored: dict[str, Any] = {}
            for file in base.glob("*.safetensors"):
                stored |= mx.load(str(file))
            values = {name: np.array(value.astype(mx.float32)) for name, value in stored.items()}
            renamed = model.sanitize(dict(stored)) if hasattr(model, "sanitize") else stored
            became = {name: np.array(value.astype(mx.float32)) for name, value in renamed.items()}
            facts[base.name] = {
                "places": _places(values, became), "parameters": sorted(dict(tree_flatten(model.parameters()))),
            }  # fmt: skip
        except BaseException as error:  # Models that MLX-LM lacks, or that need other packages.
            print(f"no names {base.name}: {type(error).__name__}: {str(error)[:100]}")
    (folder / FACTS).write_text(json.dumps(facts))
    print(f"{len(facts)} model types")


def _module(model_type: str) -> Any:
    source = Path(importlib.import_module("mlx_lm").__path__[0]) / "utils.py"
    assigned = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.Assign))
    renamed = next(ast.literal_eval(a.value) for a in assigned if a.targets[0].id == "MODEL_REMAPPING")  # type: ignore[attr-defined]
    name = {"lfm2_vl": "lfm2-vl"}.get(model_type, renamed.get(model_type, model_type))
    return importlib.import_module(f"mlx_lm.models.{name}")


def _filled(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    own = OWN.get(model_type, {})
    for at, given in ((config, own), (config.get("text_config"), own.get("text_config", {}))):
        if isinstance(at, dict):
            at |= {key: value for key, value in FIELDS.items() if at.get(key) is None}
            at |= {key: value for key, value in given.items() if key != "text_config"}
    return config


def _places(stored: dict[str, Any], became: dict[str, Any]) -> dict[str, Any]:
    def key(value: Any) -> bytes:
        import numpy as np

        return bytes(np.sort(value.ravel()).round(6).tobytes())

    whole = {key(value): name for name, value in became.items()}
    slices = {key(v): (name, n) for name, value in became.items() if value.ndim == 3 for n, v in enumerate(value)}
    found = {}
    for name, value in stored.items():
        if key(value) in whole:
            found[name] = (whole[key(value)], None)
        elif key(value) in slices:
            found[name] = slices[key(value)]
    return found


def check(folder: Path) -> int:
    """Print what differs; returns 1 if anything does."""
    from adapterkit.formats.mlx.conversion import is_absent, to_mlx

    failed = 0
    for model_type, facts in json.loads((folder / FACTS).read_text()).items():
        config = json.loads((folder / model_type / "config.json").read_text())
        right, wrong = 0, []
        parameters = set(facts["parameters"])
        for name, (there, number) in facts["places"].items():
            module, kind = name.removesuffix(".weight").removesuffix(".bias"), name.rpartition(".")[2]
            if there not in parameters or kind not in ("weight", "bias") or is_absent(module, config):
                continue  # MLX-LM's model ignores the tensor: the config of `make` has another layer there.
            moves = to_mlx(module, config, 0)
            given = [(module, None)] if moves is None else [(move.path, move.slot) for move in moves]
            if given == [(there.removesuffix(".weight").removesuffix(".bias"), number)]:
                right += 1
            else:
                wrong.append(f"{name} is {there} {'' if number is None else number}, and not {given[:2]}")
        failed += bool(wrong)
        print(f"{'WRONG' if wrong else 'right':6} {model_type:20} {right} weights", *wrong[:4], sep="\n         ")
    return int(failed > 0)


def main() -> int:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["make", "names", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("types", nargs="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.step == "make":
        sys.path.insert(0, str(Path(__file__).parent / "architectures"))
        make(arguments.folder, arguments.types)
        return 0
    if arguments.step == "names":
        names(arguments.folder)
        return 0
    return check(arguments.folder)


if __name__ == "__main__":
    sys.exit(main())
