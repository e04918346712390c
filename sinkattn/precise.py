"""Run a model in float32, whatever the dtype of its weights, without a copy of them.

Half precision is noisy: in a trained model the rounding of two correct computations can differ by more than the spread
of the logits. What a model computes, and whether a patched one computes the same, is therefore looked at in float32:
`Precise` widens the weights one operation at a time, a piece at a time where they are large.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALF = (torch.float16, torch.bfloat16)
CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.half, Tensor.bfloat16}
PIECE = {"cpu": 1 << 20, "cuda": 1 << 26}  # numbers of a weight that are widened at a time


class Precise(TorchFunctionMode):
    """A context in which torch's functions compute in float32 on weights in half precision.

    Embeddings come out as float32; where float32 meets half precision, the latter is widened; nothing is cast down.
    Weights of a class of their own (quantised, sharded) stay as they are: what meets them is cast to their dtype, and
    the result widened again.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            return func(*args, **kwargs)
        if func in CASTS:
            return self._cast(func, args, kwargs)
        if func is F.embedding:
            return _wide(func(*args, **kwargs))
        is_wide, half = False, []
        for x in _tensors((*args, *kwargs.values())):
            is_wide |= x.dtype == torch.float32
            if x.dtype in HALF:
                half.append(x)
        if not half or not is_wide:
            return func(*args, **kwargs)
        own = next((x for x in half if not _is_plain(x)), None)
        if own is not None:
            args, kwargs = _each(lambda x: x.to(own.dtype) if _is_plain(x) and _floats(x) else x, (args, kwargs))
            return tree_map(_wide, func(*args, **kwargs))
        if "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
            dtype = kwargs["out"].dtype if "out" in kwargs else args[0].dtype  # what is written keeps its dtype
            args, kwargs = _each(lambda x: x.to(dtype) if _floats(x) else x, (args, kwargs))
            return func(*args, **kwargs)
        if func is F.linear and not kwargs and args[1].numel() > PIECE.get(args[1].device.type, 0):
            return _linear(*args)
        args, kwargs = _each(_wide, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _cast(func, args, kwargs):
        found = func(*args, **kwargs)
        is_down = args[0].dtype == torch.float32 and found.dtype in HALF
        return args[0].to(found.device) if is_down else found


def _is_plain(x) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def _floats(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _wide(x):
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by a few rows of the weight at a time."""
    rows = max(PIECE[weight.device.type] // weight.shape[1], 1)
    y = torch.cat([F.linear(x.float(), piece.float()) for piece in weight.split(rows)], dim=-1)
    return y if bias is None else y + bias.float()


def _each(f, x):
    """f of every leaf of tuples, lists and dicts: what `tree_map` does, in a third of its time."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {key: _each(f, y) for key, y in x.items()}
    if not isinstance(x, tuple | list):
        return x
    found = [_each(f, y) for y in x]
    return type(x)(*found) if hasattr(x, "_fields") else type(x)(found)


def _tensors(items) -> Iterator[Tensor]:
    for x in items:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x)
