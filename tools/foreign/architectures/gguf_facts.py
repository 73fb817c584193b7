"""Writes the naming `gguf` into spec/architectures/*.toml from what llama.cpp's converter does to tiny models.

    python tools/foreign/architectures/gguf_facts.py LLAMA_CPP [MODEL_TYPE...]     write
    python tools/foreign/architectures/gguf_facts.py LLAMA_CPP --check             compare; exits 1 on a difference

Every row of a tiny model is a random vector of its own. A row of a GGUF tensor with the same numbers tells where the
converter put it, so nobody's rules are trusted. A tensor whose numbers or order no word of the files can say gets no
place; what merges into such a model refuses an adapter that needs it.

Needs transformers 5.24 and a checkout of llama.cpp.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import transformers
from entries import module_of
from families import FAMILIES
from pairing import stored
from tiny import tiny
from writing import _short, _value

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from adapterkit.naming.architectures import LINEAR, load  # noqa: E402
from adapterkit.naming.heads import by_group, heads_of, rope_pairs, undone  # noqa: E402

OUT = ROOT / "spec" / "architectures"
SOURCE = "llama.cpp of llama-cpp-python 0.3.36: convert_hf_to_gguf.py on tiny models"
Place = dict[str, Any]

GROUPED = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    # llama.cpp knows Mamba and Chameleon only so: an inner width of twice the outer one, as many key heads as queries.
    "mamba": {"intermediate_size": 64},
    "falcon_mamba": {"intermediate_size": 64},
    "chameleon": {"num_key_value_heads": 4},
}
"""Fields that a tiny model needs here. With one group of heads orders of rows look the same, so Falcon's has two."""


class Rows:
    """Where each row of a model's stored matrices is."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.places: dict[bytes, tuple[str, int | None, int, bool]] = {}
        self.sizes: dict[tuple[str, bool], int] = {}
        self.vectors: dict[bytes, str] = {}
        for name, tensor in tensors.items():
            if tensor.ndim == 1 or (tensor.ndim == 2 and len(tensor) == 1):
                self.vectors.setdefault(tensor.tobytes(), name)
            if tensor.ndim not in (2, 3):
                continue
            for expert, matrix in enumerate(tensor) if tensor.ndim == 3 else [(None, tensor)]:
                for turned, rows in ((False, matrix), (True, matrix.T)):
                    self.sizes[name, turned] = len(rows)
                    for number, row in enumerate(rows):
                        self.places.setdefault(row.tobytes(), (name, expert, number, turned))

    def find(self, matrix: np.ndarray) -> tuple[str, int | None, bool, list[int]] | None:
        """(stored tensor, expert, transposed, its rows in the matrix's order); None where it is not so simple."""
        found = [self.places.get(np.ascontiguousarray(row).tobytes()) for row in matrix]
        if None in found or len({(f[0], f[1], f[3]) for f in found if f}) != 1:
            return None
        name, expert, _, turned = found[0]  # type: ignore[misc]
        return name, expert, turned, [f[2] for f in found if f]


def facts(conversion: Any, model_type: str) -> tuple[str, dict[str, tuple[str, Place]]]:
    """(general.architecture, stored module with numbers -> its places in a GGUF file, with what each takes of it).

    A place has `name`, `rows` of the stored tensor in the file's order, `stacked` and `turned`.
    """
    model = tiny(model_type, **GROUPED.get(model_type, {}))
    tensors = {name: t.float().numpy() for name, t in stored(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "base", Path(folder) / "o.gguf"
        model.save_pretrained(base)
        gguf_models.convert(conversion, base, out, model_type)
        name, theirs = gguf_models.read(out)
    rows, found = Rows(tensors), {}
    for each, tensor in theirs.items():
        module = module_of(each)
        if tensor.ndim == 1 and (vector := rows.vectors.get(tensor.tobytes())) and each.endswith(".weight"):
            size = tensors[vector].shape[0]
            flat = tensors[vector].ndim == 2
            found.setdefault((module_of(vector), module), (False, list(range(size)), False, None, size, flat))
        if not each.endswith(".weight") or tensor.ndim not in (2, 3):
            continue
        matrices = list(tensor) if tensor.ndim == 3 else [tensor]
        hits = [rows.find(matrix) for matrix in matrices]
        if any(hit is None for hit in hits):
            print(f"  {model_type}: {each} has no simple place", file=sys.stderr)
            continue
        first = hits[0]
        assert first is not None
        same = all(hit and hit[2:] == first[2:] for hit in hits)
        inner = [hit[1] for hit in hits if hit]
        if not same or (tensor.ndim == 2 and first[1] is not None):
            continue
        one = tensor.ndim == 3 and first[1] is None
        for number, hit in enumerate(hits if one else hits[:1]):
            assert hit is not None
            stem = module_of(hit[0])
            expert = number if one else None
            if not one and tensor.ndim == 3 and inner != list(range(len(inner))):
                continue
            found.setdefault(
                (stem, module), (first[2], first[3], tensor.ndim == 3, expert, rows.sizes[hit[0], hit[2]], False)
            )
    return name, {"config": model.config.to_dict(), "places": found}  # type: ignore[dict-item]


def order_of(rows: list[int], size: int, config: Mapping[str, Any], theirs: str) -> Place | None:
    """What a place says of the rows; None where it has no word for them."""
    if rows == list(range(size)):
        return {}
    heads = heads_of(config, "config.json")
    if len(rows) == size:
        kinds = (("query", heads.query), ("kv", heads.kv))
        for kind, count in kinds if theirs.endswith("_q") else kinds[::-1]:
            if size % (2 * count) == 0 and rows == rope_pairs(size, count, "").tolist():
                return {"rows": "rope", "heads": kind}
        if size == sum(heads.sizes) and rows == undone(by_group(heads)).tolist():
            return {"rows": "qkv"}
        return None
    return None


def part_of(rows: list[int], size: int) -> Place | None:
    """Which equal part of its tensor the rows are."""
    if not rows or size % len(rows):
        return None
    of = size // len(rows)
    for part in range(of):
        if rows == list(range(part * len(rows), (part + 1) * len(rows))):
            return {"part": part, "of": of}
        if rows == list(range(part, size, of)):
            return {"part": part, "of": of, "interleaved": True}
    return None


_HOLE = re.compile(r"\{[a-z]\}")
LEAVES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def merged(record: dict[str, Any], told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The weights of a file with the places of `gguf` that a converted model proves."""
    architecture = load(OUT / f"{record['family']}.toml")
    uses: dict[str, dict[str, tuple[bool, list[int], bool, int, bool]]] = {}
    for (stem, module), (turned, rows, stacked, _, size, flat) in told["places"].items():
        for key, _, _ in architecture.find(stem, "hub"):
            if set(_HOLE.findall(key)) - {"{e}"} != set(_HOLE.findall(_template(module))):
                continue
            if module == "token_embd" and rows == list(range(len(rows))):
                size = len(rows)  # Rows behind the tokenizer's are cut off.
            uses.setdefault(key, {}).setdefault(_template(module), (turned, rows, stacked, size, flat))
    weights: dict[str, dict[str, Any]] = {}
    for key, namings in record["weights"].items():
        own = {naming: place for naming, place in namings.items() if naming != "gguf" or _by_hand(place)}
        for name, places in _weights(
            key, own, uses.get(key, {}), architecture.place(key, "hub"), told["config"]
        ).items():
            order = {naming: places[naming] for naming in namings if naming in places}
            weights[name] = order | places
    return weights


def _by_hand(place: Any) -> bool:
    """Whether a place has an order that this tool cannot find; check_gguf.py proves it."""
    return isinstance(place, dict) and bool(
        {"beside", "columns"} & place.keys() or place.get("rows") in (*LINEAR, "rotary")
    )


def _weights(key: str, own: dict[str, Any], uses: Mapping[str, Any], hub: Any, config: Mapping[str, Any]) -> Any:
    """One weight of a file as it will be: itself, or one weight for each part that GGUF keeps apart."""
    if "{e}" in key:
        for theirs, (_, rows, stacked, size, _) in uses.items():
            part = {} if len(rows) == size else part_of(rows, size)
            if stacked and part == ({} if hub.of is None else {"part": hub.part, "of": hub.of}):
                own["gguf"] = {"name": theirs, "stacked": True}
        return {key: own}
    if len(uses) == 1:
        ((theirs, (turned, rows, stacked, size, flat)),) = uses.items()
        order = order_of(rows, size, config, theirs) if len(rows) == size else None
        if order is not None and not stacked:
            return {key: own | {"gguf": {"name": theirs} | order | ({"flat": True} if flat else {})}}
        if order == {} and "experts" in key:
            return {_named(key, theirs, stacked): _apart(key, own, theirs, {}, turned, stacked)}
    parts = {theirs: part_of(rows, size) for theirs, (_, rows, _, size, _) in uses.items()}
    whole = {p["part"] for p in parts.values() if p} == set(range(len(parts))) and all(parts.values())
    if len(uses) < 2 or not whole:
        return {key: own}
    return {
        _named(key, theirs, stacked): _apart(key, own, theirs, parts[theirs] or {}, turned, stacked)
        for theirs, (turned, _, stacked, *_) in sorted(uses.items(), key=lambda use: parts[use[0]]["part"])  # type: ignore[index]
    }


def _named(key: str, theirs: str, stacked: bool) -> str:
    """The key of a weight that a fused one is taken apart to."""
    parent, _, leaf = key.rpartition(".")
    word = next((word for word in LEAVES if re.search(f"_{word}(_|$)", theirs)), None)
    stem = parent if leaf in ("gate_up_proj", "down_proj") else key.removesuffix(".input_linear")
    return f"{stem}{'.{e}' if stacked else ''}.{LEAVES[word] if word else theirs.rpartition('.')[2]}"


def _apart(key: str, own: dict[str, Any], theirs: str, part: Place, turned: bool, stacked: bool) -> dict[str, Any]:
    """The places of a part of a weight, in all namings."""
    more = ({"stacked": True} if stacked else {}) | part
    live = {
        naming: _table(own.get(naming, key)) | more | ({"transposed": True} if turned else {})
        for naming in ("transformers5", "hub")
    }
    return live | {"gguf": {"name": theirs} | ({"stacked": True} if stacked else {})}


def lines_of(path: Path, record: dict[str, Any], weights: dict[str, Any], names: list[str]) -> str:
    """The file's text with other weights; all other lines stay as they are."""
    head = []
    for line in path.read_text().splitlines():
        if line == "[weights]":
            break
        if line.startswith("gguf = "):
            continue
        if line.startswith("sources = "):
            kept = [s for s in record["sources"] if not s.startswith(("gguf ", "llama.cpp"))]
            line = f"sources = {_value([*kept, *([SOURCE] if names else [])])}"
        head.append(line)
        if line.startswith("model_types = ") and names:
            head.append(f"gguf = {_value(names)}")
    body = [
        f"{_value(key)} = {_value({n: _short(_table(p)) for n, p in value.items()})}" for key, value in weights.items()
    ]
    return "\n".join([*head, "[weights]", *body]) + "\n"


def _template(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{n}", module, count=1)


def _table(place: Any) -> Place:
    return {"name": place} if isinstance(place, str) else place


def families(wanted: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The families with a file, and their model types."""
    for family, types in FAMILIES.items():
        if (OUT / f"{family}.toml").exists() and (not wanted or not set(wanted).isdisjoint(types)):
            yield family, types


def main() -> int:
    """Write or check the files of the model types that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    conversion = gguf_models.load(arguments.llama_cpp)
    failed = 0
    for family, types in families(arguments.types):
        path = OUT / f"{family}.toml"
        record = tomllib.loads(path.read_text())
        names: list[str] = []
        for model_type in types:
            try:
                name, told = facts(conversion, model_type)
            except Exception as error:  # The converter does not know every model type.
                print(f"{model_type}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
                continue
            names += [name] if name not in names else []
            record["weights"] = merged(record, told)
        text = lines_of(path, record, record["weights"], names)
        same = text == path.read_text()
        if arguments.check:
            failed += not same
        elif not same:
            path.write_text(text)
        print(f"{family}: {', '.join(names)}: {sum('gguf' in w for w in record['weights'].values())} places")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
