"""Writes tests/data/kohya_split: split LoRAs of FLUX's fused weights, by the module of sd-scripts.

    python tools/foreign/kohya_split.py SD_SCRIPTS/networks/lora_flux.py [DEST]

The script only executes the class `LoRAModule` and the method `LoRANetwork.state_dict` of that file, on layers with 4
and 8 features instead of FLUX's 3072 and 12288.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

DEST = Path(__file__).resolve().parents[2] / "tests" / "data" / "kohya_split"
PARTS = {"lora_unet_double_blocks_0_img_attn_qkv": [4, 4, 4], "lora_unet_single_blocks_1_linear1": [4, 4, 4, 8]}


def classes(path: Path) -> dict[str, Any]:
    """The two classes, with what is needed of them."""
    kept = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "LoRANetwork":
            node.body = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "state_dict"]
            kept.append(node)
        elif isinstance(node, ast.ClassDef) and node.name == "LoRAModule":
            kept.append(node)
    names = ("Optional", "List", "Dict", "Union", "Tuple", "Type")
    scope: dict[str, Any] = {"torch": torch, "math": math} | {
        name: getattr(__import__("typing"), name) for name in names
    }
    exec(compile(ast.Module(kept, []), str(path), "exec"), scope)
    return scope


def main() -> int:
    """Writes the adapter, and the layers beside inputs and outputs."""
    found, dest = classes(Path(sys.argv[1])), Path(sys.argv[2]) if len(sys.argv) > 2 else DEST
    dest.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network, held = found["LoRANetwork"](), {}
    network.split_qkv = True
    network.get_qkv_mlp_split_dims = lambda: PARTS["lora_unet_single_blocks_1_linear1"]
    for name, parts in PARTS.items():
        layer, x = nn.Linear(4, sum(parts)), torch.randn(3, 4)
        held |= {f"{name}.weight": layer.weight.data.clone(), f"{name}.bias": layer.bias.data.clone(), f"{name}.x": x}
        module = found["LoRAModule"](name, layer, lora_dim=2, alpha=3.0, split_dims=parts)
        for parameter in module.lora_up.parameters():
            parameter.data = torch.randn(parameter.shape)
        module.apply_to()
        held[f"{name}.y"] = layer(x).detach()
        network.add_module(name, module)
    said = {"ss_network_module": "networks.lora_flux", "ss_network_args": json.dumps({"split_qkv": "True"})}
    state = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    save_file(state, dest / "adapter.safetensors", said)
    save_file(held, dest / "forward.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
