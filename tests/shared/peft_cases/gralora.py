"""GraLoRA, plain and hybrid, of linear layers and GPT-2's Conv1D."""

from peft import GraloraConfig

from peft_cases import Layers, gpt2


def gralora(**options):
    return GraloraConfig(**{"r": 4, "alpha": 6, "gralora_k": 2, "init_weights": False, **options})


CASES = {
    "gralora": (Layers, gralora(target_modules=["q", "up"])),
    "hybrid gralora": (Layers, gralora(target_modules=["q", "up"], gralora_k=4, hybrid_r=3, alpha=5)),
    "gralora of gpt-2": (gpt2, gralora(target_modules=["c_attn", "c_proj"], hybrid_r=2)),
}
