"""Prefixes of single attentions, gated or not, in live models of several families."""

import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, TargetNotFound, Unsupported
from adapterkit.methods import METHODS

IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 4]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(**words):
    return BertModel(BertConfig(**SIZES, max_position_embeddings=32, **words), add_pooling_layer=False)


def llama(**words):
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **words))


def gpt2(**words):
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=2, n_head=2, **words))


def t5(**words):
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, **words,
        )
    )  # fmt: skip


def bart(**words):
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=32,
            decoder_start_token_id=0, pad_token_id=0, bos_token_id=0, eos_token_id=1, forced_eos_token_id=None,
            **words,
        )
    )  # fmt: skip


COUNTS = {bert: 2, llama: 2, gpt2: 2, t5: 6, bart: 6}
"""Family -> its attentions, of an encoder, of a decoder and between them."""

METHOD_NAMES = ["prefix", "gated_prefix", "gated_prefix_mlp"]


def fresh(build, **words):
    torch.manual_seed(5)
    return build(**words).eval()


def context(model, method, seed=1):
    """Prefixes at every attention, of large numbers."""
    gated = ak.torch.create(model, "gated_prefix" if method == "prefix" else method, rank=3, seed=seed)
    gated = gated.map(lambda leaf: leaf + torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)))
    if method != "prefix":
        return gated
    return Adapter({target: (METHODS["prefix"](P=update.P),) for target, update in gated})


def run(model, **words):
    """The model's output for all its tokens."""
    pair = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=IDS, **{**pair, **words})
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("build", COUNTS)
def test_all_ways_to_attend_agree_and_nothing_is_left_behind(build, method):
    models = [fresh(build, attn_implementation=name) for name in ("eager", "sdpa")]
    adapter = context(models[0], method)
    assert len(adapter.updates) == COUNTS[build]
    found = []
    for model in models:
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        keys, plain = list(model.state_dict()), run(model)
        handle = ak.torch.inject(model, adapter)
        found.append([run(model, **mask) for mask in ({}, {"attention_mask": MASK})])
        assert (found[-1][0] - plain).abs().max() > 1e-3
        assert list(model.state_dict()) == keys
        with handle.disable():
            assert torch.equal(run(model), plain)
        handle.remove()
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2, t5, bart])
def test_what_is_generated_with_a_cache_is_what_is_generated_without(build):
    model = fresh(build)
    plain = context(model, "prefix")
    ak.torch.inject(model, plain)
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, anew = (model.generate(IDS, use_cache=cached, **words) for cached in (True, False))
    assert torch.equal(cached, anew)


def test_gpt2s_prefix_is_a_cache_that_moves_no_position():
    model, cache = fresh(gpt2), DynamicCache()
    adapter = context(model, "prefix")
    for layer, (_, update) in enumerate(adapter):
        keys, values = update.P[0]
        cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), layer)
    expected = run(model, cache=cache, position_ids=torch.arange(4)[None])
    ak.torch.inject(model, adapter)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [1, 2])
def test_one_attention_by_its_formula(shares):
    """BERT's attention with a gated prefix, written out in float64."""
    model = fresh(bert).double()
    attention, x = model.encoder.layer[0].attention.self, torch.randn(2, 5, 8, dtype=torch.float64)
    P = torch.randn(1, 2, 4, 3, 2, dtype=torch.float64)
    gate, bias = torch.randn(shares, 8, dtype=torch.float64), torch.randn(shares, dtype=torch.float64)
    share = torch.sigmoid(x @ gate.T + bias).mean(1)
    q, k, v = (
        layer(x).reshape(2, 5, 4, 2).transpose(1, 2) for layer in (attention.query, attention.key, attention.value)
    )
    k = torch.cat((P[0, 0] * share[:, 0, None, None, None], k), 2)
    v = torch.cat((P[0, 1] * share[:, -1, None, None, None], v), 2)
    expected = ((q @ k.mT / 2**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8)
    update = METHODS["gated_prefix"](P=P, gate=gate, gate_bias=bias)
    ak.torch.inject(model, Adapter({Target("encoder.layer.0.attention.self"): (update,)}))
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_prefixes_of_several_adapters_follow_each_other():
    model = fresh(llama)
    first, second = context(model, "prefix", 1), context(model, "prefix", 2)
    both = {target: (METHODS["prefix"](P=torch.cat((one.P, second.updates[target][0].P), 3)),) for target, one in first}
    handle = ak.torch.inject(model, Adapter(both))
    expected = run(model)
    handle.remove()
    for name, each in (("a", first), ("b", second)):
        ak.torch.inject(model, each, name=name)
    torch.testing.assert_close(run(model), expected)


def test_a_prefix_stands_beside_a_prompt_to_attend_to():
    model = fresh(llama)
    prompt = Adapter(
        {Target("model.layers.0.self_attn"): (METHODS["adaption_prompt"](P=torch.randn(2, 8), gate=torch.ones(1)),)}
    )
    ak.torch.inject(model, prompt, name="prompt")
    alone = run(model)
    handle = ak.torch.inject(model, context(model, "gated_prefix"), name="prefix")
    assert (run(model) - alone).abs().max() > 1e-3
    handle.remove()
    torch.testing.assert_close(run(model), alone)


def prefix(*shape):
    return METHODS["prefix"](P=torch.ones(shape))


SELF = "model.layers.0.self_attn"
GATED = METHODS["gated_prefix"]
ONE_GATE = GATED(P=torch.ones(1, 2, 2, 3, 2), gate=torch.ones(1, 8), gate_bias=torch.ones(1))
FAULTS = {
    "heads": (SELF, prefix(1, 2, 4, 3, 2), ShapeMismatch, "made for heads=4, but the attention has 2"),
    "width of a head": (SELF, prefix(1, 2, 2, 3, 4), ShapeMismatch, "made for d=4"),
    "layers": (SELF, prefix(2, 2, 2, 3, 2), ShapeMismatch, "made for layers=2, but the attention has 1"),
    "width of the gate": (
        SELF, GATED(P=torch.ones(1, 2, 2, 3, 2), gate=torch.ones(1, 6), gate_bias=torch.ones(1)), ShapeMismatch,
        "made for width=6",
    ),
    "no attention": (f"{SELF}.q_proj", ONE_GATE, Unsupported, "gated_prefix cannot be applied to a Linear"),
    "the model": ("", ONE_GATE, Unsupported, "cannot be applied to a LlamaForCausalLM"),
    "tokens": (SELF, METHODS["prompt"](P=torch.ones(2, 8)), Unsupported, "the output of a LlamaAttention"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_before_anything_is_attached(fault):
    path, update, error, words = FAULTS[fault]
    model = fresh(llama)
    with pytest.raises(error, match=words) as raised:
        ak.torch.inject(model, Adapter({Target(path): (update,)}))
    assert raised.value.cure
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_way_to_attend_that_takes_no_prefix_is_named():
    model = fresh(llama)
    ak.torch.inject(model, context(model, "prefix"))
    model.model.layers[1].self_attn.config = SimpleNamespace(_attn_implementation="flex_attention")
    with pytest.raises(Unsupported, match=r"computed by 'flex_attention'.*attn_implementation= one of eager, sdpa"):
        run(model)


def test_gpt2s_upcast_attention_takes_a_prefix_where_transformers_does_not_upcast():
    plain, eager, fused = (
        fresh(gpt2, attn_implementation=name, reorder_and_upcast_attn=upcast)
        for name, upcast in (("eager", False), ("eager", True), ("sdpa", True))
    )
    adapter = context(plain, "prefix")
    for model in (plain, eager, fused):
        ak.torch.inject(model, adapter)
    torch.testing.assert_close(run(fused), run(plain), rtol=1e-5, atol=1e-5)
    with pytest.raises(Unsupported, match=r"reorder_and_upcast_attn.*attn_implementation='sdpa'"):
        run(eager)


def test_models_without_such_attentions_have_no_place_for_it():
    model = nn.Module()
    model.embed = nn.Embedding(4, 8)
    model.get_input_embeddings = lambda: model.embed
    with pytest.raises(TargetNotFound, match="no attention module from the transformers library"):
        ak.torch.create(model, "gated_prefix", rank=2, sizes={"layers": 1, "heads": 1, "d": 8})


@pytest.mark.parametrize("build", [bert, llama])
def test_a_prompt_behind_embeddings(build):
    """In Llama that is a prompt in front of the input; in BERT it is behind norm and positions."""
    model, P = fresh(build), torch.randn(2, 8)
    name = "embeddings" if build is bert else "model.embed_tokens"
    update = METHODS["prompt"](P=P)
    if build is llama:
        whole = ak.torch.inject(model, Adapter({Target(""): (update,)}))
        expected = run(model, attention_mask=MASK)
        whole.remove()
    else:
        hidden = torch.cat((P.expand(2, -1, -1), model.embeddings(input_ids=IDS)), 1)
        seen = torch.cat((torch.ones(2, 2), MASK), 1)[:, None, None].expand(-1, -1, 6, -1).bool()
        expected = model.encoder(hidden, attention_mask=seen).last_hidden_state
    handle = ak.torch.inject(model, Adapter({Target(name): (update,)}))
    torch.testing.assert_close(run(model, attention_mask=MASK), expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert run(model).shape[1] == 4
    with pytest.raises(ShapeMismatch, match="made for embeddings of width 6"):
        ak.torch.inject(model, Adapter({Target(name): (METHODS["prompt"](P=torch.ones(2, 6)),)}))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_prompt_where_a_model_cannot_take_one_is_refused():
    with pytest.raises(Unsupported, match="in front of the output of a Dropout"):
        ak.torch.inject(fresh(gpt2), Adapter({Target("transformer.drop"): (METHODS["prompt"](P=torch.ones(2, 8)),)}))


def test_a_prefix_in_a_checkpointed_block_is_refused_in_training():
    """The backward pass runs such a block again, with the cache that the first run extended."""
    model = llama()
    ak.torch.inject(model, ak.torch.create(model, "prefix", rank=3), trainable=True)
    wanted = model(IDS).logits
    for position, block in enumerate(model.model.layers):
        model.model.layers[position] = checkpoint_wrapper(block)
    model.train()
    with pytest.raises(Unsupported, match="CheckpointWrapper"):
        model(IDS)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted)
