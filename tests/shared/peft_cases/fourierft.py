"""FourierFT, of linear layers and GPT-2's Conv1D."""

from peft import FourierFTConfig

from peft_cases import Layers, gpt2, llama


def fourierft(**options):
    return FourierFTConfig(**{"n_frequency": 5, "scaling": 20.0, "init_weights": False, **options})


CASES = {
    "fourierft": (Layers, fourierft(target_modules=["q", "up"])),
    "fourierft by pattern": (
        llama,
        fourierft(target_modules="all-linear", n_frequency_pattern={r"layers\.1\.mlp\..*": 9, "self_attn.q_proj": 2}),
    ),
    "fourierft of gpt-2": (gpt2, fourierft(target_modules=["c_attn", "c_proj"], random_loc_seed=777)),
}
