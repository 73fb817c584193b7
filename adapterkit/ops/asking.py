"""What is asked of a combination: weights and parameters, checked, and as they are at each target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .combiners import COMBINERS
from .combiners._method import Method, made
from .settings import Depths, at_target, check_globs, plain

if TYPE_CHECKING:
    from ..core.adapter import Target
    from .places import Place


class Asked:
    """Weights and parameters of a method.

    Attributes:
        weights: one setting an adapter.
        each: parameters of single adapters.
        targets: all of them.
        varies: whether a parameter differs from target to target.
    """

    def __init__(
        self, name: str, values: Mapping[str, Any], weights: Sequence[Any] | None,
        each: Sequence[Mapping[str, Any]] | None, found: Sequence[Place], count: int,
    ) -> None:  # fmt: skip
        self.name = name
        self.values = {key: plain(value, key) for key, value in values.items()}
        self.weights = [plain(w, "weights") for w in ([1.0] * count if weights is None else weights)]
        self.each = self._own(each or [], count)
        if len(self.weights) != count:
            raise UsageError(f"{len(self.weights)} weights for {count} adapters", cure="Give one weight an adapter")
        self.targets = [place.target for place in found]
        self.depths = Depths(self.targets)
        for key, value in [*self.values.items(), *(("weights", w) for w in self.weights)]:
            check_globs(value, self.targets, key)
        self.varies = any(isinstance(value, (Mapping, list)) for value in self.values.values())

    def _own(self, each: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
        """Parameters of single adapters, checked."""
        if each and len(each) != count:
            raise UsageError(
                f"parameters of {len(each)} adapters for {count}", where="each", cure="Give one mapping each"
            )
        if not all(isinstance(own, Mapping) for own in each):
            raise UsageError("parameters of an adapter are a mapping", where="each", cure='Such as {"density": 0.5}')
        cls = COMBINERS[self.name]
        if cls.plug is not None:
            cls = COMBINERS[str(self.values.get("then", cls.defaults()["then"]))]
        for key in {key for own in each for key in own} - cls.single:
            known = ", ".join(sorted(cls.single)) or "none"
            raise UsageError(f"{key!r} is not of single adapters", where="each", cure=f"Such parameters: {known}")
        return [{key: cls.checked(key, value) for key, value in own.items()} for own in each]

    def method(self, target: Target) -> Method:
        return made(COMBINERS[self.name], self._at(target))

    def _at(self, target: Target) -> dict[str, Any]:
        """The parameters that were given, as they are at a target."""
        own = {key: at_target(value, target, self.depths, None) for key, value in self.values.items()}
        return {key: value for key, value in own.items() if value is not None}

    @property
    def counts(self) -> bool:
        """Whether numbers of whole adapters are needed first: at any target, by any adapter's own parameters."""
        targets = self.targets if self.varies else self.targets[:1]
        values = [(self._at(target), own) for target in targets for own in self.each or [{}]]
        return any(made(COMBINERS[self.name], {**at, **own}).counts for at, own in values)

    def weights_at(self, target: Target) -> list[float]:
        found = [at_target(weight, target, self.depths, 1.0) for weight in self.weights]
        for weight in found:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UsageError(f"weight {weight!r} is no finite number", where=str(target), cure="Give a number")
        return [float(weight) for weight in found]

    def record(self, method: Method) -> dict[str, Any]:
        return {**method.values(), **self.values}


def one_of(value: Any, key: str) -> Any:
    """One of the values that a setting takes, to check the method with."""
    value = plain(value, key)
    while isinstance(value, (Mapping, list)):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value
