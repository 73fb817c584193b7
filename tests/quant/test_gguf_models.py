"""GGUF models against gguf-py: its blocks bit by bit, merged files read by its reader, the merge in float64 numpy."""

import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, StorageError, TargetNotFound, Unsupported, UsageError
from adapterkit.io.ggml_blocks import BLOCKS, decoded, encoded
from adapterkit.merging import blocks, requantize
from adapterkit.methods.lora import LoRA

Kind, dequantize, quantize = gguf.GGMLQuantizationType, gguf.quants.dequantize, gguf.quants.quantize
HEADS, KV, WIDTH = 4, 2, 256
K_QUANTS = sorted(kind for kind in BLOCKS if kind.endswith("K"))
PLAIN = sorted(set(BLOCKS) - set(K_QUANTS))
FILE_TYPES = {"F32": "ALL_F32", "Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M",
              "Q5_K": "MOSTLY_Q5_K_M"}  # fmt: skip


def numbers(*shape, seed=0):
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * 0.05).astype(np.float32)


def random_blocks(kind, count, seed=0):
    """Any bits, but for scales that are finite."""
    _, _, size = BLOCKS[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (count, size), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for at in halves.get(kind, (0, 2) if kind.endswith("_1") else (0,)):
        blocks[:, at : at + 2] = numbers(count, seed=at).astype("<f2").reshape(-1, 1).view(np.uint8)
    return blocks


def bits(values):
    return (values + np.float32(0)).view(np.uint32)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_numbers_that_gguf_py_makes_of_them(kind):
    blocks = random_blocks(kind, 400)
    number, count, size = BLOCKS[kind]
    assert (Kind[kind].value, gguf.GGML_QUANT_SIZES[Kind[kind]]) == (number, (count, size))
    assert np.array_equal(bits(decoded(kind, blocks.tobytes())), bits(dequantize(blocks, Kind[kind]).reshape(-1)))


@pytest.mark.parametrize("kind", PLAIN)
def test_numbers_become_the_blocks_that_gguf_py_makes_of_them(kind):
    values = numbers(64, 256)
    values[0] = 0
    values[1, :32] = np.linspace(-1, 1, 32)
    assert encoded(kind, values) == quantize(values, Kind[kind]).tobytes()


def plainly_rounded(kind, values):
    """Every run of a block by its largest number, or its smallest and largest, with scales that are not rounded."""
    bits, run = int(kind[1]), 32 if kind in ("Q4_K", "Q5_K") else 16
    runs = values.reshape(-1, run).astype(float)
    if kind in ("Q3_K", "Q6_K"):
        step = np.abs(runs).max(1, keepdims=True) / (2 ** (bits - 1))
        return (np.clip(np.rint(runs / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step).reshape(values.shape)
    low = np.minimum(runs.min(1, keepdims=True), 0)
    step = (runs.max(1, keepdims=True) - low) / (2**bits - 1)
    return (np.rint((runs - low) / step) * step + low).reshape(values.shape)


@pytest.mark.parametrize("kind", K_QUANTS)
@pytest.mark.parametrize("mean", [0.0, 0.03, 0.2])
def test_the_search_for_a_k_quants_scales_beats_plain_rounding(kind, mean):
    values = numbers(64, 1024) + np.float32(mean)
    data = np.frombuffer(encoded(kind, values), np.uint8).reshape(64, -1)
    got = dequantize(data, Kind[kind]).astype(float)
    assert ((got - values) ** 2).sum() < 1.02 * ((plainly_rounded(kind, values) - values) ** 2).sum()
    # What it stands for is quantized again with next to no loss: merging a second time does no second damage.
    again = dequantize(np.frombuffer(encoded(kind, got), np.uint8).reshape(64, -1), Kind[kind])
    assert np.linalg.norm(again - got) < 0.02 * np.linalg.norm(got - values)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_a_k_quants_corner_cases_stay_finite(kind):
    values = numbers(8, 256)
    values[0], values[1], values[2] = 0, 0.5, -0.5
    values[3, :16], values[4] = 0, np.abs(values[4])
    values[5], values[6, 7] = values[5] * 1e-6, 100
    got = decoded(kind, encoded(kind, values)).reshape(8, 256)
    assert np.isfinite(got).all()
    assert not got[0].any()
    assert np.abs(got[1:3] - values[1:3]).max() < 0.02


def tensor_list(kind):
    """Name -> (numbers in the file's order, type)."""
    matrix = Kind[kind]
    q, k, gate = numbers(HEADS * 64, WIDTH), numbers(KV * 64, WIDTH), numbers(512, WIDTH)
    return {
        "token_embd.weight": (numbers(40, WIDTH, seed=1), Kind.F16), "output_norm.weight": (numbers(WIDTH), Kind.F32),
        "blk.0.attn_q.weight": (q, matrix), "blk.0.attn_k.weight": (k, matrix), "blk.0.ffn_gate.weight": (gate, matrix),
        "blk.0.attn_norm.weight": (numbers(WIDTH, seed=2), Kind.F32), "rope_freqs.weight": (numbers(7), Kind.F32),
    }  # fmt: skip


def packed(values, kind):
    """Bytes as gguf-py has them; of k-quants any bits."""
    if kind.name in K_QUANTS:
        count = values.size // 256
        return random_blocks(kind.name, count, seed=count).reshape(values.shape[0], -1)
    if kind is Kind.BF16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint8)
    return quantize(values, kind)


def write(path, kind, arch="llama", **options):
    writer = gguf.GGUFWriter(path, arch, **options)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "c"])
    writer.add_float32("some.number", 0.1)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind}")])
    for name, (values, how) in tensor_list(kind).items():
        data = packed(values, how)
        writer.add_tensor(name, data, raw_dtype=how if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapter():
    updates, deltas = {}, {}
    for own, name, out in (("self_attn.q_proj", "attn_q", HEADS * 64), ("self_attn.k_proj", "attn_k", KV * 64),
                           ("mlp.gate_proj", "ffn_gate", 512)):  # fmt: skip
        A, B = numbers(2, WIDTH, seed=out), numbers(out, 2, seed=5)
        updates[ak.Target(f"model.layers.0.{own}")] = (LoRA(A=torch.tensor(A), B=torch.tensor(B), scaling=2.0),)
        deltas[f"blk.0.{name}.weight"] = 2.0 * (B.astype(float) @ A.astype(float))
    for name, heads in (("blk.0.attn_q.weight", HEADS), ("blk.0.attn_k.weight", KV)):
        rows = deltas[name].shape[0]  # llama.cpp's converter: the two halves of a head become pairs
        deltas[name] = deltas[name].reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
    return ak.Adapter(updates), deltas


def read(path):
    reader = gguf.GGUFReader(path)
    return reader, {t.name: (t.tensor_type, np.array(t.data)) for t in reader.tensors}


def floats(kind, data):
    if kind is Kind.BF16:
        return data.view(ml_dtypes.bfloat16).astype(np.float32)
    return dequantize(data, kind)


KINDS = ["F32", "F16", "BF16", *BLOCKS]


@pytest.fixture
def many_runs(monkeypatch):
    """Cut weights of these tests into as many runs as those of a real model have."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16 * WIDTH)
    monkeypatch.setattr(requantize, "RUN", 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("many_runs")
def test_a_merged_model_is_what_gguf_py_quantizes_of_the_exact_merge(kind, tmp_path):
    base, out = write(tmp_path / "base.gguf", kind), tmp_path / "out.gguf"
    lora, deltas = adapter()
    report = ak.merge(base, lora, out)
    (before, old), (after, new) = read(base), read(out)
    assert list(after.fields) == list(before.fields)
    for key, field in before.fields.items():
        assert all(np.array_equal(a, b) for a, b in zip(field.parts, after.fields[key].parts, strict=True))
    for name, (how, data) in old.items():
        assert new[name][0] is how
        if name in deltas:
            exact = floats(how, data).astype(float) + deltas[name]
            step = exact if kind in ("F16", "BF16") else exact.astype(np.float32)
            wanted = step.astype({"F16": "<f2", "BF16": ml_dtypes.bfloat16}.get(kind, "<f4"))
            wanted = quantize(wanted, how) if kind in PLAIN else wanted
            wanted = np.frombuffer(encoded(kind, wanted), np.uint8) if kind in K_QUANTS else wanted
            assert np.array_equal(new[name][1].reshape(-1).view(np.uint8), wanted.reshape(-1).view(np.uint8))
        else:
            assert np.array_equal(new[name][1], data)
    assert set(report.damage) == {str(target) + ".weight" for target in lora.updates}
    assert ak.verify(out, base, lora).ok


@pytest.mark.usefixtures("many_runs")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Q4_K", "Q8_0"), ("Q8_0", "Q4_K"), ("Q6_K", "F16"), ("F16", "Q6_K"), ("F16", "Q5_1"), ("Q8_0", "F32")],
)
def test_the_type_changes_where_it_is_asked_for(kind, dtype, tmp_path):
    base, out = write(tmp_path / "base.gguf", kind), tmp_path / "out.gguf"
    lora, deltas = adapter()
    ak.merge(base, lora, out, dtype=dtype)
    (_, old), (after, new) = read(base), read(out)
    named = gguf.LlamaFileType[FILE_TYPES.get(dtype, f"MOSTLY_{dtype}")]
    assert after.fields["general.file_type"].contents() == named
    for name, (how, data) in old.items():
        if data.ndim < 2:
            assert np.array_equal(new[name][1], data)
            continue
        exact = floats(how, data).astype(float) + deltas.get(name, 0.0)
        if dtype in K_QUANTS:
            wanted = np.frombuffer(encoded(dtype, exact), np.uint8)
        else:
            wanted = exact.astype("<f2") if dtype == "F16" else quantize(exact.astype(np.float32), Kind[dtype])
        assert new[name][0] is Kind[dtype]
        assert np.array_equal(new[name][1].reshape(-1).view(np.uint8), wanted.reshape(-1).view(np.uint8))
    assert ak.verify(out, base, lora).ok


def write_experts(path, kind):
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for name, shape in (
        ("ffn_gate_exps", (3, 96, WIDTH)),
        ("ffn_down_exps", (3, WIDTH, 96)),
        ("ffn_gate", (64, WIDTH)),
    ):
        data = quantize(numbers(*shape), Kind[kind])
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=Kind[kind] if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.usefixtures("many_runs")
def test_runs_of_rows_begin_where_the_heads_of_llama_cpp_do(tmp_path):
    plan = ak.plan(write(tmp_path / "base.gguf", "Q4_0"), adapter()[0])
    by_name = {output.name: output.part.runs() for output in plan.outputs() if output.part is not None}
    assert [len(by_name[f"blk.0.{name}.weight"]) for name in ("attn_q", "attn_k", "ffn_gate")] == [HEADS, KV, 512 // 16]
    row = WIDTH // 32 * 18
    name = "blk.0.attn_q.weight"
    assert [run.places[name] for run in by_name[name]] == [(head * 64 * row, 64 * row) for head in range(HEADS)]


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    rows, width = 30_000, 512
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_tensor("token_embd.weight", np.zeros((rows, width), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    update = LoRA(A=torch.tensor(numbers(2, width)), B=torch.tensor(numbers(rows, 2)), scaling=2.0)
    lora = ak.Adapter({ak.Target("model.embed_tokens"): (update,)})
    for dtype in ("Q8_0", "F16"):
        tracemalloc.start()
        ak.merge(tmp_path / "base.gguf", lora, tmp_path / f"{dtype}.gguf", dtype=dtype, tied="merge")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # In float32 the tensor takes 61 MB, and 92 MB with what was written of it.
        assert peak < 60e6


@pytest.mark.usefixtures("many_runs")
@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", None), ("Q4_0", None), ("F16", None), ("Q8_0", "Q4_1")])
def test_single_experts_of_a_stack_are_merged(kind, dtype, tmp_path):
    base, out = write_experts(tmp_path / "base.gguf", kind), tmp_path / "out.gguf"
    updates, deltas = {}, {}
    for expert, own, name, shape in ((0, "gate_proj", "gate", (96, WIDTH)), (2, "gate_proj", "gate", (96, WIDTH)),
                                     (1, "down_proj", "down", (WIDTH, 96))):  # fmt: skip
        A, B = numbers(2, shape[1], seed=expert), numbers(shape[0], 2, seed=5)
        update = LoRA(A=torch.tensor(A), B=torch.tensor(B), scaling=2.0)
        updates[ak.Target(f"model.layers.0.mlp.experts.{expert}.{own}")] = (update,)
        deltas[f"blk.0.ffn_{name}_exps.weight", expert] = 2.0 * (B.astype(float) @ A.astype(float))
    report = ak.merge(base, ak.Adapter(updates), out, dtype=dtype)
    (_, old), (_, new) = read(base), read(out)
    how = Kind[dtype or kind]
    for name, (stored, data) in old.items():
        for expert, before in enumerate(data if data.ndim == 3 else [data]):
            change = deltas.get((name, expert))
            exact = floats(stored, before).astype(float) + (0.0 if change is None else change)
            wanted = exact.astype("<f2") if how is Kind.F16 else quantize(exact.astype(np.float32), how)
            wanted = before if change is None and stored is how else wanted
            got = new[name][1][expert] if data.ndim == 3 else new[name][1]
            assert np.array_equal(got.reshape(-1).view(np.uint8), wanted.reshape(-1).view(np.uint8))
    assert [len(report.norms[f"blk.0.ffn_{name}_exps.weight"]) for name in ("gate", "down")] == [2, 1]
    assert report.norms["blk.0.ffn_down_exps.weight"][0] == pytest.approx(
        np.linalg.norm(deltas["blk.0.ffn_down_exps.weight", 1]), rel=1e-6
    )
    assert ak.verify(out, base, ak.Adapter(updates)).ok
    ak.merge(base, ak.Adapter(updates), tmp_path / "out.safetensors", quantized="dequantize", dtype="F32")
    wide = load_file(tmp_path / "out.safetensors")["model.layers.0.mlp.experts.1.down_proj.weight"]
    stored, data = old["blk.0.ffn_down_exps.weight"]
    exact = floats(stored, data[1]).astype(float) + deltas["blk.0.ffn_down_exps.weight", 1]
    assert np.array_equal(wide, exact.astype(np.float32))


def test_an_unknown_type_is_refused(tmp_path):
    base = write(tmp_path / "base.gguf", "Q4_K")
    with pytest.raises(UsageError, match="Q9"):
        ak.merge(base, adapter()[0], tmp_path / "out.gguf", dtype="Q9")
    assert not (tmp_path / "out.gguf").exists()


def test_dequantized_it_becomes_a_base_in_its_own_names_and_order(tmp_path):
    base, out = write(tmp_path / "base.gguf", "Q4_K"), tmp_path / "out.safetensors"
    lora, deltas = adapter()
    ak.merge(base, lora, out, quantized="dequantize", dtype="F32")
    q = load_file(out)["model.layers.0.self_attn.q_proj.weight"]
    how, data = read(base)[1]["blk.0.attn_q.weight"]
    exact = floats(how, data).astype(float) + deltas["blk.0.attn_q.weight"]
    back = exact.reshape(HEADS, 32, 2, WIDTH).swapaxes(1, 2).reshape(HEADS * 64, WIDTH)
    assert np.array_equal(q, back.astype(np.float32))


def test_all_files_of_a_split_model_are_merged(tmp_path):
    write(tmp_path / "m.gguf", "Q8_0", split_max_tensors=3)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    lora, deltas = adapter()
    out = tmp_path / "out"
    ak.merge(parts[0], lora, out)
    assert sorted(path.name for path in out.iterdir()) == [path.name for path in parts]
    for part in parts:
        (_, old), (_, new) = read(part), read(out / part.name)
        for name, (how, data) in old.items():
            exact = (floats(how, data).astype(float) + deltas.get(name, 0.0)).astype(np.float32)
            assert np.array_equal(new[name][1], quantize(exact, how) if name in deltas else data)
    assert ak.verify(out / parts[0].name, parts[0], lora).ok
    parts[1].unlink()
    with pytest.raises(StorageError, match=parts[1].name):
        ak.merge(parts[0], lora, tmp_path / "again")


def test_one_wrong_bit_is_found(tmp_path):
    base, out = write(tmp_path / "base.gguf", "Q4_0"), tmp_path / "out.gguf"
    lora, _ = adapter()
    ak.merge(base, lora, out)
    for tensor in gguf.GGUFReader(out).tensors:
        data = bytearray(out.read_bytes())
        data[tensor.data_offset + 3] ^= 4
        (tmp_path / "bad.gguf").write_bytes(data)
        found = ak.verify(tmp_path / "bad.gguf", base, lora).differences
        assert [difference.tensor for difference in found] == [tensor.name]


def test_what_has_no_place_is_refused(tmp_path):
    base = write(tmp_path / "base.gguf", "F16")
    lost = ak.Adapter({ak.Target("model.layers.9.mlp.gate_proj"): next(iter(adapter()[0].updates.values()))})
    with pytest.raises(TargetNotFound):
        ak.merge(base, lost, tmp_path / "out.gguf")
    with pytest.raises(Unsupported, match="'rwkv6'"):
        ak.merge(write(tmp_path / "rwkv6.gguf", "F16", arch="rwkv6"), lost, tmp_path / "out.gguf")
    (tmp_path / "short.gguf").write_bytes(base.read_bytes()[:-4000])
    with pytest.raises(Malformed):
        ak.merge(tmp_path / "short.gguf", adapter()[0], tmp_path / "out.gguf")


def image_tensors(prefix=""):
    """Some of FLUX's weights in BFL's names, as ComfyUI-GGUF converts them: rows as they are, no prefix."""
    shapes = {
        "img_in.weight": (64, 64), "double_blocks.0.img_attn.qkv.weight": (192, 64),
        "double_blocks.0.img_attn.qkv.bias": (192,), "double_blocks.0.img_attn.norm.query_norm.scale": (16,),
        "single_blocks.0.linear1.weight": (448, 64), "final_layer.adaLN_modulation.1.weight": (128, 64),
    }  # fmt: skip
    return {prefix + name: numbers(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}


def write_image(path, tensors, arch, kind, original=()):
    writer = gguf.GGUFWriter(path, arch or "")
    if not arch:
        writer.kv_data[0].pop("general.architecture", None)
    for name, values in tensors.items():
        if name in original:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(-1, 256)
        own = Kind[kind] if values.ndim > 1 else Kind.F32
        data = quantize(values, own) if own is not Kind.F32 else values
        writer.add_tensor(name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_image(path):
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).astype("f8")
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize(("arch", "prefix"), [("flux", ""), ("pig", ""), (None, "model.diffusion_model.")])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_denoiser_of_comfyui_gguf_or_stable_diffusion_cpp_is_a_base(kind, arch, prefix, tmp_path):
    write_image(tmp_path / "base.gguf", image_tensors(prefix), arch, kind)
    A, B = numbers(4, 64, seed=9) * 9, numbers(256, 4, seed=8) * 9
    halves = numbers(4, 64, seed=7) * 9, numbers(128, 4, seed=6) * 9
    adapter = {
        "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": A,
        "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": B,
        "transformer.norm_out.linear.lora_A.weight": halves[0], "transformer.norm_out.linear.lora_B.weight": halves[1],
    }  # fmt: skip
    save_file(adapter, tmp_path / "adapter.safetensors")
    ak.merge(tmp_path / "base.gguf", [tmp_path / "adapter.safetensors"], tmp_path / "out.gguf")
    before, after = read_image(tmp_path / "base.gguf"), read_image(tmp_path / "out.gguf")
    wanted = {name: values.copy() for name, values in before.items()}
    wanted[f"{prefix}single_blocks.0.linear1.weight"][192:] += B.astype("f8") @ A
    swapped = np.roll(halves[1].astype("f8") @ halves[0], 64, axis=0)
    wanted[f"{prefix}final_layer.adaLN_modulation.1.weight"] += swapped
    assert before.keys() == after.keys()
    for name, values in wanted.items():
        if name.endswith(("linear1.weight", "adaLN_modulation.1.weight")):
            rounded = dequantize(quantize(values.astype("f4"), Kind[kind]), Kind[kind])
            np.testing.assert_allclose(after[name], rounded, atol=np.abs(values).max() * 2.0**-9)
            assert not np.array_equal(after[name], before[name])
        else:
            np.testing.assert_array_equal(after[name], before[name])


def test_a_tensor_of_another_shape_before_it_was_converted(tmp_path):
    """ComfyUI-GGUF stores small convolutions of U-Nets in rows of 256 numbers, and names their shape."""
    name = "input_blocks.1.0.in_layers.2.weight"
    tensors = {name: numbers(32, 16, 3, 3), "input_blocks.1.0.out_layers.3.weight": numbers(64, 256)}
    write_image(tmp_path / "base.gguf", tensors, "sd1", "Q8_0", {name})
    B, A = numbers(32, 4, 1, 1, seed=1) * 9, numbers(4, 16, 3, 3, seed=2) * 9
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    lora = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": np.float32(4)}
    save_file({key: np.asarray(value) for key, value in lora.items()}, tmp_path / "adapter.safetensors")
    ak.merge(tmp_path / "base.gguf", [tmp_path / "adapter.safetensors"], tmp_path / "out.gguf")
    before, after = read_image(tmp_path / "base.gguf"), read_image(tmp_path / "out.gguf")
    change = (B.reshape(32, 4).astype("f8") @ A.reshape(4, -1)).reshape(-1, 256)
    rounded = dequantize(quantize((before[name] + change).astype("f4"), Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_allclose(after[name], rounded, atol=1e-2 * np.abs(change).max())
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field(f"comfy.gguf.orig_shape.{name}") is not None


def test_an_unknown_architecture_is_refused_with_what_it_is(tmp_path):
    write_image(tmp_path / "base.gguf", {"some.layer.weight": numbers(64, 64)}, "pony", "Q8_0")
    with pytest.raises(Unsupported, match="architecture 'pony'"):
        ak.merge(tmp_path / "base.gguf", [adapter()[0]], tmp_path / "out.gguf")
