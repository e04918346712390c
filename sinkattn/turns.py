"""How the ids that `generate` is given go on behind the text that a cache holds.

They are the whole history with what is new, or the new ids alone, see `SinkCache`. Of a history that was edited, the
tokens from where it differs are taken back; before new ids, the last token of an answer is fed, which was only chosen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .agreement import Agreement
from .cache import SinkCache
from .introspect import CACHE
from .rollback import bound, take_back

BY_TOKEN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")  # a column for each token


def padded_left(ids: Tensor, pad: int, kwargs: dict, cache: SinkCache | None) -> Tensor:
    """ids, and in kwargs what belongs to them, with padding, ids that are `pad`, brought to the left.

    cache: that holds a text, or None. Pad ids in an answer that can be taken back no more are none in its history.
    """
    real = ids != pad
    if real.all():
        return ids
    order = real.int().argsort(dim=1, stable=True)
    if cache is not None:
        behind_first = real.cumsum(1) > 0
        as_padding = cache.compare(ids.gather(1, order), real.gather(1, order))
        both = zip(as_padding, cache.compare(ids, behind_first), strict=True)
        likelier = torch.tensor([text.likeness > row.likeness and not row.can_follow for row, text in both])
        real = torch.where(likelier[:, None].to(real.device), behind_first, real)
        order = real.int().argsort(dim=1, stable=True)
    if not real[:, -1].all():
        raise ValueError(
            f"input_ids end with the pad token, {pad}, which is padding where no attention_mask says otherwise: "
            "pad on the left"
        )
    kwargs["attention_mask"] = real.to(ids.dtype)
    for name in BY_TOKEN:
        if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape == ids.shape:
            kwargs[name] = kwargs[name].gather(1, order)
    return ids.gather(1, order)


def go_on(
    model, cache: SinkCache, ids: Tensor, pad: int | None, kwargs: dict, is_history: bool = False
) -> Callable[[], None] | None:
    """Tell `generate` what of ids, (batch, width), is new to a cache that holds a text.

    It slices off as many columns as the cache says to have seen, if the mask has as many as ids; columns of rows
    with less that is new than others are then padding. pad: the id that is padding, or None. is_history: whether ids
    are known to be the text, so that it may be one short piece over and over.

    Returns what undoes the taking back of tokens, if any were.
    """
    (batch, width), mask = ids.shape, kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.dim() != 2:
        return None  # an error of transformers' own
    seen, last = cache.seen, 0 if cache.unfed is None else 1
    if mask.shape[0] != batch or mask.shape[1] not in (width, seen + width, seen + width + last):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} does not fit {batch} rows of {width} ids after {seen}: give "
            f"({batch}, {width}), or ({batch}, {seen + width}) if all of them are new"
        )
    real = mask[:, -width:] > 0
    if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError(
            "attention_mask has zeros after ones, as behind a row that ended early: pad on the left, with all that "
            "belongs to a row at its end"
        )
    if mask.shape[1] == width:
        rows = cache.compare(ids, real)
        telling = [x for x, is_one in zip(rows, cache.rows.are_one_piece(), strict=True) if is_history or not is_one]
        if telling and all(row.can_follow for row in rows):
            new = [row.count - row.length + row.back for row in rows]
            if max(new) == width and min(new) < width:
                raise ValueError(
                    f"row {new.index(width)} of input_ids has a text, and this SinkCache holds none for it: "
                    "reset() it or make another"
                )
            back, undo = torch.tensor([row.back for row in rows], device=cache.lengths.device), None
            if any(row.back for row in rows):
                undo = take_back(cache, back, refeeds=True)
            kwargs["attention_mask"] = _history(cache, new, real).to(ids.dtype)
            return undo
        if any(row.seems_meant for row in telling):
            at = next(i for i, row in enumerate(rows) if not row.can_follow)
            raise ValueError(
                f"row {at} of input_ids differs from the text that this SinkCache holds {rows[at].difference}, and "
                f"{_why_not(cache, rows[at])}. If all ids are new, say so by an attention_mask of ({batch}, "
                f"{seen + width})"
            )
    if cache.is_searched:
        raise ValueError(
            "the rows of this SinkCache are the beams of a search, not the texts that it returned: reset() it"
        )
    if pad is not None and cache.unfed is not None:
        _drop_pads(model, cache, pad)
    if mask.shape[1] == width:
        real = _without_fed(cache, ids, real)
    _feed_last(model, cache, ids, real, is_told=mask.shape[1] == seen + width + 1)
    columns = torch.arange(cache.seen, device=ids.device)
    before = columns >= (cache.seen - cache.lengths[:, None]).to(ids.device)
    kwargs["attention_mask"] = torch.cat((before, real), dim=1).to(ids.dtype)
    return None


def _why_not(cache: SinkCache, row: Agreement) -> str:
    if cache.has_state:
        return "a model with a state takes no tokens back: reset() it or make another"
    if not row.is_same:
        return "what is forgotten cannot be taken back: reset() it or make another"
    if row.back > row.room:
        return f"it can take back {row.room} tokens now, not {row.back}: {bound(cache)}, or make another"
    return f"too little of it agrees to take {row.back} tokens back: crop() or reset() it, or make another"


def _history(cache: SinkCache, new: list[int], real: Tensor) -> Tensor:
    """Let `generate` slice the history off ids that begin with it; returns the mask, (batch, width). new: tokens
    of each row behind it.
    """
    width = real.shape[1]
    cache.seen = width - max(new)
    columns, behind = torch.arange(width, device=real.device), torch.tensor(new, device=real.device)
    return torch.where(columns < cache.seen, real, columns >= width - behind[:, None])


def _drop_pads(model, cache: SinkCache, pad: int) -> None:
    """Take pad ids out of the last answer, as `generate` does if it is given the whole text, if they can be."""
    unfed, device = cache.unfed, cache.lengths.device
    fed = cache.rows.last(min(unfed.columns - 1, cache.rows.smallest))
    is_pad, room = fed == pad, cache.rows.room(True)
    is_pad &= fed.shape[1] - torch.arange(fed.shape[1], device=device) <= room[:, None]
    if is_pad.any():
        behind = is_pad.cumsum(1) > 0  # all from the first of them on is taken back, and fed again without them
        take_back(cache, behind.sum(1), refeeds=True)
        if (again := behind & ~is_pad).any():
            order = again.int().argsort(dim=1, stable=True)
            _feed(model, cache, fed.gather(1, order), again.gather(1, order))
        cache.unfed = unfed
    if (is_pad := unfed.ids[:, 0] == pad).any():
        cache.unfed = unfed.without(is_pad.nonzero()[:, 0])


def _begin_with(last: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Whether the first of each row's new ids is its own of last, (batch, 1)."""
    return ids.gather(1, real.int().argmax(1, keepdim=True)).to(last) == last


def _without_fed(cache: SinkCache, ids: Tensor, real: Tensor) -> Tensor:
    """real, (batch, width), without an answer's last token where ids begin with it: a call that failed has fed it."""
    if cache.fed_for_nothing is None or cache.fed_for_nothing[0] != cache.changes:
        return real
    last, ended = (None if x is None else x.to(ids.device) for x in cache.fed_for_nothing[1][:2])
    begins = _begin_with(last, ids, real)
    begins = begins if ended is None else begins & ~ended[:, None]
    real = real & ~(begins & (real.cumsum(1) == 1))
    if not real[:, -1].all():
        raise ValueError("the last token of the answer was fed by a call that failed: give what comes behind it")
    return real


def _feed_last(model, cache: SinkCache, ids: Tensor, real: Tensor, is_told: bool) -> None:
    """Feed the last token of an answer to the rows that have one and whose new ids do not begin with it."""
    if cache.unfed is None:
        return
    last, ended = (None if x is None else x.to(cache.lengths.device) for x in cache.unfed[:2])
    misses = torch.ones_like(last, dtype=torch.bool) if is_told else ~_begin_with(last, ids, real)
    misses = misses if ended is None else misses & ~ended[:, None]
    if misses.any():
        _feed(model, cache, last, misses)


def _feed(model, cache: SinkCache, ids: Tensor, mask: Tensor) -> None:
    model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, use_cache=True)
