"""Writes `slots`, `encoders` and `keys` of spec/loaders/onetrainer.toml: the keys that OneTrainer loads.

    python tools/foreign/onetrainer_keys.py CHECKOUT            write the file
    python tools/foreign/onetrainer_keys.py CHECKOUT --check    compare; exits 1 on a difference

CHECKOUT is a folder with OneTrainer's source; it needs the package `parse`. diffusers' models are created with their
usual number of blocks and without memory for weights (torch's meta device). Every spelling of every module is loaded by
the trainer's `LoRALoaderMixin`, with numbers that identify each row. A spelling is listed if the rows arrive at the
modules of diffusers that spec/architectures gives, so names, splits and orders are checked, too. A slot is listed if
the loader assigns it to a parameter of one of the trainer's modules. A text encoder's prefix is listed if a module with
that prefix arrives at this encoder.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comfyui_keys import is_norm
from loader_tables import exceptions, quoted, write_or_compare
from trainer_keys import ABSENT, Absent

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "spec" / "loaders" / "onetrainer.toml"

SDXL = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}  # fmt: skip
TWO = {"num_layers": 2, "num_single_layers": 2}

MODELS: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "sd": ("StableDiffusionModel", "STABLE_DIFFUSION_15", "unet", "UNet2DConditionModel", {"cross_attention_dim": 768}),
    "sdxl": ("StableDiffusionXLModel", "STABLE_DIFFUSION_XL_10_BASE", "unet", "UNet2DConditionModel", SDXL),
    "sd3": ("StableDiffusion3Model", "STABLE_DIFFUSION_35", "transformer", "SD3Transformer2DModel",
            {"num_layers": 3, "dual_attention_layers": (0,)}),
    "flux": ("FluxModel", "FLUX_DEV_1", "transformer", "FluxTransformer2DModel", TWO | {"guidance_embeds": True}),
    "flux2": ("Flux2Model", "FLUX_2", "transformer", "Flux2Transformer2DModel", TWO),
    "chroma": ("ChromaModel", "CHROMA_1", "transformer", "ChromaTransformer2DModel", TWO),
    "pixart": ("PixArtAlphaModel", "PIXART_ALPHA", "transformer", "PixArtTransformer2DModel",
               {"num_layers": 2, "caption_channels": 4096, "use_additional_conditions": True}),
    "sana": ("SanaModel", "SANA", "transformer", "SanaTransformer2DModel", {"num_layers": 2}),
    "hidream": ("HiDreamModel", "HI_DREAM_FULL", "transformer", "HiDreamImageTransformer2DModel",
                {"num_layers": 2, "num_single_layers": 2, "caption_channels": [4096, 4096], "num_routed_experts": 4,
                 "num_activated_experts": 2, "llama_layers": [0, 1, 2, 3], "patch_size": 2}),
    "hunyuan_video": ("HunyuanVideoModel", "HUNYUAN_VIDEO", "transformer", "HunyuanVideoTransformer3DModel",
                      TWO | {"num_refiner_layers": 2}),
    "qwen_image": ("QwenModel", "QWEN", "transformer", "QwenImageTransformer2DModel", {"num_layers": 2}),
    "z_image": ("ZImageModel", "Z_IMAGE", "transformer", "ZImageTransformer2DModel", {"n_layers": 2}),
    "cosmos": ("AnimaModel", "ANIMA", "transformer", "CosmosTransformer3DModel", {"num_layers": 2}),
    "krea2": ("Krea2Model", "KREA_2", "transformer", "Krea2Transformer2DModel", {"num_layers": 2}),
    "ideogram4": ("IdeogramModel", "IDEOGRAM_4", "transformer", "Ideogram4Transformer2DModel", {"num_layers": 2}),
    "ernie_image": ("ErnieModel", "ERNIE", "transformer", "ErnieImageTransformer2DModel", {"num_layers": 2}),
    "stable_cascade": ("WuerstchenModel", "STABLE_CASCADE_1", "prior", "StableCascadeUNet",
                       {"in_channels": 16, "out_channels": 16, "conditioning_dim": 2048}),
}  # fmt: skip
"""Family -> OneTrainer's model and its type; the attribute that holds the model; diffusers' class and its arguments."""

LOADERS = {
    "StableDiffusion3Model": "stableDiffusion3.StableDiffusion3LoRALoader", "FluxModel": "flux.FluxLoRALoader",
    "ChromaModel": "chroma.ChromaLoRALoader", "PixArtAlphaModel": "pixartAlpha.PixArtAlphaLoRALoader",
    "HunyuanVideoModel": "hunyuanVideo.HunyuanVideoLoRALoader", "WuerstchenModel": "wuerstchen.WuerstchenLoRALoader",
    "QwenModel": "qwen.QwenLoRALoader", "Flux2Model": "Flux2ModelLoader", "ZImageModel": "ZImageModelLoader",
}  # fmt: skip
"""Models whose loader says more than the others': its module, which has a class that ends with `LoRALoader`."""

SPELLINGS = [
    ("transformer.", "diffusers"), ("unet.", "diffusers"), ("prior.", "diffusers"), ("transformer.", "native"),
    ("diffusion_model.", "native"), ("diffusion_model.", "diffusers"), ("diffusion_model.", "comfyui"),
    ("lora_unet_", "native"), ("lora_unet_", "diffusers"), ("lora_transformer_", "diffusers"),
    ("lora_prior_unet_", "diffusers"), ("lycoris_", "diffusers"), ("base_model.model.", "diffusers"),
    ("", "native"), ("", "diffusers"),
]  # fmt: skip
"""What keys begin with, and the naming that follows."""

EACH = 1_000_000
"""Numbers of rows that each name has of its own."""


def loading(family: str) -> tuple[Callable[[Mapping[str, Any]], dict[str, Any]], dict[str, tuple[int, ...]], str]:
    """What a family's loader makes of a state dict; diffusers' modules and their weights' shapes; the part's name."""
    import diffusers
    import torch

    model_name, kind, attribute, class_name, config = MODELS[family]
    with torch.device("meta"):
        denoiser = getattr(diffusers, class_name)(**config)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    shapes = {name: tuple(each.weight.shape) for name, each in denoiser.named_modules() if isinstance(each, kinds)}
    types = importlib.import_module("modules.util.enum.ModelType").ModelType
    made = getattr(importlib.import_module(f"modules.model.{model_name}"), model_name)(model_type=getattr(types, kind))
    setattr(made, "prior_prior" if attribute == "prior" else attribute, denoiser)
    # Its text encoders' names are asked for; they have no modules here.
    made.lora_text_encoders = partial(_empty_encoders, made.lora_text_encoders)
    mixin = importlib.import_module("modules.modelLoader.mixin.LoRALoaderMixin").LoRALoaderMixin
    chosen = mixin
    if model_name in LOADERS:
        module = importlib.import_module(f"modules.modelLoader.{LOADERS[model_name]}")
        own = (each for name, each in vars(module).items() if name.endswith("LoRALoader") and isinstance(each, type))
        chosen = next(each for each in own if issubclass(each, mixin) and each.__module__ == module.__name__)
    loader = type("Loader", (chosen,), {})()
    return partial(loader._to_canonical, made), shapes, attribute


def _empty_encoders(asked: Callable[[], list[Any]]) -> list[Any]:
    import torch

    return [(torch.nn.Module(), names) for _, names in asked()]


def held(family: str, prefix: str, naming: str) -> tuple[list[str], list[str]]:
    """All modules of a family under this naming, and those that OneTrainer does not load under it."""
    load, shapes, part = _loading(family)
    spellings = spelled(family, naming, shapes)
    if not spellings:
        return [], []
    names = [pair for found in spellings.values() for pair in found]
    numbers = {name: at for at, (name, _) in enumerate(names)}
    pairs = [_pair(prefix, name, at, rows) for at, (name, rows) in enumerate(names)]
    # One name that it does not know makes it refuse a file; a few tell whether it knows any.
    known = any(_arrived(_loaded(load, [pair]), part).keys() & shapes.keys() for pair in pairs[:: len(pairs) // 6 + 1])
    made = _loaded(load, pairs) if known else {}
    arrived = _by_name(_arrived(made, part))
    lost = [
        template
        for template, found in spellings.items()
        if not all(
            _right(family, naming, name, rows, numbers[name], arrived.get(numbers[name], {}), shapes)
            for name, rows in found
        )
    ]
    return list(spellings), lost


def _loaded(load: Callable[[Mapping[str, Any]], dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """What becomes of these LoRAs, without those that make OneTrainer refuse a file."""
    try:
        return load({key: value for pair in pairs for key, value in pair.items()})
    except Exception:  # Whatever it raises, it does not load the file.
        if len(pairs) == 1:
            return {}
    half = len(pairs) // 2
    return _loaded(load, pairs[:half]) | _loaded(load, pairs[half:])


_LOADINGS: dict[str, Any] = {}


def _loading(family: str) -> Any:
    if family not in _LOADINGS:
        _LOADINGS[family] = loading(family)
    return _LOADINGS[family]


def spelled(name: str, naming: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[tuple[str, int]]]:
    """Template of a module in a naming -> its names in the small model, with the rows of each."""
    from adapterkit.naming.image import families

    family = next(each for each in families() if each.name == name)
    if family.wanted(naming) not in family.namings or (naming == "comfyui" and family.wanted(naming) == "native"):
        return {}
    found: dict[str, dict[str, int]] = {}
    for path, (rows, *_) in shapes.items():
        for weight, place, _ in family.architecture.find(path, "diffusers"):
            there = family.architecture.place(weight, family.wanted(naming))
            if there is None or is_norm(weight) or place.ratio is not None or there.ratio is not None:
                continue
            for piece in family.moves(path, "diffusers", family.wanted(naming)):
                inner, outer = (run.parts for run in (piece.here, piece.there))
                total = rows * inner * piece.there.of // (piece.here.of * outer)
                found.setdefault(there.name, {}).setdefault(piece.path, total)
    return {template: list(names.items()) for template, names in found.items() if not is_norm(template)}


def _pair(prefix: str, name: str, at: int, rows: int) -> dict[str, Any]:
    import torch

    stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    up = torch.arange(rows, dtype=torch.float64)[:, None] + at * EACH
    return {f"{stem}.lora_down.weight": torch.ones(1, 1), f"{stem}.lora_up.weight": up}


def _arrived(made: Mapping[str, Any], part: str) -> dict[str, list[float]]:
    """diffusers' module -> the numbers of the rows that came to it."""
    ends = ".lora_up.weight"
    start = f"{part}."
    return {
        key.removeprefix(start).removesuffix(ends): value[:, 0].tolist()
        for key, value in made.items()
        if key.endswith(ends) and key.startswith(start)
    }


def _by_name(arrived: Mapping[str, list[float]]) -> dict[int, dict[str, list[float]]]:
    """The number of a name -> the modules that rows of it came to."""
    found: dict[int, dict[str, list[float]]] = {}
    for module, values in arrived.items():
        for at in {int(value // EACH) for value in values}:
            found.setdefault(at, {})[module] = values
    return found


def _right(
    name: str, naming: str, path: str, rows: int, at: int, there: Mapping[str, list[float]],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:  # fmt: skip
    """Whether a module's rows came to the modules of diffusers where the family's file has them.

    OneTrainer trains fused weights as they are, under names of its own beside the parts (`attn.qkv`).
    """
    from adapterkit.naming.image import families

    family = next(each for each in families() if each.name == name)
    pieces = family.moves(path, family.wanted(naming), "diffusers")
    wanted = {piece.path for piece in pieces}
    first = at * EACH
    if not pieces or not there:
        return False
    if set(there) == wanted and wanted <= shapes.keys():
        for piece in pieces:
            unit = rows // piece.here.of
            values = range(first + piece.here.start * unit, first + piece.here.stop * unit)
            own = len(there[piece.path]) // piece.there.of
            if there[piece.path][piece.there.start * own : piece.there.stop * own] != [float(each) for each in values]:
                return False
        return True
    block = {module.rpartition(".")[0].removesuffix(".attn") for module in (*wanted, *there)}
    whole = next(iter(there.values())) == [float(first + row) for row in range(rows)]
    return len(there) == 1 and len(wanted) > 1 and whole and len(block) == 1


ENCODERS = {"clip": "text_model.encoder.layers.0.self_attn.q_proj",
            "t5": "encoder.block.0.layer.0.SelfAttention.q", "llm": "model.layers.0.self_attn.q_proj"}  # fmt: skip
"""Kind of a text encoder -> a module of it."""

PARTS = ("text_encoder", "text_encoder_1", "text_encoder_2", "text_encoder_3", "text_encoder_4", "prior_text_encoder")
"""OneTrainer's attributes for text encoders."""


def encoders() -> list[tuple[str, list[str]]]:
    """Prefixes of text encoders, and the kinds of encoders that a module behind one of them reaches."""
    import torch

    found: dict[str, set[str]] = {}
    asked = []
    for family in MODELS:
        load, shapes, part = _loading(family)
        made = load.args[0]
        own = type(made).__annotations__
        kinds = {name: _kind(str(own[name])) for name in PARTS if name in own}
        for name, kind in kinds.items():
            setattr(made, name, _nested(ENCODERS[kind]))
        made.lora_text_encoders = partial(type(made).lora_text_encoders, made)
        types = type(made.model_type)
        told = []
        # The name of its encoder depends on which Stable Diffusion it is.
        for type_ in (made.model_type, *([types.STABLE_DIFFUSION_20] if family == "sd" else [])):
            made.model_type = type_
            told += made.lora_text_encoders()
        of = {id(getattr(made, name)): kind for name, kind in kinds.items()}
        module = next(iter(shapes))
        named = spelled(family, "native", shapes) or spelled(family, "diffusers", shapes)
        native = next(iter(named.values()))[0][0]
        # A prefix may count only beside modules of the denoiser under the same naming.
        beside = ("", f"{part}.{module}", f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{native}")
        asked.append((load, beside, [(of[id(each)], names) for each, names in told]))
    ends = {".": ("DIFFUSERS_LORA", "COMFY_LORA"), "_": ("KOHYA_LORA",)}
    prefixes = {
        f"{name}{end}"
        for *_, told in asked
        for _, names in told
        for kind, name in names.items()
        for end, formats in ends.items()
        if kind.name in formats
    }
    for load, companions, told in asked:
        for prefix in sorted(prefixes | {"lora_te1_"}):
            for kind, names in told:
                path = ENCODERS[kind]
                stem = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
                wanted = f"{next(name for each, name in names.items() if each.name == 'DIFFUSERS_LORA')}.{path}"
                for beside in companions:
                    stems = [stem, beside] if beside else [stem]
                    keys = {f"{each}.lora_{word}.weight" for each in stems for word in ("down", "up")}
                    made = _whole(load, {key: torch.ones(2, 2) for key in keys})
                    if any(key.startswith(f"{wanted}.lora") for key in made):
                        found.setdefault(prefix, set()).add(kind)
    return [(prefix, [kind for kind in ENCODERS if kind in found[prefix]]) for prefix in sorted(found)]


def _kind(annotation: str) -> str:
    name = annotation.lower()
    return next((kind for kind in ("clip", "t5") if kind in name), "llm")


def _nested(path: str) -> Any:
    """A model with one linear module at this path."""
    import torch

    model = torch.nn.Linear(2, 2, device="meta")
    for word in reversed(path.split(".")):
        outer = torch.nn.Module()
        outer.add_module(word, model)
        model = outer
    return model


def _whole(load: Callable[[Mapping[str, Any]], dict[str, Any]], state: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of a file; nothing if it is refused."""
    try:
        return load(state)
    except Exception:  # Whatever it raises, it does not load the file.
        return {}


def slots() -> list[str]:
    """Slots that the loader turns into parameters of the trainer's own modules, of all slots that any tool has."""
    import torch

    modules = importlib.import_module("modules.module.LoRAModule")
    universal = importlib.import_module("modules.util.load_lora_util")
    own: set[str] = set()
    with torch.device("cpu"):
        for layer in (torch.nn.Linear(64, 64), torch.nn.Conv2d(64, 64, 3)):
            rest = {"train_device": torch.device("cpu"), "decompose_factor": 8}
            kron = [
                {"decompose_both": both, "use_tucker": tucker, "full_matrix": full, "weight_decompose": True,
                 "dora_on_output": True} for both in (False, True) for tucker in (False, True) for full in (False, True)
            ]  # fmt: skip
            dora = {"norm_epsilon": False, "decompose_output_axis": True, "train_device": torch.device("cpu")}
            made = [
                modules.LoRAModule("x", layer, 2, 1.0), modules.LoHaModule("x", layer, 2, 1.0),
                modules.DoRAModule("x", layer, 2, 1.0, **dora),
                modules.OFTModule("x", layer, 4, False, True), modules.OFTModule("x", layer, 4, False, False),
                *(modules.LoKrModule("x", layer, 1, 1.0, **rest, **each) for each in kron),
            ]  # fmt: skip
            own |= {key for each in made for key in each.state_dict()}
    told = {slot for file in OUT.parent.glob("*.toml") for slot in _slots_of(file)} | own | {"magnitude"}
    found = []
    for slot in sorted(told):
        stem = "transformer.transformer_blocks.0.attn.to_q"
        try:
            keys = universal.normalize_various({f"{stem}.{slot}": torch.ones(8)})
        except RuntimeError:
            continue
        except IndexError:  # It makes an alpha of the rank, which a vector has not.
            keys = universal.normalize_various({f"{stem}.{slot}": torch.ones(8, 2)})
        if {key.removeprefix(f"{stem}.") for key in keys} & own - {"alpha"} or slot == "alpha":
            found.append(slot)
    return found


def _slots_of(file: Path) -> list[str]:
    tool = tomllib.loads(file.read_text())
    return [*tool.get("slots", ()), *(slot for keys in tool.get("keys", ()) for slot in keys.get("slots", ()))]


_ANY = [prefix[:-1] for prefix, _ in SPELLINGS if prefix not in ("transformer.", "unet.", "prior.")]
"""Prefixes that are not the name of a part."""


SOURCES = (
    "modules/util/load_lora_util.py",
    "modules/modelLoader/mixin/LoRALoaderMixin.py",
    "modules/module/LoRAModule.py",
)

HEAD = f"""\
# Made by tools/foreign/onetrainer_keys.py and reviewed. README.md beside this file says what each field means.
format = 1
title = "OneTrainer"
url = "https://github.com/Nerogar/OneTrainer"
version = "23df383 (2026)"
sources = {quoted(SOURCES)}
convert = ["diffusers", "kohya", "comfyui"]"""


def toml() -> str:
    """The file's text."""
    lines = [HEAD, "slots = ["]
    lines += textwrap.wrap(", ".join(f'"{slot}"' for slot in slots()) + ",", 116, initial_indent="    ",
                           subsequent_indent="    ", break_on_hyphens=False)  # fmt: skip
    lines += ["]", 'unread = "refuses the file"', "encoders = ["]
    lines += [f'    {{ prefix = "{prefix}", names = {quoted(kinds)} }},' for prefix, kinds in encoders()]
    lines += ["]", ""]
    for prefix, naming in SPELLINGS:
        parts = {name: part for name, (_, _, part, _, _) in MODELS.items() if prefix[:-1] in (part, *_ANY)}
        found = {name: each for name in parts if (each := held(name, prefix, naming))[0] and each[0] != each[1]}
        if found:
            lines += ["[[keys]]", f'prefix = "{prefix}"', f'naming = "{naming}"', f"families = {quoted(found)}"]
            lines += exceptions(found)
    return "\n".join(lines)


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    sys.path[:0] = [str(ROOT), str(arguments.checkout)]
    # What the trainer imports of these must not find the empty modules.
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, Gemma2Model, Qwen3Model, T5EncoderModel  # noqa: F401

    ABSENT.update({"mgds", "scenedetect", "dadaptation", "adv_optm", "muon", "omegaconf"})
    sys.meta_path.insert(0, Absent())
    text = toml()
    return write_or_compare(OUT, text, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
