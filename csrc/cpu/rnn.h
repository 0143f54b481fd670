// The Elman cell on the registers of a tile, and its derivative: h_t = f(a_t), a_t = U x_t + W h_{t-1} + b (Elman
// 1990).
//
// The tape is f'(a_t). Made from a_t it keeps its relative accuracy where f saturates, and half-type h would not tell
// it.
#pragma once

#include "hidden.h"

namespace fastseq {
namespace {

template <typename Real, Flags kFlags>
struct ElmanCellOp {
  static constexpr bool kTall = true;
  Activation activation;
  const Real* preactivation;
  int64_t preactivation_stride;  // 0: the bias alone
  Real* slopes;                  // or null: no tape is kept
  int64_t stride;
  typename HiddenState<Real, kFlags>::Sink sink;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kFlags == kWithOptions)
          vector_apart(first + r, v, acc[r][v]);
        else
          vector(first + r, v, acc[r][v]);
      }
  }

 private:
  // Out of line where it is long, or it would be copied into every tile for each of its vectors.
  __attribute__((noinline)) void vector_apart(int r, int v, Vec<Real> product) const { vector(r, v, product); }
  FASTSEQ_INLINE void vector(int r, int v, Vec<Real> product) const {
    const int64_t column = v * kLanes<Real>;
    Vec<Real> slope;
    sink.put(r, v,
             activate<Real>(activation, product + load(preactivation + r * preactivation_stride + column), &slope));
    if (slopes) store(slopes + r * stride + column, slope);
  }
};

// The slopes of a chunk of time made again: its rows are independent, since h_{t-1} is known.
template <typename Real>
struct ElmanSlopesOp {
  static constexpr bool kTall = false;
  Activation activation;
  const Real* preactivation;  // may be `slopes` itself
  int64_t preactivation_stride;
  Real* slopes;
  int64_t stride;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) vector(first + r, v, acc[r][v]);
  }

 private:
  __attribute__((noinline)) void vector(int r, int v, Vec<Real> product) const {
    const int64_t column = v * kLanes<Real>;
    Vec<Real> slope;
    activate<Real>(activation, product + load(preactivation + r * preactivation_stride + column), &slope);
    store(slopes + r * stride + column, slope);
  }
};

template <typename Real, Flags kFlags>
struct ElmanGradOp {
  static constexpr bool kTall = true;
  typename HiddenGradient<Real, kFlags>::Source source;
  const Real* slopes;
  Real* dgates;  // may be `slopes` itself
  int64_t stride;
  Real* db;  // this batch tile's sums, or null

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    for (int v = 0; v < kVectors; ++v) {
      Vec<Real> sum = zero<Real>();
      for (int r = 0; r < kRows; ++r) {
        // On padding the source gives zero, and with it this step's gradient is zero.
        const int64_t at = (first + r) * stride + v * kLanes<Real>;
        const Vec<Real> gradient = source.at_step_of_tile(first + r, v, acc[r][v]) * load(slopes + at);
        store(dgates + at, gradient);
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
