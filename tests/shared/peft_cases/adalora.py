"""AdaLoRA, before and after rank was dropped."""

from peft import AdaLoraConfig

from peft_cases import Layers, gpt2


def adalora(**options):
    given = {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6, "init_lora_weights": False}
    return AdaLoraConfig(**given | options)


LEFT = {
    "block.0.q.lora_E": [True, False, True, True],
    "block.1.q.lora_E": [False, True, False, False],
    "block.1.up.lora_E": [False, False, False, False],
    "conv2.lora_E": [True, True, False, True],
}

CASES = {
    "adalora": (Layers, adalora(target_modules=["q", "up", "conv2", "point"], bias="lora_only")),
    "adalora pruned": (Layers, adalora(target_modules=["q", "up", "conv2"], rank_pattern=LEFT)),
    "adalora without alpha": (Layers, adalora(target_modules=["q", "conv2"], lora_alpha=0)),
    "adalora of gpt-2": (gpt2, adalora(target_modules=["c_attn", "c_fc", "mlp.c_proj"])),
}
