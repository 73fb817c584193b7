"""Which tools load a file: the answers are compared with diffusers' own loaders and with ComfyUI's key map as data."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run, save_peft
from image_cases import CASES, COMFY, FAMILIES, dotted, flat, pairs, whole
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed
from adapterkit.io.lazy import from_numpy
from adapterkit.loaders import folder, load, loaders, loaders_of
from adapterkit.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
DIFFUSERS = loaders()["diffusers"]


def tool():
    """The script that made spec/loaders/diffusers.toml: it runs diffusers' loaders on files of all spellings."""
    path = ROOT / "tools" / "foreign" / "diffusers_keys.py"
    if "diffusers_keys" not in sys.modules:
        spec = importlib.util.spec_from_file_location("diffusers_keys", path)
        sys.modules["diffusers_keys"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["diffusers_keys"])
    return sys.modules["diffusers_keys"]


def answers(path, name=None):
    name = name or ak.detect(path)
    return {answer.tool: answer for answer in loaders_of(ak.read(path, name), name, path)}


CLAIMS = [
    (keys, name) for keys in DIFFUSERS.keys for name in keys.families
    if "lora_A.weight" in keys.slots or "lora_down.weight" in keys.slots
]  # fmt: skip


@pytest.mark.parametrize(("keys", "name"), CLAIMS, ids=lambda each: getattr(each, "prefix", each))
def test_diffusers_makes_of_each_spelling_what_the_file_says(keys, name):
    made, family = tool(), FAMILIES[name]
    slots = made.DOWN_UP if "lora_down.weight" in keys.slots else made.AB
    shapes = made.sizes(family, keys.naming)
    lacking, only = keys.without.get(name, ()), keys.only.get(name, ())
    held = {p: s for p, s in shapes.items() if p not in lacking and (not only or p in only)}
    if family.component == "unet":
        held = dict(list(held.items())[::7])
    assert made.same(family, keys.prefix, keys.naming, slots, held) == list(held)
    lost = next((path for path in shapes if path not in held and path in lacking), None)
    if lost is not None:
        more = held | {lost: shapes[lost]}
        assert made.same(family, keys.prefix, keys.naming, slots, more) != list(more)


HELD_BY_COMFYUI = loaders()["comfyui"].keys[2].families


@pytest.mark.parametrize("name", HELD_BY_COMFYUI)
def test_comfyui_s_key_map_holds_every_key_that_is_written_for_it(name, tmp_path):
    family = FAMILIES[name]
    modules = whole(family, "diffusers")
    word = {"modelspec.architecture": family.facts.words[0]} if family.facts.words else {}
    if family.component == "unet":
        modules = {path: size for path, size in list(modules.items())[::9] if "skip" not in path}
    save_file(pairs(modules, dotted(f"{family.component}.")), tmp_path / "a.safetensors", word)
    ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "comfyui")
    answer = answers(tmp_path / "b.safetensors", "comfyui")["comfyui"]
    assert (answer.loads, answer.why) == ("yes", "")


def test_every_family_of_the_issue_is_in_comfyui_s_map_or_has_no_class_there():
    absent = {name for name, family in FAMILIES.items() if not family.facts.generic} - set(HELD_BY_COMFYUI)
    special = (family for family in FAMILIES.values() if not family.facts.generic)
    unknown = {family.name for family in special if "native" not in family.namings}
    assert absent == {"cogview4", "flux3", "sana", "sana_video"} | unknown, (
        "ComfyUI 0.33.0 has no model of these whose names are known"
    )


@pytest.mark.parametrize("case", CASES)
def test_what_diffusers_is_said_to_load_it_loads_and_conversion_helps_where_it_does_not(case, tmp_path):
    _, modules, spell = CASES[case]
    save_file(pairs(modules, spell), tmp_path / "a.safetensors")
    found = answers(tmp_path / "a.safetensors")["diffusers"]
    if found.loads != "yes":
        assert found.convert.startswith("--to diffusers"), found
        words = found.convert.split()
        loss = words[words.index("--on-loss") + 1] if "--on-loss" in words else "refuse"
        ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers", on_loss=loss)
        assert answers(tmp_path / "b.safetensors")["diffusers"].loads == "yes"


def test_comfyui_leaves_out_what_has_other_names_there_and_the_answer_says_so(tmp_path):
    held = pairs({"time_in.mlp.0": (8, 8), "double_blocks.0.img_attn_qkv": (24, 8)}, COMFY)
    save_file(held, tmp_path / "a.safetensors", {"modelspec.architecture": "hunyuan-video"})
    found = answers(tmp_path / "a.safetensors")["comfyui"]
    assert found.loads == "part"
    assert "2 of 4 keys" in found.why
    assert "time_in.mlp.0" in found.why
    assert found.convert == "--to comfyui"
    adapter = ak.read(tmp_path / "a.safetensors").replace(foreign=None)
    ak.write(adapter, tmp_path / "b.safetensors", "comfyui")
    assert "diffusion_model.time_in.in_layer.lora_down.weight" in load_file(tmp_path / "b.safetensors")


def test_methods_that_a_tool_has_no_slot_for_are_told(tmp_path):
    held = pairs({"transformer_blocks.0.attn.to_q": (8, 8)}, dotted("transformer."))
    held["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"] = np.ones(8, "f4")
    save_file(held, tmp_path / "a.safetensors", {"modelspec.architecture": "flux1"})
    found = answers(tmp_path / "a.safetensors")
    assert found["diffusers"].loads == "yes"
    assert found["comfyui"].loads == "part"
    assert "lora_magnitude_vector" in found["comfyui"].why


def test_the_command_lists_tools_and_answers_for_a_file(tmp_path):
    _, modules, spell = CASES["Wan"]
    save_file(pairs(modules, spell), tmp_path / "wan.safetensors")
    found = {each["tool"]: each for each in record("list", "loaders", tmp_path / "wan.safetensors")["loaders"]}
    assert found["comfyui"]["loads"] == found["diffusers"]["loads"] == "yes"
    assert found["musubi_tuner"]["convert"] == "--to kohya"
    assert found["sd_scripts"]["why"] == "it does not support wan"
    text = run("list", "loaders", tmp_path / "wan.safetensors").stdout
    assert "arguments of convert" in text
    assert {each["name"] for each in record("list", "loaders")["loaders"]} == set(loaders())
    shown = record("inspect", tmp_path / "wan.safetensors")["loaders"]
    loading = {each["tool"] for each in shown if each["loads"] == "yes"}
    assert loading == {"ai_toolkit", "comfyui", "diffusers", "stable_diffusion_cpp"}
    assert "loaded without conversion by: ai-toolkit" in run("inspect", tmp_path / "wan.safetensors").stdout
    assert run("list", "formats", "x").exit_code == 2
    assert run("list", "loaders", "--family", "wan").exit_code == 2


def test_a_file_of_several_families_is_answered_for_the_one_that_is_named(tmp_path):
    held = pairs({"double_blocks.0.img_attn.qkv": (24, 8), "final_layer.linear": (8, 8)}, flat)
    save_file(held, tmp_path / "a.safetensors")
    assert "--family" in run("list", "loaders", tmp_path / "a.safetensors").stderr
    found = record("list", "loaders", tmp_path / "a.safetensors", "--family", "hunyuan_video")["loaders"]
    loads = {each["tool"]: each["loads"] for each in found}
    # musubi-tuner's network has the blocks alone.
    assert (loads["musubi_tuner"], loads["sd_scripts"]) == ("part", "no")
    words = [
        "combine",
        tmp_path / "a.safetensors",
        tmp_path / "a.safetensors",
        "--method",
        "linear",
        "--family",
        "flux",
    ]
    assert run(*words, "-o", tmp_path / "b.safetensors", "--to", "comfyui").exit_code == 0


def test_an_adapter_of_a_language_model_has_other_tools(tmp_path):
    found = {each["tool"]: each for each in record("list", "loaders", save_peft(tmp_path / "a"))["loaders"]}
    assert found["peft"]["loads"] == "yes"
    assert found["llama_cpp"] | {"why": ""} == {
        "tool": "llama_cpp", "title": "llama.cpp", "loads": "no", "why": "", "convert": "--to gguf --base BASE",
    }  # fmt: skip
    assert "comfyui" not in found
    # Its alpha is twice its rank, and this one reads no alpha.
    assert found["openvino_genai"]["loads"] == "no"
    assert found["openvino_genai"]["convert"] == "--to peft --profile openvino_genai"
    assert found["cloudflare"]["convert"] == "--to peft --profile cloudflare --base BASE"


FAULTS = {
    "unknown family": ('families = ["flux"]', 'families = ["fluxx"]'),
    "unknown format": ('convert = ["kohya"]', 'convert = ["koya"]'),
    "format 2": ("format = 1", "format = 2"),
    "not a valid loader file": ("format = 1", "format = 1\nwhat = 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_loader_file_is_refused(fault, tmp_path):
    text = 'format = 1\ntitle = "x"\nurl = "x"\nsources = []\nunread = "x"\nconvert = ["kohya"]\n'
    text += '[[keys]]\nprefix = ""\nnaming = "native"\nfamilies = ["flux"]\n'
    (tmp_path / "x.toml").write_text(text)
    assert load(tmp_path / "x.toml").title == "x"
    (tmp_path / "x.toml").write_text(text.replace(*FAULTS[fault]))
    with pytest.raises(Malformed, match=fault):
        load(tmp_path / "x.toml")


def test_every_loader_file_says_where_its_facts_come_from():
    for file in folder().glob("*.toml"):
        assert file.read_text("utf-8").startswith("# "), file
        assert load(file).sources, file


def test_a_file_that_is_read_with_its_base_is_answered_for_with_it(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
    weights = {f"model.layers.0.{name}.weight": rng.normal(size=size).astype("f4") for name, size in sizes.items()}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    target = ak.Target("model.layers.0.self_attn.q_proj")
    leaves = {"A": rng.normal(size=(2, 32)).astype("f4"), "B": rng.normal(size=(32, 2)).astype("f4")}
    adapter = ak.Adapter({target: (METHODS["lora"](**{name: from_numpy(leaf) for name, leaf in leaves.items()}),)})
    ak.write(adapter, tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    without = record("list", "loaders", tmp_path / "a.gguf")["loaders"]
    assert {each["tool"]: each["loads"] for each in without}["llama_cpp"] == "yes"
    assert all("--base BASE" in each["convert"] for each in without if each.get("convert"))
    found = record("list", "loaders", tmp_path / "a.gguf", "--base", tmp_path / "base")["loaders"]
    assert {each["tool"]: each["loads"] for each in found}["llama_cpp"] == "yes"
    assert "requires 'list loaders FILE'" in run("list", "methods", "--base", tmp_path / "base").stderr
