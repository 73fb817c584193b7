"""Models whose modules have the names of another family's: each is told apart, or its names are not translated."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, TargetNotFound, Unrepresentable, Unsupported, UsageError
from adapterkit.naming.image import families

RANDOM = np.random.default_rng(18)
FAMILIES = {family.name: family.title for family in families()}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def lora(stem, out, into, rank=1, words=("lora_A.weight", "lora_B.weight")):
    return {
        f"{stem}.{words[0]}": RANDOM.normal(size=(rank, into)).astype("f2"),
        f"{stem}.{words[1]}": RANDOM.normal(size=(out, rank)).astype("f2"),
    }


def attention(width, blocks, first="transformer_blocks", name="attn", numbers=None, words=ATTENTION):
    """A file of LoRAs in diffusers' names, as PEFT's default targets give it: attention alone."""
    tensors = {}
    for block in range(blocks) if numbers is None else numbers:
        for word in words:
            tensors |= lora(f"transformer.{first}.{block}.{name}.{word}", width, width)
    return tensors


def given(folder, tensors, metadata=None):
    path = folder / "given.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def base(folder, kind, tensors):
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.42.1"}))
    save_file(tensors, folder / "base" / "diffusion_pytorch_model.safetensors")
    return folder / "base"


@pytest.mark.parametrize(
    ("family", "width", "blocks", "name"),
    [("qwen_image21", 4096, 32, "attn"), ("minimax_music3", 2048, 36, "attn"), ("nucleus_image", 2048, 24, "attn"),
     ("allegro", 2304, 32, "attn1")],
)  # fmt: skip
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_attention_alone_gets_no_other_models_names(family, width, blocks, name, to, tmp_path):
    adapter = ak.read(given(tmp_path, attention(width, blocks, name=name)))
    if (family, to) == ("qwen_image21", "kohya"):
        ak.write(adapter, tmp_path / "out.safetensors", to)
        assert "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight" in load_file(tmp_path / "out.safetensors")
        return
    with pytest.raises(Unrepresentable, match=f"name of this module of {FAMILIES[family]} is unknown"):
        ak.write(adapter, tmp_path / "out.safetensors", to)
    ak.write(adapter, tmp_path / "out.safetensors", "diffusers")


@pytest.mark.parametrize(
    ("family", "width", "blocks", "name"),
    [("bria", 3072, {"transformer_blocks": 8, "single_transformer_blocks": 28}, "attn"),
     ("bria_fibo", 3072, {"transformer_blocks": 8, "single_transformer_blocks": 38}, "attn"),
     ("bria_fibo2", 3584, {"layers": 44}, "attention"), ("dit", 1152, {"transformer_blocks": 28}, "attn1"),
     ("motif_video", 1536, {"transformer_blocks": 12, "single_transformer_blocks": 24}, "attn"),
     ("ovis_image", 3072, {"transformer_blocks": 6, "single_transformer_blocks": 27}, "attn"),
     ("hunyuan_dit", 1408, {"blocks": 40}, "attn1"), ("cosmos3", 4096, {"layers": 36}, "self_attn")],
)  # fmt: skip
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_no_other_models_names_for_the_default_targets_of_peft(family, width, blocks, name, to, tmp_path):
    """Each block's queries, keys and values, as many blocks as the published model has."""
    tensors = {}
    for first, count in blocks.items():
        tensors |= attention(width, count, first, name)
    adapter = ak.read(given(tmp_path, {key: leaf for key, leaf in tensors.items() if "to_out" not in key}))
    with pytest.raises(Unrepresentable, match=f"name of this module of {FAMILIES[family]} is unknown"):
        ak.write(adapter, tmp_path / "out.safetensors", to)
    ak.write(adapter, tmp_path / "out.safetensors", "diffusers")


def test_blocks_that_are_not_all_of_any_model_are_refused_with_the_families(tmp_path):
    adapter = ak.read(given(tmp_path, attention(2048, 5)))
    with pytest.raises(Unrepresentable, match=r"--family \(family=\)") as refusal:
        ak.write(adapter, tmp_path / "out.safetensors", "comfyui")
    assert "hunyuan_video_15" in str(refusal.value.items)
    assert "Nucleus-Image" in str(refusal.value.items)
    ak.write(ak.read(tmp_path / "given.safetensors", family="hunyuan_video_15"), tmp_path / "o.safetensors", "comfyui")


def test_chosen_blocks_are_no_evidence_for_a_model_that_ends_there(tmp_path):
    """Bria's last block is number 7, which FLUX's trainers choose, too."""
    tensors = attention(3072, 0, numbers=(3, 7), words=("to_q", "to_k", "add_q_proj"))
    path = given(tmp_path, tensors, {"ss_base_model_version": "flux1"})
    ak.write(ak.read(path), tmp_path / "out.safetensors", "comfyui")
    with pytest.raises(Unrepresentable) as refusal:
        ak.write(ak.read(given(tmp_path, tensors)), tmp_path / "out.safetensors", "comfyui")
    assert "flux" in str(refusal.value.items)


def test_sana_video_has_sanas_names_for_attention(tmp_path):
    tensors = attention(2240, 20, name="attn1") | attention(2240, 20, name="attn2")
    ak.write(ak.read(given(tmp_path, tensors)), tmp_path / "out.safetensors", "comfyui")
    assert "diffusion_model.blocks.0.cross_attn.kv_linear.lora_up.weight" in load_file(tmp_path / "out.safetensors")


def checkpoint(folder, more):
    """FLUX in BFL's names with all that it holds beside its matrices, and one thing that no file lists."""
    weights = flux("model.diffusion_model.")
    weights |= {f"model.diffusion_model.{name}": np.zeros(shape, "f4") for name, shape in more.items()}
    weights["model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale"] = np.ones(8, "f4")
    save_file(weights, folder / "base.safetensors")
    return weights


@pytest.mark.parametrize("more", [{}, {"learned_token": 3}, {"small_network.0.weight": (3, 3)}])
def test_a_checkpoint_is_of_its_family_whatever_else_it_holds(more, tmp_path):
    """Shift and scale stand the other way round in BFL's names: without the family, the target has no place."""
    weights = checkpoint(tmp_path, more)
    tensors = lora("transformer.norm_out.linear", 64, 32, 4)
    ak.merge(tmp_path / "base.safetensors", [given(tmp_path, tensors)], tmp_path / "out.safetensors")
    A, B = (tensors[f"transformer.norm_out.linear.lora_{x}.weight"].astype("f8") for x in "AB")
    name = "model.diffusion_model.final_layer.adaLN_modulation.1.weight"
    change = load_file(tmp_path / "out.safetensors")[name] - weights[name].astype("f8")
    np.testing.assert_allclose(change, np.roll(B @ A, 32, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metadata", [{}, {"ss_base_model_version": "flux1"}])
def test_flux_is_still_flux(metadata, tmp_path):
    """All of its blocks, or metadata, tell it from HunyuanVideo, which has the same names and width."""
    numbers = (0, 7) if metadata else range(19)
    tensors = attention(3072, 0, numbers=numbers)
    tensors |= lora(f"transformer.single_transformer_blocks.{7 if metadata else 37}.proj_mlp", 12288, 3072)
    ak.write(ak.read(given(tmp_path, tensors, metadata)), tmp_path / "out.safetensors", "kohya")
    assert "lora_unet_double_blocks_0_img_attn_proj.alpha" in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_a_base_of_no_known_family_has_no_names_there(to, tmp_path):
    tensors = attention(8, 2)
    names = (key.removeprefix("transformer.").removesuffix(".lora_B.weight") for key in tensors if "lora_B" in key)
    weights = {f"{name}.weight": np.zeros((8, 8), "f4") for name in names}
    weights["tomorrows_layer.weight"] = np.zeros((4, 8), "f4")
    adapter = ak.read(given(tmp_path, tensors))
    ours = base(tmp_path, "TomorrowsTransformer2DModel", weights)
    with pytest.raises(Unrepresentable, match="the base is a TomorrowsTransformer2DModel"):
        ak.write(adapter, tmp_path / "out.safetensors", to, base=ours)
    ak.write(adapter, tmp_path / "out.safetensors", "diffusers", base=ours)
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


def hunyuan_image():
    """HunyuanImage 2.1 under its authors' names of split weights, in blocks of the published width."""
    tensors = {}
    for letter in "qkv":
        tensors |= lora(f"lora_unet_double_blocks_0_img_attn_{letter}", 3584, 3584, 1, DOWN_UP)
        tensors |= lora(f"lora_unet_single_blocks_0_linear1_{letter}", 3584, 3584, 1, DOWN_UP)
    tensors |= lora("lora_unet_single_blocks_0_linear1_mlp", 14336, 3584, 1, DOWN_UP)
    return tensors | lora("lora_unet_single_blocks_0_linear2_fc", 3584, 17920, 1, DOWN_UP)


DOWN_UP = ("lora_down.weight", "lora_up.weight")


def test_hunyuan_image_is_fused_for_its_trainer_and_for_comfyui(tmp_path):
    adapter = ak.read(given(tmp_path, hunyuan_image()))
    steps = {to: tmp_path / f"{to}.safetensors" for to in ("diffusers", "comfyui", "kohya")}
    for to, path in steps.items():
        ak.write(adapter, path, to)
        adapter = ak.read(path)
    there = {key.rpartition(".lora")[0] for key in load_file(steps["comfyui"]) if ".lora" in key}
    assert {"diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear1"} <= there
    trained = {key.partition(".")[0].removeprefix("lora_unet_") for key in load_file(steps["kohya"])}
    assert {"double_blocks_0_img_attn_qkv", "single_blocks_0_linear1", "single_blocks_0_linear2"} == trained
    ak.write(adapter, tmp_path / "back.safetensors", "diffusers")
    first, last = ak.read(steps["diffusers"]), ak.read(tmp_path / "back.safetensors")
    assert {target.path for target in first.updates} == {target.path for target in last.updates}
    for name in ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_v"):
        path = f"transformer.{name}"
        np.testing.assert_allclose(first.delta(path), last.delta(path), rtol=2e-6, atol=2e-6)


def test_hunyuan_image_of_sd_scripts_is_cut_for_diffusers(tmp_path):
    """sd-scripts' own model has HunyuanVideo's names of fused weights; the metadata tell which of the two it is."""
    tensors = lora("lora_unet_double_blocks_0_img_attn_qkv", 10752, 3584, 1, DOWN_UP)
    tensors |= lora("lora_unet_single_blocks_0_linear1", 25088, 3584, 1, DOWN_UP)
    path = given(tmp_path, tensors, {"modelspec.architecture": "hunyuan-image-2.1"})
    ak.write(ak.read(path), tmp_path / "out.safetensors", "diffusers")
    found = load_file(tmp_path / "out.safetensors")
    up = tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    np.testing.assert_array_equal(
        found["transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"], up[3584:7168]
    )
    np.testing.assert_array_equal(found["transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"], up[10752:])
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in found
    ak.write(ak.read(tmp_path / "out.safetensors"), tmp_path / "back.safetensors", "kohya")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in load_file(tmp_path / "back.safetensors")


def flux(prefix=""):
    """Two weights of FLUX in BFL's names, and the text encoder of a checkpoint for ComfyUI if there is a prefix."""
    weights = {f"{prefix}double_blocks.0.img_attn.qkv.weight": RANDOM.normal(size=(96, 32)).astype("f4"),
               f"{prefix}final_layer.adaLN_modulation.1.weight": RANDOM.normal(size=(64, 32)).astype("f4"),
               f"{prefix}single_blocks.0.linear1.weight": RANDOM.normal(size=(224, 32)).astype("f4")}  # fmt: skip
    if prefix:
        weights["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"] = np.zeros((4, 4), "f4")
    return weights


def test_a_whole_checkpoint_is_of_its_denoisers_family(tmp_path):
    """Shift and scale stand the other way round in BFL's names, which only FLUX's are for certain."""
    tensors = lora("transformer.norm_out.linear", 64, 32, 4)
    weights = flux("model.diffusion_model.")
    save_file(weights, tmp_path / "base.safetensors")
    ak.merge(tmp_path / "base.safetensors", [given(tmp_path, tensors)], tmp_path / "out.safetensors")
    A, B = (tensors[f"transformer.norm_out.linear.lora_{x}.weight"].astype("f8") for x in "AB")
    name = "model.diffusion_model.final_layer.adaLN_modulation.1.weight"
    change = load_file(tmp_path / "out.safetensors")[name] - weights[name].astype("f8")
    np.testing.assert_allclose(change, np.roll(B @ A, 32, axis=0), rtol=1e-4, atol=1e-5)


def test_metadata_that_name_another_family_than_the_bases(tmp_path):
    weights = flux()
    save_file(weights, tmp_path / "base.safetensors")
    tensors = lora("transformer.transformer_blocks.0.attn.to_q", 32, 32)
    for said in ("qwen-image", "stable-diffusion-v3.5"):
        path = given(tmp_path, tensors, {"modelspec.architecture": said.replace("v3.5", "3.5")})
        with pytest.raises(UsageError, match=r"the file's metadata names .*, but the base is flux"):
            ak.merge(tmp_path / "base.safetensors", [path], tmp_path / "out.safetensors")
    for said in ("flux-1-dev", "chroma"):
        path = given(tmp_path, tensors, {"modelspec.architecture": said})
        ak.merge(tmp_path / "base.safetensors", [path], tmp_path / f"{said}.safetensors")


def comfyui_fp8(weights, form):
    """A base as ComfyUI's tools scale it to 8 bits: the older files, the newer ones, or those with a header entry."""
    stored, metadata = {}, {"format": "pt"}
    layers = {}
    for name, weight in weights.items():
        if weight.shape[0] < 64 or name.startswith("text_encoders"):
            stored[name] = weight
            continue
        scale, module = np.array(np.abs(weight).max() / 448, "f4"), name.removesuffix(".weight")
        stored[name] = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{module}.{'scale_weight' if form == 'marker' else 'weight_scale'}"] = scale
        layers[module] = {"format": "float8_e4m3fn"}
        if form == "entries":
            text = json.dumps(layers[module]).encode()
            stored[f"{module}.comfy_quant"] = np.frombuffer(text, "u1")
    if form == "marker":
        stored["model.diffusion_model.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
        stored["model.diffusion_model.single_blocks.0.linear2.weight"] = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    if form == "header":
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    return stored, metadata


@pytest.mark.parametrize("form", ["marker", "entries", "header"])
def test_scaled_8_bit_floats_of_comfyui(form, tmp_path):
    """The scale counts: a change that is added to the stored numbers themselves is rounded away."""
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv"
    stored, metadata = comfyui_fp8(flux("model.diffusion_model."), form)
    save_file(stored, tmp_path / "base.safetensors", metadata)
    tensors = lora(name, 96, 32, 4)
    path = given(tmp_path, tensors)
    with pytest.raises(Unsupported, match=r"quantized \(fp8\)"):
        ak.merge(tmp_path / "base.safetensors", [path], tmp_path / "out.safetensors")
    word = "scale_weight" if form == "marker" else "weight_scale"
    W = stored[f"{name}.weight"].astype("f8") * stored[f"{name}.{word}"]
    wanted = W + tensors[f"{name}.lora_B.weight"].astype("f8") @ tensors[f"{name}.lora_A.weight"].astype("f8")
    for quantized, ulps in (("dequantize", 2.0**-8), ("requantize", 2.0**-4)):
        out = tmp_path / f"{quantized}.safetensors"
        ak.merge(tmp_path / "base.safetensors", [path], out, quantized=quantized)
        with safe_open(out, "pt") as file:
            found = {key: file.get_tensor(key).double().numpy() for key in file.keys()}  # noqa: SIM118
            told = file.metadata()
        made = found[f"{name}.weight"] * found.get(f"{name}.{word}", 1.0)
        np.testing.assert_allclose(made, wanted, rtol=ulps, atol=ulps * np.abs(wanted).max())
        left = [key for key in found if "scale_weight" in key or "weight_scale" in key or "comfy_quant" in key]
        assert bool(left) == (quantized == "requantize")
        assert ("_quantization_metadata" in told) == (quantized == "requantize" and form == "header")


def test_comfyuis_other_formats_are_named(tmp_path):
    stored, _ = comfyui_fp8(flux("model.diffusion_model."), "entries")
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv"
    for text, error in ((b'{"format": "nvfp4"}', Unsupported), (b"[", Malformed)):
        save_file(stored | {f"{name}.comfy_quant": np.frombuffer(text, "u1")}, tmp_path / "base.safetensors")
        with pytest.raises(error, match=r"img_attn\.qkv\.comfy_quant"):
            ak.merge(tmp_path / "base.safetensors", [given(tmp_path, lora(name, 96, 32))], tmp_path / "out.safetensors")


# Wan's further models: S2V and Animate, and the differences that distillations hold beside LoRAs.


def test_a_difference_of_wans_modulation_does_not_stop_the_rest(tmp_path):
    tensors = lora("diffusion_model.blocks.0.self_attn.q", 8, 8, 2, DOWN_UP)
    tensors |= {"diffusion_model.blocks.0.modulation.diff": np.ones((1, 6, 8), "f4"),
                "diffusion_model.head.modulation.diff": np.ones((1, 2, 8), "f4")}  # fmt: skip
    adapter = ak.read(given(tmp_path, tensors))
    with pytest.raises(Unrepresentable, match="scale_shift_table"):
        ak.write(adapter, tmp_path / "out.safetensors", "diffusers")
    lines = ak.write(adapter, tmp_path / "out.safetensors", "diffusers", on_loss="drop")
    assert sum("scale_shift_table" in line for line in lines) == 2
    assert {key.rpartition(".lora")[0] for key in load_file(tmp_path / "out.safetensors")} == {
        "transformer.blocks.0.attn1.to_q"
    }
    ak.write(adapter, tmp_path / "again.safetensors", "comfyui")
    assert load_file(tmp_path / "again.safetensors").keys() == tensors.keys()


def test_wan_animates_face_adapter_has_keys_and_values_in_one(tmp_path):
    tensors = lora("diffusion_model.face_adapter.fuser_blocks.1.linear1_kv", 16, 8, 2)
    tensors |= lora("diffusion_model.face_adapter.fuser_blocks.1.linear1_q", 8, 8, 2)
    ak.write(ak.read(given(tmp_path, tensors)), tmp_path / "out.safetensors", "diffusers")
    made = load_file(tmp_path / "out.safetensors")
    whole = tensors["diffusion_model.face_adapter.fuser_blocks.1.linear1_kv.lora_B.weight"]
    for number, word in enumerate(("to_k", "to_v")):
        rows = made[f"transformer.face_adapter.1.{word}.lora_B.weight"]
        np.testing.assert_array_equal(rows, whole[8 * number : 8 * number + 8])


def test_wan_s2v_is_wan_whose_audio_diffusers_does_not_have(tmp_path):
    tensors = lora("diffusion_model.audio_injector.injector.3.q", 8, 8) | lora("diffusion_model.blocks.0.ffn.0", 16, 8)
    adapter = ak.read(given(tmp_path, tensors))
    with pytest.raises(Unrepresentable, match="diffusers' name of this module of wan is unknown"):
        ak.write(adapter, tmp_path / "out.safetensors", "diffusers")
    ak.write(adapter, tmp_path / "out.safetensors", "kohya")
    assert "lora_unet_audio_injector_injector_3_q.lora_up.weight" in load_file(tmp_path / "out.safetensors")


# Spellings of keys.


@pytest.mark.parametrize(
    "word", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"]
)
@pytest.mark.parametrize(
    "stem", ["diffusion_model.double_blocks.0.img_attn.proj", "transformer.transformer_blocks.0.attn.to_out.0"]
)
def test_pefts_magnitudes_in_files_of_other_tools(stem, word, tmp_path):
    magnitude = RANDOM.random(8).astype("f4") + 1
    path = given(tmp_path, lora(stem, 8, 6, 2) | {f"{stem}.{word}": magnitude})
    ((update,),) = ak.read(path).updates.values()
    assert update.method == "dora"
    np.testing.assert_array_equal(np.asarray(update.magnitude.fetch()).view("f4"), magnitude)
    ak.write(ak.read(path), tmp_path / "out.safetensors", ak.detect(path))
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(path).keys()


def test_a_third_text_encoder_alone_asks_for_the_family(tmp_path):
    stem = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    path = given(tmp_path, lora(stem, 8, 8, 2, DOWN_UP))
    with pytest.raises(TargetNotFound, match=r"lora_te3 is the second text encoder.*--family"):
        ak.read(path)
    assert [target.path for target in ak.read(path, family="flux").updates] == [
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    ]


# Parts of a model: some blocks, one kind of block, one layer.


def bare(tensors):
    return {key.removeprefix("transformer."): leaf for key, leaf in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "family", "name"),
    [(attention(3072, 19, words=("to_q", "to_k", "to_v")), "chroma flux", "double_blocks.18.img_attn.qkv"),
     (attention(1536, 0, numbers=(7, 9), words=("to_q", "to_k", "to_v")), "sd3", "joint_blocks.9.x_block.attn.qkv"),
     (attention(2240, 0, name="attn1", numbers=(7, 9)), "sana", "blocks.9.attn.qkv")],
)  # fmt: skip
def test_names_without_a_prefix_are_no_evidence_for_comfyuis_naming(tensors, family, name, tmp_path):
    """Qwen-Image's and LTX's names in ComfyUI are these; PEFT and the Lightning files write diffusers' names bare."""
    path = given(tmp_path, bare(tensors))
    assert ak.detect(path) == "comfyui"
    ak.convert(path, tmp_path / "out.safetensors", to="comfyui")
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        keys, metadata = list(file.keys()), file.metadata() or {}
    assert any(key.startswith(f"diffusion_model.{name}.lora") for key in keys) or keys == list(load_file(path))
    ak.convert(path, tmp_path / "kohya.safetensors", to="kohya")
    keys = load_file(tmp_path / "kohya.safetensors")
    assert f"lora_unet_{name.replace('.', '_')}.lora_up.weight" in keys
    with safe_open(tmp_path / "kohya.safetensors", "np") as file:
        assert file.metadata()["adapterkit.family"] == family
    assert not metadata.get("adapterkit.family", "").startswith("qwen")


def test_single_blocks_alone_are_flux(tmp_path):
    """Bria FIBO has as many single blocks, and an adapter of all its attention has double blocks, too."""
    tensors = attention(3072, 38, "single_transformer_blocks", words=("to_q", "to_k", "to_v"))
    ak.convert(given(tmp_path, tensors), tmp_path / "out.safetensors", to="comfyui")
    assert "diffusion_model.single_blocks.37.linear1.lora_up.weight" in load_file(tmp_path / "out.safetensors")


def test_bare_double_blocks_of_flux_2_are_not_flux(tmp_path):
    """Both have these names in BFL's naming; the feed-forward has other shapes, and another name in diffusers."""
    tensors = {}
    for word, out in (("img_attn.qkv", 18432), ("img_attn.proj", 6144), ("img_mlp.0", 36864)):
        tensors |= lora(f"double_blocks.0.{word}", out, 6144)
    ak.convert(given(tmp_path, tensors), tmp_path / "out.safetensors", to="diffusers")
    found = load_file(tmp_path / "out.safetensors")
    assert "transformer.transformer_blocks.0.ff.linear_in.lora_B.weight" in found
    up = tensors["double_blocks.0.img_attn.qkv.lora_B.weight"]
    np.testing.assert_array_equal(found["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"], up[6144:12288])


@pytest.mark.parametrize(
    ("context", "name"), [(2048, "transformer_blocks.0.attn2.to_k"), (1024, "blocks.0.cross_attn.k_proj")]
)
def test_the_width_of_the_text_tells_ltx_from_cosmos(context, name, tmp_path):
    tensors = attention(2048, 2, name="attn1") | lora("transformer.transformer_blocks.0.attn2.to_k", 2048, context)
    ak.convert(given(tmp_path, tensors), tmp_path / "out.safetensors", to="comfyui")
    assert f"diffusion_model.{name}.lora_up.weight" in load_file(tmp_path / "out.safetensors")


def unet(blocks, context, first):
    """Cross attention of blocks of a U-Net: {block: (number of attentions, depth, width)}."""
    tensors = {}
    for block, (count, depth, width) in blocks.items():
        for number in range(count):
            for layer in range(depth):
                stem = f"{first}{block}.attentions.{number}.transformer_blocks.{layer}.attn2"
                for word in ATTENTION:
                    tensors |= lora(f"{stem}.{word}", width, context if word in ("to_k", "to_v") else width)
    return tensors


DOWN = {"down_blocks.1": (2, 2, 640), "down_blocks.2": (2, 10, 1280), "mid_block": (1, 10, 1280)}


@pytest.mark.parametrize("prefix", ["unet.", "lora_unet_"])
def test_one_side_of_stable_diffusion_xl(prefix, tmp_path):
    """DreamLite has these blocks, too, but keys and values of one head."""
    tensors = unet(DOWN, 2048, "unet.")
    if prefix == "lora_unet_":
        tensors = {
            "lora_unet_" + key.removeprefix("unet.").partition(".lora_")[0].replace(".", "_") + ".lora_"
            + {"A": "down", "B": "up"}[key.partition(".lora_")[2][0]] + ".weight": leaf
            for key, leaf in tensors.items()
        }  # fmt: skip
    ak.convert(given(tmp_path, tensors), tmp_path / "out.safetensors", to="comfyui")
    name = "diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.lora_up.weight"
    assert name in load_file(tmp_path / "out.safetensors")
    ak.convert(given(tmp_path, unet(DOWN, 2048, "unet.")), tmp_path / "kohya.safetensors", to="kohya")
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight"
    assert name in load_file(tmp_path / "kohya.safetensors")


@pytest.mark.parametrize(("out", "context", "family"), [(320, 768, "sd"), (640, 2048, "sdxl"), (5, 2048, "")])
def test_one_layer_of_a_u_net_is_told_by_its_shape(out, context, family, tmp_path):
    block = {320: "down_blocks.0", 640: "down_blocks.1", 5: "down_blocks.0"}[out]
    path = given(tmp_path, lora(f"unet.{block}.attentions.0.transformer_blocks.0.attn2.to_k", out, context))
    if not family:
        with pytest.raises(Unrepresentable, match="DreamLite"):
            ak.convert(path, tmp_path / "out.safetensors", to="comfyui")
        return
    ak.convert(path, tmp_path / "out.safetensors", to="comfyui")
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert family in file.metadata()["adapterkit.family"].split()
        number = {320: 1, 640: 4}[out]
        assert any(f"input_blocks.{number}.1." in key for key in file.keys())  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_ai_toolkits_dora(prefix, tmp_path):
    """Its magnitude is a norm of each output; ComfyUI would skip it under its own name."""
    random = np.random.default_rng(25)
    name = "transformer_blocks.0.attn.to_q"
    A, B, W = (random.normal(size=size).astype("f4") for size in ((2, 6), (8, 2), (8, 6)))
    magnitude = random.random(8).astype("f4") + 1
    held = {
        f"{prefix}{name}.lora_A.weight": A,
        f"{prefix}{name}.lora_B.weight": B,
        f"{prefix}{name}.magnitude": magnitude,
    }
    path = given(tmp_path, held, {"ss_base_model_version": "qwen_image"})
    save_file({f"{name}.weight": W}, tmp_path / "base.safetensors")
    ak.merge(tmp_path / "base.safetensors", [path], tmp_path / "merged.safetensors")
    moved = W.astype("f8") + B.astype("f8") @ A
    wanted = magnitude[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(
        load_file(tmp_path / "merged.safetensors")[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-6
    )
    ak.convert(path, tmp_path / "out.safetensors", to="comfyui")
    assert f"diffusion_model.{name}.dora_scale" in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("word", ["magnitude", "lora_magnitude_vector.weight"])
def test_a_conversion_to_the_files_own_format_respells_what_its_tool_would_skip(word, tmp_path):
    """ComfyUI takes a DoRA without `dora_scale` for a LoRA; which model it is of does not matter for that."""
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    magnitude = np.arange(1, 9, dtype="f4")
    tensors = lora(stem, 8, 6, 2) | {f"{stem}.{word}": magnitude}
    ak.convert(given(tmp_path, tensors), tmp_path / "out.safetensors", to="comfyui")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {*lora(stem, 8, 6), f"{stem}.dora_scale"}
    np.testing.assert_array_equal(found[f"{stem}.dora_scale"], magnitude[:, None])


@pytest.mark.parametrize("kind", ["f2", "bf16"])
def test_ai_toolkits_lokr_has_an_alpha_that_means_nothing(kind, tmp_path):
    """It saves a rank of 9,999,999,999 in 16 bits beside factors that are whole: infinite, or rounded."""
    random = np.random.default_rng(25)
    kind = ml_dtypes.bfloat16 if kind == "bf16" else kind
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    w1, w2 = (random.normal(size=size).astype(kind) for size in ((2, 3), (4, 2)))
    with np.errstate(over="ignore"):
        alpha = np.array(9_999_999_999, "f8").astype(kind)
    path = given(tmp_path, {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": alpha})
    delta = ak.read(path, family="qwen_image").delta("transformer.transformer_blocks.0.attn.to_q")
    np.testing.assert_allclose(delta, np.kron(w1.astype("f8"), w2.astype("f8")), rtol=1e-6)


@pytest.mark.parametrize(
    ("width", "path"),
    [(6144, "transformer.double_blocks.0.img_attn.proj"), (4096, "transformer.double_blocks.0.img_attn.proj"),
     (2048, "transformer.double_blocks.0.img_attn_proj"), (3072, "")],
)  # fmt: skip
def test_the_width_tells_whose_underscores_these_are(width, path, tmp_path):
    """FLUX's and HunyuanVideo's attention is flattened alike, and as wide; FLUX.2 and HunyuanVideo 1.5 are not."""
    held = given(tmp_path, lora("lora_unet_double_blocks_0_img_attn_proj", width, width, 1, DOWN_UP))
    if not path:
        with pytest.raises(TargetNotFound, match=r"of chroma, and .* of hunyuan_video.*--family"):
            ak.read(held)
        return
    assert [target.path for target in ak.read(held).updates] == [path]
