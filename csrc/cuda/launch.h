// Launches that overlap (programmatic dependent launch, from sm_90 on). No torch in here.
#pragma once

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

}  // namespace
}  // namespace sinkattn::cuda
