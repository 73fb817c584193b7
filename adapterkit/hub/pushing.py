"""Push: an adapter or a model to a hub, in one commit upon the state that was looked at; nobody sees half of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StorageError, UnknownFormat
from ..tensors.locations import located
from .card import adapter_card, model_card
from .digests import check_listed, digests_of
from .hubs import remote_at
from .licences import Licence, licence_at, licence_called
from .lineage import CARD, is_of_the_base, model_at
from .names import check_names
from .remote import Content, Digests, Remote, RemoteFile
from .uris import Uri, parse


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did, or would do.

    Attributes:
        uri: where it is now, at the commit; without one where nothing was written.
        commit: the commit; None where nothing was written.
        created: the repository was (or would be) made.
        added, replaced, unchanged, removed: names of files in the repository; none is removed where what is pushed
            stands beside what was there.
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
    removed: tuple[str, ...] = ()
    card: str | None = None
    tag: str | None = None
    dry: bool = False

    def record(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "uri": self.uri, "commit": self.commit, "created": self.created, "added": list(self.added),
            "replaced": list(self.replaced), "unchanged": list(self.unchanged), "removed": list(self.removed),
            "card": self.card, "tag": self.tag, "dry_run": self.dry,
        }  # fmt: skip


@dataclass(slots=True)
class _Payload:
    """Files to push, by their names in the repository: paths, or the text of a generated card."""

    files: dict[str, Content]
    card: str | None = None
    found: dict[str, Digests] = field(default_factory=dict)

    def digests(self) -> dict[str, Digests]:
        for name, content in self.files.items():
            if name not in self.found:
                self.found[name] = digests_of(content)
        return {name: self.found[name] for name in self.files}


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
    licence: str | Licence | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Pushes an adapter, or a folder of weights, in one commit.

    When somebody else pushed meanwhile, it fails instead of mixing. A repository or branch that is not there is made.
    Without a README.md, here and there, a model card is generated; that of a base which came along when adapters were
    merged into it counts for none.

    Args:
        path: an adapter in any format, or a base: file, folder or a place on a hub. Hidden files stay here.
        uri: `hf://org/repo[@branch][/folder]`, `oci://registry/name:tag`, or of another hub.
        format: push the adapter in this format; as it lies there if absent.
        base: the base, where writing that format needs one.
        on_loss: as for `adapterkit.write`.
        private: a repository that has to be made is private.
        tag: set this tag on the commit.
        message: of the commit.
        licence: for the generated card: an identifier such as `apache-2.0`, or what a card says of it under `license`,
            `license_name` and `license_link`; the one that a card at `path` names, if absent.
        overwrite: replace files that are there with other content; without it they are an error.
        dry_run: look, and write nothing.
        token: a token; what the hub's own tools use if absent.

    Raises:
        NetworkError: no access, somebody pushed meanwhile, or the hub cannot be reached.
        StorageError: files of those names are there with other content.
        UnknownFormat: neither an adapter nor a base is at `path`.
        Corrupt: what the hub lists afterwards is not what was pushed.
    """
    target = parse(uri) if isinstance(uri, str) else uri
    remote = remote_at(target, token)
    remote.check_writable()
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as scratch:
        here = located(path)
        source = here if format is None else _converted(path, Path(scratch), format, base, on_loss)
        payload = _payload(source, remote, licence_called(licence) or licence_at(here))
        there = remote.there()
        state = _compare(payload, there or {}, remote)
        _refuse(state, target, overwrite)
        kinds = state["added"], state["replaced"], state["unchanged"], state["removed"]
        if dry_run or not any(state[kind] for kind in ("added", "replaced", "removed")):
            commit = None if dry_run else remote.kept()
            tag = _tag(remote, tag, commit) if commit else None
            place = str(target if commit is None else target.at(commit))
            return Pushed(place, commit, there is None, *kinds, payload.card, tag, dry_run)
        changed, words = [*state["added"], *state["replaced"]], message or f"Push {Path(path).name} with adapterkit"
        commit = remote.send(payload.files, changed, payload.digests(), words, private)
        check_listed(remote_at(target.at(commit), token), payload.digests())
        tag = _tag(remote, tag, commit)
        return Pushed(str(target.at(commit)), commit, there is None, *kinds, payload.card, tag)


def _converted(path: str | os.PathLike[str], scratch: Path, name: str, base: Any, on_loss: str) -> Path:
    """The adapter in another format, in a scratch folder."""
    from ..formats import FORMATS, read, write

    out = scratch / "adapter"
    out.mkdir()
    write(read(path, base=base), out / FORMATS[name].file, name, base, on_loss)
    return out


def _payload(source: Path, remote: Remote, licence: Licence) -> _Payload:
    """The files, and a card for the repository's root where there is none of its own."""
    files, target = _files(source), remote.uri
    if is_of_the_base(source):
        del files[CARD]
    check_names(files)
    text = _card(source, target, licence)
    prefix = f"{target.path}/" if target.path else ""
    payload = _Payload({f"{prefix}{name}": path for name, path in files.items()})
    if CARD not in files and (not prefix or remote.cards_below):
        payload.card, payload.files[prefix + CARD] = text, text.encode()
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


def _card(source: Path, target: Uri, licence: Licence) -> str:
    """The card; reading for it also proves that an adapter or a base is pushed, and no folder of something else."""
    from ..formats import detect, read

    name = (target.path or target.repo).rpartition("/")[2]
    try:
        source_format = detect(source)
    except UnknownFormat:
        return model_card(name, target, model_at(source), licence)
    return adapter_card(read(source, source_format), name, source_format, target, licence)


def _compare(payload: _Payload, there: Mapping[str, RemoteFile], remote: Remote) -> dict[str, tuple[str, ...]]:
    name = f"{remote.uri.path}/{CARD}" if remote.cards_below and remote.uri.path else CARD
    if payload.card is not None and name in there and not remote.whole:
        del payload.files[name]
        payload.card = None
    state: dict[str, list[str]] = {"added": [], "replaced": [], "unchanged": [], "removed": []}
    if remote.whole:
        state["removed"] += [path for path in there if path not in payload.files]
    for name, (size, *names) in payload.digests().items():
        file = there.get(name)
        kind = "added" if file is None else "unchanged" if file.size == size and file.digest in names else "replaced"
        state[kind].append(name)
    return {kind: tuple(sorted(names)) for kind, names in state.items()}


def _refuse(state: Mapping[str, tuple[str, ...]], target: Uri, overwrite: bool) -> None:
    lost = [*state["replaced"], *state["removed"]]
    if lost and not overwrite:
        names = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        cure = "Push to another repository, branch or folder, or allow overwriting"
        raise StorageError(f"there already, with other content: {names}", path=str(target), cure=cure)


def _tag(remote: Remote, tag: str | None, commit: str) -> str | None:
    if tag is not None:
        remote.tagged(tag, commit)
    return tag
