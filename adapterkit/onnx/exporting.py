"""Export a torch model with adapters as an ONNX graph, and check the graph.

The adapters are merged into the weights, attached as nodes, or loaded at run time into slots; see `export`.
"""

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
from ..core.arguments import checks_types
from ..errors import StorageError, Unsupported, UsageError
from ..formats.onnx_adapter import sidecar
from ..io.checkpoint import opened as opened_base
from ..io.lazy import Lazy, as_array
from ..io.locations import path_text
from ..io.stages import stage, steps
from ..io.staging import staged
from ..naming.binding import renamed
from ..naming.moves import same_end
from .against_torch import Run, by_reference, compared, compared_packed, outputs_of
from .attaching import attach
from .building import INLINE, Building
from .checking import CheckOutcome
from .model_file import STAYS, placing, save_fresh
from .pretrained_parts import FILES
from .quantizing import SCHEMES, as_floats, packed, prepare, with_exact_inputs
from .reading import inputs_of, loaded
from .report import GraphReport
from .resolved import ResolvedTarget
from .resolving import resolve, taken
from .slot_values import write_adapter
from .slots import Slots
from .tracing import traced
from .tying import Tying

if TYPE_CHECKING:
    from torch import nn

    from ..io.strict_json import JsonValue
    from ..torch import Handle
    from .against_torch import Example


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Suffixes of weight files. If a file that an export writes has one of these suffixes, its name is in `GRAPHS`."""

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "normalizer.json",
)  # fmt: skip
"""Config, tokenizer and processor files that are copied next to the graph."""

GRAPHS = ("model.onnx", *FILES)
"""File names of the graphs in an exported folder: one graph, or one graph for each part of the model."""

OWNS = frozenset(
    {
        *GRAPHS,
        *(f"{name}.data" for name in GRAPHS),
        "*.onnx_adapter",
        "*.onnx_adapter.json",
        "genai_config.json",
        *CARRIED,
    }
)
"""Names and name patterns of the files that an export writes. A new export to the same folder removes the old files
with these names."""


def check_folder(target: Path, overwrite: bool) -> None:
    """Check that an export may write to a folder.

    The folder may be missing or empty. If `overwrite` is set, the folder may also contain an earlier export, but no
    other weight files.

    Raises:
        StorageError: the folder has files that must not be replaced, or its parent folder does not exist.
    """
    if not target.absolute().parent.is_dir():
        raise StorageError("no such folder", path=target.absolute().parent, cure="Make the folder first")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        cure = "Write to another path, or pass --overwrite (in Python overwrite=True)"
        raise StorageError("already there", path=target, cure=cure)
    cure = "Remove the folder yourself, or write to another path"
    if not any((target / name).is_file() for name in GRAPHS):
        raise StorageError("not a folder that an export wrote", path=target, cure=cure)
    # Weight files that no export writes belong to another model, which an export must not replace.
    other_files = sorted(name for name in os.listdir(target) if name.endswith(WEIGHTS) and name not in GRAPHS)
    if other_files:
        raise StorageError(f"the folder holds {other_files[0]}, which no export wrote", path=target, cure=cure)


@contextmanager
def published(target: Path, inputs: Iterable[Path] = (), made_from: str | None = None) -> Iterator[Path]:
    """Yield a scratch folder to write an export to; when the block ends, move the written files to `target`.

    Old files in `target` are removed if their names match `OWNS`; all other files there stay.

    Args:
        target: the folder of the export.
        inputs: the files that the export reads. They are never replaced.
        made_from: a digest of everything that determines the export; see `staged`.

    Raises:
        UsageError: the export would replace one of the inputs.
    """
    with staged(target, owns=OWNS, inputs=inputs, made_from=made_from) as folder:
        folder.mkdir(exist_ok=True)
        yield folder


def moved(report: GraphReport, target: Path, carried: Sequence[Path] = ()) -> GraphReport:
    """Return an export's report, with the final paths in `target` instead of the paths in the scratch folder."""
    files = tuple(target / file.name for file in (*report.files, *carried))
    return replace(report, out=target / report.out.name, files=files)


# Apply adapters to a torch model in memory while the model is traced or run, and restore the model afterwards.


def attached(model: nn.Module, adapters: Mapping[str, Adapter], mode: str) -> AbstractContextManager[object]:
    """Return a context in which the torch model can be traced.

    In the context, the adapters are merged (mode `merged`), attached as hooks (`attached`) or absent (`slots`).
    """
    if mode == "merged":
        return _merged(model, adapters)
    return injected(model, adapters if mode == "attached" else {})


@contextmanager
def injected(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[list[Handle]]:
    """Inject adapters into the torch model, and yield their handles; when the block ends, remove the adapters."""
    from ..torch import inject

    handles: list[Handle] = []
    try:
        for name, adapter in adapters.items():
            handles.append(inject(model, adapter, name=f"export {name}"))
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _merged(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Merge adapters into the torch model's parameters; when the block ends, restore the parameters."""
    from ..torch.handle import changes

    with injected(model, adapters) as handles:
        changed = changes(handles) if handles else []
    # Replace the `data` of each parameter, not the parameter: otherwise, tied parameters would no longer be tied.
    before = [parameter.data for parameter, _ in changed]
    try:
        for parameter, value in changed:
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for (parameter, _), data in zip(changed, before, strict=True):
            parameter.data = data


# Share weights with the base's safetensors files: the graph refers to tensors in these files instead of storing copies.
# Runtimes do not read files outside of a graph's folder, so the weights must be in that folder. If a file stores 16-bit
# weights and the graph computes in 32 bits, a Cast node converts the weights when a runtime loads the graph.


def share_weights(graph: ir.Model, weights: str | PathLike[str], out: Path) -> list[str]:
    """Replace a graph's stored tensors by references to equal tensors in safetensors files.

    Tensors of up to `INLINE` bytes stay in the graph.

    Args:
        graph: an exported graph, whose tensors have the same names as in the base.
        weights: a safetensors file, or a folder of them.
        out: the file to which the graph will be written. It must be in the folder of the safetensors files, or in a
            parent of that folder.

    Returns:
        the names of the shared tensors.

    Raises:
        UsageError: none of the graph's tensors of more than `INLINE` bytes equals a tensor in the files.
    """
    by_name = {name: leaf for name, leaf in opened_base(weights).tensors.items() if leaf.span is not None}
    building, shared = Building(graph), list[str]()
    for name, value in list(graph.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE:
            continue
        alike = _alike(name, tuple(tensor.shape.numpy()), by_name)
        leaf = next((leaf for leaf in alike if _same(tensor, leaf)), None)
        if leaf is not None:
            _placed(value, leaf, out, building)
            shared.append(name)
    if not shared:
        cure = "Pass the safetensors files that the model was loaded from: --share-weights (share_weights=, share=)"
        raise UsageError("no weight of the graph equals a tensor of these files", path=weights, cure=cure)
    return shared


def _check_place(by_name: Mapping[str, Lazy], out: Path) -> None:
    """Refuse weights that are not in safetensors files, or not in the graph's folder."""
    home = out.parent.resolve()
    for leaf in by_name.values():
        if leaf.span is None:
            continue
        file = Path(leaf.span.path)
        if file.suffix != ".safetensors":
            cure = "Save the model with save_pretrained, which writes safetensors files"
            raise UsageError("weights that are not in a safetensors file cannot be shared", path=file, cure=cure)
        if file.is_symlink() or not file.resolve().is_relative_to(home):
            why = "weights outside of the graph's folder cannot be shared: runtimes read only files in that folder"
            raise UsageError(
                why, path=file, cure=f"Write the graph into {file.parent}; if the file is a link, replace it by a copy"
            )


def _alike(name: str, shape: tuple[int, ...], by_name: Mapping[str, Lazy]) -> list[Lazy]:
    """Return the stored tensors that may equal a graph's tensor.

    These are the tensors with the same name (except for a wrapper's prefix) and the same shape. If there are none,
    return all tensors with the same shape: a tied weight has several names, and the files may store it under a name
    that the graph does not use.
    """
    sized = {other: leaf for other, leaf in by_name.items() if leaf.shape == shape}
    named = [leaf for other, leaf in sized.items() if same_end(name, other)]
    return named or list(sized.values())


def _same(tensor: ir.TensorProtocol, leaf: Lazy) -> bool:
    """Whether a tensor of the graph equals a stored tensor bit for bit.

    If the graph's tensor is float32, a stored 16-bit tensor is converted to float32 first.
    """
    theirs, ours = as_array(leaf), np.asarray(tensor.numpy(), order="C")
    if theirs.dtype != ours.dtype:
        if not leaf.dtype.floating or theirs.dtype.itemsize != 2 or ours.dtype != np.float32:
            return False
        theirs = theirs.astype(np.float32)
    return bool(np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)) if ours.ndim else ours == theirs)


def _placed(value: ir.Value, leaf: Lazy, out: Path, building: Building) -> None:
    assert leaf.span is not None
    assert value.const_value is not None
    file, tensor = Path(leaf.span.path).resolve(), value.const_value
    kind = ir.DataType.from_numpy(leaf.dtype.array)
    place = ir.ExternalTensor(
        file.relative_to(out.parent.resolve()).as_posix(), leaf.span.offset, leaf.span.nbytes, kind,
        shape=ir.Shape(leaf.shape), name=value.name or "", base_dir=out.parent.resolve(),
    )  # fmt: skip
    place.meta[STAYS] = True
    if kind == tensor.dtype:
        value.const_value = place
        return
    uses = list(value.uses())
    cast = ir.node("Cast", [value], {"to": tensor.dtype}, name=building.name(f"{value.name}/Cast"))
    cast.outputs[0].name = building.name(f"{value.name}/Cast_output")
    cast.outputs[0].shape, cast.outputs[0].type = ir.Shape(leaf.shape), ir.TensorType(tensor.dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    # Insert the Cast at the front, before all nodes that may read its output.
    graph.insert_before(graph[0], cast)
    value.const_value, value.type = place, ir.TensorType(kind)


# Export a torch model as a graph, with adapters in one of the `MODES`, and compare the graph with the torch model.
# onnxruntime runs the written graph on the example inputs. In every mode, the graph's outputs must equal the outputs of
# the torch model with injected adapters, up to rounding.


if TYPE_CHECKING:
    from torch import nn

    One = Adapter | str | PathLike[str]
    Adapters = One | Sequence[One] | Mapping[str, One] | None

MODES = ("merged", "attached", "slots")

RECORD = "adapterkit.export"
"""Key in the graph's metadata. Its value has the mode, the adapters' digests and the quantization if there is one."""


@checks_types
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
    """Export a torch model as an ONNX graph with torch's dynamo exporter. Tensors and nodes keep the modules' names.

    Args:
        torch_model: the model, in evaluation mode; the export leaves it unchanged.
        args: an example of the model's positional arguments.
        out: the file to write. If the tensors have more than 64 MB, they go into a data file: `out` with `.data`
            appended.
        adapter: one adapter, several, or a mapping from names to adapters. In the modes `merged` and `attached`, all
            adapters apply together. In mode `slots`, each adapter gets a separate file.
        mode: `merged` folds adapters into the weights, in float64 with one rounding; `attached` adds nodes that compute
            the adapters' formulas; `slots` makes the adapters' tensors optional inputs of the graph and writes
            `.onnx_adapter` files beside the graph.
        kwargs: an example of the model's keyword arguments.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
        dynamic_shapes: the dynamic sizes, as for `torch.onnx.export`.
        opset: the opset version; torch's default if not given.
        inside: if `torch_model` is a wrapper, the name of its attribute that holds the model. The names of tensors,
            nodes and targets are then relative to that attribute.
        also: more examples of `args`, for example with other sizes. The check also runs the graph on these examples.
        quantize: `int8` or `int4` quantizes the linear layers with onnxruntime's quantizers; see quantizing.py.
            The report gives the error of each weight in `GraphReport.damage`, and the error of the outputs in
            `GraphReport.difference`.
        share: a safetensors file in the folder of `out`, or a folder of such files. The graph refers to the weights in
            these files instead of storing a copy.
        rename: rules that map unresolved target names to names in the model, as in `adapterkit.merge`.
        allow_partial: True if the graph is one part of a model, such as its encoder. In mode `slots`, the export then
            omits targets that the graph lacks (listed in `GraphReport.left`), and each adapter file is named
            `PART.NAME.onnx_adapter`.
        check: run the graph in onnxruntime, and compare its outputs with the torch model's. A quantized graph is also
            compared with a copy of the graph whose weights are dequantized.

    Raises:
        UsageError: an argument is invalid, or the model is in training mode.
        TargetNotFound, ShapeMismatch: an adapter does not belong to this model.
        NotMergeable: an adapter changes more than weights, or a weight is tied.
        Unsupported: torch cannot export the model, or a layer does not support the method of an update.
        CheckFailed: the graph's outputs differ from torch's by more than rounding explains. In that case, no file is
            left at `out`.
    """
    from ..torch.inject import config_of_model

    target, named = Path(path_text(out)), _named(adapter)
    if isinstance(args, Mapping) or not isinstance(args, Sequence):
        cure = "Pass a mapping as kwargs=, and a tensor as args=(tensor,)"
        raise UsageError(f"args is a {type(args).__name__}, but must be a tuple", where="args", cure=cure)
    _check_call(torch_model, target, named, mode, allow_partial)
    _check_weights(quantize, share)
    adapters = read_adapters(adapter)
    adapters = dict(zip(adapters, renamed(list(adapters.values()), rename), strict=True))
    options: dict[str, Any] = {
        "input_names": input_names, "output_names": output_names, "dynamic_shapes": dynamic_shapes,
        "opset_version": opset, "inside": inside,
    }  # fmt: skip
    model = getattr(torch_model, inside) if inside else torch_model
    config = config_of_model(model)
    examples: list[Example] = [(tuple(args), dict(kwargs or {})), *((tuple(one), {}) for one in also)]
    outcome = CheckOutcome(None)
    left: dict[str, tuple[Target, ...]] = {}
    stays: tuple[Path, ...] = ()
    if share is not None:
        weights = opened_base(share)
        # Refuse files in the wrong folder now, because the trace takes minutes.
        _check_place(weights.tensors, target)
        stays = weights.files
    numbered = steps(steps_of(mode, quantize, check))
    with placing(target, stays=stays, inputs=files_of_adapters(named)) as place, numbered:
        path = place.path
        # Also write the float graph to a file: the quantizer reads this file, and the check compares it with torch.
        plain = path if quantize is None else place.scratch / "float.onnx"
        with attached(model, adapters, mode):
            if mode == "attached" and any(getattr(u, "asks", ()) for one in adapters.values() for _, u in one):
                _first_call(torch_model, *examples[0])
            graph = traced(torch_model, args, kwargs, **options)
            if mode == "slots" and allow_partial:
                adapters, left = _split_by_target(graph, adapters, config)
            places = _opened(graph, adapters, config) if mode == "slots" else []
            if share is not None:
                share_weights(graph, share, target)
            _written(graph, plain, _note(mode, adapters, quantize), None if quantize is None else model)
        damage: dict[str, dict[str, float]] = {}
        if quantize is not None:
            damage = packed(plain, quantize, path)
        if mode == "slots":
            for name, each in adapters.items():
                write_adapter(path, each, _file(path, name, allow_partial))
        runs = _runs(model, path, adapters, mode, allow_partial)
        if check:
            outcome = _checked(torch_model, examples, plain, path, runs, quantize)
    return GraphReport(
        target, place.files, tuple(places), outcome.difference, outcome.note, damage, outcome.reference, left=left
    )  # fmt: skip


def _split_by_target(
    graph: ir.Model, adapters: Mapping[str, Adapter], config: Mapping[str, JsonValue] | None
) -> tuple[dict[str, Adapter], dict[str, tuple[Target, ...]]]:
    """Split each adapter into the targets that the graph has and the targets that the graph lacks.

    Returns:
        two maps whose keys are the adapters' names. The first map has each adapter with only the targets that the graph
        has; adapters without such a target are omitted. The second map has the targets that the graph lacks.
    """
    split = {name: taken(graph, adapter, None, config) for name, adapter in adapters.items()}
    kept_parts = {name: kept for name, (kept, _) in split.items() if kept.updates}
    return kept_parts, {name: lost for name, (_, lost) in split.items()}


def steps_of(mode: str, quantize: str | None, check: bool) -> int:
    """Return the number of progress steps that an export reports: tracing, converting, and the optional steps."""
    return 2 + (mode == "slots") + (quantize is not None) + check


def read_adapters(adapters: Adapters) -> dict[str, Adapter]:
    """Read the adapters of an export; return a map from names to adapters."""
    return {name: loaded(one, None)[0] for name, one in _named(adapters).items()}


def files_of_adapters(adapters: Adapters) -> list[Path]:
    """Return the files from which an export reads its adapters."""
    return [file for one in _named(adapters).values() for file in inputs_of(one, None)]


def _first_call(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Run the model once before the trace.

    Some adapter formulas create a network in the model's first call, and a network cannot be created during a trace.

    Raises:
        Unsupported: a formula does not support this call.
    """
    try:
        outputs_of(model, args, kwargs)
    except Unsupported as error:
        cure = "Export the model without the adapter, and inject the adapter into the graph"
        raise Unsupported(error.why, where=error.where, cure=cure) from None


def _checked(
    model: nn.Module, examples: Sequence[Example], plain: Path, out: Path, runs: Mapping[str | None, Run],
    quantize: str | None,
) -> CheckOutcome:  # fmt: skip
    """Compare the graph's outputs with torch's; for a quantized graph, first compare the float graph with torch."""
    from .session import Session

    stage("running the graph and comparing it with the model")
    try:
        # onnxruntime optimizes a graph every time that it loads the graph, so load each graph only once.
        # The last session is the session of the graph in `out`, and `by_reference` reuses it.
        session = Session(plain)
        difference = compared(model, examples, plain, session, runs)
        if quantize is not None:
            # Compare the quantized graph with a copy whose weights are dequantized. Neither graph rounds the inputs of
            # layers, so the outputs of the two graphs must agree. The difference from torch is the quantization error.
            # This error is reported, and the check passes even if the error is large.
            unpacked, exact = plain.with_name("unpacked.onnx"), plain.with_name("exact.onnx")
            as_floats(out, unpacked)
            with_exact_inputs(out, exact)
            compared_packed(exact, unpacked, examples)
            session = Session(out)
            difference = compared(model, examples, out, session, runs, judged=False)
    except Unsupported as error:
        return CheckOutcome(None, f"not run: {error.why}")
    return CheckOutcome(difference, None, by_reference(out, session, examples[0]))


def _runs(model: nn.Module, out: Path, adapters: Mapping[str, Adapter], mode: str, part: bool) -> dict[str | None, Run]:
    """Return the runs that the check compares.

    In mode `slots`, the first run has no adapter, and each adapter gets a separate run. In other modes, there is only
    one run, with all adapters.
    """
    if mode != "slots":
        return {None: (lambda: injected(model, adapters), None)}
    runs: dict[str | None, Run] = {None: (lambda: injected(model, {}), None)}
    for name, adapter in adapters.items():
        runs[name] = (partial(injected, model, {name: adapter}), _file(out, name, part))
    return runs


def _named(adapter: Adapters) -> dict[str, One]:
    """Return a map from names to adapters.

    If the caller passes no names, an adapter gets the name of its file or folder. An `Adapter` in memory is named
    `adapter`.
    """
    if adapter is None:
        return {}
    if isinstance(adapter, Mapping):
        return dict(adapter)
    several = [adapter] if isinstance(adapter, str | PathLike | Adapter) else list(adapter)
    named: dict[str, One] = {}
    for one in several:
        name = "adapter" if isinstance(one, Adapter) else _stem(one)
        if name in named:
            cure = "Rename one of the files, or pass a dictionary with a name for each adapter (adapter={NAME: PATH})"
            raise UsageError(f"two adapters have the name {name!r}", where="adapter", cure=cure)
        named[name] = one
    return named


def _stem(path: str | PathLike[str]) -> str:
    name = str(path).rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return name.removesuffix(".safetensors") or "adapter"


def _check_call(model: object, out: Path, adapters: Mapping[str, object], mode: str, part: bool) -> None:
    from torch import nn

    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}", where="mode", cure=f"Known: {', '.join(MODES)}")
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}, not a torch module", cure="Pass an nn.Module")
    if model.training:
        raise UsageError("the model is in training mode", cure="Call model.eval() first")
    if mode == "slots" and not adapters:
        raise UsageError(
            "mode slots needs an adapter", where="adapter", cure="Pass the adapters whose targets get slots (adapter=)"
        )
    for name in adapters:
        if not name or name.startswith(".") or any(sign in name for sign in "/\\:\0"):
            why = f"the adapter's name {name!r} cannot name a file"
            raise UsageError(why, where="adapter", cure="Give the adapter another name")
    if out.is_dir():
        raise UsageError("the output is a folder, but must be a file", path=out, cure="Pass the path of a .onnx file")
    if not out.parent.is_dir():
        raise StorageError("no such folder", path=out.parent, cure="Make the folder first")
    files = [_file(out, name, part) for name in adapters if mode == "slots"]
    for file in (out.with_name(f"{out.name}.data"), *files, *map(sidecar, files)):
        if file.exists():
            raise StorageError("already there", path=file, cure="Remove the file, or write to another folder")


def _check_weights(quantize: str | None, share: object) -> None:
    if quantize is not None and quantize not in SCHEMES:
        raise UsageError(f"unknown scheme {quantize!r}", where="quantize", cure=f"Known: {', '.join(SCHEMES)}")
    if quantize is not None and share is not None:
        cure = "Omit one: --quantize (quantize=) or --share-weights (share_weights=, share=)"
        raise UsageError(
            "packed weights cannot be shared, because they differ from the weights in the base's files",
            where="share",
            cure=cure,
        )


def _file(out: Path, name: str, part: bool) -> Path:
    """Return the path of an adapter's `.onnx_adapter` file; if `part`, the file name begins with the graph's name."""
    return out.with_name(f"{out.stem}.{name}.onnx_adapter" if part else f"{name}.onnx_adapter")


def _opened(
    graph: ir.Model, adapters: Mapping[str, Adapter], config: Mapping[str, JsonValue] | None
) -> list[ResolvedTarget]:
    """Add slots to the graph for every target of the adapters; adapters with the same target share its slots."""
    places: dict[tuple[str, str], ResolvedTarget] = {}
    for name, adapter in adapters.items():
        for place in resolve(graph, adapter, tying=Tying(config=config)):
            first = places.setdefault((str(place.asked), str(place.target)), place)
            if _form(first) != _form(place):
                why = f"adapter {name!r} cannot share slots: an earlier adapter has another method or other tensors"
                raise Unsupported(why, where=str(place.asked), cure="Export a separate graph for this adapter")
    building = Building(graph)
    slots = Slots(building)
    attach(list(places.values()), building, slots)
    building.settle()
    slots.record()
    return list(places.values())


def _form(place: ResolvedTarget) -> list[object]:
    """Return the properties that must be equal for two adapters to share a target's slots."""
    return [
        # Adapters may have different scalings, because the scaling has a separate slot.
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
