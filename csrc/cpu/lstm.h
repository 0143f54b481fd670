// The LSTM cell on the registers of a tile, and its derivative. Gate order i, f, g, o.
//
//   i, f, o = logistic(.), g = tanh(.), c_t = f c_{t-1} + i g, h_t = o tanh(c_t)        (Hochreiter & Schmidhuber 1997,
//   Gers et al. 2000)
#pragma once

#include "hidden.h"

namespace fastseq {
namespace {

enum Gate { kInput = 0, kForget = 1, kCell = 2, kOutput = 3, kGates = 4 };

template <typename Real, bool kFlags>
struct LstmCellOp {
  using Sink = typename HiddenState<Real, kFlags>::Sink;
  const Real* preactivation;
  Real* gates;  // where the activated gates go, or null
  int64_t gates_stride, gate_stride;
  const Real* c_before;
  Real* c;
  int64_t c_stride;
  Real* unprojected;  // o tanh(c) for the projection to read, or null: then `sink` takes it as h
  Sink sink;
  const uint8_t* flags;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors]) const {
    static_assert(kVectors == kGates, "an LSTM panel is four gates of one vector of units");
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Real* from = preactivation + r * gates_stride;
      const Vec<Real> i = logistic<Real>(acc[r][kInput] + load(from + kInput * gate_stride));
      const Vec<Real> f = logistic<Real>(acc[r][kForget] + load(from + kForget * gate_stride));
      const Vec<Real> g = tanh<Real>(acc[r][kCell] + load(from + kCell * gate_stride));
      const Vec<Real> o = logistic<Real>(acc[r][kOutput] + load(from + kOutput * gate_stride));
      Vec<Real> before = load(c_before + r * c_stride);
      if (kFlags && flags[r] & kFlagReset) before = zero<Real>();
      Vec<Real> now = fma(f, before, i * g);
      const Vec<Real> h = o * tanh<Real>(now);
      if (kFlags && flags[r] & kFlagPadding) now = before;
      store(c + r * c_stride, now);
      if (gates) {
        Real* to = gates + r * gates_stride;
        store(to + kInput * gate_stride, i);
        store(to + kForget * gate_stride, f);
        store(to + kCell * gate_stride, g);
        store(to + kOutput * gate_stride, o);
      }
      if (unprojected)
        store(unprojected + r * c_stride, h);
      else
        sink.put(r, 0, h);
    }
  }
};

// The derivative of the cell: from dL/dh_t in the accumulators to the gradients of the four gates before activation.
template <typename Real, bool kFlags>
struct LstmCellGradOp {
  using Source = typename HiddenGradient<Real, kFlags>::Source;
  bool projected;  // the accumulators hold dL/d(o tanh c) already; else `source` completes dL/dh_t
  Source source;
  const Real* gates;
  Real* dgates;
  int64_t gates_stride, gate_stride;
  const Real *c, *c_before;
  Real* dc;  // in: dL/dc_t from step t+1; out: dL/dc_{t-1}
  int64_t c_stride;
  Real* db;           // this batch tile's sums, gate_stride apart, or null
  Real* unprojected;  // o tanh(c) for the projection's weight gradient, or null
  const uint8_t* flags;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors]) const {
    FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vec<Real> sums[kGates] = {zero<Real>(), zero<Real>(), zero<Real>(), zero<Real>()};
      FASTSEQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int64_t cell = r * c_stride + v * kLanes<Real>;
        const Real* from = gates + r * gates_stride + v * kLanes<Real>;
        const Vec<Real> i = load(from + kInput * gate_stride), f = load(from + kForget * gate_stride);
        const Vec<Real> g = load(from + kCell * gate_stride), o = load(from + kOutput * gate_stride);
        const Vec<Real> tanh_c = tanh<Real>(load(c + cell));
        Vec<Real> before = load(c_before + cell);
        const bool reset = kFlags && flags[r] & kFlagReset, padding = kFlags && flags[r] & kFlagPadding;
        if (reset) before = zero<Real>();
        const Vec<Real> dh = projected ? acc[r][v] : source.at_step(r, v, acc[r][v]);
        if (unprojected) store(unprojected + cell, o * tanh_c);

        const Vec<Real> dh_o = dh * o;
        const Vec<Real> d = load(dc + cell) + fma(-(dh_o * tanh_c), tanh_c, dh_o);
        const Vec<Real> d_i = d * i;
        Vec<Real> gradients[kGates];
        gradients[kInput] = d * g * fma(-i, i, i);
        gradients[kForget] = d * before * fma(-f, f, f);
        gradients[kCell] = fma(-(d_i * g), g, d_i);
        gradients[kOutput] = dh * tanh_c * fma(-o, o, o);
        if (padding) {
          FASTSEQ_UNROLL
          for (int gate = 0; gate < kGates; ++gate) gradients[gate] = zero<Real>();
        } else {
          store(dc + cell, reset ? zero<Real>() : d * f);
        }
        Real* to = dgates + r * gates_stride + v * kLanes<Real>;
        FASTSEQ_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          store(to + gate * gate_stride, gradients[gate]);
          sums[gate] = sums[gate] + gradients[gate];
        }
      }
      if (db) {
        FASTSEQ_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          Real* sum = db + gate * gate_stride + v * kLanes<Real>;
          store(sum, load(sum) + sums[gate]);
        }
      }
    }
  }
};

// A panel of the forward product: the four gates of one vector of units.
struct LstmCell {
  static constexpr int kGates = 4;
  static constexpr bool kHasC = true;
  static PanelRange panels(Range units) { return {units.begin, units.end, true}; }
  template <typename Real>
  static int64_t slot_stride(int64_t width) {
    return width;
  }
  template <typename Real>
  static void pack(Storage storage, const void* w, int64_t H, int64_t K, Range units, Real* to) {
    for (int64_t unit = units.begin; unit < units.end; ++unit) pack_gates<Real>(storage, w, H, K, unit, to);
  }
  template <Chains kChains, typename Real, typename Op>
  static void run(int rows, const Panel&, const Op& op, const Product<Real>& product) {
    run_tile_rows<kGates, kChains, ALayout::kRows, Real>(rows, op, product);
  }
};

}  // namespace
}  // namespace fastseq
