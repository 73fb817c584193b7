"""Bills of materials: valid by CycloneDX's own schema, the same bytes for the same files, and true."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import record, run, save_base, save_peft
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import adapterkit as ak
from adapterkit.errors import Unsupported, UsageError
from adapterkit.provenance import bom

VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)
CARD = (
    "---\nlicense: apache-2.0\npipeline_tag: text-generation\ndatasets:\n- org/texts\ntags: [tiny]\n"
    "license_link: https://example.org/licence\n---\n# A model\n"
)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base, lora = save_base(tmp_path / "base"), save_peft(tmp_path / "lora")
    (base / "config.json").write_text('{"model_type": "tiny", "_name_or_path": "org/base", "architectures": ["Tiny"]}')
    (base / "README.md").write_text(CARD)
    (lora / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    ak.merge(base, [lora], tmp_path / "merged", weights=[0.5])
    return tmp_path / "merged"


def valid(path: Path | str, **options: Any) -> dict[str, Any]:
    """The document of a path, after CycloneDX's schema took it in its strict form."""
    text = bom(path, **options).text()
    assert VALIDATOR.validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


def facts(component: dict[str, Any]) -> dict[str, str]:
    return {each["name"].removeprefix("adapterkit:"): each["value"] for each in component.get("properties", ())}


def test_a_merged_model(tmp_path: Path, merged: Path) -> None:
    found = valid(merged)
    main = found["metadata"]["component"]
    assert (main["type"], main["name"], facts(main)["kind"]) == ("machine-learning-model", "merged", "merged")
    hashes = {each["name"]: each["hashes"][0]["content"] for each in main["components"]}
    assert hashes == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in merged.iterdir()}
    assert main["licenses"][0]["license"] == {"id": "Apache-2.0", "url": "https://example.org/licence"}
    assert main["licenses"][1]["license"] == {"id": "GPL-3.0-only"}
    assert main["modelCard"]["modelParameters"] == {"modelArchitecture": "Tiny"}, "the base's card is not this model's"
    base, lora = found["components"]
    assert (base["name"], base["purl"]) == ("org/base", "pkg:huggingface/org/base")
    kept = json.loads((merged / "adapterkit_merge.json").read_text())
    assert facts(base)["fingerprint"] == kept["base_fingerprint"]
    assert facts(lora) | {"digest": ak.read(tmp_path / "lora").digest(), "weight": "0.5"} == facts(lora)
    assert [each["name"] for each in main["pedigree"]["ancestors"]] == ["org/base", "lora"]
    assert found["dependencies"][0] == {"ref": "model", "dependsOn": ["base", "adapter-1"]}


ODD_ADAPTERS = [5, "text", {"a": 1}, [5], [[]], [{"lineage": 5, "ranks": "x", "methods": {}}]]


@pytest.mark.parametrize("value", ODD_ADAPTERS, ids=str)
def test_a_record_of_another_shape_names_no_adapter(merged: Path, value: Any) -> None:
    file = merged / "adapterkit_merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": value}))
    names = [each["name"] for each in valid(merged)["components"]]
    assert names == ["org/base"] + (["None"] if isinstance(value, list) and value[0] and value[0] != 5 else [])


def test_an_adapter_with_a_card_and_a_base(tmp_path: Path) -> None:
    lora = save_peft(tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/base", "revision": "0123456789abcdef0123456789abcdef01234567"}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    (lora / "README.md").write_text(CARD.replace("apache-2.0", "other\nlicense_name: tiny-1"))
    found = valid(lora)
    main, (base,) = found["metadata"]["component"], found["components"]
    assert main["licenses"][0]["license"] == {"name": "tiny-1", "url": "https://example.org/licence"}
    assert main["modelCard"]["modelParameters"] == {
        "task": "text-generation", "datasets": [{"type": "dataset", "name": "org/texts"}]
    }  # fmt: skip
    assert facts(main) == {
        "kind": "adapter", "format": "peft", "digest": ak.read(lora).digest(), "methods": "lora"
    }  # fmt: skip
    assert (base["purl"], base["version"]) == (f"pkg:huggingface/org/base@{config['revision']}", config["revision"])


def test_conflicts_of_licences_are_in_it(tmp_path: Path) -> None:
    base, lora = save_base(tmp_path / "base"), save_peft(tmp_path / "lora")
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (lora / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    ak.merge(base, [lora], tmp_path / "out")
    main = valid(tmp_path / "out")["metadata"]["component"]
    assert "the other adds limits" in facts(main)["licence-conflict:1"]
    assert facts(main)["licence:1:the base"].startswith("llama3.1 asks for")
    assert {"license": {"name": "llama3.1"}} in main["licenses"]


def test_a_graph_with_an_adapter_names_the_graph_before(tmp_path: Path) -> None:
    import onnx
    from graph_files import graph

    lora = save_peft(tmp_path / "lora")
    model = graph(tmp_path / "graph")
    assert run("inject", model, lora, "-o", tmp_path / "graph" / "out.onnx", "--no-check").exit_code == 0
    main = valid(tmp_path / "graph" / "out.onnx")
    (before,) = main["components"]
    assert facts(before)["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert valid(model)["components"] == []
    assert main["metadata"]["component"]["hashes"][0]["content"] != facts(before)["sha256"]
    assert onnx.load(model, load_external_data=False)


@pytest.mark.parametrize("make", ["base", "file", "notes"])
def test_other_things_have_one_too(tmp_path: Path, make: str) -> None:
    base = save_base(tmp_path / "base")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    path = {"base": base, "file": base / "model.safetensors", "notes": tmp_path / "notes"}[make]
    assert valid(path)["metadata"]["component"]["name"] == path.name


def test_the_same_files_give_the_same_bytes(tmp_path: Path, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bom(merged).text()
    monkeypatch.chdir(merged)
    assert bom(".").text() == bom(merged).text() == first
    assert "timestamp" not in json.loads(first)["metadata"]
    assert str(tmp_path) not in first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert valid(merged)["metadata"]["timestamp"] == "1970-01-02T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        bom(merged)
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    numbers = {valid(merged, serial=True)["serialNumber"] for _ in range(2)}
    assert len(numbers) == 2
    (merged / "config.json").write_text('{"model_type": "other"}')
    assert bom(merged).text() != first


def test_the_command(tmp_path: Path, merged: Path) -> None:
    printed = run("bom", merged)
    assert (printed.exit_code, printed.stdout) == (0, bom(merged).text())
    assert record("bom", merged) == bom(merged).data
    written = run("bom", merged, "-o", tmp_path / "m.cdx.json")
    assert written.stdout == f"{tmp_path / 'm.cdx.json'}: merged, 4 files, 2 ancestors\n"
    assert (tmp_path / "m.cdx.json").read_text() == printed.stdout
    inside = run("bom", merged, "-o", merged / "bom.json")
    assert inside.exit_code == 0
    assert (merged / "bom.json").read_text() == printed.stdout, "it does not list itself"
    assert run("bom", merged, "-o", merged / "bom.json").stdout.startswith("already done")
    assert run("bom", tmp_path / "none").exit_code == 6


def test_files_that_the_document_cannot_list_are_refused(tmp_path: Path) -> None:
    lora, other = save_peft(tmp_path / "lora"), tmp_path / "other"
    other.mkdir()
    (other / "more.bin").write_bytes(b"1")
    (lora / "sub").symlink_to(other)
    with pytest.raises(Unsupported, match="link to a folder"):
        bom(lora)
    (lora / "sub").unlink()
    (lora / "model.bin").symlink_to(tmp_path / "moved")
    with pytest.raises(Unsupported, match="a link whose target is missing"):
        bom(lora)
    (lora / "model.bin").unlink()
    os.mkfifo(lora / "pipe")
    with pytest.raises(Unsupported, match="neither a file nor a folder"):
        bom(lora)
    (lora / "pipe").unlink()
    (lora / ".git").mkdir()
    os.mkfifo(lora / ".git" / "ipc")  # Files of git are not listed.
    assert bom(lora).data["metadata"]["component"]["components"]
    (Path(os.fsdecode(os.fsencode(lora) + b"/\xff"))).write_bytes(b"1")
    with pytest.raises(Unsupported, match="not UTF-8"):
        bom(lora)


def test_the_document_replaces_only_an_earlier_document(merged: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        before = (merged / name).read_bytes()
        refused = run("bom", merged, "-o", merged / name, "--overwrite")
        assert (refused.exit_code, (merged / name).read_bytes()) == (2, before)
        assert "would replace its input" in refused.stderr
    for _ in range(2):
        assert run("bom", merged, "-o", merged / "model.cdx.json", "--overwrite").exit_code == 0
