"""Export a transformers folder: its model as a graph, with its config and tokenizer beside it.

A causal language model gets its past keys and values as inputs and outputs, named like Optimum and onnxruntime-genai
name them. An encoder or classifier gets tokens and an attention mask. Sizes of batch and sequence are open.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    AdapterkitError,
    Malformed,
    StorageError,
    Unsupported,
    UsageError,
    first_line,
    nearest,
    storage_error,
)
from ..io.inputs import read_input
from ..io.locations import located, path_text
from ..naming.binding.bases import check_base
from .calling import INSIDE, words_of
from .exporting import export, files_of_adapters, read_adapters
from .folders import CARRIED, check_folder, moved, published
from .injecting import Report
from .tracing import quiet

if TYPE_CHECKING:
    from .exporting import Adapters

DTYPES = ("float32", "float16", "bfloat16")


def export_pretrained(
    model: str | PathLike[str], out: str | PathLike[str], *, adapter: Adapters = None, mode: str = "merged",
    dtype: str = "float32", opset: int | None = None, quantize: str | None = None, share_weights: bool = False,
    check: bool = True, overwrite: bool = False, made_from: str | None = None, rename: str | Sequence[str] = (),
    strict_base: bool = False,
) -> Report:  # fmt: skip
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
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", cure=f"Known: {', '.join(DTYPES)}")
    if find_spec("transformers") is None:
        cure = "pip install 'adapterkit[transformers]'"
        raise UsageError("exporting a folder needs transformers, which is not installed", path=source, cure=cure)
    if not (source / "config.json").is_file():
        why = "no folder of a transformers model: it has no config.json"
        raise Malformed(why, path=source, cure="Name a folder that save_pretrained wrote, or a snapshot of a hub's")
    _check_sharing(source, target, share_weights)
    if not share_weights:
        check_folder(target, overwrite)
    if strict_base:
        check_base([*read_adapters(adapter).items()], source, strict=True)
    torch_model = _loaded(source, dtype)
    words = words_of(torch_model, source)

    def written(folder: Path) -> Report:
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


def _loaded(source: Path, dtype: str) -> Any:
    transformers, torch = import_module("transformers"), import_module("torch")
    try:
        config = json.loads(read_input(source / "config.json").decode("utf-8"))
        names = config.get("architectures") or ["AutoModel"]
        name = names[0]
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise Malformed(f"its config.json cannot be read ({error})", path=source, cure="Fetch it again") from None
    # Only class names pass: a name from the file must not reach another attribute of the library.
    if not isinstance(name, str) or not (name == "AutoModel" or name.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))):
        raise Malformed(f"architectures names {name!r}", path=source / "config.json", cure="Fetch it again")
    built = getattr(transformers, name, None)
    if built is None or not hasattr(built, "from_pretrained"):
        known = nearest(name, [word for word in dir(transformers) if "For" in word or word.endswith("Model")])
        cure = known or "Install a newer transformers, or export the torch model by adapterkit.onnx.export"
        raise Unsupported(f"this transformers has no {name}", path=source, cure=cure)
    if (source / "adapter_config.json").exists():
        # transformers would load the base that this file names, whatever it is, instead of this folder.
        cure = "Name the folder of the base as MODEL, and this one by --adapter (adapter=)"
        raise Unsupported("the folder holds an adapter", path=source / "adapter_config.json", cure=cure)
    known_only = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(), _without_bars():
            kind = getattr(built, "config_class", None) or transformers.AutoConfig
            config = kind.from_pretrained(str(source), **known_only)
            _check_no_kernel(config, source)
            model = built.from_pretrained(str(source), config=config, dtype=getattr(torch, dtype), **known_only)
    except AdapterkitError:
        raise
    except Exception as error:  # transformers raises many types of errors for damaged folders.
        first = first_line(error)
        if "trust_remote_code" in str(error):
            raise Unsupported("the model brings its own code, which is not run", path=source, cure=_OWN_CODE) from None
        raise Malformed(f"transformers cannot load it ({first})", path=source, cure="Fetch the folder again") from error
    return model.eval()


KERNELS_OF_TORCH = {None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"}
"""Implementations of attention and experts that are part of transformers and torch."""


def _check_no_kernel(config: Any, source: Path) -> None:
    """Check that a config, with all configs inside it, names no kernel that transformers would download and run.

    transformers downloads `org/kernel`, and also names such as `flash_attention_2` if that package is not installed;
    `local_files_only` has no effect there. The loaded config object is checked instead of config.json, which can refer
    to another file (`configuration_files`).

    Raises:
        Unsupported: it names one.
    """
    held = config if isinstance(config, dict) else vars(config)
    for key, value in held.items():
        if str(key).removesuffix("_internal").endswith("_implementation"):
            for name in value.values() if isinstance(value, dict) else (value,):
                if name not in KERNELS_OF_TORCH:
                    field = str(key).removesuffix("_internal").removeprefix("_")
                    cure = f'Set {field} to "eager" in config.json, or leave it out'
                    why = f"{field} {name!r} is a kernel that would be downloaded and run, which is refused"
                    raise Unsupported(why, path=source / "config.json", cure=cure)
        elif isinstance(value, dict) or type(value).__name__.endswith("Config"):
            _check_no_kernel(value, source)


_OWN_CODE = (
    "If you trust it, write a function that loads the model and returns it with example inputs, and name that by "
    "--model MODULE:FUNCTION (adapterkit.onnx.export_factory)"
)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bars: the library shows nothing, only commands do."""
    bars = import_module("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _carried(source: Path, out: Path) -> list[Path]:
    """Copy config and tokenizer; refuse a link that leaves the model's folder and its repository's cache."""
    home = source.resolve()
    root = home.parent.parent if home.parent.name == "snapshots" else home
    # In huggingface_hub's cache, files of a snapshot are links into `blobs`, two levels above the snapshot.
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
