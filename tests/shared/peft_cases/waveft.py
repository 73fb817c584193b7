"""WaveFT, of linear layers and GPT-2's Conv1D, with wavelets of several families."""

from peft import WaveFTConfig

from peft_cases import Layers, gpt2, llama


def waveft(**options):
    return WaveFTConfig(**{"n_frequency": 30, "scaling": 7.0, "init_weights": False, **options})


CASES = {
    "waveft": (Layers, waveft(target_modules=["q", "up"])),
    "waveft without a transform": (Layers, waveft(target_modules=["q", "head.1"], n_frequency=20, use_idwt=False)),
    "waveft of db4": (Layers, waveft(target_modules=["q", "up", "head.1"], n_frequency=24, wavelet_family="db4")),
    "waveft of sym5": (Layers, waveft(target_modules=["head.1"], n_frequency=24, wavelet_family="sym5")),
    "waveft of coif2": (llama, waveft(target_modules=["q_proj"], wavelet_family="coif2")),
    "waveft by pattern": (
        llama,
        waveft(target_modules=["q_proj", "v_proj", "up_proj"], n_frequency_pattern={"v_proj": 9, r"1\.mlp.*": 11}),
    ),
    "waveft by share": (llama, waveft(target_modules=["k_proj", "up_proj"], proportional_parameters=True)),
    "waveft of gpt-2": (gpt2, waveft(target_modules=["c_attn", "c_proj"], wavelet_family="db2")),
}  # fmt: skip
