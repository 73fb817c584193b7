"""What a PEFT file has no words for is listed, and left out or folded only if the caller says so."""

import math

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import Unrepresentable
from adapterkit.io.computed import load
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS


def ones(*shape):
    return np.ones(shape, np.float32)


def lora(r=2, out=4, in_=6, **fields):
    leaves = {"A": ones(r, in_), "B": ones(out, r), **{k: v for k, v in fields.items() if isinstance(v, np.ndarray)}}
    rest = {k: v for k, v in fields.items() if not isinstance(v, np.ndarray)}
    return METHODS["dora" if "magnitude" in fields else "lora"](**{k: from_numpy(v) for k, v in leaves.items()}, **rest)


def adapter(**updates):
    return ak.Adapter({ak.Target(path): u if isinstance(u, tuple) else (u,) for path, u in updates.items()})


BOTH = "c: a PEFT file cannot store both"
UNREPRESENTABLE = {
    "two methods": (adapter(a=lora(), b=lora(), c=METHODS["ia3"](l=from_numpy(ones(4)))), f"{BOTH} ia3 and lora"),
    "DoRA and LoRA": (adapter(a=lora(), b=lora(), c=lora(magnitude=ones(4))), f"{BOTH} dora and lora"),
    "another method": (adapter(a=lora(), c=METHODS["dense"](D=from_numpy(ones(4, 6)))), f"{BOTH} dense and lora"),
    "some biases": (adapter(a=lora(), b=lora(), c=lora(bias=ones(4))), "c: this lora has a bias, but others have none"),
    "rows of a weight": (
        ak.Adapter({ak.Target("a"): (lora(),), ak.Target("c", rows=(0, 4)): (lora(),)}),
        "c[0:4]: PEFT does not support lora on some rows",
    ),
    "an unnamed embedding": (
        ak.Adapter({ak.Target("a"): (lora(),), ak.Target("c", "in out *k"): (lora(),)}),
        "c: its keys depend on whether",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREPRESENTABLE)
def test_what_peft_has_no_words_for(case, tmp_path):
    source, line = UNREPRESENTABLE[case]
    with pytest.raises(Unrepresentable) as raised:
        ak.write(source, tmp_path / "a", "peft")
    assert any(item.startswith(line) for item in raised.value.items)
    assert not (tmp_path / "a").exists()
    lines = ak.write(source, tmp_path / "a", "peft", on_loss="drop")
    assert lines
    assert all(found.startswith("left out c") for found in lines)
    assert "c" not in {target.path for target, _ in ak.read(tmp_path / "a")}


@pytest.mark.parametrize(("scaling", "lines"), [(1.0, ["joined 2 LoRAs of a into one of rank 4"]), (0.0, [])])
def test_two_of_a_kind_at_one_target(scaling, lines, tmp_path):
    source = adapter(a=(lora(scaling=scaling), lora(scaling=3.0)))
    assert ak.write(source, tmp_path / "a", "peft") == lines
    ((_, joined),) = ak.read(tmp_path / "a")
    wanted = sum(update.scaling * load(update.B) @ load(update.A) for _, update in source)
    np.testing.assert_allclose(joined.scaling * load(joined.B) @ load(joined.A), wanted, rtol=1e-6, atol=1e-6)


def test_rows_of_which_the_first_have_no_scaling(tmp_path):
    parts = {(0, 4): lora(scaling=0.0), (4, 8): lora(scaling=3.0)}
    save_file({"a.weight": ones(8, 6)}, tmp_path / "base.safetensors")
    source = ak.Adapter({ak.Target("a", rows=rows): (update,) for rows, update in parts.items()})
    ak.write(source, tmp_path / "a", "peft", base=tmp_path / "base.safetensors")
    ((_, joined),) = ak.read(tmp_path / "a")
    wanted = np.concatenate([update.scaling * load(update.B) @ load(update.A) for update in parts.values()])
    np.testing.assert_allclose(joined.scaling * load(joined.B) @ load(joined.A), wanted, rtol=1e-6, atol=1e-6)


def test_names_that_end_alike_keep_their_scalings(tmp_path):
    """A plain pattern `q` would fit `b.q`, and a plain `b.q` would fit `b-q`."""
    scalings = {"q": 2.0, "b.q": 1.0, "c.q": 1.0, "b-q": 3.0, "x.b.q": 4.0}
    ak.write(adapter(**{path: lora(scaling=scaling) for path, scaling in scalings.items()}), tmp_path / "a", "peft")
    assert {target.path: update.scaling for target, update in ak.read(tmp_path / "a")} == scalings


def test_a_scaling_that_no_alpha_gives_is_folded_if_allowed(tmp_path):
    scaling = next(
        s for s in (0.1 * math.sqrt(n) for n in range(1, 200))
        if not any(a / d == s for d in (3, math.sqrt(3)) for a in near(s * d))
    )  # fmt: skip
    source = adapter(a=lora(r=3, scaling=scaling), b=lora(r=3, scaling=2.0))
    with pytest.raises(Unrepresentable, match="a: no alpha yields its exact scaling"):
        ak.write(source, tmp_path / "a", "peft")
    assert ak.write(source, tmp_path / "a", "peft", on_loss="fold") == ["folded the scaling into B of a"]
    read = ak.read(tmp_path / "a")
    np.testing.assert_allclose(read.delta("a").numpy(), source.delta("a").numpy(), rtol=1e-7)
    assert read.delta("b").equal(source.delta("b"))


def near(value):
    """Every float within four units in the last place."""
    found = [value]
    for towards in (math.inf, -math.inf):
        step = value
        for _ in range(4):
            step = math.nextafter(step, towards)
            found.append(step)
    return found


def test_a_bias_that_peft_cannot_have_is_refused_also_if_every_lora_has_one(tmp_path):
    token = METHODS["lora"](A=from_numpy(ones(2, 9)), B=from_numpy(ones(4, 2)), bias=from_numpy(ones(4)))
    updates = {ak.Target("model.embed_tokens", "in out *k"): (token,), ak.Target("a"): (lora(bias=ones(4)),)}
    both = ak.Adapter(updates)
    with pytest.raises(Unrepresentable, match="embed_tokens: PEFT does not support lora with a bias"):
        ak.write(both, tmp_path / "refused", "peft")
    lost = ak.write(both, tmp_path / "out", "peft", on_loss="drop")
    assert [line.partition(": ")[0] for line in lost] == ["left out model.embed_tokens"]
    assert [str(target) for target in ak.read(tmp_path / "out").updates] == ["a"]
