"""merge and verify from the command line, against merges computed with numpy in whole numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run
from safetensors.numpy import load_file, save_file

SHAPES = {"layers.0.q.weight": (8, 4), "layers.1.q.weight": (8, 4), "norm.weight": (4,)}


def whole(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers: products and sums of them are exact in every precision."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(
        {name: whole(1, *shape) for name, shape in SHAPES.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for name, seed in (("one", 10), ("two", 20))]


def write_adapter(folder: Path, seed: int) -> Path:
    """A LoRA of scaling 2 on both layers, as PEFT writes it."""
    folder.mkdir()
    key = "base_model.model.layers.{}.q.lora_{}.weight"
    tensors = {key.format(i, "A"): whole(seed + i, 2, 4) for i in (0, 1)}
    tensors |= {key.format(i, "B"): whole(seed + 5 + i, 8, 2) for i in (0, 1)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expected(base: Path, *weighted: tuple[Path, float]) -> dict[str, np.ndarray]:
    merged = load_file(base / "model.safetensors")
    for folder, weight in weighted:
        factors = load_file(folder / "adapter_model.safetensors")
        for layer in (0, 1):
            A, B = (factors[f"base_model.model.layers.{layer}.q.lora_{side}.weight"] for side in "AB")
            merged[f"layers.{layer}.q.weight"] = merged[f"layers.{layer}.q.weight"] + np.float32(weight * 2) * (B @ A)
    return merged


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_merge_one(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    found = record("merge", base, adapters[0], "-o", tmp_path / "out")
    assert (found["out"], found["targets"], found["resumed"]) == (str(tmp_path / "out"), 2, [])
    assert [entry["weight"] for entry in found["adapters"]] == [1.0]
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected(base, (adapters[0], 1.0)))


def test_merge_several_with_weights_and_verify(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    words = ["merge", base, *adapters, "-o", tmp_path / "out", "--weight", "0.5", "--weight", "-1", "--device", "cpu"]
    found = record(*words, "--verify")
    assert (found["verification"]["ok"], found["verification"]["tensors"]) == (True, 3)
    weighted = zip(adapters, (0.5, -1.0), strict=True)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected(base, *weighted))


def test_merge_casts_and_shards(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    words = ["merge", base, adapters[0], "-o", tmp_path / "out", "--dtype", "float16", "--shard-size", "100B"]
    found = record(*words)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(found["files"]) == files
    assert len(files) == 2
    merged = {name: value for file in files for name, value in load_file(tmp_path / "out" / file).items()}
    exact = {name: value.astype(np.float16) for name, value in expected(base, (adapters[0], 1.0)).items()}
    assert same(merged, exact)


def test_merge_for_people(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    result = run("merge", base, adapters[0], "-o", tmp_path / "out", "--verify")
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: 2 targets merged, 1 file of ")
    assert lines[2].split()[:3] == ["one", "1", "2"]
    change = expected(base, (adapters[0], 1.0))["layers.0.q.weight"] - expected(base)["layers.0.q.weight"]
    assert f"{np.linalg.norm(change):.4g} (layers.0.q.weight)" in lines[3]
    assert lines[-1] == "verified: 3 tensors checked, all equal bit by bit"


def test_a_plan_writes_nothing(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = record("merge", base, *adapters, "--plan")
    assert (found["targets"], [file["name"] for file in found["files"]]) == (2, ["model.safetensors"])
    touched = 2 * 8 * 4 * 4
    assert found["files"][0]["computed_bytes"] == touched
    assert found["files"][0]["copied_bytes"] == (base / "model.safetensors").stat().st_size - touched
    text = run("merge", base, *adapters, "-o", tmp_path / "out", "--plan").stdout
    assert "2 targets" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_partial_match_is_an_error_unless_allowed(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["layers.1.q.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    words = ["merge", base, adapters[0], "-o", tmp_path / "out"]
    assert run(*words).exit_code == 2
    assert not (tmp_path / "out").exists()
    result = run(*words, "--allow-partial", "--verify")
    assert result.exit_code == 0
    assert "warning: one: skipped these targets, which the base does not have: layers.1.q" in result.stdout.splitlines()
    verify = ["verify", tmp_path / "out", "--base", base, "--adapter", adapters[0]]
    assert (run(*verify).exit_code, run(*verify, "--allow-partial").exit_code) == (2, 0)


@pytest.fixture
def merged(base: Path, adapters: list[Path], tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    save_file(expected(base, (adapters[0], 1.0), (adapters[1], 0.5)), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_verify_what_numpy_merged(base: Path, adapters: list[Path], merged: Path) -> None:
    one, two = adapters
    weights = ["--weight", "1", "--weight", "0.5"]
    found = record("verify", merged, "--base", base, "--adapter", one, "--adapter", two, *weights)
    assert (found["ok"], found["tensors"], found["differences"]) == (True, 3, [])
    assert record("verify", merged, "--base", base, *weights, "--adapter", one, two)["ok"]


def test_verify_finds_one_wrong_element(base: Path, adapters: list[Path], merged: Path) -> None:
    tensors = load_file(merged / "model.safetensors")
    tensors["layers.1.q.weight"][5, 2] += 0.25
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    words = ["verify", merged, "--base", base, "--adapter", *adapters, "--weight", "1", "--weight", "0.5"]
    found = record(*words, code=1)
    assert [(d["tensor"], d["elements"], d["largest"]) for d in found["differences"]] == [
        ("layers.1.q.weight", 1, 0.25)
    ]
    result = run(*words)
    assert result.exit_code == 1
    assert result.stdout.startswith("not verified: 1 of 3 tensors differ\n")


def test_merge_exits_with_1_when_its_own_verification_fails(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.merging import verification

    failed = verification.Verification(1, 1, (verification.TensorDifference("w", "it differs from the merge", 1, 0.5),))
    monkeypatch.setattr("adapterkit.merging.verify", lambda *_, **__: failed)
    found = record("merge", base, adapters[0], "-o", tmp_path / "out", "--verify", code=1)
    assert found["verification"]["differences"][0]["tensor"] == "w"


@pytest.mark.parametrize("in_a_c_function", [False, True])
def test_an_interrupted_merge_says_how_to_go_on(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_c_function: bool
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        if in_a_c_function:
            try:
                raise SystemError("seekable returned a result with an exception set") from KeyboardInterrupt()
            except SystemError as error:
                raise SystemError("memoryview returned a result with an exception set") from error
        raise KeyboardInterrupt

    words = ["merge", base, adapters[0], "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("adapterkit.merging.execute.execute", interrupted)
        result = run(*words)
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted. Run the same command again; merge and pull resume where they stopped."
    assert not (tmp_path / "out").exists()
    assert run(*words).exit_code == 0
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected(base, (adapters[0], 1.0)))
