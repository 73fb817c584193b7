"""Reports: every number against numpy on whole matrices, planted faults against the sentences that tell them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import record, run
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.formats import FORMATS
from adapterkit.io.lazy import from_numpy
from adapterkit.reporting import measuring
from adapterkit.reporting.grid import cells
from adapterkit.reporting.report import AdapterReport
from adapterkit.reporting.verdicts import RULES

LAYERS, RANK, WIDE = 8, 8, {"self_attn.q_proj": (96, 64), "self_attn.o_proj": (64, 96), "mlp.up_proj": (128, 64)}
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def factors(seed: int) -> Factors:
    """A clean adapter: target -> A `[r, in]`, B `[out, r]`, alike in every layer."""
    rng = np.random.default_rng(seed)
    made: Factors = {}
    for layer in range(LAYERS):
        for module, (out, width) in WIDE.items():
            A = rng.standard_normal((RANK, width)) / np.sqrt(width)
            made[f"model.layers.{layer}.{module}"] = A, 0.01 * rng.standard_normal((out, RANK))
    return made


def save_lora(folder: Path, found: Factors, *, alpha: float = 2 * RANK, base: str = "org/base", **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for target, (A, B) in found.items():
        tensors[f"base_model.model.{target}.lora_A.weight"] = A.astype("f4")
        tensors[f"base_model.model.{target}.lora_B.weight"] = B.astype("f4")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted({target.rpartition(".")[2] for target in found})
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": base, **config}))
    return folder


def save_weights(folder: Path, seed: int = 99, changes: dict[str, np.ndarray] | None = None) -> Path:
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for module, shape in WIDE.items():
            target = f"model.layers.{layer}.{module}"
            weight = rng.standard_normal(shape).astype("f4")
            tensors[f"{target}.weight"] = (weight + (changes or {}).get(target, 0)).astype("f4")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def dense(folder: Path, scaling: float = 2.0) -> dict[str, np.ndarray]:
    """The whole changes, from the bytes of the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_A.weight", ".lora_B.weight"
    stems = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
    wide = {name: tensor.astype("f8") for name, tensor in tensors.items()}
    return {s.removeprefix("base_model.model."): scaling * wide[s + ends[1]] @ wide[s + ends[0]] for s in stems}


def block(D: np.ndarray) -> np.ndarray:
    """The elements that a report looks at one by one."""
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, measuring.SIDE)).round().astype(int)) for n in D.shape)
    return D[np.ix_(rows, columns)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, the second of which shares much with the first, their base, and the merge of the first."""
    place = tmp_path_factory.mktemp("report")
    one, other = factors(1), factors(2)
    other = {name: (A, B + 0.5 * one[name][1]) for name, (A, B) in other.items()}
    save_lora(place / "one", one)
    save_lora(place / "other", other)
    save_weights(place / "base")
    wanted = {target: 0.75 * D for target, D in dense(place / "one").items()}
    save_weights(place / "merged", changes=wanted)
    return place


@pytest.fixture(scope="module")
def both(folder: Path) -> AdapterReport:
    return ak.report([folder / "one", folder / "other"], base=folder / "base")


def test_norms_spectra_and_values_are_numpys_on_whole_matrices(folder: Path, both: AdapterReport) -> None:
    W = load_file(folder / "base" / "model.safetensors")
    effects = both.measured.effects
    assert len(effects) == 2 * LAYERS * len(WIDE)
    for effect in effects:
        D = dense(folder / ("one", "other")[effect.adapter])[effect.target]
        S = np.linalg.svd(D, compute_uv=False)
        assert effect.norm == pytest.approx(np.linalg.norm(D), rel=1e-12)
        assert effect.spectrum == pytest.approx(S[:RANK], rel=1e-9)
        shares = S[:RANK] / S[:RANK].sum()
        assert effect.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
        assert effect.rank_99 == int(np.argmax(np.cumsum(S**2) >= 0.99 * (S**2).sum())) + 1
        assert effect.spike == pytest.approx(S[0] ** 2 / (S**2).sum(), rel=1e-9)
        assert effect.quantiles == pytest.approx(np.quantile(block(D), measuring.QUANTILES), rel=1e-9)
        assert effect.peak == pytest.approx(np.abs(block(D)).max() / np.sqrt((block(D) ** 2).mean()), rel=1e-9)
        base = W[f"{effect.target}.weight"].astype("f8")
        assert effect.relative == pytest.approx(np.linalg.norm(D) / np.linalg.norm(base), rel=1e-12)
        assert (effect.rank, effect.scaling, effect.method, effect.shape) == (RANK, 2.0, "lora", D.shape)


def test_intruders_are_those_of_whole_decompositions(folder: Path) -> None:
    strong = {name: (A, 60 * B) for name, (A, B) in factors(3).items()}
    found = ak.report(save_lora(folder / "strong", strong), base=folder / "base")
    W = load_file(folder / "base" / "model.safetensors")
    counted = set()
    for effect in found.measured.effects:
        base = W[f"{effect.target}.weight"].astype("f8")
        U, tuned = (np.linalg.svd(M)[0] for M in (base, base + dense(folder / "strong")[effect.target]))
        U = U[:, : min(base.shape)]
        cosines = np.abs(U.T @ tuned[:, :10]).max(0)
        assert effect.intruders == int((cosines < 0.6).sum())
        counted.add(effect.intruders)
    assert max(counted) > 0


def test_relations_are_numpys_on_whole_matrices(folder: Path, both: AdapterReport) -> None:
    one, other = dense(folder / "one"), dense(folder / "other")
    products = 0.0
    for each in both.measured.relations:
        D, E = one[each.target], other[each.target]
        products += float((D * E).sum())
        assert each.cosine == pytest.approx((D * E).sum() / np.linalg.norm(D) / np.linalg.norm(E), rel=1e-9)
        (U, _, V), (X, _, Y) = (np.linalg.svd(M, full_matrices=False) for M in (D, E))
        assert each.overlap_out == pytest.approx(((U[:, :RANK].T @ X[:, :RANK]) ** 2).sum() / RANK, rel=1e-8)
        assert each.overlap_in == pytest.approx(((V[:RANK] @ Y[:RANK].T) ** 2).sum() / RANK, rel=1e-8)
        a, b = block(D), block(E)
        assert each.sign_conflict == pytest.approx((a * b < 0).mean(), abs=1e-12)
        lost = 1 - np.abs(a + b).sum() / (np.abs(a) + np.abs(b)).sum()
        assert each.interference == pytest.approx(lost, rel=1e-9)
        assert both.measured.together[each.target] == pytest.approx(lost, rel=1e-9)
    sizes = [np.sqrt(sum(float((D**2).sum()) for D in found.values())) for found in (one, other)]
    assert [both.measured.norm(at) for at in (0, 1)] == pytest.approx(sizes, rel=1e-12)
    assert both.measured.cosine(0, 1) == pytest.approx(products / sizes[0] / sizes[1], rel=1e-9)
    energies = np.sort([float((D**2).sum()) for D in one.values()])
    gini = np.abs(energies[:, None] - energies).sum() / (2 * len(energies) * energies.sum())
    assert both.measured.gini(0) == pytest.approx(gini, rel=1e-9)


def test_a_merge_that_lost_a_quarter_is_told(folder: Path) -> None:
    found = ak.report(folder / "one", base=folder / "base", merged=folder / "merged")
    assert len(found.measured.merged) == LAYERS * len(WIDE)
    for each in found.measured.merged:
        assert each.kept == pytest.approx(0.75, abs=1e-4)
        assert each.error == pytest.approx(0.25, abs=1e-3)
    (told,) = [each.text for each in found.verdicts if each.code == "merged-less"]
    assert told.startswith("the merged model contains 75 % of the change at layer ")
    assert told.endswith("; at 24 of 24 targets, this share differs from 100 % by more than 5 %.")


def test_dense_changes_and_other_methods_are_measured_alike(folder: Path) -> None:
    """A LoRA promoted to a dense difference has the same norms, spectra and angles."""
    adapter = ak.read(folder / "one")
    whole = {
        target: (ak.METHODS["dense"](D=adapter.delta(str(target))),) for target in adapter.updates
    }  # fmt: skip
    found = ak.report([adapter, adapter.replace(updates=whole)])
    for each in found.measured.relations:
        assert each.cosine == pytest.approx(1, abs=1e-6)
        assert each.overlap_in is not None
    one, other = found.measured.of(0), found.measured.of(1)
    assert [e.norm for e in one] == pytest.approx([e.norm for e in other], rel=1e-6)
    assert [e.spectrum[:RANK] for e in one] == [pytest.approx(e.spectrum[:RANK], rel=1e-4) for e in other]
    assert any("are the same adapter" in each.text for each in found.verdicts)


def at(found: Factors, layer: int, module: str) -> str:
    return next(name for name in found if f".{layer}." in name and name.endswith(module))


def dead_target(found: Factors) -> None:
    name = at(found, 3, "q_proj")
    found[name] = found[name][0], 0 * found[name][1]


def dead_layer(found: Factors) -> None:
    for name in found:
        if ".5." in name:
            found[name] = found[name][0], 0 * found[name][1]


def dead_all(found: Factors) -> None:
    for name in found:
        found[name] = found[name][0], 0 * found[name][1]


def scaled(layer: int, factor: float) -> Callable[[Factors], None]:
    def plant(found: Factors) -> None:
        for name in found:
            if f".{layer}." in name:
                found[name] = found[name][0], factor * found[name][1]

    return plant


def concentrated(found: Factors) -> None:
    name = at(found, 6, "o_proj")
    found[name] = found[name][0], 5 * found[name][1]


def spike(found: Factors) -> None:
    A, B = found[at(found, 2, "up_proj")]
    B = B.copy()
    B[:, 0] *= 16
    found[at(found, 2, "up_proj")] = A, B * (np.linalg.norm(found[at(found, 2, "up_proj")][1]) / np.linalg.norm(B))


def collapsed(found: Factors) -> None:
    for name, (A, B) in found.items():
        found[name] = A, B[:, :1] * np.linspace(1, 0.5, RANK) + 1e-4 * B


def unused(found: Factors) -> None:
    for name, (A, B) in found.items():
        B = B.copy()
        B[:, 2:] *= 0.001
        found[name] = A, B


def outlier(found: Factors) -> None:
    A, B = (factor.copy() for factor in found[at(found, 1, "q_proj")])
    A[:, 1:] *= 0.05
    B[1:] *= 0.05
    found[at(found, 1, "q_proj")] = 8 * A, 2 * B


def missing(found: Factors) -> None:
    del found[at(found, 4, "o_proj")]


def early(found: Factors) -> None:
    for name, (A, B) in found.items():
        layer = int(name.split(".")[2])
        found[name] = A, B * 0.8**layer


def not_a_number(found: Factors) -> None:
    found[at(found, 7, "q_proj")][1][3, 2] = np.nan


ALONE: dict[str, tuple[Callable[[Factors], None], str, str]] = {
    "dead target": (dead_target, "dead-target", "layer 3 q_proj is dead"),
    "dead layer": (dead_layer, "dead-layer", "layer 5 is dead: none of its 3 targets"),
    "untrained": (dead_all, "untrained", "changes nothing"),
    "scaled layer": (scaled(4, 6.0), "scaled-layer", "layer 4 is out of scale: its changes are"),
    "shrunk layer": (scaled(2, 0.1), "scaled-layer", "layer 2 is out of scale: its changes are"),
    "concentrated": (concentrated, "concentrated", "layer 6 o_proj has"),
    "spike": (spike, "spike", "layer 2 up_proj is a rank-1 spike"),
    "collapsed": (collapsed, "spike", "24 of 24 targets have changes of almost rank 1"),
    "unused rank": (unused, "unused-rank", "adapterkit resize --rank 2"),
    "outlier": (outlier, "outliers", "layer 1 q_proj has outliers"),
    "missing target": (missing, "missing-targets", "o_proj is missing in layer 4"),
    "early layers": (early, "first-or-last", "the first third of the layers has"),
    "NaN": (not_a_number, "damaged", "layers.7.self_attn.q_proj of planted is damaged"),
}
"""Fault planted into one adapter -> the rule that tells it, and a part of its sentence."""


def test_the_relative_change_of_many_stacked_experts(tmp_path: Path) -> None:
    """Both norms are those of the first experts, so equal experts have the ratio of each expert."""
    count = 2 * measuring.EXPERTS
    rng = np.random.default_rng(5)
    W, A, B = rng.standard_normal((12, 8)), rng.standard_normal((2, 8)), 0.1 * rng.standard_normal((12, 2))
    (tmp_path / "base").mkdir()
    save_file({"mlp.experts.weight": np.stack([W] * count)}, tmp_path / "base" / "model.safetensors")
    stacked = {"A": from_numpy(np.stack([A] * count)), "B": from_numpy(np.stack([B] * count))}
    lora = ak.METHODS["lora"](**stacked, scaling=1.0)
    adapter = ak.Adapter({ak.Target("mlp.experts", "e out *in"): (lora,)})
    report = ak.report([adapter], base=tmp_path / "base")
    (effect,) = report.measured.effects
    assert effect.norm == pytest.approx(np.sqrt(count) * np.linalg.norm(B @ A), rel=1e-12)
    assert effect.relative == pytest.approx(np.linalg.norm(B @ A) / np.linalg.norm(W), rel=1e-12)


@pytest.mark.parametrize("fault", ALONE)
def test_planted_faults_of_one_adapter_are_told(fault: str, tmp_path: Path) -> None:
    plant, code, text = ALONE[fault]
    found = factors(7)
    plant(found)
    told = ak.report(save_lora(tmp_path / "planted", found)).verdicts
    assert [each for each in told if each.code == code and text in each.text], told


def opposite(one: Factors) -> Factors:
    return {name: (A, -0.7 * B) for name, (A, B) in one.items()}


def conflicting(one: Factors) -> Factors:
    """Unrelated but for one target, where it undoes the other."""
    found, name = factors(8), at(one, 5, "o_proj")
    return found | {name: (one[name][0], -one[name][1])}


def drowned(one: Factors) -> Factors:
    return {name: (A, 9 * B) for name, (A, B) in factors(8).items() if name in one}


def sharing(one: Factors) -> Factors:
    """The directions of the other adapter, put together in another way."""
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((RANK, RANK)))[0]
    return {name: (A, B @ turn @ turn * np.array([1, -1] * (RANK // 2))) for name, (A, B) in one.items()}


def elsewhere(one: Factors) -> Factors:
    return {f"other.{name}": pair for name, pair in one.items()}


TOGETHER: dict[str, tuple[Callable[[Factors], Factors], str, str]] = {
    "same": (dict, "same", "one and planted are the same adapter"),
    "scaled copy": (
        lambda one: {n: (A, 3 * B) for n, (A, B) in one.items()},
        "same",
        "one is 0.333 times as large as planted",
    ),
    "opposite": (opposite, "same", "one and planted undo one another"),
    "sign conflict": (conflicting, "conflict", "one and planted conflict at layer 5 o_proj: cosine -1.00"),
    "interference": (conflicting, "interference", "A plain sum loses 100 % of the absolute changes at layer 5 o_proj"),
    "drowned": (drowned, "louder", "drowns it in a plain sum"),
    "same subspace": (sharing, "shared-subspace", "one and planted use the same subspace"),
    "nothing in common": (elsewhere, "nothing-in-common", "one and planted have no target in common"),
}


@pytest.mark.parametrize("fault", TOGETHER)
def test_planted_faults_of_two_adapters_are_told(fault: str, tmp_path: Path) -> None:
    plant, code, text = TOGETHER[fault]
    one = factors(7)
    pair = [save_lora(tmp_path / "one", one), save_lora(tmp_path / "planted", plant(one))]
    told = ak.report(pair).verdicts
    assert [each for each in told if each.code == code and text in each.text], told


def test_planted_faults_against_a_base_are_told(folder: Path, tmp_path: Path) -> None:
    """A wrong base, one that does not fit, a strange alpha, a change as large as the weight, a merge without effect."""

    def told(adapter: Path, **options: Path) -> dict[str, str]:
        return {each.code: each.text for each in ak.report(adapter, **options).verdicts}

    wrong = tmp_path / "models--org--another" / "snapshots"
    (save_weights(tmp_path / "base")).rename(wrong.parent)
    assert "wrong base: one was made for org/base" in told(folder / "one", base=wrong.parent)["wrong-base"]
    short = {name: (A[:, :32], B) for name, (A, B) in factors(1).items()}
    assert "does not fit" in told(save_lora(tmp_path / "short", short), base=folder / "base")["does-not-fit"]
    large = told(save_lora(tmp_path / "large", factors(1), alpha=300 * RANK), base=folder / "base")
    assert "every target has a scaling of 300" in large["scaling"]
    assert "of its weight; 24 of 24 targets" in large["too-large"]
    nothing = told(folder / "one", base=folder / "base", merged=folder / "base")
    assert nothing["merged-less"] == "The merged model contains none of the change: it equals the base."
    other = save_lora(tmp_path / "else", factors(3), base="org/else")
    pair = {each.code: each.text for each in ak.report([folder / "one", other]).verdicts}
    assert pair["different-bases"].endswith("one for org/base and else for org/else.")


def test_a_clean_adapter_has_nothing_but_notes(tmp_path: Path) -> None:
    found = ak.report([save_lora(tmp_path / "one", factors(7)), save_lora(tmp_path / "two", factors(8))])
    assert {each.level for each in found.verdicts} == {"note"}, found.verdicts
    assert {each.code for each in found.verdicts} <= {"summary", "independent"}


def test_layers_of_another_kind_are_no_gaps(tmp_path: Path) -> None:
    """The middle of a U-Net has other modules than its blocks."""
    pair = np.ones((2, 8)), np.ones((8, 2))
    blocks = {f"down.{d}.attentions.{a}.{m}": pair for d in range(3) for a in range(2) for m in ("to_q", "to_k")}
    found = blocks | {"mid.attentions.0.proj_in": pair, "mid.attentions.1.proj_in": pair}
    told = ak.report(save_lora(tmp_path / "unet", found, r=2)).verdicts
    assert not [each for each in told if each.code == "missing-targets"], told
    del found["down.1.attentions.1.to_k"]
    told = ak.report(save_lora(tmp_path / "gap", found, r=2)).verdicts
    assert [each.text for each in told if each.code == "missing-targets"] == [
        "to_k is missing in layer down.1.attentions.1; all other layers have it."
    ]


def test_products_of_factors_are_computed_by_one_thread(tmp_path: Path) -> None:
    """The limit was set before numpy was there and so had no effect: beside other work, twenty times the time."""
    save_lora(tmp_path / "one", factors(1))
    code = (
        "import adapterkit as ak, threadpoolctl\n"
        "seen = []\n"
        "ak.report('one', progress=lambda done, total: seen.append(threadpoolctl.threadpool_info()))\n"
        "print({each['num_threads'] for info in seen for each in info if each['user_api'] == 'blas'})"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(Path(ak.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "{1}", done.stderr


@pytest.mark.parametrize("kind", ["image", "language"])
def test_formats_of_another_kind_of_model_are_not_named(kind: str, tmp_path: Path) -> None:
    """A report of a FLUX LoRA named NeMo and Megatron, which have no names for its modules; their writers refuse it."""
    A, B = np.ones((2, 8), "f4"), np.ones((8, 2), "f4")
    stem = "transformer.transformer_blocks.0.attn.to_q"
    if kind == "image":
        save_file({f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}, tmp_path / "image.safetensors")
        adapter = ak.read(tmp_path / "image.safetensors", format="diffusers")
    else:
        adapter = ak.read(save_lora(tmp_path / "language", {"model.layers.0.self_attn.q_proj": (A, B)}, r=2))
    (facts,) = ak.report(adapter).facts
    others = [name for name in FORMATS if FORMATS[name].models not in ("", kind)]
    assert len(others) >= 5
    assert not set(others) & set(facts.formats)
    assert {"adapterkit", "peft"} <= set(facts.formats)
    for name in others:
        with pytest.raises(ak.AdapterkitError):
            ak.write(adapter, tmp_path / name / "out", format=name)


def test_every_rule_has_its_own_code() -> None:
    assert len({rule.code for rule in RULES}) == len(RULES) > 20


def test_an_adapter_that_needs_its_base_says_so() -> None:
    data = Path(ak.__file__).parent / "demo" / "data"
    alone = ak.report(data / "negative")
    assert [each.code for each in alone.verdicts] == ["needs-base"]
    assert "--base" in alone.verdicts[0].text
    based = ak.report(data / "negative", base=data / "base")
    adapter, W = ak.read(data / "negative"), load_file(data / "base" / "model.safetensors")
    assert W
    for effect in based.measured.effects:
        assert effect.norm == pytest.approx(np.linalg.norm(adapter.delta(effect.target, base=data / "base")), rel=1e-4)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model.layers.2.mlp.up", "model.layers.10.mlp.up", "lm_head"], [("2", "up"), ("10", "up"), ("", "lm_head")]),
        (
            ["blocks.0.ff.net.0.proj", "blocks.1.ff.net.0.proj", "blocks.0.ff.net.2", "blocks.1.ff.net.2"],
            [("0", "proj"), ("1", "proj"), ("0", "ff.net.2"), ("1", "ff.net.2")],
        ),
        (["layers.0.experts.0.w1", "layers.0.experts.7.w1"], [("0", "w1"), ("0", "w1")]),
        (["down.1.attentions.0.q", "down.1.attentions.1.q"], [("0", "q"), ("1", "q")]),
        (["up.1.attentions.0.q", "down.2.attentions.1.q"], None),
        ([""], [("", "")]),
    ],
)
def test_layers_and_modules_are_found_in_names(paths: list[str], expected: list[tuple[str, str]] | None) -> None:
    found = cells(paths)
    assert list(found) == paths
    if expected is not None:
        assert [(cell.layer, cell.module) for cell in found.values()] == expected
    assert len({(cell.layer, cell.module, path if expected else "") for path, cell in found.items()}) >= 1


class Page(HTMLParser):
    """Collects what a page would load, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.rows = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.loads += [f"{tag} {told[key]}" for key in ("src", "href", "xlink:href", "data") if told.get(key)]
        self.ids += [told["id"]] if told.get("id") else []
        self.rows += tag == "tr"


def test_the_page_is_whole_and_loads_nothing(both: AdapterReport) -> None:
    text = both.html()
    assert text == both.html()
    page = Page(text)
    assert all(load.split()[1].startswith(("#", "data:")) for load in page.loads), page.loads
    assert not re.findall(r"(?<!xmlns=\")https?://(?!www\.w3\.org)", text)
    assert "@import" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert page.rows > len(both.measured.effects)
    assert len(text.encode()) < 3_000_000
    for each in both.verdicts:
        assert each.text.replace("'", "&#x27;") in text
    assert text.count("<svg ") == text.count('role="img"') == len(both.charts)
    assert "<script" not in both._repr_html_()
    assert repr(both).startswith("<adapterkit report on one, other: ")


def test_names_in_files_put_no_markup_into_the_page(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">'
    found = {f"model.layers.{layer}.{evil}": (np.ones((2, 4)), np.ones((4, 2)) * layer) for layer in (1, 2)}
    report = ak.report(save_lora(tmp_path / "a<b>'c", found, base=f"org/{evil}", r=2, target_modules=[evil]))
    assert evil not in report.html()
    assert evil not in report._repr_html_()
    assert not [load for load in Page(report.html()).loads if "x" in load.split()[1:]]


def test_the_page_of_many_targets_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = {
        f"model.layers.{layer}.mlp.experts.{expert}.{module}": (rng.random((1, 2)), rng.random((2, 1)))
        for layer in range(20) for expert in range(40) for module in ("up", "gate", "down")
    }  # fmt: skip
    report = ak.report(save_lora(tmp_path / "many", found, r=1))
    assert len(report.html().encode()) < 3_000_000
    assert "The 2,000 rows with the largest changes. The output of --json has all 2,400 rows." in report.html()


def test_figures_are_svg_and_png(both: AdapterReport, tmp_path: Path) -> None:
    files = both.figures(tmp_path / "figures")
    assert {path.name for path in files} >= {"norms-1-one.svg", "spectra-2-other.png", "cosine.svg", "interference.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files if path.suffix == ".png")
    assert all(path.read_bytes()[:4] == b"<svg" for path in files if path.suffix == ".svg")


def test_the_command_writes_the_page_and_the_record(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    words = ["report", folder / "one", folder / "other", "-o", out]
    told = record(*words)
    assert told["out"] == str(out)
    assert [each["name"] for each in told["facts"]] == ["one", "other"]
    assert told["pairs"][0]["cosine"] == pytest.approx(
        ak.report([folder / "one", folder / "other"]).measured.cosine(0, 1)
    )
    assert out.read_text("utf-8").startswith("<!doctype html>")
    refused = run("report", folder / "one", "-o", out)
    assert refused.exit_code == 6
    assert "--overwrite" in refused.stderr
    assert run("report", folder / "one").stdout.splitlines()[-1].startswith("Add -o report.html")
    assert run("report", folder / "one", "--merged", folder / "base").exit_code == 2


def test_without_the_drawing_package_the_numbers_are_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    assert run("report", folder / "one").exit_code == 0
    refused = run("report", folder / "one", "-o", folder / "none.html")
    assert refused.exit_code == 3
    assert 'pip install "adapterkit[report]"' in refused.stderr
    assert not (folder / "none.html").exists()
