"""MiSS: plain, mini and bat."""

from peft import MissConfig

from peft_cases import Layers

CASES = {
    "miss": (Layers, MissConfig(r=3, target_modules=["q", "up"], init_weights=False)),
    "mini miss": (Layers, MissConfig(r=2, mini_r=4, target_modules=["q", "up"], init_weights="mini")),
    "bat miss": (Layers, MissConfig(r=4, target_modules=["q", "up"], init_weights="bat")),
}
