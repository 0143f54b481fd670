#include "select.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastseq {

#if defined(__x86_64__)
extern const KernelTable kAvx512Kernels, kAvx2Kernels, kBaselineKernels;
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
#else
#error "fastseq has kernels for x86-64 and arm64"
#endif

std::vector<const KernelTable*> runnable_kernels() {
  std::vector<const KernelTable*> found;
#if defined(__x86_64__)
  // These builtins ask the operating system too: a set whose registers it does not save is not there.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    found.push_back(&kAvx512Kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back(&kAvx2Kernels);
  found.push_back(&kBaselineKernels);
#else
  found.push_back(&kNeonKernels);
#endif
  return found;
}

namespace {

const KernelTable* find_kernels(const std::string& name) {
  std::string names;
  for (const KernelTable* table : runnable_kernels()) {
    if (name == table->name) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("fastseq: instruction set '" + name + "' was not compiled or cannot run on this machine; " +
                           "available: " + names);
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{[] {
    const char* forced = std::getenv("FASTSEQ_CPU_ISA");
    return forced != nullptr && *forced != '\0' ? find_kernels(forced) : runnable_kernels().front();
  }()};
  return table;
}

}  // namespace

const KernelTable& current_kernels() { return *current().load(std::memory_order_acquire); }

void use_kernels(const std::string& name) { current().store(find_kernels(name), std::memory_order_release); }

}  // namespace fastseq
