// From run-time values to the kernel that was compiled for them.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastseq::cuda {

// Calls `use` with the build of a choice and its flags as constants.
template <int kBuild = 0, typename Use>
auto with_constants(const ClusterChoice& choice, bool flags, const Use& use) {
  if (choice.build == kBuild) {
    const std::integral_constant<int, kBuild> build;
    return flags ? use(build, std::true_type{}) : use(build, std::false_type{});
  }
  if constexpr (kBuild + 1 < kBuildCount)
    return with_constants<kBuild + 1>(choice, flags, use);
  else
    throw std::invalid_argument("there is no such build");
}

inline Grid cluster_grid(const ClusterShape& s, int shared_bytes, int clusters) {
  if (clusters < 1) throw std::invalid_argument("clusters must be at least 1");
  return {s.blocks, s.blocks * clusters, s.threads(), static_cast<std::size_t>(shared_bytes)};
}

}  // namespace fastseq::cuda
