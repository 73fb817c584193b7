"""Makes spec/architectures/model_types/transformers.toml: which module of transformers every model type is of.

    python tools/foreign/architectures/model_types.py [--check]

A module such as `gemma3` holds the classes of a whole model and those of its parts, each with a model type of its own.
PEFT names the module and the class of the base that an adapter was trained on; a base's config names model types.

Needs transformers 5.24; reads its tables and loads no model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.models.auto import configuration_auto, modeling_auto

OUT = Path(__file__).resolve().parents[3] / "spec" / "architectures" / "model_types" / "transformers.toml"


def modules() -> dict[str, str]:
    """Model type -> module."""
    return {
        model_type: configuration_auto.model_type_to_module_name(model_type)
        for model_type in sorted(vars(configuration_auto)["CONFIG_MAPPING_NAMES"])
    }


def classes() -> dict[str, set[str]]:
    """Class -> the model types that transformers' Auto classes load with it."""
    found: dict[str, set[str]] = {}
    for name, table in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and "CONFIG" not in name and isinstance(table, Mapping):
            for model_type, listed in table.items():
                for each in listed if isinstance(listed, (tuple, list)) else (listed,):
                    found.setdefault(each, set()).add(model_type)
    return found


def parts(known: Mapping[str, str]) -> dict[str, list[str]]:
    """Class -> its model types, for the classes that are of a part of their module's model."""
    found = {}
    for name, types in sorted(classes().items()):
        inside = sorted(each for each in types if each in known)
        if inside and not any(each.replace("-", "_") == known[each] for each in inside):
            alone = all(list(known.values()).count(known[each]) == 1 for each in inside)
            if not alone:  # The only model type of a module is the whole model, whatever its name.
                found[name] = inside
    return found


def text() -> str:
    """The file."""
    known = modules()
    lines = [
        "# Made by tools/foreign/architectures/model_types.py. The README beside the families explains each field.",
        "format = 1",
        f'sources = ["transformers {version("transformers")}: its Auto classes"]',
        "",
        "[modules]",
        *(f'"{model_type}" = "{module}"' for model_type, module in known.items()),
        "",
        "[parts]",
        *(f"{name} = {_list(types)}" for name, types in parts(known).items()),
    ]
    return "\n".join(lines) + "\n"


def _list(words: list[str]) -> str:
    return f"[{', '.join(f'{chr(34)}{word}{chr(34)}' for word in words)}]"


def main(arguments: Any = None) -> int:
    """Write the file, or compare it with transformers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args(arguments).check:
        same = OUT.exists() and OUT.read_text() == text()
        print("same" if same else "DIFFERENT")
        return 0 if same else 1
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(text())
    print(f"{len(modules())} model types")
    return 0


if __name__ == "__main__":
    sys.exit(main())
