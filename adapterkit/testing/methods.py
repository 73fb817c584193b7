"""Tests that a method must pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ..core.adapter import Adapter, Target
from ..core.updates import Update
from ..errors import AdapterkitError, Unsupported
from ..formats import read
from ..methods import METHODS
from ..writing import write
from .examples import example

if TYPE_CHECKING:
    from ..io.computed import Array
    from ..io.lazy import Leaf


class MethodTests:
    """Tests of a method's fields and formula.

    Attributes:
        method: the name of the method.
        outputs: the number of outputs of the example's linear layer.
        inputs: the number of inputs of that layer.
    """

    method: ClassVar[str] = ""
    outputs: ClassVar[int] = 8
    inputs: ClassVar[int] = 16

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        method: Any = METHODS[cls.method] if cls.method in METHODS else None  # noqa: SIM401 - `get` raises
        # If a test does not apply, set it to None: pytest then does not collect the test, and does not show a skip.
        if cls.change is MethodTests.change:
            cls.test_its_formula_is_the_papers = None  # type: ignore[assignment, method-assign]
        if method is not None and method.kind not in ("additive", "weight"):
            cls.test_numpy_and_torch_compute_the_same = None  # type: ignore[assignment, method-assign]
            cls.test_a_merge_and_a_live_model_compute_the_same = None  # type: ignore[assignment, method-assign]
        of_weights = method is not None and method.kind in ("additive", "weight")
        if method is None or not of_weights or not hasattr(method, "initial") or not method.starts_at_base:
            cls.test_a_fresh_update_changes_nothing = None  # type: ignore[assignment, method-assign]

    def update(self) -> Update:
        """Return an update that changes a linear layer. Tests of a method without `initial` override this function."""
        return example(self.method, out=self.outputs, inputs=self.inputs)

    def change(self, W: Array) -> Array:
        """Return the change W' - W that `update()` makes to a weight W, in float64 numpy.

        A subclass may implement the paper's formula here, without using the method's class. Then the method's class is
        compared with this formula.
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
        found = self._new_weight(W) - W
        assert np.allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert np.abs(expected).max() > 1e-6, "the example changes nothing"

    def test_numpy_and_torch_compute_the_same(self) -> None:
        """Compare the result of numpy with that of torch: a merge computes in numpy, a live model in torch."""
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
