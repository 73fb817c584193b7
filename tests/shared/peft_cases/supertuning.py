"""Super-Tuning, alone and with a LoRA."""

from peft import SupertuningConfig

from peft_cases import Layers, llama

CASES = {
    "supertuning": (Layers, SupertuningConfig(sparsity=0.8, target_modules=["q", "up"], init_weights=False)),
    "hybrid supertuning": (
        llama,
        SupertuningConfig(sparsity=0.9, r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_weights=False),
    ),
}
