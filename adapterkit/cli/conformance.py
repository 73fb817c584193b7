r"""Test another program that reads adapterkit files.

The program CMD runs on the test vectors of the specification. It is called with a verb (check, base, canonical, rules,
compute or merge) and paths. It must print one line of JSON for each path; for compute and merge, it must print only one
line in total. Section 16 of the specification defines these lines. A program may support only some methods. For a case
with another method, it must answer Unsupported; these cases are counted separately. The exit code is 1 if a case fails.

\b
Examples:
  adapterkit conformance -- node spec/readers/javascript/cli.mjs
  adapterkit conformance --suite adapterkit-conformance-1.1.zip -- ./my-reader
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from . import _options
from ._render import TextTable, View, part, parts, show, texts


@click.command(help=__doc__)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
@click.option(
    "--suite",
    type=click.Path(path_type=Path),
    help="Test vectors: the folder spec/vectors, or the conformance archive of a release.",
)
@_options.flags
@click.pass_context
def command(ctx: click.Context, command: tuple[str, ...], suite: Path | None) -> None:
    """Run all cases and count the results by conformance class and by requirement."""
    from ..conformance import conformance

    outcomes = conformance(command, suite)
    rules = Counter((rule, outcome.passed) for outcome in outcomes for rule in outcome.requirements)
    classes = Counter((outcome.conformance_class, outcome.passed) for outcome in outcomes)
    failed = [
        {"case": o.case, "requirements": list(o.requirements), "why": o.why} for o in outcomes if o.passed is False
    ]
    record = {
        "passed": sum(o.passed is True for o in outcomes), "failed": failed,
        "without_formula": [o.case for o in outcomes if o.passed is None],
        "classes": _counts(classes, sorted({name for name, _ in classes})),
        "requirements": _counts(rules, sorted({rule for rule, _ in rules}, key=_number)),
    }  # fmt: skip
    show(ctx.obj, record, _view)
    if failed:
        ctx.exit(1)


def _counts(counter: Counter[tuple[str, bool | None]], names: Iterable[str]) -> dict[str, dict[str, int]]:
    kinds = {"passed": True, "failed": False, "without_formula": None}
    return {name: {word: counter[name, passed] for word, passed in kinds.items()} for name in names}


def _number(rule: str) -> list[int]:
    """Return a key that sorts requirements by their numbers, such as [3, 1] for R-3.1."""
    return [int(number) for number in rule.removeprefix("R-").split(".")]


def _view(record: Mapping[str, object]) -> View:
    for what in ("requirement", "class"):
        counts = part(record, "requirements" if what == "requirement" else "classes")
        each_count = [(name, part(counts, name)) for name in counts]
        rows = [[name, c["passed"], c["failed"], c["without_formula"]] for name, c in each_count]
        yield TextTable((what, "passed", "failed", "not supported"), rows)
    failed = parts(record, "failed")
    if failed:
        lines = [[each["case"], " ".join(texts(each, "requirements")), each["why"]] for each in failed]
        yield TextTable(("case", "requirements", "why"), lines)
    total = f"{record['passed']} passed, {len(failed)} failed"
    yield f"{total}, {len(texts(record, 'without_formula'))} not supported by the program"
