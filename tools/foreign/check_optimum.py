"""Compares changed folders of optimum's graphs with PEFT: `python tools/foreign/check_optimum.py PYTHON DIR`.

PYTHON is the interpreter of an environment with optimum-onnx, onnxruntime, transformers and PEFT; the models are
written to DIR. Further arguments select models. This checkout injects into and merges into each folder. optimum's
`ORTModelFor...` loads the result, whose outputs are compared with those of the torch model with PEFT's adapter.
DIR/optimum.tsv has a row for each case: tool, model, type, mode, method, result.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graph_cases import Case, Tool, run_cases

MODELS = ("whisper", "t5", "bart", "gpt2", "llama", "mistral", "bert", "vit")

EXPORTED = ("whisper", "t5", "bart")
"""Models of encoder and decoder that are exported by this checkout, too."""

METHODS = ("lora", "dora", "ia3", "ln")

EXPORTS = ("export merged", "export attached")

LIMIT = 1e-5


def main() -> int:
    """Run the command line; 1 if a case is wrong."""
    python, home, *chosen = sys.argv[1:]
    tool = Tool("optimum", python, Path(__file__).with_name("optimum_folders.py"), Path(home))
    tool.make(chosen)
    cases = [
        Case(model, "fp32", method, mode, source=f"{model}/onnx", limit=LIMIT)
        for model in chosen or MODELS
        for method in METHODS
        for mode in ("constant", "merge", "slots", *(EXPORTS if model in EXPORTED else ()))
    ]
    return run_cases(tool, cases)


if __name__ == "__main__":
    sys.exit(main())
