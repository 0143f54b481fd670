// The numbers of half type as their bits, and float beside them under the same names. Rounding is to nearest, ties to
// even, on the GPU by its instructions and elsewhere by the same rule.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/layout.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastseq::cuda {

template <typename To, typename From>
FASTSEQ_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

struct Float32 {
  using Bits = float;
  static constexpr int kVector = 4;  // numbers in 16 bytes
  FASTSEQ_HOST_DEVICE static float wide(float x) { return x; }
  FASTSEQ_HOST_DEVICE static float narrow(float x) { return x; }
};

struct Bfloat16 {
  using Bits = std::uint16_t;
  static constexpr int kVector = 8;
  FASTSEQ_HOST_DEVICE static float wide(Bits x) { return bits_as<float>(static_cast<std::uint32_t>(x) << 16); }
  FASTSEQ_HOST_DEVICE static Bits narrow(float x) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const std::uint32_t bits = bits_as<std::uint32_t>(x);
    if (x != x) return static_cast<Bits>(bits >> 16 | 0x40);
    return static_cast<Bits>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  }
};

struct Float16 {
  using Bits = std::uint16_t;
  static constexpr int kVector = 8;
  FASTSEQ_HOST_DEVICE static float wide(Bits x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x));
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
    if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Scaling by 2^112 moves the exponent's origin, of denormal numbers too.
    const float size = bits_as<float>(rest << 13) * 0x1p112f;
    return bits_as<float>(sign | bits_as<std::uint32_t>(size));
#endif
  }
  FASTSEQ_HOST_DEVICE static Bits narrow(float x) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(x));
#else
    const std::uint32_t bits = bits_as<std::uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<Bits>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<Bits>(sign | 0x7c00);  // 65520 and more is infinity
    if (size < 0x38800000)                                            // denormal: adding 1/2 leaves units of 2^-24
      return static_cast<Bits>(sign | (bits_as<std::uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000));
    return static_cast<Bits>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
#endif
  }
};

}  // namespace fastseq::cuda
