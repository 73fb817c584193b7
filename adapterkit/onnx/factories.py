"""Export a torch module that a user's function returns, together with example inputs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import AdapterkitError, ShapeMismatch, UsageError
from ..io.checkpoint import opened as opened_base
from ..io.lazy import as_torch
from ..io.locations import path_text
from .exporting import export, files_of_adapters
from .folders import check_folder, moved, published
from .injecting import Report

OWN = frozenset({"kwargs", "input_names", "output_names", "dynamic_shapes", "opset", "inside", "also"})
"""Arguments of `export` that the function may return with its module; the caller's `opset` takes precedence."""


def export_factory(
    factory: str, out: str | PathLike[str], *, weights: str | PathLike[str] | None = None, overwrite: bool = False,
    **options: Any,
) -> Report:  # fmt: skip
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
    with published(target, files_of_adapters(options.get("adapter"))) as scratch:
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
    found = made if isinstance(made, tuple) else (made,)
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
