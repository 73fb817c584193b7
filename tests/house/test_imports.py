import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adapterkit"
FILES = sorted(PACKAGE.rglob("*.py"))
FORMATS = sorted(path for path in (PACKAGE / "formats").iterdir() if not path.name.startswith(("_", ".")))
FAMILIES = sorted((PACKAGE / "formats" / "peft" / "families").glob("[!_]*.py"))
LAYERS = [
    {"errors", "native"},
    {"io"},
    {"linalg"},
    {"core"},
    {"naming"},
    {"methods"},
    {"formats", "quant"},
    {"ops"},
    {"writing"},
    {"loaders", "merging"},
    {"conformance", "demo", "torch"},
    {"onnx"},
    {"hub"},
    {"destination", "gating", "provenance", "scanning"},
    {"reporting"},
    {"searching"},
    {"api"},
    {"ui"},
    {"cli", "testing"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
HEAVY = {
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnx_ir",
    "onnxscript",
    "huggingface_hub",
    "transformers",
    "rich",
    "yaml",
    "peft",
}

ALLOWED = {
    "merging": {"torch"},
    "torch": {"torch"},
    "demo": {"torch"},
    "onnx": {"numpy", "onnx", "onnx_ir"},
    "hub": {"huggingface_hub"},
}
"""What a part of the package is about it may import at once: its modules are imported when they are used."""


UPWARD = {
    ("core/adapter.py", "naming"): "`Adapter.bind` and `Adapter.delta` are public methods",
}
"""(file, package at its height or above) -> why it imports that, always within a function or for types."""

BY_STRING = {
    "__init__.py": ["import_module(f'.{name}', __name__)", "import_module(f'.{module}', __name__)"],
    "core/registry.py": ["import_module(self.package)", *2 * ["import_module(f'{self.package}.{name}')"]],
    "cli/_commands.py": [
        "import_module(self.package)",
        "import_module(f'{self.package}.{cmd_name}')",
        "import_module(module)",
    ],
    "cli/doctor.py": ["import_module(package)"],
    "onnx/pretrained.py": ["import_module(module)"],
    "provenance/signing.py": ["import_module(f'model_signing.{part}')"],
    "testing/__init__.py": ["import_module(f'.{_HOME[name]}', __name__)"],
}
"""Files that import by a computed name: public names at first use, modules of a folder, modules of other packages."""


CIRCLES = {
    "core.adapter": "`Adapter.bind` and `Adapter.delta` are public methods, and binding makes adapters",
}
"""A module of each circle of more than two -> why it is one; imports of types alone count, too."""


def imports_by_string(tree):
    """Calls that import a module by a string, but for a plain name of another package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            foreign = isinstance(name, str) and name and not name.startswith((".", "adapterkit"))
            if called in ("import_module", "__import__") and not foreign:
                yield node


def everywhere(file):
    """Modules of the package that `file` imports: at its top, in functions, and for type checkers."""
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    return {m for node in nodes if isinstance(node, ast.ImportFrom) for m in _from(node, file) if m} | module_level(
        file
    )


def part_of(module):
    """The part of the package that a module is in; for a public name, the part that defines it."""
    import adapterkit

    name = [*module.split("."), ""][1]
    return adapterkit._HOME.get(name, name).partition(":")[0].partition(".")[0]


def place(file):
    """(top-level name inside the package, dotted name)."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0], ".".join(("adapterkit", *(p for p in parts if p != "__init__")))


def module_level(file):
    """Modules that importing `file` imports, in full; what is imported for type checkers alone is left out."""
    found = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.update(_from(node, file))
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                visit(node.orelse)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler))

    visit(ast.parse(file.read_text("utf-8")).body)
    return found


def _from(node, file):
    if not node.level:
        return {node.module}
    package = ["adapterkit", *file.relative_to(PACKAGE).parts[:-1]]
    origin = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
    return {".".join(origin)} if node.module else {".".join([*origin, alias.name]) for alias in node.names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    own, _ = place(file)
    # adapterkit/__init__.py loads every public name, so it stands above all packages.
    rank = max(RANK.values()) if own == "__init__" else RANK.get(own)
    assert rank is not None, "a new part of the package needs a place in the order"
    for module in everywhere(file):
        if module.startswith("adapterkit.") and module != "adapterkit.__version__":
            other = part_of(module)
            name = file.relative_to(PACKAGE).as_posix()
            upward = other != own and RANK[other] >= rank
            assert not upward or (name, other) in UPWARD, f"{name} imports {module}"


def test_every_named_arrow_up_is_needed():
    """An exception that nothing uses any more is to be deleted."""
    for name, other in UPWARD:
        assert other in map(part_of, everywhere(PACKAGE / name)), (name, other)


def test_circles_of_imports_are_few_and_have_a_reason():
    house = runpy.run_path(str(ROOT / "tools" / "house" / "__main__.py"), run_name="house")
    circles = house["circles_of"]({file: ast.parse(file.read_text("utf-8")) for file in FILES})
    large = [circle for circle in circles if len(circle) > 2]
    reasons = {f"adapterkit.{name}" for name in CIRCLES}
    assert [circle for circle in large if not reasons & set(circle)] == []
    assert len(large) == len(CIRCLES), "a reason that no circle needs any more is to be deleted"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_of_the_package_is_imported_through_a_string(file):
    """An import through a string is an arrow that the other tests cannot see."""
    found = sorted(ast.unparse(call) for call in imports_by_string(ast.parse(file.read_text("utf-8"))))
    assert found == sorted(BY_STRING.get(file.relative_to(PACKAGE).as_posix(), []))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import_module('adapterkit.hub')", 1),
        ("importlib.import_module(f'{package}.hub')", 1),
        ("__import__('adapterkit')", 1),
        ("import_module(name)", 1),
        ("import_module('.hub', __name__)", 1),
        ("import_module('transformers')", 0),
        ("import adapterkit.hub", 0),
    ],
)
def test_imports_through_strings_are_found(source, count):
    assert len(list(imports_by_string(ast.parse(source)))) == count


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(file):
    own, _ = place(file)
    heavy = {module.split(".")[0] for module in module_level(file)} & HEAVY
    assert heavy <= ALLOWED.get(own, set())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_called_after_what_it_is_not(file):
    assert not {"utils", "helpers", "common", "manager"} & set(file.with_suffix("").parts)


def loaded_after(code, *arguments):
    """Which heavy packages a fresh interpreter has loaded after running `code`."""
    return sorted(HEAVY & modules_after(code, *arguments))


def modules_after(code, *arguments):
    """Which modules a fresh interpreter has loaded after running `code`."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport sys; print(*sys.modules)", *map(str, arguments)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    names = "ak.Adapter, ak.Target, ak.read, ak.write, ak.detect, list(ak.METHODS), list(ak.FORMATS)"
    assert loaded_after(f"import adapterkit as ak; {names}") == []


def test_reading_detecting_and_converting_without_values_load_nothing_heavy(tmp_path):
    record = (
        '{"version":"1.0","updates":[{"target":{"path":"q"},"method":"lora","version":1,'
        '"tensors":{"A":"q.A","B":"q.B"},"attributes":{}}]}'
    )
    save_file({"q.A": np.ones((2, 4)), "q.B": np.ones((3, 2))}, tmp_path / "a.safetensors", {"adapterkit": record})
    code = """
import sys, adapterkit as ak
source, target = sys.argv[1:]
native = ak.FORMATS["adapterkit"]()
assert native.sniff(__import__("pathlib").Path(source))
adapter = ak.read(source, format="adapterkit")
adapter.validate()
adapter.digest()
assert ak.write(adapter, target) == []
assert [ak.METHODS[name].kind for name in ak.METHODS]
"""
    assert loaded_after(code, tmp_path / "a.safetensors", tmp_path / "b.safetensors") == []
    assert (tmp_path / "b.safetensors").exists()


def test_detecting_among_all_formats_loads_nothing_heavy(tmp_path):
    save_file({"q.A": np.ones(2)}, tmp_path / "a.safetensors", {"adapterkit": "{}"})
    code = "import sys, adapterkit as ak; assert ak.detect(sys.argv[1]) == 'adapterkit'"
    assert loaded_after(code, tmp_path / "a.safetensors") == []


@pytest.fixture
def lora_of_peft(tmp_path):
    """A plain LoRA as PEFT writes it."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.layers.0.q"
    tensors = {f"{stem}.lora_A.weight": np.ones((2, 4)), f"{stem}.lora_B.weight": np.ones((3, 2))}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    return tmp_path


def test_detecting_among_all_formats_loads_none_that_reads_or_writes(lora_of_peft):
    loaded = modules_after("import sys, adapterkit as ak; assert ak.detect(sys.argv[1]) == 'peft'", lora_of_peft)
    assert {f"adapterkit.formats.{file.stem}" for file in FORMATS} <= loaded
    assert not [name for name in loaded if {"reader", "writer", "conversion"} & set(name.split("."))]
    assert not [name for name in loaded if ".families" in name]


def test_reading_a_plain_lora_of_peft_loads_no_other_family_of_tensors(lora_of_peft):
    code = "import sys, adapterkit as ak; assert len(ak.read(sys.argv[1])) == 1"
    families = {f"adapterkit.formats.peft.families.{file.stem}" for file in FAMILIES}
    assert families
    assert not families & modules_after(code, lora_of_peft)


def test_no_function_imports_what_its_module_already_imports():
    """Such an import looks as if it were heavy, and delays nothing."""
    again = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        at_top = {name for node in tree.body for name in imported(node)}
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        inside = {(node.lineno, name) for each in functions for node in ast.walk(each) for name in imported(node)}
        again += [f"{file}:{line}: {name[1]}" for line, name in sorted(inside) if name in at_top]
    assert not again, "\n".join(again)


def imported(node):
    """The modules and names that an import statement imports."""
    if isinstance(node, ast.Import):
        return [("", each.name) for each in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(f"{'.' * node.level}{node.module or ''}", each.name) for each in node.names]
    return []


def test_a_plain_base_is_told_from_a_quantized_one_without_asking_the_schemes(tmp_path):
    save_file({"w.weight": np.ones((2, 2), np.float16)}, tmp_path / "model.safetensors")
    code = """
import sys
from adapterkit.quant import is_quantized
from adapterkit.io.checkpoint import open_checkpoint
assert not is_quantized(open_checkpoint(sys.argv[1]))
"""
    schemes = {f"adapterkit.quant.{file.stem}" for file in (PACKAGE / "quant").glob("[!_]*.py")}
    assert schemes
    assert not schemes & modules_after(code, tmp_path)


def test_a_plain_key_means_the_same_to_all_families():
    """Such keys are taken apart without asking them."""
    from adapterkit.formats.peft.families import FAMILIES
    from adapterkit.formats.peft.file import PREFIX, parse_by_families, parse_key

    stems = [
        "q",
        "layers.0.lora_A",
        *(f"m.{word.replace('*', 'x')}" for f in FAMILIES.values() for word in (*f.parts, *f.shared)),
    ]
    words = ["lora_A", "lora_B", "lora_magnitude_vector", "ia3_l", "ln_tuning_x", "trainable_tokens_delta"]
    texts = [f"{PREFIX}{stem}.{word}{end}" for stem in stems for word in words for end in ("", ".weight", ".bias")]
    assert [parse_key(text, PREFIX) for text in texts] == [parse_by_families(text, PREFIX) for text in texts]


def test_public_names_are_the_ones_that_the_package_says():
    import adapterkit as ak

    assert set(ak.__all__) <= set(dir(ak))
    assert all(getattr(ak, name) is not None for name in ak.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ak.nothing  # noqa: B018 - the access is what is tested
