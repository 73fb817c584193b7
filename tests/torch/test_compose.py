"""Composition of adapters in a live model, against AdapterHub's library and against its own definition."""

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import (
    Malformed,
    ShapeMismatch,
    StorageError,
    TargetNotFound,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from adapterkit.formats.adapterhub.setup import Setup, read_setup, write_setup
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.methods import METHODS

DATA = Path(__file__).parents[1] / "data"
HUB = DATA / "adapterhub_blocks"
compose = ak.torch.compose

FUSIONS = {"dynamic": "ab", "static": "ba", "before": "ab", "normed": "cd"}
"""Folder of a fusion -> its adapters, in order."""


@pytest.fixture
def model():
    return AutoModel.from_pretrained(DATA / "adapterhub_outputs" / "models" / "bert").eval().double()


@pytest.fixture(scope="module")
def expected():
    return load_file(HUB / "expected.safetensors")


def adapters(names):
    return [ak.read(HUB / name) for name in names]


def run(model, ids):
    with torch.no_grad():
        return model(ids).last_hidden_state


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


COMPOSED = {
    "stack": lambda: compose.stack(*adapters("ab")),
    "stack_back": lambda: compose.stack(*adapters("ba")),
    "split": lambda: compose.split(*adapters("ab"), sizes=[2, 3]),
    **{name: lambda name=name, of=of: compose.fuse(*adapters(of), fusion=HUB / name) for name, of in FUSIONS.items()},
    # The library divides a weighted mean by the number of adapters once more.
    "average": lambda: compose.average(*adapters("ab"), weights=[0.25 / 2, 0.75 / 2]),
}
"""What the library composes -> the same adapter."""


@pytest.mark.parametrize("name", COMPOSED)
def test_computes_what_the_library_computes(name, model, expected):
    ids = expected["input_ids"]
    plain, keys = run(model, ids), list(model.state_dict())
    handle = ak.torch.inject(model, COMPOSED[name]())
    got = run(model, ids)
    assert not torch.allclose(got, plain, rtol=1e-3)
    close(got, expected[name])
    assert list(model.state_dict()) == keys
    with handle.disable():
        assert torch.equal(run(model, ids), plain)
    handle.remove()
    assert torch.equal(run(model, ids), plain)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_rows_go_where_the_library_sends_them(model, expected):
    ids = expected["input_ids"]
    for name in "ab":
        ak.torch.inject(model, *adapters(name), name=name)
    with compose.batch_split(model, ["b", "a"], [1, 2]):
        close(run(model, ids), expected["batch_split"])
    with torch.no_grad():
        close(compose.parallel(model, ["a", "b"])(ids).last_hidden_state, expected["parallel"])
        mask = torch.tensor([[1, 1, 1, 0, 0]] * 3)
        both = compose.parallel(model, ["b", None])(input_ids=ids, attention_mask=mask).last_hidden_state
        with ak.torch.route(model, ["b"] * 3):
            close(both[:3], model(input_ids=ids, attention_mask=mask).last_hidden_state)


def linear():
    """Two layers of 4 outputs and 6 inputs, and what goes in."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(6, 4), "v": nn.Linear(6, 4)}).double()
    return model, torch.randn(2, 5, 6).double()


def lora(path, seed):
    random = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 6, generator=random).double(), torch.randn(4, 2, generator=random).double()
    return Adapter({Target(path): (METHODS["lora"](A=A, B=B, scaling=0.5),)})


def test_an_average_counts_the_layer_itself_where_an_adapter_changes_nothing():
    model, x = linear()
    one, other, third = lora("q", 1), lora("q", 2), lora("v", 3)
    q, v = model["q"](x), model["v"](x)
    change = {id(a): x @ (u.B @ u.A).T * 0.5 for a in (one, other, third) for _, u in a}
    ak.torch.inject(model, compose.average(one, other, third, weights=[0.5, 0.2, 0.3]))
    close(model["q"](x), q + 0.5 * change[id(one)] + 0.2 * change[id(other)])
    close(model["v"](x), v + 0.3 * change[id(third)])


def test_a_split_of_an_embedding_gives_each_part_its_own_ids():
    model = nn.Sequential(nn.Embedding(9, 6))
    ids, base = torch.arange(8).reshape(2, 4), model[0].weight.detach().clone()
    loras = [METHODS["lora"](A=torch.randn(2, 9), B=torch.randn(6, 2), scaling=0.5) for _ in range(2)]
    adapters = [Adapter({Target("0", layout="in out *k"): (each,)}) for each in loras]
    ak.torch.inject(model, compose.split(*adapters, sizes=[1, 3]))
    tables = [base + 0.5 * (each.B @ each.A).T for each in loras]
    close(model(ids), torch.cat([tables[0][ids[:, :1]], tables[1][ids[:, 1:]]], 1))


def test_a_split_of_a_convolution_is_refused():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1))
    change = Adapter({Target("0"): (METHODS["lora"](A=torch.randn(2, 4, 3), B=torch.randn(4, 2)),)})
    ak.torch.inject(model, compose.split(change, change, sizes=[2, 2]))
    with pytest.raises(Unsupported, match="0: a split needs an axis of tokens"):
        model(torch.randn(2, 4, 8))


@pytest.mark.parametrize("form", ["stack", "average"])
@pytest.mark.parametrize("formats", [("peft", "peft"), (None, None)])
def test_a_composition_pads_convolutions_like_the_tool_that_trained_its_adapters(formats, form):
    """PEFT's LoRA pads with zeros, whatever the layer pads with; the weight's own formula pads as the layer."""
    model, x = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), torch.randn(2, 4, 8)
    wanted = model(x)
    adapters = []
    for name in formats:
        update = METHODS["lora"](A=torch.randn(2, 4, 3), B=torch.randn(4, 2))
        made = Adapter({Target("0"): (update,)})
        adapters.append(made.step("read", format=name) if name else made)
        padded = nn.functional.pad(x, (1, 1), mode="constant" if name else "circular")
        change = nn.functional.conv1d(nn.functional.conv1d(padded, update.A), update.B[..., None])
        wanted = wanted + (change if form == "stack" else change / 2)
    handle = ak.torch.inject(model, getattr(compose, form)(*adapters))
    assert [u.method for _, u in handle.adapter()] == (["lora", "lora"] if form == "stack" else ["average"])
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", [compose.stack, compose.average, lambda *each: ak.ops.stack(each)])
def test_sources_that_pad_a_convolution_differently_are_refused_where_they_differ(combine):
    """PEFT's LoRA pads with zeros; that of an adapter made here pads as the layer. With zeros, both are the same."""
    adapters = [
        Adapter({Target("0"): (METHODS["lora"](A=torch.randn(2, 4, 3), B=torch.randn(4, 2)),)}).step(*step, **args)
        for *step, args in (("read", {"format": "peft"}), ("create", {}))
    ]
    ak.torch.inject(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1)), combine(*adapters))
    with pytest.raises(Unsupported, match=r"circular.*combined from adapters of several sources"):
        ak.torch.inject(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), combine(*adapters))
    same, x = combine(adapters[0], adapters[0]), torch.randn(2, 4, 8)
    model, zeros = (nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode=mode)) for mode in ("circular", "zeros"))
    zeros.load_state_dict(model.state_dict())
    base = model(x) - zeros(x)
    ak.torch.inject(model, same)
    ak.torch.inject(zeros, same)
    torch.testing.assert_close(model(x), zeros(x) + base, rtol=1e-4, atol=1e-4)


def test_a_composition_is_trained_with_the_dropout_of_its_adapters():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.ones(3, 8)
    made, without = (ak.torch.create(model, "lora", targets=["0"], rank=2, dropout=p) for p in (0.5, 0.0))
    made = made.replace(
        updates={t: tuple(u.replace(B=torch.randn(8, 2)) for u in us) for t, us in made.updates.items()}
    )
    outputs = []
    for adapter in (made, compose.stack(made)):
        trained = copy.deepcopy(model).train()
        ak.torch.inject(trained, adapter, trainable=True)
        torch.manual_seed(0)
        outputs.append(trained(x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[1], trained(x))
    with pytest.raises(UsageError, match=r"dropouts \[0.5, 0.0\]"):
        ak.torch.inject(model, compose.stack(made, without), trainable=True)
    ak.torch.inject(model, compose.stack(made, without), trainable=True, dropout=0.5)


@pytest.mark.parametrize("back", [False, True], ids=["in memory", "from a file"])
@pytest.mark.parametrize(
    "combine",
    [ak.ops.add, ak.ops.average, ak.ops.stack, ak.combine, lambda each: ak.ops.scale(ak.ops.resize(each[0], 2), 2.0)],
    ids=["add", "average", "stack", "combine", "resize and scale"],
)
def test_a_combination_is_trained_with_the_dropout_of_its_adapters(tmp_path, combine, back):
    """PEFT's `add_weighted_adapter` keeps `lora_dropout`, too."""

    def trained(p: float) -> Adapter:
        torch.manual_seed(int(p * 10))
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(8, 8)),
            peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=p, init_lora_weights=False),
        )
        model.save_pretrained(tmp_path / str(p))
        return ak.read(tmp_path / str(p))

    def kept(adapter: Adapter) -> Adapter:
        ak.write(adapter, tmp_path / "kept.safetensors", format="adapterkit", overwrite=True)
        return ak.read(tmp_path / "kept.safetensors") if back else adapter

    half = trained(0.5)
    both = kept(combine([half, half]))
    base, x, outputs = nn.Sequential(nn.Linear(8, 8)).train(), torch.ones(3, 8), []
    for settings in ({}, {"dropout": 0.5}, {"dropout": 0.0}):
        model = copy.deepcopy(base)
        ak.torch.inject(model, both, trainable=True, **settings)
        torch.manual_seed(0)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    ak.write(both, tmp_path / "both", format="peft", on_loss="promote")
    assert peft.LoraConfig.from_pretrained(tmp_path / "both").lora_dropout == 0.5
    if combine in (ak.ops.add, ak.ops.average, ak.ops.stack, ak.combine):
        mixed = kept(combine([half, trained(0.0)]))
        with pytest.raises(UsageError, match=r"dropouts \[0.5, 0.0\]"):
            ak.torch.inject(nn.Sequential(nn.Linear(8, 8)), mixed, trainable=True)


def test_blocks_nest():
    model, x = linear()
    one, other, third = (lora("q", seed) for seed in (1, 2, 3))
    q = model["q"](x)
    changes = [x @ (u.B @ u.A).T * 0.5 for a in (one, other, third) for _, u in a]
    nested = compose.split(compose.average(one, other), compose.stack(other, third), sizes=[2, 3])
    ak.torch.inject(model, nested)
    wanted = q + torch.cat([(changes[0] + changes[1])[:, :2] / 2, (changes[1] + changes[2])[:, 2:]], 1)
    close(model["q"](x), wanted)
    with pytest.raises(ShapeMismatch, match=r"4 positions, but the split is \[2, 3\]") as raised:
        model["q"](x[:, :4])
    assert raised.value.where == "q"


def test_a_composition_is_weighed_and_trained_like_any_adapter(model, expected):
    ids = expected["input_ids"]
    plain = run(model, ids)
    composed = compose.fuse(*adapters("ab"), fusion=HUB / "dynamic")
    handle = ak.torch.inject(model.requires_grad_(False), composed, weight=0.0, trainable=True)
    assert torch.equal(run(model, ids), plain)
    handle.weight = 1.0
    names = dict(handle.named_parameters())
    assert {name.rpartition("fuse.")[2] for name in names} >= {"query", "key_bias", "values", "0.down", "1.up_bias"}
    model(ids).last_hidden_state.square().mean().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter -= 0.1 * parameter.grad
    now, trained = run(model, ids), handle.adapter()
    handle.remove()
    ak.torch.inject(model, trained)
    close(run(model, ids), now)


SETUPS = json.loads((HUB / "setups.json").read_text("utf-8"))
"""What the library writes into adapter_setup.json, for compositions of its own."""


def written(name, folder):
    """A composition as the library would have written it: its file, and copies of the folders that it names."""
    folder.mkdir()
    for each in (*"abcd", *FUSIONS):
        shutil.copytree(HUB / each, folder / (FUSIONS_IN_SETUPS.get(each, each)))
    (folder / "adapter_setup.json").write_text(json.dumps(SETUPS[name], indent=2))
    return folder


FUSIONS_IN_SETUPS = {"dynamic": "a,b"}


@pytest.mark.parametrize("name", ["stack", "split", "dynamic"])
def test_a_setup_computes_what_the_library_computes(name, model, expected, tmp_path):
    ak.torch.inject(model, compose.load(written(name, tmp_path / "s")))
    close(run(model, expected["input_ids"]), expected[name])


def test_a_setups_weights_are_used_as_they_are_and_blocks_nest(model, expected, tmp_path):
    """The library divides by the number of adapters once more."""
    a, b, c, d = adapters("abcd")
    for name, same in (
        ("average", compose.average(a, b, weights=[0.25, 0.75])),
        ("nested", compose.stack(compose.average(a, compose.split(b, c, sizes=[1, 4])), d)),
    ):
        handle = ak.torch.inject(model, same)
        wanted = run(model, expected["input_ids"])
        handle.remove()
        handle = ak.torch.inject(model, compose.load(written(name, tmp_path / name)))
        close(run(model, expected["input_ids"]), wanted)
        handle.remove()


@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_is_written_as_the_library_writes_it(name, tmp_path):
    setup, base = (
        read_setup(written(name, tmp_path / "s")),
        open_checkpoint(DATA / "adapterhub_outputs" / "models" / "bert"),
    )
    given = {each: ak.Adapter(ak.read(HUB / each).updates) for each in "abcd"}
    write_setup(tmp_path / "again", setup, given, fusions={"a,b": HUB / "dynamic"}, base=base)
    assert (tmp_path / "again" / "adapter_setup.json").read_text() == (
        tmp_path / "s" / "adapter_setup.json"
    ).read_text()
    assert read_setup(tmp_path / "again") == setup
    for each in set(setup.names()):
        assert ak.read(tmp_path / "again" / each).digest() == given[each].digest()
        assert json.loads((tmp_path / "again" / each / "adapter_config.json").read_text())["name"] == each


def block(kind="Stack", children=("a",), **kwargs):
    return {"type": kind, "children": [{"type": "single", "children": [c]} for c in children], "kwargs": kwargs}


def deep():
    tree = block()
    for _ in range(40):
        tree = {"type": "Stack", "children": [tree]}
    return tree


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        (None, "adapter_setup"),
        (block("Merge"), "adapter_setup"),
        (block(["Stack"]), "adapter_setup"),
        (block(children=()), "adapter_setup"),
        (block(children=("../../x",)), "adapter_setup.children[0]"),
        (block(children=(3,)), "adapter_setup.children[0]"),
        (block("Split", "ab", splits=[2]), "adapter_setup.kwargs"),
        (block("Average", "ab"), "adapter_setup.kwargs"),
        (block("Average", "a", weights=[True]), "adapter_setup.kwargs"),
        (deep(), "children[0].children[0]"),
    ],
)
def test_a_setup_that_the_library_would_not_write_is_refused(tree, where, tmp_path):
    (tmp_path / "adapter_setup.json").write_text(json.dumps({"adapter_setup": tree}))
    with pytest.raises(Malformed) as raised:
        compose.load(tmp_path)
    assert where in raised.value.where
    assert raised.value.path.endswith("adapter_setup.json")
    assert raised.value.cure


def test_a_setup_that_is_no_adapter_says_what_to_do(tmp_path):
    with pytest.raises(StorageError, match=r"no adapter_setup\.json"):
        compose.load(tmp_path)
    for name in ("parallel", "batch_split"):
        with pytest.raises(
            Unsupported,
            match=r"sends rows through several adapters, .*\. Inject the adapters under",
        ):
            compose.load(written(name, tmp_path / name))
    with pytest.raises(Unsupported, match=r"not one adapter.*compose.load"):
        ak.read(tmp_path / "parallel")


def test_a_setup_lacks_nothing_when_it_is_written(tmp_path):
    a = ak.read(HUB / "a")
    for setup, given, error, words in (
        (Setup("Stack", ("a", "b")), {"a": a}, UsageError, "'b' is in the setup"),
        (Setup("Fuse", ("a", "a")), {"a": a}, UsageError, "'a,a' is in the setup"),
        (Setup("Split", ("a",)), {"a": a}, UsageError, "one number for each of 1 children"),
        (Setup("Stack", ("a.b",)), {"a.b": a}, UsageError, "not a valid adapter name"),
        (Setup("Stack", ("a",)), {"a": dora()}, Unrepresentable, "dora"),
    ):
        with pytest.raises(error, match=words) as raised:
            write_setup(tmp_path / "s", setup, given)
        assert raised.value.cure
        assert not (tmp_path / "s").exists()


def test_a_composition_has_a_target_for_each_adapter_of_a_stack():
    """A stack is of methods alone, and can be written; other blocks live in a model."""
    stacked = compose.stack(*adapters("ab"))
    assert {len(updates) for updates in stacked.updates.values()} == {2}


@pytest.mark.parametrize("make", [compose.average, lambda *some: compose.split(*some, sizes=[1, 2])])
@pytest.mark.parametrize("name", ["adapterhub", "adapterkit", "peft"])
def test_blocks_are_not_written(make, name, tmp_path):
    composed = make(lora("q", 1), lora("q", 2))
    with pytest.raises(Unrepresentable, match=r"average|split") as raised:
        ak.write(composed, tmp_path / "a.safetensors", name)
    assert raised.value.cure
    assert not (tmp_path / "a.safetensors").exists()


def prompt():
    return Adapter({Target(""): (METHODS["prompt"](P=torch.ones(2, 6)),)})


def dora():
    fields = {"A": torch.ones(2, 6), "B": torch.ones(4, 2), "magnitude": torch.ones(4)}
    return Adapter({Target("q"): (METHODS["dora"](**fields),)})


def alora():
    fields = {"A": torch.ones(2, 6), "B": torch.ones(4, 2), "invocation": torch.tensor([1])}
    return Adapter({Target("q"): (METHODS["alora"](**fields),)})


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (compose.average, UsageError, "no adapters to compose"),
        (lambda: compose.average(lora("q", 1), weights=[1, 2]), UsageError, "2 weights for 1"),
        (lambda: compose.split(lora("q", 1), sizes=[1, 2]), UsageError, "2 sizes for 1"),
        (lambda: compose.average(lora("q", 1), dora()), Unsupported, "dora changes the layer"),
        (lambda: compose.average(lora("q", 1), prompt()), Unsupported, "block 'average' cannot contain context"),
        (lambda: compose.split(alora(), lora("q", 1), sizes=[1, 1]), Unsupported, "reads arguments of the model"),
        (lambda: compose.fuse(lora("encoder.layer.0.output", 1), fusion=HUB / "dynamic"), Unsupported, "bottleneck"),
        (lambda: compose.fuse(lora("q", 1), fusion=HUB / "dynamic"), TargetNotFound, "fusion has no weights"),
        (lambda: compose.fuse(lora("q", 1), fusion=HUB / "a"), StorageError, "no adapter_fusion_config.json"),
        (lambda: compose.batch_split(linear()[0], ["a"], [1, 2]), UsageError, "2 sizes for 1"),
        (lambda: compose.split(lora("q", 1), lora("q", 2), sizes=[-1, 6]), UsageError, "-1 is not a number of tokens"),
        (lambda: compose.split(lora("q", 1), lora("q", 2), sizes=[2.0, 3.0]), UsageError, "list of whole numbers"),
        (lambda: compose.batch_split(linear()[0], ["a", None], [-1, 3]), UsageError, "-1 is not a number of tokens"),
        (lambda: compose.parallel(linear()[0], []), UsageError, "no adapters to compose"),
    ],
)
def test_what_cannot_be_composed_is_refused(make, error, words):
    with pytest.raises(error, match=words) as raised:
        make()
    assert raised.value.cure


def test_a_fusion_that_lacks_what_its_config_says_is_refused(tmp_path):
    shutil.copytree(HUB / "static", tmp_path / "f")
    config = json.loads((tmp_path / "f" / "adapter_fusion_config.json").read_text())
    for change, error, words in (
        ({"value": True}, Malformed, "the config states .*values"),
        ({"heads": 2}, Malformed, "unknown field"),
    ):
        changed = config | {"config": config["config"] | change}
        (tmp_path / "f" / "adapter_fusion_config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=words) as raised:
            compose.fuse(*adapters("ba"), fusion=tmp_path / "f")
        assert raised.value.path == str(tmp_path / "f")


@pytest.mark.parametrize("method", ["bottleneck", "compacter", "grouped_dora", "grouped_lora", "invertible", "loha"])
def test_each_part_of_a_split_computes_what_its_adapter_computes_alone(method):
    """Methods whose output at a position depends on the input at this position only."""
    base, x = nn.ModuleDict({"q": nn.Linear(8, 8)}).double(), torch.randn(2, 5, 8, dtype=torch.float64)

    def made(name):
        handle = ak.torch.inject(base, ak.torch.create(base, name, targets=["q"]), trainable=True)
        with torch.no_grad():
            for value in handle.parameters():
                value += 0.1 * torch.randn_like(value)
        adapter = handle.adapter()
        handle.remove()
        return adapter

    def run(adapter):
        handle = ak.torch.inject(base, adapter)
        y = base["q"](x)
        handle.remove()
        return y

    parts = [made("lora"), made(method)]
    y = run(compose.split(*parts, sizes=[2, 3]))
    close(y[:, :2], run(parts[0])[:, :2])
    close(y[:, 2:], run(parts[1])[:, 2:])
    assert not torch.allclose(y[:, 2:], base["q"](x)[:, 2:])
