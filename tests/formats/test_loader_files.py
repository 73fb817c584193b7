"""The files of spec/loaders: the form that their scripts write, and modules that their families have."""

import pytest
from tool_modules import tool_module

TABLES = tool_module("foreign/loader_tables.py")


@pytest.mark.parametrize("file", sorted(TABLES.OUT.glob("*.toml")), ids=lambda file: file.stem)
def test_a_loader_file_is_as_its_script_writes_it(file):
    assert list(TABLES.faults(file)) == []


def test_a_module_that_no_family_has_is_found(tmp_path):
    text = (TABLES.OUT / "mflux.toml").read_text().replace('"norm_out.linear"', '"norm_in.linear"', 1)
    (tmp_path / "mflux.toml").write_text(text)
    assert [fault for fault in TABLES.faults(tmp_path / "mflux.toml") if "has no norm_in.linear" in fault]
