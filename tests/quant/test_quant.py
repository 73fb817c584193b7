"""Quantized bases against what their own libraries make of them, and the merge into them against float64 numpy."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, Unsupported, UsageError
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import DTYPES
from adapterkit.merging import plan
from adapterkit.methods.dora import DoRA
from adapterkit.methods.lora import LoRA
from adapterkit.quant import SCHEMES, dequantized, detect
from adapterkit.quant._grouped import Grouped

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "quant"
CASES = sorted(path.parent for path in VECTORS.rglob("expected.safetensors"))
BNB, FP8 = VECTORS / "bnb_4bit" / "nf4_nested_bfloat16", VECTORS / "fp8" / "block"
NVFP4 = VECTORS / "compressed_tensors" / "nvfp4"


def name(case):
    return case.relative_to(VECTORS).as_posix()


def stored(case):
    """What is opened: a folder, or a file of a scheme that is a kind of file."""
    return case / "model.gguf" if (case / "model.gguf").exists() else case


def bits(tensor):
    """The bits of a tensor, zero without its sign: libraries do not agree about it among their own kernels."""
    return (tensor + 0.0).contiguous().view(torch.uint8)


def low_rank(shape, seed=0):
    rng = np.random.default_rng(seed)
    out, ins = shape
    A, B = rng.normal(size=(2, ins)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32)
    return LoRA(A=torch.tensor(A), B=torch.tensor(B), scaling=0.01), 0.01 * (B.astype(float) @ A.astype(float))


def unpack(folder):
    for weight in dequantized(open_checkpoint(folder)).packed.values():
        weight.lazy().fetch()


def grouped(case):
    """The packed weights of a case that are whole numbers in runs of columns, of a width that MatMulNBits has."""
    found = dequantized(open_checkpoint(stored(case))).packed.values() if (case / "config.json").exists() else ()
    plain = [w for w in found if isinstance(w, Grouped) and w.index is None and w.bits in (4, 8)]
    sizes = {16, 32, 64, 128, 256}
    return [w for w in plain if w.shape[-1] % w.groups == 0 and w.shape[-1] // w.groups in sizes]


def in_onnxruntime(weight):
    """What MatMulNBits computes with: its product with an identity, of numbers packed as its documentation says."""
    (N, K), bits = weight.shape, weight.bits
    q, zeros = weight.whole(0, N), np.broadcast_to(weight.zeros(0, N), (N, weight.groups))
    shift = -weight.span[0]
    data = np.stack([_low_first(row + shift, bits) for row in q]).reshape(N, weight.groups, -1)
    points = np.stack([_low_first(row + shift, bits) for row in zeros])
    scales = weight.scales(0, N).astype("f4")
    given = {"B": data, "scales": scales.reshape(-1), "zero_points": points.reshape(-1)}
    held = [numpy_helper.from_array(np.ascontiguousarray(value), key) for key, value in given.items()]
    node = helper.make_node(
        "MatMulNBits", ["x", *given], ["y"], domain="com.microsoft", K=K, N=N, bits=bits,
        block_size=K // weight.groups, accuracy_level=1,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(key, TensorProto.FLOAT, [K, size]) for key, size in (("x", K), ("y", N))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(K, dtype="f4")})[0].T


def _low_first(values, bits):
    whole = np.pad(values, (0, -len(values) * bits % 8 // bits)).astype(np.uint8)
    return whole[0::2] | whole[1::2] << 4 if bits == 4 else whole


@pytest.mark.parametrize("case", [case for case in CASES if grouped(case)], ids=name)
def test_grouped_weights_are_what_onnxruntimes_matmulnbits_computes_with(case):
    for weight in grouped(case):
        ours = dataclasses.replace(weight, dtype=DTYPES["F32"]).rows(0, weight.shape[0])
        assert np.array_equal((ours + 0.0).view("u4"), (in_onnxruntime(weight) + 0.0).view("u4"))


def test_every_scheme_has_vectors():
    assert {case.parent.name for case in CASES} == set(SCHEMES)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_weights_are_what_the_schemes_own_library_makes_of_them(case):
    base = open_checkpoint(stored(case))
    seen, expected = dequantized(base), load_file(case / "expected.safetensors")
    assert detect(base) == seen.scheme == case.parent.name
    assert set(seen.packed) == set(expected)
    for key, wanted in expected.items():
        got = seen.tensors[key].torch()
        assert got.dtype == wanted.dtype
        assert torch.equal(bits(got), bits(wanted))
    if stored(case) != case:
        assert set(seen.tensors) == set(expected)
        return
    with safe_open(case / "model.safetensors", "np") as file:
        kept = {key for key in file.keys() if key.rpartition("_")[2] == "bias" or key.endswith(".bias")}  # noqa: SIM118
    assert set(seen.tensors) == set(expected) | kept


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_run_of_elements_is_that_part_of_the_whole(case):
    for tensor in (weight.lazy() for weight in dequantized(open_checkpoint(stored(case))).packed.values()):
        whole, size = bytes(tensor.fetch()), tensor.dtype.itemsize
        width, count = tensor.shape[-1], tensor.nbytes // tensor.dtype.itemsize
        for first, some in ((0, width), (3 * width, 2 * width), (width + 5, 7), (count - 3, 3), (2, 0)):
            assert bytes(tensor.read(first, some)) == whole[first * size : (first + some) * size]


@pytest.mark.parametrize("case", [BNB, FP8, VECTORS / "gptq" / "four"], ids=name)
def test_merging_folds_into_the_dequantized_weights(case, tmp_path):
    W = load_file(case / "expected.safetensors")["m.weight"]
    update, delta = low_rank(W.shape)
    out = tmp_path / "out"
    adapter = ak.Adapter({ak.Target("m"): (update,)})
    report = ak.merge(case, adapter, out, quantized="dequantize")
    merged = load_file(out / "model.safetensors")
    exact = W.double().numpy() + delta
    kind = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}[W.dtype]
    assert merged["m.weight"].dtype == W.dtype
    assert np.array_equal(merged["m.weight"].float().numpy(), exact.astype(kind).astype(np.float32))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not any("absmax" in key or "scale" in key or "qweight" in key for key in merged)
    assert report.record()["quantized"]["scheme"] == case.parent.name
    assert ak.verify(out, case, adapter).ok


def gptq_words(values, bits):
    """Integers packed along the last axis into words, the first in the lowest bits."""
    fields = values.astype(np.uint32).reshape(*values.shape[:-1], -1, 32 // bits)
    return np.bitwise_or.reduce(fields << np.arange(0, 32, bits, dtype=np.uint32), -1).astype(np.uint32)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_with_zero_points_of_0_and_a_smaller_last_group(bits, less, indexed, tmp_path):
    rng, out, columns, size = np.random.default_rng(0), 16, 80, 32
    at = np.arange(columns) // size
    q, zeros = rng.integers(0, 1 << bits, (out, columns)), rng.integers(0, 1 << bits, (out, 3))
    zeros[::3] = 0
    scales = (2.0 ** rng.integers(-3, 3, (out, 3))).astype(np.float16)
    # GPTQModel's conversion to the older format subtracts this number from whole words, not from each field.
    ones = np.uint32(less * {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])
    tensors = {
        "m.qweight": np.ascontiguousarray(gptq_words(q, bits).T).view(np.int32),
        "m.qzeros": np.ascontiguousarray(gptq_words(zeros.T, bits) - ones).view(np.int32),
        "m.scales": np.ascontiguousarray(scales.T),
        **({"m.g_idx": at.astype(np.int32)} if indexed else {}),
    }
    base = tmp_path / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    form = "gptq" if less else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": form}
    (base / "config.json").write_text(json.dumps({"quantization_config": config}))
    (weight,) = dequantized(open_checkpoint(base)).packed.values()
    W = ((q - zeros[:, at]) * scales.astype(np.float32)[:, at]).astype(np.float16)
    assert np.array_equal(weight.rows(0, out), W)
    again = weight.pack(lambda start, stop: W[start:stop].astype(np.float32))
    for key, part in again.items():
        assert np.array_equal(part, tensors[key]), key


@pytest.mark.parametrize("case", ["four", "eight_v2"])
def test_the_format_of_gptq_may_have_either_name(case, tmp_path):
    """`GPTQConfig` of transformers reads both keys, and its `format` is "gptq" by default."""
    from transformers import GPTQConfig

    folder = VECTORS / "gptq" / case
    shutil.copytree(folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"].pop("checkpoint_format")
    wanted = load_file(folder / "expected.safetensors")["m.weight"]
    for keys in ({"format": stated}, {"checkpoint_format": stated}, {"format": stated, "checkpoint_format": stated}):
        assert GPTQConfig(bits=4, **keys).format == stated
        whole = config | {"quantization_config": config["quantization_config"] | keys}
        (tmp_path / "base" / "config.json").write_text(json.dumps(whole))
        (weight,) = dequantized(open_checkpoint(tmp_path / "base")).packed.values()
        assert torch.equal(weight.lazy().torch(), wanted), keys
    other = {"format": stated, "checkpoint_format": "gptq" if stated == "gptq_v2" else "gptq_v2"}
    whole = config | {"quantization_config": config["quantization_config"] | other}
    (tmp_path / "base" / "config.json").write_text(json.dumps(whole))
    with pytest.raises(Malformed, match="states two formats"):
        dequantized(open_checkpoint(tmp_path / "base"))


@pytest.mark.parametrize("indexed", [True, False])
def test_gptqmodels_dynamic_gives_modules_bit_widths_of_their_own(indexed, tmp_path):
    rng, out, columns, wanted, tensors = np.random.default_rng(0), 32, 64, {}, {}
    for module, bits, size in (("a", 4, 32), ("b", 8, 16), ("c", 2, 64)):
        at = np.arange(columns) // size
        q, zeros = (rng.integers(0, 1 << bits, (out, n)) for n in (columns, columns // size))
        scales = (2.0 ** rng.integers(-3, 3, zeros.shape)).astype(np.float16)
        tensors |= {
            f"{module}.qweight": np.ascontiguousarray(gptq_words(q, bits).T).view(np.int32),
            f"{module}.qzeros": np.ascontiguousarray(gptq_words(zeros.T, bits)).view(np.int32),
            f"{module}.scales": np.ascontiguousarray(scales.T),
            **({f"{module}.g_idx": at.astype(np.int32)} if indexed else {}),
        }
        wanted[f"{module}.weight"] = ((q - zeros[:, at]) * scales.astype(np.float32)[:, at]).astype(np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    dynamic = {"+:b": {"bits": 8, "group_size": 16}, "+:c": {"bits": 2, "group_size": 64}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "dynamic": dynamic}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    packed = dequantized(open_checkpoint(tmp_path)).packed
    assert set(packed) == set(wanted)
    for key, W in wanted.items():
        assert np.array_equal(packed[key].rows(0, out), W), key


def test_compressed_tensors_with_a_smaller_last_group_are_refused(tmp_path):
    tensors = {"m.weight": np.ones((8, 80), np.int8), "m.weight_scale": np.ones((8, 3), np.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(ShapeMismatch, match="3 groups do not fit 80 columns"):
        dequantized(open_checkpoint(tmp_path))


MIXED = ("packed", "packed_8", "packed_uneven", "float", "nvfp4")


def test_groups_of_layers_of_compressed_tensors_may_have_different_bits_and_blocks(tmp_path):
    """The config's targets are classes of modules or patterns, so only the shapes show the group of each module."""
    groups, tensors, expected = {}, {}, {}
    for case in MIXED:
        folder = VECTORS / "compressed_tensors" / case
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        groups[case] = config["config_groups"]["group_0"] | {"targets": [f"re:.*{case}"]}
        tensors |= {f"{case}{key[1:]}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
        expected[f"{case}.weight"] = load_file(folder / "expected.safetensors")["m.weight"]
    # A float8 weight in blocks of 4 x 32, of which the last has 16 columns.
    stored, scale = tensors["float.weight"], torch.rand(4, 2) + 0.5
    tensors |= {"block.weight": stored.clone(), "block.weight_scale": scale}
    spread = scale.repeat_interleave(4, 0).repeat_interleave(32, 1)[:, :48]
    expected["block.weight"] = (stored.float() * spread).bfloat16()
    groups["block"] = {"weights": {**groups["float"]["weights"], "strategy": "block", "block_structure": [4, 32]}}
    save_torch(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    got = dequantized(open_checkpoint(tmp_path)).tensors
    for key, wanted in expected.items():
        assert torch.equal(bits(got[key].torch()), bits(wanted)), key
    tensors["packed.weight_packed"] = tensors["packed.weight_packed"][:, :5].contiguous()
    save_torch(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Unsupported, match="do not fit exactly one of"):
        dequantized(open_checkpoint(tmp_path))


@pytest.mark.parametrize("count", [3, 4, 8])
def test_bytes_of_compressed_tensors_keep_the_number_of_bits_in_the_config(count, tmp_path):
    """The config states the range of the values, whatever dtype stores them."""
    half, generator = 1 << count - 1, torch.Generator().manual_seed(0)
    q = torch.randint(-half, half, (16, 64), generator=generator, dtype=torch.int8)
    scale = (torch.rand(16, 2, generator=generator) / half + 0.05 / half).bfloat16()
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_torch({"m.weight": q, "m.weight_scale": scale}, base / "model.safetensors")
    weights = {"num_bits": count, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"0": {"weights": weights}},
    }
    (base / "config.json").write_text(json.dumps({"quantization_config": config}))
    update, delta = low_rank(q.shape)
    ak.merge(base, ak.Adapter({ak.Target("m"): (update,)}), out, quantized="requantize")
    found = load_file(out / "model.safetensors")
    assert -half <= int(found["m.weight"].min()) <= int(found["m.weight"].max()) < half
    before, after = ((a.double() * b.double().repeat_interleave(32, 1)).numpy() for a, b in (
        (q, scale), (found["m.weight"], found["m.weight_scale"])
    ))  # fmt: skip
    assert np.linalg.norm(after - before - delta) < 0.7 / half * np.linalg.norm(before + delta)


@pytest.mark.parametrize("scheme", ["awq", "compressed-tensors"])
@pytest.mark.parametrize(("columns", "fits"), [(256, True), (160, False)])
def test_a_group_size_that_does_not_divide_the_columns_is_refused(scheme, columns, fits, tmp_path):
    """Both libraries refuse it. 160 columns in 2 groups could be 80 and 80, or 128 and 32."""
    config = {"quant_method": scheme, "bits": 4, "group_size": 128}
    tensors = {"qweight": np.ones((columns, 2), np.int32), "qzeros": np.ones((2, 2), np.int32)}
    tensors["scales"] = np.ones((2, 16), np.float16)
    if scheme != "awq":
        weights = {"num_bits": 8, "strategy": "group", "group_size": 128}
        config = {"quant_method": scheme, "config_groups": {"group_0": {"weights": weights}}}
        tensors = {"weight": np.ones((16, columns), np.int8), "weight_scale": np.ones((16, 2), np.float16)}
    save_file({f"m.{key}": value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    if fits:
        assert dequantized(open_checkpoint(tmp_path)).tensors["m.weight"].shape == (16, columns)
        return
    with pytest.raises(ShapeMismatch, match="2 groups do not fit 160 columns"):
        dequantized(open_checkpoint(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_scales_and_zero_points_of_inputs_do_not_stay_beside_dequantized_weights(dtype, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_torch(
        {
            "m.weight": torch.ones(8, 8).to(dtype),
            "m.weight_scale": torch.ones(8, 1),
            "m.input_scale": torch.ones(1),
            "m.input_zero_point": torch.zeros(1, dtype=torch.int8),
        },
        base / "model.safetensors",
    )
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    update, _ = low_rank((8, 8))
    ak.merge(base, ak.Adapter({ak.Target("m"): (update,)}), out, quantized="dequantize")
    assert set(load_file(out / "model.safetensors")) == {"m.weight"}


def test_mxfp4_of_compressed_tensors(tmp_path):
    rng, base, out = np.random.default_rng(0), tmp_path / "base", tmp_path / "out"
    q, scale = rng.integers(0, 16, (24, 96)).astype(np.uint8), rng.integers(117, 130, (24, 3)).astype(np.uint8)
    base.mkdir()
    tensors = {"m.weight_packed": q[:, ::2] | q[:, 1::2] << 4, "m.weight_scale": scale}
    save_file(tensors, base / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    (base / "config.json").write_text(json.dumps({"quantization_config": config}))
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    W = sizes[q % 8] * np.where(q > 7, -1, 1) * 2.0 ** (np.repeat(scale, 32, 1).astype(float) - 127)
    (weight,) = dequantized(open_checkpoint(base)).packed.values()
    assert np.array_equal(weight.rows(0, 24).astype(float), W)
    assert np.array_equal(weight.rows(5, 9).astype(float), W[5:9])
    update, delta = low_rank(W.shape)
    adapter = ak.Adapter({ak.Target("m"): (update,)})
    ak.merge(base, adapter, out, quantized="requantize")
    (weight,) = dequantized(open_checkpoint(out)).packed.values()
    assert np.linalg.norm(weight.rows(0, 24) - (W + delta)) < 0.3 * np.linalg.norm(W + delta)
    assert ak.verify(out, base, adapter).ok


def test_weights_that_gptq_packs_transposed_are_unpacked_once_and_not_for_each_block(tmp_path, monkeypatch):
    ins, out, base = 512, 2048, tmp_path / "base"
    rng = np.random.default_rng(0)
    shapes = {"qweight": (ins // 8, out), "qzeros": (ins // 128, out // 8)}
    tensors = {key: rng.integers(-(2**31), 2**31, shape).astype(np.int32) for key, shape in shapes.items()}
    tensors["scales"] = rng.uniform(0.01, 0.02, (ins // 128, out)).astype(np.float16)
    base.mkdir()
    save_file({f"h.0.mlp.c_fc.{key}": value for key, value in tensors.items()}, base / "model.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2", "quantization_config": config}))
    adapter = ak.Adapter({ak.Target("h.0.mlp.c_fc", layout="in out *k"): (low_rank((out, ins))[0],)})
    calls, rows = [], Grouped.rows
    monkeypatch.setattr(Grouped, "rows", lambda *given: calls.append(given) or rows(*given))
    ak.merge(base, adapter, tmp_path / "out", quantized="requantize")
    assert len(calls) <= 4  # The base's weight and the result, for at most two workers.


def test_torchaos_metadata_is_not_parsed_again_for_each_weight(tmp_path, monkeypatch):
    folder = VECTORS / "torchao" / "int4"
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    stored, count = load_file(folder / "model.safetensors"), 16
    names = json.loads(metadata["tensor_names"])
    whole = {f"{n}{key}": metadata[key] for n in range(count) for key in names}
    whole |= {"tensor_names": json.dumps(list(whole))}
    tensors = {f"{n}{key}": tensor.clone() for n in range(count) for key, tensor in stored.items()}
    base = tmp_path / "base"
    base.mkdir()
    save_torch(tensors, base / "model.safetensors", whole)
    shutil.copy(folder / "config.json", base)
    W = load_file(folder / "expected.safetensors")["m.weight"]
    adapter = ak.Adapter({ak.Target(f"{n}m"): (low_rank(W.shape, n)[0],) for n in range(count)})
    calls = []
    monkeypatch.setattr("adapterkit.quant.torchao.load_json", lambda text: calls.append(text) or json.loads(text))
    ak.merge(base, adapter, tmp_path / "out", quantized="requantize")
    assert len(calls) <= 5 * count


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_packed_4_bit_floats_beside_fp8_weights_are_read_as_in_transformers(lead, exponents, tmp_path):
    """transformers' `Fp8Dequantize` reads bytes with `weight_scale_inv` as pairs of 4-bit floats, the first one low."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (*lead, 48, 32), generator=generator, dtype=torch.int8)
    scale = torch.randint(120, 130, (*lead, 48, 2), generator=generator, dtype=torch.uint8)
    scale = scale if exponents else torch.rand(*lead, 48, 2, generator=generator) + 0.5
    other = torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn)
    tensors = {
        "m.weight": codes,
        "m.weight_scale_inv": scale,
        "n.weight": other,
        "n.weight_scale_inv": torch.ones(1, 1),
    }
    base = tmp_path / "base"
    base.mkdir()
    save_torch(tensors, base / "model.safetensors")
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps({"quantization_config": config}))
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    # An adapter of another weight changes nothing in this one.
    adapter = ak.Adapter({ak.Target("n"): (low_rank((64, 64))[0],)})
    ak.merge(base, adapter, tmp_path / "out", quantized="dequantize")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["m.weight"], wanted)
    ak.merge(base, adapter, tmp_path / "again", quantized="requantize")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")["m.weight"], codes)
    if not lead:
        update, delta = low_rank((48, 64))
        adapter = ak.Adapter({ak.Target("m"): (update,)})
        ak.merge(base, adapter, tmp_path / "changed", quantized="dequantize")
        got = load_file(tmp_path / "changed" / "model.safetensors")["m.weight"]
        assert torch.equal(got, (wanted.double() + torch.tensor(delta)).bfloat16())
        with pytest.raises(Unsupported, match="cannot quantize to this scheme"):
            ak.merge(base, adapter, tmp_path / "packed", quantized="requantize")


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_unpacks_only_the_rows_that_are_read(axis, tmp_path):
    rng, out, size = np.random.default_rng(0), 1024, 64
    groups = out * out // size
    form, beside = ((size, groups), (1, groups)) if axis == 0 else ((groups, size), (groups, 1))
    q = rng.integers(0, 16, form).astype(np.uint8)
    scale, zero = (rng.uniform(1, 2, beside).astype(np.float32) for _ in range(2))
    settings = {"nbits": 4, "group_size": size, "axis": axis, "shape": [out, out]}
    tensors = {f"m.{key}": np.array(value) for key, value in settings.items()}
    tensors["m.compute_dtype"] = np.frombuffer(b"torch.float32", np.uint8)
    half = form[0] // 2
    tensors |= {"m.W_q": q[:half] << 4 | q[half:], "m.scale": scale, "m.zero": zero}
    save_file(tensors, tmp_path / "model.safetensors")
    (weight,) = dequantized(open_checkpoint(tmp_path)).packed.values()
    tracemalloc.start()
    rows = weight.rows(700, 704)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(rows, ((q - zero) * scale).reshape(out, out)[700:704])
    assert peak < 2 * sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("quantized", ["dequantize", "requantize"])
@pytest.mark.parametrize("scheme", ["bnb_4bit/nf4_float16", "bnb_int8/rows", "gptq/four"])
@pytest.mark.parametrize("half", ["", "decoder.", "model.language_model."])
def test_weights_of_gpt2_that_libraries_pack_transposed_are_merged_in_the_bases_layout(
    half, scheme, quantized, tmp_path
):
    case, base, out = VECTORS / scheme, tmp_path / "base", tmp_path / "out"
    base.mkdir()
    packed = load_file(case / "model.safetensors")
    path = f"{half}h.c_proj"
    save_torch({f"{path}{key[1:]}": value for key, value in packed.items()}, base / "model.safetensors")
    config = json.loads((case / "config.json").read_text())
    family = {"model_type": "gpt2"}
    if half == "decoder.":
        family = {"model_type": "vision-encoder-decoder", "decoder": family}
    elif half:
        family = {"model_type": "blip-2", "text_config": family}
    (base / "config.json").write_text(json.dumps(config | family))
    W = load_file(case / "expected.safetensors")["m.weight"].double().numpy()
    update, delta = low_rank(W.shape)
    adapter = ak.Adapter({ak.Target(path, layout="in out *k"): (update,)})
    ak.merge(base, adapter, out, quantized=quantized)
    merged = dequantized(open_checkpoint(out)) if quantized == "requantize" else open_checkpoint(out)
    got = merged.tensors[f"{path}.weight"].torch().double().numpy()
    step = 0.01 if quantized == "dequantize" else 0.2
    assert np.linalg.norm(got - (W + delta).T) < step * np.linalg.norm(W)
    assert ak.verify(out, base, adapter).ok


ROTATIONS = {"config_groups": {"v": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}


@pytest.mark.parametrize(
    ("case", "tensor", "rotations", "where", "refused"),
    [
        ("nvfp4/modelopt", "m.pre_quant_scale", {}, "m.pre_quant_scale", {"dequantize", "requantize"}),
        ("compressed_tensors/packed", None, ROTATIONS, "transform_config", {"dequantize", "requantize"}),
        ("awq/gemm", "act.scales", {}, "act.scales", {"dequantize"}),
    ],
)
def test_weights_that_see_changed_inputs_are_refused(case, tensor, rotations, where, refused, tmp_path):
    tensors = load_file(VECTORS / case / "model.safetensors")
    config = json.loads((VECTORS / case / "config.json").read_text())
    config["quantization_config"]["transform_config"] = rotations
    if tensor is not None:
        tensors[tensor] = torch.full((64,), 2.0)
    base = tmp_path / "base"
    base.mkdir()
    save_torch(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    W = load_file(VECTORS / case / "expected.safetensors")["m.weight"]
    adapter = ak.Adapter({ak.Target("m"): (low_rank(W.shape)[0],)})
    for quantized in ("dequantize", "requantize"):
        if quantized not in refused:
            ak.merge(base, adapter, tmp_path / quantized, quantized=quantized)
            continue
        with pytest.raises(Unsupported) as error:
            ak.merge(base, adapter, tmp_path / quantized, quantized=quantized)
        assert where in str(error.value)


def test_what_no_adapter_touches_is_dequantized_too(tmp_path):
    base, packed = tmp_path / "base", load_file(BNB / "model.safetensors")
    shutil.copytree(BNB, base)
    (base / "quantize_config.json").write_text("{}")
    other = {key.replace("m.", "n."): value.clone() for key, value in packed.items()}
    save_torch(packed | other, base / "model.safetensors")
    W = load_file(BNB / "expected.safetensors")["m.weight"]
    report = ak.merge(
        base, ak.Adapter({ak.Target("m"): (low_rank(W.shape)[0],)}), tmp_path / "out", quantized="dequantize"
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(merged) == {"m.weight", "m.bias", "n.weight", "n.bias"}
    assert torch.equal(merged["n.weight"], W)
    assert torch.equal(merged["n.bias"], packed["m.bias"])
    assert report.left_out == ("expected.safetensors", "quantize_config.json")


def test_a_formula_that_needs_the_weight_sees_the_dequantized_one(tmp_path):
    W = load_file(BNB / "expected.safetensors")["m.weight"]
    lora, delta = low_rank(W.shape)
    magnitude = np.random.default_rng(5).uniform(0.5, 1.5, W.shape[0]).astype(np.float32)
    update = DoRA(A=lora.A, B=lora.B, magnitude=torch.tensor(magnitude), scaling=0.01)
    ak.merge(BNB, ak.Adapter({ak.Target("m"): (update,)}), tmp_path / "out", quantized="dequantize", dtype="F32")
    moved = W.double().numpy() + delta
    wanted = magnitude[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    got = load_file(tmp_path / "out" / "model.safetensors")["m.weight"].numpy()
    assert np.abs(got - wanted).max() < 1e-6


def test_weights_of_float32_are_written_in_bfloat16(tmp_path):
    case = VECTORS / "bnb_4bit" / "nf4_float32"
    W = load_file(case / "expected.safetensors")["m.weight"]
    update, delta = low_rank(W.shape)
    ak.merge(case, ak.Adapter({ak.Target("m"): (update,)}), tmp_path / "out", quantized="dequantize")
    got = load_file(tmp_path / "out" / "model.safetensors")["m.weight"]
    exact = (W.double().numpy() + delta).astype(ml_dtypes.bfloat16)
    assert got.dtype == torch.bfloat16
    assert np.array_equal(got.float().numpy(), exact.astype(np.float32))


def test_blocks_of_a_weight_larger_than_one_block_join(tmp_path):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(900, 640)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, size=(8, 5)).astype(np.float32)
    save_torch(
        {
            "m.weight": torch.tensor(q.view(np.uint8)).view(torch.float8_e4m3fn),
            "m.weight_scale_inv": torch.tensor(scale),
        },
        tmp_path / "base.safetensors",
    )
    update, delta = low_rank(q.shape)
    out = tmp_path / "out.safetensors"
    ak.merge(tmp_path / "base.safetensors", ak.Adapter({ak.Target("m"): (update,)}), out, quantized="dequantize")
    grid = np.repeat(np.repeat(scale, 128, 0)[:900], 128, 1)
    W = (q.astype(np.float32) * grid).astype(ml_dtypes.bfloat16)
    wanted = (W.astype(float) + delta).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(load_file(out)["m.weight"].float().numpy(), wanted)


@pytest.mark.parametrize("case", [BNB, FP8], ids=name)
def test_without_a_choice_a_quantized_base_is_refused_with_the_choices(case, tmp_path):
    adapter = ak.Adapter({ak.Target("m"): (low_rank((6, 128))[0],)})
    with pytest.raises(Unsupported, match=f"quantized \\({case.parent.name}\\)") as caught:
        ak.merge(case, adapter, tmp_path / "out")
    assert all(word in caught.value.cure for word in ("--quantized dequantize", "requantize", "original"))
    with pytest.raises(UsageError, match="choice 'nothing' for quantized bases is unknown"):
        ak.merge(case, adapter, tmp_path / "out", quantized="nothing")
    assert not (tmp_path / "out").exists()


def test_a_base_of_an_unknown_scheme_is_refused_by_its_name(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"m.weight": np.ones((4, 4), np.uint8)}, base / "model.safetensors")
    (base / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}')
    adapter = ak.Adapter({ak.Target("m"): (low_rank((4, 4))[0],)})
    for choice in (None, "dequantize"):
        with pytest.raises(Unsupported, match="aqlm"):
            ak.merge(base, adapter, tmp_path / "out", quantized=choice)


def test_the_plan_says_what_is_done_and_why():
    planned = plan(BNB, ak.Adapter({ak.Target("m"): (low_rank((6, 128))[0],)}), quantized="dequantize").record()
    assert planned["quantized"]["choice"] == "dequantize"
    assert planned["quantized"]["weights"] == 1
    assert "trained" in planned["quantized"]["why"]


STATE = "m.weight.quant_state.bitsandbytes__nf4"


def text(**changes):
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 128], "nested_blocksize": 256}
    state = {**state, "nested_dtype": "float32", "nested_offset": 0.1, **changes}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


DAMAGE = {
    "a scale gone": (BNB, "m.weight.absmax", None, Malformed),
    "scales too few": (BNB, "m.weight.absmax", lambda t: t[:-1], ShapeMismatch),
    "scales of another dtype": (BNB, "m.weight.absmax", lambda t: t.float(), ShapeMismatch),
    "second scales too many": (BNB, "m.weight.nested_absmax", lambda t: t.repeat(2), ShapeMismatch),
    "second scales not numbers": (BNB, "m.weight.nested_absmax", lambda t: t * float("nan"), Malformed),
    "levels too few": (BNB, "m.weight.quant_map", lambda t: t[:9], ShapeMismatch),
    "packed too short": (BNB, "m.weight", lambda t: t[:-1], ShapeMismatch),
    "state no text": (BNB, STATE, lambda t: t + 128, Malformed),
    "state too long": (BNB, STATE, lambda _: torch.full((1 << 17,), 32, dtype=torch.uint8), Malformed),
    "state of a huge shape": (BNB, STATE, lambda _: text(shape=[1 << 40, 1 << 40]), ShapeMismatch),
    "state of no shape": (BNB, STATE, lambda _: text(shape=[-6, -128]), Malformed),
    "state of no blocks": (BNB, STATE, lambda _: text(blocksize=0), Malformed),
    "state of no dtype": (BNB, STATE, lambda _: text(dtype="int4"), Malformed),
    "state of no offset": (BNB, STATE, lambda _: text(nested_offset=None), Malformed),
    "grid of another size": (FP8, "m.weight_scale_inv", lambda t: t.repeat(2, 2), ShapeMismatch),
    "grid not numbers": (FP8, "m.weight_scale_inv", lambda t: t / 0, Malformed),
    "int8 scale short": (VECTORS / "bnb_int8" / "rows", "m.SCB", lambda t: t[:3], ShapeMismatch),
    "mxfp4 scales short": (VECTORS / "mxfp4" / "experts", "m.experts.up_scales", lambda t: t[..., :1], ShapeMismatch),
    "mxfp4 no number": (VECTORS / "mxfp4" / "experts", "m.experts.up_scales", lambda t: t * 0 + 255, Malformed),
    "nvfp4 second scale 0": (
        VECTORS / "compressed_tensors" / "nvfp4",
        "m.weight_global_scale",
        torch.zeros_like,
        Malformed,
    ),
    "gptq zeros short": (VECTORS / "gptq" / "four", "m.qzeros", lambda t: t[:, :1], ShapeMismatch),
    "gptq groups astray": (VECTORS / "gptq" / "four", "m.g_idx", lambda t: t + 1, ShapeMismatch),
    "awq scales not numbers": (VECTORS / "awq" / "gemm", "m.scales", lambda t: t / 0, Malformed),
    "hqq zeros short": (VECTORS / "hqq" / "3_bits_axis_1_bfloat16", "m.zero", lambda t: t[:3], ShapeMismatch),
    "hqq of no width": (VECTORS / "hqq" / "3_bits_axis_1_bfloat16", "m.nbits", lambda t: t * 3, Malformed),
    "hqq of a huge shape": (VECTORS / "hqq" / "3_bits_axis_1_bfloat16", "m.shape", lambda t: t << 20, ShapeMismatch),
    "packed shape wrong": (VECTORS / "compressed_tensors" / "packed", "m.weight_shape", lambda t: t * 2, ShapeMismatch),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damaged_parts_are_refused_with_a_place(fault, tmp_path):
    case, key, change, error = DAMAGE[fault]
    tensors = load_file(case / "model.safetensors")
    value = tensors.pop(key)
    if change is not None:
        tensors[key] = change(value).contiguous()
    shutil.copy(case / "config.json", tmp_path)
    save_torch(tensors, tmp_path / "model.safetensors")
    with pytest.raises(error) as caught:
        unpack(tmp_path)
    assert caught.value.where
    assert caught.value.cure
