import numpy as np
import pytest
import torch

from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Malformed, NotMergeable, ShapeMismatch, TargetNotFound, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming.binding import bind, delta, view, view_shape

LoRA, DoRA, IA3, Dense, Rows = (METHODS[name] for name in ("lora", "dora", "ia3", "dense", "rows"))
Replacement = METHODS["replacement"]
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)


def lora(out, *ins, r=2, lead=(), **fields):
    return LoRA(A=from_numpy(normal(*lead, r, *ins)), B=from_numpy(normal(*lead, out, r)), **fields)


def adapter(**updates):
    """An adapter by paths, with `__` for the dots."""
    return Adapter({Target(path.replace("__", ".")): (update,) for path, update in updates.items()})


def product(update):
    """scaling * B @ A in numpy, in the view of the weight."""
    A, B = update.A.numpy(), update.B.numpy()
    return update.scaling * (B @ A.reshape(len(A), -1)).reshape(len(B), *A.shape[1:])


def test_exact_names_are_taken_as_they_are(base):
    opened = base({"l.q.weight": normal(3, 4), "l.q.bias": normal(3), "l.k.weight": normal(3, 4)})
    bound = bind(adapter(l__q=lora(3, 4), l__k=lora(3, 4)), opened)
    assert [(site.weight, site.bias) for site in bound.sites] == [("l.q.weight", "l.q.bias"), ("l.k.weight", None)]
    assert (bound.renamed, bound.missing) == (None, ())


def test_a_path_may_be_that_of_a_parameter(base):
    opened = base({"mha.in_proj_weight": normal(6, 4), "mha.in_proj_bias": normal(6), "gate": normal(6, 4)})
    bound = bind(adapter(mha__in_proj_weight=lora(6, 4), gate=lora(6, 4)), opened)
    assert [(s.weight, s.bias) for s in bound.sites] == [("mha.in_proj_weight", "mha.in_proj_bias"), ("gate", None)]


@pytest.mark.parametrize(
    ("stored", "asked", "renamed"),
    [
        ("l.0.q.weight", "model.l.0.q", ("model.", "")),
        ("l.0.q.weight", "base.model.l.0.q", ("base.model.", "")),
        ("model.l.0.q.weight", "l.0.q", ("", "model.")),
        ("a.b.l.0.q.weight", "l.0.q", ("", "a.b.")),
        ("model.l.0.q", "l.0.q", ("", "model.")),
        ("attn.q.weight", "layers.0.attn.q", ("layers.0.", "")),
        ("0.q.weight", "model.0.q", ("model.", "")),
    ],
)
def test_one_prefix_may_be_added_or_taken_off(stored, asked, renamed, base):
    bound = bind(Adapter({Target(asked): (lora(3, 4),)}), base({stored: normal(3, 4), "x.weight": normal(2)}))
    assert bound.renamed == renamed
    assert bound.sites[0].weight == stored
    assert [target.path for target in bound.adapter.updates] == [stored.removesuffix(".weight")]


def test_a_prefix_is_the_same_for_all_or_for_none(base):
    opened = base({"model.q.weight": normal(3, 4), "other.k.weight": normal(3, 4)})
    with pytest.raises(TargetNotFound, match="2 of 2 targets are not in the base: q, k") as raised:
        bind(adapter(q=lora(3, 4), k=lora(3, 4)), opened)
    assert raised.value.where == "q"


def test_two_prefixes_that_would_do_are_no_answer(base):
    opened = base({"a.q.weight": normal(3, 4), "b.q.weight": normal(3, 4)})
    with pytest.raises(TargetNotFound, match=r"several modules of the base: a\.q or b\.q") as raised:
        bind(adapter(q=lora(3, 4)), opened)
    assert "--rename 'q=a.q'" in raised.value.cure


def test_what_is_not_there_is_named_with_the_nearest(base):
    opened = base({"model.layers.0.q_proj.weight": normal(3, 4), "model.layers.0.k_proj.weight": normal(3, 4)})
    lost = {"model__layers__0__q_prjo": lora(3, 4), "model__layers__0__k_proj": lora(3, 4)}
    with pytest.raises(TargetNotFound, match="1 of 2 targets") as raised:
        bind(adapter(**lost), opened)
    assert "Nearest: model.layers.0.q_proj" in raised.value.cure
    assert "allow a partial match" in raised.value.cure
    with pytest.raises(TargetNotFound, match="right base"):
        bind(adapter(encoder=lora(3, 4)), opened)


def test_a_partial_match_leaves_out_and_lists(base):
    opened = base({"q.weight": normal(3, 4)})
    bound = bind(adapter(q=lora(3, 4), k=lora(3, 4)), opened, partial=True)
    assert [site.weight for site in bound.sites] == ["q.weight"]
    assert bound.missing == (Target("k"),)
    with pytest.raises(TargetNotFound):
        bind(adapter(k=lora(3, 4)), opened, partial=True)


def test_an_alias_is_another_name_of_a_stored_tensor(base):
    opened = base({"embed.weight": normal(6, 4)})
    bound = bind(adapter(lm_head=lora(6, 4)), opened, aliases={"lm_head.weight": "embed.weight"})
    assert bound.sites[0].weight == "lm_head.weight"


def test_shapes_prove_the_layout_where_the_adapter_is_wrong(base):
    opened = base({"c_attn.weight": normal(4, 3), "conv.weight": normal(5, 3, 2, 2)})
    bound = bind(adapter(c_attn=lora(3, 4), conv=lora(3, 5, 2, 2)), opened)
    assert [site.target.layout for site in bound.sites] == ["in out *k", "in out *k"]


SQUARE = {"h.c_attn.weight": normal(4, 12), "h.c_proj.weight": normal(4, 4)}


def test_a_familys_table_tells_the_layout_of_a_square_weight(base):
    opened = base(SQUARE, {"model_type": "gpt2"})
    bound = bind(adapter(h__c_proj=lora(4, 4)), opened)
    assert bound.sites[0].target.layout == "in out *k"


def test_the_adapters_word_counts_for_a_square_weight_of_an_unknown_family(base):
    opened = base(SQUARE)
    for layout in ("out *in", "in out *k"):
        bound = bind(Adapter({Target("h.c_proj", layout): (lora(4, 4),)}), opened)
        assert bound.sites[0].target.layout == layout


def test_a_family_whose_table_lacks_the_target_leaves_the_adapters_word(base):
    opened = base({"h.lm_head.weight": normal(4, 4)}, {"model_type": "gpt2"})
    assert bind(adapter(h__lm_head=lora(4, 4)), opened).sites[0].target.layout == "out *in"


def test_a_square_weight_is_refused_where_the_adapters_word_is_wrong_elsewhere(base):
    with pytest.raises(ShapeMismatch, match="the weight is square") as raised:
        bind(adapter(h__c_attn=lora(12, 4), h__c_proj=lora(4, 4)), base(SQUARE, {"model_type": "unknown"}))
    assert raised.value.where == "h.c_proj"
    assert "model_type" in raised.value.cure


@pytest.mark.parametrize("layout", ["e out *in", "e in out *k"])
def test_stacked_experts_are_bound_and_proven(layout, base):
    stored = normal(5, 3, 4) if layout == "e out *in" else normal(5, 4, 3)
    opened = base({"experts.up": stored})
    bound = bind(Adapter({Target("experts.up", "e out *in"): (lora(3, 4, lead=(5,)),)}), opened)
    assert bound.sites[0].target.layout == layout


@pytest.mark.parametrize("lead", [(4,), (6,)])
def test_as_many_experts_as_the_base_has(lead, base):
    given = Adapter({Target("experts.up", "e out *in"): (lora(3, 4, lead=lead),)})
    with pytest.raises(
        ShapeMismatch, match=rf"the update has e={lead[0]}, out=3, in=4.*, but the base's weight has shape \[5, 3, 4\]"
    ):
        bind(given, base({"experts.up": normal(5, 3, 4)}))


@pytest.mark.parametrize(
    ("update", "stored"),
    [
        (lora(3, 5), (3, 4)),
        (lora(2, 4), (3, 4)),
        (lora(3, 4), (12,)),
        (lora(3, 4, 3), (3, 4, 2)),
        (lora(3, 4), (3, 4, 3, 3)),
        (Dense(D=from_numpy(normal(3, 4))), (3, 4, 1)),
        (IA3(l_in=from_numpy(normal(5))), (3, 4)),
        (Replacement(weight=from_numpy(normal(3))), (3, 1)),
    ],
)
def test_a_shape_that_does_not_fit_is_named_with_the_bases(update, stored, base):
    with pytest.raises(ShapeMismatch, match="the base's weight has shape") as raised:
        bind(adapter(q=update), base({"q.weight": normal(*stored)}))
    assert raised.value.where == f"q: {update.method}"
    assert str(list(stored)) in raised.value.why
    assert "base" in raised.value.cure


def test_kernels_of_one_element_fit_whatever_their_number_of_axes(base):
    opened = base({"a.weight": normal(3, 4, 1, 1), "b.weight": normal(3, 4)})
    assert len(bind(adapter(a=lora(3, 4), b=lora(3, 4, 1, 1)), opened).sites) == 2


def test_token_rows_lie_inside_the_base(base):
    opened = base({"embed.weight": normal(6, 3)})
    target = Target("embed", "in out *k")

    def rows(*index):
        return Rows(index=from_numpy(np.array(index)), values=from_numpy(normal(len(index), 3)))

    assert bind(Adapter({target: (rows(0, 5),)}), opened).sites
    for index in ((0, 6), (-1, 2)):
        with pytest.raises(ShapeMismatch, match=r"token 6|-1"):
            bind(Adapter({target: (rows(*index),)}), opened)
    with pytest.raises(Malformed, match="the same position occurs twice"):
        bind(Adapter({target: (rows(1, 1),)}), opened)


def test_a_change_to_a_bias_that_is_not_there_is_refused_unless_nothing_is_lost(base):
    opened = base({"q.weight": normal(3, 4)})
    with pytest.raises(NotMergeable, match="a bias that the base does not have"):
        bind(adapter(q=lora(3, 4, bias=from_numpy(normal(3)))), opened)
    assert bind(adapter(q=IA3(l=from_numpy(normal(3)))), opened).sites


def test_a_bias_has_the_updates_size(base):
    opened = base({"norm.bias": normal(5), "q.weight": normal(9, 4), "q.bias": normal(9)})
    assert bind(adapter(norm=Replacement(bias=from_numpy(normal(5)))), opened).sites[0].weight is None
    with pytest.raises(ShapeMismatch, match=r"the update has 3 outputs, but the base's bias has shape \[5\]"):
        bind(adapter(norm=Replacement(bias=from_numpy(normal(3)))), opened)
    with pytest.raises(TargetNotFound, match="only a bias for this target, no weight"):
        bind(adapter(norm=lora(5, 4)), opened)
    sliced = Adapter({Target("q", rows=(6, 9)): (lora(3, 4, bias=from_numpy(normal(3))),)})
    assert bind(sliced, opened).sites


def test_rows_lie_inside_the_weight(base):
    opened = base({"qkv.weight": normal(9, 4)})
    assert bind(Adapter({Target("qkv", rows=(6, 9)): (lora(3, 4),)}), opened).sites
    with pytest.raises(ShapeMismatch):
        bind(Adapter({Target("qkv", rows=(7, 10)): (lora(3, 4),)}), opened)


def test_entries_that_come_to_one_target_are_all_kept(base):
    opened = base({"q.weight": normal(3, 4)})
    twice = Adapter({Target("q"): (lora(3, 4),), Target("q", "in out *k"): (lora(3, 4), lora(3, 4))})
    bound = bind(twice, opened)
    assert len(bound.adapter) == 3
    assert list(bound.adapter.updates) == [Target("q")]


def test_binding_leaves_the_adapter_as_it_was(base):
    given = adapter(model__q=lora(3, 4))
    before = dict(given.updates)
    given.bind(base({"q.weight": normal(4, 3)}))
    assert given.updates == before


def test_delta_of_an_additive_update_needs_no_base(base):
    first, second = lora(3, 4, scaling=0.5), lora(3, 4, r=1)
    W = normal(3, 4)
    given = Adapter({Target("q"): (first, second)})
    wanted = torch.from_numpy(product(first) + product(second)).float()
    for got in (given.delta("q"), given.delta("q", base=base({"q.weight": W}))):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        assert got.dtype == torch.float32


def test_delta_is_in_the_view_of_the_update(base):
    update = lora(3, 4)
    given = Adapter({Target("c_attn", "in out *k"): (update,)})
    got = given.delta("c_attn", base=base({"c_attn.weight": normal(4, 3)}))
    torch.testing.assert_close(got, torch.from_numpy(product(update)).float(), rtol=1e-6, atol=1e-6)


def test_delta_of_a_convolution_has_its_kernel():
    update = lora(3, 4, 2, 5)
    got = adapter(conv=update).delta("conv")
    assert got.shape == (3, 4, 2, 5)
    torch.testing.assert_close(got.double(), torch.from_numpy(product(update)), rtol=1e-6, atol=1e-6)


def test_delta_of_a_formula_that_needs_the_weight(base):
    W, scale = normal(3, 4), normal(3)
    given = adapter(q=IA3(l=from_numpy(scale)))
    with pytest.raises(UsageError, match="the formula of ia3 needs the weight") as raised:
        given.delta("q")
    assert raised.value.cure == "Pass --base BASE (base=)"
    got = given.delta("q", base=base({"q.weight": W}))
    torch.testing.assert_close(got, torch.from_numpy(W * scale[:, None] - W).float(), rtol=1e-6, atol=1e-6)


def test_delta_of_dora_against_numpy(base):
    W, m, low = normal(3, 4), np.abs(normal(3)) + 0.5, lora(3, 4, scaling=0.7)
    given = adapter(q=DoRA(A=low.A, B=low.B, magnitude=from_numpy(m), scaling=0.7))
    V = W + product(low)
    wanted = V * (m / np.linalg.norm(V, axis=1))[:, None] - W
    got = given.delta("q", base=base({"q.weight": W}))
    torch.testing.assert_close(got, torch.from_numpy(wanted).float(), rtol=1e-6, atol=1e-6)


def test_delta_of_stacked_experts_against_numpy(base):
    update = lora(3, 4, lead=(2,))
    wanted = np.einsum("eor,eri->eoi", update.B.numpy(), update.A.numpy())
    given = Adapter({Target("up", "e in out *k"): (update,)})
    for got in (given.delta("up"), given.delta("up", base=base({"up": normal(2, 4, 3)}))):
        torch.testing.assert_close(got, torch.from_numpy(wanted).float(), rtol=1e-6, atol=1e-6)


def test_delta_of_stacked_biases_alone_is_nothing(base):
    given = Adapter({Target("up", "e out *in"): (Dense(d=from_numpy(normal(2, 3))),)})
    got = given.delta("up", base=base({"up.weight": normal(2, 3, 4), "up.bias": normal(2, 3)}))
    assert not got.any()


def test_delta_that_there_is_not(base):
    given = Adapter({Target("q", rows=(0, 3)): (lora(3, 4),), Target("q", rows=(3, 6)): (lora(3, 4),)})
    with pytest.raises(UsageError, match="differ in layout or rows"):
        given.delta("q")
    with pytest.raises(TargetNotFound, match="no update changes 'qq'") as raised:
        given.delta("qq")
    assert raised.value.cure
    with pytest.raises(NotMergeable, match="the update changes only a bias"):
        adapter(n=Dense(d=from_numpy(normal(3)))).delta("n", base=base({"n.bias": normal(3)}))
    with pytest.raises(UsageError, match="only the base shows the shape"):
        adapter(n=Dense(d=from_numpy(normal(3)))).delta("n")


def test_the_shape_of_a_view_as_far_as_updates_tell():
    assert view_shape(Target("q"), [lora(3, 4, 2)]) == (3, 4, 2)
    assert view_shape(Target("q", "e out *in"), [lora(3, 4, lead=(5,))]) == (5, 3, 4)
    assert view_shape(Target("q"), [IA3(l=from_numpy(normal(3))), IA3(l_in=from_numpy(normal(4)))]) == (3, 4)
    assert view_shape(Target("q"), [Dense(D=from_numpy(normal(3)))]) == (3,)


def test_a_view_shares_the_stored_memory():
    W = torch.zeros(2, 4, 9)
    view(W, Target("q", "e in out *k", (3, 6)))[:] = 1
    assert torch.equal(W.sum((0, 1)), torch.tensor([0.0] * 3 + [8.0] * 3 + [0.0] * 3))


def test_delta_is_the_adapters_method():
    given = adapter(q=lora(3, 4))
    assert torch.equal(given.delta("q"), delta(given, "q", None))
