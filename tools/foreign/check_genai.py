"""Compares changed graphs of onnxruntime-genai's builder with PEFT: `python tools/foreign/check_genai.py PYTHON DIR`.

PYTHON is the interpreter of an environment with onnxruntime-genai, transformers and PEFT; the models are written to
DIR. Further arguments select models. This checkout injects into and merges into each folder, and `og.Generator` runs
the result; slots get their file from `og.Adapters`. It also exports the models for `og.Generator`. For int4, the torch
model has the dequantized weights of the graph. DIR/genai.tsv has a row for each case: tool, model, type, mode, method,
result.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graph_cases import Case, Tool, run_cases

MODELS = ("llama", "qwen2", "qwen3", "phi3", "gemma", "gptoss", "lfm2moe")

EXPERTS = ("gptoss", "lfm2moe")
"""Models of experts: only LoRA in float32."""

EXPORTS = ("export merged", "export attached", "export slots")
"""Folders that this checkout exports for onnxruntime-genai."""

TYPES = {"fp32": 1e-5, "fp16": 3e-2, "int4": 1e-5, "int4asym": 1e-5, "int4kquant": 1e-5, "int4apart": 1e-5}

TIED = ("gemma",)
"""Models of the type `int4apart`; see genai_folders.py."""


def main() -> int:
    """Run the command line; 1 if a case is wrong."""
    python, home, *chosen = sys.argv[1:]
    tool = Tool("genai", python, Path(__file__).with_name("genai_folders.py"), Path(home))
    tool.make(chosen)
    cases = [
        Case(model, kind, method, mode, source=f"{model}/{kind}", limit=limit)
        for model in chosen or MODELS
        for kind, limit in TYPES.items()
        for method in ("lora", "dora", "ia3")
        for mode in ("constant", "merge", "slots", *(EXPORTS if kind == "fp32" and model not in EXPERTS else ()))
        if (model not in EXPERTS or (kind, method) == ("fp32", "lora")) and (kind != "int4apart" or model in TIED)
    ]
    return run_cases(tool, cases)


if __name__ == "__main__":
    sys.exit(main())
