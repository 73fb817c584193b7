"""What commands say while they work: steps that take long, -v, -vv; and what people type wrong at first."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import click
import pytest
from command_line import record, run, save_base, save_peft
from terminals import at_terminal

import adapterkit as ak
from adapterkit.cli import _progress
from adapterkit.cli._commands import as_flags
from adapterkit.cli._options import CliSettings
from adapterkit.errors import UsageError
from adapterkit.io.stages import detail, stage, steps


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_base(tmp_path / "base")
    save_peft(tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_short_work_is_silent_and_v_tells_each_step() -> None:
    assert run("merge", "base", "lora", "-o", "a").stderr == ""
    told = run("merge", "base", "lora", "-o", "b", "-v").stderr
    assert [line for line in told.splitlines() if "opened" not in line] == [
        "merge: planning from headers", "merge: merging into b", told.splitlines()[-1],
    ]  # fmt: skip
    assert "opened" not in told
    more = run("merge", "base", "lora", "-o", "c", "-vv").stderr
    assert "merge: opened base: 1 tensors in 1 weight files" in more
    assert "of memory" in more
    assert run("merge", "base", "lora", "-o", "d", "-q").stderr == ""
    assert logging.getLogger("adapterkit").handlers == []


def test_a_step_that_takes_long_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKIT_PATIENCE", "0.05")
    monkeypatch.setattr(_progress, "AGAIN", 60.0)
    with _progress.stage_lines(CliSettings()) as lines:
        assert lines is not None
        lines.command = "export"
        stage("tracing the model")
        detail("never shown")
        time.sleep(0.3)
        stage("checking")
    assert capsys.readouterr().err.splitlines() == ["export: tracing the model", "export: checking"]


class Kept(logging.Handler):
    """Keeps what was told."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_steps_of_known_work_are_numbered() -> None:
    logger, kept = logging.getLogger("adapterkit"), Kept()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    try:
        stage("before")
        with steps(3):
            stage("loading")
            with steps(9):  # A part of the work, which counts with it.
                stage("tracing")
            stage("tracing")
            stage("converting")
            stage("one more")
        stage("after")
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)
    assert kept.texts == [
        "before", "step 1 of 3, loading", "step 2 of 3, tracing", "step 2 of 3, tracing", "step 3 of 3, converting",
        "step 3 of 3, one more", "after",
    ]  # fmt: skip


def test_a_bar_silences_the_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKIT_PATIENCE", "0.05")
    with _progress.stage_lines(CliSettings()):
        _progress.busy.set()
        stage("merging")
        time.sleep(0.3)
        _progress.busy.clear()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("folder")
def test_arguments_in_the_other_order() -> None:
    done = run("merge", "lora", "base", "-o", "out")
    assert done.exit_code == 2
    assert "lora is an adapter, and base is not" in done.stderr
    assert "BASE comes first" in done.stderr
    with pytest.raises(UsageError, match="is an adapter"):
        ak.plan("lora", ["base"])


@pytest.mark.usefixtures("folder")
def test_a_text_file_is_no_weight_file() -> None:
    done = run("inspect", "base/config.json")
    assert (done.exit_code, "the file is text, not weights" in done.stderr) == (2, True)
    Path("pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in run("inspect", "pointer.safetensors").stderr


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["fp16", "half", "float16", "torch.float16", "F16"])
def test_one_list_of_names_of_types(name: str) -> None:
    record("resize", "lora", "--rank", 1, "--dtype", name, "-o", "small")
    assert record("inspect", "small")["totals"]["dtypes"] == {"F16": 2}  # type: ignore[index]
    record("merge", "base", "lora", "--dtype", name, "-o", "cast")


@pytest.mark.usefixtures("folder")
def test_extract_writes_what_peft_loads_unless_it_is_one_file() -> None:
    run("merge", "base", "lora", "-o", "tuned")
    assert record("extract", "tuned", "--base", "base", "--rank", 2, "-o", "folder")["to"] == "peft"
    assert Path("folder/adapter_config.json").is_file()
    assert record("extract", "tuned", "--base", "base", "--rank", 2, "-o", "a.safetensors")["to"] == "adapterkit"


@pytest.mark.parametrize(
    ("both", "flag"),
    [
        ("Pass base=/--base", "Pass --base"),
        ("Pass the base: --base BASE (base=)", "Pass the base: --base BASE"),
        ("to refuse it, pass --strict-base (strict_base=True)", "to refuse it, pass --strict-base"),
        ("on_loss='fold'/--on-loss fold", "--on-loss fold"),
        ("alpha: --alpha A (alpha=A)", "alpha: --alpha A"),
        ("Write --rename 'FROM=TO' (rename=['FROM=TO']), such as a=b", "Write --rename 'FROM=TO', such as a=b"),
        ("or pass --overwrite (in Python overwrite=True)", "or pass --overwrite"),
        ("Give one of --key PUB.pem (key=) and --trust", "Give one of --key PUB.pem and --trust"),
        ("extract m --base BASE (base=) --rank 64 (rank=) -o OUT", "extract m --base BASE --rank 64 -o OUT"),
        ("Pass --call mask=NAME (call={'mask': 'NAME'})", "Pass --call mask=NAME"),
        ("a path such as base=/models/x", "a path such as base=/models/x"),
    ],
)
def test_cures_name_the_flag_alone(both: str, flag: str) -> None:
    assert as_flags(both) == flag


@pytest.mark.parametrize("columns", [40, 80])
def test_errors_on_a_narrow_terminal_break_no_word(columns: int, folder: Path) -> None:
    name = "a-folder-with-a-rather-long-name"
    text = at_terminal(folder, "inspect", name, columns=columns)
    assert name in text
    assert all(len(line) <= columns or name in line for line in text.splitlines())
    table = at_terminal(folder, "merge", "base", "lora", "-o", "out", columns=columns)
    assert "layers.0.q.weight" in table


def test_long_help_has_headings_and_no_option_is_lost() -> None:
    from adapterkit.cli import adapterkit

    text = run("merge", "--help").stdout
    assert all(f"\n{heading}:\n" in text for heading in ("Output", "Computation", "Execution", "Messages"))
    for name in adapterkit.list_commands(click.Context(adapterkit)):
        command = adapterkit.get_command(click.Context(adapterkit), name)
        shown = run(name, "--help").stdout
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                assert all(word in shown for word in param.opts), (name, param.opts)
