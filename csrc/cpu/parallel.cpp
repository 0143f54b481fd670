#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseq {
namespace {

bool forked = false;
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Gates that saturate and states that decay make denormals, each of which costs a hundred times a normal number.
class FlushDenormals {
 public:
  FlushDenormals() : before_(read()) { write(before_ | kFlush); }
  ~FlushDenormals() { write(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode kFlush = 0x8040;  // flush to zero, denormals are zero
  static Mode read() { return _mm_getcsr(); }
  static void write(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = std::uint64_t;
  static constexpr Mode kFlush = 1u << 24;
  static Mode read() {
    Mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void write(Mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = unsigned;
  static constexpr Mode kFlush = 0;
  static Mode read() { return 0; }
  static void write(Mode) {}
#endif
  Mode before_;
};

}  // namespace

void run_parallel(int threads, ParallelBody body, void* context) {
  if (threads <= 1 || forked) {
    const FlushDenormals flush;
    body(context, 0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    body(context, omp_get_thread_num(), omp_get_num_threads());
  }
}

}  // namespace fastseq
