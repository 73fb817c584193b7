"""combine, list combine and merge --method from the command line, and recipes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.errors import Malformed, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA
from adapterkit.ops import COMBINERS
from adapterkit.ops.recipes import read_recipe, recipe


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for name, seed in (("one", 10), ("two", 20))]


def write_adapter(folder: Path, seed: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(seed)
    key = "base_model.model.layers.{}.q.lora_{}.weight"
    tensors = {
        key.format(i, side): random.normal(size=shape).astype(np.float32)
        for i in (0, 1) for side, shape in (("A", (2, 6)), ("B", (8, 2)))
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    weights = {f"layers.{i}.q.weight": np.ones((8, 6), np.float32) for i in (0, 1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def delta(source: object, layer: int = 0) -> np.ndarray:
    return ak.read(str(source)).delta(f"layers.{layer}.q").numpy()


def test_combine_two_in_their_own_format(adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = record("combine", *adapters, "--weight", 1, "--weight", -0.5, "-o", out)
    assert (found["method"], found["to"], found["weights"]) == ("linear", "peft", [1.0, -0.5])
    assert np.abs(delta(out) - (delta(adapters[0]) - 0.5 * delta(adapters[1]))).max() < 1e-5


def test_combine_by_a_method_with_settings(adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    words = ["--method", "ties", "--set", "density=0.5", "--set", "scope=tensor", "--to", "adapterkit", "-o", out]
    found = record("combine", *adapters, *words)
    assert (found["parameters"]["density"], found["parameters"]["scope"]) == (0.5, "tensor")
    expected = ak.ops.combine(adapters, "ties", density=0.5, scope="tensor")
    assert (delta(out) == expected.delta("layers.0.q").numpy()).all()
    step = ak.read(out).recipe[-1]
    assert (step.op, step.args["method"]) == ("combine", "ties")
    assert len(step.args["of"]) == 2
    shown = run("combine", *adapters, *words[:-1], tmp_path / "again.safetensors")
    assert shown.exit_code == 0
    assert "density" in shown.stdout
    assert "adapterkit" in shown.stdout


def test_combine_by_a_recipe(adapters: list[Path], tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(f"""
merge_method: knots_ties
models:
  - model: {adapters[0]}
    parameters: {{weight: [1.0, 2.0], density: 0.4}}
  - adapter: {adapters[1]}
    parameters:
      weight:
        - {{filter: layers.0, value: 0.5}}
        - value: 1.5
parameters: {{density: 0.6, lambda: 0.7, normalize: true, scope: tensor}}
""")
    record("combine", "--recipe", file, "-o", out)
    expected = ak.ops.combine(
        adapters, "knots", [[1.0, 2.0], {"*layers.0*": 0.5, "*": 1.5}], then="ties", density=0.6, scale=0.7,
        denominator="weights", scope="tensor", each=[{"density": 0.4}, {}],
    )  # fmt: skip
    for layer in (0, 1):
        assert np.abs(delta(out, layer) - expected.delta(f"layers.{layer}.q").numpy()).max() < 1e-5


def test_a_peers_recipe_by_its_own_names(adapters: list[Path], tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.safetensors"
    models = [{"model": str(path), "parameters": {"weight": 1.0, "density": 0.5}} for path in adapters]
    file.write_text(json.dumps({"merge_method": "ties", "models": models, "compat": "mergekit"}))
    found = record("combine", "--recipe", file, "--to", "adapterkit", "-o", out)
    assert found["parameters"]["denominator"] == "weights"
    expected = ak.ops.combine(adapters, "ties", compat="mergekit", each=[{"density": 0.5}] * 2)
    assert (delta(out) == expected.delta("layers.0.q").numpy()).all()


FROM_THE_COMMAND_LINE = sorted(name for name in COMBINERS if COMBINERS[name].data is None)


def in_format(name: str, folder: Path, seed: int) -> Path:
    """An adapter of two targets that all these formats have names for."""
    random = np.random.default_rng(seed)
    model = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj" if name == "kohya" else "layers.{}.q"
    made = ak.Adapter({
        Target(model.format(i)): (
            LoRA(**{side: from_numpy(random.normal(size=shape).astype(np.float32))
                    for side, shape in (("A", (2, 6)), ("B", (8, 2)))}),
        ) for i in (0, 1)
    })  # fmt: skip
    out = folder / (f"{seed}" if name == "peft" else f"{seed}.safetensors")
    ak.write(made, out, name)
    return out


@pytest.mark.parametrize("name", ["peft", "kohya", "adapterkit"])
@pytest.mark.parametrize("method", FROM_THE_COMMAND_LINE)
def test_every_method_writes_the_format_of_its_inputs(method: str, name: str, base: Path, tmp_path: Path) -> None:
    """Without a rank, too: where the format has no dense update the result is cut, and the error is measured."""
    cls = COMBINERS[method]
    sources = [in_format(name, tmp_path, seed) for seed in range(1, (cls.takes[1] or 2) + 1)]
    options = {"base": str(base)} if cls.based and name != "kohya" else {}
    if cls.based and name == "kohya":
        options = {"base": str(clip(tmp_path))}
    out = tmp_path / ("out" if name == "peft" else "out.safetensors")
    words = [*sources, "--method", method, *(["--base", options["base"]] if options else [])]
    found = record("combine", *words, "-o", out)
    assert found["to"] == name
    made, exact = ak.read(out), ak.ops.combine(sources, method, **options)
    lost, whole = 0.0, 0.0
    for target in exact.updates:
        D, E = (adapter.delta(target.path).numpy().astype(np.float64) for adapter in (made, exact))
        lost, whole = lost + ((D - E) ** 2).sum(), whole + (E**2).sum()
        if name == "adapterkit":
            assert np.abs(D - E).max() <= 1e-6 * np.abs(E).max()
    told = found["relative_error"] or 0.0
    assert abs(np.sqrt(lost / whole) - told) < 1e-5
    assert bool(found["cuts"]) == (name != "adapterkit" and cls().dense)


def clip(folder: Path) -> Path:
    """A base with the targets of the kohya adapter."""
    place = folder / "clip"
    place.mkdir()
    names = [f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    save_file({name: np.ones((8, 6), np.float32) for name in names}, place / "model.safetensors", {"format": "pt"})
    return place


def test_what_a_format_cannot_hold_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    sources = []
    for seed in (1, 2):
        (update,) = ak.read(in_format("kohya", tmp_path, seed)).updates[target]
        biased = ak.Adapter({target: (update.replace(bias=from_numpy(np.ones(8, np.float32))),)})
        ak.write(biased, tmp_path / f"biased{seed}.safetensors")
        sources.append(tmp_path / f"biased{seed}.safetensors")
    monkeypatch.setattr("adapterkit.ops.combining.Evaluation.updates", lambda *_: pytest.fail("it was computed"))
    result = run("combine", *sources, "--method", "ties", "--to", "kohya", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 3
    assert len(result.stderr.strip().splitlines()) == 2  # What is wrong, and what to type.
    assert "kohya cannot hold the result of ties" in result.stderr
    assert "--to adapterkit" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_a_cut_is_said_in_words(adapters: list[Path], tmp_path: Path) -> None:
    shown = run("combine", *adapters, "--method", "ties", "-o", tmp_path / "out")
    assert "cut to rank 2 at 2 targets: relative error over all targets 0." in shown.stdout
    assert "a higher --rank keeps more" in shown.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "tiess"], "ties"),
        (["--method", "ties", "--set", "densty=1"], "density"),
        (["--method", "ties", "--set", "density"], "NAME=VALUE"),
        (["--method", "ties", "--set", "weights=1"], "NAME=VALUE"),
        (["--weight", "1"], "1 weights for 2 adapters"),
        (["--rank", "9"], "rank is 9"),
        (["--method", "regmean"], "needs data"),
        (["--method", "ties", "--compat", "kohya"], "kohya"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    adapters: list[Path], tmp_path: Path, words: list[str], said: str
) -> None:
    result = run("combine", *adapters, *words, "-o", tmp_path / "out")
    assert result.exit_code in (2, 3)
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_leave_nothing_behind(adapters: list[Path], tmp_path: Path) -> None:
    file = adapters[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: values * np.float32("nan") for name, values in tensors.items()}, file, {"format": "pt"})
    for method in ("linear", "ties", "tsv"):
        result = run("combine", *adapters, "--method", method, "--to", "adapterkit", "-o", tmp_path / "out.safetensors")
        assert result.exit_code == 2
        assert "NaN" in result.stderr
        assert not (tmp_path / "out.safetensors").exists()


def test_a_recipe_or_words_but_not_both(adapters: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"merge_method: linear\nmodels: [{{model: {adapters[0]}}}]\n")
    assert run("combine", adapters[0], "--recipe", file, "-o", tmp_path / "out").exit_code == 2
    assert run("combine", "-o", tmp_path / "out").exit_code == 2


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("merge_method: ties\nmodels: [{model: a}]\nmerge_metod: x", UsageError, "merge_method"),
        ("merge_method: ties\nmodels: [{model: a, parameter: {}}]", UsageError, "parameters"),
        ("merge_method: ties\nmodels: [{model: a}]\nslices: []", UsageError, "contradict each other"),
        ("merge_method: ties", Malformed, "list of models"),
        ("models: [{model: a}]", Malformed, "merge_method"),
        ("merge_method: ties\nmodels: [{model: a, adapter: b}]", Malformed, "one path"),
        ("merge_method: ties\nmodels: [a]", Malformed, "a mapping"),
        ("a: &a [1]\nb: *a", Malformed, "aliases"),
        ("merge_method: ties\nmerge_method: linear", Malformed, "twice"),
        ("merge_method: [", Malformed, "not plain YAML"),
        ("merge_method: !!python/object:os.system x", Malformed, "not plain YAML"),
        ("- 1", Malformed, "a mapping"),
        ("merge_method: ties\nmodels: [{model: a}]\nparameters: {report: x}", UsageError, "report is not a parameter"),
        ("merge_method: model_stock\nmodels: [{model: a}]\nparameters: {filter_wise: true}", UsageError, "filter_wise"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, error: type[Exception], said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(error, match=said):
        read_recipe(file)


def test_switches_of_a_recipe_are_the_methods_own_where_it_has_them() -> None:
    def options(method: str) -> dict[str, object]:
        return dict(
            recipe({"merge_method": method, "models": [{"model": "a"}], "parameters": {"normalize": False}}).options
        )

    assert options("linear")["normalize"] is False
    assert options("ties")["denominator"] == "none"


def test_list_combine_shows_every_method_and_its_parameters() -> None:
    found = {entry["name"]: entry for entry in record("list", "combine")["combine"]}
    assert set(found) == set(COMBINERS)
    assert found["ties"]["parameters"]["density"] == 0.2
    assert found["ties"]["among"]["scope"] == ["model", "tensor"]
    assert found["knots"]["then"] == "ties"
    assert found["cat"]["data"]
    shown = run("list", "combine").stdout
    assert "density=0.2" in shown
    assert "TSV-M" in shown


def test_merge_combines_on_the_fly(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out, combined = tmp_path / "merged", tmp_path / "combined.safetensors"
    words = ["--method", "ties", "--set", "density=0.5", "--weight", 1, "--weight", 2]
    found = record("merge", base, *adapters, *words, "-o", out, "--verify")
    assert found["verification"]["ok"]
    record("combine", *adapters, *words, "--to", "adapterkit", "-o", combined)
    merged = load_file(out / "model.safetensors")
    for layer in (0, 1):
        expected = 1 + delta(combined, layer).astype(np.float64)
        assert np.abs(merged[f"layers.{layer}.q.weight"] - expected).max() < 1e-6


def test_merge_gives_its_base_to_methods_that_look_at_it(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    record("merge", base, adapters[0], "--method", "arcee_fusion", "-o", tmp_path / "out")
    merged, D = load_file(tmp_path / "out" / "model.safetensors")["layers.0.q.weight"], delta(adapters[0])
    kept = merged != 1
    assert 0 < kept.sum() < kept.size / 2
    assert np.abs(merged[kept] - 1 - D[kept]).max() < 1e-6
    refused = run("combine", adapters[0], "--method", "arcee_fusion", "-o", tmp_path / "none")
    assert refused.exit_code == 2
    assert "Pass --base" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_merge_of_a_sum_is_the_merge_of_all(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    weights = ["--weight", 0.5, "--weight", -1.5]
    record("merge", base, *adapters, *weights, "-o", tmp_path / "all")
    record("merge", base, *adapters, *weights, "--method", "linear", "-o", tmp_path / "sum")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "sum"))
    assert all(np.abs(one[name] - other[name]).max() < 1e-6 for name in one)


def test_settings_without_a_method_are_no_merge(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    result = run("merge", base, *adapters, "--set", "density=0.5", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_sum_of_other_methods_is_cut_to_a_rank(tmp_path: Path) -> None:
    """A LoRA and a DoRA at their base: the best LoRA of that rank of the sum of both changes."""
    data = Path(ak.__file__).parent / "demo" / "data"
    words = ["combine", data / "rotated", data / "negative", "--method", "linear", "--base", data / "base"]
    done = run(*words, "--rank", "8", "-o", tmp_path / "mixed")
    assert done.exit_code == 0, done.output
    one, other, mixed = (ak.read(place) for place in (data / "rotated", data / "negative", tmp_path / "mixed"))
    name = "layers.0.mlp.up_proj"
    D = sum(np.asarray(each.delta(name, base=data / "base"), "f8") for each in (one, other))
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    expected = (U[:, :8] * S[:8]) @ Vh[:8]
    assert np.abs(np.asarray(mixed.delta(name)) - expected).max() < 1e-5 * np.abs(expected).max()
