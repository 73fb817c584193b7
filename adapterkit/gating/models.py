"""Run the models that a gate compares, and measure their outputs.

The models are the base with attached adapters, a merged model, and an ONNX graph. A language model reads the tokens of
short texts; if the base has no tokenizer, it reads random token ids. An image model reads random pixels. The metrics
are the KL divergence, the perplexity, the agreement of greedily generated tokens, and the difference of the hidden
states after each block.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, Unsupported, UsageError, first_line
from ..io.inputs import is_gguf, read_input
from ..io.lazy import as_torch, files_kept_open
from ..io.locations import located
from ..quant import dequantized, is_quantized

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..core.adapter import Adapter
    from ..io.checkpoint import Checkpoint
    from ..torch.handle import Handle

# Create the inputs of a gate: tokens of short texts, random token ids (without a tokenizer), or random pixels.


BUILTIN = "builtin"

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""Every folder with a tokenizer has at least one of these files."""

SHORTEST = 2
"""A text needs at least one token to read and one token to predict."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """The inputs on which all models run.

    Attributes:
        feeds: for each text or image, a map from the argument names of the model's `forward` to tensors on the CPU.
        source: a description of the inputs, such as `8 built-in texts`.
        tokens: the number of tokens in all texts; 0 for images.
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
        Malformed: a line of a `.jsonl` file is not JSON, or is neither a string nor an object with the field `text`; or
            the file is not UTF-8.
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
        cure = 'Write one text per line, or, in a .jsonl file, {"text": "..."} on each line'
        raise UsageError("the file contains no texts", path=path, cure=cure)
    return [_text(line, path, at) for at, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines


def _text(line: str, path: Path, at: int) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the line is not JSON ({error})", path=path, where=f"line {at}", cure=_JSONL) from None
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise Malformed('the line has no field "text"', path=path, where=f"line {at}", cure=_JSONL)
    return text


_JSONL = 'Write {"text": "..."} on each line. If the lines are plain text, rename the file to end in .txt'


def inputs_for(
    model: Any, folder: Path, texts: Sequence[str] | None, *, count: int, length: int, seed: int,
    option: str = "--data (data=)",
) -> ModelInputs:  # fmt: skip
    """Return inputs for a model: tokens of texts, random token ids, or random pixels.

    Args:
        model: the model, loaded by transformers.
        folder: the folder of the model, with or without a tokenizer.
        texts: the texts to use; None for the built-in texts, or for random ids if the folder has no tokenizer.
        count: the number of texts, which are chosen at random.
        length: the maximum number of tokens of each text.
        seed: the seed of all random choices.
        option: the command-line option and the Python argument for the texts, as errors print them.

    Raises:
        UsageError: `texts` is set but the folder has no tokenizer, or no text has at least two tokens of the base's
            vocabulary.
        Unsupported: the model reads neither tokens nor pixels, or its config has no `vocab_size`.
        Malformed: transformers cannot load the tokenizer.
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
    return ModelInputs(tuple(feeds), source, sum(map(len, rows)), texts is None and not _has_tokenizer(folder))


def _is_contrastive(model: Any) -> bool:
    """Whether the model, like CLIP, compares texts with images, and therefore needs both as inputs."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _tokens(
    folder: Path, texts: Sequence[str] | None, count: int, length: int, size: int, seed: int, option: str
) -> tuple[list[list[int]], str]:
    chosen = random.Random(seed)
    if not _has_tokenizer(folder):
        if texts is not None:
            cure = f"Copy the tokenizer's files into the folder, or pass builtin to {option} to use random token ids"
            raise UsageError("texts were given, but the folder has no tokenizer", path=folder, cure=cure)
        rows = [[chosen.randrange(size) for _ in range(length)] for _ in range(count)]
        return rows, f"{count} rows of random token ids, because the base has no tokenizer"
    chosen_texts, source = list(texts or _builtin()), "given texts" if texts is not None else "built-in texts"
    if len(chosen_texts) > count:
        chosen_texts = [chosen_texts[at] for at in sorted(chosen.sample(range(len(chosen_texts)), count))]
    try:
        AutoTokenizer = import_module("transformers").AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        rows = [list(tokenizer(text)["input_ids"])[:length] for text in chosen_texts]
    except Exception as error:  # transformers raises many types of errors for damaged or unknown tokenizers.
        why = f"transformers cannot load the tokenizer ({first_line(error)})"
        raise Malformed(why, path=folder, cure="Download the folder again") from None
    rows = [row for row in rows if len(row) >= SHORTEST and max(row) < size]
    if not rows:
        cure = f"Pass longer texts to {option}, and check that the folder has the base's tokenizer"
        raise UsageError(
            "every text has fewer than two tokens, or has token ids outside the base's vocabulary",
            path=folder,
            cure=cure,
        )
    return rows, f"{len(rows)} {source}"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _builtin() -> list[str]:
    lines = (Path(__file__).parent / "texts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _pixels(model: Any, count: int, seed: int) -> ModelInputs:
    torch = import_module("torch")
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    shape = (1, getattr(config, "num_channels", None) or 3, height, width)
    random_state = torch.Generator().manual_seed(seed)
    feeds = tuple({"pixel_values": torch.randn(shape, generator=random_state)} for _ in range(count))
    return ModelInputs(feeds, f"{count} random images", 0)


# Measure outputs.


PROMPT, PROMPTS = 8, 4
"""The prompts for the comparison of generated text are the first `PROMPT` tokens of the first `PROMPTS` texts."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelOutput:
    """The output of a model for one input.

    Attributes:
        main: the logits, in float64; for a model without logits, the last hidden state. The last axis indexes the
            classes or channels.
        is_logits: whether `main` contains logits of at least two classes.
        states: the hidden states after the embedding and after each block.
    """

    main: Tensor
    is_logits: bool
    states: tuple[Tensor, ...] = ()

    @property
    def finite(self) -> bool:
        return bool(self.main.isfinite().all())


Run = Callable[[Mapping[str, "Tensor"]], ModelOutput]
"""A function that runs a model on one input."""


def run_torch(model: nn.Module, feeds: Mapping[str, Tensor], device: str) -> ModelOutput:
    """Run a transformers model on one input."""
    import torch

    names = inspect.signature(model.forward).parameters
    options = {"output_hidden_states": True, "return_dict": True}
    if "use_cache" in names:
        options["use_cache"] = False
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in names.values())
    options = {name: value for name, value in options.items() if name in names or open_ended}
    with torch.no_grad():
        outputs = model(**{name: value.to(device) for name, value in feeds.items()}, **options)
    states = [outputs.get(name) or () for name in ("encoder_hidden_states", "hidden_states", "decoder_hidden_states")]
    return output_of(outputs, tuple(state for each in states for state in each))


def output_of(outputs: Mapping[str, Any], states: Sequence[Tensor] = ()) -> ModelOutput:
    """Find the logits or the last hidden state in a model's outputs, by the names that transformers uses.

    If no output has such a name, use the first output with a floating-point dtype.
    """
    for name in ("logits", "logits_per_text", "start_logits", "last_hidden_state"):
        output_value = outputs.get(name)
        if output_value is not None:
            return ModelOutput(
                _double(output_value), name != "last_hidden_state" and output_value.shape[-1] > 1, tuple(states)
            )
    first = next(value for value in outputs.values() if hasattr(value, "shape") and value.dtype.is_floating_point)
    return ModelOutput(_double(first), False, tuple(states))


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def divergence(first: ModelOutput, second: ModelOutput) -> float:
    """Return KL(first || second) in nats, summed over positions.

    For hidden states instead of logits, return `|first - second|^2 / |first|^2`, times the number of positions. If the
    shapes differ in more than the last axis, return infinity.
    """
    if first.main.shape[:-1] != second.main.shape[:-1]:
        return math.inf
    a, b = _alike(first.main, second.main)
    if not first.is_logits:
        size = float((first.main**2).sum())
        return float(((a - b) ** 2).sum()) / size * positions(first) if size else 0.0
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum()))


def unit_of(output: ModelOutput) -> str:
    """Return the unit of a divergence per position, such as `nats per token`. It is printed after the number."""
    if not output.is_logits:
        return "times the squared norm of the hidden states"
    return "nats per token" if output.main.ndim == 3 else "nats per input"


def positions(output: ModelOutput) -> int:
    """Return the number of positions in an output, such as its number of tokens.

    This is the product of all sizes of `main` except the last, but at least 1.
    """
    return max(1, output.main.numel() // output.main.shape[-1])


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the last axis of both outputs to the same size, because the vocabularies may have different padding."""
    width = min(first.shape[-1], second.shape[-1])
    return first[..., :width], second[..., :width]


def along(base: ModelOutput, adapted: ModelOutput, other: ModelOutput) -> tuple[float, float]:
    """Return two inner products: `<other - base, adapted - base>` and `<adapted - base, adapted - base>`.

    The first product divided by the second is the factor by which `other` scales the adapters' change. Logits are
    converted to log-probabilities before the products are computed, and the products are weighted by the probabilities
    of `adapted`.
    """
    a, b = _alike(adapted.main, base.main)
    a, c = _alike(a, other.main)
    b = b[..., : a.shape[-1]]
    if adapted.is_logits:
        p = a.softmax(-1)
        a, b, c = (each.log_softmax(-1) for each in (a, b, c))
        asked, there = a - b, c - b
        asked, there = (each - (p * each).sum(-1, keepdim=True) for each in (asked, there))
    else:
        p, asked, there = a.new_ones(()), a - b, c - b
    return float((p * there * asked).sum()), float((p * asked * asked).sum())


def is_causal(run: Run, feeds: Mapping[str, Tensor]) -> bool:
    """Whether a model predicts the next token.

    As a test, change the last input token. Then the logits at all earlier positions must stay the same.
    """
    if set(feeds) != {"input_ids"}:
        return False
    ids = feeds["input_ids"]
    other = ids.clone()
    other[0, -1] = (int(ids[0, -1]) + 1) % max(2, int(ids.max()) + 1)
    first, second = run(feeds), run({"input_ids": other})
    if not first.is_logits or first.main.ndim != 3 or first.main.shape[1] != ids.shape[1]:
        return False
    before, after = first.main[:, :-1], second.main[:, :-1]
    return bool(((before - after).abs() <= 1e-4 * before.abs().max()).all())


def surprise(output: ModelOutput, feeds: Mapping[str, Tensor]) -> tuple[float, int]:
    """Return the sum of -log p(next token) over the text, and the number of predicted tokens."""
    ids = feeds["input_ids"]
    known = output.main.shape[-1]
    log_probs = output.main[0, :-1].log_softmax(-1)
    wanted = ids[0, 1:].clamp(max=known - 1)
    return -float(log_probs.gather(1, wanted[:, None]).sum()), len(wanted)


def greedy(run: Run, feeds: Sequence[Mapping[str, Tensor]], new: int) -> list[list[int]]:
    """Generate `new` tokens greedily for each prompt; see `PROMPT`. Return only the new token ids."""
    import torch

    prompts = [feed["input_ids"][:, :PROMPT] for feed in feeds[:PROMPTS]]
    alike = len({prompt.shape for prompt in prompts}) == 1
    texts: list[list[int]] = []
    # Run prompts of different lengths one by one, because a batch would need padding, which would change the results.
    for ids in [torch.cat(prompts)] if alike else prompts:
        start = ids.shape[1]
        for _ in range(new):
            ids = torch.cat([ids, run({"input_ids": ids}).main[:, -1].argmax(-1)[:, None]], 1)
        texts += ids[:, start:].tolist()
    return texts


def agreement(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Compare generated texts pair by pair. Return the share of tokens before the first difference of each pair."""
    same = total = 0
    for first, second in zip(one, other, strict=True):
        total += len(first)
        same += next((at for at, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))
    return same / total if total else 1.0


@dataclass(slots=True)
class StateSums:
    """Sums of squared norms over all inputs. Each list has one sum for the embedding's output, and one for each block.

    Attributes:
        size: `|adapted|^2`; `adapted` is the hidden state of the base with adapters.
        apart: `|adapted - other|^2`; `other` is the hidden state of the compared model.
        moved: `|adapted - base|^2`; `base` is the hidden state of the base without adapters.
    """

    size: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)

    def add(self, base: ModelOutput, adapted: ModelOutput, other: ModelOutput) -> None:
        for at, (b, a, o) in enumerate(zip(base.states, adapted.states, other.states, strict=False)):
            if at == len(self.size):
                for sums in (self.size, self.apart, self.moved):
                    sums.append(0.0)
            if a.shape != o.shape:
                return
            a, b, o = a.double(), b.double(), o.double()
            self.size[at] += float((a * a).sum())
            self.apart[at] += float(((a - o) ** 2).sum())
            self.moved[at] += float(((a - b) ** 2).sum())


def device_of(name: str) -> str:
    """Return the torch device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: the name is none of these, or this machine has no such device.
    """
    import torch

    cure = "Pass --device cpu or --device auto (device=)"
    if not re.fullmatch(r"auto|cpu|cuda|cuda:\d{1,4}", name):
        raise UsageError(f"{name!r} is not auto, cpu, cuda or cuda:N", where="device", cure=cure)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch finds no CUDA device for {name}", where="device", cure=cure)
    return name


def load(
    checkpoint: Checkpoint, dtype: str, device: str, lacking: list[str] | None = None, like: Checkpoint | None = None
) -> Any:
    """Load a model folder or a GGUF model with transformers. Quantized weights are dequantized.

    Args:
        checkpoint: the folder, or the GGUF file.
        dtype: the name of the torch dtype of the weights.
        device: the device of the model.
        lacking: a list to which the function adds the names of weights that the model has but the files lack.
        like: for a GGUF model, the folder whose config.json describes the model; otherwise unused.

    Raises:
        Malformed, Unsupported: see `torch.pretrained.load_pretrained`, and `quant.dequantized`.
        UsageError: the checkpoint is a single weight file, or it is a GGUF model and `like` is None.
    """
    from ..torch.pretrained import load_pretrained

    source = checkpoint.root
    if is_gguf_model(checkpoint):
        if like is None:
            cure = "As BASE, pass the folder that was converted to GGUF; pass the GGUF model with --merged (merged=)"
            raise UsageError("a GGUF model cannot run without a config.json", path=checkpoint.root, cure=cure)
        source = like.root
    elif checkpoint.folder != checkpoint.root:
        cure = f"Pass the folder {checkpoint.folder}, which must contain config.json"
        raise UsageError("gate needs the folder of a model, not a single weight file", path=checkpoint.root, cure=cure)
    state = None
    if source is not checkpoint.root or is_quantized(checkpoint):
        with files_kept_open():
            state = {name: as_torch(tensor) for name, tensor in dequantized(checkpoint).tensors.items()}
    return load_pretrained(source, dtype, state, lacking).to(device)


def is_gguf_model(checkpoint: Checkpoint) -> bool:
    """Whether all files of a checkpoint are GGUF files."""
    return bool(checkpoint.files) and all(is_gguf(file) for file in checkpoint.files)


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that stores the most elements; for a quantized checkpoint, return `quantized`."""
    if is_quantized(checkpoint):
        return "quantized"
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        size = 1
        for axis in tensor.shape:
            size *= axis
        sizes[tensor.dtype.name] += size
    return sizes.most_common(1)[0][0]


class Adapted:
    """A base with attached adapters and, if `add_null` was called, a null adapter, which makes random changes.

    The adapters and the null adapter are never active at the same time.
    """

    def __init__(self, model: Any, adapters: Sequence[Adapter], weights: Sequence[float], **options: Any) -> None:
        self.model, self.device = model, str(next(model.parameters()).device)
        self.weights, self.options = weights, options
        self.handles: list[Handle] = []
        self.null: Handle | None = None
        for at, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
            self.handles.append(self._inject(adapter, f"adapter{at}", weight))

    def _inject(self, adapter: Adapter, name: str, weight: float) -> Handle:
        from ..torch.inject import inject

        loaded = adapter.load(self.device)
        return inject(self.model, loaded, name=name, weight=weight, **self.options)

    def add_null(self, null: Adapter) -> None:
        """Attach the null adapter, but leave it inactive."""
        self.null = self._inject(null, "null", 1.0)
        self.null.set_active(False)

    def drop_null(self) -> None:
        """Remove the null adapter."""
        if self.null is not None:
            self.null.remove()
            self.null = None

    @contextmanager
    def as_(self, state: str) -> Iterator[None]:
        """Inside the `with` block, activate the adapters, the null adapter, or neither.

        The adapters are active if `state` is `adapted`. The null adapter is active if `state` is `null`.
        """
        for handle in self.handles:
            handle.set_active(state == "adapted")
        if self.null is not None:
            self.null.set_active(state == "null")
        try:
            yield
        finally:
            for handle in self.handles:
                handle.set_active(True)
            if self.null is not None:
                self.null.set_active(False)

    def run(self, feeds: Mapping[str, Tensor], state: str) -> ModelOutput:
        """Run the model on one input. For the values of `state`, see `as_`."""
        with self.as_(state):
            return run_torch(self.model, feeds, self.device)

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Inside the block, multiply the change of the adapters by a factor."""
        for handle, weight in zip(self.handles, self.weights, strict=True):
            handle.weight = factor * weight
        try:
            yield
        finally:
            for handle, weight in zip(self.handles, self.weights, strict=True):
                handle.weight = weight


class Graph:
    """An ONNX graph in onnxruntime. If the graph has slots, they are filled with the adapters."""

    def __init__(self, path: Path, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        from ..onnx.session import Session

        self.path = path
        self.session = Session(path)
        self.chosen: dict[str, float] | None = None
        if self.session.slots:
            self.chosen = {}
            for at, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
                self.session.load(f"adapter{at}", adapter)
                self.chosen[f"adapter{at}"] = weight

    def run(self, feeds: Mapping[str, Tensor]) -> ModelOutput:
        """Run the graph on one input.

        Raises:
            Unsupported: the graph outputs neither logits nor hidden states.
            UsageError, ShapeMismatch: the graph needs inputs with other names, dtypes or shapes.
        """
        import numpy as np
        import torch

        given = {name: value.numpy() for name, value in feeds.items() if name in self.session.inputs}
        ids = feeds.get("input_ids")
        if ids is not None:
            shape = tuple(ids.shape)
            usual = {
                "attention_mask": np.ones(shape, np.int64), "token_type_ids": np.zeros(shape, np.int64),
                "position_ids": np.arange(shape[1], dtype=np.int64)[None].repeat(shape[0], 0),
            }  # fmt: skip
            given |= {name: value for name, value in usual.items() if name in self.session.inputs}
        names = [name for name in ("logits", "last_hidden_state", "start_logits") if name in self.session.outputs]
        if not names:
            cure = "Rename the graph's output to logits or last_hidden_state, as in graphs from adapterkit export"
            raise Unsupported("the graph outputs neither logits nor hidden states", path=self.path, cure=cure)
        outputs = self.session.run(given, self.chosen, names[:1])
        return output_of({name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in outputs.items()})
