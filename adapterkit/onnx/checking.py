"""Check a written graph: run it in onnxruntime, and compare it with a graph that was changed by another method."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter
from ..errors import CheckFailed, Malformed, NotMergeable, Unsupported, first_line
from ..io.lazy import as_array
from ..io.ort_adapter import read_ort_adapter
from ..io.stages import stage
from .attaching import attach
from .building import Array, Building
from .experts import EXPERT
from .experts import as_floats as experts_as_floats
from .folding import fold, unpacked
from .model_file import GraphSource, inline, opened
from .operands import attribute
from .resolving import resolve
from .rowwise import INDEX
from .saturation import Saturation, quantizers
from .saturation import compared as saturation
from .slots import neutral_of, slots_of
from .trial_inputs import SIZES, Feeds, Sizes, numbers_in, sizes_beside, trial_inputs_for
from .unblocking import is_reordered, unblock
from .unrounded import ROUGH, obstacle, rounds, unround
from .widening import as_fed, started, widened, widened_note

if TYPE_CHECKING:
    import onnx

    from ..io.checkpoint import Checkpoint
    from .providers import OrtSession
    from .reading import Base, Model
    from .resolved import ResolvedTarget
    from .tying import Tying

SMALL = 1 << 25
"""Size in bytes of the largest model that the reference implementation runs, data files included."""

FEW = 1 << 16
"""Largest number of input elements on which the reference implementation runs."""

RECURRENT = (b"LSTM", b"GRU", b"RNN")
"""Operators for which onnxruntime packs stored weights. Packing changes the order of summation; see `_computed`."""

STATIC = (b"QuantizeLinear", b"QLinear", b"QGemm")
"""Parts of the names of statically quantized operators. `_saturation` skips graphs whose bytes contain none of them."""

STEP = 1e-2
"""Largest accepted difference between an integer operator and the same operator in floating point, relative to the
largest output. It allows a few rounding steps."""

HALF_STEP, ROUNDINGS = 1 / 256, 3.0
"""`HALF_STEP` is half a rounding step of 8 bits, relative to the largest value. `_most_rounded` changes scales, weights
and biases by up to `HALF_STEP` of their values, and measures how much the outputs change. The accepted difference is
`ROUNDINGS` times this change."""


def reference_outputs(model: Path | bytes, feeds: Feeds) -> list[Array] | None:
    """Return the outputs of ONNX's reference implementation; None if it cannot run the model or would take too long."""
    from onnx.reference import ReferenceEvaluator

    if numbers_in(feeds) > FEW:
        return None
    try:
        proto = _proto(model)
        if proto is None:
            return None
        nodes = {(node.domain, node.op_type) for node in proto.graph.node}
        if any(domain not in ("", "ai.onnx") or op in ROUGH or op.startswith("QLinear") for domain, op in nodes):
            return None
        defaults = {value.name for value in proto.graph.initializer}
        taken = {value.name for value in proto.graph.input}
        given = {name: array for name, array in feeds.items() if name in taken | defaults}
        with np.errstate(all="ignore"):
            outputs: Any = ReferenceEvaluator(proto).run(None, given)
    except Exception:  # The operators of the reference implementation raise any type of error.
        return None
    return [np.asarray(array) for array in outputs]


def _proto(model: Path | bytes) -> onnx.ModelProto | None:
    """Load the model and its external data; return None if they have more than `SMALL` bytes in total."""
    import onnx

    if isinstance(model, bytes):
        return onnx.ModelProto.FromString(model) if len(model) <= SMALL else None
    proto = onnx.load(model, load_external_data=False)
    places = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
    outside = sum(int(entry.value) for entry in places if entry.key == "length")
    return onnx.load(model) if model.stat().st_size + outside <= SMALL else None


# Measure how much the outputs of two graphs differ, and compute the largest difference that rounding alone can cause.


TOLERANCE = {"f": 1e-5, "V": 3e-2}
"""Largest accepted difference, relative to the largest output: "f" for outputs of float32 and float64, "V" for outputs
of 16 bits or fewer."""

NOISE, MOST_NOISE = 10.0, 1e-4
"""Two limits for deep graphs, which round more often. A graph's rounding noise is the difference between its outputs
with and without onnxruntime's optimizations. A difference of up to `NOISE` times this noise is accepted, but never
more than `MOST_NOISE`."""


def difference_of(got: Sequence[object], wanted: Sequence[object]) -> float:
    """Return the largest difference in any floating-point output, divided by this output's largest value in `wanted`.

    Return infinity if the shapes differ, or if NaNs and infinities are not at the same indices.
    """
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        a, b = (np.asarray(array) for array in (one, other))
        # The bfloat16 and float8 dtypes of ml_dtypes have the kind "V".
        if a.dtype.kind not in "fV":
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        there = np.isfinite(b)
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), there):
            return float("inf")
        if not np.array_equal(a[~there], b[~there], equal_nan=True):
            return float("inf")
        if there.any():
            worst = max(worst, float(abs(a[there] - b[there]).max() / max(abs(b[there]).max(), 1e-30)))
    return worst


def is_narrow(outputs: Sequence[object]) -> bool:
    """Whether any output has a floating-point dtype of 16 bits or fewer."""
    arrays = (np.asarray(one) for one in outputs)
    return any(array.dtype.kind in "fV" and array.dtype.itemsize < 4 for array in arrays)


def most_of_oracles(outputs: Sequence[object]) -> float:
    """Return the largest accepted difference between the outputs of onnxruntime and of the reference implementation."""
    return TOLERANCE["V"] if is_narrow(outputs) else MOST_NOISE


# Run each written graph in onnxruntime on trial inputs, and compare it with a second graph that was changed by another
# method: an injection is compared with a merge, and a merge with an injection. An injection turns the formulas into
# nodes; a merge computes them in float64. So an error in one of the two shows as a difference.


LARGE = 1 << 29
"""Models whose tensors have more bytes than this are not loaded a second time for a check."""


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """The result of a check.

    Attributes:
        difference: the largest difference between the outputs of the two graphs, relative to the largest output value.
            Graphs that round activations to integers are compared without this rounding if possible.
        note: why `difference` is None, or what the check could not cover.
        reference: the largest difference between the outputs of ONNX's reference implementation and onnxruntime. It is
            None if the reference implementation did not run, or if it may be wrong; see `_second`.
        saturation: how many values static quantization clips; None if the graph has no static quantization.
    """

    difference: float | None
    note: str | None = None
    reference: float | None = None
    saturation: Saturation | None = None


def checked_injection(
    model: Model, adapter: Adapter, base: Checkpoint | None, out: Path, beside: Path | None,
    given: Feeds | None = None, *, alone: bool = False, tying: Tying | None = None, by_rows: bool = False,
) -> CheckOutcome:  # fmt: skip
    """Check the graph that an injection wrote: compare it with a merge of the same adapter into the original graph.

    Args:
        model: the original graph.
        adapter: the injected adapter.
        base: the weights that the graph was exported from.
        out: the written graph.
        beside: for a graph with slots, the `.onnx_adapter` file that fills the slots. The check fills the slots only
            from this file, as a user does, so it fails if the file has no tensor for a slot. The check also runs the
            graph with empty slots, and compares this run with the original graph.
        given: inputs to run on, by name.
        alone: True if only an injection can make the change, as for attention prefixes. In that case, the check runs
            the graph, but has no second graph to compare it with.
        tying: the choices for tied layers; they must be the same as for the injection.
        by_rows: True if the slots contain several adapters, and each row of a batch selects one. In that case, the
            check also runs a batch in which only one row uses the adapter.

    Raises:
        CheckFailed: the difference is larger than rounding explains, the written graph does not run, or the file in
            `beside` leaves a slot unfilled.
    """
    stage("running the graph and comparing it")
    source = opened(model)
    if (why := _too_large(source)) is not None:
        return CheckOutcome(None, why)
    known = sizes_beside(source.path)
    plain = _in_order(source.model, base, given, known, out)
    fed = {} if beside is None else _fed(beside, out, source)
    if beside is not None:
        # `neutral` fills the slots that have no default. With it, the outputs must equal the original graph's outputs.
        neutral = as_fed(neutral_of(opened(out).model))
        outcome = _compared(plain, out, neutral, exact=True, given=given, known=known)
        if outcome.difference is None:
            return outcome
    if alone:
        return _compared(None, out, {}, plain=plain, given=given, known=known)
    # If `adapter` has no updates, the injection added at most new tokens and a prefix. The original graph must run on
    # the inputs of the check, so these inputs contain no new tokens, and they include the past. On such inputs, neither
    # new tokens nor a prefix may change the outputs.
    if not adapter.updates:
        return _compared(plain, out, {}, exact=True, given=given, known=known)
    other: bytes | None = None
    blocked: str | None = None
    bare = not _exact(source.model)
    if all(update.kind in ("additive", "weight") for _, update in adapter):
        building = Building(source.model)
        rough = _rounds(source.model)
        places = resolve(source.model, adapter, base, tying)
        blocked = _obstacle(plain) if rough else None
        smooth = rough and blocked is None
        # A merge cannot make every change: the layer may lack the bias that the update changes, or its weight may have
        # to stay packed. Then `other` stays None, and the outputs are not compared.
        with contextlib.suppress(NotMergeable, Unsupported):
            # Dequantize only if the whole graph can run without rounding activations. Otherwise, the two graphs would
            # differ, because a dequantized layer does not round its activations.
            packed = None if rough and not smooth else "dequantize"
            fold([(place, 1.0) for place in places], building, packed)
            other = inline(source.model)
        bare = bare or smooth
    bare = bare and other is not None
    if by_rows and other is not None:
        mixed = _compared_by_rows(other, plain, out, fed, known, bare)
        whole = _compared(other, out, fed, plain=plain, given=given, known=known, bare=bare, blocked=blocked)
        return whole if mixed is None else replace(whole, difference=max(mixed, whole.difference or 0.0))
    return _compared(other, out, fed, plain=plain, given=given, known=known, bare=bare, blocked=blocked)


def _compared_by_rows(
    wanted: bytes, plain: bytes, out: Path, fed: Feeds, known: Sizes, bare: bool
) -> float | None:  # fmt: skip
    """Run a batch of two rows, of which only the first uses the adapter, and compare each row with its expected output.

    The graph with merged weights computes the expected output of the first row. The original graph computes the
    expected output of the second row.

    Raises:
        CheckFailed: a row differs by more than rounding explains.
        Unsupported: the graph does not run on a batch of two, or the adapter changes no output whose first axis is the
            batch.
    """
    stack = {name: np.concatenate([array, np.zeros_like(array)]) for name, array in fed.items()}
    why = "no inputs"
    for sizes in (*(sizes for sizes in SIZES if sizes[0] == 2), (2, 1, 4, 4)):
        try:
            session = _session(plain, bare)
            feeds = trial_inputs_for(session, sizes, known)
            base, merged = session.run(None, feeds), _session(wanted, bare).run(None, feeds)
            got = _session(str(out), bare).run(None, {**feeds, **stack, INDEX: np.array([0, 1])})
        except Exception as error:  # onnxruntime's errors have no common base class.
            why = first_line(error)
            continue
        rows = [(a, m, b) for a, m, b in zip(got, merged, base, strict=True) if np.shape(a)[:1] == (2,)]
        first = difference_of([a[:1] for a, _, _ in rows], [m[:1] for _, m, _ in rows])
        second = difference_of([a[1:] for a, _, _ in rows], [b[1:] for _, _, b in rows])
        if rows and difference_of([m for _, m, _ in rows], [b for _, _, b in rows]) > 0:
            most, _ = _limit(wanted, feeds, merged, max(first, second), bare)
            _judge(max(first, second), out, most)
            return max(first, second)
        why = "the adapter changes no output whose first axis is the batch"
    cure = "Export the model with a dynamic batch size, or inject the adapter with --mode slots (mode='slots')"
    raise Unsupported(f"the graph cannot be checked on a batch of two ({why})", path=out, cure=cure)


def _fed(beside: Path, out: Path, source: GraphSource) -> Feeds:
    """Read a graph's `.onnx_adapter` file, and return its tensors, which fill the graph's slots.

    Raises:
        CheckFailed: the file leaves a slot of the graph unfilled.
    """
    feeds = {name: as_array(leaf) for name, leaf in read_ort_adapter(beside).tensors.items()}
    slots = slots_of(opened(out).model).keys() - slots_of(source.model).keys() - {INDEX}
    if empty := sorted(slots - feeds.keys()):
        raise CheckFailed(f"the .onnx_adapter file has no tensor for the slot {empty[0]!r}", path=out, cure=_REPORT)
    return as_fed(feeds)


def checked_merge(
    model: Model, adapters: Sequence[Adapter], factors: Sequence[float], base: Base | None, out: Path,
    quantized: str | None = None, given: Feeds | None = None, tying: Tying | None = None,
    beside: Sequence[ResolvedTarget] = (),
) -> CheckOutcome:  # fmt: skip
    """Compare the merged graph with an injection of the adapter into the original graph.

    If the merge dequantized packed weights, the check dequantizes the same weights of the original graph before the
    injection. If the merge requantized weights, the difference includes the requantization error, so the check returns
    the difference, however large it is. If the merge added nodes beside packed weights instead of changing the weights,
    the check compares the merged graph with a graph whose weights were dequantized and then merged.

    Raises:
        CheckFailed: the difference is larger than rounding explains.
    """
    stage("running the graph and comparing it")
    if beside:
        return _checked_beside(model, adapters, factors, base, out, quantized, given, tying)
    if len(adapters) > 1 or factors[0] != 1:
        return CheckOutcome(None, "the check can repeat the merge as an injection only for one adapter with weight 1")
    from ..io.checkpoint import opened as opened_base

    source = opened(model)
    if (why := _too_large(source)) is not None:
        return CheckOutcome(None, why)
    weights, known = None if base is None else opened_base(base), sizes_beside(source.path)
    plain, building = _in_order(source.model, weights, given, known, out), Building(source.model)
    places = resolve(source.model, adapters[0], weights, tying)
    blocked = _obstacle(plain) if (rough := _rounds(source.model)) else None
    smooth = rough and blocked is None
    # The merge may change only some layers. The others stay packed, and may round their inputs. This rounding would
    # turn a difference in the last bit into a whole rounding step, so run both graphs without it.
    bare = smooth or (quantized == "dequantize" and not _exact(source.model))
    # An injection cannot add nodes that change packed experts, so dequantize the experts before the injection.
    try:
        places = (unpacked if quantized == "dequantize" else experts_as_floats)(places, building)
        attach(places, building)
    except Unsupported:  # E.g. recurrent layers: a merge can change their weights; added nodes cannot.
        return _compared(None, out, {}, plain=plain, given=given, known=known)
    building.settle()
    judged, other = quantized != "requantize", inline(source.model)
    return _compared(other, out, {}, plain=plain, judged=judged, given=given, known=known, bare=bare, blocked=blocked)


def _checked_beside(
    model: Model, adapters: Sequence[Adapter], factors: Sequence[float], base: Base | None, out: Path,
    quantized: str | None, given: Feeds | None, tying: Tying | None,
) -> CheckOutcome:  # fmt: skip
    """Check a merge that left weights packed: compare it with a merge that dequantizes the weights first.

    The written graph keeps the packed weights. Nodes that the merge added beside these weights apply the change.
    """
    from ..io.checkpoint import opened as opened_base

    source = opened(model)
    if (why := _too_large(source)) is not None:
        return CheckOutcome(None, why)
    weights, known = None if base is None else opened_base(base), sizes_beside(source.path)
    plain, building = _in_order(source.model, weights, given, known, out), Building(source.model)
    rough = _rounds(source.model)
    blocked = _obstacle(plain) if rough else None
    smooth = rough and blocked is None
    bare = smooth or not _exact(source.model)
    folds = [
        (p, f) for one, f in zip(adapters, factors, strict=True) for p in resolve(source.model, one, weights, tying)
    ]
    other: bytes | None = None
    # A dequantized layer does not round its activations. If the written graph cannot run without rounding, the two
    # graphs would differ, so do not compare them.
    if smooth or not rough:
        with contextlib.suppress(NotMergeable, Unsupported):
            fold(folds, building, "dequantize")
            other = inline(source.model)
    bare, judged = bare and other is not None, quantized is None
    return _compared(other, out, {}, plain=plain, judged=judged, given=given, known=known, bare=bare, blocked=blocked)


def _in_order(model: ir.Model, base: Checkpoint | None, given: Feeds | None, known: Sizes, out: Path) -> bytes:
    """Return the original graph, with plain convolutions in place of convolutions in onnxruntime's own layouts.

    Raises:
        CheckFailed: the original graph and the graph with plain convolutions differ.
    """
    first = inline(model)
    if not is_reordered(model):
        return first
    unblock(model, base)
    second, most = inline(model), TOLERANCE["V"] if _rounds(model) else MOST_NOISE
    for sizes in SIZES if given is None else SIZES[:1]:
        try:
            session = started(first)
            feeds = trial_inputs_for(session, sizes, known) if given is None else _of_its_inputs(given, session)
            results = session.run(None, feeds)
        except Exception:  # onnxruntime's errors have no common base class; other sizes may run.
            continue
        if (difference := difference_of(started(second).run(None, feeds), results)) > most:
            why = (
                "the original graph's convolutions and the same convolutions in a plain layout differ by "
                f"{difference:.3g} times the largest output: the graph was optimized for blocks of another size"
            )
            cure = "Optimize the graph again on this processor; or turn the check off: --no-check (check=False)"
            raise CheckFailed(why, path=out, cure=cure)
        break
    return second


def _exact(model: ir.Model) -> bool:
    """Whether onnxruntime, with default options, never rounds the inputs of layers with packed weights.

    onnxruntime may round the inputs of a node that it fuses with a DequantizeLinear, and the inputs of a MatMulNBits
    whose `accuracy_level` allows rounding.
    """
    return not any(
        node.op_type == "DequantizeLinear" or attribute(node, "accuracy_level", 0) > 1
        for node in model.graph.all_nodes()
    )


def _rounds(model: ir.Model) -> bool:
    """Whether a graph rounds activations to integers."""
    return any(rounds(node) for node in model.graph.all_nodes())


def _obstacle(model: bytes) -> str | None:
    """Return the operator and name of a node that cannot run without rounding activations; None if all nodes can."""
    import onnx

    return obstacle(ir.from_proto(onnx.ModelProto.FromString(model)))


def _session(model: bytes | str, bare: bool) -> OrtSession:
    """Start a session. If `bare`, turn off optimizations, and avoid rounding activations if possible.

    Rounding could make the outputs of two correct graphs differ.
    """
    return started(_unrounded(model), optimized=False) if bare else started(model)


def _unrounded(model: bytes | str) -> bytes:
    """Return a copy of the graph that rounds no activations, or as few as possible."""
    import onnx

    proto = onnx.ModelProto.FromString(model) if isinstance(model, bytes) else onnx.load(model)
    model_ir = ir.from_proto(proto)
    if not unround(model_ir):
        model_ir = ir.from_proto(proto)
        for node in model_ir.graph.all_nodes():
            node.attributes.pop("accuracy_level", None)
    data: bytes = ir.to_proto(model_ir).SerializeToString()
    return data


INVALID = re.compile(r"InferenceError|Type Error|INVALID_GRAPH|[Ii]nvalid model")
"""Matches onnxruntime's errors about graphs that break the rules of ONNX, such as nodes that mix types. Other errors do
not match: they mean that this onnxruntime lacks a kernel, a custom operator, or support for a newer opset."""


def refuse_invalid(source: GraphSource) -> None:
    """Refuse an invalid original graph, which onnxruntime cannot load even without the adapter.

    Converters to float16 write such graphs, because they forget to convert some tensors in the branches of an If.

    Raises:
        Malformed: the graph is invalid; the error quotes onnxruntime's reason.
    """
    if _too_large(source) is not None:
        return
    try:
        started(inline(source.model), optimized=False)
    except Exception as error:  # onnxruntime's errors have no common base class.
        if INVALID.search(str(error)):
            why = f"onnxruntime cannot load this graph, even without the adapter ({first_line(error)})"
            cure = (
                "Export or convert the model again, for example as separate parts instead of one merged decoder; to "
                "write the file anyway, turn the check off: --no-check (check=False)"
            )
            raise Malformed(why, path=source.path, cure=cure) from None


def _computed(model: bytes | str) -> bytes | str:
    """Insert an Identity before each weight of a recurrent layer, so that onnxruntime does not pack the weight.

    onnxruntime packs only stored weights of recurrent layers, and sums in another order if a weight is packed. In a
    graph with slots, nodes compute the weights, so onnxruntime does not pack them. It must not pack the weights of the
    original graph either, because the check compares the two graphs.
    """
    import onnx

    data = model if isinstance(model, bytes) else Path(model).read_bytes()
    if not any(op in data for op in RECURRENT):
        return model
    changed_model = ir.from_proto(onnx.ModelProto.FromString(model) if isinstance(model, bytes) else onnx.load(model))
    for node in [one for one in changed_model.graph.all_nodes() if one.op_type.encode() in RECURRENT]:
        for at in (1, 2):
            copy = ir.node("Identity", [node.inputs[at]])
            assert node.graph is not None
            node.graph.insert_before(node, [copy])
            node.replace_input_with(at, copy.outputs[0])
    changed: bytes = ir.to_proto(changed_model).SerializeToString()
    return changed


def _too_large(source: GraphSource) -> str | None:
    total = sum(
        value.const_value.nbytes
        for graph in source.model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    return f"the graph has {total} bytes of tensors, which is too many to load twice" if total > LARGE else None


def _compared(wanted: bytes | None, out: Path, more: Feeds, **options: Any) -> CheckOutcome:
    """Call `_run_both`, and add a note if the check of a bfloat16 graph ran in float32."""
    outcome = _run_both(wanted, out, more, **options)
    if outcome.difference is None:
        return outcome
    note = widened_note(opened(out).model, out)
    return replace(outcome, note="; ".join(filter(None, [outcome.note, note])) or None)


def _run_both(
    wanted: bytes | None, out: Path, more: Feeds, *, exact: bool = False,
    plain: bytes | None = None, judged: bool = True, given: Feeds | None = None, known: Sizes | None = None,
    bare: bool = False, blocked: str | None = None,
) -> CheckOutcome:  # fmt: skip
    """Run two graphs on the same inputs, and compare their outputs.

    Without `given`, make up inputs, and try several sizes until both graphs run and the adapter changes an output.

    Args:
        wanted: the graph that `out` is compared with; None to only run `out`.
        out: the written graph.
        more: inputs that only `out` has, such as slots.
        exact: True if the outputs should be equal. If they differ, compare again without onnxruntime's optimizations,
            and accept a difference of up to `_most_empty`, or more if a `MoE` was split.
        plain: the graph without the adapter, to see whether the adapter has any effect on these inputs.
        judged: False to return the difference even if it is large, instead of raising an error.
        given: inputs to run on, by name.
        known: sizes of dynamic axes, from the configs beside the graph.
        bare: run both graphs without optimizations, and without rounding activations.
        blocked: the node that cannot run without rounding activations, if the graph has one. In that case, the accepted
            difference is at least `_most_rounded` of `wanted`.
    """
    first = wanted if wanted is not None else plain
    assert first is not None
    why, fails = "no inputs", ""
    unseen: CheckOutcome | None = None
    for sizes in SIZES if given is None else SIZES[:1]:
        try:
            session = _session(first, bare)
            feeds = trial_inputs_for(session, sizes, known) if given is None else _of_its_inputs(given, session)
            results = session.run(None, feeds)
        except Exception as error:  # onnxruntime's errors have no common base class.
            why = first_line(error)
            continue
        try:
            written = _session(str(out), bare)
            both = {**feeds, **_of_new_inputs(written, feeds, sizes, given, known), **more}
            got = written.run(None, both)
        except Exception as error:
            fails = first_line(error)
            continue
        clipped = _saturation(plain, out, feeds, both)
        if wanted is None:
            why = "no other method can make this change" if blocked is None else _UNJUDGED.format(blocked)
            why = f"the graph runs; its outputs were not compared, because {why}"
            return CheckOutcome(None, why, _second(out, plain, both, feeds, got), clipped)
        difference = difference_of(got, results)
        untried = None
        if judged and not exact:
            most, noise = _limit(wanted, feeds, results, difference, bare)
            if not bare and most < difference <= NOISE * noise:
                # Rounding alone changes these outputs this much, for example if sums cancel almost completely. So the
                # difference does not show an error. Try other inputs.
                why = f"on the inputs of the check, rounding alone changes the original graph's outputs by {noise:.2g}"
                unseen = CheckOutcome(None, why, None, clipped)
                continue
            if blocked is not None and difference > most:
                most = max(most, _most_rounded(wanted, feeds, results))
                # If rounding may change the outputs as much as the adapter does, a small difference proves nothing.
                if plain is not None and most >= difference_of(_of_plain(plain, feeds), results):
                    untried = f"the difference was not judged, because {_UNJUDGED.format(blocked)}"
            _judge(difference, out, most)
        if exact and difference > 0:
            # In a graph with slots, onnxruntime fuses other nodes than in the original graph, and so rounds
            # differently. A MatMul that is fused with a DequantizeLinear even rounds its input to 8 bits. So compare
            # again without optimizations.
            most = _most_empty(first)
            if EXPERT.encode() in out.read_bytes():  # A split MoE sums in another order than a MoE node.
                most = max(most, _limit(wanted, feeds, results, difference, bare)[0])
            results = started(_computed(wanted), optimized=False).run(None, feeds)
            got = started(_computed(str(out)), optimized=False).run(None, both)
            difference = difference_of(got, results)
            _judge(difference, out, most)
        reference = _second(out, wanted, both, feeds, got) if judged else None
        seen = plain is None or difference_of(got, _session(plain, bare).run(None, feeds)) > 0
        for name in _conditions(opened(out).model, feeds):
            other = _flipped(wanted, out, name, feeds, both, judged and blocked is None, bare)
            if other is None:
                untried = f"the branch for {name} = {not feeds[name].any()} does not run on the inputs of the check"
            difference = max(difference, other or 0.0)
        # If the adapter changes nothing on these inputs, equal outputs prove little, so try other sizes.
        if seen:
            return CheckOutcome(difference, untried, reference, clipped)
        why = "the adapter changes nothing on the inputs of the check"
        unseen = CheckOutcome(difference, why, reference, clipped)
    if unseen is not None:
        return unseen
    if fails:
        raise CheckFailed(f"the graph does not run ({fails})", path=out, cure=_REPORT)
    kind = "made-up" if given is None else "the given"
    return CheckOutcome(None, f"the graph does not run on {kind} inputs ({why})")


def _most_empty(model: bytes) -> float:
    """Return the largest accepted difference between a graph with empty slots and the original graph; often 0."""
    # In a graph with slots, other nodes may replace an integer operator (see `opened_up`). They round differently.
    if any(op in model for op in (b"QLinear", b"QGemm", b"QAttention")):
        return STEP
    # A fused attention node in 16 bits rounds less often than the nodes that replace it in a graph with slots.
    return TOLERANCE["V"] if b"Attention" in model and _computes_narrow(model) else 0.0


def _conditions(model: ir.Model, feeds: Feeds) -> list[str]:
    """Return the bool inputs that select a branch of an If, such as `use_cache_branch` in optimum's merged decoders."""
    read = [node.inputs[0] for node in model.graph.all_nodes() if node.op_type == "If"]
    names = dict.fromkeys(root.name or "" for value in read for root in _roots(value))
    return [name for name in names if name in feeds and feeds[name].dtype == np.bool_]


def _roots(value: ir.Value | None) -> list[ir.Value]:
    """Follow a condition back to a graph input or a stored value, through the first input of each node."""
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0] if node.inputs else None
    return [] if value is None else [value]


def _flipped(wanted: bytes, out: Path, name: str, feeds: Feeds, both: Feeds, judged: bool, bare: bool) -> float | None:
    """Negate the input `name`, which selects a branch of an If, and compare both graphs in the other branch.

    Returns:
        the difference, or None if `wanted` does not run in that branch.

    Raises:
        CheckFailed: the difference is larger than rounding explains, or `out` does not run although `wanted` does.
    """
    other = {name: np.asarray(~feeds[name])}  # `~` turns an array without axes into a scalar, which cannot be fed.
    try:
        results = _session(wanted, bare).run(None, {**feeds, **other})
    except Exception:  # onnxruntime's errors have no common base class; the sizes may fit only one branch.
        return None
    try:
        got = _session(str(out), bare).run(None, {**both, **other})
    except Exception as error:
        why = f"the graph does not run with {name}={bool(other[name].flat[0])} ({first_line(error)})"
        raise CheckFailed(why, path=out, cure=_REPORT) from None
    difference = difference_of(got, results)
    if judged:
        most, _ = _limit(wanted, {**feeds, **other}, results, difference, bare)
        _judge(difference, out, most)
    return difference


def _saturation(plain: bytes | None, out: Path, feeds: Feeds, both: Feeds) -> Saturation | None:
    """Count the values that static quantization clips, with and without the adapter."""
    # Parse the original graph only if its bytes contain the name of an operator in `STATIC`, because parsing takes as
    # long as an injection.
    if plain is None or not any(name in plain for name in STATIC):
        return None
    import onnx

    before, after = ir.from_proto(onnx.ModelProto.FromString(plain)), opened(out).model
    if not quantizers(after) and not any(node.op_type.startswith("QLinear") for node in after.graph.all_nodes()):
        return None
    moved = None
    if _obstacle(plain) is None:
        moved = tuple(
            difference_of(_session(model, False).run(None, given), _session(model, True).run(None, given))
            for model, given in ((plain, feeds), (str(out), both))
        )
    return replace(saturation(before, after, feeds, both), moved=moved)


def _second(out: Path, first: bytes | None, feeds: Feeds, plain_feeds: Feeds, got: Sequence[object]) -> float | None:
    """Return how much `got`, onnxruntime's outputs, differ from the outputs of ONNX's reference implementation.

    The reference implementation may be wrong. So if the difference is large, compare onnxruntime and the reference
    implementation on the graph `first`, too. If they agree on `first`, raise an error; otherwise, return None. Also
    return None if the reference implementation does not run.

    Raises:
        CheckFailed: the difference is large for `out`, but not for `first`.
    """
    expected = reference_outputs(widened(str(out)) or out, feeds)
    if expected is None:
        return None
    difference = difference_of(expected, got)
    if difference <= most_of_oracles(got):
        return difference
    before = None if first is None else reference_outputs(widened(first) or first, plain_feeds)
    if first is None or before is None:
        return None
    results = started(first).run(None, plain_feeds)
    if difference_of(before, results) > most_of_oracles(results):
        return None
    why = f"onnxruntime and ONNX's reference implementation differ by {difference:.3g} times the largest output"
    raise CheckFailed(why, path=out, cure=_REPORT)


def _of_its_inputs(given: Feeds, session: OrtSession) -> Feeds:
    names = {entry.name for entry in session.get_inputs()}
    return as_fed({name: array for name, array in given.items() if name in names})


def _of_plain(plain: bytes, feeds: Feeds) -> Sequence[object]:
    """Return the outputs of the graph without the adapter."""
    session = started(plain)
    outputs: Sequence[object] = session.run(None, _of_its_inputs(feeds, session))
    return outputs


def _of_new_inputs(
    session: OrtSession, feeds: Feeds, sizes: Sequence[int], given: Feeds | None, known: Sizes | None
) -> Feeds:
    """Return values for the inputs that only the written graph has, such as `task_ids`.

    An input that `given` does not contain gets zeros.
    """
    new = {entry.name for entry in session.get_inputs()} - feeds.keys()
    zeros = {
        name: np.zeros_like(array) for name, array in trial_inputs_for(session, sizes, known).items() if name in new
    }
    return zeros | {name: array for name, array in (given or {}).items() if name in zeros}


def _limit(
    wanted: bytes, feeds: Feeds, results: Sequence[object], difference: float, bare: bool
) -> tuple[float, float]:  # fmt: skip
    """Return the largest difference that rounding explains, and the graph's rounding noise (0 if not measured)."""
    if is_narrow(results):
        return TOLERANCE["V"], 0.0
    if difference <= TOLERANCE["f"]:
        return TOLERANCE["f"], 0.0
    # If a later layer rounds its inputs to integers or to 16 bits, a difference in the last bit of these inputs can
    # become a whole rounding step.
    if _computes_narrow(_unrounded(wanted) if bare else wanted):
        return TOLERANCE["V"], 0.0
    # Deep graphs round more, so measure the rounding noise: run the same graph without optimizations.
    noise = _noise(wanted, feeds, results, bare)
    return min(max(TOLERANCE["f"], NOISE * noise), MOST_NOISE), noise


def _noise(wanted: bytes, feeds: Feeds, results: Sequence[object], bare: bool) -> float:
    """Return how much onnxruntime's optimizations change a graph's outputs.

    `results` are the graph's outputs without optimizations if `bare`, otherwise its outputs with optimizations.
    """
    form = _unrounded(wanted) if bare else wanted
    return difference_of(started(form, optimized=bare).run(None, feeds), results)


def _most_rounded(wanted: bytes, feeds: Feeds, results: Sequence[object]) -> float:
    """Return the largest accepted difference between two correct graphs that round activations to integers.

    Two correct graphs may round the same activation differently. To estimate the effect, change the scales, weights and
    biases at random by up to half a rounding step, and measure how much the outputs change. Return infinity if a graph
    that was changed in this way does not run.
    """
    import onnx

    worst = 0.0
    for seed in range(3):
        rng, proto = np.random.default_rng(seed), onnx.ModelProto.FromString(wanted)
        read = {name for node in proto.graph.node if _scales(node.op_type) for name in node.input}
        for stored_array in proto.graph.initializer:
            if stored_array.name in read and stored_array.data_type in (
                onnx.TensorProto.FLOAT,
                onnx.TensorProto.FLOAT16,
            ):
                array = onnx.numpy_helper.to_array(stored_array)
                moved = array * (1 + rng.uniform(-HALF_STEP, HALF_STEP, array.shape))
                stored_array.CopyFrom(onnx.numpy_helper.from_array(np.asarray(moved, array.dtype), stored_array.name))
        try:
            got = started(proto.SerializeToString()).run(None, feeds)
        except Exception:  # onnxruntime's errors have no common base class.
            return float("inf")
        worst = max(worst, difference_of(got, results))
    return ROUNDINGS * worst


def _scales(op: str) -> bool:
    """Whether the stored floats among an operator's inputs are scales, weights or biases."""
    return op in ("QuantizeLinear", "DequantizeLinear", "QGemm", "MatMul", "Gemm", "Conv", "Add") or "QLinear" in op


def _computes_narrow(model: bytes) -> bool:
    """Whether a graph rounds activations to integers, or computes in float16 or bfloat16, whatever its outputs' dtype.

    The outputs' dtype is not enough, because converters to float16 keep 32-bit inputs and outputs and insert casts.
    Weights that are stored in 16 bits, but cast to 32 bits before use, do not count.
    """
    import onnx

    model_ir = ir.from_proto(onnx.ModelProto.FromString(model))
    if _rounds(model_ir):
        return True
    narrow = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    for node in model_ir.graph.all_nodes():
        if node.op_type == "Cast" and attribute(node, "to", 0) in narrow:
            return True
        read = [one.dtype or (one.const_value and one.const_value.dtype) for one in node.inputs if one is not None]
        if node.op_type != "Cast" and any(kind in narrow for kind in read):
            return True
    return False


def _judge(difference: float, out: Path, most: float) -> None:
    if difference <= most:
        return
    why = (
        f"the graph's outputs differ by {difference:.3g} times the largest output value "
        "from those of a graph that was changed by another method"
    )
    raise CheckFailed(why, path=out, cure=_REPORT)


_UNJUDGED = "two correct graphs may round differently, and {} cannot be computed without rounding"

_REPORT = "Report this bug. To keep the file, turn the check off: --no-check (check=False)"
