"""Detect at the next forward that another tool has removed an adapter from the model.

`quantize_dynamic`, `replace_module` functions and attention fusers replace a module that has an adapter, or a block
that contains such a module. The new module runs without the adapter, and nothing else would report that. An adapter is
also removed if a tool deletes the attribute `forward` that the adapter set on the module. Another tool may patch the
forward of the module's class, or change the module's class. In both cases, the new forward would never run, because the
adapter still calls the earlier forward.

A forward pre-hook of the model checks all adapters before each forward of the model. But some callers run only a part
of the model, such as its encoder, one block or a pipeline stage. So each submodule that contains modules with adapters
also has a pre-hook. This hook checks that the submodule's children on the paths to these modules were not replaced.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel

from ..errors import Unsupported
from ..formats.peft.families import family_of_type
from ..methods import METHODS
from .bypass import BypassBlock, Hook, begin_calls, end_calls, probe_forward, warn_of_untraced
from .forward_hook import ALIVE, ForwardHook
from .leaves import Leaf, on_disk, reclaim, take_off_disk
from .parts import HOOK
from .sharding import check_averaged

# Detect the removal of an adapter when it happens, in the cases that `Watch` would miss at the next forward.
#
# `Watch` checks the model before each forward, and misses the changes that these tools make:
#
# * torch.fx copies a model's modules into a new module (`prepare_fx`) and replaces them there (`convert_fx`). The model
#   itself does not change, and the new module is not watched.
# * torch.fx also installs quantization-aware modules (`prepare_qat_fx`). No hook runs when these modules are installed,
#   but they take over the weights of the old modules, and a hook runs for each of these weights.
# * PEFT's `merge_and_unload` changes the weight of a module with an attached adapter. Then it removes the PEFT layer
#   that wraps this module, and puts the module in the layer's place.
#
# So this module registers global hooks with torch. They run whenever any module gets a new child or parameter, and cost
# one function call each time.


_REGISTERED: list[Any] = []
"""The handles of the two global hooks; empty until the hooks are registered."""


def notice_replacements() -> None:
    """Register the global hooks `_look` and `_look_at_weight`, unless they are already registered."""
    if not _REGISTERED:
        _REGISTERED.append(torch_module.register_module_module_registration_hook(_look))
        _REGISTERED.append(torch_module.register_module_parameter_registration_hook(_look_at_weight))


def _look(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Check that a new child of a module does not remove or change an adapter.

    Args:
        parent: the module that gets the child.
        name: the name of the child.
        new: the child.

    Raises:
        Unsupported: a module of torch.ao replaces a module that has an adapter, or torch.fx replaces such a module in
            its copy of a model. The error is also raised if a module with an adapter takes the place of the PEFT layer
            that wrapped the module, and PEFT's merge changed the result of the adapter.
    """
    old = parent._modules.get(name)
    if old is None or old is new:
        return
    if isinstance(parent, fx.GraphModule) or type(new).__module__.startswith("torch.ao."):
        lost = _carried(old) - (set() if new is None else _carried(new))
        if lost:
            why = f"a {type(new).__name__} replaces a {type(old).__name__} that has an adapter"
            raise Unsupported(why, where=name, cure=_QUANTIZED)
    if new is not None and HOOK in new.__dict__:
        check_tuner(old, new, name)


def _look_at_weight(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Check that a module of torch.ao does not get a parameter of a module that has an adapter.

    Raises:
        Unsupported: a module of torch.ao gets such a parameter.
    """
    if parameter is None or not type(module).__module__.startswith("torch.ao."):
        return
    if any(hook.parts and hook.module._parameters.get(name) is parameter for hook in list(ALIVE)):
        why = f"a {type(module).__name__} takes over the {name} of a module that has an adapter"
        raise Unsupported(why, where=name, cure=_QUANTIZED)


def _carried(module: nn.Module) -> set[int]:
    """Among `module` and all modules inside it, find the modules that have an adapter. Return their ids."""
    return {id(each) for each in module.modules() if HOOK in each.__dict__}


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a PEFT layer, which wraps another module."""
    return hasattr(type(module), "merged") and any(k.__module__.startswith("peft.") for k in type(module).__mro__)


def check_tuner(tuner: nn.Module, module: nn.Module, where: str) -> None:
    """Refuse a merged PEFT layer if the merge changes what the adapters on the wrapped module compute.

    A merge is allowed if PEFT's change and the adapters' changes are all additive and no adapter changes the bias. The
    order of additive changes has no effect.

    Args:
        tuner: the parent of `module`, or the module that `module` replaces; checked only if it is a PEFT layer.
        module: the module with the adapters.
        where: the name of `module`, for the error.

    Raises:
        Unsupported: the PEFT layer is merged, and the merge is not allowed: PEFT's change or an adapter's change is not
            additive, or an adapter changes the bias.
    """
    if not is_tuner(tuner) or not getattr(tuner, "merged"):  # noqa: B009 - nn.Module declares no `merged`
        return
    ours = [update for part in module.__dict__[HOOK].parts for update in part.updates]
    if _is_sum(tuner) and all(update.kind == "additive" and not update.changes_bias for update in ours):
        return
    methods = " and ".join(dict.fromkeys(update.method for update in ours)) or "an adapter"
    why = f"PEFT merged its {_kind(tuner).upper()} into the weight that {methods} changes, and so altered the result"
    raise Unsupported(why, where=where, cure="Call handle.merge_() first, or keep PEFT's adapter unmerged")


def _is_sum(tuner: nn.Module) -> bool:
    """Whether a PEFT layer changes the weight W to W + D, with a D that does not depend on W."""
    kind = _kind(tuner)
    family = family_of_type(kind.upper())
    method: Any = METHODS.get(kind) if family is None else getattr(family, "method", None)
    return getattr(method, "kind", "") == "additive" and not getattr(tuner, "lora_variant", None)


def _kind(tuner: nn.Module) -> str:
    """Return the name of the subpackage of `peft.tuners`, such as `lora`, in which a PEFT layer is defined.

    If the layer is not defined in such a subpackage, return `adapter`.
    """
    names = [kind.__module__.split(".") for kind in type(tuner).__mro__ if kind.__module__.startswith("peft.tuners.")]
    return next((parts[2] for parts in names if len(parts) > 3), "adapter")


_QUANTIZED = "Call handle.merge_() before the model is prepared for quantization"


# The check before each forward.


Place = tuple[nn.Module, str, nn.Module]
"""(parent, name of the child, child): one step on the path from a model to a module with an adapter."""

Forwards = list[tuple[nn.Module, Any]]
"""[(module with an adapter, the forward of the module's class), ...]."""


class Watch:
    """Check before each forward of a model that the modules of one adapter are still in the model.

    The check costs one dictionary lookup for each module on the paths to adapters, however many adapters there are.

    Args:
        model: the model.
        name: the adapter's name, for errors.
        modules: the modules to which the adapter's updates are attached.
        leaves: the adapter's tensors.
    """

    def __init__(self, model: nn.Module, name: str, modules: Iterable[nn.Module], leaves: Sequence[Leaf] = ()) -> None:
        self.model, self.name, self.modules, self.leaves = model, name, list(modules), leaves
        self.places = self._find()
        self._forwards: Forwards | None = None
        _hook_of(model).add(self)
        notice_replacements()
        # If neither an nn.TransformerEncoderLayer nor a module inside it has a hook, the layer runs a fused function.
        # This function reads the parameters and does not call the modules inside, so their adapters would not act.
        for module in model.modules():
            if self._is_fusible(module):
                module.register_forward_pre_hook(_no_fused_path)

    def _is_fusible(self, module: nn.Module) -> bool:
        """Whether a module is an nn.TransformerEncoderLayer that is or contains a module with this adapter."""
        if not isinstance(module, nn.TransformerEncoderLayer):
            return False  # Decide most modules at once: this method is called for each module of the model.
        wanted = {id(each) for each in self.modules}
        return any(id(each) in wanted for each in module.modules())

    def __getstate__(self) -> dict[str, object]:
        # pickle stores a function by its name, and fails if the name now refers to another function. This happens if a
        # class's forward was patched after the injection. So a copy looks up the current forwards of the classes.
        return {**self.__dict__, "_forwards": None}

    @property
    def forwards(self) -> Forwards:
        """Each module with the adapter, and the forward that the module's class had at the injection."""
        if self._forwards is None:
            each = [(module, getattr(type(module), "forward", None)) for module in self.modules]
            self._forwards = [(module, forward) for module, forward in each if forward is not None]
        return self._forwards

    def check(self) -> None:
        """Check that every module with an adapter is still in the model and still runs the adapter.

        Raises:
            Unsupported: a module with the adapter was replaced, the forward of its class changed, its attribute
                `forward` was deleted, or its block now calls a fused projection instead.
        """
        if any(parent._modules.get(name) is not module for parent, name, module in self.places):
            # A child was replaced. The new child may be a wrapper, such as torch's CheckpointWrapper, that still calls
            # the old child. So find the paths again: `_find` raises an error only if a module has left the model.
            self.places = self._find()
        for parent, name, _ in self.places:
            # diffusers' fuse_qkv_projections adds one fused projection and keeps the old ones, which are no longer
            # called.
            if parent.__dict__.get("fused_projections") and _is_fused_away(name):
                self._raise(parent, f"the block runs its fused projections instead of {name}")
        for module, forward in self.forwards:
            if "forward" not in module.__dict__:
                self._raise(module, f"the adapter's forward was deleted from a {type(module).__name__}")
            if getattr(type(module), "forward", None) is not forward:
                self._raise(module, f"the forward of the module's class (now {type(module).__name__}) changed")

    def reclaim(self) -> None:
        """Move trained tensors out of modules that accelerate now offloads; see leaves.py.

        Also load the adapter's tensors that diffusers' group offloading keeps on disk.

        Raises:
            Unsupported: an optimizer holds the empty parameters that accelerate put into the offloaded modules.
        """
        reclaim(self.model, self.leaves)
        take_off_disk(self.homes(), self.leaves)

    def homes(self, trained: bool = False) -> list[nn.Module]:
        """Return the modules that hold tensors of the adapter, and all modules that contain these modules.

        Args:
            trained: whether to look only for modules that hold trained tensors.
        """
        wanted = {id(leaf.module) for leaf in self.leaves if leaf.first is not None or not trained}
        modules = dict(self.model.named_modules()) if wanted else {}
        paths = [name for name, module in modules.items() if id(module) in wanted]
        steps = [name.split(".") if name else [] for name in paths]
        above = {".".join(parts[:count]) for parts in steps for count in range(len(parts) + 1)}
        return [modules[name] for name in above if name in modules]

    def remove(self) -> None:
        """Remove the checks from the model."""
        hook = _hook_of(self.model)
        hook.drop(self)
        for module in self.model.modules():
            hooks = module._forward_pre_hooks
            ours = [] if module is not self.model or hook.watches else [k for k, h in hooks.items() if h is hook]
            if ours:
                hook.end.remove()
            # Each adapter inside the layer has registered `_no_fused_path` once, so remove only one of these hooks.
            ours += (
                [key for key, each in hooks.items() if each is _no_fused_path][:1] if self._is_fusible(module) else []
            )
            for key in ours:
                del hooks[key]

    def _find(self) -> list[Place]:
        wanted = {id(module): module for module in self.modules if module is not self.model}
        steps_found = ways(self.model, wanted.keys())
        present = {id(child) for _, _, child in steps_found}
        lost = next((module for key, module in wanted.items() if key not in present), None)
        if lost is not None:
            self._raise(lost, f"a {type(lost).__name__} with this adapter is no longer in the model")
        return steps_found

    def _raise(self, module: nn.Module, why: str) -> None:
        where = next((name for name, each in self.model.named_modules() if each is module), None)
        raise Unsupported(f"the adapter {self.name!r} no longer acts: {why}", where=where, cure=_AGAIN)


def ways(model: nn.Module, wanted: Iterable[int]) -> list[Place]:
    """Return each step on the paths from a model down to the modules whose ids are in `wanted`."""
    leads: dict[int, bool] = dict.fromkeys(wanted, True)
    seen: set[int] = set()
    places: list[Place] = []

    def lead(module: nn.Module) -> bool:
        if id(module) not in seen:
            seen.add(id(module))
            for name, child in module._modules.items():
                if child is not None and lead(child):
                    places.append((module, name, child))
                    leads[id(module)] = True
        return leads.get(id(module), False)

    lead(model)
    return places


class _Step:
    """The forward pre-hook of a submodule that contains modules with adapters.

    If code calls the submodule instead of the whole model, this hook checks that the adapters inside still act.

    The hook refers to the submodule and to modules inside it. Its reference to the whole model is weak: otherwise, a
    copy of one block would copy the whole model.

    Args:
        module: the submodule.
        places: the steps (see `Place`) whose parent is the submodule or one of its module lists. Module lists are never
            called, so a hook of a module list would never run.
        home: the model.
    """

    def __init__(self, module: nn.Module, places: list[Place], home: nn.Module) -> None:
        self.module, self.places = module, places
        self.traced = False
        self.home: weakref.ref[nn.Module] | None = weakref.ref(home)
        self.blocks = [parent for parent, name, _ in places if _is_fused_away(name)]

    def __getstate__(self) -> dict[str, object]:
        # A weak reference cannot be pickled. In a copy of the whole model, _WatchHook.__setstate__ sets `home` again.
        return {**self.__dict__, "home": None}

    def __deepcopy__(self, memo: dict[int, object]) -> _Step:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():
            self.note_traced()
            for parent, name, child in self.places:  # torch.compile guards each of these lookups.
                if parent._modules.get(name) is not child:
                    self.look_once()
            return
        _check_no_replica(module)
        for parent, name, child in self.places:
            if parent._modules.get(name) is not child:
                self._look(module)
                break
        if self.blocks and any(parent.__dict__.get("fused_projections") for parent in self.blocks):
            self._look(module)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def note_traced(self) -> bool:
        """Record, during compilation, that the compiled code calls the module."""
        self.traced = True
        return True

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def look_once(self) -> bool:
        """Check the module during compilation; see `_WatchHook.look_once`."""
        self._look(self.module)
        return True

    def _look(self, module: nn.Module) -> None:
        """Check the whole model. If the module is a copy that was made without the model, check only this copy.

        Raises:
            Unsupported: an adapter no longer has an effect, because its module was replaced.
        """
        home = None if self.home is None else self.home()
        if home is not None:
            _hook_of(home).look_again()
            return
        present = {id(each) for each in module.modules()}
        for parent, name, child in self.places:
            lost = parent._modules.get(name) is not child and id(child) not in present
            if not any(HOOK in each.__dict__ for each in child.modules()):
                continue  # The adapter was removed from the copy.
            if lost or (parent.__dict__.get("fused_projections") and _is_fused_away(name)):
                why = f"an adapter no longer acts: {name} in a {type(parent).__name__} was replaced or fused"
                raise Unsupported(why, where=type(module).__name__, cure=_AGAIN)


class _WatchHook:
    """The forward pre-hook of a model with adapters.

    All adapters share one hook, so that modules with several adapters are checked only once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[_Step] = []
        self.steps_of_model: list[Place] = []
        self.watches: list[Watch] = []
        self.places: list[Place] = []
        self.blocks: list[nn.Module] = []
        self.homes: list[nn.Module] = []
        self.around: list[nn.Module] = []
        self.tuners: list[Place] = []
        self.settled = False
        self.forwards: Forwards | None = None
        self.hooks: frozenset[Hook] = frozenset()
        self.below: dict[int, BypassBlock] = {}  # Keyed by the ids of the blocks' modules.
        self.warned: set[int] = set()
        self.end = model.register_forward_hook(self.finish, always_call=True)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "forwards": None, "hooks": {}, "below": {}, "warned": set()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        for step in self.steps:
            step.home = weakref.ref(self.model)
        notice_replacements()

    def add(self, watch: Watch) -> None:
        self.watches.append(watch)
        self._gather()
        self._stand()

    def drop(self, watch: Watch) -> None:
        self.watches.remove(watch)
        self._gather()
        self._stand()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def look_once(self) -> bool:
        """Check the model during compilation; the result is a constant, so the check itself is not traced.

        Raises:
            Unsupported: an adapter no longer acts.
        """
        for watch in self.watches:
            watch.check()
        return True

    def look_again(self) -> None:
        """Check all adapters, and find the current paths of their modules.

        Raises:
            Unsupported: an adapter no longer acts.
        """
        for watch in self.watches:
            watch.check()
        self._gather()
        self._stand()

    def _stand(self) -> None:
        """Remove the hooks in `steps`, and register a new `_Step` with each submodule on the path to an adapter.

        Module lists get no hook, because they are never called.
        """
        for step in self.steps:
            hooks = step.module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is step]:
                del hooks[key]
        places_by_module: dict[int, list[Place]] = {}
        for place in self.places:
            places_by_module.setdefault(id(place[0]), []).append(place)

        def below(module: nn.Module) -> list[Place]:
            steps = places_by_module.get(id(module), [])
            uncalled = [child for _, _, child in steps if type(child).forward is nn.Module.forward]
            return [*steps, *(place for child in uncalled for place in below(child))]

        parents = {id(parent): parent for parent, _, _ in self.places if parent is not self.model}
        called = [each for each in parents.values() if type(each).forward is not nn.Module.forward]
        self.steps_of_model = below(self.model)
        self.steps = [_Step(module, below(module), self.model) for module in called]
        self.below = {id(module): self._block(module, below(module)) for module in called}
        for step in self.steps:
            step.module.register_forward_pre_hook(step)

    def _block(self, module: nn.Module, places: list[Place]) -> BypassBlock:
        """Return a `BypassBlock` for a module, with the hooks of the child modules in `places`.

        If the module already has a `BypassBlock`, the new one keeps the forward that the old one recorded.
        """
        hooks = [child.__dict__[HOOK] for _, _, child in places if HOOK in child.__dict__]
        known = self.below.get(id(module))
        block = BypassBlock(module, hooks)
        if known is not None and known.module is module:
            block.met = known.met
        return block

    def _gather(self) -> None:
        each = {(id(parent), name): (parent, name, m) for w in self.watches for parent, name, m in w.places}
        self.places = list(each.values())
        self.tuners = [place for place in self.places if is_tuner(place[0]) and HOOK in place[2].__dict__]
        self.blocks = list({id(parent): parent for parent, name, _ in self.places if _is_fused_away(name)}.values())
        self.forwards = list({id(module): (module, f) for w in self.watches for module, f in w.forwards}.values())
        modules = {id(module): module for watch in self.watches for module in watch.modules}
        hooks = [module.__dict__[HOOK] for module in modules.values() if HOOK in module.__dict__]
        self.hooks = frozenset(hooks)
        self.settled = False
        self.homes = list({id(m): m for watch in self.watches for m in watch.homes(trained=True)}.values())
        self.around = list({id(m): m for watch in self.watches for m in watch.homes()}.values())

    def __call__(self, model: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():
            for parent, name, child in self.steps_of_model:  # torch.compile guards each of these lookups.
                if parent._modules.get(name) is not child:
                    self.look_once()
            return
        _check_no_replica(model)
        moved = any(parent._modules.get(name) is not module for parent, name, module in self.places)
        if self.forwards is None:
            self._gather()
        for module, forward in self.forwards or ():
            kind: Any = type(module)
            standing = module.__dict__.get("forward")
            if standing is None or kind.forward is not forward:
                moved = True
            elif type(getattr(standing, "__self__", None)) is not ForwardHook and HOOK in module.__dict__:
                probe_forward(module)
        # If FSDP2 is used, it has sharded the parameters by now. It can free the unsharded parameters only if no leaf
        # refers to them.
        if not self.settled:
            for leaf in [leaf for watch in self.watches for leaf in watch.leaves]:
                leaf.settle()
            self.settled = True
        if any("_hf_hook" in home.__dict__ for home in self.homes):
            for watch in self.watches:
                watch.reclaim()
            self._gather()
        if any("_diffusers_hook" in home.__dict__ for home in self.around):
            if torch.is_grad_enabled():
                _check_not_on_disk(self.homes)
            for watch in self.watches:
                take_off_disk(self.around, watch.leaves)
        if moved or any(parent.__dict__.get("fused_projections") for parent in self.blocks):
            self.look_again()
        for parent, name, child in self.tuners:
            check_tuner(parent, child, name)
        if DistributedDataParallel._active_ddp_module is not None:
            for watch in self.watches:
                check_averaged((leaf.tensor for leaf in watch.leaves), watch.name)
        for block in self.below.values():
            block.look()
        begin_calls(self.hooks)

    def finish(self, _model: nn.Module, _args: object, result: object) -> None:
        """Check, after a forward, that each module with an adapter was called if its weight was read.

        If the forward raised an error, torch passes None as the result, and nothing is checked.

        Raises:
            Unsupported: a function of another tool read the weight of a module with an adapter, and the module was not
                called. If the model's own code did this, there is only a warning.
        """
        if torch.compiler.is_compiling():
            self.check_traced()
        else:
            end_calls(self.hooks, result is None, self._is_defined_in, self.warned)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def check_traced(self) -> bool:
        """Warn, during compilation, about modules with adapters that the compiled code does not call.

        Warn about a module only if the compiled code calls a block that contains the module.
        """
        around = [(self.model, self.steps_of_model), *((s.module, s.places) for s in self.steps if s.traced)]
        warn_of_untraced([(module, [child for _, _, child in places]) for module, places in around], self.warned)
        return True

    def _is_defined_in(self, hook: Hook, reader: str) -> bool:
        """Whether `reader` is the full name of a method that a parent of the hook's module defines or inherits."""
        around = [type(parent) for parent, _, child in self.places if child is hook.module]
        kinds = [kind for each in around for kind in each.__mro__]
        return any(reader.startswith(f"{kind.__module__}.{kind.__qualname__}.") for kind in kinds)


def _hook_of(model: nn.Module) -> _WatchHook:
    """Return the `_WatchHook` that is registered with a model; register a new one if there is none."""
    hook_found = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _WatchHook)), None)
    if hook_found is None:
        hook_found = _WatchHook(model)
        model.register_forward_pre_hook(hook_found)
    return hook_found


def _is_fused_away(name: str) -> bool:
    """Whether diffusers can fuse a projection with this name, such as `to_q`, with other projections."""
    return name.rpartition("_")[2] in ("q", "k", "v", "kv")


def _check_no_replica(module: nn.Module) -> None:
    """Check that a module is not a replica of nn.DataParallel.

    The hooks in a replica would read the weights of the first device. They would also run in new threads, in which the
    caller's routes and switches do not apply.

    Raises:
        Unsupported: the module is a replica.
    """
    if "_is_replica" in module.__dict__:
        cure = "Start the script with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one device"
        why = "nn.DataParallel on several devices is not supported"
        raise Unsupported(why, where=type(module).__name__, cure=cure)


def _check_not_on_disk(homes: Sequence[nn.Module]) -> None:
    """Check, in a forward with gradients, that diffusers' group offloading does not keep tensors on disk.

    Raises:
        Unsupported: group offloading keeps tensors on disk. The backward pass would read weights that are no longer in
            memory, and each forward would reset trained tensors to their initial values from the file.
    """
    if on_disk(homes):
        why = "a model that diffusers' group offloading keeps on disk cannot be trained"
        raise Unsupported(why, cure="Call enable_group_offload() without offload_to_disk_path, or run under no_grad()")


def _no_fused_path(_: nn.Module, args: tuple[object, ...]) -> None:
    """A forward pre-hook. An nn.TransformerEncoderLayer with such a hook does not use torch's fused path.

    Raises:
        Unsupported: nn.TransformerEncoder made a nested tensor, which only the fused path can read.
    """
    if args and isinstance(args[0], torch.Tensor) and args[0].is_nested:
        cure = "Call torch.backends.mha.set_fastpath_enabled(False), or pass enable_nested_tensor=False to the encoder"
        raise Unsupported("nn.TransformerEncoder made a nested tensor, which needs torch's fused path", cure=cure)


_AGAIN = "Call handle.remove() before modules are replaced or fused, and inject the adapter again afterwards"
