"""Registries of the OCI distribution specification: `oci://registry/name:tag`.

The first part of this module writes and reads the manifest of a ModelPack artifact.

Sources:
- the OCI image specification: https://github.com/opencontainers/image-spec/blob/main/manifest.md
- the ModelPack specification: https://github.com/modelpack/model-spec/blob/main/docs/spec.md and `config.md` next to it
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urljoin, urlsplit

from ...errors import (
    AccessDenied,
    AdapterkitError,
    Corrupt,
    Malformed,
    NetworkError,
    RemoteNotFound,
    StorageError,
    Unsupported,
    UsageError,
    first_line,
    storage_error,
)
from ...io.inputs import decimal_number
from ...io.strict_json import load_json
from ..remote import Content, Digests, Placed, Remote, RemoteFile, Uri, lost, unreachable
from ..transfer import cache_folder, digests_of
from ..web import (
    ATTEMPTS,
    CHUNK,
    DOCKER_HUB,
    Admission,
    Passing,
    Refused,
    answered,
    begins_at,
    body_of,
    error_body_of,
    is_near,
    is_offline,
    is_transport,
    offline,
    origin,
    pause,
    range_header,
    redacted,
    retrying,
)

if TYPE_CHECKING:
    import httpx2

    from ...io.strict_json import JsonValue


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
"""Annotations that can contain the file name of a layer. oras writes and reads the last one."""

FOLDER = "io.deis.oras.content.unpack"
"""The annotation with which oras marks a layer as an archive of a folder."""

CONFIGS = (".json", ".jinja", ".model", ".txt", ".yaml", ".yml")
DOCUMENTS = (".md",)


def artifact(repo: str, tag: str, digests: Mapping[str, Digests], message: str) -> tuple[bytes, bytes]:
    """Return an artifact's config and manifest, as bytes. The same arguments always give the same bytes."""
    names = sorted(digests)
    endings = sorted({name.rpartition(".")[2] for name in names if _kind(name) == WEIGHT and "." in name})
    described = {
        "descriptor": {"name": repo.rpartition("/")[2], "version": tag},
        "config": {"format": "safetensors" if "safetensors" in endings or not endings else endings[0]},
        "modelfs": {"type": "layers", "diffIds": [digests[name][1] for name in names]},
    }
    config = _json(described)
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT,
        "config": {"mediaType": CONFIG, "digest": digests_of(config)[1], "size": len(config)},
        "layers": [_layer(name, digests[name]) for name in names],
        "annotations": {"org.opencontainers.image.description": message},
    }  # fmt: skip
    return config, _json(manifest)


def parsed(body: bytes, place: str) -> Mapping[str, JsonValue]:
    """Return the parsed content of a manifest.

    Raises:
        Malformed: the bytes are not a manifest.
        Unsupported: the bytes are an index, which lists several manifests. The uri must have the digest of one of them.
    """
    try:
        manifest = load_json(body.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the manifest is not valid JSON ({error})", path=place, cure=_ANOTHER) from None
    if isinstance(manifest, dict) and ("manifests" in manifest or manifest.get("mediaType") in INDEXES):
        raise Unsupported(
            "this is an index of several artifacts, not one artifact",
            path=place,
            cure="Add the digest of one of the artifacts to the uri: oci://registry/name@sha256:...",
        )
    if not isinstance(manifest, dict) or not isinstance(manifest.get("layers"), list):
        raise Malformed("the manifest has no layers", path=place, cure=_ANOTHER)
    return manifest


def files_of(manifest: Mapping[str, JsonValue], place: str) -> list[RemoteFile]:
    """Return one file for each layer of a manifest.

    Raises:
        Malformed: a layer has no size or no digest.
        Unsupported: a layer is an archive, or has no file name.
    """
    layers = cast("Sequence[JsonValue]", manifest["layers"])  # `parsed` has checked that `layers` is a list.
    return [_file(layer, f"layer {at}", place) for at, layer in enumerate(layers)]


def _file(layer: object, where: str, place: str) -> RemoteFile:
    layer = layer if isinstance(layer, dict) else {}
    digest, size, kind = layer.get("digest"), layer.get("size"), str(layer.get("mediaType"))
    notes = layer.get("annotations")
    notes = notes if isinstance(notes, dict) else {}
    name = next((notes[key] for key in NAMES if isinstance(notes.get(key), str)), None)
    if not isinstance(digest, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise Malformed("the layer has no sha256 digest", path=place, where=where, cure=_ANOTHER)
    if type(size) is not int or size < 0:
        raise Malformed("the layer has no size", path=place, where=where, cure=_ANOTHER)
    if notes.get(FOLDER) == "true" or (kind.startswith("application/vnd.cncf.model.") and ".tar" in kind):
        cure = "Download and unpack the artifact with the tool that pushed it"
        raise Unsupported(
            "the layer is an archive, which adapterkit does not unpack", path=place, where=name or where, cure=cure
        )
    if name is None:
        cure = "Push the files again with a tool that stores file names, such as oras. Container images cannot be read"
        raise Unsupported("the layer has no file name", path=place, where=where, cure=cure)
    return RemoteFile(name, size, digest)


def _layer(name: str, digests: Digests) -> dict[str, JsonValue]:
    size, digest, _ = digests
    # Write both annotations: ModelPack tools read the first, oras reads the second.
    notes = {FILE_PATH: name, NAMES[-1]: name}
    return {"mediaType": _kind(name), "digest": digest, "size": size, "annotations": notes}


def _kind(name: str) -> str:
    if name.endswith(DOCUMENTS) or name.upper().startswith("LICENSE"):
        return DOCUMENT
    return WEIGHT_CONFIG if name.endswith(CONFIGS) else WEIGHT


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


_ANOTHER = "Report the error to the artifact's owner, or use another tag"


# Registries of the OCI distribution specification: `oci://registry/name:tag`.
#
# A push writes a ModelPack artifact (github.com/modelpack/model-spec). Each file is a raw layer, addressed by digest.
# The tag is written last. A pull reads any artifact whose layers have file names, such as artifacts of `oras push`.
# Urls inside a manifest are never followed, because they could point to any server.


_NAME = re.compile(
    r"(?P<repo>(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])(?::\d{1,5})?"
    r"(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)+)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?"
)
LATEST = "latest"
MAX_MANIFEST = 4 << 20
"""The largest manifest to read, in bytes. The OCI distribution specification expects registries and clients to support
manifests of at least 4 megabytes."""

TRIES = 3
"""The maximum number of attempts to fetch a manifest. An attempt fails if the bytes do not match the digest."""


@dataclass(frozen=True, slots=True)
class OciUri(Uri):
    """The uri of an artifact, with a tag or a digest."""

    def __str__(self) -> str:
        mark = "@" if (self.revision or "").startswith("sha256:") else ":"
        return f"oci://{self.repo}" + (f"{mark}{self.revision}" if self.revision else "")


class Distribution(Remote):
    """A repository in an OCI registry, at one tag or digest."""

    form = "oci://registry/name:tag or oci://registry/name@sha256:..."
    whole = True

    def __init__(self, uri: Uri, token: str | None = None) -> None:
        super().__init__(uri, token)
        self.host, _, name = uri.repo.partition("/")
        # The names of Docker Hub's repositories usually begin with `docker.io`, but the API is on another host.
        server = "registry-1.docker.io" if self.host in DOCKER_HUB else self.host
        self.url = f"{'http' if is_near(server) else 'https'}://{server}/v2/{name}"
        self.admission = Admission(self.host, self.url, str(uri), token)

    @classmethod
    def named(cls, rest: str) -> Uri | None:
        match = _NAME.fullmatch(rest)
        return match and OciUri(match["repo"], match["tag"] or match["digest"] or LATEST, "", "oci")

    @property
    def commit(self) -> str:
        return self.manifest[0]

    @cached_property
    def manifest(self) -> tuple[str, Mapping[str, JsonValue]]:
        """The digest and the content of the manifest.

        Raises:
            Corrupt: the bytes do not have the digest that the registry or the uri states.
            Malformed: the bytes are not a manifest.
        """
        promised = ""
        for _ in range(TRIES):
            body, promised = self.call(self._manifest)
            digest = digests_of(body)[1]
            if promised in ("", digest):
                return digest, parsed(body, str(self.uri))
        why = f"the manifest does not have the expected digest {promised}"
        raise Corrupt(why, path=str(self.uri), cure="Use another network: the registry or a proxy damages the manifest")

    def _manifest(self) -> tuple[bytes, str]:
        revision = self.uri.revision or LATEST
        with self.asked("GET", f"{self.url}/manifests/{revision}", {"Accept": ACCEPTED}) as response:
            body = body_of(response, str(self.uri), MAX_MANIFEST)
            digest = response.headers.get("Docker-Content-Digest", "")
        # The header Docker-Content-Digest is optional, and its digest may use another algorithm than sha256. Without a
        # sha256 digest, return an empty string. `manifest` then does not compare digests.
        promised = revision if revision.startswith("sha256:") else digest
        return body, promised if promised.startswith("sha256:") else ""

    def listed(self) -> list[RemoteFile]:
        return files_of(self.manifest[1], str(self.uri))

    @contextmanager
    def opened(self, file: RemoteFile, start: int, end: int | None) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self.asked("GET", f"{self.url}/blobs/{file.digest}", range_header(start, end)) as response:
            yield begins_at(response), response.iter_raw(CHUNK)

    @contextmanager
    def asked(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Iterator[httpx2.Response]:
        """Yield the open response to a request. If the registry asks for authentication, authenticate and try again.

        Raises:
            Refused: the registry refuses the request.
        """
        registry = origin(self.url)
        for attempt in range(2):
            secret = self.admission.headers if origin(url) == registry else {}
            with answered(method, url, headers or {}, secret, str(self.uri), content) as response:
                # Answer a challenge only from the registry itself. After a redirect, the challenge may come from
                # another server. The realm in the challenge is the url that gets the password. So the other server
                # could direct the password to itself. containerd had this vulnerability (CVE-2020-15157).
                is_registry = origin(str(response.url)) == registry
                challenge = response.headers.get("WWW-Authenticate", "")
                if response.status_code == 401 and is_registry and attempt == 0 and self.admission.ask(challenge):
                    continue
                if response.status_code >= 400:
                    raise self._refused(response)
                yield response
                return

    def _refused(self, response: httpx2.Response) -> Refused:
        try:
            answer = load_json(error_body_of(response).decode()) or {}
            first = answer["errors"][0]
            code, message = str(first.get("code", "")), str(first.get("message", ""))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            code = message = ""
        return Refused(response.status_code, code[:60], redacted(" ".join(message.split())[:200], self.token))

    def passing(self, error: Exception) -> Passing | None:
        if isinstance(error, Passing):
            return error
        return Passing("the connection was lost") if is_transport(error) else None

    def failure(self, error: Exception) -> AdapterkitError | None:
        from huggingface_hub.utils import httpx

        place = str(self.uri)
        if is_offline(error):
            return offline(place)
        if isinstance(error, Refused):
            return self._refusal(error)
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, Passing, TimeoutError)):
            return unreachable(place, self.host, error)
        if isinstance(error, ValueError):  # For example, a header contains an invalid URL.
            cure = "Check that the host is an OCI registry"
            return NetworkError(f"the registry's answer is invalid ({first_line(error)})", path=place, cure=cure)
        return None

    def _refusal(self, error: Refused) -> NetworkError:
        place, known = str(self.uri), "with these credentials" if self.admission.known else "without credentials"
        login = f"Log in: 'oras login {self.host}' or 'docker login {self.host}'"
        if error.status == 401:
            return AccessDenied(f"the registry denies access {known}", path=place, cure=login)
        if error.status == 403:
            cure = "Use an account with the required permission: read for a pull, write for a push"
            return AccessDenied(
                f"the registry forbids this request {known}", path=place, cure=cure if self.admission.known else login
            )
        if error.status == 404:
            named = (
                "the repository does not exist"
                if error.code == "NAME_UNKNOWN"
                else f"the repository has no tag or digest {self.uri.revision!r}"
            )
            why = "a blob is missing: the artifact is incomplete" if error.code == "BLOB_UNKNOWN" else named
            return RemoteNotFound(why, path=place, cure=f"Check the spelling. If the repository is private: {login}")
        message = f": {error.message}" if error.message else ""
        return NetworkError(
            f"the registry answered {error.status}{message}", path=place, cure="Check that the host is an OCI registry"
        )

    def send(
        self, files: Mapping[str, Content], changed: Sequence[str], digests: Mapping[str, Digests], message: str,
        private: bool,
    ) -> str:  # fmt: skip
        if private:
            cure = "Omit --private (private=), and set the visibility on the registry's own pages"
            raise UsageError("a push cannot set the visibility of an artifact", path=str(self.uri), cure=cure)
        if (self.uri.revision or "").startswith("sha256:"):
            raise UsageError(
                "a push needs a tag, not a digest", path=str(self.uri), cure="Write oci://registry/name:tag"
            )
        # Read the tag's digest before and after the upload. If the digests differ, somebody else has pushed. A push
        # between the second read and the PUT goes unnoticed, because registries have no conditional PUT.
        before = self._now()
        for name, content in files.items():
            if not isinstance(content, Placed):
                upload(self, content, digests[name][0], digests[name][1])
            elif not self.holds(content):
                raise lost(str(self.uri), name)
        config, manifest = artifact(self.uri.repo, self.uri.revision or LATEST, digests, message)
        upload(self, config, len(config), digests_of(config)[1])
        if self._now() != before:
            cure = "Look at the files that the tag has now, then run the same command again"
            raise NetworkError("somebody else pushed in the meantime", path=str(self.uri), cure=cure)
        return self._set(self.uri.revision or LATEST, manifest)

    def place(self, path: str, file: Path, digests: Digests) -> Placed:
        upload(self, file, digests[0], digests[1])
        return Placed(path, digests)

    def holds(self, placed: Placed) -> bool:
        return _has(self, placed.digests[1])

    def _now(self) -> str | None:
        try:
            return Distribution(self.uri, self.token).commit
        except RemoteNotFound:
            return None

    def _set(self, tag: str, manifest: bytes) -> str:
        def act() -> None:
            with self.asked("PUT", f"{self.url}/manifests/{tag}", {"Content-Type": MANIFEST}, manifest):
                pass

        self.call(act)
        return digests_of(manifest)[1]

    def tagged(self, tag: str, commit: str) -> None:
        uri = self.named(f"{self.uri.repo}:{tag}")
        if uri is None:
            raise UsageError(f"{tag!r} is not a valid tag", path=str(self.uri), cure="Use letters, digits, . - and _")
        there = Distribution(uri, self.token)
        now = there._now()
        if now not in (None, commit):
            raise StorageError("the tag exists and points to another commit", path=str(uri), cure="Choose another tag")
        body, _ = self.call(Distribution(self.uri.at(commit), self.token)._manifest)
        there._set(tag, body)


# Upload blobs to a registry in chunks; skip blobs that the registry already has. If a chunk is lost, only this chunk is
# sent again.
#
# Source: https://github.com/opencontainers/distribution-spec/blob/main/spec.md, "Pushing a blob in chunks".
#
# The upload's url is saved to disk, so that another process can continue the upload. That process asks the registry how
# many bytes the registry has received, because the last chunk may have arrived only in part. Docker's registry 2.8
# puts a signed byte count into its upload urls. The registry may have received more bytes than the count in the saved
# url, for example a part of another chunk, or a whole chunk whose reply was lost. In this case, the registry refuses to
# continue the upload, and the blob is sent again from its start.


UPLOAD_CHUNK = 16 << 20
LONGEST = 256 << 20
"""The largest chunk, in bytes. A registry may require chunks that are larger than `UPLOAD_CHUNK`. Each chunk is kept in
memory, so this constant limits the memory that an upload needs."""

ANEW = 6
"""The maximum number of attempts to upload a blob from its first byte. An attempt fails if the registry loses or
damages the upload."""


def upload(remote: Distribution, content: Path | bytes, size: int, digest: str) -> None:
    """Upload a blob if the registry does not have it.

    Raises:
        Corrupt: the bytes that the registry received do not have the digest, even after several attempts.
        NetworkError: the registry cannot be reached, or refuses the upload.
    """
    if _has(remote, digest):
        return
    sending = _Upload(remote, content, size, digest)
    for attempt in range(ANEW):
        try:
            sending.run()
        except Refused as error:
            sending.forget()
            if error.status not in (400, 404, 416) or attempt + 1 == ANEW:
                raise _explained(remote, error, digest) from None
        else:
            return


class _Upload:
    """The upload of one blob.

    Attributes:
        location: the upload's current url; None if the upload has not been started.
        at: the number of bytes that the registry has received; None if this process must ask the registry first.
    """

    def __init__(self, remote: Distribution, content: Path | bytes, size: int, digest: str) -> None:
        self.remote, self.content, self.size, self.digest, self.chunk = remote, content, size, digest, UPLOAD_CHUNK
        # This file stores the upload's url. The file name is a hash of the repository's url and the blob's digest, so
        # that any process that pushes the blob to this repository finds the file.
        self.note = cache_folder() / "uploads" / hashlib.sha256(f"{remote.url} {digest}".encode()).hexdigest()
        self.location = _noted(self.note, remote)
        self.at: int | None = None

    def run(self) -> None:
        """Send the bytes that the registry does not have yet, and complete the upload.

        Raises:
            Refused: the registry refuses to continue this upload.
        """
        if self.location is None:
            self._begin()
        attempt = 0
        while self.at is None or self.at < self.size:
            try:
                self._step()
                attempt = 0
            except Exception as error:
                attempt, self.at = attempt + 1, None
                self._overcome(error, attempt)
        _finish(self.remote, str(self.location), self.digest)
        self.forget()

    def forget(self) -> None:
        """Delete the saved url of this upload, so that no process continues the upload."""
        self.location = self.at = None
        self.note.unlink(missing_ok=True)

    def _begin(self) -> None:
        self.location, least = self.remote.call(lambda: _begun(self.remote))
        self.at, self.chunk = 0, min(max(UPLOAD_CHUNK, least), LONGEST)

    def _step(self) -> None:
        """Send one chunk, starting after the last byte that the registry has."""
        location, at = str(self.location), self.at
        if at is None:
            location, at = _upload_state(self.remote, location)
        chunk = _read(self.content, at, min(self.chunk, self.size - at))
        if chunk:
            location = _patch(self.remote, location, at, chunk)
        self.location, self.at = location, at + len(chunk)
        # Save the url only for blobs of several chunks. After a crash, a blob of one chunk is simply sent again.
        if self.size > self.chunk:
            _keep(self.note, location)

    def _overcome(self, error: Exception, attempt: int) -> None:
        """Wait after an error, so that the caller can try again.

        The error is raised if it is permanent, if all attempts have failed, or if the registry asks for a long wait.
        """
        met = self.remote.passing(error)
        if met is None:
            raise _failed(self.remote, error) from None
        if attempt >= ATTEMPTS or not pause(attempt, met.wait):
            raise self.remote.failure(met) or error from None


def _failed(remote: Distribution, error: Exception) -> Exception:
    return error if isinstance(error, Refused) else remote.failure(error) or error


def _has(remote: Distribution, digest: str) -> bool:
    def act() -> bool:
        try:
            with remote.asked("HEAD", f"{remote.url}/blobs/{digest}"):
                return True
        except Refused as error:
            if error.status == 404:
                return False
            raise

    return remote.call(act)


def _begun(remote: Distribution) -> tuple[str, int]:
    """Start an upload. Return its url and the minimum chunk size in bytes (0 if the registry states none).

    The minimum does not apply to the last chunk.
    """
    with remote.asked("POST", f"{remote.url}/blobs/uploads/", {"Content-Length": "0"}, b"") as response:
        least = response.headers.get("OCI-Chunk-Min-Length", "")
        return _location(remote, remote.url, response), decimal_number(least) or 0


def _upload_state(remote: Distribution, location: str) -> tuple[str, int]:
    """Return an upload's current url, and the number of bytes that the registry has received."""
    with remote.asked("GET", location) as response:
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
        # The end of the range is inclusive, so "0-0" should mean one byte. But registries also answer "0-0" for an
        # empty upload, so treat "0-0" as no bytes.
        received = int(match[1]) + 1 if match and match[1] != "0" else 0
        return _location(remote, location, response), received


def _patch(remote: Distribution, location: str, at: int, chunk: bytes) -> str:
    headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{at}-{at + len(chunk) - 1}"}
    with remote.asked("PATCH", location, headers, chunk) as response:
        return _location(remote, location, response)


def _finish(remote: Distribution, location: str, digest: str) -> None:
    url = f"{location}{'&' if urlsplit(location).query else '?'}digest={digest}"

    def act() -> None:
        try:
            with remote.asked("PUT", url, {"Content-Length": "0"}, b""):
                pass
        except Refused as error:
            # An earlier attempt may have succeeded although its reply was lost. In this case, the registry has the
            # blob, and answers 404 because the upload no longer exists.
            if error.status != 404 or not _has(remote, digest):
                raise

    try:
        retrying(act, remote.passing)
    except Exception as error:
        raise _failed(remote, error) from None


def _location(remote: Distribution, url: str, response: httpx2.Response) -> str:
    """Return the url that the registry chose for the next request of an upload.

    Raises:
        NetworkError: the new url uses neither https nor the scheme of the registry's url.
    """
    target = urljoin(url, response.headers.get("Location", "") or url)
    if urlsplit(target).scheme != urlsplit(remote.url).scheme and urlsplit(target).scheme != "https":
        why = f"the registry directs the upload to {urlsplit(target).scheme}://, which is not encrypted"
        raise NetworkError(why, path=str(remote.uri), cure="Configure the registry to use https in its urls")
    return target


def _read(content: Path | bytes, at: int, nbytes: int) -> bytes:
    if isinstance(content, bytes):
        return content[at : at + nbytes]
    try:
        with open(content, "rb") as file:
            file.seek(at)
            data = file.read(nbytes)
    except OSError as error:
        raise storage_error(error, content) from error
    if len(data) != nbytes:
        raise Corrupt("the file became shorter while it was pushed", path=content, cure="Push again")
    return data


def _keep(note: Path, location: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        # Only the user may read the file: an upload url can contain a signature that allows anyone to write.
        descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(location)
    except OSError as error:
        raise storage_error(error, note) from error


def _noted(note: Path, remote: Distribution) -> str | None:
    try:
        location = note.read_text("utf-8")
    except OSError:
        return None
    return location if urlsplit(location).netloc == urlsplit(remote.url).netloc else None


def _explained(remote: Distribution, error: Exception, digest: str) -> Exception:
    if getattr(error, "code", "") == "DIGEST_INVALID":
        cure = "Push again: a local file changed during the push, or a proxy damaged the upload"
        return Corrupt(
            "the registry received bytes that differ from the local file", path=str(remote.uri), where=digest, cure=cure
        )
    return remote.failure(error) or error
