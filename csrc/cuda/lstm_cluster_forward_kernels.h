// Every kernel of the cluster-persistent LSTM's forward pass in one dtype, and their launch.
#pragma once

#include "cuda/choose_kernel.h"
#include "cuda/cluster_kernels.h"
#include "cuda/lstm_cluster_forward.h"

namespace fastseq::cuda {

template <typename Number, typename Use>
auto with_forward_kernel(const ClusterChoice& choice, bool flags, const Use& use) {
  return with_constants(choice, flags, [&](auto build, auto has_flags) {
    constexpr Build b = kBuilds[decltype(build)::value];
    return use(&lstm_cluster_forward<Number, b.blocks, b.threads, b.forward_register_tiles, b.batch_tiles,
                                     decltype(has_flags)::value>);
  });
}

template <typename Number>
int ForwardKernels<Number>::resident(const ClusterChoice& choice, bool flags) {
  const ClusterShape s = choice.shape(/*backward=*/false);
  const Grid grid = cluster_grid(s, ForwardShared(s).bytes, 1);
  return with_forward_kernel<Number>(choice, flags, [&](auto kernel) { return resident_clusters(kernel, grid); });
}

template <typename Number>
void ForwardKernels<Number>::launch(const ClusterChoice& choice, int clusters, const ClusterForward& p,
                                    std::uintptr_t stream) {
  const ClusterShape s = choice.shape(/*backward=*/false);
  const Grid grid = cluster_grid(s, ForwardShared(s).bytes, clusters);
  with_forward_kernel<Number>(choice, p.flags != nullptr, [&](auto kernel) { cuda::launch(kernel, grid, p, stream); });
}

}  // namespace fastseq::cuda
