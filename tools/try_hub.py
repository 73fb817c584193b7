"""Hubs at scale, by hand: 1,000 flipped bits, a pull of 200 MB killed in the middle, 40 faults of a network.

Run as `PYTHONPATH=.:tests python tools/try_hub.py`; every line is a figure, and any that is not as it must be ends it
with exit code 1.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from hub_repository import environment
from hub_server import Fault, HubServer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
FLIPS, MEGABYTES, CHUNK = 1000, 200, 1 << 20


def flips(hub: HubServer, folder: Path) -> bool:
    """Each time another bit of what is sent is another; whether all are found."""
    from adapterkit.errors import Corrupt
    from adapterkit.hub import parse
    from adapterkit.hub.hubs import remote_at
    from adapterkit.hub.transfer import fetch

    data = np.random.default_rng(3).bytes(4096)
    hub.add("org/flips", {"small.json": data, "lfs.bin": data})
    remote, draw, found = remote_at(parse("org/flips")), random.Random(4), 0
    for trial in range(FLIPS):
        hub.faults = [Fault("/resolve/", "flip", 3, draw.randrange(8 * len(data)))]
        try:
            fetch(remote, remote.files[trial % 2], folder / "part", lambda _: None)
            (folder / "part").unlink()
        except Corrupt:
            found += 1
    hub.faults = []
    print(f"flipped bits found: {found} of {FLIPS}")
    return found == FLIPS


def killed(hub: HubServer, folder: Path) -> bool:
    """Kills a pull in the middle; whether the next one has at most a chunk sent again."""
    data = np.random.default_rng(5).bytes(MEGABYTES * 1_000_000)
    hub.add("org/big", {"big.bin": data})
    command = [sys.executable, "-m", "adapterkit", "pull", "org/big", str(folder / "out"), "--quiet"]
    with subprocess.Popen(command) as process:
        hub.chunk_delay = lambda sent: process.send_signal(signal.SIGKILL) if sent > len(data) // 2 else None
        ended = process.wait()
    time.sleep(0.2)
    hub.chunk_delay = lambda _: None
    held = sum(part.stat().st_size for part in (folder / ".out.pulling" / "parts").iterdir())
    first, hub.sent = hub.sent, 0
    subprocess.run(command, check=True)
    again = hub.sent - (len(data) - held)
    same = (folder / "out" / "big.bin").read_bytes() == data
    print(f"killed ({ended}) with {held:,} bytes held of {first:,} that the server had sent")
    print(f"the second run was sent {hub.sent:,} bytes: {again:,} more than were missing; the same bytes: {same}")
    return same and ended == -signal.SIGKILL and again <= CHUNK


def faults(hub: HubServer, folder: Path) -> bool:
    """Pulls under 40 faults, some of which stay; whether each ends with the bytes or with the right exit code."""
    files = {"a.bin": np.random.default_rng(1).bytes(300_000), "b.json": b"{}"}
    hub.add("org/faults", files)
    draw, right, recovered = random.Random(7), 0, 0
    kinds = [("truncate", 1000), ("drop", None), ("status", 503), ("status", 429), ("flip", 5)]
    routes = ["/resolve/", "/tree/", "/revision/", "/api/models"]
    for number in range(40):
        kind, value = kinds[number % len(kinds)]
        route = "/resolve/" if kind in ("truncate", "flip") else draw.choice(routes)
        lasting = number % 4 == 3
        hub.faults = [Fault(route, kind, 99 if lasting else draw.choice([1, 2]), value, {"Retry-After": "0"})]
        out = folder / f"out{number}"
        from command_line import run

        code = run("pull", "org/faults@main", out).exit_code
        whole = out.exists() and {f.name: f.read_bytes() for f in out.iterdir() if f.name in files} == files
        recovered += code == 0
        expected = {4} if kind == "flip" else {5}
        right += whole if code == 0 else lasting and code in expected and not out.exists()
    hub.faults = []
    print(f"of 40 faults: {recovered} recovered, {right} ended as they must")
    return right == 40


def main() -> None:
    """Runs all of them."""
    hub = HubServer()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ.update(environment(hub, folder))
        from adapterkit.hub import retries

        with mock.patch.object(retries, "FIRST_WAIT", 0.001), mock.patch("huggingface_hub.utils._http.time.sleep"):
            fine = [trial(hub, folder) for trial in (flips, killed, faults)]
    hub.close()
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
