"""Files of every format in spec/vectors, and the options to read them with."""

from pathlib import Path

ROOT = Path(__file__).parents[2] / "spec" / "vectors"

OF_LLAMA = {"keras_hub", "megatron", "minlora", "nemo", "olive", "tensorrt_llm"}
"""Formats with samples for this base."""

BESIDE = ("converted.", "expected.", "forward.")
"""Prefixes of files in spec/vectors that are not files of the format."""

SHARED = set((ROOT / "formats").glob("*/models"))
"""Folders in spec/vectors that hold bases instead of adapters."""

EVERY = sorted({path.parent for path in (ROOT / "formats").glob("*/*/*") if path.is_file()} - SHARED)


def source(folder):
    """Return the path that a user would pass: the file of tensors; or the folder, if it has several or a config."""
    own = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(BESIDE)]
    files = [path for path in own if path.suffix not in (".json", ".yaml")]
    alone = len(files) == 1 and not (folder / "adapter_config.json").exists() and len(own) <= 2
    return files[0] if alone or folder.parent.name == "torchtune" else folder


def base(folder):
    return ROOT / "bases" / "llama" if folder.parent.name in OF_LLAMA else None


def base_with_config(folder):
    """Return the base also for formats that can be read without one, but whose writers need its config."""
    return ROOT / "bases" / "llama" if folder.parent.name in {"gguf", "litgpt", "mlx", "torchtune"} else base(folder)
