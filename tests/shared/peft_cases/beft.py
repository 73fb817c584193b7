"""BEFT."""

from peft import BeftConfig

from peft_cases import Layers

CASES = {"beft": (Layers, BeftConfig(target_modules=["q", "head.1"], init_weights=False))}
