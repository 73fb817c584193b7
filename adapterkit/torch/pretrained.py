"""Load a torch model from a transformers folder.

Nothing is downloaded, and neither the model's own Python code nor kernels from a hub are run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterkitError, Malformed, Unsupported, UsageError, first_line, nearest
from ..io.inputs import read_input
from ..io.stages import stage

if TYPE_CHECKING:
    from torch import Tensor, nn

KERNELS_OF_TORCH = {None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"}
"""The implementations of attention and experts that need no download, because transformers and torch contain them."""

_OWN_CODE = (
    "If you trust the model, load it yourself: pass a function that loads it to adapterkit export "
    "(--model MODULE:FUNCTION) or adapterkit.onnx.export_factory, or pass the loaded model to adapterkit.torch"
)


def check_transformers(path: Path, work: str) -> None:
    """Check that transformers is installed and that a path is a folder of a transformers model.

    Args:
        path: the folder.
        work: the task that needs transformers, such as `exporting a folder`. The error message begins with this text.

    Raises:
        UsageError: transformers is not installed.
        Malformed: the folder has no config.json.
    """
    if find_spec("transformers") is None:
        cure = "pip install 'adapterkit[transformers]'"
        raise UsageError(f"{work} needs transformers, which is not installed", path=path, cure=cure)
    if not (path / "config.json").is_file():
        why = "the folder is not a transformers model: it has no config.json"
        cure = "Pass a folder that save_pretrained wrote, or a snapshot from a hub"
        if (path / "adapter_config.json").is_file():
            cure = "The folder is an adapter: pass the model that the adapter was trained on instead"
        raise Malformed(why, path=path, cure=cure)


def load_pretrained(
    source: Path, dtype: str, state: Mapping[str, Tensor] | None = None, lacking: list[str] | None = None
) -> nn.Module:
    """Load the transformers model in a folder, in evaluation mode.

    Args:
        source: the folder; its `config.json` names the class.
        dtype: the name of the torch dtype to which the weights are converted.
        state: the weights, keyed by their stored names. If None, the weights are read from the folder's files.
        lacking: a list to which the names of missing weights are added; transformers initialises these weights
            randomly.

    Raises:
        Malformed: the config cannot be read, or transformers cannot load the folder.
        Unsupported: the installed transformers does not have the class, the folder contains an adapter, or the config
            names code or a kernel to download.
    """
    stage(f"loading {source}")
    transformers, torch = import_module("transformers"), import_module("torch")
    try:
        config = json.loads(read_input(source / "config.json").decode("utf-8"))
        names = config.get("architectures") or ["AutoModel"]
        name = names[0]
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise Malformed(
            f"config.json cannot be read ({error})", path=source, cure="Download the folder again"
        ) from None
    # Accept only class names: config.json is untrusted, and must not select any other attribute of transformers.
    if not isinstance(name, str) or not (name == "AutoModel" or name.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))):
        raise Malformed(
            f"architectures is {name!r}, not a class name", path=source / "config.json", cure="Download it again"
        )
    built = getattr(transformers, name, None)
    if built is None or not hasattr(built, "from_pretrained"):
        known = nearest(name, [word for word in dir(transformers) if "For" in word or word.endswith("Model")])
        cure = known or "Install a newer transformers, or export the torch model with adapterkit.onnx.export"
        raise Unsupported(f"the installed transformers has no class {name}", path=source, cure=cure)
    if (source / "adapter_config.json").exists():
        # transformers would load the base that adapter_config.json names, instead of the weights in this folder.
        cure = "Pass the base's folder as MODEL, and this folder with --adapter (adapter=)"
        raise Unsupported("the folder holds an adapter", path=source / "adapter_config.json", cure=cure)
    known_only = {"local_files_only": True, "trust_remote_code": False}
    try:
        with silent():
            kind = getattr(built, "config_class", None) or transformers.AutoConfig
            config = kind.from_pretrained(str(source), **known_only)
            _check_no_kernel(config, source)
            if state is not None:
                vars(config).pop("quantization_config", None)
                # AutoModel.from_pretrained chooses the class from a folder, and here no folder is passed.
                built = transformers.MODEL_MAPPING[type(config)] if name == "AutoModel" else built
            model, loading = built.from_pretrained(
                str(source) if state is None else None, config=config, dtype=getattr(torch, dtype),
                **({} if state is None else {"state_dict": dict(state)}), output_loading_info=True, **known_only,
            )  # fmt: skip
    except AdapterkitError:
        raise
    except Exception as error:  # transformers raises many types of errors for damaged folders.
        first = first_line(error)
        if "trust_remote_code" in str(error):
            raise Unsupported("adapterkit does not run the model's own code", path=source, cure=_OWN_CODE) from None
        raise Malformed(
            f"transformers cannot load the folder ({first})", path=source, cure="Download the folder again"
        ) from error
    if lacking is not None:
        lacking += sorted(loading["missing_keys"])
    loaded: nn.Module = model.eval()
    return loaded


def _check_no_kernel(config: object, source: Path) -> None:
    """Check that a config and the configs inside it do not name a kernel that transformers would download.

    transformers downloads a kernel if the config names an implementation like `org/kernel`. It also downloads a kernel
    if the config names an implementation like `flash_attention_2` and the package for it is not installed.
    `local_files_only` prevents neither download. This function checks the loaded config object instead of config.json,
    because config.json can refer to another file (`configuration_files`).

    Raises:
        Unsupported: the config names a kernel that is not in `KERNELS_OF_TORCH`.
    """
    attributes = config if isinstance(config, dict) else vars(config)
    for key, value in attributes.items():
        if str(key).removesuffix("_internal").endswith("_implementation"):
            for name in value.values() if isinstance(value, dict) else (value,):
                if name not in KERNELS_OF_TORCH:
                    field = str(key).removesuffix("_internal").removeprefix("_")
                    cure = f'Set {field} to "eager" in config.json, or leave it out'
                    why = f"{field} {name!r} is a kernel that would be downloaded and run, which adapterkit does not do"
                    raise Unsupported(why, path=source / "config.json", cure=cure)
        elif isinstance(value, dict) or type(value).__name__.endswith("Config"):
            _check_no_kernel(value, source)


@contextmanager
def silent() -> Iterator[None]:
    """Hide the progress bars and messages of transformers, because only adapterkit's commands may print."""
    logs = import_module("transformers.utils.logging")
    shown, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.set_verbosity(level)
        if shown:
            logs.enable_progress_bar()
