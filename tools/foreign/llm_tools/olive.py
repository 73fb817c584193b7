"""Olive: `olive convert-adapters` on a folder of PEFT's, and Olive's own loader; the sums are those of its graphs."""

import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
from olive.cli.convert_adapters import ConvertAdaptersCommand
from olive.common.utils import load_weights
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from .base import CONFIG, SHAPES, randomize

FILE = "adapter.onnx_adapter"
CASES = {"converted": False, "converted_rslora": True}


def write(folder, _, case):
    """Lets the tool save an adapter."""
    modules = [name.rpartition(".")[2] for name in SHAPES]
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=CASES[case], target_modules=modules)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**CONFIG)), config)
    randomize(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        _convert(scratch, folder / FILE)


def _convert(peft, out):
    command = ConvertAdaptersCommand.__new__(ConvertAdaptersCommand)
    command.args = Namespace(
        adapter_path=peft, adapter_format="onnx_adapter", output_path=str(out), dtype="float32", quantize_int4=False
    )
    command.run.__wrapped__(command)  # Without the report of its use that the tool sends.


def merged(folder, base):
    """What the tool loads from a folder, folded into the base."""
    held = {name: np.asarray(value, "f8") for name, value in load_weights(Path(folder, FILE)).items()}
    result = {}
    for name, A in held.items():
        module, found, _ = name.partition(".lora_A.")
        if found:
            weight = base[f"{module}.weight"].astype("f8")
            result[f"{module}.weight"] = (weight + (A @ held[f"{module}.lora_B.weight"]).T).astype("f4")
    return result
