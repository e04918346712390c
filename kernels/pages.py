"""New tokens of many texts over pages of keys and values, in two launches: turn and append them; attend. In a third,
where few texts have one token each, what programs found that share one is combined.

Floor: that of decode.py for texts with one token, that of prefill.py for others.

A program takes a key head, and as many tokens of one text as fill a tile with all the query heads that share it. The
pages have all that its tokens see: what is new was appended by the launch ahead, and nothing is overwritten.

Phases have the names of decode.py:

* turn, append: `_append_kernel` for keys and values; `load_turned` for queries
* attend: `_attend_kernel`, `tiles.attend`
* combine: `_combine_kernel`
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import _combine
from .prefill import _config as chunk_config
from .tiles import attend, limits, load_rows, load_turned, open_softmax, query_scale, tile_dim


@triton.jit
def _text_of(place, starts, texts, steps, TOKENS: tl.constexpr, LATER: tl.constexpr):
    """Which text a place belongs to, (N,) or one: the last that begins, at starts // TOKENS + LATER * text, no later.
    steps: log2(texts), rounded up."""
    low = place * 0
    high = low + texts
    for _ in range(steps):
        middle = (low + high) // 2
        begins = tl.load(starts + middle) // TOKENS + LATER * middle <= place
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    return low


@triton.jit
def _page_rows(pages, table, position, inside, block_size, page_stride, slot_stride, dim, DIM: tl.constexpr):
    """Rows of the positions (N,) as (N, BLOCK). Zero, and neither they nor their pages' numbers are read, where not
    ``inside``."""
    page = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
    rows = pages + (page * page_stride + position % block_size * slot_stride)[:, None]
    return tl.load(rows + dim, mask=inside[:, None] & (dim < DIM), other=0.0)


@triton.jit(do_not_specialize=["tokens", "texts", "steps", "table_row"])
def _append_kernel(
    k,  # (tokens, NUM_KV_HEADS, HEAD_DIM), not rotated
    v,  # (tokens, NUM_KV_HEADS, V_DIM)
    k_pages,  # (blocks, NUM_KV_HEADS, block_size, HEAD_DIM)
    v_pages,  # (blocks, NUM_KV_HEADS, block_size, V_DIM)
    starts,  # (texts + 1,) int32
    lengths,  # (texts,) int32
    table,  # (texts, n) int32
    rotation,  # (tokens, text | sink, cos | sin, HALF) or None
    out,  # (tokens, NUM_KV_HEADS * GROUP, V_DIM)
    k_token, k_head, v_token, v_head, table_row,  # strides in elements
    k_page, k_page_head, k_slot, v_page, v_page_head, v_slot,
    tokens, texts, steps, block_size,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """New keys, turned, and values into their slots; zeros into the output of padding."""
    index = tl.program_id(0) // NUM_KV_HEADS * BLOCK + tl.arange(0, BLOCK)
    head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)[None, :]
    v_dim = tl.arange(0, BLOCK_V)[None, :]
    inside = (index >= tl.load(starts)) & (index < tl.load(starts + texts))
    text = _text_of(index, starts, texts, steps, 1, 0)
    position = tl.load(lengths + text) + index - tl.load(starts + text)
    entry = text.to(tl.int64) * table_row + position // block_size
    page = tl.load(table + entry, mask=inside, other=0).to(tl.int64)[:, None]
    slot = (position % block_size)[:, None]
    rows = index.to(tl.int64)[:, None]
    angles = tl.minimum(rows, tokens - 1) * (4 * HALF)
    k_rows = k + rows * k_token + head * k_head
    k_tile = load_turned(k_rows, inside[:, None], rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED)
    v_tile = load_rows(v + head * v_head, index, inside, v_token, v_dim, V_DIM)
    k_to = k_pages + page * k_page + head * k_page_head + slot * k_slot + dim
    v_to = v_pages + page * v_page + head * v_page_head + slot * v_slot + v_dim
    tl.store(k_to, k_tile.to(k_pages.dtype.element_ty), mask=inside[:, None] & (dim < HEAD_DIM))
    tl.store(v_to, v_tile, mask=inside[:, None] & (v_dim < V_DIM))

    padding = ((inside == 0) & (index < tokens))[:, None] & (v_dim < V_DIM)
    nothing = tl.zeros((BLOCK, BLOCK_V), out.dtype.element_ty)
    for member in range(GROUP):
        tl.store(out + (rows * NUM_KV_HEADS + head) * (GROUP * V_DIM) + member * V_DIM + v_dim, nothing, mask=padding)


@triton.jit(do_not_specialize=["tokens", "texts", "steps", "table_row", "sink_size", "window_size", "span"])
def _attend_kernel(
    q,  # (tokens, NUM_KV_HEADS * GROUP, HEAD_DIM), not rotated
    k_pages,  # (blocks, NUM_KV_HEADS, block_size, HEAD_DIM), the new keys among it
    v_pages,  # (blocks, NUM_KV_HEADS, block_size, V_DIM), the new values among it
    starts,  # (texts + 1,) int32
    lengths,  # (texts,) int32
    table,  # (texts, n) int32
    rotation,  # (tokens, text | sink, cos | sin, HALF) or None
    out,  # (tokens, NUM_KV_HEADS * GROUP, V_DIM)
    partials,  # float32: outputs (pairs, SPLITS, GROUP, V_DIM), log-sum-exps (pairs, SPLITS, GROUP); None for one split
    q_token, q_head, table_row,  # strides in elements
    k_page, k_page_head, k_slot, v_page, v_page_head, v_slot,
    tokens, texts, steps, block_size, sink_size, window_size,
    span,  # keys of the window per program
    scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr, SOFTCAP: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program
    ONE_BLOCK: tl.constexpr,  # no text has more
    BLOCK_M: tl.constexpr,  # rows, TOKENS * GROUP or more
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SINK_BLOCK: tl.constexpr,  # 0 without sinks
    SPLITS: tl.constexpr,  # programs that share a token, of one token a text
    STAGES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    split = tl.program_id(1)
    text = block if ONE_BLOCK else _text_of(block, starts, texts, steps, TOKENS, 1)
    begin = tl.load(starts + text)
    end = tl.load(starts + text + 1)
    first = begin if ONE_BLOCK else begin + (block - begin // TOKENS - text) * TOKENS
    if first >= end:
        return
    # Positions.
    length = tl.load(lengths + text)
    t_first = length + first - begin
    t_last = length + tl.minimum(first + TOKENS, end) - 1 - begin
    row = tl.arange(0, BLOCK_M)
    token = first + row // GROUP
    inside = (row < TOKENS * GROUP) & (token < end)
    t = length + token - begin

    dim = tl.arange(0, BLOCK_D)[None, :]
    v_dim = tl.arange(0, BLOCK_V)[None, :]
    table += text.to(tl.int64) * table_row
    k_pages += head.to(tl.int64) * k_page_head
    v_pages += head.to(tl.int64) * v_page_head
    heads = head * GROUP + row % GROUP
    rows = tl.where(inside, token, 0).to(tl.int64)
    q_rows = q + (rows * q_token + heads * q_head)[:, None]
    angles = rows[:, None] * (4 * HALF)
    q_text = load_turned(q_rows, inside[:, None], rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED)
    q_text = q_text.to(k_pages.dtype.element_ty)
    top, total, acc = open_softmax(None, heads, inside, BLOCK_V)

    if SINK_BLOCK > 0:
        q_sink = load_turned(q_rows, inside[:, None], rotation, angles + 2 * HALF, dim, HEAD_DIM, HALF, START, PAIRED)
        q_sink = q_sink.to(k_pages.dtype.element_ty)
        sinks = tl.where(split == 0, tl.minimum(t_last + 1, sink_size), 0)
        for start in tl.range(0, sinks, SINK_BLOCK, num_stages=1):
            j = start + tl.arange(0, SINK_BLOCK)
            k_block = _page_rows(k_pages, table, j, j < sinks, block_size, k_page, k_slot, dim, HEAD_DIM)
            v_block = _page_rows(v_pages, table, j, j < sinks, block_size, v_page, v_slot, v_dim, V_DIM)
            visible = j < sinks if TOKENS == 1 else (j < sinks)[None, :] & (j[None, :] <= t[:, None])
            top, total, acc = attend(
                q_sink, k_block, v_block, 0, 0, visible, None, None, scale, top, total, acc, SOFTCAP, True, False
            )

    oldest = tl.maximum(t_first - window_size + 1, sink_size) + split * span
    newest = t_last if SPLITS == 1 else tl.minimum(t_last, oldest + span - 1)
    for start in tl.range(oldest, newest + 1, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        k_block = _page_rows(k_pages, table, j, j <= newest, block_size, k_page, k_slot, dim, HEAD_DIM)
        v_block = _page_rows(v_pages, table, j, j <= newest, block_size, v_page, v_slot, v_dim, V_DIM)
        behind = t[:, None] - j[None, :]
        visible = j <= newest if TOKENS == 1 else (behind >= 0) & (behind < window_size)
        top, total, acc = attend(
            q_text, k_block, v_block, 0, 0, visible, None, None, scale, top, total, acc, SOFTCAP, True, False
        )

    found = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        out_rows = out + (rows * (NUM_KV_HEADS * GROUP) + heads)[:, None] * V_DIM + v_dim
        tl.store(out_rows, found.to(out.dtype.element_ty), mask=inside[:, None] & (v_dim < V_DIM))
    else:
        part = (tl.program_id(0).to(tl.int64) * SPLITS + split) * GROUP + row
        lse = partials + tl.num_programs(0).to(tl.int64) * (SPLITS * GROUP * V_DIM)
        tl.store(partials + part[:, None] * V_DIM + v_dim, found, mask=inside[:, None] & (v_dim < V_DIM))
        tl.store(lse + part, top + tl.log2(total), mask=inside)


@triton.jit
def _combine_kernel(out, partials, starts, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, V_DIM: tl.constexpr,
                    SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0)
    token = tl.load(starts + pair // NUM_KV_HEADS)
    if token < tl.load(starts + pair // NUM_KV_HEADS + 1):
        lse = partials + tl.num_programs(0).to(tl.int64) * (SPLITS * GROUP * V_DIM)
        out += (token.to(tl.int64) * NUM_KV_HEADS + pair % NUM_KV_HEADS) * (GROUP * V_DIM)
        _combine(out, partials, lse, pair, SPLITS, GROUP, V_DIM, SPLITS, SPLIT_TILE, COLUMN_TILE)


def _config(most: int, group: int, pairs: int, window_size: int, widest: int, itemsize: int, sms: int) -> dict:
    """Launch parameters. most: tokens of a text. With one each, as many programs share a key head as fill the GPU."""
    meta = chunk_config(most * group, widest, itemsize) | {"SPLITS": 1}
    meta["BLOCK_M"] = max(meta["BLOCK_M"], triton.next_power_of_2(group))
    meta["TOKENS"] = meta["BLOCK_M"] // group
    if most == 1:
        blocks = triton.cdiv(window_size, meta["BLOCK_N"])
        meta |= {"TOKENS": 1, "SPLITS": max(1, min(3 * sms // max(pairs, 1), 16, blocks)), "STAGES": 2}
    return meta | {"ONE_BLOCK": most <= meta["TOKENS"]}


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    rotation: Tensor | None,
    sink_size: int,
    window_size: int,
    scale: float,
    softcap: float = 0.0,
    rotary_start: int = 0,
    interleaved: bool = False,
    max_tokens: int = 0,
) -> Tensor:
    """`sinkattn.ops.attend_pages`, which states the contract; the launches are at the top of this file."""
    (tokens, num_heads, head_dim), (num_kv_heads, v_dim), texts = q.shape, v.shape[1:], len(lengths)
    if texts == 0:
        return q.new_zeros(tokens, num_heads, v_dim)
    out = q.new_empty(tokens, num_heads, v_dim)
    if tokens == 0:
        return out
    group, block_d, block_v = num_heads // num_kv_heads, tile_dim(head_dim), tile_dim(v_dim)
    most, steps = min(max_tokens or tokens, tokens), (texts - 1).bit_length()
    widest, sms = max(block_d, block_v), limits(q.device)[0]
    meta = _config(most, group, texts * num_kv_heads, window_size, widest, q.element_size(), sms)
    splits, blocks = meta["SPLITS"], texts if meta["ONE_BLOCK"] else tokens // meta["TOKENS"] + texts
    span = triton.cdiv(triton.cdiv(window_size, splits), meta["BLOCK_N"]) * meta["BLOCK_N"]
    starts, lengths, rotation = (x if x is None else x.contiguous() for x in (starts, lengths, rotation))
    shape = {"NUM_KV_HEADS": num_kv_heads, "GROUP": group, "V_DIM": v_dim}
    turn = {"HALF": 0 if rotation is None else rotation.shape[-1], "START": rotary_start, "PAIRED": interleaved}
    tiles = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_V": block_v}
    strides = block_table.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3]
    copy_block = min(2**12 // widest, max(16, triton.next_power_of_2(tokens)))
    with torch.cuda.device_of(q):
        _append_kernel[(triton.cdiv(tokens, copy_block) * num_kv_heads,)](
            k, v, k_pages, v_pages, starts, lengths, block_table, rotation, out, *k.stride()[:2], *v.stride()[:2],
            *strides, tokens, texts, steps, k_pages.shape[2], **shape, **turn, **tiles, BLOCK=copy_block,
        )  # fmt: skip
        partials = None
        if splits > 1:
            partials = q.new_empty(texts * num_kv_heads * splits * group * (v_dim + 1), dtype=torch.float32)
        _attend_kernel[blocks * num_kv_heads, splits](
            q, k_pages, v_pages, starts, lengths, block_table, rotation, out, partials, *q.stride()[:2], *strides,
            tokens, texts, steps, k_pages.shape[2], sink_size, window_size, span, query_scale(scale, softcap),
            **shape, **turn, **tiles, SOFTCAP=softcap,
            SINK_BLOCK=min(max(16, triton.next_power_of_2(sink_size)), meta["BLOCK_N"]) if sink_size else 0,
            **meta,
        )  # fmt: skip
        if splits > 1:
            tile = triton.next_power_of_2(splits)
            column_tile = min(triton.next_power_of_2(group * v_dim), max(64, 2**13 // tile))
            _combine_kernel[(texts * num_kv_heads,)](
                out, partials, starts, **shape, SPLITS=splits, SPLIT_TILE=tile, COLUMN_TILE=column_tile
            )
    return out
