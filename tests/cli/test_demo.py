"""The demo against scikit-learn's own copy of the digits and PEFT's own reading of the adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapterkit import demo
from adapterkit.demo import model as digits


@pytest.fixture(scope="module")
def record() -> dict:
    return demo.run()


def test_merging_turns_failure_into_success(record: dict) -> None:
    assert {row["task"] for row in record["rows"]} == set(digits.TASKS)
    assert record["plain"] > 0.95
    for row in record["rows"]:
        assert row["verified"]
        assert row["before"] < 0.2
        assert row["after"] >= 0.9


def test_the_images_are_real_and_held_out() -> None:
    from sklearn import datasets

    images, labels = digits.held_out()
    real = datasets.load_digits()
    assert torch.equal(images, torch.from_numpy(real.images[-len(images) :]).to(torch.uint8))
    assert torch.equal(labels, torch.from_numpy(real.target[-len(labels) :]).to(torch.uint8))


@pytest.mark.parametrize("task", digits.TASKS)
def test_peft_measures_the_same_accuracy(record: dict, task: str) -> None:
    import peft
    from safetensors.torch import load_file

    base = digits.build(load_file(digits.DATA / "base" / "model.safetensors"))
    adapted = peft.PeftModel.from_pretrained(base, digits.DATA / task).merge_and_unload()
    there = digits.accuracy(adapted, *digits.TASKS[task](*digits.held_out()))
    ours = next(row["after"] for row in record["rows"] if row["task"] == task)
    assert abs(there - ours) <= 2 / 540  # the merged weights are rounded to bf16, PEFT's are not


def test_it_fits_in_the_package() -> None:
    files = [file for file in Path(demo.__file__).parent.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) < 1_000_000
