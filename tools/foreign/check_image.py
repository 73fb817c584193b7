"""Checks that tools for image models load adapterkit's files, and compute the same as adapterkit's formulas.

    python tools/foreign/check_image.py

LyCORIS and diffusers (0.42.1) load files that adapterkit wrote without the extra data of the original files. The output
of every adapted layer is compared with the update's formula. The script prints a line per case, and exits with 1 if a
case differs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from image_vectors import DEST, unet
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.io.lazy import as_torch

TOLERANCE = 1e-5

SKIPPED = {
    "tlora", "flux", "oft_flux", "ia3", "ia3_inputs", "lokr_tucker", "dora_inputs", "loha_dora_inputs",
    "lokr_dora_inputs",
}  # fmt: skip
"""Cases that adapterkit refuses, of no U-Net, or that LyCORIS' own loader breaks on: IA3, LoKr with a core, norms over
inputs."""


def main() -> int:
    """Runs every case; returns the exit code."""
    worst = {}
    for folder in sorted((DEST / "lycoris").iterdir()) + sorted((DEST / "kohya").iterdir()):
        if folder.name not in SKIPPED:
            worst[f"lycoris loads {folder.name}"] = lycoris(folder / "expected.native.safetensors")
    for folder in [*sorted((DEST / "diffusers").iterdir()), DEST / "kohya" / "locon", DEST / "kohya" / "dora"]:
        worst[f"diffusers loads {folder.parent.name}/{folder.name}"] = diffusers(folder / "expected.native.safetensors")
    for case, error in worst.items():
        print(f"{'ok' if error <= TOLERANCE else 'WRONG'} {case}: {error:.1e}")
    return int(any(not error <= TOLERANCE for error in worst.values()))


def lycoris(native: Path) -> float:
    """The largest relative error of LyCORIS' outputs, from a file of the format that bears its name."""
    adapter = ak.read(native)
    model = unet()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save_file(dict(model.state_dict()), Path(folder, "base.safetensors"))
        ak.write(adapter, path, format="lycoris", base=Path(folder, "base.safetensors"))
        state = {key.replace("lora_unet_", "lycoris_", 1): value for key, value in load_file(path).items()}
    network, _ = create_lycoris_from_weights(1.0, "", model, weights_sd=state)
    network.apply_to()
    loras = {lora.lora_name: lora for lora in network.loras}
    names = {
        str(target): "lycoris_" + target.path.removeprefix("unet.").replace(".", "_") for target in adapter.updates
    }
    return max(
        _error(updates, unet(), target.path, loras[names[str(target)]]) for target, updates in adapter.updates.items()
    )


def diffusers(native: Path) -> float:
    """The largest relative error of the outputs of diffusers' layers, from a file of its own format."""
    adapter, model = ak.read(native), unet()
    with tempfile.TemporaryDirectory() as folder:
        ak.write(adapter, Path(folder), format="diffusers")
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(folder, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
    inside = {target: model.get_submodule(target.path.removeprefix("unet.")) for target in adapter.updates}
    return max(_error(updates, unet(), t.path, inside[t]) for t, updates in adapter.updates.items())


def _error(updates: Sequence[Any], base: nn.Module, path: str, tool: Any) -> float:
    layer = base.get_submodule(path.removeprefix("unet."))
    W = layer.weight.detach()
    torch.manual_seed(5)
    x = torch.randn(2, W.shape[1], 5, 5) if W.ndim == 4 else torch.randn(2, W.shape[-1])
    with torch.no_grad():
        got = tool(x).double()
    formulas = [update.map(lambda leaf: as_torch(leaf).double()) for update in updates]
    wanted = _formula(formulas, layer, W.double(), x.double())
    return float((got - wanted).abs().max() / wanted.abs().max())


def _formula(formulas: Sequence[Any], layer: Any, W: Tensor, x: Tensor) -> Tensor:
    b = torch.zeros(len(W)).double() if layer.bias is None else layer.bias.detach().double()
    new, bias = W, b
    for formula in formulas:
        new, bias = (
            formula.new_weight(new) if formula.changes_weight else new,
            formula.new_bias(bias) if formula.changes_bias else bias,
        )
    if W.ndim == 1:
        return functional.layer_norm(x, W.shape, new, bias)
    return functional.conv2d(x, new, bias, padding=1) if W.ndim == 4 else functional.linear(x, new, bias)


if __name__ == "__main__":
    sys.exit(main())
