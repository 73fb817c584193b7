"""Adapters that trainers seldom write, into every format: written as they are, or refused, and never by Miswritten.

`Miswritten` says that the format's writer is at fault. An adapter that a format cannot hold is `Unrepresentable`,
before anything is written.
"""

import numpy as np
import pytest
from llm_adapters import BASE, lora

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, Miswritten
from adapterkit.formats import FORMATS
from adapterkit.formats._image.image_format import ImageFormat
from adapterkit.io.checkpoint import opened
from adapterkit.io.lazy import as_lazy, from_numpy
from adapterkit.methods.lokr import LoKr
from adapterkit.methods.rows import Rows

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


def typed(update, name, kind):
    """An update whose tensor holds zeros of another element type."""
    leaf = as_lazy(update.tensors[name])
    size = {"F8_E4M3": "u1", "F8_E5M2": "u1", "BF16": "u2", "F16": "f2", "F64": "f8"}[kind]
    return update.replace(**{name: from_numpy(np.full(leaf.shape, 1, size), kind)})


def filled(update, value):
    return update.map(lambda leaf: from_numpy(np.full(as_lazy(leaf).shape, value, "f4")))


PLAIN = lora(16, 16, 4)
UPDATES = {
    "float8": typed(typed(PLAIN, "A", "F8_E4M3"), "B", "F8_E4M3"),
    "the other float8": typed(typed(PLAIN, "A", "F8_E5M2"), "B", "F8_E5M2"),
    "float64": typed(typed(PLAIN, "A", "F64"), "B", "F64"),
    "two types": typed(PLAIN, "A", "BF16"),
    "two other types": typed(typed(PLAIN, "A", "F16"), "B", "BF16"),
    "zeros": filled(PLAIN, 0),
    "the largest numbers": filled(PLAIN, np.finfo("f4").max),
    "the smallest numbers": filled(PLAIN, 1e-42),
    "a huge scaling": PLAIN.replace(scaling=1e30),
    "a tiny scaling": PLAIN.replace(scaling=1e-30),
    "a negative scaling": PLAIN.replace(scaling=-2.0),
    "no scaling": PLAIN.replace(scaling=0.0),
    "a scaling of many digits": PLAIN.replace(scaling=0.1 + 0.2),
    "a bias": PLAIN.replace(bias=from_numpy(np.arange(16, dtype="f4"))),
    "rank above the sizes": lora(16, 16, 40),
    "a Kronecker product of a stack": LoKr(
        w1=from_numpy(np.ones((4, 4), "f4")), w2=from_numpy(np.arange(48, dtype="f4").reshape(4, 4, 3)), stacked=True
    ),
}
TARGETS = {
    "stored [in, out]": Target(Q_PROJ, "in out *k"),
    "a slice": Target(Q_PROJ, rows=(0, 16)),
    "an embedding": Target(EMBEDDING, "in out *k"),
    "an embedding stored [out, in]": Target(EMBEDDING),
    "no module": Target("weird name/with:everything"),
}


def adapters(image):
    """Name -> adapter; the odd update stands beside a usual one."""
    path, other = (TO_Q, TO_Q.replace("to_q", "to_k")) if image else (Q_PROJ, Q_PROJ.replace("q_proj", "o_proj"))
    for name, update in UPDATES.items():
        yield name, Adapter({Target(path): (update,), Target(other): (PLAIN,)})
    for name, target in TARGETS.items():
        there = lora(16, 12) if target.layout != "out *in" else lora(12, 16)
        place = Target(target.path.replace(Q_PROJ, path), target.layout, target.rows)
        yield name, Adapter({place: (there if target.path == EMBEDDING else PLAIN,), Target(other): (PLAIN,)})
    rows = Rows(index=from_numpy(np.array([3, 1])), values=from_numpy(np.ones((2, 16), "f4")))
    yield "rows of tokens", Adapter({Target(EMBEDDING, "in out *k"): (rows,), Target(other): (PLAIN,)})
    yield "twice", Adapter({Target(path): (PLAIN, lora(16, 16, seed=7))})


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_it_is_written_or_refused(name, tmp_path):
    image = issubclass(FORMATS[name], ImageFormat)
    bases = (None,) if image else (None, opened(BASE))
    written = 0
    for number, (what, adapter) in enumerate(adapters(image)):
        for base in bases:
            out = tmp_path / f"{number}-{base is None}" / (FORMATS[name].file or "out")
            out.parent.mkdir()
            try:
                ak.write(adapter, out, name, base, "drop" if base is None else "promote")
            except Miswritten as error:
                pytest.fail(f"{what}: {error}")
            except AdapterkitError:
                assert not out.exists(), what
            else:
                written += 1
    assert written or name in ("bfl_control", "xlabs", "textual_inversion", "nola"), "their names are others"
