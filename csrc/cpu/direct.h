// Products of a few rows with weights as they lie: packing would cost more than it brings, and push what the caller
// works with out of the cache.
#pragma once

#include "storage.h"
#include "tile.h"

namespace fastseq {
namespace {

// So many rows of time and batch are multiplied without packing.
constexpr int64_t kDirectRows = 16;

// The dot products of `rows` (at most kLanes) rows of w [.., K] with a: row i's in lane i, the other lanes zero. Every
// lane of a sum is a chain of its own, of at most kChain multiply-adds.
template <typename Real>
FASTSEQ_INLINE Vec<Real> dot_rows(const Real* w, int rows, int64_t K, const Real* a) {
  constexpr int n = kLanes<Real>;
  constexpr int kGroup = n < 4 ? n : 4;
  constexpr int64_t kBlock = kChain<ALayout::kRows> * n;
  Vec<Real> total = zero<Real>();
  for (int64_t first = 0; first < K; first += kBlock) {
    const int64_t last = K - first < kBlock ? K : first + kBlock;
    Vec<Real> acc[n];
    FASTSEQ_UNROLL
    for (int i = 0; i < n; ++i) acc[i] = zero<Real>();
    if (rows == n) {
      int64_t k = first;
      for (; k + n <= last; k += n) {
        const Vec<Real> numbers = load(a + k);
        const Real* row = w + k;
        FASTSEQ_UNROLL
        for (int i = 0; i < n; i += kGroup, row += kGroup * K) FASTSEQ_UNROLL
        for (int j = 0; j < kGroup; ++j) acc[i + j] = fma(numbers, load(row + j * K), acc[i + j]);
      }
      if (k < last) {
        const int inside = static_cast<int>(last - k);
        const Vec<Real> numbers = load_part(a + k, inside);
        FASTSEQ_UNROLL
        for (int i = 0; i < n; ++i) acc[i] = fma(numbers, load_part(w + i * K + k, inside), acc[i]);
      }
    } else {
      for (int i = 0; i < rows; ++i) {
        Vec<Real> sum = zero<Real>();
        for (int64_t k = first; k < last; k += n) {
          const int inside = lanes_inside<Real>(last, k);
          sum = fma(load_part(a + k, inside), load_part(w + i * K + k, inside), sum);
        }
        acc[i] = sum;
      }
    }
    total = total + sum_lanes<Real>(acc);
  }
  return total;
}

template <int kGates, int kVectors, typename Real, typename Op>
FASTSEQ_INLINE void direct_rows_of(const Op& op, const Real* w, int64_t H, int64_t K, int64_t vector, int rows,
                                   const Real* a, int64_t lda) {
  constexpr int n = kLanes<Real>;
  Vec<Real> sums[kDirectRows][1][kGates * kVectors];
  for (int gate = 0; gate < kGates; ++gate)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t unit = (vector + v) * n;
      const int inside = lanes_inside<Real>(H, unit);
      for (int r = 0; r < rows; ++r)
        sums[r][0][gate * kVectors + v] = dot_rows<Real>(w + (gate * H + unit) * K, inside, K, a + r * lda);
    }
  for (int r = 0; r < rows; ++r) op.finish(sums[r], r);
}
// The sums before activation of a panel of a cell's units, row by row of a, each given to the Op; w [gates * H, K].
template <typename Cell, typename Real, typename Op>
__attribute__((noinline)) void direct_rows(const Op& op, const Real* w, int64_t H, int64_t K, const Panel& panel,
                                           int rows, const Real* a, int64_t lda) {
  if constexpr (Cell::kGates == 1) {
    switch (panel.vectors) {
      case 1:
        return direct_rows_of<1, 1>(op, w, H, K, panel.first, rows, a, lda);
      case 2:
        return direct_rows_of<1, 2>(op, w, H, K, panel.first, rows, a, lda);
      default:
        return direct_rows_of<1, 4>(op, w, H, K, panel.first, rows, a, lda);
    }
  } else {
    direct_rows_of<Cell::kGates, 1>(op, w, H, K, panel.first, rows, a, lda);
  }
}

// As w [gates * H, width] is laid out, where gate g of a begins at a[g * padded].
template <typename Real>
struct DirectColumns {
  const Real* w;
  int64_t gates, H, padded, width;
};

// a W for kRows rows of a and kVectors vectors of columns from `column` on; columns behind the width are zero.
template <int kRows, int kVectors, typename Real>
__attribute__((noinline)) void sum_columns(const DirectColumns<Real>& of, int64_t column, const Real* a, int64_t lda,
                                           Vec<Real>* sums) {
  constexpr int n = kLanes<Real>;
  const bool whole = column + kVectors * n <= of.width;
  Vec<Real> total[kRows][kVectors];
  set_zero<Real>(total);
  for (int64_t gate = 0; gate < of.gates; ++gate)
    for (int64_t first = 0; first < of.H; first += kChain<ALayout::kRows>) {
      const int64_t last = of.H - first < kChain<ALayout::kRows> ? of.H : first + kChain<ALayout::kRows>;
      Vec<Real> acc[kRows][kVectors];
      set_zero<Real>(acc);
      const Real *from = of.w + (gate * of.H + first) * of.width + column, *numbers = a + gate * of.padded + first;
      const auto add = [&](auto load_vector) {
        for (int64_t unit = first; unit < last; ++unit, from += of.width, ++numbers) {
          Vec<Real> row[kVectors];
          FASTSEQ_UNROLL
          for (int v = 0; v < kVectors; ++v) row[v] = load_vector(v);
          FASTSEQ_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const Vec<Real> number = broadcast(numbers[r * lda]);
            FASTSEQ_UNROLL
            for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(number, row[v], acc[r][v]);
          }
        }
      };
      if (whole)
        add([&](int v) { return load(from + v * n); });
      else
        add([&](int v) { return load_part(from + v * n, lanes_inside<Real>(of.width, column + v * n)); });
      FASTSEQ_UNROLL
      for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
      for (int v = 0; v < kVectors; ++v) total[r][v] = total[r][v] + acc[r][v];
    }
  FASTSEQ_UNROLL
  for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
  for (int v = 0; v < kVectors; ++v) sums[r * kVectors + v] = total[r][v];
}

// The same for a panel, row by row of a, each given to the Op; with no a the sums are zero.
template <int kVectors, typename Real, typename Op>
void direct_columns_of(const Op& op, const DirectColumns<Real>& of, int64_t column, int rows, const Real* a,
                       int64_t lda) {
  constexpr int kTogether = kTileRows == 6 ? 4 : 2;  // rows that share what is read of w
  Vec<Real> sums[kDirectRows][1][kVectors];
  if (a) {
    int r = 0;
    for (; r + kTogether <= rows; r += kTogether)
      sum_columns<kTogether, kVectors>(of, column, a + r * lda, lda, sums[r][0]);
    for (; r < rows; ++r) sum_columns<1, kVectors>(of, column, a + r * lda, lda, sums[r][0]);
  }
  for (int r = 0; r < rows; ++r) {
    if (!a) set_zero<Real>(sums[r]);
    op.finish(sums[r], r);
  }
}
template <typename Real, typename Op>
void direct_columns(const Op& op, const DirectColumns<Real>& of, const Panel& panel, int rows, const Real* a,
                    int64_t lda) {
  const int64_t column = panel.first * kLanes<Real>;
  switch (panel.vectors) {
    case 1:
      return direct_columns_of<1>(op, of, column, rows, a, lda);
    case 2:
      return direct_columns_of<2>(op, of, column, rows, a, lda);
    default:
      return direct_columns_of<4>(op, of, column, rows, a, lda);
  }
}

}  // namespace
}  // namespace fastseq
