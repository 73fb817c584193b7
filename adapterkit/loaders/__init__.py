"""Find out which tools load an adapter file, which tools load it after a conversion, and why the others do not.

Each tool has a data file in `spec/loaders`. The README in `spec/loaders` explains which facts were generated from the
tool itself, and which were taken from the tool's source or documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..core.metadata import read_with
from ..core.updates import Additive
from ..errors import AdapterkitError, Malformed, Unrepresentable, UsageError
from ..formats import FORMATS, Format
from ..formats._format import TENSORS
from ..formats._image.deciding import FAMILY, candidates, denoiser_targets, origin_of
from ..formats._image.file import TORCH_SUFFIXES, tensor_names
from ..formats._image.hints import ImageHints
from ..formats._image.image_format import ImageFormat
from ..formats._kit import leftovers
from ..methods.lora import LoRA
from ..naming import architectures
from ..naming.image import alike, component_of, encoders, families, rooted
from ..writing import Promotion

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..naming.image import ImageFamily

FORMAT = 1
"""The version of the data files' format that this code can read."""


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys that a tool knows for modules of U-Nets and transformers.

    `spec/loaders/README.md` explains the fields.
    """

    prefix: str
    naming: str
    families: list[str]
    without: dict[str, list[str]] = {}
    only: dict[str, list[str]] = {}
    slots: list[str] = []
    processors: bool = False


class EncoderKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys that a tool knows for modules of text encoders."""

    prefix: str
    names: list[str]
    slots: list[str] = []


class Files(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A format whose files a tool can load completely."""

    format: str
    families: list[str] = []
    methods: list[str] = []
    profile: str | None = None


class Loader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool that loads adapter files."""

    format: int
    title: str
    url: str
    sources: list[str]
    unread: str
    version: str = ""
    kind: str = "image"
    needs: str = ""
    containers: tuple[str, ...] = ("safetensors", "torch")
    convert: list[str] = []
    slots: list[str] = []
    keys: list[Keys] = []
    encoders: list[EncoderKeys] = []
    files: list[Files] = []
    differs: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a tool loads a file, why not, and how to convert the file for the tool.

    Attributes:
        tool: the name of the tool's file in `spec/loaders`.
        title: the tool's title, with the version that the data file describes.
        loads: `yes`; `part` if the tool loads some keys of the file and ignores others; `no`; `unknown`.
        why: the reason why the tool does not load all keys. If the tool loads all keys, `why` describes how its results
            differ from the formulas of the file's methods; empty if they do not differ.
        convert: arguments with which `adapterkit convert` writes a file that the tool loads completely. Empty if no
            such arguments are known or needed.
    """

    tool: str
    title: str
    loads: str
    why: str = ""
    convert: str = ""


@cache
def loaders() -> Mapping[str, Loader]:
    """Return all tools by name, sorted.

    Raises:
        Malformed: a data file does not follow `spec/loaders/README.md`.
    """
    return {file.stem: load(file) for file in sorted(folder().glob("*.toml"))}


def load(path: Path) -> Loader:
    """Read the data file of a tool, and check it."""
    try:
        loader = msgspec.toml.decode(path.read_bytes(), type=Loader)
    except (ValueError, msgspec.MsgspecError) as error:
        raise Malformed(f"this is not a valid loader file ({error})", path=path, cure="Correct the file") from error
    known = {family.name for family in families()}
    named = {name for keys in loader.keys for name in (*keys.families, *keys.without, *keys.only)}
    named |= {name for files in loader.files for name in files.families}
    formats = {*loader.convert, *(files.format for files in loader.files)}
    for names, there, word in ((named, known, "family"), (formats, FORMATS, "format")):
        if unknown := sorted(name for name in names if name not in there):
            raise Malformed(f"unknown {word}: {unknown[0]}", path=path, cure="Correct the file")
    if loader.format != FORMAT:
        why = f"the file has format {loader.format}; this version reads format {FORMAT}"
        raise Malformed(why, path=path, cure="Correct the file")
    return loader


@cache
def folder() -> Path:
    """Return the folder with the data files: `data` next to this module if installed, `spec/loaders` in a checkout."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "spec" / "loaders"


def loaders_of(adapter: Adapter, format: str, path: Path, *, convert: bool = True) -> list[Answer]:  # noqa: A002 - the name in the public API
    """Return, for each tool, whether it loads a file.

    Args:
        adapter: the adapter that was read from the file.
        format: the format of the file.
        path: the file or folder.
        convert: whether to look for a conversion for each tool that does not load the whole file. The search may load
            tensors.

    Returns:
        one answer for each tool that supports this kind of model, sorted by name.
    """
    seen = _File.of(adapter, format, path)
    return [
        _answer(name, tool, seen, convert)
        for name, tool in loaders().items()
        if (tool.kind == "image") == seen.for_image
    ]


def spelled_anew(adapter: Adapter, format: str, path: Path) -> Adapter:  # noqa: A002 - the name in the public API
    """Return the adapter, but without recorded keys that the format's tool does not load.

    An adapter can record the keys of its source file, and a writer of the same format keeps recorded keys. For tensors
    without a recorded key, the writer uses the format's usual keys. For example, the format `comfyui` also reads files
    with keys that ComfyUI does not load; fal and ACE-Step write such files for some families of models.

    Args:
        adapter: the adapter that was read from the file.
        format: the format of the file; the adapter will be written in the same format.
        path: the file or folder.
    """
    tool, writer = loaders().get(format), FORMATS[format]()
    if tool is None or not isinstance(writer, ImageFormat) or adapter.foreign is None:
        return adapter
    seen = _File.of(adapter, format, path)
    known = [family for family in seen.families if any(family.name in keys.families for keys in tool.keys)]
    names = [rooted(target.path)[1] for target in denoiser_targets(adapter.updates, ())]
    # AnimateDiff's keys look like keys in diffusers' oldest style, but diffusers has no modules with their names.
    # `usual` is false for these keys, so that the code below can drop them.
    usual = writer.naming != "diffusers" or any(
        all(name in family.names("diffusers") for name in names) for family in seen.families
    )
    if (usual or not seen.families) if not known else any(_holds(tool, f, key) for f in known for key in seen.keys):
        return _with_usual_keys(adapter, tool, known)
    metadata = dict(leftovers(adapter, adapter.foreign.format, ImageHints).metadata)
    # Record the possible families in the metadata, because the keys that show the family are dropped here.
    family_metadata = {FAMILY: " ".join(family.name for family in seen.families)} if seen.families else {}
    return read_with(adapter.replace(foreign=None), family_metadata | metadata)


def _with_usual_keys(adapter: Adapter, tool: Loader, families: Iterable[ImageFamily]) -> Adapter:
    """If the tool ignores a tensor's key but knows the format's usual key for the tensor, use the usual key.

    Example: ComfyUI loads the factors of a DoRA under several names, but the magnitude only as `dora_scale`.
    """
    assert adapter.foreign is not None
    keys = leftovers(adapter, adapter.foreign.format, ImageHints).keys
    lost = [
        usual
        for usual, key in keys.items()
        if any(_holds(tool, family, usual) and not _holds(tool, family, key) for family in families)
    ]
    if not lost:
        return adapter
    kept = {usual: key for usual, key in keys.items() if usual not in lost}
    return adapter.replace(foreign=replace(adapter.foreign, data={**adapter.foreign.data, "keys": kept}))


@dataclass(frozen=True, slots=True)
class _File:
    """Everything about a file that decides whether a tool loads it."""

    adapter: Adapter
    format: str
    keys: tuple[str, ...]
    container: str
    families: tuple[ImageFamily, ...]
    for_image: bool

    @classmethod
    def of(cls, adapter: Adapter, format: str, path: Path) -> _File:  # noqa: A002 - the name in the public API
        writer = FORMATS[format]()
        file = path
        if path.is_dir():
            inside_folder = [each for each in sorted(path.iterdir()) if each.suffix.lower() in TENSORS]
            owned = [each for each in inside_folder if each.name in writer.owns]
            file = next(iter(owned or inside_folder), path)
        keys = tuple(tensor_names(file)) if isinstance(writer, ImageFormat) else ()
        kind = "torch" if file.suffix in TORCH_SUFFIXES else "safetensors"
        inside = any(component_of(target.path) for target in adapter.updates) or isinstance(writer, ImageFormat)
        targets = denoiser_targets(adapter.updates, ()) if inside else []
        candidates_here = candidates(adapter.updates, targets, origin_of(adapter, None)) if targets else []
        return cls(adapter, format, keys, kind, tuple(candidates_here), inside or format == "textual_inversion")


def _answer(name: str, tool: Loader, seen: _File, convert: bool) -> Answer:
    title = f"{tool.title} {tool.version}".rstrip()
    loads, why = _loads(tool, seen)
    words = "" if loads == "yes" or not convert else _conversion(tool, seen)
    if loads == "yes":
        why = "; ".join(
            f"{method} differs: {tool.differs[method]}"
            for method in dict.fromkeys(update.method for _, update in seen.adapter)
            if method in tool.differs
        )
    return Answer(name, title, loads, why, words)


def _loads(tool: Loader, seen: _File) -> tuple[str, str]:
    """Return `Answer.loads` for a tool and a file, and the reason if it is not `yes`."""
    if seen.container not in tool.containers:
        return "no", f"it does not read {seen.container} files"
    for files in tool.files:
        if files.format == seen.format:
            return _whole(files, seen)
    if not seen.keys:
        known = ", ".join(dict.fromkeys([*(files.format for files in tool.files), *tool.convert]))
        return "no", f"it does not read {seen.format}; it reads {known}"
    return _by_keys(tool, seen)


def _whole(files: Files, seen: _File) -> tuple[str, str]:
    if files.families and not {family.name for family in seen.families} & {*files.families}:
        return "no", f"it reads {files.format} files only for {', '.join(files.families)}"
    odd = next((u.method for _, u in seen.adapter if files.methods and u.method not in files.methods), "")
    if odd:
        return "no", f"it does not read {odd} in {files.format} files"
    return ("yes", "") if files.profile is None else _profiled(files, seen.adapter)


def _profiled(files: Files, adapter: Adapter) -> tuple[str, str]:
    """Return whether a program with the profile `files.profile` loads the file unchanged, and a reason if not."""
    try:
        fitted, lines = FORMATS[files.format]().fit(adapter, str(files.profile))
    except AdapterkitError as error:
        return "no", "; ".join([error.why, *getattr(error, "items", ())][:2])
    same = not lines and _numbers(fitted) == _numbers(adapter)
    return ("yes", "") if same else ("no", "; ".join(lines[:2]) or "not all modules have the same scaling and rank")


def _numbers(adapter: Adapter) -> list[Any]:
    return [(str(t), u.method, u.attributes, u.dims(t.stacked).get("r")) for t, u in adapter]


def _by_keys(tool: Loader, seen: _File) -> tuple[str, str]:
    """Return `Answer.loads` for the keys of an image model's adapter, and the reason if it is not `yes`."""
    if not seen.families and denoiser_targets(seen.adapter.updates, ()):
        return "unknown", "the adapter's model family is unknown, so it is unknown which keys the tool loads"
    tried: list[list[str]] = []
    for family in seen.families or (None,):
        if family is not None and not any(family.name in keys.families for keys in tool.keys):
            continue
        tried.append(_lost(tool, family, seen.keys))
    if not tried:
        return "no", f"it does not support {' or '.join(family.title for family in seen.families)}"
    lost = min(tried, key=len)
    if not lost:
        return "yes", ""
    some = "any of the keys" if len(lost) == len(seen.keys) else f"{len(lost)} of {len(seen.keys)} keys"
    why = f"it does not know {some}, such as {lost[0]}; it {tool.unread}"
    refuses = tool.unread.startswith("refuses") or len(lost) == len(seen.keys)
    return ("no" if refuses else "part"), why


def _lost(tool: Loader, family: ImageFamily | None, keys: tuple[str, ...]) -> list[str]:
    """List the keys that a tool does not know.

    If a family is given, denoiser keys that differ only in block numbers are tested once: the result for the first of
    these keys applies to all of them.
    """
    if family is None:
        return [key for key in keys if not _holds(tool, family, key)]
    # Do not treat 1 to 4 as block numbers, because the name of a component may end with one of them: `transformer_2`.
    kinds = _kinds(keys, family.literal | {"1", "2", "3", "4"})
    others = tuple(each.prefix for each in tool.encoders)
    supported: dict[str, bool] = {}
    lost = []
    for key, kind in kinds.items():
        kind = key if key.startswith(others) else kind
        if kind not in supported:
            supported[kind] = _holds(tool, family, key)
        if not supported[kind]:
            lost.append(key)
    return lost


@lru_cache(maxsize=16)
def _kinds(keys: tuple[str, ...], literal: frozenset[str]) -> dict[str, str]:
    """Map each key to a pattern. Keys that differ only in block numbers have the same pattern.

    The result is cached, because every tool needs it for the same file.
    """
    return {key: alike(key, literal) for key in keys}


def _holds(tool: Loader, family: ImageFamily | None, key: str) -> bool:
    for keys in tool.keys:
        if family is None or family.name not in keys.families or not key.startswith(keys.prefix):
            continue
        if any(_has_key(keys, family, name) for name in _modules(key[len(keys.prefix) :], keys.slots or tool.slots)):
            return True
    for each in tool.encoders:
        if key.startswith(each.prefix):
            for name in _modules(key[len(each.prefix) :], each.slots or tool.slots):
                for kind in each.names:
                    if kind == "layers" and not name.startswith(kind):
                        continue
                    known = encoders()["llm" if kind == "layers" else kind]
                    if known.unflattened(name) if each.prefix.endswith("_") else name in known:
                        return True
    return False


def _modules(rest: str, slots: Iterable[str]) -> Iterator[str]:
    """Yield possible module names: for each slot at the end of `rest`, the part of `rest` before this slot."""
    words, ends = rest.split("."), _ends(tuple(slots))
    for count in range(1, min(len(words), ends.words + 1)):
        if ".".join(words[-count:]) in ends.dotted:
            yield ".".join(words[:-count])
    for end in ends.others:
        if rest.endswith(end) and len(rest) > len(end):
            yield rest[: -len(end)]


@dataclass(frozen=True, slots=True)
class _Ends:
    """A tool's slots, which are the possible ends of its keys.

    A slot in `dotted` follows the module's name and a dot. It consists of at most `words` names, joined by dots. A slot
    in `others` begins with an underscore and follows the module's name directly.
    """

    dotted: frozenset[str]
    words: int
    others: tuple[str, ...]


@cache
def _ends(slots: tuple[str, ...]) -> _Ends:
    dotted = frozenset(slot for slot in slots if not slot.startswith("_"))
    words = max((slot.count(".") + 1 for slot in dotted), default=0)
    return _Ends(dotted, words, tuple(slot for slot in slots if slot.startswith("_")))


def _has_key(keys: Keys, family: ImageFamily, name: str) -> bool:
    names = family.names(keys.naming)
    if keys.processors:
        if ".processor." not in name:
            return False
        name = name.replace(".processor.", ".")
        name = f"{name}.0" if name.endswith(".to_out") else name
    paths = names.unflattened(name) if keys.prefix.endswith("_") else [name]
    patterns = {pattern for path in paths for pattern in names.patterns_of(path)}
    lacking, only = (_holes(tuple(field.get(family.name, ()))) for field in (keys.without, keys.only))
    return bool(patterns - lacking if not only else patterns & only)


@cache
def _holes(templates: tuple[str, ...]) -> frozenset[str]:
    return frozenset(architectures.HOLE.sub("#", each) for each in templates)


def _conversion(tool: Loader, seen: _File) -> str:
    """Return arguments of `adapterkit convert` so that the tool completely loads the written file; empty if none."""
    for name in tool.convert:
        writer = FORMATS[name]()
        if isinstance(writer, ImageFormat):
            for on_loss in ("refuse", "fold", "promote"):
                written = _written(writer, seen, on_loss)
                if written is not None and _loads(tool, written)[0] == "yes":
                    return f"--to {name}" + (f" --on-loss {on_loss}" if on_loss != "refuse" else "")
        elif not seen.for_image and (words := _to_language(tool, writer, seen)):
            return words
    return ""


def _written(writer: ImageFormat, seen: _File, on_loss: str) -> _File | None:
    """Describe the file that a writer would write: the format, keys and container, but not the tensors' values.

    Return None if the writer refuses the adapter or would leave out a part of it.
    """
    from ..formats._image.writing import encoded

    keys: list[str] = []
    fresh = seen.adapter.replace(foreign=None) if writer.name() == seen.format else seen.adapter

    def ask(adapter: Adapter) -> list[str]:
        tensors, _, lines = encoded(writer, adapter, Path(writer.file or "lora.safetensors"), on_loss, None)
        keys[:] = tensors
        return lines

    try:
        lines = ask(fresh) if on_loss != "promote" else Promotion.into(writer, None, None).ask(fresh, ask)
    except AdapterkitError:
        return None
    if any(line.startswith("left out") for line in lines):
        return None
    return replace(seen, format=writer.name(), keys=tuple(keys), container="safetensors")


def _to_language(tool: Loader, writer: Format, seen: _File) -> str:
    """Return the arguments of `adapterkit convert` for a language model's adapter; empty if no conversion is possible.

    If the tool has a profile, the adapter is checked against the profile. Otherwise only the adapter's methods are
    checked. Keys are never checked. If a check fails but the updates can be converted to LoRA, `--on-loss promote` is
    added.
    """
    profile = next((files.profile for files in tool.files if files.profile is not None), None)
    words = [f"--to {type(writer).__module__.rpartition('.')[2]}", *([f"--profile {profile}"] if profile else [])]
    updates = [update for _, update in seen.adapter]
    if profile is not None:
        try:
            writer.fit(seen.adapter, profile)
        except UsageError:
            pass  # `fit` needs the base, which is missing here. `tool.needs` adds the argument `--base BASE`.
        except Unrepresentable:
            if not all(_promotable(update) for update in updates):
                return ""
            words.append("--on-loss promote")
    elif not all(update.method in writer.methods for update in updates):
        if not all(
            update.method in writer.methods or ("lora" in writer.methods and _promotable(update)) for update in updates
        ):
            return ""
        words.append("--on-loss promote")
    return " ".join([*words, *([tool.needs] if tool.needs else [])])


def _promotable(update: Any) -> bool:
    """Whether an update can be converted exactly to a LoRA, because it has low-rank factors."""
    return isinstance(update, LoRA) or (isinstance(update, Additive) and type(update).pair is not Additive.pair)
