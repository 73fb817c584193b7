"""Combine several adapters into one.

Each A is an adapter in any known format. 'adapterkit list combine' shows the methods and their parameters. A recipe is
a YAML file in the format of mergekit's configs. It states the merge_method, the models and each model's parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import _options, _writing
from ._options import combination, learned_data, method_and_settings, named_by, recipe_of, recipe_option
from ._progress import progress
from ._render import TextTable, View, counted, integer, number, part, parts, texts

if TYPE_CHECKING:
    from ..core.adapter import Adapter

_THRESHOLDS = {-3: 32 << 20, -1: 64 << 20, -2: 16 << 20}
"""A map from parameters of glibc's `mallopt` to sizes in bytes: M_MMAP_THRESHOLD (-3), M_TRIM_THRESHOLD (-1) and
M_TOP_PAD (-2)."""


def keep_freed_memory() -> None:
    """Let the process keep up to 64 MB of freed memory for new arrays, instead of returning it to the system.

    By default, glibc unmaps an array of a few megabytes when it is freed, and the kernel must map and zero new pages
    for the next array. Mapping and zeroing took a quarter of the time of `combine --method knots_ties`. Only commands
    call this function, because it changes the whole process. It does nothing if the C library has no `mallopt`.
    """
    if sys.platform != "linux":
        return
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # C libraries other than glibc may lack `mallopt`.
        for name, size in _THRESHOLDS.items():
            set_option(name, size)


@click.command(help=__doc__)
@click.argument("adapters", metavar="A...", nargs=-1)
@method_and_settings(default="linear")
@_options.weights
@recipe_option
@click.option(
    "--rank", type=int, metavar="R",
    help="Cut the result to rank R at each target. Default: no cut. But if the format cannot store dense results, "
    "they are cut to the largest rank that the adapters have at the target.",
)  # fmt: skip
@click.option("--seed", type=int, default=None, metavar="N", help="Random seed of the method. Default: 0.")
@click.option("--disjoint", is_flag=True, help="Allow adapters that have no target in common.")
@_writing.dtype
@_options.base
@_options.strict_base_of_read
@click.option("--compat", metavar="NAME", help="Use the method names and defaults of this tool: mergekit or peft.")
@_options.rename
@_options.stating
@_writing.writing("the adapters' format if all have the same format, otherwise adapterkit")
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, adapters: tuple[str, ...], method: str | None, parameters: tuple[str, ...],
    weights: tuple[float, ...], data: tuple[str, ...], recipe: str | None, rank: int | None, seed: int | None,
    disjoint: bool, dtype: str | None, base: str | None, compat: str | None, out: str, target_format: str | None,
    on_loss: str, overwrite: bool, rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Run `adapterkit.ops.combine`."""
    from .. import detect, ops
    from ..errors import Unrepresentable
    from ..ops.resizing import relative_error

    given = {
        "rank": rank, "seed": seed, "disjoint": disjoint or None, "dtype": dtype, "base": base, "compat": compat,
        "rename": rename or None,
    }  # fmt: skip
    named, read_from = recipe_of(adapters, recipe)
    if read_from is not None and recipe is None:
        recipe = adapters[0]
    sources, options = combination(named, method, weights, parameters, given, read_from)
    with named_by(read_from):
        target_format = target_format or _format_of(sources, detect)
    destination = _writing.CommandDestination(
        out, sources, overwrite, target_format=target_format, base=options.get("base"),
        inputs=[*([] if recipe is None else [recipe]), *(file for file in data if file != "builtin")],
    )  # fmt: skip
    if destination.is_done(settings):
        return
    keep_freed_memory()
    read = _options.in_reading(sources, None, options.get("base"))
    cuts: list[ops.Cut] = []

    def refuse_early(outline: Adapter) -> None:
        if read_from is not None:
            read_from.check_layers(outline.updates)
        what = f"{target_format} cannot hold the result of {options.get('method', 'linear')}"
        _check_writable(outline, target_format, options.get("base"), on_loss, what)

    with named_by(read_from), progress(settings, "combine") as meter:
        working: dict[str, Any] = {"report": cuts.append, "before": refuse_early, "progress": meter}
        working |= learned_data(data, read, options)
        try:
            combined = ops.combine(read, **options, **working)
        except Unrepresentable:
            if options.get("rank") is not None:
                raise
            combined = ops.combine(read, **options | {"rank": "fit"}, **working)
    record: dict[str, object] = dict(destination.write(combined, on_loss))
    record |= {"cuts": [cut.record() for cut in cuts], "relative_error": relative_error(cuts)}
    notes = [] if read_from is None else [*read_from.notes]
    if read_from is not None and read_from.tokenizer is not None:
        notes.append(
            "combine ignores the recipe's tokenizer; 'adapterkit merge --recipe' writes a model with this tokenizer"
        )
    record["warnings"] = [
        *notes,
        *texts(combined.recipe[-1].args, "warnings"),
        *_options.base_warnings(sources, read, options.get("base")),
    ]
    _writing.show_written(settings, record | method_record(combined), _view, destination.made_from)


def _check_writable(outline: Adapter, name: str, base: str | None, on_loss: str, what: str) -> None:
    from tempfile import TemporaryDirectory

    from ..formats import FORMATS
    from ..ops.lowering import check_writable
    from ..writing import write

    with TemporaryDirectory() as folder:
        place = Path(folder) / (FORMATS[name].file or "adapter")
        check_writable(outline, lambda adapter: write(adapter, place, name, base, on_loss), what)


def method_record(combined: Adapter) -> dict[str, object]:
    """Return the method, parameters and weights with which `combined` was made, as its lineage records them."""
    args = combined.recipe[-1].args
    return {key: args.get(key) for key in ("method", "parameters", "weights", "each", "seed", "rank", "compat")}


def _format_of(sources: Sequence[str], detect: Callable[[str], str]) -> str:
    """Return the name of the sources' format if all have the same format, otherwise `adapterkit`."""
    formats = {detect(source) for source in sources}
    return formats.pop() if len(formats) == 1 else "adapterkit"


def _used(name: str, record: Mapping[str, object]) -> str:
    """Return a parameter's value as text. If adapters have their own values, list each adapter's value in order."""
    shared, per_adapter = part(record, "parameters")[name], parts(record, "each") if record["each"] else ()
    if not any(name in each for each in per_adapter):
        return str(shared)
    return ", ".join(str(each.get(name, shared)) for each in per_adapter)


def _view(record: Mapping[str, object]) -> View:
    yield f"{record['method']}, weights {' '.join(texts(record, 'weights'))}"
    if record["parameters"]:
        yield TextTable(("parameter", "value"), [[name, _used(name, record)] for name in part(record, "parameters")])
    yield from _writing.outcome(record)
    if cuts := parts(record, "cuts"):
        worst = max(cuts, key=lambda cut: number(cut, "relative_error"))
        ranks = sorted({integer(cut, "rank") for cut in cuts})
        said_ranks = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        error = number(record, "relative_error") if record["relative_error"] else 0.0
        largest = number(worst, "relative_error")
        yield (
            f"cut to rank {said_ranks} at {counted(len(cuts), 'target')}: relative error over all targets {error:.4g}, "
            f"largest error {largest:.4g} at {worst['target']}; "
            "a higher --rank keeps more of the changes; --to adapterkit without --rank cuts nothing"
        )
