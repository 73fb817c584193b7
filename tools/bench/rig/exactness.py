"""Prints, as JSON, how far merged weights are from the float64 formula. Called with BASE ADAPTER MERGED [--full]."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from foreign.formulas import Rounding, read_formulas


class Weights:
    """Reads the tensors of a folder of safetensors files one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        self._home = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor


def one_of_each_kind(names: Iterable[str]) -> list[str]:
    """Return one module for each last segment of a path (`q_proj`, `up_proj`, ...): the middle one of the model."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(name.split(".")[-2], []).append(name)
    return [found[len(found) // 2] for found in kinds.values()]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("base", "adapter", "merged"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--full", action="store_true", help="check every target, not one of each kind")
    options = parser.parse_args()
    formulas = read_formulas(options.adapter)
    base, merged, rounding = Weights(options.base), Weights(options.merged), Rounding()
    for name in formulas if options.full else one_of_each_kind(formulas):
        rounding.add(name, merged[name], formulas[name](base[name].double()))
    print(json.dumps(asdict(rounding)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
