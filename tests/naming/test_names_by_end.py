"""The index of names gives what comparing each name gives."""

import itertools

import pytest

from adapterkit.naming.moves import NamesByEnd, same_end

WORDS = ("a", "b", "weight", "")
NAMES = [".".join(words) for count in (1, 2, 3) for words in itertools.product(WORDS, repeat=count)]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_index_finds_what_comparing_finds(step):
    names = NAMES[::step][::-1]
    index = NamesByEnd(names)
    for path in [*NAMES, "x.a.b", "c"]:
        assert index.of(path) == [name for name in names if same_end(name, path)], path
