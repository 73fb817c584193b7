"""LN tuning: copies of norms, and of any other module."""

from peft import LNTuningConfig

from peft_cases import Layers, gpt2, llama

CASES = {
    "ln tuning": (llama, LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "ln tuning of layer norms": (gpt2, LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    "ln tuning of a weight stored in, out": (gpt2, LNTuningConfig(target_modules=["c_attn", "c_fc", "attn.c_proj"])),
    "ln tuning of other modules": (Layers, LNTuningConfig(target_modules=["norm", "q", "conv2", "emb"])),
}
