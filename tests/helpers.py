"""What many tests need: where to run, random ids, an oracle's model, and texts through one cache."""

import functools
import os
import sys

import pytest
import torch

from sinkattn import SinkCache
from tiny import tiny

GPU = os.environ.get("SINKATTN_TEST_GPU") or "cuda"  # the one that tests run on, which need not be current
DEVICES = ["cpu", pytest.param(GPU, marks=pytest.mark.gpu)]


@functools.cache
def plain(name: str = "llama"):
    """A tiny model of two layers that nobody changes."""
    return tiny(name, num_hidden_layers=2)


def random_ids(rows: int, tokens: int, device="cpu") -> torch.Tensor:
    """(rows, tokens) int64, of the vocabulary of tiny models but for padding, 0."""
    return torch.randint(1, 97, (rows, tokens)).to(device)


def left_padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (rows, tokens), of which each row has 7 less than the one before, and their mask."""
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        mask[row, : row * 7] = 0
    return ids.where(mask > 0, 0), mask


@torch.no_grad()
def fed(model, ids: torch.Tensor, size: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a patched model, (rows, tokens, vocabulary): `size` tokens at a time through one new cache."""
    cache, pieces = SinkCache(model), []
    for begin in range(0, ids.shape[1], size):
        more = {} if mask is None else dict(attention_mask=mask[:, : begin + size])
        pieces.append(model(ids[:, begin : begin + size], past_key_values=cache, **more).logits)
    return torch.cat(pieces, dim=1)


def endless(stream, steps: int) -> torch.Tensor:
    """The next ids of a Stream, (rows, steps), greedy."""
    return torch.stack([ids for ids, _ in zip(stream.generate(eos_token_id=[]), range(steps), strict=False)], dim=1)


class Stops:
    """A streamer that fails when it is given tokens for the n-th time, from 0."""

    def __init__(self, n: int, error: type[BaseException] = KeyError):
        self.left, self.error, self.ended = n, error, 0

    def put(self, ids):
        self.left -= 1
        if self.left < 0:
            raise self.error("full")

    def end(self):
        self.ended += 1


class Repeated:
    """Stands for `graph.Captured` on a CPU: a replay runs the step anew, of inputs at fixed places.

    run: a partial function of the cache. As on a GPU, Ctrl-C does not come into it, and it does not end the step.
    """

    def __init__(self, run, device, **inputs):
        self.run, self.inputs = run, {name: x.clone() for name, x in inputs.items()}

    def __call__(self, **inputs):
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return self.run(**self.inputs)
        finally:
            self.run.args[0].tear()
            sys.settrace(trace)
