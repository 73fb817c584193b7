"""Invalid safetensors files: lengths, headers, entries, offsets, metadata."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

from container import layout, pack

from invalid.case import DEEP, HEADER_END, RECORD, TENSORS, VALID, Invalid


def containers() -> Iterator[Invalid]:
    """All of them."""
    yield from _lengths()
    yield from _headers()
    yield from _entries()
    yield from _offsets()
    yield from _metadata()


def _entry(**fields: Any) -> bytes:
    """A file with one tensor `h.0.w` of four bytes, with other fields in its header entry; None takes one out."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields
    return pack({"h.0.w": {name: value for name, value in entry.items() if value is not None}}, bytes(4))


def _lengths() -> Iterator[Invalid]:
    yield Invalid("empty", b"", where="header length")
    yield Invalid("cut_in_length", VALID[:5], where="header length")
    yield Invalid("cut_in_header", VALID[:40], where="header length")
    yield Invalid("cut_before_data", VALID[:HEADER_END], where="byte")
    yield Invalid("cut_in_data", VALID[:-1], where="byte")
    yield Invalid("length_zero", bytes(8) + VALID[8:], where="header")
    yield Invalid("length_huge", b"\xff" * 8 + VALID[8:], where="header length")
    yield Invalid("length_beyond_file", len(VALID).to_bytes(8, "little") + VALID[8:], where="header length")
    yield Invalid("length_short", (HEADER_END - 40).to_bytes(8, "little") + VALID[8:], where="header")
    yield Invalid("length_long", (HEADER_END - 4).to_bytes(8, "little") + VALID[8:], where="header")
    yield Invalid("pickle", pickle.dumps({"q.A": [1.0]}, protocol=2), where="header length")


def _headers() -> Iterator[Invalid]:
    one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    yield Invalid("header_not_json", pack("weights: none"), where="header")
    yield Invalid("header_not_utf8", pack(b'{"\xff":' + one.encode() + b"}"), where="header")
    yield Invalid("header_array", pack("[]"), where="header")
    yield Invalid("header_text", pack('"t"'), where="header")
    yield Invalid("header_two_values", pack("{}{}"), where="header")
    yield Invalid("header_nul_padding", pack(b"{}\0\0\0\0\0\0"), where="header")
    yield Invalid("header_deep", pack('{"h.0.w":' + DEEP + "}"), where="")
    yield Invalid("header_half_surrogate", pack('{"\\ud800":' + one + "}"), where="header")
    yield Invalid("tensor_twice", pack(f'{{"h.0.w":{one},"h.0.w":{one}}}'), where="header")
    yield Invalid("metadata_twice", pack('{"__metadata__":{},"__metadata__":{}}'), where="header")
    yield Invalid(
        "entry_field_twice",
        pack('{"h.0.w":{"dtype":"U8","shape":[0],"shape":[0],"data_offsets":[0,0]}}'),
        where="header",
    )
    yield Invalid("tensor_twice_by_an_escape", pack(f'{{"h.0.w":{one},"h\\u002e0.w":{one}}}'), where="header")
    yield Invalid("header_mark", pack(b"\xef\xbb\xbf{}"), where="header")
    yield Invalid("header_utf8_of_a_surrogate", pack(b'{"\xed\xa0\x80":' + one.encode() + b"}"), where="header")
    yield Invalid("header_utf8_too_long", pack(b'{"\xc1\xa1":' + one.encode() + b"}"), where="header")
    yield Invalid("header_control", pack(f'{{"h\t":{one}}}'), where="header")
    yield Invalid("header_form_feed", pack("{}\f"), where="header")
    yield Invalid("header_comma", pack(f'{{"h.0.w":{one},}}'), where="header")
    yield Invalid("header_comment", pack("{/**/}"), where="header")
    yield Invalid("header_single_quotes", pack("{'h.0.w':" + one + "}"), where="header")
    for name, number in (("zero", "00"), ("plus", "+0"), ("point", "0."), ("hexadecimal", "0x0"), ("exponent", "0e")):
        spoiled = one.replace("[0]", f"[{number}]")
        yield Invalid(f"header_number_{name}", pack(f'{{"h.0.w":{spoiled}}}'), where="header", exact=True)
    # As many fields as an entry has: one came twice, and one is missing.
    yield Invalid("entry_field_for_another", pack('{"h.0.w":{"dtype":"U8","shape":[0],"shape":[0]}}'), where="header")


def _entries() -> Iterator[Invalid]:
    yield Invalid("dtype_unknown", _entry(dtype="F33"), where="h.0.w")
    yield Invalid("dtype_lowercase", _entry(dtype="f32"), where="h.0.w")
    yield Invalid("dtype_number", _entry(dtype=32), where="h.0.w")
    yield Invalid("dtype_missing", _entry(dtype=None), where="h.0.w")
    yield Invalid("dtype_disagrees", _entry(dtype="F64"), where="h.0.w")
    yield Invalid("entry_unknown_field", _entry(strides=[1]), where="h.0.w")
    yield Invalid("entry_list", pack({"h.0.w": ["F32", [1], [0, 4]]}, bytes(4)), where="h.0.w")
    yield Invalid("shape_disagrees", _entry(shape=[2]), where="h.0.w")
    yield Invalid("shape_negative", _entry(shape=[-1, -1]), where="h.0.w")
    yield Invalid("shape_huge", _entry(shape=[1 << 62, 1 << 62]), where="h.0.w")
    yield Invalid("shape_wraps_around", _entry(shape=[(1 << 62) + 1, 4]), where="h.0.w")
    yield Invalid("shape_beyond_64_bits", _entry(shape=[1 << 64]), where="h.0.w")
    none = {"dtype": "U8", "data_offsets": [0, 0]}
    yield Invalid("shape_beyond_63_bits", pack({"h.0.w": none | {"shape": [0, 1 << 63]}}), where="h.0.w", exact=True)
    yield Invalid("shape_exponent", pack('{"h.0.w":{"dtype":"U8","shape":[0e0],"data_offsets":[0,0]}}'), where="h.0.w")
    yield Invalid("shape_float", _entry(shape=[1.0]), where="h.0.w")
    yield Invalid("shape_bool", _entry(shape=[True]), where="h.0.w")
    yield Invalid("shape_text", _entry(shape="1"), where="h.0.w")
    yield Invalid("shape_number", _entry(shape=1), where="h.0.w")
    yield Invalid("shape_nan", pack('{"h.0.w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)))
    yield Invalid("shape_too_many_axes", _entry(shape=[1] * 65), where="h.0.w")


def _offsets() -> Iterator[Invalid]:
    entry = {"dtype": "U8", "shape": [4]}

    def two(first: list[Any], second: list[Any], size: int) -> bytes:
        return pack({"h.0.w": entry | {"data_offsets": first}, "h.1.w": entry | {"data_offsets": second}}, bytes(size))

    yield Invalid("offsets_three", _entry(data_offsets=[0, 4, 8]), where="h.0.w")
    yield Invalid("offsets_reversed", _entry(data_offsets=[4, 0]), where="h.0.w")
    yield Invalid("offsets_negative", _entry(data_offsets=[-4, 0]), where="h.0.w")
    yield Invalid("offsets_float", _entry(data_offsets=[0.0, 4.0]), where="h.0.w")
    yield Invalid("offsets_bool", _entry(dtype="U8", data_offsets=[False, True]), where="h.0.w")
    yield Invalid("offsets_beyond_file", _entry(shape=[250], data_offsets=[0, 1000]), where="byte")
    yield Invalid("offsets_same", two([0, 4], [0, 4], 4), where="h.1.w")
    turned = {"h.1.w": entry | {"data_offsets": [0, 4]}, "h.0.w": entry | {"data_offsets": [0, 4]}}
    yield Invalid("offsets_same_turned", pack(json.dumps(turned), bytes(4)), where="h.0.w")
    yield Invalid("offsets_overlap", two([0, 4], [2, 6], 6), where="h.1.w")
    yield Invalid("offsets_hole", two([0, 4], [8, 12], 12), where="h.1.w")
    yield Invalid("offsets_hole_at_start", _entry(data_offsets=[4, 8]), where="h.0.w")
    yield Invalid("trailing_bytes", VALID + b"\0", where="byte")
    yield Invalid("data_without_tensors", pack("{}", bytes(4)), where="byte")


def _metadata() -> Iterator[Invalid]:
    yield Invalid("metadata_number", pack({"__metadata__": {"adapterkit": 5}}), where="__metadata__")
    yield Invalid("metadata_object", pack({"__metadata__": {"adapterkit": RECORD}}), where="__metadata__")
    yield Invalid("metadata_list", pack({"__metadata__": []}), where="__metadata__")
    yield Invalid("metadata_null", pack({"__metadata__": None}), where="__metadata__")
    yield Invalid("record_missing", pack(*layout(TENSORS)), where="__metadata__")
