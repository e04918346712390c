// The tiles of prefill: which there are, where they lie in shared memory, how they come and go. No torch in here.
#pragma once

#include "hopper.h"
#include "scratch.h"

namespace sinkattn::cuda {
namespace {

constexpr int QUERIES = 128;  // of a tile
constexpr int STAGES = 2;
constexpr int HELPERS = 256, TURNERS = HELPERS - 32, CONSUMERS = 2, THREADS = HELPERS + 128 * CONSUMERS;

// A tile of queries, and the tiles of keys that it sees. Queries and keys are counted from the row's first token in
// this chunk: 0, 1, ...; what the cache holds goes back -1, -2, ...
struct Tile {
  int number, total;
  int row, head, padding;
  int first;   // query
  int held;    // sinks in the cache
  int oldest;  // key, no sink, that the row has
  int begin, end;
  __device__ explicit Tile(const Prefill& p) : number(blockIdx.x) {
    total = (p.tokens + QUERIES - 1) / QUERIES * p.batch * p.num_kv_heads * p.group;
    find(p);
  }
  __device__ bool exists() const { return number < total; }
  __device__ void advance(const Prefill& p) { number += gridDim.x, find(p); }

 private:
  __device__ void find(const Prefill& p) {  // from here on; the longest come first
    const int heads = p.num_kv_heads * p.group;
    for (; number < total; number += gridDim.x) {
      const int pair = number % (p.batch * heads);
      first = (total - 1 - number) / (p.batch * heads) * QUERIES;
      head = pair % heads, row = pair / heads;
      const int count = count_of(p, row);
      if (first >= count) continue;
      const int64_t length = p.lengths[row], written = length - p.sink_size;
      padding = p.tokens - count;
      held = int(min(length, int64_t(p.sink_size)));
      oldest = written < 0 ? int(-written) : -int(min(written, int64_t(p.window_size - 1)));
      const int low = max(oldest, first - p.reach + 1), high = min(first + QUERIES, count);
      begin = min(low, high - 1) >> 7, end = ((high - 1) >> 7) + 1;
      return;
    }
  }
};

struct Maps {
  CUtensorMap keys, values, ring_keys, ring_values, sink_keys, sink_values, out;
};

// Where one is in a row of buffers that is gone through again and again.
struct Turnstile {
  int stage = 0, phase = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

struct Barriers {
  uint64_t queries_in[2], queries_out[2], sink_queries_in, sink_queries_out;
  uint64_t keys_in[STAGES], keys_out[STAGES], values_in[STAGES], values_out[STAGES];
};

template <int DIM>
struct Shape {
  // In bytes: a column of 64 dims and 128 rows, and all columns. Those of 16 sinks.
  static constexpr int COLUMNS = DIM / 64, COLUMN = 128 * 128, TILE = COLUMNS * COLUMN, SINK_COLUMN = SINKS * 128;
  static constexpr int SHARED = TILE * (3 + 2 * STAGES) + int(sizeof(Barriers));
};

__device__ void copy_in(char* shared, const CUtensorMap& map, int dim, int token, int head, int row,
                        uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ void copy_out(const CUtensorMap& map, int dim, int token, int head, int row, const char* shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(dim), "r"(token), "r"(head), "r"(row), "r"(shared_address(shared))
               : "memory");
}

}  // namespace
}  // namespace sinkattn::cuda
