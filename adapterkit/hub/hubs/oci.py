"""Registries of the OCI distribution specification: `oci://registry/name:tag`.

A push writes a ModelPack artifact (github.com/modelpack/model-spec): one raw layer per file, content-addressed, and the
tag last. A pull reads any artifact whose layers name their files, such as those of `oras push`. Urls inside a manifest
are never followed: they could point to any server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...errors import (  # fmt: skip
    AccessDenied,
    AdapterkitError,
    Corrupt,
    NetworkError,
    RemoteNotFound,
    StorageError,
    UsageError,
)
from ...io.strict_json import load_json
from ..digests import digests_of
from ..remote import Content, Digests, Remote, RemoteFile, unreachable
from ..retries import Passing
from ..uris import Uri
from ..web import (  # fmt: skip
    CHUNK,
    Refused,
    answered,
    begins_at,
    body_of,
    is_offline,
    is_transport,
    offline,
    origin,
    range_header,
    redacted,
    said_in,
)
from . import _modelpack, _uploads
from ._admission import DOCKER_HUB, Admission, is_near

if TYPE_CHECKING:
    import httpx2

_NAME = re.compile(
    r"(?P<repo>(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])(?::\d{1,5})?"
    r"(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)+)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?"
)
LATEST = "latest"
MAX_MANIFEST = 4 << 20
"""Largest manifest that registries must accept, in bytes (OCI distribution specification)."""

TRIES = 3
"""How often a manifest is fetched while its bytes do not match the digest."""


@dataclass(frozen=True, slots=True)
class OciUri(Uri):
    """An artifact, named by its tag or its digest."""

    def __str__(self) -> str:
        mark = "@" if (self.revision or "").startswith("sha256:") else ":"
        return f"oci://{self.repo}" + (f"{mark}{self.revision}" if self.revision else "")


class Distribution(Remote):
    """A repository of artifacts."""

    form = "oci://registry/name:tag or oci://registry/name@sha256:..."
    whole = True

    def __init__(self, uri: Uri, token: str | None = None) -> None:
        super().__init__(uri, token)
        self.host, _, name = uri.repo.partition("/")
        # Docker Hub's API is on another host than the one in its names.
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
    def manifest(self) -> tuple[str, Mapping[str, Any]]:
        """The manifest's digest and content.

        Raises:
            Corrupt: the bytes do not have the digest that the registry or the uri promises.
            Malformed: the bytes are not a manifest.
        """
        for _ in range(TRIES):
            body, promised = self.call(self._manifest)
            digest = digests_of(body)[1]
            if promised in ("", digest):
                return digest, _modelpack.parsed(body, str(self.uri))
        why = f"the manifest does not have the digest {promised} that is promised"
        raise Corrupt(why, path=str(self.uri), cure="The registry or something on the way damages it")

    def _manifest(self) -> tuple[bytes, str]:
        revision = self.uri.revision or LATEST
        with self.asked("GET", f"{self.url}/manifests/{revision}", {"Accept": _modelpack.ACCEPTED}) as response:
            body = body_of(response, str(self.uri), MAX_MANIFEST)
            told = response.headers.get("Docker-Content-Digest", "")
        # The header is optional and may use another algorithm; then there is nothing to compare with.
        promised = revision if revision.startswith("sha256:") else told
        return body, promised if promised.startswith("sha256:") else ""

    def listed(self) -> list[RemoteFile]:
        return _modelpack.files_of(self.manifest[1], str(self.uri))

    @contextmanager
    def opened(self, file: RemoteFile, start: int, end: int | None) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self.asked("GET", f"{self.url}/blobs/{file.digest}", range_header(start, end)) as response:
            yield begins_at(response), response.iter_raw(CHUNK)

    @contextmanager
    def asked(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Iterator[httpx2.Response]:
        """Yield an open response that is not a refusal; authenticate first if the registry asks for it.

        Raises:
            Refused: the registry refuses.
        """
        registry = origin(self.url)
        for attempt in range(2):
            secret = self.admission.headers if origin(url) == registry else {}
            with answered(method, url, headers or {}, secret, str(self.uri), content) as response:
                # Only the registry itself may ask for credentials. After a redirect another server answers, and its
                # challenge would name its own realm. containerd sent the password there (CVE-2020-15157).
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
            told = load_json(said_in(response).decode()) or {}
            first = told["errors"][0]
            code, said = str(first.get("code", "")), str(first.get("message", ""))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            code = said = ""
        return Refused(response.status_code, code[:60], redacted(" ".join(said.split())[:200], self.token))

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
        return None

    def _refusal(self, error: Refused) -> NetworkError:
        place, known = str(self.uri), "with these credentials" if self.admission.known else "without credentials"
        login = f"Log in: 'oras login {self.host}' or 'docker login {self.host}'"
        if error.status == 401:
            return AccessDenied(f"the registry lets nobody in {known}", path=place, cure=login)
        if error.status == 403:
            cure = "Use an account that has the right to do this (to write, for a push)"
            return AccessDenied(f"not allowed {known}", path=place, cure=cure if self.admission.known else login)
        if error.status == 404:
            named = "no such repository" if error.code == "NAME_UNKNOWN" else f"no tag {self.uri.revision!r}"
            why = "no such blob: the artifact is not whole" if error.code == "BLOB_UNKNOWN" else named
            return RemoteNotFound(why, path=place, cure=f"Check the spelling. If it is private: {login}")
        said = f": {error.said}" if error.said else ""
        return NetworkError(f"the registry answered {error.status}{said}", path=place, cure="Is it an OCI registry?")

    def send(
        self, files: Mapping[str, Content], changed: Sequence[str], found: Mapping[str, Digests], message: str,
        private: bool,
    ) -> str:  # fmt: skip
        if private:
            cure = "Set it at the registry, and leave --private out"
            raise UsageError("a registry decides by itself who sees what", path=str(self.uri), cure=cure)
        if (self.uri.revision or "").startswith("sha256:"):
            raise UsageError("a digest cannot be pushed to", path=str(self.uri), cure="Name a tag")
        # A registry has no conditional PUT for tags. Comparing before and after the upload leaves a short race.
        before = self._now()
        for name, content in files.items():
            _uploads.upload(self, content, found[name][0], found[name][1])
        config, manifest = _modelpack.made(self.uri.repo, self.uri.revision or LATEST, found, message)
        _uploads.upload(self, config, len(config), digests_of(config)[1])
        if self._now() != before:
            cure = "Look at what is there now, and run the same command again"
            raise NetworkError("somebody else pushed meanwhile", path=str(self.uri), cure=cure)
        return self._set(self.uri.revision or LATEST, manifest)

    def _now(self) -> str | None:
        try:
            return Distribution(self.uri, self.token).commit
        except RemoteNotFound:
            return None

    def _set(self, tag: str, manifest: bytes) -> str:
        def act() -> None:
            with self.asked("PUT", f"{self.url}/manifests/{tag}", {"Content-Type": _modelpack.MANIFEST}, manifest):
                pass

        self.call(act)
        return digests_of(manifest)[1]

    def tagged(self, tag: str, commit: str) -> None:
        uri = self.named(f"{self.uri.repo}:{tag}")
        if uri is None:
            raise UsageError(f"{tag!r} cannot be a tag", path=str(self.uri), cure="Use letters, digits, . - and _")
        there = Distribution(uri, self.token)
        now = there._now()
        if now not in (None, commit):
            raise StorageError("the tag is there, on something else", path=str(uri), cure="Choose another tag")
        body, _ = self.call(Distribution(self.uri.at(commit), self.token)._manifest)
        there._set(tag, body)
