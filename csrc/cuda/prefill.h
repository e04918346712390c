// What one call of prefill is about, unpacked from tensors, and the functions that launch it. No torch in here.
//
// Words as in sinkattn/reference.py: S = sink_size, R = ring_size, W = window_size; position, slot.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sinkattn::cuda {

constexpr int MAX_SINKS = 128;

// Strides are in elements. All tensors but rotation and logits have rows of whole pieces of 16 bytes, aligned to 16.
struct Prefill {
  const void *q, *k, *v;    // (batch, heads, tokens, dim), not rotated
  void *k_cache, *v_cache;  // (batch, num_kv_heads, S + R, dim)
  void* out;                // (batch, tokens, num_heads, dim), contiguous
  void* scratch;            // scratch_elements() of them
  int64_t q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token;
  int64_t k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot;

  const int64_t* lengths;       // (batch,)
  const int64_t* counts;        // (batch,); null: no row has padding
  const float* rotation;        // (batch, tokens, text | sink, cos | sin, rotary_half), contiguous; null for none
  const float* learned_logits;  // (num_heads,); null for none

  int batch, num_kv_heads, group, tokens, head_dim;
  int sink_size, ring_size, window_size;
  int reach;                      // a query sees the keys of its chunk that are less than this far back
  int rotary_start, rotary_half;  // multiples of 4
  bool interleaved, is_bfloat16;
  float query_scale;  // brings scores into base 2 or, under a softcap, into the unit that `capped` takes
  float softcap;      // 0 for none
};

// Whether the kernel takes this head dim and so many sinks.
bool serves(const Prefill&);

int64_t scratch_elements(const Prefill&);

cudaError_t prefill(const Prefill&, int multiprocessors, cudaStream_t);

}  // namespace sinkattn::cuda
