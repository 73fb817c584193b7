"""Writes spec/loaders/stable_diffusion_cpp.toml: the keys that stable-diffusion.cpp converts.

    python tools/foreign/sdcpp_keys.py CHECKOUT PROGRAM            write the file
    python tools/foreign/sdcpp_keys.py CHECKOUT PROGRAM --check    compare; exits 1 on a difference

CHECKOUT is a folder with the tool's source, whose `src/model.h` numbers the models. PROGRAM takes the number of a model
as its argument; for each line of its input, it prints the result of the tool's `convert_tensor_name`. A spelling of a
module is listed if its keys are converted to the weight, and the part of the weight, that the family's file gives under
the authors' names.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from comfyui_keys import is_norm
from loader_tables import exceptions, quoted, write_or_compare

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "spec" / "loaders" / "stable_diffusion_cpp.toml"

MODELS = {
    "sd": "SD1", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX", "flux2": "FLUX2", "chroma": "FLUX", "wan": "WAN2",
    "qwen_image": "QWEN_IMAGE", "z_image": "Z_IMAGE", "cosmos": "ANIMA", "ltx2": "LTXAV", "minimax_h3": "MINIMAX_H3",
    "ernie_image": "ERNIE_IMAGE", "krea2": "KREA2", "ideogram4": "IDEOGRAM4", "longcat_image": "LONGCAT",
    "ovis_image": "OVIS_IMAGE", "hunyuan_video": "HUNYUAN_VIDEO",
}  # fmt: skip
"""Family -> the tool's name of the model, without `VERSION_`."""

SPELLINGS = [
    ("transformer.", "diffusers"), ("unet.", "diffusers"), ("diffusion_model.", "native"),
    ("model.diffusion_model.", "native"), ("diffusion_model.", "diffusers"), ("lora_unet_", "native"),
    ("lora_unet_", "diffusers"), ("lora_transformer_", "diffusers"), ("lycoris_", "diffusers"), ("", "diffusers"),
    ("base_model.model.", "diffusers"),
]  # fmt: skip
SLOTS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora.down.weight", "lora.up.weight", "lora_A.weight",
    "lora_B.weight", "lora_A.default.weight", "lora_B.default.weight", "lora_A", "lora_B", "alpha", "diff", "hada_w1_a",
    "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2",
    "lokr_w2_a", "lokr_w2_b",
)  # fmt: skip

HEAD = """# Made by tools/foreign/sdcpp_keys.py from the tool's own conversion of names. README.md explains the fields.
format = 1
title = "stable-diffusion.cpp"
url = "https://github.com/leejet/stable-diffusion.cpp"
version = "97d2990 (August 2026)"
sources = ["src/name_conversion.cpp", "src/model/adapter/lora.hpp"]
convert = ["comfyui", "kohya", "diffusers"]
unread = "lists them as unused and omits them"
encoders = [
    { prefix = "lora_te_", names = ["clip"] }, { prefix = "lora_te1_", names = ["clip"] },
    { prefix = "lora_te2_", names = ["clip"] },
]
"""


def held(program: Path, number: int, name: str, prefix: str, naming: str) -> tuple[list[str], list[str]]:
    """All modules of a family under this naming, and those whose keys become no weight of the model."""
    from adapterkit.naming.image import families

    family = next(each for each in families() if each.name == name)
    if family.wanted(naming) not in family.namings:
        return [], []
    paths = {}
    for weight in family.architecture.record.weights:
        place = family.architecture.place(weight, family.wanted(naming))
        if place is not None and not is_norm(place.name) and not is_norm(weight):
            paths[place.name] = re.sub(r"\{\w\}", "1", place.name)
    stems = {path: prefix + (path.replace(".", "_") if prefix.endswith("_") else path) for path in paths.values()}
    given = [f"lora.{stem}.{word}" for stem in stems.values() for word in ("lora_down.weight", "alpha")]
    asked = [program, str(number)]
    made = subprocess.run(asked, input="\n".join(given) + "\n", capture_output=True, text=True, check=True)
    named = dict(zip(given, made.stdout.splitlines(), strict=True))
    lost = []
    for template, path in paths.items():
        stem = stems[path]
        wanted = _wanted(family, naming, path)
        if not wanted or any(
            named[f"lora.{stem}.{word}"] not in {f"lora.model.diffusion_model.{each}.{end}" for each in wanted}
            for word, end in (("lora_down.weight", "lora_down"), ("alpha", "alpha"))
        ):
            lost.append(template)
    return list(paths), lost


def _wanted(family: Any, naming: str, path: str) -> set[str]:
    """The names that the tool may give a module: the authors', with the number of the part of a fused weight."""
    if family.wanted(naming) == "native" or "native" not in family.namings:
        return {f"{path}.weight"}
    pieces = family.moves(path, family.wanted(naming), "native")
    if len(pieces) != 1:
        return set()
    piece = pieces[0]
    if piece.there.whole:
        return {f"{piece.path}.weight"}
    # The first part has no number.
    number = piece.there.start
    return {f"{piece.path}.weight" if not number else f"{piece.path}.weight.{number}"}


def toml(checkout: Path, program: Path) -> str:
    """The file's text."""
    body = (checkout / "src" / "model.h").read_text().partition("enum SDVersion {")[2].partition("}")[0]
    numbers = {name: number for number, name in enumerate(re.findall(r"VERSION_(\w+)", body))}
    lines = [HEAD + f"slots = {quoted(SLOTS)}", ""]
    for prefix, naming in SPELLINGS:
        found = {}
        for name, version in MODELS.items():
            paths, lost = held(program, numbers[version], name, prefix, naming)
            if len(lost) < len(paths):
                found[name] = paths, lost
        if found:
            lines += ["[[keys]]", f'prefix = "{prefix}"', f'naming = "{naming}"', f"families = {quoted(found)}"]
            lines += exceptions(found)
    return "\n".join(lines)


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    text = toml(arguments.checkout, arguments.program)
    return write_or_compare(OUT, text, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
