// Products of bfloat16 matrices with sums in float32: AMX tiles where there are any, else vdpbf16ps.
//
//   C[rows, 16 v] = init + A[rows, K] * B[K, 16 v]
//
// Both instructions want B as pairs of k: a packed matrix is vectors of 16 columns one behind the other, each
// [K / 2][16][2], with K rounded up to the 32 of a tile (a chunk) by zeros in A and in B. A tile operation makes 16 x 16
// sums of 32 products in 16 cycles, 16 times as many as a core's float32 multiply-adds; two tiles of A rows by two of B
// columns need each operand twice per load, so that the second-level cache keeps up.
//
// Every sum runs over K in order, whatever the rows beside it: results do not depend on how rows are cut.
#pragma once

#include "storage.h"
#include "team.h"

namespace fastseq {
namespace {

using BFloat16 = uint16_t;
constexpr int64_t kChunk = 32;                           // numbers of K in a tile
constexpr int64_t kBlockHeight = 32;                     // rows of a product: two tiles
constexpr int64_t kTileColumns = 16;                     // of a vector, and the rows of a tile
constexpr int64_t kTileNumbers = kChunk * kTileColumns;  // one KiB

FASTSEQ_INLINE int64_t chunks_of(int64_t K) { return divide_up(K, kChunk); }
FASTSEQ_INLINE int64_t vectors_of(int64_t columns) { return divide_up(columns, kTileColumns); }

// Rows cut into the fewest blocks of nearly equal height.
struct RowBlocks {
  int64_t rows;
  explicit RowBlocks(int64_t n) : rows(n) {}
  int64_t count() const { return divide_up(rows, kBlockHeight); }
  int64_t first(int64_t block) const { return rows * block / count(); }
  int height(int64_t block) const { return static_cast<int>(first(block + 1) - first(block)); }
};

FASTSEQ_INLINE __mmask32 mask32(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1;
}
FASTSEQ_INLINE __mmask16 mask_part(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1);
}
// 16 numbers rounded to nearest even.
FASTSEQ_INLINE __m256i round_bfloat16(Vec<float> v) {
  return reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(0xffff, v));
}
FASTSEQ_INLINE void store_bfloat16(BFloat16* to, Vec<float> v, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, round_bfloat16(v));
}
FASTSEQ_INLINE Vec<float> load_bfloat16(const BFloat16* from, __mmask16 mask) {
  return from_bfloat16(bit_cast<HalfVec>(_mm256_maskz_loadu_epi16(mask, from)));
}

// The left operand, row-major with a stride: its chunks lie `chunk_stride` bytes apart, in `groups` of `chunks`.
struct LeftOperand {
  const char* data;
  int64_t stride;
  int64_t groups, chunks, chunk_stride, group_stride;
};
FASTSEQ_INLINE LeftOperand dense_left(const void* data, int64_t stride_bytes, int64_t chunks) {
  return {static_cast<const char*>(data), stride_bytes, 1, chunks, 2 * kChunk, 0};
}

// Sums in float32: vector v of row r at data + r * stride + v * vector_stride.
struct Sums {
  float* data;
  int64_t stride, vector_stride;
};

#if defined(__AMX_BF16__)

// No tile operation tells g++ 12 which memory it reads.
#define FASTSEQ_LOAD_TILE(tile, from, stride_bytes)                                                    \
  __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #tile                                                 \
                   :                                                                                   \
                   : "r"(static_cast<const void*>(from)), "r"(static_cast<int64_t>(stride_bytes)) \
                   : "memory")

// The tile registers of this thread: configured while it lives.
class BF16Unit {
 public:
  BF16Unit() = default;
  ~BF16Unit() {
    if (rows_) _tile_release();
  }
  BF16Unit(const BF16Unit&) = delete;
  BF16Unit& operator=(const BF16Unit&) = delete;

  // out = (init ? init : 0) + left * panel, rows <= kBlockHeight. vector_numbers: of one vector of the panel.
  void multiply(int rows, int vectors, const LeftOperand& left, const BFloat16* panel, int64_t vector_numbers,
                const Sums* init, const Sums& out) {
    configure(rows);
    if (rows > kTileColumns) {
      const int top = (rows + 1) / 2;
      int v = 0;
      for (; v + 2 <= vectors; v += 2) four<2>(top, left, panel, vector_numbers, v, init, out);
      if (v < vectors) four<1>(top, left, panel, vector_numbers, v, init, out);
    } else {
      int v = 0;
      for (; v + 4 <= vectors; v += 4) wide<4>(left, panel, vector_numbers, v, init, out);
      for (; v < vectors; ++v) wide<1>(left, panel, vector_numbers, v, init, out);
    }
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  int rows_ = 0;

  // Tiles 0 to 3 hold sums, 4 and 5 rows of A, the others columns of B. Up to 16 rows: one tile of rows, sums of four
  // vectors; else two tiles of rows, 0 and 1 the sums of the upper, 2 and 3 those of the lower.
  void configure(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    Config config{};
    config.palette = 1;
    const bool two = rows > kTileColumns;
    const int top = two ? (rows + 1) / 2 : rows;
    const int low = two ? rows - top : top;
    const int heights[8] = {top, top, low, low, top, two ? low : 16, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(heights[tile]);
    }
    __asm__ volatile("ldtilecfg\t%0" : : "m"(config) : "memory");
  }

  template <int kVectors>
  FASTSEQ_INLINE void four(int top, const LeftOperand& left, const BFloat16* panel, int64_t vector_numbers, int v,
                           const Sums* init, const Sums& out) const {
    if (init) {
      const float* from = init->data + v * init->vector_stride;
      const int64_t stride = init->stride * 4, below = top * init->stride;
      FASTSEQ_LOAD_TILE(0, from, stride);
      FASTSEQ_LOAD_TILE(2, from + below, stride);
      if (kVectors > 1) {
        FASTSEQ_LOAD_TILE(1, from + init->vector_stride, stride);
        FASTSEQ_LOAD_TILE(3, from + init->vector_stride + below, stride);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const BFloat16* b = panel + v * vector_numbers;
    const int64_t below = top * left.stride;
    for (int64_t group = 0; group < left.groups; ++group) {
      const char* a = left.data + group * left.group_stride;
      for (int64_t chunk = 0; chunk < left.chunks; ++chunk, a += left.chunk_stride, b += kTileNumbers) {
        FASTSEQ_LOAD_TILE(6, b, 64);
        FASTSEQ_LOAD_TILE(4, a, left.stride);
        if (kVectors > 1) FASTSEQ_LOAD_TILE(7, b + vector_numbers, 64);
        FASTSEQ_LOAD_TILE(5, a + below, left.stride);
        _tile_dpbf16ps(0, 4, 6);
        if (kVectors > 1) _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        if (kVectors > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* to = out.data + v * out.vector_stride;
    const int64_t under = top * out.stride;
    _tile_stored(0, to, out.stride * 4);
    _tile_stored(2, to + under, out.stride * 4);
    if (kVectors > 1) {
      _tile_stored(1, to + out.vector_stride, out.stride * 4);
      _tile_stored(3, to + out.vector_stride + under, out.stride * 4);
    }
  }

  template <int kVectors>
  FASTSEQ_INLINE void wide(const LeftOperand& left, const BFloat16* panel, int64_t vector_numbers, int v,
                           const Sums* init, const Sums& out) const {
    if (init) {
      const float* from = init->data + v * init->vector_stride;
      const int64_t stride = init->stride * 4;
      FASTSEQ_LOAD_TILE(0, from, stride);
      if (kVectors > 1) {
        FASTSEQ_LOAD_TILE(1, from + init->vector_stride, stride);
        FASTSEQ_LOAD_TILE(2, from + 2 * init->vector_stride, stride);
        FASTSEQ_LOAD_TILE(3, from + 3 * init->vector_stride, stride);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const BFloat16* b = panel + v * vector_numbers;
    for (int64_t group = 0; group < left.groups; ++group) {
      const char* a = left.data + group * left.group_stride;
      for (int64_t chunk = 0; chunk < left.chunks; ++chunk, a += left.chunk_stride, b += kTileNumbers) {
        FASTSEQ_LOAD_TILE(4, a, left.stride);
        FASTSEQ_LOAD_TILE(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (kVectors > 1) {
          FASTSEQ_LOAD_TILE(7, b + vector_numbers, 64);
          _tile_dpbf16ps(1, 4, 7);
          FASTSEQ_LOAD_TILE(5, b + 2 * vector_numbers, 64);
          _tile_dpbf16ps(2, 4, 5);
          FASTSEQ_LOAD_TILE(6, b + 3 * vector_numbers, 64);
          _tile_dpbf16ps(3, 4, 6);
        }
      }
    }
    float* to = out.data + v * out.vector_stride;
    _tile_stored(0, to, out.stride * 4);
    if (kVectors > 1) {
      _tile_stored(1, to + out.vector_stride, out.stride * 4);
      _tile_stored(2, to + 2 * out.vector_stride, out.stride * 4);
      _tile_stored(3, to + 3 * out.vector_stride, out.stride * 4);
    }
  }
};

#else

// The dot product instruction on vectors: the register tile of tile.h with pairs of k for numbers.
class BF16Unit {
 public:
  void multiply(int rows, int vectors, const LeftOperand& left, const BFloat16* panel, int64_t vector_numbers,
                const Sums* init, const Sums& out) const {
    const RowTiles tiles(rows);
    for (int v = 0; v < vectors;) {
      const int width = vectors - v >= 4 ? 4 : 1;
      for (int64_t i = 0; i < tiles.count(); ++i) {
        const int64_t row = tiles.first(i);
        LeftOperand a = left;
        a.data += row * left.stride;
        Sums from{}, to{out.data + row * out.stride + v * out.vector_stride, out.stride, out.vector_stride};
        if (init)
          from = {init->data + row * init->stride + v * init->vector_stride, init->stride, init->vector_stride};
        const BFloat16* b = panel + v * vector_numbers;
        if (width == 4)
          height<4>(tiles.height(i), a, b, vector_numbers, from, to);
        else
          height<1>(tiles.height(i), a, b, vector_numbers, from, to);
      }
      v += width;
    }
  }

 private:
  template <int kVectors>
  static void height(int rows, const LeftOperand& a, const BFloat16* b, int64_t vector_numbers, const Sums& init,
                     const Sums& out) {
    switch (rows) {
      case 1:
        return tile<1, kVectors>(a, b, vector_numbers, init, out);
      case 2:
        return tile<2, kVectors>(a, b, vector_numbers, init, out);
      case 3:
        return tile<3, kVectors>(a, b, vector_numbers, init, out);
      case 4:
        return tile<4, kVectors>(a, b, vector_numbers, init, out);
      case 5:
        return tile<5, kVectors>(a, b, vector_numbers, init, out);
      default:
        return tile<6, kVectors>(a, b, vector_numbers, init, out);
    }
  }
  template <int kRows, int kVectors>
  __attribute__((noinline)) static void tile(const LeftOperand& left, const BFloat16* b, int64_t vector_numbers,
                                             const Sums& init, const Sums& out) {
    Vec<float> acc[kRows][kVectors];
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = init.data ? load(init.data + r * init.stride + v * init.vector_stride) : zero<float>();
    for (int64_t group = 0; group < left.groups; ++group) {
      const char* a = left.data + group * left.group_stride;
      for (int64_t chunk = 0; chunk < left.chunks; ++chunk, a += left.chunk_stride, b += kTileNumbers)
        for (int64_t pair = 0; pair < kChunk / 2; ++pair) {
          __m512bh w[kVectors];
          FASTSEQ_UNROLL
          for (int v = 0; v < kVectors; ++v) memcpy(&w[v], b + v * vector_numbers + pair * 2 * kTileColumns, 64);
          FASTSEQ_UNROLL
          for (int r = 0; r < kRows; ++r) {
            int32_t both;
            memcpy(&both, a + r * left.stride + pair * 4, 4);
            const __m512bh element = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
            FASTSEQ_UNROLL
            for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], element, w[v]);
          }
        }
    }
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out.data + r * out.stride + v * out.vector_stride, acc[r][v]);
  }
};

#endif

// Two rows of 16 numbers side by side, as pairs.
FASTSEQ_INLINE Vec<float> interleave_rows(__m256i even, __m256i odd) {
  const WordVec low = __builtin_convertvector(bit_cast<HalfVec>(even), WordVec);
  const WordVec high = __builtin_convertvector(bit_cast<HalfVec>(odd), WordVec);
  return bit_cast<Vec<float>>(low | high << 16);
}

// One vector of a packed matrix from 16 rows of a row-major w [.., K]: column n of it is from[row n].
inline void pack_columns_from_rows(const BFloat16* w, int64_t row_stride, int rows, int64_t K, BFloat16* to) {
  for (int64_t k = 0; k < K; k += kChunk, to += kTileNumbers) {
    const __mmask32 inside = mask32(K - k);
    Vec<float> block[16];
    FASTSEQ_UNROLL
    for (int i = 0; i < 16; ++i)
      block[i] = i < rows ? bit_cast<Vec<float>>(_mm512_maskz_loadu_epi16(inside, w + i * row_stride + k))
                          : zero<float>();
    transpose<float>(block);  // of pairs
    FASTSEQ_UNROLL
    for (int i = 0; i < 16; ++i) memcpy(to + i * 32, &block[i], 64);
  }
}

// Vectors [begin, end) of the packed w [gates * H, columns] itself: K runs over the units of one gate after the other,
// each rounded up to whole chunks.
inline void pack_columns_from_matrix(const BFloat16* w, int64_t gates, int64_t H, int64_t columns, Range vectors,
                                     int64_t vector_numbers, BFloat16* packed) {
  for (int64_t v = vectors.begin; v < vectors.end; ++v) {
    const __mmask16 inside = mask_part(columns - v * kTileColumns);
    BFloat16* to = packed + v * vector_numbers;
    for (int64_t gate = 0; gate < gates; ++gate) {
      const BFloat16* from = w + gate * H * columns + v * kTileColumns;
      for (int64_t unit = 0; unit < chunks_of(H) * kChunk; unit += 2, to += 32) {
        const __m256i even = unit < H ? _mm256_maskz_loadu_epi16(inside, from + unit * columns) : _mm256_setzero_si256();
        const __m256i odd =
            unit + 1 < H ? _mm256_maskz_loadu_epi16(inside, from + (unit + 1) * columns) : _mm256_setzero_si256();
        const Vec<float> pairs = interleave_rows(even, odd);
        memcpy(to, &pairs, 64);
      }
    }
  }
}

}  // namespace
}  // namespace fastseq
