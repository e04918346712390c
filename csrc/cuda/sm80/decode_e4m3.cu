// Decode with caches of float8_e4m3fn, for sm_90 and later.
#include "decode_launch.h"

namespace sinkattn::cuda {

cudaError_t launch_e4m3(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  const auto launch = p.is_bfloat16 ? launch_as<__nv_bfloat16, E4m3> : launch_as<__half, E4m3>;
  return launch(p, sharing, device, stream, clusters);
}

}  // namespace sinkattn::cuda
