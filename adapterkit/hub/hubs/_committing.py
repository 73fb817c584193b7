"""One commit upon the state that was looked at: nobody sees half of it, and nobody else's is overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AdapterkitError, NetworkError, RemoteNotFound
from ..digests import check_listed
from ..remote import Content, Digests

if TYPE_CHECKING:
    from .hf import HuggingFace


def send(
    remote: HuggingFace, contents: Mapping[str, Content], found: Mapping[str, Digests], message: str, private: bool
) -> str:
    """Makes what has to be made, and one commit; returns its name."""
    uri, api = remote.uri, remote.api
    remote.call(lambda: api.create_repo(uri.repo, private=private or None, exist_ok=True))
    head = head_of(remote)

    def act() -> str:
        from huggingface_hub import CommitOperationAdd

        # Operations remember that they were sent, so that each attempt needs new ones.
        operations = [CommitOperationAdd(name, _content(content)) for name, content in contents.items()]
        done = api.create_commit(
            uri.repo, operations, commit_message=message, revision=uri.revision, parent_commit=head, num_threads=2
        )
        return str(done.oid)

    with _uploading(remote.endpoint):
        return _once(remote, head, found, act)


def head_of(remote: HuggingFace) -> str:
    """The commit to build upon; a branch that is not there is begun at the main one."""
    uri, hub = remote.uri, type(remote)
    try:
        return hub(uri, remote.token).commit
    except RemoteNotFound:
        if uri.revision is None:
            raise
    branch = uri.revision
    remote.call(lambda: remote.api.create_branch(uri.repo, branch=branch, exist_ok=True))
    return hub(uri, remote.token).commit


def _once(remote: HuggingFace, head: str, found: Mapping[str, Digests], act: Callable[[], str]) -> str:
    """Commits; where the answer was lost, a later attempt finds that the state has moved, to what was to be pushed."""
    try:
        return remote.call(act)
    except NetworkError as error:
        try:
            now = type(remote)(remote.uri, remote.token)
            moved = now.commit != head
            check_listed(now, found)
        except AdapterkitError:
            moved = False
        else:
            if moved:
                return now.commit
        if "412" in error.why or "refresh" in error.why:
            cure = "Look at what is there now, and run the same command again"
            raise NetworkError("somebody else pushed meanwhile", path=str(remote.uri), cure=cure) from None
        raise


def _content(content: Content) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


@contextmanager
def _uploading(endpoint: str) -> Iterator[None]:
    """Without xet where the hub is not Hugging Face's own: other servers do not speak it. Without words or bars."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    xet, level, silent = constants.HF_HUB_DISABLE_XET, logging.get_verbosity(), are_progress_bars_disabled()
    constants.HF_HUB_DISABLE_XET = xet or not endpoint.endswith(("huggingface.co", "hf.co"))
    logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = xet
        logging.set_verbosity(level)
        if not silent:
            enable_progress_bars()
