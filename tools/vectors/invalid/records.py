"""Invalid native adapters in valid safetensors files: record, targets, methods, tensors, values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from container import Stored, native, numbers, stored, text

from invalid.case import DEEP, LORA, RECORD, TENSORS, Invalid


def records() -> Iterator[Invalid]:
    """All of them."""
    yield from _records()
    yield from _places()
    yield from _methods()
    yield from _tensors()
    yield from _values()


def _record(change: Callable[[dict[str, Any]], Any], tensors: dict[str, Stored] = TENSORS) -> bytes:
    """The valid file with a changed record; a change that returns a value replaces the record by it."""
    record = copy.deepcopy(RECORD)
    replaced = change(record)
    return native(record if replaced is None else replaced, tensors)


def _update(**fields: Any) -> bytes:
    """The valid file with other fields in its update; None takes one out."""
    update = {name: value for name, value in (LORA | fields).items() if value is not None}
    return native({"version": "1.0", "updates": [update]}, TENSORS)


def _target(**fields: Any) -> bytes:
    return _update(target={"path": "q"} | fields)


def _with(method: str, attributes: dict[str, Any], **tensors: Stored) -> bytes:
    """A file of one update of the given method."""
    names = {field: f"q.{field}" for field in tensors}
    update = LORA | {"method": method, "tensors": names, "attributes": attributes}
    record = {"version": "1.0", "updates": [update]}
    return native(record, {f"q.{field}": tensor for field, tensor in tensors.items()})


def _records() -> Iterator[Invalid]:
    words = text(RECORD)
    yield Invalid("record_empty", native("", TENSORS), where="metadata adapterkit")
    yield Invalid("record_not_json", native(words[:-1], TENSORS), where="metadata adapterkit")
    yield Invalid("record_mark", native("\ufeff" + words, TENSORS), where="metadata adapterkit", exact=True)
    yield Invalid("record_control", native(words.replace('"q"', '"q\t"'), TENSORS), where="metadata adapterkit")
    yield Invalid("record_two_values", native(words + "{}", TENSORS), where="metadata adapterkit")
    yield Invalid("record_list", native([RECORD], TENSORS), where="metadata adapterkit")
    twice = words.replace('"version":"1.0"', '"version":"2.0","version":"1.0"')
    yield Invalid("record_key_twice", native(twice, TENSORS), where="metadata adapterkit")
    yield Invalid("record_nan", native(words.replace("0.5", "NaN"), TENSORS), where="metadata adapterkit")
    yield Invalid("record_infinity", native(words.replace("0.5", "-Infinity"), TENSORS), where="metadata adapterkit")
    yield Invalid("record_overflow", native(words.replace("0.5", "1e999"), TENSORS), where="metadata adapterkit")
    yield Invalid("record_deep", native(f'{{"version":"1.0","updates":{DEEP}}}', TENSORS), where="metadata adapterkit")
    inside: Any = []
    for level in range(96):
        inside = {"inside": inside} if level % 2 else [inside]
    nested = RECORD | {"recipe": [{"op": "x", "args": {"deep": inside}}]}
    yield Invalid("record_101_deep", native(nested, TENSORS), where="metadata adapterkit")
    lone = words.replace('"path":"q"', '"path":"\\udc00"')
    yield Invalid("record_half_surrogate", native(lone, TENSORS), where="metadata adapterkit")
    yield Invalid("record_unknown_field", _record(lambda r: r.update(author="x")), where="metadata adapterkit")
    yield Invalid("version_missing", _record(lambda r: r.pop("version") and None), where="version")
    yield Invalid("version_number", _record(lambda r: r.update(version=1.0)), where="version")
    yield Invalid("version_major_alone", _record(lambda r: r.update(version="1")), where="version")
    yield Invalid("version_three_parts", _record(lambda r: r.update(version="1.0.0")), where="version")
    yield Invalid("version_other_digits", _record(lambda r: r.update(version="1.\u0661")), where="version")
    yield Invalid("version_leading_zero", _record(lambda r: r.update(version="01.0")), where="version")
    yield Invalid("version_minor_leading_zero", _record(lambda r: r.update(version="1.00")), where="version")
    yield Invalid("version_newer_major", _record(lambda r: r.update(version="2.0")), "Unsupported", "version")
    yield Invalid("version_older_major", _record(lambda r: r.update(version="0.9")), "Unsupported", "version")
    yield Invalid("requires_unknown", _record(lambda r: r.update(requires=["fp4-factors"])), "Unsupported", "requires")
    for name, fields, place in _FIELDS:
        where = f"metadata adapterkit.{place}"
        yield Invalid(name, _record(lambda r, fields=fields: r.update(fields)), where=where, exact=True)
    yield Invalid("requires_text", _record(lambda r: r.update(requires="x")), where="requires")
    yield Invalid("extensions_list", _record(lambda r: r.update(extensions=[])), where="extensions")
    newer = {"version": "1.9", "extensions": 5, "colour": "red"}
    yield Invalid("extensions_number_newer", _record(lambda r: r.update(newer)), where="extensions")
    null = text(RECORD | {"version": "1.9"}).replace('"updates"', '"extensions":null,"updates"')
    yield Invalid("extensions_null_newer", native(null, TENSORS), where="metadata adapterkit.extensions")
    repeated = {"version": "1.9", "extensions": {"colour": "blue"}, "colour": "red"}
    yield Invalid("extensions_repeated_newer", _record(lambda r: r.update(repeated)), where="extensions")
    beside = repeated | {"version": "1.0"}
    yield Invalid(
        "extensions_beside_unknown", _record(lambda r: r.update(beside)), where="metadata adapterkit", exact=True
    )
    unknown = {"version": "1.9", "updates": [LORA | {"colour": "red"}]}
    yield Invalid("unknown_field_newer", _record(lambda r: r.update(unknown)), where="metadata adapterkit.updates[0]")
    yield Invalid("base_text", _record(lambda r: r.update(base="org/model")), where="base")
    yield Invalid("base_unknown_field", _record(lambda r: r.update(base={"url": "x"})), where="base")
    yield Invalid("recipe_step_without_op", _record(lambda r: r.update(recipe=[{"args": {}}])), where="recipe")
    foreign = {"format": "peft", "data": {}, "tensors": {"x": "absent"}}
    yield Invalid("foreign_tensor_absent", _record(lambda r: r.update(foreign=foreign)), where="foreign.x")
    yield Invalid("foreign_without_format", _record(lambda r: r.update(foreign={"data": {}})), where="foreign")


_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("requires_null", {"requires": None}, "requires"),
    ("requires_number", {"requires": ["a", 5]}, "requires[1]"),
    ("recipe_null", {"recipe": None}, "recipe"),
    ("recipe_args_list", {"recipe": [{"op": "x", "args": []}]}, "recipe[0].args"),
    ("base_id_number", {"base": {"id": 5}}, "base.id"),
    ("extensions_null", {"extensions": None}, "extensions"),
    ("foreign_tensor_number", {"foreign": {"format": "x", "data": {}, "tensors": {"t": 5}}}, "foreign.tensors"),
    ("foreign_data_null", {"foreign": {"format": "x", "data": None, "tensors": {}}}, "foreign.data"),
    ("updates_null", {"updates": None}, "updates"),
]
"""Name, fields of the record, and the path of the value that the schema does not allow."""


def _places() -> Iterator[Invalid]:
    yield Invalid("updates_empty", _record(lambda r: r.update(updates=[])), where="updates")
    yield Invalid("updates_missing", _record(lambda r: r.pop("updates") and None), where="metadata adapterkit")
    yield Invalid("updates_object", _record(lambda r: r.update(updates={"q": LORA})), where="updates")
    yield Invalid("update_unknown_field", _update(weight=1.0), where="updates[0]")
    yield Invalid("update_without_target", _update(target=None), where="updates[0]")
    yield Invalid("target_text", _update(target="q"), where="target")
    yield Invalid("target_unknown_field", _target(columns=[0, 1]), where="target")
    yield Invalid("path_empty", _target(path=""), where="path")
    yield Invalid("path_number", _target(path=5), where="path")
    prompt = {"target": {"path": ""}, "method": "prompt", "version": 1, "tensors": {"P": "q.A"}, "attributes": {}}
    beside = [prompt, LORA | {"target": {"path": ""}}]
    yield Invalid("path_empty_beside_context", _record(lambda r: r.update(updates=beside)), where="path")
    in_rows = native(RECORD | {"updates": [prompt | {"target": {"path": "", "rows": [0, 3]}}]}, {"q.A": TENSORS["q.A"]})
    yield Invalid("rows_of_the_model", in_rows, where="(model)[0:3]: layout")
    yield Invalid("path_missing", _update(target={"layout": "out *in"}), where="target")
    yield Invalid("layout_unknown", _target(layout="in *out"), where="layout")
    yield Invalid(
        "layout_null", native(text(RECORD).replace('"path"', '"layout":null,"path"'), TENSORS), where="layout"
    )
    yield Invalid("layout_stacked_without_experts", _target(layout="e out *in"), "ShapeMismatch", "q: lora")
    yield Invalid("rows_reversed", _target(rows=[3, 0]), where="rows")
    far = 10**30
    yield Invalid("rows_huge", _target(rows=[0, far]), "ShapeMismatch", f"q[0:{far}]: lora", exact=True)
    yield Invalid("rows_none", _target(rows=[2, 2]), where="rows")
    yield Invalid("rows_negative", _target(rows=[-3, 0]), where="rows")
    yield Invalid("rows_one", _target(rows=[3]), where="rows")
    place = "metadata adapterkit.updates[0].target.rows"
    yield Invalid("rows_one_below_zero", _target(rows=[-1]), where=place, exact=True)
    yield Invalid("rows_three_below_zero", _target(rows=[-1, 2, 3]), where=place, exact=True)
    yield Invalid("rows_three", _target(rows=[0, 1, 3]), where=place, exact=True)
    yield Invalid("rows_float", _target(rows=[0.0, 3.0]), where="rows")
    yield Invalid("rows_not_as_many_as_outputs", _target(rows=[0, 2]), "ShapeMismatch", "q[0:2]: lora")
    apart = [LORA, LORA | {"target": {"path": "k"}}, LORA]
    yield Invalid("target_in_two_places", _record(lambda r: r.update(updates=apart)), where="updates[2]")


def _methods() -> Iterator[Invalid]:
    yield Invalid("method_unknown", _update(method="loraa"), "Unsupported", "updates[0]")
    yield Invalid("method_private", _update(method="__init__"), "Unsupported", "updates[0]")
    yield Invalid("method_dotted", _update(method="os.path"), "Unsupported", "updates[0]")
    yield Invalid("method_empty", _update(method=""), where="method")
    yield Invalid("method_number", _update(method=1), where="method")
    yield Invalid("method_version_newer", _update(version=2), "Unsupported", "version")
    yield Invalid("method_version_huge", _update(version=10**30), "Unsupported", "version")
    yield Invalid("method_version_zero", _update(version=0), where="version")
    yield Invalid("method_version_float", _update(version=1.0), where="version")
    raised = native(text(RECORD).replace('"version":1}', '"version":1e0}'), TENSORS)
    yield Invalid("method_version_exponent", raised, where="metadata adapterkit.updates[0].version", exact=True)
    yield Invalid("method_version_text", _update(version="1"), where="version")
    yield Invalid("attribute_unknown", _update(attributes={"alpha": 16}), where="attributes")
    yield Invalid("attribute_text", _update(attributes={"scaling": "0.5"}), where="lora.scaling")
    yield Invalid("attribute_bool", _update(attributes={"scaling": True}), where="lora.scaling")
    yield Invalid("attribute_list", _update(attributes={"scaling": [0.5]}), where="lora.scaling")
    null = text(RECORD).replace("0.5", "null")
    yield Invalid("attribute_null", native(null, TENSORS), where="lora.scaling")
    huge = text(RECORD).replace("0.5", "1" + "0" * 400)
    yield Invalid("attribute_huge", native(huge, TENSORS), where="lora.scaling")
    # It rounds to the largest number of binary64, and is above it.
    beyond = text(RECORD).replace("0.5", str((1 << 1024) - (1 << 970) - 1))
    yield Invalid("attribute_beyond_binary64", native(beyond, TENSORS), where="q: lora.scaling")
    yield Invalid("attributes_missing", _update(attributes=None), where="updates[0]")
    five, three = stored(numbers("invalid.5", 5), "F32"), stored(numbers("invalid.3", 3), "F32")
    yield Invalid("ia3_both", _with("ia3", {}, l=three, l_in=five), where="q: ia3")
    yield Invalid("ia3_neither", _with("ia3", {}), where="q: ia3")
    yield Invalid("dense_neither", _with("dense", {"scaling": 1.0}), where="q: dense")
    yield Invalid("replacement_neither", _with("replacement", {}), where="q: replacement")
    rescale = stored(numbers("invalid.rescale", 3), "F32")
    yield Invalid("oft_neither", _with("oft", {"side": "out"}, rescale=rescale), where="q: oft")
    yield Invalid("output_before_weight", _output_before_weight(), where="q")
    yield from _rules()


def _rules() -> Iterator[Invalid]:
    """Attributes outside their rules, fields of newer versions, and rules of methods that do not hold."""
    square, pairs = stored(numbers("invalid.square", 1, 3, 3), "F32"), stored(numbers("invalid.pairs", 1, 3), "F32")
    four, three = stored(numbers("invalid.four", 1, 4), "F32"), stored(numbers("invalid.rescale", 3), "F32")
    whole, part = stored(numbers("invalid.w1", 1, 2), "F32"), stored(numbers("invalid.w2", 3, 2), "F32")
    place = {"index": stored(np.array([[0], [1]]), "I64"), "spectrum": stored(numbers("invalid.one", 1), "F32")}
    wide = _with("fourierft", {"outputs": 1 << 32, "inputs": 1 << 32}, **place)
    yield Invalid("rule_beyond_64_bits", wide, where="q: fourierft.outputs, inputs")
    yield Invalid("attribute_word", _with("oft", {"side": "top"}, square=square), "Unsupported", "q: oft.side")
    yield Invalid("attribute_below", _with("oft", {"terms": -1}, square=square), where="q: oft.terms")
    yield Invalid("attribute_fraction", _with("oft", {"terms": 3.0}, square=square), where="q: oft.terms")
    yield Invalid("attribute_above", _with("oft", {"terms": 101}, square=square), where="q: oft.terms")
    yield Invalid("attribute_true", _with("oft", {"terms": True}, square=square), where="q: oft.terms")
    wide = {"q.A": TENSORS["q.A"], "q.B": TENSORS["q.B"], "k.A": stored(numbers("invalid.kA", 2, 5), "F32")}
    other = LORA | {"tensors": {"A": "k.A", "B": "q.B"}}
    both = native({"version": "1.0", "updates": [LORA, other]}, wide)
    yield Invalid("updates_disagree_in_inputs", both, "ShapeMismatch", "q: lora")
    experts = {"A": (2, 1, 4), "B": (2, 3, 1), "prototypes": (2, 4), "strengths": (2,)}
    routed = {field: stored(numbers(f"invalid.{field}", *shape), "F32") for field, shape in experts.items()}
    yield Invalid("attribute_zero", _with("arrow", {"temperature": 0.0}, **routed), where="q: arrow.temperature")
    newer = _with("lokr", {"stacked": False}, w1=whole, w2=part)
    yield Invalid("attribute_of_a_newer_version", newer, where="attributes")
    rows = {"target": {"path": "", "rows": [0, 1]}, "method": "prompt", "version": 1, "tensors": {"P": "P"}}
    prompt = {"version": "1.0", "updates": [rows | {"attributes": {}}]}
    yield Invalid("context_with_rows", native(prompt, {"P": stored(numbers("invalid.P", 2, 4), "F32")}), where="layout")
    turned = {"target": {"path": "", "layout": "in out *k"}, "method": "prompt", "version": 1, "tensors": {"P": "P"}}
    prompt = {"version": "1.0", "updates": [turned | {"attributes": {}}]}
    P = {"P": stored(numbers("invalid.P", 2, 4), "F32")}
    yield Invalid("context_with_layout", native(prompt, P), where="layout")
    A, B = stored(numbers("invalid.gA", 3, 4, 1, 1), "F32"), stored(numbers("invalid.gB", 4, 2), "F32")
    yield Invalid("rule_of_shapes", _with("grouped_lora", {}, A=A, B=B), "ShapeMismatch", "q: grouped_lora.B")
    turned = _with("oft", {"side": "in"}, pairs=pairs, rescale=three)
    yield Invalid("rule_of_fields", turned, where="q: oft.rescale")
    yield Invalid("rule_of_blocks", _with("oft", {}, pairs=four), "ShapeMismatch", "q: oft.pairs")
    nothing = Stored("F32", (0, 3), b"")
    square = stored(numbers("invalid.w1", 2, 2), "F32")
    yield Invalid("quotient_of_none", _with("lokr", {}, w1=square, w2=nothing), "ShapeMismatch", "q: lokr.w2")
    kernel = Stored("F32", (0, 1, 2), b"")
    yield Invalid("solved_at_last", _with("c3a", {}, kernel=kernel), "ShapeMismatch", "q: c3a.kernel")
    factors = {"A": stored(numbers("invalid.pA", 2, 4), "F32"), "B": stored(numbers("invalid.pB", 3, 2), "F32")}
    flat = stored(numbers("invalid.flat", 3), "F32")
    yield Invalid("rule_that_defines", _with("psoft", {}, pairs=flat, **factors), "ShapeMismatch", "q: psoft.pairs")


def _output_before_weight() -> bytes:
    """A bottleneck on the output of q, and a LoRA on its weight behind it."""
    down, up = stored(numbers("invalid.down", 2, 3), "F32"), stored(numbers("invalid.up", 3, 2), "F32")
    names = {"down": "q.down", "up": "q.up"}
    bottleneck = {"target": {"path": "q"}, "method": "bottleneck", "version": 1, "tensors": names, "attributes": {}}
    return native({"version": "1.0", "updates": [bottleneck, LORA]}, TENSORS | {"q.down": down, "q.up": up})


def _tensors() -> Iterator[Invalid]:
    A, B = TENSORS["q.A"], TENSORS["q.B"]
    factors, three = numbers("invalid.I", 2, 4).round(), numbers("invalid.stack", 3, 3, 2)
    index, values = np.arange(2.0), stored(numbers("invalid.values", 2, 3), "F32")
    yield Invalid("tensor_missing", _update(tensors={"A": "q.A"}), where="tensors")
    yield Invalid("tensor_unknown_field", _update(tensors={"A": "q.A", "B": "q.B", "C": "q.A"}), where="tensors")
    yield Invalid("tensor_absent", _update(tensors={"A": "q.A", "B": "q.C"}), where="B")
    yield Invalid("tensor_name_number", _update(tensors={"A": "q.A", "B": 5}), where="tensors")
    yield Invalid("tensor_unreferenced", native(RECORD, TENSORS | {"spare": B}), where="spare")
    yield Invalid("factor_one_axis", _with("lora", {}, A=Stored("F32", (8,), A.data), B=B), "ShapeMismatch", "lora.A")
    yield Invalid(
        "factor_three_axes", _with("lora", {}, A=A, B=Stored("F32", (3, 2, 1), B.data)), "ShapeMismatch", "lora.B"
    )
    yield Invalid(
        "factors_disagree", _with("lora", {}, A=A, B=Stored("F32", (2, 3), B.data)), "ShapeMismatch", "lora.B"
    )
    yield Invalid("factor_integer", _with("lora", {}, A=stored(factors, "I32"), B=B), "ShapeMismatch", "lora.A")
    yield Invalid("factor_bool", _with("lora", {}, A=Stored("BOOL", (2, 4), b"\1" * 8), B=B), "ShapeMismatch", "lora.A")
    yield Invalid(
        "factor_complex", _with("lora", {}, A=Stored("C64", (2, 4), bytes(64)), B=B), "ShapeMismatch", "lora.A"
    )
    yield Invalid(
        "index_float", _with("rows", {}, index=stored(index, "F32"), values=values), "ShapeMismatch", "rows.index"
    )
    yield Invalid(
        "index_bool",
        _with("rows", {}, index=Stored("BOOL", (2,), b"\0\1"), values=values),
        "ShapeMismatch",
        "rows.index",
    )
    yield Invalid("index_two_axes", _with("rows", {}, index=stored(index[None], "I64"), values=values), "ShapeMismatch")
    stacked = LORA | {"target": {"path": "q", "layout": "e out *in"}}
    experts = {"q.A": stored(numbers("invalid.e", 2, 2, 4), "F32"), "q.B": stored(three, "F32")}
    yield Invalid(
        "experts_disagree", native({"version": "1.0", "updates": [stacked]}, experts), "ShapeMismatch", "lora.B"
    )
    other = LORA | {"method": "ia3", "tensors": {"l": "q.l"}, "attributes": {}}
    both = native(
        {"version": "1.0", "updates": [LORA, other]}, TENSORS | {"q.l": stored(numbers("invalid.l", 4), "F32")}
    )
    yield Invalid("updates_disagree", both, "ShapeMismatch", "q: ia3")


def _values() -> Iterator[Invalid]:
    def factor(name: str, dtype: str, bits: int, width: int) -> Invalid:
        raw = bytearray(8 * width)
        raw[5 * width : 6 * width] = bits.to_bytes(width, "little")
        content = _with("lora", {}, A=Stored(dtype, (2, 4), bytes(raw)), B=TENSORS["q.B"])
        return Invalid(name, content, where="q: lora.A", stage="values")

    def index(name: str, *positions: int) -> Invalid:
        values = stored(numbers("invalid.values", 2, 3), "F32")
        content = _with("rows", {}, index=stored(np.array(positions), "I64"), values=values)
        return Invalid(name, content, where="q: rows.index", stage="values")

    def pairs(name: str, rows: list[int], columns: list[int]) -> Invalid:
        spectrum = stored(numbers("invalid.spectrum", len(rows)), "F32")
        sizes = {"outputs": 3, "inputs": 4}
        content = _with("fourierft", sizes, index=stored(np.array([rows, columns]), "I64"), spectrum=spectrum)
        return Invalid(name, content, where="q: fourierft.index", stage="values")

    yield factor("nan_f64", "F64", 0x7FF8 << 48, 8)
    yield factor("infinity_f64", "F64", 0xFFF0 << 48, 8)
    yield factor("nan_f32", "F32", 0x7F800001, 4)
    yield factor("infinity_f32", "F32", 0x7F800000, 4)
    yield factor("nan_f16", "F16", 0xFE00, 2)
    yield factor("infinity_f16", "F16", 0x7C00, 2)
    yield factor("nan_bf16", "BF16", 0x7FC0, 2)
    yield factor("infinity_bf16", "BF16", 0xFF80, 2)
    yield factor("nan_f8_e4m3", "F8_E4M3", 0xFF, 1)
    yield factor("infinity_f8_e5m2", "F8_E5M2", 0x7C, 1)
    yield index("index_negative", 1, -1)
    yield factor("nan_f8_e8m0", "F8_E8M0", 0xFF, 1)
    yield factor("nan_f8_e4m3fnuz", "F8_E4M3FNUZ", 0x80, 1)
    yield factor("nan_f8_e5m2fnuz", "F8_E5M2FNUZ", 0x80, 1)
    twice = stored(np.array([[0, 1], [1, 1]]), "I64")
    update = LORA | {"method": "rows", "attributes": {}, "target": {"path": "q", "layout": "e out *in"}}
    experts = {"index": twice, "values": stored(numbers("invalid.experts", 2, 2, 3), "F32")}
    content = native(RECORD | {"updates": [update | {"tensors": {name: name for name in experts}}]}, experts)
    yield Invalid("index_twice_in_an_expert", content, where="q: rows.index", stage="values")
    yield pairs("index_beyond", [0, 3], [1, 1])
    yield pairs("pair_twice", [0, 2, 0], [1, 1, 1])
    yield index("index_twice", 1, 1)
