#include "select.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(FASTSEQ_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastseq {

#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels, kBaselineKernels;
#if defined(FASTSEQ_HAS_AVX512_BF16)
extern const RecurrentKernels kAvx512_bf16Kernels;
#endif
#if defined(FASTSEQ_HAS_AMX)
extern const RecurrentKernels kAmxKernels;
#endif
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
#else
#error "fastseq has kernels for x86-64 and arm64"
#endif

#if defined(FASTSEQ_HAS_AMX) || defined(FASTSEQ_HAS_AVX512_BF16)
namespace {

// The avx512 set with other kernels for the recurrences. Put together here, in code that every machine can run.
KernelTable over_avx512(const RecurrentKernels& kernels) {
  KernelTable table = kAvx512Kernels;
  table.name = kernels.name;
  table.lstm_forward = kernels.lstm_forward, table.lstm_backward = kernels.lstm_backward;
  table.rnn_forward = kernels.rnn_forward, table.rnn_backward = kernels.rnn_backward;
  return table;
}

}  // namespace
#endif

#if defined(FASTSEQ_HAS_AMX)
namespace {

// The tile registers are eight KiB that the operating system saves only for a process which asks.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                          syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

}  // namespace
#endif

#if defined(__x86_64__)
namespace {
// For fewer rows tiles take as long as for sixteen, and terms are half as many bytes again as float32.
std::atomic<int64_t> least_split_rows{12};
}  // namespace

int64_t split_rows() { return least_split_rows.load(std::memory_order_relaxed); }
void set_split_rows(int64_t rows) { least_split_rows.store(rows, std::memory_order_relaxed); }
#endif

std::vector<const KernelTable*> runnable_kernels() {
  std::vector<const KernelTable*> found;
#if defined(__x86_64__)
  // These builtins ask the operating system too: a set whose registers it does not save is not there.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
#if defined(FASTSEQ_HAS_AMX)
    static const KernelTable amx = over_avx512(kAmxKernels);
    if (__builtin_cpu_supports("avx512bf16") && may_use_tiles()) found.push_back(&amx);
#endif
#if defined(FASTSEQ_HAS_AVX512_BF16)
    static const KernelTable avx512_bf16 = over_avx512(kAvx512_bf16Kernels);
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16);
#endif
    found.push_back(&kAvx512Kernels);
  }
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
