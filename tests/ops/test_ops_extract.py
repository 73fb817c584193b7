"""Extraction from tuned models: merged again it gives them back, and a truncated change is the best of its rank."""

import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit import ops
from adapterkit.core.adapter import Target
from adapterkit.errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from adapterkit.io.lazy import as_array
from adapterkit.ops.sketching import EXCESS, SMALL

SHAPES = {
    "model.embed_tokens.weight": (12, 6), "model.layers.0.q.weight": (8, 6), "model.layers.0.q.bias": (8,),
    "model.layers.0.norm.weight": (6,), "model.layers.0.c_attn.weight": (6, 18), "model.conv.weight": (5, 3, 2, 2),
    "model.experts.gate_up_proj": (3, 8, 6), "model.same.weight": (4, 4), "lm_head.weight": (12, 6),
}  # fmt: skip
CONFIG = {"model_type": "gpt2", "tie_word_embeddings": False}


def write(folder, tensors, config=CONFIG, shards=2):
    """A model in so many files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def model(seed, dtype, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


def tuned_from(base, seed=1, scale=0.1):
    """Every weight but one changed, of the embedding two rows."""
    change = model(seed, np.float64, {name: value.shape for name, value in base.items()}, scale)
    change["model.same.weight"] *= 0
    change["model.embed_tokens.weight"][[i for i in range(12) if i not in (3, 7)]] = 0
    return {name: (value.astype(np.float64) + change[name]).astype(value.dtype) for name, value in base.items()}


def read(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]


@pytest.mark.parametrize("everything", [{"rank": 6}, {"error": 0}, {"energy": 1}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_full_rank_merging_gives_the_tuned_model_bit_by_bit(dtype, everything, tmp_path):
    base = model(0, dtype)
    # Numbers whose difference float32 cannot hold, in float32 and float16 both ways round.
    base["model.layers.0.q.weight"][0, :3] = [3e4, 1e-5, 1.0]
    tuned = tuned_from(base)
    tuned["model.layers.0.q.weight"][0, :3] = [1e-5, 3e4, 1 + 2**-7]
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    adapter = ops.extract(folders[1], folders[0], **everything)
    ak.write(adapter, tmp_path / "a.safetensors")
    ak.merge(folders[0], tmp_path / "a.safetensors", tmp_path / "merged")
    merged = read(tmp_path / "merged")
    assert merged.keys() == tuned.keys()
    for name, wanted in tuned.items():
        if dtype is np.float64:  # whose differences nothing holds
            np.testing.assert_allclose(merged[name], wanted, rtol=0, atol=4e-12)
        else:
            assert merged[name].tobytes() == wanted.tobytes(), name


def test_each_change_has_the_form_that_suits_it(tmp_path):
    base = model(0, np.float32)
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned_from(base))
    cuts = []
    adapter = ops.extract(folders[1], folders[0], 2, report=cuts.append)
    found = {str(target): (target.layout, [u.method for u in us]) for target, us in adapter.updates.items()}
    assert found == {
        "model.embed_tokens": ("in out *k", ["rows"]), "model.layers.0.q": ("out *in", ["replacement", "lora"]),
        "model.layers.0.norm": ("out *in", ["replacement"]), "model.layers.0.c_attn": ("in out *k", ["lora"]),
        "model.conv": ("out *in", ["lora"]), "model.experts.gate_up_proj": ("e out *in", ["lora"]),
        "lm_head": ("out *in", ["lora"]),
    }  # fmt: skip
    (rows,) = adapter.updates[Target("model.embed_tokens", "in out *k")]
    assert rows.index.numpy().tolist() == [3, 7]
    (attention,) = adapter.updates[Target("model.layers.0.c_attn", "in out *k")]
    assert (attention.A.shape, attention.B.shape) == ((2, 6), (18, 2))
    assert sorted(cut.target for cut in cuts) == sorted([*found, "model.layers.0.q"])
    said = {"rank": 2, "method": "lora", "embeddings": "rows", "targets": []}
    assert {key: adapter.recipe[-1].args[key] for key in said} == said
    (low,) = ops.extract(folders[1], folders[0], 2, embeddings="low-rank", targets=("*embed*",)).updates.values()
    assert [update.method for update in low] == ["lora"]


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("size", [(30, 20), (SMALL + 40, SMALL + 10)])
def test_the_change_is_the_best_of_its_rank(dtype, size, tmp_path):
    """Also where the change is so small against the weight that subtracting in the weight's own type would lose it."""
    base = model(0, dtype, {"q.weight": size})
    rng = np.random.default_rng(1)
    change = 0.02 * rng.normal(size=(size[0], 5)) @ rng.normal(size=(5, size[1])) + 0.001 * rng.normal(size=size)
    tuned = {"q.weight": (base["q.weight"].astype(float) + change).astype(dtype)}
    folders = write(tmp_path / "base", base, shards=1), write(tmp_path / "tuned", tuned, shards=1)
    D = tuned["q.weight"].astype(float) - base["q.weight"].astype(float)
    S = np.linalg.svd(D, compute_uv=False)
    for criterion in ({"rank": 5}, {"energy": 0.9}, {"error": 0.3}):
        cuts = []
        ((update,),) = ops.extract(folders[1], folders[0], **criterion, report=cuts.append).updates.values()
        A, B = (np.asarray(as_array(leaf), float) for leaf in (update.A, update.B))
        error, least = np.linalg.norm(D - B @ A), np.sqrt((S[len(A) :] ** 2).sum())
        assert error <= (1 + EXCESS) * least + 1e-6 * np.linalg.norm(D)
        assert cuts[0].error == pytest.approx(error, rel=1e-3, abs=1e-7 * np.linalg.norm(D))
        assert cuts[0].norm == pytest.approx(np.linalg.norm(D), rel=1e-6)
        allowed = {"energy": 0.1**0.5, "error": 0.3}
        for name in criterion.keys() & allowed.keys():
            limit = allowed[name] * np.linalg.norm(D)
            assert least <= limit * (1 + 1e-6)
            assert len(A) == 1 or np.sqrt((S[len(A) - 1 :] ** 2).sum()) > limit * (1 - 1e-6)


@pytest.mark.parametrize("criterion", [{"error": 0.3}, {"error": 0.05}, {"energy": 0.8}, {"rank": 3}])
def test_one_budget_is_spent_where_it_saves_most(criterion, tmp_path):
    """The largest singular values of all matrices, by LAPACK; spectra that fall slowly, at once, or are small."""
    shapes = {"layers.0.slow.weight": (60, 50), "layers.0.large.weight": (SMALL + 60, SMALL + 30),
              "layers.0.low.weight": (40, 44), "layers.0.small.weight": (30, 30), "layers.0.conv.weight": (12, 6, 3, 3),
              "layers.0.experts": (3, 20, 24)}  # fmt: skip
    base, rng = model(0, np.float64, shapes), np.random.default_rng(1)
    change = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for name, falls, size in (("slow", 0.02, 1.0), ("large", 0.4, 3.0), ("low", 1.5, 2.0), ("small", 0.1, 1e-3)):
        U, S, Vh = np.linalg.svd(change[f"layers.0.{name}.weight"], full_matrices=False)
        change[f"layers.0.{name}.weight"] = size * (U * np.exp(-falls * np.arange(len(S)))) @ Vh
    change["layers.0.experts"][1] *= 0.01
    tuned = {name: value + change[name] for name, value in base.items()}
    folders = write(tmp_path / "base", base, shards=1), write(tmp_path / "tuned", tuned, shards=1)
    cuts = []
    made = ops.extract(folders[1], folders[0], **criterion, scope="all", report=cuts.append)
    assert made.recipe[-1].args["scope"] == "all"

    weights = [M.reshape(M.shape[-2] if D.ndim == 3 else len(M), -1)
               for D in change.values() for M in (D if D.ndim == 3 else [D])]  # fmt: skip
    values = np.sort(np.concatenate([np.linalg.svd(M, compute_uv=False) for M in weights]))[::-1]
    whole, left = np.sqrt((values**2).sum()), np.sqrt(np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0))
    budget = {"error": criterion.get("error"), "energy": (1 - criterion.get("energy", 1)) ** 0.5}
    (kind,) = criterion
    count = criterion["rank"] * len(weights) if kind == "rank" else int((left > budget[kind] * whole).sum())

    found, kept = 0.0, 0
    for name, D in change.items():
        target = next((t for t in made.updates if str(t) == name.removesuffix(".weight")), None)
        (update,) = made.updates.get(target, (None,))
        if update is not None:
            A, B = (np.asarray(as_array(leaf), float) for leaf in (update.A, update.B))
            D = D - (B @ A if D.ndim == 3 else (B @ A.reshape(len(A), -1)).reshape(D.shape))
            kept += int((np.abs(A).reshape(-1, A.shape[-1] if D.ndim == 3 else A[0].size).max(1) > 0).sum())
        found += float((D**2).sum())
    assert math.hypot(*(cut.error for cut in cuts)) == pytest.approx(found**0.5, rel=1e-4)
    assert math.hypot(*(cut.norm for cut in cuts)) == pytest.approx(whole, rel=1e-6)
    assert found**0.5 <= (left[count] if kind == "rank" else budget[kind] * whole) * (
        1 + (EXCESS if kind == "rank" else 1e-6)
    )
    assert count <= kept <= count * 1.02 + (kind != "rank")


def test_a_common_budget_is_of_loras_and_of_exact_extraction_too(tmp_path):
    base = model(0, np.float32)
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned_from(base))
    with pytest.raises(UsageError, match="not for dora"):
        ops.extract(folders[1], folders[0], error=0.1, scope="all", method="dora")
    made = ops.extract(folders[1], folders[0], error=0, scope="all")
    ak.merge(folders[0], [made], tmp_path / "merged")
    for name, value in read(folders[1]).items():
        assert read(tmp_path / "merged")[name].tobytes() == value.tobytes()


def test_new_tokens_travel_as_rows_of_a_base_that_has_room_for_them(tmp_path):
    shapes = {"embed_tokens.weight": (12, 6), "lm_head.weight": (12, 6), "q.weight": (8, 6)}
    base = model(0, np.float32, shapes)
    tuned = {name: value.copy() for name, value in base.items()}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        tuned[name] = np.concatenate([tuned[name], model(5, np.float32, {"x": (3, 6)})["x"]])
        tuned[name][4] += 1
    tuned["q.weight"] += 1
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    adapter = ops.extract(folders[1], folders[0], 6)
    for path in ("embed_tokens", "lm_head"):
        (rows,) = adapter.updates[Target(path, "in out *k")]
        assert rows.index.numpy().tolist() == [4, 12, 13, 14]
    padding = np.zeros((3, 6), np.float32)
    room = {n: v if n.startswith("q") else np.concatenate([v, padding]) for n, v in base.items()}
    ak.merge(write(tmp_path / "room", room), adapter, tmp_path / "merged")
    merged = read(tmp_path / "merged")
    assert all((merged[name] == tuned[name]).all() for name in tuned)


def test_a_table_that_changed_all_over_is_kept_whole(tmp_path):
    base = model(0, np.float32, {"wte.weight": (12, 6), "q.weight": (8, 6)})
    tuned = {"wte.weight": base["wte.weight"] + 1, "q.weight": base["q.weight"]}
    adapter = ops.extract(write(tmp_path / "tuned", tuned), write(tmp_path / "base", base), 2)
    ((update,),) = adapter.updates.values()
    assert update.method == "replacement"
    assert (update.weight.numpy() == tuned["wte.weight"]).all()


def test_a_head_that_the_base_ties_to_its_embedding(tmp_path):
    tied = {"model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    base = model(0, np.float32, {"model.embed_tokens.weight": (12, 6), "model.q.weight": (8, 6)})
    head = base["model.embed_tokens.weight"] + model(3, np.float32, {"x": (12, 6)})["x"]
    folders = write(tmp_path / "base", base, tied), write(tmp_path / "tuned", {**base, "lm_head.weight": head}, tied)
    adapter = ops.extract(folders[1], folders[0], 6)
    assert [str(target) for target in adapter.updates] == ["lm_head"]
    for choice in (None, "untie"):
        ak.merge(folders[0], adapter, tmp_path / str(choice), tied=choice)
        assert (read(tmp_path / str(choice))["lm_head.weight"] == head).all()

    rows = {**base, "model.embed_tokens.weight": base["model.embed_tokens.weight"].copy()}
    rows["model.embed_tokens.weight"][3] += 1
    for name, tuned in (("one", rows), ("two", {**rows, "lm_head.weight": base["model.embed_tokens.weight"]})):
        adapter = ops.extract(write(tmp_path / name, tuned, tied), folders[0], 6)
        assert adapter.methods == ("rows",)
        ak.merge(folders[0], adapter, tmp_path / f"{name} merged")
        merged = read(tmp_path / f"{name} merged")
        assert merged.keys() == tuned.keys()
        assert all((merged[key] == tuned[key]).all() for key in tuned)


def test_only_the_targets_that_are_asked_for_are_looked_at(tmp_path):
    base = model(0, np.float32)
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned_from(base))
    seen = []
    adapter = ops.extract(folders[1], folders[0], 2, targets=("*.q", "*.norm"), progress=lambda *p: seen.append(p))
    assert {str(target) for target in adapter.updates} == {"model.layers.0.q", "model.layers.0.norm"}
    assert seen[-1] == (4 * (48 + 8 + 6), 4 * (48 + 8 + 6))
    with pytest.raises(TargetNotFound, match="no weight matches"):
        ops.extract(folders[1], folders[0], 2, targets=("*.k",))


@pytest.mark.parametrize("shape", [(6,), (4, 3, 3), (4, 2, 3, 3)])
def test_only_a_matrix_is_a_table_of_embeddings(shape, tmp_path):
    """A convolution or a norm may be named `shared`, as T5's embeddings are."""
    rng = np.random.default_rng(0)
    both = [{"shared.weight": rng.normal(size=shape).astype(np.float32)} for _ in range(2)]
    folders = [write(tmp_path / name, tensors) for name, tensors in zip(("base", "tuned"), both, strict=True)]
    adapter = ops.extract(folders[1], folders[0], energy=1.0)
    ak.merge(folders[0], adapter, tmp_path / "merged")
    assert (read(tmp_path / "merged")["shared.weight"] == both[1]["shared.weight"]).all()


def changed(tensors, name, value):
    return {**tensors, name: value} if value is not None else {n: v for n, v in tensors.items() if n != name}


NOT_FINITE = np.where(np.arange(48) == 9, np.nan, 0).reshape(8, 6).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "value", "error", "why"),
    [
        ("model.layers.0.q.weight", np.zeros((8, 7), np.float32), ShapeMismatch, r"\[8, 7\] in the tuned model"),
        ("lm_head.weight", np.zeros((11, 6), np.float32), ShapeMismatch, r"\[11, 6\] in the tuned model"),
        ("model.layers.0.q.weight", NOT_FINITE, Malformed, r"NaN or an infinity at \[1, 3\]"),
        ("model.layers.0.norm.weight", np.full(6, np.inf, np.float32), Malformed, "NaN or an infinity"),
        ("model.embed_tokens.weight", np.full((12, 6), np.nan, np.float32), Malformed, "NaN or an infinity"),
        ("model.layers.0.k.weight", np.zeros((8, 6), np.float32), TargetNotFound, "the base lacks"),
        ("model.layers.0.q.bias", None, TargetNotFound, "the tuned model lacks"),
        ("model.same.weight", np.zeros((4, 4), np.int32), Unsupported, "the tensor changed, but its dtype is I32"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(name, value, error, why, tmp_path):
    base = model(0, np.float32)
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", changed(tuned_from(base), name, value))
    if name == "model.same.weight":
        (tmp_path / "base2").mkdir()
        folders = write(tmp_path / "b", changed(base, name, np.ones((4, 4), np.int32))), folders[1]
    with pytest.raises(error, match=why) as raised:
        ops.extract(folders[1], folders[0], 2)
    assert raised.value.where == name


def test_bad_requests_are_refused_before_any_work(tmp_path):
    base = model(0, np.float32)
    folder, twin = write(tmp_path / "base", base), write(tmp_path / "twin", base)
    for arguments, why in (
        ({}, "none"), ({"rank": 0}, "rank is 0,"), ({"rank": 19}, "rank is 19, but the weights have at most rank"),
        ({"rank": 2, "embeddings": "none"}, "embeddings is 'none'"), ({"rank": 2}, "bit by bit"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            ops.extract(twin, folder, **arguments)


def test_another_form_is_the_nearest_of_its_kind(tmp_path):
    """Of a Kronecker product and of few entries nothing is lost; of any change SHiRA keeps the largest entries."""
    rng = np.random.default_rng(5)
    W, few = rng.normal(size=(24, 36)), np.zeros((24, 36))
    few.flat[rng.choice(24 * 36, 20, replace=False)] = rng.normal(size=20)
    product, noise = np.kron(rng.normal(size=(4, 6)), rng.normal(size=(6, 6))), rng.normal(size=(24, 36))
    base = write(tmp_path / "base", {"q.weight": W}, shards=1)
    for name, change, rank in (("lokr", product, 6), ("shira", few, 1), ("shira", noise, 2)):
        tuned = write(tmp_path / f"{name}{rank}", {"q.weight": W + change}, shards=1)
        cuts = []
        made = ak.ops.extract(tuned, base, rank, method=name, dtype="F64", report=cuts.append)
        assert [update.method for _, update in made] == [name]
        kept = np.sort(np.abs(change), None)[: 24 * 36 - rank * (24 + 36)]
        lost = np.sqrt((kept**2).sum()) if change is noise else 0.0
        assert np.linalg.norm(made.delta("q", base=base).numpy() - change) == pytest.approx(lost, rel=1e-6, abs=1e-5)
        assert cuts[0].error == pytest.approx(lost, rel=1e-6, abs=1e-5)


@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(2, 4))
@settings(max_examples=10)
def test_a_hadamard_product_is_nearer_than_any_product_of_its_rank(seed, rank, tmp_path_factory):
    """Against all singular values, for a change of no form and for one that is nearly such a product."""
    rng = np.random.default_rng(seed)
    one, two = (rng.normal(size=(24, 2)) @ rng.normal(size=(2, 36)) for _ in range(2))
    W = rng.normal(size=(24, 36))
    folder = tmp_path_factory.mktemp("loha")
    base = write(folder / "base", {"q.weight": W}, shards=1)
    for name, change in (("noise", rng.normal(size=(24, 36))), ("product", (2 + one) * (1 + two))):
        tuned, cuts = write(folder / name, {"q.weight": W + change}, shards=1), []
        made = ak.ops.extract(tuned, base, rank, method="loha", dtype="F64", report=cuts.append)
        assert [update.method for _, update in made] == ["loha"]
        lost = np.linalg.norm(made.delta("q").numpy() - change)
        assert cuts[0].error == pytest.approx(lost, rel=1e-6)
        assert lost < 0.97 * np.sqrt((np.linalg.svd(change, compute_uv=False)[rank:] ** 2).sum())


def test_no_kronecker_product_of_small_blocks_is_nearer(tmp_path):
    """Against the rearrangement's singular values, all of them, by a formula of its own."""
    rng = np.random.default_rng(6)
    W, change = rng.normal(size=(24, 36)), rng.normal(size=(24, 36))
    base = write(tmp_path / "base", {"q.weight": W}, shards=1)
    tuned = write(tmp_path / "tuned", {"q.weight": W + change}, shards=1)
    D = ak.ops.extract(tuned, base, 6, method="lokr", dtype="F64").delta("q").numpy()
    rows = [change[6 * i : 6 * i + 6, 6 * j : 6 * j + 6].ravel() for i in range(4) for j in range(6)]
    S = np.linalg.svd(np.stack(rows), compute_uv=False)
    assert np.linalg.norm(D - change) == pytest.approx(np.sqrt((S[1:] ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"rank": 1, "method": "ia3"}, Unsupported),
        ({"energy": 0.5, "method": "lokr"}, UsageError),
        ({"error": 0.5, "method": "loha"}, UsageError),
    ],
)
def test_forms_that_cannot_be_are_refused(arguments, error, tmp_path):
    base, tuned = (write(tmp_path / n, {"q.weight": np.eye(4) * v}, shards=1) for n, v in (("b", 1), ("t", 2)))
    with pytest.raises(error):
        ak.ops.extract(tuned, base, **arguments)


def test_threads_of_the_blas_do_not_wait_for_one_another(tmp_path):
    """In a fresh process, where nothing has loaded numpy yet: the limit must reach its BLAS all the same."""
    base = model(0, np.float32)
    folders = [str(write(tmp_path / "base", base)), str(write(tmp_path / "tuned", tuned_from(base)))]
    code = (
        "import sys, adapterkit as ak; from threadpoolctl import threadpool_info\n"
        "def told(*_): print(*(lib['num_threads'] for lib in threadpool_info() if lib['user_api'] == 'blas'))\n"
        "ak.ops.extract(sys.argv[2], sys.argv[1], rank=2, progress=told)"
    )
    run = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == {"1"}


@pytest.mark.parametrize("rank", [2, 5])
def test_dora_keeps_the_norms_of_rows_and_a_direction_of_low_rank(tmp_path, rank):
    """Against the formula in float64: a planted DoRA comes back exactly, and its error is measured."""
    rng = np.random.default_rng(4)
    W = rng.normal(size=(30, 40))
    V = W + rng.normal(size=(30, 5)) @ rng.normal(size=(5, 40)) * 0.1
    # At the norms that the rows had, what was added is of low rank.
    V *= (np.linalg.norm(W, axis=1) / np.linalg.norm(V, axis=1))[:, None]
    D = V - W
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    V = W + (U[:, :5] * S[:5]) @ Vh[:5]
    magnitude = rng.uniform(0.5, 2.0, 30)
    tuned = magnitude[:, None] * V / np.linalg.norm(V, axis=1)[:, None]
    for name, weight in (("tuned", tuned), ("old", W)):
        save_file({"q.weight": weight}, tmp_path / f"{name}.safetensors")
    cuts, pair = [], (tmp_path / "tuned.safetensors", tmp_path / "old.safetensors")
    made = ops.extract(*pair, rank, method="dora", report=cuts.append)
    (update,) = made.updates[next(iter(made.updates))]
    assert update.method == "dora"
    assert np.allclose(update.magnitude.numpy(), magnitude, rtol=1e-6)
    found = W + update.B.numpy().astype(float) @ update.A.numpy()
    found *= (update.magnitude.numpy() / np.linalg.norm(found, axis=1))[:, None]
    assert abs(np.linalg.norm(tuned - found) - cuts[0].error) < 1e-6 * np.linalg.norm(tuned)
    lora = ops.extract(*pair, rank)
    (other,) = lora.updates[next(iter(lora.updates))]
    left = np.linalg.norm(tuned - W - other.B.numpy().astype(float) @ other.A.numpy())
    assert cuts[0].error < left
