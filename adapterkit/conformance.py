"""Run the specification's test vectors on a program that reads adapterkit files (spec/README.md, section 16).

Any program can be tested. `conformance` calls the program with a verb (such as `check`) and paths, and the program
prints one line of JSON per path. The vectors contain the expected results, so `conformance` does not call adapterkit's
own reader of adapters.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from .errors import Corrupt, UsageError

BATCH = 100
"""The maximum number of paths in one call of the program."""

CONTEXTS = ("embeddings", "decoder_embeddings", "past", "attention", "prefix", "vocabulary")
OUTPUTS = ("merged.weight", "merged.bias", "y", *CONTEXTS)
"""The names of the tensors that a program can print for the verb `compute`. The base file of a `compute` case contains
the weights, the inputs, and the expected values of these tensors."""

TEXTS = {"canonical": ("canonical", "canonical"), "rules": ("values", "value")}
"""For each verb whose answer contains a list of texts: the key of this list in the answer, and the key of the expected
text in each entry of the vector."""

SIGNED_ZEROS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The dtypes that have a negative zero."""

SECONDS = 300
"""The time limit for one batch, in seconds."""


@dataclass(frozen=True, slots=True)
class CaseOutcome:
    """The result of one case.

    Attributes:
        case: the name of the case in the index.
        conformance_class: the kind of program that the case tests: reader, validator, base reader, merger, runtime or
            writer.
        requirements: the ids of the requirements that the case tests, such as R-10.4.
        verb: the verb with which the program was called, such as `check` or `merge`.
        passed: whether the program printed the expected result; None if the case was not decided, because the program
            does not support the case's method, verb or formula.
        why: the difference from the expected result, or what the program does not support; empty if the case passed.
    """

    case: str
    conformance_class: str
    requirements: tuple[str, ...]
    verb: str
    passed: bool | None
    why: str = ""


class Expected(TypedDict, total=False):
    """The expected answer of a case: an error and its location, or the digest and tensors that the answer must have."""

    error: str
    where: str
    exact: bool
    digest: str
    tensors: dict[str, list[object]]
    tolerance: float


Case = TypedDict(
    "Case",
    {
        "case": str, "class": str, "requirements": list[str], "verb": str, "methods": NotRequired[list[str]],
        "inputs": dict[str, str], "path": NotRequired[str], "expected": Expected,
    },
)  # fmt: skip
"""One test case: an entry of the vectors' index. Section 16 of the specification defines the fields."""

Line = Mapping[str, object]
"""The JSON object that the program printed as its answer; the names and types of its fields are not checked yet."""

Ask = Callable[[str, Sequence[Path]], Iterable[Line]]
"""A function that takes a verb and paths, and returns the program's answers: one per path, but a single answer
for `compute` and `merge`."""


def conformance(command: Sequence[str] | Ask, suite: Path | None = None) -> list[CaseOutcome]:
    """Run a program on all cases, and return the outcome of each.

    Args:
        command: the program's command line, to which the verb and the paths are appended. It may also be a Python
            function that takes the verb and the paths, and returns the answers.
        suite: the path of the folder `spec/vectors`, or of the zip archive of this folder from a release. Default:
            `spec/vectors` in this checkout.

    Raises:
        UsageError: `suite` has no `index.json`.
        Corrupt: a vector is missing, or its sha256 differs from the one in `index.json`.

    Example:
        >>> from adapterkit.conformance import conformance
        >>> outcomes = conformance(["node", "spec/readers/javascript/cli.mjs"])  # doctest: +SKIP
    """
    if suite is not None and suite.is_file() and zipfile.is_zipfile(suite):
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(suite) as archive:
            archive.extractall(folder)
            return conformance(command, Path(folder, "spec", "vectors"))
    root = suite or Path(__file__).parents[1] / "spec" / "vectors"
    if not (root / "index.json").is_file():
        cure = "Pass --suite PATH (suite=Path(...)); PATH is the folder spec/vectors, or its zip archive from a release"
        raise UsageError("the folder has no index.json, which lists the vectors", path=root, cure=cure)
    cases: list[Case] = json.loads((root / "index.json").read_text("utf-8"))["cases"]
    for name, digest in {name: digest for case in cases for name, digest in case["inputs"].items()}.items():
        if not (root / name).is_file() or hashlib.sha256((root / name).read_bytes()).hexdigest() != digest:
            raise Corrupt(
                "the vector is missing, or its sha256 is not the one in index.json",
                path=root / name,
                cure="Download the suite again",
            )
    ask: Ask = command if callable(command) else partial(_lines, command)
    results = []
    known: set[str] = set()
    for verb in ("check", "base", *TEXTS):
        verb_cases = [case for case in cases if case["verb"] == verb]
        paths = [root / case.get("path", next(iter(case["inputs"]))) for case in verb_cases]
        lines = list(ask(verb, paths))
        known |= {
            name for case, line in zip(verb_cases, lines, strict=True) if line.get("ok") for name in _methods(case)
        }
        for case, path, line in zip(verb_cases, paths, lines, strict=True):
            if _foreign(case, line, known):
                results.append(_outcome(case, None, "the program does not know the method"))
            else:
                results.append(_rewritten(case, line, path) if verb in TEXTS else _judged(case, line))
    for case in (case for case in cases if case["verb"] in ("compute", "merge")):
        adapter, base, *merged = (root / name for name in case["inputs"])
        (line,) = ask(case["verb"], [adapter, base])
        if _foreign(case, line, known):
            results.append(_outcome(case, None, "the program does not know the method"))
        elif case["verb"] == "compute":
            results.append(_computed(case, line, base))
        else:
            results.append(_merged(case, line, merged[0] if merged else None))
    return results


def _methods(case: Case) -> list[str]:
    return list(case.get("methods", ()))


def _foreign(case: Case, line: Line, known: set[str]) -> bool:
    """Whether the program refused a case because it does not know the case's method; R-7.1 requires this refusal."""
    where, wanted = str(line.get("where", "")), case["expected"]
    if line.get("error") != "Unsupported" or not where.startswith("updates["):
        return False
    # Do not compare locations for `compute` and `merge`. Some of these cases expect Unsupported at `q`, and a program
    # that does not know the method can answer `updates[0] (q)`, which contains `q`.
    reads = case["verb"] not in ("compute", "merge")
    right = reads and wanted.get("error") == "Unsupported" and wanted.get("where", "") in where
    return not right and not known.issuperset(_methods(case))


def _lines(command: Sequence[str], verb: str, paths: Sequence[Path]) -> Iterable[Line]:
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        done = subprocess.run([*command, verb, *map(str, batch)], capture_output=True, timeout=SECONDS, check=False)
        # Do not use splitlines(): JSON may contain U+2028, which Python treats as the end of a line.
        lines = done.stdout.split(b"\n")
        for number in range(1 if verb in ("compute", "merge") else len(batch)):
            try:
                line = json.loads(lines[number])
            except (IndexError, ValueError):
                why = f"the program did not print a line of JSON (exit code {done.returncode})"
                line = {"ok": False, "error": why, "where": ""}
            yield line if isinstance(line, dict) else {"ok": False, "error": "not a JSON object", "where": ""}


def _outcome(case: Case, passed: bool | None, why: str = "") -> CaseOutcome:
    return CaseOutcome(case["case"], case["class"], tuple(case["requirements"]), case["verb"], passed, why)


def _judged(case: Case, line: Line) -> CaseOutcome:
    wanted, why = case["expected"], ""
    if "error" in wanted:
        if line.get("ok"):
            why = f"the program accepted the file, but the expected answer is {wanted['error']}"
        elif line.get("error") != wanted["error"]:
            why = f"the error is {line.get('error')} instead of {wanted['error']}"
        elif wanted.get("exact") and line.get("where") != wanted.get("where"):
            why = f"the location {line.get('where')!r} is not {wanted.get('where')!r}"
        elif wanted.get("where", "") not in str(line.get("where")):
            why = f"the location {line.get('where')!r} does not contain {wanted.get('where')!r}"
    elif not line.get("ok"):
        why = f"the program refused the file: {line.get('error')} at {line.get('where')!r}"
    elif "tensors" in wanted and line.get("tensors") != wanted["tensors"]:
        why = f"the tensors are {line.get('tensors')} instead of {wanted['tensors']}"
    elif line.get("digest") != wanted.get("digest", line.get("digest")):
        why = f"the digest is {line.get('digest')} instead of {wanted.get('digest')}"
    return _outcome(case, not why, why)


def _rewritten(case: Case, line: Line, path: Path) -> CaseOutcome:
    """Compare the texts in the program's answer with the expected texts, one by one."""
    answers, field = TEXTS[case["verb"]]
    wanted = [each[field] for each in json.loads(path.read_text("utf-8"))]
    if line.get("error") == "Unsupported":
        return _outcome(case, None, f"the program does not support the verb {case['verb']}")
    got = line.get(answers)
    if not line.get("ok") or not isinstance(got, list) or len(got) != len(wanted):
        return _outcome(case, False, f"{line.get('error', 'the answer does not have one text for each expected text')}")
    pairs = enumerate(zip(got, wanted, strict=True))
    why = next((f"text number {at} is {one!r} instead of {other!r}" for at, (one, other) in pairs if one != other), "")
    return _outcome(case, not why, why)


def _merged(case: Case, line: Line, expected: Path | None) -> CaseOutcome:
    """Check the merged tensors in the program's answer against the file `expected`: names, dtypes, shapes and bytes.

    If `expected` is None, check that the program refuses the merge.
    """
    from .io import safetensors

    judged = _judged(case, line) if expected is None else None
    if judged is not None and (judged.passed or line.get("error") != "Unsupported"):
        return judged
    if expected is None or line.get("error") == "Unsupported":
        return _outcome(case, None, "the program does not support merges")
    if not line.get("ok"):
        return _outcome(case, False, f"{line.get('error', 'the answer has no tensors')}")
    wanted = {
        name: [leaf.dtype.name, list(leaf.shape), bytes(leaf.fetch()).hex()]
        for name, leaf in safetensors.read(expected).items()
    }
    got = line.get("tensors")
    if not isinstance(got, dict) or got.keys() != wanted.keys():
        return _outcome(case, False, "the names of the merged tensors differ")
    why = next((f"{name} differs" for name in wanted if not _same(got[name], wanted[name])), "")
    return _outcome(case, not why, why)


def _same(got: object, wanted: list[Any]) -> bool:
    """Whether a tensor has the expected dtype, shape and bytes; -0.0 and 0.0 count as equal (R-10.4)."""
    if not isinstance(got, list) or got[:2] != wanted[:2] or len(got) != len(wanted) or not isinstance(got[2], str):
        return False
    return _without_negative_zeros(*got) == _without_negative_zeros(*wanted)


def _without_negative_zeros(dtype: str, shape: Sequence[int], text: str) -> list[str]:
    """Split a tensor's little-endian hexadecimal text into elements, and replace each -0.0 by 0.0."""
    width = max(2, len(text) // max(1, math.prod(shape)))
    elements = [text[at : at + width] for at in range(0, len(text), width)]
    negative = "80".rjust(width, "0")
    return ["0" * width if dtype in SIGNED_ZEROS and each == negative else each for each in elements]


def _is_output(output: object) -> bool:
    """Whether an output is an error, or only has tensors, each with a shape and as many numbers as the shape says."""
    import numpy as np

    if not isinstance(output, dict):
        return False
    try:
        return "error" in output or all(
            np.asarray(each["values"], dtype="f8").shape == (math.prod(each["shape"]),) for each in output.values()
        )
    except (LookupError, TypeError, ValueError, OverflowError):
        return False


def _computed(case: Case, line: Line, expected: Path) -> CaseOutcome:
    """Check the tensors that the program computed. The file `expected` contains the base and the expected tensors.

    The outcome's `passed` is None if the program answers Unsupported for at least one target's path, and all tensors
    that it computed for other paths are right.
    """
    import numpy as np

    from .io import safetensors

    outputs = line.get("outputs")
    if not line.get("ok") or not isinstance(outputs, dict):
        return _outcome(case, False, f"{line.get('error', 'the answer has no outputs')}")
    if not all(_is_output(each) for each in outputs.values()):
        return _outcome(case, False, "an output of the answer is neither an error nor tensors with a shape and values")
    without = {path for path, each in outputs.items() if each.get("error") == "Unsupported"}
    lacking = bool(outputs) and len(without) == len(outputs)
    judged = _judged(case, next(iter(outputs.values()), {})) if "error" in case["expected"] else None
    if judged is not None and (judged.passed or not lacking):
        return judged
    if lacking:
        return _outcome(case, None, "the program has no formula for the case")
    tolerance = case["expected"].get("tolerance", 0.0)
    extra = {f"{path}.{name}" for path, arrays in outputs.items() if "error" not in arrays for name in arrays}
    for name, leaf in safetensors.read(expected).items():
        path, _, leaf_name = name.rpartition(".")
        merged = path.endswith(".merged")
        path, word = path.removesuffix(".merged"), f"merged.{leaf_name}" if merged else leaf_name
        if word not in OUTPUTS:
            continue
        path = "" if path == "(model)" else path
        if path in without:
            continue
        arrays = outputs.get(path, {})
        extra.discard(f"{path}.{word}")
        got = arrays.get(word)
        if got is None and word == "y" and "merged.weight" in arrays:
            continue  # `y` may be missing, because a program that only merges weights does not compute outputs.
        if got is None:
            return _outcome(case, False, f"{name} is missing")
        wanted = leaf.numpy()
        values = np.asarray(got["values"], dtype="f8")
        if list(got["shape"]) != list(wanted.shape):
            why = f"{name} has the shape {got['shape']}, not {list(wanted.shape)}"
            return _outcome(case, False, why)
        far = np.abs(values - wanted.reshape(-1)) > tolerance * np.maximum(1, np.abs(wanted.reshape(-1)))
        if far.any() or not np.isfinite(values).all():
            return _outcome(case, False, f"{name} differs at element {int(far.argmax())}")
    if extra:
        return _outcome(case, False, f"the answer has {min(extra)}, which the case does not expect")
    if without:
        return _outcome(case, None, f"the program has no formula for {', '.join(sorted(without))}")
    return _outcome(case, True)
