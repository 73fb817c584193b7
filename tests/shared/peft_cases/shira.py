"""SHiRA."""

from peft import ShiraConfig

from peft_cases import Layers, llama

CASES = {
    "shira": (Layers, ShiraConfig(r=2, target_modules=["q", "up"], init_weights=False)),
    "seeded shira": (llama, ShiraConfig(r=1, target_modules=["q_proj", "up_proj"], init_weights=False, random_seed=3)),
}
