"""Many adapters in one batch, against each row run alone through the plain formula, and against PEFT's mixed batch."""

import copy
import threading

import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, ShapeMismatch, Unsupported, UsageError
from adapterkit.methods import METHODS
from adapterkit.torch import batched, routing
from adapterkit.torch import forward_hook as hooks

pytestmark = pytest.mark.filterwarnings("ignore")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lora(out, into, *kernel, rank=2, seed=0, **rest):
    return METHODS["lora"](
        A=draw(rank, into, *kernel, seed=seed), B=draw(out, rank, seed=seed + 500), scaling=0.25, **rest
    )


def adapter(*shape, seed=0, target="0"):
    return Adapter({Target(target): (lora(*shape, seed=seed),)})


def dense(W, b, update, weight=1.0):
    """The layer's weight and bias after the update, by the method's own `delta`."""
    return W + weight * update.delta(tuple(W.shape)), b + weight * (update.bias_delta() if update.changes_bias else 0)


@pytest.fixture
def once(monkeypatch):
    """Fails a test whose routed forward runs a module once for each group of rows."""

    def never(*_):
        raise AssertionError("the layer ran once for each group")

    monkeypatch.setattr(hooks, "split", never)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), (8, 16), lambda n: (n, 3, 16), nn.functional.linear),
    "one axis": (lambda: nn.Linear(16, 8), (8, 16), lambda n: (n, 16), nn.functional.linear),
    "many axes": (lambda: nn.Linear(16, 8), (8, 16), lambda n: (n, 2, 3, 16), nn.functional.linear),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (8, 6, 3, 3), lambda n: (n, 6, 5, 5),
             lambda x, W, b: nn.functional.conv2d(x, W, b, padding=1, stride=2)),
}  # fmt: skip


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("kind", LAYERS)
def test_fifty_adapters_of_several_ranks_over_64_rows(kind, close):
    make, shape, size, formula = LAYERS[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).double(), draw(*size(64), seed=3)
    updates = {
        f"a{i}": lora(*shape, rank=1 + i % 3, seed=i, **({"bias": draw(8, seed=900 + i)} if i % 5 == 0 else {}))
        for i in range(50)
    }
    weights = {name: 0.5 if i % 7 == 3 else 1.0 for i, name in enumerate(updates)}
    for name, update in updates.items():
        ak.torch.inject(model, Adapter({Target("0"): (update,)}), name=name, weight=weights[name])
    names = [None if i % 9 == 4 else f"a{i * 7 % 50}" for i in range(64)]
    with ak.torch.route(model, names):
        got = model(x)
    W, b = model[0].weight, model[0].bias
    for row, name in enumerate(names):
        there = (W, b) if name is None else dense(W, b, updates[name], weights[name])
        close(got[row : row + 1], formula(x[row : row + 1], *there), tolerance=1e-12)


def test_every_thin_method_equals_its_formula(close):
    """Whatever an additive method's `delta` says is what the gathered products compute."""
    seen = []
    for method, cls in METHODS.items():
        if cls.kind != "additive":
            continue
        model = nn.Sequential(nn.Linear(24, 24)).double()
        handles = []
        try:
            for seed in (1, 2):
                fresh = ak.torch.create(model, method, targets="0", rank=1, seed=seed)
                moved = fresh.map(
                    lambda leaf, seed=seed: (
                        leaf.double() + 0.2 * draw(*leaf.shape, seed=seed) if leaf.is_floating_point() else leaf
                    )
                )
                handles.append(ak.torch.inject(model, moved, name="ab"[seed - 1]))
        except AdapterkitError:
            continue
        x, names = draw(4, 3, 24, seed=5), ["a", "b", None, "a"]
        (hook,) = hooks.hooks_of(model)
        seen += [method] if all(hook.ranks.values()) else []
        W, b = model[0].weight, model[0].bias
        with ak.torch.route(model, names):
            got = model(x)
        for row, name in enumerate(names):
            update = next(iter(handles["ab".index(name)].adapter()))[1] if name else None
            there = (W, b) if update is None else (update.new_weight(W), update.new_bias(b))
            close(got[row], nn.functional.linear(x[row], *there), x, tolerance=1e-10)
    assert {"lora", "vera", "adalora", "lora_xs", "nola", "loha"} <= set(seen)


@pytest.mark.usefixtures("once")
def test_embeddings_of_rows_and_positions(close):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(9, 8), nn.Embedding(5, 8)

        def forward(self, ids):
            return self.words(ids) + self.places(torch.arange(ids.shape[1])[None])

    model, ids = Positions().double(), torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0], [1, 1, 1]])
    own = {}
    for seed, name in enumerate("ab"):
        own[name] = [METHODS["lora"](A=draw(1, n, seed=seed), B=draw(8, 1, seed=seed + 9)) for n in (9, 5)]
        targets = [Target(path, layout="in out *k") for path in ("words", "places")]
        ak.torch.inject(model, Adapter({t: (u,) for t, u in zip(targets, own[name], strict=True)}), name=name)
    names = ["a", None, "b", "a"]
    with ak.torch.route(model, names):
        got = model(ids)
    for row, name in enumerate(names):
        tables = [model.words.weight, model.places.weight]
        if name:
            tables = [W + (u.B @ u.A).mT for W, u in zip(tables, own[name], strict=True)]
        close(got[row], tables[0][ids[row]] + tables[1][:3], tolerance=1e-12)


@pytest.mark.usefixtures("once")
def test_a_stack_follows_its_tensors(close):
    """What is kept between forwards is never what the adapter was before."""
    model, x = nn.Sequential(nn.Linear(16, 8)).double(), draw(2, 16)
    handles = [
        ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16, seed=s),)}), name=n) for s, n in enumerate("ab")
    ]

    def check():
        with ak.torch.route(model, ["b", "a"]):
            got = model(x)
        W, b = model[0].weight, model[0].bias
        ((_, one),), ((_, other),) = handles[0].adapter(), handles[1].adapter()
        close(got[0], nn.functional.linear(x[0], *dense(W, b, other, handles[1].weight)), tolerance=1e-6)
        close(got[1], nn.functional.linear(x[1], *dense(W, b, one, handles[0].weight)), tolerance=1e-6)

    check()
    leaf = handles[0]._leaves[0]
    leaf.tensor.mul_(2)
    check()
    leaf.module._buffers[leaf.name] = leaf.tensor * 3
    check()
    leaf.tensor.data = leaf.tensor.data * 2
    check()
    handles[1].weight = 0.5
    check()
    handles[0].remove()
    handles[0] = ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16, seed=7),)}), name="a")
    check()
    twin = copy.deepcopy(model)
    for each in ak.torch.handles(twin).values():
        each._leaves[0].tensor.mul_(5)
    check()
    model.float()
    x = x.float()
    check()


def test_a_plan_for_rows_follows_all_that_it_was_made_from(close, monkeypatch):
    """At one token a row and without gradients, the third forward and those after it run as planned."""
    model, x = nn.Sequential(nn.Linear(16, 8)).double(), draw(2, 1, 16)
    handles = [
        ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16, seed=s),)}), name=n) for s, n in enumerate("ab")
    ]
    planned = []
    run = batched.RowPlan.run
    monkeypatch.setattr(
        batched.RowPlan, "run", lambda plan, *args: planned.append(run(plan, *args) is not None) or run(plan, *args)
    )

    def check(off=""):
        """Four forwards in the route that is on: the first is right after a change, the last ones are planned."""
        for _ in range(4):
            with torch.no_grad():
                got = model(x)
            W, b = model[0].weight, model[0].bias
            for row, handle in enumerate(reversed(handles)):
                ((_, update),) = handle.adapter()
                W_, b_ = dense(W, b, update, 0.0 if handle.name in off else handle.weight)
                close(got[row], nn.functional.linear(x[row], W_.to(W.dtype), b_.to(W.dtype)), tolerance=1e-6)
        assert any(planned)
        planned.clear()

    with ak.torch.route(model, ["b", "a"]):
        check()
        leaf = handles[0]._leaves[0]
        leaf.tensor.mul_(2)
        check()
        leaf.module._buffers[leaf.name] = leaf.tensor * 3
        check()
        leaf.tensor.data = leaf.tensor.data * 2
        check()
        handles[1].weight = 0.5
        check()
        with handles[0].disable():
            check(off="a")
        check()
        model[0].weight = nn.Parameter(draw(8, 16, seed=30))
        check()
        model[0].bias = nn.Parameter(draw(8, seed=31))
        check()
        model[0].weight.data.mul_(2)
        check()
        model.float()
        x = x.float()
        check()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert model(x).dtype == torch.bfloat16
        check()
        with_gradient = x.clone().requires_grad_()
        model(with_gradient).sum().backward()  # Outside no_grad the plan does not run.
        ((_, a),), ((_, b),) = (handle.adapter() for handle in handles)
        sums = [(model[0].weight.double() + w * u.delta((8, 16))).sum(0) for u, w in ((b, 0.5), (a, 1.0))]
        close(with_gradient.grad[:, 0], torch.stack(sums).float(), tolerance=1e-5)
        check()
        with torch.no_grad():
            by_vmap = torch.vmap(lambda scale: model(x * scale))(torch.ones(3))
            close(by_vmap[2], model(x), tolerance=1e-6)
            with pytest.raises(ShapeMismatch):
                model(x[:1].expand(3, 1, 16))
            with pytest.raises(ShapeMismatch, match="reads 16 features"):
                model(x[..., :8])
            with pytest.raises(ShapeMismatch):
                model(x[..., :8].reshape(2, 1, 8))
    handles[0].remove()
    handles[0] = ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16, seed=7),)}), name="a")
    with ak.torch.route(model, ["b", "a"]):
        check()
        handles[0].set_active(False)
        with torch.no_grad(), pytest.raises(UsageError, match="switched off"):
            model(x)


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_a_mixed_batch(trained, close):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).double(), draw(4, 3, 16).requires_grad_()
    updates = {name: lora(8, 16, rank=2 + s, seed=s) for s, name in enumerate("ab")}
    handles = {
        name: ak.torch.inject(model, Adapter({Target("0"): (update,)}), name=name, trainable=trained)
        for name, update in updates.items()
    }
    names, weights = ["b", None, "a", "b"], draw(4, 3, 8, seed=9)
    with ak.torch.route(model, names):
        (model(x) * weights).sum().backward()
    leaves = {name: [u.A.clone().requires_grad_(), u.B.clone().requires_grad_()] for name, u in updates.items()}
    W, b, z = model[0].weight.detach(), model[0].bias.detach(), x.detach().clone().requires_grad_()
    rows = []
    for row, name in enumerate(names):
        y = nn.functional.linear(z[row], W, b)
        rows.append(y if name is None else y + 0.25 * z[row] @ leaves[name][0].T @ leaves[name][1].T)
    (torch.stack(rows) * weights).sum().backward()
    close(x.grad, z.grad, tolerance=1e-12)
    for name, handle in handles.items():
        for parameter, leaf in zip(handle.parameters(), leaves[name], strict=False):
            close(parameter.grad, leaf.grad, tolerance=1e-12)


def test_any_number_of_routings_compiles_once(close):
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)).double(), draw(6, 16)
    for seed in range(5):
        updates = {Target("0"): (lora(8, 16, rank=1 + seed % 3, seed=seed),)}
        if seed % 2:
            updates[Target("2")] = (lora(8, 8, seed=seed + 40),)
        ak.torch.inject(model, Adapter(updates), name=f"a{seed}")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for turn in range(20):
        names = [None if (turn + row) % 7 == 0 else f"a{(turn * 3 + row * row) % 5}" for row in range(6)]
        with ak.torch.route(model, names):
            close(compiled(x), model(x), tolerance=1e-12)
    assert counter.frame_count == 1


def test_a_thread_that_never_switched_follows_a_switch_in_compiled_code(close):
    """torch.compile guards what it read of a thread's scope, also the first time."""
    model, x, faults = nn.Sequential(nn.Linear(16, 8)).double(), draw(2, 16), []
    plain = model(x)
    handle = ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16),)}))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def work():
        try:
            assert not torch.allclose(compiled(x), plain)
            with handle.disable():
                close(compiled(x), plain, tolerance=1e-12)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not faults, faults


RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_as_long_as_the_batch(kind, first, state, close):
    """Four rows of four tokens, in either order, with the states that such a layer takes and returns."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": RECURRENT[kind](6, 4, num_layers=2, batch_first=first)}).double()
    x, h = draw(4, 4, 6), tuple(draw(2, 4, 4, seed=s) for s in (1, 2))
    given = () if not state else (h if kind == "lstm" else h[0],)
    handles = {}
    for seed, name in enumerate("ab"):
        size = model.rnn.weight_ih_l0.shape
        handles[name] = ak.torch.inject(
            model, Adapter({Target("rnn.weight_ih_l0"): (lora(*size, seed=seed),)}), name=name
        )
    names = ["a", None, "b", "a"]
    with ak.torch.route(model, names, axis=None if first else 1):
        out, states = model.rnn(x, *given)
    for row, name in enumerate(names):
        for each in handles.values():
            each.set_active(each.name == name)
        one = x[row : row + 1] if first else x[:, row : row + 1]
        own = [tuple(s[:, row : row + 1] for s in h) if kind == "lstm" else h[0][:, row : row + 1]] if state else []
        wanted, wanted_states = model.rnn(one, *own)
        close(out[row] if first else out[:, row], wanted.squeeze(0 if first else 1), tolerance=1e-12)
        for got, expected in zip(_tuple(states), _tuple(wanted_states), strict=True):
            close(got[:, row : row + 1], expected, tolerance=1e-12)


def _tuple(states):
    return states if isinstance(states, tuple) else (states,)


def test_packed_sequences_are_refused():
    model = nn.ModuleDict({"rnn": nn.LSTM(6, 4, batch_first=True)}).double()
    ak.torch.inject(model, Adapter({Target("rnn.weight_ih_l0"): (lora(16, 6),)}), name="a")
    packed = nn.utils.rnn.pack_sequence([draw(3, 6), draw(2, 6)])
    with ak.torch.route(model, ["a", None]), pytest.raises(Unsupported, match=r"rnn.weight_ih_l0: .*axis of rows"):
        model.rnn(packed)


@pytest.mark.parametrize("axis", [0, 1])
def test_transformers_of_either_order(axis, close):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=axis == 0)
    model = nn.ModuleDict({"layer": layer}).double()
    x, memory = draw(4, 4, 8), draw(4, 4, 8, seed=1)
    handles = {}
    for seed, name in enumerate("ab"):
        updates = {
            Target("layer.self_attn.in_proj_weight"): (lora(24, 8, seed=seed),),
            Target("layer.linear1"): (lora(16, 8, seed=seed + 20),),
            Target("layer.norm1"): (METHODS["ia3"](l=draw(8, seed=seed)),),
        }
        handles[name] = ak.torch.inject(model, Adapter(updates), name=name)
    names = ["a", None, "b", "a"]
    if axis:
        with pytest.raises(Unsupported, match=r"layer.self_attn: .*batch_first=False.*axis=1"):
            ak.torch.route(model, names).__enter__()
    with ak.torch.route(model, names, axis=axis):
        got = model.layer(x, memory)
    for row, name in enumerate(names):
        for each in handles.values():
            each.set_active(each.name == name)
        one = [t.narrow(axis, row, 1) for t in (x, memory)]
        close(got.narrow(axis, row, 1), model.layer(*one), tolerance=1e-12)


def test_experts_that_pick_tokens_are_refused():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

        def forward(self, x):
            flat = x.flatten(0, 1)
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                chosen = (flat[:, 0] > 0).long() == number
                out[chosen] = expert(flat[chosen])
            return out.view_as(x)

    model = Mixture()
    for seed, name in enumerate("ab"):
        adapter = Adapter({Target("experts.0"): (lora(8, 8, seed=seed),)}).map(lambda leaf: leaf.float())
        ak.torch.inject(model, adapter, name=name)
    x = draw(4, 2, 8, dtype=torch.float32)
    x[..., 0] = torch.tensor([[-1.0, 1], [-1, 1], [-1, 1], [1, -1]])  # Four tokens, as many as rows, choose the first.
    with (
        ak.torch.route(model, ["a", None, "b", "a"]),
        pytest.raises(Unsupported, match=r"experts.0: an expert gets only"),
    ):
        model(x)


def test_errors_name_rows_and_adapters():
    model = nn.Sequential(nn.Linear(16, 8)).double()
    handles = [
        ak.torch.inject(model, Adapter({Target("0"): (lora(8, 16, seed=s),)}), name=n) for s, n in enumerate("ab")
    ]
    names = ["a", None, "b", "a"]
    with ak.torch.route(model, names), pytest.raises(ShapeMismatch) as caught:
        model(draw(3, 16))
    assert str(caught.value).startswith(
        "0: the call has 3 rows, but the route has 4 (row 0: a, row 1: the base, row 2: b, row 3: a)"
    )
    with (
        ak.torch.route(model, names),
        pytest.raises(ShapeMismatch, match=r"0: the input has shape \[4, 15\], but.*16 features"),
    ):
        model(draw(4, 15))
    handles[0].set_active(False)
    with pytest.raises(UsageError, match=r"a: rows 0, 3: the adapter is switched off.*set_active\(True\)"):
        ak.torch.route(model, names).__enter__()
    handles[0].set_active(True)
    with ak.torch.route(model, names):
        handles[0].set_active(False)
        with pytest.raises(UsageError, match=r"rows 0, 3: the adapter is switched off"):
            model(draw(4, 16))
        handles[0].set_active(True)
        with handles[0].disable():
            assert torch.equal(model(draw(4, 16))[0], model[0]._adapterkit_hook.original(draw(4, 16))[0])
    with handles[1].disable(), pytest.raises(UsageError, match="row 2: the adapter is switched off"):
        ak.torch.route(model, names).__enter__()
    with pytest.raises(UsageError, match="the route has no rows"):
        ak.torch.route(model, []).__enter__()
    with pytest.raises(UsageError, match="rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more: no such adapter"):
        ak.torch.route(model, ["zz"] * 12).__enter__()


def test_eight_threads_with_routes_of_their_own(close):
    """1,000 forwards in all, each against the rows that one thread computed alone."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).double(), draw(4, 16)
    for seed in range(6):
        updates = {Target("0"): (lora(8, 16, rank=1 + seed % 3, seed=seed),), Target("1"): (lora(8, 8, seed=seed + 9),)}
        ak.torch.inject(model, Adapter(updates), name=f"a{seed}")
    own = {}
    for name in (None, *(f"a{seed}" for seed in range(6))):
        with ak.torch.route(model, [name] * 4):
            own[name] = model(x)
    faults = []

    def work(number):
        try:
            for turn in range(125):
                names = [None if (turn + row) % 5 == 0 else f"a{(number + turn * row) % 6}" for row in range(4)]
                with ak.torch.route(model, names):
                    got = model(x)
                close(got, torch.stack([own[name][row] for row, name in enumerate(names)]), tolerance=1e-10)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[0]


def test_a_decoder_with_a_cache_and_sixteen_bits():
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().eval()
    for seed, name in enumerate("ab"):
        fresh = ak.torch.create(model, "lora", rank=2 + seed, seed=seed)
        moved = fresh.map(lambda leaf, seed=seed: leaf + 0.2 * draw(*leaf.shape, seed=seed, dtype=torch.float32))
        ak.torch.inject(model, moved, name=name)
    ids, names = torch.tensor([[1, 5, 9], [2, 2, 7], [3, 1, 1]]), ["a", None, "b"]
    with ak.torch.route(model, names):
        got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, name in enumerate(names):
        with ak.torch.route(model, [name]):
            alone = model.generate(ids[row : row + 1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(got[row], alone[0])


def test_the_modules_that_the_fixture_patches_are_those_in_use():
    assert hooks.split is routing.split
    assert hooks.add_by_row is batched.add_by_row
