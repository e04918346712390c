"""Attention of a batch of texts over pages of keys and values, in plain PyTorch: what a kernel for it has to compute.

A page is a block of `block_size` tokens of one text. `pages`, (blocks, num_kv_heads, block_size, head_dim +
v_head_dim), has keys and values side by side. `block_table`, (requests, n) int: which block holds the tokens from
``i * block_size`` on. What is computed is `sinkattn.reference.attention`: the query at position t sees position j if
``j <= t`` and (``j < S`` or ``j > t - W``). A kernel takes the place of `attend`, and of `plan`, which is there for it
alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES = 256  # of one request that are attended at once, and
KEYS = 1 << 15  # of requests with one token: what bounds the memory for copies of keys and for scores


@dataclass
class Piece:
    """Tokens that are attended at once, the same number T of each of n requests, and the K keys that any of them sees.

    tokens: (n, T) int64, where they stand in the batch. blocks, offsets: (n, K) int64, where the keys lie; the first S
    are the sinks. visible: (n, T, K) bool. unseen: two of (u,) int64, rows and columns that none of the T tokens sees:
    anything may lie there, also NaN.
    """

    tokens: Tensor
    blocks: Tensor
    offsets: Tensor
    visible: Tensor
    unseen: tuple[Tensor, Tensor]


def plan(
    starts: list[int], lengths: Tensor, block_table: Tensor, block_size: int, sink_size: int, window_size: int
) -> list[Piece]:
    """Cut a batch into pieces: requests with one token together, others alone, by up to 256 tokens.

    starts: (requests + 1) where each request's tokens begin in the batch. lengths: (requests,) int, tokens of each text
    with those of the batch. The device is that of lengths.
    """
    counts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    device = lengths.device
    single, together = [i for i, count in enumerate(counts) if count == 1], max(1, KEYS // (sink_size + window_size))
    groups = [(single[begin : begin + together], 0, 1) for begin in range(0, len(single), together)]
    for i, count in enumerate(counts):
        if count > 1:
            groups += [([i], begin, min(QUERIES, count - begin)) for begin in range(0, count, QUERIES)]
    pieces = []
    for requests, begin, tokens in groups:
        at = torch.tensor([[starts[i] + begin, counts[i] - begin] for i in requests], device=device)
        rows, step = torch.tensor(requests, device=device), torch.arange(tokens, device=device)
        t = (lengths[rows].long() - at[:, 1])[:, None] + step  # (n, T)
        sinks = torch.arange(sink_size, device=device).expand(len(requests), -1)
        window = t[:, :1] + torch.arange(1 - window_size, tokens, device=device)
        j = torch.cat((sinks, window), dim=1)  # (n, K)
        is_own = (torch.arange(j.shape[1], device=device) < sink_size) | (j >= sink_size)  # else a sink, seen as such
        near = (j[:, None] > t[..., None] - window_size) | (j[:, None] < sink_size)
        visible = is_own[:, None] & (j[:, None] <= t[..., None]) & near
        seen = visible.any(1)
        held = j.where(seen, 0)
        blocks = block_table[rows].long().gather(1, held // block_size)
        pieces.append(Piece(at[:, :1] + step, blocks, held % block_size, visible, torch.where(~seen)))
    return pieces


def append(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write new keys and values to their slots, ``block * block_size + offset``, int64 (tokens,). **Mutates** pages.

    key, value: (tokens, num_kv_heads, dim), keys turned to their positions.
    """
    size = pages.shape[2]
    pages[slots // size, :, slots % size] = torch.cat((key, value), dim=-1).to(pages.dtype)


def attend(
    query: Tensor,
    sink_query: Tensor,
    pages: Tensor,
    pieces: list[Piece],
    sink_size: int,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """What every token of a batch finds, (tokens, num_heads, v_head_dim) in query's dtype, which is float32 or wider.

    query, sink_query: (tokens, num_heads, head_dim), turned to t and to ``min(t, C - 1)``. pieces: of `plan`.
    """
    heads, head_dim = query.shape[1:]
    out = query.new_empty(len(query), heads, pages.shape[3] - head_dim)
    kv_heads = torch.arange(pages.shape[1], device=pages.device)[:, None]
    for piece in pieces:
        n, tokens = piece.tokens.shape
        held = pages[piece.blocks[:, None], kv_heads, piece.offsets[:, None]].to(query.dtype)  # (n, kv_heads, K, dims)
        row, column = piece.unseen
        held[row, :, column] = 0
        keys, values = held.split((head_dim, out.shape[2]), dim=-1)
        group = heads // len(kv_heads)

        def rows(x: Tensor, n=n, tokens=tokens, group=group) -> Tensor:  # the queries of a key head together
            return x.view(n, tokens, -1, group, head_dim).transpose(1, 2).flatten(2, 3)

        text, sink = (rows(x[piece.tokens]) for x in (query, sink_query))  # (n, kv_heads, T * group, head_dim)
        scores = torch.cat((sink @ keys[:, :, :sink_size].mT, text @ keys[:, :, sink_size:].mT), dim=-1) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = ~piece.visible.repeat_interleave(group, 1)[:, None]
        found = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
        out[piece.tokens] = found.view(n, -1, tokens, group, out.shape[2]).transpose(1, 2).flatten(2, 3)
    return out
