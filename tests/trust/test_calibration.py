"""Rounding by activations: what layers read is what transformers gives them, and their outputs lose less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command_line import run
from gated_models import deltas, lora, make, model_of, only
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from adapterkit.gating import calibrate
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.quant import dequantized

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZE = 0.03
"""Size of the change, relative to the weight: less than a step of four bits."""

Arrays = dict[str, np.ndarray[Any, Any]]


def grouped(W: np.ndarray[Any, Any]) -> Arrays:
    """GPTQ of 4 bits by its formula: w = (q - 8) * scale, one scale a row; eight numbers a word, lowest bits first."""
    scale = (np.abs(W).max(1) / 7).astype(np.float16)
    q = np.clip(np.rint(W / scale[:, None].astype("f4")) + 8, 0, 15).astype(np.uint32)
    words = np.bitwise_or.reduce(q.reshape(len(q), -1, 8) << (4 * np.arange(8, dtype=np.uint32)), axis=2)
    return {
        "qweight": words.view(np.int32).T.copy(), "qzeros": np.full((1, len(q) // 8), 0x77777777, np.int32),
        "scales": scale[None],
    }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ak.Adapter]:
    """A folder of plain weights, the same in GPTQ, and an adapter at every linear layer."""
    root = tmp_path_factory.mktemp("calibration")
    plain = make("llama", root / "plain")
    tensors: Arrays = {}
    for name, W in load_file(plain / "model.safetensors").items():
        if "_proj" in name:
            tensors |= {f"{name.removesuffix('weight')}{part}": held for part, held in grouped(W).items()}
        else:
            tensors[name] = W
    packed = root / "gptq"
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}
    (packed / "config.json").write_text(json.dumps(config))
    # It names no base, nor does its recipe: packing gives the base another fingerprint.
    return plain, packed, ak.Adapter(lora("llama", model_of(plain), size=SIZE).updates)


def numbers(base: Path) -> Arrays:
    """The numbers that packed weights stand for."""
    return {name: each.torch().float().numpy() for name, each in dequantized(open_checkpoint(base)).tensors.items()}


def read_by(plain: Path, weights: Arrays, ids: torch.Tensor) -> Arrays:
    """What each linear layer reads, by torch's own hooks on a model of these weights."""
    model = model_of(plain)
    model.load_state_dict({name: torch.from_numpy(each.copy()) for name, each in weights.items()}, strict=False)
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            kept = found.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0][0]))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    return {name: torch.cat(each).numpy() for name, each in found.items()}


def lost(plain: Path, base: Path, out: Path, adapter: ak.Adapter) -> float:
    """What is lost in all layers, on ids that no calibration saw and in the directions that the adapter reads."""
    before, after = numbers(base), numbers(out)
    changes = {name: delta.numpy() for name, delta in deltas(adapter).items()}
    exact = before | {name: before[name] + delta for name, delta in changes.items()}
    ids = torch.randint(96, (8, 48), generator=torch.Generator().manual_seed(99))
    found = 0.0
    for name, X in read_by(plain, exact, ids).items():
        error = after[f"{name}.weight"] - exact[f"{name}.weight"]
        V = np.linalg.svd(changes[f"{name}.weight"], full_matrices=False)[2][:4]
        found += np.linalg.norm(X @ error.T) ** 2 / len(X) + 10 * np.mean(X**2) * np.linalg.norm(V @ error.T) ** 2
    return float(found)


def test_the_file_holds_what_layers_of_the_exact_merge_read(
    world: tuple[Path, Path, ak.Adapter], tmp_path: Path
) -> None:
    plain, packed, adapter = world
    made = calibrate(packed, adapter, tmp_path / "acts.safetensors", texts=3, length=20, seed=5)
    before = numbers(packed)
    exact = before | {name: before[name] + delta.numpy() for name, delta in deltas(adapter).items()}
    from random import Random

    drawn = Random(5)  # The folder has no tokenizer: ids are drawn.
    ids = torch.tensor([[drawn.randrange(96) for _ in range(20)] for _ in range(3)])
    wanted = read_by(plain, exact, ids)
    stored = load_file(tmp_path / "acts.safetensors")
    assert set(made.shared) == set(wanted)
    assert len(stored) == 8, "queries, keys and values read the same, so do gate and up"
    for name, X in wanted.items():
        np.testing.assert_allclose(stored[made.shared[name]], X, rtol=1e-4, atol=1e-5)


def test_less_is_lost_on_other_inputs_and_verify_finds_the_same(
    world: tuple[Path, Path, ak.Adapter], tmp_path: Path
) -> None:
    plain, packed, adapter = world
    file = tmp_path / "acts.safetensors"
    calibrate(packed, adapter, file)
    left = {}
    for name, options in {"nearest": {}, "calibrated": {"keep": "adapter", "calibration": file}}.items():
        report = ak.merge(packed, adapter, tmp_path / name, quantized="requantize", **options)
        assert not any("no activations" in each for each in report.plan.warnings)
        left[name] = lost(plain, packed, tmp_path / name, adapter)
    assert left["calibrated"] < left["nearest"], left
    assert ak.verify(tmp_path / "calibrated", packed, adapter, calibration=file).ok
    changed = tmp_path / "calibrated" / "model.safetensors"
    data = bytearray(changed.read_bytes())
    data[-100] ^= 1
    changed.write_bytes(data)
    assert not ak.verify(tmp_path / "calibrated", packed, adapter, calibration=file).ok


def test_a_gguf_model_is_rounded_by_the_folder_it_was_made_from(
    world: tuple[Path, Path, ak.Adapter], tmp_path: Path
) -> None:
    plain, _, adapter = world
    adapter = only(adapter, lambda path: path.endswith("o_proj"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    for name, W in load_file(plain / "model.safetensors").items():
        kind = gguf.GGMLQuantizationType.Q4_0 if name.endswith("o_proj.weight") else gguf.GGMLQuantizationType.F32
        own = names.get_name(name, (".weight",))
        assert own is not None
        writer.add_tensor(own, gguf.quants.quantize(np.ascontiguousarray(W), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "acts.safetensors"
    with pytest.raises(Unsupported, match=r"no config\.json") as refused:
        calibrate(tmp_path / "base.gguf", adapter, file)
    assert "--calibration FILE.safetensors (calibration=)" in str(refused.value.cure)
    made = calibrate(plain, adapter, file)
    left = {}
    for name, options in {"nearest": {}, "calibrated": {"keep": "adapter", "calibration": file}}.items():
        out = tmp_path / f"{name}.gguf"
        ak.merge(tmp_path / "base.gguf", adapter, out, quantized="requantize", **options)
        errors = []
        for at in range(2):
            path = f"model.layers.{at}.self_attn.o_proj"
            exact = numbers(tmp_path / "base.gguf")[f"{path}.weight"] + deltas(adapter)[f"{path}.weight"].numpy()
            X, V = made.inputs(path), np.linalg.svd(deltas(adapter)[f"{path}.weight"].numpy())[2][:4]
            assert X is not None
            error = numbers(out)[f"{path}.weight"] - exact
            errors.append(np.linalg.norm(X @ error.T) ** 2 / len(X))
            errors.append(10 * np.mean(X**2) * np.linalg.norm(V @ error.T) ** 2)
        left[name] = sum(errors)
    assert left["calibrated"] < left["nearest"], left


def test_the_command_reads_texts_once_and_goes_on(world: tuple[Path, Path, ak.Adapter], tmp_path: Path) -> None:
    _, packed, adapter = world
    ak.write(adapter, tmp_path / "lora", format="peft")
    words = ("merge", packed, tmp_path / "lora", "-o", tmp_path / "out", "--quantized", "requantize")
    # The folder has no tokenizer, so that texts are refused and ids are drawn for the built-in ones.
    (tmp_path / "texts.txt").write_text("a text\n")
    refused = run(*words, "--keep", "adapter", "--calibration", tmp_path / "texts.txt")
    assert (refused.exit_code, "no tokenizer" in refused.output) == (2, True)
    assert "pass builtin to --calibration" in refused.output
    alone = run(*words, "--calibration", "builtin")
    assert (alone.exit_code, "--keep adapter" in alone.output) == (2, True)
    said = run(*words, "--keep", "adapter", "--calibration", "builtin", "--verify", "--json")
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    file = tmp_path / "out.calibration.safetensors"
    assert told["calibration"] == str(file)
    assert told["verification"]["ok"]
    stamp = file.stat().st_mtime_ns
    again = run(*words, "--keep", "adapter", "--calibration", "builtin", "--json")
    assert json.loads(again.stdout)["already_done"]
    assert file.stat().st_mtime_ns == stamp
    checked = ("verify", tmp_path / "out", "--base", packed, "--adapter", tmp_path / "lora")
    assert run(*checked, "--calibration", file).exit_code == 0
    without = run(*checked)
    assert (without.exit_code, "--calibration FILE.safetensors" in without.output) == (2, True)
    planned = run(*words, "--keep", "adapter", "--calibration", file, "--plan", "--json")
    assert json.loads(planned.stdout)["quantized"]["calibration"] == told["quantized"]["calibration"]


def test_targets_that_the_base_lacks_are_left_out_of_the_run_too(
    world: tuple[Path, Path, ak.Adapter], tmp_path: Path
) -> None:
    _, packed, adapter = world
    (target, updates), *_ = adapter.updates.items()
    more = ak.Adapter({**adapter.updates, ak.Target(target.path.replace("layers.0", "layers.9")): updates})
    ak.write(more, tmp_path / "lora", format="peft")
    words = ("merge", packed, tmp_path / "lora", "-o", tmp_path / "out", "--quantized", "requantize")
    words += ("--keep", "adapter", "--calibration", "builtin")
    refused = run(*words)
    assert (refused.exit_code, "--allow-partial" in refused.output) == (2, True)
    said = run(*words, "--allow-partial", "--verify", "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["verification"]["ok"]
    # The same activations as of the adapter without this target.
    calibrate(packed, adapter, tmp_path / "whole.safetensors")
    partial, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("out.calibration", "whole"))
    assert all((partial[name] == each).all() for name, each in whole.items())


def test_random_ids_are_told_and_a_plan_asks_for_no_texts_that_were_given(
    world: tuple[Path, Path, ak.Adapter], tmp_path: Path
) -> None:
    plain, packed, adapter = world
    ak.write(adapter, tmp_path / "lora", format="peft")
    words = (
        "merge",
        packed,
        tmp_path / "lora",
        "-o",
        tmp_path / "out",
        "--quantized",
        "requantize",
        "--keep",
        "adapter",
    )
    said = json.loads(run(*words, "--calibration", "builtin", "--json").stdout)
    assert any("random token ids" in each for each in said["warnings"])
    planned = json.loads(run(*words, "--calibration", "builtin", "--plan", "--json").stdout)
    assert not any("--calibration builtin" in each for each in planned["warnings"])
    missing = run(*words, "--calibration", tmp_path / "none.txt", "--plan")
    assert (missing.exit_code, "none.txt" in missing.output) == (6, True)
    # Nothing rounds a plain base: this is found before the model runs.
    refused = run("merge", plain, tmp_path / "lora", "-o", tmp_path / "b", *words[5:], "--calibration", "builtin")
    assert (refused.exit_code, (tmp_path / "b.calibration.safetensors").exists()) == (2, False)


def damaged(file: Path, change: Callable[[Arrays, dict[str, Any]], object]) -> Path:
    """A calibration with other tensors, or another record."""
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        record = json.loads(opened.metadata()["adapterkit_calibration"])
    tensors = load_file(file)
    change(tensors, record)
    out = file.with_name("damaged.safetensors")
    save_file(tensors, out, {"adapterkit_calibration": json.dumps(record)})
    return out


def test_what_does_not_fit_is_refused_by_name(world: tuple[Path, Path, ak.Adapter], tmp_path: Path) -> None:
    plain, packed, adapter = world
    file = tmp_path / "acts.safetensors"
    half = only(adapter, lambda path: ".0." in path)
    calibrate(packed, half, file, texts=2, length=8)

    def merged(calibration: object, keep: str | None = "adapter", name: str = "out", base: Path = packed) -> ak.Report:
        options: dict[str, Any] = {"quantized": "requantize", "keep": keep, "calibration": calibration}
        return ak.merge(base, adapter, tmp_path / name, **options)

    assert any("--calibration builtin" in each for each in merged(None, name="alone").plan.warnings)
    report = merged(file)
    assert any("7 of 14 targets" in each for each in report.plan.warnings), report.plan.warnings
    calibrate(packed, half, tmp_path / "other.safetensors", texts=2, length=9)
    with pytest.raises(UsageError, match="another calibration"):
        ak.verify(tmp_path / "out", packed, adapter, calibration=tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="none is given"):
        ak.verify(tmp_path / "out", packed, adapter)
    with pytest.raises(UsageError, match="keep='adapter'"):
        merged(file, keep=None, name="b")
    with pytest.raises(Malformed, match="is not a calibration"):
        merged(plain / "model.safetensors", name="b")
    with pytest.raises(UsageError, match="from another base, other adapters or other texts"):
        calibrate(packed, half, file, texts=3, length=8)
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        calibrate(packed, half, tmp_path / "acts.txt")
    one = damaged(file, lambda tensors, record: record.update(shared={"x": next(iter(tensors))}))
    with pytest.raises(TargetNotFound, match="no activations for any target"):
        merged(one, name="b")
    narrow = damaged(file, lambda tensors, _: tensors.update({n: each[:, :-1].copy() for n, each in tensors.items()}))
    with pytest.raises(ShapeMismatch, match=r"\d+ inputs, but the weight has \d+"):
        merged(narrow, name="b")
    faults: list[tuple[Callable[[Arrays, dict[str, Any]], object], str]] = [
        (lambda _, record: record.update(version=2), "version 2"),
        (lambda _, record: record.pop("shared"), "cannot be read"),
        (lambda _, record: record["shared"].update(x="y"), "does not match"),
        (lambda tensors, _: tensors.update({name: each[0] for name, each in tensors.items()}), "not F32"),
        (lambda tensors, _: [each.fill(np.nan) for each in tensors.values()], "not a finite number"),
    ]
    for change, words in faults:
        with pytest.raises(Malformed, match=words):
            merged(damaged(file, change), name="b")
    assert not (tmp_path / "b").exists()


def test_no_input_and_no_change_are_harmless(world: tuple[Path, Path, ak.Adapter], tmp_path: Path) -> None:
    _, packed, adapter = world
    file = tmp_path / "acts.safetensors"
    calibrate(packed, adapter, file, texts=2, length=8)
    silent = damaged(file, lambda tensors, _: [each.fill(0) for each in tensors.values()])
    options: dict[str, Any] = {"quantized": "requantize", "keep": "adapter"}
    ak.merge(packed, adapter, tmp_path / "silent", calibration=silent, **options)
    assert all(np.isfinite(each).all() for each in numbers(tmp_path / "silent").values())
    nothing = ak.ops.scale(adapter, 0.0)
    ak.merge(packed, nothing, tmp_path / "none", calibration=file, **options)
    before, after = numbers(packed), numbers(tmp_path / "none")
    assert all((before[name] == after[name]).all() for name in before)
