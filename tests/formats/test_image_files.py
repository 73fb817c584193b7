"""Files of image models as trainers leave them: alphas in any form, fused parts, names of several trainers."""

import itertools
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import record, run
from diffusers.loaders import single_file_utils
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import adapterkit as ak
from adapterkit.errors import Malformed, TargetNotFound, Unrepresentable, Unsupported, UsageError

RNG = np.random.default_rng(0)
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
AB = ("lora_A.weight", "lora_B.weight")


def normal(*shape):
    return RNG.normal(size=shape).astype("f4")


def lora(stem, out=8, columns=8, ends=("lora_down.weight", "lora_up.weight"), alpha=None, rank=2):
    held = {f"{stem}.{ends[0]}": normal(rank, columns), f"{stem}.{ends[1]}": normal(out, rank)}
    return held if alpha is None else held | {f"{stem}.alpha": np.asarray(alpha, "f4")}


def saved(tmp_path, held, metadata=None):
    save_file(held, tmp_path / "a.safetensors", metadata)
    return tmp_path / "a.safetensors"


def scalings(adapter):
    return {update.scaling for updates in adapter.updates.values() for update in updates}


# Alphas.


@pytest.mark.parametrize("alpha", [np.array(1.5, "f4"), np.array([1.5], "f4"), np.array([[1.5]], "f4")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_alpha_is_one_number_of_any_shape_and_type(alpha, kind, tmp_path):
    held = {key: torch.from_numpy(value) for key, value in lora(UNET).items()}
    save_torch({**held, f"{UNET}.alpha": torch.from_numpy(alpha).to(kind)}, tmp_path / "a.safetensors")
    assert scalings(ak.read(tmp_path / "a.safetensors")) == {0.75}


UNKNOWN = ("foo.blocks.0.attn.to_q", "foo.blocks.0.attn.to_k")


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("ends", [AB, ("lora_A.default.weight", "lora_B.default.weight")])
def test_an_image_model_without_a_file_here_has_scale_1_and_that_is_said(prefix, ends, tmp_path):
    held = {}
    for rank, name in enumerate(UNKNOWN, 2):
        held |= lora(prefix + name, ends=ends, rank=rank)
    path = saved(tmp_path, held)
    assert scalings(ak.read(path)) == {1.0}
    assert record("inspect", str(path))["without_alpha"] == 2
    assert "2 modules without alpha: the scaling is 1" in run("inspect", str(path)).stdout


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "new.0.q"])
def test_a_language_model_is_asked_for_its_alpha_and_shown_without(prefix, name, tmp_path):
    path = saved(tmp_path, lora(prefix + name, ends=AB))
    with pytest.raises(UsageError, match=r"--alpha A \(alpha=A"):
        ak.read(path)
    shown = record("inspect", str(path))
    assert len(shown["modules"]) == 1
    assert "--alpha" in shown["why"]


# Prefixes.

QWEN = ("transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.img_mlp.net.2")


@pytest.mark.parametrize(
    "prefix",
    [
        "", "diffusion_model.", "transformer.", "model.diffusion_model.", "base_model.model.",
        "base_model.model.diffusion_model.", "base_model.model.transformer.", "lora_unet_", "lora_transformer_",
        "lycoris_",
    ],
)  # fmt: skip
def test_every_prefix_leads_to_the_same_modules_of_diffusers(prefix, tmp_path):
    flat = prefix.endswith("_")
    held, changes = {}, {}
    for name in QWEN:
        stem = prefix + (name.replace(".", "_") if flat else name)
        one = lora(stem, ends=("lora_down.weight", "lora_up.weight") if flat else AB)
        held |= one
        down, up = one.values()
        changes[name] = up.astype("f8") @ down.astype("f8")
    ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "diffusers")
    made = load_file(tmp_path / "b.safetensors")
    for name, change in changes.items():
        down, up = (made[f"transformer.{name}.{end}"].astype("f8") for end in AB)
        np.testing.assert_allclose(up @ down, change, rtol=1e-6, atol=1e-6)
    assert len(made) == 4


# Families.


def test_text_encoders_tell_families_of_the_same_names_apart(tmp_path):
    one = {
        **lora("lora_unet_double_blocks_0_img_attn_proj", alpha=1),
        **lora("lora_unet_double_blocks_0_txt_attn_proj"),
    }
    with pytest.raises(TargetNotFound, match="--family"):
        ak.read(saved(tmp_path, one))
    encoders = {
        **lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        **lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
    }
    paths = {target.path for target in ak.read(saved(tmp_path, one | encoders)).updates}
    assert "transformer.double_blocks.0.img_attn.proj" in paths
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in paths


@pytest.mark.parametrize(
    "names",
    [
        ("layers_0_attention_qkv", "layers_0_attention_to_q"),
        ("layers_0_attention_out", "layers_0_attention_to_out_0"),
    ],
)  # fmt: skip
def test_a_fused_weight_beside_its_parts_is_refused(names, tmp_path):
    held = {}
    for name in names:
        held |= lora(f"lora_unet_{name}", 24 if "qkv" in name else 8)
    with pytest.raises(Malformed, match="this key and lora_unet_layers_0_attention"):
        ak.read(saved(tmp_path, held))


def test_a_difference_of_weights_becomes_the_lora_that_diffusers_itself_makes_of_it(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers as convert

    held = {"diffusion_model.head.head.diff": normal(6, 8), "diffusion_model.head.head.diff_b": normal(6)}
    for name in ("q", "k", "v", "o"):
        for attention in ("self_attn", "cross_attn"):
            held |= lora(f"diffusion_model.blocks.0.{attention}.{name}", ends=AB)
            held |= {f"diffusion_model.blocks.0.{attention}.{name}.diff_b": normal(8)}
    for name in ("ffn.0", "ffn.2"):
        held |= lora(f"diffusion_model.blocks.0.{name}", ends=AB)
        held |= {f"diffusion_model.blocks.0.{name}.diff_b": normal(8)}
    adapter = ak.read(saved(tmp_path, held))
    with pytest.raises(Unrepresentable, match="--on-loss promote"):
        ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    lines = ak.write(adapter, tmp_path / "b.safetensors", "diffusers", on_loss="promote")
    assert any("head.head as a LoRA of rank 6" in str(line) for line in lines)
    theirs = convert({key: torch.from_numpy(value.copy()) for key, value in held.items()})
    ours = load_file(tmp_path / "b.safetensors")
    assert ours.keys() == theirs.keys()
    for key in (key for key in ours if key.endswith("lora_B.weight")):
        below = key.replace("lora_B", "lora_A")
        want = theirs[key].double().numpy() @ theirs[below].double().numpy()
        np.testing.assert_allclose(ours[key].astype("f8") @ ours[below], want, rtol=0, atol=1e-12)
    for key in (key for key in ours if key.endswith("bias")):
        np.testing.assert_array_equal(ours[key], theirs[key].numpy())


def test_a_difference_with_more_outputs_than_inputs_and_one_of_a_convolution_are_exact(tmp_path):
    held = lora("diffusion_model.blocks.0.self_attn.q") | {
        "diffusion_model.blocks.0.ffn.0.diff": normal(12, 8),
        "diffusion_model.patch_embedding.diff": normal(8, 4, 1, 2, 2),
    }
    adapter = ak.read(saved(tmp_path, held))
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers", on_loss="promote")
    again = ak.read(tmp_path / "b.safetensors")
    for name, other in (("ffn.0", "ffn.net.0.proj"), ("patch_embedding", "patch_embedding")):
        here = "transformer.patch_embedding" if other == name else f"transformer.blocks.0.{other}"
        want = next(held[key] for key in held if f"{name}.diff" in key)
        np.testing.assert_array_equal(again.delta(here).numpy(), want)
    assert load_file(tmp_path / "b.safetensors")["transformer.blocks.0.ffn.net.0.proj.lora_A.weight"].shape == (8, 8)


@pytest.mark.filterwarnings("ignore")
def test_a_difference_of_flux_s_norms_is_written_whole_at_a_base_as_its_loader_takes_it(tmp_path):
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    name = "transformer_blocks.0.attn.norm_q"
    held = lora("transformer.transformer_blocks.0.attn.to_q", 32, 32, ends=AB)
    held |= {f"diffusion_model.{name}.diff": normal(16)}
    held = {
        key.replace("transformer.transformer_blocks", "diffusion_model.transformer_blocks"): t
        for key, t in held.items()
    }
    adapter = ak.read(saved(tmp_path, held), family="flux")
    with pytest.raises(Unrepresentable, match=r"--base.*--on-loss promote"):
        ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers", base=tmp_path / "base", on_loss="promote")
    want = model.get_submodule(name).weight.detach().clone() + torch.from_numpy(held[f"diffusion_model.{name}.diff"])
    state, _, _ = FluxLoraLoaderMixin.lora_state_dict(
        str(tmp_path / "b.safetensors"), return_alphas=True, return_lora_metadata=True
    )
    norms = {key.removeprefix("transformer."): value for key, value in state.items() if "norm_q" in key}
    FluxLoraLoaderMixin._load_norm_into_transformer(norms, model)
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), want)


def test_changes_of_zero_that_diffusers_cannot_say_are_left_out_and_said(tmp_path):
    names = ("diffusion_model.blocks.0.norm3", "diffusion_model.blocks.0.self_attn.norm_q")
    held = lora("diffusion_model.blocks.0.self_attn.q") | {f"{name}.diff": np.zeros(8, "f4") for name in names}
    lines = ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "diffusers")
    assert sum("its change is zero" in str(line) for line in lines) == 2
    assert len(load_file(tmp_path / "b.safetensors")) == 2
    held[f"{names[0]}.diff"][3] = 1
    with pytest.raises(Unrepresentable, match=r"blocks\.0\.norm2: it changes a norm by a difference.*--on-loss drop"):
        ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "diffusers")


@pytest.mark.parametrize(
    ("stem", "path", "others"),
    [
        ("diffusion_model.llm_adapter.blocks.0.self_attn.q_proj", "text_conditioner.blocks.0.self_attn.q_proj",
         "diffusion_model.blocks.0.adaln_modulation_mlp.1"),
        ("text_embedding_projection.aggregate_embed", "connectors.text_proj_in",
         "diffusion_model.transformer_blocks.0.audio_attn1.to_q"),
    ],
)  # fmt: skip
def test_parts_beside_the_transformer_keep_their_names(stem, path, others, tmp_path):
    held = lora(stem, ends=AB) | lora(others, ends=AB)
    ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "diffusers")
    made = load_file(tmp_path / "b.safetensors")
    assert np.array_equal(made[f"{path}.lora_B.weight"], held[f"{stem}.lora_B.weight"])
    ak.write(ak.read(tmp_path / "b.safetensors"), tmp_path / "c.safetensors", "comfyui")
    assert f"{stem}.lora_up.weight" in load_file(tmp_path / "c.safetensors")


# Krea 2, whose fused queries have four times the rows of the keys.


@pytest.mark.parametrize("prefix", ["lycoris_", "transformer."])
@pytest.mark.parametrize("magnitude", [False, True])
def test_a_lokr_of_unequal_parts_is_cut_for_the_authors_names(prefix, magnitude, tmp_path):
    held, changes = {}, {}
    for name, (out, columns, factor) in {
        "transformer_blocks.0.attn.to_qkv": (192, 64, 6), "text_fusion.refiner_blocks.0.attn.to_qkv": (96, 32, 3),
    }.items():  # fmt: skip
        stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        w1, w2 = normal(factor, 4), normal(out // factor, columns // 4)
        held |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}
        changes[name] = np.kron(w1.astype("f8"), w2.astype("f8"))
        if magnitude and prefix == "lycoris_":
            held[f"{stem}.dora_scale"] = np.abs(normal(out, 1))
    ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "comfyui")
    made = load_file(tmp_path / "b.safetensors")
    for name, native, edges in (
        ("transformer_blocks.0.attn.to_qkv", "blocks.0.attn", (128, 160)),
        ("text_fusion.refiner_blocks.0.attn.to_qkv", "txtfusion.refiner_blocks.0.attn", (32, 64)),
    ):
        for letter, part in zip("qkv", np.split(changes[name], edges), strict=True):
            w1, w2 = (made[f"diffusion_model.{native}.w{letter}.lokr_w{n}"].astype("f8") for n in (1, 2))
            np.testing.assert_allclose(np.kron(w1, w2), part, rtol=1e-6, atol=1e-6)


def test_a_scaling_that_diffusers_has_no_slot_for_is_refused_with_the_flag_that_folds_it(tmp_path):
    stem = "diffusion_model.layers.0.attention.to_q"
    held = {f"{stem}.lokr_w1": normal(2, 2), f"{stem}.lokr_w2_a": normal(4, 2), f"{stem}.lokr_w2_b": normal(2, 4)}
    adapter = ak.read(saved(tmp_path, held | {f"{stem}.alpha": np.array(1, "f4")}))
    with pytest.raises(Unrepresentable, match="--on-loss fold"):
        ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers", on_loss="fold")


def test_embeddings_that_onetrainer_bundles_are_read_and_written_back(tmp_path):
    held = lora(UNET, alpha=1) | {
        "bundle_emb.token.clip_l": normal(2, 8), "bundle_emb.token.clip_g": normal(2, 8),
        "bundle_emb.other.clip_l": normal(8),
    }  # fmt: skip
    adapter = ak.read(saved(tmp_path, held))
    found = {(t.path, u.token): u for t, u in adapter if u.method == "textual_inversion"}
    assert {token for _, token in found} == {"token", "other"}
    assert len(found) == 3
    place = ("text_encoder_2.text_model.embeddings.token_embedding", "token")
    np.testing.assert_array_equal(found[place].P.numpy(), held["bundle_emb.token.clip_g"])
    for source in (adapter, adapter.replace(foreign=None)):
        ak.write(source, tmp_path / "b.safetensors", "kohya")
        again = load_file(tmp_path / "b.safetensors")
        assert again.keys() == held.keys()
        assert all(np.array_equal(again[key].reshape(held[key].shape), held[key]) for key in held)
    ak.write(adapter, tmp_path / "native", "adapterkit")
    ak.write(ak.read(tmp_path / "native"), tmp_path / "c.safetensors", "kohya")
    assert (tmp_path / "c.safetensors").read_bytes() == saved(tmp_path, held).read_bytes()
    assert "textual_inversion" in run("inspect", str(tmp_path / "c.safetensors")).stdout


@pytest.mark.parametrize("name", ["diffusers", "comfyui"])
def test_embeddings_are_lost_only_where_that_is_asked_for(name, tmp_path):
    held = lora(UNET, alpha=1) | {"bundle_emb.token.emb_params": normal(2, 8)}
    adapter = ak.read(saved(tmp_path, held))
    with pytest.raises(Unrepresentable, match=r"the format does not have the method textual_inversion.*--on-loss drop"):
        ak.write(adapter, tmp_path / "b.safetensors", name)
    lines = ak.write(adapter, tmp_path / "b.safetensors", name, on_loss="drop")
    assert any("token_embedding" in line for line in lines)
    ak.write(adapter, tmp_path / "token.safetensors", "textual_inversion", on_loss="drop")
    assert load_file(tmp_path / "token.safetensors").keys() == {"token"}


def test_embeddings_of_flux_s_encoders_are_told_by_the_transformer_beside_them(tmp_path):
    held = {}
    for name, rows in (("transformer_blocks_0_attn_to_q", 3072), ("single_transformer_blocks_37_proj_mlp", 12288)):
        held |= lora(f"lora_transformer_{name}", rows, 3072, alpha=1)
    held |= {"bundle_emb.token.clip_l": normal(2, 8), "bundle_emb.token.t5": normal(2, 8)}
    adapter = ak.read(saved(tmp_path, held, {"modelspec.architecture": "Flux.1-dev"}))
    places = {t.path for t, u in adapter if u.method == "textual_inversion"}
    assert places == {"text_encoder.text_model.embeddings.token_embedding", "text_encoder_2.shared"}
    ak.write(adapter, tmp_path / "b.safetensors", "kohya")
    assert load_file(tmp_path / "b.safetensors").keys() == held.keys()


def test_embeddings_of_an_encoder_s_output_are_named(tmp_path):
    held = lora(UNET, alpha=1) | {"bundle_emb.token.clip_l_out": normal(2, 8)}
    with pytest.raises(Unsupported, match="not an input embedding of a text encoder") as raised:
        ak.read(saved(tmp_path, held))
    assert raised.value.where == "bundle_emb.token.clip_l_out"


# Spellings that publishers use.


def test_words_that_training_tools_put_into_paths_are_left_out(tmp_path):
    names = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0._checkpoint_wrapped_module.attn.to_q")
    held = {k: v for name in names for k, v in lora(f"transformer._orig_mod.{name}", ends=AB).items()}
    adapter = ak.read(saved(tmp_path, held))
    assert {t.path for t in adapter.updates} == {
        "transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_q"
    }  # fmt: skip
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    assert load_file(tmp_path / "b.safetensors").keys() == held.keys()


def test_hunyuan_video_i2v_s_own_prefix_is_read(tmp_path):
    stems = ("double_blocks_0_img_attn_qkv", "single_blocks_0_linear2")
    held = {k: v for stem in stems for k, v in lora(f"Hunyuan_video_I2V_lora_{stem}", alpha=1).items()}
    adapter = ak.read(saved(tmp_path, held))
    assert {t.path for t in adapter.updates} == {
        "transformer.double_blocks.0.img_attn_qkv", "transformer.single_blocks.0.linear2"
    }  # fmt: skip
    ak.write(adapter.replace(foreign=None), tmp_path / "b.safetensors", "comfyui")
    assert any("img_attn_qkv" in key for key in load_file(tmp_path / "b.safetensors"))


def test_slots_without_weight_are_read_behind_comfyui_s_prefix(tmp_path):
    held = lora("diffusion_model.blocks.0.attn.qkv_x", 24, ends=("lora_A", "lora_B"))
    held |= lora("diffusion_model.blocks.0.attn.qkv_y", 24, ends=("lora_A", "lora_B"))
    assert ak.detect(saved(tmp_path, held)) == "comfyui"
    adapter = ak.read(tmp_path / "a.safetensors")
    want = held["diffusion_model.blocks.0.attn.qkv_x.lora_B"] @ held["diffusion_model.blocks.0.attn.qkv_x.lora_A"]
    np.testing.assert_allclose(adapter.delta("transformer.blocks.0.attn.qkv_x").numpy(), want, rtol=1e-5, atol=1e-6)


SEVERAL = {
    "lora": {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)},
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
    "dense": {"diff": (8, 8)},
    "replacement": {"set_weight": (8, 8)},
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SEVERAL, 2)))
def test_two_changes_of_one_weight_are_refused_because_comfyui_applies_only_one(one, other, tmp_path):
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    held = {f"{stem}.{slot}": normal(*shape) for slot, shape in {**SEVERAL[one], **SEVERAL[other]}.items()}
    with pytest.raises(Malformed, match="only one change"):
        ak.read(saved(tmp_path, held))
    groups = []
    for name in (one, other):
        (tmp_path / name).mkdir()
        alone = {key: value for key, value in held.items() if key.split(f"{stem}.")[1] in SEVERAL[name]}
        groups.append(ak.read(saved(tmp_path / name, alone)).updates)
    (target,) = groups[0]
    both = ak.Adapter({target: tuple(update for group in groups for update in group[target])})
    with pytest.raises(Unrepresentable, match="only one change") as e:
        ak.write(both, tmp_path / "b.safetensors", "comfyui")
    if "replacement" in (one, other):
        return
    # The sum of the changes is one weight difference, or one LoRA.
    assert "--on-loss promote" in e.value.cure

    def product(up, down):
        return held[f"{stem}.{up}"].astype("f8") @ held[f"{stem}.{down}"]

    changes = {
        "lora": lambda: product("lora_up.weight", "lora_down.weight"),
        "loha": lambda: product("hada_w1_a", "hada_w1_b") * product("hada_w2_a", "hada_w2_b"),
        "dense": lambda: held[f"{stem}.diff"],
    }
    for order in (1, -1):
        turned = ak.Adapter({target: both.updates[target][::order]})
        ak.write(turned, tmp_path / f"{order}.safetensors", "comfyui", on_loss="promote")
        got = ak.read(tmp_path / f"{order}.safetensors").delta(target.path).numpy()
        np.testing.assert_allclose(got, changes[one]() + changes[other](), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (12, 8, 3), (12, 1, 3, 3), (12, 8, 2, 3, 3)])
@pytest.mark.parametrize("root", ["unet.", "model.diffusion_model."])
def test_a_lora_of_a_convolution_may_be_flat_as_comfyui_trains_it(root, shape, tmp_path):
    columns, name = int(np.prod(shape[1:])), "input_blocks.0.0"
    base = {f"{root}{name}.weight": normal(*shape), f"{root}{name}.bias": normal(12)}
    save_file(base, tmp_path / "base.safetensors")
    held = lora(f"diffusion_model.{name}", 12, columns, alpha=1.0) | {f"diffusion_model.{name}.diff_b": normal(12)}
    path = saved(tmp_path, held)
    ak.merge(tmp_path / "base.safetensors", path, tmp_path / "merged.safetensors")
    A, B = (held[f"diffusion_model.{name}.lora_{word}.weight"].astype("f8") for word in ("down", "up"))
    expected = base[f"{root}{name}.weight"] + (B @ A / 2).reshape(shape)
    merged = load_file(tmp_path / "merged.safetensors")
    np.testing.assert_allclose(merged[f"{root}{name}.weight"], expected, rtol=0, atol=1e-5)
    adapter = ak.read(path, base=tmp_path / "base.safetensors")
    if root == "unet.":
        ak.write(adapter, tmp_path / "again.safetensors", "comfyui")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


PARTED = {
    "flux": ("transformer_blocks.0.attn.to_{}", "double_blocks_0_img_attn_qkv", (48, 48, 48), "norm1.linear"),
    "flux2": ("transformer_blocks.0.attn.to_{}", "double_blocks_0_img_attn_qkv", (48, 48, 48), "ff.linear_in"),
    "krea2": ("transformer_blocks.0.attn.to_{}", "transformer_blocks_0_attn_to_qkv", (48, 12, 12), "attn.to_gate"),
    "krea2 native": ("blocks.0.attn.w{}", "transformer_blocks_0_attn_to_qkv", (48, 12, 12), ""),
}
"""The base's names of the parts of a fused weight, a file's name of the whole, the parts' rows, another module."""


def parted_base(tmp_path, names, rows, other):
    base = {f"{names.format(name)}.weight": normal(n, 48) for name, n in zip("qkv", rows, strict=True)}
    if other:
        base |= {f"transformer_blocks.0.{other}.weight": normal(48, 48)}
        base |= {"transformer_blocks.0.attn.to_out.0.weight": normal(48, 48)}
    else:
        base |= {"blocks.0.attn.wo.weight": normal(48, 48), "blocks.0.attn.gate.weight": normal(48, 48)}
    save_file(base, tmp_path / "base.safetensors")
    return base


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("blocks", [6, 4, 8])
@pytest.mark.parametrize("model", PARTED)
def test_a_lokr_of_a_fused_weight_fits_a_base_that_has_its_parts(model, blocks, magnitude, tmp_path):
    names, whole, rows, other = PARTED[model]
    base, out = parted_base(tmp_path, names, rows, other), sum(rows)
    if out % blocks:
        blocks = 3
    stem = f"lycoris_{whole}"
    held = {f"{stem}.lokr_w1": normal(blocks, 4), f"{stem}.lokr_w2": normal(out // blocks, 12)}
    held |= {f"{stem}.alpha": np.array(1.0, "f4")}
    held |= {f"{stem}.dora_scale": np.abs(normal(out, 1)) + 0.5} if magnitude else {}
    ak.merge(tmp_path / "base.safetensors", saved(tmp_path, held), tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    expected = np.concatenate([base[f"{names.format(name)}.weight"] for name in "qkv"]).astype("f8")
    expected += np.kron(held[f"{stem}.lokr_w1"].astype("f8"), held[f"{stem}.lokr_w2"].astype("f8"))
    if magnitude:
        expected *= held[f"{stem}.dora_scale"] / np.linalg.norm(expected, axis=1, keepdims=True)
    got = np.concatenate([merged[f"{names.format(name)}.weight"] for name in "qkv"])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_magnitudes_of_the_inputs_of_a_fused_weight_need_a_base_that_has_it(tmp_path):
    names, whole, rows, other = PARTED["flux"]
    parted_base(tmp_path, names, rows, other)
    stem = f"lycoris_{whole}"
    held = {f"{stem}.lokr_w1": normal(6, 4), f"{stem}.lokr_w2": normal(24, 12)}
    held |= {f"{stem}.dora_scale": np.abs(normal(1, 48)) + 0.5}
    path, out = saved(tmp_path, held), tmp_path / "merged.safetensors"
    with pytest.raises(Unsupported, match="cannot be split into the weight's parts") as e:
        ak.merge(tmp_path / "base.safetensors", path, out)
    assert "a base that has this fused weight" in e.value.cure
    weights = {"img_attn.qkv": normal(144, 48), "img_attn.proj": normal(48, 48), "img_mod.lin": normal(288, 48)}
    save_file({f"double_blocks.0.{k}.weight": v for k, v in weights.items()}, tmp_path / "fused.safetensors")
    ak.merge(tmp_path / "fused.safetensors", path, out)
    V = weights["img_attn.qkv"] + np.kron(held[f"{stem}.lokr_w1"].astype("f8"), held[f"{stem}.lokr_w2"])
    wanted = V * held[f"{stem}.dora_scale"] / np.linalg.norm(V, axis=0, keepdims=True)
    merged = load_file(out)["double_blocks.0.img_attn.qkv.weight"]
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", ["qkv", "qv", "v"])
@pytest.mark.parametrize("kind", ["dora", "lokr", "loha", "lokr dora_scale", "loha dora_scale"])
def test_parts_that_cannot_be_joined_change_their_rows_of_a_fused_weight(kind, names, tmp_path):
    weights = {"img_attn.qkv": normal(144, 48), "img_attn.proj": normal(48, 48), "img_mod.lin": normal(288, 48)}
    save_file({f"double_blocks.0.{k}.weight": v for k, v in weights.items()}, tmp_path / "base.safetensors")
    held, expected = {}, weights["img_attn.qkv"].astype("f8")
    for name in names:
        at = 48 * "qkv".index(name)
        stem = f"lycoris_transformer_blocks_0_attn_to_{name}"
        if kind == "dora":
            stem = f"transformer.transformer_blocks.0.attn.to_{name}"
            made = {"lora_A.weight": normal(4, 48), "lora_B.weight": normal(48, 4)}
            change = made["lora_B.weight"].astype("f8") @ made["lora_A.weight"]
        elif kind.startswith("lokr"):
            made = {"lokr_w1": normal(4, 4), "lokr_w2": normal(12, 12), "alpha": np.array(4.0, "f4")}
            change = np.kron(made["lokr_w1"].astype("f8"), made["lokr_w2"].astype("f8"))
        else:
            made = {f"hada_w{n}_{x}": normal(*((48, 4) if x == "a" else (4, 48))) for n in (1, 2) for x in "ab"}
            made |= {"alpha": np.array(4.0, "f4")}
            factors = {key: value.astype("f8") for key, value in made.items()}
            change = factors["hada_w1_a"] @ factors["hada_w1_b"] * (factors["hada_w2_a"] @ factors["hada_w2_b"])
        rows = expected[at : at + 48] + change
        if "dora" in kind:
            magnitude = np.abs(normal(48, 1)) + 0.5
            rows *= magnitude / np.linalg.norm(rows, axis=1, keepdims=True)
            made["dora_scale" if "_" in kind else "lora_magnitude_vector"] = (
                magnitude if "_" in kind else magnitude[:, 0]
            )
        expected[at : at + 48] = rows
        held |= {f"{stem}.{slot}": np.ascontiguousarray(value) for slot, value in made.items()}
    ak.merge(tmp_path / "base.safetensors", saved(tmp_path, held), tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")["double_blocks.0.img_attn.qkv.weight"]
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_fused_weight_and_its_part_at_a_base_with_bare_names(trained, tmp_path):
    names, whole, rows, other = PARTED["krea2"]
    base = parted_base(tmp_path, names, rows, other)
    fused, part = f"lycoris_{whole}", f"lycoris_{whole}".removesuffix("kv")
    held = {f"{fused}.lokr_w1": normal(6, 4), f"{fused}.lokr_w2": normal(12, 12)}
    held |= {f"{part}.lokr_w1": normal(4, 4) * trained, f"{part}.lokr_w2": normal(12, 12)}
    path = saved(tmp_path, {k: np.asarray(v, "f4") for k, v in held.items()})
    if trained:
        with pytest.raises(Malformed, match="changes this weight twice"):
            ak.merge(tmp_path / "base.safetensors", path, tmp_path / "merged.safetensors")
        return
    ak.merge(tmp_path / "base.safetensors", path, tmp_path / "merged.safetensors")
    change = np.kron(held[f"{fused}.lokr_w1"], held[f"{fused}.lokr_w2"])[:48]
    merged = load_file(tmp_path / "merged.safetensors")[f"{names.format('q')}.weight"]
    np.testing.assert_allclose(merged, base[f"{names.format('q')}.weight"] + change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", [("q", "k", "v", "out"), ("k",)])
@pytest.mark.parametrize(
    ("root", "prefix"),
    [
        ("conditioner.embedders.1.model.", "lora_te2_"),
        ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
        ("cond_stage_model.model.", "lora_te_"),
    ],
)
def test_a_text_encoder_with_openclip_s_names_changes_as_diffusers_converts_it(root, prefix, names, tmp_path):
    block = f"{root}transformer.resblocks.0."
    base = {f"{block}attn.in_proj_weight": normal(24, 8), f"{block}attn.in_proj_bias": normal(24)}
    base |= {f"{block}attn.out_proj.weight": normal(8, 8), f"{block}mlp.c_fc.weight": normal(32, 8)}
    base |= {f"{block}mlp.c_proj.weight": normal(8, 32)}
    base |= {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": normal(8, 8)}
    save_file(base, tmp_path / "base.safetensors")
    shapes = {f"self_attn.{name}_proj": (8, 8) for name in names} | {"mlp.fc1": (32, 8), "mlp.fc2": (8, 32)}
    held, changes = {}, {}
    for name, (out, columns) in shapes.items():
        path = f"text_model.encoder.layers.0.{name}"
        stem = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        held |= lora(stem, out, columns, alpha=1.0)
        changes[path] = held[f"{stem}.lora_up.weight"] @ held[f"{stem}.lora_down.weight"] / 2
    ak.merge(tmp_path / "base.safetensors", saved(tmp_path, held), tmp_path / "merged.safetensors")

    def converted(file):
        tensors = {key: torch.from_numpy(value) for key, value in load_file(file).items()}
        model = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=8))
        return single_file_utils.convert_open_clip_checkpoint(model, tensors, root)

    before, after = converted(tmp_path / "base.safetensors"), converted(tmp_path / "merged.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        expected = value.numpy() + changes.pop(key.removesuffix(".weight"), 0)
        np.testing.assert_allclose(after[key].numpy(), expected, rtol=0, atol=1e-5)
    assert not changes


def test_blocks_of_hunyuan_video_are_no_control_lora_of_flux(tmp_path):
    held = lora("double_blocks.0.img_attn_qkv", 24, ends=AB) | lora("single_blocks.0.linear2", ends=AB)
    assert ak.detect(saved(tmp_path, held)) == "comfyui"


def test_a_clip_beside_a_t5_tells_flux_from_families_without_clip(tmp_path):
    held = lora("diffusion_model.double_blocks.0.img_attn.qkv", 24)
    for stem in (
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    ):
        held |= lora(stem)
    paths = {t.path for t in ak.read(saved(tmp_path, held)).updates}
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in paths


@pytest.mark.parametrize("name", ["comfyui", "kohya"])
def test_xlabs_rows_of_a_fused_weight_become_an_update_of_all_its_rows(name, tmp_path):
    vector = Path(__file__).parents[2] / "spec" / "vectors" / "formats" / "xlabs" / "flux" / "adapter.safetensors"
    adapter = ak.read(vector)
    (place,) = {t for t in adapter.updates if t.rows}
    ak.write(adapter, tmp_path / "b.safetensors", name)
    again = ak.read(tmp_path / "b.safetensors", family="flux")
    (update,) = again.updates[next(t for t in again.updates if t.path == place.path)]
    width = update.A.shape[1]
    assert update.B.shape == (7 * width, adapter.updates[place][0].A.shape[0])
    whole = again.delta(place.path).numpy()
    np.testing.assert_allclose(whole[: 3 * width], adapter.delta(place.path).numpy(), rtol=1e-5, atol=1e-6)
    assert not whole[3 * width :].any()


def test_a_folded_scaling_that_the_type_cannot_hold_is_named(tmp_path):
    """XLabs' files have no alpha, so the scaling goes into B; float16 ends at 65504."""
    vector = Path(__file__).parents[2] / "spec" / "vectors" / "formats" / "xlabs" / "flux" / "adapter.safetensors"
    held = {key: value.astype("f2") for key, value in load_file(vector).items()}
    adapter = ak.read(saved(tmp_path, held), format="xlabs")
    large = {t: tuple(update.replace(scaling=1e9) for update in found) for t, found in adapter.updates.items()}
    with pytest.raises(Malformed, match=r"a scaling of 1e\+09 moves the element at .* out of the range of F16"):
        ak.write(ak.Adapter(large), tmp_path / "out.safetensors", "xlabs", on_loss="fold")
    assert not (tmp_path / "out.safetensors").exists()


def control():
    """A control LoRA of FLUX under BFL's names, of few modules at the published width."""
    held = {}
    for name, out in (("double_blocks.0.img_attn.qkv", 9216), ("single_blocks.0.linear1", 21504)):
        held |= lora(name, out, 3072, ends=AB) | {f"{name}.lora_B.bias": normal(out)}
    norms = ("double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.norm.key_norm.scale")
    return held | {name: normal(128) for name in norms}


def test_a_control_lora_goes_to_diffusers_and_back_with_its_norms(tmp_path):
    held = control()
    ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "diffusers")
    there = load_file(tmp_path / "b.safetensors")
    assert "transformer.transformer_blocks.0.attn.norm_q.weight" in there
    ak.write(ak.read(tmp_path / "b.safetensors"), tmp_path / "c.safetensors", "bfl_control")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == held.keys()
    assert all(np.array_equal(back[key], held[key]) for key in held)


def test_a_control_lora_for_comfyui_is_what_comfyui_itself_makes_of_it(tmp_path):
    """ComfyUI's convert_lora_bfl_control: diff_b for a bias, set_weight for a scale, behind its prefix."""
    held = control()
    ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "comfyui")
    there = load_file(tmp_path / "b.safetensors")
    for key, value in held.items():
        name = key.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.set_weight")
        name = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        np.testing.assert_array_equal(there.pop(f"diffusion_model.{name}"), value)
    assert not there


def test_whole_norms_of_families_whose_loader_takes_none_are_refused(tmp_path):
    names = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.net.2")
    held = {k: v for name in names for k, v in lora(f"diffusion_model.{name}").items()}
    held["diffusion_model.transformer_blocks.0.attn.norm_q.set_weight"] = normal(8)
    with pytest.raises(Unrepresentable, match="only FLUX's loader"):
        ak.write(ak.read(saved(tmp_path, held)), tmp_path / "b.safetensors", "diffusers")
