import dataclasses
import inspect
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_vectors import CASES, OF_WEIGHTS, opened
from safetensors.numpy import load_file, save_file
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.core.updates import Additive, ContextUpdate, OutputUpdate, Update, tensor
from adapterkit.errors import Malformed, NotMergeable, ShapeMismatch, Unsupported, UsageError
from adapterkit.io.lazy import DTYPES, Lazy, as_lazy, as_torch, from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming.binding import view

ADDITIVE = [name for name, cls in METHODS.items() if cls.kind == "additive"]
OUT, IN = 8, 16

WRONG = {
    "float": [None, "1", True, [1.0], math.nan, math.inf, 10**400],
    "int": [None, "1", True, 1.5],
    "str": [None, 1, True],
    "bool": [None, 0, 1, "true"],
}
"""Type of an attribute -> values that are not of it."""


def merged(site, base, dtype):
    """(W', b') as stored, from `new_weight` and `new_bias` alone."""
    target, stacked = site.target, site.target.stacked
    W = as_torch(base.tensors[site.weight], dtype=dtype).clone()
    b = None if site.bias is None else as_torch(base.tensors[site.bias], dtype=dtype).clone()
    part = view(W, target)
    part_b = None if b is None else b if target.rows is None else b[..., target.rows[0] : target.rows[1]]
    for update in site.updates:
        loaded = update.map(lambda leaf: as_torch(leaf, dtype=dtype))
        for e in range(W.shape[0]) if stacked else [...]:
            one = (loaded.expert(e) if stacked else loaded).settled(part[e])
            if one.changes_weight:
                part[e] = one.new_weight(part[e])
            if part_b is not None and one.changes_bias:
                part_b[e] = one.new_bias(part_b[e])
    return W, b


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("method", "path"), CASES)
def test_a_formula_agrees_with_its_vector(method, path, dtype, tolerance):
    """To rounding of the whole: what takes a weight apart errs by its norm, in small entries too."""
    _, base, sites = opened(method)
    for name, got in zip(("weight", "bias"), merged(sites[path], base, dtype), strict=True):
        assert (got is None) == (f"{path}.merged.{name}" not in base.tensors)
        if got is not None:
            wanted = base.tensors[f"{path}.merged.{name}"].torch()
            assert float((got.double() - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.norm()))


@pytest.mark.parametrize(("method", "path"), CASES)
def test_a_torch_layer_of_the_merged_weight_gives_the_vectors_output(method, path):
    _, base, sites = opened(method)
    W, b = merged(sites[path], base, torch.float64)
    y = layer(sites[path].target, base.tensors[f"{path}.x"].torch(), W, b)
    torch.testing.assert_close(y, base.tensors[f"{path}.y"].torch(), rtol=1e-12, atol=1e-12)


def layer(target, x, W, b):
    """What torch's layer for a weight stored like this does with x."""
    if not x.is_floating_point():
        return functional.embedding(x, W)
    if target.stacked:
        y = x @ view(W, Target("", target.layout)).mT
        return y if b is None else y + b[:, None]
    if W.ndim == 1:
        return x * W if b is None else x * W + b
    if target.layout == "in out *k":
        return functional.linear(x, W.T, b) if W.ndim == 2 else functional.conv_transpose2d(x, W, b)
    return {2: functional.linear, 3: functional.conv1d, 4: functional.conv2d}[W.ndim](x, W, b)


@pytest.mark.parametrize(("method", "path"), CASES)
def test_delta_is_the_difference_that_merging_makes(method, path):
    adapter, base, sites = opened(method)
    target = sites[path].target
    stored, new = (base.tensors[f"{path}.{name}"].torch() for name in ("weight", "merged.weight"))
    wanted = view(new - stored, target).float()
    delta = adapter.delta(path, base=base)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, wanted, rtol=1e-6, atol=1e-6)
    weights = [update for update in sites[path].updates if update.changes_weight]
    told = all({"in", "rest", "columns"} & update.dims(target.stacked).keys() for update in weights)
    if all(update.kind == "additive" for update in sites[path].updates) and weights and told:
        torch.testing.assert_close(adapter.delta(path).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", OF_WEIGHTS)
@given(data=st.data())
def test_cutting_along_any_declared_axis_changes_nothing(method, data, made):
    kernel = data.draw(st.sampled_from([(), (3,), (2, 1)]))
    update = loaded(data.draw(made.updates(method=method, kernel=kernel)))
    W, b = torch.randn(OUT, IN, *kernel, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    if not made.takes(update, tuple(W.shape)):
        return
    update = update.settled(W)
    whole = update.new_weight(W) if update.changes_weight else W
    for axis in filter(update.cuts, METHODS[method].blocks):
        dim, size = {"out": (0, OUT), "in": (1, IN)}[axis]
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3))), size]
        blocks = [(update.block(axis, i, j), i, j) for i, j in pairwise(cuts)]
        if update.changes_weight:
            parts = [block.new_weight(W.narrow(dim, i, j - i)) for block, i, j in blocks]
            torch.testing.assert_close(torch.cat(parts, dim), whole, rtol=1e-12, atol=1e-12)
        if axis == "out" and update.changes_bias:
            parts = [block.new_bias(b[i:j]) for block, i, j in blocks]
            torch.testing.assert_close(torch.cat(parts), update.new_bias(b), rtol=1e-12, atol=1e-12)


def loaded(update):
    return update.map(lambda leaf: as_torch(leaf, dtype=torch.float64))


@pytest.mark.parametrize("method", ADDITIVE)
@pytest.mark.parametrize("turned", [False, True])
@given(data=st.data())
def test_the_weighted_difference_is_written_where_it_is_wanted(method, turned, data, made):
    kernel = data.draw(st.sampled_from([(), (3,), (2, 2)]))
    update = loaded(data.draw(made.updates(method=method, kernel=kernel).filter(lambda u: u.changes_weight)))
    W = torch.randn(OUT, IN, *kernel, dtype=torch.float64)
    if not made.takes(update, tuple(W.shape)):
        return
    D = update.delta(tuple(W.shape))
    for library in (torch.asarray, np.asarray):
        held = library(W.transpose(0, 1).contiguous()).swapaxes(0, 1) if turned else library(W.clone())
        update.map(lambda leaf, to=library: to(leaf)).delta_into(held, -0.75)
        torch.testing.assert_close(torch.as_tensor(held), -0.75 * D, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.new_weight(W), W + D, rtol=1e-12, atol=1e-12)
    assert math.isclose(update.delta_norm(tuple(W.shape)), float(D.square().sum().sqrt()), rel_tol=1e-9, abs_tol=1e-9)


def unreadable(shape, dtype):
    def fetch():
        raise AssertionError("shapes are checked from headers alone")

    return Lazy(tuple(shape), DTYPES[dtype], fetch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stacked", [False, True])
@given(data=st.data())
def test_shapes_are_checked_without_reading_a_byte(method, stacked, data, made):
    update = data.draw(made.updates(method=method, stacked=stacked))
    update = update.map(lambda leaf: unreadable(leaf.shape, leaf.dtype.name))
    dims = update.dims(stacked)
    for name, leaf in update.tensors.items():
        axes = update.tensor_fields()[name].metadata["axes"]
        assert (*((dims["e"],) if stacked else ()), *axes.sizes(dims)) == leaf.shape
        with pytest.raises(ShapeMismatch) as raised:
            update.replace(**{name: unreadable((), leaf.dtype.name)}).dims(stacked)
        assert raised.value.where == name
        other = "F32" if update.tensor_fields()[name].metadata["integer"] else "I64"
        for wrong in (other, "BOOL", "C64"):
            with pytest.raises(ShapeMismatch, match=f"dtype {wrong}, but must hold") as raised:
                update.replace(**{name: unreadable(leaf.shape, wrong)}).dims(stacked)
            assert raised.value.where == name


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_tensors_that_share_an_axis_must_agree_on_it(method, data, made):
    update = data.draw(made.updates(method=method))
    for name, leaf in update.tensors.items():
        axes = update.tensor_fields()[name].metadata["axes"]
        others = {a for n in update.tensors if n != name for a in update.tensor_fields()[n].metadata["axes"].axes}
        for axis in (a for a in others & set(axes.axes) if a.isidentifier()):
            shape = list(leaf.shape)
            shape[axes.index(axis)] += 1
            with pytest.raises(ShapeMismatch, match=f"with .*{axis}="):
                update.replace(**{name: unreadable(shape, leaf.dtype.name)}).dims()


class Blocked(Additive):
    """A made-up method whose first field has axes that only the later ones tell."""

    R: object = tensor("out/b b")
    U: object = tensor("out")
    V: object = tensor("b")


def test_products_and_quotients_are_checked_once_later_fields_tell_their_names():
    def blocked(*shapes):
        return Blocked(**{name: unreadable(shape, "F32") for name, shape in zip("RUV", shapes, strict=True)})

    assert blocked((4, 2), (8,), (2,)).dims() == {"out": 8, "b": 2}
    for shapes in [((3, 2), (8,), (2,)), ((4, 2), (6,), (2,)), ((4, 2), (8,), (4,))]:
        with pytest.raises(ShapeMismatch):
            blocked(*shapes).dims()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_attributes_are_of_their_type_and_finite(method, data, made):
    update = data.draw(made.updates(method=method))
    for name, field in METHODS[method].attribute_fields().items():
        for value in WRONG[field.type]:
            with pytest.raises(Malformed) as raised:
                update.replace(**{name: value}).check()
            assert raised.value.where == name
        if field.metadata.get("among"):
            unknown = {"str": "colour", "int": 77}[field.type]
            with pytest.raises(Unsupported, match=f"the value {unknown!r} is unknown") as raised:
                update.replace(**{name: unknown}).check()
            assert raised.value.where == name
        if field.type == "float":
            whole = update.replace(**{name: 2})
            whole.check()
            assert repr(whole.attributes[name]) == "2.0"


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("loha", ("w1_a", "w2_a")),
        ("oft", ()),
        ("oft", ("pairs", "square")),
        ("osf", ("U", "S", "V", "S_own")),
        ("psoft", ("a",)),
        ("psoft", ("pairs", "R")),
        ("psoft", ("pairs", "A")),
        ("loha", ("w1_a", "w2_a", "w1_b", "w2_b", "t1")),
        ("miss", ()),
        ("miss", ("D", "mini")),
        ("ia3", ()),
        ("ia3", ("l", "l_in")),
        ("dense", ()),
        ("replacement", ()),
    ],
)
def test_rules_on_which_tensors_may_be_together(method, fields):
    with pytest.raises(Malformed, match="needs"):
        METHODS[method](**{name: from_numpy(np.ones(3)) for name in fields}).check()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_updates_are_values(method, data, made):
    update = data.draw(made.updates(method=method))
    before = update.tensors
    assert (type(update), update.method) == (METHODS[method], method)
    assert update.tensors == before, "tensors are compared as the same objects"
    assert update.map(lambda leaf: leaf).tensors == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        update.method_version = 2
    assert update != update.replace()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_tensors_may_be_numpy_arrays(method, data, made):
    update = data.draw(made.updates(method=method))
    in_torch = update.map(lambda leaf: as_torch(leaf, dtype=torch.float32))
    in_numpy = in_torch.map(lambda leaf: leaf.numpy())
    swapped = in_torch.map(lambda leaf: leaf.numpy().astype(leaf.numpy().dtype.newbyteorder(">")))
    wanted = Adapter({Target("q"): (in_torch,)}).digest()
    assert Adapter({Target("q"): (in_numpy,)}).digest() == wanted
    assert Adapter({Target("q"): (swapped,)}).digest() == wanted
    for (_, one), (_, other) in zip(in_torch.tensors.items(), in_numpy.tensors.items(), strict=True):
        assert torch.equal(as_torch(other), one)


def test_a_lora_of_rank_0_changes_nothing(tmp_path):
    """AdaLoRA prunes ranks, and a resized change may have none left."""
    adapter = Adapter({Target("q"): (METHODS["lora"](A=torch.zeros(0, 6), B=torch.zeros(4, 0)),)})
    save_file({"q.weight": np.ones((4, 6), np.float32)}, tmp_path / "base.safetensors")
    ak.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["q.weight"].tobytes() == np.ones((4, 6), np.float32).tobytes()
    model, x = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 4)}), torch.randn(2, 6)
    y = model["q"](x)
    ak.torch.inject(model, adapter)
    assert torch.equal(model["q"](x), y)
    assert ak.diff(adapter, adapter).equal


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([[1.0, 2.0]], "a torch tensor, a numpy array or a Lazy, not list"),
        ("A.npy", "not str"),
        (None, "the tensor is missing"),
        (np.array([["a", "b"]]), "element type <U1 is not supported"),
        (np.ones((1, 2), object), "element type object is not supported"),
        (torch.ones(1, 2, dtype=torch.complex128), "element type torch.complex128 is not supported"),
    ],
    ids=["list", "text", "missing", "strings", "objects", "complex"],
)
def test_a_value_that_is_no_tensor_is_refused_at_its_field(value, why, tmp_path):
    adapter = Adapter({Target("q"): (METHODS["lora"](A=value, B=np.ones((4, 1), np.float32)),)})
    repr(adapter.updates)
    for use in (adapter.validate, lambda: ak.write(adapter, tmp_path / "a.safetensors")):
        with pytest.raises(UsageError, match=why) as raised:
            use()
        assert raised.value.where == "q: lora.A"
        assert raised.value.cure
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_values_that_are_not_finite_are_named_with_field_and_position(value, method, data, made):
    update = data.draw(made.updates(method=method))
    name = data.draw(st.sampled_from([n for n, leaf in update.tensors.items() if leaf.dtype.floating]))
    array = update.tensors[name].numpy().copy()
    position = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    array[position] = value
    target = Target("a.b")
    Adapter({target: (update,)}).check_values()
    with pytest.raises(Malformed) as raised:
        Adapter({target: (update.replace(**{name: from_numpy(array)}),)}).check_values()
    assert raised.value.where == f"a.b: {method}.{name}"
    assert str(list(position)) in raised.value.why


@pytest.mark.parametrize("index", [[0, -1], [1, 1], [[0, 1], [2, 2]]])
def test_token_numbers_are_distinct_and_not_negative(index):
    update = METHODS["rows"](index=from_numpy(np.array(index)), values=from_numpy(np.ones((*np.shape(index), 3))))
    with pytest.raises(Malformed, match=r"position -1 is outside in|the same position occurs twice"):
        update.check_values()


class Bottleneck(OutputUpdate):
    """A made-up formula on outputs."""


class Prompt(ContextUpdate):
    """A made-up formula on the context."""


@pytest.mark.parametrize(
    ("cls", "acts_on"), [(Bottleneck, "the output of the layer"), (Prompt, "the context of the model")]
)
def test_formulas_that_are_not_of_weights_refuse_to_be_merged(cls, acts_on):
    with pytest.raises(NotMergeable, match=f"changes {acts_on}, not its weights") as raised:
        cls().new_weight(torch.zeros(2, 2))
    assert raised.value.exit_code == 3
    assert not cls().changes_weight


SHIFT = '''
"""Shift: W' = W + by, a third party's method."""
from adapterkit.core.updates import Additive, tensor

class Shift(Additive):
    paper = "none"
    version = 3
    by: object = tensor("out")
    times: int = 1

    def delta(self, shape):
        return (self.times * self.by)[:, None].expand(shape)
'''


@pytest.fixture
def shift(tmp_path, monkeypatch):
    """A distribution with a method of its own, found through its entry point."""
    (tmp_path / "shift.py").write_text(SHIFT)
    info = tmp_path / "shift-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shift\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[adapterkit.methods]\nshift = shift:Shift\n")
    monkeypatch.syspath_prepend(tmp_path)
    METHODS.__dict__.pop("_third_party", None)
    yield METHODS["shift"]
    METHODS.__dict__.pop("_third_party", None)
    METHODS._loaded.pop("shift")
    del sys.modules["shift"]


def test_a_third_partys_method_works_like_any_other(shift, tmp_path):
    assert "shift" in METHODS
    assert issubclass(shift, Update)
    adapter = Adapter({Target("q"): (shift(by=from_numpy(np.array([1.0, -2.0])), times=3),)})
    ak.write(adapter, tmp_path / "x.safetensors")
    back = ak.read(tmp_path / "x.safetensors", format="adapterkit")
    ((_, update),) = back
    assert (type(update), update.version, update.times) == (shift, 3, 3)
    save_file({"q.weight": np.zeros((2, 4))}, tmp_path / "base.safetensors")
    delta = back.delta("q", base=tmp_path / "base.safetensors")
    assert torch.equal(delta, torch.tensor([[3.0] * 4, [-6.0] * 4]))


def test_attribute_types_are_checked_without_postponed_annotations_too(shift):
    with pytest.raises(Malformed, match="not of type int"):
        shift(by=from_numpy(np.ones(2)), times=1.5).check()


LINES = 130
"""A method is a small file: about 80 lines, some more where the formula has many forms."""


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_small_file(name):
    count = len(Path(inspect.getfile(METHODS[name])).read_text("utf-8").splitlines())
    assert count <= LINES, f"{name}: {count} lines; what other methods say too belongs in one place"


@pytest.mark.parametrize("kind", ["u1", "u2", "u8", "i4"])
@pytest.mark.parametrize("name", ["nola", "waveft", "vblora", "shira"])
def test_whole_numbers_of_any_type_mean_the_same(name, kind, tmp_path):
    """Positions and seeds may be of any whole type; sums of uint8 wrapped around, and torch cannot add uint16."""
    vectors = Path(__file__).parents[2] / "spec" / "vectors" / "methods"
    adapter = ak.read(vectors / f"{name}.adapter.safetensors")
    expected = load_file(vectors / f"{name}.expected.safetensors")

    def other(leaf):
        numbers = as_lazy(leaf).numpy()
        limits = np.iinfo(kind)
        fits = not leaf.dtype.floating and limits.min <= numbers.min(initial=0) and numbers.max(initial=0) <= limits.max
        return from_numpy(numbers.astype(kind)) if fits else leaf

    changed = adapter.map(other)
    ak.merge(vectors / f"{name}.expected.safetensors", changed, tmp_path / "out.safetensors", dtype="F64")
    merged = load_file(tmp_path / "out.safetensors")
    for target in changed.updates:
        wanted = expected[f"{target.path}.merged.weight"]
        np.testing.assert_allclose(merged[f"{target.path}.weight"], wanted, rtol=0, atol=1e-12, err_msg=str(target))
    weight = torch.tensor(expected["linear.weight"])
    module = torch.nn.Module()
    module.linear = torch.nn.Linear(*weight.shape[::-1], bias="linear.bias" in expected).double()
    with torch.no_grad():
        module.linear.weight.copy_(weight)
        if "linear.bias" in expected:
            module.linear.bias.copy_(torch.tensor(expected["linear.bias"]))
    here = {target: each for target, each in changed.updates.items() if target.path == "linear"}
    ak.torch.inject(module, changed.replace(updates=here))
    y = module.linear(torch.tensor(expected["linear.x"])).detach().numpy()
    np.testing.assert_allclose(y, expected["linear.y"], rtol=0, atol=1e-9)


def test_numbers_whose_squares_overflow_are_refused(tmp_path):
    """The norm of a DoRA's row was infinite, and the merged row was zero."""
    fields = {"A": np.array([[1e200, 1.0]]), "B": np.array([[1.0], [1.0]]), "magnitude": np.ones(2)}
    adapter = Adapter({Target("q"): (METHODS["dora"](**{n: from_numpy(array) for n, array in fields.items()}),)})
    save_file({"q.weight": np.eye(2)}, tmp_path / "base.safetensors")
    with pytest.raises(Unsupported, match=r"q: dora\.A: an element's magnitude is above 3e\+150"):
        ak.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")


LONG = {
    "dora by its scaling": ("dora", {"A": (1, 2), "B": (2, 1), "magnitude": (2,)}, {"scaling": 5e299}, 1.0),
    "dora by its weight": ("dora", {"A": (1, 2), "B": (2, 1), "magnitude": (2,)}, {}, 1e200),
    "dora_outputs": ("dora_outputs", {"A": (1, 2), "B": (2, 1), "magnitude": (2,)}, {}, 1e200),
    "weight_norm of outputs": ("weight_norm", {"out": (2,)}, {}, 1e200),
    "weight_norm of inputs": ("weight_norm", {"into": (2,)}, {}, 1e200),
}


@pytest.mark.parametrize("name", LONG)
def test_a_norm_that_overflows_is_refused_and_not_divided_by(tmp_path, name):
    """A row divided by an infinite norm is zero, and zeros are finite: they were written without a word."""
    method, shapes, attributes, size = LONG[name]
    fields = {field: from_numpy(np.ones(shape)) for field, shape in shapes.items()}
    adapter = Adapter({Target("q"): (METHODS[method](**fields, **attributes),)})
    save_file({"q.weight": np.full((2, 2), size)}, tmp_path / "base.safetensors")
    with pytest.raises(Malformed, match=r"q\.weight"):
        ak.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
