"""The gate on packed merges, GGUF files of gguf-py among them: each fault at its module, none where rounding is all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gated_models import deltas, lora, make, model_of, scaled, world
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.errors import UsageError
from adapterkit.gating import Gate

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

FAST: dict[str, Any] = {"texts": 1, "length": 16, "new_tokens": 0, "null": False, "device": "cpu"}
Tensors = dict[str, torch.Tensor]
HEADS = 4
DOWN, OUT = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("packed"))


def model_in_gguf(path: Path, tensors: Tensors, kind: str) -> Path:
    """What llama.cpp's converter writes: its names, and the halves of each head as pairs of rows; by gguf-py."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    for name, value in tensors.items():
        array = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, width = array.shape
            array = array.reshape(HEADS, 2, rows // HEADS // 2, width).swapaxes(1, 2).reshape(rows, width)
        own = names.get_name(name, (".weight",))
        assert own is not None
        packs = "_proj" in name and array.shape[-1] % 32 == 0
        how = gguf.GGMLQuantizationType[kind if packs else "F32"]
        writer.add_tensor(own, gguf.quants.quantize(np.ascontiguousarray(array), how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(base: Path, changes: Tensors, factor: float = 1.0) -> Tensors:
    tensors = load_file(base / "model.safetensors")
    return tensors | {name: tensors[name].float() + factor * delta for name, delta in changes.items()}


def without(changes: Tensors, word: str) -> Tensors:
    return {name: delta for name, delta in changes.items() if word not in name}


def shifted(changes: Tensors) -> Tensors:
    return {
        name.replace(f"layers.{at}.", f"layers.{1 - at}."): delta
        for name, delta in changes.items() for at in [int(name.split("layers.")[1][0])]
    }  # fmt: skip


def no_norm(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.input_layernorm.weight": torch.ones(32)}


def crossed(changes: Tensors) -> Tensors:
    one, other = f"{OUT}.weight", "model.layers.0.self_attn.o_proj.weight"
    return changes | {one: changes[other], other: changes[one]}


FAULTS: dict[str, tuple[Callable[[Path, Tensors], Tensors], str]] = {
    "twice": (lambda base, d: merged(base, d, 2), "twice the change"),
    "half": (lambda base, d: merged(base, d, 0.5), "half the change"),
    "sign turned": (lambda base, d: merged(base, d, -1), "opposite sign"),
    "nothing": (lambda base, d: merged(base, d, 0), "equals the base"),
    "one target missed": (
        lambda base, d: merged(base, without(d, DOWN)),
        "layer 1 down_proj is the first module that differs",
    ),
    "one layer missed": (lambda base, d: merged(base, without(d, "layers.1.")), "none of the change"),
    "attention missed": (lambda base, d: merged(base, without(d, "self_attn")), "8 of"),
    "layers shifted": (lambda base, d: merged(base, shifted(d)), "contain the change of another module"),
    "two targets exchanged": (lambda base, d: merged(base, crossed(d)), "contain the change of another module"),
    "one layer transposed": (
        lambda base, d: merged(base, d | {f"{OUT}.weight": d[f"{OUT}.weight"].T}),
        "layer 1 o_proj contains the change transposed",
    ),
    "a norm lost": (lambda base, d: no_norm(merged(base, d)), "layer 0 input_layernorm has other weights"),
}  # fmt: skip


def check_failed(found: Gate, words: str) -> None:
    assert found.outcome == "failed", found.verdicts
    assert any(words in verdict for verdict in found.verdicts), found.verdicts


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_fault_of_a_packed_merge_is_found_at_its_module(root: str, tmp_path: Path, fault: str, kind: str) -> None:
    base, adapter = world("llama", root)
    make_it, words = FAULTS[fault]
    out = model_in_gguf(tmp_path / "out.gguf", make_it(base, deltas(adapter)), kind)
    # Of 4 bits the whole effect says little: the fault must be found by its module.
    check_failed(ak.gate(base, adapter, merged=out, min_kept=-9.0, **FAST), words)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_a_sound_gguf_merge_has_no_fault_at_any_module(root: str, tmp_path: Path, kind: str) -> None:
    base, adapter = world("llama", root)
    out = model_in_gguf(tmp_path / "out.gguf", merged(base, deltas(adapter)), kind)
    coarse = kind.startswith(("Q4", "Q5"))
    found = ak.gate(base, adapter, merged=out, **FAST, **({"min_kept": 0.3} if coarse else {}))
    assert found.outcome == "passed", found.verdicts
    assert found.merged is not None
    assert not found.merged.faults
    assert len([part for part in found.merged.parts if part.touched]) == 14


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1"])
def test_our_merge_into_a_gguf_model_passes_and_one_of_another_base_fails(root: str, tmp_path: Path, kind: str) -> None:
    base, adapter = world("llama", root)
    packed = model_in_gguf(tmp_path / "base.gguf", load_file(base / "model.safetensors"), kind)
    ak.merge(packed, adapter, tmp_path / "merged.gguf")
    found = ak.gate(base, adapter, merged=tmp_path / "merged.gguf", min_kept=0.5, **FAST)
    assert found.outcome == "passed", found.verdicts
    other = load_file(make("llama", tmp_path / "other", seed=7) / "model.safetensors")
    ak.merge(model_in_gguf(tmp_path / "other.gguf", other, kind), adapter, tmp_path / "wrong.gguf")
    check_failed(
        ak.gate(base, adapter, merged=tmp_path / "wrong.gguf", **FAST), "made from other weights than the base"
    )


def test_a_weak_change_that_a_grid_ate_is_found_at_its_modules(root: str, tmp_path: Path) -> None:
    base, adapter = world("llama", root)
    packed = model_in_gguf(tmp_path / "base.gguf", load_file(base / "model.safetensors"), "Q4_0")
    on_grid = make("llama", tmp_path / "plain")
    exact = {name: torch.from_numpy(value) for name, value in numbers_of(packed, on_grid).items()}
    from safetensors.torch import save_file

    save_file(exact, on_grid / "model.safetensors", {"format": "pt"})
    weak = scaled(adapter, 0.02)
    ak.merge(packed, weak, tmp_path / "merged.gguf")
    found = ak.gate(on_grid, weak, merged=tmp_path / "merged.gguf", **FAST)
    assert found.outcome == "failed", found.verdicts
    assert found.merged is not None
    assert found.merged.faults


def numbers_of(packed: Path, like: Path) -> dict[str, np.ndarray]:
    """The numbers of a GGUF model by gguf-py, under the names and in the order of rows of transformers."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    held = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(packed).tensors}
    found = {}
    for name in load_file(like / "model.safetensors"):
        own = names.get_name(name, (".weight",))
        array = held[str(own)]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, width = array.shape
            array = array.reshape(HEADS, rows // HEADS // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
        found[name] = np.array(array, np.float32)
    return found


def test_a_gguf_base_needs_its_folder(root: str, tmp_path: Path) -> None:
    base, adapter = world("llama", root)
    packed = model_in_gguf(tmp_path / "base.gguf", load_file(base / "model.safetensors"), "Q8_0")
    with pytest.raises(UsageError, match=r"cannot run without a config") as refused:
        ak.gate(packed, adapter, **FAST)
    assert "--merged (merged=)" in str(refused.value.cure)
    other = lora("llama", model_of(base), seed=2)
    found = ak.gate(base, other, merged=packed, **FAST)
    check_failed(found, "equals the base")
