"""GLoRA, every form."""

from peft import GloraConfig

from peft_cases import Layers, llama


def glora(A_B, C, D_E, **options):
    forms = {"config_A_B": A_B, "config_C": C, "config_D_E": D_E}
    return GloraConfig(**{"r": 3, "init_weights": False, "target_modules": ["q", "up", "head.1"], **forms, **options})


CASES = {
    "glora": (Layers, glora("lora", "lora", "constant")),
    "glora of vectors": (Layers, glora("vector", "vector", "vector", target_modules=["q", "head.1"])),
    "glora of constants": (Layers, glora("constant", "lora", "constant", target_modules=["q"])),
    "glora of two constants": (Layers, glora("constant", "none", "none")),
    "glora of constants without biases": (llama, glora("constant", "lora", "constant", target_modules=["q_proj"])),
    "glora of vectors without biases": (llama, glora("vector", "lora", "constant", target_modules=["q_proj"])),
    "glora without weights": (Layers, glora("none", "lora", "vector")),
    "glora without biases": (Layers, glora("lora", "none", "none")),
    "glora without C": (Layers, glora("lora", "none", "vector", modules_to_save=["conv1"])),
    "glora of llama": (llama, glora("lora", "vector", "vector", target_modules=["q_proj", "down_proj"])),
}
