"""Updates that a base takes in parts or in stacks: merged weights against float64 formulas, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from adapterkit import merge, verify
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import from_numpy
from adapterkit.merging.companions import REPORT
from adapterkit.methods import METHODS
from adapterkit.naming.binding import bind

LoRA, DoRA, HRA = (METHODS[name] for name in ("lora", "dora", "hra"))
E, F, H = 3, 4, 5
RNG = np.random.default_rng(3)
MIXTRAL = {"model_type": "mixtral"}
LIVE, STORED = "model.layers.0.mlp.experts.", "model.layers.0.block_sparse_moe.experts."
PARTS = {"w1": (F, H), "w3": (F, H), "w2": (H, F)}


def normal(*shape):
    return RNG.normal(size=shape).astype("f4")


def lora(out, into, rank=2, lead=(), **fields):
    return LoRA(A=from_numpy(normal(*lead, rank, into)), B=from_numpy(normal(*lead, out, rank)), **fields)


def change(update):
    return update.scaling * update.B.numpy().astype("f8") @ update.A.numpy().astype("f8")


def per_expert():
    return {f"{STORED}{e}.{name}.weight": normal(*shape) for e in range(E) for name, shape in PARTS.items()}


def fused():
    return {f"{LIVE}gate_up_proj": normal(E, 2 * F, H), f"{LIVE}down_proj": normal(E, H, F)}


def merged(given, tensors, base, tmp_path, **options):
    """The tensors that a merge writes, in float32; verified too."""
    checkpoint = base(tensors, MIXTRAL)
    merge(checkpoint, given, tmp_path / "out", **options)
    assert verify(tmp_path / "out", checkpoint, given, **options).ok
    return {name: tensor.numpy() for name, tensor in open_checkpoint(tmp_path / "out").tensors.items()}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_stack_is_merged_into_a_base_of_one_tensor_an_expert(base, tmp_path):
    both, down, tensors = lora(2 * F, H, lead=(E,), scaling=0.5), lora(H, F, lead=(E,)), per_expert()
    given = Adapter(
        {Target(f"{LIVE}gate_up_proj", "e out *in"): (both,), Target(f"{LIVE}down_proj", "e out *in"): (down,)}
    )
    wanted = {name: value.astype("f8") for name, value in tensors.items()}
    for e in range(E):
        wanted[f"{STORED}{e}.w1.weight"] += change(both)[e, :F]
        wanted[f"{STORED}{e}.w3.weight"] += change(both)[e, F:]
        wanted[f"{STORED}{e}.w2.weight"] += change(down)[e]
    assert_close(merged(given, tensors, base, tmp_path), wanted)


def test_experts_are_merged_into_a_base_that_stacks_them_whatever_their_ranks_and_scalings(base, tmp_path):
    """Expert 1 has no gate, expert 2 another rank and scaling: zeros and factors, nothing dense."""
    updates = {
        f"{STORED}0.w1": lora(F, H), f"{STORED}2.w1": lora(F, H, rank=1, scaling=0.25),
        **{f"{STORED}{e}.w3": lora(F, H, scaling=2.0) for e in range(E)},
        **{f"{STORED}{e}.w2": lora(H, F, rank=e + 1) for e in range(E)},
    }  # fmt: skip
    tensors = fused()
    wanted = {name: value.astype("f8") for name, value in tensors.items()}
    for path, update in updates.items():
        e, name = path.split(".")[-2:]
        rows = {"w1": slice(0, F), "w3": slice(F, 2 * F), "w2": slice(None)}[name]
        wanted[LIVE + ("down_proj" if name == "w2" else "gate_up_proj")][int(e), rows] += change(update)
    given = Adapter({Target(path): (update,) for path, update in updates.items()})
    assert_close(merged(given, tensors, base, tmp_path), wanted)
    stacks = bind(given, tmp_path / "base").adapter.updates
    assert all(update.A.shape[1] <= 3 for updates in stacks.values() for update in updates)


def test_dora_of_experts_goes_into_a_stack_and_out_of_it(base, tmp_path):
    def dora(out, into, lead=()):
        magnitude = from_numpy(np.abs(normal(*lead, out)) + 1)
        return DoRA(A=from_numpy(normal(*lead, 2, into)), B=from_numpy(normal(*lead, out, 2)), magnitude=magnitude)

    def applied(W, update, e):
        V = W.astype("f8") + update.B.numpy()[e].astype("f8") @ update.A.numpy()[e].astype("f8")
        return update.magnitude.numpy()[e][:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)

    both, tensors = dora(2 * F, H, (E,)), per_expert()
    given = Adapter({Target(f"{LIVE}gate_up_proj", "e out *in"): (both,)})
    wanted = dict(tensors)
    for e in range(E):
        W = np.concatenate([tensors[f"{STORED}{e}.{name}.weight"] for name in ("w1", "w3")])
        wanted[f"{STORED}{e}.w1.weight"], wanted[f"{STORED}{e}.w3.weight"] = np.split(applied(W, both, e), 2)
    assert_close(merged(given, tensors, base, tmp_path), wanted)


def test_a_formula_of_all_outputs_together_is_not_cut(base):
    update = HRA(u=from_numpy(normal(E, H, 2)))
    with pytest.raises(NotMergeable, match="changes all outputs of a weight together") as raised:
        bind(Adapter({Target(f"{LIVE}gate_up_proj", "e out *in"): (update,)}), base(per_expert(), MIXTRAL))
    assert raised.value.where == f"{LIVE}gate_up_proj"


def test_another_number_of_experts_is_refused(base):
    opened = base(per_expert(), MIXTRAL)
    with pytest.raises(ShapeMismatch, match="index 2, but the update has 2 experts"):
        bind(Adapter({Target(f"{LIVE}down_proj", "e out *in"): (lora(H, F, lead=(2,)),)}), opened)


def test_an_expert_that_the_stack_does_not_have_is_refused(base):
    with pytest.raises(ShapeMismatch, match=r"updates for 4 experts; the base's tensor has shape \[3, 8, 5\]"):
        bind(Adapter({Target(f"{STORED}3.w1"): (lora(F, H),)}), base(fused(), MIXTRAL))


def test_a_stack_whose_parts_have_another_shape_is_refused(base):
    with pytest.raises(ShapeMismatch, match=r"has 5 outputs; the base's shape is \[3, 8, 5\]"):
        bind(Adapter({Target(f"{STORED}1.w1"): (lora(F + 1, H),)}), base(fused(), MIXTRAL))


def paths(bound):
    return [site.target.path for site in bound.sites]


def test_each_part_of_a_model_has_a_prefix_of_its_own(base):
    stored = {
        "language.layers.0.q.weight": normal(3, 4), "lm_head.weight": normal(6, 4),
        "tower.blocks.0.q.weight": normal(3, 4), "tower.merger.weight": normal(2, 4),
    }  # fmt: skip
    asked = ["model.text.layers.0.q", "lm_head", "model.tower.blocks.0.q", "model.tower.merger"]
    given = Adapter({Target(p): (lora(o, 4),) for p, o in zip(asked, (3, 6, 3, 2), strict=True)})
    bound = bind(given, base(stored))
    assert paths(bound) == [name.removesuffix(".weight") for name in stored]
    assert [str(rule) for rule in bound.rules] == [
        "exact", "prefix model.text. -> language.", "prefix model. -> (none)",
    ]  # fmt: skip
    assert [rule.targets for rule in bound.rules] == [1, 1, 2]


def test_shapes_tell_which_of_two_towers_is_meant_and_nothing_else_does(base):
    stored = {"text.layers.0.q.weight": normal(3, 4), "vision.layers.0.q.weight": normal(3, 5)}
    opened = base(stored)
    assert paths(bind(Adapter({Target("model.layers.0.q"): (lora(3, 5),)}), opened)) == ["vision.layers.0.q"]
    both = {"text.layers.0.k.weight": normal(3, 4), "vision.layers.0.k.weight": normal(3, 4)}
    other = Adapter({Target("model.layers.0.k"): (lora(3, 4),)})
    with pytest.raises(
        TargetNotFound, match=r"the name can mean several modules of the base: text\.layers\.0\.k or vision\."
    ) as raised:
        bind(other, both_of(both, opened))
    assert "--rename 'model.layers.0.k=text.layers.0.k' (rename=)" in raised.value.cure
    bound = bind(other, both_of(both, opened), rename=["model=vision"])
    assert paths(bound) == ["vision.layers.0.k"]
    assert str(bound.rules[0]) == "user model=vision"


def both_of(tensors, like):
    """The same base with other tensors."""
    return replace(like, tensors={name: from_numpy(value) for name, value in tensors.items()})


def test_two_targets_do_not_share_a_place(base):
    """A speech decoder has no place for the encoder of a text model, though the layers have the same shapes."""
    opened = base({"model.decoder.layers.0.q.weight": normal(3, 4)})
    given = Adapter({Target(f"model.{part}.layers.0.q"): (lora(3, 4),) for part in ("encoder", "decoder")})
    with pytest.raises(TargetNotFound, match=r"1 of 2 targets are not in the base: model\.encoder\.layers\.0\.q"):
        bind(given, opened)


@pytest.mark.parametrize(
    "asked",
    [
        "_orig_mod.model.layers.0.q", "model.layers.0._checkpoint_wrapped_module.q", "module.model.layers.0.q",
        "model._fsdp_wrapped_module.layers.0._fsdp_wrapped_module._orig_mod.q", "model.layers.0.q.default",
        "_forward_module.module.model._orig_mod.layers.0.q", "_orig_mod.base.model.layers.0.q",
    ],
)  # fmt: skip
def test_what_training_wraps_around_modules_is_taken_off(asked, base):
    opened = base({"model.layers.0.q.weight": normal(3, 4)})
    assert paths(bind(Adapter({Target(asked): (lora(3, 4),)}), opened)) == ["model.layers.0.q"]


def test_a_word_of_the_models_own_is_no_wrapper(base):
    opened = base({"module.layers.0.q.weight": normal(3, 4), "layers.0.q.weight": normal(3, 4)})
    assert paths(bind(Adapter({Target("module.layers.0.q"): (lora(3, 4),)}), opened)) == ["module.layers.0.q"]


@pytest.mark.parametrize(
    ("rename", "asked", "found"),
    [
        (["old=new"], "old.layers.0.q", "new.layers.0.q"),
        (["old.layers.{n}=new.layers.{n}", "old=never"], "old.layers.0.q", "new.layers.0.q"),
        (["old.{n}.{m}=new.layers.{m}"], "old.7.0.q", "new.layers.0.q"),
        (["=new"], "layers.0.q", "new.layers.0.q"),
        (["a.b="], "a.b.new.layers.0.q", "new.layers.0.q"),
        (["old.layers.{n}.query=new.layers.{n}.q"], "old.layers.0.query", "new.layers.0.q"),
    ],
)
def test_a_rule_of_the_user_comes_first(rename, asked, found, base):
    opened = base({"new.layers.0.q.weight": normal(3, 4)})
    assert paths(bind(Adapter({Target(asked): (lora(3, 4),)}), opened, rename=rename)) == [found]


@pytest.mark.parametrize("rule", ["old", "=", "a=b=c", "a={n}", "a b=c", "a..b=c", "a{n}=b"])
def test_what_is_no_rule_is_refused_with_the_form(rule, base):
    opened = base({"q.weight": normal(3, 4)})
    with pytest.raises(UsageError) as raised:
        bind(Adapter({Target("q"): (lora(3, 4),)}), opened, rename=[rule])
    assert "--rename 'FROM=TO'" in raised.value.cure


def test_a_rule_that_matches_nothing_is_refused(base):
    with pytest.raises(TargetNotFound, match="the rule 'x=y' matches no target"):
        bind(Adapter({Target("q"): (lora(3, 4),)}), base({"q.weight": normal(3, 4)}), rename=["x=y"])


def test_the_report_and_the_lineage_say_which_rules_were_used(base, tmp_path):
    both = lora(2 * F, H, lead=(E,))
    given = Adapter({Target(f"{LIVE}gate_up_proj", "e out *in"): (both,)})
    report = merge(base(per_expert(), MIXTRAL), given, tmp_path / "out")
    used = report.record()["adapters"][0]["names"]
    assert used == [{"rule": "architecture mixtral: transformers5 -> hub", "targets": 1}]
    assert '"architecture mixtral: transformers5 -> hub"' in (tmp_path / "out" / REPORT).read_text()


def test_an_adapter_of_another_family_is_refused(base):
    with pytest.raises(TargetNotFound):
        bind(Adapter({Target("transformer.h.0.attn.c_attn"): (lora(12, 4),)}), base(per_expert(), MIXTRAL))


LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}


def permuted(rows, heads):
    """The order of llama.cpp's converter: `LlamaModel.permute` of convert_hf_to_gguf.py, for numbers of rows."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(("end", "own", "heads"), [("q", "q_proj", 4), ("k", "k_proj", 2), ("v", "v_proj", None)])
def test_rows_of_another_naming_come_in_the_order_of_the_base(end, own, heads, base):
    """An adapter in the names of a GGUF file, whose queries and keys llama.cpp stores in another order of rows."""
    B = normal(16 if end == "q" else 8, 2)
    there = B if heads is None else permuted(B, heads)
    update = LoRA(A=from_numpy(normal(2, 16)), B=from_numpy(there))
    opened = base({f"model.layers.0.self_attn.{own}.weight": normal(len(B), 16)}, LLAMA)
    (site,) = bind(Adapter({Target(f"blk.0.attn_{end}"): (update,)}), opened).sites
    assert site.target.path == f"model.layers.0.self_attn.{own}"
    np.testing.assert_array_equal(site.updates[0].B.numpy(), B)


def test_an_order_of_rows_needs_the_heads_of_the_base(base):
    opened = base({"model.layers.0.self_attn.q_proj.weight": normal(16, 16)}, {"model_type": "llama"})
    update = LoRA(A=from_numpy(normal(2, 16)), B=from_numpy(normal(16, 2)))
    with pytest.raises(UsageError, match="num_attention_heads"):
        bind(Adapter({Target("blk.0.attn_q"): (update,)}), opened)


@pytest.fixture
def unequal(tmp_path, monkeypatch):
    """A family with queries, keys and values in one tensor in one naming, and apart in the other."""
    from adapterkit.naming import architectures

    places = [f'"l.{{n}}.{x[0]}" = {{ fused = {{ name = "l.{{n}}.qkv", qkv = "{x}" }} }}' for x in architectures.QKV]
    text = 'format = 1\nfamily = "zebra"\nmodel_types = ["zebra"]\nkeyed = ["apart"]\n[weights]\n'
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "zebra.toml").write_text(text + "\n".join(places))
    monkeypatch.setattr(architectures, "folder", lambda: tmp_path / "files")
    architectures._of_type.cache_clear()
    yield {**LLAMA, "model_type": "zebra"}
    architectures._of_type.cache_clear()


def test_a_fused_projection_is_divided_by_the_heads_of_the_base(unequal, base, tmp_path):
    """Four query heads of 4 rows and two of keys and values: 16, 8 and 8 rows."""
    update, rows = lora(32, 16), {"q": (0, 16), "k": (16, 24), "v": (24, 32)}
    apart = {f"l.0.{x}.weight": normal(stop - start, 16) for x, (start, stop) in rows.items()}
    opened = base(apart, unequal)
    merge(opened, Adapter({Target("l.0.qkv"): (update,)}), tmp_path / "out")
    for x, (start, stop) in rows.items():
        found = open_checkpoint(tmp_path / "out").tensors[f"l.0.{x}.weight"].numpy()
        np.testing.assert_allclose(found, apart[f"l.0.{x}.weight"] + change(update)[start:stop], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "rows"), [("q", (0, 16)), ("k", (16, 24)), ("v", (24, 32))])
def test_a_part_goes_into_its_rows_of_a_fused_projection(name, rows, unequal, base):
    opened = base({"l.0.qkv.weight": normal(32, 16)}, unequal)
    (site,) = bind(Adapter({Target(f"l.0.{name}"): (lora(rows[1] - rows[0], 16),)}), opened).sites
    assert (site.target.path, site.target.rows) == ("l.0.qkv", rows)
    with pytest.raises(ShapeMismatch):
        bind(Adapter({Target(f"l.0.{name}"): (lora(12, 16),)}), opened)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_of_a_fused_projection_that_are_one_part_go_where_the_part_is(name, unequal, base):
    """What `Adapter.bind` makes of a part is taken back by a model that has the parts apart."""
    rows = {"q": (0, 16), "k": (16, 24), "v": (24, 32)}
    given = Adapter({Target("l.0.qkv", rows=rows[name]): (lora(rows[name][1] - rows[name][0], 16),)})
    opened = base({f"l.0.{x}.weight": normal(stop - start, 16) for x, (start, stop) in rows.items()}, unequal)
    (site,) = bind(given, opened).sites
    assert (site.target.path, site.target.rows) == (f"l.0.{name}", None)
    with pytest.raises(Unsupported, match="not exactly one of the parts"):
        bind(Adapter({Target("l.0.qkv", rows=(4, 12)): (lora(8, 16),)}), opened)


@pytest.mark.parametrize(("part", "own"), [(0, "q"), (1, "k"), (2, "v")])
def test_a_fused_projection_of_megatron_is_taken_apart_group_by_group(part, own, base):
    """Megatron reshapes to [groups, queries of a group + 2, rows of a head]: the last two of each group are k and v."""
    update = lora(32, 16)
    sizes = {"q": 16, "k": 8, "v": 8}
    opened = base({f"model.layers.0.self_attn.{x}_proj.weight": normal(rows, 16) for x, rows in sizes.items()}, LLAMA)
    sites = bind(Adapter({Target("decoder.layers.0.self_attention.linear_qkv"): (update,)}), opened).sites
    groups = update.B.numpy().reshape(2, 4, 4, -1)
    wanted = (groups[:, :2], groups[:, 2:3], groups[:, 3:])[part].reshape(-1, 2)
    (site,) = (site for site in sites if site.target.path.endswith(f"{own}_proj"))
    np.testing.assert_array_equal(site.updates[0].B.numpy(), wanted)


def test_names_and_orders_of_torchtune_and_litgpt_are_known_to_the_resolver(base):
    q, qkv = normal(16, 2), lora(32, 16)
    sizes = {"q": 16, "k": 8, "v": 8}
    opened = base({f"model.layers.0.self_attn.{x}_proj.weight": normal(rows, 16) for x, rows in sizes.items()}, LLAMA)
    turned = LoRA(A=from_numpy(normal(2, 16)), B=from_numpy(permuted(q, 4)))
    (site,) = bind(Adapter({Target("layers.0.attn.q_proj"): (turned,)}), opened).sites
    np.testing.assert_array_equal(site.updates[0].B.numpy(), q)
    sites = bind(Adapter({Target("transformer.h.0.attn.qkv"): (qkv,)}), opened).sites
    parts = [site.updates[0].B.numpy() for site in sites]
    assert [site.target.path.rpartition(".")[2] for site in sites] == ["q_proj", "k_proj", "v_proj"]
    np.testing.assert_array_equal(np.concatenate(parts), qkv.B.numpy())
