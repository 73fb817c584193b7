"""Writes tests/data/mergekit.safetensors: results of mergekit's `merge_tensors` for three changes, for each method.

    python tools/foreign/mergekit_vectors.py [DEST]

`delta.0` to `delta.2` are changes, `[6, 10]`, float64, products of factors `B.0`, `A.0` and so on; `base` is the weight
that they are added to. Each case is the result minus the base, under the name of the case. The metadata maps this name
to mergekit's method, its parameters and the combined changes. Run it in an environment with mergekit 0.1.5.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import get, merge_tensors
from safetensors.torch import save_file

DEST = Path(__file__).parents[2] / "tests" / "data" / "mergekit.safetensors"
OUT, IN, RANK, TASKS = 6, 10, 3, 3

WEIGHTS = [1.0, 0.5, 2.0]


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, mergekit's method, parameters."""
    yield "linear", "linear", {"weight": WEIGHTS}
    yield "linear sum", "linear", {"weight": WEIGHTS, "normalize": False}
    yield "task arithmetic", "task_arithmetic", {"weight": WEIGHTS, "lambda": 0.7}
    for density in (0.5, 1.0):
        yield f"ties {density}", "ties", {"weight": WEIGHTS, "density": density}
        yield f"ties sum {density}", "ties", {"weight": WEIGHTS, "density": density, "normalize": False}
    yield "ties each", "ties", {"weight": WEIGHTS, "density": [0.2, 0.5, 0.8]}
    yield "ties negative", "ties", {"weight": [1.0, -0.5, 0.8], "density": 0.5}
    for density in (0.4, 0.9):
        yield f"breadcrumbs {density}", "breadcrumbs", {"weight": WEIGHTS, "density": density, "gamma": 0.05}
        yield f"breadcrumbs ties {density}", "breadcrumbs_ties", {"weight": WEIGHTS, "density": density, "gamma": 0.05}
    yield "breadcrumbs norm", "breadcrumbs", {"weight": WEIGHTS, "density": 0.4, "gamma": 0.05, "rescale": True}
    for topk in (1.0, 0.3):
        yield f"sce {topk}", "sce", {"select_topk": topk}
    yield "model stock", "model_stock", {}
    yield "multislerp", "multislerp", {"weight": WEIGHTS}
    yield "multislerp raw", "multislerp", {"weight": WEIGHTS, "normalize_weights": False}
    yield "karcher", "karcher", {"max_iter": 10, "tol": 1e-5}
    for t in (0.0, 0.3, 1.0):
        yield f"slerp {t}", "slerp", {"t": t}
    yield "nuslerp", "nuslerp", {"weight": [1.0, 3.0]}
    yield "dare linear whole", "dare_linear", {"weight": WEIGHTS, "density": 1.0}
    yield "dare ties whole", "dare_ties", {"weight": WEIGHTS, "density": 1.0}
    yield "della whole", "della", {"weight": WEIGHTS, "density": 1.0}
    yield "della linear whole", "della_linear", {"weight": WEIGHTS, "density": 1.0}
    # What is random with one adapter and weight 1: which entries are there is seen in the result.
    yield "dare linear one", "dare_linear", {"weight": [1.0], "density": 0.6}
    yield "della linear one", "della_linear", {"weight": [1.0], "density": 0.6, "epsilon": 0.1}
    for t in (1e-4, 0.5):
        yield f"nearswap {t}", "nearswap", {"t": t}
    for epsilon in (1e-5, 0.7):
        yield f"ram {epsilon}", "ram", {"epsilon": epsilon}
        yield f"ramplus {epsilon}", "ramplus_tl", {"epsilon": epsilon}
    yield "ramplus whole", "ramplus_tl", {"epsilon": 0.7, "r": 0.3, "alpha": 10.0}
    yield "arcee fusion", "arcee_fusion", {}
    # mergekit takes `normalize` and `rescale` of any method, and ignores them where the method does not look at them.
    for method in sorted(PLAIN):
        for flag in ("normalize", "rescale"):
            for value in (True, False):
                yield f"{method} {flag} {value}".lower(), method, {**PLAIN[method], flag: value}


PLAIN: dict[str, dict[str, Any]] = {
    "arcee_fusion": {}, "breadcrumbs": {"weight": WEIGHTS, "density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": WEIGHTS, "density": 0.5, "gamma": 0.1},
    "dare_linear": {"weight": WEIGHTS}, "dare_ties": {"weight": WEIGHTS}, "della": {"weight": WEIGHTS},
    "della_linear": {"weight": WEIGHTS}, "karcher": {}, "linear": {"weight": WEIGHTS}, "model_stock": {},
    "multislerp": {"weight": WEIGHTS}, "nearswap": {"t": 0.5}, "nuslerp": {"weight": [1.0, 3.0]},
    "ram": {"epsilon": 0.7}, "ramplus_tl": {"epsilon": 0.7}, "sce": {"select_topk": 0.3}, "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": WEIGHTS}, "ties": {"weight": WEIGHTS, "density": 0.5},
}  # fmt: skip
"""Parameters of each method with which nothing is drawn at random."""


WITHOUT_BASE = {"slerp", "karcher", "nuslerp", "linear"}
"""Methods that are given the changes themselves."""

TAKEN = {"slerp": [0, 1], "nuslerp": [0, 1], "one": [0], "nearswap": [0], "arcee_fusion": [0]}


def main() -> None:
    """Draws the changes, merges them in each way, writes one file."""
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"base": torch.randn(OUT, IN, generator=random, dtype=torch.float64)}
    for t in range(TASKS):
        tensors[f"B.{t}"] = torch.randn(OUT, RANK, generator=random, dtype=torch.float64)
        tensors[f"A.{t}"] = torch.randn(RANK, IN, generator=random, dtype=torch.float64)
        tensors[f"delta.{t}"] = tensors[f"B.{t}"] @ tensors[f"A.{t}"]
    said: dict[str, Any] = {}
    torch.manual_seed(0)
    for name, method, parameters in cases():
        taken = TAKEN.get(method) or TAKEN.get(name.rpartition(" ")[2]) or list(range(TASKS))
        tensors[f"case.{name}"] = merged(tensors, method, parameters, taken)
        said[name] = {"method": method, "parameters": parameters, "of": taken}
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    dest.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, dest, {"cases": json.dumps(said, sort_keys=True), "mergekit": "0.1.5"})


def merged(tensors: dict[str, torch.Tensor], method: str, parameters: dict[str, Any], taken: list[int]) -> torch.Tensor:
    """The change that mergekit makes of those taken.

    Its recipes ignore parameters that a method does not know, which `merge_tensors` refuses.
    """
    known = {each.name for each in get(method).spec.parameters}
    parameters = {name: value for name, value in parameters.items() if name in known}
    changes = [tensors[f"delta.{t}"] for t in taken]
    if method in WITHOUT_BASE:
        base = 0 if method == "slerp" else None
        return merge_tensors(changes, method, parameters=parameters, base_index=base).contiguous()
    inputs = [tensors["base"], *(tensors["base"] + change for change in changes)]
    return (merge_tensors(inputs, method, parameters=parameters, base_index=0) - tensors["base"]).contiguous()


if __name__ == "__main__":
    main()
