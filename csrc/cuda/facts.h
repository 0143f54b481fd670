// What the launcher asks of a device before it chooses a kernel.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace fastseq::cuda {

// Compute capability (major, minor), multiprocessors, and bytes of shared memory that a block may have.
std::array<int, 4> device_facts(int device);

#if defined(FASTSEQ_CUDA_EMULATED)
namespace emulated {
void set_schedule(std::uint64_t schedule);  // cuda/emulated/machine.h

// A launch: where in this module's file the kernel is; blocks, blocks of a cluster, threads of a block; bytes of shared
// memory; whether all blocks are there at once; the bytes of the parameters.
using Launcher =
    std::function<void(std::uintptr_t, const std::array<int, 3>&, std::size_t, bool, const std::string& params)>;

// Has somebody else run what is launched from now on; nullptr: the emulator does.
void set_launcher(Launcher launcher);
}  // namespace emulated
#endif

}  // namespace fastseq::cuda
