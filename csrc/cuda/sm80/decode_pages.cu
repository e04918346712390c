// Decode over pages of 16 bits.
#include "decode_launch.h"

namespace sinkattn::cuda {

cudaError_t launch_pages(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  constexpr Form PAGES = Form::pages;
  const auto launch = p.is_bfloat16 ? launch_as<__nv_bfloat16, __nv_bfloat16, PAGES> : launch_as<__half, __half, PAGES>;
  return launch(p, sharing, device, stream, clusters);
}

}  // namespace sinkattn::cuda
