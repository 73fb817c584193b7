"""Runs axolotl's shard-wise merge of a LoRA alone: `python axolotl_merge.py BASE ADAPTER OUT`.

The command `axolotl merge-lora` imports axolotl's trainer, which needs CUDA libraries. The function that merges only
needs torch, PEFT and transformers, so this script loads its file without the packages around it.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

PLACE = "axolotl/cli/utils/lora_merge.py"


def merging() -> Any:
    """Load the module; its only import from its own package is for a logger."""
    loggers = types.ModuleType("axolotl.utils.logging")
    loggers.get_logger = logging.getLogger  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["axolotl.utils.logging"] = loggers
    spec = importlib.util.spec_from_file_location("lora_merge", Path(str(distribution("axolotl").locate_file(PLACE))))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    merging().merge_lora_sharded_efficient(*sys.argv[1:4])
