"""What is damaged after a merge, found by its record alone; and verification of a sample."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from command_line import run
from merges import big_base
from quantized_vectors import CASES, adapter_for

import adapterkit as ak
from adapterkit.errors import Malformed, UsageError

RECORD = "adapterkit_merge.json"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    base, adapter = big_base(tmp_path / "base", 4)
    only = adapter.replace(updates=dict(list(adapter.updates.items())[:-1]))
    ak.write(only, tmp_path / "adapter.safetensors")
    ak.merge(base, only, tmp_path / "out", checksums=True)
    return tmp_path / "out"


def test_sums_are_those_of_the_bytes_on_disk(out: Path) -> None:
    written = json.loads((out / RECORD).read_text())["written"]
    assert written
    for name, said in written.items():
        data, end = (out / name).read_bytes(), 0
        for start, nbytes, digest in said["runs"]:
            assert (start, hashlib.sha256(data[start : start + nbytes]).hexdigest()) == (end, digest)
            end += nbytes
        assert end == len(data)
        assert said["sha256"] == hashlib.sha256(b"".join(bytes.fromhex(run[2]) for run in said["runs"])).hexdigest()


def test_every_flipped_bit_is_found_without_the_base(out: Path) -> None:
    found = ak.verify(out)
    written = json.loads((out / RECORD).read_text())["written"]
    assert (found.ok, found.files) == (True, len(written))
    for name in written:
        whole = (out / name).read_bytes()
        for at in (0, 9, len(whole) // 2, len(whole) - 1):
            (out / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert [difference.tensor for difference in ak.verify(out).differences] == [name]
        (out / name).write_bytes(whole[:-1])
        assert "bytes were written" in ak.verify(out).differences[0].why
        (out / name).unlink()
        assert ak.verify(out).differences[0].why == "missing"
        assert run("verify", out).exit_code == 1
        (out / name).write_bytes(whole)
    assert "equal to the recorded checksums" in run("verify", out).output


@pytest.mark.parametrize("case", CASES[:1] + CASES[-1:], ids=lambda case: case.name)
def test_of_packed_weights_too(case: Path, tmp_path: Path) -> None:
    ak.merge(case, adapter_for(case)[0], tmp_path / "out", quantized="requantize", checksums=True)
    assert ak.verify(tmp_path / "out").ok
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert not ak.verify(tmp_path / "out").ok


def test_a_record_that_makes_no_sense_is_refused(out: Path) -> None:
    record = json.loads((out / RECORD).read_text())
    name, said = next(iter(record["written"].items()))
    gap = {**said, "runs": said["runs"][1:]}
    for bad in ({"../x": said}, {name: gap}, {name: {**said, "sha256": "00"}}, {name: 1}, [1], {name: {}}):
        (out / RECORD).write_text(json.dumps({**record, "written": bad}))
        with pytest.raises(Malformed, match="checksums are damaged"):
            ak.verify(out)
    (out / RECORD).write_text("[]")
    with pytest.raises(Malformed):
        ak.verify(out)
    (out / RECORD).write_text("{}")
    with pytest.raises(UsageError, match="no checksums"):
        ak.verify(out)
    (out / RECORD).unlink()
    with pytest.raises(UsageError, match="no merge record"):
        ak.verify(out)


def test_they_are_taken_on_request(out: Path) -> None:
    base, adapter, bare = out.parent / "base", out.parent / "adapter.safetensors", out.parent / "bare"
    assert run("merge", base, adapter, "-o", bare).exit_code == 0
    assert "written" not in json.loads((bare / RECORD).read_text())
    weights = [{p.name: p.read_bytes() for p in folder.glob("*.safetensors")} for folder in (out, bare)]
    assert weights[0] == weights[1]


def test_a_sample_is_compared(out: Path) -> None:
    base, adapter = out.parent / "base", out.parent / "adapter.safetensors"
    everything = ak.verify(out, base, adapter)
    some = ak.verify(out, base, adapter, sample=1)
    assert some.ok
    assert (some.targets, some.tensors) == (1, 2)
    assert ak.verify(out, base, adapter, sample=10**6).tensors == everything.tensors
    assert not ak.verify(out, base, adapter, weights=[2.0], sample=1).ok
    for options in ({"sample": 0}, {"sample": -1}):
        with pytest.raises(UsageError):
            ak.verify(out, base, adapter, **options)
    with pytest.raises(UsageError, match="but the base is missing"):
        ak.verify(out, None, adapter)
    assert run("verify", out, "--base", base).exit_code == 2
    assert run("verify", out, "--base", base, "--adapter", adapter, "--sample", "1").exit_code == 0
