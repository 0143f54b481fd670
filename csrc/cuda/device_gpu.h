// Launching on the current CUDA device.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace fastseq::cuda {

inline void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}
#define FASTSEQ_CHECKED(call, ...) ::fastseq::cuda::check(call(__VA_ARGS__), #call)

// The configuration of a launch, with the memory that it points to.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  explicit Configuration(const Grid& grid, std::uintptr_t stream = 0) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    if (grid.cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (grid.cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (grid.cluster > 1 || grid.cooperative) {
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

// Allows a kernel the shared memory and the cluster that it is launched with, which both go beyond the defaults.
inline void allow(const void* kernel, const Grid& grid) {
  if (grid.shared_bytes > 0)
    FASTSEQ_CHECKED(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                    static_cast<int>(grid.shared_bytes));
  if (grid.cluster > 8)
    FASTSEQ_CHECKED(cudaFuncSetAttribute, kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

template <typename Params>
int resident_clusters(void (*kernel)(Params), const Grid& grid) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow(function, grid);
  const Configuration made(grid);
  int clusters = 0;
  FASTSEQ_CHECKED(cudaOccupancyMaxActiveClusters, &clusters, function, &made.config);
  return clusters;
}

// How many blocks of a cooperative launch can be on the current device at once.
template <typename Params>
int resident_blocks(void (*kernel)(Params), const Grid& grid) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow(function, grid);
  int device = 0, processors = 0, each = 0;
  FASTSEQ_CHECKED(cudaGetDevice, &device);
  FASTSEQ_CHECKED(cudaDeviceGetAttribute, &processors, cudaDevAttrMultiProcessorCount, device);
  FASTSEQ_CHECKED(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &each, function, grid.threads, grid.shared_bytes);
  return each * processors;
}

template <typename Params>
void launch(void (*kernel)(Params), const Grid& grid, const Params& params, std::uintptr_t stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow(function, grid);
  const Configuration made(grid, stream);
  void* arguments[] = {const_cast<Params*>(&params)};
  FASTSEQ_CHECKED(cudaLaunchKernelExC, &made.config, function, arguments);
}

}  // namespace fastseq::cuda
