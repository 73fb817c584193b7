"""Export a torch model as a graph, with adapters merged, attached or as slots, and check it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target
from ..errors import StorageError, Unsupported, UsageError
from ..formats.onnx_adapter import sidecar
from ..io.checkpoint import opened as opened_base
from ..io.lazy import Lazy, as_array
from ..io.locations import path_text
from ..io.stages import stage, steps
from ..io.staging import staged
from ..naming.binding import renamed
from .against_torch import Run, by_reference, compared, compared_packed, outputs_of
from .attaching import attach
from .building import Building
from .checking import CheckOutcome
from .found import Found
from .model_file import INLINE, STAYS, placing, save_fresh
from .modules import same_end
from .pretrained_parts import FILES
from .quantizing import SCHEMES, as_floats, packed, prepare, with_exact_inputs
from .reading import inputs_of, loaded
from .report import GraphReport
from .resolving import resolve, taken
from .slots import Slots, write_adapter
from .tracing import traced
from .tying import Tying

if TYPE_CHECKING:
    from torch import nn

    from ..io.strict_json import JsonValue


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Suffixes of weight files that an export does not write, apart from `GRAPHS`."""

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "normalizer.json",
)  # fmt: skip
"""Config, tokenizer and processor files that are copied along."""

GRAPHS = ("model.onnx", *FILES)
"""Graphs that an export of a folder writes: one, or the parts of a model."""

OWNS = frozenset({*GRAPHS, *(f"{name}.data" for name in GRAPHS), "*.onnx_adapter", "*.onnx_adapter.json", *CARRIED})
"""Files of an export; those of an older export are removed."""


def check_folder(target: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless an export wrote it, it has no other weights, and it may be replaced.

    Raises:
        StorageError: it exists, or its parent folder does not.
    """
    if not target.absolute().parent.is_dir():
        raise StorageError("no such folder", path=target.absolute().parent, cure="Make the folder first")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        cure = "Write to another path, or pass --overwrite (in Python overwrite=True)"
        raise StorageError("already there", path=target, cure=cure)
    cure = "Remove it yourself, or write beside"
    if not any((target / name).is_file() for name in GRAPHS):
        raise StorageError("not a folder that an export wrote", path=target, cure=cure)
    # A folder with other weights is a model of its own, which an export must not replace.
    held = sorted(name for name in os.listdir(target) if name.endswith(WEIGHTS) and name not in GRAPHS)
    if held:
        raise StorageError(f"it holds {held[0]}, which no export wrote", path=target, cure=cure)


@contextmanager
def published(target: Path, inputs: Iterable[Path] = (), made_from: str | None = None) -> Iterator[Path]:
    """Yield a folder to write an export to; at the end it replaces `target`.

    Files in `target` that no export writes stay. The inputs are never replaced.
    """
    with staged(target, owns=OWNS, inputs=inputs, made_from=made_from) as folder:
        folder.mkdir(exist_ok=True)
        yield folder


def moved(report: GraphReport, target: Path, carried: Sequence[Path] = ()) -> GraphReport:
    """Return the report of an export in a scratch folder, with the paths that the files have in `target`."""
    files = tuple(target / file.name for file in (*report.files, *carried))
    return replace(report, out=target / report.out.name, files=files)


# Put adapters on live torch models while they are traced or run; the models are unchanged afterwards.


def attached(model: nn.Module, adapters: Mapping[str, Adapter], mode: str) -> AbstractContextManager[Any]:
    """Return a context in which the live model is in the form to trace."""
    if mode == "merged":
        return _merged(model, adapters)
    return injected(model, adapters if mode == "attached" else {})


@contextmanager
def injected(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[list[Any]]:
    """Inject adapters into the live model for the block."""
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
    """Merge adapters into the live model's parameters for the block; the original tensors are put back unchanged."""
    from ..torch.handle import changes

    with injected(model, adapters) as handles:
        changed = changes(handles) if handles else []
    # Swap `data` and keep the parameters themselves, so that ties between them survive.
    before = [parameter.data for parameter, _ in changed]
    try:
        for parameter, value in changed:
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for (parameter, _), own in zip(changed, before, strict=True):
            parameter.data = own


# Share weights with the base's safetensors files: the graph refers to their bytes, without a second copy.
#
# Runtimes read no files outside of a model's folder, so these files must be in it. If a file stores 16 bits and the
# graph computes in 32, a Cast node is added, which runtimes evaluate when they load the model.


def share_weights(graph: ir.Model, weights: str | PathLike[str], out: Path) -> list[str]:
    """Replace stored tensors by references to equal tensors in safetensors files.

    Args:
        graph: an export, whose tensors have the base's names.
        weights: a safetensors file, or a folder of them.
        out: the graph's destination: in the files' folder, or above it.

    Returns:
        Names of the shared tensors.

    Raises:
        UsageError: none of their tensors equals one of the graph's.
    """
    held = {name: leaf for name, leaf in opened_base(weights).tensors.items() if leaf.span is not None}
    building, shared = Building(graph), list[str]()
    for name, value in list(graph.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE:
            continue
        alike = _alike(name, tuple(tensor.shape.numpy()), held)
        leaf = next((leaf for leaf in alike if _same(tensor, leaf)), None)
        if leaf is not None:
            _placed(value, leaf, out, building)
            shared.append(name)
    if not shared:
        cure = "Name the safetensors files that the model was loaded from"
        raise UsageError("no weight of the graph is one of the files'", path=weights, cure=cure)
    return shared


def _check_place(held: Mapping[str, Lazy], out: Path) -> None:
    """Refuse weights that are in no safetensors file, or elsewhere than the graph."""
    home = out.parent.resolve()
    for leaf in held.values():
        if leaf.span is None:
            continue
        file = Path(leaf.span.path)
        if file.suffix != ".safetensors":
            cure = "Save the model by save_pretrained, which writes safetensors files"
            raise UsageError("weights that are in no safetensors file cannot be shared", path=file, cure=cure)
        if file.is_symlink() or not file.resolve().is_relative_to(home):
            why = "weights outside of the graph's folder cannot be shared: runtimes read none there"
            raise UsageError(why, path=file, cure=f"Write the graph into {file.parent}; no link will do")


def _alike(name: str, shape: tuple[int, ...], held: Mapping[str, Lazy]) -> list[Lazy]:
    """Return tensors of the files that may equal one of the graph's: those of its name, else of its shape (ties)."""
    sized = {other: leaf for other, leaf in held.items() if leaf.shape == shape}
    named = [leaf for other, leaf in sized.items() if same_end(name, other)]
    return named or list(sized.values())


def _same(tensor: Any, leaf: Lazy) -> bool:
    """Whether the numbers are equal bit for bit; 16-bit numbers are first converted to the graph's float32."""
    theirs, ours = as_array(leaf), np.asarray(tensor.numpy(), order="C")
    if theirs.dtype != ours.dtype:
        if not leaf.dtype.floating or theirs.dtype.itemsize != 2 or ours.dtype != np.float32:
            return False
        theirs = theirs.astype(np.float32)
    return bool(np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)) if ours.ndim else ours == theirs)


def _placed(value: ir.Value, leaf: Lazy, out: Path, building: Building) -> None:
    assert leaf.span is not None
    assert value.const_value is not None
    file, own = Path(leaf.span.path).resolve(), value.const_value
    kind = ir.DataType.from_numpy(leaf.dtype.array)
    place = ir.ExternalTensor(
        file.relative_to(out.parent.resolve()).as_posix(), leaf.span.offset, leaf.span.nbytes, kind,
        shape=ir.Shape(leaf.shape), name=value.name or "", base_dir=out.parent.resolve(),
    )  # fmt: skip
    place.meta[STAYS] = True
    if kind == own.dtype:
        value.const_value = place
        return
    uses = list(value.uses())
    cast = ir.node("Cast", [value], {"to": own.dtype}, name=building.name(f"{value.name}/Cast"))
    cast.outputs[0].name = building.name(f"{value.name}/Cast_output")
    cast.outputs[0].shape, cast.outputs[0].type = ir.Shape(leaf.shape), ir.TensorType(own.dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    # At the front, before all nodes that may read it.
    graph.insert_before(graph[0], cast)
    value.const_value, value.type = place, ir.TensorType(kind)


# Export a torch model as a graph, with adapters merged, attached or as slots, and check it against torch.
#
# onnxruntime runs the written graph on the example inputs. The result is compared with the torch model with the
# adapters injected: merged weights, nodes and slots are each another way to the same numbers.


if TYPE_CHECKING:
    from torch import nn

    One = Adapter | str | PathLike[str]
    Adapters = One | Sequence[One] | Mapping[str, One] | None

MODES = ("merged", "attached", "slots")

RECORD = "adapterkit.export"
"""Metadata key that records the mode and the adapters' digests."""


def export(
    torch_model: nn.Module,
    args: Sequence[object],
    out: str | PathLike[str],
    *,
    adapter: Adapters = None,
    mode: str = "merged",
    kwargs: Mapping[str, object] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: object = None,
    opset: int | None = None,
    inside: str = "",
    also: Sequence[Sequence[object]] = (),
    quantize: str | None = None,
    share: str | PathLike[str] | None = None,
    check: bool = True,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
) -> GraphReport:
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
            `GraphReport.damage` has the error of each weight, `GraphReport.difference` that of the outputs.
        share: safetensors files in the folder of `out`, or that folder: weights in them are not copied, and the graph
            refers to their bytes.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
        allow_partial: the graph holds a part of the model, as an encoder's does: with slots, leave out targets that it
            lacks (`GraphReport.left`), and write `PART.NAME.onnx_adapter` files.
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
    _check_call(torch_model, target, named, mode, allow_partial)
    _check_weights(quantize, share)
    adapters = read_adapters(adapter)
    adapters = dict(zip(adapters, renamed(list(adapters.values()), rename), strict=True))
    options: dict[str, Any] = {
        "input_names": input_names, "output_names": output_names, "dynamic_shapes": dynamic_shapes,
        "opset_version": opset, "inside": inside,
    }  # fmt: skip
    held = getattr(torch_model, inside) if inside else torch_model
    config = config_of_model(held)
    examples = [(tuple(args), dict(kwargs or {})), *((tuple(one), dict[str, Any]()) for one in also)]
    told = CheckOutcome(None)
    left: dict[str, tuple[Target, ...]] = {}
    stays: tuple[Path, ...] = ()
    if share is not None:
        weights = opened_base(share)
        # Files in a wrong place are refused here, before minutes of tracing.
        _check_place(weights.tensors, target)
        stays = weights.files
    numbered = steps(steps_of(mode, quantize, check))
    with placing(target, stays=stays, inputs=files_of_adapters(named)) as place, numbered:
        path = place.path
        # The quantizer starts from a float graph, which is checked, too.
        plain = path if quantize is None else place.scratch / "float.onnx"
        with attached(held, adapters, mode):
            if mode == "attached" and any(getattr(u, "asks", ()) for one in adapters.values() for _, u in one):
                _first_call(torch_model, *examples[0])
            graph = traced(torch_model, args, kwargs, **options)
            if mode == "slots" and allow_partial:
                adapters, left = _own_parts(graph, adapters, config)
            found = _opened(graph, adapters, config) if mode == "slots" else []
            if share is not None:
                share_weights(graph, share, target)
            _written(graph, plain, _note(mode, adapters, quantize), None if quantize is None else held)
        damage: dict[str, dict[str, float]] = {}
        if quantize is not None:
            damage = packed(plain, quantize, path)
        if mode == "slots":
            _adapter_files(path, adapters, allow_partial)
        runs = _runs(held, path, adapters, mode, allow_partial)
        if check:
            told = _checked(torch_model, examples, plain, path, runs, quantize)
    return GraphReport(
        target, place.files, tuple(found), told.difference, told.note, damage, told.reference, left=left
    )  # fmt: skip


def _own_parts(
    graph: ir.Model, adapters: Mapping[str, Adapter], config: Mapping[str, JsonValue] | None
) -> tuple[dict[str, Adapter], dict[str, tuple[Target, ...]]]:
    """Return the parts of adapters whose targets a graph has, without those that have none, and the other targets."""
    split = {name: taken(graph, adapter, None, config) for name, adapter in adapters.items()}
    own = {name: kept for name, (kept, _) in split.items() if kept.updates}
    return own, {name: lost for name, (_, lost) in split.items()}


def steps_of(mode: str, quantize: str | None, check: bool) -> int:
    """Return how many steps an export tells: tracing, converting, and those that it was asked for."""
    return 2 + (mode == "slots") + (quantize is not None) + check


def read_adapters(adapters: Adapters) -> dict[str, Adapter]:
    """Read the adapters of an export; return them by name."""
    return {name: loaded(one, None)[0] for name, one in _named(adapters).items()}


def files_of_adapters(adapters: Adapters) -> list[Path]:
    """Return the files that the adapters of an export are read from."""
    return [file for one in _named(adapters).values() for file in inputs_of(one, None)]


def _first_call(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
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
    model: nn.Module, examples: Sequence[object], plain: Path, out: Path, runs: Mapping[str | None, Run],
    quantize: str | None,
) -> CheckOutcome:  # fmt: skip
    """Check the graph; for a quantized one, check the float graph that it was made from, too."""
    from .session import Session

    stage("running the graph and comparing it with the model")
    try:
        # Load each graph once, also for the reference: onnxruntime optimizes it anew each time.
        session = Session(plain)
        difference = compared(model, examples, plain, session, runs)
        if quantize is not None:
            # Judge the packing alone: dequantized weights against packed ones on exact inputs. The error of the packing
            # itself is reported, not judged.
            unpacked, exact = plain.with_name("unpacked.onnx"), plain.with_name("exact.onnx")
            as_floats(out, unpacked)
            with_exact_inputs(out, exact)
            compared_packed(exact, unpacked, examples)
            session = Session(out)
            difference = compared(model, examples, out, session, runs, judged=False)
    except Unsupported as error:
        return CheckOutcome(None, f"not run: {error.why}")
    return CheckOutcome(difference, None, by_reference(out, session, examples[0]))


def _runs(held: nn.Module, out: Path, adapters: Mapping[str, Adapter], mode: str, part: bool) -> dict[str | None, Run]:
    """Return what to run a graph with: each adapter by itself for slots, else all together."""
    if mode != "slots":
        return {None: (lambda: injected(held, adapters), None)}
    runs: dict[str | None, Run] = {None: (lambda: injected(held, {}), None)}
    for name, adapter in adapters.items():
        runs[name] = (partial(injected, held, {name: adapter}), _file(out, name, part))
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


def _check_call(model: Any, out: Path, adapters: Mapping[str, Any], mode: str, part: bool) -> None:
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
    files = [_file(out, name, part) for name in adapters if mode == "slots"]
    for file in (out.with_name(f"{out.name}.data"), *files, *map(sidecar, files)):
        if file.exists():
            raise StorageError("already there", path=file, cure="Remove it, or write to another folder")


def _check_weights(quantize: str | None, share: object) -> None:
    if quantize is not None and quantize not in SCHEMES:
        raise UsageError(f"unknown scheme {quantize!r}", where="quantize", cure=f"Known: {', '.join(SCHEMES)}")
    if quantize is not None and share is not None:
        cure = "Leave one of the two out"
        raise UsageError("packed weights are not those of the base's files", where="share", cure=cure)


def _file(out: Path, name: str, part: bool) -> Path:
    """Return the adapter file for a graph's slots; those of a model's parts lie side by side in one folder."""
    return out.with_name(f"{out.stem}.{name}.onnx_adapter" if part else f"{name}.onnx_adapter")


def _opened(graph: ir.Model, adapters: Mapping[str, Adapter], config: Mapping[str, JsonValue] | None) -> list[Found]:
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
    stage("converting the graph")
    graph.metadata_props[RECORD] = note
    if quantized is not None:
        prepare(graph, set(quantized.state_dict(keep_vars=True)))
    save_fresh(graph, out)


def _adapter_files(out: Path, adapters: Mapping[str, Adapter], part: bool) -> None:
    for name, adapter in adapters.items():
        write_adapter(out, adapter, _file(out, name, part))
