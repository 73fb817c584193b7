"""Runs one benchmark by name: `python tools/bench merge --rounds 5`. Without a name, it lists all benchmarks."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Pass the rest of the command line to the benchmark."""
    known = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__main__")
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        print(f"usage: python tools/bench NAME [OPTION...]    NAME: {', '.join(known)}", file=sys.stderr)
        return 2
    script = HERE / f"{sys.argv[1]}.py"
    sys.argv[:2] = [str(script)]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
