// From a dtype to the kernels of that dtype.
#include "cuda/launch.h"

#include <stdexcept>

#include "cuda/cluster_kernels.h"
#include "cuda/grid_kernels.h"

namespace fastseq::cuda {

ClusterShape ClusterChoice::shape(bool backward) const {
  if (build < 0 || build >= kBuildCount) throw std::invalid_argument("there is no such build");
  const ClusterShape s = cluster_shape(kBuilds[build], hidden, backward);
  if (hidden < 1 || s.groups < 1) throw std::invalid_argument("a cluster of this build does not hold so many units");
  return s;
}

int GridChoice::blocks() const { return GridShape{groups}.blocks(ceil_div(hidden, kTapeLanes) * kTapeLanes); }

std::size_t GridChoice::shared_bytes(bool backward) const {
  if (groups < 1 || groups > kMaxGroups) throw std::invalid_argument("a block of the grid has 1 or 2 groups of units");
  const GridShape s{groups};
  const int width = ceil_div(hidden, kTapeLanes) * kTapeLanes;
  const GridShared regions = backward ? GridShared::backward(s, batch, hidden) : GridShared::forward(s, batch, width);
  return static_cast<std::size_t>(regions.bytes);
}

namespace {

// Calls `use` with a value of the number type of a dtype.
template <typename Use>
auto with_half(Dtype dtype, const Use& use) {
  if (dtype == Dtype::kBfloat16) return use(Bfloat16{});
  if (dtype == Dtype::kFloat16) return use(Float16{});
  throw std::invalid_argument("cluster and grid serve bfloat16 and float16 only");
}

}  // namespace

int resident_forward_clusters(Dtype dtype, bool flags, const ClusterChoice& choice) {
  return with_half(dtype, [&](auto number) { return ForwardKernels<decltype(number)>::resident(choice, flags); });
}

int resident_backward_clusters(Dtype dtype, bool flags, const ClusterChoice& choice) {
  return with_half(dtype, [&](auto number) { return BackwardKernels<decltype(number)>::resident(choice, flags); });
}

int resident_grid_blocks(Dtype dtype, bool backward, bool flags, const GridChoice& choice) {
  return with_half(dtype,
                   [&](auto number) { return GridKernels<decltype(number)>::resident(choice, backward, flags); });
}

void launch_grid_forward(Dtype dtype, const GridChoice& choice, const GridForward& p, std::uintptr_t stream) {
  with_half(dtype, [&](auto number) { GridKernels<decltype(number)>::launch(choice, p, stream); });
}

void launch_grid_backward(Dtype dtype, const GridChoice& choice, const GridBackward& p, std::uintptr_t stream) {
  with_half(dtype, [&](auto number) { GridKernels<decltype(number)>::launch(choice, p, stream); });
}

void launch_cluster_forward(Dtype dtype, const ClusterChoice& choice, int clusters, const ClusterForward& p,
                            std::uintptr_t stream) {
  with_half(dtype, [&](auto number) { ForwardKernels<decltype(number)>::launch(choice, clusters, p, stream); });
}

void launch_cluster_backward(Dtype dtype, const ClusterChoice& choice, int clusters, const ClusterBackward& p,
                             std::uintptr_t stream) {
  with_half(dtype, [&](auto number) { BackwardKernels<decltype(number)>::launch(choice, clusters, p, stream); });
}

}  // namespace fastseq::cuda
