"""RoAd: its three variants, in groups of several sizes."""

from peft import RoadConfig

from peft_cases import Layers, llama


def road(variant, **options):
    return RoadConfig(**{"variant": variant, "group_size": 4, "target_modules": ["q", "up"], **options})


CASES = {
    "road 1": (Layers, road("road_1", init_weights=False)),
    "road 2": (Layers, road("road_2", init_weights=False)),
    "road 4": (Layers, road("road_4", init_weights=False)),
    "road in pairs": (Layers, road("road_4", group_size=2, init_weights=False)),
    "road of llama": (llama, road("road_1", target_modules="all-linear", modules_to_save=["norm"])),
}
