"""The demo's model (a small transformer that classifies handwritten digits), its accuracy, and the adapters' tasks.

Images are uint8 `[n, 8, 8]` with values 0 (paper) to 16 (ink); labels are uint8 `[n]`, 0 to 9. A token is a patch of
2x2 pixels, so an image is 16 tokens. `tools/train_demo.py` trains the model with this module.

Source of the images: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, doi:10.24432/C50P49 (CC BY 4.0), from the copy in scikit-learn.
"""

# Only code that runs the demo may import this module, because this module imports torch.
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DATA = Path(__file__).parent / "data"
PATCH, TOKENS, HEADS, CLASSES, INK = 2, 16, 4, 10, 16


class DemoAttention(nn.Module):
    """Self-attention over all tokens of one image: `[n, 16, d]` to `[n, 16, d]`."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


def _split_heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, applied to each token: `[n, 16, d]` to `[n, 16, d]`."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
        return out


class DemoLayer(nn.Module):
    """A pre-norm transformer layer: `[n, 16, d]` to `[n, 16, d]`."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(d)
        self.attn = DemoAttention(d)
        self.mlp_norm = nn.LayerNorm(d)
        self.mlp = MLP(d, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class DigitTransformer(nn.Module):
    """The demo's model. It maps images (uint8, `[n, 8, 8]`) to logits (float32, `[n, 10]`)."""

    def __init__(self, *, d: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, d)
        self.position = nn.Parameter(torch.randn(TOKENS, d) * 0.1)
        self.layers = nn.ModuleList(DemoLayer(d, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(_patches(images)) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def _patches(images: Tensor) -> Tensor:
    """Split images (uint8, `[n, 8, 8]`) into patches (float32, `[n, 16, 4]`) between -1 (paper) and 1 (ink)."""
    pixels = images.float() * (2 / INK) - 1
    return pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)


def build(weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a `DigitTransformer` in float32 with the given weights, whose shapes determine the sizes of the model.

    Raises:
        KeyError: `layers.0.mlp.up_proj.weight`, from which the sizes are read, is missing.
        RuntimeError: another weight is missing, is unknown, or has a wrong shape. The error is from torch's
            `load_state_dict`, and lists these weights.
    """
    hidden, d = weights["layers.0.mlp.up_proj.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    model = DigitTransformer(d=d, hidden=hidden, layers=layers)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction (0 to 1) of the images (uint8, `[n, 8, 8]`) whose label (int, `[n]`) the model predicts."""
    return float((model(images).argmax(1) == labels).double().mean())


def held_out(folder: Path = DATA) -> tuple[Tensor, Tensor]:
    """Return images (uint8, `[n, 8, 8]`) and labels (uint8, `[n]`) that were not used in any training."""
    from safetensors.torch import load_file

    test = load_file(folder / "test.safetensors")
    return test["images"], test["labels"]


def rotated(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the digits by 90 degrees counter-clockwise."""
    return images.rot90(1, (1, 2)), labels


def negative(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Swap ink and paper."""
    return INK - images, labels


def relabelled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each label with the next digit: 0 becomes 1, and 9 becomes 0."""
    return images, (labels + 1) % CLASSES


# A map from the name of each adapter's folder to the function that converts images and labels from the base's task to
# the adapter's task.
TASKS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rotated": rotated,
    "negative": negative,
    "relabelled": relabelled,
}
