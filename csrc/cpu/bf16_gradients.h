// Weight and input gradients of the recurrences by products of bfloat16: large products over all T * B rows.
#pragma once

#include "bf16_cells.h"

namespace fastseq {
namespace {

// The gradients of all gates at all steps as BF16GateGradients leaves them.
struct BF16GradientRows {
  using Number = BFloat16;
  const char* data;
  int64_t stride;       // bytes
  int64_t gate_stride;  // bytes
  int64_t gates, H, rows;

  // 16 units of a gate.
  __m256i units(int64_t row, int64_t gate, int64_t vector) const {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + row * stride + gate * gate_stride +
                                                               vector / 2 * kGradientChunkBytes + vector % 2 * 32));
  }
  // Rows [row, row + count) as a left operand: they are one as they lie.
  static int64_t staged_numbers(int64_t, int64_t) { return 0; }
  LeftOperand left(int64_t row, int, const int32_t*, BFloat16*) const {
    return {data + row * stride, stride, gates, chunks_of(H), kGradientChunkBytes, gate_stride};
  }
};

// The same in float32 as they lie on the tape: gate g of unit u in column g * padded + u.
struct FloatGradientRows {
  using Number = float;
  const float* data;
  int64_t stride, padded;
  int64_t gates, H, rows;

  Vec<float> units(int64_t row, int64_t gate, int64_t vector) const {
    return load(data + row * stride + gate * padded + vector * kTileColumns);
  }
  static int64_t staged_numbers(int64_t gates, int64_t H) { return kBlockHeight * row_numbers<float>(H, gates); }
  // Rows [row, row + count), or those that `valid` lists there.
  LeftOperand left(int64_t row, int count, const int32_t* valid, BFloat16* staged) const {
    const int64_t width = group_numbers<float>(H), all = row_numbers<float>(H, gates);
    for (int r = 0; r < count; ++r)
      for (int64_t gate = 0; gate < gates; ++gate)
        copy_rows(data + (valid ? valid[row + r] : row + r) * stride + gate * padded, 0,
                  staged + r * all + gate * width, 0, 1, H);
    return dense_left<float>(staged, all * 2, gates * chunks_of(H));
  }
};

// One right operand: T * B rows of `width` numbers. Where RowOf::kScaled, rows are multiplied by scale[b], unless that
// is null.
template <typename Number, typename RowOf>
struct BF16RowSource {
  int64_t width;
  RowOf row_of;
  Number* out;  // [gates * H, width]
  const float* scale = nullptr;
  int64_t scale_stride = 0;

  // 16 numbers of a row from `column` on; there is no row: zeros.
  FASTSEQ_INLINE Numbers<Number> numbers(const Number* row, int64_t b, int64_t column, __mmask16 inside) const {
    if (row == nullptr) return Numbers<Number>{};
    const Numbers<Number> loaded = load_numbers(row + column, inside);
    if constexpr (RowOf::kScaled && kTerms<Number> > 1)
      if (scale) return loaded * load(scale + b * scale_stride + column);
    return loaded;
  }
};

// dW^T = x^T dgates: x, narrower than the gates, is what has to be transposed. A block of T * B rows at a time; the
// sums stay in float32 until they are whole.
template <typename Rows>
class BF16WeightGradient {
 public:
  using Number = typename Rows::Number;
  static constexpr int kCount = kTerms<Number>;
  static constexpr int64_t kBlockRows = 256;  // at most
  // A little more than the rows, so that columns, or vectors, do not fall on the same cache sets.
  static constexpr int64_t kColumnBytes = kBlockRows / kChunk * kCount * kLineBytes + 64;
  static constexpr int64_t kVectorNumbers = kBlockRows * kCount * kTileColumns + 32;

  Rows d;
  int64_t B;
  // Where the rows come in parts: whether to add to the sums of the parts before, and whether this is the last.
  bool continued = false, complete = true;
  // The rows that count, or null for all of them.
  const int32_t* valid = nullptr;
  int64_t valid_rows = 0;

  static int64_t sums_stride(int64_t gates, int64_t H) { return gates * vectors_of(H) * kTileColumns + kTileColumns; }

  // All threads call it. columns: [2][all widths] columns for all threads; packed: kVectorNumbers for each vector of
  // this thread's share of the gates; sums: [all widths, sums_stride], for all threads.
  template <typename... Sources>
  void run(BF16Unit<Number>& unit, char* columns, BFloat16* packed, float* sums, int thread, int threads,
           Barrier& barrier, const Sources&... sources) const {
    const int64_t all = (sources.width + ...), stride = sums_stride(d.gates, d.H);
    const Range mine = split(d.gates * vectors_of(d.H), threads, thread);
    const int64_t height = block_rows(all);
    for (int64_t first = 0, block = 0; first < rows() || block == 0; first += height, ++block) {
      const int64_t last = first + height < rows() ? first + height : rows();
      // Two buffers by turns: a thread that packs the next block must not overwrite the one still in use.
      char* shared = columns + block % 2 * all * kColumnBytes;
      char* to = shared;
      ((pack_columns(sources, first, last, split(vectors_of(sources.width), threads, thread), to),
        to += sources.width * kColumnBytes),
       ...);
      pack_gates(first, last, mine, packed);
      barrier.wait(threads);
      multiply(unit, shared, all, chunks_of(last - first), mine, packed, sums, stride, block > 0 || continued);
    }
    const float* from = sums;
    if (complete) ((store_transposed(sources, from, stride, mine), from += sources.width * stride), ...);
    barrier.wait(threads);
  }

 private:
  // Half as many rows where the operands of so many would not stay in a second-level cache of two MiB beside the sums;
  // as many again where these do not either, since they are read and written once for each block.
  int64_t block_rows(int64_t all) const {
    const int64_t operands = kBlockRows * kCount * 2 * (all + d.gates * d.H / 2), sums = all * d.gates * d.H * 2;
    return kCount == 1 || operands <= (1 << 20) || sums > (3 << 19) ? kBlockRows : kBlockRows / 2;
  }
  // A thread's vectors that stay in its second-level cache while all columns pass by.
  static constexpr int64_t kResidentVectors = (768 << 10) / (kVectorNumbers * 2) / 4 * 4;

  int64_t rows() const { return valid ? valid_rows : d.rows; }
  int64_t row(int64_t k) const { return valid ? valid[k] : k; }

  // Columns of x, each the rows of the block one behind the other, up to whole chunks.
  template <typename Source>
  void pack_columns(const Source& source, int64_t first, int64_t last, Range vectors, char* to) const {
    for (int64_t begin = first; begin < last; begin += kChunk, to += kCount * kLineBytes) {
      const Number* from[kChunk];
      int64_t of_batch[kChunk], t = row(begin) / B, b = row(begin) % B;
      for (int64_t k = 0; k < kChunk; ++k) {
        const bool inside = begin + k < last;
        if (inside && valid) t = valid[begin + k] / B, b = valid[begin + k] % B;
        from[k] = inside ? static_cast<const Number*>(source.row_of(t, b)) : nullptr;
        of_batch[k] = b;
        if (++b == B) b = 0, ++t;
      }
      for (int64_t v = vectors.begin; v < vectors.end; ++v) {
        const int64_t column = v * kTileColumns, count = source.width - column;
        const __mmask16 inside = mask_part(count);
        const auto number = [&](int k) { return source.numbers(from[k], of_batch[k], column, inside); };
        char* at = to + column * kColumnBytes;
        if constexpr (kCount == 1) {
          Vec<float> pairs[16];
          FASTSEQ_UNROLL
          for (int i = 0; i < 16; ++i) pairs[i] = interleave_rows(number(2 * i), number(2 * i + 1));
          transpose<float>(pairs);
          for (int i = 0; i < 16 && i < count; ++i) memcpy(at + i * kColumnBytes, &pairs[i], sizeof(pairs[i]));
        } else {
          Vec<float> low[16], high[16];
          FASTSEQ_UNROLL
          for (int i = 0; i < 16; ++i) low[i] = number(i);
          transpose<float>(low);
          FASTSEQ_UNROLL
          for (int i = 0; i < 16; ++i) high[i] = number(16 + i);
          transpose<float>(high);
          for (int i = 0; i < 16 && i < count; ++i) {
            Vec<float> lines[kCount];
            chunk_terms(low[i], high[i], lines);
            memcpy(at + i * kColumnBytes, lines, sizeof(lines));
          }
        }
      }
    }
  }

  void pack_gates(int64_t first, int64_t last, Range vectors, BFloat16* packed) const {
    const int64_t per_gate = vectors_of(d.H);
    for (int64_t chunk = 0; chunk < chunks_of(last - first); ++chunk, packed += kCount * kTileNumbers)
      for (int64_t k = 0; k < kChunk; k += 2) {
        const int64_t at = first + chunk * kChunk + k;
        const int64_t even_row = at < last ? row(at) : -1, odd_row = at + 1 < last ? row(at + 1) : -1;
        for (int64_t v = vectors.begin; v < vectors.end; ++v) {
          const int64_t gate = v / per_gate, vector = v % per_gate;
          Vec<float> lines[kCount];
          pair_terms(even_row >= 0 ? d.units(even_row, gate, vector) : Numbers<Number>{},
                     odd_row >= 0 ? d.units(odd_row, gate, vector) : Numbers<Number>{}, lines);
          BFloat16* to = packed + (v - vectors.begin) * kVectorNumbers + k * kTileColumns;
          FASTSEQ_UNROLL
          for (int term = 0; term < kCount; ++term)
            store(reinterpret_cast<float*>(to + term * kTileNumbers), lines[term]);
        }
      }
  }

  void multiply(BF16Unit<Number>& unit, const char* columns, int64_t all, int64_t chunks, Range mine,
                const BFloat16* packed, float* sums, int64_t stride, bool add) const {
    const RowBlocks blocks(all);
    // Sums of sums: a chain over all rows would round too often for float32. The last product's are added while the
    // next is made.
    const bool apart = add && kCount > 1;
    alignas(64) float parts[2][apart_numbers()];
    Part last{};
    int64_t n = 0;
    for (int64_t first = mine.begin; first < mine.end; first += kResidentVectors) {
      const int64_t end = first + kResidentVectors < mine.end ? first + kResidentVectors : mine.end;
      for (int64_t i = 0; i < blocks.count(); ++i)
        for (int64_t v = first; v < end; v += 4, ++n) {
          const int count = static_cast<int>(end - v < 4 ? end - v : 4);
          float* to = sums + blocks.first(i) * stride + v * kTileColumns;
          const Sums c{to, stride, kTileColumns};
          unit.begin({blocks.height(i),
                      count,
                      1,
                      {dense_left<Number>(columns + blocks.first(i) * kColumnBytes, kColumnBytes, chunks), {}},
                      {packed + (v - mine.begin) * kVectorNumbers, nullptr},
                      {kVectorNumbers, 0},
                      add && !apart ? c : Sums{},
                      apart ? Sums{parts[n % 2], kSumsStride, kTileColumns} : c});
          if (last.rows > 0) add_part(last, stride, unit);
          unit.finish();
          if (apart) last = {parts[n % 2], to, blocks.height(i), count};
        }
    }
    if (last.rows > 0) add_part(last, stride, unit);
  }
  struct Part {
    const float* from;
    float* to;
    int rows, vectors;
  };
  static constexpr int64_t apart_numbers() { return kCount > 1 ? kBlockHeight * kSumsStride : 1; }
  static void add_part(const Part& part, int64_t stride, BF16Unit<Number>& unit) {
    Pace<Number> pace(unit, part.rows);
    for (int r = 0; r < part.rows; ++r) {
      float* to = part.to + r * stride;
      for (int v = 0; v < part.vectors; ++v, to += kTileColumns) store(to, load(to) + sum_at(part.from, r, v));
      pace.next();
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
          store_numbers(source.out + (row + i) * source.width + column, block[i], mask_part(count));
      }
    }
  }
};

// dx = dgates W, a block of rows at a time.
template <typename Rows>
struct BF16InputGradient {
  using Number = typename Rows::Number;
  Rows d;
  int64_t I;
  const BFloat16* packed;
  Number* dx;
  // The rows that count, all others' gradient being zero; or null.
  const int32_t* valid = nullptr;
  int64_t valid_rows = 0;

  // Blocks of rows that share what is read of the weights.
  static constexpr int64_t kTogether = 4;
  static int64_t staged_numbers(int64_t gates, int64_t H) { return kTogether * Rows::staged_numbers(gates, H); }
  // staged: staged_numbers() of this thread.
  void run(BF16Unit<Number>& unit, float* sums, BFloat16* staged, int thread, int threads) const {
    if (valid) clear_others(split(d.rows, threads, thread));
    const RowBlocks blocks(valid ? valid_rows : d.rows);
    const Range mine = split(blocks.count(), threads, thread);
    const int64_t vectors = vectors_of(I), numbers = d.gates * vector_numbers<Number>(d.H);
    for (int64_t i = mine.begin; i < mine.end; i += kTogether) {
      const int64_t count = mine.end - i < kTogether ? mine.end - i : kTogether;
      LeftOperand left[kTogether];
      for (int64_t j = 0; j < count; ++j)
        left[j] =
            d.left(blocks.first(i + j), blocks.height(i + j), valid, staged + j * Rows::staged_numbers(d.gates, d.H));
      for (int64_t v = 0; v < vectors; v += 4)
        for (int64_t j = 0; j < count; ++j) {
          const int width = static_cast<int>(vectors - v < 4 ? vectors - v : 4);
          multiply(unit, blocks.height(i + j), width, left[j], packed + v * numbers, numbers, {},
                   {sums, kSumsStride, kTileColumns});
          store_part(blocks.first(i + j), blocks.height(i + j), v, width, sums);
        }
    }
  }

 private:
  void store_part(int64_t first, int rows, int64_t vector, int width, const float* sums) const {
    for (int r = 0; r < rows; ++r) {
      Number* to = dx + (valid ? valid[first + r] : first + r) * I;
      for (int n = 0; n < width; ++n) {
        const int64_t column = (vector + n) * kTileColumns;
        store_numbers(to + column, sum_at(sums, r, n), mask_part(I - column));
      }
    }
  }
  // The rows of [begin, end) that `valid`, which is in order, does not list.
  void clear_others(Range rows) const {
    int64_t next = 0;
    while (next < valid_rows && valid[next] < rows.begin) ++next;
    for (int64_t row = rows.begin; row < rows.end; ++row)
      if (next < valid_rows && valid[next] == row)
        ++next;
      else
        memset(dx + row * I, 0, static_cast<size_t>(I) * sizeof(Number));
  }
};

}  // namespace
}  // namespace fastseq
