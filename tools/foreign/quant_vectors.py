"""Writes spec/vectors/quant: small quantized bases, each with the weights that its library dequantizes.

    python tools/foreign/quant_vectors.py [DEST]

`DEST/<scheme>/<case>/` has `model.safetensors` and `config.json`, or `model.gguf`, in the library's layout, and
`expected.safetensors`. bitsandbytes, compressed-tensors and transformers compute the expected weights of their schemes.
For GPTQ, AWQ and ModelOpt's NVFP4, whose libraries need a GPU, the script computes the published formula in float64,
element by element.

bitsandbytes 0.50's CPU kernel uses the wrong scales if a block continues in the next row; such a case is computed by
the library's generic code.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import gguf as ggml
import numpy as np
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
Case = tuple[dict[str, Any], Tensors, Tensors]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers about as large as weights are."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.05


def ints(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers from `low` up to, not including, `high`."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def bnb_4bit() -> Iterator[tuple[str, Case]]:
    """nf4 and fp4, plain and doubly quantized, of three dtypes; of float32 with blocks across rows."""
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype, shape in ((torch.bfloat16, (6, 128)), (torch.float16, (5, 192)), (torch.float32, (7, 96))):
                name = f"{kind}{'_nested' * nested}_{str(dtype).removeprefix('torch.')}"
                yield name, _bnb_4bit(rand(*shape).to(dtype), kind, nested)


def _bnb_4bit(W: torch.Tensor, kind: str, nested: bool) -> Case:
    q, state = bnb.quantize_4bit(W, quant_type=kind, compress_statistics=nested, blocksize=64)
    stored = {"m.weight": q, "m.bias": rand(W.shape[0])}
    stored |= {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    expected = bnb.dequantize_4bit(q, state)
    if W.shape[1] % 64:
        absmax = state.absmax
        if nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        code = _get_4bit_code(kind, "cpu")
        expected = _dequantize_4bit_compute(q.reshape(-1), absmax, code, 64, W.shape, W.dtype)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return config, stored, {"m.weight": expected}


def bnb_int8() -> Iterator[tuple[str, Case]]:
    """Rows of whole numbers."""
    q, scale, _ = bnb.int8_vectorwise_quant(rand(20, 33).half())
    stored = {"m.weight": q, "m.SCB": scale, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = bnb.int8_vectorwise_dequant(q, scale).to(torch.bfloat16)
    yield "rows", ({"quant_method": "bitsandbytes", "load_in_8bit": True}, stored, {"m.weight": expected})


def fp8() -> Iterator[tuple[str, Case]]:
    """A scale for all, each row, each block, and each block of stacked experts."""
    for name, shape, grid, word in (
        ("tensor", (6, 10), (1, 1), "weight_scale"),
        ("channel", (6, 10), (6, 1), "weight_scale"),
        ("block", (256, 128), (2, 1), "weight_scale_inv"),
        ("experts", (2, 8, 12), (2, 2, 3), "weight_scale_inv"),
    ):
        q = (rand(*shape) * 900).to(torch.float8_e4m3fn)
        scale = rand(*grid, seed=3).abs() + 0.01
        expected = Fp8Dequantize(None)._dequantize_one(q, scale, torch.bfloat16)
        block = {} if word == "weight_scale" else {"weight_block_size": [128, 128] if name == "block" else [4, 4]}
        config = {"quant_method": "fp8", **block}
        yield name, (config, {"m.weight": q, f"m.{word}": scale}, {"m.weight": expected})


def mxfp4() -> Iterator[tuple[str, Case]]:
    """Stacked experts as gpt-oss has them."""
    blocks = ints(0, 256, 2, 6, 2, 16).to(torch.uint8)
    scales = ints(110, 132, 2, 6, 2).to(torch.uint8)
    expected = _convert_moe_packed_tensors(blocks, scales)
    stored = {"m.experts.up_blocks": blocks, "m.experts.up_scales": scales, "m.experts.up_bias": rand(2, 6)}
    yield "experts", ({"quant_method": "mxfp4"}, stored, {"m.experts.up": expected})


def compressed_tensors() -> Iterator[tuple[str, Case]]:
    """Each of its layouts, packed by its own compressors."""
    whole = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    uneven = {**whole, "symmetric": False}
    float8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    float4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    for name, form, weights, scale in (
        ("packed", "pack-quantized", whole, rand(16, 3).abs() + 0.01),
        ("packed_uneven", "pack-quantized", uneven, rand(16, 3).abs() + 0.01),
        ("packed_8", "pack-quantized", eight, rand(16, 1).abs() / 20 + 0.001),
        ("int", "int-quantized", eight, rand(16, 1).abs() / 20 + 0.001),
        ("float", "float-quantized", float8, rand(16, 1).abs() / 20 + 0.001),
        ("nvfp4", "nvfp4-pack-quantized", float4, (rand(16, 3).abs() * 800 + 1).to(torch.float8_e4m3fn).float()),
    ):
        yield name, _compressed(form, weights, scale)


def _compressed(form: str, weights: dict[str, Any], scale: torch.Tensor) -> Case:
    tool, scheme = BaseCompressor.get_value_from_registry(form), QuantizationScheme(targets=["Linear"], weights=weights)
    state = {"weight": rand(16, 48).to(torch.bfloat16), "weight_scale": scale.to(torch.bfloat16)}
    if not weights["symmetric"]:
        state["weight_zero_point"] = ints(-8, 8, *scale.shape).to(torch.int8)
    if form.startswith("nvfp4"):
        state |= {"weight_global_scale": torch.tensor([1500.0]), "weight_scale": scale}
    stored = {key: value.contiguous() for key, value in tool.compress(state, scheme).items()}
    expected = tool.decompress(dict(stored), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}
    return config, {f"m.{key}": value for key, value in stored.items()}, {"m.weight": expected.to(torch.bfloat16)}


def gptq() -> Iterator[tuple[str, Case]]:
    """Both formats, and reordered columns."""
    for name, bits, version, reordered in (("four", 4, 1, False), ("eight_v2", 8, 2, False), ("reordered", 4, 1, True)):
        ins, outs, groups = 64, 16, 2
        q, zero = ints(0, 1 << bits, ins, outs), ints(0, (1 << bits) - 1, groups, outs, seed=1)
        scale = (rand(groups, outs).abs() + 0.01).half()
        index = torch.arange(ins) * groups // ins
        index = index.flip(0) if reordered else index
        W = (q - zero[index] - int(version == 1)).double() * scale.double()[index]
        order = range(32 // bits)
        stored = {
            "m.qweight": _words(q.T, bits, order).T.contiguous(), "m.qzeros": _words(zero, bits, order),
            "m.scales": scale, "m.g_idx": index.to(torch.int32),
        }  # fmt: skip
        config = {"quant_method": "gptq", "bits": bits, "group_size": ins // groups, "desc_act": reordered}
        config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
        yield name, (config, stored, {"m.weight": W.T.half().contiguous()})


def hqq() -> Iterator[tuple[str, Case]]:
    """Each width and axis."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits, axis, dtype in (
        (8, 1, "bfloat16"),
        (4, 1, "float16"),
        (4, 0, "bfloat16"),
        (3, 1, "bfloat16"),
        (2, 0, "float32"),
        (1, 1, "float16"),
    ):
        layer = torch.nn.Linear(128, 16, bias=False)
        layer.weight.data = rand(16, 128)
        settings = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
        made = HQQLinear(layer, settings, compute_dtype=getattr(torch, dtype), device="cpu")
        stored = {f"m.{key}": value.clone() for key, value in made.state_dict().items()}
        config = {"quant_method": "hqq", "quant_config": settings["weight_quant_params"]}
        yield f"{bits}_bits_axis_{axis}_{dtype}", (config, stored, {"m.weight": made.dequantize()})


def torchao() -> Iterator[tuple[str, Case]]:
    """Whole numbers by rows and by groups, and 8-bit floats."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    eight, float8 = Int8WeightOnlyConfig(version=2), Float8WeightOnlyConfig()
    for name, how, dtype in (
        ("int4", four, "bfloat16"),
        ("int8", eight, "bfloat16"),
        ("int8_float16", eight, "float16"),
        ("float8", float8, "bfloat16"),
    ):
        model = torch.nn.ModuleDict({"m": torch.nn.Linear(64, 16, bias=False, dtype=getattr(torch, dtype))})
        model["m"].weight.data = rand(16, 64).to(getattr(torch, dtype))
        quantize_(model, how)
        stored, metadata = flatten_tensor_state_dict(model.state_dict())
        expected = model["m"].weight.dequantize()
        yield name, ({"quant_method": "torchao", "_metadata": metadata}, stored, {"m.weight": expected})


def awq() -> Iterator[tuple[str, Case]]:
    """The GEMM layout."""
    ins, outs, groups = 64, 24, 2
    q, zero = ints(0, 16, ins, outs), ints(0, 16, groups, outs, seed=1)
    scale = (rand(groups, outs).abs() + 0.01).half()
    index, order = torch.arange(ins) * groups // ins, (0, 2, 4, 6, 1, 3, 5, 7)
    W = (q - zero[index]).double() * scale.double()[index]
    stored = {"m.qweight": _words(q, 4, order), "m.qzeros": _words(zero, 4, order), "m.scales": scale}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    yield "gemm", (config, stored, {"m.weight": W.T.half().contiguous()})


def nvfp4() -> Iterator[tuple[str, Case]]:
    """ModelOpt's layout."""
    nibbles = ints(0, 16, 6, 48)
    scale = (rand(6, 3).abs() * 800 + 1).to(torch.float8_e4m3fn)
    second = torch.tensor(2.0**-10)
    levels = torch.tensor(E2M1 + [-n for n in E2M1], dtype=torch.float64)[nibbles]
    W = levels * scale.double().repeat_interleave(16, 1) * second.double()
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    stored = {"m.weight": packed, "m.weight_scale": scale, "m.weight_scale_2": second, "m.input_scale": second * 2}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    yield "modelopt", (config, stored, {"m.weight": W.to(torch.bfloat16)})


def _words(q: torch.Tensor, bits: int, order: Any) -> torch.Tensor:
    """Numbers along the last axis in 32-bit words: the i-th of a word, lowest first, is number order[i]."""
    per = 32 // bits
    split = q.reshape(*q.shape[:-1], -1, per).to(torch.int64)
    word = sum(split[..., at] << bits * place for place, at in enumerate(order))
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)  # type: ignore[operator,arg-type]


def gguf(dest: Path) -> None:
    """A llama of one layer, every type of blocks once; k-quants, which gguf-py cannot make, of any bits."""
    folder = dest / "gguf" / "types"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    kinds = ["Q8_0", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K"]
    places = [*(("blk.0", n) for n in names), ("blk.1", "ffn_gate"), ("blk.1", "ffn_up"), ("blk.1", "ffn_down")]
    writer, expected = ggml.GGUFWriter(folder / "model.gguf", "llama"), {}
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    for (block, name), kind in zip(places, [*kinds, "Q3_K", "Q4_K", "Q5_K"], strict=True):
        how = ggml.GGMLQuantizationType[kind]
        data = _any_blocks(how) if kind.endswith("K") else ggml.quants.quantize(rand(8, 256).numpy(), how)
        W = ggml.quants.dequantize(data, how)
        if name in ("attn_q", "attn_k"):  # pairs of rows of a head go back to its halves
            W = W.reshape(2, 2, 2, 256).swapaxes(1, 2).reshape(8, 256)
        writer.add_tensor(f"{block}.{name}.weight", data, raw_dtype=how)
        own = f"self_attn.{name[5:].replace('output', 'o')}" if name[0] == "a" else f"mlp.{name[4:]}"
        expected[f"model.layers.{block[-1]}.{own}_proj.weight"] = torch.tensor(W)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    save_file(expected, folder / "expected.safetensors")


def _any_blocks(kind: Any) -> Any:
    size = ggml.GGML_QUANT_SIZES[kind][1]
    blocks = ints(0, 256, 8, size).to(torch.uint8).numpy()
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2)):
        blocks[:, at : at + 2] = rand(8, seed=at).half().numpy().reshape(8, 1).view(np.uint8)
    return blocks


SCHEMES: tuple[Callable[[], Iterator[tuple[str, Case]]], ...] = (
    bnb_4bit, bnb_int8, fp8, mxfp4, compressed_tensors, gptq, awq, nvfp4, hqq, torchao,
)  # fmt: skip


def main(dest: Path) -> None:
    """Writes all cases."""
    gguf(dest)
    for scheme in SCHEMES:
        shutil.rmtree(dest / scheme.__name__, ignore_errors=True)
        for name, (config, stored, expected) in scheme():
            folder = dest / scheme.__name__ / name
            folder.mkdir(parents=True)
            metadata = config.pop("_metadata", None)
            text = json.dumps({"dtype": "bfloat16", "quantization_config": config}, indent=2)
            (folder / "config.json").write_text(text + "\n")
            save_file(
                {key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors", metadata
            )
            save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "spec" / "vectors" / "quant")
