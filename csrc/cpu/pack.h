// Weights laid out as panels (tile.h).
#pragma once

#include "storage.h"
#include "tile.h"

namespace fastseq {
namespace {

// One vector slot of a panel from `rows` rows of a row-major [.., K] matrix: lane n of step k is from[row n][k]. Lanes
// behind `rows` are zero. `step` is the panel's width in numbers.
template <typename Real>
void pack_rows_as_lanes(Storage storage, const void* from, int64_t row, int rows, int64_t K, Real* to, int64_t step) {
  constexpr int n = kLanes<Real>;
  for (int64_t k = 0; k < K; k += n) {
    const int inside = lanes_inside<Real>(K, k);
    Vec<Real> block[n];
    FASTSEQ_UNROLL
    for (int i = 0; i < n; ++i)
      block[i] = i < rows ? load_as<Real>(storage, from, (row + i) * K + k, inside) : zero<Real>();
    transpose<Real>(block);
    if (inside == n) {
      FASTSEQ_UNROLL
      for (int i = 0; i < n; ++i) store(to + (k + i) * step, block[i]);
    } else {
      for (int i = 0; i < inside; ++i) store(to + (k + i) * step, block[i]);
    }
  }
}

// Panels for a product with the transpose of w: column n of the product is row n of w [rows, K]. The units of `range`
// are cut as the range says; each vector holds the lanes of consecutive rows.
template <typename Real>
void pack_transposed(Storage storage, const void* w, int64_t rows, int64_t K, const PanelRange& range, Real* to) {
  constexpr int n = kLanes<Real>;
  for (int64_t i = 0; i < range.count(); ++i) {
    const Panel panel = range.at(i);
    for (int v = 0; v < panel.vectors; ++v) {
      const int64_t row = (panel.first + v) * n;
      const Slot slot = slot_in_panel<Real>(v, panel.vectors, K);
      pack_rows_as_lanes<Real>(storage, w, row, lanes_inside<Real>(rows, row), K, to + panel.first * K * n + slot.first,
                               slot.step);
    }
  }
}

// The four gates of one vector of units are the vectors of panel `unit`.
template <typename Real>
void pack_gates(Storage storage, const void* w, int64_t H, int64_t K, int64_t unit, Real* to) {
  constexpr int n = kLanes<Real>;
  for (int gate = 0; gate < 4; ++gate) {
    const Slot slot = slot_in_panel<Real>(gate, 4, K);
    pack_rows_as_lanes<Real>(storage, w, gate * H + unit * n, lanes_inside<Real>(H, unit * n), K,
                             to + unit * K * 4 * n + slot.first, slot.step);
  }
}

// Panels for a product with w [gates * H, columns] itself, its rows spread out so that gate g begins at k = g * padded.
// Rows between H and padded are zero. Packs the panels of `range`, of the rows of each gate those in `units`.
template <typename Real>
void pack_plain(Storage storage, const void* w, int64_t gates, int64_t H, int64_t padded, int64_t columns,
                const PanelRange& range, Range units, Real* to) {
  constexpr int n = kLanes<Real>;
  const int64_t K = gates * padded;
  for (int64_t i = 0; i < range.count(); ++i) {
    const Panel panel = range.at(i);
    Real* base = to + panel.first * K * n;
    for (int64_t gate = 0; gate < gates; ++gate)
      for (int64_t unit = units.begin; unit < units.end; ++unit)
        for (int v = 0; v < panel.vectors; ++v) {
          const int64_t column = (panel.first + v) * n;
          const int inside = unit < H ? lanes_inside<Real>(columns, column) : 0;
          const Vec<Real> value =
              inside ? load_as<Real>(storage, w, (gate * H + unit) * columns + column, inside) : zero<Real>();
          const Slot slot = slot_in_panel<Real>(v, panel.vectors, K);
          store(base + slot.first + (gate * padded + unit) * slot.step, value);
        }
  }
}

}  // namespace
}  // namespace fastseq
