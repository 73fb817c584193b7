"""Push an adapter or a model to a hub in one commit. Commands that write to a hub first build the output locally."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.arguments import checks_types
from ..core.licence_terms import (
    BASE,
    Licence,
    Part,
    check_licences,
    conflicts,
    licence_at,
    licence_called,
    licence_of,
    parts_of,
    passed_over,
)
from ..errors import StorageError, storage_error
from ..io.atomic import write_bytes
from ..io.locations import located
from ..io.strict_json import load_json
from .hubs import parse, remote_at
from .payload import Payload, card_there, files_of, is_generated, payload_of, prepared, record_at
from .remote import Placed, Remote, RemoteFile, Uri, lost
from .transfer import cache_folder, check_listed, digests

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Pushed:
    """The result of a push, or of a dry run.

    Attributes:
        uri: the uri of the target; after a push, the uri is pinned to `commit`.
        commit: the commit with the pushed files; None after a dry run.
        created: True if the repository was (or would be) created.
        added, replaced, unchanged, removed: paths in the repository. They list the files that the push added, replaced,
            left unchanged or removed. After a dry run, they list the files that a push would add, replace, leave
            unchanged or remove. A push removes files only on hubs where it replaces the whole artifact.
        card: the text of the generated card; None if the push contains no generated card.
        tag: the tag that was set, or None.
        dry: True if the push was a dry run, which writes nothing.
        warnings: one sentence for each problem with the licences. There are two kinds of problems: the licence of the
            base or of an adapter has a requirement that the card's licence lacks; or the licences of the base and the
            adapters contradict each other.
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
    warnings: tuple[str, ...] = ()

    def record(self) -> dict[str, JsonValue]:
        """Return the result as a dict that can be written as JSON."""
        return {
            "uri": self.uri, "commit": self.commit, "created": self.created, "added": list(self.added),
            "replaced": list(self.replaced), "unchanged": list(self.unchanged), "removed": list(self.removed),
            "card": self.card, "tag": self.tag, "dry_run": self.dry,
            "warnings": list(self.warnings),
        }  # fmt: skip


@checks_types
def push(
    path: str | os.PathLike[str],
    uri: str | Uri,
    *,
    format: str | None = None,  # noqa: A002 - the public name of the argument
    base: str | os.PathLike[str] | None = None,
    on_loss: str = "refuse",
    shard_size: int | None = None,
    private: bool = False,
    tag: str | None = None,
    message: str | None = None,
    licence: str | Licence | None = None,
    strict_licence: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Push an adapter, or a folder of weights, in one commit.

    If somebody else pushes at the same time, the push fails, so two pushes cannot mix. A missing repository or branch
    is created.

    A model card is generated if neither the local folder nor the hub has a README.md. A generated card also replaces an
    existing README.md in three cases:

    - The local README.md is an unedited copy of the base's card, which a merge put there.
    - The README.md on the hub is an unedited generated card, and the push also replaces other files on the hub.
    - The hub is an OCI registry, where each push replaces the whole artifact, and there is no local README.md.

    Args:
        path: the local file, local folder or uri of an adapter or a model. The adapter may have any format. Hidden
            files are not pushed.
        uri: `hf://org/repo[@branch][/folder]`, `oci://registry/name:tag`, or a uri of another hub.
        format: convert the adapter to this format; if absent, push its files unchanged.
        base: the adapter's base; some formats need it for the conversion.
        on_loss: as for `adapterkit.write`.
        shard_size: the maximum size of a weight file of a model, in bytes; larger files are split for the push. If
            absent, the files are pushed unchanged.
        private: create a missing repository as private.
        tag: set this tag on the commit.
        message: the commit message.
        licence: the licence for the generated card: an identifier such as `apache-2.0`, or a mapping with the keys
            `license`, `license_name` and `license_link`. If absent, the licence in the card at `path` is used, or else
            the licence in the card on the hub.
        strict_licence: raise an error in three cases: the licence of the base or of an adapter has a requirement that
            the card's licence lacks; the licences of the base and the adapters contradict each other; or the licence of
            the base, an adapter or the card is missing or unknown. If False, the first two cases give a warning.
        overwrite: replace existing files that have other content. If False, such files are an error.
        dry_run: compare the files with the hub, and write nothing.
        token: the access token; if absent, the token that the hub's own tools use.

    Raises:
        NetworkError: access is denied, somebody else pushed, or the hub is not reachable.
        StorageError: the hub has files with the same names but other content, and `overwrite` is not set.
        UnknownFormat: `path` is neither an adapter nor a base.
        UsageError: `shard_size` is set, but `path` is an adapter, which cannot be split.
        Corrupt: after the push, the hub does not list the pushed files with their digests.
        CheckFailed: `strict_licence` is set, and one of the three cases in the description of `strict_licence` occurs.
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
        parts, shown, concerns = _licences(source, licence_called(licence), card, base)
        if strict_licence:
            check_licences([(OUTPUT, shown), *parts], concerns, located(path))
        pushed = replace(pushed, warnings=tuple(f"licences: {each}" for each in concerns))
        _refuse(pushed, overwrite)
        return replace(pushed, dry=True) if dry_run else _sent(pushed, payload, remote, words, private, tag)


def push_placed(folder: Path, placed: Mapping[str, Placed], remote: Remote, overwrite: bool) -> Pushed:
    """Push an output whose weight files have already been uploaded. Each weight file in `folder` has only its header.

    Args:
        folder: the local folder of the output. The model card is generated from the headers of the weight files.
        placed: the uploaded weight files, keyed by their names in the folder.
        remote: the remote whose `begin` was called before the uploads.
        overwrite: replace existing files that have other content.

    Raises:
        Corrupt: the hub no longer has an uploaded file.
        AdapterkitError: as for `push`.
    """
    there = remote.there()
    card = card_there(remote, there)
    files = {name: placed.get(name, path) for name, path in files_of(folder).items()}
    payload = payload_of(folder, files, remote, licence_at(folder) or licence_of(card))
    pushed = _compared(payload, there, remote, is_generated(card))
    _refuse(pushed, overwrite)
    return _sent(pushed, payload, remote, f"Push {folder.name} with adapterkit", private=False, tag=None)


OUTPUT = "the model or adapter to push"
"""Licence errors call the pushed files by this name."""


def _licences(
    source: Path, stated: Licence, card: str, base: str | os.PathLike[str] | None
) -> tuple[list[Part], Licence, tuple[str, ...]]:
    """Return the licences of the base and the adapters, and the output's own licence.

    Also return one sentence for each problem with these licences.

    The output's own licence is `stated`. If `stated` is empty, the licence in the card at `source` is used, or else the
    licence in `card`, which is the card on the hub. The folder of a merged model contains a copy of the base's card. So
    if `stated` is empty, a merged model has the licence of its base.
    """
    record = record_at(source)
    parts = parts_of(record) if record else []
    if base is not None:
        parts = [*parts, (BASE, licence_at(located(base)))]
    shown = stated or licence_at(source) or licence_of(card)
    return parts, shown, tuple(dict.fromkeys((*passed_over(shown, parts), *conflicts(parts))))


def _sent(pushed: Pushed, payload: Payload, remote: Remote, message: str, private: bool, tag: str | None) -> Pushed:
    """Make a commit if the push changes any file, then set the tag if there is one."""
    changed = [*pushed.added, *pushed.replaced]
    if changed or pushed.removed:
        commit = remote.send(payload.files, changed, payload.digests(), message, private)
        # Use a new remote for this check: `remote` has cached the listing from before the push.
        check_listed(remote_at(remote.uri.at(commit), remote.token), payload.digests())
    else:
        commit = remote.kept()
    if tag is not None:
        remote.tagged(tag, commit)
    return replace(pushed, uri=str(remote.uri.at(commit)), commit=commit, tag=tag)


def _compared(payload: Payload, there: Mapping[str, RemoteFile] | None, remote: Remote, generated: bool) -> Pushed:
    """Compare the files of a push with the files on the hub; return which files the push will add, replace or remove.

    If the hub already has a card, the generated card is left out, because a person may have edited the card on the hub.
    There are two exceptions:

    - The card on the hub is an unedited generated card, and the push also replaces other files.
    - The push replaces the whole artifact.
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
        cure = "Push to another repository, branch or folder, or pass --overwrite (in Python overwrite=True)"
        raise StorageError(f"the hub already has these files with other content: {names}", path=pushed.uri, cure=cure)


# Write to a hub: build the output in a local folder, push it when it is complete, then delete the folder.


def begun(name: str, kind: str) -> tuple[Remote, Path]:
    """Return the remote of the target on a hub, and the local folder to build the output in.

    Args:
        name: the uri of the output.
        kind: the subfolder of the cache in which the local folder is created. The local folder's name is a hash of the
            uri, so a second run of the same command finds the folder of an interrupted run.

    Raises:
        AdapterkitError: as for `push`. If the hub cannot be read, or does not accept pushes, the error is raised before
            anything is written.
    """
    uri = parse(name)
    remote = remote_at(uri)
    remote.check_writable()
    # List the files on the hub now: if the hub returns an error, fail before hours of work and not after.
    _ = remote.there()
    folder = cache_folder() / kind / hashlib.sha256(str(uri).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    return remote, folder


@checks_types
@contextmanager
def outgoing(
    name: str,
    overwrite: bool = False,
    sources: Sequence[str | PathLike[str]] = (),
    unchanged: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Yield a local path to write to. If the block ends without an error, push the files at this path.

    After an error, the local folder is kept, so that a second run of the same command can continue. There is one
    exception: if the push fails because the hub already has other content, the folder is removed.

    Args:
        name: the uri to push to.
        overwrite: replace existing files.
        sources: the adapters and the base. If all their cards name the same licence, the output's card gets this
            licence.
        unchanged: a function to call if nothing was pushed, because the hub already had all files.

    Raises:
        AdapterkitError: as for `push`. If the hub cannot be read, or does not accept pushes, the error is raised before
            anything is written.
    """
    remote, folder = begun(name, "outgoing")
    uri = remote.uri
    out = folder / "out"
    yield out
    try:
        pushed = push(out, uri, overwrite=overwrite, licence=_licence([*map(located, sources)]))
    except StorageError as error:
        if error.path == str(uri):
            # Remove the folder: the hub has other content, and a run that continued from this folder would raise the
            # same error.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    if not (pushed.added or pushed.replaced or pushed.removed):
        unchanged()


def _licence(sources: Sequence[Path]) -> Licence:
    """Return the licence that all sources share; empty if the licences differ, or if a source has no licence."""
    licences = [licence_at(source) for source in sources]
    return licences[0] if licences and all(licence == licences[0] for licence in licences) else {}


# Write to a hub from many machines. Each machine uploads whole weight files. At the end, one process (the driver) makes
# all uploaded files visible.
#
# The driver does not have the weights. It builds the output in a local folder, in which each weight file is a sketch: a
# sparse file with the real header. Each upload of a weight file returns a `Placed`, which the driver saves as a small
# JSON file next to the local folder. If the driver is killed, a second run of the same command reads these JSON files
# and continues.


SKETCHED = (".safetensors", ".gguf")


class IncrementalPush:
    """An output whose weight files are uploaded to a hub one by one; at the end, all of them become visible together.

    Attributes:
        path: the local folder with the sketches and all other files.
        uri: the uri of the output, to which weight files are uploaded.
    """

    def __init__(self, remote: Remote, folder: Path, overwrite: bool) -> None:
        self.remote, self.folder, self.overwrite = remote, folder, overwrite
        self.path, self.uri = folder / "out", str(remote.uri)
        self.notes = folder / "placed"

    def begin(self, names: Iterable[str]) -> None:
        """Reserve the target on the hub. Call this before the files in `names` are uploaded.

        Args:
            names: the names of the weight files that will be uploaded.

        Raises:
            StorageError: the hub already has files that a push would replace or remove, and `overwrite` is not set.
            NetworkError: access is denied, or the hub is not reachable.
        """
        there = self.remote.there() or {}
        met = sorted(there if self.remote.whole else {self._inside(name) for name in names} & there.keys())
        if met and not self.overwrite:
            # Check for existing files now, not only in `push`: on a hub without commits, each upload replaces the
            # existing file at once.
            shown = ", ".join(met[:5]) + (", ..." if len(met) > 5 else "")
            cure = "Write to another repository, branch or folder, or pass --overwrite (in Python overwrite=True)"
            raise StorageError(f"the hub already has these files: {shown}", path=self.uri, cure=cure)
        self.remote.begin()

    def took(self, name: str, placed: object) -> None:
        """Record on disk that a weight file was uploaded."""
        assert isinstance(placed, Placed)
        self._note(name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self._note(name), json.dumps(asdict(placed)).encode())

    def holds(self, name: str) -> bool:
        """Whether a weight file was uploaded and the hub still has it."""
        placed = self._placed(name)
        return placed is not None and self.remote.holds(placed)

    def forget(self, names: Iterable[str]) -> None:
        """Remove the records of weight files that will be uploaded again."""
        for name in names:
            self._note(name).unlink(missing_ok=True)

    def check(self) -> None:
        """If the hub has lost an uploaded file, delete the local folder of the output, so that the merge runs again."""
        if self.path.exists() and not all(self.holds(name) for name in self._sketches()):
            shutil.rmtree(self.path)

    def push(self) -> bool:
        """Make the output visible; return whether any file on the hub changed.

        Raises:
            Corrupt: the hub no longer has an uploaded file.
            AdapterkitError: as for `push`.
        """
        placed_or_none = {name: self._placed(name) for name in self._sketches()}
        placed = {name: each for name, each in placed_or_none.items() if each is not None}
        if missing := sorted(placed_or_none.keys() - placed.keys()):
            raise lost(self.uri, missing[0])
        pushed = push_placed(self.path, placed, self.remote, self.overwrite)
        return bool(pushed.added or pushed.replaced or pushed.removed)

    def _sketches(self) -> list[str]:
        return [file.name for file in sorted(self.path.iterdir()) if file.suffix in SKETCHED]

    def _inside(self, name: str) -> str:
        """Return a file's path in the repository."""
        path = self.remote.uri.path
        return f"{path}/{name}" if path else name

    def _note(self, name: str) -> Path:
        return self.notes / f"{name}.json"

    def _placed(self, name: str) -> Placed | None:
        try:
            note = load_json(self._note(name).read_text("utf-8"))
            size, sha256, git = note["digests"]
            return Placed(str(note["path"]), (int(size), str(sha256), str(git)), str(note["mark"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None


@checks_types
@contextmanager
def placing(
    name: str, overwrite: bool = False, unchanged: Callable[[], object] = lambda: None
) -> Iterator[IncrementalPush]:
    """Yield an output whose weight files are uploaded one by one; when the block ends, make the output visible.

    The local folder with the sketches is kept, so that a second run of the same command detects that the output is
    already finished.

    Args:
        name: the uri of the output.
        overwrite: replace existing files.
        unchanged: a function to call if nothing was pushed, because the hub already had all files.

    Raises:
        AdapterkitError: as for `push`. If the hub cannot be read, or does not accept pushes, the error is raised before
            anything is written.
    """
    remote, folder = begun(name, "placing")
    place = IncrementalPush(remote, folder, overwrite)
    try:
        place.check()
    except OSError as error:
        raise storage_error(error, folder) from error
    yield place
    if not place.push():
        unchanged()


@checks_types
def put(uri: str, name: str, file: Path) -> Placed:
    """Upload one weight file of an output. The file becomes visible later, when another process pushes the output.

    Args:
        uri: the output's uri.
        name: the name of the weight file in the output.
        file: the local file.

    Raises:
        NetworkError: access is denied, or the hub is not reachable.
        Corrupt: the hub received bytes that differ from the local file.
    """
    remote = remote_at(parse(uri))
    path = f"{remote.uri.path}/{name}" if remote.uri.path else name
    return remote.place(path, file, digests(file))
