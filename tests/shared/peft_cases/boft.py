"""BOFT: blocks by size and by number; without its CUDA extension PEFT has one factor."""

from peft import BOFTConfig
from torch import nn

from peft_cases import Layers, llama


def boft(**options):
    return BOFTConfig(**{"boft_block_size": 4, "init_weights": False, "target_modules": ["q", "up"], **options})


class Kernels(nn.Module):
    """PEFT takes kernels for square."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv2d(4, 6, 1, bias=False)


CASES = {
    "boft": (Layers, boft()),
    "boft by number of blocks": (Layers, boft(boft_block_size=0, boft_block_num=2, target_modules=["q", "point"])),
    "boft of convolutions": (Kernels, boft(target_modules=["conv", "point"])),
    "boft of llama": (llama, boft(target_modules="all-linear")),
}
