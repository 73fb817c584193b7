"""Extract an adapter from a base and a tuned model, tensor by tensor; each worker has one tensor in memory.

By default, the change of a matrix is stored as a LoRA. The caller sets one of three things: the LoRA's rank, the
share of the change's energy that the LoRA keeps, or the largest error allowed. The change is computed in float32 or
float64, because a subtraction in 16 bits loses most of a small change. Changed tensors with one axis (norms, biases)
are stored whole. For token embeddings, the changed rows and the new rows are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, BaseRef, Foreign, Step, Target, config_hash
from ..core.arguments import check_count, checks_types
from ..core.metadata import METADATA, MODEL_TYPE, metadata_of
from ..errors import TargetNotFound, Unsupported, UsageError, nearest
from ..io.checkpoint import opened
from ..io.computed import load, rounded_lazy
from ..io.lazy import DTYPES, Lazy, from_numpy
from ..io.stages import stage
from ..linalg.products import even_split
from ..methods.dora import DoRA
from ..methods.loha import LoHa
from ..methods.lokr import LoKr
from ..methods.replacement import Replacement
from ..methods.rows import Rows
from ..methods.shira import SHiRA
from ..naming.architectures import architecture_of
from ..naming.binding import view
from ..naming.binding.fitting import check_tuned, identity_of, paths_of
from ..naming.binding.layouts import LayoutEvidence
from ..naming.moves import Names, stored_in_out
from ..naming.renames import IN_OUT, Rename, layout_of, parse_renames
from ..naming.resolver import resolve
from ..naming.ties import aliases, find_tie, is_embedding
from .differences import changed_rows, check_rows, difference, floats_of, frobenius, left
from .lowering import Change, balanced, low_rank, result_type
from .prefetch import ahead, most_workers, one_blas_thread
from .resizing import Cut, seed_of
from .sketching import Criterion, dominant, first

if TYPE_CHECKING:
    from pathlib import Path

    from ..core.updates import Additive, Update
    from ..io.checkpoint import Checkpoint
    from ..io.computed import Array
    from ..io.lazy import DType
    from .resizing import Report
    from .sketching import Decomposition

    Form = Callable[[Array, Criterion, int, DType], Additive]

    Progress = Callable[[int, int], Any]
    Weights = Checkpoint | str | PathLike[str]

# Approximate a matrix's difference by LoHa, LoKr or SHiRA.


SWEEPS = 12
"""The number of rounds of alternating least squares. Each round computes all four factors of a LoHa once."""

RIDGE = 1e-9
"""The relative regularization of the least-squares systems. With it, singular systems can be solved too."""


def loha(D: Array, criterion: Criterion, seed: int, dtype: DType) -> Additive:
    """Approximate `D [out, in]` by a Hadamard product of two low-rank products.

    There is no closed formula for the best approximation, so the factors are found by alternating least squares. The
    first product starts as the best LoRA, and the second product as a matrix of ones. If three factors are fixed, each
    row or column of the fourth factor is the solution of a small linear system. No step increases the error, so the
    result is at least as close to D as the LoRA.

    Raises:
        UsageError: the criterion is an energy or an error; only a rank is accepted.
    """
    import numpy as np

    rank = _rank(criterion, "Hadamard product")
    D = D.astype(np.float64, copy=False)
    a, b = balanced(*dominant(D, Criterion(rank=rank), seed))
    c, d = np.zeros((len(D), rank)), np.random.default_rng(seed).standard_normal((rank, D.shape[1]))
    # The second product c @ d starts as a matrix of ones: the first column of c and the first row of d are ones, and
    # all other columns of c are zero. The other rows of d are random. The first least-squares step replaces c.
    c[:, 0], d[0] = 1.0, 1.0
    for _ in range(SWEEPS):
        c = _least_squares(D, a @ b, d)
        d = _least_squares(D.T, (a @ b).T, c.T).T
        a = _least_squares(D, c @ d, b)
        b = _least_squares(D.T, (c @ d).T, a.T).T
    factors = {"w1_a": a, "w1_b": b, "w2_a": c, "w2_b": d}
    fields: dict[str, Any] = {name: rounded_lazy(values, dtype) for name, values in factors.items()}
    return LoHa(**fields)


def _least_squares(D: Array, H: Array, R: Array) -> Array:
    """Return the L `[m, r]` that minimizes |D - (L @ R) * H|, for given R `[r, n]` and H `[m, n]`."""
    import numpy as np

    r = len(R)
    squares = ((H * H) @ (R[:, None] * R).reshape(r * r, -1).T).reshape(-1, r, r)
    sizes = np.trace(squares, axis1=1, axis2=2)
    squares[:, range(r), range(r)] += (RIDGE * sizes + (sizes == 0))[:, None]
    solution: Array = np.linalg.solve(squares, ((D * H) @ R.T)[..., None])[..., 0]
    return solution


def lokr(D: Array, criterion: Criterion, seed: int, dtype: DType) -> Additive:
    """Approximate `D [out, in]` by the nearest Kronecker product w1 x w2, with the shapes that LyCORIS chooses.

    D is divided into blocks with the shape of w2, and each block becomes a row of a matrix. w1 is the first left
    singular vector of this matrix, scaled and reshaped; w2 is the first right singular vector, scaled and reshaped (Van
    Loan and Pitsianis 1993, https://doi.org/10.1007/978-94-015-8196-7_17). If the rank is smaller than both sides of
    w2, w2 is replaced by the product of two factors of this rank.

    Raises:
        UsageError: the criterion is an energy or an error; only a rank is accepted.
    """
    rank = _rank(criterion, "Kronecker product")
    (a, m), (c, n) = (even_split(side) for side in D.shape)
    blocks = D.reshape(a, m, c, n).swapaxes(1, 2).reshape(a * c, m * n)
    left, right = balanced(*dominant(blocks, Criterion(rank=1), seed))
    w2: Array = right.reshape(m, n)
    factors: dict[str, Array] = {"w1": left.reshape(a, c), "w2": w2}
    if rank < min(m, n):
        factors["w2_a"], factors["w2_b"] = balanced(*dominant(w2, Criterion(rank=rank), seed))
        del factors["w2"]
    fields: dict[str, Any] = {name: rounded_lazy(values, dtype) for name, values in factors.items()}
    return LoKr(**fields)


def shira(D: Array, criterion: Criterion, _seed: int, dtype: DType) -> Additive:
    """Keep the largest entries of `D [out, in]`.

    If the criterion is a rank, keep as many entries as the two factors of a LoRA of this rank have. Otherwise, keep as
    many entries as the criterion requires.
    """
    import numpy as np

    flat = D.reshape(-1)
    order = np.argsort(-np.abs(flat), kind="stable")
    if criterion.rank is None:
        sizes = np.abs(flat[order]).astype(np.float64)
        count = criterion.counts([sizes], [float(np.sqrt((sizes * sizes).sum()))])[0]
    else:
        count = criterion.rank * sum(D.shape)
    kept = np.sort(order[:count])
    index: Any = from_numpy(np.stack(np.divmod(kept, D.shape[1])))
    values: Any = rounded_lazy(flat[kept], DTYPES["F64"] if D.dtype == "float64" else dtype)
    return SHiRA(index=index, values=values)


def _rank(criterion: Criterion, form: str) -> int:
    if criterion.rank is None:
        why = f"a {form} needs a rank; energy and error are not supported"
        raise UsageError(why, where="rank", cure="Pass --rank N (rank=) instead")
    return criterion.rank


FORMS: Mapping[str, Form] = {"loha": loha, "lokr": lokr, "shira": shira}


# Extract an adapter.


@checks_types
def extract(
    tuned: Weights,
    base: Weights,
    rank: int | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
    scope: str = "target",
    targets: tuple[str, ...] = (),
    embeddings: str = "rows",
    method: str = "lora",
    dtype: str | None = None,
    workers: int | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
) -> Adapter:
    """Return the adapter that turns a base into a tuned model.

    If the smaller side of a matrix is at most the rank, the matrix is stored at full rank. Merging then restores the
    tuned weight, and the result is exact if the weight's dtype has at most 32 bits. With an energy of 1 or an error of
    0, every matrix is stored at full rank.

    Args:
        tuned: the tuned weights: a folder, a file, or an open checkpoint.
        base: the weights that the model was tuned from.
        rank: the rank of the factors of each changed matrix.
        energy: keep at least this share of each change's squared Frobenius norm.
        error: the largest allowed Frobenius error of a change, divided by the change's norm.
        scope: `target`: apply the criterion to each matrix separately. `all`: keep the largest singular values among
            all matrices. With `all`, energy and error apply to the whole model, and rank is the mean rank. All factors
            are kept in memory, and matrices with small changes may get no update. Only the method `lora` supports
            `all`.
        targets: globs for the dotted paths of the weights to extract; if empty, all weights are extracted. Other
            weights count as unchanged.
        embeddings: `rows`: store the changed and new rows, or the whole table if most rows changed. `low-rank`: treat
            the table like any matrix, unless the table has rows for new tokens.
        method: the method for changed matrices. `lora`: a LoRA. `dora`: each row's norm, and a LoRA for the rows'
            directions. `loha`: a Hadamard product of two matrices of rank `rank`; it is at least as close to the change
            as a LoRA of this rank. `lokr`: the nearest Kronecker product, whose second factor is cut to `rank`.
            `shira`: the largest entries of the change; with `rank`, as many entries as the factors of a LoRA of this
            rank have. All methods except `lora` are for linear layers only.
        dtype: the dtype of the factors; default: float32, or float64 for full-rank factors that are not exact in
            float32.
        workers: the number of tensors to extract in parallel; default: one per processor, at most 16. Each worker needs
            about four times its tensor's size in float32.
        report: a function that is called with a `Cut` for each changed target.
        progress: a function that is called with (bytes of finished tuned weights, total bytes).
        rename: rules that map names in the tuned model to names in the base, each `FROM=TO` or `@FILE`. If no rule
            matches a name and the base lacks it, adapterkit looks for the name that another version of transformers
            uses, and for the same name with another prefix. The name is mapped only if exactly one name in the base
            fits. `in_out:GLOB` or `out_in:GLOB` states how the base stores the weights of these modules.
        strict_base: whether to refuse a base that differs from the base in the tuned model's merge record.

    Returns:
        the adapter. It has updates of the chosen method for matrices, `Replacement` updates for parameters that are
            stored whole, and `Rows` updates for token embeddings, in the order of the tuned model's files.

    Raises:
        CheckFailed: the tuned weights were merged from another base, and `strict_base` is set.
        UsageError: none or several of rank, energy and error are given; the given value is out of range; or no weight
            changed.
        Unsupported: the method is unknown, or does not support a convolution or stacked experts; or a changed tensor
            has a dtype that is not a floating-point type.
        TargetNotFound: one model has a weight that the other lacks; or a glob matches no weight.
        ShapeMismatch: a weight has different shapes in the two models. The only allowed difference is additional rows
            for new tokens in the tuned model.
        Malformed: a changed weight contains a NaN or an infinity.
    """
    stage("decomposing the changes")
    criterion = Criterion(rank, energy, error, scope=scope)
    criterion.check()
    if scope == "all" and method != "lora":
        why = f"scope=all is only for LoRA, not for {method}"
        raise UsageError(why, where="scope", cure="Omit --scope (scope=), or pass --method lora (method=)")
    if embeddings not in ("rows", "low-rank"):
        raise UsageError(
            f"embeddings is {embeddings!r}",
            where="embeddings",
            cure="Pass --embeddings rows or --embeddings low-rank (embeddings=)",
        )
    if method not in ("lora", "dora", *FORMS):
        raise Unsupported(
            f"cannot extract {method!r}", where="method", cure=f"Choose among lora, dora, {', '.join(FORMS)}"
        )
    check_count(workers, "workers", "workers=N")
    weights, tuned_model = opened(base), opened(tuned)
    if strict_base:
        check_tuned(tuned_model, weights, strict=True)
    rules = parse_renames(rename, list(dict.fromkeys(map(_path, tuned_model.tensors))), weights.tensors)
    layouts = LayoutEvidence((), {name: tensor.shape for name, tensor in weights.tensors.items()})
    renamed = _renamed(tuned_model, weights, rules)
    job = _Extraction(renamed, weights, criterion, embeddings, method, dtype, layouts, rules)
    names = job.names(targets)
    updates: dict[Target, tuple[Update, ...]] = {}
    count = workers or most_workers()
    done, whole = 0, sum(job.tuned.tensors[name].nbytes for name in names)
    with one_blas_thread():
        if scope == "all" and energy != 1 and error != 0:
            job = replace(job, shared=job.share(names, count))
    with one_blas_thread(), ahead(lambda name: [*job.changes(name)], names, count) as results:
        for name, result in zip(names, results, strict=True):
            for target, update, cut in result:
                if update is None:
                    if report is not None:
                        report(cut)
                    continue
                # Put replacements before the other updates, because PEFT applies updates in this order.
                both = (*updates.get(target, ()), update)
                updates[target] = tuple(sorted(both, key=lambda u: not isinstance(u, Replacement)))
                if report is not None:
                    report(cut)
            done += job.tuned.tensors[name].nbytes
            if progress is not None:
                progress(done, whole)
    if not updates:
        raise UsageError("the tuned model equals the base bit by bit", path=job.tuned.root, cure="Check the two paths")
    args: dict[str, Any] = {**criterion.record(), "method": method, "embeddings": embeddings, "targets": list(targets)}
    args |= {} if scope == "target" else {"scope": scope}
    known: dict[str, Any] = {**identity_of(job.base), **job.tied()}
    if isinstance(family := (job.base.config or {}).get("model_type"), str):
        known[MODEL_TYPE] = family
    carried = _carried(job.tuned)
    return Adapter(updates, _reference(job.base), (Step("extract", {**args, **known, **carried}),))


@dataclass(frozen=True, slots=True, eq=False)
class _Extraction:
    """The two models and the options of one extraction."""

    tuned: Checkpoint
    base: Checkpoint
    criterion: Criterion
    embeddings: str
    method: str
    dtype: str | None
    layouts: LayoutEvidence
    rules: Sequence[Rename]
    shared: Mapping[str, Decomposition] | None = None
    """With scope `all`, a map from the key of a weight (see `_key`) to the truncated decomposition of its change.

    None with scope `target`, or if every matrix is stored at full rank.
    """

    @property
    def aliases(self) -> Mapping[str, str]:
        """A map from the name of the base's tied head to the name of the embedding whose weight the head uses.

        The tuned model may store both tensors.
        """
        return aliases(self.base)

    def tied(self) -> dict[str, str]:
        """Return the lineage argument `tied`, which states whether a change of the tied embedding changes the head too.

        `tied` is `untie` if the tuned model stores a separate head. Otherwise, `tied` is `merge`: a change of the
        embedding also changes the head. The result is empty if no weights are tied.
        """
        tie = find_tie(self.base.tensors, self.base.config)
        return {} if tie is None else {"tied": "untie" if tie.head in self.tuned.tensors else "merge"}

    def names(self, globs: tuple[str, ...]) -> list[str]:
        """Return the names of the tuned tensors to extract, in the order of the files.

        Raises:
            TargetNotFound: one model lacks a weight of the other model; or a glob matches no weight.
            UsageError: the rank is larger than the smaller side of every weight.
        """
        known = {*self.base.tensors, *self.aliases}
        for name, holder in [(n, "base") for n in self.tuned.tensors if n not in known] + [
            (n, "tuned model") for n in self.base.tensors if n not in self.tuned.tensors
        ]:
            lost = known if holder == "base" else self.tuned.tensors
            cure = nearest(name, lost) or "Check that both models have the same architecture"
            raise TargetNotFound(f"the {holder} lacks this weight", where=name, cure=cure)
        for glob in globs:
            if not any(fnmatchcase(_path(name), glob) for name in self.tuned.tensors):
                cure = nearest(glob, map(_path, self.tuned.tensors)) or "Pass a dotted path with --target (targets=)"
                raise TargetNotFound("no weight matches this glob", where=glob, cure=cure)
        names = [n for n in self.tuned.tensors if not globs or any(fnmatchcase(_path(n), glob) for glob in globs)]
        shapes = [self.tuned.tensors[name].shape for name in names]
        self.criterion.check_possible(max((min(s[0], math.prod(s[1:])) for s in shapes if len(s) > 1), default=1))
        return names

    def share(self, names: Sequence[str], workers: int) -> dict[str, Decomposition]:
        """Decompose the change of each matrix, and apply the criterion to all matrices together.

        The largest singular values among all matrices are kept.

        Return a map from the key of a weight (see `_key`) to the cut decomposition of its change.
        """
        every = [name for name in names if self._is_matrix(name)]
        decomposed: dict[str, Decomposition] = {}
        norms: dict[str, float] = {}
        kept: dict[str, Array] = {}
        begun = {name: replace(self.criterion, scope="target") for name in every}
        while begun:
            asked = begun
            with ahead(lambda item: self._decomposed(*item), list(asked.items()), workers) as results:
                for each in results:
                    for key, norm, parts in each:
                        decomposed[key], norms[key] = parts, norm
            keys = list(decomposed)
            counts = self.criterion.counts([decomposed[key][1] for key in keys], [norms[key] for key in keys])
            kept = {key: decomposed[key][1][:count] for key, count in zip(keys, counts, strict=True)}
            least = min((float(S[-1]) for S in kept.values() if len(S)), default=0.0)
            # Only the largest singular values of each weight are computed. If all computed values of a weight are kept,
            # its next singular values may be large enough to be kept too. Decompose such a weight again, with twice the
            # rank.
            begun = {}
            for key in keys:
                U, S, Vh = decomposed[key]
                unseen = math.sqrt(max(norms[key] ** 2 - float((S * S).sum()), 0.0))
                noise = 1e-6 * norms[key]
                if len(kept[key]) == len(S) < min(len(U), Vh.shape[1]) and unseen > max(least, noise):
                    name = key.partition("\n")[0]
                    before = begun[name].rank or 0 if name in begun else 0
                    begun[name] = Criterion(rank=max(2 * len(S), before))
        return {key: first(decomposed[key], len(S)) for key, S in kept.items()}

    def _decomposed(self, name: str, criterion: Criterion) -> list[tuple[str, float, Decomposition]]:
        """Return (key, norm, decomposition) for the change of each weight in a tensor; a stack has several weights."""
        changed = self._difference(name, exact=False)
        decomposed = []
        for e, D in enumerate([] if changed is None else _weights(*changed)):
            possible = criterion if criterion.rank is None else replace(criterion, rank=min(criterion.rank, *D.shape))
            key, D = _key(name, e), D.astype("f4", copy=False)
            decomposed.append((key, frobenius(D), dominant(D, possible, seed_of(key))))
        return decomposed

    def _is_matrix(self, name: str) -> bool:
        """Whether a tensor's change is stored as low-rank factors."""
        tuned, base = self.tuned.tensors[name], self.base.tensors[self.aliases.get(name, name)]
        return (
            not self._by_rows(name, tuned, base)
            and tuned.dtype.floating
            and base.dtype.floating
            and len(tuned.shape) > 1
        )

    def _by_rows(self, name: str, tuned: Lazy, base: Lazy) -> bool:
        """Whether a tensor's change is stored as rows of a table."""
        # Only the name shows that a tensor is an embedding, and a convolution or a norm may have such a name, too.
        table = is_embedding(name) and self.embeddings == "rows" and len(tuned.shape) == 2
        return table or tuned.shape != base.shape

    def _difference(self, name: str, *, exact: bool) -> tuple[Target, Array] | None:
        """Return a tensor's target and its difference in the target's layout; None if the tensor did not change."""
        tuned, base = self.tuned.tensors[name], self.base.tensors[self.aliases.get(name, name)]
        target = self._target(name, len(tuned.shape))
        D = view(difference(name, tuned, base, exact=exact), target)
        return (target, D) if D.any() else None

    def changes(self, name: str) -> Iterator[tuple[Target, Update | None, Cut]]:
        """Yield (target, update, cut) for a tensor; yield nothing if the tensor did not change.

        The update is None if no singular value is kept.
        """
        tuned, base = self.tuned.tensors[name], self.base.tensors[self.aliases.get(name, name)]
        if self._by_rows(name, tuned, base):
            yield from self._rows(name, tuned, base)
        elif not (tuned.dtype.floating and base.dtype.floating):
            if (tuned.dtype, bytes(tuned.fetch())) != (base.dtype, bytes(base.fetch())):
                kinds = " and ".join(dict.fromkeys(str(t.dtype) for t in (base, tuned) if not t.dtype.floating))
                why = f"the tensor changed, but its dtype is {kinds}; only floating-point tensors can be extracted"
                cure = "Select other targets with --target (targets=)"
                raise Unsupported(why, path=tuned.file, where=name, cure=cure)
        elif len(tuned.shape) < 2:
            yield from self._whole(name, tuned, base)
        else:
            yield from self._matrix(name, tuned, base)

    def _target(self, name: str, rank: int) -> Target:
        """Return the target of a tensor, with the layout of the base."""
        path = _path(name)
        in_out = stored_in_out(path, self.base.config)
        if in_out is None and (stated := layout_of(self.rules, path)):
            in_out = stated == IN_OUT
        if in_out is None:
            in_out = self.layouts.of_matrix(path)
        in_out = in_out or is_embedding(name)
        # A parameter with three axes that is not a module's `weight` contains one matrix per expert.
        stack = "e " if rank == 3 and path == name else ""
        return Target(path, f"{stack}in out *k" if in_out else f"{stack}out *in")

    def _whole(self, name: str, tuned: Lazy, base: Lazy) -> Iterator[tuple[Target, Update | None, Cut]]:
        """Yield an update that replaces the whole parameter with the tuned model's tensor."""
        field = "bias" if name.endswith(".bias") else "weight"
        layout = self._target(name.removesuffix("bias") + "weight", 0).layout if field == "bias" else "out *in"
        target = Target(_path(name), layout)
        size = frobenius(difference(name, tuned, base, exact=False))
        if size:
            update = Replacement(**{field: tuned})  # type: ignore[arg-type]
            yield target, update, Cut(str(target), update.method, None, None, size, 0.0)

    def _matrix(self, name: str, tuned: Lazy, base: Lazy) -> Iterator[tuple[Target, Update | None, Cut]]:
        """Yield the change of a matrix as an update of the chosen method."""
        changed = self._difference(name, exact=self.criterion.keeps_all(min(tuned.shape)))
        if changed is None:
            return
        target, D = changed
        if self.method == "dora":
            yield self._directed(target, D, view(floats_of(base), target))
            return
        if self.method != "lora":
            yield self._formed(target, D)
            return
        weights = _weights(target, D)
        shape = D.shape[1:] if target.stacked else D.shape
        size = math.hypot(*(frobenius(one) for one in weights))
        pairs = [self._pair(one, f"{target}:{e}", _key(name, e)) for e, one in enumerate(weights)]
        if not any(len(A) for _, A in pairs):
            yield target, None, Cut(str(target), "lora", min(weights[0].shape), 0, size, size)
            return
        kind = result_type([], self.dtype) if self.dtype else _exact_type(pairs)
        lora = low_rank(target, shape, pairs, None, kind)
        deltas = Change(target, shape, (lora,)).deltas()
        lost = math.hypot(*(left(one, delta.B, delta.A) for one, delta in zip(weights, deltas, strict=True)))
        yield target, lora, Cut(str(target), lora.method, min(weights[0].shape), lora.A.shape[-len(shape)], size, lost)

    def _directed(self, target: Target, D: Array, W: Array) -> tuple[Target, Update, Cut]:
        """Return a DoRA. It stores the norm of each tuned row, and a LoRA that changes the rows' directions."""
        import numpy as np

        if D.ndim > 2:
            why = f"dora cannot change a weight of {D.ndim} axes"
            raise Unsupported(
                why,
                where=str(target),
                cure="Pass --method lora (method=), or select other weights with --target (targets=)",
            )
        W = W.astype(np.float64)
        tuned = W + D
        before, after = (np.sqrt((X * X).sum(1)) for X in (W, tuned))
        towards = tuned * np.where(after > 0, before / np.where(after > 0, after, 1.0), 1.0)[:, None] - W
        U, S, Vh = dominant(towards.astype(np.float32), self.criterion, seed_of(str(target)))
        kind = result_type([], self.dtype)
        B, A = (rounded_lazy(factor, kind) for factor in balanced(U, S, Vh))
        update = DoRA(A=A, B=B, magnitude=rounded_lazy(after, kind))  # type: ignore[arg-type]
        # Compute the error with DoRA's formula and the stored values: DoRA divides each row by its norm, and the cut
        # and the rounding change these norms.
        V = W + load(B) @ load(A)
        sizes = np.sqrt((V * V).sum(1))
        rows_directed = V * (load(update.magnitude) / np.where(sizes > 0, sizes, 1.0))[:, None]
        return (
            target,
            update,
            Cut(str(target), "dora", min(D.shape), len(S), frobenius(D), frobenius(tuned - rows_directed)),
        )

    def _formed(self, target: Target, D: Array) -> tuple[Target, Update, Cut]:
        """Return the difference `[out, in]` as an update of a method in `FORMS`."""
        if D.ndim > 2:
            why = f"{self.method} cannot change a weight of {D.ndim} axes"
            raise Unsupported(
                why,
                where=str(target),
                cure="Pass --method lora (method=), or select other weights with --target (targets=)",
            )
        kind = result_type([], self.dtype)
        update = FORMS[self.method](D, self.criterion, seed_of(str(target)), kind)
        (delta,) = Change(target, D.shape, (update,)).deltas()
        cut = Cut(str(target), self.method, min(D.shape), None, frobenius(D), frobenius(D - delta.dense()))
        return target, update, cut

    def _pair(self, D: Array, name: str, key: str) -> tuple[Array, Array]:
        """Return the factors B and A of one weight's change.

        At full rank, one factor is the change itself and the other is an identity matrix, so nothing is lost.
        """
        import numpy as np

        if self.shared is not None:
            return balanced(*self.shared[key])
        small = min(D.shape)
        if self.criterion.keeps_all(small):
            identity = np.eye(small, dtype=D.dtype)
            return (D, identity) if D.shape[1] == small else (identity, D)
        D = D.astype(np.float32, copy=False)
        return balanced(*dominant(D, self.criterion, seed_of(name)))

    def _rows(self, name: str, tuned: Lazy, base: Lazy) -> Iterator[tuple[Target, Update | None, Cut]]:
        """Yield the changed and new rows of a table, or the whole table if most rows changed."""
        old = check_rows(name, tuned, base)
        index, square = changed_rows(name, tuned, base)
        new = range(old, tuned.shape[0])
        if not index and not new:
            return
        path, size = _path(name), math.sqrt(square)
        if 2 * len(index) > old:
            whole = Replacement(weight=tuned)  # type: ignore[arg-type, call-arg]
            yield Target(path), whole, Cut(path, whole.method, None, None, size, 0.0)
            return
        import numpy as np

        rows = np.array([*index, *new], dtype=np.int64)
        values = tuned.map(lambda table: table[rows], (len(rows), tuned.shape[1]))
        update = Rows(index=from_numpy(rows), values=values)  # type: ignore[arg-type]
        yield Target(path, "in out *k"), update, Cut(path, update.method, None, None, size, 0.0)


def _key(name: str, expert: int) -> str:
    return f"{name}\n{expert}"


def _weights(target: Target, D: Array) -> list[Array]:
    """Split a difference into matrices `[out, in * k]`, one for each stacked expert."""
    return [one.reshape(len(one), -1) for one in (D if target.stacked else [D])]


def _renamed(tuned: Checkpoint, base: Checkpoint, rules: Sequence[Rename]) -> Checkpoint:
    """Return the tuned model, with its tensors renamed to the base's names.

    Raises:
        TargetNotFound: a name is ambiguous, or a rule matches no name.
        UsageError: two tensors would get the same name.
    """
    known = {*base.tensors, *aliases(base)}
    paths = list(dict.fromkeys(map(_path, tuned.tensors)))
    if not rules and tuned.tensors.keys() <= known:
        return tuned

    def fits(path: str, place: str) -> bool:
        pairs = [(f"{path}{end}", f"{place}{end}") for end in (".weight", ".bias", "")]
        both = [(one, other) for one, other in pairs if one in tuned.tensors and other in base.tensors]
        return all(tuned.tensors[one].shape == base.tensors[other].shape for one, other in both)

    names = Names(paths_of(known))
    architecture = architecture_of(base.config) or architecture_of(tuned.config)
    resolution = resolve(paths, names, architecture=architecture, renames=rules, partial=True, fits=fits)
    tensors: dict[str, Lazy] = {}
    home: dict[str, Path] = {}
    for name, tensor in tuned.tensors.items():
        moves = resolution.moves.get(_path(name), ())
        new = f"{moves[0].path}{name[len(_path(name)) :]}" if len(moves) == 1 and moves[0].plain else name
        if new in tensors:
            cure = "Correct --rename (rename=) so that every weight gets a different name"
            raise UsageError(f"two weights would be renamed to {new}", path=tuned.root, where=name, cure=cure)
        tensors[new], home[new] = tensor, tuned.home[name]
    return replace(tuned, tensors=tensors, home=home)


def _path(name: str) -> str:
    """Return the target path of a tensor: its name without `.weight` or `.bias`, or else the whole name."""
    return name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name


def _exact_type(pairs: list[tuple[Array, Array]]) -> DType:
    """Return float64 if a full-rank pair contains a float64 difference, else float32."""
    exact = any(B.dtype == A.dtype == "float64" and len(A) in (len(B), A.shape[1]) for B, A in pairs)
    return DTYPES["F64" if exact else "F32"]


def _carried(tuned: Checkpoint) -> dict[str, dict[str, str]]:
    """Return a lineage argument with the metadata from the headers of the tuned model's files.

    The result is empty if the headers contain no metadata.
    """
    pairs = [[key, value] for file in tuned.files for key, value in tuned.metadata.get(file, {}).items()]
    metadata = metadata_of(Adapter({}, foreign=Foreign("", {METADATA: pairs})))
    return {METADATA: metadata} if metadata else {}


def _reference(base: Checkpoint) -> BaseRef:
    """Return the base's identity, to record in the adapter."""
    config = base.config
    digest = None if config is None else config_hash(config)
    return BaseRef(id=str((config or {}).get("_name_or_path") or base.root.name), config_hash=digest)
