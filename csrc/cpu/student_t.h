// What a group of points has to do with every centre: the Student's t kernel, its assignment q, and the weights of the
// gradients. All of it stays in the points' lanes.
//
// Arrays of a group are [K][kPointVectors][lanes]:
//   numerators   u_j = (1 + D_j / alpha)^(-(alpha + 1) / 2), relative to the largest one unless alpha is 1
//   ratios       D_j / alpha, unless alpha is 1
//   given        a target p_j or the gradient that arrives at q_j
// With alpha = 1 there is no power at all: u_j = 1 / (1 + D_j). Else u_j is the exponential of a logarithm relative to
// that of the nearest centre, so nothing overflows and at least one u_j is 1 however far the centres are. The logarithm
// is taken of the relation of the two, not as a difference of two logarithms, which would lose digits far away.
#pragma once

#include "distances.h"
#include "logarithm.h"

namespace fastseq {
namespace {

// 1 / x for x of at least the smallest normal number, to little more than half a unit in the last place.
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> reciprocal(Vec<float> x) {
  const Vec<float> largest = broadcast(3.4028234e38f);
  x = x > largest ? largest : x;  // infinity times the estimate, zero, would be NaN
  const Vec<float> near = _mm512_maskz_rcp14_ps(0xffff, x);
  return fma(fma(-x, near, broadcast(1.0f)), near, near);
}
#else
FASTSEQ_INLINE Vec<float> reciprocal(Vec<float> x) { return broadcast(1.0f) / x; }
#endif
FASTSEQ_INLINE Vec<double> reciprocal(Vec<double> x) { return broadcast(1.0) / x; }

template <typename Real, bool kUnitAlpha>
class StudentT {
 public:
  StudentT(int64_t K_, Real alpha, Real* numerators_, Real* ratios_, Real* given_)
      : numerators(numerators_),
        ratios(ratios_),
        given(given_),
        K(K_),
        alpha_(broadcast(alpha)),
        half_power_(broadcast((alpha + 1) / 2)) {}

  Real* numerators;
  Real* ratios;
  Real* given;
  int64_t K;

  // Numerators and ratios of a group of points, and the sum of the numerators.
  void assign(const Real* points, const Real* centers, int64_t d, const Upcoming& upcoming) {
    CarefulSum<Real> sum;
    if (kUnitAlpha) {
      for_distances(points, centers, d, Range{0, K}, [&](int64_t j, const Lanes<Real>& distance) {
        upcoming.prefetch<Real>(j);
        FASTSEQ_UNROLL
        for (int v = 0; v < kPointVectors; ++v) {
          const Vec<Real> u = reciprocal(broadcast(Real(1)) + distance[v]);
          sum.add(v, u);
          put(numerators, j, v, u);
        }
      });
    } else {
      Lanes<Real> least;
      fill<Real>(least, LogConstants<Real>::kInfinity);
      for_distances(points, centers, d, Range{0, K}, [&](int64_t j, const Lanes<Real>& distance) {
        upcoming.prefetch<Real>(j);
        FASTSEQ_UNROLL
        for (int v = 0; v < kPointVectors; ++v) {
          const Vec<Real> ratio = distance[v] / alpha_;
          least[v] = ratio < least[v] ? ratio : least[v];
          put(ratios, j, v, ratio);
        }
      });
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        least_[v] = least[v];
        unit_[v] = broadcast(Real(1)) / (broadcast(Real(1)) + least[v]);
      }
      for (int64_t j = 0; j < K; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> low = broadcast(-ExpConstants<Real>::kLogisticLimit);
        const Vec<Real> power = log_numerator(get(ratios, j, v), v);
        const Vec<Real> u = exp<Real>(power < low ? low : power);
        sum.add(v, u);
        put(numerators, j, v, u);
      }
    }
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      sum_[v] = sum.value[v];
      inverse_[v] = broadcast(Real(1)) / sum_[v];
    }
  }

  // Numerators become q.
  void normalize() {
    for (int64_t j = 0; j < K; ++j) FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) put(numerators, j, v, assigned(get(numerators, j, v), v));
  }

  // `given` is a target p. Numerators become the weights scale · v_j (p_j - q_j sum p) of z - mu_j in the gradient,
  // with v_j = 1 / (1 + D_j / alpha). Adds sum_j p_j log(p_j / q_j) to each lane of `loss`.
  void weigh_target(Real scale, bool weights, Lanes<Real>* loss) {
    CarefulSum<Real> mass;
    Lanes<Real> log_sum;
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) log_sum[v] = kUnitAlpha ? zero<Real>() : log<Real>(sum_[v]);
    for (int64_t j = 0; j < K; ++j) FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) mass.add(v, get(given, j, v));
    const Vec<Real> factor = broadcast(scale);
    sum_over_blocks(loss, [&](Range block, Lanes<Real>& part) {
      for (int64_t j = block.begin; j < block.end; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> p = get(given, j, v), u = get(numerators, j, v), q = assigned(u, v);
        // log(p / q); q itself may have underflowed, but not where alpha is 1 and D is less than 1e37.
        const Vec<Real> log_ratio = kUnitAlpha ? log_of(p * reciprocal(at_least_smallest(q)))
                                               : log_of(p) - log_numerator(ratio(j, v), v) + log_sum[v];
        part[v] = fma(p, log_ratio, part[v]);
        if (weights) put(numerators, j, v, factor * slope(u, j, v) * fma(-q, mass.value[v], p));
      }
    });
  }

  // The same with the target made of q and the frequencies, whose inverses are given; `live` is 1 in the lanes that
  // hold a point and 0 in the others.
  void weigh_frequencies(const Real* inverse_frequencies, const Lanes<Real>& live, Real scale, bool weights,
                         Lanes<Real>* loss) {
    CarefulSum<Real> total;
    for (int64_t j = 0; j < K; ++j) {
      const Vec<Real> inverse = broadcast(inverse_frequencies[j]);
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> q = assigned(get(numerators, j, v), v), sharper = q * inverse;
        total.add(v, q * sharper);
        put(given, j, v, sharper);
      }
    }
    Lanes<Real> inverse_total;
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) inverse_total[v] = broadcast(Real(1)) / total.value[v];
    const Vec<Real> factor = broadcast(scale);
    sum_over_blocks(loss, [&](Range block, Lanes<Real>& part) {
      for (int64_t j = block.begin; j < block.end; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> u = get(numerators, j, v), q = assigned(u, v);
        const Vec<Real> ratio = quotient(get(given, j, v), total.value[v], inverse_total[v]);  // p / q
        part[v] = fma(q * ratio * live[v], log_of(ratio), part[v]);
        if (weights) put(numerators, j, v, factor * slope(u, j, v) * fma(q, ratio, -q) * live[v]);
      }
    });
  }

  // `given` is the gradient that arrives at q, and numerators become the weights -scale · v_j q_j (g_j - sum_k g_k
  // q_k).
  void weigh_arriving(Real scale) {
    Lanes<Real> mean;
    fill<Real>(mean, 0);
    sum_over_blocks(&mean, [&](Range block, Lanes<Real>& part) {
      for (int64_t j = block.begin; j < block.end; ++j) FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v)
        part[v] = fma(get(given, j, v), assigned(get(numerators, j, v), v), part[v]);
    });
    const Vec<Real> factor = broadcast(scale);
    for (int64_t j = 0; j < K; ++j) FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) {
      const Vec<Real> u = get(numerators, j, v);
      put(numerators, j, v, factor * slope(u, j, v) * assigned(u, v) * (mean[v] - get(given, j, v)));
    }
  }

 private:
  Vec<Real> alpha_, half_power_;
  Lanes<Real> sum_, inverse_;
  Lanes<Real> least_, unit_;  // the least ratio, and 1 / (1 + it)

  FASTSEQ_INLINE static Vec<Real> get(const Real* array, int64_t j, int v) {
    return load(array + j * kGroupStride<Real> + v * kLanes<Real>);
  }
  FASTSEQ_INLINE static void put(Real* array, int64_t j, int v, Vec<Real> value) {
    store(array + j * kGroupStride<Real> + v * kLanes<Real>, value);
  }
  FASTSEQ_INLINE Vec<Real> ratio(int64_t j, int v) const { return get(ratios, j, v); }
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
  FASTSEQ_INLINE static Vec<Real> at_least_smallest(Vec<Real> x) {
    const Vec<Real> smallest = broadcast(LogConstants<Real>::kSmallest);
    return x < smallest ? smallest : x;
  }
  // 0 log 0 is 0, so zero may have any logarithm that is finite.
  FASTSEQ_INLINE static Vec<Real> log_of(Vec<Real> x) { return log<Real>(at_least_smallest(x)); }
  // log u_j relative to the largest: (1 + ratio) / (1 + least) is 1 + (ratio - least) / (1 + least).
  FASTSEQ_INLINE Vec<Real> log_numerator(Vec<Real> ratio, int v) const {
    return -half_power_ * log1p<Real>((ratio - least_[v]) * unit_[v]);
  }
  // 1 / (1 + D_j / alpha)
  FASTSEQ_INLINE Vec<Real> slope(Vec<Real> numerator, int64_t j, int v) const {
    return kUnitAlpha ? numerator : broadcast(Real(1)) / (broadcast(Real(1)) + ratio(j, v));
  }
  template <typename Body>
  FASTSEQ_INLINE void sum_over_blocks(Lanes<Real>* total, const Body& body) const {
    for (int64_t begin = 0; begin < K; begin += kSumBlock) {
      Lanes<Real> part;
      fill<Real>(part, 0);
      body(Range{begin, begin + kSumBlock < K ? begin + kSumBlock : K}, part);
      add<Real>(*total, part);
    }
  }
};

}  // namespace
}  // namespace fastseq
