# ruff: noqa: ARG005 - each call of a table takes the same arguments
"""The verbs of the package: the same results as the command line's, the same checks before any work."""

from pathlib import Path

import numpy as np
import pytest
from command_line import run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, StorageError, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and two LoRAs in PEFT's format, `a` and `b`."""
    rng = np.random.default_rng(0)
    save_file({"model.q.weight": rng.normal(size=(5, 4)).astype("f4")}, tmp_path / "base.safetensors")
    for name in "ab":
        factors = {"A": rng.normal(size=(2, 4)).astype("f4"), "B": rng.normal(size=(5, 2)).astype("f4")}
        update = LoRA(**{key: from_numpy(value) for key, value in factors.items()}, scaling=0.5)
        ak.write(Adapter({Target("model.q"): (update,)}), tmp_path / name, format="peft")
    return tmp_path


def test_convert_writes_what_the_command_writes(folder: Path) -> None:
    result = ak.convert(folder / "a", folder / "one.safetensors", to="adapterkit")
    assert run("convert", folder / "a", folder / "two.safetensors", "--to", "adapterkit").exit_code == 0
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    assert (result.out, result.format) == (str(folder / "one.safetensors"), "adapterkit")
    assert (result.targets, result.updates, result.losses, result.already_done) == (1, 1, (), False)


def test_convert_tells_what_was_rewritten(folder: Path) -> None:
    with pytest.raises(AdapterkitError):
        ak.convert(folder / "a", folder / "a.onnx_adapter", to="olive")
    result = ak.convert(folder / "a", folder / "a.onnx_adapter", to="olive", on_loss="fold")
    assert any("folded the scaling" in line for line in result.losses)


def test_convert_refuses_before_any_work(folder: Path) -> None:
    ak.convert(folder / "a", folder / "out", to="peft")
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    with pytest.raises(StorageError, match="overwrite"):
        ak.convert(folder / "b", folder / "out", to="peft")
    with pytest.raises(UsageError, match="the source and the destination"):
        ak.convert(folder / "a", folder / "a", to="peft", overwrite=True)
    with pytest.raises(UsageError, match=r"unknown format .pfet.\..*peft"):
        ak.convert(folder / "a", folder / "x", to="pfet")
    with pytest.raises(UsageError, match="--match-base"):
        ak.convert(folder / "a", folder / "x", to="peft", match_base=True)
    with pytest.raises(UsageError, match="takes no --alpha"):
        ak.convert(folder / "a", folder / "x.safetensors", to="adapterkit", format="adapterkit", alpha=3.0)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
    assert not (folder / "x").exists()
    ak.convert(folder / "b", folder / "out", to="peft", overwrite=True)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} != before


def test_combine_diff_and_plan_are_the_verbs_of_the_command_line(folder: Path) -> None:
    both = ak.combine([folder / "a", folder / "b"], method="linear", weights=[2, -1])
    parts = [ak.read(folder / name).delta("model.q").numpy() for name in "ab"]
    assert np.allclose(both.delta("model.q").numpy(), 2 * parts[0] - parts[1], atol=1e-6)
    assert ak.diff(folder / "a", folder / "a").equal is True
    assert ak.diff(folder / "a", folder / "b").equal is False
    planned = ak.plan(folder / "base.safetensors", folder / "a")
    assert planned.targets == 1
    ak.merge(folder / "base.safetensors", folder / "a", folder / "merged.safetensors")
    assert (folder / "merged.safetensors").stat().st_size == planned.bytes
    merged = load_file(folder / "merged.safetensors")["model.q.weight"]
    assert np.allclose(merged, load_file(folder / "base.safetensors")["model.q.weight"] + parts[0], atol=1e-6)


def test_objects_are_shown_on_one_line(folder: Path) -> None:
    adapter, base = ak.read(folder / "a"), folder / "base.safetensors"
    report = ak.merge(base, [adapter], folder / "out.safetensors")
    results = [
        adapter, next(iter(adapter.updates)), adapter.updates[Target("model.q")][0], ak.plan(base, adapter), report,
        ak.verify(folder / "out.safetensors", base, [adapter]), ak.diff(adapter, adapter), report.plan.base,
        ak.convert(folder / "a", folder / "x.safetensors", to="adapterkit"),
        adapter.updates[Target("model.q")][0].A,
    ]  # fmt: skip
    for each in results:
        assert "\n" not in repr(each)
        assert len(repr(each)) < 300
        assert repr(each).startswith(type(each).__name__)
    assert repr(adapter) == "Adapter(1 target: 1 lora)"


def test_tables_for_notebooks_show_untrusted_names_as_text(folder: Path) -> None:
    adapter = ak.read(folder / "a")
    (update,) = adapter.updates[Target("model.q")]
    hostile = adapter.replace(updates={Target("<script>alert(1)</script>"): (update,)})
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()
    many = adapter.replace(updates={Target(f"model.{n}"): (update,) for n in range(500)})
    assert many._repr_html_().count("<tr>") == 61
    assert "440 more rows" in many._repr_html_()
    base = folder / "base.safetensors"
    for each in (ak.plan(base, adapter), ak.merge(base, adapter, folder / "m.safetensors"), ak.diff(adapter, adapter)):
        assert each._repr_html_().count("<tr>") == 2


def test_the_users_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    ak.write(ak.read("~/a"), "~/b2", format="peft")
    ak.convert("~/a", "~/c.safetensors", to="adapterkit")
    ak.merge("~/base.safetensors", ["~/a"], "~/merged.safetensors")
    for name in ("b2", "c.safetensors", "merged.safetensors"):
        assert (folder / name).exists()
    assert not Path("~").exists()


WRONG = {
    "read": lambda a, base: ak.read(3),
    "detect": lambda a, base: ak.detect(None),
    "write to a number": lambda a, base: ak.write(a, 3),
    "write in the wrong order": lambda a, base: ak.write("out", a),
    "merge in the wrong order": lambda a, base: ak.merge([a], base, "out"),
    "merge a number": lambda a, base: ak.merge(base, 3, "out"),
    "verify": lambda a, base: ak.verify(3, base, [a]),
    "diff": lambda a, base: ak.diff(a, 2),
    "combine": lambda a, base: ak.combine("a"),
    "convert": lambda a, base: ak.convert(1, "out", to="peft"),
    "names": lambda a, base: ak.names(1),
    "plan": lambda a, base: ak.plan(1, a),
    "pull": lambda a, base: ak.hub.pull(3, "out"),
    "inject into a number": lambda a, base: ak.torch.inject(3, a),
    "inject in the wrong order": lambda a, base: ak.torch.inject(a, 3),
    "inject into a graph": lambda a, base: ak.onnx.inject(3, a, "out"),
    "resize": lambda a, base: ak.ops.resize(3, 2),
    "extract": lambda a, base: ak.ops.extract(base, 3, 2),
    "rename to a number": lambda a, base: ak.plan(base, a, rename=3),
    "rename to numbers": lambda a, base: ak.names(base, a, rename=[3]),
    "sample a text": lambda a, base: ak.verify(base, base, a, sample="1"),
    "sample a half": lambda a, base: ak.verify(base, base, a, sample=1.5),
    "workers below 1": lambda a, base: ak.combine([a, a], workers=-1),
    "workers as a text": lambda a, base: ak.ops.extract(base, base, 1, workers="2"),
    "combine by one number": lambda a, base: ak.combine([a, a], weights=1),
    "combine by a text": lambda a, base: ak.combine([a, a], weights="12"),
    "combine by a number beyond floats": lambda a, base: ak.combine([a, a], weights=[10**400, 1]),
    "combine by a list beyond floats": lambda a, base: ak.combine([a, a], weights=[[10**400], 1]),
    "add by one number": lambda a, base: ak.ops.add([a, a], 1),
    "add by a text": lambda a, base: ak.ops.add([a, a], "12"),
    "add by a number beyond floats": lambda a, base: ak.ops.add([a, a], [10**400, 1]),
    "merge by a number beyond floats": lambda a, base: ak.plan(base, a, weights=[10**400]),
    "scale by a text": lambda a, base: ak.ops.scale(a, "2"),
    "scale by nothing": lambda a, base: ak.ops.scale(a, None),
    "average outputs by one number": lambda a, base: ak.torch.compose.average(a, a, weights=1),
    "average outputs by a NaN": lambda a, base: ak.torch.compose.average(a, a, weights=[float("nan"), 1]),
    "add a number": lambda a, base: ak.ops.add(3),
    "stack nothing": lambda a, base: ak.ops.stack(None),
    "stack outputs of a path": lambda a, base: ak.torch.compose.stack("a", a),
    "average outputs of a number": lambda a, base: ak.torch.compose.average(3, a),
    "names of a number": lambda a, base: ak.names(base, 3),
    "gate by a text": lambda a, base: ak.gate(base, [a, a], weights="12"),
}


@pytest.mark.parametrize("call", WRONG)
def test_arguments_of_another_type_are_usage_errors_with_a_cure(folder: Path, call: str) -> None:
    with pytest.raises(UsageError) as raised:
        WRONG[call](ak.read(folder / "a"), folder / "base.safetensors")
    assert raised.value.cure


def test_only_what_is_public_is_listed() -> None:
    assert sorted(dir(ak)) == sorted([*ak.__all__, "__version__"])
    for name in ak.__all__:
        assert getattr(ak, name) is not None


def test_every_verb_has_one_name_here_and_on_the_command_line() -> None:
    from adapterkit.cli import adapterkit

    commands = set(adapterkit.list_commands(None))  # type: ignore[arg-type]
    verbs = {"inspect", "convert", "combine", "diff", "plan", "names", "report", "merge", "verify", "scan", "gate"}
    assert verbs <= set(dir(ak))
    assert verbs - {"plan"} <= commands, "plan is merge --plan"
    assert all(callable(getattr(ak, verb)) for verb in verbs)


def test_inspect_is_what_the_command_prints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from command_line import record

    monkeypatch.chdir(folder)
    for src in ("a", "base.safetensors"):
        found = ak.inspect(src)
        assert found.record() == record("inspect", src)
        assert (repr(found).startswith("Inspection("), "\n" in repr(found)) == (True, False)
        assert found._repr_html_().count("<tr>") == 1 + found.totals.get("targets", found.totals.get("tensors"))
    assert record("inspect", "a", "--layers")["layers"] == ak.inspect("a", layers=True).data["layers"]
    held = ak.read("a")
    assert ak.inspect(held).totals == ak.inspect("a").totals
    assert ak.inspect("a", base="base.safetensors").data["names"]["fits"] is True
    with pytest.raises(ak.AdapterkitError, match="--base BASE"):
        ak.inspect("a", rename="x=y")
    found = ak.names("base.safetensors", "a")
    assert repr(found).startswith("NameMap(")
    assert found._repr_html_().count("<tr>") == 1 + len(found["targets"])
    assert ak.verify("base.safetensors", "base.safetensors", ["a"])._repr_html_().count("<tr>") > 1


def test_options_are_one_value_for_plan_and_merge(folder: Path) -> None:
    """The same options by name and as one value give the same plan and the same bytes."""
    base, options = folder / "base.safetensors", ak.MergeOptions(dtype="bf16", seed=3, rename=["model.q=model.q"])
    named = {"dtype": "bf16", "seed": 3, "rename": "model.q=model.q"}
    plan = ak.plan(base, folder / "a", options=options)
    assert isinstance(plan, ak.Plan)
    assert plan.digest == ak.plan(base, folder / "a", **named).digest  # type: ignore[arg-type]
    assert plan.digest != ak.plan(base, folder / "a").digest
    one = ak.merge(base, folder / "a", folder / "one.safetensors", options=options)
    ak.merge(base, folder / "a", folder / "two.safetensors", **named)  # type: ignore[arg-type]
    assert isinstance(one, ak.Report)
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    assert isinstance(ak.verify(folder / "one.safetensors", base, folder / "a", seed=3), ak.Verification)


@pytest.mark.parametrize("rename", [None, [], ()])
def test_no_rules_are_no_rules_in_every_form(folder: Path, rename: object) -> None:
    base, options = folder / "base.safetensors", ak.MergeOptions(dtype="bf16")
    digest = ak.plan(base, folder / "a", options=options).digest
    assert ak.plan(base, folder / "a", options=options, rename=rename).digest == digest  # type: ignore[arg-type]
    assert ak.plan(base, folder / "a", dtype="bf16", rename=rename).digest == digest  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"options": ak.MergeOptions(seed=1), "dtype": "bf16"}, r"dtype is given twice.*MergeOptions\(dtype="),
        ({"options": {"dtype": "bf16"}}, r"is not a MergeOptions or None.*adapterkit\.MergeOptions"),
        ({"options": ak.MergeOptions(tied="both")}, "choice 'both' for tied weights is unknown"),
        ({"options": ak.MergeOptions(dtype="float17")}, "float17"),
    ],
)
def test_options_that_contradict_are_refused(folder: Path, given: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        ak.merge(folder / "base.safetensors", folder / "a", folder / "out.safetensors", **given)  # type: ignore[arg-type]
    assert not (folder / "out.safetensors").exists()


def test_results_are_public_and_of_one_name(folder: Path) -> None:
    """No two public classes share a name, and every verb returns one of them."""
    classes = [value for name in ak.__all__ if isinstance(value := getattr(ak, name), type)]
    names = [each.__name__ for each in (*classes, ak.onnx.GraphReport)]
    assert len(set(names)) == len(names)
    base = folder / "base.safetensors"
    results = {
        ak.Inspection: ak.inspect(folder / "a"), ak.Comparison: ak.diff(folder / "a", folder / "b"),
        ak.NameMap: ak.names(base, folder / "a"), ak.Scan: ak.scan(folder / "a"),
        ak.AdapterReport: ak.report(folder / "a"), ak.Plan: ak.plan(base, folder / "a"),
    }  # fmt: skip
    for kind, found in results.items():
        assert type(found) is kind
        assert "\n" not in repr(found)
