"""A callback for transformers' `Trainer` (and TRL's trainers): adapter-only checkpoints and exact resuming.

Accelerate and Lightning need no callback: they save the state dict that `handle.checkpoint` chooses.

    handle.checkpoint = "adapter"
    accelerator.save_state(folder)             # and accelerator.load_state(folder)
    lightning.Trainer(...).fit(module)         # and fit(module, ckpt_path=...)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..writing import write
from .handle import Handle

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments


class TrainerCallback:
    """Make a Trainer save the adapter instead of the base, and load it again when the Trainer resumes.

        trainer = transformers.Trainer(model, settings, train_dataset=data, callbacks=[TrainerCallback(handle)])
        trainer.train(resume_from_checkpoint=True)

    A checkpoint holds the adapter's tensors in training precision (`model.safetensors`), the optimizer, the scheduler
    and the random states, so a resumed run equals an uninterrupted one bit by bit. A checkpoint also holds the adapter
    as a file that other tools read.

    Args:
        handle: the handle of an adapter injected with `trainable=True`.
        to: the format of the adapter file in each checkpoint, such as `peft`; None writes no such file.
        name: the name of that file or folder inside the checkpoint.
        options: further arguments for `adapterkit.write`; if `on_loss` is not given, it is "promote", which keeps the
            computed function.

    Raises:
        Unrepresentable: the format cannot hold the adapter. The constructor writes the adapter to a temporary folder,
            so that this error comes before training and not at the first checkpoint.
    """

    # Not a subclass of transformers' class, so that this module does not import transformers.

    def __init__(self, handle: Handle, to: str | None = "adapterkit", name: str = "adapter", **options: Any) -> None:
        self.handle, self.to, self.name, self.options = handle, to, name, {"on_loss": "promote", **options}
        if to is not None:
            with TemporaryDirectory() as folder:
                self._write(handle.adapter(), Path(folder))
        handle.checkpoint = "adapter"

    def _write(self, adapter: Adapter, folder: Path) -> None:
        if self.to is not None:
            write(adapter, folder / self.name, format=self.to, **self.options)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function without effect for all other events of the Trainer."""
        if not name.startswith("on_"):
            raise AttributeError(name)
        return _nothing

    def on_save(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written."""
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Call this in every process, because each process contributes its part.
        adapter = self.handle.adapter() if self.to else None
        if not args.should_save:
            return
        # With a config next to the weights, from_pretrained() would take the folder for a complete model.
        for config in ("config.json", "generation_config.json"):
            (folder / config).unlink(missing_ok=True)
        if adapter is not None:
            self._write(adapter, folder)


def _nothing(*_: object, **__: object) -> None:
    pass
