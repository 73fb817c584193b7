"""VB-LoRA, with logits and with what is left of them, of linear layers and GPT-2's Conv1D."""

from peft import VBLoRAConfig

from peft_cases import Layers, gpt2


def vblora(**options):
    return VBLoRAConfig(**{"r": 3, "num_vectors": 9, "vector_length": 2, "topk": 2, **options})


CASES = {
    "vblora": (Layers, vblora(target_modules=["q", "up"], topk=3)),
    "vblora of few weights": (Layers, vblora(target_modules=["q", "up"], save_only_topk_weights=True)),
    "vblora of gpt-2": (gpt2, vblora(target_modules=["c_attn", "c_proj"], vector_length=4)),
    "vblora of few weights of gpt-2": (
        gpt2,
        vblora(target_modules=["c_attn"], save_only_topk_weights=True, topk=4, num_vectors=300),
    ),
}
