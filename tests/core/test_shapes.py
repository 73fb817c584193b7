import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.core.shapes import Axes
from adapterkit.errors import ShapeMismatch

NAMES = ["r", "out", "in", "b", "n_2"]
STARRED = st.lists(st.sampled_from([*NAMES, "3", "out/b", "r*n_2", "2*r"]), max_size=4)


@pytest.mark.parametrize(
    "text", ["r in *k", "out r", "", "4", "out/b b b", "*k", "n_blocks r*n", "e out *rest", "2*r", "out/2", "a*b/c"]
)
def test_the_grammar_holds_names_numbers_products_quotients_and_one_star(text):
    assert Axes.parse(text).axes == tuple(text.split())


@pytest.mark.parametrize(
    "text", ["*a *b", "R", "out/", "/b", "a**b", "*", "*3", "a-b", "2x", "a*2x", "a*B", "**k", "é"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"the shape string .* is not valid"):
        Axes.parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "known", "dims"),
    [
        ("r in *k", (4, 8), {}, {"r": 4, "in": 8, "k": ()}),
        ("r in *k", (4, 8, 3, 3), {}, {"r": 4, "in": 8, "k": (3, 3)}),
        ("*k r", (2, 3, 4), {}, {"k": (2, 3), "r": 4}),
        ("a *k b", (2, 3, 4), {}, {"a": 2, "k": (3,), "b": 4}),
        ("*k", (), {}, {"k": ()}),
        ("", (), {}, {}),
        ("3 r", (3, 5), {}, {"r": 5}),
        ("r", (0,), {}, {"r": 0}),
        ("out/b b b", (4, 2, 2), {"b": 2}, {"b": 2, "out": 8}),
        ("out/b", (4,), {"out": 8}, {"out": 8, "b": 2}),
        ("out/b b b", (4, 2, 2), {"out": 8}, {"out": 8, "b": 2}),
        ("r*n", (6,), {"r": 3}, {"r": 3, "n": 2}),
        ("2*r", (6,), {}, {"r": 3}),
        ("a*b/c", (6,), {"a": 4, "c": 2}, {"a": 4, "c": 2, "b": 3}),
        ("a*b/c", (6,), {"a": 4, "b": 3}, {"a": 4, "b": 3, "c": 2}),
    ],
)
def test_binding_solves_for_the_names(text, shape, known, dims):
    bound = dict(known)
    Axes.parse(text).bind(shape, bound, "x")
    assert bound == dims
    assert Axes.parse(text).sizes(bound) == shape


@pytest.mark.parametrize(
    ("text", "shape", "known"),
    [
        ("out r", (3,), {}),
        ("out r", (3, 4, 5), {}),
        ("r in *k", (4,), {}),
        ("out r", (3, 4), {"r": 5}),
        ("r r", (3, 4), {}),
        ("r *k", (3, 4), {"k": (5,)}),
        ("3 r", (4, 5), {}),
        ("out/b", (4,), {"out": 9}),
        ("out/b", (4,), {"out": 8, "b": 4}),
        ("out/b", (4,), {"out": 8, "b": 0}),
        ("2*r", (5,), {}),
        ("r*n", (6,), {"r": 4}),
    ],
)
def test_what_disagrees_is_named_with_what_was_known(text, shape, known):
    with pytest.raises(ShapeMismatch) as raised:
        Axes.parse(text).bind(shape, dict(known), "factor")
    assert raised.value.where == "factor"
    assert f"shape {list(shape)} does not match [{text}]" in str(raised.value)
    assert all(f"{name}={size}" in str(raised.value) for name, size in known.items())
    assert raised.value.cure


def test_a_quotient_of_two_unknown_names_waits_for_them():
    dims = {}
    Axes.parse("out/b").bind((4,), dims, "x")
    assert dims == {}


@given(STARRED, STARRED, st.booleans(), st.data())
def test_sizes_and_binding_are_inverse(front, back, starred, data):
    text = " ".join([*front, *(["*k"] if starred else []), *back])
    b, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    dims = {"b": b, "out": b * data.draw(st.integers(1, 4)), "in": 7, "r": 5, "n_2": n, "k": (2, 3)}
    axes, bound = Axes.parse(text), dict(dims)
    axes.bind(axes.sizes(dims), bound, "x")
    assert bound == dims


@pytest.mark.parametrize(
    ("text", "axis", "position"),
    [
        ("r in *k", "in", 1),
        ("r in *k", "out", None),
        ("out *k r", "r", -1),
        ("*k a b", "a", -2),
        ("out/b b", "out", None),
    ],
)
def test_an_axis_has_a_position_from_its_own_side_of_the_star(text, axis, position):
    assert Axes.parse(text).index(axis) == position


def test_a_starred_name_may_stand_for_any_number_of_axes():
    assert Axes.parse("a *k").sizes({"a": 2, "k": ()}) == (2,)
    assert Axes.parse("a *k").sizes({"a": 2}) == (2,)
    assert Axes.parse("a *k").sizes({"a": 2, "k": (3, 4)}) == (2, 3, 4)
    with pytest.raises(ValueError, match="several axes"):
        Axes.parse("k*a").sizes({"a": 2, "k": (3, 4)})
