// The natural logarithm on vectors, within one unit in the last place.
//
// x = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and log(1 + f) = f - f^2/2 + f^3 R(f), R a polynomial
// (float) or a fraction of two (double) after Moshier, Cephes 1989. n comes from the bits, so x must be a positive
// normal number or infinity. log1p keeps NaN and infinity.
#pragma once

#include "twofold.h"

namespace fastseq {
namespace {

template <typename Real>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
  static constexpr float kInfinity = __builtin_inff();
  static constexpr float kSmallest = 1.17549435e-38f;  // the smallest normal number
};
template <>
struct LogConstants<double> {
  static constexpr int64_t kSqrtHalfBits = 0x3fe6a09e667f3bcd;
  static constexpr double kInfinity = __builtin_inf();
  static constexpr double kSmallest = 2.2250738585072014e-308;
};

// (log(1 + f) - f + f^2/2) / f^3
FASTSEQ_INLINE Vec<float> log1p_tail(Vec<float> f) {
  Vec<float> p = fma(f, broadcast(7.0376836292e-2f), broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  return fma(p, f, broadcast(3.3333331174e-1f));
}
FASTSEQ_INLINE Vec<double> log1p_tail(Vec<double> f) {
  Vec<double> p = fma(f, broadcast(1.01875663804580931796e-4), broadcast(4.97494994976747001425e-1));
  p = fma(p, f, broadcast(4.70579119878881725854e0));
  p = fma(p, f, broadcast(1.44989225341610930846e1));
  p = fma(p, f, broadcast(1.79368678507819816313e1));
  p = fma(p, f, broadcast(7.70838733755885391666e0));
  Vec<double> q = f + broadcast(1.12873587189167450590e1);
  q = fma(q, f, broadcast(4.52279145837532221105e1));
  q = fma(q, f, broadcast(8.29875266912776603211e1));
  q = fma(q, f, broadcast(7.11544750618563894466e1));
  q = fma(q, f, broadcast(2.31251620126765340583e1));
  return p / q;
}

template <typename Real>
struct ReducedLog {
  Vec<Real> f, exponent;  // x = 2^exponent (1 + f)
  Vec<Real> small;        // what is to be added to exponent * kLn2High + f
  FASTSEQ_INLINE explicit ReducedLog(Vec<Real> x) {
    using K = ExpConstants<Real>;
    const IntVec<Real> bits = bit_cast<IntVec<Real>>(x);
    const IntVec<Real> n = (bits - LogConstants<Real>::kSqrtHalfBits) >> K::kMantissaBits;
    f = bit_cast<Vec<Real>>(bits - (n << K::kMantissaBits)) - broadcast(Real(1));
    exponent = __builtin_convertvector(n, Vec<Real>);
    const Vec<Real> square = f * f;
    small = fma(exponent, broadcast(K::kLn2Low), log1p_tail(f) * f * square);
    small = fma(square, broadcast(Real(-0.5)), small);
  }
};

// Of a positive normal number; infinity and NaN give some number.
template <typename Real>
FASTSEQ_INLINE Vec<Real> log_of_finite(Vec<Real> x) {
  const ReducedLog<Real> l(x);
  return fma(l.exponent, broadcast(ExpConstants<Real>::kLn2High), l.f + l.small);
}

// log(1 + y) for y > -1, where y.low may be NaN if y.high is infinite. What 1 + y has rounded away is added again.
template <typename Real>
FASTSEQ_INLINE Twofold<Real> log1p(Twofold<Real> y) {
  const Vec<Real> one = broadcast(Real(1)), infinity = broadcast(LogConstants<Real>::kInfinity);
  const Vec<Real> x = one + y.high;
  const Vec<Real> lost = (y.high > one ? one - (x - y.high) : y.high - (x - one)) + y.low;
  const ReducedLog<Real> l(x);
  const Twofold<Real> large = quick_sum<Real>(l.exponent * broadcast(ExpConstants<Real>::kLn2High), l.f);
  const Twofold<Real> value = quick_sum<Real>(large.high, large.low + (l.small + lost / x));
  return {x < infinity ? value.high : x, x < infinity ? value.low : zero<Real>()};
}

}  // namespace
}  // namespace fastseq
