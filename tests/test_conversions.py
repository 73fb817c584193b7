"""Every format into every other, for every method of weights that both say they have: the same weights come out.

What a format has words for is found out by letting it write the case itself: what it then refuses must be refused from
every other format too, by name, and what it takes must come out the same from all of them.
"""

from functools import cache
from itertools import islice

import pytest
from llm_adapters import FILES, place
from method_matrices import IMAGE, LANGUAGE, cases, close, made_of, model

import adapterkit as ak
from adapterkit.errors import Unrepresentable

FOLDERS = {"adapterhub", "litgpt", "mlx", "peft", "tensorrt_llm", "tinker"}
METHODS = [name for name, method in ak.METHODS.items() if method.kind in ("additive", "weight")]
PATTERNS = {"language": LANGUAGE, "image": IMAGE}


def where(folder, name):
    """A path for a format's files in a folder."""
    if name in FILES:
        return place(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (name if name in FOLDERS else "a.safetensors")


def kind(*names):
    """The type of numbers: float32 where one of the formats has no wider."""
    return "f4" if "tensorrt_llm" in names else "f8"


def case(method, number, *names):
    return list(cases(method, kind(*names)))[number]


@pytest.fixture(scope="module")
def sayable(tmp_path_factory):
    """(method, format, pattern) -> the first cases that the format has words for."""

    @cache
    def found(method, name, pattern):
        folder = tmp_path_factory.mktemp("sayable")
        return list(islice(_sayable(method, name, pattern, folder), 2))

    return found


def _sayable(method, name, pattern, folder):
    for number, each in enumerate(cases(method, kind(name))):
        adapter, base, _ = model([each], PATTERNS[pattern], folder / f"base{number}")
        try:
            ak.write(adapter, where(folder / str(number), name), name, base, "fold")
        except Unrepresentable:
            continue
        yield number


def claiming(method):
    return [name for name, each in ak.FORMATS.items() if method in each.methods]


TRIPLES = [(pattern, method, first) for pattern in PATTERNS for method in METHODS for first in claiming(method)]


@pytest.mark.parametrize(("pattern", "method", "first"), TRIPLES, ids="-".join)
def test_every_method_goes_from_each_into_each(pattern, method, first, sayable, tmp_path):
    for number in sayable(method, first, pattern):
        for second in ak.FORMATS if number == sayable(method, first, pattern)[0] else claiming(method):
            if second != first:
                goes(pattern, method, number, first, second, tmp_path / second / str(number))


def goes(pattern, method, number, first, second, folder):
    """From one format into another and out again; or refused."""
    W = case(method, number, first, second)[1]
    adapter, base, expected = model([case(method, number, first, second)], PATTERNS[pattern], folder / "base")
    one, other = where(folder / "one", first), where(folder / "other", second)
    ak.write(adapter, one, first, base, "fold")
    read = ak.read(one, first, base)
    if method not in ak.FORMATS[second].methods or not _says(adapter, base, folder, second):
        with pytest.raises(Unrepresentable):
            ak.write(read, other, second, base)
        return
    ak.write(read, other, second, base, "fold")
    weights = dict.fromkeys(expected, W)
    close(
        made_of(ak.read(other, second, base), weights), expected, weights, 5e-6 if kind(first, second) == "f4" else 1e-6
    )


def _says(adapter, base, folder, name):
    try:
        ak.write(adapter, where(folder / "alone", name), name, base, "fold")
    except Unrepresentable:
        return False
    return True
