"""kohya's OFT, of Stable Diffusion in one piece and of FLUX in parts: what its scripts compute, and what they read."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, Unrepresentable
from adapterkit.formats._image import underscores
from adapterkit.io.computed import load
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA
from adapterkit.methods.oft import OFT

FILE = Path(__file__).parents[2] / "spec" / "vectors" / "formats" / "kohya" / "oft_flux" / "adapter.safetensors"
QKV = "transformer.double_blocks.0.img_attn.qkv"
HELD = load_file(FILE)


def of_sd_scripts(W, parts, alpha):
    """`OFTInfModule.merge_to` of networks/oft_flux.py, in float64, its parts under one another."""
    done, start = [], 0
    for blocks in parts:
        n, size, _ = blocks.shape
        Q = blocks - blocks.transpose(0, 2, 1)
        norm = np.linalg.norm(Q)
        Q = Q * (min(norm, alpha * n * size) + 1e-8) / (norm + 1e-8)
        R = (np.eye(size) + Q) @ np.linalg.inv(np.eye(size) - Q)
        rows = W[start : start + n * size].reshape(n, size, -1)
        done.append(np.einsum("knm,knp->kmp", R, rows).reshape(n * size, -1))
        start += n * size
    return np.concatenate(done)


def written(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def base_of(folder, shapes):
    rng = np.random.default_rng(2)
    save_file({f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


def test_each_part_of_a_fused_weight_turns_as_in_sd_scripts(tmp_path):
    base = base_of(
        tmp_path,
        {f"{QKV}": (24, 8), QKV.replace("qkv", "proj"): (8, 8), "transformer.single_blocks.1.linear1": (56, 8)},
    )
    ak.merge(base, [FILE], tmp_path / "out")
    merged = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    for name, W in load_file(base).items():
        stem = "oft_unet_" + name.removesuffix(".weight").removeprefix("transformer.").replace(".", "_")
        parts = [HELD[key].astype("f8") for key in sorted(HELD) if key.startswith(f"{stem}.oft_blocks")]
        wanted = of_sd_scripts(W, parts, float(HELD[f"{stem}.alpha"]))
        assert np.abs(merged[name] - wanted).max() <= 1e-7 * np.abs(wanted).max()


def test_the_parts_go_to_diffusers_modules_and_come_back(tmp_path):
    names = {f"transformer.transformer_blocks.0.attn.to_{x}": (8, 8) for x in "qkv"}
    names["transformer.transformer_blocks.0.attn.to_out.0"] = (8, 8)
    names |= {f"transformer.single_transformer_blocks.1.attn.to_{x}": (8, 8) for x in "qkv"}
    names["transformer.single_transformer_blocks.1.proj_mlp"] = (32, 8)
    adapter = ak.read(FILE, base=base_of(tmp_path, names))
    assert {str(target) for target in adapter.updates} == set(names)
    fresh = ak.Adapter({target: tuple(u.map(_own) for u in found) for target, found in adapter.updates.items()})
    ak.write(fresh, tmp_path / "again.safetensors", "kohya")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == HELD.keys()
    assert all(np.array_equal(again[key], value) for key, value in HELD.items())


def _own(leaf):
    return from_numpy(load(leaf))


def turned(rows, size=8, alpha=0.0625, blocks=2):
    square = from_numpy(np.random.default_rng(1).normal(size=(blocks, size // blocks, size // blocks)).astype("f4"))
    return {ak.Target(QKV, rows=rows): (OFT(square=square, side="out", constraint=alpha * size),)}


BESIDE = {
    ak.Target(QKV.replace("qkv", "proj")): (
        LoRA(A=from_numpy(np.ones((2, 8), "f4")), B=from_numpy(np.ones((8, 2), "f4")), scaling=1.0),
    )
}


@pytest.mark.parametrize(
    ("updates", "why"),
    [
        (turned(None, 24), "all 3 parts of a fused weight"),
        (turned((0, 8)) | turned((8, 16)), "all 3 parts of a fused weight"),
        (turned((0, 8)) | turned((8, 16)) | turned((16, 24), alpha=0.125), "or its constraint per output"),
        (turned((0, 8)) | turned((8, 16)) | turned((16, 24), blocks=4), "its number of blocks"),
        (turned((0, 8)) | turned((8, 16)) | turned((16, 24)) | BESIDE, "each of its networks reads only one kind"),
    ],
)
def test_what_sd_scripts_would_read_otherwise_is_refused(updates, why, tmp_path):
    with pytest.raises(Unrepresentable, match=why):
        ak.write(ak.Adapter(updates), tmp_path / "x.safetensors", "kohya")
    assert list(tmp_path.iterdir()) == []


STEM = "oft_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    ("change", "error", "where"),
    [
        (lambda t: t.pop(f"{STEM}.oft_blocks.1"), Malformed, STEM),
        (lambda t: t.pop(f"{STEM}.alpha"), Malformed, STEM),
        (lambda t: t.update({f"{STEM}.alpha": np.zeros((), "f4")}), Malformed, f"{STEM}.alpha"),
        (lambda t: t.update({f"{STEM}.oft_blocks": t[f"{STEM}.oft_blocks.0"]}), Malformed, STEM),
        (lambda t: t.update({f"{STEM}.oft_blocks.1": np.ones((4, 4), "f4")}), ShapeMismatch, f"{STEM}.oft_blocks.1"),
        (lambda t: t.update({f"{STEM}.lora_up.weight": np.ones((4, 4), "f4")}), Malformed, f"{STEM}.lora_up.weight"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(change, error, where, tmp_path):
    tensors = dict(HELD)
    change(tensors)
    with pytest.raises(error) as raised:
        ak.read(written(tmp_path, tensors), "kohya")
    assert where in raised.value.where


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_facts_about_all_targets_are_not_computed_again_for_each_target(to, tmp_path, monkeypatch):
    """Otherwise the time would grow with the square of the number of targets."""
    calls = []
    prefixes_of = underscores.prefixes_of
    monkeypatch.setattr(underscores, "prefixes_of", lambda paths: calls.append(paths) or prefixes_of(paths))
    names = [f"unet.down_blocks.1.attentions.{n // 2}.transformer_blocks.0.attn{n % 2 + 1}" for n in range(4)]
    targets = [ak.Target(f"{name}.to_{part}") for name in names for part in "qkv"]
    lora = LoRA(A=from_numpy(np.ones((2, 8), "f4")), B=from_numpy(np.ones((8, 2), "f4")))
    ak.write(ak.Adapter(dict.fromkeys(targets, (lora,))), tmp_path / "a.safetensors", format=to)
    assert len(calls) < len(targets)
