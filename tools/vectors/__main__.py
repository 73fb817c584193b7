"""Writes what of `spec/` is made by machine: vectors, invalid inputs, JSON schema, the manifest's hashes.

Released vectors are append-only: once the manifest says so, a file it lists is never written again with other bytes.
`python tools/vectors` writes all; with `--check` nothing, and it fails where a file is not what would be written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import formats
import invalid
import methods
import numpy as np
from extra import canonical, digests, folders, merges, valid
from index import index
from meeting import computed_files, merge_files
from migrations import migrations
from rules import rules
from safetensors.numpy import load
from vector import vectors

SPEC = Path(__file__).resolve().parents[2] / "spec"
VERSION = "1.1"
SCHEMA = f"{VERSION}/record.schema.json"
MANIFEST = f"{VERSION}/manifest.toml"
LAST = 1e-14
"""A share of a tensor's largest number, within which its last bits may differ."""

ID = "https://github.com/adapterkit/adapterkit/spec/" + SCHEMA


def method_files() -> Iterator[tuple[str, bytes]]:
    """Path under `spec/` and content of every method's vector."""
    for method in methods.names():
        for name, data in vectors(method, methods.named(method).cases()).items():
            yield f"vectors/methods/{name}", data


def format_files() -> Iterator[tuple[str, bytes]]:
    """Path and content of the files of each format that no tool writes here, and of the same adapter in native form."""
    for place, sample in formats.samples():
        files = {**sample.files, "expected.native.safetensors": sample.native()}
        yield from ((f"vectors/formats/{place}/{name}", data) for name, data in files.items())


def invalid_files() -> Iterator[tuple[str, bytes]]:
    """Path and content of every invalid input, and of the expectation beside it."""
    for case in invalid.cases():
        path = f"vectors/invalid/{case.name}"
        yield f"{path}.json", case.expectation().encode()
        if isinstance(case.content, bytes):
            yield f"{path}.safetensors", case.content
        else:
            yield from ((f"{path}/{name}", data) for name, data in case.content.items())


def schema_files() -> Iterator[tuple[str, bytes]]:
    """The JSON schema of the record."""
    yield SCHEMA, (json.dumps(schema(), indent=2, ensure_ascii=False) + "\n").encode()


def table_files() -> Iterator[tuple[str, bytes]]:
    """The entries of all methods as one JSON object, for readers without TOML."""
    entries = {path.stem: _toml(path) for path in sorted((SPEC / "methods").glob("*.toml"))}
    yield f"{VERSION}/methods.json", (json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode()


def extra_files() -> Iterator[tuple[str, bytes]]:
    """Canonical JSON, expressions of rules, digests, valid records at the edges, and a merge that rounds."""
    yield "vectors/canonical.json", (json.dumps(canonical(), indent=1, ensure_ascii=True) + "\n").encode()
    yield "vectors/rules.json", (json.dumps(rules(), indent=1) + "\n").encode()
    yield "vectors/digests.json", (json.dumps(dict(digests(SPEC)), indent=1) + "\n").encode()
    yield from ((f"vectors/valid/{name}.safetensors", data) for name, data in valid().items())
    yield "vectors/folders/one_file.safetensors", folders()["single"]["model.safetensors"]
    for folder, files in folders().items():
        yield from ((f"vectors/folders/{folder}/{name}", data) for name, data in files.items())
    yield from ((f"vectors/merges/{name}.safetensors", data) for name, data in merges().items())
    yield from ((f"vectors/merges/{name}", data) for name, data in merge_files())
    yield from ((f"vectors/computed/{name}", data) for name, data in computed_files())
    yield from ((f"vectors/migrations/{name}", data) for name, data in migrations().items())


def index_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """The index of all vectors."""
    yield "vectors/index.json", index(root, VERSION)


def schema() -> dict[str, Any]:
    """The schema, generated from the types that the native reader decodes into."""
    import msgspec

    from adapterkit.formats.adapterkit import Record

    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": f"The value of the metadata key `adapterkit`, specification {VERSION}",
    }
    return head | msgspec.json.schema(Record)


def manifest_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """The manifest: what the specification consists of, and the hash of every vector on disk."""
    methods = {path.stem: _toml(path)["version"] for path in sorted((root / "methods").glob("*.toml"))}
    known = sorted(path.stem for path in (root / "formats").glob("*.toml"))
    lines = [
        f'version = "{VERSION}"',
        f"released = {json.dumps(released(root))}",
        f'schema = "{SCHEMA}"',
        f"formats = {json.dumps(known)}",
        "",
        "[methods]",
        *(f"{name} = {version}" for name, version in methods.items()),
        "",
        "# sha256 of vectors, by their path under vectors/. Released ones are never changed or removed.",
        "[vectors]",
        *(f'"{name}" = "{sha256((root / "vectors" / name).read_bytes())}"' for name in _vectors_on_disk(root)),
        "",
    ]
    yield MANIFEST, "\n".join(lines).encode()


def _vectors_on_disk(root: Path) -> list[str]:
    """All files but the index, which says what they are and grows with them."""
    found = (path for path in (root / "vectors").rglob("*") if path.is_file() and path.name != "index.json")
    return sorted(path.relative_to(root / "vectors").as_posix() for path in found)


def released(root: Path) -> bool:
    """Whether the manifest's vectors are out in the world."""
    return bool((root / MANIFEST).exists() and _toml(root / MANIFEST)["released"])


def sha256(data: bytes) -> str:
    """As the manifest writes it."""
    return hashlib.sha256(data).hexdigest()


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text("utf-8"))


def differing(root: Path, files: list[tuple[str, bytes]]) -> list[str]:
    """Paths whose content on disk is not the given one, but for last bits of what was computed."""
    return [name for name, data in files if not (root / name).is_file() or not _same(root / name, data)]


def _same(path: Path, data: bytes) -> bool:
    held = path.read_bytes()
    return held == data or (path.name.endswith(".expected.safetensors") and _near(held, data))


def _near(held: bytes, data: bytes) -> bool:
    """Whether the same tensors hold the same numbers: decompositions differ from one LAPACK to another."""
    start = 8 + int.from_bytes(data[:8], "little")
    if held[:start] != data[:start] or len(held) != len(data):
        return False
    ours, theirs = load(held), load(data)
    return all(np.allclose(ours[name], theirs[name], rtol=0, atol=LAST * _largest(ours[name])) for name in ours)


def _largest(array: np.ndarray[Any, Any]) -> float:
    return float(np.max(np.abs(array), initial=0))


def refused(root: Path, names: list[str]) -> list[str]:
    """Those of the paths that a released manifest lists."""
    if not released(root):
        return []
    listed = _toml(root / MANIFEST)["vectors"]
    return [name for name in names if name.removeprefix("vectors/") in listed]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 where a file differs that must not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for part in ("methods", "formats", "invalid", "schema", "tables", "extra", "index", "manifest"):
        parser.add_argument(f"--{part}", action="append_const", dest="parts", const=part, help=f"only the {part}")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    options = parser.parse_args(arguments)
    makers = {
        "methods": method_files, "formats": format_files, "invalid": invalid_files, "schema": schema_files,
        "tables": table_files, "extra": extra_files, "index": lambda: index_files(SPEC),
    }  # fmt: skip
    failed = False
    for part in options.parts or [*makers, "manifest"]:
        files = list(manifest_files(SPEC) if part == "manifest" else makers[part]())
        failed |= _settle(files, differing(SPEC, files), options.check)
    return int(failed)


def _settle(files: list[tuple[str, bytes]], changed: list[str], check: bool) -> bool:
    """Writes what changed, or says so; returns whether something is wrong."""
    stuck = changed if check else refused(SPEC, changed)
    for name in stuck:
        print(f"{name}: {'not what would be written' if check else 'released, never to be changed'}", file=sys.stderr)
    if stuck:
        return True
    for name, data in files:
        if name in changed:
            (SPEC / name).parent.mkdir(parents=True, exist_ok=True)
            (SPEC / name).write_bytes(data)
            print(f"wrote spec/{name}")
    return False


if __name__ == "__main__":
    sys.exit(main())
