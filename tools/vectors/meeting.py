"""Vectors of adapters that meet a base: merges, and outputs of layers that several updates change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from container import Stored, layout, native, numbers, pack, stored
from invalid.case import LORA, RECORD, TENSORS
from methods import nola
from sublayers import normed

A, B = TENSORS["q.A"], TENSORS["q.B"]
DELTA = 0.5 * (numbers("invalid.B", 3, 2) @ numbers("invalid.A", 2, 4))
"""What the valid file's LoRA adds to a weight of 3 x 4."""

Tensors = dict[str, Stored]


@dataclass(frozen=True)
class Meeting:
    """An adapter, a base and what must come of them.

    Attributes:
        name: of the case.
        adapter: the file.
        base: the base's tensors, or the bytes of a file that is none.
        merged: the tensors that differ afterwards, or None where it must be refused.
        rules: the requirements.
        error: the class of the refusal.
        where: what its place must contain.
    """

    name: str
    adapter: bytes
    base: Tensors | bytes
    merged: Tensors | None
    rules: tuple[str, ...]
    error: str = ""
    where: str = ""


def _real(seed: str, *shape: int) -> Stored:
    return stored(numbers(f"meeting.{seed}", *shape), "F32")


def _values(seed: str, *shape: int) -> np.ndarray:
    return numbers(f"meeting.{seed}", *shape)


def _update(method: str = "lora", path: str = "q", attributes: dict[str, Any] | None = None, **target: Any) -> Any:
    """An update of a method; its tensors are called as its fields are."""
    fields = {"lora": "AB", "bottleneck": ("down", "up"), "rows": ("index", "values")}.get(method, ())
    record = {"target": {"path": path, **target}, "method": method, "version": 1, "attributes": attributes or {}}
    return record | {"tensors": {name: name for name in fields}}


def _file(*updates: Mapping[str, Any], **tensors: Stored) -> bytes:
    return native({"version": "1.0", "updates": list(updates)}, tensors)


def _one(
    method: str, attributes: dict[str, Any] | None = None, target: Any = None, version: int = 1, **tensors: Stored
) -> bytes:
    """A file of one update that holds the given tensors."""
    update = {"target": target or {"path": "q"}, "method": method, "version": version, "attributes": attributes or {}}
    return _file(update | {"tensors": {name: name for name in tensors}}, **tensors)


PLAIN = native(RECORD, TENSORS)
W = _values("W", 3, 4)
BIASED = LORA | {"tensors": {"A": "A", "B": "B", "bias": "bias"}}
BIAS = {"A": A, "B": B, "bias": _real("bias", 3)}
CHANGED = stored(W + DELTA, "F32")
b = _values("b", 3)
CHANGED_BIAS = stored(b + 0.5 * _values("bias", 3), "F32")


def meetings() -> Iterator[Meeting]:
    """Merges that come out, then those that are refused."""
    yield from _names()
    yield from _numbers()
    yield from _quotients()
    yield from _refused()
    yield from _ordered()
    yield from _ordered_in_the_base()


def _names() -> Iterator[Meeting]:
    """Which tensors of a base a path means."""
    weight, bias = stored(W, "F32"), stored(b, "F32")
    at_parameter = BIASED | {"target": {"path": "attn.in_proj_weight"}}
    yield Meeting(
        "parameter", _file(at_parameter, **BIAS), {"attn.in_proj_weight": weight, "attn.in_proj_bias": bias},
        {"attn.in_proj_weight": CHANGED, "attn.in_proj_bias": CHANGED_BIAS}, ("R-10.4", "R-10.7"),
    )  # fmt: skip
    of_module = BIASED | {"target": {"path": "q.weight"}}
    yield Meeting(
        "parameter_of_a_module", _file(of_module, **BIAS), {"q.weight": weight, "q.bias": bias},
        {"q.weight": CHANGED, "q.bias": CHANGED_BIAS}, ("R-10.4", "R-10.7"),
    )  # fmt: skip
    yield Meeting(
        "module_before_parameter", PLAIN, {"q": weight, "q.weight": weight}, {"q.weight": CHANGED}, ("R-10.7",)
    )
    inside = BIASED | {"target": {"path": "reweighted.weights"}}
    yield Meeting(
        "parameter_with_the_word_twice", _file(inside, **BIAS),
        {"reweighted.weights": weight, "reweighted.biass": bias},
        {"reweighted.weights": CHANGED, "reweighted.biass": CHANGED_BIAS}, ("R-10.7",),
    )  # fmt: skip
    part = BIASED | {"target": {"path": "q", "rows": [0, 3]}}
    fused = {"q.weight": _real("fused", 5, 4), "q.bias": _real("b", 4)}
    whole, vector = _values("fused", 5, 4), _values("b", 4)
    whole[:3] += DELTA
    vector[:3] += 0.5 * _values("bias", 3)
    changed = {"q.weight": stored(whole, "F32"), "q.bias": stored(vector, "F32")}
    yield Meeting("bias_shorter_than_the_weight", _file(part, **BIAS), fused, changed, ("R-8.5",))
    held = {"weight": weight, "bias": bias}
    alone = _one("replacement", bias=_real("bias", 3))
    tensor, scale = {"q.weight": weight}, _values("l", 3)[:, None]
    module, parameter = ({"target": {"path": path}} for path in ("q", "q.weight"))
    ia3 = _update("ia3", attributes={}) | {"tensors": {"l": "l"}}
    twice = _file(LORA | module | {"tensors": {"A": "A", "B": "B"}}, ia3 | parameter, A=A, B=B, l=_real("l", 3))
    both = {"q.weight": stored((W + DELTA) * scale, "F32")}
    yield Meeting("two_targets_of_one_tensor", twice, tensor, both, ("R-10.4", "R-10.7"))
    upper, lower = ({"target": {"path": "q", "rows": rows}} for rows in ([0, 3], [2, 5]))
    overlap = _file(LORA | lower | {"tensors": {"A": "A", "B": "B"}}, ia3 | upper, A=A, B=B, l=_real("l", 3))
    fifth = _values("fused", 5, 4)
    fifth[2:] += DELTA
    fifth[:3] *= scale
    fused_alone = {"q.weight": fused["q.weight"]}
    yield Meeting("rows_that_overlap", overlap, fused_alone, {"q.weight": stored(fifth, "F32")}, ("R-10.4",))
    yield Meeting(
        "bias_without_weight", alone, {"q.bias": held["bias"]}, {"q.bias": _real("bias", 3)}, ("R-10.6", "R-10.7")
    )


def _numbers() -> Iterator[Meeting]:
    """What is rounded, dropped, or fits although it looks otherwise."""
    wide = _values("W", 3, 4, 1, 1)
    changed = {"q.weight": stored(wide + DELTA[..., None, None], "F32")}
    yield Meeting("kernel_of_ones", PLAIN, {"q.weight": stored(wide, "F32")}, changed, ("R-8.5",))
    start = {"D": stored(DELTA[..., None], "F32")}
    taken = {"q.weight": stored(W - DELTA, "F32")}
    yield Meeting(
        "kernel_of_ones_left_out", _one("residual", **start), {"q.weight": stored(W, "F32")}, taken, ("R-8.5",)
    )
    yield Meeting(
        "bias_dropped", _one("ia3", l=_real("l", 3)), {"q.weight": stored(W, "F32")},
        {"q.weight": stored(W * _values("l", 3)[:, None], "F32")}, ("R-10.6",),
    )  # fmt: skip
    norm = _values("norm", 3)
    turned = _one("ia3", target={"path": "q", "layout": "in out *k"}, l=_real("l", 3))
    scaled = {"q.weight": stored(norm * _values("l", 3), "F32")}
    yield Meeting("one_axis_in_any_layout", turned, {"q.weight": stored(norm, "F32")}, scaled, ("R-8.5",))
    for name, layout_ in (("experts_of_one_axis", "e out *in"), ("experts_of_one_axis_turned", "e in out *k")):
        each = _one("ia3", target={"path": "q", "layout": layout_}, l=_real("le", 2, 3))
        done = stored(_values("norms", 2, 3) * _values("le", 2, 3), "F32")
        yield Meeting(name, each, {"q.weight": _real("norms", 2, 3)}, {"q.weight": done}, ("R-8.5",))
    yield from _biases()
    yield from _biases_by_the_weight()
    minus = {"q.weight": stored(np.full((3, 4), -0.0), "F32")}
    idle = _file(_update(), A=stored(np.zeros((1, 4)), "F32"), B=_real("idle", 3, 1))
    yield Meeting("zero_of_either_sign", idle, minus, minus, ("R-10.4",))
    zero, one = np.zeros((1, 1)), stored(np.ones((1, 1)), "F32")
    largest = ("f16", "F16", 65519.0, b"\xff\x7b"), ("f8", "F8_E4M3", 464.0, b"\x7e")
    for name, dtype, change, nearest in largest:
        base = {"q.weight": Stored(dtype, (1, 1), bytes(len(nearest)))}
        file = _file(_update(), A=one, B=stored(zero + change, "F32"))
        merged = {"q.weight": Stored(dtype, (1, 1), nearest)}
        yield Meeting(f"rounds_to_the_largest_{name}", file, base, merged, ("R-10.4",))
    yield _small_floats()
    for name, dtype, size, change in (("beyond_f16", "F16", 2, 65520.0), ("beyond_f8", "F8_E4M3", 1, 465.0)):
        base = {"q.weight": Stored(dtype, (1, 1), bytes(size))}
        file = _file(_update(), A=one, B=stored(zero + change, "F32"))
        yield Meeting(name, file, base, None, ("R-10.4",), "Malformed", "q.weight")


def _quotients() -> Iterator[Meeting]:
    """Norms of 0 are not divided by, rows without elements have nothing to divide, and a sum of no terms is 0."""
    none, weight = Stored("F32", (3, 0), b""), {"q.weight": stored(W, "F32")}
    zero = {"q.weight": stored(np.array([[0.0, 0.0], [1.0, 2.0]]), "F32")}
    column = {"q.weight": stored(np.array([[0.0, 1.0], [0.0, 2.0]]), "F32")}

    def refused(name: str, file: bytes, base: Tensors, where: str = "q.weight") -> Meeting:
        return Meeting(name, file, base, None, ("R-10.13",), "Malformed", where)

    empty = {"A": Stored("F32", (1, 0), b""), "B": _real("eB", 3, 1), "magnitude": _real("em", 3)}
    yield Meeting("norm_of_no_elements", _one("dora", **empty), {"q.weight": none}, {}, ("R-10.13",))
    bare = {"q.weight": none, "q.bias": stored(b, "F32")}
    yield refused("norm_of_no_elements_of_a_bias", _one("dora_outputs", **empty), bare, "q.bias")
    idle = {"A": stored(np.zeros((1, 2)), "F32"), "B": stored(np.zeros((2, 1)), "F32")}
    without = idle | {"magnitude": stored(np.array([0.0, 1.0]), "F32")}
    yield refused("norm_of_zero_without_magnitude", _one("dora", **without), zero)
    yield refused("norm_of_zero_outputs", _one("weight_norm", out=_real("wo", 2)), zero)
    yield refused("norm_of_zero_inputs", _one("weight_norm", into=_real("wi", 2)), column)
    shifted = _one("weight_norm", {"eps": 0.5}, into=stored(np.array([3.0, 1.0]), "F32"))
    half = {"q.weight": stored(np.array([[0.0, 0.5]]), "F32")}
    yield Meeting("norm_of_zero_and_more", shifted, half, half, ("R-10.13",))
    yield refused("reflection_at_zero", _one("hra", u=stored(np.zeros((4, 1)), "F32")), weight)
    nothing = {"A": Stored("F32", (0, 4), b""), "B": none, "strength": _real("st", 1), "w_norm": _real("wn", 4)}
    yield Meeting("sum_of_no_directions", _one("delora", **nothing), weight, {}, ("R-10.13",))
    bases = {"alpha": Stored("F32", (0,), b""), "beta": Stored("F32", (0,), b"")}
    bases |= {"A_bases": Stored("F32", (0, 1, 4), b""), "B_bases": Stored("F32", (0, 3, 1), b"")}
    yield Meeting("sum_of_no_bases", _one("nola", **bases), weight, {}, ("R-10.13",))


def _biases() -> Iterator[Meeting]:
    """Which bias an update changes, and which size it must have."""
    weight, short = {"q.weight": stored(W, "F32")}, stored(_values("b", 3), "F32")
    yield Meeting("other_bias_unchanged", PLAIN, weight | {"q.bias": _real("b", 5)}, {"q.weight": CHANGED}, ("R-8.6",))
    rows = _one("ia3", target={"path": "q", "rows": [0, 2]}, l=_real("l", 2))
    scale, tall = _values("l", 2), _values("W", 4, 4)
    changed = np.concatenate([tall[:2] * scale[:, None], tall[2:]])
    yield Meeting(
        "rows_of_a_shorter_bias", rows, {"q.weight": stored(tall, "F32"), "q.bias": short},
        {"q.weight": stored(changed, "F32"), "q.bias": stored(np.concatenate([b[:2] * scale, b[2:]]), "F32")},
        ("R-8.6",),
    )  # fmt: skip
    alone = _one("dense", d=_real("bias", 3))
    whole = {"q.weight": stored(np.ones((3, 4)), "I32"), "q.bias": short}
    yield Meeting(
        "bias_beside_whole_weight", alone, whole, {"q.bias": stored(b + _values("bias", 3), "F32")}, ("R-10.4",)
    )


def _biases_by_the_weight() -> Iterator[Meeting]:
    """A change of the bias that the weight decides, behind other changes of that weight."""
    before = {"A": A, "B": B}
    factors = {"A2": _values("sA", 1, 4), "B2": _values("sB", 3, 1), "m": _values("sm", 3)}
    base = {"q.weight": stored(W, "F64"), "q.bias": stored(b, "F64")}

    def update(rows: tuple[int, int] | None = None, **names: str) -> dict[str, Any]:
        target = {"path": "q"} if rows is None else {"path": "q", "rows": list(rows)}
        fields = {"A": "A2", "B": "B2", "magnitude": "m"} | names
        return {"target": target, "method": "dora_outputs", "version": 1, "attributes": {}, "tensors": fields}

    def after(weight: np.ndarray, bias: np.ndarray, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        moved = weight + factors["B2"][rows] @ factors["A2"]
        scale = factors["m"][rows] / np.sqrt((moved * moved).sum(1))
        return scale[:, None] * moved, scale * bias

    first = LORA | {"tensors": {"A": "A", "B": "B"}}
    held = {name: stored(value, "F32") for name, value in factors.items()}
    rules = ("R-10.3", "R-10.4")
    weight, bias = after(*after(W + DELTA, b))
    done = {"q.weight": stored(weight, "F64"), "q.bias": stored(bias, "F64")}
    yield Meeting("bias_by_a_changed_weight", _file(first, update(), update(), **before, **held), base, done, rules)
    part = {"A2": held["A2"], "B2": stored(factors["B2"][1:], "F32"), "m": stored(factors["m"][1:], "F32")}
    upper, lower = after((W + DELTA)[1:], b[1:], slice(1, None))
    done = {"q.weight": stored(np.concatenate([(W + DELTA)[:1], upper]), "F64")}
    done["q.bias"] = stored(np.concatenate([b[:1], lower]), "F64")
    yield Meeting("bias_by_a_weight_of_two_targets", _file(first, update((1, 3)), **before, **part), base, done, rules)


SMALL = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F8_E4M3FNUZ": (4, 3, 8), "F8_E5M2FNUZ": (5, 2, 16)}
"""Bits of the exponent and of the significand, and the bias (README, section 5)."""


def _small(dtype: str) -> np.ndarray:
    """The numbers of the codes 0 to 111 of a type, all of which are finite and not negative."""
    _, significand, bias = SMALL[dtype]
    codes = np.arange(112)
    exponent, rest = codes >> significand, codes & ((1 << significand) - 1)
    whole = rest + (np.where(exponent > 0, 1, 0) << significand)
    return np.ldexp(whole.astype("f8"), np.maximum(exponent, 1) - bias - significand)


def _nearest(dtype: str, values: np.ndarray) -> bytes:
    """The codes of numbers, to nearest, ties to even: of two numbers that are as near, the one with the even code."""
    known = _small(dtype)
    distance = np.abs(np.abs(values)[..., None] - known)
    near = distance == distance.min(-1, keepdims=True)
    codes = np.where(near.sum(-1) > 1, (near & (np.arange(len(known)) % 2 == 0)).argmax(-1), near.argmax(-1))
    negative = (values < 0) & ~((codes == 0) & dtype.endswith("FNUZ"))  # FNUZ has no negative zero
    return (codes + 128 * negative).astype("u1").tobytes()


def _small_floats() -> Meeting:
    """A LoRA of small factors into each of the types of 8 bits: ties, numbers below the normal ones, and zeros."""
    scale, base, merged = 2.0**-9, {}, {}
    for dtype in SMALL:
        held = _small(dtype)[np.arange(12) * 5 % 60].reshape(3, 4)
        weight = held * np.where(np.arange(12).reshape(3, 4) % 3 == 1, -1, 1)
        base[f"{dtype}.weight"] = Stored(dtype, (3, 4), _nearest(dtype, weight))
        kept = np.where((weight == 0) & dtype.endswith("FNUZ"), 0.0, weight)
        merged[f"{dtype}.weight"] = Stored(dtype, (3, 4), _nearest(dtype, kept + scale * DELTA))
    updates = [LORA | {"target": {"path": dtype}, "attributes": {"scaling": 0.5 * scale}} for dtype in SMALL]
    return Meeting("small_floats", _file(*updates, **TENSORS), base, merged, ("R-10.4",))


def _refused() -> Iterator[Meeting]:
    weight, bias = {"q.weight": stored(W, "F32")}, stored(b, "F32")

    other = {"q.weight": _real("W", 5, 4), "q.bias": bias}
    bare = {"q.weight": _real("W"), "q.bias": bias}
    even = {"q.weight": _real("W", 4, 4), "q.bias": _real("b", 2)}

    def shape(name: str, file: bytes, base: Tensors, where: str, *rules: str) -> Meeting:
        return Meeting(name, file, base, None, rules or ("R-8.5",), "ShapeMismatch", where)

    yield shape("other_inputs", PLAIN, {"q.weight": _real("W", 3, 5)}, "q: lora")
    yield shape("other_outputs", PLAIN, {"q.weight": _real("W", 5, 4)}, "q: lora")
    yield shape("no_inputs", PLAIN, {"q.weight": _real("W", 3)}, "q: lora")
    yield shape("other_kernel", PLAIN, {"q.weight": _real("W", 3, 4, 2)}, "q: lora")
    beyond = _file(LORA | {"target": {"path": "q", "rows": [2, 5]}}, **TENSORS)
    yield shape("rows_beyond_the_weight", beyond, {"q.weight": _real("W", 4, 4)}, "q[2:5]: lora")
    inputs = _one("ia3", target={"path": "q", "rows": [2, 5]}, l_in=_real("l", 4))
    yield shape("rows_beyond_by_inputs", inputs, {"q.weight": _real("W", 4, 4)}, "q[2:5]: ia3")
    experts = _one("lora", target={"path": "q", "layout": "e out *in"}, A=_real("A", 2, 1, 4), B=_real("B", 2, 3, 1))
    yield shape("other_experts", experts, {"q.weight": _real("W", 3, 3, 4)}, "q: lora")
    alone = _one("dense", d=_real("bias", 3))
    yield shape("weight_that_stays", alone, {"q.weight": _real("W", 5, 4), "q.bias": bias}, "q: dense")
    yield shape("other_bias", _file(BIASED, **BIAS), {**weight, "q.bias": _real("b", 5)}, "q: lora", "R-8.6")
    yield shape("other_rest", _one("dense", D=_real("D", 3, 5)), weight, "q: dense")
    stack = {"A": _real("A", 2, 1, 4), "B": _real("B", 2, 3, 1), "bias": _real("sb", 2, 3)}
    each = _one("lora", target={"path": "q", "layout": "e out *in"}, **stack)
    more = {"q.weight": _real("W", 2, 3, 4), "q.bias": _real("sb", 3, 3)}
    yield shape("bias_of_other_experts", each, more, "q: lora", "R-8.6")
    behind = _file(BIASED | {"target": {"path": "q", "rows": [1, 4]}}, **BIAS)
    yield shape("bias_below_the_rows", behind, {"q.weight": _real("W", 4, 4), "q.bias": bias}, "q[1:4]: lora", "R-8.6")
    columns = _one("boft", R=_real("R", 1, 1, 3, 3), s=_real("s", 3))
    yield shape("other_columns", columns, weight, "q: boft")
    place = {"index": stored(np.array([[0], [1]]), "I64"), "spectrum": _real("spectrum", 1)}
    wide = {"q.weight": _real("W", 3, 4, 1)}
    yield shape("other_axes", _one("fourierft", {"outputs": 3, "inputs": 4}, **place), wide, "q: fourierft")
    yield shape("blocks_do_not_fill", _one("oft", pairs=_real("pairs", 1, 3)), weight, "q: oft", "R-10.8")
    vera = {"b": _real("vb", 3), "B": _real("vB", 2, 2), "d": _real("vd", 2), "A": _real("vA", 2, 4)}
    yield shape("fewer_than_the_outputs", _one("vera", **vera), weight, "q: vera", "R-10.8")
    rows = {"index": stored(np.array([0, 4]), "I64"), "values": _real("values", 2, 3)}
    yield shape("position_beyond_the_weight", _one("rows", **rows), weight, "q: rows", "R-8.7")
    below = {"index": stored(np.array([0, -1]), "I64"), "values": _real("values", 2, 3)}
    yield shape("position_below_the_weight", _one("rows", **below), weight, "q: rows", "R-8.7")
    beyond = {"index": stored(np.array([[0], [4]]), "I64"), "spectrum": _real("spectrum", 1)}
    beyond_both = _one("fourierft", {"outputs": 3, "inputs": 4}, **beyond)
    yield shape("position_beyond_both", beyond_both, weight, "q: fourierft", "R-8.7", "R-13.2")
    kernel = _one("lokr", w1=_real("w1", 3, 2), w2_a=_real("w2a", 1, 1), w2_b=_real("w2b", 1, 3))
    yield shape("inputs_not_in_parts", kernel, {"q.weight": _real("W", 3, 3, 2)}, "q: lokr", "R-10.8")
    yield shape("nothing_to_repeat", _one("miss", D=_real("D", 0, 3)), weight, "q: miss", "R-10.8")
    kasa = _one("kasa", A=_real("A", 3, 4), B=_real("B", 3, 3), diag=_real("diag", 3))
    yield shape("no_singular_value_left", kasa, weight, "q: kasa", "R-10.8")
    yield shape("bias_of_an_unfit_weight", _one("dense", d=_real("d", 3)), other, "q: dense", "R-8.5")
    yield shape("weight_without_axes", _one("replacement", bias=_real("d", 3)), bare, "q: replacement", "R-8.5")
    turned = _one("oft", {"side": "out", "on_output": True}, version=2, pairs=_real("pairs", 1, 1))
    yield shape("bias_of_other_outputs", turned, even, "q: oft", "R-8.6")

    def unmergeable(name: str, file: bytes, base: Tensors, where: str, rule: str) -> Meeting:
        return Meeting(name, file, base, None, (rule,), "NotMergeable", where)

    neck = {"down": _real("down", 2, 3), "up": _real("up", 3, 2)}
    yield unmergeable("output", _file(_update("bottleneck"), **neck), weight, "q", "R-10.5")
    prompt = {"target": {"path": ""}, "method": "prompt", "version": 1, "tensors": {"P": "P"}, "attributes": {}}
    yield unmergeable("context", _file(prompt, P=_real("P", 2, 4)), weight, "(model)", "R-10.5")
    yield unmergeable("no_bias", _file(BIASED, **BIAS), weight, "q: lora", "R-10.6")
    replaced = _one("replacement", weight=_real("new", 3, 4), bias=_real("bias", 3))
    yield unmergeable("no_bias_to_replace", replaced, weight, "q: replacement", "R-10.6")
    yield Meeting("no_target", PLAIN, {"k.weight": stored(W, "F32")}, None, ("R-10.7",), "TargetNotFound", "q")
    yield Meeting("no_weight", PLAIN, {"q.bias": bias}, None, ("R-10.7",), "TargetNotFound", "q: lora")
    nan = Stored("F32", (3, 2), np.full((3, 2), np.nan, "<f4").tobytes())
    spoiled = _file(LORA | {"tensors": {"A": "A", "B": "B"}}, A=A, B=nan)
    yield Meeting("factor_that_is_no_number", spoiled, weight, None, ("R-10.1",), "Malformed", "q: lora.B")
    whole = {"q.weight": stored(np.ones((3, 4)), "I32")}
    yield Meeting("whole_weight", PLAIN, whole, None, ("R-10.4",), "Unsupported", "q.weight")
    none = _file(_update(), A=_real("none", 0, 4), B=_real("none", 3, 0))
    yield Meeting("whole_weight_rank_zero", none, whole, None, ("R-10.4", "R-10.6"), "Unsupported", "q.weight")
    nothing = _one("lora", A=Stored("F32", (0, 4), b""), B=Stored("F32", (3, 0), b""))
    yield Meeting("rank_of_none", nothing, whole, None, ("R-10.4", "R-10.6"), "Unsupported", "q.weight")
    scale = {"q.weight": Stored("F8_E8M0", (3, 4), b"\x7f" * 12)}
    yield Meeting("weight_without_sign", PLAIN, scale, None, ("R-10.4",), "Unsupported", "q.weight")


def _ordered() -> Iterator[Meeting]:
    """Two faults each: the first of the steps of a merge decides."""
    neck = {"down": _real("down", 2, 3), "up": _real("up", 3, 2)}
    lost = LORA | {"target": {"path": "z"}, "tensors": {"A": "A", "B": "B"}}
    weight, narrow = {"q.weight": stored(W, "F32")}, {"q.weight": _real("W", 3, 5)}
    kinds = _file(lost, _update("bottleneck"), A=A, B=B, **neck)
    yield Meeting("two_faults_kinds_before_names", kinds, weight, None, ("R-13.2",), "NotMergeable", "q")
    names = _file(lost | {"target": {"path": "q"}}, lost, A=A, B=B)
    yield Meeting("two_faults_names_before_shapes", names, narrow, None, ("R-13.2",), "TargetNotFound", "z")
    sizes = _file(BIASED, **BIAS)
    yield Meeting("two_faults_sizes_before_bias", sizes, narrow, None, ("R-13.2",), "ShapeMismatch", "q: lora")
    nan = Stored("F32", (3, 2), np.full((3, 2), np.nan, "<f4").tobytes())
    wrong = _file(lost | {"target": {"path": "q"}}, A=A, B=nan)
    yield Meeting("two_faults_shapes_before_values", wrong, narrow, None, ("R-13.2",), "ShapeMismatch", "q: lora")
    whole = {"q.weight": stored(np.ones((3, 4)), "I32")}
    yield Meeting("two_faults_types_before_values", wrong, whole, None, ("R-13.2",), "Unsupported", "q.weight")
    wide = {"q.weight": stored(np.ones((3, 5)), "I32")}
    yield Meeting("two_faults_shapes_before_types", wrong, wide, None, ("R-13.2",), "ShapeMismatch", "q: lora")


def _ordered_in_the_base() -> Iterator[Meeting]:
    """Two faults of types or of numbers, and files that are both broken."""
    first, second = (LORA | {"target": {"path": path}, "tensors": {"A": "A", "B": "B"}} for path in "za")
    both = _file(first, second, A=A, B=B)
    whole = {f"{path}.weight": stored(np.ones((3, 4)), "I32") for path in "az"}
    yield Meeting("two_faults_types_in_order", both, whole, None, ("R-13.2",), "Unsupported", "z.weight")
    mixed = _file(BIASED | {"target": {"path": "z"}}, first | {"target": {"path": "a"}}, **BIAS)
    held = {"a.weight": whole["a.weight"], "z.bias": stored(np.ones(3), "I32"), "z.weight": _real("W", 3, 4)}
    yield Meeting("two_faults_types_of_a_bias_first", mixed, held, None, ("R-13.2",), "Unsupported", "z.bias")
    broken, cut = native({"version": "x"}, {}), b"cut"
    yield Meeting("two_faults_adapter_before_base", broken, cut, None, ("R-13.2",), "Malformed", "version")
    twice = {"index": stored(np.array([[0, 0], [1, 1]]), "I64"), "values": _real("values", 2)}
    file = _one("shira", **twice)
    yield Meeting(
        "position_twice", file, {"q.weight": stored(W, "F32")}, None, ("R-10.2",), "Malformed", "q: shira.index"
    )
    ints = {"q.weight": stored(np.ones((3, 4)), "I32")}
    yield Meeting("two_faults_types_before_positions", file, ints, None, ("R-13.2",), "Unsupported", "q.weight")
    wide = {"q.weight": _real("W", 3, 4, 1)}
    group = {
        "A": _real("A", 2, 1, 2),
        "B": _real("B", 3, 1),
        "basis": _real("basis", 2, 4),
        "basis_bias": _real("bb", 2),
    }
    group |= {"group": stored(np.array([0, 1, 0]), "I64"), "ranks": stored(np.array([1, 1]), "I64")}
    yield Meeting(
        "two_faults_axes_before_bias", _one("adamss", **group), wide, None, ("R-13.2",), "ShapeMismatch", "q: adamss"
    )


def merge_files() -> Iterator[tuple[str, bytes]]:
    """Name under vectors/merges/ and content of each file."""
    for each in meetings():
        yield f"{each.name}.adapter.safetensors", each.adapter
        yield f"{each.name}.base.safetensors", each.base if isinstance(each.base, bytes) else pack(*layout(each.base))
        if each.merged is not None and not isinstance(each.base, bytes):
            yield f"{each.name}.merged.safetensors", pack(*layout(each.base | each.merged))


@dataclass(frozen=True)
class Computed:
    """An adapter, and a base with what must come out of it, as in vectors/methods; see `Meeting`."""

    name: str
    adapter: bytes
    base: Tensors
    rules: tuple[str, ...]
    error: str = ""
    where: str = ""


def computed() -> Iterator[Computed]:
    """Outputs of layers with several updates, and calls that must be refused."""
    w, x, bias = _values("cW", 3, 4), _values("cx", 2, 4), _values("cb", 3)
    first = [_values("one.down", 2, 3), _values("one.up", 3, 2)]
    second = [_values("two.down", 2, 3), _values("two.up", 3, 2)]

    def neck(h: np.ndarray, down: np.ndarray, up: np.ndarray) -> np.ndarray:
        return h + np.maximum(h @ down.T, 0) @ up.T

    held = {"q.weight": stored(w, "F64"), "q.bias": stored(bias, "F64"), "q.x": stored(x, "F64")}
    parts = {"A": A, "B": B, "down": stored(first[0], "F32"), "up": stored(first[1], "F32")}
    two = {"down2": stored(second[0], "F32"), "up2": stored(second[1], "F32")}
    lora = _update() | {"attributes": {"scaling": 0.5}}
    again = _update("bottleneck") | {"tensors": {"down": "down2", "up": "up2"}}

    def case(name: str, y: np.ndarray, *updates: Any, **beside: Stored) -> Computed:
        used = {tensor for update in updates for tensor in update["tensors"].values()}
        file = _file(*updates, **{key: tensor for key, tensor in (parts | two).items() if key in used})
        return Computed(name, file, held | beside | {"q.y": stored(y, "F64")}, ("R-10.9",))

    h = x @ w.T + bias
    changed = x @ (w + DELTA).T + bias
    yield case("output_of_a_changed_weight", neck(changed, *first), lora, _update("bottleneck"))
    yield case("output_of_an_output", neck(neck(h, *first), *second), _update("bottleneck"), again)
    r, gain, shift = _values("cr", 2, 3), _values("gain", 3), _values("shift", 3)
    closed = {name: stored(value, "F64") for name, value in (("added", r), ("norm_weight", gain), ("norm_bias", shift))}
    reads = _update("bottleneck", attributes={"original_ln_before": True})
    inner = np.maximum(normed(h + r, gain, shift) @ first[0].T, 0) @ first[1].T + h
    ended = normed(neck(inner, *second) + r, gain, shift)
    yield case("residual_comes_once", ended, reads, again, **{f"q.{name}": value for name, value in closed.items()})
    seen = {f"q.{name}": value for name, value in closed.items()}
    bare = {"attributes": {"original_ln_before": True, "original_ln_after": False}}
    yield case("residual_as_the_last_says", ended, _update("bottleneck") | bare, again, **seen)
    left = neck(inner, *second)
    yield case(
        "residual_that_the_last_leaves_out", left, reads, again | {"attributes": {"original_ln_after": False}}, **seen
    )
    table, tokens = _values("ct", 3, 5), np.array([4, 0])
    looked = {"q.weight": stored(table, "F64"), "q.x": stored(tokens, "I64")}
    beside = _update("bottleneck", attributes={"parallel": True})
    file = _file(beside, down=parts["down"], up=parts["up"])
    read = table.T[tokens] + np.maximum(r @ first[0].T, 0) @ first[1].T + r
    known = looked | {"q.added": stored(r, "F64"), "q.y": stored(read, "F64")}
    yield Computed("tokens_beside_a_residual", file, known, ("R-10.9", "R-13.4"))
    square = looked | {"q.weight": stored(table[:, :3], "F64"), "q.x": stored(np.array([2, 0]), "I64")}
    yield Computed("tokens_that_a_formula_computes_with", file, square, ("R-13.4",), "Unsupported", "q")
    necks = {name: tensor for name, tensor in (parts | two).items() if name not in "AB"}
    turned = again | {"target": {"path": "q", "layout": "in out *k"}}
    file = _file(_update("bottleneck"), turned, **necks)
    other = looked | {"q.weight": stored(table[:, :3], "F64"), "q.x": stored(table[:2, :3], "F64")}
    yield Computed("output_in_another_layout", file, other, ("R-13.4",), "Unsupported", "q")
    behind = lora | {"target": {"path": "q", "rows": [0, 3]}}
    yield case("weight_of_another_target", neck(changed, *first), _update("bottleneck"), behind)
    placed = {"residual": "first", "norm": "last", "original_ln_after": False}
    file = _file(_update("bottleneck", attributes=placed), down=parts["down"], up=parts["up"])
    beside = held | {f"q.{name}": value for name, value in closed.items()}
    yield Computed("norm_of_the_block_left_out", file, beside, ("R-10.10",), "Unsupported", "q")
    behind = again | {"attributes": placed | {"original_ln_after": True}}
    file = _file(_update("bottleneck", attributes=placed), behind, **necks)
    yield Computed("norm_left_out_before_another", file, beside, ("R-10.10",), "Unsupported", "q")
    zero = {"A": stored(np.zeros((1, 4)), "F32"), "B": _real("zB", 3, 1), "magnitude": _real("zm", 3)}
    lost = {"q.weight": stored(np.diag([0.0, 1.0, 2.0, 3.0])[:3], "F64"), "q.x": stored(x, "F64")}
    yield Computed("output_that_is_no_number", _one("grouped_dora", **zero), lost, ("R-10.13",), "Malformed", "q.y")
    norms = _update("dora") | {"tensors": {name: name for name in zero}}
    file = _file(norms, _update("bottleneck"), **zero, down=parts["down"], up=parts["up"])
    flat = lost | {"q.weight": stored(np.zeros((3, 4)), "F64")}
    rules = ("R-10.4", "R-10.13")
    yield Computed("weight_that_is_no_number_before_an_output", file, flat, rules, "Malformed", "q.weight")
    turned = lora, _update("ia3") | {"target": {"path": "q", "rows": [0, 3]}, "tensors": {"l": "l"}}
    scale = _values("l", 3)
    file = _file(*turned, A=A, B=B, l=_real("l", 3))
    ended = held | {
        "q.merged.weight": stored((w + DELTA) * scale[:, None], "F64"), "q.merged.bias": stored(bias * scale, "F64"),
        "q.y": stored(changed * scale, "F64"),
    }  # fmt: skip
    yield Computed("targets_of_one_path_in_order", file, ended, ("R-7.4", "R-10.4"))
    router = _one("arrow", idle_A=_real("iA", 2, 4), idle_B=_real("iB", 3, 2))
    base = {"q.weight": stored(w, "F64"), "q.x": stored(x, "F64")}
    yield Computed("router_without_experts", router, base, ("R-10.12",), "UsageError", "q")
    tokens = {"A": A, "B": B, "invocation": stored(np.array([1, 2]), "I64")}
    three = base | {"q.x": _real("c3", 1, 2, 4)}
    beside = {"q.bias": stored(bias, "F64"), "q.x": stored(x, "F64")}
    file = _file(lora, A=A, B=B)
    yield Computed("bias_alone_and_no_weight", file, beside, ("R-10.7",), "TargetNotFound", "q: lora")
    yield Computed(
        "nothing_at_the_path", _file(lora, A=A, B=B), {"q.x": stored(x, "F64")}, ("R-10.7",), "TargetNotFound", "q"
    )
    whole = {"q.weight": stored(np.ones((3, 4)), "I32"), "q.x": stored(x, "F64")}
    yield Computed("whole_weight", _file(lora, A=A, B=B), whole, ("R-10.4",), "Unsupported", "q.weight")
    narrow = {"q.weight": stored(_values("cW", 3, 5), "F64"), "q.x": stored(_values("c5", 2, 5), "F64")}
    yield Computed("other_inputs", _file(lora, A=A, B=B), narrow, ("R-8.5",), "ShapeMismatch", "q: lora")
    yield Computed("call_without_tokens", _one("alora", **tokens), three, ("R-10.11",), "UsageError", "q")
    yield from _lacking()
    yield from _undecided()
    yield from _shapes_of_outputs()


def _lacking() -> Iterator[Computed]:
    """What a formula needs is absent or does not suit; or what comes out has no numbers."""
    w, x = _values("cW", 3, 4), _values("cx", 2, 4)
    base = {"q.weight": stored(w, "F64"), "q.x": stored(x, "F64")}
    neck = {"down": _real("one.down", 2, 3), "up": _real("one.up", 3, 2)}
    wide = base | {"q.x": stored(_values("c5", 2, 5), "F64")}

    def lacks(name: str, held: Tensors, **attributes: Any) -> Computed:
        return Computed(name, _one("bottleneck", attributes, **neck), held, ("R-10.11",), "UsageError", "q")

    yield lacks("residual_that_is_lacking", base, residual="first")
    yield lacks("norm_that_is_lacking", base | {"q.added": stored(_values("cr", 2, 3), "F64")}, norm="last")
    gain, shift = stored(_values("gain", 3), "F64"), stored(_values("shift", 2), "F64")
    half = {"q.added": stored(_values("cr", 2, 3), "F64"), "q.norm_weight": gain, "q.norm_bias": shift}
    yield lacks("norm_of_which_a_part_is_lacking", base | half, norm="last")
    yield lacks("residual_of_another_shape", base | {"q.added": stored(_values("cr", 1, 3), "F64")}, residual="first")
    yield lacks("input_that_does_not_suit", wide)
    yield lacks("output_without_a_weight", {"q.x": base["q.x"]})
    tokens = {"A": A, "B": B, "invocation": stored(np.array([1, 2]), "I64")}
    flat = base | {"q.call.input_ids": stored(np.array([[1, 2], [0, 1]]), "I64")}
    yield Computed("tokens_of_no_rows", _one("alora", **tokens), flat, ("R-10.11",), "UsageError", "q")
    merged = {"q.merged.weight": stored(w + DELTA, "F64")}
    lora = _file(_update() | {"attributes": {"scaling": 0.5}}, A=A, B=B)
    yield Computed("no_output_for_another_input", lora, wide | merged, ("R-10.4",))
    endless = Stored("F64", (1, 4), np.array([1, 2, 3, np.inf], "<f8").tobytes())
    yield Computed("no_output_that_is_no_number", lora, base | merged | {"q.x": endless}, ("R-10.4",))
    bias = {"q.bias": stored(_values("cb", 3), "F64")}
    for kind, size in (("BOOL", 1), ("C64", 8), ("I32", 4), ("F8_E8M0", 1)):
        weight = {"q.weight": Stored(kind, (3, 4), bytes(12 * size))}
        file = _one("dense", d=_real("d", 3))
        yield Computed(
            f"weight_that_stays_{kind.lower()}", file, base | bias | weight, ("R-10.4",), "Unsupported", "q.weight"
        )
    spoiled = {"P": Stored("F64", (1, 2), np.array([1, np.nan], "<f8").tobytes())}
    prompt = _one("prompt", target={"path": ""}, **spoiled)
    yield Computed("context_that_is_no_number", prompt, {}, ("R-10.13",), "Malformed", "(model).embeddings")


def _undecided() -> Iterator[Computed]:
    """What no formula gives an answer to."""
    w, x = _values("cW", 3, 4), _values("cx", 2, 4)
    base = {"q.weight": stored(w, "F64"), "q.x": stored(x, "F64")}
    neck = {"down": _real("one.down", 2, 3), "up": _real("one.up", 3, 2)}
    one = _one("bottleneck", **neck)

    def refused(name: str, file: bytes, held: Tensors, where: str, rule: str = "R-13.4") -> Computed:
        return Computed(name, file, held, (rule,), "Unsupported", where)

    rows = _one("bottleneck", target={"path": "q", "rows": [0, 3]}, **neck)
    yield refused("rows_of_an_output", rows, base, "q[0:3]", "R-10.10")
    stacks = {"down": _real("stack.down", 2, 2, 3), "up": _real("stack.up", 2, 3, 2)}
    experts = {"q.weight": stored(_values("cE", 2, 3, 4), "F64"), "q.x": stored(_values("cEx", 2, 5, 4), "F64")}
    stacked = _one("bottleneck", target={"path": "q", "layout": "e out *in"}, **stacks)
    yield refused("experts_of_an_output", stacked, experts, "q", "R-10.10")
    prompt = {"target": {"path": ""}, "method": "prompt", "version": 1, "tensors": {"P": "P"}, "attributes": {}}
    yield refused("two_contexts_of_one_target", _file(prompt, prompt, P=_real("P", 2, 4)), {}, "(model)")
    yield refused("output_of_one_axis", one, base | {"q.x": stored(_values("c1", 4), "F64")}, "q")
    square = {"q.weight": stored(_values("cS", 3, 3), "F64"), "q.x": stored(np.array([[1, 2], [0, 1]]), "I64")}
    yield refused("tokens_in_a_formula", _one("bottleneck", {"parallel": True}, **neck), square, "q")
    yield refused("parallel_to_other_inputs", _one("bottleneck", {"parallel": True}, **neck), base, "q")
    two = [_update("bottleneck") | {"attributes": {"residual": place}} for place in "ab"]
    residual = base | {"q.added": stored(_values("cr", 2, 3), "F64")}
    yield refused("residuals_of_two_places", _file(*two, **neck), residual, "q")
    free = {"s": _real("source", 1, 3), "p": _real("projection", 1, 3)}
    reft = {"target": {"path": "q"}, "method": "reft", "version": 1, "attributes": {}}
    reft |= {"tensors": {"source": "s", "projection": "p"}}
    yield refused("residual_behind_a_whole_output", _file(reft, _update("bottleneck"), **free, **neck), residual, "q")
    grouped = {"q.weight": stored(_values("cG", 4, 2, 2, 2), "F64"), "q.x": stored(_values("cGx", 1, 4, 3, 3), "F64")}
    yield refused("patches_of_groups", _one("oft_patches", pairs=_real("pairs.groups", 1, 6)), grouped, "q")
    wider = {"q.weight": stored(_values("cT", 2, 3, 2, 2), "F64"), "q.x": stored(_values("cTx", 1, 2, 3, 4), "F64")}
    turned = _one("oft_patches", target={"path": "q", "layout": "in out *k"}, pairs=_real("pairs.turned", 1, 6))
    yield refused("patches_of_a_transposed_convolution", turned, wider, "q")
    network = {"down": (1, 3), "up": (3, 1), "transform_in": (2, 3), "transform_in_bias": (2,)}
    network |= {"transform_out": (3, 2), "transform_out_bias": (3,), "gate_in": (2, 3), "gate_in_bias": (2,)}
    network |= {"gate_out": (3, 2), "gate_out_bias": (3,), "network": (1,)}
    parts = {name: _real(f"shadow.{name}", *shape) for name, shape in network.items()}
    kernel = {"q.weight": stored(_values("cS3", 3, 3, 1), "F64"), "q.x": stored(_values("cS3x", 2, 3, 3), "F64")}
    kernel |= {"q.call.shadow": kernel["q.x"]}
    yield refused("shadow_of_a_convolution", _one("shadow", {"names": "w 1"}, **parts), kernel, "q")
    tokens = {"A": _real("tA", 2, 3), "B": _real("tB", 3, 2), "invocation": stored(np.array([1]), "I64")}
    looked_up = square | {"q.x": stored(np.array([[[1, 2], [0, 1]]]), "I64")}
    looked_up |= {"q.call.input_ids": stored(np.array([[1, 2]]), "I64")}
    yield refused("tokens_beside_tokens", _one("alora", **tokens), looked_up, "q")


def _shapes_of_outputs() -> Iterator[Computed]:
    """Which weights updates of outputs fit, and which axis has the channels."""
    w, x = _values("cW", 3, 4), _values("cx", 2, 4)
    base = {"q.weight": stored(w, "F64"), "q.x": stored(x, "F64")}

    def unfit(name: str, file: bytes, held: Tensors, where: str, rule: str) -> Computed:
        return Computed(name, file, held, (rule,), "ShapeMismatch", where)

    wide = _one("bottleneck", down=_real("wide.down", 2, 5), up=_real("wide.up", 5, 2))
    yield unfit("channels_of_another_output", wide, base, "q: bottleneck", "R-10.8")
    tokens = {"A": _real("A", 2, 5), "B": B, "invocation": stored(np.array([1, 2]), "I64")}
    yield unfit("inputs_of_another_output", _one("alora", **tokens), base, "q: alora", "R-8.5")
    kernel = {"q.weight": stored(_values("cK", 3, 2, 2), "F64"), "q.x": stored(_values("cKx", 2, 2, 5), "F64")}
    patches = _one("oft_patches", pairs=_real("pairs", 1, 1))
    yield unfit("patches_of_one_axis", patches, kernel, "q: oft_patches", "R-10.8")
    gain, seeds = _values("gain", 3), np.array([7, -2])
    alpha, beta = _values("nola.alpha", 2), _values("nola.beta", 3)
    file = _one("nola", alpha=stored(alpha, "F32"), beta=stored(beta, "F32"), seeds=stored(seeds, "I64"))
    merged, _ = nola.formula(gain, None, alpha, beta, [int(seed) % (1 << 64) for seed in seeds])
    held = {"q.weight": stored(gain, "F64"), "q.merged.weight": stored(merged, "F64")}
    yield Computed("random_matrices_of_one_column", file, held, ("R-10.4",))
    down, up = _values("one.down", 2, 3), _values("one.up", 3, 2)
    neck = _one("bottleneck", down=stored(down, "F32"), up=stored(up, "F32"))

    def changed(h: np.ndarray) -> np.ndarray:
        return h + np.maximum(h @ down.T, 0) @ up.T

    many = _values("c4", 2, 2, 5, 4)
    held = {"q.x": stored(many, "F64"), "q.y": stored(changed(many @ w.T), "F64")}
    yield Computed("channels_of_a_linear_layer", neck, base | held, ("R-10.9",))
    signal = _values("cKx", 2, 2, 5)
    h = np.stack([np.einsum("oik,nik->no", _values("cK", 3, 2, 2), signal[:, :, p : p + 2]) for p in range(4)], 1)
    held = kernel | {"q.y": stored(np.ascontiguousarray(changed(h).swapaxes(1, 2)), "F64")}
    yield Computed("channels_of_a_convolution", neck, held, ("R-10.9",))
    source, projection = _values("source", 1, 3), _values("projection", 1, 3)
    y, mask = _values("c3", 2, 3, 4) @ w.T, np.array([[0, 1, 1], [1, 1, 1]])
    ended = y.copy()
    for row, first in ((0, 1), (1, 0)):
        ended[row, first] += (y[row, first] @ source.T - y[row, first] @ projection.T) @ projection
    file = _one("reft", {"prefix_positions": 1}, source=stored(source, "F32"), projection=stored(projection, "F32"))
    held = base | {"q.x": stored(_values("c3", 2, 3, 4), "F64"), "q.call.mask": stored(mask, "I64")}
    yield Computed("positions_under_a_mask", file, held | {"q.y": stored(ended, "F64")}, ("R-10.9",))
    added = {"q.added": stored(_values("cr", 2, 3), "F64"), "q.merged.weight": stored(w + DELTA, "F64")}
    lora = _file(_update() | {"attributes": {"scaling": 0.5}}, A=A, B=B)
    held = base | added | {"q.y": stored(x @ (w + DELTA).T, "F64")}
    yield Computed("residual_that_nothing_reads", lora, held, ("R-10.9",))


def computed_files() -> Iterator[tuple[str, bytes]]:
    """Name under vectors/computed/ and content of each file."""
    for each in computed():
        yield f"{each.name}.adapter.safetensors", each.adapter
        yield f"{each.name}.expected.safetensors", pack(*layout(each.base))
