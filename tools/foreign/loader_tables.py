"""Writes the parts of spec/loaders that several scripts share, and checks all of its files.

    python tools/foreign/loader_tables.py --check    exits 1 on a difference

The check does not need the tools. Each file must have the layout that its script writes, only name modules that its
families have in its naming, and give the version of the tool, if that is installed. The check prints the script that
runs the tool.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "spec" / "loaders"
SCRIPT = re.compile(r"# Made by (tools/foreign/\w+(?:\.py)?)")
PACKAGES = {"diffusers": "diffusers", "peft": "peft", "lycoris": "lycoris-lora", "mlx_lm": "mlx-lm"}
"""File -> the package that has the tool's version."""

Families = Mapping[str, tuple[list[str], list[str]]]
"""Family -> all its modules, and those that a loader does not take."""


def quoted(words: Iterable[str]) -> str:
    """A list of TOML."""
    return f"[{', '.join(f'{chr(34)}{word}{chr(34)}' for word in words)}]"


def exceptions(families: Families) -> Iterator[str]:
    """The lines that name modules, by the shorter list: those that are not loaded, or the only ones that are."""
    lacking = {name: lost for name, (paths, lost) in families.items() if lost and 2 * len(lost) < len(paths)}
    few = {
        name: [path for path in paths if path not in lost]
        for name, (paths, lost) in families.items()
        if 2 * len(lost) >= len(paths)
    }
    for field, modules in (("without", lacking), ("only", few)):
        if modules:
            yield from ("", f"[keys.{field}]", *(f"{name} = {quoted(each)}" for name, each in modules.items()))
    yield ""


def write_or_compare(out: Path, text: str, *, check: bool) -> int:
    """Write a file as it is made now, or print how the committed one differs; return the exit code."""
    if not check:
        out.write_text(text)
        return 0
    committed = out.read_text()
    print("same" if committed == text else "DIFFERENT")
    lines = (each.splitlines(True) for each in (committed, text))
    sys.stdout.writelines(difflib.unified_diff(*lines, "the file", "made now"))
    return int(committed != text)


def faults(file: Path) -> Iterator[str]:
    """What is wrong with a file."""
    from adapterkit.loaders import load
    from adapterkit.naming.architectures import HOLE
    from adapterkit.naming.image import families

    text = file.read_text()
    tool = load(file)
    known = {family.name: family for family in families()}
    for keys in tool.keys:
        names = {name: known[name].names(keys.naming).patterns for name in {*keys.families, *keys.without, *keys.only}}
        for name, patterns in names.items():
            if not patterns:
                yield f"{name} has no naming {keys.naming}"
            listed = (*keys.without.get(name, ()), *keys.only.get(name, ()))
            # A module of a text encoder or of another part of the model has no pattern there.
            yield from (f"{name} has no {path}" for path in listed if HOLE.sub("#", path) not in patterns)
        both = sorted({*keys.without} & {*keys.only})
        yield from (f"{name} is in `without` and in `only` of {keys.prefix}" for name in both)
        yield from (f"{name} is not in `families` of {keys.prefix}" for name in names if name not in keys.families)
    if (found := SCRIPT.match(text)) is not None and not (ROOT / found[1]).exists():
        yield f"no script {found[1]}"
    package = PACKAGES.get(file.stem)
    try:
        version = metadata.version(package) if package else ""
    except metadata.PackageNotFoundError:
        version = ""
    if version and tool.version != version:
        yield f"version {tool.version}, and {version} is installed"


def main() -> int:
    """Check all files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", required=True)
    parser.parse_args()
    sys.path.insert(0, str(ROOT))
    failed = 0
    for file in sorted(OUT.glob("*.toml")):
        wrong = list(faults(file))
        failed += bool(wrong)
        made = SCRIPT.match(file.read_text())
        print(f"{file.stem}: {'; '.join(wrong) or 'same'}" + (f" ({made[1]} runs the tool)" if made else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
