"""Fused queries, keys and values whose rows stand by head in MiniMaxAI's shards of MiniMax-H3, against float64."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import UsageError

HEADS, SIZE, WIDTH = 2, 128, 16
ROWS = 3 * HEADS * SIZE
NAME = "blocks.0.attn.qkv_proj"


def write_base(folder, sharded):
    """A block of the model under its authors' names; in two shards with an index, or one file."""
    random = np.random.default_rng(0)
    tensors = {
        f"{NAME}.weight": random.standard_normal((ROWS, WIDTH)).astype(np.float32),
        "blocks.0.attn.out_proj.weight": random.standard_normal((WIDTH, HEADS * SIZE)).astype(np.float32),
        "blocks.0.mlp.fc1.weight": random.standard_normal((32, WIDTH)).astype(np.float32),
        "token_refiner.blocks.0.attn.qkv_proj.weight": random.standard_normal((ROWS, WIDTH)).astype(np.float32),
    }
    folder.mkdir()
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = list(tensors)
    for file, part in zip(files, (names[:2], names[2:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: files[0] if name in names[:2] else files[1] for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors


def by_head(change):
    """Rows of all queries, all keys and all values, head by head, one row at a time."""
    found = np.empty_like(change)
    for head in range(HEADS):
        for part in range(3):
            for row in range(SIZE):
                found[(3 * head + part) * SIZE + row] = change[(part * HEADS + head) * SIZE + row]
    return found


def fused(path):
    """ComfyUI's file with one pair of factors, and its change in float64."""
    random = np.random.default_rng(1)
    A, B = (random.standard_normal(shape).astype(np.float32) for shape in ((2, WIDTH), (ROWS, 2)))
    save_file({f"diffusion_model.{NAME}.lora_A.weight": A, f"diffusion_model.{NAME}.lora_B.weight": B}, path)
    return B.astype(float) @ A.astype(float)


def split(path):
    """diffusers' file with a pair for each part, and the change of the three together."""
    random, tensors, changes = np.random.default_rng(2), {}, []
    for part in "qkv":
        A, B = (random.standard_normal(shape).astype(np.float32) for shape in ((2, WIDTH), (ROWS // 3, 2)))
        key = f"transformer.transformer_blocks.0.attn.to_{part}"
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        changes.append(B.astype(float) @ A.astype(float))
    save_file(tensors, path)
    return np.concatenate(changes)


def merged(base, adapter, out, **options):
    ak.merge(base, adapter, out, **options)
    held = {}
    for file in out.glob("*.safetensors"):
        held |= load_file(file)
    return held


@pytest.mark.parametrize("write", [fused, split])
def test_a_single_file_has_all_queries_first(write, tmp_path):
    before, change = write_base(tmp_path / "base", sharded=False), write(tmp_path / "lora.safetensors")
    after = merged(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out")
    np.testing.assert_allclose(after[f"{NAME}.weight"], before[f"{NAME}.weight"] + change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("write", [fused, split])
def test_shards_are_asked_about_and_a_rule_says_their_order(write, tmp_path):
    before, change = write_base(tmp_path / "base", sharded=True), write(tmp_path / "lora.safetensors")
    adapter = tmp_path / "lora.safetensors"
    with pytest.raises(UsageError, match=r"by part .*or by head") as error:
        ak.merge(tmp_path / "base", adapter, tmp_path / "none")
    assert "--rename rows:by_head or --rename rows:by_part" in error.value.cure
    for rule, wanted in (("rows:by_part", change), ("rows:by_head", by_head(change))):
        out = tmp_path / rule[5:]
        after = merged(tmp_path / "base", adapter, out, rename=rule)
        np.testing.assert_allclose(after[f"{NAME}.weight"], before[f"{NAME}.weight"] + wanted, rtol=0, atol=1e-5)
        others = [name for name in before if NAME not in name or "refiner" in name]
        assert all(np.array_equal(before[name], after[name]) for name in others)
        assert ak.verify(out, tmp_path / "base", adapter, rename=rule)


def test_an_unknown_order_is_refused(tmp_path):
    write_base(tmp_path / "base", sharded=True)
    fused(tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="names an unknown order 'by_row'"):
        ak.merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out", rename="rows:by_row")
