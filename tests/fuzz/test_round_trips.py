"""Properties over the registries: bits survive formats, sums are float64 formulas, and merging rounds once."""

from pathlib import Path

import numpy as np
import pytest
from format_vectors import EVERY, base_with_config, source
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit import ops
from adapterkit.core.adapter import Adapter, Target
from adapterkit.formats import FORMATS
from adapterkit.io.lazy import Lazy, as_array, as_lazy
from adapterkit.methods import METHODS

ADDITIVE = sorted(name for name, cls in METHODS.items() if cls.kind == "additive")
SHAPE = (8, 16)
KEPT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Types whose bits are drawn; positions, masks and quantized blocks have to stay what they are."""

NATIVE = sorted((Path(__file__).parents[2] / "spec" / "vectors" / "methods").glob("*.adapter.safetensors"))


def refilled(adapter, seed):
    """The same adapter with other bits in every trained tensor: subnormal, of any exponent below 2, negative zero.

    Tensors that are not trained are often not in a file: a seed stands for them.
    """
    rng = np.random.default_rng(seed)
    given = {id(leaf) for _, update in adapter for name, leaf in update.tensors.items() if name in update.frozen}

    def other(leaf):
        tensor = as_lazy(leaf)
        width = KEPT.get(tensor.dtype.name)
        if width is None or not tensor.shape or id(leaf) in given:
            return leaf
        count = int(np.prod(tensor.shape))
        bits = rng.integers(0, 256, count * width, dtype=np.uint8).reshape(count, width)
        # The second highest bit of the exponent cleared: below 2, so that no norm and no rotation overflows.
        bits[:, -1] &= 0xBF
        data = bits.tobytes()
        return Lazy(tensor.shape, tensor.dtype, lambda: data)

    return adapter.map(other)


def bits(adapter):
    """Everything that an adapter computes with, to the last bit."""
    return {
        (str(target), position, update.method, name): (leaf.dtype.name, tuple(leaf.shape), bytes(as_lazy(leaf).fetch()))
        for target, updates in adapter.updates.items()
        for position, update in enumerate(updates)
        for name, leaf in update.tensors.items()
    }


def attributes(adapter):
    return [
        (str(target), update.method, update.attributes) for target, update in sorted(adapter, key=lambda p: str(p[0]))
    ]


VECTORS = [folder for folder in EVERY if folder.parent.name in FORMATS]
# The heads of Keras Hub's files share B, so its writer makes other factors of the same change, which
# tests/formats/test_keras_hub.py compares.
ONE_EACH = [
    next(f for f in VECTORS if f.parent.name == name)
    for name in sorted({f.parent.name for f in VECTORS} - {"keras_hub"})
]


@pytest.mark.parametrize("folder", ONE_EACH, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bits_go_through_a_format_and_the_native_one_and_back(folder, seed, tmp_path_factory):
    name, path = folder.parent.name, source(folder)
    adapter = refilled(ak.read(path, name, base_with_config(folder)), seed)
    place = tmp_path_factory.mktemp("trip")
    first = place / "first" / (path.name if path.is_file() else "adapter")
    first.parent.mkdir()
    assert ak.write(adapter, first, name, base_with_config(folder)) == []
    read = ak.read(first, name, base_with_config(folder))
    assert bits(read) == bits(adapter)
    assert attributes(read) == attributes(adapter)
    ak.write(read, place / "native")
    native = ak.read(place / "native", "adapterkit")
    assert bits(native) == bits(adapter)
    assert native.digest() == read.digest()
    second = place / "second" / first.name
    second.parent.mkdir()
    ak.write(native, second, name, base_with_config(folder))
    assert bits(ak.read(second, name, base_with_config(folder))) == bits(adapter)


@pytest.mark.parametrize("path", NATIVE[::4], ids=lambda path: path.name.partition(".")[0])
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bits_go_through_the_native_format(path, seed, tmp_path_factory):
    adapter = refilled(ak.read(path), seed)
    out = tmp_path_factory.mktemp("native") / "x.safetensors"
    ak.write(adapter, out)
    assert bits(ak.read(out)) == bits(adapter)
    assert ak.read(out).digest() == adapter.digest()


def change(adapter):
    """What an adapter adds to a weight of SHAPE, by its methods' formulas in float64."""
    total = np.zeros(SHAPE)
    for _, update in adapter:
        if update.changes_weight:
            total += update.map(lambda leaf: _float64(leaf)).delta(SHAPE)
    return total


def _float64(leaf):
    array = np.array(as_array(leaf))
    return array.astype(np.float64) if leaf.dtype.floating else array


def close(got, wanted, *terms):
    size = max(float(np.abs(term).max()) for term in (wanted, *terms))
    assert np.abs(got - wanted).max() <= 1e-12 * max(size, 1e-300)


@st.composite
def adapters(draw, made):
    update = draw(made.updates(method=draw(st.sampled_from(ADDITIVE)), kernel=()))
    assume(made.takes(update, SHAPE))
    return Adapter({Target("q"): (update,)})


@pytest.fixture(scope="module")
def zeros(tmp_path_factory):
    """A base that tells the weight's shape to formulas whose tensors do not."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file({"q.weight": np.zeros(SHAPE), "q.bias": np.zeros(SHAPE[0])}, path)
    return path


@given(data=st.data(), v=st.floats(-2, 2), w=st.floats(-2, 2))
def test_scaling_and_adding_are_linear(data, v, w, made, zeros):
    a, b = data.draw(adapters(made)), data.draw(adapters(made))
    da, db = change(a), change(b)
    close(change(ops.scale(a, v, base=zeros)), v * da)
    close(change(ops.scale(ops.scale(a, v, base=zeros), w, base=zeros)), v * w * da)
    close(change(ops.add([a, b], weights=[v, w], base=zeros)), v * da + w * db, v * da, w * db)
    close(change(ops.add([b, a], weights=[w, v], base=zeros)), v * da + w * db, v * da, w * db)
    close(change(ops.stack([a, b], weights=[v, w], base=zeros)), v * da + w * db, v * da, w * db)
    close(change(ops.add([a, ops.scale(a, -1.0, base=zeros)], base=zeros)), np.zeros(SHAPE), da)


@given(data=st.data())
def test_scaling_by_one_changes_no_bit(data, made, zeros):
    adapter = data.draw(adapters(made))
    assert bits(ops.scale(adapter, 1.0, base=zeros)) == bits(adapter)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@settings(max_examples=12)
@given(data=st.data(), v=st.floats(-2, 2), seed=st.integers(0, 2**32 - 1))
def test_merging_is_the_formula_rounded_once(dtype, data, v, seed, made, tmp_path_factory):
    adapters_ = [data.draw(adapters(made)) for _ in range(data.draw(st.integers(1, 2)))]
    folder = tmp_path_factory.mktemp("merge")
    weight = np.random.default_rng(seed).normal(size=SHAPE).astype(dtype)
    save_file({"q.weight": weight, "q.bias": np.zeros(SHAPE[0], dtype)}, folder / "base.safetensors")
    weights = [v, *[1.0] * (len(adapters_) - 1)]
    ak.merge(folder / "base.safetensors", adapters_, folder / "out.safetensors", weights=weights, device="cpu")
    got = load_file(folder / "out.safetensors")["q.weight"]
    terms = [w * change(adapter) for w, adapter in zip(weights, adapters_, strict=True)]
    exact = weight.astype(np.float64) + sum(terms)
    # Half a unit in the last place, and what float64 sums in another order differ by.
    unit = np.spacing(np.abs(exact).astype(dtype)).astype(np.float64)
    noise = 1e-13 * max(float(np.abs(term).max()) for term in (weight, *terms))
    assert (np.abs(got.astype(np.float64) - exact) <= 0.501 * unit + noise).all()
