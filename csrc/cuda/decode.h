// What one call of decode is about, unpacked from tensors, and the function that launches it. No torch in here.
//
// Words as in sinkattn/reference.py: S = sink_size, R = ring_size, W = window_size; position, slot.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sinkattn::cuda {

constexpr int KEYS = 16;        // slots of a tile
constexpr int MAX_GROUP = 16;   // query heads that share a key head
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_SPLITS = 8;   // blocks that share a key head of a row: one cluster

// Strides are in elements. The last dim of every tensor is contiguous.
struct Params {
  const void *q, *k, *v;     // (batch, heads, 1, dim), not rotated
  void *k_cache, *v_cache;   // (batch, num_kv_heads, S + R, dim); rows of 16 bytes and more, aligned to 16
  void* out;                 // (batch, 1, num_heads, v_dim), contiguous
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  int64_t k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot;

  const int64_t* lengths;       // (batch,)
  const int64_t* counts;        // (batch,); null: every row takes its token
  const float* rotation;        // (batch, 1, text | sink, cos | sin, rotary_half), contiguous; null for none
  const float* learned_logits;  // (num_heads,); null for none
  const float* alibi_slopes;    // (num_heads,); null for none

  int batch, num_kv_heads, group, head_dim, v_dim;
  int sink_size, ring_size, window_size;
  int rotary_start, rotary_half;
  bool interleaved, is_bfloat16;
  float query_scale;  // brings scores into base 2 or, under a softcap, into the unit that `capped` takes
  float softcap;      // 0 for none
};

struct Device {
  int multiprocessors, shared_bytes, compute_major;  // shared_bytes: what a block may take
};

// `splits` is how a key head of a row is shared: 0, a small block each, two to a multiprocessor; 1 to 8, as many large
// blocks in a cluster, which sm_90 has first.

// Whether the kernel takes these head dims, this group and so many splits on such a device.
bool serves(const Params&, int splits, const Device&);

// The most splits that still run all at once, on the current device.
int splits_of(const Params&, const Device&);

cudaError_t decode(const Params&, int splits, cudaStream_t);

}  // namespace sinkattn::cuda
