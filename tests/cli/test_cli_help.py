"""Help, examples, completion, hints and narrow terminals: what people meet at a terminal."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_line import run
from terminals import ROOT, at_terminal

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.cli._commands import EXAMPLES, NEXT
from adapterkit.cli.completion import PATHS, VALUES

PARSED = ("hf://", "MODEL", ".onnx", "my_reader.py", "~", ".pem", "eval", "doctor", "demo", "adapterkit ui")
"""What the lines name that are only parsed; doctor and demo have tests of their own."""

DATA = Path(ak.__file__).parent / "demo" / "data"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for there, here in (("base", "base"), ("rotated", "lora"), ("negative", "other")):
        shutil.copytree(DATA / there, tmp_path / here)
    monkeypatch.chdir(tmp_path)
    assert run("merge", "base", "lora", "-o", "tuned").exit_code == 0
    return tmp_path


def names() -> list[str]:
    return adapterkit.list_commands(click.Context(adapterkit))


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == set(names())
    assert set(NEXT) <= set(names())
    for name, lines in EXAMPLES.items():
        text = run(name, "--help").stdout
        for line in lines:
            assert f"    {line}\n" in text, name


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", names())
def test_examples_run(name: str) -> None:
    for line in EXAMPLES[name]:
        if not any(word in line for word in PARSED):
            done = run(*shlex.split(line)[1:])
            assert done.exit_code == 0, (line, done.output)
            continue
        words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", line).partition(" > ")[0])
        assert words[:2] == ["adapterkit", name]
        command = adapterkit.get_command(click.Context(adapterkit), name)
        assert command is not None
        command.make_context(name, words[2:], parent=click.Context(adapterkit))


def test_help_of_a_command_by_name() -> None:
    assert run("help", "merge").stdout == run("merge", "--help").stdout
    assert run("help").stdout == run("--help").stdout
    refused = run("help", "merg")
    assert refused.exit_code == 2
    assert "merge" in refused.stderr
    assert run("-V").stdout == run("--version").stdout


@pytest.mark.usefixtures("folder")
def test_quiet_has_a_short_flag() -> None:
    assert run("merge", "base", "lora", "-o", "out", "-q").exit_code == 0


def completions(shell: str, line: str, folder: Path) -> list[str]:
    """What click's part of the script answers for a line."""
    words = line.split(" ")
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "_ADAPTERKIT_COMPLETE": f"{shell}_complete", "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1) if shell != "fish" else words[-1],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "adapterkit"], env=env, cwd=folder, capture_output=True, text=True, check=True
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("adapterkit mer", {"plain,merge"}),
        ("adapterkit convert lora out --to ko", {"plain,kohya"}),
        ("adapterkit combine a b --method ti", {"plain,ties"}),
        ("adapterkit merge ba", {"file,ba"}),
        ("adapterkit merge base lora -o ou", {"file,ou"}),
        ("adapterkit merge base lora --device cu", {"plain,cuda", "plain,cuda:0"}),
        ("adapterkit completion z", {"plain,zsh"}),
    ],
)
def test_shells_complete_commands_paths_and_values(line: str, expected: set[str], tmp_path: Path) -> None:
    assert expected <= set(completions("bash", line, tmp_path))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    text = run("completion", shell).stdout
    assert "_ADAPTERKIT_COMPLETE" in text
    assert run("completion", "tcsh").exit_code == 2
    if shell == "bash" and shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        asked = f"{text}\ncomplete -p adapterkit"
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        assert "_adapterkit_completion" in done.stdout


def test_completed_parameters_exist() -> None:
    known = set()
    for name in names():
        command = adapterkit.get_command(click.Context(adapterkit), name)
        assert command is not None
        known |= {param.name for param in command.params}
    assert known >= PATHS
    assert known >= set(VALUES)


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_narrow_terminals_break_no_name_and_no_number(columns: int, folder: Path) -> None:
    text = at_terminal(folder, "inspect", "lora", "--all", columns=columns)
    updates = json.loads(run("inspect", "lora", "--json").stdout)["updates"]
    left = re.search(r"hidden columns: ([\w, \n]+);", text)
    for update in updates:
        assert update["target"] in text
        told = re.search(rf"(?<![\d,]){update['parameters']:,}(?![\d,])", text)
        assert told or (left is not None and "parameters" in left[1])
    if columns >= 80:
        assert left is None or left[1] == "dtype"
        assert all(len(line) <= columns for line in text.splitlines())


def test_a_hint_of_the_next_command_at_a_terminal(folder: Path) -> None:
    text = at_terminal(folder, "merge", "base", "lora", "-o", "a folder")
    hint = next(line for line in text.splitlines() if line.startswith("next: "))
    words = shlex.split(hint.removeprefix("next: "))
    assert words == ["adapterkit", "verify", "a folder", "--base", "base", "--adapter", "lora"]
    assert run(*words[1:]).exit_code == 0
    assert "next:" not in at_terminal(folder, "merge", "base", "lora", "-o", "b", "-q")
    assert "next:" not in run("merge", "base", "lora", "-o", "c").output
