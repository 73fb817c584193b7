"""Write a Modelfile for a merged model, for `ollama create NAME -f FILE`; Ollama does not accept adapters.

Ollama reads the chat template and the tokenizer from the GGUF file, so the Modelfile needs only `FROM`:
https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StorageError, Unsupported, UsageError
from ..io.atomic import write_bytes
from ..io.checkpoint import open_checkpoint
from ..io.inputs import is_gguf
from ..quant import is_quantized

if TYPE_CHECKING:
    from os import PathLike


def modelfile_path(out: str | PathLike[str]) -> Path:
    """Return the path of the Modelfile of a merged model: in its folder, or next to its GGUF file."""
    path = Path(out)
    return path.with_name(f"{path.stem}.Modelfile") if path.suffix == ".gguf" else path / "Modelfile"


def write_modelfile(out: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the Modelfile of a merged model, and return its path.

    Args:
        out: the merged model: a GGUF file, or a folder of 16-bit weights with its config.
        overwrite: whether to replace an existing Modelfile with other content.

    Raises:
        Unsupported: Ollama cannot read the model: it is a single safetensors file, a GGUF model in several files, or
            quantized but not in GGUF.
        UsageError: the name starts or ends with a space or has a line break, which a Modelfile cannot contain.
        StorageError: another Modelfile exists, or the folder is not writable.
    """
    path = Path(out)
    merged = open_checkpoint(path)
    packed = all(is_gguf(file) for file in merged.files)
    if packed and (path.is_dir() or len(merged.files) != 1):
        cure = "Join the files first with llama-gguf-split --merge"
        raise Unsupported("Ollama reads only GGUF models in one file", path=path, cure=cure)
    if not packed and not path.is_dir():
        cure = "Merge into a GGUF model, or into a folder with config.json and a tokenizer"
        raise Unsupported("Ollama reads GGUF files and folders, not single weight files", path=path, cure=cure)
    if not packed and is_quantized(merged):
        cure = "Merge with --quantized dequantize (quantized='dequantize'), then run ollama create --quantize"
        raise Unsupported("Ollama reads no quantized weights except in GGUF", path=path, cure=cure)
    if path.name != path.name.strip() or "\n" in path.name or "\r" in path.name:
        raise UsageError("a Modelfile cannot contain this name", path=path, cure="Give OUT another name")
    # Write a path relative to the Modelfile, so that both can be moved together.
    text = f"FROM ./{path.name}\n" if packed else "FROM .\n"
    there = modelfile_path(path)
    if there.exists() and there.read_bytes() != text.encode() and not overwrite:
        raise StorageError("another Modelfile exists", path=there, cure="Add --overwrite (overwrite=True)")
    write_bytes(there, text.encode())
    return there
