"""The sections of a long help: options under headings by what they are about; and its width."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping

import click

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Output": (
        "out", "dst", "target_format", "on_loss", "max_error", "profile", "dtype", "shard_size", "link", "checksums",
        "overwrite", "figures", "gate", "sarif", "only_plan", "verified", "check", "dry_run", "every", "layers",
        "private", "message", "tag", "revision", "license", "licence",
    ),
    "What is computed": (
        "weights", "method", "parameters", "recipe", "rank", "energy", "error", "seed", "disjoint", "tied", "quantized",
        "onto", "keep", "calibration", "consumer", "keep_change", "remainder",
        "quantize", "mode", "opset", "calibration", "sample", "tolerance", "signs", "tokenizer", "vocab",
        "embeddings", "targets", "scope", "data", "texts",
        "length", "new_tokens", "null", "promote", "frobenius", "sv_ratio", "sv_fro", "sv_cumulative",
    ),
    "How adapters and bases are read": (
        "source_format", "base", "base_weights", "strict_base", "strict_licence", "compat", "alpha", "strict", "family",
        "match_base",
        "rename", "allow_partial", "experts", "call", "merged", "share_weights", "onnx",
    ),
    "Thresholds": (
        "min_effect", "min_kept", "max_scale_error", "max_part_error", "min_agreement", "max_perplexity",
        "min_over_null",
    ),
    "How it runs": ("device", "engine", "address", "memory", "stream"),
    "How it talks": ("json", "quiet", "verbose", "debug", "help"),
}  # fmt: skip
"""Heading -> names of parameters. Other options stand first, under Options."""

FEW = 12
"""Options that need no headings."""


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a command's options as its --help shows them."""
    home = {name: heading for heading, names in SECTIONS.items() for name in names}
    options = [param for param in command.get_params(ctx) if isinstance(param, click.Option)]
    given = [(param, param.get_help_record(ctx)) for param in options]
    shown = [(param.name or "", record) for param, record in given if record is not None]
    if len(shown) <= FEW:
        with formatter.section("Options"):
            formatter.write_dl([record for _, record in shown])
        return
    reads_rank = any(param.name == "rank" and not param.expose_value for param in command.params)
    for heading in ("Options", *SECTIONS):
        rows = []
        for name, record in shown:
            at = home.get(name, "Options")
            if name == "rank" and reads_rank:  # The rank that a file is expected to have.
                at = "How adapters and bases are read"
            if at == heading:
                rows.append(record)
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


class Formatter(click.HelpFormatter):
    """Click's formatter, for terminals of fewer than 50 columns too: click's own lines are never shorter.

    Args:
        indent_increment: as click's.
        width: columns, if not those of the terminal.
        max_width: the longest lines.
    """

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(indent_increment, max(columns - 2, 24) if width is None and columns < 52 else width, max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write a list of definitions; its first column takes a third of a narrow terminal."""
        super().write_dl([*rows], min(col_max, max(10, self.width // 3)), col_spacing)


class HelpContext(click.Context):
    """A context whose help fits narrow terminals."""

    formatter_class = Formatter
