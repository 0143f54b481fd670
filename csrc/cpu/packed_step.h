// The packed weights of a stack of layers, and whether they still are what they were made from.
#pragma once

#include <atomic>
#include <vector>

#include "params.h"
#include "workspace.h"

namespace fastseq {

class PackedStep {
 public:
  // Packs with the instruction set in use. The weights must be dense, and stay where they are for as long as run() is
  // called; run() reads a sample of them.
  PackedStep(const StepShape& shape, const std::vector<StepWeights>& layers);

  // One step; params.shape and params.packed are filled in here. False, and nothing done, where the sampled weights
  // have other values than when they were packed, or another instruction set is in use. Any thread may call it.
  bool run(StepParams params) const;

  const StepShape& shape() const { return shape_; }

 private:
  // Numbers of one weight, an odd number of them apart, so that they do not stay within one column.
  struct Sample {
    const char* weight;
    int64_t count, stride, size;  // in bytes
    std::vector<char> values;
    bool holds() const;
  };

  StepShape shape_;
  const KernelTable* kernels_;
  Workspace packed_;
  std::vector<Sample> samples_;
  // By turns from the last panel to the first: what the last step read last is read first, from cache.
  mutable std::atomic<bool> backwards_{false};
};

}  // namespace fastseq
