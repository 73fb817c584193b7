"""`handle.merge_()`: the numbers of a merge on disk, in the memory where the weights lie."""

from __future__ import annotations

import pytest
import torch
from merges import f64, lora, lora_delta, rand, worst_ulp

import adapterkit as ak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once_where_it_lies(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(700, 1500, dtype=dtype))
    W = rand(1500, 700).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(W)
    place, u = model[0].weight.data_ptr(), lora(1500, 700)
    ak.torch.inject(model, ak.Adapter({ak.Target("0"): (u,)}), weight=0.5).merge_()
    assert model[0].weight.data_ptr() == place
    assert worst_ulp(model[0].weight.detach(), f64(W) + 0.5 * lora_delta(u)) <= 0.5001


def test_no_dense_change_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = [0]
    real = torch.empty

    def watched(*size: int, **options: object) -> torch.Tensor:
        made = real(*size, **options)
        largest[0] = max(largest[0], made.numel())
        return made

    model = torch.nn.Sequential(torch.nn.Linear(2048, 4096, bias=False))
    handle = ak.torch.inject(model, ak.Adapter({ak.Target("0"): (lora(4096, 2048),)}))
    monkeypatch.setattr(torch, "empty", watched)
    monkeypatch.setattr("adapterkit.torch.forward_hook.ForwardHook.changed", None)
    handle.merge_()
    assert 0 < largest[0] <= 4096 * 2048 // 16
