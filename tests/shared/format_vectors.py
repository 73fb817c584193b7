"""Files of every format in spec/vectors, and what they are read with."""

from pathlib import Path

ROOT = Path(__file__).parents[2] / "spec" / "vectors"

OF_LLAMA = {"megatron", "minlora", "nemo", "olive", "tensorrt_llm"}
"""Formats whose samples are of this base."""

BESIDE = ("converted.", "expected.", "forward.")
"""What names of files begin with that no tool of the format writes."""

SHARED = set((ROOT / "formats").glob("*/models"))
"""Folders of bases, beside those of adapters."""

EVERY = sorted({path.parent for path in (ROOT / "formats").glob("*/*/*") if path.is_file()} - SHARED)


def source(folder):
    """What a user names: the one file of tensors, or the folder, where there are several or a config is beside."""
    own = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(BESIDE)]
    files = [path for path in own if path.suffix not in (".json", ".yaml")]
    alone = len(files) == 1 and not (folder / "adapter_config.json").exists() and len(own) <= 2
    return files[0] if alone or folder.parent.name == "torchtune" else folder


def base(folder):
    return ROOT / "bases" / "llama" if folder.parent.name in OF_LLAMA else None
