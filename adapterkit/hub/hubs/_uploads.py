"""Upload blobs to a registry in chunks, skipping blobs that it already has. A lost chunk is sent again, not the blob.

Source: https://github.com/opencontainers/distribution-spec/blob/main/spec.md, "Pushing a blob in chunks".

The upload's url is saved to disk, so that another process can continue it. The registry is then asked how many bytes it
has, which may end within a chunk. Docker's registry 2.8 puts a signed byte count into its upload urls. It refuses an
upload of which it received more than that count (half a chunk, or a chunk whose reply was lost). Then the blob is sent
again from its start.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from ...errors import Corrupt, NetworkError, storage_error
from ..folders import cache_folder
from ..remote import Content
from ..retries import ATTEMPTS, pause, retrying
from ..web import Refused

if TYPE_CHECKING:
    import httpx2

    from .oci import Distribution

CHUNK = 16 << 20
LONGEST = 256 << 20
"""Largest chunk that is held in memory for a registry that requires long chunks."""

ANEW = 6
"""How often a blob is started again after the registry has lost or damaged it."""


def upload(remote: Distribution, content: Content, size: int, digest: str) -> None:
    """Send a blob unless the registry already has it.

    Raises:
        Corrupt: the received bytes do not have the digest, however often they are sent.
        NetworkError: the registry cannot be reached or refuses.
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
                raise _said(remote, error, digest) from None
        else:
            return


class _Upload:
    """The upload of one blob.

    Attributes:
        location: the upload's current url; None if it has not been started.
        at: how many bytes the registry has; None if the registry must be asked first.
    """

    def __init__(self, remote: Distribution, content: Content, size: int, digest: str) -> None:
        self.remote, self.content, self.size, self.digest, self.chunk = remote, content, size, digest, CHUNK
        # One note for each repository and blob, so that any process pushing the same blob finds it.
        self.note = cache_folder() / "uploads" / hashlib.sha256(f"{remote.url} {digest}".encode()).hexdigest()
        self.location = _noted(self.note, remote)
        self.at: int | None = None

    def run(self) -> None:
        """Send the missing bytes.

        Raises:
            Refused: the registry does not continue this upload.
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
        """Drop the saved url, so that no process continues this upload."""
        self.location = self.at = None
        self.note.unlink(missing_ok=True)

    def _begin(self) -> None:
        self.location, least = self.remote.call(lambda: _begun(self.remote))
        self.at, self.chunk = 0, min(max(CHUNK, least), LONGEST)

    def _step(self) -> None:
        """Send one chunk, starting at the byte where the registry stands."""
        location, at = str(self.location), self.at
        if at is None:
            location, at = _asked(self.remote, location)
        chunk = _read(self.content, at, min(self.chunk, self.size - at))
        if chunk:
            location = _patch(self.remote, location, at, chunk)
        self.location, self.at = location, at + len(chunk)
        # A blob of a single chunk has no state worth saving.
        if self.size > self.chunk:
            _keep(self.note, location)

    def _overcome(self, error: Exception, attempt: int) -> None:
        """Wait if another attempt may help; otherwise raise."""
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
    """Start an upload; return its url and the registry's minimum size of all chunks but the last."""
    with remote.asked("POST", f"{remote.url}/blobs/uploads/", {"Content-Length": "0"}, b"") as response:
        least = response.headers.get("OCI-Chunk-Min-Length", "")
        return _location(remote, remote.url, response), int(least) if least.isascii() and least.isdigit() else 0


def _asked(remote: Distribution, location: str) -> tuple[str, int]:
    """Return an upload's current url, and how many bytes the registry has."""
    with remote.asked("GET", location) as response:
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
        # The range's end is inclusive. Registries answer "0-0" for an empty upload, so 0 means no bytes, not one.
        held = int(match[1]) + 1 if match and match[1] != "0" else 0
        return _location(remote, location, response), held


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
            # An earlier attempt may have succeeded although its reply was lost: then the upload is gone (404) and the
            # blob is there.
            if error.status != 404 or not _has(remote, digest):
                raise

    try:
        retrying(act, remote.passing)
    except Exception as error:
        raise _failed(remote, error) from None


def _location(remote: Distribution, url: str, response: httpx2.Response) -> str:
    """Return the next url, which the registry chooses. It must not downgrade from https to http."""
    target = urljoin(url, response.headers.get("Location", "") or url)
    if urlsplit(target).scheme != urlsplit(remote.url).scheme and urlsplit(target).scheme != "https":
        why = f"sends the upload to {urlsplit(target).scheme}://, which is not safe"
        raise NetworkError(why, path=str(remote.uri), cure="Check the registry's configuration")
    return target


def _read(content: Content, at: int, nbytes: int) -> bytes:
    if isinstance(content, bytes):
        return content[at : at + nbytes]
    try:
        with open(content, "rb") as file:
            file.seek(at)
            data = file.read(nbytes)
    except OSError as error:
        raise storage_error(error, content) from error
    if len(data) != nbytes:
        raise Corrupt("has become shorter while it was pushed", path=content, cure="Push again")
    return data


def _keep(note: Path, location: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        # Only the user may read the file: an upload url can carry a signature that allows writing.
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


def _said(remote: Distribution, error: Exception, digest: str) -> Exception:
    if getattr(error, "code", "") == "DIGEST_INVALID":
        cure = "A file changed here while it was pushed, or something on the way damages it: push again"
        return Corrupt("the registry got other bytes than were sent", path=str(remote.uri), where=digest, cure=cure)
    return remote.failure(error) or error
