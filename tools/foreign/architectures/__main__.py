"""Makes spec/architectures/*.toml from the tools that know: transformers' models as they are saved, and gguf-py.

    python tools/foreign/architectures [MODEL_TYPE...]      write the files (of all model types in FAMILIES)
    python tools/foreign/architectures --check              compare the files with the tools; exits 1 on a difference

Needs transformers 5.24 and gguf 0.19. Correspondences are found by values (`pairing.py`), not read off anybody's rules.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import transformers
from entries import Entries, entries_of
from families import CLASSES, FAMILIES
from foreign_names import gguf_names, mlx_names
from reviewing import MORE, additions, differences
from writing import toml_of

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "spec" / "architectures"


def main() -> int:
    """Write or check the files of the model types that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = {t for types in FAMILIES.values() for t in types} if not arguments.types else set(arguments.types)
    sources = [f"transformers {version('transformers')}: save_pretrained of tiny models"]
    failed = 0
    for family, types in FAMILIES.items():
        if wanted.isdisjoint(types):
            continue
        made: dict[str, Entries] = {}
        for model_type in (*types, *CLASSES.get(family, ())):
            try:
                made[model_type] = entries_of(model_type)
            except Exception as error:  # One model type that fails must not stop the others.
                failed += 1
                print(f"{model_type}: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
        if not made:
            continue
        joined = Entries.joined(made)
        used = list(sources)
        used += [f"gguf {version('gguf')}: TensorNameMap"] if gguf_names(joined, types) else []
        used += ["mlx-lm: sanitize of its models"] if mlx_names(joined) else []
        text = toml_of(family, [each for each in made if each in types], joined, used)
        path = OUT / f"{family}.toml"
        if arguments.check:
            failed += not _checked(family, joined, path)
        else:
            path.write_text(text)
            print(f"{family}: {len(joined.weights)} weights, {len(made)} model types")
    return 1 if failed and arguments.check else 0


def _checked(family: str, made: Entries, path: Path) -> bool:
    """Print how a committed file compares with the tool, and return whether it says all of it."""
    if not path.exists():
        print(f"{family}: DIFFERENT: no file")
        return False
    committed = tomllib.loads(path.read_text())
    lost, more = differences(made, committed), additions(made, committed)
    if more and family not in MORE:
        lost.append(f"{len(more)} weights that the tool does not find, such as {more[0]}, and no reason in MORE")
    for each in lost[:3]:
        print(f"{family}: DIFFERENT: {each}")
    if not lost:
        print(f"{family}: same" + (f", and {len(more)} more weights: {MORE[family]}" if more else ""))
    return not lost


if __name__ == "__main__":
    sys.exit(main())
