"""What callers give, checked before anything is done: ids and their mask, rows, numbers of tokens."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Rows = Sequence[int] | Tensor  # which of a Stream's rows


def ids_of(input_ids: Tensor | Sequence, device: torch.device) -> Tensor:
    """(batch, tokens) int64, on the model's device. Raises TypeError for what are no ids, ValueError for none."""
    try:
        ids = torch.as_tensor(input_ids, device=device)
    except (TypeError, ValueError, RuntimeError) as error:  # text, or what a tokenizer returns
        raise TypeError(
            f"append takes ids, (batch, tokens), not this {type(input_ids).__name__} ({error}): "
            'tokenizer(text, return_tensors="pt").input_ids'
        ) from error
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids {tuple(ids.shape)}: an empty prompt, or not (batch, tokens)")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"input_ids are {ids.dtype}; they need an integer dtype")
    return ids.long()


def mask_of(attention_mask: Tensor | Sequence, ids: Tensor) -> Tensor:
    """The mask of ids, shaped like them. Raises ValueError if it does not fit, or has a row without a token."""
    mask = torch.as_tensor(attention_mask, device=ids.device)
    if mask.numel() != ids.numel():
        raise ValueError(f"attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(ids.shape)}")
    mask = mask.reshape(ids.shape)
    if empty := (~mask.bool().any(1)).nonzero().flatten().tolist():
        raise ValueError(f"an empty prompt: row {empty[0]} of input_ids is nothing but padding")
    return mask


def index_of(rows: Rows, held: int, device: torch.device) -> Tensor:
    """Which of so many rows are meant, (n,) int64, each once; of a mask, (held,) bool, those where it is True.

    Raises ValueError for rows that are not there, or none.
    """
    try:
        named = torch.as_tensor(list(rows) if isinstance(rows, range) else rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"rows={rows!r}: this Stream holds {held} rows, name some of them, each once") from error
    if named.numel() and (named.is_floating_point() or named.is_complex()):
        raise ValueError(f"rows={named.tolist()}: this Stream holds {held} rows, name some of them, by whole numbers")
    if named.dtype == torch.bool:
        if named.shape != (held,):
            raise ValueError(f"rows is a mask {tuple(named.shape)}: this Stream holds {held} rows")
        named = named.nonzero()
    index = named.long().flatten().tolist()
    if not index or len(set(index)) < len(index) or min(index) < 0 or max(index) >= held:
        raise ValueError(f"rows={index}: this Stream holds {held} rows, name some of them, each once")
    return torch.tensor(index, device=device)


def rows_of(index: Sequence[int] | Tensor, held: int) -> Tensor:
    """Which of a cache's rows others are to be, (n,) int64, any of them any number of times.

    Raises ValueError for rows that are not there, or none. On a GPU nobody waits to look which they are.
    """
    index = torch.as_tensor(index)
    if index.dim() != 1 or not len(index):
        raise ValueError(f"rows {tuple(index.shape)}: they are (n,), at least one")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise ValueError(f"rows are {index.dtype}; they need an integer dtype")
    if index.device.type == "cpu" and not 0 <= index.min() <= index.max() < held:
        raise ValueError(f"rows reach from {index.min()} to {index.max()}: this SinkCache holds {held} rows")
    return index.long()


def counts_of(n: int | Sequence[int] | Tensor, index: Tensor) -> Tensor:
    """Tokens of the rows `index`: one number for all, or (rows,). Raises ValueError for what is neither."""
    try:
        counts = torch.as_tensor(n, device=index.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"n={n!r}: it needs a number of tokens, or one for each row") from error
    if counts.is_floating_point() or counts.dtype == torch.bool or counts.dim() > 1 or bool((counts < 0).any()):
        raise ValueError(f"n={n}: it needs a number of tokens, or one for each row")
    if counts.dim() == 1 and len(counts) != len(index):
        raise ValueError(f"n has {len(counts)} numbers, for {len(index)} rows")
    return counts


def whole(name: str, n: Any, least: int, of: str = "tokens") -> int:
    """n as a whole number. Raises ValueError for what is none, and for less than `least`."""
    try:
        found = operator.index(n)
    except TypeError:
        found = least - 1
    if isinstance(n, bool) or found < least:
        raise ValueError(f"{name}={n!r}: it needs a whole number of {of}, at least {least}")
    return found
