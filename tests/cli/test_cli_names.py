"""names, and --rename of merge and verify: what each says, in tables and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run
from safetensors.numpy import load_file, save_file

E, F, H = 2, 4, 6
LIVE, STORED = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Mixtral of one layer as it is stored on hubs."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {"model.layers.0.self_attn.q_proj.weight": (H, H), "lm_head.weight": (8, H)}
    tensors |= {f"{STORED}.{e}.{name}.weight": (F, H) for e in range(E) for name in ("w1", "w3")}
    tensors |= {f"{STORED}.{e}.w2.weight": (H, F) for e in range(E)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return folder


def peft(folder: Path, factors: dict[str, tuple[int, ...]], **config: object) -> Path:
    """A PEFT adapter whose factors are all ones."""
    folder.mkdir()
    keys = {f"base_model.model.{name}.weight": np.ones(shape, np.float32) for name, shape in factors.items()}
    save_file(keys, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """An adapter of the live model of transformers 5: on the attention, and on the stack of gates and ups."""
    factors = {
        "model.layers.0.self_attn.q_proj.lora_A": (1, H), "model.layers.0.self_attn.q_proj.lora_B": (H, 1),
        f"{LIVE}.lora_A": (E, H), f"{LIVE}.lora_B": (2 * F, E),
    }  # fmt: skip
    return peft(tmp_path / "live", factors, target_parameters=[f"{LIVE}.gate_up_proj"])


def test_the_map_of_an_adapter(base: Path, live: Path) -> None:
    found = record("names", base, live)
    assert found["family"] == "mixtral"
    assert found["rules"] == [
        {"rule": "exact", "targets": 1}, {"rule": "architecture mixtral: transformers5 -> hub", "targets": 1},
    ]  # fmt: skip
    places = {(each["target"], each["tensor"]) for each in found["targets"]}
    assert (f"{LIVE}.gate_up_proj", f"{STORED}.1.w3.weight") in places
    assert len(places) == 1 + 2 * E
    lines = run("names", base, live).stdout.splitlines()
    assert lines[0] == f"{base}: model_type mixtral, architecture mixtral"
    shown = [line.split() for line in lines[2:-2]]
    template = "model.layers.{n}.block_sparse_moe.experts.{n}."
    assert ["model.layers.{n}.mlp.experts.gate_up_proj", f"{template}w1", str(E)] in shown
    assert lines[-1] == "architecture mixtral: transformers5 -> hub: 1 target"


def test_the_names_of_a_base_in_every_naming(base: Path) -> None:
    weights = {each["name"]: each["names"] for each in record("names", base)["weights"]}
    names = weights["model.layers.#.block_sparse_moe.experts.#.w1"]
    assert names["transformers5"] == "model.layers.{n}.mlp.experts.gate_up_proj"
    assert names["gguf"] == "blk.{n}.ffn_gate_exps"
    assert "blk.{n}.attn_q" in run("names", base).stdout


def test_a_merge_says_how_the_names_were_found_and_inspect_too(base: Path, live: Path, tmp_path: Path) -> None:
    line = "exact (1); architecture mixtral: transformers5 -> hub (1)"
    assert f"names of live were translated by {line}" in run("merge", base, live, "--plan").stdout
    assert f"names in the base: {line}" in run("inspect", live, "--base", base).stdout
    assert f"names of live were translated by {line}" in run("merge", base, live, "-o", tmp_path / "out").stdout
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{STORED}.1.w3.weight"].tolist() == [[1.0] * H] * F
    assert run("verify", tmp_path / "out", "--base", base, "--adapter", live).exit_code == 0


def test_rules_of_the_user(base: Path, tmp_path: Path) -> None:
    factors = {"net.block.0.att.query.lora_A": (1, H), "net.block.0.att.query.lora_B": (H, 1)}
    adapter = peft(tmp_path / "other", factors, target_modules=["query"])
    refused = run("merge", base, adapter, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert "does not fit the base" in run("inspect", adapter, "--base", base).stdout
    rule = "net.block.{n}.att.query=model.layers.{n}.self_attn.q_proj"
    found = record("merge", base, adapter, "-o", tmp_path / "out", "--rename", rule)
    assert found["adapters"][0]["names"] == [{"rule": f"user {rule}", "targets": 1}]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert load_file(tmp_path / "out" / "model.safetensors")[name].tolist() == [[1.0] * H] * H
    checked = ("verify", tmp_path / "out", "--base", base, "--adapter", adapter)
    assert run(*checked, "--rename", rule).exit_code == 0
    assert run(*checked).exit_code == 2
    wrong = run("names", base, adapter, "--rename", "net")
    assert wrong.exit_code == 2
    assert "--rename 'FROM=TO'" in wrong.stderr


def test_an_adapter_is_converted_into_the_names_of_a_base_and_is_the_same_function(
    base: Path, live: Path, tmp_path: Path
) -> None:
    refused = run("convert", live, tmp_path / "a", "--to", "peft", "--match-base")
    assert (refused.exit_code, "--match-base requires --base" in refused.stderr) == (2, True)
    for to in ("peft", "adapterkit"):
        out = tmp_path / to
        record("convert", live, out, "--to", to, "--base", base, "--match-base")
        found = record("inspect", out)
        assert f"{STORED}.1.w3" in {update["target"] for update in found["updates"]}
        assert record("diff", live, out, "--base", base)["equal"] is True
    assert found["recipe"][-1]["op"] == "bind"
    assert found["recipe"][-1]["args"]["rules"] == ["architecture mixtral: transformers5 -> hub"]
