"""Any shape and any stride, drawn by hypothesis: slots against a list, compiled CPU ops against the reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import EIGHT_BITS, TOLERANCES, Case, copies, same_bits, with_cpu_library
from sinkattn import ops, reference


@given(sink=st.integers(0, 6), ring=st.integers(1, 9), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_slot_arithmetic(sink, ring, lengths):
    """`slot_of` and `held_positions` against a list that is written to token by token."""
    rows = []
    for length in lengths:
        held, oldest = [-1] * (sink + ring), sink
        for position in range(length):
            if position < sink + ring:  # slots fill up in order
                slot = position
            else:  # and then the oldest token that is no sink makes room
                slot, oldest = held.index(oldest), oldest + 1
            assert reference.slot_of(torch.tensor(position), sink, ring) == slot
            held[slot] = position
        rows.append(held)
    assert reference.held_positions(torch.tensor(lengths), sink, ring).tolist() == rows


@st.composite
def calls(draw):
    """A case that the compiled CPU ops take, the order in which batch, heads and tokens lie in memory, and a seed."""
    ints, flag = lambda *ends: draw(st.integers(*ends)), lambda: draw(st.booleans())  # noqa: E731
    head_dim = draw(st.integers(1, 70) | st.sampled_from((96, 128, 256)))
    start = ints(0, head_dim - 1)
    kv_heads, window, tokens, rows = ints(1, 3), ints(1, 150), draw(st.just(1) | st.integers(2, 90)), ints(1, 3)
    lengths = st.integers(0, 400) | st.integers(0, 10**12)
    case = Case(
        lengths=tuple(draw(lengths) for _ in range(rows)),
        counts=tuple(ints(0, tokens) for _ in range(rows)) if flag() else None,
        tokens=tokens,
        heads=kv_heads * ints(1, 9),
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_dim=draw(st.none() | st.integers(1, 70)),
        sink=ints(0, 80),
        window=window,
        ring=window + ints(0, 20),
        rotary=2 * ints(0, (head_dim - start) // 2),
        start=start,
        interleaved=flag(),
        learned=flag(),
        alibi=flag(),
        softcap=draw(st.sampled_from((0.0, 2.0, 30.0))),
        dense=draw(st.none() | st.integers(0, 200)) if tokens > 1 else None,
        stored=draw(st.none() | st.sampled_from(EIGHT_BITS)),
    )
    return case, [draw(st.permutations((0, 1, 2))) for _ in range(5)], ints(0, 2**32 - 1)


@with_cpu_library
@given(call=calls(), dtype=st.sampled_from(list(TOLERANCES)))
@settings(deadline=None, max_examples=60)
def test_any_shape_and_stride_on_the_cpu(call, dtype):
    """Against the reference in the same dtype, whose arithmetic is float32 as well: the order of sums may differ. With
    AVX512_BF16, products of bfloat16 round queries and weights, and float64 says how much of that is too much."""
    case, orders, seed = call
    torch.manual_seed(seed)
    tensors = list(case.tensors(dtype))
    for i, order in enumerate(orders):
        stored = tensors[i].permute(*order, 3).contiguous()
        tensors[i] = stored.permute(*(order.index(dim) for dim in range(3)), 3)
    expected, run, exact = copies(tensors), copies(tensors), copies(tensors, torch.float64)
    low = reference.attention(*expected, **case.sizes)
    out = getattr(ops, "decode" if case.tokens == 1 else "prefill")(*run, **case.sizes, backend="cpu")
    eps = torch.finfo(dtype).eps
    if dtype == torch.bfloat16 and ops.CPU_ISA in ("avx512_bf16", "amx"):
        tolerance, _ = TOLERANCES[dtype]
        torch.testing.assert_close(
            out.double(), reference.attention(*exact, **case.sizes), rtol=tolerance, atol=tolerance
        )
    else:
        torch.testing.assert_close(out, low, rtol=max(eps, 2e-5), atol=3e-5)
    if case.stored is None:
        torch.testing.assert_close(run[3], expected[3], rtol=eps, atol=1e-6, equal_nan=True)
        assert same_bits(run[4], expected[4])
    else:
        assert all(same_bits(run[i], expected[i]) for i in (3, 4, 10, 11))
