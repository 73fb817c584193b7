"""AdaMSS: `adamss_A.<i>` [r_i, r], `adamss_B.<i>` [rows of group i, r_i], and `adamss_newB` [r, in] or [r, in + 1].

The file does not list the rows of each group. PEFT computes the groups from the base's weight whenever it loads the
file. If the layer has a bias, PEFT first appends the bias to the weight as one more column. `torch.svd_lowrank`, seeded
with `random_seed`, decomposes the weight into U, S and V. Then k-means with a fixed seed groups the rows of U, which
has one row for each row of the weight.

This module computes the groups in the same way. It accepts the groups only if the rows of `adamss_newB` lie in the
space that V spans, up to rounding, and if each group has as many rows as its `adamss_B.<i>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import msgspec

from ....errors import PASS_BASE, SAVE_WITH_PEFT, USE_ITS_BASE, AdapterkitError, ShapeMismatch, Unsupported, UsageError
from ....io.lazy import Lazy, as_array, as_lazy, from_numpy
from ....linalg.rotations import singular_by_sketch
from ....methods.adamss import AdaMSS
from ..file import DecodedUpdate, File, Key
from . import Family, MethodFields, Parts, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Array, Leaf
    from ....io.strict_json import JsonValue

ROUNDS, SEED, STEPS = 10, 123456789, 2
"""The values that PEFT passes to KMeans as `max_iter` and `random_state`, and to torch.svd_lowrank as `niter`."""

NEAR = {"F64": 1e-4, "F32": 1e-4, "F16": 5e-4, "BF16": 4e-3}
"""Largest accepted error for each dtype of the base. The file's singular vectors, which have length 1, are projected
onto the space of the base's singular vectors. The error is the largest absolute difference between an element of the
file's vectors and the same element of their projections."""


class AdaMSSFields(MethodFields, frozen=True, kw_only=True):
    """The rank, the number of groups, and the seed."""

    r: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = 100
    num_subspaces: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = 5
    random_seed: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] = 0


class AdamssFamily(Family):
    """The family of the peft_type ADAMSS."""

    peft_type = "ADAMSS"
    method = AdaMSS
    parts = ("adamss_A.*", "adamss_B.*", "adamss_newB")
    method_fields: ClassVar[type[MethodFields]] = AdaMSSFields
    read: ClassVar[Mapping[str, str]] = {
        "num_subspaces": "number of groups into which the rows of each weight are divided",
        "random_seed": "seed of torch.svd_lowrank on the CPU; k-means then groups the rows of its left factor U",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "asa_importance_beta": "training only",
        "asa_schedule_exponent": "training only",
        "asa_target_subspaces": "training only",
        "asa_uncertainty_beta": "training only",
        "final_warmup": "training only",
        "init_warmup": "training only",
        "mask_interval": "training only",
        "subspace_rank": "the tensors show the ranks",
        "svd_threshold": "the tensors show the ranks",
        "use_asa": "training only",
        "use_dynamic_rank": "the tensors show the ranks",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": "orthogonal", "use_asa": False, "use_dynamic_rank": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config = file.settings.method_fields
        count = sum(part.startswith("adamss_A.") for part in keys)
        fields = {"basis": "adamss_newB"} | {f"{x}.{i}": f"adamss_{x}.{i}" for x in "AB" for i in range(count)}
        check_parts(keys, fields.values())
        places = {field: keys[part] for field, part in fields.items()}
        path = places["basis"].path
        A, B = ([file.tensors[places[f"{x}.{i}"]] for i in range(count)] for x in "AB")
        basis = file.tensors[places["basis"]]
        _check(places, A, B, basis)
        known = file.known.get(path)
        if isinstance(known, AdaMSS):
            group, inputs = as_array(known.group), int(known.basis.shape[1])
        else:
            weight, bias = _base(file.base, path)
            group, inputs = (
                _groups(config, places["basis"], basis, weight, bias, [b.shape[0] for b in B]),
                weight.shape[1],
            )
        update = _update(A, B, basis, group, inputs, config.random_seed)
        return DecodedUpdate(path, update, places)

    @classmethod
    def encode(cls, update: AdaMSS) -> Parts:
        group, ranks = as_array(update.group), as_array(update.ranks)
        parts: Parts = {}
        for i, rank in enumerate(map(int, ranks)):
            rows = [int(o) for o in (group == i).nonzero()[0]]
            parts[f"A.{i}"] = f"adamss_A.{i}", _cut(as_lazy(update.A), i, rank)
            parts[f"B.{i}"] = f"adamss_B.{i}", _cut(as_lazy(update.B), rows, rank)
        parts["basis"] = "adamss_newB", _joined(as_lazy(update.basis), update.basis_bias)
        return parts

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        numbers = cls.numbers(updates)
        config = AdaMSSFields(**{name: cast(int, numbers[name]) for name in ("r", "num_subspaces", "random_seed")})
        for target, group in updates.items():
            for update in group:
                if isinstance(update, AdaMSS) and target.stacked:
                    yield target, "PEFT does not support adamss on a stack of experts"
                elif isinstance(update, AdaMSS):
                    why = _unproven(config, target.path, update, base)
                    if update.seed != config.random_seed:
                        why = "its seed differs from the first update's seed, but the config has only one random_seed"
                    if why:
                        yield target, why

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = list(cls.of_it(updates).values())
        return {
            "r": max(int(update.basis.shape[0]) for update in members),
            "num_subspaces": max(int(update.A.shape[0]) for update in members),
            "subspace_rank": max(int(update.A.shape[1]) for update in members),
            "random_seed": members[0].seed,
        }


def _unproven(config: AdaMSSFields, path: str, update: AdaMSS, base: Checkpoint | None) -> str:
    """Return an empty string if PEFT would compute the update's groups from the base. Otherwise, return the reason."""
    basis = _joined(as_lazy(update.basis), update.basis_bias)
    group, count = as_array(update.group), int(update.A.shape[0])
    try:
        weight, bias = _base(base, path)
        expected = _groups(
            config, Key(path, path), basis, weight, bias, [int((group == i).sum()) for i in range(count)]
        )
    except AdapterkitError as error:
        return f"PEFT cannot compute the groups of this adamss: {error.why}"
    return (
        ""
        if (expected == group).all()
        else "the groups that PEFT computes from this base differ from those of this adamss"
    )


def _check(places: Mapping[str, Key], A: list[Lazy], B: list[Lazy], basis: Lazy) -> None:
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], basis.shape[:1]) != (b.shape[1], a.shape[1:]):
            why = f"A.{i} {list(a.shape)}, B.{i} {list(b.shape)} and newB {list(basis.shape)} do not fit together"
            raise ShapeMismatch(why, where=places[f"A.{i}"].text, cure=SAVE_WITH_PEFT)
        if len({a.dtype, b.dtype, basis.dtype, A[0].dtype}) > 1:
            why = (
                f"A.{i}, B.{i} and newB must have the dtype of A.0, {A[0].dtype.name}, but have {a.dtype.name}, "
                f"{b.dtype.name} and {basis.dtype.name}"
            )
            raise ShapeMismatch(why, where=places[f"A.{i}"].text, cure=SAVE_WITH_PEFT)


def _base(base: Checkpoint | None, path: str) -> tuple[Array, Array | None]:
    """Return the weight `[out, in]` and the bias of a module in the base, in float32.

    Raises:
        UsageError: no base is given.
        ShapeMismatch: the base has no linear layer at this path, or the dtype of the layer's weight is not in `NEAR`.
    """
    import numpy as np

    if base is None:
        raise UsageError(f"{_WHY}, and no base is given", where=path, cure=PASS_BASE)
    tensors = base.tensors
    weight = tensors.get(f"{path}.weight")
    if weight is None or len(weight.shape) != 2 or weight.dtype.name not in NEAR:
        weight_text = "nothing" if weight is None else f"{weight.dtype.name} {list(weight.shape)}"
        why = f"{_WHY}: the base must have the weight of a linear layer at this path, but has {weight_text}"
        raise ShapeMismatch(
            why, where=path, cure="Pass the base that the adapter was trained on, unquantized, with --base (base=)"
        )
    bias = tensors.get(f"{path}.bias")
    return as_array(weight).astype(np.float32), None if bias is None else as_array(bias).astype(np.float32)


def _groups(config: AdaMSSFields, key: Key, basis: Lazy, weight: Array, bias: Array | None, sizes: list[int]) -> Array:
    """For each row of the weight, return the index of the row's group.

    Raises:
        ShapeMismatch: the shape of newB, or the sizes of the groups, do not fit the base's weight.
        Unsupported: the file's singular vectors differ from the base's, or the groups depend on rounding.
    """
    import numpy as np

    W = weight if bias is None else np.concatenate([weight, bias[:, None]], axis=1)
    rank, count = min(config.r, *W.shape), min(config.num_subspaces, len(W))
    if basis.shape != (rank, W.shape[1]) or len(sizes) != count or sum(sizes) != len(W):
        why = (
            f"newB has the shape {list(basis.shape)}, and the groups have {sizes} rows, but the base's layer needs "
            f"newB {[rank, W.shape[1]]} and {count} groups that together have {len(W)} rows"
        )
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_BASE)
    U, _, V = singular_by_sketch(W, rank, STEPS, config.random_seed)
    basis_rows, V = as_array(basis).astype(np.float64), V.astype(np.float64)
    # Compare only the spaces that the vectors span. The signs of the vectors, and the order of vectors with equal
    # singular values, differ between machines. Neither affects k-means.
    apart = float(np.abs(basis_rows - (basis_rows @ V.T) @ V).max())
    if not apart <= NEAR[_precision(basis)]:
        why = (
            f"{_WHY}: the base's singular vectors, computed on the CPU with the config's random_seed, differ by "
            f"{apart:.1e} from those in the file. The adapter was trained on an accelerator, which draws other random "
            "numbers, or on another base"
        )
        raise Unsupported(why, where=key.text, cure=_CURE)
    try:
        group = k_means(U, count, ROUNDS, SEED)
    except Unsupported as error:
        raise Unsupported(f"{_WHY}: {error.why}", where=key.text, cure=_CURE) from None
    sizes_here = np.bincount(group, minlength=count).tolist()
    if sizes_here != sizes:
        why = (
            f"{_WHY}: k-means of the base's singular vectors yields groups of {sizes_here} rows, "
            f"but the file has groups of {sizes} rows"
        )
        raise Unsupported(why, where=key.text, cure=_CURE)
    return group


def _precision(basis: Lazy) -> str:
    """Return the base's dtype, to which PEFT rounded the singular vectors before it saved them.

    If the file stores the vectors in float32, the trailing zero bits of the elements show the base's dtype.
    """
    import numpy as np

    if basis.dtype.name != "F32":
        return basis.dtype.name
    bits = np.frombuffer(bytes(basis.fetch()), np.uint32)
    return "F32" if (bits & 0x1FFF).any() else "F16" if (bits & 0xFFFF).any() else "BF16"


def _update(A: list[Lazy], B: list[Lazy], basis: Lazy, group: Array, inputs: int, seed: int) -> AdaMSS:
    """Create the update.

    Pad each group's factors with zeros to the largest rank. Put the rows of B in the order of the weight's rows.
    """
    import numpy as np

    ranks = [a.shape[0] for a in A]
    width, kind = max(ranks), basis.dtype

    def together() -> bytes:
        padded = np.zeros((len(A), width, basis.shape[0]), kind.array)
        for i, a in enumerate(A):
            padded[i, : ranks[i]] = _raw(a)
        return padded.tobytes()

    def placed() -> bytes:
        padded = np.zeros((len(group), width), kind.array)
        for i, b in enumerate(B):
            padded[group == i, : ranks[i]] = _raw(b)
        return padded.tobytes()

    whole = basis.shape[1] == inputs
    leaves: dict[str, Any] = {
        "A": Lazy((len(A), width, basis.shape[0]), kind, together),
        "B": Lazy((len(group), width), kind, placed),
        "basis": basis if whole else basis.map(lambda rows: rows[:, :inputs], (basis.shape[0], inputs)),
        "group": from_numpy(np.asarray(group, np.int64)),
        "ranks": from_numpy(np.array(ranks, np.int64)),
    }
    if not whole:
        leaves["basis_bias"] = basis.map(lambda rows: rows[:, inputs], (basis.shape[0],))
    return AdaMSS(**leaves, seed=seed)


def _raw(leaf: Lazy) -> Array:
    import numpy as np

    return np.frombuffer(bytes(leaf.fetch()), leaf.dtype.array).reshape(leaf.shape)


def _cut(leaf: Lazy, at: int | list[int], rank: int) -> Lazy:
    shape = (rank, leaf.shape[2]) if isinstance(at, int) else (len(at), rank)
    return leaf.map(lambda rows: rows[at][:rank] if isinstance(at, int) else rows[at][:, :rank], shape)


def _joined(basis: Lazy, bias: Leaf | None) -> Lazy:
    if bias is None:
        return basis
    column = as_lazy(bias)

    def join(rows: Array) -> Array:
        import numpy as np

        return np.concatenate([rows, _raw(column).view(rows.dtype)[:, None]], axis=1)

    return basis.map(join, (basis.shape[0], basis.shape[1] + 1))


_WHY = "the rows of each group depend on the base's weights"
_CURE = "Run the adapter with PEFT, on the machine where it was trained"

# This k-means gives the same result as scikit-learn's `KMeans(init="random", n_init=1)`. It refuses data for which the
# result depends on rounding.


TOLERANCE = 1e-4
"""scikit-learn's `tol`. k-means stops if the sum of the centers' squared movements is at most `tol * variance`.

`variance` is the mean of the variances of the points' coordinates.
"""

CLOSE = 2e-6
"""Two squared distances count as tied if they differ by at most this fraction of the largest squared distance.

For such distances, rounding in float32 decides which of the two is smaller.
"""


def k_means(points: Array, count: int, rounds: int, seed: int) -> Array:
    """Return the cluster of each point as an int64 array `[n]`.

    scikit-learn (1.3 and later) computes in float32, so its result can depend on the machine if two centers are equally
    far from a point. This function computes in float64 and refuses such ties, so it gives the same result everywhere.

    Args:
        points: the points, `[n, d]`.
        count: the number of clusters, at most n.
        rounds: scikit-learn's `max_iter`.
        seed: scikit-learn's `random_state`.

    Raises:
        Unsupported: the result depends on a tie.
    """
    import numpy as np

    X: Array = np.asarray(points, dtype=np.float64)
    X = X - X.mean(axis=0)
    # Pass probabilities in float32, as scikit-learn does. Without probabilities, `choice` draws other points.
    share = np.full(len(X), 1, dtype=np.float32) / np.float32(len(X))
    centers = X[np.random.RandomState(seed).choice(len(X), size=count, replace=False, p=share)]
    enough = TOLERANCE * float(np.var(X, axis=0).mean())
    labels: Array = np.full(len(X), -1)
    before = labels
    for _ in range(rounds):
        labels = _nearest(X, centers)
        moved = _centers(X, labels, count)
        shift, centers = float(((moved - centers) ** 2).sum()), moved
        if np.array_equal(labels, before):
            return labels
        if abs(shift - enough) <= CLOSE * enough:
            raise _tie("whether the centers still move")
        if shift <= enough:
            break
        before = labels
    return _nearest(X, centers)


def _nearest(X: Array, centers: Array) -> Array:
    import numpy as np

    distances = ((X[:, None, :] - centers[None]) ** 2).sum(axis=2)
    if len(centers) > 1:
        first, second = np.partition(distances, 1, axis=1)[:, :2].T
        if float((second - first).min()) <= CLOSE * float(distances.max()):
            raise _tie("which of two centers is nearer to a row")
    nearest: Array = distances.argmin(axis=1)
    return nearest


def _centers(X: Array, labels: Array, count: int) -> Array:
    import numpy as np

    if len(np.unique(labels)) < count:
        raise _tie("a center has no rows, so k-means moves this center")
    return np.stack([X[labels == cluster].mean(axis=0) for cluster in range(count)])


def _tie(what: str) -> Unsupported:
    why = f"the result of k-means depends on rounding: {what}"
    return Unsupported(why, cure="Run the adapter on the machine where it was trained")
