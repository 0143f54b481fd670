// The logistic function, tanh and their kin on vectors, within about two units in the last place, exact at both ends.
//
// Both rest on exp by range reduction: exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, with ln 2 in two
// parts (Cody and Waite 1980) and exp(r) - 1 by a polynomial. tanh comes from exp(2x) - 1, so that it keeps its
// relative accuracy near zero. Arguments are clamped where the result no longer changes; a NaN stays a NaN.
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
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kExponentBias = 127;
  static constexpr int kMantissaBits = 23;
  static constexpr float kLogisticLimit = 87.0f;
  static constexpr float kTanhLimit = 9.5f;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kExponentBias = 1023;
  static constexpr int kMantissaBits = 52;
  static constexpr double kLogisticLimit = 708.0;
  static constexpr double kTanhLimit = 20.0;
};

// exp(r) - 1 - r, divided by r^2, for |r| <= ln(2)/2.
FASTSEQ_INLINE Vec<float> expm1_tail(Vec<float> r) {  // minimax, degree 4
  Vec<float> p = fma(r, broadcast(0.001381385256536305f), broadcast(0.00836907047778368f));
  p = fma(p, r, broadcast(0.041668422520160675f));
  p = fma(p, r, broadcast(0.166665181517601f));
  return fma(p, r, broadcast(0.4999999403953552f));
}
FASTSEQ_INLINE Vec<double> expm1_tail(Vec<double> r) {  // Taylor, r^14/14! < 5e-18
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
  return fma(p, r, broadcast(0.5));
}

template <typename Real>
FASTSEQ_INLINE Vec<Real> clamp(Vec<Real> x, Real limit) {
  const Vec<Real> high = broadcast(limit), low = broadcast(-limit);
  x = x > high ? high : x;
  return x < low ? low : x;
}

// exp(x) = scale * (1 + tail): the power of two and exp(r) - 1, kept apart so that exp(x) - 1 loses nothing.
template <typename Real>
FASTSEQ_INLINE void exp_parts(Vec<Real> x, Vec<Real>* scale, Vec<Real>* tail) {
  using K = ExpConstants<Real>;
  const Vec<Real> magic = broadcast(K::kRoundMagic);
  const Vec<Real> shifted = fma(x, broadcast(K::kLog2e), magic);
  const Vec<Real> n = shifted - magic;
  Vec<Real> r = fma(n, broadcast(-K::kLn2High), x);
  r = fma(n, broadcast(-K::kLn2Low), r);
  *tail = fma(r * r, expm1_tail(r), r);
  // The integer n stands in the low bits of `shifted`; the shift drops the magic number's own bits.
  const IntVec<Real> bits = (bit_cast<IntVec<Real>>(shifted) + K::kExponentBias) << K::kMantissaBits;
  *scale = bit_cast<Vec<Real>>(bits);
}

template <typename Real>
FASTSEQ_INLINE Vec<Real> logistic(Vec<Real> x) {
  Vec<Real> scale, tail;
  exp_parts<Real>(-clamp<Real>(x, ExpConstants<Real>::kLogisticLimit), &scale, &tail);
  const Vec<Real> one = broadcast(Real(1));
  return one / (one + fma(scale, tail, scale));
}

template <typename Real>
FASTSEQ_INLINE Vec<Real> tanh(Vec<Real> x) {
  x = clamp<Real>(x, ExpConstants<Real>::kTanhLimit);
  Vec<Real> scale, tail;
  exp_parts<Real>(x + x, &scale, &tail);
  const Vec<Real> e = fma(scale, tail, scale - broadcast(Real(1)));
  return e / (e + broadcast(Real(2)));
}

template <typename Real>
FASTSEQ_INLINE Vec<Real> activate(Activation activation, Vec<Real> a) {
  switch (activation) {
    case Activation::kTanh:
      return tanh<Real>(a);
    case Activation::kRelu:
      return a < zero<Real>() ? zero<Real>() : a;  // a NaN stays a NaN, as in torch
    case Activation::kLogistic:
      return logistic<Real>(a);
    case Activation::kIdentity:
      break;
  }
  return a;
}

// f'(a) told from h = f(a), which is all the tape of an Elman layer keeps.
template <typename Real>
FASTSEQ_INLINE Vec<Real> activation_slope(Activation activation, Vec<Real> h) {
  const Vec<Real> one = broadcast(Real(1));
  switch (activation) {
    case Activation::kTanh:
      return fma(-h, h, one);
    case Activation::kRelu:
      return h > zero<Real>() ? one : zero<Real>();
    case Activation::kLogistic:
      return fma(-h, h, h);
    case Activation::kIdentity:
      break;
  }
  return one;
}

}  // namespace
}  // namespace fastseq
