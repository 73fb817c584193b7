#!/usr/bin/env python3
"""Train the demo's base and adapters, write adapterkit/demo/data, and print the accuracies on held-out digits.

    python tools/train_demo.py [--out DIR]

Needs torch, peft and scikit-learn, which contains the digits; takes about two minutes on one core. The data is split in
the order of the file: the first 1257 images are for training, the last 540 are held out. Training runs for a fixed
number of epochs, and the held-out images are only used for the accuracies. One thread, fixed seeds and deterministic
kernels give the same bytes in every run on one machine; another processor or another release of torch or PEFT may round
differently.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Import the model of this checkout, not an installed one.
from adapterkit.demo.model import DATA, HEADS, TASKS, DigitTransformer, accuracy, build, held_out

Task = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

TRAINED, BATCH, RATE = 1257, 64, 0.004
WIDTH, HIDDEN, LAYERS = 64, 128, 2
BASE_NAME = "adapterkit-demo-base"
SOURCE = (
    "The last 540 images of scikit-learn's copy of: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten "
    "Digits, UCI Machine Learning Repository, doi:10.24432/C50P49, CC BY 4.0"
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """The training of one adapter: PEFT's settings, the number of epochs, and the random seed."""

    config: LoraConfig
    epochs: int
    seed: int


RECIPES = {
    "rotated": Recipe(
        LoraConfig(
            r=8,
            lora_alpha=16,
            use_rslora=True,
            target_modules=["embed", *ATTENTION, *MLP],
            rank_pattern={"embed": 4, "mlp.up_proj": 12, "mlp.down_proj": 12},
        ),
        epochs=60,
        seed=1,
    ),
    "negative": Recipe(
        LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[*ATTENTION, *MLP]), epochs=60, seed=2
    ),
    "relabelled": Recipe(
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["head"]), epochs=20, seed=3
    ),
}


def main() -> None:
    """Parse the option, train, write the files, and print their accuracies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write (default: the data of the package)")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = digits()
    write_test(images[TRAINED:], labels[TRAINED:], out)
    write_base(train_base(images[:TRAINED], labels[:TRAINED]), out / "base")
    for name, recipe in RECIPES.items():
        write_adapter(train_adapter(recipe, TASKS[name], images[:TRAINED], labels[:TRAINED], out), out / name)
    open_to_readers(out)
    report(out)


def digits() -> tuple[Tensor, Tensor]:
    """Return all 1797 images, uint8 `[n, 8, 8]`, and labels, uint8 `[n]`, in the order of the file."""
    data = load_digits()
    return torch.tensor(data.images).to(torch.uint8), torch.tensor(data.target).to(torch.uint8)


def train_base(images: Tensor, labels: Tensor) -> nn.Module:
    """Train the base, which reads the digits unchanged."""
    torch.manual_seed(0)
    model = DigitTransformer(d=WIDTH, hidden=HIDDEN, layers=LAYERS)
    fit(model, images, labels, lambda x, y: (x, y), epochs=60)
    return model


def train_adapter(recipe: Recipe, task: Task, images: Tensor, labels: Tensor, out: Path) -> PeftModel:
    """Train PEFT's adapter for a task, on the stored base, which is rounded to bfloat16."""
    model = stored_base(out)
    model.name_or_path = BASE_NAME  # PEFT records this as the base.
    torch.manual_seed(recipe.seed)
    adapted = get_peft_model(model, recipe.config)
    fit(adapted, images, labels, task, epochs=recipe.epochs)
    return adapted


def fit(model: nn.Module, images: Tensor, labels: Tensor, task: Task, *, epochs: int) -> None:
    """Train with AdamW and a one-cycle rate on smoothed cross-entropy; torch's global seed draws orders and shifts."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * -(-len(images) // BATCH))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            x, y = task(nudge(images[chosen]), labels[chosen])
            loss = functional.cross_entropy(model(x), y.long(), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def nudge(images: Tensor) -> Tensor:
    """Shift about half of the images by at most one pixel; 1257 images are too few without this."""
    n = len(images)
    offset = torch.where(torch.rand(n, 1) < 0.5, torch.randint(0, 3, (n, 2)), 1)
    rows, columns = (offset[:, axis, None] + torch.arange(8) for axis in (0, 1))
    padded = functional.pad(images, (1, 1, 1, 1))
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def write_test(images: Tensor, labels: Tensor, out: Path) -> None:
    """Write the held-out images and labels, with their source in the header."""
    out.mkdir(parents=True, exist_ok=True)
    # Use a single key, because safetensors writes several in random order.
    save_file({"images": images, "labels": labels}, out / "test.safetensors", {"source": SOURCE})


def write_base(model: nn.Module, folder: Path) -> None:
    """Write the weights as bfloat16 under the model's names, and the settings that the shapes do not show."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["DigitTransformer"],
        "dtype": "bfloat16",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "model_type": "adapterkit-demo",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_labels": 10,
    }
    write_json(folder / "config.json", config)


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write PEFT's files without its empty model card."""
    # The embedding here is a linear layer. With "auto", PEFT would look for the base's vocabulary on the network.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # PEFT stores these fields as sets, and a set of strings has a different order in each process (PYTHONHASHSEED).
    for key in ("target_modules", "modules_to_save"):
        config[key] = config[key] and sorted(config[key])
    write_json(path, config)


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys, two spaces, and a newline at the end."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def open_to_readers(out: Path) -> None:
    """Set mode 644: safetensors writes files that only the owner can read, and a wheel would keep that mode."""
    for folder in (out, out / "base", *(out / name for name in RECIPES)):
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)


def stored_base(out: Path) -> nn.Module:
    """Read the base back from `out`."""
    return build(load_file(out / "base" / "model.safetensors"))


def report(out: Path) -> None:
    """Print the accuracies on the held-out images, with everything read back from the files in `out`."""
    images, labels = held_out(out)
    print(f"{len(labels)} held-out images; the base reads {accuracy(stored_base(out), images, labels):.2%} as they are")
    print(f"{'task':<12}{'base':>9}{'adapter':>9}{'merged':>9}{'bfloat16':>10}")
    for name, task in TASKS.items():
        base, adapter, merged, rounded = (f"{score:.2%}" for score in scores(out, name, *task(images, labels)))
        print(f"{name:<12}{base:>9}{adapter:>9}{merged:>9}{rounded:>10}")


def scores(out: Path, name: str, images: Tensor, labels: Tensor) -> tuple[float, float, float, float]:
    """Return accuracies: base, live adapter, PEFT's merge in float32, and this merge rounded to bfloat16."""
    live = PeftModel.from_pretrained(stored_base(out), out / name).eval()
    before, after = accuracy(stored_base(out), images, labels), accuracy(live, images, labels)
    merged = live.merge_and_unload()
    rounded = build({key: weight.to(torch.bfloat16) for key, weight in merged.state_dict().items()})
    return before, after, accuracy(merged, images, labels), accuracy(rounded, images, labels)


if __name__ == "__main__":
    main()
