// Products of bfloat16 matrices with sums in float32: AMX tiles where there are any, else vdpbf16ps.
//
//   C[rows, 16 v] = init + A[rows, K] * B[K, 16 v]
//
// A float32 is exactly the sum of three bfloat16 (24 bits of 8 and 8 and 8), so that products of float32 matrices are
// made here too: of the nine products of terms the six whose first terms' exponents are highest, 2^-24 of the whole and
// more, which is what float32 keeps of it. Where AMX is, six of its products take half the time of one on vectors.
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
constexpr int64_t kLineBytes = 2 * kChunk;               // of a tile's row

// How many bfloat16 a number of an operand is made of. They lie chunk by chunk: all first terms of a chunk, all second.
template <typename Number>
constexpr int kTerms = sizeof(Number) == sizeof(float) ? 3 : 1;

FASTSEQ_INLINE int64_t chunks_of(int64_t K) { return divide_up(K, kChunk); }
FASTSEQ_INLINE int64_t vectors_of(int64_t columns) { return divide_up(columns, kTileColumns); }
// bfloat16 numbers of `groups` of K numbers each, of a row of a left operand that holds them, and of one vector of a
// packed matrix. Rows are an odd number of cache lines, so that those of a tile do not fall on the same cache sets.
template <typename Number>
FASTSEQ_INLINE int64_t group_numbers(int64_t K) {
  return chunks_of(K) * kTerms<Number> * kChunk;
}
template <typename Number>
FASTSEQ_INLINE int64_t row_numbers(int64_t K, int64_t groups = 1) {
  return (groups * chunks_of(K) * kTerms<Number> | 1) * kChunk;
}
template <typename Number>
FASTSEQ_INLINE int64_t vector_numbers(int64_t K) {
  return chunks_of(K) * kTerms<Number> * kTileNumbers;
}

// Rows cut into the fewest blocks of nearly equal height.
struct RowBlocks {
  int64_t rows, most;
  explicit RowBlocks(int64_t n, int64_t height = kBlockHeight) : rows(n), most(height) {}
  int64_t count() const { return divide_up(rows, most); }
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
FASTSEQ_INLINE void store_numbers(BFloat16* to, Vec<float> v, __mmask16 mask) { store_bfloat16(to, v, mask); }
FASTSEQ_INLINE void store_numbers(float* to, Vec<float> v, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, v); }
FASTSEQ_INLINE Vec<float> load_bfloat16(const BFloat16* from, __mmask16 mask) {
  return from_bfloat16(bit_cast<HalfVec>(_mm256_maskz_loadu_epi16(mask, from)));
}

// The terms of 16 numbers.
FASTSEQ_INLINE void split_terms(Vec<float> v, __m256i (&terms)[3]) {
  terms[0] = round_bfloat16(v);
  const Vec<float> rest = v - from_bfloat16(bit_cast<HalfVec>(terms[0]));
  terms[1] = round_bfloat16(rest);
  terms[2] = round_bfloat16(rest - from_bfloat16(bit_cast<HalfVec>(terms[1])));
}
// One half of a chunk, the 16 numbers of an even or an odd vector of a row.
template <int kCount>
FASTSEQ_INLINE void store_terms(BFloat16* row, int64_t vector, const __m256i (&terms)[kCount]) {
  BFloat16* to = row + vector / 2 * kCount * kChunk + vector % 2 * kTileColumns;
  FASTSEQ_UNROLL
  for (int i = 0; i < kCount; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kChunk), terms[i]);
}

// 16 numbers of two rows as pairs: what a packed matrix has of two steps of k.
FASTSEQ_INLINE Vec<float> interleave_rows(__m256i even, __m256i odd) {
  const WordVec low = __builtin_convertvector(bit_cast<HalfVec>(even), WordVec);
  const WordVec high = __builtin_convertvector(bit_cast<HalfVec>(odd), WordVec);
  return bit_cast<Vec<float>>(low | high << 16);
}

FASTSEQ_INLINE void pair_terms(__m256i even, __m256i odd, Vec<float> (&lines)[1]) {
  lines[0] = interleave_rows(even, odd);
}
FASTSEQ_INLINE void pair_terms(Vec<float> even, Vec<float> odd, Vec<float> (&lines)[3]) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  FASTSEQ_UNROLL
  for (int term = 0; term < 3; ++term) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_maskz_cvtne2ps_pbh(0xffffffffu, odd, even));
    const __m512i pairs = _mm512_maskz_permutexvar_epi16(0xffffffffu, order, both);
    lines[term] = bit_cast<Vec<float>>(pairs);
    const WordVec words = bit_cast<WordVec>(pairs);
    even = even - bit_cast<Vec<float>>(words << 16);
    odd = odd - bit_cast<Vec<float>>(words & 0xffff0000u);
  }
}
FASTSEQ_INLINE __m256i load_numbers(const BFloat16* from, __mmask16 mask) {
  return _mm256_maskz_loadu_epi16(mask, from);
}
FASTSEQ_INLINE Vec<float> load_numbers(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
template <typename Number>
using Numbers = decltype(load_numbers(static_cast<const Number*>(nullptr), __mmask16{}));  // 16 of them

// A chunk of a row: the numbers of the first half of it, and those of the second.
FASTSEQ_INLINE void chunk_terms(__m256i low, __m256i high, Vec<float> (&lines)[1]) {
  lines[0] = bit_cast<Vec<float>>(_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1));
}
FASTSEQ_INLINE void chunk_terms(Vec<float> low, Vec<float> high, Vec<float> (&lines)[3]) {
  struct Halves {
    HalfVec low, high;
  };
  FASTSEQ_UNROLL
  for (int term = 0; term < 3; ++term) {
    const auto both = _mm512_maskz_cvtne2ps_pbh(0xffffffffu, high, low);
    lines[term] = bit_cast<Vec<float>>(both);
    const Halves halves = bit_cast<Halves>(both);
    low = low - from_bfloat16(halves.low);
    high = high - from_bfloat16(halves.high);
  }
}
template <typename Number>
FASTSEQ_INLINE void load_chunk(const Number* from, int64_t count, Vec<float> (&lines)[kTerms<Number>]) {
  const __mmask16 second = mask_part(count - kTileColumns);
  chunk_terms(load_numbers(from, mask_part(count)),
              second ? load_numbers(from + kTileColumns, second) : Numbers<Number>{}, lines);
}

// Rows of `width` numbers as rows of a left operand, up to whole chunks.
template <typename Number>
inline void copy_rows(const Number* from, int64_t stride, BFloat16* to, int64_t to_stride, int64_t rows,
                      int64_t width) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t chunk = 0; chunk < chunks_of(width); ++chunk) {
      Vec<float> lines[kTerms<Number>];
      load_chunk(from + r * stride + chunk * kChunk, width - chunk * kChunk, lines);
      memcpy(to + r * to_stride + chunk * kTerms<Number> * kChunk, lines, sizeof(lines));
    }
}

// The left operand, row-major with a stride: its chunks lie `chunk_stride` bytes apart, in `groups` of `chunks`.
struct LeftOperand {
  const char* data;
  int64_t stride;
  int64_t groups, chunks, chunk_stride, group_stride;
};
template <typename Number>
FASTSEQ_INLINE LeftOperand dense_left(const void* data, int64_t stride_bytes, int64_t chunks) {
  return {static_cast<const char*>(data), stride_bytes, 1, chunks, kTerms<Number> * kLineBytes, 0};
}

// Sums in float32: vector v of row r at data + r * stride + v * vector_stride.
struct Sums {
  float* data;
  int64_t stride, vector_stride;
};

// C = init + the sum of left[i] * panel[i]. Of terms of float32 each sum is the same whether one product has both
// sources, or one of the first made the `init` of another, which then says that it `adds`.
struct BF16Product {
  int rows, vectors;
  int sources;
  LeftOperand left[2];
  const BFloat16* panel[2];
  int64_t vector_numbers[2];  // of one vector of the panel
  Sums init;                  // no data: zero
  Sums out;
  bool adds = false;
};

#if defined(__AMX_BF16__)

// The instructions by tile number. g++ 12's own forms do not tell which memory they read.
template <int kTile>
FASTSEQ_INLINE void load_tile(const void* from, int64_t stride_bytes) {
  __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
FASTSEQ_INLINE void store_tile(void* to, int64_t stride_bytes) {
  __asm__ volatile("tilestored\t%%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
FASTSEQ_INLINE void zero_tile() {
  __asm__ volatile("tilezero\t%%tmm%c0" : : "i"(kTile));
}
// tile C += tile A * tile B
template <int kC, int kA, int kB>
FASTSEQ_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps\t%%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// The tile registers of this thread, configured while it lives, and the product that they are at work on.
//
// The tile unit and the vector units run side by side where their instructions come by turns. So a product can be
// begun, and then advanced by a chunk of K now and again from within another's cell.
template <typename Number>
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
    int64_t chunks = 0;
    for (int i = 0; i < p_.sources; ++i) chunks += p_.left[i].groups * p_.left[i].chunks;
    const int passes = two_ ? (p_.vectors + 1) / 2 : p_.vectors / 4 + p_.vectors % 4;
    steps_ = chunks * passes;
    one_chain_ = kTerms<Number> == 1 || (p_.sources == 1 && !p_.adds && chunks <= kLongestChain);
    vector_ = 0;
    start_pass();
  }
  // So many calls of advance(steps_in(calls)) finish the product.
  int64_t steps_in(int64_t calls) const { return two_ ? divide_up(steps_, calls) : steps_; }
  int64_t steps() const { return steps_; }
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
  // A chunk of terms adds to each sum six times. So that a long K has no longer a chain than a library's product, sums
  // leave the tiles after at most so many chunks, and with each source, and are added up on vectors. (Sources in one
  // chain lose more: what comes first is then part of every sum that is rounded.)
  static constexpr int64_t kLongestChain = 16;
  bool one_chain_ = true;
  int64_t left_in_chain_ = 0;
  Sums sum_{};  // of the chains of this pass that have left the tiles; no data: none
  alignas(64) float part_[kTerms<Number> > 1 ? 4 * 16 * kTileColumns : 1];  // of the one that leaves them
  const char* a_ = nullptr;
  const BFloat16* b_ = nullptr;

  // Tiles 0 to 3 hold sums, 4 and 5 rows of A, the others columns of B. Up to 16 rows: one tile of rows, sums of four
  // vectors, 5 for a third column or a second term; else two tiles of rows, 0 and 1 the sums of the upper, 2 and 3
  // those of the lower.
  void configure(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const bool two = rows > kTileColumns;
    top_ = two ? (rows + 1) / 2 : rows;
    const int low = two ? rows - top_ : top_;
    const int heights[8] = {top_, top_, low, low, top_, two || kTerms<Number> > 1 ? low : 16, 16, 16};
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
    if (!one_chain_) left_in_chain_ = longest_chain(p_.left[source]);
  }

  // The chains of a source are about as long as one another.
  static int64_t longest_chain(const LeftOperand& left) {
    const int64_t chunks = left.groups * left.chunks;
    return divide_up(chunks, divide_up(chunks, kLongestChain));
  }

  // At most so many chunks of K; returns how many.
  FASTSEQ_INLINE int64_t run(int64_t most) {
    if (fresh_) {
      fresh_ = false;
      start_sums();
    }
    int64_t steps = most < left_chunks_ ? most : left_chunks_;
    if constexpr (kTerms<Number> > 1)
      if (!one_chain_) {
        if (left_in_chain_ == 0) end_chain(), left_in_chain_ = longest_chain(p_.left[source_]);
        if (steps > left_in_chain_) steps = left_in_chain_;
        left_in_chain_ -= steps;
      }
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
    for (; steps > 0; --steps, a += a_step, b += kTerms<Number> * kTileNumbers) {
      if constexpr (kTerms<Number> == 1)
        chunk<kRowTiles, kVectors>(a, stride, below, b, numbers);
      else if constexpr (kRowTiles == 2)
        high_chunk_of_terms<kVectors>(a, stride, below, b, numbers);
      else
        low_chunk_of_terms<kVectors>(a, stride, b, numbers);
    }
    a_ = a, b_ = b;
  }
  template <int kRowTiles, int kVectors>
  static FASTSEQ_INLINE void chunk(const char* a, int64_t stride, int64_t below, const BFloat16* b, int64_t numbers) {
    load_tile<6>(b, kLineBytes);
    load_tile<4>(a, stride);
    multiply_tiles<0, 4, 6>();
    if constexpr (kRowTiles == 2) {
      load_tile<5>(a + below, stride);
      multiply_tiles<2, 5, 6>();
      if constexpr (kVectors == 2) {
        load_tile<7>(b + numbers, kLineBytes);
        multiply_tiles<1, 4, 7>();
        multiply_tiles<3, 5, 7>();
      }
    } else if constexpr (kVectors == 4) {
      load_tile<7>(b + numbers, kLineBytes);
      multiply_tiles<1, 4, 7>();
      load_tile<5>(b + 2 * numbers, kLineBytes);
      multiply_tiles<2, 4, 5>();
      load_tile<6>(b + 3 * numbers, kLineBytes);
      multiply_tiles<3, 4, 6>();
    }
  }

  // The six products of terms, in an order in which the next needs one new operand only: 0 2, 0 1, 1 1, 1 0, 2 0, 0 0.
  // It is the same for every sum.
  template <int kVectors>
  static FASTSEQ_INLINE void high_chunk_of_terms(const char* a, int64_t stride, int64_t below, const BFloat16* b,
                                                 int64_t numbers) {
    const auto load_rows = [&](int term) {
      load_tile<4>(a + term * kLineBytes, stride);
      load_tile<5>(a + term * kLineBytes + below, stride);
    };
    const auto load_columns = [&](int term) {
      load_tile<6>(b + term * kTileNumbers, kLineBytes);
      if constexpr (kVectors == 2) load_tile<7>(b + numbers + term * kTileNumbers, kLineBytes);
    };
    const auto multiply = [] {
      multiply_tiles<0, 4, 6>();
      multiply_tiles<2, 5, 6>();
      if constexpr (kVectors == 2) {
        multiply_tiles<1, 4, 7>();
        multiply_tiles<3, 5, 7>();
      }
    };
    load_rows(0);
    load_columns(2);
    multiply();
    load_columns(1);
    multiply();
    load_rows(1);
    multiply();
    load_columns(0);
    multiply();
    load_rows(2);
    multiply();
    load_rows(0);
    multiply();
  }
  // One tile of rows: two vectors at a time, since four would leave no registers for operands.
  template <int kVectors>
  static FASTSEQ_INLINE void low_chunk_of_terms(const char* a, int64_t stride, const BFloat16* b, int64_t numbers) {
    load_tile<4>(a, stride);
    pair_of_terms<0, kVectors>(a, stride, b, numbers);
    if constexpr (kVectors == 4) pair_of_terms<2, kVectors>(a, stride, b + 2 * numbers, numbers);
  }
  template <int kFirst, int kVectors>
  static FASTSEQ_INLINE void pair_of_terms(const char* a, int64_t stride, const BFloat16* b, int64_t numbers) {
    const auto load_columns = [&](int term) {
      load_tile<6>(b + term * kTileNumbers, kLineBytes);
      if constexpr (kVectors == 4) load_tile<7>(b + numbers + term * kTileNumbers, kLineBytes);
    };
    const auto first_term = [] {
      multiply_tiles<kFirst, 4, 6>();
      if constexpr (kVectors == 4) multiply_tiles<kFirst + 1, 4, 7>();
    };
    const auto other_term = [] {
      multiply_tiles<kFirst, 5, 6>();
      if constexpr (kVectors == 4) multiply_tiles<kFirst + 1, 5, 7>();
    };
    load_columns(2);
    first_term();
    load_columns(1);
    first_term();
    load_tile<5>(a + kLineBytes, stride);
    other_term();
    load_columns(0);
    other_term();
    load_tile<5>(a + 2 * kLineBytes, stride);
    other_term();
    first_term();
  }
  FASTSEQ_INLINE void next_group() {
    const LeftOperand& left = p_.left[source_];
    left_chunks_ = left.chunks;
    a_ = left.data + ++group_ * left.group_stride;
    if (group_ < left.groups) return;
    if (source_ + 1 < p_.sources) {
      if (!one_chain_) end_chain();
      return start_source(source_ + 1);
    }
    end_pass();
    vector_ += width_;
    if (vector_ < p_.vectors) start_pass();
  }

  FASTSEQ_INLINE Sums pass_of(const Sums& sums) const {
    return {sums.data + vector_ * sums.vector_stride, sums.stride, sums.vector_stride};
  }
  // The sums leave the tiles, for a next chain that starts from zero.
  FASTSEQ_INLINE void end_chain() {
    end_pass();
    sum_ = pass_of(p_.out);
    clear_tiles();
  }
  FASTSEQ_INLINE void end_pass() {
    const Sums out = pass_of(p_.out);
    if (kTerms<Number> == 1 || sum_.data == nullptr) return store_sums(out);
    const Sums part{part_, width_ * kTileColumns, kTileColumns};
    store_sums(part);
    for (int r = 0; r < p_.rows; ++r)
      for (int v = 0; v < width_; ++v)
        store(out.data + r * out.stride + v * out.vector_stride,
              load(sum_.data + r * sum_.stride + v * sum_.vector_stride) +
                  load(part.data + r * part.stride + v * part.vector_stride));
  }

  static FASTSEQ_INLINE void clear_tiles() {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  FASTSEQ_INLINE void start_sums() {
    sum_ = {};
    if (p_.init.data == nullptr) return clear_tiles();
    if (!one_chain_ && p_.adds) {
      sum_ = pass_of(p_.init);
      return clear_tiles();
    }
    const float* from = p_.init.data + vector_ * p_.init.vector_stride;
    const int64_t stride = p_.init.stride * 4, next = p_.init.vector_stride;
    load_tile<0>(from, stride);
    if (width_ > 1) load_tile<1>(from + next, stride);
    if (two_) {
      from += top_ * p_.init.stride;
      load_tile<2>(from, stride);
      if (width_ > 1) load_tile<3>(from + next, stride);
    } else if (width_ > 1) {
      load_tile<2>(from + 2 * next, stride);
      load_tile<3>(from + 3 * next, stride);
    }
  }
  FASTSEQ_INLINE void store_sums(const Sums& sums) const {
    float* to = sums.data;
    const int64_t stride = sums.stride * 4, next = sums.vector_stride;
    store_tile<0>(to, stride);
    if (width_ > 1) store_tile<1>(to + next, stride);
    if (two_) {
      to += top_ * sums.stride;
      store_tile<2>(to, stride);
      if (width_ > 1) store_tile<3>(to + next, stride);
    } else if (width_ > 1) {
      store_tile<2>(to + 2 * next, stride);
      store_tile<3>(to + 3 * next, stride);
    }
  }
};

#else

// The dot product instruction on vectors: the register tile of tile.h with pairs of k for numbers. It is no faster than
// multiply-adds of float32, so that terms are not for it.
template <typename Number>
class BF16Unit {
  static_assert(kTerms<Number> == 1, "of bfloat16 alone");

 public:
  void begin(const BF16Product& p) const {
    for (int i = 0; i < p.sources; ++i)
      multiply(p.rows, p.vectors, p.left[i], p.panel[i], p.vector_numbers[i], i == 0 ? p.init : p.out, p.out);
  }
  int64_t steps_in(int64_t) const { return 0; }
  int64_t steps() const { return 0; }
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

// Calls advance a product by even parts of its steps.
template <typename Number>
class Pace {
 public:
  Pace(BF16Unit<Number>& unit, int calls)
      : unit_(unit), rate_((static_cast<uint64_t>(unit.steps()) << 16) / static_cast<uint64_t>(calls)) {}
  FASTSEQ_INLINE void next() {
    due_ += rate_;
    unit_.advance(static_cast<int64_t>(due_ >> 16));
    due_ &= 0xffff;
  }

 private:
  BF16Unit<Number>& unit_;
  uint64_t rate_, due_ = 0;
};

// The product of one left operand, at once.
template <typename Number>
inline void multiply(BF16Unit<Number>& unit, int rows, int vectors, const LeftOperand& left, const BFloat16* panel,
                     int64_t vector_numbers, const Sums& init, const Sums& out) {
  unit.begin({rows, vectors, 1, {left, {}}, {panel, nullptr}, {vector_numbers, 0}, init, out});
  unit.finish();
}

// One vector of a packed matrix from 16 rows of a row-major w [.., K]: column n of it is from[row n].
template <typename Number>
inline void pack_columns_from_rows(const Number* w, int64_t row_stride, int rows, int64_t K, BFloat16* to) {
  constexpr int kCount = kTerms<Number>;
  for (int64_t k = 0; k < K; k += kChunk) {
    Vec<float> block[kCount][16];
    FASTSEQ_UNROLL
    for (int i = 0; i < 16; ++i) {
      Vec<float> lines[kCount] = {};
      if (i < rows) load_chunk(w + i * row_stride + k, K - k, lines);
      FASTSEQ_UNROLL
      for (int term = 0; term < kCount; ++term) block[term][i] = lines[term];
    }
    for (int term = 0; term < kCount; ++term, to += kTileNumbers) {
      transpose<float>(block[term]);  // of pairs
      memcpy(to, block[term], sizeof(block[term]));
    }
  }
}

// Vectors [begin, end) of the packed w [gates * H, columns] itself: K runs over the units of one gate after the other,
// each rounded up to whole chunks.
template <typename Number>
inline void pack_columns_from_matrix(const Number* w, int64_t gates, int64_t H, int64_t columns, Range vectors,
                                     int64_t vector_numbers, BFloat16* packed) {
  constexpr int kCount = kTerms<Number>;
  // Some vectors side by side: rows lie far apart in memory, and each would be fetched anew for every vector.
  constexpr int64_t kTogether = 8;
  for (int64_t first = vectors.begin; first < vectors.end; first += kTogether) {
    const int64_t last = first + kTogether < vectors.end ? first + kTogether : vectors.end;
    for (int64_t gate = 0; gate < gates; ++gate)
      for (int64_t unit = 0; unit < chunks_of(H) * kChunk; unit += 2) {
        const Number* from = w + (gate * H + unit) * columns;
        const int64_t chunk = gate * chunks_of(H) + unit / kChunk;
        for (int64_t v = first; v < last; ++v) {
          const int64_t column = v * kTileColumns;
          const __mmask16 inside = mask_part(columns - column);
          Vec<float> lines[kCount];
          pair_terms(unit < H ? load_numbers(from + column, inside) : Numbers<Number>{},
                     unit + 1 < H ? load_numbers(from + columns + column, inside) : Numbers<Number>{}, lines);
          BFloat16* to = packed + v * vector_numbers + chunk * kCount * kTileNumbers + unit % kChunk * kTileColumns;
          FASTSEQ_UNROLL
          for (int term = 0; term < kCount; ++term)
            store(reinterpret_cast<float*>(to + term * kTileNumbers), lines[term]);
        }
      }
  }
}

}  // namespace
}  // namespace fastseq
