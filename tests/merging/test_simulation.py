"""The simulation of a merge on a cluster against sums that one can do by hand, and ranges against sets of bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import record, run
from hypothesis import given
from hypothesis import strategies as st
from merges import lora, rand, save_base

import adapterkit as ak
from adapterkit.hub.reading import gaps, joined
from adapterkit.merging.cluster import doubling, simulate
from adapterkit.merging.planned import Plan

ROWS, COLUMNS, FILES = 300, 200, 6


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Path]:
    """A base of equal files, of which all are computed, and an adapter."""
    tensors = {f"layers.{i}.q.weight": rand(ROWS, COLUMNS, seed=i).bfloat16() for i in range(FILES)}
    base = save_base(tmp_path / "base", tensors, shards=FILES)
    adapter = ak.Adapter({ak.Target(f"layers.{i}.q"): (lora(ROWS, COLUMNS, r=4),) for i in range(FILES)})
    ak.write(adapter, tmp_path / "a.safetensors")
    return base, tmp_path / "a.safetensors"


@pytest.fixture
def plan(case: tuple[Path, Path]) -> Plan:
    return ak.plan(*case)


DOWN = 2 * ROWS * COLUMNS
ADAPTER = 4 * 4 * (ROWS + COLUMNS) * FILES
"""Bytes of the float32 factors."""


def test_one_node_does_one_thing_after_another(plan: Plan) -> None:
    told = simulate(plan, 1, bandwidth=1000, speed=500, start=3, driver=2, price=36)
    up = plan.files[0].size
    expected = 2 + 3 + ADAPTER / 1000 + FILES * (DOWN / 1000 + DOWN / 500 + up / 1000)
    assert told.seconds == pytest.approx(expected)
    assert told.downloaded == FILES * DOWN + ADAPTER
    assert told.uploaded == FILES * up
    assert told.cost == pytest.approx(expected / 100)


@pytest.mark.parametrize(("nodes", "each"), [(2, 3), (3, 2), (4, 2), (6, 1), (64, 1)])
def test_equal_tasks_are_spread(plan: Plan, nodes: int, each: int) -> None:
    told = simulate(plan, nodes, bandwidth=1000, speed=500, start=3, driver=2)
    task = DOWN / 1000 + DOWN / 500 + plan.files[0].size / 1000
    assert told.seconds == pytest.approx(2 + 3 + ADAPTER / 1000 + each * task)
    assert told.downloaded == FILES * DOWN + min(nodes, FILES) * ADAPTER


def test_tasks_of_a_node_share_its_link(plan: Plan) -> None:
    """Six tasks that start together: the link is idle only while the first of them compute.

    One also downloads the adapter, which ends while the others compute, and so it uploads last.
    """
    told = simulate(plan, 1, bandwidth=1000, speed=500, start=0, driver=0, tasks=FILES)
    up = plan.files[0].size
    assert ADAPTER / 1000 < DOWN / 500
    assert told.seconds == pytest.approx(FILES * DOWN / 1000 + DOWN / 500 + FILES * up / 1000)
    assert told.busy == pytest.approx((FILES * DOWN + ADAPTER) / 1000 / told.seconds)


def test_more_nodes_are_never_slower(plan: Plan) -> None:
    times = [simulate(plan, nodes, bandwidth=1e4, start=1, driver=1).seconds for nodes in doubling(64)]
    assert times == sorted(times, reverse=True)


def test_numbers_of_nodes() -> None:
    assert [doubling(most) for most in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


@pytest.mark.parametrize(
    "wrong", [{"nodes": 0}, {"bandwidth": 0.0}, {"speed": float("nan")}, {"tasks": -1}, {"price": -1.0}]
)
def test_wrong_numbers_are_refused_by_name(plan: Plan, wrong: dict[str, float]) -> None:
    with pytest.raises(ak.AdapterkitError, match=next(iter(wrong))):
        simulate(plan, **{"nodes": 1, "bandwidth": 1.0, **wrong})  # type: ignore[arg-type]


def test_the_command_line_shows_it(case: tuple[Path, Path]) -> None:
    words = ["merge", *case, "--plan", "--nodes", "5", "--bandwidth", "1MB", "--price", "2.5", "--node-tasks", "2"]
    told = record(*words)["cluster"]
    assert [row["nodes"] for row in told["forecasts"]] == [1, 2, 4, 5]  # type: ignore[index, call-overload]
    output = run(*words).output
    assert "node hours" in output
    assert "cost" in output


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--plan", "--bandwidth", "1MB"], "--nodes"),
        (["--nodes", "2", "--bandwidth", "1MB", "-o", "out"], "--plan"),
        (["--plan", "--nodes", "2"], "--bandwidth"),
        (["--plan", "--price", "2"], "--nodes"),
    ],
)
def test_options_that_need_others_name_them(case: tuple[Path, Path], words: list[str], flag: str) -> None:
    result = run("merge", *case, *words)
    assert result.exit_code == 2
    assert f"requires {flag}" in result.output


RUNS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda run: (run[0], run[0] + run[1])), max_size=6)


@given(RUNS, RUNS)
def test_gaps_are_the_bytes_that_are_wanted_and_not_held(
    held: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    def bytes_of(runs: list[tuple[int, int]]) -> list[int]:
        return [at for begin, end in runs for at in range(begin, end)]

    found = bytes_of(gaps(joined(held), wanted))
    assert found == sorted(set(bytes_of(wanted)) - set(bytes_of(held)))
