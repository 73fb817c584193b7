"""LoRA-FA: A stays as it was drawn, and B learns from its gradient projected on A.  Zhang et al. 2023

https://arxiv.org/abs/2308.03303: with A frozen a layer keeps x A^T for the backward pass, r numbers a token, and not x.
The gradient of B becomes (A A^T)^-1 / scaling^2 times what it is, the step in B that is nearest to the gradient of the
whole weight. Moments, bias correction and decay are those of PEFT's `LoraFAOptimizer`, which computes that product in
16 bits where it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..methods.lora import LoRA
from .handle import Handle


class LoRAFA(torch.optim.Optimizer):
    """An optimizer of an attached LoRA that trains B alone.

        handle = ak.torch.inject(model, adapter, trainable=True)
        optimizer = ak.torch.LoRAFA(handle, lr=1e-4)

    It sets `requires_grad` of every A to False. Its state is saved and loaded as that of any optimizer.

    Args:
        handle: that of a LoRA injected with `trainable=True`. Biases are trained as by AdamW.
        lr: the learning rate.
        betas: shares of the earlier moments.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate, after the step.

    Raises:
        UsageError: the adapter has an update of another method, or is not trainable.
    """

    def __init__(
        self, handle: Handle, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise UsageError("lr, eps or weight_decay is below 0, or a beta is not in [0, 1)", cure="Correct it")
        updates = [update for _, update in handle._adapter if set(update.tensors) - update.frozen]
        other = next((update.method for update in updates if not isinstance(update, LoRA)), None)
        if other is not None or not any(True for _ in handle.parameters()):
            why = f"{other} is no LoRA" if other is not None else "the adapter has no trained tensors"
            raise UsageError(why, where=handle.name, cure="Create a lora, and inject it with trainable=True")
        # B -> its A and scaling: looked up by identity, as an optimizer's state is.
        self._pairs: dict[Tensor, tuple[Tensor, float]] = {}
        trained: list[Tensor] = []
        for update in updates:
            assert isinstance(update, LoRA)
            update.A.requires_grad_(False)
            self._pairs[update.B] = update.A, update.scaling
            trained += [update.B, *([] if update.bias is None else [update.bias])]
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(dict.fromkeys(trained)), settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
        flat = A.flatten(1).float()
        square = flat @ flat.mT
        inverse: Tensor = torch.linalg.pinv(square + 1e-8 * torch.eye(len(square), device=square.device))
        out: Tensor = ((grad.float() @ inverse) / scaling**2).to(grad.dtype)
        return out
