// The machine as an emulator on a CPU: every thread of a cluster is a fiber that runs until it has to wait. It exists
// to be checked against, so it is made to differ where a correct kernel cannot tell: the order of threads and the
// moment at which copies and remote stores take effect hang on the schedule, fresh shared memory is NaN, and waiting
// for what never comes is an error.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda/number.h"

#define FASTSEQ_KERNEL(threads) inline void
#define FASTSEQ_PARAMETER
#define FASTSEQ_DEVICE inline
#define FASTSEQ_UNROLLED
#define FASTSEQ_ROLLED

namespace fastseq::cuda::emulated {

// Runs a kernel with `blocks` blocks in clusters of `cluster`.
void run(int blocks, int cluster, int threads, std::size_t shared_bytes, const std::function<void()>& kernel);

// Hands a launch to whom facts.h's set_launcher names; false where it names nobody.
bool launched_elsewhere(const void* kernel, const std::array<int, 3>& blocks_cluster_threads, std::size_t shared_bytes,
                        bool cooperative, const void* params, std::size_t params_bytes);

// Which thread goes on when one has to wait, and when copies and stores for other blocks take effect. 0: the next one,
// everything at once. 1: the one before, as late as is allowed. 2: always a thread of the first warp that can, so that
// warps run as far ahead of others as they may, at once. 3: of the last warp that can, late. Others: drawn at random
// from this seed.
void set_schedule(std::uint64_t schedule);

}  // namespace fastseq::cuda::emulated

namespace fastseq::cuda::machine {

struct alignas(16) Words4 {
  std::uint32_t x, y, z, w;
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};
struct alignas(8) Floats2 {
  float x, y;
};

int thread();
int block();
int blocks();
int block_threads();
int cluster_rank();
unsigned char* shared_memory();

inline float exponential(float x) { return std::exp(x); }
inline float reciprocal(float x) { return 1.0f / x; }

void block_barrier();
void pair_barrier(int pair);
void cluster_arrive();
void cluster_wait();

inline void warp_barrier() {}  // no kernel may take it for more than it is

std::uint32_t shuffle(std::uint32_t word, int lane);
std::uint32_t shuffle_xor(std::uint32_t word, int mask);
Words4 load_matrices(const void* row);

// The operands of the 32 lanes of a warp, once all have given theirs.
struct Operands {
  Words4 left;
  std::uint32_t right[2];
};
const Operands* exchange_operands(const Operands& mine);
int lane();

template <typename Number>
void multiply(float (&sums)[4], const Words4& left, std::uint32_t right0, std::uint32_t right1) {
  const Operands* all = exchange_operands({left, {right0, right1}});
  const auto number = [](std::uint32_t word, int half) {
    return Number::wide(static_cast<typename Number::Bits>(word >> (16 * half)));
  };
  for (int r = 0; r < 4; ++r) {
    float sum = 0.0f;
    for (int k = 0; k < kTileK; ++k) {
      // The lanes and registers that hold number k of the row and of the column.
      const int quad = k % 8 / 2, half = k % 2, high = k / 8;
      const Words4& a = all[sum_row(lane(), r) % 8 * 4 + quad].left;
      const std::uint32_t words[] = {a.x, a.y, a.z, a.w};
      const float left_number = number(words[sum_row(lane(), r) / 8 + 2 * high], half);
      sum += left_number * number(all[sum_n(lane(), r) * 4 + quad].right[high], half);
    }
    sums[r] += sum;
  }
}

template <typename T>
T load_constant(const T* p) {
  return *p;
}

void store_remote(void* mine, int rank, const Words4& v);
void store_remote(void* mine, int rank, const Floats2& v);

inline Words4 load_published(const Words4* p) { return *p; }
void store_bytes_published(void* to, const void* bytes, std::size_t count);
template <typename Bits>
void store_published(Bits* to, Bits value) {
  store_bytes_published(to, &value, sizeof(value));
}
void publish(std::uint32_t* signal, std::uint32_t value);
void await(const std::uint32_t* signal, std::uint32_t value);

void copy_barrier_init(std::uint64_t* barrier);
inline void copy_barrier_fence() {}
void copy_barrier_expect(std::uint64_t* barrier, std::uint32_t bytes);
void copy_barrier_wait(std::uint64_t* barrier, int parity);
void bulk_copy(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier);

}  // namespace fastseq::cuda::machine
