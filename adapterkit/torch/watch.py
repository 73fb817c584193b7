"""Detect at the next forward that another tool has removed an adapter from the model.

`quantize_dynamic`, `replace_module` functions and attention fusers replace a module that has an adapter, or a block
around it. The new module runs without the adapter, and nothing else would report that. A tool that deletes a module's
`forward` also removes the adapter. If a tool patches the forward of a module's class, or gives the module another
class, this change has no effect, because the adapter still runs the earlier forward.

The model's own forward checks everything. But users also call a part of a model: its encoder, one block, the layers of
a pipeline stage. So each module on the path from the model to an adapter checks the next step of the path.
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

# Detect at once those removals of an adapter that the model's next forward could not detect.
#
# `Watch` checks the model before each forward. This does not detect the changes of the following tools:
#
# * torch.fx copies a model's modules into a new module (`prepare_fx`) and replaces them there (`convert_fx`). The model
#   itself does not change, and the new module is not watched.
# * torch.fx installs its quantization-aware modules (`prepare_qat_fx`) without triggering module hooks, but these
#   modules take over the weights of the old modules.
# * PEFT's `merge_and_unload` changes the weight under an attached adapter, and puts the wrapped module back in place.
#
# torch can report every module and parameter that is registered with a module. The hooks for these reports are global,
# and cost one call for each registration.


_REGISTERED: list[Any] = []
"""The handles of the global hooks, once they are registered."""


def notice_replacements() -> None:
    """From now on, check every module that replaces another one."""
    if not _REGISTERED:
        _REGISTERED.append(torch_module.register_module_module_registration_hook(_look))
        _REGISTERED.append(torch_module.register_module_parameter_registration_hook(_look_at_weight))


def _look(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Check a module that is being registered with another one.

    Raises:
        Unsupported: the new module replaces a module with an adapter in torch.fx's copy of a model, or the new module
            comes out of a PEFT layer whose merge changed what the adapter computes.
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
    """Check a parameter that is being registered with a module.

    Raises:
        Unsupported: a module of torch.ao takes over the weight of a module that has an adapter.
    """
    if parameter is None or not type(module).__module__.startswith("torch.ao."):
        return
    if any(hook.parts and hook.module._parameters.get(name) is parameter for hook in list(ALIVE)):
        why = f"a {type(module).__name__} takes over the {name} of a module that has an adapter"
        raise Unsupported(why, where=name, cure=_QUANTIZED)


def _carried(module: nn.Module) -> set[int]:
    """Return the ids of the modules in a tree that have an adapter."""
    return {id(each) for each in module.modules() if HOOK in each.__dict__}


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a PEFT layer, which wraps another module."""
    return hasattr(type(module), "merged") and any(k.__module__.startswith("peft.") for k in type(module).__mro__)


def check_tuner(tuner: nn.Module, module: nn.Module, where: str) -> None:
    """Check that PEFT has not merged its adapter into a weight for which the order of the two adapters matters.

    If both changes are additive, their order does not matter.

    Args:
        tuner: the PEFT layer.
        module: the module inside it, with attached adapters.
        where: the module's name.

    Raises:
        Unsupported: PEFT has merged, and one of the two changes is not additive.
    """
    if not is_tuner(tuner) or not getattr(tuner, "merged"):  # noqa: B009 - PEFT's layers have no type
        return
    ours = [update for part in module.__dict__[HOOK].parts for update in part.updates]
    if _is_sum(tuner) and all(update.kind == "additive" and not update.changes_bias for update in ours):
        return
    methods = " and ".join(dict.fromkeys(update.method for update in ours)) or "an adapter"
    why = f"PEFT merged its {_kind(tuner).upper()} into the weight that {methods} changes, so the result differs"
    raise Unsupported(why, where=where, cure="Call handle.merge_() first, or keep PEFT's adapter unmerged")


def _is_sum(tuner: nn.Module) -> bool:
    """Whether a PEFT layer only adds to the weight, and the added change does not depend on the weight."""
    kind = _kind(tuner)
    family = family_of_type(kind.upper())
    method: Any = METHODS.get(kind) if family is None else getattr(family, "method", None)
    return getattr(method, "kind", "") == "additive" and not getattr(tuner, "lora_variant", None)


def _kind(tuner: nn.Module) -> str:
    """Return PEFT's name for the method of one of its layers: the folder name in `peft.tuners`."""
    names = [kind.__module__.split(".") for kind in type(tuner).__mro__ if kind.__module__.startswith("peft.tuners.")]
    return next((parts[2] for parts in names if len(parts) > 3), "adapter")


_QUANTIZED = "Call handle.merge_() before the model is prepared"


# The check before each forward.


Place = tuple[nn.Module, str, nn.Module]
"""(parent, name of the child, child): a step on the path from the model to a module with an adapter."""

Forwards = list[tuple[nn.Module, Any]]
"""(module with an adapter, forward of its class)."""


class Watch:
    """Compare the modules of one adapter with those in the module tree before each forward of the model.

    The check costs one dictionary lookup for each module, for any number of adapters.

    Args:
        model: the model.
        name: the adapter's name, for the error.
        modules: the modules with the adapter's updates.
        leaves: the adapter's tensors.
    """

    def __init__(self, model: nn.Module, name: str, modules: Iterable[nn.Module], leaves: Sequence[Leaf] = ()) -> None:
        self.model, self.name, self.modules, self.leaves = model, name, list(modules), leaves
        self.places = self._find()
        self._forwards: Forwards | None = None
        _hook_of(model).add(self)
        notice_replacements()
        # torch's fused encoder layer reads parameters without calling the modules that hold them, unless one of
        # them has a hook.
        wanted = {id(module) for module in self.modules}
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in wanted for m in module.modules()):
                module.register_forward_pre_hook(_no_fused_path)

    def __getstate__(self) -> dict[str, object]:
        # If the forward of a class was patched after the attachment, the earlier forward cannot be pickled. A copy
        # therefore looks up the current forwards.
        return {**self.__dict__, "_forwards": None}

    @property
    def forwards(self) -> Forwards:
        """Each module with the forward of its class, as at the time the adapter was attached."""
        if self._forwards is None:
            each = [(module, getattr(type(module), "forward", None)) for module in self.modules]
            self._forwards = [(module, forward) for module, forward in each if forward is not None]
        return self._forwards

    def check(self) -> None:
        """Check that every module with an adapter is still in the model and still runs the adapter.

        Raises:
            Unsupported: a module was replaced, has another class, lost the forward that was put on it, or is no longer
                called because its block was fused.
        """
        if any(parent._modules.get(name) is not module for parent, name, module in self.places):
            # A wrapper around the module, such as torch's CheckpointWrapper, changes the module's path but calls the
            # module.
            self.places = self._find()
        for parent, name, _ in self.places:
            # diffusers' fuse_qkv_projections adds one fused projection and keeps the old ones, which are no longer
            # called.
            if parent.__dict__.get("fused_projections") and _is_fused_away(name):
                self._raise(parent, f"{name}: its block runs fused projections instead")
        for module, forward in self.forwards:
            if "forward" not in module.__dict__:
                self._raise(module, f"the forward that was put on a {type(module).__name__} is gone")
            if getattr(type(module), "forward", None) is not forward:
                self._raise(module, f"its class, {type(module).__name__}, has another forward now")

    def reclaim(self) -> None:
        """Move trained tensors out of modules that accelerate now offloads; see leaves.py.

        Raises:
            Unsupported: an optimizer holds the empty parameters that the accelerate library put into these modules.
        """
        reclaim(self.model, self.leaves)
        take_off_disk(self.homes(), self.leaves)

    def homes(self, trained: bool = False) -> list[nn.Module]:
        """Return the modules that hold the adapter's tensors (if `trained`, trained ones) and all modules around."""
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
            layer = isinstance(module, nn.TransformerEncoderLayer)
            hooks = module._forward_pre_hooks
            ours = [] if module is not self.model or hook.watches else [k for k, h in hooks.items() if h is hook]
            if ours:
                hook.end.remove()
            # Each adapter of the model has registered this hook once, so remove it only once.
            ours += [key for key, each in hooks.items() if each is _no_fused_path][:1] if layer else []
            for key in ours:
                del hooks[key]

    def _find(self) -> list[Place]:
        wanted = {id(module): module for module in self.modules if module is not self.model}
        steps_found = ways(self.model, wanted.keys())
        present = {id(child) for _, _, child in steps_found}
        lost = next((module for key, module in wanted.items() if key not in present), None)
        if lost is not None:
            self._raise(lost, f"a {type(lost).__name__} with its update is no longer in the model")
        return steps_found

    def _raise(self, module: nn.Module, why: str) -> None:
        where = next((name for name, each in self.model.named_modules() if each is module), None)
        raise Unsupported(f"the adapter {self.name!r} no longer acts: {why}", where=where, cure=_AGAIN)


def ways(model: nn.Module, wanted: Iterable[int]) -> list[Place]:
    """Return each step on the paths from a model down to some modules, which are given by their ids."""
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

    The hook does the check when code calls this submodule directly instead of the whole model.

    The hook refers only to modules inside the submodule, so that a copy of one block does not copy the model.

    Args:
        module: the submodule.
        places: the steps that start at the submodule, or at a list inside the submodule. Lists are never called, so
            they cannot run hooks themselves.
        home: the model.
    """

    def __init__(self, module: nn.Module, places: list[Place], home: nn.Module) -> None:
        self.module, self.places = module, places
        self.traced = False
        self.home: weakref.ref[nn.Module] | None = weakref.ref(home)
        self.blocks = [parent for parent, name, _ in places if _is_fused_away(name)]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "home": None}  # A weak reference cannot be pickled; the model's hook restores it.

    def __deepcopy__(self, memo: dict[int, object]) -> _Step:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():
            self.note_traced()
            for parent, name, child in self.places:  # The compiler guards each of these steps.
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
        """Check the module during compilation; see `_Hook.look_once`."""
        self._look(self.module)
        return True

    def _look(self, module: nn.Module) -> None:
        """Look for moved modules in the whole model. If the module was copied without its model, look inside the copy.

        Raises:
            Unsupported: an adapter no longer acts.
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
                why = f"an adapter no longer acts: {name} of a {type(parent).__name__} was replaced or fused"
                raise Unsupported(why, where=type(module).__name__, cure=_AGAIN)


class _WatchHook:
    """The forward pre-hook of a model with adapters. All adapters share it: most of them change the same modules."""

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
        """Find the adapters' modules at their current places.

        Raises:
            Unsupported: an adapter no longer acts.
        """
        for watch in self.watches:
            watch.check()
        self._gather()
        self._stand()

    def _stand(self) -> None:
        """Put a hook at each module on the path to an adapter, in place of the earlier hooks."""
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
        """Return the block of a module, with the hooks at the modules inside the block.

        If the block is already known, the returned block keeps the forward that was recorded first.
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
            for parent, name, child in self.steps_of_model:  # The compiler guards each of these steps.
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
        # FSDP2 has sharded the parameters by now, and can free the originals if nothing refers to them.
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
        """Check which weights the forward read and which modules it called.

        If the forward raised an error, torch passes no result.

        Raises:
            Unsupported: the forward read the weight of a module with an adapter without calling the module.
        """
        if torch.compiler.is_compiling():
            self.check_traced()
        else:
            end_calls(self.hooks, result is None, self._is_defined_in, self.warned)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def check_traced(self) -> bool:
        """Warn, during compilation, about modules with adapters that the compiled code does not call.

        The warning names a module only if the compiled code calls a block around it.
        """
        around = [(self.model, self.steps_of_model), *((s.module, s.places) for s in self.steps if s.traced)]
        warn_of_untraced([(module, [child for _, _, child in places]) for module, places in around], self.warned)
        return True

    def _is_defined_in(self, hook: Hook, reader: str) -> bool:
        """Whether a function, given by its full name, is a method of a parent of the hook's module."""
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
    """Whether a module has the name of a projection that diffusers fuses into one."""
    return name.rpartition("_")[2] in ("q", "k", "v", "kv")


def _check_no_replica(module: nn.Module) -> None:
    """Check that a module is not a replica of nn.DataParallel.

    A replica's modules call hooks that read the weights of the first device, in threads without the caller's routes and
    switches.

    Raises:
        Unsupported: the module is a replica.
    """
    if "_is_replica" in module.__dict__:
        cure = "Start the script with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one device"
        why = "nn.DataParallel on several devices is not supported"
        raise Unsupported(why, where=type(module).__name__, cure=cure)


def _check_not_on_disk(homes: Sequence[nn.Module]) -> None:
    """Check that diffusers' group offloading does not keep modules on disk during training.

    Raises:
        Unsupported: group offloading keeps them on disk. The backward pass would read weights that are no longer in
            memory, and each forward would load trained tensors with their initial values.
    """
    if on_disk(homes):
        why = "a model that diffusers' group offloading keeps on disk cannot be trained"
        raise Unsupported(why, cure="Call enable_group_offload() without offload_to_disk_path, or run under no_grad()")


def _no_fused_path(_: nn.Module, args: tuple[object, ...]) -> None:
    """A forward pre-hook whose presence makes torch avoid its fused path.

    Raises:
        Unsupported: nn.TransformerEncoder made a nested tensor, which only the fused path can read.
    """
    if args and isinstance(args[0], torch.Tensor) and args[0].is_nested:
        cure = "Call torch.backends.mha.set_fastpath_enabled(False), or build it with enable_nested_tensor=False"
        raise Unsupported("this nn.TransformerEncoder packs its input for the fused path", cure=cure)


_AGAIN = "Call handle.remove() before modules are replaced or fused, and inject the adapter again afterwards"
