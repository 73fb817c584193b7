"""Tests that a hub must pass."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from ..core.adapter import Adapter, Target
from ..errors import AdapterkitError, Unsupported
from ..formats import read
from ..hub import pull, push
from ..hub.hubs import HUBS
from ..writing import write
from .examples import example


class HubTests:
    """Tests of a hub against a server on this machine.

    Attributes:
        scheme: the URI scheme of the hub: `acme` for `acme://org/repo`.
    """

    scheme: ClassVar[str] = ""

    def address(self, name: str) -> str:
        """Return a URI to which the tests may write, on a server that a fixture starts."""
        raise Unsupported("the tests of a hub need a server", cure="Define `address` in the test class")

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        """Return a folder with a small adapter."""
        folder = tmp_path / "adapter"
        write(Adapter({Target("model.q"): (example("lora"),)}), folder, "peft")
        return folder

    def test_it_is_registered(self) -> None:
        assert self.scheme not in HUBS.refused(), HUBS.refused()[self.scheme]
        assert HUBS[self.scheme].__module__.rpartition(".")[2] == self.scheme

    def test_what_is_pushed_is_pulled(self, adapter: Path, tmp_path: Path) -> None:
        push(adapter, self.address("one"))
        pull(self.address("one"), tmp_path / "back")
        for file in adapter.iterdir():
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
        assert read(self.address("one")).digest() == read(adapter).digest()

    def test_the_same_push_again_changes_nothing(self, adapter: Path, tmp_path: Path) -> None:
        push(adapter, self.address("two"))
        push(adapter, self.address("two"))
        pull(self.address("two"), tmp_path / "back")
        assert read(tmp_path / "back").digest() == read(adapter).digest()

    def test_what_is_not_there_is_a_typed_error(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterkitError) as raised:
            pull(self.address("nothing-here"), tmp_path / "back")
        assert raised.value.cure
        assert not (tmp_path / "back").exists()
