// Soft assignment to centres, the clustering loss, and the gradients of both for points and centres in the same pass.
//
// Points are worked on in groups (distances.h), and several groups, a stretch, between two visits to the centres'
// gradients. Per stretch: distances, assignment and weights w_ij of every group (student_t.h), then
//   dz_i = sum_j w_ij (z_i - mu_j)        dmu_j = -sum_i w_ij (z_i - mu_j)
// with each difference made once for both sums: the lanes of dz are points, and those of dmu partial sums that are
// added up when the stretch is done. Nothing is larger than a stretch, whatever N is.
//
// The points are cut into blocks whose number depends on the sizes alone. Each has sums of its own, and these are added
// up in order: the same bits for any number of threads.
#pragma once

#include "student_t.h"
#include "team.h"

namespace fastseq {
namespace {

// Features of a register tile of the gradients, with kPointVectors vectors each, and centres between two reductions.
constexpr int kTileFeatures = kTileRows == 6 ? 4 : 2;
constexpr int kReduceCenters = 64;
// Centres whose share of dz is added up by itself: one chain over 100,000 centres would round too often.
constexpr int64_t kSumCenters = 16 * kReduceCenters;

constexpr int64_t kMostBlocks = 64, kFewestBlocks = 8;
constexpr int64_t kBlockBytes = int64_t{16} << 20;     // what all blocks' sums may take together
constexpr int64_t kStretchBytes = int64_t{768} << 10;  // what a stretch may take: it should stay in cache
constexpr int64_t kMostGroups = 8;

template <typename Real, bool kUnitAlpha>
class Clustering {
 public:
  explicit Clustering(const ClusterParams& p)
      : p_(p),
        loss_task_(p.task == ClusterTask::kTargetLoss || p.task == ClusterTask::kFrequencyLoss),
        gradients_(p.dz != nullptr || p.dcenters != nullptr),
        gradient_scale_(StudentT<Real, kUnitAlpha>::gradient_scale(p.alpha, p.scale)),
        groups_(divide_up(p.N, kGroupPoints<Real>)) {
    const int64_t group_bytes = (p.K + 2 * p.d) * kGroupStride<Real> * static_cast<int64_t>(sizeof(Real));
    stretch_ = !gradients_ ? 1 : group_bytes * kMostGroups < kStretchBytes ? kMostGroups : kStretchBytes / group_bytes;
    if (stretch_ < 1) stretch_ = 1;
    blocks_ = kBlockBytes / (p.K * p.d * static_cast<int64_t>(sizeof(Real)));
    if (blocks_ > kMostBlocks || !p.dcenters) blocks_ = kMostBlocks;
    if (blocks_ < kFewestBlocks) blocks_ = kFewestBlocks;
    if (blocks_ > divide_up(groups_, stretch_)) blocks_ = divide_up(groups_, stretch_);
    threads_ = useful_threads(p.threads, p.N * p.d * p.K, blocks_, 1);
  }

  int threads() const { return threads_; }

  void place(Carver& carver) {
    const int64_t feature_numbers = p_.d * kGroupStride<Real>, center_numbers = p_.K * kGroupStride<Real>;
    points_ = carver.take<Real>(threads_ * stretch_ * feature_numbers);
    gradient_ = carver.take<Real>(gradients_ ? threads_ * stretch_ * feature_numbers : 0);
    gradient_totals_ = carver.take<Real>(gradients_ && p_.K > kSumCenters ? threads_ * stretch_ * feature_numbers : 0);
    weights_ = carver.take<Real>(threads_ * stretch_ * center_numbers);
    distances_ = carver.take<Real>(kUnitAlpha ? 0 : threads_ * center_numbers);
    given_ = carver.take<Real>(p_.task != ClusterTask::kAssign ? threads_ * center_numbers : 0);
    packed_ = as_arithmetic<Real>(p_.storage) ? nullptr : carver.take<Real>(p_.K * p_.d);
    inverse_frequencies_ = p_.freq ? carver.take<Real>(p_.K) : nullptr;
    sums_ = carver.take<Real>(p_.dcenters ? blocks_ * sum_stride() : 0);
    losses_ = carver.take<double>(blocks_);
    next_ = carver.take<int64_t>(1);
    barrier_ = carver.take<Barrier>(1);
  }

  void prepare() {
    *next_ = 0;
    *barrier_ = Barrier();
    if (packed_) load_rows<Real>(p_.storage, p_.centers, p_.d, packed_, p_.d, p_.K, p_.d);
    centers_ = packed_ ? packed_ : static_cast<const Real*>(p_.centers);
    if (p_.freq)
      for (int64_t j = 0; j < p_.K; ++j) inverse_frequencies_[j] = Real(1) / static_cast<const Real*>(p_.freq)[j];
  }

  void work(int thread, int threads) {
    for (;;) {
      const int64_t block = __atomic_fetch_add(next_, 1, __ATOMIC_RELAXED);
      if (block >= blocks_) break;
      work_on(block, thread);
    }
    if (!p_.dcenters) return;
    barrier_->wait(threads);
    add_up_sums(split(divide_up(p_.K * p_.d, kLanes<Real>), threads, thread));
    barrier_->wait(threads);
    store_center_gradients(split(p_.K, threads, thread), gradient_ + thread * stretch_ * p_.d * kGroupStride<Real>);
  }

  void finish() {
    if (!loss_task_) return;
    double loss = 0;
    for (int64_t block = 0; block < blocks_; ++block) loss += losses_[block];
    *p_.loss = loss * p_.scale;
  }

 private:
  int64_t sum_stride() const { return round_up(p_.K * p_.d, kLanes<Real>); }
  Real* sums_of(int64_t block) const { return sums_ + block * sum_stride(); }

  void work_on(int64_t block, int thread) {
    const int64_t feature_numbers = p_.d * kGroupStride<Real>, center_numbers = p_.K * kGroupStride<Real>;
    Stretch s{};
    s.points = points_ + thread * stretch_ * feature_numbers;
    s.gradient = gradients_ ? gradient_ + thread * stretch_ * feature_numbers : nullptr;
    s.gradient_totals =
        gradients_ && p_.K > kSumCenters ? gradient_totals_ + thread * stretch_ * feature_numbers : nullptr;
    s.weights = weights_ + thread * stretch_ * center_numbers;
    s.sums = p_.dcenters ? sums_of(block) : nullptr;
    if (s.sums) memset(s.sums, 0, static_cast<size_t>(sum_stride()) * sizeof(Real));
    StudentT<Real, kUnitAlpha> group(p_.K, p_.alpha, nullptr, distances_ + thread * center_numbers,
                                     given_ + thread * center_numbers);
    losses_[block] = 0;
    const Range range = split(groups_, blocks_, block);
    for (int64_t first = range.begin; first < range.end; first += stretch_) {
      s.groups = range.end - first < stretch_ ? range.end - first : stretch_;
      for (int64_t i = 0; i < s.groups; ++i) {
        group.numerators = s.weights + i * center_numbers;
        losses_[block] += weigh(group, s.points + i * feature_numbers, (first + i) * kGroupPoints<Real>);
      }
      if (!gradients_) continue;
      const int64_t numbers = s.groups * feature_numbers;
      memset(s.gradient, 0, static_cast<size_t>(numbers) * sizeof(Real));
      if (s.gradient_totals) memset(s.gradient_totals, 0, static_cast<size_t>(numbers) * sizeof(Real));
      for (int64_t j = 0; j < p_.K; j += kReduceCenters) {
        if (s.gradient_totals && j % kSumCenters == 0) move_to_totals(s, numbers);
        const int centers = static_cast<int>(p_.K - j < kReduceCenters ? p_.K - j : kReduceCenters);
        for (int64_t k = 0; k < p_.d; k += tile_features(k)) switch (tile_features(k)) {
            case kTileFeatures:
              gradient_tile<kTileFeatures>(s, j, centers, k);
              break;
            case kTileFeatures / 2:
              gradient_tile<kTileFeatures / 2>(s, j, centers, k);
              break;
            default:
              gradient_tile<1>(s, j, centers, k);
          }
      }
      if (s.gradient_totals) move_to_totals(s, numbers);
      const Real* gradient = s.gradient_totals ? s.gradient_totals : s.gradient;
      if (p_.dz)
        for (int64_t i = 0; i < s.groups; ++i)
          store_group(p_.gradient_storage, gradient + i * feature_numbers, gradient_scale_,
                      (first + i) * kGroupPoints<Real>, p_.N, p_.d, p_.dz);
    }
  }

  // Assignment and weights of one group; gives the sum of its points' losses.
  double weigh(StudentT<Real, kUnitAlpha>& group, Real* points, int64_t first) {
    load_group<Beyond::kRepeat>(p_.storage, p_.z, first, p_.N, p_.d, points);
    Upcoming upcoming;
    if (p_.given) {
      const int64_t item_bytes = bytes_of(p_.given_storage);
      upcoming.row_bytes = p_.K * item_bytes;
      upcoming.log_items = item_bytes == 8 ? 3 : item_bytes == 4 ? 4 : 5;
      upcoming.row = static_cast<const char*>(p_.given) + first * upcoming.row_bytes;
    }
    group.assign(points, centers_, p_.d, upcoming);
    Lanes<Real> loss;
    fill<Real>(loss, 0);
    switch (p_.task) {
      case ClusterTask::kAssign:
        group.normalize();
        store_group(p_.storage, group.numerators, Real(1), first, p_.N, p_.K, p_.q);
        return 0;
      case ClusterTask::kAssignBackward:
        load_group<Beyond::kZero>(p_.given_storage, p_.given, first, p_.N, p_.K, group.given);
        group.weigh_arriving();
        return 0;
      case ClusterTask::kTargetLoss:
        load_group<Beyond::kZero>(p_.given_storage, p_.given, first, p_.N, p_.K, group.given);
        group.weigh_target(gradients_, &loss);
        break;
      case ClusterTask::kFrequencyLoss: {
        Real there[kGroupPoints<Real>];
        for (int i = 0; i < kGroupPoints<Real>; ++i) there[i] = first + i < p_.N ? 1 : 0;
        Lanes<Real> live;
        for (int v = 0; v < kPointVectors; ++v) live[v] = load(there + v * kLanes<Real>);
        group.weigh_frequencies(inverse_frequencies_, live, gradients_, &loss);
        break;
      }
    }
    double sum = 0;
    for (int v = 0; v < kPointVectors; ++v)
      for (int i = 0; i < kLanes<Real>; ++i) sum += static_cast<double>(loss[v][i]);
    return sum;
  }

  struct Stretch {
    Real *points, *gradient, *weights;
    Real* gradient_totals;  // like gradient, for more than kSumCenters centres, or null
    Real* sums;             // tile by tile of features [K][tile_features(k)], or null
    int64_t groups;
  };

  // Adds the gradient that some centres gave to the totals, and begins anew.
  static void move_to_totals(const Stretch& s, int64_t numbers) {
    for (int64_t at = 0; at < numbers; at += kLanes<Real>) {
      store(s.gradient_totals + at, load(s.gradient_totals + at) + load(s.gradient + at));
      store(s.gradient + at, broadcast(Real(0)));
    }
  }

  // Both gradients of some centres and kFeatures features over all groups of a stretch.
  template <int kFeatures>
  __attribute__((noinline)) void gradient_tile(const Stretch& s, int64_t j, int centers, int64_t k) const {
    constexpr int n = kLanes<Real>;
    constexpr int kSums = round_lanes(kReduceCenters * kFeatures);
    alignas(64) Real sums[kSums * n];
    if (centers < kReduceCenters) memset(sums, 0, sizeof(sums));  // else the first group sets them all
    const Real* mu = centers_ + j * p_.d + k;
    for (int64_t i = 0; i < s.groups; ++i) {
      const int64_t at = (i * p_.d + k) * kGroupStride<Real>;
      const Real* weights = s.weights + (i * p_.K + j) * kGroupStride<Real>;
      if (i == 0)
        gradient_step<kFeatures, true>(s.points + at, weights, mu, p_.d, centers, s.gradient + at, sums);
      else
        gradient_step<kFeatures, false>(s.points + at, weights, mu, p_.d, centers, s.gradient + at, sums);
    }
    if (!s.sums) return;
    for (int first = 0; first < centers * kFeatures; first += n) {
      Vec<Real> block[n];
      FASTSEQ_UNROLL
      for (int i = 0; i < n; ++i) block[i] = load(sums + (first + i) * n);
      Real* to = s.sums + k * p_.K + j * kFeatures + first;
      const int inside = lanes_inside<Real>(centers * kFeatures, first);
      store_part(to, load_part(to, inside) + sum_lanes<Real>(block), inside);
    }
  }

  static constexpr int round_lanes(int count) { return (count + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>; }

  // Centre by centre, the sums of all features side by side: their chains hide one another's latency.
  template <int kFeatures, bool kFirst>
  FASTSEQ_INLINE static void gradient_step(const Real* points, const Real* weights, const Real* mu, int64_t d,
                                           int centers, Real* gradient, Real* sums) {
    constexpr int n = kLanes<Real>;
    Vec<Real> moved[kFeatures][kPointVectors];  // sum_j w_j (mu_j - z)
    set_zero<Real>(moved);
    for (int j = 0; j < centers; ++j) {
      Vec<Real> center[kFeatures], sum[kFeatures];
      FASTSEQ_UNROLL
      for (int k = 0; k < kFeatures; ++k) {
        center[k] = broadcast(mu[j * d + k]);
        sum[k] = kFirst ? zero<Real>() : load(sums + (j * kFeatures + k) * n);
      }
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> w = load(weights + j * kGroupStride<Real> + v * n);
        FASTSEQ_UNROLL
        for (int k = 0; k < kFeatures; ++k) {
          const Vec<Real> difference = center[k] - load(points + k * kGroupStride<Real> + v * n);
          moved[k][v] = fma(w, difference, moved[k][v]);
          sum[k] = fma(w, difference, sum[k]);
        }
      }
      FASTSEQ_UNROLL
      for (int k = 0; k < kFeatures; ++k) store(sums + (j * kFeatures + k) * n, sum[k]);
    }
    FASTSEQ_UNROLL
    for (int k = 0; k < kFeatures; ++k) FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      Real* to = gradient + k * kGroupStride<Real> + v * n;
      store(to, load(to) - moved[k][v]);
    }
  }

  // Features of the tile that begins with feature k.
  int tile_features(int64_t k) const {
    const int64_t left = p_.d - k;
    return left >= kTileFeatures ? kTileFeatures : left >= kTileFeatures / 2 ? kTileFeatures / 2 : 1;
  }
  // Some vectors of all blocks' sums into those of the first block, in order.
  void add_up_sums(Range vectors) const {
    for (int64_t i = vectors.begin; i < vectors.end; ++i) {
      const int64_t at = i * kLanes<Real>;
      Vec<Real> sum = load(sums_of(0) + at);
      for (int64_t block = 1; block < blocks_; ++block) sum = sum + load(sums_of(block) + at);
      store(sums_of(0) + at, sum * broadcast(gradient_scale_));
    }
  }
  // row: room for d numbers
  void store_center_gradients(Range centers, Real* row) const {
    for (int64_t j = centers.begin; j < centers.end; ++j) {
      for (int64_t k = 0; k < p_.d; k += tile_features(k))
        for (int i = 0; i < tile_features(k); ++i) row[k + i] = sums_of(0)[k * p_.K + j * tile_features(k) + i];
      store_rows<Real>(p_.gradient_storage, row, p_.d, at(p_.dcenters, p_.gradient_storage, j * p_.d), p_.d, 1, p_.d);
    }
  }

  ClusterParams p_;
  bool loss_task_, gradients_;
  Real gradient_scale_;
  int64_t groups_, stretch_ = 1, blocks_ = 1;
  int threads_ = 1;
  const Real* centers_ = nullptr;
  Real *points_ = nullptr, *gradient_ = nullptr, *gradient_totals_ = nullptr, *weights_ = nullptr,
       *distances_ = nullptr, *given_ = nullptr;
  Real *packed_ = nullptr, *inverse_frequencies_ = nullptr, *sums_ = nullptr;
  double* losses_ = nullptr;
  int64_t* next_ = nullptr;
  Barrier* barrier_ = nullptr;
};

}  // namespace
}  // namespace fastseq
