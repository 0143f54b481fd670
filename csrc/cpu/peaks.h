// Loops that do nothing but reach a limit of the machine, which the benchmark holds the layers' speed against.
//
// Compiled per instruction set like the kernels, and with the kernels' own register tile, so that the limit is that of
// the same instructions.
#pragma once

#include "parallel.h"
#include "params.h"
#include "simd.h"

namespace fastseq {
namespace {

struct PeakJob {
  const PeakParams& p;
  int threads;  // that ran
};

// Multiply-adds on accumulators that stay in registers: as many chains as the kernels' tile has, which hide the
// latency.
template <typename Real>
void fma_loop_body(void* context, int thread, int threads) {
  PeakJob& job = *static_cast<PeakJob*>(context);
  if (thread == 0) job.threads = threads;
  const Vec<Real> half = broadcast<Real>(Real(0.5)), one = broadcast<Real>(Real(1));
  Vec<Real> chains[kTileRows * kTileVectors];
  FASTSEQ_UNROLL
  for (int i = 0; i < kTileRows * kTileVectors; ++i) chains[i] = broadcast<Real>(Real(i));
  for (int64_t repeat = 0; repeat < job.p.repeats; ++repeat) {
    FASTSEQ_UNROLL
    for (int i = 0; i < kTileRows * kTileVectors; ++i) chains[i] = fma(chains[i], half, one);  // towards 2
  }
  Vec<Real> sum = zero<Real>();
  FASTSEQ_UNROLL
  for (int i = 0; i < kTileRows * kTileVectors; ++i) sum += chains[i];
  __asm__ volatile("" : : "r"(&sum) : "memory");  // the results are wanted
}

// Reads this thread's share of the data again and again: bound by the bandwidth of the cache that the share fits into.
inline void read_loop_body(void* context, int thread, int threads) {
  PeakJob& job = *static_cast<PeakJob*>(context);
  if (thread == 0) job.threads = threads;
  constexpr int kStreams = 8;
  constexpr int64_t kBlock = kStreams * kVectorBytes / static_cast<int64_t>(sizeof(float));
  const int64_t share = job.p.bytes / job.p.threads / static_cast<int64_t>(sizeof(float)) / kBlock * kBlock;
  const float* const begin = static_cast<const float*>(job.p.data) + thread * share;
  Vec<float> sums[kStreams];
  FASTSEQ_UNROLL
  for (int i = 0; i < kStreams; ++i) sums[i] = zero<float>();
  for (int64_t repeat = 0; repeat < job.p.repeats; ++repeat) {
    for (const float* from = begin; from < begin + share; from += kBlock) {
      FASTSEQ_UNROLL
      for (int i = 0; i < kStreams; ++i) sums[i] += load(from + i * kLanes<float>);
    }
    __asm__ volatile("" : : : "memory");  // read again, not remembered
  }
  FASTSEQ_UNROLL
  for (int i = 1; i < kStreams; ++i) sums[0] += sums[i];
  __asm__ volatile("" : : "r"(&sums[0]) : "memory");
}

// Operations done, a multiply-add counted as two.
inline double fma_loop(const PeakParams& p) {
  PeakJob job{p, 0};
  const bool wide = p.storage == Storage::kFloat64;
  run_parallel(p.threads, wide ? &fma_loop_body<double> : &fma_loop_body<float>, &job);
  const double lanes = wide ? kLanes<double> : kLanes<float>;
  return 2.0 * kTileRows * kTileVectors * lanes * static_cast<double>(p.repeats) * job.threads;
}

// Bytes read.
inline double read_loop(const PeakParams& p) {
  PeakJob job{p, 0};
  run_parallel(p.threads, &read_loop_body, &job);
  constexpr int64_t kBlockBytes = 8 * kVectorBytes;
  return static_cast<double>(p.bytes / p.threads / kBlockBytes * kBlockBytes) * static_cast<double>(p.repeats) *
         job.threads;
}

}  // namespace
}  // namespace fastseq
