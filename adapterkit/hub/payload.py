"""Collect the files of a push, and find the hub repository from which a local model was downloaded."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..core.licence_terms import MAX_CARD, Licence
from ..errors import RemoteNotFound, UnknownFormat, UsageError
from ..io.atomic import write_bytes
from ..io.locations import check_exists, located, source_of
from ..merging.companions import CARD, REPORT
from .card import CardModel, adapter_card, model_card
from .folders import scratch
from .hubs import parse
from .remote import Content, Digests, Remote, RemoteFile
from .transfer import digests, digests_of, read_range
from .uris import Uri, check_names


def is_of_the_base(folder: Path) -> bool:
    """Whether the card in a folder is the base's card, which a merge copied and nobody has edited."""
    card = folder / CARD
    if not card.is_file():
        return False
    told = record_at(folder).get("base_card")
    return told is not None and told == digests(card)[1]


def model_at(path: Path) -> CardModel:
    """Return the values that a card shows about the model at a path.

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
    """Return the base's name and commit: from its download record, or from the adapters if all name the same base."""
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
    """The files to push, by name in the repository: a local path each, or the text of the generated card."""

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
    """Yield the folder with the files to push, and the files by name. Converted files are in a temporary folder.

    Args:
        path: an adapter or a model.
        name: the format to convert an adapter to; None to push it unchanged.
        base: as for `adapterkit.write`.
        on_loss: as for `adapterkit.write`.
        shard_size: largest weight file of a model, in bytes; None to push the files unchanged.

    Raises:
        UsageError: `shard_size` is set, but `path` is an adapter.
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


def payload_of(source: Path, files: Mapping[str, Content], remote: Remote, licence: Licence) -> Payload:
    """Return the files. If they have no card, and the hub shows a card at this path, add a generated card."""
    # Replace the base's card, which a merge copied, by a generated card.
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
    # Run a merge without adapters: it copies the tensors unchanged, and writes shards of at most `shard_size` bytes.
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
    """Return a merge's report without checksums, which become wrong when the files are resharded."""
    from ..merging.checksums import KEY

    record = record_at(source)
    if KEY not in record:
        return {}
    told = {key: value for key, value in record.items() if key != KEY}
    write_bytes(folder / REPORT, (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())
    return {REPORT: folder / REPORT}


def _card(source: Path, target: Uri, licence: Licence) -> str:
    """Return the text of the generated card. An error is raised if the source is neither an adapter nor a base."""
    from ..formats import detect, read

    name = (target.path or target.repo).rpartition("/")[2]
    try:
        source_format = detect(source)
    except UnknownFormat:
        return model_card(name, target, model_at(source), licence)
    return adapter_card(read(source, source_format), name, source_format, target, licence)


_WHOLE = "Omit --shard-size (shard_size=): no tool reads an adapter in several files"
