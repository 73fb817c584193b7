"""Folders of graphs as one model: each graph takes the targets that it has, and no other one's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import record
from command_line import run as command
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import StorageError, TargetNotFound, Unsupported, UsageError
from adapterkit.methods import METHODS
from adapterkit.onnx.roles import same_layers

SIZE = 6
ENCODER, DECODER = "model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"
CROSS = "model.decoder.layers.0.encoder_attn.k_proj"


def weight(name):
    """The numbers of a layer, by its name in the base."""
    return np.random.default_rng(sum(map(ord, name))).normal(size=(SIZE, SIZE)).astype("f4")


def value(name, kind=TensorProto.FLOAT, shape=("n", SIZE)):
    return helper.make_tensor_value_info(name, kind, list(shape))


def layer(path, name, into, out, tensor):
    """A node as torch's older exporter names it, and its weight `[in, out]` without a name."""
    node = helper.make_node("MatMul", [into, tensor], [out], name=f"/{path.replace('.fc1', '/fc1')}/MatMul")
    return node, numpy_helper.from_array(np.ascontiguousarray(weight(name).T), tensor)


def written(folder, name, nodes, weights, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / name)


def optimum(folder):
    """A folder by optimum's names: an encoder without that word in its names, and three decoders."""
    folder.mkdir()
    node, W = layer("layers.0.fc1", ENCODER, "x", "y", "onnx::MatMul_1")
    written(folder, "encoder_model.onnx", [node], [W], [value("x")], [value("y")])
    (one, V), (two, K) = (
        layer(DECODER, DECODER, "x", "h", "onnx::MatMul_1"),
        layer("model/decoder/layers.0/encoder_attn/k_proj", CROSS, "x", "k", "onnx::MatMul_2"),
    )
    both = [one, two, helper.make_node("Add", ["h", "k"], ["y"])]
    written(folder, "decoder_model.onnx", both, [V, K], [value("x")], [value("y")])
    past = layer(DECODER, DECODER, "x", "y", "onnx::MatMul_1")[0]
    written(folder, "decoder_with_past_model.onnx", [past], [V], [value("x")], [value("y")])
    branches = {
        "then_branch": helper.make_graph([past], "with_past", [], [value("y")]),
        "else_branch": helper.make_graph(both, "without", [], [value("y")]),
    }
    choice = helper.make_node("If", ["use_cache_branch"], ["out"], **branches)
    inputs = [value("x"), value("use_cache_branch", TensorProto.BOOL, [1])]
    written(folder, "decoder_model_merged.onnx", [choice], [V, K], inputs, [value("out")])
    (folder / "config.json").write_text(json.dumps({"is_encoder_decoder": True}))
    (folder / "generation_config.json").write_text("{}")
    return folder


def adapter(*names, method="lora"):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype("f4"))

    make = {
        "lora": lambda: METHODS["lora"](A=draw(2, SIZE), B=draw(SIZE, 2), scaling=0.5),
        "ia3": lambda: METHODS["ia3"](l=draw(SIZE)),
        "dora": lambda: METHODS["dora"](A=draw(2, SIZE), B=draw(SIZE, 2), magnitude=draw(SIZE).abs() + 1, scaling=0.5),
    }[method]
    return Adapter({Target(name): (make(),) for name in names})


def changed(held, name):
    """The weight with the adapter, by the papers' formulas in float64."""
    update, W = held.updates[Target(name)][0], weight(name).astype("f8")
    arrays = {key: leaf.numpy().astype("f8") for key, leaf in update.tensors.items()}
    if "l" in arrays:
        return W * arrays["l"].reshape(-1, 1)
    V = W + update.scaling * arrays["B"] @ arrays["A"]
    return V if "magnitude" not in arrays else V * (arrays["magnitude"] / np.linalg.norm(V, axis=1))[:, None]


def run(file, **more):
    x = np.random.default_rng(1).normal(size=(3, SIZE)).astype("f4")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return x, session.run(None, {"x": x, **more})[0]


def check_all(folder, held):
    """Hold each graph, in each branch, against the formula."""
    W = {name: changed(held, name) for name in (ENCODER, DECODER, CROSS)}
    whole = W[DECODER] + W[CROSS]
    cases = [
        ("encoder_model.onnx", W[ENCODER], {}), ("decoder_model.onnx", whole, {}),
        ("decoder_with_past_model.onnx", W[DECODER], {}),
        ("decoder_model_merged.onnx", W[DECODER], {"use_cache_branch": np.array([True])}),
        ("decoder_model_merged.onnx", whole, {"use_cache_branch": np.array([False])}),
    ]  # fmt: skip
    for name, M, more in cases:
        x, y = run(folder / name, **more)
        np.testing.assert_allclose(y, x @ M.T, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("way", ["inject", "merge"])
def test_each_graph_takes_its_own_targets(tmp_path, method, way):
    folder, held = optimum(tmp_path / "model"), adapter(ENCODER, DECODER, CROSS, method=method)
    out = tmp_path / "out"
    report = getattr(ak.onnx, way)(folder, held, out)
    check_all(out, held)
    counts = {name: len(part.found) for name, part in report.parts.items()}
    assert counts == {
        "decoder_model.onnx": 2, "decoder_model_merged.onnx": 2, "decoder_with_past_model.onnx": 1,
        "encoder_model.onnx": 1,
    }  # fmt: skip
    assert report.difference is not None
    assert report.difference < 1e-5
    assert {file.name for file in report.files} == {file.name for file in folder.iterdir()}
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_slots_of_each_graph_have_an_adapter_file(tmp_path):
    folder, held = optimum(tmp_path / "model"), adapter(ENCODER, DECODER, CROSS)
    ak.onnx.inject(folder, held, tmp_path / "out", mode="slots")
    for name, M in (("encoder_model", ENCODER), ("decoder_with_past_model", DECODER)):
        session = ak.onnx.Session(tmp_path / "out" / f"{name}.onnx")
        session.load("a", tmp_path / "out" / f"{name}.onnx_adapter")
        x, base = run(folder / f"{name}.onnx")
        np.testing.assert_array_equal(session.run({"x": x})["y"], base)
        np.testing.assert_allclose(session.run({"x": x}, "a")["y"], x @ changed(held, M).T, rtol=2e-4, atol=2e-5)


def test_graph_without_targets_stays_bit_for_bit(tmp_path):
    folder = optimum(tmp_path / "model")
    report = ak.onnx.inject(folder, adapter(DECODER), tmp_path / "out")
    assert "encoder_model.onnx" not in report.parts
    same = (tmp_path / "out" / "encoder_model.onnx").read_bytes()
    assert same == (folder / "encoder_model.onnx").read_bytes()


def test_targets_of_no_graph_are_named_with_the_nearest(tmp_path):
    folder, lost = optimum(tmp_path / "model"), "model.decoder.layers.0.fc9"
    with pytest.raises(TargetNotFound, match=r"no graph of the folder.*fc1.*--allow-partial") as caught:
        ak.onnx.inject(folder, adapter(DECODER, lost), tmp_path / "out")
    assert caught.value.where == lost
    assert not (tmp_path / "out").exists()
    report = ak.onnx.inject(folder, adapter(DECODER, lost), tmp_path / "out", allow_partial=True)
    assert any(lost in line for line in report.warnings)
    with pytest.raises(TargetNotFound):
        ak.onnx.merge(folder, adapter(lost), tmp_path / "other", allow_partial=True)


def test_partial_adapters_for_one_graph(tmp_path):
    folder, held = optimum(tmp_path / "model"), adapter(DECODER, CROSS)
    graph, out = folder / "decoder_with_past_model.onnx", tmp_path / "out.onnx"
    for way in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(TargetNotFound):
            way(graph, held, out)
        report = way(graph, held, out, allow_partial=True)
        assert any(CROSS in line for line in report.warnings)
        x, y = run(out)
        np.testing.assert_allclose(y, x @ changed(held, DECODER).T, rtol=2e-4, atol=2e-5)


def test_one_graph_never_takes_two_parts_targets_for_one_layer(tmp_path):
    """Without its folder, an encoder's layer could be the encoder's or the decoder's."""
    folder = optimum(tmp_path / "model")
    (folder / "encoder_model.onnx").rename(tmp_path / "model_a.onnx")
    (folder / "decoder_with_past_model.onnx").rename(tmp_path / "model_b.onnx")
    both = tmp_path / "both"
    both.mkdir()
    for name in ("model_a.onnx", "model_b.onnx"):
        (tmp_path / name).rename(both / name)
    with pytest.raises(TargetNotFound):
        ak.onnx.inject(both, adapter(ENCODER, DECODER), tmp_path / "out")


def test_nameless_layers_are_not_taken_for_missing(tmp_path):
    folder = optimum(tmp_path / "model")
    model = onnx.load(folder / "decoder_with_past_model.onnx")
    model.graph.node[0].name = "n1"
    onnx.save(model, folder / "decoder_with_past_model.onnx")
    with pytest.raises(TargetNotFound, match=r"names are lost.*--base-weights"):
        ak.onnx.inject(folder, adapter(DECODER, ENCODER), tmp_path / "out")
    from safetensors.numpy import save_file

    save_file({f"{name}.weight": weight(name) for name in (ENCODER, DECODER, CROSS)}, tmp_path / "base.safetensors")
    held = adapter(ENCODER, DECODER, CROSS)
    ak.onnx.inject(folder, held, tmp_path / "out", base_weights=tmp_path / "base.safetensors")
    check_all(tmp_path / "out", held)


def test_places_that_are_refused(tmp_path):
    folder, held = optimum(tmp_path / "model"), adapter(DECODER)
    with pytest.raises(UsageError, match="own folder"):
        ak.onnx.inject(folder, held, folder)
    with pytest.raises(UsageError, match="folder of several graphs"):
        ak.onnx.inject(folder, held, tmp_path / "out.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no graph"):
        ak.onnx.inject(tmp_path / "empty", held, tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.onnx").write_bytes(b"")
    with pytest.raises(StorageError, match=r"mine\.onnx"):
        ak.onnx.inject(folder, held, other)
    prompt = Adapter({Target(""): (METHODS["prompt"](P=torch.zeros(2, SIZE)),)})
    with pytest.raises(Unsupported, match="several graphs"):
        ak.onnx.inject(folder, prompt, tmp_path / "out")


def test_overwritten_folders_keep_what_no_model_has(tmp_path):
    folder, out = optimum(tmp_path / "model"), tmp_path / "out"
    ak.onnx.inject(folder, adapter(DECODER), out)
    (out / "NOTES.md").write_text("mine")
    held = adapter(ENCODER, DECODER, CROSS)
    ak.onnx.merge(folder, held, out)
    check_all(out, held)
    assert (out / "NOTES.md").read_text() == "mine"


def test_a_wrong_branch_is_seen_by_the_check(tmp_path, monkeypatch):
    """The made-up inputs take the branch with a past; the other one is tried as well."""
    from adapterkit.onnx import attaching, resolving

    folder, resolve = optimum(tmp_path / "model"), resolving.resolve
    graph = folder / "decoder_model_merged.onnx"

    def forgetful(*arguments):
        from dataclasses import replace

        return [replace(place, spots=place.spots[:1]) for place in resolve(*arguments)]

    assert len(resolve(ak.onnx.model_file.opened(graph).model, adapter(DECODER))[0].spots) == 2
    monkeypatch.setattr("adapterkit.onnx.injecting.resolve", forgetful)
    assert attaching is not None
    with pytest.raises(ak.errors.CheckFailed):
        ak.onnx.inject(graph, adapter(DECODER), tmp_path / "out.onnx")


def test_a_branch_that_the_check_cannot_run_is_said(tmp_path):
    """Its reshape suits no input, so that the original graph fails there, too."""
    graph = optimum(tmp_path / "model") / "decoder_model_merged.onnx"
    proto = onnx.load(graph)
    (choice,) = (node for node in proto.graph.node if node.op_type == "If")
    branch = next(part.g for part in choice.attribute if part.name == "else_branch")
    last = branch.output[0].name
    odd = helper.make_tensor("odd_size", onnx.TensorProto.INT64, [1], [999_983])
    producer = next(node for node in branch.node if last in node.output)
    producer.output[0] = "before_the_reshape"
    branch.node.append(helper.make_node("Constant", [], ["odd_shape"], value=odd))
    branch.node.append(helper.make_node("Reshape", ["before_the_reshape", "odd_shape"], [last]))
    onnx.save(proto, graph)
    report = ak.onnx.inject(graph, adapter(DECODER), tmp_path / "out.onnx")
    assert report.difference < 1e-5
    assert "use_cache_branch = False does not run" in report.note


def test_roles_of_genai_come_from_its_config(tmp_path):
    folder = optimum(tmp_path / "model")
    for name in ("decoder_model.onnx", "decoder_model_merged.onnx"):
        (folder / name).unlink()
    (folder / "encoder_model.onnx").rename(folder / "a.onnx")
    (folder / "decoder_with_past_model.onnx").rename(folder / "b.onnx")
    config = {"model": {"encoder": {"filename": "a.onnx"}, "decoder": {"filename": "b.onnx"}, "type": "whisper"}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    held = adapter(ENCODER, DECODER)
    report = ak.onnx.merge(folder, held, tmp_path / "out")
    assert {name: len(part.found) for name, part in report.parts.items()} == {"a.onnx": 1, "b.onnx": 1}
    x, y = run(tmp_path / "out" / "a.onnx")
    np.testing.assert_allclose(y, x @ changed(held, ENCODER).T, rtol=2e-4, atol=2e-5)


def test_commands_take_folders(tmp_path):
    folder, out = optimum(tmp_path / "model"), tmp_path / "out"
    held = adapter(ENCODER, DECODER, CROSS)
    ak.write(held, tmp_path / "a.safetensors", format="adapterkit")
    told = record("inspect", folder)
    assert [(each["name"], each["part"], each["layers"]) for each in told["graphs"]] == [
        ("decoder_model.onnx", "decoder", 2), ("decoder_model_merged.onnx", "decoder", 2),
        ("decoder_with_past_model.onnx", "decoder", 1), ("encoder_model.onnx", "encoder", 1),
    ]  # fmt: skip
    for verb, there in (("inject", out), ("merge", tmp_path / "m")):
        told = record(verb, folder, tmp_path / "a.safetensors", "-o", there)
        assert told["graphs"]["decoder_model.onnx"]["targets"] == 2
        check_all(there, held)
    assert record("inject", folder, tmp_path / "a.safetensors", "-o", out)["already_done"]
    shown = command("merge", folder, tmp_path / "a.safetensors", "--plan")
    assert shown.exit_code == 0, shown.output
    assert "6 targets" in shown.stdout


def forms(folder):
    """A folder as sentence-transformers writes it: a graph, and a form of it that packs two layers without names."""
    folder.mkdir()
    names = ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", ENCODER.removeprefix("model.encoder."))
    (q, Q), (v, V), (last, W) = (
        layer(name.replace(".self_attn.", "/self_attn/"), name, into, out, f"onnx::MatMul_{at}")
        for at, (name, into, out) in enumerate(zip(names, ("x", "x", "h"), ("q", "v", "y"), strict=True))
    )
    both = helper.make_node("Add", ["q", "v"], ["h"])
    written(folder, "model.onnx", [q, v, both, last], [Q, V, W], [value("x")], [value("y")])
    packed = np.concatenate([weight(name) for name in names[:2]]).T
    nodes = [
        helper.make_node("MatMul", ["x", "packed"], ["qv"]),
        helper.make_node("Split", ["qv", "sizes"], ["q", "v"], axis=-1), both, last,
    ]  # fmt: skip
    held = [
        numpy_helper.from_array(np.ascontiguousarray(packed), "packed"),
        numpy_helper.from_array(np.array([SIZE, SIZE]), "sizes"),
    ]
    written(folder, "model_O2.onnx", nodes, [*held, W], [value("x")], [value("y")])
    save_file({f"{name}.weight": torch.from_numpy(weight(name)) for name in names}, folder.parent / "b.safetensors")
    return names


@pytest.mark.parametrize("way", ["inject", "merge"])
def test_each_form_of_a_graph_gets_the_whole_adapter(tmp_path, way):
    """An optimizer lost the names of two layers in one form; the other form has them, so they must not be left out."""
    names, folder, out = forms(tmp_path / "model"), tmp_path / "model", tmp_path / "out"
    held, change = adapter(*names), getattr(ak.onnx, way)
    with pytest.raises(TargetNotFound, match="another variant of the same graph has it \\(2 targets\\)") as caught:
        change(folder, held, out)
    assert "model_O2.onnx" in caught.value.why
    assert "--base-weights DIR" in caught.value.cure
    assert "--allow-partial" in caught.value.cure
    assert not out.exists()
    (told,) = change(folder, held, out, allow_partial=True).warnings
    assert "model_O2.onnx does not have them" in told
    change(folder, held, out, base_weights=tmp_path / "b.safetensors")
    for name in ("model.onnx", "model_O2.onnx"):
        x, y = run(out / name)
        h = x @ (changed(held, names[0]) + changed(held, names[1])).T
        np.testing.assert_allclose(y, h @ changed(held, names[2]).T, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("way", ["inject", "merge"])
def test_a_target_of_another_part_is_not_for_a_single_graph(tmp_path, way):
    """The encoder's graph has a layer of the decoder's name, since it omits the word `encoder`."""
    graph, out = optimum(tmp_path / "model") / "encoder_model.onnx", tmp_path / "out.onnx"
    change = getattr(ak.onnx, way)
    with pytest.raises(TargetNotFound, match="the graph is the model's encoder") as caught:
        change(graph, adapter(DECODER), out)
    assert "--allow-partial" in caught.value.cure
    held = adapter(ENCODER, DECODER)
    (told,) = change(graph, held, out, allow_partial=True).warnings
    assert DECODER in told
    x, y = run(out)
    np.testing.assert_allclose(y, x @ changed(held, ENCODER).T, rtol=2e-4, atol=2e-5)
    other = graph.rename(tmp_path / "model.onnx")  # Its name no longer tells, so the layer's name decides.
    assert len(change(other, adapter(ENCODER), out).found) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("model", "model_fp16", True), ("model_q4f16", "model_quantized", True),
        ("model_qint8_avx512_vnni", "model", True), ("model_O2", "model_merged", True),
        ("decoder_model", "decoder_model_merged_q4", True), ("decoder_model_merged", "decoder_model", False),
        ("decoder_model", "decoder_with_past_model", False), ("encoder_model", "decoder_model", False),
    ],
)  # fmt: skip
def test_names_of_forms(one, other, same):
    assert same_layers(Path(f"onnx/{one}.onnx"), Path(f"onnx/{other}.onnx")) == same
    assert not same_layers(Path(f"unet/{one}.onnx"), Path(f"vae/{other}.onnx"))


@pytest.mark.parametrize("way", ["inject", "slots", "merge"])
def test_norms_of_an_encoder_and_in_both_branches(tmp_path, way):
    """The encoder's graph omits the word `encoder`; one vector serves both branches of the decoder's If."""
    folder, rng = tmp_path / "model", np.random.default_rng(2)
    folder.mkdir()
    vectors = [numpy_helper.from_array(rng.normal(size=SIZE).astype("f4"), name) for name in ("g", "onnx::b")]
    words = ("LayerNormalization", ["x", "g", "onnx::b"], ["y"])

    def norm(module):
        return helper.make_node(*words, f"/{module}/LayerNormalization", axis=-1, epsilon=1e-5)

    written(folder, "encoder_model.onnx", [norm("layers.0/norm")], vectors, [value("x")], [value("y")])
    branch = norm("model/decoder/layers.0/norm")
    branches = {
        "then_branch": helper.make_graph([branch], "with_past", [], [value("y")]),
        "else_branch": helper.make_graph([branch], "without", [], [value("y")]),
    }
    choice = helper.make_node("If", ["use_cache_branch"], ["out"], **branches)
    inputs = [value("x"), value("use_cache_branch", TensorProto.BOOL, [1])]
    written(folder, "decoder_model_merged.onnx", [choice], vectors, inputs, [value("out")])
    new = {
        f"model.{part}.layers.0.norm": {key: torch.from_numpy(rng.normal(size=SIZE).astype("f4")) for key in names}
        for part, names in (("encoder", ("weight", "bias")), ("decoder", ("weight", "bias")))
    }
    held = Adapter({Target(name): (METHODS["replacement"](**each),) for name, each in new.items()})
    out = tmp_path / "out"
    report = ak.onnx.merge(folder, held, out) if way == "merge" else ak.onnx.inject(
        folder, held, out, mode="constant" if way == "inject" else "slots")  # fmt: skip
    assert {name: len(part.found) for name, part in report.parts.items()} == {
        "encoder_model.onnx": 1, "decoder_model_merged.onnx": 1,
    }  # fmt: skip
    cases = [("encoder", "encoder_model.onnx", {})]
    cases += [
        ("decoder", "decoder_model_merged.onnx", {"use_cache_branch": np.array([past])}) for past in (True, False)
    ]
    for part, name, more in cases:
        target = Target(f"model.{part}.layers.0.norm")
        own = Adapter({target: held.updates[target]})
        feeds = ak.onnx.fit(out / name, own) if way == "slots" else {}
        x, y = run(out / name, **more, **feeds)
        parameters = new[target.path]
        wanted = torch.nn.functional.layer_norm(torch.from_numpy(x), (SIZE,), *parameters.values(), eps=1e-5)
        np.testing.assert_allclose(y, wanted.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{name} {more}")


@pytest.mark.parametrize("way", ["merge", "slots"])
def test_a_subfolder_of_a_targets_name_is_its_only_place(tmp_path, way):
    """SDXL's text encoders have the same layer names; each takes only the targets under its own folder's name."""
    for name in ("text_encoder", "text_encoder_2"):
        (tmp_path / "model" / name).mkdir(parents=True)
        node, W = layer("text_model/encoder/layers.0/fc1", ENCODER, "x", "y", "onnx::MatMul_1")
        written(tmp_path / "model" / name, "model.onnx", [node], [W], [value("x")], [value("y")])
    paths = [f"{name}.text_model.encoder.layers.0.fc1" for name in ("text_encoder", "text_encoder_2")]
    both = adapter(*paths)
    W = weight(ENCODER).astype("f8")
    for one in (both, both.replace(updates={Target(paths[0]): both.updates[Target(paths[0])]})):
        out = tmp_path / f"out{len(one.updates)}"
        if way == "merge":
            ak.onnx.merge(tmp_path / "model", one, out)
        else:
            ak.onnx.inject(tmp_path / "model", both, out, mode="slots")
            session = ak.onnx.FolderSession(out, {"a": one})
        for path in paths:
            name = f"{path.split('.')[0]}/model.onnx"
            update = one.updates.get(Target(path))
            M = W if update is None else W + 0.5 * (update[0].B @ update[0].A).numpy()
            x, y = run(out / name)
            got = y if way == "merge" else session.run(name, {"x": x}, "a")["y"]
            np.testing.assert_allclose(got, x @ M.T, rtol=2e-4, atol=2e-5, err_msg=name)
    path = paths[0].partition(".")[2]
    bare = both.replace(updates={Target(path): both.updates[Target(paths[0])]})
    with pytest.raises(TargetNotFound, match=r"text_encoder/model\.onnx and text_encoder_2/model\.onnx both have") as e:
        getattr(ak.onnx, "merge" if way == "merge" else "inject")(tmp_path / "model", bare, tmp_path / "out")
    rule, other = re.findall(r"--rename (\S+)", e.value.cure)
    assert [given.partition("=")[2] for given in (rule, other)] == paths
    if way == "merge":
        assert [*ak.onnx.merge(tmp_path / "model", bare, tmp_path / "out", rename=rule).parts] == [
            "text_encoder/model.onnx"
        ]
        return
    with pytest.raises(TargetNotFound, match="both have this target"):
        session.load("a", bare)
    session.load("a", bare, rename=rule)
    x = np.ones((2, SIZE), "f4")
    (update,) = both.updates[Target(paths[0])]
    for path, M in zip(paths, (W + 0.5 * (update.B @ update.A).numpy(), W), strict=True):
        got = session.run(f"{path.split('.')[0]}/model.onnx", {"x": x}, "a")["y"]
        np.testing.assert_allclose(got, x @ M.T, rtol=2e-4, atol=2e-5)


def test_one_rule_names_the_part_of_all_targets_that_two_parts_have(tmp_path):
    for name in ("text_encoder", "text_encoder_2"):
        (tmp_path / "model" / name).mkdir(parents=True)
        into = {0: ("x", "h"), 1: ("h", "y")}
        layers = [layer(f"text_model/layers.{n}/fc1", ENCODER, *ends, f"onnx::{n}") for n, ends in into.items()]
        nodes, weights = zip(*layers, strict=True)
        written(tmp_path / "model" / name, "model.onnx", [*nodes], [*weights], [value("x")], [value("y")])
    both = adapter(*(f"text_model.layers.{n}.fc1" for n in range(2)))
    with pytest.raises(TargetNotFound, match="both have this target") as e:
        ak.onnx.merge(tmp_path / "model", both, tmp_path / "out")
    W, (first, second) = weight(ENCODER).astype("f8"), [each[0] for each in both.updates.values()]
    for rule, name in zip(re.findall(r"--rename (\S+)", e.value.cure), ("text_encoder", "text_encoder_2"), strict=True):
        out = tmp_path / f"out {name}"
        assert [*ak.onnx.merge(tmp_path / "model", both, out, rename=rule).parts] == [f"{name}/model.onnx"]
        x, y = run(out / name / "model.onnx")
        wanted = x @ (W + 0.5 * (first.B @ first.A).numpy()).T @ (W + 0.5 * (second.B @ second.A).numpy()).T
        np.testing.assert_allclose(y, wanted, rtol=2e-4, atol=2e-5)


def test_an_unchanged_graph_never_reads_a_merged_graphs_new_data(tmp_path):
    folder, size = tmp_path / "model", 64  # Smaller tensors would go into the model file.
    folder.mkdir()
    for name, path, data in (("a.onnx", DECODER, "a.onnx.data"), ("b.onnx", "other.fc9", "own.bin")):
        node = layer(path, ENCODER, "x", "y", "onnx::MatMul_1")[0]
        W = numpy_helper.from_array(np.eye(size, dtype="f4"), "onnx::MatMul_1")
        written(folder, name, [node], [W], [value("x", shape=("n", size))], [value("y", shape=("n", size))])
        model = onnx.load(folder / name)
        onnx.save(model, folder / name, save_as_external_data=True, location=data, size_threshold=0)
    other = onnx.load(folder / "b.onnx", load_external_data=False)
    other.graph.initializer[0].external_data[0].value = "a.onnx.data"
    onnx.save(other, folder / "b.onnx")
    lora = METHODS["lora"](A=torch.ones(2, size), B=torch.ones(size, 2), scaling=1.0)
    with pytest.raises(StorageError, match=r"the unchanged graph b\.onnx also reads this data file"):
        ak.onnx.merge(folder, Adapter({Target(DECODER): (lora,)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [2.0, ["x"], [float("nan")]])
@pytest.mark.parametrize("name", ["", "encoder_model.onnx"])
def test_weights_that_are_no_finite_numbers(tmp_path, weights, name):
    with pytest.raises(UsageError, match=r"weights .* are not (a list of numbers|all finite)"):
        ak.onnx.merge(optimum(tmp_path / "model") / name, adapter(ENCODER), tmp_path / f"out{name}", weights=weights)


def test_a_load_that_fails_leaves_the_old_adapter_in_all_graphs(tmp_path):
    held = adapter(ENCODER, DECODER, CROSS)
    ak.onnx.inject(optimum(tmp_path / "model"), held, tmp_path / "out", mode="slots")
    session = ak.onnx.FolderSession(tmp_path / "out", {"a": held})
    x = np.ones((1, SIZE), np.float32)
    before = {name: session.run(name, {"x": x}, "a")["y"] for name in ("decoder_model.onnx", "encoder_model.onnx")}
    narrow = METHODS["lora"](A=torch.ones(2, SIZE - 1), B=torch.ones(SIZE, 2), scaling=1.0)
    with pytest.raises(ak.errors.ShapeMismatch):  # The decoders come first, and their tensors fit.
        session.load("a", held.replace(updates={**adapter(DECODER).updates, Target(ENCODER): (narrow,)}))
    assert session.adapters == ("a",)
    for name, y in before.items():
        np.testing.assert_array_equal(session.run(name, {"x": x}, "a")["y"], y)
    with pytest.raises(UsageError, match="is not a string or None"):
        session.run("encoder_model.onnx", {"x": x}, {"a": 0.5})
    with pytest.raises(UsageError, match="cannot be made one"):
        session.run("encoder_model.onnx", {"x": torch.ones(1, SIZE, requires_grad=True)})
