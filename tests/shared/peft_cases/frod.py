"""FRoD: bases that layers share, of linear layers and GPT-2's Conv1D."""

from peft import FrodConfig

from peft_cases import Layers, gpt2, llama


def frod(**options):
    return FrodConfig(**{"sparse_rate": 0.1, "progressbar": False, "init_weights": False, **options})


CASES = {
    "frod": (Layers, frod(target_modules=["q", "up"])),
    "frod of llama": (llama, frod(target_modules=["q_proj", "v_proj", "down_proj"])),
    "frod of gpt-2": (gpt2, frod(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    "frod without off-diagonals": (Layers, frod(target_modules=["q"], sparse_rate=0.0)),
}
