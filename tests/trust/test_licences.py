"""Licences: what the table says is SPDX's, where licences of parts contradict, and where people are told."""

from __future__ import annotations

import json
import tomllib
from itertools import product
from pathlib import Path

import cyclonedx
import pytest
from command_line import record, run, save_base, save_peft
from hub_repository import hub  # noqa: F401 - a fixture
from license_expression import Licensing

import adapterkit as ak
from adapterkit.core.licence_terms import alternatives, conflicts, family_of, passed_over, spdx_of, terms_of, unknown
from adapterkit.errors import CheckFailed

TABLE = tomllib.loads((Path(__file__).parents[2] / "spec" / "licences.toml").read_text("utf-8"))
SPDX = Path(cyclonedx.__file__).parent / "schema" / "_res" / "spdx.SNAPSHOT.schema.json"


def test_the_table_names_licences_of_spdx_and_families_that_are_there() -> None:
    known = set(json.loads(SPDX.read_text("utf-8"))["enum"])
    for name, entry in TABLE["licences"].items():
        assert entry["family"] in TABLE["families"], name
        assert entry.get("spdx", "MIT") in known, name
        assert set(entry.get("into", ())) <= set(TABLE["licences"]), name
        assert name == name.lower()
        if entry.get("spdx"):
            assert entry["spdx"].lower().removesuffix("-only").startswith(name.removesuffix("-1.0")) or name == "odbl"
    assert set(TABLE["names"].values()) <= set(TABLE["families"])


def told(*names: str) -> list[tuple[str, dict[str, str]]]:
    return [(f"part {n}", {"license": name}) for n, name in enumerate(names)]


@pytest.mark.parametrize(("names", "words"), [
    (("apache-2.0", "mit"), None), (("mit",), None), (("llama3.1", "apache-2.0"), None), (("gemma", "gemma"), None),
    (("cc-by-nc-4.0", "cc-by-nc-4.0"), None), (("gpl-3.0", "apache-2.0"), None), (("unknown", "gpl-3.0"), None),
    (("cc-by-sa-4.0", "gpl-3.0"), None), (("cc-by-sa-3.0", "gpl-3.0"), None), (("gpl-3.0", "agpl-3.0"), None),
    (("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"), None), (("llama2", "openrail"), None),
    (("apache-2.0", "cc-by-nc-4.0"), "no commercial use, because of part 1"),
    (("cc-by-nc-4.0", "llama2"), "no commercial use, because of part 0"),
    (("gpl-3.0", "llama3"), "the other adds limits"), (("openrail", "agpl-3.0"), "the other adds limits"),
    (("gpl-2.0", "gpl-3.0"), "each licence must cover the whole model"),
    (("cc-by-nc-sa-4.0", "cc-by-nc-4.0"), None), (("cc-by-sa-4.0", "cc-by-nc-sa-4.0"), "each licence must cover"),
    (("cc-by-nd-4.0", "mit"), "sharing changed copies"), (("mit", "cc-by-nc-nd-4.0"), "sharing changed copies"),
])  # fmt: skip
def test_conflicts(names: tuple[str, ...], words: str | None) -> None:
    found = conflicts(told(*names))
    assert bool(found) == (words is not None), found
    assert words is None or words in found[0]


EXPRESSIONS = (
    "mit", "MIT OR Apache-2.0", "mit AND (gpl-3.0 OR apache-2.0)", "a or b and c", "(a OR b) AND (c OR d) AND e",
    "((a))", "a AND a", "GPL-2.0 WITH Classpath-exception-2.0 OR MIT", "(a OR b) AND a",
)  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_mean_what_the_parser_of_license_expression_says(text: str) -> None:
    """For each set of accepted licences: an alternative is within it exactly if the expression is true for it."""
    found = alternatives(text)
    assert found is not None
    parsed = Licensing().parse(text)
    symbols = sorted(parsed.symbols)
    for accepted in product((False, True), repeat=len(symbols)):
        names = {str(symbol).lower() for symbol, yes in zip(symbols, accepted, strict=True) if yes}
        value = parsed.subs(
            {s: Licensing().TRUE if yes else Licensing().FALSE for s, yes in zip(symbols, accepted, strict=True)}
        ).simplify()
        assert any(set(each) <= names for each in found) == (value == Licensing().TRUE), names


@pytest.mark.parametrize("text", [
    "", "mit apache-2.0", "MIT AND", "OR MIT", "(MIT", "MIT)", "()", "MIT/Apache-2.0", "a WITH", "a WITH (b)", "MIT,",
    "with",    "(" * 5000 + "a" + ")" * 5000, " AND ".join(f"(a{n} OR b{n})" for n in range(20)), "\uff2d\uff29\uff34",
])  # fmt: skip
def test_what_is_no_expression(text: str) -> None:
    assert alternatives(text) is None


@pytest.mark.parametrize(("names", "words"), [
    (("mit OR cc-by-nc-4.0", "apache-2.0"), None), (("mit AND cc-by-nc-4.0", "mit"), "no commercial use"),
    (("gpl-3.0 OR mit", "llama3"), None), (("gpl-3.0 AND mit", "llama3 OR openrail"), "the other adds limits"),
    (("mit OR unheard-of", "cc-by-nd-4.0 AND mit"), "sharing changed copies"),
])  # fmt: skip
def test_conflicts_of_expressions(names: tuple[str, ...], words: str | None) -> None:
    found = conflicts(told(*names))
    assert bool(found) == (words is not None), found
    assert words is None or words in found[0]


def test_a_result_under_a_choice_must_keep_each_part_s_licence_in_every_choice() -> None:
    part = told("cc-by-nc-4.0")
    assert "cc-by-nc-4.0" in passed_over({"license": "mit OR cc-by-nc-4.0"}, part)[0]
    assert not passed_over({"license": "mit AND cc-by-nc-4.0"}, part)
    assert not passed_over({"license": "mit"}, told("mit OR gpl-3.0"))
    assert passed_over({"license": "mit"}, told("mit AND gpl-3.0"))
    assert unknown(told("mit OR x", "mit AND x")) == (
        "part 1 is under mit AND x, which is not in the table of licences",
    )


@pytest.mark.parametrize(("card", "licence", "spdx"), [
    ("mit OR Apache-2.0", "mit OR Apache-2.0", "MIT OR Apache-2.0"),
    ("[mit, cc-by-nc-4.0]", "mit AND cc-by-nc-4.0", "MIT AND CC-BY-NC-4.0"),
    ("[mit, gpl-3.0 or apache-2.0]", "mit AND (gpl-3.0 or apache-2.0)", None),
    ("mit AND acme", "mit AND acme", None), ("[mit, 3]", None, None), ("[]", None, None), ("mit/x", None, None),
])  # fmt: skip
def test_cards_with_several_licences(tmp_path: Path, card: str, licence: str | None, spdx: str | None) -> None:
    lora = save_peft(tmp_path / "lora")
    (lora / "README.md").write_text(f"---\nlicense: {card}\n---\n")
    shown = record("inspect", lora)
    assert shown["licence"] == licence
    if spdx is not None:
        assert shown["licence_spdx"] == spdx
        assert ak.provenance.bom(lora).data["metadata"]["component"]["licenses"] == [{"expression": spdx}]
    if licence == "mit AND cc-by-nc-4.0":
        assert "commercial" in shown["licence_asks"]


def test_conflicts_do_not_depend_on_the_order() -> None:
    for pair in product(TABLE["licences"], repeat=2):
        assert bool(conflicts(told(*pair))) == bool(conflicts(told(*reversed(pair)))), pair


@pytest.mark.parametrize(("stated", "parts", "words"), [
    ("apache-2.0", ("mit", "apache-2.0"), None), ("llama3.1", ("llama3.1", "mit"), None), ("", ("llama3",), None),
    ("gpl-3.0", ("cc-by-sa-4.0",), None), ("cc-by-nc-4.0", ("apache-2.0",), None),
    ("apache-2.0", ("llama3.1",), "asks for its text"), ("mit", ("gpl-3.0",), "the whole to be under it"),
    ("llama2", ("cc-by-nc-4.0",), "no commercial use"), ("mit", ("cc-by-nd-4.0",), "no changed copies"),
])  # fmt: skip
def test_a_card_that_says_less_than_the_parts_ask(stated: str, parts: tuple[str, ...], words: str | None) -> None:
    found = passed_over({"license": stated}, told(*parts))
    assert (bool(found), words is None or words in found[0]) == (words is not None, True), found


def test_licences_that_have_only_a_name() -> None:
    flux = {"license": "other", "license_name": "flux-1-dev-non-commercial-license"}
    assert (family_of(flux), spdx_of(flux)) == ("noncommercial", None)
    assert conflicts([("the base", flux), ("lora", {"license": "mit"})])[0].startswith(
        "the base is under flux-1-dev-non-commercial-license, and lora is under mit"
    )
    assert terms_of({"license": "other", "license_name": "mine"}) is None
    assert (spdx_of({"license": "Apache-2.0"}), spdx_of({})) == ("Apache-2.0", None)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    base, lora = save_base(tmp_path / "base"), save_peft(tmp_path / "lora")
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (lora / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return base, lora


def test_a_merge_warns_and_records(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    report = ak.merge(parts[0], [parts[1]], tmp_path / "out")
    why = "licences: the base is under llama3.1, and lora is under cc-by-nc-4.0: the result allows no commercial use"
    assert any(each.startswith(why) for each in report.record()["warnings"]), report.record()["warnings"]
    kept = json.loads((tmp_path / "out" / "adapterkit_merge.json").read_text())
    assert kept["licences"] == {"lora": {"license": "cc-by-nc-4.0"}, "the base": {"license": "llama3.1"}}
    assert why in run("merge", *parts, "-o", tmp_path / "again").output
    (parts[1] / "README.md").unlink()
    quiet = ak.merge(parts[0], [parts[1]], tmp_path / "quiet")
    assert not any("licences" in each for each in quiet.record()["warnings"])


def test_a_file_of_an_image_model_names_its_licence_in_its_metadata(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    ak.convert(parts[1], tmp_path / "a" / "kohya.safetensors", to="adapterkit")
    adapter = ak.read(tmp_path / "a" / "kohya.safetensors")
    adapter = adapter.replace(recipe=(*adapter.recipe, ak.Step("read", {"metadata": {"modelspec.license": "gpl-3.0"}})))
    report = ak.merge(parts[0], [adapter], tmp_path / "out")
    assert any("is under gpl-3.0" in each for each in report.record()["warnings"]), report.record()["warnings"]


def test_inspect_says_what_a_licence_asks(parts: tuple[Path, Path]) -> None:
    lora, base = record("inspect", parts[1]), record("inspect", parts[0])
    assert (lora["licence"], lora["licence_spdx"]) == ("cc-by-nc-4.0", "CC-BY-NC-4.0")
    assert (base["licence"], base["licence_spdx"]) == ("llama3.1", None)
    assert "cc-by-nc-4.0, which allows no commercial use" in run("inspect", parts[1]).stdout
    assert "licence llama3.1, which asks for its text" in run("inspect", parts[0]).stdout


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_push_warns_of_a_card_that_says_less(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    ak.merge(parts[0], [parts[1]], tmp_path / "out")
    pushed = ak.hub.push(tmp_path / "out", "hf://org/out", licence="mit", dry_run=True)
    assert [each.partition(" is under ")[2].partition(",")[0] for each in pushed.warnings] == [
        "llama3.1", "cc-by-nc-4.0", "llama3.1",
    ], pushed.warnings  # fmt: skip
    assert pushed.warnings[0].startswith("licences: the card says mit, but the base is under llama3.1, which asks for")
    said = run("push", tmp_path / "out", "hf://org/out", "--licence", "mit")
    assert (said.exit_code, said.stderr.count("warning: licences: ")) == (0, 3), said.output
    (parts[1] / "README.md").unlink()
    ak.merge(parts[0], [parts[1]], tmp_path / "plain")
    assert ak.hub.push(tmp_path / "plain", "hf://org/plain", dry_run=True).warnings == ()


def licensed(path: Path, name: str | None) -> None:
    (path / "README.md").write_text("# A card\n" if name is None else f"---\nlicense: {name}\n---\n")


@pytest.mark.parametrize(("base", "lora", "words"), [
    ("llama3.1", "cc-by-nc-4.0", r"no commercial use, because of lora"),
    ("gpl-2.0", "gpl-3.0", "each licence must cover the whole model"),
    ("apache-2.0", None, "lora names no licence"), (None, "mit", "the base names no licence"),
    ("apache-2.0", "acme-1", "lora is under acme-1, which is not in the table"),
])  # fmt: skip
def test_strict_licence_refuses_before_anything_is_written(
    tmp_path: Path, parts: tuple[Path, Path], base: str | None, lora: str | None, words: str
) -> None:
    for path, name in zip(parts, (base, lora), strict=True):
        licensed(path, name)
    with pytest.raises(CheckFailed, match=words) as refused:
        ak.merge(parts[0], [parts[1]], tmp_path / "out", strict_licence=True)
    assert "--strict-licence (strict_licence=False)" in str(refused.value)
    with pytest.raises(CheckFailed, match=words):
        ak.plan(parts[0], [parts[1]], strict_licence=True)
    said = run("merge", *parts, "-o", tmp_path / "out", "--strict-licence")
    assert (said.exit_code, words in said.stderr) == (1, True), said.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_strict_licence_lets_parts_pass_that_agree(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    licensed(parts[0], "apache-2.0")
    licensed(parts[1], "mit")
    assert run("merge", *parts, "-o", tmp_path / "out", "--strict-license").exit_code == 0
    # Without a licence of its own it shows the base's, which asks for no more than the adapter's.
    assert run("push", tmp_path / "out", "hf://org/out", "--strict-licence").exit_code == 0
    licensed(parts[1], None)
    unnamed = run("push", parts[1], "hf://org/lora", "--strict-licence")
    assert (unnamed.exit_code, "to push names no licence" in unnamed.stderr) == (1, True), unnamed.output
    assert run("push", parts[1], "hf://org/lora", "--strict-licence", "--licence", "mit").exit_code == 0


@pytest.mark.usefixtures("hub")
def test_strict_licence_refuses_a_push_of_a_card_that_says_less(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    ak.merge(parts[0], [parts[1]], tmp_path / "out")
    with pytest.raises(CheckFailed, match=r"the card says mit, but the base is under llama3\.1"):
        ak.hub.push(tmp_path / "out", "hf://org/out", licence="mit", strict_licence=True)
    said = run("push", tmp_path / "out", "hf://org/out", "--licence", "mit", "--strict-licence")
    assert said.exit_code == 1
    assert run("pull", "hf://org/out", tmp_path / "back").exit_code != 0
