"""The forward that replaces a module's own forward while adapters are attached to it.

A `ForwardHook` is stored in the module's `__dict__`. It holds the parts (`parts.Part`) of all adapters at the module.
In each call, the hook chooses how to apply the parts: by a cached plan, row by row (if the rows use different
adapters), by the methods' formulas, or by running the module's own forward with changed parameters.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import order_counts
from ..core.updates import Additive, Composed, Update
from ..errors import AdapterkitError, ShapeMismatch, Unsupported
from .batched import KeptStacks, add_by_row, add_to_rows, factors_of, places_of, rank_of
from .bypass import ForwardProbe, inner_slot, note_call, slot_of, unwatch_reads, value_in, watch_reads
from .call_recorder import CallRecorder, run_recorded
from .context import ContextPart, check_tasks, surround
from .layers import Linear, Quantized, TorchLayer, WeightDifference, dropped_change, is_packed, lasting, layer_of, moved
from .lean import LeanPlan, is_wide, low_rank_linear, low_rank_sum, scaled_linear
from .leaves import Leaf
from .parts import HOOK, SCRIPTING, Beside, InputRecorder, OutputChange, Part, through
from .routing import check_expert, check_switches, is_expert, join, split
from .scopes import SETTINGS, Recall, Route, Scope, Switch, current
from .sharding import constants_on_every_process, is_sharded, whole
from .weights import changed_bias, changed_weight, exchanged, replica, settled, tensor_at

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..core.updates.update import Layer as FormulaLayer
    from .weights import Change

    Arguments = Sequence[object]
    Keywords = Mapping[str, object]


class ForwardHook:
    """Replace `module.forward`. The original forward is restored when the last part is detached."""

    def __init__(self, module: nn.Module) -> None:
        self.slot = inner_slot(module)
        self.module, self.original = module, getattr(*self.slot)
        self.before = value_in(self.slot)
        self.wrapper: Any = None  # Another tool's forward, if it wrapped this hook when the last part was detached.
        self.layer: TorchLayer | None = layer_of(module, self.original)
        self.kind = type(module._parameters.get("weight"))
        self.parts: list[Part] = []
        self.contexts: list[ContextPart] = []
        self.input_recorders: list[InputRecorder] = []
        self.call_recorders: list[CallRecorder] = []
        self.names = tuple(inspect.signature(self.original).parameters)
        self.recall = Recall()
        self.ranks: dict[Part, int] = {}  # 0 means that the part has no low-rank factors.
        self.kept = KeptStacks()
        self.bare = False  # True if there are only updates of weights: no contexts, recorders or output sites.
        self.plain = False  # True if `bare`, all parts have low-rank factors, and the layer is a plain nn.Linear.
        self.switched: tuple[Switch, ...] = ()  # The switches of the parts.
        self.recalled: tuple[Switch, ...] = ()  # The switches of the parts and contexts.
        # `home` is the model into which adapters were injected. If the module is copied without its model, the copy's
        # hook stores the copied parameters in `copied` instead.
        self.home: weakref.ref[nn.Module] | None = None
        self.copied: Mapping[str, Tensor | None] | None = None
        self.trained: tuple[Part, Leaf] | None = None  # The first leaf that is a trained parameter, and its part.
        self.probe: ForwardProbe | None = None
        self.known: object = None  # Another tool's forward that replaced this hook's forward but still calls it.
        self.calls, self.traced = 0, False  # The number of calls, and whether compiled code calls the module.
        ALIVE.add(self)

    @property
    def switches(self) -> list[Switch]:
        """The switches of the adapters that have a part at this module."""
        return [*(part.switch for part in self.parts), *(part.switch for part in self.contexts)]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "home": None}  # A weak reference cannot be pickled.

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        ALIVE.add(self)

    def __deepcopy__(self, memo: dict[int, object]) -> ForwardHook:
        """Copy the hook when its module is copied.

        If the module is copied without its model, also store the copied parameters for `_check_copy`.
        """
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        home = None if self.home is None else self.home()
        if home is not None and id(home) in memo:
            copied = memo[id(home)]
            assert isinstance(copied, nn.Module)
            clone.home = weakref.ref(copied)
        elif home is not None:
            parameters: dict[str, Tensor | None] = dict(self.module._parameters)
            clone.copied = copy.deepcopy(parameters, memo)  # Read the original module: the copy is still incomplete.
        return clone

    def attach(self, part: Part | ContextPart) -> None:
        if isinstance(part, ContextPart):
            self.contexts = [*self.contexts, part]
        else:
            part.bound.used_in(self.module)
            # Compute the rank now, so that compiled code need not check in each forward whether the rank is known.
            rank = rank_of(part, self.layer) if self.layer is not None and part.direct else 0
            # Build new objects and set the parts last, because other threads may be in a forward with the old objects.
            self.ranks = {**self.ranks, part: rank}
            self.parts = [*self.parts, part]
        self._stand()

    def _stand(self) -> None:
        self._look()
        attributes, slot = self.module.__dict__, slot_of(self.module, self)
        met = value_in(self.slot) is not None and (attributes.get(HOOK) is self or self.wrapper is not None)
        wrapped = slot is None and met
        attributes[HOOK], attributes[SCRIPTING] = self, self.refuse_scripting
        watch_reads(self)
        if not wrapped:  # If the hook is wrapped, the slot contains another tool's forward, which calls the hook.
            owner, name = slot or self.slot
            owner.__dict__[name] = HookEntry(self) if self.contexts or self.call_recorders else self.forward

    def _look(self) -> None:
        """Recompute the attributes that depend on the attached parts, and discard the cached plans and stacks."""
        around = self.contexts or self.input_recorders or self.call_recorders
        self.bare = not around and all(part.output_site is None for part in self.parts)
        linear = type(self.layer) is Linear and self.before is None
        self.plain = self.bare and linear and bool(self.parts) and all(self.ranks[part] for part in self.parts)
        self.expert = any(is_expert(str(part.target)) for part in self.parts)
        self.switched = tuple(part.switch for part in self.parts)
        self.recalled = tuple(self.switches)
        self.drops = any(part.dropout for part in self.parts)
        each = [
            (part, leaf)
            for part in self.parts
            for leaves_by_name in part.bound.leaves
            for leaf in leaves_by_name.values()
        ]
        self.trained = next((pair for pair in each if isinstance(pair[1].tensor, nn.Parameter)), None)
        self.kept = KeptStacks()
        SETTINGS.renew()

    def _meet(self, kind: type) -> None:
        """Adjust the hook after the weight was replaced by one of another class, as torchao's `quantize_` does."""
        self.kind = kind
        if isinstance(self.layer, Quantized) or not is_packed(self.module):
            return
        self.layer = layer = Quantized(self.module, self.original)
        self.ranks = {part: rank_of(part, layer) if part.direct else 0 for part in self.parts}
        self._look()

    def record_input(self, recorder: InputRecorder) -> None:
        """Attach a recorder that stores the module's input at each call."""
        self.input_recorders.append(recorder)
        self._stand()

    def record_call(self, recorder: CallRecorder) -> None:
        """Attach a recorder that stores the arguments of the module's calls."""
        self.call_recorders.append(recorder)
        self._stand()

    def detach(self, switch: Switch) -> None:
        self.parts = [part for part in self.parts if part.switch is not switch]
        self.ranks = {part: rank for part, rank in self.ranks.items() if part in self.parts}
        self.contexts = [part for part in self.contexts if part.switch is not switch]
        self.input_recorders = [recorder for recorder in self.input_recorders if recorder.switch is not switch]
        self.call_recorders = [recorder for recorder in self.call_recorders if recorder.switch is not switch]
        if self.parts or self.contexts or self.input_recorders or self.call_recorders:
            self._stand()
            return
        self._look()
        del self.module.__dict__[HOOK], self.module.__dict__[SCRIPTING]
        unwatch_reads(self)
        if self.probe is not None:
            self.probe.stop()
        slot = slot_of(self.module, self)
        if slot is None:  # Another tool's wrapper still calls this hook, which now only calls the original forward.
            self.wrapper = value_in(self.slot)
            return
        owner, name = slot
        if self.before is not None:
            owner.__dict__[name] = self.before
        elif slot == (self.module, "forward"):
            del owner.__dict__[name]
        else:  # Another tool wrapped this hook later. The tool's wrapper calls the forward that is in this slot.
            owner.__dict__[name] = self.original

    def forward(self, *args: object, **kwargs: object) -> object:
        scope = self.recall.scope(self.module.training, self.recalled)
        if self.trained is not None and self.module.training:
            self._check_trains(*self.trained)
        if self.probe is not None:
            self.probe.meet()
        if self.copied is not None:
            self._check_copy(self.copied)
        compiling = torch.compiler.is_compiling()
        if compiling:
            self.note_traced()
        else:  # Do not count in compiled code: each new value of the counter would cause a recompilation.
            self.calls += 1
            note_call(self)
        plain = self.plain and len(args) == 1 and not kwargs and not compiling
        # Use no plan under diffusers' layerwise casting. The casting overwrites the weight, but the plan keeps the
        # weight for the backward pass.
        plain = plain and "_diffusers_hook" not in self.module.__dict__
        # Use no plan under torch.jit.trace, which compares two runs. The first run would make the plan and the second
        # run would use it, so the two runs would read the tensors in different orders.
        if plain and torch._C._get_tracing_state() is None:
            y = self._planned(scope, args[0])
            if y is not None:
                return y
        kind = type(self.module._parameters.get("weight"))
        if kind is not self.kind and kind not in _PLAIN:
            self._meet(kind)
        if self.before is not None and kind not in _PLAIN:
            self._check_spread(scope, args)
        if self.bare:
            active = [part for part in self.parts if part.switch.acts(scope)]
            route = scope.routes.get(self) if scope.routes else None
            if route is not None and active:
                return self._routed(route, scope, active, args, kwargs, {})
            return self._weighed(active, args, kwargs)
        if not self.call_recorders:
            return self._surrounded(scope, args, kwargs)
        passes = any(part.switch.on(scope) for part in self.contexts)

        def forward(*args: object, **kwargs: object) -> object:
            return self._surrounded(current(), args, kwargs)

        return run_recorded(self.module, self.call_recorders, self.names, forward, passes, scope, args, kwargs)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def note_traced(self) -> bool:
        """Record, during compilation, that the compiled code calls the module."""
        self.traced = True
        return True

    def _check_spread(self, scope: Scope, args: Arguments) -> None:
        """Check that a tensor-parallel weight gets a tensor-parallel input.

        transformers' `tp_plan` replaces the forward of each layer by a closure that turns the input into a DTensor.
        This hook cannot be placed inside the closure, so the hook gets an input that is still a plain tensor.

        Raises:
            Unsupported: the input is a plain tensor, but the weight is tensor-parallel.
        """
        W: Any = self.module._parameters.get("weight")
        if args and type(args[0]) is Tensor and is_sharded(W) and any(part.switch.acts(scope) for part in self.parts):
            why = "transformers' tp_plan makes this layer's input a DTensor only after the adapter has read the input"
            cure = "Call handle.merge_(), which supports such layers, or shard the model by torch's parallelize_module"
            raise Unsupported(why, where=str(self.parts[0].target), cure=cure)

    def refuse_scripting(self) -> nn.Module:
        """Raise an error, because code from torch.jit.script would ignore the adapter.

        torch.jit.script compiles the forward of the module's class, not the forward in `module.__dict__`. It calls this
        method for the module that it compiles, and for each submodule.
        """
        cure = "Call handle.merge_() first, or use torch.jit.trace or torch.export, which record what the model runs"
        where = str(next((part.target for part in self.parts), type(self.module).__name__))
        raise Unsupported("torch.jit.script cannot compile a module with an adapter", where=where, cure=cure)

    def _check_trains(self, part: Part, leaf: Leaf) -> None:
        """Warn, once for each adapter, if another tool has frozen an adapter that was injected with `trainable=True`.

        PEFT's get_peft_model freezes all parameters except its own, which it recognises by name.
        """
        if leaf.tensor.requires_grad or torch.compiler.is_compiling() or part.switch in WARNED:
            return
        leaves = [
            leaf for part in self.parts for leaves_by_name in part.bound.leaves for leaf in leaves_by_name.values()
        ]
        if torch.is_grad_enabled() and not any(leaf.tensor.requires_grad for leaf in leaves):
            WARNED.add(part.switch)
            name = part.switch.name
            warnings.warn(
                f"{part.target}: the adapter {name!r} was injected with trainable=True, but is not trained, because "
                "another tool (such as PEFT's get_peft_model) has frozen the adapter's parameters. To train it, call "
                "requires_grad_(True) on each of handle.parameters(); otherwise inject it with trainable=False",
                stacklevel=2,
            )

    def _check_copy(self, copied: Mapping[str, Tensor | None]) -> None:
        """Check that a copied module still has the values for which its adapter was made.

        This check is only for modules that were copied without their model. For example, torch's `fuse_conv_bn_eval`
        copies a layer and scales the copy's weight, but not the copy's adapter.

        Raises:
            Unsupported: the weight and bias were replaced, and the weight has new values.
        """
        now = self.module._parameters
        if "weight" not in copied or any(now.get(name) is copied.get(name) for name in ("weight", "bias")):
            return
        if _cast_of(now.get("weight"), copied["weight"]):  # The parameters are new, but were only cast or moved.
            self.copied = dict(now)
        else:
            cure = "Call handle.merge_() before you fuse a layer with its norm"
            why = "a copy of this layer got a new weight and bias, but its adapter was made for the original ones"
            raise Unsupported(why, where=str(next((part.target for part in self.parts), "")) or None, cure=cure)

    def _planned(self, scope: Scope, x: object) -> Tensor | None:
        """Run a linear layer and its low-rank updates by a cached plan, and return the output; None if no plan fits."""
        if self.drops and self.module.training:
            return None
        route = scope.routes.get(self) if scope.routes else None
        if route is not None:
            rows = self.kept.rows
            y = None if rows is None else rows.run(route, scope, x)
            return self._row_by_row(route, scope, x) if y is None else y
        plan = self.kept.plan
        if plan is None or plan.scope is not scope or plan.token is not SETTINGS.token:
            plan = self._new_plan(scope)
        y = plan.run(x)
        if y is None and plan.token is None:
            # Offloading and FSDP2 load a new weight for each forward, which makes the plan invalid. Make a new plan at
            # once. If every second forward ran without a plan, a checkpointed block and its recomputation could save
            # different tensors, which is an error in torch.
            y = self._new_plan(scope).run(x)
        return y

    def _new_plan(self, scope: Scope) -> LeanPlan:
        token = SETTINGS.token
        active = [part for part in self.parts if part.switch.acts(scope)]
        alone = len(active) == 1 and len(active[0].bound.leaves) == 1
        plan = self.kept.plan = LeanPlan(token, scope, active[0] if alone else None, self.layer)
        return plan

    def _row_by_row(self, route: Route, scope: Scope, x: object) -> Tensor | None:
        """Return a linear layer's output, in which each row has the change of its own adapter.

        The changes are computed with a cached stack, which contains the factors of all frozen adapters. Return None if
        there is no such stack, if it is out of date, or if it cannot be used in this call.
        """
        W, stack, layer = self.module._parameters.get("weight"), self.kept.stack, self.layer
        if W is None or stack is None or layer is None or type(x) is not Tensor or x.shape[-1:] != W.shape[1:]:
            return None
        if self.expert or not stack.is_current(self.switched, W) or torch._C._get_tracing_state() is not None:
            return None
        try:
            places = places_of(self.switched, route, scope, x.device)
            return add_to_rows(layer, stack, places, route, x, self.kept)
        except AdapterkitError as error:
            raise error.at(where=str(self.parts[0].target)) from None

    def _surrounded(self, scope: Scope, args: Arguments, kwargs: Keywords) -> object:
        around = [part for part in self.contexts if part.switch.on(scope)]
        if not around:
            return self._inner(scope, args, kwargs)
        if self in scope.routes:
            cure = "Call the model once for each adapter, with only the rows of this adapter"
            raise Unsupported("context cannot be added to some rows of a batch", where=str(around[0].target), cure=cure)

        def forward(*args: object, **kwargs: object) -> object:
            return self._inner(scope, args, kwargs)

        return surround(self.module, around, self.names, forward, args, kwargs)

    def _inner(self, scope: Scope, args: Arguments, kwargs: Keywords) -> object:
        for recorder in self.input_recorders:
            if recorder.switch.acts(scope):
                x: Any = args[0] if args else next(iter(kwargs.values()))
                recorder.value = x
        active = [part for part in self.parts if part.switch.acts(scope)]
        beside = {p.switch.name: p.output_site.beside() for p in active if p.output_site}
        route = scope.routes.get(self)
        if route is not None and active:
            return self._routed(route, scope, active, args, kwargs, beside)
        return self._run(active, args, kwargs, beside)

    def _run(self, parts: list[Part], args: Arguments, kwargs: Keywords, beside: dict[str, Beside]) -> object:
        inner = [part for part in parts if part.output_site is None]
        outer = [(part, part.output_site) for part in parts if part.output_site]
        changes = [OutputChange(p.switch.weight, p.updates, site, *beside[p.switch.name]) for p, site in outer]
        if not changes:
            return self._weighed(inner, args, kwargs)
        for part, _ in outer:
            check_tasks(part.updates, beside[part.switch.name][1].get("task_ids"))
        try:
            return through(
                self.module, self.layer, lambda a, k, w: self._weighed(inner, a, k, w), args, kwargs, changes,
                lambda: self.changed(inner),
            )  # fmt: skip
        except AdapterkitError as error:
            raise error.at(where=str(next(part.target for part in parts if part.output_site))) from None

    def _weighed(self, parts: list[Part], args: Arguments, kwargs: Keywords, without: str | None = None) -> object:
        """Return the module's output with the parts' changes applied. If `without` names a norm, skip this norm."""
        skipped = {} if without is None else {without: _same}
        if not parts and not skipped:
            return self._original(args, kwargs)
        x: Any = [*args, *kwargs.values()][0] if len(args) + len(kwargs) == 1 else None
        if len(parts) == 1 and not skipped and len(args) + len(kwargs) == 1 and torch.is_grad_enabled():
            scaled = self._scaled(parts[0], x)
            if scaled is not None:
                return scaled
        if not skipped and self.layer is not None and self._is_direct(parts) and len(args) + len(kwargs) == 1:
            layer = self.layer.like(x)
            if layer.flat and all(self.ranks.get(part) for part in parts) and not self._drops(parts):
                return self._added(layer, parts, x)
            if type(layer.sample) in _PLAIN:
                y = _direct(layer, parts, x)
            else:
                with _spread(layer, parts):
                    y = _direct(layer, parts, x)
            # A formula with float32 factors returns float32. Cast the output, because the next layers expect the dtype
            # that the module's own forward returns.
            return _narrowed(y, x.device.type) if layer.narrowed and self.before is None else y
        values = {**self.changed(parts), **skipped}
        if any(isinstance(value, Tensor) and value.is_meta for value in values.values()):
            given = [*args, *kwargs.values()]
            if any(isinstance(value, Tensor) and not value.is_meta for value in given):
                raise _unloaded(parts[0])
        if self._rebinds and not torch.compiler.is_compiling():
            func: Any = self.original.__func__
            return func(replica(self.module, values), *args, **kwargs)
        with nullcontext() if torch.compiler.is_compiling() else _EXCHANGING, exchanged(self.module, values):
            return self.original(*args, **kwargs)

    def _original(self, args: Arguments, kwargs: Keywords) -> object:
        if self._rebinds or torch.compiler.is_compiling() or all(part.direct for part in self.parts):
            return self.original(*args, **kwargs)
        with _EXCHANGING:
            return self.original(*args, **kwargs)

    @property
    def _rebinds(self) -> bool:
        """Whether the original forward is a plain method, which can run on a replica of the module."""
        is_method = getattr(self.original, "__self__", None) is self.module and hasattr(self.original, "__func__")
        return is_method and not isinstance(self.module, torch.jit.ScriptModule)

    def _is_direct(self, parts: list[Part]) -> bool:
        """Whether the hook computes the output with the methods' formulas.

        If not, the module's own forward runs with changed parameters. This is more precise for 16-bit weights with
        updates that are not additive, because the new weight is computed in 32 bits and rounded once.
        """
        if not all(part.direct for part in parts):
            return False
        if len(parts) > 1 and _in_order(parts):
            if isinstance(self.layer, Quantized) or self._drops(parts):
                why = "one adapter has several targets at one layer, and not all of its updates there are additive"
                cure = "Put the updates at one target, or inject without dropout into a layer that is not quantized"
                raise Unsupported(why, where=str(parts[0].target), cure=cure)
            return False
        if self.module.training and any(part.dropout for part in parts):
            return True
        if isinstance(self.layer, Quantized):
            return True
        changes_weights = any(update.kind == "weight" for part in parts for update in part.updates)
        return not (changes_weights and all(part.foldable for part in parts) and _is_half(self.module))

    def _scaled(self, part: Part, x: Tensor) -> Tensor | None:
        """Return the layer's output if the update scales the rows of `W + B @ A`, as DoRA does; otherwise None."""
        layer = self.layer
        plain = layer is not None and layer.fresh and self.before is None and part.direct and part.switch.weight == 1
        if not plain or layer is None or torch.compiler.is_compiling() or self._drops([part]):
            return None
        update: Any = part.updates[0]
        W = layer.weight
        if len(part.updates) != 1 or update.kind != "weight" or update.changes_bias or type(W) not in _PLAIN:
            return None
        wide = torch.promote_types(W.dtype, torch.float32)
        factors = moved(update, W.device, wide).scaled_factors(W.detach().to(wide))  # type: ignore[attr-defined]
        if factors is None:
            return None
        s, B, A = factors if is_wide(W) else (tensor.to(W.dtype) for tensor in factors)
        return scaled_linear(x, W, layer.bias, s, A, B)

    def _drops(self, parts: list[Part]) -> bool:
        """Whether any of the parts applies dropout in this forward."""
        return self.module.training and any(part.dropout for part in parts)

    def _added(self, layer: TorchLayer, parts: list[Part], x: Tensor) -> Tensor:
        """Return the layer's output plus the changes of low-rank parts, accumulated in one tensor."""
        y: Tensor | None = None
        plain = layer.fresh and self.before is None  # Whether the module runs nn.Linear's forward.
        like = layer.sample
        if like.is_meta and not x.is_meta:
            raise _unloaded(parts[0])
        for part in parts:
            for each in part.updates:
                update: Any = each
                B, A, weight = factors_of(update, layer, like)
                weight *= part.switch.weight
                if (B.shape[0], A.shape[1]) != layer.shape:
                    expected = [B.shape[0], A.shape[1]]
                    now = list(layer.shape)
                    why = f"the update was made for a weight of shape {expected}, but the weight's shape is {now}"
                    raise ShapeMismatch(why, where=str(part.target), cure=_AGAIN)
                if y is None and plain:
                    y = low_rank_linear(x, like, layer.bias, A, B, weight)
                    if y is None:
                        y = low_rank_sum(layer(x), x, A, B, weight, fresh=True)
                elif y is None:
                    y = low_rank_sum(layer(x), x, A, B, weight)
                else:
                    y = low_rank_sum(y, x, A, B, weight, fresh=True)
                d = update.bias_delta()
                if d is not None:
                    y = y + part.switch.weight * d.to(like.device, like.dtype)
        assert y is not None
        return y

    def _routed(
        self, route: Route, scope: Scope, parts: list[Part], args: Arguments, kwargs: Keywords,
        beside: dict[str, Beside],
    ) -> object:  # fmt: skip
        compiling = torch.compiler.is_compiling()
        if not compiling:
            check_switches(route, self.switches, scope.active)
        # Compiled code must not depend on the names in a route: each new route would cause a recompilation.
        named = self.parts if compiling else [part for part in parts if part.switch.name in route.names]
        where = str(parts[0].target)
        if (
            self.layer is not None
            and len(args) + len(kwargs) == 1
            and named
            and all(self.ranks.get(part) for part in named)
            and not self._drops(named)
        ):
            if not compiling:
                check_expert(route, where)
            x: Any = [*args, *kwargs.values()][0]
            thin = [part for part in self.parts if self.ranks.get(part)]
            layer = self.layer.like(x)
            try:
                if compiling or type(layer.sample) in _PLAIN:
                    return add_by_row(layer, thin, route, scope, x, self.kept)
                with _spread(layer, thin):
                    return add_by_row(layer, thin, route, scope, x, self.kept)
            except AdapterkitError as error:
                raise error.at(where=where) from None
        outputs = [
            self._run([part for part in parts if part.switch.name == name], some, named, own_hook)
            for name, some, named, own_hook in split(route, self.module, args, kwargs, beside, where)
        ]
        return join(route, self.module, outputs, where)

    def changed(self, parts: list[Part], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the new values of the parameters that the parts change, keyed by the parameter's path in the module.

        The values have the dtype `dtype`. If `dtype` is None, they are computed in at least 32 bits, and rounded once
        to the parameter's own dtype.
        """
        out = {}
        for weight in dict.fromkeys(p.weight for p in parts if p.weight and any(u.changes_weight for u in p.updates)):
            out[weight] = self._after(weight, dtype, [p for p in parts if p.weight == weight], changed_weight)
        for bias in dict.fromkeys(p.bias for p in parts if p.bias and any(u.changes_bias for u in p.updates)):
            parts_here = [p for p in parts if p.bias == bias]
            out[bias] = self._after(
                bias, dtype, parts_here, changed_bias, [self._settled(p, parts_here, dtype) for p in parts_here]
            )
        return out

    def _settled(self, part: Part, parts: list[Part], dtype: torch.dtype | None) -> tuple[Update, ...]:
        """Return the part's updates, or `update.settled(W)` for updates that need the weight to compute the new bias.

        W is the weight after the changes of the same adapter's earlier parts.
        """
        if part.weight is None or not any(update.bias_sees_weight for update in part.updates):
            return part.updates
        W = whole(tensor_at(self.module, part.weight))
        before = [p for p in parts[: parts.index(part)] if p.switch is part.switch and p.weight == part.weight]
        W = changed_weight(
            W.to(dtype or torch.promote_types(W.dtype, torch.float32)), [(1.0, [(p.target, p.updates) for p in before])]
        )
        return settled(part.updates, W, part.target)

    def _after(
        self,
        path: str,
        dtype: torch.dtype | None,
        parts: list[Part],
        formula: Callable[[Tensor, Sequence[Change]], Tensor],
        updates: Sequence[tuple[Update, ...]] | None = None,
    ) -> Tensor:
        targets: dict[Switch, list[tuple[Target, Sequence[Update]]]] = {}
        for part, updates_here in zip(parts, updates or [part.updates for part in parts], strict=True):
            targets.setdefault(part.switch, []).append((part.target, updates_here))
        changes = [(switch.weight, updates_here) for switch, updates_here in targets.items()]
        before = whole(lasting(self.module, tensor_at(self.module, path)))
        wide = dtype or torch.promote_types(before.dtype, torch.float32)
        after = formula(before.to(wide), changes)
        return after if dtype else after.to(before.dtype)


def _in_order(parts: list[Part]) -> bool:
    """Whether `parts` contains several parts of one adapter whose order matters. `_direct` would ignore the order."""
    switches = Counter(part.switch for part in parts)
    return any(
        order_counts([(part.target, part.updates) for part in parts if part.switch is switch])
        for switch, count in switches.items()
        if count > 1
    )


def _cast_of(new: Tensor | None, old: Tensor | None) -> bool:
    """Whether `new` has the same values as `old`, possibly in another dtype or on another device."""
    if new is None or old is None or new.shape != old.shape or new.is_meta or old.is_meta:
        return False
    dtype = min(new.dtype, old.dtype, key=lambda each: each.itemsize)
    return torch.equal(new.detach().to(old.device, dtype), old.detach().to(dtype))


def _narrowed(y: object, kind: str) -> object:
    """If autocast is on, cast a layer's float32 output to the dtype that autocast uses on this kind of device."""
    if not torch.is_autocast_enabled(kind) or not isinstance(y, Tensor) or y.dtype is not torch.float32:
        return y
    return y.to(torch.get_autocast_dtype(kind))


def _same(h: Tensor) -> Tensor:
    return h


def _unloaded(part: Part) -> Unsupported:
    """Return the error for a weight on the meta device.

    Without this error, torch would return uninitialised memory as the product of such a weight and a CPU tensor.
    """
    why = "the layer's weight is on the meta device, but its input is not"
    cure = "Load the weights first: model.load_state_dict(state, assign=True), or from_pretrained"
    return Unsupported(why, where=str(part.target), cure=cure)


_PLAIN = (Tensor, nn.Parameter)
_AGAIN = "Call handle.remove() before a layer changes its size, and inject an adapter of the new size"


_EXCHANGING = threading.RLock()
"""Lock that is held while a module runs with replaced parameters, and during forwards that could read them."""

WARNED: weakref.WeakSet[Switch] = weakref.WeakSet()
"""The switches of adapters that another tool has frozen, and about which `ForwardHook` has already warned."""

ALIVE: weakref.WeakSet[ForwardHook] = weakref.WeakSet()
"""All hooks that exist, in all models."""


def hooks_of(model: nn.Module) -> list[ForwardHook]:
    """Return the hooks at all modules of a model."""
    return [module.__dict__[HOOK] for module in model.modules() if HOOK in module.__dict__]


def hook_at(module: nn.Module) -> ForwardHook:
    """Return the hook at a module. If there is none, return a new hook, which has no parts."""
    standing = module.__dict__.get(HOOK)
    return standing if isinstance(standing, ForwardHook) else ForwardHook(module)


def hook_again(hook: ForwardHook) -> ForwardHook | None:
    """Return the hook to which the detached parts of `hook` can be attached again.

    Return None if another tool replaced the module's forward after the parts were detached, or removed an earlier
    replacement.

    Args:
        hook: the hook from which the parts were detached.
    """
    attributes = hook.module.__dict__
    standing = attributes.get(HOOK)
    if hook.wrapper is not None:
        return hook if standing in (None, hook) and value_in(hook.slot) is hook.wrapper else None
    met = value_in(inner_slot(hook.module)) if standing is None else standing.before
    is_unbound = (
        getattr(met, "__self__", None) is hook.module and getattr(met, "__func__", None) is type(hook.module).forward
    )
    # If accelerate has wrapped the module's forward, a new `ForwardHook` goes inside this wrapper, as the old one did.
    fits = met is hook.before or is_unbound or "_hf_hook" in attributes
    return hook_at(hook.module) if fits else None


def names_of(model: nn.Module) -> set[str]:
    """Return the names of the adapters attached to a model."""
    return {switch.name for hook in hooks_of(model) for switch in hook.switches}


class HookEntry:
    """A callable that runs a hook's forward.

    transformers' `generate` reads the module's signature from it, and `torch.export` reads its `__code__`.
    """

    def __init__(self, hook: ForwardHook) -> None:
        self.__self__ = hook

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__self__.original)
        recorders = self.__self__.call_recorders
        asked = sorted({name for each in recorders for name in each.asks} - signature.parameters.keys())
        if not asked:
            return signature
        *named, last = signature.parameters.values()
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in asked]
        rest = [last] if last.kind is inspect.Parameter.VAR_KEYWORD else []
        return signature.replace(parameters=[*named, *([] if rest else [last]), *more, *rest])

    @property
    def __code__(self) -> CodeType:
        return self.__self__.forward.__code__

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.__self__.forward(*args, **kwargs)


def _direct(layer: TorchLayer, parts: list[Part], x: Tensor) -> Tensor:
    """Return `y + sum(weight * (f(x) - y))`, summed over the parts.

    `y` is the layer's output without any part, and `f(x)` is its output with one part alone. For a single part of
    weight 1, the result is `f(x)`.
    """
    if layer.sample.is_meta and not x.is_meta:
        raise _unloaded(parts[0])
    if layer.module.training and any(part.dropout for part in parts):
        y = layer(x)
        for part in parts:
            live = partial(_live, layer=layer)
            y = y + part.switch.weight * dropped_change(layer, part.updates, x, part.dropout, live)
        return y
    if len(parts) == 1 and parts[0].switch.weight == 1:
        return _chain(layer, parts[0].updates)(x)
    y = base = layer(x)
    for part in parts:
        if all(isinstance(update, Additive) for update in part.updates):
            difference = cast("FormulaLayer", WeightDifference(layer))
            for update in part.updates:
                y = y + part.switch.weight * _live(update, layer).forward(x, difference)
        else:
            y = y + part.switch.weight * (_chain(layer, part.updates)(x) - base)
    return y


@contextmanager
def _spread(layer: TorchLayer, parts: list[Part]) -> Iterator[None]:
    """Return a context manager that lets the updates' formulas run at a layer whose weight may be a DTensor.

    Raises:
        Unsupported: a formula uses plain tensors, which torch cannot combine with DTensors.
    """
    if type(layer.sample) in _PLAIN or not is_sharded(layer.sample):
        yield
        return
    tensors: list[Any] = [tensor for part in parts for update in part.updates for tensor in update.tensors.values()]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    try:
        with nullcontext() if trains else constants_on_every_process():
            yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        methods = ", ".join(dict.fromkeys(update.method for part in parts for update in part.updates))
        why = f"torch cannot train {methods} in a tensor-parallel layer, because a formula or route uses plain tensors"
        cure = "Train lora, dora or ia3 without a route, or remove the layer from parallelize_module's plan"
        raise Unsupported(why, where=str(parts[0].target), cure=cure) from None


def _chain(layer: TorchLayer, updates: Sequence[Update]) -> Callable[[Tensor], Tensor]:
    composed: Any = layer
    for update in updates:
        composed = Composed(composed, _live(update, layer))
    return composed  # type: ignore[no-any-return]


def _live(update: Update, layer: TorchLayer) -> Update:
    """Return the update in the layer's dtype and on its device."""
    like = layer.sample
    return moved(update, like.device, like.dtype)


def _is_half(module: nn.Module) -> bool:
    W: Any = module.weight
    return W.dtype in (torch.float16, torch.bfloat16)
