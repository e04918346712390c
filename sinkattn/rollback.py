"""Tokens taken back from a cache, as if they had not been fed: how many can be, and how to undo it."""

from collections.abc import Callable

from torch import Tensor


def bound(cache) -> str:
    """Why no more tokens of a SinkCache can be taken back, and what to do, in words."""
    if cache.shares_sinks:
        return f"the {cache.plan.sink_size} sinks that the rows share stay; reset() the cache"
    slack = cache.plan.slack
    return f"a cache that has wrapped keeps slack={slack} for that; give patch() a larger slack, or reset() the cache"


def check_room(cache, counts: Tensor, room: Tensor, note: str = "", or_else: str = "") -> None:
    """Raise ValueError for rows that lose more than they can, counts and room (batch,) int64: see `Rows.room`."""
    if bool((counts > room).any()):
        at = int((counts > room).nonzero()[0])
        raise ValueError(
            f"row {at} can take back {max(int(room[at]), 0)} of its {int(cache.lengths[at])} tokens now, not "
            f"{int(counts[at])}{note}: {bound(cache)}{or_else}"
        )


def take_back(cache, counts: Tensor, columns: int = 0, refeeds: bool = False) -> Callable[[], None]:
    """`SinkCache.crop` by different counts, (batch,) int64. columns: by how many `seen` shrinks. refeeds: whether every
    row that loses tokens gets the first of them again, so that one more than slack can be taken back.

    Returns what undoes it, as long as nothing was fed since.
    """
    cache.activate_past_recording()
    cache.check_whole()
    check_room(cache, counts, cache.rows.room(refeeds))
    rows, seen, unfed = cache.rows, cache.seen, cache.unfed
    before = [x.clone() for x in (rows.lengths, rows.digest)]
    with cache.changing():
        rows.take_back(counts, int(counts.max()))
        cache.seen -= columns
        cache.unfed = None

    def undo() -> None:
        with cache.changing():
            for x, was in zip((rows.lengths, rows.digest), before, strict=True):
                x.copy_(was)
            cache.seen, cache.unfed = seen, unfed

    return undo
