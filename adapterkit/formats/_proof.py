"""Check a writer's output: read it back, and compare the result with the adapter that the writer was given.

The check runs after the writer of every format, including formats of plug-ins. If a writer drops a scaling, renames a
target or transposes a factor, the check raises an error, so the wrong file is not kept. Tensors that the writer did not
change are compared directly. If a writer folded, fused or split tensors, `_functions` compares the functions that the
updates compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, Target
from ..errors import (
    PASS_BASE,
    WRITE_ADAPTERKIT,
    AdapterkitError,
    Miswritten,
    TargetNotFound,
    Unrepresentable,
    UsageError,
)
from ..io.arrange import runs
from ..io.inputs import inputs_kept
from ..io.lazy import DTYPES, Lazy, as_lazy, files_kept_open
from ._format import CHANGED, LEFT_OUT

if TYPE_CHECKING:
    from ..core.adapter import Updates
    from ..core.updates import Update
    from ..io.atomic import Written
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Leaf
    from ._format import Format

SINGLE = 2.0**-22
"""The allowed relative error of numeric attributes. Many formats store the scaling or alpha in float32."""

WHOLE, RUN = 1 << 16, 1 << 12
"""`equal` compares all bytes of a tensor that has at most WHOLE bytes.

In a larger tensor that can be read in parts, `equal` compares only three samples, each of RUN bytes.
"""

COMPUTED = 1 << 20
"""`_check_bytes` skips tensors that the writer computed and that have more than this number of bytes.

Each comparison would compute such a tensor again, which takes too long.
"""

MOST_CHOICES = 256
"""Once `_Proof._choices` has this many sets of updates, it extends only the last set, instead of all sets."""

SPOTS = 32
"""The largest number of tensors per file that `_check_bytes` compares. Reading one tensor takes 70 us."""


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
    """Check that the written files contain the adapter, except for omissions and changes that `lines` reports.

    Args:
        name: the name of the format.
        writer: the `Format` object, whose `read` reads the files back.
        asked: the adapter that was to be written.
        path: the written file or folder.
        lines: the lines that the writer returned; see `Format.write`.
        base: the base that the writer used, or None. The reader uses the same base.
        files: a map from the path of each written file to its source tensors.

    Raises:
        Miswritten: the files do not contain the adapter, or cannot be read; the error names the target and the field.
        Unrepresentable: the format does not store the layout of a weight, and the layout that the reader assumes
            differs from the adapter's.
        UsageError: the files cannot be read back without the base.
    """
    report = list(lines)
    left_out = {name for line in report if line.startswith(LEFT_OUT) for name in _named(line)}
    changed = {line.removeprefix(CHANGED).partition(" ")[0] for line in report if line.startswith(CHANGED)}
    got = _read_back(name, writer, asked, path, base)
    proof = _Proof(name, base, left_out, changed, writer.dtypes)
    try:
        proof.check(asked, got)
    except Miswritten:
        # Perhaps the targets differ only in the prefixes of their paths. Some formats store only the layer's number,
        # and the reader takes the rest of the path from the base. Without a base, the reader assumes the usual paths
        # (`model.layers.0...`). So read the file again, with a stand-in for the base that has the adapter's paths.
        if base is not None:
            raise
        with suppress(AdapterkitError):
            got = writer.read(path, base=stand_in(asked))
        proof.check(asked, got)
    for file, written in files.items():
        _check_bytes(name, file, written)


def _named(line: str) -> Iterator[str]:
    """Yield every substring of a report line that may be the name of a target.

    Yield each word of the line. Targets may contain spaces, so also yield the text between `LEFT_OUT` and each colon
    that is followed by a space.
    """
    yield from (word.rstrip(":") for word in line.split())
    *ends, _ = line.removeprefix(LEFT_OUT).strip().split(": ")
    for count in range(len(ends)):
        yield ": ".join(ends[: count + 1])


def _in_parts(name: str) -> Iterator[str]:
    """Translate a native name to diffusers' naming. Yield one name for each part of a fused weight."""
    from ._image.translate import parts_of

    path, bracket, rows = name.partition("[")
    return (f"{part}{bracket}{rows}" for part in parts_of(path))


def _read_back(name: str, writer: Format, asked: Adapter, path: Path, base: Checkpoint | None) -> Adapter:
    """Read the file back. If reading needs a base, but none was given, use `stand_in(asked)` as the base.

    Raises:
        Miswritten: the file cannot be read, although the adapter fits the base.
        TargetNotFound: the base does not have one of the adapter's targets.
        UsageError: the file cannot be read without the base.
    """
    foreign = asked.foreign
    # Pass the same `compat` as when the adapter's source file was read. Without `compat`, the reader may reject the
    # written file.
    given = foreign.data.get("compat") if foreign is not None and foreign.format == name else None
    compat = given if isinstance(given, str) else None
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
            raise  # The base lacks one of the adapter's targets; the writer is correct.
        if base is None and isinstance(error, UsageError):
            why = f"the written {name} file cannot be checked, because reading it needs the base: {error.why}"
            raise UsageError(why, where=error.where, cure=PASS_BASE) from error
        if base is not None:
            # If the adapter does not fit the base, the writer is not at fault, and `bind` raises the right error.
            from ..naming.binding import bind

            bind(asked, base)
        raise Miswritten(f"{name} cannot read its own output: {error.why}", where=error.where, cure=_REPORT) from error


def stand_in(adapter: Adapter) -> Checkpoint:
    """Return a stand-in for the base: the weights that the adapter changes, with their shapes but without values."""
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
        raise UsageError("the values of the base are needed", cure=PASS_BASE)

    return Lazy(shape, DTYPES["F32"], fetch)


@dataclass(frozen=True, slots=True, eq=False)
class _Proof:
    """Compares the adapter that was to be written with the adapter that was read back.

    Attributes:
        name: the name of the format.
        base: the base, or None.
        left_out: words and phrases from the writer's report of omitted updates. The set contains the names of the
            targets with omitted updates, and also words that are not names of targets.
        changed: the fields that the writer reported as changed, as `TARGET:METHOD.FIELD`.
        dtypes: the dtypes that the format supports; empty if the format supports all.
    """

    name: str
    base: Checkpoint | None
    left_out: set[str]
    changed: set[str]
    dtypes: frozenset[str]

    def check(self, asked: Adapter, got: Adapter) -> None:
        """Check that both adapters have the same updates, except for omissions and changes that the writer reported.

        Raises:
            Miswritten: the updates of a target differ.
            Unrepresentable: the layout that the reader assumes for a weight differs from the adapter's.
        """
        ours, theirs = asked.updates, got.updates
        if ours.keys() == theirs.keys() and all(_same(group, theirs[target]) for target, group in ours.items()):
            return
        try:
            got.validate()
        except AdapterkitError as error:
            raise Miswritten(f"{self.name} wrote an invalid adapter: {error.why}", where=error.where) from error
        if _shared(ours, theirs) < 1:
            way = max(_ways(asked, got, self.base), key=lambda way: _shared(way(ours), way(theirs)))
            ours, theirs = way(ours), way(theirs)
        if self.left_out:
            self.left_out.update(*map(_in_parts, self.left_out))
        there = _by_path(theirs)
        for path, group in _by_path(ours).items():
            self._check_path(group, there.pop(path, {}))
        for group in there.values():
            # Some formats store tensors for every module of a kind. For modules that the adapter does not update, the
            # tensors are zeros. So the file may have additional targets, if their updates change nothing.
            self._check_path({}, group)

    def _check_path(self, asked: Updates, got: Updates) -> None:
        from ._functions import unlike

        asked = {target: self._as_reported(target, group, got.get(target, ())) for target, group in asked.items()}
        if asked.keys() == got.keys() and all(_same(group, got[target]) for target, group in asked.items()):
            return
        why = "the file has no such update"
        for choice in self._choices(asked):
            if choice and not got:
                why = "the file has no such update"
            elif not (why := unlike(choice, got, self.base, self.dtypes)):
                return
        where = _difference(asked, got)
        layouts = [{target.layout for target in group} for group in (asked, got)]
        if asked and got and layouts[0] != layouts[1]:
            ours, theirs = (" and ".join(f"[{layout}]" for layout in sorted(group)) for group in layouts)
            items = [f"{target}: the base stores the weight as {ours}; the reader assumes {theirs}" for target in asked]
            places = [(target, position) for target, group in asked.items() for position in range(len(group))]
            why = f"{self.name} files do not state the layout in which the base stores these weights"
            raise Unrepresentable(why, items=items, cure=WRITE_ADAPTERKIT, places=places)
        if not got:
            raise Miswritten(f"{self.name} did not write this target", where=where, cure=_REPORT)
        if not asked:
            raise Miswritten(f"{self.name} wrote a target that the adapter does not have", where=where, cure=_REPORT)
        # If the adapter has values that are not finite, the writer is not at fault, and `check_values` raises an error.
        Adapter(asked).check_values()
        raise Miswritten(
            f"{self.name} wrote an update that differs from the adapter's update: {why}", where=where, cure=_REPORT
        )

    def _as_reported(self, target: Target, asked: tuple[Update, ...], got: tuple[Update, ...]) -> tuple[Update, ...]:
        """Return `asked`, but with the values of `got` in the fields that the writer reported as changed.

        If the methods of `asked` and `got` differ, return `asked` unchanged.
        """
        if not self.changed or [u.method for u in asked] != [u.method for u in got]:
            return asked
        return tuple(
            one.replace(**{n: v for n, v in other.attributes.items() if f"{target}:{one.method}.{n}" in self.changed})
            for one, other in zip(asked, got, strict=True)
        )

    def _choices(self, asked: Updates) -> list[Updates]:
        """Return sets of updates; a correct file contains one of these sets.

        If the writer reported that it omitted updates of a target, some or all updates of this target may be missing.
        The report does not say which, so each combination of the target's updates is one of the choices.
        """
        choices: list[Updates] = [asked]
        for target, group in asked.items():
            if str(target) in self.left_out:
                some = [c for size in range(len(group)) for c in combinations(group, size)]
                # The number of choices grows exponentially with the number of targets in `left_out`. So once there are
                # MOST_CHOICES choices, extend only the last choice. If each target has one update, the last choice
                # lacks all targets in `left_out` that the loop has reached.
                before = choices if len(choices) < MOST_CHOICES else [choices[-1]]
                choices = [*choices, *({**choice, target: c} for choice in before for c in some)]
        return [{target: left for target, left in choice.items() if left} for choice in choices]


def _difference(asked: Updates, got: Updates) -> str:
    """Return the first target whose updates differ. If only a field differs, append the method and the field."""
    for target in dict.fromkeys((*asked, *got)):
        ours, theirs = asked.get(target, ()), got.get(target, ())
        if [u.method for u in ours] != [u.method for u in theirs]:
            return str(target)
        for one, other in zip(ours, theirs, strict=True):
            if field := differing(one, other):
                return f"{target}: {one.method}.{field}"
    return str(next(iter(asked or got)))


def _ways(asked: Adapter, got: Adapter, base: Checkpoint | None) -> list[Callable[[Updates], Updates]]:
    """Return functions that rename targets, to try on both adapters. The first function renames nothing.

    `check` uses the function that gives the two adapters the most targets in common.
    """
    from ._image.deciding import candidates, denoiser_targets, families_of_all, origin_of
    from ._image.translate import in_components, in_parts

    ways: list[Callable[[Updates], Updates]] = [dict, in_components]
    names = families_of_all(target.path for target in (*asked.updates, *got.updates))
    # If an adapter has few modules, their names may fit several model families. So also try the families that the
    # metadata, the base and the shapes suggest.
    inside = denoiser_targets(asked.updates, ())
    stated = tuple(each.name for each in candidates(asked.updates, inside, origin_of(asked, base))) if inside else ()
    for known in dict.fromkeys((names, stated)):
        ways += [partial(in_parts, families=known), partial(in_parts, families=known, fuse=False)]
    return ways if base is None else [*ways, lambda updates: _bound(updates, base)]


def _bound(updates: Updates, base: Checkpoint) -> Updates:
    from ..naming.binding import bind

    try:
        return bind(Adapter(updates), base).adapter.updates
    except AdapterkitError:
        return updates


def _shared(asked: Updates, got: Updates) -> float:
    """Return the fraction of the targets in `asked` for which `got` has a target with the same path and layout."""
    ours, theirs = ({(target.path, target.layout) for target in updates} for updates in (asked, got))
    return len(ours & theirs) / len(ours)


def _by_path(updates: Updates) -> dict[str, dict[Target, tuple[Update, ...]]]:
    """Group targets by the path of their weight. Targets with the same path change different rows."""
    by_path: dict[str, dict[Target, tuple[Update, ...]]] = {}
    for target, each in updates.items():
        by_path.setdefault(target.path, {})[target] = each
    return by_path


def _same(asked: tuple[Update, ...], got: tuple[Update, ...]) -> bool:
    return len(asked) == len(got) and not any(map(differing, asked, got))


def differing(asked: Update, got: Update) -> str:
    """Return the first field in which two updates differ; empty if they are equal."""
    if type(asked) is not type(got):
        return "method"
    for name in asked.attribute_fields():
        if not _close(getattr(asked, name), getattr(got, name)):
            return name
    for name in asked.tensor_fields():
        if not equal(getattr(asked, name), getattr(got, name)):
            return name
    return ""


def _close(one: object, other: object) -> bool:
    if one == other:
        return True
    return isinstance(one, float | int) and isinstance(other, float | int) and abs(one - other) <= SINGLE * abs(one)


def equal(one: Leaf | None, other: Leaf | None) -> bool:
    """Whether two tensors have the same dtype, shape and bytes.

    If the tensors are large and can be read in parts, compare only samples of the bytes.
    """
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
    """Compare the last bytes of up to `SPOTS` tensors on disk with the tensors that were to be written.

    Raises:
        Miswritten: the bytes differ.
    """
    leaves = [(key, leaf) for key, leaf in written.on_disk(file).items() if leaf.nbytes and key in written.sources]
    for key, leaf in leaves[:: -(-len(leaves) // SPOTS) or 1]:
        tensor = written.sources[key]
        if tensor.span is None and leaf.nbytes > COMPUTED:
            continue  # The comparison would compute the tensor again, which takes too long.
        size = leaf.dtype.itemsize
        count = min(leaf.nbytes, RUN) // size
        first = leaf.nbytes // size - count
        if bytes(leaf.read(first, count)) != bytes(tensor.read(first, count)):
            raise Miswritten(
                f"{name}: the bytes on the disk differ from the adapter's tensor", path=file, where=key, cure=_REPORT
            )


_REPORT = "Nothing was written. This is a bug in the format's writer: report the bug, or write another format"
