"""Build the compiled loops for the tests that compare them with numpy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapterkit import native

ROOT = Path(__file__).resolve().parents[2]

if any(map(shutil.which, ("cc", "gcc", "clang"))):
    # Build the library, because the checkout may have none, or an old one.
    script = [sys.executable, str(ROOT / "tools" / "build_kernel.py"), "--if-older"]
    subprocess.run(script, check=True, capture_output=True)
    native.loops.cache_clear()

needs_loops = pytest.mark.skipif(native.loops() is None, reason="there is no C compiler for this processor")
