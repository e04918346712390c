// What a call of decode and one of prefill have in common, unpacked from tensors. No torch in here.
//
// Words as in sinkattn/reference.py: S = sink_size, R = ring_size, W = window_size; position, slot.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sinkattn::cuda {

// What a cache holds: numbers of q's dtype, or of 8 bits, which have scales.
enum class Stored { same, int8, e4m3 };

// Strides are in elements. The last dim of every tensor is contiguous, but of scales.
struct Call {
  const void *q, *k, *v;     // (batch, heads, tokens, dim), not rotated
  void *k_cache, *v_cache;   // (batch, num_kv_heads, S + R, dim); rows of 16 bytes and more, aligned to 16
  void* out;                 // (batch, tokens, num_heads, v_dim), contiguous
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  int64_t k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot;

  const int64_t* lengths;       // (batch,)
  const int64_t* counts;        // (batch,); null: every row takes all tokens
  const float* rotation;        // (batch, tokens, text | sink, cos | sin, rotary_half), contiguous; null for none
  const float* learned_logits;  // (num_heads,); null for none

  int batch, num_kv_heads, group, tokens, head_dim, v_dim;
  int sink_size, ring_size, window_size;
  int rotary_start, rotary_half;
  bool interleaved, is_bfloat16;
  float query_scale;  // brings scores into base 2 or, under a softcap, into the unit that `capped` takes
  float softcap;      // 0 for none

  Stored stored;
  float *k_scales, *v_scales;  // (batch, num_kv_heads, S + R); of a cache in 8 bits
  int64_t k_scale_row, k_scale_head, k_scale_slot, v_scale_row, v_scale_head, v_scale_slot;
};

struct Device {
  int index = 0;
  int multiprocessors, shared_bytes, compute_major;  // shared_bytes: what a block may take
};

}  // namespace sinkattn::cuda
