"""gguf-py: writer and reader; the sums are llama.cpp's, `build_lora_mm`, on weights in its converter's order."""

import gguf
import numpy as np

CASES = {"f32": None, "f16": np.float16, "q8_0": "Q8_0"}
FILE = "adapter.gguf"
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


HEADS = {"attn_q": 4, "attn_k": 2}
"""Names whose rows are in Meta's order -> how many heads share them."""


def permuted(weights, heads):
    """transformers' rows in Meta's order."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weights.shape)


def restored(weights, heads):
    """Meta's rows in transformers' order."""
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def write(folder, base, case):
    """Lets the tool save an adapter."""
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 12.0)
    writer.add_string("general.name", "tiny")
    rng = np.random.default_rng(4)
    rank = 32 if case == "q8_0" else 3
    for layer in range(2):
        for name, own in NAMES.items():
            out, in_ = base[f"model.layers.{layer}.{own}.weight"].shape
            for end, shape in (("lora_a", (rank, in_)), ("lora_b", (out, rank))):
                value = (rng.normal(size=shape) / 4).astype(np.float32)
                key = f"blk.{layer}.{name}.weight.{end}"
                if case == "q8_0" and shape[1] % 32 == 0:
                    quantized = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
                    writer.add_tensor(key, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                else:
                    writer.add_tensor(key, value.astype(np.float16 if case == "f16" else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merged(folder, base):
    """What the tool loads from a folder, folded into the base."""
    reader = gguf.GGUFReader(folder / FILE)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    result = {}
    for key, a in tensors.items():
        if not key.endswith(".weight.lora_a"):
            continue
        b = tensors[key[:-1] + "b"]
        _, layer, name = key.removesuffix(".weight.lora_a").split(".")
        own = f"model.layers.{layer}.{NAMES[name]}.weight"
        heads = HEADS.get(name)
        weight = base[own].astype(np.float64)
        held = permuted(weight, heads) if heads else weight
        held = held + (alpha / b.shape[1] if alpha else 1.0) * (b @ a)
        result[own] = (restored(held, heads) if heads else held).astype(np.float32)
    return result
