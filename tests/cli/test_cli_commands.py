"""inspect, validate, convert, list, doctor and demo: what each says, against files the safetensors library wrote."""

from __future__ import annotations

import builtins
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from command_line import record, run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.cli import doctor as _checks
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA
from adapterkit.onnx import providers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    first = {"layers.0.q.weight": np.zeros((8, 4), np.float32), "layers.1.q.weight": np.zeros((8, 4), np.float32)}
    second = {"norm.weight": np.zeros(4, np.float16)}
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(second, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    homes = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    homes |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def write_peft(folder: Path, factors: Mapping[str, np.ndarray], **config: object) -> Path:
    folder.mkdir()
    save_file(dict(factors), folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(layers: int = 2, value: float = 1.0) -> dict[str, np.ndarray]:
    key = "base_model.model.layers.{}.q.lora_{}.weight"
    shapes = {"A": (2, 4), "B": (8, 2)}
    return {
        key.format(layer, side): np.full(shape, value, np.float32)
        for layer in range(layers) for side, shape in shapes.items()
    }  # fmt: skip


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "adapter", factors(), base_model_name_or_path="org/tiny")


def test_inspect_an_adapter(peft: Path) -> None:
    found = record("inspect", peft)
    assert (found["kind"], found["format"], found["base"]["id"]) == ("adapter", "peft", "org/tiny")
    expected = {"A": {"shape": [2, 4], "dtype": "F32"}, "B": {"shape": [8, 2], "dtype": "F32"}}
    for layer, update in enumerate(found["updates"]):
        assert update["target"] == f"layers.{layer}.q"
        assert (update["method"], update["rank"], update["attributes"]["scaling"]) == ("lora", 2, 2.0)
        assert update["tensors"] == expected
        assert (update["parameters"], update["bytes"]) == (24, 96)
    totals = found["totals"]
    assert (totals["targets"], totals["parameters"], totals["bytes"]) == (2, 48, 192)
    assert (totals["methods"], totals["dtypes"]) == ({"lora": 2}, {"F32": 4})


def test_inspect_an_adapter_for_people(peft: Path) -> None:
    lines = run("inspect", peft).stdout.splitlines()
    assert lines[0].endswith("adapter in format peft, for org/tiny")
    told = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:5]}
    size = "48 parameters, 192 B, F32"
    assert told == {"method": "lora (2)", "rank": "2", "targets": "2 in 2 layers", "size": size}
    assert lines[5].split() == ["target", "method", "shapes", "rank", "scaling", "dtype", "parameters"]
    assert lines[6].split() == ["layers.0.q", "lora", "A[2,4]", "B[8,2]", "2", "2", "F32", "24"]


def many(folder: Path) -> Path:
    """30 layers of two targets; layer 7 has one of another rank, layer 29 changes three times as much."""
    update = lambda n, r: LoRA(  # noqa: E731
        A=from_numpy(np.ones((r, 4), np.float32)), B=from_numpy(np.full((8, r), n, np.float32))
    )
    updates = {
        ak.Target(f"model.layers.{n}.attn.{name}"): (update(3 if n == 29 else 1, 3 if (n, name) == (7, "q") else 2),)
        for n in range(30) for name in ("q", "v")
    }  # fmt: skip
    ak.write(ak.Adapter(updates), folder / "many.safetensors")
    return folder / "many.safetensors"


def test_inspect_tells_the_story_of_many_targets_on_one_screen(tmp_path: Path) -> None:
    lines = run("inspect", many(tmp_path)).stdout.splitlines()
    assert len(lines) <= 24
    assert " ".join(lines[3].split()) == "targets 60 in 30 layers"
    rows = {" ".join(line.split()[:3]) for line in lines}
    assert {"q 29 0-6,", "q 1 7", "v 30 0-29"} <= rows
    assert "--all" in lines[-1]


def test_inspect_all_lists_targets_in_natural_order(tmp_path: Path) -> None:
    lines = run("inspect", many(tmp_path), "--all").stdout.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("model.layers.")]
    assert named == [f"model.layers.{n}.attn.{name}" for n in range(30) for name in ("q", "v")]


def test_inspect_layers_shows_how_much_each_is_changed(tmp_path: Path) -> None:
    found = record("inspect", many(tmp_path), "--layers")["layers"]
    assert [each["layer"] for each in found] == [str(n) for n in range(30)]
    plain = np.linalg.norm(np.full((8, 4), 2.0)) * np.sqrt(2)
    assert found[0]["norm"] == pytest.approx(plain)
    assert found[29]["norm"] == pytest.approx(3 * plain)
    assert sum(each["share"] for each in found) == pytest.approx(1)
    text = run("inspect", many(tmp_path), "--layers").stdout
    assert len([line for line in text.splitlines() if line.rstrip().endswith(("q", "v"))]) == 30


def test_inspect_shows_licence_and_trigger_words(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    keys = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{end}.weight": np.ones(shape, np.float32)
            for end, shape in (("down", (2, 4)), ("up", (4, 2)))}  # fmt: skip
    save_file(keys, tmp_path / "style.safetensors", {"modelspec.trigger_phrase": "zwx style, ink"})
    found = record("inspect", tmp_path / "style.safetensors")
    assert (found["licence"], found["triggers"]) == ("apache-2.0", ["zwx style", "ink"])
    text = run("inspect", tmp_path / "style.safetensors").stdout
    assert re.search(r"^  licence +apache-2.0$", text, re.MULTILINE)
    assert re.search(r"^  trigger words +zwx style, ink$", text, re.MULTILINE)


def test_inspect_groups_the_tensors_of_a_base(tmp_path: Path) -> None:
    weights = {f"model.layers.{n}.q.weight": np.zeros((2, 2), np.float32) for n in range(30)}
    save_file(weights | {"norm.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    text = run("inspect", tmp_path / "model.safetensors").stdout
    assert re.search(r"^weight +30 +0-29 +\[2,2\] +F32 +120$|^q.weight +30 +0-29", text, re.MULTILINE)
    assert "model.layers.11.q.weight" in run("inspect", tmp_path / "model.safetensors", "--all").stdout


def test_a_tensor_that_updates_share_counts_once(tmp_path: Path) -> None:
    shared = from_numpy(np.ones((2, 4), np.float32))
    updates = {ak.Target(p): (LoRA(A=shared, B=from_numpy(np.ones((8, 2), np.float32))),) for p in ("a", "b")}
    ak.write(ak.Adapter(updates), tmp_path / "shared.safetensors")
    assert len(load_file(tmp_path / "shared.safetensors")) == 3
    assert record("inspect", tmp_path / "shared.safetensors")["totals"]["parameters"] == 2 * 4 + 2 * (8 * 2)


def test_inspect_shows_layouts_and_rows_where_there_are_any(tmp_path: Path) -> None:
    update = LoRA(A=from_numpy(np.ones((2, 4), np.float32)), B=from_numpy(np.ones((8, 2), np.float32)))
    ak.write(ak.Adapter({ak.Target("h.0.c_attn", "in out *k", (0, 8)): (update,)}), tmp_path / "a.safetensors")
    assert record("inspect", tmp_path / "a.safetensors")["updates"][0]["rows"] == [0, 8]
    text = run("inspect", tmp_path / "a.safetensors").stdout
    assert "h.0.c_attn[0:8]  in out *k  lora" in text


def test_inspect_a_base(base: Path) -> None:
    found = record("inspect", base)
    assert (found["kind"], found["model_type"], len(found["files"])) == ("base", "tiny", 2)
    assert [t["name"] for t in found["tensors"]] == ["layers.0.q.weight", "layers.1.q.weight", "norm.weight"]
    assert found["tensors"][2]["file"] == "model-00002-of-00002.safetensors"
    dtypes = {
        "F16": {"tensors": 1, "parameters": 4, "bytes": 8},
        "F32": {"tensors": 2, "parameters": 64, "bytes": 256},
    }
    assert found["totals"] == {"tensors": 3, "parameters": 68, "bytes": 264, "dtypes": dtypes}
    assert run("inspect", base).stdout.splitlines()[1] == "  3 tensors in 2 files, 68 parameters, 264 B"


def test_inspect_one_weight_file(base: Path) -> None:
    found = record("inspect", base / "model-00002-of-00002.safetensors")
    assert (found["kind"], found["totals"]["tensors"]) == ("base", 1)


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_a_reading_that_a_format_does_not_have_is_refused_with_those_that_it_has(command: str, peft: Path) -> None:
    result = run(command, peft, "--compat", "peft")
    assert result.exit_code == 2
    assert "Known: formula" in result.stderr


def test_merge_verify_and_diff_take_the_reading(tmp_path: Path) -> None:
    """An attention's output projection, which PEFT's forward adds twice, and the formula once."""
    save_file(
        {"a.in_proj_weight": np.zeros((12, 4), np.float32), "a.out_proj.weight": np.zeros((4, 4), np.float32)},
        tmp_path / "base.safetensors",
    )
    (tmp_path / "peft").mkdir()
    tensors = {
        f"base_model.model.a.{stem}lora_{name}.weight": np.ones(shape, np.float32)
        for stem, out in (("", 12), ("base_layer.out_proj.", 4))
        for name, shape in (("A", (1, 4)), ("B", (out, 1)))
    }
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    base, peft = tmp_path / "base.safetensors", tmp_path / "peft"
    for reading, times in ((["--compat", "formula"], 1), ([], 2)):
        out = tmp_path / f"out{times}.safetensors"
        assert run("merge", base, peft, "-o", out, *reading).exit_code == 0
        assert load_file(out)["a.out_proj.weight"].max() == times
        assert run("verify", out, "--base", base, "--adapter", peft, *reading).exit_code == 0
        assert run("verify", out, "--base", base, "--adapter", peft, *(["--compat", "formula"] * (times - 1))).exit_code
        assert run("diff", peft, peft, *reading).exit_code == 0


def test_validate(peft: Path, base: Path) -> None:
    found = record("validate", peft, "--base", base)
    assert (found["ok"], found["format"], found["targets"]) == (True, "peft", 2)
    assert f"fits {base}" in run("validate", peft, "--base", base).stdout
    assert "fits" not in run("validate", peft).stdout


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_validate_reads_the_values(value: float, tmp_path: Path) -> None:
    bad = factors()
    bad["base_model.model.layers.1.q.lora_B.weight"][3, 1] = value
    found = record("validate", write_peft(tmp_path / "bad", bad), code=2)["error"]
    assert found["path"].startswith(str(tmp_path / "bad"))
    assert "layers.1.q" in found["where"]
    assert record("inspect", tmp_path / "bad")["kind"] == "adapter", "inspect reads headers only"


def test_validate_checks_the_shapes_against_the_base(tmp_path: Path, base: Path) -> None:
    wide = {name: np.ones((2, 6), np.float32) if "_A" in name else value for name, value in factors().items()}
    found = record("validate", write_peft(tmp_path / "wide", wide), "--base", base, code=2)["error"]
    assert found["code"] == "shape-mismatch"


def test_convert_there_and_back(peft: Path, tmp_path: Path) -> None:
    native, back = tmp_path / "a.safetensors", tmp_path / "back"
    found = record("convert", peft, native, "--to", "adapterkit")
    assert (found["from"], found["to"], found["updates"], found["losses"]) == ("peft", "adapterkit", 2, [])
    assert run("convert", native, back, "--to", "peft", "--from", "adapterkit").exit_code == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (peft, back))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_convert_says_what_it_did(peft: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert (
        run("convert", peft, out, "--to", "adapterkit").stdout
        == f"{out}: adapterkit, 2 updates at 2 targets from peft\n"
    )


def test_convert_writes_for_a_consumer(peft: Path, tmp_path: Path) -> None:
    assert run("convert", peft, tmp_path / "v", "--to", "peft", "--profile", "vllm").exit_code == 0
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert "." not in "".join(config["target_modules"])
    result = run("convert", peft, tmp_path / "w", "--to", "peft", "--profile", "nobody")
    assert (result.exit_code, (tmp_path / "w").exists()) == (2, False)
    profiles = sorted(path.stem for path in (Path(__file__).parents[2] / "spec" / "profiles").glob("*.toml"))
    assert f"Known: {', '.join(profiles)}" in " ".join(result.stderr.split())


def test_convert_replaces_only_when_told(peft: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    out.write_text("mine")
    assert run("convert", peft, out, "--to", "adapterkit").exit_code == 6
    assert out.read_text() == "mine"
    assert run("convert", peft, out, "--to", "adapterkit", "--overwrite").exit_code == 0
    assert ak.detect(out) == "adapterkit"


def test_convert_refuses_what_the_format_cannot_say(
    peft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ak_errors.Unrepresentable("cannot say", items=["layers.0.q: rows"], cure="Pass --on-loss drop")

    from adapterkit import errors as ak_errors

    monkeypatch.setattr("adapterkit.destination.write", refuse)
    result = run("convert", peft, tmp_path / "x", "--to", "adapterkit")
    assert result.exit_code == 3
    assert result.stderr == "error: cannot say\n  - layers.0.q: rows\n  Pass --on-loss drop\n"


def test_list_formats_and_methods() -> None:
    formats = {entry["name"]: entry for entry in record("list", "formats")["formats"]}
    assert formats.keys() == set(ak.FORMATS)
    assert "lora" in formats["peft"]["methods"]
    methods = {entry["name"]: entry for entry in record("list", "methods")["methods"]}
    assert methods.keys() == set(ak.METHODS)
    lora = methods["lora"]
    assert (lora["kind"], lora["tensors"]["A"], lora["attributes"]) == ("additive", "r in *k", {"scaling": 1.0})
    assert lora["optional"] == ["bias"]
    for what, names in (("formats", formats), ("methods", methods)):
        lines = run("list", what).stdout.splitlines()
        assert [line.split()[0] for line in lines[1:]] == sorted(names)


def test_doctor_in_a_real_process() -> None:
    command = [sys.executable, "-m", "adapterkit", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ok"] else 3)
    lines = {check["name"]: check for check in found["checks"]}
    assert lines["adapterkit"]["found"] == ak.__version__
    assert {"python", "torch", "numpy", "safetensors", "onnx", "onnxruntime", "CUDA devices", "cores", "memory"} <= {
        *lines
    }
    assert {"space here", "space for temporary files", "copy_file_range", "reflink", "direct writes"} <= {*lines}
    assert all(check["cure"] for check in lines.values() if check["status"] != "ok")


@pytest.mark.parametrize(("package", "code", "status"), [("torch", 3, "broken"), ("onnx", 0, "warn")])
def test_doctor_on_a_broken_package(package: str, code: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str) -> object:
        if name == package:
            raise OSError("libc10.so: cannot open shared object file")
        return SimpleNamespace(__version__="1", get_available_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(_checks, "import_module", importing)
    found = record("doctor", code=code)
    line = next(check for check in found["checks"] if check["name"] == package)
    assert (line["status"], found["ok"]) == (status, code == 0)
    assert "libc10.so" in line["found"]
    assert package in line["cure"]


def test_doctor_on_two_packages_that_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "_version", lambda name: "1.0" if name.startswith("onnxruntime") else None)
    monkeypatch.setattr(_checks, "import_module", lambda _: SimpleNamespace(__version__="1"))
    assert _checks.providers().status == "warn"
    assert "uninstall" in _checks.providers().cure


def test_doctor_tells_providers_that_run_from_those_that_are_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    built = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: built)
    monkeypatch.setattr(providers, "_has_driver", lambda: False)
    providers.runs_on.cache_clear()
    assert "(runs on CPU; also built for CUDA, where no session starts)" in _checks.providers().found
    providers.runs_on.cache_clear()


@pytest.mark.parametrize(("free", "status"), [(10**12, "ok"), (10**6, "warn")])
def test_doctor_on_space(free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert _checks.space("space here", tmp_path).status == status


def test_doctor_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n"}
    monkeypatch.setattr(_checks, "_text", lambda path: files.get(path, ""))
    assert _checks.memory() == _checks.Check("memory", "ok", "32.8 GB available of 65.5 GB")
    files |= {"/sys/fs/cgroup/memory.max": f"{4 * 10**9}\n", "/sys/fs/cgroup/memory.current": f"{3 * 10**9}\n"}
    assert _checks.memory().found == "1 GB available of 4 GB"
    assert _checks.memory().status == "warn"
    files.clear()
    assert _checks.memory().status == "ok"


def test_doctor_where_files_cannot_be_made(tmp_path: Path) -> None:
    kernel, shared, direct = _checks.copies(tmp_path / "nowhere")
    assert kernel.status == "warn"
    assert shared.status == direct.status == "ok"


def demo(verified: bool) -> dict[str, object]:
    row = {"task": "rotated", "method": "lora", "before": 0.25, "after": 0.975, "verified": verified, "seconds": 0.5}
    return {"images": 540, "plain": 0.97, "rows": [row]}


@pytest.mark.parametrize(("verified", "code"), [(True, 0), (False, 1)])
def test_demo_shows_its_rows(verified: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.demo.run", lambda **_: demo(verified))
    result = run("demo")
    assert result.exit_code == code
    cells = ["rotated", "lora", "25.0%", "97.5%", "yes" if verified else "no", "0.5"]
    lines = result.stdout.splitlines()
    assert lines[0].startswith("540 handwritten digits")
    assert lines[-1].split() == cells


def test_no_command_asks_anything(monkeypatch: pytest.MonkeyPatch, peft: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question"))
    assert run("convert", peft, tmp_path / "out", "--to", "adapterkit").exit_code == 0


def test_a_gguf_adapter_is_shown_without_its_base_but_not_its_values(tmp_path: Path) -> None:
    """Only the base tells in which order llama.cpp's rows of q and k are; names, shapes and loaders need no order."""
    import gguf

    file = ROOT / "spec/vectors/formats/gguf/f32/adapter.gguf"
    alone = record("inspect", file)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    ranks = {int(tensor.shape[1]) for name, tensor in tensors.items() if name.endswith("lora_a")}
    assert {update["rank"] for update in alone["updates"]} == ranks == {3}
    assert len(alone["updates"]) == len(tensors) // 2
    assert "base's heads" in alone["values"]
    assert "--base BASE" in run("inspect", file).stdout
    answers = {each["tool"]: each for each in record("list", "loaders", file)["loaders"]}
    assert answers["llama_cpp"]["loads"] == "yes"
    assert answers["peft"]["convert"] == "--to peft --base BASE"
    for words in (("inspect", file, "--layers"), ("convert", file, tmp_path / "out", "--to", "peft")):
        refused = run(*words)
        assert refused.exit_code == 2
        assert "config.json: --base BASE\n" in refused.stderr
