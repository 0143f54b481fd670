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

// As many as an H100 has multiprocessors.
template <typename Params>
int resident_blocks(void (*)(Params), const Grid&) {
  return 132;
}

template <typename Params>
void launch(void (*kernel)(Params), const Grid& grid, const Params& params, std::uintptr_t) {
  if (emulated::launched_elsewhere(reinterpret_cast<const void*>(kernel), {grid.blocks, grid.cluster, grid.threads},
                                   grid.shared_bytes, grid.cooperative, &params, sizeof(params)))
    return;
  // Blocks that wait for each other run side by side, as those of a cluster do.
  const int together = grid.cooperative ? grid.blocks : grid.cluster;
  emulated::run(grid.blocks, together, grid.threads, grid.shared_bytes, [&] { kernel(params); });
}

}  // namespace fastseq::cuda
