// Layer normalisation in the LSTM cell: one row of the batch at a time, forward and backward. The two forms and their
// sources are in fastseq/reference/lstm.py.
//
//   haste:      z = LN(W x) w_x + LN(R h) w_h + b,  c = f c' + i g,               h = o tanh(LN(c) w_c + b_c)
//   torchaudio: z = LN(W x + R h + b) w_z + b_z,    c = LN(f c' + i g) w_c + b_c,  h = o tanh(c)
//
// LN(s) = (s - mean) / sigma, over all 4H sums of a row or its H cells, and from dL/dLN(s) = d follows
// dL/ds = (d - mean(d) - LN(s) mean(d LN(s))) / sigma                                                (Ba et al. 2016)
//
// A row is [gates, width] with H columns that count in each gate; the others are kept out of every sum.
#pragma once

#include "lstm.h"

namespace fastseq {
namespace {

constexpr double kNormEps = 1e-5;

template <int kBy, typename Real, int... kIndex>
FASTSEQ_INLINE Vec<Real> rotated(Vec<Real> v, Indices<kIndex...>) {
  return __builtin_shufflevector(v, v, ((kIndex + kBy) % kLanes<Real>)...);
}
// The sum of all lanes, in every lane.
template <typename Real, int kHalf = kLanes<Real> / 2>
FASTSEQ_INLINE Vec<Real> sum_of_lanes(Vec<Real> v) {
  v = v + rotated<kHalf, Real>(v, typename MakeIndices<kLanes<Real>>::type{});
  if constexpr (kHalf > 1)
    return sum_of_lanes<Real, kHalf / 2>(v);
  else
    return v;
}
template <int kSegments, typename Real>
FASTSEQ_INLINE Vec<Real> sum_of_all(const Vec<Real> (&v)[kSegments]) {
  Vec<Real> sum = v[0];
  FASTSEQ_UNROLL
  for (int s = 1; s < kSegments; ++s) sum = sum + v[s];
  return sum_of_lanes<Real>(sum);
}
// The vector at `column` of H columns, with zeros beyond them.
template <typename Real>
FASTSEQ_INLINE Vec<Real> within(int64_t H, int64_t column, Vec<Real> v) {
  if (column + kLanes<Real> <= H) return v;
  Real lanes[kLanes<Real>];
  store(lanes, v);
  return load_part(lanes, lanes_inside<Real>(H, column));
}

FASTSEQ_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FASTSEQ_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <typename Real>
struct Moments {
  Vec<Real> mean, scale;  // the same in every lane; scale: 1 / sigma
  FASTSEQ_INLINE Vec<Real> normalised(Vec<Real> v) const { return (v - mean) * scale; }
};
// Of kSegments * H numbers, by the mean first and then the squares around it: from sums of squares alone the variance
// would lose its digits where it is small beside the mean.
template <int kSegments, typename Real>
Moments<Real> moments(const Real* row, int64_t width, int64_t H) {
  Vec<Real> sums[kSegments] = {}, squares[kSegments] = {};
  for (int64_t n = 0; n < H; n += kLanes<Real>) FASTSEQ_UNROLL
  for (int s = 0; s < kSegments; ++s) sums[s] = sums[s] + within<Real>(H, n, load(row + s * width + n));
  const Vec<Real> count = broadcast(static_cast<Real>(kSegments * H)), mean = sum_of_all<kSegments, Real>(sums) / count;
  for (int64_t n = 0; n < H; n += kLanes<Real>) FASTSEQ_UNROLL
  for (int s = 0; s < kSegments; ++s) {
    const Vec<Real> from_mean = within<Real>(H, n, load(row + s * width + n) - mean);
    squares[s] = fma(from_mean, from_mean, squares[s]);
  }
  const Vec<Real> variance = sum_of_all<kSegments, Real>(squares) / count;
  return {mean, broadcast(1 / square_root(variance[0] + static_cast<Real>(kNormEps)))};
}

// The two means that the derivative of a normalisation needs, and the derivative.
template <typename Real>
struct MeanGradients {
  Vec<Real> plain = zero<Real>(), weighted = zero<Real>();  // sums of d and of d LN(s), then their means
  FASTSEQ_INLINE void add(Vec<Real> d, Vec<Real> normalised) {
    plain = plain + d;
    weighted = fma(d, normalised, weighted);
  }
  FASTSEQ_INLINE void divide(int64_t count) {
    const Vec<Real> by = broadcast(static_cast<Real>(count));
    plain = sum_of_lanes<Real>(plain) / by, weighted = sum_of_lanes<Real>(weighted) / by;
  }
  FASTSEQ_INLINE Vec<Real> gradient(Vec<Real> d, Vec<Real> normalised, Vec<Real> scale) const {
    return (d - plain - normalised * weighted) * scale;
  }
};

// What is normalised apart: the sums of the input (haste alone) and those of h_{t-1} (torchaudio: the whole sums).
enum Part { kOfInput = 0, kOfHidden = 1, kParts = 2 };

// The learned numbers, in the arithmetic type with zeros beyond H.
template <typename Real>
struct NormWeights {
  bool haste = false;
  int64_t H = 0, width = 0;
  Real *of_gates[kParts] = {}, *gate_bias = nullptr;  // [4, width]; torchaudio has no kOfInput
  Real *of_cell = nullptr, *cell_bias = nullptr;      // [width]
  Real* zeros = nullptr;                              // [4, width]

  void place(Carver& carver, const LayerOptions& options, int64_t units) {
    haste = options.weight_ln_ih != nullptr, H = units, width = tape_width(units);
    if (haste) of_gates[kOfInput] = carver.take<Real>(kGates * width);
    of_gates[kOfHidden] = carver.take<Real>(kGates * width);
    gate_bias = carver.take<Real>(kGates * width);
    of_cell = carver.take<Real>(width), cell_bias = carver.take<Real>(width);
    zeros = carver.take<Real>(kGates * width);
  }
  // `bias`: b_ih + b_hh. Returns what the input projection shall add, which is not haste's bias: it comes after the
  // normalisation.
  Real* fill(Storage storage, const LayerOptions& options, Real* bias) {
    const auto rows = [&](const void* from, Real* to, int64_t count) {
      load_rows<Real>(storage, from, H, to, width, count, H);
    };
    memset(zeros, 0, static_cast<size_t>(kGates * width) * sizeof(Real));
    if (haste) rows(options.weight_ln_ih, of_gates[kOfInput], kGates);
    rows(haste ? options.weight_ln_hh : options.weight_ln_gates, of_gates[kOfHidden], kGates);
    rows(options.weight_ln_c, of_cell, 1), rows(options.bias_ln_c, cell_bias, 1);
    if (!haste) {
      rows(options.bias_ln_gates, gate_bias, kGates);
      return bias;
    }
    memcpy(gate_bias, bias, static_cast<size_t>(kGates * width) * sizeof(Real));
    return zeros;
  }

  // The activated gates of a row from the sums of its input (`x`, for torchaudio with the biases) and of h_{t-1} (`h`).
  // x may be `gates` itself. With kKeep both become their normalised values (torchaudio: h alone, that of all sums)
  // and the first spare column behind them 1 / sigma. Without, torchaudio's h becomes the whole sum.
  template <bool kKeep>
  void activate(Real* x, Real* h, Real* gates) const {
    if (!haste)
      for (int64_t n = 0; n < kGates * width; n += kLanes<Real>) store(h + n, load(x + n) + load(h + n));
    const Moments<Real> of_h = moments<kGates>(h, width, H);
    const Moments<Real> of_x = haste ? moments<kGates>(x, width, H) : Moments<Real>{};
    for (int64_t n = 0; n < width; n += kLanes<Real>) {
      Vec<Real> z[kGates];
      FASTSEQ_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        const int64_t at = gate * width + n;
        const Vec<Real> value = of_h.normalised(load(h + at));
        z[gate] = fma(value, load(of_gates[kOfHidden] + at), load(gate_bias + at));
        if (kKeep) store(h + at, value);
        if (haste) {
          const Vec<Real> of_input = of_x.normalised(load(x + at));
          z[gate] = fma(of_input, load(of_gates[kOfInput] + at), z[gate]);
          if (kKeep) store(x + at, of_input);
        }
      }
      store(gates + kInput * width + n, logistic<Real>(z[kInput]));
      store(gates + kForget * width + n, logistic<Real>(z[kForget]));
      store(gates + kCell * width + n, tanh<Real>(z[kCell]));
      store(gates + kOutput * width + n, logistic<Real>(z[kOutput]));
    }
    if (kKeep) h[kGates * width] = of_h.scale[0];
    if (kKeep && haste) x[kGates * width] = of_x.scale[0];
  }
};

// f c_{t-1} + i g of a row's vector at column n, before and after the clip.
template <typename Real>
struct RawCell {
  Vec<Real> whole, clip;
  FASTSEQ_INLINE RawCell(const Real* gates, int64_t width, int64_t n, Vec<Real> before, Real limit) {
    whole = fma(load(gates + kForget * width + n), before,
                load(gates + kInput * width + n) * load(gates + kCell * width + n));
    clip = limit > 0 ? clipped<Real>(whole, limit) : whole;
  }
};

// c_{t-1} of a row's vector at column n.
template <typename Real>
FASTSEQ_INLINE Vec<Real> cell_before(const CellOptions<Real>& extra, uint8_t flags, const Real* c_before, int64_t n) {
  if (!(flags & kFlagReset)) return load(c_before + n);
  return extra.reset.data ? extra.reset.load(0, static_cast<int>(n / kLanes<Real>)) : zero<Real>();
}

// One row's cell, from its activated gates to c_t and h_t.
template <typename Real>
struct NormCellRow {
  const NormWeights<Real>& norm;
  const Real *gates, *c_before;
  Real* c;
  Real* unprojected;  // o tanh(.) for the projection to read, or null: then `sink` takes it as h
  typename HiddenState<Real, kWithOptions>::Sink sink;
  uint8_t flags;
  CellOptions<Real> extra;
  Real* scratch;  // [width]

  void run() const {
    const int64_t width = norm.width;
    for (int64_t n = 0; n < width; n += kLanes<Real>)
      store(scratch + n, RawCell<Real>(gates, width, n, before(n), extra.clip).clip);
    const Moments<Real> m = moments<1>(scratch, width, norm.H);
    for (int64_t n = 0; n < width; n += kLanes<Real>) {
      const int v = static_cast<int>(n / kLanes<Real>);
      const Vec<Real> raw = load(scratch + n);
      const Vec<Real> seen = fma(m.normalised(raw), load(norm.of_cell + n), load(norm.cell_bias + n));
      const Vec<Real> h = load(gates + kOutput * width + n) * tanh<Real>(seen);
      Vec<Real> now = norm.haste ? raw : seen;
      if (extra.zoneout.is_on()) now = extra.zoneout.mix(0, v, before(n), now);
      if (flags & kFlagPadding) now = before(n);
      store(c + n, now);
      if (unprojected)
        store(unprojected + n, h);
      else
        sink.put_apart(0, v, h);
    }
  }

 private:
  FASTSEQ_INLINE Vec<Real> before(int64_t n) const { return cell_before(extra, flags, c_before, n); }
};

// Where a row adds what it gives to the gradients of the learned numbers: [4, width] or [width]. Null where they are
// not wanted.
template <typename Real>
struct NormSums {
  Real *of_gates[kParts] = {}, *gate_bias = nullptr, *bias = nullptr;  // bias: torchaudio's b_ih + b_hh
  Real *of_cell = nullptr, *cell_bias = nullptr;

  static FASTSEQ_INLINE void add(Real* sum, Vec<Real> value) { store(sum, load(sum) + value); }
};

// One row's derivative: from dL/dh_t, or dL/d(o tanh(.)) with a projection, to the gradients of its sums.
template <typename Real>
struct NormGradRow {
  const NormWeights<Real>& norm;
  const Real* dh;
  Real* gates;  // in: the gates; out: the gradients of the sums of h_{t-1}
  Real* h;      // the normalised sums, as NormWeights::activate left them
  Real* x;      // of the input (haste), which their gradients overwrite
  const Real* c_before;
  Real* dc;           // in: dL/dc_t from step t+1; out: dL/dc_{t-1}
  Real* unprojected;  // o tanh(.) for the projection's weight gradient, or null
  uint8_t flags;
  CellGradOptions<Real> extra;
  NormSums<Real> sums;
  Real *raw, *d_cell;  // scratch, [width]

  void run() const {
    if (flags & kFlagPadding) return pass_by();
    const int64_t width = norm.width;
    for (int64_t n = 0; n < width; n += kLanes<Real>)
      store(raw + n, RawCell<Real>(gates, width, n, before(n), extra.clip).clip);
    const Moments<Real> m = moments<1>(raw, width, norm.H);
    through_cell(m, through_output(m));
    through_gates();
  }

 private:
  FASTSEQ_INLINE Vec<Real> before(int64_t n) const { return cell_before(extra, flags, c_before, n); }
  // dL/dc_t as it is carried, from after and from the tape.
  FASTSEQ_INLINE Vec<Real> carried(int64_t n) const {
    return extra.grad_c ? load(dc + n) + load(extra.grad_c + n) : load(dc + n);
  }
  FASTSEQ_INLINE void share(int64_t n, Vec<Real>* old, Vec<Real>* fresh) const {
    *old = *fresh = carried(n);
    if (extra.zoneout.is_on())
      extra.zoneout.share(0, static_cast<int>(n / kLanes<Real>), old, fresh);
    else
      *old = zero<Real>();
  }
  FASTSEQ_INLINE Vec<Real> arrived(int gate, int64_t n) const {
    return extra.grad_gates ? load(extra.grad_gates + gate * norm.width + n) : zero<Real>();
  }

  // A padded step: its state was carried through, and its sums have no gradient.
  void pass_by() const {
    for (int64_t n = 0; n < norm.width; n += kLanes<Real>) store(dc + n, carried(n));
    memset(gates, 0, static_cast<size_t>(kGates * norm.width) * sizeof(Real));
    if (norm.haste) memset(x, 0, static_cast<size_t>(kGates * norm.width) * sizeof(Real));
    if (unprojected) memset(unprojected, 0, static_cast<size_t>(norm.width) * sizeof(Real));
  }
  // The output gate before activation, and d_cell: the gradient of LN(c).
  MeanGradients<Real> through_output(const Moments<Real>& m) const {
    MeanGradients<Real> means;
    for (int64_t n = 0; n < norm.width; n += kLanes<Real>) {
      Real* output = gates + kOutput * norm.width + n;
      const Vec<Real> value = m.normalised(load(raw + n)), o = load(output), of_cell = load(norm.of_cell + n);
      const Vec<Real> tanh_c = tanh<Real>(fma(value, of_cell, load(norm.cell_bias + n)));
      if (unprojected) store(unprojected + n, o * tanh_c);
      const Vec<Real> dh_n = load(dh + n), dh_o = dh_n * o;
      Vec<Real> d = fma(-(dh_o * tanh_c), tanh_c, dh_o);
      if (!norm.haste) {
        Vec<Real> old, fresh;
        share(n, &old, &fresh);
        d = d + fresh;
      }
      store(output, fma(dh_n, tanh_c, arrived(kOutput, n)) * fma(-o, o, o));
      if (sums.of_cell) {
        NormSums<Real>::add(sums.of_cell + n, d * value);
        NormSums<Real>::add(sums.cell_bias + n, d);
      }
      const Vec<Real> d_value = within<Real>(norm.H, n, d * of_cell);
      means.add(d_value, value);
      store(d_cell + n, d_value);
    }
    means.divide(norm.H);
    return means;
  }
  // The gradients of the other gates before activation, and dL/dc_{t-1}.
  void through_cell(const Moments<Real>& m, const MeanGradients<Real>& means) const {
    const int64_t width = norm.width;
    for (int64_t n = 0; n < width; n += kLanes<Real>) {
      const Vec<Real> i = load(gates + kInput * width + n), f = load(gates + kForget * width + n);
      const Vec<Real> g = load(gates + kCell * width + n), c = before(n);
      Vec<Real> old, fresh;
      share(n, &old, &fresh);
      Vec<Real> d = means.gradient(load(d_cell + n), m.normalised(load(raw + n)), m.scale);
      if (norm.haste) d = d + fresh;
      d = within<Real>(norm.H, n, d);
      if (extra.clip > 0) {
        const RawCell<Real> cell(gates, width, n, c, extra.clip);
        d = magnitude<Real>(cell.whole) > broadcast(extra.clip) ? zero<Real>() : d;
      }
      store(gates + kInput * width + n, fma(d, g, arrived(kInput, n)) * fma(-i, i, i));
      store(gates + kForget * width + n, fma(d, c, arrived(kForget, n)) * fma(-f, f, f));
      const Vec<Real> d_g = fma(d, i, arrived(kCell, n));
      store(gates + kCell * width + n, fma(-(d_g * g), g, d_g));
      Vec<Real> d_before = fma(d, f, old);
      if (flags & kFlagReset) {
        leave_to_reset(n, d_before);
        d_before = zero<Real>();
      }
      store(dc + n, d_before);
    }
  }
  FASTSEQ_INLINE void leave_to_reset(int64_t n, Vec<Real> d) const {
    if (extra.dreset) NormSums<Real>::add(extra.dreset + n, d);
    const int inside = lanes_inside<Real>(extra.reset.width, n);
    if (extra.dreset_step && inside > 0) store_as<Real>(extra.reset.storage, extra.dreset_step, n, d, inside);
  }
  // From the gradients before activation to those of the sums.
  void through_gates() const {
    const int64_t width = norm.width;
    MeanGradients<Real> of_h[kGates], of_x[kGates];
    for (int64_t n = 0; n < width; n += kLanes<Real>) FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t at = gate * width + n;
      const Vec<Real> d = load(gates + at), value = load(h + at);
      of_h[gate].add(d * load(norm.of_gates[kOfHidden] + at), value);
      if (norm.haste) of_x[gate].add(d * load(norm.of_gates[kOfInput] + at), load(x + at));
      if (sums.of_cell) {
        NormSums<Real>::add(sums.of_gates[kOfHidden] + at, d * value);
        NormSums<Real>::add(sums.gate_bias + at, d);
        if (norm.haste) NormSums<Real>::add(sums.of_gates[kOfInput] + at, d * load(x + at));
      }
    }
    const MeanGradients<Real> h_means = of_all(of_h), x_means = norm.haste ? of_all(of_x) : MeanGradients<Real>{};
    const Vec<Real> h_scale = broadcast(h[kGates * width]), x_scale = broadcast(norm.haste ? x[kGates * width] : 0);
    for (int64_t n = 0; n < width; n += kLanes<Real>) FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t at = gate * width + n;
      const Vec<Real> d = load(gates + at);
      const Vec<Real> d_h =
          within<Real>(norm.H, n, h_means.gradient(d * load(norm.of_gates[kOfHidden] + at), load(h + at), h_scale));
      store(gates + at, d_h);
      if (norm.haste)
        store(x + at,
              within<Real>(norm.H, n, x_means.gradient(d * load(norm.of_gates[kOfInput] + at), load(x + at), x_scale)));
      if (sums.bias) NormSums<Real>::add(sums.bias + at, d_h);
    }
  }
  MeanGradients<Real> of_all(const MeanGradients<Real> (&of_gate)[kGates]) const {
    MeanGradients<Real> all;
    FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate)
      all.plain = all.plain + of_gate[gate].plain, all.weighted = all.weighted + of_gate[gate].weighted;
    all.divide(kGates * norm.H);
    return all;
  }
};

}  // namespace
}  // namespace fastseq
