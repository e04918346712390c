"""One new token per row in one launch: rotate it, append it, attend over sinks and window.

Floor: each visible key and value is read once, ``batch * num_kv_heads * min(t + 1, C) * (head_dim + v_head_dim)``
elements over the memory bandwidth (an H200 reads 4.53 TB/s). What else is read and written, and the two FLOPs per
element and query head, are small beside it.

A program takes one key head of one row, all the query heads that share it, and a span of ring slots, in the order in
which they lie: the softmax does not mind. The program of the last span, the home of the new token, also writes that and
takes in the sinks, which meet a query turned by another angle. The last program to arrive combines what all found.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOWEST, attend, capped, load_rows, load_turned, multiprocessors, open_softmax, query_scale, tile_dim


@triton.jit
def _load_ring(k_cache, v_cache, k_slot, v_slot, start, stop, sink_size, ring_size, new_slot, seen,
               dim, v_dim, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of ring slots: k (BLOCK, BLOCK_D), v (BLOCK, BLOCK_V), visible (BLOCK,). The invisible are zero.

    Slots count from the first of the ring. Age counts from the newest token held, which is 0, back around the ring.
    """
    slot = start + tl.arange(0, BLOCK)
    age = new_slot - 1 - slot + tl.where(slot < new_slot, 0, ring_size)
    visible = (slot < stop) & (age < seen)
    k = load_rows(k_cache, sink_size + slot, visible, k_slot, dim, HEAD_DIM)
    v = load_rows(v_cache, sink_size + slot, visible, v_slot, v_dim, V_DIM)
    return k, v, visible


@triton.jit
def _combine(out, partials, tops, totals, pair, others, GROUP: tl.constexpr, V_DIM: tl.constexpr, SPLITS: tl.constexpr,
             SPLIT_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr):  # fmt: skip
    """Weigh together what the programs of a pair found, in the order of the splits: the same bits every time."""
    COLUMNS: tl.constexpr = GROUP * V_DIM  # a query head of the group, and one of its dims
    split = tl.arange(0, SPLIT_TILE)[:, None]
    part = pair.to(tl.int64) * SPLITS + split
    for start in range(0, COLUMNS, COLUMN_TILE):
        column = start + tl.arange(0, COLUMN_TILE)
        inside = ((split < others) | (split == SPLITS - 1)) & (column < COLUMNS)[None, :]
        member = part * GROUP + (column // V_DIM)[None, :]
        top = tl.load(tops + member, mask=inside, other=LOWEST)
        weight = tl.exp2(top - tl.max(top, axis=0, keep_dims=True))
        total = tl.sum(weight * tl.load(totals + member, mask=inside, other=0.0), axis=0)
        acc = tl.load(partials + part * COLUMNS + column[None, :], mask=inside, other=0.0)
        acc = tl.sum(weight * acc, axis=0) / total
        tl.store(out + column, acc.to(out.dtype.element_ty), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["sink_size", "window_size", "ring_size", "span"])
def _decode_kernel(
    q,  # (batch, num_kv_heads * GROUP, 1, HEAD_DIM)
    k,  # (batch, num_kv_heads, 1, HEAD_DIM)
    v,  # (batch, num_kv_heads, 1, V_DIM)
    k_cache,  # (batch, num_kv_heads, sink_size + ring_size, HEAD_DIM)
    v_cache,  # (batch, num_kv_heads, sink_size + ring_size, V_DIM)
    lengths,  # (batch,)
    counts,  # (batch,) or None
    rotation,  # (batch, 1, text | sink, cos | sin, HALF) or None
    learned_logits,  # (num_kv_heads * GROUP,) or None
    out,  # (batch, 1, num_kv_heads * GROUP, V_DIM)
    partials,  # float32: values (pairs, SPLITS, GROUP, V_DIM), maxima and sums (pairs, SPLITS, GROUP); None for one split
    arrivals,  # (pairs,) int32, zero between launches; pairs = batch * num_kv_heads
    q_row, q_head, k_row, k_head, v_row, v_head,  # strides in elements
    k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot,
    sink_size, window_size, ring_size,
    span,  # ring slots per program
    scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,  # ring slots at a time
    ONE_BLOCK: tl.constexpr,  # the span is one block
    SINK_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    split = tl.program_id(1)
    is_home = split == SPLITS - 1
    row = (pair // NUM_KV_HEADS).to(tl.int64)
    head = pair % NUM_KV_HEADS
    member = tl.arange(0, BLOCK_G)  # of the group
    dim = tl.arange(0, BLOCK_D)[None, :]
    v_dim = tl.arange(0, BLOCK_V)[None, :]
    out += pair.to(tl.int64) * GROUP * V_DIM
    tile = member[:, None] * V_DIM + v_dim
    tile_inside = (member[:, None] < GROUP) & (v_dim < V_DIM)

    if counts is not None:
        if tl.load(counts + row) == 0:  # noqa: SIM102: one of them is decided when compiling
            if is_home:
                tl.store(out + tile, tl.zeros((BLOCK_G, BLOCK_V), out.dtype.element_ty), mask=tile_inside)
            return

    t = tl.load(lengths + row)
    written = tl.maximum(t - sink_size, 0)  # tokens that ever went into the ring
    new_slot = (written % ring_size).to(tl.int32)  # the new token's, of the ring; what it holds is no longer visible
    held = tl.minimum(written, ring_size).to(tl.int32)
    seen = tl.minimum(written, window_size - 1).to(tl.int32)
    others = tl.minimum(tl.cdiv(held, span), SPLITS - 1)  # programs with work, besides the home
    if (split >= others) & (split < SPLITS - 1):
        return

    k_cache += row * k_cache_row + head.to(tl.int64) * k_cache_head
    v_cache += row * v_cache_row + head.to(tl.int64) * v_cache_head
    first = split * span
    stop = tl.minimum(first + span, held)
    if ONE_BLOCK:  # asked for before anything is waited for
        k_block, v_block, visible = _load_ring(
            k_cache, v_cache, k_cache_slot, v_cache_slot, first, stop, sink_size, ring_size, new_slot, seen,
            dim, v_dim, HEAD_DIM, V_DIM, BLOCK)  # fmt: skip

    q_rows = q + row * q_row + (head * GROUP + member)[:, None] * q_head
    q_inside = (member < GROUP)[:, None]
    angles = row * (4 * HALF)
    q_text = load_turned(q_rows, q_inside, rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED) * scale
    top, total, acc = open_softmax(None, member, member < GROUP, BLOCK_V)
    QUERIES: tl.constexpr = 0 if DOT else 1  # the axis along which the queries lie in the scores

    if is_home:
        top, total, acc = open_softmax(learned_logits, head * GROUP + member, member < GROUP, BLOCK_V)
        q_sink = load_turned(q_rows, q_inside, rotation, angles + 2 * HALF, dim, HEAD_DIM, HALF, START, PAIRED) * scale
        k_new = load_turned(k + row * k_row + head * k_head, None, rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED)
        k_new = k_new.to(k.dtype.element_ty)  # seen as it is stored
        v_new = tl.load(v + row * v_row + head * v_head + v_dim, mask=v_dim < V_DIM, other=0.0)
        slot = tl.where(t < sink_size, t, sink_size + new_slot)
        tl.store(k_cache + slot * k_cache_slot + dim, k_new, mask=dim < HEAD_DIM)
        tl.store(v_cache + slot * v_cache_slot + v_dim, v_new, mask=v_dim < V_DIM)

        score = capped(tl.sum(tl.where(t < sink_size, q_sink, q_text) * k_new.to(tl.float32), axis=1), SOFTCAP)
        higher = tl.maximum(top, score)
        weight = tl.exp2(score - higher)
        total = total * tl.exp2(top - higher) + weight
        acc += weight[:, None] * v_new.to(tl.float32)
        top = higher

        sinks = tl.minimum(t, sink_size).to(tl.int32)
        q_sink = q_sink.to(k.dtype.element_ty) if DOT else q_sink
        for start in range(0, sinks, SINK_BLOCK):
            slot = start + tl.arange(0, SINK_BLOCK)
            k_sinks = load_rows(k_cache, slot, slot < sinks, k_cache_slot, dim, HEAD_DIM)
            v_sinks = load_rows(v_cache, slot, slot < sinks, v_cache_slot, v_dim, V_DIM)
            visible_sinks = tl.expand_dims(slot < sinks, QUERIES)
            top, total, acc = attend(q_sink, k_sinks, v_sinks, visible_sinks, top, total, acc, SOFTCAP, DOT)

    q_ring = q_text.to(k.dtype.element_ty) if DOT else q_text
    if ONE_BLOCK:
        visible = tl.expand_dims(visible, QUERIES)
        top, total, acc = attend(q_ring, k_block, v_block, visible, top, total, acc, SOFTCAP, DOT)
    else:
        for start in tl.range(first, stop, BLOCK, num_stages=STAGES):
            k_block, v_block, visible = _load_ring(
                k_cache, v_cache, k_cache_slot, v_cache_slot, start, stop, sink_size, ring_size, new_slot, seen,
                dim, v_dim, HEAD_DIM, V_DIM, BLOCK)  # fmt: skip
            visible = tl.expand_dims(visible, QUERIES)
            top, total, acc = attend(q_ring, k_block, v_block, visible, top, total, acc, SOFTCAP, DOT)

    if SPLITS == 1:
        tl.store(out + tile, (acc / total[:, None]).to(out.dtype.element_ty), mask=tile_inside)
    else:
        parts = tl.num_programs(0).to(tl.int64) * SPLITS * GROUP
        tops = partials + parts * V_DIM
        totals = tops + parts
        part = (pair.to(tl.int64) * SPLITS + split) * GROUP
        tl.store(partials + part * V_DIM + tile, acc, mask=tile_inside)
        tl.store(tops + part + member, top, mask=member < GROUP)
        tl.store(totals + part + member, total, mask=member < GROUP)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == others:
            tl.store(arrivals + pair, 0)
            _combine(out, partials, tops, totals, pair, others, GROUP, V_DIM, SPLITS, SPLIT_TILE, COLUMN_TILE)


_arrivals: dict[tuple[torch.device, int, int], Tensor] = {}


def _arrival_counters(k_cache: Tensor) -> Tensor:
    """One int32 per row and key head of a cache; zero before a launch, and zero again after it.

    They belong to the cache's memory, as launches that share it never overlap (they write it), whatever the stream or
    the CUDA graph they run in; counters of a stream would be shared by two graphs captured on it. They are kept for good
    because graphs remember their address. A cache first met during a capture gets counters that its graph zeroes.
    """
    key = (k_cache.device, k_cache.data_ptr(), k_cache.shape[0] * k_cache.shape[1])
    counters = _arrivals.get(key)
    if counters is None:
        counters = torch.zeros(key[2], dtype=torch.int32, device=k_cache.device)
        if not (k_cache.is_cuda and torch.cuda.is_current_stream_capturing()):
            _arrivals[key] = counters
    return counters


@functools.cache
def _config(pairs: int, group: int, sink_size: int, ring_size: int, dims: tuple[int, int], itemsize: int, sms: int):
    """Blocks, splits and warps by shape; ``dims`` are the widths of a key's and a value's tile.

    Few pairs: latency rules. A program has one block, and the home is a program of its own. Many: programs loop over
    their span, loads in flight behind the tensor cores, and there are no more splits than it takes to fill the GPU.
    """
    bytes_per_slot = sum(dims) * itemsize
    blocks_at_once = 2 * sms // pairs
    one_block = 64 if ring_size <= 64 * min(blocks_at_once, 16) else 128
    ...
