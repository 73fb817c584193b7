"""Runs mergekit's `model+lora` and removes its cache of merged models: `python mergekit_merge.py BASE ADAPTER OUT`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path


def main(base: str, adapter: str, out: str) -> int:
    """Run the command and return its exit code; its configuration and cache are beside the output during the run."""
    work = Path(f"{out}.mergekit")
    work.mkdir(parents=True)
    try:
        said = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": f"{base}+{adapter}"}]}
        (work / "config.yaml").write_text(json.dumps(said))
        command = Path(sys.executable).with_name("mergekit-yaml")
        caches = [f"--lora-merge-cache={work / 'cache'}", "--no-copy-tokenizer", "--lazy-unpickle"]
        return subprocess.run([command, work / "config.yaml", out, *caches], check=False).returncode
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
