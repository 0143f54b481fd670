// Every kernel of the grid-wide LSTM in one dtype, and their launch.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/grid_kernels.h"
#include "cuda/lstm_grid_backward.h"
#include "cuda/lstm_grid_forward.h"

namespace fastseq::cuda {

// Calls `use` with the groups of a choice and its flags as constants.
template <typename Use>
auto with_grid_constants(const GridChoice& choice, bool flags, const Use& use) {
  const auto with_groups = [&](auto groups) {
    return flags ? use(groups, std::true_type{}) : use(groups, std::false_type{});
  };
  if (choice.groups == 1) return with_groups(std::integral_constant<int, 1>{});
  if (choice.groups == 2) return with_groups(std::integral_constant<int, 2>{});
  throw std::invalid_argument("a block of the grid has 1 or 2 groups of units");
}

inline Grid grid_of(const GridChoice& choice, bool backward) {
  return {1, choice.blocks(), kGridThreads, choice.shared_bytes(backward), true};
}

template <typename Number>
int GridKernels<Number>::resident(const GridChoice& choice, bool backward, bool flags) {
  const Grid grid = grid_of(choice, backward);
  return with_grid_constants(choice, flags, [&](auto groups, auto has_flags) {
    constexpr int kGroups = decltype(groups)::value;
    constexpr bool kFlags = decltype(has_flags)::value;
    return backward ? resident_blocks(&lstm_grid_backward<Number, kGroups, kFlags>, grid)
                    : resident_blocks(&lstm_grid_forward<Number, kGroups, kFlags>, grid);
  });
}

template <typename Number>
void GridKernels<Number>::launch(const GridChoice& choice, const GridForward& p, std::uintptr_t stream) {
  with_grid_constants(choice, p.flags != nullptr, [&](auto groups, auto has_flags) {
    cuda::launch(&lstm_grid_forward<Number, decltype(groups)::value, decltype(has_flags)::value>,
                 grid_of(choice, /*backward=*/false), p, stream);
  });
}

template <typename Number>
void GridKernels<Number>::launch(const GridChoice& choice, const GridBackward& p, std::uintptr_t stream) {
  with_grid_constants(choice, p.flags != nullptr, [&](auto groups, auto has_flags) {
    cuda::launch(&lstm_grid_backward<Number, decltype(groups)::value, decltype(has_flags)::value>,
                 grid_of(choice, /*backward=*/true), p, stream);
  });
}

}  // namespace fastseq::cuda
