import sys

import pytest

from adapterkit.core.registry import Registry
from adapterkit.errors import Unsupported


class Animal:
    """What entries of these registries derive from."""


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A package with one entry a module, and a third party's distribution beside it."""

    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("zoo/__init__.py", "")
    write("zoo/cat.py", "from here import Animal\nclass Cat(Animal): pass\n")
    write(
        "zoo/ape.py", "from here import Animal\nfrom zoo.cat import Cat\nclass Ape(Animal): pass\nclass Jungle: pass\n"
    )
    write("zoo/_private.py", "raise AssertionError('a private module is no entry')\n")
    write("zoo/broken.py", "raise AssertionError('imported without being asked for')\n")
    write("zoo/twins.py", "from here import Animal\nclass One(Animal): pass\nclass Two(Animal): pass\n")
    write("zoo/empty.py", "")
    write("yak.py", "from here import Animal\nclass Yak(Animal): pass\nclass Plain: pass\n")
    write(
        "farm-1.0.dist-info/entry_points.txt",
        "[zoo.animals]\nyak = yak:Yak\ncat = yak:Yak\nplain = yak:Plain\nalias = yak:Yak\n",
    )
    write("farm-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: farm\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "here", sys.modules[__name__])
    yield Registry("animal", "zoo", "zoo.animals", Animal)
    for name in [name for name in sys.modules if name == "yak" or name.split(".")[0] == "zoo"]:
        del sys.modules[name]


def test_an_entry_is_the_class_in_the_module_of_its_name(zoo):
    assert zoo["cat"].__name__ == "Cat"
    assert zoo["ape"].__name__ == "Ape", "an imported entry and a class of another kind do not count"
    assert zoo["cat"] is zoo["cat"]


def test_listing_imports_nothing(zoo):
    assert list(zoo) == ["alias", "ape", "broken", "cat", "empty", "plain", "twins", "yak"]
    assert len(zoo) == 8
    assert "cat" in zoo
    assert "_private" not in zoo
    assert not [name for name in sys.modules if name.startswith("zoo.")]


def test_getting_imports_that_one_module(zoo):
    zoo["cat"]
    assert [name for name in sys.modules if name.startswith("zoo.")] == ["zoo.cat"]


def test_third_parties_add_entries_and_shadow_none(zoo):
    assert zoo["yak"].__name__ == "Yak"
    assert zoo["cat"].__name__ == "Cat"
    assert zoo.packages() == dict.fromkeys(["alias", "cat", "plain", "yak"], "farm 1.0")
    assert zoo.refused() == {"cat": "farm 1.0 adds the animal 'cat', which is built in and cannot be replaced"}


def test_a_name_in_two_packages_is_refused_and_both_are_named(zoo, tmp_path):
    (tmp_path / "field-2.0.dist-info").mkdir()
    (tmp_path / "field-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: field\nVersion: 2.0\n")
    (tmp_path / "field-2.0.dist-info" / "entry_points.txt").write_text("[zoo.animals]\nyak = field.yak:Yak\n")
    assert "yak" in zoo
    with pytest.raises(Unsupported, match="several packages add the animal 'yak'") as raised:
        zoo["yak"]
    assert all(package in str(raised.value) for package in ("farm 1.0", "field 2.0"))
    assert raised.value.cure.startswith("Uninstall all but one of these packages")


@pytest.mark.parametrize("name", ["plain", "alias"])
def test_a_third_partys_entry_is_of_the_kind_and_in_a_module_of_its_name(zoo, name):
    with pytest.raises(TypeError, match=rf"zoo.animals: {name} must be a Animal"):
        zoo[name]


@pytest.mark.parametrize(
    ("name", "cure"), [("cats", "Nearest: cat"), ("zzz", "Known: alias, ape"), ("_private", "Known")]
)
def test_an_unknown_name_names_the_nearest(zoo, name, cure):
    with pytest.raises(Unsupported, match=f"unknown animal '{name}'") as raised:
        zoo[name]
    assert cure in raised.value.cure
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(("name", "count"), [("twins", 2), ("empty", 0)])
def test_a_module_without_exactly_one_entry_is_a_mistake_in_the_code(zoo, name, count):
    with pytest.raises(TypeError, match=f"exactly one Animal, but has {count}"):
        zoo[name]


def test_a_module_may_have_several_entries_that_say_their_names(tmp_path, monkeypatch):
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "__init__.py").write_text("")
    (tmp_path / "farm" / "hen.py").write_text("from here import Animal\nclass Hen(Animal): pass\n")
    text = "from here import Animal\nclass Bovine(Animal): pass\n"
    text += "".join(f"class {name.title()}(Bovine): name = {name!r}\n" for name in ("yak", "cow"))
    (tmp_path / "farm" / "cattle.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "here", sys.modules[__name__])
    farm = Registry("animal", "farm", "farm.animals", Animal, several=True)
    assert farm["cow"].__name__ == "Cow"
    assert list(farm) == ["cow", "hen", "yak"]
    with pytest.raises(Unsupported, match="unknown animal 'cattle'"):
        farm["cattle"]
    for module, first in (("more", "Cow(Animal): name = 'cow'"), ("other", "Nameless(Animal): pass")):
        file = tmp_path / "farm" / f"{module}.py"
        file.write_text(f"from here import Animal\nclass {first}\nclass Second(Animal): pass\n")
        with pytest.raises(TypeError, match=f"farm.{module} must define a Animal that sets `name`"):
            list(Registry("animal", "farm", "farm.animals", Animal, several=True))
        file.unlink()
    for name in [name for name in sys.modules if name.split(".")[0] == "farm"]:
        del sys.modules[name]
