"""A callback for transformers' `Trainer` (and those of TRL): checkpoints of the adapter alone, and exact resuming.

Accelerate and Lightning need no class: they save what `handle.checkpoint` chooses.

    handle.checkpoint = "adapter"
    accelerator.save_state(folder)             # and accelerator.load_state(folder)
    lightning.Trainer(...).fit(module)         # and fit(module, ckpt_path=...)
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..core.adapter import Adapter
from ..writing import write
from .handle import Handle


class TrainerCallback:
    """Make a Trainer save the adapter where it would save the base, and load it again when it resumes.

        trainer = transformers.Trainer(model, settings, train_dataset=data, callbacks=[TrainerCallback(handle)])
        trainer.train(resume_from_checkpoint=True)

    A checkpoint holds the adapter's tensors in training precision (`model.safetensors`), the optimizer, the scheduler
    and the random states: a resumed run equals an unbroken one bit by bit. Beside them lies the adapter as a file that
    other tools read.

    Args:
        handle: that of an adapter injected with `trainable=True`.
        to: the format of the adapter in each checkpoint, such as `peft`; None writes none.
        name: that of the file or folder inside the checkpoint.
        options: further arguments for `adapterkit.write`; `on_loss` is "promote" unless given, which changes no
            function.

    Raises:
        Unrepresentable: the format cannot hold the adapter. It is written once to a folder that is thrown away, so that
            this shows before the training and not at its first checkpoint.
    """

    # It is no subclass of transformers' class, so that this module does not import transformers.

    def __init__(self, handle: Handle, to: str | None = "adapterkit", name: str = "adapter", **options: Any) -> None:
        self.handle, self.to, self.name, self.options = handle, to, name, {"on_loss": "promote", **options}
        if to is not None:
            with TemporaryDirectory() as folder:
                self._write(handle.adapter(), Path(folder))
        handle.checkpoint = "adapter"

    def _write(self, adapter: Adapter, folder: Path) -> None:
        if self.to is not None:
            write(adapter, folder / self.name, format=self.to, **self.options)

    def __getattr__(self, name: str) -> Any:
        """Do nothing at all other events of the Trainer."""
        if not name.startswith("on_"):
            raise AttributeError(name)
        return _nothing

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        adapter = self.handle.adapter() if self.to else None  # Every process gathers its part of it.
        if not args.should_save:
            return
        # With a config beside the weights, from_pretrained() would take the folder for a whole model.
        for config in ("config.json", "generation_config.json"):
            (folder / config).unlink(missing_ok=True)
        if adapter is not None:
            self._write(adapter, folder)


def _nothing(*_: Any, **__: Any) -> None:
    pass
