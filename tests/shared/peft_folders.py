"""Folders that PEFT saved, for tests that change them and read them again."""

import copy
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file


def train(folder, build, config, name="peft"):
    """Return a plain model, the folder that PEFT saves for it with changed trained values, and the base's file."""
    torch.manual_seed(3)
    model = build().eval()
    wrapped = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder / name))
    save_file(model.state_dict(), folder / "base.safetensors", {"format": "pt"})
    return model, folder / name, folder / "base.safetensors"


def merged(model, folder):
    """Return the weights of PEFT's merge of a folder."""
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload().state_dict()


def contents(folder):
    """Return the bytes of a folder's config and tensors."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("adapter_")}


def edit(folder, **changes):
    """Change fields of a folder's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
