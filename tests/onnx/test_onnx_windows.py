"""`Session.generate` with caches of a sliding window, and with states of convolutions: the same tokens as elsewhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json

import numpy as np
import onnx
import onnx_graphs as graphs
import peft
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

import adapterkit as ak
from adapterkit.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|peft|torch)")

WINDOW, NEW = 4, 14

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "sliding_window": WINDOW,
}  # fmt: skip

CONFIGS = {
    "mistral": lambda **more: transformers.MistralConfig(**{**SIZES, **more}, num_hidden_layers=2),
    "gemma3": lambda **more: transformers.Gemma3TextConfig(
        **{**SIZES, **more}, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    ),
}
"""Family -> its config; one layer of Gemma 3 reads all tokens."""

TEXTS = torch.tensor([[5, 9, 2, 33, 8, 40], [0, 0, 0, 7, 8, 11]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])


def model_of(family, **more):
    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def written(model):
    """The tokens that transformers writes."""
    words = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(input_ids=TEXTS, attention_mask=MASK, **words)


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_beyond_the_window(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path / "base")
    # Without the window, the model writes other tokens.
    wide = model_of(family, sliding_window=64)
    assert torch.equal(next(wide.parameters()), next(model.parameters()))
    wanted = {None: written(model)}
    assert not torch.equal(written(wide), wanted[None])
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    changed = peft.get_peft_model(model, config).eval()
    changed.save_pretrained(tmp_path / "lora")
    wanted["one"] = written(changed)
    assert not torch.equal(wanted["one"], wanted[None])
    adapters = {"one": tmp_path / "lora"}
    report = ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out", adapter=adapters, mode="slots")
    session = ak.onnx.Session(report.out, {"one": report.out.with_name("one.onnx_adapter")})
    for name, tokens in wanted.items():
        got = session.generate(TEXTS.numpy(), attention_mask=MASK.numpy(), max_new_tokens=NEW, adapter=name)
        assert got.tolist() == tokens.tolist()


VOCABULARY, HEADS, KEYS, SIZE = 24, 4, 2, 8
WIDTH = HEADS * SIZE


def weights():
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCABULARY, WIDTH), "q": (WIDTH, WIDTH), **dict.fromkeys("kv", (WIDTH, KEYS * SIZE))}
    return {
        name: rng.normal(size=shape).astype("f4") * (1 if name == "embed" else 0.6) for name, shape in shapes.items()
    }


def builders_folder(folder):
    """A graph of one attention as onnxruntime-genai's builder writes it: its cache always has the window's length."""
    folder.mkdir()
    held = {**weights(), "last": weights()["embed"].T, "one": np.array([1]), "axis": np.array(1)}
    cache = [f"past_key_values.0.{part}" for part in ("key", "value")]
    new = [f"present.0.{part}" for part in ("key", "value")]
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["seen"], keepdims=0),
        helper.make_node("Sub", ["seen", "one"], ["last_seen"]),
        helper.make_node("Cast", ["last_seen"], ["lengths"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "axis"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["total"], to=TensorProto.INT32),
        helper.make_node("Gather", ["embed", "input_ids"], ["x"]),
        *(helper.make_node("MatMul", ["x", name], [f"{name}_x"]) for name in "qkv"),
        helper.make_node(
            "GroupQueryAttention", ["q_x", "k_x", "v_x", *cache, "lengths", "total"], ["read", *new],
            domain="com.microsoft", num_heads=HEADS, kv_num_heads=KEYS, local_window_size=WINDOW,
            sliding_window_cache=1, scale=1.0,
        ),
        helper.make_node("MatMul", ["read", "last"], ["logits"]),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    past = [value(name, TensorProto.FLOAT, ["batch", KEYS, "past", "size"]) for name in cache]
    present = [value(name, TensorProto.FLOAT, ["batch", KEYS, "kept", "size"]) for name in new]
    inputs = [value(name, TensorProto.INT64, ["batch", name]) for name in ("input_ids", "attention_mask")]
    logits = value("logits", TensorProto.FLOAT, ["batch", "input_ids", VOCABULARY])
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in held.items()]
    made = helper.make_graph(nodes, "g", [*inputs, *past], [logits, *present], tensors)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    window = {"window_size": WINDOW, "layers": [0]}
    decoder = {"head_size": SIZE, "num_key_value_heads": KEYS, "sliding_window": window}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    return folder / "model.onnx"


def next_token(tokens, window):
    """The likeliest token, in float64: the last token reads the last tokens of the window."""
    W = {name: array.astype("f8") for name, array in weights().items()}
    x = W["embed"][tokens]
    q = (x[-1] @ W["q"]).reshape(HEADS, SIZE)
    k, v = ((x @ W[name]).reshape(len(tokens), KEYS, SIZE).repeat(HEADS // KEYS, 1) for name in "kv")
    scores = np.einsum("hs,nhs->nh", q, k)[-window:]
    odds = np.exp(scores - scores.max(0))
    read = np.einsum("nh,nhs->hs", odds / odds.sum(0), v[-window:])
    return int((read.reshape(-1) @ W["embed"].T).argmax())


def test_a_cache_that_keeps_the_window_only(tmp_path):
    session = ak.onnx.Session(builders_folder(tmp_path / "out"))
    wanted = {window: [5, 9, 2] for window in (WINDOW, 100)}
    for _ in range(NEW):
        for window, tokens in wanted.items():
            tokens.append(next_token(tokens, window))
    assert wanted[WINDOW] != wanted[100]
    assert session.generate([5, 9, 2], max_new_tokens=NEW)[0].tolist() == wanted[WINDOW]


def graph_of_a_state(path):
    """A graph whose convolution reads the last two tokens from a state, as onnxruntime-genai's builder names it."""
    held = {"embed": weights()["embed"], "last": weights()["embed"].T, "kernel": kernel(), "two": np.array([-2])}
    held |= {"end": np.array([1 << 40]), "axis": np.array([2])}
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"]),
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["past.0.conv", "t"], ["whole"], axis=2),
        helper.make_node("Slice", ["whole", "two", "end", "axis"], ["present.0.conv"]),
        helper.make_node("Conv", ["whole", "kernel"], ["c"], group=WIDTH),
        helper.make_node("Transpose", ["c"], ["b"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["b", "last"], ["logits"]),
    ]
    value = helper.make_tensor_value_info
    ids = value("input_ids", TensorProto.INT64, ["batch", "tokens"])
    states = [value(f"{word}.0.conv", TensorProto.FLOAT, ["batch", WIDTH, 2]) for word in ("past", "present")]
    logits = value("logits", TensorProto.FLOAT, ["batch", "tokens", VOCABULARY])
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in held.items()]
    made = helper.make_graph(nodes, "g", [ids, states[0]], [logits, states[1]], tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def kernel():
    return np.random.default_rng(1).normal(size=(WIDTH, 1, 3)).astype("f4")


@pytest.mark.parametrize("tokens", ["int64", "int32"])
def test_a_state_of_a_convolution(tokens, tmp_path):
    path, wanted = graph_of_a_state(tmp_path / "model.onnx"), [5, 9, 2]
    if tokens == "int32":
        graphs.with_int32(path)
    session = ak.onnx.Session(path)
    E, K = weights()["embed"].astype("f8"), kernel()[:, 0].astype("f8")
    for _ in range(NEW):
        x = np.concatenate([np.zeros((2, WIDTH)), E[wanted]])[-3:]
        wanted.append(int(((x * K.T).sum(0) @ E.T).argmax()))
    assert len({*wanted}) > 4
    assert session.generate([5, 9, 2], max_new_tokens=NEW)[0].tolist() == wanted
    two = session.generate([[5, 9, 2]] * 2, attention_mask=np.ones((2, 3)), max_new_tokens=NEW)
    assert two.tolist() == [wanted] * 2
    with pytest.raises(UsageError, match="would include the padding"):
        session.generate([[5, 9, 2], [0, 9, 2]], attention_mask=[[1, 1, 1], [0, 1, 1]])
