"""Trains twelve methods by four loops, and compares every loss with a plain loop's and with PEFT's.

    pip install lightning && python tools/foreign/check_training.py [--steps 20] [--method lora]...

Prints the largest relative difference of a loss from PEFT's in the same loop, and, where PEFT does not have the method,
from the plain loop. Exits 1 when one is above 1e-5, or when an adapter or a base is not as it should be afterwards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import training_runs as runs  # noqa: E402 - shared with the tests

LIMIT = 1e-5


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative difference."""
    assert len(one) == len(other)
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def row(method: str, steps: int, folder: Path) -> dict[str, float]:
    """The differences of one method, by loop."""
    found: dict[str, float] = {}
    ours: dict[str, list[float]] = {}
    for name, loop in runs.LOOPS.items():
        model, handle = runs.attached(method, folder)
        base = {key: value.clone() for key, value in model.state_dict().items()}
        ours[name] = loop(model, steps, folder)
        assert ours[name][-1] < ours[name][0], f"{method} does not learn"
        handle.remove()
        assert all(value.equal(base[key]) for key, value in model.state_dict().items())
        if runs.METHODS[method] is None:
            found[name] = apart(ours[name], ours["plain"])
        else:
            found[name] = apart(ours[name], loop(runs.peft_model(method), steps, folder))
    found["between loops"] = max(apart(losses, ours["plain"]) for losses in ours.values())
    return found


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", action="append", choices=list(runs.METHODS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = [*runs.LOOPS, "between loops"]
    print("| method | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for method in given.method or runs.METHODS:
            found = row(method, given.steps, Path(folder))
            worst = max(worst, *found.values())
            name = method if runs.METHODS[method] else f"{method} (not in PEFT)"
            print(f"| {name} | " + " | ".join(f"{found[column]:.1e}" for column in columns) + " |", flush=True)
    print(f"largest: {worst:.1e}, limit {LIMIT:.0e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
