"""Merges on disks that fail, in processes that are killed, against each other; and outputs with faults planted in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_disk import Disk, broken_disk, full_disk
from killed_merges import killed_and_rerun, points_of, spread
from merges import big_base, load_all, lora, rand, save_base, tree
from safetensors.torch import load_file, save_file

import adapterkit as ak

OLD = {"old": b"an output from before"}

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="faults are planted by way of /proc")


def old_output(folder: Path) -> Path:
    (folder / "out").mkdir(parents=True)
    (folder / "out" / "old").write_bytes(OLD["old"])
    return folder / "out"


def exit_code(disk: Disk, base: Path, adapter: ak.Adapter, out: Path) -> int:
    try:
        with disk.watched():
            ak.merge(base, adapter, out, overwrite=True)
    except ak.AdapterkitError as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize("kind", [full_disk, broken_disk])
def test_a_disk_that_fails_at_any_point(tmp_path: Path, kind: Callable[[Path, int], Disk]) -> None:
    """Exit 6, the old output intact, no leftovers; or, where there was another way to do it, the whole output."""
    base, adapter = big_base(tmp_path / "base", 2)
    (base / "more").mkdir()
    (base / "more" / "notes").write_text("kept")
    ak.merge(base, adapter, tmp_path / "whole")
    expected, failed, at = tree(tmp_path / "whole"), 0, 0
    while True:
        out = old_output(tmp_path / f"at{at}")
        disk = kind(out.parent, at)
        code = exit_code(disk, base, adapter, out)
        assert (code, tree(out)) in ((6, OLD), (0, expected)), (at, disk.points[at])
        failed += code == 6
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        if len(disk.points) <= at:
            break
        at += 1
    assert failed > 20


def test_killed_at_any_point_and_run_again(tmp_path: Path) -> None:
    """A sample of what `tools/kill_points.py` does at 200 points."""
    base, adapter = big_base(tmp_path / "base", 5)
    source = tmp_path / "adapter.safetensors"
    ak.write(adapter, source)
    count = len(points_of(base, source, old_output(tmp_path / "counted")))
    runs = killed_and_rerun(base, source, tmp_path / "killed", spread(20, count - 5))
    assert len(runs) == 20
    for run in runs:
        assert run.same, run
        assert run.kept, run
        assert run.redone <= 1, run
        assert not run.left, run


RIVAL = """
import sys, time, adapterkit as ak
while time.time() < float(sys.argv[4]):
    pass
try:
    ak.merge(*sys.argv[1:4])
except ak.AdapterkitError as error:
    print(error.exit_code, error.why)
else:
    print("merged")
"""


def test_eight_processes_and_one_place(tmp_path: Path) -> None:
    import time

    base, adapter = big_base(tmp_path / "base")
    ak.write(adapter, tmp_path / "adapter.safetensors")
    ak.merge(base, tmp_path / "adapter.safetensors", tmp_path / "whole")
    command = [sys.executable, "-c", RIVAL, *map(str, (base, tmp_path / "adapter.safetensors", tmp_path / "out"))]
    start = str(time.time() + 3)
    rivals = [subprocess.Popen([*command, start], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = sorted(rival.communicate()[0].strip() for rival in rivals)
    assert "merged" in said  # Several say so: one that comes when the output is there recognises it.
    assert set(said) <= {"merged", "6 another merge is writing here", "6 already there"}
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / ".out.merging").exists()


def flipped(bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def flip(t: torch.Tensor) -> torch.Tensor:
        data = t.clone().view(torch.uint8).reshape(-1)
        data[(bit // 8) % len(data)] ^= 1 << bit % 8
        return data.view(t.dtype).reshape(t.shape)

    return flip


LAYERS = range(6)
SCALES = (0.0, 0.5, 0.99, 1.01, 2.0, -1.0)
FLIPS = [(f"layers.{i}.{kind}.weight", 1 + 977 * i) for i in LAYERS for kind in ("q", "norm", "untouched")]


def faults(base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """50 wrong tensors, by name."""
    q = [f"layers.{i}.q.weight" for i in LAYERS]
    change = {name: merged[name].double() - base[name].double() for name in q}
    scaled = [(q[i], (base[q[i]].double() + s * change[q[i]]).bfloat16()) for i, s in enumerate(SCALES)]
    skipped = [(name, base[name]) for name in q]
    turned = [(name, (base[name].double() + change[name].T).bfloat16()) for name in q]
    swapped = [(name, merged[q[i - 1]].clone()) for i, name in enumerate(q)]
    rows = [(name, torch.cat([merged[name][:100], base[name][100:]])) for name in q]
    tied = [
        ("lm_head.weight", merged["embed_tokens.weight"].clone()),
        ("embed_tokens.weight", merged["lm_head.weight"].clone()),
    ]
    flips = [(name, flipped(bit)(merged[name])) for name, bit in FLIPS]
    return [*scaled, *skipped, *turned, *swapped, *rows, *tied, *flips]


def test_verify_finds_50_of_50_planted_faults(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.q.weight": rand(200, 200, seed=i).bfloat16() for i in LAYERS}
    tensors |= {f"layers.{i}.norm.weight": rand(200, seed=i).bfloat16() for i in LAYERS}
    tensors |= {f"layers.{i}.untouched.weight": rand(50, 60, seed=i).bfloat16() for i in LAYERS}
    tensors |= {"embed_tokens.weight": rand(64, 200).bfloat16()}
    base = save_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    targets = {ak.Target(f"layers.{i}.q"): (lora(200, 200, seed=i),) for i in LAYERS}
    adapter = ak.Adapter({**targets, ak.Target("lm_head"): (lora(64, 200),)})
    ak.merge(base, adapter, tmp_path / "out", tied="untie")
    assert ak.verify(tmp_path / "out", base, adapter).ok
    file = tmp_path / "out" / "model.safetensors"
    merged = load_file(file)
    planted = faults(load_all(base), merged)
    assert len(planted) == 50
    for name, wrong in planted:
        save_file({**merged, name: wrong.contiguous()}, file, {"format": "pt"})
        found = ak.verify(tmp_path / "out", base, adapter)
        assert [difference.tensor for difference in found.differences] == [name]
    save_file({name: tensor for name, tensor in merged.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    assert not ak.verify(tmp_path / "out", base, adapter).ok
