// The logistic function, tanh and their slopes on vectors, exact at both ends: within about two units in the last
// place, tanh one.
//
// Both rest on exp by range reduction: exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, with ln 2 in two
// parts (Cody and Waite 1980) and exp(r) by a polynomial. tanh(x) is 1 - 2 / (exp(2x) + 1), whose small second term
// brings little error, and near zero, where that would cancel, x + x^3 P(x^2). Arguments are clamped where neither
// result nor slope changes any more: times an x of 10^5 what is left of a slope is seen. A NaN stays a NaN.
#pragma once

#include "params.h"
#include "simd.h"

namespace fastseq {
namespace {

template <typename Real>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kRoundMagic = 12582912.0f + 127;  // 1.5 * 2^23 + the bias: adding it rounds to an integer
  static constexpr int kMantissaBits = 23;
  static constexpr float kLogisticLimit = 87.0f;
  static constexpr float kTanhLimit = 43.5f;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRoundMagic = 6755399441055744.0 + 1023;  // 1.5 * 2^52 + the bias
  static constexpr int kMantissaBits = 52;
  static constexpr double kLogisticLimit = 708.0;
  static constexpr double kTanhLimit = 354.0;
};

// exp(r) for |r| <= ln(2)/2.
FASTSEQ_INLINE Vec<float> exp_near_zero(Vec<float> r) {  // minimax of (exp(r) - 1 - r) / r^2, degree 4
  Vec<float> p = fma(r, broadcast(0.001381385256536305f), broadcast(0.00836907047778368f));
  p = fma(p, r, broadcast(0.041668422520160675f));
  p = fma(p, r, broadcast(0.166665181517601f));
  p = fma(p, r, broadcast(0.4999999403953552f));
  p = fma(p, r, broadcast(1.0f));
  return fma(p, r, broadcast(1.0f));
}
FASTSEQ_INLINE Vec<double> exp_near_zero(Vec<double> r) {  // Taylor, r^14/14! < 5e-18
  Vec<double> p = fma(r, broadcast(1.0 / 6227020800.0), broadcast(1.0 / 479001600.0));
  p = fma(p, r, broadcast(1.0 / 39916800.0));
  p = fma(p, r, broadcast(1.0 / 3628800.0));
  p = fma(p, r, broadcast(1.0 / 362880.0));
  p = fma(p, r, broadcast(1.0 / 40320.0));
  p = fma(p, r, broadcast(1.0 / 5040.0));
  p = fma(p, r, broadcast(1.0 / 720.0));
  p = fma(p, r, broadcast(1.0 / 120.0));
  p = fma(p, r, broadcast(1.0 / 24.0));
  p = fma(p, r, broadcast(1.0 / 6.0));
  p = fma(p, r, broadcast(0.5));
  p = fma(p, r, broadcast(1.0));
  return fma(p, r, broadcast(1.0));
}

// x * 2^n, for whole n within the exponents of normal numbers; `shifted` is kRoundMagic + n.
template <typename Real>
FASTSEQ_INLINE Vec<Real> scale(Vec<Real> x, Vec<Real> n, Vec<Real> shifted) {
#if defined(__AVX512F__)
  static_cast<void>(shifted);
  if constexpr (sizeof(Real) == sizeof(float))
    return _mm512_maskz_scalef_ps(0xffff, x, n);
  else
    return _mm512_maskz_scalef_pd(0xff, x, n);
#else
  // n and the exponent's bias stand in the low bits of `shifted`; the shift drops the magic number's own bits.
  static_cast<void>(n);
  return x * bit_cast<Vec<Real> >(bit_cast<IntVec<Real> >(shifted) << ExpConstants<Real>::kMantissaBits);
#endif
}

template <typename Real>
struct ReducedExp {
  Vec<Real> r, n, shifted;  // x = n ln 2 + r
  FASTSEQ_INLINE explicit ReducedExp(Vec<Real> x) {
    using K = ExpConstants<Real>;
    const Vec<Real> magic = broadcast(K::kRoundMagic);
    shifted = fma(x, broadcast(K::kLog2e), magic);
    n = shifted - magic;
    r = fma(n, broadcast(-K::kLn2High), x);
    r = fma(n, broadcast(-K::kLn2Low), r);
  }
};

// |x| within kLogisticLimit.
template <typename Real>
FASTSEQ_INLINE Vec<Real> exp(Vec<Real> x) {
  const ReducedExp<Real> e(x);
  return scale<Real>(exp_near_zero(e.r), e.n, e.shifted);
}

// tanh(x) = x + x^3 numerator(x^2) / denominator(x^2) for |x| < kTanhSmall (Moshier, Cephes 1989).
constexpr double kTanhSmall = 0.625;
FASTSEQ_INLINE void tanh_fraction(Vec<float> z, Vec<float>* numerator, Vec<float>* denominator) {
  Vec<float> p = fma(z, broadcast(-5.70498872745e-3f), broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  *numerator = fma(p, z, broadcast(-3.33332819422e-1f)) * z;
  *denominator = broadcast(1.0f);
}
FASTSEQ_INLINE void tanh_fraction(Vec<double> z, Vec<double>* numerator, Vec<double>* denominator) {
  Vec<double> p = fma(z, broadcast(-9.64399179425052238628e-1), broadcast(-9.92877231001918586564e1));
  p = fma(p, z, broadcast(-1.61468768441708447952e3));
  *numerator = p * z;
  Vec<double> q = z + broadcast(1.12811678491632931402e2);
  q = fma(q, z, broadcast(2.23548839060100448583e3));
  *denominator = fma(q, z, broadcast(4.84406305325125486048e3));
}

// f(x), and f'(x) from the same exponential: 1 - f^2 and f (1 - f) would lose every digit where f saturates.
template <typename Real>
FASTSEQ_INLINE Vec<Real> logistic(Vec<Real> x, Vec<Real>* slope) {
  const Vec<Real> one = broadcast(Real(1));
  constexpr Real kLimit = ExpConstants<Real>::kLogisticLimit;
  const Vec<Real> e = exp<Real>(-at_least(-kLimit, at_most(kLimit, x)));
  const Vec<Real> value = one / (one + e);
  *slope = e * value * value;
  return value;
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> tanh(Vec<Real> x, Vec<Real>* slope) {
  const Vec<Real> one = broadcast(Real(1)), two = broadcast(Real(2));
  const Vec<Real> z = at_most(ExpConstants<Real>::kTanhLimit, magnitude<Real>(x));
  const auto is_small = z < broadcast(Real(kTanhSmall));
  Vec<Real> numerator, denominator;
  tanh_fraction(z * z, &numerator, &denominator);
  const Vec<Real> e = exp<Real>(z + z);
  // One division serves both: tanh|x| = base + base * fraction, with base |x| near zero and 1 elsewhere.
  const Vec<Real> fraction = (is_small ? numerator : -two) / (is_small ? denominator : e + one);
  const Vec<Real> base = is_small ? z : one;
  const Vec<Real> value = fma(base, fraction, base);
  *slope = is_small ? fma(-value, value, one) : e * fraction * fraction;
  return with_sign_of<Real>(x, value);
}

// Without the slope.
template <typename Real>
FASTSEQ_INLINE Vec<Real> logistic(Vec<Real> x) {
  Vec<Real> slope;
  return logistic<Real>(x, &slope);
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> tanh(Vec<Real> x) {
  Vec<Real> slope;
  return tanh<Real>(x, &slope);
}

template <typename Real>
FASTSEQ_INLINE Vec<Real> activate(Activation activation, Vec<Real> a, Vec<Real>* slope) {
  switch (activation) {
    case Activation::kTanh:
      return tanh<Real>(a, slope);
    case Activation::kLogistic:
      return logistic<Real>(a, slope);
    case Activation::kRelu:
      break;
  }
  *slope = a > zero<Real>() ? broadcast(Real(1)) : zero<Real>();
  return a < zero<Real>() ? zero<Real>() : a;  // a NaN stays a NaN, as in torch
}

}  // namespace
}  // namespace fastseq
