"""Push one commit on top of a known parent, so that readers never see half of it and no other push is overwritten."""

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
    """Create the repository and branch if needed, and make one commit; return its hash."""
    uri, api = remote.uri, remote.api
    # None leaves the visibility of a new repository to the default of its organisation.
    remote.call(lambda: api.create_repo(uri.repo, private=private or None, exist_ok=True))
    head = head_of(remote)

    def act() -> str:
        from huggingface_hub import CommitOperationAdd

        # Operations remember that they were uploaded, so each attempt needs new ones.
        operations = [CommitOperationAdd(name, _content(content)) for name, content in contents.items()]
        done = api.create_commit(
            uri.repo, operations, commit_message=message, revision=uri.revision, parent_commit=head, num_threads=2
        )
        return str(done.oid)

    with _uploading(remote.endpoint):
        return _once(remote, head, found, act)


def head_of(remote: HuggingFace) -> str:
    """Return the commit to build on; a missing branch is created from the main one."""
    uri, hub = remote.uri, type(remote)
    try:
        return hub(uri, remote.token).commit
    except RemoteNotFound:
        if uri.revision is None:
            raise
    branch = uri.revision
    # The hub accepts commits to existing branches only.
    remote.call(lambda: remote.api.create_branch(uri.repo, branch=branch, exist_ok=True))
    return hub(uri, remote.token).commit


def _once(remote: HuggingFace, head: str, found: Mapping[str, Digests], act: Callable[[], str]) -> str:
    """Commit once, even if the reply is lost.

    The request may have succeeded before the connection broke. Then the branch has moved away from `head` and already
    holds the pushed files, and the new commit is returned instead of an error.
    """
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
        # The hub answers 412 when `parent_commit` is no longer the head of the branch.
        if "412" in error.why or "refresh" in error.why:
            cure = "Look at what is there now, and run the same command again"
            raise NetworkError("somebody else pushed meanwhile", path=str(remote.uri), cure=cure) from None
        raise


def _content(content: Content) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


@contextmanager
def _uploading(endpoint: str) -> Iterator[None]:
    """Silence huggingface_hub's logs and progress bars, and turn xet off for hubs other than Hugging Face's own.

    Other servers do not speak the xet protocol. An environment that disables xet keeps it disabled.
    """
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
