"""`Adapter`: the class that the readers of all formats return, and that operations and writers take."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard, Unpack

from ..errors import (
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    TargetNotFound,
    UsageError,
    first_line,
    nearest,
    public,
    shown,
)
from ..io.lazy import as_lazy, as_torch, files_kept_open
from .arguments import checks_types
from .tables import counts, html_table
from .updates import Update

if TYPE_CHECKING:
    import torch

    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Leaf
    from ..io.strict_json import JsonValue


@contextmanager
def collection_off() -> Iterator[None]:
    """Turn Python's garbage collector off inside the block; after the block, turn it on again if it was on before.

    While the number of objects grows, the collector scans all objects again and again. With tens of thousands of
    targets, these scans took a third of the time and freed no memory, because all new objects stay in use.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


LAYOUTS = ("out *in", "in out *k", "e out *in", "e in out *k")
"""The possible axis orders of a stored weight. `out *in` is for linear layers and convolutions; `in out *k` is for
embeddings and for GPT-2's Conv1D. Stacked experts have the same axis orders with a leading `e`."""


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """One location in a base: a weight with its bias, a slice of a weight, or the whole model.

    Attributes:
        path: the dotted path, in the base, of a module (its `weight` and `bias`) or a single parameter. An empty path
            means the whole model. It is allowed only for context updates and for methods that set `of_model`. For
            example, an X-LoRA update of the whole model contains only the router, not the experts.
        layout: the axis order in which the base stores the weight, one of `LAYOUTS`. Updates see the weight as `[out,
            in, *k]`. A leading `e` means that the weight is a stack with one weight per expert; each tensor of an
            update then also has a leading axis with one entry per expert.
        rows: `(start, stop)` on the `out` axis, if the target is only a slice of a fused weight; None for all rows.
    """

    path: str
    layout: str = "out *in"
    rows: tuple[int, int] | None = None

    @property
    def stacked(self) -> bool:
        return self.layout.startswith("e ")

    def __repr__(self) -> str:
        layout = "" if self.layout == "out *in" else f", layout={self.layout!r}"
        return f"Target({str(self)!r}{layout})"

    def __str__(self) -> str:
        path = self.path or "(model)"
        return path if self.rows is None else f"{path}[{self.rows[0]}:{self.rows[1]}]"


Updates = Mapping[Target, tuple[Update, ...]]
"""A map from each target to its updates, in the order in which they are applied."""


def order_counts(targets: Sequence[tuple[Target, Sequence[Update]]]) -> bool:
    """Whether the result depends on the order in which the updates of these targets are applied.

    All targets refer to the same weight, but may come from several adapters. If two targets share rows, and an update
    of either target is not additive, the order matters. Otherwise, updates that share rows are all additive, so their
    order does not matter.
    """
    plain = [all(update.kind == "additive" for update in updates) for _, updates in targets]
    places = [(target.layout, target.rows) for target, _ in targets]
    return any(
        not (plain[first] and plain[second]) and _share_rows(*places[first], *places[second])
        for first in range(len(places))
        for second in range(first)
    )


def _share_rows(layout: str, rows: tuple[int, int] | None, other: str, others: tuple[int, int] | None) -> bool:
    if rows is None or others is None or layout != other:
        return True
    return max(rows[0], others[0]) < min(rows[1], others[1])


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The base that an adapter was made for.

    Attributes:
        id: a hub id or a path, as the adapter's file states it.
        revision: the branch, tag or commit, if known.
        config_hash: sha256 of the canonical JSON of the base's config, if known.
    """

    id: str | None = None
    revision: str | None = None
    config_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an adapter's lineage: the name of an operation, and its arguments as plain data.

    The lineage is stored in files, so secrets are removed from URLs in the arguments.
    """

    op: str
    args: Mapping[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", _public(self.args))

    def sources(self) -> list[tuple[Step, ...]]:
        """Return the lineage of each adapter that a combination combined; for other steps, return [].

        Files can store any values as arguments. Values that do not describe a step are ignored.
        """
        of = self.args.get("of")
        recipes = [each.get("recipe") for each in of if isinstance(each, Mapping)] if _is_list(of) else []
        return [tuple(_steps(recipe)) for recipe in recipes]


def _is_list(value: JsonValue) -> TypeGuard[list[JsonValue] | tuple[JsonValue, ...]]:
    return isinstance(value, list | tuple)


def _steps(recipe: JsonValue) -> Iterator[Step]:
    for step in recipe if _is_list(recipe) else ():
        if isinstance(step, Mapping):
            op, args = step.get("op"), step.get("args")
            if isinstance(op, str) and isinstance(args, Mapping):
                yield Step(op, args)


def _public(value: object) -> Any:
    if isinstance(value, str):
        return public(value)
    if isinstance(value, Mapping):
        return {key: _public(entry) for key, entry in value.items()}
    return [_public(entry) for entry in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, eq=False)
class Foreign:
    """Content of a source file that no other field of `Adapter` can store. Writers of the same format keep it."""

    format: str
    data: Mapping[str, JsonValue] = field(default_factory=dict)
    tensors: Mapping[str, Leaf] = field(default_factory=dict)


class AdapterChanges(TypedDict, total=False):
    """The fields that `Adapter.replace` takes."""

    updates: Updates
    base: BaseRef | None
    recipe: tuple[Step, ...]
    foreign: Foreign | None
    extensions: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter: typed updates for each target, with the base, the lineage, and further content of the source file.

    Attributes:
        updates: a map from each target to its updates, in the order in which they are applied.
        base: the base for which the adapter was made; None if unknown.
        recipe: the adapter's lineage, oldest step first.
        foreign: content of the source file that none of the other attributes can store.
        extensions: optional fields that a newer minor version of the spec defines; they are kept unchanged.
    """

    updates: Updates
    base: BaseRef | None = None
    recipe: tuple[Step, ...] = ()
    foreign: Foreign | None = None
    extensions: Mapping[str, JsonValue] = field(default_factory=dict)

    def __repr__(self) -> str:
        base = "" if self.base is None or self.base.id is None else f", base={self.base.id!r}"
        methods = counts(update.method for _, update in self)
        noun = "target" if len(self.updates) == 1 else "targets"
        return f"Adapter({len(self.updates):,} {noun}: {methods}{base})"

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = []
        for target, update in self:
            shapes = " ".join(f"{name}{list(leaf.shape)}" for name, leaf in update.tensors.items())
            rank, scaling = update.dims(target.stacked).get("r"), update.attributes.get("scaling")
            rows.append((target, update.method, shapes, rank, scaling))
        return html_table(repr(self), ("target", "method", "shapes", "rank", "scaling"), rows)

    def __iter__(self) -> Iterator[tuple[Target, Update]]:
        """Iterate over all (target, update) pairs, in order."""
        return ((target, update) for target, updates in self.updates.items() for update in updates)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the updates' methods, sorted."""
        return tuple(sorted({update.method for _, update in self}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the updates, sorted; updates without a rank are skipped."""
        ranks = {update.dims(target.stacked).get("r") for target, update in self}
        return tuple(sorted(rank for rank in ranks if isinstance(rank, int)))

    @checks_types
    def map(self, f: Callable[[Leaf], Leaf]) -> Adapter:
        """Return a copy with each tensor `t` replaced by f(t). If updates share a tensor, f is called once for it."""
        seen: dict[int, Leaf] = {}
        kept: list[Leaf] = []

        def once(leaf: Leaf) -> Leaf:
            if id(leaf) not in seen:
                seen[id(leaf)] = f(leaf)
                kept.append(leaf)
            return seen[id(leaf)]

        return self.replace(
            updates={target: tuple(u.map(once) for u in updates) for target, updates in self.updates.items()}
        )

    @checks_types
    def load(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """Return a copy with torch tensors on `device`. If `dtype` is given, cast floating-point tensors to it."""
        return self.map(lambda leaf: as_torch(leaf, device, dtype))

    @checks_types
    def replace(self, **changes: Unpack[AdapterChanges]) -> Adapter:
        """Return a copy of the adapter with the given fields replaced."""
        return dataclasses.replace(self, **changes)

    @checks_types
    def step(self, op: str, **args: JsonValue) -> Adapter:
        """Return a copy of the adapter with one more step in its lineage."""
        return self.replace(recipe=(*self.recipe, Step(op, args)))

    def validate(self) -> None:
        """Check that updates follow their methods' shape strings and rules, and that a target's updates fit together.

        Also check that `base`, `recipe`, `foreign`, `extensions` and the target paths contain only plain JSON, because
        the native format stores them as JSON.

        Raises:
            AdapterkitError: the adapter has no updates, or a check fails. The message names the first target or field
                that is wrong.
        """
        if not self.updates:
            cure = "Use an adapter that was saved after training. If the keys in its file were renamed, restore them"
            raise UsageError("the adapter has no updates", cure=cure)
        passed = set[Hashable]()
        for target, updates in self.updates.items():
            form = _form(target, updates)
            if form is not None and form in passed:
                continue
            _check_target(target, updates)
            together: dict[str, object] = {} if target.rows is None else {"out": target.rows[1] - target.rows[0]}
            for update in updates:
                _check_update(target, update, together)
            passed.add(form)
        self._check_records()

    def _check_records(self) -> None:
        base, foreign = self.base, self.foreign
        if base is not None:
            check_json([base.id, base.revision, base.config_hash], "base")
        for number, step in enumerate(self.recipe):
            check_json([step.op, step.args], f"recipe[{number}]")
        if foreign is not None:
            check_json([foreign.format, foreign.data, *foreign.tensors], "foreign")
        check_json(self.extensions, "extensions")
        check_json([target.path for target in self.updates], "targets")

    def check_values(self) -> None:
        """Read all tensors, one by one, and check that they contain no NaN, no infinity and no index out of range.

        Raises:
            Malformed: a value is wrong; the message names the target, field and position of the first wrong value.
        """
        with files_kept_open():
            for target, update in self:
                try:
                    update.check_values()
                except AdapterkitError as error:
                    raise _placed(error, target, update).at(path=update.file) from None

    @checks_types
    def find(self, path: str) -> dict[Target, tuple[Update, ...]]:
        """Return the targets whose dotted path is `path`, each with its updates.

        Raises:
            TargetNotFound: no target has this path; the message suggests the most similar path.
        """
        matches = {target: updates for target, updates in self.updates.items() if target.path == path}
        if not matches:
            cure = nearest(path, (target.path for target in self.updates)) or "Print adapter.updates to see all targets"
            raise TargetNotFound(f"no update changes {path!r}", where=path, cure=cure)
        return matches

    def digest(self) -> str:
        """Return the sha256, as hexadecimal text, of all targets, methods, attribute values and tensors.

        Adapters with equal digests compute the same function.
        """
        digest = hashlib.sha256()
        with files_kept_open():
            for target, update in sorted(self, key=lambda pair: str(pair[0])):
                version = update.stated_version
                values = update.attributes_of(version)
                head = [target.path, target.layout, target.rows, update.method, version, values]
                digest.update(canonical(head).encode())
                for name, leaf in update.tensors.items():
                    tensor = as_lazy(leaf)
                    digest.update(_tensor_head(name, tensor.dtype.name, tensor.shape))
                    digest.update(tensor.fetch())
        return digest.hexdigest()

    @checks_types
    def bind(self, base: Checkpoint | str | PathLike[str], *, rename: str | Sequence[str] = ()) -> Adapter:
        """Translate targets into the names and layouts of `base`, and check that all updates fit the base's weights.

        If the base stores one target's weight in several tensors, updates are split. If the base stores the weights of
        several targets in one tensor, updates are joined. For example, a model that transformers 5 built in memory can
        differ in this way from the model's checkpoint on a hub. `bind` converts an adapter for either of them to an
        adapter for the other. The lineage records the rules that changed target names. It also records the base's
        fingerprint, unless an earlier step recorded a fingerprint.

        Args:
            base: an open checkpoint, or its path.
            rename: rules that rename targets, each `FROM=TO` or `@FILE`. The first rule that matches a name is applied.

        Raises:
            TargetNotFound: a target matches no weight of the base, or several weights.
            ShapeMismatch: an update does not fit the shape of its weight.
            NotMergeable, Unsupported: an update cannot be split or joined.
        """
        from ..naming.binding import bind
        from ..naming.binding.fitting import identified

        bound = bind(self, base, rename=rename)
        rules = [str(rule) for rule in bound.rules if rule.kind != "exact"]
        args = ({"rules": rules} if rules else {}) | identified(self, base)
        return bound.adapter.step("bind", **args) if args else bound.adapter

    @checks_types
    def delta(self, path: str, base: Checkpoint | str | PathLike[str] | None = None) -> torch.Tensor:
        """Return W' - W, the change of a target's weight.

        Args:
            path: the target's dotted path.
            base: the base; required if an update's formula reads W.

        Returns:
            float32 `[out, in, *k]`; `[e, out, in, *k]` for stacked experts.

        Raises:
            TargetNotFound: no target has this path.
            NotMergeable: the update changes outputs or context, not only weights.
            UsageError: an update's formula reads W, but `base` is None.
        """
        from ..naming.binding import delta

        return delta(self, path, base)


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@lru_cache(maxsize=1 << 10)
def _tensor_head(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the bytes that `digest` hashes before a tensor's own bytes: its name, dtype and shape."""
    return canonical([name, dtype, shape]).encode()


def canonical(value: object) -> str:
    """Return a value as canonical JSON.

    Canonical JSON has sorted keys, no spaces, only the escapes that JSON requires, and no NaN or infinity.

    Raises:
        Malformed: canonical JSON cannot express the value, because it contains a number that is not finite, a mapping
            with keys of several types, a lone surrogate, or an object that is not plain data.
    """
    try:
        text = _ENCODER.encode(value)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        why = f"JSON cannot express a value ({first_line(error)})"
        raise Malformed(why, where="lineage, or other content of the source format", cure=_PLAIN) from None
    return text


def config_hash(config: Mapping[str, object]) -> str | None:
    """Return the sha256 of the canonical JSON of a base's config; None if canonical JSON cannot express the config."""
    try:
        return hashlib.sha256(canonical(config).encode()).hexdigest()
    except Malformed:
        return None


DEEPEST = 100
"""The maximum nesting depth of lineage and foreign content; Python's JSON encoder fails at about 1000 levels."""

MOST_VALUES = 1 << 22
"""The maximum number of values that one call of `check_json` accepts. YAML aliases can refer to lists of aliases, so a
small file can expand to billions of values."""

TOO_LARGE = 10**4300
"""The smallest integer that Python refuses to print or parse: its default limit is 4300 decimal digits."""


def check_json(value: object, where: str) -> None:
    """Check that a value is plain JSON.

    Values from YAML and pickles may contain dates, NaN, keys of any type and lone surrogates, which JSON cannot store.

    Args:
        value: the value to check.
        where: the name of the value, such as `foreign`. The location in an error begins with this name.

    Raises:
        Malformed: the value, or a value inside it, is not plain JSON.
    """
    left = [MOST_VALUES]
    _check_json(value, where, 0, left)


def _check_json(value: object, where: str, depth: int, left: list[int]) -> None:
    left[0] -= 1
    if depth > DEEPEST or left[0] < 0:
        why = (
            f"values are nested more than {DEEPEST} levels deep"
            if depth > DEEPEST
            else f"there are more than {MOST_VALUES} values"
        )
        raise Malformed(why, where=where, cure=_CORRECT)
    if isinstance(value, str):
        if not value.isascii() and not _encodes(value):
            raise Malformed(f"the text {value!a} contains half of a surrogate pair", where=where, cure=_CORRECT)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) or not (key.isascii() or _encodes(key)):
                raise Malformed(f"the key {shown(key)} is not valid text", where=where, cure=_CORRECT)
            _check_json(inner, f"{where}.{key}", depth + 1, left)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _check_json(inner, where if isinstance(inner, str) else f"{where}[{number}]", depth + 1, left)
    elif not _plain_number(value):
        raise Malformed(f"JSON cannot express {shown(value)}", where=where, cure=_CORRECT)


def _plain_number(value: object) -> bool:
    """Whether a value is null, true, false or a number that JSON can express."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < TOO_LARGE)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _form(target: Target, updates: tuple[Update, ...]) -> Hashable:
    """Return a key for `validate`, which checks only one of the targets that have equal keys.

    Return None if a damaged value in the adapter makes the key unhashable.
    """
    forms: list[Hashable] = []
    for update in updates:
        try:
            forms.append(update.form)
        except AdapterkitError as error:
            raise _placed(error, target, update) from None
    form = bool(target.path), target.layout, target.rows, tuple(forms)
    try:
        hash(form)
    except TypeError:
        return None
    return form


def _check_target(target: Target, updates: tuple[Update, ...]) -> None:
    context = [update.kind == "context" for update in updates]
    whole = [update.kind == "context" or getattr(update, "of_model", False) for update in updates]
    if not target.path and not all(whole):
        raise Malformed("a target without a path has an update that needs a path", where="path", cure=_REWRITE)
    if any(context) and (target.layout, target.rows) != (LAYOUTS[0], None):
        raise Malformed("a context update must not have a layout or rows", where=f"{target}: layout", cure=_REWRITE)
    kinds = [update.kind for update in updates]
    if "output" in kinds and set(kinds[kinds.index("output") :]) & {"additive", "weight"}:
        why = "an update of the weight follows an update of the output"
        raise Malformed(
            why,
            where=str(target),
            cure="Put updates of the weight first: the output is computed with the changed weight",
        )
    if target.layout not in LAYOUTS:
        known = f"Known: {', '.join(LAYOUTS)}"
        raise Malformed(f"unknown layout {target.layout!r}", where=f"{target}: layout", cure=known)
    if target.rows is not None and not 0 <= target.rows[0] < target.rows[1]:
        raise Malformed("rows must be [start, stop] with 0 <= start < stop", where=f"{target}: rows", cure=_REWRITE)


def _check_update(target: Target, update: Update, together: dict[str, object]) -> None:
    try:
        update.check()
        dims = update.dims(target.stacked)
        # All updates of a target must share these sizes. If `dims` has `rest`, its first size is the size of `in`.
        rest = dims.get("rest")
        shared: dict[str, object] = {axis: dims[axis] for axis in ("out", "in", "e") if axis in dims}
        if rest and isinstance(rest, tuple):
            shared["in"] = rest[0]
        for axis, size in shared.items():
            if together.setdefault(axis, size) != size:
                why = f"{axis} is {size} in this update, but {together[axis]} in the target's rows or an earlier update"
                raise ShapeMismatch(why, cure=_REWRITE)
    except AdapterkitError as error:
        raise _placed(error, target, update) from None


def _placed(error: AdapterkitError, target: Target, update: Update) -> AdapterkitError:
    error.where = f"{target}: {update.method}" + (f".{error.where}" if error.where else "")
    return error


def check_adapter(value: object) -> None:
    """Raise an error if a value, such as a path, is not an `Adapter`.

    Raises:
        UsageError: the value has another type.
    """
    if not isinstance(value, Adapter):
        cure = "Pass the result of adapterkit.read, and check the order of the arguments"
        raise UsageError(f"{shown(value)} of type {type(value).__name__} is not an adapter", cure=cure)


_CORRECT = "Correct this value in the file, or write the file again with the tool that made it"
_REWRITE = "Write the adapter again with the tool that made it"
_PLAIN = "Correct the source file: keys must be text, and values must be text, finite numbers, true, false or null"
