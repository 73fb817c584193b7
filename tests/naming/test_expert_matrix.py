"""Every layout of experts' factors into every other one, for eight families: the change of each expert stays the same.

Files of PEFT's two layouts were written by PEFT itself (tests/data/experts), the others are written here. What comes
out is read here too, by each layout's own formula in float64; nothing of adapterkit computes the expected numbers.
"""

import itertools
import json
import os
import shutil
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterkit as ak

DATA = Path(__file__).parents[1] / "data" / "experts"
E, R, HIDDEN, WIDTH, SCALING = 3, 2, 8, 6, 2.0
PARTS = ("gate", "up", "down")
PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MLP = "model.layers.0.mlp."
SPARSE = "model.layers.0.block_sparse_moe."

FAMILIES = {
    "mixtral": {"hub": SPARSE, "leaves": {"gate": "w1", "up": "w3", "down": "w2"}, "arch": "llama"},
    "qwen2_moe": {"arch": "qwen2moe"},
    "qwen3_moe": {"arch": "qwen3moe"},
    "olmoe": {"arch": "olmoe"},
    "glm4_moe": {"arch": "glm4moe"},
    "deepseek_v3": {"arch": "deepseek2"},
    "gpt_oss": {"arch": "gpt-oss", "turned": True, "mlx": MLP + "experts."},
    "granitemoe": {"arch": "granitemoe", "live": SPARSE, "hub": SPARSE},
}
"""model_type -> where its experts are, if not in `mlp`; `turned`: stored [in, out], gate and up interleaved."""


def live(family):
    return FAMILIES[family].get("live", MLP)


def turned(family):
    return FAMILIES[family].get("turned", False)


def hub(family):
    return FAMILIES[family].get("hub", MLP)


def leaf(family, part):
    return FAMILIES[family].get("leaves", PROJ)[part]


def mlx_stem(family):
    return FAMILIES[family].get("mlx", f"{hub(family)}switch_mlp.")


def base(family, folder):
    """The base as a live model of transformers 5 saves it: zeros, for nothing but names and shapes is asked of it."""
    shapes = {"gate_up_proj": (E, 2 * WIDTH, HIDDEN), "down_proj": (E, HIDDEN, WIDTH)}
    flip = (0, 2, 1) if turned(family) else (0, 1, 2)
    tensors = {
        f"{live(family)}experts.{name}": np.zeros([shape[axis] for axis in flip], "f4")
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": family, "num_experts": E, "num_attention_heads": 2, "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@cache
def truth(kind):
    """(expert, part) -> its A and B; `shared` has one A for all of gate, one for all of up, one B for all of down."""
    rng = np.random.default_rng(7)
    found = {}
    for e, part in itertools.product(range(E), PARTS):
        out, in_ = (HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN)
        A, B = rng.normal(size=(R, in_)), rng.normal(size=(out, R))
        if kind == "shared" and e:
            A, B = (A, found[0, part][1]) if part == "down" else (found[0, part][0], B)
        elif kind == "stack" and part == "up":
            A = found[e, "gate"][0]  # A stack of gate and up has one A for both.
        found[e, part] = (A.astype("f4").astype("f8"), B.astype("f4").astype("f8"))
    return found


def changes_of(factors):
    return {key: SCALING * (B @ A) for key, (A, B) in factors.items()}


def config(folder, **fields):
    folder.mkdir(exist_ok=True)
    common = {"peft_type": "LORA", "r": R, "lora_alpha": R * SCALING, "bias": "none", "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(common | fields))


def save(folder, tensors, **metadata):
    held = {name: np.ascontiguousarray(tensor, "f4") for name, tensor in tensors.items()}
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt", **metadata})
    return folder


# Sources: each returns (file, changes of the experts).


def by_peft(release):
    def make(family, folder):
        case = "turned" if turned(family) else "pair"
        shutil.copytree(DATA / release / case, folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            path = folder / name
            if name.endswith(".json"):
                path.write_text(path.read_text().replace("mlp.experts", live(family).split("0.")[1] + "experts"))
            else:
                renamed = {k.replace(MLP, live(family)): v for k, v in load_file(path).items()}
                save_file(renamed, path, {"format": "pt"})
        stacks = load_file(DATA / release / case / "expected.safetensors")
        return folder, apart(stacks[f"{MLP}experts.gate_up_proj"], stacks[f"{MLP}experts.down_proj"], family)

    return make


def apart(gate_up, down, family):
    """The change of each expert's gate, up and down in two stacks as the family stores them."""
    found = {}
    for e in range(E):
        whole, last = (gate_up[e].T, down[e].T) if turned(family) else (gate_up[e], down[e])
        gate, up = (whole[::2], whole[1::2]) if turned(family) else np.split(whole, 2)
        found |= {(e, "gate"): gate, (e, "up"): up, (e, "down"): last}
    return found


def together(factors, family):
    """Each stack's A [e, r, in] and B [e, out, r]."""
    A = np.stack([factors[e, "gate"][0] for e in range(E)])
    rows = [(factors[e, "gate"][1], factors[e, "up"][1]) for e in range(E)]
    mixed = np.stack([np.stack(pair, 1).reshape(-1, R) if turned(family) else np.concatenate(pair) for pair in rows])
    down = [np.stack([factors[e, "down"][n] for e in range(E)]) for n in (0, 1)]
    return {"base_layer.": (A, mixed), "": tuple(down)}


def grouped(family, folder):
    """Unsloth's: the expert slowest in lora_B, too, and a mark that says so."""
    names = [f"{live(family)}experts.{n}".split("0.")[1] for n in ("gate_up_proj", "down_proj")]
    config(folder, target_parameters=names, lora_B_layout="grouped_by_expert")
    tensors = {}
    for wrapper, (A, B) in together(truth("stack"), family).items():
        stem = f"base_model.model.{live(family)}experts.{wrapper}lora_"
        tensors |= {f"{stem}A.weight": A.reshape(-1, A.shape[2]), f"{stem}B.weight": np.concatenate(B, 1)}
    return save(folder, tensors), changes_of(truth("stack"))


def single(family, folder):
    tensors = {}
    for (e, part), (A, B) in truth("each").items():
        stem = f"base_model.model.{hub(family)}experts.{e}.{leaf(family, part)}.lora_"
        tensors |= {f"{stem}A.weight": A, f"{stem}B.weight": B}
    config(folder, target_modules=sorted({leaf(family, part) for part in PARTS}))
    return save(folder, tensors), changes_of(truth("each"))


def shared(family, folder):
    factors, tensors = truth("shared"), {}
    for part in PARTS:
        A, B = (np.stack([factors[e, part][n] for e in range(E)]) for n in (0, 1))
        A, B = (A, B[:1]) if part == "down" else (A[:1], B)
        stem = f"base_model.model.{hub(family)}experts.{leaf(family, part)}.lora_"
        tensors |= {f"{stem}A.weight": A, f"{stem}B.weight": B}
    config(folder, target_modules=[leaf(family, part) for part in PARTS])
    return save(folder, tensors), changes_of(factors)


def llama_cpp(family, folder):
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "a.gguf", FAMILIES[family]["arch"])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", R * SCALING)
    for part, n in itertools.product(PARTS, (0, 1)):
        stack = np.stack([truth("each")[e, part][n] for e in range(E)]).astype("f4")
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight.lora_{'ab'[n]}", stack)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a.gguf", changes_of(truth("each"))


def mlx(family, folder):
    folder.mkdir()
    tensors = {
        f"{mlx_stem(family)}{PROJ[part]}.lora_{'ab'[n]}": np.stack([truth("each")[e, part][n] for e in range(E)])
        for part, n in itertools.product(PARTS, (0, 1))
    }
    save_file({k: v.astype("f4") for k, v in tensors.items()}, folder / "adapters.safetensors", {"format": "mlx"})
    said = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": R, "scale": SCALING, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder, changes_of(truth("each"))


SOURCES = {
    "peft 0.18": by_peft("peft-0.18.1"), "peft": by_peft("peft-0.21.2"), "per expert": single,
    "unsloth grouped": grouped, "shared outer": shared, "gguf": llama_cpp, "mlx": mlx,
}  # fmt: skip


# Destinations: the change of each expert in a file, by the layout's own formula.


def of_stacks(order):
    def read(family, path):
        said = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        if order == "peft_0.18":
            assert said["peft_version"].startswith("0.18")
        if order == "grouped":
            assert said["lora_B_layout"] == "grouped_by_expert"
        stacks = []
        for wrapper, name in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
            stem = f"base_model.model.{live(family)}experts.{wrapper}lora_"
            A, B = (tensors[f"{stem}{side}.weight"].astype("f8") for side in "AB")
            r = len(A) // E
            A = A.reshape(E, r, -1)
            assert r == named(said.get("rank_pattern", {}), name, said["r"])
            alpha = named(said.get("alpha_pattern", {}), name, said["lora_alpha"])
            B = B.reshape(len(B), E, r).transpose(1, 0, 2) if order == "grouped" else unstacked(B, r)
            change = alpha / r * (B @ A)
            # PEFT before 0.19 takes every stack for [e, in, out], PEFT since for what the model declares.
            stacks.append(change.transpose(0, 2, 1) if order == "peft_0.18" or turned(family) else change)
        return apart(*stacks, family)

    return read


def named(pattern, name, default):
    """What a pattern of the config says of a parameter."""
    return next((value for key, value in pattern.items() if name in key), default)


def unstacked(B, r):
    return B.reshape(len(B), r, E).transpose(2, 0, 1)


def of_single(family, path):
    said, tensors = (
        json.loads((path / "adapter_config.json").read_text()),
        load_file(path / "adapter_model.safetensors"),
    )
    found = {}
    for e, part in itertools.product(range(E), PARTS):
        stem = f"base_model.model.{hub(family)}experts.{e}.{leaf(family, part)}.lora_"
        A, B = (tensors[f"{stem}{side}.weight"].astype("f8") for side in "AB")
        found[e, part] = said["lora_alpha"] / said["r"] * (B @ A)
    return found


def of_shared(family, path):
    said, tensors = (
        json.loads((path / "adapter_config.json").read_text()),
        load_file(path / "adapter_model.safetensors"),
    )
    found = {}
    for part in PARTS:
        stem = f"base_model.model.{hub(family)}experts.{leaf(family, part)}.lora_"
        A, B = (tensors[f"{stem}{side}.weight"].astype("f8") for side in "AB")
        assert (B if part == "down" else A).shape[0] == 1
        found |= {(e, part): said["lora_alpha"] / said["r"] * each for e, each in enumerate(B @ A)}
    return found


def of_llama_cpp(_, path):
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {t.name: np.array(t.data, "f8") for t in reader.tensors}
    found = {}
    for part in PARTS:
        A, B = (tensors[f"blk.0.ffn_{part}_exps.weight.lora_{side}"] for side in "ab")
        found |= {(e, part): alpha / A.shape[1] * each for e, each in enumerate(B @ A)}
    return found


def of_mlx(family, path):
    scale = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors = load_file(path / "adapters.safetensors")
    found = {}
    for part in PARTS:
        A, B = (tensors[f"{mlx_stem(family)}{PROJ[part]}.lora_{side}"].astype("f8") for side in "ab")
        found |= {(e, part): scale * each for e, each in enumerate(B @ A)}
    return found


DESTINATIONS = {
    "peft 0.18": ("peft", "peft_0.18", of_stacks("peft_0.18")),
    "peft": ("peft", None, of_stacks("peft")),
    "per expert": ("peft", "sglang", of_single),
    "unsloth grouped": ("peft", "unsloth_grouped", of_stacks("grouped")),
    "shared outer": ("shared_outer", None, of_shared),
    "gguf": ("gguf", None, of_llama_cpp),
    "mlx": ("mlx", None, of_mlx),
}


@pytest.fixture
def on_disk_at_once(monkeypatch):
    """Hundreds of small files need not be on the disk when the test ends."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("on_disk_at_once")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_becomes_every_other(family, source, tmp_path):
    below = base(family, tmp_path / "base")
    path, expected = SOURCES[source](family, tmp_path / "source")
    adapter = ak.read(path, base=below)
    stacks = adapter.bind(below)
    for number, (name, (to, profile, read)) in enumerate(DESTINATIONS.items()):
        out = tmp_path / f"{number}{'.gguf' if to == 'gguf' else ''}"
        given = stacks if to == "peft" else adapter
        ak.write(given, out, to, below, "promote", profile=profile)
        found = read(family, out)
        assert found.keys() == expected.keys()
        for key, change in expected.items():
            np.testing.assert_allclose(found[key], change, atol=1e-6 * np.abs(change).max(), err_msg=f"{name}: {key}")
        if number == list(SOURCES).index(source) - 1:
            # One of the seven a time, so that all are compared by the end: the two are one function.
            assert ak.ops.compare(ak.read(out, base=below).bind(below), stacks).equal is True, name
