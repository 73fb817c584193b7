"""Adapters carry the fingerprint of their base, in files with metadata too; other weights are told from other bases."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run, save_base, save_peft
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.metadata import fingerprints_of, shapes_of
from adapterkit.errors import CheckFailed
from adapterkit.io.checkpoint import fingerprint, open_checkpoint, shapes_digest

SAME, OTHER = "same architecture, other weights", "other names or shapes of tensors"


@pytest.fixture
def bases(tmp_path: Path) -> dict[str, Path]:
    """A base, one of other weights, one with another tensor, and one that is cast."""
    found = {name: save_base(tmp_path / name) for name in ("base", "weights", "more", "cast")}
    zeros = np.zeros((8, 4), np.float32)
    for name, tensors in {
        "weights": {"layers.0.q.weight": zeros + 1},
        "more": {"layers.0.q.weight": zeros, "layers.0.k.weight": zeros},
        "cast": {"layers.0.q.weight": zeros.astype(np.float16)},
    }.items():
        save_file(tensors, found[name] / "model.safetensors", {"format": "pt"})
    return found


def identity(base: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    opened = open_checkpoint(base)
    return (fingerprint(opened),), (shapes_digest(opened),)


def carried(adapter: ak.Adapter) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return fingerprints_of(adapter), shapes_of(adapter)


@pytest.mark.parametrize(("name", "file"), [
    ("adapterkit", "a.safetensors"), ("peft", "peft"), ("mlx", "mlx"),
])  # fmt: skip
def test_what_is_extracted_carries_its_base(tmp_path: Path, bases: dict[str, Path], name: str, file: str) -> None:
    ak.merge(bases["base"], [save_peft(tmp_path / "lora")], tmp_path / "tuned")
    adapter = ak.ops.extract(tmp_path / "tuned", bases["base"], rank=1)
    ak.write(adapter, tmp_path / file, format=name, on_loss="promote")
    read = ak.read(tmp_path / file)
    assert carried(read) == identity(bases["base"])
    assert carried(ak.ops.scale(read, 0.5)) == identity(bases["base"])
    ak.convert(tmp_path / file, tmp_path / "native.safetensors", to="adapterkit", on_loss="promote")
    assert carried(ak.read(tmp_path / "native.safetensors")) == identity(bases["base"])


def test_peft_loads_what_carries_a_fingerprint(tmp_path: Path, bases: dict[str, Path]) -> None:
    from peft.utils import save_and_load as peft_utils

    adapter = ak.read(save_peft(tmp_path / "lora")).bind(bases["base"])
    ak.write(adapter, tmp_path / "out", format="peft")
    loaded = peft_utils.load_peft_weights(str(tmp_path / "out"), device="cpu")
    before = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name: value.tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in before.items()
    }


def test_binding_records_the_base_once(tmp_path: Path, bases: dict[str, Path]) -> None:
    adapter = ak.read(save_peft(tmp_path / "lora"))
    assert carried(adapter) == ((), ())
    bound = adapter.bind(bases["base"])
    assert carried(bound) == identity(bases["base"])
    assert carried(bound.bind(bases["weights"])) == identity(bases["base"]), "its own base stays the one it names"
    run("convert", tmp_path / "lora", tmp_path / "b", "--to", "peft", "--base", bases["base"], "--match-base")
    assert carried(ak.read(tmp_path / "b")) == identity(bases["base"])


@pytest.mark.parametrize(("name", "why"), [("weights", SAME), ("cast", SAME), ("more", OTHER)])
def test_merge_and_verify_say_how_a_base_is_another(
    tmp_path: Path, bases: dict[str, Path], name: str, why: str
) -> None:
    adapter = ak.read(save_peft(tmp_path / "lora")).bind(bases["base"])
    ak.write(adapter, tmp_path / "bound", format="peft")
    warnings = ak.merge(bases[name], tmp_path / "bound", tmp_path / "out").record()["warnings"]
    assert any(why in each and "fingerprint" in each for each in warnings), warnings
    with pytest.raises(CheckFailed, match=why):
        ak.merge(bases[name], tmp_path / "bound", tmp_path / "strict", strict_base=True)
    assert not ak.merge(bases["base"], tmp_path / "bound", tmp_path / "right", strict_base=True).record()["warnings"]
    words = ["verify", tmp_path / "right", "--base", bases[name], "--adapter", tmp_path / "bound"]
    assert why in run(*words).stdout
    assert {each["how"] for each in record(*words, code=1)["base"]} == {why}


def test_a_record_without_shapes_is_compared_as_before(tmp_path: Path, bases: dict[str, Path]) -> None:
    known = fingerprint(open_checkpoint(bases["base"]))
    adapter = ak.read(save_peft(tmp_path / "lora")).step("extract", base_fingerprint=known)
    (why,) = ak.merge(bases["weights"], adapter, tmp_path / "out").record()["warnings"]
    assert why.endswith(fingerprint(open_checkpoint(bases["weights"])))


def test_a_created_adapter_names_the_files_its_model_came_from(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = ak.torch.create(model, "lora", targets=["*q_proj"], rank=2)
    assert carried(adapter) == identity(tmp_path / "base")
    assert carried(ak.torch.inject(model, adapter).adapter()) == identity(tmp_path / "base")
    prompt = ak.torch.create(model, "prompt", rank=2)
    assert carried(prompt) == identity(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert carried(ak.torch.create(model, "lora", targets=["*q_proj"], rank=2)) == ((), ())
    fresh = transformers.LlamaForCausalLM(config)
    assert carried(ak.torch.create(fresh, "lora", targets=["*q_proj"], rank=2)) == ((), ())


def test_the_fingerprint_of_10_billion_parameters_reads_little(tmp_path: Path) -> None:
    """Sparse files: 10 B parameters of bf16 in 290 tensors; what is read does not grow with them."""
    shapes = {f"layers.{n}.{part}": (4096, 8448) for n in range(32) for part in "abcdefghi"} | {
        "embed": (16384, 4096), "norm": (4096,)
    }  # fmt: skip
    assert sum(int(np.prod(shape)) for shape in shapes.values()) > 10_000_000_000
    sparse(tmp_path / "model.safetensors", shapes)
    opened = open_checkpoint(tmp_path)
    read = bytes_read()
    known = fingerprint(opened), shapes_digest(opened)
    assert len(set(known)) == 2
    assert bytes_read() - read < 40_000_000


def sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])
