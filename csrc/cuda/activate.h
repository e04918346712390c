// The gate of a product. No torch in here.
#pragma once

#include "linear.h"

namespace sinkattn::cuda {
namespace {

// Each of some numbers; whatever the activation, it is looked at once.
template <int N>
__device__ void activate(float (&x)[N], Activation activation) {
  if (activation == Activation::silu) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fdividef(x[i], 1 + __expf(-x[i]));
  } else if (activation == Activation::gelu) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678f));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = 0.5f * x[i] * (1 + tanhf(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
  }
}

}  // namespace
}  // namespace sinkattn::cuda
