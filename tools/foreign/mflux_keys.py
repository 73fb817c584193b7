"""Writes spec/loaders/mflux.toml: the keys that mflux's mappings match.

    python tools/foreign/mflux_keys.py CHECKOUT            write the file
    python tools/foreign/mflux_keys.py CHECKOUT --check    compare; exits 1 on a difference

CHECKOUT is a folder with mflux's source; it needs the package `mlx`, which also has a build for CPUs. mflux's
`LoRALoader` matches every spelling of every module in spec/architectures. If it splits a fused weight, the rows must be
those in the family's file.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path
from typing import Any

from comfyui_keys import is_norm
from loader_tables import exceptions, quoted, write_or_compare

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "spec" / "loaders" / "mflux.toml"

MAPPINGS = {
    "flux": "flux.weights.flux", "flux2": "flux2.weights.flux2", "qwen_image": "qwen.weights.qwen",
    "z_image": "z_image.weights.z_image", "krea2": "krea2.weights.krea2",
    "ideogram4": "ideogram4.weights.ideogram4", "ernie_image": "ernie_image.weights.ernie",
}  # fmt: skip
"""Family -> the module with its mapping, without its end."""

SPELLINGS = [
    (prefix, naming)
    for prefix in ("", "transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "lora_transformer_")
    for naming in ("diffusers", "native", "comfyui")
]
PAIRS = {
    ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"), ("lora_A", "lora_B"),
    ("lora_A.default.weight", "lora_B.default.weight"), ("lora.down.weight", "lora.up.weight"),
}  # fmt: skip
SLOTS = [*(slot for pair in sorted(PAIRS) for slot in pair), "alpha"]

HEAD = """# Made by tools/foreign/mflux_keys.py from the tool's own mappings. README.md explains the fields.
format = 1
title = "mflux"
url = "https://github.com/filipstrand/mflux"
version = "{version}"
sources = ["src/mflux/models/*/weights/*_lora_mapping.py", "src/mflux/models/common/lora/mapping/lora_loader.py"]
containers = ["safetensors"]
convert = ["diffusers", "comfyui", "kohya"]
unread = "omits them and prints a line about it"
"""


def held(name: str, prefix: str, naming: str) -> dict[str, frozenset[str]]:
    """Template of a module under this naming -> the slots behind it that mflux matches."""
    from adapterkit.naming.image import families

    family = next(each for each in families() if each.name == name)
    if family.wanted(naming) not in family.namings or (naming == "comfyui" and family.wanted(naming) == "native"):
        return {}
    found = {}
    for weight in family.architecture.record.weights:
        place = family.architecture.place(weight, family.wanted(naming))
        if place is None or is_norm(place.name) or is_norm(weight):
            continue
        path = place.name
        for letter in "nmkj":
            path = path.replace(f"{{{letter}}}", "1")
        stem = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        slots = {
            slot for slot in SLOTS if (ways := _matched(name, f"{stem}.{slot}")) and _right(family, naming, path, ways)
        }
        pairs = {pair for pair in PAIRS if slots.issuperset(pair)}
        found[place.name] = frozenset({slot for pair in pairs for slot in pair} | ({"alpha"} & slots))
    return found


def _mapping(name: str, _known: dict[str, Any] = {}) -> Any:  # noqa: B006 - a cache
    if name not in _known:
        for package in ("", ".weights"):
            _bare(f"mflux.models.{MAPPINGS[name].partition('.')[0]}{package}")
        module = importlib.import_module(f"mflux.models.{MAPPINGS[name]}_lora_mapping")
        kind = next(
            each for word, each in vars(module).items() if word.endswith("LoRAMapping") and word != "LoRAMapping"
        )
        loader = importlib.import_module("mflux.models.common.lora.mapping.lora_loader").LoRALoader
        index: dict[str, list[Any]] = {}
        for each in loader._build_pattern_mappings(kind.get_mapping()):
            index.setdefault(each.source_pattern.replace("{block}", "1"), []).append(each)
        _known[name] = loader, index
    return _known[name]


def _bare(package: str) -> None:
    """Enter a package without what its `__init__` imports, which is the whole tool."""
    folder = next(Path(each) / package.replace(".", "/") for each in sys.path if (Path(each) / "mflux").is_dir())
    made = types.ModuleType(package)
    made.__path__ = [str(folder)]
    sys.modules.setdefault(package, made)


def _matched(name: str, key: str) -> list[Any]:
    """The patterns of a family's mapping that a key matches."""
    loader, index = _mapping(name)
    return [each for each in index.get(key, ()) if loader._match_pattern(key, each.source_pattern) is not None]


def _right(family: Any, naming: str, path: str, ways: list[Any]) -> bool:
    """Whether a fused weight is cut where the family's file says; also true where nothing is cut."""
    import mlx.core as mx

    pieces = family.moves(path, family.wanted(naming), "diffusers")
    cuts = [way for way in ways if way.matrix_name == "lora_B" and way.transform is not None]
    if not cuts or not pieces:
        return True
    sizes = {"flux": 3072}
    unit = sizes.get(family.name, 128 * pieces[0].here.of)
    rows = unit * pieces[0].here.of
    wanted = [list(range(piece.here.start * unit, piece.here.stop * unit)) for piece in pieces]
    given = mx.arange(rows)[:, None]
    return sorted([int(value) for value in way.transform(given)[:, 0].tolist()] for way in cuts) == wanted


def toml(checkout: Path) -> str:
    """The file's text."""
    import tomllib

    version = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["version"]
    lines = [HEAD.format(version=version) + f"slots = {quoted(SLOTS)}", ""]
    for prefix, naming in SPELLINGS:
        for name in MAPPINGS:
            there = held(name, prefix, naming)
            for slots in sorted({own for own in there.values() if own}, key=sorted):
                lost = [path for path, own in there.items() if own != slots]
                lines += ["[[keys]]", f'prefix = "{prefix}"', f'naming = "{naming}"', f'families = ["{name}"]']
                lines += [f"slots = {quoted(slot for slot in SLOTS if slot in slots)}"]
                lines += exceptions({name: (list(there), lost)})
    return "\n".join(lines)


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(arguments.checkout / "src")]
    text = toml(arguments.checkout)
    return write_or_compare(OUT, text, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
