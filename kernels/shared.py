"""The queries of all rows over keys that all rows share, one token a row, in one launch.

Floor: the shared keys and values, read once, ``num_kv_heads * S * (head_dim + v_head_dim)`` elements, and ``2 *
(head_dim + v_head_dim)`` FLOPs for each query head and key, which tensor cores multiply: a row more costs no more
memory. What is found is handed to decode, which takes it into its own softmax.

A program takes one key head, a block of the query heads that meet it, whichever rows they are of, and a span of the
keys. So that a GPU is busy with few rows as well, the keys are cut in parts, and decode weighs the parts together.

Phases: turn, by the sinks' angle of each row; attend; both as in decode.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2E, LOWEST, attend, limits, load_rows, load_slopes, load_turned, query_scale, tile_dim


@triton.jit(do_not_specialize=["queries", "keys", "window_size", "span"])
def _shared_kernel(
    q,  # (batch, num_kv_heads * GROUP, 1, HEAD_DIM), not rotated
    k_shared,  # (1, num_kv_heads, keys, HEAD_DIM)
    v_shared,  # (1, num_kv_heads, keys, V_DIM)
    lengths,  # (batch,)
    rotation,  # (batch, 1, text | sink, cos | sin, HALF) or None
    alibi_slopes,  # (num_kv_heads * GROUP,) or None
    values,  # (parts, batch, num_kv_heads * GROUP, V_DIM) float32
    logits,  # (parts, batch, num_kv_heads * GROUP) float32
    q_row, q_head, k_head, k_slot, v_head, v_slot,  # strides in elements
    queries,  # batch * GROUP, of a key head
    keys, window_size,
    span,  # keys of a part
    scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HALF: tl.constexpr, START: tl.constexpr, PAIRED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kv_head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
    query = tl.program_id(0) // NUM_KV_HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = query < queries
    row = tl.where(inside, query // GROUP, 0).to(tl.int64)
    head = kv_head * GROUP + query % GROUP
    dim = tl.arange(0, BLOCK_D)[None, :]
    v_dim = tl.arange(0, BLOCK_V)[None, :]

    q_rows = q + (row * q_row + head * q_head)[:, None]
    angles = row[:, None] * (4 * HALF) + 2 * HALF
    q_sink = load_turned(q_rows, inside[:, None], rotation, angles, dim, HEAD_DIM, HALF, START, PAIRED)
    q_sink = q_sink.to(k_shared.dtype.element_ty)
    slopes = None if alibi_slopes is None else load_slopes(alibi_slopes, head, inside)
    seen_from = tl.minimum(tl.load(lengths + row), keys + window_size - 1).to(tl.int32)

    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, keys)
    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_N)
        k_block = load_rows(k_shared + kv_head * k_head, slot, slot < stop, k_slot, dim, HEAD_DIM)
        v_block = load_rows(v_shared + kv_head * v_head, slot, slot < stop, v_slot, v_dim, V_DIM)
        distance = seen_from[:, None] - slot[None, :]
        top, total, acc = attend(
            q_sink, k_block, v_block, 0, 0, slot < stop, slopes, distance, scale, top, total, acc, SOFTCAP, True, False
        )

    place = (tl.program_id(1).to(tl.int64) * (queries // GROUP) + row) * (NUM_KV_HEADS * GROUP) + head
    found = acc / tl.where(total > 0, total, 1.0)[:, None]  # a part may be left without keys
    tl.store(values + place[:, None] * V_DIM + v_dim, found, mask=inside[:, None] & (v_dim < V_DIM))
    tl.store(logits + place, (top + tl.log2(total)) / LOG2E, mask=inside)


def _config(queries: int, widest: int, itemsize: int) -> dict:
    """Launch parameters by the widest tile, as in prefill.py."""
    block_m = min(64, max(16, triton.next_power_of_2(queries)))
    if itemsize == 4:  # exact float32 products are not for tensor cores
        return {"BLOCK_M": min(block_m, 32), "BLOCK_N": 32 if widest <= 64 else 16, "STAGES": 1, "num_warps": 8}
    return {"BLOCK_M": block_m, "BLOCK_N": 64 if widest <= 128 else 32, "STAGES": 2, "num_warps": 4}


def parts_of(q: Tensor, k_shared: Tensor, v_shared: Tensor) -> int:
    """Into how many parts the keys are cut, so that every multiprocessor has a program."""
    queries = len(q) * (q.shape[1] // k_shared.shape[1])
    config = _config(queries, max(tile_dim(q.shape[3]), tile_dim(v_shared.shape[3])), q.element_size())
    programs, keys = max(k_shared.shape[1] * triton.cdiv(queries, config["BLOCK_M"]), 1), k_shared.shape[2]
    parts = max(1, min(limits(q.device)[0] // programs, triton.cdiv(keys, 2 * config["BLOCK_N"]), 16))
    return triton.cdiv(keys, _span(keys, parts, config["BLOCK_N"]))


def _span(keys: int, parts: int, block: int) -> int:
    """Keys of a part, whole blocks."""
    return triton.cdiv(triton.cdiv(keys, parts), block) * block


def attend_shared(
    q: Tensor,
    k_shared: Tensor,
    v_shared: Tensor,
    lengths: Tensor,
    rotation: Tensor | None,
    alibi_slopes: Tensor | None,
    window_size: int,
    scale: float,
    softcap: float,
    rotary_start: int,
    interleaved: bool,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """`sinkattn.ops.attend_shared`, which states the contract, in one kernel; the floor is at the top of this file."""
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, keys, v_dim = v_shared.shape[1:]
    like = dict(dtype=torch.float32, device=q.device)
    values, logits = torch.empty(parts, batch, num_heads, v_dim, **like), torch.empty(parts, batch, num_heads, **like)
    if batch == 0:
        return values, logits
    group, block_d, block_v = num_heads // num_kv_heads, tile_dim(head_dim), tile_dim(v_dim)
    config = _config(batch * group, max(block_d, block_v), q.element_size())
    span = _span(keys, parts, config["BLOCK_N"])
    grid = (num_kv_heads * triton.cdiv(batch * group, config["BLOCK_M"]), parts)
    with torch.cuda.device_of(q):
        _shared_kernel[grid](
            q, k_shared, v_shared, *(x if x is None else x.contiguous() for x in (lengths, rotation, alibi_slopes)),
            values, logits, *q.stride()[:2], *k_shared.stride()[1:3], *v_shared.stride()[1:3],
            batch * group, keys, window_size, span, query_scale(scale, softcap),
            NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, V_DIM=v_dim,
            HALF=0 if rotation is None else rotation.shape[-1], START=rotary_start, PAIRED=interleaved, SOFTCAP=softcap,
            BLOCK_D=block_d, BLOCK_V=block_v, **config,
        )  # fmt: skip
    return values, logits
