// The LSTM cell on the registers of a tile, and its derivative. Gate order i, f, g, o.
//
//   i, f, o = logistic(.), g = tanh(.), c_t = f c_{t-1} + i g, h_t = o tanh(c_t)        (Hochreiter & Schmidhuber 1997,
//   Gers et al. 2000)
//
// Its options are peepholes, a clip and zoneout of c. The tape keeps c as it is carried; what the output gate saw of it
// before zoneout follows from the gates.
#pragma once

#include "hidden.h"

namespace fastseq {
namespace {

enum Gate { kInput = 0, kForget = 1, kCell = 2, kOutput = 3, kGates = 4 };

// What is added to the cell of a tile, at the tile's first row and column.
template <typename Real>
struct CellOptions {
  const Real* peephole;  // rows of i, f, o, or null
  int64_t peephole_stride;
  Real clip;  // 0: none
  Zoneout<Real> zoneout;
  Rows<Real> reset;

  FASTSEQ_INLINE Vec<Real> peep(int row, int v) const {
    return load(peephole + row * peephole_stride + v * kLanes<Real>);
  }
};

// Of the tile at `row` and `column`, at time t. peephole: [3, width], or null.
template <typename Real>
FASTSEQ_INLINE CellOptions<Real> cell_options(const LayerOptions& options, Storage storage, const Real* peephole,
                                              int64_t width, int64_t t, int64_t B, int64_t H, int64_t row,
                                              int64_t column) {
  return {peephole ? peephole + column : nullptr, width, static_cast<Real>(options.cell_clip),
          zoneout_at<Real>(options.zoneout_c, options.zoneout_c_rate, t * B + row, column, H),
          reset_rows<Real>(options.c_reset, options.c_reset_per_step, storage, t, B, H, row, column)};
}

// The activated gates of a row and c_t before zoneout, from the sums before activation.
template <typename Real, Flags kFlags>
FASTSEQ_INLINE Vec<Real> lstm_gates(Vec<Real> (&z)[kGates], Vec<Real> before,
                                    const WithOptions<kFlags, CellOptions<Real>>& extra) {
  if constexpr (kFlags == kWithOptions)
    if (extra.peephole) {
      z[kInput] = fma(extra.peep(0, 0), before, z[kInput]);
      z[kForget] = fma(extra.peep(1, 0), before, z[kForget]);
    }
  z[kInput] = logistic<Real>(z[kInput]);
  z[kForget] = logistic<Real>(z[kForget]);
  z[kCell] = tanh<Real>(z[kCell]);
  Vec<Real> now = fma(z[kForget], before, z[kInput] * z[kCell]);
  if constexpr (kFlags == kWithOptions) {
    if (extra.clip > 0) now = clipped<Real>(now, extra.clip);
    if (extra.peephole) z[kOutput] = fma(extra.peep(2, 0), now, z[kOutput]);
  }
  z[kOutput] = logistic<Real>(z[kOutput]);
  return now;
}

template <typename Real, Flags kFlags>
struct LstmCellOp {
  static constexpr bool kTall = true;
  using Sink = typename HiddenState<Real, kFlags>::Sink;
  const Real* preactivation;
  int64_t preactivation_stride;  // 0: the bias alone
  Real* gates;                   // where the activated gates go, or null
  int64_t gates_stride, gate_stride;
  const Real* c_before;
  Real* c;
  int64_t c_stride;
  Real* unprojected;  // o tanh(c) for the projection to read, or null: then `sink` takes it as h
  Sink sink;
  const uint8_t* flags;
  WithOptions<kFlags, CellOptions<Real>> extra;

  template <int kRows, int kVectors>
  // The accumulators are those of the tile's rows from `first` on; so in the other Ops.
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    static_assert(kVectors == kGates, "an LSTM panel is four gates of one vector of units");
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kFlags == kWithOptions)
        row_apart(first + r, acc[r][kInput], acc[r][kForget], acc[r][kCell], acc[r][kOutput]);
      else
        row(first + r, acc[r][kInput], acc[r][kForget], acc[r][kCell], acc[r][kOutput]);
    }
  }

 private:
  // Out of line where it is long, or it would be copied into every tile as often as the tile has rows.
  __attribute__((noinline)) void row_apart(int r, Vec<Real> i, Vec<Real> f, Vec<Real> g, Vec<Real> o) const {
    row(r, i, f, g, o);
  }
  FASTSEQ_INLINE void row(int r, Vec<Real> i, Vec<Real> f, Vec<Real> g, Vec<Real> o) const {
    const Real* from = preactivation + r * preactivation_stride;
    Vec<Real> z[kGates] = {i, f, g, o};
    FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) z[gate] = z[gate] + load(from + gate * gate_stride);
    Vec<Real> before = load(c_before + r * c_stride);
    if (kFlags && flags[r] & kFlagReset) before = state_at_reset(r);
    Vec<Real> now = lstm_gates<Real, kFlags>(z, before, extra);
    const Vec<Real> h = z[kOutput] * tanh<Real>(now);
    if constexpr (kFlags == kWithOptions)
      if (extra.zoneout.is_on()) now = extra.zoneout.mix(r, 0, before, now);
    if (kFlags && flags[r] & kFlagPadding) now = before;
    store(c + r * c_stride, now);
    if (gates) {
      Real* to = gates + r * gates_stride;
      FASTSEQ_UNROLL
      for (int gate = 0; gate < kGates; ++gate) store(to + gate * gate_stride, z[gate]);
    }
    if (unprojected)
      store(unprojected + r * c_stride, h);
    else
      sink.put(r, 0, h);
  }
  FASTSEQ_INLINE Vec<Real> state_at_reset([[maybe_unused]] int r) const {
    if constexpr (kFlags == kWithOptions)
      if (extra.reset.data) return extra.reset.load(r, 0);
    return zero<Real>();
  }
};

// The gates of a chunk of time made again: its rows are independent, since h_{t-1} and c_{t-1} are known.
template <typename Real>
struct LstmGatesOp {
  static constexpr bool kTall = false;
  const Real* preactivation;  // may be `gates` itself
  int64_t preactivation_stride;
  Real* gates;
  int64_t gates_stride, gate_stride;
  const Real* c_before;  // rows of this tile, or null without peepholes
  int64_t c_stride;
  CellOptions<Real> extra;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    for (int r = 0; r < kRows; ++r) row(first + r, acc[r][kInput], acc[r][kForget], acc[r][kCell], acc[r][kOutput]);
  }

 private:
  __attribute__((noinline)) void row(int r, Vec<Real> i, Vec<Real> f, Vec<Real> g, Vec<Real> o) const {
    const Real* from = preactivation + r * preactivation_stride;
    Real* to = gates + r * gates_stride;
    Vec<Real> z[kGates] = {i, f, g, o};
    FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) z[gate] = z[gate] + load(from + gate * gate_stride);
    lstm_gates<Real, kWithOptions>(z, c_before ? load(c_before + r * c_stride) : zero<Real>(), extra);
    FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) store(to + gate * gate_stride, z[gate]);
  }
};

// What the derivative of a tile's cell needs beyond CellOptions.
template <typename Real>
struct CellGradOptions : CellOptions<Real> {
  const Real *grad_c, *grad_gates;  // that arrive at the tape, laid out as it, or null
  Real* dpeephole;                  // this batch tile's sums, rows peephole_stride apart, or null
  Real* dreset;                     // [B, width]: the sums of dL/dc_reset where there is one for all steps, or null
  void* dreset_step;                // this step's own row of it, in the user's storage, or null
};

// The derivative of the cell: from dL/dh_t in the accumulators to the gradients of the four gates before activation.
template <typename Real, Flags kFlags>
struct LstmCellGradOp {
  static constexpr bool kTall = true;
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
  WithOptions<kFlags, CellGradOptions<Real>> extra;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    if constexpr (kFlags == kWithOptions) return finish_with_options(acc, first);
    for (int v = 0; v < kVectors; ++v) {
      Vec<Real> sums[kGates] = {zero<Real>(), zero<Real>(), zero<Real>(), zero<Real>()};
      for (int of_acc = 0; of_acc < kRows; ++of_acc) {
        const int r = first + of_acc;
        const int64_t cell = r * c_stride + v * kLanes<Real>;
        const Real* from = gates + r * gates_stride + v * kLanes<Real>;
        const Vec<Real> i = load(from + kInput * gate_stride), f = load(from + kForget * gate_stride);
        const Vec<Real> g = load(from + kCell * gate_stride), o = load(from + kOutput * gate_stride);
        const Vec<Real> tanh_c = tanh<Real>(load(c + cell));
        Vec<Real> before = load(c_before + cell);
        const bool reset = kFlags && flags[r] & kFlagReset, padding = kFlags && flags[r] & kFlagPadding;
        if (reset) before = zero<Real>();
        const Vec<Real> dh = projected ? acc[of_acc][v] : source.at_step(r, v, acc[of_acc][v]);
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
      add_to_bias(v, sums);
    }
  }

 private:
  // A step's rows are added up before they are added to those of the other steps: one chain would be long.
  FASTSEQ_INLINE void add_to_bias(int v, const Vec<Real> (&sums)[kGates]) const {
    if (!db) return;
    FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      Real* sum = db + gate * gate_stride + v * kLanes<Real>;
      store(sum, load(sum) + sums[gate]);
    }
  }
  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish_with_options(const Vec<Real> (&acc)[kRows][kVectors], int first) const {
    for (int v = 0; v < kVectors; ++v) {
      RowSums sums = {};
      for (int r = 0; r < kRows; ++r) row_with_options(first + r, v, acc[r][v], sums);
      add_to_bias(v, sums.gates);
      if (!extra.dpeephole) continue;
      for (int row = 0; row < 3; ++row) {
        Real* sum = extra.dpeephole + row * extra.peephole_stride + v * kLanes<Real>;
        store(sum, load(sum) + sums.peephole[row]);
      }
    }
  }
  struct RowSums {
    Vec<Real> gates[kGates], peephole[3];
  };
  __attribute__((noinline)) void row_with_options(int r, int v, Vec<Real> recurrent, RowSums& sums) const {
    const int64_t column = v * kLanes<Real>, cell = r * c_stride + column;
    const Real* from = gates + r * gates_stride + column;
    const Vec<Real> i = load(from + kInput * gate_stride), f = load(from + kForget * gate_stride);
    const Vec<Real> g = load(from + kCell * gate_stride), o = load(from + kOutput * gate_stride);
    const bool reset = flags[r] & kFlagReset, padding = flags[r] & kFlagPadding;
    Vec<Real> before = load(c_before + cell);
    if (reset) before = extra.reset.data ? extra.reset.load(r, v) : zero<Real>();
    const Vec<Real> whole = fma(f, before, i * g);  // as the forward made it
    const Vec<Real> seen = extra.clip > 0 ? clipped<Real>(whole, extra.clip) : whole;
    const Vec<Real> tanh_c = tanh<Real>(seen);
    const Vec<Real> dh = projected ? recurrent : source.at_step(r, v, recurrent);
    if (unprojected) store(unprojected + cell, o * tanh_c);

    Vec<Real> d_carried = load(dc + cell);
    if (extra.grad_c) d_carried = d_carried + load(extra.grad_c + cell);
    Vec<Real> gradients[kGates] = {zero<Real>(), zero<Real>(), zero<Real>(), zero<Real>()};
    if (!padding) {
      Vec<Real> d_old = d_carried, d_fresh = d_carried;
      if (extra.zoneout.is_on())
        extra.zoneout.share(r, v, &d_old, &d_fresh);
      else
        d_old = zero<Real>();
      const Vec<Real> dh_o = dh * o;
      Vec<Real> d = d_fresh + fma(-(dh_o * tanh_c), tanh_c, dh_o);
      Vec<Real> arrived[kGates] = {zero<Real>(), zero<Real>(), zero<Real>(), zero<Real>()};
      if (extra.grad_gates) {
        FASTSEQ_UNROLL
        for (int gate = 0; gate < kGates; ++gate)
          arrived[gate] = load(extra.grad_gates + r * gates_stride + column + gate * gate_stride);
      }
      gradients[kOutput] = fma(dh, tanh_c, arrived[kOutput]) * fma(-o, o, o);
      if (extra.peephole) d = fma(extra.peep(2, v), gradients[kOutput], d);
      if (extra.clip > 0) d = magnitude<Real>(whole) > broadcast(extra.clip) ? zero<Real>() : d;
      gradients[kInput] = fma(d, g, arrived[kInput]) * fma(-i, i, i);
      gradients[kForget] = fma(d, before, arrived[kForget]) * fma(-f, f, f);
      const Vec<Real> d_g = fma(d, i, arrived[kCell]);
      gradients[kCell] = fma(-(d_g * g), g, d_g);
      d_carried = fma(d, f, d_old);
      if (extra.peephole) {
        d_carried = fma(extra.peep(0, v), gradients[kInput], d_carried);
        d_carried = fma(extra.peep(1, v), gradients[kForget], d_carried);
        sums.peephole[0] = fma(gradients[kInput], before, sums.peephole[0]);
        sums.peephole[1] = fma(gradients[kForget], before, sums.peephole[1]);
        sums.peephole[2] = fma(gradients[kOutput], seen, sums.peephole[2]);
      }
    }
    if (reset) {
      if (extra.dreset) store(extra.dreset + cell, load(extra.dreset + cell) + d_carried);
      const int inside = lanes_inside<Real>(extra.reset.width, column);
      if (extra.dreset_step && inside > 0)
        store_as<Real>(extra.reset.storage, extra.dreset_step, r * extra.reset.stride + column, d_carried, inside);
      d_carried = zero<Real>();
    }
    store(dc + cell, d_carried);
    Real* to = dgates + r * gates_stride + column;
    FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      store(to + gate * gate_stride, gradients[gate]);
      sums.gates[gate] = sums.gates[gate] + gradients[gate];
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
