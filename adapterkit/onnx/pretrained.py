"""Export of a transformers folder: its model as a graph, beside the config and the tokenizer that it is used with.

A causal language model gets its past keys and values as inputs and outputs, named as Optimum and onnxruntime-genai
name them; an encoder or classifier its tokens and its attention mask. Sizes of batch and sequence are open.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError, Malformed, StorageError, Unsupported, UsageError, nearest, storage_error
from ..tensors.locations import located
from .exporting import export
from .injecting import Report
from .tracing import quiet

if TYPE_CHECKING:
    from .exporting import Adapters

DTYPES = ("float32", "float16", "bfloat16")

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
)  # fmt: skip
"""Files that come along: what a tokenizer and a config are made of."""

WRAPPED = "model"


@dataclass(frozen=True, slots=True)
class Words:
    """How a model is called.

    Attributes:
        module: a module that takes positional tensors and returns tensors.
        examples: arguments of several sizes; the first are traced with.
        inputs: names of the inputs, flattened.
        outputs: names of the outputs.
        shapes: names of the open sizes, in the arguments' own structure.
    """

    module: Any
    examples: tuple[tuple[Any, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[Any, ...]


def export_pretrained(
    model: str | PathLike[str], out: str | PathLike[str], *, adapter: Adapters = None, mode: str = "merged",
    dtype: str = "float32", opset: int | None = None, check: bool = True, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Writes a folder with `model.onnx`, its adapters as slots take them, config and tokenizer.

    Args:
        model: a folder as transformers saves it; nothing is fetched and no code of it is run.
        out: the folder to write; appears whole, by rename.
        adapter: see `export`.
        mode: see `export`.
        dtype: what the graph computes in.
        opset: the operator set; torch's own choice when not given.
        check: run the result with onnxruntime against the torch model.
        overwrite: replace a folder that an export wrote.

    Raises:
        UsageError: the call makes no sense, or transformers is not installed.
        StorageError: `out` is taken, or cannot be written.
        Malformed: transformers cannot load the folder.
        Unsupported: a kind of model that this does not know.
        And what `export` raises; `out` is left as it was.
    """
    source, target = located(model), Path(out)
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", cure=f"Known: {', '.join(DTYPES)}")
    if find_spec("transformers") is None:
        cure = "pip install 'adapterkit[transformers]'"
        raise UsageError("exporting a folder needs transformers, which is not installed", path=source, cure=cure)
    _check_places(source, target, overwrite)
    torch_model = _loaded(source, dtype)
    words = _words(torch_model, source)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise storage_error(error, target) from error
    try:
        report = export(
            words.module, words.examples[0], scratch / "model.onnx", adapter=adapter, mode=mode,
            input_names=words.inputs, output_names=words.outputs, dynamic_shapes=words.shapes, opset=opset,
            inside=WRAPPED, also=words.examples[1:], check=check,
        )  # fmt: skip
        carried = _carried(source, scratch)
        _published(scratch, target)
    except AdapterkitError as error:  # The folder of this name will be gone.
        error.path = error.path and error.path.replace(str(scratch), str(target))
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    files = tuple(target / file.name for file in (*report.files, *carried))
    return replace(report, out=target / "model.onnx", files=files)


def _check_places(source: Path, target: Path, overwrite: bool) -> None:
    if not (source / "config.json").is_file():
        why = "no folder of a transformers model: it has no config.json"
        raise Malformed(why, path=source, cure="Name a folder that save_pretrained wrote, or a snapshot of a hub's")
    if not target.absolute().parent.is_dir():
        raise StorageError("no such folder", path=target.absolute().parent, cure="Make the folder first")
    if target.exists() and target.is_dir() and source.samefile(target):
        raise UsageError("the output is the model's own folder", path=target, cure="Write another folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise StorageError("already there", path=target, cure="Write to another path, or pass --overwrite")
    if not (target / "model.onnx").is_file():
        raise StorageError("not a folder that an export wrote", path=target, cure="Remove it yourself, or write beside")


def _loaded(source: Path, dtype: str) -> Any:
    transformers, torch = import_module("transformers"), import_module("torch")
    try:
        config = json.loads((source / "config.json").read_text("utf-8"))
        names = config.get("architectures") or ["AutoModel"]
        name = names[0]
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise Malformed(f"its config.json cannot be read ({error})", path=source, cure="Fetch it again") from None
    if not isinstance(name, str) or not (name == "AutoModel" or name.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))):
        raise Malformed(f"architectures names {name!r}", path=source / "config.json", cure="Fetch it again")
    built = getattr(transformers, name, None)
    if built is None or not hasattr(built, "from_pretrained"):
        known = nearest(name, [word for word in dir(transformers) if "For" in word or word.endswith("Model")])
        cure = known or "Install a newer transformers, or export the torch model by adapterkit.onnx.export"
        raise Unsupported(f"this transformers has no {name}", path=source, cure=cure)
    try:
        with quiet(), _without_bars():
            model = built.from_pretrained(str(source), dtype=getattr(torch, dtype), local_files_only=True)
    except Exception as error:  # transformers raises whatever the damage leads to.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Malformed(f"transformers cannot load it ({first})", path=source, cure="Fetch the folder again") from error
    return model.eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """The library shows nothing; only commands do."""
    bars = import_module("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _words(model: Any, source: Path) -> Words:
    if getattr(model.config, "is_encoder_decoder", False):
        cure = "Export its encoder and decoder by adapterkit.onnx.export"
        raise Unsupported("a model of encoder and decoder", path=source, cure=cure)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        cure = "Export the torch model by adapterkit.onnx.export"
        raise Unsupported(f"a {type(model).__name__} reads no tokens", path=source, cure=cure)
    names = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    flat = {word for name in names for word in ([name] if isinstance(name, str) else name)}
    return _causal(model, source) if type(model).__name__ in flat else _encoder(model)


def _encoder(model: Any) -> Words:
    import torch
    from torch import nn

    asked = inspect.signature(model.forward).parameters
    kinds = getattr(model.config, "type_vocab_size", None) or 0
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in asked and kinds > 1 else [])]

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: Any) -> Any:
            told = self.model(**dict(zip(inputs, given, strict=True)), return_dict=True)
            return [told[name] for name in outputs]

    def example(batch: int, length: int) -> tuple[Any, ...]:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, length - 1 :] = 0 if batch > 1 else 1
        kind = torch.zeros_like(mask)
        kind[:, length // 2 :] = 1
        return (_tokens(model, batch, length), mask, kind)[: len(inputs)]

    with torch.no_grad(), quiet():
        told = model(**dict(zip(inputs, example(1, 2), strict=True)), return_dict=True)
    outputs = [name for name in ("logits", "last_hidden_state", "pooler_output", "start_logits", "end_logits")
               if isinstance(told.get(name), torch.Tensor)]  # fmt: skip
    shapes = tuple({0: "batch", 1: "sequence"} for _ in inputs)
    examples = (example(2, 5), example(1, 3))
    return Words(Encoder().eval(), examples, tuple(inputs), tuple(outputs), (shapes,))


def _causal(model: Any, source: Path) -> Words:
    import torch
    from torch import nn

    transformers = import_module("transformers")
    asked = inspect.signature(model.forward).parameters
    word = "past_key_values" if "cache" not in asked else "cache"
    told = ["input_ids", "attention_mask", *(["position_ids"] if "position_ids" in asked else [])]

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Any, mask: Any, *rest: Any) -> Any:
            cache = transformers.DynamicCache(rest[-1])
            given = dict(zip(told, (tokens, mask, *rest[:-1]), strict=True))
            logits = self.model(**given, **{word: cache}, use_cache=True, return_dict=True).logits
            return logits, _pairs(cache)

    sizes = _past_sizes(model, word, source)
    kind = next(model.parameters()).dtype
    rng = torch.Generator().manual_seed(0)

    def example(batch: int, length: int, past: int) -> tuple[Any, ...]:
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        mask[0, : int(batch > 1 and past > 0)] = 0
        positions = torch.arange(past, past + length)[None].repeat(batch, 1)
        held = [
            tuple(torch.randn(batch, heads, past, width, generator=rng).to(kind) for heads, width in pair)
            for pair in sizes
        ]
        return (_tokens(model, batch, length), mask, *([positions] if "position_ids" in told else []), held)

    axes = {"input_ids": "sequence", "attention_mask": "total", "position_ids": "sequence"}
    layers = [f"{at}.{part}" for at in range(len(sizes)) for part in ("key", "value")]
    past_shapes = [({0: "batch", 2: "past"},) * 2 for _ in sizes]
    return Words(
        Decoder().eval(),
        (example(2, 3, 5), example(1, 4, 0), example(1, 1, 4)),
        (*told, *(f"past_key_values.{layer}" for layer in layers)),
        ("logits", *(f"present.{layer}" for layer in layers)),
        (*({0: "batch", 1: axes[name]} for name in told[:2]),
         (*({0: "batch", 1: axes[name]} for name in told[2:]), past_shapes)),
    )  # fmt: skip


def _tokens(model: Any, batch: int, length: int) -> Any:
    import torch

    most = int(getattr(model.config.get_text_config(), "vocab_size", 2))
    return torch.randint(0, most, (batch, length), generator=torch.Generator().manual_seed(length))


def _pairs(cache: Any) -> list[tuple[Any, Any]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _past_sizes(model: Any, word: str, source: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and width of each layer's keys and values, by running the model once."""
    import torch

    cache = import_module("transformers").DynamicCache()
    try:
        with torch.no_grad(), quiet():
            model(input_ids=_tokens(model, 1, 2), **{word: cache}, use_cache=True)
        pairs = _pairs(cache)
        sizes = [((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in pairs]
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        why = f"a {type(model).__name__} whose past is not keys and values of each layer ({error})"
        raise Unsupported(why, path=source, cure="Export the torch model by adapterkit.onnx.export") from None
    if not sizes:
        why = f"a {type(model).__name__} that keeps no keys and values"
        raise Unsupported(why, path=source, cure="Export the torch model by adapterkit.onnx.export")
    return sizes


def _carried(source: Path, out: Path) -> list[Path]:
    """Config and tokenizer; a link that leads out of the model's folder, and of its repository's cache, is refused."""
    home = source.resolve()
    root = home.parent.parent if home.parent.name == "snapshots" else home
    copied = []
    for name in CARRIED:
        file = source / name
        if not file.is_file():
            continue
        if not file.resolve().is_relative_to(root):
            raise Malformed("a link out of the model's folder", path=file, cure="Do not use this folder")
        try:
            shutil.copyfile(file, out / name)
        except OSError as error:
            raise storage_error(error, file) from error
        copied.append(out / name)
    return copied


def _published(scratch: Path, target: Path) -> None:
    """The finished folder under its name; one that is there is gone only after."""
    try:
        scratch.chmod(0o777 & ~_umask())
        if not target.exists():
            scratch.rename(target)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        target.rename(old / "old")
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise storage_error(error, target) from error


def _umask() -> int:
    held = os.umask(0)
    os.umask(held)
    return held
