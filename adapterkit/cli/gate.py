"""Run a model: what an adapter changes, and what is kept.

BASE is a folder of transformers or a place on a hub, each A an adapter. The base runs with the adapters, without them
and with random changes of the same size; --merged and --onnx name what was made of both. Texts are built in, or come
from --data. The exit code is 1 where a threshold is missed, and 3 where the effect is too small to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from . import _options
from ._graphs import warn
from ._render import TextTable, View, counted, show

RESULTS = {True: "holds", False: "fails", None: "cannot be told"}


@click.command(help=__doc__)
@click.argument("base")
@click.argument("adapters", metavar="A...", nargs=-1, required=True)
@click.option("--merged", metavar="OUT", help="What they were merged into: a folder of transformers, packed or not.")
@click.option("--onnx", metavar="GRAPH", help="A graph of base and adapters; its slots are filled with them.")
@click.option(
    "--data", default="builtin", show_default=True, metavar="FILE",
    help="Texts to run on, one a line, or JSON Lines with a field text.",
)  # fmt: skip
@_options.weights
@click.option("--texts", type=click.IntRange(1), default=8, show_default=True, help="How many texts.")
@click.option("--length", type=click.IntRange(2), default=48, show_default=True, help="Most tokens of each text.")
@click.option(
    "--new-tokens", type=click.IntRange(0), default=16, show_default=True,
    help="Tokens of greedy text to compare after the beginnings of four texts.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of texts and of what is drawn.")
@click.option("--null/--no-null", default=True, show_default=True, help="Run random changes of the same size, too.")
@click.option(
    "--device", callback=_options.device_name, default="auto", show_default=True, metavar="DEVICE",
    help="Where to run: auto, cpu or cuda:N.",
)  # fmt: skip
@click.option(
    "--dtype", type=_options.ComputeType(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="What to compute in.",
)  # fmt: skip
@click.option(
    "--min-effect", type=float, default=1e-6, show_default=True, metavar="NATS",
    help="Least KL of the base with adapters from the base, a token.",
)  # fmt: skip
@click.option(
    "--min-kept", type=float, default=0.9, show_default=True, metavar="SHARE",
    help="Least share of the effect that a merged model or a graph keeps.",
)  # fmt: skip
@click.option(
    "--max-scale-error", type=float, default=0.1, show_default=True, metavar="SHARE",
    help="How far from 1 the part of the change may be that is there.",
)  # fmt: skip
@click.option(
    "--max-part-error", type=float, default=0.3, show_default=True, metavar="SHARE",
    help="Largest error of one module relative to its change, beyond rounding.",
)  # fmt: skip
@click.option("--min-agreement", type=float, metavar="SHARE", help="Least share of greedy tokens in common.")
@click.option(
    "--max-perplexity", type=float, metavar="RATIO", help="Largest perplexity relative to the base with adapters."
)
@click.option("--min-over-null", type=float, metavar="RATIO", help="Least effect relative to random changes.")
@_options.tied
@click.option("--vocab", type=click.Choice(["grow"]), help="Give the base the added tokens of the adapters.")
@_options.compat
@_options.rename
@_options.strict_base
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, /, base: str, adapters: tuple[str, ...], merged: str | None, onnx: str | None, data: str,
    weights: tuple[float, ...], compat: str | None, **options: Any,
) -> None:  # fmt: skip
    """Runs `adapterkit.gate`."""
    from ..io.locations import check_named

    check_named(base, *adapters, merged, onnx)
    from .. import gate

    held = _options.in_reading(adapters, compat, base)
    chosen = list(weights) or None
    found = gate(base, held, merged=merged, onnx=onnx, data=data, weights=chosen, **options)
    record = found.record()
    warn(found.warnings)
    show(ctx.obj, record, _view)
    if found.outcome != "passed":
        ctx.exit(1 if found.outcome == "failed" else 3)


def _view(record: Mapping[str, Any]) -> View:
    yield TextTable(
        ("model", "check", "result", "value", "limit"),
        [[c["model"], c["name"], RESULTS[c["ok"]], c["value"], c["limit"]] for c in record["checks"]],
    )
    effect = record["effect"]
    figures = ("model", "divergence", "kept", "perplexity", "agreement")
    rows: list[list[Any]] = [
        ["base", None, None, effect["perplexity_base"], effect["agreement"]],
        ["base + adapters", effect["divergence"], None, effect["perplexity"], None],
        ["base + random changes", effect["null"], None, None, None],
        *([each[name] for name in figures] for each in record["kept"]),
    ]
    yield TextTable(("run", "KL", "kept", "perplexity", "same greedy tokens"), rows)
    yield from record["verdicts"]
    adapters = counted(len(record["adapters"]), "adapter")
    yield f"{record['outcome']}: {adapters} on {record['data']}, {record['device']}, {record['seconds']:.1f} s"
