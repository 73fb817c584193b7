"""Names of image models are proven or refused: a writer never passes a name into a naming that does not have it.

The keys are those of the real tools: of ai-toolkit, musubi-tuner, kohya and the models' authors, as the converters of
diffusers' `lora_conversion_utils.py` and ComfyUI's key maps have them. Shapes are small.
"""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Unrepresentable, UsageError


def file(path, modules, shapes=None, ends=("lora_A.weight", "lora_B.weight")):
    """A LoRA of these modules in a file, of weights [8, 8] but for those that `shapes` names."""
    tensors = {}
    for n, module in enumerate(modules):
        out, in_ = next((shape for end, shape in (shapes or {}).items() if module.endswith(end)), (8, 8))
        rng = np.random.default_rng(n)
        tensors[f"{module}.{ends[0]}"] = rng.normal(size=(2, in_)).astype("f4")
        tensors[f"{module}.{ends[1]}"] = rng.normal(size=(out, 2)).astype("f4")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def modules(prefix, *names):
    return [f"{prefix}{name}" for name in names]


REFUSED = {
    "Wan with a module of its own": modules("diffusion_model.", "blocks.0.self_attn.q", "blocks.0.audio_cross_attn.q"),
    "HunyuanVideo with another name": modules("diffusion_model.", "double_blocks.0.img_attn_qkv", "x.0"),
    "OmniGen 2": modules("diffusion_model.", "layers.0.attn.to_q", "ref_image_refiner.0.attn.to_q", "layers.0.x.1"),
    "FLUX of other words": modules("diffusion_model.", "double_blocks.0.img_attn.to_q", "double_blocks.0.img_mlp.gate"),
}  # fmt: skip
FLUX2 = modules(
    "diffusion_model.", "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.2",
    "double_blocks.0.txt_attn.proj",
)  # fmt: skip
FLUX_SHAPES = {"qkv": (24, 8), "img_mlp.0": (32, 8), "img_mlp.2": (8, 32), "linear1": (56, 8), "linear2": (8, 40)}
FLUX2_SHAPES = {"qkv": (24, 8), "img_mlp.0": (48, 8), "img_mlp.2": (8, 24), "linear1": (72, 8), "linear2": (8, 32)}


@pytest.mark.parametrize("family", REFUSED)
def test_names_that_nothing_translates_are_refused_and_said(family, tmp_path):
    path = file(tmp_path / "a.safetensors", REFUSED[family])
    out = tmp_path / "out.safetensors"
    with pytest.raises(Unrepresentable, match="diffusers") as raised:
        ak.write(ak.read(path), out, "diffusers")
    assert any(name.partition(".")[2] in str(raised.value) for name in REFUSED[family])
    assert "--to comfyui" in raised.value.cure
    assert not out.exists()
    assert ak.write(ak.read(path), out, "comfyui") == []
    assert {str(t) for t in ak.read(out).updates} == {str(t) for t in ak.read(path).updates}


@pytest.mark.parametrize(("shapes", "family"), [(FLUX_SHAPES, "flux"), (FLUX2_SHAPES, "flux2")])
def test_double_blocks_alone_are_told_by_their_shapes(shapes, family, tmp_path):
    adapter = ak.read(file(tmp_path / "a.safetensors", FLUX2, shapes))
    assert ak.write(adapter, tmp_path / "b.safetensors", "diffusers") == []
    name = {"flux": "ff.net.0.proj", "flux2": "ff.linear_in"}[family]
    assert f"transformer.transformer_blocks.0.{name}" in {str(t) for t in ak.read(tmp_path / "b.safetensors").updates}


def test_attention_alone_is_the_same_in_both(tmp_path):
    adapter = ak.read(file(tmp_path / "a.safetensors", [FLUX2[0], FLUX2[3]], FLUX2_SHAPES))
    assert ak.write(adapter, tmp_path / "b.safetensors", "diffusers") == []
    names = {str(target) for target in ak.read(tmp_path / "b.safetensors").updates}
    block = "transformer.transformer_blocks.0.attn"
    assert names == {f"{block}.{x}" for x in ("to_q", "to_k", "to_v", "to_add_out")}


QWEN = [
    *(f"transformer_blocks.0.attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out")),
    *(f"transformer_blocks.0.{x}_mlp.net.{part}" for x in ("img", "txt") for part in ("0.proj", "2")),
    "transformer_blocks.0.img_mod.1",
]


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_qwen_image_keeps_its_names_in_every_naming(prefix, to, tmp_path):
    adapter = ak.read(file(tmp_path / "a.safetensors", modules(prefix, *QWEN)))
    ak.write(adapter, tmp_path / "b.safetensors", to)
    assert {str(target) for target in ak.read(tmp_path / "b.safetensors", to).updates} == {
        f"transformer.{n}" for n in QWEN
    }


KEPT = {
    "CogVideoX": ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.norm1.linear"],
    "CogView 4": ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0"],
    "Mochi, whose last block differs": ["transformer_blocks.0.norm1_context.linear", "transformer_blocks.0.ff.net.2"],
    "Consis": ["transformer_blocks.0.attn1.to_q", "local_facial_extractor.mapping_0.1"],
}


@pytest.mark.parametrize("family", KEPT)
def test_diffusers_names_stay_in_diffusers_files_and_do_not_go_to_the_authors(family, tmp_path):
    names = modules("transformer.", *KEPT[family])
    adapter = ak.read(file(tmp_path / "a.safetensors", names))
    assert ak.write(adapter, tmp_path / "b.safetensors", "diffusers") == []
    assert {str(target) for target in ak.read(tmp_path / "b.safetensors").updates} == set(names)
    with pytest.raises(Unrepresentable):
        ak.write(adapter, tmp_path / "c.safetensors", "comfyui")


SAME = {
    "Z-Image": ["layers.0.attention.to_q", "layers.0.attention.to_out.0", "layers.0.feed_forward.w1"],
    "LTX": ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_k", "transformer_blocks.0.ff.net.2"],
    "HiDream": ["double_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.0.block.ff_i.shared_experts.w1"],
}


@pytest.mark.parametrize("family", SAME)
def test_authors_names_that_are_diffusers_names_go_through(family, tmp_path):
    adapter = ak.read(file(tmp_path / "a.safetensors", modules("diffusion_model.", *SAME[family])))
    assert ak.write(adapter, tmp_path / "b.safetensors", "diffusers") == []
    assert {str(t) for t in ak.read(tmp_path / "b.safetensors").updates} == {f"transformer.{n}" for n in SAME[family]}


def test_a_base_makes_its_names_known_to_kohya(tmp_path):
    names = modules("diffusion_model.", "blocks.0.self_attn.q", "blocks.0.ffn.up")
    save_file({f"{name}.weight": np.ones((8, 8), "f4") for name in names}, tmp_path / "base.safetensors")
    adapter = ak.read(file(tmp_path / "a.safetensors", names), base=tmp_path / "base.safetensors")
    with pytest.raises(Unrepresentable):
        ak.write(adapter.replace(recipe=()), tmp_path / "b.safetensors", "kohya")
    assert ak.write(adapter, tmp_path / "b.safetensors", "kohya", tmp_path / "base.safetensors") == []
    again = ak.read(tmp_path / "b.safetensors", base=tmp_path / "base.safetensors")
    assert {str(target) for target in again.updates} == set(names)


def test_control_loras_of_flux_become_what_diffusers_makes_of_them(tmp_path):
    """All 19 and 38 blocks, as its converter wants them; its rank-1 factors keep the file small."""
    from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers as theirs

    rng, held, h = np.random.default_rng(0), {}, 3072
    shapes = {
        **{f"{x}_in.{y}_layer": (h, h) for x in ("time", "vector", "guidance") for y in ("in", "out")},
        "img_in": (h, 128), "txt_in": (h, 4096), "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }  # fmt: skip
    for n in range(19):
        for x in ("img", "txt"):
            block = f"double_blocks.{n}.{x}"
            shapes |= {f"{block}_attn.qkv": (3 * h, h), f"{block}_attn.proj": (h, h), f"{block}_mod.lin": (6 * h, h)}
            shapes |= {f"{block}_mlp.0": (4 * h, h), f"{block}_mlp.2": (h, 4 * h)}
            held |= {f"{block}_attn.norm.{y}_norm.scale": (128,) for y in ("query", "key")}
    for n in range(38):
        block = f"single_blocks.{n}"
        shapes |= {
            f"{block}.linear1": (7 * h, h),
            f"{block}.linear2": (h, 5 * h),
            f"{block}.modulation.lin": (3 * h, h),
        }
        held |= {f"{block}.norm.{y}_norm.scale": (128,) for y in ("query", "key")}
    for name, (out, in_) in shapes.items():
        rank = 2 if "adaLN" in name else 1
        held |= {f"{name}.lora_A.weight": (rank, in_), f"{name}.lora_B.weight": (out, rank)}
        held |= {f"{name}.lora_B.bias": (out,)}
    tensors = {key: rng.integers(-8, 8, size=shape).astype("f2") for key, shape in held.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert ak.write(ak.read(tmp_path / "lora.safetensors"), tmp_path / "out.safetensors", "diffusers") == []
    ours = load_file(tmp_path / "out.safetensors")
    wanted = theirs({key: torch.from_numpy(value) for key, value in tensors.items()})
    assert ours.keys() == wanted.keys()
    # Its converter swaps the halves of A as well (diffusers issue 13998); A is what the rows of B have in common.
    assert all(
        np.array_equal(ours[key], value.numpy()) for key, value in wanted.items() if "norm_out.linear.lora_A" not in key
    )


# Arithmetic.

FLUX = {
    "native": (
        "diffusion_model.", ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin", "single_blocks.0.linear2"],
    ),
    "diffusers": (
        "transformer.",
        [
            *(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"), "transformer_blocks.0.norm1.linear",
            "single_transformer_blocks.0.proj_out",
        ],
    ),
}  # fmt: skip
OF_FLUX = FLUX_SHAPES | {"img_mod.lin": (48, 8), "norm1.linear": (48, 8), "0.proj_out": (8, 40)}


def of_flux(folder, naming):
    prefix, names = FLUX[naming]
    return file(folder / f"{naming}.safetensors", modules(prefix, *names), OF_FLUX)


def test_two_trainers_names_for_flux_are_brought_together(tmp_path):
    one, other = (ak.read(of_flux(tmp_path, naming)) for naming in FLUX)
    total = ak.ops.add([one, other])
    assert {str(target) for target in total.updates} == {f"transformer.{name}" for name in FLUX["diffusers"][1]}
    q = one.delta("transformer.double_blocks.0.img_attn.qkv").numpy()[:8]
    path = "transformer.transformer_blocks.0.attn.to_q"
    assert np.allclose(total.delta(path).numpy(), q + other.delta(path).numpy(), atol=1e-6)
    assert len(ak.ops.compare(one, other).targets) == len(total.updates)
    assert ak.ops.combine([one, other], method="ties").updates.keys() == total.updates.keys()
    assert ak.ops.stack([one, other]).updates.keys() == total.updates.keys()


@pytest.mark.parametrize("other", ["unet.down_blocks.0.attentions.0.proj_in", "unet.up_blocks.0.attentions.0.proj_in"])
def test_adapters_of_different_models_are_refused(other, tmp_path):
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    one = ak.read(
        file(tmp_path / "a.safetensors", [*modules(*FLUX["diffusers"][:1], *FLUX["diffusers"][1]), encoder], OF_FLUX)
    )
    two = ak.read(file(tmp_path / "b.safetensors", [other, encoder]))
    for work in (
        ak.ops.add,
        ak.ops.stack,
        lambda both: ak.ops.compare(*both),
        lambda both: ak.ops.combine(both, method="ties"),
    ):
        with pytest.raises(UsageError, match="for different models: flux or hunyuan_video, and"):
            work([one, two])
    with pytest.raises(UsageError, match="different models"):
        ak.ops.add([one, two], disjoint=True)


def test_stable_diffusion_1_and_xl_are_two_models(tmp_path):
    names = "unet.down_blocks.0.attentions.0.proj_in", "unet.up_blocks.0.attentions.0.proj_in"
    one, two = (ak.read(file(tmp_path / f"{n}.safetensors", [name])) for n, name in enumerate(names))
    with pytest.raises(UsageError, match="Stable Diffusion 1 or 2, and Stable Diffusion XL"):
        ak.ops.add([one, two], disjoint=True)
