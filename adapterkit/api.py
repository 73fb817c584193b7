"""Public functions that accept paths and hub addresses; most other modules accept only opened files and adapters.

`adapterkit.names` is a function, so the package for names is called `adapterkit.naming`. If a subpackage were also
called `names`, importing it would replace the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from .core.adapter import Adapter, check_adapter
from .core.arguments import checks_types
from .core.tables import html_table
from .destination import Destination, WriteResult
from .errors import PASS_AN_ADAPTER, ShapeMismatch, TargetNotFound, UsageError, nearest, places_errors, public
from .formats import FORMATS, detect, read, warnings_of
from .io.checkpoint import opened
from .io.inputs import inputs_kept
from .io.locations import is_address, path_text
from .naming.binding import renamed
from .naming.binding.fitting import TO_REFUSE, check_base, name_map

if TYPE_CHECKING:
    from .formats import ReadOptions
    from .gating.result import Gate
    from .io.checkpoint import Checkpoint
    from .reporting.inspecting import Inspection
    from .reporting.report import AdapterReport


@checks_types
def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    to: str,
    format: str | None = None,  # noqa: A002 - as in `read`
    base: Checkpoint | str | PathLike[str] | None = None,
    compat: str | None = None,
    on_loss: str = "refuse",
    max_error: float | None = None,
    profile: str | None = None,
    match_base: bool = False,
    rename: str | Sequence[str] = (),
    overwrite: bool = False,
    made_from: str | None = None,
    **reading: Unpack[ReadOptions],
) -> WriteResult:
    """Write an adapter in another format, to a local path or a hub.

    Args:
        src: the path of the adapter, or its address, such as `hf://org/repo`.
        dst: the file, the folder or the address to write.
        to: the format to write, one of `FORMATS`.
        format: the format of `src`. If None, it is detected from the headers of `src`.
        base: the base model; some formats need it to resolve names or to order rows. If `to` is `onnx_adapter`, `base`
            may be an ONNX graph with slots (`.onnx`). The output then has the names, dtypes and layout of these slots.
        compat: `"formula"` applies the paper's formula, even if the training tool computed another formula. For further
            values, see `read`.
        on_loss: how to treat updates that the format cannot express: `refuse`, `fold`, `promote` or `drop`; see
            `write`.
        max_error: with `on_loss="promote"`, an update that the format cannot express may become a LoRA whose weight
            change has at most this relative error.
        profile: a program that will load the output and supports only a part of the format, such as `"vllm"`; see
            `write`.
        match_base: use the weight names that `base` stores, and split or join updates to match the stored weights.
        rename: rules that rename targets, each `FROM=TO` or `@FILE`.
        overwrite: replace an existing output at `dst`.
        made_from: a digest of all inputs and options. The digest is stored with the output; see `write`.
        reading: further arguments of `read`: alpha, rank, strict, strict_base, experts_order.

    Returns:
        The output's path and format, the numbers of targets and updates, one line for each omitted or rewritten update,
        and warnings.

    Raises:
        UsageError: `dst` is `src`, `to` is not a format, or `match_base` is set without a base.
        StorageError: `dst` exists, and `overwrite` is not set.
        AdapterkitError: as for `read` and `write`.

    Example:
        >>> adapterkit.convert("lora", "lora.gguf", to="gguf", base="base")  # doctest: +SKIP
    """
    if match_base and base is None:
        cure = "Pass --base (base=), or omit --match-base (match_base=)"
        raise UsageError("--match-base requires --base", cure=cure)
    if to not in FORMATS:
        raise UsageError(
            f"unknown format {to!r}", where="to", cure=nearest(to, FORMATS) or f"Known: {', '.join(FORMATS)}"
        )
    source, out = path_text(src), path_text(dst)
    if to == "onnx_adapter" and isinstance(base, str | PathLike) and str(base).lower().endswith(".onnx"):
        given = {"profile": profile, "max_error": max_error, "on_loss": on_loss if on_loss != "refuse" else None}
        for name, value in given.items():
            if value is not None:
                why = f"{name}={value} has no effect, because the slots of the graph determine the file's content"
                cure = f"Omit --{name.replace('_', '-')} ({name}=)"
                raise UsageError(why, where=name, cure=cure)
        adapter = read(source, format or detect(source), compat=compat, **reading)
        return _for_slots(adapter, source, out, base, rename, overwrite, made_from)
    with inputs_kept():
        checkpoint = None if base is None else opened(base)
        destination = Destination(out, [source], overwrite, format=to, base=base)
        destination.check()
        name = format or detect(source)
        adapter = read(source, name, checkpoint, compat=compat, **reading)
        if checkpoint is not None and match_base:
            adapter = adapter.bind(checkpoint, rename=rename)
        else:
            (adapter,) = renamed([adapter], rename)
        if name == to:
            from .io.locations import located
            from .loaders import spelled_anew

            adapter = spelled_anew(adapter, name, located(source))
    warnings = [*warnings_of(adapter), *base_warnings([source], [adapter], checkpoint)]
    return destination.write(
        adapter, on_loss, profile=profile, max_error=max_error, base=checkpoint, made_from=made_from, warnings=warnings
    )


def _for_slots(
    adapter: Adapter, source: str, out: str, graph: str | PathLike[str], rename: str | Sequence[str], overwrite: bool,
    made_from: str | None,
) -> WriteResult:  # fmt: skip
    """Write an adapter as an `.onnx_adapter` file for the slots of a graph."""
    from .io.staging import staged
    from .onnx import write_adapter

    path = Path(out)
    if is_address(out):
        why = "a file for the slots of a graph can only be written to a local path"
        raise UsageError(why, path=out, cure="Pass a local path, and push the file with adapterkit push")
    destination = Destination(out, [source], overwrite, format="onnx_adapter", inputs=[str(graph)])
    destination.check()
    with staged(path, overwrite=overwrite, inputs=destination.files, made_from=made_from) as scratch:
        write_adapter(graph, adapter, scratch, rename=rename)
    return WriteResult(out, "onnx_adapter", len(adapter.updates), len(adapter), (), tuple(warnings_of(adapter)))


def base_warnings(sources: Iterable[str], adapters: Iterable[Adapter], base: Checkpoint | None) -> list[str]:
    """Return a warning for each difference between `base` and the base that an adapter's files record.

    If `base` is None, return no warnings.
    """
    if base is None:
        return []
    differences = check_base([*zip(sources, adapters, strict=True)], base, strict=False)
    return [f"{why}{TO_REFUSE}" for why in differences]


@checks_types
def inspect(
    src: Adapter | Checkpoint | str | PathLike[str],
    *,
    base: Checkpoint | str | PathLike[str] | None = None,
    format: str | None = None,  # noqa: A002 - as in `read`
    compat: str | None = None,
    layers: bool = False,
    rename: str | Sequence[str] = (),
    base_weights: str | PathLike[str] | None = None,
    **reading: Unpack[ReadOptions],
) -> Inspection:
    """Describe an adapter, a base or an ONNX graph.

    The description is made from the headers of the files. Tensor values are read only for `layers`, for `base_weights`,
    and to compute the fingerprint of `base` if the adapter records a fingerprint.

    Args:
        src: the adapter, base or ONNX graph to describe. Pass a path, an address such as `hf://org/repo`, an `Adapter`
            or an open checkpoint. For an `Adapter` or an open checkpoint, all other arguments are ignored.
        base: the base of an adapter. If `base` is set, the description also shows whether the adapter fits the base.
        format: the format of an adapter. If None, it is detected from the headers.
        compat: for an adapter, `"formula"` applies the paper's formula, even if the training tool computed another
            formula. For further values, see `read`.
        layers: measure how much an adapter changes each layer. This reads all tensor values of the adapter.
        rename: rules that rename targets to names in the base, each `FROM=TO` or `@FILE`.
        base_weights: for a graph, the weights of its base model. If a node's name does not show its layer, the layer is
            found by comparing the node's weight with these weights.
        reading: further arguments of `read`: alpha, rank, strict, strict_base, experts_order.

    Returns:
        The description. Notebooks show it as a table, and its method `record()` returns it as plain data.

    Raises:
        UsageError: an argument does not apply to the path `src`, such as `base_weights` if `src` is not a graph.
        UnknownFormat: `src` is neither an adapter nor a base nor a graph.
        AdapterkitError: as for `read`.

    Example:
        >>> adapterkit.inspect("lora").totals["targets"]  # doctest: +SKIP
        154
    """
    from .reporting.inspecting import Inspection, adapter_record, base_record, inspected

    if isinstance(src, Adapter):
        data = adapter_record(src, "an adapter in memory", src.foreign.format if src.foreign else "adapterkit")
    elif not isinstance(src, (str, PathLike)):
        data = base_record(src.root, str(src.root))
    else:
        data = inspected(
            path_text(src), format=format, base=base, compat=compat, layers=layers, rename=rename,
            base_weights=base_weights, reading=reading,
        )  # fmt: skip
    return Inspection(data["kind"], data["path"], data)


@checks_types
@places_errors
def names(
    base: Checkpoint | str | PathLike[str],
    adapter: Adapter | str | PathLike[str] | None = None,
    *,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
    strict_base: bool = False,
) -> NameMap:
    """Match an adapter's targets to the weights of a base, and list the naming rules that matched them.

    Only headers are read. But if the adapter records the fingerprint of its base, `strict_base` also reads some values
    of the base's weights.

    Args:
        base: a folder, a weight file, an address on a hub, or an open checkpoint.
        adapter: the adapter, or its path. If None, the function lists the base's weight names, each with the names that
            other tools use for this weight.
        rename: rules for names that cannot be resolved, each `FROM=TO` or `@FILE`, as in `adapterkit.merge`.
        allow_partial: if a target matches no weight, add it to the result's list `missing`, instead of raising
            `TargetNotFound`.
        strict_base: refuse a base whose name, config or fingerprint differs from the values in the adapter's files.

    Returns:
        A dict with `base`, `model_type` and `family` (the name of the architecture file for the base, or None).

        With an adapter, the dict also has three lists. `targets` has a record for each matched target, with `target`
        (the name in the adapter), `path` (the name in the base), `rows` (the slice of the weight's rows, or None),
        `layout` (the order of the weight's axes) and `tensor` (the name of the stored tensor). `rules` has each rule
        and the number of targets that the rule matched. `missing` has the targets that match no weight.

        Without an adapter, the dict also has the list `weights`, with records of the base's modules. Modules whose
        names differ only in numbers share one record. A record has `name` (with `#` for each number), `tensors` (the
        number of modules that share the record) and `names` (the names that other tools use).

    Raises:
        CheckFailed: `strict_base` is set, and the adapter's files record a base that differs from `base`.
        TargetNotFound: a target matches no weight, or its name could mean two different weights.
        ShapeMismatch: the shape of an update does not fit its weight.
        UsageError: a rule in `rename` cannot be parsed.
    """
    checkpoint = opened(base)
    given = read(adapter, base=checkpoint) if isinstance(adapter, (str, PathLike)) else adapter
    if given is not None:
        check_adapter(given)
    if strict_base and given is not None:
        check_base([("the adapter" if isinstance(adapter, Adapter) else str(adapter), given)], checkpoint, strict=True)
    return NameMap(name_map(checkpoint, given, rename=rename, partial=allow_partial))


class NameMap(dict[str, Any]):
    """The dict that `names` returns. Notebooks show it as a table."""

    def __repr__(self) -> str:
        base = public(str(self["base"]))
        if "targets" in self:
            return f"NameMap({base!r}: {len(self['targets']):,} targets, {len(self['missing']):,} missing)"
        return f"NameMap({base!r}: {len(self['weights']):,} names)"

    def _repr_html_(self) -> str:
        rows = self["targets"] if "targets" in self else self["weights"]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        return html_table(repr(self), keys, [[row.get(key) for key in keys] for row in rows])


@checks_types
@places_errors
def report(
    adapters: Adapter | str | PathLike[str] | Sequence[Adapter | str | PathLike[str]],
    *,
    base: Checkpoint | str | PathLike[str] | None = None,
    merged: Checkpoint | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    rename: str | Sequence[str] = (),
    gate: Gate | Mapping[str, object] | str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> AdapterReport:
    """Measure adapters, and report the results as numbers, sentences and charts. Notebooks show the report.

    Args:
        adapters: one adapter or several, each an `Adapter`, a path or an address.
        base: the base of the adapters. With `base`, the report compares the adapters' changes with the base's weights,
            and also measures adapters whose changes depend on these weights.
        merged: the merged model. The report shows how much of each adapter's change this model contains. Requires
            `base`.
        out: an HTML file to write the report to.
        rename: rules for names that cannot be resolved, each `FROM=TO` or `@FILE`, as in `adapterkit.merge`.
        gate: the result of `adapterkit.gate`, the result's record, or a file with the output of
            `adapterkit gate --json`. The HTML page shows the gate's result in a separate section.
        overwrite: replace an existing file at `out`.
        progress: a function that is called after each step with the number of completed units of work and the total
            number of units. The total is an upper bound until all changes are measured.

    Returns:
        The report. Its attributes include `verdicts`, `measured` and `facts`. Its methods are `record()`, `html()`,
        `save(path)` and `figures(folder)`.

    Raises:
        UsageError: `adapters` is empty, or `merged` is set without `base`.
        StorageError: `out` exists, and `overwrite` is not set.
        Unsupported: `out` is set, and the package that draws charts, vl-convert-python, is not installed.
        AdapterkitError: an adapter cannot be read, or the adapters belong to different models.
    """
    from .io.locations import located
    from .io.staging import check_free
    from .reporting.report import build_page, gate_figures

    given = [adapters] if isinstance(adapters, (Adapter, str, PathLike)) else list(adapters)
    if not given:
        raise UsageError("no adapter was given", cure=PASS_AN_ADAPTER)
    if merged is not None and base is None:
        raise UsageError("--merged requires --base", where="merged", cure="Also pass --base BASE (base=)")
    if out is not None:
        check_free(Path(out), overwrite)
    # Recognize a `Gate` by its attribute `record`: a test with `isinstance` would import all of `adapterkit.gating`.
    record: Any = getattr(gate, "record", None)
    gate_record: Any = gate if record is None else record()
    figures = None if gate_record is None else gate_figures(gate_record)
    checkpoint = None if base is None else opened(base)
    with inputs_kept():
        loaded = [each if isinstance(each, Adapter) else _read_for(each, checkpoint) for each in given]
    paths = [None if isinstance(each, Adapter) else located(each) for each in given]
    page = build_page(
        loaded, _names_for(given), paths=paths, base=checkpoint, merged=None if merged is None else opened(merged),
        rename=rename, progress=progress, gate=figures,
    )  # fmt: skip
    if out is not None:
        page.save(out, overwrite=overwrite)
    return page


def _read_for(path: str | PathLike[str], base: Checkpoint | None) -> Adapter:
    """Read an adapter, and resolve its names with the base.

    If the adapter does not fit the base, read it without the base. The report then states that the adapter
    does not fit.
    """
    if base is None:
        return read(path)
    try:
        return read(path, base=base)
    except (TargetNotFound, ShapeMismatch):
        return read(path)


def _names_for(adapters: Sequence[Adapter | str | PathLike[str]]) -> list[str]:
    """Return a short name for each adapter: the end of its path, with just enough folders to make all names different.

    If two paths are equal or differ only in the extension, use the whole paths of all adapters, each followed by the
    adapter's number.

    An adapter in memory is named after its number, such as `adapter 1`.
    """
    from os import fspath

    parts = [
        [f"adapter {at}"] if isinstance(each, Adapter) else fspath(each).rstrip("/").replace("\\", "/").split("/")
        for at, each in enumerate(adapters, 1)
    ]  # fmt: skip
    plain = ("adapter_model.safetensors", "adapter.safetensors", "pytorch_lora_weights.safetensors")
    parts = [each[:-1] if len(each) > 1 and each[-1] in plain else each for each in parts]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        short = [name.removesuffix(".safetensors").removesuffix(".gguf") for name in names]
        if len(set(short)) == len(short):
            return [public(name) for name in short]
    return [f"{public(name)} ({at})" for at, name in enumerate(names, 1)]
