// Weight and input gradients of the bfloat16 recurrences: large products over all T * B rows.
#pragma once

#include "bf16_cells.h"

namespace fastseq {
namespace {

// The gradients of all gates at all steps as BF16GateGradients leaves them.
struct BF16GradientRows {
  const char* data;
  int64_t stride;       // bytes
  int64_t gate_stride;  // bytes
  int64_t gates, H, rows;

  LeftOperand left(int64_t row) const {
    return {data + row * stride, stride, gates, chunks_of(H), kGradientChunkBytes, gate_stride};
  }
  // 16 units of a gate.
  __m256i units(int64_t row, int64_t gate, int64_t vector) const {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + row * stride + gate * gate_stride +
                                                               vector / 2 * kGradientChunkBytes + vector % 2 * 32));
  }
};

// One right operand: T * B rows of `width` numbers.
template <typename RowOf>
struct BF16RowSource {
  int64_t width;
  RowOf row_of;
  BFloat16* out;  // [gates * H, width]
};

// dW^T = x^T dgates: x, narrower than the gates, is what has to be transposed. A block of T * B rows at a time; the
// sums stay in float32 until they are whole.
class BF16WeightGradient {
 public:
  static constexpr int64_t kBlockRows = 256;
  // A little more than the rows, so that columns, or vectors, do not fall on the same cache sets.
  static constexpr int64_t kColumnBytes = 2 * kBlockRows + 64;
  static constexpr int64_t kVectorNumbers = kBlockRows * kTileColumns + 32;

  BF16GradientRows d;
  int64_t B;

  static int64_t sums_stride(int64_t gates, int64_t H) { return gates * vectors_of(H) * kTileColumns + kTileColumns; }

  // All threads call it. columns: [2][all widths] columns for all threads; packed: kVectorNumbers for each vector of
  // this thread's share of the gates; sums: [all widths, sums_stride], for all threads.
  template <typename... Sources>
  void run(BF16Unit& unit, char* columns, BFloat16* packed, float* sums, int thread, int threads, Barrier& barrier,
           const Sources&... sources) const {
    const int64_t all = (sources.width + ...), stride = sums_stride(d.gates, d.H);
    const Range mine = split(d.gates * vectors_of(d.H), threads, thread);
    for (int64_t first = 0, block = 0; first < d.rows; first += kBlockRows, ++block) {
      const int64_t last = first + kBlockRows < d.rows ? first + kBlockRows : d.rows;
      // Two buffers by turns: a thread that packs the next block must not overwrite the one still in use.
      char* shared = columns + block % 2 * all * kColumnBytes;
      char* to = shared;
      ((pack_columns(sources, first, last, split(vectors_of(sources.width), threads, thread), to),
        to += sources.width * kColumnBytes),
       ...);
      pack_gates(first, last, mine, packed);
      barrier.wait(threads);
      multiply(unit, shared, all, chunks_of(last - first), mine, packed, sums, stride, block > 0);
    }
    const float* from = sums;
    ((store_transposed(sources, from, stride, mine), from += sources.width * stride), ...);
  }

 private:
  // Columns of x, each the rows of the block one behind the other, up to whole chunks.
  template <typename Source>
  void pack_columns(const Source& source, int64_t first, int64_t last, Range vectors, char* to) const {
    for (int64_t row = first; row < last; row += kChunk) {
      const BFloat16* rows[kChunk];
      int64_t t = row / B, b = row % B;
      for (int64_t k = 0; k < kChunk; ++k) {
        rows[k] = row + k < last ? static_cast<const BFloat16*>(source.row_of(t, b)) : nullptr;
        if (++b == B) b = 0, ++t;
      }
      for (int64_t v = vectors.begin; v < vectors.end; ++v) {
        const int64_t column = v * kTileColumns;
        const __mmask16 inside = mask_part(source.width - column);
        Vec<float> block[16];
        FASTSEQ_UNROLL
        for (int i = 0; i < 16; ++i) {
          const BFloat16 *even = rows[2 * i], *odd = rows[2 * i + 1];
          block[i] = interleave_rows(even ? _mm256_maskz_loadu_epi16(inside, even + column) : _mm256_setzero_si256(),
                                     odd ? _mm256_maskz_loadu_epi16(inside, odd + column) : _mm256_setzero_si256());
        }
        transpose<float>(block);
        char* at = to + column * kColumnBytes + (row - first) * 2;
        const int64_t count = source.width - column;
        for (int i = 0; i < 16 && i < count; ++i) memcpy(at + i * kColumnBytes, &block[i], 64);
      }
    }
  }

  void pack_gates(int64_t first, int64_t last, Range vectors, BFloat16* packed) const {
    const int64_t per_gate = vectors_of(d.H), rows = chunks_of(last - first) * kChunk;
    for (int64_t k = 0; k < rows; k += 2)
      for (int64_t v = vectors.begin; v < vectors.end; ++v) {
        const int64_t row = first + k, gate = v / per_gate, vector = v % per_gate;
        const Vec<float> pairs =
            interleave_rows(row < last ? d.units(row, gate, vector) : _mm256_setzero_si256(),
                            row + 1 < last ? d.units(row + 1, gate, vector) : _mm256_setzero_si256());
        memcpy(packed + (v - vectors.begin) * kVectorNumbers + k * kTileColumns, &pairs, 64);
      }
  }

  void multiply(BF16Unit& unit, const char* columns, int64_t all, int64_t chunks, Range mine, const BFloat16* packed,
                float* sums, int64_t stride, bool add) const {
    const RowBlocks blocks(all);
    for (int64_t i = 0; i < blocks.count(); ++i) {
      const LeftOperand left = dense_left(columns + blocks.first(i) * kColumnBytes, kColumnBytes, chunks);
      for (int64_t v = mine.begin; v < mine.end; v += 4) {
        const Sums c{sums + blocks.first(i) * stride + v * kTileColumns, stride, kTileColumns};
        fastseq::multiply(unit, blocks.height(i), static_cast<int>(mine.end - v < 4 ? mine.end - v : 4), left,
                          packed + (v - mine.begin) * kVectorNumbers, kVectorNumbers, add ? c : Sums{}, c);
      }
    }
  }

  template <typename Source>
  void store_transposed(const Source& source, const float* sums, int64_t stride, Range mine) const {
    const int64_t per_gate = vectors_of(d.H);
    for (int64_t v = mine.begin; v < mine.end; ++v) {
      const int64_t unit = v % per_gate * kTileColumns, row = v / per_gate * d.H + unit;
      for (int64_t column = 0; column < source.width; column += 16) {
        const int64_t count = source.width - column;
        Vec<float> block[16];
        for (int i = 0; i < 16; ++i)
          block[i] = i < count ? load(sums + (column + i) * stride + v * kTileColumns) : zero<float>();
        transpose<float>(block);
        for (int i = 0; i < 16 && unit + i < d.H; ++i)
          store_bfloat16(source.out + (row + i) * source.width + column, block[i], mask_part(count));
      }
    }
  }
};

// dx = dgates W, a block of rows at a time.
struct BF16InputGradient {
  BF16GradientRows d;
  int64_t I;
  const BFloat16* packed;
  BFloat16* dx;

  void run(BF16Unit& unit, float* sums, int thread, int threads) const {
    const RowBlocks blocks(d.rows);
    const Range mine = split(blocks.count(), threads, thread);
    const int64_t vectors = vectors_of(I), numbers = d.gates * chunks_of(d.H) * kTileNumbers;
    // A block's gradients, once read, stay in the cache for all columns of dx.
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t row = blocks.first(i);
      for (int64_t v = 0; v < vectors; v += 4) {
        const int count = static_cast<int>(vectors - v < 4 ? vectors - v : 4);
        multiply(unit, blocks.height(i), count, d.left(row), packed + v * numbers, numbers, {},
                 {sums, kSumsStride, kTileColumns});
        for (int r = 0; r < blocks.height(i); ++r)
          for (int n = 0; n < count; ++n) {
            const int64_t column = (v + n) * kTileColumns;
            store_bfloat16(dx + (row + r) * I + column, sum_at(sums, r, n), mask_part(I - column));
          }
      }
    }
  }
};

}  // namespace
}  // namespace fastseq
