"""AdaMSS, whose groups of rows only the base tells."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdamssConfig
from peft.tuners.adamss.layer import AdamssLayer

from adapterkit.methods import METHODS

NEEDS_BASE = KEEPS_BASE = True

CASES = {
    "adamss": (
        "Layers",
        AdamssConfig(r=3, num_subspaces=2, subspace_rank=2, init_weights=None, target_modules=["q", "up"]),
    ),
}


def update_of(_path: str, module: Any, config: Any) -> Any:
    """The update of a wrapped module, its groups from what PEFT holds in memory."""
    if not isinstance(module, AdamssLayer):
        return None
    all_A, all_B = (getattr(module, f"adamss_{x}")["default"] for x in "AB")
    ranks = [len(a) for a in all_A]
    newB, inputs = module.adamss_newB["default"], module.in_features
    A = torch.zeros(len(ranks), max(ranks), len(newB))
    B, group = torch.zeros(module.out_features, max(ranks)), torch.zeros(module.out_features, dtype=torch.int64)
    for i, rank in enumerate(ranks):
        rows = module.seg_result["default"][module.train_subspace_index["default"][i]]
        A[i, :rank], group[rows] = all_A[i].detach(), i
        B[rows, :rank] = all_B[i].detach()
    tensors = {"A": A, "B": B, "basis": newB[:, :inputs].contiguous(), "group": group, "ranks": torch.tensor(ranks)}
    tensors |= {"basis_bias": newB[:, inputs].contiguous()} if newB.shape[1] > inputs else {}
    return METHODS["adamss"](**tensors, seed=config.random_seed)
