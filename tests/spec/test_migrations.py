"""Migrations between versions of the specification: golden files, and what has no form in an older version."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit as ak

SPEC = Path(__file__).parents[2] / "spec"
SCRIPT = SPEC / "readers" / "python" / "migrate.py"
GOLDEN = SPEC / "vectors" / "migrations"
ENTRIES = json.loads((SPEC / "1.1" / "methods.json").read_text("utf-8"))
NAMES = sorted(path.name.removesuffix(".1.0.safetensors") for path in GOLDEN.glob("*.1.0.safetensors"))


@pytest.fixture(scope="module")
def migrate():
    spec = importlib.util.spec_from_file_location("migrate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record_of(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["adapterkit"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("old", "new"), [("1.0", "1.1"), ("1.1", "1.0"), ("1.0", "1.0"), ("1.1", "1.1")])
def test_a_record_becomes_that_of_the_golden_file_and_stays_as_it_was(name, old, new, migrate):
    record = record_of(GOLDEN / f"{name}.{old}.safetensors")
    before = json.dumps(record)
    assert migrate.migrated(record, new, ENTRIES) == record_of(GOLDEN / f"{name}.{new}.safetensors")
    assert json.dumps(record) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_file_becomes_the_golden_file_and_both_are_the_same_adapter(name, tmp_path):
    old, new = (GOLDEN / f"{name}.{version}.safetensors" for version in ("1.0", "1.1"))
    for source, version, wanted in ((old, "1.1", new), (new, "1.0", old)):
        subprocess.run([sys.executable, SCRIPT, source, tmp_path / "out", "--to", version], check=True)
        assert (tmp_path / "out").read_bytes() == wanted.read_bytes()
    read = [ak.read(path, format="adapterkit") for path in (old, new)]
    assert read[0].digest() == read[1].digest()
    assert json.dumps(record_of(old)) != json.dumps(record_of(new))


@pytest.mark.parametrize(("file", "why"), [("adamss", "no method adamss"), ("lokr.2", "no attribute stacked")])
def test_what_came_later_has_no_migration(file, why, migrate):
    record = record_of(SPEC / "vectors" / "methods" / f"{file}.adapter.safetensors")
    with pytest.raises(migrate.NoMigration, match=why):
        migrate.migrated(record, "1.0", ENTRIES)


def test_every_vector_of_1_0_is_the_same_adapter_in_1_1(migrate, tmp_path):
    checked = 0
    for path in sorted((SPEC / "vectors" / "methods").glob("*.adapter.safetensors")):
        if record_of(path)["version"] != "1.0":
            continue
        out = tmp_path / path.name
        migrate_file(migrate, path, out)
        assert ak.read(out, format="adapterkit").digest() == ak.read(path, format="adapterkit").digest()
        checked += 1
    assert checked > 60


def migrate_file(migrate, path, out):
    """Migrate a file in this process."""
    arguments, sys.argv = sys.argv, [str(SCRIPT), str(path), str(out), "--to", "1.1"]
    try:
        migrate.main()
    finally:
        sys.argv = arguments
