"""Defaults of options: environment, project's file, user's file; in this order, and never for where is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import record, run, save_base, save_peft

CONFIG = "ADAPTERKIT_CONFIG"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_base(tmp_path / "base")
    save_peft(tmp_path / "lora")
    work = tmp_path / "project" / "deep"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    for name in (CONFIG, "ADAPTERKIT_DTYPE", "ADAPTERKIT_MERGE_DTYPE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def dtype(here: Path, *words: str) -> str:
    """The type of the weights that a merge plans, as its sizes tell it."""
    plan = record("merge", here / "base", here / "lora", "--plan", *words)
    return {64: "F16", 128: "F32", 256: "F64"}[plan["files"][0]["computed_bytes"]]  # type: ignore[index]


def test_each_source_decides_before_the_next(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dtype(here) == "F32"
    own = here / "home" / "adapterkit" / "config.toml"
    own.parent.mkdir(parents=True)
    own.write_text('dtype = "fp16"\n')
    assert dtype(here) == "F16"
    (here / "project" / "pyproject.toml").write_text('[tool.adapterkit]\ndtype = "F64"\n')
    assert dtype(here) == "F64"
    (here / "project" / "pyproject.toml").write_text(
        '[tool.adapterkit]\ndtype = "F64"\n[tool.adapterkit.merge]\ndtype = "half"\n'
    )
    assert dtype(here) == "F16"
    monkeypatch.setenv("ADAPTERKIT_DTYPE", "double")
    assert dtype(here) == "F64"
    monkeypatch.setenv("ADAPTERKIT_MERGE_DTYPE", "bf16")
    assert dtype(here) == "F16"
    assert dtype(here, "--dtype", "F64") == "F64"
    monkeypatch.delenv("ADAPTERKIT_DTYPE")
    monkeypatch.delenv("ADAPTERKIT_MERGE_DTYPE")
    monkeypatch.setenv(CONFIG, "")
    assert dtype(here) == "F32"
    (here / "other.toml").write_text('[merge]\ndtype = "F64"\n')
    monkeypatch.setenv(CONFIG, str(here / "other.toml"))
    assert dtype(here) == "F64"


def test_an_option_that_may_be_repeated_takes_a_list(here: Path) -> None:
    Path("adapterkit.toml").write_text("[merge]\nweight = [0.5]\n")
    plan = record("merge", here / "base", here / "lora", "--plan")
    assert plan["adapters"][0]["weight"] == 0.5  # type: ignore[index]


@pytest.mark.parametrize("key", ["out", "overwrite", "address", "engine"])
def test_where_is_written_and_where_it_runs_is_typed(here: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a folder that somebody downloaded must not decide it."""
    Path("adapterkit.toml").write_text(f'[merge]\n{key} = "true"\n')
    refused = run("merge", here / "base", here / "lora", "-o", here / "out")
    assert refused.exit_code == 2
    assert "Type it on the command line" in refused.stderr
    Path("adapterkit.toml").write_text(f'{key} = "ray"\n')
    monkeypatch.setenv(f"ADAPTERKIT_{key.upper()}", "ray")
    assert run("merge", here / "base", here / "lora", "-o", here / "out").exit_code == 0
    assert not (here / "ray").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dtype = ", "not valid TOML"),
        ("[merge]\ndtipe = 'F16'\n", "Nearest: dtype"),
        ("merge = 3\n", "not a table"),
        ("[merge]\ndtype = ['F16']\n", "does not fit --dtype"),
        ("[merge]\ndtype = 'F99'\n", "F99"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_key(here: Path, text: str, said: str) -> None:
    Path("adapterkit.toml").write_text(text)
    refused = run("merge", here / "base", here / "lora", "--plan")
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert "adapterkit.toml" in refused.stderr or said == "F99"


@pytest.mark.usefixtures("here")
def test_doctor_shows_what_is_set_and_what_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("adapterkit.toml").write_text('device = "cpu"\nbogus = 1\n')
    monkeypatch.setenv("ADAPTERKIT_MERGE_SHARD_SIZE", "5GB")
    monkeypatch.setenv("ADAPTERKIT_OUTT", "x")
    done = run("doctor", "--json")
    checks = json.loads(done.stdout)["checks"]
    said = {check["name"]: check["found"] for check in checks}
    assert said["merge --shard-size"] == "5GB, by ADAPTERKIT_MERGE_SHARD_SIZE"
    assert said["--device"].startswith("cpu, by ")
    unread = [check["found"] for check in checks if check["name"] == "defaults" and check["status"] == "warn"]
    assert any("ADAPTERKIT_OUTT" in found for found in unread)
    assert any("bogus" in found for found in unread)
    Path("adapterkit.toml").write_text("device = ")
    assert run("doctor").exit_code == 3


def test_a_large_file_and_a_missing_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG, str(here / "none.toml"))
    assert run("merge", here / "base", here / "lora", "--plan").exit_code == 6
    (here / "large.toml").write_text("#" * (1 << 21))
    monkeypatch.setenv(CONFIG, str(here / "large.toml"))
    assert run("merge", here / "base", here / "lora", "--plan").exit_code == 2
