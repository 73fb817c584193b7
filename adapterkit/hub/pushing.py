"""Push an adapter or a model to a hub in one commit; build outputs for a hub in a local folder first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.licence_terms import (
    BASE,
    MAX_CARD,
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
from ..errors import RemoteNotFound, StorageError, UnknownFormat, UsageError, storage_error
from ..io.atomic import write_bytes
from ..io.locations import check_exists, located, source_of
from ..merging.companions import CARD, REPORT
from .card import CardModel, adapter_card, is_generated, model_card
from .folders import cache_folder, scratch
from .hubs import parse, remote_at
from .remote import Content, Digests, Remote, RemoteFile
from .transfer import check_listed, digests, digests_of, read_range
from .uris import Uri, check_names

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Pushed:
    """The result of a push, or of a dry run.

    Attributes:
        uri: the pushed uri, pinned to the new commit; not pinned if nothing was written.
        commit: the commit; None if nothing was written.
        created: True if the repository was (or would be) created.
        added, replaced, unchanged, removed: names of files in the repository. Files are removed only on hubs where a
            push replaces the whole artifact.
        card: the text of the generated card; None if an existing card was kept.
        tag: the tag that was set.
        dry: True if nothing was written.
        warnings: requirements of the base's and the adapters' licences that the card's licence omits.
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
        """Return the result as plain data."""
        return {
            "uri": self.uri, "commit": self.commit, "created": self.created, "added": list(self.added),
            "replaced": list(self.replaced), "unchanged": list(self.unchanged), "removed": list(self.removed),
            "card": self.card, "tag": self.tag, "dry_run": self.dry,
            "warnings": list(self.warnings),
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
    strict_licence: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Push an adapter, or a folder of weights, in one commit.

    If somebody else pushes at the same time, the push fails instead of mixing both pushes. A missing repository or
    branch is created.

    A model card is generated if neither the local folder nor the hub has a README.md. Two kinds of README.md do not
    count: the base's card that a merge copied along, and a generated card on the hub whose files are replaced now.

    Args:
        path: an adapter in any format, or a base: a file, a folder or a uri. Hidden files are not pushed.
        uri: `hf://org/repo[@branch][/folder]`, `oci://registry/name:tag`, or a uri of another hub.
        format: convert the adapter to this format; if absent, push its files unchanged.
        base: the base, if writing that format needs it.
        on_loss: as for `adapterkit.write`.
        shard_size: largest weight file of a model, in bytes; larger files are split during the push. If absent, the
            files are pushed unchanged.
        private: create a missing repository as private.
        tag: set this tag on the commit.
        message: the commit message.
        licence: the licence for the generated card: an identifier such as `apache-2.0`, or a mapping of `license`,
            `license_name` and `license_link`. If absent, the licence of the card at `path`.
        strict_licence: refuse a card that leaves out what the licences of base and adapters ask, licences that
            contradict each other, and parts whose licence is not known; the former are warnings otherwise.
        overwrite: replace existing files of other content; without it they are an error.
        dry_run: compare, and write nothing.
        token: a token; if absent, the token that the hub's own tools use.

    Raises:
        NetworkError: access is denied, somebody else pushed, or the hub is not reachable.
        StorageError: the hub has files with these names and other content.
        UnknownFormat: `path` is neither an adapter nor a base.
        UsageError: `shard_size` is given for an adapter, which is one file.
        Corrupt: the hub does not list what was pushed.
        CheckFailed: `strict_licence`, and licences contradict each other or are not known.
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
        parts, shown, told = _licences(source, licence_called(licence), card, base)
        if strict_licence:
            check_licences([(OUTPUT, shown), *parts], told, located(path))
        pushed = replace(pushed, warnings=tuple(f"licences: {each}" for each in told))
        _refuse(pushed, overwrite)
        return replace(pushed, dry=True) if dry_run else _sent(pushed, payload, remote, words, private, tag)


OUTPUT = "what is pushed"
"""Name of the output among the parts whose licences are checked."""


def _licences(
    source: Path, stated: Licence, card: str, base: str | os.PathLike[str] | None
) -> tuple[list[Part], Licence, tuple[str, ...]]:
    """Return the parts of an output, the licence that its readers will see, and where these contradict each other.

    A merged model without its own licence has the base's card until it is pushed, so then the base's licence counts.
    """
    record = record_at(source)
    parts = parts_of(record) if record else []
    if base is not None:
        parts = [*parts, (BASE, licence_at(located(base)))]
    shown = stated or licence_at(source) or licence_of(card)
    return parts, shown, tuple(dict.fromkeys((*passed_over(shown, parts), *conflicts(parts))))


def _sent(pushed: Pushed, payload: Payload, remote: Remote, message: str, private: bool, tag: str | None) -> Pushed:
    """Make the commit, if anything changes, and set the tag."""
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
    """Return what a push would do.

    An existing card is kept, because people edit it. A generated card is replaced whenever the files it describes are.
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


@contextmanager
def outgoing(
    name: str,
    overwrite: bool = False,
    sources: Sequence[str | PathLike[str]] = (),
    unchanged: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Yield a local path to write to; push its content when the block ends without an error.

    After an error, the folder stays, and the same command continues with it.

    Args:
        name: the uri to push to.
        overwrite: replace existing files.
        sources: the inputs of the output; if all their cards name the same licence, the output's card does too.
        unchanged: a function to call if the hub already had everything, so that nothing was pushed.

    Raises:
        AdapterkitError: as for `push`; a missing permission is reported before anything is written.
    """
    uri = parse(name)
    remote = remote_at(uri)
    remote.check_writable()
    # Look at the target now, so that a refusal comes before the work, not after hours of it.
    _ = remote.there()
    # Derive the name from the uri, so that the same command finds the folder of an interrupted run.
    folder = cache_folder() / "outgoing" / hashlib.sha256(str(uri).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    out = folder / "out"
    yield out
    try:
        pushed = push(out, uri, overwrite=overwrite, licence=_licence([*map(located, sources)]))
    except StorageError as error:
        if error.path == str(uri):
            # Remove the folder: the hub holds other content, and continuing from here would meet the same error again.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    if not (pushed.added or pushed.replaced or pushed.removed):
        unchanged()


def _licence(sources: Sequence[Path]) -> Licence:
    """Return the licence of all sources; empty if one has none or they differ, because then a person must choose."""
    found = [licence_at(source) for source in sources]
    return found[0] if found and all(licence == found[0] for licence in found) else {}


# Collect the files of a push, and find out where a local model came from.


def is_of_the_base(folder: Path) -> bool:
    """Whether the card in a folder is the base's card, copied by a merge and not edited since."""
    card = folder / CARD
    if not card.is_file():
        return False
    told = record_at(folder).get("base_card")
    return told is not None and told == digests(card)[1]


def model_at(path: Path) -> CardModel:
    """Return the known facts about the model at a path.

    Raises:
        UnknownFormat: the path is not a model.
    """
    from ..io.checkpoint import open_checkpoint

    try:
        found = open_checkpoint(path)
    except UsageError as error:
        cure = "Name an adapter, or a folder of weights"
        raise UnknownFormat(f"this is neither an adapter nor a base: {error.why}", path=path, cure=cure) from None
    record = record_at(found.folder)
    adapters = _adapters(record)
    base, revision = _base_of(record, found.folder, adapters)
    return CardModel(base, revision, adapters, found.config or {})


def record_at(folder: Path) -> Mapping[str, object]:
    """Return the report that a merge wrote into a folder; empty if it has none."""
    from ..io.checkpoint import read_json

    return read_json(folder / REPORT) if (folder / REPORT).is_file() else {}


def _adapters(record: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    told = record.get("adapters")
    return tuple(a for a in told if isinstance(a, dict)) if isinstance(told, list) else ()


def _base_of(
    record: Mapping[str, object], folder: Path, adapters: tuple[Mapping[str, object], ...]
) -> tuple[str | None, str | None]:
    """Return the base's name and commit: from its download source, else from the adapters if all of them agree."""
    told = record.get("base_uri")
    if isinstance(told, str):
        uri = parse(told)
        return uri.name, uri.revision
    if not adapters:
        origin = source_of(folder)
        return (origin.repo, origin.commit) if origin else (None, None)
    made_for = {str(adapter.get("base")) for adapter in adapters if adapter.get("base")}
    return (made_for.pop() if len(made_for) == 1 else None), None


# Collect the files of a push: an adapter or model, converted or resharded on request, and a model card.


@dataclass(slots=True)
class Payload:
    """Files to push, by name in the repository: local paths, or the text of the generated card (`card_name`)."""

    files: dict[str, Content]
    card_name: str
    card: str | None = None
    found: dict[str, Digests] = field(default_factory=dict)

    def digests(self) -> dict[str, Digests]:
        for name, content in self.files.items():
            if name not in self.found:
                self.found[name] = digests_of(content)
        return {name: self.found[name] for name in self.files}

    def leave_card_out(self) -> None:
        """Remove the generated card from the push."""
        del self.files[self.card_name]
        self.card = None


@contextmanager
def prepared(
    path: str | os.PathLike[str], name: str | None, base: str | os.PathLike[str] | None, on_loss: str,
    shard_size: int | None,
) -> Iterator[tuple[Path, dict[str, Path]]]:  # fmt: skip
    """Yield the folder with the files to push, and the files by name. Converted files are in a scratch folder.

    Args:
        path: an adapter or a model.
        name: the format to convert an adapter to; None to push it unchanged.
        base: as for `adapterkit.write`.
        on_loss: as for `adapterkit.write`.
        shard_size: largest weight file of a model, in bytes; None to push the files unchanged.

    Raises:
        UsageError: `shard_size` is given for an adapter.
        AdapterkitError: as for `adapterkit.read` and `adapterkit.write`.
    """
    if name is not None and shard_size is not None:
        raise UsageError("an adapter cannot be split into shards", path=path, cure=_WHOLE)
    here = located(path)
    if name is None and shard_size is None:
        yield here, files_of(here)
        return
    with scratch() as folder:
        if shard_size is not None:
            yield here, _parted(here, folder, shard_size)
        else:
            out = _converted(path, folder, str(name), base, on_loss)
            yield out, files_of(out)


def payload_of(source: Path, files: Mapping[str, Path], remote: Remote, licence: Licence) -> Payload:
    """Return the files, with a generated card for the repository's root if they include none."""
    # Generate a new card if the only one is the base's, which a merge copied along.
    own = {name: path for name, path in files.items() if name != CARD or not is_of_the_base(source)}
    check_names(own)
    text, target = _card(source, remote.uri, licence), remote.uri
    prefix = f"{target.path}/" if target.path else ""
    payload = Payload({f"{prefix}{name}": path for name, path in own.items()}, _card_name(remote))
    if CARD not in own and (not prefix or remote.cards_below):
        payload.card, payload.files[payload.card_name] = text, text.encode()
    return payload


def card_there(remote: Remote, there: Mapping[str, RemoteFile] | None) -> str:
    """Return the text of the card that the push would replace; empty if it is missing, too large or not text."""
    file = (there or {}).get(_card_name(remote))
    if file is None or file.size > MAX_CARD:
        return ""
    try:
        return read_range(remote, file, 0, file.size).decode()
    except (RemoteNotFound, ValueError):
        # The card may not exist: a new branch lists the files of the main branch, and an S3 list may name files that
        # were never uploaded.
        return ""


def _card_name(remote: Remote) -> str:
    """Return the path where a hub looks for the card."""
    return f"{remote.uri.path}/{CARD}" if remote.cards_below and remote.uri.path else CARD


def files_of(source: Path) -> dict[str, Path]:
    """Return the files to push from a file or a folder; hidden names and links to folders are omitted."""
    check_exists(source)
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


def _converted(
    path: str | os.PathLike[str], folder: Path, name: str, base: str | os.PathLike[str] | None, on_loss: str
) -> Path:
    """Convert the adapter to another format and return its folder."""
    from ..formats import FORMATS, read
    from ..writing import write

    out = folder / "adapter"
    out.mkdir()
    write(read(path, base=base), out / FORMATS[name].file, name, base, on_loss)
    return out


def _parted(source: Path, folder: Path, shard_size: int) -> dict[str, Path]:
    """Return a model's files with its weights split into shards of at most `shard_size` bytes, and a new index."""
    from ..io.checkpoint import INDEX, TORCH_INDEX, open_checkpoint
    from ..merging.options import MergeOptions
    from ..merging.planning import index_of, make_plan
    from ..merging.report import local, run_plan

    _check_model(source)
    files, base = files_of(source), open_checkpoint(source)
    # Merge without adapters: this copies the tensors unchanged and writes shards of the given size.
    plan = make_plan(base, [], MergeOptions(shard_size=shard_size))
    if all(file.stat().st_size <= shard_size for file in base.files):
        return files
    out = folder / "model"
    run_plan(plan, out, local("cpu"), None, time.perf_counter(), overwrite=False)
    made, index = {file.name: out / file.name for file in plan.files}, index_of(plan)
    if index is not None:
        made[INDEX] = out / INDEX
        write_bytes(out / INDEX, index)
    old = {INDEX, TORCH_INDEX, *(file.name for file in base.files)}
    return {name: path for name, path in files.items() if name not in old} | made | _without_sums(source, folder)


def _check_model(source: Path) -> None:
    from ..formats import detect

    try:
        found = detect(source)
    except UnknownFormat:
        return
    raise UsageError(f"the adapter ({found}) cannot be split into shards", path=source, cure=_WHOLE)


def _without_sums(source: Path, folder: Path) -> dict[str, Path]:
    """Return a merge's report without its checksums, which belong to the files before resharding."""
    from ..merging.checksums import KEY

    record = record_at(source)
    if KEY not in record:
        return {}
    told = {key: value for key, value in record.items() if key != KEY}
    write_bytes(folder / REPORT, (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())
    return {REPORT: folder / REPORT}


def _card(source: Path, target: Uri, licence: Licence) -> str:
    """Return the card. Reading the source for it also proves that the source is an adapter or a base."""
    from ..formats import detect, read

    name = (target.path or target.repo).rpartition("/")[2]
    try:
        source_format = detect(source)
    except UnknownFormat:
        return model_card(name, target, model_at(source), licence)
    return adapter_card(read(source, source_format), name, source_format, target, licence)


_WHOLE = "Omit --shard-size (shard_size=): no tool reads an adapter in several files"
