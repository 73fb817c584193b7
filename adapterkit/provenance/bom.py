"""Write a bill of materials for an adapter, a merged model or an ONNX graph: an ML-BOM in CycloneDX 1.6.

This module writes the JSON itself, because the library `cyclonedx-python-lib` does not support model cards. A model
card is the core of an ML-BOM. The tests validate every document with the copy of the official schema in
`cyclonedx-python-lib`.

The document is reproducible: by default, the same files always give the same document, byte for byte. So the document
has no serial number by default, and it has a time only if SOURCE_DATE_EPOCH is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.arguments import checks_types
from ..core.licence_terms import (
    BASE,
    MAX_CARD,
    Licence,
    Part,
    called,
    choices,
    conflicts,
    is_expression,
    licence_at,
    metadata,
    parts_of,
    spdx_expression_of,
    spdx_of,
    terms_of,
)
from ..core.metadata import REPORT
from ..errors import AdapterkitError, Malformed, StorageError, Unsupported, UsageError, storage_error
from ..io.atomic import write_bytes
from ..io.checkpoint import read_json
from ..io.inputs import open_input
from ..io.locations import is_repo, located, path_text
from ..io.stages import stage
from ..io.staging import check_free, staged
from .signing import check_utf8, files_of, linked_folders, special_files, statement_of

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
EPOCH = "SOURCE_DATE_EPOCH"
"""The environment variable that sets the document's time, in seconds since 1970. It is the standard variable for
reproducible builds."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Bom:
    """A bill of materials.

    Attributes:
        data: the document as plain JSON.
    """

    data: Mapping[str, JsonValue]

    def __repr__(self) -> str:
        data: Mapping[str, Any] = self.data
        main, ancestors = data["metadata"]["component"], data["components"]
        return f"Bom({main['name']!r}: {len(main.get('components', ()))} files, {len(ancestors)} ancestors)"

    def text(self) -> str:
        """Return the document as indented JSON text, as `save` writes it."""
        return json.dumps(self.data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @checks_types
    def save(self, out: str | PathLike[str], *, overwrite: bool = False, made_from: str | None = None) -> Path:
        """Write the document atomically.

        Args:
            out: the path of the file to write.
            overwrite: replace an existing file.
            made_from: a digest of the inputs. It is stored with the document, so that a later run with the same inputs
                recognises the document.

        Raises:
            StorageError: the file exists or cannot be written.
        """
        path = Path(out)
        if path.is_dir():
            raise StorageError("the path is a folder", path=path, cure="Name a file, such as bom.cdx.json")
        check_free(path, overwrite)
        with staged(path, overwrite=overwrite, made_from=made_from) as place:
            write_bytes(place, self.text().encode())
        return path


@checks_types
def bom(path: str | PathLike[str], *, serial: bool = False, leave_out: Path | None = None) -> Bom:
    """Return the bill of materials of an adapter, a model or an ONNX graph.

    Args:
        path: a folder or a file.
        serial: add a random serial number, as CycloneDX recommends for published documents.
        leave_out: a file below `path` to omit, such as the document itself.

    Returns:
        A CycloneDX 1.6 document. It contains the licences of the model, and the SHA-256 of every file. It lists the
        base and the adapters as ancestors of the model. It also contains a model card with values from the files.

    Raises:
        StorageError: the path does not exist or cannot be read.
        Unsupported: the folder contains a link to a folder, a link without a target, a pipe or a device; or a file's
            name is not UTF-8.
        UsageError: SOURCE_DATE_EPOCH is not a number of seconds.

    Example:
        >>> adapterkit.provenance.bom("merged").save("merged.cdx.json")  # doctest: +SKIP
    """
    from .. import __version__

    root = located(path_text(path))
    files = files_of(root, root if leave_out is None else leave_out) if root.is_dir() else files_of(root, root)
    check_utf8(root, files)
    if linked := linked_folders(root):
        why = "this is a link to a folder, and the document would not list the files in the linked folder"
        cure = "Copy the folder without links (cp -rL), and pass the copy"
        raise Unsupported(why, path=linked[0], cure=cure)
    if unreadable := special_files(root):
        what = "a link whose target is missing" if unreadable[0].is_symlink() else "neither a file nor a folder"
        why = f"this is {what}, so the document cannot list its digest"
        raise Unsupported(why, path=unreadable[0], cure="Remove it, or pass a copy of the folder without it")
    stage("reading the lineage")
    statement = statement_of(root)
    stage("hashing files")
    main, ancestors = _main(root, statement, files), list(_ancestors(statement, root))
    if ancestors:
        main["pedigree"] = {"ancestors": [{k: v for k, v in each.items() if k != "bom-ref"} for each in ancestors]}
    refs = [each["bom-ref"] for each in ancestors]
    tool = {"type": "application", "name": "adapterkit", "version": __version__}
    return Bom({
        "$schema": SCHEMA, "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        **({"serialNumber": f"urn:uuid:{uuid.uuid4()}"} if serial else {}),
        "metadata": {**_time(), "tools": {"components": [tool]}, "component": main},
        "components": ancestors,
        "dependencies": [{"ref": main["bom-ref"], "dependsOn": refs}, *({"ref": ref} for ref in refs)],
    })  # fmt: skip


def _time() -> dict[str, str]:
    text = os.environ.get(EPOCH)
    if text is None:
        return {}
    try:
        return {"timestamp": datetime.fromtimestamp(int(text), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    except (ValueError, OverflowError, OSError):
        why = f"{EPOCH} is not a number of seconds: {text!r}"
        raise UsageError(why, cure=f"Set {EPOCH} to whole seconds since 1970, or unset it") from None


def _main(root: Path, statement: Mapping[str, Any], files: list[Path]) -> dict[str, JsonValue]:
    parts = _parts(statement, root)
    facts = {
        f"adapterkit:{key}": statement.get(key) for key in ("kind", "format", "digest", "unread", "original_sha256")
    }
    facts["adapterkit:methods"] = ", ".join(statement.get("methods") or ())
    facts |= {f"adapterkit:licence:{n}:{name}": terms for n, (name, terms) in enumerate(_asks(parts), 1)}
    facts |= {f"adapterkit:licence-conflict:{n}": each for n, each in enumerate(conflicts(parts), 1)}
    card = _card(root)
    component: dict[str, JsonValue] = {
        "type": "machine-learning-model", "bom-ref": "model", "name": root.resolve().name,
        "licenses": _licences([licence for _, licence in parts]), "properties": _properties(facts),
        "modelCard": _model_card(root, card), "tags": _texts(card.get("tags")),
    }  # fmt: skip
    if root.is_file():
        component["hashes"] = [_hash(root)]
    else:
        component["components"] = [
            {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_hash(file)]}
            for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files)
        ]
    return _filled(component)


def _parts(statement: Mapping[str, Any], root: Path) -> list[Part]:
    """Return the parts whose licences apply.

    If the statement names the base and the adapters of a merged model, their licences apply. Otherwise, only the
    licence of the model or adapter itself applies.
    """
    parts = parts_of(statement.get("made_from") or {})
    if statement.get("kind") == "merged" and parts:
        # A merge copies the base's model card. If the card in the merged model's folder has a licence that neither the
        # base nor an adapter has, the card was written for the merged model. Its licence then applies, too.
        licence_here = licence_at(root)
        return (
            parts
            if not licence_here or licence_here in [licence for _, licence in parts]
            else [("the model", licence_here), *parts]
        )
    licence_here = licence_at(root)
    return [("the model", licence_here)] if licence_here else []


def _asks(parts: list[Part]) -> Iterator[tuple[str, str]]:
    for name, whole in parts:
        for licence in dict.fromkeys(called(each) for some in choices(whole) for each in some):
            terms = terms_of({"license": licence}) or terms_of(whole)
            if terms is not None:
                yield name, f"{licence} {terms.asks}"


def _ancestors(statement: Mapping[str, Any], root: Path) -> Iterator[dict[str, Any]]:
    record = statement.get("made_from") or {}
    licences = dict(parts_of(record))
    if statement.get("kind") == "merged":
        facts = {"adapterkit:fingerprint": record.get("base_fingerprint")}
        yield _model("base", record.get("base_uri") or _base_name(root), None, facts, licences.get(BASE))
    base = statement.get("base") or {}
    if base.get("id") or base.get("fingerprints"):
        facts = {"adapterkit:config-sha256": base.get("config_hash")}
        facts |= {f"adapterkit:fingerprint:{n}": each for n, each in enumerate(base.get("fingerprints") or (), 1)}
        yield _model("base", base.get("id"), base.get("revision"), facts, None)
    if statement.get("original_sha256"):
        yield _model(
            "base", "the graph before adapters", None, {"adapterkit:sha256": statement["original_sha256"]}, None
        )
    adapters = [each for each in _listed(record.get("adapters")) if isinstance(each, Mapping)]
    for number, each in enumerate(adapters, 1):
        name = str(each.get("name"))
        facts = {f"adapterkit:{key}": each.get(key) for key in ("digest", "weight", "targets")}
        facts |= {
            f"adapterkit:{key}": ", ".join(map(str, _listed(each.get(key)))) for key in ("methods", "ranks", "lineage")
        }
        yield _model(f"adapter-{number}", name, None, facts, licences.get(name))


def _listed(value: object) -> Iterable[object]:
    """Return the entries of a list in the merge's record, which is an untrusted file; () if `value` is no list."""
    return value if isinstance(value, list | tuple) else ()


def _base_name(root: Path) -> str | None:
    """Return the base's repository from `_name_or_path` in a merged model's config; None if it names no repository."""
    try:
        name = read_json(root / "config.json").get("_name_or_path")
    except AdapterkitError:
        return None
    return name if is_repo(name) else None


def _model(
    ref: str, name: str | None, revision: str | None, facts: Mapping[str, Any], licence: Licence | None
) -> dict[str, Any]:  # fmt: skip
    """Return a component for a base or an adapter."""
    address = re.fullmatch(r"hf://([^@]+)(?:@(.+))?", name or "")
    repo, version = (address[1], address[2] or revision) if address is not None else (name, revision)
    purl = None
    if is_repo(repo):
        # Add the revision only if it is a commit: purls of type `huggingface` allow no other version.
        commit = f"@{version}" if version is not None and _COMMIT.fullmatch(version) else ""
        purl = f"pkg:huggingface/{repo}{commit}"
    return _filled({
        "type": "machine-learning-model", "bom-ref": ref, "name": repo or "unknown", "version": version, "purl": purl,
        "licenses": _licences([] if licence is None else [licence]), "properties": _properties(facts),
    })  # fmt: skip


def _licences(licences: list[Licence]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    if len(licences) == 1 and is_expression(licences[0]) and (expression := spdx_expression_of(licences[0])):
        return [{"expression": expression}]
    for licence in licences:
        identifier = spdx_of(licence)
        entry = {"id": identifier} if identifier else {"name": called(licence)}
        link = licence.get("license_link", "")
        if link.startswith("https://"):
            entry["url"] = link
        if {"license": entry} not in entries and (identifier or called(licence)):
            entries.append({"license": entry})
    return entries


def _model_card(root: Path, card: Mapping[str, object]) -> dict[str, JsonValue]:
    try:
        config: Mapping[str, Any] = read_json(root / "config.json") if root.is_dir() else {}
    except AdapterkitError:
        config = {}
    architectures = _texts(config.get("architectures"))
    architecture = architectures[0] if architectures else config.get("model_type")
    task = card.get("pipeline_tag")
    parameters = {
        "task": task if isinstance(task, str) else None,
        "modelArchitecture": architecture if isinstance(architecture, str) else None,
        "datasets": [{"type": "dataset", "name": name} for name in _texts(card.get("datasets"))],
    }
    return _filled({"modelParameters": _filled(parameters)})


def _card(root: Path) -> Mapping[str, object]:
    """Return the metadata of the model card, or {}.

    The result is {} for a single file, and for a merged model, whose card is usually a copy of the base's card.
    """
    if (root / REPORT).is_file() or not root.is_dir():
        return {}
    try:
        with open_input(root / "README.md") as file:
            return metadata(file.read(MAX_CARD).decode("utf-8", "replace"))
    except (OSError, Malformed):
        return {}


def _hash(file: Path) -> dict[str, str]:
    try:
        with open(file, "rb") as opened:
            return {"alg": "SHA-256", "content": hashlib.file_digest(opened, "sha256").hexdigest()}
    except OSError as error:
        raise storage_error(error, file) from error


def _texts(value: object) -> list[str]:
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return list(dict.fromkeys(each for each in listed if isinstance(each, str)))


def _properties(facts: Mapping[str, object]) -> list[dict[str, str]]:
    return [{"name": name, "value": str(value)} for name, value in facts.items() if value not in (None, "", [])]


def _filled(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {key: value for key, value in fields.items() if value not in (None, [], {})}
