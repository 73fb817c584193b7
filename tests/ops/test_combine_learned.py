"""Methods that learn against the same descent by torch, on a model of two layers; what their score must give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

TASKS, WIDTH, CLASSES, STEPS = 3, 12, 5, 40
PATHS = ["layers.0.up", "layers.1.down"]
SIZES = {"layers.0.up": (WIDTH, 8), "layers.1.down": (CLASSES, WIDTH)}
RANKS = [2, 3, 1]


def setting(seed=0):
    rng = np.random.default_rng(seed)
    base = {path: torch.tensor(rng.normal(size=SIZES[path])) for path in PATHS}
    factors = [
        {p: (0.5 * rng.normal(size=(SIZES[p][0], r)), rng.normal(size=(r, SIZES[p][1]))) for p in PATHS} for r in RANKS
    ]
    adapters = [
        Adapter({Target(p): (METHODS["lora"](B=from_numpy(B), A=from_numpy(A)),) for p, (B, A) in task.items()})
        for task in factors
    ]
    samples = [torch.tensor(rng.normal(size=(9, 8))) for _ in RANKS]
    tensors = [{p: (torch.tensor(B), torch.tensor(A)) for p, (B, A) in task.items()} for task in factors]
    return base, adapters, tensors, samples


def forward(weights, x):
    """Logits, and what goes into each layer."""
    hidden = torch.tanh(x @ weights[PATHS[0]].T)
    return hidden @ weights[PATHS[1]].T, dict(zip(PATHS, (x, hidden), strict=True))


def entropy(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def change(adapter, path):
    """The change in float64, which `delta` rounds to float32."""
    update = adapter.updates[Target(path)][0]
    return update.D.numpy() if update.method == "dense" else update.scaling * update.B.numpy() @ update.A.numpy()


def by_gradients(loss_of, base):
    """A score for adapters, from a loss of weights."""

    def score(adapter, given_):
        weights = {path: (W + torch.tensor(change(adapter, path))).requires_grad_() for path, W in base.items()}
        loss = loss_of(weights, given_)
        loss.backward()
        return loss.item(), {path: W.grad for path, W in weights.items()}

    return score


def trained(coefficients, weights_of, loss_of, rate, steps=STEPS, adam=torch.optim.AdamW):
    """What torch's AdamW makes of coefficients."""
    optimizer = adam(coefficients, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(weights_of()).backward()
        optimizer.step()
    return {path: W.detach().numpy() for path, W in weights_of().items()}


def close(adapter, weights, base):
    for path, W in weights.items():
        assert np.abs(change(adapter, path) - (W - base[path].numpy())).max() < 1e-9


@pytest.mark.parametrize("shares", [[None, None, None], [1.0, 0.2, 0.5]])
@pytest.mark.parametrize("directions", ["factors", "shared"])
def test_tara_is_where_the_papers_descent_ends(directions, shares):
    base, adapters, tensors, samples = setting()
    alone = [float(entropy(forward({p: base[p] + B @ A for p, (B, A) in t.items()}, x)[0]))
             for t, x in zip(tensors, samples, strict=True)]  # fmt: skip
    alpha, rate, start = 0.5, 0.02, 2.4
    numbers = [1 / TASKS if share is None else share for share in shares]
    parts = tensors if directions == "factors" else shared(tensors)
    logits = [{p: torch.full((len(A),), start / TASKS, dtype=torch.double, requires_grad=True)
               for p, (_, A) in task.items()} for task in parts]  # fmt: skip

    def weights_of():
        return {
            p: base[p] + sum(t[p][0] @ torch.diag(c[p]) @ t[p][1] for t, c in zip(parts, logits, strict=True))
            for p in PATHS
        }

    def loss_of(weights):
        above = [entropy(forward(weights, x)[0]) - own for x, own in zip(samples, alone, strict=True)]
        return alpha * torch.logsumexp(torch.stack([p / alpha * s for p, s in zip(numbers, above, strict=True)]), 0)

    expected = trained([c for task in logits for c in task.values()], weights_of, loss_of, rate)
    score = by_gradients(lambda w, together: together([entropy(forward(w, x)[0]) for x in samples], alone), base)
    each = [{} if share is None else {"preference": share} for share in shares]
    made = ak.ops.combine(adapters, "tara", data=score, directions=directions, alpha=alpha, rate=rate, start=start,
                          steps=STEPS, each=each)  # fmt: skip
    close(made, expected, base)


def shared(tensors):
    """Every task by the singular vectors of all changes side by side."""
    found = [{} for _ in tensors]
    for path in PATHS:
        U, S, Vh = torch.linalg.svd(torch.hstack([B @ A for B, A in (t[path] for t in tensors)]), full_matrices=False)
        rank = min(sum(len(task[path][1]) for task in tensors), len(S))
        for task, V in zip(found, Vh[:rank].chunk(len(tensors), 1), strict=True):
            task[path] = U[:, :rank] * S[:rank], V
    return found


@pytest.mark.parametrize("blocks", [0.25, 1.0])
def test_nsc_is_where_the_papers_descent_ends(blocks):
    base, adapters, tensors, samples = setting(1)
    rate, paths = 0.02, PATHS[1:] if blocks < 1 else PATHS
    logits = {path: torch.full((TASKS,), 0.4, dtype=torch.double, requires_grad=True) for path in PATHS}
    beside = []  # the projection on the null space of each A, by its singular vectors
    for task in tensors:
        bases = {p: torch.linalg.svd(A, full_matrices=True)[2][len(A) :] for p, (_, A) in task.items()}
        beside.append({p: N.T @ N for p, N in bases.items()})

    def weights_of():
        return {p: base[p] + sum(c * B @ A for c, (B, A) in zip(logits[p], (t[p] for t in tensors), strict=True))
                for p in PATHS}  # fmt: skip

    def loss_of(weights):
        seen = [forward(weights, x)[1] for x in samples]
        shares = [((z[p] @ P[p]).norm(dim=-1) / z[p].norm(dim=-1)).mean()
                  for z, P in zip(seen, beside, strict=True) for p in paths]  # fmt: skip
        return torch.stack(shares).mean()

    expected = trained(list(logits.values()), weights_of, loss_of, rate)

    def ours(weights, spaces):
        assert spaces.paths == paths
        seen = [forward(weights, x)[1] for x in samples]
        return spaces.loss({(t, p): z[p] for t, z in enumerate(seen) for p in spaces.paths})

    made = ak.ops.combine(adapters, "nsc", data=by_gradients(ours, base), blocks=blocks, rate=rate, steps=STEPS)
    for path, W in expected.items():
        assert np.abs(change(made, path) - (W - base[path].numpy())).max() < 1e-6  # the ridge of 1e-8


def test_what_a_score_gives_wrong_is_refused():
    base, adapters, _, samples = setting()
    few = by_gradients(lambda w, together: together([entropy(forward(w, samples[0])[0])]), base)
    with pytest.raises(UsageError, match="1 losses for 3 tasks"):
        ak.ops.combine(adapters, "tara", data=few, steps=1)
    other = by_gradients(lambda _, spaces: spaces.loss({(0, "layers.0.up"): samples[0]}), base)
    with pytest.raises(UsageError, match=r"not in spaces\.reads"):
        ak.ops.combine(adapters, "nsc", data=other, steps=1)
    with pytest.raises(UsageError, match="no target with low-rank factors"):
        ak.ops.combine([Adapter({Target("q"): a.updates[Target(PATHS[0])]}) for a in adapters], "nsc", data=other)
    dense = Adapter({Target(PATHS[0]): (METHODS["dense"](D=from_numpy(np.ones((WIDTH, 8)))),)})
    with pytest.raises(UsageError, match="has no low-rank factors"):
        ak.ops.combine([dense, dense], "tara", data=few)


@pytest.mark.parametrize("name", ["tara", "nsc"])
def test_adapters_without_a_target_and_biases_take_part(name):
    base, adapters, _, samples = setting()
    update = adapters[1].updates[Target(PATHS[1])][0].replace(bias=from_numpy(np.ones(CLASSES)))
    given_ = [adapters[0], Adapter({Target(PATHS[1]): (update,)})]

    def loss(weights, asked):
        seen = [forward(weights, x) for x in samples[:2]]
        if name == "tara":
            return asked([entropy(logits) for logits, _ in seen])
        return asked.loss({(t, p): z[p] for t, (_, z) in enumerate(seen) for p in asked.paths})

    made = ak.ops.combine(given_, name, data=by_gradients(loss, base), steps=2, start=1.0)
    assert set(map(str, made.updates)) == set(PATHS)
    assert made.updates[Target(PATHS[1])][0].bias.shape == (CLASSES,)


def test_tara_of_experts_is_that_of_each_expert_with_shared_coefficients():
    """A gradient of zero leaves the first coefficients, 3.2 / T."""
    rng = np.random.default_rng(0)
    target = Target("layers.0.experts", "e out *in")
    factors = [(rng.normal(size=(4, 6, 2)), rng.normal(size=(4, 2, 5))) for _ in range(2)]
    given_ = [Adapter({target: (METHODS["lora"](B=from_numpy(B), A=from_numpy(A)),)}) for B, A in factors]
    seen = []

    def score(adapter, _):
        seen.append(adapter)
        return 1.0, {target.path: np.zeros((4, 6, 5))}

    for directions in ("factors", "shared"):
        made = ak.ops.combine(given_, "tara", data=score, steps=2, decay=0.0, directions=directions)
        assert np.abs(made.delta(target.path).numpy() - 1.6 * sum(B @ A for B, A in factors)).max() < 1e-5
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["adamerging", "cat"])
def test_layer_wise_coefficients_are_where_torch_has_them(name):
    """AdaMerging's coefficients begin at 0.3, CAT's are a softmax; entropies are summed and Adam has no decay."""
    base, adapters, tensors, samples = setting(2)
    first = 0.3 if name == "adamerging" else 0.0
    logits = {path: torch.full((TASKS,), first, dtype=torch.double, requires_grad=True) for path in PATHS}
    shares = {"adamerging": lambda c: c, "cat": lambda c: c.softmax(0)}[name]

    def weights_of():
        return {p: base[p] + sum(c * t[p][0] @ t[p][1] for c, t in zip(shares(logits[p]), tensors, strict=True))
                for p in PATHS}  # fmt: skip

    def loss_of(weights):
        return sum(entropy(forward(weights, x)[0]) for x in samples)

    expected = trained(list(logits.values()), weights_of, loss_of, 0.01, adam=torch.optim.Adam)
    ours = by_gradients(lambda weights, _: loss_of(weights), base)
    made = ak.ops.combine(adapters, name, data=lambda adapter: ours(adapter, None), steps=STEPS, rate=0.01)
    close(made, expected, base)


def test_lorahub_sums_factors_apart_by_weights_that_its_loss_prefers():
    """The authors' result, (sum w B)(sum w A), is least squares here; the search may end anywhere near its least."""
    rng = np.random.default_rng(0)
    factors = [(rng.normal(size=(6, 2)), rng.normal(size=(2, 5))) for _ in range(2)]
    given_ = [Adapter({Target("q"): (METHODS["lora"](B=from_numpy(B), A=from_numpy(A)),)}) for B, A in factors]
    wanted = np.array([0.8, -0.5])

    def apart(w):
        return sum(x * B for x, (B, _) in zip(w, factors, strict=True)) @ sum(
            x * A for x, (_, A) in zip(w, factors, strict=True)
        )

    tried = []

    def score(adapter):
        tried.append(change(adapter, "q"))
        return float(((tried[-1] - apart(wanted)) ** 2).sum())

    made = change(ak.ops.combine(given_, "lorahub", data=score, steps=400, penalty=0.0), "q")
    assert np.abs(made - apart(wanted)).max() < 0.05 * np.abs(apart(wanted)).max()
    costs = [((D - apart(wanted)) ** 2).sum() for D in tried]
    assert np.array_equal(made, tried[int(np.argmin(costs))])


@pytest.mark.parametrize("name", ["regmean", "regmean_plus"])
def test_regression_is_that_of_each_models_own_inputs(name):
    """Inner products of what a layer sees, off-diagonals times alpha; RegMean++ looks in the merged model."""
    base, adapters, tensors, samples = setting(3)
    alpha, merged = 0.7, {}

    def seen(t, path, changes):
        return forward({p: base[p] + changes[p] if p in changes else base[p] for p in PATHS}, samples[t])[1][path]

    own = [{p: B @ A for p, (B, A) in task.items()} for task in tensors]
    for path in PATHS:
        inputs = [seen(t, path, merged if name == "regmean_plus" else own[t]) for t in range(TASKS)]
        grams = [X.T @ X for X in inputs]
        grams = [alpha * G + (1 - alpha) * torch.diag(G.diagonal()) for G in grams]
        merged[path] = sum(D[path] @ G for D, G in zip(own, grams, strict=True)) @ torch.linalg.pinv(sum(grams))

    def data(t, path, so_far=None):
        if name == "regmean":
            return seen(t, path, own[t])
        targets = () if so_far is None else map(str, so_far.updates)
        return seen(t, path, {p: torch.tensor(change(so_far, p)) for p in targets})

    made = ak.ops.combine(adapters, name, data=data, alpha=alpha)
    close(made, {p: (base[p] + D).numpy() for p, D in merged.items()}, base)
