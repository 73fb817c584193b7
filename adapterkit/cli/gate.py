"""Check that a merged model or graph behaves like its adapters.

BASE is the folder or hub address of a transformers model; each A is an adapter. The base runs with the adapters,
without the adapters, and with random changes of the same size. --merged names a merged model, and --onnx names a graph.
Their outputs are compared with the outputs of the base with the adapters. The models run on texts from the package, or
on the texts of --data. The exit code is 1 if a threshold is missed, and 3 if the adapters' effect is too small for a
decision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _options
from ._graphs import warn
from ._render import TextTable, View, counted, show

if TYPE_CHECKING:
    from ..gating.result import Gate

RESULTS = {True: "passed", False: "failed", None: "undecided"}


@click.command(help=__doc__)
@click.argument("base")
@click.argument("adapters", metavar="A...", nargs=-1, required=True)
@click.option("--merged", metavar="OUT", help="Merged model to check: a transformers folder, quantized or not.")
@click.option(
    "--onnx", metavar="GRAPH",
    help="ONNX graph to check, made from the base and the adapters. If the graph has slots, the adapters are loaded "
    "into them.",
)  # fmt: skip
@click.option(
    "--data", default="builtin", show_default=True, metavar="FILE",
    help="File of texts to run on: one text per line, or JSON Lines with a 'text' field.",
)  # fmt: skip
@_options.weights
@click.option("--texts", type=click.IntRange(1), default=8, show_default=True, help="Number of texts.")
@click.option(
    "--length", type=click.IntRange(2), default=48, show_default=True, help="Maximum number of tokens of each text."
)
@click.option(
    "--new-tokens", type=click.IntRange(0), default=16, show_default=True,
    help="Number of tokens to generate greedily for each of four prompts, to compare the generated text. The prompts "
    "are the beginnings of four texts. 0 skips this comparison.",
)  # fmt: skip
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed for choosing texts and making random changes."
)
@click.option(
    "--null/--no-null", default=True, show_default=True,
    help="Also run the base with random changes that have the same norms as the adapters' changes.",
)  # fmt: skip
@click.option(
    "--device", callback=_options.device_name, default="auto", show_default=True, metavar="DEVICE",
    help="Device to run on: auto, cpu or cuda:N.",
)  # fmt: skip
@click.option(
    "--dtype", type=_options.ComputeType(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Dtype to compute in.",
)  # fmt: skip
@click.option(
    "--min-effect", type=float, default=1e-6, show_default=True, metavar="NATS",
    help="Minimum effect of the adapters: KL divergence per token between the base without and with adapters.",
)  # fmt: skip
@click.option(
    "--min-kept", type=float, default=0.9, show_default=True, metavar="SHARE",
    help="Minimum share of the adapters' effect that the merged model or graph keeps.",
)  # fmt: skip
@click.option(
    "--max-scale-error", type=float, default=0.1, show_default=True, metavar="SHARE",
    help="Maximum of |1 - scale|. The scale is the share of the adapters' change that the merged model or graph "
    "contains; in a correct merge, it is 1.",
)  # fmt: skip
@click.option(
    "--max-part-error", type=float, default=0.3, show_default=True, metavar="SHARE",
    help="Maximum error of any module's change, relative to that change; rounding errors are not counted.",
)  # fmt: skip
@click.option(
    "--min-agreement", type=float, metavar="SHARE",
    help="Minimum share of greedily generated tokens that are equal to the tokens of the base with adapters.",
)  # fmt: skip
@click.option(
    "--max-perplexity", type=float, metavar="RATIO",
    help="Maximum perplexity, relative to the perplexity of the base with adapters.",
)  # fmt: skip
@click.option(
    "--min-over-null", type=float, metavar="RATIO",
    help="Minimum effect of the adapters, relative to the effect of random changes.",
)  # fmt: skip
@_options.tied
@click.option("--vocab", type=click.Choice(["grow"]), help="Add the adapters' new tokens to the base.")
@_options.compat
@_options.rename
@_options.strict_base
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, /, base: str, adapters: tuple[str, ...], merged: str | None, onnx: str | None, data: str,
    weights: tuple[float, ...], compat: str | None, **options: Any,
) -> None:  # fmt: skip
    """Run `adapterkit.gate`."""
    from ..io.locations import check_named

    check_named(base, *adapters, merged, onnx)
    from .. import gate

    loaded = _options.in_reading(adapters, compat, base)
    chosen = list(weights) or None
    result = gate(base, loaded, merged=merged, onnx=onnx, data=data, weights=chosen, **options)
    warn(result.warnings)
    show(ctx.obj, result.record(), lambda _: _view(result))
    if result.outcome != "passed":
        ctx.exit(1 if result.outcome == "failed" else 3)


def _view(result: Gate) -> View:
    yield TextTable(
        ("model", "check", "result", "value", "limit"),
        [[check.model, check.name, RESULTS[check.ok], check.value, check.limit] for check in result.checks],
    )
    effect = result.effect
    rows: list[list[object]] = [
        ["base", None, None, effect.perplexity_base, effect.agreement],
        ["base + adapters", effect.divergence, None, effect.perplexity, None],
        ["base + random changes", effect.null, None, None, None],
    ]
    rows += [[each.model, each.divergence, each.kept, each.perplexity, each.agreement] for each in result.kept]
    yield TextTable(("run", "KL", "kept", "perplexity", "same greedy tokens"), rows)
    yield from result.verdicts
    adapters = counted(len(result.adapters), "adapter")
    yield f"{result.outcome}: {adapters} on {result.data}, {result.device}, {result.seconds:.1f} s"
