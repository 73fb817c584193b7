"""Formulas that look at the model's call or beside its attentions, in graphs: onnxruntime computes what PEFT does."""

import copy
import os
from functools import cache, partial

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnx_ir as ir
import peft
import pytest
import shared_graphs
import torch
from onnx_graphs import in_steps
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from peft_cases import gpt2, llama
from safetensors.torch import save_file
from shared_graphs import IDS, exported, pretrained

import adapterkit as ak
from adapterkit.errors import Unsupported, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def base(build):
    model = copy.deepcopy(shared_graphs.base(build))
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Model -> its graph, sizes open."""
    return partial(exported, tmp_path_factory)


def trained(build, config, folder):
    """PEFT's model, every trained number moved, and its file."""
    torch.manual_seed(7)
    made = peft.get_peft_model(copy.deepcopy(base(build)), config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    made.save_pretrained(str(folder))
    return made.eval()


def lora(**options):
    given = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**given | options)


def poly(**options):
    given = {"task_type": "CAUSAL_LM", "init_weights": False, "r": 3, "n_tasks": 3, "n_skills": 2}
    return peft.PolyConfig(**given | options)


CASES = {
    "alora": (llama, lora(alora_invocation_tokens=[3, 4], use_rslora=True), {}),
    "alora of one token": (llama, lora(alora_invocation_tokens=[2], target_modules=["v_proj"], lora_bias=True), {}),
    "alora of gpt-2": (gpt2, lora(alora_invocation_tokens=[3, 4], target_modules=["c_attn", "c_fc"]), {}),
    "lily": (llama, peft.LilyConfig(task_type="CAUSAL_LM", init_weights=False, r=3, num_B=2, scaling=0.5), {}),
    "poly": (llama, poly(target_modules=["q_proj", "down_proj"]), {"task_ids": np.array([1, 0, 2])}),
    "poly in splits": (
        llama,
        poly(target_modules=["q_proj", "up_proj"], n_splits=2),
        {"task_ids": np.array([2, 0, 0])},
    ),
    "adaption prompt": (llama, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2), {}),
    "adaption prompt of gpt-2": (
        gpt2,
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
        {},
    ),
}
"""Name -> a model, a config, and what a run brings besides tokens."""


def run(path, ids=IDS, **more):
    return torch.tensor(ak.onnx.Session(path).run({"input_ids": ids.numpy(), **more})["logits"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_graph_computes_what_peft_computes(case, graphs, tmp_path, close):
    build, config, call = CASES[case]
    words = {name: torch.tensor(array) for name, array in call.items()}
    wanted = trained(build, config, tmp_path / "adapter")(input_ids=IDS, **words)
    report = ak.onnx.inject(graphs(build), tmp_path / "adapter", tmp_path / "out.onnx")
    assert ("task_ids takes a task's number" in (report.note or "")) == bool(call)
    close(run(report.out, **call), wanted.logits, tolerance=1e-5)
    assert (run(graphs(build)) - wanted.logits).abs().max() > 1e-3
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == graphs(build).read_bytes()


@torch.no_grad()
def test_a_task_that_is_told_is_in_the_graph(graphs, tmp_path, close):
    model = trained(llama, poly(target_modules=["q_proj"]), tmp_path / "adapter")
    out = ak.onnx.inject(graphs(llama), tmp_path / "adapter", tmp_path / "out.onnx", call={"task_ids": 1}).out
    close(run(out), model(input_ids=IDS, task_ids=torch.tensor([1, 1, 1])).logits, tolerance=1e-5)
    with pytest.raises(UsageError, match="is not a valid value for task_ids"):
        ak.onnx.inject(graphs(llama), tmp_path / "adapter", tmp_path / "out.onnx", call={"task_ids": [0, 1]})


@torch.no_grad()
def test_tokens_of_another_name_and_of_a_past(graphs, tmp_path, tmp_path_factory, close):
    model = trained(llama, lora(alora_invocation_tokens=[3, 4]), tmp_path / "adapter")
    wanted = model(input_ids=IDS).logits
    graph, out = ir.load(graphs(llama)), tmp_path / "out.onnx"
    graph.graph.inputs[0].name = "words"
    with pytest.raises(Unsupported, match="no input input_ids"):
        ak.onnx.inject(graph, tmp_path / "adapter", out)
    for call, match in (({"input_ids": "no"}, "no input no"), ({"task_ids": 1}, "no update reads task_ids")):
        with pytest.raises(UsageError, match=match):
            ak.onnx.inject(graph, tmp_path / "adapter", out, call=call)
    assert not out.exists()
    ak.onnx.inject(graph, tmp_path / "adapter", out, call={"input_ids": "words"})
    close(torch.tensor(ak.onnx.Session(out).run({"words": IDS.numpy()})["logits"]), wanted, tolerance=1e-5)

    _, graph = pretrained(tmp_path_factory, llama)
    report = ak.onnx.inject(graph, tmp_path / "adapter", tmp_path / "past.onnx")
    assert "past_input_ids takes the token ids" in report.note
    session = ak.onnx.Session(report.out)
    past = {name: np.zeros((3, 1, 0, 4), np.float32) for name in session.inputs if name.startswith("past_key")}
    got = []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        feeds = {
            "input_ids": IDS[:, start:stop].numpy(), "past_input_ids": IDS[:, :start].numpy(),
            "attention_mask": np.ones((3, stop), np.int64), "position_ids": np.arange(start, stop)[None].repeat(3, 0),
        }  # fmt: skip
        told = session.run({**feeds, **past})
        past = {name: told[name.replace("past_key_values", "present")] for name in past}
        got.append(torch.tensor(told["logits"]))
    # A cache was filled before the second 3, 4 of the first row: there the two differ, as in PEFT's own generation.
    close(torch.cat(got, 1)[1:], wanted[1:], tolerance=1e-5)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three experts as PEFT wrote them, each with one direction that is far ahead of the others."""
    made = []
    for position in range(3):
        torch.manual_seed(position)
        wrapped = peft.get_peft_model(copy.deepcopy(base(llama)), lora(lora_alpha=3 + position))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
                if "lora_A" in name:
                    parameter[1:] *= 0.05
        made.append(tmp_path_factory.mktemp("expert"))
        wrapped.save_pretrained(str(made[-1]))
    return made


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
def test_arrow_with_its_experts(top_k, experts, graphs, tmp_path, close):
    config = ArrowConfig(top_k=top_k, router_temperature=0.5, rng_seed=1)
    paths = [str(folder) for folder in experts]
    model = create_arrow_model(copy.deepcopy(base(llama)), paths, config)
    wanted = model.eval()(input_ids=IDS).logits
    model.save_pretrained(str(tmp_path / "router"))
    with pytest.raises(UsageError, match="experts"):
        ak.onnx.inject(graphs(llama), tmp_path / "router" / "arrow_router", tmp_path / "out.onnx")
    report = ak.onnx.inject(graphs(llama), tmp_path / "router" / "arrow_router", tmp_path / "out.onnx", experts=experts)
    close(run(report.out), wanted, tolerance=1e-5)


CLASSIFIERS = {
    "one layer": {"xlora_depth": 1},
    "best two": {"xlora_depth": 2, "top_k_lora": 2, "softmax_temperature": 0.3},
    "no softmax": {"xlora_depth": 3, "xlora_dropout_p": 0.0, "enable_softmax": False},
    "layerwise": {"xlora_depth": 2, "layerwise_scalings": True, "enable_softmax_topk": True, "top_k_lora": 2},
}


def xlora(case, experts, folder):
    """PEFT's model, and its file whole."""
    named = {str(position): str(path) for position, path in enumerate(experts)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=8, xlora_size=5, adapters=named, **CLASSIFIERS[case])
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base(llama)), config).eval()
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    # Its own saving loses layers of the classifier.
    state = {f"base_model.{n.partition('base_model.')[2]}": t for n, t in model.state_dict().items()}
    kept = {name: t for name, t in state.items() if "internal_xlora_classifier" in name}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_xlora_reads_a_first_pass(case, experts, graphs, tmp_path, close):
    model = xlora(case, experts, tmp_path / "router")
    router, out = ak.read(tmp_path / "router"), tmp_path / "out.onnx"
    if case == "layerwise":
        with pytest.raises(Unsupported, match="in the order of the torch model"):
            ak.onnx.inject(graphs(llama), router, out, experts=experts)
        live = copy.deepcopy(base(llama))
        ak.onnx.inject(graphs(llama), ak.torch.inject(live, router, experts=list(map(ak.read, experts))).adapter(), out)
    else:
        ak.onnx.inject(graphs(llama), router, out, experts=experts)
    close(run(out), model(input_ids=IDS).logits, tolerance=1e-5)
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == graphs(llama).read_bytes()


def test_a_first_pass_needs_a_graph_that_shows_it(graphs, tmp_path):
    tensors = {"A": torch.randn(3, 2, 8), "B": torch.randn(3, 8, 2), "strengths": torch.ones(3)}
    update = ak.METHODS["xlora"](**tensors, last=torch.randn(3, 8), last_bias=torch.zeros(3))
    adapter, out = ak.Adapter({ak.Target("model.layers.0.self_attn.q_proj"): (update,)}), tmp_path / "out.onnx"
    with pytest.raises(UsageError, match="no value nowhere"):
        ak.onnx.inject(graphs(llama), adapter, out, call={"hidden_states": "nowhere"})
    with pytest.raises(UsageError, match="no input nowhere"):
        ak.onnx.inject(graphs(llama), adapter, out, call={"input_ids": "nowhere"})
    assert not out.exists()


@torch.no_grad()
@pytest.mark.parametrize("case", ["one layer", "best two"])
def test_xlora_behind_a_past(case, experts, tmp_path, tmp_path_factory, close):
    """Step by step what PEFT computes of all tokens at once."""
    model = xlora(case, experts, tmp_path / "router")
    _, path = pretrained(tmp_path_factory, llama)
    report = ak.onnx.inject(path, tmp_path / "router", tmp_path / "out.onnx", experts=experts)
    assert "past_input_ids takes the token ids" in report.note
    session = ak.onnx.Session(report.out)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    for own in (torch.ones_like(mask), mask):
        positions = (own.cumsum(-1) - 1).clamp(min=0)
        wanted = model(input_ids=IDS, attention_mask=own, position_ids=positions, use_cache=False).logits
        for cuts in ((0, 6), (0, 4, 6), (0, 1, 2, 5, 6)):
            got = in_steps(session, IDS, cuts, own, positions, 1, 4)
            close(got[own.bool()], wanted[own.bool()], tolerance=1e-5)
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_what_routed_formulas_refuse_as_slots(graphs, tmp_path):
    trained(llama, lora(alora_invocation_tokens=[3, 4]), tmp_path / "adapter")
    with pytest.raises(Unsupported, match="its formula reads the model's inputs input_ids"):
        ak.onnx.inject(graphs(llama), tmp_path / "adapter", tmp_path / "out.onnx", mode="slots")
