"""Context in live models against PEFT: what its files hold, what its models compute, and how they go on."""

import copy
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, ShapeMismatch, TargetNotFound, Unrepresentable, Unsupported, UsageError
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""

IDS = torch.tensor([[1, 5, 9], [2, 2, 7]])
DECODER = torch.tensor([[0, 3, 4], [0, 1, 2]])
SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=False))


def grouped():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True))


def classifier():
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=2, n_head=2))


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=4, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0,
        )
    )  # fmt: skip


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32))


CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
PAIR = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4}
CPT = {"cpt_token_ids": [4, 1, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
CASES = {
    "prompt of llama": (llama, PromptTuningConfig(**CAUSAL)),
    "prompt of gpt-2": (gpt2, PromptTuningConfig(**CAUSAL)),
    "prompt of t5": (t5, PromptTuningConfig(**PAIR)),
    "prompt of bert": (bert, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
    "prompt of a classifier": (classifier, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
    "prompt and saved modules": (llama, PromptTuningConfig(**CAUSAL, modules_to_save=["norm", "lm_head"])),
    "p-tuning": (grouped, PromptEncoderConfig(**CAUSAL, encoder_hidden_size=6)),
    "p-tuning with an lstm": (
        gpt2,
        PromptEncoderConfig(**CAUSAL, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"),
    ),
    "p-tuning of t5": (t5, PromptEncoderConfig(**PAIR, encoder_hidden_size=6)),
    "cpt": (llama, CPTConfig(task_type="CAUSAL_LM", **CPT)),
    "multitask": (llama, MultitaskPromptTuningConfig(**CAUSAL, num_tasks=3, num_ranks=2)),
    "multitask of t5": (t5, MultitaskPromptTuningConfig(**PAIR, num_tasks=3)),
    "prefix of llama": (llama, PrefixTuningConfig(**CAUSAL)),
    "prefix of grouped heads": (grouped, PrefixTuningConfig(**CAUSAL)),
    "prefix of gpt-2": (gpt2, PrefixTuningConfig(**CAUSAL)),
    "prefix of t5": (t5, PrefixTuningConfig(**PAIR)),
    "prefix from a network": (grouped, PrefixTuningConfig(**CAUSAL, prefix_projection=True, encoder_hidden_size=6)),
    "cartridge": (grouped, CartridgeConfig(**CAUSAL, num_frozen_tokens=2)),
    "adaption prompt": (llama, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)),
    "adaption prompt of gpt-2": (gpt2, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)),
}


def fresh(model):
    torch.manual_seed(len(model.__name__))
    return model().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Case -> model, the folder that PEFT wrote, and PEFT's own model around another copy of the base."""
    made = {}

    def make(case):
        if case not in made:
            build, config = CASES[case]
            folder = tmp_path_factory.mktemp("peft")
            torch.manual_seed(7)
            wrapped = get_peft_model(fresh(build), copy.deepcopy(config))
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter))
            wrapped.save_pretrained(str(folder))
            made[case] = build, folder, PeftModel.from_pretrained(fresh(build), str(folder)).eval()
        return made[case]

    return make


def tokens(build, length=3, **words):
    """What a model of this kind is called with."""
    ids = torch.arange(2 * length).reshape(2, length) * 7 % 19 + 1
    return {"input_ids": ids, **({"decoder_input_ids": DECODER} if build is t5 else {}), **words}


def tasks(case):
    return {"task_ids": torch.tensor([2, 0])} if case == "multitask" else {}


def theirs_of(case, theirs, words):
    """PEFT's logits; PEFT insists on tasks, and on embeddings for a decoder with a prompt of its own."""
    if case == "multitask of t5":
        ids = words.pop("decoder_input_ids")
        embeds = theirs.word_embeddings(ids)
        return theirs(**words, decoder_inputs_embeds=embeds, task_ids=torch.tensor([0, 0])).logits
    return theirs(**words, **tasks(case)).logits


@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_computes_and_leaves_no_trace(case, saved):
    build, folder, theirs = saved(case)
    model = fresh(build)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    keys, plain = list(model.state_dict()), model(**tokens(build)).logits
    handle = ak.torch.inject(model, ak.read(folder))
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == list(before)
    for mask in ({}, {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}):
        words = tokens(build, **mask)
        with torch.no_grad():
            got, expected = model(**words, **tasks(case)).logits, theirs_of(case, theirs, words)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.shape != plain.shape or not torch.allclose(got, plain, atol=1e-3)
    with handle.disable():
        torch.testing.assert_close(model(**tokens(build)).logits, plain)
    handle.set_active(False)
    torch.testing.assert_close(model(**tokens(build)).logits, plain)
    handle.set_active(True)
    torch.testing.assert_close(model(**tokens(build, **mask), **tasks(case)).logits, expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    torch.testing.assert_close(model(**tokens(build)).logits, plain)


@pytest.mark.parametrize("case", CASES)
def test_writes_back_the_bytes_of_peft(case, saved, tmp_path):
    _, folder, _ = saved(case)
    adapter = ak.read(folder)
    ak.write(adapter, tmp_path / "native.safetensors")
    for source in (adapter, ak.read(tmp_path / "native.safetensors")):
        assert ak.write(source, tmp_path / "again", "peft") == []
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_written_afresh(case, saved, tmp_path):
    build, folder, theirs = saved(case)
    adapter = ak.read(folder).replace(foreign=None)
    ak.write(adapter, tmp_path / "new", "peft")
    assert ak.read(tmp_path / "new").digest() == adapter.digest()
    if build in (bert, classifier):
        return  # a config that says nothing of the task is one of a causal model
    again = PeftModel.from_pretrained(fresh(build), str(tmp_path / "new")).eval()
    with torch.no_grad():
        got, expected = (theirs_of(case, model, tokens(build)) for model in (again, theirs))
    assert torch.equal(got, expected)


GENERATES = [case for case, (build, _) in CASES.items() if build not in (bert, classifier)]


def greedy(step, ids, count):
    """Token by token, the whole sequence anew each time: no cache that could be wrong."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, step(ids)[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", GENERATES)
def test_generates_what_pefts_forward_says_token_by_token(case, cached, saved):
    build, folder, theirs = saved(case)
    model = fresh(build)
    ak.torch.inject(model, ak.read(folder))
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": cached}
    got = model.generate(IDS, **words)
    theirs_tasks = {"task_ids": torch.tensor([0, 0])} if case.startswith("multitask") else {}

    def step(ids):
        if build is not t5:
            return theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **theirs_tasks).logits
        if case == "multitask of t5":
            embeds = theirs.word_embeddings(ids)
            return theirs(input_ids=IDS, decoder_inputs_embeds=embeds, **theirs_tasks).logits
        return theirs(input_ids=IDS, decoder_input_ids=ids).logits

    assert torch.equal(got, greedy(step, torch.zeros(2, 1, dtype=torch.long) if build is t5 else IDS, 6))


@pytest.mark.parametrize("case", ["prompt of llama", "prompt of t5"])
def test_pefts_own_generation_is_the_same_without_a_cache_and_loses_its_way_with_one(case, saved):
    """PEFT 0.21 looks for the cache under the name that it had before transformers 5.24, and begins anew each step."""
    build, folder, theirs = saved(case)
    model = fresh(build)
    ak.torch.inject(model, ak.read(folder))
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    words["attention_mask"] = torch.ones_like(IDS)
    got = model.generate(input_ids=IDS, **words)
    assert torch.equal(got, theirs.generate(input_ids=IDS, use_cache=False, **words))
    assert torch.equal(got, theirs.generate(input_ids=IDS, **words)) == (build is t5)


@pytest.mark.parametrize("case", ["prompt of llama", "prefix of grouped heads", "prompt of gpt-2", "prefix of gpt-2"])
def test_a_row_with_padding_goes_on_as_it_does_alone(case, saved):
    """PEFT ignores positions beside prompts, so that its padded rows see others than rows alone do."""
    build, folder, _ = saved(case)
    model = fresh(build)
    ak.torch.inject(model, ak.read(folder))
    words = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(torch.tensor([[3, 8]]), **words)
    padded = torch.tensor([[0, 0, 3, 8], [4, 5, 6, 7]])
    got = model.generate(padded, attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), **words)
    assert torch.equal(got[0, 2:], alone[0])


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("case", ["prompt of llama", "prefix of t5", "prompt of t5"])
def test_beams_with_and_without_a_cache_agree(case, beams, saved):
    build, folder, _ = saved(case)
    model = fresh(build)
    ak.torch.inject(model, ak.read(folder))
    words = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **words), model.generate(IDS, use_cache=False, **words))


@pytest.mark.parametrize("case", ["prompt of llama", "prefix of llama", "prompt of t5", "prefix of t5", "multitask"])
def test_losses_are_pefts(case, saved):
    build, folder, theirs = saved(case)
    model = fresh(build)
    ak.torch.inject(model, ak.read(folder))
    words = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS, **tasks(case)}
    torch.testing.assert_close(model(**words).loss, theirs(**words).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["prompt of llama", "prefix of llama", "prefix of gpt-2"])
def test_embeddings_and_positions_of_the_caller_are_taken_as_token_numbers_are(case, saved):
    build, folder, _ = saved(case)
    model = fresh(build)
    ak.torch.inject(model, ak.read(folder))
    y = model(IDS).logits
    embeds, positions = model.get_input_embeddings()(IDS), torch.arange(3)[None]
    torch.testing.assert_close(model(inputs_embeds=embeds, position_ids=positions).logits, y)
    torch.testing.assert_close(model(IDS, position_ids=positions).logits, y)
    with pytest.raises(ShapeMismatch, match="the mask covers 2 tokens"):
        model(IDS, attention_mask=torch.ones(2, 2))
    with pytest.raises(Unsupported, match=r"need a mask of shape \[batch, tokens\]|needs a mask of shape"):
        model(IDS, attention_mask=torch.ones(2, 1, 3, 3))


def test_arguments_may_come_by_position(saved):
    build, folder, _ = saved("prompt of llama")
    model = fresh(build)
    ak.torch.inject(model, ak.read(folder))
    mask = torch.ones_like(IDS)
    torch.testing.assert_close(model(IDS, mask).logits, model(input_ids=IDS, attention_mask=mask).logits)


def prompt(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_several_adapters_follow_each_other_in_the_order_in_which_they_were_attached():
    one, two = prompt(1, 2, 8), prompt(2, 3, 8)
    past = prompt(3, 3, 2, 2, 5, 2)
    model = fresh(grouped)
    both = Adapter({Target(""): (METHODS["prompt"](P=torch.cat((one, two))), METHODS["prefix"](P=past))})
    together = ak.torch.inject(model, both)
    expected = model(IDS).logits
    together.remove()
    updates = {"a": METHODS["prompt"](P=one), "c": METHODS["prefix"](P=past), "b": METHODS["prompt"](P=two)}
    handles = {n: ak.torch.inject(model, Adapter({Target(""): (u,)}), name=n) for n, u in updates.items()}
    torch.testing.assert_close(model(IDS).logits, expected)
    with handles["a"].disable():
        assert model(IDS).logits.shape[1] == 6
    handles["b"].remove()
    assert model(IDS).logits.shape[1] == 5
    for name in "ac":
        handles[name].remove()
    assert "forward" not in model.__dict__


def test_context_beside_a_change_of_weights_is_both():
    torch.manual_seed(0)
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    model, P = fresh(llama), prompt(1, 2, 8)
    q = "model.layers.0.self_attn.q_proj"
    adapter = Adapter({Target(q): (METHODS["lora"](A=A, B=B),), Target(""): (METHODS["prompt"](P=P),)})
    handle = ak.torch.inject(model, adapter)
    got = model(IDS).logits
    handle.remove()
    with torch.no_grad():
        model.get_parameter(f"{q}.weight").add_(B @ A)
    embeds = torch.cat((P.expand(2, -1, -1), model.get_input_embeddings()(IDS)), 1)
    torch.testing.assert_close(got, model(inputs_embeds=embeds).logits)


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(grouped, torch.float32), (gpt2, torch.float32), (t5, torch.float32), (grouped, torch.bfloat16)],
)
@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.kind == "context"])
def test_training_from_scratch_reaches_every_trained_tensor_and_nothing_else(method, build, dtype, tmp_path):
    model = fresh(build).to(dtype).requires_grad_(False)
    if method == "adaption_prompt" and build is t5:
        with pytest.raises(TargetNotFound, match="no attention"):
            ak.torch.create(model, method, rank=3)
        return
    more = {
        "multitask_prompt": {"r": 2, "tasks": 2},
        "prefix_mlp": {"hidden": 5},
        "gated_prefix_mlp": {"hidden": 5},
        "p_tuning_lstm": {"hidden": 3},
    }
    more = more.get(method, {})
    adapter = ak.torch.create(model, method, rank=3, **more)
    handle = ak.torch.inject(model, adapter, trainable=True)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    words = tokens(build)
    if method == "textual_inversion":
        words["input_ids"] = words["input_ids"].clone()
        words["input_ids"][0] = torch.arange(vocabulary, vocabulary + 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(**words).logits[:, -1].float().log_softmax(-1)[:, 4].neg().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = dict(handle.named_parameters())
    begun = {str(target): update.tensors for target, update in adapter}
    for name, parameter in trained.items():
        target, _, field = name.rpartition(f".{method}.")
        assert not torch.equal(parameter, begun[target][field]), name
    held = METHODS[method].tensor_fields().keys() - METHODS[method].frozen
    assert {name.rpartition(".")[2] for name in trained} == held
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result, y = handle.adapter(), model(**words).logits
    ak.write(result, tmp_path / "a.safetensors")
    handle.remove()
    resumed = ak.torch.inject(model, ak.read(tmp_path / "a.safetensors"), trainable=True)
    torch.testing.assert_close(model(**words).logits, y)
    assert resumed.adapter().digest() == result.digest()


@pytest.mark.parametrize("method", ["p_tuning", "p_tuning_lstm", "cpt", "prefix_mlp"])
def test_peft_gets_what_a_network_computes_where_that_is_asked_for(method, tmp_path):
    model = fresh(grouped)
    adapter = ak.torch.create(model, method, rank=3)
    adapter = adapter.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(Unrepresentable, match=rf"\(model\): PEFT cannot store the network of {method}; --on-loss fold"):
        ak.write(adapter, tmp_path / "out", "peft")
    lines = ak.write(adapter, tmp_path / "out", "peft", on_loss="fold")
    assert lines == [f"(model): wrote the output of {method}'s network, not the network"]
    ak.torch.inject(model, adapter)
    theirs = PeftModel.from_pretrained(fresh(grouped), str(tmp_path / "out")).eval()
    torch.testing.assert_close(model(IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_lstm_computes_what_pefts_encoder_computes_and_peft_reads_what_is_written(layers, tmp_path):
    """PEFT's files are without the network: the tensors come from its module, and it loads what they compute."""
    config = PromptEncoderConfig(
        **CAUSAL, encoder_hidden_size=6, encoder_reparameterization_type="LSTM", encoder_num_layers=layers
    )
    torch.manual_seed(3)
    theirs = get_peft_model(fresh(gpt2), config).eval()
    encoder = theirs.prompt_encoder["default"]
    lstm, (first, _, second) = encoder.lstm_head, encoder.mlp_head

    def layer(number, kind):
        return torch.stack([getattr(lstm, f"{kind}_l{number}{way}") for way in ("", "_reverse")])

    kinds = {"input": "weight_ih", "hidden": "weight_hh", "input_bias": "bias_ih", "hidden_bias": "bias_hh"}
    tensors = {f"first_{name}": layer(0, kind) for name, kind in kinds.items()}
    if layers > 1:
        above = range(1, layers)
        tensors |= {f"deeper_{n}": torch.stack([layer(i, kind) for i in above]) for n, kind in kinds.items()}
    head = {"W1": first.weight, "b1": first.bias, "W2": second.weight, "b2": second.bias}
    update = METHODS["p_tuning_lstm"](E=encoder.embedding.weight, **tensors, **head)
    adapter = Adapter({Target(""): (update.map(lambda leaf: leaf.detach().clone()),)})
    with torch.no_grad():
        ((_, mine),) = adapter
        computed = encoder(torch.arange(4)[None])[0]
        torch.testing.assert_close(mine.embeddings(), computed, rtol=1e-6, atol=1e-6)
        model = fresh(gpt2)
        ak.torch.inject(model, adapter)
        torch.testing.assert_close(model(IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    ak.write(adapter, tmp_path / "native.safetensors")
    assert ak.read(tmp_path / "native.safetensors").digest() == adapter.digest()
    ak.write(adapter, tmp_path / "out", "peft", on_loss="fold")
    again = PeftModel.from_pretrained(fresh(gpt2), str(tmp_path / "out")).eval()
    held = again.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(held.detach(), computed, rtol=1e-6, atol=1e-6)


def test_tokens_to_begin_with_are_the_ones_that_are_asked_for():
    model = fresh(llama)
    W = model.get_input_embeddings().weight
    P = next(iter(ak.torch.create(model, "prompt", rank=5, index=[3, 11])))[1].P
    assert torch.equal(P, W[[3, 11, 3, 11, 3]])
    drawn = next(iter(ak.torch.create(model, "prompt", rank=40)))[1].P
    assert all(any(torch.equal(row, w) for w in W) for row in drawn)
    assert len({tuple(row.tolist()) for row in drawn}) > 5
    with pytest.raises(UsageError, match="unexpected keyword argument 'length'"):
        ak.torch.create(model, "prompt", length=3)


def test_new_tokens_are_numbered_behind_those_of_the_base():
    model = fresh(llama)
    plain, name = model(IDS).logits, "model.embed_tokens"
    one, two = prompt(1, 2, 8), prompt(2, 1, 8)
    first = ak.torch.inject(model, Adapter({Target(name): (METHODS["textual_inversion"](P=one, token="<a>"),)}))
    second = ak.torch.inject(model, Adapter({Target("embed_tokens"): (METHODS["textual_inversion"](P=two),)}), name="b")
    torch.testing.assert_close(model(IDS).logits, plain)
    ids = torch.tensor([[3, 21, 22, 20]])
    expected = torch.stack((model.get_input_embeddings().weight[3], one[1], two[0], one[0]))[None]
    torch.testing.assert_close(model.get_input_embeddings()(ids), expected)
    with pytest.raises(IndexError):
        model(torch.tensor([[23]]))
    lora = METHODS["lora"](A=prompt(3, 2, 20), B=prompt(4, 8, 2))
    third = ak.torch.inject(model, Adapter({Target(name, "in out *k"): (lora,)}), name="c")
    for handle in (first, second, third):
        handle.remove()
    assert torch.equal(model(IDS).logits, plain)
    assert "forward" not in model.get_input_embeddings().__dict__


def test_an_attentions_bias_counts_once():
    """PEFT adds the output projection's bias to the prompt's part as well."""
    model = fresh(grouped)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    adapter = ak.torch.create(model, "adaption_prompt", rank=3)
    plain = model(IDS).logits
    ak.torch.inject(model, adapter)
    torch.testing.assert_close(model(IDS).logits, plain, msg="a gate of zero lets nothing through")
    theirs = get_peft_model(
        fresh(grouped), AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=3)
    )
    theirs.base_model.model.load_state_dict(
        {n.replace("self_attn.", "self_attn.model."): v for n, v in model.state_dict().items()}, strict=False
    )
    assert not torch.allclose(theirs.eval()(input_ids=IDS).logits, plain, atol=1e-3)


def test_two_stacks_of_layers_use_every_second_pair_of_a_prefix(saved):
    """PEFT gives layer i of T5's decoder the keys and values that were made for layer 2 i, and begins anew halfway."""
    build, folder, theirs = saved("prefix of t5")
    ((_, update),) = ak.read(folder)
    assert update.step == 2
    P = update.map(lambda leaf: leaf.torch()).past()
    flat = theirs.prompt_encoder["default"].embedding.weight.reshape(4, 4, 2, 2, 4)
    assert torch.equal(P, flat.permute(1, 2, 3, 0, 4)[[0, 2, 0, 2]])
    with torch.no_grad():
        y = theirs(**tokens(build)).logits
        flat[:, [1, 3]] += 1
        assert torch.equal(theirs(**tokens(build)).logits, y), "two of four pairs do nothing"
        flat[:, [1, 3]] -= 1


class Plain(nn.Module):
    """A model that takes token numbers alone."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)

    def get_input_embeddings(self):
        return self.emb

    def forward(self, ids):
        return self.emb(ids)


class Own(Plain):
    """A model that takes embeddings and is not of transformers."""

    def forward(self, input_ids=None, inputs_embeds=None):
        return (self.emb(input_ids) if inputs_embeds is None else inputs_embeds).cumsum(1)


class Deaf(Own):
    """A model that takes a cache and does nothing with it."""

    def forward(self, input_ids=None, inputs_embeds=None, cache=None):
        return super().forward(input_ids, inputs_embeds)


def test_a_classifier_leaves_a_prefix_to_the_model_inside_it():
    model, P = fresh(bert), prompt(1, 3, 2, 4, 3, 2)
    plain = model(IDS).logits
    for path in ("", "bert"):
        handle = ak.torch.inject(model, Adapter({Target(path): (METHODS["prefix"](P=P),)}))
        got = model(IDS, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])).logits
        handle.remove()
        keys = [(kv[0].expand(2, -1, -1, -1), kv[1].expand(2, -1, -1, -1)) for kv in P]
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
        pooled = model.bert(IDS, attention_mask=mask, cache=DynamicCache(keys)).pooler_output
        torch.testing.assert_close(got, model.classifier(pooled))
        assert not torch.allclose(got, plain, atol=1e-3)


def test_any_model_that_takes_embeddings_will_do():
    model, P = Own(), prompt(1, 2, 8)
    plain = model(IDS)
    ak.torch.inject(model, Adapter({Target(""): (METHODS["prompt"](P=P),)}))
    torch.testing.assert_close(model(IDS)[:, 2:], plain + P.sum(0))
    nested = nn.ModuleDict({"tower": Own()})
    ak.torch.inject(nested, Adapter({Target("tower"): (METHODS["prompt"](P=P),)}))
    assert nested["tower"](IDS).shape == (2, 5, 8)


REFUSED = {
    "width": (llama, "", "prompt", (2, 6), ShapeMismatch, "made for embeddings of width 6, but the model's have 8"),
    "layers": (llama, "", "prefix", (2, 2, 4, 3, 2), ShapeMismatch, "made for layers=2, but the model has 3"),
    "heads": (grouped, "", "prefix", (3, 2, 4, 3, 2), ShapeMismatch, "made for heads=4, but the model has 2"),
    "head width": (llama, "", "prefix", (3, 2, 4, 3, 3), ShapeMismatch, "made for d=3, but the model has 2"),
    "no embeddings": (
        Plain,
        "",
        "prompt",
        (2, 8),
        Unsupported,
        "does not apply to a Plain, which takes no inputs_embeds",
    ),
    "no cache": (
        Own,
        "",
        "prefix",
        (3, 2, 4, 3, 2),
        Unsupported,
        "does not apply to a Own, which takes no cache or past_key_values",
    ),
    "no such part": (llama, "model.layers.9", "prompt", (2, 8), TargetNotFound, "the base does not have this module"),
    "no embedding": (
        llama,
        "lm_head",
        "textual_inversion",
        (2, 8),
        Unsupported,
        "new tokens cannot be added to a Linear",
    ),
    "new width": (
        llama,
        "model.embed_tokens",
        "textual_inversion",
        (2, 5),
        ShapeMismatch,
        "made for embeddings of width 5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_attached(case):
    build, path, method, shape, error, why = REFUSED[case]
    model = fresh(build)
    with pytest.raises(error, match=why) as raised:
        ak.torch.inject(model, Adapter({Target(path): (METHODS[method](P=torch.ones(shape)),)}))
    assert raised.value.where.startswith(path or "(model)")
    assert raised.value.cure
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_adaption_prompts_belong_to_attentions():
    model, update = fresh(llama), METHODS["adaption_prompt"](P=torch.ones(2, 8), gate=torch.ones(1))
    with pytest.raises(Unsupported, match="LlamaMLP is not an attention"):
        ak.torch.inject(model, Adapter({Target("model.layers.0.mlp"): (update,)}))


def test_there_is_no_half_of_a_prompt(saved):
    _, folder, _ = saved("prompt of llama")
    model, adapter = fresh(llama), ak.read(folder)
    with pytest.raises(UsageError, match="context can only have the weight 1"):
        ak.torch.inject(model, adapter, weight=0.5)
    handle = ak.torch.inject(model, adapter)
    with pytest.raises(UsageError, match="context can only have the weight 1"):
        handle.weight = 2
    handle.weight = 1
    with pytest.raises(NotMergeable, match=r"\(model\): the update does not change weights"):
        handle.merge_()
    with (
        pytest.raises(Unsupported, match="context cannot be added to some rows"),
        ak.torch.route(model, ["default", None]),
    ):
        model(IDS)
    with pytest.raises(UsageError, match="with this name"):
        ak.torch.inject(model, adapter)
    handle.remove()
    with pytest.raises(UsageError, match="removed or merged"):
        handle.set_active(True)


def test_a_prefix_that_would_be_lost_is_refused(saved):
    build, folder, _ = saved("prefix of llama")
    model = fresh(build)
    handle = ak.torch.inject(model, ak.read(folder))
    model.gradient_checkpointing_enable()
    with pytest.raises(Unsupported, match="gradient checkpointing"):
        model.train()(IDS)
    model.eval()
    with pytest.raises(Unsupported, match="a cache of fixed size"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    handle.remove()
    deaf = Deaf()
    ak.torch.inject(deaf, Adapter({Target(""): (METHODS["prefix"](P=torch.ones(3, 2, 4, 2, 2)),)}))
    with pytest.raises(Unsupported, match="did not use the past keys and values that"):
        deaf(IDS)


def test_compiled_and_exported_models_have_their_context():
    model = Own()
    handle = ak.torch.inject(model, Adapter({Target(""): (METHODS["prompt"](P=prompt(1, 2, 8)),)}))
    y = model(IDS)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(IDS), y)
    torch.testing.assert_close(torch.export.export(model, (IDS,)).module()(IDS), y)
    handle.remove()


def test_a_copied_model_keeps_its_context_apart():
    model = fresh(llama)
    handle = ak.torch.inject(model, ak.torch.create(model, "prompt", rank=3))
    copied = copy.deepcopy(model)
    handle.remove()
    assert copied(IDS).logits.shape[1] == 6
    assert model(IDS).logits.shape[1] == 3


def test_configs_that_are_not_of_their_file_are_refused(saved, tmp_path):
    for case, changes, why in (
        ("prompt of llama", {"num_virtual_tokens": 5}, r"\[4, 8\].* the config states \[5, 8\]"),
        ("prompt of llama", {"num_transformer_submodules": 3}, "must be 1 or 2, but is 3"),
        ("prefix of llama", {"token_dim": 6}, "must be a multiple of"),
        ("prefix of llama", {"num_layers": None}, "must be a multiple of"),
        ("multitask", {"num_tasks": 2}, "the config states"),
        ("adaption prompt", {"adapter_len": 3}, "the config states"),
        ("prompt of llama", {"cpt_mask": [1]}, "does not know"),
    ):
        _, folder, _ = saved(case)
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
        with pytest.raises(ak.AdapterkitError, match=why):
            ak.read(tmp_path)
