r"""Test another reader of adapterkit files.

It is run against the vectors of the specification. CMD is called with a verb (check, base or compute) and paths, and
prints one line of JSON for each path; section 16 of the specification says which. A program may know some methods only:
those that it answers with Unsupported are counted apart. The exit code is 1 where a case fails.

\b
Examples:
  adapterkit conformance -- node spec/readers/javascript/cli.mjs
  adapterkit conformance --suite spec/vectors -- ./my-reader
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from . import _options
from ._render import Table, View, show


@click.command(help=__doc__)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
@click.option("--suite", type=click.Path(path_type=Path), help="The folder spec/vectors.")
@_options.flags
@click.pass_context
def command(ctx: click.Context, command: tuple[str, ...], suite: Path | None) -> None:
    """Runs all cases and counts by requirement."""
    from ..conformance import conformance

    outcomes = conformance(command, suite)
    rules: dict[str, list[int]] = {}
    for outcome in outcomes:
        for rule in outcome.requirements:
            counts = rules.setdefault(rule, [0, 0, 0])
            counts[{True: 0, False: 1, None: 2}[outcome.passed]] += 1
    failed = [
        {"case": o.case, "requirements": list(o.requirements), "why": o.why} for o in outcomes if o.passed is False
    ]
    record = {
        "passed": sum(o.passed is True for o in outcomes), "failed": failed,
        "without_formula": [o.case for o in outcomes if o.passed is None],
        "requirements": {rule: dict(zip(("passed", "failed", "without_formula"), rules[rule], strict=True))
                         for rule in sorted(rules, key=lambda rule: [int(n) for n in rule[2:].split(".")])},
    }  # fmt: skip
    show(ctx.obj, record, _view)
    if failed:
        ctx.exit(1)


def _view(record: Mapping[str, Any]) -> View:
    rows = [[rule, c["passed"], c["failed"], c["without_formula"]] for rule, c in record["requirements"].items()]
    yield Table(("requirement", "passed", "failed", "without formula"), rows)
    if record["failed"]:
        failed = [[each["case"], " ".join(each["requirements"]), each["why"]] for each in record["failed"]]
        yield Table(("case", "requirements", "why"), failed)
    counts = f"{record['passed']} passed, {len(record['failed'])} failed"
    yield f"{counts}, {len(record['without_formula'])} without a formula"
