"""Holds changed graphs in forms of deployment against PEFT: `check_deployed.py DIR [MODEL ...] [-- FORM ...]`.

Needs timm, onnxslim and onnxsim beside the development environment. Each model of `deployed_models` is exported,
brought into each form of `graph_forms`, and gets each adapter as constants, slots and merged. The result is compared
with the torch model with PEFT's adapter: within 1e-5, or three times what the form itself costs, its distance from
torch without an adapter or with weights that PEFT merged. Static quantization clips what is larger than its calibration
data. Where a report says so, the case is `clipped` if the graph computes what the source graph computes whose weights
were changed by hand (clipped_reference.py), both clipping and neither rounding; or if it is right without both. Else it
is `clipped, unproven`. A form that is off by as much as the adapter changes needs this proof, too.
DIR/deployed.MODEL.tsv has a row for each case: model, form, method, mode, result, difference, the form's own cost, how
much the adapter changes, a note. A run writes each form's rows as soon as they are known, and keeps the rows of other
forms; `--resume` as the first word skips the forms that already have rows. torch's exports, which take most of the time
of a run of few forms, are kept in DIR/MODEL until a model or a package changes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clipped_reference import Clipping, Unfit, references
from deployed_models import METHODS, MODELS, adapted, answered, inner_of, made
from graph_forms import FORMS, exported, ran

import adapterkit as ak
from adapterkit.errors import AdapterkitError
from adapterkit.onnx.unrounded import unround

MODES = ("constant", "slots", "merge")

PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers", "diffusers", "timm", "peft", "numpy")
"""What decides, beside the models, what an export contains."""

COLUMNS = ("model", "form", "method", "mode", "result", "difference", "cost", "effect", "note")

EXACT, TIMES, BY_HAND, TELLING = 1e-5, 3.0, 1e-4, 0.25
"""Limit of exact forms; how many times its own distance from torch a form may be off; limit of the changes by hand; the
largest difference, relative to the adapter's effect, that shows that the adapter is there."""


def distance(got: Any, wanted: Any) -> float:
    """Return the largest difference, relative to the largest number."""
    return float(abs(got - wanted).max() / abs(wanted).max())


def changed(source: Path, folder: Path, mode: str, out: Path, base: Path | None) -> ak.onnx.GraphReport:
    """Change a graph; packed weights are merged into in floating point."""
    if mode != "merge":
        return ak.onnx.inject(source, folder, out, mode=mode, base_weights=base)
    try:
        return ak.onnx.merge(source, folder, out, base_weights=base)
    except AdapterkitError as error:
        if "quantized" not in (error.cure or ""):
            raise
    return ak.onnx.merge(source, folder, out, base_weights=base, quantized="dequantize")


def tried(source: Path, folder: Path, mode: str, out: Path, base: Path) -> tuple[str, str]:
    """Change a graph, with the base's weights where names do not tell; return what came of it, and a note."""
    note = ""
    for weights in (None, base):
        try:
            report = changed(source, folder, mode, out, weights)
        except AdapterkitError as error:
            if weights is None and "weights" in (error.cure or ""):
                note = "with the base's weights"
                continue
            return ("false alarm" if error.code == "check-failed" else "refused"), str(error)
        # Without the rounding, the change is proven; what is left is what the warning tells.
        proven = report.difference is not None and report.difference <= 3e-2
        if proven and any("clips" in line for line in report.warnings):
            return "clipped", note
        if report.difference is None:
            note = f"{note} not checked: {report.note}".strip()
        return "written", note
    raise AssertionError


def unrounded(path: Path, home: Path) -> Path | None:
    """Write a graph without the rounding of activations; return its path, or None if that is not possible."""
    import onnx
    import onnx_ir as ir

    model = ir.from_proto(onnx.load(path))
    if not unround(model):
        return None
    onnx.save(ir.to_proto(model), home / "unrounded.onnx")
    return home / "unrounded.onnx"


def by_hand(
    source: Path, adapter: Path, out: Path, home: Path, feeds: Mapping[str, Any], slots: Path | None, apart: bool
) -> tuple[float, str]:
    """Return how far a changed graph is from the nearest graph that was changed by hand, and that graph's name."""
    file = home / "by_hand.onnx"
    nearest = float("inf"), "none"
    try:
        got = ran(Clipping(out).save(file), feeds, slots)
        for name, path in references(source, adapter, home / "model.safetensors", file, apart):
            nearest = min(nearest, (distance(got, ran(path, feeds)), name))
            if nearest[0] <= BY_HAND:
                break
    except Unfit as error:
        return float("nan"), str(error)
    return nearest


def proof(
    source: Path, adapter: Path, out: Path, feeds: Mapping[str, Any], slots: Path | None, before: Any, wanted: Any
) -> tuple[bool, str]:
    """Return whether a graph that clips is proven to be right, and a note; the quickest proofs come first."""
    home = out.parent
    off, how = by_hand(source, adapter, out, home, feeds, slots, apart=False)
    note = f"by hand {off:.2g} ({how})"
    if off <= BY_HAND:
        return True, note
    if (bare := unrounded(out, home)) is not None:
        off = distance(ran(bare, feeds, slots), wanted)
        plain = [(source, before), (home / "merged.onnx", wanted)]
        cost = max(distance(ran(unrounded(one, home) or one, feeds), told) for one, told in plain)
        note = f"{note} without rounding {off:.2g}, cost {cost:.2g}"
        if off <= max(EXACT, TIMES * cost):
            return True, note
    off, how = by_hand(source, adapter, out, home, feeds, slots, apart=True)
    return off <= BY_HAND, f"{note} by hand {off:.2g} ({how})"


def exports(model: str, home: Path, methods: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Write torch's graphs of a model and of its merged weights, unless they are there; return torch's outputs."""
    from safetensors.torch import save_file

    texts = [Path(__file__).with_name(name).read_bytes() for name in ("deployed_models.py", "graph_forms.py")]
    texts += [f"{name} {importlib.metadata.version(name)}".encode() for name in PACKAGES]
    key, kept = hashlib.sha256(b"\0".join(texts)).hexdigest(), home / "exports.key"
    there = kept.is_file() and kept.read_text(encoding="utf-8") == key
    kept.unlink(missing_ok=True)
    told = MODELS[model]
    torch_model = made(model)
    save_file({k: v.clone() for k, v in inner_of(torch_model).state_dict().items()}, home / "model.safetensors")
    before = answered(torch_model, model)
    if not there:
        exported(torch_model, told.inputs, home / "exported.onnx", told.dynamo)
    wanted = {}
    for method in methods:
        wanted[method], merged = adapted(model, method, home / method)
        if not there:
            exported(merged, told.inputs, home / f"{method}.onnx", told.dynamo)
    kept.write_text(key, encoding="utf-8")
    return before, wanted


def rows_of(model: str, home: Path, forms: list[str], methods: tuple[str, ...]) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the rows of each form of one model."""
    home.mkdir(parents=True, exist_ok=True)
    before, wanted = exports(model, home, methods)
    told = MODELS[model]
    feeds: Mapping[str, Any] = {name: value.numpy() for name, value in told.inputs.items()}
    for form in forms:
        rows: list[tuple[Any, ...]] = []
        source = home / "form.onnx"
        try:
            source.unlink(missing_ok=True)
            FORMS[form](home / "exported.onnx", source, feeds)
            own = distance(ran(source, feeds), before)
        except Exception as error:  # Whatever another tool raises: it does not write this form of this model.
            rows.append((model, form, "", "", "no such form", "", "", "", f"{type(error).__name__}: {error}"[:160]))
            print(*rows[-1], sep="\t", flush=True)
            yield rows
            continue
        for method in methods:
            cost, effect = own, distance(before, wanted[method])
            if own > EXACT:
                FORMS[form](home / f"{method}.onnx", home / "merged.onnx", feeds)
                cost = max(own, distance(ran(home / "merged.onnx", feeds), wanted[method]))
            for mode in MODES:
                for file in home.glob("out*"):
                    file.unlink()
                out = home / "out.onnx"
                result, note = tried(source, home / method, mode, out, home / "model.safetensors")
                difference = float("nan")
                if result in ("written", "clipped"):
                    slots = out.with_suffix(".onnx_adapter") if mode == "slots" else None
                    difference = distance(ran(out, feeds, slots), wanted[method])
                    right = difference <= max(EXACT, TIMES * cost)
                    if right and difference > TELLING * effect:
                        right, result = False, "clipped"
                    if not right and result == "clipped":
                        proven, session_outputs = proof(
                            source, home / method, out, feeds, slots, before, wanted[method]
                        )
                        note = f"{note} {session_outputs}".strip()
                        result = "clipped" if proven else "clipped, unproven"
                    result = "right" if right else "wrong" if result == "written" else result
                numbers = (f"{difference:.2g}", f"{cost:.2g}", f"{effect:.2g}")
                rows.append((model, form, method, mode, result, *numbers, " ".join(note.split())))
                print(*rows[-1], sep="\t", flush=True)
        yield rows


def written(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of a table by form."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            row = tuple(line.split("\t"))
            rows.setdefault(row[1], []).append(row)
    return rows


def main() -> int:
    """Run the command line; 1 if a case is wrong, or a right graph is refused by the check."""
    logging.disable(logging.CRITICAL)
    words = sys.argv[1:]
    resume = words[0] == "--resume"
    home, *words = words[resume:]
    at = words.index("--") if "--" in words else len(words)
    counts: Counter[str] = Counter()
    for model in words[:at] or MODELS:
        table = Path(home) / f"deployed.{model}.tsv"
        rows = written(table)
        forms = [form for form in words[at + 1 :] or FORMS if not (resume and form in rows)]
        for of_form in rows_of(model, Path(home) / model, forms, METHODS) if forms else ():
            rows[of_form[0][1]] = of_form
            lines = ["\t".join(map(str, row)) for form in FORMS for row in rows.get(form, ())]
            table.write_text("\n".join(["\t".join(COLUMNS), *lines]) + "\n", encoding="utf-8")
        counts += Counter(row[4] for of_form in rows.values() for row in of_form)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return int(counts["wrong"] + counts["false alarm"] > 0)


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
