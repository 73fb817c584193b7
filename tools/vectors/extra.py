"""Small vectors beside those of methods: canonical JSON, digests, valid records at the edges, a merge that rounds."""

from __future__ import annotations

import hashlib
import json
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from container import Stored, layout, native, numbers, pack, stored, text
from invalid.case import LORA, RECORD, TENSORS
from migrations import migrations

METHODS = Path(__file__).parents[2] / "spec" / "methods"

VALUES: list[tuple[Any, str]] = [
    (2.0**-44, "5.684341886080802e-14"),
    (0.5, "0.5"), (2.0, "2.0"), (1e-05, "1e-05"), (1e16, "1e+16"), (0.0001, "0.0001"),
    (9999999999999998.0, "9999999999999998.0"), (1125899906842624.25, "1125899906842624.2"),
    (-0.0, "-0.0"), (5e-324, "5e-324"), (1.7976931348623157e308, "1.7976931348623157e+308"), (1e22, "1e+22"),
    (0.1 + 0.2, "0.30000000000000004"), (123456.75, "123456.75"), (3, "3"), (2**63, "9223372036854775808"), (-7, "-7"),
    ("\u00e9\u2028\U0001f600/", '"\u00e9\u2028\U0001f600/"'), ("\x00\x1f\x7f", '"\\u0000\\u001f\x7f"'),
    ('"\\\b\f\n\r\t', '"\\"\\\\\\b\\f\\n\\r\\t"'),
    ({"\uffff": 1, "\U00010000": 2, "a": []}, '{"a":[],"\uffff":1,"\U00010000":2}'),
    ([None, True, False, {}], "[null,true,false,{}]"),
]  # fmt: skip
"""Value, and its canonical JSON as the text of the specification has it."""


TEXTS = [
    ("-0", "0"),
    ("-0.0", "-0.0"),
    ("0e5", "0.0"),
    ("-0E-1", "-0.0"),
    ("1E5", "100000.0"),
    ("1e2", "100.0"),
    ("10.50", "10.5"),
    ("1e-400", "0.0"),
    ("-1e-400", "-0.0"),
    ("1e15", "1000000000000000.0"),
    ("100E-2", "1.0"),
    ("2.2250738585072011e-308", "2.225073858507201e-308"),
    ("9007199254740993", "9007199254740993"),
    ("9007199254740993.0", "9007199254740992.0"),
    ("123456789012345678901234567890", "123456789012345678901234567890"),
    ("-12", "-12"),
    ("2.4703282292062328e-324", "5e-324"),
    ("2.4703282292062327e-324", "0.0"),
    (" [ 1 ,\t2\r\n] ", "[1,2]"),
    ('{"b":1,"a":{"d":2,"c":3}}', '{"a":{"c":3,"d":2},"b":1}'),
    (r'"\u0041\ud83d\ude00\/\u000b\u007F"', '"A\U0001f600/\\u000b\x7f"'),
    (r'"\u2028\u00E9"', '"\u2028\u00e9"'),
    ('{"":[],"\u00e9":1,"e\u0301":2}', '{"":[],"e\u0301":2,"\u00e9":1}'),
    ("true", "true"),
    ("[[],{}]", "[[],{}]"),
]
"""Text of JSON, and its canonical form."""


def canonical() -> list[dict[str, str]]:
    """Texts as JSON has them, in a form that is not canonical, and their canonical form."""
    made = [{"json": json.dumps(value, indent=1), "canonical": text} for value, text in VALUES]
    return made + [{"json": given, "canonical": text} for given, text in TEXTS]


def digests(spec: Path) -> Iterator[tuple[str, str]]:
    """The digest of each method's vector, by section 11 alone."""
    entries = {path.stem: tomllib.loads(path.read_text("utf-8")) for path in (spec / "methods").glob("*.toml")}
    for file in sorted((spec / "vectors" / "methods").glob("*.adapter.safetensors")):
        yield file.name.removesuffix(".adapter.safetensors"), _digest(file.read_bytes(), entries)
    for name, data in valid().items():
        yield name, _digest(data, entries)
    # A digest counts a method's oldest version, which the file of the older specification states.
    for name, data in migrations().items():
        if name.endswith(".1.0.safetensors"):
            yield f"migrations/{name.removesuffix('.1.0.safetensors')}", _digest(data, entries)


def _digest(data: bytes, entries: dict[str, Any]) -> str:
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    record = json.loads(header["__metadata__"]["adapterkit"])
    digest = hashlib.sha256()
    for update in sorted(record["updates"], key=lambda update: _name(update["target"])):
        entry, target = entries[update["method"]], update["target"]
        attributes = {}
        for attribute in entry.get("attributes", []):
            if attribute.get("since", 1) <= update["version"]:
                value = update["attributes"].get(attribute["name"], attribute.get("default"))
                attributes[attribute["name"]] = float(value) if attribute["type"] == "float" else value
        place = [target["path"], target.get("layout", "out *in"), target.get("rows")]
        head = [*place, update["method"], update["version"], attributes]
        digest.update(json.dumps(head, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())
        for tensor in (t["name"] for t in entry["tensors"] if t["name"] in update["tensors"]):
            held = header[update["tensors"][tensor]]
            digest.update(json.dumps([tensor, held["dtype"], held["shape"]], separators=(",", ":")).encode())
            digest.update(data[start + held["data_offsets"][0] : start + held["data_offsets"][1]])
    return digest.hexdigest()


def _name(target: dict[str, Any]) -> str:
    rows = target.get("rows")
    return (target["path"] or "(model)") + (f"[{rows[0]}:{rows[1]}]" if rows else "")


def valid() -> dict[str, bytes]:
    """Records at the edges of what a reader of 1.1 must accept."""
    kept = RECORD | {"foreign": {"format": "x", "data": {}, "tensors": {"rest": "x.rest"}}}
    deep: dict[str, Any] = {}
    for _ in range(59):
        deep = {"inside": deep}
    return {
        "newer_minor": native(RECORD | {"version": "1.9999", "colour": {"hue": [1, 2.5]}}, TENSORS),
        "older_version": native({"version": "1.0", "updates": [LORA | {"method": "residual"}]}, TENSORS),
        "addresses": native(RECORD | _ADDRESSES, TENSORS),
        "given_numbers": native(text(RECORD).replace('"scaling":0.5', '"scaling":1E0'), TENSORS),
        "targets_of_one_path": native(
            RECORD | {"updates": [_NECK, _at(path="q", rows=[0, 3]), _at(path="q", layout="in out *k")]},
            TENSORS | {f"q.{name}": stored(numbers(f"valid.{name}", *shape), "F32") for name, shape in _WIDTHS.items()},
        ),
        "oldest_version": native({"version": "1.0", "updates": [LORA]}, TENSORS),
        "foreign_tensor": native(kept, TENSORS | {"x.rest": stored(numbers("valid.rest", 2), "F32")}),
        "deep": native(RECORD | {"recipe": [{"op": "x", "args": deep}]}, TENSORS),
        "sixty_four_deep": native(RECORD | {"recipe": [{"op": "x", "args": {"inside": deep}}]}, TENSORS),
        "integer_scaling": native(RECORD | {"updates": [LORA | {"attributes": {"scaling": 2}}]}, TENSORS),
        "negative_zero": native(
            text(RECORD | {"updates": [LORA, LORA]}).replace("0.5", "-0", 1).replace("0.5", "-0.0"), TENSORS
        ),
        "nearest_digits": native(text(RECORD).replace("0.5", "5.6843418860808015e-14"), TENSORS),
        "code_points": native(
            RECORD | {"updates": [_at(path="\U0001f600"), _at(path="\uffff"), _at(path="e\u0301"), _at(path="\u00e9")]},
            TENSORS,
        ),
        "equal_names": native(
            RECORD
            | {"updates": [_at(path="q", rows=[0, 3]), _at(path="q[0:3]"), _at(path="q[0:3]", layout="in out *k")]},
            TENSORS,
        ),
        "no_elements": native(
            RECORD, {"q.A": Stored("F32", (0, 1 << 62, 1 << 62), b""), "q.B": Stored("F32", (3, 0), b"")}
        ),
        "positions_beyond_53_bits": _placed("rows", [(1 << 64) - 1, (1 << 64) - 2, 1 << 53, (1 << 53) + 1], "U64", 4),
        "pairs_beyond_53_bits": _placed("shira", [0, 1 << 62, 1, 1 << 53, 0, 0, 3, 0], "I64", 2, 4),
        "context_beside_weight": native(
            RECORD | {"updates": [LORA, LORA | {"method": "prompt", "tensors": {"P": "q.A"}, "attributes": {}}, LORA]},
            TENSORS,
        ),
        "other_metadata": pack(
            _header(text(RECORD)) | {"__metadata__": {"adapterkit": text(RECORD), "format": "pt", "": "x"}},
            layout(TENSORS)[1],
        ),
        "nulls": native(
            json.dumps(RECORD | {"base": None, "foreign": None, "updates": [_at(path="q", rows=None)]}), TENSORS
        ),
        "empty_name": native(
            RECORD | {"updates": [LORA | {"tensors": {"A": "", "B": "q.B"}}]},
            {"": TENSORS["q.A"], "q.B": TENSORS["q.B"]},
        ),
        "one_tensor_twice": native(
            RECORD | {"updates": [LORA | {"tensors": {"A": "t", "B": "t"}}]},
            {"t": stored(numbers("valid.twice", 2, 2), "F32")},
        ),
        "foreign_of_any_bytes": native(kept | {"foreign": _ANY}, TENSORS | _ANY_TENSORS),
        "unaligned": _unaligned(),
        "minus_zero_in_a_header": pack(text(_header(text(RECORD))).replace("[0,", "[-0,"), layout(TENSORS)[1]),
        "long_integers": native(
            RECORD
            | {
                "updates": [
                    LORA
                    | {
                        "method": "reft",
                        "attributes": {"prefix_positions": 10**30},
                        "tensors": {name: name for name in _REFT},
                    }
                ],
                "recipe": [{"op": "x", "args": {"n": 10**400}}],
            },
            _REFT,
        ),
        "scaling_that_underflows": native(
            text(RECORD | {"updates": [LORA, LORA]}).replace("0.5", "1e-400", 1).replace("0.5", "-1e-400"), TENSORS
        ),
        "experts_with_the_same_positions": native(
            RECORD
            | {
                "updates": [
                    LORA
                    | {
                        "method": "rows",
                        "attributes": {},
                        "target": {"path": "q", "layout": "e out *in"},
                        "tensors": {"index": "index", "values": "values"},
                    }
                ]
            },
            {"index": stored(np.array([[0, 1], [1, 0]]), "I64"), "values": stored(numbers("valid.e", 2, 2, 3), "F32")},
        ),
        "white_space": pack(f" \n{text(_header(' ' + text(RECORD) + chr(10)))}\t\r ", layout(TENSORS)[1]),
    }


_ANY = {"format": "x", "data": {}, "tensors": {name: name for name in ("flag", "nan", "pair")}}
_ANY_TENSORS = {
    "flag": Stored("BOOL", (2,), b"\2\xff"),
    "nan": Stored("F32", (), b"\0\0\xc0\x7f"),
    "pair": Stored("C64", (1,), bytes(8)),
}
"""What is left from a foreign file: its values are not looked at."""

_REFT = {
    "projection": stored(numbers("valid.projection", 1, 3), "F32"),
    "source": stored(numbers("valid.source", 1, 3), "F32"),
}


def _unaligned() -> bytes:
    """A header whose length is odd, and numbers of four bytes that begin behind one byte."""
    foreign = {"format": "x", "data": {}, "tensors": {"a": "a"}}
    entries, data = layout({"a": Stored("U8", (1,), b"\7"), **TENSORS})
    header = text({"__metadata__": {"adapterkit": text(RECORD | {"foreign": foreign})}, **entries}).encode()
    header += b" " * (1 - len(header) % 2)
    return struct.pack("<Q", len(header)) + header + data


_NECK = LORA | {"method": "bottleneck", "tensors": {"down": "q.down", "up": "q.up"}, "attributes": {}}
_WIDTHS = {"down": (2, 3), "up": (3, 2)}
_ADDRESSES: dict[str, Any] = {
    "base": {"id": "https://example.org/model", "revision": "../../etc", "config_hash": None},
    "recipe": [{"op": "run", "args": {"command": "rm -r /", "file": "/etc/passwd"}}],
    "foreign": {"format": "x", "data": {"path": "file:///etc/passwd"}, "tensors": {}},
}
"""Names of files and addresses, which a reader looks at as text alone."""


def _at(**target: Any) -> dict[str, Any]:
    return LORA | {"target": target}


def _header(record: str) -> dict[str, Any]:
    return {"__metadata__": {"adapterkit": record}, **layout(TENSORS)[0]}


def _placed(method: str, positions: list[int], dtype: str, *shape: int) -> bytes:
    """An adapter whose positions are more than a binary64 tells apart; no weight has so many, and a file may."""
    packed = struct.pack(f"<{len(positions)}{'Q' if dtype == 'U64' else 'q'}", *positions)
    index = Stored(dtype, shape, packed)
    entry = tomllib.loads((METHODS / f"{method}.toml").read_text("utf-8"))
    (other,) = (tensor["name"] for tensor in entry["tensors"] if tensor["name"] != "index")
    values = stored(numbers(f"valid.{method}", 4, *([2] if method == "rows" else [])), "F32")
    update = LORA | {"method": method, "tensors": {"index": "q.index", other: "q.values"}, "attributes": {}}
    return native(RECORD | {"updates": [update]}, {"q.index": index, "q.values": values})


def folders() -> dict[str, dict[str, bytes]]:
    """Base folders that a reader must open."""
    one, two = (pack(*layout({f"{n}.weight": stored(numbers(f"base.{n}", 2, 2), "F32")})) for n in "ab")
    first, second = "model-1.safetensors", "model-2.safetensors"
    index = json.dumps({"metadata": None, "weight_map": {"a.weight": first, "b.weight": second}}).encode()
    shards = {"model.safetensors.index.json": index, first: one, second: two}
    return {
        "single": {"model.safetensors": one},
        "single_beside_others": {"model.safetensors": one, "other.safetensors": two},
        "indexed": shards,
        "indexed_beside_others": {**shards, "other.safetensors": one},
        "named_otherwise": {"weights.safetensors": one},
        "config_key_twice": {"model.safetensors": one, "config.json": b'{"a": 1, "a": 1e999}'},
        "indexed_in_folders": {
            "model.safetensors.index.json": index.replace(b"model-", b"part/model-"),
            f"part/{first}": one,
            f"part/{second}": two,
        },
        "folder_for_an_index": {"model.safetensors.index.json/x": b"{}", "model.safetensors": one},
        "folder_for_a_file": {"model.safetensors/x": b"", "other.safetensors": one},
        "config_64_deep": {"model.safetensors": one, "config.json": b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"},
        "hidden": {".a.safetensors": one},
        "indexed_with_other_endings": {
            "model.safetensors.index.json": index.replace(b".safetensors", b".bin"),
            first.replace(".safetensors", ".bin"): one,
            second.replace(".safetensors", ".bin"): two,
        },
        "folder_for_a_config": {"model.safetensors": one, "config.json/x": b"{}"},
        "config_with_nan": {"model.safetensors": one, "config.json": b'{"limit": NaN, "most": Infinity}'},
    }


def merges() -> dict[str, bytes]:
    """A LoRA in F32 merged into BF16 and F16, rounded once to nearest, ties to even, from float64."""
    rng = np.random.default_rng(7)
    A, B = rng.normal(size=(4, 32)).astype("f4"), rng.normal(size=(24, 4)).astype("f4")
    W = rng.normal(size=(24, 32)).astype("f4")
    record = {"version": "1.0", "updates": [LORA | {"target": {"path": path}} for path in ("bf16", "f16")]}
    adapter = native(record, {"q.A": stored(A, "F32"), "q.B": stored(B, "F32")})
    low = {"bf16": _bf16(W.astype("f8")), "f16": Stored("F16", W.shape, W.astype("<f2").tobytes())}
    held = {"bf16": _from_bf16(low["bf16"]), "f16": np.frombuffer(low["f16"].data, "<f2").reshape(W.shape).astype("f8")}
    exact = {path: held[path] + 0.5 * (B.astype("f8") @ A.astype("f8")) for path in held}
    merged = {"bf16": _bf16(exact["bf16"]), "f16": Stored("F16", W.shape, exact["f16"].astype("<f2").tobytes())}
    parts = [LORA | {"target": {"path": "fused", "rows": rows}} for rows in ([12, 24], [0, 12])]
    half = np.concatenate([0.5 * (B[:12].astype("f8") @ A), 0.5 * (B[:12].astype("f8") @ A)])
    fused = {"fused.weight": stored(W, "F32"), "fused.bias": stored(W[:, 0], "F32")}
    return {
        "rows.adapter": native(
            {"version": "1.0", "updates": parts}, {"q.A": stored(A, "F32"), "q.B": stored(B[:12], "F32")}
        ),
        "rows.base": pack(*layout(fused)),
        **_refused(),
        "rows.merged": pack(*layout(fused | {"fused.weight": stored((W + half).astype("f4"), "F32")})),
        "lora.adapter": adapter,
        "lora.base": pack(*layout({f"{path}.weight": tensor for path, tensor in low.items()})),
        "lora.merged": pack(*layout({f"{path}.weight": tensor for path, tensor in merged.items()})),
    }


def _refused() -> dict[str, bytes]:
    """A DoRA whose changed row has the norm 0, and a change that BF16 has no number for."""
    nothing = {"A": stored(np.zeros((1, 2)), "F32"), "B": stored(np.zeros((2, 1)), "F32")}
    dora = LORA | {"method": "dora", "tensors": {"A": "A", "B": "B", "magnitude": "m"}, "attributes": {}}
    large = {"q.A": stored(np.full((1, 2), 2.0**100), "F32"), "q.B": stored(np.full((2, 1), 2.0**30), "F32")}
    base = pack(*layout({"q.weight": stored(np.array([[0.0, 0.0], [1.0, 1.0]]), "BF16")}))
    return {
        "norm_of_zero.adapter": native(RECORD | {"updates": [dora]}, nothing | {"m": stored(np.ones(2), "F32")}),
        "norm_of_zero.base": base,
        "beyond_bf16.adapter": native(RECORD, large),
        "beyond_bf16.base": base,
    }


def _bf16(values: np.ndarray) -> Stored:
    """Float64 rounded once to BF16, to nearest, ties to even: 8 bits of significand."""
    mantissa, exponent = np.frexp(values)
    rounded = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype("<f4")
    return stored(rounded, "BF16")


def _from_bf16(tensor: Stored) -> np.ndarray:
    bits = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
    return bits.view("<f4").reshape(tensor.shape).astype("f8")
