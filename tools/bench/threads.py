"""Runs many forwards of one model in several threads, each with another route, and checks every row of each result.

    python tools/bench threads [--threads 8] [--forwards 1000] [--only METHOD]... [--dtype float32]

For each weight method that `create` supports, and each output method, three adapters are attached to one linear layer.
Each forward must give the same result as the same route gave before in a single thread. Some methods cannot be routed
by rows (contexts, invocations, rows of an embedding), or read inputs of the model's call. They run in a small Llama, or
in a model that passes `task_ids` on: each thread enables and disables the adapter for itself, and has its own inputs.

The script prints one line for each method with wall time and processor time. A forward with its route takes 0.5 to 2.5
milliseconds, so all methods take ten minutes of processor time. It exits with 1 if any forward differs. Routers (Arrow,
X-LoRA) need experts; tests/formats/test_experts.py runs them in threads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError
from adapterkit.methods import METHODS

NAMES = (None, "a", "b", "c")
ROWS = 4


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--forwards", type=int, default=1000)
    parser.add_argument("--only", action="append", help="one method; may be given several times")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    started, done, wrong = time.monotonic(), [], 0
    for method in options.only or sorted(METHODS):
        made = model_of(method, getattr(torch, options.dtype)) if method not in WHOLE else None
        whole = whole_model(method) if made is None else None
        if made is None and whole is None:
            continue
        done.append(method)
        before, processor = time.monotonic(), time.process_time()
        try:
            calls = routed(*made) if made else switched(*whole)
            fault = run(calls, options.threads, options.forwards)
            wrong += bool(fault)
        except AdapterkitError as error:
            fault = f"refused: {error}"
        spent = f"{time.monotonic() - before:.1f} s, {time.process_time() - processor:.1f} s of the processor"
        print(f"{method}: {fault or 'no difference'} ({spent})", flush=True)
    each = f"{options.threads} threads x {options.forwards} forwards, {options.dtype}"
    print(f"{len(done)} methods, {each}: {wrong} differ; {time.monotonic() - started:.0f} s")
    print("methods:", ", ".join(done))
    return int(wrong > 0)


def model_of(method: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor] | None:
    """Return a model with three attached adapters of a method, and an input; None for a method of a whole model."""
    torch.manual_seed(0)
    if method in BUILT:
        layer, x, leaves = BUILT[method]
        built = nn.Sequential(layer()).to(dtype)
        for name in NAMES[1:]:
            update = METHODS[method](**{field: 0.3 * torch.randn(shape) for field, shape in leaves.items()})
            ak.torch.inject(built, Adapter({Target("0"): (update,)}), name=name)
        return built, torch.randn(x, dtype=dtype)
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    for seed, name in enumerate(NAMES[1:]):
        try:
            adapter = ak.torch.create(model, method, targets="0", rank=2, seed=seed)
            generator = torch.Generator().manual_seed(seed)

            def moved(leaf: Any, generator: torch.Generator = generator) -> Any:
                tensor = torch.as_tensor(leaf)
                if not tensor.is_floating_point():
                    return tensor
                return tensor + 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

            updates = {
                target: tuple(u.replace(**{n: moved(t) for n, t in u.tensors.items() if n not in u.frozen}) for u in us)
                for target, us in adapter.updates.items()
            }
            ak.torch.inject(model, adapter.replace(updates=updates), name=name)
        except AdapterkitError:
            return None
    return model, torch.randn(ROWS, 3, 16, dtype=dtype)


BUILT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "residual": (lambda: nn.Linear(16, 16), (ROWS, 3, 16), {"A": (2, 16), "B": (16, 2)}),
    "oft_patches": (lambda: nn.Conv2d(4, 6, 2), (ROWS, 4, 5, 5), {"pairs": (4, 6)}),
}
"""Methods without an initial value -> the layer, the shape of its input, and the shapes of the update's tensors."""

WHOLE: dict[str, dict[str, Any]] = {
    name: {"rank": 2}
    for name in (
        "adaption_prompt", "cpt", "gated_prefix", "gated_prefix_mlp", "p_tuning", "p_tuning_lstm", "prefix",
        "prefix_mlp", "prompt", "textual_inversion",
    )
} | {
    "multitask_prompt": {"rank": 2, "tasks": 2},
    "alora": {"rank": 2, "targets": ["q_proj"], "invocation": [3]},
    "rows": {"targets": ["embed_tokens"], "index": [1, 3]},
    "poly": {"rank": 2, "targets": "layer", "tasks": 2},
    "shadow": {},
}  # fmt: skip
"""Methods for a whole model -> options of `create`; PEFT creates a Shadow, which has no initial value."""


class Tasks(nn.Module):
    """A layer whose call gets the numbers of tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output; an adapter reads `task_ids`."""
        y: torch.Tensor = self.layer(x)
        return y


Call = Callable[[], torch.Tensor]


def whole_model(method: str) -> tuple[nn.Module, list[Call]] | None:
    """Return a model with one attached adapter of a method, and calls of it; None if no options are known."""
    if method not in WHOLE:
        return None
    torch.manual_seed(0)
    model = Tasks() if method == "poly" else llama()
    adapter = shadow() if method == "shadow" else ak.torch.create(model, method, **WHOLE[method])
    updates = {
        target: tuple(u.replace(**{n: shifted(t) for n, t in u.tensors.items() if n not in u.frozen}) for u in us)
        for target, us in adapter.updates.items()
    }
    ak.torch.inject(model, adapter.replace(updates=updates), name="a")
    if method == "poly":
        xs = torch.randn(4, 2, 3, 16)
        return model, [lambda x=x, n=n: model(x, task_ids=torch.tensor([n % 2, 0])) for n, x in enumerate(xs)]
    ids = torch.randint(0, 20, (4, 2, 5))
    more: list[dict[str, Any]] = [{"task_ids": torch.tensor([n % 2, 0])} for n in range(4)]
    words = more if method == "multitask_prompt" else [{}] * 4
    return model, [lambda i=i, w=w: model(input_ids=i, **w).logits for i, w in zip(ids, words, strict=True)]


def shadow() -> Adapter:
    """Return a Shadow for `llama()` that PEFT saved."""
    import peft

    config = peft.ShadowConfig(task_type="CAUSAL_LM", init_weights=False, r=3, shadow_alpha=0.7)
    model: Any = llama()
    with tempfile.TemporaryDirectory() as folder:
        peft.get_peft_model(model, config).save_pretrained(folder)
        return ak.read(folder).load()


def shifted(leaf: Any) -> Any:
    """Return a tensor whose values differ from those with which the method changes nothing."""
    tensor = torch.as_tensor(leaf)
    return tensor + 0.2 * torch.randn(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else tensor


def llama() -> nn.Module:
    """Return a Llama with one block."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, use_cache=False
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def routed(model: nn.Module, x: torch.Tensor) -> list[Call]:
    """Return calls of a model, each with another route of its rows."""

    def call(names: list[str | None]) -> torch.Tensor:
        with ak.torch.route(model, names):
            y: torch.Tensor = model(x)
            return y

    names = [[NAMES[(turn // 4**row) % 4] for row in range(ROWS)] for turn in range(4**ROWS)]
    return [partial(call, each) for each in names]


def switched(model: nn.Module, calls: list[Call]) -> list[Call]:
    """Return calls of a model, each with its adapter enabled and disabled."""
    handle = ak.torch.handles(model)["a"]

    def off(call: Call) -> torch.Tensor:
        with handle.disable():
            return call()

    return [*calls, *(partial(off, call) for call in calls)]


@torch.no_grad()
def run(calls: list[Call], threads: int, forwards: int) -> str:
    """Return the first fault; an empty string if there is none."""
    wanted = [call() for call in calls]
    if all(torch.equal(each, wanted[0]) for each in wanted):
        return "all calls return the same result"
    # Allow some units of difference: in 16 bits, products with many rows round differently from those with few rows.
    loose = {torch.float32: 1e-5, torch.float64: 1e-12}.get(wanted[0].dtype, 2e-2)
    faults: list[str] = []
    gate = threading.Barrier(threads)

    @torch.no_grad()
    def work(number: int) -> None:
        gate.wait()
        for turn in range(forwards):
            at = (number * 37 + turn * 5) % len(calls)
            try:
                got = calls[at]()
            except Exception as error:
                faults.append(f"call {at}: {type(error).__name__}: {error}")
                return
            apart = float((got - wanted[at]).abs().max())
            if not apart <= loose * max(float(wanted[at].abs().max()), 1.0):
                faults.append(f"call {at}: apart by {apart:.2e}")
                return

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    return faults[0] if faults else ""


if __name__ == "__main__":
    sys.exit(main())
