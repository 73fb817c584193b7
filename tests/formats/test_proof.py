"""Writers prove themselves: every kind of fault that a writer may have is put into every format's, and must be caught.

A writer with a fault is the real one that is handed another adapter than `formats.write` was: one mutation each. What
it then writes is well-formed, and read without complaint; only the comparison with what was asked tells.
"""

from contextlib import suppress
from itertools import islice

import numpy as np
import pytest
from format_vectors import EVERY, base, source
from llm_adapters import BASE, llama, lora, where
from method_matrices import LANGUAGE, cases, model
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, Miswritten, Unrepresentable, UsageError
from adapterkit.formats import FORMATS
from adapterkit.formats._format import Format
from adapterkit.formats._image.image_format import ImageFormat
from adapterkit.formats._image.translate import in_parts
from adapterkit.io import safetensors
from adapterkit.io.arrange import turned
from adapterkit.io.lazy import DTYPES, as_lazy, from_numpy
from adapterkit.methods import METHODS
from adapterkit.methods.lora import LoRA
from adapterkit.methods.replacement import Replacement


def changed(adapter, change):
    """The adapter with its first update that a change applies to changed; None where it applies to none."""
    for target, found in adapter.updates.items():
        for position, update in enumerate(found):
            other = change(update)
            if other is not None:
                several = (*found[:position], other, *found[position + 1 :])
                return adapter.replace(updates={**adapter.updates, target: several})
    return None


def tensors_of(update):
    return (
        (name, as_lazy(leaf)) for name, leaf in update.tensors.items() if as_lazy(leaf).dtype.name in ("F32", "F64")
    )


def drop_scaling(update):
    scaling = update.attributes.get("scaling")
    without = update.method == "supertuning" and update.A is None  # it scales nothing then
    return None if scaling in (None, 0) or without else update.replace(scaling=1.0 if scaling != 1 else 2.0)


def drop_bias(update):
    fields = update.tensor_fields()
    named = [
        n for n in update.tensors if n in ("bias", "d") and fields[n].metadata["optional"] and len(update.tensors) > 1
    ]
    return update.replace(**{named[0]: None}) if named else None


def transpose(update):
    for name, leaf in tensors_of(update):
        if len(leaf.shape) == 2 and min(leaf.shape) > 1:
            value = leaf.numpy()
            return update.replace(**{name: from_numpy(np.ascontiguousarray(value.T).reshape(value.shape))})
    return None


def round_in_place(update):
    for name, leaf in tensors_of(update):
        value = leaf.numpy()
        if not np.array_equal(rounded := value.astype("f2").astype(value.dtype), value):
            return update.replace(**{name: from_numpy(rounded)})
    return None


def round_to_half(update):
    tensors = {name: from_numpy(leaf.numpy().astype("f2")) for name, leaf in tensors_of(update)}
    same = all(np.array_equal(leaf.numpy(), as_lazy(update.tensors[n]).numpy()) for n, leaf in tensors.items())
    return None if same else update.replace(**tensors)


def rename(adapter):
    """The first target becomes another module of the same base."""
    target, *others = adapter.updates
    for word, other in (("q_proj", "o_proj"), ("to_q", "to_k"), (".0.", ".1."), ("fc1", "fc2"), ("query", "key")):
        path = target.path.replace(word, other, 1)
        if path != target.path and path not in {each.path for each in others}:
            place = Target(path, target.layout, target.rows)
            return adapter.replace(updates={place if t == target else t: u for t, u in adapter.updates.items()})
    return None


def swap(adapter):
    """Two targets of the same shapes exchange what they have."""
    items = list(adapter.updates.items())
    for n, (one, mine) in enumerate(items):
        for other, theirs in items[n + 1 :]:
            if one.rows == other.rows and [shapes(u) for u in mine] == [shapes(u) for u in theirs]:
                return adapter.replace(updates={**adapter.updates, one: theirs, other: mine})
    return None


def shapes(update):
    return update.method, {name: as_lazy(leaf).shape for name, leaf in update.tensors.items()}


def lose(adapter):
    _, *others = adapter.updates.items()
    return adapter.replace(updates=dict(others)) if others else None


FAULTS = {
    **{f.__name__: lambda adapter, f=f: changed(adapter, f)
       for f in (drop_scaling, drop_bias, transpose, round_in_place, round_to_half)},
    **{f.__name__: f for f in (rename, swap, lose)},
}  # fmt: skip


@pytest.fixture
def faulty(monkeypatch):
    """Puts a fault into the writer of a format."""

    def put(name, fault):
        real = FORMATS[name] if name not in made else made[name]
        made[name] = real

        def write(self, adapter, path, **options):
            mutant = fault(adapter)
            assert mutant is not None
            return real.write(self, mutant, path, **options)

        monkeypatch.setitem(FORMATS._loaded, name, type("Faulty", (real,), {"write": write}))

    made = {}
    return put


def caught(adapter, name, path, base, faulty, faults=tuple(FAULTS)):
    """The faults that the writer could slip in, all of which must be caught; some it refuses by itself."""
    found = []
    for word in faults:
        mutant = FAULTS[word](adapter)
        if mutant is None or mutant.digest() == adapter.digest():
            continue
        faulty(name, FAULTS[word])
        with pytest.raises(AdapterkitError) as raised:
            ak.write(adapter, path, name, base, "fold")
        assert not path.exists(), word
        if isinstance(raised.value, Miswritten):
            place = raised.value.where.split(": ")[0].split("[")[0]
            named = [updates for each in (adapter, mutant) for updates in (each.updates, in_parts(each.updates))]
            known = {target.path or "(model)" for updates in named for target in updates}
            assert place in known or "cannot read" in raised.value.why, word
            found.append(word)
    return found


U_NET = "unet.down_blocks.{n}.attentions.0.transformer_blocks.0.attn1.to_q"
OF_HEADS = {"gguf", "litgpt", "tensorrt_llm", "torchtune"}
"""Formats whose files are read with the heads or sizes of a base."""


def vectors(name):
    """The adapters of a format's vectors and their bases, but for those that take a base of their own to be read."""
    for folder in EVERY:
        if folder.parent.name == name:
            below = BASE if name in OF_HEADS else base(folder)
            with suppress(AdapterkitError):
                yield ak.read(source(folder), name, below), below


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "adapterkit"])
def test_a_fault_in_the_writer_of_a_real_file_is_caught(name, tmp_path, faulty):
    """Each vector gets three of the faults in turn: all of them would take minutes."""
    found, words = [], list(FAULTS)
    for n, (adapter, below) in enumerate(vectors(name)):
        some = [words[(3 * n + step) % len(words)] for step in range(3 if n else len(words))]
        found += caught(adapter, name, where(tmp_path / str(n), name), below, faulty, some)
    assert found


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("nola", "textual_inversion")])
def test_a_fault_is_caught_whatever_the_method(name, tmp_path, faulty):
    """Every method of weights that the format has, on two layers; the first of each is a plain matrix."""
    found = []
    for method in sorted(FORMATS[name].methods):
        # AdapterHub has one rank and one scaling for all.
        two = (
            [*islice(cases(method, "f4"), 1 if name == "adapterhub" else 2)]
            if ak.METHODS[method].kind in ("additive", "weight")
            else []
        )
        if two:
            pattern = U_NET if issubclass(FORMATS[name], ImageFormat) else LANGUAGE
            adapter, below, _ = model(2 * two, pattern, tmp_path / method)
            found += caught(adapter, name, where(tmp_path / method / "out", name), below, faulty)
    assert found or name in ("bfl_control", "shared_outer", "xlabs"), "they hold other models or other weights"


class Plugin(Format):
    """A format of a third party, that writes by a library of its own; a fault is in what it hands to that."""

    methods = frozenset({"lora"})

    def write(self, adapter, path, *, on_loss="refuse", base=None):
        tensors = {}
        for target, (update,) in adapter.updates.items():
            for field, leaf in update.tensors.items():
                tensors[f"{target.path}|{field}|{update.scaling}"] = as_lazy(leaf).numpy()
        save_file(self.spoiled(tensors), path)
        return []

    def read(self, path, *, compat=None, base=None):
        found = {}
        for key, leaf in safetensors.read(path).items():
            name, field, scaling = key.split("|")
            found.setdefault(name, {"scaling": float(scaling)})[field] = leaf
        return Adapter({Target(path): (LoRA(**fields),) for path, fields in found.items()})

    def spoiled(self, tensors):
        return tensors


def plugin(monkeypatch, spoil, **fields):
    kind = type("Spoiled", (Plugin,), {"spoiled": lambda _, tensors: spoil(tensors), **fields})
    monkeypatch.setitem(FORMATS._loaded, "plugin", kind)


NAMES = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
Q_PROJ, O_PROJ = (Target(name) for name in NAMES)
SPOILS = {
    "nothing": lambda tensors: tensors,
    "drops scaling": lambda tensors: {key.replace("|2.0", "|1.0"): value for key, value in tensors.items()},
    "renames": lambda tensors: {key.replace("q_proj", "k_proj"): value for key, value in tensors.items()},
    "transposes": lambda tensors: {k: v.T.copy() if v.shape == (16, 16) else v for k, v in tensors.items()},
    "drops a bias": lambda tensors: {key: value for key, value in tensors.items() if "|bias|" not in key},
    "swaps": lambda tensors: {
        k.replace("q_p", "_").replace("o_p", "q_p").replace("_roj", "o_proj"): v for k, v in tensors.items()
    },
    "rounds": lambda tensors: {key: value.astype("f2") for key, value in tensors.items()},
    "rounds in place": lambda tensors: {key: value.astype("f2").astype("f4") for key, value in tensors.items()},
    "adds": lambda tensors: tensors | {key.replace("q_proj", "v_proj"): value for key, value in tensors.items()},
    "negates": lambda tensors: {key: -value if "|A|" in key else value for key, value in tensors.items()},
}


def biased():
    q, o = lora(16, 16, 16, seed=1), lora(16, 16, 16, seed=2)
    return Adapter({t: (u.replace(bias=from_numpy(np.arange(16, dtype="f4"))),) for t, u in ((Q_PROJ, q), (O_PROJ, o))})


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_plug_in_s_writer_proves_itself(spoil, tmp_path, monkeypatch):
    plugin(monkeypatch, SPOILS[spoil])
    if spoil == "nothing":
        assert ak.write(biased(), tmp_path / "a.safetensors", "plugin") == []
        return
    with pytest.raises(Miswritten, match="plugin") as raised:
        ak.write(biased(), tmp_path / "a.safetensors", "plugin")
    assert raised.value.code == "miswritten"
    assert raised.value.where.split(":")[0] in (*NAMES, NAMES[0].replace("q_", "v_"))
    assert ".safetensors" not in str([*tmp_path.iterdir()])


def test_the_field_is_named(tmp_path, monkeypatch):
    for spoil, field in (("drops scaling", "scaling"), ("drops a bias", "bias"), ("transposes", "A")):
        plugin(monkeypatch, SPOILS[spoil])
        with pytest.raises(Miswritten) as raised:
            ak.write(biased(), tmp_path / "a.safetensors", "plugin")
        assert raised.value.where == f"{NAMES[0]}: lora.{field}"


def test_what_a_line_reports_is_no_fault(tmp_path, monkeypatch):
    class Short(Plugin):
        def write(self, adapter, path, *, on_loss="refuse", base=None):
            super().write(adapter.replace(updates={Q_PROJ: adapter.updates[Q_PROJ]}), path)
            return [f"left out {O_PROJ}: for a reason"] if on_loss == "drop" else []

    monkeypatch.setitem(FORMATS._loaded, "plugin", Short)
    assert len(ak.write(biased(), tmp_path / "a.safetensors", "plugin", on_loss="drop")) == 1
    with pytest.raises(Miswritten, match="did not write this target"):
        ak.write(biased(), tmp_path / "b.safetensors", "plugin")


def test_what_is_left_out_is_found_whatever_it_is_called_in_the_file(tmp_path):
    """Targets move to kohya's names for FLUX, and one of them has no words there."""
    there, place = lora(8, 8, scaling=1.0), "transformer.transformer_blocks.0.attn"
    gone = Target(f"{place}.norm_q"), (Replacement(weight=from_numpy(np.ones(8, "f4"))),)
    adapter = Adapter({**{Target(f"{place}.to_{x}"): (there,) for x in "qkv"}, gone[0]: gone[1]})
    adapter = Adapter({**adapter.updates, Target("transformer.single_transformer_blocks.0.proj_out"): (lora(8, 40),)})
    flux = ("transformer.time_text_embed.guidance_embedder.linear_1", "transformer.x_embedder")
    adapter = Adapter({**adapter.updates, **{Target(path): (there,) for path in flux}})
    (line,) = ak.write(adapter, tmp_path / "a.safetensors", "kohya", on_loss="drop")
    assert line.startswith("left out ")


def test_rounding_is_no_fault_where_the_format_has_no_other_numbers(tmp_path, monkeypatch):
    plugin(monkeypatch, SPOILS["rounds"], dtypes=frozenset({"F16"}))
    assert ak.write(biased(), tmp_path / "a.safetensors", "plugin") == []
    plugin(monkeypatch, lambda tensors: SPOILS["rounds"](SPOILS["negates"](tensors)), dtypes=frozenset({"F16"}))
    with pytest.raises(Miswritten):
        ak.write(biased(), tmp_path / "a.safetensors", "plugin")


def test_what_was_folded_is_the_same_function(tmp_path, monkeypatch):
    """A scaling in B, however it gets there, is no fault; half of it is."""

    def folded(factor):
        return lambda tensors: {
            key.replace("|2.0", "|1.0"): value * factor if key.split("|")[1] != "A" else value
            for key, value in tensors.items()
        }

    plugin(monkeypatch, folded(2))
    assert ak.write(biased(), tmp_path / "a.safetensors", "plugin") == []
    plugin(monkeypatch, folded(1.999))
    with pytest.raises(Miswritten, match=r"the change of the weight differs by [45]"):
        ak.write(biased(), tmp_path / "a.safetensors", "plugin")


def test_a_scaling_in_b_alone_is_compared_without_products(tmp_path, monkeypatch):
    plain = Adapter({t: tuple(u.replace(bias=None) for u in us) for t, us in biased().updates.items()})
    for factor, worst in ((2, 1), (2, 1.001), (1.999, 1)):

        def folded(tensors, factor=factor, worst=worst):
            made = {k.replace("|2.0", "|1.0"): v * factor if "|B|" in k else v.copy() for k, v in tensors.items()}
            next(v for k, v in made.items() if "|B|" in k)[-1, -1] *= worst
            return made

        plugin(monkeypatch, folded)
        out = tmp_path / f"{factor}-{worst}.safetensors"
        if (factor, worst) == (2, 1):
            assert ak.write(plain, out, "plugin") == []
            continue
        with pytest.raises(Miswritten, match="differs"):
            ak.write(plain, out, "plugin")


@pytest.mark.parametrize("fault", [None, "value", "token"])
def test_a_network_is_compared_with_the_tokens_that_it_computes(fault, tmp_path, monkeypatch):
    """PEFT's files hold the tokens and not the network; other tokens, or fewer, are refused."""
    from adapterkit.formats.peft import writer as encoders

    rng = np.random.default_rng(3)
    E, D = (from_numpy(rng.normal(size=(3, 4)).astype("f4")) for _ in range(2))
    cpt = METHODS["cpt"](E=E, D=D, epsilon=from_numpy(np.full(3, 0.5, "f4")))
    real = encoders._computed

    def computed(update):
        made = real(update)
        P = as_lazy(made.P).numpy().copy()
        P[1, 2] += 0.01 if fault == "value" else 0
        return made.replace(P=from_numpy(P[:2].copy() if fault == "token" else P))

    monkeypatch.setattr(encoders, "_computed", computed)
    adapter = Adapter({Target(""): (cpt,)})
    if fault is None:
        assert len(ak.write(adapter, tmp_path / "out", "peft", on_loss="fold")) == 1
        return
    with pytest.raises(Miswritten, match="the values of embeddings differ"):
        ak.write(adapter, tmp_path / "out", "peft", on_loss="fold")


def test_what_cannot_be_read_back_without_the_base_asks_for_it(tmp_path):
    adapter = ak.read(source(next(f for f in EVERY if f.parent.name == "gguf")), "gguf", BASE)
    with pytest.raises(UsageError, match=r"file cannot be checked.*--base"):
        ak.write(adapter, tmp_path / "a.gguf", "gguf")
    assert not (tmp_path / "a.gguf").exists()
    assert ak.write(adapter, tmp_path / "a.gguf", "gguf", BASE) == []


def test_large_tensors_are_looked_at_in_places(tmp_path, monkeypatch):
    """A megabyte each: nothing of a file that was copied is read again but a few places, yet a fault is seen."""
    rng = np.random.default_rng(0)
    big = LoRA(
        A=from_numpy(rng.normal(size=(16, 16384)).astype("f4")), B=from_numpy(rng.normal(size=(16384, 16)).astype("f4"))
    )
    other = big.replace(A=from_numpy(rng.normal(size=(16, 16384)).astype("f4")))
    adapter = Adapter({Q_PROJ: (big,), O_PROJ: (other,)})
    plugin(monkeypatch, SPOILS["nothing"])
    assert ak.write(adapter, tmp_path / "a.safetensors", "plugin") == []
    plugin(monkeypatch, SPOILS["swaps"])
    with pytest.raises(Miswritten):
        ak.write(adapter, tmp_path / "b.safetensors", "plugin")


def test_a_safetensors_file_is_compared_with_what_is_on_the_disk(tmp_path, monkeypatch):
    """The container writes what it was given; where the disk holds something else that is found."""

    def damaged(path, tensors, metadata, write=safetensors.write):
        write(path, tensors, metadata)
        with open(path, "r+b") as file:
            file.seek(-8, 2)
            file.write(bytes(8))

    monkeypatch.setattr(safetensors, "write", damaged)
    with pytest.raises(Miswritten, match="the bytes on the disk differ"):
        ak.write(llama(), tmp_path / "a.safetensors")


FOLDED = {
    "nothing": lambda A, B: (A, B),
    "one number": lambda A, B: (A, at(B, 7001, lambda x: x + 1)),
    "the last number": lambda A, B: (A, at(B, -1, lambda x: x + 1)),
    "a sign": lambda A, B: (A, -B),
    "twice": lambda A, B: (A, 2 * B),
    "not at all": lambda A, B: (A, B / 2),
    "into A, too": lambda A, B: (2 * A, B),
    "half of the rows": lambda A, B: (A, np.concatenate([B[: len(B) // 2], B[len(B) // 2 :] / 2])),
    "rows in another order": lambda A, B: (A, B[::-1].copy()),
    "columns in another order": lambda A, B: (A, B[:, ::-1].copy()),
    "a NaN": lambda A, B: (A, at(B, 7001, lambda x: x * np.nan)),
    "A in another order": lambda A, B: (A[::-1].copy(), B),
    "A transposed": lambda A, B: (A.T.reshape(A.shape).copy(), B),
}
"""What a writer that folds a scaling of 2 into B may do wrong, on numpy arrays; the first does nothing wrong."""


def at(array, position, change):
    array = array.copy()
    array.reshape(-1)[position] = change(array.reshape(-1)[position])
    return array


@pytest.mark.parametrize(
    ("end", "kind"), [*((".onnx_adapter", kind) for kind in ("F32", "BF16", "F16", "F64")), (".npz", "F16"),
                      (".safetensors", "BF16")]
)  # fmt: skip
def test_a_fault_in_folding_is_caught(end, kind, tmp_path, monkeypatch):
    """Olive's writer folds a scaling into B and turns both factors; every number of B is compared, wherever it is."""
    from adapterkit.formats import _kit
    from adapterkit.io.lazy import as_array

    rng = np.random.default_rng(5)
    A, B = rng.normal(size=(16, 300)), rng.normal(size=(2400, 16))
    there = [from_numpy(a.astype(DTYPES[kind].array).view(DTYPES[kind].numpy), kind) for a in (A, B)]
    adapter = Adapter({Q_PROJ: (LoRA(A=there[0], B=there[1], scaling=2.0),)})
    source = tmp_path / "source.safetensors"
    ak.write(adapter, source)
    real = _kit.folded
    for name, spoil in FOLDED.items():

        def folded(update, scaling, spoil=spoil):
            made = real(update, scaling)
            a, b = (as_array(leaf).astype("f8") for leaf in (made.A, made.B))
            spoiled = dict(zip("AB", spoil(a, b), strict=True))
            changed = {n: v for n, v in spoiled.items() if v is not {"A": a, "B": b}[n]}
            return made.replace(
                **{
                    n: from_numpy(v.astype(DTYPES[kind].array).view(DTYPES[kind].numpy), kind)
                    for n, v in changed.items()
                }
            )

        monkeypatch.setattr(_kit, "folded", folded)
        out = tmp_path / f"out{end}"
        if name == "nothing":
            assert ak.write(ak.read(source), out, "olive", on_loss="fold") == [f"folded the scaling into B of {Q_PROJ}"]
            out.unlink()
            continue
        with pytest.raises(Miswritten):
            ak.write(ak.read(source), out, "olive", on_loss="fold")
        assert not out.exists(), name


def test_every_container_that_remembers_is_compared_with_the_disk(tmp_path, monkeypatch):
    """onnxruntime's container leads to what was moved; some bytes of the disk are read all the same."""
    from adapterkit.formats import olive

    real = olive.write_ort_adapter

    def damaged(path, adapter):
        real(path, adapter)
        data = bytearray(path.read_bytes())
        data[-8:] = bytes(8)
        path.write_bytes(data)

    source = tmp_path / "source.safetensors"
    plain = {Q_PROJ: (lora(16, 16, 16, seed=1).replace(scaling=1.0),)}
    ak.write(Adapter(plain), source)
    assert ak.write(ak.read(source), tmp_path / "a.onnx_adapter", "olive") == []
    monkeypatch.setattr(olive, "write_ort_adapter", damaged)
    with pytest.raises(Miswritten, match="the bytes on the disk differ"):
        ak.write(ak.read(source), tmp_path / "b.onnx_adapter", "olive")


def test_a_tensor_that_is_turned_twice_is_itself():
    tensor = from_numpy(np.arange(6, dtype="f4").reshape(2, 3))
    assert turned(turned(tensor)) is tensor
    flat = turned(tensor).reshape(1, 6)
    assert np.array_equal(turned(flat).numpy(), tensor.numpy().T.reshape(1, 6).T)


def test_factors_of_one_array_are_runs_of_it(tmp_path):
    """TensorRT-LLM holds all modules in one array: to read it whole for each of them takes minutes."""
    adapter, below, _ = model(
        [update for update in islice(cases("lora", "f4"), 1) for _ in range(2)], LANGUAGE, tmp_path
    )
    ak.write(adapter, tmp_path / "out", "tensorrt_llm", below, "fold")
    found = ak.read(tmp_path / "out", base=below)
    leaves = [as_lazy(leaf) for _, update in found for leaf in update.tensors.values()]
    assert leaves
    assert all(leaf.span is not None and leaf.span.nbytes == leaf.nbytes for leaf in leaves)


def test_nola_omits_what_it_cannot_express(tmp_path):
    adapter = next(adapter for adapter, _ in vectors("nola"))
    extra = LoRA(A=from_numpy(np.ones((2, 4), "f4")), B=from_numpy(np.ones((3, 2), "f4")))
    both = adapter.replace(updates={**adapter.updates, Target("blocks.9.attn.proj"): (extra,)})
    with pytest.raises(Unrepresentable, match="the method is not NOLA"):
        ak.write(both, tmp_path / "refused" / "model.pt", "nola")
    written = ak.write(both, tmp_path / "out" / "model.pt", "nola", on_loss="drop")
    assert [loss for loss in written if loss.startswith("left out blocks.9.attn.proj")]
    assert set(ak.read(tmp_path / "out" / "model.pt", "nola").updates) == set(adapter.updates)
