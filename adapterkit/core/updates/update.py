"""The base class of all updates, `Update`. It declares and checks fields, and defines the functions to override.

`Layer` is the interface through which a formula uses a layer, in any backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast, dataclass_transform

from ...errors import INJECT_INSTEAD, USE_ITS_BASE, Malformed, NotMergeable, ShapeMismatch, Unsupported, UsageError
from ...io.lazy import DTYPES, DType, as_lazy, check_finite, dtype_of
from ...linalg.namespace import namespace
from ..shapes import (
    DAMAGED,
    Axes,
    Dims,
    Rule,
    apply_rules,
    attribute,
    check_attribute,
    check_fits,
    misplaced,
    plain,
    repeated,
    tensor,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...io.lazy import Leaf
    from ...io.strict_json import JsonValue

    Random = Callable[[tuple[int, ...]], torch.Tensor]


class Layer(Protocol):
    """The interface through which a formula uses the layer at a target, in any backend; see also `OutputUpdate`.

    In the type hints of formulas, `Tensor` also stands for numpy arrays and for symbolic values of a graph.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, `[out, in, *k]`."""
        ...

    @property
    def channel(self) -> int:
        """The index of the channel axis in the output."""
        ...

    @property
    def weight(self) -> Tensor:
        """The current weight, `[out, in, *k]`."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The current bias, `[out]`."""

    @property
    def call(self) -> Mapping[str, Any]:
        """The arguments with which the model was called, keyed by name; see `OutputUpdate`."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return the complete output."""
        ...

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        """Apply the layer's operation, with its stride and other settings, to x with the weight w and no bias."""
        ...

    def zero_padded(self, x: Tensor, w: Tensor) -> Tensor:
        """Like `op`, but pad the input with zeros, and use no dilation."""
        ...

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        """Multiply the channels of h by the matrix w `[out, r]`, as in a 1x1 convolution."""
        ...

    def per_channel(self, v: Tensor) -> Tensor:
        """Reshape a vector `[out]` so that it can be added to the output."""
        ...

    def hidden(self, x: Tensor) -> Tensor:
        """Return the output before a residual is added and the sum is normalised."""
        ...

    def residual(self, x: Tensor) -> Tensor | None:
        """Return the residual that is added to `hidden(x)`, or None."""

    def norm(self, h: Tensor) -> Tensor:
        """Normalise h, the sum of the output and the residual; return h itself if the layer has no norm."""
        ...

    def close(self, h: Tensor, x: Tensor, whole: bool = True) -> Tensor:
        """Return the output that the layer would have if `hidden(x)` were h.

        If `whole` is false, this output includes neither the residual nor the norm.
        """
        ...


@dataclass_transform(frozen_default=True, eq_default=False, kw_only_default=True, field_specifiers=(tensor, attribute))
class Update:
    """The change that one method makes at one target. Subclasses automatically become frozen, keyword-only dataclasses.

    Class attributes:
        kind: `additive`, `weight`, `output` or `context`; the base class of each kind sets it.
        since: for each version of the method (1, 2, ...), the version of the spec that introduced it. An empty string
            means that this version of the method can no longer be read.
        version: the newest version of the method; `stated_version` is the version that one update needs.
        blocks: the axes of the weight (`out`, `in`) along which the formula can be computed block by block.
        needs_bias: matters only if the update changes the bias, but the layer has no bias. If True, a merge refuses the
            update. Live models and ONNX graphs refuse it too, unless they can add the change of the bias to the layer's
            output. If False, the update is accepted, and the change of the bias is ignored.
        linear_only: True if the formula applies only to weights `[out, in]`, which linear layers and embeddings have.
        acts_on: a phrase for error messages that says what the update changes.
        rules: conditions on axes, attributes and tensors that shape strings cannot express; checked in this order.
        fits: conditions on the weight `[out, in, *k]`. A condition can use the sizes `out` and `in`, `columns` (the
            product of `in` and the kernel sizes), and `kernel` (the number of kernel axes).
        forms: groups of alternatives. Each alternative is a set of optional tensors, and exactly one alternative of
            each group must be present. The alternative `()` means that none of the group's tensors is present.
        frozen: names of floating-point tensors that are not trained, such as random projections and masks; integer
            tensors are never trained.
        bias_sees_weight: True if the change of the bias depends on the weight; if so, call `settled` before
            `new_bias`.
        sizes: the default sizes of the axes that a new update has in addition to the weight's axes.
        starts_at_base: True if a new update leaves the model's outputs unchanged. It is False for methods whose paper
            starts training with changed outputs.
        shared_as: tells which key of the merge option `tied` applies to the method's updates. If the value is `rows` or
            `replacement`, the key has the same name. If the value is `layer` (the default), the key is `head` for an
            update of the head, and `embedding` for any other update.
        dropout: which values dropout drops in training, as in PEFT. `input`: elements of the input to which the change
            is applied. `rows`: rows of the change. `scaled rows`: rows of the change, while the remaining rows are
            scaled up to compensate. `blocks`: blocks along a tensor's axis `n`. If the tensor also has an axis `m`,
            dropout chooses one index of `m` at random, and drops only blocks at this index.
        bound_to: the library or function that an implementation must use to compute the formula, for example because
            this function computes tensors that the file does not store. Empty for most methods.
        paper: the source of the formula.
        by_form: True if `check_against` depends on `form` only, not on the tensors' values; derived from the fields.
    """

    kind: ClassVar[str] = ""
    since: ClassVar[tuple[str, ...]] = ("1.0",)
    version: ClassVar[int] = 1
    rules: ClassVar[tuple[Rule, ...]] = ()
    fits: ClassVar[tuple[Rule, ...]] = ()
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
    # Store the names of the fields in class attributes, because torch.compile cannot read a dataclass's fields.
    _fields: ClassVar[tuple[str, ...]] = ()
    _names: ClassVar[tuple[str, ...]] = ()
    _tensors: ClassVar[dict[str, dataclasses.Field[object]]] = {}
    _attributes: ClassVar[dict[str, dataclasses.Field[object]]] = {}
    _axes: ClassVar[dict[str, tuple[Axes, bool]]] = {}
    by_form: ClassVar[bool] = True
    _positions: ClassVar[bool] = False
    _rounds: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "version" in cls.__dict__ and "since" not in cls.__dict__:
            # A method that sets `version` itself, instead of `since`, supports only that version.
            cls.since = ("",) * (cls.version - 1) + ("1.0",)
        cls.version = len(cls.since)
        dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)(cls)
        fields = dataclasses.fields(cast(Any, cls))
        cls._tensors = {f.name: f for f in fields if "axes" in f.metadata}
        cls._attributes = {f.name: f for f in fields if "axes" not in f.metadata}
        cls._fields = tuple(f.name for f in fields if f.init)
        cls._names = tuple(cls._tensors)
        cls._axes = {name: (f.metadata["axes"], f.metadata["integer"]) for name, f in cls._tensors.items()}
        cls.by_form = not any(f.metadata["integer"] for f in cls._tensors.values())
        cls._positions = any(f.metadata["below"] or f.metadata["distinct"] for f in cls._tensors.values())
        # If an axis is a product or a quotient, bind all tensors twice. In the first round, the sizes of the names in
        # this axis may be unknown until a later tensor is bound.
        cls._rounds = 1 if all(axes.plain for axes, _ in cls._axes.values()) else 2

    def __repr__(self) -> str:
        # A tensor field may hold a value that is not a tensor and has no shape. The error about this value may show the
        # update, so this function must not fail.
        tensors = [f"{name}={list(getattr(leaf, 'shape', '?'))}" for name, leaf in self.tensors.items()]
        values = [f"{name}={value!r}" for name, value in self.attributes.items()]
        return f"{type(self).__name__}({', '.join([*tensors, *values])})"

    @property
    def method(self) -> str:
        """The method's name, which is the name of its module."""
        return type(self).__module__.rpartition(".")[2]

    @classmethod
    def tensor_fields(cls) -> dict[str, dataclasses.Field[object]]:
        """Return the tensor fields in order; `metadata["axes"]` is the parsed shape string."""
        return cls._tensors

    @classmethod
    def attribute_fields(cls) -> dict[str, dataclasses.Field[object]]:
        """Return the fields with plain values, in order."""
        return cls._attributes

    @property
    def tensors(self) -> dict[str, Leaf]:
        """The tensors that are present, keyed by field name."""
        leaves: dict[str, Leaf] = {}
        for name in self._names:
            leaf = getattr(self, name)
            if leaf is not None:
                leaves[name] = leaf
        return leaves

    @property
    def attributes(self) -> dict[str, Any]:
        """The plain values, keyed by field name; an integer in a float field becomes a float."""
        return {name: plain(getattr(self, name), field) for name, field in self.attribute_fields().items()}

    def attributes_of(self, version: int) -> dict[str, JsonValue]:
        """Return the values of those attributes that a version of the method has, keyed by field name."""
        fields = self.attribute_fields()
        return {
            name: value for name, value in self.attributes.items() if fields[name].metadata.get("since", 1) <= version
        }

    @property
    def stated_version(self) -> int:
        """The oldest version of the method that can express this update.

        If all attributes that a version introduced have their default values, the update does not require this version.
        """
        oldest = next(number for number, since in enumerate(self.since, 1) if since)
        newer = (f for f in self._attributes.values() if f.metadata.get("since", 1) > oldest)
        return max((f.metadata["since"] for f in newer if getattr(self, f.name) != f.default), default=oldest)

    def map(self, f: Callable[[Leaf], Leaf]) -> Self:
        """Return the same update with each tensor replaced by `f(tensor)`."""
        return self.replace(**{name: f(leaf) for name, leaf in self.tensors.items()})

    @classmethod
    def from_fields(cls, **fields: object) -> Self:
        """Return an update with these field values. Type checkers do not check the values; `check` does."""
        return cls(**fields)

    def replace(self, **changes: object) -> Self:
        """Return the same update with other field values."""
        # Do not use `dataclasses.replace`, which takes twice as long. When stacked updates are split into experts, this
        # function is called for tens of thousands of experts.
        return self.from_fields(**{name: getattr(self, name) for name in self._fields} | changes)

    @property
    def form(self) -> Hashable:
        """Everything about the update except the values of its tensors: class, plain values, shapes and dtypes.

        Updates with equal forms have equal `dims` and pass the same `check`. A model's tens of thousands of targets
        have a few dozen forms, so each form is checked only once.
        """
        values = [getattr(self, name) for name in self._attributes]
        # Include the types: 1, 1.0 and True are equal in Python, but `check` distinguishes them.
        return type(self), self._tensor_forms(), *values, *map(type, values)

    def _tensor_forms(self) -> TensorForms:
        """Return the field name, dtype and shape of each tensor that is present."""
        forms = []
        for name in self._names:
            leaf = getattr(self, name)
            if leaf is not None:
                try:
                    forms.append((name, dtype_of(leaf).name, tuple(leaf.shape)))
                except UsageError as error:
                    raise error.at(where=name) from None
            elif not self._tensors[name].metadata["optional"]:
                raise UsageError("the tensor is missing", where=name, cure=f"Pass {name}=")
        return tuple(forms)

    def dims(self, stack: bool = False) -> Dims:
        """Return the sizes of all named axes, computed from the tensors' shapes and the method's rules.

        Args:
            stack: True if every tensor has a leading axis `e`, one slice per expert.

        Raises:
            Malformed: the present tensors are not a valid combination (see `forms`), or a rule whose `error` is
                `Malformed` does not hold.
            ShapeMismatch: the tensors contradict their shape strings or each other, or have the wrong dtype; or any
                other rule does not hold.
        """
        if self.forms:
            self._check_forms()
        dims = dict(_solved(cast(Hashable, type(self)), stack, self._tensor_forms()))
        if self.rules:
            apply_rules(self, dims, stack)
        return dims

    def check(self) -> None:
        """Check all attribute values, and which tensors are present. Methods with further checks extend this function.

        Raises:
            Malformed: a value has the wrong type, is not finite or is out of range, or the present tensors are not a
                valid combination.
            Unsupported: a value is not one of the attribute's allowed values (`among`).
        """
        for name, field in self.attribute_fields().items():
            check_attribute(name, getattr(self, name), field)
        self._check_forms()
        if not self.tensors:
            raise Malformed(f"the update needs at least one of: {', '.join(self._names)}", cure=DAMAGED)

    def _check_forms(self) -> None:
        """Check that exactly one alternative of each group in `forms` is present."""
        for group in self.forms:
            present = {name for names in group for name in names if getattr(self, name) is not None}
            if present not in [set(names) for names in group]:
                choices = " or ".join(" and ".join(names) or "none" for names in group)
                raise Malformed(f"the update needs exactly one of these sets of tensors: {choices}", cure=DAMAGED)

    @property
    def file(self) -> str | None:
        """The file that the tensors will be read from; None if they are already loaded, or if the file is unknown."""
        files = (as_lazy(leaf).file for leaf in self.tensors.values())
        return next((file for file in files if file is not None), None)

    def check_values(self) -> None:
        """Read every tensor and check its values. Methods with further checks extend this function.

        Raises:
            Malformed: a tensor contains a NaN or an infinity (the message names the field and the first position), or
                a position in the weight is out of range or repeated.
        """
        for name, leaf in self.tensors.items():
            check_finite(leaf, name)
        if not self._positions:
            return
        for name, why in misplaced(self, {}):
            raise Malformed(why, where=name, cure=DAMAGED)
        self.check_distinct()

    def check_distinct(self) -> None:
        """If the method forbids repeated positions, check that no position repeats.

        Raises:
            Malformed: a position repeats.
        """
        if self._positions and (name := repeated(self)):
            raise Malformed("the same position occurs twice", where=name, cure=DAMAGED)

    def check_against(self, shape: tuple[int, ...]) -> None:
        """Check that the update fits a weight of shape `[out, in, *k]`.

        The function checks the number of axes, the conditions in `fits`, and that all positions are inside the weight.

        Raises:
            ShapeMismatch: the update does not fit.
        """
        self.check_axes(shape)
        check_fits(self, shape)
        if not self._positions:
            return
        for name, why in misplaced(self, dict(zip(("out", "in"), shape, strict=False))):
            raise ShapeMismatch(f"{name}: {why}", cure=USE_ITS_BASE)

    def largest_shape(self) -> tuple[int, ...] | None:
        """Return the shape `[out, in, *k]` of the largest weight that the update's tensors fit.

        Return None if the tensors do not determine a largest size. A method overrides this function if weights of
        several sizes share the same tensors. For all other methods, the function returns None.
        """
        return None

    @classmethod
    def check_axes(cls, shape: tuple[int, ...]) -> None:
        """Check that the formula applies to weights with as many axes as `shape` has.

        Raises:
            ShapeMismatch: the formula does not apply to such weights.
        """
        if cls.linear_only and len(shape) != 2:
            why = f"{cls.__name__} changes only weights [out, in]; this weight has the shape {list(shape)}"
            raise ShapeMismatch(why, cure="Remove this target from the adapter")

    def cuts(self, axis: str) -> bool:
        """Whether this update can be split along an axis. By default, the axes in `blocks` can be split."""
        return axis in self.blocks

    def block(self, axis: str, start: int, stop: int) -> Self:
        """Return the update for one block of the weight: the indices `start` to `stop - 1` along a named axis."""
        changes = {}
        for name, leaf in self.tensors.items():
            position = self.tensor_fields()[name].metadata["axes"].index(axis)
            if position is not None:
                changes[name] = _narrow(cast("torch.Tensor", leaf), position, start, stop)
        return self.replace(**changes)

    def expert(self, index: int) -> Self:
        """Return one expert's update from a stacked update: slice `index` of each tensor's leading axis."""
        return self.map(lambda leaf: cast("torch.Tensor", leaf)[index])

    @classmethod
    def initial(cls, W: torch.Tensor, b: torch.Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        """Return a new, untrained update of a weight. The new update changes nothing if `starts_at_base` is True.

        Args:
            W: the weight `[out, in, *k]`.
            b: the bias `[out]`, or None.
            rank: the rank, for methods that have one.
            random: a function that takes a shape and returns a tensor in W's dtype, with values drawn uniformly from -1
                to 1.
            attributes: the plain values of the method, keyed by field name.

        Raises:
            Unsupported: the method does not define initial values for its tensors.
        """
        raise Unsupported(f"{cls.__name__} has no initial value", cure="Build the update from tensors instead")

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, torch.Tensor]:
        """Return the tensors that new updates of several weights share, keyed by field name; pass them to `initial`."""
        return {}

    @property
    def changes_weight(self) -> bool:
        """Whether the update gives the layer a new weight; see `new_weight`."""
        return False

    @property
    def changes_bias(self) -> bool:
        """Whether the update gives the layer a new bias; see `new_bias`."""
        return False

    def new_weight(self, W: torch.Tensor) -> torch.Tensor:
        """Return W' `[out, in, *k]`; if W is a block of the weight, return the same block of W'.

        Raises:
            NotMergeable: the update changes outputs or context, not only weights.
        """
        raise NotMergeable(
            f"{self.method} changes {self.acts_on}, not its weights",
            cure=INJECT_INSTEAD,
        )

    def settled(self, W: torch.Tensor) -> Self:
        """Return an update with the same effect on a layer with the weight W `[out, in, *k]`.

        The new update stores everything about W that `new_bias` needs.
        """
        return self

    def settled_at(self, W: torch.Tensor, stacked: bool) -> Self:
        """Call `settled` for a weight `[out, in, *k]` or, if `stacked`, for each expert of `[e, out, in, *k]`."""
        if not stacked or not self.bias_sees_weight:
            return self.settled(W)
        experts = [self.expert(index).settled(W[index]) for index in range(len(W))]
        stack = namespace(W).stack
        return experts[0].replace(
            **{
                name: stack([cast("torch.Tensor", expert.tensors[name]) for expert in experts])
                for name in experts[0].tensors
            }
        )

    def new_bias(self, b: torch.Tensor) -> torch.Tensor:
        """Return b' `[out]`."""
        return b

    def without_bias(self) -> Update:
        """Return an update that has the same effect as this update on a layer without a bias.

        If possible, the new update has a method that more formats support.
        """
        return self

    def forward(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Return the layer's new output y' for the input `x`; both may be arrays or symbolic values of a graph."""
        raise NotMergeable(f"{self.method} has no forward formula", cure="Merge the adapter instead")


TensorForms = tuple[tuple[str, str, tuple[int, ...]], ...]
"""The field name, dtype name and shape of each tensor of an update."""


@lru_cache(maxsize=1 << 10)
def _solved(method: type[Update], stack: bool, leaves: TensorForms) -> Dims:
    """Return the sizes of all named axes. The result is cached: thousands of updates have the same few shapes."""
    for name, dtype, _ in leaves:
        _check_dtype(name, DTYPES[dtype], method._axes[name][1])
    dims: Dims = {}
    for name, _, shape in leaves * method._rounds:
        axes = method._axes[name][0]
        (Axes.parse(f"e {axes.text}") if stack else axes).bind(shape, dims, name)
    return dims


def _narrow(leaf: torch.Tensor, axis: int, start: int, stop: int) -> torch.Tensor:
    """Return the slice `start:stop` along `axis`; a negative `axis` is counted from the last axis."""
    whole, here = slice(None), slice(start, stop)
    key: tuple[Any, ...] = (*[whole] * axis, here) if axis >= 0 else (..., here, *[whole] * (-axis - 1))
    return leaf[key]


def _check_dtype(name: str, dtype: DType, integer: bool) -> None:
    fits = not dtype.floating and dtype.name != "BOOL" if integer else dtype.floating and dtype.name != "C64"
    if not fits:
        expected = "integers" if integer else "real numbers"
        raise ShapeMismatch(f"the tensor has dtype {dtype}, but must hold {expected}", where=name, cure=DAMAGED)
