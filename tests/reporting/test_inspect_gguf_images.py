"""`inspect` of a GGUF file of an image model: shapes and types of the weights, not of their blocks, and the family."""

import gguf
import numpy as np
import pytest

import adapterkit as ak


@pytest.mark.parametrize(("architecture", "prefix"), [("flux", ""), ("pig", "model.diffusion_model."), (None, "")])
def test_inspect_shows_the_weights_and_the_family(architecture, prefix, tmp_path):
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture or "none")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    shapes = {"img_in": (64, 32), "double_blocks.0.img_attn.qkv": (96, 32), "single_blocks.0.linear1": (224, 32)}
    for name, shape in shapes.items():
        weight = random.normal(size=shape).astype("f4")
        kind = gguf.GGMLQuantizationType.Q8_0 if name != "img_in" else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{prefix}{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    record = ak.inspect(tmp_path / "m.gguf").record()
    found = {each["name"]: each for each in record["tensors"]}
    for name, shape in shapes.items():
        each = found[f"{prefix}{name}.weight"]
        count = int(np.prod(shape))
        plain = name == "img_in"
        size = count * 4 if plain else count // 32 * 34
        assert (each["shape"], each["parameters"], each["bytes"]) == (list(shape), count, size)
        assert each["dtype"] == ("F32" if plain else "Q8_0")
    assert record.get("architecture") == architecture
    assert "flux" in record["families"]
    assert record["totals"]["dtypes"]["Q8_0"]["parameters"] == 96 * 32 + 224 * 32
