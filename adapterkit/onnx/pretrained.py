"""Export a saved transformers model with its config and tokenizer, or a torch module that a user's function returns."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..core.arguments import checks_types
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
from ..naming.binding import renamed
from ..naming.binding.fitting import check_base
from ..torch.pretrained import check_transformers, load_pretrained
from .exporting import (
    CARRIED,
    GRAPHS,
    check_folder,
    export,
    files_of_adapters,
    injected,
    moved,
    published,
    read_adapters,
    steps_of,
)
from .folders import joined, left_line
from .genai_config import write_genai_config
from .pretrained_calls import INSIDE, words_of
from .pretrained_parts import parts_of_model
from .report import GraphReport
from .tracing import quiet

if TYPE_CHECKING:
    from torch import nn

    from .exporting import Adapters
    from .pretrained_types import PretrainedModel


# Export a torch module that a user's function returns together with example inputs.


EXPORT_OPTIONS = frozenset({"kwargs", "input_names", "output_names", "dynamic_shapes", "opset", "inside", "also"})
"""The keys that are allowed in the dictionary that the user's function returns. Each key is an argument of `export`. If
the caller of `export_factory` passes the same argument, the caller's value is used."""


@checks_types
def export_factory(
    factory: str, out: str | PathLike[str], *, weights: str | PathLike[str] | None = None, overwrite: bool = False,
    **options: object,
) -> GraphReport:  # fmt: skip
    """Call a function that returns a torch module, and export this module to a folder.

    The folder contains `model.onnx` and, for a graph with slots, the adapter files that fill the slots.

    Args:
        factory: the function's name, as `module:function`. The import also searches the working folder. The function
            takes no arguments. It returns `(torch module, example arguments)`, optionally followed by a dictionary of
            arguments of `export`. The dictionary's keys must be in `EXPORT_OPTIONS`.
        out: the folder to write. The export writes to a temporary folder, and moves the files to `out` at the end.
        weights: a file or folder of weights to load into the module. Its keys must be exactly the keys of the module's
            state dict.
        overwrite: replace a folder that an export wrote.
        options: more arguments of `export`. An option that is not None overrides the argument of the same name in the
            function's dictionary.

    Raises:
        UsageError: the function does not exist, fails, or returns something other than described above.
        ShapeMismatch: the weights do not fit the module.
        Also the errors of `export`. After an error, `out` is unchanged.
    """
    target = Path(path_text(out))
    check_folder(target, overwrite)
    module, args, more = _call_factory(factory)
    if weights is not None:
        state = {name: as_torch(leaf) for name, leaf in opened_base(weights).tensors.items()}
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            first = " ".join(str(error).split())
            raise ShapeMismatch(first[:300], path=weights, cure="Pass the weight file of this module") from None
    words = {name: value for name, value in options.items() if value is not None}
    with published(target, files_of_adapters(cast("Any", options.get("adapter")))) as scratch:
        report = export(module.eval(), args, scratch / "model.onnx", **{**more, **words})
    return moved(report, target)


def _call_factory(factory: str) -> tuple[nn.Module, tuple[object, ...], dict[str, Any]]:
    from torch import nn

    module, colon, name = factory.partition(":")
    if not (module and colon and name):
        raise UsageError(f"{factory!r} does not name a function", where="model", cure="Pass module:function")
    # In a console command, `sys.path` has the command's own folder but not the working folder, so add the latter.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        result = getattr(import_module(module), name)()
    except AdapterkitError:
        raise
    except Exception as error:  # The user's code may raise anything.
        why = f"{factory} cannot be imported or called ({type(error).__name__}: {error})"
        raise UsageError(why, where="model", cure="Pass a function that takes no arguments") from error
    parts: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
    if len(parts) not in (2, 3) or not isinstance(parts[0], nn.Module) or not isinstance(parts[1], tuple | list):
        cure = "Return (torch module, example arguments), optionally followed by a dictionary of arguments of export"
        raise UsageError(f"{factory} does not return a module and its arguments", where="model", cure=cure)
    more = dict(parts[2]) if len(parts) == 3 else {}
    if foreign := sorted(more.keys() - EXPORT_OPTIONS, key=str):
        cure = f"Remove {foreign[0]} from the returned dictionary; allowed are: {', '.join(sorted(EXPORT_OPTIONS))}"
        raise UsageError(
            f"{factory} returns the argument {foreign[0]}, which a function may not set", where="model", cure=cure
        )
    return parts[0], tuple(parts[1]), more


# Export a saved transformers model: write the model as a graph, and copy the config and tokenizer beside the graph.
# The graph of a causal language model has past keys and values as inputs and outputs, with the names that Optimum and
# onnxruntime-genai use. The graph of an encoder or classifier has tokens and an attention mask as inputs. Batch size
# and sequence length are dynamic.


DTYPES = ("float32", "float16", "bfloat16")


@checks_types
def export_pretrained(
    model: str | PathLike[str], out: str | PathLike[str], *, adapter: Adapters = None, mode: str = "merged",
    dtype: str = "float32", opset: int | None = None, quantize: str | None = None, share_weights: bool = False,
    check: bool = True, overwrite: bool = False, made_from: str | None = None, rename: str | Sequence[str] = (),
    strict_base: bool = False,
) -> GraphReport:  # fmt: skip
    """Export a saved transformers model to a folder with `model.onnx`, the config and the tokenizer.

    If the mode is `slots`, the folder also contains the adapter files. For a causal language model that
    onnxruntime-genai can run, the export also writes `genai_config.json`, which onnxruntime-genai needs. If
    `share_weights` is set, the export does not write `genai_config.json`.

    An encoder-decoder is exported as several graphs, for optimum's classes such as `ORTModelForSeq2SeqLM`. A language
    model that reads images is also exported as several graphs, for transformers.js; see `pretrained_parts`. If there
    are several graphs and the mode is `slots`, each adapter gets one `.onnx_adapter` file for each graph that has any
    of the adapter's targets.

    Args:
        model: a folder that transformers saved; nothing is downloaded, and no code in the folder is run.
        out: the folder to write. Without `share_weights`, the export writes to a temporary folder, and moves the files
            to `out` at the end.
        adapter: see `export`.
        mode: see `export`.
        dtype: the dtype in which the graph computes.
        opset: the opset version; torch's default if not given.
        quantize: see `export`.
        share_weights: write to the model's own folder, and let the graph read its weights from the safetensors files
            there instead of storing a copy. If the files store 16-bit weights and `dtype` is `float32`, the graph casts
            the weights to float32.
        check: run the result in onnxruntime and compare it with the torch model.
        overwrite: replace a folder that an export wrote.
        made_from: a digest of everything that determines the output. It is stored with the output, so that a later run
            can detect that the output is up to date.
        rename: see `export`.
        strict_base: raise an error if the model's name, config or fingerprint differs from the base that an adapter
            records.

    Raises:
        CheckFailed: `strict_base` is set, and the model is not the base that an adapter records.
        UsageError: an argument is invalid, or transformers is not installed.
        StorageError: `out` exists and must not be replaced, or `out` cannot be written.
        Malformed: transformers cannot load the folder.
        Unsupported: the model's type is unknown, or the model needs Python code that its folder contains, or it needs a
            kernel that must be downloaded.
        Also the errors of `export`. After an error, `out` is unchanged. There is one exception: if `share_weights` is
        set and the model becomes several graphs, the graphs that were exported before the error stay in `out`.
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
    # Tracing takes minutes, so first refuse links to files outside of the folder.
    if not share_weights:
        _to_carry(source)
    with quiet():
        torch_model = load_pretrained(source, dtype)
        _make_traceable(torch_model)
    as_trained = cast("PretrainedModel", torch_model)
    parts = parts_of_model(as_trained, source)
    words = {} if parts else {"model.onnx": words_of(as_trained, source)}
    options: dict[str, Any] = {
        "adapter": adapter, "mode": mode, "opset": opset, "quantize": quantize, "check": check, "rename": rename,
        "share": source if share_weights else None,
    }  # fmt: skip

    def written(folder: Path) -> dict[str, GraphReport]:
        return {
            name: export(
                each.module, each.examples[0], folder / name, input_names=each.inputs, output_names=each.outputs,
                dynamic_shapes=each.shapes, inside=INSIDE, also=each.examples[1:], allow_partial=bool(parts), **options,
            )
            for name, each in (parts or words).items()
        }  # fmt: skip

    if parts:
        _check_for_parts(adapter, source, torch_model, rename)
    with steps(len(parts or words) * steps_of(mode, quantize, bool(check))):
        if share_weights:
            reports = written(target)
            return _whole(reports, target, target, [], adapter) if parts else reports["model.onnx"]
        with published(target, files_of_adapters(adapter), made_from) as scratch:
            reports = written(scratch)
            carried = _carried(source, scratch)
            if parts:
                return _whole(reports, scratch, target, carried, adapter)
            carried += write_genai_config(as_trained, scratch / "model.onnx", scratch)
    return moved(reports["model.onnx"], target, carried)


def _make_traceable(model: nn.Module) -> None:
    """Make mixtures of experts use batched matmuls.

    The batched implementation selects the weights of each token's experts by index. By default, transformers uses a
    grouped matmul, which torch cannot export.
    """
    choose = getattr(model, "set_experts_implementation", None)  # transformers 4 does not have this method.
    if choose is not None:
        choose("batched_mm")


def _check_for_parts(adapter: Adapters, source: Path, model: nn.Module, rename: str | Sequence[str]) -> None:
    """Check that the model has all targets, and that no adapter has new tokens, prompts or prefixes.

    New tokens, prompts and prefixes are refused because they affect more than one graph.

    Raises:
        Unsupported: an adapter has new tokens, prompts or prefixes.
        TargetNotFound, ShapeMismatch: an adapter does not belong to this model.
    """
    adapters = read_adapters(adapter)
    for one in adapters.values():
        for target, update in one:
            if update.kind == "context":
                why = f"{update.method} cannot be attached in a model of several graphs"
                cure = "Export the model's parts yourself with adapterkit.onnx.export, with the adapter injected"
                raise Unsupported(why, path=source, where=str(target) or "(model)", cure=cure)
    with injected(model, dict(zip(adapters, renamed(list(adapters.values()), rename), strict=True))):
        # `injected` raises an error if the model lacks a target. The exports cannot check this, because each graph has
        # only some of the targets.
        pass


def _whole(
    reports: Mapping[str, GraphReport], scratch: Path, target: Path, carried: Sequence[Path], adapter: Adapters
) -> GraphReport:  # fmt: skip
    """Return one report for all graphs of a model.

    The report warns about targets that no graph has. The graphs lack the layers of these targets, because no output of
    the model depends on these layers.
    """
    adapters = read_adapters(adapter) if any(report.left for report in reports.values()) else {}
    unused = [
        at
        for name, one in adapters.items()
        for at in one.updates
        if all(at in report.left.get(name, ()) for report in reports.values())
    ]
    files = [file for report in reports.values() for file in report.files]
    moved_files = [target / file.name for file in (*files, *carried)]
    return joined(reports, scratch, target, moved_files, left_line(unused, "no output of the model depends on them"))


def _check_sharing(source: Path, target: Path, share_weights: bool) -> None:
    same_folder = target.is_dir() and source.samefile(target)
    if same_folder and not share_weights:
        cure = "Write to another folder, or share the weights: --share-weights (share_weights=True)"
        raise UsageError("the output is the model's own folder", path=target, cure=cure)
    if share_weights and not same_folder:
        why = "shared weights must be in the graph's folder, because runtimes read weight files only from that folder"
        raise UsageError(why, path=target, cure=f"Write to the model's folder: -o {source} (out=)")
    taken = [target / name for name in GRAPHS if (target / name).exists()]
    if share_weights and taken:
        raise StorageError("already there", path=taken[0], cure="Remove it first")


def _carried(source: Path, out: Path) -> list[Path]:
    """Copy the config and tokenizer files to `out`, and return the paths of the copies."""
    copied = []
    for file in _to_carry(source):
        try:
            shutil.copyfile(file, out / file.name)
        except OSError as error:
            raise storage_error(error, file) from error
        copied.append(out / file.name)
    return copied


def _to_carry(source: Path) -> list[Path]:
    """Return the config and tokenizer files, and refuse links to files outside of the model's folder.

    A folder in huggingface_hub's cache may also link to the other cached files of the same repository.
    """
    home = source.resolve()
    root = home.parent.parent if home.parent.name == "snapshots" else home
    # In huggingface_hub's cache, the files in `snapshots/REVISION` are links to files in `blobs`, beside `snapshots`.
    files = [source / name for name in CARRIED if (source / name).is_file()]
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise Malformed("the file links to a file outside of the folder", path=file, cure="Do not use this folder")
    return files
