"""Proof of a writer: what it wrote is read back and compared with what it was asked to write.

It stands once, behind every format, those of plug-ins included, so that a writer that drops a scaling, renames a target
or transposes a factor fails by itself instead of handing out a wrong file. Tensors that were only moved are compared as
they are; where a writer folded, fused or parted them, the functions are compared (`_functions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, Target
from ..errors import AdapterkitError, Miswritten, TargetNotFound, Unrepresentable, UsageError
from ..io.arrange import runs
from ..io.inputs import inputs_kept
from ..io.lazy import DTYPES, Lazy, as_lazy, files_kept_open
from ._format import CHANGED, LEFT_OUT

if TYPE_CHECKING:
    from ..core.adapter import Updates
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Leaf
    from ..io.written import Written
    from ._format import Format

SINGLE = 2.0**-22
"""Relative error that a scaling may have: many formats hold it, or alpha, in float32."""

WHOLE, RUN = 1 << 16, 1 << 12
"""Tensors of at most so many bytes are compared whole; of larger ones, three runs of so many."""

COMPUTED = 1 << 20
"""Tensors of at most so many bytes are computed again to compare some of them with what is on the disk."""

MOST_CHOICES = 256
"""Ways in which updates that are reported as left out may be missing from one weight."""

SPOTS = 32
"""Places at which a file of tensors is read from disk, however many tensors it has: each takes 70 us."""


@inputs_kept()
@files_kept_open()
def prove(
    name: str,
    writer: Format,
    asked: Adapter,
    path: Path,
    lines: Iterable[str],
    base: Checkpoint | None,
    files: Mapping[str, Written],
) -> None:
    """Check that what was written is what was asked for, but for what `lines` report.

    Args:
        name: of the format.
        writer: of the format; its `read` reads the file back.
        asked: the adapter that was to be written.
        path: what was written.
        lines: what the writer returned; see `Format.write`.
        base: the base, where it was given to the writer; reading gets it too.
        files: files that were written -> what their tensors were written from.

    Raises:
        Miswritten: the file is of another adapter, or cannot be read; names target and field.
        Unrepresentable: the file does not say how a base stores a weight, and is read as if it were the other way.
        UsageError: the file cannot be read without the base.
    """
    report = list(lines)
    left_out = {name for line in report if line.startswith(LEFT_OUT) for name in _named(line)}
    changed = {line.removeprefix(CHANGED).partition(" ")[0] for line in report if line.startswith(CHANGED)}
    got = _read_back(name, writer, asked, path, base)
    proof = _Proof(name, base, left_out, changed, writer.dtypes)
    try:
        proof.check(asked, got)
    except Miswritten:
        # Some formats keep only a layer's number: their readers give the usual names (`model.layers.0...`), or, with
        # a base, that base's own. A base of the asked names shows whether only the prefix differs.
        if base is not None:
            raise
        with suppress(AdapterkitError):
            got = writer.read(path, base=stand_in(asked))
        proof.check(asked, got)
    for file, written in files.items():
        _check_bytes(name, file, written)


def _named(line: str) -> Iterator[str]:
    """Yield the names that a line may report: each word, and each text before a colon, since names may have spaces."""
    yield from (word.rstrip(":") for word in line.split())
    *ends, _ = line.removeprefix(LEFT_OUT).strip().split(": ")
    for count in range(len(ends)):
        yield ": ".join(ends[: count + 1])


def _in_parts(name: str) -> Iterator[str]:
    """The names of a module in the naming of parts, with the rows of it that are meant."""
    from ._image.naming import parts_of

    path, bracket, rows = name.partition("[")
    return (f"{part}{bracket}{rows}" for part in parts_of(path))


def _read_back(name: str, writer: Format, asked: Adapter, path: Path, base: Checkpoint | None) -> Adapter:
    """The adapter in the file; without a base, one of the adapter's own names and shapes stands in where it is needed.

    Raises:
        Miswritten: it cannot be read.
        TargetNotFound: the base does not have a target of the adapter.
        UsageError: it cannot be read without the base.
    """
    foreign = asked.foreign
    # A file that is damaged in a way that its tool forgives is written again as it was.
    compat = foreign.data.get("compat") if foreign is not None and foreign.format == name else None
    try:
        return writer.read(path, compat=compat, base=base)
    except AdapterkitError as error:
        readable = None
        if base is None or isinstance(error, TargetNotFound):
            with suppress(AdapterkitError):
                readable = writer.read(path, compat=compat, base=stand_in(asked))
        if readable is not None and base is None:
            return readable
        if readable is not None:
            raise  # The base lacks a target of the adapter, which is no fault of the writer.
        if base is None and isinstance(error, UsageError):
            why = f"without the base {name} cannot read back what it writes, so that nothing proves it: {error.why}"
            raise UsageError(why, where=error.where, cure="Give the base by base= or --base") from error
        if base is not None:
            # An adapter that does not fit this base is no fault of the writer either; the reader binds what it reads.
            from ..naming.binding import bind

            bind(asked, base)
        raise Miswritten(f"{name} cannot read what it wrote: {error.why}", where=error.where, cure=_REPORT) from error


def stand_in(adapter: Adapter) -> Checkpoint:
    """A base of an adapter's own names, and shapes as far as it tells them; it holds no numbers."""
    from ..io.checkpoint import Checkpoint
    from ..naming.binding import view_shape

    tensors: dict[str, Lazy] = {}
    for target, updates in adapter.updates.items():
        if not target.path or target.rows is not None:
            continue
        shape = updates[0].largest_shape() if len(updates) == 1 else None
        with suppress(AdapterkitError):
            shape = view_shape(target, updates) if shape is None else shape
            tensors[f"{target.path}.weight"] = _empty(_stored(shape, target.layout))
        if any(update.changes_bias for update in updates):
            tensors[f"{target.path}.bias"] = _empty((int(updates[0].dims(target.stacked).get("out", 0)),))  # type: ignore[arg-type]
        if not {f"{target.path}.weight", f"{target.path}.bias"} & tensors.keys():
            tensors[f"{target.path}.weight"] = _empty(())
    return Checkpoint(Path("base"), tensors, (), {}, {}, None, None)


def _stored(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    if layout.startswith("in"):
        return (shape[1], shape[0], *shape[2:])
    return (shape[0], shape[2], shape[1], *shape[3:]) if layout.startswith("e in") else shape


def _empty(shape: tuple[int, ...]) -> Lazy:
    def fetch() -> bytes:
        raise UsageError("the base's numbers are needed", cure="Give the base by base= or --base")

    return Lazy(shape, DTYPES["F32"], fetch)


@dataclass(frozen=True, slots=True, eq=False)
class _Proof:
    """A comparison of what was asked with what was read back.

    Attributes:
        name: of the format.
        base: the base, if there is one.
        left_out: words of the lines that report updates that were left out; targets are among them.
        changed: attributes that are reported to be changed, as `target:method.attribute`.
        dtypes: element types of the format, if it does not have all of them.
    """

    name: str
    base: Checkpoint | None
    left_out: set[str]
    changed: set[str]
    dtypes: frozenset[str]

    def check(self, asked: Adapter, got: Adapter) -> None:
        """Check all targets.

        Raises:
            Miswritten: one differs.
        """
        ours, theirs = asked.updates, got.updates
        if ours.keys() == theirs.keys() and all(_same(found, theirs[target]) for target, found in ours.items()):
            return
        try:
            got.validate()
        except AdapterkitError as error:
            raise Miswritten(f"{self.name} wrote what is no adapter: {error.why}", where=error.where) from error
        if _shared(ours, theirs) < 1:
            way = max(_ways(ours, theirs, self.base), key=lambda way: _shared(way(ours), way(theirs)))
            ours, theirs = way(ours), way(theirs)
        if self.left_out:
            self.left_out.update(*map(_in_parts, self.left_out))
        there = _by_path(theirs)
        for path, group in _by_path(ours).items():
            self._check_path(group, there.pop(path, {}))
        for group in there.values():
            # Some formats have all modules of a kind, with zeros for those that nothing changes.
            self._check_path({}, group)

    def _check_path(self, asked: Updates, got: Updates) -> None:
        from ._functions import unlike

        asked = {target: self._as_reported(target, found, got.get(target, ())) for target, found in asked.items()}
        if asked.keys() == got.keys() and all(_same(found, got[target]) for target, found in asked.items()):
            return
        for choice in self._choices(asked):
            if choice and not got:
                why = "nothing is there"
            elif not (why := unlike(choice, got, self.base, self.dtypes)):
                return
        where = _difference(asked, got)
        layouts = [{target.layout for target in group} for group in (asked, got)]
        if asked and got and layouts[0] != layouts[1]:
            ours, theirs = (" and ".join(f"[{layout}]" for layout in sorted(group)) for group in layouts)
            items = [f"{target}: its base stores it as {ours}, the file is read as {theirs}" for target in asked]
            places = [(target, position) for target, found in asked.items() for position in range(len(found))]
            why = f"{self.name} does not say how a base stores these weights"
            raise Unrepresentable(why, items=items, cure="Write adapterkit's own format", places=places)
        if not got:
            raise Miswritten(f"{self.name} did not write this target", where=where, cure=_REPORT)
        if not asked:
            raise Miswritten(f"{self.name} wrote a target that the adapter does not have", where=where, cure=_REPORT)
        # Changes that are not finite cannot be compared: the adapter is at fault then, not its writer.
        Adapter(asked).check_values()
        raise Miswritten(
            f"{self.name} wrote something else than the adapter has here: {why}", where=where, cure=_REPORT
        )

    def _as_reported(self, target: Target, asked: tuple[Update, ...], got: tuple[Update, ...]) -> tuple[Update, ...]:
        """The updates with the values that they were read back with in those fields that are reported as changed."""
        if not self.changed or [u.method for u in asked] != [u.method for u in got]:
            return asked
        return tuple(
            one.replace(**{n: v for n, v in other.attributes.items() if f"{target}:{one.method}.{n}" in self.changed})
            for one, other in zip(asked, got, strict=True)
        )

    def _choices(self, asked: Updates) -> list[Updates]:
        """All updates; or, where some are reported as left out, every choice of them."""
        choices: list[Updates] = [asked]
        for target, found in asked.items():
            if str(target) in self.left_out:
                some = [c for size in range(len(found)) for c in combinations(found, size)]
                # Rows of one weight may all be left out. Of many, all or none are tried: their choices are too many.
                before = choices if len(choices) < MOST_CHOICES else [choices[-1]]
                choices = [*choices, *({**choice, target: c} for choice in before for c in some)]
        return [{target: left for target, left in choice.items() if left} for choice in choices]


def _difference(asked: Updates, got: Updates) -> str:
    """The first target that differs, and the field, where the methods are the same."""
    for target in dict.fromkeys((*asked, *got)):
        ours, theirs = asked.get(target, ()), got.get(target, ())
        if [u.method for u in ours] != [u.method for u in theirs]:
            return str(target)
        for one, other in zip(ours, theirs, strict=True):
            if field := differing(one, other):
                return f"{target}: {one.method}.{field}"
    return str(next(iter(asked or got)))


def _ways(asked: Updates, got: Updates, base: Checkpoint | None) -> list[Callable[[Updates], Updates]]:
    """What brings targets of several names for the same modules to one; first of all nothing."""
    from ._image.deciding import families_of_all
    from ._image.naming import in_components, in_parts

    names = families_of_all(target.path for target in (*asked, *got))
    ways: list[Callable[[Updates], Updates]] = [
        dict, in_components, lambda updates: in_parts(updates, names),
        lambda updates: in_parts(updates, names, fuse=False),
    ]  # fmt: skip
    return ways if base is None else [*ways, lambda updates: _bound(updates, base)]


def _bound(updates: Updates, base: Checkpoint) -> Updates:
    from ..naming.binding import bind

    try:
        return bind(Adapter(updates), base).adapter.updates
    except AdapterkitError:
        return updates


def _shared(asked: Updates, got: Updates) -> float:
    """How much of what was asked for is there by name."""
    ours, theirs = ({(target.path, target.layout) for target in updates} for updates in (asked, got))
    return len(ours & theirs) / len(ours)


def _by_path(updates: Updates) -> dict[str, dict[Target, tuple[Update, ...]]]:
    """Path -> its targets: one, or rows of one weight."""
    found: dict[str, dict[Target, tuple[Update, ...]]] = {}
    for target, each in updates.items():
        found.setdefault(target.path, {})[target] = each
    return found


def _same(asked: tuple[Update, ...], got: tuple[Update, ...]) -> bool:
    return len(asked) == len(got) and not any(map(differing, asked, got))


def differing(asked: Update, got: Update) -> str:
    """The first field in which two updates differ; empty where they are the same."""
    if type(asked) is not type(got):
        return "method"
    for name in asked.attribute_fields():
        if not _close(getattr(asked, name), getattr(got, name)):
            return name
    for name in asked.tensor_fields():
        if not equal(getattr(asked, name), getattr(got, name)):
            return name
    return ""


def _close(one: Any, other: Any) -> bool:
    if one == other:
        return True
    return isinstance(one, float | int) and isinstance(other, float | int) and abs(one - other) <= SINGLE * abs(one)


def equal(one: Leaf | None, other: Leaf | None) -> bool:
    """Whether two tensors are of one type and shape and hold the same bits; of large ones, wherever it is looked."""
    if one is other:
        return True
    if one is None or other is None:
        return False
    a, b = as_lazy(one), as_lazy(other)
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if (a.source is not None and a.source is b.source) or (a.span is not None and a.span == b.span):
        return True
    if a.nbytes > WHOLE:
        size, count = a.nbytes // a.dtype.itemsize, RUN // a.dtype.itemsize
        places = [(at, count) for at in (0, (size - count) // 2, size - count)]
        ours, theirs = runs(a, places), runs(b, places)
        if ours is not None and theirs is not None:
            return ours == theirs
    return bytes(a.fetch()) == bytes(b.fetch())


def _check_bytes(name: str, file: str, written: Written) -> None:
    """Compare what is on disk with what was to be written there, here and there.

    Raises:
        Miswritten: it differs.
    """
    held = [(key, leaf) for key, leaf in written.on_disk(file).items() if leaf.nbytes and key in written.sources]
    for key, leaf in held[:: -(-len(held) // SPOTS) or 1]:
        tensor = written.sources[key]
        if tensor.span is None and leaf.nbytes > COMPUTED:
            continue  # it would be computed again
        size = leaf.dtype.itemsize
        count = min(leaf.nbytes, RUN) // size
        first = leaf.nbytes // size - count
        if bytes(leaf.read(first, count)) != bytes(tensor.read(first, count)):
            raise Miswritten(f"{name}: other bytes are on the disk", path=file, where=key, cure=_REPORT)


_REPORT = "Nothing was written. The format's writer is at fault: report it, or write another format"
