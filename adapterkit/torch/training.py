"""Train adapters: a callback for transformers' `Trainer` (and TRL's trainers), and the optimizer LoRA-FA.

Accelerate and Lightning need no callback. They save the model's state dict, and `handle.checkpoint` determines which
tensors the state dict contains.

    handle.checkpoint = "adapter"
    accelerator.save_state(folder)             # and accelerator.load_state(folder)
    lightning.Trainer(...).fit(module)         # and fit(module, ckpt_path=...)
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.arguments import checks_types
from ..errors import UsageError
from ..methods.lora import LoRA
from ..writing import write
from .handle import Handle
from .sharding import constants_on_every_process, is_sharded, whole

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments


class TrainerCallback:
    """Make a Trainer save the adapter instead of the base, and load it again when the Trainer resumes.

        trainer = transformers.Trainer(model, settings, train_dataset=data, callbacks=[TrainerCallback(handle)])
        trainer.train(resume_from_checkpoint=True)

    A checkpoint holds the adapter's tensors in training precision (`model.safetensors`), the optimizer, the scheduler
    and the random states, so a resumed run equals an uninterrupted one bit by bit. A checkpoint also holds the adapter
    in a file that other tools can read.

    After the training, save the adapter with `adapterkit.write(handle.adapter(), folder)`. `trainer.save_model(folder)`
    does not tell callbacks: it writes the model's config beside a file that has only the adapter's tensors, and
    `from_pretrained(folder)` then gives the base new random weights. To save the whole model with the adapter merged
    in, call `handle.merge_()` before `trainer.save_model(folder)`.

    Args:
        handle: the handle of an adapter injected with `trainable=True`.
        to: the format of the adapter file in each checkpoint, such as `peft`; None writes no such file.
        name: the name of that file or folder inside the checkpoint.
        options: further arguments for `adapterkit.write`. `on_loss` is "promote" by default, so that the file computes
            the same function as the adapter.

    Raises:
        Unrepresentable: the format cannot hold the adapter. The constructor writes the adapter to a temporary folder,
            so this error is raised before training and not at the first checkpoint.
    """

    # The class does not inherit from transformers.TrainerCallback, so that this module does not import transformers.

    @checks_types
    def __init__(self, handle: Handle, to: str | None = "adapterkit", name: str = "adapter", **options: object) -> None:
        self.handle, self.to, self.name, self.options = handle, to, name, {"on_loss": "promote", **options}
        if to is not None:
            with TemporaryDirectory() as folder:
                self._write(handle.adapter(), Path(folder))
        handle.checkpoint = "adapter"

    def _write(self, adapter: Adapter, folder: Path) -> None:
        if self.to is not None:
            # `write` checks the types of the options when it is called.
            cast("Callable[..., object]", write)(adapter, folder / self.name, format=self.to, **self.options)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function that does nothing, for all Trainer events except `on_save`."""
        if not name.startswith("on_"):
            raise AttributeError(name)
        return _nothing

    def on_save(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written."""
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Call adapter() in every process: if tensors are sharded, every process must take part in gathering them.
        adapter = self.handle.adapter() if self.to else None
        if not args.should_save:
            return
        # Delete the model's configs: if they are present, from_pretrained() takes the folder for a complete model.
        for config in ("config.json", "generation_config.json"):
            (folder / config).unlink(missing_ok=True)
        if adapter is not None:
            self._write(adapter, folder)


def _nothing(*_: object, **__: object) -> None:
    pass


# LoRA-FA: train only B, with a corrected gradient; A keeps its initial values.
#
# Zhang et al. 2023, https://arxiv.org/abs/2308.03303. With a frozen A, a layer keeps x A^T for the backward pass (r
# values for each token) instead of x. The gradient of B is multiplied by (A A^T)^-1 / scaling^2. This makes the change
# of the weight as close as possible to a step along the full weight's gradient. Moments, bias correction and decay
# follow PEFT's `LoraFAOptimizer`. But PEFT multiplies the gradient in 16 bits where possible; here it is multiplied in
# 32 bits.


class LoRAFA(torch.optim.Optimizer):
    """An optimizer that trains every B (and bias) of an attached LoRA, and keeps every A as it is.

        handle = ak.torch.inject(model, adapter, trainable=True)
        optimizer = ak.torch.LoRAFA(handle, lr=1e-4)

    The optimizer sets `requires_grad` of every A to False. Its state is saved and loaded like that of any optimizer.

    Args:
        handle: the handle of a LoRA injected with `trainable=True`. The LoRA's biases are trained as in AdamW.
        lr: the learning rate.
        betas: the decay rates of the two moments.
        eps: a value that is added to the square root of the second moment.
        weight_decay: the weight decay. After a step, each trained tensor is multiplied by `1 - lr * weight_decay`.

    Raises:
        UsageError: the adapter has an update that is not LoRA, no tensor is trained, or an argument is out of range.
    """

    @checks_types
    def __init__(
        self, handle: Handle, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas):
            why = "lr, eps or weight_decay is below 0, or a beta is not in [0, 1)"
            raise UsageError(why, cure="Pass lr=, eps= and weight_decay= of at least 0, and betas= in [0, 1)")
        updates = [update for _, update in handle._adapter if set(update.tensors) - update.frozen]
        other = next((update.method for update in updates if not isinstance(update, LoRA)), None)
        if other is not None or not any(True for _ in handle.parameters()):
            why = f"{other} is not LoRA" if other is not None else "the adapter has no trained tensors"
            raise UsageError(why, where=handle.name, cure="Inject a lora adapter with trainable=True")
        self._handle: weakref.ref[Handle] | None = weakref.ref(handle)
        self._pairs = _pairs_of(handle)
        trained: list[Tensor] = []
        for update in updates:
            assert isinstance(update, LoRA)
            trained += [update.B, *([] if update.bias is None else [update.bias])]
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(dict.fromkeys(trained)), settings)

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles only its own attributes of an optimizer.
        return {**super().__getstate__(), "_pairs": self._pairs, "_handle": None}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one optimizer step. Return the result of `closure`, or None if there is no closure.

        Raises:
            UsageError: another tool replaced the adapter's tensors after this optimizer was copied or unpickled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        current = {id(parameter): parameter for group in self.param_groups for parameter in group["params"]}
        new = any(parameter.ndim > 1 and parameter not in self._pairs for parameter in current.values())
        if new and any(id(B) not in current for B in self._pairs):
            # Under FSDP2, accelerate's `prepare` replaces the parameters in the optimizer by sharded ones. If there is
            # no new matrix, the user removed tensors from the optimizer, and the others are still in `_pairs`.
            handle = None if self._handle is None else self._handle()
            if handle is None:
                why = "the optimizer no longer holds the tensors B that it was made for"
                raise UsageError(why, where="LoRAFA", cure="Make a new LoRAFA from the handle")
            self._pairs = _pairs_of(handle)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad = parameter.grad
        assert grad is not None
        if parameter in self._pairs:
            grad = self._projected(grad, *self._pairs[parameter])
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].mul_(first).add_(grad, alpha=1 - first)
        state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
        size = group["lr"] * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    @staticmethod
    def _projected(grad: Tensor, A: Tensor, scaling: float) -> Tensor:
        A = whole(A)  # In each process, if A is sharded.
        # Stacked experts have one A and one B each: `[e, r, in]` and `[e, out, r]`. A convolution has A `[r, in, *k]`.
        flat = (A if grad.ndim == 3 else A.flatten(1)).float()
        square = flat @ flat.mT
        inverse: Tensor = torch.linalg.pinv(square + 1e-8 * torch.eye(square.shape[-1], device=square.device))
        with constants_on_every_process() if is_sharded(grad) else nullcontext():
            out: Tensor = ((grad.float() @ inverse) / scaling**2).to(grad.dtype)
        return out


def _pairs_of(handle: Handle) -> dict[Tensor, tuple[Tensor, float]]:
    """Return a map from each B of a LoRA to its A and scaling, and freeze each A.

    Tensors as keys are compared by identity, as in an optimizer's state.
    """
    pairs: dict[Tensor, tuple[Tensor, float]] = {}
    for _, update in handle._adapter:
        if isinstance(update, LoRA):
            update.A.requires_grad_(False)
            pairs[update.B] = update.A, update.scaling
    return pairs
