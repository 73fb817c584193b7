"""Choose the files to copy next to merged weights (a tokenizer and the base's other files), and write a Modelfile.

All files of the tokenizer (vocabulary, added tokens, settings, chat template) come from the same folder, because the
token ids and templates of two folders may contradict each other.

`ollama create NAME -f FILE` creates a model from a Modelfile. Recent versions of Ollama do not accept adapters there,
only merged models. Ollama reads the chat template and the tokenizer from the GGUF file, so the Modelfile needs only
`FROM`:
https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.metadata import REPORT as REPORT
from ..errors import Malformed, StorageError, Unsupported, UsageError, storage_error
from ..io.atomic import write_bytes
from ..io.checkpoint import INDEX, INDEX_SUFFIX, TORCH_INDEX, open_checkpoint
from ..io.inputs import decimal_number, is_gguf
from ..io.locations import NOTE, exists
from ..naming.ties import is_embedding
from ..quant import SIDE_FILES, Dequantized, is_quantized

if TYPE_CHECKING:
    from os import PathLike

    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue


CARD = "README.md"

WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
}  # fmt: skip
"""File extensions of weights. The base's other weight files are not copied, because they contain unmerged weights."""

VOCABULARIES = frozenset({
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tekken.json", "tokenizer.tiktoken", "qwen.tiktoken", "source.spm",
})  # fmt: skip
"""Vocabulary files. A folder without a vocabulary file does not have a complete tokenizer."""

TOKENIZER = VOCABULARIES | {
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "special_tokens_map.json",
    "target.spm", "tokenizer_config.json",
}  # fmt: skip
"""The names of tokenizer files. The files in the folder `TEMPLATES` also belong to the tokenizer."""

TEMPLATES = "additional_chat_templates"
"""The name of the folder in which transformers saves all chat templates except the default template."""

CHOICES = ("base", "adapter")


@dataclass(frozen=True, slots=True)
class Companions:
    """The files to copy next to the weights.

    Attributes:
        copies: (path of the file, name in the output) for each file to copy.
        left_out: files of the base that are not copied.
        tokenizer: the source of the tokenizer, as plain data; None if no adapter has a complete tokenizer, or if the
            base is one file.
        warnings: warnings for the user about the choice of the tokenizer.
    """

    copies: tuple[tuple[Path, str], ...] = ()
    left_out: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def companions(
    base: Checkpoint, adapters: Sequence[tuple[str, Path]], chosen: str | PathLike[str] | None
) -> Companions:
    """Return the files to copy next to the weights when a merge writes a folder.

    Args:
        base: the checkpoint that the merge reads, such as the dequantized base.
        adapters: (name, folder) of each adapter that has a folder.
        chosen: the source of the tokenizer: `base`, `adapter` or a folder. None means the adapters' tokenizer if it is
            complete, fits the base, and is the same for all adapters that have one; else the base's tokenizer.

    Raises:
        UsageError: `chosen` is neither a known choice nor a folder. Or `chosen` is `adapter` or a folder, but there is
            no complete tokenizer, the adapters' tokenizers differ, or the base lacks embeddings for some tokens.
        Malformed: a file to copy is a link to a path outside the folder of the base or the adapter.
    """
    if chosen is not None and chosen not in CHOICES:
        folder = Path(chosen)
        if not (exists(folder) and folder.is_dir()):
            why = f"the choice {str(chosen)!r} for the tokenizer is unknown, and no folder has this name"
            raise UsageError(why, cure=f"Pass --tokenizer (tokenizer=) {', '.join(CHOICES)}, or a tokenizer's folder")
        adapters, chosen = [(folder.name, folder)], "adapter"
    if not base.root.is_dir():
        return Companions()
    tokens, tokenizer, warnings = _tokenizer(base, adapters, None if chosen is None else str(chosen))
    copies, left_out, weights = [], [], set(base.files)
    for file in sorted(_files(base.root)):
        name = file.relative_to(base.root).as_posix()
        if file in weights or name in (INDEX, TORCH_INDEX, REPORT, NOTE):
            continue
        stale = isinstance(base, Dequantized) and not base.packs and name in SIDE_FILES
        if file.suffix in WEIGHT_SUFFIXES or name.endswith(INDEX_SUFFIX) or stale or (tokens and _is_token_file(name)):
            left_out.append(name)
        else:
            _check_inside(file, base.root)
            copies.append((file, name))
    return Companions((*copies, *tokens), tuple(left_out), tokenizer, tuple(warnings))


def _tokenizer(
    base: Checkpoint, adapters: Sequence[tuple[str, Path]], chosen: str | None
) -> tuple[list[tuple[Path, str]], dict[str, JsonValue] | None, list[str]]:
    """Return (tokenizer files to copy from an adapter, plain data about the choice, warnings)."""
    base_contents = _contents(base.root)
    contents = [(name, folder, _contents(folder)) for name, folder in adapters]
    whole = [(name, folder, files) for name, folder, files in contents if files.keys() & VOCABULARIES]
    differing = [each for each in whole if each[2] != base_contents]
    warnings = [
        f"{name} has {', '.join(sorted(files))} but no vocabulary file; these files are not copied, "
        "because files of two tokenizers may contradict each other"
        for name, _, files in contents
        if files
        and not files.keys() & VOCABULARIES
        and any(base_contents.get(key) != value for key, value in files.items())
    ]
    if chosen == "adapter" and not whole:
        raise UsageError(
            "no adapter's folder has a tokenizer", cure=f"Pass {_flag('base')}, or a folder with a tokenizer"
        )
    if not differing:
        return [], ({"from": "base", "differs": False} if whole else None), warnings
    if len(differing) < len(whole) or any(files != differing[0][2] for _, _, files in differing):
        return [], {"from": "base", "differs": True}, [*warnings, _several(whole, chosen)]
    name, folder, files = differing[0]
    changed = ", ".join(sorted(file for file in {*files, *base_contents} if files.get(file) != base_contents.get(file)))
    differs = f"the tokenizer of {name} differs from the base's ({changed})"
    beyond = _beyond(folder, base)
    why = f"the base has no embedding for token {beyond}"
    if chosen == "adapter" and beyond is not None:
        raise UsageError(f"{differs}, and {why}", path=folder, cure=f"Pass {_flag('base')} to keep the base's")
    if chosen == "base" or beyond is not None:
        kept = f"{differs}{f', and {why}' if beyond is not None else ''}; the base's tokenizer is kept"
        return [], {"from": "base", "differs": True}, [*warnings, kept]
    copies = [(folder / file, file) for file in sorted(files)]
    for file, _ in copies:
        _check_inside(file, folder)
    taken = f"{differs}; the tokenizer of {name} is used. To keep the base's tokenizer, pass {_flag('base')}"
    return copies, {"from": "adapter", "adapter": name, "differs": True}, [*warnings, taken]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a complete tokenizer."""
    return exists(folder) and folder.is_dir() and any((folder / name).is_file() for name in VOCABULARIES)


def _several(whole: Sequence[tuple[str, Path, Mapping[str, bytes]]], chosen: str | None) -> str:
    """Return a warning that several adapters have different tokenizers, and that the base's tokenizer is used.

    Raises:
        UsageError: the caller chose `adapter`.
    """
    why = f"the tokenizers of {', '.join(name for name, _, _ in whole)} differ from each other"
    if chosen == "adapter":
        raise UsageError(why, cure=f"Pass {_flag('base')} to keep the base's, or merge one adapter at a time")
    return f"{why}; the base's tokenizer is kept"


def _contents(folder: Path) -> dict[str, bytes]:
    """Return a map from a folder's tokenizer files to their sha256."""
    import hashlib

    digests = {}
    templates = folder / TEMPLATES
    for file in sorted([*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        name = file.relative_to(folder).as_posix()
        if _is_token_file(name) and file.is_file():
            try:
                digests[name] = hashlib.sha256(file.read_bytes()).digest()
            except OSError as error:
                raise storage_error(error, file) from error
    return digests


def _is_token_file(name: str) -> bool:
    return name in TOKENIZER or name.startswith(f"{TEMPLATES}/")


def _beyond(folder: Path, base: Checkpoint) -> int | None:
    """Return the largest token id of a folder's tokenizer; None if the base's embedding has a row for this id.

    Also return None if the base has no embedding.
    """
    rows = max((t.shape[0] for name, t in base.tensors.items() if is_embedding(name) and t.shape), default=None)
    largest = max((token for name in _NUMBERED for token in _tokens(folder / name)), default=-1)
    return largest if rows is not None and largest >= rows else None


_NUMBERED = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")


def _tokens(file: Path) -> list[int]:
    """Return some of the token ids in a tokenizer file, always including the largest.

    If the file is not in transformers' format, the list contains no token id.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(content, dict):
        return []
    if file.name == "added_tokens.json":
        return [value for value in content.values() if type(value) is int]
    if file.name == "tokenizer_config.json":
        decoder = content.get("added_tokens_decoder")
        ids = [decimal_number(key) for key in decoder] if isinstance(decoder, dict) else []
        return [number for number in ids if number is not None]
    added, model = content.get("added_tokens"), content.get("model")
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids.append(len(vocabulary) - 1 if isinstance(vocabulary, dict | list) else -1)
    return [token for token in ids if type(token) is int]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, except in hidden folders; follow links to files, but not links to folders."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            yield from _files(entry)
        elif entry.is_file():
            yield entry


def _check_inside(file: Path, folder: Path) -> None:
    """Refuse a link to a file outside `folder`.

    Otherwise a link in a downloaded model could point to any file of the user, and the merge would copy this file.

    The links in huggingface_hub's cache are allowed: `snapshots/COMMIT/config.json` is a link to `blobs/HASH` of the
    same repository.
    """
    if not file.is_symlink() and not file.parent.is_symlink():
        return
    home, target = folder.resolve(), file.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        cure = "If you trust the linked file, replace the link with a copy of this file; otherwise delete the link"
        raise Malformed(f"the file is a link to {target}, outside the folder", path=file, cure=cure)


def _flag(choice: str) -> str:
    return f'--tokenizer {choice} (tokenizer="{choice}")'


def modelfile_path(out: str | PathLike[str]) -> Path:
    """Return the path of the Modelfile of a merged model: in its folder, or next to its GGUF file."""
    path = Path(out)
    return path.with_name(f"{path.stem}.Modelfile") if path.suffix == ".gguf" else path / "Modelfile"


def write_modelfile(out: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the Modelfile of a merged model, and return its path.

    Args:
        out: the merged model: a GGUF file, or a folder of 16-bit weights with its config.
        overwrite: whether to replace an existing Modelfile whose content differs.

    Raises:
        Unsupported: Ollama cannot read the model: it is a single safetensors file, a GGUF model in several files, or
            quantized but not in GGUF.
        UsageError: the name of `out` starts or ends with a space, or contains a line break. A Modelfile cannot contain
            such a name.
        StorageError: a Modelfile with other content exists and `overwrite` is False, or the folder is not writable.
    """
    path = Path(out)
    merged = open_checkpoint(path)
    packed = all(is_gguf(file) for file in merged.files)
    if packed and (path.is_dir() or len(merged.files) != 1):
        cure = "Join the files first with llama-gguf-split --merge"
        raise Unsupported("Ollama reads only GGUF models in one file", path=path, cure=cure)
    if not packed and not path.is_dir():
        cure = "As the base, pass a GGUF model, or a folder with config.json and a tokenizer"
        raise Unsupported("Ollama reads GGUF files and folders, not single weight files", path=path, cure=cure)
    if not packed and is_quantized(merged):
        cure = "Merge with --quantized dequantize (quantized='dequantize'), then run ollama create --quantize"
        raise Unsupported("Ollama reads quantized weights only from GGUF files", path=path, cure=cure)
    if path.name != path.name.strip() or "\n" in path.name or "\r" in path.name:
        cure = "Choose a name without line breaks, and without a space at its start or end"
        raise UsageError("a Modelfile cannot contain this name", path=path, cure=cure)
    # Write a path relative to the Modelfile, so that the model and its Modelfile can be moved together.
    text = f"FROM ./{path.name}\n" if packed else "FROM .\n"
    there = modelfile_path(path)
    if there.exists() and there.read_bytes() != text.encode() and not overwrite:
        raise StorageError("another Modelfile exists", path=there, cure="Pass --overwrite (overwrite=True)")
    write_bytes(there, text.encode())
    return there
