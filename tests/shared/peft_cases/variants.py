"""Formulas that LoraConfig switches on: KaSA, BD-LoRA, PiSSA, OLoRA."""

from peft import BdLoraConfig, KasaConfig

from peft_cases import Layers, gpt2, llama
from peft_cases.built_in import lora

KASA = KasaConfig()


def blocks(**options):
    return BdLoraConfig(**{"target_modules_bd_a": ["up"], "target_modules_bd_b": ["q"], "nblocks": 2, **options})


CASES = {
    "kasa": (Layers, lora(target_modules=["q", "up"], kasa_config=KASA, rank_pattern={"up": 3})),
    "kasa of llama": (llama, lora(target_modules=["q_proj", "down_proj"], kasa_config=KASA, use_rslora=True, r=2)),
    "bdlora": (Layers, lora(target_modules=["q", "up"], use_bdlora=blocks(), rank_pattern={"1.q": 2})),
    "bdlora beside lora": (
        Layers,
        lora(
            target_modules=["q", "up", "head.1"],
            use_bdlora=blocks(target_modules_bd_a=["1.up"], nblocks=4, match_strict=False),
        ),
    ),
    "pissa": (Layers, lora(target_modules=["q", "up"], init_lora_weights="pissa", alpha_pattern={"up": 3})),
    "pissa of gpt-2": (gpt2, lora(target_modules=["c_attn", "c_proj", "wte"], init_lora_weights="pissa")),
    "olora": (Layers, lora(target_modules=["q", "up"], init_lora_weights="olora", rank_pattern={"up": 2})),
}
