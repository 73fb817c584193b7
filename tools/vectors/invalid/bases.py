"""Invalid bases: indexes that point out of the folder or disagree with their shards, folders without one answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from container import layout, numbers, pack, stored, text

from invalid.case import Invalid


def bases() -> Iterator[Invalid]:
    """All of them."""
    yield from _indexes()
    yield from _folders()


ONE = pack(*layout({"a.weight": stored(numbers("base.a", 2, 2), "F32")}))
TWO = pack(*layout({"b.weight": stored(numbers("base.b", 2, 2), "F32")}))
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"


def _index(name: str, where: str, weight_map: Any, **files: bytes) -> Invalid:
    """A sharded base with the given index; its two shards may be given other contents, None takes one out."""
    shards = {FIRST: files.get("first", ONE), SECOND: files.get("second", TWO)}
    content = {name: data for name, data in shards.items() if data is not None}
    raw = weight_map if isinstance(weight_map, bytes) else text({"metadata": {}, "weight_map": weight_map}).encode()
    return Invalid(name, {INDEX: raw, **content}, where=where, opens="base")


def _indexes() -> Iterator[Invalid]:
    whole = {"a.weight": FIRST, "b.weight": SECOND}

    def naming(case: str, file: str) -> Invalid:
        return _index(case, file if file.isprintable() else "", whole | {"b.weight": file})

    yield naming("index_climbs", "../outside.safetensors")
    yield naming("index_climbs_inside", "x/../../outside.safetensors")
    yield naming("index_absolute", "/etc/passwd")
    yield naming("index_backslash", "..\\outside.safetensors")
    yield naming("index_drive", "C:outside.safetensors")
    yield naming("index_url", "https://example.org/model-2.safetensors")
    yield naming("index_file_url", "file:///etc/passwd")
    yield naming("index_nul", "model-2.safetensors\0")
    yield naming("index_part_empty", "part//model-2.safetensors")
    yield naming("index_part_dot", "./model-2.safetensors")
    yield naming("index_part_long", "\u00e9" * 128)
    yield _index("index_name_empty", "", whole | {"b.weight": ""})
    yield _index("shard_missing", "weight_map", whole, second=None)
    yield _index("shard_malformed", "header length", whole, second=TWO[:20])
    yield _index("index_tensor_absent", "c.weight", whole | {"c.weight": SECOND})
    yield _index("index_tensor_unlisted", "c.weight", whole, second=pack(*layout({
        "b.weight": stored(numbers("base.b", 2, 2), "F32"), "c.weight": stored(numbers("base.c", 2), "F32"),
    })))  # fmt: skip
    yield _index("index_tensor_twice", "a.weight", whole, second=pack(*layout({
        "a.weight": stored(numbers("base.a", 2, 2), "F32"), "b.weight": stored(numbers("base.b", 2, 2), "F32"),
    })))  # fmt: skip
    yield _index("index_metadata_list", "metadata", text({"metadata": [], "weight_map": whole}).encode())
    yield _index("index_shards_swapped", "a.weight", {"a.weight": SECOND, "b.weight": FIRST})
    weight_map = {"a.weight": "two/model.safetensors", "b.weight": "one/model.safetensors"}
    parts = {"one/model.safetensors": ONE, "two/model.safetensors": TWO}
    raw = text({"weight_map": weight_map}).encode()
    yield Invalid("index_folders_swapped", {INDEX: raw, **parts}, where="a.weight", opens="base")
    yield _index("index_not_json", "", b'{"weight_map": ')
    marked = b"\xef\xbb\xbf" + text({"weight_map": whole}).encode()
    yield _index("index_mark", "", marked)
    yield _index("index_half_surrogate", "", b'{"weight_map":{"a.weight":"\\ud800"}}')
    yield _index("index_nan", "", b'{"weight_map":{"a.weight":"model-1.safetensors"},"x":NaN}')
    yield _index("index_deep", "", b'{"weight_map":{"a.weight":"x"},"x":' + b"[" * 100 + b"]" * 100 + b"}")
    yield _index("index_list", "", b"[]")
    twice = b'{"weight_map":{"a.weight":"model-1.safetensors","a.weight":"model-2.safetensors"}}'
    yield _index("index_key_twice", "", twice)
    yield _index("index_without_map", "weight_map", b"{}")
    yield _index("index_map_empty", "weight_map", {})
    yield _index("index_map_numbers", "weight_map", whole | {"b.weight": 2})


def _folders() -> Iterator[Invalid]:
    config = {"model.safetensors": ONE, "config.json": b"{'model_type': 'llama'}"}
    index = text({"weight_map": {"a.weight": "model.safetensors"}}).encode()
    yield Invalid("config_not_json", config, opens="base")
    for name, data in (
        ("list", b"[]"), ("mark", b"\xef\xbb\xbf{}"), ("half_surrogate", b'{"a":"\\ud800"}'),
        ("not_utf8", b'{"a":"\xff"}'),
        ("comma", b'{"a":1,}'),
    ):  # fmt: skip
        content = {"model.safetensors": ONE, "config.json": data}
        yield Invalid(f"config_{name}", content, opens="base", exact=True)
    deep = {"model.safetensors": ONE, "config.json": b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"}
    yield Invalid("config_deep", deep, opens="base")
    yield Invalid("index_and_whole", {"model.safetensors": ONE, INDEX: index}, "UsageError", opens="base")
    yield Invalid("two_files_no_index", {FIRST: ONE, SECOND: TWO}, "UsageError", opens="base")
    hidden = {".a.safetensors": ONE, "b.safetensors": TWO}
    yield Invalid("two_files_one_hidden", hidden, "UsageError", opens="base")
    yield Invalid("ending_in_capitals", {"a.SAFETENSORS": ONE}, "UsageError", opens="base")
    yield Invalid("file_in_a_folder", {"part/model.safetensors": ONE}, "UsageError", opens="base")
    yield Invalid("no_weights", {"readme.txt": b"weights to follow\n"}, "UsageError", opens="base")
