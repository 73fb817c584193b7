"""docs/image-families.md: the page is what the writers do, and what they write computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tool_modules import tool_module

import adapterkit as ak
from adapterkit.core.adapter import Adapter
from adapterkit.formats._image.translate import in_parts
from adapterkit.naming.image import families

ROOT = Path(__file__).resolve().parents[2]


MATRIX = tool_module("image_matrix.py")
FAMILIES = [family for family in families() if not family.facts.generic]


@pytest.mark.long  # tools/check asks the tool itself.
def test_the_page_is_up_to_date() -> None:
    assert MATRIX.main(["--check"]) == 0


def cells() -> list[tuple[str, str, bool]]:
    """Family, method and whether on a fused weight: every family with some of the methods, every method in some."""
    methods = list(MATRIX.MAKERS)
    return [
        (family.name, methods[(position + step) % len(methods)], bool(step % 2))
        for position, family in enumerate(FAMILIES)
        for step in range(3)
    ]


@pytest.mark.parametrize("image_format", MATRIX.IMAGE_FORMATS)
def test_what_is_written_comes_back_to_diffusers_names_with_the_same_function(
    image_format: str, tmp_path: Path
) -> None:
    tried = 0
    for name, method, on_fused in cells():
        family = next(each for each in FAMILIES if each.name == name)
        norm = method == "norm"
        targets = MATRIX.fused(family) if on_fused and not norm else MATRIX.plain(family, norm=norm)
        if not targets:
            continue
        outcome, why = MATRIX.outcome_of(family, image_format, method, targets)
        if why:
            continue
        adapter = MATRIX.adapter_of(family, method, targets)
        loss = "refuse" if outcome == "=" else "promote"
        ak.write(adapter, tmp_path / "x.safetensors", image_format, on_loss=loss)
        back = ak.read(tmp_path / "x.safetensors", image_format, family=name)
        parts = in_parts(back.updates, (name,))
        for target, (wanted,) in Adapter(adapter.updates).load().updates.items():
            (got,) = Adapter(parts).load().updates[target]
            W = torch.randn(targets[target.path.partition(".")[2]], MATRIX.SIZE)
            W = W[:, 0] if norm else W
            for one, formula in ((W, "weight"), (W if norm else W[:, 0], "bias")):
                if getattr(wanted, f"changes_{formula}"):
                    made, said = getattr(got, f"new_{formula}")(one), getattr(wanted, f"new_{formula}")(one)
                    assert torch.allclose(made, said, atol=1e-5), (name, method, target)
        tried += 1
    assert tried > 20
