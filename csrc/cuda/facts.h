// What the launcher asks of a device before it chooses a kernel.
#pragma once

#include <array>
#include <cstdint>

namespace fastseq::cuda {

// Compute capability (major, minor), multiprocessors, and bytes of shared memory that a block may have.
std::array<int, 4> device_facts(int device);

#if defined(FASTSEQ_CUDA_EMULATED)
namespace emulated {
void set_schedule(std::uint64_t schedule);  // cuda/emulated/machine.h
}
#endif

}  // namespace fastseq::cuda
