"""The command line as a whole: help, laziness, errors and exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
from command_line import run, save_base, save_peft
from safetensors.numpy import save_file

from adapterkit import __version__
from adapterkit.cli import _commands, _options, adapterkit

COMMANDS = [
    "bom", "combine", "completion", "conformance", "convert", "demo", "diff", "doctor", "export", "extract", "gate",
    "help", "inject", "inspect", "list", "merge", "names", "pull", "push", "report", "resize", "scan", "search", "sign",
    "ui", "validate", "verify",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


def process(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "adapterkit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    return save_peft(tmp_path / "adapter")


def commands() -> dict[str, click.Command]:
    ctx = click.Context(adapterkit)
    return {name: adapterkit.get_command(ctx, name) for name in adapterkit.list_commands(ctx)}


def test_the_commands_are_those_of_the_contract_so_far() -> None:
    assert list(commands()) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_has_help(name: str) -> None:
    command = commands()[name]
    first, _, rest = (command.help or "").partition("\n")
    assert first.endswith(".")
    assert len(first) < 65, "does not fit beside its name in the list of commands"
    assert not rest or rest.startswith("\n"), "the first line must be a paragraph of its own"
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert {"--json", "--quiet", "--debug", "--verbose"} <= {word for option in options for word in option.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: adapterkit {name} ")


def test_help_lists_the_first_line_of_every_command() -> None:
    text = run("--help").stdout
    for name, command in commands().items():
        assert re.search(rf"^  {name}\s+{re.escape(command.help.partition(chr(10))[0])}$", text, re.MULTILINE)
    assert "130 interrupted" in text
    assert run().stdout == text


def test_version() -> None:
    assert process("--version").stdout == f"adapterkit {__version__}\n"


FOOTPRINT = """
import sys
before = set(sys.modules)
from adapterkit.cli import adapterkit
code = adapterkit.main(sys.argv[1:], standalone_mode=False)
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print("\\n" + " ".join(sorted(names - sys.stdlib_module_names)), file=sys.stderr)
sys.exit(code)
"""


def imported_by(*words: object) -> set[str]:
    """The packages, beyond the standard library, that a command imports."""
    command = [sys.executable, "-c", FOOTPRINT, *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["merge", "--help"], ["convert", "--help"]])
def test_help_imports_only_click(words: list[str]) -> None:
    assert imported_by(*words) <= {"adapterkit", "click", "colorama"}


def test_only_the_named_command_is_imported() -> None:
    code = "import sys, adapterkit.cli as c; c.adapterkit.main(['list', '--help'], standalone_mode=False)"
    tail = "; print(*(m for m in sys.modules if m.startswith('adapterkit.cli.')), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + tail],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    loaded = {name.rpartition(".")[2] for name in done.stderr.split()}
    assert {name for name in loaded if not name.startswith("_")} == {"list"}


@pytest.mark.parametrize(
    "words",
    [
        "inspect {peft}", "inspect {base}", "validate {peft} --base {base}", "names {base} {peft}", "list formats",
        "list methods", "convert {peft} {out} --to adapterkit",
    ],
)  # fmt: skip
def test_commands_that_move_no_values_import_no_framework(words: str, base: Path, peft: Path, tmp_path: Path) -> None:
    paths = {"peft": peft, "base": base, "out": tmp_path / "out.safetensors"}
    heavy = {"torch", "onnx", "onnxruntime", "onnx_ir", "huggingface_hub", "transformers", "peft", "rich", "yaml"}
    assert not imported_by(*(word.format(**paths) for word in words.split())) & heavy


def test_a_real_process_exits_with_the_codes(peft: Path, tmp_path: Path) -> None:
    good, bad = process("inspect", peft, "--json"), process("inspect", tmp_path / "none", "--json")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["kind"] == "adapter"
    assert bad.returncode == 6
    assert json.loads(bad.stdout)["error"]["code"] == "storage"
    assert process("list", "nothing").returncode == 2


def test_output_without_a_terminal_is_plain_and_whole(tmp_path: Path) -> None:
    name = "model." + "very_long_name." * 12 + "weight"
    save_file({name: np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    text = process("inspect", tmp_path, FORCE_COLOR="1", COLUMNS="40").stdout
    assert "\x1b" not in text
    assert any(line.startswith(name + "  [2,2]") for line in text.splitlines())


def test_a_closed_pipe_ends_the_command_quietly(tmp_path: Path) -> None:
    save_file({f"w{i}": np.zeros(1, np.float32) for i in range(5000)}, tmp_path / "model.safetensors")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "adapterkit", "inspect", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == _commands.CLOSED_PIPE


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("streams", "source", "code"), [(">&-", "base", 0), ("<&- 2>&-", "base", 0), ("2>&-", "nothing", 6)]
)
def test_closed_streams_do_not_change_the_exit_code(streams: str, source: str, code: int, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    command = shlex.join([sys.executable, "-m", "adapterkit", "inspect", str(tmp_path / source), "--json"])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", f"{command} {streams}"], capture_output=True, env=env, check=False)
    assert done.returncode == code
    assert done.stderr == b""
    if streams.startswith(">"):
        assert done.stdout == b""
    else:
        assert ("error" in json.loads(done.stdout)) == (code != 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("source", ["base", "nothing"])
def test_a_full_disk_behind_standard_output_is_an_error_without_a_traceback(source: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    command = [sys.executable, "-m", "adapterkit", "inspect", str(tmp_path / source), "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, check=False)
    assert done.returncode == 6
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_error_does_not_end_a_command(tmp_path: Path, unbuffered: str) -> None:
    """Also with the buffer that Python has by default, which it tries to write again at exit."""
    save_base(tmp_path / "base")
    command = [sys.executable, "-m", "adapterkit", "inspect", str(tmp_path / "base"), "--json", "-v"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, env=env, check=False)
    assert done.returncode == 0
    assert "tensors" in json.loads(done.stdout)


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    save_file({"a\x1b[31mred\r\nb": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    result = process("inspect", tmp_path)
    assert r"a\x1b[31mred\r\nb" in result.stdout
    assert "\x1b" not in result.stdout
    assert json.loads(process("inspect", tmp_path, "--json").stdout)["tensors"][0]["name"] == "a\x1b[31mred\r\nb"


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    save_file({"層": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    result = process("inspect", tmp_path, PYTHONIOENCODING="latin-1")
    assert result.returncode == 0
    assert r"\u5c64" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_drawn_table() -> None:
    import pty

    parent, child = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    # Read while it writes: a terminal holds no more than a few kilobytes.
    with subprocess.Popen([sys.executable, "-m", "adapterkit", "list", "methods"], stdout=child, env=env) as running:
        os.close(child)
        text = read_terminal(parent)
    assert running.returncode == 0
    assert "\x1b[" in text
    assert "─" in text
    assert "lora" in text


def read_terminal(parent: int) -> str:
    data = b""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            piece = os.read(parent, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        data += piece
    os.close(parent)
    return data.decode()


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], _options.CliSettings()),
        (["x", "--json"], _options.CliSettings(json=True)),
        (["--quiet", "--debug"], _options.CliSettings(quiet=True, debug=True)),
        (["x", "--", "--json"], _options.CliSettings()),
    ],
)
def test_settings(words: list[str], settings: _options.CliSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERKIT_DEBUG", raising=False)
    assert _options.CliSettings.of(words) == settings


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5 kB", 1500), ("7B", 7),
        ("7000000", 7_000_000), ("1tib", 1 << 40), ("4K", 4000), ("4Ki", 4096),
    ],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    context = click.Context(adapterkit)
    assert _options.byte_count(context, click.Option(["--size"]), text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "5 apples", "0x10", "5"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        _options.byte_count(click.Context(adapterkit), click.Option(["--size"]), text)
