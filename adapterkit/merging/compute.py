"""Compute the blocks of a merge in float64, and round once at the end.

Every adapter is applied to the base's weight W, not to the result of other adapters:
`W' = W + sum_i weight_i * (f_i(W) - W)`. So the order of the adapters does not matter. The order of the updates within
one adapter matters: f_i applies all updates of adapter i to the tensor, one after another.

With float64, each element of a 16-bit output differs from the exact result by at most 0.501 units in the last place,
even if W and the change nearly cancel. With float32, the error could be larger. The bound is above 0.5, because casts
from float64 to bf16 and fp8 go through float32.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

from ..core.adapter import Target, order_counts
from ..core.updates import Additive, Update
from ..errors import AdapterkitError, Malformed, Unsupported
from ..io.lazy import Lazy, as_lazy
from ..linalg.namespace import namespace
from ..linalg.philox import WORD, philox
from .arrays import NumpyArrays
from .blocks import Block, cut_to, part_of, view_of
from .compiled import THIN, LowRankBlocks, lowrank_blocks
from .planned import Output

if TYPE_CHECKING:
    import torch

    from ..io.lazy import Array, DType, Leaf
    from ..linalg.namespace import Numbers
    from .arrays import Arrays, Workspace
    from .planned_update import PlannedUpdate


Key = tuple[int, int]


def key_of(seed: int, name: str) -> Key:
    """Return the Philox key of a tensor: the first two little-endian words of the sha256 of `seed:name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def stochastic(values: Numbers, first: int, key: Key, dtype: DType) -> Numbers:
    """Round values stochastically to `dtype`, and return them as a flat float64 array.

    Each value is rounded to the next lower or the next higher value of `dtype`. The probabilities are such that the
    expected result equals the exact value.

    Args:
        values: flat float64 array. NaNs, infinities, and values that `dtype` represents exactly stay unchanged.
        first: the index in the tensor at which `values` begins.
        key: the Philox key of the tensor, see `key_of`.
        dtype: the dtype to round to, narrower than float64.
    """
    xp, unit = namespace(values), _unit(values, dtype)
    rounded = xp.floor(values / unit + draws(values, first, key)) * unit
    kept: Numbers = xp.where(xp.isfinite(values), rounded, values)
    return kept


def draws(like: Numbers, first: int, key: Key) -> Numbers:
    """Return a flat float64 array with a random number in [0, 1) for each element.

    The number for element i of the tensor is `word / 2^32`. Philox gives four words at counter `i div 4`, and `word` is
    the one with index `i mod 4`.

    Args:
        like: a flat array; the result has the same length, library and device.
        first: the index in the tensor at which `like` begins.
        key: the Philox key of the tensor.
    """
    from array_api_compat import device

    # Philox is a function of a counter. So an element gets the same number in any block, on any worker, and in a
    # resumed merge. Each counter value gives four words, and a block may begin or end in the middle of these four.
    xp, start = namespace(like), first // 4
    places = xp.arange(start, (first + len(like) + 3) // 4, dtype=xp.int64, device=device(like))
    none = places * 0
    words = philox((places & WORD, places >> 32, none, none), key)
    flat = xp.reshape(xp.stack(list(words), axis=-1), (-1,))
    numbers: Numbers = xp.astype(flat[first - 4 * start : first - 4 * start + len(like)], xp.float64) * 2.0**-32
    return numbers


def _unit(values: Numbers, dtype: DType) -> Numbers:
    """Return the spacing of the numbers of `dtype` around each element of `values`. Each spacing is a power of two."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype.array)  # type: ignore[no-untyped-call]
    xp = namespace(values)
    # A value divided by its mantissa (in [0.5, 1)) is exactly the next larger power of two. Below the smallest normal
    # number, the spacing is constant.
    mantissa: Any = _frexp(values)
    smallest = xp.zeros_like(values) + 2.0 ** int(info.minexp)
    safe = xp.where((mantissa == 0) | ~xp.isfinite(values), smallest * 0 + 1, mantissa)
    power = xp.where((mantissa == 0) | ~xp.isfinite(values), smallest, values / safe * 0.5)
    unit: Numbers = xp.where(power < smallest, smallest, power) * 2.0 ** -int(info.nmant)
    return unit


def _frexp(values: Numbers) -> Numbers:
    """Return the mantissas, with magnitudes in [0.5, 1). numpy and torch have frexp; the array API lacks it."""
    import numpy as np

    frexp: Any = getattr(values, "frexp", None)
    return cast("Numbers", (np.frexp(cast("Array", values)) if frexp is None else frexp())[0])


# Load and check the tensors of planned updates, and join the low-rank factors of several adapters.


Term = tuple["PlannedUpdate", list[Update], float]

LARGEST = 2.0**500
"""The largest allowed magnitude of a factor's element. The sum of 2**23 squares of such elements does not overflow."""


def load_all(fold: PlannedUpdate, arrays: Arrays) -> list[Update]:
    """Load the updates of a planned update into memory, in float64.

    If the change of a bias depends on the weight, the returned updates are settled (see `Update.settled`), so they do
    not need the weight.

    Raises:
        Malformed: a factor contains a NaN or an infinity.
    """
    if fold.seen is None:
        return [_load(update, fold, arrays) for update in fold.updates]
    # The changes of the bias depend on the weight. Settle them now, so that the weight need not stay in memory.
    W = arrays.load(fold.seen.tensor)
    if fold.target.rows is None and not fold.target.stacked:
        # If the base has more tokens than the adapter was trained with, ignore the rows of the additional tokens.
        W = W[: fold.shape[0]] if fold.axis == "out" else W[:, : fold.shape[0]]
    W = W if not fold.seen.before else W * 1
    for earlier in fold.seen.before:
        view = _whole_view(W, earlier)
        for update in load_all(earlier, arrays):
            view[...] = _whole_change(update, view, earlier.target.stacked)
    view, settled = _whole_view(W, fold), list[Update]()
    needing = sum(update.changes_bias for update in fold.seen.updates)
    for update in fold.seen.updates:
        loaded = _load(update, fold, arrays)
        if loaded.changes_bias:
            settled.append(loaded.settled_at(_tensor(view), fold.target.stacked))
        if len(settled) == needing:
            break
        if loaded.changes_weight:
            view = _whole_change(loaded, view, fold.target.stacked)
    return settled


def _whole_change(update: Update, W: Numbers, stacked: bool) -> Numbers:
    """Apply one update to a whole weight, and return the new weight. A stacked weight contains all experts."""
    if not stacked:
        return cast("Numbers", update.new_weight(_tensor(W)))
    xp = namespace(W)
    experts = [update.expert(e).new_weight(_tensor(W[e])) for e in range(W.shape[0])]
    return xp.stack(cast("list[Numbers]", experts))


def _whole_view(W: Numbers, fold: PlannedUpdate) -> Numbers:
    """Return a view of the target's rows in a stored weight, with the axes in the order that updates use.

    If the weight is stacked, the view contains all experts.
    """
    axis = int(fold.target.stacked)
    W = W if fold.axis == "out" else W.swapaxes(axis, axis + 1)
    return W if fold.target.rows is None else W[(slice(None),) * axis + (slice(*fold.target.rows),)]


def _load(update: Update, fold: PlannedUpdate, arrays: Arrays) -> Update:
    read = update.map(_read)
    try:
        read.check_values()
        _check_size(read)
    except AdapterkitError as error:
        # Add the file to the error here, because a loaded update does not know its file any more.
        error.at(path=update.file)
        error.where = f"{fold.target}: {update.method}" + (f".{error.where}" if error.where else "")
        raise
    return read.map(cast("Callable[[Leaf], Leaf]", arrays.load))


def _check_size(update: Update) -> None:
    """Refuse elements above `LARGEST`. If their squares overflow, DoRA divides by an infinite norm and writes zeros."""
    for name, leaf in update.tensors.items():
        tensor = as_lazy(leaf)
        # Check only float64, because no other dtype has numbers above 2^128.
        if tensor.dtype.name == "F64" and abs(tensor.numpy()).max(initial=0) > LARGEST:
            why = f"an element's magnitude is above {LARGEST:.0e}, so a norm may overflow float64"
            raise Unsupported(why, where=name, cure="Use an earlier checkpoint: the training diverged")


def _read(leaf: Leaf) -> Leaf:
    """Read the bytes of a leaf into memory, so that the check and the load do not both read the disk."""
    if not isinstance(leaf, Lazy):
        return leaf
    data = leaf.fetch()
    return Lazy(leaf.shape, leaf.dtype, lambda: data)


def norm_of(updates: list[Update], fold: PlannedUpdate) -> float:
    """Return the Frobenius norm of the sum of additive updates."""
    shape = fold.logical
    experts = range(fold.shape[0]) if fold.target.stacked else (None,)
    norms = []
    for expert in experts:
        parts = [u if expert is None else u.expert(expert) for u in updates]
        # A single update may be able to compute its norm without the product of its factors. For several updates, the
        # sum of the products is needed.
        if len(parts) == 1 and isinstance(parts[0], Additive):
            norms.append(parts[0].delta_norm(shape))
        else:
            total = sum(part.delta(shape) for part in parts if isinstance(part, Additive))
            norms.append(math.sqrt(float((total * total).sum())))  # type: ignore[union-attr]
    # Use hypot, because the square of a norm above 1e154 overflows.
    return math.hypot(*norms)


def is_thin(fold: PlannedUpdate, updates: Sequence[Update]) -> bool:
    """Whether the weight is one matrix, and all updates are products of rank `THIN` or less.

    If so, one product with the joined factors of all updates is faster than one product for each update.
    """
    if len(fold.shape) != 2 or fold.target.stacked:
        return False
    pairs = [update.pair(fold.logical) for update in updates if isinstance(update, Additive)]
    return len(pairs) == len(updates) and all(pair is not None and pair[1].shape[0] <= THIN for pair in pairs)


def side_by_side(terms: Sequence[Term], workspace: Workspace) -> Update:
    """Join the low-rank factors of several planned updates into one LoRA.

    The factor B of this LoRA is already multiplied by the weights of the planned updates.

    All planned updates must have the same `axis`. The joined factors are in the workspace, where the next call
    overwrites them.
    """
    from ..methods.lora import LoRA

    pairs = [(w, u.pair(fold.logical)) for fold, us, w in terms for u in additive(us)]
    factors = [(w, *pair) for w, pair in pairs if pair is not None]
    rank, rows, width = sum(len(A) for _, _, A in factors), len(factors[0][1]), factors[0][2].shape[1]
    A = workspace.take(rank * width, "A").reshape((rank, width))
    B = workspace.take(rows * rank, "B").reshape((rows, rank))
    at = 0
    for weight, b, a in factors:
        here = slice(at, at := at + len(a))
        A[here], B[:, here] = a, weight * b
    return LoRA(A=_tensor(A), B=_tensor(B), bias=None, scaling=1.0)


def additive(updates: Iterable[Update]) -> list[Additive]:
    """Return the additive updates among `updates`."""
    return [update for update in updates if isinstance(update, Additive)]


Folds = list[tuple["PlannedUpdate", list[Update]]]


class _Loaded:
    """The loaded updates of one output tensor, shared by all workers that compute blocks of the tensor.

    Without sharing, each worker would load the factors again. For an embedding of 150,000 rows, the factors need 20 MB.
    """

    def __init__(self, output: Output) -> None:
        # Keep a reference to the output. `_LOADED` uses its id as a key, and Python could give the id of a deleted
        # output to another output.
        self.output, self._lock, self._folds = output, Lock(), Folds()

    def folds(self, arrays: Arrays) -> Folds:
        """Return each planned update with its loaded updates. The first call loads them."""
        with self._lock:
            if not self._folds:
                self._folds = [(fold, load_all(fold, arrays)) for fold in self.output.folds]
            return self._folds


_LOADED: WeakValueDictionary[tuple[int, str], _Loaded] = WeakValueDictionary()
_LOCK = Lock()


def _loaded(output: Output, arrays: Arrays) -> _Loaded:
    """Return the shared `_Loaded` of an output tensor on a device; create it in the first call."""
    device = str(getattr(arrays, "device", "cpu"))
    with _LOCK:
        loaded = _LOADED.get((id(output), device))
        if loaded is None:
            loaded = _LOADED[id(output), device] = _Loaded(output)
        return loaded


LARGE = 1e30
"""If a change has at least this norm, results are checked for overflow even if the output dtype has float32's range."""


class BlockMerger:
    """Applies planned updates to the blocks of one output tensor. The updates' factors are loaded once, in float64.

    All `BlockMerger`s of a tensor share the factors, which stay in memory until the last of these objects is deleted.

    Raises:
        Malformed: a factor contains a NaN or an infinity.
    """

    def __init__(self, output: Output, workspace: Workspace) -> None:
        self.output, self.workspace, self.arrays = output, workspace, workspace.arrays
        self._loaded = _loaded(output, self.arrays)
        self.folds = self._loaded.folds(self.arrays)

    @cached_property
    def watched(self) -> bool:
        """Whether results could overflow although base and factors are finite. If so, `compute` checks the results."""
        narrow = self.output.dtype.itemsize < 4 and self.output.dtype.name != "BF16"
        return narrow or any(not fold.additive or not self._is_small(fold, us) for fold, us in self.folds)

    def _is_small(self, fold: PlannedUpdate, updates: list[Update]) -> bool:
        """Whether each element of a change is provably far below the largest float32.

        The proof computes the norm of a low-rank change, because no element is larger than the norm. For other changes,
        this would be expensive, so return False. The norm includes the adapter's weight and its scaling, because these
        can also be too large: for example, an alpha of 1e308 is finite, but the change overflows.
        """
        thin = not fold.bias and is_thin(fold, updates)
        return thin and abs(fold.weight) * norm_of(updates, fold) < LARGE

    def norms(self) -> dict[int, float]:
        """Return {index of a planned update: squared norm of its change} for changes that do not depend on the base."""
        # Cap the square, because a report needs a finite number. Use a multiplication, because `**` raises an error for
        # an overflow.
        largest = sys.float_info.max
        return {
            position: min((size := fold.weight * norm_of(updates, fold)) * size, largest)
            for position, (fold, updates) in enumerate(self.folds)
            if fold.additive and not fold.bias
        }

    def compute(self, raw: Numbers, out: Numbers, block: Block) -> dict[int, float]:
        """Compute one block of the merged tensor into `out`, from the base's block `raw`. Both arrays are flat.

        Returns:
            {index of a planned update: squared norm of its change}, for the changes that depend on the base.

        Raises:
            Malformed: the result overflows the output's dtype, or is NaN.
        """
        # Avoid float64 copies of the block, because memory bandwidth limits merges. A block without updates is only
        # cast. A sum of changes is added to the base in one operation. All other formulas need the float64 copy.
        watched = self.watched
        if not self.folds and self._key is None:
            self.arrays.assign(out, raw)
            return {}
        if self._key is not None:
            work = self._image(raw, block)
            norms = self._fold(work, block)
            self.arrays.assign(out, stochastic(work.reshape((-1,)), block.first, self._key, self.output.dtype))
        elif self._compiled is not None and (written := self._compiled.write(raw, out, block)) is not None:
            norms = written
            # `written` has norms for DoRA updates only. If every update has a norm, all updates are DoRA. Then skip the
            # check for NaNs and infinities, because the compiled loop returns None if a row is not finite.
            watched = watched and len(written) < len(self.folds)
        elif self._sums:
            norms = {}
            self.arrays.add(raw, self._sum(block), out)
        else:
            work = self._image(raw, block)
            norms = self._fold(work, block)
            self.arrays.assign(out, work.reshape((-1,)))
        source, finite = self.output.source.dtype, self.arrays.finite
        # Refuse only NaNs and infinities that the merge creates, and keep those of the base.
        if watched and not finite(out, self.output.dtype) and finite(raw, source):
            raise Malformed(
                f"the merge yields a NaN or an infinity in {self.output.dtype}", where=self.output.name,
                cure="Merge with a smaller weight, or write a wider dtype with --dtype (dtype=)",
            )  # fmt: skip
        return norms

    def exact(self, raw: Numbers, block: Block) -> Numbers:
        """Return the unrounded result of `compute`, flat, in float64."""
        work = self._image(raw, block)
        self._fold(work, block)
        return work.reshape((-1,))

    @cached_property
    def _key(self) -> tuple[int, int] | None:
        """The Philox key for stochastic rounding; None if this tensor is not rounded stochastically.

        Stochastic rounding needs a seed, and an output dtype that is floating-point but not float64 or complex.
        """
        seed, kind = self.output.seed, self.output.dtype
        rounds = seed is not None and kind.floating and kind.name != "F64" and not kind.torch.startswith("complex")
        return key_of(seed, self.output.name) if rounds and seed is not None else None

    @cached_property
    def _sums(self) -> bool:
        """Whether the changes can be summed first, and then added to the base in one operation.

        This requires that each change covers every row and is additive. An additive change does not depend on the base.
        """
        return all(
            fold.additive and not fold.bias and fold.target.rows is None and fold.shape[:1] == self.output.shape[:1]
            for fold, _ in self.folds
        )

    @cached_property
    def _compiled(self) -> LowRankBlocks | None:
        return lowrank_blocks(self.output, self.folds) if isinstance(self.arrays, NumpyArrays) else None

    def _sum(self, block: Block) -> Numbers:
        """Return the sum of all changes of a block, flat, in float64."""
        total = self._shaped(self.workspace.take(block.elements), block)
        for position, (fold, updates, weight) in enumerate(self._terms):
            view = view_of(total, fold, (block.start, block.stop), block)
            cut = additive(cut_to(update, fold, block, (block.start, block.stop)) for update in updates)
            # `total` still contains the values of an earlier block. So write the first change over them, and add the
            # other changes.
            if position == 0:
                cut.pop(0).delta_into(_tensor(view), weight)
            _add(cut, view, weight)
        return total.reshape((-1,))

    @cached_property
    def _terms(self) -> list[Term]:
        """The terms of the sum of changes. Each term is a planned update, its loaded updates, and its weight.

        A term can be joined if its factors are thin (see `is_thin`), and if its `axis` is the same as the first term's.
        All such terms are joined into one term.
        """
        terms = [(fold, updates, fold.weight) for fold, updates in self.folds]
        if len(terms) < 2:
            return terms
        thin = [term for term in terms if is_thin(term[0], term[1]) and term[0].axis == terms[0][0].axis]
        if len(thin) < 2:
            return terms
        one = side_by_side(thin, self.workspace)
        return [(thin[0][0], [one], 1.0), *(term for term in terms if term not in thin)]

    def _image(self, raw: Numbers, block: Block) -> Numbers:
        """Return a float64 copy of the block, `[rows, *rest]`, in memory that the next block overwrites."""
        work = self.workspace.take(block.elements)
        self.arrays.assign(work, raw)
        return self._shaped(work, block)

    def _shaped(self, flat: Numbers, block: Block) -> Numbers:
        rest = self.output.shape[1 + (block.expert is not None) :]
        return flat.reshape((block.stop - block.start, *rest))

    def _fold(self, work: Numbers, block: Block) -> dict[int, float]:
        norms: dict[int, float] = {}
        # `work` changes in place, but each update that is not additive needs the base's weight. So keep a copy of the
        # base's weight. If there is only one such update, no copy is needed: `_order` puts this update first, and until
        # then `work` is the base's weight.
        original = work * 1 if self._needs_original else work
        untouched = True
        for positions in self._ordered:
            norms |= self._fold_in_order(positions, work, original, block, replace=untouched)
            untouched = False
        for position in self._order:
            fold, updates = self.folds[position]
            part = part_of(fold, block)
            if part is None:
                continue
            view, W = (view_of(t, fold, part, block) for t in (work, original))
            cut = [cut_to(update, fold, block, part) for update in updates]
            if fold.additive and not fold.bias:
                _add(additive(cut), view, fold.weight)
            else:
                norms[position] = _mix(_through(cut, W, fold.bias), W, view, fold.weight, replace=untouched)
            untouched = False
        return norms

    def _fold_in_order(
        self, positions: Sequence[int], work: Numbers, original: Numbers, block: Block, *, replace: bool
    ) -> dict[int, float]:
        """Apply several updates of one adapter to a block; each update gets the result of the previous update."""
        norms: dict[int, float] = {}
        changed = original * 1
        for position in positions:
            fold, updates = self.folds[position]
            part = part_of(fold, block)
            if part is None:
                continue
            view = view_of(changed, fold, part, block)
            cut = [cut_to(update, fold, block, part) for update in updates]
            new = _through(cut, view, fold.bias)
            if not fold.additive or fold.bias:
                flat = (new - view).reshape((-1,))
                norms[position] = fold.weight**2 * float(flat @ flat)
            view[...] = new
        weight = self.folds[positions[0]][0].weight
        if replace and weight == 1:
            work[...] = changed
        else:
            work += weight * (changed - original)
        return norms

    @cached_property
    def _ordered(self) -> list[list[int]]:
        """The indices of the planned updates that must be applied in order, as one list for each adapter."""
        sources: dict[int, list[int]] = {}
        for position, (fold, _) in enumerate(self.folds):
            sources.setdefault(fold.source, []).append(position)
        return [source for source in sources.values() if order_counts([self._place(position) for position in source])]

    def _place(self, position: int) -> tuple[Target, tuple[Update, ...]]:
        fold = self.folds[position][0]
        return fold.target, fold.updates

    @cached_property
    def _order(self) -> list[int]:
        """The indices of the planned updates that are not in `_ordered`; updates that are not additive come first.

        If the first update is not additive and has weight 1, its result replaces the block. This avoids the rounding of
        `W + (new - W)`.
        """
        apart = {position for positions in self._ordered for position in positions}
        return sorted(
            (position for position in range(len(self.folds)) if position not in apart),
            key=lambda position: self.folds[position][0].additive,
        )

    @cached_property
    def _needs_original(self) -> bool:
        return bool(self._ordered) or sum(not fold.additive or fold.bias for fold, _ in self.folds) > 1


def _tensor(array: Numbers) -> torch.Tensor:
    """Cast an array to the type torch.Tensor for type checkers; formulas also run on numpy arrays."""
    return cast("torch.Tensor", array)


def _add(updates: Sequence[Additive], view: Numbers, weight: float) -> None:
    for update in updates:
        view += cast("Numbers", weight * update.delta(tuple(view.shape)))


def _mix(new: Numbers, W: Numbers, view: Numbers, weight: float, *, replace: bool) -> float:
    """Add the change `weight * (new - W)` to `view`, and return the squared norm of the change.

    If `replace` is set and the weight is 1, copy `new` into `view` instead, which avoids the rounding of the addition.
    """
    change = new - W
    flat = change.reshape((-1,))
    norm = weight**2 * float(flat @ flat)
    if replace and weight == 1:
        view[...] = new
    else:
        view += weight * change
    return norm


def _through(updates: list[Update], W: Numbers, bias: bool) -> Numbers:
    for update in updates:
        W = cast("Numbers", update.new_bias(_tensor(W)) if bias else update.new_weight(_tensor(W)))
    return W
