"""Compares spec/architectures/namings with the tools' converters; exits with 1 if they differ.

    python tools/foreign/check_namings.py FOLDER

FOLDER has the sources of torchtune and litgpt, such as their unpacked wheels. The script does not run them: it reads
the dictionaries of names in their converters from the source.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

NAMINGS = Path(__file__).resolve().parents[2] / "spec" / "architectures" / "namings"
SOURCES = {
    "torchtune": "torchtune/models/convert_weights.py",
    "torchtune_qwen2": "torchtune/models/qwen2/_convert_weights.py",
    "litgpt": "litgpt/scripts/convert_hf_checkpoint.py",
}
"""Name of a file -> where the tool maps transformers' names to its own."""


def pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The pairs of names in all dictionaries of a module, without `.weight`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                ours, theirs = (str(each.value).removesuffix(".weight").replace("{}", "{n}") for each in (key, value))
                yield ours, theirs


def main() -> int:
    """Compare each file and print what differs."""
    failed = 0
    for name, source in SOURCES.items():
        found = tomllib.loads((NAMINGS / f"{name}.toml").read_text("utf-8"))["weights"]
        known = set(pairs(next(Path(sys.argv[1]).rglob(source))))
        for key, place in found.items():
            whole = place if isinstance(place, str) else place["name"]
            # litgpt joins queries, keys and values by code of its own, not by a dictionary.
            if (key, whole) not in known and not (isinstance(place, dict) and "qkv" in place):
                failed += 1
                print(f"{name}: {key} is not {whole}")
        print(f"{name}: {len(found)} names compared")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
