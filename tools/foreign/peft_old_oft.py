"""Writes spec/vectors/formats/peft/oft_before_0_18_terms_*: OFT with a series, saved and computed by PEFT 0.17.1.

    python tools/foreign/peft_old_oft.py [DEST]

PEFT 0.18 ends the series differently; only `peft_version` in a file shows the difference. Beside each folder are

    expected.native.safetensors   the adapter, built by hand from the module that PEFT holds in memory
    forward.safetensors           weight W and bias b of the adapted layer, input x, and PEFT's own output y

Run it in an environment with PEFT 0.17.1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak

DEST = Path(__file__).resolve().parents[2] / "spec" / "vectors" / "formats" / "peft"


def main() -> None:
    """Writes a folder for each number of terms."""
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    for terms in (1, 2, 3, 4, 6):
        torch.manual_seed(terms)
        layer = nn.Linear(8, 6)
        config = peft.OFTConfig(
            oft_block_size=4, target_modules=["q"], use_cayley_neumann=True, num_cayley_neumann_terms=terms
        )
        model = peft.get_peft_model(nn.ModuleDict({"q": layer}), config).eval()
        pairs = model.base_model.model["q"].oft_R["default"].weight
        with torch.no_grad():
            pairs.copy_(0.3 * torch.randn_like(pairs))
            x = torch.randn(3, 8)
            y = model.base_model.model["q"](x)
        folder = dest / f"oft_before_0_18_terms_{terms}"
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        numbers = {"W": layer.weight, "b": layer.bias, "x": x, "y": y}
        save_file({name: t.detach().clone() for name, t in numbers.items()}, folder / "forward.safetensors")
        update = ak.METHODS["oft"](pairs=pairs.detach().clone(), terms=terms, doubled=True)
        read = ak.Adapter({ak.Target("q"): (update,)}, None, (ak.Step("read", {"format": "peft"}),))
        ak.write(read, folder / "expected.native.safetensors")


if __name__ == "__main__":
    main()
