"""Export: a torch model becomes a graph, with adapters in its weights, beside them, or as slots; held against torch.

What is written is run by onnxruntime on the example inputs. The torch model with the adapters injected is what it is
held against: merged weights, nodes and slots are each another way to the same numbers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..adapter import Adapter
from ..errors import CheckFailed, StorageError, Unsupported, UsageError
from ..formats.onnx_adapter import sidecar
from .attaching import attach
from .building import Building
from .checking import MOST_NOISE, TOLERANCE, difference_of
from .fitting import write_adapter
from .injecting import Report, loaded
from .model_file import Source, save_merged
from .resolving import Found, resolve
from .slots import Slots
from .tracing import quiet, traced

if TYPE_CHECKING:
    from torch import nn

    One = Adapter | str | PathLike[str]
    Adapters = One | Sequence[One] | Mapping[str, One] | None

MODES = ("merged", "attached", "slots")

APART = 1 << 26
"""Bytes of numbers from which they lie in a file beside the model."""

RECORD = "adapterkit.export"
"""The metadata key that tells the mode and the adapters' digests."""


def export(
    torch_model: nn.Module,
    args: Sequence[Any],
    out: str | PathLike[str],
    *,
    adapter: Adapters = None,
    mode: str = "merged",
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    inside: str = "",
    also: Sequence[Sequence[Any]] = (),
    check: bool = True,
) -> Report:
    """Writes a torch model as a graph by torch's dynamo exporter; initializers and nodes keep the modules' names.

    Args:
        torch_model: the model, in evaluation mode; it is afterwards as it was before.
        args: an example of its positional arguments.
        out: the file to write; numbers of more than 64 MB lie in `out` with `.data` behind it, of any size.
        adapter: one, several, or several by name; they apply together, but as slots, where each gets a file of its own.
        mode: `merged` folds adapters into the weights, in float64, rounded once; `attached` leaves them nodes of their
            own; `slots` makes their tensors inputs that may be left out, with `.onnx_adapter` files beside the model.
        kwargs: an example of its named arguments.
        input_names: names of the graph's inputs.
        output_names: names of its outputs.
        dynamic_shapes: the sizes that are open, as `torch.onnx.export` takes them.
        opset: the operator set; torch's own choice when not given.
        inside: the attribute of the model, a wrapper, that names are told of.
        also: further examples of `args`, of other sizes, to check with.
        check: run the result with onnxruntime against the torch model.

    Raises:
        UsageError: the call makes no sense, or the model is in training mode.
        TargetNotFound, ShapeMismatch: an adapter is not one of this model.
        NotMergeable: an adapter's law is not one of weights, or a weight is tied.
        Unsupported: torch cannot export the model, or a layer cannot take a method.
        CheckFailed: the graph computes something else; nothing is left at `out`.
    """
    target, named = Path(out), _named(adapter)
    _check_call(torch_model, target, named, mode)
    adapters = {name: loaded(one, None)[0] for name, one in named.items()}
    options = {
        "input_names": input_names, "output_names": output_names, "dynamic_shapes": dynamic_shapes,
        "opset_version": opset, "inside": inside,
    }  # fmt: skip
    held = getattr(torch_model, inside) if inside else torch_model
    examples = [(tuple(args), dict(kwargs or {})), *((tuple(one), dict[str, Any]()) for one in also)]
    with ExitStack() as stack:
        if mode == "merged":
            stack.enter_context(_merged(held, adapters))
        elif mode == "attached":
            stack.enter_context(_injected(held, adapters))
        graph = traced(torch_model, args, kwargs, **options)
        found = _opened(graph, adapters) if mode == "slots" else []
        files = _written(graph, target, mode, adapters)
    try:
        files += _adapter_files(target, adapters) if mode == "slots" else []
        difference, note = _checked(torch_model, held, examples, target, adapters, mode) if check else (None, None)
    except BaseException:
        _unlink(files)
        raise
    return Report(target, tuple(files), tuple(found), difference, note)


def _named(adapter: Adapters) -> dict[str, One]:
    """Adapters by name: that of their file or folder where none is given."""
    if adapter is None:
        return {}
    if isinstance(adapter, Mapping):
        return dict(adapter)
    several = [adapter] if isinstance(adapter, str | PathLike | Adapter) else list(adapter)
    named: dict[str, One] = {}
    for one in several:
        name = "adapter" if isinstance(one, Adapter) else _stem(one)
        if name in named:
            cure = "Pass a dictionary that names each"
            raise UsageError(f"two adapters of the name {name!r}", where="adapter", cure=cure)
        named[name] = one
    return named


def _stem(path: str | PathLike[str]) -> str:
    name = str(path).rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return name.removesuffix(".safetensors") or "adapter"


def _check_call(model: Any, out: Path, adapters: Mapping[str, Any], mode: str) -> None:
    from torch import nn

    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}", where="mode", cure=f"Known: {', '.join(MODES)}")
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} is no torch module", cure="Pass an nn.Module")
    if model.training:
        raise UsageError("the model is in training mode", cure="Call model.eval() first")
    if mode == "slots" and not adapters:
        raise UsageError("slots for no adapter", where="adapter", cure="Pass the adapters that the slots are for")
    for name in adapters:
        if not name or name.startswith(".") or any(sign in name for sign in "/\\:\0"):
            raise UsageError(f"{name!r} cannot name a file", where="adapter", cure="Give it another name")
    if out.is_dir():
        raise UsageError("a folder where a file is to be written", path=out, cure="Name a .onnx file")
    if not out.parent.is_dir():
        raise StorageError("no such folder", path=out.parent, cure="Make the folder first")
    files = [_file(out, name) for name in adapters if mode == "slots"]
    for file in (out.with_name(f"{out.name}.data"), *files, *map(sidecar, files)):
        if file.exists():
            raise StorageError("already there", path=file, cure="Remove it, or write to another folder")


def _file(out: Path, name: str) -> Path:
    return out.with_name(f"{name}.onnx_adapter")


@contextmanager
def _injected(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[list[Any]]:
    """The live model with adapters on it."""
    from ..torch import inject

    handles: list[Any] = []
    try:
        for name, adapter in adapters.items():
            handles.append(inject(model, adapter, name=f"export {name}"))
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _merged(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """The live model with other numbers in the parameters that adapters change; its own come back untouched."""
    from ..torch.handle import changes

    with _injected(model, adapters) as handles:
        changed = changes(handles) if handles else []
    before = [parameter.data for parameter, _ in changed]
    try:
        for parameter, value in changed:
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for (parameter, _), own in zip(changed, before, strict=True):
            parameter.data = own


def _opened(graph: ir.Model, adapters: Mapping[str, Adapter]) -> list[Found]:
    """Gives the graph slots for all adapters: one set at a target, whichever of them has it."""
    places: dict[str, Found] = {}
    for name, adapter in adapters.items():
        for place in resolve(graph, adapter):
            first = places.setdefault(str(place.target), place)
            if _form(first) != _form(place):
                why = f"{name} is of another method, or has other tensors, than another adapter at the same target"
                raise Unsupported(why, where=str(place.asked), cure="Export a model for each kind of adapter")
    building = Building(graph)
    attach(list(places.values()), building, Slots(next(iter(adapters.values())), building))
    building.settle()
    return list(places.values())


def _form(place: Found) -> list[Any]:
    """What adapters must share to go into the same slots."""
    return [
        (update.method, sorted(update.tensors), {k: v for k, v in update.attributes.items() if k != "scaling"})
        for update in place.updates
    ]


def _written(graph: ir.Model, out: Path, mode: str, adapters: Mapping[str, Adapter]) -> list[Path]:
    stored = [v.const_value for v in graph.graph.initializers.values() if v.const_value is not None]
    digests = {name: adapter.digest() for name, adapter in adapters.items()}
    graph.metadata_props[RECORD] = json.dumps({"mode": mode, "adapters": digests})
    apart = sum(tensor.nbytes for tensor in stored) > APART
    return save_merged(graph, Source(graph, None, (), b""), out, (), apart)


def _adapter_files(out: Path, adapters: Mapping[str, Adapter]) -> list[Path]:
    written: list[Path] = []
    try:
        for name, adapter in adapters.items():
            written.append(write_adapter(out, adapter, _file(out, name)))
            written.append(sidecar(written[-1]))
    except BaseException:
        _unlink(written)
        raise
    return written


def _unlink(files: Sequence[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def _checked(
    model: nn.Module, held: nn.Module, examples: Sequence[Any], out: Path, adapters: Mapping[str, Adapter], mode: str
) -> tuple[float, None]:
    """The largest difference from torch, as a share of the largest output."""
    from .session import Session

    session, worst = Session(out), 0.0
    sets: list[dict[str, Adapter]] = [dict(adapters)]
    if mode == "slots":
        sets = [{}, *({name: adapter} for name, adapter in adapters.items())]
    for some in sets:
        name = next(iter(some), None) if mode == "slots" else None
        if name is not None:
            session.load(name, _file(out, name))
        for args, kwargs in examples:
            with _injected(held, some):
                wanted = _outputs(model, args, kwargs)
            got = list(session.run(dict(zip(session.inputs, _numbers((args, kwargs)), strict=True)), name).values())
            worst = max(worst, difference_of(got, wanted))
            _judge(worst, got, out, name)
    return worst, None


def _judge(worst: float, got: Sequence[Any], out: Path, name: str | None) -> None:
    narrow = any(array.dtype.kind in "fV" and array.dtype.itemsize < 4 for array in got)
    if worst <= (TOLERANCE["V"] if narrow else MOST_NOISE):
        return
    why = f"the graph differs by {worst:.3g} of its largest output from the torch model"
    cure = "Report this; with check off the file is kept"
    raise CheckFailed(why, path=out, where=name, cure=cure)


def _outputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    import torch

    with torch.no_grad(), quiet():
        return _numbers(model(*args, **kwargs))


def _numbers(tree: Any) -> list[Any]:
    """The tensors in it, as arrays, in the order in which torch flattens it."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [leaf.detach() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [np.asarray((leaf.float() if leaf.dtype == torch.bfloat16 else leaf).cpu()) for leaf in leaves]
