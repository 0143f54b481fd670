// A number as the sum of two vectors, the second what the first has rounded away (Dekker 1971): for the few places
// where a rounding error would be multiplied, such as in the exponent of a power.
#pragma once

#include "activations.h"

namespace fastseq {
namespace {

template <typename Real>
struct Twofold {
  Vec<Real> high, low;
};

// a + b exactly, for |a| >= |b| or a zero.
template <typename Real>
FASTSEQ_INLINE Twofold<Real> quick_sum(Vec<Real> a, Vec<Real> b) {
  const Vec<Real> sum = a + b;
  return {sum, b - (sum - a)};
}

// a + b exactly (Knuth 1969).
template <typename Real>
FASTSEQ_INLINE Twofold<Real> exact_sum(Vec<Real> a, Vec<Real> b) {
  const Vec<Real> sum = a + b, other = sum - a;
  return {sum, (a - (sum - other)) + (b - other)};
}

// a * b - near, where near is a * b but for a few units in the last place.
template <typename Real>
FASTSEQ_INLINE Vec<Real> product_error(Vec<Real> a, Vec<Real> b, Vec<Real> near) {
#if defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, -near);
#else
  // In halves whose products are exact; cut off rather than rounded, so that nothing overflows.
  constexpr int kLow = (ExpConstants<Real>::kMantissaBits + 2) / 2;
  const IntVec<Real> mask = (IntVec<Real>{} - 1) << kLow;
  const Vec<Real> a_high = bit_cast<Vec<Real> >(bit_cast<IntVec<Real> >(a) & mask), a_low = a - a_high;
  const Vec<Real> b_high = bit_cast<Vec<Real> >(bit_cast<IntVec<Real> >(b) & mask), b_low = b - b_high;
  return ((a_high * b_high - near) + (a_high * b_low + a_low * b_high)) + a_low * b_low;
#endif
}

template <typename Real>
FASTSEQ_INLINE Twofold<Real> product(Twofold<Real> a, Twofold<Real> b) {
  const Vec<Real> high = a.high * b.high;
  return {high, product_error<Real>(a.high, b.high, high) + fma(a.high, b.low, a.low * b.high)};
}

// |x| within kLogisticLimit.
template <typename Real>
FASTSEQ_INLINE Vec<Real> exp(Twofold<Real> x) {
  const ReducedExp<Real> e(x.high);
  return scale<Real>(exp_near_zero(e.r + x.low), e.n, e.shifted);
}

template <typename Real>
FASTSEQ_INLINE Twofold<Real> broadcast_twofold(double value) {
  const Real high = static_cast<Real>(value);
  return {broadcast(high), broadcast(static_cast<Real>(value - static_cast<double>(high)))};
}

}  // namespace
}  // namespace fastseq
