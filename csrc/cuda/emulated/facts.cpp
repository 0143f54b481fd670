#include "cuda/facts.h"

namespace fastseq::cuda {

// Those of an H100.
std::array<int, 4> device_facts(int) { return {9, 0, 132, 232448}; }

}  // namespace fastseq::cuda
