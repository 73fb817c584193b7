"""Rotations, reflections and changes in a base's own basis: what the generic tests do not ask of them."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from peft import BOFTConfig, OFTConfig, PeftModel, get_peft_model
from peft.tuners.boft import layer as peft_boft
from peft.tuners.frod.model import _category_from_key
from peft.tuners.oft.layer import OFTLayer
from peft_cases.boft import Kernels
from peft_folders import contents
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Malformed, NotMergeable, ShapeMismatch, Unrepresentable, Unsupported
from adapterkit.formats.peft.families.frod import kind
from adapterkit.formats.peft.families.rotations import nearest_divisor
from adapterkit.linalg.rotations import cayley, neumann, skew

pytestmark = pytest.mark.filterwarnings("ignore")

OURS = ["boft", "frod", "hira", "hra", "oft", "osf", "psoft", "road"]
METHODS = ak.METHODS


def moved(wrapped, seed=3):
    """PEFT's adapter, every trained parameter off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def relative(got, wanted):
    return float((got.double() - wanted.double()).abs().max() / wanted.abs().max())


class BlockDiagonal:
    """What PEFT's CUDA extension computes: block-diagonal matrices."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


@pytest.mark.parametrize(("factors", "size"), [(2, 2), (3, 2), (2, 4)])
def test_factors_of_a_butterfly_as_peft_multiplies_them(factors, size, monkeypatch, tmp_path):
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: BlockDiagonal)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 6), nn.Conv2d(16, 5, 1))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    config = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["0", "1"])
    wrapped = moved(get_peft_model(base, config))
    wrapped.save_pretrained(tmp_path / "a")
    ak.merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out")
    got, wanted = load_file(tmp_path / "out" / "base.safetensors"), wrapped.merge_and_unload().state_dict()
    assert all(relative(got[name], wanted[name]) < 1e-6 for name in got)
    adapter = ak.read(tmp_path / "a").replace(foreign=None)
    ak.write(adapter, tmp_path / "again", "peft", base=tmp_path / "base.safetensors")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == factors
    again, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "a"))
    assert {name: t.shape for name, t in again.items()} == {name: t.shape for name, t in before.items()}


def test_oft_of_a_convolution_is_what_peft_trained_not_what_it_merges(tmp_path):
    """Its forward turns patches and adds them up where they overlap; its merge turns the weight, as in the formula."""
    torch.manual_seed(0)
    base, x = Kernels().eval(), torch.randn(2, 4, 5, 5)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    moved(get_peft_model(base, OFTConfig(oft_block_size=4, target_modules=["conv"]))).save_pretrained(tmp_path / "a")
    plain = Kernels()
    plain.load_state_dict(load_file(tmp_path / "base.safetensors"))
    theirs = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    with torch.no_grad():
        unmerged = theirs.base_model.model.conv(x)
        merged = theirs.merge_and_unload().conv
    with pytest.raises(NotMergeable, match="overlapping patches"):
        ak.merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out")
    formula = ak.read(tmp_path / "a", base=tmp_path / "base.safetensors", compat="formula")
    ak.merge(tmp_path / "base.safetensors", formula, tmp_path / "out")
    got = load_file(tmp_path / "out" / "base.safetensors")["conv.weight"]
    assert relative(got, merged.weight.detach()) < 1e-6
    assert relative(unmerged, merged(x).detach()) > 0.1
    live = Kernels()
    live.load_state_dict(load_file(tmp_path / "base.safetensors"))
    trained = ak.read(tmp_path / "a", base=tmp_path / "base.safetensors")
    handle = ak.torch.inject(live, trained)
    assert relative(live.conv(x).detach(), unmerged) < 1e-5
    handle.remove()
    ak.torch.inject(live, formula)
    assert relative(live.conv(x).detach(), merged(x).detach()) < 1e-5
    for place, adapter in (("trained", trained), ("formula", formula)):
        ak.write(adapter, tmp_path / place, "peft", base=tmp_path / "base.safetensors")
        assert contents(tmp_path / place) == contents(tmp_path / "a")


@pytest.mark.parametrize("width", [1, 6, 7, 12, 36])
def test_sizes_that_do_not_divide_are_rounded_as_in_peft(width):
    for wanted in range(1, 40):
        assert nearest_divisor(width, wanted) == OFTLayer.adjust_oft_parameters(None, width, wanted)


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.3.self_attn.q_proj",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.output.dense",
        "blocks.7.fc",
        "h.0",
        "0.up",
        "head",
    ],
)
def test_kinds_of_modules_are_peft_s(path):
    assert kind(path) == _category_from_key(path)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_rotation_keeps_lengths_and_its_series_nears_it(size):
    Q = 0.1 * skew(np.random.default_rng(size).normal(size=(3, size * (size - 1) // 2)))
    R = cayley(Q)
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.broadcast_to(np.eye(size), R.shape), atol=1e-14)
    np.testing.assert_allclose(neumann(-Q, 40), R, atol=1e-14)
    torch.testing.assert_close(cayley(torch.from_numpy(Q)), torch.from_numpy(R), rtol=1e-13, atol=1e-14)


def attributes(method):
    return {"hra": {}, "oft": {"terms": 5}}.get(method, {})


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_update_changes_nothing_and_all_of_it_learns(method, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype).requires_grad_(False)
    x, goal = torch.randn(32, 16, dtype=dtype), torch.randn(32, 8, dtype=dtype)
    fresh = ak.torch.create(model, method, rank=4, **attributes(method))
    handle = ak.torch.inject(model, fresh, trainable=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with handle.disable():
        plain = model(x)
    torch.testing.assert_close(model(x), plain, rtol=tolerance, atol=tolerance)
    trained = {name: p for name, p in handle.named_parameters() if name.split(".")[-1] not in METHODS[method].frozen}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = functional.mse_loss(model(x).float(), goal.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]
    assert all(bool((before[name] != parameter).any()) for name, parameter in trained.items())
    assert trained.keys() == {f"0.{method}.{name}" for name in fresh.find("0")[ak.Target("0")][0].tensors} - {
        f"0.{method}.{name}" for name in (*METHODS[method].frozen, "index")
    }


@pytest.mark.parametrize(("rank", "options"), [(3, {}), (4, {"gram_schmidt": True})])
def test_reflections_that_cannot_start_from_nothing_are_refused(rank, options):
    with pytest.raises(Unsupported, match="cannot start without changing the weight"):
        ak.torch.create(nn.Sequential(nn.Linear(8, 8)), "hra", rank=rank, **options)


@pytest.mark.parametrize(
    ("method", "layer", "why"),
    [
        ("psoft", nn.Conv1d(4, 6, 3), r"only weights \[out, in\]"),
        ("osf", nn.Conv1d(4, 6, 3), r"only weights \[out, in\]"),
        ("frod", nn.Conv1d(4, 6, 3), r"only weights \[out, in\]"),
        ("road", nn.Linear(4, 5), "do not form pairs"),
    ],
)
def test_layers_that_a_method_cannot_begin_at(method, layer, why):
    with pytest.raises(ShapeMismatch, match=why):
        ak.torch.create(nn.Sequential(layer), method, targets="0", rank=2)


def test_a_limit_on_a_rotation_that_stands_still_has_gradients():
    """|Q| has none at 0, where training begins."""
    pairs = torch.zeros(2, 1, requires_grad=True)
    update = METHODS["oft"](pairs=pairs, coft=True, eps=0.5)
    update.new_weight(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).square()[0, ::3].sum().backward()
    assert bool(torch.isfinite(pairs.grad).all())
    assert bool((pairs.grad != 0).all())


def psoft(**tensors):
    return METHODS["psoft"](pairs=torch.tensor([0.5, -0.25, 1.0]).double(), **tensors)


def test_the_subspace_of_psoft_has_signs_which_a_stored_one_keeps():
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    model = nn.Sequential(nn.Linear(5, 6))
    model[0].weight = nn.Parameter(W.float())
    ((_, fresh),) = ak.torch.create(model, "psoft", rank=3)
    A, B, flip = fresh.A.double(), fresh.B.double(), torch.tensor([1.0, -1.0, 1.0]).double()
    stored = psoft(A=A, B=B).new_weight(W.float().double())
    torch.testing.assert_close(psoft().new_weight(W.float().double()), stored, rtol=1e-6, atol=1e-6)
    other = psoft(A=A * flip[:, None], B=B * flip).new_weight(W.float().double())
    assert relative(other, stored) > 0.01
    U, S, V = np.linalg.svd(W.float().double().numpy())
    np.testing.assert_allclose(B @ A, (U[:, :3] * S[:3]) @ V[:3], rtol=0, atol=1e-5)
    adapter = ak.Adapter({ak.Target("q"): (psoft(A=A, B=B),)})
    with pytest.raises(Unrepresentable, match="psoft stores A and B"):
        ak.write(adapter, "nowhere", "peft")


def test_numpy_takes_the_subspace_from_the_same_decomposition():
    W = np.random.default_rng(0).normal(size=(6, 5)).astype("f4").astype("f8")
    pairs = np.array([0.5, -0.25, 1.0])
    by_numpy = METHODS["psoft"](pairs=pairs).new_weight(W)
    assert isinstance(by_numpy, np.ndarray)
    np.testing.assert_allclose(by_numpy, psoft().new_weight(torch.from_numpy(W)).numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 5), (5, 6), (64, 48)])
def test_the_part_that_osf_takes_off_is_that_of_the_smallest_singular_values(size):
    """Numerically: torch's in float32, as in PEFT, whichever library W is of."""
    W = np.random.default_rng(1).normal(size=size).astype("f4").astype("f8")
    zero = {"U": np.zeros((size[0], 3)), "S": np.zeros(3), "V": np.zeros((3, size[1]))}
    got = METHODS["osf"](**zero).new_weight(W)
    U, S, V = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(got, (U[:, :-3] * S[:-3]) @ V[:-3], rtol=0, atol=1e-5)
    by_torch = METHODS["osf"](**{n: torch.from_numpy(a) for n, a in zero.items()}).new_weight(torch.from_numpy(W))
    np.testing.assert_allclose(got, by_torch.numpy(), rtol=1e-12, atol=1e-12)


def test_lycoris_has_no_place_in_a_file_of_peft():
    square = METHODS["oft"](square=torch.zeros(2, 4, 4), side="out", rescale=torch.ones(8))
    with pytest.raises(Unrepresentable, match="LyCORIS"):
        ak.write(ak.Adapter({ak.Target("q"): (square,)}), "nowhere", "peft")


@pytest.mark.parametrize(
    ("update", "shape", "why"),
    [
        (METHODS["oft"](pairs=torch.zeros(2, 2)), (8, 16), "its length is not b"),
        (METHODS["oft"](pairs=torch.zeros(1, 3)), (8, 16), "columns=16, b=3"),
        (METHODS["oft"](pairs=torch.zeros(3, 6)), (8, 16), "the update has columns=12"),
        (METHODS["oft"](pairs=torch.zeros(3, 6), side="out"), (8, 16), "the update has out=12"),
        (METHODS["boft"](R=torch.zeros(3, 2, 8, 8), s=torch.ones(8)), (8, 16), r"a multiple of 2 \*\* \(m - 1\)"),
        (METHODS["boft"](R=torch.zeros(2, 2, 3, 3), s=torch.ones(8)), (8, 6), "even block size"),
        (METHODS["boft"](R=torch.zeros(1, 2, 4, 4), s=torch.ones(8)), (8, 16), "columns=8"),
        (METHODS["psoft"](pairs=torch.zeros(4)), (8, 16), "its length is not r"),
        (METHODS["psoft"](R=torch.zeros(9, 9)), (8, 16), "r=9"),
        (METHODS["osf"](U=torch.zeros(8, 9), S=torch.zeros(9), V=torch.zeros(9, 16)), (8, 16), "r=9"),
        (METHODS["road"](theta=torch.zeros(4), alpha=torch.zeros(4), group=6), (8, 16), "group=6"),
        (METHODS["road"](theta=torch.zeros(6), alpha=torch.zeros(6)), (8, 16), "out=12"),
        (
            METHODS["road"](theta=torch.zeros(7), alpha=torch.zeros(7), variant=4),
            (8, 16),
            "length of theta does not fit a whole number of outputs",
        ),
    ],
)
def test_what_does_not_fit_is_named(update, shape, why):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    with pytest.raises(ShapeMismatch, match=why):
        ak.torch.inject(model, ak.Adapter({ak.Target("0"): (update,)}))


@pytest.mark.parametrize("index", [[[0, 4], [0, 0]], [[0, -1], [0, 0]], [[1, 1], [2, 2]]])
def test_places_are_inside_and_distinct(index):
    tensors = {"l": torch.ones(4), "values": torch.ones(2), "V": torch.eye(4)}
    update = METHODS["frod"](**tensors, index=torch.tensor(index))
    with pytest.raises(Malformed, match=r"is outside in=4|the same position occurs twice"):
        update.check_values()

    def meet():
        update.check_against((4, 4))
        update.check_distinct()

    with pytest.raises((Malformed, ShapeMismatch), match=r"is outside in=4|the same position occurs twice"):
        meet()


def test_a_basis_that_is_singular_is_not_inverted():
    V = np.diag([1.0, 2.0, 0.0])
    update = METHODS["frod"](l=np.array([3.0, 5.0, 7.0]), values=np.zeros(0), V=V, index=np.zeros((2, 0), np.int64))
    W = np.array([[1.0, 0.0, 4.0], [0.0, 1.0, 0.0]])
    np.testing.assert_allclose(update.new_weight(W), [[3.0, 0.0, 0.0], [0.0, 10.0, 0.0]], atol=1e-12)


OFT = {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "peft_version": "0.21.2"}
BOFT = {"peft_type": "BOFT", "boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1}
FROD = {"peft_type": "FROD", "sparse_rate": 0.07}
OSF = {"osf_svd_params.U_low": (6, 2), "osf_svd_params.S_low": (2,), "osf_svd_params.V_low": (2, 8)}
PSOFT = {"peft_type": "PSOFT", "r": 3, "psoft_mag_a": False, "psoft_mag_b": False}
BROKEN = [
    (OFT | {"r": 2}, {"oft_R.weight": (2, 6)}, "must be 0, and the other positive"),
    (OFT | {"oft_block_size": 2}, {"oft_R.weight": (2, 6)}, "does not fit r, oft_block_size and block_share"),
    (OFT | {"block_share": True}, {"oft_R.weight": (2, 6)}, "does not fit r, oft_block_size and block_share"),
    (OFT, {"oft_R.weight": (2, 5)}, "does not fit r, oft_block_size and block_share"),
    (OFT, {"oft_R.weight": (2, 6), "oft_embedding_R.weight": (2, 6)}, "does not fit the module's other"),
    (BOFT | {"boft_block_num": 2}, {"boft_R": (1, 2, 4, 4), "boft_s": (6, 1)}, "must be 0"),
    (BOFT, {"boft_R": (1, 4, 2, 2), "boft_s": (6, 1)}, "does not fit boft_block_size"),
    (BOFT, {"boft_R": (2, 2, 4, 4), "boft_s": (6, 1)}, "does not fit boft_block_size"),
    (BOFT, {"boft_R": (1, 2, 4, 4), "boft_s": (6,)}, "boft_s must have two axes"),
    (BOFT, {"boft_R": (1, 2, 4, 4)}, "lacks a tensor that this one needs: boft_s"),
    ({"peft_type": "HRA", "r": 2}, {"hra_u": (8, 3)}, "rank 2"),
    ({"peft_type": "HIRA", "r": 2}, {"hira_A": (3, 8), "hira_B": (6, 3)}, "rank 2"),
    ({"peft_type": "ROAD", "variant": "road_3"}, {"road_theta": (3,), "road_alpha": (3,)}, "road_3"),
    (
        {"peft_type": "ROAD", "group_size": 3},
        {"road_theta": (3,), "road_alpha": (3,)},
        "a group has an odd number of outputs",
    ),
    ({"peft_type": "OSF", "effective_rank": 5}, OSF, "2 of 6 singular values, but the config leaves 5 in the base"),
    ({"peft_type": "OSF", "effective_rank": 4, "rank_pattern": {"(": 1}}, OSF, "not a valid regular expression"),
    (PSOFT | {"psoft_orth": False}, {"psoft_R.weight": (3,)}, "rank 3"),
    (PSOFT | {"psoft_mag_a": True}, {"psoft_R.weight": (3,)}, "lacks a tensor that this one needs: psoft_R.vector_a"),
    (FROD | {"save_projection": False}, {"frod_lambda_l": (8,), "frod_lambda_s_values": (4,)}, "not in the file"),
    (FROD, {"frod_lambda_l": (8,), "frod_lambda_s_values": (4,)}, "lacks a tensor that this one needs: frod_V.q"),
]


@pytest.mark.parametrize(("config", "parts", "why"), BROKEN)
def test_files_that_disagree_with_their_config(config, parts, why, tmp_path):
    tensors = {f"base_model.model.q.{part}": torch.zeros(shape) for part, shape in parts.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterkitError) as raised:
        ak.read(tmp_path)
    assert why in str(raised.value)


VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "formats" / "peft"


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 6])
def test_a_series_of_before_0_18_is_what_that_release_computed(terms, tmp_path):
    """Outputs of PEFT 0.17.1's forward, written by tools/foreign/peft_old_oft.py; 0.18 ends the series otherwise."""
    folder = VECTORS / f"oft_before_0_18_terms_{terms}"
    forward = load_file(folder / "forward.safetensors")
    model = nn.ModuleDict({"q": nn.Linear(8, 6)})
    model.load_state_dict({"q.weight": forward["W"], "q.bias": forward["b"]})
    base = tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    got = {}
    for compat in (None, "formula"):
        adapter = ak.read(folder, compat=compat)
        handle = ak.torch.inject(model, adapter)
        got[compat] = model["q"](forward["x"])
        handle.remove()
        ak.write(adapter, tmp_path / f"again {compat}", "peft")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / f"again {compat}" / name).read_bytes() == (folder / name).read_bytes()
    torch.testing.assert_close(got[None], forward["y"], rtol=1e-5, atol=1e-5)
    assert torch.allclose(got["formula"], forward["y"], rtol=1e-5, atol=1e-5) == (terms < 3)
