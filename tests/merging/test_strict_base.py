"""Every command that takes a base compares it with what the adapter names, and --strict-base refuses another one."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run, save_base, save_peft
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.errors import CheckFailed, UsageError
from adapterkit.io.checkpoint import BLOCKS, fingerprint, open_checkpoint

OPTIONS = {
    name: {option for param in command.params for option in param.opts}
    for name in adapterkit.list_commands(None)
    if (command := adapterkit.get_command(None, name)) is not None
}
WITH_BASE = {"merge", "verify", "inject", "export", "names", "gate"} | {
    n for n, known in OPTIONS.items() if "--base" in known
} - {"push"}
"""`push --base` is a name for the card: nothing is read."""

WORDS = {
    "convert": "convert {adapter} {out} --to adapterkit --base {base}",
    "resize": "resize {adapter} --rank 1 -o {out} --base {base}",
    "combine": "combine {adapter} {same} -o {out} --base {base}",
    "diff": "diff {adapter} {same} --base {base}",
    "inspect": "inspect {adapter} --base {base}",
    "names": "names {base} {adapter}",
    "merge": "merge {base} {adapter} -o {out}",
    "report": "report {adapter} --base {base}",
    "scan": "scan {adapter} --base {base} --fail-on never",
    "extract": "extract {tuned} --base {base} --rank 1 -o {out}",
}
"""Commands that run without transformers; the fingerprint, the config hash or the name of the base is another one."""


@pytest.mark.parametrize("name", sorted(WITH_BASE))
def test_a_command_with_a_base_has_the_option(name):
    assert "--strict-base" in OPTIONS[name]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    names = {"base": save_base(tmp_path / "base"), "made": save_base(tmp_path / "made"), "out": tmp_path / "out"}
    save_file({"layers.0.q.weight": np.ones((8, 4), "f4")}, names["made"] / "model.safetensors", {"format": "pt"})
    plain = save_peft(tmp_path / "plain")
    assert run("merge", names["made"], plain, "-o", tmp_path / "tuned").exit_code == 0
    for name in ("adapter", "same"):
        words = [
            "extract",
            tmp_path / "tuned",
            "--base",
            names["made"],
            "--rank",
            1,
            "-o",
            tmp_path / f"{name}.safetensors",
        ]
        assert run(*words).exit_code == 0
        names[name] = tmp_path / f"{name}.safetensors"
    return names | {"tuned": tmp_path / "tuned"}


@pytest.mark.parametrize("name", WORDS)
def test_another_base_is_a_warning_or_refused(name, places):
    words = WORDS[name].format(**places).split()
    refused = run(*words, "--strict-base")
    assert refused.exit_code == 1, refused.output
    assert "fingerprint" in refused.stderr
    assert "--strict-base" in refused.stderr
    assert not places["out"].exists()
    warned = record(*words)["warnings"]
    assert any("fingerprint" in each for each in warned), warned
    places["out"].unlink(missing_ok=True) if places["out"].is_file() else None
    right = WORDS[name].format(**places | {"base": places["made"], "out": f"{places['out']}-right"}).split()
    accepted = run(*right, "--strict-base")
    assert accepted.exit_code == 0, accepted.output


def test_without_a_base_there_is_nothing_to_be_strict_about(places):
    with pytest.raises(UsageError, match=r"--base BASE \(base=\)"):
        ak.read(places["adapter"], strict_base=True)
    for call in (
        ak.ops.resize,
        lambda a, **more: ak.ops.combine([a, a], **more),
        lambda a, **more: ak.ops.compare(a, a, **more),
    ):
        with pytest.raises(UsageError, match=r"--base BASE \(base=\)"):
            call(places["adapter"], **({"rank": 1} if call is ak.ops.resize else {}), strict_base=True)


def test_adapters_that_were_read_are_compared_too(places):
    adapter = ak.read(places["adapter"])
    with pytest.raises(CheckFailed, match="adapter 1 was made for a base with the fingerprint"):
        ak.ops.resize(adapter, 1, base=places["base"], strict_base=True)
    with pytest.raises(CheckFailed, match="adapter 2 was made"):
        ak.ops.combine(
            [ak.read(save_peft(places["out"].with_name("other"))), adapter], base=places["base"], strict_base=True
        )
    with pytest.raises(CheckFailed, match="the adapter was made"):
        ak.names(places["base"], adapter, strict_base=True)


def test_a_name_or_a_config_counts_too(places, tmp_path):
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/one"}))
    settings = json.loads((places["base"] / "config.json").read_text())
    (places["base"] / "config.json").write_text(json.dumps(settings | {"_name_or_path": "org/two"}))
    words = ["convert", tmp_path / "plain", places["out"], "--to", "adapterkit", "--base", places["base"]]
    refused = run(*words, "--strict-base")
    assert (refused.exit_code, "org/one" in refused.stderr) == (1, True), refused.output
    assert "org/one" in record(*words)["warnings"][0]


@pytest.mark.parametrize("start", [0.0, 0.313, 0.98])
def test_a_fingerprint_sees_a_run_of_a_tensor(start, tmp_path):
    """A run that is a 63rd of a large tensor is seen wherever it lies; an old fingerprint is of another sampling."""
    path = tmp_path / "model.safetensors"
    values = np.zeros((1024, 1024), "f4")
    save_file({"large": values, **{f"other.{n}": np.zeros(256, "f4") for n in range(64)}}, path)
    before = fingerprint(open_checkpoint(path))
    first, length = int(start * values.size), values.size // (BLOCKS - 1)
    values.reshape(-1)[first : first + length] = 1
    save_file({"large": values, **{f"other.{n}": np.zeros(256, "f4") for n in range(64)}}, path)
    assert fingerprint(open_checkpoint(path)) != before
    assert load_file(path)["large"].any()
