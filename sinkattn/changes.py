"""How to notice that a model was changed, at no cost while it was not.

torch counts hooks, and calls whoever wants to know when a module or a parameter is put anywhere: if the count of both
is the old one, a step of one token need not look. Whenever a prompt begins, the model itself is looked at. What is put
into modules that nobody has looked at does not count: a model that slices its list of layers makes a new list at every
step.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType

from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

_put = 0  # modules and parameters put into `_looked_at`, while any model is patched
_looked_at: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def made() -> int:
    """How many hooks were registered on anything, and modules and parameters on what was looked at: of any size, but it
    never goes back.
    """
    return _put + RemovableHandle.next_id


def watch() -> contextlib.ExitStack:
    """Begin to count what is put into modules. Closing what is returned ends it."""
    stack = contextlib.ExitStack()
    for register in (
        modules.register_module_module_registration_hook,
        modules.register_module_parameter_registration_hook,
    ):
        stack.callback(register(_counted).remove)
    return stack


def _counted(module: nn.Module, *_) -> None:
    global _put
    _put += module in _looked_at


Sight = dict[nn.Module, tuple]
SETTINGS = {int, float, bool, str, FunctionType, MethodType, BuiltinFunctionType}


def sight(model: nn.Module, ours: dict[nn.Module, Callable]) -> Sight:
    """What tells of every module whether it still computes the same from its parameters.

    That is its children, forward, hooks, settings (numbers, names, functions) and kinds of parameters, not what these
    hold. ours: the forwards that sinkattn has put on modules. From now on it counts what is put into any of them.
    """
    _looked_at.update(model.modules())
    return {module: tuple(_traits(module, ours.get(module))) for module in model.modules()}


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


def weights(model: nn.Module) -> tuple[int, ...]:
    """Where all parameters and buffers are: a CUDA graph reads them there."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple(x.data_ptr() if type(x) in (Tensor, nn.Parameter) else id(x) for x in tensors)  # others have no place
