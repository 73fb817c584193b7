"""What every update has: fields with shape strings, checks, blocks, and what its kind derives from its formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, dataclass_transform

from ..errors import Malformed, NotMergeable, ShapeMismatch, Unsupported
from ..shapes import Axes, Dims, tensor
from ..tensors.dtypes import DTYPES, DType
from ..tensors.finite import check_finite
from ..tensors.lazy import as_lazy, dtype_of
from .attributes import DAMAGED, attribute, check_attribute, plain
from .positions import misplaced, repeated
from .rules import Rule, apply_rules

if TYPE_CHECKING:
    import torch

    from ..tensors.lazy import Leaf

    Random = Callable[[tuple[int, ...]], torch.Tensor]


@dataclass_transform(frozen_default=True, eq_default=False, kw_only_default=True, field_specifiers=(tensor, attribute))
class Update:
    """What one method does at one target. Subclasses become frozen, keyword-only dataclasses by themselves.

    Class attributes:
        kind: the name of the kind, set by the four kinds below.
        since: the version of the spec that each version of the method came with, oldest first; empty for a version
            that is no longer read.
        version: newest version of the method; see `stated_version` for that of one update.
        blocks: axes along which the formula may be cut into blocks that are computed apart.
        needs_bias: a change to the bias is lost where the layer has none, so such a layer is refused.
        linear_only: the law is one of weights `[out, in]`, those of linear layers and embeddings; others are refused.
        acts_on: what the update changes, for messages.
        rules: what must be true of its axes, attributes and tensors beyond shape strings, in order.
        forms: groups of optional tensors of which exactly one set is present; `()` stands for none of the group.
        frozen: names of tensors that are given, not trained: random projections, masks; integers never are.
        bias_sees_weight: the change to the bias needs the weight, so that `settled` comes before `new_bias`.
        sizes: of a fresh update's own axes, with what they are unless the caller says otherwise.
        starts_at_base: a fresh update changes nothing; some methods are defined to start elsewhere.
        shared_as: which choice of `tied` decides whether it changes all layers that share a tensor: `rows`,
            `replacement`, or none of them, `layer`.
        dropout: what dropout leaves out in training, as PEFT has it for the method: numbers of the change's `input`;
            `rows` of the change, or `scaled rows` where the others grow by as much; `blocks` along the axis `n` of a
            tensor, of one of its factors where it has an axis `m`.
        bound_to: the library and function that an update without some of its tensors needs, so that no other reader
            can be asked to compute it; empty for all others.
        paper: where the formula comes from.
        by_form: `check_against` sees the update's `form` alone, not the numbers in its tensors; set by its fields.
    """

    kind: ClassVar[str] = ""
    since: ClassVar[tuple[str, ...]] = ("1.0",)
    version: ClassVar[int] = 1
    rules: ClassVar[tuple[Rule, ...]] = ()
    blocks: ClassVar[frozenset[str]] = frozenset()
    needs_bias: ClassVar[bool] = True
    linear_only: ClassVar[bool] = False
    acts_on: ClassVar[str] = "the layer"
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = ()
    frozen: ClassVar[frozenset[str]] = frozenset()
    bias_sees_weight: ClassVar[bool] = False
    sizes: ClassVar[Mapping[str, int]] = {}
    starts_at_base: ClassVar[bool] = True
    shared_as: ClassVar[str] = "layer"
    dropout: ClassVar[str] = "input"
    bound_to: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    # torch.compile reads attributes of a class, but not the fields of a dataclass.
    _names: ClassVar[tuple[str, ...]] = ()
    _tensors: ClassVar[dict[str, dataclasses.Field[Any]]] = {}
    _attributes: ClassVar[dict[str, dataclasses.Field[Any]]] = {}
    _axes: ClassVar[dict[str, tuple[Axes, bool]]] = {}
    by_form: ClassVar[bool] = True
    _positions: ClassVar[bool] = False
    _rounds: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "version" in cls.__dict__ and "since" not in cls.__dict__:
            # A method that numbers its versions by hand knows the last of them alone.
            cls.since = ("",) * (cls.version - 1) + ("1.0",)
        cls.version = len(cls.since)
        dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)(cls)
        fields = dataclasses.fields(cast(Any, cls))
        cls._tensors = {f.name: f for f in fields if "axes" in f.metadata}
        cls._attributes = {f.name: f for f in fields if "axes" not in f.metadata}
        cls._names = tuple(cls._tensors)
        cls._axes = {name: (f.metadata["axes"], f.metadata["integer"]) for name, f in cls._tensors.items()}
        cls.by_form = not any(f.metadata["integer"] for f in cls._tensors.values())
        cls._positions = any(f.metadata["below"] or f.metadata["distinct"] for f in cls._tensors.values())
        # Another round checks products and quotients whose names a later tensor had yet to tell.
        cls._rounds = 1 if all(axes.plain for axes, _ in cls._axes.values()) else 2

    def __repr__(self) -> str:
        tensors = [f"{name}={list(leaf.shape)}" for name, leaf in self.tensors.items()]
        values = [f"{name}={value!r}" for name, value in self.attributes.items()]
        return f"{type(self).__name__}({', '.join([*tensors, *values])})"

    @property
    def method(self) -> str:
        """The method's name: that of its module."""
        return type(self).__module__.rpartition(".")[2]

    @classmethod
    def tensor_fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The fields that hold tensors, in order; `metadata["axes"]` is the parsed shape string."""
        return cls._tensors

    @classmethod
    def attribute_fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The fields that hold plain values, in order."""
        return cls._attributes

    @property
    def tensors(self) -> dict[str, Leaf]:
        """The tensors that are present, by field."""
        found: dict[str, Leaf] = {}
        for name in self._names:
            leaf = getattr(self, name)
            if leaf is not None:
                found[name] = leaf
        return found

    @property
    def attributes(self) -> dict[str, Any]:
        """The plain values, by field; a whole number in a float's place comes out as a float."""
        return {name: plain(getattr(self, name), field) for name, field in self.attribute_fields().items()}

    def attributes_of(self, version: int) -> dict[str, Any]:
        """The plain values that a version of the method has, by field."""
        fields = self.attribute_fields()
        return {
            name: value for name, value in self.attributes.items() if fields[name].metadata.get("since", 1) <= version
        }

    @property
    def stated_version(self) -> int:
        """The oldest version of the method that can say this update: newer attributes count where they are used."""
        oldest = next(number for number, since in enumerate(self.since, 1) if since)
        newer = (f for f in self._attributes.values() if f.metadata.get("since", 1) > oldest)
        return max((f.metadata["since"] for f in newer if getattr(self, f.name) != f.default), default=oldest)

    def map(self, f: Callable[[Leaf], Leaf]) -> Self:
        """The same update over changed leaves."""
        return self.replace(**{name: f(leaf) for name, leaf in self.tensors.items()})

    def replace(self, **changes: Any) -> Self:
        """The same update with other field values."""
        return cast(Self, dataclasses.replace(cast(Any, self), **changes))

    @property
    def form(self) -> Hashable:
        """All of the update but the numbers in its tensors: class, plain values, shapes and types of the tensors.

        Updates of equal forms have equal `dims` and pass the same `check`, so that a model's tens of thousands of
        targets, which have a few dozen forms, need not be checked one by one.
        """
        values = [getattr(self, name) for name in self._attributes]
        # 1, 1.0 and True are equal, and not the same to `check`.
        return type(self), self._held(), *values, *map(type, values)

    def _held(self) -> Held:
        """Name, element type and shape of each tensor that is present."""
        held = []
        for name, leaf in self.tensors.items():
            held.append((name, dtype_of(leaf).name, tuple(leaf.shape)))
        return tuple(held)

    def dims(self, stack: bool = False) -> Dims:
        """The sizes of all named axes, solved from the tensors.

        Args:
            stack: every tensor carries a leading axis `e`: one slice an expert.

        Raises:
            Malformed: tensors that belong together are not all there, so that axes have no size.
            ShapeMismatch: the tensors disagree with their shape strings or with each other, or hold the wrong type.
        """
        if self.forms:
            self._check_forms()
        dims = dict(_solved(cast(Any, type(self)), stack, self._held()))
        if self.rules:
            apply_rules(self, dims, stack)
        return dims

    def check(self) -> None:
        """Checks the plain values, and which tensors are present; methods with rules of their own extend it.

        Raises:
            Malformed: a value is not of its declared type, not finite or out of range, or tensors do not go together.
            Unsupported: a word is none of those that the method knows.
        """
        for name, field in self.attribute_fields().items():
            check_attribute(name, getattr(self, name), field)
        self._check_forms()
        if not self.tensors:
            raise Malformed(f"needs at least one of: {', '.join(self._names)}", cure=DAMAGED)

    def _check_forms(self) -> None:
        """Check that the tensors which are present make up one form of each group, such as `pairs` or `square`."""
        for group in self.forms:
            present = {name for names in group for name in names if getattr(self, name) is not None}
            if present not in [set(names) for names in group]:
                choices = " or ".join(" and ".join(names) or "none" for names in group)
                raise Malformed(f"needs exactly one of: {choices}", cure=DAMAGED)

    @property
    def file(self) -> str | None:
        """The file that the tensors are to be read from; None where they are loaded, or nothing tells."""
        files = (as_lazy(leaf).file for leaf in self.tensors.values())
        return next((file for file in files if file is not None), None)

    def check_values(self) -> None:
        """Reads every tensor and checks its values; methods with rules of their own extend it.

        Raises:
            Malformed: a NaN or an infinity, with the field and the first position; a position of the weight that is
                outside of it, or that comes twice.
        """
        for name, leaf in self.tensors.items():
            check_finite(leaf, name)
        if not self._positions:
            return
        for name, why in misplaced(self, {}):
            raise Malformed(why, where=name, cure=DAMAGED)
        if name := repeated(self):
            raise Malformed("the same position twice", where=name, cure=DAMAGED)

    def check_against(self, shape: tuple[int, ...]) -> None:
        """Checks the update against the weight's shape `[out, in, *k]` beyond its axes, e.g. that indices are inside.

        Raises:
            ShapeMismatch: it does not fit.
            Malformed: a position comes twice.
        """
        self.check_axes(shape)
        if not self._positions:
            return
        for name, why in misplaced(self, dict(zip(("out", "in"), shape, strict=False))):
            raise ShapeMismatch(f"{name}: {why}", cure="The adapter is not of this base")
        if name := repeated(self):
            raise Malformed(f"{name}: the same position twice", cure=DAMAGED)

    def largest_shape(self) -> tuple[int, ...] | None:
        """The largest weight `[out, in, *k]` that the update fits, where its tensors allow several shapes.

        Methods whose tensors are shared by weights of several sizes override it. None: the tensors do not tell.
        """
        return None

    @classmethod
    def check_axes(cls, shape: tuple[int, ...]) -> None:
        """Checks whether the law is one for weights of so many axes.

        Raises:
            ShapeMismatch: it is not.
        """
        if cls.linear_only and len(shape) != 2:
            why = f"{cls.__name__} changes weights [out, in] only; this one is seen as {list(shape)}"
            raise ShapeMismatch(why, cure="Take this target out")

    def cuts(self, axis: str) -> bool:
        """Whether this update may be cut along an axis: one of `blocks`, unless a method says less of some updates."""
        return axis in self.blocks

    def block(self, axis: str, start: int, stop: int) -> Self:
        """The update restricted to positions `start` to `stop` of a named axis of the weight."""
        changes = {}
        for name, leaf in self.tensors.items():
            position = self.tensor_fields()[name].metadata["axes"].index(axis)
            if position is not None:
                changes[name] = _narrow(leaf, position, start, stop)
        return self.replace(**changes)

    def expert(self, index: int) -> Self:
        """One expert's update out of a stacked one: every tensor's slice `index` along its leading axis."""
        return self.map(lambda leaf: cast(Any, leaf)[index])

    @classmethod
    def initial(cls, W: torch.Tensor, b: torch.Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        """A fresh update of a weight, before any training: one that changes nothing, where `starts_at_base`.

        Args:
            W: the weight `[out, in, *k]`.
            b: its bias `[out]`, if it has one.
            rank: the inner size, for methods that have one.
            random: shape -> numbers drawn evenly from -1 to 1, in W's dtype.
            attributes: the method's own plain values.

        Raises:
            Unsupported: the method has no rule for it.
        """
        raise Unsupported(f"{cls.__name__} has no initial value", cure="Build the update from tensors instead")

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, torch.Tensor]:
        """Tensors that fresh updates of weights of these shapes share, by field; `initial` gets them as attributes."""
        return {}

    @property
    def changes_weight(self) -> bool:
        """Whether there is anything to fold into the weight."""
        return False

    @property
    def changes_bias(self) -> bool:
        """Whether there is anything to fold into the bias."""
        return False

    def new_weight(self, W: torch.Tensor) -> torch.Tensor:
        """W' `[out, in, *k]`, or a block of it for a block of W.

        Raises:
            NotMergeable: the law of this update is not one of weights.
        """
        raise NotMergeable(
            f"{self.method} changes {self.acts_on}, not its weights", cure="Inject it into a live model instead"
        )

    def settled(self, W: torch.Tensor) -> Self:
        """The same update with what its change to the bias takes from the weight W `[out, in, *k]` worked out."""
        return self

    def new_bias(self, b: torch.Tensor) -> torch.Tensor:
        """b' `[out]`."""
        return b

    def without_bias(self) -> Update:
        """Return the same function at a layer without a bias, in a method that more formats hold if there is one."""
        return self

    def forward(self, x: Any, layer: Any) -> Any:
        """y' for the input `x` of a layer: a backend's view of the target, over real or symbolic values."""
        raise NotMergeable(f"{self.method} has no forward formula", cure="Merge it instead")


Held = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(field, element type, shape) of each tensor of an update."""


@lru_cache(maxsize=1 << 10)
def _solved(method: Any, stack: bool, held: Held) -> Dims:
    """The sizes of all named axes; thousands of updates have the same few shapes."""
    for name, dtype, _ in held:
        _check_dtype(name, DTYPES[dtype], method._axes[name][1])
    dims: Dims = {}
    for name, _, shape in held * method._rounds:
        axes = method._axes[name][0]
        (Axes.parse(f"e {axes.text}") if stack else axes).bind(shape, dims, name)
    return dims


def _narrow(leaf: Any, axis: int, start: int, stop: int) -> Any:
    """Positions `start` to `stop` of an axis, counted from the front or, negative, from the back."""
    whole = slice(None)
    here = slice(start, stop)
    return leaf[(*[whole] * axis, here)] if axis >= 0 else leaf[(..., here, *[whole] * (-axis - 1))]


def _check_dtype(name: str, dtype: DType, integer: bool) -> None:
    fits = not dtype.floating and dtype.name != "BOOL" if integer else dtype.floating and dtype.name != "C64"
    if not fits:
        expected = "whole numbers" if integer else "real numbers"
        raise ShapeMismatch(f"{dtype} where {expected} belong", where=name, cure=DAMAGED)
