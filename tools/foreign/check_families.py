"""Binds the adapters of many model types to the bases of all others: a base of the wrong family must be refused.

    python tools/foreign/check_families.py [MODEL_TYPE...] [--json FILE] [--every N [--first K]] [--again FILE]

The bases and adapters are those of `check_bases.py`: tiny random models with the same sizes, so that shapes rarely
cause a refusal. Each model type has three adapters: `named`, PEFT's file for a model without a task type, which names
the family; `plain`, PEFT's file for a task, which does not name the family; and `attention`, the `plain` file with only
the attention layers, the most common choice. Each adapter is bound to the base of every other model type.

With `--every N`, only every N-th pair is bound, from pair K on; with `--again FILE`, only the pairs in the JSON file of
an earlier run, which are those that were not refused.

`refused`: adapterkit raised one of its errors. `part`: the base contains a model of the adapter's family, or has the
same class as the adapter's base. `alike`: the adapter does not name a family, and the base has a module of each name
and shape, among its stored names or those of the live model, possibly with one additional prefix. Such a file cannot be
distinguished from one that was trained on this base, or on the part of the base with that prefix. Everything else is
`wrong`.

Needs transformers 5.24 and PEFT 0.21.2.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent / "architectures"))

import transformers  # noqa: E402
from families import FAMILIES  # noqa: E402
from peft_models import adapted  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny import tiny  # noqa: E402

import adapterkit  # noqa: E402
from adapterkit.core.metadata import model_types_of  # noqa: E402
from adapterkit.errors import AdapterkitError  # noqa: E402
from adapterkit.io.checkpoint import opened  # noqa: E402

KINDS = ("named", "plain", "attention")
FILE = "adapter_model.safetensors"

Modules = dict[str, tuple[int, ...]]
"""Name of a module or a parameter -> shape of its weight."""


class Made(NamedTuple):
    """One model type on disk.

    Attributes:
        model_type: its name.
        base: the open base.
        stored: the modules as the base stores them.
        live: the modules of the live model.
        kind: the model's class.
        families: the model types of the model and of its parts.
        adapters: the adapters by their kind.
    """

    model_type: str
    base: Any
    stored: Modules
    live: Modules
    kind: str
    families: frozenset[str]
    adapters: dict[str, Any]


def module_of(name: str) -> str:
    """The module that a weight belongs to; the name itself for a parameter of its own."""
    return name.removesuffix(".weight")


def families_of(config: Mapping[str, Any]) -> Iterator[str]:
    """The model types that a config names, those of its parts included."""
    for key, value in config.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from families_of(value)


def make(model_type: str, folder: Path) -> Made:
    """Write the base and the adapters of a model type."""
    model = tiny(model_type)
    model.save_pretrained(folder / "base")
    live = {module_of(name): tuple(p.shape) for name, p in model.named_parameters()}
    kind = type(model).__name__
    with contextlib.redirect_stderr(io.StringIO()):
        adapted(model).save_pretrained(folder / "named", save_embedding_layers=False)
    config = json.loads((folder / "named" / "adapter_config.json").read_text())
    tensors = load_file(folder / "named" / FILE)
    for name in ("plain", "attention"):
        (folder / name).mkdir()
        said = {**config, "auto_mapping": None, "base_model_name_or_path": None, "task_type": "CAUSAL_LM"}
        kept = {key: value for key, value in tensors.items() if name == "plain" or "att" in key}
        if not kept:
            shutil.rmtree(folder / name)
            continue
        if name == "attention":
            said["target_parameters"] = None
        (folder / name / "adapter_config.json").write_text(json.dumps(said))
        save_file(kept, folder / name / FILE)
    stored: Modules = {}
    for file in (folder / "base").glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            stored |= {module_of(key): tuple(reader.get_slice(key).get_shape()) for key in reader.keys()}  # noqa: SIM118
    families = frozenset(families_of(json.loads((folder / "base" / "config.json").read_text())))
    adapters = {}
    for name in KINDS:
        if (folder / name).exists():
            adapters[name] = adapterkit.read(folder / name, base=folder / "base")
    return Made(model_type, opened(folder / "base"), stored, live, kind, families | {model_type}, adapters)


def shape_of(update: Any, stacked: bool) -> tuple[int, ...]:
    """`[out, in]`, or `[e, out, in]`, of the weight that an update was made for."""
    dims = update.dims(stacked)
    return (*((dims["e"],) if stacked else ()), dims["out"], dims["in"])


def alike(adapter: Any, base: Made) -> bool:
    """Whether the base has a module for every name and shape of an adapter, perhaps behind one other prefix."""
    wanted = {target.path: shape_of(updates[0], target.stacked) for target, updates in adapter.updates.items()}
    # Some models keep the head inside their language model, others beside it.
    wanted = {module_of(path): shape for path, shape in wanted.items() if path != "lm_head"} or wanted
    # A mixture's routers may be there as they are stored, and its experts as the live model stacks them.
    for names in (base.stored, base.live, base.live | base.stored):
        first = next((path for path in wanted if path not in names), next(iter(wanted)))
        words = first.split(".")
        prefixes = {("", "")}
        for cut in range(len(words)):
            end = ".".join(words[cut:])
            off = first.removesuffix(end)
            prefixes |= {(off, name.removesuffix(end)) for name in names if f".{name}".endswith(f".{end}")}
        for off, on in prefixes:
            places = {
                path if path in names or not path.startswith(off) else on + path.removeprefix(off): shape
                for path, shape in wanted.items()
            }
            fitting = all(path in names and same(names[path], shape) for path, shape in places.items())
            if fitting and len(places) == len(wanted):
                return True
    return False


def same(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a stored weight is one of `[out, in]` or `[e, out, in]`, also with the last two turned."""
    if len(shape) == 2 and len(stored) > 2:
        stored = (stored[0], stored[1]) if all(size == 1 for size in stored[2:]) else stored[:2]
    return sorted(stored) == sorted(shape)


def verdict(kind: str, adapter: Made, base: Made) -> tuple[str, str]:
    """(verdict, detail) of one adapter at one base."""
    given = adapter.adapters[kind]
    try:
        given.bind(base.base)
    except AdapterkitError as error:
        return "refused", type(error).__name__
    named = set(model_types_of(given)) if kind == "named" else {adapter.model_type}
    inside = base.families | {name.removesuffix("_text") for name in base.families}
    if adapter.kind == base.kind or named & inside:
        return "part", ""
    if kind != "named" and alike(given, base):
        return "alike", ""
    rules = adapterkit.names(base.base.root, given)["rules"]
    return "wrong", "; ".join(f"{rule['rule']} ({rule['targets']})" for rule in rules)


def main() -> int:
    """Check every pair of the model types that were asked for, and print the counts and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--every", type=int, default=1, help="bind every N-th pair only")
    parser.add_argument("--first", type=int, default=0, help="the number of the first pair, from 0")
    parser.add_argument("--again", type=Path, help="bind the pairs of this JSON only")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    types = arguments.types or [t for several in FAMILIES.values() for t in several]
    counts: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    records: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Made] = {}
        for model_type in types:
            try:
                made[model_type] = make(model_type, Path(folder) / model_type)
            except Exception as error:  # A model type that cannot be built is counted apart.
                print(f"not made {model_type:24} {type(error).__name__}: {str(error)[:140]}", flush=True)
        pairs = [(one, other) for one in made for other in made if one != other]
        if arguments.again:
            wanted = {tuple(key.split()[:0:-1]) for key in json.loads(arguments.again.read_text())}
            pairs = [pair for pair in pairs if pair in wanted]
        for base_type, adapter_type in pairs[arguments.first :: arguments.every]:
            base, adapter = made[base_type], made[adapter_type]
            for kind in adapter.adapters:
                word, detail = verdict(kind, adapter, base)
                counts[kind][word] = counts[kind].get(word, 0) + 1
                if word != "refused":
                    records[f"{kind} {adapter_type} {base_type}"] = [word, detail]
                if word == "wrong":
                    print(f"wrong    {kind:9} of {adapter_type} on {base_type}: {detail[:200]}", flush=True)
    for kind, found in counts.items():
        print(f"{kind}: " + ", ".join(f"{count} {word}" for word, count in sorted(found.items())))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))
    return 1 if any("wrong" in found for found in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
