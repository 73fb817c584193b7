"""A Modelfile for Ollama, which refuses adapters: it names the merged model, and `ollama create NAME -f FILE` reads it.

Ollama reads the chat template and the tokenizer from the GGUF file, so that the Modelfile needs no more than `FROM`:
https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StorageError, Unsupported, UsageError
from ..io.atomic import write_bytes
from ..io.checkpoint import open_checkpoint
from ..io.magic_bytes import is_gguf
from ..quant import is_quantized

if TYPE_CHECKING:
    from os import PathLike


def modelfile_path(out: str | PathLike[str]) -> Path:
    """Return where the Modelfile of a merged model belongs: in a folder, or next to a GGUF file."""
    path = Path(out)
    return path.with_name(f"{path.stem}.Modelfile") if path.suffix == ".gguf" else path / "Modelfile"


def write_modelfile(out: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the Modelfile of a merged model, and return its path.

    Args:
        out: the merged model: a GGUF file, or a folder of 16-bit weights with its config.
        overwrite: replace a Modelfile that says something else.

    Raises:
        Unsupported: Ollama cannot read the model: it is quantized in another scheme than GGUF's, one file of
            safetensors, or a GGUF model in several files.
        UsageError: the name ends in a space or has a line break, which a Modelfile cannot hold.
        StorageError: another Modelfile is there, or the folder is not writable.
    """
    path = Path(out)
    merged = open_checkpoint(path)
    packed = all(is_gguf(file) for file in merged.files)
    if packed and (path.is_dir() or len(merged.files) != 1):
        cure = "Merge into a GGUF model in one file; llama-gguf-split --merge makes one of several"
        raise Unsupported("Ollama reads GGUF models of one file", path=path, cure=cure)
    if not packed and not path.is_dir():
        cure = "Merge into a GGUF model, or into a folder with config.json and tokenizer"
        raise Unsupported("Ollama reads GGUF files and folders, not single weight files", path=path, cure=cure)
    if not packed and is_quantized(merged):
        cure = "Merge with --quantized dequantize (quantized='dequantize'), and let ollama create --quantize pack it"
        raise Unsupported("Ollama reads no packed weights but GGUF's", path=path, cure=cure)
    if path.name != path.name.strip() or "\n" in path.name or "\r" in path.name:
        raise UsageError("a Modelfile cannot hold the name", path=path, cure="Give OUT another name")
    # The path is relative to the Modelfile, so that both may be moved together.
    text = f"FROM ./{path.name}\n" if packed else "FROM .\n"
    there = modelfile_path(path)
    if there.exists() and there.read_bytes() != text.encode() and not overwrite:
        raise StorageError("another Modelfile is there", path=there, cure="Add --overwrite (overwrite=True)")
    write_bytes(there, text.encode())
    return there
