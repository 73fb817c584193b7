"""Stacks of experts in torch's exports: a graph with an adapter computes what PEFT's model and float64 formulas do."""

import warnings

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, Unsupported
from adapterkit.methods import METHODS

MODES = ("constant", "slots", "inputs", "merge")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "Mixtral": {**GROUPED, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        **GROUPED, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["full_attention"],
    },
    "Qwen3Moe": {**GROUPED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {**SIZES, "intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        **SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip
PROMPT = torch.tensor([[5, 9, 2, 33], [1, 7, 8, 3]])


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def changed_by_peft(model, folder, targets, parameters):
    """Save an adapter of the model; return the function that computes the changed output."""
    torch.manual_seed(1)
    words = peft.LoraConfig(r=3, target_modules=targets, target_parameters=parameters, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = peft.get_peft_model(model, words).eval()
    for name, parameter in changed.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    changed.save_pretrained(folder)
    return changed


def exported(module, args, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, args, dynamo=True, verbose=False, **options).save(path)
    return path


def applied(mode, path, adapter, out, **options):
    if mode == "merge":
        return ak.onnx.merge(path, adapter, out, **options)
    return ak.onnx.inject(path, adapter, out, mode=mode, **options)


def ran(path, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize(
    "family",
    [
        "Mixtral",
        "GptOss",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("Qwen3Moe", "Olmoe", "DeepseekV3")),
    ],
)
def test_exports_compute_what_peft_computes(family, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "base")
    model.set_experts_implementation("batched_mm")
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    path = exported(
        Logits(model), (PROMPT,), tmp_path / "model.onnx", input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes={"input_ids": {0: rows, 1: columns}},
    )  # fmt: skip
    with torch.no_grad():
        plain = model(PROMPT).logits.numpy()
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    changed = changed_by_peft(model, tmp_path / "lora", ["o_proj"], stacks)
    feeds = {"input_ids": PROMPT.numpy()}
    for tokens in (PROMPT, PROMPT[:1, :1], PROMPT.repeat(1, 4)):
        feeds = {"input_ids": tokens.numpy()}
        with torch.no_grad():
            wanted = changed(tokens).logits.numpy()
        for mode in MODES:
            if tokens is PROMPT:
                report = applied(mode, path, tmp_path / "lora", tmp_path / f"{mode}.onnx")
                assert report.difference is not None, report.note
            if tokens is PROMPT and mode == "slots":
                np.testing.assert_allclose(ran(tmp_path / "slots.onnx", feeds), plain, atol=2e-5 * abs(plain).max())
            more = {}
            if mode in ("slots", "inputs"):
                more = ak.onnx.fit(tmp_path / f"{mode}.onnx", tmp_path / "lora")
            got = ran(tmp_path / f"{mode}.onnx", feeds | more)
            np.testing.assert_allclose(got, wanted, atol=2e-5 * abs(wanted).max())
    assert abs(wanted - ran(path, feeds)).max() > 0.1 * abs(wanted).max()


def test_a_product_with_all_experts_computes_what_peft_computes(tmp_path):
    """Llama 4 computes all experts for all tokens."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1
    )
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Llama4TextExperts(config)

        def forward(self, x):
            return self.experts(x)

    block = Block().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(20, 32)
    path = exported(block, (x,), tmp_path / "model.onnx", input_names=["x"])
    changed = changed_by_peft(block, tmp_path / "lora", [], ["experts.gate_up_proj", "experts.down_proj"])
    with torch.no_grad():
        wanted = changed(x).numpy()
    for mode in MODES:
        out = tmp_path / f"{mode}.onnx"
        applied(mode, path, tmp_path / "lora", out)
        more = ak.onnx.fit(out, tmp_path / "lora") if mode in ("slots", "inputs") else {}
        np.testing.assert_allclose(ran(out, {"x": x.numpy(), **more}), wanted, atol=2e-5 * abs(wanted).max())


EXPERTS, OUT, IN = 3, 6, 8
RNG = np.random.default_rng(0)
W = RNG.normal(size=(EXPERTS, OUT, IN))
X, CHOSEN = RNG.normal(size=(5, IN)), np.array([2, 0, 0, 2, 1])

FORMS = {
    "left": ("Gather", True, False),
    "left, GatherND": ("GatherND", True, False),
    "left, transposed": ("Gather", True, True),
    "right": ("Gather", False, False),
    "right, GatherND": ("GatherND", False, False),
    "right, transposed": ("GatherND", False, True),
}
"""The operator that selects weights, whether they are the left operand of the product, and whether they are transposed
between the two."""


def graph(path, form, dtype="f4", opset=17, bias=False, size=(OUT, IN)):
    """Write a graph that multiplies each row of x by the weight of its expert; return whether it stores `[out, in]`."""
    op, left, turned = FORMS[form]
    by_rows = left != turned
    stack = W[:, : size[0], : size[1]]
    held = {
        "mlp.experts.down_proj": stack if by_rows else stack.swapaxes(1, 2),
        "bias": RNG.normal(size=(EXPERTS, OUT)),
    }
    stored = [numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype)), name) for name, array in held.items()]
    stored += [numpy_helper.from_array(np.array([axis]), f"axis{axis}") for axis in (1, 2)]
    selected = "t" if turned else "g"
    nodes = [
        *([helper.make_node("Unsqueeze", ["chosen", "axis1"], ["at"])] if op == "GatherND" else []),
        helper.make_node(op, ["mlp.experts.down_proj", "at" if op == "GatherND" else "chosen"], ["g"], "/select"),
        *([helper.make_node("Transpose", ["g"], ["t"], perm=[0, 2, 1])] if turned else []),
        helper.make_node("Unsqueeze", ["x", "axis2" if left else "axis1"], ["row"]),
        helper.make_node("MatMul", [selected, "row"] if left else ["row", selected], ["product"], "/product"),
        helper.make_node("Squeeze", ["product", "axis2" if left else "axis1"], ["y" if not bias else "plain"]),
    ]
    if bias:
        nodes += [helper.make_node("Gather", ["bias", "chosen"], ["b"]), helper.make_node("Add", ["plain", "b"], ["y"])]
    number = {"f4": TensorProto.FLOAT, "f2": TensorProto.FLOAT16, "f8": TensorProto.DOUBLE}[dtype]
    ports = [helper.make_tensor_value_info("x", number, ["n", size[1]]),
             helper.make_tensor_value_info("chosen", TensorProto.INT64, ["n"]),
             helper.make_tensor_value_info("y", number, ["n", size[0]])]  # fmt: skip
    made = helper.make_graph(nodes, "experts", ports[:2], ports[2:], stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return by_rows


def update(method, out=OUT, into=IN, rank=2, seed=1):
    rng = np.random.default_rng(seed)
    tensor = lambda *shape: torch.from_numpy(rng.normal(size=(EXPERTS, *shape)))  # noqa: E731
    if method == "ia3":
        return METHODS["ia3"](l=tensor(out))
    if method == "ia3 on inputs":
        return METHODS["ia3"](l_in=tensor(into))
    factors = {"A": tensor(rank, into), "B": tensor(out, rank), "scaling": 0.5}
    return (
        METHODS["lora"](**factors) if method == "lora" else METHODS["dora"](**factors, magnitude=tensor(out).abs() + 1)
    )


def by_formula(method, one, W):
    """The changed weight of each expert, `[out, in]`, in float64."""
    held = {name: leaf.numpy() for name, leaf in one.tensors.items()}
    if method == "ia3":
        return W * held["l"][:, :, None]
    if method == "ia3 on inputs":
        return W * held["l_in"][:, None, :]
    V = W + 0.5 * held["B"] @ held["A"]
    if method == "lora":
        return V
    return V * (held["magnitude"] / np.linalg.norm(V, axis=2))[:, :, None]


def products(W, chosen=CHOSEN, x=X):
    return np.einsum("noi,ni->no", W[chosen], x)


METHODS_HERE = ("lora", "dora", "ia3", "ia3 on inputs")


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("form", FORMS)
def test_selected_weights_change_as_the_formula_says(form, method, tmp_path):
    by_rows = graph(tmp_path / "base.onnx", form)
    one = update(method)
    adapter = Adapter({Target("mlp.experts.down_proj", layout="e out *in" if by_rows else "e in out *k"): (one,)})
    wanted = products(by_formula(method, one, W))
    feeds = {"x": X.astype("f4"), "chosen": CHOSEN}
    plain = ran(tmp_path / "base.onnx", feeds)
    for mode in MODES:
        out = tmp_path / f"{mode}.onnx"
        report = applied(mode, tmp_path / "base.onnx", adapter, out)
        assert report.difference is not None, report.note
        more = ak.onnx.fit(out, adapter) if mode in ("slots", "inputs") else {}
        np.testing.assert_allclose(ran(out, feeds | more), wanted, atol=1e-5 * abs(wanted).max())
        none = {"x": np.zeros((0, IN), "f4"), "chosen": np.zeros(0, "i8")}
        assert ran(out, none | more).shape == (0, OUT)
    np.testing.assert_array_equal(ran(tmp_path / "slots.onnx", feeds), plain)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("form", ["left", "right"])
def test_an_update_may_see_the_transpose_of_the_product(form, method, tmp_path):
    """Formulas see weights in the layout of the base, whatever the graph multiplies them by."""
    by_rows = graph(tmp_path / "base.onnx", form)
    one = update(method, IN, OUT)
    adapter = Adapter({Target("mlp.experts.down_proj", layout="e in out *k" if by_rows else "e out *in"): (one,)})
    wanted = products(by_formula(method, one, W.swapaxes(1, 2)).swapaxes(1, 2))
    for mode in MODES:
        out = tmp_path / f"{mode}.onnx"
        applied(mode, tmp_path / "base.onnx", adapter, out)
        more = ak.onnx.fit(out, adapter) if mode in ("slots", "inputs") else {}
        got = ran(out, {"x": X.astype("f4"), "chosen": CHOSEN, **more})
        np.testing.assert_allclose(got, wanted, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize(("dtype", "near"), [("f2", 2e-2), ("f8", 1e-12)])
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_dtypes_and_operator_sets(opset, dtype, near, tmp_path):
    graph(tmp_path / "base.onnx", "left, GatherND", dtype, opset)
    one = update("lora", rank=1)
    adapter = Adapter({Target("mlp.experts.down_proj", layout="e out *in"): (one,)})
    wanted = products(by_formula("lora", one, W))
    for mode in MODES:
        out = tmp_path / f"{mode}.onnx"
        applied(mode, tmp_path / "base.onnx", adapter, out)
        more = ak.onnx.fit(out, adapter) if mode in ("slots", "inputs") else {}
        got = ran(out, {"x": X.astype(dtype), "chosen": CHOSEN, **more})
        np.testing.assert_allclose(got.astype("f8"), wanted, atol=near * abs(wanted).max())


def test_rows_of_a_stack_and_two_adapters(tmp_path):
    graph(tmp_path / "base.onnx", "left")
    first, second = update("lora", 2), update("lora", seed=5)
    target = Target("mlp.experts.down_proj", layout="e out *in")
    one = Adapter({Target(target.path, layout=target.layout, rows=(1, 3)): (first,)})
    feeds = {"x": X.astype("f4"), "chosen": CHOSEN}
    V = W.copy()
    V[:, 1:3] = by_formula("lora", first, V[:, 1:3])
    for mode in MODES:
        out = tmp_path / f"{mode}.onnx"
        applied(mode, tmp_path / "base.onnx", one, out)
        more = ak.onnx.fit(out, one) if mode in ("slots", "inputs") else {}
        np.testing.assert_allclose(ran(out, feeds | more), products(V), atol=1e-5 * abs(products(V)).max())
    pair = [one, Adapter({target: (second,)})]
    ak.onnx.merge(tmp_path / "base.onnx", pair, tmp_path / "both.onnx", weights=[2.0, -0.5])
    wanted = products(W + 2 * (V - W) - 0.5 * (by_formula("lora", second, W) - W))
    np.testing.assert_allclose(ran(tmp_path / "both.onnx", feeds), wanted, atol=1e-5 * abs(wanted).max())


def test_adapters_of_other_ranks_fit_the_slots(tmp_path):
    graph(tmp_path / "base.onnx", "right, GatherND")
    target = Target("mlp.experts.down_proj", layout="e in out *k")
    ranks = {rank: update("lora", rank=rank, seed=rank) for rank in (1, 3, 5)}
    ak.onnx.inject(tmp_path / "base.onnx", Adapter({target: (ranks[3],)}), tmp_path / "out.onnx", mode="slots")
    adapters = {str(rank): Adapter({target: (one,)}) for rank, one in ranks.items()}
    session = ak.onnx.Session(tmp_path / "out.onnx", adapters)
    for name, one in ranks.items():
        wanted = products(by_formula("lora", one, W))
        got = session.run({"x": X.astype("f4"), "chosen": CHOSEN}, str(name))["y"]
        np.testing.assert_allclose(got, wanted, atol=1e-5 * abs(wanted).max())


REFUSED = {
    "a bias": ({"bias": True}, update("ia3"), "ia3 changes a bias, and the biases of experts are in another stack"),
    "one weight": ({}, None, r"the update changes one weight, but the graph has a stack of experts there \(/select\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    words, one, why = REFUSED[name]
    graph(tmp_path / "base.onnx", "left", **words)
    layout = "e out *in"
    if one is None:
        layout, one = "out *in", METHODS["lora"](A=torch.ones(2, IN), B=torch.ones(OUT, 2))
    adapter = Adapter({Target("mlp.experts.down_proj", layout=layout): (one,)})
    for mode in MODES:
        with pytest.raises(Unsupported, match=why):
            applied(mode, tmp_path / "base.onnx", adapter, tmp_path / "out.onnx")


def test_weights_that_are_not_only_multiplied_are_refused_with_the_node(tmp_path):
    graph(tmp_path / "base.onnx", "left")
    model = onnx.load(tmp_path / "base.onnx")
    model.graph.node.append(helper.make_node("Relu", ["g"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", OUT, IN]))
    onnx.save(model, tmp_path / "base.onnx")
    adapter = Adapter({Target("mlp.experts.down_proj", layout="e out *in"): (update("lora"),)})
    for mode in MODES:
        with pytest.raises(Unsupported, match=r"its weight is read by a Gather \(/select\), which is not a layer"):
            applied(mode, tmp_path / "base.onnx", adapter, tmp_path / "out.onnx")


def test_square_weights_need_the_base_if_their_rows_are_inputs(tmp_path):
    """Both axes of gpt-oss's down_proj have the same size, also in the published models."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**{**FAMILIES["GptOss"], "intermediate_size": 32})
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "base")
    model.set_experts_implementation("batched_mm")
    path = exported(Logits(model), (PROMPT,), tmp_path / "model.onnx", input_names=["input_ids"])
    changed = changed_by_peft(model, tmp_path / "lora", ["o_proj"], ["mlp.experts.down_proj"])
    with torch.no_grad():
        wanted = changed(PROMPT).logits.numpy()
    for mode in MODES:
        out = tmp_path / f"{mode}.onnx"
        with pytest.raises(Unsupported, match=r"square \(32 x 32\).*--base-weights DIR \(base_weights=\)"):
            applied(mode, path, tmp_path / "lora", out)
        applied(mode, path, tmp_path / "lora", out, base_weights=tmp_path / "base")
        more = {}
        if mode in ("slots", "inputs"):
            with pytest.raises(Unsupported, match=r"--base-weights DIR \(base_weights=\)"):
                ak.onnx.fit(out, tmp_path / "lora")
            more = ak.onnx.fit(out, tmp_path / "lora", base_weights=tmp_path / "base")
        got = ran(out, {"input_ids": PROMPT.numpy(), **more})
        np.testing.assert_allclose(got, wanted, atol=2e-5 * abs(wanted).max())


def test_another_number_of_experts_is_refused(tmp_path):
    graph(tmp_path / "base.onnx", "left")
    more = update("lora").map(lambda leaf: torch.cat([leaf, leaf[:1]]))
    adapter = Adapter({Target("mlp.experts.down_proj", layout="e out *in"): (more,)})
    for mode in MODES:
        with pytest.raises(ShapeMismatch, match="e=4"):
            applied(mode, tmp_path / "base.onnx", adapter, tmp_path / "out.onnx")


def test_rows_of_a_batch_cannot_have_adapters_of_their_own(tmp_path):
    graph(tmp_path / "base.onnx", "left")
    adapter = Adapter({Target("mlp.experts.down_proj", layout="e out *in"): (update("lora"),)})
    with pytest.raises(Unsupported, match=r"--mode slots \(mode='slots'\)"):
        ak.onnx.inject(tmp_path / "base.onnx", adapter, tmp_path / "out.onnx", mode="rows")
