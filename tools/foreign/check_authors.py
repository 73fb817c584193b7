"""Compare combiners with the functions of their authors, on the same float64 changes.

    python tools/foreign/check_authors.py FOLDER [--out docs/pictures/authors.json] [--only ties della]

FOLDER has a clone of each repository under its own name: `git clone https://github.com/gstoica27/KnOTS`, and so on. A
missing repository is skipped, and its row in --out stays. Nothing is downloaded. The script extracts single functions
from the source by name and runs them, because most files begin with imports of vision models. If a function rounds to
float32 or uses a GPU, it runs in float64 on the CPU instead. Random draws are replaced by the same numbers for both.
`compress-then-merge` needs tensorly; the rows of mergekit need the package.

A row has the method, the source, the setting, and the largest difference over two weights, relative to the norm of the
authors' result. Differences of up to 1e-7 count as equal.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import adapterkit as ak  # noqa: E402 - the checkout's own
from adapterkit.core.adapter import Adapter, Target  # noqa: E402
from adapterkit.io.lazy import from_numpy  # noqa: E402
from adapterkit.methods import METHODS  # noqa: E402
from adapterkit.ops.context import FormulaContext  # noqa: E402

TASKS, NAMES = 4, ("layers.0.attn", "layers.1.attn")
SHAPES = ((96, 120), (120, 96))
THIN, WIDE = 16, 24
"""Ranks of the adapters: together less than the weights have, and as much."""

AGREES = 1e-7

Changes = list[dict[str, torch.Tensor]]
"""One mapping of names to changes for each task."""


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison.

    Attributes:
        method: our method.
        source: owner and name of the repository, or the package.
        path: the file of the functions.
        setting: what is set, in words.
        theirs: returns the authors' result from the folder of the repository and the data.
        ours: our parameters.
        rank: of the adapters.
        tasks: how many of them.
        names: how many weights.
        more: further arguments of `ak.ops.combine`.
    """

    method: str
    source: str
    path: str
    setting: str
    theirs: Callable[[Path, Data], Mapping[str, torch.Tensor]]
    ours: Mapping[str, Any] = field(default_factory=dict)
    rank: int = WIDE
    tasks: int = TASKS
    names: int = len(NAMES)
    more: Callable[[Data], Mapping[str, Any]] = lambda _: {}


class Data:
    """Random adapters with a third in common."""

    def __init__(self, rank: int, tasks: int, names: int) -> None:
        self.names = NAMES[:names]
        self.factors: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        for task in range(tasks):
            each = {}
            for at, (name, (out, columns)) in enumerate(zip(self.names, SHAPES, strict=False)):
                shared, own = np.random.default_rng([at]), np.random.default_rng([at, task + 1])
                A, B = (
                    0.5 * shared.standard_normal(shape) + own.standard_normal(shape)
                    for shape in ((rank, columns), (out, rank))
                )
                each[name] = torch.from_numpy(A), torch.from_numpy(B)
            self.factors.append(each)

    def changes(self) -> Changes:
        """Products, new ones each time: some functions write into what they get."""
        return [{name: B @ A for name, (A, B) in each.items()} for each in self.factors]

    def zeros(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(change) for name, change in self.changes()[0].items()}

    def adapters(self) -> list[Adapter]:
        return [
            Adapter({
                Target(name): (METHODS["lora"](A=from_numpy(A.numpy()), B=from_numpy(B.numpy())),)  # type: ignore[dict-item]
                for name, (A, B) in each.items()
            })
            for each in self.factors
        ]  # fmt: skip

    def vectors(self) -> list[SimpleNamespace]:
        """Changes as most authors' `TaskVector`."""
        return [SimpleNamespace(vector=change) for change in self.changes()]

    def flat(self) -> torch.Tensor:
        """`[T, n]`, all weights of a task in a row."""
        return torch.stack([torch.cat([W.reshape(-1) for W in each.values()]) for each in self.changes()])

    def back(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = [math.prod(shape) for shape in SHAPES[: len(self.names)]]
        parts = zip(self.names, torch.split(vector.reshape(-1), sizes), SHAPES, strict=False)
        return {name: part.reshape(shape) for name, part, shape in parts}

    def uniform(self, name: str, task: int) -> torch.Tensor:
        """Our random numbers of a change."""
        shape = SHAPES[self.names.index(name)]
        at = FormulaContext(Target(name), shape, tuple(range(len(self.factors))))
        return torch.from_numpy(at.uniform(task, shape))


class Double:
    """torch whose float32 is float64, so that what is compared is not rounding."""

    float32 = float16 = bfloat16 = torch.float64

    def __init__(self, bernoulli: Any = None) -> None:
        self.given = bernoulli

    def __getattr__(self, name: str) -> Any:
        if name == "bernoulli" and self.given is not None:
            return self.given
        return getattr(torch, name)


def taken(path: Path, *wanted: str, **given: Any) -> SimpleNamespace:
    """Functions and classes of a file by name, `Class.method` too, without the rest of the file."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join(
            "".join(cell["source"]) for cell in cells if any(f"def {w}" in "".join(cell["source"]) for w in wanted)
        )
    found: list[ast.stmt] = []
    for name in wanted:
        outer, _, inner = name.partition(".")
        (node,) = [n for n in ast.parse(text).body if getattr(n, "name", None) == outer]
        if inner:
            (node,) = [n for n in node.body if getattr(n, "name", None) == inner]  # type: ignore[attr-defined]
        for each in ast.walk(node):
            # Types in signatures name what the file imports; decorators log or register.
            if isinstance(each, ast.FunctionDef):
                each.returns, each.decorator_list = None, []
                for argument in (*each.args.args, *each.args.kwonlyargs):
                    argument.annotation = None
        found.append(node)
    torch_ = given.pop("torch", Double())
    space: dict[str, Any] = {
        "torch": torch_, "np": np, "math": math, "copy": copy, "deepcopy": copy.deepcopy, "OrderedDict": OrderedDict,
        "defaultdict": defaultdict, "tqdm": lambda values, **_: values, "logging": logging, "re": re, "Any": Any,
        "List": list, "Dict": dict, "Optional": Any, "Union": Any, "Tuple": tuple, "nn": torch.nn,
        "log": logging.getLogger(__name__), "EPS": 1e-8, "StateDictType": dict, "CPU_DEVICE": "cpu", **given,
    }  # fmt: skip
    code = ast.fix_missing_locations(ast.Module(found, []))
    exec(compile(code, str(path), "exec"), space)
    return SimpleNamespace(**{name.rpartition(".")[2]: space[name.rpartition(".")[2]] for name in wanted}, space=space)


def config(**more: Any) -> SimpleNamespace:
    """What several authors' functions look up."""
    return SimpleNamespace(DATASETS=list(range(TASKS)), device="cpu", num_tasks=TASKS, **more)


def ties(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """TIES over the whole model."""
    f = taken(
        folder / "src/utils/merge_utils.py", "topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge",
        "merge_methods", logger=logging.getLogger(__name__),
    )  # fmt: skip
    return data.back(f.merge_methods("topk", data.flat(), 20, "mass", "dis-mean"))


def knots(merge: str) -> Any:
    """KnOTS, its decomposition, mask and mean."""

    def run(folder: Path, data: Data) -> dict[str, torch.Tensor]:
        m = taken(
            folder / "task_merger.py", "SVDMerger.apply_svd", "SVDMerger.dict_of_concat_matrices",
            "SVDMerger.variable_extend_dim", "SVDMerger.reconstruct_merged_sd",
        )  # fmt: skip
        k = taken(
            folder / "masking_ops.py", "topk_values_mask", "resolve_zero_signs", "resolve_sign", "ties_masking",
            "tv_masking", "chunked_disjoint_mean", "chunked_sum", "masked_merge",
        )  # fmt: skip
        self = SimpleNamespace(device="cpu")
        self.variable_extend_dim = lambda *a, **o: m.variable_extend_dim(self, *a, **o)
        self.dict_of_concat_matrices = lambda *a, **o: m.dict_of_concat_matrices(self, *a, **o)
        U, _, sVs, _ = m.apply_svd(self, data.changes())
        flat = [torch.cat([each[name].reshape(-1) for name in data.names]) for each in sVs]
        masks = k.ties_masking(flat, topK=20) if merge == "mean" else k.tv_masking(flat, topK=100)
        merged = k.masked_merge(torch.vstack(flat) * masks, merge)
        parts = torch.split(merged, [sVs[0][name].numel() for name in data.names])
        shaped = {name: part.reshape(sVs[0][name].shape) for name, part in zip(data.names, parts, strict=True)}
        return dict(m.reconstruct_merged_sd(self, U, shaped))

    return run


def core(how: str) -> Any:
    """Core Space with a method in it."""

    def run(folder: Path, data: Data) -> dict[str, torch.Tensor]:
        c = taken(
            folder / "task_merger.py", "MatrixPerLayerMerger.get_core_matrices", "MatrixPerLayerMerger._process_ties",
            "MatrixPerLayerMerger.get_tsv_delta_w", "MatrixPerLayerMerger.get_cart_delta_w", "isotropize_matrix",
            "MatrixPerLayerMerger.get_iso_matrix", ties_merging=_lora_ties(folder),
        )  # fmt: skip
        made = {}
        for name in data.names:
            M, U, Vh = c.get_core_matrices(SimpleNamespace(cache={}), list(data.factors), name, {})
            if how == "ties":
                merged = c._process_ties(None, M, topK=20)
            elif how == "tsv":
                merged = c.get_tsv_delta_w(None, M)
            elif how == "cart":
                merged = c.get_cart_delta_w(None, M, 0.04, 0.1)
            else:
                merged = c.get_iso_matrix(None, M) if how == "iso" else sum(M)
            made[name] = U @ merged @ Vh
        return made

    return run


def _lora_ties(folder: Path) -> Any:
    path = folder / "merging_functions.py"
    # Later files sum in pieces.
    pieces = [n.name for n in ast.parse(path.read_text("utf-8")).body if getattr(n, "name", "").startswith("chunked")]  # type: ignore[attr-defined]
    several = ("topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge", "ties_merging", *pieces)
    return taken(path, *several).ties_merging


def ctm(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """CtM in core space with TIES."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    c = taken(
        folder / "task_merger.py", "MatrixPerLayerMerger.get_low_rank_components_in_core_space",
        "MatrixPerLayerMerger.util_get_core_matrices", "MatrixPerLayerMerger._process_ties", tl=tensorly,
        partial_tucker=partial_tucker, time=SimpleNamespace(time=lambda: 0.0), ties_merging=_lora_ties(folder),
        float32_dtype=torch.float64,
    )  # fmt: skip
    self = SimpleNamespace(device="cpu", util_get_core_matrices=lambda **o: c.util_get_core_matrices(self, **o))
    made = {}
    for name in data.names:
        As, Bs = ([each[name][i] for each in data.factors] for i in (0, 1))
        U, V, cores = c.get_low_rank_components_in_core_space(
            self, As, Bs, rank=data.factors[0][name][0].shape[0], beta=0.25
        )
        made[name] = 0.75 * U @ c._process_ties(None, cores, topK=25) @ V.T
    return made


def tsv(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """TSV-M."""
    f = taken(folder / "src/utils/TSVM_utils.py", "compute_svd_dict", "sum_svd_dict")
    return dict(f.sum_svd_dict(f.compute_svd_dict(data.vectors(), config()), config()))


def iso_c(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """Iso-C."""
    return dict(taken(folder / "src/utils/iso.py", "iso_c").iso_c(data.vectors(), config()))


def iso_cts(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """Iso-CTS."""
    asked = config(method=SimpleNamespace(common_space_fraction=0.8))
    return dict(taken(folder / "src/utils/iso.py", "iso_cts").iso_cts(data.vectors(), asked))


def consensus(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """TALL masks of the sum, and entries that two tasks want."""
    f = taken(folder / "src/utils/tallmask_utils.py", "generate_task_masks", log_wandb_mask_sparsity=lambda _: None)
    flat = data.flat()
    masks = f.generate_task_masks(flat, flat, torch.zeros_like(flat[0]), tall_mask_lambda=0.4)
    return data.back(flat.sum(0) * (masks.sum(0) >= 2))


def dare(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """DARE, then the sum."""
    made = data.zeros()
    for task, each in enumerate(data.changes()):
        for name, change in each.items():
            drawn = data.uniform(name, task)
            # Theirs draws what is dropped, ours what is kept.
            given = Double(lambda rates, u=drawn: (u >= 1 - rates).to(rates))
            f = taken(folder / "model_merging_methods/mask_weights_utils.py", "mask_input_with_mask_rate", torch=given)
            made[name] += f.mask_input_with_mask_rate(change, 0.2, True, "random")
    return made


def della(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """DELLA, by the whole of its task."""
    home, made = folder / "mergekit/mergekit", {}
    for name in data.names:
        tasks = iter(range(len(data.factors)))
        given = Double(lambda p, n=name, t=tasks: (data.uniform(n, next(t)) < p).to(p))
        kinds = SimpleNamespace(rank_magnitude_sampling="rank", magnitude=0, magnitude_row=0, rescaled_random=0)
        sparsify = taken(home / "sparsify.py", "rank_magnitude", "sparsify", torch=given, SparsificationMethod=kinds)
        base = torch.zeros_like(data.changes()[0][name])
        settings = {"density": 0.7, "window_size": 0.14, "rescale": True, "weight": 1.0, "lambda": 1.0}
        several = [{"delta": each[name], **settings} for each in data.changes()]
        task = taken(
            home / "merge_methods/generalized_task_arithmetic.py", "GTATask.execute", "get_mask",
            sparsify=sparsify.sparsify, get_task_vectors=lambda *_, s=several, b=base, **__: (s, b),
        )  # fmt: skip
        method = SimpleNamespace(
            sparsification_method="rank", consensus_method="sum", lambda_type=None, default_normalize=True
        )
        self = SimpleNamespace(
            method=method, out_tensor_name=name, base_model=None, int8_mask=False, normalize=True,
            tensor_parameters=SimpleNamespace(data=None),
        )  # fmt: skip
        made[name] = task.execute(self, {})
    return made


def breadcrumbs(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """What is left of each row without its largest and its smallest entries."""
    c = taken(
        folder / "src/task_vectors.py", "TaskVectorMiddleKeep.mask_keep_top", "TaskVectorMiddleKeep.mask_remove_top"
    )
    self, made = SimpleNamespace(top_k_keep=0.15, top_k_remove=0.01), data.zeros()
    for each in data.changes():
        for name, change in each.items():
            made[name] += c.mask_keep_top(self, c.mask_remove_top(self, change))
    return made


def ram(which: str, **more: Any) -> Any:
    """RAM, and RAM+ of one weight, as its shares are of the whole model there."""

    def run(folder: Path, data: Data) -> dict[str, torch.Tensor]:
        f = taken(folder / "ram-main.py", which)
        return dict(getattr(f, which)(data.zeros(), data.changes(), **more))

    return run


def sce(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """SCE, by the whole of its task: all entries, with the weights of those that vary."""
    path, made = folder / "FuseChat/mergekit/mergekit/merge_methods/sce_merging.py", {}
    for name in data.names:
        base, several = data.zeros()[name], [{"delta": each[name]} for each in data.changes()]
        task = taken(
            path, _task_class(path), "get_sce_weight", "get_sce_mask", "get_erase_mask",
            get_task_vectors=lambda *_, s=several, b=base: (s, b),
        )  # fmt: skip
        made[name] = task.execute(SimpleNamespace(out_tensor_name=name, base_model=None, select_topk=0.1), {})
    return made


def _task_class(path: Path) -> str:
    tree = ast.parse(path.read_text("utf-8"))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    return next(f"{c.name}.execute" for c in classes if any(getattr(n, "name", "") == "execute" for n in c.body))


def inputs(_: Data) -> dict[str, Any]:
    """What a task sees at a target, for RegMean."""

    def seen(task: int, target: str) -> Any:
        columns = SHAPES[NAMES.index(target)][1]
        return np.random.default_rng([NAMES.index(target), 100 + task]).standard_normal((3 * columns, columns))

    return {"data": seen}


def regmean(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """RegMean."""
    path = folder / "src/model_merge/avg_merger.py"
    (owner,) = [
        n.name for n in ast.parse(path.read_text("utf-8")).body
        if isinstance(n, ast.ClassDef) and any(getattr(m, "name", "") == "regmean_mean_params" for m in n.body)
    ]  # fmt: skip
    f = taken(path, f"{owner}.regmean_mean_params", f"{owner}.reduce_non_diag")
    said = SimpleNamespace(regmean_exclude_param_regex=[], regmean_diag=False, regmean_reduce_nondiag=0.9)
    self = SimpleNamespace(merger_config=said, reduce_non_diag=lambda G, a: f.reduce_non_diag(None, G, a).to(G))
    seen = inputs(data)["data"]
    grams = [
        {name: torch.from_numpy(seen(task, name).T @ seen(task, name)) for name in data.names}
        for task in range(len(data.factors))
    ]
    every = {f"{name}.weight": [each[name] for each in data.changes()] for name in data.names}
    found = f.regmean_mean_params(self, every, grams)
    return {name: found[f"{name}.weight"] for name in data.names}


def robust_merge(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """RobustMerge: the loop over the factors, from the middle of the function that loads a model."""
    path = folder / "llava/model/builder.py"
    loops = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.For) and ast.unparse(node.target) == "(name, concat_model_weight)"
    ]  # fmt: skip
    space = taken(path, "clamp").space
    space |= {
        "mask_ratio": 0.2, "att_ratio": 0.2, "merged_model_weights": {}, "concat_model_weights": {},
        "fuse_weight": torch.full((len(data.factors), 1, 1), 2.0, dtype=torch.float64),
    }  # fmt: skip
    for name in data.names:
        for place, factor in enumerate("AB"):
            stacked = torch.stack([each[name][place] for each in data.factors])
            space["concat_model_weights"][f"{name}.lora_{factor}"] = stacked
    exec(compile(ast.fix_missing_locations(ast.Module([loops[0]], [])), str(path), "exec"), space)
    found = space["merged_model_weights"]
    return {name: found[f"{name}.lora_B"] @ found[f"{name}.lora_A"] for name in data.names}


def wudi(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """WUDI's 300 steps of Adam."""
    f = taken(folder / "vit/wudi_main.py", "get_redundant_task_vector")
    kept = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    try:
        return {
            name: f.get_redundant_task_vector(name, torch.stack([each[name] for each in data.changes()]))
            for name in data.names
        }
    finally:
        torch.Tensor.cuda = kept  # type: ignore[method-assign]


def cart(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """CART's truncated differences from the mean."""
    made = SimpleNamespace
    c = taken(folder / "src/merging.py", "StaticMergeModule._get_truncated_task_vectors", TaskVector=made)
    self = made(task_vectors=data.vectors(), device="cpu")
    zeros, mean = data.zeros(), {name: sum(each[name] for each in data.changes()) / TASKS for name in data.names}
    parts = c._get_truncated_task_vectors(self, rank_ratio=0.12, prev_origin=zeros, new_origin=mean)
    return {name: mean[name] + 2.0 * sum(part.vector[name] for part in parts) for name in data.names}


def dc_merge(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """DC-Merge of LoRAs of rank 16."""
    f = taken(
        folder / "vision_lora_merge/merging_functions.py", "dc_merge", "keep_topk_percent", "ties_small",
        "generate_linear_distribution",
    )  # fmt: skip
    return dict(f.dc_merge({name: [each[name] for each in data.changes()] for name in data.names}))


def pcb(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """PCB over the whole model."""
    f = taken(folder / "pcb-merging.py", "normalize", "clamp", "act", "PCB_merge")
    return data.back(f.PCB_merge(data.flat(), pcb_ratio=0.1)[0])


def emr(task: int | None) -> Any:
    """EMR's elected change, or what a task takes of it."""

    def run(folder: Path, data: Data) -> dict[str, torch.Tensor]:
        # Scales are kept in the default type.
        torch.set_default_dtype(torch.float64)
        try:
            f = taken(folder / "merge_vit/src/main_emr_merging.py", "emr_merge")
            unified, masks, scales = f.emr_merge(data.vectors())
        finally:
            torch.set_default_dtype(torch.float32)
        if task is None:
            return dict(unified)
        return {name: unified[name] * masks[name][task] * scales[task] for name in data.names}

    return run


def lines(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """LiNeS of the sum."""
    f = taken(folder / "LiNeS_example.ipynb", "line_scaling")
    whole = {f"m.resblocks.{i}.w": sum(each[name] for each in data.changes()) for i, name in enumerate(data.names)}
    found = f.line_scaling(whole, alpha=0.25, beta=0.5, num_blocks=len(data.names))
    return {name: found[f"m.resblocks.{i}.w"] for i, name in enumerate(data.names)}


def svc(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """SVC of the sum."""
    which = "subspace_consistency_spectral_calibration"
    f = taken(
        folder / "fusion_bench/method/singular_value_calibration/utils.py", which, "project_onto_singular_vectors",
        "compute_projection_coefficient", "compute_interference",
    )  # fmt: skip
    zeros = data.zeros()
    return {
        name: getattr(f, which)(
            zeros[name], [e[name] for e in data.changes()], sum(e[name] for e in data.changes()), 1.0
        )
        for name in data.names
    }


def model_stock(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """Model Stock of two."""
    path = folder / "fusion_bench/method/model_stock/model_stock.py"
    f = taken(path, "compute_angle", "compute_ratio", "merge_weights", EPS=0.0)
    one, other, zeros = *data.changes(), data.zeros()
    kept = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    try:
        return dict(f.merge_weights(one, other, zeros, f.compute_ratio(f.compute_angle(one, other, zeros))))
    finally:
        torch.Tensor.float = kept  # type: ignore[method-assign]


def slerp(folder: Path, data: Data) -> dict[str, torch.Tensor]:
    """SLERP half-way."""
    f = taken(folder / "fusion_bench/method/slerp/slerp_utils.py", "slerp", "normalize", "lerp", T=Any)
    one, other = data.changes()
    return {name: f.slerp(0.5, one[name], other[name]) for name in data.names}


def mergekit(method: str, *, based: bool = True, **parameters: Any) -> Any:
    """The installed mergekit, tensor by tensor; a method without a base takes the changes themselves."""

    def run(_: Path, data: Data) -> dict[str, torch.Tensor]:
        from mergekit.merge_methods import merge_tensors

        made = {}
        for name in data.names:
            several = [each[name] for each in data.changes()]
            base = [torch.zeros_like(several[0])] if based else []
            place = {"base_index": 0} if based else {}
            made[name] = merge_tensors([*base, *several], method, parameters=parameters, **place)
        return made

    return run


CORE = "apanariello4/core-space-merging", "task_merger.py"
ISO = "danielm1405/iso-merging", "src/utils/iso.py"
KIT = "mergekit", "merge_tensors"
WEIGHTS = {"weight": [1.0] * TASKS}
CASES = (
    Case("ties", "prateeky2806/ties-merging", "src/utils/merge_utils.py", "density 0.2 over the model, mean", ties),
    Case("knots_ties", "gstoica27/KnOTS", "task_merger.py", "density 0.2, mean", knots("mean"), rank=THIN),
    Case("knots_task_arithmetic", "gstoica27/KnOTS", "task_merger.py", "sum", knots("sum"), rank=THIN),
    Case("core_ties", *CORE, "density 0.2 per tensor", core("ties"), rank=THIN),
    Case("core_tsv", *CORE, "1 / T of the directions", core("tsv"), {"directions": THIN}, THIN),
    Case("core_iso_c", *CORE, "sum", core("iso"), rank=THIN),
    Case("core_task_arithmetic", *CORE, "sum", core("sum"), rank=THIN),
    Case("core_cart", *CORE, "share 0.04, scale 0.1", core("cart"),
         {"share": 3 / 64, "scale": 0.1}, THIN),
    Case("ctm", "ZhengbaoHe/compress-then-merge", "task_merger.py", "beta 0.25, TIES density 0.25, scale 0.75", ctm,
         {"density": 0.25, "scale": 0.75}, THIN),
    Case("tsv", "AntoAndGar/task_singular_vectors", "src/utils/TSVM_utils.py", "1 / T of the directions", tsv),
    Case("iso_c", *ISO, "over=weight", iso_c, {"over": "weight"}),
    Case("iso_cts", *ISO, "common 0.8", iso_cts),
    Case("consensus", "nik-dim/tall_masks", "src/utils/tallmask_utils.py", "lambda 0.4, two agree", consensus),
    Case("dare_linear", "yule-BUAA/MergeLM", "model_merging_methods/mask_weights_utils.py", "20 % dropped", dare),
    Case("della", "declare-lab/della", "mergekit/mergekit/sparsify.py", "30 % dropped, window 0.14", della),
    Case("breadcrumbs", "rezazzr/breadcrumbs", "src/task_vectors.py", "density 0.15, gamma 0.01, scope=row",
         breadcrumbs, {"density": 0.15, "gamma": 0.01, "scope": "row"}),
    Case("ram", "xiangchi-yuan/mrl", "ram-main.py", "threshold 1e-5", ram("agentic_reinforcement_merge")),
    Case("ramplus_tl", "xiangchi-yuan/mrl", "ram-main.py", "r 1.05, one weight",
         ram("agentic_reinforcement_merge_rescale", r=1.05), {"r": 0.05}, names=1),
    Case("sce", "fanqiwan/FuseAI", "FuseChat/mergekit/mergekit/merge_methods/sce_merging.py",
         "select 0.1, unselected=keep", sce, {"unselected": "keep"}),
    Case("regmean", "bloomberg/dataless-model-merging", "src/model_merge/avg_merger.py", "alpha 0.9", regmean,
         more=inputs),
    Case("robust_merge", "AuroraZengfh/RobustMerge", "llava/model/builder.py",
         "mask_ratio 0.2, att_ratio 0.2, weight 2", robust_merge, rank=THIN),
    Case("wudi", "nathanielyvo/WUDI-Merging", "vit/wudi_main.py", "300 steps of Adam", wudi, {"solver": "adam"}, THIN),
    Case("cart", "JH-GEECS/CART", "src/merging.py", "share 0.12 of the weight, scale 2", cart, {"over": "weight"}),
    Case("dc_merge", "Tobeginwith/DC-Merge", "vision_lora_merge/merging_functions.py",
         "smoothing=average, density 0.001", dc_merge, rank=THIN),
    Case("pcb", "duguodong7/pcb-merging", "pcb-merging.py", "ratio 0.1", pcb),
    Case("emr", "harveyhuang18/EMR_Merging", "merge_vit/src/main_emr_merging.py", "elected", emr(None)),
    Case("emr", "harveyhuang18/EMR_Merging", "merge_vit/src/main_emr_merging.py", "task 1", emr(1), {"task": 1}),
    Case("lines_task_arithmetic", "wang-kee/LiNeS", "LiNeS_example.ipynb", "alpha 0.25, beta 0.5", lines,
         {"alpha": 0.25, "beta": 0.5}),
    Case("svc_task_arithmetic", "tanganke/fusion_bench", "method/singular_value_calibration/utils.py", "alpha 1", svc),
    Case("model_stock", "tanganke/fusion_bench", "method/model_stock/model_stock.py", "two adapters", model_stock,
         tasks=2),
    Case("slerp", "tanganke/fusion_bench", "method/slerp/slerp_utils.py", "t 0.5", slerp, tasks=2),
    Case("ties", *KIT, "density 0.2", mergekit("ties", **WEIGHTS, density=0.2),
         {"density": 0.2, "compat": "mergekit"}),
    Case("sce", *KIT, "select 0.3", mergekit("sce", select_topk=0.3),
         {"select": 0.3, "compat": "mergekit"}),
    Case("breadcrumbs", *KIT, "density 0.9, gamma 0.01", mergekit("breadcrumbs", **WEIGHTS, density=0.9, gamma=0.01),
         {"density": 0.9, "gamma": 0.01, "compat": "mergekit"}),
    Case("karcher", *KIT, "defaults", mergekit("karcher", based=False), {"compat": "mergekit"}),
)  # fmt: skip


def compared(case: Case, folder: Path) -> dict[str, Any]:
    """The row of one case; its difference is None if it could not be run, and `why` says so."""
    row: dict[str, Any] = {
        "method": case.method, "source": case.source, "path": case.path, "setting": case.setting,
        "commit": _commit(case, folder), "difference": None,
    }  # fmt: skip
    data = Data(case.rank, case.tasks, case.names)
    try:
        with redirect_stdout(StringIO()):
            theirs = case.theirs(folder, data)
    except (ImportError, FileNotFoundError) as error:
        return row | {"why": str(error)}
    made = ak.ops.combine(data.adapters(), case.method, **case.ours, **case.more(data))
    apart = []
    for name in data.names:
        (update,) = made.updates[Target(name)]
        ours = _exact(update)
        wanted = theirs[name].detach().double().numpy()
        apart.append(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))
    return row | {"difference": float(f"{max(apart):.1e}")}


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["source"], row["setting"]


def _exact(update: Any) -> Any:
    if update.method == "dense":
        return update.D.numpy().astype(np.float64)
    return update.scaling * update.B.numpy().astype(np.float64) @ update.A.numpy().astype(np.float64)


def _commit(case: Case, folder: Path) -> str:
    if "/" not in case.source:
        found = importlib.util.find_spec(case.source)
        from importlib.metadata import version

        return version(case.source) if found else ""
    done = subprocess.run(
        ["git", "-C", folder, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> int:
    """Compare all, print the rows, write them; exit 1 if one differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="METHOD")
    chosen = parser.parse_args()
    rows = []
    for case in CASES:
        if chosen.only and case.method not in chosen.only:
            continue
        row = compared(case, chosen.folder / case.source.rpartition("/")[2])
        rows.append(row)
        said = row.get("why") or f"{row['difference']:.1e}{'' if row['difference'] <= AGREES else '  DIFFERS'}"
        print(f"{case.method:<22} {case.source:<34} {case.setting:<28} {said}", flush=True)
    if chosen.out is not None:
        kept = json.loads(chosen.out.read_text("utf-8")) if chosen.out.exists() else []
        known = {_key(row): row for row in kept} | {_key(row): row for row in rows if row["difference"] is not None}
        order = [(case.method, case.source, case.setting) for case in CASES]
        made = [known[key] for key in order if key in known]
        chosen.out.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    run = [row for row in rows if row["difference"] is not None]
    agree = sum(row["difference"] <= AGREES for row in run)
    print(f"{agree} of {len(run)} agree; {len(rows) - len(run)} not run")
    return int(agree < len(run))


if __name__ == "__main__":
    sys.exit(main())
