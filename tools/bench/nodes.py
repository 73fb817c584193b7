"""Times merges on one to three Ray nodes without a shared disk, and compares them with the simulation of a cluster.

    python tools/bench nodes [--nodes 3] [--shards 12] [--rows 1500] [--bandwidth 1.5e6] [--json FILE]

The nodes are processes on this machine with separate folders. Base, adapter and output are in moto's S3 server. Each
node reaches the server over a link of the given bandwidth, so that the links limit the speed, not this machine. A first
run over fast links measures the time without transfers: starts, planning and arithmetic. Needs ray and moto.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shared")]


def main() -> None:
    """Write the inputs, run the merges, and print one line per run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--bandwidth", type=float, default=1.5e6, help="bytes a second of a node, each way")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with tempfile.TemporaryDirectory() as folder:
        told = measured(Path(folder), f"http://{host}:{port}", chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(told, indent=2) + "\n")
    server.stop()


def measured(root: Path, server: str, chosen: argparse.Namespace) -> dict[str, object]:
    """Run the merges and the simulations; return the times as plain data."""
    import adapterkit as ak
    from adapterkit.merging.cluster import simulate

    os.environ.update({
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "ADAPTERKIT_CACHE": str(root / "cache"),
        "HF_HUB_OFFLINE": "0",
    })  # fmt: skip
    base, adapter = inputs(root, server, chosen.shards, chosen.rows)
    plan = ak.plan(base, adapter)
    fixed = seconds(root / "fast", server, 1, float("inf"))
    print(f"{plan.bytes:,} bytes in {chosen.shards} files; without transfers {fixed:.1f} s on one node", flush=True)
    rows = []
    for nodes in range(1, chosen.nodes + 1):
        taken = seconds(root / f"on{nodes}", server, nodes, chosen.bandwidth)
        said = simulate(plan, nodes, bandwidth=chosen.bandwidth, start=0.0, driver=fixed).seconds
        rows.append({"nodes": nodes, "seconds": round(taken, 1), "simulated": round(said, 1)})
        print(f"{nodes} nodes: {taken:.1f} s, simulated {said:.1f} s, ratio {taken / said:.2f}", flush=True)
    return {"bytes": plan.bytes, "files": chosen.shards, "bandwidth": chosen.bandwidth, "fixed": fixed, "runs": rows}


def inputs(root: Path, server: str, shards: int, rows: int) -> tuple[Path, Path]:
    """Write a base and an adapter to the disk and to the store; return their local paths."""
    from merges import lora, rand, save_base

    import adapterkit as ak

    urllib.request.urlopen(urllib.request.Request(f"{server}/models", method="PUT")).close()
    tensors = {f"layers.{i}.q.weight": rand(rows, 1000, seed=i).bfloat16() for i in range(shards)}
    base = save_base(root / "base", tensors, shards=shards)
    targets = {ak.Target(f"layers.{i}.q"): (lora(rows, 1000),) for i in range(shards)}
    ak.write(ak.Adapter(targets), root / "lora.safetensors")
    ak.hub.push(base, "s3://models/base")
    ak.hub.push(root / "lora.safetensors", "s3://models/lora")
    return base, root / "lora.safetensors"


def seconds(root: Path, server: str, nodes: int, bandwidth: float) -> float:
    """Return the wall time of one merge, without the start of the cluster."""
    from links import Link
    from ray_nodes import driver, nodes_of

    links = [Link(server, bandwidth) for _ in range(nodes)]
    own = [{"AWS_ENDPOINT_URL": f"http://{link.host}"} for link in links]
    with nodes_of(root, {}, own) as cluster:
        started = time.perf_counter()
        process = driver(cluster, {}, "s3://models/base", "s3://models/lora", "-o", f"s3://models/{root.name}")
        out, err = process.communicate()
        taken = time.perf_counter() - started
    if process.returncode:
        sys.exit(out + err)
    for link in links:
        link.close()
    return taken


if __name__ == "__main__":
    main()
