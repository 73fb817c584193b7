"""OSF: half of the singular values, a number or a share of them."""

from peft import OSFConfig

from peft_cases import Layers, llama

CASES = {
    "osf": (Layers, OSFConfig(target_modules=["q", "up"])),
    "osf by number": (Layers, OSFConfig(target_modules=["q", "up"], effective_rank=5, rank_pattern={"1.q": 0.25})),
    "osf by share": (Layers, OSFConfig(target_modules=["q", "up"], effective_rank=0.8)),
    "osf of llama": (llama, OSFConfig(target_modules=["q_proj", "v_proj", "down_proj"], effective_rank=2)),
}
