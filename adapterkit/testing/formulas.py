"""Tests that every method and every combiner must pass, and random updates for all tests of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ..core.adapter import Adapter, Target
from ..core.updates import Update
from ..errors import AdapterkitError, Unsupported, UsageError
from ..formats import read
from ..io.lazy import from_numpy
from ..methods import METHODS
from ..ops import COMBINERS, combine
from ..ops.algebra import scale
from ..writing import write

if TYPE_CHECKING:
    from ..io.computed import Array
    from ..io.lazy import Leaf

    Guise = Callable[[list[Adapter], int], tuple[list[Adapter], int]]


def example(
    method: str, *, out: int = 8, inputs: int = 16, rank: int = 2, seed: int = 0, **attributes: object
) -> Update:
    """Return an update of a linear layer, with random numbers in all trained tensors.

    The method's `initial` creates the update. A new update changes nothing, so random numbers are added to its trained
    tensors.

    Args:
        method: the name of the method.
        out: the number of the layer's outputs.
        inputs: the number of the layer's inputs.
        rank: the rank of the update's factors.
        seed: the seed of the random numbers.
        attributes: values of the method's attributes.

    Returns:
        The update, with tensors in float32 on the CPU.

    Raises:
        Unsupported: the method has no `initial`. Tests of such a method must create an update themselves.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cls: Any = METHODS[method]
    if not hasattr(cls, "initial"):
        raise Unsupported(f"{method} has no `initial`", cure="Define `update` in the test class")
    W, b = random((out, inputs)), random((out,))
    update: Update = cls.initial(W, b, rank, random, **attributes)
    moved = {
        name: leaf.float() + 0.2 * random(tuple(leaf.shape))
        for name, leaf in update.tensors.items()
        if name not in update.frozen and torch.is_tensor(leaf) and leaf.is_floating_point()
    }
    return update.replace(**moved)


def adapter_of(update: Update, *paths: str) -> Adapter:
    """Return an adapter with the same update at each target path."""
    return Adapter({Target(path): (update,) for path in paths})


class MethodTests:
    """Tests of a method's fields and formula.

    Attributes:
        method: the name of the method.
        outputs: the number of outputs of the linear layer that the tests adapt.
        inputs: the number of inputs of this layer.
    """

    method: ClassVar[str] = ""
    outputs: ClassVar[int] = 8
    inputs: ClassVar[int] = 16

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        method: Any = METHODS[cls.method] if cls.method in METHODS else None  # noqa: SIM401 - `get` raises
        # If a test does not apply, set it to None. pytest then does not collect it, and reports no skipped test.
        if cls.change is MethodTests.change:
            cls.test_its_formula_is_the_papers = None  # type: ignore[assignment, method-assign]
        if method is not None and method.kind not in ("additive", "weight"):
            cls.test_numpy_and_torch_compute_the_same = None  # type: ignore[assignment, method-assign]
            cls.test_a_merge_and_a_live_model_compute_the_same = None  # type: ignore[assignment, method-assign]
        of_weights = method is not None and method.kind in ("additive", "weight")
        if method is None or not of_weights or not hasattr(method, "initial") or not method.starts_at_base:
            cls.test_a_fresh_update_changes_nothing = None  # type: ignore[assignment, method-assign]

    def update(self) -> Update:
        """Return an update that changes a linear layer. Override this if the method under test has no `initial`."""
        return example(self.method, out=self.outputs, inputs=self.inputs)

    def change(self, W: Array) -> Array:
        """Return the change `W' - W` that `update()` makes to a weight `W`, in float64 numpy.

        A subclass may implement the paper's formula here, without using the method's class. A test then compares the
        results of the method's class with this formula.
        """
        raise Unsupported("the tests have no formula to compare with", cure="Define `change` in the test class")

    def test_it_says_where_it_is_from(self) -> None:
        assert self.method not in METHODS.refused(), METHODS.refused()[self.method]
        cls = METHODS[self.method]
        assert cls.__module__.rpartition(".")[2] == self.method
        assert cls.kind in ("additive", "weight", "output", "context")
        assert cls.paper, "set `paper` to the source of the formula"
        assert cls.tensor_fields(), "an update without tensors changes nothing"

    def test_its_fields_are_checked(self) -> None:
        update = self.update()
        update.check()
        dims = update.dims()
        assert dims
        leaf: Any
        for name, leaf in update.tensors.items():
            axes = update.tensor_fields()[name].metadata["axes"]
            assert axes.text
            if leaf.ndim and not update.tensor_fields()[name].metadata["integer"]:
                import torch

                broken = update.replace(**{name: torch.full_like(leaf, float("nan"))})
                with pytest.raises(AdapterkitError, match="NaN"):
                    broken.check_values()

    def test_it_is_written_and_read_bit_by_bit(self, tmp_path: Path) -> None:
        update = self.update()
        adapter = Adapter({Target("q"): (update,)})
        write(adapter, tmp_path / "x.safetensors", "adapterkit")
        back = read(tmp_path / "x.safetensors")
        ((_, again),) = back
        assert (again.method, again.version, again.attributes) == (update.method, update.version, update.attributes)
        assert back.digest() == adapter.digest()

    def test_its_formula_is_the_papers(self) -> None:
        import numpy as np

        rng = np.random.default_rng(3)
        W = rng.normal(size=(self.outputs, self.inputs))
        expected = self.change(W)
        change = self._new_weight(W) - W
        assert np.allclose(change, expected, rtol=1e-9, atol=1e-9)
        assert np.abs(expected).max() > 1e-6, "the example changes nothing"

    def test_numpy_and_torch_compute_the_same(self) -> None:
        """Compare the formula's results in numpy and in torch: a merge computes in numpy, a live model in torch."""
        import numpy as np
        import torch

        W = np.random.default_rng(4).normal(size=(self.outputs, self.inputs))
        ours = self._new_weight(W)
        loaded: Any = self.update().map(_wide)
        there = torch.from_numpy(W.copy())
        theirs = loaded.settled(there).new_weight(there) if loaded.changes_weight else there
        assert np.allclose(ours, theirs.numpy(), rtol=1e-9, atol=1e-9)

    def test_a_merge_and_a_live_model_compute_the_same(self, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        from .. import torch as live
        from ..merging import merge

        update = self.update()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(self.inputs, self.outputs)).double().eval()
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        adapter = Adapter({Target("0"): (update,)})
        merge(tmp_path / "base.safetensors", adapter, tmp_path / "merged.safetensors", device="cpu")
        x = torch.randn(5, self.inputs, dtype=torch.float64)
        with torch.no_grad():
            before = model(x)
            handle = live.inject(model, adapter)
            y = model(x)
            handle.remove()
            assert torch.equal(model(x), before), "removing the adapter does not restore the base"
            model.load_state_dict(load_file(tmp_path / "merged.safetensors"))
            error = float((model(x) - y).abs().max() / y.abs().max())
        assert error < 1e-6, f"merged and live outputs differ by {error:.1e}"

    def test_a_fresh_update_changes_nothing(self) -> None:
        import torch

        cls: Any = METHODS[self.method]
        generator = torch.Generator().manual_seed(1)

        def random(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        W, b = random((self.outputs, self.inputs)), random((self.outputs,))
        fresh = cls.initial(W, b, 2, random)
        new = fresh.settled(W).new_weight(W) if fresh.changes_weight else W
        assert torch.allclose(new, W, atol=1e-5)

    def _new_weight(self, W: Array) -> Array:
        import numpy as np
        import torch

        def array(leaf: Leaf) -> Any:
            assert isinstance(leaf, torch.Tensor)
            values: Array = leaf.detach().numpy()
            return values.astype(np.float64) if values.dtype.kind == "f" else values

        loaded: Any = self.update().map(array)
        new: Array = loaded.settled(W).new_weight(W) if loaded.changes_weight else W
        return new


def _wide(leaf: Leaf) -> Leaf:
    import torch

    assert isinstance(leaf, torch.Tensor)
    return leaf.double() if leaf.is_floating_point() else leaf


# The tests pass on options whose types only `combine` itself checks.
_combine: Callable[..., Adapter] = combine

TARGET = Target("layers.0.q")
OUT, IN, RANK = 20, 28, 3
SMALL = 2.0**-17
"""The factor that makes weight changes small. It is a power of two, so multiplying by it does not round."""

SAME = 1e-6
"""Two results count as equal if their largest difference is at most `SAME` times the largest entry."""


def dependences(name: str, draws: int = 4, **options: object) -> set[str]:
    """Return the properties in `GUISES` on which a combiner's result depends.

    Each property is varied alone, and the adapters' weight changes stay the same. The exception is `size`, which
    multiplies the weight changes by `SMALL`. The combiner's result is then divided by `SMALL` before it is compared.

    Args:
        name: the name of the combiner.
        draws: the number of random sets of adapters to try. A property is returned if it affects the result for at
            least one set.
        options: further arguments of `adapterkit.combine`.
    """
    dependences_found = set()
    for drawn in range(draws):
        given = _adapters(name, drawn)
        first = _change(_combine(given, name, seed=0, **options))
        for what, guise in GUISES.items():
            others, seed = guise(given, 1)
            again = _change(_combine(others, name, seed=seed, **options)) / (SMALL if what == "size" else 1.0)
            if abs(again - first).max() > SAME * abs(first).max():
                dependences_found.add(what)
    return dependences_found


def rank_of_result(name: str, **options: object) -> str:
    """Return how high the rank of a combiner's result can be: `one's`, `sum` or `more`.

    `one's` means at most the rank of one adapter, and `sum` at most the sum of all adapters' ranks. `more` means that
    neither bound holds.
    """
    import numpy as np

    given = _adapters(name, 0)
    # Also try density 1. At lower densities, the result for these small matrices can have a low rank by chance, unlike
    # the result for large matrices.
    dense = {"density": 1.0} if "density" in COMBINERS[name].parameters() else {}
    changes = [_change(_combine(given, name, **{**options, **more})) for more in ({}, dense)]
    rank = max(int(np.linalg.matrix_rank(change)) for change in changes)
    return "one's" if rank <= RANK else "sum" if rank <= RANK * len(given) else "more"


def _turned(adapter: Adapter, seed: int) -> Adapter:
    """Return an adapter with the same weight change, but different factors."""
    import numpy as np

    R = np.random.default_rng(seed).normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
    update: Any = adapter.updates[TARGET][0]
    A, B = np.linalg.solve(R, update.A.numpy()), update.B.numpy() @ R
    return adapter.replace(updates={TARGET: (update.replace(A=from_numpy(A), B=from_numpy(B)),)})


GUISES: Mapping[str, Guise] = {
    "factors": lambda given, _: ([_turned(adapter, t) for t, adapter in enumerate(given)], 0),
    "order": lambda given, _: (given[::-1], 0),
    "size": lambda given, _: ([scale(adapter, SMALL) for adapter in given], 0),
    "seed": lambda given, seed: (given, seed),
}
"""A map from each property to a function that varies only this property. `dependences` compares two results of a
combiner. It computes the first result from the original adapters with seed 0. A function of the map takes these
adapters and another seed, and returns the adapters and the seed for the second result. The function for `size` scales
the weight changes; the other functions do not change them."""


def _adapters(name: str, drawn: int) -> list[Adapter]:
    """Return random LoRAs in float64: as many as the combiner accepts, or three if it has no limit."""
    import numpy as np

    adapters_made = []
    for t in range(COMBINERS[name].takes[1] or 3):
        rng = np.random.default_rng([drawn, t])
        factors = {"A": from_numpy(rng.normal(size=(RANK, IN))), "B": from_numpy(rng.normal(size=(OUT, RANK)))}
        adapters_made.append(Adapter({TARGET: (METHODS["lora"](**factors),)}))
    return adapters_made


def _change(adapter: Adapter) -> Array:
    """Return the weight change at `TARGET`: the dense change, or the scaled product of the factors."""
    import numpy as np

    update: Any = adapter.updates[TARGET][0]
    if update.method == "dense":
        return np.asarray(update.D.numpy())
    product: Array = update.scaling * (update.B.numpy() @ update.A.numpy())
    return product


def measurable() -> Sequence[str]:
    """Return the names of the combiners that need neither data nor a base."""
    return [name for name in COMBINERS if COMBINERS[name].data is None and not COMBINERS[name].based]


class CombinerTests:
    """Tests of a combiner.

    Attributes:
        combiner: the name of the combiner.
        parameters: values for the required parameters of the combiner.
        count: the number of adapters to combine.
    """

    combiner: ClassVar[str] = ""
    parameters: ClassVar[dict[str, object]] = {}
    count: ClassVar[int] = 3

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # If a test does not apply, set it to None. pytest then does not collect it, and reports no skipped test.
        if cls.combined is CombinerTests.combined:
            cls.test_its_formula_is_the_papers = None  # type: ignore[assignment, method-assign]
        if cls.combiner in COMBINERS and "rank" in COMBINERS[cls.combiner].parameters():
            cls.test_a_rank_cuts_the_result = None  # type: ignore[assignment, method-assign]

    def options(self) -> dict[str, object]:
        """Return further arguments for `adapterkit.combine`, such as `base`, `data` or `compat`."""
        return {}

    def combined(self, changes: list[Array], weights: list[float]) -> Array:
        """Return the combined change of a weight in float64 numpy, without using the combiner's class.

        Args:
            changes: dense changes `[out, in]`, one per adapter.
            weights: one weight per adapter.

        Returns:
            The change `[out, in]`. If a subclass defines this method, a test compares the combiner's result with this
            change.
        """
        raise Unsupported("the tests have no formula to compare with", cure="Define `combined` in the test class")

    def adapters(self) -> list[Adapter]:
        """Return the adapters to combine: LoRAs of rank 2 at two targets, in float64 to avoid rounding."""
        adapters_made = []
        for number in range(self.count):
            updates = {}
            for place, path in enumerate(("q", "v")):
                update = example("lora", out=6, inputs=5, seed=10 * number + place, scaling=0.5 + number)
                updates[Target(path)] = (update.map(_wide),)
            adapters_made.append(Adapter(updates))
        return adapters_made

    def result(self, adapters: list[Adapter], weights: list[float] | None = None, **more: object) -> Adapter:
        """Return the combined adapter. The combiner gets `parameters`, `options()` and `more`."""
        given = self.parameters | self.options() | more
        return _combine(adapters, self.combiner, weights, **given)

    def test_it_says_where_it_is_from(self) -> None:
        assert self.combiner not in COMBINERS.refused(), COMBINERS.refused()[self.combiner]
        cls = COMBINERS[self.combiner]
        assert cls.title, "set `title` to the name of the combiner in papers"
        assert cls.paper, "set `paper` to the source of the formula"
        for name, field in cls.parameters().items():
            assert field.metadata["meaning"], f"add a meaning to the metadata of the parameter {name}"

    def test_its_formula_is_the_papers(self) -> None:
        import numpy as np

        adapters, weights = self.adapters(), [1.0, 0.5, 2.0][: self.count]
        for path in ("q", "v"):
            changes = [each.delta(path).double().numpy() for each in adapters]
            expected = self.combined(changes, weights)
            change = self.result(adapters, weights).delta(path).double().numpy()
            size = max(float(np.abs(expected).max()), 1e-12)
            assert float(np.abs(change - expected).max()) <= 1e-5 * size

    def test_the_same_call_gives_the_same_numbers(self) -> None:
        one, two = (self.result(self.adapters()) for _ in range(2))
        assert one.digest() == two.digest()

    def test_the_result_has_all_targets_and_can_be_written(self, tmp_path: Path) -> None:
        combined = self.result(self.adapters())
        assert {str(target) for target in combined.updates} == {"q", "v"}
        combined.validate()
        combined.check_values()
        write(combined, tmp_path / "x.safetensors", "adapterkit")
        back = read(tmp_path / "x.safetensors")
        assert back.digest() == combined.digest()
        assert back.recipe[-1].args["method"] == self.combiner

    def test_one_adapter_lacks_a_target(self) -> None:
        first, *others = self.adapters()
        lacking = first.replace(updates={t: u for t, u in first.updates.items() if t.path != "v"})
        combined = self.result([lacking, *others])
        assert {str(target) for target in combined.updates} == {"q", "v"}

    def test_a_rank_cuts_the_result(self) -> None:
        import numpy as np

        combined = self.result(self.adapters(), rank=2)
        for path in ("q", "v"):
            S = np.linalg.svd(combined.delta(path).double().numpy(), compute_uv=False)
            assert (S[2:] <= 1e-6 * max(S[0], 1e-12)).all()

    def test_wrong_parameters_are_refused(self) -> None:
        with pytest.raises(UsageError):
            self.result(self.adapters(), no_such_parameter=1)
        with pytest.raises(UsageError):
            self.result(self.adapters(), [1.0] * (self.count + 1))
        with pytest.raises(UsageError):
            self.result([])
