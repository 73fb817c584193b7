"""Write tests/data/experts with one release of PEFT: adapters of stacked experts, and the change of each expert.

Run `python expert_layouts.py OUT` in an environment of each release:

    pip install peft==0.18.1 "transformers<5"     # OUT = tests/data/experts/peft-0.18.1
    pip install peft==0.21.2                      # OUT = tests/data/experts/peft-0.21.2
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

EXPERTS, HIDDEN, WIDTH = 3, 8, 6

CASES = {
    "pair": (["gate_up_proj", "down_proj"], WIDTH),
    "square": (["gate_up_proj", "down_proj"], HIDDEN // 2),
    "single": (["gate_up_proj"], WIDTH),
    "lone_square": (["gate_up_proj"], HIDDEN // 2),
    "turned": (["gate_up_proj", "down_proj"], WIDTH),
}
"""Name -> adapted parameters, width of an expert; half the hidden width makes gate and up together square."""


class Turned(nn.Module):
    """Stacked as gpt-oss declares them: [expert, in, out], and PEFT is told so."""

    is_transposed = True

    def __init__(self, width):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * width))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, width, HIDDEN))


class Experts(nn.Module):
    """Stacked as transformers 5 declares them: [expert, out, in]."""

    def __init__(self, width):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * width, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, width))


def model(width, experts=Experts):
    """A model with the module paths of a mixture of experts; it is never called."""
    root = nn.Module()
    root.model = nn.Module()
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.experts = experts(width)
    root.model.layers = nn.ModuleList([layer])
    return root


def main(out):
    """Write all cases below a folder."""
    for case, (names, width) in CASES.items():
        torch.manual_seed(0)
        base = model(width, Turned if case == "turned" else Experts)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        parameters = [f"mlp.experts.{name}" for name in names]
        config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=parameters)
        tuned = get_peft_model(base, config)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter)
        folder = out / case
        tuned.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        after = tuned.merge_and_unload().state_dict()
        save_file({n: (after[n] - t).contiguous() for n, t in before.items()}, folder / "expected.safetensors")
        save_file(before, folder / "base.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
