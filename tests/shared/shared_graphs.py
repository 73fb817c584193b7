"""Small models as graphs, each exported once in a test run, by the worker that first needs it.

An export with fixed sizes takes 2 seconds of processor time, and with open sizes 8, so tests only use open sizes if
they need them. The files are shared: a test must write elsewhere.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

import adapterkit as ak

IDS = torch.tensor([[3, 4, 1, 3, 4, 7], [3, 4, 2, 2, 7, 3], [5, 1, 2, 2, 7, 4]])
"""Example tokens: rows in which 3, 4 occurs twice, once, and not at all."""

OPEN = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


class Called(nn.Module):
    """A model that returns logits for some inputs of a call, without a past."""

    def __init__(self, model: Any, words: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.words = model, words

    def forward(self, *given: torch.Tensor) -> Any:
        return self.model(**dict(zip(self.words, given, strict=True)), use_cache=False).logits


@cache
def base(build: Callable[[], Any]) -> Any:
    """Return the model that a function builds, with the numbers of one seed."""
    torch.manual_seed(5)
    return build().eval()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` filled, in this process or in another of the same run."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "shared_graphs" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        done = folder.with_suffix(".done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # Remove the folder of a worker that was interrupted.
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def exported(
    factory: pytest.TempPathFactory, build: Callable[[], Any], *words: str, fixed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Return the graph of a causal model without a past, with these inputs; its config is in the same folder."""
    given = words or ("input_ids",)

    def make(folder: Path) -> None:
        example = {"inputs_embeds": torch.randn(3, 6, 8, dtype=dtype), "attention_mask": torch.ones_like(IDS)}
        args = [example[word] if word in example else IDS.clone() for word in given]
        model = copy.deepcopy(base(build)).to(dtype)
        ak.onnx.export(
            Called(model, given).eval(), args, folder / "model.onnx", inside="model", input_names=given,
            output_names=["logits"], dynamic_shapes=None if fixed else (tuple(OPEN for _ in given),),
        )  # fmt: skip
        model.config.save_pretrained(folder)

    kind = "fixed" if fixed else "open"
    return once(factory, "-".join((build.__name__, *given, kind, str(dtype)[6:])), make) / "model.onnx"


def pretrained(factory: pytest.TempPathFactory, build: Callable[[], Any]) -> tuple[Path, Path]:
    """Return a causal model's folder, and its graph with a past."""

    def make(folder: Path) -> None:
        base(build).save_pretrained(folder / "base")
        ak.onnx.export_pretrained(folder / "base", folder / "graph")

    folder = once(factory, f"{build.__name__}-pretrained", make)
    return folder / "base", folder / "graph" / "model.onnx"
