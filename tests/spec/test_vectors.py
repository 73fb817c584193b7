import json
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

import adapterkit as ak
from adapterkit import errors
from adapterkit.errors import AdapterkitError
from adapterkit.io.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[2] / "spec" / "vectors"
INVALID = sorted((ROOT / "invalid").glob("*.json"))
METHOD_FILES = sorted((ROOT / "methods").iterdir())


def copied(case, folder):
    """The case in a folder of its own, so that nothing but reading can have changed what lies there."""
    source = case.with_suffix("")
    if source.is_dir():
        return Path(shutil.copytree(source, folder / source.name))
    return Path(shutil.copy(case.with_suffix(".safetensors"), folder))


def use(path, stage, opens):
    """Opens a case as far as its stage."""
    if opens == "base":
        return open_checkpoint(path)
    adapter = ak.read(path, format="adapterkit")
    assert stage == "values", "the fault shows before any value is read"
    return adapter.check_values()


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("case", INVALID, ids=lambda case: case.stem)
def test_an_invalid_input_is_refused_by_name_and_place(case, tmp_path):
    expected = json.loads(case.read_text("utf-8"))
    path = copied(case, tmp_path)
    before = listing(tmp_path)
    with pytest.raises(AdapterkitError) as raised:
        use(path, expected["stage"], expected["opens"])
    error = raised.value
    assert type(error) is getattr(errors, expected["error"])
    assert error.exit_code == expected["exit"]
    assert expected["where"] in (error.where or "")
    assert str(error).startswith(str(path))
    assert error.cure
    assert error.why
    assert listing(tmp_path) == before


OURS_ALONE = {"entry_unknown_field", "tensor_twice", "metadata_twice", "entry_field_twice"}
"""Containers that we refuse and the safetensors library lets pass."""


@pytest.mark.parametrize(
    "case", [c for c in INVALID if c.with_suffix(".safetensors").exists()], ids=lambda case: case.stem
)
def test_sniffing_never_fails_and_knows_native_files_however_bad_their_records(case):
    path = case.with_suffix(".safetensors")
    recognised = ak.FORMATS["adapterkit"]().sniff(path)
    try:
        with safe_open(path, "np") as file:
            native = "adapterkit" in (file.metadata() or {})
    except SafetensorError:
        native = False
    assert recognised == (native and case.stem not in OURS_ALONE)


def test_the_invalid_corpus_covers_every_kind_of_error_a_reader_has():
    kinds = {json.loads(case.read_text("utf-8"))["error"] for case in INVALID}
    assert kinds == {"Malformed", "ShapeMismatch", "Unsupported", "UsageError"}
    assert len(INVALID) >= 45
    assert {path.with_suffix("").name for path in (ROOT / "invalid").iterdir()} == {case.stem for case in INVALID}


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_the_safetensors_library_opens_every_vector(path):
    with safe_open(path, "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118 - it is no mapping


@pytest.mark.parametrize("path", [p for p in METHOD_FILES if ".adapter." in p.name], ids=lambda path: path.name)
def test_a_vector_written_again_is_the_same_adapter_and_then_byte_stable(path, tmp_path):
    adapter = ak.read(path, format="adapterkit")
    adapter.check_values()
    ak.write(adapter, tmp_path / "once")
    again = ak.read(tmp_path / "once", format="adapterkit")
    ak.write(again, tmp_path / "twice")
    assert again.digest() == adapter.digest()
    assert list(again.updates) == list(adapter.updates)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()
