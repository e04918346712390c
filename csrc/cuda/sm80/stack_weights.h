// How the blocks of stack.cu share products, hand over what they found, and ask for weights ahead. No torch in here.
#pragma once

#include "../launch.h"
#include "../stack.h"
#include "linear_parts.h"

namespace sinkattn::cuda {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int ROWS = 16, STAGE = ROWS * PIECES;  // of the weight at a time, with an activation half of them gates
constexpr int SUMS = ROWS + 4;                   // how far sums for a row of x lie apart, so that lanes meet different banks
constexpr int MOST_STAGES = 12;                  // of a ring
constexpr int MOST_SPLITS = 64;
constexpr int AHEAD = 2;                         // keys and values of a lane that are on their way
constexpr int MOST_X_BYTES = 64 * 1024;          // of x in shared memory

// Two numbers that are handed over at once; one is `write_pair`.
__device__ void hand_two(Handed* to, uint32_t first, uint32_t second, uint32_t epoch) {
  write_pairs(to, make_uint4(first, epoch, second, epoch));
}
__device__ uint32_t wait_for(const Handed* from, uint32_t epoch) {
  uint2 x;
  do x = read_pair(from);
  while (x.y != epoch);
  return x.x;
}

// The block's share of one kind of product: results from begin on, `size` at a time, all of them even.
struct Share {
  int begin, end, size, pieces, chunks, count;
  int64_t row_bytes, jump;  // jump: from gates to the rest
  bool gated;

  __device__ void plan(const Stack& p, int kind) {
    const Call& c = p.call;
    gated = kind == GATE_UP;
    const int heads = c.group * c.num_kv_heads * c.head_dim;
    const int in = kind == OUTPUT ? heads : kind == DOWN ? p.inner : p.hidden;
    count = kind == QKV ? heads + 2 * c.num_kv_heads * c.head_dim : gated ? p.inner : p.hidden;
    const int most = gated ? ROWS / 2 : ROWS, pairs = count / 2;
    begin = int64_t(pairs) * blockIdx.x / gridDim.x * 2, end = int64_t(pairs) * (blockIdx.x + 1) / gridDim.x * 2;
    const int groups = (end - begin + most - 1) / most;
    size = groups ? ((end - begin) / 2 + groups - 1) / groups * 2 : 2;
    pieces = in / 8, chunks = in / KC;
    row_bytes = int64_t(in) * 2, jump = gated ? (count - most) * row_bytes : 0;
  }
};

// A warp's way through all weights: what is asked for next, chunk after chunk, product after product, layer after layer.
struct Weights {
  const Share* shares;
  const StackLayer* layers;
  const uint4* ring;
  unsigned barriers, parity = 0;
  int stages, products, stage = 0, next_stage = 0, owed = 0;  // owed: chunks that were taken, in whose place none was asked for
  uint64_t once;
  int product, first, chunk, warp, first_row, lane_piece;
  // Of the product and the rows that are asked for next.
  Share share;
  int limit, limit_of_rest;
  const char* line;
  unsigned lane_place;

  __device__ Weights(const Share* shares, const StackLayer* layers, int num_layers, const uint4* ring, uint64_t* barriers,
                     int stages)
      : shares(shares), layers(layers), ring(ring), barriers(shared_address(barriers)), stages(stages),
        products(num_layers * PRODUCTS) {
    if (threadIdx.x % 32 < stages) begin_barrier(barriers + threadIdx.x % 32);
    __syncwarp();
    once = read_once();
    warp = threadIdx.x / 32, first_row = threadIdx.x % 32 / PIECES, lane_piece = threadIdx.x % PIECES;
    lane_place = shared_address(ring + place(first_row, lane_piece));
    enter(0);
    owed = stages;
    settle();
  }
  __device__ void begin(int at) {
    first = at, chunk = warp, limit = min(share.size, share.end - first);
    limit_of_rest = share.gated ? limit + ROWS / 2 : limit;
    const char* weight = static_cast<const char*>(layers[product / PRODUCTS].weights[product % PRODUCTS]);
    line = weight + (first + first_row) * share.row_bytes + lane_piece * 16 + chunk * (KC * 2);
  }
  __device__ void enter(int next) {  // the first product from there on that the warp has a part in
    for (product = next; product < products; ++product) {
      share = shares[product % PRODUCTS];
      if (warp < share.chunks) return begin(share.begin);
    }
  }
  __device__ void ask() {
    if (product < products) {
      fetch_rows<ROWS>(lane_place + next_stage * (STAGE * 16), line, first_row, limit, limit_of_rest, share.row_bytes,
                       share.jump, once);
      chunk += WARPS, line += WARPS * KC * 2;
      if (chunk >= share.chunks) {
        if (first + share.size < share.end)
          begin(first + share.size);
        else
          enter(product + 1);
      }
    }
    open_once_copied(barriers + next_stage * 8);
    if (++next_stage == stages) next_stage = 0;
  }
  // The chunk that is next to be multiplied. Its place is free once all lanes have read it.
  __device__ const uint4* take() {
    wait_for_barrier(barriers + stage * 8, parity);
    const uint4* rows = ring + stage * STAGE;
    ++owed;
    if (++stage == stages) stage = 0, parity ^= 1;
    return rows;
  }
  // Ask for what is owed, but for some: to ask takes time, which there is once the block has handed on what it found.
  __device__ void settle(int but = 0) {
    if (owed <= but) return;
    __syncwarp();
    for (; owed > but; --owed) ask();
  }
};

}  // namespace
}  // namespace sinkattn::cuda
