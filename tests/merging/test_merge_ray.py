"""The merge on a cluster of three simulated nodes against the merge of this process, byte by byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from merges import lora, rand, save_base, tree
from quantized_vectors import adapter_for

import adapterkit as ak
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.quant import dequantized

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")

MARK = f"ADAPTERKIT_TEST_CLUSTER={os.getpid()}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ.update([MARK.split("=")], PYTHONPATH=os.pathsep.join([str(Path(ak.__file__).parents[1])]))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path, dict[str, bytes]]:
    """Base, adapter, and what the local engine makes of them."""
    tensors = {f"layers.{i}.q.weight": rand(1500, 1000, seed=i).bfloat16() for i in range(18)}
    base = save_base(tmp_path / "base", tensors, shards=18)
    ak.write(
        ak.Adapter({ak.Target(f"layers.{i}.q"): (lora(1500, 1000),) for i in range(17)}), tmp_path / "a.safetensors"
    )
    ak.merge(base, tmp_path / "a.safetensors", tmp_path / "local")
    return base, tmp_path / "a.safetensors", tree(tmp_path / "local")


def test_the_same_bytes_also_of_an_adapter_in_memory(cluster: Any, inputs: Any, tmp_path: Path) -> None:
    base, adapter, expected = inputs
    report = ak.merge(base, adapter, tmp_path / "out", engine="ray", address=cluster.address)
    assert tree(tmp_path / "out") == expected
    assert len(report.plan.files) == 18
    ak.merge(base, ak.read(adapter), tmp_path / "memory", engine="ray", address=cluster.address)
    weights = {name: data for name, data in tree(tmp_path / "memory").items() if name.endswith(".safetensors")}
    assert weights == {name: data for name, data in expected.items() if name.endswith(".safetensors")}
    assert not list(tmp_path.glob(".*"))


def test_a_fault_of_a_task_is_the_fault_of_the_merge(cluster: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"m.weight": rand(9, 5).half()}, shards=1)
    adapter = ak.Adapter({ak.Target("m"): (lora(9, 5, scale=1e4),)})
    with pytest.raises(ak.AdapterkitError, match="a NaN or an infinity in"):
        ak.merge(base, adapter, tmp_path / "out", engine="ray", address=cluster.address)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_worker_and_a_node_killed_on_the_way(cluster: Any, inputs: Any, tmp_path: Path) -> None:
    base, adapter, expected = inputs
    killed: list[str] = []

    def kill(done: int, _all: int) -> None:
        if not killed:
            killed.append(f"worker {_kill_a_worker()}")
        elif done and len(killed) == 1:
            killed.append("node")
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)

    ak.merge(base, adapter, tmp_path / "out", engine="ray", address=cluster.address, progress=kill)
    assert len(killed) == 2
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("choice", ["requantize", "dequantize", "original"])
def test_a_quantized_base(cluster: Any, choice: str, tmp_path: Path) -> None:
    case = Path(__file__).parents[2] / "spec" / "vectors" / "quant" / "gptq" / "four"
    adapter, _, _ = adapter_for(case)
    ak.write(adapter, tmp_path / "a.safetensors")
    plain = {name: tensor.torch() for name, tensor in dequantized(open_checkpoint(case)).tensors.items()}
    onto = save_base(tmp_path / "onto", plain, shards=1) if choice == "original" else None
    options = {"quantized": choice, "onto": onto}
    ak.merge(case, tmp_path / "a.safetensors", tmp_path / "local", **options)  # type: ignore[arg-type]
    ak.merge(
        case, tmp_path / "a.safetensors", tmp_path / "ray", engine="ray", address=cluster.address, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")


def _kill_a_worker() -> int | None:
    """kill -9 of one of this cluster's processes that is at work on a file."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            at_work = (folder / "cmdline").read_bytes().startswith(b"ray::write_file")
            if at_work and MARK.encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                return int(folder.name)
        except OSError:
            continue
    return None


DRIVER = """
import os, signal, sys, adapterkit as ak
def die(done, total):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
ak.merge(*sys.argv[1:4], engine="ray", address=sys.argv[4], progress=die)
"""


def test_a_driver_killed_and_run_again(cluster: Any, inputs: Any, tmp_path: Path) -> None:
    base, adapter, expected = inputs
    words = [str(base), str(adapter), str(tmp_path / "out"), cluster.address]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DRIVER, *words], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    report = ak.merge(base, adapter, tmp_path / "out", engine="ray", address=cluster.address)
    assert report.resumed
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))
