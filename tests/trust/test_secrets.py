# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""Secrets of addresses: no command prints them, no file holds them, whatever goes wrong."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import run, save_base, save_peft
from hub_repository import hub, laid, peft_files  # noqa: F401 - a fixture
from hub_server import HubServer

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.errors import MAX_LINE, MAX_LINES, AdapterkitError, Malformed, Unrepresentable, public, storage_error

SECRET = "openSesame"
ADDRESSES = (
    f"https://somebody:{SECRET}@127.0.0.1:9/x",
    f"https://127.0.0.1:9/org/lora?token={SECRET}",
    f"https://127.0.0.1:9/x.safetensors?X-Amz-Signature={SECRET}&X-Amz-Date=1#here",
    f"oci://somebody:{SECRET}@127.0.0.1:9/x:v1",
    f"hf://org/lora?sig={SECRET}",
    f"unknown://{SECRET}@host/x",
    f"https:/somebody:{SECRET}@127.0.0.1:9/x",
)
COMMANDS = {
    "bom": ["{}", "lora -o {}"],
    "combine": ["{} {} --method linear -o out", "lora lora --method linear -o {}"],
    "convert": ["{} out --to peft", "lora {} --to peft", "lora out --to gguf --base {}"],
    "completion": ["{}"],
    "help": ["{}"],
    "conformance": ["--suite {} -- true"],
    "demo": ["{}", "-o {}"],
    "diff": ["{} lora", "lora {}"],
    "doctor": ["{}"],
    "export": ["{} -o out", "base -o {}", "base -o out --adapter {}", "--model {} -o out"],
    "extract": ["{} --base base --rank 2 -o out", "base --base {} --rank 2 -o out"],
    "gate": ["{} lora", "base {}", "base lora --merged {}", "base lora --onnx {}", "base lora --data {}"],
    "inject": ["{} lora -o out.onnx", "none.onnx {} -o out.onnx", "none.onnx lora -o {}"],
    "inspect": ["{}", "lora --format {}"],
    "list": ["{}"],
    "merge": ["{} lora -o out", "base {} -o out", "base lora -o {}", "base lora -o out --method {}", "{} {} --plan"],
    "names": ["{}", "base {}"],
    "pull": ["{} out", "lora {}"],
    "push": ["lora {}", "{} hf://org/x", "lora hf://org/x --tag {}"],
    "report": ["{}", "lora --base {}", "lora -o {}", "lora --base base --merged {}"],
    "resize": ["{} --rank 1 -o out", "lora --rank 1 -o {}"],
    "search": [
        "{} lora --base base --data texts -o out.yml",
        "lora lora --base {} --data texts -o out.yml",
        "lora lora --base base --data {} -o out.yml",
        "lora lora --base base --data texts --start {} -o out.yml",
        "lora lora --base base --data texts -o {}",
    ],
    "scan": ["{}", "lora --base {}", "lora --sarif {}"],
    "sign": ["{} --key none.pem", "lora --key {}", "lora --key none.pem -o {}", "lora --key x --password-file {}"],
    "ui": ["{} --no-browser"],
    "validate": ["{}", "lora --base {}"],
    "verify": [
        "{} --base base --adapter lora",
        "base --base {} --adapter lora",
        "base --base base --adapter {}",
        "lora --signature {} --key x",
        "base --signature config.json --key {}",
    ],
}


def test_every_command_has_a_case() -> None:
    assert set(COMMANDS) == set(adapterkit.list_commands(None))  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_the_secret_of_an_address(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    save_base(tmp_path / "base")
    save_peft(tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    for words in COMMANDS[command]:
        for at, address in enumerate(ADDRESSES):
            options = (["--json"], ["--debug"], ["--json", "--debug"])[at % 3]
            result = CliRunner().invoke(adapterkit, [command, *(w.format(address) for w in words.split()), *options])
            assert SECRET not in result.output, (command, words, result.output)
            assert SECRET not in str(result.exception)


def test_a_bug_is_told_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback quotes exceptions of any library."""

    def fail(*_: object, **__: object) -> None:
        raise KeyError(ADDRESSES[1]) from FileNotFoundError(2, "not there", ADDRESSES[0])

    monkeypatch.setattr("adapterkit.diff", fail, raising=False)
    monkeypatch.setattr("adapterkit.ops.compare", fail)
    for option in ("--json", "--debug"):
        result = run("diff", save_peft(tmp_path / option[2:]), tmp_path / option[2:], option)
        assert result.exit_code == 70
        assert SECRET not in result.output
        assert "127.0.0.1:9/org/lora?..." in result.output


def test_errors_hold_no_secret_whoever_fills_them_in() -> None:
    error = Malformed(f"cannot read '{ADDRESSES[1]}', really", path=ADDRESSES[0], where=ADDRESSES[2], cure=ADDRESSES[3])
    assert SECRET not in f"{error} {error!r} {error.record()} {error.args}"
    assert error.why == "cannot read 'https://127.0.0.1:9/org/lora?...', really"
    later = AdapterkitError("x").at(path=ADDRESSES[0], where=ADDRESSES[1])
    later.cure = ADDRESSES[2]
    assert SECRET not in str(later)
    assert SECRET not in str(storage_error(FileNotFoundError(2, "no", ADDRESSES[0]), ADDRESSES[0]))
    assert SECRET not in str(Unrepresentable("x", items=[ADDRESSES[0]]).items)


@pytest.mark.parametrize("text", [
    "hf://org/repo@main/a/b.safetensors", "oci://localhost:5000/org/x@sha256:" + "0" * 64, "s3://bucket/a b/c@d:e",
    "oci://[::1]:5000/org/x@sha256:" + "0" * 64, "/home/a@b/x?y", "C:/a?b", "why?", "modelscope://a/b@c#" + "0" * 64,
    "hf_quantizer", "https://127.0.0.1:9/a/b",
])  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert public(text) == text
    assert public(f"see '{text}'.") == f"see '{text}'."


@pytest.mark.parametrize("text", [
    f"https://a:b/{SECRET}@host/x", f"https://{SECRET}@host", f"https://h/x#access_token={SECRET}",
    f"('https://h/x?a={SECRET}')", "hf_" + SECRET * 4, f"ftp://u:{SECRET}@h;x", f"a https:/u:{SECRET}@h https://h?{SECRET}",
    f"https://u:9{SECRET}@h:80/x", f"folder?token={SECRET}/x.json", f"https://h/x?{SECRET}'quote\"{SECRET}",
])  # fmt: skip
def test_what_is_a_secret_goes(text: str) -> None:
    assert SECRET not in public(text)


def test_no_file_holds_the_secret_of_an_address(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place of fsspec whose address has a query: the note of a pull, lineage, reports and cards go without it."""
    import fsspec

    store = fsspec.filesystem("memory")
    base = laid(save_base(tmp_path / "local"))
    for folder, files in (("lora", peft_files()), ("base", base)):
        for name, data in files.items():
            store.pipe_file(f"/bucket/{folder}?token={SECRET}/{name}", data)
    for folder in ("lora", "base"):
        pulled = run("pull", f"memory://bucket/{folder}?token={SECRET}", tmp_path / "pulled" / folder, "--json")
        assert (pulled.exit_code, SECRET in pulled.output) == (0, False), pulled.output
    run("merge", tmp_path / "pulled" / "base", tmp_path / "pulled" / "lora", "-o", tmp_path / "merged")
    run("convert", tmp_path / "pulled" / "lora", tmp_path / "native.safetensors", "--to", "adapterkit")
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len([file for file in written if file.name == ".adapterkit-source.json"]) == 2
    for file in written:
        assert SECRET.encode() not in file.read_bytes(), file
    step = ak.Step("pull", {"uri": ADDRESSES[0], "of": [{"base": ADDRESSES[1]}]})
    assert SECRET not in json.dumps(step.args)


def test_an_error_quotes_a_file_briefly() -> None:
    error = Malformed("x" * 70_000, path="/a", where="y" * 70_000, cure="\n".join("z" * 9_000 for _ in range(1000)))
    assert len(error.why) <= MAX_LINE
    assert len(error.where or "") <= MAX_LINE
    assert len(error.cure or "") <= (MAX_LINE + 1) * (MAX_LINES + 1)
    assert error.why.startswith("xxx")
    assert "characters" in error.why
