"""LoHa."""

from peft import LoHaConfig

from peft_cases import Grouped, Layers


def loha(**options):
    return LoHaConfig(**{"r": 3, "alpha": 4, "init_weights": False, **options})


CASES = {
    "loha": (
        Layers,
        loha(
            target_modules=["q", "up", "conv1", "conv2", "point"],
            rank_pattern={"conv.": 2},
            alpha_pattern={"up": 5},
        ),
    ),
    "loha with cores": (
        Layers,
        loha(target_modules=["q", "conv1", "conv2", "point"], use_effective_conv2d=True),
    ),
    "loha in groups": (Grouped, loha(target_modules=["one", "two"])),
    "loha with cores in groups": (Grouped, loha(target_modules=["one", "two"], use_effective_conv2d=True)),
}
