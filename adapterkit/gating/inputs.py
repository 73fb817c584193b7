"""Create the inputs of a gate: tokens of short texts, or random token ids or pixels if the base has no tokenizer."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ..errors import Malformed, Unsupported, UsageError, first_line
from ..io.inputs import read_input
from ..io.locations import located

BUILTIN = "builtin"

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""Every folder with a tokenizer has at least one of these files."""

SHORTEST = 2
"""A text needs at least one token to read and one token to predict."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs on which all models run.

    Attributes:
        feeds: for each text, the arguments of the model's `forward`; tensors on the CPU.
        source: a phrase that names the source of the inputs.
        tokens: the number of tokens in all texts; 0 for pixels.
        drawn: whether the tokens are random ids.
    """

    feeds: tuple[Mapping[str, Any], ...]
    source: str
    tokens: int
    drawn: bool = False


def texts_of(data: str | PathLike[str]) -> list[str] | None:
    """Return the texts of a file, or None for the built-in texts.

    Args:
        data: `builtin`, a file with one text per line, or a JSON Lines file with a field `text`.

    Raises:
        UsageError: the file contains no text.
        Malformed: a line of a `.jsonl` file is not JSON, or lacks the field `text`.
        StorageError: the file cannot be read.
    """
    if fspath(data) == BUILTIN:
        return None
    path = located(data)
    try:
        lines = read_input(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Malformed(f"the file is not UTF-8 ({error})", path=path, cure="Save it as UTF-8") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        cure = "Write one text per line, or JSON Lines with a field text"
        raise UsageError("the file contains no texts", path=path, cure=cure)
    return [_text(line, path, at) for at, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines


def _text(line: str, path: Path, at: int) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the line is not JSON ({error})", path=path, where=f"line {at}", cure=_JSONL) from None
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise Malformed("the line has no field text", path=path, where=f"line {at}", cure=_JSONL)
    return text


_JSONL = 'Write {"text": "..."} on each line, or name the file .txt for plain lines'


def inputs_for(
    model: Any, folder: Path, texts: Sequence[str] | None, *, count: int, length: int, seed: int,
    option: str = "--data (data=)",
) -> Inputs:  # fmt: skip
    """Return inputs for a model.

    Args:
        model: the model, loaded by transformers.
        folder: the folder of the model, with or without a tokenizer.
        texts: the texts to use; None for the built-in texts, or for random ids if the folder has no tokenizer.
        count: the number of texts, which are chosen at random.
        length: the maximum number of tokens of each text.
        seed: the seed of all random choices.
        option: the option and the argument that give the texts, for errors.

    Raises:
        UsageError: `texts` is set but the folder has no tokenizer, or all texts have fewer than two tokens.
        Unsupported: the model reads neither tokens nor pixels.
    """
    main = getattr(model, "main_input_name", "input_ids")
    names = inspect.signature(model.forward).parameters
    if main == "pixel_values":
        return _pixels(model, count, seed)
    if main != "input_ids" and "input_ids" not in names:
        cure = "Compare the models yourself, with adapterkit.torch.inject on the base"
        raise Unsupported(f"gate cannot run a model that reads {main}", path=folder, cure=cure)
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    length = min(length, most) if isinstance(most, int) and most > SHORTEST else length
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        cure = "Compare the models yourself, with adapterkit.torch.inject on the base"
        raise Unsupported("the config of the model has no vocab_size", path=folder, cure=cure)
    rows, source = _tokens(folder, texts, count, length, size, seed, option)
    more: dict[str, Any] = {}
    if "pixel_values" in names and getattr(model.config, "vision_config", None) is not None and _is_contrastive(model):
        more["pixel_values"] = _pixels(model, 1, seed).feeds[0]["pixel_values"]
    torch = import_module("torch")
    feeds = []
    for row in rows:
        ids = torch.tensor([row])
        feed = {"input_ids": ids, **more}
        if getattr(model.config, "is_encoder_decoder", False):
            feed["decoder_input_ids"] = ids[:, : max(SHORTEST, ids.shape[1] // 2)]
        feeds.append(feed)
    return Inputs(tuple(feeds), source, sum(map(len, rows)), texts is None and not _has_tokenizer(folder))


def _is_contrastive(model: Any) -> bool:
    """Whether the model compares texts with images, like CLIP, and therefore needs both as inputs."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _tokens(
    folder: Path, texts: Sequence[str] | None, count: int, length: int, size: int, seed: int, option: str
) -> tuple[list[list[int]], str]:
    chosen = random.Random(seed)
    if not _has_tokenizer(folder):
        if texts is not None:
            cure = f"Copy the tokenizer's files there, or give builtin at {option} to use random ids"
            raise UsageError("texts were given, but the folder has no tokenizer", path=folder, cure=cure)
        rows = [[chosen.randrange(size) for _ in range(length)] for _ in range(count)]
        return rows, f"{count} rows of random token ids, as the base has no tokenizer"
    held, source = list(texts or _builtin()), "given texts" if texts is not None else "built-in texts"
    if len(held) > count:
        held = [held[at] for at in sorted(chosen.sample(range(len(held)), count))]
    try:
        AutoTokenizer = import_module("transformers").AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        rows = [list(tokenizer(text)["input_ids"])[:length] for text in held]
    except Exception as error:  # transformers raises many types of errors for damaged or unknown tokenizers.
        why = f"transformers cannot load the tokenizer ({first_line(error)})"
        raise Malformed(why, path=folder, cure="Download the folder again") from None
    rows = [row for row in rows if len(row) >= SHORTEST and max(row) < size]
    if not rows:
        cure = f"Give longer texts at {option}"
        raise UsageError("no text has at least two tokens of the base", path=folder, cure=cure)
    return rows, f"{len(rows)} {source}"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _builtin() -> list[str]:
    lines = (Path(__file__).parent / "texts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _pixels(model: Any, count: int, seed: int) -> Inputs:
    torch = import_module("torch")
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    shape = (1, getattr(config, "num_channels", None) or 3, height, width)
    random_state = torch.Generator().manual_seed(seed)
    feeds = tuple({"pixel_values": torch.randn(shape, generator=random_state)} for _ in range(count))
    return Inputs(feeds, f"{count} random images", 0)
