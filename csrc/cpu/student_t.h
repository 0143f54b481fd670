// What a group of points has to do with every centre: the Student's t kernel, its assignment q, and the weights of the
// gradients. All of it stays in the points' lanes.
//
// Arrays of a group are [K][kPointVectors][lanes]:
//   numerators   u_j = (1 + D_j / alpha)^(-(alpha + 1) / 2), relative to the largest one unless alpha is 1
//   distances    D_j, unless alpha is 1
//   given        a target p_j or the gradient that arrives at q_j
// With alpha = 1 there is no power at all: u_j = 1 / (1 + D_j). Else u_j is the exponential of a logarithm relative to
// that of the nearest centre, so nothing overflows and at least one u_j is 1 however far the centres are:
//   (alpha + D_j) / (alpha + D_min) = 1 + (D_j - D_min) / (alpha + D_min)
// and what each step to the power rounds away is carried along (twofold.h), since the exponent multiplies it.
//
// Where a point is close to one centre, its q is nearly 1, and whatever is made of 1 - q would lose its digits. So that
// centre, called the nearest here (of several equally near the first), is left out of the sums, which then are sums of
// small numbers, and what belongs to it is made of those: 1 - q = sum of the other q, and so on. It is left out by a
// zero in its place, and its weight is put there at the end: one visit a point, and none a point and centre.
#pragma once

#include "distances.h"
#include "logarithm.h"

namespace fastseq {
namespace {

// 1 / x for x of at least the smallest normal number and less than infinity, to little more than half a unit in the
// last place.
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> reciprocal_of_finite(Vec<float> x) {
  const Vec<float> near = _mm512_maskz_rcp14_ps(0xffff, x);
  return fma(fma(-x, near, broadcast(1.0f)), near, near);
}
// The estimate for infinity is zero, and their product NaN.
FASTSEQ_INLINE Vec<float> reciprocal(Vec<float> x) { return reciprocal_of_finite(at_most(3.4028234e38f, x)); }
#else
FASTSEQ_INLINE Vec<float> reciprocal_of_finite(Vec<float> x) { return broadcast(1.0f) / x; }
FASTSEQ_INLINE Vec<float> reciprocal(Vec<float> x) { return broadcast(1.0f) / x; }
#endif
FASTSEQ_INLINE Vec<double> reciprocal_of_finite(Vec<double> x) { return broadcast(1.0) / x; }
FASTSEQ_INLINE Vec<double> reciprocal(Vec<double> x) { return broadcast(1.0) / x; }

template <typename Real>
struct AlphaLimits;  // beyond them nothing changes
template <>
struct AlphaLimits<float> {
  static constexpr double kLeast = 1.2e-38, kMost = 1e30;
};
template <>
struct AlphaLimits<double> {
  static constexpr double kLeast = 2.3e-308, kMost = 1e300;
};

template <typename Real, bool kUnitAlpha>
class StudentT {
 public:
  StudentT(int64_t K_, double alpha, Real* numerators_, Real* distances_, Real* given_)
      : numerators(numerators_), distances(distances_), given(given_), K(K_), alpha_(limited(alpha)) {}

  Real* numerators;
  Real* distances;
  Real* given;
  int64_t K;

  // What gradients made of the weights of a weigh_...() have to be multiplied by: slopes there are 1 / (alpha + D_j).
  static Real gradient_scale(double alpha, double scale) { return static_cast<Real>(scale * (limited(alpha) + 1)); }

  // Numerators and distances of a group of points, and the sum of the numerators.
  void assign(const Real* points, const Real* centers, int64_t d, const Upcoming& upcoming) {
    CarefulSum<Real> others;
    Lanes<Real> nearest;
    fill<Real>(nearest, 0);
    IntVec<Real> nearest_center[kPointVectors] = {};
    // The largest so far is kept out of the sum.
    if (kUnitAlpha) {
      for_distances(points, centers, d, Range{0, K}, [&](int64_t j, const auto& distance) {
        constexpr int kCenters = sizeof(distance) / sizeof(distance[0]);
        FASTSEQ_UNROLL
        for (int c = 0; c < kCenters; ++c) upcoming.prefetch<Real>(j + c);
        // The tile's sum goes into the careful one as a whole: four additions for a few centres, not for each.
        FASTSEQ_UNROLL
        for (int v = 0; v < kPointVectors; ++v) {
          Vec<Real> largest, smaller_ones[kCenters];
          IntVec<Real> center = center_number(j);
          FASTSEQ_UNROLL
          for (int c = 0; c < kCenters; ++c) {
            const Vec<Real> u = reciprocal(broadcast(Real(1)) + distance[c][v]);
            put(numerators, j + c, v, u);
            if (c > 0) smaller_ones[c] = smaller(largest, u);
            if (c > 0) center = u > largest ? center_number(j + c) : center;
            largest = c > 0 ? larger(largest, u) : u;
          }
          smaller_ones[0] = smaller(nearest[v], largest);
          nearest_center[v] = largest > nearest[v] ? center : nearest_center[v];
          nearest[v] = larger(nearest[v], largest);
          others.add(v, sum_in_pairs<Real>(smaller_ones));
        }
      });
    } else {
      Lanes<Real> least;
      fill<Real>(least, LogConstants<Real>::kInfinity);
      const auto keep = [&](int64_t j, const Lanes<Real>& distance) {
        upcoming.prefetch<Real>(j);
        FASTSEQ_UNROLL
        for (int v = 0; v < kPointVectors; ++v) {
          least[v] = distance[v] < least[v] ? distance[v] : least[v];
          put(distances, j, v, distance[v]);
        }
      };
      for_distances(points, centers, d, Range{0, K}, each_center(keep));
      const Twofold<Real> alpha = broadcast_twofold<Real>(alpha_);
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        least_[v] = least[v];
        base_[v] = exact_sum<Real>(alpha.high, least[v]);
        base_[v].low = base_[v].low + alpha.low;
        unit_[v] = broadcast(Real(1)) / base_[v].high;
      }
      for (int64_t j = 0; j < K; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> limit = broadcast(-ExpConstants<Real>::kLogisticLimit);
        const Twofold<Real> power = log_numerator(get(distances, j, v), v);
        const auto vanishes = power.high < limit;
        const Vec<Real> u = vanishes ? zero<Real>() : exp<Real>({vanishes ? limit : power.high, power.low});
        others.add(v, smaller(nearest[v], u));
        nearest_center[v] = u > nearest[v] ? center_number(j) : nearest_center[v];
        nearest[v] = larger(nearest[v], u);
        put(numerators, j, v, u);
      }
    }
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      sum_[v] = others.value[v] + nearest[v];
      inverse_[v] = broadcast(Real(1)) / sum_[v];
      nearest_[v] = nearest[v];
      others_[v] = others.value[v];
      memcpy(nearest_center_ + v * kLanes<Real>, &nearest_center[v], sizeof(nearest_center[v]));
    }
  }

  // Numerators become q.
  void normalize() {
    for (int64_t j = 0; j < K; ++j) FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) put(numerators, j, v, assigned(get(numerators, j, v), v));
  }

  // `given` is a target p. Numerators become the weights v_j (p_j - q_j sum p) of z - mu_j in the gradient,
  // with v_j = 1 / (alpha + D_j). Adds sum_j p_j log(p_j / q_j) to each lane of `loss`.
  void weigh_target(bool weights, Lanes<Real>* loss) {
    Lanes<Real> nearest_p;
    take_nearest(given, nearest_p);
    CarefulSum<Real> others;
    int64_t whole = 0;
    for (; whole + kTileCenters <= K; whole += kTileCenters) add_given<kTileCenters>(whole, others);
    for (; whole < K; ++whole) add_given<1>(whole, others);
    Lanes<Real> q_mass, nearest_weight, log_sum;  // q_mass: sum p / sum u
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      const Vec<Real> q = assigned(nearest_[v], v);
      q_mass[v] = quotient(nearest_p[v] + others.value[v], sum_[v], inverse_[v]);
      // p - q sum p = p (1 - q) - q (sum of the other p)
      nearest_weight[v] = nearest_slope(v) * fma(nearest_p[v], others_q(v), -(q * others.value[v]));
      log_sum[v] = log1p<Real>({others_[v] / nearest_[v], zero<Real>()}).high;  // -log q of the nearest
      (*loss)[v] = fma(nearest_p[v], log_of(nearest_p[v]) + log_sum[v], (*loss)[v]);
    }
    sum_over_blocks(loss, [&](Range block, Lanes<Real>& part) {
      for (int64_t j = block.begin; j < block.end; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> p = get(given, j, v), u = get(numerators, j, v);
        // log(p / q); q itself may have underflowed, but u not where alpha is 1 and D is less than 1e37.
        const Vec<Real> log_ratio = kUnitAlpha ? log_of((p * sum_[v]) * reciprocal_of_finite(at_least_smallest(u)))
                                               : log_of(p) - log_numerator(get(distances, j, v), v).high + log_sum[v];
        part[v] = fma(p, log_ratio, part[v]);
        if (weights) put(numerators, j, v, slope(u, j, v) * fma(-u, q_mass[v], p));
      }
    });
    if (weights) put_nearest(numerators, nearest_weight);
  }

  // The same with the target made of q and the frequencies, whose inverses are given; `live` is 1 in the lanes that
  // hold a point and 0 in the others. `given` takes q_j / f_j.
  void weigh_frequencies(const Real* inverse_frequencies, const Lanes<Real>& live, bool weights, Lanes<Real>* loss) {
    CarefulSum<Real> others;
    Lanes<Real> nothing;
    fill<Real>(nothing, 0);
    put_nearest(numerators, nothing);  // nearest_ has what was there
    for (int64_t j = 0; j < K; ++j) {
      const Vec<Real> inverse = broadcast(inverse_frequencies[j]);
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> q = assigned(get(numerators, j, v), v), share = q * inverse;
        others.add(v, q * share);
        put(given, j, v, share);
      }
    }
    Lanes<Real> total, inverse_total, live_inverse, nearest_inverse, nearest_weight;
    of_nearest(inverse_frequencies, nearest_inverse);
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      const Vec<Real> q = assigned(nearest_[v], v), share = q * nearest_inverse[v];
      total[v] = fma(q, share, others.value[v]);
      inverse_total[v] = broadcast(Real(1)) / total[v];
      live_inverse[v] = inverse_[v] * live[v];
      // p / q - 1, from share - total = share (1 - q) - (sum of the other q · share)
      const Vec<Real> excess = fma(share, others_q(v), -others.value[v]) * inverse_total[v];
      const Vec<Real> ratio = quotient(share, total[v], inverse_total[v]);
      const Vec<Real> log_ratio =
          excess > broadcast(Real(-0.5)) ? log1p<Real>({excess, zero<Real>()}).high : log_of(ratio);
      (*loss)[v] = fma(q * ratio * live[v], log_ratio, (*loss)[v]);
      nearest_weight[v] = nearest_slope(v) * (nearest_[v] * live_inverse[v] * excess);
    }
    sum_over_blocks(loss, [&](Range block, Lanes<Real>& part) {
      for (int64_t j = block.begin; j < block.end; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> u = get(numerators, j, v), q = u * live_inverse[v];
        const Vec<Real> ratio = quotient(get(given, j, v), total[v], inverse_total[v]);  // p / q
        part[v] = fma(q * ratio, log_of(ratio), part[v]);
        if (weights) put(numerators, j, v, slope(u, j, v) * (q * (ratio - broadcast(Real(1)))));
      }
    });
    if (weights) put_nearest(numerators, nearest_weight);
  }

  // `given` is the gradient that arrives at q, and numerators become the weights -v_j q_j (g_j - sum_k g_k
  // q_k).
  void weigh_arriving() {
    Lanes<Real> others, nearest_g;
    fill<Real>(others, 0);
    take_nearest(given, nearest_g);
    sum_over_blocks(&others, [&](Range block, Lanes<Real>& part) {
      for (int64_t j = block.begin; j < block.end; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v)
        part[v] = fma(get(given, j, v), assigned(get(numerators, j, v), v), part[v]);
    });
    Lanes<Real> mean, nearest_weight;
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      const Vec<Real> q = assigned(nearest_[v], v);
      mean[v] = fma(nearest_g[v], q, others[v]);
      // sum_k g_k q_k - g_j
      nearest_weight[v] = nearest_slope(v) * (q * fma(-nearest_g[v], others_q(v), others[v]));
    }
    for (int64_t j = 0; j < K; ++j) FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      const Vec<Real> u = get(numerators, j, v), q = assigned(u, v);
      // All g of one size lie on one grid, so that mean - g loses the same at each of them: that would not cancel in a
      // sum over many centres.
      const Twofold<Real> excess = exact_sum<Real>(mean[v], -get(given, j, v));
      put(numerators, j, v, slope(u, j, v) * fma(q, excess.high, q * excess.low));
    }
    put_nearest(numerators, nearest_weight);
  }

 private:
  using Lane = decltype(IntVec<Real>{}[0] + 0);
  // Lanes one by one: in memory, since picking one out of a register, or putting one in, is several instructions.
  struct PerPoint {
    alignas(64) Real value[kGroupPoints<Real>];
    PerPoint() {}
    explicit PerPoint(const Lanes<Real>& lanes) {
      for (int v = 0; v < kPointVectors; ++v) store(value + v * kLanes<Real>, lanes[v]);
    }
    void load_to(Lanes<Real>& lanes) const {
      for (int v = 0; v < kPointVectors; ++v) lanes[v] = load(value + v * kLanes<Real>);
    }
  };
  double alpha_;
  Lanes<Real> sum_, inverse_;
  Lanes<Real> nearest_, others_;       // the largest numerator, and the sum of the others
  Lanes<Real> least_, unit_;           // the least distance, and 1 / (alpha + it)
  Twofold<Real> base_[kPointVectors];  // alpha + the least distance

  Lane nearest_center_[kGroupPoints<Real>];

  FASTSEQ_INLINE static IntVec<Real> center_number(int64_t j) { return IntVec<Real>{} + static_cast<Lane>(j); }
  int64_t nearest_at(int i) const { return static_cast<int64_t>(nearest_center_[i]) * kGroupStride<Real> + i; }
  // The nearest centres' numbers, with zeros left in their places.
  void take_nearest(Real* array, Lanes<Real>& to) const {
    PerPoint taken;
    for (int i = 0; i < kGroupPoints<Real>; ++i) {
      taken.value[i] = array[nearest_at(i)];
      array[nearest_at(i)] = 0;
    }
    taken.load_to(to);
  }
  void put_nearest(Real* array, const Lanes<Real>& from) const {
    const PerPoint numbers(from);
    for (int i = 0; i < kGroupPoints<Real>; ++i) array[nearest_at(i)] = numbers.value[i];
  }
  // Of an array [K], the nearest centres' numbers.
  void of_nearest(const Real* array, Lanes<Real>& to) const {
    PerPoint found;
    for (int i = 0; i < kGroupPoints<Real>; ++i) found.value[i] = array[nearest_center_[i]];
    found.load_to(to);
  }
  template <int kCenters>
  FASTSEQ_INLINE void add_given(int64_t j, CarefulSum<Real>& sum) const {
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      Vec<Real> x[kCenters];
      FASTSEQ_UNROLL
      for (int c = 0; c < kCenters; ++c) x[c] = get(given, j + c, v);
      sum.add(v, sum_in_pairs<Real>(x));
    }
  }

  static double limited(double alpha) {
    using L = AlphaLimits<Real>;
    return alpha < L::kLeast ? L::kLeast : alpha > L::kMost ? L::kMost : alpha;
  }
  FASTSEQ_INLINE static Vec<Real> get(const Real* array, int64_t j, int v) {
    return load(array + j * kGroupStride<Real> + v * kLanes<Real>);
  }
  FASTSEQ_INLINE static void put(Real* array, int64_t j, int v, Vec<Real> value) {
    store(array + j * kGroupStride<Real> + v * kLanes<Real>, value);
  }
  // a / b from 1 / b, rounded as a division would: q is exactly 1 where there is one centre.
  FASTSEQ_INLINE static Vec<Real> quotient(Vec<Real> a, Vec<Real> b, Vec<Real> inverse) {
#if defined(__FMA__) || defined(__aarch64__)
    const Vec<Real> near = a * inverse;
    return fma(fma(-near, b, a), inverse, near);
#else
    static_cast<void>(inverse);
    return a / b;  // the remainder a - near * b would be rounded
#endif
  }
  // q of a numerator.
  FASTSEQ_INLINE Vec<Real> assigned(Vec<Real> u, int v) const { return quotient(u, sum_[v], inverse_[v]); }
  FASTSEQ_INLINE static Vec<Real> at_least_smallest(Vec<Real> x) { return at_least(LogConstants<Real>::kSmallest, x); }
  // For a factor of x, or of what is NaN when x is. 0 log 0 is 0, so zero may have any logarithm that is finite.
  FASTSEQ_INLINE static Vec<Real> log_of(Vec<Real> x) { return log_of_finite<Real>(at_least_smallest(x)); }
  // 1 - q of the nearest centre
  FASTSEQ_INLINE Vec<Real> others_q(int v) const { return quotient(others_[v], sum_[v], inverse_[v]); }
  // log u_j relative to the largest
  FASTSEQ_INLINE Twofold<Real> log_numerator(Vec<Real> distance, int v) const {
    const Twofold<Real> more = quick_sum<Real>(distance, -least_[v]);
    Twofold<Real> y;
    y.high = more.high * unit_[v];
    y.low = (more.low - product_error<Real>(y.high, base_[v].high, more.high) - y.high * base_[v].low) * unit_[v];
    return product<Real>(broadcast_twofold<Real>(-0.5 * (alpha_ + 1)), log1p<Real>(y));
  }
  // 1 / (alpha + D_j)
  FASTSEQ_INLINE Vec<Real> slope(Vec<Real> numerator, int64_t j, int v) const {
    return kUnitAlpha ? numerator : slope_at(get(distances, j, v));
  }
  FASTSEQ_INLINE Vec<Real> nearest_slope(int v) const { return kUnitAlpha ? nearest_[v] : slope_at(least_[v]); }
  FASTSEQ_INLINE Vec<Real> slope_at(Vec<Real> distance) const {
    return broadcast(Real(1)) / (broadcast(static_cast<Real>(alpha_)) + distance);
  }
  template <typename Body>
  FASTSEQ_INLINE void sum_over_blocks(Lanes<Real>* total, const Body& body) const {
    CarefulSum<Real> sum;
    for (int64_t begin = 0; begin < K; begin += kSumBlock) {
      Lanes<Real> part;
      fill<Real>(part, 0);
      body(Range{begin, begin + kSumBlock < K ? begin + kSumBlock : K}, part);
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) sum.add(v, part[v]);
    }
    add<Real>(*total, sum.value);
  }
};

}  // namespace
}  // namespace fastseq
