"""Parts of the tables in spec/loaders that several tools here write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
