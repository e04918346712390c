// How kernels are launched, and launches that overlap (programmatic dependent launch, from sm_90 on). No torch in here.
#pragma once

#include <cuda_runtime.h>

namespace sinkattn::cuda {
namespace {

// The next kernel may start once every block has come here; its blocks wait for room, then at `wait_for_launch`.
__device__ void let_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel ahead is done and what it wrote is seen.
__device__ void wait_for_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A grid to be launched. What can be refused is found out by `allow_shared`, before anything is launched.
struct Grid {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[3] = {};

  Grid(dim3 blocks, int threads, int shared_bytes, cudaStream_t stream) {
    config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
    config.stream = stream, config.attrs = attributes;
  }
  Grid(const Grid&) = delete;  // its configuration points into it
  void overlap() {             // with the kernel ahead
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  void cluster(int blocks) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
  }
  void all_resident() {  // at once, or nothing is launched
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  // Lets the kernel, which is loaded if it was not, take the shared memory.
  template <typename Kernel>
  cudaError_t allow_shared(Kernel kernel) const {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes));
  }
};

}  // namespace
}  // namespace sinkattn::cuda
