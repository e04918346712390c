// csrc/cuda/sm80/linear.cu, emulated, for ctypes.
#include "cuda/sm80/linear.cu"

namespace sinkattn::cuda {
cudaError_t linear_wide(const Linear&, const Device&, cudaStream_t) { return cudaErrorInvalidValue; }
}  // namespace sinkattn::cuda

using namespace sinkattn;
using namespace sinkattn::cuda;

// sizes: rows, in_features, out_features, stride of the weight, activation, bfloat16, blocks, seed. numbers: eps, shift.
extern "C" int run_linear(const int64_t* sizes, const double* numbers, const void* x, const void* weight, const void* bias,
                          const void* norm_weight, const void* residual, void* out) {
  Linear p = {x, weight, bias, norm_weight, residual, out, sizes[3], int(sizes[0]), int(sizes[1]), int(sizes[2])};
  p.norm_eps = float(numbers[0]), p.norm_shift = float(numbers[1]);
  p.activation = Activation(sizes[4]), p.is_bfloat16 = sizes[5], emulated::seed = unsigned(sizes[7]);
  Device device;
  device.multiprocessors = int(sizes[6]), device.shared_bytes = emulated::SHARED_BYTES, device.compute_major = 8;
  return linear(p, device, nullptr);
}
