"""The native format, which spec/README.md defines: a safetensors file with the metadata key `adapterkit`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ..core.adapter import LAYOUTS, Adapter, BaseRef, Foreign, Step, Target, canonical
from ..core.updates import Update
from ..errors import WRITE_AGAIN, AdapterkitError, Malformed, Unrepresentable, Unsupported, first_line, shown
from ..io import safetensors
from ..io.lazy import as_lazy
from ..io.strict_json import load_json
from ..methods import METHODS
from ._format import Format

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Lazy, Leaf
    from ..io.strict_json import JsonValue

SPEC = "1.1"
KEY = "adapterkit"
FILE = "adapter.safetensors"
MAX_RECORD = 256 << 20
"""The largest accepted size, in bytes, of a `NAME.onnx_adapter.json` file, which contains only a record.

The limit does not apply to adapterkit's own format, which stores the record under the metadata key `adapterkit`.
"""

Text = Annotated[str, msgspec.Meta(min_length=1)]
Layout = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(LAYOUTS)})]
NUMBER = "(0|[1-9][0-9]{0,3})"
"""The pattern of a MAJOR or MINOR number. It allows no leading zeros, so that each version has one spelling."""

Version = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^1\.{NUMBER}$"})]
Row = Annotated[int, msgspec.Meta(ge=0)]


class TargetRecord(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The record of a target: a weight or module of a base; see `adapterkit.Target`."""

    path: str
    layout: Layout = LAYOUTS[0]
    rows: tuple[Row, Row] | None = None


class UpdateRecord(msgspec.Struct, forbid_unknown_fields=True):
    """The record of an update. `tensors` maps fields of the method to names of tensors in the file."""

    target: TargetRecord
    method: Text
    version: Annotated[int, msgspec.Meta(ge=1)]
    tensors: dict[str, str]
    attributes: dict[str, Any]


class BaseRecord(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The record of the base that the adapter was trained for; see `adapterkit.BaseRef`."""

    id: str | None = None
    revision: str | None = None
    config_hash: str | None = None


class StepRecord(msgspec.Struct, forbid_unknown_fields=True):
    """The record of one step of the lineage."""

    op: str
    args: dict[str, Any]


class ForeignRecord(msgspec.Struct, forbid_unknown_fields=True):
    """Data of the source file that no update can express."""

    format: str
    data: dict[str, Any]
    tensors: dict[str, str]


class Record(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The whole record: the value of the metadata key."""

    version: Version
    updates: Annotated[list[UpdateRecord], msgspec.Meta(min_length=1)]
    requires: list[str] = []
    recipe: list[StepRecord] = []
    base: BaseRecord | None = None
    foreign: ForeignRecord | None = None
    extensions: dict[str, Any] = {}


class Native(Format):
    """adapterkit's own format, which can store every `Adapter`."""

    url = "https://github.com/adapterkit/adapterkit/blob/main/spec/README.md"
    description = f"adapterkit's own: one safetensors file, spec {SPEC}"
    methods = frozenset(METHODS)
    owns = frozenset({FILE})

    def sniff(self, path: Path) -> bool:
        try:
            return KEY in safetensors.read_header(_file(path)).metadata
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        file = _file(path)
        header = safetensors.read_header(file)
        if KEY not in header.metadata:
            cure = "This is not an adapterkit file; name its format with --from (format=), or omit --from to detect it"
            raise Malformed(f"the file has no metadata key {KEY!r}", path=file, where="__metadata__", cure=cure)
        try:
            tensors = safetensors.handles(header)
            return decode_record(header.metadata[KEY], tensors)
        except AdapterkitError as error:
            raise error.at(path=file) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        unknown = [f"{t}: {u.method} is not a registered method" for t, u in adapter if u.method not in METHODS]
        if unknown:
            cure = "If an update combines several updates, write those updates instead"
            raise Unrepresentable("the format can store only updates with registered methods", items=unknown, cure=cure)
        tensors: dict[str, Leaf] = {}
        record = encode_record(adapter, tensors)
        try:
            plain = msgspec.to_builtins(record)
        except (TypeError, RecursionError) as error:
            why = f"the adapter has a value that JSON cannot express ({first_line(error)})"
            raise Malformed(
                why, where=f"metadata {KEY}", cure="Remove the value, or replace it with JSON values"
            ) from None
        text = canonical(plain)
        safetensors.write(_file(path), {name: as_lazy(leaf) for name, leaf in tensors.items()}, {KEY: text})
        return []


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def decode_record(text: str, tensors: Mapping[str, Lazy]) -> Adapter:
    """Return the adapter that a record and its tensors contain.

    Raises:
        Malformed: the record is invalid, or does not match the tensors.
        Unsupported: the record needs a newer release of adapterkit.
    """
    return _decode(_parse(text), tensors)


def encode_record(adapter: Adapter, tensors: dict[str, Leaf]) -> Record:
    """Return the record of an adapter, and add the adapter's tensors to `tensors`.

    If several fields have the same tensor, it is stored once.
    """
    names: dict[int, str] = {}

    def store(name: str, leaf: Leaf) -> str:
        if id(leaf) not in names:
            names[id(leaf)] = _unused(name, tensors)
            tensors[names[id(leaf)]] = leaf
        return names[id(leaf)]

    base, foreign = adapter.base, adapter.foreign
    return Record(
        version=version_of(adapter),
        updates=[_encode_update(target, update, store) for target, update in adapter],
        recipe=[StepRecord(step.op, dict(step.args)) for step in adapter.recipe],
        base=None if base is None else BaseRecord(base.id, base.revision, base.config_hash),
        foreign=None if foreign is None else _encode_foreign(foreign, store),
        extensions=dict(adapter.extensions),
    )


def version_of(adapter: Adapter) -> str:
    """Return the oldest version of the spec that can express an adapter, so that older releases can read its file."""
    return max((METHODS[update.method].since[update.stated_version - 1] for _, update in adapter), default="1.0")


def _encode_update(target: Target, update: Update, store: Callable[[str, Leaf], str]) -> UpdateRecord:
    tensors = {name: store(f"{target.path}.{name}".lstrip("."), leaf) for name, leaf in update.tensors.items()}
    # msgspec omits `layout` only if it is the same object as the default, `LAYOUTS[0]`. An equal string may be another
    # object, so use the string from `LAYOUTS` if there is one.
    layout = next((known for known in LAYOUTS if known == target.layout), target.layout)
    place = TargetRecord(target.path, layout, target.rows)
    version = update.stated_version
    return UpdateRecord(place, update.method, version, tensors, update.attributes_of(version))


def _encode_foreign(foreign: Foreign, store: Callable[[str, Leaf], str]) -> ForeignRecord:
    tensors = {name: store(f"foreign.{name}", leaf) for name, leaf in foreign.tensors.items()}
    return ForeignRecord(foreign.format, dict(foreign.data), tensors)


def _unused(name: str, taken: Mapping[str, object]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}:{count}"
    return free


def _parse(text: str) -> Record:
    """Parse the record in a metadata value.

    If the record has a newer MINOR version, its unknown fields are moved to `extensions`.
    """
    try:
        fields = load_json(text)
        if not isinstance(fields, dict):
            raise ValueError("the record is not a JSON object")
        if _check_version(fields.get("version")):
            fields = _keep_unknown(fields)
        record = msgspec.convert(fields, Record)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        why, _, place = str(error).partition(" - at ")
        # msgspec reports `$.updates[0].tensors[...]`, with `[...]` instead of the key. Remove this ending.
        where = f"metadata {KEY}" + place.strip("`").removeprefix("$").removesuffix("[...]")
        raise Malformed(why, where=where, cure=WRITE_AGAIN) from None
    if record.requires:
        raise Unsupported(
            f"the file requires {', '.join(record.requires)}, which this release does not have",
            where="requires",
            cure=_UPGRADE,
        )
    return record


def _keep_unknown(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    known = {name: value for name, value in fields.items() if name in Record.__struct_fields__}
    unknown = {name: value for name, value in fields.items() if name not in known}
    kept = known.get("extensions", {})
    if not isinstance(kept, dict) or kept.keys() & unknown.keys():
        raise ValueError("must be a JSON object without keys that are fields of the record - at `$.extensions`")
    return {**known, "extensions": kept | unknown}


def _check_version(version: object) -> bool:
    """Check that this release can read a record of this version. Return whether its MINOR number exceeds SPEC's."""
    if not isinstance(version, str) or not re.fullmatch(rf"{NUMBER}\.{NUMBER}", version):
        why = f"{shown(version)} is not a version of the form MAJOR.MINOR, such as 1.0"
        raise Malformed(why, where=f"metadata {KEY}: version", cure=WRITE_AGAIN)
    (major, minor), (own_major, own_minor) = (map(int, v.split(".")) for v in (version, SPEC))
    if major != own_major:
        raise Unsupported(
            f"the file follows spec {version}; this release reads {own_major}.x", where="version", cure=_UPGRADE
        )
    return minor > own_minor


def _decode(record: Record, tensors: Mapping[str, Lazy]) -> Adapter:
    unused = dict.fromkeys(tensors)

    def take(name: str, field: str) -> Lazy:
        if name not in tensors:
            raise Malformed(
                f"this field refers to a tensor {name!r} that is not in the file", where=field, cure=WRITE_AGAIN
            )
        unused.pop(name, None)
        return tensors[name]

    updates: dict[Target, tuple[Update, ...]] = {}
    for position, entry in enumerate(record.updates):
        target = Target(entry.target.path, entry.target.layout, entry.target.rows)
        try:
            if target in updates and target != next(reversed(updates)):
                raise Malformed("updates of one target are not adjacent", cure=WRITE_AGAIN)
            updates[target] = (*updates.get(target, ()), _decode_update(entry, take))
        except AdapterkitError as error:
            error.where = f"updates[{position}] ({target})" + (f": {error.where}" if error.where else "")
            raise
    foreign = (
        None
        if record.foreign is None
        else Foreign(
            record.foreign.format,
            record.foreign.data,
            {name: take(key, f"foreign.{name}") for name, key in record.foreign.tensors.items()},
        )
    )
    if unused:
        raise Malformed("neither an update nor `foreign` uses this tensor", where=next(iter(unused)), cure=WRITE_AGAIN)
    base = None if record.base is None else BaseRef(**msgspec.structs.asdict(record.base))
    recipe = tuple(Step(step.op, step.args) for step in record.recipe)
    return Adapter(updates, base, recipe, foreign, record.extensions)


def _decode_update(entry: UpdateRecord, take: Callable[[str, str], Lazy]) -> Update:
    cls = METHODS[entry.method]
    if entry.version > cls.version or not cls.since[entry.version - 1]:
        versions = ", ".join(str(number) for number, since in enumerate(cls.since, 1) if since)
        why = f"the update has version {entry.version} of {entry.method}; this release reads {versions}"
        raise Unsupported(why, where="version", cure=_UPGRADE)
    known = {n: f for n, f in cls.attribute_fields().items() if f.metadata.get("since", 1) <= entry.version}
    _check_names("tensors", entry.tensors, cls.tensor_fields())
    _check_names("attributes", entry.attributes, known)
    return cls(**{field: take(name, field) for field, name in entry.tensors.items()}, **entry.attributes)


def _check_names(what: str, given: Mapping[str, object], fields: Mapping[str, dataclasses.Field[object]]) -> None:
    """Check that all given names are in `fields`, and that all fields without a default are given."""
    for name in given:
        if name not in fields:
            raise Malformed(f"unknown name {name!r}", where=what, cure=f"Known: {', '.join(fields) or 'none'}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in given:
            raise Malformed(f"{name!r} is missing", where=what, cure=WRITE_AGAIN)


_UPGRADE = "Upgrade adapterkit, or write the file again with an older release of adapterkit"
