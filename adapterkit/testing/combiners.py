"""Tests that a combiner must pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ..core.adapter import Adapter, Target
from ..errors import Unsupported, UsageError
from ..formats import read
from ..ops import COMBINERS, combine
from ..writing import write
from .examples import example

if TYPE_CHECKING:
    from ..io.computed import Array
    from ..io.lazy import Leaf


class CombinerTests:
    """Tests of a combiner.

    Attributes:
        combiner: the name of the combiner.
        parameters: values for the required parameters of the combiner.
        count: the number of adapters to combine.
    """

    combiner: ClassVar[str] = ""
    parameters: ClassVar[dict[str, Any]] = {}
    count: ClassVar[int] = 3

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # If a test does not apply, set it to None: pytest then does not collect the test, and does not show a skip.
        if cls.combined is CombinerTests.combined:
            cls.test_its_formula_is_the_papers = None  # type: ignore[assignment, method-assign]
        if cls.combiner in COMBINERS and "rank" in COMBINERS[cls.combiner].parameters():
            cls.test_a_rank_cuts_the_result = None  # type: ignore[assignment, method-assign]

    def options(self) -> dict[str, Any]:
        """Return further arguments for `adapterkit.combine`: `base`, `data`, `compat`."""
        return {}

    def combined(self, changes: list[Array], weights: list[float]) -> Array:
        """Return the combined change of a weight in float64 numpy, without using the combiner's class.

        Args:
            changes: dense changes `[out, in]`, one per adapter.
            weights: one weight per adapter.

        Returns:
            The change `[out, in]`. If a subclass defines this method, the combiner is compared with it.
        """
        raise Unsupported("the tests have no formula to compare with", cure="Define `combined` in the test class")

    def adapters(self) -> list[Adapter]:
        """Return the adapters to combine: LoRAs of rank 2 at two targets, in float64 to avoid rounding."""
        made = []
        for number in range(self.count):
            updates = {}
            for place, path in enumerate(("q", "v")):
                update = example("lora", out=6, inputs=5, seed=10 * number + place, scaling=0.5 + number)
                updates[Target(path)] = (update.map(_wide),)
            made.append(Adapter(updates))
        return made

    def result(self, adapters: list[Adapter], weights: list[float] | None = None, **more: Any) -> Adapter:
        """Combine the adapters."""
        given = self.parameters | self.options() | more
        return combine(adapters, self.combiner, weights, **given)

    def test_it_says_where_it_is_from(self) -> None:
        assert self.combiner not in COMBINERS.refused(), COMBINERS.refused()[self.combiner]
        cls = COMBINERS[self.combiner]
        assert cls.title, "set `title` to the name of the combiner in papers"
        assert cls.paper, "set `paper` to the source of the formula"
        for name, field in cls.parameters().items():
            assert field.metadata["meaning"], f"set the meaning of the parameter {name}"

    def test_its_formula_is_the_papers(self) -> None:
        import numpy as np

        adapters, weights = self.adapters(), [1.0, 0.5, 2.0][: self.count]
        for path in ("q", "v"):
            changes = [each.delta(path).double().numpy() for each in adapters]
            expected = self.combined(changes, weights)
            found = self.result(adapters, weights).delta(path).double().numpy()
            size = max(float(np.abs(expected).max()), 1e-12)
            assert float(np.abs(found - expected).max()) <= 1e-5 * size

    def test_the_same_call_gives_the_same_numbers(self) -> None:
        one, two = (self.result(self.adapters()) for _ in range(2))
        assert one.digest() == two.digest()

    def test_the_result_has_all_targets_and_can_be_written(self, tmp_path: Path) -> None:
        made = self.result(self.adapters())
        assert {str(target) for target in made.updates} == {"q", "v"}
        made.validate()
        made.check_values()
        write(made, tmp_path / "x.safetensors", "adapterkit")
        back = read(tmp_path / "x.safetensors")
        assert back.digest() == made.digest()
        assert back.recipe[-1].args["method"] == self.combiner

    def test_one_adapter_lacks_a_target(self) -> None:
        first, *others = self.adapters()
        lacking = first.replace(updates={t: u for t, u in first.updates.items() if t.path != "v"})
        made = self.result([lacking, *others])
        assert {str(target) for target in made.updates} == {"q", "v"}

    def test_a_rank_cuts_the_result(self) -> None:
        import numpy as np

        made = self.result(self.adapters(), rank=2)
        for path in ("q", "v"):
            S = np.linalg.svd(made.delta(path).double().numpy(), compute_uv=False)
            assert (S[2:] <= 1e-6 * max(S[0], 1e-12)).all()

    def test_wrong_parameters_are_refused(self) -> None:
        with pytest.raises(UsageError):
            self.result(self.adapters(), no_such_parameter=1)
        with pytest.raises(UsageError):
            self.result(self.adapters(), [1.0] * (self.count + 1))
        with pytest.raises(UsageError):
            self.result([])


def _wide(leaf: Leaf) -> Leaf:
    import torch

    assert isinstance(leaf, torch.Tensor)
    return leaf.double()
