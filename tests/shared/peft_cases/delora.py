"""DeLoRA."""

from peft import DeloraConfig

from peft_cases import Layers, llama

CASES = {
    "delora": (Layers, DeloraConfig(r=3, target_modules=["q", "up"], init_weights=False)),
    "delora by pattern": (
        llama,
        DeloraConfig(
            r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, lambda_pattern={"q_proj": 3},
            init_weights=False,
        ),
    ),
}  # fmt: skip
