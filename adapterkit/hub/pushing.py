"""Push: an adapter or a model to a hub, in one commit upon the state that was looked at; nobody sees half of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterkitError, Corrupt, NetworkError, RemoteNotFound, StorageError, UnknownFormat, UsageError
from ..merging.planning import REPORT
from ..tensors.locations import source_of
from .card import adapter_card, licence_of, model_card
from .digests import digests
from .names import check_names
from .remote import Remote, RemoteFile
from .uris import Uri, parse

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did, or would do.

    Attributes:
        uri: where it is now, at the commit; without one where nothing was written.
        commit: the commit; None where nothing was written.
        created: the repository was (or would be) made.
        added, replaced, unchanged: names of files in the repository.
        card: the text of the generated card; None where there was one.
        tag: the tag that was set.
        dry: nothing was written.
    """

    uri: str
    commit: str | None
    created: bool
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    unchanged: tuple[str, ...]
    card: str | None = None
    tag: str | None = None
    dry: bool = False

    def record(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "uri": self.uri, "commit": self.commit, "created": self.created, "added": list(self.added),
            "replaced": list(self.replaced), "unchanged": list(self.unchanged), "card": self.card, "tag": self.tag,
            "dry_run": self.dry,
        }  # fmt: skip


@dataclass(slots=True)
class _Payload:
    """Files to push, by their names in the repository: paths, or the text of a generated card."""

    files: dict[str, Path | bytes]
    card: str | None = None
    found: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def digests(self) -> dict[str, tuple[int, str, str]]:
        for name, content in self.files.items():
            if name not in self.found:
                self.found[name] = _digests(content)
        return self.found


def push(
    path: str | os.PathLike[str],
    uri: str | Uri,
    *,
    format: str | None = None,  # noqa: A002 - the public contract's word
    base: str | os.PathLike[str] | None = None,
    on_loss: str = "refuse",
    private: bool = False,
    tag: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Pushes an adapter, or a folder of weights, in one commit.

    The commit names its parent: when somebody else pushed meanwhile, it fails instead of mixing. A repository or branch
    that is not there is made. Without a README.md, here and there, a model card is generated.

    Args:
        path: an adapter in any format, or a base: file or folder. Hidden files stay here.
        uri: `hf://org/repo[@branch][/folder]`.
        format: push the adapter in this format; as it lies there if absent.
        base: the base, where writing that format needs one.
        on_loss: as for `adapterkit.write`.
        private: a repository that has to be made is private.
        tag: set this tag on the commit.
        message: of the commit.
        licence: an identifier such as `apache-2.0` for the generated card.
        overwrite: replace files that are there with other content; without it they are an error.
        dry_run: look, and write nothing.
        token: a token; the one that huggingface_hub finds if absent.

    Raises:
        NetworkError: no access, somebody pushed meanwhile, or the hub cannot be reached.
        StorageError: files of those names are there with other content.
        UnknownFormat: neither an adapter nor a base is at `path`.
        Corrupt: what the hub lists afterwards is not what was pushed.
    """
    target = parse(uri) if isinstance(uri, str) else uri
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as scratch:
        source = Path(path) if format is None else _converted(path, Path(scratch), format, base, on_loss)
        payload = _payload(source, target, licence)
        remote = Remote(target, token)
        there = _there(remote)
        state = _compare(payload, {} if there is None else {file.path: file for file in there.files})
        _refuse(state, target, overwrite)
        kinds = state["added"], state["replaced"], state["unchanged"]
        if dry_run or not (state["added"] or state["replaced"]):
            commit = None if dry_run else _head(remote)
            tag = _tag(remote, tag, commit) if commit else None
            place = str(target if commit is None else target.at(commit))
            return Pushed(place, commit, there is None, *kinds, payload.card, tag, dry_run)
        commit = _send(remote, payload, state, message or f"Push {source.name} with adapterkit", private)
        _check(Remote(target.at(commit), token), payload)
        tag = _tag(remote, tag, commit)
        return Pushed(str(target.at(commit)), commit, there is None, *kinds, payload.card, tag)


def _converted(path: str | os.PathLike[str], scratch: Path, name: str, base: Any, on_loss: str) -> Path:
    """The adapter in another format, in a scratch folder."""
    from ..formats import read, write

    out = scratch / "adapter"
    out.mkdir()
    write(read(path, base=base), out, name, base, on_loss)
    return out


def _payload(source: Path, target: Uri, licence: str | None) -> _Payload:
    """The files, and a card for the repository's root where there is none."""
    files = _files(source)
    check_names(files)
    card = files.get(CARD)
    text = _card(source, target, licence or (licence_of(card.read_text("utf-8")) if card else None))
    prefix = f"{target.path}/" if target.path else ""
    payload = _Payload({f"{prefix}{name}": path for name, path in files.items()})
    if card is None and not prefix:
        payload.card, payload.files[CARD] = text, text.encode()
    return payload


def _files(source: Path) -> dict[str, Path]:
    """What is pushed of a file or a folder; links to files count, links to folders and hidden names do not."""
    if not source.exists():
        raise StorageError("no such file or folder", path=source, cure="Check the spelling of the path")
    if source.is_file():
        return {source.name: source}
    found = {}
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            if not name.startswith(".") and file.is_file():
                found[file.relative_to(source).as_posix()] = file
    return found


def _card(source: Path, target: Uri, licence: str | None) -> str:
    """The card; reading for it also proves that an adapter or a base is pushed, and no folder of something else."""
    from ..formats import detect, read

    name, place = target.repo.partition("/")[2], str(target)
    try:
        source_format = detect(source)
    except UnknownFormat:
        return _base_card(source, name, place, licence)
    return adapter_card(read(source, source_format), name, source_format, place, licence)


def _base_card(source: Path, name: str, place: str, licence: str | None) -> str:
    from ..tensors.checkpoint import open_checkpoint, read_json

    try:
        folder = open_checkpoint(source).folder
    except UsageError as error:
        cure = "Name an adapter, or a folder of weights"
        raise UnknownFormat(f"neither an adapter nor a base: {error.why}", path=source, cure=cure) from None
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    origin, told = source_of(folder), report.get("base_uri")
    base = parse(told).repo if isinstance(told, str) else origin.repo if origin else None
    adapters = report.get("adapters")
    listed = [a for a in adapters if isinstance(a, dict)] if isinstance(adapters, list) else []
    return model_card(name, place, base, listed, licence)


def _there(remote: Remote) -> Remote | None:
    """The repository as it stands; None where there is none, or no such branch of it."""
    try:
        _ = remote.files
    except RemoteNotFound:
        if remote.uri.revision is None:
            return None
        main = Remote(Uri(remote.uri.repo), remote.token)
        main.api = remote.api
        return _there(main)
    return remote


def _compare(payload: _Payload, there: Mapping[str, RemoteFile]) -> dict[str, tuple[str, ...]]:
    if payload.card is not None and CARD in there:
        del payload.files[CARD]
        payload.card = None
    state: dict[str, list[str]] = {"added": [], "replaced": [], "unchanged": []}
    for name, (size, *names) in payload.digests().items():
        file = there.get(name)
        kind = "added" if file is None else "unchanged" if file.size == size and file.digest in names else "replaced"
        state[kind].append(name)
    return {kind: tuple(sorted(names)) for kind, names in state.items()}


def _refuse(state: Mapping[str, tuple[str, ...]], target: Uri, overwrite: bool) -> None:
    if state["replaced"] and not overwrite:
        names = ", ".join(state["replaced"][:5]) + (", ..." if len(state["replaced"]) > 5 else "")
        cure = "Push to another repository, branch or folder, or allow overwriting"
        raise StorageError(f"there already, with other content: {names}", path=str(target), cure=cure)


def _send(remote: Remote, payload: _Payload, state: Mapping[str, tuple[str, ...]], message: str, private: bool) -> str:
    """Makes what has to be made, and one commit; returns its name."""
    uri, api = remote.uri, remote.api
    remote.call(lambda: api.create_repo(uri.repo, private=private or None, exist_ok=True))
    head = _head(remote)
    changed = [*state["added"], *state["replaced"]]

    def act() -> str:
        from huggingface_hub import CommitOperationAdd

        # Operations remember that they were sent, so that each attempt needs new ones.
        operations = [CommitOperationAdd(name, _content(payload.files[name])) for name in changed]
        done = api.create_commit(
            uri.repo, operations, commit_message=message, revision=uri.revision, parent_commit=head, num_threads=2
        )
        return str(done.oid)

    with _uploading(remote.endpoint):
        return _once(remote, head, payload, act)


def _head(remote: Remote) -> str:
    """The commit to build upon; a branch that is not there is begun at the main one."""
    uri = remote.uri
    try:
        return Remote(uri, remote.token).commit
    except RemoteNotFound:
        if uri.revision is None:
            raise
    branch = uri.revision
    remote.call(lambda: remote.api.create_branch(uri.repo, branch=branch, exist_ok=True))
    return Remote(uri, remote.token).commit


def _once(remote: Remote, head: str, payload: _Payload, act: Callable[[], str]) -> str:
    """Commits; where the answer was lost, a later attempt finds that the state has moved, to what was to be pushed."""
    try:
        return remote.call(act)
    except NetworkError as error:
        try:
            now = Remote(remote.uri, remote.token)
            moved = now.commit != head
            _check(now, payload)
        except AdapterkitError:
            moved = False
        else:
            if moved:
                return now.commit
        if "412" in error.why or "refresh" in error.why:
            cure = "Look at what is there now, and run the same command again"
            raise NetworkError("somebody else pushed meanwhile", path=str(remote.uri), cure=cure) from None
        raise


def _check(there: Remote, payload: _Payload) -> None:
    """Checks that the hub lists every file with the digest that it has here."""
    listed = {file.path: file for file in there.files}
    for name, (size, *names) in payload.digests().items():
        file = listed.get(name)
        if file is None or file.size != size or file.digest not in names:
            cure = "A file changed here while it was pushed, or the hub damaged it: push again with overwriting allowed"
            raise Corrupt("the hub does not list what was pushed", path=str(there.uri), where=name, cure=cure)


def _tag(remote: Remote, tag: str | None, commit: str) -> str | None:
    if tag is not None:
        name = tag
        remote.call(lambda: remote.api.create_tag(remote.uri.repo, tag=name, revision=commit))
    return tag


def _content(content: Path | bytes) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


def _digests(content: Path | bytes) -> tuple[int, str, str]:
    if isinstance(content, Path):
        return digests(content)
    import hashlib

    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return len(content), f"sha256:{hashlib.sha256(content).hexdigest()}", f"git:{git}"


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
