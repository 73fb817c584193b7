"""Files that trainers and tools really write, found in threads about keys that were not loaded: each is read as it is
meant, or named in the error.

What ComfyUI and diffusers hold is data, spec/loaders, which the tools in tools/foreign made with their own loaders.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import TargetNotFound, UnknownFormat, Unsupported
from adapterkit.formats._others import other_file, other_files
from adapterkit.loaders import loaders_of

RANDOM = np.random.default_rng(3)
AB = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")


def factors(stem, out, into, words=AB, alpha=None, rank=4):
    tensors = {
        f"{stem}.{words[0]}": RANDOM.normal(size=(rank, into)).astype("f4"),
        f"{stem}.{words[1]}": RANDOM.normal(size=(out, rank)).astype("f4"),
    }
    return tensors | ({} if alpha is None else {f"{stem}.alpha": np.array(alpha, "f4")})


def saved(folder, modules, words=AB, alpha=None, metadata=None):
    """A file of LoRAs: stem -> (outputs, inputs)."""
    tensors = {}
    for stem, (out, into) in modules.items():
        tensors |= factors(stem, out, into, words, alpha)
    path = folder / "given.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def changes(path):
    """Change of each target of a file, by formula in numpy."""
    adapter = ak.read(path).load("cpu")
    return {str(t): float(u.scaling) * u.B.double().numpy() @ u.A.double().numpy() for t, u in adapter}


def loads(path, tool):
    name = ak.detect(path)
    answers = loaders_of(ak.read(path), name, Path(path), convert=False)
    return {answer.tool: answer.loads for answer in answers}[tool]


def converted(path, to, folder):
    out = folder / f"{to}.safetensors"
    ak.convert(path, out, to=to)
    return out


def of_flux(stem, single=38, double=19):
    """The blocks of FLUX, as many as it has: names alone are HunyuanVideo's too."""
    names = {f"transformer_blocks.{n}.attn.to_out.0": (24, 24) for n in range(double)}
    names |= {f"single_transformer_blocks.{n}.proj_out": (24, 120) for n in range(single)}
    return {stem.format(name): size for name, size in names.items()}


SAME = {
    "SimpleTuner": ("transformer.base_model.model.{}", AB),
    "SimpleTuner, older": ("transformer.base_model.model.{}", ("lora.down.weight", "lora.up.weight")),
    "DeepSpeed and PEFT": ("module.base_model.model.{}", AB),
    "fal": ("base_model.model.{}", AB),
    "FSDP": ("_fsdp_wrapped_module.{}", AB),
    "checkpointing": ("{}._checkpoint_wrapped_module", AB),
    "torch.compile": ("_orig_mod.{}", AB),
}


@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
@pytest.mark.parametrize("case", SAME)
def test_what_is_written_is_held_by_the_tool_it_is_for(case, to, tmp_path):
    stem, words = SAME[case]
    path = saved(tmp_path, of_flux(stem), words)
    out = converted(path, to, tmp_path)
    assert loads(out, to) == "yes"
    given, made = load_file(path), ak.read(out).load("cpu")
    down, up = (np.float64(given[f"{stem.format('single_transformer_blocks.5.proj_out')}.{word}"]) for word in words)
    name = "single_transformer_blocks.5.proj_out" if to == "diffusers" else "single_blocks.5.linear2"
    (update,) = made.updates[next(t for t in made.updates if t.path == f"transformer.{name}")]
    np.testing.assert_allclose(update.delta((24, 120)).double().numpy(), up @ down, rtol=1e-5, atol=1e-5)


def test_a_conversion_to_the_format_of_the_file_gives_keys_that_its_tool_holds(tmp_path):
    """ComfyUI has no `base_model.model.` of FLUX, and `list loaders` says that a conversion gives what it loads."""
    path = saved(tmp_path, {f"base_model.model.double_blocks.{n}.img_attn.qkv": (72, 24) for n in range(19)})
    assert ak.detect(path) == "comfyui"
    assert loads(path, "comfyui") == "no"
    (line,) = (each for each in run("list", "loaders", path).stdout.splitlines() if each.startswith("ComfyUI"))
    assert "--to comfyui" in line
    out = converted(path, "comfyui", tmp_path)
    assert loads(out, "comfyui") == "yes"
    assert {key.partition(".")[0] for key in load_file(out)} == {"diffusion_model"}
    assert changes(out).keys() == changes(path).keys()


def test_a_file_that_its_tool_loads_is_kept_as_it_is(tmp_path):
    modules = {f"diffusion_model.double_blocks.{n}.img_attn.qkv": (72, 24) for n in range(19)}
    path = saved(tmp_path, modules, metadata={"trigger": "sks"})
    out = converted(path, "comfyui", tmp_path)
    assert load_file(out).keys() == load_file(path).keys()


def test_metadata_stay_when_keys_are_spelled_anew(tmp_path):
    modules = {f"base_model.model.double_blocks.{n}.img_attn.qkv": (72, 24) for n in range(19)}
    path = saved(tmp_path, modules, metadata={"ss_output_name": "a dog"})
    out = converted(path, "comfyui", tmp_path)
    assert b'"ss_output_name":"a dog"' in out.read_bytes().replace(b'": "', b'":"')


def test_a_family_that_is_not_known_is_not_said_to_be_refused(tmp_path):
    path = saved(tmp_path, {f"diffusion_model.quagga_adapter.fuser_blocks.{n}.linear2": (24, 24) for n in range(2)})
    assert loads(path, "comfyui") == "unknown"


def test_underscores_behind_a_name_are_none_of_it(tmp_path):
    names = {f"lora_unet_single_transformer_blocks_{n}_attn_to_q_": (24, 24) for n in range(38)}
    path = saved(tmp_path, names, DOWN_UP, 4)
    assert "transformer.single_transformer_blocks.37.attn.to_q" in changes(path)


def test_diffsynth_before_its_prefix_is_removed(tmp_path):
    words = ("lora_A.default.weight", "lora_B.default.weight")
    path = saved(tmp_path, {f"pipe.dit.blocks.{n}.cross_attn.k_img": (24, 24) for n in range(2)}, words)
    out = converted(path, "diffusers", tmp_path)
    assert set(changes(out)) == {f"transformer.blocks.{n}.attn2.add_k_proj" for n in range(2)}


def test_onetrainers_dora_under_diffusers_names(tmp_path):
    stems = [f"transformer.transformer_blocks.{n}.img_mlp.net.2" for n in range(2)]
    tensors = {}
    for stem in stems:
        tensors |= factors(stem, 24, 96, DOWN_UP, 8.0) | {f"{stem}.dora_scale": 1 + RANDOM.random((24, 1)).astype("f4")}
    path = tmp_path / "given.safetensors"
    save_file(tensors, path)
    W = RANDOM.normal(size=(24, 96))
    V = W + 2 * np.float64(tensors[f"{stems[0]}.lora_up.weight"]) @ tensors[f"{stems[0]}.lora_down.weight"]
    wanted = np.float64(tensors[f"{stems[0]}.dora_scale"]) * V / np.linalg.norm(V, axis=1, keepdims=True)
    for read in (path, converted(path, "diffusers", tmp_path), converted(path, "comfyui", tmp_path)):
        (update,) = ak.read(read).load("cpu").updates[next(iter(ak.read(read).updates))]
        got = update.map(lambda leaf: leaf.double()).new_weight(torch.from_numpy(W))
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-6)


# Families that the data gained.


def cascade(attention="attention_attn_to_q", out="attention_attn_out_proj"):
    unet = {f"lora_prior_unet_down_blocks_0_{n}_{attention}": (24, 24) for n in (2, 5)}
    unet |= {"lora_prior_unet_up_blocks_1_2_kv_mapper_1": (24, 24), f"lora_prior_unet_up_blocks_1_2_{out}": (24, 24)}
    return unet | {"lora_prior_te_text_model_encoder_layers_0_self_attn_q_proj": (24, 24)}


def test_stable_cascade_of_onetrainer(tmp_path):
    path = saved(tmp_path, cascade(), DOWN_UP, 4)
    assert loads(path, "comfyui") == "yes"
    assert "unet.down_blocks.0.2.attention.attn.to_q" in changes(path)
    there = converted(path, "diffusers", tmp_path)
    assert "unet.up_blocks.1.2.attention.to_out.0" in changes(there)
    back = converted(there, "kohya", tmp_path)
    assert load_file(back).keys() == load_file(path).keys()
    comfy = converted(path, "comfyui", tmp_path)
    assert loads(comfy, "comfyui") == "yes"
    assert "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_up.weight" in load_file(
        comfy
    )


def test_stable_cascade_in_diffusers_names_becomes_what_comfyui_loads(tmp_path):
    path = saved(tmp_path, cascade("attention_to_q", "attention_to_out_0"), DOWN_UP, 4)
    assert loads(path, "comfyui") == "part"
    assert loads(converted(path, "comfyui", tmp_path), "comfyui") == "yes"


def test_a_base_of_stable_cascade_may_be_lycoris_too(tmp_path):
    path = saved(tmp_path, cascade(), DOWN_UP, 4)
    out = converted(path, "lycoris", tmp_path)
    assert changes(out).keys() == changes(path).keys()


ACE = {
    "transformer_blocks.0.cross_attn.to_q": (24, 24), "lyric_encoder.encoders.0.self_attn.linear_q": (24, 24),
    "speaker_embedder": (24, 24),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "diffusion_model."])
def test_ace_step_1(prefix, tmp_path):
    path = saved(tmp_path, {prefix + name: size for name, size in ACE.items()})
    for to in ("comfyui", "kohya"):
        assert loads(converted(path, to, tmp_path), "comfyui") == "yes"
    assert set(changes(path)) == {f"transformer.{name}" for name in ACE}


def test_omnigen_2_is_not_taken_for_lumina_2(tmp_path):
    """Their names are the same; the width is not, and ComfyUI has no fused projections of OmniGen2."""
    path = saved(tmp_path, {f"transformer.layers.{n}.attn.to_q": (2520, 2520) for n in range(2)})
    assert set(changes(converted(path, "comfyui", tmp_path))) == {f"transformer.layers.{n}.attn.to_q" for n in range(2)}
    path = saved(tmp_path, {f"transformer.layers.{n}.attn.to_out.0": (2304, 2304) for n in range(2)})
    out = tmp_path / "lumina.safetensors"
    ak.convert(path, out, to="comfyui")
    assert set(changes(out)) == {f"transformer.layers.{n}.attention.out" for n in range(2)}


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_animas_text_adapter_has_a_name_in_underscores(to, tmp_path):
    names = ["diffusion_model.blocks.0.self_attn.q_proj", "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj"]
    path = saved(tmp_path, dict.fromkeys(names, (24, 24)))
    out = converted(path, to, tmp_path)
    stems = {key.partition(".")[0] for key in load_file(out)}
    assert stems == {"lora_unet_blocks_0_self_attn_q_proj", "lora_unet_llm_adapter_blocks_0_cross_attn_q_proj"}
    assert changes(out).keys() == changes(path).keys()
    assert load_file(converted(out, "comfyui", tmp_path)).keys() == {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up") for key in load_file(path)
    }


def test_a_module_that_animas_text_adapter_lacks_is_an_error(tmp_path):
    path = saved(tmp_path, {"lora_unet_llm_adapter_blocks_0_no_such": (24, 24)}, DOWN_UP, 4)
    with pytest.raises(TargetNotFound, match="llm_adapter_blocks_0_no_such"):
        ak.read(path)


# Files that are no adapters.

OTHERS = {
    "a T-LoRA": ["unet.a.processor.to_q_lora.q_layer.weight", "unet.a.processor.to_q_lora.lambda_layer"],
    "a LoRA of SwissArmyTransformer": [
        "model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0",
        "model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_B.0",
    ],
    "a file of nunchaku": ["transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up"],
    "Stability's control-LoRA": ["lora_controlnet", "input_blocks.1.1.transformer_blocks.0.attn1.to_q.up"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "an IP-Adapter of FLUX": ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"],
    "a ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
    "a ControlNet": ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"],
    "a motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],
    "FLUX's Redux": ["redux_up.weight", "redux_down.weight"],
    "a PuLID": ["pulid_ca.0.to_q.weight"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_adapter_is_named_with_the_reason(name, tmp_path):
    path = tmp_path / "given.safetensors"
    save_file({key: np.zeros((4, 4), "f4") for key in OTHERS[name]}, path)
    (kind,) = (each for each in other_files() if each.name == name)
    with pytest.raises(UnknownFormat) as caught:
        ak.detect(path)
    text = str(caught.value)
    assert kind.name in text
    assert kind.why in text
    assert text.endswith(kind.cure)
    assert any(key in text for key in OTHERS[name])
    failed = run("convert", path, tmp_path / "out.safetensors", "--to", "diffusers")
    assert failed.exit_code == 2
    assert kind.name in failed.stderr
    assert kind.name in run("inspect", path).output


def test_a_checkpoint_with_sats_loras_inside_is_named(tmp_path):
    stem = "model.diffusion_model.transformer.layers.0.attention.query_key_value"
    tensors = {f"{stem}.original.weight": np.zeros((12, 4), "f4"), f"{stem}.matrix_A.0": np.zeros((2, 4), "f4")}
    save_file(tensors | {f"{stem}.matrix_B.0": np.zeros((4, 2), "f4")}, tmp_path / "given.safetensors")
    assert "belong to a LoRA of SwissArmyTransformer" in run("inspect", tmp_path / "given.safetensors").output


def test_each_kind_has_a_case():
    assert [kind.name for kind in other_files()] == list(OTHERS)


def test_keys_of_adapters_are_of_no_such_kind():
    assert other_file(["unet.conv_in.lora_A.weight", "lora_unet_down_blocks_0.alpha"]) is None


def test_a_family_that_only_metadata_tell_is_proven_with_swapped_halves(tmp_path):
    """ComfyUI's MiniMax-H3 has the gate behind the value in one weight; diffusers' name of it is many families'."""
    D = RANDOM.normal(size=(32, 8)).astype("f4")
    given, out = tmp_path / "given.safetensors", tmp_path / "out.safetensors"
    stem = "diffusion_model.transformer_blocks.0.ff.net.0.proj"
    save_file({f"{stem}.diff": D}, given, metadata={"adapterkit.family": "minimax_h3"})
    ak.convert(given, out, to="comfyui")
    np.testing.assert_array_equal(
        load_file(out)["diffusion_model.blocks.0.mlp.fc1.diff"], np.concatenate([D[16:], D[:16]])
    )


def onetrainers_oft(pairs, size, scaled):
    """OneTrainer's rotations by numpy: the first five terms of Cayley's series, of an upper triangle."""
    Q = np.zeros((len(pairs), size, size))
    Q[:, *np.triu_indices(size, 1)] = pairs / (2 * np.sqrt(size - 1) if scaled else 1)
    Q -= Q.swapaxes(1, 2)
    return np.eye(size) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "stem",
    ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
     "lora_transformer_transformer_blocks_0_attn_to_q", "transformer.transformer_blocks.0.attn.to_q",
     "diffusion_model.double_blocks.0.img_attn.proj"],
)  # fmt: skip
def test_onetrainers_oft(stem, shared, scaled, tmp_path):
    pairs = RANDOM.normal(size=(1 if shared else 6, 6)) * 0.2
    tensors = {f"{stem}.oft_R.weight": pairs.astype("f4")}
    tensors |= {f"{stem}.oft_R.scaled_oft": np.array(True)} if scaled else {}
    save_file(tensors, tmp_path / "given.safetensors")
    adapter = ak.read(tmp_path / "given.safetensors").load("cpu")
    ((_, (update,)),) = adapter.updates.items()
    W, x = RANDOM.normal(size=(8, 24)), RANDOM.normal(size=(5, 24))
    R = onetrainers_oft(pairs.astype("f4").astype("f8"), 4, scaled)
    turned = np.einsum("brk,rkc->brc", x.reshape(5, 6, 4), np.broadcast_to(R, (6, 4, 4))).reshape(5, 24)
    ours = update.map(lambda leaf: leaf.double()).new_weight(torch.from_numpy(W)).numpy()
    np.testing.assert_allclose(x @ ours.T, turned @ W.T, atol=1e-6)


def test_onetrainers_oft_of_a_convolution_is_refused_by_name(tmp_path):
    """It turns the weight of a convolution the other way round."""
    stem = "lora_unet_down_blocks_1_resnets_0_conv1"
    save_file({f"{stem}.oft_R.weight": np.zeros((6, 6), "f4")}, tmp_path / "given.safetensors")
    with pytest.raises(Unsupported, match="OneTrainer's OFT on a convolution"):
        ak.read(tmp_path / "given.safetensors")


@pytest.mark.parametrize(
    ("stem", "target"),
    [("transformer.transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
     ("unet.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
      "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
     ("diffusion_model.diffusion_model.double_blocks.0.img_attn.qkv", "transformer.double_blocks.0.img_attn.qkv"),
     ("base_model.model.base_model.model.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
     ("transformer.transformer_blocks.0.attn.to_out", "transformer.transformer_blocks.0.attn.to_out.0"),
     ("transformer.transformer.layers.0.attention.dense", "transformer.transformer.layers.0.attention.dense")],
)  # fmt: skip
def test_a_prefix_that_is_there_twice_and_mfluxs_word_for_an_output(stem, target, tmp_path):
    """A model that was wrapped twice; the last one is SAT's own name of CogVideoX, and stays."""
    (found,) = ak.read(saved(tmp_path, {stem: (8, 4)})).updates
    assert str(found) == target
