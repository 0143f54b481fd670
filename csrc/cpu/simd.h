// The SIMD wrapper: one vector type per element type, as wide as the instruction set this file is compiled for.
//
// GCC's and Clang's vector extensions give + - * / and comparisons on every target, so only what they cannot
// say is written with intrinsics: fused multiply-add, and loads and stores of part of a vector. Everything is in an
// anonymous namespace: the same source is compiled once per instruction set, and the linker must never let one
// set's inline function stand in for another's.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))
// g++ 12 keeps an array of accumulators in registers only where every loop over it is unrolled.
#define FASTSEQ_UNROLL _Pragma("GCC unroll 32")

namespace fastseq {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Rows of the register tile: kTileVectors vectors by this many rows of accumulators leave room for the operands in 32
// registers (AVX-512, NEON) or 16 (AVX2, SSE2).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif
constexpr int kTileVectors = 4;
// A tall tile has more rows and works through a panel kPartVectors vectors at a time: it reads weights that no cache
// near the core holds half as often.
#if defined(__AVX512F__)
constexpr int kTallRows = 12, kPartVectors = 2;
#else
constexpr int kTallRows = kTileRows, kPartVectors = kTileVectors;
#endif

template <typename Real>
struct Simd {
  typedef Real V __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Real));
};
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
  static constexpr int kLanes = kVectorBytes / 8;
};
template <typename Real>
using Vec = typename Simd<Real>::V;
template <typename Real>
using IntVec = typename Simd<Real>::I;
template <typename Real>
using ByteVec = typename Simd<Real>::Bytes;  // one byte a lane
template <typename Real>
constexpr int kLanes = Simd<Real>::kLanes;

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct MakeIndices<0, kIndex...> {
  using type = Indices<kIndex...>;
};

template <typename Real, int... kIndex>
FASTSEQ_INLINE Vec<Real> broadcast_lanes(Real value, Indices<kIndex...>) {
  return Vec<Real>{(static_cast<void>(kIndex), value)...};
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> broadcast(Real value) {
  return broadcast_lanes<Real>(value, typename MakeIndices<kLanes<Real>>::type{});
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> zero() {
  return Vec<Real>{};
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> load(const Real* from) {
  Vec<Real> v;
  memcpy(&v, from, sizeof(v));
  return v;
}
template <typename Real>
FASTSEQ_INLINE void store(Real* to, Vec<Real> v) {
  memcpy(to, &v, sizeof(v));
}

template <typename To, typename From>
FASTSEQ_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps every bit");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c, rounded once where the instruction set has it.
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return vfmaq_f32(c, a, b); }
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return vfmaq_f64(c, a, b); }
#else
FASTSEQ_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
FASTSEQ_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif

// The smaller of a limit and x, or the larger; a NaN in x stays.
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> at_most(float limit, Vec<float> x) {
  return _mm512_maskz_min_ps(0xffff, broadcast(limit), x);
}
FASTSEQ_INLINE Vec<float> at_least(float limit, Vec<float> x) {
  return _mm512_maskz_max_ps(0xffff, broadcast(limit), x);
}
FASTSEQ_INLINE Vec<double> at_most(double limit, Vec<double> x) {
  return _mm512_maskz_min_pd(0xff, broadcast(limit), x);
}
FASTSEQ_INLINE Vec<double> at_least(double limit, Vec<double> x) {
  return _mm512_maskz_max_pd(0xff, broadcast(limit), x);
}
#else
template <typename Real>
FASTSEQ_INLINE Vec<Real> at_most(Real limit, Vec<Real> x) {
  const Vec<Real> limits = broadcast(limit);
  return limits < x ? limits : x;
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> at_least(Real limit, Vec<Real> x) {
  const Vec<Real> limits = broadcast(limit);
  return limits > x ? limits : x;
}
#endif

// The larger and the smaller of two; where one of them is NaN, one of the results is.
#if defined(__AVX512F__)
FASTSEQ_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, b, a); }
FASTSEQ_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(0xffff, a, b); }
FASTSEQ_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm512_maskz_max_pd(0xff, b, a); }
FASTSEQ_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return _mm512_maskz_min_pd(0xff, a, b); }
#else
FASTSEQ_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return b > a ? b : a; }
FASTSEQ_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
FASTSEQ_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return b > a ? b : a; }
FASTSEQ_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
#endif

// Sign bits apart from the rest.
template <typename Real>
FASTSEQ_INLINE IntVec<Real> sign_bit() {
  return bit_cast<IntVec<Real>>(broadcast(Real(-0.0)));
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> magnitude(Vec<Real> x) {
  return bit_cast<Vec<Real>>(bit_cast<IntVec<Real>>(x) & ~sign_bit<Real>());
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> with_sign_of(Vec<Real> sign, Vec<Real> positive) {
  return bit_cast<Vec<Real>>(bit_cast<IntVec<Real>>(positive) | (bit_cast<IntVec<Real>>(sign) & sign_bit<Real>()));
}

// The first `count` lanes (all of them where count is larger); lanes beyond are zero and their memory is not touched.
#if defined(__AVX512F__)
FASTSEQ_INLINE __mmask16 mask16(int count) { return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1); }
FASTSEQ_INLINE __mmask8 mask8(int count) { return static_cast<__mmask8>(count >= 8 ? 0xffu : (1u << count) - 1); }
FASTSEQ_INLINE Vec<float> load_part(const float* from, int count) { return _mm512_maskz_loadu_ps(mask16(count), from); }
FASTSEQ_INLINE Vec<double> load_part(const double* from, int count) {
  return _mm512_maskz_loadu_pd(mask8(count), from);
}
FASTSEQ_INLINE void store_part(float* to, Vec<float> v, int count) { _mm512_mask_storeu_ps(to, mask16(count), v); }
FASTSEQ_INLINE void store_part(double* to, Vec<double> v, int count) { _mm512_mask_storeu_pd(to, mask8(count), v); }
#else
template <typename Real>
FASTSEQ_INLINE Vec<Real> load_part(const Real* from, int count) {
  if (count >= kLanes<Real>) return load(from);
  Vec<Real> v = zero<Real>();
  for (int lane = 0; lane < count; ++lane) v[lane] = from[lane];
  return v;
}
template <typename Real>
FASTSEQ_INLINE void store_part(Real* to, Vec<Real> v, int count) {
  if (count >= kLanes<Real>) {
    store(to, v);
    return;
  }
  for (int lane = 0; lane < count; ++lane) to[lane] = v[lane];
}
#endif

// Transpose of kLanes vectors of kLanes lanes by log2(kLanes) rounds of interleaving row i with row i + kLanes/2.
template <typename Real, int... kIndex>
FASTSEQ_INLINE void interleave(Vec<Real> a, Vec<Real> b, Vec<Real>* low, Vec<Real>* high, Indices<kIndex...>) {
  constexpr int n = kLanes<Real>;
  *low = __builtin_shufflevector(a, b, (kIndex / 2 + (kIndex % 2) * n)...);
  *high = __builtin_shufflevector(a, b, (n / 2 + kIndex / 2 + (kIndex % 2) * n)...);
}
template <typename Real>
FASTSEQ_INLINE void transpose(Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int n = kLanes<Real>;
  Vec<Real> next[n];
  FASTSEQ_UNROLL
  for (int span = 1; span < n; span *= 2) {
    FASTSEQ_UNROLL
    for (int i = 0; i < n / 2; ++i)
      interleave<Real>(rows[i], rows[i + n / 2], &next[2 * i], &next[2 * i + 1], typename MakeIndices<n>::type{});
    FASTSEQ_UNROLL
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// The sum of each row's lanes, row i's in lane i. Rounds of the transpose whose two results are added at once: each
// halves the number of vectors.
template <typename Real>
FASTSEQ_INLINE Vec<Real> sum_lanes(Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int n = kLanes<Real>;
  FASTSEQ_UNROLL
  for (int half = n / 2; half > 0; half /= 2) FASTSEQ_UNROLL
  for (int i = 0; i < n / 2; ++i) {
    if (i >= half) continue;
    Vec<Real> low, high;
    interleave<Real>(rows[i], rows[i + half], &low, &high, typename MakeIndices<n>::type{});
    rows[i] = low + high;
  }
  return rows[0];
}

}  // namespace
}  // namespace fastseq
