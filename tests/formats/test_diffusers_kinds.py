"""Each kind of file that diffusers loads: what is read here and written for it is what diffusers makes of the file."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "foreign" / "check_diffusers.py"


def tool():
    """The script, which runs diffusers' loaders on files of its kinds."""
    if "check_diffusers" not in sys.modules:
        spec = importlib.util.spec_from_file_location("check_diffusers", TOOL)
        sys.modules["check_diffusers"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["check_diffusers"])
    return sys.modules["check_diffusers"]


CHECK = tool()
SMALL = [
    kind for kind in CHECK.KINDS
    if not kind.model.startswith("unet") and not {"large", "meta"} & CHECK.MODELS[kind.model].keys()
]  # fmt: skip


def test_the_kinds_are_those_of_every_loader_and_converter():
    from diffusers.loaders import lora_conversion_utils as converters
    from diffusers.loaders import lora_pipeline

    loaders = {name.removesuffix("LoraLoaderMixin") for name in dir(lora_pipeline) if name.endswith("LoraLoaderMixin")}
    # An alias of Stable Diffusion's, and a loader for proteins.
    assert {kind.loader for kind in CHECK.KINDS} == loaders - {"", "RFD4Proteina"}
    known = {name for name in dir(converters) if name.startswith("_convert_") and name.endswith("_to_diffusers")}
    assert {kind.by for kind in CHECK.KINDS if kind.by} - {"_maybe_map_sgm_blocks_to_diffusers"} == known
    assert len(CHECK.KINDS) >= 57


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.name)
def test_diffusers_loads_what_is_written_and_computes_the_formula(kind):
    assert "layers" in CHECK.checked(kind)


def test_a_change_under_a_wrong_name_or_of_another_size_is_found():
    one = {"transformer.x": torch.ones(2, 2)}
    with pytest.raises(CHECK.Different, match="lack"):
        CHECK.compared(one, {"transformer.y": torch.ones(2, 2)})
    with pytest.raises(CHECK.Different, match="differs"):
        CHECK.compared(one, {"transformer.x": torch.ones(2, 2) * 1.00001})


# MiniMax-H3 of DiffSynth.


def minimax(head, slots=("lora_A.default.weight", "lora_B.default.weight")):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 8)).astype("f4"), rng.normal(size=(3 * head, 2)).astype("f4")
    stem = "blocks.0.attn.qkv_proj"
    return {f"{stem}.{slots[0]}": torch.from_numpy(A), f"{stem}.{slots[1]}": torch.from_numpy(B)}, B @ A


def test_rows_that_stand_head_by_head_are_brought_in_order_and_written_in_order(tmp_path):
    held, _ = minimax(2 * 128)
    save_file(held, tmp_path / "a.safetensors")
    whole = next(iter(held.values())), list(held.values())[1]
    want = (whole[1].reshape(2, 3, 128, 2).swapaxes(0, 1).reshape(768, 2).double() @ whole[0].double()).numpy()
    adapter = ak.read(tmp_path / "a.safetensors")
    (target,) = adapter.updates
    np.testing.assert_allclose(adapter.delta(target.path).numpy(), want, rtol=1e-5, atol=1e-5)
    ak.write(adapter, tmp_path / "b.safetensors", "comfyui")
    assert not any("default" in key for key in load_file(tmp_path / "b.safetensors"))
    again = ak.read(tmp_path / "b.safetensors")
    np.testing.assert_allclose(again.delta(target.path).numpy(), want, rtol=1e-5, atol=1e-5)


def test_rows_of_no_whole_heads_are_refused(tmp_path):
    save_file(minimax(64)[0], tmp_path / "a.safetensors")
    with pytest.raises(Malformed, match="3 x 128"):
        ak.read(tmp_path / "a.safetensors")


def test_an_alpha_in_the_header_counts_where_the_family_has_it(tmp_path):
    held, change = minimax(128, ("lora_A.weight", "lora_B.weight"))
    save_file(held, tmp_path / "a.safetensors", {"alpha": "3"})
    adapter = ak.read(tmp_path / "a.safetensors")
    np.testing.assert_allclose(
        adapter.delta("transformer.blocks.0.attn.qkv_proj").numpy(), 1.5 * change, rtol=1e-5, atol=1e-5
    )
    ak.write(ak.ops.resize(adapter, rank=1), tmp_path / "b.safetensors", "comfyui")
    assert run("inspect", str(tmp_path / "b.safetensors"), "--json").exit_code == 0
    assert "alpha" not in ak.read(tmp_path / "b.safetensors").foreign.data.get("metadata", {})
    # Other families' loaders leave it out of account.
    other = {key.replace("qkv_proj", "to_q").replace("blocks.0", "transformer_blocks.0"): t for key, t in held.items()}
    save_file(other, tmp_path / "c.safetensors", {"alpha": "3"})
    (updates,) = ak.read(tmp_path / "c.safetensors").updates.values()
    assert updates[0].scaling == 1
