// Launching on a device. Every status is checked; a failure throws with the name of the call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/layout.h"

namespace fastseq::cuda {

struct Grid {
  int cluster;  // blocks of a cluster; 1: no clusters
  int blocks;   // a multiple of it
  int threads;
  std::size_t shared_bytes;
  bool cooperative = false;  // all blocks are on the device at once, so that they may wait for each other
};

}  // namespace fastseq::cuda

#if defined(__CUDACC__)
#include "cuda/device_gpu.h"
#else
#include "cuda/emulated/device.h"
#endif
