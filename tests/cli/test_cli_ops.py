"""resize, extract and diff from the command line, against dense matrices of numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.io.lazy import from_numpy


def write_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA of scaling 2 on two layers, as PEFT writes it."""
    folder.mkdir()
    rng, key = np.random.default_rng(seed), "base_model.model.layers.{}.q.lora_{}.weight"
    shapes = {"A": (rank, 6), "B": (8, rank)}
    tensors = {key.format(i, s): rng.normal(size=shapes[s]).astype(np.float32) for i in (0, 1) for s in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def changes(folder: Path) -> list[np.ndarray]:
    """The dense change of each layer in float64, of a PEFT folder."""
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    key = "base_model.model.layers.{}.q.lora_{}.weight"
    factors = [[tensors[key.format(i, side)].astype(float) for side in "BA"] for i in (0, 1)]
    return [config["lora_alpha"] / config["r"] * B @ A for B, A in factors]


def best(D: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(D)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "a", 0)


def test_resize_writes_the_format_that_it_read(adapter: Path, tmp_path: Path) -> None:
    found = record("resize", adapter, "--rank", 2, "-o", tmp_path / "small")
    assert (found["from"], found["to"], found["targets"], found["losses"]) == ("peft", "peft", 2, [])
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == 2
    squares = [0.0, 0.0]
    for cut, was, now in zip(found["cuts"], changes(adapter), changes(tmp_path / "small"), strict=True):
        np.testing.assert_allclose(now, best(was, 2), atol=1e-5)
        assert (cut["before"], cut["rank"]) == (4, 2)
        assert cut["relative_error"] == pytest.approx(
            np.linalg.norm(was - best(was, 2)) / np.linalg.norm(was), rel=1e-4
        )
        squares = [squares[0] + np.linalg.norm(was - now) ** 2, squares[1] + np.linalg.norm(was) ** 2]
    assert found["relative_error"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)


def test_resize_for_people(adapter: Path, tmp_path: Path) -> None:
    words = ["--energy", "0.9", "--scope", "all", "--dtype", "BF16", "--to", "adapterkit"]
    result = run("resize", adapter, "-o", tmp_path / "small.safetensors", *words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["target", "method", "rank", "before", "rank", "norm", "relative", "error"]
    assert lines[-2] == f"{tmp_path / 'small.safetensors'}: adapterkit, 2 updates at 2 targets"
    assert lines[-1].startswith("relative error over all targets: 0.")
    leaves = [leaf for _, update in ak.read(tmp_path / "small.safetensors") for leaf in update.tensors.values()]
    assert {leaf.dtype.name for leaf in leaves} == {"BF16"}


def test_resize_promotes_other_methods(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    D = rng.normal(size=(8, 6))
    adapter = ak.Adapter({ak.Target("q"): (ak.METHODS["dense"](D=from_numpy(D)),)})
    ak.write(adapter, tmp_path / "dense.safetensors")
    refused = run("resize", tmp_path / "dense.safetensors", "--rank", 2, "-o", tmp_path / "no.safetensors")
    assert (refused.exit_code, (tmp_path / "no.safetensors").exists()) == (2, False)
    words = ["--rank", 2, "--promote", "--to", "peft", "-o", tmp_path / "lora"]
    assert record("resize", tmp_path / "dense.safetensors", *words)["cuts"][0]["rank"] == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--rank", "9"], 2), ([], 2), (["--rank", "2", "--energy", "0.5"], 2), (["--rank", "2", "--dtype", "int8"], 3),
        (["--rank", "two"], 2),
    ],
)  # fmt: skip
def test_bad_requests_write_nothing(words: list[str], code: int, adapter: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("resize", adapter, "-o", tmp_path / "out", *words).exit_code == code
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_over_by_accident(adapter: Path, tmp_path: Path) -> None:
    assert run("resize", adapter, "--rank", 2, "-o", adapter).exit_code == 2
    other = write_adapter(tmp_path / "b", 1)
    assert run("resize", adapter, "--rank", 2, "-o", other).exit_code == 6
    assert run("resize", adapter, "--rank", 2, "-o", other, "--overwrite").exit_code == 0


def test_a_factor_that_is_not_finite_is_refused(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.layers.1.q.lora_B.weight"][2, 1] = np.inf
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    result = run("resize", adapter, "--rank", 2, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["where"] == "layers.1.q: lora.B"
    assert not (tmp_path / "out").exists()


def save_model(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def test_extract_gives_what_peft_can_load_and_merging_gives_the_tuned_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"layers.0.q.weight": (8, 6), "layers.0.norm.weight": (6,), "layers.1.q.weight": (8, 6)}
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tuned = {name: value + rng.normal(size=value.shape).astype(np.float32) for name, value in base.items()}
    folders = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)
    found = record("extract", folders[0], "--base", folders[1], "--rank", 6, "--to", "peft", "-o", tmp_path / "a")
    assert (found["to"], found["targets"]) == ("peft", 3)
    assert {cut["target"]: cut["method"] for cut in found["cuts"]} == {
        "layers.0.q": "lora", "layers.0.norm": "replacement", "layers.1.q": "lora",
    }  # fmt: skip
    record("merge", folders[1], tmp_path / "a", "-o", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all((merged[name] == tuned[name]).all() for name in tuned)
    result = run("extract", folders[0], "--base", folders[1], "--error", "0.5", "-o", tmp_path / "b.safetensors")
    assert result.exit_code == 0, result.output
    assert "relative error over all targets: 0." in result.stdout
    assert run("extract", folders[1], "--base", folders[1], "--rank", 2, "-o", tmp_path / "no").exit_code == 2


def test_diff_says_whether_two_files_are_the_same_function(adapter: Path, tmp_path: Path) -> None:
    record("convert", adapter, tmp_path / "same.safetensors", "--to", "adapterkit")
    found = record("diff", adapter, tmp_path / "same.safetensors")
    assert (found["equal"], found["relative_error"]) == (True, 0)
    assert [target["bits"] for target in found["targets"]] == [True, True]
    other = write_adapter(tmp_path / "b", 1, rank=2)
    found = record("diff", adapter, other, "--no-signs", code=1)
    (x, _), (y, _) = changes(adapter), changes(other)
    assert found["targets"][0]["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert found["targets"][0]["sign_conflict"] is None
    result = run("diff", adapter, other)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-3].startswith("not the same change: 0 of 2 targets equal, 0 bit by bit")
    errors = {each["target"]: each["relative_error"] for each in found["targets"]}
    most = max(errors, key=errors.__getitem__)
    assert result.stdout.splitlines()[-1] == f"largest difference: {most}, relative error {errors[most]:.4g}"
    assert run("diff", adapter, other, "--tolerance", 10).exit_code == 0


def test_diff_says_when_only_a_base_could_tell(tmp_path: Path) -> None:
    for name, value in (("one", 2.0), ("two", 3.0)):
        l = from_numpy(np.full(8, value))  # noqa: E741 - the paper's name
        ak.write(ak.Adapter({ak.Target("layers.0.q"): (ak.METHODS["ia3"](l=l),)}), tmp_path / f"{name}.safetensors")
    words = ["diff", tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    assert record(*words, code=3)["equal"] is None
    base = save_model(tmp_path / "base", {"layers.0.q.weight": np.ones((8, 6), np.float32)})
    assert record(*words, "--base", base, code=1)["relative_error"] == pytest.approx(0.5)


def test_diff_of_many_targets_has_a_row_a_module_in_natural_order(tmp_path: Path) -> None:
    rng, layers = np.random.default_rng(5), 13
    key = "base_model.model.layers.{}.{}_proj.lora_{}.weight"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shapes = {"A": (2, 6), "B": (8, 2)}
        tensors = {
            key.format(i, m, s): rng.normal(size=shapes[s]).astype("f4")
            for i in range(layers) for m in "vq" for s in "AB"
        }  # fmt: skip
        save_file(tensors, tmp_path / name / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    shown = run("diff", tmp_path / "one", tmp_path / "two").stdout.splitlines()
    assert [line.split()[0] for line in shown[1:3]] == ["q_proj", "v_proj"]
    for line in shown[1:3]:
        module, targets, equal, largest, layer = line.split()[:5]
        assert (targets, equal) == ("13", "0")
        errors = []
        for i in range(layers):
            D, E = (
                x[key.format(i, module[0], "B")].astype(float) @ x[key.format(i, module[0], "A")] for x in (one, two)
            )
            errors.append(np.linalg.norm(D - E) / max(np.linalg.norm(D), np.linalg.norm(E)))
        assert float(largest) == pytest.approx(max(errors), rel=1e-3)
        assert int(layer) == int(np.argmax(errors))
    every = run("diff", tmp_path / "one", tmp_path / "two", "--all").stdout.splitlines()
    assert [line.split()[0] for line in every[1:27]] == [f"layers.{i}.{m}_proj" for i in range(layers) for m in "qv"]
