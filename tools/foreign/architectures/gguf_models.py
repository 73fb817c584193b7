"""Tiny GGUF models, made by llama.cpp's own converter from tiny models of transformers.

The converter is `convert_hf_to_gguf.py` with the package `conversion` beside it, in a checkout of llama.cpp.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 64},
    "gpt_neox": {"rotary_pct": 0.25},
    "cohere2": {"rotary_pct": 0.25},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "minimax_m2": {"rotary_dim": 4},
    "hunyuan_v1_moe": {"moe_intermediate_size": [24, 24]},
    "t5": {"decoder_start_token_id": 0},
    "falcon_h1": {"head_dim": 8},
    "bert": {"architectures": ["BertModel"]},
    "gemma4": {"global_head_dim": 8},
    "gemma4_text": {"global_head_dim": 8},
}
"""model_type -> fields that the converter reads from config.json and transformers 5 does not write there."""


LAYER_TYPES = {"granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"}}
"""model_type -> word of transformers 5 -> the word that files on hubs have, by which the converter tells layers."""

TURNED = {"qwen3_vl_moe": ("experts.gate_up_proj", "experts.down_proj")}
"""model_type -> tensors that files on hubs, and so the converter, have with inputs before outputs.

transformers 5 turns them when it loads such a file, and saves them as its modules have them.
"""

NO_TOKENIZER = {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
"""A tokenizer.json without words: some architectures open the file for their key-values."""


def load(llama_cpp: Path) -> Any:
    """The converter's package.

    Args:
        llama_cpp: a checkout of llama.cpp.
    """
    for folder in (llama_cpp / "gguf-py", llama_cpp):
        sys.path.insert(0, str(folder))
    logging.disable(logging.CRITICAL)
    return importlib.import_module("conversion")


def convert(conversion: Any, base: Path, out: Path, model_type: str = "", **options: Any) -> None:
    """Convert a model to a GGUF file of float32, without its tokenizer.

    Args:
        conversion: what `load` gave.
        base: a folder that `save_pretrained` wrote; `MORE` is added to its config.
        out: the file to write.
        model_type: whose fields of `MORE` to add.
        options: of the converter, such as `fuse_gate_up_exps=True`.
    """
    import gguf

    more = MORE.get(model_type, {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (base / name).exists():
            (base / name).write_text(json.dumps(NO_TOKENIZER))
    hparams = conversion.ModelBase.load_hparams(base, False) | more
    words = LAYER_TYPES.get(model_type, {})
    if words:
        hparams["layer_types"] = [words.get(each, each) for each in hparams["layer_types"]]
    kind = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))

    class Plain(kind):  # type: ignore[misc, valid-type]
        model_arch = kind.model_arch
        no_mtp = getattr(kind, "supports_mtp_export", False)

        def set_vocab(self) -> None:
            """Write no vocabulary: tiny models have none."""

    if model_type in TURNED:
        _turn(base, TURNED[model_type])
    quiet = io.StringIO()
    with torch.inference_mode(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        Plain(base, gguf.LlamaFileType.ALL_F32, out, eager=True, hparams=hparams, **options).write()
    if model_type in TURNED:
        _turn(base, TURNED[model_type])


def _turn(folder: Path, ends: tuple[str, ...]) -> None:
    """Transpose the stacks of experts in a folder's files."""
    for file in folder.glob("*.safetensors"):
        tensors = {k: v.mT.contiguous() if k.endswith(ends) else v for k, v in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


def read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """(general.architecture, tensors) of a file."""
    import gguf

    reader = gguf.GGUFReader(path)
    name = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    return name, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
