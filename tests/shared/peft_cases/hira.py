"""HiRA on every kind of layer."""

from peft import HiraConfig

from peft_cases import CONVOLUTIONS, Layers, gpt2, llama


def hira(**options):
    return HiraConfig(**{"r": 3, "init_weights": False, **options})


CASES = {
    "hira": (Layers, hira(target_modules=["q", "up"], rank_pattern={"up": 2, r"block\.1\.q": 5})),
    "hira of convolutions": (Layers, hira(target_modules=CONVOLUTIONS)),
    "hira of an embedding": (Layers, hira(target_modules=["emb"])),
    "hira of gpt-2": (gpt2, hira(target_modules=["c_attn", "c_proj", "wte", "lm_head"])),
    "hira of llama": (llama, hira(target_modules=["q_proj", "down_proj", "embed_tokens"])),
}
