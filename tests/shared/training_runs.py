"""Train twelve methods with common training loops, from one start and on one batch, and the same with PEFT.

`tests/torch/test_live_training.py` runs some combinations, `tools/foreign/check_training.py` all of them.
"""

import logging
import warnings

import peft
import torch
import transformers

import adapterkit as ak

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(8 * 6).reshape(8, 6) % 29
DATA = [{"input_ids": row, "labels": row} for row in IDS]
LR = 0.01
TARGETS = ["q_proj", "v_proj", "up_proj"]


def lora(**more):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **more)


METHODS = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=TARGETS, use_cayley_neumann=False, task_type="CAUSAL_LM"
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "bottleneck": None,
}
"""Name -> PEFT's config; None if PEFT does not have the method."""


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def peft_model(method):
    """Return PEFT's model with an adapter that is moved from its start, where many gradients are 0."""
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), METHODS[method]())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def start(method, folder):
    """Return the adapter of `peft_model`, or a new one."""
    if METHODS[method] is None:
        return ak.torch.create(llama(), method, targets=["mlp", "self_attn"], rank=4)
    path = folder / method
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model(method).save_pretrained(path)
            llama().save_pretrained(folder / "base")  # FourierFT's file does not have the sizes of weights.
    return ak.read(path, base=folder / "base")


def attached(method, folder):
    """Return a base with the adapter attached, and its handle."""
    model = llama()
    return model, ak.torch.inject(model, start(method, folder), trainable=True)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain(model, steps, _folder):
    model.train()
    optimizer = torch.optim.AdamW(trained(model), lr=LR, weight_decay=0)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def trainer(model, steps, folder):
    settings = transformers.TrainingArguments(
        str(folder / "trainer"), per_device_train_batch_size=len(IDS), max_steps=steps, learning_rate=LR, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0, optim="adamw_torch",
        lr_scheduler_type="constant", weight_decay=0,
    )  # fmt: skip
    made = transformers.Trainer(model, settings, train_dataset=DATA)
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def accelerate(model, steps, _folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trained(model), lr=LR, weight_decay=0)
    loader = torch.utils.data.DataLoader(DATA, batch_size=len(IDS))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    found = []
    while len(found) < steps:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def lightning(model, steps, folder):
    """Train with `lightning`, which the test suite does not install."""
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.found = model.train(), []

        def training_step(self, batch, _index):
            loss = self.model(**batch).loss
            self.found.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(trained(self), lr=LR, weight_decay=0)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    Trainer(
        max_steps=steps, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=folder,
    ).fit(module, torch.utils.data.DataLoader(DATA, batch_size=len(IDS)))  # fmt: skip
    return module.found


LOOPS = {"plain": plain, "trainer": trainer, "accelerate": accelerate, "lightning": lightning}
