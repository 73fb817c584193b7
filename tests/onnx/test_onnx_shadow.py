"""Shadow in graphs: the network beside the model, traced and put into the graph, computes what PEFT's does."""

import copy
import json
import os
from functools import cache, partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import onnx_ir as ir
import peft
import pytest
import torch
from onnx_graphs import in_steps
from peft_cases import gpt2, llama
from shared_graphs import IDS, OPEN, Called, base, exported, pretrained
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)  # fmt: skip

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from adapterkit.io.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])


def one_head():
    """Cosines of positions are as wide as the model itself."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, tie_word_embeddings=False))


def gemma():
    """Embeddings are multiplied in their module, and layers see windows of two lengths."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, sliding_window=3, layer_types=kinds))


def opt():
    """The blocks are in the body's decoder, so many that their names, sorted as text, are not in order."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 12, "max_position_embeddings": 16}
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=11, num_attention_heads=2))


def small():
    """The model of the vectors."""
    sizes = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def shadow(**options):
    given = {"task_type": "CAUSAL_LM", "init_weights": False, "r": 3, "shadow_alpha": 0.7}
    return peft.ShadowConfig(**given | options)


SMALL = {"shadow_hidden_size": 4, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 6}
CASES = {
    "shared": (llama, shadow()),
    "own embeddings and two layers": (
        llama,
        shadow(
            share_embeddings=False, update_hidden_size=5, shadow_num_hidden_layers=2, target_modules=["model.layers.1"]
        ),
    ),
    "narrow": (llama, shadow(**SMALL, modules_to_save=["lm_head"])),
    "gpt-2": (gpt2, shadow(shadow_hidden_size=4)),
    "one head": (one_head, shadow()),
    "gemma": (gemma, shadow()),
    "opt": (opt, shadow(shadow_alpha=0.3)),
}


FIXED = {"narrow", "one head", "opt"}
"""Cases that ask for no open sizes, which cost four times the time; the others show them."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Model and what it is called with -> its graph, the model's config beside it."""
    return partial(exported, tmp_path_factory)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """The same, for as many rows and tokens as the examples have."""
    return partial(exported, tmp_path_factory, fixed=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Case -> PEFT's model, every trained number moved, and the folder that it wrote."""

    @cache
    def trained(case):
        build, config = CASES[case]
        torch.manual_seed(7)
        model = peft.get_peft_model(copy.deepcopy(base(build)), copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(str(folder))
        return model, folder

    return trained


def run(path, **feeds):
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return torch.tensor(ak.onnx.Session(path).run(arrays)["logits"])


LONG = {"own embeddings and two layers", "one head", "gemma", "opt"}


@torch.no_grad()
@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.long] if each in LONG else []) for each in CASES]
)
def test_a_graph_computes_what_peft_computes(case, graph, fixed, made, tmp_path, close):
    path = (fixed if case in FIXED else graph)(CASES[case][0])
    (model, adapter), out = made(case), tmp_path / "out.onnx"
    report = ak.onnx.inject(path, adapter, out, base_weights=None if case == "shared" else saved(case, tmp_path))
    assert report.reference is not None
    assert report.reference < 1e-5
    for ids in (IDS, IDS[:1, :1], IDS[:2].repeat(2, 1)[:, :5])[: 1 if case in FIXED else None]:
        wanted = model(input_ids=ids, use_cache=False).logits
        close(run(out, input_ids=ids), wanted, tolerance=1e-5)
    assert (run(path, input_ids=IDS) - model(input_ids=IDS).logits).abs().max() > 1e-3
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def saved(case, folder):
    base(CASES[case][0]).save_pretrained(folder / "base")
    return folder / "base"


@torch.no_grad()
def test_a_file_of_an_earlier_peft(fixed, tmp_path, close):
    folder = VECTORS / "formats" / "peft" / "shadow_narrow"
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base(small)), str(folder)).eval()
    out = ak.onnx.inject(fixed(small), folder, tmp_path / "out.onnx").out
    close(run(out, input_ids=IDS), model(input_ids=IDS).logits, tolerance=1e-5)


VECTOR = ak.read(VECTORS / "methods" / "shadow.adapter.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("target", VECTOR.updates, ids=str)
def test_a_state_that_an_input_brings(target, tmp_path, close):
    """A block that is one layer, and the states of the spec's own vectors."""
    held = open_checkpoint(VECTORS / "methods" / "shadow.expected.safetensors").tensors
    W, b, x, s, y = (
        held[f"{target.path}.{part}"].torch().float() for part in ("weight", "bias", "x", "call.shadow", "y")
    )
    layer = nn.Linear(5, 5)
    layer.weight, layer.bias = nn.Parameter(W.T if target.layout == "in out *k" else W), nn.Parameter(b)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = layer

        def forward(self, x, s):
            return self.block(x) + 0 * s

    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    ak.onnx.export(Model().eval(), (x, s), path, input_names=["x", "s"], output_names=["logits"])
    adapter = ak.Adapter({ak.Target("block"): VECTOR.updates[target]})
    with pytest.raises(UsageError, match=r"no input nowhere|base's config\.json"):
        ak.onnx.inject(path, adapter, out)
    ak.onnx.inject(path, adapter, out, call={"shadow": "s"})
    close(run(out, x=x, s=s), y, tolerance=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ["shared", "gpt-2"])
def test_behind_a_past_its_tokens_are_read_anew(case, made, tmp_path, tmp_path_factory, close):
    model, adapter = made(case)
    folder, path = pretrained(tmp_path_factory, CASES[case][0])
    report = ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=folder)
    assert "past_input_ids takes the token ids of the past" in report.note
    assert report.reference is not None
    assert report.reference < 1e-5
    session = ak.onnx.Session(report.out)
    for mask in (torch.ones_like(IDS), PADDED):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        call = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        wanted = model(input_ids=IDS, **call).logits
        for cuts in ((0, 6), (0, 4, 6), (0, 1, 2, 5, 6)):
            got = in_steps(session, IDS, cuts, mask, positions, *cached(base(CASES[case][0]).config))
            close(got[mask.bool()], wanted[mask.bool()], tolerance=1e-5)


def cached(config):
    """Heads of a past, and channels of each."""
    heads = config.num_attention_heads
    return getattr(config, "num_key_value_heads", heads), config.hidden_size // heads


@torch.no_grad()
def test_masks_positions_and_embeddings(fixed, made, tmp_path, close):
    (model, adapter), seen = made("shared"), PADDED.bool()
    out = tmp_path / "out.onnx"
    ak.onnx.inject(fixed(llama, "input_ids", "attention_mask", "position_ids"), adapter, out)
    call = {"attention_mask": PADDED, "position_ids": torch.tensor([[0, 0, 0, 5, 6, 9], [2, 3, 4, 5, 6, 7], [1] * 6])}
    wanted = model(input_ids=IDS, **call, use_cache=False).logits
    close(run(out, input_ids=IDS, **call)[seen], wanted[seen], tolerance=1e-5)
    ak.onnx.inject(fixed(llama, "inputs_embeds", "attention_mask"), adapter, out)
    embeds = model.get_input_embeddings()(IDS)
    wanted = model(input_ids=IDS, attention_mask=PADDED, use_cache=False).logits
    close(run(out, inputs_embeds=embeds, attention_mask=PADDED)[seen], wanted[seen], tolerance=1e-5)


@torch.no_grad()
def test_blocks_in_any_order_and_without_names_of_nodes(fixed, made, tmp_path, close):
    model, folder = made("shared")
    adapter, unnamed = ak.read(folder), ir.load(fixed(llama))
    for node in unnamed.graph:
        node.name = ""
    turned = adapter.replace(updates=dict(reversed(adapter.updates.items())), foreign=None)
    ak.onnx.inject(unnamed, turned, tmp_path / "out.onnx", base_weights=saved("shared", tmp_path))
    close(run(tmp_path / "out.onnx", input_ids=IDS), model(input_ids=IDS).logits, tolerance=1e-5)


@torch.no_grad()
def test_in_half_precision(fixed, made, tmp_path):
    model, adapter = made("narrow")
    out = ak.onnx.inject(fixed(llama, dtype=torch.float16), adapter, tmp_path / "out.onnx").out
    got = run(out, input_ids=IDS)
    assert got.dtype == torch.float16
    wanted = model(input_ids=IDS).logits
    assert (got.float() - wanted).abs().max() < 5e-3 * wanted.abs().max()


@torch.no_grad()
def test_what_a_lora_changes_inside_a_block(fixed, made, tmp_path, close):
    """Beside the blocks' own formula, as in torch."""
    adapter = ak.read(made("shared")[1])
    A, B = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8, 2)
    both = {**adapter.updates, ak.Target("model.layers.1.self_attn.q_proj"): (ak.METHODS["lora"](A=A, B=B),)}
    adapter = adapter.replace(updates=both, foreign=None)
    live = copy.deepcopy(base(llama))
    ak.torch.inject(live, adapter)
    out = ak.onnx.inject(fixed(llama), adapter, tmp_path / "out.onnx").out
    close(run(out, input_ids=IDS), live(IDS, use_cache=False).logits, tolerance=1e-5)


@torch.no_grad()
def test_an_export_with_the_network_beside_it(made, tmp_path, close):
    model, adapter = made("narrow")
    report = ak.onnx.export(
        Called(copy.deepcopy(base(llama)), ("input_ids",)).eval(), (IDS,), tmp_path / "out.onnx", adapter=adapter,
        mode="attached", inside="model", input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes=((OPEN,),),
    )  # fmt: skip
    assert report.difference < 1e-5
    close(run(report.out, input_ids=IDS[:2, :4]), model(input_ids=IDS[:2, :4]).logits, tolerance=1e-5)
    with pytest.raises(Unsupported, match="no cache of the earlier tokens") as raised:
        ak.onnx.export_pretrained(saved("narrow", tmp_path), tmp_path / "out", adapter=adapter, mode="attached")
    assert "inject the adapter into the graph" in raised.value.cure


def test_nothing_reads_the_state_behind_the_last_block(fixed, made, tmp_path):
    out = ak.onnx.inject(fixed(llama), made("shared")[1], tmp_path / "out.onnx").out
    model = ir.load(out)
    used = {value for node in model.graph for value in node.inputs} | {*model.graph.outputs}
    assert not [node.name for node in model.graph if not used & {*node.outputs}]
    stored = [name for name in model.graph.initializers if "model.layers.1" in name and "shadow" in name]
    assert sorted(name.rpartition(".")[2] for name in stored) == ["down", "up"]


def test_a_graph_of_fixed_sizes_has_a_network_of_fixed_sizes(fixed, made, tmp_path):
    out = ak.onnx.inject(fixed(llama), made("shared")[1], tmp_path / "out.onnx").out
    shapes, before = (
        [value.shape for node in ir.load(path).graph for value in node.outputs if value.shape is not None]
        for path in (out, fixed(llama))
    )
    assert len(shapes) > len(before) + 99
    assert [shape for shape in shapes if not shape.is_static()] == []


def test_what_is_refused(fixed, made, tmp_path):
    _, adapter = made("shared")
    out = tmp_path / "out.onnx"
    bare = tmp_path / "model.onnx"
    bare.write_bytes(fixed(llama).read_bytes())
    with pytest.raises(UsageError, match=r"config\.json is needed .*, but there is none beside the graph"):
        ak.onnx.inject(bare, adapter, out)
    for config, error, match in (
        ({"model_type": "nothing"}, Unsupported, "no model type 'nothing'"),
        ({}, Unsupported, "no model type None"),
        (
            json.loads(base(llama).config.to_json_string()) | {"hidden_size": "x"},
            Malformed,
            "cannot create a model from",
        ),
        (base(gpt2).config.to_dict(), ShapeMismatch, "but a GPT2Model has"),
        (json.loads(base(llama).config.to_json_string()) | {"intermediate_size": 14}, ShapeMismatch, "LlamaModel"),
        (json.loads(base(llama).config.to_json_string()) | {"model_type": "bert"}, Unsupported, "for a BertModel"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=match) as raised:
            ak.onnx.inject(bare, adapter, out)
        assert raised.value.where in ("model.layers.0", "network")
    with pytest.raises(Unsupported, match="its formula reads the model's inputs shadow"):
        ak.onnx.inject(fixed(llama), adapter, out, mode="slots")
    masked = ir.load(fixed(llama, "input_ids", "attention_mask", "position_ids"))
    masked.graph.inputs[1].name = "seen"
    with pytest.raises(Unsupported, match="the graph's input seen is not an input of the side network") as raised:
        ak.onnx.inject(masked, adapter, out, base_weights=saved("shared", tmp_path))
    assert "--call attention_mask=seen" in raised.value.cure
    ak.onnx.inject(masked, adapter, out, base_weights=saved("shared", tmp_path), call={"attention_mask": "seen"})
    out.unlink()
    with pytest.raises(TargetNotFound, match="2 of 2 targets are not in the base"):
        ak.onnx.inject(fixed(gpt2), adapter, out)
    assert not out.exists()
