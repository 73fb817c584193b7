"""Export a torch model as a graph, with adapters merged, attached or as slots, and check it against torch.

onnxruntime runs the written graph on the example inputs. The result is compared with the torch model with the adapters
injected: merged weights, nodes and slots are each another way to the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..core.adapter import Adapter
from ..errors import StorageError, Unsupported, UsageError
from ..formats.onnx_adapter import sidecar
from ..io.checkpoint import opened as opened_base
from ..io.locations import path_text
from ..naming.binding import renamed
from .against_torch import Run, by_reference, compared, compared_packed, outputs_of
from .attaching import attach
from .building import Building
from .checking import Outcome
from .fitting import write_adapter
from .injecting import Report
from .live import attached, injected
from .model_file import placing, save_fresh
from .quantizing import SCHEMES, as_floats, packed, prepare, with_exact_inputs
from .reading import inputs_of, loaded
from .resolving import Found, resolve
from .sharing import share_weights
from .slots import Slots
from .tracing import traced
from .tying import Tying

if TYPE_CHECKING:
    from torch import nn

    One = Adapter | str | PathLike[str]
    Adapters = One | Sequence[One] | Mapping[str, One] | None

MODES = ("merged", "attached", "slots")

RECORD = "adapterkit.export"
"""Metadata key that records the mode and the adapters' digests."""


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
    quantize: str | None = None,
    share: str | PathLike[str] | None = None,
    check: bool = True,
    rename: str | Sequence[str] = (),
) -> Report:
    """Write a torch model as a graph by torch's dynamo exporter; tensors and nodes keep the modules' names.

    Args:
        torch_model: the model, in evaluation mode; it is unchanged afterwards.
        args: an example of its positional arguments.
        out: the file to write; more than 64 MB of numbers go into a data file, `out` with `.data` appended.
        adapter: one adapter, several, or several by name. They apply together, except as slots, where each gets its own
            file.
        mode: `merged` folds adapters into the weights, in float64 with one rounding; `attached` adds nodes for them;
            `slots` makes their tensors optional inputs and writes `.onnx_adapter` files beside the model.
        kwargs: an example of its named arguments.
        input_names: names of the graph's inputs.
        output_names: names of its outputs.
        dynamic_shapes: the open sizes, as `torch.onnx.export` takes them.
        opset: the opset version; torch's default if not given.
        inside: the attribute of a wrapper that holds the model; names are relative to it.
        also: further examples of `args`, of other sizes, for the check.
        quantize: `int8` or `int4`: pack the linear layers by onnxruntime's quantizers; see quantizing.py.
            `Report.damage` has the error of each weight, `Report.difference` that of the outputs.
        share: safetensors files in the folder of `out`, or that folder: weights in them are not copied, and the graph
            refers to their bytes.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
        check: run the result in onnxruntime and compare it with the torch model; a quantized one is also compared with
            its own dequantized weights.

    Raises:
        UsageError: an argument is invalid, or the model is in training mode.
        TargetNotFound, ShapeMismatch: an adapter does not belong to this model.
        NotMergeable: an adapter does not change weights only, or a weight is tied.
        Unsupported: torch cannot export the model, or a layer cannot take a method.
        CheckFailed: the graph computes something else; nothing is left at `out`.
    """
    from ..torch.inject import config_of_model

    target, named = Path(path_text(out)), _named(adapter)
    _check_call(torch_model, target, named, mode)
    _check_weights(quantize, share)
    adapters = read_adapters(adapter)
    adapters = dict(zip(adapters, renamed(list(adapters.values()), rename), strict=True))
    options = {
        "input_names": input_names, "output_names": output_names, "dynamic_shapes": dynamic_shapes,
        "opset_version": opset, "inside": inside,
    }  # fmt: skip
    held = getattr(torch_model, inside) if inside else torch_model
    config = config_of_model(held)
    examples = [(tuple(args), dict(kwargs or {})), *((tuple(one), dict[str, Any]()) for one in also)]
    told = Outcome(None)
    stays: tuple[Path, ...] = () if share is None else opened_base(share).files
    with placing(target, stays=stays, inputs=files_of_adapters(named)) as place:
        path = place.path
        # The quantizer starts from a float graph, which is checked, too.
        plain = path if quantize is None else place.scratch / "float.onnx"
        with attached(held, adapters, mode):
            if mode == "attached" and any(getattr(u, "asks", ()) for one in adapters.values() for _, u in one):
                _first_call(torch_model, *examples[0])
            graph = traced(torch_model, args, kwargs, **options)
            found = _opened(graph, adapters, config) if mode == "slots" else []
            if share is not None:
                share_weights(graph, share, target)
            _written(graph, plain, _note(mode, adapters, quantize), None if quantize is None else held)
        damage: dict[str, dict[str, float]] = {}
        if quantize is not None:
            damage = packed(plain, quantize, path)
        if mode == "slots":
            _adapter_files(path, adapters)
        runs = _runs(held, path, adapters, mode)
        if check:
            told = _checked(torch_model, examples, plain, path, runs, quantize)
    return Report(target, place.files, tuple(found), told.difference, told.note, damage, told.reference)


def read_adapters(adapters: Adapters) -> dict[str, Adapter]:
    """Read the adapters of an export; return them by name."""
    return {name: loaded(one, None)[0] for name, one in _named(adapters).items()}


def files_of_adapters(adapters: Adapters) -> list[Path]:
    """Return the files that the adapters of an export are read from."""
    return [file for one in _named(adapters).values() for file in inputs_of(one, None)]


def _first_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run the model once before tracing: some formulas create a network in the first call, which tracing cannot do.

    Raises:
        Unsupported: the formula cannot handle such a call.
    """
    try:
        outputs_of(model, args, kwargs)
    except Unsupported as error:
        cure = "Export the model without the adapter, and inject that into the graph"
        raise Unsupported(error.why, where=error.where, cure=cure) from None


def _checked(
    model: nn.Module, examples: Sequence[Any], plain: Path, out: Path, runs: Mapping[str | None, Run],
    quantize: str | None,
) -> Outcome:  # fmt: skip
    """Check the graph; for a quantized one, check the float graph that it was made from, too."""
    try:
        difference = compared(model, examples, plain, runs)
        if quantize is not None:
            # Judge the packing alone: dequantized weights against packed ones on exact inputs. The error of the packing
            # itself is reported, not judged.
            unpacked, exact = plain.with_name("unpacked.onnx"), plain.with_name("exact.onnx")
            as_floats(out, unpacked)
            with_exact_inputs(out, exact)
            compared_packed(exact, unpacked, examples)
            difference = compared(model, examples, out, runs, judged=False)
    except Unsupported as error:
        return Outcome(None, f"not run: {error.why}")
    return Outcome(difference, None, by_reference(out, examples[0]))


def _runs(held: nn.Module, out: Path, adapters: Mapping[str, Adapter], mode: str) -> dict[str | None, Run]:
    """Return what to run a graph with: each adapter by itself for slots, else all together."""
    if mode != "slots":
        return {None: (lambda: injected(held, adapters), None)}
    runs: dict[str | None, Run] = {None: (lambda: injected(held, {}), None)}
    for name, adapter in adapters.items():
        runs[name] = (partial(injected, held, {name: adapter}), _file(out, name))
    return runs


def _named(adapter: Adapters) -> dict[str, One]:
    """Return adapters by name: the given names, else those of their files or folders."""
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


def _check_weights(quantize: str | None, share: Any) -> None:
    if quantize is not None and quantize not in SCHEMES:
        raise UsageError(f"unknown scheme {quantize!r}", where="quantize", cure=f"Known: {', '.join(SCHEMES)}")
    if quantize is not None and share is not None:
        cure = "Leave one of the two out"
        raise UsageError("packed weights are not those of the base's files", where="share", cure=cure)


def _file(out: Path, name: str) -> Path:
    return out.with_name(f"{name}.onnx_adapter")


def _opened(graph: ir.Model, adapters: Mapping[str, Adapter], config: Mapping[str, Any] | None) -> list[Found]:
    """Give the graph slots for all adapters: one set per target, whichever adapters have it."""
    places: dict[tuple[str, str], Found] = {}
    for name, adapter in adapters.items():
        for place in resolve(graph, adapter, tying=Tying(config=config)):
            first = places.setdefault((str(place.asked), str(place.target)), place)
            if _form(first) != _form(place):
                why = f"{name} is of another method, or has other tensors, than another adapter at the same target"
                raise Unsupported(why, where=str(place.asked), cure="Export a model for each kind of adapter")
    building = Building(graph)
    slots = Slots(building)
    attach(list(places.values()), building, slots)
    building.settle()
    slots.record()
    return list(places.values())


def _form(place: Found) -> list[Any]:
    """Return what adapters must have in common to use the same slots."""
    return [
        # `scaling` is a slot of its own, so adapters may differ in it.
        (update.method, sorted(update.tensors), {k: v for k, v in update.attributes.items() if k != "scaling"})
        for update in place.updates
    ]


def _note(mode: str, adapters: Mapping[str, Adapter], quantize: str | None) -> str:
    digests = {name: adapter.digest() for name, adapter in adapters.items()}
    return json.dumps({"mode": mode, "adapters": digests, **({"quantize": quantize} if quantize else {})})


def _written(graph: ir.Model, out: Path, note: str, quantized: nn.Module | None) -> None:
    graph.metadata_props[RECORD] = note
    if quantized is not None:
        prepare(graph, set(quantized.state_dict(keep_vars=True)))
    save_fresh(graph, out)


def _adapter_files(out: Path, adapters: Mapping[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        write_adapter(out, adapter, _file(out, name))
