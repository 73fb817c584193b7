"""LoKr in all its forms."""

from peft import LoKrConfig

from peft_cases import Grouped, Layers, llama

LINEAR, EVERY = ["q", "up"], ["q", "up", "conv1", "conv2", "point"]


def lokr(**options):
    return LoKrConfig(**{"r": 1, "alpha": 3, "init_weights": False, **options})


CASES = {
    "lokr": (Layers, lokr(target_modules=EVERY, r=8)),
    "lokr apart": (Layers, lokr(target_modules=EVERY)),
    "lokr both apart": (Layers, lokr(target_modules=LINEAR, decompose_both=True, decompose_factor=4)),
    "lokr of a factor": (Layers, lokr(target_modules=EVERY, decompose_factor=2, r=1)),
    "lokr of a factor that does not divide": (Layers, lokr(target_modules=LINEAR, decompose_factor=3)),
    "lokr with cores": (Layers, lokr(target_modules=["q", "up", "conv2", "point"], use_effective_conv2d=True)),
    "lokr with a core of one axis": (Grouped, lokr(target_modules=["wide"], use_effective_conv2d=True, r=2)),
    "lokr in groups": (Grouped, lokr(target_modules=["one", "two", "wide"])),
    "lokr whole in groups": (Grouped, lokr(target_modules=["one", "two"], r=8)),
    "lokr patterns": (
        llama,
        lokr(
            target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
            rank_pattern={"layers.0.mlp.up_proj": 3, "k_proj": 2},
            alpha_pattern={"down_proj": 5, "q_proj": 0.5},
        ),
    ),
}
