"""Push: an adapter or a model to a hub, in one commit upon the state that was looked at; nobody sees half of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..tensors.locations import located
from .card import is_generated
from .digests import check_listed
from .hubs import remote_at
from .licences import Licence, licence_at, licence_called, licence_of
from .payload import Payload, card_there, payload_of, prepared
from .remote import Remote, RemoteFile
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


def push(
    path: str | os.PathLike[str],
    uri: str | Uri,
    *,
    format: str | None = None,  # noqa: A002 - the public contract's word
    base: str | os.PathLike[str] | None = None,
    on_loss: str = "refuse",
    shard_size: int | None = None,
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
    merged into it counts for none, and so does a generated one there when files that it tells of are replaced.

    Args:
        path: an adapter in any format, or a base: file, folder or a place on a hub. Hidden files stay here.
        uri: `hf://org/repo[@branch][/folder]`, `oci://registry/name:tag`, or of another hub.
        format: push the adapter in this format; as it lies there if absent.
        base: the base, where writing that format needs one.
        on_loss: as for `adapterkit.write`.
        shard_size: bytes of a weight file of a model at most; where one is larger, they are parted anew on the way. As
            they lie there if absent.
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
        UsageError: an adapter, which is one file, is to be parted.
        Corrupt: what the hub lists afterwards is not what was pushed.
    """
    target = parse(uri) if isinstance(uri, str) else uri
    remote = remote_at(target, token)
    remote.check_writable()
    words = message or f"Push {Path(path).name} with adapterkit"
    with prepared(path, format, base, on_loss, shard_size) as (source, files):
        there = remote.there()
        card = card_there(remote, there)
        passed_on = licence_called(licence) or licence_at(located(path)) or licence_of(card)
        payload = payload_of(source, files, remote, passed_on)
        pushed = _compared(payload, there, remote, is_generated(card))
        _refuse(pushed, overwrite)
        return replace(pushed, dry=True) if dry_run else _sent(pushed, payload, remote, words, private, tag)


def _sent(pushed: Pushed, payload: Payload, remote: Remote, message: str, private: bool, tag: str | None) -> Pushed:
    """Makes the commit, if there is anything to change, and sets the tag."""
    changed = [*pushed.added, *pushed.replaced]
    if changed or pushed.removed:
        commit = remote.send(payload.files, changed, payload.digests(), message, private)
        check_listed(remote_at(remote.uri.at(commit), remote.token), payload.digests())
    else:
        commit = remote.kept()
    if tag is not None:
        remote.tagged(tag, commit)
    return replace(pushed, uri=str(remote.uri.at(commit)), commit=commit, tag=tag)


def _compared(payload: Payload, there: Mapping[str, RemoteFile] | None, remote: Remote, generated: bool) -> Pushed:
    """What a push would do.

    A card that is there stays, where what is there stays; but one that was generated does not outlive what it is of.
    """
    pushed = _all_compared(payload, there, remote)
    if payload.card is None or payload.card_name not in (there or {}) or remote.whole:
        return pushed
    if generated and set(pushed.replaced) - {payload.card_name}:
        return pushed
    payload.leave_card_out()
    return _all_compared(payload, there, remote)


def _all_compared(payload: Payload, there: Mapping[str, RemoteFile] | None, remote: Remote) -> Pushed:
    kinds: dict[str, list[str]] = {"added": [], "replaced": [], "unchanged": []}
    for name, (size, *names) in sorted(payload.digests().items()):
        file = (there or {}).get(name)
        kind = "added" if file is None else "unchanged" if file.size == size and file.digest in names else "replaced"
        kinds[kind].append(name)
    added, replaced, unchanged = map(tuple, kinds.values())
    removed = tuple(sorted((there or {}).keys() - payload.files.keys())) if remote.whole else ()
    return Pushed(str(remote.uri), None, there is None, added, replaced, unchanged, removed, payload.card)


def _refuse(pushed: Pushed, overwrite: bool) -> None:
    lost = [*pushed.replaced, *pushed.removed]
    if lost and not overwrite:
        names = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        cure = "Push to another repository, branch or folder, or allow overwriting"
        raise StorageError(f"there already, with other content: {names}", path=pushed.uri, cure=cure)
