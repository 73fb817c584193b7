"""Combine several adapters in one model with AdapterHub's composition blocks (https://docs.adapterhub.ml).

`stack`, `average`, `split` and `fuse` combine several adapters into one. The result can be injected, weighted, switched
and trained like any other adapter, and can be combined again. `batch_split` and `parallel` send the rows of a batch
through different adapters that are already attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.adapter import Adapter, Target, check_adapter
from ..core.arguments import checks_types, weights_of
from ..core.metadata import DROPOUT_LIST, combined_dropouts
from ..core.shapes import Dims
from ..core.updates import OutputUpdate, Update, tensor
from ..errors import PASS_AN_ADAPTER, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ..formats import FORMATS
from ..formats.adapterhub.setup import Setup, read_fusion, read_setup
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..linalg.activations import softmax
from ..linalg.namespace import namespace
from ..methods._bottleneck import Narrow
from ..naming.moves import same_end
from .routing import route

if TYPE_CHECKING:
    from ..core.updates.update import Layer
    from ..io.lazy import Leaf

    Base = Checkpoint | str | PathLike[str]

T = TypeVar("T")

__all__ = ["average", "batch_split", "fuse", "load", "parallel", "split", "stack"]


@checks_types
def stack(*adapters: Adapter) -> Adapter:
    """Return an adapter that applies the given adapters in sequence.

    Each adapter acts on the layer with all earlier adapters applied. If adapters share a target, their weight changes
    are added, and their virtual tokens are concatenated.
    """
    updates: dict[Target, tuple[Update, ...]] = {}
    for adapter in _some(adapters):
        check_adapter(adapter)
        for target, group in adapter.updates.items():
            updates[target] = (*updates.get(target, ()), *group)
    return _composed("stack", updates, adapters)


@checks_types
def average(*adapters: Adapter, weights: Sequence[float] | None = None) -> Adapter:
    """Return an adapter that computes, at each layer, the weighted sum of the outputs that the single adapters give.

    If the adapters act before the layer's residual and norm, the outputs are summed before the residual and the norm.
    If an adapter has no update at a target, it contributes the output of the unchanged layer.

    Args:
        adapters: adapters that have only additive and output updates.
        weights: one weight for each adapter; they are not normalised. If not given, the weights are equal and their sum
            is 1.

    Raises:
        UsageError: the number of weights is not the number of adapters, or a weight is not a finite number.
        Unsupported: an adapter has an update that is neither additive nor an output update.
    """
    count = len(_some(adapters))
    shares = tuple(1 / count for _ in adapters) if weights is None else tuple(weights_of(weights, count))
    return _blocks("average", adapters, lambda children, _: Average(children=children, weights=shares))


@checks_types
def split(*adapters: Adapter, sizes: Sequence[int]) -> Adapter:
    """Return an adapter that splits the tokens: the first adapter acts on the first `sizes[0]` tokens, and so on.

    Raises:
        UsageError: the number of sizes is not the number of adapters, or a size is not a whole number of at least 0.
        Unsupported: an update is neither additive nor an output update, or it reads arguments of the model's call. The
            call of the model raises this error if the layer is a convolution.
        ShapeMismatch: when the model is called, the number of tokens is not the sum of the sizes.
    """
    if len(sizes) != len(_some(adapters)):
        cure = "Pass one size for each adapter"
        raise UsageError(f"{len(sizes)} sizes for {len(adapters)} adapters", where="sizes", cure=cure)
    _check_sizes(sizes)
    return _blocks("split", adapters, lambda children, _: SplitBlock(children=children, lengths=tuple(sizes)))


def _check_sizes(sizes: Sequence[int]) -> None:
    # Slices take a negative size for a position counted from the end.
    wrong = next((size for size in sizes if not hasattr(size, "__index__") or size < 0), None)
    if wrong is not None:
        cure = "Pass whole numbers of at least 0"
        raise UsageError(f"{wrong!r} is not a number of tokens or rows", where="sizes", cure=cure)


@checks_types
def fuse(*adapters: Adapter, fusion: str | PathLike[str]) -> Adapter:
    """Return an adapter that applies AdapterFusion: at each layer, attention over the outputs of all bottlenecks.

    Args:
        adapters: the adapters, in the order in which the fusion was trained.
        fusion: a folder with the fusion's weights, as AdapterHub saves them.

    Raises:
        TargetNotFound: the fusion has no weights for one of the adapters' targets.
        Unsupported: at one of the targets, an adapter does not have exactly one sequential bottleneck.
    """
    settings, weights = read_fusion(fusion)

    def block_of(children: tuple[Child, ...], target: Target) -> ComposedBlock:
        weights_here: Any = next(
            (weights_of_path for path, weights_of_path in weights.items() if same_end(path, target.path)), None
        )
        if weights_here is None:
            raise TargetNotFound(
                "the fusion has no weights for this target", where=str(target), cure="Pass the fusion of these adapters"
            )
        return Fuse(children=children, **weights_here, **settings)

    return _blocks("fuse", adapters, block_of)


@checks_types
def load(folder: str | PathLike[str], *, base: Base | None = None) -> Adapter:
    """Read a composition that AdapterHub's `save_adapter_setup` wrote, and return it as one adapter.

    Args:
        folder: the folder with `adapter_setup.json` and one subfolder for each adapter and fusion.
        base: the base model; only needed for adapters that cannot be read without it. See `ak.read`.

    Raises:
        Unsupported: the composition contains BatchSplit or Parallel. These blocks route rows to several adapters, so
            one adapter cannot replace them.
    """
    return _loaded(read_setup(folder), Path(folder), base)


def _loaded(setup: Setup | str, folder: Path, base: Base | None) -> Adapter:
    if isinstance(setup, str):
        checkpoint = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
        return FORMATS["adapterhub"]().read(folder / setup, base=checkpoint)
    if setup.kind not in ("Average", "Fuse", "Split", "Stack"):
        why, cure = (
            f"{setup.kind} sends rows through several adapters, so it is not one adapter",
            "Inject the adapters under their names, and use batch_split() or parallel()",
        )
        raise Unsupported(why, path=folder, cure=cure)
    children = [_loaded(child, folder, base) for child in setup.children]
    if setup.kind == "Average":
        return average(*children, weights=setup.numbers)
    if setup.kind == "Split":
        return split(*children, sizes=[int(size) for size in setup.numbers])
    return stack(*children) if setup.kind == "Stack" else fuse(*children, fusion=folder / setup.fusion)


@checks_types
def batch_split(model: nn.Module, names: Sequence[str | None], sizes: Sequence[int]) -> AbstractContextManager[None]:
    """Return a context manager that routes the first `sizes[0]` rows to the adapter `names[0]`, and so on.

    See `route`.
    """
    if len(sizes) != len(names):
        cure = "Pass one size for each adapter"
        raise UsageError(f"{len(sizes)} sizes for {len(names)} adapters", where="sizes", cure=cure)
    _check_sizes(sizes)
    return route(model, [name for name, size in zip(names, sizes, strict=True) for _ in range(size)])


@checks_types
def parallel(model: nn.Module, names: Sequence[str | None]) -> Callable[..., object]:
    """Return a function that runs the model with each adapter on the same input, in one batch.

    The output contains all rows from the first adapter, then all rows from the next adapter, and so on.

    Args:
        model: the model, with the adapters attached.
        names: a list of the adapters' names. An element None stands for the base without adapters.

    Raises:
        UsageError: `names` is empty.
    """
    names = _some(names)

    def run(*args: object, **kwargs: object) -> object:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors:
            cure = "Pass tensors whose first axis is the batch"
            raise ShapeMismatch("the call has no tensors to repeat for each adapter", where="(model)", cure=cure)
        rows = len(tensors[0])

        def repeated(leaf: object) -> object:
            if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != rows:
                return leaf
            return torch.cat([leaf] * len(names))

        some, named = pytree.tree_map(repeated, (args, kwargs))
        with route(model, [name for name in names for _ in range(rows)]):
            return model(*some, **named)

    return run


def _blocks(
    name: str, adapters: Sequence[Adapter], block_of: Callable[[tuple[Child, ...], Target], ComposedBlock]
) -> Adapter:
    """Return an adapter with one block at each target that at least one of the given adapters has."""
    for adapter in adapters:
        check_adapter(adapter)
    targets = dict.fromkeys(target for adapter in adapters for target in adapter.updates)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target in targets:
        updates_of_each = [adapter.updates.get(target, ()) for adapter in adapters]
        if any(update.kind == "context" for each in updates_of_each for update in each):
            why = f"a block {name!r} cannot contain context updates"
            raise Unsupported(why, where=str(target), cure="Combine these adapters with stack()")
        updates[target] = (block_of(tuple(map(_one, updates_of_each)), target),)
    return _composed(name, updates, adapters)


def _one(updates: Sequence[Update]) -> Update | None:
    if len(updates) < 2:
        return updates[0] if updates else None
    return Chain(children=tuple(updates))


def _composed(name: str, updates: Mapping[Target, tuple[Update, ...]], adapters: Sequence[Adapter]) -> Adapter:
    """Return the composed adapter. The last step of its lineage contains the lineages and dropouts of `adapters`.

    `inject` needs them: a tool's forward may depend on the layer, such as on the padding of a convolution.
    """
    # If all adapters were read from the same format, start the result's lineage with their "read" step.
    read = [tuple(step for step in adapter.recipe if step.op == "read") for adapter in adapters]
    sources = {tuple((step.args.get("format"), step.args.get("compat")) for step in steps) for steps in read}
    lineage = read[0] if len(sources) == 1 else ()
    of: Any = [{"base": None, "recipe": [{"op": s.op, "args": dict(s.args)} for s in each.recipe]} for each in adapters]
    dropouts: list[Any] = [*combined_dropouts(adapters)]
    adapter = Adapter(updates, recipe=lineage).step(name, of=of, **{DROPOUT_LIST: dropouts})
    adapter.validate()
    return adapter


def _some(adapters: Sequence[T]) -> Sequence[T]:
    if not adapters:
        raise UsageError("there are no adapters to compose", where="adapters", cure=PASS_AN_ADAPTER)
    return adapters


Child = Update | None
"""An adapter's update at the target; None if the adapter has no update there and leaves the layer unchanged."""


class ComposedBlock(OutputUpdate):
    """A composition block: several updates of one target. A subclass combines their outputs in its method `joined`."""

    children: tuple[Child, ...] = ()

    @property
    def method(self) -> str:
        return type(self).__name__.lower()

    @property
    def present(self) -> list[Update]:
        """The children that are not None."""
        return [child for child in self.children if child is not None]

    @property
    def tensors(self) -> dict[str, Leaf]:
        return {**super().tensors, **dict(self._leaves())}

    def _leaves(self) -> Iterator[tuple[str, Leaf]]:
        for position, child in enumerate(self.children):
            if child is not None:
                yield from ((f"{position}.{name}", leaf) for name, leaf in child.tensors.items())

    @property
    def attributes(self) -> dict[str, object]:
        # The last child can stand for all children: if the block acts before the residual, `check` refuses children
        # that differ in `residual` or `norm`.
        return {name: self.present[-1].attributes.get(name, "") for name in ("residual", "norm")}

    @property
    def frozen(self) -> frozenset[str]:  # type: ignore[override]
        children = enumerate(self.children)
        return frozenset(f"{at}.{name}" for at, child in children if child is not None for name in child.frozen)

    @property
    def asks(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple({word for child in self.present for word in getattr(child, "asks", ())})

    @property
    def hears(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple({word for child in self.present for word in getattr(child, "hears", ())})

    @property
    def placed(self) -> bool:  # type: ignore[override]
        return all(isinstance(child, OutputUpdate) and child.placed for child in self.present)

    @property
    def whole(self) -> bool:
        last = self.present[-1]
        return last.whole if isinstance(last, OutputUpdate) else True

    @property
    def channels(self) -> int | None:
        counts = (child.channels for child in self.present if isinstance(child, OutputUpdate))
        return next((count for count in counts if count is not None), None)

    def map(self, f: Callable[[Leaf], Leaf]) -> Self:
        mapped = {name: f(leaf) for name, leaf in super().tensors.items()}
        return super().replace(children=tuple(None if c is None else c.map(f) for c in self.children), **mapped)

    def replace(self, **changes: Any) -> Self:
        inner: dict[int, dict[str, Any]] = {}
        for name in [name for name in changes if "." in name]:
            position, _, field = name.partition(".")
            inner.setdefault(int(position), {})[field] = changes.pop(name)
        given = changes.pop("children", self.children)
        children = tuple(c if at not in inner else c.replace(**inner[at]) for at, c in enumerate(given))
        return super().replace(children=children, **changes)

    def dims(self, stack: bool = False) -> Dims:
        for child in self.present:
            child.dims(stack)
        return {}

    def check(self) -> None:
        places = set()
        for child in self.present:
            if child.kind not in ("additive", "output"):
                why = f"{child.method} changes {child.acts_on}, which composition blocks do not support"
                raise Unsupported(why, cure="Combine the adapters with stack(), or merge them")
            child.check()
            places.add((child.attributes.get("residual", ""), child.attributes.get("norm", "")))
        if len(places) > 1 and self.placed:
            why = "the updates at one target differ in `residual` or `norm`"
            raise Unsupported(why, cure="Give all updates at this target the same `residual` and `norm`")

    def check_against(self, shape: tuple[int, ...]) -> None:
        for child in self.present:
            child.check_against(shape)

    def value(self, child: Child, x: Tensor, layer: Layer) -> Tensor:
        """Return the layer's output with a child applied, or the unchanged output if the child is None.

        If this block acts before the residual and the norm, the output does not include them.
        """
        if child is None:
            return layer.hidden(x) if self.placed else layer(x)
        y: Tensor = cast(OutputUpdate, child).inside(x, layer) if self.placed else child.forward(x, layer)
        return y

    def inside(self, x: Tensor, layer: Layer) -> Tensor:
        return self.joined(x, layer)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return super().forward(x, layer) if self.placed else self.joined(x, layer)

    def joined(self, x: Tensor, layer: Layer) -> Tensor:
        """Return the block's output, computed from the layer's outputs with the children applied."""
        raise AssertionError("each block defines it")


class Chain(ComposedBlock):
    """Apply the children in sequence: each child acts on the layer with all earlier children applied."""

    def joined(self, x: Tensor, layer: Layer) -> Tensor:
        from ..core.updates import Composed

        *before, last = self.present
        for child in before:
            layer = Composed(layer, child)
        return self.value(last, x, layer)


class Average(ComposedBlock):
    """Apply each child to the layer separately, and return the weighted sum of the outputs."""

    weights: tuple[float, ...] = ()

    def joined(self, x: Tensor, layer: Layer) -> Tensor:
        values = [weight * self.value(c, x, layer) for c, weight in zip(self.children, self.weights, strict=True)]
        return sum(values[1:], values[0])


class SplitBlock(ComposedBlock):
    """Apply each child to its own range of token positions. The ranges are contiguous and start at position 0."""

    lengths: tuple[int, ...] = ()

    def check(self) -> None:
        super().check()
        if self.asks:
            why = "a formula that reads arguments of the model's call cannot run on only some token positions"
            raise Unsupported(why, cure="Omit this adapter from split()")

    def joined(self, x: Tensor, layer: Layer) -> Tensor:
        if layer.channel != -1:
            why = "a split needs an axis of tokens, which the input of a convolution does not have"
            raise Unsupported(why, cure="Omit this target from the adapters")
        ids = not x.is_floating_point()  # An embedding gets token ids, which have no axis of channels.
        count = x.shape[-1 if ids else -2]
        if sum(self.lengths) != count:
            why = f"the input has {count} positions, but the split is {list(self.lengths)}"
            raise ShapeMismatch(why, cure=f"Call the model with {sum(self.lengths)} tokens")
        values, start = [], 0
        for child, size in zip(self.children, self.lengths, strict=True):
            part = Positions(layer, x, slice(start, start + size))
            some = x[..., part.positions] if ids else part.cut(x)
            values.append(self.value(child, some, part))
            start += size
        joined: Tensor = namespace(x).concat(values, axis=-2)
        return joined


class Fuse(ComposedBlock):
    """AdapterFusion: `h' = residual + attention` (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247).

    The attention's query is computed from the layer's hidden state. Its keys and values are computed from the outputs
    of the layer's bottlenecks. `query`, `key` and `values` are None if the config does not use these projections.
    """

    query: Any = tensor("hidden hidden", optional=True)
    query_bias: Any = tensor("hidden", optional=True)
    key: Any = tensor("hidden hidden", optional=True)
    key_bias: Any = tensor("hidden", optional=True)
    values: Any = tensor("hidden hidden", optional=True)
    query_before_ln: bool = False
    residual_before: bool = False
    value_before_softmax: bool = True

    def check(self) -> None:
        super().check()
        for child in self.children:
            if not isinstance(child, Narrow) or child.parallel:
                why = "a fusion needs one sequential bottleneck from each adapter at each target"
                raise Unsupported(why, cure="Call average() instead of fuse()")

    def joined(self, x: Tensor, layer: Layer) -> Tensor:
        bottlenecks = cast(list[Narrow], self.children)
        hidden, residual = layer.hidden(x), layer.residual(x)
        read, skip = bottlenecks[-1].read(hidden, residual, layer)
        changes = namespace(hidden).stack([child.ungated(read, layer) for child in bottlenecks], axis=-2)
        values = changes + skip[..., None, :] if self.residual_before else changes
        q = _mapped(hidden if self.query_before_ln else read, self.query, self.query_bias)
        k = _mapped(values, self.key, self.key_bias)
        shares = softmax((k @ q[..., None])[..., 0])
        if self.value_before_softmax:
            values = _mapped(values, self.values)
        mixture: Tensor = (shares[..., None, :] @ values)[..., 0, :]
        mixture = mixture if self.value_before_softmax else _mapped(mixture, self.values)
        return mixture if self.residual_before else mixture + skip


class Positions:
    """A layer restricted to some positions of its input, with the interface of `Layer`."""

    def __init__(self, layer: Layer, x: Tensor, positions: slice) -> None:
        self.layer, self.x, self.positions = layer, x, positions
        self.op, self.zero_padded, self.mix = layer.op, layer.zero_padded, layer.mix
        self.per_channel, self.norm = layer.per_channel, layer.norm
        self.shape, self.channel = layer.shape, layer.channel
        self.call: Mapping[str, object] = {}

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def cut(self, whole: Tensor) -> Tensor:
        return whole[..., self.positions, :]

    def __call__(self, x: Tensor) -> Tensor:
        return self.cut(self.layer(self.x))

    def hidden(self, x: Tensor) -> Tensor:
        return self.cut(self.layer.hidden(self.x))

    def residual(self, x: Tensor) -> Tensor | None:
        residual = self.layer.residual(self.x)
        return None if residual is None else self.cut(residual)

    def close(self, h: Tensor, x: Tensor, whole: bool = True) -> Tensor:
        # The layer closes the hidden states of all positions, so put h between those of the other positions.
        hidden, at = self.layer.hidden(self.x), self.positions
        every = namespace(h).concat((hidden[..., : at.start, :], h, hidden[..., at.stop :, :]), axis=-2)
        return self.cut(self.layer.close(every, self.x, whole))


def _mapped(x: Tensor, W: Tensor | None, b: Tensor | None = None) -> Tensor:
    if W is None:
        return x
    return x @ W.mT if b is None else x @ W.mT + b
