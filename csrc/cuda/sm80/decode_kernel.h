// The kernel of decode: `fetch`, `turn`, `append`, `attend`, `combine`. No torch in here. C: what the cache holds.
#pragma once

#include "../launch.h"
#include "decode_combine.h"
#include "decode_turn.h"

namespace sinkattn::cuda {
namespace {

// share: tiles of a block at least. width: of a few tokens a row (FEW), those of a block.
template <typename T, typename C, int HEAD_DIM, int V_DIM, bool WIDE, bool LARGE, Form FORM>
__global__ void __launch_bounds__(Shape<C, HEAD_DIM, V_DIM, WIDE, LARGE>::THREADS,
                                  Shape<C, HEAD_DIM, V_DIM, WIDE, LARGE>::BLOCKS)
    decode_kernel(const __grid_constant__ Params p, int share, int width) {
  using B = Block<T, C, HEAD_DIM, V_DIM, WIDE, LARGE, FORM>;
  using S = typename B::S;
  extern __shared__ __align__(128) uint4 shared[];  // a row of a tile's column is a line; across two, copies are slow
  __shared__ __align__(8) float softmax[B::WARPS][MAX_GROUP][2];  // maximum and sum
  __shared__ uint64_t arrived;
  __shared__ bool is_last;
  let_next_launch();
  B b(p, shared, share, width);
  if (b.is_clustered()) {
    if (b.rank == 0 && threadIdx.x == 0) expect_bytes(&arrived, b.splits * b.group * (V_DIM + 2) * 4);
    cluster_arrive();
  }
  if constexpr (B::PAGED) {
    if (!p.overlap) wait_for_launch();
    b.find_text();
  }
  const int early = p.overlap ? (S::STAGES > 1 ? S::STAGES - 1 : 1) : 0;  // what is small shall not wait for all
  b.fetch_first(0, early);
  wait_for_launch();
  if (!LARGE && b.splits > 1 && threadIdx.x == 0)  // into the L2, long before it is needed
    prefetch(p.arrivals + b.pair);

  // What is small is asked for at once, and ahead of tiles, as it would wait behind them: the row's state, its angles,
  // query, new key and value.
  const int64_t length = B::PAGED ? b.t : p.lengths[b.row];  // used later: nothing shall wait
  const int64_t count = B::PAGED ? b.own : p.counts ? p.counts[b.row] : b.tokens;
  auto meanwhile = [&] { b.fetch_first(early, S::STAGES); };
  if constexpr (B::FEW)
    turn_few(b, meanwhile);
  else
    turn_one(b, meanwhile);
  const int nth = b.last_token - (b.tokens - int(count));  // of the new tokens; below 0: padding
  const int64_t t = length + nth;
  if (B::PAGED || nth < 0) b.write_zeros();
  if (nth < 0) {
    wait_for_copies<0>();
    if (b.is_clustered()) cluster_wait();
    return;
  }
  __syncthreads();
  if constexpr (B::EIGHT_BITS) {  // while the first tiles are on their way
    round_all(b);
    __syncthreads();
  }

  Attention<B> attention(b, t, nth);
  if (t < b.slots) b.end = min(b.end, int(t) / KEYS + 1);  // further tiles are empty
  int stage = 0;
#pragma unroll 1
  for (int tile = b.begin + b.warp; tile < b.end; tile += B::WARPS) {
    wait_for_copies<S::STAGES - 1>();
    attention.take(b.slot_of(tile), stage);
    b.fetch(tile + S::STAGES * B::WARPS, stage);
    stage = stage + 1 == S::STAGES ? 0 : stage + 1;
  }
  if constexpr (B::EIGHT_BITS) attention.multiply_sums(attention.unit);
  wait_for_copies<0>();
  __syncwarp();  // for the lanes' copies are each other's place

  // What the warp found, (group, V_DIM), where its tiles were.
  float* found = reinterpret_cast<float*>(b.staged);
  store_found<V_DIM>(attention.acc, attention.top, attention.total, b.group, b.g, b.c, found, softmax[b.warp]);
  __syncthreads();
  const Ending<B> ending(b, softmax[0][0], nth);
  if (b.splits == 1)
    ending.alone();
  else if constexpr (LARGE)
    ending.in_cluster(&arrived);
  else
    ending.in_memory(&is_last);
}

}  // namespace
}  // namespace sinkattn::cuda
