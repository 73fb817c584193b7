"""Errors on the command line: the words, the JSON form and the exit codes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import run, save_base, save_peft
from safetensors.numpy import save_file

from adapterkit import errors
from adapterkit.cli import _commands


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    return save_peft(tmp_path / "adapter")


WRONG = {
    "no such command": ("mrege", 2, "merge"),
    "no such option": ("inspect {peft} --nope", 2, "--nope"),
    "missing argument": ("inspect", 2, "SRC"),
    "missing option": ("verify {base} --base {base}", 2, "--adapter"),
    "missing output": ("merge {base} {peft}", 2, "--out"),
    "missing file": ("inspect {tmp}/adaptor", 6, "adapter"),
    "missing base": ("validate {peft} --base {tmp}/nowhere", 6, "nowhere"),
    "not an adapter": ("validate {base}", 2, "not an adapter"),
    "neither adapter nor base": ("inspect {tmp}/full", 2, "neither an adapter nor a base"),
    "unknown format": ("convert {peft} {tmp}/x --to pefft", 2, "peft"),
    "unknown source format": ("inspect {peft} --from nothing", 2, "Known: "),
    "unknown compat": ("inspect {peft} --compat nothing", 2, "nothing"),
    "unknown on-loss": ("convert {peft} {tmp}/x --to adapterkit --on-loss guess", 2, "promote"),
    "unknown list": ("list adapters", 2, "methods"),
    "unknown device": ("merge {base} {peft} -o {tmp}/x --device gpu", 2, "cuda:N"),
    "unknown size": ("merge {base} {peft} -o {tmp}/x --shard-size big", 2, "5GB"),
    "a size without a unit": ("merge {base} {peft} -o {tmp}/x --shard-size 5", 2, "5GB"),
    "a folder with a file's ending": ("merge {base} {peft} -o {tmp}/x.zip", 2, "Name a folder"),
    "a report that is no page": ("report {peft} -o {tmp}/x.pdf", 2, "x.html"),
    "a home of nobody": ("convert {peft} ~nobody-here/x --to adapterkit", 2, "./~nobody-here/x"),
    "an output that is missing": ("merge {base} {peft}", 2, "adapterkit merge base lora -o merged"),
    "a format that is missing": ("convert {peft} {tmp}/x", 2, "--to adapterkit"),
    "an option of other commands": ("convert {peft} -o {tmp}/x --to adapterkit", 2, "SRC DST"),
    "what to list is missing": ("list", 2, "formats, methods"),
    "an adapter for its own base": ("validate {peft} --base {peft}", 2, "is an adapter itself"),
    "a base and an adapter swapped": ("merge {peft} {base} -o {tmp}/x", 2, "Swap them"),
    "names of a base and an adapter swapped": ("names {peft} {base}", 2, "Swap them"),
    "a base to be converted": ("convert {base} {tmp}/x --to peft", 2, "adapterkit extract"),
    "a page of a hub": ("inspect https://huggingface.co/org/name/tree/main", 2, "hf://org/name"),
    "no criterion": ("resize {peft} -o {tmp}/x", 2, "--rank N"),
    "unknown dtype": ("merge {base} {peft} -o {tmp}/x --dtype F17", 2, "BF16"),
    "unknown engine": ("merge {base} {peft} -o {tmp}/x --engine cloud", 2, "local"),
    "unknown tied": ("merge {base} {peft} -o {tmp}/x --tied cut", 2, "untie"),
    "weight is no number": ("merge {base} {peft} -o {tmp}/x --weight much", 2, "much"),
    "weights and adapters": ("merge {base} {peft} -o {tmp}/x --weight 1 --weight 2", 2, "2 weights for 1 adapter"),
    "weights in verify": ("verify {base} --base {base} --adapter {peft} --weight 1 --weight 2", 2, "2 weights"),
    "convert onto itself": ("convert {peft} {peft} --to adapterkit --overwrite", 2, "the same"),
    "merge onto its base": ("merge {base} {peft} -o {base}", 2, "overlaps"),
    "convert onto a file": ("convert {peft} {tmp}/taken --to adapterkit", 6, "--overwrite"),
    "merge onto a folder": ("merge {base} {peft} -o {tmp}/full", 6, "already there"),
    "wrong base": ("validate {peft} --base {tmp}/other.safetensors", 2, "layers.9.q"),
    "a bias the base lacks": ("merge {base} {tmp}/biased -o {tmp}/x", 3, "bias"),
    "mixed adapters": ("verify {base} {peft} --base {base} --adapter {peft} --adapter {peft}", 2, "--adapter"),
}


@pytest.fixture
def wrong(base: Path, peft: Path, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    save_file({"layers.9.q.weight": np.zeros((8, 4), np.float32)}, tmp_path / "other.safetensors")
    key = "base_model.model.layers.0.q.lora_"
    factors = {f"{key}A.weight": np.ones((2, 4), np.float32), f"{key}B.weight": np.ones((8, 2), np.float32)}
    (tmp_path / "biased").mkdir()
    bias = {f"{key}B.bias": np.ones(8, np.float32)}
    save_file({**factors, **bias}, tmp_path / "biased" / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((peft / "adapter_config.json").read_text()) | {"lora_bias": True}
    (tmp_path / "biased" / "adapter_config.json").write_text(json.dumps(config))
    return {"base": base, "peft": peft, "tmp": tmp_path}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_fault_and_exit_with_its_code(case: str, wrong: dict[str, Path]) -> None:
    words, code, needle = WRONG[case]
    filled = [word.format(**wrong) for word in words.split()]
    plain, as_json = run(*filled), run(*filled, "--json")
    assert (plain.exit_code, as_json.exit_code) == (code, code), plain.output
    assert plain.stdout == ""
    assert plain.stderr.startswith("error: ")
    assert needle in plain.stderr
    assert "Traceback" not in plain.stderr
    record = json.loads(as_json.stdout)["error"]
    assert set(record) == {"code", "why", "path", "where", "cure"}
    assert record["cure"], "every error says what to do"
    assert not (wrong["tmp"] / "x").exists()
    assert (wrong["tmp"] / "taken").read_text() == "mine"


def explode(error: BaseException) -> object:
    def reading(*_: object, **__: object) -> object:
        raise error

    return reading


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


RAISED = {
    "bug": (RuntimeError("odd"), 70, "this is a bug in adapterkit"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/big"), 6, "/big: no space left on device"),
    "no memory": (MemoryError(), 6, "not enough memory"),
    "no device memory": (OutOfMemoryError("tried 2 GiB"), 6, "tried 2 GiB"),
    "an end of file": (EOFError("ran out"), 70, "EOFError: ran out (this is a bug in adapterkit)"),
    "Ctrl-C": (
        KeyboardInterrupt(),
        130,
        "Interrupted. Run the same command again; merge and pull resume where they stopped.",
    ),
    "a check": (errors.CheckFailed("differs", where="w"), 1, "w: differs"),
    "damage": (errors.Corrupt("digest", path="p"), 4, "p: digest"),
}


@pytest.mark.parametrize("case", RAISED)
def test_exceptions_become_one_line_and_an_exit_code(case: str, peft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, code, text = RAISED[case]
    monkeypatch.setattr("adapterkit.formats.detect", explode(error))
    result = run("inspect", peft, "--json")
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(result.stdout)["error"]["why"]


@pytest.mark.parametrize("how", [{"word": "--debug"}, {"env": {"ADAPTERKIT_DEBUG": "1"}}])
def test_debug_shows_the_traceback(how: dict[str, object], peft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.formats.detect", explode(RuntimeError("odd")))
    words = ["inspect", peft, *([how["word"]] if "word" in how else [])]
    assert "Traceback (most recent call last)" in run(*words, env=how.get("env")).stderr


def test_debug_is_off_when_its_variable_says_so(peft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.formats.detect", explode(RuntimeError("odd")))
    assert "Traceback" not in run("inspect", peft, env={"ADAPTERKIT_DEBUG": "0"}).stderr


@pytest.mark.parametrize("leaf", [errors.UsageError, errors.Unsupported, errors.StorageError, _commands.Bug])
def test_the_cure_stands_on_a_line_of_its_own(leaf: type[errors.AdapterkitError]) -> None:
    assert _commands.text_of(leaf("bad", path="p", where="w", cure="Do this")) == "error: p: w: bad\n  Do this"
    assert _commands.text_of(leaf("bad")) == "error: bad"


@pytest.mark.parametrize(
    "words",
    ["export {tmp}/bse -o {tmp}/x", "inject {tmp}/bse.onnx {tmp}/a -o {tmp}/x.onnx", "gate {tmp}/bse {tmp}/a"],
    ids=["export", "inject", "gate"],
)
@pytest.mark.usefixtures("base")
def test_a_path_that_is_not_there_is_told_before_torch_is_imported(words: str, tmp_path: Path) -> None:
    """Importing torch and transformers takes seconds; the nearest name is told by every command."""
    (tmp_path / "base.onnx").write_bytes(b"")
    code = (
        "import sys; from adapterkit import cli; print(cli.adapterkit(standalone_mode=False), 'torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words.format(tmp=tmp_path).split()], capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["6", "False"]
    assert f"Nearest: {tmp_path}/base" in ran.stderr


@pytest.mark.parametrize("command", ["export {base} -o {tmp}/x", "gate {base} {tmp}/none"])
@pytest.mark.parametrize("dtype", ["bf16", "BF16", "bfloat16", "torch.bfloat16"])
def test_an_element_type_has_all_its_names_in_every_command(
    command: str, dtype: str, base: Path, tmp_path: Path
) -> None:
    words = command.format(base=base, tmp=tmp_path).split()
    assert "--dtype" not in run(*words, "--dtype", dtype).stderr
    refused = run(*words, "--dtype", "F17")
    assert (refused.exit_code, "bfloat16" in refused.stderr) == (2, True)


def test_an_address_of_this_machine_is_its_path(peft: Path, tmp_path: Path) -> None:
    """`file://` is what a file manager copies; `push` to a path of this machine says what to do instead."""
    spaced = peft.rename(tmp_path / "an adapter")
    assert run("validate", f"file://{str(spaced).replace(' ', '%20')}").exit_code == 0
    refused = run("push", spaced, tmp_path / "hub")
    assert refused.exit_code == 2
    assert "copy it" in refused.stderr


@pytest.mark.parametrize(
    "words", ["inspect {}", "scan {}", "merge {base} {}", "convert {} x --to peft", "diff {} {base}"]
)
def test_an_empty_path_is_a_variable_that_is_not_set(words: str, base: Path, tmp_path: Path) -> None:
    """`Path("")` is the current folder, which nobody meant."""
    given = ["" if word == "{}" else word.format(base=base) for word in words.split()]
    refused = run(*given, *(["-o", tmp_path / "out"] if "merge" in words else []))
    assert (refused.exit_code, "the path is empty" in refused.stderr) == (2, True), refused.stderr
