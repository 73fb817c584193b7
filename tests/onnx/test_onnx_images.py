"""Exports of language models that read images: they write what transformers and PEFT do, and are called as they are."""

import numpy as np
import onnx_graphs as graphs
import peft
import pytest
import torch
import transformers
from transformers import vision_utils

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, Unsupported, UsageError
from adapterkit.onnx import image_grids, vision_language

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|peft|torch)")

MARK, START, END, VIDEO = 60, 61, 62, 59
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128, **ENDS,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 0]}}
TOKENS = {
    "image_token_id": MARK, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
PATCHES = {
    "depth": 2, "num_heads": 4, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2,
}  # fmt: skip


def qwen3_vl():
    """One layer of each part, as the time of an export grows with them."""
    tower = {**PATCHES, "depth": 1, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, **MROPE, "num_hidden_layers": 1}, **TOKENS,
        vision_config={**tower, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen2_5_vl():
    """Windows of two by two squares of patches, in the first layer of the tower."""
    tower = {**PATCHES, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "window_size": 8}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, **MROPE}, vision_config={**tower, "fullatt_block_indexes": [1]}, **TOKENS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl():
    tower = {**PATCHES, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, **MROPE}, vision_config=tower, **TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def gemma3():
    """Without a tied head, which would repeat the last token whatever the layers compute."""
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=TOWER, image_token_id=MARK, mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma():
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"}, vision_config={**TOWER, "projection_dim": 16},
        image_token_id=MARK, projection_dim=16, hidden_size=16,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


def idefics3():
    config = transformers.Idefics3Config(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**TOWER, "image_size": 8, "patch_size": 2},
        image_token_id=MARK, scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config)


def smolvlm():
    config = transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**TOWER, "image_size": 8, "patch_size": 2},
        image_token_id=MARK, scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config)


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=MARK, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


KINDS = [qwen3_vl, qwen2_5_vl, qwen2_vl, gemma3, paligemma, idefics3, smolvlm, llava]


def made(kind):
    """A model with large random weights."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter)
    model.generation_config.eos_token_id = None
    return model


def texts(kind):
    """The inputs of two texts with an image each, as a processor makes them: the first one is padded on the left."""
    rng = torch.Generator().manual_seed(1)
    more = {}
    if kind in (qwen3_vl, qwen2_5_vl, qwen2_vl):
        grid = torch.tensor([[1, 4, 6], [1, 6, 8]])
        more = {"pixel_values": torch.randn(int(grid.prod(1).sum()), 24, generator=rng), "image_grid_thw": grid}
        counts = (grid.prod(1) // 4).tolist()
    elif kind in (idefics3, smolvlm):
        mask = torch.ones(2, 1, 8, 8, dtype=torch.int64)
        mask[1, :, 6:] = 0
        more = {"pixel_values": torch.randn(2, 1, 3, 8, 8, generator=rng), "pixel_attention_mask": mask}
        counts = [4, 4]
    else:
        more = {"pixel_values": torch.randn(2, 3, 8, 8, generator=rng)}
        counts = [4, 4]
    rows = [[7, START] + [MARK] * counts[0] + [END, 13], [17, 8, 23, START] + [MARK] * counts[1] + [END, 31, 3]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    types = (ids == MARK).long()
    if kind is gemma3:
        more["token_type_ids"] = types
    if kind is paligemma:  # The whole prompt is the prefix.
        more["token_type_ids"] = torch.zeros_like(ids)
    return {"input_ids": ids, "attention_mask": mask, **more}, types


def theirs(model, inputs, types, count=5):
    with torch.no_grad():
        more = {"mm_token_type_ids": types} if "image_grid_thw" in inputs else {}
        return model.generate(**inputs, **more, max_new_tokens=count, min_new_tokens=count, do_sample=False).numpy()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind is qwen3_vl else pytest.mark.long) for kind in KINDS]
)
def test_a_folder_writes_what_peft_writes(kind, tmp_path):
    model = made(kind)
    model.save_pretrained(tmp_path / "base")
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    configs = {
        "lora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=sorted(names & {"q_proj", "qkv", "fc1"})),
        "dora": peft.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj"], use_dora=True),
        "ia3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    for name, config in configs.items():
        changed = peft.get_peft_model(type(model).from_pretrained(tmp_path / "base"), config)
        with torch.no_grad():
            for key, parameter in changed.named_parameters():
                if "lora_" in key or "ia3" in key:
                    parameter.copy_(0.4 * torch.randn_like(parameter) + ("ia3" in key))
        changed.save_pretrained(tmp_path / name)
    ak.onnx.export_pretrained(
        tmp_path / "base", tmp_path / "out", adapter=[tmp_path / name for name in configs], mode="slots"
    )
    session = ak.onnx.FolderSession(tmp_path / "out")
    inputs, types = texts(kind)
    feeds = {name: array.numpy() for name, array in inputs.items()}
    written = set()
    for name in (*configs, None):
        bare = type(model).from_pretrained(tmp_path / "base").eval()
        wanted = theirs(bare if name is None else peft.PeftModel.from_pretrained(bare, tmp_path / name), inputs, types)
        if name is not None:
            session.load(name)
        got = session.generate(feeds, max_new_tokens=5, adapter=name, end=())
        np.testing.assert_array_equal(got, wanted)
        written.add(str(wanted))
    assert len(written) > 2
    if kind is qwen3_vl:
        refused(session, feeds)
        graphs.with_int32(tmp_path / "out" / "embed_tokens.onnx")
        got = ak.onnx.FolderSession(tmp_path / "out").generate(feeds, max_new_tokens=5, end=())
        np.testing.assert_array_equal(got, wanted)
    # A text without an image.
    ids = torch.tensor([[5, 9, 33]])
    types = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in inputs else {}
    alone = theirs(bare, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}, None)
    got = session.generate(
        {"input_ids": ids.numpy(), **{k: v.numpy() for k, v in types.items()}}, max_new_tokens=5, end=()
    )
    np.testing.assert_array_equal(got, alone)


def refused(session, inputs):
    """Inputs that do not fit each other, or the graphs."""
    with pytest.raises(UsageError, match="no input 'pixel_value'"):
        session.generate({**inputs, "pixel_value": inputs["pixel_values"]})
    with pytest.raises(UsageError, match="the input input_ids is missing"):
        session.generate({"pixel_values": inputs["pixel_values"]})
    with pytest.raises(UsageError, match="the input image_grid_thw is missing"):
        session.generate({name: array for name, array in inputs.items() if name != "image_grid_thw"})
    with pytest.raises(ShapeMismatch, match="the texts have 0 image tokens, but the images have 18 features"):
        session.generate({**inputs, "input_ids": np.minimum(inputs["input_ids"], MARK - 1)})
    wrong = inputs["image_grid_thw"][::-1]  # As many patches, but of the other text's image.
    with pytest.raises(ShapeMismatch, match="6 successive image tokens do not fit an image of 1 x 6 x 8 patches"):
        session.generate({**inputs, "image_grid_thw": wrong.copy()})


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_compute_what_the_model_does(kind):
    """Without an export: `vision_language` itself compares logits, and here the first step is compared once more."""
    model = made(kind)
    parts = vision_language.vision_language(model, "base")
    assert [*parts] == ["vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"]
    types = [name for name in parts["decoder_model_merged.onnx"].inputs if "type" in name]
    assert types == (["token_type_ids"] if kind in (gemma3, paligemma) else [])


@pytest.mark.parametrize("grids", [[[1, 4, 6]], [[1, 6, 10], [1, 2, 2], [1, 14, 4]], [[3, 4, 4], [1, 2, 8]]], ids=str)
def test_arguments_of_patches_are_those_that_transformers_computes(grids):
    grid = torch.tensor(grids)
    tower, count = made(qwen2_5_vl).model.visual, int(grid.prod(1).sum())
    given = image_grids.arguments_of(tower, grid, torch.zeros(count, 24))
    torch.testing.assert_close(given["position_ids"], vision_utils.get_vision_position_ids(grid, 2))
    order, edges = vision_utils.get_vision_window_index(grid, 2, 8, 2)
    torch.testing.assert_close(given["window_index"], order)
    for mine, theirs_ in (("cu_seqlens", vision_utils.get_vision_cu_seqlens(grid)), ("cu_window_seqlens", edges)):
        # Mine number the segment of each patch; theirs are the edges of the segments.
        numbers, first = given[mine], theirs_[:-1].long()
        assert numbers.unique().numel() == len(first)
        lengths = theirs_.diff().long()
        torch.testing.assert_close(numbers, numbers[first].repeat_interleave(lengths))
    tower = made(qwen3_vl).model.visual
    given = image_grids.arguments_of(tower, grid, torch.zeros(count, 24))
    wanted = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, tower.num_grid_per_side, align_corners=True, spatial_merge_size=2
    )
    torch.testing.assert_close((given["interp_indices"], given["interp_weights"]), wanted)


class TestRefusals:
    def test_a_model_that_uses_image_tokens_elsewhere(self):
        class Counting(transformers.LlavaForConditionalGeneration):
            def forward(self, input_ids=None, pixel_values=None, **given):
                told = super().forward(input_ids=input_ids, pixel_values=pixel_values, **given)
                count = 0 if input_ids is None else (input_ids == MARK).sum()
                told.logits = told.logits + count * torch.arange(64)
                return told

        model = Counting(llava().config).eval()
        with pytest.raises(Unsupported, match="the logits differ by"):
            vision_language.vision_language(model, "base")

    def test_images_that_need_other_arguments(self, tmp_path):
        config = transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**TOWER, projection_dim=16),
            text_config=transformers.LlamaConfig(**TEXT), image_token_index=MARK, image_grid_pinpoints=[[8, 8]],
        )  # fmt: skip
        transformers.LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path / "base")
        with pytest.raises(Unsupported, match="the features of its images depend on image_sizes"):
            ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out")
        assert not (tmp_path / "out").exists()
