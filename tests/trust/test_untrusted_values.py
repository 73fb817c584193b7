"""Values from untrusted files: numbers that no float holds, text that no file holds, long file names."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, BaseRef, Foreign, Step, Target, check_json
from adapterkit.errors import (
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    TargetNotFound,
    Unrepresentable,
    Unsupported,
    UsageError,
    shown,
)
from adapterkit.formats import FORMATS
from adapterkit.formats._kit import is_finite, whole_rank
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA
from adapterkit.methods.lora_xs import LoRAXS
from adapterkit.methods.nola import NOLA

HUGE = 16**5000
CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"


def lora(**more):
    factors = {"A": from_numpy(np.ones((2, 4), "f4")), "B": from_numpy(np.ones((3, 2), "f4"))}
    return Adapter({Target("q"): (LoRA(**factors),)}, **more)


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 2**53 + 1, HUGE, True, None, "1", [1], float("nan"), float("inf")], ids=shown
)
def test_a_number_must_be_finite_and_held_exactly_by_a_float(value):
    with pytest.raises(Malformed, match="is not a finite number") as raised:
        is_finite(value, "config: alpha")
    assert raised.value.where == "config: alpha"
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("value", [0, 16, -3, 2**53, 0.5, 1e308, 5e-324])
def test_other_numbers_are_taken_as_they_are(value):
    assert is_finite(value, "alpha") == value
    assert isinstance(is_finite(value, "alpha"), float)


@pytest.mark.parametrize("value", [0, -1, 2**31 + 1, 10**400, HUGE, 2.0, True, "2", None], ids=shown)
def test_a_rank_is_an_integer_from_one_to_two_to_the_31(value):
    with pytest.raises(Malformed, match="is not a rank"):
        whole_rank(value, "config: r")
    assert whole_rank(2**31, "r") == 2**31


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {"b": float("nan")}]}, "foreign.a[1].b"),
        ({"a": {1: 2}}, "foreign.a"),
        ({"\udc80": 1}, "foreign"),
        ({"a": "\ud800"}, "foreign.a"),
        ({"a": HUGE}, "foreign.a"),
        ({"a": {1, 2}}, "foreign.a"),
        ({"a": b"x"}, "foreign.a"),
    ],
    ids=shown,
)
def test_what_travels_along_is_plain_json(value, place, tmp_path):
    with pytest.raises(Malformed) as raised:
        check_json(value, "foreign")
    assert raised.value.where == place
    adapter = lora(foreign=Foreign("x", value))
    with pytest.raises(Malformed):
        adapter.validate()
    with pytest.raises(Malformed):
        ak.write(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nesting_and_size_are_bounded():
    deep, wide = [], ["x"]
    for _ in range(200):
        deep = [deep]
    for _ in range(7):
        wide = [wide] * 60
    ring = []
    ring.append(ring)
    for value, words in ((deep, "nested more than"), (wide, "values"), (ring, "nested more than")):
        with pytest.raises(Malformed, match=words):
            check_json(value, "x")


@pytest.mark.parametrize(
    "more",
    [
        {"recipe": (Step("x", {"a": float("inf")}),)},
        {"base": BaseRef("\ud800")},
        {"extensions": {"a": HUGE}},
    ],
)
def test_every_record_is_checked(more):
    with pytest.raises(Malformed):
        lora(**more).validate()


@pytest.mark.parametrize("name", FORMATS)
def test_a_refused_output_leaves_nothing_behind(name, tmp_path):
    adapter = lora(foreign=Foreign(name, {"a": float("nan")}))
    with pytest.raises(AdapterkitError):
        ak.write(adapter, tmp_path / "out", name)
    assert not list(tmp_path.iterdir())


def test_a_value_is_shown_short_whatever_it_is():
    assert shown("abc") == "'abc'"
    assert shown([1, None, 0.5]) == "[1, None, 0.5]"
    for value in (HUGE, [HUGE], {"a": {"b": HUGE}}, "x" * 9999, ["x" * 9999] * 9999):
        assert len(shown(value)) <= 120


def test_an_error_has_a_bounded_length_and_prints():
    long, strange = "x" * 70_000, "a\ud800b"
    error = Malformed(long, where=long, cure=long)
    assert len(str(error)) < 3200
    assert len(str(Malformed("x").at(where=long))) < 1100
    str(Malformed(strange, where=strange, cure=strange)).encode()
    items = tuple(f"target {n}" for n in range(5000))
    assert Unrepresentable("no words", items=items).items == items


@pytest.mark.parametrize("name", ["x" * 256, "a/" + "y" * 300, "é" * 200], ids=ascii)
def test_an_index_names_files_that_a_file_system_takes(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
    with pytest.raises(Malformed, match="not a plain relative path") as raised:
        open_checkpoint(tmp_path)
    str(raised.value).encode()


def test_an_index_with_half_a_surrogate_pair_is_no_json(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "\\ud800.safetensors"}}')
    with pytest.raises(Malformed, match="surrogates not allowed") as raised:
        open_checkpoint(tmp_path)
    str(raised.value).encode()


def test_an_indexs_metadata_is_an_object(tmp_path):
    save_file({"a": np.ones(2, "f4")}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": 1, "weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(Malformed, match="metadata must be a JSON object, got 1") as raised:
        open_checkpoint(tmp_path)
    assert raised.value.where == "metadata"


def test_a_name_that_is_no_text_is_no_entry_of_a_registry():
    with pytest.raises(Unsupported, match="is not the name of a format"):
        FORMATS[["x"]]


def test_errors_of_a_merge_name_the_base_and_those_of_a_call_do_not(tmp_path):
    save_file({"other.weight": np.ones((3, 4), "f4")}, tmp_path / "base.safetensors")
    with pytest.raises(TargetNotFound) as raised:
        ak.merge(tmp_path / "base.safetensors", lora(), tmp_path / "out.safetensors")
    assert raised.value.path == str(tmp_path / "base.safetensors")
    with pytest.raises(UsageError) as raised:
        ak.merge(base=tmp_path / "base.safetensors", adapters=[lora()], out=tmp_path / "out", weights=[1, 2])
    assert raised.value.path is None


def test_a_change_whose_squared_norm_is_no_float_is_merged(tmp_path):
    save_file({"q.weight": np.zeros((3, 4), "f8")}, tmp_path / "base.safetensors")
    adapter = lora()
    big = adapter.replace(updates={Target("q"): tuple(u.replace(scaling=1e200) for u in adapter.updates[Target("q")])})
    report = ak.merge(tmp_path / "base.safetensors", big, tmp_path / "out.safetensors", device="cpu")
    assert np.array_equal(load_file(tmp_path / "out.safetensors")["q.weight"], np.full((3, 4), 2e200))
    assert report.norms["q.weight"][0] > 1e154


VERBS = {
    "merge": lambda good, bad, folder: ak.merge(folder / "base.safetensors", [good, bad], folder / "out"),
    "linear": lambda good, bad, folder: ak.write(
        ak.ops.combine([good, bad], method="linear"), folder / "out", format="peft"
    ),
    "ties": lambda good, bad, _: ak.ops.combine([good, bad], method="ties", rank=2),
    "resize": lambda _, bad, __: ak.ops.resize(bad, rank=1),
    "compare": lambda good, bad, _: ak.ops.compare(good, bad),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_number_that_is_not_finite_is_named_with_the_file_that_holds_it(tmp_path, verb):
    save_file({"q.weight": np.zeros((3, 4), "f4")}, tmp_path / "base.safetensors")
    ak.write(lora(), tmp_path / "good", format="peft")
    ak.write(lora(), tmp_path / "bad", format="peft")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key][1, 0] = np.nan
    save_file(tensors, file)
    good, bad = ak.read(tmp_path / "good"), ak.read(tmp_path / "bad")
    with pytest.raises(Malformed, match=r"NaN or an infinity at \[1, 0\]") as raised:
        VERBS[verb](good, bad, tmp_path)
    assert raised.value.path == str(file)


@pytest.mark.parametrize("verb", ["ties", "resize", "compare"])
def test_a_change_whose_squared_norm_is_no_float_is_refused_where_it_is_squared(verb):
    adapter = lora()
    big = adapter.replace(updates={Target("q"): tuple(u.replace(scaling=1e200) for u in adapter.updates[Target("q")])})
    with pytest.raises(Malformed, match="too large for float64"):
        VERBS[verb](adapter, big, None)


def test_nola_without_random_matrices_is_the_matrix_that_was_there_before(tmp_path):
    none = {"alpha": np.zeros(0, "f4"), "beta": np.zeros(0, "f4")}
    bases = {"A_bases": np.zeros((0, 0, 4), "f4"), "B_bases": np.zeros((0, 3, 0), "f4")}
    update = NOLA(**{name: from_numpy(value) for name, value in (none | bases).items()})
    save_file({"q.weight": np.ones((3, 4), "f4")}, tmp_path / "base.safetensors")
    ak.merge(tmp_path / "base.safetensors", Adapter({Target("q"): (update,)}), tmp_path / "out.safetensors")
    assert np.array_equal(load_file(tmp_path / "out.safetensors")["q.weight"], np.ones((3, 4), "f4"))


def test_a_formula_that_cannot_be_computed_is_a_typed_error_with_the_file(tmp_path):
    """A rank of 0 passes the check of shapes; not every formula has a value for it."""
    save_file({"q.weight": np.ones((3, 4), "f4")}, tmp_path / "base.safetensors")
    update = LoRAXS(
        A=from_numpy(np.zeros((0, 4), "f4")), B=from_numpy(np.zeros((3, 0), "f4")), R=from_numpy(np.zeros((0, 0), "f4"))
    )
    ak.write(Adapter({Target("q"): (update,)}), tmp_path / "adapter.safetensors")
    adapter = ak.read(tmp_path / "adapter.safetensors")
    with pytest.raises(ShapeMismatch, match="formula of lora_xs cannot be computed") as raised:
        ak.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    assert raised.value.path == str(tmp_path / "adapter.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_change_below_float32_is_promoted_to_none(tmp_path):
    """Its LoRA's factors round to zero: that is what float32 makes of it, and no fault of the writer."""
    rng = np.random.default_rng(0)
    shapes = {"A_bases": (3, 2, 4), "B_bases": (2, 3, 2), "alpha": (3,), "beta": (2,)}
    tensors = {name: from_numpy(rng.normal(size=shape).astype("f4")) for name, shape in shapes.items()}
    adapter = Adapter({Target("q"): (NOLA(**tensors, scaling=5e-321),)})
    lines = ak.write(adapter, tmp_path / "out", format="peft", on_loss="promote")
    assert any("LoRA" in line for line in lines)
    assert float(ak.read(tmp_path / "out").delta("q").abs().max()) < 1e-37


def test_an_error_of_many_items_is_no_longer_than_a_screen():
    items = [f"model.layers.{n}.self_attn.q_proj.{'x' * 60}: a reason" for n in range(150)]
    text = str(Unrepresentable("no words for these updates", items=items, path="x", cure="Drop them"))
    shown = sum(item in text for item in items)
    assert len(text) < 4000
    assert shown > 20
    assert f"and {150 - shown} more lines" in text
