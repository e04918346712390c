"""The last choice of an answer: it belongs to the text, and what comes next feeds it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Unfed(NamedTuple):
    """The last choice of an answer, which is not fed yet.

    ids: (batch, 1). ended: (batch,) bool, rows that it is not of, or None. columns: of the answer, with this one.
    """

    ids: Tensor
    ended: Tensor | None
    columns: int

    def picked(self, index: Tensor) -> "Unfed":
        ids, ended = (None if x is None else x.index_select(0, index.to(x.device)) for x in self[:2])
        return Unfed(ids, ended, self.columns)

    def without(self, rows: Tensor) -> "Unfed":
        """Not of these rows either, index (n,) int64."""
        ended = self.named()["unfed.ended"]
        return self._replace(ended=ended.index_fill(0, rows.to(ended.device), True))

    def named(self) -> dict[str, Tensor]:
        """Its tensors, by the names that saved texts have."""
        ended = torch.zeros_like(self.ids[:, 0], dtype=torch.bool) if self.ended is None else self.ended
        return {"unfed.ids": self.ids, "unfed.ended": ended}
