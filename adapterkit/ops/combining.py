"""Combine several adapters into one with a method in `COMBINERS`; this module checks and resolves the arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, cast

from ..core.adapter import Adapter
from ..errors import UsageError
from ..io.checkpoint import opened
from ..io.stages import stage
from .alignment import places, source_adapter
from .at_base import Weights
from .building import of_several, result_type
from .combiners import COMBINERS
from .combiners._combiner import made
from .evaluating import FIT, Evaluation
from .parameters import Asked, one_of, peft_result, resolved

if TYPE_CHECKING:
    from .alignment import AlignedPlace, Source
    from .combiners._combiner import Value
    from .lowering import Base
    from .parameters import Setting
    from .resizing import Report


def combine(
    adapters: Sequence[Source],
    method: str = "linear",
    weights: Sequence[Setting] | None = None,
    *,
    base: Base | None = None,
    rank: int | str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    compat: str | None = None,
    data: Callable[..., object] | None = None,
    each: Sequence[Mapping[str, Value]] | None = None,
    disjoint: bool = False,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
    workers: int | None = None,
    report: Report | None = None,
    before: Callable[[Adapter], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **parameters: Setting,
) -> Adapter:
    """Combine several adapters into one.

    Args:
        adapters: adapters or their paths, of any additive methods, ranks and targets. At each target, the adapters that
            lack the target are ignored.
        method: a name in `COMBINERS`, or a plug-in joined with another combiner, such as `knots_ties`.
        weights: one weight per adapter; default: 1. A weight is a number, a list of numbers from the first layer to the
            last, or a mapping from globs of targets to numbers or lists. The first glob that matches a target is used;
            if none matches, the weight is 1.
        base: the base. Names and layouts are resolved against the base, and some methods need its weights.
        rank: the rank to which the result is cut at each target. The cut is the best approximation of this rank; for
            large matrices without low-rank factors, it is nearly the best. `"fit"` cuts only results without low-rank
            factors, to the largest rank of the inputs. Every result is then a LoRA; results with low-rank factors keep
            the sum of the ranks.
        dtype: the dtype of computed results; default: float64 if any tensor is float64, else float32.
        seed: the seed of random draws; a draw depends only on the seed, the target and the adapter's position.
        compat: `mergekit` or `peft`: use that tool's method names and defaults.
        data: a function that provides samples or scores, for methods that need them; see `COMBINERS[name].data`.
            `TextData` makes the function from texts.
        each: parameters that apply to one adapter only, one mapping per adapter, such as `[{"density": 0.5}, {}]`.
        disjoint: whether to allow adapters that have no target in common.
        rename: rules for names, each `FROM=TO` or `@FILE`, for all adapters. The first rule that matches a target's
            name is used.
        strict_base: whether to refuse a base that differs from the base that an adapter records.
        workers: the number of targets to compute in parallel; default: one per processor, at most 16. All workers
            together use at most 256 MB, or as much as one target's result. The result does not depend on the number of
            workers. Methods with `data` use one worker.
        report: a function that is called with a `Cut` for each target whose result was cut to a rank. The `Cut`
            contains the norms of the result and of the error.
        before: a function that is called before any computation, with an adapter that has the targets, methods, shapes
            and dtypes of the result, but no readable tensors. If the function raises an error, such as a format's
            `Unrepresentable`, the combination stops.
        progress: a function that is called with (bytes of finished targets, total bytes). The bytes are those of the
            weights in float32.
        parameters: parameters of the method. Each may be a value, a list over the layers, or a mapping from globs, like
            a weight.

    Returns:
        the combined adapter: LoRA updates if the method works on factors, else dense differences that are computed when
        they are read. If a target's result is zero although its changes are not, or is too small for its dtype, the
        last step of the lineage lists the target in `warnings`.

    Raises:
        CheckFailed: the base differs from the base that an adapter records, and `strict_base` is set.
        Unsupported: the method or the tool in `compat` is unknown.
        UsageError: weights, parameters or data do not fit; the adapters have no target in common; the rank is larger
            than possible.
        NotMergeable: a method does not change weights.
        ShapeMismatch: the adapters were made for different weights.
        Malformed: a tensor contains a NaN or an infinity.
    """
    if isinstance(adapters, (str, PathLike, Adapter)):
        raise UsageError("a single adapter was given instead of a list", cure="Pass a list of adapters")
    name, values = resolved(method, compat, len(adapters))
    values |= parameters
    peers_rank = cast("int | str | None", values.pop("rank", None))
    cut = peers_rank if rank is None else rank
    # For combiners that compute factors of a given rank, such as `ctm`, `rank` is a parameter of the method and cuts
    # nothing.
    if "rank" in COMBINERS[name].parameters():
        values, cut = values | ({} if rank in (None, FIT) else {"rank": rank}), FIT if rank == FIT else None
    _check_given(name, adapters, base, data, seed)
    # Check one value of each setting, to find invalid parameters before any adapter is read.
    first = made(COMBINERS[name], {key: one_of(value, key) for key, value in values.items()})
    summing = first.sums([1.0] * len(adapters)) is not None
    # Without a cut, a plain sum joins the updates without computing products. With a cut, the sum is computed like any
    # other result.
    lower = None if summing and cut is None else "combined"
    base = None if base is None else opened(base)
    given = [source_adapter(source, base) for source in adapters]
    read, found = places(given, base=base, lower=lower, disjoint=disjoint, rename=rename, strict_base=strict_base)
    check_rank(rank, found)
    fallback = max((number for adapter in given for number in adapter.ranks), default=None)
    stage(f"combining {len(read)} adapters by {name}")
    asked = Asked(name, values, weights, each, found, len(read))
    own = {place.target: place.updates[0] for place in found}
    seen = None if base is None or not first.based else Weights(own, base)
    factor = 1.0
    if compat == "peft":
        exact, factor = peft_result(method, read, rank if isinstance(rank, int) else None)
        cut = cut if exact is None and rank == FIT else exact
    kind = result_type(read, dtype)
    work = Evaluation(asked, found, kind, cut, seed, data, seen, factor, fallback, progress, workers)
    said = {
        "method": name, "parameters": asked.record(first), "weights": asked.weights, "seed": seed,
        "each": [dict(own) for own in asked.each], "rank": cut, "compat": compat,
    }  # fmt: skip
    said = {key: value for key, value in said.items() if value not in (None, [])}
    if before is not None:
        # Give the outline the lineage of the result, because formats read the family of the model from the lineage.
        before(of_several(read, work.outline(), "combine", **said))
    updates = work.updates(read)
    for lost in work.cuts if report is not None else ():
        report(lost)  # type: ignore[misc]
    said |= {"warnings": sorted(work.notes)} if work.notes else {}
    return of_several(read, updates, "combine", **said)


def _check_given(name: str, adapters: Sequence[Source], base: Base | None, data: object, seed: object) -> None:
    """Check that the method accepts the arguments; see `combine`."""
    cls = COMBINERS[name]
    if not adapters:
        raise UsageError("no adapter was given", cure="Name at least one adapter")
    low, high = cls.takes
    if not low <= len(adapters) <= (len(adapters) if high is None else high):
        counts = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        raise UsageError(f"{name} takes {counts} adapters, not {len(adapters)}", cure="Choose another method")
    if cls.data is not None and not callable(data):
        texts = "Name texts with --data FILE and --base BASE, or pass" if cls.learns is not None else "Pass"
        raise UsageError(f"{name} needs data", where="data", cure=f"{texts} data=, {cls.data}")
    if cls.data is None and data is not None:
        raise UsageError(
            f"{name} does not use data", where="data", cure="Omit --data (data=), or choose another method"
        )
    if cls.based and base is None:
        raise UsageError(f"{name} needs the weights of the base", where="base", cure="Pass base=/--base")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed {seed!r} is not a whole number from 0", where="seed", cure="Pass a seed from 0 on")


def check_rank(rank: object, found: Sequence[AlignedPlace]) -> None:
    """Check that at least one weight is large enough for the rank.

    Raises:
        UsageError: no weight can have the rank, and it is neither None nor `FIT`.
    """
    if rank is None or rank == FIT:
        return
    most = max(min(place.shape[0], math.prod(place.shape[1:])) for place in found)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        why = f"the rank is {rank!r}, but the weights have at most rank {most}"
        raise UsageError(why, where="rank", cure=f"Choose a rank from 1 to {most}")
