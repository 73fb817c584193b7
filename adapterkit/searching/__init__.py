"""Search for the best combination of adapters: the method, weights and parameters with the lowest loss on your data.

Each trial combines the adapters and computes the loss of the combined adapter. To compute the loss on texts, the
combined adapter is attached to a base in memory. No merged model is written. Trials can be saved to a file, so that an
interrupted search can continue.

The first trials are fixed: the sum with equal weights, each adapter alone, every method with all weights 1, and the
caller's start combinations. Optuna's TPE sampler proposes each later trial, based on all earlier trials.

TPE was chosen after measurements on eight problems with known optima. Each problem has two adapters, three methods and
a density. The error of a result is measured in percent of the optimal change's squared norm. After 50 trials, the error
was at most 2 percent in six of the eight problems, and at most 5 percent in the other two. Optuna's Gaussian process
sampler finds smooth optima more exactly, but it keeps to the first good method that it finds. Its error was 5 to 26
percent in three of the eight problems.

A proposal depends only on the seed, the number of the trial and the earlier trials. A resumed search therefore makes
the same trials as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias, cast

from ..core.adapter import Adapter
from ..core.arguments import checks_types
from ..errors import AdapterkitError, Unsupported, UsageError, nearest, shown
from ..io.checkpoint import fingerprint, opened
from ..io.locations import local
from ..io.stages import detail, stage
from ..ops.algebra import listed
from ..ops.alignment import places, source_adapter
from ..ops.combiners import COMBINERS
from ..ops.combining import check_rank, combine
from ..ops.parameters import resolved
from ..ops.recipes import Recipe, read_recipe
from .result import Journal, Search, Trial
from .text_data import LiveBase, TextData, cross_entropy

if TYPE_CHECKING:
    from ..ops.alignment import Source
    from ..ops.combiners._combiner import Combiner
    from ..ops.lowering import Base

    Score = Callable[[Adapter], float]

__all__ = ["METHODS", "Search", "TextData", "Trial", "search"]


Combination: TypeAlias = tuple[str, Sequence[float], Mapping[str, float | str]]
"""A method, one weight per adapter, and the method's parameters."""

Start: TypeAlias = Combination | str | PathLike[str]
"""A combination, the name of a method (with all weights 1), or the path of a recipe."""


def combinations(
    start: Sequence[Start], names: Sequence[str], *, seed: int, rank: int | str | None, base: str | None
) -> list[Combination]:
    """Convert the start combinations to (method, weights, parameters).

    Args:
        start: the caller's start combinations.
        names: the names of the adapters; a recipe must name the same adapters, in any order.
        seed: the seed of the search.
        rank: the `rank` of the search. A seed, rank or base in a recipe must be the same as in the search.
        base: the path of the base, or None.

    Raises:
        UsageError: a name is neither a method nor a file, or a recipe has a setting that a search cannot use.
        Malformed: a file is not a recipe.
    """
    if isinstance(start, (str, PathLike)):
        raise UsageError(
            f"start must be a list, got {shown(start)}", where="start", cure="Pass a list with --start (start=[...])"
        )
    choices: list[Combination] = []
    for each in start:
        if isinstance(each, (tuple, list)):
            choices.append(_given(each))
        elif isinstance(each, str) and is_method(each):
            choices.append((each, (1.0,) * len(names), {}))
        elif local(each).is_file():
            choices.append(_of_recipe(local(each), names, seed, rank, base))
        else:
            known = nearest(fspath(each), COMBINERS)
            cure = f"{known or 'See adapterkit list combine for the methods'}; or pass a recipe with --start (start=)"
            raise UsageError(f"{fspath(each)!r} is neither a method nor a recipe", where="start", cure=cure)
    return choices


def _given(given: Sequence[object]) -> Combination:
    """Check that `given` is (method, weights, parameters), and return it as a combination.

    Raises:
        UsageError: `given` is not (method, weights, parameters).
    """
    kinds = (str, Sequence, Mapping)
    if len(given) != len(kinds) or not all(isinstance(part, kind) for part, kind in zip(given, kinds, strict=True)):
        why = f"{shown(given)} is not a tuple (method, weights, parameters)"
        raise UsageError(why, where="start", cure='Pass a tuple as in ("ties", [1, 0.5], {"density": 0.3})')
    return cast("Combination", tuple(given))


def is_method(name: str) -> bool:
    """Whether a name is a combiner's name, or the joined names of two combiners, such as `knots_ties`."""
    return resolved(name, None)[0] in COMBINERS


def _of_recipe(path: Path, names: Sequence[str], seed: int, rank: int | str | None, base: str | None) -> Combination:
    recipe = read_recipe(path)
    options = dict(recipe.options)
    order = _order(recipe, names, path)
    weights, method = options.pop("weights"), options.pop("method")
    ours = {"seed": seed, "rank": rank, "base": base}
    for key in ours.keys() & options.keys():
        theirs = options.pop(key)
        if theirs != ours[key] and not (key == "base" and _same_path(theirs, base)):
            why = f"the recipe has {key} {theirs}, but the search has {key} {ours[key]}"
            raise UsageError(why, path=path, where=key, cure=f"Pass --{key} {theirs} ({key}=), or change the recipe")
    for key in ("compat", "each", "dtype", "disjoint"):
        if options.pop(key, None):
            cure = f"Remove {key} from the recipe, or pass the recipe's method instead with --start (start=)"
            raise UsageError(f"a search cannot use the setting `{key}` of a recipe", path=path, where=key, cure=cure)
    for key, value in [*(("weight", weight) for weight in weights), *options.items()]:
        if isinstance(value, (Mapping, list)):
            cure = f"In the recipe, set {key} to one value for all targets"
            raise UsageError(f"{key} differs between targets", path=path, where=key, cure=cure)
    return method, [cast("float", weights[at]) for at in order], options


def _order(recipe: Recipe, names: Sequence[str], path: Path) -> list[int]:
    """For each adapter of the search, return the index of the same adapter in the recipe."""
    left = list(range(len(recipe.adapters)))
    order: list[int] = []
    for name in names:
        at = next((at for at in left if _same_path(recipe.adapters[at], name)), None)
        if at is not None:
            left.remove(at)
            order.append(at)
    if left or len(order) < len(names):
        why = f"the recipe combines {', '.join(recipe.adapters)}, but the search combines {', '.join(names)}"
        raise UsageError(
            why, path=path, where="models", cure="Name the same adapters in the recipe and in the search, in any order"
        )
    return order


def _same_path(one: str, other: str | None) -> bool:
    return one == other or (other is not None and local(one).resolve() == local(other).resolve())


METHODS = ("linear", "ties", "tsv", "knots_ties")
"""The methods to try by default. They are fast, differ from each other, and do not need data or the base's weights."""

DENSITY = (0.05, 1.0)
"""The bounds of the parameter `density`, for methods that have it."""

MOST = 1.5
"""The default of `search(most=)`, the largest weight to try."""

COUNT, LENGTH = 64, 256
"""The loss is computed on at most `COUNT` texts, with at most `LENGTH` tokens per text. With these limits, a trial with
a small model takes seconds."""


@checks_types
def search(
    adapters: Sequence[Source],
    data: Score | str | PathLike[str],
    *,
    base: Base | None = None,
    methods: Sequence[str] | None = None,
    budget: int = 50,
    tune: Mapping[str, tuple[float, float]] | None = None,
    most: float = MOST,
    rank: int | str = "fit",
    start: Sequence[Start] = (),
    seed: int = 0,
    trials: str | PathLike[str] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    progress: Callable[[int, int], object] | None = None,
) -> Search:
    """Find the method, weights and parameters whose combination has the lowest loss.

    Each trial combines the adapters and computes the loss of the result. No merged model is written.

    Args:
        adapters: at least two adapters, or their paths. The adapters may have any additive methods.
        data: a file of texts (one per line, or JSON Lines with a field `text`), or a function that takes the combined
            adapter and returns a loss. For a file of texts, the combined adapter is attached to the base, and the loss
            is the mean per predicted token, in nats.
        base: a folder with a transformers language model. The base is required if `data` is a file of texts, or if a
            method needs the base's weights. If the base is given, target names are resolved against it.
        methods: the methods to choose from; default: `METHODS` and the methods in `start`.
        budget: the total number of trials, including trials of earlier runs that `trials` contains.
        tune: further parameters to search: parameter -> (lowest value, highest value), such as `{"scale": (0.2, 2)}`.
            The parameter `density` is always searched.
        most: the largest weight to try; the smallest weight is 0.
        rank: the rank to which combined adapters are cut: a number, or `fit`. With `fit`, a result without low-rank
            factors is cut to the largest rank that the adapters have at the target, and other results are not cut.
            Results of `linear` are never cut.
        start: combinations to try first. The result is at least as good as these combinations. A combination is
            (method, weights, parameters), the name of a method (with all weights 1), or the path of a recipe that names
            the same adapters. If `methods` is given, it must contain the methods of these combinations.
        seed: the seed of the search, and of methods that use random numbers.
        trials: the path of a file in which the trials are saved. If it has trials of the same search, the search
            continues after them. If `trials` is None, trials are not saved.
        overwrite: whether to replace the file `trials` if it belongs to another search.
        device: the device on which the base runs the texts: `auto`, `cpu` or `cuda:N`.
        progress: a function that is called after each trial with (number of completed trials, budget).

    Returns:
        All trials, the best trial, and its recipe.

    Raises:
        UsageError: there are fewer than two adapters, the budget is smaller than the number of fixed first trials, a
            method or parameter is unknown, a method learns from data, a recipe names other adapters or has a setting
            that a search cannot use, texts are given without a base, the file `trials` belongs to another search, or no
            trial has a loss.
        Malformed: a file in `start` is not a recipe, or the file `trials` does not contain trials.
        Unsupported: Optuna is not installed.

    Example:
        >>> found = ak.search(["math", "code"], "validation.jsonl", base="base", budget=30)
        >>> print(found.recipe())
    """
    adapters = listed(adapters)
    if len(adapters) < 2:
        raise UsageError("a search needs at least two adapters", where="adapters", cure="Pass two adapters or more")
    # Numbers of numpy become Python's, because they are stored as JSON.
    numbers: Any = (seed, most, budget)
    seed, most, budget = (value.item() if hasattr(value, "item") else value for value in numbers)
    if methods is not None and not (methods := tuple(methods)):
        cure = "Name a method with --method (methods=), or omit it"
        raise UsageError("methods is empty", where="methods", cure=cure)
    names = tuple(
        f"adapter{at}" if isinstance(source, Adapter) else fspath(source) for at, source in enumerate(adapters)
    )
    base_text = None if base is None else fspath(base) if isinstance(base, (str, PathLike)) else str(base.root)
    first = combinations(start, names, seed=seed, rank=rank, base=base_text)
    chosen_from = methods or [*METHODS, *(method for method, _, _ in first)]
    space = Space(_checked(chosen_from, len(adapters), base), len(adapters), most, tune or {})
    known = [*space.known(), *space.started(first)]
    if budget < len(known):
        why = f"the budget is {budget}, but this search begins with {len(known)} fixed trials"
        cure = (
            f"Pass --budget {len(known)} (budget=) or more; or pass fewer methods with --method (methods=), "
            "or fewer combinations with --start (start=)"
        )
        raise UsageError(why, where="budget", cure=cure)
    read = [source_adapter(source, base) for source in adapters]
    # Check the rank before the trials. Only an error in the first trial ends a search, and the first trial is a sum,
    # which does not use the rank. A search with a wrong rank would therefore continue although its later trials fail.
    check_rank(rank, places(read, base=base, disjoint=True)[1])
    journal = Journal(
        None if trials is None else Path(trials).expanduser(),
        {
            "adapters": [adapter.digest() for adapter in read], "data": _identity(data), "methods": list(space.methods),
            "base": None if base is None else fingerprint(opened(base)),
            "tune": {name: list(bounds) for name, bounds in space.tune.items()}, "most": most, "rank": rank,
            "seed": seed, **({"start": [[m, list(map(float, w)), dict(p)] for m, w, p in first]} if first else {}),
        },
        overwrite=overwrite,
    )  # fmt: skip
    resumed = len(journal.trials)
    if resumed < budget:
        score = data if callable(data) else _texts_score(data, base, device, seed)
        for number in range(resumed, budget):
            stage(f"trial {number + 1} of {budget}")
            chosen = known[number] if number < len(known) else space.proposed(journal.trials, seed)
            journal.add(_tried(chosen, number, read, base, rank, seed, score))
            if progress is not None:
                progress(number + 1, budget)
    result = Search(names, tuple(journal.trials), base_text, seed, rank, resumed)
    if result.best.loss is None:
        why = f"none of {budget} trials has a loss; the first trial failed: {result.trials[0].refused}"
        raise UsageError(
            why, where="data", cure="If data is a function, it must return a finite number for each combined adapter"
        )
    return result


def _checked(methods: Sequence[str], count: int, base: Base | None) -> tuple[str, ...]:
    """Return the methods without duplicates.

    Raises:
        UsageError: a method cannot combine `count` adapters, learns from data, or needs a base that is not given.
    """
    for name in methods:
        cls = COMBINERS[resolved(name, None, count)[0]]
        least, largest = cls.takes
        if count < least or (largest is not None and count > largest):
            why = f"{name} cannot combine {count} adapters"
            raise UsageError(why, where="methods", cure=f"Omit {name} from --method (methods=)")
        if cls.data is not None:
            why = f"{name} learns from data, but a search does not pass data to its methods"
            raise UsageError(
                why, where="methods", cure=f"Omit {name} from --method (methods=), or use combine with --data (data=)"
            )
        if cls.based and base is None:
            raise UsageError(f"{name} needs the base", where="methods", cure="Pass --base BASE (base=)")
    return tuple(dict.fromkeys(methods))


def _identity(data: object) -> str | None:
    """Return a digest of the texts. Return None for a function, because functions of two runs cannot be compared."""
    if callable(data):
        return None
    from ..io.inputs import read_input
    from ..io.locations import located

    return hashlib.sha256(read_input(located(cast("str", data)))).hexdigest()


def _tried(
    chosen: Trial, number: int, read: Sequence[Adapter], base: Base | None, rank: int | str, seed: int, score: Score
) -> Trial:
    """Combine the adapters as in `chosen`, compute the loss, and return the completed trial."""
    loss, refused = None, None
    try:
        cut = None if chosen.method == "linear" else rank
        parameters: dict[str, Any] = dict(chosen.parameters)
        combined = combine(read, chosen.method, list(chosen.weights), base=base, rank=cut, seed=seed, **parameters)
        loss = _number(score(combined))
    except AdapterkitError as error:
        # If the first trial fails, raise the error: the other trials would probably fail in the same way. If a later
        # trial fails, continue the search.
        if number == 0:
            raise
        refused = str(error)
    if loss is not None and not math.isfinite(loss):
        loss, refused = None, f"the loss is {loss}"
    trial = Trial(number, chosen.method, chosen.weights, chosen.parameters, loss, refused)
    detail(f"{trial.settings()}: {refused or f'{loss:.6g}'}")
    return trial


def _number(loss: object) -> float:
    """Return a loss as a float.

    Raises:
        UsageError: the loss is not a number.
    """
    try:
        return float(cast("Any", loss))
    except (TypeError, ValueError):
        why = f"the loss is {shown(loss)}, not a number"
        cure = "Pass a function that returns a finite number for each combined adapter"
        raise UsageError(why, where="data", cure=cure) from None


def _bounds(name: str, pair: object) -> tuple[float, float]:
    try:
        low, high = map(float, cast("Any", pair))
    except (TypeError, ValueError):
        why = f"the bounds of {name} are {shown(pair)}, not two numbers"
        raise UsageError(why, where="tune", cure='Pass bounds as in {"scale": (0.2, 2)}') from None
    return low, high


class Space:
    """The combinations that a search can try: a method, a weight for each adapter, and the method's parameters.

    Args:
        methods: the names of combiners.
        count: the number of adapters.
        most: the largest weight.
        tune: further parameters to search: parameter -> (lowest value, highest value).

    Raises:
        UsageError: a parameter in `tune` belongs to no method, its lowest value is not less than its highest value, or
            `most` is less than 1.
    """

    def __init__(
        self, methods: Sequence[str], count: int, most: float, tune: Mapping[str, tuple[float, float]]
    ) -> None:
        self.methods, self.count, self.most = tuple(methods), count, most
        given = {name: _bounds(name, pair) for name, pair in tune.items()}
        self.tune: dict[str, tuple[float, float]] = {}
        for name, (low, high) in ({"density": DENSITY} | given).items():
            known = [self._holders(method)[name] for method in methods if name in self._holders(method)]
            if name in given and not known:
                why = f"none of the methods to try has a parameter {name!r}"
                raise UsageError(why, where="tune", cure="To see the parameters, type: adapterkit list combine")
            if not low < high:
                raise UsageError(
                    f"the bounds of {name} are {low} and {high}",
                    where="tune",
                    cure="Pass two different bounds, the smaller bound first",
                )
            for holder, bound in ((holder, bound) for holder in known for bound in (low, high)):
                holder.checked(name, bound)
            self.tune |= {name: (low, high)} if known else {}
        if not 1 <= most < math.inf:
            raise UsageError(
                f"the largest weight is {most}, but it must be a number of at least 1",
                where="most",
                cure="Pass 1 or more with --most (most=): a search also tries each adapter alone, at weight 1",
            )

    def _holders(self, method: str) -> dict[str, type[Combiner]]:
        """Return a map from each parameter of a method to the combiner that defines the parameter.

        A joined method such as `knots_ties` has the parameters of both of its combiners.
        """
        name, values = resolved(method, None, self.count)
        holders = dict.fromkeys(COMBINERS[name].parameters(), COMBINERS[name])
        then = str(values.get("then") or "")
        return dict.fromkeys(COMBINERS[then].parameters(), COMBINERS[then]) | holders if then else holders

    def known(self) -> list[Trial]:
        """Return the trials with which every search begins. The caller's start combinations are not among them."""
        equal, ones = (1.0 / self.count,) * self.count, (1.0,) * self.count
        units = [tuple(float(other == at) for other in range(self.count)) for at in range(self.count)]
        first = [Trial(0, "linear", weights) for weights in (equal, *units)]
        return first + [Trial(0, method, ones) for method in self.methods]

    def started(self, start: Sequence[Combination]) -> list[Trial]:
        """Return the trials of the caller's start combinations.

        Raises:
            UsageError: a method is not in `methods`, the number of weights is wrong, a weight is out of bounds, or a
                parameter does not belong to its method.
        """
        trials = []
        for method, weights, parameters in start:
            if method not in self.methods:
                cure = f"Add {method} to --method (methods=), or start from one of: {', '.join(self.methods)}"
                raise UsageError(f"{method} is not one of the methods to try", where="start", cure=cure)
            numbers = all(isinstance(weight, SupportsFloat) for weight in weights)
            if len(weights) != self.count or not numbers or not all(0 <= weight <= self.most for weight in weights):
                why = f"the search cannot start from {method} with the weights {' '.join(map(str, weights))}"
                cure = f"Give {self.count} weights from 0 to {self.most:g}; --most (most=) allows larger weights"
                raise UsageError(why, where="start", cure=cure)
            holders = self._holders(method)
            for name, value in parameters.items():
                holders.get(name, COMBINERS[resolved(method, None, self.count)[0]]).checked(name, value)
            trials.append(Trial(0, method, tuple(map(float, weights)), dict(parameters)))
        return trials

    def proposed(self, trials: Sequence[Trial], seed: int) -> Trial:
        """Return the next trial. The sampler proposes the trial, based on the earlier trials."""
        with _optuna() as optuna:
            drawn = (seed * 1_000_003 + len(trials)) % 2**32  # Optuna takes only seeds of 32 bits.
            sampler = optuna.samplers.TPESampler(seed=drawn, multivariate=True, n_startup_trials=0)
            study = optuna.create_study(sampler=sampler)
            # Hide a trial from the sampler if the sampler cannot propose the trial's method. For example, the first
            # trial uses `linear`, even if `methods` does not contain it.
            study.add_trials([self._as_optuna(optuna, t) for t in trials if t.method in self.methods])
            asked = study.ask()
            method = asked.suggest_categorical("method", self.methods)
            weights = tuple(asked.suggest_float(f"weight {at}", 0.0, self.most) for at in range(self.count))
            drawn_values = {name: asked.suggest_float(name, *bounds) for name, bounds in self.tune.items()}
        holders = self._holders(method)
        return Trial(len(trials), method, weights, {k: v for k, v in drawn_values.items() if k in holders})

    def _as_optuna(self, optuna: Any, trial: Trial) -> Any:
        # Set every parameter in every trial, because the sampler models only parameters that all trials have. If a
        # trial did not set a parameter, use the default of the trial's method. If the method has no numeric default for
        # the parameter, use the middle of the parameter's range.
        floats = optuna.distributions.FloatDistribution
        values: dict[str, Any] = {"method": trial.method}
        ranges: dict[str, Any] = {"method": optuna.distributions.CategoricalDistribution(self.methods)}
        for at, weight in enumerate(trial.weights):
            values[f"weight {at}"], ranges[f"weight {at}"] = weight, floats(0.0, self.most)
        holders = self._holders(trial.method)
        for name, (low, high) in self.tune.items():
            default = holders[name].defaults()[name] if name in holders else None
            usual = float(default) if isinstance(default, (int, float)) else (low + high) / 2
            values[name] = min(max(trial.parameters.get(name, usual), low), high)
            ranges[name] = floats(low, high)
        state = optuna.trial.TrialState
        if trial.loss is None:
            return optuna.trial.create_trial(params=values, distributions=ranges, state=state.FAIL)
        return optuna.trial.create_trial(params=values, distributions=ranges, value=trial.loss)


def _texts_score(data: Any, base: Base | None, device: str, seed: int) -> Score:
    """Return a function that computes an adapter's loss on texts: the mean over all predicted tokens, in nats.

    Raises:
        UsageError: no base is given, the model does not predict tokens, or the file contains no texts.
        StorageError, Malformed: a file cannot be read.
    """
    if base is None:
        raise UsageError(
            "the loss on texts requires a base, but none is given", where="data", cure="Pass --base BASE (base=)"
        )
    live = LiveBase(base, device)
    live.check_predicts()
    feeds = live.feeds(data, COUNT, LENGTH, seed)

    def score(adapter: Adapter) -> float:
        with live.attached(adapter):
            return live.mean(feeds, cross_entropy)

    return score


@contextmanager
def _optuna() -> Iterator[Any]:
    """Yield the module `optuna`. Inside the block, Optuna logs only errors, and all Python warnings are silenced."""
    try:
        import optuna
    except ImportError:
        cure = "pip install 'adapterkit[search]'"
        raise Unsupported("a search needs Optuna, which is not installed", cure=cure) from None
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield optuna
    finally:
        logger.setLevel(level)
