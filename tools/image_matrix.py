#!/usr/bin/env python
"""Write docs/image-families.md: how each format of image models stores each method, by family of models.

Each cell shows what the format's writer does with an adapter of that family and method in diffusers' names. `--check`
only compares. Exit codes: 0 written or up to date, 1 not up to date (`--check`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapterkit import FORMATS, METHODS  # noqa: E402 - the checkout's own, installed or not
from adapterkit.core.adapter import Adapter, Step, Target  # noqa: E402
from adapterkit.core.metadata import read_with  # noqa: E402
from adapterkit.errors import AdapterkitError, Unrepresentable  # noqa: E402
from adapterkit.formats._image.deciding import FAMILY  # noqa: E402
from adapterkit.formats._image.writing import encoded  # noqa: E402
from adapterkit.io.lazy import from_numpy  # noqa: E402
from adapterkit.naming.architectures import fill  # noqa: E402
from adapterkit.naming.image import ImageFamily, families  # noqa: E402
from adapterkit.writing import Promotion  # noqa: E402

PAGE = ROOT / "docs" / "image-families.md"
IMAGE_FORMATS = ("diffusers", "comfyui", "kohya", "lycoris")

SIZE = 24

RANDOM = np.random.default_rng(0)

Make = Callable[[int, int], Any]


def main(words: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is not up to date")
    check = parser.parse_args(words).check
    text = page()
    if PAGE.is_file() and PAGE.read_text("utf-8") == text:
        return 0
    if check:
        print(f"image_matrix: {PAGE} is not up to date; run tools/image_matrix.py", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, "utf-8")
    return 0


def _leaf(*shape: int) -> Any:
    return from_numpy((0.1 * RANDOM.normal(size=shape)).astype("f4"))


def _low(method: str, **more: Any) -> Make:
    return lambda out, in_: METHODS[method](A=_leaf(2, in_), B=_leaf(out, 2), **{k: f(out) for k, f in more.items()})


def _loha(out: int, in_: int) -> Any:
    return METHODS["loha"](w1_a=_leaf(out, 2), w1_b=_leaf(2, in_), w2_a=_leaf(out, 2), w2_b=_leaf(2, in_))


def _glora(out: int, in_: int) -> Any:
    return METHODS["glora_products"](A1=_leaf(in_, 2), A2=_leaf(2, in_), B1=_leaf(out, 2), B2=_leaf(2, in_))


MAKERS: dict[str, Make] = {
    "lora": _low("lora"),
    "dora": _low("dora", magnitude=_leaf),
    "loha": _loha,
    "lokr": lambda out, in_: METHODS["lokr"](w1=_leaf(4, 4), w2=_leaf(out // 4, in_ // 4)),
    "oft": lambda out, _: METHODS["oft"](square=_leaf(out // 4, 4, 4), side="out", constraint=1.0),
    "boft": lambda out, _: METHODS["boft_outputs"](square=_leaf(1, out // 4, 4, 4)),
    "glora": _glora,
    "ia3": lambda out, _: METHODS["ia3_weights"](w=_leaf(out)),
    "diff": lambda out, in_: METHODS["dense"](D=_leaf(out, in_)),
    "diff_b": lambda out, _: METHODS["dense"](d=_leaf(out)),
    "norm": lambda out, _: METHODS["dense"](D=_leaf(out)),
}
"""Name of a column -> a function that makes an update of a weight with these outputs and inputs."""


def page() -> str:
    """Return the whole page."""
    reasons: dict[str, int] = {}
    lines = [HEADER]
    for image_format in IMAGE_FORMATS:
        lines += [
            f"## `{image_format}`",
            "",
            "| Family | " + " | ".join(MAKERS) + " |",
            "| --- " * (len(MAKERS) + 1) + "|",
        ]
        for family in families():
            if not family.facts.generic:
                cells = [_cell(family, image_format, method, reasons) for method in MAKERS]
                lines.append(f"| {family.title} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _cell(family: ImageFamily, image_format: str, method: str, reasons: dict[str, int]) -> str:
    found = []
    for targets in (plain(family, norm=method == "norm"), () if method == "norm" else fused(family)):
        if targets and not (found and found[0].isdigit()):
            outcome, reason = outcome_of(family, image_format, method, targets)
            found.append(str(reasons.setdefault(reason, len(reasons) + 1)) if reason else outcome)
    return ", ".join(dict.fromkeys(found))


def plain(family: ImageFamily, *, norm: bool = False) -> dict[str, int]:
    """Return the first module (or norm) of a block that is a whole weight in every naming -> its number of outputs."""
    for name, out in _modules(family, norm):
        pieces = family.moves(name, "diffusers", family.wanted("comfyui"))
        if not pieces or (len(pieces) == 1 and pieces[0].here.whole and pieces[0].there.whole):
            return {name: out}
    return {}


def fused(family: ImageFamily) -> dict[str, int]:
    """Return the modules that are one fused weight in the authors' naming -> their numbers of outputs."""
    for name, _ in _modules(family, norm=False):
        pieces = family.moves(name, "diffusers", "native")
        if len(pieces) == 1 and pieces[0].here.whole and not pieces[0].there.whole:
            parts = family.moves(pieces[0].path, "native", "diffusers")
            unit = SIZE
            return {part.path: unit * part.here.parts for part in parts}
    return {}


def _modules(family: ImageFamily, norm: bool) -> Iterator[tuple[str, int]]:
    for weight in family.architecture.record.weights:
        place = family.architecture.place(weight, "diffusers")
        if place is None:
            continue
        name = fill(place.name, {f"{{{hole}}}": "0" for hole in "nmkej"})
        words = name.split(".")[-2:]
        is_norm = any("norm" in word for word in words) and "linear" not in words[-1] and words[-1] not in ("1", "2")
        if is_norm == norm and ("{" in place.name or family.component == "unet"):
            yield name, round(SIZE * next(iter(family.ratios(name)), 1))


def adapter_of(family: ImageFamily, method: str, targets: dict[str, int]) -> Adapter:
    """Return an adapter of one method on these modules, with different factors for each."""
    updates = {Target(f"{family.component}.{name}"): (MAKERS[method](out, SIZE),) for name, out in targets.items()}
    return read_with(Adapter(updates, recipe=(Step("read", {"format": "diffusers"}),)), {FAMILY: family.name})


def outcome_of(family: ImageFamily, image_format: str, method: str, targets: dict[str, int]) -> tuple[str, str]:
    """Return `=`, `L`, `D`, or the reason why a format refuses a method on these modules."""
    adapter = adapter_of(family, method, targets)
    writer = FORMATS[image_format]()
    kinds: list[str] = []

    def ask(changed: Adapter) -> list[str]:
        kinds[:] = [update.method for _, update in changed]
        return encoded(writer, changed, Path("x.safetensors"), "refuse", None)[2]  # type: ignore[arg-type]

    try:
        ask(adapter)
    except Unrepresentable as refusal:
        reason = refusal.items[0].partition(": ")[2] if refusal.items else refusal.why
        try:
            Promotion.into(writer, None, None).ask(adapter, ask)
        except AdapterkitError:
            return "", re.sub(rf" (of|for) {re.escape(family.title)}(?!\w)", r" \1 this family", reason)
        return ("D" if "dense" in kinds else "L"), ""
    return "=", ""


HEADER = """\
# Methods, formats and families of image, video and audio models

`tools/image_matrix.py` writes this page. There is one table for each format. A row is a family of models, and a column
is a method. Each cell shows how the format's writer handles an adapter with diffusers' module names:

- `=`: the writer keeps the method.
- `L`: with `--on-loss promote`, the writer writes a LoRA with exactly the same change.
- `D`: with `--on-loss promote`, the writer writes a weight difference.
- A number: the writer refuses the adapter; the list at the end of the page gives the reason with this number.

Some weights that are separate in diffusers, such as queries, keys and values, are one fused weight in the files of the
model's authors. If a cell has two marks, the second mark is for adapters that have different factors for each of these
weights. If a format cannot store weight differences, the writer turns a weight difference into a LoRA of full rank, one
factor of which is the identity. diffusers' own conversion does the same. The tables show conversions without
`--base`. With `--base`, an update whose change depends on the base's weight becomes a weight difference, if the format
can store weight differences.

XLabs' files support LoRA on FLUX's attention. BFL's control files support LoRA and complete norm weights, both on FLUX.
"""

if __name__ == "__main__":
    sys.exit(main())
