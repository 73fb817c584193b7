"""PEFT's own adapters, one module a family: `CASES` maps a name to a model and a config of PEFT's.

A model is one of those below, or a function of the same kind in the family's module. Every case is merged, written,
loaded and run beside PEFT in tests/formats/test_peft.py.
"""

import pkgutil
from importlib import import_module

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CONVOLUTIONS = ["conv1", "conv2", "conv3", "point"]


class Experts(nn.Module):
    """Stacked experts: [e, out, in], or [e, in, out] as gpt-oss stores them."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        wide, back = ((3, 8, 12), (3, 6, 8)) if transposed else ((3, 12, 8), (3, 8, 6))
        self.gate_up_proj = nn.Parameter(torch.randn(wide))
        self.down_proj = nn.Parameter(torch.randn(back))

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if self.is_transposed:
            up, down = up.mT, down.mT
        return torch.einsum("eoi,bi->beo", up, x), torch.einsum("eoi,bi->beo", down, x[:, : down.shape[2]])


class Layers(nn.Module):
    """One layer of every kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 12, bias=False)}) for _ in range(2)
        )
        self.emb = nn.Embedding(10, 6)
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), stride=2)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.point = nn.Conv2d(6, 4, 1)
        self.attn = nn.MultiheadAttention(8, 2)
        self.experts = Experts(transposed=False)
        self.turned = Experts(transposed=True)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))


class Grouped(nn.Module):
    """Convolutions in groups, which store [out, in / groups, *k], and one that is wide enough for a core of rank 2."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(8, 12, 3, groups=2, padding=1)
        self.two = nn.Conv2d(8, 4, (3, 2), groups=4, dilation=2, padding=2)
        self.wide = nn.Conv1d(16, 36, 5)


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False)
    )


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip


SHAPES = {
    nn.Linear: lambda m: (2, m.in_features),
    nn.Conv1d: lambda m: (2, m.in_channels, 6),
    nn.Conv2d: lambda m: (2, m.in_channels, 6, 5),
    nn.Conv3d: lambda m: (1, m.in_channels, 4, 3, 5),
    nn.BatchNorm1d: lambda m: (2, m.num_features),
    nn.MultiheadAttention: lambda m: (3, 2, m.embed_dim),
    Experts: lambda _: (5, 8),
}
"""Kind of module -> shape of an input."""


def outputs(base, model):
    """What a model computes from fixed inputs: its logits, or what each layer that stands for itself makes of its own.

    Args:
        base: the plain model, which tells which layers there are.
        model: the same with an adapter, called by the same names.
    """
    if hasattr(base, "config"):
        return [model(torch.tensor([[1, 5, 9], [2, 2, 7]])).logits]
    found = []
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Embedding):
            found.append(model.get_submodule(name)(torch.arange(layer.num_embeddings)))
        elif type(layer) in SHAPES and "attn." not in name:
            x = torch.randn(SHAPES[type(layer)](layer), generator=torch.Generator().manual_seed(len(name)))
            out = model.get_submodule(name)(*[x] * (3 if isinstance(layer, nn.MultiheadAttention) else 1))
            found += out[:1] if isinstance(layer, nn.MultiheadAttention) else out if isinstance(out, tuple) else [out]
    return found


def every_case():
    """All cases of all modules in this folder."""
    cases = {}
    for found in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        own = import_module(f"peft_cases.{found}").CASES
        assert not own.keys() & cases.keys(), found
        cases |= own
    return cases
