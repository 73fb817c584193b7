"""Run texts through a base model to compute the data that some combiners need: losses, gradients, or targets' inputs.

A combiner's attribute `learns` is the name of the `TextData` method that computes its data.
"""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, cast

from ..core.adapter import Adapter
from ..core.arguments import checks_types
from ..errors import Unsupported, UsageError
from ..io.checkpoint import opened
from ..io.stages import detail, stage
from ..ops.alignment import places
from ..ops.combiners import COMBINERS
from ..ops.parameters import resolved

if TYPE_CHECKING:
    from torch import Tensor

    from ..io.computed import Array
    from ..ops.alignment import Source
    from ..ops.combiners.nsc import Spaces
    from ..ops.lowering import Base
    from ..quant._calibration import Calibration
    from ..torch.handle import Handle

    Text = str | PathLike[str]
    Feed = Mapping[str, Tensor]
    Gradients = Mapping[str, Tensor]
    Loss = Callable[[Tensor, Tensor], Tensor]

TEXTS, LENGTH = 16, 64
"""The default number of texts for each adapter, and the default limit for the number of tokens per text."""


class LiveBase:
    """A base model in memory, which runs on texts with or without attached adapters.

    Args:
        base: a folder with a transformers model and its tokenizer.
        device: the device to run on: `auto`, `cpu` or `cuda:N`.

    Raises:
        StorageError, Malformed: a file cannot be read.
    """

    def __init__(self, base: Base, device: str) -> None:
        from ..gating.models import device_of, load
        from ..torch.pretrained import check_transformers

        self.checkpoint, self.device = opened(base), device_of(device)
        check_transformers(self.checkpoint.root, "running texts")
        self.model: Any = load(self.checkpoint, "float32", self.device).requires_grad_(False)

    def feeds(self, data: Text, count: int, length: int, seed: int) -> tuple[Feed, ...]:
        """Return the model's inputs for the texts of a file, one `Feed` per text.

        Raises:
            UsageError: the file contains no texts, or only texts of one token; or `data` is a file, but the base has no
                tokenizer.
            Unsupported: the model does not read text; or `data` is `builtin`, but the base has no tokenizer.
        """
        from ..gating.models import inputs_for, texts_of

        inputs_here = inputs_for(
            self.model, self.checkpoint.root, texts_of(data), count=count, length=length, seed=seed
        )
        if not inputs_here.tokens:
            raise Unsupported("the model does not read text", path=self.checkpoint.root, cure=_FUNCTION)
        if inputs_here.drawn:
            why = "the base has no tokenizer, so it cannot read texts"
            raise Unsupported(why, path=self.checkpoint.root, cure="Copy the tokenizer's files into the base's folder")
        return inputs_here.feeds

    def check_predicts(self) -> None:
        """Check that the model predicts the next token of a text, because the loss is computed from these predictions.

        Raises:
            UsageError: the model does not predict the next token.
        """
        # Do not check only for an output layer: a masked language model has one, too, but it reads the whole text at
        # once, including the token that it would have to predict.
        predicts = self.model.can_generate() and self.model.get_output_embeddings() is not None
        if not predicts or self.model.config.is_encoder_decoder:
            why = "the model does not predict the next token of a text, so no loss can be computed"
            raise UsageError(why, path=self.checkpoint.root, cure=_FUNCTION)

    @contextmanager
    def attached(self, *adapters: Adapter) -> Iterator[list[Handle]]:
        """Attach adapters while the body of the `with` statement runs; yield their handles."""
        from ..torch.inject import inject

        handles: list[Handle] = []
        try:
            for number, adapter in enumerate(adapters):
                handles.append(inject(self.model, adapter.load(self.device), name=f"trial{number}"))
            yield handles
        finally:
            for handle in reversed(handles):
                handle.remove()

    def logits(self, feed: Feed) -> tuple[Tensor, Tensor]:
        """Return the logits `[tokens - 1, vocabulary]` at all tokens except the last, and the next tokens' ids."""
        ids = feed["input_ids"].to(self.device)
        return self.model(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:]

    def mean(self, feeds: Sequence[Feed], loss: Loss) -> float:
        """Return the mean loss per predicted token. `loss(logits, ids)` returns the sum of one text's token losses."""
        import torch

        with torch.no_grad():
            return sum(float(loss(*self.logits(feed))) for feed in feeds) / _predicted(feeds)


class TextData:
    """Use texts to compute the data that some combiners need: losses, gradients, or targets' inputs.

    Args:
        base: a folder with a transformers model and its tokenizer. The model is loaded once, in float32.
        adapters: the adapters to combine, or their paths.
        data: a file of texts (one per line, or JSON Lines with a field `text`), or `builtin` for adapterkit's own
            texts. To give each adapter its own texts, pass a list with one entry per adapter, in the same order.
        rename: rules that rename the adapters' targets, as in `combine`.
        texts: the number of texts for each adapter.
        length: the maximum number of tokens per text.
        seed: the seed of the random choice of texts from each file.
        device: the device to run on: `auto`, `cpu` or `cuda:N`.

    Raises:
        UsageError: a file contains no texts, or only texts of one token; the number of files is neither 1 nor the
            number of adapters; or `data` names a file, but the base has no tokenizer.
        Unsupported: the model does not read text; or `data` is `builtin`, but the base has no tokenizer.
        TargetNotFound, ShapeMismatch: an adapter does not fit the base.

    Example:
        >>> texts = ak.TextData("base", ["math", "code"], ["math.txt", "code.txt"])
        >>> ak.combine(["math", "code"], "regmean", base="base", data=texts.learned_by("regmean"))
    """

    @checks_types
    def __init__(
        self,
        base: Base,
        adapters: Sequence[Source],
        data: Text | Sequence[Text] = "builtin",
        *,
        rename: str | Sequence[str] = (),
        texts: int = TEXTS,
        length: int = LENGTH,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        files = [data] if isinstance(data, (str, PathLike)) else list(data)
        if len(files) not in (1, len(adapters)):
            why = f"{len(files)} files of texts for {len(adapters)} adapters"
            cure = "Pass one file for all adapters, or one for each adapter, in the same order: --data FILE (data=)"
            raise UsageError(why, where="data", cure=cure)
        self.base = LiveBase(base, device)
        self.adapters, _ = places(adapters, base=self.base.checkpoint, lower="combined", disjoint=True, rename=rename)
        read = [self.base.feeds(file, texts, length, seed) for file in files]
        self.tasks = read * len(adapters) if len(read) == 1 else read
        self.distinct = [feed for feeds in read for feed in feeds]
        self._recorded: dict[int, Calibration] = {}
        self._alone: list[float] | None = None
        self._folder = Path(mkdtemp(prefix="adapterkit-inputs-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @checks_types
    def learned_by(self, method: str) -> Callable[..., object]:
        """Return the function to pass to `combine` as `data=` for this combining method.

        Raises:
            UsageError: the method does not use data, or cannot learn from texts; or the method needs next-token
                predictions, but the model makes none.
        """
        cls = COMBINERS[resolved(method, None, len(self.adapters))[0]]
        if cls.data is None:
            raise UsageError(f"{method} does not use data", where="data", cure="Omit --data (data=)")
        if cls.learns is None:
            why = f"{method} cannot learn from texts alone"
            raise UsageError(why, where="data", cure=f"Call combine in Python; data= must be {cls.data}")
        if cls.learns not in _OF_ANY_MODEL:
            self.base.check_predicts()
        return cast("Callable[..., object]", getattr(self, cls.learns))

    @checks_types
    def loss(self, adapter: Adapter) -> float:
        """Return the loss of the base with the adapter attached: the mean over all predicted tokens, in nats."""
        with self.base.attached(adapter):
            loss = self.base.mean(self.distinct, cross_entropy)
        detail(f"loss {loss:.6g}")
        return loss

    @checks_types
    def loss_and_gradients(self, adapter: Adapter) -> tuple[float, Gradients]:
        """Return the mean loss over all predicted tokens, and its gradient with respect to each target's weight."""
        return self._descended(adapter, cross_entropy)

    @checks_types
    def entropy_and_gradients(self, adapter: Adapter) -> tuple[float, Gradients]:
        """Return the predictions' mean entropy in nats, and its gradient with respect to each target's weight."""
        return self._descended(adapter, entropy)

    @checks_types
    def entropies_together(self, adapter: Adapter, together: Callable[..., Tensor]) -> tuple[float, Gradients]:
        """Return the loss that `together` computes from mean entropies, and its gradient for each target's weight.

        Each of the adapters that were combined stands for one task, and its texts are the texts of this task.

        Args:
            adapter: the combined adapter.
            together: a function that returns the loss. It takes two lists with one mean entropy per task, in nats. The
                entropies in the first list come from the base with the combined adapter. The entropies in the second
                list come from the base with the task's adapter only.
        """
        import torch

        if self._alone is None:
            self._alone = []
            for task_adapter, feeds in zip(self.adapters, self.tasks, strict=True):
                with self.base.attached(task_adapter):
                    self._alone.append(self.base.mean(feeds, entropy))
        with self.base.attached(adapter), self._slopes() as gradients:
            # The autograd graphs of all texts would not fit into memory together. So first compute the entropies
            # without graphs, then the derivative of `together` with respect to each entropy, and then the gradients
            # text by text.
            means = [
                torch.tensor(self.base.mean(feeds, entropy), dtype=torch.double, requires_grad=True)
                for feeds in self.tasks
            ]
            whole = together(means, self._alone)
            whole.backward()  # type: ignore[no-untyped-call]
            for mean, feeds in zip(means, self.tasks, strict=True):
                share = float(cast("Tensor", mean.grad)) / _predicted(feeds)
                for feed in feeds:
                    (share * entropy(*self.base.logits(feed))).backward()  # type: ignore[no-untyped-call]
            return _logged(float(whole.detach())), gradients()

    @checks_types
    def inputs_and_spaces(self, adapter: Adapter, spaces: Spaces) -> tuple[float, Gradients]:
        """Return the mean of NSC's `spaces.loss` over all tasks' texts, and its gradient for each target's weight.

        The loss is computed from the inputs that the targets get while the base runs with the adapter attached.
        """
        total = 0.0
        with self.base.attached(adapter), self._slopes() as gradients, self._inputs(spaces.paths) as seen:
            for task, feeds in enumerate(self.tasks):
                tokens = sum(feed["input_ids"].numel() for feed in feeds)
                for feed in feeds:
                    seen.clear()
                    self._run(feed)
                    inputs = {(task, path): z for path, z in seen.items() if (task, path) in spaces.reads}
                    if not inputs:
                        continue
                    # `spaces.loss` is a mean over this text's tokens and over the (task, target) pairs in `inputs`. So
                    # multiply it by the text's share of the task's tokens, and by `inputs`' share of all pairs.
                    share = feed["input_ids"].numel() / tokens * len(inputs) / len(spaces.reads)
                    loss = share * spaces.loss(inputs)
                    loss.backward()
                    total += float(loss.detach())
            return _logged(total), gradients()

    @checks_types
    def inputs(self, position: int, path: str) -> Array:
        """Run one adapter's texts through the base with this adapter, and return a target's inputs, `[tokens, in]`.

        Raises:
            Unsupported: the target is not a linear layer of the loaded model.
        """
        if position not in self._recorded:
            from ..gating.calibrating import recorded

            stage(f"reading inputs of adapter {position + 1}")
            file = self._folder / f"{position}.safetensors"
            with self.base.attached(self.adapters[position]):
                run = partial(self._each, self.tasks[position])
                self._recorded[position] = recorded(self.base.model, run, file, {"position": position})
        # If the target is only some rows, remove the suffix `[start:stop]` to get the module's path.
        inputs = self._recorded[position].inputs(path.partition("[")[0])
        if inputs is None:
            why = "the loaded model has no linear layer at this path, so the target's inputs cannot be recorded"
            raise Unsupported(why, where=path, cure=_WITHOUT)
        return inputs

    @checks_types
    def inputs_so_far(self, position: int, path: str, merged: Adapter | None) -> Tensor:
        """Run one adapter's texts through a partly merged model, and return the inputs `[tokens, in]` of a target.

        In this run, each target in `merged` has its merged change. All other targets have this adapter's change.

        Raises:
            Unsupported: the model does not use the target for these texts; or the target is an expert that the loaded
                model stacks with other experts.
        """
        import torch

        done = {} if merged is None else dict(merged.updates)
        adapter = self.adapters[position]
        rest = adapter.replace(
            updates={target: group for target, group in adapter.updates.items() if target not in done}
        )
        adapters = [rest] if merged is None else [merged.replace(updates=done), rest]
        rows: list[Tensor] = []
        with self.base.attached(*adapters), self._inputs([path], last=True) as seen, torch.no_grad():
            for feed in self.tasks[position]:
                seen.clear()
                with suppress(_Reached):  # Stop the run at the target: later layers do not affect its inputs.
                    self._run(feed)
                if path not in seen:
                    raise Unsupported("the model does not use this target for the texts", where=path, cure=_FUNCTION)
                rows.append(seen[path].reshape(-1, seen[path].shape[-1]))
        return torch.cat(rows)

    def _descended(self, adapter: Adapter, loss: Loss) -> tuple[float, Gradients]:
        count, total = _predicted(self.distinct), 0.0
        with self.base.attached(adapter), self._slopes() as gradients:
            for feed in self.distinct:
                one = loss(*self.base.logits(feed)) / count
                one.backward()  # type: ignore[no-untyped-call]
                total += float(one.detach())
            return _logged(total), gradients()

    def _each(self, feeds: Sequence[Feed]) -> None:
        import torch

        with torch.no_grad():
            for feed in feeds:
                self._run(feed)

    def _run(self, feed: Feed) -> None:
        self.base.model(**{name: value.to(self.base.device) for name, value in feed.items()})

    @contextmanager
    def _slopes(self) -> Iterator[Callable[[], Gradients]]:
        """Turn on gradients for the weights of all targets, and yield a function that returns {target: gradient}.

        Raises:
            Unsupported: the loaded model stacks experts, but the base's files store each expert by itself.
        """
        from ..naming.binding import view
        from ..torch.forward_hook import hooks_of
        from ..torch.weights import tensor_at

        weights = {
            part.target: tensor_at(hook.module, part.weight)
            for hook in hooks_of(self.base.model)
            for part in hook.parts
            if part.weight is not None
        }
        known = {target.path for adapter in self.adapters for target in adapter.updates}
        other = next((target for target in weights if target.path not in known), None)
        if other is not None:
            raise Unsupported(_STACKED, where=str(other), cure=_WITHOUT)
        for W in weights.values():
            W.requires_grad_(True)
        try:
            yield lambda: {str(t): view(W.grad, t) for t, W in weights.items() if W.grad is not None}
        finally:
            for W in weights.values():
                W.requires_grad_(False)
                W.grad = None

    @contextmanager
    def _inputs(self, paths: Sequence[str], last: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yield a dict that each run of the model fills with the inputs of these targets, keyed by target.

        If `last` is set, each run raises `_Reached` as soon as it has put the first input into the dict.

        Raises:
            Unsupported: the loaded model stacks experts, but the base's files store each expert by itself.
        """
        from ..torch.forward_hook import hooks_of

        seen: dict[str, Tensor] = {}

        def collect(names: Sequence[str], _: object, args: tuple[Tensor, ...]) -> None:
            seen.update(dict.fromkeys(names, args[0]))
            if last:
                raise _Reached

        handles, missing = [], set(paths)
        for hook in hooks_of(self.base.model):
            names = [name for name in {str(part.target) for part in hook.parts} if name in missing]
            if names:
                missing -= set(names)
                handles.append(hook.module.register_forward_pre_hook(partial(collect, names)))
        try:
            if missing:
                raise Unsupported(_STACKED, where=min(missing), cure=_WITHOUT)
            yield seen
        finally:
            for handle in handles:
                handle.remove()


class _Reached(Exception):
    """Raised to end a run of the model as soon as the requested input is known."""


_OF_ANY_MODEL = frozenset({"inputs", "inputs_so_far", "inputs_and_spaces"})
"""Methods of `TextData` that also work with models that read text but do not predict the next token."""

_STACKED = (
    "the loaded model stacks the experts, but the base's files store each expert by itself, so no data can be computed "
    "for a single expert"
)

_WITHOUT = "Choose lorahub, or a method that needs no --data; 'adapterkit list combine' shows all methods"

_FUNCTION = "Call combine or search in Python, with your own function as data="


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the cross-entropy of the next-token predictions, summed over a text."""
    import torch

    return torch.nn.functional.cross_entropy(logits, ids, reduction="sum")


def entropy(logits: Tensor, _: Tensor) -> Tensor:
    """Return the entropy of the predictions, summed over a text."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum()


def _predicted(feeds: Sequence[Feed]) -> int:
    """Return the number of predicted tokens: all tokens except the first of each text."""
    return sum(feed["input_ids"].shape[1] - 1 for feed in feeds)


def _logged(loss: float) -> float:
    detail(f"loss {loss:.6g}" if math.isfinite(loss) else f"loss {loss}")
    return loss
