"""The rotation that a layer applies, and its angles at any position.

A patched model is fed position 0 for every token, so its own rotation is the identity (times any attention scaling) and
queries and keys arrive unturned. The ops turn them by angles computed here in float64 from integer positions: exact at
position 4,000,000 as at 5, whatever tables or float32 products the model itself would use.
"""

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .backends import has_kernels
from .reference import positions_of


class UnsupportedModelError(ValueError):
    """The model cannot be patched exactly; the message names the layer and the reason. The model is unchanged."""


@dataclass(eq=False)
class Rope:
    """The rotation of one or more layers: pairs of dims, from `start` on, turned by ``position * frequency``.

    frequencies: (sets, r / 2) float64, radians per token. One set, unless the model picks frequencies by sequence
        length (dynamic NTK, longrope).
    set_of_length: (C + 1,) int64, which set serves a row of n tokens, n <= C; longer rows use the last.
    axes: (r / 2,) int64, which of a token's three positions turns a pair (M-RoPE: time, height, width); None for models
        with one.
    """

    start: int
    interleaved: bool
    frequencies: Tensor
    set_of_length: Tensor
    axes: Tensor | None = None
    _on: dict = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo) -> "Rope":
        return self  # immutable, and known by identity

    @property
    def varies(self) -> bool:
        return len(self.frequencies) > 1

    @functools.cached_property
    def form(self) -> dict[str, Any]:
        """What tells it from other rotations, for JSON; frequencies by two sums of them."""
        weights = torch.arange(1, self.frequencies.numel() + 1, dtype=torch.float64)
        flat = self.frequencies.detach().cpu().flatten()
        return {
            "start": self.start,
            "dims": 2 * self.frequencies.shape[1],
            "sets": len(self.frequencies),
            "interleaved": self.interleaved,
            "axes": None if self.axes is None else self.axes.tolist(),
            "frequencies": [float(flat.sum()), float(flat @ weights)],
        }

    def up_to(self, capacity: int) -> "Rope":
        """The same rotation in a smaller cache."""
        return replace(self, set_of_length=self.set_of_length[: capacity + 1], _on={})

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """On a device: frequencies, set_of_length, and (2, 1) float64 what makes a sine the cosine and the sine."""
        if device not in self._on:
            quarter = torch.tensor([[math.pi / 2], [0.0]], dtype=torch.float64)
            self._on[device] = tuple(x.to(device) for x in (self.frequencies, self.set_of_length, quarter))
        return self._on[device]

    def sets(self, lengths: Tensor) -> Tensor:
        """Which frequency set serves rows of `lengths` tokens: any int64 shape in, the same out."""
        set_of_length = self._tables(lengths.device)[1]
        return set_of_length[lengths.clamp(0, len(set_of_length) - 1)]

    def table_of_places(self, places: Tensor) -> Tensor:
        """`table` of tokens with three positions each, (..., 3) int64. Returns (..., 2, r / 2)."""
        return self._cos_sin(places[..., self.axes.to(places.device)], self._tables(places.device)[0][0])

    def table(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``[cos | sin](position * frequency)`` in float32.

        positions: (..., P) int64; lengths: broadcastable to positions, tokens the row holds, which counts if the rope
            `varies`. Returns (..., P, 2, r / 2).
        """
        frequencies = self._tables(positions.device)[0]
        frequencies = frequencies[self.sets(lengths)] if self.varies else frequencies[0]
        return self._cos_sin(positions[..., None], frequencies)

    def table_of_step(self, lengths: Tensor, counts: Tensor | None, tokens: int, capacity: int) -> Tensor:
        """`table` of the tokens of a step, where text sees them and where sinks do: at the end of the cache at most.

        lengths, counts: (batch,) int64, see `positions_of`. capacity: C, tokens. Returns (batch, tokens, 2, 2, r / 2).
        On a GPU one kernel. Not for ropes that vary.
        """
        if has_kernels(lengths.device):
            frequencies = self._tables(lengths.device)[0][0]
            return torch.ops.sinkattn.angles(lengths, counts, frequencies, tokens, capacity)
        text = positions_of(lengths, counts, tokens)
        return self.table(torch.stack((text, text.clamp(max=capacity - 1)), dim=-1))

    def _cos_sin(self, positions: Tensor, frequencies: Tensor) -> Tensor:
        """(..., r / 2 or 1) int64 and (..., r / 2) float64 to ``[cos | sin]``, (..., 2, r / 2) float32.

        Two kernels: cos(x) is sin(x + pi / 2).
        """
        quarter = self._tables(positions.device)[2]
        angles = torch.addcmul(quarter, positions[..., None, :], frequencies[..., None, :])
        return torch.sin(angles, out=torch.empty_like(angles, dtype=torch.float32))


@dataclass(frozen=True)
class ProbedLayer:
    """What one attention does.

    rope: its rotation, None for none. own_window: tokens its own sliding window shows, None for all.
    query_scales: (C,) float32, factor of the query at position ``min(t, C - 1)``, or None where it is 1.
    Of attention that is watched: scale, the factor of the scores; alibi_slopes, (num_heads,) float32 or None;
        heads_first, whether its output is (batch, heads, T, dim) or (batch, T, heads, dim).
    """

    rope: Rope | None
    own_window: int | None = None
    scale: float | None = None
    alibi_slopes: Tensor | None = None
    heads_first: bool = True
    query_scales: Tensor | None = None
