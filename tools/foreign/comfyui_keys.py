"""Writes spec/loaders/comfyui.toml: the names of each family's modules in ComfyUI's key map.

    python tools/foreign/comfyui_keys.py CHECKOUT            write the file
    python tools/foreign/comfyui_keys.py CHECKOUT --check    compare; exits 1 on a difference

CHECKOUT is a folder with ComfyUI's source. Its models are created without memory for weights (torch's meta device), and
`model_lora_keys_unet` makes the map. The script looks up each spelling of each module in spec/architectures: the map
must give the weight and the rows of the family's file. Needs torch, einops and psutil. Empty modules replace ComfyUI's
other imports (torchvision, av, ...), which the map does not need.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.abc
import importlib.machinery
import itertools
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from loader_tables import exceptions, quoted

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "spec" / "loaders" / "comfyui.toml"
ABSENT = (
    "torchvision", "torchaudio", "av", "kornia", "aiohttp", "alembic", "sqlalchemy", "comfy_aimdo", "spandrel",
    "torchsde", "comfy_kitchen", "scipy", "nodes", "server",
)  # fmt: skip

UNET = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
        "model_channels": 320, "num_heads": -1, "num_head_channels": 64, "use_temporal_attention": False}  # fmt: skip
SD15 = UNET | {"num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
               "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "context_dim": 768, "num_heads": 8,
               "num_head_channels": -1, "use_linear_in_transformer": False, "adm_in_channels": None,
               "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]}  # fmt: skip
SDXL = UNET | {"num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2, 2, 2],
               "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
               "use_linear_in_transformer": True, "context_dim": 2048,
               "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}  # fmt: skip
FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
        "mlp_ratio": 4.0, "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56],
        "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}  # fmt: skip
HUNYUAN = {"image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16,
           "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
           "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True,
           "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
           "vision_in_dim": None, "meanflow_sum": False}  # fmt: skip
LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "n_layers": 2, "qk_norm": True}
PREDICT2 = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
            "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "concat_padding_mask": True,
            "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "num_blocks": 2,
            "num_heads": 16, "use_adaln_lora": True, "adaln_lora_dim": 256}  # fmt: skip
WAN = {"dim": 1536, "out_dim": 16, "num_heads": 12, "ffn_dim": 8960, "num_layers": 2, "patch_size": (1, 2, 2),
       "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
       "in_dim": 36}  # fmt: skip

WAN_S2V = {key: value for key, value in WAN.items() if key not in ("in_dim", "dim")} | {
    "in_dim": 16, "dim": 1536, "audio_inject_layers": [0, 1],
}  # fmt: skip
RADIANCE = {key: value for key, value in FLUX.items() if key != "guidance_embed"} | {
    "in_channels": 3, "out_channels": 3, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5,
    "patch_size": 16, "nerf_hidden_size": 64, "nerf_mlp_ratio": 4, "nerf_depth": 2, "nerf_max_freqs": 8,
    "nerf_tile_size": 512, "nerf_embedder_dtype": None, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip

LTXAV = {"num_layers": 2, "image_model": "ltxav"}

ACE1 = {
    "num_layers": 2,
    "inner_dim": 2560,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "patch_size": [16, 1],
    "ssl_encoder_depths": [8, 8],
    "ssl_latent_dims": [1024, 768],
    "ssl_names": ["mert", "m-hubert"],
    "text_embedding_dim": 768,
    "lyric_encoder_vocab_size": 6693,
    "lyric_hidden_size": 1024,
}

MODELS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "sd": [("BaseModel", "ldm.modules.diffusionmodules.openaimodel:UNetModel", SD15)],
    "sdxl": [("SDXL", "ldm.modules.diffusionmodules.openaimodel:UNetModel", SDXL)],
    "sd3": [
        (
            "SD3",
            "ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",
            {
                "in_channels": 16,
                "patch_size": 2,
                "out_channels": 16,
                "depth": 24,
                "input_size": None,
                "num_blocks": 3,
                "adm_in_channels": 2048,
                "num_patches": 64,
                "pos_embed_max_size": 8,
                "pos_embed_scaling_factor": None,
                "qk_norm": "rms",
                "x_block_self_attn_layers": [0, 1],
                "context_embedder_config": {
                    "target": "torch.nn.Linear",
                    "params": {"in_features": 8, "out_features": 1536},
                },
            },
        )
    ],
    "flux": [("Flux", "ldm.flux.model:Flux", FLUX)],
    "flux2": [
        (
            "Flux2",
            "ldm.flux.model:Flux",
            FLUX
            | {
                "image_model": "flux2",
                "axes_dim": [32, 32, 32, 32],
                "mlp_ratio": 3.0,
                "global_modulation": True,
                "mlp_silu_act": True,
                "qkv_bias": False,
                "ops_bias": False,
                "vec_in_dim": None,
                "patch_size": 1,
            },
        )
    ],
    "chroma": [
        *(
            (
                "ChromaRadiance",
                "ldm.chroma_radiance.model:ChromaRadiance",
                RADIANCE | {"nerf_final_head_type": head},
            )
            for head in ("linear", "conv")
        ),
        (
            "Chroma",
            "ldm.chroma.model:Chroma",
            {
                **{key: value for key, value in FLUX.items() if key != "guidance_embed"},
                "in_channels": 64,
                "out_channels": 64,
                "in_dim": 64,
                "out_dim": 3072,
                "hidden_dim": 5120,
                "n_layers": 5,
            },
        ),
    ],
    "auraflow": [
        (
            "AuraFlow",
            "ldm.aura.mmdit:MMDiT",
            {
                "max_seq": 64,
                "cond_seq_dim": 2048,
                "n_double_layers": 2,
                "n_layers": 4,
            },
        )
    ],
    "pixart": [
        (
            "PixArt",
            "ldm.pixart.pixartms:PixArtMS",
            {
                "num_heads": 16,
                "patch_size": 2,
                "hidden_size": 1152,
                "in_channels": 4,
                "depth": 2,
                "micro_condition": True,
                "input_size": 32,
            },
        )
    ],
    "lumina2": [
        (
            "Lumina2",
            "ldm.lumina.model:NextDiT",
            LUMINA
            | {
                "dim": 2304,
                "cap_feat_dim": 2304,
                "n_heads": 24,
                "n_kv_heads": 8,
                "axes_dims": [32, 32, 32],
            },
        )
    ],
    "z_image": [
        (
            "Lumina2",
            "ldm.lumina.model:NextDiT",
            LUMINA
            | {
                "dim": 3840,
                "cap_feat_dim": 2560,
                "n_heads": 30,
                "n_kv_heads": 30,
                "axes_dims": [32, 48, 48],
                "z_image_modulation": True,
                "siglip_feat_dim": 1152,
                "ffn_dim_multiplier": 8.0 / 3.0,
            },
        )
    ],
    "hidream": [
        (
            "HiDream",
            "ldm.hidream.model:HiDreamImageTransformer2DModel",
            {
                "attention_head_dim": 128,
                "axes_dims_rope": [64, 32, 32],
                "caption_channels": [4096, 4096],
                "max_resolution": [128, 128],
                "in_channels": 16,
                "llama_layers": [0, 1],
                "num_attention_heads": 20,
                "num_routed_experts": 4,
                "num_activated_experts": 2,
                "num_layers": 2,
                "num_single_layers": 2,
                "out_channels": 16,
                "patch_size": 2,
                "text_emb_dim": 2048,
            },
        )
    ],
    "qwen_image": [
        (
            "QwenImage",
            "ldm.qwen_image.model:QwenImageTransformer2DModel",
            {
                "num_layers": 2,
                "in_channels": 64,
                "image_model": "qwen_image",
            },
        )
    ],
    "wan": [
        ("WAN22_Animate", "ldm.wan.model_animate:AnimateWanModel", WAN | {"model_type": "animate", "num_layers": 10}),
        ("WAN22_S2V", "ldm.wan.model:WanModel_S2V", WAN_S2V | {"model_type": "s2v"}),
        ("WAN21", "ldm.wan.model:WanModel", WAN | {"model_type": "i2v"}),
        ("WAN21_Vace", "ldm.wan.model:VaceWanModel", WAN | {"vace_layers": 2, "vace_in_dim": 96, "in_dim": 16}),
    ],
    "hunyuan_video": [("HunyuanVideo", "ldm.hunyuan_video.model:HunyuanVideo", HUNYUAN)],
    "hunyuan_video_15": [
        (
            "HunyuanVideo15",
            "ldm.hunyuan_video.model:HunyuanVideo",
            HUNYUAN
            | {
                "byt5": True,
                "meanflow": True,
                "use_cond_type_embedding": True,
                "vision_in_dim": 1152,
                "vec_in_dim": None,
                "meanflow_sum": True,
                "guidance_embed": False,
                "depth_single_blocks": 0,
            },
        )
    ],
    "hunyuan_image": [
        (
            "HunyuanImage21",
            "ldm.hunyuan_video.model:HunyuanVideo",
            HUNYUAN
            | {
                "in_channels": 64,
                "patch_size": [1, 1],
                "hidden_size": 3584,
                "num_heads": 28,
                "axes_dim": [64, 64],
                "context_in_dim": 3584,
                "byt5": True,
                "meanflow": True,
                "vec_in_dim": None,
            },
        )
    ],
    "longcat_image": [
        ("LongCatImage", "ldm.flux.model:Flux", FLUX | {"vec_in_dim": None, "guidance_embed": False}),
    ],
    "ltx": [("LTXV", "ldm.lightricks.model:LTXVModel", {"num_layers": 2})],
    "ltx2": [
        ("LTXAV", "ldm.lightricks.av_model:LTXAVModel", LTXAV),
        (
            "LTXAV",
            "ldm.lightricks.av_model:LTXAVModel",
            LTXAV | dict.fromkeys(("apply_gated_attention", "cross_attention_adaln"), True),
        ),
    ],
    "mochi": [
        (
            "GenmoMochi",
            "ldm.genmo.joint_model.asymm_models_joint:AsymmDiTJoint",
            {
                "depth": 3,
                "patch_size": 2,
                "mlp_ratio_x": 4.0,
                "mlp_ratio_y": 4.0,
                "attend_to_padding": False,
                "num_heads": 24,
                "hidden_size_x": 3072,
                "hidden_size_y": 1536,
                "in_channels": 12,
                "qk_norm": True,
                "qkv_bias": False,
                "use_t5": True,
                "t5_feat_dim": 4096,
                "t5_token_length": 256,
            },
        )
    ],
    "kandinsky5": [
        (
            "Kandinsky5",
            "ldm.kandinsky5.model:Kandinsky5",
            {
                "num_text_blocks": 2,
                "num_visual_blocks": 2,
                "model_dim": 1792,
                "ff_dim": 7168,
                "time_dim": 512,
                "visual_embed_dim": 36,
                "axes_dims": (16, 24, 24),
                "rope_scale_factor": (1.0, 2.0, 2.0),
            },
        )
    ],
    "cosmos": [
        ("CosmosPredict2", "ldm.cosmos.predict2:MiniTrainDIT", PREDICT2),
        ("Anima", "ldm.anima.model:Anima", PREDICT2),
    ],
    "cogvideox": [
        (
            "CogVideoX",
            "ldm.cogvideo.model:CogVideoXTransformer3DModel",
            {
                "num_layers": 2,
                "ofs_embed_dim": 512,
            },
        )
    ],
    "ernie_image": [("ErnieImage", "ldm.ernie.model:ErnieImageModel", {"num_layers": 2})],
    "ideogram4": [("Ideogram4", "ldm.ideogram4.model:Ideogram4Transformer2DModel", {"num_layers": 2})],
    "krea2": [("Krea2", "ldm.krea2.model:SingleStreamDiT", {"layers": 2})],
    "minimax_h3": [("MiniMaxH3", "ldm.minimax.model:MiniMaxH3Model", {"num_layers": 2})],
    "ace_step": [
        (
            "ACEStep15",
            "ldm.ace.ace_step15:AceStepConditionGenerationModel",
            {
                "num_dit_layers": 2,
                "num_lyric_layers": 1,
                "num_timbre_layers": 1,
                "num_tokenizer_layers": 1,
            },
        )
    ],
    "ace_step1": [("ACEStep", "ldm.ace.model:ACEStepTransformer2DModel", ACE1)],
    "omnigen2": [("Omnigen2", "ldm.omnigen.omnigen2:OmniGen2Transformer2DModel", {"num_layers": 2})],
    "stable_cascade": [("StableCascade_C", "ldm.cascade.stage_c:StageC", {"blocks": [[1, 1], [1, 1]]})],
}
"""Family -> ComfyUI's classes of the model and of its network, and the network's arguments."""

SPELLINGS = (
    ("diffusion_model.", "comfyui"), ("diffusion_model.", "native"), ("diffusion_model.", "diffusers"),
    ("transformer.", "diffusers"), ("transformer.", "native"), ("", "native"), ("", "diffusers"),
    ("base_model.model.", "native"), ("base_model.model.", "diffusers"), ("lora_unet_", "native"),
    ("lora_unet_", "diffusers"), ("lora_prior_unet_", "native"), ("lora_prior_unet_", "diffusers"),
    ("lora_transformer_", "diffusers"), ("lycoris_", "native"), ("lycoris_", "diffusers"),
)  # fmt: skip
"""What keys begin with, and whose names follow; behind an underscore the names have underscores for dots."""


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for what ComfyUI imports and no key map needs."""

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


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(arguments.checkout)]
    sys.meta_path.insert(0, Absent())
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfyui_version

    text = toml(comfyui_version.__version__)
    if arguments.check:
        held = OUT.read_text() if OUT.exists() else ""
        print("same" if held == text else "DIFFERENT")
        sys.stdout.writelines(
            difflib.unified_diff(held.splitlines(True), text.splitlines(True), "the file", "made now")
        )
        return int(held != text)
    OUT.write_text(text)
    return 0


def toml(version: str) -> str:
    """The file's text."""
    lines = [HEADER.format(version=version, encoders="\n".join(encoders()))]
    found: dict[tuple[str, str], dict[str, tuple[list[str], list[str]]]] = {}
    for name, models in MODELS.items():
        for spelling, held in spelled(name, models).items():
            found.setdefault(spelling, {})[name] = held
    for (prefix, naming), families in found.items():
        lines += ["[[keys]]", f'prefix = "{prefix}"', f'naming = "{naming}"', f"families = {quoted(families)}"]
        lines += exceptions(families)
    return "\n".join(lines)


ENCODERS = {
    "clip_l": "sd1_clip:SD1ClipModel", "clip_g": "sdxl_clip:SDXLClipModel",
    "cascade": "sdxl_clip:StableCascadeClipModel",
    "clip_h": "text_encoders.sd2_clip:SD2ClipModel",
    "flux": "text_encoders.flux:flux_clip()", "sd3": "text_encoders.sd3_clip:sd3_clip()",
    "umt5xxl": "text_encoders.wan:te()", "llama": "text_encoders.hunyuan_video:hunyuan_video_clip()",
    "qwen25_7b": "text_encoders.qwen_image:te()", "qwen3_06b": "text_encoders.anima:te()",
    "qwen3_4b": "text_encoders.z_image:te()", "gemma2_2b": "text_encoders.lumina2:te()",
    "byt5_small": "text_encoders.hunyuan_image:te()",
}  # fmt: skip
"""ComfyUI's classes of text encoders, or the functions that make these; a word of its own for each."""

WORDS = (
    *(f"lora_te{number}_" for number in ("", 1, 2, 3)), "lora_prior_te_", "text_encoder.", "text_encoder_2.",
    *(f"text_encoders.{word}.transformer." for word in (*ENCODERS, "t5xxl")),
)  # fmt: skip
"""What keys of text encoders begin with."""

_ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
NAMES = {
    "clip": [f"text_model.encoder.layers.0.{x}" for x in ("mlp.fc1", "mlp.fc2", *_ATTENTION[:3], "self_attn.out_proj")],
    "t5": [f"encoder.block.0.layer.0.SelfAttention.{x}" for x in "qkvo"]
    + [f"encoder.block.0.layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")],
    "llm": [f"model.layers.0.{x}" for x in (*_ATTENTION, *(f"mlp.{y}_proj" for y in ("gate", "up", "down")))],
}
NAMES["layers"] = [name.removeprefix("model.") for name in NAMES["llm"]]
"""Kind of a text encoder -> its modules, as far as adapters are trained for them."""


def encoders() -> list[str]:
    """The lines of the text encoders' spellings: each prefix with the kinds of which a map holds all modules."""
    import comfy.lora
    import torch

    held = set[str]()
    for place in ENCODERS.values():
        module, _, name = place.partition(":")
        __import__(f"comfy.{module}")
        make = getattr(sys.modules[f"comfy.{module}"], name.removesuffix("()"))
        with torch.device("meta"):
            model = (make() if name.endswith("()") else make)(device="meta", dtype=torch.bfloat16)
        held |= comfy.lora.model_lora_keys_clip(model, {}).keys()
    lines = []
    for prefix in WORDS:
        spell = (lambda name: name.replace(".", "_")) if prefix.endswith("_") else str
        kinds = [kind for kind, names in NAMES.items() if all(prefix + spell(name) in held for name in names)]
        lines += [f'    {{ prefix = "{prefix}", names = {quoted(kinds)} }},'] if kinds else []
    return lines


def spelled(
    name: str, models: list[tuple[str, str, dict[str, Any]]]
) -> dict[tuple[str, str], tuple[list[str], list[str]]]:
    """Prefix and naming -> all modules, and those that its keys do not lead to; nothing where they lead to none."""
    from adapterkit.naming.image import families

    family = next(each for each in families() if each.name == name)
    maps = [key_map(*model) for model in models]
    found = {}
    for prefix, naming in SPELLINGS:
        wanted = family.wanted(naming)
        if wanted not in family.namings or (
            naming == "native" and prefix == "diffusion_model." and "comfyui" not in family.namings
        ):
            continue
        paths = modules(family, wanted, {key for _, shapes in maps for key in shapes})
        lacking = [path for path in paths if not any(leads(family, path, wanted, prefix, *each) for each in maps)]
        if len(lacking) < len(paths):
            found[prefix, naming] = paths, lacking
    return found


def modules(family: Any, naming: str, weights: set[str]) -> list[str]:
    """Templates of the modules of a naming that have matrices; of a U-Net, those that the network has."""
    found = []
    for weight in family.architecture.record.weights:
        place, native = (family.architecture.place(weight, each) for each in (naming, "native"))
        holes = native is not None and "{" in native.name
        there = (
            native is None or holes or f"diffusion_model.{native.name}.weight" in weights or family.component != "unet"
        )
        if place is not None and not is_norm(place.name) and not is_norm(weight) and there:
            found.append(place.name)
    return list(dict.fromkeys(found))


def is_norm(name: str) -> bool:
    """Whether a module is a norm, which no LoRA adapts."""
    words = name.split(".")[-2:]
    return any("norm" in word for word in words) and words[-1] not in ("linear", "1", "2") and "linear" not in words[-1]


def leads(family: Any, path: str, naming: str, prefix: str, known: dict[str, Any], shapes: dict[str, Any]) -> bool:
    """Whether a module's key leads to the weight, and to the rows, that the family's file has for it."""
    from adapterkit.naming.architectures import fill

    # Stable Cascade's blocks are of three kinds, by their number.
    for first, second in itertools.product("01", "012"):
        name = fill(path, {f"{{{hole}}}": {"n": first, "m": second}.get(hole, "0") for hole in "nmkej"})
        stem = name.replace(".", "_") if prefix.endswith("_") else name
        there = known.get(prefix + stem)
        if there is None:
            continue
        weight, rows = (there, None) if isinstance(there, str) else (there[0], there[1])
        if weight not in shapes:
            return False
        ours = family.moves(name, naming, family.wanted("comfyui"))
        if not ours or len(ours) > 1:
            return True  # The map's own word: the rows of a fused name of diffusers, or parts in another order.
        piece = ours[0]
        total = shapes[weight][0]
        start = 0 if rows is None else rows[1]
        size = total if rows is None else rows[2]
        own = f"diffusion_model.{piece.path}"
        same = weight in (own, f"{own}.weight") or _alike(weight, piece.path)
        unit = total / piece.there.of
        part = piece.there.whole or (round(piece.there.start * unit), round(piece.there.parts * unit)) == (start, size)
        if same and (part or family.name in UNEVEN):
            return True
        print(f"{family.name}: {prefix}{stem} leads to {there}, not to {piece}", file=sys.stderr)
        return False
    return False


ON_CPU = ("PixArt", "ACEStep15")
"""Models that look at numbers while they are made."""

UNEVEN = ("lumina2",)
"""Families whose keys and values have fewer rows than the queries, so that parts are no equal runs."""


def _alike(weight: str, path: str) -> bool:
    """Whether a weight of ComfyUI's is a module of the authors', where ComfyUI calls it otherwise (HunyuanVideo)."""
    words = weight.removeprefix("diffusion_model.").removesuffix(".weight")
    for word, other in (
        ("_mod.lin", "_mod.linear"), ("_attn.qkv", "_attn_qkv"), ("_attn.proj", "_attn_proj"), ("mlp.0", "mlp.fc1"),
        ("mlp.2", "mlp.fc2"), (".modulation.lin", ".modulation.linear"),
    ):  # fmt: skip
        words = words.replace(word, other)
    return words in (path, f"decoder.{path}")


def key_map(base: str, network: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """ComfyUI's map of keys to weights, and the weights' shapes."""
    import comfy.lora
    import comfy.model_base
    import comfy.ops
    import torch

    module, _, name = network.partition(":")
    __import__(f"comfy.{module}")
    make = getattr(sys.modules[f"comfy.{module}"], name)
    model = object.__new__(getattr(comfy.model_base, base))
    torch.nn.Module.__init__(model)
    device = "cpu" if base in ON_CPU else "meta"
    with torch.device(device):
        given = {"device": device, "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
        model.diffusion_model = make(**config, **given)
    model.model_config = types.SimpleNamespace(unet_config=config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return comfy.lora.model_lora_keys_unet(model, {}), shapes


HEADER = """\
# Made by tools/foreign/comfyui_keys.py and reviewed. README.md beside this file says what each field means.
format = 1
title = "ComfyUI"
url = "https://github.com/comfyanonymous/ComfyUI"
version = "{version}"
sources = ["comfy/lora.py", "comfy/lora_convert.py", "comfy/utils.py", "comfy/weight_adapter"]
containers = ["safetensors", "torch"]
convert = ["comfyui", "kohya", "lycoris"]
slots = [
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_B.weight", "lora_A.weight", "lora.up.weight",
    "lora.down.weight", "lora_B", "lora_A", "lora_linear_layer.up.weight", "lora_linear_layer.down.weight",
    "lora_B.default.weight", "lora_A.default.weight", "alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    "lokr_t2", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "rescale", "w_norm", "b_norm", "diff",
    "diff_b", "set_weight", "reshape_weight",
]
unread = "skips them with a line in its log"
encoders = [
{encoders}
]
files = [
    {{ format = "xlabs", families = ["flux"] }}, {{ format = "bfl_control", families = ["flux"] }},
    {{ format = "textual_inversion" }},
]

[differs]
dora = "if the magnitude has one number per output, it divides by the norm of W instead of the norm of W + dW"
oft = "it uses alpha itself as the constraint"
boft_outputs = "it uses alpha itself as the constraint"

[[keys]]
prefix = "unet."
naming = "diffusers"
processors = true
families = ["sd", "sdxl"]
slots = ["_lora.up.weight", "_lora.down.weight"]

[[keys]]
prefix = ""
naming = "diffusers"
processors = true
families = ["sd", "sdxl"]
slots = ["_lora.up.weight", "_lora.down.weight"]
"""

if __name__ == "__main__":
    sys.exit(main())
