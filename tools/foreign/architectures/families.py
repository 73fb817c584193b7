"""Which model types the files are for: those of `families.txt`."""

from __future__ import annotations

from pathlib import Path


def _types() -> list[str]:
    lines = Path(__file__).with_name("families.txt").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


FAMILIES: dict[str, list[str]] = {name: [name] for name in _types() if ":" not in name}
"""Name of a file -> its model types."""

CLASSES: dict[str, list[str]] = {}
"""Name of a file -> classes whose weights it has beside those of the class that its models are mostly loaded as."""
for _family, _, _class in (each.partition(":") for each in _types() if ":" in each):
    CLASSES.setdefault(_family, []).append(_class)
