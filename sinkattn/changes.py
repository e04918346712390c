"""How to notice that a model was changed, at no cost while it was not.

torch counts hooks, and calls whoever wants to know when a module or a parameter is put anywhere: if the count of both
is the old one, a step of one token need not look. Whenever a prompt begins, the model itself is looked at. What is put
into modules that nobody has looked at does not count: a model that slices its list of layers makes a new list at every
step.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from .introspect import frequency_buffers, picks_by_length

_put = 0  # modules and parameters put into what was looked at, while any model is patched
# Where modules that were looked at hold their parts. By the places of these dicts: a shallow copy has the same ones,
# and a module may not be hashable while it is made.
_looked_at: dict[int, "weakref.ref[nn.Module]"] = {}


def made() -> int:
    """How many hooks were registered on anything, and modules and parameters on what was looked at: of any size, but it
    never goes back.
    """
    return _put + RemovableHandle.next_id


_watchers = 0
_hooks: list[RemovableHandle] = []


def watch() -> contextlib.ExitStack:
    """Begin to count what is put into modules. Closing what is returned ends it."""
    global _watchers
    _watchers += 1
    if not _hooks:  # one of each for all, so that models that are dropped leave no more
        _hooks.append(modules.register_module_module_registration_hook(_counted))
        _hooks.append(modules.register_module_parameter_registration_hook(_counted))
    stack = contextlib.ExitStack()
    stack.callback(_unwatch)
    return stack


def _unwatch() -> None:
    global _watchers
    _watchers -= 1
    while not _watchers and _hooks:
        _hooks.pop().remove()


def _counted(module: nn.Module, *_) -> None:
    global _put
    if torch.compiler.is_compiling():  # lists that a forward makes: no graph shall depend on what was looked at
        return
    _put += any(id(held) in _looked_at for held in _holding(module))


def moved() -> None:
    """Count that parameters were moved, which other models may hold too."""
    global _put
    _put += 1


def _holding(module: nn.Module) -> Iterator[dict]:
    own = vars(module)
    return (own[name] for name in ("_modules", "_parameters") if name in own)


def _keep_in_sight(module: nn.Module) -> None:
    for place in map(id, _holding(module)):
        if place not in _looked_at:
            _looked_at[place] = weakref.ref(module, lambda _, place=place: _looked_at.pop(place, None))


Sight = dict[nn.Module, tuple]
SETTINGS = {int, float, bool, str, FunctionType, MethodType, BuiltinFunctionType}


def sight(model: nn.Module, ours: dict[nn.Module, Callable]) -> Sight:
    """What tells of every module whether it still computes the same from its parameters.

    That is its children, forward, hooks, settings (numbers, names, functions) and kinds of parameters, not what these
    hold. ours: the forwards that sinkattn has put on modules. From now on it counts what is put into any of them.
    """
    found = {}
    for module in model.modules():
        _keep_in_sight(module)
        found[module] = traits(module, ours.get(module))
    return found


def traits(module: nn.Module, our_forward: Callable | None) -> tuple:
    """What `sight` has of one module."""
    return tuple(_traits(module, our_forward))


def _traits(module: nn.Module, our_forward: Callable | None) -> Iterator:
    own = vars(module)
    forward = own.get("forward")
    yield type(module).forward
    yield None if forward is None or forward == our_forward else forward
    yield bool(module._forward_hooks or module._forward_pre_hooks)
    for name, child in module._modules.items():
        yield name, id(child)
    for name, x in module._parameters.items():
        yield name, type(x), None if x is None else x.dtype
    for name, x in own.items():
        if type(x) in SETTINGS and name not in ("training", "forward"):
            yield name, x


def weights(model: nn.Module) -> tuple:
    """Where all parameters and buffers are, and how they lie there: a CUDA graph reads them so."""
    return tuple(map(place_of, (*model.parameters(), *model.buffers())))


def configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs that its modules hold, which a forward may read."""
    held = (x for module in model.modules() for x in vars(module).values() if isinstance(x, PreTrainedConfig))
    return list({id(x): x for x in held}.values())


def said(x: object, inside: tuple[int, ...] = ()) -> object:
    """What a config says, as a copy that compares: configs of layers that differ raise where they are compared."""
    if isinstance(x, dict):
        return {key: said(y, inside) for key, y in x.items()}
    if isinstance(x, list | tuple):
        return type(x), [said(y, inside) for y in x]
    if isinstance(x, set):
        return frozenset(x)  # in no order
    if not hasattr(x, "__dict__") or callable(x) or id(x) in inside:
        return x
    return type(x), {key: said(y, (*inside, id(x))) for key, y in vars(x).items()}


REACHES = ("sliding_window", "layer_types", "attention_chunk_size")  # what transformers' masks are made from


def reaches(config: PreTrainedConfig) -> dict[str, object]:
    """What a model's config says of how far its layers see."""
    return {name: copy.copy(getattr(config.get_text_config(decoder=True), name, None)) for name in REACHES}


def place_of(x: Tensor) -> tuple:
    """Where a tensor is and how it lies there; of a kind that has no place, which one it is."""
    if type(x) not in (Tensor, nn.Parameter):
        return (id(x),)
    return x.data_ptr(), x.dtype, x.shape, x.stride()


class Lookout:
    """Looks whether a model is still what the patch has found.

    Attributes: version, of what it is computed by: another number after every change that was seen; seen, what the last
    look saw, None before the first; attending, its modules that attend, and what they are in: empty before `begin`.
    """

    def __init__(self, model: nn.Module):
        self.model, self.version = model, 0
        self.seen: tuple | None = None
        self._made = -1  # as `made` was then
        self.attending: dict[nn.Module, nn.Module] = {}
        self._rotaries: list[tuple[str, Tensor]] = []
        self._reaches: dict[str, object] = {}

    def __getstate__(self) -> dict:
        return {**vars(self), "seen": (), "_made": -1}  # a copy is looked at anew

    def begin(self, attending: list[nn.Module]) -> None:
        """Note what was found out and cannot be followed if it changes. attending: the model's attention modules."""
        owners = {child: module for module in self.model.modules() for child in module.children()}
        self.attending = {module: owners[module] for module in attending if module in owners}
        self._rotaries = [
            (f"{path}.{name}".lstrip("."), getattr(module, name).clone())
            for path, module in self.model.named_modules()
            for name in frequency_buffers(module)
            if not picks_by_length(module)
        ]
        self._reaches = reaches(self.model.config)

    @property
    def has_news(self) -> bool:
        """Whether something was put into a model since the last look; nothing before the first one."""
        return self.seen is not None and self._made != made()

    @torch.compiler.disable  # dynamo would trace it, and fails where a module of another model goes meanwhile
    def look(self, fused) -> None:
        """See what has changed. fused: the model's `Fused`, which looks as well, or None.

        Raises RuntimeError for changes that sinkattn cannot follow.
        """
        self._made = made()
        for name, was in self._rotaries:
            now = self.model.get_buffer(name)
            if not torch.equal(now, was.to(now)):
                raise RuntimeError(
                    f"{name} was changed after sinkattn.patch(), which read it: remove() and patch() again"
                )
        for name, reach in reaches(self.model.config).items():
            if self._reaches.get(name, reach) != reach:
                raise RuntimeError(
                    f"{name} of its config was changed after sinkattn.patch(), which found out how far each layer "
                    "sees: remove() and patch() again"
                )
        seen = sight(self.model, {} if fused is None else fused.forwards)
        for module, owner in self.attending.items():
            if module not in seen or all(child is not module for child in owner.children()):
                raise RuntimeError(
                    f"a {type(module).__name__} was taken out or exchanged after sinkattn.patch(), which found out how "
                    "it attends: remove() and patch() again"
                )
        if fused is not None:
            fused.look(seen)
        now = seen, weights(self.model), said(configs(self.model))
        self.version, self.seen = self.version + (now != self.seen), now
