// How the blocks of stack.cu share products, hand over what they found, and ask for weights ahead. No torch in here.
#pragma once

#include "../launch.h"
#include "../stack.h"
#include "linear_parts.h"

namespace sinkattn::cuda {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * 32;   // that multiply and attend
constexpr int ASKERS = 4, ASKING = ASKERS * 32;  // that ask for weights
constexpr int ROWS = 16, STAGE = ROWS * PIECES;  // of the weight at a time, with an activation half of them gates
constexpr int SUMS = 2 * ROWS + 4;               // how far sums for a row of x lie apart
constexpr int MOST_STAGES = 12;                  // of a ring
constexpr int MOST_SPLITS = 64;
constexpr int MOST_X_BYTES = 64 * 1024;  // of x in shared memory

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

// The block's share of one kind of product: results from begin on, `size` a stage, up to two stages for the same columns
// of x. All of them are even.
struct Share {
  int begin, end, size, chunks, count;
  int64_t row_bytes, jump;  // jump: from gates to the rest
  float inverse;            // 1 / columns of x
  bool gated;

  __device__ void plan(const Stack& p, int kind) {
    const Call& c = p.call;
    gated = kind == GATE_UP;
    const int heads = c.group * c.num_kv_heads * c.head_dim;
    const int in = kind == OUTPUT ? heads : kind == DOWN ? p.inner : p.hidden;
    count = kind == QKV      ? heads + 2 * c.num_kv_heads * c.head_dim
            : gated          ? p.inner
            : kind == LOGITS ? p.vocabulary
                             : p.hidden;
    const int most = gated ? ROWS / 2 : ROWS, pairs = count / 2;
    begin = int64_t(pairs) * blockIdx.x / gridDim.x * 2, end = int64_t(pairs) * (blockIdx.x + 1) / gridDim.x * 2;
    const int stages = (end - begin + most - 1) / most;
    size = stages ? ((end - begin) / 2 + stages - 1) / stages * 2 : 2;
    chunks = in / KC, inverse = 1.0f / in;
    row_bytes = int64_t(in) * 2, jump = gated ? (count - most) * row_bytes : 0;
  }
};

// Where weights lie in shared memory: each warp that multiplies has a ring of stages, which a warp that asks fills. A
// stage's two barriers tell when it is full, and when it is empty.
struct Ring {
  unsigned rows, full, empty;  // of the block: (WARPS, stages, STAGE) pieces, (WARPS, stages) barriers each
  int stages;

  __device__ Ring(const uint4* rows, uint64_t* barriers, int stages)
      : rows(shared_address(rows)), full(shared_address(barriers)), empty(full + WARPS * stages * 8), stages(stages) {
    for (int i = threadIdx.x; i < 2 * WARPS * stages; i += THREADS + ASKING)
      begin_barrier(barriers + i, i < WARPS * stages ? 32 : 1);
  }
};

// Where a warp is in a ring. parity: of the barriers' phase that it waits for.
struct Place {
  int stage, parity;
  __device__ void step(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// What one of the warps that ask does from start to end: the chunks of all weights, product after product, layer after
// layer, and the head's if there is one, into the rings of two warps that multiply, as soon as there is room.
__device__ __forceinline__ void ask_for_all(const Share* shares, const StackLayer* layers, int num_layers,
                                            const void* logits_weight, const Ring& ring) {
  const int asker = threadIdx.x / 32 - WARPS, first_row = threadIdx.x % 32 / PIECES, lane_piece = threadIdx.x % PIECES;
  const uint64_t once = read_once();
  const unsigned lane_place = ring.rows + place(first_row, lane_piece) * 16;
  Place places[WARPS / ASKERS] = {};
#pragma unroll 1
  for (int product = 0; product < num_layers * PRODUCTS + (logits_weight != nullptr); ++product) {
    const bool is_head = product == num_layers * PRODUCTS;
    const Share share = shares[is_head ? int(LOGITS) : product % PRODUCTS];
    const char* weight = static_cast<const char*>(
        is_head ? logits_weight : layers[product / PRODUCTS].weights[product % PRODUCTS]);
#pragma unroll 1
    for (int first = share.begin; first < share.end; first += 2 * share.size) {
      const char* line = weight + (first + first_row) * share.row_bytes + lane_piece * 16 + asker * (KC * 2);
#pragma unroll 1
      for (int chunk = asker; chunk < share.chunks; chunk += WARPS) {
#pragma unroll
        for (int i = 0; i < WARPS / ASKERS; ++i) {  // rings of warps `asker` and asker + ASKERS
          if (chunk + i * ASKERS >= share.chunks) break;
          Place& at = places[i];
          const char* from = line;
          for (int limit = share.end - first, side = 0; side < 2 && limit > 0; ++side) {
            const int stage = (asker + i * ASKERS) * ring.stages + at.stage, rows = min(share.size, limit);
            wait_for_barrier(ring.empty + stage * 8, at.parity ^ 1);
            fetch_rows<ROWS>(lane_place + stage * (STAGE * 16), from, first_row, rows,
                             share.gated ? rows + ROWS / 2 : rows, share.row_bytes, share.jump, once);
            open_once_copied(ring.full + stage * 8);
            at.step(ring.stages);
            limit -= share.size, from += share.size * share.row_bytes;
          }
          line += ASKERS * KC * 2;
        }
      }
    }
  }
  end_of_copies();
  wait_for_copies<0>();  // nobody leaves before what it asked for is there
}

}  // namespace
}  // namespace sinkattn::cuda
