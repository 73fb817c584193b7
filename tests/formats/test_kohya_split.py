"""FLUX's fused weights in parts, as sd-scripts trains them: files of tools/foreign/kohya_split.py."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak

DATA = Path(__file__).parents[1] / "data" / "kohya_split"
HELD = load_file(DATA / "forward.safetensors")
PATHS = {
    "lora_unet_double_blocks_0_img_attn_qkv": "transformer.double_blocks.0.img_attn.qkv",
    "lora_unet_single_blocks_1_linear1": "transformer.single_blocks.1.linear1",
}


@pytest.fixture
def base(tmp_path):
    tensors = {f"{path}.{kind}": HELD[f"{stem}.{kind}"] for stem, path in PATHS.items() for kind in ("weight", "bias")}
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def outputs(base, out, **options):
    ak.merge(base, ak.read(DATA / "adapter.safetensors", base=base, **options), out)
    merged = load_file(out)
    return {s: HELD[f"{s}.x"] @ merged[f"{p}.weight"].T + merged[f"{p}.bias"] for s, p in PATHS.items()}


def test_parts_of_fused_weights_count_as_sd_scripts_trained_them(base, tmp_path):
    """Each part has its own r ranks, and the file r times as many, beside the alpha of one part."""
    for stem, y in outputs(base, tmp_path / "merged.safetensors").items():
        torch.testing.assert_close(y, HELD[f"{stem}.y"], rtol=1e-5, atol=1e-5)
    for stem, y in outputs(base, tmp_path / "formula.safetensors", compat="formula").items():
        assert not torch.allclose(y, HELD[f"{stem}.y"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("compat", [None, "formula"])
def test_the_file_is_written_back(compat, base, tmp_path):
    ak.write(ak.read(DATA / "adapter.safetensors", base=base, compat=compat), tmp_path / "again.safetensors", "kohya")
    one, other = load_file(DATA / "adapter.safetensors"), load_file(tmp_path / "again.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata()["ss_network_args"] == '{"split_qkv": "True"}'
