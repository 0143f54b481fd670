// The large products after the reverse loop: weight gradients and the input's gradient, each one GEMM over all T * B
// rows.
#pragma once

#include "hidden.h"
#include "pack.h"
#include "team.h"

namespace fastseq {
namespace {

// Rows of T * B that one panel block holds.
constexpr int64_t kBlockRows = 256;

// The gradients of all gates at all steps: [T * B, stride], gate g of unit u in column g * padded + u.
template <typename Real>
struct GateGradients {
  const Real* data;
  int64_t stride, gates, H, padded, rows;
};

// acc -> C, or C + acc.
template <typename Real>
struct AccumulateOp {
  static constexpr bool kTall = false;
  Real* c;
  int64_t ldc, width;  // width: columns of C from here on
  bool add;
  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first) const {
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Real* to = c + (first + r) * ldc + v * kLanes<Real>;
      const int inside = lanes_inside<Real>(width, v * kLanes<Real>);
      if (inside > 0) store_part(to, add ? load_part(to, inside) + acc[r][v] : acc[r][v], inside);
    }
  }
};

// One right operand of the weight gradient: T * B rows of `width` numbers, and where their product goes.
// RowOf(t, b) gives the row's first element, or null for a row of zeros; where RowOf::kScaled, rows are multiplied by
// scale[b], unless that is null.
template <typename Real, typename RowOf>
struct RowSource {
  Storage storage;
  int64_t width;
  RowOf row_of;
  void* out;          // [gates * H, width] in the storage of the results
  Real* sums;         // the same in the arithmetic type where `out` is of another, else null
  const Real* scale;  // [B, scale_stride]
  int64_t scale_stride;

  PanelRange columns() const { return {0, divide_up(width, kLanes<Real>)}; }
  Real* target() const { return sums ? sums : static_cast<Real*>(out); }
};
template <typename Real, typename RowOf>
RowSource<Real, RowOf> row_source(Storage storage, int64_t width, RowOf row_of, void* out, Real* sums,
                                  const Real* scale = nullptr, int64_t scale_stride = 0) {
  return {storage, width, row_of, out, sums, scale, scale_stride};
}

// dW = sum over rows of gate gradient (left) times x, h_{t-1}, ... (right). Several right operands share one pass,
// since the left one must be packed: its columns are the product's rows.
template <typename Real>
struct WeightGradient {
  GateGradients<Real> d;
  int64_t B;
  Storage storage;  // of the results
  // Where the rows come in parts: whether to add to the sums of the parts before, and whether this is the last.
  bool continued = false, complete = true;
  // The rows that count, or null for all of them; not where they come in parts.
  const int32_t* valid = nullptr;
  int64_t valid_rows = 0;

  int64_t rows() const { return valid ? valid_rows : d.rows; }
  int64_t row(int64_t k) const { return valid ? valid[k] : k; }

  static int64_t vectors(int64_t width) { return divide_up(width, kLanes<Real>); }
  // For right operands of so many vectors together.
  static int64_t panel_numbers(int64_t vectors) { return 2 * kBlockRows * vectors * kLanes<Real>; }
  static int64_t packed_numbers() { return kPackedTiles * kPackedStride + kTileRows; }
  // Sums are kept in the arithmetic type until they are whole.
  static bool needs_sums(Storage storage) { return is_half(storage); }

  // All threads call it. panels: panel_numbers() of all sources together, for all threads; packed: packed_numbers() of
  // this thread.
  template <typename... Sources>
  void run(Real* panels, Real* packed, int thread, int threads, Barrier& barrier, const Sources&... sources) const {
    const RowTiles unit_tiles(d.H);
    const int64_t all_vectors = (sources.columns().vectors() + ...);
    const Range mine = split(d.gates * unit_tiles.count(), threads, thread);
    const int64_t passes = divide_up(mine.end - mine.begin, kPackedTiles);
    const int64_t blocks = rows() > 0 ? divide_up(rows(), kBlockRows) : 1;  // with no rows the sums are zero
    for (int64_t block = 0; block < blocks; ++block) {
      const Range k = split(rows(), blocks, block);
      const int64_t depth = k.end - k.begin;
      // Two buffers by turns: a thread that packs the next block must not overwrite the one still in use.
      Real* shared = panels + block % 2 * kBlockRows * all_vectors * kLanes<Real>;
      Real* to = shared;
      ((pack_right(sources, k, split(sources.columns().count(), threads, thread), to),
        to += depth * sources.columns().vectors() * kLanes<Real>),
       ...);
      barrier.wait(threads);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const Range part = split(mine.end - mine.begin, passes, pass);
        Tile tiles[kPackedTiles];
        const int count = list_tiles(unit_tiles, mine.begin + part.begin, mine.begin + part.end, tiles);
        pack_left(tiles, count, k, packed);
        const Real* from = shared;
        ((multiply(sources, tiles, count, from, packed, depth, block > 0 || continued),
          from += depth * sources.columns().vectors() * kLanes<Real>),
         ...);
      }
    }
    if (complete) (store_sums(sources, mine, unit_tiles), ...);
    barrier.wait(threads);
  }

 private:
  // Rows of the result that one tile holds: units of one gate. `column` is where they stand in the gates' gradients.
  struct Tile {
    int64_t row, column;
    int height;
  };
  static constexpr int64_t kPackedTiles = 512 / kTileRows;
  // One line more than the tile needs: tiles side by side would otherwise fall on the same few cache sets.
  static constexpr int64_t kPackedStride = kBlockRows * kTileRows + 64 / static_cast<int64_t>(sizeof(Real));

  int list_tiles(const RowTiles& unit_tiles, int64_t first, int64_t last, Tile* tiles) const {
    int count = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t gate = i / unit_tiles.count(), tile = i % unit_tiles.count(), unit = unit_tiles.first(tile);
      tiles[count++] = {gate * d.H + unit, gate * d.padded + unit, unit_tiles.height(tile)};
    }
    return count;
  }
  template <typename Source>
  void pack_right(const Source& source, const Range& k, const Range& share, Real* to) const {
    for (int64_t i = share.begin; i < share.end; ++i) pack_panel(source, source.columns().at(i), k, to);
  }
  template <typename Source>
  void pack_panel(const Source& source, const Panel& panel, const Range& k, Real* to) const {
    const int64_t n = kLanes<Real>;
    to += panel.first * (k.end - k.begin) * n;
    for (int64_t i = k.begin; i < k.end; ++i) {
      const int64_t t = row(i) / B, b = row(i) % B;
      const void* from = source.row_of(t, b);
      for (int v = 0; v < panel.vectors; ++v, to += n) {
        const int64_t column = (panel.first + v) * n;
        Vec<Real> value =
            from ? load_as<Real>(source.storage, from, column, lanes_inside<Real>(source.width, column)) : zero<Real>();
        if constexpr (decltype(source.row_of)::kScaled)
          if (source.scale) value = value * load(source.scale + b * source.scale_stride + column);
        store(to, value);
      }
    }
  }
  void pack_left(const Tile* tiles, int count, const Range& k, Real* packed) const {
    for (int64_t i = k.begin; i < k.end; ++i, packed += kTileRows) {
      const Real* from = d.data + row(i) * d.stride;
      // A tile of fewer rows takes some numbers more, which are not used; the tape's width has room for them.
      for (int tile = 0; tile < count; ++tile)
        memcpy(packed + tile * kPackedStride, from + tiles[tile].column, kTileRows * sizeof(Real));
    }
  }
  template <typename Source>
  void multiply(const Source& source, const Tile* tiles, int count, const Real* panels, const Real* packed,
                int64_t depth, bool add) const {
    const int64_t n = kLanes<Real>;
    const PanelRange columns = source.columns();
    for (int64_t p = 0; p < columns.count(); ++p) {
      const Panel panel = columns.at(p);
      const int64_t column = panel.first * n;
      for (int i = 0; i < count; ++i) {
        const AccumulateOp<Real> op{source.target() + tiles[i].row * source.width + column, source.width,
                                    source.width - column, add};
        run_tile<Chains::kOne, ALayout::kColumns, Real>(
            tiles[i].height, panel.vectors, op,
            Product<Real>{panels + column * depth, depth, packed + i * kPackedStride, kTileRows});
      }
    }
  }
  template <typename Source>
  void store_sums(const Source& source, const Range& mine, const RowTiles& unit_tiles) const {
    if (source.sums == nullptr) return;
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t tile = i % unit_tiles.count(), row = i / unit_tiles.count() * d.H + unit_tiles.first(tile);
      store_rows<Real>(storage, source.sums + row * source.width, source.width,
                       at(source.out, storage, row * source.width), source.width, unit_tiles.height(tile),
                       source.width);
    }
  }
};

// Sums over all steps and the whole batch, as the gradient of a bias is one: [gates * padded] numbers for every part of
// the batch and up to kSteps steps, and these added up in pairs, pairs of pairs and so on. One chain over a long
// sequence or a large batch would round too often.
template <typename Real>
class StepSums {
 public:
  static constexpr int64_t kSteps = 64;

  // For T steps of a batch in `parts`.
  void place(Carver& carver, int64_t T, int64_t parts, int64_t gates, int64_t padded) {
    parts_ = parts, gates_ = gates, padded_ = padded, count_ = divide_up(T, kSteps) * parts;
    sums_ = carver.take<Real>(count_ * gates * padded);
  }
  explicit operator bool() const { return sums_ != nullptr; }

  void clear() const {
    if (sums_) memset(sums_, 0, static_cast<size_t>(count_ * gates_ * padded_) * sizeof(Real));
  }
  // Where a part of the batch adds what a step gives: [gates][padded], or null where nobody asked for these sums.
  Real* at(int64_t step, int64_t part) const {
    return sums_ ? sums_ + (step / kSteps * parts_ + part) * gates_ * padded_ : nullptr;
  }
  // The total, [gates * H]; the sums are used up.
  void store_total(Storage storage, int64_t H, void* to) const {
    if (!sums_ || !to) return;
    const int64_t all = gates_ * padded_;
    for (int64_t apart = 1; apart < count_; apart *= 2)
      for (int64_t i = 0; i + apart < count_; i += 2 * apart)
        for (int64_t n = i * all; n < (i + 1) * all; n += kLanes<Real>)
          store(sums_ + n, load(sums_ + n) + load(sums_ + n + apart * all));
    store_rows<Real>(storage, sums_, padded_, to, H, gates_, H);
  }

 private:
  Real* sums_ = nullptr;
  int64_t parts_ = 0, gates_ = 0, padded_ = 0, count_ = 0;
};

// Adds the chunks of one panel's product to a block that stays in cache, since a chain over all gates would be too long
// and a panel of all gates does not fit the first-level cache.
template <typename Real>
struct InputGradient {
  GateGradients<Real> d;
  Storage storage;
  int64_t I;
  const Real* panels;    // pack_plain of w_ih
  void* dx;              // [rows, I]
  const uint8_t* flags;  // [rows] or null; where all rows of a tile are padding, their gradient is zero

  static constexpr int64_t kRowTiles = 16;
  static constexpr int64_t kDepth = 128;
  static int64_t block_numbers() { return kRowTiles * kTileRows * kTileVectors * kLanes<Real>; }

  // block: block_numbers() of this thread.
  void run(Real* block, int thread, int threads) const {
    const int64_t n = kLanes<Real>, K = d.gates * d.padded;
    const PanelRange columns{0, divide_up(I, n)};
    // Tiles are cut before threads are: a row's sums must not depend on the number of threads.
    const RowTiles row_tiles(d.rows);
    const Range mine = split(row_tiles.count(), threads, thread);
    for (int64_t first = mine.begin; first < mine.end; first += kRowTiles) {
      const int64_t last = first + kRowTiles < mine.end ? first + kRowTiles : mine.end;
      const int64_t row0 = row_tiles.first(first);
      for (int64_t i = 0; i < columns.count(); ++i) {
        const Panel panel = columns.at(i);
        const int64_t width = panel.vectors * n, step = slot_in_panel<Real>(0, panel.vectors, K).step;
        for (int64_t k = 0; k < K; k += kDepth) {
          const int64_t depth = K - k < kDepth ? K - k : kDepth;
          for (int64_t j = first; j < last; ++j) {
            const int64_t row = row_tiles.first(j);
            const AccumulateOp<Real> op{block + (row - row0) * width, width, width, k > 0};
            const bool over = all_padding(flags ? flags + row : nullptr, row_tiles.height(j));
            run_tile<Chains::kOne, ALayout::kRows, Real>(
                row_tiles.height(j), panel.vectors, op,
                Product<Real>{panels + panel.first * K * n + k * step, over ? 0 : depth, d.data + row * d.stride + k,
                              d.stride, 0, K});
          }
        }
        const int64_t column = panel.first * n;
        store_rows<Real>(storage, block, width, at(dx, storage, row0 * I + column), I, row_tiles.first(last) - row0,
                         I - column < width ? I - column : width);
      }
    }
  }
};

}  // namespace
}  // namespace fastseq
