"""Write the statement about the origin of the signed files, which is signed together with their digests.

The statement is a copy of records in the files: the lineage of an adapter, or the record of a merge. So the signature
covers the names of base and adapters, and the weights of the adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.licence_terms import licence_at
from ..core.metadata import METADATA, REPORT, fingerprints_of, shapes_of
from ..errors import AdapterkitError, UnknownFormat, first_line, public
from ..formats import detect, read
from ..io.checkpoint import opened
from ..naming.binding.fitting import merge_record

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..io.strict_json import JsonValue

VERSION = 1
"""The version of the statement's format."""

_EXACT = 1 << 53
"""Larger integers are stored as text: the predicate is a protobuf `Struct`, whose numbers are doubles."""

_OF_FILES = ("written", "norms")
"""Parts of a merge's record that the statement omits, because they describe bytes, which the signed digests cover."""


def statement_of(path: Path) -> dict[str, JsonValue]:
    """Return the records of the files at `path` about their origin, as plain JSON.

    Args:
        path: an adapter, a model with or without the record of a merge, an ONNX graph, or any other file or folder.

    Raises:
        StorageError: a file cannot be read.
    """
    from .. import __version__

    told = {"version": VERSION, "adapterkit": __version__, "licence": licence_at(path).get("license"), **_kind(path)}
    plain: dict[str, Any] = _plain(told)
    return plain


def _kind(path: Path) -> Mapping[str, object]:
    if (path / REPORT).is_file():
        return _merged(path)
    try:
        name = detect(path)
        return _adapter(read(path, name), name)
    except UnknownFormat:
        pass
    except AdapterkitError as error:
        # Sign a file that cannot be read: reading may only require an option, for example alpha.
        return {"kind": "adapter", "unread": error.why}
    if path.suffix.lower() == ".onnx":
        return {"kind": "graph", **_original(path)}
    try:
        opened(path)
    except AdapterkitError:
        return {"kind": "files"}
    return {"kind": "model"}


def _merged(path: Path) -> dict[str, JsonValue]:
    """Return the statement of a merged model: the record of the merge, without the parts that describe bytes."""
    record = merge_record(opened(path))
    made_from = {key: value for key, value in record.items() if key not in _OF_FILES}
    return {"kind": "merged", "made_from": made_from}


def _adapter(adapter: Adapter, name: str) -> dict[str, object]:
    base = adapter.base
    return {
        "kind": "adapter", "format": name, "digest": adapter.digest(), "methods": list(adapter.methods),
        "targets": len(adapter.updates),
        "base": {
            "id": base and base.id, "revision": base and base.revision, "config_hash": base and base.config_hash,
            "fingerprints": list(fingerprints_of(adapter)), "shapes": list(shapes_of(adapter)),
        },
        "lineage": [{"op": step.op, "args": _without_metadata(step.args)} for step in adapter.recipe],
    }  # fmt: skip


def _original(path: Path) -> dict[str, JsonValue]:
    """Return the sha256 of the graph without adapters, which `onnx.inject` records."""
    import onnx

    from ..onnx.injecting import ORIGINAL

    try:
        model = onnx.load(path, load_external_data=False)
        note = next((each.value for each in model.metadata_props if each.key == ORIGINAL), None)
        return {} if note is None else {"original_sha256": json.loads(note)["sha256"]}
    except Exception as error:  # Sign the file even if the graph or its metadata is damaged (protobuf's DecodeError).
        return {"unread": first_line(error)}


def _without_metadata(args: object) -> object:
    """Remove the metadata of training tools, which can take megabytes, and is in files that are signed anyway."""
    if isinstance(args, Mapping):
        return {key: _without_metadata(value) for key, value in args.items() if key != METADATA}
    return [_without_metadata(each) for each in args] if isinstance(args, list | tuple) else args


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return public(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return str(value)
    return value
