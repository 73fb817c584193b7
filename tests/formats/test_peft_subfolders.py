# ruff: noqa: F811 - a fixture is imported and then named
"""Adapters in subfolders, as PEFT saves each adapter that has a name."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from command_line import run
from hub_repository import hub, peft_files  # noqa: F401 - a fixture
from hub_server import HubServer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import StorageError, UnknownFormat
from adapterkit.io.locations import is_remote, local


def saved(folder: Path, *names: str) -> tuple[torch.nn.Module, dict[str, dict[str, torch.Tensor]]]:
    """A model, and the weights that PEFT merges it to with each of the adapters that it saves in subfolders."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 5)).eval()
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"]), names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(
                0.1 * torch.randn_like(parameter) if parameter.shape[0] < 4 or parameter.shape[-1] < 4 else 0
            )
    wrapped.save_pretrained(str(folder))
    save_file(model.state_dict(), folder.with_name("base.safetensors"), {"format": "pt"})
    merged = {}
    for name in names:
        alone = copy.deepcopy(wrapped)
        alone.set_adapter(name)
        merged[name] = alone.merge_and_unload(adapter_names=[name]).state_dict()
    return model, merged


def check_merged(adapter: object, wanted: dict[str, torch.Tensor], tmp_path: Path, out: str) -> None:
    ak.merge(tmp_path / "base.safetensors", [adapter], tmp_path / out)
    found = load_file(tmp_path / out) if (tmp_path / out).is_file() else load_file(tmp_path / out / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


def test_the_only_adapter_in_a_subfolder_is_that_of_the_folder(tmp_path: Path) -> None:
    _, merged = saved(tmp_path / "peft", "pirate")
    assert not (tmp_path / "peft" / "adapter_config.json").exists()
    read = ak.read(tmp_path / "peft")
    assert read.recipe[-1].args == {"format": "peft", "subfolder": "pirate"}
    assert ak.detect(tmp_path / "peft") == "peft"
    check_merged(str(tmp_path / "peft"), merged["pirate"], tmp_path, "out.safetensors")
    shown = run("inspect", str(tmp_path / "peft"))
    assert "subfolder pirate" in shown.output


def test_of_several_one_is_named(tmp_path: Path) -> None:
    _, merged = saved(tmp_path / "peft", "pirate", "poet")
    with pytest.raises(UnknownFormat) as caught:
        ak.read(tmp_path / "peft")
    assert f"{tmp_path / 'peft'}#pirate, {tmp_path / 'peft'}#poet" in str(caught.value)
    for name in ("pirate", "poet"):
        check_merged(f"{tmp_path / 'peft'}#{name}", merged[name], tmp_path, f"{name}.safetensors")
        assert ak.read(tmp_path / "peft" / name).digest() == ak.read(f"{tmp_path / 'peft'}#{name}").digest()
    for command in (["inspect"], ["validate"], ["names", str(tmp_path / "base.safetensors")]):
        refused = run(*command, str(tmp_path / "peft"))
        assert refused.exit_code == 2
        assert "#poet" in refused.output + refused.stderr
        assert run(*command, f"{tmp_path / 'peft'}#poet").exit_code == 0
    two = run("combine", f"{tmp_path / 'peft'}#poet", f"{tmp_path / 'peft'}#pirate", "-o", str(tmp_path / "both"))
    assert two.exit_code == 0, two.stderr
    assert len(ak.read(tmp_path / "both").updates) == 2
    with pytest.raises(StorageError, match=r"The folder has: pirate, poet"):
        ak.read(f"{tmp_path / 'peft'}#sailor")


def test_an_output_inside_a_named_adapter_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "peft", "pirate", "poet")
    with pytest.raises(ak.errors.UsageError, match="overlaps"):
        ak.merge(tmp_path / "base.safetensors", [f"{tmp_path / 'peft'}#poet"], tmp_path / "peft" / "poet" / "out")


def test_a_folder_with_more_than_the_adapter_is_not_taken_for_it(tmp_path: Path) -> None:
    saved(tmp_path / "peft", "pirate")
    save_file({"weight": torch.ones(2)}, tmp_path / "peft" / "model.safetensors")
    with pytest.raises(UnknownFormat, match=r"an adapter in a subfolder, and other files.*#pirate"):
        ak.read(tmp_path / "peft")


def test_a_path_that_has_the_mark_in_its_name_is_that_path(tmp_path: Path) -> None:
    saved(tmp_path / "peft", "pirate", "poet")
    os.rename(tmp_path / "peft" / "poet", tmp_path / "peft#pirate")
    assert local(f"{tmp_path}/peft#pirate") == tmp_path / "peft#pirate"
    assert len(ak.read(f"{tmp_path}/peft#pirate").updates) == 1, "the poet adapts one layer"
    assert local(f"{tmp_path}/nothing#here") == tmp_path / "nothing#here"
    assert local(f"{tmp_path}/peft#../peft") == tmp_path / "peft#../peft"


def test_a_named_adapter_on_a_hub(hub: HubServer) -> None:
    files = {f"{name}/{file}": data for name in ("pirate", "poet") for file, data in peft_files(f"org/{name}").items()}
    hub.add("org/loras", {**files, "README.md": b"two"})
    assert is_remote("org/loras#poet")
    for name in ("org/loras#poet", "hf://org/loras#poet", "hf://org/loras@main#poet", "hf://org/loras/poet"):
        assert ak.read(name).base.id == "org/poet"
    with pytest.raises(UnknownFormat, match="org/loras#pirate, org/loras#poet"):
        ak.read("org/loras")
    shown = run("inspect", "hf://org/loras")
    assert shown.exit_code == 2
    assert "hf://org/loras#poet" in shown.output + shown.stderr
    assert json.loads(run("inspect", "--json", "org/loras#poet").output)["base"]["id"] == "org/poet"
