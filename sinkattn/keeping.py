"""Texts of a cache, taken out of it as `saved.Texts`, and put into one: over rows that hold others, or as all of it.

`saved` has the format, and the way to a file. Where rows share their sinks, texts are as if each had its own.
"""

import torch
from torch import Tensor

from . import saved
from .unfed import Unfed


@torch.no_grad()
def texts_of(cache, kind: str, index: Tensor | None = None, more: dict[str, Tensor] | None = None) -> saved.Texts:
    """What a SinkCache holds. kind: who keeps it, see `saved.read`. index: (n,) int64, of some rows, whose tensors are
    then copied in any case and beside what comes next; None for all. more: tensors, (batch, ...) each, that whoever
    holds the cache adds.

    Raises ValueError if the cache is empty or torn.
    """
    cache.check_holds()
    tensors, unfed = {**cache.rows.named(), **(more or {})}, cache.unfed
    if unfed is not None:
        tensors |= unfed.named()
    facts = dict(
        kind=kind,
        rows=cache.batch_size if index is None else len(index),
        seen=cache.seen,
        has_places=cache.has_places,
        all_known=cache.all_known,
        is_searched=cache.is_searched,
        columns=None if unfed is None else unfed.columns,
    )
    about = saved.about_of(cache.plan, cache.lengths.device, **facts)
    if index is None:
        return saved.Texts(about, {name: x.cpu() for name, x in cache.rows.with_sinks(tensors).items()})
    tensors = {name: x.index_select(0, index.to(x.device)) for name, x in tensors.items()}
    return saved.Texts(about, *saved.on_host(cache.rows.with_sinks(tensors)))


def hold(cache, texts: saved.Texts, index: Tensor) -> None:
    """Let the rows `index`, (n,) int64, of a SinkCache go on as n texts that fit.

    Raises ValueError, before anything is changed, for texts with other sinks than those that the rows share, to the
    bit: of the same tokens, but computed in another batch, they may be others.
    """
    own = {name: texts.on(name, mine.device) for name, mine in cache.rows.named().items()}
    cache.overwrite(index, cache.rows.without_sinks(own), texts.about["all_known"], texts.about["seen"])


def become(cache, texts: saved.Texts, more: dict[str, Tensor] | None = None) -> None:
    """Let a SinkCache hold texts and nothing else. What it holds, a text of one row, shows how the model keeps texts.

    more: as in `texts_of`. Raises ValueError, before anything is changed, for texts that do not fit the model.
    """
    texts.check_fits(cache.plan, {**cache.rows.named(), **(more or {})})
    device, about = cache.lengths.device, texts.about
    cache.reorder_cache(cache.lengths.new_zeros(len(texts)))
    hold(cache, texts, torch.arange(len(texts), device=device))
    if about["columns"] is not None:
        ids, ended = (texts.on(f"unfed.{name}", device).clone() for name in ("ids", "ended"))
        cache.unfed = Unfed(ids, ended, about["columns"])
    cache.has_places, cache.is_searched = about["has_places"], about["is_searched"]
