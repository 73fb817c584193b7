"""Attach an adapter to an ONNX graph, or to a folder of graphs.

MODEL.onnx is the graph; A is an adapter in any known format. The weights of the graph are not changed. Unless
--no-check is given, the new graph is run. If the adapter can also be merged into the graph's weights, the outputs of
the new graph are compared with the outputs of the merged graph. MODEL.onnx may also be a folder that optimum or
onnxruntime-genai wrote. In this case, the adapter is attached to each graph that contains targets of the adapter, and
all other files are copied to the folder OUT.onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..io.inputs import decimal_number
from . import _options, _render
from ._graphs import checked, decided_by, free, graph_or_folder, graphs_lines, targets_view, warn
from ._render import View, parts
from ._writing import is_done, refuse_place, show_written

if TYPE_CHECKING:
    from ..io.lazy import Array


@click.command(help=__doc__)
@click.argument("model", metavar="MODEL.onnx")
@click.argument("adapter", metavar="A")
@click.option(
    "-o", "--out", metavar="OUT.onnx", required=True, help="File to write; a folder if MODEL.onnx is a folder."
)
@_options.allow_partial
@click.option(
    "--mode", type=click.Choice(["constant", "slots", "rows", "inputs"]), default="constant", show_default=True,
    help="constant: write the adapter into the graph; slots: make the adapter's tensors optional inputs of the graph; "
    "rows: like slots, but each input stacks the tensors of several LoRAs, so that each row of a batch can use its own "
    "LoRA; inputs: make the tensors required inputs, which every runtime supports.",
)  # fmt: skip
@click.option(
    "--base-weights", metavar="DIR",
    help="Folder with the weights of the base. With them, layers are also found if the graph has lost the layers' "
    "names. The model's config is read from config.json in DIR.",
)  # fmt: skip
@click.option(
    "--call", "words", metavar="ARGUMENT=NAME", multiple=True,
    help="For a model argument that the adapter reads: its name in the graph, e.g. attention_mask=mask. Required only "
    "if the two names differ. task_ids=N selects task N for all rows of a batch. Repeatable.",
)  # fmt: skip
@click.option(
    "--expert",
    "experts",
    metavar="A",
    multiple=True,
    help="Adapter that is an expert of A, if A is a router whose file does not contain its experts. Give the option "
    "once for each expert, in the router's order.",
)
@click.option(
    "--calibration", metavar="FILE.npz",
    help="Inputs for the check, such as a quantizer's calibration data. The file has one array per input, under "
    "the input's name.",
)  # fmt: skip
@_options.tied
@_options.strict_base
@_options.rename
@_options.compat
@click.option("--check/--no-check", default=True, show_default=True, help="Run the new graph and check its outputs.")
@_options.overwrite
@_render.every
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, model: str, adapter: str, out: str, mode: str, base_weights: str | None,
    words: tuple[str, ...], experts: tuple[str, ...], calibration: str | None, check: bool,
    compat: str | None, overwrite: bool, tied: str | None, strict_base: bool,
    rename: tuple[str, ...], allow_partial: bool, every: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.onnx.inject`."""
    from ..io.locations import check_named

    refuse_place(out)
    check_named(model, adapter, *experts, base_weights, calibration)
    from ..onnx import inject

    settings: _options.CliSettings = ctx.obj
    model = graph_or_folder(model, out)
    decided, read = decided_by(model, [adapter, *experts, base_weights, calibration])
    if is_done(settings, out, decided, overwrite):
        return
    free(out, overwrite, read)
    (loaded,) = _options.in_reading((adapter,), compat, base_weights)
    report = inject(
        model, loaded, out, mode=mode, base_weights=base_weights, call=_call(words), experts=experts,
        tied=tied, strict_base=strict_base, rename=rename, allow_partial=allow_partial,
        check=check if calibration is None else _inputs(calibration, check), overwrite=overwrite, made_from=decided,
    )  # fmt: skip
    warn(report.warnings)
    show_written(settings, report.record(), partial(_view, every=every), decided)


def _inputs(path: str, check: bool) -> dict[str, Array]:
    """Return the arrays in the file of --calibration, keyed by name."""
    if not check:
        raise click.UsageError(
            "--calibration provides inputs for the check, but --no-check skips the check. Omit one of the two options"
        )
    from ..io.lazy import as_array
    from ..io.numpy_files import read_npz

    return {name: as_array(leaf) for name, leaf in read_npz(Path(path)).items()}


def _call(words: tuple[str, ...]) -> dict[str, str | int]:
    """Parse the values of --call into a map from model arguments to names in the graph.

    A value of 1 to 18 digits, such as the 3 in `task_ids=3`, becomes an int.
    """
    options: dict[str, str | int] = {}
    for given in words:
        word, equals, value = given.partition("=")
        if not (word and equals and value):
            raise click.UsageError(f"--call must be ARGUMENT=NAME, got {given!r}")
        number = decimal_number(value)
        options[word] = value if number is None else number
    return options


def _view(record: Mapping[str, object], every: bool) -> View:
    targets = parts(record, "targets")
    yield from targets_view(record, every)
    yield from graphs_lines(record)
    yield f"wrote {record['out']}: {len(targets)} targets; {checked(record)}"
    if len(targets) > _render.FEW and not every:
        yield _render.HINT
