// The natural logarithm on vectors, within one unit in the last place (by table within one and a half).
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

#if defined(__AVX512F__)
// By a table that two registers hold: x = 2^n m with m from 0.75 to 1.5, whose five highest bits choose 1/c near 1/m,
// so that log x = n log 2 + log c + log(1 + r), r = m/c - 1 between -1/64 and 1/32. Half as many operations as above.
// Next to 1 c is 1, so that a small logarithm has all its digits; each other 1/c was chosen among the floats near by
// for a log c that is a float to a thousandth of a unit (Gal 1986). The polynomial is the minimax one of degree 4.
struct LogTable {
  alignas(64) static constexpr float kInverse[32] = {
      1.0f,         0.955204308f, 0.927508712f, 0.90150708f,  0.876879811f, 0.853420496f, 0.831118524f, 0.810058892f,
      0.790293694f, 0.771181643f, 0.753079772f, 0.735656381f, 0.719033003f, 0.703149915f, 0.688253343f, 0.67381382f,
      1.3199116f,   1.29299295f,  1.26704812f,  1.2427001f,   1.21936977f,  1.19632959f,  1.17464662f,  1.15317214f,
      1.13293564f,  1.11291265f,  1.09413958f,  1.07561791f,  1.0575074f,   1.04052722f,  1.02408326f,  1.0f};
  alignas(64) static constexpr float kLog[32] = {
      0.0f,           0.0458300263f,  0.0752530918f,  0.103687383f,  0.131385341f,  0.158502892f,  0.184982866f,
      0.210648328f,   0.235350639f,   0.259831339f,   0.283584118f,  0.306992143f,  0.329848021f,  0.35218516f,
      0.373598278f,   0.394801438f,   -0.277564764f,  -0.256959647f, -0.23668988f,  -0.217286512f, -0.198334143f,
      -0.179258198f,  -0.16096735f,   -0.142516524f,  -0.124812178f, -0.106980592f, -0.089968279f, -0.0728952959f,
      -0.0559146255f, -0.0397275314f, -0.0237978287f, 0.0f};

  FASTSEQ_INLINE static Vec<float> at(const float* table, IntVec<float> index) {
    return _mm512_permutex2var_ps(load(table), bit_cast<__m512i>(index), load(table + 16));
  }
};

template <>
FASTSEQ_INLINE Vec<float> log_of_finite<float>(Vec<float> x) {
  constexpr int kMantissaBits = ExpConstants<float>::kMantissaBits;
  const Vec<float> m = _mm512_maskz_getmant_ps(0xffff, x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const IntVec<float> bits = bit_cast<IntVec<float>>(m), index = bits >> (kMantissaBits - 5);  // modulo 32
  // 2^23 n
  const Vec<float> exponent = __builtin_convertvector(bit_cast<IntVec<float>>(x) - bits, Vec<float>);
  const Vec<float> r = fma(m, LogTable::at(LogTable::kInverse, index), broadcast(-1.0f));
  Vec<float> p = fma(r, broadcast(-0.2439888f), broadcast(0.33336642f));
  p = fma(p, r, broadcast(-0.5000012f));
  constexpr float kLn2 = 0.693147182f / (1 << kMantissaBits);
  return fma(exponent, broadcast(kLn2), LogTable::at(LogTable::kLog, index)) + fma(p, r * r, r);
}
#endif

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
