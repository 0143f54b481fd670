#include "cuda/device.h"
#include "cuda/facts.h"

namespace fastseq::cuda {

std::array<int, 4> device_facts(int device) {
  constexpr cudaDeviceAttr kAsked[] = {cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                                       cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin};
  std::array<int, 4> found{};
  for (std::size_t i = 0; i < found.size(); ++i) FASTSEQ_CHECKED(cudaDeviceGetAttribute, &found[i], kAsked[i], device);
  return found;
}

}  // namespace fastseq::cuda
