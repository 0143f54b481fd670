// The Elman cell's derivative on the registers of a tile: h_t = f(a_t), a_t = U x_t + W h_{t-1} + b. Every f here tells
// f'(a) from h = f(a), so that y is the whole tape. The forward cell is HiddenOp.
#pragma once

#include "hidden.h"

namespace fastseq {
namespace {

template <typename Real, bool kFlags>
struct ElmanGradOp {
  Activation activation;
  Storage storage;
  typename HiddenGradient<Real, kFlags>::Source source;
  const void* y;
  int64_t y_stride, y_columns;
  Real* dgates;
  int64_t dgates_stride;
  Real* db;  // this batch tile's sums, or null

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void begin(Vec<Real> (&acc)[kRows][kVectors]) const {
    set_zero<Real>(acc);
  }
  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors]) const {
    FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int inside = lanes_inside<Real>(y_columns, v * kLanes<Real>);
      Vec<Real> sum = zero<Real>();
      FASTSEQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // On padding the source gives zero, and with it this step's gradient is zero.
        const Vec<Real> dh = source.at_step(r, v, acc[r][v]);
        const Vec<Real> h = inside ? load_as<Real>(storage, y, r * y_stride + v * kLanes<Real>, inside) : zero<Real>();
        const Vec<Real> gradient = dh * activation_slope<Real>(activation, h);
        store(dgates + r * dgates_stride + v * kLanes<Real>, gradient);
        sum = sum + gradient;
      }
      if (db) store(db + v * kLanes<Real>, load(db + v * kLanes<Real>) + sum);
    }
  }
};

// A panel of the forward product: up to four vectors of units.
struct ElmanCell {
  static constexpr int kGates = 1;
  static constexpr bool kHasC = false;
  static PanelRange panels(Range units) { return {units.begin, units.end}; }
  template <typename Real>
  static int64_t slot_stride(int64_t) {
    return kLanes<Real>;
  }
  template <typename Real>
  static void pack(Storage storage, const void* w, int64_t H, int64_t K, Range units, Real* to) {
    pack_transposed<Real>(storage, w, H, K, panels(units), to);
  }
  template <Chains kChains, typename Real, typename Op>
  static void run(int rows, const Panel& panel, const Op& op, const Product<Real>& product) {
    run_tile<kChains, ALayout::kRows, Real>(rows, panel.vectors, op, product);
  }
};

}  // namespace
}  // namespace fastseq
