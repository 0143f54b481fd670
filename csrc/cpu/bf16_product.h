// Products of bfloat16 matrices with sums in float32: AMX tiles where there are any, else vdpbf16ps.
//
//   C[rows, 16 v] = init + A[rows, K] * B[K, 16 v]
//
// Both instructions want B as pairs of k: a packed matrix is vectors of 16 columns one behind the other, each
// [K / 2][16][2], with K rounded up to the 32 of a tile (a chunk) by zeros in A and in B. A tile operation makes 16 x
// 16 sums of 32 products in 16 cycles, 16 times as many as a core's float32 multiply-adds; two tiles of A rows by two
// of B columns need each operand twice per load, so that the second-level cache keeps up.
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

// C = init + the sum of left[i] * panel[i].
struct BF16Product {
  int rows, vectors;
  int sources;
  LeftOperand left[2];
  const BFloat16* panel[2];
  int64_t vector_numbers[2];  // of one vector of the panel
  Sums init;                  // no data: zero
  Sums out;
};

#if defined(__AMX_BF16__)

// No tile operation tells g++ 12 which memory it reads.
#define FASTSEQ_LOAD_TILE(tile, from, stride_bytes)                                               \
  __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #tile                                            \
                   :                                                                              \
                   : "r"(static_cast<const void*>(from)), "r"(static_cast<int64_t>(stride_bytes)) \
                   : "memory")

// The tile registers of this thread, configured while it lives, and the product that they are at work on.
//
// The tile unit and the vector units run side by side where their instructions come by turns. So a product can be
// begun, and then advanced by a chunk of K now and again from within another's cell.
class BF16Unit {
 public:
  BF16Unit() = default;
  ~BF16Unit() {
    if (rows_) _tile_release();
  }
  BF16Unit(const BF16Unit&) = delete;
  BF16Unit& operator=(const BF16Unit&) = delete;

  FASTSEQ_INLINE void begin(const BF16Product& product) {
    p_ = product;
    configure(p_.rows);
    two_ = p_.rows > kTileColumns;
    vector_ = 0;
    start_pass();
    int64_t chunks = 0;
    for (int i = 0; i < p_.sources; ++i) chunks += p_.left[i].groups * p_.left[i].chunks;
    const int passes = two_ ? (p_.vectors + 1) / 2 : p_.vectors / 4 + p_.vectors % 4;
    steps_ = chunks * passes;
  }
  // So many calls of advance(steps_in(calls)) finish the product.
  int64_t steps_in(int64_t calls) const { return two_ ? divide_up(steps_, calls) : steps_; }
  FASTSEQ_INLINE void advance(int64_t steps) {
    while (steps > 0 && vector_ < p_.vectors) steps -= run(steps);
  }
  void finish() {
    while (vector_ < p_.vectors) run(left_chunks_);
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  BF16Product p_{};
  int rows_ = 0, top_ = 0;
  bool two_ = false, fresh_ = false;
  int vector_ = 0, width_ = 0, source_ = 0;
  int64_t steps_ = 0, group_ = 0, left_chunks_ = 0;
  const char* a_ = nullptr;
  const BFloat16* b_ = nullptr;

  // Tiles 0 to 3 hold sums, 4 and 5 rows of A, the others columns of B. Up to 16 rows: one tile of rows, sums of four
  // vectors; else two tiles of rows, 0 and 1 the sums of the upper, 2 and 3 those of the lower.
  void configure(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const bool two = rows > kTileColumns;
    top_ = two ? (rows + 1) / 2 : rows;
    const int low = two ? rows - top_ : top_;
    const int heights[8] = {top_, top_, low, low, top_, two ? low : 16, 16, 16};
    Config config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(heights[tile]);
    }
    __asm__ volatile("ldtilecfg\t%0" : : "m"(config) : "memory");
  }

  FASTSEQ_INLINE void start_pass() {
    const int left = p_.vectors - vector_, most = two_ ? 2 : 4;
    width_ = left >= most ? most : 1;
    fresh_ = true;
    start_source(0);
  }
  FASTSEQ_INLINE void start_source(int source) {
    source_ = source;
    group_ = 0;
    left_chunks_ = p_.left[source].chunks;
    a_ = p_.left[source].data;
    b_ = p_.panel[source] + vector_ * p_.vector_numbers[source];
  }

  // At most so many chunks of K; returns how many.
  FASTSEQ_INLINE int64_t run(int64_t most) {
    if (fresh_) {
      fresh_ = false;
      load_sums();
    }
    const int64_t steps = most < left_chunks_ ? most : left_chunks_;
    if (two_)
      width_ > 1 ? chunks<2, 2>(steps) : chunks<2, 1>(steps);
    else
      width_ > 1 ? chunks<1, 4>(steps) : chunks<1, 1>(steps);
    left_chunks_ -= steps;
    if (left_chunks_ == 0) next_group();
    return steps;
  }
  template <int kRowTiles, int kVectors>
  FASTSEQ_INLINE void chunks(int64_t steps) {
    const LeftOperand& left = p_.left[source_];
    const int64_t stride = left.stride, below = top_ * stride, a_step = left.chunk_stride;
    const int64_t numbers = p_.vector_numbers[source_];
    const char* a = a_;
    const BFloat16* b = b_;
    for (; steps > 0; --steps, a += a_step, b += kTileNumbers) {
      FASTSEQ_LOAD_TILE(6, b, 64);
      FASTSEQ_LOAD_TILE(4, a, stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRowTiles == 2) {
        FASTSEQ_LOAD_TILE(5, a + below, stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kVectors == 2) {
          FASTSEQ_LOAD_TILE(7, b + numbers, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else if constexpr (kVectors == 4) {
        FASTSEQ_LOAD_TILE(7, b + numbers, 64);
        _tile_dpbf16ps(1, 4, 7);
        FASTSEQ_LOAD_TILE(5, b + 2 * numbers, 64);
        _tile_dpbf16ps(2, 4, 5);
        FASTSEQ_LOAD_TILE(6, b + 3 * numbers, 64);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
    a_ = a, b_ = b;
  }
  FASTSEQ_INLINE void next_group() {
    const LeftOperand& left = p_.left[source_];
    left_chunks_ = left.chunks;
    a_ = left.data + ++group_ * left.group_stride;
    if (group_ < left.groups) return;
    if (source_ + 1 < p_.sources) return start_source(source_ + 1);
    store_sums();
    vector_ += width_;
    if (vector_ < p_.vectors) start_pass();
  }

  FASTSEQ_INLINE void load_sums() const {
    if (p_.init.data == nullptr) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    const float* from = p_.init.data + vector_ * p_.init.vector_stride;
    const int64_t stride = p_.init.stride * 4, next = p_.init.vector_stride;
    FASTSEQ_LOAD_TILE(0, from, stride);
    if (width_ > 1) FASTSEQ_LOAD_TILE(1, from + next, stride);
    if (two_) {
      from += top_ * p_.init.stride;
      FASTSEQ_LOAD_TILE(2, from, stride);
      if (width_ > 1) FASTSEQ_LOAD_TILE(3, from + next, stride);
    } else if (width_ > 1) {
      FASTSEQ_LOAD_TILE(2, from + 2 * next, stride);
      FASTSEQ_LOAD_TILE(3, from + 3 * next, stride);
    }
  }
  FASTSEQ_INLINE void store_sums() const {
    float* to = p_.out.data + vector_ * p_.out.vector_stride;
    const int64_t stride = p_.out.stride * 4, next = p_.out.vector_stride;
    _tile_stored(0, to, stride);
    if (width_ > 1) _tile_stored(1, to + next, stride);
    if (two_) {
      to += top_ * p_.out.stride;
      _tile_stored(2, to, stride);
      if (width_ > 1) _tile_stored(3, to + next, stride);
    } else if (width_ > 1) {
      _tile_stored(2, to + 2 * next, stride);
      _tile_stored(3, to + 3 * next, stride);
    }
  }
};

#else

// The dot product instruction on vectors: the register tile of tile.h with pairs of k for numbers.
class BF16Unit {
 public:
  void begin(const BF16Product& p) const {
    for (int i = 0; i < p.sources; ++i)
      multiply(p.rows, p.vectors, p.left[i], p.panel[i], p.vector_numbers[i], i == 0 ? p.init : p.out, p.out);
  }
  int64_t steps_in(int64_t) const { return 0; }
  void advance(int64_t) const {}
  void finish() const {}

 private:
  static void multiply(int rows, int vectors, const LeftOperand& left, const BFloat16* panel, int64_t vector_numbers,
                       const Sums& init, const Sums& out) {
    const RowTiles tiles(rows);
    for (int v = 0; v < vectors;) {
      const int width = vectors - v >= 4 ? 4 : 1;
      for (int64_t i = 0; i < tiles.count(); ++i) {
        const int64_t row = tiles.first(i);
        LeftOperand a = left;
        a.data += row * left.stride;
        Sums from = init, to = out;
        if (from.data) from.data += row * init.stride + v * init.vector_stride;
        to.data += row * out.stride + v * out.vector_stride;
        const BFloat16* b = panel + v * vector_numbers;
        if (width == 4)
          height<4>(tiles.height(i), a, b, vector_numbers, from, to);
        else
          height<1>(tiles.height(i), a, b, vector_numbers, from, to);
      }
      v += width;
    }
  }
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

// The product of one left operand, at once.
inline void multiply(BF16Unit& unit, int rows, int vectors, const LeftOperand& left, const BFloat16* panel,
                     int64_t vector_numbers, const Sums& init, const Sums& out) {
  unit.begin({rows, vectors, 1, {left, {}}, {panel, nullptr}, {vector_numbers, 0}, init, out});
  unit.finish();
}

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
      block[i] =
          i < rows ? bit_cast<Vec<float>>(_mm512_maskz_loadu_epi16(inside, w + i * row_stride + k)) : zero<float>();
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
        const __m256i even =
            unit < H ? _mm256_maskz_loadu_epi16(inside, from + unit * columns) : _mm256_setzero_si256();
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
