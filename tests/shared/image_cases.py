"""Cases of image families: files that diffusers converts, and names in every format."""

import numpy as np

from adapterkit.naming.image import families

FAMILIES = {family.name: family for family in families()}


def pairs(modules, spell, seed=0):
    """Write a LoRA file of modules -> (outputs, inputs); `spell(module)` gives the keys (down, up, alpha or None)."""
    rng, held = np.random.default_rng(seed), {}
    for module, (out, in_) in modules.items():
        down, up, alpha = spell(module)
        held[down] = rng.normal(size=(2, in_)).astype("f4")
        held[up] = rng.normal(size=(out, 2)).astype("f4")
        if alpha:
            held[alpha] = np.array(1.0, "f4")
    return held


def dotted(prefix, a="lora_A.weight", b="lora_B.weight", alpha=False):
    return lambda name: (f"{prefix}{name}.{a}", f"{prefix}{name}.{b}", f"{prefix}{name}.alpha" if alpha else None)


def flat(name):
    stem = "lora_unet_" + name.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def squares(names, size=8, **others):
    return dict.fromkeys(names.split(), (size, size)) | others


def inside(block, names, size=8):
    return {f"{block}.{name}": (size, size) for name in names.split()}


WAN = inside("blocks.0", " ".join(f"{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo") + " ffn.0 ffn.2")

WAN_I2V = WAN | inside("blocks.0", "cross_attn.k_img cross_attn.v_img")

QWEN = inside(
    "transformer_blocks.0",
    "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out "
    "img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2 img_mod.1 txt_mod.1",
)

QWEN_TOP = squares("img_in txt_in proj_out norm_out.linear time_text_embed.timestep_embedder.linear_1")

Z_SPLIT = inside(
    "layers.0", "attention.to_q attention.to_k attention.to_v attention.to_out.0 feed_forward.w1 feed_forward.w3"
)

Z_FUSED = {"layers.0.attention.qkv": (24, 8)} | inside("layers.0", "attention.out feed_forward.w1 feed_forward.w2")

FLUX2 = {
    "double_blocks.0.img_attn.qkv": (24, 8), "double_blocks.0.txt_attn.qkv": (24, 8),
    "double_blocks.0.img_attn.proj": (8, 8), "double_blocks.0.txt_attn.proj": (8, 8),
    "double_blocks.0.img_mlp.0": (48, 8), "double_blocks.0.img_mlp.2": (8, 24),
    "double_blocks.0.txt_mlp.0": (48, 8), "double_blocks.0.txt_mlp.2": (8, 24),
    "single_blocks.0.linear1": (72, 8), "single_blocks.0.linear2": (8, 32), "img_in": (8, 4), "txt_in": (8, 12),
}  # fmt: skip

HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (24, 8), "double_blocks.0.txt_attn_qkv": (24, 8),
    "double_blocks.0.img_attn_proj": (8, 8), "double_blocks.0.txt_attn_proj": (8, 8),
    "double_blocks.0.img_mod.linear": (48, 8), "double_blocks.0.img_mlp.fc1": (32, 8),
    "double_blocks.0.txt_mlp.fc2": (8, 32), "single_blocks.0.linear1": (7 * 3072, 8),
    "single_blocks.0.linear2": (8, 40), "single_blocks.0.modulation.linear": (24, 8), "img_in.proj": (8, 8),
}  # fmt: skip

LUMINA = {
    f"{block}.0.{name}": shape
    for block in ("layers", "noise_refiner", "context_refiner")
    for name, shape in {
        "attention.qkv": (3840, 8), "attention.out": (8, 8), "adaLN_modulation.1": (8, 8),
        **{f"feed_forward.w{n}": (8, 8) for n in (1, 2, 3)},
    }.items()
    if (block, name) != ("context_refiner", "adaLN_modulation.1")
}  # fmt: skip

KREA = inside("blocks.0", "attn.wq attn.wk attn.wv attn.wo attn.gate mlp.gate mlp.up mlp.down") | inside(
    "txtfusion.refiner_blocks.1", "attn.wq attn.wo mlp.up"
) | squares("first last.linear tmlp.0 tproj.1 txtmlp.1 txtfusion.projector")  # fmt: skip

MINIMAX = {
    f"{block}.0.{name}": shape for block in ("blocks", "token_refiner.blocks")
    for name, shape in {
        "attn.qkv_proj": (24, 8), "attn.out_proj": (8, 8), "mlp.fc1": (32, 8), "mlp.fc2": (8, 16),
    }.items()
} | {"blocks.0.adaln_proj.linear": (8, 8), "final_layer.video_out": (8, 8)}  # fmt: skip

ANIMA = inside(
    "blocks.0",
    " ".join(f"{a}_attn.{x}_proj" for a in ("self", "cross") for x in ("q", "k", "v", "output"))
    + " mlp.layer1 mlp.layer2 "
    + " ".join(f"adaln_modulation_{x}.{n}" for x in ("self_attn", "cross_attn", "mlp") for n in (1, 2)),
)  # fmt: skip

LTX2 = inside(
    "transformer_blocks.0",
    " ".join(f"{a}.to_{x}" for a in ("attn1", "audio_attn1", "audio_to_video_attn") for x in ("q", "k", "v", "out.0"))
    + " ff.net.0.proj audio_ff.net.2",
) | squares(
    "patchify_proj audio_patchify_proj adaln_single.linear audio_adaln_single.emb.timestep_embedder.linear_1"
)  # fmt: skip

LTX = inside("transformer_blocks.0", "attn1.to_q attn1.to_out.0 attn2.to_k ff.net.0.proj ff.net.2")

IDEOGRAM = {"layers.0.attention.qkv": (24, 8)} | inside("layers.0", "attention.o feed_forward.w1 adaln_modulation")

ACE = inside("layers.0", " ".join(f"{a}_attn.{x}_proj" for a in ("self", "cross") for x in "qkvo"))

FLUX3 = {
    f"{block}.0.{name}": (8, 8) for block in ("content_mode_blocks.image", "txt_mode_blocks", "single_blocks")
    for name in ("q_proj", "k_proj", "v_proj", "attn_out", "mlp_in", "mlp_out")
}  # fmt: skip

HIDREAM = inside("double_stream_blocks.0.block", "attn1.to_q attn1.to_out_t ff_i.shared_experts.w1 ff_i.experts.2.w2")

COMFY, PEFT, DEFAULT = dotted("diffusion_model."), dotted("base_model.model."), "lora_A.default.weight"

DOWN = ("lora_down.weight", "lora_up.weight")

CASES = {
    "Wan": ("WanLoraLoaderMixin", WAN, COMFY),
    "Wan, kohya": ("WanLoraLoaderMixin", WAN, flat),
    "Wan from images, lora_down": ("WanLoraLoaderMixin", WAN_I2V, dotted("diffusion_model.", *DOWN, alpha=True)),
    "Wan from images, kohya": ("WanLoraLoaderMixin", WAN_I2V, flat),
    "Wan's ends": (
        "WanLoraLoaderMixin",
        WAN
        | squares(
            "text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2 time_projection.1 head.head"
        ),
        COMFY,
    ),
    "SkyReels": ("SkyReelsV2LoraLoaderMixin", WAN, COMFY),
    "Qwen-Image, kohya": ("QwenImageLoraLoaderMixin", QWEN | QWEN_TOP, flat),
    "Qwen-Image, Lightning": ("QwenImageLoraLoaderMixin", QWEN, dotted("", *DOWN, alpha=True)),
    "Qwen-Image, DiffSynth": ("QwenImageLoraLoaderMixin", QWEN, dotted("", DEFAULT, DEFAULT.replace("A", "B"))),
    "Qwen-Image, ComfyUI": ("QwenImageLoraLoaderMixin", QWEN | QWEN_TOP, COMFY),
    "Z-Image": ("ZImageLoraLoaderMixin", Z_SPLIT, COMFY),
    "Z-Image, kohya": ("ZImageLoraLoaderMixin", Z_SPLIT, flat),
    "Z-Image, fused, dots": (
        "ZImageLoraLoaderMixin", Z_FUSED, dotted("diffusion_model.", "lora.down.weight", "lora.up.weight"),
    ),
    "Z-Image, DiffSynth": ("ZImageLoraLoaderMixin", Z_SPLIT, dotted("", DEFAULT, DEFAULT.replace("A", "B"))),
    "FLUX.2": ("Flux2LoraLoaderMixin", FLUX2, COMFY),
    "FLUX.2, kohya": ("Flux2LoraLoaderMixin", FLUX2, flat),
    "FLUX 3": ("Flux3LoraLoaderMixin", FLUX3, COMFY),
    "HunyuanVideo": ("HunyuanVideoLoraLoaderMixin", HUNYUAN, COMFY),
    "Lumina 2": ("Lumina2LoraLoaderMixin", LUMINA, COMFY),
    "Krea 2": ("Krea2LoraLoaderMixin", KREA, COMFY),
    "Krea 2, ai-toolkit": ("Krea2LoraLoaderMixin", KREA, PEFT),
    "MiniMax-H3": ("MiniMaxH3LoraLoaderMixin", MINIMAX, COMFY),
    "MiniMax-H3, kohya": ("MiniMaxH3LoraLoaderMixin", MINIMAX, flat),
    "MiniMax-H3, bare": ("MiniMaxH3LoraLoaderMixin", MINIMAX, dotted("")),
    "LTX": ("LTXVideoLoraLoaderMixin", LTX, COMFY),
    "LTX 2": ("LTX2LoraLoaderMixin", LTX2, COMFY),
    "Ideogram 4": ("Ideogram4LoraLoaderMixin", IDEOGRAM, COMFY),
    "Ideogram 4, kohya": ("Ideogram4LoraLoaderMixin", IDEOGRAM, dotted("conditional_transformer.", *DOWN, alpha=True)),
    "ACE-Step": ("AceStepLoraLoaderMixin", ACE, PEFT),
    "HiDream": ("HiDreamImageLoraLoaderMixin", HIDREAM, COMFY),
    "Anima": ("AnimaLoraLoaderMixin", ANIMA, COMFY),
}  # fmt: skip


def whole(family, naming):
    """Return the modules of one block of a family, name -> (outputs, inputs), from which the family can be detected."""
    from adapterkit.naming.architectures import fill

    sizes, architecture, told = {}, family.architecture, {}
    for weight in architecture.record.weights:
        place, native = (architecture.place(weight, each) for each in (naming, family.wanted("comfyui")))
        words = place.name.split(".") if place else []
        if place is None or (native is None and "native" in family.namings):
            continue
        last = family.facts.blocks.get(words[0], 1) - 1
        name = fill(place.name, {"{n}": str(last), "{m}": "0", "{k}": "0", "{e}": "0", "{j}": "0"})
        if "norm" in words[-1] and "linear" not in name:
            continue
        at = None if native is None else native.ratio
        if at is not None and (native.name, at) != told.setdefault(native.name, (native.name, at)):
            continue
        ratio = at or next(iter(family.ratios(name)), None)
        sizes[name] = (round(24 * ratio) if ratio else 24 * (place.of or 1), 24)
    return sizes
