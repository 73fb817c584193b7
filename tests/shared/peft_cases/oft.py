"""OFT: exact and in a series, in blocks and with one for all, constrained, on every kind of layer."""

from peft import OFTConfig
from torch import nn

from peft_cases import Layers, llama

LAYERS = ["q", "up", "emb", "point"]


def oft(**options):
    return OFTConfig(**{"oft_block_size": 4, "init_weights": False, "target_modules": LAYERS, **options})


class Point(nn.Module):
    """A convolution with a stride, of the only kernel for which PEFT's forward is its merge."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (1, 1), stride=2)


CASES = {
    "oft": (Layers, oft(use_cayley_neumann=False)),
    "oft in a series": (Layers, oft()),
    **{f"oft of {n} terms": (Layers, oft(num_cayley_neumann_terms=n)) for n in (2, 3, 4, 7)},
    "oft by number of blocks": (Layers, oft(r=2, oft_block_size=0)),
    "oft of one block for all": (Layers, oft(block_share=True, target_modules=["q", "up"], use_cayley_neumann=False)),
    "oft of sizes that do not divide": (Layers, oft(oft_block_size=5, use_cayley_neumann=False)),
    "coft": (Layers, oft(coft=True, eps=0.3, use_cayley_neumann=False)),
    "coft in a series": (Layers, oft(coft=True, eps=0.05)),
    "oft of llama": (llama, oft(target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"])),
    "oft and saved": (Layers, oft(target_modules=["q"], modules_to_save=["conv1"], bias="oft_only")),
    "oft of a convolution": (Point, oft(target_modules=["conv"])),
}
