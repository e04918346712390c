// Decode with caches of int8, for sm_90 and later.
#include "decode_launch.h"

namespace sinkattn::cuda {

cudaError_t launch_int8(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  const auto launch = p.is_bfloat16 ? launch_as<__nv_bfloat16, int8_t> : launch_as<__half, int8_t>;
  return launch(p, sharing, device, stream, clusters);
}

}  // namespace sinkattn::cuda
