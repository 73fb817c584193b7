"""PEFT's files in which one tensor or one field is not what it was: read, or refused by an error that says where."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import AdapterkitError
from adapterkit.formats.peft.families import FAMILIES

FOLDERS = sorted(path.parent for path in Path(__file__).parents[2].glob("spec/vectors/formats/peft/*/*.json"))
SHAPES = [(), (0,), (1, 1), (1, 1, 1)]
VALUES = [None, -1, 10**30, "x", {"(": 2}]


def of_families():
    types = {family.peft_type: family for family in FAMILIES.values()}
    configs = {folder: json.loads((folder / "adapter_config.json").read_text()) for folder in FOLDERS}
    return [(folder, types[config["peft_type"]]) for folder, config in configs.items() if config["peft_type"] in types]


def damages(family, config, tensors):
    for key, tensor in tensors.items():
        shapes = [*SHAPES, tensor.shape[::-1], (*tensor.shape, 1)]
        yield from ((config, tensors | {key: np.zeros(shape, tensor.dtype)}) for shape in shapes)
        yield config, tensors | {key: tensor.astype(np.float16 if tensor.dtype.kind == "i" else np.int64)}
        yield config, {other: value for other, value in tensors.items() if other != key}
    for field in {"r", *family.read} & config.keys():
        yield from ((config | {field: value}, tensors) for value in VALUES)
        yield {other: value for other, value in config.items() if other != field}, tensors


@pytest.mark.parametrize(("folder", "family"), of_families(), ids=lambda part: getattr(part, "name", ""))
def test_one_damage_at_a_time(folder, family, tmp_path):
    base = folder / "base.safetensors"
    config = json.loads((folder / "adapter_config.json").read_text())
    for changed, tensors in damages(family, config, load_file(folder / "adapter_model.safetensors")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        error = refusal(tmp_path, base if base.exists() else None)
        assert error is None or (error.cure and (error.where or error.path)), error


def refusal(folder, base):
    """What reading raises; anything but an error of ours goes through."""
    try:
        adapter = ak.read(folder, base=base)
        adapter.validate()
        adapter.check_values()
    except AdapterkitError as error:
        return error
    return None
