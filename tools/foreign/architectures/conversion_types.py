"""Makes spec/architectures/model_types/conversion.toml: the model types whose stored names transformers converts.

    python tools/foreign/architectures/conversion_types.py [--check]

`files` are those with a family file, or of a class whose model type has one; `same` have entries that change no name of
their tiny models, as they are saved; `left_out` have neither, each with the reason.

Needs transformers 5.24.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny import tiny  # noqa: E402
from transformers import conversion_mapping  # noqa: E402
from transformers.models.auto import configuration_auto  # noqa: E402

from adapterkit.naming.architectures import architecture_of  # noqa: E402

OUT = ROOT / "spec" / "architectures" / "model_types" / "conversion.toml"

LEFT_OUT = {
    "legacy": "no model type: renames of old checkpoints' norms, which adapters do not name",
    "timm_wrapper": "names are those of any model of timm",
    "dots3_note_audio_encoder": "a part of a model; no Auto class loads it as a model: dots3_note has its names",
    "dots3_note_vision_encoder": "a part of a model; no Auto class loads it as a model: dots3_note has its names",
    "qwen3_omni_moe_text": "a part of a model; no Auto class loads it as a model: qwen3_omni_moe_thinker has its names",
    "step3p5_vision": "a part of a model; no Auto class loads it as a model: step3p7 has its names",
}
"""Name in the mapping -> why it has no file."""


def reason(name: str) -> str | None:
    """Why a name of the mapping has no file; None for one that needs a file.

    A name that is neither a public class nor a model type is never loaded by itself: it is a class inside a module,
    whose model has the file, or a name that the mapping alone has (`xCLIPTextModel`, for a class `XCLIPTextModel`).
    """
    is_type = name in vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
    if is_type or hasattr(transformers, name):
        return LEFT_OUT.get(name)
    return LEFT_OUT.get(name, "neither a model type nor a public class: never loaded by itself")


def names() -> list[str]:
    """All names in transformers' mapping: model types and classes."""
    aliases: dict[str, Any] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN")  # noqa: B009
    return sorted({*conversion_mapping._build_checkpoint_conversion_mapping(), *aliases})


def type_of(name: str) -> str:
    """The model type of a name; that of its config for a class."""
    config = getattr(getattr(transformers, name, None), "config_class", None)
    return str(getattr(config, "model_type", "") or name)


def is_same(model_type: str) -> bool:
    """Whether a tiny model is saved under the names of the live model."""
    try:
        model = tiny(model_type)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            stored: set[str] = set()
            for file in Path(folder).glob("*.safetensors"):
                with safe_open(file, "pt") as reader:
                    stored |= set(reader.keys())
    except Exception:  # It is listed as left out, or not at all, which the test of the file finds.
        return False
    return stored <= {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}


def text() -> str:
    """The file's text."""
    files, same, lost = [], [], []
    for name in names():
        if reason(name):
            continue
        kind = type_of(name)
        # A part's names are in the file of its whole: `siglip_text_model` in `siglip`.
        words = kind.split("_")
        wholes = ["_".join(words[:cut]) for cut in range(len(words), 0, -1)]
        if any(architecture_of({"model_type": each}) for each in (name, *wholes)):
            files.append(name)
        else:
            (same if is_same(kind) else lost).append(name)
    if lost:
        raise SystemExit(f"neither a file, nor the same names, nor a reason: {', '.join(lost)}")
    source = f"transformers {version('transformers')}: conversion_mapping"
    lines = [
        "# Made by tools/foreign/architectures/conversion_types.py. The README beside the families explains it.",
        "format = 1",
        f"sources = {json.dumps([source])}",
        f"files = {json.dumps(files)}", f"same = {json.dumps(same)}", "", "[left_out]",
        *(f"{name} = {json.dumps(why)}" for name in names() if (why := reason(name))),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the file, or compare it with the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.check:
        same = OUT.read_text() == text()
        print("same" if same else "DIFFERENT")
        return 0 if same else 1
    OUT.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
