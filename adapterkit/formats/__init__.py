"""Read, write and detect adapters in any format. Each format is one module, found by its file name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..core.collection import collection_off
from ..core.registry import Registry
from ..errors import (  # fmt: skip
    AdapterkitError,
    StorageError,
    UnknownFormat,
    UsageError,
    public,
    storage_error,
)
from ..io.checkpoint import SINGLE, TORCH_SINGLE, Checkpoint, opened
from ..io.inputs import inputs_kept, kept
from ..io.lazy import Lazy
from ..io.locations import NOTE, check_exists, exists, is_address, is_remote, local, located, path_text, source_of
from ..io.staging import files_below, matches, staged
from ..io.written import sources_remembered
from ._endings import adapter_modules
from ._format import ON_LOSS, TENSORS, UNKNOWN, Format

if TYPE_CHECKING:
    from ..core.adapter import Adapter

__all__ = ["FORMATS", "Format", "detect", "outline", "read", "recognised", "save"]

MEMBER = "adapter_config.json"
"""The file that marks a subfolder as an adapter of its own."""

FORMATS: Registry[type[Format]] = Registry("format", __name__, "adapterkit.formats", Format)


@inputs_kept()
def detect(path: str | PathLike[str]) -> str:
    """Return the name of the one format whose headers are at `path`, or in the only file of tensors of a folder.

    Raises:
        StorageError: nothing is there.
        UnknownFormat: no format recognises it, or several do; the error names the candidates.
    """
    return _only(_searched(path, FORMATS)[1], path)


class ReadOptions(TypedDict, total=False):
    """Further arguments of `read`, which functions that read an adapter pass on."""

    alpha: float | None
    rank: int | None
    strict: bool
    experts_order: str | None
    strict_base: bool
    family: str | None


@inputs_kept()
@collection_off()
def read(
    path: str | PathLike[str],
    format: str | None = None,  # noqa: A002 - the public contract's word
    base: Checkpoint | str | PathLike[str] | None = None,
    *,
    compat: str | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    strict: bool = False,
    experts_order: str | None = None,
    strict_base: bool = False,
    family: str | None = None,
) -> Adapter:
    """Read an adapter in any format, lazily, and validate it.

    Args:
        path: a file or folder, or a place on a hub: `hf://org/repo[@revision][/path]`, `org/repo`. `PATH#name` means
            the adapter in the subfolder `name`.
        format: its format; None detects it from the headers.
        base: the base, for formats that need one to resolve names.
        compat: `"formula"` reads the paper's formula even if the tool that trained the adapter computed another. Some
            formats have further readings, for files that do not say which of two contents they hold.
        alpha: LoRA's alpha, for a file that does not state it.
        rank: the expected rank; the file has the rank, and a different one is an error.
        strict: refuse every setting that the format does not have, even harmless ones.
        experts_order: the layout of stacked experts' factors, if the file and the base do not tell: `"rank_major"`
            (PEFT), `"grouped_by_expert"` (Unsloth before September 2026), `"peft_0.18"` (lora_A has the outputs).
            Files of a format without stacked experts are read as they are.
        strict_base: refuse a base whose name, config or fingerprint differs from the one that the adapter names.
        family: the family of the image, video or audio model, such as `"flux"`, for a file whose names fit several.

    Returns:
        the adapter; if it came from a hub, its lineage says so, with the commit.

    Raises:
        AdapterkitError: see `Format.read`.
        CheckFailed: with `strict_base`, the base is not the one that the adapter names.
        UsageError: `strict_base` without a base.
    """
    source, found, member = _searched(path, FORMATS if format is None else [format])
    if base is not None and not found:
        _check_order(path, base)
    name = _only(found, path) if format is None else format
    reader = FORMATS[name]()
    options = {"alpha": alpha, "rank": rank, "strict": strict or None, "family": family}
    options = {option: value for option, value in options.items() if value is not None}
    needless = next((option for option in options if option not in reader.options), None)
    if needless is not None:
        raise UsageError(
            f"{name} is read without --{needless} ({needless}=)", path=path, cure="Leave it out: the file tells all"
        )
    if compat is not None and compat not in reader.compat | reader.experts_orders:
        known = ", ".join(sorted(reader.compat)) or "none"
        cure = f"Known: {known}. Without compat=/--compat a file means what its trainer computed"
        raise UsageError(f"{name} has no compat {compat!r}", path=path, cure=cure)
    if experts_order is not None:
        compat = _with_order(compat, experts_order, reader)
    checkpoint = None if base is None else opened(base)
    try:
        adapter = _sourced(reader.read(source, compat=compat, base=checkpoint, **options), source, checkpoint)
        if member is not None:
            adapter = _as_member(adapter, member)
        adapter.validate()
        if strict_base:
            from ..naming.binding.bases import check_base  # Detection needs no binding.

            check_base([(str(path), adapter)], checkpoint, strict=True)
        if compat is not None and adapter.recipe and adapter.recipe[-1].op == "read":
            last = adapter.recipe[-1]
            adapter = adapter.replace(
                recipe=(*adapter.recipe[:-1], replace(last, args={**last.args, "compat": compat}))
            )
    except AdapterkitError as error:
        # A reader names the file if it knows a more exact one than the given path.
        raise error.at(path=path) from None
    return adapter


@inputs_kept()
def outline(path: str | PathLike[str], format: str) -> Adapter:  # noqa: A002 - the public contract's word
    """Read targets and shapes of an adapter whose values need a base; see `Format.outline`.

    Raises:
        AdapterkitError: see `Format.outline`.
    """
    source, _, _ = _searched(path, [format])
    try:
        adapter = FORMATS[format]().outline(source)
        adapter.validate()
    except AdapterkitError as error:
        raise error.at(path=path) from None
    return adapter


def _with_order(compat: str | None, order: str, reader: Format) -> str | None:
    """Return the reading that `experts_order` selects; a format without such a choice keeps its own."""
    known = FORMATS["peft"].experts_orders
    if order not in known:
        raise UsageError(f"unknown experts_order {order!r}", cure=f"Known: {', '.join(sorted(known))}")
    if not reader.experts_orders:
        return compat
    if compat is not None:
        raise UsageError("compat and experts_order together", cure="Leave --compat (compat=) out")
    return order


def save(
    adapter: Adapter,
    path: str | PathLike[str],
    format: str = "adapterkit",  # noqa: A002 - the public contract's word
    base: Checkpoint | str | PathLike[str] | None = None,
    on_loss: str = "refuse",
    *,
    profile: str | None = None,
    overwrite: bool = True,
    made_from: str | None = None,
) -> list[str]:
    """Write an adapter with the methods that it has; `adapterkit.write` also promotes what the format cannot express.

    The output is staged beside `path` and renamed into place when it is complete, in every format: after an error
    `path` is unchanged. If `path` is a folder with an adapter, the files that the format owns are replaced and all
    others stay. Before the rename, the output is read back and compared with the adapter.

    Args and errors are those of `adapterkit.write`. Returns what was left out or rewritten, a line each.
    """
    from ..core.adapter import check_adapter
    from ._proof import prove

    check_adapter(adapter)
    if on_loss not in ON_LOSS:
        raise UsageError(f"unknown on_loss {on_loss!r}", cure=f"Known: {', '.join(ON_LOSS)}")
    writer = FORMATS[format]()
    adapter.validate()
    if profile is not None and profile not in writer.profiles:
        known = ", ".join(sorted(writer.profiles)) or "none"
        raise UsageError(f"{format} has no profile {profile!r}", path=path, cure=f"Known: {known}")
    below = None if base is None else opened(base)
    fitted, lines = (adapter, []) if profile is None else writer.fit(adapter, profile, on_loss=on_loss, base=below)
    inputs = [*files_of(adapter), *(() if below is None else below.files)]
    with (
        staged(
            Path(path_text(path)), overwrite=overwrite, owns=writer.owns | {NOTE}, inputs=inputs, made_from=made_from
        ) as stage,
        sources_remembered() as files,
    ):
        lines += writer.write(_in_methods_of(writer, fitted, below), stage, on_loss=on_loss, base=below)
        prove(format, writer, adapter, stage, lines, below, files)
    return lines


def _in_methods_of(writer: Format, adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Replace methods that the format lacks by equal ones without a bias, if the base has no bias there."""
    from ..naming.binding.fitting import biasless

    if base is None or all(update.method in writer.methods for _, update in adapter):
        return adapter
    return adapter.replace(
        updates={
            target: tuple(
                update if update.method in writer.methods or not biasless(base, target.path) else update.without_bias()
                for update in updates
            )
            for target, updates in adapter.updates.items()
        }
    )


def files_of(adapter: Adapter) -> set[Path]:
    """Return the files that tensors of an adapter are still to be read from."""
    leaves = [leaf for _, update in adapter for leaf in update.tensors.values()]
    leaves += [] if adapter.foreign is None else adapter.foreign.tensors.values()
    spans = [leaf.span for leaf in leaves if isinstance(leaf, Lazy)]
    return {Path(span.path) for span in spans if span is not None}


def files_read(source: str | PathLike[str]) -> list[Path]:
    """List the local files that reading an adapter or a base can touch; for a place on a hub, none.

    In a folder these are the files of tensors and the files that some format or a base keeps beside them.
    """
    if is_remote(source):
        return []
    path = local(source)
    named = [*chain.from_iterable(FORMATS[name].owns for name in FORMATS), "config.json", "*.index.json"]
    if path.is_dir():
        tensors = [f"*{suffix}" for suffix in TENSORS]
        return [f for f in files_below(path) if matches(f.name, [*named, *tensors]) and f.is_file()]
    # Beside a graph, no format keeps anything that is read with it.
    beside = sorted(path.parent.iterdir()) if path.is_file() and path.suffix.lower() != ".onnx" else ()
    return [f for f in (path, *(other for other in beside if matches(other.name, named))) if f.is_file()]


@inputs_kept()
def recognised(path: str | PathLike[str]) -> tuple[str, ...]:
    """List all formats whose headers are at `path`, or in the only file of tensors of a folder.

    Raises:
        StorageError: nothing is there.
        UnknownFormat: the folder holds several named adapters in subfolders; the error lists them.
    """
    return tuple(_searched(path, FORMATS)[1])


def _only(found: Sequence[str], path: str | PathLike[str]) -> str:
    """Return the one format that was found at a path; raise if there is none or more than one."""
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownFormat(f"could be {' or '.join(found)}", path=path, cure="Say which with format=/--from")
    from ._image import container
    from ._others import other_file

    source = _existing(path)
    other = other_file(container.names(source))
    if other is not None:
        kind, key = other
        raise UnknownFormat(f"{kind.name}, which is not read: {kind.why}", path=path, where=key, cure=kind.cure)
    module = next(iter(adapter_modules(source)), None)
    if module is not None:
        why = "its keys end as an adapter's do, but no family that is known has all of its modules"
        cure = "Name its format and the base, whose modules decide: --from and --base (format=, base=)"
        raise UnknownFormat(why, path=path, where=module, cure=cure)
    cure = f"Tried: {', '.join(FORMATS)}"
    if is_model(source):
        name = public(os.fspath(path))
        cure = (
            f"It is a whole model. Make an adapter of what it changed: adapterkit extract {name} --base BASE "
            "(base=) --rank 64 (rank=) -o ADAPTER, and name that"
        )
    raise UnknownFormat("not an adapter in any known format", path=path, cure=cure)


def is_model(source: str | PathLike[str]) -> bool:
    """Whether a path is a base or a tuned model: it has weights that are no adapter's."""
    if is_address(source):
        return False
    try:
        return bool(opened(source).tensors)
    except AdapterkitError:
        return False


def _check_order(path: str | PathLike[str], base: Checkpoint | str | PathLike[str]) -> None:
    """Refuse an adapter in the place of the base, in words that say so.

    Raises:
        UsageError: the base is an adapter, and what should be one is a model.
    """
    place = base.root if isinstance(base, Checkpoint) else base
    if is_remote(place) or not is_model(path) or not recognised(place):
        return
    first, second = public(str(place)), public(os.fspath(path))
    cure = f"Swap them: BASE comes first, then its adapters: {second} {first}"
    raise UsageError(f"{first} is an adapter, and {second} is none", cure=cure)


def _searched(path: str | PathLike[str], names: Iterable[str]) -> tuple[Path, list[str], str | None]:
    """Return the path to read, the formats that recognise it, and the name of its subfolder if it has only one."""
    source = _existing(path)
    file, found = _recognised(source, names)
    members = [] if found or not source.is_dir() else members_of(source)
    if not members:
        return file, found, None
    if len(members) > 1 or not _holds_only(source, members[0]):
        what = "several adapters" if len(members) > 1 else "an adapter beside other files"
        named = ", ".join(f"{public(str(path))}#{name}" for name in members)
        raise UnknownFormat(f"a folder with {what} in subfolders", path=path, cure=f"Name the one to read: {named}")
    return *_recognised(source / members[0], names), members[0]


def members_of(folder: Path) -> list[str]:
    """List the subfolders with an adapter_config.json; PEFT and AdapterHub save each named adapter in its own.

    Raises:
        StorageError: the folder cannot be read.
    """
    try:
        return sorted(entry.name for entry in folder.iterdir() if (entry / MEMBER).is_file())
    except OSError as error:
        raise storage_error(error, folder) from error


def _holds_only(folder: Path, member: str) -> bool:
    """Whether a folder holds nothing to read but one subfolder: no other folder, and no file of tensors."""
    others = [entry for entry in folder.iterdir() if entry.name != member and not entry.name.startswith(".")]
    return not any(entry.is_dir() or entry.suffix.lower() in {*TENSORS, ".onnx"} for entry in others)


def _as_member(adapter: Adapter, member: str) -> Adapter:
    """Record the subfolder's name in the lineage's step `read`."""
    *steps, last = adapter.recipe
    return adapter.replace(recipe=(*steps, replace(last, args={**last.args, "subfolder": member})))


def unknown_fields(adapter: Adapter) -> list[str]:
    """List the settings of the file that its format does not have and that were kept."""
    return sorted({name for step in adapter.recipe if step.op == "read" for name in step.args.get(UNKNOWN, ())})


def warnings_of(adapter: Adapter) -> list[str]:
    """Return warnings about what the reader accepted, one sentence each."""
    names = ", ".join(unknown_fields(adapter))
    refuse = "--strict (strict=True) refuses them"
    return [f"fields of the config that its format does not have were kept: {names}; {refuse}"] if names else []


def _recognised(source: Path, names: Iterable[str]) -> tuple[Path, list[str]]:
    """Return the path to read and the formats that recognise it; if none recognises a folder, its only tensor file."""
    names = tuple(names)
    files = [source]
    if source.is_dir():
        inside = [file for file in source.iterdir() if file.suffix.lower() in TENSORS]
        files += inside if len(inside) == 1 and inside[0].name not in (SINGLE, TORCH_SINGLE) else []
    for sniff in (Format.sniff.__name__, Format.sniff_loosely.__name__):
        for file in files:
            # A command detects the format, tells an adapter from a base, and reads. The cache asks each format once.
            found = [name for name in names if kept(f"{sniff} {name}", file, getattr(FORMATS[name](), sniff), file)]
            if found:
                return file, found
    return source, []


def _existing(path: str | PathLike[str]) -> Path:
    source = located(path)
    if exists(source):
        return source
    if "#" in os.fspath(path) and source.parent.is_dir() and (members := members_of(source.parent)):
        why, cure = f"no adapter {source.name!r} in {source.parent}", f"It holds: {', '.join(members)}"
        raise StorageError(why, path=path, cure=cure)
    check_exists(source, path)
    return source


def _sourced(adapter: Adapter, path: Path, base: Checkpoint | None) -> Adapter:
    """Record the commits of files pulled from a hub in the lineage, and in the adapter's base."""
    from ..core.adapter import BaseRef, Step

    source, below = source_of(path), None if base is None else source_of(base.folder)
    if source is not None and Step("pull", {"uri": source.uri}) not in adapter.recipe:
        last = len(adapter.recipe) - (bool(adapter.recipe) and adapter.recipe[-1].op == "read")
        step = Step("pull", {"uri": source.uri})
        adapter = adapter.replace(recipe=(*adapter.recipe[:last], step, *adapter.recipe[last:]))
    known = adapter.base or BaseRef()
    if below is not None and known.id in (None, below.repo) and known.revision is None:
        adapter = adapter.replace(base=BaseRef(below.repo, below.commit, known.config_hash))
    return adapter
