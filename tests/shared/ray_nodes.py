"""Nodes of a Ray cluster on this machine without a shared folder: each has its own folders, credentials and link.

An audit hook in every process of a node logs the files that the process opens below the folder of the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import adapterkit as ak

PACKAGE = str(Path(ak.__file__).parents[1])

HOOK = """
import os, sys
def opened(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(os.environ["NODES_ROOT"]):
        os.write(log, arguments[0].encode() + b"\\n")
if "NODES_LOG" in os.environ:
    log = os.open(os.environ["NODES_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(opened)
"""


class Nodes:
    """A cluster whose nodes have separate folders below `root`."""

    def __init__(self, root: Path, count: int, environment: Mapping[str, str], own: list[Mapping[str, str]]) -> None:
        from ray.cluster_utils import Cluster

        self.root, self.environment, self.own = root, dict(environment), own
        (root / "hook").mkdir(parents=True)
        (root / "hook" / "sitecustomize.py").write_text(HOOK)
        head = {"num_cpus": 0, "include_dashboard": False, "env_vars": {**self._paths("head"), **environment}}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.start(number) for number in range(count)]
        self.address = str(self.cluster.address)

    def start(self, number: int) -> Any:
        """Start the node with this number."""
        variables = {**self._paths(f"node{number}"), **self.environment, **self.own[number]}
        for _ in range(3):
            # Try again: Ray allows a node 30 s to start, and a busy machine may take longer.
            with suppress(Exception):
                return self.cluster.add_node(num_cpus=1, env_vars=variables)
        return self.cluster.add_node(num_cpus=1, env_vars=variables)

    def kill(self, number: int) -> None:
        """End a node's processes as a power cut does."""
        self.cluster.remove_node(self.nodes[number], allow_graceful=False)

    def opened(self, number: int) -> set[Path]:
        """Return the files below the test's folder that a node's processes opened."""
        log = self.root / f"node{number}" / "opened"
        return {Path(line) for line in log.read_text().splitlines()} if log.exists() else set()

    def logs(self) -> str:
        """Return all logs of Ray and of the tasks, from all nodes."""
        folder = Path(self.cluster.head_node.get_session_dir_path())
        return "\n".join(file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file())

    def _paths(self, name: str) -> dict[str, str]:
        folder = self.root / name
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        return {
            "HOME": str(folder), "TMPDIR": str(folder / "tmp"), "ADAPTERKIT_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "hf"), "NODES_ROOT": str(self.root), "NODES_LOG": str(folder / "opened"),
            "PYTHONPATH": os.pathsep.join([str(self.root / "hook"), PACKAGE]),
        }  # fmt: skip


@contextmanager
def nodes_of(root: Path, environment: Mapping[str, str], own: list[Mapping[str, str]]) -> Iterator[Nodes]:
    """Yield a cluster with one node for each entry of `own`, the environment variables of that node."""
    import ray

    made = Nodes(root, len(own), environment, own)
    try:
        yield made
    finally:
        ray.shutdown()
        made.cluster.shutdown()


def driver(nodes: Nodes, environment: Mapping[str, str], *words: object) -> subprocess.Popen[str]:
    """Start the command line as the driver of a merge, with separate folders."""
    folder = nodes.root / "driver"
    folder.mkdir(exist_ok=True)
    own = {
        "HOME": str(folder),
        "ADAPTERKIT_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": PACKAGE,
    }
    command = [sys.executable, "-W", "ignore", "-m", "adapterkit", "merge", *map(str, words)]
    command += ["--engine", "ray", "--address", nodes.address, "--json"]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **nodes.environment, **own, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
