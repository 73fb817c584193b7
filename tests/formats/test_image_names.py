"""Names of image models: every module in both namings and back, and flattened names undone where they are unique."""

import itertools

import pytest

from adapterkit.naming import image
from adapterkit.naming.image import Piece, fill_numbers, flatten, names_of

NUMBERS = ("3", "0", "1", "2")


def filled(pattern):
    return fill_numbers(pattern, NUMBERS)


@pytest.mark.parametrize("family", image.families(), ids=lambda family: family.name)
def test_every_module_goes_to_each_naming_and_back(family):
    for ours, theirs in itertools.permutations(family.namings, 2):
        for pattern in family.names(ours).patterns:
            name = filled(pattern)
            for piece in family.moves(name, ours, theirs):
                back = family.moves(piece.path, theirs, ours)
                assert not back or Piece(name, piece.there, piece.here) in back


@pytest.mark.parametrize("family", image.families(), ids=lambda family: family.name)
def test_pieces_make_up_the_whole_weight(family):
    for ours, theirs in itertools.permutations(family.namings, 2):
        for pattern in family.names(ours).patterns:
            runs = [piece.here for piece in family.moves(filled(pattern), ours, theirs)]
            assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])][: len(runs)]
            assert not runs or runs[-1].stop == runs[0].of
            assert len({run.of for run in runs}) < 2


@pytest.mark.parametrize("family", image.families(), ids=lambda family: family.name)
def test_every_flattened_name_stands_for_one_module(family):
    for names in map(family.names, family.namings):
        for pattern in names.patterns:
            assert names.unflattened(flatten(filled(pattern))) == [filled(pattern)]
            assert filled(pattern) in names


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_text_encoders_are_unflattened(kind):
    for pattern in image.encoders()[kind].patterns:
        assert image.encoders()[kind].unflattened(flatten(filled(pattern))) == [filled(pattern)]


def test_a_flattened_name_of_two_modules_is_told_as_two():
    names = names_of(["a.b_#.c", "a_b.#.c", "a.#"])
    assert sorted(names.unflattened("a_b_7_c")) == ["a.b_7.c", "a_b.7.c"]
    assert names.unflattened("a_7") == ["a.7"]
    assert names.unflattened("a_b_c") == []
    assert "a.7" in names
    assert "a.x" not in names


@pytest.mark.parametrize(
    ("ldm", "diffusers"),
    [
        (
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.8.0.emb_layers.1", "down_blocks.2.resnets.1.time_emb_proj"),
        ("middle_block.2.in_layers.2", "mid_block.resnets.1.conv1"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks.4.1.proj_in", "up_blocks.1.attentions.1.proj_in"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
    ],
)
def test_the_u_nets_blocks_are_counted_as_in_diffusers_conversion_script(ldm, diffusers):
    found = [family for family in image.families() if ldm in family.names("native")]
    unets = [family for family in found if family.component == "unet"]
    assert unets
    assert all([p.path for p in unet.moves(ldm, "native", "diffusers")] == [diffusers] for unet in unets)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("unet.x.y", "unet"),
        ("model.diffusion_model.input_blocks.1.0.in_layers.0", "unet"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "transformer"),
        ("down_blocks.1.attentions.0.proj_in", "unet"),
        ("joint_blocks.3.x_block.attn.qkv", "transformer"),
        ("text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("model.layers.0.self_attn.q_proj", None),
    ],
)
def test_the_part_of_a_pipeline_is_told_by_a_name(path, part):
    assert image.component_of(path) == part
