// Runs every kernel of every instruction set that this machine can run against plain loops in double, without Python.
//
// It is for machines that the test suite does not reach: `make selftest` builds and runs it here, `make selftest-arm64`
// cross-compiles it and runs it under qemu. The bound is wide enough for float rounding and far too narrow for a wrong
// index; the tolerance rule of the library is the Python tests' business.
#include <cstdint>

#include "../cpu/select.h"
#include "compare.h"
#include "selftest_clustering.h"

namespace {

using namespace fastseq;

struct Problem {
  bool lstm, projected, reverse, flags, bias;
  Activation activation;
  int T, B, I, H, P, threads;

  int gates() const { return lstm ? 4 : 1; }
  std::string describe() const {
    char text[160];
    std::snprintf(text, sizeof(text), "%s T=%d B=%d I=%d H=%d P=%d%s%s%s activation=%d threads=%d",
                  lstm ? "lstm" : "rnn", T, B, I, H, P, reverse ? " reverse" : "", flags ? " flags" : "",
                  bias ? "" : " no bias", static_cast<int>(activation), threads);
    return text;
  }
};

struct Data {
  Numbers x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, grad_y, grad_h_n, grad_c_n;
  std::vector<std::uint8_t> flags;
};
struct Results {
  Numbers y, h_n, c_n, dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr;
};

double logistic(double a) { return 1 / (1 + std::exp(-a)); }
double activate(Activation f, double a) {
  return f == Activation::kTanh ? std::tanh(a) : f == Activation::kRelu ? std::max(a, 0.0) : logistic(a);
}
double slope(Activation f, double a) {
  const double h = activate(f, a);
  return f == Activation::kTanh ? 1 - h * h : f == Activation::kRelu ? (a > 0 ? 1 : 0) : h * (1 - h);
}

// One sequence of the batch at a time, one step at a time, straight from the formulas.
Results by_loops(const Problem& p, const Data& d) {
  const int G = p.gates() * p.H;
  Results r;
  r.y.assign(p.T * p.B * p.P, 0), r.h_n.assign(p.B * p.P, 0), r.c_n.assign(p.lstm ? p.B * p.H : 0, 0);
  r.dx.assign(d.x.size(), 0), r.dh0.assign(d.h0.size(), 0), r.dc0.assign(r.c_n.size(), 0);
  r.dw_ih.assign(d.w_ih.size(), 0), r.dw_hh.assign(d.w_hh.size(), 0), r.db.assign(G, 0),
      r.dw_hr.assign(d.w_hr.size(), 0);
  for (int b = 0; b < p.B; ++b) {
    struct Step {
      Numbers h_in, c_in, a, c, m;
    };
    std::vector<Step> tape(p.T);
    Numbers h(d.h0.begin() + b * p.P, d.h0.begin() + (b + 1) * p.P);
    Numbers c = p.lstm ? Numbers(d.c0.begin() + b * p.H, d.c0.begin() + (b + 1) * p.H) : Numbers();
    for (int s = 0; s < p.T; ++s) {
      const int t = p.reverse ? p.T - 1 - s : s;
      const std::uint8_t flag = p.flags ? d.flags[t * p.B + b] : 0;
      Step& step = tape[t];
      if (flag & kFlagPadding) continue;
      if (flag & kFlagReset) std::fill(h.begin(), h.end(), 0.0), std::fill(c.begin(), c.end(), 0.0);
      step.h_in = h, step.c_in = c;
      step.a.assign(G, 0);
      for (int n = 0; n < G; ++n) {
        if (p.bias) step.a[n] = d.b_ih[n] + d.b_hh[n];
        for (int i = 0; i < p.I; ++i) step.a[n] += d.w_ih[n * p.I + i] * d.x[(t * p.B + b) * p.I + i];
        for (int k = 0; k < p.P; ++k) step.a[n] += d.w_hh[n * p.P + k] * h[k];
      }
      step.m.assign(p.H, 0);
      if (p.lstm) {
        step.c.assign(p.H, 0);
        for (int u = 0; u < p.H; ++u) {
          step.c[u] = logistic(step.a[p.H + u]) * c[u] + logistic(step.a[u]) * std::tanh(step.a[2 * p.H + u]);
          step.m[u] = logistic(step.a[3 * p.H + u]) * std::tanh(step.c[u]);
        }
        c = step.c;
      } else {
        for (int u = 0; u < p.H; ++u) step.m[u] = activate(p.activation, step.a[u]);
      }
      if (p.projected) {
        for (int k = 0; k < p.P; ++k) {
          h[k] = 0;
          for (int u = 0; u < p.H; ++u) h[k] += d.w_hr[k * p.H + u] * step.m[u];
        }
      } else {
        h = step.m;
      }
      std::copy(h.begin(), h.end(), r.y.begin() + (t * p.B + b) * p.P);
    }
    std::copy(h.begin(), h.end(), r.h_n.begin() + b * p.P);
    std::copy(c.begin(), c.end(), r.c_n.begin() + b * p.H);

    Numbers dh(d.grad_h_n.begin() + b * p.P, d.grad_h_n.begin() + (b + 1) * p.P);
    Numbers dc = p.lstm ? Numbers(d.grad_c_n.begin() + b * p.H, d.grad_c_n.begin() + (b + 1) * p.H) : Numbers();
    for (int s = p.T - 1; s >= 0; --s) {
      const int t = p.reverse ? p.T - 1 - s : s;
      const std::uint8_t flag = p.flags ? d.flags[t * p.B + b] : 0;
      const Step& step = tape[t];
      if (flag & kFlagPadding) continue;
      for (int k = 0; k < p.P; ++k) dh[k] += d.grad_y[(t * p.B + b) * p.P + k];
      Numbers dm = dh;
      if (p.projected) {
        dm.assign(p.H, 0);
        for (int k = 0; k < p.P; ++k)
          for (int u = 0; u < p.H; ++u) {
            dm[u] += dh[k] * d.w_hr[k * p.H + u];
            r.dw_hr[k * p.H + u] += dh[k] * step.m[u];
          }
      }
      Numbers da(G);
      for (int u = 0; u < p.H; ++u) {
        if (!p.lstm) {
          da[u] = dm[u] * slope(p.activation, step.a[u]);
          continue;
        }
        const double i = logistic(step.a[u]), f = logistic(step.a[p.H + u]), g = std::tanh(step.a[2 * p.H + u]);
        const double o = logistic(step.a[3 * p.H + u]), tanh_c = std::tanh(step.c[u]);
        const double total = dc[u] + dm[u] * o * (1 - tanh_c * tanh_c);
        da[u] = total * g * i * (1 - i);
        da[p.H + u] = total * step.c_in[u] * f * (1 - f);
        da[2 * p.H + u] = total * i * (1 - g * g);
        da[3 * p.H + u] = dm[u] * tanh_c * o * (1 - o);
        dc[u] = flag & kFlagReset ? 0 : total * f;
      }
      std::fill(dh.begin(), dh.end(), 0.0);
      for (int n = 0; n < G; ++n) {
        r.db[n] += da[n];
        for (int i = 0; i < p.I; ++i) {
          r.dx[(t * p.B + b) * p.I + i] += da[n] * d.w_ih[n * p.I + i];
          r.dw_ih[n * p.I + i] += da[n] * d.x[(t * p.B + b) * p.I + i];
        }
        for (int k = 0; k < p.P; ++k) {
          if (!(flag & kFlagReset)) dh[k] += da[n] * d.w_hh[n * p.P + k];
          r.dw_hh[n * p.P + k] += da[n] * step.h_in[k];
        }
      }
    }
    std::copy(dh.begin(), dh.end(), r.dh0.begin() + b * p.P);
    std::copy(dc.begin(), dc.end(), r.dc0.begin() + b * p.H);
  }
  return r;
}

template <typename Real>
Results by_kernels(const KernelTable& table, const Problem& p, const Data& d) {
  const int G = p.gates() * p.H;
  const auto x = as<Real>(d.x), h0 = as<Real>(d.h0), c0 = as<Real>(d.c0), w_ih = as<Real>(d.w_ih);
  const auto w_hh = as<Real>(d.w_hh), b_ih = as<Real>(d.b_ih), b_hh = as<Real>(d.b_hh), w_hr = as<Real>(d.w_hr);
  const auto grad_y = as<Real>(d.grad_y), grad_h_n = as<Real>(d.grad_h_n), grad_c_n = as<Real>(d.grad_c_n);
  auto y = poisoned<Real>(p.T * p.B * p.P), h_n = poisoned<Real>(p.B * p.P), c_n = poisoned<Real>(p.B * p.H);
  auto c = poisoned<Real>(p.T * p.B * tape_width(p.H)), gates = poisoned<Real>(p.T * p.B * gates_width(p.H, p.gates()));
  ForwardParams forward{};
  forward.storage = sizeof(Real) == 8 ? Storage::kFloat64 : Storage::kFloat32;
  forward.activation = p.activation;
  forward.T = p.T, forward.B = p.B, forward.I = p.I, forward.H = p.H, forward.P = p.P;
  forward.x_stride_t = p.B * p.I, forward.x_stride_b = p.I;
  forward.x = x.data(), forward.h0 = h0.data(), forward.c0 = c0.data();
  forward.w_ih = w_ih.data(), forward.w_hh = w_hh.data(), forward.w_hr = p.projected ? w_hr.data() : nullptr;
  forward.b_ih = p.bias ? b_ih.data() : nullptr, forward.b_hh = p.bias ? b_hh.data() : nullptr;
  forward.flags = p.flags ? d.flags.data() : nullptr;
  forward.reverse = p.reverse;
  forward.y = y.data(), forward.h_n = h_n.data(), forward.c_n = c_n.data();
  forward.c = c.data(), forward.gates = gates.data();
  forward.threads = p.threads;
  (p.lstm ? table.lstm_forward : table.rnn_forward)(forward);

  auto dx = poisoned<Real>(x.size()), dh0 = poisoned<Real>(h0.size()), dc0 = poisoned<Real>(p.B * p.H);
  auto dw_ih = poisoned<Real>(w_ih.size()), dw_hh = poisoned<Real>(w_hh.size()), db = poisoned<Real>(G);
  auto dw_hr = poisoned<Real>(w_hr.size());
  BackwardParams backward{};
  backward.storage = forward.storage, backward.activation = p.activation;
  backward.T = p.T, backward.B = p.B, backward.I = p.I, backward.H = p.H, backward.P = p.P;
  backward.x_stride_t = forward.x_stride_t, backward.x_stride_b = forward.x_stride_b;
  backward.grad_y_stride_t = p.B * p.P, backward.grad_y_stride_b = p.P;
  backward.grad_y = grad_y.data(), backward.grad_h_n = grad_h_n.data(), backward.grad_c_n = grad_c_n.data();
  backward.x = x.data(), backward.h0 = h0.data(), backward.c0 = c0.data();
  backward.w_ih = w_ih.data(), backward.w_hh = w_hh.data(), backward.w_hr = forward.w_hr;
  backward.flags = forward.flags, backward.reverse = p.reverse;
  backward.y = y.data(), backward.c = c.data(), backward.gates = gates.data(), backward.dgates = gates.data();
  backward.dx = dx.data(), backward.dh0 = dh0.data(), backward.dc0 = dc0.data();
  backward.dw_ih = dw_ih.data(), backward.dw_hh = dw_hh.data(), backward.db = db.data();
  backward.dw_hr = p.projected ? dw_hr.data() : nullptr;
  backward.threads = p.threads;
  (p.lstm ? table.lstm_backward : table.rnn_backward)(backward);

  return {wide(y),
          wide(h_n),
          p.lstm ? wide(c_n) : Numbers(),
          wide(dx),
          wide(dh0),
          p.lstm ? wide(dc0) : Numbers(),
          wide(dw_ih),
          wide(dw_hh),
          wide(db),
          p.projected ? wide(dw_hr) : Numbers()};
}

template <typename Real>
bool check(const KernelTable& table, const Problem& p, const Data& d, const Results& truth) {
  const double bound = 1000 * static_cast<double>(std::numeric_limits<Real>::epsilon());
  const Results got = by_kernels<Real>(table, p, d);
  bool right = true;
  const auto compare = [&](const char* name, Numbers Results::*member) {
    right = agrees(name, got.*member, truth.*member, bound, p.describe(), table) && right;
  };
  compare("y", &Results::y), compare("h_n", &Results::h_n), compare("c_n", &Results::c_n);
  compare("dx", &Results::dx), compare("dh0", &Results::dh0), compare("dc0", &Results::dc0);
  compare("dw_ih", &Results::dw_ih), compare("dw_hh", &Results::dw_hh), compare("db", &Results::db);
  compare("dw_hr", &Results::dw_hr);
  return right;
}

Problem draw_problem(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  Problem p{};
  p.lstm = below(2), p.reverse = below(2), p.flags = below(2), p.bias = below(4) > 0;
  p.projected = p.lstm && below(3) == 0;
  p.activation = p.lstm ? Activation::kTanh : static_cast<Activation>(below(3));
  p.T = 1 + below(9), p.B = 1 + below(below(2) ? 30 : 4), p.I = 1 + below(40), p.H = 1 + below(below(2) ? 90 : 20);
  p.P = p.projected ? 1 + below(50) : p.H;
  p.threads = 1 + below(4);
  return p;
}

Data draw_data(const Problem& p, std::mt19937& random) {
  const auto draw = [&](int count, double scale) { return draw_normal(random, count, scale); };
  const int G = p.gates() * p.H;
  const double scale = 0.5 / std::sqrt(p.H);
  Data d;
  d.x = draw(p.T * p.B * p.I, 1), d.h0 = draw(p.B * p.P, 1), d.c0 = draw(p.B * p.H, 1);
  d.w_ih = draw(G * p.I, scale), d.w_hh = draw(G * p.P, scale), d.b_ih = draw(G, scale), d.b_hh = draw(G, scale);
  d.w_hr = draw(p.projected ? p.P * p.H : 0, scale);
  d.grad_y = draw(p.T * p.B * p.P, 1), d.grad_h_n = draw(p.B * p.P, 1), d.grad_c_n = draw(p.B * p.H, 1);
  d.flags.assign(p.T * p.B, 0);
  for (int b = 0; p.flags && b < p.B; ++b) {
    const int length = static_cast<int>(random() % static_cast<unsigned>(p.T + 1));
    for (int t = 0; t < p.T; ++t)
      d.flags[t * p.B + b] = t >= length ? kFlagPadding : random() % 4 == 0 ? kFlagReset : std::uint8_t{0};
  }
  return d;
}

}  // namespace

int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::stoi(argv[1]) : 200;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::stoul(argv[2])) : std::random_device{}();
  std::mt19937 random(seed);
  int failed = 0;
  for (int i = 0; i < problems; ++i) {
    const Problem p = draw_problem(random);
    const Data d = draw_data(p, random);
    const Results truth = by_loops(p, d);
    for (const KernelTable* table : runnable_kernels())
      failed += !check<float>(*table, p, d, truth) + !check<double>(*table, p, d, truth);
    const ClusterProblem c = draw_cluster_problem(random);
    const ClusterResults expected = by_loops(c);
    for (const KernelTable* table : runnable_kernels())
      failed += !check<float>(*table, c, expected) + !check<double>(*table, c, expected);
  }
  std::string names;
  for (const KernelTable* table : runnable_kernels()) names += std::string(" ") + table->name;
  std::printf("selftest: %d problems, seed %u, kernels%s: %d mismatches\n", problems, seed, names.c_str(), failed);
  return failed == 0 ? 0 : 1;
}
