"""Extract an adapter from a fine-tuned model and its base.

TUNED and BASE are folders of weights, or weight files, of the same architecture. Each changed matrix becomes a LoRA, or
an update of the method that --method names. Changes of norms and biases are stored without loss. By
default, changed or new rows of token embeddings are also stored without loss.
"""

from __future__ import annotations

from functools import partial

import click

from . import _options, _render, _writing
from ._progress import progress


@click.command(help=__doc__)
@click.argument("tuned")
@click.option("--base", required=True, metavar="BASE", help="Weights from which TUNED was fine-tuned.")
@click.option("--rank", type=int, metavar="R", help="Rank of each changed matrix.")
@click.option("--energy", type=float, metavar="E", help="Minimum share of a change's squared norm to keep (0 to 1).")
@click.option("--error", type=float, metavar="E", help="Maximum error, relative to the norm of the change.")
@click.option(
    "--scope", type=click.Choice(["target", "all"]), default="target", show_default=True,
    help="target: apply --rank, --energy or --error to each matrix; all: apply the option to the model as a whole. "
    "With all, --rank is the average rank.",
)  # fmt: skip
@click.option("--target", "targets", multiple=True, metavar="GLOB", help="Extract only these targets. Repeatable.")
@click.option(
    "--embeddings", type=click.Choice(["rows", "low-rank"]), default="rows", show_default=True,
    help="rows: store the changed rows of token embeddings; low-rank: treat embeddings like any other matrix.",
)  # fmt: skip
@click.option(
    "--method", default="lora", show_default=True, metavar="METHOD",
    help="Method for changed matrices: lora, dora (norms and a LoRA of the directions), loha (Hadamard product), "
         "lokr (Kronecker product) or shira (the largest entries).",
)  # fmt: skip
@_options.strict_base
@_options.rename
@_writing.dtype
@_writing.writing("peft, or adapterkit if DST is a .safetensors file")
@_render.every
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, tuned: str, base: str, rank: int | None, energy: float | None, error: float | None,
    scope: str, targets: tuple[str, ...], embeddings: str, method: str, dtype: str | None, out: str,
    target_format: str | None, on_loss: str, overwrite: bool, rename: tuple[str, ...], strict_base: bool,
    every: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.ops.extract`."""
    from .. import ops
    from ..io.checkpoint import opened
    from ..naming.binding.fitting import TO_REFUSE, check_tuned
    from ..ops.resizing import relative_error

    # PEFT's format is always a folder, so the default for a single .safetensors file is adapterkit's own format.
    target_format = target_format or ("adapterkit" if out.endswith(".safetensors") else "peft")
    destination = _writing.CommandDestination(out, [tuned], overwrite, target_format=target_format, base=base)
    if destination.is_done(settings):
        return
    cuts: list[ops.Cut] = []
    with progress(settings, "extract") as meter:
        extracted = ops.extract(
            tuned, base, rank, energy=energy, error=error, scope=scope, targets=targets, embeddings=embeddings,
            method=method, dtype=dtype, report=cuts.append, progress=meter, rename=rename,
            strict_base=strict_base,
        )  # fmt: skip
    record: dict[str, object] = dict(destination.write(extracted, on_loss))
    record |= {
        "tuned": tuned, "base": base, "relative_error": relative_error(cuts) or 0.0,
        "cuts": [cut.record() for cut in cuts],
    }  # fmt: skip
    record["warnings"] = [f"{why}{TO_REFUSE}" for why in check_tuned(opened(tuned), opened(base), False)]
    _writing.show_written(settings, record, partial(_writing.cuts_view, every=every), destination.made_from)
