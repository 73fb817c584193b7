"""The remainder of a quantized merge: the best LoRA of what rounding lost, by numpy's singular values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import record, run
from peft import PeftModel
from quantized_vectors import CASES, VECTORS, adapter_for, name, stored
from safetensors.torch import save_file

import adapterkit as ak
from adapterkit.errors import UsageError

FOUR = VECTORS / "gptq" / "four"


def change(adapter: ak.Adapter) -> np.ndarray:
    made = []
    for target, (update,) in adapter.updates.items():
        D = update.B.torch().double().numpy() @ update.A.torch().double().numpy()
        made.append(D.swapaxes(-1, -2) if target.layout.removeprefix("e ").startswith("in") else D)
    return made[0] if len(made) == 1 else np.stack(made)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_it_is_the_best_lora_of_what_rounding_lost(case: Path, tmp_path: Path) -> None:
    adapter, W, delta = adapter_for(case)
    ak.merge(case, adapter, tmp_path / "out", quantized="requantize")
    cuts: list[object] = []
    lost = ak.merging.remainder(tmp_path / "out", case, adapter, 2, report=cuts.append)
    error = W.double().numpy() + delta - stored(tmp_path / "out")
    S = np.linalg.svd(error.reshape(-1, *error.shape[-2:]))[1]
    left = np.linalg.norm(error - change(lost).reshape(error.shape))
    assert left == pytest.approx(np.sqrt((S[:, 2:] ** 2).sum()), rel=1e-3)
    assert left < 0.999 * np.linalg.norm(error)
    assert np.hypot.reduce([cut.norm for cut in cuts]) == pytest.approx(np.linalg.norm(error), rel=1e-3)
    assert np.hypot.reduce([cut.error for cut in cuts]) == pytest.approx(left, rel=1e-3)
    assert [step.op for step in lost.recipe] == ["remainder"]


def test_two_adapters_with_weights_and_a_rank_that_holds_everything(tmp_path: Path) -> None:
    (one, W, first), (two, _, second) = adapter_for(FOUR), adapter_for(FOUR, seed=1)
    options = {"weights": [0.5, -0.25]}
    ak.merge(FOUR, [one, two], tmp_path / "out", quantized="requantize", **options)
    lost = ak.merging.remainder(tmp_path / "out", FOUR, [one, two], 16, dtype="f32", **options)
    exact = W.double().numpy() + 0.5 * first - 0.25 * second
    np.testing.assert_allclose(stored(tmp_path / "out") + change(lost), exact, rtol=0, atol=1e-5)


def test_the_command_writes_it_beside_the_model_and_peft_loads_it(tmp_path: Path) -> None:
    adapter, W, delta = adapter_for(FOUR)
    ak.write(adapter, tmp_path / "lora", format="peft")
    words = ("merge", FOUR, tmp_path / "lora", "-o", tmp_path / "out", "--quantized", "requantize", "--remainder", "4")
    said = record(*words)["remainder"]
    assert (said["rank"], said["targets"]) == (4, 1)
    assert run(*words).exit_code == 0  # Again: the merge is done already, and the remainder is the same.
    error = W.double().numpy() + delta - stored(tmp_path / "out")
    assert said["lost"] == pytest.approx(np.linalg.norm(error), rel=1e-4)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.m(x)

    model = Model()
    model.m.weight.data = torch.from_numpy(stored(tmp_path / "out")).float()
    x = torch.randn(3, W.shape[1])
    before = model(x)
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "out" / "remainder"))(x)
    exact = x @ torch.from_numpy(W.double().numpy() + delta).float().T
    assert (theirs - exact).norm() < 0.8 * (before - exact).norm()
    assert said["left"] == pytest.approx(
        np.linalg.norm(error - change(ak.read(tmp_path / "out" / "remainder"))), rel=1e-3
    )


def test_what_has_no_remainder_says_so(tmp_path: Path) -> None:
    adapter, _, _ = adapter_for(FOUR)
    ak.write(adapter, tmp_path / "lora", format="peft")
    words = ("merge", FOUR, tmp_path / "lora", "-o")
    refused = run(*words, tmp_path / "out", "--remainder", "4")
    assert refused.exit_code == 2
    assert "--quantized requantize" in refused.output
    refused = run(*words, "oci://127.0.0.1:1/x:y", "--quantized", "requantize", "--remainder", "4")
    assert refused.exit_code == 2
    assert "merge into a folder" in refused.output
    assert not (tmp_path / "out").exists()
    ak.merge(FOUR, adapter, tmp_path / "whole", quantized="dequantize")
    with pytest.raises(UsageError, match="not quantized"):
        ak.merging.remainder(tmp_path / "whole", FOUR, adapter, 4)
    save_file({"n.weight": torch.zeros(2, 2)}, tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match="not quantized"):
        ak.merging.remainder(FOUR, tmp_path / "plain.safetensors", adapter, 4)
    with pytest.raises(UsageError, match="of type dict is not an adapter"):
        ak.merging.remainder(FOUR, FOUR, [{}], 4)
