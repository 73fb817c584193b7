"""Formats of image models: files that the real tools wrote read as what those held, compute the same, and come back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Step
from adapterkit.errors import Malformed, ShapeMismatch, TargetNotFound, UnknownFormat, Unrepresentable, Unsupported
from adapterkit.formats import FORMATS
from adapterkit.io.lazy import as_torch
from adapterkit.methods import METHODS

ROOT = Path(__file__).parents[2] / "spec" / "vectors" / "formats"
KINDS = ("bfl_control", "diffusers", "kohya", "lycoris", "xlabs")
FOLDERS = sorted(folder for kind in KINDS for folder in (ROOT / kind).iterdir())
REFUSED = {"tlora"}
READ = [folder for folder in FOLDERS if folder.name not in REFUSED]
TOLERANCE = 1e-6


def name(folder):
    return f"{folder.parent.name}-{folder.name}"


def file_of(folder):
    found = folder / "adapter.safetensors"
    return found if found.exists() else folder / "pytorch_lora_weights.safetensors"


def loaded(update):
    return update.map(lambda leaf: as_torch(leaf).double())


def lora(stem, i=8, o=8, r=2, alpha=3.0, kernel=(), down="lora_down.weight", up="lora_up.weight"):
    """One module of a file, from a generator seeded by its name."""
    g = torch.Generator().manual_seed(sum(map(ord, stem)))
    made = {
        f"{stem}.{down}": torch.randn(r, i, *kernel, generator=g),
        f"{stem}.{up}": torch.randn(o, r, *[1] * len(kernel), generator=g),
    }
    return made if alpha is None else made | {f"{stem}.alpha": torch.tensor(alpha)}


def written(tmp_path, tensors, metadata=None, file="a.safetensors"):
    save_file(tensors, tmp_path / file, metadata)
    return tmp_path / file


def deltas(adapter):
    """The change of the weight at each target, in float64."""
    return {str(t): loaded(u).delta((u.dims()["out"], u.dims()["in"], *u.dims().get("k", ()))) for t, u in adapter}


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (value - other[key]).abs().max() <= TOLERANCE * value.abs().max(), key


# Files of the real tools.


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_file_is_recognised_as_what_it_is_and_as_nothing_else(folder):
    path = file_of(folder)
    assert [n for n in FORMATS if FORMATS[n]().sniff(path)] == [folder.parent.name]
    assert ak.detect(path) == folder.parent.name


@pytest.mark.parametrize("kind", ["adapterhub", "peft"])
def test_folders_of_language_models_are_none_of_these(kind):
    folders = [folder for folder in (ROOT / kind).iterdir() if (folder / "adapter_config.json").exists()]
    for path in (*folders, *(file for folder in folders for file in folder.glob("adapter*.safetensors"))):
        assert not [n for n in (*KINDS, "comfyui", "textual_inversion") if FORMATS[n]().sniff(path)]


@pytest.mark.parametrize("folder", [f for f in READ if (f / "expected.native.safetensors").exists()], ids=name)
def test_a_file_reads_as_what_its_tool_held(folder):
    assert ak.read(file_of(folder)).digest() == ak.read(folder / "expected.native.safetensors").digest()


@pytest.mark.parametrize("folder", [f for f in READ if (f / "forward.safetensors").exists()], ids=name)
def test_an_adapter_computes_what_its_tool_computed(folder):
    held = load_file(folder / "forward.safetensors")
    adapter = ak.read(file_of(folder))
    assert {key.partition("|")[0] for key in held} == {target.path for target in adapter.updates}
    for target, updates in adapter.updates.items():
        W, x, y = (held[f"{target}|{field}"].double() for field in "Wxy")
        new, bias = W, held.get(f"{target}|b", torch.zeros(len(W))).double()
        for formula in map(loaded, updates):
            new = formula.new_weight(new) if formula.changes_weight else new
            bias = formula.new_bias(bias) if formula.changes_bias else bias
        if W.ndim == 1:
            got = functional.layer_norm(x, W.shape, new, bias)
        else:
            got = functional.conv2d(x, new, bias, padding=1) if W.ndim == 4 else functional.linear(x, new, bias)
        assert (got - y).abs().max() <= TOLERANCE * y.abs().max(), target


@pytest.mark.parametrize("folder", READ, ids=name)
def test_a_file_comes_back_with_the_same_bytes_by_way_of_the_native_format(folder, tmp_path):
    path, kind = file_of(folder), folder.parent.name
    adapter = ak.read(path)
    adapter.check_values()
    assert ak.write(adapter, tmp_path / "out.safetensors", format=kind) == []
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()
    ak.write(adapter, tmp_path / "native.safetensors")
    assert ak.write(ak.read(tmp_path / "native.safetensors"), tmp_path / "again.safetensors", format=kind) == []
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("folder", [ROOT / "kohya" / "flux", ROOT / "xlabs" / "flux"], ids=name)
def test_flux_in_diffusers_names_is_what_diffusers_itself_converts_it_to(folder, tmp_path):
    ak.write(ak.read(file_of(folder)), tmp_path / "out", format="diffusers")
    wanted = load_file(folder / "converted.safetensors")
    stems = {key.removesuffix(".lora_A.weight") for key in wanted if key.endswith(".lora_A.weight")}
    same(
        {stem: wanted[f"{stem}.lora_B.weight"].double() @ wanted[f"{stem}.lora_A.weight"].double() for stem in stems},
        deltas(ak.read(tmp_path / "out")),
    )


def test_t_lora_is_refused_with_the_reason():
    with pytest.raises(Unsupported, match="initial factors, and the file does not have these factors"):
        ak.read(ROOT / "lycoris" / "tlora" / "adapter.safetensors")


# Between formats.

XL = {
    **lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
    **lora("lora_unet_input_blocks_1_0_in_layers_2", 4, 8, kernel=(3, 3)),
    **lora("lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj", 8, 16, r=4, alpha=0.7),
    **lora("lora_unet_output_blocks_2_2_conv", 8, 8, kernel=(3, 3)),
    **lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
    **lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", 8, 32),
}
FLUX = load_file(ROOT / "kohya" / "flux" / "adapter.safetensors") | {
    **lora("lora_unet_final_layer_adaLN_modulation_1", 8, 16),
    **lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
    **lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
}
SD3 = {
    **lora("lora_unet_joint_blocks_0_x_block_attn_qkv", 8, 24),
    **lora("lora_unet_joint_blocks_0_x_block_attn2_qkv", 8, 24),
    **lora("lora_unet_joint_blocks_0_context_block_mlp_fc1", 8, 32),
    **lora("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0"),
}
MODELS = {"xl": XL, "flux": FLUX, "sd3": SD3}


@pytest.mark.parametrize("way", ["diffusers", "comfyui"])
@pytest.mark.parametrize("model", MODELS)
def test_kohya_goes_through_another_format_and_back(model, way, tmp_path):
    source = written(tmp_path, MODELS[model])
    middle, back = tmp_path / "middle.safetensors", tmp_path / "back.safetensors"
    assert ak.write(ak.read(source), middle, format=way) == []
    assert ak.detect(middle) == way
    assert ak.write(ak.read(middle), back, format="kohya") == []
    got, wanted = load_file(back), load_file(source)
    if model == "flux" and way == "diffusers":
        # A LoRA of each of q, k and v of its own is what the block-diagonal one was.
        up = "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight"
        assert torch.equal(got[up], wanted[up])
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key


@pytest.mark.parametrize("way", ["kohya", "diffusers", "comfyui", "lycoris", "peft"])
@pytest.mark.parametrize("folder", ["locon", "dora", "from_diffusers"])
def test_every_format_of_lora_says_the_same_change(folder, way, tmp_path):
    source = ROOT / "kohya" / folder
    adapter = ak.read(source / "adapter.safetensors")
    assert ak.write(adapter, tmp_path / "out", format=way) == []
    held = load_file(source / "forward.safetensors")
    back = ak.read(tmp_path / "out", format=way)
    wanted, got = _in_order(adapter), _in_order(back)
    assert len(wanted) == len(got)
    for (target, one), (_, other) in zip(wanted, got, strict=True):
        W = held[f"{target}|W"].double()
        new = loaded(one).new_weight(W)
        assert (new - loaded(other).new_weight(W)).abs().max() <= TOLERANCE * new.abs().max()


def _in_order(adapter):
    """Updates in the order of their first factors, for names differ."""
    return sorted(adapter, key=lambda pair: as_torch(pair[1].tensors["A"]).flatten().tolist())


@pytest.mark.parametrize("folder", ["loha", "lokr", "lokr_both", "locon_rs"])
def test_lycoris_goes_to_peft_and_back(folder, tmp_path):
    adapter = ak.read(ROOT / "lycoris" / folder / "adapter.safetensors")
    ak.write(adapter, tmp_path / "peft", format="peft")
    back = ak.read(tmp_path / "peft")
    ak.write(back, tmp_path / "back.safetensors", format="lycoris")
    assert ak.read(tmp_path / "back.safetensors", format="lycoris").digest() == adapter.digest()


def test_peft_s_factor_on_two_whole_factors_is_folded_where_lycoris_has_no_place_for_it(tmp_path):
    W1, W2 = torch.randn(2, 2), torch.randn(4, 4)
    adapter = ak.Adapter({ak.Target("unet.x"): (METHODS["lokr"](w1=W1, w2=W2, scaling=0.3),)})
    with pytest.raises(Unrepresentable, match="which the format cannot store"):
        ak.write(adapter, tmp_path / "x.safetensors", format="lycoris")
    assert not (tmp_path / "x.safetensors").exists()
    lines = ak.write(adapter, tmp_path / "x.safetensors", format="lycoris", on_loss="fold")
    assert lines == ["folded the scaling into a factor of unet.x"]
    assert torch.allclose(load_file(tmp_path / "x.safetensors")["lora_unet_x.lokr_w1"], 0.3 * W1)


@pytest.mark.parametrize("folder", ["loha", "lokr", "lokr_both", "lokr_whole"])
def test_promotion_to_lora_is_exact(folder, tmp_path):
    adapter = ak.read(ROOT / "lycoris" / folder / "adapter.safetensors")
    linear = {t: u for t, u in adapter.updates.items() if "conv" not in t.path}
    adapter = adapter.replace(updates=linear)
    with pytest.raises(Unrepresentable, match="the format does not have"):
        ak.write(adapter, tmp_path / "out.safetensors", format="kohya")
    assert not (tmp_path / "out.safetensors").exists()
    lines = ak.write(adapter, tmp_path / "out.safetensors", format="kohya", on_loss="promote")
    assert len(lines) == len(linear)
    got = ak.read(tmp_path / "out.safetensors", format="kohya")
    shapes = {str(t): (u.dims()["out"], u.dims()["in"]) for t, u in got}
    wanted = {str(t): loaded(u).delta(shapes[str(t)]) for t, u in adapter}
    same(wanted, deltas(got))


def test_what_is_dropped_is_listed(tmp_path):
    adapter = ak.read(ROOT / "lycoris" / "norms" / "adapter.safetensors")
    lines = ak.write(adapter, tmp_path / "out.safetensors", format="kohya", on_loss="drop")
    assert lines == [
        "left out unet.down_blocks.0.attentions.0.transformer_blocks.0.norm1: the format does not have the method dense"
    ]
    assert len(ak.read(tmp_path / "out.safetensors")) == 1


def test_parts_with_scalings_that_differ_are_folded_where_that_is_allowed(tmp_path):
    stem = "transformer.single_transformer_blocks.0.attn"
    q, k = (METHODS["lora"](A=torch.randn(2, 8), B=torch.randn(8, 2), scaling=s) for s in (0.3, 0.7))
    of_flux = (Step("read", {"format": "diffusers", "metadata": {"modelspec.architecture": "flux-1-dev/lora"}}),)
    adapter = ak.Adapter({ak.Target(f"{stem}.to_q"): (q,), ak.Target(f"{stem}.to_k"): (k,)}, recipe=of_flux)
    with pytest.raises(Unrepresentable, match="have different scalings"):
        ak.write(adapter, tmp_path / "x.safetensors", format="kohya")
    ak.write(adapter, tmp_path / "x.safetensors", format="kohya", on_loss="fold")
    (whole,) = deltas(ak.read(tmp_path / "x.safetensors")).values()
    parts = torch.cat([0.3 * q.B @ q.A, 0.7 * k.B @ k.A, torch.zeros(40, 8)]).double()
    assert (whole - parts).abs().max() < 1e-6 * parts.abs().max()


def test_names_of_two_models_are_not_guessed(tmp_path):
    made = METHODS["lora"](A=torch.randn(2, 8), B=torch.randn(8, 2))
    adapter = ak.Adapter({ak.Target("transformer.transformer_blocks.0.attn.to_q"): (made,)})
    with pytest.raises(Unrepresentable, match=r"flux or .* or sd3.*these families translate the names differently"):
        ak.write(adapter, tmp_path / "x.safetensors", format="kohya")
    # A width is no proof: Qwen-Image is as wide as FLUX.
    wide = {next(iter(adapter.updates)): (made.replace(A=torch.randn(2, 3072), B=torch.randn(3072, 2)),)}
    with pytest.raises(Unrepresentable, match=r"flux or flux2 or hunyuan_video or .*qwen_image"):
        ak.write(adapter.replace(updates=wide), tmp_path / "x.safetensors", format="kohya")
    for name in ("transformer_blocks.18.attn.to_q", "single_transformer_blocks.37.norm.linear"):
        wide[ak.Target(f"transformer.{name}")] = (made.replace(B=torch.randn(24, 2)),)
    ak.write(adapter.replace(updates=wide), tmp_path / "x.safetensors", format="kohya")
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in load_file(tmp_path / "x.safetensors")


# A base.


def test_names_are_walked_forward_in_a_base_of_any_model(tmp_path, base):
    checkpoint = base({"blocks.0.cross_attn.k_image.weight": np.ones((8, 8), "f4")})
    path = written(tmp_path, lora("lora_unet_blocks_0_cross_attn_k_image"))
    with pytest.raises(TargetNotFound, match="Pass --base"):
        ak.read(path)
    adapter = ak.read(path, base=checkpoint)
    assert [target.path for target in adapter.updates] == ["blocks.0.cross_attn.k_image"]
    ak.write(adapter, tmp_path / "b.safetensors", format="kohya")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert adapter.bind(checkpoint)


def test_a_name_that_two_modules_of_the_base_have_is_refused(tmp_path, base):
    checkpoint = base({f"{name}.weight": np.ones((8, 8), "f4") for name in ("a_b.c", "a.b_c")})
    with pytest.raises(TargetNotFound, match=r"several modules: (a_b\.c, a\.b_c|a\.b_c, a_b\.c)") as raised:
        ak.read(written(tmp_path, lora("lora_unet_a_b_c")), base=checkpoint)
    assert raised.value.where == "lora_unet_a_b_c"


def test_a_name_that_the_base_lacks_comes_with_the_nearest(tmp_path, base):
    checkpoint = base({"blocks.0.attn.query.weight": np.ones((8, 8), "f4")})
    with pytest.raises(TargetNotFound, match="blocks_0_attn_query"):
        ak.read(written(tmp_path, lora("lora_unet_blocks_0_attn_queri")), base=checkpoint)


@pytest.mark.parametrize("root", ["", "model.diffusion_model."])
def test_an_ldm_file_finds_its_place_in_ldm_and_diffusers_bases(root, tmp_path, base):
    inner = "transformer_blocks.0.attn1.to_q"
    theirs = f"down_blocks.1.attentions.0.{inner}" if not root else f"{root}input_blocks.4.1.{inner}"
    checkpoint = base({f"{theirs}.weight": np.ones((8, 8), "f4")})
    path = written(tmp_path, lora(f"lora_unet_input_blocks_4_1_{inner.replace('.', '_')}"))
    assert [t.path for t in ak.read(path, base=checkpoint).updates] == [theirs]


def test_fused_weights_are_parted_for_a_base_in_diffusers_names(tmp_path, base):
    attn = "transformer_blocks.0.attn"
    checkpoint = base({f"{attn}.to_{x}.weight": np.zeros((8, 8), "f4") for x in "qkv"})
    path = written(tmp_path, lora("lora_unet_double_blocks_0_img_attn_qkv", 8, 24))
    adapter = ak.read(path, base=checkpoint)
    tensors = load_file(path)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    whole = 1.5 * tensors[f"{stem}.lora_up.weight"].double() @ tensors[f"{stem}.lora_down.weight"].double()
    same({f"{attn}.to_{x}": whole[8 * n : 8 * n + 8] for n, x in enumerate("qkv")}, deltas(adapter))


# Bad input.

STEM = "lora_unet_down_blocks_0_attentions_0_proj_in"
FC1 = "text_model_encoder_layers_0_mlp_fc1"
GOOD = {
    "kohya": lora(STEM),
    "lycoris": {
        f"{STEM}.hada_{x}": torch.ones(8, 8) for x in ("w1_a", "w1_b", "w2_a", "w2_b")
    } | {f"{STEM}.alpha": torch.tensor(1.0)},
    "diffusers": lora("unet.down_blocks.0.attentions.0.proj_in", alpha=None, down="lora_A.weight", up="lora_B.weight"),
    "comfyui": lora("diffusion_model.input_blocks.1.1.proj_in"),
    "xlabs": lora("double_blocks.0.processor.qkv_lora1", 8, 24, alpha=None, down="down.weight", up="up.weight"),
    "bfl_control": lora("img_in", alpha=None, down="lora_A.weight", up="lora_B.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_files_are_good(kind, tmp_path):
    assert ak.detect(written(tmp_path, GOOD[kind])) == kind
    assert len(ak.read(tmp_path / "a.safetensors")) == 1


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("cut", [4, 60, -3])
def test_a_truncated_file_is_refused(kind, cut, tmp_path):
    path = written(tmp_path, GOOD[kind])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Malformed):
        ak.read(path, format=kind)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("foreign", ["base_model.model.q.lora_A.weight", "blk.0.attn_q.weight.lora_a", "x"])
def test_a_key_of_another_format_is_refused_by_name(kind, foreign, tmp_path):
    path = written(tmp_path, GOOD[kind] | {foreign: torch.ones(2, 2)})
    with pytest.raises(Malformed) as raised:
        ak.read(path, format=kind)
    assert raised.value.where == foreign


@pytest.mark.parametrize("kind", GOOD)
def test_a_factor_without_its_partner_is_refused(kind, tmp_path):
    for key in GOOD[kind]:
        if not key.endswith("alpha"):
            path = written(tmp_path, {k: v for k, v in GOOD[kind].items() if k != key})
            with pytest.raises(Malformed, match="lacks a tensor that this one needs"):
                ak.read(path, format=kind)


@pytest.mark.parametrize("kind", ["kohya", "lycoris"])
def test_an_alpha_that_is_missing_stands_for_the_rank_as_in_the_tools(kind, tmp_path):
    path = written(tmp_path, {k: v for k, v in GOOD[kind].items() if not k.endswith("alpha")})
    with pytest.raises(Malformed, match="no alpha") as raised:
        ak.read(path, format=kind, compat="formula")
    assert "--compat formula" in raised.value.cure
    adapter = ak.read(path, format=kind)
    assert [update.scaling for _, update in adapter] == [1.0]
    ak.write(adapter, tmp_path / "b.safetensors", format=kind)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["kohya", "lycoris", "comfyui"])
@pytest.mark.parametrize(("value", "why"), [(torch.tensor(float("nan")), "finite"), (torch.ones(2), "one element")])
def test_an_alpha_that_is_no_use_is_refused(kind, value, why, tmp_path):
    alpha = next(key for key in GOOD[kind] if key.endswith("alpha"))
    with pytest.raises(Malformed, match=why) as raised:
        ak.read(written(tmp_path, GOOD[kind] | {alpha: value}), format=kind)
    assert raised.value.where == alpha


@pytest.mark.parametrize(("compat", "scaling"), [(None, 1.0), ("formula", 0.0)])
@pytest.mark.parametrize("kind", ["kohya", "lycoris"])
def test_an_alpha_of_zero_stands_for_the_rank_and_keeps_its_bits(kind, compat, scaling, tmp_path):
    """sd-scripts' and LyCORIS' modules: `alpha = lora_dim if alpha is None or alpha == 0 else alpha`."""
    alpha = next(key for key in GOOD[kind] if key.endswith("alpha"))
    path = written(tmp_path, GOOD[kind] | {alpha: torch.tensor(0.0)})
    adapter = ak.read(path, format=kind, compat=compat)
    assert [update.scaling for _, update in adapter] == [scaling]
    ak.write(adapter, tmp_path / "b.safetensors", format=kind)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_an_alpha_of_zero_is_refused_where_no_tool_takes_it_for_the_rank(tmp_path):
    alpha = next(key for key in GOOD["comfyui"] if key.endswith("alpha"))
    with pytest.raises(Malformed, match="is 0") as raised:
        ak.read(written(tmp_path, GOOD["comfyui"] | {alpha: torch.tensor(0.0)}), format="comfyui")
    assert raised.value.where == alpha


@pytest.mark.parametrize(
    ("tensors", "error", "where"),
    [
        (lora("lora_unet_nothing_of_this_name"), TargetNotFound, "lora_unet_nothing_of_this_name"),
        (lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q"), TargetNotFound, "lora_te3"),
        (GOOD["kohya"] | {"lora_te_x.foo": torch.ones(1)}, Malformed, "lora_te_x.foo"),
        (lora(f"lora_te_{FC1}") | lora(f"lora_te1_{FC1}"), Malformed, "lora_te"),
        ({f"{STEM}.alpha": torch.tensor(1.0)}, Malformed, f"{STEM}.alpha"),
        (GOOD["kohya"] | {f"{STEM}.dora_scale": torch.ones(1, 7)}, ShapeMismatch, f"{STEM}.dora_scale"),
        (GOOD["kohya"] | {f"{STEM}.dora_scale": torch.ones(3, 7)}, Unsupported, f"{STEM}.dora_scale"),
        (GOOD["kohya"] | {f"{STEM}.lora_up.weight": torch.ones(8, 3)}, ShapeMismatch, "lora"),
        (GOOD["kohya"] | {f"{STEM}.lora_up.weight": torch.ones(8, 2, 3, 3)}, ShapeMismatch, f"{STEM}.lora_up.weight"),
        (GOOD["kohya"] | {f"{STEM}.lora_mid.weight": torch.ones(2, 3, 3, 3)}, ShapeMismatch, f"{STEM}.lora_mid.weight"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_kohya_file_is_named(tensors, error, where, tmp_path):
    with pytest.raises(error) as raised:
        ak.read(written(tmp_path, tensors), format="kohya")
    assert type(raised.value) is error
    assert where in raised.value.where
    assert raised.value.cure


def test_files_of_two_formats_at_once_are_refused(tmp_path):
    path = written(tmp_path, GOOD["kohya"] | GOOD["comfyui"])
    with pytest.raises(UnknownFormat, match="comfyui or kohya"):
        ak.read(path)


def test_ranks_that_the_header_denies_are_refused(tmp_path):
    config = {"unet.r": 3, "unet.lora_alpha": 3, "unet.target_modules": ["proj_in"]}
    path = written(tmp_path, GOOD["diffusers"], {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ShapeMismatch, match="states 3"):
        ak.read(path)
    written(tmp_path, GOOD["diffusers"], {"lora_adapter_metadata": "[]"})
    with pytest.raises(Malformed):
        ak.read(path)
    written(tmp_path, GOOD["diffusers"], {"lora_adapter_metadata": json.dumps(config | {"unet.new_maths": 1})})
    with pytest.raises(Unsupported, match="does not know"):
        ak.read(path)


@pytest.mark.parametrize("kind", sorted(set(GOOD) - {"lycoris"}))
def test_nothing_is_written_where_anything_is_refused(kind, tmp_path):
    made = METHODS["lora"](A=torch.ones(1, 2), B=torch.ones(2, 1))
    adapter = ak.Adapter({ak.Target("model.layers.0.q"): (made,)})
    with pytest.raises(Unrepresentable):
        ak.write(adapter, tmp_path / "x.safetensors", format=kind)
    assert list(tmp_path.iterdir()) == []


def test_lycoris_names_modules_of_any_model(tmp_path, base):
    made = METHODS["lora"](A=torch.ones(1, 2), B=torch.ones(2, 1))
    ak.write(ak.Adapter({ak.Target("model.q_proj"): (made,)}), tmp_path / "x.safetensors", format="lycoris")
    assert "lycoris_model_q_proj.alpha" in load_file(tmp_path / "x.safetensors")
    checkpoint = base({"model.q_proj.weight": np.ones((2, 2), "f4")})
    assert [t.path for t in ak.read(tmp_path / "x.safetensors", base=checkpoint).updates] == ["model.q_proj"]


# Textual inversion.

INVERSIONS = {
    "diffusers": {"<cat>": torch.randn(8)},
    "kohya": {"emb_params": torch.randn(3, 8)},
    "sdxl": {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 12)},
}


@pytest.mark.parametrize("kind", INVERSIONS)
def test_embeddings_come_back_with_the_same_bytes(kind, tmp_path):
    path = written(tmp_path, INVERSIONS[kind], file="cat.safetensors")
    assert [n for n in FORMATS if FORMATS[n]().sniff(path)] == ["textual_inversion"]
    adapter = ak.read(path)
    assert {update.token for _, update in adapter} == {"<cat>" if kind == "diffusers" else "cat"}
    rows = [as_torch(update.P) for _, update in adapter]
    assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(rows, sorted_values(INVERSIONS[kind]), strict=True))
    ak.write(adapter, tmp_path / "native.safetensors")
    again = ak.read(tmp_path / "native.safetensors")
    lines = ak.write(again, tmp_path / "out.safetensors", format="textual_inversion")
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()
    # Only diffusers' files hold the token; the name of the others is the token.
    assert all("becomes 'out', the name of the file; it was 'cat'" in line for line in lines)
    assert len(lines) == (0 if kind == "diffusers" else len(adapter))


def sorted_values(tensors):
    return [tensors[key] for key in sorted(tensors)]


@pytest.mark.parametrize(("step", "checkpoint"), [(99, None), (500, "cc6cb27103417325"), (None, None)])
def test_automatic1111_s_files_are_read_and_written(step, checkpoint, tmp_path):
    vec = torch.randn(2, 8).requires_grad_()  # as its training leaves it
    held = {
        "string_to_token": {"*": 265}, "string_to_param": {"*": vec}, "name": "cat", "step": step,
        "sd_checkpoint": checkpoint, "sd_checkpoint_name": None if checkpoint is None else "v1-5-pruned",
    }  # fmt: skip
    torch.save(held, tmp_path / "x.pt")
    assert ak.detect(tmp_path / "x.pt") == "textual_inversion"
    adapter = ak.read(tmp_path / "x.pt")
    ((target, update),) = adapter
    assert target.path == "text_encoder.text_model.embeddings.token_embedding"
    assert update.token == "cat"
    ak.write(adapter, tmp_path / "y.pt", format="textual_inversion")
    back = torch.load(tmp_path / "y.pt", weights_only=True)
    assert torch.equal(back.pop("string_to_param")["*"], held.pop("string_to_param")["*"])
    assert back == held
    again = ak.read(tmp_path / "y.pt")
    assert [(str(target), update.token) for target, update in again] == [(target.path, "cat")]
    assert torch.equal(as_torch(next(iter(again))[1].P), vec)
    ak.write(again, tmp_path / "x2.pt", format="textual_inversion")
    assert (tmp_path / "x2.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()
    ak.write(adapter, tmp_path / "z.safetensors", format="textual_inversion")
    assert list(load_file(tmp_path / "z.safetensors")) == ["cat"]


@pytest.mark.parametrize(
    "tensors",
    [{"emb_params": torch.ones(2, 2, 2)}, {"clip_l": torch.ones(2), "x": torch.ones(2)}, {"clip_l": torch.ones(0, 2)}],
)
def test_what_is_no_embedding_is_refused(tensors, tmp_path):
    with pytest.raises(Malformed):
        ak.read(written(tmp_path, tensors), format="textual_inversion")


def renamed(adapter, token):
    return adapter.replace(updates={t: tuple(u.replace(token=token) for u in us) for t, us in adapter.updates.items()})


@pytest.mark.parametrize("token", ["<dog>", "badv1.5", "<cat-v1.0>"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_new_token_becomes_the_key_that_diffusers_reads(token, suffix, tmp_path):
    adapter = renamed(ak.read(written(tmp_path, INVERSIONS["diffusers"], file="cat.safetensors")), token)
    out = tmp_path / f"out.{suffix}"
    assert ak.write(adapter, out, format="textual_inversion") == []
    state = load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    ((key, rows),) = state.items()  # diffusers' load_textual_inversion_state_dict takes the only key as the token
    assert key == token
    assert torch.equal(rows, INVERSIONS["diffusers"]["<cat>"])
    assert ak.detect(out) == "textual_inversion"
    assert [update.token for _, update in ak.read(out)] == [token]


def test_a_second_encoder_changes_the_layout_to_sdxl_s(tmp_path):
    adapter = ak.read(written(tmp_path, INVERSIONS["diffusers"], file="cat.safetensors"))
    ((target, update),) = adapter
    second = target.__class__(target.path.replace("text_encoder.", "text_encoder_2."))
    both = adapter.replace(updates={**adapter.updates, second: (update.replace(P=torch.randn(1, 12).numpy()),)})
    lines = ak.write(both, tmp_path / "out.safetensors", format="textual_inversion")
    assert all("becomes 'out', the name of the file; it was '<cat>'" in line for line in lines)
    assert sorted(load_file(tmp_path / "out.safetensors")) == ["clip_g", "clip_l"]


def test_a_token_like_a_parameter_s_name_is_refused(tmp_path):
    adapter = renamed(ak.read(written(tmp_path, INVERSIONS["diffusers"], file="cat.safetensors")), "fc.weight")
    with pytest.raises(Unrepresentable, match="name of a parameter"):
        ak.write(adapter, tmp_path / "out.safetensors", format="textual_inversion")


def test_a_t5_s_embeddings_are_refused(tmp_path):
    with pytest.raises(Unsupported, match="T5"):
        ak.read(written(tmp_path, {"t5xxl": torch.ones(1, 4)}), format="textual_inversion")


# Costs.


def test_conversion_without_values_to_change_needs_no_torch(tmp_path):
    written(tmp_path, XL)
    code = """
import sys, adapterkit as ak
adapter = ak.read(sys.argv[1])
ak.write(adapter, sys.argv[2] + "/b.safetensors", format="comfyui")
ak.write(adapter, sys.argv[2] + "/c", format="peft")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.safetensors", tmp_path], check=True, cwd=ROOT.parents[2])


def test_a_folder_of_diffusers_is_named_by_itself(tmp_path):
    shutil.copytree(ROOT / "diffusers" / "plain", tmp_path / "x")
    assert ak.detect(tmp_path / "x") == "diffusers"
    assert len(ak.read(tmp_path / "x")) == 3
