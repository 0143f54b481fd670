// The large products after the reverse loop: weight gradients and the input's gradient, each one GEMM over all T * B
// rows.
#pragma once

#include "pack.h"
#include "team.h"

namespace fastseq {
namespace {

// Rows of T * B that one panel block holds, and rows of the result that one pass of the left operand packs.
constexpr int64_t kBlockRows = 256;
constexpr int64_t kPackedTiles = 512 / kTileRows;

// The gradients of all gates at all steps: [T * B, stride], gate g of unit u in column g * padded + u.
template <typename Real>
struct GateGradients {
  const Real* data;
  int64_t stride, gates, H, padded, rows;
};

// acc -> C, or C + acc.
template <typename Real>
struct AccumulateOp {
  Real* c;
  int64_t ldc, width;  // width: columns of C from here on
  bool add;
  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors]) const {
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Real* to = c + r * ldc + v * kLanes<Real>;
      const int inside = lanes_inside<Real>(width, v * kLanes<Real>);
      if (inside > 0) store_part(to, add ? load_part(to, inside) + acc[r][v] : acc[r][v], inside);
    }
  }
};

// One right operand of the weight gradient: T * B rows of `width` numbers, and where their product goes.
// RowOf(t, b) gives the row's first element, or null for a row of zeros.
template <typename RowOf>
struct RowSource {
  Storage storage;
  int64_t width;
  RowOf row_of;
  void* out;  // [gates * H, width] in the user's storage
};
template <typename RowOf>
RowSource<RowOf> row_source(Storage storage, int64_t width, RowOf row_of, void* out) {
  return {storage, width, row_of, out};
}

template <typename Real>
struct WeightGradient {
  GateGradients<Real> d;
  int64_t B;
  Storage storage;  // of the results

  static int64_t vectors(int64_t width) { return divide_up(width, kLanes<Real>); }
  static int64_t panel_numbers(int64_t columns) { return 2 * kBlockRows * vectors(columns) * kLanes<Real>; }
  static int64_t packed_numbers() { return kPackedTiles * kBlockRows * kTileRows + kTileRows; }
  // Sums are kept in the arithmetic type until they are whole.
  static bool needs_sums(Storage storage) { return is_half(storage); }

  // All threads call it. panels: panel_numbers(width) for all; packed: packed_numbers() of this thread; sums: [gates *
  // H, width], or null where the storage is the arithmetic type.
  template <typename RowOf>
  void run(const RowSource<RowOf>& source, Real* panels, Real* packed, Real* sums, int thread, int threads,
           Barrier& barrier) const {
    const int64_t width = source.width, n = kLanes<Real>;
    const PanelRange columns{0, vectors(width)};
    Real* out = sums ? sums : static_cast<Real*>(source.out);
    const RowTiles unit_tiles(d.H);
    const Range mine = split(d.gates * unit_tiles.count(), threads, thread);
    const int64_t blocks = divide_up(d.rows, kBlockRows);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range k = split(d.rows, blocks, block);
      // Two buffers by turns: a thread that packs the next block must not overwrite the one still in use.
      Real* shared = panels + block % 2 * kBlockRows * columns.vectors() * n;
      const Range packing = split(columns.count(), threads, thread);
      for (int64_t i = packing.begin; i < packing.end; ++i) pack(source, columns.at(i), k, shared);
      barrier.wait(threads);
      for (int64_t first = mine.begin; first < mine.end; first += kPackedTiles) {
        const int64_t last = first + kPackedTiles < mine.end ? first + kPackedTiles : mine.end;
        pack_left(unit_tiles, first, last, k, packed);
        for (int64_t i = 0; i < columns.count(); ++i) {
          const Panel panel = columns.at(i);
          for (int64_t j = first; j < last; ++j) {
            const int64_t gate = j / unit_tiles.count(), tile = j % unit_tiles.count();
            const int64_t row = gate * d.H + unit_tiles.first(tile), column = panel.first * n;
            const AccumulateOp<Real> op{out + row * width + column, width, width - column, block > 0};
            run_tile<Chains::kOne, ALayout::kColumns, Real>(
                unit_tiles.height(tile), panel.vectors, op,
                Product<Real>{shared + panel.first * (k.end - k.begin) * n, k.end - k.begin,
                              packed + (j - first) * kBlockRows * kTileRows, kTileRows});
          }
        }
      }
    }
    if (sums)
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        const int64_t tile = j % unit_tiles.count(), row = j / unit_tiles.count() * d.H + unit_tiles.first(tile);
        store_rows<Real>(storage, sums + row * width, width, at(source.out, storage, row * width), width,
                         unit_tiles.height(tile), width);
      }
    barrier.wait(threads);
  }

 private:
  template <typename RowOf>
  void pack(const RowSource<RowOf>& source, const Panel& panel, const Range& k, Real* shared) const {
    const int64_t n = kLanes<Real>;
    Real* to = shared + panel.first * (k.end - k.begin) * n;
    int64_t t = k.begin / B, b = k.begin % B;
    for (int64_t row = k.begin; row < k.end; ++row) {
      const void* from = source.row_of(t, b);
      for (int v = 0; v < panel.vectors; ++v, to += n) {
        const int64_t column = (panel.first + v) * n;
        store(to, from ? load_as<Real>(source.storage, from, column, lanes_inside<Real>(source.width, column))
                       : zero<Real>());
      }
      if (++b == B) {
        b = 0;
        ++t;
      }
    }
  }
  void pack_left(const RowTiles& unit_tiles, int64_t first, int64_t last, const Range& k, Real* packed) const {
    for (int64_t row = k.begin; row < k.end; ++row) {
      const Real* from = d.data + row * d.stride;
      Real* to = packed + (row - k.begin) * kTileRows;
      for (int64_t j = first; j < last; ++j) {
        const int64_t gate = j / unit_tiles.count(), tile = j % unit_tiles.count();
        // A tile of fewer rows takes some numbers more, which are not used; the tape's width has room for them.
        memcpy(to + (j - first) * kBlockRows * kTileRows, from + gate * d.padded + unit_tiles.first(tile),
               kTileRows * sizeof(Real));
      }
    }
  }
};

// db from the sums of each batch tile, in the order of the tiles: [tiles][gates * padded] to [gates * H].
template <typename Real>
void store_bias_gradient(Storage storage, Real* sums, int64_t tiles, int64_t gates, int64_t H, int64_t padded,
                         void* db) {
  const int64_t all = gates * padded;
  for (int64_t tile = 1; tile < tiles; ++tile)
    for (int64_t n = 0; n < all; n += kLanes<Real>) store(sums + n, load(sums + n) + load(sums + tile * all + n));
  store_rows<Real>(storage, sums, padded, db, H, gates, H);
}

// Adds the chunks of one panel's product to a block that stays in cache, since a chain over all gates would be too long
// and a panel of all gates does not fit the first-level cache.
template <typename Real>
struct InputGradient {
  GateGradients<Real> d;
  Storage storage;
  int64_t I;
  const Real* panels;  // pack_plain of w_ih
  void* dx;            // [rows, I]

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
        const int64_t width = panel.vectors * n;
        for (int64_t k = 0; k < K; k += kDepth) {
          const int64_t depth = K - k < kDepth ? K - k : kDepth;
          for (int64_t j = first; j < last; ++j) {
            const int64_t row = row_tiles.first(j);
            const AccumulateOp<Real> op{block + (row - row0) * width, width, width, k > 0};
            run_tile<Chains::kOne, ALayout::kRows, Real>(
                row_tiles.height(j), panel.vectors, op,
                Product<Real>{panels + panel.first * K * n + k * width, depth, d.data + row * d.stride + k, d.stride});
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
