"""The handle of an attached adapter, with methods to switch, scale, train, copy, merge and remove the adapter."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Target
from ..core.arguments import check_factor, checks_types
from ..core.updates import Update
from ..errors import NotMergeable, ShapeMismatch, Unsupported, UsageError, nearest
from .checkpoints import CHOICES, HANDLES, leave_state, watch_state
from .folding import (
    KEEP_INJECTED,
    KEEPS,
    Folded,
    Merged,
    Unmerging,
    changed_by,
    checked_folds,
    fold,
    is_whole,
    restore,
    slim,
    subtracted,
)
from .forward_hook import ForwardHook, hook_again, hooks_of, names_of
from .leaves import Leaf, LiveUpdates, is_leaf_name
from .parts import Part
from .routing import check_unrouted
from .scopes import Switch, switched
from .sharding import is_partitioned, shape_of, whole
from .structure import unwrapped
from .transaction import all_or_nothing
from .watch import Watch
from .weights import tensor_at


class Handle:
    """An adapter attached to a model. After `remove` or `merge_`, all methods except `unmerge_` raise `UsageError`.

    Attributes:
        frozen: the names of the base's parameters that `inject` froze for this handle. `remove` and `merge_` unfreeze
            them, unless another trained adapter remains attached.
    """

    def __init__(
        self, adapter: Adapter, bound: Mapping[Target, tuple[LiveUpdates, ...]], switch: Switch,
        hooks: list[ForwardHook], model: nn.Module, leaves: list[Leaf],
    ) -> None:  # fmt: skip
        self._source, self._bound, self._switch = adapter, dict(bound), switch
        self._hooks, self._model, self._leaves = hooks, model, leaves
        self._state, self._merged = "attached", list[Merged]()
        self._parts: list[tuple[ForwardHook, list[Part]]] = []
        self._folded: list[tuple[ForwardHook, list[Part]]] = []
        self.frozen: tuple[str, ...] = ()
        self._checkpoint = CHOICES[0]

    @property
    def _adapter(self) -> Adapter:
        """The adapter with the tensors that the model holds now."""
        now = {target: tuple(u for bound in each for u in bound.updates) for target, each in self._bound.items()}
        return self._source.replace(updates=now)

    def _enter(self, frozen: bool) -> None:
        """Add this handle to the list in the model, and watch the adapter's modules. If `frozen`, freeze the base."""
        self._switch.attached = True
        self._model.__dict__.setdefault(HANDLES, []).append(self)
        watch_state(self._model)
        self._watch = Watch(self._model, self.name, (hook.module for hook in self._hooks), self._leaves)
        if frozen:
            trainable = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad and not is_leaf_name(n)]
            for _, parameter in trainable:
                parameter.requires_grad_(False)
            self.frozen = tuple(name for name, _ in trainable)

    def _leave(self) -> None:
        """Remove this handle from the model. If another trained adapter remains attached, the base stays frozen."""
        self._watch.remove()
        self._switch.attached = False
        for leaf in self._leaves:
            leaf.release()
        handles_here = self._model.__dict__[HANDLES]
        handles_here.remove(self)
        heir = next((other for other in handles_here if any(True for _ in other.named_parameters())), None)
        if heir is not None:
            heir.frozen = (*heir.frozen, *self.frozen)
        else:
            parameters = dict(self._model.named_parameters())
            for name in self.frozen:
                if name in parameters:  # The name is gone if its module was replaced.
                    parameters[name].requires_grad_(True)
        if not handles_here:
            del self._model.__dict__[HANDLES]
            leave_state(self._model)

    @property
    def name(self) -> str:
        return self._switch.name

    @property
    def weight(self) -> float:
        """The factor by which the adapter's change is multiplied; can be set."""
        self._check()
        return self._switch.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._check()
        check_factor(value, "weight")
        if value != 1 and any(update.kind == "context" for _, update in self._adapter):
            why = "an adapter that adds context can only have the weight 1"
            raise UsageError(why, where=self.name, cure="To switch the adapter off, call handle.set_active(False)")
        for switch in (self._switch, *self._copies()):
            switch.weight = value

    def _copies(self) -> dict[Switch, list[ForwardHook]]:
        """Return the hooks of copied layers, keyed by switch. Copying a layer also copies the adapter's switch.

        If a layer is copied inside the model (depth upscaling, clones), `weight`, `set_active`, `disable` and `remove`
        also apply to the adapter at the copied layer. A copy outside of the model is independent of the handle.
        """
        hooks_by_switch: dict[Switch, list[ForwardHook]] = {}
        for hook in hooks_of(self._model):
            for switch in hook.switches:
                if switch.name == self.name and switch is not self._switch:
                    hooks_by_switch.setdefault(switch, []).append(hook)
        return hooks_by_switch

    def _check_uncopied(self) -> None:
        """Check that the model contains no copy of a layer that the adapter changes.

        Raises:
            UsageError: the model contains such a copy. The adapter has no target for the copy.
        """
        hook = next((hook for hooks in self._copies().values() for hook in hooks), None)
        if hook is not None:
            where = next((name for name, module in self._model.named_modules() if module is hook.module), None)
            cure = "Copy layers of the model before inject() or after remove()"
            raise UsageError(f"a copied layer has a part of the adapter {self.name!r}", where=where, cure=cure)

    def _check_unmoved(self) -> None:
        """Check that each layer is still at the path of its target, because files of the adapter contain these paths.

        If a block is inserted into the list of blocks or removed from it, all later blocks get other paths. Wrappers
        are allowed: they add names to a path, but the other names keep their order.

        Raises:
            UsageError: a layer is at another path now, or is no longer in the model.
        """
        paths: dict[int, list[str]] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        for hook in self._hooks:
            now = paths.get(id(hook.module), [])
            homes = [(part.target, part.home) for part in hook.parts if part.switch is self._switch]
            homes += [(part.target, part.target.path) for part in hook.contexts if part.switch is self._switch]
            for target, home in homes:
                if not any(_within(home, one) or _within(one, home) for one in now):
                    why = f"the layer {target} is {f'at {now[0]}' if now else 'not in the model'} now"
                    cure = "Put the layer back at its path, or inject the adapter after all layers are in place"
                    raise UsageError(why, where=self.name, cure=cure)

    @property
    def checkpoint(self) -> str:
        """The content of `model.state_dict()`: `base` (default), `adapter` (only this adapter) or `all`; can be set.

        Trainer, Accelerate, Lightning and `torch.save` save this state dict. With `adapter`, they write checkpoints of
        the adapter alone. `model.load_state_dict()` loads such checkpoints, even with `strict=True`, and leaves the
        base unchanged. With `base`, checkpoints do not contain the adapter.
        """
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, value: str) -> None:
        self._check()
        if value not in CHOICES:
            cure = f"Choose among {', '.join(CHOICES)}"
            raise UsageError(f"unknown choice {value!r}", where="checkpoint", cure=cure)
        self._checkpoint = value

    @checks_types
    def set_active(self, active: bool) -> None:
        """Switch the adapter on or off in all threads. `disable` switches it off in the current thread only."""
        self._check()
        for switch in (self._switch, *self._copies()):
            switch.active = active

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Switch the adapter off within the `with` block, only for this thread or asyncio task."""
        self._check()
        with ExitStack() as stack:
            for switch in (self._switch, *self._copies()):
                stack.enter_context(switched(switch, False))
            yield

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, tensor) for each trained tensor. Without `trainable=True` in `inject`, no tensor is trained.

        A name is `target.method.field`. If the target has several updates, the name is `target.index.method.field`,
        with the update's index.
        """
        named = ((name, leaf.tensor) for name, leaf in self._named_leaves())
        return ((name, tensor) for name, tensor in named if isinstance(tensor, nn.Parameter))

    def _named_leaves(self) -> Iterator[tuple[str, Leaf]]:
        """Yield (name, leaf) for each tensor that the adapter registered in the model; yield a shared tensor once."""
        self._check()
        seen: set[int] = set()
        for target, each in self._bound.items():
            updates = tuple(update for bound in each for update in bound.attached)
            leaves = [fields for bound in each for fields in bound.leaves]
            for position, fields in enumerate(leaves):
                for field, leaf in fields.items():
                    if id(leaf) not in seen:
                        seen.add(id(leaf))
                        yield _name(self._plain(target), updates, position, field), leaf
        yield from self._copied_leaves(seen)

    def _copied_leaves(self, seen: set[int]) -> Iterator[tuple[str, Leaf]]:
        """Yield (name, leaf) for the adapter's tensors in layers that were copied inside the model.

        Each name contains the path of the copy, not of the original layer.
        """
        copies = self._copies()
        paths = {id(module): name for name, module in self._model.named_modules()} if copies else {}
        for switch, hooks in copies.items():
            for hook in hooks:
                for part in (part for part in hook.parts if part.switch is switch):
                    copied = replace(part.target, path=unwrapped(self._model, paths[id(hook.module)]))
                    for position, fields in enumerate(part.bound.leaves):
                        for field, leaf in fields.items():
                            if id(leaf) not in seen:
                                seen.add(id(leaf))
                                yield _name(copied, part.bound.attached, position, field), leaf

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained tensors, keyed by the names of `named_parameters()`, for a training checkpoint.

        As in `nn.Module.state_dict`, the tensors are detached, but share memory with the model. Under FSDP2 they are
        DTensors: save them with `torch.distributed.checkpoint`. Under DeepSpeed's ZeRO stage 3, this method gathers
        them: call it in every process. To get a file that other tools can read, write `handle.adapter()` instead.
        """
        named = list(self.named_parameters())
        return {name: (whole(p) if is_partitioned(p) else p).detach() for name, p in named}

    @checks_types
    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a result of `state_dict()` into the trained tensors.

        The tensors change in place, so optimizers still hold the right tensors. If an error is raised, nothing changes.

        Raises:
            UsageError: `state` lacks the name of a trained tensor, or contains an unknown name.
            ShapeMismatch: a tensor in `state` does not have the shape of the trained tensor.
        """
        leaves = {name: leaf for name, leaf in self._named_leaves() if isinstance(leaf.tensor, nn.Parameter)}
        tensors = {name: leaf.tensor for name, leaf in leaves.items()}
        for names, what in ((tensors.keys() - state.keys(), "missing"), (state.keys() - tensors.keys(), "unknown")):
            if names:
                first = min(names)
                cure = (
                    nearest(first, {*tensors, *state} - names) or "Pass a state from state_dict() of the same adapter"
                )
                raise UsageError(f"{len(names)} tensors are {what} in the state", where=first, cure=cure)
        for name, parameter in tensors.items():
            if tuple(state[name].shape) != shape_of(parameter):
                why = f"the state has shape {list(state[name].shape)}, but the adapter's is {list(shape_of(parameter))}"
                raise ShapeMismatch(why, where=name, cure="Pass a state from state_dict() of the same adapter")
        for name, leaf in leaves.items():
            leaf.put(state[name])

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable tensors; yield a shared tensor once."""
        return (parameter for _, parameter in self.named_parameters())

    @checks_types
    def parameter_groups(
        self, lr: float, *, ratio: float = 16.0, weight_decay: float = 0.0, embedding_lr: float = 1e-6
    ) -> list[dict[str, object]]:
        """Return the trained tensors as parameter groups for an optimizer, as in LoRA+.

        See https://arxiv.org/abs/2402.12354. At embeddings, A and B have the learning rate `embedding_lr`. At all other
        layers, B has `lr * ratio`. One-dimensional tensors have `lr * ratio` too. All other tensors, such as A, have
        `lr`. Biases have no weight decay.

        Args:
            lr: the learning rate of A.
            ratio: the learning rate of B, divided by the learning rate of A.
            weight_decay: the weight decay of all tensors except biases.
            embedding_lr: the learning rate of factors at embeddings.

        Raises:
            UsageError: no trained tensor is a factor B.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {
            (lr, weight_decay): [], (embedding_lr, weight_decay): [], (lr * ratio, weight_decay): [],
            (lr * ratio, 0.0): [],
        }  # fmt: skip
        named = list(self.named_parameters())
        if not any(name.endswith(".B") for name, _ in named):
            why = "LoRA+ needs a trained factor B, and there is none"
            raise UsageError(why, where=self.name, cure="Pass handle.parameters() to the optimizer")
        homes = {id(leaf.tensor): leaf.module for leaf in self._leaves}
        for name, parameter in named:
            field = name.rpartition(".")[2]
            fast = field == "B" or parameter.ndim == 1
            if field in ("A", "B") and isinstance(homes[id(parameter)], nn.Embedding):
                groups[embedding_lr, weight_decay].append(parameter)
            else:
                groups[lr * ratio if fast else lr, 0.0 if field == "bias" else weight_decay].append(parameter)
        groups_made = [
            {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
        ]
        return [group for group in groups_made if group["params"]]

    def adapter(self) -> Adapter:
        """Return an adapter with detached copies of the current tensors. Its names and layouts are those of the model.

        The target names do not contain the names of wrappers (`torch.compile`, DDP, checkpoint wrappers, PEFT).

        Under FSDP2 and tensor parallelism, this method gathers sharded tensors: call it in every process.

        Raises:
            UsageError: a layer that the adapter changes was copied, moved to another path, or removed from the model.
            Unsupported: a tensor of the adapter is on the meta device, so its values are lost.
        """
        self._check()
        self._check_uncopied()
        self._check_unmoved()
        lost = next((name for name, leaf in self._named_leaves() if leaf.tensor.is_meta), None)
        if lost is not None:
            cure = "Call handle.adapter() before the model goes to meta"
            raise Unsupported(
                "this tensor of the adapter is on the meta device and has no values", where=lost, cure=cure
            )
        now = self._adapter.map(_copy)
        return now.replace(updates={self._plain(target): updates for target, updates in now.updates.items()})

    def _plain(self, target: Target) -> Target:
        """Return the target with the names of wrappers removed from its path."""
        return replace(target, path=unwrapped(self._model, target.path))

    def remove(self) -> None:
        """Remove the adapter. Afterwards, the model's modules are the same as before `inject`.

        Raises:
            UsageError: an active `with route(...)` block in this thread or task names the adapter.
        """
        self._check()
        check_unrouted(self._switch)
        with all_or_nothing(self._model, self._objects()):
            self._detach()

    def _objects(self) -> list[object]:
        """Return the objects, besides the model, that change when the adapter is attached or removed."""
        return [self, self._switch, *self._leaves]

    def _detach(self) -> None:
        for switch, hooks in self._copies().items():
            for hook in hooks:
                bound = [part.bound for part in hook.parts if part.switch is switch]
                bound += [part.bound for part in hook.contexts if part.switch is switch]
                hook.detach(switch)
                for leaf in dict.fromkeys(
                    leaf for each in bound for tensors_by_name in each.leaves for leaf in tensors_by_name.values()
                ):
                    leaf.release()
        for hook in self._hooks:
            hook.detach(self._switch)
        self._leave()
        self._state = "removed"

    @checks_types
    @torch.no_grad()
    def merge_(self, keep: bool | str = False) -> None:
        """Merge the adapter into the base in place, and detach it.

        The new weights are computed in float64 and rounded once. If the merge fails halfway, all old weights are
        restored. To make this possible, the merge keeps a copy of each old weight until all weights are merged. With
        `keep="recompute"`, it keeps only the data for `unmerge_`, which usually takes less memory.

        Under FSDP2 and tensor parallelism, this method gathers one weight at a time: call it in every process.

        Args:
            keep: the data to keep for `unmerge_`. False keeps nothing. True or "copy" keeps a copy of the old weights.
                "recompute" keeps the adapter, and `unmerge_` subtracts it from the merged weights. "recompute" also
                keeps the elements of the old weights that the subtraction would not restore exactly. For "recompute",
                all updates must be additive (LoRA and similar methods), and the adapter's tensors must not change
                before `unmerge_`.

        Raises:
            NotMergeable: a method does not change weights, an update needs a bias that the base does not have, a weight
                shares its memory with another, a weight cannot be changed in place (such as a quantized or offloaded
                weight), or a merged weight overflows the base's dtype.
            UsageError: `keep` is unknown, "recompute" is given for updates that are not additive, a layer that the
                adapter changes was copied, or an active `with route(...)` block in this thread or task names the
                adapter.
        """
        if not isinstance(keep, bool) and keep not in KEEPS:
            raise UsageError(f"unknown choice {keep!r}", where="keep", cure=f"Choose among {', '.join(KEEPS)}")
        self._check()
        check_unrouted(self._switch)
        self._check_uncopied()
        self._watch.check()
        folded = foldable([self])
        again = keep == "recompute"
        for part in (part for _, parts in folded for part in parts) if again else ():
            if any(update.kind != "additive" for update in part.updates):
                why = "the update is not additive, so unmerge_() could not subtract it"
                raise UsageError(why, where=str(part.target), cure='Pass keep="copy"')
        kept: list[Merged] = []
        parts_by_hook = [(hook, [p for p in hook.parts if p.switch is self._switch]) for hook in self._hooks]

        def undo() -> None:
            for each in kept:
                each.forget()
                if each.before is not None:
                    each.parameter.copy_(each.before)
            restore([(each, value) for each, value in subtracted(folded, kept) if value is not None])

        with all_or_nothing(self._model, self._objects(), undo):
            for hook, parts in folded:
                mine = [tensor_at(hook.module, path) for path in changed_by(parts)]
                kept += [Merged(parameter, parameter.detach().clone()) for parameter in mine]
                fold(hook, parts)
                for each in kept[-len(mine) :] if mine else []:
                    if each.overflowed:
                        dtype = str(each.parameter.dtype).removeprefix("torch.")
                        why = f"the merge yields a NaN or an infinity in {dtype}"
                        cure = "Merge with a smaller weight, or convert the model to a wider dtype first"
                        raise NotMergeable(why, where=str(parts[0].target), cure=cure)
                if again:
                    slim(hook, parts, kept[-len(mine) :] if mine else [])
            self._detach()
            self._state = "merged"
            if keep:
                self._merged, self._parts, self._folded = kept, parts_by_hook, folded
                for each in kept:
                    each.push()

    @torch.no_grad()
    def unmerge_(self) -> None:
        """Restore the exact bits that the base had before `merge_(keep=...)`, and attach the adapter again.

        If an error is raised, nothing is changed.

        Raises:
            UsageError: the adapter was not merged with `keep`, or another adapter with the same name is attached. The
                error is also raised if, after the merge, the merged weights were changed or replaced, or another tool
                replaced or restored a layer's forward. If the old weights must be recomputed, the error is also raised
                if the adapter was changed, or if the merged weights were cast.
        """
        if self._state != "merged" or not self._merged:
            why = "the adapter was not merged with keep=, so there are no weights to restore"
            raise UsageError(why, where=self.name, cure="Merge with handle.merge_(keep=True)")
        if not all(each.is_last for each in self._merged):
            why = "the merged weights were changed after the merge"
            raise UsageError(why, where=self.name, cure="Undo that change first; merges are undone in reverse order")
        if not is_whole(self._model, self._folded, self._merged):
            why = "the merged weights, or their modules, were replaced after the merge"
            raise UsageError(why, where=self.name, cure="Load the base again, and inject the adapter into it")
        if any(each.is_cast for each in self._merged):
            why = "the merged weights have another dtype now, so the bits from before the merge cannot be recomputed"
            raise UsageError(why, where=self.name, cure='Convert the model back, or merge with keep="copy"')
        if self.name in names_of(self._model):
            why = "another adapter of this name is attached"
            raise UsageError(why, where=self.name, cure="Remove that adapter first")
        hooks: list[ForwardHook] = []
        for hook, _ in self._parts:
            again = hook_again(hook)  # A new hook, if another adapter was attached after the merge.
            if again is None:
                why = "since the merge, another tool has replaced the layer's forward, or removed a replacement"
                cure = "Undo the other tool's change, call unmerge_(), then apply the other tool again"
                raise UsageError(why, where=f"{self.name}: a {type(hook.module).__name__}", cure=cure)
            hooks.append(again)
        merged, undone = self._merged, Unmerging()

        def undo() -> None:
            undone.undo()
            for each in merged:
                each.forget()
                each.push()

        with all_or_nothing(self._model, self._objects(), undo):
            for hook, parts in self._folded:
                if not undone.take_out(hook, parts, merged):
                    why = "the adapter's tensors were changed after the merge, so the old weights cannot be recomputed"
                    cure = "Load the tensors' previous values, or load the base again"
                    raise UsageError(why, where=self.name, cure=cure)
            for leaf in self._leaves:
                leaf.register()
            self._hooks = hooks
            for hook, (_, parts) in zip(hooks, self._parts, strict=True):
                hook.home = hook.home or weakref.ref(self._model)
                for part in parts:
                    hook.attach(part)
            self._state, self._merged, self._folded = "attached", [], []
            self._enter(frozen=bool(self.frozen))
            for each in merged:
                each.pop()

    def _check(self) -> None:
        if self._state != "attached":
            raise UsageError("this handle was removed or merged", where=self.name, cure="Inject the adapter again")
        self._watch.reclaim()


def _within(path: str, other: str) -> bool:
    """Whether all names of `path` occur in `other` in the same order, possibly with other names between them."""
    names = iter(other.split("."))
    return not path or all(name in names for name in path.split("."))


def _name(target: Target, updates: tuple[Update, ...], position: int, field: str) -> str:
    method = updates[position].method
    return f"{target}.{position}.{method}.{field}" if len(updates) > 1 else f"{target}.{method}.{field}"


def _copy(leaf: object) -> Tensor:
    assert isinstance(leaf, Tensor)
    return whole(leaf).detach().clone()


@checks_types
def handles(model: nn.Module) -> dict[str, Handle]:
    """Return the handles of the adapters attached to a model or to its modules, keyed by name.

    A deep copy of a model has its own handles.

    Args:
        model: the model that was passed to `inject`, or a wrapper around this model (DDP, `torch.compile`).

    Returns:
        Name -> handle. The handles of one module are in the order of injection. If an adapter was injected into a
        submodule of `model`, its key starts with the submodule's path (`encoder:default`).
    """
    handles_by_path: dict[str, Handle] = {}
    for path, module in model.named_modules():
        for handle in module.__dict__.get(HANDLES, ()):
            path = unwrapped(model, path)
            handles_by_path[f"{path}:{handle.name}" if path else handle.name] = handle
    return handles_by_path


def changes(handles: Sequence[Handle]) -> list[tuple[Tensor, Tensor]]:
    """Return (parameter, new value in float64) for each parameter that a merge of all handles' adapters would change.

    This function does not change the parameters.

    Raises:
        NotMergeable: one of the adapters cannot be merged into the weights; see `Handle.merge_`.
    """
    return [
        (tensor_at(hook.module, path), value)
        for hook, parts in foldable(handles)
        for path, value in hook.changed(parts, torch.float64).items()
    ]


def foldable(handles: Sequence[Handle]) -> Folded:
    """Check that the handles' adapters can be merged into weights, and return each hook with its parts to merge."""
    for handle in handles:
        handle._check()
        if any(map(is_partitioned, handle._model.parameters())):
            cure = "Write handle.adapter() and merge the file: adapterkit merge BASE ADAPTER -o OUT"
            raise NotMergeable("DeepSpeed's ZeRO has partitioned the weights", where=handle.name, cure=cure)
        # Also check the updates at the hooks: `formats/_trained.py` may have replaced the adapter's updates by others.
        live = [
            (part.target, update)
            for hook in handle._hooks
            for part in hook.parts
            if part.switch is handle._switch
            for update in part.updates
        ]
        for target, update in (*handle._adapter, *live):
            if update.kind in ("output", "context"):
                raise NotMergeable("the update does not change weights", where=str(target), cure=KEEP_INJECTED)
    switches = [handle._switch for handle in handles]
    hooks = dict.fromkeys(hook for handle in handles for hook in handle._hooks)
    folds = [(hook, [part for part in hook.parts if part.switch in switches]) for hook in hooks]
    return checked_folds(handles[0]._model, folds)
