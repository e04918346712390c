// The functions that launch prefill. No torch in here.
#pragma once

#include "call.h"

namespace sinkattn::cuda {

struct Prefill : Call {  // v_dim is head_dim; rows of q, k and v are whole pieces of 16 bytes, aligned to 16
  void* scratch;         // scratch_elements() of them
  int64_t q_token, k_token, v_token;
  const float* alibi_slopes;  // (num_heads,); null for none
  int reach;     // a query sees the keys of its chunk that are less than this far back
  int furthest;  // no sink sees a query further on than there
};               // rotary_start and rotary_half are multiples of 4

// Whether the kernel takes this head dim, a multiple of 8, and so many sinks.
bool serves(const Prefill&);

int64_t scratch_elements(const Prefill&);

cudaError_t prefill(const Prefill&, int multiprocessors, cudaStream_t);

}  // namespace sinkattn::cuda
