"""Context updates: their formulas, and what may not be done with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from method_vectors import vectors_of

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Malformed, NotMergeable, TargetNotFound
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import as_array, as_torch, from_numpy
from adapterkit.methods import METHODS

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "methods"
CONTEXT = [name for name, cls in METHODS.items() if cls.kind == "context"]
WORDS = ("embeddings", "decoder_embeddings", "past", "vocabulary")
CASES = [
    pytest.param(method, target, id=f"{method}-{target}")
    for method in vectors_of("context")
    for target in ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit").updates
]


def as_numpy(leaf, dtype):
    return torch.as_tensor(as_array(leaf).astype(np.float64)).to(dtype).numpy()


def tensors_of(leaf, dtype):
    return as_torch(leaf, dtype=dtype)


def said(update, inputs):
    """What an update adds, by word."""
    found = {word: getattr(update, word)() for word in WORDS}
    if update.place == "attention":
        found["attention"] = update.attention(*(inputs[name] for name in "qkv"))
    if update.place == "prefix":
        found["prefix"] = update.prefix(inputs["x"])
    return {word: value for word, value in found.items() if value is not None}


@pytest.mark.parametrize("load", [as_numpy, tensors_of])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("method", "target"), CASES)
def test_a_formula_agrees_with_its_vector(method, target, dtype, tolerance, load):
    file = open_checkpoint(VECTORS / f"{method}.expected.safetensors")
    expected = {n.removeprefix(f"{target}."): leaf for n, leaf in file.tensors.items() if n.startswith(f"{target}.")}
    adapter = ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit")
    (update,) = adapter.updates[target]
    got = said(update.map(lambda leaf: load(leaf, dtype)), {n: load(leaf, dtype) for n, leaf in expected.items()})
    assert got.keys() == expected.keys() - {"q", "k", "v", "x"}
    assert update.place in got
    for word, value in got.items():
        wanted = expected[word].torch()
        assert tuple(value.shape) == tuple(wanted.shape)
        assert float((torch.as_tensor(value).double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


MERGED = [
    ("", METHODS["prompt"](P=from_numpy(np.ones((2, 4)))), "the context of the model"),
    ("", METHODS["prefix"](P=from_numpy(np.ones((1, 2, 1, 2, 4)))), "the context of the model"),
    (
        "model.attn",
        METHODS["adaption_prompt"](P=from_numpy(np.ones((2, 4))), gate=from_numpy(np.ones(1))),
        "the keys and values of the attention",
    ),
    ("model.emb", METHODS["textual_inversion"](P=from_numpy(np.ones((2, 4)))), "the vocabulary of the model"),
]
BASE = {"model.emb.weight": np.ones((6, 4)), "model.attn.q.weight": np.ones((4, 4))}


@pytest.mark.parametrize(("path", "update", "what"), MERGED)
def test_nothing_of_it_is_merged_and_the_reason_is_said(path, update, what, base, tmp_path):
    checkpoint, adapter = base(BASE), Adapter({Target(path): (update,)})
    shown = path or "(model)"
    with pytest.raises(NotMergeable, match=f"{update.method} changes {what}, not weights") as raised:
        ak.merge(checkpoint, adapter, tmp_path / "out")
    assert raised.value.where == shown
    assert "live model" in raised.value.cure
    for given in (None, checkpoint):
        with pytest.raises(NotMergeable, match=f"changes {what}"):
            adapter.delta(path, base=given)
    assert not (tmp_path / "out").exists()
    ak.write(adapter, tmp_path / "a.safetensors")
    done = CliRunner().invoke(
        adapterkit, ["merge", str(tmp_path / "base"), str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 3
    assert shown in done.stderr
    assert f"changes {what}, not weights" in done.stderr


@pytest.mark.parametrize(("path", "update"), [case[:2] for case in MERGED])
def test_it_is_shown_and_validated_against_a_base(path, update, base, tmp_path):
    base(BASE)
    ak.write(Adapter({Target(path): (update,)}), tmp_path / "a.safetensors")
    shown = CliRunner().invoke(adapterkit, ["inspect", str(tmp_path / "a.safetensors")])
    assert shown.exit_code == 0
    assert update.method in shown.stdout
    assert (path or "(model)") in shown.stdout
    done = CliRunner().invoke(
        adapterkit, ["validate", str(tmp_path / "a.safetensors"), "--base", str(tmp_path / "base")]
    )
    assert (done.exit_code, done.stderr) == (0, "")


def test_parts_have_the_bases_own_names(base):
    checkpoint = base(BASE)
    inside, lora = MERGED[2][1], METHODS["lora"](A=from_numpy(np.ones((1, 4))), B=from_numpy(np.ones((4, 1))))
    for path, other in (("attn", "attn.q"), ("x.model.attn", "x.model.attn.q"), ("model.attn", "model.attn.q")):
        bound = Adapter({Target(path): (inside,), Target(other): (lora,)}).bind(checkpoint)
        assert {str(target) for target in bound.updates} == {"model.attn", "model.attn.q"}
        assert {str(target) for target in Adapter({Target(path): (inside,)}).bind(checkpoint).updates} == {"model.attn"}
    with pytest.raises(TargetNotFound, match="does not have this module") as raised:
        Adapter({Target("model.attm"): (inside,)}).bind(checkpoint)
    assert raised.value.where == "model.attm"
    assert "model.attn" in raised.value.cure


@pytest.mark.parametrize(
    "target",
    [Target("", "in out *k"), Target("", rows=(0, 2)), Target("attn", "e out *in"), Target("attn", rows=(0, 2))],
)
def test_context_has_no_layout_and_no_rows(target):
    with pytest.raises(Malformed, match="must not have a layout or rows"):
        Adapter({target: (METHODS["prompt"](P=from_numpy(np.ones((2, 4)))),)}).validate()


def test_the_whole_model_takes_context_alone(tmp_path):
    prompt, lora = (
        METHODS["prompt"](P=from_numpy(np.ones((2, 4)))),
        METHODS["lora"](A=from_numpy(np.ones((1, 4))), B=from_numpy(np.ones((4, 1)))),
    )
    for updates in ((lora,), (prompt, lora)):
        with pytest.raises(Malformed, match="without a path"):
            ak.write(Adapter({Target(""): updates}), tmp_path / "x.safetensors")
    ak.write(Adapter({Target(""): (prompt, prompt), Target("q"): (lora,)}), tmp_path / "x.safetensors")
    back = ak.read(tmp_path / "x.safetensors")
    assert [(str(target), update.method) for target, update in back] == [
        ("(model)", "prompt"),
        ("(model)", "prompt"),
        ("q", "lora"),
    ]
    assert list(open_checkpoint(tmp_path / "x.safetensors").tensors) == ["P", "q.A", "q.B"]


@pytest.mark.parametrize(
    ("method", "attributes", "why"),
    [
        ("prompt", {"used": 3}, "used <= n does not hold with used=3, n=2"),
        ("prompt", {"used": -1}, "0 <= used and used <= n does not hold with used=-1"),
        ("prefix", {"step": 0}, "step: 0 is below 1"),
        ("multitask_prompt", {"task": 2}, "does not hold with task=2, tasks=2"),
        ("multitask_prompt", {"decoder": True}, "n % 2 == 0 does not hold with n=3"),
    ],
)
def test_attributes_keep_to_their_tensors(method, attributes, why):
    shapes = {
        "prompt": {"P": (2, 4)},
        "prefix": {"P": (2, 2, 1, 3, 4)},
        "multitask_prompt": {"P": (3, 4), "columns": (2, 3, 1), "rows": (2, 1, 4)},
    }[method]
    update = METHODS[method](**{name: from_numpy(np.ones(shape)) for name, shape in shapes.items()}, **attributes)
    with pytest.raises(Malformed, match=why) as raised:
        Adapter({Target(""): (update,)}).validate()
    assert raised.value.where.startswith(f"(model): {method}.")


def test_tasks_of_rows_are_taken_row_by_row():
    rng = np.random.default_rng(0)
    P, columns, rows = rng.normal(size=(3, 4)), rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 2, 4))
    for turn in (np.asarray, torch.as_tensor):
        update = METHODS["multitask_prompt"](P=turn(P), columns=turn(columns), rows=turn(rows), task=3)
        np.testing.assert_allclose(np.asarray(update.embeddings()), P * (columns[3] @ rows[3]))
        np.testing.assert_allclose(
            np.asarray(update.embeddings(turn(np.array([4, 0])))),
            np.stack([P * (columns[t] @ rows[t]) for t in (4, 0)]),
        )


def test_a_bounded_change_of_zero_can_be_trained():
    update = METHODS["cpt"](E=torch.zeros(2, 3), D=torch.zeros(2, 3, requires_grad=True), epsilon=torch.ones(2))
    update.embeddings().sum().backward()
    assert torch.equal(update.D.grad, torch.ones(2, 3))
