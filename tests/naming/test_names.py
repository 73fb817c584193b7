"""Tables of names: one to one, both ways, and against what gguf-py knows."""

import numpy as np
import pytest

from adapterkit.errors import Malformed, ShapeMismatch, TargetNotFound, UsageError
from adapterkit.formats import torchtune
from adapterkit.formats.tinker import ExpertNames
from adapterkit.naming import tool_names
from adapterkit.naming.architectures import LINEAR, SPLIT, WeightPlace, folder, load
from adapterkit.naming.heads import Heads, by_group, heads_of, rope_pairs, undone
from adapterkit.naming.tool_names import NameTable, TableNames

TABLES = {"litgpt": tool_names.litgpt_table().pairs, "torchtune": torchtune.table().pairs}


@pytest.mark.parametrize("pairs", TABLES.values(), ids=TABLES.keys())
def test_a_table_is_undone_by_its_other_way(pairs):
    table = NameTable(pairs)
    for own, foreign in pairs.items():
        for number in (0, 7, 31):
            mine, theirs = (template.replace("{n}", str(number)) for template in (own, foreign))
            assert table.there(mine) == theirs
            assert table.back(theirs) == mine
    assert table.there("model.layers.x.self_attn.q_proj") is None
    assert table.back("blk.00.attn_q") is None


@pytest.mark.parametrize("pairs", [tool_names.EXPERTS])
def test_a_stack_is_undone_by_its_experts(pairs):
    experts = ExpertNames(pairs)
    for own, stack in pairs.items():
        name = stack.replace("{n}", "3")
        found = experts.back(name, 4)
        assert found == [own.replace("{n}", "3").replace("{e}", str(index)) for index in range(4)]
        assert [experts.there(each) for each in found] == [(name, index) for index in range(4)]
    assert experts.there("model.layers.0.self_attn.q_proj") is None
    assert experts.back("model.layers.0.self_attn.q_proj", 4) is None


GGUF = [file for file in sorted(folder().glob("*.toml")) if load(file).record.gguf]


@pytest.mark.parametrize("file", GGUF, ids=lambda file: file.stem)
def test_gguf_py_has_the_same_names(file):
    """Every place in a GGUF file is a tensor that gguf-py knows in one of the family's architectures."""
    import gguf

    family, numbers = load(file), {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    if not numbers.keys() >= {*family.record.gguf}:
        return  # Younger than this gguf-py.
    known = {gguf.TENSOR_NAMES[tensor] for name in family.record.gguf for tensor in gguf.MODEL_TENSORS[numbers[name]]}
    for weight in family.record.weights:
        place = family.place(weight, "gguf")
        names = [] if place is None else [place.name, *([place.beside] if place.beside else [])]
        assert known >= {each.replace("{n}", "{bid}") for each in names}, weight


def test_most_families_of_llama_cpp_have_their_places():
    assert len(GGUF) >= 60
    assert {name for file in GGUF for name in load(file).record.gguf} >= {"llama", "gpt-oss", "qwen3moe", "falcon"}
    rows = {
        p.rows for f in GGUF for w in load(f).record.weights if isinstance(p := load(f).place(w, "gguf"), WeightPlace)
    }
    assert rows == {None, "rope", "qkv", "rotary", *LINEAR, *SPLIT}


def test_a_base_that_is_walked_gives_its_own_names():
    table = NameTable({"model.layers.{n}.mlp.up_proj": "blk.{n}.ffn_up"})
    names = TableNames(table, ["model.language_model.layers.1.mlp.up_proj"])
    assert names.back("blk.1.ffn_up") == "model.language_model.layers.1.mlp.up_proj"
    with pytest.raises(TargetNotFound, match="the base has none"):
        names.back("blk.0.ffn_up")
    twice = TableNames(table, ["model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj"])
    with pytest.raises(TargetNotFound, match=r"the base has model\.layers.*, language_model"):
        twice.back("blk.1.ffn_up")
    with pytest.raises(TargetNotFound):
        TableNames(table).back("blk.1.ffn_gate")


def test_rope_pairs_put_the_two_rows_side_by_side():
    assert rope_pairs(8, 2, "q").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rope_pairs(8, 2, "q")[undone(rope_pairs(8, 2, "q"))].tolist() == list(range(8))
    with pytest.raises(ShapeMismatch, match="9 rows"):
        rope_pairs(9, 2, "q")


def test_groups_have_their_queries_their_key_and_their_value():
    order = by_group(Heads(query=4, kv=2, dim=1))
    assert order.tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert np.array_equal(np.arange(8)[order][undone(order)], np.arange(8))


def test_heads_come_from_the_config_of_the_language_model():
    config = {"num_attention_heads": 8, "hidden_size": 32}
    assert heads_of(config, "q") == Heads(8, 8, 4)
    assert heads_of({"text_config": {**config, "num_key_value_heads": 2, "head_dim": 16}}, "q") == Heads(8, 2, 16)
    for wrong in (None, {}, {"num_attention_heads": 8}):
        with pytest.raises(UsageError):
            heads_of(wrong, "q")
    for value in (True, -1, 0, "8", 1.5, 1 << 40):
        with pytest.raises(Malformed):
            heads_of({**config, "num_attention_heads": value}, "q")
