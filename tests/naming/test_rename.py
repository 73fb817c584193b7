"""Rules for names, by `--rename` and `rename=`, in every verb; and the names of a family's file in graphs."""

import json

import numpy as np
import onnx
import pytest
import torch
from command_line import record, run
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, StorageError, TargetNotFound, UsageError

H = 4
RNG = np.random.default_rng(7)
OWN, OTHER = "model.layers.{}.self_attn.q_proj", "net.block.{}.att.query"
RULE = "net.block.{n}.att.query=model.layers.{n}.self_attn.q_proj"
WEIGHTS = {OWN.format(n): RNG.normal(size=(H, H)).astype("f4") for n in range(2)}
A, B = RNG.normal(size=(2, H)).astype("f4"), RNG.normal(size=(H, 2)).astype("f4")


def save_adapter(folder, name):
    """A PEFT adapter with the same factors in two layers, of scaling 2."""
    folder.mkdir()
    stems = [f"base_model.model.{name.format(n)}" for n in range(2)]
    keys = {f"{stem}.lora_{letter}.weight": leaf for stem in stems for letter, leaf in (("A", A), ("B", B))}
    save_file(keys, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name.rpartition(".")[2]], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def save_base(folder, names=OWN, **config):
    folder.mkdir()
    tensors = {f"{names.format(n)}.weight": WEIGHTS[OWN.format(n)] for n in range(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    return folder


def merged_weights():
    return {f"{name}.weight": W.astype("f8") + 2 * B.astype("f8") @ A.astype("f8") for name, W in WEIGHTS.items()}


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return save_adapter(tmp_path / "adapter", OTHER)


@pytest.fixture
def own(tmp_path):
    return save_adapter(tmp_path / "own", OWN)


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.txt"
    file.write_text(f"# the other tool's names\n\n  {RULE}  \n")
    return f"@{file}"


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = torch.nn.Module()
        self.self_attn.q_proj = torch.nn.Linear(H, H, bias=False)

    def forward(self, x):
        return self.self_attn.q_proj(x)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(Block() for _ in range(2))
        self.load_state_dict({f"{name}.weight": torch.from_numpy(W) for name, W in WEIGHTS.items()})

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return x


def save_graph(path, names=OWN):
    """Two layers, one after the other; their names stand in the initializers alone."""
    held = [numpy_helper.from_array(WEIGHTS[OWN.format(n)], f"{names.format(n)}.weight") for n in range(2)]
    nodes = []
    for n, (x, y) in enumerate((("x", "h"), ("h", "y"))):
        nodes.append(helper.make_node("Transpose", [held[n].name], [f"t{n}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, f"t{n}"], [y], f"n{n}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, H]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def graph_output(path, x):
    import onnxruntime

    return onnxruntime.InferenceSession(path.read_bytes()).run(None, {"x": x})[0]


def assert_merged(folder):
    found, wanted = load_file(folder / "model.safetensors"), merged_weights()
    assert found.keys() == wanted.keys()
    for name, W in wanted.items():
        np.testing.assert_allclose(found[name], W, rtol=1e-6, atol=1e-6)


def output():
    """An input, and what the changed layers make of it, in float64."""
    x = RNG.normal(size=(3, H)).astype("f4")
    y = x.astype("f8")
    for W in merged_weights().values():
        y = y @ W.T
    return x, y


def test_python_merges_verifies_plans_and_lists(base, adapter, rules, tmp_path):
    for number, rename in enumerate((RULE, [RULE], rules, [rules])):
        out = tmp_path / f"out{number}"
        ak.merge(base, adapter, out, rename=rename)
        assert_merged(out)
        assert ak.verify(out, base, adapter, rename=rename).ok
        found = ak.names(base, adapter, rename=rename)
        assert found["rules"] == [{"rule": f"user {RULE}", "targets": 2}]
        assert [each["path"] for each in found["targets"]] == [OWN.format(0), OWN.format(1)]
    with pytest.raises(TargetNotFound):
        ak.names(base, adapter)


def test_the_map_of_a_base_alone(base):
    assert [each["name"] for each in ak.names(base)["weights"]] == ["model.layers.#.self_attn.q_proj"]


def test_a_changed_rules_file_is_another_merge(base, adapter, rules, tmp_path):
    ak.merge(base, adapter, tmp_path / "out", rename=rules)
    (tmp_path / "rules.txt").write_text("net=nothing")
    with pytest.raises(TargetNotFound):
        ak.merge(base, adapter, tmp_path / "out", rename=rules)


def test_a_rule_need_match_one_of_several_adapters(base, adapter, own, tmp_path):
    ak.merge(base, [adapter, own], tmp_path / "out", weights=[0.5, 0.5], rename=RULE)
    assert_merged(tmp_path / "out")
    assert ak.verify(tmp_path / "out", base, [adapter, own], weights=[0.5, 0.5], rename=RULE).ok
    with pytest.raises(TargetNotFound, match="'x=y' matches no target"):
        ak.merge(base, [adapter, own], tmp_path / "no", rename=[RULE, "x=y"])


def test_combine_diff_resize_and_convert_without_a_base(adapter, own, rules, tmp_path):
    assert record("diff", adapter, own, "--rename", RULE)["equal"] is True
    assert record("diff", adapter, own, "--rename", rules)["equal"] is True
    assert ak.ops.compare(adapter, own, rename=RULE).equal is True
    record("combine", adapter, own, "--rename", rules, "-o", tmp_path / "both")
    both = ak.read(tmp_path / "both")
    for n in range(2):
        np.testing.assert_allclose(both.delta(OWN.format(n)).numpy(), 4 * B @ A, rtol=1e-5)
    record("resize", adapter, "--rank", "2", "--rename", RULE, "-o", tmp_path / "resized")
    record("convert", adapter, tmp_path / "converted", "--to", "adapterkit", "--rename", RULE)
    for name in ("resized", "converted"):
        made = ak.read(tmp_path / name)
        assert {target.path for target in made.updates} == {OWN.format(0), OWN.format(1)}
        assert ak.ops.compare(made, own).equal is True
    assert made.recipe[-1].args == {"rules": [RULE]}


def test_convert_validate_and_inspect_with_a_base(base, adapter, own, tmp_path):
    record("convert", adapter, tmp_path / "a", "--to", "peft", "--base", base, "--match-base", "--rename", RULE)
    assert ak.ops.compare(tmp_path / "a", own).equal is True
    assert record("validate", adapter, "--base", base, "--rename", RULE)["ok"] is True
    assert record("inspect", adapter, "--base", base, "--rename", RULE)["names"]["fits"] is True
    assert run("validate", adapter, "--base", base).exit_code == 2
    for command in (("validate", adapter), ("inspect", adapter)):
        refused = run(*command, "--rename", RULE)
        assert (refused.exit_code, "--rename requires --base" in refused.stderr) == (2, True)


def test_a_merge_of_a_combination(base, adapter, own, tmp_path):
    words = ("--method", "linear", "--weight", "0.5", "--weight", "0.5", "--rename", RULE, "--verify")
    found = record("merge", base, adapter, own, "-o", tmp_path / "out", *words)
    assert found["verification"]["ok"] is True
    assert_merged(tmp_path / "out")


def test_extract_from_a_model_under_other_names(base, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    save_file(
        {f"{OTHER.format(n)}.weight": W.astype("f4") for n, W in enumerate(merged_weights().values())},
        tuned / "model.safetensors",
    )
    words = ("extract", tuned, "--base", base, "--rank", "2", "-o", tmp_path / "made")
    assert run(*words).exit_code == 2
    record(*words, "--rename", RULE)
    found = ak.read(tmp_path / "made").delta(OWN.format(1))
    np.testing.assert_allclose(found.numpy(), 2 * B @ A, rtol=1e-4, atol=1e-5)


def test_extract_finds_names_of_another_version_of_transformers(tmp_path):
    """A tuned LLaVA saved by transformers 5, and its base as older versions saved it."""
    live, stored = "model.language_model.layers.{}.self_attn.q_proj", "language_model.model.layers.{}.self_attn.q_proj"
    base = save_base(tmp_path / "base", stored, model_type="llava")
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    save_file(
        {f"{live.format(n)}.weight": W.astype("f4") for n, W in enumerate(merged_weights().values())},
        tuned / "model.safetensors",
    )
    made = ak.ops.extract(tuned, base, rank=2)
    np.testing.assert_allclose(made.delta(stored.format(0)).numpy(), 2 * B @ A, rtol=1e-4, atol=1e-5)


def test_a_live_model(adapter, rules):
    model = Net()
    x, y = output()
    for rename in (RULE, rules):
        handle = ak.torch.inject(model, ak.read(adapter), rename=rename)
        np.testing.assert_allclose(model(torch.from_numpy(x)).detach(), y, rtol=1e-4, atol=1e-4)
        assert {target.path for target in handle.adapter().updates} == {OWN.format(0), OWN.format(1)}
        handle.remove()
    with pytest.raises(TargetNotFound, match="'x=y' matches no target"):
        ak.torch.inject(model, ak.read(adapter), rename="x=y")
    with pytest.raises(TargetNotFound):
        ak.torch.inject(model, ak.read(adapter))


def test_a_graph(adapter, rules, tmp_path):
    graph = save_graph(tmp_path / "g.onnx")
    x, y = output()
    assert run("inject", graph, adapter, "-o", tmp_path / "no.onnx").exit_code == 2
    for name, words in {
        "injected": ("inject", graph, adapter), "merged": ("merge", graph, adapter),
        "slots": ("inject", graph, adapter, "--mode", "slots"),
    }.items():  # fmt: skip
        out = tmp_path / f"{name}.onnx"
        record(*words, "-o", out, "--rename", rules)
        if name != "slots":
            np.testing.assert_allclose(graph_output(out, x), y, rtol=1e-4, atol=1e-4)
    found = record("merge", graph, adapter, "--plan", "--rename", RULE)
    assert [each["target"] for each in found["targets"]] == [OWN.format(0), OWN.format(1)]


def test_an_export(adapter, tmp_path):
    x, y = output()
    for mode in ("merged", "slots"):
        out = tmp_path / f"{mode}.onnx"
        ak.onnx.export(Net().eval(), (torch.from_numpy(x),), out, adapter=adapter, mode=mode, rename=RULE)
        if mode != "slots":
            import onnxruntime

            session = onnxruntime.InferenceSession(out)
            found = session.run(None, {session.get_inputs()[0].name: x})[0]
            np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["beside", "base"])
def test_a_graph_has_the_names_of_its_family(how, tmp_path):
    """A graph of a ViT of transformers 5, and an adapter that was trained under transformers 4."""
    live, trained = "vit.layers.{}.attention.q_proj", "vit.encoder.layer.{}.attention.attention.query"
    (tmp_path / "graph").mkdir()
    graph = save_graph(tmp_path / "graph" / "g.onnx", live)
    adapter = save_adapter(tmp_path / "a", trained)
    options = {}
    if how == "base":
        options["base_weights"] = save_base(tmp_path / "base", trained, model_type="vit")
    else:
        (tmp_path / "graph" / "config.json").write_text('{"model_type": "vit"}')
    x, y = output()
    ak.onnx.inject(graph, adapter, tmp_path / "injected.onnx", **options)
    ak.onnx.merge(graph, adapter, tmp_path / "merged.onnx", **options)
    for name in ("injected", "merged"):
        np.testing.assert_allclose(graph_output(tmp_path / f"{name}.onnx", x), y, rtol=1e-4, atol=1e-4)


def test_two_targets_that_become_one_are_refused(adapter):
    with pytest.raises(UsageError, match="two targets would get the name net"):
        ak.ops.resize(adapter, 1, rename="net.block.{n}.att.query=net.x")


def test_rules_files_that_cannot_be_read_are_refused(base, adapter, tmp_path):
    with pytest.raises(StorageError):
        ak.names(base, adapter, rename=f"@{tmp_path / 'nothing'}")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Malformed, match="not valid UTF-8"):
        ak.names(base, adapter, rename=f"@{tmp_path / 'bytes'}")
    (tmp_path / "large").write_bytes(b"#" * (1 << 21))
    with pytest.raises(Malformed, match="1,048,576 bytes"):
        ak.names(base, adapter, rename=f"@{tmp_path / 'large'}")
    (tmp_path / "nested").write_text("@other")
    with pytest.raises(UsageError, match="a rules file cannot contain '@other'"):
        ak.names(base, adapter, rename=f"@{tmp_path / 'nested'}")
    refused = run("names", base, adapter, "--rename", f"@{tmp_path / 'nothing'}")
    assert (refused.exit_code, "Traceback" in refused.output) == (6, False)
