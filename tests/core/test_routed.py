"""Routed formulas and Shadow against PEFT: what they compute, what is read and written, what they ask of a call."""

import copy
import json
import os
import warnings
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import LilyConfig, PeftModel, PolyConfig, ShadowConfig, get_peft_model
from peft_cases import gpt2, llama
from peft_cases.built_in import lora
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, NotMergeable, ShapeMismatch, Unsupported, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""

IDS = torch.tensor([[3, 4, 1, 3, 4, 9], [3, 4, 2, 2, 7, 3], [5, 1, 2, 2, 7, 4]])
"""Rows in which 3, 4 occurs twice, once, and not at all."""

TASKS = {"task_ids": torch.tensor([1, 0, 2])}


def alora(**options):
    return lora(
        **{"task_type": "CAUSAL_LM", "alora_invocation_tokens": [3, 4], "target_modules": ["q_proj"], **options}
    )


def poly(**options):
    given = {"task_type": "CAUSAL_LM", "init_weights": False, "r": 3, "n_tasks": 3, "n_skills": 2}
    return PolyConfig(**given | options)


def lily(**options):
    given = {"task_type": "CAUSAL_LM", "init_weights": False, "r": 3, "num_B": 2, "scaling": 0.5}
    return LilyConfig(**given | options)


def shadow(**options):
    return ShadowConfig(**{"task_type": "CAUSAL_LM", "init_weights": False, "r": 3, "shadow_alpha": 0.7, **options})


SMALL = {"shadow_hidden_size": 4, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 6}
"""A network that is narrower than its base."""

CASES = {
    "alora": (llama, alora(), {}),
    "alora of all": (llama, alora(target_modules="all-linear", rank_pattern={"up_proj": 2}, use_rslora=True), {}),
    "alora with a bias": (llama, alora(target_modules=["q_proj", "v_proj"], lora_bias=True), {}),
    "alora of gpt-2": (gpt2, alora(target_modules=["c_attn", "c_fc"]), {}),
    "alora and saved": (llama, alora(modules_to_save=["lm_head"]), {}),
    "poly": (llama, poly(target_modules=["q_proj", "down_proj"]), TASKS),
    "poly in splits": (llama, poly(target_modules=["q_proj", "k_proj", "up_proj"], n_splits=2), TASKS),
    "lily": (llama, lily(target_modules=["q_proj", "v_proj"]), {}),
    "lily that shares": (llama, lily(target_modules=["self_attn.q_proj", "up_proj", "k_proj"], stride_A=2), {}),
    "lily of a pattern": (llama, lily(target_modules=r".*\.[qo]_proj", num_B=3), {}),
    "shadow": (llama, shadow(), {}),
    "shadow of its own eyes": (llama, shadow(share_embeddings=False, update_hidden_size=5), {}),
    "shadow of two layers": (llama, shadow(shadow_num_hidden_layers=2, target_modules=["model.layers.1"]), {}),
    "narrow shadow": (llama, shadow(**SMALL, modules_to_save=["lm_head"]), {}),
    "shadow of gpt-2": (gpt2, shadow(shadow_hidden_size=4), {}),
}
"""Name -> a model, a config, and what a call of it brings besides tokens."""


@cache
def base_of(model):
    torch.manual_seed(len(model.__name__))
    return model().eval()


def fresh(model):
    return copy.deepcopy(base_of(model))


def save(model, config, folder):
    """What PEFT writes, after every trained parameter has moved off its initial value."""
    torch.manual_seed(7)
    wrapped = get_peft_model(fresh(model), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder))
    return folder


def loaded(model, folder):
    """PEFT's own model; it must know every tensor, and miss none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = PeftModel.from_pretrained(fresh(model), str(folder))
    assert not [w for w in said if "adapter keys" in str(w.message) or "nexpected" in str(w.message)]
    return made.eval()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Case -> the folder that PEFT wrote."""
    return cache(lambda case: save(*CASES[case][:2], tmp_path_factory.mktemp("peft")))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model -> a folder with its weights."""
    folders = {}
    for model in (llama, gpt2):
        folders[model] = tmp_path_factory.mktemp(model.__name__)
        save_file(base_of(model).state_dict(), folders[model] / "model.safetensors", {"format": "pt"})
        (folders[model] / "config.json").write_text(base_of(model).config.to_json_string())
    return folders


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_computes(case, made):
    model, _, call = CASES[case]
    mine, theirs = fresh(model), loaded(model, made(case))
    plain, before = mine(IDS).logits, dict(mine.__dict__)
    handle = ak.torch.inject(mine, ak.read(made(case)))
    got = mine(IDS, **call).logits
    assert not torch.allclose(got, plain, rtol=1e-3)
    close(got, theirs(input_ids=IDS, **call).logits)
    with handle.disable():
        assert torch.equal(mine(IDS, **call).logits, plain)
    handle.remove()
    assert mine.__dict__.keys() == before.keys()
    assert torch.equal(mine(IDS).logits, plain)


@pytest.mark.parametrize("case", CASES)
def test_writes_back_the_bytes_of_peft(case, made, tmp_path):
    folder = made(case)
    assert ak.write(ak.read(folder), tmp_path / "again", "peft") == []
    assert contents(tmp_path / "again") == contents(folder)
    ak.write(ak.read(folder), tmp_path / "native.safetensors")
    ak.write(ak.read(tmp_path / "native.safetensors"), tmp_path / "from native", "peft")
    assert contents(tmp_path / "from native") == contents(folder)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_writes_what_peft_loads(case, made, bases, tmp_path):
    """Without the leftovers of PEFT, as for an adapter from anywhere else."""
    model, _, call = CASES[case]
    adapter = ak.read(made(case), base=bases[model]).replace(foreign=None).bind(bases[model])
    ak.write(adapter, tmp_path / "new", "peft", base=bases[model])
    close(
        loaded(model, tmp_path / "new")(input_ids=IDS, **call).logits,
        loaded(model, made(case))(input_ids=IDS, **call).logits,
    )
    assert ak.read(tmp_path / "new", base=bases[model]).bind(bases[model]).digest() == adapter.digest()


@pytest.mark.parametrize("case", ["alora", "poly", "lily", "shadow"])
def test_is_not_merged_and_says_why(case, made, bases, tmp_path):
    adapter = ak.read(made(case))
    reason = {"alora": "from the last invocation on", "poly": "depending on the row's task"}
    reason |= {"lily": "depend on the input", "shadow": "a network in parallel with the model"}
    with pytest.raises(NotMergeable, match=rf"{case} changes .*{reason[case]}\)?, not weights") as raised:
        ak.merge(bases[llama], adapter, tmp_path / "out")
    assert "Inject" in raised.value.cure
    handle = ak.torch.inject(fresh(llama), adapter)
    with pytest.raises(NotMergeable, match="does not change weights"):
        handle.merge_()
    with pytest.raises(NotMergeable):
        adapter.delta(next(target.path for target in adapter.updates), base=bases[llama])


@torch.no_grad()
def test_an_invocation_is_remembered_with_the_cache(made):
    """Token by token as in one piece; PEFT is asked for the whole each time."""
    mine, theirs = fresh(llama), loaded(llama, made("alora"))
    ak.torch.inject(mine, ak.read(made("alora")))
    whole = mine(IDS).logits
    close(whole, theirs(input_ids=IDS).logits)
    out = mine(IDS[:, :2], use_cache=True)
    parts = [out.logits]
    for place in range(2, 6):
        out = mine(IDS[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    # What was computed before a later invocation stays as it was.
    close(torch.cat(parts, 1)[1:], whole[1:])
    with pytest.raises(ShapeMismatch, match="has 1 rows, but the cache was filled with 3"):
        mine(IDS[:1, :1], past_key_values=out.past_key_values)


GENERATION = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "pad_token_id": 0}


@torch.no_grad()
def test_generates_what_peft_generates(made):
    mine, theirs = fresh(llama), loaded(llama, made("alora of all"))
    ak.torch.inject(mine, ak.read(made("alora of all")))
    got = mine.generate(**GENERATION)
    assert torch.equal(got, theirs.generate(**GENERATION))
    # PEFT counts from the end of the prompt, even if steps read all tokens; the formula counts from the invocation.
    assert torch.equal(mine.generate(**GENERATION, use_cache=False), got)
    assert not torch.equal(theirs.generate(**GENERATION, use_cache=False), got)


@torch.no_grad()
def test_beams_are_what_they_are_without_a_cache(made):
    """PEFT refuses them."""
    mine = fresh(llama)
    ak.torch.inject(mine, ak.read(made("alora of all")))
    beams = GENERATION | {"num_beams": 3}
    assert torch.equal(mine.generate(**beams), mine.generate(**beams, use_cache=False))


@torch.no_grad()
def test_tasks_are_passed_on_by_generate(made):
    mine, theirs = fresh(llama), loaded(llama, made("poly"))
    ak.torch.inject(mine, ak.read(made("poly")))
    given = GENERATION | {"output_logits": True, "return_dict_in_generate": True}
    one, other = ([*model.generate(**given, **TASKS).logits] for model in (mine, theirs))
    close(torch.stack(one), torch.stack(other))
    changed = mine.generate(**given, task_ids=torch.tensor([0, 1, 1])).logits
    assert not torch.allclose(changed[0], one[0], rtol=1e-3)


@torch.no_grad()
def test_rows_of_several_adapters_have_their_own_words(made):
    mine = fresh(llama)
    alone = {}
    for case, call in (("alora", {}), ("poly", TASKS)):
        handle = ak.torch.inject(mine, ak.read(made(case)), name=case)
        alone[case] = mine(IDS, **call).logits
        handle.remove()
    for case in alone:
        ak.torch.inject(mine, ak.read(made(case)), name=case)
    with ak.torch.route(mine, ["poly", "alora", "poly"]):
        got = mine(IDS, **TASKS).logits
    close(got, torch.stack([alone["poly"][0], alone["alora"][1], alone["poly"][2]]))


def test_what_a_call_lacks_is_named(made):
    model = fresh(llama)
    handle = ak.torch.inject(model, ak.read(made("poly")))
    with pytest.raises(UsageError, match=r"needs task_ids, which the model was not called with\. Pass task_ids= to"):
        model(IDS)
    with pytest.raises(ShapeMismatch, match="one task number for each row"):
        model(IDS, task_ids=torch.tensor([0]))
    model(IDS, **TASKS)
    with pytest.raises(UsageError, match="task_ids") as raised:
        model.model(IDS)
    assert raised.value.where == "model.layers.0.self_attn.q_proj"
    handle.remove()
    ak.torch.inject(model, ak.read(made("alora")))
    with pytest.raises(UsageError, match="needs input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))


@pytest.mark.parametrize("method", ["alora", "poly", "lily"])
def test_trains_with_checkpointed_blocks(method):
    more = {"alora": {"invocation": [3, 4]}, "poly": {"tasks": 3, "skills": 2}, "lily": {"experts": 3}}[method]
    model = fresh(llama).requires_grad_(False).train()
    adapter = ak.torch.create(model, method, targets="q_proj", rank=2, **more)
    handle = ak.torch.inject(model, adapter, trainable=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    call = TASKS if method == "poly" else {}
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, labels=IDS, use_cache=False, **call).loss.backward()
        grads.append([parameter.grad.clone() for parameter in handle.parameters()])
        model.zero_grad()
        for parameter in handle.parameters():
            parameter.grad = None
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        close(one, other)


def test_tensors_that_layers_share_are_one(made, tmp_path):
    updates = {target.path: update for target, update in ak.read(made("lily that shares"))}
    first, second = (updates[f"model.layers.{layer}.self_attn.q_proj"] for layer in range(2))
    assert first.A is second.A
    assert first.B is second.B
    assert first.router is not second.router
    other = updates["model.layers.0.mlp.up_proj"]
    assert other.A is not first.A
    apart = {target.path: update for target, update in ak.read(made("lily"))}
    assert apart["model.layers.0.self_attn.q_proj"].A is not apart["model.layers.1.self_attn.q_proj"].A
    assert apart["model.layers.0.self_attn.q_proj"].B is apart["model.layers.1.self_attn.q_proj"].B
    handle = ak.torch.inject(fresh(llama), ak.read(made("lily")), trainable=True)
    # For each of two kinds of modules: two A, two routers, one B.
    assert len(list(handle.parameters())) == 10
    tensors = load_file(made("lily") / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lily_B.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((made("lily") / "adapter_config.json").read_text())
    with pytest.raises(Malformed, match="PEFT creates 1 B for modules"):
        ak.read(tmp_path)


@pytest.mark.parametrize(
    ("case", "change", "error", "where"),
    [
        ("poly", {"n_tasks": 2}, ShapeMismatch, "poly_lora_A"),
        ("poly", {"poly_type": "other"}, Unsupported, "poly_type"),
        ("shadow", {"r": 2}, ShapeMismatch, "shadow_down"),
        ("shadow", {"update_hidden_size": 4}, ShapeMismatch, "shadow_update_gate"),
        ("shadow", {"shadow_model": "elsewhere"}, Unsupported, "shadow_model"),
        ("lily", {"num_B": 3}, ShapeMismatch, "lily_B"),
        ("lily", {"r": 2}, ShapeMismatch, "lily_A"),
        ("lily", {"stride_A": 2}, Malformed, "lily_A"),
        ("alora", {"alora_invocation_tokens": [-1]}, Malformed, "alora_invocation_tokens"),
        ("alora", {"target_parameters": ["x"]}, Unsupported, "alora_invocation_tokens"),
    ],
)
def test_a_config_that_is_not_of_the_file_is_refused(case, change, error, where, made, tmp_path):
    config = json.loads((made(case) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    (tmp_path / "adapter_model.safetensors").write_bytes((made(case) / "adapter_model.safetensors").read_bytes())
    with pytest.raises(error) as raised:
        ak.read(tmp_path)
    assert where in raised.value.where


@torch.no_grad()
def test_a_shadow_goes_with_the_call(made):
    """With masks, positions and embeddings as PEFT's; without a cache, and not under a route or checkpointing."""
    mine, theirs = fresh(llama), loaded(llama, made("shadow"))
    handle = ak.torch.inject(mine, ak.read(made("shadow")))
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]]), "use_cache": False}
    for call in (padded, {"position_ids": torch.arange(6)[None] + 2}):
        close(mine(IDS, **call).logits, theirs(input_ids=IDS, **call).logits)
    embeds = mine.get_input_embeddings()(IDS)
    close(mine(inputs_embeds=embeds).logits, theirs(input_ids=IDS).logits)
    given = GENERATION | {"use_cache": False}
    assert torch.equal(mine.generate(**given), theirs.generate(**given))
    with pytest.raises(Unsupported, match="no cache of the earlier tokens"):
        mine.generate(**GENERATION)
    with pytest.raises(UsageError, match="needs shadow, which the model was not called with"):
        mine.model(IDS)
    handle.weight = 0.5
    assert not torch.allclose(mine(IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-3)
    handle.remove()
    ak.torch.inject(mine, ak.read(made("shadow")), name="one")
    with ak.torch.route(mine, ["one", None, "one"]), pytest.raises(UsageError, match="one call for all rows"):
        mine(IDS)


def test_a_shadow_trains_and_is_read_back(made):
    model = fresh(llama).requires_grad_(False).train()
    handle = ak.torch.inject(model, ak.read(made("shadow")), trainable=True)
    # Ten tensors of each of two blocks, and the one network.
    assert len(list(handle.parameters())) == 21
    model(IDS, labels=IDS).loss.backward()
    # Nothing reads what the last block makes of the state.
    idle = [name for name, p in handle.named_parameters() if p.grad is None]
    assert len(idle) == 8
    assert all(name.startswith("model.layers.1.shadow.") for name in idle)
    trained = {id(p) for p in handle.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
    network = next(p for name, p in handle.named_parameters() if name.endswith("network"))
    assert network.grad.abs().max() > 0
    assert handle.adapter().digest() == ak.read(made("shadow")).replace(foreign=None).digest()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(Unsupported, match="runs blocks again"):
        model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("case", ["alora", "poly", "lily"])
def test_is_compiled_and_exported_with_its_call(case, made):
    model, call = fresh(llama), CASES[case][2]
    ak.torch.inject(model, ak.read(made(case)))
    given = {"use_cache": False, **call}
    wanted = model(IDS, **given).logits
    close(torch.compile(model, backend="eager")(IDS, **given).logits, wanted)
    close(torch.export.export(model, (IDS,), given).module()(IDS, **given).logits, wanted)
