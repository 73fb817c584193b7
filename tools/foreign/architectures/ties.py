"""Makes spec/architectures/ties/transformers.toml: which weights the classes of transformers tie.

    python tools/foreign/architectures/ties.py [--check]

A class says in `_tied_weights_keys` which of its parameters are another one under a second name: mostly its head's
weight and the input embeddings, in BERT's relatives also a bias. A config class says whether its models are tied
where `config.json` does not.

Needs transformers 5.24; imports its classes and builds no model.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import transformers
from model_types import classes, modules
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

OUT = Path(__file__).resolve().parents[3] / "spec" / "architectures" / "ties" / "transformers.toml"

NAME = re.compile(r"[A-Za-z0-9_.]+\.(weight|bias)")
"""A name, and no pattern for several."""

Pairs = tuple[tuple[str, str], ...]


def ties() -> dict[Pairs, list[str]]:
    """Pairs (second name, name) -> the classes that tie them; only pairs of single names."""
    found: dict[Pairs, list[str]] = {}
    for name, types in sorted(classes().items()):
        own, prefix = pairs_of(name)
        # The model inside ties, too: ProphetNet's class with a head does not repeat that its halves share a table.
        for inner in sorted(
            {bare for each in types if isinstance(bare := modeling_auto.MODEL_MAPPING_NAMES.get(each), str)}
        ):
            within = pairs_of(inner)[0] if inner != name and prefix else {}
            if not own.keys() & within.keys():  # T5's class with a head has no model inside, and repeats all.
                own |= {f"{prefix}.{one}": f"{prefix}.{other}" for one, other in within.items()}
        if own:
            found.setdefault(tuple(sorted(own.items())), []).append(name)
    return found


def pairs_of(name: str) -> tuple[dict[str, str], str]:
    """(second name -> name, the prefix of the model inside) of a class."""
    try:
        kind = getattr(transformers, name)
        tied, prefix = getattr(kind, "_tied_weights_keys", None), getattr(kind, "base_model_prefix", "")
    except (AttributeError, ImportError, RuntimeError):  # A class that needs a package that is not here.
        return {}, ""
    pairs = tied.items() if isinstance(tied, dict) else ()
    held = {one: other for one, other in pairs if NAME.fullmatch(one) and NAME.fullmatch(other)}
    return held, prefix


def defaults() -> Iterator[str]:
    """The model types whose config class ties."""
    for model_type in modules():
        try:
            config = AutoConfig.for_model(model_type)
        except Exception:  # A few classes need fields, and tell nothing without them.
            continue
        if getattr(config, "tie_word_embeddings", False) is True:
            yield model_type


def text() -> str:
    """The file."""
    lines = [
        "# Made by tools/foreign/architectures/ties.py. The README beside the families explains each field.",
        "format = 1",
        f'sources = ["transformers {version("transformers")}: _tied_weights_keys of its classes, and their configs"]',
        f"defaults = {_list(list(defaults()))}",
    ]
    for pairs, names in sorted(ties().items()):
        held = ", ".join(f'"{one}" = "{other}"' for one, other in pairs)
        lines += ["", "[[ties]]", f"pairs = {{ {held} }}", f"classes = {_list(names)}"]
    return "\n".join(lines) + "\n"


def _list(words: list[str]) -> str:
    return f"[{', '.join(f'{chr(34)}{word}{chr(34)}' for word in words)}]"


def main() -> int:
    """Write the file, or compare it with transformers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if check:
        same = OUT.exists() and OUT.read_text() == text()
        print("same" if same else "DIFFERENT")
        return 0 if same else 1
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(text())
    print(f"{sum(map(len, ties().values()))} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
