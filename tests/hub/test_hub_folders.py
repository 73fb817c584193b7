# ruff: noqa: F811, ARG001 - a fixture is imported and then named
"""Folders for the meantime: gone afterwards, and those of processes that were killed go the next time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from hub_repository import base_files, hub, lay, peft_files  # noqa: F401 - a fixture
from hub_server import HubServer

from adapterkit.errors import StorageError
from adapterkit.hub.transfer import scratch


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "scratch").iterdir()}


def test_nothing_is_left_of_a_scratch_folder(hub: HubServer, tmp_path: Path) -> None:
    with scratch() as folder, scratch() as other:
        lay(folder, {"a/b": b"1"})
        assert folder != other
        with scratch():
            assert (folder / "a" / "b").exists(), "what is in use is not swept"
    assert left(tmp_path) == {"lock"}


def test_what_a_killed_process_left_goes_the_next_time(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/base", base_files())
    lay(tmp_path / "lora", peft_files())
    asked, wait = [], hub.chunk_delay
    hub.chunk_delay = lambda sent: (asked.append(sent), time.sleep(10))  # type: ignore[func-returns-value,assignment]
    command = [sys.executable, "-m", "adapterkit", "inspect", "hf://org/base"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}) as process:
        while not asked:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert len(left(tmp_path)) == 3, "a folder, its lock, and the lock of all"
    hub.chunk_delay = wait
    assert run("inspect", "hf://org/base").exit_code == 0
    assert left(tmp_path) == {"lock"}
    assert not (tmp_path / "tmp").exists(), "nothing was made elsewhere"


def test_a_cache_that_cannot_be_written_is_said(hub: HubServer, tmp_path: Path) -> None:
    lay(tmp_path, {"cache": b"a file"})
    with pytest.raises(StorageError), scratch():
        pass
