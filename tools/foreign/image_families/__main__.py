"""Makes the files of image, video and audio families in spec/architectures from diffusers' own classes and converters.

    python tools/foreign/image_families [FAMILY...]      write the files (of all families)
    python tools/foreign/image_families --check          compare the files with diffusers; exits 1 on a difference

Needs diffusers 0.42.1. Every row that goes into a converter has a number of its own, so that what comes out shows each
split, order and swap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import warnings
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path
from typing import Any

import diffusers
import torch
from families import _LTX, ENCODERS, FAMILIES, SD_SCRIPTS, WORDS, Family, State

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "spec" / "architectures"
HOLE = re.compile(r"(?<=blocks\.)\d+|(?<=layers\.)\d+|(?<=refiner\.)\d+|(?<=norms\.)\d+|(?<=experts\.)\d+"
                  r"|(?<=adaLN_modulations\.)\d+|(?<=layernorm_list\.)\d+|(?<=adaln_modules\.)\d+"
                  r"|(?<=face_adapter\.)\d+|(?<=injector\.)\d+|(?<=injector_adain_layers\.)\d+"
                  r"|(?<=image\.)\d+|(?<=image_cond\.)\d+|(?<=^caption_projection\.)\d+(?=\.linear)")  # fmt: skip
LETTERS = "nmkj"


def main() -> int:
    """Write or check the files of the families that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    failed = 0
    for name in arguments.families or FAMILIES:
        try:
            text = toml_of(name, FAMILIES[name])
        except Exception as error:  # One family that fails must not stop the others.
            failed += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
            continue
        path = OUT / f"{name}.toml"
        if arguments.check:
            same = path.exists() and path.read_text() == text
            failed += not same
            print(f"{name}: {'same' if same else 'DIFFERENT'}")
        else:
            path.write_text(text)
    return int(bool(failed))


def toml_of(name: str, family: Family) -> str:
    """The file's text."""
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for class_name in family.classes:
        found, number = modules_of(class_name, family.config if class_name == family.classes[0] else {})
        shapes = {**found, **shapes}
        counts = {word: max(counts.get(word, 0), n) for word, n in (*number.items(), *counts.items())}
    weights = weights_of(family, shapes)
    widths = {shape[1] for key, shape in shapes.items() if _projects(key, shape)} | {*family.widths}
    facts: dict[str, Any] = {}
    if family.component != "transformer":
        facts["component"] = family.component
    if family.title:
        facts["title"] = family.title
    facts["classes"] = [*family.classes, *family.alike]
    facts["words"] = WORDS[name]
    if name in SD_SCRIPTS:
        facts["sd_scripts"] = True
    if family.kohya != "native":
        facts["kohya"] = family.kohya
    if family.distinctive:
        facts["distinctive"] = True
    if family.unlikely:
        facts["unlikely"] = True
    if family.no_inputs:
        facts["no_inputs"] = list(family.no_inputs)
    if family.outputs:
        facts["outputs"] = {size: list(sizes) for size, sizes in family.outputs.items()}
    facts["widths"] = sorted(widths)
    if family.beside:
        facts["beside"] = family.beside
    if family.modules:
        facts["modules"] = {part: list(modules_of(kind, {})[0]) for part, kind in family.modules.items()}
    if family.diffsynth_head:
        facts["diffsynth_head"] = family.diffsynth_head
    if family.header_alpha:
        facts["header_alpha"] = True
    if family.whole_norms:
        facts["whole_norms"] = True
    if family.counted:
        first = {key.partition(".")[0]: _name(places["native"]).partition(".")[0] for key, places in weights.items()
                 if "{n}" in key and "native" in places}  # fmt: skip
        facts["blocks"] = {**counts, **{first[word]: n for word, n in counts.items() if word in first}}
    ratios: dict[str, Any] = {}
    for weight, places in weights.items():
        shape = shapes.get(weight, ())
        fused = isinstance(places.get("native"), dict)
        if (
            len(shape) > 1
            and weight not in family.cases
            and (fused or any(fnmatch(weight, each) for each in family.ratios))
        ):
            ratio = shape[0] / shape[1]
            ratios[weight] = int(ratio) if ratio == int(ratio) else round(ratio, 6)
        for pattern, several in family.several.items():
            if fnmatch(weight, pattern):
                ratios[weight] = list(several)
    keyed = ["native", "diffusers"] if family.native == "=" else ["diffusers"]
    if family.fused:
        keyed.append("diffusers_fused")
    for fused, parts in family.fused.items():
        names = _expanded(parts)
        for weight, places in weights.items():
            block, _, last = weight.rpartition(".")
            if last in names:
                # Queries have more rows than keys and values where heads share these.
                rows = [shapes[f"{block}.{name}"][0] for name in names]
                unit, at = reduce(math.gcd, rows), names.index(last)
                place = {"name": f"{block}.{fused}", "part": sum(rows[:at]) // unit, "parts": rows[at] // unit,
                         "of": sum(rows) // unit}  # fmt: skip
                places["diffusers_fused"] = _place(place)
    for weight, places in weights.items() if family.comfyui else ():
        source = places.get("native", "")
        there = family.comfyui.get(_name(source))
        if isinstance(there, str) and there and isinstance(source, dict):
            there = {**source, "name": there}  # The same rows of a module with another name.
        own = places.get("diffusers", weight)
        if there is None and (renamed := family.comfyui.get(_name(own))) is not None:
            # ComfyUI has diffusers' module under another name, with the rows in diffusers' order.
            there = {**own, "name": renamed} if isinstance(own, dict) else renamed
        if there is not None:
            places["comfyui"] = there
    for places in weights.values() if family.trained else ():
        if (there := family.trained.get(_name(places.get("native", "")))) is not None:
            places["sd_scripts"] = there
    # A weight whose key is no name in diffusers needs its place in both namings.
    for places in weights.values() if family.fused else ():
        if "diffusers" in places:
            places["diffusers_fused"] = places["diffusers"]
    extended = [f'{naming} = "native"' for naming in ("comfyui", "trained") if getattr(family, naming)]
    extended = [each.replace("trained", "sd_scripts") for each in extended]
    lines = [
        "# Made by tools/foreign/image_families and reviewed. spec/architectures/README.md says what each field means.",
        "format = 1", f'family = "{name}"', "model_types = []",
        f"sources = {_value([*family.sources, f'diffusers {diffusers.__version__}: its model and converter'])}",
        f"keyed = {_value(keyed)}", *([f"extends = {{ {', '.join(extended)} }}"] if extended else []), "",
        "[pipeline]", *(f"{key} = {_value(each)}" for key, each in facts.items()),
    ]  # fmt: skip
    if name in ENCODERS:
        known = {key: {word: each for word, each in found.items() if each} for key, found in ENCODERS[name].items()}
        lines += ["", "[pipeline.encoders]", *(f"{key} = {_value(each)}" for key, each in known.items())]
    if ratios:
        lines += ["", "[pipeline.ratios]", *(f'"{key}" = {_value(each)}' for key, each in ratios.items())]
    lines += ["", "[weights]", *(f'"{key}" = {_value(each)}' for key, each in weights.items())]
    return "\n".join(lines) + "\n"


def _projects(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a module projects a block's inputs to queries."""
    return key.endswith((".to_q", ".to_query", ".to_qkv_mlp_proj")) and "{n}" in key and len(shape) == 2


def modules_of(class_name: str, config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Template of a module that holds a weight -> the weight's shape; first word of a name -> number of blocks."""
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config)
    shapes, counts = {}, dict[str, int]()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            shapes.setdefault(template(name), tuple(module.weight.shape))
        words = name.split(".")
        if len(words) == 2 and words[1].isdigit() and HOLE.search(name):
            counts[words[0]] = max(counts.get(words[0], 0), int(words[1]) + 1)
    return shapes, counts


def template(name: str) -> str:
    """A name with holes for the numbers of blocks."""
    letters = iter(LETTERS)
    return HOLE.sub(lambda _: "{" + next(letters) + "}", name)


def weights_of(family: Family, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """The weights, in order of diffusers' modules; those that no converter makes have no native name."""
    if family.convert is None:
        return {key: dict(family.others.get(key, {})) for key in shapes}
    pieces, lost = pieces_of(family, shapes)
    weights: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys((*shapes, *pieces)):
        parts = pieces.get(key, [])
        if not parts:
            weights[key] = {}
        for number, (there, here) in enumerate(parts):
            if here["of"] == 1:
                weights[key] = {"native": _place(there)}
            else:
                weights[f"{key}.{number}"] = {"diffusers": _place({"name": key, **here}), "native": _place(there)}
    unknown = [key for key in pieces if key not in shapes]
    cases = {_name(places["native"]) for places in family.cases.values()}
    for weight, places in family.cases.items():
        check_case(family, weight, places)
        weights[weight] = places
    for name in lost:
        if name in cases:
            continue
        weights[name if name not in weights else f"native.{name}"] = {"diffusers": "", "native": name}
    for ours, theirs in family.parameters.items():
        weights[ours] = {"native": theirs}
    for pattern in itertools.chain.from_iterable(map(_expanded, family.elsewhere.split())):
        weights[pattern.replace("#", "{n}")] = {"diffusers": "", "native": pattern.replace("#", "{n}")}
    if unknown:
        print(f"{family.classes[0]} has no {', '.join(unknown)}", file=sys.stderr)
    return weights


def check_case(family: Family, weight: str, places: dict[str, Any]) -> None:
    """Check a case against the converter: the first block has the larger ratio, the last the smaller.

    Raises:
        ValueError: the converter puts these rows elsewhere.
    """
    state, names, rows = symbolic(family, {})
    made = family.convert(Known(state)) if family.convert else {}
    native, own = places["native"], places.get("diffusers", {"name": weight})
    largest = max(each["native"]["ratio"] for each in family.cases.values())
    number = "0" if native["ratio"] == largest else str(family.blocks - 1)
    source = names.index(native["name"].replace("{n}", number))
    got = [int(value) for value in made[f"{own['name'].replace('{n}', number)}.weight"][:, 0].tolist()]
    unit = rows[source] // native.get("of", 1)
    first, start = source * 1_000_000 + native.get("part", 0) * unit, own.get("part", 0) * unit
    if got[start : start + unit] != list(range(first, first + unit)):
        raise ValueError(f"{weight}: the converter has other rows there")


def pieces_of(family: Family, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, list[tuple[Any, Any]]], list[str]]:
    """diffusers' module -> its runs, (native place, own place); native names that are not the same in all blocks."""
    state, names, rows = symbolic(family, shapes)
    made = family.convert(Known(state)) if family.convert else {}
    segments: dict[str, list[tuple[int, int, int, int]]] = {}
    for key, tensor in made.items():
        if tensor is None or not key.endswith(".weight"):
            continue
        found = _runs([int(value) for value in tensor.reshape(len(tensor), -1)[:, 0].tolist()])
        if found[0][0] >= 0:
            segments[key.removesuffix(".weight")] = found
    cuts: dict[int, set[int]] = {}
    for found in segments.values():
        for source, first, _, size in found:
            cuts.setdefault(source, set()).update({first, first + size})
    pieces: dict[str, list[tuple[Any, Any]]] = {}
    uneven: set[str] = set()
    for module, found in segments.items():
        total = sum(size for *_, size in found)
        own = _unit([at for _, _, at, _ in found] + [total])
        parts = []
        for source, first, at, size in found:
            unit = _unit([*cuts[source], rows[source]])
            there = {"name": template(names[source]), "part": first // unit, "parts": size // unit,
                     "of": rows[source] // unit}  # fmt: skip
            here = {"part": at // own, "parts": size // own, "of": total // own}
            parts.append((there, here))
        key = template(module)
        if pieces.setdefault(key, parts) != parts:
            uneven |= {key, *(there["name"] for there, _ in parts)}
    # A module that goes elsewhere in the last block, whose number is the model's, has no name that a pattern can say.
    homes: dict[str, set[str]] = {}
    for key, parts in pieces.items():
        for there, _ in parts:
            homes.setdefault(json.dumps(there), set()).add(key)
    uneven |= {json.loads(there)["name"] for there, keys in homes.items() if len(keys) > 1}
    lost = [key for key, parts in pieces.items() if key in uneven or any(t["name"] in uneven for t, _ in parts)]
    if lost:
        print(f"{family.classes[0]}: {', '.join(lost)} are not the same in all blocks", file=sys.stderr)
    names_lost = {there["name"] for key in lost for there, _ in pieces[key]}
    return {key: parts for key, parts in pieces.items() if key not in lost}, sorted(names_lost)


def symbolic(family: Family, shapes: dict[str, tuple[int, ...]]) -> tuple[State, list[str], list[int]]:
    """A state dict in the authors' names whose rows are numbered; the names, and how many rows each has."""
    state: State = {}
    names, rows = list[str](), list[int]()
    patterns = family.native.split() if family.native != "<ltx>" else [_renamed(key) for key in shapes]
    for pattern in itertools.chain.from_iterable(map(_expanded, patterns)):
        pattern, _, times = pattern.partition("*")
        pattern, _, leaf = pattern.partition(":")
        for number in range(family.blocks if "#" in pattern else 1):
            name = pattern.replace("#", str(number))
            count = family.rows * int(times or 1)
            names.append(name)
            rows.append(count)
            first = (len(names) - 1) * 1_000_000
            state[f"{name}.{leaf or 'weight'}"] = torch.arange(first, first + count, dtype=torch.float64)[:, None]
    return state, names, rows


class Known(dict[str, Any]):
    """A state dict that has whatever a converter takes out of it: biases and tables go anywhere and are left out."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.rows = {key: len(value) for key, value in state.items()}

    def pop(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        if key in self:
            return super().pop(key)
        weight = f"{key.rpartition('.')[0]}.weight"
        self.rows.setdefault(key, len(self[weight]) if weight in self else self.rows.get(weight, 12))
        return torch.full((self.rows[key], 1), -1.0)


def _renamed(key: str) -> str:
    words = [_LTX.get(word, word) for word in re.sub(r"\{[a-z]\}", "#", key).split(".")]
    return ".".join(words)


def _expanded(pattern: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [each for word in found[1].split(",") for each in _expanded(head + word + tail)]


def _runs(values: list[int]) -> list[tuple[int, int, int, int]]:
    """(number of the source, first row there, first row here, how many) of each run of consecutive rows."""
    runs: list[tuple[int, int, int, int]] = []
    for at, value in enumerate(values):
        source, row = divmod(value, 1_000_000)
        if runs and runs[-1][0] == source and runs[-1][1] + runs[-1][3] == row:
            runs[-1] = (*runs[-1][:3], runs[-1][3] + 1)
        else:
            runs.append((source, row, at, 1))
    return runs


def _unit(edges: list[int]) -> int:
    return reduce(math.gcd, edges)


def _name(place: Any) -> str:
    return str(place["name"] if isinstance(place, dict) else place)


def _place(place: dict[str, Any]) -> Any:
    if place["of"] == 1:
        return place["name"]
    return {key: each for key, each in place.items() if key != "parts" or each != 1}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    pairs = (f"{_value(key) if '.' in key else key} = {_value(each)}" for key, each in value.items())
    return "{ " + ", ".join(pairs) + " }" if value else "{}"


if __name__ == "__main__":
    sys.exit(main())
