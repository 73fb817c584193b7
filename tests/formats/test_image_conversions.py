"""Every family and format that diffusers converts: the file read here and written as diffusers changes what its
converter says; and every family through every format and back.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers.loaders import lora_pipeline, single_file_utils
from image_cases import CASES, COMFY, DOWN, FAMILIES, FLUX2, PEFT, QWEN, WAN, Z_SPLIT, dotted, flat, pairs, whole
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.core.adapter import Adapter
from adapterkit.errors import AdapterkitError, TargetNotFound, Unrepresentable, UsageError
from adapterkit.formats._image.deciding import Origin
from adapterkit.formats._image.translate import in_diffusers, in_naming
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming.image import KOHYA


def changes(tensors):
    """Module -> what a file of diffusers adds to its weight, in float64, and its bias."""
    found = {}
    for key, value in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            found[module] = np.asarray(tensors[f"{module}.lora_B.weight"], "f8") @ np.asarray(value, "f8")
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_for_diffusers_is_what_diffusers_makes_of_the_file(case, tmp_path):
    mixin, modules, spell = CASES[case]
    held = pairs(modules, spell)
    save_file(held, tmp_path / "a.safetensors")
    theirs = getattr(lora_pipeline, mixin).lora_state_dict({k: torch.from_numpy(v.copy()) for k, v in held.items()})
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    adapter = ak.read(tmp_path / "a.safetensors")
    assert ak.write(adapter, tmp_path / "b.safetensors", "diffusers", on_loss="fold") is not None
    wanted = changes({key: value.numpy() for key, value in theirs.items()})
    got = ak.read(tmp_path / "b.safetensors", "diffusers")
    assert {str(target) for target in got.updates} == set(wanted)
    for target in got.updates:
        scale = np.abs(wanted[str(target)]).max()
        assert np.abs(got.delta(str(target)).numpy() - wanted[str(target)]).max() <= 1e-6 * scale, target


def lokr(modules, prefix, alpha, decomposed):
    """A LoKr file of ai-toolkit: w1 whole, w2 whole or of rank 2; its alpha counts only in the second case."""
    rng, held = np.random.default_rng(0), {}
    for module, (out, in_) in modules.items():
        held[f"{prefix}{module}.lokr_w1"] = rng.normal(size=(4, 4)).astype("f4")
        if decomposed:
            held[f"{prefix}{module}.lokr_w2_a"] = rng.normal(size=(out // 4, 2)).astype("f4")
            held[f"{prefix}{module}.lokr_w2_b"] = rng.normal(size=(2, in_ // 4)).astype("f4")
        else:
            held[f"{prefix}{module}.lokr_w2"] = rng.normal(size=(out // 4, in_ // 4)).astype("f4")
        held[f"{prefix}{module}.alpha"] = np.array(alpha, "f4")
    return held


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("family", ["FLUX.2", "Z-Image"])
def test_a_lokr_for_diffusers_has_the_tensors_of_its_converter(family, decomposed, tmp_path):
    mixin, modules = {"FLUX.2": ("Flux2LoraLoaderMixin", FLUX2), "Z-Image": ("ZImageLoraLoaderMixin", Z_SPLIT)}[family]
    held = lokr(modules, "diffusion_model.", 1.0, decomposed)
    save_file(held, tmp_path / "a.safetensors")
    theirs = getattr(lora_pipeline, mixin).lora_state_dict({k: torch.from_numpy(v.copy()) for k, v in held.items()})
    adapter = ak.read(tmp_path / "a.safetensors")
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers", on_loss="fold")
    ours = load_file(tmp_path / "b.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[key], value.numpy(), rtol=1e-6, atol=0) for key, value in theirs.items())
    back, to = ak.read(tmp_path / "b.safetensors"), {"FLUX.2": "comfyui", "Z-Image": "lycoris"}[family]
    ak.write(back.replace(foreign=None), tmp_path / "c.safetensors", to)
    wanted = {str(t): adapter.delta(str(t)).numpy() for t in adapter.updates}
    again = ak.read(tmp_path / "c.safetensors")
    assert {str(t) for t in again.updates} == set(wanted)
    assert all(np.allclose(again.delta(path).numpy(), value, atol=1e-6) for path, value in wanted.items())


def test_changes_of_biases_in_a_wan_lora_become_what_diffusers_makes_of_them(tmp_path):
    modules = WAN | {"head.head": (16, 8)}
    held = pairs(modules, COMFY)
    held |= {
        f"diffusion_model.{m}.diff_b": np.full(shape[0], 0.5, "f4") for m, shape in modules.items() if "_attn" in m
    }
    save_file(held, tmp_path / "a.safetensors")
    theirs = lora_pipeline.WanLoraLoaderMixin.lora_state_dict({k: torch.from_numpy(v.copy()) for k, v in held.items()})
    assert ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers") == []
    ours = load_file(tmp_path / "b.safetensors")
    assert all(np.array_equal(ours[key], value.numpy()) for key, value in theirs.items())
    # diffusers has one switch for biases of all modules, so that the others have one of zeros.
    assert all(not ours[key].any() for key in ours.keys() - theirs.keys())


def test_fal_s_kontext_lora_becomes_what_diffusers_makes_of_it(tmp_path):
    h, modules = 4, {}
    for n in range(19):
        for x in ("img", "txt"):
            block = f"double_blocks.{n}.{x}"
            modules |= {f"{block}_attn.qkv": (3 * h, h), f"{block}_attn.proj": (h, h), f"{block}_mod.lin": (6 * h, h)}
            modules |= {f"{block}_mlp.0": (4 * h, h), f"{block}_mlp.2": (h, 4 * h)}
    for n in range(38):
        block = f"single_blocks.{n}"
        modules |= {
            f"{block}.linear1": (7 * 3072, h),
            f"{block}.linear2": (h, 5 * h),
            f"{block}.modulation.lin": (3 * h, h),
        }
    modules["final_layer.linear"] = (16, h)
    held = pairs(modules, PEFT)
    save_file(held, tmp_path / "a.safetensors")
    theirs, _ = lora_pipeline.FluxLoraLoaderMixin.lora_state_dict(
        {k: torch.from_numpy(v.copy()) for k, v in held.items()}, return_alphas=True
    )
    assert ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers") == []
    ours = load_file(tmp_path / "b.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], value.numpy()) for key, value in theirs.items())


# Every family.


@pytest.mark.parametrize("way", ["comfyui", "kohya", "lycoris"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.facts.generic])
def test_every_family_goes_from_diffusers_through_every_format_and_back(name, way, tmp_path):
    family = FAMILIES[name]
    modules = whole(family, "diffusers")
    if family.component == "unet":
        modules = dict(list(modules.items())[::9])
    held = pairs(modules, dotted(f"{family.component}."))
    word = {"modelspec.architecture": family.facts.words[0]} if family.facts.words else {}
    save_file(held, tmp_path / "a.safetensors", {"format": "pt", **word})
    adapter = ak.read(tmp_path / "a.safetensors")
    if family.component == "controlnet":
        with pytest.raises(Unrepresentable, match="its module is in a ControlNet"):
            ak.write(adapter, tmp_path / "b.safetensors", way)
        return
    if way != "lycoris" and family.wanted({"kohya": KOHYA}.get(way, way)) not in family.namings:
        with pytest.raises(Unrepresentable, match=family.title):
            ak.write(adapter, tmp_path / "b.safetensors", way)
        return
    assert ak.write(adapter, tmp_path / "b.safetensors", way) == []
    there = ak.read(tmp_path / "b.safetensors", way)
    if way == "comfyui":
        naming = family.names("comfyui")
        assert all(target.path.partition(".")[2] in naming for target in there.updates)
    assert ak.write(there, tmp_path / "c.safetensors", "diffusers") == []
    back = changes(load_file(tmp_path / "c.safetensors"))
    wanted = changes(held)
    assert back.keys() == wanted.keys()
    assert all(np.abs(back[module] - wanted[module]).max() < 1e-5 for module in wanted)


# Methods on fused weights.

QKV, PARTS = (
    "transformer.double_blocks.0.img_attn.qkv",
    [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"],
)
METHODS_CUT = {
    "lora": ("lora", {"A": (2, 8), "B": (24, 2)}),
    "loha": ("loha", {"w1_a": (24, 2), "w1_b": (2, 8), "w2_a": (24, 2), "w2_b": (2, 8)}),
    "lokr": ("lokr", {"w1": (6, 2), "w2": (4, 4)}),
    "dense": ("dense", {"D": (24, 8), "d": (24,)}),
    "dora": ("dora", {"A": (2, 8), "B": (24, 2), "magnitude": (24,)}),
    "glora": ("glora_products", {"A1": (8, 2), "A2": (2, 8), "B1": (24, 2), "B2": (2, 8)}),
    "ia3 of outputs": ("ia3_weights", {"w": (24,)}),
    "ia3 of inputs": ("ia3_weights", {"w_in": (8,)}),
    "oft": ("oft", {"square": (6, 4, 4), "rescale": (24,)}),
    "norms": ("weight_norm", {"out": (24,)}),
}
WHOLE = {
    "boft": ("boft_outputs", {"square": (2, 6, 4, 4)}),
    "oft with blocks over the edge": ("oft", {"square": (4, 6, 6)}),
    "norms over outputs": ("weight_norm", {"into": (8,)}),
}
"""Methods that mix rows of different parts."""


def of_shapes(method, shapes):
    rng = np.random.default_rng(0)
    leaves = {name: from_numpy(0.3 * rng.normal(size=shape).astype("f4")) for name, shape in shapes.items()}
    return METHODS[method](**leaves, **({"side": "out"} if method == "oft" else {}))


def new_weight(target, updates, W):
    (update,) = next(iter(Adapter({target: updates}).load().updates.values()))
    return update.new_weight(W) if update.changes_weight else W


@pytest.mark.parametrize("case", METHODS_CUT)
def test_a_method_on_a_fused_weight_is_cut_into_its_parts_and_put_together_again(case):
    update, target = of_shapes(*METHODS_CUT[case]), ak.Target(QKV)
    moved, lost = in_diffusers({target: (update,)}, (), Origin(families=("flux",)))
    assert not lost
    assert [str(target) for target in moved] == PARTS
    W = torch.from_numpy(np.random.default_rng(1).normal(size=(24, 8)).astype("f4"))
    whole = new_weight(target, (update,), W)
    parts = [new_weight(t, found, W[8 * n : 8 * n + 8]) for n, (t, found) in enumerate(moved.items())]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    back, lost = in_naming(moved, "native", (), Origin(families=("flux",)))
    assert not lost
    if case == "oft":  # kohya keeps the blocks of each part apart.
        again = torch.cat([new_weight(t, found, W[slice(*t.rows)]) for t, found in back.items()])
    else:
        assert list(back) == [target]
        again = new_weight(target, back[target], W)
    assert torch.allclose(again, whole, atol=1e-6)


@pytest.mark.parametrize("case", WHOLE)
def test_a_method_that_mixes_rows_of_several_parts_is_refused_by_name(case):
    update = of_shapes(*WHOLE[case])
    moved, lost = in_diffusers({ak.Target(QKV): (update,)}, (), Origin(families=("flux",)))
    assert lost == [(ak.Target(QKV), f"{update.method} on a fused weight cannot be split into the weight's parts")]
    assert list(moved) == [ak.Target(QKV)]


@pytest.mark.parametrize("case", ["loha", "glora", "ia3 of inputs"])
def test_parts_that_do_not_share_what_they_must_are_refused(case):
    method, shapes = METHODS_CUT[case]
    third = {name: (8, *shape[1:]) if shape[0] == 24 else shape for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    updates = {
        ak.Target(path): (
            METHODS[method](**{n: from_numpy(rng.normal(size=s).astype("f4")) for n, s in third.items()}),
        )
        for path in PARTS
    }
    _, lost = in_naming(updates, "native", (), Origin(families=("flux",)))
    assert {str(target) for target, _ in lost} == set(PARTS)
    assert all(method in why for _, why in lost)


def test_parts_are_put_together_at_the_smallest_rank_that_is_exact():
    rng = np.random.default_rng(0)
    A, other = (from_numpy(rng.normal(size=(2, 8)).astype("f4")) for _ in range(2))
    block = "transformer.single_transformer_blocks.0"
    held = {f"{block}.attn.to_{x}": (A, 8) for x in "qkv"} | {f"{block}.proj_mlp": (other, 32)}
    updates = {
        ak.Target(path): (METHODS["lora"](A=a, B=from_numpy(rng.normal(size=(out, 2)).astype("f4"))),)
        for path, (a, out) in held.items()
    }
    moved, lost = in_naming(updates, "native", (), Origin(families=("flux",)))
    assert not lost
    ((target, (update,)),) = moved.items()
    assert target.path == "transformer.single_blocks.0.linear1"
    assert update.A.shape == (4, 8)
    parts = [Adapter({t: u}).delta(t.path) for t, u in updates.items()]
    assert torch.allclose(Adapter(moved).delta(target.path), torch.cat(parts), atol=1e-6)


def test_parts_of_which_the_first_has_no_scaling_are_put_together():
    rng = np.random.default_rng(0)
    leaves = [{name: from_numpy(rng.normal(size=(8, 8)).astype("f4")) for name in "AB"} for _ in "qkv"]
    updates = {
        ak.Target(f"transformer.transformer_blocks.0.attn.to_{x}"): (METHODS["lora"](**pair, scaling=scaling),)
        for x, pair, scaling in zip("qkv", leaves, (0.0, 2.0, 3.0), strict=True)
    }
    moved, lost = in_naming(updates, "native", (), Origin(families=("flux",)), fold=True)
    assert not lost
    ((target, _),) = moved.items()
    parts = [Adapter({t: u}).delta(t.path) for t, u in updates.items()]
    assert torch.allclose(Adapter(moved).delta(target.path), torch.cat(parts), atol=1e-5)


# What inspect shows.


def shown(path, *options):
    result = CliRunner().invoke(adapterkit, ["inspect", str(path), "--json", *options])
    return result.exit_code, json.loads(result.stdout) if result.exit_code == 0 else result.stderr


UNKNOWN = {
    "kohya": {
        "lora_unet_new_blocks_0_q.lora_down.weight": (2, 8), "lora_unet_new_blocks_0_q.lora_up.weight": (8, 2),
        "lora_unet_new_blocks_0_q.alpha": (),
    },
    "Lightning": {"new.0.q.lora_down.weight": (2, 8), "new.0.q.lora_up.weight": (8, 2), "new.0.q.alpha": ()},
    "LoKr": {"new.0.q.lokr_w1": (2, 2), "new.0.q.lokr_w2": (4, 4), "new.0.q.alpha": ()},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_adapter_of_an_unknown_model_is_shown_and_never_called_a_base(kind, tmp_path):
    held = {key: np.ones(shape, "f4") for key, shape in UNKNOWN[kind].items()}
    save_file(held, tmp_path / "a.safetensors")
    code, record = shown(tmp_path / "a.safetensors")
    assert code == 0
    assert record["kind"] == "adapter"
    assert {f"{module}.{slot}" for module, slots in record["modules"].items() for slot in slots} == set(held)
    assert "base" in record["why"]
    with pytest.raises(AdapterkitError, match="base"):
        ak.read(tmp_path / "a.safetensors")


def test_a_lora_without_config_of_an_unknown_model_is_asked_for_its_alpha(tmp_path):
    held = {
        "new.0.q.lora_A.default.weight": np.ones((2, 8), "f4"),
        "new.0.q.lora_B.default.weight": np.ones((8, 2), "f4"),
    }
    save_file(held, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"--alpha 2 \(alpha=2\)"):
        ak.read(tmp_path / "a.safetensors")
    code, record = shown(tmp_path / "a.safetensors")
    assert code == 0
    assert list(record["modules"]) == ["new.0.q"]
    assert "--alpha 2 (alpha=2)" in record["why"]
    assert shown(tmp_path / "a.safetensors", "--alpha", "2")[1]["updates"][0]["attributes"]["scaling"] == 1


def test_inspect_says_the_family_the_metadata_and_missing_alphas(tmp_path):
    held = pairs(QWEN, dotted("diffusion_model.", *DOWN))
    said = {"modelspec.trigger_phrase": "a painting by nobody", "ss_base_model_version": "qwen_image", "ss_steps": "10"}
    save_file(held, tmp_path / "a.safetensors", said)
    _, record = shown(tmp_path / "a.safetensors")
    assert record["families"] == ["qwen_image"]
    assert record["metadata"] == said
    assert record["without_alpha"] == len(QWEN)
    text = CliRunner().invoke(adapterkit, ["inspect", str(tmp_path / "a.safetensors")]).stdout
    assert "a painting by nobody" in text
    assert "without alpha: the scaling is 1" in text
    # What is written from it keeps these.
    ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers")
    assert said.items() <= shown(tmp_path / "b.safetensors")[1]["metadata"].items()


# The loader of diffusers.

SMALL = {
    "num_layers": 1, "num_single_layers": 1, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_refiner_layers": 1, "num_hidden_layers": 1, "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1, "num_kv_heads": 2, "audio_num_attention_heads": 2, "joint_attention_dim": 32,
    "text_embed_dim": 32, "caption_channels": 32, "pooled_projection_dim": 32, "approximator_hidden_dim": 32,
    "approximator_layers": 1, "ffn_dim": 64, "intermediate_size": 64, "text_hidden_dim": 256, "text_dim": 32,
    "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 32, "llm_features_dim": 64,
    "adaln_dim": 32, "time_embed_dim": 32, "num_cross_attention_heads": 1, "pos_embed_max_size": 8, "sample_size": 8,
}  # fmt: skip
SIZES = {
    "lumina2": {"hidden_size": 576, "num_attention_heads": 6, "cap_feat_dim": 32},
    "minimax_h3": {"hidden_size": 64, "time_embed_hidden_dim": 64}, "sana": {"cross_attention_dim": 112},
    "auraflow": {"joint_attention_dim": 32, "caption_projection_dim": 512},
    "sd3": {"caption_projection_dim": 128},
}  # fmt: skip
LOADED = [
    "auraflow", "cosmos", "flux", "flux2", "flux3", "hunyuan_video", "ideogram4", "krea2", "ltx", "ltx2", "lumina2",
    "minimax_h3", "mochi", "qwen_image", "sana", "sd3", "wan",
]  # fmt: skip


@pytest.mark.parametrize("name", LOADED)
def test_the_loader_of_diffusers_computes_what_the_file_says(name, tmp_path):
    family = FAMILIES[name]
    model = tiny(name)
    linear = {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and family.moves(path, "diffusers", "native", module.out_features / module.in_features)
    }
    word = {"modelspec.architecture": family.facts.words[0]}
    save_file(pairs(linear, dotted("transformer.")), tmp_path / "a.safetensors", word)
    ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "comfyui")
    adapter = ak.read(tmp_path / "b.safetensors")
    ak.write(adapter, tmp_path / "c.safetensors", "diffusers")
    held = {key: torch.from_numpy(value) for key, value in load_file(tmp_path / "c.safetensors").items()}
    plain = {path: model.get_submodule(path) for path in linear}
    model.load_lora_adapter(held, prefix="transformer", adapter_name="x")
    wanted = changes(load_file(tmp_path / "a.safetensors"))
    for path, base in plain.items():
        torch.manual_seed(0)
        x = torch.randn(3, base.in_features)
        with torch.no_grad():
            got, y = model.get_submodule(path)(x).double(), base(x).double()
        said = y + x.double() @ torch.from_numpy(wanted[f"transformer.{path}"]).mT
        assert (got - said).abs().max() <= 1e-5 * said.abs().max(), path


def tiny(name):
    """A small random model of a family's class."""
    import inspect

    import diffusers

    kind = getattr(diffusers, FAMILIES[name].facts.classes[0])
    known = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in {**SMALL, **SIZES.get(name, {})}.items() if key in known}
    torch.manual_seed(0)
    return kind(**config)


def test_the_second_transformer_of_wan_keeps_its_part(tmp_path):
    modules = {f"transformer_2.blocks.0.attn1.{x}": (8, 8) for x in ("to_q", "to_out.0")}
    held = pairs(modules | {"transformer.blocks.0.attn1.to_q": (8, 8)}, dotted(""))
    save_file(held, tmp_path / "a.safetensors")
    adapter = ak.read(tmp_path / "a.safetensors").replace(foreign=None)
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    assert load_file(tmp_path / "b.safetensors").keys() == held.keys()
    with pytest.raises(Unrepresentable, match="transformer_2"):
        ak.write(adapter, tmp_path / "c.safetensors", "comfyui")


def test_two_underscores_behind_the_prefix_are_one(tmp_path):
    """The trainer of Wan's Fun models writes `lora_unet__blocks_0`."""
    held = {key.replace("lora_unet_", "lora_unet__"): value for key, value in pairs(WAN, flat).items()}
    save_file(held, tmp_path / "a.safetensors")
    adapter = ak.read(tmp_path / "a.safetensors")
    assert {str(target) for target in adapter.updates} == {f"transformer.{name}" for name in WAN}
    ak.write(adapter, tmp_path / "b.safetensors", "kohya")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


# A file whose names fit several families.

PARTIAL = {
    "written": ({"transformer_blocks.0.attn.to_q": (8, 8)}, dotted("transformer."), Unrepresentable),
    "read": ({"double_blocks.0.img_attn.qkv": (24, 8), "final_layer.linear": (8, 8)}, flat, TargetNotFound),
}


@pytest.mark.parametrize("kind", PARTIAL)
def test_the_family_of_a_partial_file_is_asked_for_and_named_by_an_option(kind, tmp_path):
    modules, spell, error = PARTIAL[kind]
    save_file(pairs(modules, spell), tmp_path / "a.safetensors")
    with pytest.raises(error) as raised:
        ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "comfyui")
    assert "--family" in raised.value.cure
    assert "family=" in raised.value.cure
    names = {}
    for family in ("flux", "hunyuan_video"):
        adapter = ak.read(tmp_path / "a.safetensors", family=family)
        assert ak.write(adapter, tmp_path / f"{family}.safetensors", "comfyui") == []
        names[family] = {key.split(".")[3] for key in load_file(tmp_path / f"{family}.safetensors") if "img" in key}
    assert names == {"flux": {"img_attn"}, "hunyuan_video": {"img_attn_qkv"}}
    # The file that is written says which family it is of, so that it need not be named again.
    again = ak.read(tmp_path / "flux.safetensors")
    assert ak.write(again, tmp_path / "c.safetensors", "diffusers") == []
    assert "transformer.transformer_blocks.0.attn.to_q" in {
        str(target) for target in ak.read(tmp_path / "c.safetensors").updates
    }
    words = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "d.safetensors"), "--to", "comfyui"]
    assert CliRunner().invoke(adapterkit, [*words, "--family", "flux"]).exit_code == 0
    assert load_file(tmp_path / "d.safetensors").keys() == load_file(tmp_path / "flux.safetensors").keys()


def test_a_family_that_is_not_known_or_lacks_a_module_is_refused(tmp_path):
    save_file(pairs({"transformer_blocks.0.attn.to_q": (8, 8)}, dotted("transformer.")), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="unknown family 'fluxx'") as raised:
        ak.read(tmp_path / "a.safetensors", family="fluxx")
    assert "flux" in raised.value.cure
    with pytest.raises(UsageError, match="wan does not have this module") as raised:
        ak.read(tmp_path / "a.safetensors", family="wan")
    assert "attn.to_q" in str(raised.value)


def test_split_lohas_become_one_lora_of_the_fused_weight_where_that_is_allowed(tmp_path):
    rng, held = np.random.default_rng(0), {}
    for x in "qkv":
        stem = f"lycoris_transformer_blocks_0_attn_to_{x}"
        for name, shape in {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}.items():
            held[f"{stem}.hada_{name}"] = rng.normal(size=shape).astype("f4")
        held[f"{stem}.alpha"] = np.array(2.0, "f4")
    save_file(held, tmp_path / "a.safetensors")
    adapter = ak.read(tmp_path / "a.safetensors", family="flux")
    with pytest.raises(Unrepresentable, match="loha on parts of a fused weight"):
        ak.write(adapter, tmp_path / "b.safetensors", "comfyui")
    ak.write(adapter, tmp_path / "b.safetensors", "comfyui", on_loss="promote")
    got = ak.read(tmp_path / "b.safetensors", family="flux").delta("transformer.double_blocks.0.img_attn.qkv").numpy()
    stems = [f"lycoris_transformer_blocks_0_attn_to_{x}" for x in "qkv"]
    one, two = (
        [held[f"{stem}.hada_w{n}_a"].astype("f8") @ held[f"{stem}.hada_w{n}_b"] for stem in stems] for n in (1, 2)
    )
    wanted = np.concatenate([a * b for a, b in zip(one, two, strict=True)])
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()


# Modules that are another weight in the last block.

LAST = {
    "sd3": (
        "joint_blocks.{}.context_block.adaLN_modulation.1", {0: 6, 23: 2},
        {0: "norm1_context.linear", 23: "norm1_context.linear"},
    ),
    "mochi": ("blocks.{}.mod_y", {0: 2, 47: 0.5}, {0: "norm1_context.linear", 47: "norm1_context.linear_1"}),
}  # fmt: skip
"""Family -> the authors' name, outputs by inputs of the first and the last block, and diffusers' names."""


@pytest.mark.parametrize("name", LAST)
def test_the_last_block_s_modulation_is_told_by_its_shape(name, tmp_path):
    """SD 3's has its halves in another order in diffusers, Mochi's another name; those of other blocks are the same."""
    native, ratios, theirs = LAST[name]
    held = pairs({native.format(number): (int(16 * ratio), 16) for number, ratio in ratios.items()}, COMFY)
    save_file(held, tmp_path / "a.safetensors", {"modelspec.architecture": FAMILIES[name].facts.words[0]})
    adapter = ak.read(tmp_path / "a.safetensors")
    assert ak.write(adapter, tmp_path / "b.safetensors", "diffusers") == []
    got, wanted = changes(load_file(tmp_path / "b.safetensors")), {}
    for number, module in theirs.items():
        delta = adapter.delta(f"transformer.{native.format(number)}")
        if name == "sd3" and number == 23:
            delta = single_file_utils.swap_scale_shift(delta, dim=None)
        wanted[f"transformer.transformer_blocks.{number}.{module}"] = delta.numpy()
    assert got.keys() == wanted.keys()
    assert all(np.abs(got[key] - wanted[key]).max() < 1e-6 for key in wanted)
    back = ak.read(tmp_path / "b.safetensors", family=name)
    assert ak.write(back, tmp_path / "c.safetensors", "comfyui") == []
    again = ak.read(tmp_path / "c.safetensors", family=name)
    assert {str(target) for target in again.updates} == {str(target) for target in adapter.updates}
    assert all(np.allclose(again.delta(str(t)), adapter.delta(str(t)), atol=1e-6) for t in adapter.updates)
