"""Attention over pages (`sinkattn.vllm.paged`, without vLLM), against `sinkattn.reference` over a ring, in float64."""

import pytest
import torch

from sinkattn import reference
from sinkattn.rope import Rope
from sinkattn.vllm import paged

S, W, HEADS, KV_HEADS, DIM, V_DIM = 5, 23, 6, 2, 8, 12
ROPE = Rope(0, False, torch.rand(1, DIM // 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))


class Text:
    """One request: its tokens' queries, keys and values, and the blocks that it holds by now."""

    def __init__(self, tokens: int):
        heads = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM))
        self.q, self.k, self.v = (torch.randn(tokens, *shape, dtype=torch.float64) for shape in heads)
        self.done, self.blocks = 0, []

    def expected(self, softcap: float) -> torch.Tensor:
        """(tokens, HEADS, V_DIM), by the definition."""
        empty = [x.new_zeros(1, KV_HEADS, S + W, x.shape[2]) for x in (self.k, self.v)]
        given = [x.transpose(0, 1)[None] for x in (self.q, self.k, self.v)]
        at, none = torch.arange(len(self.q))[None], torch.zeros(1, dtype=torch.int64)
        table = ROPE.table(torch.stack((at, at.clamp(max=S + W - 1)), dim=-1), at[..., None]).double()
        sizes = dict(sink_size=S, window_size=W, scale=DIM**-0.5, softcap=softcap)
        return reference.attention(*given, *empty, none, None, table, *[None] * 4, **sizes)[0]


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_against_the_ring(block_size, softcap, monkeypatch):
    """Mixed batches: prompts in chunks beside single tokens. Blocks behind the window, but the sinks', hold NaN."""
    monkeypatch.setattr(paged, "QUERIES", 10)
    monkeypatch.setattr(paged, "KEYS", 2 * (S + W))
    texts = [Text(n) for n in (150, 41, 97)]
    chunks = [[40, 30, *[1] * 80], [*[1] * 41], [3, 1, 64, *[1] * 29]]
    blocks = 3 * (150 // block_size + 2)
    pages = torch.full((blocks, KV_HEADS, block_size, DIM + V_DIM), torch.nan, dtype=torch.float64)
    free = torch.randperm(blocks - 1).add(1).tolist()
    found = [[] for _ in texts]
    while any(chunks):
        rows = [i for i, left in enumerate(chunks) if left]
        counts = [chunks[i].pop(0) for i in rows]
        starts, slots, positions = [0], [], []
        for i, count in zip(rows, counts, strict=True):
            text = texts[i]
            for b in range(-(-S // block_size), (text.done - W + 1) // block_size):
                if text.blocks[b]:  # no token of the batch sees it
                    pages[text.blocks[b]] = torch.nan
                    free.append(text.blocks[b])
                    text.blocks[b] = 0
            at = range(text.done, text.done + count)
            while len(text.blocks) * block_size < at.stop:
                text.blocks.append(free.pop())
            slots += [text.blocks[j // block_size] * block_size + j % block_size for j in at]
            positions += at
            starts.append(starts[-1] + count)
        table = torch.zeros(len(rows), max(len(texts[i].blocks) for i in rows), dtype=torch.int32)
        for row, i in zip(table, rows, strict=True):
            row[: len(texts[i].blocks)] = torch.tensor(texts[i].blocks)
        ends = [texts[i].done + count for i, count in zip(rows, counts, strict=True)]
        pieces = paged.plan(starts, torch.tensor(ends, dtype=torch.int32), table, block_size, S, W)
        new = [slice(texts[i].done, end) for i, end in zip(rows, ends, strict=True)]
        q, k, v = (torch.cat([getattr(texts[i], x)[part] for i, part in zip(rows, new, strict=True)]) for x in "qkv")
        t = torch.tensor(positions)
        text_angles, sink_angles = (ROPE.table(x[:, None], t[:, None]).double() for x in (t, t.clamp(max=S + W - 1)))
        paged.append(pages, reference.rotate(k, *text_angles.unbind(2)), v, torch.tensor(slots))
        turned = (reference.rotate(q, *angles.unbind(2)) for angles in (text_angles, sink_angles))
        out = paged.attend(*turned, pages, pieces, S, DIM**-0.5, softcap)
        for i, end, part in zip(rows, ends, out.split(counts), strict=True):
            found[i].append(part)
            texts[i].done = end
    for text, parts in zip(texts, found, strict=True):
        torch.testing.assert_close(torch.cat(parts), text.expected(softcap), rtol=1e-12, atol=1e-12)


def test_no_sinks():
    """Plain window attention, where there are no sinks at all."""
    q, k, v = (torch.randn(40, h, DIM, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS))
    pages = torch.full((3, KV_HEADS, 16, 2 * DIM), torch.nan, dtype=torch.float64)
    paged.append(pages, k, v, torch.arange(40))
    table = torch.arange(3, dtype=torch.int32)[None]
    out = paged.attend(q, q, pages, paged.plan([0, 40], torch.tensor([40]), table, 16, 0, 7), 0, 1.0)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ keys.mT).masked_fill((distance < 0) | (distance >= 7), -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ values).transpose(0, 1), rtol=1e-12, atol=1e-12)
