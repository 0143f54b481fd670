// The floor of a step: nothing but its barrier of the cluster.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/machine.h"

namespace fastseq::cuda {
namespace {

struct Barriers {
  std::int64_t steps;
};

FASTSEQ_KERNEL(1024)
cluster_barriers(const FASTSEQ_PARAMETER Barriers p) {
  for (std::int64_t step = 0; step < p.steps; ++step) {
    machine::cluster_arrive();
    machine::cluster_wait();
  }
}

}  // namespace

void launch_cluster_barriers(int blocks, int clusters, int threads, std::int64_t steps, std::uintptr_t stream) {
  launch(&cluster_barriers, Grid{blocks, blocks * clusters, threads, 0}, Barriers{steps}, stream);
}

}  // namespace fastseq::cuda
