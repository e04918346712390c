"""How a text agrees with one that a cache holds, of which the ids of sinks and window are known, and a digest of all.

A digest is ``d * BASE + id`` for id after id, modulo 2^64: that of a text follows from its parts', and ids can be taken
back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 6364136223846793005  # of digests, modulo 2^64: odd, so that a digest can be taken back
INVERSE = (pow(BASE, -1, 2**64) + 2**63) % 2**64 - 2**63  # of BASE, as an int64
SURE = 8  # tokens that begin as the row's, or half of that, tell that what differs behind them was edited


class Agreement(NamedTuple):
    """How a text agrees with that of a row.

    length, count: tokens of the row and of the text. first: where the first of those that can be compared differs, or
    any larger number. leading: how many agree before. agreeing, compared: how many do, of how many. is_same: whether
    what is forgotten of both before `first` agrees too. room: tokens that the row can take back now, the first of which
    is fed again.
    """

    length: int
    count: int
    first: int
    leading: int
    agreeing: int
    compared: int
    is_same: int
    room: int

    @property
    def goes_on(self) -> bool:
        """Whether the text begins with all of the row's."""
        return self.length <= min(self.count, self.first) and bool(self.is_same)

    @property
    def back(self) -> int:
        """Tokens to be taken back so that the text goes on, by one token at least."""
        return max(self.length - min(self.first, self.count - 1), 0)

    @property
    def can_follow(self) -> bool:
        """Whether the text is the row's, perhaps edited, so that it goes on once `back` tokens are taken back."""
        kept = self.length - self.back
        is_sure = self.goes_on or (self.seems_meant and (kept >= SURE or 2 * kept >= self.length))
        return bool(self.is_same) and is_sure and self.back <= self.room

    @property
    def seems_meant(self) -> bool:
        """Whether so much agrees that the text is the row's, edited, and not new."""
        return self.leading >= 3 or 2 * self.agreeing > self.compared

    @property
    def likeness(self) -> tuple[bool, int]:
        """The larger, the more it looks like the row's."""
        return self.goes_on, self.agreeing if self.seems_meant else 0

    @property
    def difference(self) -> str:
        """Where the text differs from the row's, in words."""
        if self.goes_on:
            return "in nothing, so that there is nothing new behind it"
        if self.first < min(self.length, self.count):
            return f"from token {self.first} on"
        return f"from token {self.count} on, where it ends" if self.count < self.length else "in what is forgotten"


def powers(n: int, device: torch.device, base: int = BASE) -> Tensor:
    """``base ** i`` for i <= n, modulo 2^64: (n + 1,) int64."""
    powers = torch.full((n + 1,), base, dtype=torch.int64, device=device)
    powers[:1].fill_(1)  # an assignment would copy from the host, which no graph holds
    return powers.cumprod(0)


def digest(ids: Tensor, exponents: Tensor) -> Tensor:
    """The sum of ``id * BASE ** exponent`` of each row, modulo 2^64; exponents below 0 are left out. (batch,) int64."""
    weights = powers(ids.shape[1], ids.device)[exponents.clamp(0, ids.shape[1])]
    return (ids * weights).masked_fill(exponents < 0, 0).sum(1)
