"""Sums of adapters against float64 formulas, against merging them one by one, and against PEFT where it is right."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit import ops
from adapterkit.core.adapter import Adapter, BaseRef, Target
from adapterkit.core.updates import Additive, ContextUpdate, OutputUpdate, tensor
from adapterkit.errors import Malformed, NotMergeable, ShapeMismatch, StorageError, TargetNotFound, UsageError
from adapterkit.io.computed import load, times
from adapterkit.io.lazy import DTYPES, Lazy, as_array, from_numpy
from adapterkit.methods import METHODS

ADDITIVE = [name for name, cls in METHODS.items() if cls.kind == "additive"]
PAIRED = [name for name in ADDITIVE if METHODS[name].pair is not Additive.pair]
OUT, IN = 8, 16
TARGET = Target("q")
ROOT = Path(__file__).parents[2]


def lora(seed=0, out=OUT, columns=(IN,), rank=2, scaling=1.0, bias=False, lead=(), dtype=np.float64):
    rng = np.random.default_rng(seed)
    fields = {"A": (*lead, rank, *columns), "B": (*lead, out, rank)} | ({"bias": (*lead, out)} if bias else {})
    return METHODS["lora"](
        **{n: from_numpy(rng.normal(size=s).astype(dtype)) for n, s in fields.items()}, scaling=scaling
    )


def dense(**shapes):
    return METHODS["dense"](**{name: from_numpy(np.ones(shape, np.float32)) for name, shape in shapes.items()})


def arrays(update):
    """An update over float64 arrays of numpy."""
    return update.map(lambda leaf: np.array(as_array(leaf), np.float64) if leaf.dtype.floating else leaf.numpy().copy())


def change(updates, shape, stacked=False):
    """(D, d) of additive updates, summed in float64."""
    D, d = np.zeros(shape), np.zeros((*shape[:1], shape[1]) if stacked else shape[0])
    for update in map(arrays, updates):
        for e in range(shape[0]) if stacked else [...]:
            one = update.expert(e) if stacked else update
            if one.changes_weight:
                D[e] += one.delta(shape[1:] if stacked else shape)
            if one.changes_bias:
                d[e] += one.bias_delta()
    return D, d


def close(one, other, tolerance=1e-6):
    scale = max(float(np.abs(other).max(initial=0)), 1e-300)
    assert one.shape == other.shape
    assert float(np.abs(one - other).max(initial=0)) <= tolerance * scale


def fits(update, kernel):
    """Whether an update is of a weight of OUT x IN x kernel: some methods are of planes alone."""
    try:
        update.check_against((OUT, IN, *kernel))
    except ShapeMismatch:
        return False
    return True


@pytest.mark.parametrize("method", PAIRED)
@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
@given(data=st.data())
def test_a_pair_of_factors_is_the_change(method, library, data, made):
    kernel = data.draw(st.sampled_from([(), (3,), (2, 1)]))
    update = data.draw(made.updates(method=method, kernel=kernel))
    assume(fits(update, kernel))
    update = arrays(update).map(library)
    pair = update.pair((OUT, IN, *kernel))
    # Only LoKr of whole factors, which PEFT trains on Conv1d, lies in the weight in an order that no pair has.
    assert pair is not None or update.attributes.get("stacked") or "D" in update.tensors
    if pair is None:
        return
    B, A = pair
    assert (len(B), A.shape[1], B.shape[1]) == (OUT, IN * math.prod(kernel), len(A))
    close(np.asarray(B @ A).reshape(OUT, IN, *kernel), np.asarray(update.delta((OUT, IN, *kernel))), 1e-12)


@pytest.mark.parametrize("method", ADDITIVE)
@given(data=st.data())
def test_a_scaled_update_is_of_its_method_and_changes_so_much_more(method, data, made):
    kernel = data.draw(st.sampled_from([(), (3,)]))
    update, factor = data.draw(made.updates(method=method, kernel=kernel)), data.draw(st.floats(-3, 3))
    assume(fits(update, kernel))
    scaled = update.scaled(factor)
    if scaled is not None:
        assert type(scaled) is type(update)
        for one, other in zip(*(change([u], (OUT, IN, *kernel)) for u in (scaled, update)), strict=True):
            close(one, factor * other, 1e-6)


@given(data=st.data())
def test_sums_are_those_of_the_float64_formula(data, made):
    """Any additive methods, several at a target, convolutions, stacked experts, targets that only some have."""
    stacked = data.draw(st.booleans())
    kernel = () if stacked else data.draw(st.sampled_from([(), (3,), (2, 1)]))
    layout = "e out *in" if stacked else data.draw(st.sampled_from(["out *in", "in out *k"]))
    shape = (*((2,) if stacked else ()), OUT, IN, *kernel)
    targets = [Target("a", layout), Target("b", layout)]
    one = made.updates(method="lora", stacked=stacked, kernel=kernel)  # tells the shape of the weight at every target
    several = st.lists(
        st.sampled_from(ADDITIVE).flatmap(lambda m: made.updates(method=m, stacked=stacked, kernel=kernel)), max_size=2
    )
    adapters = [
        Adapter({t: (data.draw(one), *data.draw(several)) for t in targets[: data.draw(st.integers(1, 2))]})
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    assume(all(fits(u.expert(0) if stacked else u, kernel) for a in adapters for _, u in a) if not stacked else True)
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(adapters), max_size=len(adapters)))
    for operation in (ops.add, ops.stack):
        total = operation(adapters, weights)
        for target in total.updates:
            parts = [change(a.updates.get(target, ()), shape, stacked) for a in adapters]
            wanted = [sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in range(2)]
            size = max(
                abs(w) * float(np.abs(part[i]).max()) for w, part in zip(weights, parts, strict=True) for i in (0, 1)
            )
            for got, want in zip(change(total.updates[target], shape, stacked), wanted, strict=True):
                assert float(np.abs(got - want).max()) <= 1e-6 * max(size, 1e-30)
        total.validate()


@given(st.integers(1, 5), st.integers(1, 5), st.floats(-2, 2), st.floats(-2, 2))
def test_ranks_add_up_when_stacked_and_stop_at_the_weights_when_added(r, s, v, w):
    one, other = (Adapter({TARGET: (lora(seed, rank=rank),)}) for seed, rank in ((1, r), (2, s)))
    (stacked,), (added,) = (f([one, other], [v, w]).updates[TARGET] for f in (ops.stack, ops.add))
    assert stacked.A.shape == (r + s, IN)
    assert added.A.shape == (min(r + s, OUT), IN)


def test_equal_scalings_leave_every_bit_and_unequal_ones_round_once():
    one, other = lora(1, scaling=0.3, dtype=np.float16), lora(2, rank=3, scaling=0.3, dtype=np.float16)
    (total,) = ops.stack([Adapter({TARGET: (one,)}), Adapter({TARGET: (other,)})]).updates[TARGET]
    assert (total.scaling, total.A.dtype.name, total.B.dtype.name) == (0.3, "F16", "F16")
    assert (total.A.numpy() == np.concatenate([one.A.numpy(), other.A.numpy()])).all()
    assert (total.B.numpy() == np.concatenate([one.B.numpy(), other.B.numpy()], 1)).all()
    (uneven,) = ops.stack([Adapter({TARGET: (one,)}), Adapter({TARGET: (other,)})], [1, 0.7]).updates[TARGET]
    assert (uneven.A.dtype.name, uneven.B.dtype.name) == ("F16", "F32")
    assert (uneven.B.numpy()[:, :2] == one.B.numpy()).all()
    assert (uneven.B.numpy()[:, 2:] == (other.B.numpy().astype(float) * 0.7).astype("f4")).all()


@pytest.mark.parametrize("tiny", [5e-324, 2e-309, 0.0])
def test_a_factor_next_to_nothing_does_not_make_the_other_infinite(tiny):
    one, other = (Adapter({TARGET: (lora(seed, scaling=s),)}) for seed, s in ((1, tiny), (2, 1.5)))
    for pair in ([one, other], [other, one], [one, one]):
        (total,) = ops.stack(pair).updates[TARGET]
        close(change([total], (OUT, IN))[0], sum(change(a.updates[TARGET], (OUT, IN))[0] for a in pair))


@pytest.mark.parametrize(
    ("dtype", "factor", "kept"),
    [("BF16", 0.25, "BF16"), ("BF16", 0.3, "F32"), ("F16", 0.5, "F32"), ("F16", -1, "F16"), ("F64", 0.1, "F64")],
)
def test_a_product_keeps_its_type_where_that_is_exact(dtype, factor, kept):
    values = np.array([1.5, -2.0, 0.375])
    leaf = from_numpy(values.astype(DTYPES[dtype].array).view(DTYPES[dtype].numpy), dtype)
    product = times(leaf, factor)
    assert product.dtype.name == kept
    np.testing.assert_allclose(load(product), values * factor, rtol=6e-8)


def test_what_is_only_moved_is_not_read_and_torch_is_not_needed(tmp_path):
    def unread():
        raise AssertionError("read")

    leaf = {n: Lazy(shape, DTYPES["BF16"], unread) for n, shape in (("A", (2, IN)), ("B", (OUT, 2)))}
    lazy = Adapter({TARGET: (METHODS["lora"](**leaf),)})
    for made in (ops.stack([lazy, lazy], [1, 0.5]), ops.add([lazy, lazy]), ops.scale(lazy, 0.3), ops.negate(lazy)):
        made.validate()
    save_peft = tmp_path / "a.safetensors"
    ak.write(Adapter({TARGET: (lora(),)}), save_peft)
    code = (
        "import sys, adapterkit as ak; a, o = sys.argv[1:]\n"
        "ak.write(ak.ops.resize(ak.ops.add([a, a]), rank=2), o)\n"
        "assert ak.ops.compare(ak.ops.scale(a, 2), o).equal\n"
        "assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-W", "error", "-c", code, save_peft, tmp_path / "b.safetensors"]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr


def test_a_factor_that_is_not_finite_stops_the_write(tmp_path):
    bad = lora()
    values = bad.A.numpy().copy()
    values[1, 3] = np.nan
    pair = [Adapter({TARGET: (bad.replace(A=from_numpy(values)),)}), Adapter({TARGET: (lora(1),)})]
    for total in (ops.add(pair), ops.stack(pair, [1, 2])):
        with pytest.raises(Malformed, match="NaN"):
            ak.write(total, tmp_path / "out.safetensors")
    for work in (lambda: ops.resize(pair[0], rank=1), lambda: ops.compare(*pair), lambda: ops.promote(pair[0], 1)):
        with pytest.raises(Malformed, match=r"q: lora\.A.*NaN or an infinity at \[1, 3\]"):
            work()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", ["weight of a linear layer", "several"])
def test_merging_the_sum_is_merging_the_adapters(shared, base, tmp_path):
    """Into a float32 base: two sums that differ by the rounding of factors to float32 alone."""
    rng = np.random.default_rng(7)
    weights = {
        "l.weight": rng.normal(size=(8, 16)), "l.bias": rng.normal(size=8), "c.weight": rng.normal(size=(8, 4, 3, 3)),
        "e.weight": rng.normal(size=(20, 8)), "x.experts": rng.normal(size=(3, 8, 16)), "n.weight": rng.normal(size=8),
        "k.weight": rng.normal(size=(8, 16)), "k.bias": rng.normal(size=8), "d.weight": rng.normal(size=(8, 16)),
        "h.weight": rng.normal(size=(4, 16)), "g.weight": rng.normal(size=(8, 16)), "g.bias": rng.normal(size=8),
    }  # fmt: skip
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    model = base(weights)
    both = [full_adapter(1), full_adapter(2)]
    if shared == "weight of a linear layer":
        both[1] = both[1].replace(updates={t: u for t, u in both[1].updates.items() if t.path == "l"})
    for name, adapters, kwargs in (
        ("apart", both, {"weights": [0.5, -2.0]}),
        ("added", ops.add(both, [0.5, -2.0], base=model), {}),
        ("stacked", ops.stack(both, [0.5, -2.0], base=model.root), {}),
    ):
        ak.merge(model, adapters, tmp_path / name, **kwargs)
    apart, *others = (load_file(tmp_path / n / "model.safetensors") for n in ("apart", "added", "stacked"))
    assert any((apart[name] != weights[name]).any() for name in weights)
    for merged in others:
        for name, wanted in apart.items():
            np.testing.assert_allclose(merged[name], wanted, rtol=3e-7, atol=3e-7 * np.abs(wanted).max())


def full_adapter(seed):
    """Every sort of update that merges, on the base of the test above."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return from_numpy(rng.normal(size=shape).astype(np.float32))

    dora = METHODS["dora"](A=leaf(2, 16), B=leaf(8, 2), magnitude=leaf(8))
    return Adapter({
        Target("l"): (lora(seed, rank=seed, bias=True, dtype=np.float32), METHODS["dense"](d=leaf(8), scaling=0.5)),
        Target("l", rows=(2, 5)): (lora(seed, out=3, dtype=np.float32),),
        Target("c"): (lora(seed, columns=(4, 3, 3), dtype=np.float32),),
        Target("e", "in out *k"): (lora(seed, columns=(20,), dtype=np.float32),),
        Target("x.experts", "e out *in"): (lora(seed, lead=(3,), dtype=np.float32),),
        Target("n"): (METHODS["dense"](D=leaf(8)),),
        Target("k"): (METHODS["ia3"](l=leaf(8)),),
        Target("d"): (dora, lora(seed, dtype=np.float32)),
        Target("g"): (METHODS["glora"](A=leaf(8), B=leaf(8), C=leaf(16), D=leaf(8)),),
        Target("h"): (METHODS["replacement"](weight=leaf(4, 16)),),
    })  # fmt: skip


def test_a_head_that_the_base_ties_is_known_by_its_name(base, tmp_path):
    table = np.random.default_rng(0).normal(size=(10, 16)).astype(np.float32)
    model = base({"model.embed_tokens.weight": table}, {"model_type": "llama", "tie_word_embeddings": True})
    head = [
        Adapter({Target("lm_head"): (METHODS["ia3"](l=from_numpy(np.full(10, v))), lora(out=10))}) for v in (2.0, 3.0)
    ]
    total = ops.add(head, [1, 2], base=model)
    for name, adapters, kwargs in (("apart", head, {"weights": [1, 2]}), ("added", total, {})):
        ak.merge(model, adapters, tmp_path / name, tied="untie", **kwargs)
    apart, added = (load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in ("apart", "added"))
    np.testing.assert_allclose(added, apart, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.5, -0.3])
def test_a_scaled_adapter_is_still_one_of_its_format(factor, peft_model, tmp_path):
    _, adapters = peft_model
    ak.write(ops.scale(adapters[0], factor), tmp_path / "scaled", format="peft")
    model = peft.PeftModel.from_pretrained(TwoLayers(), tmp_path / "scaled", adapter_name="sum")
    for module in ("q", "c"):
        close(of_peft(model, module), factor * adapters[0].delta(module).double().numpy())


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_scales_of_ia3_mix_without_a_base_as_merging_does(v, w):
    W, scales = np.random.default_rng(0).normal(size=(8, 16)), np.random.default_rng(1).normal(size=(2, 8))
    one, other = (Adapter({TARGET: (METHODS["ia3"](l=from_numpy(x)),)}) for x in scales)
    (mixed,) = ops.add([one, other], [v, w]).updates[TARGET]
    assert mixed.method == "ia3"
    wanted = W + v * (scales[0][:, None] * W - W) + w * (scales[1][:, None] * W - W)
    np.testing.assert_allclose(arrays(mixed).new_weight(W), wanted, atol=1e-12 * (1 + abs(v) + abs(w)) * 10)


def test_whole_weights_average_and_token_rows_unite_without_a_base():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 4, 6))
    heads = [Adapter({TARGET: (METHODS["replacement"](weight=from_numpy(w)),)}) for w in (one, other)]
    (mean,) = ops.average(heads, [1, 3]).updates[TARGET]
    np.testing.assert_allclose(mean.weight.numpy(), 0.25 * one + 0.75 * other)
    with pytest.raises(UsageError, match=r"cannot be .* without a base") as raised:
        ops.add(heads)
    assert "base=" in raised.value.cure
    tokens = [([1, 2], [2, 5]), ([2, 1], [3, 4])]
    rows = [
        [
            Adapter({TARGET: (METHODS["rows"](index=from_numpy(np.array(i)), values=from_numpy(v[: len(i)])),)})
            for i in pair
        ]
        for pair, v in ((tokens[1], one), (([1, 2], [2, 1]), one))
    ]
    (united,) = ops.add(rows[0]).updates[TARGET]
    assert united.index.numpy().tolist() == [2, 1, 3, 4]
    (averaged,) = ops.average(rows[1]).updates[TARGET]
    assert averaged.index.numpy().tolist() == [1, 2]
    np.testing.assert_allclose(averaged.values.numpy(), (one[:2] + one[[1, 0]]) / 2)


def test_one_adapters_own_methods_are_kept_where_they_can_be_scaled():
    rng = np.random.default_rng(0)
    loha = METHODS["loha"](**{
        n: from_numpy(rng.normal(size=s)) for n, s in
        (("w1_a", (8, 2)), ("w1_b", (2, 16)), ("w2_a", (8, 2)), ("w2_b", (2, 16)))
    })  # fmt: skip
    alone, other = Adapter({TARGET: (loha,), Target("p"): (lora(),)}), Adapter({Target("p"): (lora(1),)})
    total = ops.add([alone, other], [3, 1])
    ((kept,), (summed,)) = (total.updates[t] for t in (TARGET, Target("p")))
    assert (kept.method, kept.scaling, kept.w1_a is loha.w1_a) == ("loha", 3.0, True)
    assert (summed.method, summed.A.shape) == ("lora", (4, IN))
    assert ops.scale(alone, 1).updates[TARGET][0] is loha


class Bottleneck(OutputUpdate):
    """A made-up formula on outputs."""

    scale: torch.Tensor = tensor("out")


class Prompt(ContextUpdate):
    """A made-up formula on the context."""

    tokens: torch.Tensor = tensor("n width")


FORMULAS = [Bottleneck(scale=from_numpy(np.ones(OUT))), Prompt(tokens=from_numpy(np.ones((2, 4))))]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.kind)
def test_formulas_that_are_not_of_weights_are_refused_with_the_reason(formula):
    adapter = Adapter({TARGET: (formula,)})
    for work in (lambda: ops.scale(adapter, 2), lambda: ops.add([adapter, adapter])):
        with pytest.raises(
            NotMergeable, match=f"changes {formula.acts_on}, not weights, so it cannot be scaled or added"
        ):
            work()


def test_contexts_are_stacked_behind_one_another():
    one, other = (Prompt(tokens=from_numpy(np.full((2, 4), value))) for value in (1.0, 2.0))
    total = ops.stack([Adapter({TARGET: (one,)}), Adapter({TARGET: (other,)})])
    assert total.updates[TARGET] == (one, other)


@pytest.mark.parametrize("method", ["dora"])
def test_formulas_that_need_the_weight_ask_for_the_base(method):
    fields = {"A": (2, IN), "B": (OUT, 2), "magnitude": (OUT,)}
    adapter = Adapter({TARGET: (METHODS[method](**{n: from_numpy(np.ones(s)) for n, s in fields.items()}),)})
    with pytest.raises(UsageError, match=r"cannot be .* without a base") as raised:
        ops.add([adapter, Adapter({TARGET: (lora(),)})], [2, 1])
    assert (raised.value.where, raised.value.cure) == ("q: dora", "Pass --base BASE (base=)")
    assert ops.scale(adapter, 1).updates == adapter.updates


def test_bad_sums_are_refused_before_any_work():
    a, b = Adapter({TARGET: (lora(),)}), Adapter({Target("model.q"): (lora(),)})
    with pytest.raises(UsageError, match="no target in common"):
        ops.add([a, b])
    assert len(ops.add([a, b], disjoint=True).updates) == 2
    with pytest.raises(ShapeMismatch, match=r"\[8, 16\] and \[8, 12\]") as raised:
        ops.add([a, Adapter({TARGET: (lora(columns=(12,)),)})])
    assert raised.value.where == "q"
    with pytest.raises(ShapeMismatch, match="one adapter assumes"):
        ops.add([a, Adapter({Target("q", "in out *k"): (lora(),)})])
    for weights, why in (([1], "1 weights for 2"), ([1, math.nan], "not all finite")):
        with pytest.raises(UsageError, match=why):
            ops.add([a, a], weights)
    with pytest.raises(UsageError, match="no adapter"):
        ops.add([])
    with pytest.raises(UsageError, match="instead of a list"):
        ops.add(a)
    with pytest.raises(UsageError, match="sum to 0"):
        ops.average([a, a], [1, -1])
    with pytest.raises(StorageError):
        ops.add(["nowhere", a])


@pytest.mark.parametrize("operation", ["add", "stack", "compare", "linear", "ties"])
@pytest.mark.parametrize(
    ("one", "other", "sizes"),
    [
        (dense(D=(4, OUT, IN)), dense(D=(3, OUT, IN)), "e is 4 and 3"),
        (lora(lead=(4,)), lora(lead=(3,)), "e is 4 and 3"),
        (lora(bias=True), dense(d=(1,)), "out is 8 and 1"),
        (dense(d=(OUT,)), dense(d=(1,)), "out is 8 and 1"),
    ],
)
def test_adapters_with_other_experts_or_biases_are_refused(one, other, sizes, operation):
    """One expert's weight and a broadcast bias would fit, so shapes of weights do not show these differences."""
    target = Target("q", "e out *in") if sizes[0] == "e" else TARGET
    both = [Adapter({target: (update,)}) for update in (one, other)]
    run = {"add": ops.add, "stack": ops.stack, "compare": lambda both: ops.compare(*both)}
    with pytest.raises(ShapeMismatch, match=f"different sizes: {sizes}") as raised:
        run.get(operation, lambda both: ops.combine(both, operation))(both)
    assert raised.value.where == "q"


def test_a_base_settles_names_layouts_and_shapes(base):
    square = np.random.default_rng(0).normal(size=(16, 16))
    model = base({"model.q.weight": square}, {"model_type": "gpt2"})
    a, b = Adapter({TARGET: (lora(out=16),)}), Adapter({Target("model.q"): (lora(1, out=16),)})
    assert list(ops.add([a, b], base=model).updates) == [Target("model.q")]
    with pytest.raises(TargetNotFound):
        ops.add([a, Adapter({Target("nothing"): (lora(),)})], base=model)
    vera = METHODS["vera"](
        **{n: from_numpy(np.ones(s)) for n, s in (("b", 16), ("B", (20, 2)), ("d", 2), ("A", (2, 30)))}
    )
    with pytest.raises(UsageError, match="the shape of this weight is unknown without a base"):
        ops.promote(Adapter({Target("model.q"): (vera,)}))
    (promoted,) = ops.promote(Adapter({Target("model.q"): (vera,)}), base=model).updates[Target("model.q")]
    np.testing.assert_allclose(promoted.B.numpy() @ promoted.A.numpy(), np.full((16, 16), 2.0))


def test_the_result_says_what_it_was_made_of():
    one = Adapter({TARGET: (lora(),)}, BaseRef(id="base")).step("read", format="peft")
    other = ops.scale(one, 0.5)
    assert [step.op for step in other.recipe] == ["read", "scale"]
    total = ops.subtract(one, other)
    (step,) = total.recipe
    assert (step.op, step.args["weights"], total.base) == ("add", [1.0, -1.0], one.base)
    assert [[s["op"] for s in source["recipe"]] for source in step.args["of"]] == [["read"], ["read", "scale"]]
    assert ops.add([one, one.replace(base=BaseRef(id="another"))]).base is None


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.c = torch.nn.Linear(16, 8), torch.nn.Conv2d(4, 8, 3)


@pytest.fixture
def peft_model(tmp_path):
    """A model of PEFT's with two LoRAs of different ranks and alphas, and both as adapterkit reads them."""
    torch.manual_seed(0)
    configs = [peft.LoraConfig(r=r, lora_alpha=a, target_modules=["q", "c"]) for r, a in ((2, 8), (3, 5))]
    model = peft.get_peft_model(TwoLayers(), configs[0], "one")
    model.add_adapter("two", configs[1])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "saved")
    return model, [ak.read(tmp_path / "saved" / name) for name in ("one", "two")]


def of_peft(model, module):
    layer = model.base_model.model.get_submodule(module)
    return layer.get_delta_weight("sum").detach().double().numpy()


@pytest.mark.parametrize("module", ["q", "c"])
def test_stacking_is_pefts_cat(module, peft_model):
    model, adapters = peft_model
    model.add_weighted_adapter(["one", "two"], [0.7, -1.5], "sum", combination_type="cat")
    total = ops.stack(adapters, [0.7, -1.5])
    close(total.delta(module).double().numpy(), of_peft(model, module))


@pytest.mark.parametrize("module", ["q", "c"])
def test_resizing_the_sum_is_pefts_svd(module, peft_model):
    model, adapters = peft_model
    model.add_weighted_adapter(["one", "two"], [0.7, 1.5], "sum", combination_type="svd", svd_rank=2)
    total = ops.resize(ops.add(adapters, [0.7, 1.5]), rank=2)
    close(total.delta(module).double().numpy(), of_peft(model, module), 1e-5)


def test_pefts_linear_is_not_the_sum(peft_model):
    """It adds A and B apart: products of one adapter's B with the other's A come in."""
    model, _ = peft_model
    model.add_adapter("three", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q", "c"], init_lora_weights=False))
    model.add_weighted_adapter(["one", "three"], [1.0, 1.0], "sum", combination_type="linear")
    layer = model.base_model.model.get_submodule("q")
    wanted = sum(layer.get_delta_weight(name).detach().double().numpy() for name in ("one", "three"))
    assert np.linalg.norm(of_peft(model, "q") - wanted) > 0.3 * np.linalg.norm(wanted)


def test_files_are_read_and_written(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        ak.write(Adapter({TARGET: (lora(seed),)}), path)
    ak.write(ops.add(paths, [1, 2]), tmp_path / "sum.safetensors")
    got = ak.read(tmp_path / "sum.safetensors").delta("q").numpy()
    close(got.astype(float), sum(w * change([lora(s)], (OUT, IN))[0] for s, w in ((0, 1), (1, 2))))
    save_file({"x": np.ones(1)}, tmp_path / "no.safetensors")
    with pytest.raises(ak.AdapterkitError):
        ops.scale(tmp_path / "no.safetensors", 2)


def test_an_average_of_weights_whose_sum_is_no_float():
    a, b = (Adapter({TARGET: (lora(),)}) for _ in range(2))
    whole, half = (ops.average([a, b], weights).delta("q") for weights in ([1e308, 1e308], [1, 1]))
    assert torch.equal(whole, half)
