"""Blocks: several adapters' updates of one target as one update, which lives in a model and is no method.

What is combined is what each makes of the layer before its residual and norm come on, as far as all of them stand
there, so that the layer ends once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, cast

from ..core.updates import OutputUpdate, Update, tensor
from ..errors import ShapeMismatch, Unsupported
from ..linalg.activations import softmax
from ..linalg.namespace import namespace
from ..methods._bottleneck import Narrow

Child = Update | None
"""An adapter's update at the target; None where it has none, so that the layer stays as it is."""


class Block(OutputUpdate):
    """A subclass says in `joined` what becomes of its children's values."""

    children: tuple[Any, ...] = ()

    @property
    def method(self) -> str:
        return type(self).__name__.lower()

    @property
    def present(self) -> list[Update]:
        """The children that are there."""
        return [child for child in self.children if child is not None]

    @property
    def tensors(self) -> dict[str, Any]:
        return {**super().tensors, **dict(self._leaves())}

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        for position, child in enumerate(self.children):
            if child is not None:
                yield from ((f"{position}.{name}", leaf) for name, leaf in child.tensors.items())

    @property
    def attributes(self) -> dict[str, Any]:
        # Where the residual and the norm are; children that stand at several places are refused below.
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
        told = (child.channels for child in self.present if isinstance(child, OutputUpdate))
        return next((count for count in told if count is not None), None)

    def map(self, f: Callable[[Any], Any]) -> Self:
        own = {name: f(leaf) for name, leaf in super().tensors.items()}
        return super().replace(children=tuple(None if c is None else c.map(f) for c in self.children), **own)

    def replace(self, **changes: Any) -> Self:
        inner: dict[int, dict[str, Any]] = {}
        for name in [name for name in changes if "." in name]:
            position, _, field = name.partition(".")
            inner.setdefault(int(position), {})[field] = changes.pop(name)
        given = changes.pop("children", self.children)
        children = tuple(c if at not in inner else c.replace(**inner[at]) for at, c in enumerate(given))
        return super().replace(children=children, **changes)

    def dims(self, stack: bool = False) -> dict[str, Any]:
        for child in self.present:
            child.dims(stack)
        return {}

    def check(self) -> None:
        places = set()
        for child in self.present:
            if child.kind not in ("additive", "output"):
                why = f"{child.method} changes {child.acts_on}, which blocks do not combine"
                raise Unsupported(why, cure="Stack it, or combine the adapters another way")
            child.check()
            places.add((child.attributes.get("residual", ""), child.attributes.get("norm", "")))
        if len(places) > 1 and self.placed:
            raise Unsupported("updates of one target with residuals at several places", cure="Make them alike")

    def check_against(self, shape: tuple[int, ...]) -> None:
        for child in self.present:
            child.check_against(shape)

    def value(self, child: Child, x: Any, layer: Any) -> Any:
        """What a child makes of the layer, before its end if the block stands there."""
        if child is None:
            return layer.hidden(x) if self.placed else layer(x)
        return cast(OutputUpdate, child).inside(x, layer) if self.placed else child.forward(x, layer)

    def inside(self, x: Any, layer: Any) -> Any:
        return self.joined(x, layer)

    def forward(self, x: Any, layer: Any) -> Any:
        return super().forward(x, layer) if self.placed else self.joined(x, layer)

    def joined(self, x: Any, layer: Any) -> Any:
        """What the block makes of its children."""
        raise AssertionError("each block defines it")


class Chain(Block):
    """One after the other: each sees the layer as those before it leave it."""

    def joined(self, x: Any, layer: Any) -> Any:
        from ..core.composed_layer import Composed

        *before, last = self.present
        for child in before:
            layer = Composed(layer, child)
        return self.value(last, x, layer)


class Average(Block):
    """The weighted sum of what all make of the layer."""

    weights: tuple[float, ...] = ()

    def joined(self, x: Any, layer: Any) -> Any:
        values = [weight * self.value(c, x, layer) for c, weight in zip(self.children, self.weights, strict=True)]
        return sum(values[1:], values[0])


class Split(Block):
    """Each changes positions of its own, which follow each other."""

    lengths: tuple[int, ...] = ()

    def check(self) -> None:
        super().check()
        if self.asks:
            raise Unsupported("a law that looks at the model's call, on some positions", cure="Leave it out of splits")

    def joined(self, x: Any, layer: Any) -> Any:
        if sum(self.lengths) != x.shape[-2]:
            why = f"{x.shape[-2]} positions, where the split is {list(self.lengths)}"
            raise ShapeMismatch(why, cure="Call the model with as many tokens")
        values, start = [], 0
        for child, size in zip(self.children, self.lengths, strict=True):
            part = Positions(layer, x, slice(start, start + size))
            values.append(self.value(child, part.cut(x), part))
            start += size
        return namespace(x).concat(values, axis=-2)


class Fuse(Block):
    """AdapterFusion: h' = residual + attention of the layer over what its bottlenecks change.

    Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247. `query`, `key` and `value` are left out where the config
    does without them.
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
                why = "fusion is of bottlenecks that are not parallel, with one of each adapter"
                raise Unsupported(why, cure="Average the adapters instead")

    def joined(self, x: Any, layer: Any) -> Any:
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
        found = (shares[..., None, :] @ values)[..., 0, :]
        found = found if self.value_before_softmax else _mapped(found, self.values)
        return found if self.residual_before else found + skip


class Positions:
    """A layer at some positions of its input, in the words of `OutputUpdate`."""

    def __init__(self, layer: Any, x: Any, positions: slice) -> None:
        self.layer, self.x, self.positions = layer, x, positions
        self.op, self.mix, self.per_channel, self.norm = layer.op, layer.mix, layer.per_channel, layer.norm
        self.shape, self.channel = layer.shape, layer.channel
        self.call: Mapping[str, Any] = {}

    def cut(self, whole: Any) -> Any:
        return whole[..., self.positions, :]

    def __call__(self, x: Any) -> Any:
        return self.cut(self.layer(self.x))

    def hidden(self, x: Any) -> Any:
        return self.cut(self.layer.hidden(self.x))

    def residual(self, x: Any) -> Any:
        found = self.layer.residual(self.x)
        return None if found is None else self.cut(found)


def _mapped(x: Any, W: Any, b: Any = None) -> Any:
    if W is None:
        return x
    return x @ W.mT if b is None else x @ W.mT + b
