// What the first launches of prefill hand to the last. No torch in here.
#pragma once

#include <cuda_runtime_api.h>

#include "../prefill.h"

namespace sinkattn::cuda {

cudaError_t gather(const Prefill&, cudaStream_t);  // the first launch
cudaError_t round(const Prefill&, cudaStream_t);   // the second, of a cache in 8 bits

namespace {

constexpr int SINKS = 16;  // of a tile of sinks
// Of a tile of keys, by the head dim: with wide heads no more of them fit into shared memory.
__host__ __device__ constexpr int keys_of(int head_dim) { return head_dim > 128 ? 48 : 128; }

// What lies in scratch, each (batch, num_kv_heads, tokens or rows, dim): the chunk's keys, turned, if there is a
// rotation, or the cache in 8 bits; the chunk's values, if that is, and both as they are stored; the window before the
// chunk, in the order of the text, up to its last token; the sinks. Of the last two, what is not there is zero.
__host__ __device__ int ring_rows(const Prefill& p) {
  const int keys = keys_of(p.head_dim);
  return p.window_size < 2 ? keys : (p.window_size + keys - 2) / keys * keys;
}
__host__ __device__ int sink_rows(const Prefill& p) {
  return p.sink_size == 0 ? SINKS : (p.sink_size + SINKS - 1) / SINKS * SINKS;
}

template <typename T>
struct Scratch {
  T *turned, *values, *ring_k, *ring_v, *sink_k, *sink_v, *end;
  __host__ __device__ explicit Scratch(const Prefill& p) {
    const int64_t heads = int64_t(p.batch) * p.num_kv_heads * p.head_dim;
    turned = static_cast<T*>(p.scratch);
    values = turned + (p.rotation || p.stored != Stored::same ? heads * p.tokens : 0);
    ring_k = values + (p.stored != Stored::same ? heads * p.tokens : 0), ring_v = ring_k + heads * ring_rows(p);
    sink_k = ring_v + heads * ring_rows(p), sink_v = sink_k + heads * sink_rows(p), end = sink_v + heads * sink_rows(p);
  }
};

__device__ int count_of(const Prefill& p, int64_t row) { return p.counts ? int(p.counts[row]) : p.tokens; }

}  // namespace
}  // namespace sinkattn::cuda
