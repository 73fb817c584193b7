"""Every format into every other, for every method of weights that both say they have: the same weights come out.

What a format has words for is found out by letting it write the case itself: what it then refuses must be refused from
every other format too, by name, and what it takes must come out the same from all of them.
"""

from contextlib import suppress
from functools import cache
from itertools import islice

import pytest
from llm_adapters import FILES, FOLDERS, where
from method_matrices import IMAGE, LANGUAGE, cases, close, made_of, model
from safetensors.numpy import load_file

import adapterkit as ak
from adapterkit.errors import Unrepresentable, UsageError

METHODS = [name for name, method in ak.METHODS.items() if method.kind in ("additive", "weight")]
PATTERNS = {"language": LANGUAGE, "image": IMAGE}


def kind(*names):
    """The type of numbers: float32 where one of the formats has no wider."""
    return "f4" if "tensorrt_llm" in names else "f8"


@pytest.fixture(scope="module")
def says(tmp_path_factory):
    """(method, number of a case, format, pattern) -> whether the format has words for the case."""

    @cache
    def found(method, number, name, pattern):
        folder = tmp_path_factory.mktemp("says")
        adapter, base, _ = case(method, number, pattern, kind(name), folder)
        return written(adapter, where(folder, name), name, base)

    return found


def case(method, number, pattern, numbers, folder):
    """An adapter of one update, the base that it is of, and what becomes of its weights."""
    return model([cases(method, numbers)[number]], PATTERNS[pattern], folder / "base")


def written(adapter, path, name, base):
    """Whether a format takes an adapter."""
    try:
        ak.write(adapter, path, name, base, "fold")
    except Unrepresentable:
        return False
    return True


def claiming(method):
    return [name for name, each in ak.FORMATS.items() if method in each.methods]


TRIPLES = [(pattern, method, first) for pattern in PATTERNS for method in METHODS for first in claiming(method)]


@pytest.mark.parametrize(("pattern", "method", "first"), TRIPLES, ids=map("-".join, TRIPLES))
def test_every_method_goes_from_each_into_each(pattern, method, first, says, tmp_path):
    able = (n for n in range(len(cases(method))) if says(method, n, first, pattern))
    for number in islice(able, 2 if pattern == "language" else 1):
        # What no format claims is asked for once, of the format that holds everything.
        others = [name for name in (ak.FORMATS if first == "adapterkit" else claiming(method)) if name != first]
        for numbers in ("f8", "f4"):
            seconds = [name for name in others if kind(first, name) == numbers]
            if seconds:
                able_too = [name for name in seconds if says(method, number, name, pattern)]
                goes(first, seconds, able_too, case(method, number, pattern, numbers, tmp_path / numbers))


def goes(first, seconds, able, of):
    """From one format into others and out again; or refused."""
    adapter, base, expected = of
    one = where(base / "one", first)
    ak.write(adapter, one, first, base, "fold")
    read = ak.read(one, first, base)
    weights = {path: load_file(base / "model.safetensors")[f"{path}.weight"].astype("f8") for path in expected}
    for second in seconds:
        other = where(base / "other" / second, second)
        # Some formats add modules beside, of no effect, for which others have no words.
        more = len(read) > len(adapter)
        there = written(read, other, second, base)
        assert there == (second in able) or (more and not there), second
        assert there or not other.is_file()
        if there:
            tolerance = 5e-6 if "tensorrt_llm" in (first, second) else 1e-6
            close(made_of(ak.read(other, second, base), weights), expected, weights, tolerance)


@pytest.mark.parametrize("name", [name for name in ak.FORMATS if "lora" in ak.FORMATS[name].methods])
def test_a_name_of_a_file_never_becomes_a_folder(name, tmp_path):
    adapter, base, _ = case("lora", 0, "image" if name not in {*FOLDERS, *FILES} else "language", kind(name), tmp_path)
    for file in ("a.safetensors", "a.bin", "b.pt"):
        path = tmp_path / file
        with suppress(UsageError, Unrepresentable):
            ak.write(adapter, path, name, base, "fold")
        assert not path.is_dir()


@pytest.mark.parametrize("name", ["adapterhub", "mlx", "peft", "tinker"])
def test_the_name_of_a_file_for_a_folder_is_refused(name, tmp_path):
    adapter, base, _ = case("lora", 0, "language", kind(name), tmp_path)
    with pytest.raises(UsageError, match="folder") as raised:
        ak.write(adapter, tmp_path / "out" / "a.safetensors", name, base)
    assert "--to adapterkit" in raised.value.cure
    assert not (tmp_path / "out").exists()
