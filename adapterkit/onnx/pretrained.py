"""Export a transformers folder or a module of the user's own: the graph, with config and tokenizer beside it."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import (
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    StorageError,
    Unsupported,
    UsageError,
    storage_error,
)
from ..io.checkpoint import opened as opened_base
from ..io.lazy import as_torch, dtype_named
from ..io.locations import located, path_text
from ..io.stages import steps
from ..naming.binding.bases import check_base
from ..torch.pretrained import check_transformers, load_pretrained
from .exporting import CARRIED, check_folder, export, files_of_adapters, moved, published, read_adapters, steps_of
from .report import GraphReport
from .tracing import quiet

if TYPE_CHECKING:
    from .exporting import Adapters


INSIDE = "model"
"""Name of the attribute that holds the model inside the wrapper modules of this file."""


@dataclass(frozen=True, slots=True)
class ExportWords:
    """A model's call.

    Attributes:
        module: a wrapper that takes positional tensors and returns tensors.
        examples: example arguments of several sizes; the first one is traced.
        inputs: names of the inputs, flattened.
        outputs: names of the outputs.
        shapes: names of the open sizes, in the structure of the arguments.
    """

    module: Any
    examples: tuple[tuple[Any, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[Any, ...]


def words_of(model: Any, source: Path) -> ExportWords:
    """Return how a model is called, judging by its class and its forward's signature.

    Args:
        model: a transformers model in evaluation mode.
        source: its folder, for errors.

    Raises:
        Unsupported: an unknown kind of model.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        cure = "Export its encoder and decoder by adapterkit.onnx.export"
        raise Unsupported("a model of encoder and decoder", path=source, cure=cure)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        cure = "Export the torch model by adapterkit.onnx.export"
        raise Unsupported(f"a {type(model).__name__} reads no tokens", path=source, cure=cure)
    names = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    flat = {word for name in names for word in ([name] if isinstance(name, str) else name)}
    return _causal(model, source) if type(model).__name__ in flat else _encoder(model)


def _encoder(model: Any) -> ExportWords:
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
        # Hide a position, so that the check covers padding.
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
    return ExportWords(Encoder().eval(), examples, tuple(inputs), tuple(outputs), (shapes,))


def _causal(model: Any, source: Path) -> ExportWords:
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
        # Hide a position of the past, so that the check covers left padding.
        mask[0, : int(batch > 1 and past > 0)] = 0
        positions = torch.arange(past, past + length)[None].repeat(batch, 1)
        # The past is random instead of zero, so that outputs depend on it.
        held = [
            tuple(torch.randn(batch, heads, past, width, generator=rng).to(kind) for heads, width in pair)
            for pair in sizes
        ]
        return (_tokens(model, batch, length), mask, *([positions] if "position_ids" in told else []), held)

    axes = {"input_ids": "sequence", "attention_mask": "total", "position_ids": "sequence"}
    layers = [f"{at}.{part}" for at in range(len(sizes)) for part in ("key", "value")]
    past_shapes = [({0: "batch", 2: "past"},) * 2 for _ in sizes]
    return ExportWords(
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
    """Return heads and head size of each layer's keys and values, by running the model once."""
    # Configs name these sizes differently per architecture, so they are read off a real cache.
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


# Export a torch module that a user's function returns, together with example inputs.


OWN = frozenset({"kwargs", "input_names", "output_names", "dynamic_shapes", "opset", "inside", "also"})
"""Arguments of `export` that the function may return with its module; the caller's `opset` takes precedence."""


def export_factory(
    factory: str, out: str | PathLike[str], *, weights: str | PathLike[str] | None = None, overwrite: bool = False,
    **options: object,
) -> GraphReport:  # fmt: skip
    """Write a folder with `model.onnx` and adapter files for its slots, from the module that a function returns.

    Args:
        factory: `module:function`, imported as Python does, with the working folder first. The function takes no
            arguments. It returns `(torch module, example arguments)`, and optionally a dictionary of further arguments
            of `export` (those in `OWN`, which say how the module is called).
        out: the folder to write; it appears complete, by a rename.
        weights: a file or folder of weights to load into the module; it must have all parameters and buffers.
        overwrite: replace a folder that an export wrote.
        options: further arguments of `export`; those that are None are left to the function.

    Raises:
        UsageError: there is no such function, or it returns something else.
        ShapeMismatch: the weights do not fit the module.
        And what `export` raises; `out` is left unchanged.
    """
    target = Path(path_text(out))
    check_folder(target, overwrite)
    module, args, more = _made(factory)
    if weights is not None:
        _load(module, weights)
    told = {name: value for name, value in options.items() if value is not None}
    with published(target, files_of_adapters(cast("Any", options.get("adapter")))) as scratch:
        report = export(module.eval(), args, scratch / "model.onnx", **{**more, **told})
    return moved(report, target)


def _made(factory: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from torch import nn

    module, colon, name = factory.partition(":")
    if not (module and colon and name):
        raise UsageError(f"{factory!r} names no function", where="model", cure="Write module:function")
    # For a console command, Python puts the command's folder on the path, not the working folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(import_module(module), name)()
    except AdapterkitError:
        raise
    except Exception as error:  # The user's code may raise anything.
        why = f"{factory} cannot be called ({type(error).__name__}: {error})"
        raise UsageError(why, where="model", cure="Name a function that takes no arguments") from error
    found: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    if len(found) not in (2, 3) or not isinstance(found[0], nn.Module) or not isinstance(found[1], tuple | list):
        cure = "Return (torch module, example arguments), or these and a dictionary of arguments of export"
        raise UsageError(f"{factory} returns something else", where="model", cure=cure)
    more = dict(found[2]) if len(found) == 3 else {}
    if foreign := sorted(more.keys() - OWN, key=str):
        cure = f"Leave it out; a function may return: {', '.join(sorted(OWN))}"
        raise UsageError(
            f"{factory} returns the argument {foreign[0]}, which only the caller may set", where="model", cure=cure
        )
    return found[0], tuple(found[1]), more


def _load(module: Any, weights: str | PathLike[str]) -> None:
    held = {name: as_torch(leaf) for name, leaf in opened_base(weights).tensors.items()}
    try:
        module.load_state_dict(held, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise ShapeMismatch(first[:300], path=weights, cure="Name weights of this very module") from None


# Export a transformers folder: its model as a graph, with its config and tokenizer beside it.
#
# A causal language model gets its past keys and values as inputs and outputs, named like Optimum and onnxruntime-genai
# name them. An encoder or classifier gets tokens and an attention mask. Sizes of batch and sequence are open.


DTYPES = ("float32", "float16", "bfloat16")


def export_pretrained(
    model: str | PathLike[str], out: str | PathLike[str], *, adapter: Adapters = None, mode: str = "merged",
    dtype: str = "float32", opset: int | None = None, quantize: str | None = None, share_weights: bool = False,
    check: bool = True, overwrite: bool = False, made_from: str | None = None, rename: str | Sequence[str] = (),
    strict_base: bool = False,
) -> GraphReport:  # fmt: skip
    """Write a folder with `model.onnx`, adapter files for its slots, config and tokenizer.

    Args:
        model: a folder as transformers saves it; nothing is downloaded and no code of it is run.
        out: the folder to write; it appears complete, by a rename.
        adapter: see `export`.
        mode: see `export`.
        dtype: the dtype that the graph computes in.
        opset: the opset version; torch's default if not given.
        quantize: see `export`.
        share_weights: `out` is the model's own folder, and the graph refers to its safetensors files instead of a
            second copy of them; 16-bit weights are cast if the graph computes in 32 bits.
        check: run the result in onnxruntime and compare it with the torch model.
        overwrite: replace a folder that an export wrote.
        made_from: a digest of everything that decides the output, stored with it for a later run.
        rename: see `export`.
        strict_base: refuse a model whose name, config or fingerprint differs from the one that an adapter names.

    Raises:
        CheckFailed: `strict_base` is set and the model is not the one that an adapter names.
        UsageError: an argument is invalid, or transformers is not installed.
        StorageError: `out` exists, or cannot be written.
        Malformed: transformers cannot load the folder.
        Unsupported: the kind of model is unknown, the model brings its own code, or it names a kernel to download.
        And what `export` raises; `out` is left unchanged.
    """
    source, target = located(model), Path(path_text(out))
    given, kind = dtype, dtype_named(dtype)
    dtype = dtype if kind is None else kind.torch
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {given!r}", where="dtype", cure=f"Known: {', '.join(DTYPES)}")
    check_transformers(source, "exporting a folder")
    _check_sharing(source, target, share_weights)
    if not share_weights:
        check_folder(target, overwrite)
    if strict_base:
        check_base([*read_adapters(adapter).items()], source, strict=True)
    # A folder that is refused for its links is refused before minutes of tracing, and not only when they are copied.
    if not share_weights:
        _to_carry(source)
    with steps(1 + steps_of(mode, quantize, check)):
        with quiet():
            torch_model = load_pretrained(source, dtype)
        words = words_of(torch_model, source)

        def written(folder: Path) -> GraphReport:
            return export(
                words.module, words.examples[0], folder / "model.onnx", adapter=adapter, mode=mode,
                input_names=words.inputs, output_names=words.outputs, dynamic_shapes=words.shapes, opset=opset,
                inside=INSIDE, also=words.examples[1:], quantize=quantize, share=source if share_weights else None,
                check=check, rename=rename,
            )  # fmt: skip

        if share_weights:
            return written(target)
        with published(target, files_of_adapters(adapter), made_from) as scratch:
            report = written(scratch)
            carried = _carried(source, scratch)
    return moved(report, target, carried)


def _check_sharing(source: Path, target: Path, share_weights: bool) -> None:
    own = target.is_dir() and source.samefile(target)
    if own and not share_weights:
        cure = "Write another folder, or share its weights (share_weights=True, --share-weights)"
        raise UsageError("the output is the model's own folder", path=target, cure=cure)
    if share_weights and not own:
        why = "a graph that shares the model's weights lies in the model's own folder: runtimes read no file outside"
        raise UsageError(why, path=target, cure=f"Write to {source}")
    if share_weights and (target / "model.onnx").exists():
        raise StorageError("already there", path=target / "model.onnx", cure="Remove it first")


def _carried(source: Path, out: Path) -> list[Path]:
    """Copy config and tokenizer; return the copies."""
    copied = []
    for file in _to_carry(source):
        try:
            shutil.copyfile(file, out / file.name)
        except OSError as error:
            raise storage_error(error, file) from error
        copied.append(out / file.name)
    return copied


def _to_carry(source: Path) -> list[Path]:
    """Return config and tokenizer; refuse a link that leaves the model's folder and its repository's cache."""
    home = source.resolve()
    root = home.parent.parent if home.parent.name == "snapshots" else home
    # In huggingface_hub's cache, files of a snapshot are links into `blobs`, two levels above the snapshot.
    found = [source / name for name in CARRIED if (source / name).is_file()]
    for file in found:
        if not file.resolve().is_relative_to(root):
            raise Malformed("a link out of the model's folder", path=file, cure="Do not use this folder")
    return found
