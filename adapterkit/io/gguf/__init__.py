"""Read and write GGUF files: headers first, tensors when they are fetched; every count and size is checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

from .layout import PLAIN, Value, raw_size
from .models import Model, read_model
from .reading import Gguf, read_gguf
from .writing import write_gguf

__all__ = ["PLAIN", "Gguf", "Model", "Value", "raw_size", "read_gguf", "read_model", "write_gguf"]
