"""Export a model to ONNX, with adapters.

MODEL is a folder as transformers saves it: a causal language model gets its past keys and values as inputs and outputs,
an encoder or classifier its tokens. DIR holds the graph, config and tokenizer, and an .onnx_adapter file for each
adapter where these are slots. The result is run against the torch model, unless --no-check is given.
"""

from __future__ import annotations

from typing import Any

import click

from . import _options
from ._graphs import checked
from ._render import View, show
from ._writing import refuse_place


@click.command(help=__doc__)
@click.argument("model", metavar="MODEL")
@click.option("-o", "--out", metavar="DIR", required=True, help="Folder to write.")
@click.option(
    "--adapter", "adapters", metavar="A", multiple=True, help="An adapter in any known format; may be repeated."
)
@click.option(
    "--mode", type=click.Choice(["merged", "attached", "slots"]), default="merged", show_default=True,
    help="Fold adapters into the weights, leave them nodes, or make them inputs that are exchanged at run time.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True,
    help="What the graph computes in.",
)  # fmt: skip
@click.option("--opset", type=int, metavar="N", help="Operator set; torch's own choice if absent.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run the result and compare it.")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.Settings, model: str, out: str, adapters: tuple[str, ...], mode: str, dtype: str,
    opset: int | None, check: bool, overwrite: bool,
) -> None:  # fmt: skip
    """Runs `adapterkit.onnx.export_pretrained`."""
    refuse_place(out)
    from ..onnx import export_pretrained

    report = export_pretrained(
        model, out, adapter=adapters or None, mode=mode, dtype=dtype, opset=opset, check=check, overwrite=overwrite
    )
    show(settings, {**report.record(), "mode": mode}, _view)


def _view(record: Any) -> View:
    yield f"wrote {record['out']}: {record['mode']}; {checked(record)}"
    yield f"  {', '.join(record['files'])}"
