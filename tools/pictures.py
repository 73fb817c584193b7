#!/usr/bin/env python
"""Draws the pictures of README.md and docs/: speed, the ranking of combiners, the charts of the report.

tools/pictures.py            writes docs/pictures/speed.png and charts of the demo's adapters
tools/pictures.py --check    exits with 1 if the speed chart's numbers are not those of the table
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adapterkit as ak  # noqa: E402 - the checkout's own, installed or not
from adapterkit.reporting.charts import PALETTE, Chart, png, svg  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
RANKING = PICTURES / "ranking.json"
"""The figures that tools/bench/ranking.py wrote."""
TOOLS = {"adapterkit": "adapterkit merge", "PEFT": "PEFT", "mergekit": "mergekit", "axolotl": "axolotl"}
"""Beginning of a row of the table -> its name in the chart."""


def main() -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare the numbers, without drawing")
    chosen = parser.parse_args()
    rows = measured((ROOT / "docs" / "benchmarks.md").read_text("utf-8"))
    numbers = PICTURES / "speed.json"
    if chosen.check:
        if not numbers.is_file() or json.loads(numbers.read_text("utf-8")) != rows:
            print("pictures: docs/pictures/speed.png is not up to date; run tools/pictures.py", file=sys.stderr)
            return 1
        return 0
    PICTURES.mkdir(exist_ok=True)
    numbers.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    (PICTURES / "speed.png").write_bytes(png(speed(rows)))
    (PICTURES / "ranking.svg").write_text(svg(ranking(json.loads(RANKING.read_text("utf-8")))), "utf-8")
    data = ROOT / "adapterkit" / "demo" / "data"
    report = ak.report([data / "rotated", data / "relabelled"], base=data / "base")
    for chart in report.charts:
        if chart.name in ("spectra-1-rotated", "ranks", "values", "cosine", "relative-1-rotated"):
            (PICTURES / f"{chart.name}.svg").write_text(svg(chart), "utf-8")
    return 0


def measured(page: str) -> list[dict[str, Any]]:
    """Return the seconds and megabytes of each tool, from the first table of the page."""
    rows = []
    for line in page.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        name = next((name for start, name in TOOLS.items() if cells[0].startswith(start)), None)
        told = re.match(r"([\d.]+) s", cells[1]) if len(cells) > 3 else None
        memory = re.match(r"([\d,]+) MB", cells[3]) if len(cells) > 3 else None
        if name and told and memory and name not in {row["tool"] for row in rows}:
            rows.append({"tool": name, "seconds": float(told[1]), "megabytes": int(memory[1].replace(",", ""))})
    if len(rows) != len(TOOLS):
        raise SystemExit("pictures: docs/benchmarks.md lacks the table of the tools")
    return rows


def speed(rows: list[dict[str, Any]]) -> Chart:
    """Return the chart of the README: time and memory of a merge."""
    order = [row["tool"] for row in rows]
    y = {"field": "tool", "type": "nominal", "sort": order, "title": None, "axis": {"domain": False, "ticks": False}}

    def bars(field: str, title: str, shown: str, labels: bool) -> dict[str, Any]:
        side = {**y, "axis": {**y["axis"], "labels": labels}}
        x = {"field": field, "type": "quantitative", "title": None, "axis": None}
        return {
            "title": title, "width": 250, "height": {"step": 26},
            "transform": [{"calculate": shown, "as": "shown"}],
            "layer": [
                {"mark": {"type": "bar", "cornerRadiusEnd": 3, "height": 16}, "encoding": {
                    "y": side, "x": x,
                    "color": {"condition": {"test": "datum.tool === 'adapterkit merge'", "value": PALETTE[1]},
                              "value": PALETTE[7]}}},
                {"mark": {"type": "text", "align": "left", "dx": 5, "fontSize": 12},
                 "encoding": {"y": side, "x": x, "text": {"field": "shown"}}},
            ],
        }  # fmt: skip

    spec = {
        "data": {"values": rows}, "spacing": 60,
        "hconcat": [
            bars("seconds", "Whole process", "format(datum.seconds, '.1f') + ' s'", labels=True),
            bars("megabytes", "Peak memory", "format(datum.megabytes, ',') + ' MB'", labels=False),
        ],
    }  # fmt: skip
    return Chart("speed", "", "Merging a LoRA into a model of 1.1 B parameters", "", spec)


def ranking(found: dict[str, Any]) -> Chart:
    """Return the chart of combiners: the difference from task arithmetic for each number of tasks, with intervals."""
    counts = sorted(found["counts"], key=int)
    rows = [
        {"tasks": f"{count} tasks", "method": name, "mean": row["difference"][0], "low": row["difference"][1],
         "high": row["difference"][2]}
        for count in counts for name, row in found["counts"][count]["any"].items()
    ]  # fmt: skip
    order = list(found["counts"]["4" if "4" in counts else counts[0]]["any"])
    y = {"field": "method", "type": "nominal", "sort": order, "title": None}
    x = {"type": "quantitative", "title": "from task arithmetic", "axis": {"format": "+.0%"}}
    spec = {
        "data": {"values": rows}, "facet": {"column": {"field": "tasks", "title": None}},
        "spec": {"width": 190, "height": {"step": 13}, "layer": [
            {"mark": {"type": "rule", "color": PALETTE[7]},
             "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 30, "color": PALETTE[1]},
             "encoding": {"y": y, "x": {**x, "field": "mean"}}},
        ]},
    }  # fmt: skip
    return Chart("ranking", "", "Ways to combine", "", spec)


if __name__ == "__main__":
    sys.exit(main())
