"""Write and read the manifest of a ModelPack artifact.

Sources: the OCI image specification, https://github.com/opencontainers/image-spec/blob/main/manifest.md, and
https://github.com/modelpack/model-spec/blob/main/docs/spec.md with its config.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...errors import Malformed, Unsupported
from ...io.strict_json import load_json
from ..digests import digests_of
from ..remote import Digests, RemoteFile

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
ACCEPTED = ", ".join((MANIFEST, "application/vnd.docker.distribution.manifest.v2+json", *INDEXES))
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOCUMENT = "application/vnd.cncf.model.doc.v1.raw"

FILE_PATH = "org.cncf.model.filepath"
NAMES = (FILE_PATH, "org.cnai.model.filepath", "org.opencontainers.image.title")
"""Annotations that name a layer's file; oras writes and reads the last one."""

FOLDER = "io.deis.oras.content.unpack"
"""oras's annotation for a layer that is an archived folder."""

CONFIGS = (".json", ".jinja", ".model", ".txt", ".yaml", ".yml")
DOCUMENTS = (".md",)


def made(repo: str, tag: str, found: Mapping[str, Digests], message: str) -> tuple[bytes, bytes]:
    """Return a config and a manifest for files by path. The same files and tag always give the same bytes."""
    names = sorted(found)
    described = {
        "descriptor": {"name": repo.rpartition("/")[2], "version": tag},
        "config": {"format": _format(names)},
        "modelfs": {"type": "layers", "diffIds": [found[name][1] for name in names]},
    }
    config = _json(described)
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT,
        "config": {"mediaType": CONFIG, "digest": digests_of(config)[1], "size": len(config)},
        "layers": [_layer(name, found[name]) for name in names],
        "annotations": {"org.opencontainers.image.description": message},
    }  # fmt: skip
    return config, _json(manifest)


def parsed(body: bytes, place: str) -> Mapping[str, Any]:
    """Return a manifest's content.

    Raises:
        Malformed: the bytes are not a manifest.
        Unsupported: they are an index of several manifests, and nothing says which one is meant.
    """
    try:
        told = load_json(body.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the manifest is not valid JSON ({error})", path=place, cure=_ANOTHER) from None
    if isinstance(told, dict) and ("manifests" in told or told.get("mediaType") in INDEXES):
        raise Unsupported("a list of artifacts, not one", path=place, cure="Name one of them by its digest")
    if not isinstance(told, dict) or not isinstance(told.get("layers"), list):
        raise Malformed("the manifest has no layers", path=place, cure=_ANOTHER)
    return told


def files_of(manifest: Mapping[str, Any], place: str) -> list[RemoteFile]:
    """Return the files of a manifest's layers.

    Raises:
        Malformed: a layer has no size or no digest.
        Unsupported: a layer is an archive, or has no file name.
    """
    return [_file(layer, f"layer {at}", place) for at, layer in enumerate(manifest["layers"])]


def _file(layer: Any, where: str, place: str) -> RemoteFile:
    layer = layer if isinstance(layer, dict) else {}
    digest, size, kind = layer.get("digest"), layer.get("size"), str(layer.get("mediaType"))
    notes = layer.get("annotations")
    notes = notes if isinstance(notes, dict) else {}
    name = next((notes[key] for key in NAMES if isinstance(notes.get(key), str)), None)
    if not isinstance(digest, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise Malformed("no sha256 digest", path=place, where=where, cure=_ANOTHER)
    if type(size) is not int or size < 0:
        raise Malformed("no size", path=place, where=where, cure=_ANOTHER)
    if notes.get(FOLDER) == "true" or (kind.startswith("application/vnd.cncf.model.") and ".tar" in kind):
        cure = "Fetch and unpack it with the tool that pushed it"
        raise Unsupported("an archive of files, which is not unpacked", path=place, where=name or where, cure=cure)
    if name is None:
        cure = "This is an image, or was pushed by a tool that names no files"
        raise Unsupported("a layer without the name of a file", path=place, where=where, cure=cure)
    return RemoteFile(name, size, digest)


def _layer(name: str, digests: Digests) -> dict[str, Any]:
    size, digest, _ = digests
    # ModelPack tools read the first annotation, and oras the second.
    notes = {FILE_PATH: name, NAMES[-1]: name}
    return {"mediaType": _kind(name), "digest": digest, "size": size, "annotations": notes}


def _kind(name: str) -> str:
    if name.endswith(DOCUMENTS) or name.upper().startswith("LICENSE"):
        return DOCUMENT
    return WEIGHT_CONFIG if name.endswith(CONFIGS) else WEIGHT


def _format(names: list[str]) -> str:
    found = sorted({name.rpartition(".")[2] for name in names if _kind(name) == WEIGHT and "." in name})
    return "safetensors" if "safetensors" in found or not found else found[0]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


_ANOTHER = "Tell the artifact's owner, or use another tag"
