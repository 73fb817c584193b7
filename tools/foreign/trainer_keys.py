"""Writes `keys` of the files of sd-scripts and musubi-tuner in spec/loaders: the modules that these tools load.

    python tools/foreign/trainer_keys.py sd_scripts CHECKOUT            write the file
    python tools/foreign/trainer_keys.py musubi_tuner CHECKOUT --check  compare; exits 1 on a difference

CHECKOUT is a folder with the trainer's source. Its models are created with few blocks and without memory for weights
(torch's meta device). The script passes each family's modules, under the trainer's names, to the trainer's
`create_network_from_weights`. A module is listed if the returned network has it. Empty modules replace those imports of
the trainers that no network needs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from comfyui_keys import modules
from loader_tables import exceptions, quoted, write_or_compare

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "spec" / "loaders"
ABSENT = {
    "torchvision", "cv2", "imagesize", "toml", "voluptuous", "bitsandbytes", "xformers", "flash_attn", "sageattention",
    "open_clip", "ftfy", "av", "easydict", "albumentations", "wandb", "tensorboard", "triton", "sentencepiece",
    "prodigyopt", "lion_pytorch", "schedulefree", "pytorch_optimizer", "rich", "lycoris", "diffusers_helper",
}  # fmt: skip

Make = Callable[[], Any]


def _made(module: str, name: str, /, *given: Any, **named: Any) -> Make:
    """A class or function of the trainer, called with these arguments when the model is wanted."""
    return lambda: getattr(importlib.import_module(module), name)(*given, **named)


def _flux(module: str = "library.flux_models", **changes: Any) -> Make:
    def make() -> Any:
        models = importlib.import_module(module)
        sizes = {"in_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
                 "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10_000,
                 "qkv_bias": True, "guidance_embed": True}  # fmt: skip
        return models.Flux(models.FluxParams(**sizes | changes))

    return make


def _chroma() -> Any:
    import dataclasses

    models = importlib.import_module("library.chroma_models")
    return models.Chroma(dataclasses.replace(models.chroma_params, depth=2, depth_single_blocks=2))


def _sd3() -> Any:
    models = importlib.import_module("library.sd3_models")
    return models.MMDiT(
        input_size=None, depth=3, in_channels=16, adm_in_channels=2048, context_embedder_in_features=4096,
        context_embedder_out_features=192, num_patches=64, pos_embed_max_size=8, qk_norm="rms",
        x_block_self_attn_layers=[0, 1], qkv_bias=True,
    )  # fmt: skip


def _lumina() -> Any:
    models = importlib.import_module("library.lumina_models")
    sizes = {"dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [8, 8, 8], "axes_lens": [9, 9, 9]}
    return models.NextDiT(patch_size=2, in_channels=16, qk_norm=True, cap_feat_dim=96, **sizes)


def _sd() -> Any:
    from library.model_util import create_unet_diffusers_config

    models = importlib.import_module("library.original_unet")
    return models.UNet2DConditionModel(**create_unet_diffusers_config(v2=False))


def _wan() -> Any:
    made = importlib.import_module("musubi_tuner.wan.modules.model")
    return made.WanModel(model_type="i2v", dim=96, ffn_dim=192, num_heads=4, num_layers=2, attn_mode="torch")


def _musubi_flux() -> Any:
    models = importlib.import_module("musubi_tuner.flux.flux_models")
    import dataclasses

    params = models.configs_flux_dev_context.params
    return models.Flux(dataclasses.replace(params, depth=2, depth_single_blocks=2))


def _musubi_flux2() -> Any:
    models = importlib.import_module("musubi_tuner.flux_2.flux2_models")
    import dataclasses

    return models.Flux2(dataclasses.replace(models.Flux2Params(), depth=2, depth_single_blocks=2))


def _hunyuan() -> Any:
    models = importlib.import_module("musubi_tuner.hunyuan_model.models")
    return models.HYVideoDiffusionTransformer(
        4096, 768, mm_double_blocks_depth=2, mm_single_blocks_depth=2, rope_dim_list=[16, 56, 56], hidden_size=3072,
        heads_num=24, guidance_embed=True,
    )  # fmt: skip


def _krea2() -> Any:
    models = importlib.import_module("musubi_tuner.krea2.krea2_mmdit")
    sizes = {"features": 96, "tdim": 32, "txtdim": 32, "heads": 4, "multiplier": 4, "layers": 2, "patch": 2}
    return models.SingleStreamDiT(models.SingleMMDiTConfig(**sizes, channels=16, txtheads=4, txtkvheads=4, txtlayers=2))


def _ideogram4() -> Any:
    models = importlib.import_module("musubi_tuner.ideogram4.ideogram4_model")
    return models.Ideogram4Transformer(models.Ideogram4Config(num_layers=2))


def _anima() -> Any:
    sizes = {"max_img_h": 32, "max_img_w": 32, "max_frames": 4, "in_channels": 16, "out_channels": 16,
             "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "num_blocks": 2, "num_heads": 4,
             "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8, "use_llm_adapter": True}  # fmt: skip
    return importlib.import_module("library.anima_models").Anima(**sizes)


MODELS: dict[str, dict[str, tuple[str, Make, str]]] = {
    "sd_scripts": {
        "sd": ("networks.lora", _sd, "diffusers"),
        "sdxl": ("networks.lora", _made("library.sdxl_original_unet", "SdxlUNet2DConditionModel"), "native"),
        "sd3": ("networks.lora_sd3", _sd3, "native"),
        "flux": ("networks.lora_flux", _flux(), "native"),
        "chroma": ("networks.lora_flux", _chroma, "native"),
        "lumina2": ("networks.lora_lumina", _lumina, "native"),
        "cosmos": ("networks.lora_anima", _anima, "native"),
        "hunyuan_image": (
            "networks.lora_hunyuan_image",
            _made("library.hunyuan_image_models", "HYImageDiffusionTransformer"),
            "sd_scripts",
        ),
    },
    "musubi_tuner": {
        "wan": ("musubi_tuner.networks.lora_wan", _wan, "native"),
        "qwen_image": (
            "musubi_tuner.networks.lora_qwen_image",
            _made("musubi_tuner.qwen_image.qwen_image_model", "QwenImageTransformer2DModel", num_layers=2),
            "diffusers",
        ),
        "z_image": (
            "musubi_tuner.networks.lora_zimage",
            _made("musubi_tuner.zimage.zimage_model", "ZImageTransformer2DModel", n_layers=2),
            "diffusers",
        ),
        "hunyuan_video": ("musubi_tuner.networks.lora", _hunyuan, "native"),
        "hunyuan_video_15": (
            "musubi_tuner.networks.lora_hv_1_5",
            _made("musubi_tuner.hunyuan_video_1_5.hunyuan_video_1_5_models", "HunyuanVideo_1_5_DiffusionTransformer"),
            "native",
        ),
        "flux": ("musubi_tuner.networks.lora_flux", _musubi_flux, "native"),
        "flux2": ("musubi_tuner.networks.lora_flux_2", _musubi_flux2, "native"),
        "krea2": ("musubi_tuner.networks.lora_krea2", _krea2, "native"),
        "ideogram4": ("musubi_tuner.networks.lora_ideogram4", _ideogram4, "native"),
        "kandinsky5": (
            "musubi_tuner.networks.lora_kandinsky",
            _made("musubi_tuner.kandinsky5.models.dit", "DiffusionTransformer3D"),
            "diffusers",
        ),
    },
}
"""Trainer -> family -> the module of its networks, its model, and the naming that goes into the keys."""


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for what the trainers import and no network needs."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass


def held(trainer: str, name: str) -> tuple[list[str], list[str]]:
    """All modules of a family under the trainer's names, and those that its network does not have."""
    import torch

    from adapterkit.naming.image import families

    networks, make, naming = MODELS[trainer][name]
    family = next(each for each in families() if each.name == name)
    with torch.device("meta"):
        model = make()
        kinds = ("Linear", "Conv")
        known = {path for path, module in model.named_modules() if module.__class__.__name__.startswith(kinds)}
        paths = modules(family, naming, {f"diffusion_model.{path}.weight" for path in known})
        if family.component == "unet" and naming == "diffusers":
            places = (family.architecture.place(weight, naming) for weight in family.architecture.record.weights)
            paths = list(dict.fromkeys(place.name for place in places if place and _stems(place.name, known)))
        stems = {path: _stems(path, known) for path in paths}
        weights: dict[str, Any] = {}
        for stem in {stem for each in stems.values() for stem in each}:
            weights |= {f"{stem}.lora_down.weight": torch.zeros(2, 2), f"{stem}.lora_up.weight": torch.zeros(2, 2)}
            weights[f"{stem}.alpha"] = torch.tensor(1.0, device="cpu")
        module = importlib.import_module(networks)
        if trainer == "musubi_tuner":
            made = module.create_arch_network_from_weights(1.0, weights, None, model, for_inference=True)
        else:
            # Lumina's network looks at the text encoder, whose modules are not asked for.
            made = module.create_network_from_weights(1.0, None, None, [torch.nn.Module()], model, weights)
    network = made[0] if isinstance(made, tuple) else made
    there = {each.lora_name for each in network.unet_loras}
    return paths, [path for path in paths if there.isdisjoint(stems[path])]


def _stems(path: str, known: set[str]) -> list[str]:
    """What keys of a template's modules begin with, as far as the trainer's small model has them."""
    pattern = re.compile(re.sub(r"\\\{\w\\\}", r"\\d+", re.escape(path)))
    return sorted("lora_unet_" + name.replace(".", "_") for name in known if pattern.fullmatch(name))


def toml(trainer: str) -> str:
    """The file's text: its head as it is, and the keys."""
    head = (OUT / f"{trainer}.toml").read_text().partition("[[keys]]")[0]
    found: dict[str, dict[str, tuple[list[str], list[str]]]] = {}
    for name, (_, _, naming) in MODELS[trainer].items():
        found.setdefault(naming, {})[name] = held(trainer, name)
    lines = [head.rstrip(), ""]
    for naming, families in found.items():
        lines += ["[[keys]]", 'prefix = "lora_unet_"', f'naming = "{naming}"', f"families = {quoted(families)}"]
        lines += exceptions(families)
    return "\n".join(lines)


def main() -> int:
    """Write or check the file of a trainer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trainer", choices=MODELS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    sys.path[:0] = [str(ROOT), str(arguments.checkout), str(arguments.checkout / "src")]
    import torch

    # What the trainers import of these must not find the empty modules.
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, Gemma2Model, Qwen3Model, T5EncoderModel  # noqa: F401

    sys.meta_path.insert(0, Absent())
    torch.cuda.current_device = lambda: 0  # Wan's text encoder asks for it while it is imported.
    text = toml(arguments.trainer)
    out = OUT / f"{arguments.trainer}.toml"
    return write_or_compare(out, text, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
