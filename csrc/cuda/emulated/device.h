// Launching in the emulator.
#pragma once

#include "cuda/device.h"
#include "cuda/emulated/machine.h"

namespace fastseq::cuda {

// Few, so that small batches already have more tiles than there are clusters.
constexpr int kEmulatedClusters = 2;

template <typename Params>
int resident_clusters(void (*)(Params), const Grid&) {
  return kEmulatedClusters;
}

template <typename Params>
void launch(void (*kernel)(Params), const Grid& grid, const Params& params, std::uintptr_t) {
  emulated::run(grid.blocks, grid.cluster, grid.threads, grid.shared_bytes, [&] { kernel(params); });
}

}  // namespace fastseq::cuda
