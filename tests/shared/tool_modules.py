"""Load scripts of tools/ as modules, so that tests can call their functions."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def tool_module(name: str) -> ModuleType:
    """Load a script, such as `tables.py`; remove the folders that it adds to the path."""
    path = TOOLS / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    # Register the module first, because dataclasses look up their module when they are created.
    held = sys.modules.get(spec.name)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
        if held is None:
            del sys.modules[spec.name]
        else:
            sys.modules[spec.name] = held
    return module
