"""Register the tensors of attached adapters with the model, so that every framework finds them.

Optimizers, Trainers, DDP, FSDP2, ZeRO, `model.to()` and `torch.compile` all use `model.parameters()` and
`model.buffers()`. So each tensor is registered with a module that the model already has: trained tensors as parameters,
all other tensors as non-persistent buffers. Each tensor is read back from its module at every forward, because FSDP2,
`functional_call` and `model.to()` put other tensor objects under the same name.

Rejected alternatives:
* a new child module: all code that loops over `named_modules()` would get a module that the base does not have.
* parametrizations: they rename the base's keys in the state dict.
* the root module: `parameters()` yields a module's own parameters before its children's parameters, so a bf16 model
  would report the adapter's float32 as its dtype (transformers' `model.dtype` is the dtype of the first parameter).

The base's state dict keeps its keys. One hook removes the adapter's keys from the result of `state_dict()`. Another
hook removes them from the missing keys that `load_state_dict()` reports. Both hooks are top-level functions in this
file, so they survive `deepcopy` and `pickle`.

accelerate's offloading loads all parameters of a module from a map of the base's weights, and this map does not contain
the adapter's tensors. So the adapter's tensors (called leaves) are registered with a module above the offloaded
modules. If a model is offloaded after the injection, accelerate replaces each trained leaf's tensor by an empty tensor
on the meta device. So before the next forward, each of these leaves gets its original tensor back, and is registered
with a module above the offloaded modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.updates import Update
from ..errors import Unsupported
from .sharding import gathered_for_forward, put, spread

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys

    from ..io.lazy import Leaf as Value

    Device = torch.device | str | int


PREFIX = "adapterkit:"
"""The prefix of the names of registered tensors. It is not a valid Python identifier, so it does not clash with other
attributes."""


def is_leaf_name(name: str) -> bool:
    """Return whether a dotted name from `named_parameters()` or `named_buffers()` belongs to an attached adapter."""
    return name.rpartition(".")[2].startswith(PREFIX)


@dataclass(eq=False)
class Leaf:
    """One tensor of an attached adapter: the module that holds the tensor, and the tensor's name in this module.

    Attributes:
        staged: the tensor before it is registered and after it is released; None while it is registered.
        first: the parameter that was registered; None if the tensor is a buffer. Once a forward finds another parameter
            under this name, `first` is set to None, so that FSDP2 can free the memory of the replaced parameter.
    """

    module: nn.Module
    name: str
    staged: Tensor | None
    first: nn.Parameter | None = None

    @property
    def tensor(self) -> Tensor:
        """The tensor that the module holds under this name now."""
        # Copy `self.staged` to a variable, because another thread may register or release the leaf meanwhile.
        staged = self.staged
        if staged is not None:
            return staged
        # Read the dictionaries: nn.Module.__getattr__ takes five times as long, and each forward reads every tensor.
        current: Any = self.module._parameters.get(self.name)
        if current is None:
            current = self.module._buffers.get(self.name)
        if current is None:
            current = self.staged  # Another thread has released the leaf.
        tensor: Tensor = getattr(self.module, self.name) if current is None else current
        return tensor

    def register(self) -> None:
        """Register the tensor with the module."""
        assert self.staged is not None
        if isinstance(self.staged, nn.Parameter):
            self.first = self.staged
            self.module.register_parameter(self.name, self.staged)
        else:
            self.module.register_buffer(self.name, self.staged, persistent=False)
        if _leave_out not in self.module._state_dict_hooks.values():
            module: Any = self.module
            module.register_state_dict_post_hook(_leave_out)
            module.register_load_state_dict_post_hook(_forgive)
        guard(self.module, is_leaf_name)
        self.staged = None

    def release(self) -> None:
        """Remove the tensor from the module; if it was the module's last leaf, remove the module's hooks too."""
        self.staged, self.first = self.tensor, None
        self.module._parameters.pop(self.name, None)
        self.module._buffers.pop(self.name, None)
        self.module._non_persistent_buffers_set.discard(self.name)
        if not any(map(is_leaf_name, (*self.module._parameters, *self.module._buffers))):
            for hooks, hook in (
                (self.module._state_dict_hooks, _leave_out),
                (self.module._load_state_dict_post_hooks, _forgive),
            ):
                for key in [key for key, value in hooks.items() if value is hook]:
                    del hooks[key]
            unguard(self.module)

    def put(self, value: Tensor) -> None:
        """Copy a value into the tensor. If the tensor is on the meta device, replace it by a copy of the value."""
        current = self.tensor
        if not current.is_meta or value.is_meta:
            put(current, value)
            return
        copied = value.detach().to(current.dtype, copy=True)
        if isinstance(current, nn.Parameter):
            self.first = nn.Parameter(copied, requires_grad=current.requires_grad)
            self.module._parameters[self.name] = self.first
        else:
            self.module._buffers[self.name] = copied

    def check_loaded(self) -> None:
        """Raise an error if the module's weights were loaded, but the adapter's tensor is still on the meta device.

        On CPU, torch multiplies by a meta tensor without an error, and returns uninitialised memory.

        Raises:
            Unsupported: the tensor is still on the meta device, because `load_state_dict(assign=True)` with a base's
                state dict does not load the adapter's tensors.
        """
        if self.tensor.is_meta:
            beside = [p for name, p in self.module._parameters.items() if p is not None and not is_leaf_name(name)]
            if beside and not any(parameter.is_meta for parameter in beside):
                why = "the adapter's values were lost on the meta device; only the module's weight was loaded again"
                cure = "Call handle.remove() before the model is moved to meta, and inject after its weights are loaded"
                raise Unsupported(why, where=self.name, cure=cure)

    def settle(self) -> None:
        """Set `first` to None if a different parameter now has the leaf's name and is not on the meta device."""
        now = self.module._parameters.get(self.name)
        if now is not self.first and now is not None and not now.is_meta:
            self.first = None

    def reclaim(self, model: nn.Module, hidden: set[int]) -> None:
        """Move the leaf away from a module that accelerate now offloads.

        Args:
            model: the model.
            hidden: the ids of the modules that accelerate offloads; see `offloaded`.

        Raises:
            Unsupported: other code, such as an optimizer, holds the empty parameter that accelerate registered, and
                would train it.
        """
        first = self.first
        if self.module._parameters[self.name].is_meta and first is not None:  # type: ignore[union-attr]
            # The module's dictionary and the call of getrefcount hold one reference each. A third reference means that
            # other code, such as an optimizer, got the empty parameter after the offloading. An optimizer that was made
            # before the offloading is no problem: it holds `first`.
            if sys.getrefcount(self.module._parameters[self.name]) > 2:
                why = "accelerate offloaded the model after the injection, and an optimizer holds the empty parameter"
                cure = "Delete the optimizer, and make a new one from handle.parameters()"
                raise Unsupported(why, where=self.name, cure=cure)
            self.module._parameters[self.name] = first
        home = home_of(model, self.module, hidden)
        for hook in [hook for module in _above(model, self.module) for hook in _hooks_of_accelerate(module)]:
            met = getattr(hook, "original_devices", {})  # accelerate's hook restores every tensor in this dictionary.
            for name in [name for name in met if name.rpartition(".")[2] == self.name]:
                del met[name]
        self.release()
        self.module = home
        while self.name in home._parameters or self.name in home._buffers:
            self.name += "'"
        self.register()


def reclaim(model: nn.Module, leaves: Sequence[Leaf]) -> None:
    """Move a model's trained leaves out of modules that accelerate now offloads; see the module docstring."""
    trained = [leaf for leaf in leaves if leaf.first is not None]
    for leaf in trained:
        leaf.settle()
    hidden = offloaded(model) if trained else set()
    for leaf in trained:
        if id(leaf.module) in hidden and leaf.module._parameters.get(leaf.name) is not None:
            leaf.reclaim(model, hidden)


class LiveUpdates:
    """Updates whose tensors are read from the model at each access.

    Args:
        updates: the updates, with the tensors that they have at the injection.
        leaves: for each update, a map from the names of its tensors to their leaves; None if there are no leaves yet.
    """

    def __init__(self, updates: Sequence[Update], leaves: Sequence[dict[str, Leaf]] | None = None) -> None:
        self._updates, self.leaves = tuple(updates), tuple(leaves or [{} for _ in updates])
        self._seen = self._flat()
        self._outside: tuple[Collection[str], ...] = self.leaves

    def _flat(self) -> tuple[tuple[Leaf, object], ...]:
        """Return each leaf, paired with its tensor in `_updates`."""
        each = zip(self._updates, self.leaves, strict=True)
        return tuple((leaf, update.tensors[name]) for update, leaves in each for name, leaf in leaves.items())

    @property
    def attached(self) -> tuple[Update, ...]:
        """The updates. Their tensors may be outdated, so use only each update's method and tensor names."""
        return self._updates

    @property
    def updates(self) -> tuple[Update, ...]:
        """The updates with the tensors that the model holds now.

        Raises:
            Unsupported: a tensor was left on the meta device; see `Leaf.check_loaded`.
        """
        for leaf, seen_tensor in self._seen:  # A loop is faster than all(), and each layer runs it in each forward.
            if leaf.tensor is not seen_tensor:
                break
        else:
            return self._updates
        now = [{name: leaf.tensor for name, leaf in leaves.items()} for leaves in self.leaves]
        for leaf in [leaf for leaves in self.leaves for leaf in leaves.values()]:
            leaf.check_loaded()
        updates = tuple(update.replace(**tensors) for update, tensors in zip(self._updates, now, strict=True))
        # Under FSDP2 and functional_call, tensors live for one forward only; keeping them would keep their memory
        # allocated.
        if not torch.compiler.is_compiling() and all(type(t) in _KEPT for tensors in now for t in tensors.values()):
            self._updates = updates
            self._seen = self._flat()
        return updates

    def used_in(self, module: nn.Module) -> None:
        """Note which tensors are held outside of the module that computes with the updates; see `running`."""
        inside = set(map(id, module.modules()))
        self._outside = tuple(
            [name for name, leaf in leaves.items() if id(leaf.module) not in inside] for leaves in self.leaves
        )

    @property
    def running(self) -> tuple[Update, ...]:
        """The updates to compute a forward with.

        These are the same as `updates`, but sharded tensors are gathered if they are held outside of the module that
        computes with them. Without a call of `used_in`, all tensors count as outside.
        """
        updates = self.updates
        if updates is self._updates:  # Tensors that are kept are whole, or replicated in every process.
            return updates
        return tuple(map(gathered_for_forward, updates, self._outside))


_KEPT = (Tensor, nn.Parameter)


@dataclass(eq=False)
class Registration:
    """Collects the tensors of one adapter with `bind`, and registers all of them with `commit`.

    Call `commit` after all checks, so that nothing is registered if a check fails.

    Args:
        model: the model.
        adapter: the adapter's name.
        trainable: whether floating-point tensors are registered as parameters. Tensors that the method lists in
            `frozen` are always registered as buffers.
    """

    model: nn.Module
    adapter: str
    trainable: bool
    _staged: dict[Any, Leaf] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._hidden = offloaded(self.model)

    def bind(self, updates: Sequence[Update], holder: nn.Module, like: Tensor, where: str) -> LiveUpdates:
        """Copy the updates' tensors to the device of `like`. `commit` later registers the copies.

        A tensor that several updates share is copied and registered once.

        Args:
            updates: updates with lazy tensors or torch tensors.
            holder: the module whose forward uses the updates; `home_of` chooses the module that holds the copies.
            like: a tensor with the device and dtype to compute with.
            where: the target, which becomes a part of the registered names.

        Returns:
            The same updates, with the copies as their tensors.
        """
        bound, leaves = [], []
        home = home_of(self.model, holder, self._hidden)
        for position, update in enumerate(updates):
            mine, tensors = {}, {}
            for name, value in update.tensors.items():
                trained = self.trainable and name not in update.frozen
                key = id(value), like.device, trained
                if key not in self._staged:
                    label = f"{where}/{position}/{name}" if len(updates) > 1 else f"{where}/{name}"
                    self._staged[key] = Leaf(home, self._free(home, label), owned(value, like, trained, self.model))
                mine[name] = self._staged[key]
                tensors[name] = mine[name].tensor
                if mine[name].module is not home:
                    # FSDP2 frees the weights of a block after its forward, so a leaf that several blocks use must not
                    # belong to one of these blocks.
                    mine[name].module = home_of(self.model, self.model, self._hidden)
            bound.append(update.replace(**tensors))
            leaves.append(mine)
        return LiveUpdates(bound, leaves)

    def commit(self) -> list[Leaf]:
        """Register all leaves that `bind` has collected, and return them."""
        for leaf in self._staged.values():
            leaf.register()
        return list(self._staged.values())

    def _free(self, home: nn.Module, label: str) -> str:
        # Dots would make functional_call and get_parameter look for submodules.
        wanted = PREFIX + f"{self.adapter}:{label}".replace(".", "/")
        name, count = wanted, 1
        while name in self._names or name in home._parameters or name in home._buffers:
            count += 1
            name = f"{wanted}#{count}"
        self._names.add(name)
        return name


def home_of(model: nn.Module, holder: nn.Module, hidden: set[int]) -> nn.Module:
    """Return the module in which to register a leaf that `holder` uses.

    If `holder` has parameters of its own, the result is `holder`, so that FSDP2 and ZeRO gather the leaf together with
    the weight that the leaf changes. Otherwise, the result is the first module inside `holder` that has a parameter of
    its own. If the leaf were registered with `holder` in this case, `parameters()` could yield the leaf before the
    base's first parameter (see the module docstring). If accelerate offloads the chosen module, the result is the
    nearest module above the chosen module that is not offloaded.

    Args:
        model: the model.
        holder: the module whose forward uses the leaf.
        hidden: the ids of the modules that accelerate offloads; see `offloaded`.

    Raises:
        Unsupported: accelerate offloads the chosen module and all modules above it.
    """
    home = next((m for m in holder.modules() if any(not is_leaf_name(n) for n in m._parameters)), holder)
    if id(home) not in hidden:
        return home
    module_found = next((module for module in _above(model, home) if id(module) not in hidden), None)
    if module_found is None:
        why = "accelerate loads all parameters of the model for each forward, from a map without the adapter's tensors"
        cure = "Offload only the model's blocks: remove the model's class from preload_module_classes"
        raise Unsupported(why, where=type(model).__name__, cure=cure)
    return module_found


def offloaded(model: nn.Module) -> set[int]:
    """Return the ids of modules whose parameters accelerate's hooks load for each forward."""
    loaded_ids: set[int] = set()
    for module in model.modules():
        for hook in _hooks_of_accelerate(module):
            if getattr(hook, "offload", False):
                loaded_ids |= {id(each) for each in _loaded_by(hook, module)}
    return loaded_ids


def take_off_disk(modules: Iterable[nn.Module], leaves: Sequence[Leaf]) -> None:
    """Load leaves that diffusers' group offloading keeps on disk, and remove the leaves from the offloading groups.

    A group's tensors are in memory only while the group's module runs. But a module that contains the group's
    module may use a leaf after that. For example, a block uses the leaves of a bottleneck adapter, and an attention
    module uses the leaves of a prefix.
    """
    mine = {id(leaf.tensor) for leaf in leaves}
    for group in _groups_on_disk(modules):
        for tensor in [tensor for tensor in group.tensor_to_key if id(tensor) in mine]:
            key = group.tensor_to_key.pop(tensor)
            del group.key_to_tensor[key]
            with safe_open(group.safetensors_file_path, framework="pt") as file:
                tensor.data = file.get_tensor(key).to(group.onload_device)


def on_disk(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of the tensors that diffusers' group offloading of `modules` keeps on disk.

    Between two forwards, such a tensor contains uninitialised memory. diffusers writes the tensor to a file once, and
    reads the file in each forward. So if an optimizer or a merge changes the tensor, the change is lost.
    """
    return {id(tensor) for group in _groups_on_disk(modules) for tensor in group.tensor_to_key}


class _DiskGroup(Protocol):
    """A group of tensors that diffusers' group offloading keeps on disk."""

    tensor_to_key: dict[Tensor, str]
    key_to_tensor: dict[str, Tensor]
    safetensors_file_path: str
    onload_device: torch.device


def _groups_on_disk(modules: Iterable[nn.Module]) -> list[_DiskGroup]:
    registries = [module.__dict__["_diffusers_hook"] for module in modules if "_diffusers_hook" in module.__dict__]
    groups = [getattr(hook, "group", None) for each in registries for hook in each.hooks.values()]
    return [group for group in groups if _is_on_disk(group)]


def _is_on_disk(group: object) -> TypeGuard[_DiskGroup]:
    return bool(getattr(group, "offload_to_disk_path", None) and getattr(group, "_is_offloaded_to_disk", False))


def check_on_hand(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that tensors of a model are in memory, and not on disk.

    Call this once for all tensors: it looks at all modules of the model.

    Args:
        model: the model.
        tensors: pairs (target, tensor).

    Raises:
        Unsupported: a tensor is on disk; see `on_disk`.
    """
    lost = on_disk(model.modules())
    where = next((target for target, tensor in tensors if id(tensor) in lost), None)
    if where is not None:
        cure = "Create the adapter before enable_group_offload(), or offload without offload_to_disk_path"
        raise Unsupported("diffusers' group offloading keeps this weight on disk", where=where, cure=cure)


def loading_device(model: nn.Module, module: nn.Module) -> Device | None:
    """Return the device to which accelerate's hooks load a module's parameters; None if no hook loads them."""
    for above in _above(model, module):
        for hook in _hooks_of_accelerate(above):
            device: Device | None = getattr(hook, "execution_device", None)
            if device is not None and any(each is module for each in _loaded_by(hook, above)):
                return device
    return None


def put_away(model: nn.Module, tensor: Tensor) -> Tensor | None:
    """Return the values that accelerate stores for an offloaded parameter; None if no hook loads the parameter."""
    for module in model.modules():
        for hook in _hooks_of_accelerate(module):
            weights = getattr(hook, "weights_map", None)
            inside = module.named_parameters(recurse=bool(getattr(hook, "place_submodules", False)))
            name = next((name for name, each in inside if each is tensor), None)
            if weights is not None and name is not None:
                stored_tensor: Tensor = weights[name]
                return stored_tensor
    return None


def names_sharing(model: nn.Module, parameter: Tensor) -> list[str]:
    """Return all names of a parameter. A parameter that tied modules share has several names.

    accelerate's offloading gives each tied module a separate empty parameter. So if the
    parameter is offloaded, an embedding and a head are treated as tied if their weights have the same shape and equal
    stored values, unless the model's config has `tie_word_embeddings = False`.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    names = [name for name, each in named if each is parameter]
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not parameter.is_meta or parameter.ndim != 2 or getattr(config, "tie_word_embeddings", None) is False:
        return names
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    like = [(name, each) for name, each in named if each.is_meta and each.shape == parameter.shape]
    like = [(name, each) for name, each in like if id(parameter) in tables or id(each) in tables]
    stored = put_away(model, parameter) if any(each is not parameter for _, each in like) else None
    if stored is None:
        return names
    values = {id(each): each if each is parameter else put_away(model, each) for _, each in like}
    tied = {
        key for key, value in values.items() if value is not None and not value.is_meta and torch.equal(value, stored)
    }
    return [name for name, each in named if each is parameter or id(each) in tied]


def _loaded_by(hook: object, module: nn.Module) -> Iterator[nn.Module]:
    """Return the modules whose parameters the hook at `module` loads.

    With `preload_module_classes`, the hook loads `module` and all modules inside it.
    """
    return module.modules() if getattr(hook, "place_submodules", False) else iter((module,))


def owned(value: Value, like: Tensor, trained: bool, model: nn.Module) -> Tensor:
    """Copy a leaf's value to the device of `like`.

    If `trained` is true and the value is floating-point, the copy is a parameter in float32 or wider. If `trained` is
    false, a floating-point copy has the dtype that `torch.promote_types` returns for the dtypes of the value and
    `like`, so no precision is lost. But if the value or `like` has an 8-bit dtype, or if `like` is an integer tensor,
    the copy is in float32 or wider.

    If `like` is a DTensor of a tensor-parallel layer, the copy is a DTensor that is replicated in every process.
    """
    from ..io.lazy import as_torch

    tensor = as_torch(value, like.device).detach()
    if tensor.is_floating_point():
        plain = trained or min(tensor.element_size(), like.element_size()) < 2 or not like.is_floating_point()
        wide = torch.float32 if plain else like.dtype
        tensor = tensor.to(wide if tensor.element_size() < 2 else torch.promote_types(tensor.dtype, wide))
    with torch.inference_mode(False):  # A tensor made in inference mode can never be trained.
        own_copy = spread(tensor.clone(), like, model)
        return nn.Parameter(own_copy) if trained and own_copy.is_floating_point() else own_copy


def base_parameters(model: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    """Yield the parameters of a model or module, without the parameters of attached adapters."""
    return (parameter for name, parameter in model.named_parameters(recurse=recurse) if not is_leaf_name(name))


def _hooks_of_accelerate(module: nn.Module) -> list[object]:
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def _above(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """Return the module and all modules that contain it, in the order from the module itself up to the model."""
    path = next(name for name, each in model.named_modules() if each is module)
    parts = path.split(".") if path else []
    return [model.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1)]


def _leave_out(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    for name in (*module._parameters, *module._buffers):
        if is_leaf_name(name):
            state_dict.pop(prefix + name, None)


def _forgive(_module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not is_leaf_name(key)]


# Keep an adapter's values when the module that holds them is converted or emptied.
#
# `model.to()`, `half()`, `to_empty()` and similar methods all call `nn.Module._apply`, which applies a function to
# each tensor of a module. Two of these operations would destroy an adapter's values without an error:
#
# * `to_empty()` replaces every tensor with uninitialised memory. Users then load the base's state dict, which does not
#   contain the adapter's tensors.
# * Casting to an 8-bit storage type (diffusers' `enable_layerwise_casting`, `model.to(torch.float8_e4m3fn)`) rounds the
#   adapter to three bits of mantissa, and layerwise casting does so after every forward.
#
# So each module that holds an adapter's tensors gets its own `_apply`, as an attribute of the instance. In these two
# operations, this `_apply` only moves the adapter's tensors to the new device, and keeps their values and dtype.


APPLY = "_apply"
"""The name of the `nn.Module` method that `to()`, `half()` and all other conversions call."""


class Conversion:
    """Replaces the method `_apply` of a module that holds an adapter's tensors.

    Args:
        module: the module.
        is_leaf: a function that takes the name of a parameter or buffer, and returns whether an adapter owns it.
    """

    def __init__(self, module: nn.Module, is_leaf: Callable[[str], bool]) -> None:
        self.module, self.is_leaf = module, is_leaf
        self.before = module.__dict__.get(APPLY)

    def __call__(self, function: Callable[[Tensor], Tensor], *args: object, **kwargs: object) -> nn.Module:
        """Convert the module's tensors, as `nn.Module._apply` does.

        Raises:
            Unsupported: `to_empty()` was called while the adapter's tensors are on the meta device, so their values are
                lost.
        """
        module: Any = self.module
        named = [*module._parameters.items(), *module._buffers.items()]
        leaves = [(name, tensor) for name, tensor in named if tensor is not None and self.is_leaf(name)]
        empties = getattr(function, "__qualname__", "").startswith("Module.to_empty.")
        lost = next((name for name, tensor in leaves if tensor.is_meta), None)
        if empties and lost is not None:
            why = "to_empty() on a model whose adapter is on the meta device loses the adapter's values"
            cure = "Call handle.remove() before the model is moved to meta, and inject after its weights are loaded"
            raise Unsupported(why, where=lost, cure=cure)
        casts = casts_layerwise(module)
        kept = {id(each) for _, tensor in leaves for each in (tensor, tensor.grad) if each is not None}

        def converted(tensor: Tensor) -> Tensor:
            converted_tensor = function(tensor)
            if id(tensor) not in kept:
                return converted_tensor
            narrow = (
                tensor.is_floating_point()
                and converted_tensor.dtype != tensor.dtype
                and (casts or converted_tensor.dtype.itemsize < 2)
            )
            return tensor.detach().to(converted_tensor.device) if empties or narrow else converted_tensor

        run: Any = self.before or type(module)._apply.__get__(module)
        done: nn.Module = run(converted, *args, **kwargs)
        return done


def guard(module: nn.Module, is_leaf: Callable[[str], bool]) -> None:
    """Replace a module's `_apply`, so that a conversion of the module does not destroy the adapters' values."""
    if not isinstance(module.__dict__.get(APPLY), Conversion):
        module.__dict__[APPLY] = Conversion(module, is_leaf)


def unguard(module: nn.Module) -> None:
    """Restore a module's previous `_apply`."""
    standing = module.__dict__.get(APPLY)
    if isinstance(standing, Conversion):
        del module.__dict__[APPLY]
        if standing.before is not None:
            module.__dict__[APPLY] = standing.before


def casts_layerwise(module: nn.Module) -> bool:
    """Whether diffusers casts the module's weights before and after each forward."""
    return compute_dtype(module) is not None


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype to which diffusers casts the module's weights for each forward; None if it does not cast."""
    hooks = module.__dict__.get("_diffusers_hook")
    dtype: torch.dtype | None = getattr(hooks and hooks.get_hook("layerwise_casting"), "compute_dtype", None)
    return dtype
