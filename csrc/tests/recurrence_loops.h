// A recurrent layer and its gradients by plain loops in double, one sequence and one step at a time, straight from the
// formulas of fastseq/reference/, with every option.
#pragma once

#include <cstdint>

#include "compare.h"

namespace fastseq {

enum class Norm { kNone, kHaste, kTorchaudio };

struct Problem {
  bool lstm, projected, reverse, flags, bias;
  Activation activation;
  int T, B, I, H, P, threads;
  bool no_states;  // h0 and c0 are zeros, and not given
  // Options.
  bool reset_state, reset_per_step, h_mask, zoneout, peephole, recompute;
  double zoneout_rate, cell_clip, grad_clip;  // 0: none; a rate is for both states, in place of masks
  Norm norm;

  int gates() const { return lstm ? 4 : 1; }
  bool optional() const {
    return reset_state || h_mask || zoneout || zoneout_rate > 0 || peephole || recompute || cell_clip > 0 ||
           grad_clip > 0 || norm != Norm::kNone;
  }
  std::string describe() const {
    char text[160];
    std::snprintf(text, sizeof(text), "%s T=%d B=%d I=%d H=%d P=%d%s%s%s activation=%d threads=%d",
                  lstm ? "lstm" : "rnn", T, B, I, H, P, reverse ? " reverse" : "", flags ? " flags" : "",
                  bias ? "" : " no bias", static_cast<int>(activation), threads);
    std::string all = text;
    const auto add = [&](bool there, const char* name) { all += there ? std::string(" ") + name : std::string(); };
    add(reset_state, reset_per_step ? "reset states" : "reset state"), add(h_mask, "h_mask"), add(zoneout, "zoneout");
    add(zoneout_rate > 0, "zoneout by rate"), add(peephole, "peephole"), add(cell_clip > 0, "cell_clip");
    add(grad_clip > 0, "grad_clip"), add(recompute, "recompute"), add(no_states, "no states");
    add(norm == Norm::kHaste, "haste"), add(norm == Norm::kTorchaudio, "torchaudio");
    return all;
  }
};

// Weights of layer normalisation: those of the gates by which part they scale (haste: the input's and h's sums;
// torchaudio: of all sums, in the second), torchaudio's bias, and the cell's.
struct NormNumbers {
  Numbers of_input, of_hidden, gate_bias, of_cell, cell_bias;
};
struct Data {
  Numbers x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, grad_y, grad_h_n, grad_c_n;
  std::vector<std::uint8_t> flags;
  Numbers h_reset, c_reset, h_mask, peephole;
  std::vector<std::uint8_t> zoneout_h, zoneout_c;
  NormNumbers norm;
};
struct Results {
  Numbers y, h_n, c_n, dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr;
  Numbers dh_reset, dc_reset, dh_mask, dpeephole;
  NormNumbers dnorm;
  double margin = 1;  // how far |c| was from the clip at the least: a kernel's rounding must not cross it
};

inline double logistic(double a) { return 1 / (1 + std::exp(-a)); }
inline double activate(Activation f, double a) {
  return f == Activation::kTanh ? std::tanh(a) : f == Activation::kRelu ? std::max(a, 0.0) : logistic(a);
}
inline double slope(Activation f, double a) {
  const double h = activate(f, a);
  return f == Activation::kTanh ? 1 - h * h : f == Activation::kRelu ? (a > 0 ? 1 : 0) : h * (1 - h);
}
inline double clamp(double x, double limit) { return limit > 0 ? std::min(std::max(x, -limit), limit) : x; }

struct Normalised {
  Numbers value;
  double scale = 1;

  Normalised() = default;
  explicit Normalised(const Numbers& sums) : value(sums) {
    double mean = 0, variance = 0;
    for (const double s : sums) mean += s / sums.size();
    for (const double s : sums) variance += (s - mean) * (s - mean) / sums.size();
    scale = 1 / std::sqrt(variance + 1e-5);
    for (double& v : value) v = (v - mean) * scale;
  }
  // From dL/d(value weight) to dL/dsums; adds to the gradient of the weight.
  Numbers back(const Numbers& d, const Numbers& weight, Numbers& dweight) const {
    Numbers out(d.size());
    double mean = 0, weighted = 0;
    for (std::size_t n = 0; n < d.size(); ++n) {
      dweight[n] += d[n] * value[n];
      out[n] = d[n] * weight[n];
      mean += out[n] / d.size(), weighted += out[n] * value[n] / d.size();
    }
    for (std::size_t n = 0; n < d.size(); ++n) out[n] = (out[n] - mean - value[n] * weighted) * scale;
    return out;
  }
};

// One sequence of the batch.
class Sequence {
 public:
  Sequence(const Problem& problem, const Data& data, int b, Results& results)
      : p(problem), d(data), r(results), b_(b), G(problem.gates() * problem.H), tape(problem.T) {}

  void forward() {
    Numbers h(d.h0.begin() + b_ * p.P, d.h0.begin() + (b_ + 1) * p.P);
    Numbers c = p.lstm ? Numbers(d.c0.begin() + b_ * p.H, d.c0.begin() + (b_ + 1) * p.H) : Numbers();
    for (int s = 0; s < p.T; ++s) {
      const int t = time(s);
      if (flag(t) & kFlagPadding) continue;
      if (flag(t) & kFlagReset) reset(t, h, c);
      step(t, h, c);
      std::copy(h.begin(), h.end(), r.y.begin() + row(t) * p.P);
    }
    std::copy(h.begin(), h.end(), r.h_n.begin() + b_ * p.P);
    std::copy(c.begin(), c.end(), r.c_n.begin() + b_ * p.H);
  }
  void backward() {
    Numbers dh(d.grad_h_n.begin() + b_ * p.P, d.grad_h_n.begin() + (b_ + 1) * p.P);
    Numbers dc = p.lstm ? Numbers(d.grad_c_n.begin() + b_ * p.H, d.grad_c_n.begin() + (b_ + 1) * p.H) : Numbers();
    for (int s = p.T - 1; s >= 0; --s) {
      const int t = time(s);
      if (flag(t) & kFlagPadding) continue;
      for (int k = 0; k < p.P; ++k) dh[k] = clamp(dh[k] + d.grad_y[row(t) * p.P + k], p.grad_clip);
      step_back(t, dh, dc);
      if (flag(t) & kFlagReset) reset_back(t, dh, dc);
    }
    std::copy(dh.begin(), dh.end(), r.dh0.begin() + b_ * p.P);
    std::copy(dc.begin(), dc.end(), r.dc0.begin() + b_ * p.H);
  }

 private:
  struct Step {
    Numbers h_in, h_masked, c_in, a, gates, whole, m;
    Normalised of_input, of_hidden, of_cell;
    Numbers seen;  // what tanh is taken of
  };

  int time(int s) const { return p.reverse ? p.T - 1 - s : s; }
  int row(int t) const { return t * p.B + b_; }
  std::uint8_t flag(int t) const { return p.flags ? d.flags[row(t)] : std::uint8_t{0}; }
  int reset_row(int t) const { return p.reset_per_step ? row(t) : b_; }

  void reset(int t, Numbers& h, Numbers& c) const {
    for (int k = 0; k < p.P; ++k) h[k] = p.reset_state ? d.h_reset[reset_row(t) * p.P + k] : 0;
    for (std::size_t u = 0; u < c.size(); ++u) c[u] = p.reset_state ? d.c_reset[reset_row(t) * p.H + u] : 0;
  }
  void reset_back(int t, Numbers& dh, Numbers& dc) {
    for (int k = 0; p.reset_state && k < p.P; ++k) r.dh_reset[reset_row(t) * p.P + k] += dh[k];
    for (std::size_t u = 0; p.reset_state && u < dc.size(); ++u) r.dc_reset[reset_row(t) * p.H + u] += dc[u];
    std::fill(dh.begin(), dh.end(), 0.0), std::fill(dc.begin(), dc.end(), 0.0);
  }
  // How much of the old state a step keeps.
  double kept(const std::vector<std::uint8_t>& mask, int index) const {
    return p.zoneout ? mask[index] : p.zoneout_rate;
  }

  void step(int t, Numbers& h, Numbers& c) {
    Step& s = tape[t];
    s.h_in = h, s.h_masked = h, s.c_in = c;
    for (int k = 0; p.h_mask && k < p.P; ++k) s.h_masked[k] *= d.h_mask[b_ * p.P + k];
    Numbers wx(G, 0), rh(G, 0), bias(G, 0);
    for (int n = 0; n < G; ++n) {
      if (p.bias) bias[n] = d.b_ih[n] + d.b_hh[n];
      for (int i = 0; i < p.I; ++i) wx[n] += d.w_ih[n * p.I + i] * d.x[row(t) * p.I + i];
      for (int k = 0; k < p.P; ++k) rh[n] += d.w_hh[n * p.P + k] * s.h_masked[k];
    }
    s.a.assign(G, 0);
    for (int n = 0; n < G; ++n) s.a[n] = wx[n] + rh[n] + bias[n];
    if (p.norm == Norm::kHaste) s.of_input = Normalised(wx), s.of_hidden = Normalised(rh);
    if (p.norm == Norm::kTorchaudio) s.of_hidden = Normalised(s.a);
    for (int n = 0; n < G && p.norm != Norm::kNone; ++n) {
      s.a[n] = s.of_hidden.value[n] * d.norm.of_hidden[n];
      s.a[n] += p.norm == Norm::kHaste ? s.of_input.value[n] * d.norm.of_input[n] + bias[n] : d.norm.gate_bias[n];
    }
    if (p.lstm)
      cell(s, c);
    else
      for (int u = 0; u < p.H; ++u) s.m.push_back(activate(p.activation, s.a[u]));
    Numbers fresh = s.m;
    if (p.projected) {
      fresh.assign(p.P, 0);
      for (int k = 0; k < p.P; ++k)
        for (int u = 0; u < p.H; ++u) fresh[k] += d.w_hr[k * p.H + u] * s.m[u];
    }
    for (int k = 0; k < p.P; ++k) {
      const double keep = kept(d.zoneout_h, row(t) * p.P + k);
      h[k] = keep * s.h_in[k] + (1 - keep) * fresh[k];
    }
    for (std::size_t u = 0; u < c.size(); ++u) {
      const double keep = kept(d.zoneout_c, row(t) * p.H + static_cast<int>(u));
      c[u] = keep * s.c_in[u] + (1 - keep) * c[u];
    }
  }
  // c becomes the fresh cell.
  void cell(Step& s, Numbers& c) {
    const int H = p.H;
    Numbers clipped(H);
    s.whole.assign(H, 0), s.gates.assign(G, 0), s.m.assign(H, 0);
    for (int u = 0; u < H; ++u) {
      for (int gate = 0; gate < 2 && p.peephole; ++gate) s.a[gate * H + u] += d.peephole[gate * H + u] * c[u];
      const double i = s.gates[u] = logistic(s.a[u]), f = s.gates[H + u] = logistic(s.a[H + u]);
      const double g = s.gates[2 * H + u] = std::tanh(s.a[2 * H + u]);
      s.whole[u] = f * c[u] + i * g;
      clipped[u] = clamp(s.whole[u], p.cell_clip);
      if (p.cell_clip > 0) r.margin = std::min(r.margin, std::abs(std::abs(s.whole[u]) - p.cell_clip));
    }
    s.seen = clipped;
    if (p.norm != Norm::kNone) s.of_cell = Normalised(clipped);
    for (int u = 0; u < H && p.norm != Norm::kNone; ++u)
      s.seen[u] = s.of_cell.value[u] * d.norm.of_cell[u] + d.norm.cell_bias[u];
    c = p.norm == Norm::kTorchaudio ? s.seen : clipped;
    for (int u = 0; u < H; ++u) {
      if (p.peephole) s.a[3 * H + u] += d.peephole[2 * H + u] * c[u];
      s.m[u] = (s.gates[3 * H + u] = logistic(s.a[3 * H + u])) * std::tanh(s.seen[u]);
    }
  }

  // dh: in dL/dh_t as it was carried, out dL/dh_{t-1}; dc likewise.
  void step_back(int t, Numbers& dh, Numbers& dc) {
    const Step& s = tape[t];
    Numbers old = dh, dm = dh;
    for (int k = 0; k < p.P; ++k) {
      const double keep = kept(d.zoneout_h, row(t) * p.P + k);
      old[k] *= keep, dm[k] *= 1 - keep;
    }
    if (p.projected) {
      const Numbers fresh = dm;
      dm.assign(p.H, 0);
      for (int k = 0; k < p.P; ++k)
        for (int u = 0; u < p.H; ++u) {
          dm[u] += fresh[k] * d.w_hr[k * p.H + u];
          r.dw_hr[k * p.H + u] += fresh[k] * s.m[u];
        }
    }
    Numbers da(G);
    if (p.lstm)
      cell_back(t, dm, dc, da);
    else
      for (int u = 0; u < p.H; ++u) da[u] = dm[u] * slope(p.activation, s.a[u]);
    Numbers dwx = da, drh = da, db = da;
    if (p.norm != Norm::kNone) drh = s.of_hidden.back(da, d.norm.of_hidden, r.dnorm.of_hidden);
    if (p.norm == Norm::kHaste) dwx = s.of_input.back(da, d.norm.of_input, r.dnorm.of_input);
    if (p.norm == Norm::kTorchaudio) {
      dwx = db = drh;
      for (int n = 0; n < G; ++n) r.dnorm.gate_bias[n] += da[n];
    }
    dh = old;
    for (int n = 0; n < G; ++n) {
      r.db[n] += db[n];
      for (int i = 0; i < p.I; ++i) {
        r.dx[row(t) * p.I + i] += dwx[n] * d.w_ih[n * p.I + i];
        r.dw_ih[n * p.I + i] += dwx[n] * d.x[row(t) * p.I + i];
      }
      for (int k = 0; k < p.P; ++k) {
        const double through = drh[n] * d.w_hh[n * p.P + k];
        r.dw_hh[n * p.P + k] += drh[n] * s.h_masked[k];
        dh[k] += p.h_mask ? through * d.h_mask[b_ * p.P + k] : through;
        if (p.h_mask) r.dh_mask[b_ * p.P + k] += through * s.h_in[k];
      }
    }
  }
  void cell_back(int t, const Numbers& dm, Numbers& dc, Numbers& da) {
    const Step& s = tape[t];
    const int H = p.H;
    Numbers fresh = dc, d_seen(H);
    for (int u = 0; u < H; ++u) {
      const double keep = kept(d.zoneout_c, row(t) * H + u), o = s.gates[3 * H + u], tanh_c = std::tanh(s.seen[u]);
      fresh[u] *= 1 - keep, dc[u] *= keep;
      d_seen[u] = dm[u] * o * (1 - tanh_c * tanh_c);
      da[3 * H + u] = dm[u] * tanh_c * o * (1 - o);
      if (p.peephole) {
        d_seen[u] += da[3 * H + u] * d.peephole[2 * H + u];
        r.dpeephole[2 * H + u] += da[3 * H + u] * s.seen[u];
      }
      if (p.norm != Norm::kHaste) d_seen[u] += fresh[u];
    }
    if (p.norm != Norm::kNone) {
      for (int u = 0; u < H; ++u) r.dnorm.cell_bias[u] += d_seen[u];
      d_seen = s.of_cell.back(d_seen, d.norm.of_cell, r.dnorm.of_cell);
      for (int u = 0; u < H && p.norm == Norm::kHaste; ++u) d_seen[u] += fresh[u];
    }
    for (int u = 0; u < H; ++u) {
      const double total = p.cell_clip > 0 && std::abs(s.whole[u]) > p.cell_clip ? 0 : d_seen[u];
      const double i = s.gates[u], f = s.gates[H + u], g = s.gates[2 * H + u];
      da[u] = total * g * i * (1 - i);
      da[H + u] = total * s.c_in[u] * f * (1 - f);
      da[2 * H + u] = total * i * (1 - g * g);
      dc[u] += total * f;
      for (int gate = 0; gate < 2 && p.peephole; ++gate) {
        dc[u] += da[gate * H + u] * d.peephole[gate * H + u];
        r.dpeephole[gate * H + u] += da[gate * H + u] * s.c_in[u];
      }
    }
  }

  const Problem& p;
  const Data& d;
  Results& r;
  int b_, G;
  std::vector<Step> tape;
};

inline Results by_loops(const Problem& p, const Data& d) {
  Results r;
  const auto like = [](const Numbers& from) { return Numbers(from.size(), 0.0); };
  r.y = Numbers(p.T * p.B * p.P, 0.0), r.h_n = like(d.h0), r.c_n = Numbers(p.lstm ? p.B * p.H : 0, 0.0);
  r.dx = like(d.x), r.dh0 = like(d.h0), r.dc0 = like(r.c_n), r.dw_ih = like(d.w_ih), r.dw_hh = like(d.w_hh);
  r.db = Numbers(p.gates() * p.H, 0.0), r.dw_hr = like(d.w_hr);
  r.dh_reset = like(d.h_reset), r.dc_reset = like(d.c_reset), r.dh_mask = like(d.h_mask);
  r.dpeephole = like(d.peephole);
  r.dnorm = {like(d.norm.of_input), like(d.norm.of_hidden), like(d.norm.gate_bias), like(d.norm.of_cell),
             like(d.norm.cell_bias)};
  for (int b = 0; b < p.B; ++b) {
    Sequence sequence(p, d, b, r);
    sequence.forward();
    sequence.backward();
  }
  return r;
}

}  // namespace fastseq
