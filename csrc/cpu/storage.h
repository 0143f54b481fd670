// Conversions between what the user's tensors hold (Storage) and the arithmetic type.
//
// Half types are converted to float32 on load and rounded to nearest even on store; float and double pass through.
#pragma once

#include "params.h"
#include "simd.h"

namespace fastseq {
namespace {

FASTSEQ_INLINE bool is_half(Storage storage) { return storage == Storage::kBFloat16 || storage == Storage::kFloat16; }
FASTSEQ_INLINE int64_t bytes_of(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}
FASTSEQ_INLINE const void* at(const void* base, Storage storage, int64_t index) {
  return static_cast<const char*>(base) + index * bytes_of(storage);
}
FASTSEQ_INLINE void* at(void* base, Storage storage, int64_t index) {
  return static_cast<char*>(base) + index * bytes_of(storage);
}

typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

FASTSEQ_INLINE Vec<float> from_bfloat16(HalfVec half) {
  return bit_cast<Vec<float>>(__builtin_convertvector(half, WordVec) << 16);
}
FASTSEQ_INLINE HalfVec to_bfloat16(Vec<float> v) {
  const WordVec bits = bit_cast<WordVec>(v);
  const WordVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const WordVec quiet = (bits & 0xffff0000u) | 0x00400000u;  // a NaN must not be rounded to infinity
  return __builtin_convertvector((v != v ? quiet : rounded) >> 16, HalfVec);
}

#if defined(__AVX512F__)
// The masked forms with a full mask: g++ 12 warns of an uninitialised operand inside its own header for the plain ones.
FASTSEQ_INLINE Vec<float> from_float16(HalfVec half) { return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(half)); }
FASTSEQ_INLINE HalfVec to_float16(Vec<float> v) {
  return bit_cast<HalfVec>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
FASTSEQ_INLINE Vec<float> from_float16(HalfVec half) { return _mm256_cvtph_ps(bit_cast<__m128i>(half)); }
FASTSEQ_INLINE HalfVec to_float16(Vec<float> v) {
  return bit_cast<HalfVec>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
FASTSEQ_INLINE Vec<float> from_float16(HalfVec half) { return vcvt_f32_f16(bit_cast<float16x4_t>(half)); }
FASTSEQ_INLINE HalfVec to_float16(Vec<float> v) { return bit_cast<HalfVec>(vcvt_f16_f32(v)); }
#else
FASTSEQ_INLINE Vec<float> from_float16(HalfVec half) {
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane)
    v[lane] = static_cast<float>(bit_cast<_Float16>(static_cast<uint16_t>(half[lane])));
  return v;
}
FASTSEQ_INLINE HalfVec to_float16(Vec<float> v) {
  HalfVec half;
  for (int lane = 0; lane < kLanes<float>; ++lane)
    half[lane] = bit_cast<uint16_t>(static_cast<_Float16>(static_cast<float>(v[lane])));
  return half;
}
#endif

// Half types are the rare case: their conversions stay out of line, or they would be copied into every tile.
__attribute__((noinline)) inline Vec<float> load_half(Storage storage, const void* from, int count) {
  HalfVec half{};
  const int lanes = count < kLanes<float> ? count : kLanes<float>;
  if (lanes == kLanes<float>)
    memcpy(&half, from, sizeof(half));
  else
    memcpy(&half, from, static_cast<size_t>(lanes) * 2);
  return storage == Storage::kBFloat16 ? from_bfloat16(half) : from_float16(half);
}
__attribute__((noinline)) inline void store_half(Storage storage, void* to, Vec<float> v, int count) {
  const HalfVec half = storage == Storage::kBFloat16 ? to_bfloat16(v) : to_float16(v);
  if (count >= kLanes<float>)
    memcpy(to, &half, sizeof(half));
  else
    memcpy(to, &half, static_cast<size_t>(count) * 2);
}
__attribute__((noinline)) inline Vec<float> round_half(Storage storage, Vec<float> v) {
  return storage == Storage::kBFloat16 ? from_bfloat16(to_bfloat16(v)) : from_float16(to_float16(v));
}

// The first `count` lanes from memory in `storage`; the others are zero.
FASTSEQ_INLINE Vec<double> load_as(Storage, const double* from, int count) { return load_part(from, count); }
FASTSEQ_INLINE Vec<float> load_as(Storage storage, const float* from, int count) {
  return is_half(storage) ? load_half(storage, from, count) : load_part(from, count);
}
template <typename Real>
FASTSEQ_INLINE Vec<Real> load_as(Storage storage, const void* from, int64_t index, int count) {
  return load_as(storage, static_cast<const Real*>(at(from, storage, index)), count);
}

FASTSEQ_INLINE void store_as(Storage, double* to, Vec<double> v, int count) { store_part(to, v, count); }
FASTSEQ_INLINE void store_as(Storage storage, float* to, Vec<float> v, int count) {
  if (is_half(storage))
    store_half(storage, to, v, count);
  else
    store_part(to, v, count);
}
template <typename Real>
FASTSEQ_INLINE void store_as(Storage storage, void* to, int64_t index, Vec<Real> v, int count) {
  store_as(storage, static_cast<Real*>(at(to, storage, index)), v, count);
}

// v as it will read back after a store in `storage`.
FASTSEQ_INLINE Vec<double> round_as(Storage, Vec<double> v) { return v; }
FASTSEQ_INLINE Vec<float> round_as(Storage storage, Vec<float> v) {
  return is_half(storage) ? round_half(storage, v) : v;
}

// How many lanes of the vector that begins at column `first` lie inside `width` columns; may be zero or less than zero.
template <typename Real>
FASTSEQ_INLINE int lanes_inside(int64_t width, int64_t first) {
  const int64_t left = width - first;
  return left >= kLanes<Real> ? kLanes<Real> : left > 0 ? static_cast<int>(left) : 0;
}

// rows x width numbers in `storage`, row stride given, to Real rows of `to_stride` columns; columns behind width are
// zero.
template <typename Real>
void load_rows(Storage storage, const void* from, int64_t from_stride, Real* to, int64_t to_stride, int64_t rows,
               int64_t width) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < to_stride; n += kLanes<Real>) {
      const int inside = lanes_inside<Real>(width, n);
      const Vec<Real> v = from && inside ? load_as<Real>(storage, from, r * from_stride + n, inside) : zero<Real>();
      store_part(to + r * to_stride + n, v, lanes_inside<Real>(to_stride, n));
    }
}
template <typename Real>
void store_rows(Storage storage, const Real* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                int64_t width) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < width; n += kLanes<Real>) {
      const int inside = lanes_inside<Real>(width, n);
      store_as<Real>(storage, to, r * to_stride + n, load_part(from + r * from_stride + n, inside), inside);
    }
}

}  // namespace
}  // namespace fastseq
