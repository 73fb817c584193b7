"""Recipes in mergekit's words: each key that its examples use runs with the numbers it means, or is refused by name.

The recipes here are our own; they have the keys and shapes of those in mergekit's repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import record, run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.ops.recipes import recipe

LAYERS, SIZE, RANK = 5, 6, 2
MODULES = ("self_attn.q_proj", "mlp.up_proj")


def names() -> list[str]:
    return [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in MODULES]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """A base and three adapters as folders; the adapters' changes, dense."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(7)
    Path("base").mkdir()
    weights = {f"{name}.weight": rng.normal(size=(SIZE, SIZE)).astype("f4") for name in names()}
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    Path("base/config.json").write_text('{"model_type": "tiny"}')
    changes: dict[str, dict[str, np.ndarray]] = {}
    for adapter in ("one", "two", "three"):
        Path(adapter).mkdir()
        factors, changes[adapter] = {}, {}
        for name in names():
            A, B = rng.normal(size=(RANK, SIZE)).astype("f4"), rng.normal(size=(SIZE, RANK)).astype("f4")
            factors |= {f"base_model.model.{name}.lora_{x}.weight": f for x, f in (("A", A), ("B", B))}
            changes[adapter][name] = B.astype("f8") @ A.astype("f8")
        save_file(factors, f"{adapter}/adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "up_proj"]}
        Path(f"{adapter}/adapter_config.json").write_text(json.dumps(config))
    return changes


def combined(text: str, *words: str, command: str = "combine") -> dict[str, np.ndarray]:
    """The dense changes that a recipe makes."""
    Path("recipe.yml").write_text(text)
    done = run(
        command,
        "recipe.yml",
        "--compat",
        "mergekit",
        "-o",
        "made.safetensors",
        "--to",
        "adapterkit",
        "--overwrite",
        *words,
    )
    assert done.exit_code == 0, done.output
    made = ak.read("made.safetensors")
    return {name: np.asarray(made.delta(name)) for name in names()}


def gradient(values: list[float], layer: int) -> float:
    """mergekit's number at a layer: linear between the numbers of a list, first layer to last."""
    return float(np.interp(layer / (LAYERS - 1), np.linspace(0, 1, len(values)), values))


def slerp(x: np.ndarray, y: np.ndarray, t: float) -> np.ndarray:
    cosine = np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


@pytest.mark.parametrize("form", ["models", "slices", "two slices"])
def test_gradients_by_filter_in_models_and_in_slices(here: dict[str, dict[str, np.ndarray]], form: str) -> None:
    """slerp with a list over the layers for each kind of module; base_model says from where, not the order."""
    lists = {
        "models": "models:\n  - model: two\n  - model: one\n",
        "slices": f"""slices:
  - sources:
      - {{model: one, layer_range: [0, {LAYERS}]}}
      - {{model: two, layer_range: [0, {LAYERS}]}}
""",
        "two slices": f"""slices:
  - sources:
      - {{model: one, layer_range: [0, 2]}}
      - {{model: two, layer_range: [0, 2]}}
  - sources:
      - {{model: one, layer_range: [2, {LAYERS}]}}
      - {{model: two, layer_range: [2, {LAYERS}]}}
""",
    }
    found = combined(
        lists[form] + "merge_method: slerp\nbase_model: one\ndtype: float32\nparameters:\n  t:\n"
        "    - filter: self_attn\n      value: [0.1, 0.5, 0.9]\n    - filter: mlp\n      value: [0.9, 0.2]\n"
        "    - value: 0.5 # others\n"
    )
    for name in names():
        values, layer = [0.1, 0.5, 0.9] if "self_attn" in name else [0.9, 0.2], int(name.split(".")[2])
        depth = layer / (LAYERS - 1) if form != "two slices" else (0, 1, 0, 0.5, 1)[layer]  # inside its slice
        t = float(np.interp(depth, np.linspace(0, 1, len(values)), values))
        np.testing.assert_allclose(found[name], slerp(here["one"][name], here["two"][name], t), rtol=0, atol=2e-5)


PRECEDENCE = {
    "a filter of a model": (
        ("models:\n  - {model: one, parameters: {weight: [{filter: mlp, value: 0.5}]}}\n  - {model: two}\n"
        "parameters: {weight: 0.125}\n"),
        [(0.5, 0.125)] * 5, [(0.125, 0.125)] * 5,
    ),
    "a filter of a source": (
        ("slices:\n  - sources:\n      - model: one\n        layer_range: [0, 5]\n"
        "        parameters: {weight: [{filter: mlp, value: 2}]}\n      - {model: two, layer_range: [0, 5]}\n"
        "    parameters: {weight: [{filter: self_attn, value: 0.5}]}\nparameters: {weight: 0.25}\n"),
        [(2, 0.25)] * 5, [(0.5, 0.5)] * 5,
    ),
    "a slice without a value": (
        ("slices:\n  - sources: [{model: one, layer_range: [0, 3]}, {model: two, layer_range: [0, 3]}]\n"
        "    parameters: {weight: [0, 1]}\n"
        "  - sources: [{model: one, layer_range: [3, 5]}, {model: two, layer_range: [3, 5]}]\n"
        "parameters: {weight: 0.25}\n"),
        [(0, 0), (0.5, 0.5), (1, 1), (0.25, 0.25), (0.25, 0.25)], None,
    ),
    "a parameter of the method": (
        ("slices:\n  - sources: [{model: one, layer_range: [0, 4]}, {model: two, layer_range: [0, 4]}]\n"
        "    parameters: {lambda: 2}\n"
        "  - sources: [{model: one, layer_range: [4, 5]}, {model: two, layer_range: [4, 5]}]\n"
        "    parameters: {lambda: [3, 5]}\n"),
        [(2, 2), (2, 2), (2, 2), (2, 2), (5, 5)], None,
    ),
}  # fmt: skip
"""Case -> (recipe, both adapters' weights in the MLP of each layer, and in its attention if these differ).

The weights are those that mergekit's config and planner give.
"""


@pytest.mark.parametrize("case", PRECEDENCE)
def test_the_nearest_parameter_that_has_a_value_is_used(here: dict[str, dict[str, np.ndarray]], case: str) -> None:
    text, in_mlp, in_attention = PRECEDENCE[case]
    found = combined(f"merge_method: task_arithmetic\nbase_model: base\n{text}")
    for name in names():
        weights = in_mlp if "mlp" in name or in_attention is None else in_attention
        first, second = weights[int(name.split(".")[2])]
        expected = first * here["one"][name] + second * here["two"][name]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=3e-6, err_msg=name)


def test_a_slice_selects_layers_and_not_experts() -> None:
    """Expert 1 of layer 3 is in layer 3; and no value is made up for a target outside layers."""
    from adapterkit.core.adapter import Adapter, Target
    from adapterkit.errors import UsageError
    from adapterkit.io.lazy import from_numpy
    from adapterkit.methods import METHODS

    def ones(*paths: str) -> Adapter:
        factors = [from_numpy(np.ones(shape, "f4")) for shape in ((1, 4), (4, 1))]
        return Adapter({Target(path): (METHODS["lora"](A=factors[0], B=factors[1]),) for path in paths})

    sources = [{"model": each, "layer_range": [0, 2], "parameters": {"weight": 0.25}} for each in ("one", "two")]
    later = [{"model": each, "layer_range": [2, 5], "parameters": {"weight": 4}} for each in ("one", "two")]
    slices, shared = [{"sources": sources}, {"sources": later}], {"weight": 9}
    read = recipe({"merge_method": "task_arithmetic", "slices": slices, "parameters": shared})
    expert = "model.layers.3.mlp.experts.1.w1"
    made = ak.combine([ones(expert)] * 2, **read.options)
    assert np.asarray(made.delta(expert)).max() == 8
    with pytest.raises(UsageError, match="lm_head is not in a numbered layer"):
        read.check_layers([Target("lm_head")])


@pytest.mark.parametrize("top", [{}, {"base_model": None}, {"base_model": "base"}], ids=str)
def test_a_slice_without_a_base_has_the_base_of_the_recipe(top: dict[str, str | None]) -> None:
    """mergekit treats null like a missing key."""
    sources = [[{"model": "one", "layer_range": span}] for span in ([0, 2], [2, 5])]
    slices = [{"base_model": None, "sources": sources[0]}, {"sources": sources[1]}]
    assert recipe({"merge_method": "linear", "slices": slices, **top}) == recipe(
        {"merge_method": "linear", "slices": [{"sources": each} for each in sources], **top}
    )


def test_numbers_of_each_slice(here: dict[str, dict[str, np.ndarray]]) -> None:
    found = combined(
        f"""merge_method: task_arithmetic
base_model: somebody/a-base-that-is-not-here
slices:
  - sources:
      - {{model: one, layer_range: [0, 2], parameters: {{weight: 0.25}}}}
      - {{model: two, layer_range: [0, 2], parameters: {{weight: 1.0}}}}
  - parameters: {{weight: 0.75}}
    sources:
      - {{model: one, layer_range: [2, {LAYERS}]}}
      - {{model: two, layer_range: [2, {LAYERS}], parameters: {{weight: 0}}}}
"""
    )
    for name in names():
        first, second = (0.25, 1.0) if int(name.split(".")[2]) < 2 else (0.75, 0.0)
        expected = first * here["one"][name] + second * here["two"][name]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-6)


def ties(parts: list[tuple[np.ndarray, float, float]]) -> np.ndarray:
    """mergekit's TIES with normalize: true, from its description: trim by tensor, elect by sum, divide by weights."""
    trimmed = []
    for change, weight, density in parts:
        kept = max(1, int(density * change.size))
        order = np.argsort(-np.abs(change), axis=None)[:kept]
        mask = np.zeros(change.size, bool)
        mask[order] = True
        trimmed.append((np.where(mask.reshape(change.shape), change, 0) * weight, weight))
    sign = np.where(sum(change for change, _ in trimmed) >= 0, 1, -1)
    agree = [(np.sign(change) == sign, change, weight) for change, weight in trimmed]
    total = sum(np.where(mask, change, 0) for mask, change, _ in agree)
    share = sum(mask * weight for mask, _, weight in agree)
    return total / np.where(share == 0, 1, share)


def test_a_gradient_of_density_and_weights_by_filter(here: dict[str, dict[str, np.ndarray]]) -> None:
    found = combined(
        """models:
  - model: base+one
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: base+two
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: base+three
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float32
"""
    )
    for name in names():
        layer = int(name.split(".")[2])
        third = 0.5 if "mlp" in name else 0.0
        expected = ties([
            (here["one"][name], 1.0, gradient([1, 0.7, 0.1], layer)),
            (here["two"][name], gradient([0, 0.3, 0.7, 1], layer), 0.5), (here["three"][name], third, 0.33),
        ])  # fmt: skip
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-6, err_msg=name)


def test_a_list_ends_at_the_last_layer_of_the_base(here: dict[str, dict[str, np.ndarray]]) -> None:
    """mergekit counts the layers of the base, also if the adapters change only the first ones."""
    for adapter in ("one", "two"):
        file = Path(adapter, "adapter_model.safetensors")
        save_file({key: array for key, array in load_file(file).items() if f".{LAYERS - 1}." not in key}, file)
    models = [{"model": "one", "parameters": {"weight": [0, 1]}}, {"model": "two", "parameters": {"weight": [2, 0, 1]}}]
    content = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    Path("recipe.yml").write_text(json.dumps(content))
    for words in (["combine", "recipe.yml"], ["merge", "base", "--recipe", "recipe.yml"]):
        assert run(*words, "-o", words[0]).exit_code == 0
    made, merged = ak.read("combine"), load_file("merge/model.safetensors")
    for name in [name for name in names() if f".{LAYERS - 1}." not in name]:
        layer = int(name.split(".")[2])
        expected = gradient([0, 1], layer) * here["one"][name] + gradient([2, 0, 1], layer) * here["two"][name]
        np.testing.assert_allclose(np.asarray(made.delta(name)), expected, rtol=0, atol=3e-6, err_msg=name)
        change = merged[f"{name}.weight"] - load_file("base/model.safetensors")[f"{name}.weight"]
        np.testing.assert_allclose(change, expected, rtol=0, atol=3e-6, err_msg=name)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("asked", [{"weights": [[0, 1], {"*.mlp.*": [0, 1], "*": 1}]}, {"method": "lines"}])
def test_a_list_without_a_base_says_where_it_ends(asked: dict[str, Any]) -> None:
    file = Path("one", "adapter_model.safetensors")
    save_file({key: array for key, array in load_file(file).items() if f".{LAYERS - 1}." not in key}, file)
    told = ak.combine(["one", "one"], **asked).recipe[-1].args.get("warnings", [])
    assert told
    assert all(f"ends at layer {LAYERS - 2}" in text and "--base" in text for text in told)
    for known in ({"base": "base"}, {"method": "linear", "weights": [0.5, {"*.mlp.*": 1, "*": [2, 2]}]}):
        assert "warnings" not in ak.combine(["one", "one"], **asked | known).recipe[-1].args


FILTERS = {
    "no target": ("[{filter: lm_head, value: 3}, {filter: mlp, value: 2}, {value: 0.5}]", 2, 0.5),
    "the name of a weight": ("[{filter: up_proj.weight, value: 2}, {value: 0.5}]", 2, 0.5),
    "a part of such a name": ("[{filter: attn.q_proj.w, value: 2}, {value: 0.5}]", 0.5, 2),
    "all weights": ("[{filter: weight, value: 2}, {value: 0.5}]", 2, 2),
    "a single one": ("{filter: mlp, value: 2}", 2, 1),
    "a value for all": ("{value: 2}", 2, 2),
    "the same filter twice": ("[{filter: mlp, value: 2}, {filter: mlp, value: 3}, {value: 0.5}]", 2, 0.5),
}
"""Case -> (weight in the recipe, weights in the MLP and in the attention as mergekit's `evaluate_setting` gives)."""


@pytest.mark.parametrize("case", FILTERS)
def test_filters_match_as_in_mergekit(here: dict[str, dict[str, np.ndarray]], case: str) -> None:
    weight, in_mlp, in_attention = FILTERS[case]
    models = f"models:\n  - {{model: one, parameters: {{weight: {weight}}}}}\n  - {{model: two}}\n"
    found = combined(f"merge_method: task_arithmetic\nparameters: {{weight: 1}}\n{models}")
    for name in names():
        expected = (in_mlp if "mlp" in name else in_attention) * here["one"][name] + here["two"][name]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=3e-6, err_msg=name)
    warnings = ak.read("made.safetensors").recipe[-1].args.get("warnings", [])
    assert warnings == (["weights: the filter 'lm_head' matches no target"] if case == "no target" else [])


def test_the_base_among_the_models(here: dict[str, dict[str, np.ndarray]]) -> None:
    """Of differences from the base its own is nothing; an average counts it, and is refused."""
    text = "models:\n  - model: base\n  - model: one\n    parameters: {weight: 0.5}\nbase_model: base\nmerge_method: "
    found = combined(text + "task_arithmetic\n")
    for name in names():
        np.testing.assert_allclose(found[name], 0.5 * here["one"][name], atol=2e-6)
    Path("recipe.yml").write_text(text + "linear\n")
    done = run("combine", "recipe.yml", "-o", "out")
    assert (done.exit_code, "base_model: models contains the base" in done.stderr) == (2, True)
    fused = combined("models:\n  - model: base\n  - model: one\nmerge_method: arcee_fusion\nbase_model: base\n")
    assert any(np.abs(fused[name]).max() for name in names())


def test_merge_by_a_recipe_is_combine_and_merge(here: dict[str, dict[str, np.ndarray]]) -> None:
    Path("recipe.yml").write_text(
        "models:\n  - model: one\n    parameters: {weight: 0.5}\n  - model: two\n    parameters: {weight: 0.25}\n"
        "merge_method: task_arithmetic\nbase_model: base\ntokenizer_source: base\nchat_template: chatml\n"
    )
    told = record("merge", "--recipe", "recipe.yml", "-o", "out")
    assert any("chat_template is not used" in warning for warning in told["warnings"])  # type: ignore[union-attr]
    merged, base = load_file("out/model.safetensors"), load_file("base/model.safetensors")
    for name in names():
        expected = base[f"{name}.weight"] + 0.5 * here["one"][name] + 0.25 * here["two"][name]
        np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)
    assert record("merge", "base", "--recipe", "recipe.yml", "-o", "out")["already_done"] is True
    told = record("combine", "recipe.yml", "-o", "both")
    assert sum("tokenizer" in warning or "chat_template" in warning for warning in told["warnings"]) == 2  # type: ignore[union-attr]
    shared = Path("recipe.yml").read_text().replace("base_model: base\n", "")
    Path("recipe.yml").write_text(shared)
    assert run("merge", "--recipe", "recipe.yml", "-o", "new").exit_code == 2
    assert run("merge", "base", "--recipe", "recipe.yml", "-o", "new").exit_code == 0
    assert run("merge", "base", "-o", "none").exit_code == 2


REFUSED = {
    "layers in other places": (
        ("slices:\n  - sources: [{model: one, layer_range: [0, 3]}]\n  - sources: [{model: two, layer_range: [2, 5]}]\n"
        "merge_method: passthrough\n"),
        "slices[1].sources[0].layer_range",
        "the same layer_range",
    ),
    "two ranges in one slice": (
        ("slices:\n  - sources: [{model: one, layer_range: [0, 3]}, {model: two, layer_range: [0, 2]}]\n"
        "merge_method: linear\n"),
        "slices[0].sources[1].layer_range",
        "is [0, 2], but the first source of this slice has [0, 3]",
    ),
    "other models in a slice": (
        ("slices:\n  - sources: [{model: one, layer_range: [0, 3]}]\n  - sources: [{model: two, layer_range: [3, 5]}]\n"
        "merge_method: linear\n"),
        "slices[1].sources",
        "weight to 0",
    ),
    "layers that are left out": (
        ("slices:\n  - sources: [{model: one, layer_range: [0, 3]}, {model: two, layer_range: [0, 3]}]\n"
        "merge_method: linear\n"),
        "slices",
        "at 4 or higher",
    ),
    "a slice's parameters": (
        "slices:\n  - sources: [{model: one, layer_range: [0, 5]}]\n    parameters: 5\nmerge_method: linear\n",
        "slices[0].parameters", "density",
    ),
    "bases of the slices": (
        ("slices:\n  - {base_model: a, sources: [{model: one, layer_range: [0, 3]}]}\n"
        "  - {base_model: b, sources: [{model: one, layer_range: [3, 5]}]}\nmerge_method: linear\n"),
        "slices[1].base_model", "as the recipe's base_model",
    ),
    "no range": (
        "slices:\n  - sources: [{model: one, layer_range: 3}]\nmerge_method: linear\n", "layer_range", "[0, 32]",
    ),
    "both lists": (
        "models: [{model: one}]\nslices:\n  - sources: [{model: one, layer_range: [0, 5]}]\nmerge_method: linear\n",
        "slices", "Remove one of them",
    ),
    "whole models": ("models: [{model: base}, {model: one}]\nmerge_method: linear\n", "models[0].model",
                     "extract base"),
    "another base": (
        "models: [{model: base+one}, {model: other+two}]\nmerge_method: linear\n", "models[1]", "Name the same base",
    ),
    "a base with an adapter in it": (
        "models: [{model: one}, {model: two}]\nmerge_method: ties\nbase_model: base+three\n", "base_model",
        "adapterkit merge base three",
    ),
    "joined tokenizers": (
        "models: [{model: one}, {model: two}]\nmerge_method: linear\ntokenizer_source: union\n", "tokenizer_source",
        "--vocab grow",
    ),
    "made up tokens": (
        ("models: [{model: one}, {model: two}]\nmerge_method: linear\n"
        "tokenizer: {source: base, tokens: {a: {source: base}}}\n"),
        "tokenizer.tokens", "Remove tokens",
    ),
    "a tokenizer without a key": (
        "models: [{model: one}, {model: two}]\nmerge_method: linear\ntokenizer: base\n", "tokenizer",
        "adapterkit combine --help",
    ),
    "parts apart": ("modules: {text: {models: [{model: one}]}}\nmerge_method: linear\n", "modules",
                    "one recipe for each"),
    "experts": ("base_model: base\ngate_mode: random\nexperts: []\n", "experts", "mergekit-moe"),
    "a search": ("genome: {models: [one]}\ntasks: []\n", "genome", "Write the recipe itself"),
    "not there": ("models: [{model: none}, {model: one}]\nmerge_method: linear\n", "models[0].model", "Nearest: one"),
}  # fmt: skip
"""Case -> (recipe, the key that the error names, words of its cure)."""


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", REFUSED)
def test_other_requests_are_refused_by_their_key(case: str) -> None:
    text, key, cure = REFUSED[case]
    Path("recipe.yml").write_text(text)
    done = run("combine", "recipe.yml", "-o", "out", "--to", "adapterkit")
    assert done.exit_code in (2, 6), done.output
    assert key in done.stderr
    assert cure in done.stderr
    assert not Path("out").exists()
