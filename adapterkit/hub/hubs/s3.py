"""S3 and compatible stores: `s3://bucket/path`, through obstore (the extra `s3`)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from ...errors import (
    AccessDenied,
    AdapterkitError,
    Corrupt,
    Malformed,
    NetworkError,
    RemoteNotFound,
    Unsupported,
    UsageError,
)
from ...io.inputs import decimal_number
from ...io.strict_json import load_json
from .. import web
from ..remote import Address, Content, Digests, Placed, RemoteFile, Uri, address, lost, unreachable
from ..web import CHUNK as PIECE
from ..web import (
    Passing,
    Refused,
    answered,
    begins_at,
    body_of,
    is_near,
    is_offline,
    is_transport,
    offline,
    range_header,
)
from . import Listing, unknown

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    import httpx2
    from obstore.store import S3Store

    from ...io.strict_json import JsonValue


REOPENINGS = 5
"""How often `_reopen` tries to mark another push's list, if the other push writes its list at the same time."""

SIGNED = timedelta(minutes=15)
"""Lifetime of a presigned url. Each request gets its own url."""


class Bucket:
    """An S3 bucket. The AWS environment variables set its endpoint, region and credentials.

    Attributes:
        store: the obstore store that uploads objects to the bucket.

    Raises:
        Unsupported: obstore is not installed.
    """

    def __init__(self, name: str, place: str) -> None:
        try:
            from obstore.store import S3Store
        except ImportError:
            cure = "pip install 'adapterkit[s3]'"
            raise Unsupported("s3:// needs the package obstore", path=place, cure=cure) from None
        self.name, self.place, self.options = name, place, _options()
        # With this setting, obstore sends the sha256 of each upload, and S3 verifies the bytes that arrive.
        self.store: S3Store = S3Store(name, config={"checksum_algorithm": "SHA256"}, **self.options)
        self.anonymous = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on", "y")
        self.keys: Mapping[str, Any] = _NOBODY if self.anonymous else {}
        self.signer = self._signer()

    @contextmanager
    def asked(self, method: str, key: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Yield the open response to a request for an object.

        Raises:
            Refused: the HTTP status is 400 or higher.
        """
        with self._answered(method, self._address(self.signer, method, key), headers) as response:
            yield response

    def whole(self, key: str) -> tuple[bytes, str | None]:
        """Return the bytes of a small object and its ETag.

        Raises:
            NetworkError: the object has more than `MAX_TOLD` bytes. A file list that adapterkit wrote is smaller.
        """
        with self.asked("GET", key, {}) as response:
            return body_of(response, self.place), response.headers.get("ETag")

    def page(self, query: Mapping[str, str]) -> bytes:
        """Return the body of the response to a query about the bucket, such as a listing.

        obstore can sign only the url of an object, and it forms this url by appending the object's key to the endpoint.
        So this method passes an endpoint that ends with the query and `x-id=`. The appended key then becomes the value
        of the parameter `x-id`, which S3 ignores.
        """
        bucket = self._address(self.signer, "GET", "x").partition("?")[0].removesuffix("/x")
        endpoint = f"{bucket}?{urlencode({**query, 'x-id': ''}, quote_via=quote)}"
        url = self._address(self._signer(endpoint=endpoint, virtual_hosted_style_request=True), "GET", "x")
        with self._answered("GET", url, {}) as response:
            return body_of(response, self.place)

    def _signer(self, **more: object) -> S3Store:
        from obstore.store import S3Store

        config: dict[str, Any] = {**self.keys, **more}
        return S3Store(self.name, config=config, **self.options)  # type: ignore[arg-type]

    def _address(self, signer: S3Store, method: str, key: str) -> str:
        """Return a presigned url; for anonymous access, return the url without the signature."""
        import obstore

        url: str = obstore.sign(signer, method, key, SIGNED)  # type: ignore[call-overload]
        return re.sub(r"[?&]X-Amz-.*", "", url) if self.anonymous else url

    @contextmanager
    def _answered(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        with answered(method, url, headers, {}, self.place) as response:
            if response.status_code >= 400:
                raise Refused(response.status_code)
            yield response


# obstore cannot return unsigned urls. For anonymous access, sign the url with these dummy keys, then remove the
# signature.
_NOBODY = {"access_key_id": "none", "secret_access_key": "none", "skip_signature": False}


def _options() -> dict[str, Any]:
    """Return the options for obstore: retry settings, and plain HTTP if the endpoint is a server on this machine."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    plain = endpoint.startswith("http://") and is_near(endpoint.removeprefix("http://").partition("/")[0])
    waits = {"init_backoff": timedelta(seconds=web.FIRST_WAIT), "max_backoff": timedelta(seconds=30), "base": 2}
    patience = {"max_retries": web.ATTEMPTS - 1, "backoff": waits, "retry_timeout": timedelta(minutes=3)}
    return {"retry_config": patience} | ({"client_options": {"allow_http": True}} if plain else {})


# List the objects of a bucket, page by page.
#
# Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html


Query = dict[str, str]

PAGE = 1000
"""The maximum number of objects in one response to a listing request."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One object in a listing."""

    key: str
    size: int
    tag: str


def objects(asked: Callable[[Query], bytes], folder: str, place: str, *, deep: bool) -> Iterator[Listed]:
    """Yield the objects of a folder.

    Empty objects whose key ends with a slash are skipped: web consoles create such objects to show an empty folder.

    Args:
        asked: a function that returns the bucket's response to a query.
        folder: the prefix, without a slash at its end; empty for the whole bucket.
        place: the uri for error messages.
        deep: True to include objects in subfolders.

    Raises:
        Malformed: a response is not a listing.
    """
    query = {"list-type": "2", "max-keys": str(PAGE), "prefix": f"{folder}/" if folder else ""} | (
        {} if deep else {"delimiter": "/"}
    )
    token: str | None = ""
    while token is not None:
        page = _parsed(asked(query | ({"continuation-token": token} if token else {})), place)
        entries = [_listed(entry, place) for entry in page if _name(entry) == "Contents"]
        yield from (entry for entry in entries if entry.size or not entry.key.endswith("/"))
        token = _text_of(page, "NextContinuationToken") or None


def _parsed(body: bytes, place: str) -> Element:
    from xml.etree import ElementTree

    try:
        page = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        page = None
    if page is None or _name(page) != "ListBucketResult":
        raise Malformed(
            "the bucket did not answer with a list of objects",
            path=place,
            cure="Set AWS_ENDPOINT_URL to the address of an S3-compatible server, or unset it",
        )
    return page


def _listed(entry: Element, place: str) -> Listed:
    key, size = _text_of(entry, "Key"), decimal_number(_text_of(entry, "Size") or "")
    if not key or size is None:
        raise Malformed(
            "the bucket's list has an object without a key or a size", path=place, cure="Tell the bucket's owner"
        )
    return Listed(key, size, _text_of(entry, "ETag") or "")


def _text_of(element: Element, name: str) -> str | None:
    return next((child.text for child in element if _name(child) == name), None)


def _name(element: Element) -> str:
    """Return the tag of an XML element without its namespace, because some servers omit the namespace."""
    return str(element.tag).rpartition("}")[2]


# S3 and compatible stores: `s3://bucket/path`, through obstore (the extra `s3`). AWS's environment variables apply.
#
# A push also writes a file list, which has the size and the sha256 of each file. The list is stored next to the files.
# Before the first upload, the push sets the list's state to `pushing`. After the last upload, it sets the state to
# `whole`. Each write of the list is conditional: it succeeds only if the list is still absent, or still has the ETag
# that the push saw last. So two pushes cannot mix their files, and no reader takes an unfinished push for a complete
# one. A folder without such a list can be read, too, but then only the sizes of its objects are checked.
#
# obstore signs urls and uploads files. The HTTP client that all hubs share reads objects and listings from the signed
# urls. S3 verifies each upload against a sha256. obstore ignores Retry-After and uses exponential backoff.


LIST = ".adapterkit-files.json"
CHUNK = 8 << 20
MULTIPART = 64 << 20
"""Files with more than `MULTIPART` bytes are uploaded in parts of `CHUNK` bytes."""


class S3(Listing):
    """A folder or a file in a bucket."""

    form = "s3://bucket/path"

    def __init__(self, uri: Uri, token: str | None = None) -> None:
        super().__init__(uri, token)
        if token is not None:
            raise UsageError("S3 uses no token", path=str(uri), cure="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        self.bucket = Bucket(uri.repo, str(uri))
        self._claimed: str | None = None
        self._met: Mapping[str, RemoteFile] | None = None

    @classmethod
    def named(cls, rest: str) -> Uri | None:
        return address(rest, "s3")

    def _key(self, name: str) -> str:
        return f"{self.uri.path}/{name}" if self.uri.path else name

    @cached_property
    def _list(self) -> tuple[str, Mapping[str, Any], str | None] | None:
        """The key, the content and the ETag of the stored file list; None if no list exists.

        The list is looked up in the folder of the uri, then in the parent folder, because the uri may name a file.
        """
        for folder in dict.fromkeys((self.uri.path, self.uri.path.rpartition("/")[0])):
            key = f"{folder}/{LIST}" if folder else LIST
            try:
                got = self.call(partial(self.bucket.whole, key))
            except RemoteNotFound:
                continue
            return key, _checked(got[0], str(self.uri)), got[1]
        return None

    def listed(self) -> Iterable[RemoteFile]:
        if self._list is None:
            return self._objects_here()
        if self._list[1]["state"] != "whole":
            cure = "Wait until the push ends; if the push was interrupted, run the same push again"
            raise NetworkError("a push to this folder is not finished", path=str(self.uri), cure=cure)
        return self._listed_files()

    def _listed_files(self) -> list[RemoteFile]:
        if self._list is None:
            return []
        folder = self._list[0].rpartition("/")[0]
        files = self._list[1]["files"].items()
        return [
            RemoteFile(f"{folder}/{name}" if folder else name, f["size"], f"sha256:{f['sha256']}") for name, f in files
        ]

    def _objects_here(self) -> Iterator[RemoteFile]:
        """Yield the objects in the uri's folder. If the uri names a file, yield all objects in the file's folder."""
        path, place = self.uri.path, str(self.uri)
        entries = objects(self._listing, path, place, deep=True)
        first = next(entries, None)
        if first is None and path:
            near = list(objects(self._listing, path.rpartition("/")[0], place, deep=False))
            entries = iter(near if any(entry.key == path for entry in near) else [])
            first = next(entries, None)
        if first is None:
            cure = "Check the spelling of the bucket and the path"
            raise RemoteNotFound("the uri has no files", path=place, cure=cure)
        return (unknown(entry.key, entry.size, entry.tag) for entry in chain([first], entries))

    def _listing(self, query: Mapping[str, str]) -> bytes:
        body: bytes = self.call(lambda: self.bucket.page(query))
        return body

    @contextmanager
    def opened(self, file: RemoteFile, start: int, end: int | None) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self.bucket.asked("GET", file.path, range_header(start, end)) as response:
            yield begins_at(response), response.iter_raw(PIECE)

    def there(self) -> Mapping[str, RemoteFile] | None:
        """Return the files in the folder, keyed by path.

        If a push is unfinished, return the files that the folder had before this push. Their bytes are compared with
        the list, because the push may have replaced some of them.
        """
        if self._claimed is not None:
            # `begin` has started a push, and tasks may have uploaded files. So return the files that `begin` saw.
            return self._met
        if self._list is not None and self._list[0] == self._key(LIST):
            return {file.path: file for file in (self._checked_files if self._unfinished else self._listed_files())}
        return super().there()

    @property
    def _unfinished(self) -> bool:
        """Whether the stored file list belongs to a push that has not ended."""
        return self._list is not None and self._list[0] == self._key(LIST) and self._list[1]["state"] != "whole"

    @cached_property
    def _checked_files(self) -> list[RemoteFile]:
        """The listed files that still exist. If the bytes of a file have changed, its digest is `unknown:...`."""
        return [checked for file in self._listed_files() if (checked := self._checked_file(file)) is not None]

    def _checked_file(self, file: RemoteFile) -> RemoteFile | None:
        def read() -> str:
            digest = hashlib.sha256()
            with self.bucket.asked("GET", file.path, {}) as response:
                for piece in response.iter_raw(PIECE):
                    digest.update(piece)
            return digest.hexdigest()

        try:
            digest = self.call(read)
        except RemoteNotFound:
            return None
        return file if f"sha256:{digest}" == file.digest else unknown(file.path, file.size, digest)

    def send(
        self, files: Mapping[str, Content], changed: Sequence[str], digests: Mapping[str, Digests], message: str,
        private: bool,
    ) -> str:  # fmt: skip
        before = self._before()
        claim = self._claimed or self._claim(_entries(before, self.uri.path))
        placed = {name: content for name in changed if isinstance(content := files[name], Placed)}
        last = ""
        try:
            for name in changed:
                content = files[name]
                if not isinstance(content, Placed):
                    self._check_claim(claim)
                    placed[name], last = self.place(name, content, digests[name]), name
                elif not self.holds(content):
                    raise lost(str(self.uri), name)
            sent = {name: RemoteFile(name, size, sha) for name, (size, sha, _) in digests.items()}
            self._write({"state": "whole", "files": _entries(before | sent, self.uri.path)}, claim)
        except AdapterkitError:
            with suppress(AdapterkitError):  # Raise the first error, which made the push fail.
                self._reopen(placed, last, claim)
            raise
        return S3(Address(self.uri.repo, None, self.uri.path, "s3")).commit

    def _reopen(self, placed: Mapping[str, Placed], last: str, claim: str | None) -> None:
        """Mark the list of another push as unfinished if it is wrong because of this push.

        A file that was under way when the other push began may replace the other push's file. An unfinished list is
        compared with the stored bytes by the next push, and no pull trusts it. If the other push rewrites its list
        during each of `REOPENINGS` tries, the wrong list stays.

        Args:
            placed: the files that this push uploaded.
            last: the file that was uploaded last, after the last check that no other push had begun; empty if none was.
            claim: the ETag of this push's list.
        """
        for _ in range(REOPENINGS):
            body, tag = self._there(self._key(LIST))
            if body is None or tag in (None, claim):
                return
            state = _checked(body, str(self.uri))
            if state["state"] == "whole":
                entries = _entries({n: RemoteFile(n, *p.digests[:2]) for n, p in placed.items()}, self.uri.path)
                stated = cast("Mapping[str, JsonValue]", state["files"])  # `_checked` has checked it.
                names = [
                    name
                    for name, (key, entry) in zip(placed, entries.items(), strict=True)
                    if stated.get(key, entry) != entry
                ]
            else:
                names = [last] if last else []
            if not any(self.holds(placed[name]) for name in names):
                return
            try:
                self._write({"state": "pushing", "files": state["files"], "by": secrets.token_hex(16)}, tag)
            except NetworkError:
                continue  # The other push has just written its list again.
            return

    def _before(self) -> dict[str, RemoteFile]:
        return {file.path: file for file in (self.there() or {}).values() if file.verifiable}

    def begin(self) -> None:
        super().begin()
        self._met = self.there()
        # Keep the ETag of the list. `send` replaces the list only if the list still has this ETag. So `send` fails if
        # another program has pushed in the meantime.
        self._claimed = self._claim(_entries(self._before(), self.uri.path))

    def kept(self) -> str:
        if self._claimed is not None or self._unfinished:
            before = _entries(self._before(), self.uri.path)
            self._write({"state": "whole", "files": before}, self._claimed or self._claim(before))
            return S3(Address(self.uri.repo, None, self.uri.path, "s3")).commit
        return super().kept()

    def place(self, path: str, file: Path | bytes, digests: Digests) -> Placed:
        self.call(lambda: self._put(path, file))
        size, mark = self.call(lambda: self._stored(path))
        if size != digests[0]:
            why = f"the uploaded file has {size:,} bytes, but the local file has {digests[0]:,}"
            raise Corrupt(why, path=str(self.uri), where=path, cure=_PUSH_AGAIN)
        return Placed(path, digests, mark)

    def holds(self, placed: Placed) -> bool:
        try:
            return bool(self.call(lambda: self._stored(placed.path)) == (placed.digests[0], placed.mark))
        except RemoteNotFound:
            return False

    def _stored(self, name: str) -> tuple[int, str]:
        """Return the size and the ETag of an object."""
        with self.bucket.asked("HEAD", name, {}) as response:
            return int(response.headers.get("Content-Length", -1)), response.headers.get("ETag", "")

    def _put(self, name: str, content: Path | bytes) -> None:
        import obstore

        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        obstore.put(self.bucket.store, name, content, use_multipart=size > MULTIPART, chunk_size=CHUNK)

    def _claim(self, before: Mapping[str, JsonValue]) -> str | None:
        current = self._list is not None and self._list[0] == self._key(LIST)
        tag = self._list[2] if current and self._list is not None else None
        # Add a random value, so that two pushes of the same files write different lists. If the lists were equal,
        # `_write` could take the other push's list for its own.
        return self._write({"state": "pushing", "files": before, "by": secrets.token_hex(16)}, tag)

    def _check_claim(self, claim: str | None) -> None:
        """Check that the file list is still the one that this push wrote.

        Otherwise this push would upload over the files of another push, and the other push's list would be wrong.
        """
        if claim is not None and self.call(lambda: self._stored(self._key(LIST)))[1] != claim:
            raise _overtaken(str(self.uri))

    def _write(self, state: Mapping[str, JsonValue], tag: str | None) -> str | None:
        """Write `state` as the file list, and return the list's new ETag.

        The write succeeds only if the stored list has the ETag `tag`, or if `tag` is None and no list is stored.

        Raises:
            NetworkError: the list has another ETag, or `tag` is None and a list exists.
        """
        import obstore

        mode: Any = "create" if tag is None else {"e_tag": tag}
        data = json.dumps(state, sort_keys=True, indent=1).encode()
        key = self._key(LIST)
        try:
            written: str | None = self.call(
                lambda: obstore.put(self.bucket.store, key, data, mode=mode, use_multipart=False)["e_tag"]
            )
        except NetworkError as error:
            # Read the list back: perhaps the write succeeded and only the reply was lost.
            there, written = self._there(key)
            if there != data:
                raise error from None
        return written

    def _there(self, key: str) -> tuple[bytes | None, str | None]:
        try:
            return self.call(lambda: self.bucket.whole(key))
        except AdapterkitError:
            return None, None

    def passing(self, error: Exception) -> Passing | None:
        # An error from obstore is final, because obstore has already retried the request.
        if isinstance(error, Passing):
            return error
        return Passing("the connection was lost") if is_transport(error) else None

    def failure(self, error: Exception) -> AdapterkitError | None:
        """Return the adapterkit error for a failed request.

        The text of obstore's error is left out, because it may contain urls, keys and signatures.
        """
        place, kind = str(self.uri), type(error).__name__
        if is_offline(error):
            return offline(place)
        status = _status(error)
        if status == 404 or kind in ("NotFoundError", "FileNotFoundError"):
            return RemoteNotFound(
                "the bucket or the object does not exist",
                path=place,
                cure="Check the spelling of the bucket and the path",
            )
        if status in (401, 403) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
            return AccessDenied("access is denied", path=place, cure=_CREDENTIALS)
        if kind in ("AlreadyExistsError", "PreconditionError"):
            return _overtaken(place)
        if status is not None:
            return NetworkError(f"the store answered {status}", path=place, cure=_CREDENTIALS)
        if is_transport(error) or isinstance(error, (Passing, TimeoutError)):
            return unreachable(place, "the store", error)
        if type(error).__module__.startswith(("obstore", "builtins.pyo3")):
            return NetworkError(
                f"the store is not reachable, or refuses access ({kind})", path=place, cure=_CREDENTIALS
            )
        return None


def _overtaken(place: str) -> NetworkError:
    cure = "Look at the files that are in the bucket now, then run the same command again"
    return NetworkError("somebody else pushed in the meantime", path=place, cure=cure)


def _status(error: Exception) -> int | None:
    """Return the HTTP status in an error, or None. obstore's errors have the status only in their text."""
    if isinstance(error, Refused):
        return error.status
    match = re.search(r"non-2xx status code: (\d{3})", str(error))
    return int(match[1]) if match else None


def _entries(files: Mapping[str, RemoteFile], folder: str) -> dict[str, dict[str, int | str]]:
    start = len(folder) + 1 if folder else 0
    return {path[start:]: {"size": file.size, "sha256": file.digest.partition(":")[2]} for path, file in files.items()}


def _checked(body: bytes, place: str) -> Mapping[str, JsonValue]:
    """Return the parsed content of a file list.

    Raises:
        Corrupt: the bytes are not a valid file list.
    """
    try:
        state = load_json(body.decode())
        fits = state["state"] in ("pushing", "whole") and all(
            type(f["size"]) is int and f["size"] >= 0 and re.fullmatch("[0-9a-f]{64}", f["sha256"])
            for f in state["files"].values()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise Corrupt("the file list of the last push is damaged", path=place, where=LIST, cure=_PUSH_AGAIN)
    return state  # type: ignore[no-any-return]


_PUSH_AGAIN = "Push again with --overwrite (in Python overwrite=True)"
_CREDENTIALS = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
