"""Scan: what is planted is found, by its rule and place; what tools write in good faith is not."""

import io
import json
import lzma
import os
import pickle
import pickletools
import shutil
import signal
import struct
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from command_line import run, save_base
from hub_repository import hub, peft_files  # noqa: F401 - a fixture
from planted_scans import EVADING, LAYERS, PLANTED, STEM, Calls, config, folder, pickled, saved, template, written
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import StorageError, Unsupported
from adapterkit.scanning import RULES, SEVERITIES

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"


@pytest.mark.parametrize("name", [*PLANTED, *EVADING])
def test_what_is_planted_is_found(tmp_path, name):
    rule, act = {**PLANTED, **EVADING}[name]
    path = folder(tmp_path / "adapter")
    act(path)
    found = ak.scan(path)
    assert rule in {each.rule for each in found.findings}, found.record()
    assert RULES[rule].severity in SEVERITIES
    assert SEVERITIES.index(found.worst) >= SEVERITIES.index(RULES[rule].severity)


def test_a_change_as_large_as_the_weight_is_found_with_the_base(tmp_path):
    path = folder(
        tmp_path / "adapter", lambda tensors: tensors.update({STEM.format(1, "q", "B"): np.ones((32, 8), "f4")})
    )
    weights = {
        f"model.layers.{n}.self_attn.{x}_proj.weight": np.full((32, 32), 0.5, "f4") for n in range(LAYERS) for x in "qv"
    }
    save_file(weights, tmp_path / "base.safetensors")
    assert "norm" not in {each.rule for each in ak.scan(path).findings}
    found = [each for each in ak.scan(path, base=tmp_path / "base.safetensors").findings if each.rule == "norm"]
    assert [each.where for each in found] == ["model.layers.1.self_attn.q_proj"]


CLEAN = sorted((VECTORS / "formats").glob("*/*"))[::5]


def test_there_are_enough_cases():
    assert len(PLANTED) >= 60
    assert len({rule for rule, _ in PLANTED.values()}) >= 10
    assert len(CLEAN) >= 40


def test_another_scanner_agrees_or_its_reason_is_known():
    """`tools/foreign/check_adaptersentry.py` ran adaptersentry on the same folders."""
    told = json.loads((Path(__file__).parents[1] / "data" / "adaptersentry.json").read_text())["cases"]
    assert set(PLANTED) <= {case["case"] for case in told}
    for case in told:
        assert case["agree"] == (bool(case["ours"]) == bool(case["theirs"]))
        assert case["agree"] or case["why"], case
        # What it alone finds is refused when the adapter is read.
        assert case["ours"] or case["case"] == "ranks that add up", case


@pytest.mark.parametrize("path", CLEAN, ids=lambda path: path.relative_to(VECTORS).as_posix())
def test_what_tools_write_is_clean(path):
    found = ak.scan(path)
    assert not found.fails("medium"), found.record()


def test_a_folder_as_a_tool_leaves_it_has_no_finding(tmp_path):
    assert ak.scan(folder(tmp_path / "adapter")).findings == ()


def test_small_numbers_of_bfloat16_are_no_finding(tmp_path):
    """PEFT makes factors in the base's bfloat16 and saves them as float32; float16 has no place for the smallest."""

    def small(tensors):
        flat = tensors[STEM.format(2, "q", "A")].reshape(-1)
        flat[:3] = np.float32([2.0**-20 * 1.5703125, 2.0**-21 * 1.9921875, -(2.0**-18) * 1.0078125])
        assert not (flat.view("u4") & 0xFFFF).any()
        assert (flat.astype("f2").astype("f4") != flat).any()

    assert ak.scan(folder(tmp_path / "adapter", small)).findings == ()


def test_nothing_is_executed(tmp_path):
    path = folder(tmp_path / "adapter")
    mark = tmp_path / "ran"
    pickled("a.bin", Calls(os.mkdir, str(mark)))(path)
    saved("b.pt", {"a": Calls(os.mkdir, str(mark))})(path)
    written("modeling.py", f"import os; os.mkdir({str(mark)!r})")(path)
    config("config.json", auto_map={"AutoModel": "modeling.Model"})(path)
    template(f"{{{{ cycler.__init__.__globals__.os.mkdir({str(mark)!r}) }}}}")(path)
    assert len(ak.scan(path).findings) >= 6
    assert not mark.exists()


def test_links_of_a_hubs_cache_are_clean(tmp_path):
    """huggingface_hub keeps files as links from `snapshots` into `blobs`."""
    repository = tmp_path / "models--org--lora"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    plain = folder(tmp_path / "plain")
    snapshot.mkdir(parents=True)
    for number, file in enumerate(plain.iterdir()):
        shutil.move(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert ak.scan(snapshot).findings == ()


def test_the_command_tells_and_fails(tmp_path):
    path = folder(tmp_path / "adapter")
    clean = run("scan", path)
    assert clean.exit_code == 0
    assert "evidence, not proof" in clean.output
    written("modeling.py", "import os")(path)
    head_only = run("scan", path, "--fail-on", "never")
    assert head_only.exit_code == 0
    failed = run("scan", path, "--json", "--sarif", tmp_path / "new" / "out.sarif")
    assert failed.exit_code == 1
    record = json.loads(failed.stdout)
    assert [each["rule"] for each in record["findings"]] == ["code-file"]
    sarif = json.loads((tmp_path / "new" / "out.sarif").read_text())
    (result,) = sarif["runs"][0]["results"]
    assert (sarif["version"], result["ruleId"], result["level"]) == ("2.1.0", "code-file", "error")
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "modeling.py"
    assert {rule["id"] for rule in sarif["runs"][0]["tool"]["driver"]["rules"]} == set(RULES)


def test_the_sarif_file_never_replaces_what_is_scanned(tmp_path):
    path, base = folder(tmp_path / "adapter"), save_base(tmp_path / "base")
    for sources, name in [((path,), path / "adapter_config.json"), ((path, "--base", base), base / "config.json")]:
        before = name.read_bytes()
        refused = run("scan", *sources, "--sarif", name)
        assert (refused.exit_code, name.read_bytes()) == (2, before)
        assert "Write to another path" in refused.stderr
    for _ in range(2):
        assert run("scan", path, "--sarif", path / "found.sarif").exit_code == 0


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StorageError):
        ak.scan(tmp_path / "nothing")
    assert ak.scan(folder(tmp_path / "adapter") / "adapter_model.safetensors").files == 1


def test_a_pull_is_scanned_before_anything_is_written(hub, tmp_path):  # noqa: F811
    files = peft_files()
    hub.add("org/good", files)
    hub.add("org/bad", files | {"modeling.py": b"import os"})
    assert run("pull", "hf://org/good", tmp_path / "good", "--scan").exit_code == 0
    assert (tmp_path / "good" / "adapter_config.json").exists()
    refused = run("pull", "hf://org/bad", tmp_path / "bad", "--scan")
    assert refused.exit_code == 1
    assert "modeling.py" in refused.stderr
    assert not (tmp_path / "bad").exists()


def test_a_link_that_leads_back_to_itself_is_a_finding(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text.txt").write_text("hello")
    assert [(each.rule, each.file) for each in ak.scan(tmp_path).findings] == [("link", "loop")]


def test_a_call_in_a_pickle_that_does_not_end_runs_and_is_found(tmp_path):
    """What the scan reads as a call is one for the unpickler of Python, too."""
    for name in ("a name from the memo", "a name below others", "the same in protocol 0", "text that is not ASCII"):
        _, act = EVADING[name]
        path = tmp_path / name
        path.mkdir()
        act(path)
        (file,) = path.iterdir()
        asked = []

        class Recording(pickle.Unpickler):
            def find_class(self, module, name):
                asked.append((module, name))  # noqa: B023 - used in this round only
                return list

        with file.open("rb") as stream, suppress(pickle.UnpicklingError):
            Recording(stream, encoding="utf-8").load()
        assert asked == [("posix", "system")]


def test_what_is_not_scanned_is_said(tmp_path):
    path = folder(tmp_path / "adapter")
    (path / "broken.json").write_text('{"auto_map": {"A": "a.A"},}')
    (path / "long.json").write_text('{"pad": "' + "a" * (33 << 20) + '", "auto_map": {"A": "a.A"}}')
    (path / "broken.zip").write_bytes(b"PK\x03\x04" + bytes(60))
    unread = ak.scan(path).unread
    assert [each.partition(":")[0] for each in unread] == ["broken.json", "broken.zip", "long.json"]
    with pytest.raises(StorageError):
        ak.scan(path, base=tmp_path / "nothing")


def test_adapters_in_subfolders_are_scanned(tmp_path):
    """Two of them: none is the folder's adapter."""
    folder(tmp_path / "a")
    folder(tmp_path / "b", lambda tensors: tensors.update({STEM.format(0, "q", "A"): np.full((8, 32), np.nan, "f4")}))
    assert "not-finite" in {each.rule for each in ak.scan(tmp_path).findings}
    (tmp_path / "c").mkdir()
    save_file({"a.weight": np.zeros((2, 2), "f4")}, tmp_path / "c" / "x.safetensors")
    assert any("no adapter is recognised" in each for each in ak.scan(tmp_path / "c").unread)


def test_a_folder_below_git_is_scanned(tmp_path):
    path = folder(tmp_path / ".git" / "adapter")
    written("modeling.py", "import os")(path)
    assert [each.rule for each in ak.scan(path).findings] == ["code-file"]


def test_the_place_of_a_link_is_shown_without_control_characters(tmp_path):
    (tmp_path / "link").symlink_to("/\x1b[2J\n" + "x" * 300)
    (finding,) = ak.scan(tmp_path).findings
    assert finding.rule == "link"
    assert finding.evidence.isprintable()
    assert len(finding.evidence) < 200


def test_a_folder_that_cannot_be_read_is_reported_as_unread(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert any("deep: the folder could not be read: Permission denied" in line for line in ak.scan(tmp_path).unread)
    with pytest.raises(StorageError, match="deep"):
        ak.provenance.bom(tmp_path)


def test_a_link_to_a_name_that_is_too_long_is_refused_by_a_bill_of_materials(tmp_path):
    (tmp_path / "link").symlink_to("x" * 300)
    with pytest.raises(Unsupported, match="a link whose target is missing"):
        ak.provenance.bom(tmp_path)


CALL = b"cposix\ngetcwd\n(tR."


def zipped(spoil):
    """A file of `torch.save` whose pickle calls a function, with some bytes changed that torch does not look at."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entries = {"x/data.pkl": b"\x80\x02" + CALL, "x/version": b"3\n", "x/byteorder": b"little"}
        for name, content in entries.items():
            archive.writestr(name, content)
    data = bytearray(buffer.getvalue())
    spoil(data, data.index(b"PK\x01\x02"))
    return bytes(data)


def array(descr):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickle.dumps([os.getcwd]) + CALL


def torch_file(data):
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def old_joblib(data, space=b""):
    """The layout of joblib before 0.9.3, which `joblib.numpy_pickle_compat.read_zfile` still reads."""
    return b"ZF" + hex(len(data)).encode().ljust(19) + space + zlib.compress(data)


def joblib_file(data):
    """joblib recognises the compression by the first bytes."""
    if data.startswith(b"ZF"):
        return pickle.loads(zlib.decompress(data[22 if data[21:22] == b" " else 21 :], 15, int(data[2:21], 16)))
    return pickle.loads(zlib.decompress(data) if data[:1] == b"x" else lzma.decompress(data))


def in_array(data):
    (called,) = np.load(io.BytesIO(data), allow_pickle=True)
    return called()


RUNNING = {
    "a number in base 16.bin": (b"I0x1\n0" + CALL, pickle.loads),
    "a long number in base 16.bin": (b"L0x1L\n0" + CALL, pickle.loads),
    "the protocol 0": (b"\x80\x00" + CALL, pickle.loads),
    "no array.npy": (CALL, lambda data: np.load(io.BytesIO(data), allow_pickle=True)),
    "begins like bzip2.bin": (b"BZh\x00\x00" + bytes(0x685A) + b"0" + CALL, pickle.loads),
    "looks like tar.bin": (b"\x80\x02B" + struct.pack("<I", 600) + b"ustar" * 120 + b"0" + CALL, pickle.loads),
    "zlib.joblib": (zlib.compress(CALL), joblib_file),
    "joblib 0.8.joblib": (old_joblib(CALL), joblib_file),
    "a space.joblib": (old_joblib(CALL, b" "), joblib_file),
    "lzma.joblib": (lzma.compress(CALL, lzma.FORMAT_ALONE), joblib_file),
    "checksum.pt": (zipped(lambda data, at: data.__setitem__(at + 16, data[at + 16] ^ 1)), torch_file),
    "local name.pt": (zipped(lambda data, _: data.__setitem__(data.index(b"x/data"), ord("y"))), torch_file),
} | {f"array {number}.npy": (array(descr), in_array) for number, descr in enumerate(
    ("'O'", "'O8'", "'<O'", "'object'", r"'\x4f'", "'|' 'O'")
)}  # fmt: skip


@pytest.mark.parametrize("name", RUNNING)
def test_what_a_loader_runs_is_found(tmp_path, name):
    data, load = RUNNING[name]
    # Since Python 3.14, the unpickler refuses numbers in base 16. The file may be for an older one.
    if "base 16" not in name or sys.version_info < (3, 14):
        assert load(data) == os.getcwd()
    (tmp_path / name).write_bytes(data)
    found = {(each.rule, each.evidence) for each in ak.scan(tmp_path).findings}
    assert ("pickle-call", "it imports 'posix.getcwd'") in found


def test_a_file_packed_with_lz4_is_reported_as_unread(tmp_path):
    # An lz4 frame of the reference implementation, with the content b"cos\ngetcwd\n(tR."; joblib loads such files.
    frame = "04224d1868400f00000000000000160f000080636f730a6765746377640a2874522e00000000"
    (tmp_path / "scaler.joblib").write_bytes(bytes.fromhex(frame))
    assert [*ak.scan(tmp_path).unread] == ["scaler.joblib: this archive cannot be read: lz4 cannot be decompressed"]


def test_many_keys_are_compared_once(tmp_path):
    keys = ",".join(f'"{number}":0' for number in range(100_000))
    (tmp_path / "config.json").write_text(f'{{{keys},"0":1}}')
    previous = signal.signal(signal.SIGALRM, took_too_long)
    signal.alarm(60)
    try:
        (finding,) = ak.scan(tmp_path).findings
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert (finding.rule, finding.where) == ("other-content", "'0'")


def took_too_long(*_):
    raise TimeoutError("a minute has passed: the keys are compared with each other")


EVIL = b"cos\nsystem\n(S'id'\ntR."


@pytest.mark.parametrize("size", [3000, 4050, 4096, 4608, 5000, 20_000])
@pytest.mark.parametrize("level", [0, 9])
def test_a_call_at_the_end_of_zlib_data_is_found_or_the_rest_is_unread(tmp_path, monkeypatch, level, size):
    """At level 0, the compressed data is longer than its content."""
    monkeypatch.setattr("adapterkit.scanning.files.LARGEST", 4096)
    filler = b"(" + b"I1\n" * ((size - len(EVIL)) // 3) + b"t"
    data = filler + EVIL
    assert next(reversed([*pickletools.genops(data)]))[0].name == "STOP"
    (tmp_path / "scaler.joblib").write_bytes(zlib.compress(data, level))
    scanned = ak.scan(tmp_path)
    is_found = any(each.rule == "pickle-call" and "os.system" in each.evidence for each in scanned.findings)
    assert is_found or any(each.startswith("scaler.joblib: only its first") for each in scanned.unread)
    assert is_found or size > 4096


def test_empty_blocks_of_zlib_data_hide_no_call(tmp_path, monkeypatch):
    monkeypatch.setattr("adapterkit.scanning.files.LARGEST", 4096)
    data = zlib.compress(b"", 0)[:2] + b"\x00\x00\x00\xff\xff" * 10_000
    raw = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data += raw.compress(EVIL) + raw.flush() + zlib.adler32(EVIL).to_bytes(4, "big")
    assert zlib.decompress(data) == EVIL
    (tmp_path / "scaler.joblib").write_bytes(data)
    assert any("os.system" in each.evidence for each in ak.scan(tmp_path).findings)


@pytest.mark.parametrize("many", range(4090, 4104))
def test_a_cut_between_two_pickles_is_reported(tmp_path, monkeypatch, many):
    monkeypatch.setattr("adapterkit.scanning.files.LARGEST", 4096 - 512)
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04N." + b"N." * ((many - 4) // 2) + EVIL)
    scanned = ak.scan(tmp_path)
    is_found = any("os.system" in each.evidence for each in scanned.findings)
    assert is_found or any(each.startswith("x.pkl: only its first") for each in scanned.unread)


def test_entries_after_a_damaged_one_are_scanned(tmp_path):
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("first.pkl", b"N" * 100 + b".")
        archive.writestr("last.pkl", EVIL)
    data = bytearray(file.read_bytes())
    start = 30 + len("first.pkl")
    data[start] = 0xFF  # A block of a type that does not exist.
    file.write_bytes(data)
    scanned = ak.scan(tmp_path)
    assert any("os.system" in each.evidence and each.where.startswith("last.pkl") for each in scanned.findings)
    assert any("first.pkl" in each and "cannot be read" in each for each in scanned.unread)
