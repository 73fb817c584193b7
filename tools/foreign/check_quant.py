"""Merges into every quantized vector, quantizes the result again, and loads it in the scheme's library.

    python tools/foreign/check_quant.py

The library and adapterkit must read the same numbers from the output. GPTQ, AWQ and ModelOpt's NVFP4 are not checked,
because their libraries need a GPU; HQQ is not checked, because it is not quantized again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

import adapterkit as ak
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.methods.lora import LoRA
from adapterkit.quant import dequantized

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "quant"
Tensors = dict[str, torch.Tensor]


def bnb_4bit(stored: Tensors, _: Path) -> torch.Tensor:
    """By the library's own state."""
    state = bnb.QuantState.from_dict({k: v for k, v in stored.items() if k.startswith("m.weight.")}, "cpu")
    if state.shape[-1] % state.blocksize:  # its CPU kernel takes wrong scales there
        state.shape, shape = torch.Size([1, state.shape.numel()]), state.shape
        return bnb.dequantize_4bit(stored["m.weight"], state).reshape(shape)
    return bnb.dequantize_4bit(stored["m.weight"], state)


def bnb_int8(stored: Tensors, _: Path) -> torch.Tensor:
    """By rows."""
    return bnb.int8_vectorwise_dequant(stored["m.weight"], stored["m.SCB"]).to(torch.bfloat16)


def fp8(stored: Tensors, _: Path) -> torch.Tensor:
    """By transformers."""
    scale = next(value for key, value in stored.items() if "scale" in key)
    return Fp8Dequantize(None)._dequantize_one(stored["m.weight"], scale, torch.bfloat16)


def mxfp4(stored: Tensors, _: Path) -> torch.Tensor:
    """By transformers."""
    return _convert_moe_packed_tensors(stored["m.experts.up_blocks"], stored["m.experts.up_scales"])


def compressed_tensors(stored: Tensors, folder: Path) -> torch.Tensor:
    """By its compressors, from the output's own config."""
    said: dict[str, Any] = dict(open_checkpoint(folder).config or {})["quantization_config"]
    scheme = QuantizationScheme(targets=["Linear"], weights=said["config_groups"]["group_0"]["weights"])
    tool = BaseCompressor.get_value_from_registry(said["format"])
    state = {key.removeprefix("m."): value for key, value in stored.items()}
    return tool.decompress(state, scheme)["weight"].to(torch.bfloat16)


def torchao(stored: Tensors, folder: Path) -> torch.Tensor:
    """By its safetensors layout."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    return unflatten_tensor_state_dict(stored, metadata)[0]["m.weight"].dequantize()


def adapter_for(name: str, shape: tuple[int, ...]) -> ak.Adapter:
    """A LoRA on the one weight of a case."""
    draw = torch.Generator().manual_seed(1)
    *lead, out, ins = shape
    layout = "e in out *k" if lead and "experts" in name else "e out *in" if lead else "out *in"
    out, ins = (ins, out) if "in out" in layout else (out, ins)
    A, B = torch.randn(*lead, 2, ins, generator=draw), torch.randn(*lead, out, 2, generator=draw)
    return ak.Adapter({ak.Target(name.removesuffix(".weight"), layout=layout): (LoRA(A=A, B=B, scaling=0.01),)})


def main() -> int:
    """How many outputs differ."""
    wrong = 0
    for scheme in (bnb_4bit, bnb_int8, fp8, mxfp4, compressed_tensors, torchao):
        for case in sorted((VECTORS / scheme.__name__).iterdir()):
            (weight,) = dequantized(open_checkpoint(case)).packed.values()
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                report = ak.merge(case, adapter_for(weight.name, weight.shape), out, quantized="requantize")
                theirs = scheme(load_file(out / "model.safetensors"), out)
                ours = dequantized(open_checkpoint(out)).tensors[weight.name].torch()
            same = torch.equal(theirs + 0.0, ours + 0.0)
            wrong += not same
            print("same" if same else "DIFFERS", scheme.__name__, case.name, dict(report.damage))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
