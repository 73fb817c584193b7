"""Run commands at a terminal of a given width."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import adapterkit as ak

ROOT = Path(ak.__file__).parent.parent


def at_terminal(folder: Path, *words: str, columns: int = 80) -> str:
    """Return the output of a command at a terminal of this width, without escape codes."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"}
    command = [sys.executable, "-m", "adapterkit", *words]
    with subprocess.Popen(command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        text = b""
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            text += piece
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()).replace("\r\n", "\n")
