"""What tests share: the specification's folder, small bases, and adapters made from shape strings alone."""

import dataclasses
import gc
import json
import math
import os
import re
from functools import cache, lru_cache
from itertools import combinations, cycle, product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis.core
import jinja2
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapterkit.core.adapter import LAYOUTS, Adapter, BaseRef, Foreign, Step, Target
from adapterkit.core.shapes import Axes
from adapterkit.errors import AdapterkitError, Malformed
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming.binding import fits
from adapterkit.naming.binding.fitting import viewed

collect_ignore = ["plugin"]
"""Tests of a package that has to be installed; `test_testing_kit.py` runs them."""

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "repository", max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=SLOW
)
settings.register_profile("long", max_examples=200, deadline=None, database=None, suppress_health_check=SLOW)
"""`pytest --hypothesis-profile long`: other examples each time, and many more."""
settings.load_profile("repository")

SIZES = {"out": 8, "in": 16, "hidden": 8, "first": 4, "second": 4, "d": 4}
"""Sizes of the weight's axes in examples, and of the output's channels; what other names stand for divides them."""

OF_AXES = {"outputs": SIZES["out"], "inputs": SIZES["in"]}
"""Attributes that are sizes of the weight's axes."""

WIDE = {"outs": 12, "ins": 20, "short": 8, "shorts": 12, "longs": 20, "bases": 5}
"""Sizes of axes along which weights of several sizes share a tensor, and of the shorter of the two above."""

OF_WEIGHTS = sorted(name for name, cls in METHODS.items() if cls.kind in ("additive", "weight"))
"""Methods whose law is one of weights."""


def pytest_addoption(parser):
    """Let `tools/check --coverage` run some cases of each test: measuring makes the tests three times as slow."""
    parser.addoption("--cases", type=int, help="run at most this many cases of each test function, evenly spread")


def pytest_collection_modifyitems(config, items):
    """Keep the cases that `--cases` selects: the first, the last, and others at equal distances between them."""
    most = config.getoption("--cases")
    if most is None:
        return
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        id(tests[at]) for tests in cases.values() for at in np.linspace(0, len(tests) - 1, most).round().astype(int)
    }
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Fail a test without cases: pytest skips it, and nobody notices that a folder of vectors is gone."""
    if any("empty parameter set" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skip")):
        pytest.fail("the list of this test's parameters is empty", pytrace=False)


def values(shape, seed=0):
    """float64 numbers that no formula is likely to produce by accident."""
    return np.random.default_rng(seed).normal(size=shape)


@st.composite
def updates(draw, method=None, stacked=False, kernel=None):
    """An update of any method, or of one, its tensors made from its shape strings; `kernel` sizes the kernel's axes."""
    cls = METHODS[method or draw(st.sampled_from(sorted(METHODS)))]
    kernel = draw(st.sampled_from([(), (3,), (2, 1)])) if kernel is None else kernel
    present = draw(_together(cls))
    attributes, seed = draw(_attributes(cls)) | _ruled(cls, present), draw(st.integers(0, 2**32 - 1))
    forms = tuple((n, v) for n, v in attributes.items() if cls.attribute_fields()[n].metadata.get("among"))
    sizes = draw(st.sampled_from(_sizes(cls, kernel, tuple(present), forms)))
    made = {name: _numbers(cls, name, sizes, kernel, stacked, seed + at) for at, name in enumerate(present)}
    update = cls(**made, **attributes)
    return update if _makes_sense(update, stacked) else cls(**made, **(_required(cls) | dict(forms)))


def _ruled(cls, present):
    """The words that rules of the method demand where a tensor is present."""
    when = {f"has({name})" for name in present}
    demanded = (re.fullmatch(r"(\w+) == '(\w+)'", rule.require) for rule in cls.rules if rule.when in when)
    return {found[1]: found[2] for found in demanded if found}


def _dims(sizes, kernel):
    columns = SIZES["in"] * math.prod(kernel)
    return dict(sizes) | SIZES | WIDE | {"k": kernel, "rest": (SIZES["in"], *kernel), "columns": columns, "e": 2}


def _shape(cls, name, sizes, kernel, stacked=False):
    axes = cls.tensor_fields()[name].metadata["axes"]
    return (Axes.parse(f"e {axes.text}") if stacked else axes).sizes(_dims(sizes, kernel))


@cache
def _sizes(cls, kernel, present, forms):
    """Sizes of the method's own axes that a weight of this kernel takes; any at all where it takes none."""
    free = [name for name in _names(cls) if name not in (*SIZES, *WIDE, "k", "rest", "columns", "e")]
    every = [1, 2, 3, 4, 6, 8, 16]
    # With more axes there are so many combinations that the few are tried first.
    for some in {0: [every], 1: [every], 2: [every], 3: [[1, 2, 4, 8], every]}.get(len(free), [[1, 2, 4]]):
        chosen = [tuple(zip(free, sizes, strict=True)) for sizes in product(some, repeat=len(free))]
        chosen = [sizes for sizes in chosen if all(min(_shape(cls, n, sizes, kernel), default=1) >= 0 for n in present)]
        trials = {sizes: _trial(cls, sizes, kernel, present, forms) for sizes in chosen}
        fit = {sizes for sizes, update in trials.items() if takes(update, (SIZES["out"], SIZES["in"], *kernel))}
        sensible = {sizes for sizes, update in trials.items() if _makes_sense(update)}
        if fit & sensible:
            break
    good = fit & sensible or fit or sensible
    return [sizes for sizes in chosen if sizes in good] or chosen


def _trial(cls, sizes, kernel, present, forms):
    made = {name: _numbers(cls, name, sizes, kernel) for name in present}
    return cls(**made, **(_required(cls) | dict(forms)))


def _numbers(cls, name, sizes, kernel, stacked=False, seed=0):
    field, shape = cls.tensor_fields()[name].metadata, _shape(cls, name, sizes, kernel, stacked)
    below = [Axes.parse(axis).sizes(_dims(sizes, kernel))[0] for axis in field["below"]]
    return from_numpy(_positions(shape, seed, below) if field["integer"] else values(shape, seed))


def takes(update, shape, layout="out *in"):
    """Whether an update fits a weight stored in this shape."""
    try:
        seen = viewed(shape, Target("", layout))
        if not fits(Target("", layout), (update,), shape):
            return False
        update.check_against(seen)
    except AdapterkitError:
        return False
    return True


def _makes_sense(update, stacked=False):
    try:
        update.check()
        dims = update.dims(stacked)
    except AdapterkitError:
        return False
    return all(dims.get(axis, size) == size for axis, size in SIZES.items())


def _names(cls):
    """The axes that a method's shape strings name."""
    texts = (field.metadata["axes"].text for field in cls.tensor_fields().values())
    return sorted({name for text in texts for name in re.findall(r"[a-z_]\w*", text)})


@st.composite
def _together(draw, cls):
    """Tensors of a method that may be present together: a form of each group, and some of the others."""
    forms = st.tuples(*map(st.sampled_from, cls.forms)).filter(lambda forms: _groups(cls, forms))
    return draw(st.sampled_from(_groups(cls, draw(forms))))


@cache
def _groups(cls, forms):
    fields, grouped = cls.tensor_fields(), {name for group in cls.forms for form in group for name in form}
    free = [name for name, field in fields.items() if field.metadata["optional"] and name not in grouped]
    given = {name for name in fields if not fields[name].metadata["optional"]} | {n for form in forms for n in form}
    subsets = [given | set(some) for count in range(len(free) + 1) for some in combinations(free, count)]
    groups = [[name for name in fields if name in some] for some in subsets]
    return [group for group in groups if _allowed(cls, group)]


def _allowed(cls, group):
    try:
        cls(**dict.fromkeys(group, from_numpy(np.ones(2))), **_required(cls)).check()
    except Malformed:
        return False
    return True


def _required(cls):
    """Values of the attributes that a method does not do without."""
    fields = cls.attribute_fields().values()
    needed = {f.name: {"int": 1, "float": 1.0}[f.type] for f in fields if f.default is dataclasses.MISSING}
    return {name: OF_AXES.get(name, value) for name, value in needed.items()}


def _positions(shape, seed, below):
    """Positions on the axis `in`, or below other bounds in turn; distinct along the last axis where there is room."""
    rng, bounds = np.random.default_rng(seed), cycle(below or [SIZES["in"]])
    lists = [np.resize(rng.permutation(next(bounds)), shape[-1]) for _ in range(math.prod(shape[:-1]))]
    return np.array(lists, dtype=np.int64).reshape(shape)


@st.composite
def _attributes(draw, cls):
    plain = {"float": st.floats(-4, 4), "int": st.integers(-9, 9), "str": st.text(max_size=5), "bool": st.booleans()}
    fields = cls.attribute_fields().values()
    chosen = [f for f in fields if f.default is dataclasses.MISSING or draw(st.booleans())]
    drawn = {f.name: draw(_allowed_values(f.metadata, plain[f.type])) for f in chosen}
    return drawn | {name: size for name, size in OF_AXES.items() if name in drawn}


def _allowed_values(rules, plain):
    """A strategy for an attribute that may have rules of its own."""
    if rules.get("among"):
        return st.sampled_from(rules["among"])
    least = rules.get("least")
    if isinstance(least, float):
        return st.floats(least, least + 9)
    return plain if least is None else st.integers(least, least + 9)


PATHS = st.lists(st.text("abcxyz_0é", min_size=1, max_size=4), min_size=1, max_size=3).map(".".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=3)
NAMES = st.none() | st.text(max_size=8)


@st.composite
def adapters(draw):
    """An adapter with any of what the native format can say: several updates at a target, rows, stacks, leftovers."""
    entries = {}
    for path in draw(st.lists(PATHS, min_size=1, max_size=4, unique=True)):
        layout = draw(st.sampled_from(LAYOUTS))
        start = draw(st.integers(0, 5))
        rows = (start, start + SIZES["out"]) if draw(st.booleans()) else None
        methods = draw(st.lists(st.sampled_from(OF_WEIGHTS), min_size=1, max_size=2))
        made = [draw(updates(name, stacked=layout.startswith("e "), kernel=())) for name in methods]
        entries[Target(path, layout, rows)] = tuple(made)
    if draw(st.booleans()):
        context = st.sampled_from(sorted(name for name, cls in METHODS.items() if cls.kind == "context"))
        entries[Target("")] = (draw(context.flatmap(updates)),)
    base = draw(st.none() | st.builds(BaseRef, NAMES, NAMES, NAMES))
    recipe = tuple(draw(st.lists(st.builds(Step, st.text(max_size=5), OBJECTS), max_size=2)))
    extra = st.dictionaries(st.text(max_size=4), st.integers(0, 9).map(lambda n: from_numpy(values((n,)))), max_size=2)
    foreign = draw(st.none() | st.builds(Foreign, st.text(max_size=5), OBJECTS, extra))
    return Adapter(entries, base, recipe, foreign, draw(OBJECTS))


@dataclasses.dataclass(frozen=True)
class Strategies:
    """The strategies above, for tests to draw from, and whether what is drawn fits a weight."""

    takes = staticmethod(takes)
    updates = staticmethod(updates)
    adapters = staticmethod(adapters)


@pytest.fixture(scope="session")
def made():
    """Strategies for updates and adapters."""
    return Strategies()


@pytest.fixture(scope="session")
def spec():
    """The folder of the specification."""
    return Path(__file__).parent.parent / "spec"


@pytest.fixture
def base(tmp_path):
    """Writes a base of numpy arrays by the safetensors library and opens it."""

    def write(tensors, config=None):
        folder = tmp_path / "base"
        folder.mkdir()
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return open_checkpoint(folder)

    return write


@pytest.fixture(scope="session")
def close():
    """Asserts that two tensors differ by less than a share of the largest number that went into either."""

    def check(got, wanted, *terms, tolerance=1e-5):
        size = max(float(term.detach().abs().max()) for term in (wanted, *terms))
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert float((got.detach().double() - wanted.detach().double()).abs().max()) <= tolerance * size

    return check


# A worker holds a million objects (24,000 tests, and torch): with Python's own thresholds a twentieth of its time goes
# into looking for circles among them.
gc.set_threshold(100_000, 20, 50)

# On a busy machine any command may take longer than the time after which it tells what it does; no test waits for that.
os.environ.setdefault("ADAPTERKIT_PATIENCE", "600")

# What fsync is for, a machine that loses its power, no test can show; waiting for the disk is a fifth of the suite's
# time. The call stays a call (`faulty_disk` meets and counts it), and a closed descriptor is still an error.
os.fsync = lambda descriptor: os.fstat(descriptor) and None

# PEFT writes a card beside each adapter: compiling its one template takes longer than all the rest of saving.
jinja2.Environment.compile = lru_cache(8)(jinja2.Environment.compile)

# Hypothesis reads and tokenizes a test's source twice for each of its parameters: a tenth of the time of such tests.
hypothesis.core.function_digest = lru_cache(None)(hypothesis.core.function_digest)
