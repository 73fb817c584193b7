"""What combiners learn from texts, against torch's own gradients and hooks on merged copies of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.numpy import load_file

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.errors import Unsupported, UsageError
from adapterkit.ops.combiners import COMBINERS
from tests.shared.gated_models import lora, make

LETTERS = "abcdefghijklmnopqrstuvwxyz "
TEXTS = ["the cat sat on the mat", "a dog ran home", "we like tea and cake a lot", "it rains"]
LEARNING = [name for name, cls in COMBINERS.items() if cls.learns is not None]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({letter: at for at, letter in enumerate(LETTERS)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=" ").save_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp(request.param)
    base = make(request.param, root / "base")
    tokenizer(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapters = []
    for seed in (1, 2):
        ak.write(lora(request.param, model, seed=seed, rank=2 + seed), root / f"lora{seed}", "peft")
        adapters.append(root / f"lora{seed}")
    for at in range(2):
        (root / f"{at}.txt").write_text("\n".join(TEXTS[at::2]) + "\n", "utf-8")
    return {"base": base, "model": model, "adapters": adapters, "texts": [root / "0.txt", root / "1.txt"], "root": root}


def ids_of(lines: list[str]) -> list[torch.Tensor]:
    return [torch.tensor([[LETTERS.index(letter) for letter in line]]) for line in lines]


def merged(given: dict[str, Any], adapter: ak.Adapter) -> Any:
    """Return a copy of the model with the change added to its weights."""
    model = copy.deepcopy(given["model"]).float()
    for target in adapter.updates:
        module = model.get_submodule(target.path)
        change = torch.from_numpy(np.asarray(adapter.delta(target.path)))
        with torch.no_grad():
            module.weight += change.T if target.layout.startswith("in") else change
    return model


def in_out(target: ak.Target, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.T if target.layout.startswith("in") else gradient


def losses(model: Any, lines: list[str], entropy: bool = False) -> torch.Tensor:
    """Return the mean over all predicted tokens."""
    total, count = torch.zeros(()), 0
    for ids in ids_of(lines):
        logits = model(input_ids=ids).logits[0, :-1]
        logs = torch.log_softmax(logits, -1)
        each = -(logs.exp() * logs).sum(-1) if entropy else -logs[torch.arange(len(logs)), ids[0, 1:]]
        total, count = total + each.sum(), count + len(each)
    return total / count


def data_of(given: dict[str, Any], **more: Any) -> ak.TextData:
    return ak.TextData(given["base"], given["adapters"], given["texts"], device="cpu", **more)


def combined(given: dict[str, Any]) -> ak.Adapter:
    return ak.combine(given["adapters"], "linear", [0.7, 0.4], base=given["base"])


@pytest.mark.parametrize("kind", ["loss_and_gradients", "entropy_and_gradients"])
def test_losses_and_gradients_are_those_of_a_merged_model(given: dict[str, Any], kind: str) -> None:
    adapter = combined(given)
    found, gradients = getattr(data_of(given), kind)(adapter)
    model = merged(given, adapter)
    expected = losses(model, TEXTS, entropy=kind.startswith("entropy"))
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    assert set(gradients) == {str(target) for target in adapter.updates}
    for target in adapter.updates:
        torch.testing.assert_close(
            gradients[str(target)], in_out(target, model.get_submodule(target.path).weight.grad), rtol=2e-4, atol=1e-6
        )


def test_the_entropies_of_tasks_have_one_gradient(given: dict[str, Any]) -> None:
    adapter, data = combined(given), data_of(given)

    def together(now: Any, alone: Any) -> Any:
        return (now[0] - alone[0]) ** 2 + 3 * (now[1] - alone[1]).exp()

    found, gradients = data.entropies_together(adapter, together)
    with torch.no_grad():
        alone = [float(losses(merged(given, own), TEXTS[at::2], entropy=True)) for at, own in enumerate(data.adapters)]
    model = merged(given, adapter)
    expected = together([losses(model, TEXTS[at::2], entropy=True) for at in range(2)], alone)
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    for target in adapter.updates:
        wanted = in_out(target, model.get_submodule(target.path).weight.grad)
        torch.testing.assert_close(gradients[str(target)], wanted, rtol=1e-3, atol=1e-5)


def test_inputs_are_those_of_a_merged_model(given: dict[str, Any]) -> None:
    data = data_of(given)
    for position, own in enumerate(data.adapters):
        model = merged(given, own)
        for target in own.updates:
            rows: list[torch.Tensor] = []
            handle = model.get_submodule(target.path).register_forward_pre_hook(
                lambda _, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]))
            )
            with torch.no_grad():
                losses(model, TEXTS[position::2])
            handle.remove()
            np.testing.assert_allclose(data.inputs(position, str(target)), torch.cat(rows).numpy(), atol=1e-5)


def test_later_targets_get_the_inputs_of_the_merged_earlier_ones(given: dict[str, Any]) -> None:
    data, whole = data_of(given), combined(given)
    own = data.adapters[1]
    targets = list(own.updates)
    done = ak.Adapter({target: whole.updates[target] for target in targets[:3]}, whole.base)
    mixed = ak.Adapter({t: done.updates.get(t, own.updates[t]) for t in targets}, own.base)
    model, rows = merged(given, mixed), []
    model.get_submodule(targets[-1].path).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        losses(model, TEXTS[1::2])
    np.testing.assert_allclose(data.inputs_so_far(1, str(targets[-1]), done), torch.cat(rows).numpy(), atol=1e-5)


def test_gradients_of_the_spaces_are_slopes(given: dict[str, Any]) -> None:
    """NSC's loss, recomputed whole, falls along its gradient as much as the gradient says."""
    seen: list[tuple[ak.Adapter, Any]] = []
    data = data_of(given)

    def score(adapter: ak.Adapter, spaces: Any) -> Any:
        seen.append((adapter, spaces))
        return data.inputs_and_spaces(adapter, spaces)

    ak.combine(given["adapters"], "nsc", base=given["base"], data=score, blocks=1.0, steps=1)
    adapter, spaces = seen[0]
    found, gradients = data.inputs_and_spaces(adapter, spaces)

    def whole(model: Any) -> torch.Tensor:
        inputs: dict[tuple[int, str], torch.Tensor] = {}
        for task in range(2):
            rows: dict[str, list[torch.Tensor]] = {path: [] for path in spaces.paths}
            handles = [
                model.get_submodule(path).register_forward_pre_hook(
                    lambda _, args, seen=rows[path]: seen.append(args[0][0])
                )
                for path in spaces.paths
            ]
            losses(model, TEXTS[task::2])
            inputs |= {(task, path): torch.cat(rows[path]) for path in spaces.paths}
            for handle in handles:
                handle.remove()
        return spaces.loss(inputs)

    model = merged(given, adapter)
    expected = whole(model)
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    for target in adapter.updates:
        weight = model.get_submodule(target.path).weight
        if weight.grad is not None and str(target) in gradients:
            torch.testing.assert_close(gradients[str(target)], in_out(target, weight.grad), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", LEARNING)
def test_every_method_that_learns_runs_as_typed(given: dict[str, Any], method: str, tmp_path: Path) -> None:
    command = ["combine", *map(str, given["adapters"]), "--method", method, "--base", str(given["base"]), "-q"]
    for text in given["texts"]:
        command += ["--data", str(text)]
    if "steps" in COMBINERS[method].parameters():
        command += ["--set", "steps=3"]
    if method == "lorahub":  # The formula sums factors, which must have one rank.
        command += ["--set", "apart=false"]
    ran = CliRunner().invoke(adapterkit, [*command, "-o", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    values = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert values
    assert all(np.isfinite(each).all() for each in values.values())


def test_the_model_is_left_as_it_was(given: dict[str, Any]) -> None:
    data = data_of(given)
    before = {name: (each.clone(), each.requires_grad) for name, each in data.base.model.named_parameters()}
    for name in ("loss_and_gradients", "loss"):
        getattr(data, name)(combined(given))
    for name, each in data.base.model.named_parameters():
        assert torch.equal(each, before[name][0])
        assert each.requires_grad == before[name][1]
        assert each.grad is None


def test_what_does_not_fit_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 files of texts for 2 adapters"):
        ak.TextData(given["base"], given["adapters"], [*given["texts"], given["texts"][0]])
    with pytest.raises(UsageError, match="ties does not use data"):
        data_of(given).learned_by("ties")
    base = make("bert", tmp_path / "bert")
    tokenizer(base)
    model = transformers.BertForMaskedLM.from_pretrained(base)
    ak.write(lora("bert", model), tmp_path / "lora", "peft")
    data = ak.TextData(base, [tmp_path / "lora"] * 2, given["texts"])
    with pytest.raises(UsageError, match="does not predict the next token"):
        data.learned_by("cat")
    made = ak.combine([tmp_path / "lora"] * 2, "regmean", base=base, data=data.learned_by("regmean"))
    assert len(made.updates) > 2
    experts = make("mixtral", tmp_path / "mixtral")
    tokenizer(experts)
    model = transformers.MixtralForCausalLM.from_pretrained(experts)
    ak.write(lora("mixtral", model), tmp_path / "experts", "peft")
    data = ak.TextData(experts, [tmp_path / "experts"] * 2, given["texts"])
    for method in ("cat", "nsc", "regmean_plus"):
        with pytest.raises(Unsupported, match="stacks the experts"):
            ak.combine([tmp_path / "experts"] * 2, method, base=experts, data=data.learned_by(method))
    for tokens in base.glob("tokenizer*"):
        tokens.unlink()
    for data in (given["texts"], "builtin"):
        with pytest.raises((UsageError, Unsupported), match="no tokenizer"):
            ak.TextData(base, [tmp_path / "lora"] * 2, data)
    vision = make("vit", tmp_path / "vit")
    model = transformers.ViTForImageClassification.from_pretrained(vision)
    ak.write(lora("vit", model), tmp_path / "vlora", "peft")
    with pytest.raises(Unsupported, match="does not read text"):
        ak.TextData(vision, [tmp_path / "vlora"] * 2, given["texts"])


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:9999", ""])
def test_devices_that_torch_does_not_have_are_refused(given: dict[str, Any], device: str) -> None:
    with pytest.raises(UsageError, match="--device cpu"):
        ak.TextData(given["base"], given["adapters"], given["texts"], device=device)


def test_commands_name_the_missing_option(given: dict[str, Any], tmp_path: Path) -> None:
    adapters = [str(each) for each in given["adapters"]]
    out = ["-o", str(tmp_path / "out")]

    def said(*words: str) -> str:
        ran = CliRunner().invoke(adapterkit, list(words))
        assert ran.exit_code == 2
        return ran.output

    assert "--data FILE and --base BASE" in said("combine", *adapters, "--method", "cat", *out)
    texts = ["--data", str(given["texts"][0])]
    assert "Also pass --base BASE" in said("combine", *adapters, "--method", "cat", *texts, *out)
    assert "ties does not use data" in said("combine", *adapters, "--method", "ties", *texts, *out)
    assert "--data requires --method" in said("merge", str(given["base"]), adapters[0], *texts, *out)
