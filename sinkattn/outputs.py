"""What goes into a patched model, and what comes out: arguments cut into chunks, outputs joined, and no gradients."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers.utils import ModelOutput

from .introspect import CACHE_NAMES


class _NoGradient(torch.autograd.Function):
    """Identity whose backward says why there is none."""

    @staticmethod
    def forward(ctx, output, parameter):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "sinkattn runs inference only: there are no gradients through a patched model; remove() it first"
        )


def logits_of(output) -> Tensor:
    """What a model says of its tokens, whatever the class of its output: its first tensor that is more than one number.

    That is ``(batch, tokens, ...)`` logits, hidden states or start_logits, behind losses; of a head that judges a whole
    text, (batch, labels).
    """
    values = output.values() if isinstance(output, dict) else output
    return next(x for x in values if isinstance(x, Tensor) and x.dim() > 1)


def without_cache(output):
    return type(output)(**{name: x for name, x in output.items() if name not in CACHE_NAMES})


def copied(output, cache, **instead):
    """A copy of an output with a cache, if its class has a place for one. instead: of what it has under these names."""
    made = {name: _copy(x) for name, x in {**output, **instead}.items()}
    name = next((name for name in CACHE_NAMES if name in type(output).__dataclass_fields__), None)
    return type(output)(**made, **({} if name is None else {name: cache}))


def _copy(x):
    return x.clone() if isinstance(x, Tensor) else tree_map(lambda y: y.clone() if isinstance(y, Tensor) else y, x)


def cut(arguments: dict, batch: int, widths: list[int]) -> list[dict] | None:
    """The arguments of consecutive chunks of `widths` tokens; None if a tensor belongs to no tokens, as images do.

    arguments: tensors in them are (batch, tokens, ...), (1, tokens, ...) or (tokens,); every chunk gets single numbers.
    """
    tokens = sum(widths)

    def pieces(x):
        if not isinstance(x, Tensor) or x.numel() == 1:
            return [x] * len(widths)
        if x.dim() > 1 and x.shape[0] in (1, batch) and x.shape[1] == tokens:
            return x.split(widths, dim=1)
        return x.split(widths) if x.shape == (tokens,) else None

    leaves, form = tree_flatten(arguments)
    leaves = [pieces(x) for x in leaves]
    return None if None in leaves else [tree_unflatten(list(chunk), form) for chunk in zip(*leaves, strict=True)]


def joined(pieces: list, batch: int, widths: list[int], name: str = "output"):
    """One output from those of consecutive chunks of `widths` tokens: what it would be of all tokens at once.

    Tensors (..., batch, tokens, ...) and (batch * tokens, ...) go on from chunk to chunk, in outputs, tuples and lists
    too; what is the same in all chunks stays. Raises ValueError, naming it, for anything else.
    """
    last = pieces[-1]
    if isinstance(last, dict):
        names = dict.fromkeys(name for piece in pieces for name in piece)
        return type(last)(**{x: joined([piece.get(x) for piece in pieces], batch, widths, x) for x in names})
    if isinstance(last, (tuple, list)) and len({len(piece) for piece in pieces}) == 1:
        return type(last)(joined(list(parts), batch, widths, name) for parts in zip(*pieces, strict=True))
    if all(isinstance(piece, Tensor) for piece in pieces):
        for dim in range(last.dim() - 1):
            if all(piece.shape[dim : dim + 2] == (batch, n) for piece, n in zip(pieces, widths, strict=True)):
                return torch.cat(pieces, dim=dim + 1)
        if all(piece.shape[:1] == (batch * n,) for piece, n in zip(pieces, widths, strict=True)):
            rows = [piece.unflatten(0, (batch, n)) for piece, n in zip(pieces, widths, strict=True)]
            return torch.cat(rows, dim=1).flatten(0, 1)
        is_same = all(piece.shape == last.shape and torch.equal(piece, last) for piece in pieces)
    else:
        is_same = all(piece is last for piece in pieces)
    if not is_same:
        raise ValueError(
            f"{name} of {sum(widths)} tokens cannot be put together from that of chunks, in which a long input goes "
            f"through the model: give at most {max(widths)} tokens at once"
        )
    return last


def finished(output: ModelOutput, model, return_dict: bool | None):
    """The output as the caller wants it, with gradients that say why there are none."""
    if torch.is_grad_enabled():
        parameter = next((p for p in model.parameters() if p.requires_grad), None)
        for name, x in list(output.items()):
            if parameter is not None and isinstance(x, Tensor) and x.is_floating_point():
                output[name] = _NoGradient.apply(x, parameter)
    return output.to_tuple() if return_dict is False else output
