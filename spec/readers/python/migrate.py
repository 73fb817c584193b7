"""Migrations between versions of the specification (README, R-14.1), as a pure function of a record.

    python migrate.py ADAPTER OUT --to 1.0|1.1

The entries of methods are those of spec/1.1/methods.json. Tensors are copied byte for byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENTRIES = Path(__file__).resolve().parents[2] / "1.1" / "methods.json"
Record = dict[str, Any]


class NoMigration(ValueError):
    """The version lacks something that the record uses; the text names the update."""


def migrated(record: Mapping[str, Any], version: str, entries: Mapping[str, Any]) -> Record:
    """Return the record in another version of the specification, with the same function.

    Args:
        record: the record, valid in its own version; it is not changed.
        version: `1.0` or `1.1`.
        entries: method -> its entry.

    Raises:
        NoMigration: an update has no form in that version.
    """
    updates = [_update(update, number, version, entries) for number, update in enumerate(record["updates"])]
    return {**record, "version": version, "updates": updates}


def _update(update: Mapping[str, Any], number: int, version: str, entries: Mapping[str, Any]) -> Record:
    entry = entries[update["method"]]
    newest = sum(_minor(since) <= _minor(version) for since in entry["since"])
    if newest == 0:
        raise NoMigration(f"updates[{number}]: {version} has no method {update['method']}")
    attributes = dict(update["attributes"])
    for attribute in entry.get("attributes", []):
        name, since = attribute["name"], attribute.get("since", 1)
        if since <= newest and since > update["version"]:
            attributes[name] = attribute["default"]
        elif since > newest and attributes.pop(name, attribute["default"]) != attribute["default"]:
            raise NoMigration(f"updates[{number}]: {update['method']} in {version} has no attribute {name}")
    return {**update, "version": newest, "attributes": attributes}


def _minor(version: str) -> int:
    return int(version.partition(".")[2])


def main() -> None:
    """Migrate a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--to", required=True, choices=("1.0", "1.1"), help="the version of the specification")
    options = parser.parse_args()
    data = options.adapter.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    record = json.loads(header["__metadata__"]["adapterkit"])
    try:
        new = migrated(record, options.to, json.loads(ENTRIES.read_text("utf-8")))
    except NoMigration as error:
        parser.exit(3, f"{options.adapter}: {error}\n")
    text = json.dumps(new, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    header["__metadata__"]["adapterkit"] = text
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    options.out.write_bytes(len(head).to_bytes(8, "little") + head + data[start:])


if __name__ == "__main__":
    main()
