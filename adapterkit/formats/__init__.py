"""Read, write and detect adapters in any format. Each format is a module of this package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..core.adapter import collection_off
from ..core.arguments import checks_types
from ..core.registry import Registry
from ..errors import (  # fmt: skip
    AdapterkitError,
    StorageError,
    UnknownFormat,
    UsageError,
    public,
    storage_error,
)
from ..io.atomic import sources_remembered
from ..io.checkpoint import SINGLE, TORCH_SINGLE, Checkpoint, opened
from ..io.inputs import inputs_kept, kept
from ..io.lazy import Lazy
from ..io.locations import NOTE, check_exists, exists, is_address, is_remote, local, located, path_text, source_of
from ..io.staging import files_below, matches, staged
from ..io.torch_file import is_torch_file, read_torch_value
from ._format import ON_LOSS, TENSORS, UNKNOWN, Format

if TYPE_CHECKING:
    from ..core.adapter import Adapter

__all__ = ["FORMATS", "Format", "detect", "outline", "read", "recognised", "save"]

MEMBER = "adapter_config.json"
"""The file that marks a subfolder as an adapter."""

_INDEX = ".index.json"

FORMATS: Registry[type[Format]] = Registry("format", __name__, "adapterkit.formats", Format)


@checks_types
@inputs_kept()
def detect(path: str | PathLike[str]) -> str:
    """Return the name of the format of an adapter's file or folder, without reading tensor data.

    Raises:
        StorageError: nothing exists at `path`.
        UnknownFormat: no format recognises the headers, or several formats recognise them, or the folder has adapters
            in subfolders and the caller must choose one. The error lists the candidates, if there are any.
    """
    return _only(_searched(path, FORMATS)[1], path)


class ReadOptions(TypedDict, total=False):
    """Optional arguments of `read`. Other functions that read an adapter also accept them, and pass them to `read`."""

    alpha: float | None
    rank: int | None
    strict: bool
    experts_order: str | None
    strict_base: bool
    family: str | None


@checks_types
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
        path: a file or folder, or an address on a hub, such as `hf://org/repo[@revision][/path]` or `org/repo`.
            `PATH#NAME` reads the adapter in the subfolder NAME.
        format: the name of the adapter's format; None detects the format from the headers.
        base: the base model, for formats that cannot resolve module names without the base.
        compat: `"formula"` applies the paper's formula, even if the training tool computed another formula. Some
            formats accept further values; each selects one interpretation of an ambiguous file.
        alpha: LoRA's alpha, for a file that does not store alpha.
        rank: the expected rank; a file with a different rank is an error.
        strict: refuse every setting that the format does not define, even a harmless one.
        experts_order: the layout of the factors of stacked experts. It is needed if neither the file nor the base shows
            the layout. The values are `"rank_major"` (PEFT), `"grouped_by_expert"` (Unsloth before September 2026) and
            `"peft_0.18"` (PEFT before 0.19, where each column of lora_A belongs to an output of the layer). Formats
            without stacked experts ignore this argument.
        strict_base: refuse a base whose name, config or fingerprint differs from the one that the adapter records.
        family: the family of the image, video or audio model, such as `"flux"`, if the names of the adapter's modules
            fit several families.

    Returns:
        the adapter; if it comes from a hub, its lineage records the address and the commit.

    Raises:
        AdapterkitError: see `Format.read`.
        CheckFailed: `strict_base` is set, and the base differs from the base that the adapter records.
        UsageError: `strict_base` is set, but no base is given.
    """
    source, formats, member = _searched(path, FORMATS if format is None else [format])
    if base is not None and not formats:
        _check_order(path, base)
    name = _only(formats, path) if format is None else format
    reader = FORMATS[name]()
    options = {"alpha": alpha, "rank": rank, "strict": strict or None, "family": family}
    options = {option: value for option, value in options.items() if value is not None}
    needless = next((option for option in options if option not in reader.options), None)
    if needless is not None:
        raise UsageError(
            f"reading the format {name} takes no --{needless} ({needless}=)", path=path, cure="Omit this option"
        )
    if compat is not None and compat not in reader.compat | reader.experts_orders:
        known = ", ".join(sorted(reader.compat)) or "none"
        cure = f"Known: {known}. Without --compat (compat=), the adapter computes the training tool's formula"
        raise UsageError(f"the format {name} does not accept --compat {compat} (compat=)", path=path, cure=cure)
    if experts_order is not None:
        compat = _with_order(compat, experts_order, reader)
    checkpoint = None if base is None else opened(base)
    try:
        adapter = _sourced(reader.read(source, compat=compat, base=checkpoint, **options), source, checkpoint)
        if member is not None:
            adapter = _as_member(adapter, member)
        adapter.validate()
        if strict_base:
            from ..naming.binding.fitting import check_base  # Import it here: detection does not need it.

            check_base([(str(path), adapter)], checkpoint, strict=True)
        if compat is not None and adapter.recipe and adapter.recipe[-1].op == "read":
            last = adapter.recipe[-1]
            adapter = adapter.replace(
                recipe=(*adapter.recipe[:-1], replace(last, args={**last.args, "compat": compat}))
            )
    except AdapterkitError as error:
        # A reader's error may already name the exact file. So add the given path only to errors without a path.
        raise error.at(path=path) from None
    return adapter


@inputs_kept()
def outline(path: str | PathLike[str], format: str) -> Adapter:  # noqa: A002 - the public contract's word
    """Read an adapter's targets and shapes without its base, even if `read` requires the base; see `Format.outline`.

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
    """Convert `experts_order` to a `compat` value; return `compat` unchanged if the format has no stacked experts."""
    known = FORMATS["peft"].experts_orders
    if order not in known:
        raise UsageError(f"unknown experts_order {order!r}", cure=f"Known: {', '.join(sorted(known))}")
    if not reader.experts_orders:
        return compat
    if compat is not None:
        why = "--compat (compat=) and --experts-order (experts_order=) cannot be combined"
        raise UsageError(why, cure="Omit --compat (compat=)")
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
    """Write an adapter. If the format refuses an update, raise an error; `adapterkit.write` would try other methods.

    The output is written next to `path` and renamed to `path` when it is complete. After an error, `path` is unchanged.
    If `path` is a folder with an adapter, the files that match `Format.owns` are replaced, and all other files stay.
    Before the rename, the output is read back and compared with the adapter.

    For the arguments and errors, see `adapterkit.write`. Returns one line for each omitted or rewritten update.
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
    """Replace each update whose method the format does not support and whose layer in the base has no bias.

    The new update is the result of `Update.without_bias`. On a layer without a bias, it has the same effect as the old
    update, and the format may support its method.
    """
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
    """Return the files that contain the adapter's tensors; tensors that are already in memory are ignored."""
    leaves = [leaf for _, update in adapter for leaf in update.tensors.values()]
    leaves += [] if adapter.foreign is None else adapter.foreign.tensors.values()
    spans = [leaf.span for leaf in leaves if isinstance(leaf, Lazy)]
    return {Path(span.path) for span in spans if span is not None}


def files_read(source: str | PathLike[str]) -> list[Path]:
    """List the local files that may be opened to read an adapter or a base; empty for an address on a hub.

    For a folder, list the tensor files and all other files that a format or a base may store in the folder.
    """
    if is_remote(source):
        return []
    path = local(source)
    named = [*chain.from_iterable(FORMATS[name].owns for name in FORMATS), "config.json", "*.index.json"]
    if path.is_dir():
        tensors = [f"*{suffix}" for suffix in TENSORS]
        return [f for f in files_below(path) if matches(f.name, [*named, *tensors]) and f.is_file()]
    # No format stores further files next to an ONNX graph, so do not search the graph's folder.
    beside = sorted(path.parent.iterdir()) if path.is_file() and path.suffix.lower() != ".onnx" else ()
    return [f for f in (path, *(other for other in beside if matches(other.name, named))) if f.is_file()]


@inputs_kept()
def recognised(path: str | PathLike[str]) -> tuple[str, ...]:
    """List all formats that recognise a file or a folder, or the only tensor file in the folder.

    Raises:
        StorageError: nothing exists at `path`.
        UnknownFormat: the folder has several adapters in subfolders; the error lists the subfolders.
    """
    return tuple(_searched(path, FORMATS)[1])


def _only(formats: Sequence[str], path: str | PathLike[str]) -> str:
    """Return the only recognised format of a path; raise an error if no format or several formats were recognised."""
    if len(formats) == 1:
        return formats[0]
    if formats:
        raise UnknownFormat(
            f"the format could be {' or '.join(formats)}", path=path, cure="Name the format with --from (format=)"
        )
    from ._image.file import tensor_names
    from ._others import adapter_modules, other_file

    source = _existing(path)
    other = other_file(tensor_names(source))
    if other is not None:
        kind, key = other
        why = f"this is {kind.name}, which adapterkit does not read: {kind.why}"
        raise UnknownFormat(why, path=path, where=key, cure=kind.cure)
    module = next(iter(adapter_modules(source)), None)
    if module is not None:
        why = "the file has an adapter's keys, but no known model family has all modules that these keys name"
        cure = "Name the format with --from (format=), and pass the base that has these modules: --base BASE (base=)"
        raise UnknownFormat(why, path=path, where=module, cure=cure)
    name = public(os.fspath(path))
    if source.name.endswith(_INDEX) and source.is_file():
        cure = f"Pass the folder with the files that it lists: {name.removesuffix(source.name) or '.'}"
        raise UnknownFormat("this is the index of a model in several files", path=path, cure=cure)
    unread = _unread(source)
    if unread is not None:
        why = f"not an adapter in any known format: the torch file cannot be read, because {unread.why}"
        raise UnknownFormat(why, path=path, where=unread.where, cure=unread.cure)
    cure = f"Tried: {', '.join(FORMATS)}"
    if is_model(source):
        cure = (
            f"This is a whole model. Extract an adapter from it: adapterkit extract {name} --base BASE "
            "(base=) --rank 64 (rank=) -o ADAPTER. Then pass ADAPTER instead of the model"
        )
    raise UnknownFormat("not an adapter in any known format", path=path, cure=cure)


def _unread(source: Path) -> AdapterkitError | None:
    """Return the error that reading a torch file raises; None for other files, and for files that can be read."""
    try:
        if is_torch_file(source):
            read_torch_value(source)
    except AdapterkitError as error:
        return error
    return None


def is_model(source: str | PathLike[str]) -> bool:
    """Whether `opened` can open a local path as a model with tensors, such as a base or a tuned model."""
    if is_address(source):
        return False
    try:
        return bool(opened(source).tensors)
    except AdapterkitError:
        return False


def _check_order(path: str | PathLike[str], base: Checkpoint | str | PathLike[str]) -> None:
    """Refuse arguments in the wrong order: a model given as the adapter, and an adapter given as the base.

    Raises:
        UsageError: `path` is a model, and `base` is an adapter.
    """
    place = base.root if isinstance(base, Checkpoint) else base
    if is_remote(place) or not is_model(path) or not recognised(place):
        return
    first, second = public(str(place)), public(os.fspath(path))
    cure = f"Swap them. BASE comes first, then its adapters: {second} {first}"
    raise UsageError(f"{first} is an adapter, and {second} is not", cure=cure)


def _searched(path: str | PathLike[str], names: Iterable[str]) -> tuple[Path, list[str], str | None]:
    """Return the path to read, the formats that recognise this path, and the name of a subfolder.

    The name is None unless the adapter is in a subfolder of `path`.
    """
    source = _existing(path)
    file, formats = _recognised(source, names)
    members = [] if formats or not source.is_dir() else members_of(source)
    if not members:
        return file, formats, None
    if len(members) > 1 or not _holds_only(source, members[0]):
        what = "several adapters in subfolders" if len(members) > 1 else "an adapter in a subfolder, and other files"
        named = ", ".join(f"{public(str(path))}#{name}" for name in members)
        raise UnknownFormat(f"the folder has {what}", path=path, cure=f"Choose the adapter to read: {named}")
    return *_recognised(source / members[0], names), members[0]


def members_of(folder: Path) -> list[str]:
    """List the subfolders with an `adapter_config.json`.

    PEFT and AdapterHub save each named adapter in its own subfolder.

    Raises:
        StorageError: the folder cannot be read.
    """
    try:
        return sorted(entry.name for entry in folder.iterdir() if (entry / MEMBER).is_file())
    except OSError as error:
        raise storage_error(error, folder) from error


def _holds_only(folder: Path, member: str) -> bool:
    """Whether a folder has no tensor file, and no subfolder other than `member`."""
    others = [entry for entry in folder.iterdir() if entry.name != member and not entry.name.startswith(".")]
    return not any(entry.is_dir() or entry.suffix.lower() in {*TENSORS, ".onnx"} for entry in others)


def _as_member(adapter: Adapter, member: str) -> Adapter:
    """Record the subfolder's name in the `read` step of the lineage."""
    *steps, last = adapter.recipe
    return adapter.replace(recipe=(*steps, replace(last, args={**last.args, "subfolder": member})))


def unknown_fields(adapter: Adapter) -> list[str]:
    """List the settings that the reader kept although the adapter's format does not define them."""
    lists = [step.args.get(UNKNOWN) for step in adapter.recipe if step.op == "read"]
    return sorted({name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)})


def warnings_of(adapter: Adapter) -> list[str]:
    """Return warnings about fields that the reader accepted although the adapter's format does not define them."""
    names = ", ".join(unknown_fields(adapter))
    refuse = "--strict (strict=True) refuses such fields"
    return [f"the config has fields that its format does not define: {names}; {refuse}"] if names else []


def _recognised(source: Path, names: Iterable[str]) -> tuple[Path, list[str]]:
    """Return the path to read (`source`, or a folder's only tensor file) and the formats that recognise this path."""
    names = tuple(names)
    files = [source]
    if source.is_dir():
        inside = [file for file in source.iterdir() if file.suffix.lower() in TENSORS]
        files += inside if len(inside) == 1 and inside[0].name not in (SINGLE, TORCH_SINGLE) else []
    for sniff in (Format.sniff.__name__, Format.sniff_loosely.__name__):
        for file in files:
            # One command may detect the format several times; the cache runs each format's `sniff` once per file.
            formats = [name for name in names if kept(f"{sniff} {name}", file, getattr(FORMATS[name](), sniff), file)]
            if formats:
                return file, formats
    return source, []


def _existing(path: str | PathLike[str]) -> Path:
    source = located(path)
    if exists(source):
        return source
    if "#" in os.fspath(path) and source.parent.is_dir() and (members := members_of(source.parent)):
        why, cure = f"{source.parent} has no adapter {source.name!r}", f"The folder has: {', '.join(members)}"
        raise StorageError(why, path=path, cure=cure)
    check_exists(source, path)
    return source


def _sourced(adapter: Adapter, path: Path, base: Checkpoint | None) -> Adapter:
    """If the adapter or the base comes from a hub, record its commit.

    The lineage gets the adapter's commit. `adapter.base` gets the base's commit, unless `adapter.base` names another
    repository or already has a revision.
    """
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
