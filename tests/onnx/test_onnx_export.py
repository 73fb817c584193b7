"""Exports of small transformers with PEFT's adapters: onnxruntime writes and computes what transformers and PEFT do."""

import json
import os
import signal

import numpy as np
import peft
import pytest
import torch
import transformers
from command_line import run
from doomed_commands import Commands, tree

import adapterkit as ak
from adapterkit.errors import (
    CheckFailed,
    Malformed,
    NotMergeable,
    ShapeMismatch,
    StorageError,
    TargetNotFound,
    Unsupported,
    UsageError,
)
from adapterkit.io.lazy import as_array, from_numpy
from adapterkit.io.ort_adapter import OrtAdapter, read_ort_adapter, write_ort_adapter
from adapterkit.onnx import against_torch, exporting, model_file, pretrained

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|peft|torch)")
"""What PEFT and transformers say of one another, where they are the ones that are asked."""

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None, pad_token_id=0
    ),
    "bert": lambda: transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    ),
}  # fmt: skip
"""Of one layer, as the time of an export grows with them; other files run models of two layers with a past."""

MODELS = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertForSequenceClassification,
}
TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj"], "bert": ["query", "value", "dense"]}
PROMPT = torch.tensor([[5, 9, 2, 33]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family a base and two LoRA adapters of PEFT, of other ranks; made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def make(family):
        if family in made:
            return made[family]
        torch.manual_seed(len(family))
        base, places = root / family, [root / f"{family}_{name}" for name in ("first", "second")]
        MODELS[family](CONFIGS[family]()).save_pretrained(base)
        for place, rank in zip(places, (4, 2), strict=True):
            words = {"fan_in_fan_out": True} if family == "gpt2" else {}
            config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=TARGETS[family], **words)
            model = peft.get_peft_model(loaded(family, base), config)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn_like(parameter) * 0.3
            model.save_pretrained(place)
        made[family] = (base, *places)
        return made[family]

    return make


def loaded(family, base, adapter=None):
    """What transformers and PEFT themselves load."""
    model = MODELS[family].from_pretrained(base).eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()


def theirs(family, base, adapter=None):
    with torch.no_grad():
        whole = loaded(family, base, adapter).generate(
            input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=32, do_sample=False
        )
    return whole[0].tolist()


def ours(session, model, adapter=None):
    """Greedy, the prompt first and then token by token, on the past that the run before gave."""
    config, tokens = model.config, PROMPT[0].tolist()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    past = {name: np.zeros((1, heads, 0, width), np.float32) for name in session.inputs if name.startswith("past")}
    new = tokens
    for _ in range(32):
        feeds = {
            "input_ids": np.array([new]), "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens) - len(new), len(tokens))[None], **past,
        }  # fmt: skip
        told = session.run(feeds, adapter)
        past = {name: told[name.replace("past_key_values", "present")] for name in past}
        new = [int(told["logits"][0, -1].argmax())]
        tokens += new
    return tokens


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", "merged"),
        ("gpt2", "attached"),
        pytest.param("llama", "attached", marks=pytest.mark.long),
        pytest.param("gpt2", "merged", marks=pytest.mark.long),
    ],
)
def test_causal_models_write_what_peft_writes(family, mode, folders, tmp_path):
    base, first, _ = folders(family)
    report = ak.onnx.export_pretrained(base, tmp_path / "out", adapter=first, mode=mode)
    assert report.difference < 1e-4
    wanted = theirs(family, base, first)
    assert wanted != theirs(family, base)
    assert ours(ak.onnx.Session(report.out), loaded(family, base)) == wanted
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == family


@pytest.mark.parametrize("mode", ["merged", "attached", "slots"])
def test_experts_compute_as_in_peft(mode, tmp_path):
    """transformers' default computes experts by a grouped product, which torch cannot export."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    words = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks, init_lora_weights=False)
    changed = peft.get_peft_model(model, words).eval()
    changed.save_pretrained(tmp_path / "lora")
    report = ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "lora", mode=mode)
    with torch.no_grad():
        wanted = changed(PROMPT).logits.numpy()
    session = ak.onnx.Session(report.out, {"one": tmp_path / "lora"} if mode == "slots" else {})
    got = session.run({"input_ids": PROMPT.numpy()}, "one" if mode == "slots" else None)["logits"]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_exchanged_on_one_session(family, folders, tmp_path):
    base, first, second = folders(family)
    report = ak.onnx.export_pretrained(base, tmp_path / "out", adapter={"one": first, "two": second}, mode="slots")
    wanted = {None: theirs(family, base), "one": theirs(family, base, first), "two": theirs(family, base, second)}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    names = {name: report.out.with_name(f"{name}.onnx_adapter") for name in ("one", "two")}
    session, model = ak.onnx.Session(report.out, names), loaded(family, base)
    for name in ("one", None, "two", "one"):
        assert ours(session, model, name) == wanted[name]
        assert session.generate(PROMPT.numpy(), adapter=name).tolist() == [wanted[name]]
    # Without a mask, positions and a past it is the same; an end stops it; what is missing is named with its shape.
    whole = session.run({"input_ids": PROMPT.numpy()})["logits"]
    feeds = {"input_ids": PROMPT.numpy(), "attention_mask": np.ones_like(PROMPT.numpy())}
    assert np.array_equal(session.run(feeds)["logits"], whole)
    if "position_ids" in session.inputs:
        with pytest.raises(UsageError, match=r"position_ids \["):
            session.run(feeds | {"attention_mask": np.array([[0, 1, 1, 1]])})
        assert np.array_equal(session.run(feeds | {"position_ids": np.arange(4)[None]})["logits"], whole)
    stop = wanted[None][5]
    first_stop = wanted[None].index(stop, PROMPT.shape[1])
    assert session.generate(PROMPT[0].numpy(), end=stop).tolist() == [wanted[None][: first_stop + 1]]
    with pytest.raises(UsageError, match="input_ids"):
        session.run({})
    # Several texts, the shorter one padded on the left, each with its own length.
    texts, mask = np.array([[5, 9, 2, 33], [0, 0, 7, 8]]), np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        batch = loaded(family, base, first).generate(
            input_ids=torch.tensor(texts), attention_mask=torch.tensor(mask), max_new_tokens=6, do_sample=False
        )
    np.testing.assert_array_equal(session.generate(texts, attention_mask=mask, max_new_tokens=6, adapter="one"), batch)
    # A text that has ended is filled while the other goes on.
    stop = int(batch[0, 5])
    got = session.generate(texts, attention_mask=mask, max_new_tokens=6, adapter="one", end=[stop])
    assert (got[0, 5:] == stop).all()
    for given, match in (
        ((texts,), "a mask is required for 2 texts"),
        ((texts, mask[:, ::-1]), "excludes the last token"),
    ):
        with pytest.raises(UsageError, match=match):
            session.generate(given[0], attention_mask=given[1] if len(given) > 1 else None)
    assert repr(session).startswith("Session('model.onnx': input_ids, attention_mask")
    session.load("one", second)  # PEFT's own folder, in place of the first.
    assert ours(session, model, "one") == wanted["two"]


def feeds_of(ids, mask):
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": np.zeros_like(ids.numpy())}


@pytest.fixture(scope="module")
def classifier(folders, tmp_path_factory):
    """A BERT with slots for two adapters: (folders, the session, padded inputs, what PEFT computes by adapter)."""
    base, first, second = folders("bert")
    out = tmp_path_factory.mktemp("bert") / "out"
    report = ak.onnx.export_pretrained(base, out, adapter={"one": first, "two": second}, mode="slots")
    ids = torch.tensor([[3, 8, 1, 0], [2, 60, 41, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        wanted = {
            name: loaded("bert", base, adapter)(input_ids=ids, attention_mask=mask).logits
            for name, adapter in ((None, None), ("one", first), ("two", second))
        }
    files = {name: out / f"{name}.onnx_adapter" for name in ("one", "two")}
    return (base, first, second), ak.onnx.Session(report.out, files), feeds_of(ids, mask), wanted, report


def test_a_classifier_computes_as_in_peft(classifier, close):
    _, session, feeds, wanted, _ = classifier
    for name, logits in wanted.items():
        close(torch.tensor(session.run(feeds, name)["logits"]), logits, tolerance=1e-4)
    assert session.adapters == ("one", "two")
    assert session.providers[-1] == "CPUExecutionProvider"


def test_an_adapter_by_a_part_is_that_of_a_smaller_scaling(classifier, close, tmp_path):
    (base, first, _), session, feeds, _, _ = classifier
    config = json.loads((first / "adapter_config.json").read_text())
    for file in first.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 4}))
    model = loaded("bert", base, tmp_path)
    with torch.no_grad():
        wanted = model(**{name: torch.tensor(array) for name, array in feeds.items()}).logits
    close(torch.tensor(session.run(feeds, {"one": 0.25})["logits"]), wanted, tolerance=1e-4)


def test_several_adapters_merge_as_their_sum(folders, tmp_path, close, classifier):
    base, first, second = folders("bert")
    _, _, feeds, _, _ = classifier
    report = ak.onnx.export_pretrained(base, tmp_path / "out", adapter=[first, second])
    model = peft.PeftModel.from_pretrained(MODELS["bert"].from_pretrained(base), first, "a")
    model.load_adapter(second, "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    with torch.no_grad():
        wanted = model.eval()(**{name: torch.tensor(array) for name, array in feeds.items()}).logits
    close(torch.tensor(ak.onnx.Session(report.out).run(feeds)["logits"]), wanted, tolerance=1e-4)


def test_onnxruntimes_own_adapters_load_what_is_written(classifier, close):
    import onnxruntime

    _, _, feeds, wanted, report = classifier
    session = onnxruntime.InferenceSession(str(report.out), providers=["CPUExecutionProvider"])
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(report.out.with_name("two.onnx_adapter")))
    options.add_active_adapter(adapter)
    close(torch.tensor(session.run(["logits"], feeds, options)[0]), wanted["two"], tolerance=1e-4)


def test_names_of_modules_stay_and_nothing_of_this_machine(classifier):
    import onnx

    report = classifier[4]
    model = onnx.load(report.out)
    held = {tensor.name for tensor in model.graph.initializer}
    assert {"bert.encoder.layer.0.attention.self.query.weight", "classifier.weight"} <= held
    assert os.path.dirname(exporting.__file__).encode() not in report.out.read_bytes()
    assert b"stack_trace" not in report.out.read_bytes()


def test_a_file_for_slots_is_an_adapter_as_well(classifier, tmp_path):
    """What the record beside it makes of its values is what PEFT's own files hold."""
    (_, first, second), _, _, _, report = classifier
    for name, folder in (("one", first), ("two", second)):
        read, wanted = ak.read(report.out.with_name(f"{name}.onnx_adapter")), ak.read(folder)
        assert list(read.updates) == list(wanted.updates)
        for target, update in wanted:
            (other,) = read.updates[target]
            assert other.attributes == update.attributes
            for field, leaf in update.tensors.items():
                np.testing.assert_array_equal(as_array(other.tensors[field]), as_array(leaf))
        ak.write(read, tmp_path / name, format="peft")
        again = ak.read(tmp_path / name)
        assert {str(target) for target in again.updates} == {str(target) for target in wanted.updates}


def test_what_a_session_refuses(classifier, tmp_path):
    _, session, feeds, _, report = classifier
    file = report.out.with_name("one.onnx_adapter")
    for error, match, words in (
        (UsageError, "no input attention_mask", ({k: v for k, v in feeds.items() if k != "attention_mask"},)),
        (UsageError, "no input 'input_id'", ({**feeds, "input_id": feeds["input_ids"]},)),
        (UsageError, "dtype float32, but the input has int64", ({**feeds, "input_ids": np.zeros((2, 4), np.float32)},)),
        (UsageError, "no adapter 'three'", (feeds, "three")),
        (Unsupported, r"use the same slot.*ops\.add", (feeds, {"one": 1, "two": 1})),
        (UsageError, "no output 'logit'", (feeds, None, ["logit"])),
        (ShapeMismatch, "cannot run the model", ({**feeds, "input_ids": feeds["input_ids"][:, :2]},)),
    ):
        with pytest.raises(error, match=match):
            session.run(*words)
    tensors = dict(read_ort_adapter(file).tensors)
    factor = next(name for name in tensors if name.endswith(".A"))
    for error, match, changed in (
        (TargetNotFound, "no slot other", tensors | {"other": tensors[factor]}),
        (ShapeMismatch, "in another tensor of the same update", {k: v for k, v in tensors.items() if k != factor}),
        (ShapeMismatch, "has shape .*, but its slot", tensors | {factor: from_numpy(np.zeros((4, 7), np.float32))}),
        (ShapeMismatch, "dtype float64, but its slot has float32", tensors | {factor: from_numpy(np.zeros((4, 32)))}),
    ):
        write_ort_adapter(tmp_path / "bad.onnx_adapter", OrtAdapter(changed))
        with pytest.raises(error, match=match):
            session.load("bad", tmp_path / "bad.onnx_adapter")
    assert session.adapters == ("one", "two")
    with pytest.raises(UsageError, match=r"OtherExecutionProvider does not run here.*CPUExecutionProvider"):
        ak.onnx.Session(report.out, providers=["OtherExecutionProvider"])
    session.load("more", file)
    session.unload("more")
    with pytest.raises(UsageError, match="no adapter 'more'"):
        session.unload("more")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def lora(out=6, into=8, path="first"):
    g = torch.Generator().manual_seed(out)
    A, B = torch.randn(2, into, generator=g), torch.randn(out, 2, generator=g)
    return ak.Adapter({ak.Target(path): (ak.METHODS["lora"](A=A, B=B),)})


def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(3, 8)


@pytest.mark.parametrize("mode", ["merged", "attached"])
def test_any_module_and_any_method(mode, tmp_path, close):
    model, x = net()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    weight = torch.rand(6) + 0.5
    dora = ak.METHODS["dora"](A=torch.randn(2, 8), B=torch.randn(6, 2), magnitude=torch.rand(6) + 1)
    adapter = lora(4, 6, "last").replace(
        updates={ak.Target("first"): (dora,), ak.Target("norm"): (ak.METHODS["replacement"](weight=weight),)}
    )
    W = model.first.weight + dora.B @ dora.A
    W = W * (dora.magnitude / W.norm(dim=1))[:, None]
    hidden = torch.nn.functional.layer_norm(x @ W.T + model.first.bias, (6,), weight, model.norm.bias)
    report = ak.onnx.export(model, (x,), tmp_path / "out.onnx", adapter=adapter, mode=mode, input_names=["x"])
    got = ak.onnx.Session(report.out).run({"x": x.numpy()})
    close(torch.tensor(next(iter(got.values()))), model.last(hidden))
    after = model.state_dict()
    assert all(after[name].data_ptr() == at and torch.equal(after[name], own) for name, (at, own) in before.items())


def test_numbers_apart_are_one_fresh_file(tmp_path, monkeypatch, close):
    monkeypatch.setattr(model_file, "APART", 0)
    wide = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    x = torch.randn(2, 64)
    report = ak.onnx.export(wide, (x,), tmp_path / "out.onnx", input_names=["x"])
    assert [file.name for file in report.files] == ["out.onnx.data", "out.onnx"]
    assert (tmp_path / "out.onnx.data").stat().st_size == 64 * 64 * 4
    got = ak.onnx.Session(report.out).run({"x": x.numpy()})
    close(torch.tensor(next(iter(got.values()))), wide(x))
    with pytest.raises(StorageError, match="already there"):
        ak.onnx.export(wide, (x,), tmp_path / "out.onnx")


def test_a_graph_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    model, x = net()
    monkeypatch.setattr(against_torch, "outputs_of", lambda *_: [np.zeros((3, 4), np.float32)])
    with pytest.raises(CheckFailed, match="from the torch model"):
        ak.onnx.export(model, (x,), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


class Stubborn(torch.nn.Module):
    def forward(self, x):
        return torch.tensor(x.tolist()).sort() if x.sum().item() > 0 else x


def test_what_export_refuses(tmp_path):
    model, x = net()
    out = tmp_path / "out.onnx"
    prompt = ak.Adapter({ak.Target(""): (ak.METHODS["prompt"](P=torch.randn(2, 4)),)})
    bottleneck = ak.METHODS["bottleneck"](down=torch.randn(2, 6), up=torch.randn(6, 2))
    for error, match, words in (
        (UsageError, "unknown mode", {"mode": "folded"}),
        (UsageError, "mode slots needs an adapter", {"mode": "slots"}),
        (UsageError, "two adapters have the name", {"adapter": [lora(), lora()]}),
        (UsageError, "cannot name a file", {"adapter": {"../a": lora()}}),
        (TargetNotFound, "firs", {"adapter": lora(path="firsd")}),
        (ShapeMismatch, "the update has out=5", {"adapter": lora(5)}),
        (NotMergeable, "does not change weights", {"adapter": ak.Adapter({ak.Target("first"): (bottleneck,)})}),
        (Unsupported, "changes the context", {"adapter": prompt, "mode": "slots"}),
    ):
        with pytest.raises(error, match=match):
            ak.onnx.export(model, (x,), out, **words)
    with pytest.raises(UsageError, match="is not a Module"):
        ak.onnx.export(lambda x: x, (x,), out)
    for args in ({"x": x}, x):
        with pytest.raises(UsageError, match=r"args is a (dict|Tensor), but must be a tuple.*kwargs="):
            ak.onnx.export(model, args, out)
    with pytest.raises(UsageError, match="training mode"):
        ak.onnx.export(Net(), (x,), out)
    with pytest.raises(StorageError, match="no such folder"):
        ak.onnx.export(model, (x,), tmp_path / "none" / "out.onnx")
    with pytest.raises(Unsupported, match="torch cannot export a Stubborn"):
        ak.onnx.export(Stubborn().eval(), (x,), out)
    assert not list(tmp_path.iterdir())


def test_what_the_command_refuses(tmp_path, folders, monkeypatch):
    base, first, _ = folders("bert")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text('{"architectures": ["BertForTime"], "model_type": "bert"}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "out"
    for code, words, match in (
        (2, (empty, "-o", out), "no config.json"),
        (3, (odd, "-o", out), "no class BertForTime"),
        (2, (broken, "-o", out), "cannot load the folder"),
        (6, (base, "-o", taken), "already there"),
        (6, (base, "-o", taken, "--overwrite"), "not a folder that an export wrote"),
        (6, (base, "-o", out, "--adapter", tmp_path / "none"), "no such file"),
    ):
        done = run("export", *words)
        assert (done.exit_code, match in done.stderr) == (code, True), done.stderr
    monkeypatch.setattr("adapterkit.torch.pretrained.find_spec", lambda _: None)
    done = run("export", base, "-o", out, "--adapter", first)
    assert done.exit_code == 2
    assert "pip install 'adapterkit[transformers]'" in done.stderr
    assert sorted(os.listdir(tmp_path)) == before
    assert (taken / "mine.txt").read_text() == "mine"


def test_a_link_out_of_the_folder_is_not_carried(tmp_path, folders, monkeypatch):
    base, _, _ = folders("bert")
    source = tmp_path / "source"
    source.mkdir()
    for file in base.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (tmp_path / "secret").write_text("secret")
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(pretrained, "export", lambda *_, **__: pytest.fail("exported before its links were looked at"))
    with pytest.raises(Malformed, match="links to a file outside of"):
        ak.onnx.export_pretrained(source, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, folders):
    base, first, _ = folders("bert")
    out = tmp_path / "out"
    done = run("export", base, "-o", out, "--adapter", first, "--mode", "slots")
    assert done.exit_code == 0, done
    assert "largest difference" in done.stdout
    file = "bert_first.onnx_adapter"
    assert sorted(os.listdir(out)) == [file, f"{file}.json", "config.json", "model.onnx"]
    done = run("export", base, "-o", out, "--adapter", first, "--mode", "slots")
    assert (done.exit_code, done.stdout.startswith("already done: ")) == (0, True), done
    assert run("export", base, "-o", out, "--adapter", first).exit_code == 6
    (out / "notes").write_text("mine")
    (out / "vocab.txt").write_text("of the old export")
    done = run("export", base, "-o", out, "--overwrite", "--no-check", "--json")
    assert json.loads(done.stdout)["mode"] == "merged"
    assert sorted(os.listdir(out)) == ["config.json", "model.onnx", "notes"]
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_an_export_that_is_ended_leaves_nothing(tmp_path):
    base, config = tmp_path / "base", CONFIGS["bert"]()
    config.num_hidden_layers = 0  # Each of these exports pays for everything that others find done already.
    MODELS["bert"](config).save_pretrained(base)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "made").mkdir()
    words, commands = ["export", base, "-o", tmp_path / "made" / "out", "--no-check"], Commands()
    fault = {"folder": tmp_path / "made", "env": {"TMPDIR": str(tmp_path / "temporary")}}
    try:
        points = commands(*words, **fault).points
        whole = tree(tmp_path / "made")
        assert not list((tmp_path / "temporary").iterdir())
        for number, left in ((signal.SIGTERM, True), (signal.SIGKILL, False)):
            ended = commands(*words, "--overwrite", **fault, at=len(points) // 2, signal=number)
            assert ended.code == (130 if left else -number), ended
            assert (tree(tmp_path / "made") == whole) == left
            assert not list((tmp_path / "temporary").iterdir())
        assert "already done" in commands(*words).said
        assert tree(tmp_path / "made") == whole
    finally:
        commands.close()
