"""The figures of the structure are counted right."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house" / "__main__.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)


def reachable(edges, start):
    seen, todo = set(), [start]
    while todo:
        for each in edges[todo.pop()]:
            if each not in seen:
                seen.add(each)
                todo.append(each)
    return seen


def test_circles_are_the_nodes_that_reach_each_other():
    rng = random.Random(0)
    for _ in range(50):
        edges = {n: {rng.randrange(12) for _ in range(rng.randrange(3))} for n in range(12)}
        reach = {n: reachable(edges, n) | {n} for n in edges}
        expected = {frozenset(m for m in edges if m in reach[n] and n in reach[m]) for n in edges}
        assert {frozenset(group) for group in house.components(edges)} == expected


@pytest.mark.long
def test_the_figures_are_printed():
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "house"), "--json"], capture_output=True, text=True, check=True
    )
    figures = json.loads(run.stdout)
    files = list((ROOT / "adapterkit").rglob("*.py"))
    assert figures["modules"] == len(files)
    assert figures["lines"] == sum(len(path.read_text("utf-8").splitlines()) for path in files)
    assert 0 < figures["functions entered by a read"] < figures["functions entered by a merge"]
