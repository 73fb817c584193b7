"""The families: the model class of diffusers, its converter, and the modules of the authors' model, which go into it.

A name is a pattern: `#` is the number of a block, `{a,b}` stands for each of the words. `*3` behind a name says that a
fused weight has three times as many rows, `:scale` that the tensor is called `scale`, not `weight`. The mapping itself
is not here: the converter's output shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders import single_file_utils as single

State = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        classes: model classes of diffusers; the first has the names.
        alike: further classes, whose modules have the same names.
        convert: from the authors' state dict to diffusers'; None where both have the same names.
        native: patterns of the authors' names.
        title: its name in messages.
        component: the part of the pipeline.
        config: arguments of the class.
        rows: rows of a weight that is not fused.
        blocks: how many blocks go into the converter, where it wants all.
        lora: the converter takes a LoRA, not a checkpoint.
        kohya: the naming that is flattened into keys.
        counted: all published models have as many blocks as the class has by default.
        modules: part in `beside` -> diffusers' class of it.
        unlikely, no_inputs, outputs, distinctive, widths, beside, diffsynth_head, header_alpha, whole_norms: see
            README.md of spec/architectures.
        ratios: patterns of diffusers' modules whose outputs by inputs are evidence.
        several: such patterns -> all ratios of the published models, if these differ.
        parameters: parameters that are no module's weight: diffusers' name -> the authors'; both are templates.
        others: weight -> further namings -> templates, of tools that have names of their own for some modules.
        elsewhere: patterns of authors' modules of further models of the family, which diffusers does not have.
        cases: weight -> places, for modules that are another weight in the last block, told by outputs by inputs.
        comfyui: the authors' name -> ComfyUI's, where that is another; empty where ComfyUI has no such module.
        trained: the authors' name -> that of sd-scripts' own model, where it is another: the naming `sd_scripts`.
        fused: module that fuse_qkv_projections makes -> the modules beside it that it is made of.
        sources: where the authors' names come from.
    """

    classes: tuple[str, ...]
    convert: Callable[..., State] | None = None
    native: str = ""
    title: str = ""
    component: str = "transformer"
    alike: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    rows: int = 12
    blocks: int = 2
    lora: bool = False
    kohya: str = "native"
    distinctive: bool = False
    unlikely: bool = False
    no_inputs: tuple[int, ...] = ()
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    counted: bool = False
    widths: tuple[int, ...] = ()
    beside: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    diffsynth_head: int = 0
    header_alpha: bool = False
    whole_norms: bool = False
    ratios: tuple[str, ...] = ()
    several: dict[str, tuple[float, ...]] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    others: dict[str, dict[str, str]] = field(default_factory=dict)
    elsewhere: str = ""
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    comfyui: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


_BFL = """
    {img,txt}_in {time,vector,guidance}_in.{in,out}_layer final_layer.linear final_layer.adaLN_modulation.1
    double_blocks.#.{img,txt}_attn.qkv*3 double_blocks.#.{img,txt}_attn.proj
    double_blocks.#.{img,txt}_attn.norm.{query,key}_norm:scale double_blocks.#.{img,txt}_mod.lin
    double_blocks.#.{img,txt}_mlp.{0,2} single_blocks.#.linear1*7 single_blocks.#.linear2
    single_blocks.#.modulation.lin single_blocks.#.norm.{query,key}_norm:scale
"""
_WAN = """
    {self,cross}_attn.{q,k,v,o} {self,cross}_attn.norm_{q,k} cross_attn.{k_img,v_img,norm_k_img} ffn.{0,2} norm3
"""
_LTX = {
    "time_embed": "adaln_single", "audio_time_embed": "audio_adaln_single", "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj", "norm_q": "q_norm", "norm_k": "k_norm",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single", "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
}  # fmt: skip
"""Words of diffusers' names -> words of Lightricks'."""
_BLOCK = "{self_attn,cross_attn}.{q,k,v,output}_proj {self_attn,cross_attn}.{q,k}_norm mlp.layer{1,2}"


def _inside(block: str, parts: str) -> str:
    return " ".join(f"{block}.#.{part}" for part in parts.split())


def _lora_converter(convert: Callable[[State], State], prefix: str = "diffusion_model") -> Callable[[State], State]:
    """A converter of LoRAs as one of checkpoints: every module has an A of one row, and its weight for B."""

    def converted(state: State) -> State:
        import torch

        given = {}
        for key, value in state.items():
            module = f"{prefix}.{key.removesuffix('.weight')}"
            given |= {f"{module}.lora_A.weight": torch.ones(1, 1), f"{module}.lora_B.weight": value}
        made = convert(given)
        ends = ".lora_B.weight"
        pairs = ((key.removesuffix(ends), value) for key, value in made.items() if key.endswith(ends))
        return {f"{name.removeprefix('transformer.')}.weight": value for name, value in pairs}

    return converted


def _motion() -> dict[str, dict[str, str]]:
    """AnimateDiff's own names of its motion modules, which its motion LoRAs have: the naming `animatediff`."""
    attention = {
        f"attn{n + 1}.{x}": f"attention_blocks.{n}.{x}" for n in (0, 1) for x in ("to_q", "to_k", "to_v", "to_out.0")
    }
    norms = {"norm1": "norms.0", "norm2": "norms.1", "norm3": "ff_norm"}
    inside = attention | norms | {name: name for name in ("ff.net.0.proj", "ff.net.2")}
    blocks = {
        f"transformer_blocks.{{m}}.{ours}": f"transformer_blocks.{{m}}.{theirs}" for ours, theirs in inside.items()
    }
    parts = blocks | {name: name for name in ("norm", "proj_in", "proj_out")}
    places = [
        f"{side}_blocks.{{n}}.motion_modules.{number}"
        for side, most in (("down", 2), ("up", 3))
        for number in range(most)
    ]
    found = {
        f"{place}.{ours}": {"animatediff": f"{place}.temporal_transformer.{theirs}"}
        for place in (*places, "mid_block.motion_modules.0")
        for ours, theirs in parts.items()
    }
    # The first hole of a name is `n`.
    return {
        name.replace("{m}", "{n}") if "{n}" not in name else name: {
            naming: there.replace("{m}", "{n}") if "{n}" not in there else there for naming, there in each.items()
        }
        for name, each in found.items()
    }


_PIXART = {
    "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "t_block.1": "adaln_single.linear",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "y_embedder.y_proj.fc": "caption_projection.linear_", "final_layer.linear": "proj_out",
    "cross_attn.q_linear": "attn2.to_q", "cross_attn.proj": "attn2.to_out.0", ".attn.proj": ".attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "blocks.": "transformer_blocks.",
}  # fmt: skip
_HUNYUAN_VIDEO_15 = {
    "byt5_in.layernorm": "context_embedder_2.norm", "byt5_in.fc": "context_embedder_2.linear_",
    "vision_in.proj.0": "image_embedder.norm_in", "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2", "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed", "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    **{f"img_attn_{x}.": f"attn.to_{x}." for x in "qkv"}, **{f"txt_attn_{x}.": f"attn.add_{x}_proj." for x in "qkv"},
}  # fmt: skip
"""The authors' words -> diffusers', in the scripts that convert checkpoints; the rest is as in HunyuanVideo."""


def _pixart(state: State) -> State:
    made = {}
    for key, value in state.items():
        name = key
        for word, other in _PIXART.items():
            name = name.replace(word, other)
        fused = {".attn.qkv": ("attn1.", "qkv"), ".cross_attn.kv_linear": ("attn2.", "kv")}
        word = next((word for word in fused if word in key), "")
        attention, letters = fused.get(word, ("", "-"))
        for letter, part in zip(letters, value.chunk(len(letters)), strict=True):
            made[name.replace(word[1:], f"{attention}to_{letter}") if word else name] = part
    return made


_COGVIDEOX = {
    "transformer.final_layernorm": "norm_final", "transformer.layers": "transformer_blocks",
    "attention.dense": "attn1.to_out.0", "mlp.dense_h_to_4h": "ff.net.0.proj", "mlp.dense_4h_to_h": "ff.net.2",
    "input_layernorm": "norm1.norm", "post_attention_layernorm": "norm2.norm",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1", "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed": "patch_embed", "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.linear": "proj_out", "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
"""SAT's words -> diffusers'."""
_COGVIDEOX_IN_COMFYUI = {
    **{f"{x}_embedding.linear_{n}": f"{x}_embedding_linear_{n}" for x in ("time", "ofs") for n in (1, 2)},
    **{each: each for each in ("patch_embed.proj", "patch_embed.text_proj", "proj_out", "norm_final", "norm_out.linear",
                               "norm_out.norm")},
    **{
        f"transformer_blocks.{{n}}.{word}": f"blocks.{{n}}.{other}"
        for word, other in {
            **{f"attn1.to_{x}": x for x in "qkv"}, "attn1.norm_q": "norm_q", "attn1.norm_k": "norm_k",
            "attn1.to_out.0": "attn_out", "ff.net.0.proj": "ff_proj", "ff.net.2": "ff_out",
            **{each: each for each in ("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm")},
        }.items()
    },
}  # fmt: skip
"""diffusers' names of CogVideoX -> ComfyUI's; `comfyui_keys.py` compares them with ComfyUI's own model."""


def _cogvideox(state: State) -> State:
    import torch

    made = {}
    for key, value in state.items():
        parts, number = value.chunk(12), key.split(".")[-3 if "adaLN_modulations" in key else -2]
        block = f"transformer_blocks.{number}"
        if "adaLN_modulations" in key:
            # The image's shift, scale and gate of attention and MLP stand before the text's.
            made[f"{block}.norm1.linear.weight"] = torch.cat([*parts[0:3], *parts[6:9]])
            made[f"{block}.norm2.linear.weight"] = torch.cat([*parts[3:6], *parts[9:12]])
        elif "layernorm_list" in key:
            made[f"{block}.attn1.norm_{'q' if 'query' in key else 'k'}.weight"] = value
        elif ".query_key_value." in key:
            made |= {f"transformer_blocks.{key.split('.')[2]}.attn1.to_{x}.weight": part
                     for x, part in zip("qkv", value.chunk(3), strict=True)}  # fmt: skip
        else:
            word = next(word for word in _COGVIDEOX if word in key)
            name = key.replace(word, _COGVIDEOX[word])
            for other, ours in _COGVIDEOX.items():
                name = name.replace(other, ours) if ".layers." in key else name
            made[name] = value
    return made


def _cogview4(state: State) -> State:
    import torch

    words = {
        "time_embed.0": "time_condition_embed.timestep_embedder.linear_1",
        "time_embed.2": "time_condition_embed.timestep_embedder.linear_2",
        "label_emb.0.0": "time_condition_embed.condition_embedder.linear_1",
        "label_emb.0.2": "time_condition_embed.condition_embedder.linear_2",
        "mixins.patch_embed": "patch_embed", "mixins.final_layer.linear": "proj_out",
        "transformer.layers": "transformer_blocks", "attention.dense": "attn1.to_out.0",
        "mlp.dense_h_to_4h": "ff.net.0.proj", "mlp.dense_4h_to_h": "ff.net.2",
    }  # fmt: skip
    made = {}
    for key, value in state.items():
        if "adaln_modules" in key:
            made[f"transformer_blocks.{key.split('.')[3]}.norm1.linear.weight"] = value
        elif "final_layer.adaln" in key:
            made["norm_out.linear.weight"] = torch.cat([*reversed(value.chunk(2))])
        elif ".query_key_value." in key:
            made |= {f"transformer_blocks.{key.split('.')[2]}.attn1.to_{x}.weight": part
                     for x, part in zip("qkv", value.chunk(3), strict=True)}  # fmt: skip
        else:
            name = key
            for word, other in words.items():
                name = name.replace(word, other)
            made[name] = value
    return made


def _hunyuan_video_15(state: State) -> State:
    renamed = {}
    for key, value in state.items():
        name = key
        for word, other in _HUNYUAN_VIDEO_15.items():
            name = name.replace(word, other)
        renamed[name] = value
    return single.convert_hunyuan_video_transformer_to_diffusers(renamed)


_HUNYUAN_IMAGE = _HUNYUAN_VIDEO_15 | {
    "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_guidance_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_guidance_embed.timestep_embedder_r.linear_2",
    "guidance_in.mlp.0": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
    **{f"linear1_{x}.": f"attn.to_{x}." for x in "qkv"}, "linear1_mlp": "proj_mlp", "linear2.fc": "proj_out",
    "single_blocks": "single_transformer_blocks",
}  # fmt: skip
"""The same of HunyuanImage 2.1, whose authors have linear1 in four parts."""


def _hunyuan_image(state: State) -> State:
    renamed = {}
    for key, value in state.items():
        name = key
        for word, other in _HUNYUAN_IMAGE.items():
            name = name.replace(word, other) if word != "single_blocks" or "modulation" not in key else name
        name = name.replace(".modulation.linear", ".norm.linear") if name.startswith("single") else name
        for letter in "qk" if name.startswith("single") else "":
            name = name.replace(f".{letter}_norm", f".attn.norm_{letter}")
        renamed[name.replace("single_blocks", "single_transformer_blocks")] = value
    return single.convert_hunyuan_video_transformer_to_diffusers(renamed)


def _longcat_image(state: State) -> State:
    made = single.convert_flux_transformer_checkpoint_to_diffusers(state)
    return {key.replace("time_text_embed.", "time_embed."): value for key, value in made.items()}


def _wan(state: State) -> State:
    made = single.convert_wan_transformer_to_diffusers(state)
    for word, other in (
        ("fps_projection.0", "fps_projection.net.0.proj"),
        ("fps_projection.2", "fps_projection.net.2"),
    ):
        made[f"{other}.weight"] = made.pop(f"{word}.weight")  # As scripts/convert_skyreelsv2_to_diffusers.py has it.
    return made


_IN_COMFYUI = {
    f"{word}.{part}": f"{word}.{layer}_layer"
    for word in ("time_in", "time_r_in", "guidance_in", "txt_in.t_embedder", "txt_in.c_embedder")
    for part, layer in zip(
        ("linear_1", "linear_2") if word.endswith("c_embedder") else ("mlp.0", "mlp.2"), ("in", "out"), strict=True
    )
}  # fmt: skip
"""ComfyUI's names of HunyuanVideo's embedders: it has FLUX's for these."""
_QKV_IN_COMFYUI = {
    f"double_blocks.{{n}}.{x}_attn_{letter}": {"name": f"double_blocks.{{n}}.{x}_attn_qkv", "part": part, "of": 3}
    for x in ("img", "txt") for part, letter in enumerate("qkv")
}  # fmt: skip


_REFINER = "txt_in.individual_token_refiner.blocks.{n}"
_IN_FLUX = {
    "attn_proj": "attn.proj", "attn_q_norm": "attn.norm.query_norm", "attn_k_norm": "attn.norm.key_norm",
    "mod.linear": "mod.lin", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
}  # fmt: skip
_HUNYUAN_IMAGE_IN_SD_SCRIPTS = {
    **{f"double_blocks.{{n}}.{x}_attn_{letter}": {"name": f"double_blocks.{{n}}.{x}_attn_qkv", "part": part, "of": 3}
       for x in ("img", "txt") for part, letter in enumerate("qkv")},
    **{f"single_blocks.{{n}}.linear1_{letter}": {"name": "single_blocks.{n}.linear1", "part": part, "of": 7}
       for part, letter in enumerate("qkv")},
    "single_blocks.{n}.linear1_mlp": {"name": "single_blocks.{n}.linear1", "part": 3, "parts": 4, "of": 7},
    "single_blocks.{n}.linear2.fc": "single_blocks.{n}.linear2",
}  # fmt: skip
"""sd-scripts' model of HunyuanImage has the fused weights of HunyuanVideo."""
_HUNYUAN_IMAGE_IN_COMFYUI = {
    **{f"double_blocks.{{n}}.{x}_attn_{letter}": {"name": f"double_blocks.{{n}}.{x}_attn.qkv", "part": part, "of": 3}
       for x in ("img", "txt") for part, letter in enumerate("qkv")},
    **{f"double_blocks.{{n}}.{x}_{word}": f"double_blocks.{{n}}.{x}_{other}"
       for x in ("img", "txt") for word, other in _IN_FLUX.items()},
    **{f"single_blocks.{{n}}.linear1_{letter}": {"name": "single_blocks.{n}.linear1", "part": part, "of": 7}
       for part, letter in enumerate("qkv")},
    "single_blocks.{n}.linear1_mlp": {"name": "single_blocks.{n}.linear1", "part": 3, "parts": 4, "of": 7},
    "single_blocks.{n}.linear2.fc": "single_blocks.{n}.linear2",
    "single_blocks.{n}.modulation.linear": "single_blocks.{n}.modulation.lin",
    **{f"single_blocks.{{n}}.{x[0]}_norm": f"single_blocks.{{n}}.norm.{x}_norm" for x in ("query", "key")},
    **{f"{_REFINER}.{word}": f"{_REFINER}.{other}" for word, other in (
        ("self_attn_qkv", "self_attn.qkv"), ("self_attn_proj", "self_attn.proj"), ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"))},
}  # fmt: skip
"""ComfyUI's names of HunyuanImage 2.1's modules: FLUX's words; `comfyui_keys.py` compares them with its model."""

_CONTEXT, _MODULATION = (
    "transformer_blocks.{n}.norm1_context.linear",
    "joint_blocks.{n}.context_block.adaLN_modulation.1",
)
_SD3_CASES = {
    _CONTEXT: {"diffusers": {"name": _CONTEXT, "ratio": 6}, "native": {"name": _MODULATION, "ratio": 6}},
    **{
        f"{_CONTEXT}.{part}": {
            "diffusers": {"name": _CONTEXT, "part": part, "of": 2, "ratio": 2},
            "native": {"name": _MODULATION, "part": 1 - part, "of": 2, "ratio": 2},
        }
        for part in (0, 1)
    },
}
"""The last block's modulation of the text has shift and scale alone, in diffusers in the other order."""
_MOCHI_CASES = {
    _CONTEXT: {"native": {"name": "blocks.{n}.mod_y", "ratio": 2}},
    f"{_CONTEXT}_1": {"native": {"name": "blocks.{n}.mod_y", "ratio": 0.5}},
}


def _ltx2(state: State) -> State:
    """The converter of checkpoints, and the two names that only the converter of LoRAs knows (LTX 2.3)."""
    made = single.convert_ltx2_transformer_to_diffusers(state)
    return {key.replace("prompt_adaln_single.", "prompt_adaln."): value for key, value in made.items()}


def _flux3(state: State) -> State:
    return single.convert_flux3_transformer_checkpoint_to_diffusers(state)


_SANA_VIDEO = {
    "x_embedder.proj": "patch_embedding", "y_embedder.y_proj.fc": "caption_projection.linear_",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2", "t_block.1": "time_embed.linear",
    "attention_y_norm": "caption_norm", "final_layer.linear": "proj_out", "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0", "cross_attn.q_norm": "attn2.norm_q", "cross_attn.k_norm": "attn2.norm_k",
    ".attn.proj": ".attn1.to_out.0", ".attn.q_norm": ".attn1.norm_q", ".attn.k_norm": ".attn1.norm_k",
    "mlp.inverted_conv.conv": "ff.conv_inverted", "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point", "mlp.t_conv": "ff.conv_temp", "blocks.": "transformer_blocks.",
}  # fmt: skip


def _sana_video(state: State) -> State:
    """The names of diffusers' script, whose attention is cut as Sana's is."""
    made: State = {}
    for key, value in state.items():
        name = key
        for theirs, ours in _SANA_VIDEO.items():
            name = name.replace(theirs, ours)
        if ".qkv." in name or ".kv_linear." in name:
            fused, letters, attn = (".attn.qkv", "qkv", ".attn1") if ".qkv." in name else (
                ".cross_attn.kv_linear", "kv", ".attn2"
            )  # fmt: skip
            for letter, part in zip(letters, value.chunk(len(letters)), strict=True):
                made[name.replace(fused, f"{attn}.to_{letter}")] = part
        else:
            made[name] = value
    return made


FAMILIES: dict[str, Family] = {
    "flux": Family(
        ("FluxTransformer2DModel",), single.convert_flux_transformer_checkpoint_to_diffusers, _BFL, title="flux",
        config={"guidance_embeds": True}, rows=3072, counted=True, distinctive=True,
        ratios=("*.ff.net.*", "*.ff_context.net.*", "*.proj_out"), sources=("black-forest-labs/flux: model.py",),
        whole_norms=True,
    ),
    "flux2": Family(
        ("Flux2Transformer2DModel",), single.convert_flux2_transformer_checkpoint_to_diffusers,
        """{img,txt}_in {time,guidance}_in.{in,out}_layer final_layer.linear final_layer.adaLN_modulation.1
        double_stream_modulation_{img,txt}.lin single_stream_modulation.lin
        double_blocks.#.{img,txt}_attn.qkv*3 double_blocks.#.{img,txt}_attn.proj double_blocks.#.{img,txt}_mlp.{0,2}
        double_blocks.#.{img,txt}_attn.norm.{query,key}_norm:scale
        single_blocks.#.linear{1,2} single_blocks.#.norm.{query,key}_norm:scale""",
        title="flux2", widths=(3072, 4096), fused={"to_qkv": "to_{q,k,v}", "to_added_qkv": "add_{q,k,v}_proj"},
        ratios=("*.ff.linear_*", "*.ff_context.linear_*", "*.to_qkv_mlp_proj", "*.attn.to_out"),
        sources=("black-forest-labs/flux2: model.py",),
    ),
    "flux3": Family(
        ("Flux3Transformer2DModel",), _flux3,
        """emb_in.{image,image_cond} txt_in {time_in,ref_time_in}.{in,out}_layer
        {early_stream_modulations,single_stream_modulations}.{image,image_cond,txt}.lin
        content_mode_blocks.{image,image_cond}.#.{q_proj,k_proj,v_proj,attn_out,mlp_in,mlp_out}
        content_mode_blocks.{image,image_cond}.#.norm.{query,key}_norm:scale
        txt_mode_blocks.#.{q_proj,k_proj,v_proj,attn_out,mlp_in,mlp_out} txt_mode_blocks.#.norm.{query,key}_norm:scale
        single_blocks.#.{q_proj,k_proj,v_proj,attn_out,mlp_in,mlp_out} single_blocks.#.norm.{query,key}_norm:scale
        final_layer.image.linear final_layer.image.adaLN_modulation.1""",
        sources=("diffusers 0.42.1: single_file_utils.py",),
    ),
    "chroma": Family(
        ("ChromaTransformer2DModel",), single.convert_chroma_transformer_checkpoint_to_diffusers,
        """{img,txt}_in distilled_guidance_layer.{in,out}_proj distilled_guidance_layer.layers.#.{in,out}_layer
        distilled_guidance_layer.norms.#:scale final_layer.linear
        double_blocks.#.{img,txt}_attn.qkv*3 double_blocks.#.{img,txt}_attn.proj double_blocks.#.{img,txt}_mlp.{0,2}
        double_blocks.#.{img,txt}_attn.norm.{query,key}_norm:scale single_blocks.#.linear1*7 single_blocks.#.linear2
        single_blocks.#.norm.{query,key}_norm:scale""",
        rows=3072, counted=True, ratios=("*.ff.net.*", "*.ff_context.net.*", "*.proj_out"),
        elsewhere="""img_in_patch nerf_image_embedder.embedder.0 nerf_blocks.#.{param_generator,norm}
        nerf_final_layer.{norm,linear} nerf_final_layer_conv.{norm,conv}""",
        sources=("lodestone-rock/flow: chroma's model.py", "ComfyUI: Chroma Radiance"), whole_norms=True,
    ),
    "sd3": Family(
        ("SD3Transformer2DModel",), single.convert_sd3_transformer_checkpoint_to_diffusers,
        """context_embedder x_embedder.proj {t,y}_embedder.mlp.{0,2} final_layer.linear final_layer.adaLN_modulation.1
        joint_blocks.#.{x,context}_block.attn.qkv*3 joint_blocks.#.{x,context}_block.attn.proj
        joint_blocks.#.x_block.attn2.qkv*3 joint_blocks.#.x_block.attn2.proj joint_blocks.#.x_block.adaLN_modulation.1
        joint_blocks.#.{x,context}_block.mlp.{fc1,fc2} joint_blocks.#.{x,context}_block.attn.ln_{q,k}
        joint_blocks.#.x_block.attn2.ln_{q,k} joint_blocks.#.context_block.adaLN_modulation.1""",
        config={"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, blocks=3, distinctive=True,
        cases=_SD3_CASES,
        widths=(1536, 2432), sources=("Stability-AI/sd3.5: mmdit.py",),
    ),
    "auraflow": Family(
        ("AuraFlowTransformer2DModel",), single.convert_auraflow_transformer_checkpoint_to_diffusers,
        """t_embedder.mlp.{0,2} cond_seq_linear init_x_linear final_linear modF.1
        double_layers.#.mlp{X,C}.{c_fc1,c_fc2,c_proj} double_layers.#.mod{X,C}.1 double_layers.#.attn.w{1,2}{q,k,v,o}
        single_layers.#.mlp.{c_fc1,c_fc2,c_proj} single_layers.#.modCX.1 single_layers.#.attn.w1{q,k,v,o}""",
        sources=("cloneofsimo/minRF: mmdit.py",),
    ),
    "pixart": Family(
        ("PixArtTransformer2DModel",), _pixart,
        """x_embedder.proj {t,csize,ar}_embedder.mlp.{0,2} t_block.1 y_embedder.y_proj.fc{1,2} final_layer.linear
        blocks.#.attn.qkv*3 blocks.#.attn.proj blocks.#.cross_attn.q_linear blocks.#.cross_attn.kv_linear*2
        blocks.#.cross_attn.proj blocks.#.mlp.fc{1,2}""",
        sources=("diffusers: scripts/convert_pixart_alpha_to_diffusers.py",), kohya="diffusers",
    ),
    "sana": Family(
        ("SanaTransformer2DModel",), single.convert_sana_transformer_to_diffusers,
        """x_embedder.proj t_embedder.mlp.{0,2} t_block.1 y_embedder.y_proj.fc{1,2} attention_y_norm final_layer.linear
        blocks.#.attn.qkv*3 blocks.#.attn.proj blocks.#.cross_attn.q_linear blocks.#.cross_attn.kv_linear*2
        blocks.#.cross_attn.proj blocks.#.mlp.{inverted_conv,depth_conv,point_conv}.conv""",
        widths=(1152,), sources=("NVlabs/Sana: sana_multi_scale.py",),
    ),
    "lumina2": Family(
        ("Lumina2Transformer2DModel",), single.convert_lumina2_to_diffusers,
        """x_embedder t_embedder.mlp.{0,2} cap_embedder.{0,1} final_layer.linear final_layer.adaLN_modulation.1
        {layers,noise_refiner}.#.adaLN_modulation.1
        {layers,noise_refiner,context_refiner}.#.attention.qkv*5
        {layers,noise_refiner,context_refiner}.#.attention.{out,q_norm,k_norm}
        {layers,noise_refiner,context_refiner}.#.feed_forward.w{1,2,3}
        {layers,noise_refiner,context_refiner}.#.{attention,ffn}_norm{1,2}""",
        rows=768, sources=("Alpha-VLLM/Lumina-Image-2.0: models/model.py",),
    ),
    "z_image": Family(
        ("ZImageTransformer2DModel",), single.convert_z_image_transformer_checkpoint_to_diffusers,
        """x_embedder t_embedder.mlp.{0,2} {cap,siglip}_embedder.{0,1} final_layer.linear final_layer.adaLN_modulation.1
        {layers,noise_refiner}.#.adaLN_modulation.0
        {layers,noise_refiner,context_refiner,siglip_refiner}.#.attention.qkv*3
        {layers,noise_refiner,context_refiner,siglip_refiner}.#.attention.{out,q_norm,k_norm}
        {layers,noise_refiner,context_refiner,siglip_refiner}.#.feed_forward.w{1,2,3}
        {layers,noise_refiner,context_refiner,siglip_refiner}.#.{attention,ffn}_norm{1,2}""",
        config={"siglip_feat_dim": 1152}, kohya="diffusers", sources=("Tongyi-MAI/Z-Image as ComfyUI stores it",),
    ),
    "hidream": Family(
        ("HiDreamImageTransformer2DModel",), None, widths=(2560,), kohya="diffusers",
        config={"patch_size": 2, "caption_channels": (4096, 4096), "text_emb_dim": 2048, "num_routed_experts": 4,
                "num_activated_experts": 2, "num_layers": 2, "num_single_layers": 2},
        native="=", sources=("HiDream-ai/HiDream-I1",),
    ),
    "qwen_image": Family(
        ("QwenImageTransformer2DModel",), None, native="=", kohya="diffusers", counted=True,
        sources=("QwenLM/Qwen-Image",),
    ),
    "wan": Family(
        ("WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel",
         "WanAnimateTransformer3DModel"), _wan,
        f"""fps_embedding fps_projection.{{0,2}}
        pose_patch_embedding face_encoder.{{conv1_local,conv2,conv3}}.conv face_encoder.out_proj
        motion_encoder.enc.fc.{{0,1,2,3,4}}
        face_adapter.fuser_blocks.#.linear1_kv*2 face_adapter.fuser_blocks.#.{{linear1_q,linear2,q_norm,k_norm}}
        patch_embedding vace_patch_embedding {{text,time}}_embedding.{{0,2}} time_projection.1 head.head
        img_emb.proj.{{0,1,3,4}} {_inside("blocks", _WAN)} {_inside("vace_blocks", _WAN)}
        vace_blocks.#.{{before,after}}_proj""",
        config={"image_dim": 1280, "added_kv_proj_dim": 5120}, widths=(1536, 2048, 3072),
        alike=("ChronoEditTransformer3DModel", "HeliosTransformer3DModel", "AnyFlowTransformer3DModel",
               "AnyFlowFARTransformer3DModel"),
        parameters={"scale_shift_table": "head.modulation", "blocks.{n}.scale_shift_table": "blocks.{n}.modulation",
                    "vace_blocks.{n}.scale_shift_table": "vace_blocks.{n}.modulation"},
        elsewhere="""cond_encoder trainable_cond_mask audio_injector.injector.#.{q,k,v,o,norm_q,norm_k}
        audio_injector.injector_adain_layers.#.linear frame_packer.{proj,proj_2x,proj_4x}
        casual_audio_encoder.encoder.{conv1_local,conv1_global,conv2,conv3}.conv
        casual_audio_encoder.encoder.final_linear""",
        sources=("Wan-Video/Wan2.1: model.py and vace_model.py", "SkyworkAI/SkyReels-V2",
                 "Wan-Video/Wan2.2: S2V's modules as ComfyUI has them"),
        comfyui=dict.fromkeys(
            ("fps_embedding", "fps_projection.0", "fps_projection.2", "vace_blocks.{n}.cross_attn.k_img",
             "vace_blocks.{n}.cross_attn.v_img"), ""
        ),
    ),
    "hunyuan_video": Family(
        ("HunyuanVideoTransformer3DModel",), single.convert_hunyuan_video_transformer_to_diffusers,
        """img_in.proj {time,guidance}_in.mlp.{0,2} vector_in.{in,out}_layer
        txt_in.input_embedder txt_in.t_embedder.mlp.{0,2} txt_in.c_embedder.linear_{1,2}
        txt_in.individual_token_refiner.blocks.#.self_attn_qkv*3
        txt_in.individual_token_refiner.blocks.#.{self_attn_proj,mlp.fc1,mlp.fc2,adaLN_modulation.1,norm1,norm2}
        double_blocks.#.{img,txt}_attn_qkv*3 double_blocks.#.{img,txt}_attn_{proj,q_norm,k_norm}
        double_blocks.#.{img,txt}_mod.linear double_blocks.#.{img,txt}_mlp.{fc1,fc2}
        single_blocks.#.linear1*7 single_blocks.#.{linear2,modulation.linear,q_norm,k_norm}
        final_layer.linear final_layer.adaLN_modulation.1""",
        rows=3072, counted=True, config={"guidance_embeds": True}, sources=("Tencent-Hunyuan/HunyuanVideo: models.py",),
        comfyui=_IN_COMFYUI, alike=("HunyuanVideoFramepackTransformer3DModel",),
    ),
    "hunyuan_video_15": Family(
        ("HunyuanVideo15Transformer3DModel",), _hunyuan_video_15,
        """img_in.proj {time_in,time_r_in}.mlp.{0,2} txt_in.input_embedder txt_in.t_embedder.mlp.{0,2}
        txt_in.c_embedder.linear_{1,2} txt_in.individual_token_refiner.blocks.#.self_attn_qkv*3
        txt_in.individual_token_refiner.blocks.#.{self_attn_proj,mlp.fc1,mlp.fc2,adaLN_modulation.1,norm1,norm2}
        byt5_in.{layernorm,fc1,fc2,fc3} vision_in.proj.{0,1,3,4} cond_type_embedding
        double_blocks.#.{img,txt}_attn_{q,k,v,proj,q_norm,k_norm} double_blocks.#.{img,txt}_mod.linear
        double_blocks.#.{img,txt}_mlp.{fc1,fc2} final_layer.linear final_layer.adaLN_modulation.1""",
        config={"use_meanflow": True}, sources=("diffusers: scripts/convert_hunyuan_video1_5_to_diffusers.py",),
        comfyui=_IN_COMFYUI | _QKV_IN_COMFYUI,
    ),
    "hunyuan_image": Family(
        ("HunyuanImageTransformer2DModel",), _hunyuan_image,
        """img_in.proj {time,time_r,guidance}_in.mlp.{0,2} txt_in.input_embedder txt_in.t_embedder.mlp.{0,2}
        txt_in.c_embedder.linear_{1,2} txt_in.individual_token_refiner.blocks.#.self_attn_qkv*3
        txt_in.individual_token_refiner.blocks.#.{self_attn_proj,mlp.fc1,mlp.fc2,adaLN_modulation.1,norm1,norm2}
        byt5_in.{layernorm,fc1,fc2,fc3}
        double_blocks.#.{img,txt}_attn_{q,k,v,proj,q_norm,k_norm} double_blocks.#.{img,txt}_mod.linear
        double_blocks.#.{img,txt}_mlp.{fc1,fc2} single_blocks.#.linear1_{q,k,v} single_blocks.#.linear1_mlp*4
        single_blocks.#.linear2.fc single_blocks.#.{modulation.linear,q_norm,k_norm}
        final_layer.linear final_layer.adaLN_modulation.1""",
        title="HunyuanImage 2.1", unlikely=True, counted=True,
        ratios=("*transformer_blocks.{n}.attn.to_?", "*.attn.add_*", "single_transformer_blocks.{n}.proj_mlp"),
        config={"text_embed_2_dim": 1472, "guidance_embeds": True, "use_meanflow": True},
        sources=("diffusers: scripts/convert_hunyuan_image_to_diffusers.py",),
        comfyui=_IN_COMFYUI | _HUNYUAN_IMAGE_IN_COMFYUI, trained=_HUNYUAN_IMAGE_IN_SD_SCRIPTS, kohya="sd_scripts",
    ),
    "longcat_image": Family(
        ("LongCatImageTransformer2DModel",), _longcat_image,
        """{img,txt}_in time_in.{in,out}_layer final_layer.linear final_layer.adaLN_modulation.1
        double_blocks.#.{img,txt}_attn.qkv*3 double_blocks.#.{img,txt}_attn.proj
        double_blocks.#.{img,txt}_attn.norm.{query,key}_norm:scale double_blocks.#.{img,txt}_mod.lin
        double_blocks.#.{img,txt}_mlp.{0,2} single_blocks.#.linear1*7 single_blocks.#.linear2
        single_blocks.#.modulation.lin single_blocks.#.norm.{query,key}_norm:scale""",
        title="LongCat-Image", unlikely=True, rows=3072, sources=("ComfyUI: LongCatImage",),
    ),
    "qwen_image21": Family(
        ("QwenImage21Transformer2DModel",), title="Qwen-Image 2.1", counted=True, kohya="diffusers",
    ),
    "nucleus_image": Family(
        ("NucleusMoEImageTransformer2DModel",), title="Nucleus-Image", counted=True, unlikely=True,
    ),
    "minimax_music3": Family(
        ("MiniMaxMusic3Transformer1DModel",), title="MiniMax Music 3", counted=True, unlikely=True,
    ),
    "allegro": Family(("AllegroTransformer3DModel",), title="Allegro", counted=True, unlikely=True),
    # The following share the names of their attention with a family above. No tool but diffusers has names for them.
    "dit": Family(("DiTTransformer2DModel",), title="DiT", counted=True, unlikely=True),
    "bria": Family(
        ("BriaTransformer2DModel",), title="Bria 3.2", counted=True, unlikely=True,
        config={"num_layers": 8, "num_single_layers": 28},
    ),
    "bria_fibo": Family(
        ("BriaFiboTransformer2DModel",), title="Bria FIBO", counted=True, unlikely=True,
        config={"num_layers": 8, "num_single_layers": 38},
    ),
    "bria_fibo2": Family(("BriaFibo2Transformer2DModel",), title="Bria FIBO 2", counted=True, unlikely=True),
    "glm_image_decoder": Family(
        ("GlmImageTransformer2DModel",), title="GLM-Image", counted=True, unlikely=True, kohya="diffusers",
        config={"attention_head_dim": 128, "num_attention_heads": 32},
    ),
    "motif_video": Family(
        ("MotifVideoTransformer3DModel",), title="Motif-Video", counted=True, unlikely=True,
        config={"num_attention_heads": 12, "num_layers": 12, "num_single_layers": 24},
    ),
    "ovis_image": Family(("OvisImageTransformer2DModel",), title="Ovis-Image", counted=True, unlikely=True),
    "hunyuan_dit": Family(
        ("HunyuanDiT2DModel",), title="Hunyuan-DiT", counted=True, unlikely=True,
        config={"num_layers": 40, "in_channels": 4, "hidden_size": 1408, "patch_size": 2, "sample_size": 128,
                "mlp_ratio": 4.3637},
    ),
    "lumina_next": Family(
        ("LuminaNextDiT2DModel",), title="Lumina-Next", counted=True, unlikely=True,
        config={"hidden_size": 2304, "num_layers": 24, "num_kv_heads": 8, "multiple_of": 256},
    ),
    "easyanimate": Family(
        ("EasyAnimateTransformer3DModel",), title="EasyAnimate", counted=True, unlikely=True,
        config={"in_channels": 16, "out_channels": 16, "patch_size": 2},
    ),
    "omnigen": Family(
        ("OmniGenTransformer2DModel",), title="OmniGen", counted=True, unlikely=True,
        config={"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "type": "su"}},
    ),
    "sana_wm": Family(
        ("SanaWMTransformer3DModel",), title="SANA-WM", counted=True, unlikely=True, widths=(2240,)
    ),
    "stable_audio": Family(("StableAudioDiTModel",), title="Stable Audio", counted=True, unlikely=True),
    "wan_animate2": Family(("WanAnimate2Transformer3DModel",), title="Wan Animate 2", counted=True, unlikely=True),
    "cosmos3": Family(("Cosmos3OmniTransformer",), title="Cosmos 3", counted=True, unlikely=True),
    "kandinsky6": Family(("Kandinsky6Transformer3DModel",), title="Kandinsky 6", counted=True, unlikely=True),
    "kandinsky6_sr": Family(("Kandinsky6SRTransformer3DModel",), title="Kandinsky 6 SR", counted=True, unlikely=True),
    "prx": Family(("PRXTransformer2DModel",), title="PRX", counted=True, unlikely=True, widths=(1792,)),
    "joyimage_edit": Family(
        ("JoyImageEditTransformer3DModel",), title="JoyImage-Edit", counted=True, unlikely=True, widths=(3072, 4096),
        alike=("JoyImageEditPlusTransformer3DModel",),
    ),
    "stable_audio3": Family(("StableAudio3DiTModel",), title="Stable Audio 3", counted=True, unlikely=True),
    "longcat_audio": Family(("LongCatAudioDiTTransformer",), title="LongCat-Audio", counted=True, unlikely=True),
    "latte": Family(
        ("LatteTransformer3DModel",), title="Latte", counted=True, unlikely=True,
        config={"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
                "num_layers": 28, "cross_attention_dim": 1152, "caption_channels": 4096, "patch_size": 2,
                "sample_size": 64, "attention_bias": True, "norm_type": "ada_norm_single",
                "norm_elementwise_affine": False},
    ),
    "rfd4_proteina": Family(("RFD4ProteinaTransformer",), title="RFD4 Proteina", counted=True, unlikely=True),
    "kandinsky_prior": Family(("PriorTransformer",), title="a prior of unCLIP", counted=True, unlikely=True),
    # U-Nets whose blocks are named as those of Stable Diffusion.
    "dreamlite": Family(
        ("DreamLiteUNetModel",), title="DreamLite", component="unet", kohya="diffusers", counted=True, unlikely=True,
        widths=(320, 640, 1280), no_inputs=(768, 1024),
        # One head of keys and of values: of the size that the class has by default, or of 64.
        outputs={"2048": (5, 10, 20, 64)},
    ),
    "kandinsky3": Family(
        ("Kandinsky3UNet",), title="Kandinsky 3", component="unet", kohya="diffusers", counted=True, unlikely=True
    ),
    "i2vgen_xl": Family(
        ("I2VGenXLUNet",), title="I2VGen-XL", component="unet", kohya="diffusers", counted=True, unlikely=True,
        alike=("UNet3DConditionModel",), no_inputs=(768, 2048),
    ),
    "stable_video": Family(
        ("UNetSpatioTemporalConditionModel",), title="Stable Video Diffusion", component="unet", kohya="diffusers",
        counted=True, unlikely=True, no_inputs=(768, 2048),
    ),
    "motion_unet": Family(
        ("UNetMotionModel",), title="AnimateDiff", component="unet", kohya="diffusers", unlikely=True,
        others=_motion(), sources=("diffusers: scripts/convert_animatediff_motion_lora_to_diffusers.py",),
    ),
    "uvit2d": Family(("UVit2DModel",), title="aMUSEd", counted=True, unlikely=True),
    # ControlNets have copies of the first blocks of the models that they steer, under the same names.
    "controlnet_sd": Family(
        ("ControlNetModel",), title="a ControlNet of Stable Diffusion", component="controlnet", counted=True,
        unlikely=True, widths=(320, 640, 1280),
        alike=("ControlNetUnionModel", "MultiControlNetModel", "MultiControlNetUnionModel"),
    ),
    "controlnet_sparse": Family(
        ("SparseControlNetModel",), title="a SparseCtrl ControlNet", component="controlnet", counted=True,
        unlikely=True, widths=(320, 640, 1280),
    ),
    "controlnet_xs": Family(
        ("ControlNetXSAdapter",), title="a ControlNet-XS", component="controlnet", counted=True, unlikely=True
    ),
    "controlnet_flux": Family(
        ("FluxControlNetModel",), title="a ControlNet of FLUX", component="controlnet", counted=True, unlikely=True,
        config={"num_layers": 6, "num_single_layers": 10}, alike=("FluxMultiControlNetModel",),
    ),
    "controlnet_sd3": Family(
        ("SD3ControlNetModel",), title="a ControlNet of SD 3", component="controlnet", counted=True, unlikely=True,
        config={"num_layers": 19}, widths=(1536, 2432), alike=("SD3MultiControlNetModel",),
    ),
    "controlnet_sana": Family(
        ("SanaControlNetModel",), title="a ControlNet of Sana", component="controlnet", counted=True, unlikely=True,
        widths=(1152, 2240),
    ),
    "controlnet_qwen_image": Family(
        ("QwenImageControlNetModel",), title="a ControlNet of Qwen-Image", component="controlnet", counted=True,
        unlikely=True, config={"num_layers": 5}, alike=("QwenImageMultiControlNetModel",),
    ),
    "controlnet_z_image": Family(
        ("ZImageControlNetModel",), title="a ControlNet of Z-Image", component="controlnet", counted=True,
        unlikely=True, config={"control_layers_places": [0, 5, 10, 15, 20, 25], "control_refiner_layers_places": [0, 1],
                               "control_in_dim": 16},
    ),
    "controlnet_cosmos": Family(
        ("CosmosControlNetModel",), title="a ControlNet of Cosmos", component="controlnet", counted=True, unlikely=True
    ),
    "controlnet_hunyuan_dit": Family(
        ("HunyuanDiT2DControlNetModel",), title="a ControlNet of Hunyuan-DiT", component="controlnet", counted=True,
        unlikely=True, alike=("HunyuanDiT2DMultiControlNetModel",),
        config={"in_channels": 4, "hidden_size": 1408, "patch_size": 2, "sample_size": 128, "mlp_ratio": 4.3637,
                "conditioning_channels": 3, "transformer_num_layers": 40},
    ),
    "sana_video": Family(
        ("SanaVideoTransformer3DModel",), _sana_video,
        """x_embedder.proj t_embedder.mlp.{0,2} t_block.1 y_embedder.y_proj.fc{1,2} attention_y_norm final_layer.linear
        blocks.#.attn.qkv*3 blocks.#.attn.{proj,q_norm,k_norm} blocks.#.cross_attn.q_linear
        blocks.#.cross_attn.kv_linear*2 blocks.#.cross_attn.{proj,q_norm,k_norm}
        blocks.#.mlp.{inverted_conv,depth_conv,point_conv}.conv blocks.#.mlp.t_conv""",
        title="SANA-Video", unlikely=True, counted=True,
        sources=("diffusers: scripts/convert_sana_video_to_diffusers.py",),
    ),
    "ltx": Family(
        ("LTXVideoTransformer3DModel",), single.convert_ltx_transformer_checkpoint_to_diffusers, "<ltx>",
        widths=(4096,), ratios=("*.attn2.to_k", "*.attn2.to_v"), sources=("Lightricks/LTX-Video: transformer3d.py",),
    ),
    "ltx2": Family(
        ("LTX2VideoTransformer3DModel",), _ltx2, "<ltx>",
        config=dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True),
        beside={"connectors.text_proj_in": "text_embedding_projection.aggregate_embed"}, sources=("Lightricks/LTX-2",),
        ratios=("*s.{n}.attn2.to_k", "*s.{n}.attn2.to_v"),
        alike=("SanaWMLTX2RefinerTransformer3DModel",),
    ),
    "mochi": Family(
        ("MochiTransformer3DModel",), single.convert_mochi_transformer_checkpoint_to_diffusers,
        """x_embedder.proj t_embedder.mlp.{0,2} t5_y_embedder.{to_kv,to_q,to_out} t5_yproj
        blocks.#.mod_{x,y} blocks.#.attn.qkv_{x,y}*3 blocks.#.attn.proj_{x,y} blocks.#.attn.{q,k}_norm_{x,y}
        blocks.#.mlp_{x,y}.w{1,2} final_layer.mod final_layer.linear""",
        blocks=48, cases=_MOCHI_CASES, sources=("genmoai/mochi: asymm_models_joint.py",),
    ),
    "cogvideox": Family(
        ("CogVideoXTransformer3DModel",), _cogvideox,
        """{time,ofs}_embed.{0,2} mixins.patch_embed.{proj,text_proj} transformer.final_layernorm
        mixins.final_layer.{norm_final,linear,adaLN_modulation.1}
        transformer.layers.#.attention.query_key_value*3 transformer.layers.#.attention.dense
        transformer.layers.#.mlp.{dense_h_to_4h,dense_4h_to_h}
        transformer.layers.#.{input,post_attention}_layernorm mixins.adaln_layer.adaLN_modulations.#.1*12
        mixins.adaln_layer.{query,key}_layernorm_list.#""",
        config={"ofs_embed_dim": 512}, kohya="diffusers", widths=(3072,), comfyui=_COGVIDEOX_IN_COMFYUI,
        alike=("ConsisIDTransformer3DModel",),
        sources=("diffusers: scripts/convert_cogvideox_to_diffusers.py",),
    ),
    "cogview4": Family(
        ("CogView4Transformer2DModel",), _cogview4,
        """time_embed.{0,2} label_emb.0.{0,2} mixins.patch_embed.{proj,text_proj}
        mixins.final_layer.linear mixins.final_layer.adaln.1*2 mixins.adaln.adaln_modules.#.1
        transformer.layers.#.attention.query_key_value*3 transformer.layers.#.attention.dense
        transformer.layers.#.mlp.{dense_h_to_4h,dense_4h_to_h}""",
        kohya="diffusers", sources=("diffusers: scripts/convert_cogview4_to_diffusers.py",),
        alike=("CogView3PlusTransformer2DModel",),
    ),
    "kandinsky5": Family(("Kandinsky5Transformer3DModel",), native="=", kohya="diffusers", widths=(4096, 1792)),
    "krea2": Family(
        ("Krea2Transformer2DModel",), single.convert_krea2_transformer_checkpoint_to_diffusers,
        """first last.linear last.norm:scale tmlp.{0,2} tproj.1 txtmlp.{1,3} txtmlp.0:scale txtfusion.projector
        blocks.#.attn.{wq,wk,wv,wo,gate} blocks.#.mlp.{gate,up,down} blocks.#.{pre,post}norm:scale
        blocks.#.attn.qknorm.{q,k}norm:scale
        txtfusion.{layerwise,refiner}_blocks.#.attn.{wq,wk,wv,wo,gate}
        txtfusion.{layerwise,refiner}_blocks.#.mlp.{gate,up,down}
        txtfusion.{layerwise,refiner}_blocks.#.{pre,post}norm:scale
        txtfusion.{layerwise,refiner}_blocks.#.attn.qknorm.{q,k}norm:scale""",
        fused={"to_qkv": "to_{q,k,v}"}, sources=("krea-ai/krea-2",),
    ),
    "ideogram4": Family(
        ("Ideogram4Transformer2DModel",), _lora_converter(lora._convert_non_diffusers_ideogram4_lora_to_diffusers),
        "layers.#.attention.qkv*3 layers.#.attention.o layers.#.feed_forward.w{1,2,3} layers.#.adaln_modulation",
        sources=("diffusers 0.42.1: lora_conversion_utils.py",),
    ),
    "minimax_h3": Family(
        ("MiniMaxH3Transformer3DModel",), lambda state: single.convert_minimax_h3_transformer_checkpoint_to_diffusers(
            state, None
        ),
        """{video,audio}_patch_proj condition_proj time_embedder.proj_{in,out} final_layer.norm
        final_layer.adaln_proj.linear final_layer.{video,audio}_out
        {blocks,token_refiner.blocks}.#.attn.qkv_proj*3 {blocks,token_refiner.blocks}.#.attn.{out_proj,q_norm,k_norm}
        {blocks,token_refiner.blocks}.#.mlp.fc{1,2} {blocks,token_refiner.blocks}.#.norm{1,2}
        blocks.#.adaln_proj.linear token_refiner.final_norm""",
        sources=("MiniMaxAI/MiniMax-H3",), diffsynth_head=128, header_alpha=True,
    ),
    "cosmos": Family(
        ("CosmosTransformer3DModel",), single.convert_cosmos_transformer_checkpoint_to_diffusers,
        f"""x_embedder.proj.1 t_embedder.1.linear_{{1,2}} t_embedding_norm final_layer.linear
        final_layer.adaln_modulation.{{1,2}} {_inside("blocks", _BLOCK)}
        blocks.#.adaln_modulation_{{self_attn,cross_attn,mlp}}.{{1,2}}""",
        # Keys and values of the text, which has a width of 1024 in all of them: LTX has the same names in diffusers.
        several={"*.attn2.to_k": (2, 4, 5), "*.attn2.to_v": (2, 4, 5)},
        title="Cosmos 2 or Anima", widths=(2048, 5120), beside={"text_conditioner": "diffusion_model.llm_adapter"},
        modules={"text_conditioner": "AnimaTextConditioner"},
        sources=("nvidia-cosmos/cosmos-predict2",),
    ),
    "ernie_image": Family(
        ("ErnieImageTransformer2DModel",), native="=", kohya="diffusers", widths=(3072,),
        sources=("diffusers 0.42.1: ErnieImageLoraLoaderMixin",),
    ),
    "ace_step": Family(
        ("AceStepTransformer1DModel",), _lora_converter(
            lora._convert_non_diffusers_ace_step_lora_to_diffusers, "base_model.model"
        ),
        "layers.#.{self,cross}_attn.{q,k,v,o}_proj layers.#.mlp.{gate,up,down}_proj",
        sources=("ace-step/ACE-Step-1.5",),
        comfyui={
            f"layers.{{n}}.{name}": f"decoder.layers.{{n}}.{name}"
            for name in (
                *(f"{x}_attn.{letter}_proj" for x in ("self", "cross") for letter in "qkvo"),
                *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            )
        },
    ),
}  # fmt: skip

WORDS: dict[str, list[str]] = {
    "flux": ["flux1", "loraflux", "oftflux", "kontext"],
    "flux2": ["flux2", "klein"],
    "flux3": ["flux3"],
    "chroma": ["chroma"],
    "sd3": ["sd3", "stablediffusion3", "lorasd3"],
    "auraflow": ["auraflow"],
    "pixart": ["pixart"],
    "sana": ["sana"],
    "lumina2": ["lumina2", "luminaimage2", "loralumina"],
    "z_image": ["zimage"],
    "hidream": ["hidream"],
    "qwen_image": ["qwenimage", "loraqwen"],
    "wan": ["wan21", "wan22", "lorawan", "skyreelsv2"],
    "hunyuan_video": ["hunyuanvideo", "lorahunyuan", "framepack"],
    "hunyuan_video_15": ["hunyuanvideo15", "hv15"],
    "ltx": ["ltxv", "ltxvideo"],
    "ltx2": ["ltx2"],
    "mochi": ["mochi"],
    "cogvideox": ["cogvideox"],
    "cogview4": ["cogview4"],
    "kandinsky5": ["kandinsky5", "lorakandinsky"],
    "krea2": ["krea2"],
    "ideogram4": ["ideogram4"],
    "minimax_h3": ["minimaxh3"],
    "cosmos": ["anima", "cosmos"],
    "ernie_image": ["ernieimage"],
    "ace_step": ["acestep"],
    "hunyuan_image": ["hunyuanimage"],
    "longcat_image": ["longcatimage"],
    "qwen_image21": ["qwenimage21"],
    "nucleus_image": ["nucleus"],
    "minimax_music3": ["minimaxmusic3"],
    "allegro": ["allegro"],
    "dit": [],
    "bria": ["bria3"],
    "bria_fibo": ["fibo"],
    "bria_fibo2": ["fibo2"],
    "glm_image_decoder": ["glmimage"],
    "motif_video": ["motifvideo"],
    "ovis_image": ["ovisimage"],
    "hunyuan_dit": ["hunyuandit"],
    "lumina_next": ["luminanext"],
    "easyanimate": ["easyanimate"],
    "omnigen": ["omnigen1"],
    "sana_wm": [],
    "stable_audio": ["stableaudio"],
    "wan_animate2": ["wananimate2"],
    "cosmos3": ["cosmos3"],
    "sana_video": ["sanavideo"],
    "kandinsky6": ["kandinsky6"],
    "kandinsky6_sr": [],
    "prx": ["prx"],
    "joyimage_edit": ["joyimage"],
    "stable_audio3": ["stableaudio3"],
    "longcat_audio": ["longcataudio"],
    "latte": [],
    "rfd4_proteina": [],
    "kandinsky_prior": [],
    "dreamlite": ["dreamlite"],
    "kandinsky3": ["kandinsky3"],
    "i2vgen_xl": ["i2vgen"],
    "stable_video": ["stablevideo"],
    "motion_unet": ["animatediff"],
    "uvit2d": ["amused"],
    "controlnet_sd": [],
    "controlnet_sparse": [],
    "controlnet_xs": [],
    "controlnet_flux": [],
    "controlnet_sd3": [],
    "controlnet_sana": [],
    "controlnet_qwen_image": [],
    "controlnet_z_image": [],
    "controlnet_cosmos": [],
    "controlnet_hunyuan_dit": [],
}
"""What metadata of files call the families, in lower-case letters and digits alone."""

SD_SCRIPTS = {"flux", "sd3", "lumina2", "chroma", "cosmos"}
"""The families that sd-scripts trains."""

_CLIP_L, _CLIP_G = {"kind": "clip", "comfyui": "clip_l"}, {"kind": "clip", "comfyui": "clip_g"}
_T5 = {"kind": "t5", "comfyui": "t5xxl"}


def _llm(comfyui: str = "", prefix: str = "") -> dict[str, str]:
    return {"kind": "llm", "comfyui": comfyui, "prefix": prefix}


ENCODERS: dict[str, dict[str, dict[str, str]]] = {
    "flux": {"text_encoder": _CLIP_L, "text_encoder_2": _T5},
    "chroma": {"text_encoder": _T5},
    "sd3": {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5},
    "pixart": {"text_encoder": _T5},
    "sana": {"text_encoder": _llm()},
    "lumina2": {"text_encoder": _llm("gemma2_2b")},
    "z_image": {"text_encoder": _llm("qwen3_4b")},
    "hidream": {
        "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5, "text_encoder_4": _llm("llama"),
    },
    "qwen_image": {"text_encoder": _llm("qwen25_7b", "model.language_model.")},
    "wan": {"text_encoder": {"kind": "t5", "comfyui": "umt5xxl"}},
    "hunyuan_video": {"text_encoder": _llm("llama"), "text_encoder_2": _CLIP_L},
    "hunyuan_image": {"text_encoder": _llm("qwen25_7b"), "text_encoder_2": {"kind": "t5", "comfyui": "byt5_small"}},
    "longcat_image": {"text_encoder": _llm("qwen25_7b", "model.language_model.")},
    "hunyuan_video_15": {
        "text_encoder": _llm("qwen25_7b"), "text_encoder_2": {"kind": "t5", "comfyui": "byt5_small"},
    },
    "ltx": {"text_encoder": _T5},
    "mochi": {"text_encoder": _T5},
    "cogvideox": {"text_encoder": _T5},
    "kandinsky5": {"text_encoder": _llm("qwen25_7b", "model.language_model."), "text_encoder_2": _CLIP_L},
    "cosmos": {"text_encoder": _llm("qwen3_06b")},
}  # fmt: skip
"""Text encoders by diffusers' names: what they are, and what ComfyUI calls them (comfy/text_encoders)."""
