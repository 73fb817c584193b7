"""Tests each kind of hub with large files: flipped bits, and pulls and pushes that are killed at random moments.

Run it as `PYTHONPATH=.:tests python tools/try_hub.py [flips|pulls|uploads|parts]...`. It prints one figure per line,
and exits with 1 at the first wrong figure. Network faults are tested in `tests/hub/test_hub_faults.py`.
"""

import contextlib
import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from hub_repository import environment
from hub_server import Fault, Faulty, HubServer
from oci_registry import Proxy, distribution

FLIPS, KILLS, MEGABYTES = 1000, 24, 200
ASKED = 16 << 20
"""The most bytes that a pull by `adapterkit.hub.transfer` repeats after a kill; for a push: `_uploads.CHUNK`."""

COMMAND = [sys.executable, "-m", "adapterkit"]


class Lab:
    """Servers of each kind, behind proxies with faults; `uri` returns an address with the scheme of a hub."""

    def __init__(self, hub: HubServer, registry: Proxy, buckets: Proxy, folder: Path) -> None:
        self.hub, self.registry, self.buckets, self.folder = hub, registry, buckets, folder

    def uri(self, scheme: str, name: str) -> str:
        oci = f"oci://{self.registry.host}/tries/{name}:v1"
        return {"hf": f"hf://org/{name}", "oci": oci, "s3": f"s3://tries/{name}"}[scheme]

    def faulty(self, scheme: str) -> Faulty:
        return {"hf": self.hub, "oci": self.registry, "s3": self.buckets}[scheme]


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """Start the servers for the block."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    server = "{}:{}".format(*moto.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"http://{server}/tries", method="PUT")).close()
    with (
        tempfile.TemporaryDirectory() as scratch,
        distribution(Path(scratch) / "registry", storage=f"filesystem: {{rootdirectory: {scratch}/blobs}}") as host,
    ):
        made = Lab(HubServer(), Proxy(host), Proxy(server), Path(scratch))
        os.environ |= environment(made.hub, made.folder)
        keys = {"ENDPOINT_URL": f"http://{made.buckets.host}", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}
        os.environ |= {f"AWS_{name}": value for name, value in (keys | {"REGION": "us-east-1"}).items()}
        for server_of in (made.hub, made.registry, made.buckets):
            # A killed process does not close its connection.
            server_of.http.handle_error = lambda *_: None
        yield made
    moto.stop()


def flips(lab: Lab) -> bool:
    """Flip a different bit of the sent bytes each time, also in retries; return whether all were detected."""
    found = [_flips(lab, scheme) for scheme in ("hf", "oci", "s3")]
    return all(found)


def _flips(lab: Lab, scheme: str) -> bool:
    from adapterkit.errors import Corrupt
    from adapterkit.hub import parse, web
    from adapterkit.hub.hubs import remote_at
    from adapterkit.hub.transfer import fetch

    uri, draw, found = lab.uri(scheme, "flips"), random.Random(4), 0
    subprocess.run([*COMMAND, "push", _adapter(lab.folder / "flips", 4096), uri, "--quiet"], check=True)
    remote, part = remote_at(parse(uri)), lab.folder / "part"
    files = [file for file in remote.files if not file.path.endswith(".gitattributes")]
    with mock.patch.object(web, "FIRST_WAIT", 0.001):
        for trial in range(FLIPS):
            file = files[trial % len(files)]
            name = file.digest if scheme == "oci" else file.path
            lab.faulty(scheme).faults = [Fault(name, "flip", 3, draw.randrange(8 * file.size))]
            with contextlib.suppress(Corrupt):
                fetch(remote, file, part, lambda _: None)
                continue
            found += 1
    lab.faulty(scheme).faults = []
    print(f"{scheme}: flipped bits found: {found} of {FLIPS}", flush=True)
    return found == FLIPS


def pulls(lab: Lab) -> bool:
    """Kill pulls at random moments; return whether each repeated pull got the same bytes and at most a chunk twice."""
    data, draw = np.random.default_rng(5).bytes(MEGABYTES * 1_000_000), random.Random(6)
    cuts = [0, 70_000_000, 120_000_000, 150_000_000, 185_000_000, len(data)]
    kinds = {"one file": {"big.bin": data}}
    kinds["five files"] = {f"{at}.bin": data[at:end] for at, end in itertools.pairwise(cuts)}
    worst: dict[str, list[int]] = {kind: [] for kind in kinds}
    for trial in range(KILLS):
        kind = list(kinds)[trial % 2]
        worst[kind].append(_pulled(lab, lab.folder / f"pull{trial}", kinds[kind], draw))
    for kind, again in worst.items():
        print(f"{len(again)} kills of pulls, {kind}: {min(again):,} to {max(again):,} bytes sent again", flush=True)
    return all(0 <= again <= ASKED for found in worst.values() for again in found)


def _pulled(lab: Lab, folder: Path, files: dict[str, bytes], draw: random.Random) -> int:
    """Kill a pull after a random byte, or a random time after the first one; return the bytes that were sent twice."""
    lab.hub.add("org/big", files)
    total, lab.hub.sent = sum(map(len, files.values())), 0
    command = [*COMMAND, "pull", "org/big", str(folder / "out"), "--quiet"]
    late, at, wait = draw.random() < 0.5, draw.randrange(total), draw.uniform(0, 0.3)
    ended = _killed(command, lambda: lab.hub.sent > (0 if late else at), wait if late else 0)
    first, lab.hub.sent = lab.hub.sent, 0
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    same = {name: (folder / "out" / name).read_bytes() for name in files} == files
    shutil.rmtree(folder)
    again = first + lab.hub.sent - total
    print(f"  ended {ended} after {first:,} bytes; {lab.hub.sent:,} then, {again:,} of them again; same bytes: {same}")
    return again if same else -1


def uploads(lab: Lab) -> bool:
    """Kill pushes to a registry at random moments; return whether a pull returns the pushed bytes.

    If the kill is between the registry's receipt of a chunk and its answer, Docker's registry refuses the upload, and
    the whole blob is sent again; otherwise, at most one chunk is. A proxy in front of the registry reads requests
    completely, because the registry also refuses an upload with half of a chunk.
    """
    draw, found, fine = random.Random(8), [], []
    for trial in range(KILLS // 2):
        folder, uri = _adapter(lab.folder / f"upload{trial}", 100_000_000, trial), lab.uri("oci", f"upload{trial}")
        command, at, total = [*COMMAND, "push", folder, uri, "--quiet"], draw.randrange(100_000_000), _size(folder)
        lab.registry.received = 0
        ended = _killed(command, lambda at=at: lab.registry.received > at, 0)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(lab.registry.received - total)
        fine.append(_back(lab, uri, folder))
        print(f"  ended {ended}; {found[-1]:,} bytes more than the files were sent; the same bytes: {fine[-1]}")
    within = sum(again <= ASKED + 100_000 for again in found)
    print(f"{len(found)} kills of pushes to a registry: {within} cost at most a chunk; the worst {max(found):,}")
    return all(fine)


def parts(lab: Lab) -> bool:
    """Kill pushes to a bucket during a multipart upload; return whether no partial upload counts as complete."""
    fine = []
    for trial in range(6):
        folder, uri = _adapter(lab.folder / f"parts{trial}", 100_000_000, trial), lab.uri("s3", f"parts{trial}")
        command, lab.buckets.received = [*COMMAND, "push", folder, uri, "--quiet"], 0
        ended = _killed(command, lambda at=trial: lab.buckets.received > (at + 1) * 14_000_000, 0)
        half = subprocess.run([*COMMAND, "pull", uri, str(lab.folder / "half")], capture_output=True).returncode
        again = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        fine.append(half == 5 and again == 0 and _back(lab, uri, folder))
        print(f"  ended {ended}; a pull then ends with {half}, the next push with {again}, the same bytes: {fine[-1]}")
    print(f"{len(fine)} kills of pushes in parts: {sum(fine)} with the right result", flush=True)
    return all(fine)


def _killed(command: list[object], due: Callable[[], bool], wait: float) -> int:
    """Kill a process a moment after a condition is true; return its exit status when all connections are closed."""
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not due():
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        ended = process.wait()
    time.sleep(0.3)
    return ended


def _adapter(folder: Path, nbytes: int, seed: int = 0) -> Path:
    """Write an adapter in PEFT's format with about this number of bytes."""
    from hub_repository import lay, peft_files
    from safetensors.numpy import save

    key = "base_model.model.layers.0.q.lora_{}.weight"
    draw = np.random.default_rng(seed)
    tensors = {key.format("A"): draw.random((2, nbytes // 8), np.float32)}
    tensors[key.format("B")] = draw.random((8, 2), np.float32)
    return lay(folder, peft_files() | {"adapter_model.safetensors": save(tensors, {"format": "pt"})})


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _back(lab: Lab, uri: str, folder: Path) -> bool:
    """Return whether the pulled files equal the pushed files; remove both."""
    back = lab.folder / "back"
    subprocess.run([*COMMAND, "pull", uri, str(back), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    same = all((back / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())
    shutil.rmtree(back)
    shutil.rmtree(folder)
    return same


def main() -> None:
    """Run the named tests, or all."""
    trials = {"flips": flips, "pulls": pulls, "uploads": uploads, "parts": parts}
    with lab() as made, mock.patch("huggingface_hub.utils._http.time.sleep"):
        fine = [trials[name](made) for name in sys.argv[1:] or trials]
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
