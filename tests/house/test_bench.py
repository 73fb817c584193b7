"""Benchmarks start without options; what they measure is not tested."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_converting_is_measured_in_a_temporary_folder():
    command = [sys.executable, ROOT / "tools" / "bench", "convert", "--rounds", "1", "--modules", "10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "PEFT to kohya" in result.stdout
