"""Composition: several adapters in one model, in the blocks of AdapterHub's, https://docs.adapterhub.ml.

`stack`, `average`, `split` and `fuse` make one adapter of several, to be injected, weighed, switched and trained like
any other; blocks nest. `batch_split` and `parallel` send rows through adapters that are attached already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.adapter import Adapter, Target
from ..core.updates import OutputUpdate, Update, tensor
from ..errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ..formats import FORMATS
from ..formats.adapterhub.fusion import read_fusion
from ..formats.adapterhub.setup import Setup, read_setup
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..linalg.activations import softmax
from ..linalg.namespace import namespace
from ..methods._bottleneck import Narrow
from .routing import route

__all__ = ["average", "batch_split", "fuse", "load", "parallel", "split", "stack"]


def stack(*adapters: Adapter) -> Adapter:
    """One after the other: at each target a later adapter sees the layer as the earlier ones leave it.

    Updates of weights that meet there add up; virtual tokens follow each other.
    """
    updates: dict[Target, tuple[Update, ...]] = {}
    for adapter in _some(adapters):
        for target, found in adapter.updates.items():
            updates[target] = (*updates.get(target, ()), *found)
    return _composed("stack", updates)


def average(*adapters: Adapter, weights: Sequence[float] | None = None) -> Adapter:
    """The weighted mean of what the adapters make of each layer, before its residual and norm where they stand there.

    The unchanged layer counts in the place of an adapter that has no update at a target.

    Args:
        adapters: those with additive and output updates.
        weights: one each; equal shares of 1 if not given. They are used as they are.

    Raises:
        UsageError: another number of weights.
        Unsupported: raised by `inject`, for updates of other kinds.
    """
    count = len(_some(adapters))
    shares = tuple(1 / count for _ in adapters) if weights is None else tuple(map(float, weights))
    if len(shares) != count:
        raise UsageError(f"{len(shares)} weights for {count} adapters", where="weights", cure="Pass one each")
    return _blocks("average", adapters, lambda children, _: Average(children=children, weights=shares))


def split(*adapters: Adapter, sizes: Sequence[int]) -> Adapter:
    """Each adapter changes positions of its own: the first `sizes[0]` tokens, the next `sizes[1]`, and so on.

    Raises:
        UsageError: another number of sizes.
        ShapeMismatch: raised by a call with another number of tokens.
    """
    if len(sizes) != len(_some(adapters)):
        raise UsageError(f"{len(sizes)} sizes for {len(adapters)} adapters", where="sizes", cure="Pass one each")
    return _blocks("split", adapters, lambda children, _: SplitBlock(children=children, lengths=tuple(sizes)))


def fuse(*adapters: Adapter, fusion: str | PathLike[str]) -> Adapter:
    """AdapterFusion: at each layer an attention over what the adapters' bottlenecks change.

    Args:
        adapters: in the order of the fusion.
        fusion: the folder of AdapterHub's with the attentions' weights.

    Raises:
        TargetNotFound: the fusion has no weights at a target of the adapters'.
        Unsupported: raised by `inject`, for updates other than bottlenecks in sequence.
    """
    settings, weights = read_fusion(fusion)

    def made(children: tuple[Any, ...], target: Target) -> ComposedBlock:
        own: Any = next((held for path, held in weights.items() if _alike(path, target.path)), None)
        if own is None:
            raise TargetNotFound(
                "no weights of a fusion there", where=str(target), cure="Pass the adapters' own fusion"
            )
        return Fuse(children=children, **own, **settings)

    return _blocks("fuse", adapters, made)


def load(folder: str | PathLike[str], *, base: Any = None) -> Adapter:
    """One adapter of the composition that AdapterHub's `save_adapter_setup` wrote: its blocks are those of this module.

    Args:
        folder: with `adapter_setup.json`, and a folder for each adapter and fusion.
        base: for adapters that need it to be read, see `ak.read`.

    Raises:
        Unsupported: a block is one of rows, which is a matter of calls and not of an adapter.
    """
    return _loaded(read_setup(folder), Path(folder), base)


def _loaded(setup: Setup | str, folder: Path, base: Any) -> Adapter:
    if isinstance(setup, str):
        checkpoint = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
        return FORMATS["adapterhub"]().read(folder / setup, base=checkpoint)
    if setup.kind not in ("Average", "Fuse", "Split", "Stack"):
        why, cure = (
            f"{setup.kind} sends rows through several adapters",
            "Inject them by names; see batch_split, parallel",
        )
        raise Unsupported(why, path=folder, cure=cure)
    children = [_loaded(child, folder, base) for child in setup.children]
    if setup.kind == "Average":
        return average(*children, weights=setup.numbers)
    if setup.kind == "Split":
        return split(*children, sizes=[int(size) for size in setup.numbers])
    return stack(*children) if setup.kind == "Stack" else fuse(*children, fusion=folder / setup.fusion)


def batch_split(model: nn.Module, names: Sequence[str | None], sizes: Sequence[int]) -> AbstractContextManager[None]:
    """Inside the `with`, the first `sizes[0]` rows go through the adapter `names[0]`, and so on; see `route`."""
    if len(sizes) != len(names):
        raise UsageError(f"{len(sizes)} sizes for {len(names)} adapters", where="sizes", cure="Pass one each")
    return route(model, [name for name, size in zip(names, sizes, strict=True) for _ in range(size)])


def parallel(model: nn.Module, names: Sequence[str | None]) -> Callable[..., Any]:
    """The model with its input repeated once an adapter: what comes out has all rows of the first, then of the next.

    Args:
        model: with the adapters attached.
        names: their names; None for the base.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors:
            raise ShapeMismatch("a call without rows", where="(model)", cure="Call it with tensors, rows first")
        rows = len(tensors[0])

        def repeated(leaf: Any) -> Any:
            fits = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows
            return torch.cat([leaf] * len(names)) if fits else leaf

        some, named = pytree.tree_map(repeated, (args, kwargs))
        with route(model, [name for name in names for _ in range(rows)]):
            return model(*some, **named)

    return run


def _blocks(
    name: str, adapters: Sequence[Adapter], made: Callable[[tuple[Any, ...], Target], ComposedBlock]
) -> Adapter:
    """An adapter of blocks, one at each target of any of them."""
    targets = dict.fromkeys(target for adapter in adapters for target in adapter.updates)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target in targets:
        found = [adapter.updates.get(target, ()) for adapter in adapters]
        if any(update.kind == "context" for each in found for update in each):
            raise Unsupported(f"context in a block {name!r}", where=str(target), cure="Stack those adapters")
        updates[target] = (made(tuple(map(_one, found)), target),)
    return _composed(name, updates)


def _one(updates: Sequence[Update]) -> Update | None:
    if len(updates) < 2:
        return updates[0] if updates else None
    return Chain(children=tuple(updates))


def _composed(name: str, updates: Mapping[Target, tuple[Update, ...]]) -> Adapter:
    adapter = Adapter(updates).step(name)
    adapter.validate()
    return adapter


def _some(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    if not adapters:
        raise UsageError("nothing to compose", where="adapters", cure="Pass adapters")
    return adapters


def _alike(path: str, other: str) -> bool:
    """Whether two paths differ by a prefix at most."""
    return path == other or path.endswith(f".{other}") or other.endswith(f".{path}")


Child = Update | None
"""An adapter's update at the target; None where it has none, so that the layer stays as it is."""


class ComposedBlock(OutputUpdate):
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
        # They say where the residual and the norm are; children that stand at several places are refused below.
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
        """Return a child's output of the layer, before its end if the block stands there."""
        if child is None:
            return layer.hidden(x) if self.placed else layer(x)
        return cast(OutputUpdate, child).inside(x, layer) if self.placed else child.forward(x, layer)

    def inside(self, x: Any, layer: Any) -> Any:
        return self.joined(x, layer)

    def forward(self, x: Any, layer: Any) -> Any:
        return super().forward(x, layer) if self.placed else self.joined(x, layer)

    def joined(self, x: Any, layer: Any) -> Any:
        """Return the block's value from those of its children."""
        raise AssertionError("each block defines it")


class Chain(ComposedBlock):
    """One after the other: each sees the layer as those before it leave it."""

    def joined(self, x: Any, layer: Any) -> Any:
        from ..core.composed_layer import Composed

        *before, last = self.present
        for child in before:
            layer = Composed(layer, child)
        return self.value(last, x, layer)


class Average(ComposedBlock):
    """The weighted sum of what all make of the layer."""

    weights: tuple[float, ...] = ()

    def joined(self, x: Any, layer: Any) -> Any:
        values = [weight * self.value(c, x, layer) for c, weight in zip(self.children, self.weights, strict=True)]
        return sum(values[1:], values[0])


class SplitBlock(ComposedBlock):
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


class Fuse(ComposedBlock):
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
