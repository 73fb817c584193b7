"""Folders that the adapters library saved."""

import json
from pathlib import Path

import adapterkit as ak

ROOT = Path(__file__).parents[2] / "spec" / "vectors" / "formats" / "adapterhub"

FOLDERS = sorted(path.parent for path in ROOT.glob("*/adapter_config.json"))


def compat(folder):
    """What reading this folder needs: the library never writes what tells NoReFT from DiReFT."""
    return "noreft" if folder.name == "noreft_gpt2" else None


def read_folder(folder):
    """A vector's adapter; the base tells the heads of a prefix."""
    return ak.read(folder, compat=compat(folder), base=ROOT / "models" / model_of(folder))


def model_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["model_type"]
