"""Change the rank of an adapter.

A is an adapter in any known format. Each low-rank update is replaced with the best LoRA of rank --rank, or of the
smallest rank that meets --energy, --error or another limit. The table shows the error at each target.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from . import _options, _render, _writing


@click.command(help=__doc__)
@click.argument("src", metavar="A")
@click.option("--rank", type=int, metavar="R", help="Rank to keep.")
@click.option("--energy", type=float, metavar="E", help="Minimum share of the squared norm to keep, from 0 to 1.")
@click.option("--error", type=float, metavar="E", help="Maximum relative error.")
@click.option("--frobenius", type=float, metavar="N", help="Maximum Frobenius norm of the error.")
@click.option(
    "--sv-ratio", type=float, metavar="N", help="Like kohya's option: keep singular values above 1 / N of the largest."
)
@click.option(
    "--sv-cumulative",
    type=float,
    metavar="E",
    help="Like kohya's option: keep this share of the sum of singular values.",
)
@click.option("--sv-fro", type=float, metavar="E", help="Like kohya's option: keep this share of the Frobenius norm.")
@click.option(
    "--scope", type=click.Choice(["target", "all"]), default="target", show_default=True,
    help="Apply the limit to each target, or to the whole adapter. With all, --rank is the average rank.",
)  # fmt: skip
@click.option("--promote", "promoted", is_flag=True, help="Also convert updates of other additive methods to LoRA.")
@_options.rename
@_writing.dtype
@_options.reading_to_cut
@_writing.writing("the format of A")
@_render.every
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, src: str, rank: int | None, energy: float | None, error: float | None,
    frobenius: float | None, sv_ratio: float | None, sv_cumulative: float | None, sv_fro: float | None,
    scope: str, promoted: bool, dtype: str | None, source_format: str | None,
    base: str | None, compat: str | None, out: str, target_format: str | None, on_loss: str, overwrite: bool,
    rename: tuple[str, ...], every: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.ops.resize`, or `adapterkit.ops.promote`."""
    from .. import detect, ops, read
    from ..errors import UsageError

    name = source_format or detect(src)
    destination = _writing.CommandDestination(out, [src], overwrite, target_format=target_format or name, base=base)
    if destination.is_done(settings):
        return
    by_values: dict[str, Any] = {"sv_ratio": sv_ratio, "sv_cumulative": sv_cumulative, "sv_fro": sv_fro}
    by_values = {key: value for key, value in by_values.items() if value is not None}
    if promoted and by_values:
        why = "--promote accepts only --rank, --energy, --error and --frobenius"
        cure = "Run 'adapterkit resize' with --promote first, then run 'adapterkit resize' on the result"
        raise UsageError(why, where=f"--{next(iter(by_values)).replace('_', '-')}", cure=cure)
    cuts: list[ops.Cut] = []
    adapter = read(src, name, base, compat=compat, **_options.stated())
    resized = (ops.promote if promoted else ops.resize)(
        adapter, rank, energy=energy, error=error, frobenius=frobenius, scope=scope,
        base=base, dtype=dtype, report=cuts.append, rename=rename, **by_values,
    )  # fmt: skip
    record: dict[str, object] = dict(destination.write(resized, on_loss))
    error_of_all = resized.recipe[-1].args["error_of_all"]
    record |= {"source": src, "from": name, "relative_error": error_of_all, "cuts": [cut.record() for cut in cuts]}
    record["warnings"] = _options.base_warnings([src], [adapter], base)
    _writing.show_written(settings, record, partial(_writing.cuts_view, every=every), destination.made_from)
