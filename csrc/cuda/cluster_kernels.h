// The kernels of the cluster-persistent LSTM by dtype and pass; each is compiled in a file of its own.
#pragma once

#include "cuda/launch.h"
#include "cuda/number.h"

namespace fastseq::cuda {

template <typename Number>
struct ForwardKernels {
  static int resident(const ClusterChoice& choice, bool flags);
  static void launch(const ClusterChoice& choice, int clusters, const ClusterForward& p, std::uintptr_t stream);
};

template <typename Number>
struct BackwardKernels {
  static int resident(const ClusterChoice& choice, bool flags);
  static void launch(const ClusterChoice& choice, int clusters, const ClusterBackward& p, std::uintptr_t stream);
};

}  // namespace fastseq::cuda
