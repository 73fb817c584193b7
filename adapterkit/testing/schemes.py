"""Tests that a quantization scheme must pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ..core.adapter import Adapter, Target
from ..errors import AdapterkitError, Unsupported
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..merging import merge
from ..quant import SCHEMES
from .examples import example

if TYPE_CHECKING:
    from ..io.computed import Array


class SchemeTests:
    """Tests of a quantization scheme.

    Attributes:
        scheme: the name of the scheme.
    """

    scheme: ClassVar[str] = ""

    def base(self, folder: Path) -> dict[str, Array]:
        """Write a base that is quantized with this scheme into `folder`, and return its dequantized weights.

        Returns:
            The name of each quantized weight -> a numpy array `[out, in]` with the values that the scheme's library
            dequantizes.
        """
        raise Unsupported("the tests of a scheme need a base", cure="Define `base` in the test class")

    @pytest.fixture
    def packed(self, tmp_path: Path) -> tuple[Checkpoint, dict[str, Array]]:
        """Return the opened base and the dequantized values of its weights."""
        folder = tmp_path / "base"
        folder.mkdir()
        numbers = self.base(folder)
        return open_checkpoint(folder), numbers

    def test_it_says_what_it_is(self) -> None:
        assert self.scheme not in SCHEMES.refused(), SCHEMES.refused()[self.scheme]
        cls = SCHEMES[self.scheme]
        assert cls.url.startswith(("http://", "https://")), "set `url` to the description of the layout"
        assert cls.description, "set `description` to one line about the scheme"
        assert cls.oracle, "set `oracle` to the library that its numbers are compared with"

    def test_its_bases_are_detected_and_no_others(
        self, packed: tuple[Checkpoint, dict[str, Array]], tmp_path: Path
    ) -> None:
        base, _ = packed
        assert [name for name in SCHEMES if SCHEMES[name]().detect(base)] == [self.scheme]
        import torch
        from safetensors.torch import save_file

        save_file({"q.weight": torch.ones(4, 4)}, tmp_path / "plain.safetensors")
        assert SCHEMES[self.scheme]().detect(open_checkpoint(tmp_path / "plain.safetensors")) is False

    def test_its_numbers_are_its_librarys(self, packed: tuple[Checkpoint, dict[str, Array]]) -> None:
        """Compare whole weights and blocks of rows, because a merge reads weights in blocks of rows."""
        import numpy as np

        base, numbers = packed
        found = {each.name: each for each in SCHEMES[self.scheme]().find(base)}
        assert found.keys() == numbers.keys()
        for name, expected in numbers.items():
            weight = found[name]
            assert tuple(weight.shape) == expected.shape
            rows = expected.shape[0]
            for start, stop in ((0, rows), (0, 1), (rows // 2, rows), (rows - 1, rows)):
                got = weight.rows(start, stop).astype(np.float64)
                assert np.allclose(got, expected[start:stop].astype(np.float64), rtol=1e-6, atol=1e-7), name

    def test_an_adapter_is_merged_into_its_numbers(
        self, packed: tuple[Checkpoint, dict[str, Array]], tmp_path: Path
    ) -> None:
        import numpy as np

        base, numbers = packed
        name, expected = next(iter(numbers.items()))
        update: Any = example("lora", out=expected.shape[0], inputs=expected.shape[1])
        adapter = Adapter({Target(name.removesuffix(".weight")): (update,)})
        merge(base, adapter, tmp_path / "merged", quantized="dequantize", dtype="F32", device="cpu")
        change = update.scaling * update.B.double().numpy() @ update.A.double().numpy()
        wanted = expected.astype(np.float64) + change
        got = open_checkpoint(tmp_path / "merged").tensors[name].numpy()
        assert np.allclose(got, wanted, rtol=1e-5, atol=1e-5)

    def test_a_damaged_base_is_a_typed_error(self, packed: tuple[Checkpoint, dict[str, Array]]) -> None:
        """Remove each tensor of a quantized weight in turn; reading must skip the weight or raise a typed error."""
        from dataclasses import replace

        base, numbers = packed
        scheme = SCHEMES[self.scheme]()
        first = next(each for each in scheme.find(base) if each.name in numbers)
        for member in first.members[1:]:
            left = {name: tensor for name, tensor in base.tensors.items() if name != member}
            lacking = replace(base, tensors=left)
            try:
                found = {each.name for each in scheme.find(lacking)}
            except AdapterkitError:
                continue
            assert first.name not in found, f"{first.name} is found without {member}"
