"""What is wrong with PEFT's files of the variants, and what they cannot say, by name."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, Unrepresentable, Unsupported
from adapterkit.formats.peft.patterns import exact_alpha
from adapterkit.methods import METHODS

Q = "base_model.model.a.q."
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
BLOCKS = {"target_modules_bd_a": ["q"], "nblocks": 2}
GLORA = {"peft_type": "GLORA", "r": 2, "config_A_B": "lora", "config_C": "none", "config_D_E": "none"}
DEFT = {"peft_type": "DEFT", "r": 5, "target_modules": ["q"]}
PEANUT = {"peft_type": "PEANUT", "r": 2, "depth": 1, "target_modules": ["q"]}


def ones(**shapes):
    return {Q + name.replace("__", "."): np.ones(shape, np.float32) for name, shape in shapes.items()}


PAIR = ones(lora_A__weight=(2, 6), lora_B__weight=(4, 2))
FACTORS = ones(glora_A__Xd=(4, 2), glora_A__Xu=(2, 6), glora_B__Xd=(4, 2), glora_B__Xu=(2, 6))
INNER = ones(peanut_A__weight=(2, 4), peanut_B__weight=(4, 2), peanut_encoders__0__weight=(2, 2))

FAULTS = {
    "KaSA without its diagonal": (LORA | {"kasa_config": {}}, PAIR, Malformed, f"{Q}lora_A.weight"),
    "a diagonal without KaSA": (LORA, PAIR | ones(lora_diag=(2,)), Malformed, f"{Q}lora_diag"),
    "a diagonal of another rank": (
        LORA | {"kasa_config": {}}, PAIR | ones(lora_diag=(3,)), ShapeMismatch, f"{Q}lora_diag",
    ),
    "a rank that the blocks do not divide": (
        LORA | {"use_bdlora": BLOCKS | {"nblocks": 4}}, PAIR, ShapeMismatch, f"{Q}lora_A.weight",
    ),
    "a whole factor where blocks are said": (
        LORA | {"use_bdlora": {"target_modules_bd_b": ["q"], "nblocks": 2}}, PAIR, ShapeMismatch, f"{Q}lora_B.weight",
    ),
    "blocks of both factors": (
        LORA | {"use_bdlora": BLOCKS | {"target_modules_bd_b": ["a"]}}, PAIR, Malformed, "a.q",
    ),
    "PiSSA and KaSA": (
        LORA | {"kasa_config": {}, "init_lora_weights": "pissa"}, PAIR, Unsupported, "kasa_config",
    ),
    "OLoRA on parameters": (
        LORA | {"init_lora_weights": "olora", "target_parameters": ["w"]}, PAIR, Unsupported, "init_lora_weights",
    ),
    "values where GLoRA has no support": (
        GLORA, FACTORS | ones(glora_C__zeros=(6, 1)), Malformed, f"{Q}glora_C.zeros",
    ),
    "a support in another form": (GLORA | {"config_A_B": "vector"}, FACTORS, Malformed, f"{Q}glora_A.Xd"),
    "a support of another rank": (GLORA | {"r": 3}, FACTORS, ShapeMismatch, f"{Q}glora_A.Xd"),
    "half a support": (
        GLORA, {k: t for k, t in FACTORS.items() if "B.Xu" not in k}, Malformed, f"{Q}glora_B.Xd",
    ),
    "a column that is none": (
        GLORA | {"config_A_B": "vector"}, ones(glora_A__X=(4,), glora_B__X=(4, 1)), ShapeMismatch, f"{Q}glora_A.X",
    ),
    "an unknown form": (GLORA | {"config_C": "matrix"}, FACTORS, Malformed, "config_C"),
    "PaRa with an R": (DEFT | {"para": True}, ones(deft_P=(4, 4), deft_R=(4, 6)), Malformed, f"{Q}deft_R"),
    "DEFT of another rank": (DEFT | {"r": 2}, ones(deft_P=(4, 3), deft_R=(3, 6)), ShapeMismatch, f"{Q}deft_P"),
    "an encoder without its decoder": (PEANUT, INNER, Malformed, f"{Q}peanut_A.weight"),
    "an unknown activation": (
        PEANUT | {"act_fn": "colour"}, INNER | ones(peanut_decoders__0__weight=(2, 2)), Unsupported,
        "a.q: peanut.activation",
    ),
    "encoders of two shapes": (
        PEANUT | {"depth": 2},
        INNER | ones(
            peanut_encoders__1__weight=(3, 3), peanut_decoders__0__weight=(2, 2), peanut_decoders__1__weight=(2, 2)
        ),
        ShapeMismatch, f"{Q}peanut_encoders.1.weight",
    ),
    "a bias of two rows": ({"peft_type": "BEFT"}, ones(beft_bias=(2, 4)), ShapeMismatch, f"{Q}beft_bias"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_variants(fault, tmp_path):
    config, tensors, error, where = FAULTS[fault]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(error) as raised:
        ak.read(tmp_path)
    assert raised.value.where == where
    assert raised.value.cure


def adapter_of(layout="out *in", path="a.q", **fields):
    ((method, tensors),) = fields.items()
    attributes = {n: v for n, v in tensors.items() if not isinstance(v, tuple)}
    made = {n: torch.ones(v) for n, v in tensors.items() if isinstance(v, tuple)}
    return ak.Adapter({ak.Target(path, layout): (METHODS[method](**made, **attributes),)})


LOW = {"A": (2, 6), "B": (4, 2)}


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (adapter_of(glora={"A": (4,), "B_c": (1,)}), "have different forms"),
        (adapter_of(glora={"D": (4,), "E_c": (1,)}), "have different forms"),
        (adapter_of(dense={"D": (4, 6)}), "only a change of the bias"),
        (adapter_of(dense={"d": (4,), "scaling": 2.0}), "only a change of the bias"),
        (adapter_of(kasa=LOW | {"diag": (2,)}, layout="in out *k"), "kasa on a weight stored"),
        (adapter_of(bdlora={"A_blocks": (2, 1, 3), "B": (4, 2)}, layout="in out *k"), "bdlora on a weight stored"),
        (adapter_of(pissa=LOW, layout="in out *k", path="a.emb"), "pissa on an embedding"),
        (adapter_of(deft={"P": (4, 2)}, layout="in out *k", path="a.emb"), "deft on an embedding"),
        (adapter_of(olora=LOW, path="a.q.weight"), "olora on a parameter"),
    ],
)
def test_what_pefts_files_cannot_say(adapter, why, tmp_path):
    with pytest.raises(Unrepresentable, match=why):
        ak.write(adapter, tmp_path / "a", "peft")


def test_only_olora_takes_its_scaling_along_from_the_base(tmp_path):
    """W' = W + s (B A - Q R): a scaling that no alpha gives goes into B of PiSSA, and nowhere in OLoRA."""
    tried = (0.1 + k * 2**-55 for k in range(10_000))
    unsaid = next(s for s in tried if all(exact_alpha((3, s), rslora) is None for rslora in (False, True)))
    odd = {"A": (3, 6), "B": (4, 3), "scaling": unsaid}
    assert ak.write(adapter_of(pissa=odd), tmp_path / "a", "peft", on_loss="fold")
    ((_, update),) = ak.read(tmp_path / "a")
    assert (update.method, update.scaling) == ("pissa", 1.0)
    with pytest.raises(Unrepresentable, match="from alpha and r") as raised:
        ak.write(adapter_of(olora=odd), tmp_path / "b", "peft", on_loss="fold")
    assert "--to adapterkit" in raised.value.cure


def test_a_base_that_changed_by_chance_or_data_stays_refused(tmp_path):
    for word in ("pissa_niter_8", "corda", "loftq", "lora_ga"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(LORA | {"init_lora_weights": word}))
        save_file(PAIR, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(Unsupported, match="path_initial_model_for_weight_conversion") as raised:
            ak.read(tmp_path)
        assert raised.value.where == "init_lora_weights"
