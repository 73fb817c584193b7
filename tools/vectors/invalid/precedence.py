"""Files that break two rules: the first of the specification's steps decides (README, section 13)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from container import Stored, layout, native, numbers, pack, stored, text

from invalid.case import LORA, RECORD, TENSORS, Invalid

A, B = TENSORS["q.A"], TENSORS["q.B"]
SPARE = {"spare": B}
FLAG = Stored("BOOL", (2, 4), b"\1" * 8)


def precedence() -> Iterator[Invalid]:
    """All of them."""
    for name, content, error, where in (*_containers(), *_records(), *_updates(), *_targets(), *_shapes()):
        yield Invalid(f"two_faults_{name}", content, error, where)
    for name, content, where in _values():
        yield Invalid(f"two_faults_{name}", content, where=where, stage="values")
    for name, files, where in _bases():
        yield Invalid(f"two_faults_{name}", files, where=where, opens="base")


Case = tuple[str, bytes, str, str]


def _containers() -> Iterator[Case]:
    entries, data = layout(TENSORS)
    record = {"adapterkit": text(RECORD)}

    def packed(metadata: Any = record, tail: bytes = b"", **changes: Any) -> bytes:
        changed = {name: entry | changes.get(name[-1], {}) for name, entry in entries.items()}
        return pack({**changed, "__metadata__": metadata}, data + tail)

    yield "metadata_before_entries", packed([], A={"dtype": "F9"}), "Malformed", "__metadata__"
    yield "entries_in_order", packed(A={"data_offsets": [0, 4]}, B={"dtype": "F9"}), "Malformed", "q.A"
    yield "entry_before_hole", packed(tail=b"x", B={"shape": [3.0, 2]}), "Malformed", "q.B"
    turned = {"q.B": entries["q.B"] | {"data_offsets": [4, 28]}, "q.A": entries["q.A"] | {"data_offsets": [0, 32]}}
    yield "overlap_in_order_of_data", pack({"__metadata__": record, **turned}, data[:28]), "Malformed", "q.B"
    yield "trailing_before_key", packed({}, b"x"), "Malformed", "byte "
    yield "container_before_record", packed({"adapterkit": "{"}, b"x"), "Malformed", "byte "


def _records() -> Iterator[Case]:
    def record(**fields: Any) -> bytes:
        return native(json.dumps(RECORD | fields), TENSORS)  # in the order given, which is not canonical

    place = "metadata adapterkit"
    yield "version_before_fields", record(version="1", updates={}), "Malformed", f"{place}: version"
    for name, other in (
        ("absent_version", {}),
        ("null_version", {"version": None}),
        ("number_version", {"version": 1}),
    ):
        wrong = native(json.dumps({"updates": {}} | other), TENSORS)
        yield f"{name}_before_fields", wrong, "Malformed", f"{place}: version"
    yield "major_before_fields", record(version="2.0", updates={}), "Unsupported", "version"
    newer = record(version="1.9", updates={}, extensions={"x": 1}, x=2)
    yield "extensions_before_fields", newer, "Malformed", f"{place}.extensions"
    yield "fields_before_requires", record(requires=["x"], base=5), "Malformed", f"{place}.base"
    yield "requires_before_updates", record(requires=["x"], updates=[LORA | {"method": "y"}]), "Unsupported", "requires"
    wrong = LORA | {"version": "1", "method": ""}
    yield "fields_in_order", record(updates=[{"version": "1", **wrong}]), "Malformed", f"{place}.updates[0].version"
    yield "unknown_field_in_order", record(updates=[{"weight": 1, **wrong}]), "Malformed", f"{place}.updates[0]"
    lacking = {name: value for name, value in wrong.items() if name != "target"}
    yield "wrong_before_absent", record(updates=[lacking]), "Malformed", f"{place}.updates[0].method"
    yield (
        "inner_before_next",
        record(updates=[{"target": {"path": 5}, **lacking}]),
        "Malformed",
        f"{place}.updates[0].target.path",
    )


def _updates() -> Iterator[Case]:
    def file(*updates: dict[str, Any], **spare: Stored) -> bytes:
        record = {"version": "1.0", "updates": [LORA | update for update in updates]}
        return native(json.dumps(record), TENSORS | spare)

    apart = {"target": {"path": "k"}}
    yield "order_before_method", file({}, apart, {"method": "y"}), "Malformed", "updates[2]"
    yield "updates_in_order", file({"attributes": {"x": 1}}, {"method": "y"}), "Malformed", "updates[0]"
    yield "method_before_names", file({"method": "y", "tensors": {}}), "Unsupported", "updates[0]"
    yield "version_before_names", file({"version": 9, "tensors": {}}), "Unsupported", "version"
    yield "names_before_references", file({"tensors": {"A": "absent"}}), "Malformed", ": tensors"
    both = {"tensors": {"A": "q.A"}, "attributes": {"x": 1}}
    yield "fields_before_attributes", file(both), "Malformed", ": tensors"
    absent = {"attributes": {"x": 1}, "tensors": {"A": "absent", "B": "q.B"}}
    yield "attributes_before_references", file(absent), "Malformed", ": attributes"
    turned = {"tensors": {"B": "absent", "A": "absent"}}
    yield "references_in_order", file(turned), "Malformed", ": B"
    yield "reference_before_spare", file({"tensors": {"A": "q.A", "B": "absent"}}), "Malformed", ": B"
    unknown = {"method": "y", "target": {"path": "k"}}
    yield "references_before_next_update", file({"tensors": {"A": "q.A", "B": "absent"}}, unknown), "Malformed", ": B"
    yield "spare_before_targets", file({"target": {"path": "q", "layout": "x"}}, **SPARE), "Malformed", "spare"
    entries, data = layout(TENSORS | {"y": B, "x": B})
    header = {"__metadata__": {"adapterkit": text(RECORD)}, **dict(reversed(entries.items()))}
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    tied = {"__metadata__": header["__metadata__"], "z": nothing, "a": nothing, **layout(TENSORS)[0]}
    yield "spares_that_tie", pack(json.dumps(tied), layout(TENSORS)[1]), "Malformed", "z"
    yield "spares_in_order_of_data", pack(header, data), "Malformed", "y"


def _targets() -> Iterator[Case]:
    def file(*updates: dict[str, Any]) -> bytes:
        return native({"version": "1.0", "updates": [LORA | update for update in updates]}, TENSORS)

    wrong = {"attributes": {"scaling": "x"}}
    yield "path_before_layout", file({"target": {"path": "", "layout": "x"}}), "Malformed", "path"
    yield (
        "layout_before_rows",
        file({"target": {"path": "q", "layout": "x", "rows": [3, 0]}}),
        "Malformed",
        "q[3:0]: layout",
    )
    yield "rows_before_attributes", file({"target": {"path": "q", "rows": [3, 0]}} | wrong), "Malformed", "q[3:0]: rows"
    neck = {"method": "bottleneck", "tensors": {"down": "q.A", "up": "q.B"}, "attributes": {}}
    prompt = {"method": "prompt", "tensors": {"P": "q.A"}, "attributes": {}}
    place = {"target": {"path": "q", "layout": "in out *k"}}
    turned = [neck | place, place, prompt | place]
    yield "context_before_order", file(*turned), "Malformed", "q: layout"
    yield "targets_in_order", file({"target": {"path": "z"}} | wrong, {"target": {"path": "a", "layout": "x"}}), \
        "Malformed", "z: lora.scaling"  # fmt: skip


def _shapes() -> Iterator[Case]:
    def file(method: str, attributes: dict[str, Any], **tensors: Stored) -> bytes:
        update = LORA | {"method": method, "attributes": attributes, "tensors": {name: name for name in tensors}}
        return native({"version": "1.0", "updates": [update]}, tensors)

    def blocks(*shape: int) -> Stored:
        return stored(numbers("precedence", *shape), "F32")

    faults = {"terms": 101, "side": "top"}
    yield "attributes_in_order", file("oft", faults, square=blocks(1, 3, 3)), "Unsupported", "q: oft.side"
    yield "attribute_before_form", file("oft", {"terms": 101}, rescale=blocks(3)), "Malformed", "q: oft.terms"
    yield "form_before_type", file("ia3", {}, l=FLAG, l_in=FLAG), "Malformed", "q: ia3"
    yield "type_before_shape", file("lora", {}, A=blocks(8), B=FLAG), "ShapeMismatch", "q: lora.B"
    yield "shape_before_rule", file("oft", {}, pairs=blocks(1, 2), rescale=blocks(1, 1)), "ShapeMismatch", "oft.rescale"
    yield "rules_in_order", file("oft", {}, pairs=blocks(1, 2), rescale=blocks(3)), "Malformed", "q: oft.rescale"
    many = {"A": blocks(2, 4), "B": blocks(3, 3)}
    yield "shapes_before_sizes_of_a_target", file("lora", {}, **many), "ShapeMismatch", "q: lora.B"
    A_first = {"B": blocks(3, 3), "A": blocks(8)}
    yield "shapes_in_order_of_entry", file("lora", {}, **A_first), "ShapeMismatch", "q: lora.A"
    pairs = native(
        {"version": "1.0", "updates": [
            LORA | {"target": {"path": "q", "rows": [0, 5]}, "method": "oft", "attributes": {"side": "out"},
                    "tensors": {"pairs": "p", "rescale": "r"}}]},
        {"p": blocks(2, 1), "r": blocks(5)},
    )  # fmt: skip
    yield "rule_before_rows", pairs, "ShapeMismatch", "q[0:5]: oft"


def _values() -> Iterator[tuple[str, bytes, str]]:
    def file(*positions: int, second: float = 1.0) -> bytes:
        values = np.array([[1.0, 2.0], [3.0, second]])
        placed = {"index": stored(np.array(positions), "I64"), "values": stored(values, "F32")}
        update = LORA | {"method": "rows", "attributes": {}, "tensors": {name: name for name in placed}}
        return native({"version": "1.0", "updates": [update]}, placed)

    yield "finite_before_positions", file(-1, 0, second=float("inf")), "q: rows.values"


def _bases() -> Iterator[tuple[str, dict[str, bytes], str]]:
    one = pack(*layout({"a.weight": stored(numbers("base.a", 2, 2), "F32")}))
    two = pack(*layout({"b.weight": stored(numbers("base.b", 2, 2), "F32")}))

    def folder(weight_map: dict[str, str], **files: bytes) -> dict[str, bytes]:
        shards = {name.replace("__", "."): data for name, data in files.items()}
        return {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(), **shards}

    both = {"model.safetensors.index.json": b'{"metadata": [], "weight_map": {}}', "z.safetensors": one}
    yield "map_before_metadata", both, "weight_map"
    names = {"a.weight": "absent.safetensors", "b.weight": "../x"}
    yield "names_before_files", folder(names), "../x"
    names = {"a.weight": "z..", "b.weight": "a:", "c.weight": "b:"}
    yield "names_in_order", folder(names), "a:"
    names = {"a.weight": "absent.safetensors", "b.weight": "b.safetensors"}
    yield "files_before_containers", folder(names, b__safetensors=b""), "weight_map"
    names = {"a.weight": "z.safetensors", "b.weight": "y.safetensors"}
    yield "containers_in_order", folder(names, z__safetensors=b"", y__safetensors=two[:9] + b"!" + two[10:]), "header"
    names = {"a.weight": "z.safetensors", "b.weight": "z.safetensors", "c.weight": "y.safetensors"}
    yield "twice_before_misplaced", folder(names, z__safetensors=one, y__safetensors=one), "a.weight"
    tensors = {name: stored(numbers("base.a", 2, 2), "F32") for name in ("b.weight", "a.weight")}
    entries, data = layout(tensors)
    turned = pack(json.dumps(dict(reversed(entries.items()))), data)
    names = {"a.weight": "y.safetensors", "b.weight": "y.safetensors", "c.weight": "z.safetensors"}
    yield (
        "twice_in_order_of_data",
        folder(names, y__safetensors=pack(*layout(tensors)), z__safetensors=turned),
        "b.weight",
    )
    names = {"c.weight": "z.safetensors"}
    yield "unlisted_in_order_of_data", folder(names, z__safetensors=pack(json.dumps({
        **dict(reversed(entries.items())), "c.weight": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]},
    }), data + bytes(4))), "b.weight"  # fmt: skip
    names = {"b.weight": "z.safetensors", "c.weight": "z.safetensors"}
    yield "misplaced_before_unlisted", folder(names, z__safetensors=one), "b.weight"
    names = {"a.weight": "z.safetensors", "b.weight": "z.safetensors"}
    yield "index_before_config", folder(names, z__safetensors=one, config__json=b"["), "b.weight"
