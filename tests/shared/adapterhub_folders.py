"""Folders that the adapters library saved."""

import json
from pathlib import Path

import adapterkit as ak

ROOT = Path(__file__).parents[2] / "spec" / "vectors" / "formats" / "adapterhub"

FOLDERS = sorted(path.parent for path in ROOT.glob("*/adapter_config.json"))


def compat(folder):
    """Return the options for reading this folder: the library does not write whether a folder is NoReFT or DiReFT."""
    return "noreft" if folder.name == "noreft_gpt2" else None


def read_folder(folder):
    """Read a vector's adapter; the number of heads of a prefix comes from the base."""
    return ak.read(folder, compat=compat(folder), base=ROOT / "models" / model_of(folder))


def model_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["model_type"]
