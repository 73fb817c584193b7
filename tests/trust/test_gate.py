"""The gate finds every planted fault, says what it is, and finds none in sound merges, our own and PEFT's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_models import changed, deltas, lora, make, model_of, only, scaled, world
from peft import IA3Config, LoraConfig, get_peft_model
from shared_graphs import Called

import adapterkit as ak
from adapterkit.gating import Gate
from adapterkit.methods.dora import DoRA
from adapterkit.methods.replacement import Replacement

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

FAST: dict[str, Any] = {"texts": 1, "length": 16, "new_tokens": 0, "null": False, "device": "cpu"}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("gate"))


def added(changes: Tensors, factor: float = 1.0) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name, delta in changes.items():
            tensors[name] = (tensors[name].float() + factor * delta).to(tensors[name].dtype)

    return change


def also(adapter: ak.Adapter, more: Callable[[Tensors], object]) -> Callable[[Tensors], None]:
    """The merge, and then something else."""

    def change(tensors: Tensors) -> None:
        added(deltas(adapter))(tensors)
        more(tensors)

    return change


def shifted(changes: Tensors) -> Tensors:
    return {name.replace(f".{at}.", f".{(at + 1) % 2}."): delta
            for name, delta in changes.items() for at in [int(name.split("layers.")[1][0])]}  # fmt: skip


def with_head(adapter: ak.Adapter, head: torch.Tensor) -> ak.Adapter:
    target = ak.Target("lm_head")
    return adapter.replace(updates={**adapter.updates, target: (Replacement(weight=head),)})


def named(changes: Tensors, word: str) -> Tensors:
    return {name: delta for name, delta in changes.items() if word in name}


def exchanged(changes: Tensors) -> Tensors:
    """The changes of q under k, and the reverse."""
    words = {"q_proj": "k_proj", "k_proj": "q_proj"}
    return {next((n.replace(w, o) for w, o in words.items() if w in n), n): d for n, d in changes.items()}


def cut(adapter: ak.Adapter, rank: int) -> ak.Adapter:
    return adapter.replace(
        updates={t: tuple(u.replace(A=u.A[:rank], B=u.B[:, :rank]) for u in us) for t, us in adapter.updates.items()}
    )


def crossed(adapter: ak.Adapter) -> ak.Adapter:
    """A of q with B of k, and the reverse."""
    updates = dict(adapter.updates)
    for target, (update,) in adapter.updates.items():
        if target.path.endswith("q_proj"):
            other = ak.Target(target.path.replace("q_proj", "k_proj"))
            (held,) = adapter.updates[other]
            updates[target], updates[other] = (update.replace(A=held.A),), (held.replace(A=update.A),)
    return adapter.replace(updates=updates)


def fp8(tensors: Tensors) -> None:
    for name, value in tensors.items():
        tensors[name] = value.to(torch.float8_e4m3fn).to(value.dtype)


def coarse(tensors: Tensors) -> None:
    for name, value in tensors.items():
        if "_proj" in name:
            tensors[name] = (value / 0.15).round() * 0.15


def zeroed(word: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in tensors:
            if word in name:
                tensors[name] = torch.zeros_like(tensors[name])

    return change


def put(name: str, value: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, value(tensors).clone())


def nan(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan


O1 = "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.down_proj"

LLAMA: dict[str, tuple[Callable[[ak.Adapter, ak.Adapter], Callable[[Tensors], object]], str]] = {
    "scale x 2": (lambda a, _: added(deltas(a), 2), "twice the change (scale x 2)"),
    "scale x 0.5": (lambda a, _: added(deltas(a), 0.5), "half the change"),
    "sign turned": (lambda a, _: added(deltas(a), -1), "opposite sign"),
    "weight 0.8 for 1": (lambda a, _: added(deltas(a), 0.8), "0.8 times the change"),
    "merged twice": (lambda a, _: also(a, added(deltas(a))), "twice the change"),
    "rsLoRA taken as LoRA": (lambda a, _: added(deltas(a), 1 / math.sqrt(4)), "half the change"),
    "wrong alpha": (lambda a, _: added(deltas(scaled(a, 16 / 64))), "0.25 times the change"),
    "not merged": (lambda *_: dict, "the merged model equals the base"),
    "A and B crossed between targets": (lambda a, _: added(deltas(crossed(a))), "contain another change"),
    "one square layer transposed": (
        lambda a, _: also(a, put(O1, lambda t: t[O1] - deltas(a)[O1] + deltas(a)[O1].T)),
        "layer 1 o_proj contains the change transposed",
    ),
    "q and k exchanged": (lambda a, _: added(exchanged(deltas(a))), "contain the change of another module"),
    "attention lost": (lambda a, _: added(named(deltas(a), "mlp")), "8 of 22 modules"),
    "one layer missed": (lambda a, _: added(deltas(only(a, lambda p: "layers.1." not in p))), "layer 1 q_proj"),
    "one target missed": (
        lambda a, _: added(deltas(only(a, lambda p: p != DOWN))), "layer 1 down_proj is the first module that differs",
    ),
    "layers shifted by one": (lambda a, _: added(shifted(deltas(a))), "contain the change of another module"),
    "half of the rank": (lambda a, _: added(deltas(cut(a, 2))), "contain another change"),
    "another adapter's weights": (lambda _, b: added(deltas(b)), "contain another change"),
    "two adapters where one was asked": (lambda a, b: also(a, added(deltas(b))), "contain another change"),
    "norm weights lost": (
        lambda a, _: also(a, put("model.norm.weight", lambda _: torch.ones(32))), "model.norm has other weights",
    ),
    "norm weights missing": (lambda a, _: also(a, lambda t: t.pop("model.norm.weight")), "lack model.norm.weight"),
    "head tied to the embedding": (
        lambda a, _: also(a, put("lm_head.weight", lambda t: t["model.embed_tokens.weight"])),
        "lm_head has other weights",
    ),
    "a NaN": (lambda a, _: also(a, nan), "NaN or infinities, first at layer 1 up_proj"),
    "cut to fp8": (lambda a, _: also(a, fp8), "other weights"),
    "quantized away": (lambda a, _: also(a, coarse), "contain another change"),
}  # fmt: skip
"""Fault -> a merge of the adapter, beside another one, by the formula and with the fault; words of a verdict."""


@pytest.mark.parametrize(
    ("weight", "words"), [(0.8, "0.8 times"), (2.0, "twice"), (-1.0, "opposite sign"), (0.0, "equals the base")]
)
def test_a_multiple_is_told_from_the_rounding_of_a_weak_change(
    root: str, tmp_path: Path, weight: float, words: str
) -> None:
    """A trained change is one or two hundredths of the weight; a step of bfloat16 is nearly a hundredth."""
    base, adapter = world("llama", root, "bfloat16")
    weak = scaled(adapter, 0.1)
    ak.merge(base, weak, tmp_path / "merged", weights=[weight])
    found = ak.gate(base, weak, merged=tmp_path / "merged", **FAST)
    check_failed(found, words)
    assert found.verdicts[0].startswith("the merged model"), found.verdicts


def check_failed(found: Gate, words: str) -> None:
    assert found.outcome == "failed", found.verdicts
    assert any(words in verdict for verdict in found.verdicts), found.verdicts


@pytest.mark.parametrize("fault", LLAMA)
def test_a_fault_of_a_merge_is_found_and_named(root: str, tmp_path: Path, fault: str) -> None:
    base, adapter = world("llama", root)
    other = lora("llama", model_of(base), seed=2)
    change, words = LLAMA[fault]
    merged = changed(base, tmp_path / "merged", change(adapter, other))
    check_failed(ak.gate(base, adapter, merged=merged, **FAST), words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rms_norm_eps": 0.3}, "configs differ"),
        ({"rope_theta": 50.0}, "rotary_emb"),
        ({"hidden_act": "relu"}, "keeps"),
    ],
)
def test_another_config_is_found(root: str, tmp_path: Path, config: dict[str, Any], words: str) -> None:
    base, adapter = world("llama", root)
    told = json.loads((base / "config.json").read_text())
    if "rope_theta" in config:
        config = {"rope_parameters": {**told["rope_parameters"], **config}}
    merged = changed(base, tmp_path / "merged", added(deltas(adapter)), **config)
    check_failed(ak.gate(base, adapter, merged=merged, **FAST), words)


def test_the_wrong_base_is_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("llama", root)
    other = make("llama", tmp_path / "other", seed=7)
    ak.merge(other, adapter, tmp_path / "merged")
    check_failed(ak.gate(base, adapter, merged=tmp_path / "merged", **FAST), "made from other weights than the base")


def test_an_adapter_that_does_nothing_is_found(root: str) -> None:
    base, adapter = world("llama", root)
    found = ak.gate(base, scaled(adapter, 0.0), **FAST)
    check_failed(found, "the adapter changes nothing")
    assert found.effect.divergence == 0


def test_an_adapter_of_nan_is_found(root: str) -> None:
    base, adapter = world("llama", root)
    broken = adapter.map(lambda leaf: torch.where(leaf > leaf.max() - 1e-6, math.nan, leaf))
    found = ak.gate(base, broken, **FAST | {"null": True})
    check_failed(found, "gives NaN or infinities")
    assert "NaN" in str(found.effect.why_no_null)


def test_one_of_two_adapters_lost_and_weights_exchanged(root: str, tmp_path: Path) -> None:
    base, adapter = world("llama", root)
    other = lora("llama", model_of(base), seed=2)
    ak.merge(base, [adapter], tmp_path / "one")
    ak.merge(base, [adapter, other], tmp_path / "exchanged", weights=[0.3, 0.7])
    check_failed(ak.gate(base, [adapter, other], merged=tmp_path / "one", **FAST), "contain another change")
    found = ak.gate(base, [adapter, other], merged=tmp_path / "exchanged", weights=[0.7, 0.3], **FAST)
    check_failed(found, "contain another change")


def experts_rolled(tensors: Tensors, changes: Tensors) -> None:
    for name in changes:
        expert = int(name.split("experts.")[1][0])
        tensors[name] += changes[name.replace(f"experts.{expert}.", f"experts.{(expert + 1) % 4}.")]


def test_scrambled_and_lost_experts_are_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("mixtral", root)
    ak.merge(base, adapter, tmp_path / "sound")
    from safetensors.torch import load_file

    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "sound" / "model.safetensors")
    experts = {name: after[name] - before[name] for name in before if ".experts." in name}

    def scrambled(tensors: Tensors) -> None:
        for name in experts:
            tensors[name] = before[name].clone()
        experts_rolled(tensors, experts)

    merged = changed(tmp_path / "sound", tmp_path / "scrambled", scrambled)
    check_failed(ak.gate(base, adapter, merged=merged, **FAST), "contain the changes of the experts in another order")
    lost = {name for name in experts if "layers.1." in name and "experts.2." in name}
    assert len(lost) == 3
    merged = changed(tmp_path / "sound", tmp_path / "lost", lambda t: t.update({name: before[name] for name in lost}))
    check_failed(ak.gate(base, adapter, merged=merged, **FAST), "layer 1 experts")


def test_a_dropped_bias_is_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("qwen2", root)
    merged = changed(base, tmp_path / "merged", also(adapter, zeroed("layers.1.self_attn.q_proj.bias")))
    found = ak.gate(base, adapter, merged=merged, **FAST)
    check_failed(found, "layer 1 q_proj")
    assert found.merged is not None
    assert [part.module for part in found.merged.faults] == ["model.layers.1.self_attn.q_proj"]


def test_a_transposed_conv1d_is_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("gpt2", root)
    name = "h.1.attn.c_proj.weight"
    delta = deltas(adapter)[f"transformer.{name}"]
    ak.merge(base, adapter, tmp_path / "sound")
    from safetensors.torch import load_file

    stored = next(each for each in load_file(base / "model.safetensors") if each.endswith(name))
    merged = changed(tmp_path / "sound", tmp_path / "m", put(stored, lambda t: t[stored] - delta + delta.T))
    check_failed(ak.gate(base, adapter, merged=merged, **FAST), "layer 1 c_proj contains the change transposed")


def test_a_lost_tower_is_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("clip", root)
    ak.merge(base, only(adapter, lambda path: "vision" not in path), tmp_path / "merged")
    check_failed(ak.gate(base, adapter, merged=tmp_path / "merged", **FAST), "contain none of the change")


def test_a_lost_layer_of_an_encoder_is_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("bert", root)
    ak.merge(base, only(adapter, lambda path: "layer.1." not in path), tmp_path / "merged")
    check_failed(ak.gate(base, adapter, merged=tmp_path / "merged", **FAST), "contain none of the change")


def test_lost_tokens_are_found(root: str, tmp_path: Path) -> None:
    _, adapter = world("llama", root)
    base = make("llama", tmp_path / "base", vocab_size=100)

    def lost(tensors: Tensors) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name][:96]

    merged = changed(base, tmp_path / "merged", also(adapter, lost), vocab_size=96)
    check_failed(ak.gate(base, adapter, merged=merged, **FAST), "[96, 32] instead of [100, 32]")
    merged = changed(base, tmp_path / "torn", also(adapter, lost))
    check_failed(ak.gate(base, adapter, merged=merged, **FAST), "cannot be run")


def dora(adapter: ak.Adapter, base: Path) -> ak.Adapter:
    weights = dict(model_of(base).named_parameters())
    updates = {}
    for target, (update,) in adapter.updates.items():
        norm = weights[f"{target.path}.weight"].detach().norm(dim=1)
        updates[target] = (
            DoRA(A=update.A, B=update.B, magnitude=norm * torch.linspace(0.7, 1.4, len(norm)), scaling=1.0),
        )
    return adapter.replace(updates=updates)


def test_a_lost_magnitude_is_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("llama", root)
    merged = changed(base, tmp_path / "merged", added(deltas(adapter)))
    check_failed(
        ak.gate(base, dora(adapter, base), merged=merged, **FAST), "layer 0 q_proj is the first module that differs"
    )


def test_a_lost_saved_module_is_found(root: str, tmp_path: Path) -> None:
    base, adapter = world("llama", root)
    head = model_of(base).lm_head.weight.detach() * 1.5
    merged = changed(base, tmp_path / "merged", added(deltas(adapter)))
    check_failed(ak.gate(base, with_head(adapter, head), merged=merged, **FAST), "lm_head")


def test_ia3_merged_twice_is_found(root: str, tmp_path: Path) -> None:
    base, adapter, model = ia3_of_peft(root, tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "once")
    again = get_peft_model(model_of(tmp_path / "once"), copy(IA3))
    draw(again)
    again.merge_and_unload().save_pretrained(tmp_path / "twice")
    assert ak.gate(base, adapter, merged=tmp_path / "once", **FAST).ok
    check_failed(ak.gate(base, adapter, merged=tmp_path / "twice", **FAST), "q_proj")


IA3 = IA3Config(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])


def ia3_of_peft(root: str, folder: Path) -> tuple[Path, Path, Any]:
    base, _ = world("llama", root)
    model = get_peft_model(model_of(base), copy(IA3))
    draw(model)
    model.save_pretrained(folder / "ia3")
    return base, folder / "ia3", model


def draw(model: Any, size: float = 0.1) -> None:
    """Give what is trained an effect."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape) * (1.0 if "lora" in name or "ia3" in name else 0.2)


SOUND = {
    "float32": ("llama", {"dtype": "F32"}), "bfloat16": ("llama", {"dtype": "BF16"}),
    "float16": ("llama", {"dtype": "F16"}),
    "half the weight": ("llama", {"weights": [0.5]}),
    "a negative weight": ("llama", {"weights": [-0.7], "dtype": "BF16"}),
    "shards": ("llama", {"shard_size": 20_000}),
    "tied": ("qwen2", {"dtype": "BF16"}), "tied float16": ("qwen2", {"dtype": "F16"}), "tied float32": ("qwen2", {}),
    "experts": ("mixtral", {}), "experts bfloat16": ("mixtral", {"dtype": "BF16"}),
    "conv1d": ("gpt2", {}), "conv1d bfloat16": ("gpt2", {"dtype": "BF16"}),
    "encoder": ("bert", {"dtype": "F16"}), "encoder bfloat16": ("bert", {"dtype": "BF16"}),
    "two towers": ("clip", {}), "pictures": ("vit", {"dtype": "BF16"}), "encoder and decoder": ("t5", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_merge_passes(root: str, tmp_path: Path, case: str) -> None:
    family, options = SOUND[case]
    base, adapter = world(family, root)
    ak.merge(base, adapter, tmp_path / "merged", **options)
    check_passed(ak.gate(base, adapter, merged=tmp_path / "merged", weights=options.get("weights"), **FAST))


def check_passed(found: Gate) -> None:
    assert found.outcome == "passed", found.verdicts
    assert found.merged is not None
    assert found.merged.kept is not None
    assert found.merged.kept > 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 0.1, 0.05])
def test_a_sound_merge_into_16_bits_passes(root: str, tmp_path: Path, dtype: str, size: float) -> None:
    base, adapter = world("llama", root, dtype)
    adapter = scaled(adapter, size)
    ak.merge(base, adapter, tmp_path / "merged")
    check_passed(ak.gate(base, adapter, merged=tmp_path / "merged", **FAST))


@pytest.mark.parametrize("weights", [None, [0.7, 0.3], [1.0, -0.5]])
def test_a_sound_merge_of_two_adapters_passes(root: str, tmp_path: Path, weights: list[float] | None) -> None:
    base, adapter = world("llama", root)
    both = [adapter, lora("llama", model_of(base), seed=2)]
    ak.merge(base, both, tmp_path / "merged", weights=weights, dtype="BF16")
    check_passed(ak.gate(base, both, merged=tmp_path / "merged", weights=weights, **FAST))


@pytest.mark.parametrize("method", ["loha", "lokr", "oft", "dora"])
def test_a_sound_merge_of_other_methods_passes(root: str, tmp_path: Path, method: str) -> None:
    base, adapter = world("llama", root)
    if method == "dora":
        made = dora(adapter, base)
    else:
        torch.manual_seed(3)
        made = ak.torch.create(model_of(base), method, targets=["*_proj"], rank=4)
        made = made.map(lambda leaf: leaf + 0.1 * torch.randn_like(leaf))
    ak.merge(base, made, tmp_path / "merged", dtype="F16")
    check_passed(ak.gate(base, made, merged=tmp_path / "merged", **FAST))


def test_a_sound_merge_with_a_saved_head_passes(root: str, tmp_path: Path) -> None:
    base, adapter = world("llama", root)
    made = with_head(adapter, model_of(base).lm_head.weight.detach() * 1.5)
    ak.merge(base, made, tmp_path / "merged", dtype="BF16")
    check_passed(ak.gate(base, made, merged=tmp_path / "merged", **FAST))


OF_PEFT = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "rslora": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "o_proj"]),
    "saved": LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "bias": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="lora_only"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", OF_PEFT)
def test_a_merge_by_peft_passes(root: str, tmp_path: Path, case: str, dtype: str) -> None:
    """PEFT multiplies and adds in the dtype of the weights, so its bfloat16 rounds more than once."""
    base, _ = world("qwen2" if case == "bias" else "llama", root)
    model = get_peft_model(model_of(base, dtype), copy(OF_PEFT[case]), autocast_adapter_dtype=False)
    draw(model)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    check_passed(ak.gate(base, tmp_path / "adapter", merged=tmp_path / "merged", **FAST))


def test_a_grown_vocabulary_passes_and_a_lost_one_is_found(root: str, tmp_path: Path) -> None:
    base, _ = world("llama", root)
    model = model_of(base)
    model.resize_token_embeddings(100, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    draw(model, 0.3)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    check_passed(ak.gate(base, tmp_path / "adapter", merged=tmp_path / "merged", vocab="grow", **FAST))
    found = ak.gate(base, tmp_path / "adapter", merged=base, vocab="grow", **FAST)
    check_failed(found, "[96, 32] instead of [100, 32]")


def test_a_graph_is_held_against_the_adapters(root: str, tmp_path: Path) -> None:
    base, adapter = world("bert", root)
    plain, slots, graph = (tmp_path / "graphs" / f"{name}.onnx" for name in ("model", "slots", "graph"))
    ids, called = torch.arange(16)[None], Called(model_of(base), ("input_ids",)).eval()
    plain.parent.mkdir()
    ak.onnx.export(called, [ids], plain, inside="model", input_names=["input_ids"], output_names=["logits"])
    for out, mode in ((graph, "constant"), (slots, "slots")):
        ak.onnx.inject(plain, adapter, out, mode=mode)
    for made, told in ((graph, {}), (slots, {"weights": [0.7]})):
        found = ak.gate(base, adapter, onnx=made, **told, **FAST)
        assert found.outcome == "passed", found.verdicts
        assert found.onnx is not None
    check_failed(ak.gate(base, adapter, onnx=plain, **FAST), "the graph equals the base")
    check_failed(
        ak.gate(base, scaled(adapter, 0.5), onnx=graph, **FAST), "the graph contains twice the change (scale x 2)"
    )
    check_failed(ak.gate(base, scaled(adapter, -1), onnx=graph, **FAST), "opposite sign")
    check_failed(
        ak.gate(base, lora("bert", model_of(base), seed=2), onnx=graph, **FAST), "the graph is wrong: it keeps"
    )
