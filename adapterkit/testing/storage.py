"""Tests that every format, every quantization scheme and every hub must pass."""

from __future__ import annotations

import inspect
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ..core.adapter import Adapter, Target
from ..errors import AdapterkitError, Miswritten, Unrepresentable, Unsupported, UsageError
from ..formats import FORMATS, detect, read, recognised
from ..hub import pull, push
from ..hub.hubs import HUBS
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..merging import merge
from ..methods import METHODS
from ..quant import SCHEMES
from ..writing import write
from .formulas import example

if TYPE_CHECKING:
    from ..io.computed import Array

WIDTH = 16
SHAPES = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 24)}

_STRANGE = ("bottleneck", "ia3", "lora")
"""A test takes the first of these methods that the format does not support, and checks that the writer refuses it."""


class FormatTests:
    """Tests of a format's reader and writer.

    Attributes:
        format: the name of the format.
        targets: the linear layers of the base, as a map from path to (outputs, inputs). The format must be able to
            store these paths.
        file: the name of the file or folder to write. If `file` is empty, the tests use `Format.file`, or `adapter` if
            `Format.file` is empty, too.
        on_loss: the `on_loss` argument for `write`, for formats that cannot store every scaling.
        needs_base: True if the format's files can only be read with the base. The base is always passed to `write`.
    """

    format: ClassVar[str] = ""
    targets: ClassVar[dict[str, tuple[int, int]]] = {
        f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in SHAPES.items()
    }
    file: ClassVar[str] = ""
    on_loss: ClassVar[str] = "fold"
    needs_base: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        methods = FORMATS[cls.format].methods if cls.format in FORMATS else frozenset()
        # If a test does not apply, set it to None. pytest then does not collect it.
        if "lora" not in methods:
            cls.test_a_scaling_is_not_lost = None  # type: ignore[assignment, method-assign]
        if methods.issuperset(_STRANGE):
            cls.test_what_it_cannot_say_is_refused_and_leaves_what_was_there = None  # type: ignore[assignment, method-assign]

    def base(self, folder: Path) -> Path | None:
        """Write a base (a Llama) with weights for all targets into `folder`, and return the path of the base."""
        import numpy as np

        from ..io import safetensors
        from ..io.lazy import from_numpy

        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(5)
        tensors = {f"{path}.weight": from_numpy(rng.normal(size=s).astype("f4")) for path, s in self.targets.items()}
        # Add biases, because methods that change a bias refuse layers without a bias.
        tensors |= {f"{path}.bias": from_numpy(rng.normal(size=s[:1]).astype("f4")) for path, s in self.targets.items()}
        safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 24} | sizes
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def adapter(self, method: str, scaling: float = 0.375) -> Adapter | None:
        """Return an adapter with one update of a method at every target. The updates have different tensor values.

        Return None if no such update can be made, for example because the method has no `initial`.
        """
        cls: Any = METHODS[method]
        if not hasattr(cls, "initial") or cls.kind not in ("additive", "weight"):
            return None
        fields = cls.attribute_fields()
        more: dict[str, Any] = {"scaling": scaling} if "scaling" in fields else {}
        updates = {}
        for seed, (path, (out, inputs)) in enumerate(self.targets.items()):
            try:
                updates[Target(path)] = (example(method, out=out, inputs=inputs, seed=seed, **more),)
            except (AdapterkitError, TypeError, ValueError):
                return None  # Skip the method: it needs sizes or tensors that these general tests do not know.
        return Adapter(updates)

    def test_it_is_one_class_in_a_module_of_its_name(self) -> None:
        assert self.format not in FORMATS.refused(), FORMATS.refused()[self.format]
        cls = FORMATS[self.format]
        assert cls.__module__.rpartition(".")[2] == self.format
        assert cls.url.startswith(("http://", "https://")), "set `url` to a page that describes the format"
        assert cls.description, "set `description` to one line about the format"
        assert cls.methods, "set `methods` to the methods that the format can express"
        unknown = sorted(name for name in cls.methods if name not in METHODS)
        assert not unknown, f"`methods` contains {unknown}, which are not names of methods"
        for name in ("sniff", "read", "write"):
            assert inspect.getdoc(getattr(cls, name)), f"{name} has no docstring"

    def test_what_it_writes_is_detected_and_read_as_the_same_function(self, tmp_path: Path) -> None:
        """For each method of the format, write and read an adapter with a scaling of 0.375 at every target."""
        base = self.base(tmp_path / "base")
        tried = 0
        for method in sorted(FORMATS[self.format].methods):
            adapter = self.adapter(method)
            if adapter is None:
                continue
            path = self._place(tmp_path / method)
            try:
                write(adapter, path, self.format, base, self.on_loss)
            except Unrepresentable:
                if method == "lora":
                    raise
                continue  # Skip the method: the format supports it only for other layers, or with other attributes.
            tried += 1
            assert detect(path) == self.format, f"a file written with {method} is detected as another format"
            self._compare(method, adapter, self._read(path, base), base)
        assert tried, "no method could be written: set `targets` to layers that the format supports"

    def test_a_scaling_is_not_lost(self, tmp_path: Path) -> None:
        """After a write and a read, a LoRA with scaling 3 changes the weight three times as much as with scaling 1."""
        import numpy as np

        base = self.base(tmp_path / "base")
        changes = []
        for scaling in (1.0, 3.0):
            path = self._place(tmp_path / f"{scaling:g}")
            adapter = self.adapter("lora", scaling)
            assert adapter is not None
            write(adapter, path, self.format, base, self.on_loss)
            back = read(path, self.format, base)
            target = next(iter(self.targets))
            changes.append(back.delta(target, base=base).numpy())
        assert np.allclose(changes[1], 3 * changes[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_numbers_of_a_narrow_type_keep_their_value(self, dtype: str, tmp_path: Path) -> None:
        """Write and read 16-bit tensors. The weight change must stay the same, or the writer must refuse the dtype."""
        import torch

        base = self.base(tmp_path / "base")
        method = self._some_method()
        # Use scaling 1, which every format can store. A writer may multiply any other scaling into a factor, and the
        # product would be rounded to 16 bits.
        wide = self.adapter(method, scaling=1.0)
        assert wide is not None
        narrow = Adapter(
            {
                target: tuple(
                    update.replace(**{name: leaf.to(getattr(torch, dtype)) for name, leaf in update.tensors.items()
                                      if torch.is_tensor(leaf) and leaf.dtype == torch.float32})
                    for update in updates
                )
                for target, updates in wide.updates.items()
            }
        )  # fmt: skip
        self._same_or_refused(f"{method} in {dtype}", narrow, tmp_path, base)

    def test_two_updates_at_one_target_are_both_stored(self, tmp_path: Path) -> None:
        """Write two updates at each target. The writer must store the sum of their changes, or refuse the adapter."""
        base = self.base(tmp_path / "base")
        method = self._some_method()
        first, second = self.adapter(method, scaling=1.0), self.adapter(method, scaling=0.5)
        assert first is not None
        assert second is not None
        both = Adapter({target: (*updates, *second.updates[target]) for target, updates in first.updates.items()})
        self._same_or_refused(f"{method} twice", both, tmp_path, base)

    def test_an_update_of_some_rows_stays_at_these_rows(self, tmp_path: Path) -> None:
        """Write and read an adapter that changes only half of each weight's rows.

        The other rows must stay unchanged, or the writer must refuse the adapter.
        """
        base = self.base(tmp_path / "base")
        method = self._some_method()
        cls: Any = METHODS[method]
        more: dict[str, Any] = {"scaling": 1.0} if "scaling" in cls.attribute_fields() else {}
        updates = {}
        for seed, (path, (out, inputs)) in enumerate(self.targets.items()):
            update = example(method, out=out // 2, inputs=inputs, seed=seed, **more)
            updates[Target(path, rows=(out // 2, 2 * (out // 2)))] = (update,)
        self._same_or_refused(f"{method} at rows", Adapter(updates), tmp_path, base)

    def test_writing_twice_gives_the_same_bytes(self, tmp_path: Path) -> None:
        base = self.base(tmp_path / "base")
        method = self._some_method()
        adapter = self.adapter(method)
        assert adapter is not None
        contents = []
        for name in ("one", "two"):
            path = self._place(tmp_path / name)
            write(adapter, path, self.format, base, self.on_loss)
            files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
            contents.append({str(f.relative_to(tmp_path / name)): f.read_bytes() for f in files})
        assert contents[0] == contents[1]

    def test_what_it_cannot_say_is_refused_and_leaves_what_was_there(self, tmp_path: Path) -> None:
        base = self.base(tmp_path / "base")
        path = self._place(tmp_path / "out")
        adapter = self.adapter(self._some_method())
        assert adapter is not None
        write(adapter, path, self.format, base, self.on_loss)
        before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
        methods = FORMATS[self.format].methods
        other = next(name for name in _STRANGE if name not in methods)
        foreign = self._bottleneck() if other == "bottleneck" else self.adapter(other)
        assert foreign is not None
        with pytest.raises(AdapterkitError) as raised:
            write(foreign, path, self.format, base)
        assert raised.value.why
        assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before

    def test_other_files_are_not_its_own(self, tmp_path: Path) -> None:
        """`sniff` returns False for files of other formats, and does not raise an error."""
        format_ = FORMATS[self.format]()
        strangers = {
            "empty": b"", "zeros": bytes(64), "text": b"hello\n", "json": b'{"a": [1, 2]}', "noise": bytes(range(256)),
            "adapter_config.json": b"{}", "x.safetensors": (2).to_bytes(8, "little") + b"{}",
        }  # fmt: skip
        for name, data in strangers.items():
            (tmp_path / name).write_bytes(data)
            assert format_.sniff(tmp_path / name) is False, f"`sniff` accepts a file of another format: {name}"
        (tmp_path / "folder").mkdir()
        assert format_.sniff(tmp_path / "folder") is False
        assert format_.sniff(tmp_path / "nothing here") is False
        update = example("lora", out=8, inputs=16)
        write(Adapter({Target("q"): (update,)}), tmp_path / "native.safetensors", "adapterkit")
        if self.format != "adapterkit":
            assert self.format not in recognised(tmp_path / "native.safetensors")

    def test_a_damaged_file_is_a_typed_error(self, tmp_path: Path) -> None:
        """Truncate each file of an adapter. Reading the adapter must succeed or raise an AdapterkitError."""
        base = self.base(tmp_path / "base")
        path = self._place(tmp_path / "out")
        adapter = self.adapter(self._some_method())
        assert adapter is not None
        write(adapter, path, self.format, base, self.on_loss)
        files = sorted(file for file in (tmp_path / "out").rglob("*") if file.is_file())
        for file in files:
            whole = file.read_bytes()
            for cut in {0, 1, len(whole) // 3, len(whole) // 2, max(len(whole) - 1, 0)}:
                file.write_bytes(whole[:cut])
                with suppress(AdapterkitError):
                    read(path, self.format, base).check_values()
            file.write_bytes(whole)
        read(path, self.format, base).check_values()

    def _read(self, path: Path, base: Path | None) -> Adapter:
        """Read an adapter. Pass the base if the adapter cannot be read without it."""
        try:
            return read(path, self.format, base if self.needs_base else None)
        except UsageError:
            return read(path, self.format, base)

    def _same_or_refused(self, what: str, adapter: Adapter, folder: Path, base: Path | None) -> None:
        """Check that the adapter survives a write and a read, or that the writer refuses it with a cure."""
        path = self._place(folder / "out")
        refusal = None
        try:
            write(adapter, path, self.format, base, self.on_loss)
        except AdapterkitError as error:
            refusal = error
        if refusal is not None:
            # `write` raises Miswritten if the written file differs from the adapter. This is a bug, not a refusal.
            assert not isinstance(refusal, Miswritten), f"{what}: {refusal.why}"
            assert refusal.cure, f"the error for {what} has no cure; set `cure` to what the user can do"
            assert not any(file.is_file() for file in (folder / "out").rglob("*")), f"the refusal of {what} left a file"
            return
        self._compare(what, adapter, self._read(path, base), base)

    def _place(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder / (self.file or FORMATS[self.format].file or "adapter")

    def _some_method(self) -> str:
        methods = FORMATS[self.format].methods
        if "lora" in methods:
            return "lora"
        return next(name for name in sorted(methods) if self.adapter(name) is not None)

    def _bottleneck(self) -> Adapter:
        """Return an adapter with an update that changes no weight. Most formats cannot store such an update."""
        import torch

        cls: Any = METHODS["bottleneck"]
        path, (out, _) = next(iter(self.targets.items()))
        return Adapter({Target(path): (cls(down=torch.ones(2, out), up=torch.ones(out, 2)),)})

    def _change(self, adapter: Adapter, path: str, base: Path | None) -> Array:
        """Return the change of the whole weight as a numpy array, with zeros in the rows that no update changes."""
        import numpy as np

        change: Array = adapter.delta(path, base=base).numpy()
        rows = next(iter(adapter.find(path))).rows
        if rows is None:
            return change
        whole = np.zeros((self.targets[path][0], *change.shape[1:]), change.dtype)
        whole[slice(*rows)] = change
        return whole

    def _compare(self, method: str, adapter: Adapter, back: Adapter, base: Path | None) -> None:
        import numpy as np

        for path in self.targets:
            targets_text = ", ".join(map(str, back.updates))
            assert back.find(path), f"{method}: the adapter that was read back lacks {path}; it has {targets_text}"
            ours, theirs = (self._change(each, path, base) for each in (adapter, back))
            size = float(np.abs(ours).max())
            error = float(np.abs(ours - theirs).max())
            assert error <= 1e-5 * size, f"{method}: the change of {path} has a relative error of {error / size:.1e}"


class SchemeTests:
    """Tests of a quantization scheme.

    Attributes:
        scheme: the name of the scheme.
    """

    scheme: ClassVar[str] = ""

    def base(self, folder: Path) -> dict[str, Array]:
        """Quantize a base with this scheme, write the base into `folder`, and return its dequantized weights.

        Returns:
            A map from the name of each quantized weight to a numpy array `[out, in]` with its dequantized values, as
            computed by the scheme's own library.
        """
        raise Unsupported("the tests of a scheme need a base", cure="Define `base` in the test class")

    @pytest.fixture
    def packed(self, tmp_path: Path) -> tuple[Checkpoint, dict[str, Array]]:
        """Return the opened base and the dequantized values of its weights."""
        folder = tmp_path / "base"
        folder.mkdir()
        numbers = self.base(folder)
        return open_checkpoint(folder), numbers

    def test_it_says_what_it_is(self) -> None:
        assert self.scheme not in SCHEMES.refused(), SCHEMES.refused()[self.scheme]
        cls = SCHEMES[self.scheme]
        assert cls.url.startswith(("http://", "https://")), "set `url` to a page that describes the layout"
        assert cls.description, "set `description` to one line about the scheme"
        assert cls.oracle, "set `oracle` to the library that the dequantized values are compared with"

    def test_its_bases_are_detected_and_no_others(
        self, packed: tuple[Checkpoint, dict[str, Array]], tmp_path: Path
    ) -> None:
        base, _ = packed
        assert [name for name in SCHEMES if SCHEMES[name]().detect(base)] == [self.scheme]
        import torch
        from safetensors.torch import save_file

        save_file({"q.weight": torch.ones(4, 4)}, tmp_path / "plain.safetensors")
        assert SCHEMES[self.scheme]().detect(open_checkpoint(tmp_path / "plain.safetensors")) is False

    def test_its_numbers_are_its_librarys(self, packed: tuple[Checkpoint, dict[str, Array]]) -> None:
        """Compare whole weights, and also single blocks of rows, because a merge reads a weight in blocks of rows."""
        import numpy as np

        base, numbers = packed
        weights_found = {each.name: each for each in SCHEMES[self.scheme]().find(base)}
        assert weights_found.keys() == numbers.keys()
        for name, expected in numbers.items():
            weight = weights_found[name]
            assert tuple(weight.shape) == expected.shape
            rows = expected.shape[0]
            for start, stop in ((0, rows), (0, 1), (rows // 2, rows), (rows - 1, rows)):
                got = weight.rows(start, stop).astype(np.float64)
                assert np.allclose(got, expected[start:stop].astype(np.float64), rtol=1e-6, atol=1e-7), name

    def test_an_adapter_is_merged_into_its_numbers(
        self, packed: tuple[Checkpoint, dict[str, Array]], tmp_path: Path
    ) -> None:
        import numpy as np

        base, numbers = packed
        name, expected = next(iter(numbers.items()))
        update: Any = example("lora", out=expected.shape[0], inputs=expected.shape[1])
        adapter = Adapter({Target(name.removesuffix(".weight")): (update,)})
        merge(base, adapter, tmp_path / "merged", quantized="dequantize", dtype="F32", device="cpu")
        change = update.scaling * update.B.double().numpy() @ update.A.double().numpy()
        wanted = expected.astype(np.float64) + change
        got = open_checkpoint(tmp_path / "merged").tensors[name].numpy()
        assert np.allclose(got, wanted, rtol=1e-5, atol=1e-5)

    def test_a_damaged_base_is_a_typed_error(self, packed: tuple[Checkpoint, dict[str, Array]]) -> None:
        """Remove one of a quantized weight's tensors; repeat this for each tensor except the first.

        `find` must then skip the weight or raise an AdapterkitError.
        """
        from dataclasses import replace

        base, numbers = packed
        scheme = SCHEMES[self.scheme]()
        first = next(each for each in scheme.find(base) if each.name in numbers)
        for member in first.members[1:]:
            left = {name: tensor for name, tensor in base.tensors.items() if name != member}
            lacking = replace(base, tensors=left)
            try:
                names_found = {each.name for each in scheme.find(lacking)}
            except AdapterkitError:
                continue
            assert first.name not in names_found, f"`find` returns {first.name} although {member} is missing"


class HubTests:
    """Tests of a hub. They push to a local test server and pull from it.

    Attributes:
        scheme: the URI scheme of the hub: `acme` for `acme://org/repo`.
    """

    scheme: ClassVar[str] = ""

    def address(self, name: str) -> str:
        """Return the URI of `name` on a test server that accepts pushes. Start the server in a fixture."""
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
