"""Hubs at scale, by hand: 1,000 flipped bits, a pull of 200 MB killed in the middle, 40 faults of a network.

Run as `PYTHONPATH=.:tests python tools/try_hub.py`; every line is a figure, and any that is not as it must be ends it
with exit code 1.
"""

import itertools
import os
import random
import shutil
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
FLIPS, KILLS, MEGABYTES = 1000, 24, 200
ASKED = 16 << 20
"""What `adapterkit.hub.transfer` says that a kill costs at most."""


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
    """Kills pulls at random moments; whether each second run is sent at most a chunk again, and gets the same bytes."""
    data, draw = np.random.default_rng(5).bytes(MEGABYTES * 1_000_000), random.Random(6)
    cuts = [0, 70_000_000, 120_000_000, 150_000_000, 185_000_000, len(data)]
    kinds = {"one file": {"big.bin": data}}
    kinds["five files"] = {f"{at}.bin": data[at:end] for at, end in itertools.pairwise(cuts)}
    worst: dict[str, list[int]] = {kind: [] for kind in kinds}
    for trial in range(KILLS):
        kind = list(kinds)[trial % 2]
        worst[kind].append(_killed(hub, folder / f"kill{trial}", kinds[kind], draw))
    for kind, again in worst.items():
        print(f"{len(again)} kills, {kind}: sent again {min(again):,} to {max(again):,} bytes; {sorted(again)}")
    return all(0 <= again <= ASKED for found in worst.values() for again in found)


def _killed(hub: HubServer, folder: Path, files: dict[str, bytes], draw: random.Random) -> int:
    """Kills a pull after a random byte, or a random time after the first one; the bytes that were sent twice."""
    hub.add("org/big", files)
    total, hub.sent = sum(map(len, files.values())), 0
    command = [sys.executable, "-m", "adapterkit", "pull", "org/big", str(folder / "out"), "--quiet"]
    with subprocess.Popen(command) as process:
        late, at, wait = draw.random() < 0.5, draw.randrange(total), draw.uniform(0, 0.3)
        while process.poll() is None and hub.sent <= (0 if late else at):
            time.sleep(0.001)
        time.sleep(wait if late else 0)
        process.kill()
        ended = process.wait()
    time.sleep(0.3)
    first, hub.sent = hub.sent, 0
    subprocess.run(command, check=True)
    same = {name: (folder / "out" / name).read_bytes() for name in files} == files
    shutil.rmtree(folder)
    print(f"  ended {ended} after {first:,} bytes sent; {hub.sent:,} in the second run; the same bytes: {same}")
    return first + hub.sent - total if same else -1


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
