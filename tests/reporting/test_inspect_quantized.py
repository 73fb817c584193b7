"""`inspect` of a quantized base names its scheme and counts the parameters that its packed weights stand for."""

import shutil

import pytest
from quantized_vectors import CASES, VECTORS
from safetensors.torch import load_file

import adapterkit as ak


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.relative_to(VECTORS).as_posix())
def test_the_scheme_and_the_true_number_of_parameters_are_shown(case, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(case, base, ignore=shutil.ignore_patterns("expected.safetensors"))
    found = ak.inspect(base).record()["quantized"]
    assert found["scheme"] == case.parent.name
    # What the scheme's own library makes of the packed weights.
    whole = load_file(case / "expected.safetensors")
    assert found["weights"] == len(whole)
    assert found["parameters"] >= sum(weight.numel() for weight in whole.values())


def test_a_base_in_16_bits_is_not_called_quantized():
    found = ak.inspect(VECTORS.parent / "bases" / "llama").record()
    assert found["kind"] == "base"
    assert "quantized" not in found
