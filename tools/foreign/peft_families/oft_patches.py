"""OFT on a convolution with a kernel: that it is one only the base tells."""

from __future__ import annotations

from typing import Any

from peft import OFTConfig

CASES = {"oft_patches": ("Square", OFTConfig(oft_block_size=4, target_modules=["conv"]))}
NEEDS_BASE = True


def update_of(_path: str, _module: Any, _config: Any) -> Any:
    """None: the module is OFT's, see `oft`."""
    return None
