"""Runs every benchmark that returns figures, and writes one record and one HTML page.

    python tools/bench all [--rounds N] [--only NAME] [--out FOLDER] [--against OLD.json]

`FOLDER/bench.json` has the machine, the versions of the compared tools and every figure with its rounds; `bench.html`
shows them. With `--against`, the script lists figures that are worse than in an older record, and exits with 1; only
compare records of one machine. The script includes each benchmark that uses `rig/figures.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rig.figures import Figure, read, surroundings, worse

HERE = Path(__file__).resolve().parent

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>adapterkit, measured</title>
<style>
 :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
 body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
 table { border-collapse: collapse; width: 100%; margin: 0 0 2rem }
 th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8886; font-variant-numeric: tabular-nums }
 th:first-child, td:first-child { text-align: left }
 .worse { font-weight: 600; color: #b3261e } .better { color: #1e7a3c }
 @media (prefers-color-scheme: dark) { .worse { color: #ff8a80 } .better { color: #7ee2a0 } }
</style>
<h1>adapterkit, measured</h1>
<p>{{ date }}. {{ machine.processor }}, {{ machine.cores }} cores, {{ (machine.memory / 1e9) | round(1) }} GB;
{{ machine.system }}, Python {{ machine.python }}. Load before the start: {{ machine.load }}.
{% for name, number in versions.items() %}{{ name }} {{ number }}{{ ", " if not loop.last else "." }}{% endfor %}</p>
<p>Medians over the rounds, with the smallest and the largest. A ratio (x) is formed within each round.</p>
{% for bench, rows in tables.items() %}
<h2>{{ bench }}</h2>
<table><thead><tr><th scope="col">figure<th scope="col">median<th scope="col">range<th scope="col">unit
{%- if compared %}<th scope="col">before<th scope="col">now / before{% endif %}</tr></thead><tbody>
{% for row in rows %}<tr><td>{{ row.name }}<td>{{ row.median }}<td>{{ row.range }}<td>{{ row.unit }}
{%- if compared %}<td>{{ row.before }}<td class="{{ row.kind }}">{{ row.change }}{% endif %}</tr>
{% endfor %}</tbody></table>
{% endfor %}
{% for bench, why in failed.items() %}<p><strong>{{ bench }}</strong> failed: {{ why }}</p>{% endfor %}
</html>
"""


def benchmarks() -> list[str]:
    """Return the names of the scripts that have figures."""
    return sorted(
        path.stem
        for path in HERE.glob("*.py")
        if path.stem != "all" and "from rig.figures import" in path.read_text(encoding="utf-8")
    )


def run(name: str, rounds: int | None, work: Path) -> dict[str, Any]:
    """Run one benchmark and return its record.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    record = work / f"{name}.json"
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(record)]
    command += [] if rounds is None else ["--rounds", str(rounds)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def row(figure: Figure, before: Figure | None) -> dict[str, str]:
    """Return the cells of one figure."""
    low, high = min(figure.values), max(figure.values)
    cells = {
        "name": figure.name, "median": f"{figure.median:.4g}", "range": f"{low:.4g} to {high:.4g}",
        "unit": figure.unit, "before": "", "change": "", "kind": "",
    }  # fmt: skip
    if before is not None:
        kind = "worse" if worse(before, figure) else "better" if worse(figure, before) else ""
        change = figure.median / before.median if before.median else float("nan")
        cells |= {"before": f"{before.median:.4g}", "change": f"{change:.2f}", "kind": kind}
    return cells


def page(record: dict[str, Any], old: dict[str, Any] | None) -> str:
    """Return the page of a record, compared with an older one if there is one."""
    before = {} if old is None else {each["bench"]: read(each) for each in old["benchmarks"]}
    tables = {
        each["bench"]: [row(figure, before.get(each["bench"], {}).get(name)) for name, figure in read(each).items()]
        for each in record["benchmarks"]
    }
    shown = {key: record[key] for key in ("date", "machine", "versions", "failed")}
    return Environment(autoescape=True).from_string(PAGE).render(tables=tables, compared=old is not None, **shown)


def regressions(record: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Return a line for each figure that is worse than in the older record."""
    before = {each["bench"]: read(each) for each in old["benchmarks"]}
    return [
        f"{each['bench']}: {figure}; before {before[each['bench']][name].median:.4g}"
        for each in record["benchmarks"]
        for name, figure in read(each).items()
        if name in before.get(each["bench"], {}) and worse(before[each["bench"]][name], figure)
    ]


def main() -> int:
    """Run the command line; return 1 if a benchmark fails or a figure is worse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="rounds of every benchmark (default: each benchmark's default)")
    parser.add_argument("--only", action="append", choices=benchmarks(), help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="default: %(default)s")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="an earlier record of this machine")
    options = parser.parse_args()
    record: dict[str, Any] = {**surroundings(), "benchmarks": [], "failed": {}}
    with tempfile.TemporaryDirectory() as work:
        for name in options.only or benchmarks():
            print(f"{name} ...", file=sys.stderr)
            try:
                record["benchmarks"].append(run(name, options.rounds, Path(work)))
            except subprocess.CalledProcessError as error:
                record["failed"][name] = f"exit code {error.returncode}"
    old = None if options.against is None else json.loads(options.against.read_text(encoding="utf-8"))
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "bench.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "bench.html").write_text(page(record, old), encoding="utf-8")
    print(f"{target}, {options.out / 'bench.html'}")
    lines = [] if old is None else regressions(record, old)
    for line in lines:
        print(f"worse: {line}")
    return int(bool(lines or record["failed"]))


if __name__ == "__main__":
    sys.exit(main())
