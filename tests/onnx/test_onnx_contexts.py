"""Prompts, prefixes and new tokens in graphs: onnxruntime computes what PEFT and transformers do."""

import numpy as np
import onnx_graphs as graphs
import onnxruntime
import peft
import pytest
import torch
import transformers
from peft_cases import llama
from shared_graphs import once, pretrained

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, TargetNotFound, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|peft|torch)")

IDS = torch.tensor([[5, 9, 2, 13]])
COUNT, WORDS = 3, 20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(the folder, its graph)."""
    return pretrained(tmp_path_factory, llama)


def peft_model(folder, config, out):
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.7)
    model.save_pretrained(out)
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.numpy()


def feeds(ids, past, total=None):
    count = ids.shape[1]
    total = total or count
    return {
        "input_ids": ids, "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(total - count, total)[None], **past,
    }  # fmt: skip


def nothing(session):
    names = [name for name in (*session.inputs, *session.slots) if name.startswith("past")]
    return {name: np.zeros((1, 1, 0, 4), np.float32) for name in names}


def test_a_soft_prompt_is_tokens_in_front(base, tmp_path, close):
    folder, graph = base
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    wanted = peft_model(folder, config, tmp_path / "prompt")
    report = ak.onnx.inject(graph, tmp_path / "prompt", tmp_path / "out.onnx")
    assert report.difference == 0
    assert "the new tokens have the ids 20 to 22" in report.note
    session = ak.onnx.Session(report.out)
    prompted = np.concatenate([np.arange(WORDS, WORDS + COUNT)[None], IDS.numpy()], 1)
    got = session.run(feeds(prompted, nothing(session)))["logits"]
    close(torch.tensor(got), torch.tensor(wanted), tolerance=1e-4)
    plain = ak.onnx.Session(graph)
    one, other = (s.run(feeds(IDS.numpy(), nothing(s)))["logits"] for s in (session, plain))
    np.testing.assert_array_equal(one, other)
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == graph.read_bytes()


def test_a_prefix_is_the_past_that_a_run_begins_with(base, tmp_path, close):
    folder, graph = base
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    wanted = peft_model(folder, config, tmp_path / "prefix")
    report = ak.onnx.inject(graph, tmp_path / "prefix", tmp_path / "out.onnx")
    assert report.difference == 0
    session = ak.onnx.Session(report.out)
    told = session.run(feeds(IDS.numpy(), {}, COUNT + 4))
    close(torch.tensor(told["logits"]), torch.tensor(wanted), tolerance=1e-4)
    past = {name: told[name.replace("past_key_values", "present")] for name in nothing(session)}
    assert {array.shape[2] for array in past.values()} == {COUNT + 4}
    session.run(feeds(np.array([[7]]), past, COUNT + 5))
    plain = ak.onnx.Session(graph)
    one, other = (s.run(feeds(IDS.numpy(), nothing(s)))["logits"] for s in (session, plain))
    np.testing.assert_array_equal(one, other)
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == graph.read_bytes()


def test_new_tokens_beside_a_change_of_the_embedding(tmp_path):
    table = np.random.default_rng(0).normal(size=(16, 8)).astype("f4")
    path = graphs.saved(
        graphs.graph("embedding", torch.nn.Embedding.from_pretrained(torch.tensor(table))), tmp_path / "e"
    )
    new, A, B = torch.randn(2, 8), torch.randn(2, 16), torch.randn(8, 2)
    updates = (ak.METHODS["textual_inversion"](P=new), ak.METHODS["lora"](A=A, B=B))
    adapter = ak.Adapter({ak.Target("0", "in out *k"): updates[1:], ak.Target("0"): updates[:1]})
    report = ak.onnx.inject(path, adapter, tmp_path / "out.onnx")
    whole = np.concatenate([table + (B @ A).T.numpy(), new.numpy()])
    ids = np.array([[3, 16, 0], [17, 15, 16]])
    np.testing.assert_allclose(graphs.run(report.out, ids), whole[ids], atol=1e-5)


def test_what_context_refuses(base, encoders, tmp_path):
    _, graph = base
    out = tmp_path / "out.onnx"

    def of(name, **tensors):
        return ak.Adapter({ak.Target(""): (ak.METHODS[name](**tensors),)})

    gate = {"gate": torch.randn(1, 8), "gate_bias": torch.zeros(1)}
    gated = of("gated_prefix", P=torch.randn(1, 2, 1, 4, 4), **gate)
    for error, match, adapter, words in (
        (ShapeMismatch, "the vectors have 6 channels", of("prompt", P=torch.randn(2, 6)), {}),
        (ShapeMismatch, "the prefix has 3 layers", of("prefix", P=torch.randn(3, 2, 1, 4, 4)), {}),
        (Unsupported, "prompts and prefixes cannot be slots", of("prompt", P=torch.randn(2, 8)), {"mode": "slots"}),
        (TargetNotFound, "no module of this name", gated, {}),
    ):
        with pytest.raises(error, match=match):
            ak.onnx.inject(graph, adapter, out, **words)
    proto = graphs.built("matmul")[2]
    path = graphs.saved(proto, tmp_path / "base.onnx")
    with pytest.raises(TargetNotFound, match="no inputs for past"):
        ak.onnx.inject(path, of("prefix", P=torch.randn(3, 2, 2, 4, 8)), out)
    with pytest.raises(TargetNotFound, match="no embedding of tokens"):
        ak.onnx.inject(path, of("prompt", P=torch.randn(2, 8)), out)
    folder, path = encoders("Bert")
    for error, match, target, dim in (
        (ShapeMismatch, "the vectors have 8 channels, but the embedding has 32", "embeddings", 8),
        (TargetNotFound, "the module encoder has 0 embeddings of input_ids", "encoder", 32),
    ):
        adapter = ak.Adapter({ak.Target(target): (ak.METHODS["prompt"](P=torch.randn(2, dim)),)})
        with pytest.raises(error, match=match):
            ak.onnx.inject(path, adapter, out)
    config = transformers.BertConfig.from_pretrained(folder, is_decoder=True)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "decoder")
    path = ak.onnx.export_pretrained(tmp_path / "decoder", tmp_path / "past", check=False).out
    adapter = ak.Adapter({ak.Target("bert.embeddings"): (ak.METHODS["prompt"](P=torch.randn(2, 32)),)})
    with pytest.raises(Unsupported, match="because later position ids would include the tokens"):
        ak.onnx.inject(path, adapter, out)
    assert not out.exists()


def encoder(kind):
    """An encoder that adds positions to its tokens, and what gives a row its positions."""
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 24, "pad_token_id": 1}
    sizes |= {"embedding_size": 32} if kind == "Electra" else {}
    torch.manual_seed(1)
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Kind -> (the folder, its graph)."""

    def made(kind):
        def make(folder):
            encoder(kind).save_pretrained(folder / "base")
            ak.onnx.export_pretrained(folder / "base", folder / "graph")

        folder = once(tmp_path_factory, f"encoder-{kind}", make)
        return folder / "base", folder / "graph" / "model.onnx"

    return made


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Bert", pytest.param("Roberta", marks=pytest.mark.long), "Electra"])
def test_a_soft_prompt_behind_embeddings_with_positions(kind, encoders, tmp_path, close):
    _, graph = encoders(kind)
    P = torch.randn(COUNT, 32)
    adapter = ak.Adapter({ak.Target("embeddings"): (ak.METHODS["prompt"](P=P),)})
    report = ak.onnx.inject(graph, adapter, tmp_path / "out.onnx")
    assert report.difference == 0
    assert "positions of other tokens do not count" in report.note
    ids, mask = torch.tensor([[5, 9, 2, 13], [7, 4, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    live = encoder(kind)
    ak.torch.inject(live, adapter)
    wanted = live(input_ids=ids, attention_mask=mask).last_hidden_state
    front = torch.arange(WORDS, WORDS + COUNT)[None].expand(2, -1)
    full = torch.cat((torch.ones_like(front), mask), 1)
    given = {"input_ids": torch.cat((front, ids), 1), "attention_mask": full, "token_type_ids": torch.zeros_like(full)}
    session = ak.onnx.Session(report.out)
    arrays = {entry: given[entry].numpy() for entry in session.inputs}
    got = torch.tensor(session.run(arrays)["last_hidden_state"])
    close(got[full.bool()], wanted[full.bool()], tolerance=1e-5)
    plain = {**arrays, "input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    plain = {entry: array[:, : ids.shape[1]] for entry, array in plain.items()}
    # With its optimizations, onnxruntime fuses the embeddings of some bases, and the fused node rounds otherwise.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    injected, base = (onnxruntime.InferenceSession(str(path), options).run(None, plain) for path in (report.out, graph))
    for one, other in zip(injected, base, strict=True):
        np.testing.assert_array_equal(one, other)
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == graph.read_bytes()
