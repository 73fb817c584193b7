"""C3A."""

from peft import C3AConfig

from peft_cases import Layers, llama


def c3a(**options):
    return C3AConfig(**{"block_size": 4, "init_weights": "gaussian", **options})


CASES = {
    "c3a": (Layers, c3a(target_modules=["q", "up"])),
    "c3a by pattern": (llama, c3a(target_modules=["q_proj", "up_proj"], block_size_pattern={"up_proj": 2})),
}
