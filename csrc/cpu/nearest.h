// The nearest centre of each point, and its squared distance: a running minimum behind the distances of distances.h.
#pragma once

#include "distances.h"
#include "team.h"

namespace fastseq {
namespace {

template <typename Real>
class NearestCenter {
 public:
  explicit NearestCenter(const NearestParams& p)
      : p_(p),
        groups_(divide_up(p.N, kGroupPoints<Real>)),
        threads_(useful_threads(p.threads, p.N * p.d * p.K, groups_, 1)) {}

  int threads() const { return threads_; }

  void place(Carver& carver) {
    points_ = carver.take<Real>(threads_ * p_.d * kGroupStride<Real>);
    packed_ = as_arithmetic<Real>(p_.storage) ? nullptr : carver.take<Real>(p_.K * p_.d);
    next_ = carver.take<int64_t>(1);
  }

  void prepare() {
    *next_ = 0;
    if (packed_) load_rows<Real>(p_.storage, p_.centers, p_.d, packed_, p_.d, p_.K, p_.d);
    centers_ = packed_ ? packed_ : static_cast<const Real*>(p_.centers);
  }

  void work(int thread, int) {
    Real* points = points_ + thread * p_.d * kGroupStride<Real>;
    const int64_t step = divide_up(1 << 14, p_.d * p_.K * kGroupPoints<Real>);  // groups taken at a time
    for (;;) {
      const int64_t first = __atomic_fetch_add(next_, step, __ATOMIC_RELAXED);
      if (first >= groups_) return;
      for (int64_t group = first; group < first + step && group < groups_; ++group) find(group, points);
    }
  }

  void finish() {}

 private:
  using Integer = IntVec<Real>;

  void find(int64_t group, Real* points) const {
    constexpr int n = kLanes<Real>;
    const int64_t first = group * kGroupPoints<Real>;
    load_group<Beyond::kRepeat>(p_.storage, p_.z, first, p_.N, p_.d, points);
    Lanes<Real> least;
    Integer label[kPointVectors];
    fill<Real>(least, infinity());
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) label[v] = Integer{};
    const auto compare = [&](int64_t j, const Lanes<Real>& distance) {
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        // Less, or the first NaN: a later one compares with a NaN, and then neither is taken.
        const auto nearer = (distance[v] < least[v]) | ((distance[v] != distance[v]) & (least[v] == least[v]));
        least[v] = nearer ? distance[v] : least[v];
        label[v] = nearer ? Integer{} + static_cast<decltype(label[v][0] + 0)>(j) : label[v];
      }
    };
    for_distances(points, centers_, p_.d, Range{0, p_.K}, each_center(compare));
    for (int v = 0; v < kPointVectors; ++v) {
      const int64_t row = first + v * n;
      const int rows = lanes_inside<Real>(p_.N, row);
      if (rows > 0) store_as<Real>(p_.storage, p_.distance, row, least[v], rows);
      for (int i = 0; i < rows; ++i) p_.labels[row + i] = label[v][i];
    }
  }

  static constexpr Real infinity() { return static_cast<Real>(__builtin_inf()); }

  NearestParams p_;
  int64_t groups_;
  int threads_;
  Real* points_ = nullptr;
  Real* packed_ = nullptr;
  int64_t* next_ = nullptr;
  const Real* centers_ = nullptr;
};

}  // namespace
}  // namespace fastseq
