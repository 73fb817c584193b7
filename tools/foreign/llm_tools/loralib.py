"""loralib: plain, merged, embedding and convolution layers of its own."""

import json

import loralib
import numpy as np
import torch
from torch import nn

from .base import randomize

CASES = {"layers": ("plain", "attn", "wte"), "convolution": ("conv",)}
ONE_WAY = {"convolution"}
"""Cases that nothing is written back of: a LoRA of a larger rank is no Conv2d of loralib's."""

FILE = "lora.pt"


class Layers(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.plain = loralib.Linear(12, 8, r=2, lora_alpha=4)
        self.attn = loralib.MergedLinear(8, 24, r=2, lora_alpha=4, enable_lora=[True, False, True])
        self.wte = loralib.Embedding(10, 6, r=2, lora_alpha=4)
        self.conv = loralib.Conv2d(4, 6, 3, r=2, lora_alpha=4)


def own_base():
    """Their weights."""
    torch.manual_seed(0)
    return {n: p.detach().numpy().copy() for n, p in Layers().named_parameters() if n.endswith(".weight")} | {
        "conv.weight": torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(5)).numpy()
    }


def _load(model, base):
    state = {name.replace("conv.weight", "conv.conv.weight"): torch.from_numpy(value) for name, value in base.items()}
    model.load_state_dict(state, strict=False)


def write(folder, base, case):
    """Lets the tool save an adapter."""
    model = Layers()
    _load(model, base)
    randomize(p for name, p in model.named_parameters() if "lora_" in name)
    state = {n: v for n, v in loralib.lora_state_dict(model).items() if n.startswith(CASES[case])}
    torch.save(state, folder / FILE)
    settings = {"alpha": 4} if case == "convolution" else {"alpha": 4, "enable_lora": [True, False, True]}
    (folder / "loralib.json").write_text(json.dumps(settings))


def merged(folder, base):
    """What the tool loads from a folder, folded into the base."""
    model = Layers()
    _load(model, base)
    state = torch.load(folder / FILE, weights_only=True)
    model.load_state_dict(state, strict=False)
    names = {name.partition(".")[0] for name in state}
    result = {}
    if "conv" in names:
        conv = model.conv
        # Its Conv2d calls `train` with an argument that another class lacks; the sum is what it computes.
        fold = (conv.lora_B @ conv.lora_A).view(conv.conv.weight.shape) * conv.scaling
        result["conv.weight"] = conv.conv.weight + fold
    for name in names - {"conv"}:
        layer = getattr(model, name)
        layer.train(True)
        layer.eval()
        result[f"{name}.weight"] = layer.weight
    return {name: np.asarray(value.detach()) for name, value in result.items()}
