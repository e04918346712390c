// What one call of linear is about, unpacked from tensors, and the function that launches it. No torch in here.
#pragma once

#include "../activation.h"
#include "call.h"

namespace sinkattn::cuda {

constexpr int MAX_LINEAR_ROWS = 64, MAX_NARROW_ROWS = 16;  // of x: on Hopper, elsewhere
constexpr int FEW_ROWS = 8;                                // with more, sm90/linear_wide.cu serves on Hopper

// Rows of x and weight are whole pieces of 16 bytes, aligned to 16. All tensors but weight are contiguous.
struct Linear {
  const void* x;            // (rows, in_features)
  const void* weight;       // (out_features, in_features); with an activation [gate | up]
  const void* bias;         // (out_features,); null for none
  const void* norm_weight;  // (in_features,), aligned to 16; null for no norm
  const void* residual;     // as out; null for none
  void* out;                // (rows, out_features), or half of them with an activation
  int64_t weight_row;       // stride in elements
  int rows, in_features, out_features;
  float norm_eps, norm_shift;
  Activation activation;
  bool is_bfloat16;
};

cudaError_t linear(const Linear&, const Device&, cudaStream_t);
cudaError_t linear_wide(const Linear&, const Device&, cudaStream_t);  // on Hopper; linear calls it for many rows

}  // namespace sinkattn::cuda
