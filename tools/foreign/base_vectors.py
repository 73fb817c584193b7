"""Writes tests/data/bases.json.gz: names and shapes of tiny bases, and where each adapted weight of a live model lies.

    python tools/foreign/base_vectors.py [MODEL_TYPE...]      those named; the others stay as they are

`MODEL_TYPE:bare` is the base that the model without its head saves. The places are found by values
(`architectures/pairing.py`), not from the files that they test. Needs transformers 5.24.
"""

from __future__ import annotations

import gzip
import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent / "architectures"))

import transformers  # noqa: E402
from entries import module_of  # noqa: E402
from families import FAMILIES  # noqa: E402
from pairing import live, pair, stored  # noqa: E402
from peft_models import experts_of, linears_of  # noqa: E402
from tiny import tiny  # noqa: E402

LARGEST = 3_000_000
"""Parameters of a model that is still compared row by row."""

BARE = ("cosmos3_edge", "cosmos3_omni", "exaone", "qianfan_ocr")
"""Model types whose models without a head are saved under names that no prefix turns into those with one."""

OUT = ROOT / "tests" / "data" / "bases.json.gz"


def vector(model_type: str) -> dict[str, Any]:
    """Names and shapes of the base and of the live model, and each target's shape there with its pieces.

    A piece is [expert of the target, first row, end of rows, name in the base, its expert, first row there, all rows].
    """
    family, _, bare = model_type.partition(":")
    model = tiny(family).base_model if bare else tiny(family)
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise ValueError("its config does not become small")
    ours, theirs = live(model), stored(model)
    wanted = {*linears_of(model), *experts_of(model)}
    targets: dict[str, Any] = {}
    for a, b in pair(ours, theirs):
        name = module_of(a.name)
        if name not in wanted or a.name.endswith(".bias"):
            continue
        shape = next(list(ours[each].shape) for each in (f"{name}.weight", name) if each in ours)
        pieces = targets.setdefault(name, {"shape": shape, "pieces": []})["pieces"]
        pieces.append([a.expert, a.start, a.stop, module_of(b.name), b.expert, b.start, b.of])
    shapes = {"base": theirs, "live": ours}
    found: dict[str, Any] = {}
    for side, tensors in shapes.items():
        found[side] = {name: list(each.shape) for name, each in tensors.items()}
    told = model.config.get_text_config().to_dict()
    file = ROOT / "spec" / "architectures" / f"{family}.toml"
    if "qkv = " in file.read_text():  # The heads decide on how such a tensor is divided.
        heads = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
        found["config"] = {name: told[name] for name in heads}
    if "half = " in file.read_text():  # In a live model nothing but the config says how many experts there are.
        found["config"] = {"moe_num_experts": told["moe_num_experts"]}
    return {**found, "targets": targets}


def main() -> None:
    """Write the vectors of the model types that were asked for, or of all that can be made."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = json.loads(gzip.decompress(OUT.read_bytes())) if sys.argv[1:] else {}
    known = [each for types in FAMILIES.values() for each in types]
    for model_type in sys.argv[1:] or [*known, *(f"{each}:bare" for each in BARE)]:
        try:
            found[model_type] = vector(model_type)
        except Exception as error:  # A model type that cannot be made small is left out, and named.
            print(f"{model_type}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
    # The time in the header would make the same vectors another file.
    OUT.write_bytes(gzip.compress(json.dumps(found, separators=(",", ":")).encode(), 9, mtime=0))
    print(f"{len(found)} model types, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
