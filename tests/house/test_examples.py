"""The examples and the notebooks run as they stand, in a folder with a base and two adapters."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from command_line import record, run

import adapterkit as ak

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.yml"))
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = Path(ak.__file__).parent / "demo" / "data"
    for there, name in (("base", "base"), ("rotated", "lora"), ("negative", "other")):
        shutil.copytree(data / there, tmp_path / name)
    for path in EXAMPLES.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_makes_something_else_than_its_inputs(name: str) -> None:
    base = [] if "base_model" in Path(name).read_text() else ["--base", "base"]
    made = record("combine", name, "-o", "out", *base)
    assert made["targets"] == 13
    for source in ("lora", "other"):
        assert record("diff", "out", source, "--base", "base", code=1)["equal"] is False


@pytest.mark.usefixtures("here")
def test_the_recipe_of_a_peer_is_merged_in_one_command() -> None:
    record("merge", "--recipe", "mergekit.yml", "-o", "merged")
    record("combine", "mergekit.yml", "-o", "made.safetensors", "--to", "adapterkit")
    assert record("verify", "merged", "--base", "base", "--adapter", "made.safetensors")["ok"] is True


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str) -> None:
    lines = [line for line in Path(name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "adapterkit"
        done = run(*words[1:])
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.usefixtures("here")
def test_the_training_script_runs() -> None:
    exec(compile(Path("train.py").read_text(), "train.py", "exec"), {"__name__": "__main__"})


@pytest.mark.usefixtures("here")
def test_the_defaults_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("defaults.toml", "adapterkit.toml")
    monkeypatch.delenv("ADAPTERKIT_CONFIG", raising=False)
    checks = json.loads(run("doctor", "--json").stdout)["checks"]
    told = {check["name"]: check["found"] for check in checks if "adapterkit.toml" in check["found"]}
    assert {"--device", "merge --strict-base", "merge --checksums", "convert --on-loss"} <= told.keys()
    assert not [check for check in checks if check["name"] == "defaults" and check["status"] == "warn"]


def test_every_example_is_in_the_list() -> None:
    listed = set(re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text("utf-8")))
    assert listed == {path.name for path in EXAMPLES.iterdir()} - {"README.md"}


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_tool", ROOT / "tools" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", tool().notebooks(), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_stored(path: Path) -> None:
    before = list(sys.path)
    book = tool().executed(path)
    assert sys.path == before
    stored = json.loads(path.read_text("utf-8"))
    for now, then in zip(book["cells"], stored["cells"], strict=True):
        assert now["source"] == then["source"]
        if now["cell_type"] == "code":
            # Numbers differ from one processor to another in their last digits; what is shown does not.
            assert [each["output_type"] for each in now["outputs"]] == [each["output_type"] for each in then["outputs"]]
