// The kernels of the grid-wide LSTM by dtype; each is compiled in a file of its own.
#pragma once

#include "cuda/launch.h"
#include "cuda/number.h"

namespace fastseq::cuda {

template <typename Number>
struct GridKernels {
  static int resident(const GridChoice& choice, bool backward, bool flags);
  static void launch(const GridChoice& choice, const GridForward& p, std::uintptr_t stream);
  static void launch(const GridChoice& choice, const GridBackward& p, std::uintptr_t stream);
};

}  // namespace fastseq::cuda
