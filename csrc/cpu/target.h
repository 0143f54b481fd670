// The target distribution p_ij = (q_ij^2 / f_j) / sum_j (q_ij^2 / f_j): two sweeps over q, one where f is given.
//
// Points stand in the lanes (distances.h), so that no lane is wasted on a few columns. Column sums are made in blocks
// of points that depend on the sizes alone, and the blocks are added up in order: the same bits for any number of
// threads.
#pragma once

#include "distances.h"
#include "team.h"

namespace fastseq {
namespace {

template <typename Real>
class TargetDistribution {
 public:
  explicit TargetDistribution(const TargetParams& p)
      : p_(p),
        groups_(divide_up(p.N, kGroupPoints<Real>)),
        blocks_(groups_ < kMost ? groups_ : kMost),
        threads_(useful_threads(p.threads, p.N * p.K, blocks_, 1)) {}

  int threads() const { return threads_; }

  void place(Carver& carver) {
    inverse_ = carver.take<Real>(p_.K);
    sums_ = carver.take<Real>(p_.freq ? 0 : blocks_ * p_.K);
    lane_sums_ = carver.take<Real>(p_.freq ? 0 : threads_ * p_.K * kLanes<Real>);
    group_ = carver.take<Real>(threads_ * p_.K * kGroupStride<Real>);
    barrier_ = carver.take<Barrier>(1);
  }

  void prepare() { *barrier_ = Barrier(); }

  void work(int thread, int threads) {
    Real* group = group_ + thread * p_.K * kGroupStride<Real>;
    const Range blocks = split(blocks_, threads, thread);
    if (!p_.freq) {
      Real* lane_sums = lane_sums_ + thread * p_.K * kLanes<Real>;
      for (int64_t block = blocks.begin; block < blocks.end; ++block) sum_block(block, group, lane_sums);
      barrier_->wait(threads);
    }
    const Range columns = split(p_.K, threads, thread);
    for (int64_t j = columns.begin; j < columns.end; ++j) inverse_[j] = Real(1) / frequency(j);
    barrier_->wait(threads);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const Range range = split(groups_, blocks_, block);
      for (int64_t i = range.begin; i < range.end; ++i) sharpen(i * kGroupPoints<Real>, group);
    }
  }

  void finish() {}

 private:
  static constexpr int64_t kMost = 64;       // blocks
  static constexpr int64_t kSumGroups = 32;  // groups of a partial sum

  void sum_block(int64_t block, Real* group, Real* lane_sums) const {
    constexpr int n = kLanes<Real>;
    Real* sums = sums_ + block * p_.K;
    memset(sums, 0, static_cast<size_t>(p_.K) * sizeof(Real));
    const Range range = split(groups_, blocks_, block);
    for (int64_t first = range.begin; first < range.end; first += kSumGroups) {
      memset(lane_sums, 0, static_cast<size_t>(p_.K * n) * sizeof(Real));
      const int64_t end = first + kSumGroups < range.end ? first + kSumGroups : range.end;
      for (int64_t i = first; i < end; ++i) {
        load_group<Beyond::kZero>(p_.storage, p_.q, i * kGroupPoints<Real>, p_.N, p_.K, group);
        for (int64_t j = 0; j < p_.K; ++j) {
          Vec<Real> sum = load(lane_sums + j * n);
          FASTSEQ_UNROLL
          for (int v = 0; v < kPointVectors; ++v) sum = sum + load(group + j * kGroupStride<Real> + v * n);
          store(lane_sums + j * n, sum);
        }
      }
      for (int64_t j = 0; j < p_.K; ++j) {
        Real sum = 0;
        for (int lane = 0; lane < n; ++lane) sum += lane_sums[j * n + lane];
        sums[j] += sum;
      }
    }
  }

  Real frequency(int64_t j) const {
    if (p_.freq) return static_cast<const Real*>(p_.freq)[j];
    Real sum = 0;
    for (int64_t block = 0; block < blocks_; ++block) sum += sums_[block * p_.K + j];
    return sum;
  }

  void sharpen(int64_t first, Real* group) const {
    constexpr int n = kLanes<Real>;
    load_group<Beyond::kRepeat>(p_.storage, p_.q, first, p_.N, p_.K, group);
    CarefulSum<Real> sum;
    for (int64_t begin = 0; begin < p_.K; begin += kSumBlock) {
      Lanes<Real> part;
      fill<Real>(part, 0);
      for (int64_t j = begin; j < begin + kSumBlock && j < p_.K; ++j) {
        const Vec<Real> inverse = broadcast(inverse_[j]);
        FASTSEQ_UNROLL
        for (int v = 0; v < kPointVectors; ++v) {
          Real* at = group + j * kGroupStride<Real> + v * n;
          const Vec<Real> q = load(at), weight = q * (q * inverse);
          part[v] = part[v] + weight;
          store(at, weight);
        }
      }
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) sum.add(v, part[v]);
    }
    Lanes<Real> scale;
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) scale[v] = broadcast(Real(1)) / sum.value[v];
    for (int64_t j = 0; j < p_.K; ++j) FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      Real* at = group + j * kGroupStride<Real> + v * n;
      store(at, load(at) * scale[v]);
    }
    store_group(p_.storage, group, Real(1), first, p_.N, p_.K, p_.p);
  }

  TargetParams p_;
  int64_t groups_, blocks_;
  int threads_;
  Real *inverse_ = nullptr, *sums_ = nullptr, *lane_sums_ = nullptr, *group_ = nullptr;
  Barrier* barrier_ = nullptr;
};

}  // namespace
}  // namespace fastseq
