"""Writes spec/loaders/diffusers.toml: the spellings of each family's modules that diffusers' loaders convert.

    python tools/foreign/diffusers_keys.py [FAMILY...]    write the file (of all families)
    python tools/foreign/diffusers_keys.py --check        compare; exits 1 on a difference

For each spelling, the script makes a LoRA file of all modules of a family, and runs `lora_state_dict` of the family's
pipelines. A module is listed if the result has the file's change under diffusers' name. If a file with all modules is
refused, modules are omitted until a file is accepted; then each omitted module is tried again with the accepted ones.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.loaders import lora_pipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from loader_tables import exceptions, quoted  # noqa: E402

from adapterkit.core.adapter import Adapter, Target  # noqa: E402 - the checkout's own, installed or not
from adapterkit.formats._image.deciding import Origin  # noqa: E402
from adapterkit.formats._image.translate import in_diffusers  # noqa: E402
from adapterkit.io.lazy import from_numpy  # noqa: E402
from adapterkit.methods.lora import LoRA  # noqa: E402
from adapterkit.naming.architectures import fill  # noqa: E402
from adapterkit.naming.image import ImageFamily, families  # noqa: E402

OUT = ROOT / "spec" / "loaders" / "diffusers.toml"

LOADERS = {
    "sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "SD3", "auraflow": "AuraFlow", "flux": "Flux",
    "chroma": "Flux", "flux2": "Flux2", "flux3": "Flux3", "lumina2": "Lumina2", "z_image": "ZImage",
    "hidream": "HiDreamImage", "qwen_image": "QwenImage", "wan": "Wan", "hunyuan_video": "HunyuanVideo",
    "ltx": "LTXVideo", "ltx2": "LTX2", "mochi": "Mochi1", "cogvideox": "CogVideoX", "cogview4": "CogView4",
    "kandinsky5": "Kandinsky", "krea2": "Krea2", "ideogram4": "Ideogram4", "minimax_h3": "MiniMaxH3",
    "cosmos": "Anima", "ace_step": "AceStep", "sana": "Sana",
    "ernie_image": "ErnieImage",
}  # fmt: skip
"""Family -> what the class that loads its files is called before `LoraLoaderMixin`."""

ROWS = {"flux": 3072, "chroma": 3072, "hunyuan_video": 3072, "lumina2": 768}
"""Rows of one part of a fused weight, where the converter has the published model's."""

AB = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight", "alpha")

SPELLINGS = (
    ("transformer.", "diffusers", AB), ("unet.", "diffusers", AB), ("diffusion_model.", "native", AB),
    ("diffusion_model.", "native", DOWN_UP), ("transformer.", "native", AB), ("lora_unet_", "native", DOWN_UP),
    ("lora_unet_", "diffusers", DOWN_UP), ("lora_transformer_", "diffusers", DOWN_UP), ("", "native", AB),
    ("", "diffusers", AB), ("", "diffusers", DOWN_UP), ("base_model.model.", "native", AB),
    ("base_model.model.", "diffusers", AB), ("diffusion_model.", "diffusers", AB),
)  # fmt: skip
"""What keys begin with, whose names follow, and the slots."""


PARAMETERS = (".modulation", "scale_shift_table")
"""How the names of tables of shifts and scales end, which are parameters of a block."""


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", default=LOADERS)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    text = toml(arguments.families)
    if arguments.check:
        same = OUT.exists() and OUT.read_text() == text
        print("same" if same else "DIFFERENT")
        return int(not same)
    OUT.write_text(text)
    return 0


def toml(names: Iterable[str]) -> str:
    """The file's text."""
    found: dict[tuple[str, str, tuple[str, ...]], dict[str, tuple[list[str], list[str]]]] = {}
    for family in families():
        if family.name in names:
            for spelling in SPELLINGS:
                paths, held = spelled(family, *spelling)
                if held:
                    found.setdefault(spelling, {})[family.name] = paths, [path for path in paths if path not in held]
    lines = [HEADER.format(version=diffusers.__version__)]
    for (prefix, naming, slots), held in found.items():
        ends = PEFT if naming == "diffusers" and prefix in ("transformer.", "unet.") else slots
        lines += ["[[keys]]", f'prefix = "{prefix}"', f'naming = "{naming}"']
        lines += [f"slots = {quoted(ends)}", f"families = {quoted(held)}"]
        lines += exceptions(held)
    return "\n".join(lines)


def spelled(family: ImageFamily, prefix: str, naming: str, slots: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """All modules of a naming, and those of which diffusers makes the same as the family's file says."""
    known = naming in family.namings and (prefix not in ("transformer.", "unet.") or family.component in (prefix[:-1],))
    if not known or (family.component == "unet" and prefix == "lora_transformer_"):
        return [], []
    shapes = sizes(family, naming)
    held = same(family, prefix, naming, slots, shapes)
    if held is None:
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for path, shape in shapes.items():
            groups.setdefault(path.partition(".")[0], {})[path] = shape
        kept: dict[str, tuple[int, int]] = {}
        singles = [{path: shape} for path, shape in shapes.items()]
        for group in [*sorted(groups.values(), key=len, reverse=True), *singles]:
            more = same(family, prefix, naming, slots, {**kept, **group})
            if more is not None and len(more) > len(held or ()):
                kept, held = {**kept, **group}, more
    return list(shapes), held or []


def sizes(family: ImageFamily, naming: str) -> dict[str, tuple[int, int]]:
    """Template of a module that is no norm -> rows and columns of its weight."""
    found = {}
    unit = ROWS.get(family.name, 12)
    for weight in family.architecture.record.weights:
        place = family.architecture.place(weight, naming)
        other = family.architecture.place(weight, "diffusers" if naming == "native" else "native")
        if place is None or (other is None and naming == "native") or any(map(_is_norm, filter(None, (place, other)))):
            continue
        parts = max(place.of or 1, *(each.of or 1 for each in (place, other) if each))
        found[place.name] = (unit * parts, 4)
    return found


def _is_norm(place: Any) -> bool:
    if place.name.endswith(PARAMETERS):
        return True  # No LoRA adapts a parameter that is no module's.
    words = place.name.split(".")[-2:]
    return any("norm" in word for word in words) and words[-1] not in ("1", "2") and "linear" not in words[-1]


def same(
    family: ImageFamily, prefix: str, naming: str, slots: tuple[str, ...], shapes: Mapping[str, tuple[int, int]]
) -> list[str] | None:
    """The modules of which diffusers makes what the family's file says; None where it refuses the file."""
    rng, held, updates, names = np.random.default_rng(0), dict[str, Any](), {}, {}
    for path, (out, columns) in shapes.items():
        name = names[path] = fill(path, {f"{{{hole}}}": "0" for hole in "nmkej"})
        A, B = (rng.integers(-4, 5, size=size).astype("f4") for size in ((2, columns), (out, 2)))
        stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        held |= {f"{stem}.{slots[0]}": A, f"{stem}.{slots[1]}": B}
        if len(slots) > 2:
            held[f"{stem}.{slots[2]}"] = np.array(1.0, "f4")
        scaling = 0.5 if len(slots) > 2 else 1.0
        updates[Target(f"{family.component}.{name}")] = (LoRA(A=from_numpy(A), B=from_numpy(B), scaling=scaling),)
    try:
        made = converted(family, {key: torch.from_numpy(value) for key, value in held.items()})
    except Exception:
        return None
    found = []
    for path, name in names.items():
        target = Target(f"{family.component}.{name}")
        moved, lost = in_diffusers({target: updates[target]}, (), Origin(naming, (family.name,)))
        ours = {} if lost else {str(t): Adapter({t: each}).delta(t.path).numpy() for t, each in moved.items()}
        if ours and all(t in made and np.array_equal(made[t], delta) for t, delta in ours.items()):
            found.append(path)
    return found


def converted(family: ImageFamily, held: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Module -> the change that diffusers' loader makes of a file."""
    loader = getattr(lora_pipeline, f"{LOADERS[family.name]}LoraLoaderMixin")
    given = dict(held)
    if family.component == "unet":
        config = {
            "layers_per_block": 2,
            "block_out_channels": [320, 640, 1280, 1280][: 3 if family.name == "sdxl" else 4],
        }
        made, alphas = loader.lora_state_dict(given, unet_config=type("Config", (), config)())
    elif family.name in ("flux", "chroma"):
        made, alphas = loader.lora_state_dict(given, return_alphas=True)
    else:
        made, alphas = loader.lora_state_dict(given), None
        made = made[0] if isinstance(made, tuple) else made
    found = {}
    for key, value in made.items():
        for a, b in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora.down.weight", ".lora.up.weight"),
            ("_lora.down.weight", "_lora.up.weight"),
        ):
            if key.endswith(a):
                module = key.removesuffix(a)
                alpha = (
                    next((alphas[name] for name in (f"{module}.alpha", f"{key}.alpha") if name in alphas), None)
                    if alphas
                    else None
                )
                scale = 1.0 if alpha is None else float(alpha) / len(value)
                name = module.replace(".processor.", ".")
                name = f"{name}.0" if name.endswith(".to_out") and ".processor." in module else name
                found[name] = (made[module + b].double() @ value.double() * scale).numpy().astype("f4")
    return found


PEFT = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight")
"""The slots of diffusers' own spelling, that of PEFT."""

HEADER = """\
# Made by tools/foreign/diffusers_keys.py and reviewed. README.md beside this file says what each field means.
format = 1
title = "diffusers"
url = "https://github.com/huggingface/diffusers"
version = "{version}"
sources = ["diffusers/loaders/lora_pipeline.py", "diffusers/loaders/lora_conversion_utils.py"]
containers = ["safetensors", "torch"]
convert = ["diffusers"]
unread = "drops them, most with a warning, or refuses the file"
encoders = [
    {{ prefix = "text_encoder.", names = ["clip"], slots = ["lora_A.weight", "lora_B.weight"] }},
    {{ prefix = "text_encoder_2.", names = ["clip"], slots = ["lora_A.weight", "lora_B.weight"] }},
    {{ prefix = "lora_te_", names = ["clip"], slots = ["lora_down.weight", "lora_up.weight", "alpha"] }},
    {{ prefix = "lora_te1_", names = ["clip"], slots = ["lora_down.weight", "lora_up.weight", "alpha"] }},
    {{ prefix = "lora_te2_", names = ["clip"], slots = ["lora_down.weight", "lora_up.weight", "alpha"] }},
]
files = [
    {{ format = "xlabs", families = ["flux"] }}, {{ format = "bfl_control", families = ["flux"] }},
    {{ format = "textual_inversion" }},
]

[[keys]]
prefix = "transformer."
naming = "diffusers"
families = ["flux2", "z_image"]
slots = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"]

[[keys]]
prefix = "transformer."
naming = "diffusers_fused"
families = ["flux2"]
slots = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"]

[[keys]]
prefix = "diffusion_model."
naming = "native"
families = ["flux2"]
slots = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"]

[[keys]]
prefix = "diffusion_model."
naming = "diffusers"
families = ["z_image"]
slots = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"]

[[keys]]
prefix = "diffusion_model."
naming = "native"
families = ["wan"]
slots = ["diff_b"]
"""

if __name__ == "__main__":
    sys.exit(main())
