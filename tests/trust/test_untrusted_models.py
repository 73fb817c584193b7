"""Folders of models that want code to be run: export runs none, asks nobody, and says what to do."""

import ast
import json
from pathlib import Path

import pytest
import torch
from command_line import run
from transformers import BertConfig, BertModel

from adapterkit.errors import Unsupported
from adapterkit.onnx import export_pretrained

ROOT = Path(__file__).parents[2]
MODULE = """
open({mark!r}, "w").close()
from transformers import BertConfig, BertModel
class EvilConfig(BertConfig):
    model_type = "evil"
class EvilModel(BertModel):
    config_class = EvilConfig
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "max_position_embeddings": 8}
    BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, name: str = "config.json", **fields: object) -> None:
    told = json.loads((folder / "config.json").read_text()) | fields
    (folder / name).write_text(json.dumps(told))


@pytest.mark.parametrize("architectures", [None, ["AutoModel"]])
def test_code_of_the_folder_is_not_run_whatever_is_typed(
    folder: Path, tmp_path: Path, architectures: list[str] | None
) -> None:
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(MODULE.format(mark=str(mark)))
    code = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    change(folder, model_type="evil", auto_map=code, architectures=architectures)
    result = run("export", folder, "-o", tmp_path / "out", "--no-check", input="y\n" * 9)
    assert not mark.exists()
    assert "[y/N]" not in result.output
    assert (result.exit_code, "--model MODULE:FUNCTION" in result.output) == (3, True), result.output
    assert not (tmp_path / "out").exists()


FIELDS = ["attn_implementation", "_attn_implementation", "experts_implementation"]


@pytest.mark.parametrize("place", ["config.json", "another file"])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ["org/evil", "flash_attention_2", {"": "org/evil"}])
def test_a_kernel_that_a_config_names_is_not_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object, place: str
) -> None:
    """transformers fetches such a kernel from a hub and runs it, also with `local_files_only`."""
    asked: list[object] = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **_: asked.append(a))
    if place == "config.json":
        change(folder, **{field: value})
    else:
        change(folder, "config.4.0.0.json", **{field: value})
        change(folder, configuration_files=["config.4.0.0.json"])
    with pytest.raises(Unsupported, match="is a kernel that would be downloaded and run") as raised:
        export_pretrained(folder, tmp_path / "out", check=False)
    assert asked == []
    assert raised.value.path == str(folder / "config.json")
    assert "eager" in str(raised.value.cure)
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_the_folder_leads_to_no_other_base(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../other", "peft_type": "LORA"}')
    with pytest.raises(Unsupported, match="holds an adapter"):
        export_pretrained(folder, tmp_path / "out", check=False)


def test_every_call_of_transformers_says_that_it_trusts_no_code() -> None:
    """Wherever this project itself loads a model; not in what it prints for others to copy."""
    loading, trusting = 0, []
    for file in [*(ROOT / "adapterkit").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        text = file.read_text("utf-8")
        if "transformers" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                owner = ast.unparse(node.func.value)
                if owner.startswith(("Auto", "built", "kind")):
                    loading += 1
                    told = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    if told.get("trust_remote_code") != "False" and told.get(None) != "known_only":
                        trusting.append(f"{file}:{node.lineno}")
    assert loading >= 7
    assert trusting == []
