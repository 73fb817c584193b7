"""Hugging Face's hub and compatible servers: `hf://org/repo[@revision][/path]`.

huggingface_hub's environment variables apply: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. Errors never show a token, a
header or a signed url: such parts are removed from the server's messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urljoin

from ...errors import AccessDenied, AdapterkitError, Malformed, NetworkError, RemoteNotFound, StorageError, UsageError
from ...io.strict_json import load_json
from ..remote import Content, Digests, Placed, Remote, RemoteFile, Uri, check_name, lost
from ..transfer import check_listed
from ..web import (
    CHUNK,
    PASSING,
    Passing,
    answered,
    begins_at,
    body_of,
    error_body_of,
    guarded,
    is_offline,
    is_transport,
    offline,
    origin,
    range_header,
    redacted,
    retry_after,
)

if TYPE_CHECKING:
    from types import ModuleType

    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError


T = TypeVar("T")

_SEGMENT = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(
    rf"(?P<repo>{_SEGMENT}/{_SEGMENT})(?:@(?!\.\.?(?:/|$))(?P<revision>[^/@\s]{{1,200}}))?(?:/(?P<path>.*))?"
)


class HuggingFace(Remote):
    """A model repository on the Hugging Face hub or a compatible server."""

    form = "hf://org/repo, hf://org/repo@revision or hf://org/repo@revision/path"

    def __init__(self, uri: Uri, token: str | None = None) -> None:
        from huggingface_hub import HfApi, constants, get_token

        super().__init__(uri, token or get_token())
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        # Pass False, not None: with None, huggingface_hub would look for a stored token again.
        self.api: HfApi = HfApi(endpoint=self.endpoint, token=self.token or False)

    @classmethod
    def named(cls, rest: str) -> Uri | None:
        match = _NAME.fullmatch(rest)
        # Return None for names with `..` or `--`, which the hub refuses too.
        if "://" in rest or match is None or ".." in match["repo"] or "--" in match["repo"]:
            return None
        path = match["path"] or ""
        if path:
            check_name(path, UsageError)
        revision = match["revision"]
        return Uri(match["repo"], None if revision is None else re.sub("(?i)%2F", "/", revision), path)

    @cached_property
    def commit(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - callers read it like a property
        at = "" if self.uri.revision is None else f"/revision/{quote(self.uri.revision, safe='')}"
        revision = self.call(lambda: self._json(f"{self._model}{at}")[0]["sha"])
        if not isinstance(revision, str) or not re.fullmatch(r"[0-9a-f]{40,64}", revision):
            raise NetworkError("the hub's reply has no valid commit hash", path=str(self.uri), cure=_NOT_A_HUB)
        return revision

    def call(self, act: Callable[[], T]) -> T:
        with guarded(self.endpoint, str(self.uri)):
            return super().call(act)

    def listed(self) -> Iterator[RemoteFile]:
        url: str | None = f"{self._model}/tree/{self.commit}?recursive=true&expand=false"
        while url is not None:
            here = url
            entries, following = self.call(lambda here=here: self._json(here))  # type: ignore[misc]
            # Refuse an empty page with a link to another page: a server could send an endless sequence of empty pages.
            if not isinstance(entries, list) or (following and not entries):
                raise NetworkError("the hub's list of files is invalid", path=str(self.uri), cure=_NOT_A_HUB)
            yield from (self._file(entry) for entry in entries if not _is_folder(entry))
            url = following

    @property
    def _model(self) -> str:
        return f"{self.endpoint}/api/models/{self.uri.repo}"

    def _json(self, url: str) -> tuple[Any, str | None]:
        """Return the JSON document at a url of the hub, and the url of the next page (None on the last page).

        This method does not use huggingface_hub's functions, for two reasons. Those functions do not limit the length
        of a reply. They also send the token to the url of the next page. After a redirect, another server may have
        chosen this url.

        Raises:
            HfHubHTTPError: the hub refuses the request.
            ValueError: the reply is not JSON.
        """
        with self._answered(url, {}) as response:
            document = load_json(body_of(response, str(self.uri)).decode())
            following = response.links.get("next", {}).get("url")
            return document, urljoin(str(response.url), following) if following else None

    @contextmanager
    def _answered(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Send a GET request and yield the open reply. The token is sent only to the endpoint's own origin.

        Raises:
            HfHubHTTPError: the hub refuses the request.
        """
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

        sent = {key.lower(): value for key, value in build_hf_headers(token=self.token or False).items()} | dict(
            headers
        )
        secret = {key: sent.pop(key) for key in ("authorization",) if key in sent}
        if origin(url) != origin(self.endpoint):
            secret = {}
        with answered("GET", url, sent, secret, str(self.uri)) as response:
            if response.status_code >= 400:
                # huggingface_hub reads the whole body of an error reply to explain the error, and a server could send
                # an endless body. So pass a copy of the reply that has only the beginning of the body.
                kept_headers = {key: response.headers[key] for key in _EXPLAINING if key in response.headers}
                copy = httpx.Response(
                    response.status_code,
                    headers=kept_headers,
                    content=error_body_of(response),
                    request=response.request,
                )
                hf_raise_for_status(copy)
            yield response

    def _file(self, entry: Any) -> RemoteFile:
        path, size, lfs = entry.get("path"), entry.get("size"), entry.get("lfs")
        digest = f"git:{entry.get('oid')}"
        # For an LFS file, `oid` is the digest of the pointer file. `lfs` has the size and the digest of the content.
        if lfs is not None:
            size, digest = lfs.get("size"), f"sha256:{lfs.get('oid')}"
        valid = isinstance(path, str) and type(size) is int and size >= 0
        if not valid or not re.fullmatch(r"git:[0-9a-f]{40}|sha256:[0-9a-f]{64}", digest):
            raise Malformed(
                "the hub lists a file whose path, size or digest is invalid", path=str(self.uri), cure=_NOT_A_HUB
            )
        return RemoteFile(path, size, digest)

    @contextmanager
    def opened(self, file: RemoteFile, start: int, end: int | None) -> Iterator[tuple[int, Iterator[bytes]]]:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.uri.repo, file.path, revision=self.commit, endpoint=self.endpoint)
        with self._answered(url, range_header(start, end)) as response:
            yield begins_at(response), response.iter_raw(CHUNK)

    def passing(self, error: Exception) -> Passing | None:
        from huggingface_hub.errors import HfHubHTTPError

        error = _cause(error)
        if isinstance(error, Passing):
            return error
        if isinstance(error, HfHubHTTPError):
            response = error.response
            passing = response is not None and response.status_code in PASSING
            wait = retry_after(response.headers.get("Retry-After")) if passing else None
            return Passing(f"the hub answered {response.status_code}", wait) if passing else None
        return Passing("the connection was lost") if is_transport(error) else None

    def failure(self, error: Exception) -> NetworkError | None:
        from huggingface_hub import errors
        from huggingface_hub.utils import httpx

        place, error = str(self.uri), _cause(error)
        if is_offline(error):
            return offline(place)
        if isinstance(error, errors.HfHubHTTPError):
            return self._refusal(error, errors)
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, Passing, TimeoutError)):
            why = f"cannot reach {_bare(self.endpoint)} ({type(error).__name__.removesuffix('Error')})"
            return NetworkError(str(error) if isinstance(error, Passing) else why, path=place, cure=_REACH)
        if isinstance(error, (ValueError, LookupError, TypeError, AttributeError, RecursionError)):
            why = f"the hub's answer is invalid ({type(error).__name__})"
            return NetworkError(why, path=place, cure=_NOT_A_HUB)
        return None

    def _refusal(self, error: HfHubHTTPError, errors: ModuleType) -> NetworkError:
        place, status = str(self.uri), error.response.status_code
        hidden = isinstance(error, errors.RepositoryNotFoundError)
        if isinstance(error, errors.GatedRepoError):
            cure = f"Accept the repository's terms at {_bare(self.endpoint)}/{self.uri.repo}, and set HF_TOKEN"
            return AccessDenied("access to this repository is gated", path=place, cure=cure)
        if isinstance(error, errors.RevisionNotFoundError):
            cure = "Check the branch, tag or commit after the @"
            return RemoteNotFound(f"the revision {self.uri.revision or 'main'!r} does not exist", path=place, cure=cure)
        if isinstance(error, errors.EntryNotFoundError):
            return RemoteNotFound("the repository has no such file", path=place, cure="Check the spelling of the path")
        if status in (401, 403) and not hidden:
            return self._denial(status)
        if status == 404 or hidden:
            known = "with this token" if self.token else "without a token"
            cure = "Check the spelling" + ("" if self.token else f". If the repository is private: {_LOGIN}")
            return RemoteNotFound(f"the repository does not exist, or is not visible {known}", path=place, cure=cure)
        return NetworkError(f"the hub answered {status}{self._message(error)}", path=place, cure=_REACH)

    def _denial(self, status: int) -> AccessDenied:
        place = str(self.uri)
        if status == 403:
            cure = "Use a token with read permission for a pull, write permission for a push" if self.token else _LOGIN
            known = "with this token" if self.token else "without a token"
            return AccessDenied(f"the hub forbids this request {known}", path=place, cure=cure)
        if self.token:
            cure = "The token is mistyped, expired or revoked: set HF_TOKEN to a valid token, or unset it"
            return AccessDenied("the hub does not know this token", path=place, cure=cure)
        return AccessDenied("the hub requires a token", path=place, cure=_LOGIN)

    def _message(self, error: object) -> str:
        """Return the server's message with tokens and urls removed."""
        text = " ".join(str(getattr(error, "server_message", None) or "").split())[:200]
        return f": {redacted(text, self.token)}" if text else ""

    def there(self) -> Mapping[str, RemoteFile] | None:
        try:
            return {file.path: file for file in self.files}
        except RemoteNotFound:
            # The repository may exist without this branch. In this case, `send` creates the branch from the main
            # branch, so list the main branch's files.
            return None if self.uri.revision is None else HuggingFace(Uri(self.uri.repo), self.token).there()

    def send(
        self, files: Mapping[str, Content], changed: Sequence[str], digests: Mapping[str, Digests], message: str,
        private: bool,
    ) -> str:  # fmt: skip
        return send(self, {name: files[name] for name in changed}, digests, message, private)

    def begin(self) -> None:
        super().begin()
        _created(self, private=False)
        head_of(self)

    def place(self, path: str, file: Path, digests: Digests) -> Placed:
        # Upload even small files with LFS: a later commit can refer to a file by its sha256 only if the file is an LFS
        # file.
        def act() -> None:
            operation = _addition(path, str(file))
            self.api.preupload_lfs_files(self.uri.repo, [operation], revision=self.uri.revision, num_threads=2)

        with _uploading(self.endpoint):
            self.call(act)
        return Placed(path, digests)

    def holds(self, placed: Placed) -> bool:
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        _, digest, _ = placed.digests
        info = UploadInfo(sha256=bytes.fromhex(digest.partition(":")[2]), size=placed.digests[0], sample=b"")

        def act() -> bool:
            known, _, _ = post_lfs_batch_info([info], self.token, "model", self.uri.repo, endpoint=self.endpoint)
            # The hub returns an upload url only for a file that the hub does not have yet.
            return bool(known) and not any("upload" in (each.get("actions") or {}) for each in known)

        return self.call(act)

    def kept(self) -> str:
        return head_of(self)

    def tagged(self, tag: str, commit: str) -> None:
        if self._tag(tag) not in (None, commit):
            place, cure = str(self.uri.at(tag)), "Choose another tag"
            raise StorageError("the tag exists and points to another commit", path=place, cure=cure)
        try:
            self.call(lambda: self.api.create_tag(self.uri.repo, tag=tag, revision=commit, exist_ok=True))
        except NetworkError:
            # The hub may have set the tag although its reply was lost. So raise the error only if the tag is not set.
            if self._tag(tag) != commit:
                raise

    def _tag(self, name: str) -> str | None:
        """Return the commit that a tag points to, or None if the tag does not exist."""

        def act() -> str | None:
            tags = self._json(f"{self._model}/refs")[0]["tags"]
            return next((str(tag["targetCommit"]) for tag in tags if tag["name"] == name), None)

        return self.call(act)


def _is_folder(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("type") == "directory"


def _cause(error: Exception) -> Exception:
    """Unwrap an error. huggingface_hub wraps the original error of a failed upload in a `RuntimeError`."""
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped and isinstance(error.__cause__, Exception) else error


def _bare(endpoint: str) -> str:
    """Return an endpoint url with any user name and password removed."""
    return re.sub(r"//[^/@]*@", "//", endpoint)


_EXPLAINING = ("X-Error-Code", "X-Error-Message", "Content-Type", "Retry-After", "X-Request-Id")
"""The response headers that huggingface_hub reads to explain why a server refused a request."""

_LOGIN = "Set HF_TOKEN, or run 'hf auth login'"
_REACH = "Check the connection and HF_ENDPOINT, then run the same command again: it continues where it stopped"
_NOT_A_HUB = "Set HF_ENDPOINT to the address of a Hugging Face hub, or unset it"


# A push makes one commit, so nobody sees half of a push. The push names the parent of its commit: if somebody else has
# pushed since the parent was read, the hub refuses the commit. So no push overwrites another push.


def send(
    remote: HuggingFace, contents: Mapping[str, Content], digests: Mapping[str, Digests], message: str, private: bool
) -> str:
    """Create the repository and branch if needed, make one commit, and return the commit's hash."""
    from huggingface_hub import CommitOperationAdd

    uri, api = remote.uri, remote.api
    _created(remote, private)
    head = head_of(remote)
    for name, content in contents.items():
        if isinstance(content, Placed) and not remote.holds(content):
            raise lost(str(uri), name)

    def act() -> str:
        # Create new operations for each attempt: huggingface_hub marks an operation as uploaded, and a second attempt
        # with the same operation would not upload the file again.
        operations = [
            _placed(name, content) if isinstance(content, Placed) else CommitOperationAdd(name, content)
            for name, content in contents.items()
        ]
        done = api.create_commit(
            uri.repo, operations, commit_message=message, revision=uri.revision, parent_commit=head, num_threads=2
        )
        return str(done.oid)

    with _uploading(remote.endpoint):
        return _once(remote, head, digests, act)


def head_of(remote: HuggingFace) -> str:
    """Return the newest commit of the branch. If the branch is missing, create it from the main branch."""
    uri, hub = remote.uri, type(remote)
    try:
        return hub(uri, remote.token).commit
    except RemoteNotFound:
        if uri.revision is None:
            raise
    branch = uri.revision
    # Create the branch first: the hub accepts commits to existing branches only.
    remote.call(lambda: remote.api.create_branch(uri.repo, branch=branch, exist_ok=True))
    return hub(uri, remote.token).commit


def _once(remote: HuggingFace, head: str, digests: Mapping[str, Digests], act: Callable[[], str]) -> str:
    """Call `act`, which makes a commit, and return the commit's hash. The commit is made only once.

    If the connection breaks, the hub may already have made the commit. So after an error, read the newest commit of the
    branch. If this commit is not `head` and contains the pushed files, return its hash instead of raising the error.
    """
    try:
        return remote.call(act)
    except NetworkError as error:
        try:
            now = type(remote)(remote.uri, remote.token)
            moved = now.commit != head
            check_listed(now, digests)
        except AdapterkitError:
            moved = False
        else:
            if moved:
                return now.commit
        # The hub answers 412 if `parent_commit` is no longer the head of the branch.
        if "412" in error.why or "refresh" in error.why:
            cure = "Look at the files that are on the hub now, then run the same command again"
            raise NetworkError("somebody else pushed in the meantime", path=str(remote.uri), cure=cure) from None
        raise


def _created(remote: HuggingFace, private: bool) -> None:
    # Pass None instead of False, so that the organisation's default decides the visibility of a new repository.
    remote.call(lambda: remote.api.create_repo(remote.uri.repo, private=private or None, exist_ok=True))


def _addition(name: str, content: str | bytes) -> CommitOperationAdd:
    """Return a commit operation that adds a file with LFS.

    The operation already contains the upload mode, so huggingface_hub does not ask the hub for the mode.
    """
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, content)
    operation._upload_mode = "lfs"
    return operation


def _placed(name: str, placed: Placed) -> CommitOperationAdd:
    """Return a commit operation that adds an uploaded file. The operation contains only the file's sha256 and size."""
    from huggingface_hub.lfs import UploadInfo

    operation, (size, digest, _) = _addition(name, b""), placed.digests
    operation.upload_info = UploadInfo(sha256=bytes.fromhex(digest.partition(":")[2]), size=size, sample=b"")
    operation._is_uploaded = True
    return operation


@contextmanager
def _uploading(endpoint: str) -> Iterator[None]:
    """Silence huggingface_hub's logs and progress bars, and turn xet off for hubs other than Hugging Face's own.

    Other servers do not support the xet protocol. If the environment has turned xet off, it stays off.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    xet, level, silent = constants.HF_HUB_DISABLE_XET, logging.get_verbosity(), are_progress_bars_disabled()
    constants.HF_HUB_DISABLE_XET = xet or not endpoint.endswith(("huggingface.co", "hf.co"))
    logging.set_verbosity(ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = xet
        logging.set_verbosity(level)
        if not silent:
            enable_progress_bars()
