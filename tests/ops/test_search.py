"""The search for the best combination: it finds what was planted, goes on after a kill, and repeats itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.errors import AdapterkitError, Malformed, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.searching import METHODS

PATHS = ("layers.0.q", "layers.1.q")


def lora(seed: int, rank: int = 4) -> ak.Adapter:
    random = np.random.default_rng(seed)
    factors = {
        path: {"A": from_numpy(random.normal(size=(rank, 24))), "B": from_numpy(random.normal(size=(32, rank)))}
        for path in PATHS
    }
    return ak.Adapter({ak.Target(path): (ak.METHODS["lora"](**each),) for path, each in factors.items()})


PAIR = [lora(1), lora(2)]


def change(adapter: ak.Adapter) -> np.ndarray:
    return np.concatenate([np.asarray(adapter.delta(path), np.float64).ravel() for path in PATHS])


def away_from(planted: np.ndarray):
    """The squared distance of a combined change from a planted one, relative to that."""
    return lambda adapter: float(((change(adapter) - planted) ** 2).sum() / (planted**2).sum())


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_planted_optimum_is_found_in_50_trials(method: str) -> None:
    words = {"density": 0.3, "rank": "fit"} if method == "ties" else {}
    planted = change(ak.ops.combine(PAIR, method, [1.2, 0.5], **words))
    if method == "linear":
        one, other = (change(adapter) for adapter in PAIR)
        np.testing.assert_allclose(planted, 1.2 * one + 0.5 * other, atol=1e-5)
    found = ak.search(PAIR, away_from(planted), methods=["linear", "ties", "tsv"], budget=50)
    assert len(found.trials) == 50
    assert found.best.loss is not None
    assert found.best.method == method
    assert found.best.loss < 0.03
    assert min(loss for loss in found.alone if loss is not None) > 3 * found.best.loss
    assert found.best.weights == pytest.approx((1.2, 0.5), abs=0.2)
    again = ak.ops.combine(PAIR, **found.arguments())
    assert away_from(planted)(again) == pytest.approx(found.best.loss)


def test_a_search_does_not_end_below_what_it_starts_from(tmp_path: Path) -> None:
    words = {"density": 0.7}
    row = change(ak.ops.combine(PAIR, "ties", [1.4, 1.4], rank="fit", **words))
    # Only that row has this loss, and nothing nearby tells of it.
    score = away_from(row)

    def needle(adapter: ak.Adapter) -> float:
        return 0.0 if score(adapter) < 1e-9 else 1.0 + score(adapter)

    start = [("ties", [1.4, 1.4], words)]
    found = ak.search(PAIR, needle, methods=["linear", "ties"], budget=12, start=start, trials=tmp_path / "trials")
    assert found.best.loss == 0.0
    assert (found.best.method, found.best.weights, dict(found.best.parameters)) == ("ties", (1.4, 1.4), words)
    assert ak.search(PAIR, needle, methods=["linear", "ties"], budget=12).best.loss > 0.9  # type: ignore[operator]
    with pytest.raises(UsageError, match="another search"):
        ak.search(PAIR, needle, methods=["linear", "ties"], budget=12, trials=tmp_path / "trials")
    for wrong, match in (
        (("tsv", [1, 1], {}), "tsv is not one of"),
        (("ties", [1], {}), "ties with the weights 1"),
        (("ties", [1, 9], {}), "ties with the weights 1 9"),
        (("ties", [1, 1], {"density": 7}), "7"),
        (("ties", [1, 1], {"dense": 1}), "dense"),
    ):
        with pytest.raises(UsageError, match=match):
            ak.search(PAIR, needle, methods=["linear", "ties"], budget=12, start=[wrong])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("stored")
    for number, adapter in enumerate(PAIR):
        ak.write(adapter, root / str(number), "peft")
    return [str(root / str(number)) for number in range(2)]


def started(stored: list[str], *start: object, **words: object) -> ak.Search:
    return ak.search(stored, away_from(change(PAIR[0])), start=start, **{"methods": ["linear", "ties"]} | words)  # type: ignore[arg-type]


def test_a_search_starts_from_a_recipe_or_a_method_by_name(stored: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "row.yml"
    models = [{"model": stored[1], "parameters": {"weight": 0.2}}, {"model": stored[0], "parameters": {"weight": 1.3}}]
    parameters = {"density": 0.6, "lambda": 0.8, "sign": "frequency"}
    recipe.write_text(json.dumps({"merge_method": "ties", "models": models, "parameters": parameters}))
    kept = tmp_path / "trials"
    found = started(stored, recipe, "karcher", methods=None, budget=12, trials=kept)
    # After the equal sum, each adapter alone, and five methods at weight 1.
    ours, named = found.trials[8:10]
    # The recipe names the adapters in the other order, and the parameter as mergekit does.
    assert (ours.method, ours.weights) == ("ties", (1.3, 0.2))
    assert dict(ours.parameters) == {"density": 0.6, "scale": 0.8, "sign": "frequency"}
    words = {"density": 0.6, "scale": 0.8, "sign": "frequency", "rank": "fit"}
    expected = away_from(change(PAIR[0]))(ak.ops.combine(PAIR, "ties", [1.3, 0.2], **words))
    assert ours.loss == pytest.approx(expected, rel=1e-5)
    assert (named.method, named.weights, dict(named.parameters)) == ("karcher", (1.0, 1.0), {})
    assert "sign=frequency" in ours.settings()
    # The file of trials holds words as well as numbers.
    assert started(stored, recipe, "karcher", methods=None, budget=12, trials=kept).trials == found.trials
    # What a search writes, another one starts from.
    recipe.write_text(found.recipe())
    again = started(stored, str(recipe), methods=None, budget=9)
    first = again.trials[3 + len({*METHODS, found.best.method})]
    assert first.record() | {"number": 0} == found.best.record() | {"number": 0}


def test_recipes_that_a_trial_cannot_repeat_are_refused(stored: list[str], tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in stored]
    whole = {"merge_method": "ties", "models": models}
    path = tmp_path / "row.yml"
    for more, match in (
        (
            {"models": models[:1]},
            "the recipe combines .*0, but the search combines .*Name the same adapters in the recipe",
        ),
        ({"models": [models[0], models[0]]}, "the recipe combines"),
        ({"seed": 7}, "seed 7, but the search has seed 0.*--seed 7"),
        ({"rank": 3}, "rank 3, but the search has rank fit.*--rank 3"),
        ({"compat": "mergekit"}, "cannot use the setting `compat`"),
        ({"dtype": "float32"}, "cannot use the setting `dtype`"),
        ({"models": [{"model": m["model"], "parameters": {"density": 0.5}} for m in models]}, "use the setting `each`"),
        ({"models": [{"model": m["model"], "parameters": {"weight": [0, 1]}} for m in models]}, "weight differs"),
        ({"parameters": {"density": {"*": 0.5}}}, "density differs between targets"),
        ({"parameters": {"dense": 1}}, "no parameter 'dense'"),
        ({"merge_method": "tsv"}, "tsv is not one of the methods to try.*--method"),
    ):
        path.write_text(json.dumps(whole | more))
        with pytest.raises(UsageError, match=match):
            started(stored, path, budget=10)
    with pytest.raises(UsageError, match=r"'karchr' is neither a method nor a recipe.*karcher.*--start \(start=\)"):
        started(stored, "karchr")
    for wrong in (("ties", 1.0, {}), ["ties"], ("ties", [1, 1])):
        with pytest.raises(UsageError, match=r"is not a tuple \(method, weights, parameters\).*as in"):
            started(stored, wrong)
    with pytest.raises(UsageError, match="nobody-of-that-name"):
        started(stored, "~nobody-of-that-name/row.yml")
    with pytest.raises(UsageError, match=r"start=\["):
        ak.search(stored, away_from(change(PAIR[0])), start="karcher")


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    score = away_from(change(ak.ops.add(PAIR, [0.3, 1.1])))
    whole = ak.search(PAIR, score, budget=12, seed=3)
    kept = tmp_path / "trials"
    calls = []

    def stopping(adapter: ak.Adapter) -> float:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return score(adapter)

    with pytest.raises(KeyboardInterrupt):
        ak.search(PAIR, stopping, budget=12, seed=3, trials=kept)
    kept.write_text(f'{kept.read_text()}{{"number": 9, "me')  # A kill in the middle of a line.
    on = ak.search(PAIR, score, budget=12, seed=3, trials=kept)
    assert on.resumed == 9
    assert on.trials == whole.trials
    done = ak.search(PAIR, lambda _: pytest.fail("scored again"), budget=12, seed=3, trials=kept)
    assert (done.resumed, done.trials) == (12, whole.trials)
    with pytest.raises(UsageError, match="another search"):
        ak.search(PAIR, score, budget=12, seed=4, trials=kept)
    assert ak.search(PAIR, score, budget=8, seed=4, trials=kept, overwrite=True).resumed == 0
    kept.write_text("not JSON\n")
    with pytest.raises(Malformed, match="does not contain trials of a search"):
        ak.search(PAIR, score, budget=12, seed=3, trials=kept)


@pytest.mark.parametrize("seed", [4295, 2**40, np.int64(5000)])
def test_any_seed_and_numbers_of_numpy_can_be_saved(seed: int, tmp_path: Path) -> None:
    """4295 times the factor of a trial's seed is above 32 bits, which is what Optuna takes."""
    words = {"methods": ["linear"], "budget": 6, "most": np.float32(1.5), "trials": tmp_path / "trials"}
    start = [("linear", [np.float32(1), 1], {})]
    found = ak.search((each for each in PAIR), away_from(change(PAIR[0])), seed=seed, start=start, **words)
    assert found.best.loss == pytest.approx(0, abs=1e-9)
    assert f"seed: {seed}\n" in found.recipe()


def test_a_first_line_that_was_cut_at_its_end_is_kept(tmp_path: Path) -> None:
    file, words = tmp_path / "trials", {"methods": ["linear"], "budget": 4}
    ak.search(PAIR, away_from(change(PAIR[0])), trials=file, **words)
    whole = file.read_text()
    file.write_text(whole.split("\n")[0])
    ak.search(PAIR, away_from(change(PAIR[0])), trials=file, **words)
    assert file.read_text() == whole


def test_trials_without_a_loss_are_passed_over() -> None:
    score = away_from(change(PAIR[0]))
    found = ak.search(PAIR, lambda a: float("nan") if score(a) < 0.5 else score(a), methods=["linear"], budget=8)
    assert {trial.loss is None for trial in found.trials} == {True, False}
    assert found.best.loss is not None
    assert "the loss is nan" in {trial.refused for trial in found.trials}
    with pytest.raises(UsageError, match="none of 8 trials"):
        ak.search(PAIR, lambda _: float("inf"), methods=["linear"], budget=8)


def test_what_a_search_refuses() -> None:
    def score(_: ak.Adapter) -> float:
        return 1.0

    for match, words in (
        ("at least two adapters", {"adapters": PAIR[:1]}),
        ("adapters 5 are not a list", {"adapters": 5}),
        ("budget 7.5 is not a whole number", {"budget": 7.5}),
        ("budget '9' is not a whole number", {"budget": "9"}),
        ("methods is empty", {"methods": []}),
        ("methods 'ties' are not a list of strings", {"methods": "ties"}),
        ("this search begins with.*Pass --budget 7", {"budget": 3}),
        ("'tise'.*ties", {"methods": ["tise"]}),
        ("lorahub learns from data", {"methods": ["lorahub"]}),
        ("slerp cannot combine 3", {"methods": ["slerp"], "adapters": [*PAIR, lora(3)]}),
        ("none of the methods to try has a parameter 'gamma'", {"tune": {"gamma": (0, 1)}}),
        ("bounds of scale are 2.0 and 1.0", {"methods": ["ties"], "tune": {"scale": (2, 1)}}),
        ("largest weight is 0.5", {"most": 0.5}),
        ("largest weight is inf", {"most": float("inf")}),
        (r"bounds of scale are \(1, 2, 3\), not two numbers", {"methods": ["ties"], "tune": {"scale": (1, 2, 3)}}),
        ("tune .* is not a dict from strings to lists of numbers", {"methods": ["ties"], "tune": {"scale": 5}}),
        ("cannot start from linear with the weights 1 2", {"start": [("linear", ["1", "2"], {})]}),
        ("the loss is None, not a number", {"data": lambda _: None}),
        ("rank is 0", {"rank": 0}),
        ("rank is 99, but the weights have at most rank 24", {"rank": 99}),
        ("the loss on texts requires a base", {"data": __file__}),
    ):
        with pytest.raises(AdapterkitError, match=match):
            ak.search(**{"adapters": PAIR, "data": score, "budget": 20} | words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer of letters, two adapters, and texts that the first was trained on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("search")
    letters = {letter: number for number, letter in enumerate("abcdefghij ")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    ids = torch.tensor([[number % 10 for number in range(20)]])
    for name in ("trained", "random"):
        handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=2, alpha=4), name=name, trainable=True)
        optimizer = torch.optim.Adam(handle.parameters(), lr=0.05)
        for _ in range(30 if name == "trained" else 0):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        if name == "random":
            with torch.no_grad():
                for parameter in handle.parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
        ak.write(handle.adapter(), root / name, "peft")
        handle.remove()
    (root / "texts.txt").write_text("abcdefghijabcdefghij\nbcdefghijabc\n")
    return root


def words(folder: Path, out: Path, budget: int = 8) -> list[str]:
    given = ["--base", folder / "base", "--data", folder / "texts.txt", "--budget", budget, "--method", "linear"]
    return [str(word) for word in ("search", folder / "trained", folder / "random", *given, "-o", out)]


def test_texts_are_scored_as_by_the_model_itself(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.yml"
    done = CliRunner().invoke(adapterkit, [*words(folder, out), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    model = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    ids = [[" abcdefghij".index(c) - 1 for c in text] for text in (folder / "texts.txt").read_text().split()]
    for name, loss in zip(("trained", "random"), record["alone"], strict=True):
        handle = ak.torch.inject(model, ak.read(folder / name))
        with torch.no_grad():
            each = [(float(model(torch.tensor([row]), labels=torch.tensor([row])).loss), len(row) - 1) for row in ids]
        handle.remove()
        assert loss == pytest.approx(sum(mean * count for mean, count in each) / sum(count for _, count in each))
    assert record["best"]["loss"] <= min(record["alone"])
    recipe = yaml.safe_load(out.read_text())
    assert [each["model"] for each in recipe["models"]] == [str(folder / "trained"), str(folder / "random")]
    again = CliRunner().invoke(adapterkit, words(folder, out))
    assert (again.exit_code, again.stdout.startswith("already done: ")) == (0, True), again.output
    made = CliRunner().invoke(adapterkit, ["combine", "--recipe", str(out), "-o", str(tmp_path / "made")])
    assert made.exit_code == 0, made.output


def test_the_command_starts_from_recipes_and_methods(folder: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "row.yml", tmp_path / "found.yml"
    names = [str(folder / name) for name in ("trained", "random")]
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(names, (1.8, 0.1), strict=True)]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    given = [*words(folder, out, 12)[:-4], "--start", str(recipe), "--start", "karcher", "-o", str(out)]
    refused = CliRunner().invoke(adapterkit, given)
    assert refused.exit_code != 0
    assert "--most allows larger weights" in refused.output
    done = CliRunner().invoke(adapterkit, [*given, "--most", "2", "--json"])
    assert done.exit_code == 0, done.output
    trials = json.loads(done.stdout)["trials"]
    assert ("linear", [1.8, 0.1]) in [(trial["method"], trial["weights"]) for trial in trials]
    assert ("karcher", [1.0, 1.0]) in [(trial["method"], trial["weights"]) for trial in trials]
    again = CliRunner().invoke(adapterkit, [*given, "--most", "2"])
    assert again.stdout.startswith("already done: "), again.output


def test_a_killed_command_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.yml"
    script = (
        "import os, sys; from adapterkit.searching import result\n"
        "from adapterkit.cli import main\n"
        "add = result.Journal.add\n"
        "def adding(self, trial):\n"
        "    add(self, trial)\n"
        "    if trial.number == 4: os.kill(os.getpid(), 9)\n"
        "result.Journal.add = adding\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", script, *words(folder, out)], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sorted(os.listdir(tmp_path)) == ["found.yml.trials"]
    done = CliRunner().invoke(adapterkit, [*words(folder, out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["resumed"] == 5
    assert len(json.loads(done.stdout)["trials"]) == 8
