"""Tokens taken back: as if they had not been fed, at every edge of the cache, in any row, twice in a row, and by whoever."""

import copy
import itertools

import pytest
import torch
import transformers

import real
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, UnsupportedModelError, patch
from tiny import FAMILIES, ROPES, tiny

S, W, SLACK = 4, 10, 5
C = S + W
EDGES = (1, S - 1, S, S + 1, C - 1, C, C + 1, 3 * C + 7)


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 97, (rows, tokens))


def fed(model, cache, ids: torch.Tensor, size: int = 7) -> torch.Tensor:
    """The logits of ids, fed in pieces and then token by token."""
    pieces = [*ids[:, :-3].split(size, dim=1), *ids[:, -3:].split(1, dim=1)]
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces if piece.shape[1]], dim=1)


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
def test_as_if_it_had_not_been(name):
    """1 to slack tokens back, twice, then 3 C further: the logits of a text without the detour."""
    model, worst = tiny(name), 0.0
    with patch(model, S, W, slack=SLACK), torch.no_grad():
        for end in EDGES:
            n = int(torch.randint(1, min(end, SLACK) + 1, ()))
            first = int(torch.randint(1, n + 1, ()))  # taken back, fed otherwise, and with the rest taken back again
            ids, other, third = ids_of(1, end - n + 3 * C), ids_of(1, n), ids_of(1, first)
            cache = SinkCache(model)
            fed(model, cache, torch.cat((ids[:, : end - n], other), dim=1))
            cache.crop(-first)
            fed(model, cache, third)
            cache.crop(-n)
            found = fed(model, cache, ids[:, end - n :])
            straight = SinkCache(model)
            fed(model, straight, ids)
            expected = streaming_logits(model_of(name), ids, S, W)[:, end - n :]
            worst = max(worst, relative_error(found, expected))
            assert cache.seen == ids.shape[1] and cache.lengths.tolist() == [ids.shape[1]]
            assert torch.equal(cache.rows.digest, straight.rows.digest)
            assert cache.rows.known()[0].sort().values.tolist() == straight.rows.known()[0].sort().values.tolist()
    assert worst < 1e-4


def model_of(name: str):
    return tiny(name)  # the same weights, not patched
