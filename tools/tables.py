#!/usr/bin/env python
"""Writes the tables of docs/ from the spec, the formats and the commands; `--check` only compares.

A table is between `<!-- table:NAME -->` and `<!-- /table -->`. NAME is methods, formats, matrix, families, combine,
quant, invariances, ranking, ranking_model, authors or commands; each table is in exactly one page. Exit codes: 0
written or up to date, 1 not up to date (`--check`), 2 a source of a table is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapterkit import FORMATS, METHODS  # noqa: E402 - the checkout's own, installed or not
from adapterkit.cli import adapterkit  # noqa: E402
from adapterkit.cli.list import combiners  # noqa: E402
from adapterkit.core.updates import Additive  # noqa: E402
from adapterkit.naming.image import (  # noqa: E402
    COMFYUI,
    KOHYA,
    ImageFamily,
    fill_numbers,
)
from adapterkit.naming.image import families as image_families  # noqa: E402
from adapterkit.ops.combiners import COMBINERS  # noqa: E402
from adapterkit.ops.combiners._combiner import DEPENDENCES  # noqa: E402
from adapterkit.quant import SCHEMES  # noqa: E402

BLOCK = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main(words: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a page is not up to date")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of the pages")
    chosen = parser.parse_args(words)
    try:
        return _work(chosen.docs, chosen.check)
    except LookupError as error:
        print(f"tables: {error.args[0]}", file=sys.stderr)
        return 2


def _work(docs: Path, check: bool) -> int:
    pages = {page: page.read_text("utf-8") for page in sorted(docs.rglob("*.md"))}
    marked = [(name, page) for page, text in pages.items() for _, name, _ in BLOCK.findall(text)]
    places = dict(marked)
    if missing := set(TABLES) - set(places):
        raise LookupError(f"{docs} lacks the block <!-- table:{min(missing)} --> ... <!-- /table -->")
    if unknown := set(places) - set(TABLES):
        name = min(unknown)
        raise LookupError(f"unknown table {name!r} in {places[name]}; known: {', '.join(TABLES)}")
    if twice := {name for name, page in marked if places[name] != page}:
        raise LookupError(f"the table {min(twice)!r} is in more than one page")
    stale = {page: new for page, old in pages.items() if (new := BLOCK.sub(_fill, old)) != old}
    for page, text in stale.items():
        if check:
            print(f"tables: {page} is not up to date; run tools/tables.py", file=sys.stderr)
        else:
            page.write_text(text, "utf-8")
    return 1 if check and stale else 0


def _fill(block: re.Match[str]) -> str:
    start, name, end = block.groups()
    return f"{start}{TABLES[name]()}\n{end}"


def methods() -> str:
    """Return one row per method, with a link to its entry in the spec, which has the formula."""
    return _markdown(("Method", "What it is", "Kind"), [_method_row(name, _spec("methods", name)) for name in METHODS])


def _method_row(name: str, entry: dict[str, Any]) -> list[str]:
    formula = f"[`{name}`](reference/methods/{name}.md)"
    return [formula, f"[{entry['title']}]({entry['paper']})", entry["kind"]]


def formats() -> str:
    """Return one row per format: its container, from the spec, and what the code can store in it."""
    return _markdown(("Format", "What it is", "Container", "Methods"), [_format_row(name) for name in FORMATS])


def _format_row(name: str) -> list[str]:
    entry = _spec("formats", name)
    held = FORMATS[name].methods
    expressed = "all" if held == frozenset(METHODS) else " ".join(f"`{method}`" for method in sorted(held))
    return [
        f"[`{name}`](reference/formats/{name}.md)",
        f"[{entry['title']}]({entry['url']})",
        entry["container"],
        expressed,
    ]


def matrix() -> str:
    """Return how each format stores each method: one row per method, one column per group of equal formats."""
    groups: dict[frozenset[str], list[str]] = {}
    for name in FORMATS:
        groups.setdefault(FORMATS[name].methods, []).append(name)
    every = frozenset(METHODS)
    own = [(held, names) for held, names in groups.items() if held != every]
    columns = ("Method", *(" ".join(f"`{name}`" for name in names) for _, names in own))
    return _markdown(columns, [[f"`{name}`", *(_word(name, names[0]) for _, names in own)] for name in METHODS])


def _word(name: str, format_name: str) -> str:
    """Return `=` for native, `L` for an exact LoRA, `D` for a weight difference, `~` for the nearest LoRA."""
    method, known = METHODS[name], FORMATS[format_name]
    if name in known.methods:
        return "="
    if method.kind not in ("additive", "weight") or "lora" not in known.methods:
        return ""
    if issubclass(method, Additive) and method.pair is not Additive.pair:
        return "L"
    return "D" if known.differences else "~"


def families() -> str:
    """Return how each format names a family's modules: one row per family of image, video and audio models."""
    formats = ("diffusers", "comfyui", "kohya", "lycoris")
    columns = ("Family", "Class in diffusers", *(f"`{name}`" for name in formats))
    rows = [
        [each.title, " ".join(f"`{name}`" for name in each.facts.classes), *(_names(each, name) for name in formats)]
        for each in image_families()
        if not each.facts.generic
    ]
    return _markdown(columns, rows)


NAMINGS = {"diffusers": "diffusers", "comfyui": COMFYUI, "kohya": KOHYA}
"""Format -> the naming that it is written in; other formats keep any names."""


def _names(family: ImageFamily, format_name: str) -> str:
    """Return `=` for diffusers' names, `F` for other names with fused weights, `N` for others; empty if unknown."""
    naming = family.wanted(NAMINGS.get(format_name, "diffusers"))
    if naming == "diffusers":
        return "="
    if naming not in family.namings:
        return ""
    moves = [
        family.moves(fill_numbers(pattern, "0000"), "diffusers", naming)
        for pattern in family.names("diffusers").patterns
    ]
    known = [pieces for pieces in moves if pieces]
    if any(not piece.there.whole and len(pieces) == 1 for pieces in known for piece in pieces):
        return "F"
    return "=" if naming in family.architecture.record.keyed else "N"


def combine() -> str:
    """Return one row per combiner: its description, its parameters, and what else its result depends on.

    Each dependence, and its absence, is tested by `test_a_method_says_what_its_result_depends_on`.
    """
    rows = [_combiner_row(entry) for entry in combiners()]
    return _markdown(("Method", "What it is", "Parameters", "Result", "Depends also on"), rows)


RANKS = {
    "one's": "at most one adapter's",
    "sum": "at most the sum of the adapters' ranks",
    "more": "up to full rank",
}


def invariances() -> str:
    """Return one row per combiner without data: the measured dependences of its result, and the rank of the result."""
    from adapterkit.testing.formulas import GUISES, dependences, measurable, rank_of_result

    rows = []
    for name in measurable():
        found = dependences(name)
        rows.append(
            [f"`{name}`", *("changes it" if what in found else "" for what in GUISES), RANKS[rank_of_result(name)]]
        )
    columns = "Other factors", "Other order", "Smaller changes", "Another seed"
    return _markdown(("Method", *columns, "Rank of the result"), rows)


RANKINGS = ROOT / "docs" / "pictures"
"""The folder of the figures that tools/bench/ranking.py wrote."""


def ranking(name: str = "ranking") -> str:
    """Return one row per combiner: its mean, the difference from task arithmetic with an interval, and its cost."""
    found = json.loads((RANKINGS / f"{name}.json").read_text("utf-8"))["counts"]
    counts = sorted(found, key=int)
    methods = {name for count in counts for name in found[count]["any"]}

    def mean(name: str) -> float:
        differences = [found[count]["any"][name]["difference"][0] for count in counts if name in found[count]["any"]]
        return sum(differences) / len(differences)

    rows = []
    for name in sorted(methods, key=lambda each: (-mean(each), each)):
        cells = [_difference(found[count]["any"].get(name)) for count in counts]
        seconds = max(found[count]["any"][name]["seconds"] for count in counts if name in found[count]["any"])
        rows.append([f"`{name}`", *cells, f"{seconds:.2f}"])
    return _markdown(("Method", *(f"{count} tasks" for count in counts), "Seconds"), rows)


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    mean, low, high = (100 * value for value in row["difference"])
    cell = f"{100 * row['mean']:.1f} ({mean:+.1f}, {low:+.1f} to {high:+.1f})"
    return f"**{cell}**" if low > 0 else cell


AUTHORS = ROOT / "docs" / "pictures" / "authors.json"
"""The figures that tools/foreign/check_authors.py wrote."""


def authors() -> str:
    """Return one row per comparison with the authors' functions."""
    rows = []
    for row in json.loads(AUTHORS.read_text("utf-8")):
        place = (
            f"https://github.com/{row['source']}"
            if "/" in row["source"]
            else f"https://pypi.org/project/{row['source']}"
        )
        source = f"[{row['source']}]({place}) {row['commit']}, `{row['path']}`"
        rows.append([f"`{row['method']}`", source, row["setting"], f"{row['difference']:.0e}"])
    return _markdown(("Method", "Source", "Setting", "Difference"), rows)


def _combiner_row(entry: dict[str, Any]) -> list[str]:
    needs = " (needs `--data`)" * (entry["data"] is not None) + " (needs `base=`)" * entry["based"]
    title = f"[{entry['title']}]({entry['paper']})" + needs
    names = ["then"] * (entry["then"] is not None) + list(entry["parameters"])
    method = COMBINERS[entry["name"]]
    depends = ", ".join(what for what in DEPENDENCES if what in method.depends)
    result = "dense" if method().dense else "low rank"
    name = f"[`{entry['name']}`](reference/combiners/{entry['name']}.md)"
    return [name, title, " ".join(f"`{each}`" for each in names), result, depends]


def quant() -> str:
    """Return one row per quantization scheme, with the reference for its dequantization."""
    rows = [[f"`{name}`", f"[{entry.description}]({entry.url})", entry.oracle] for name, entry in SCHEMES.items()]
    return _markdown(("Scheme", "What it is", "Checked against"), rows)


def commands() -> str:
    """Return one row per command: its usage, the first line of its help, its options."""
    ctx = click.Context(adapterkit, info_name="adapterkit")
    return _markdown(
        ("Command", "What it does", "Options"), [_command_row(ctx, n) for n in adapterkit.list_commands(ctx)]
    )


def _command_row(parent: click.Context, name: str) -> list[str]:
    command = adapterkit.get_command(parent, name)
    if command is None:
        raise LookupError(f"the command {name!r} is listed, but does not exist")
    ctx = click.Context(command, info_name=name, parent=parent)
    words = [parameter.make_metavar(ctx) for parameter in command.params if isinstance(parameter, click.Argument)]
    everywhere = {"--json", "--quiet", "--debug"}
    options = [p for p in command.params if isinstance(p, click.Option) and not everywhere & set(p.opts)]
    own = [opt for p in options for opt in ([o for o in p.opts if o.startswith("--")] or p.opts[-1:])]
    usage = " ".join(word for word in ("adapterkit", name, *words) if word)
    return [f"`{usage}`", (command.help or "").partition("\n")[0], " ".join(f"`{option}`" for option in own)]


def _spec(kind: str, name: str) -> dict[str, Any]:
    path = ROOT / "spec" / kind / f"{name}.toml"
    if not path.is_file():
        raise LookupError(f"{path} does not exist, but every entry of {kind} needs it")
    return tomllib.loads(path.read_text("utf-8"))


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


TABLES = {
    "methods": methods,
    "formats": formats,
    "matrix": matrix,
    "families": families,
    "combine": combine,
    "invariances": invariances,
    "ranking": ranking,
    "ranking_model": partial(ranking, "ranking-model"),
    "authors": authors,
    "quant": quant,
    "commands": commands,
}

if __name__ == "__main__":
    sys.exit(main())
