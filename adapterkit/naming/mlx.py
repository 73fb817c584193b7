"""Names of MLX-LM's models where they are not transformers' own: experts, which MLX holds in one stack.

Sources: `sanitize` in mlx_lm/models/mixtral.py, qwen2_moe.py, qwen3_moe.py, deepseek_v3.py, olmoe.py.
"""

from __future__ import annotations

_L = "model.layers.{n}."
_M = _L + "block_sparse_moe"
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_PROJ = ("gate_proj", "down_proj", "up_proj")

EXPERTS = {
    **{f"{_M}.experts.{{e}}.{own}": f"{_M}.switch_mlp.{name}" for own, name in _MIXTRAL.items()},
    **{f"{_L}mlp.experts.{{e}}.{name}": f"{_L}mlp.switch_mlp.{name}" for name in _PROJ},
}
"""Own template of one expert's module -> MLX's template of the stack."""
