// Runs every kernel of every instruction set that this machine can run against plain loops in double, without Python.
//
// It is for machines that the test suite does not reach: `make selftest` builds and runs it here, `make selftest-arm64`
// cross-compiles it and runs it under qemu. The bound is wide enough for float rounding and far too narrow for a wrong
// index; the tolerance rule of the library is the Python tests' business.
#include <cstdint>

#include "../cpu/select.h"
#include "compare.h"
#include "recurrence_loops.h"
#include "selftest_clustering.h"

namespace {

using namespace fastseq;

// A tensor as a kernel takes it, null where there is none.
template <typename Real>
const Real* given(const std::vector<Real>& values) {
  return values.empty() ? nullptr : values.data();
}
template <typename Real>
Real* given(std::vector<Real>& values) {
  return values.empty() ? nullptr : values.data();
}

// The options of a problem, and the memory that they point to.
template <typename Real>
struct Asked {
  using Vector = std::vector<Real>;
  Vector h_reset, c_reset, h_mask, peephole, of_input, of_hidden, gate_bias, of_cell, cell_bias;
  Vector dh_reset, dc_reset, dh_mask, dpeephole, dof_input, dof_hidden, dgate_bias, dof_cell, dcell_bias;
  LayerOptions options{};

  Asked(const Problem& p, const Data& d)
      : h_reset(as<Real>(d.h_reset)),
        c_reset(as<Real>(d.c_reset)),
        h_mask(as<Real>(d.h_mask)),
        peephole(as<Real>(d.peephole)),
        of_input(as<Real>(d.norm.of_input)),
        of_hidden(as<Real>(d.norm.of_hidden)),
        gate_bias(as<Real>(d.norm.gate_bias)),
        of_cell(as<Real>(d.norm.of_cell)),
        cell_bias(as<Real>(d.norm.cell_bias)),
        // Rows of a reset state that no step takes are left alone.
        dh_reset(p.reset_per_step ? Vector(h_reset.size()) : poisoned<Real>(h_reset.size())),
        dc_reset(p.reset_per_step ? Vector(c_reset.size()) : poisoned<Real>(c_reset.size())),
        dh_mask(poisoned<Real>(h_mask.size())),
        dpeephole(poisoned<Real>(peephole.size())),
        dof_input(poisoned<Real>(of_input.size())),
        dof_hidden(poisoned<Real>(of_hidden.size())),
        dgate_bias(poisoned<Real>(gate_bias.size())),
        dof_cell(poisoned<Real>(of_cell.size())),
        dcell_bias(poisoned<Real>(cell_bias.size())) {
    LayerOptions& o = options;
    o.h_reset = given(h_reset), o.c_reset = given(c_reset), o.h_mask = given(h_mask), o.peephole = given(peephole);
    o.h_reset_per_step = o.c_reset_per_step = p.reset_per_step;
    o.zoneout_h = given(d.zoneout_h), o.zoneout_c = given(d.zoneout_c);
    o.zoneout_h_rate = o.zoneout_c_rate = p.zoneout_rate;
    o.cell_clip = p.cell_clip, o.grad_clip = p.grad_clip;
    const bool haste = p.norm == Norm::kHaste;
    o.weight_ln_ih = given(of_input), o.bias_ln_gates = given(gate_bias);
    (haste ? o.weight_ln_hh : o.weight_ln_gates) = given(of_hidden);
    o.weight_ln_c = given(of_cell), o.bias_ln_c = given(cell_bias);
    o.recompute = p.recompute || p.norm != Norm::kNone;
    o.dh_reset = given(dh_reset), o.dc_reset = given(dc_reset), o.dh_mask = given(dh_mask);
    o.dpeephole = given(dpeephole), o.dweight_ln_ih = given(dof_input), o.dbias_ln_gates = given(dgate_bias);
    (haste ? o.dweight_ln_hh : o.dweight_ln_gates) = given(dof_hidden);
    o.dweight_ln_c = given(dof_cell), o.dbias_ln_c = given(dcell_bias);
  }
};

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
  forward.x = x.data();
  forward.h0 = p.no_states ? nullptr : h0.data(), forward.c0 = p.no_states ? nullptr : c0.data();
  forward.w_ih = w_ih.data(), forward.w_hh = w_hh.data(), forward.w_hr = p.projected ? w_hr.data() : nullptr;
  forward.b_ih = p.bias ? b_ih.data() : nullptr, forward.b_hh = p.bias ? b_hh.data() : nullptr;
  forward.flags = p.flags ? d.flags.data() : nullptr;
  forward.reverse = p.reverse;
  forward.y = y.data(), forward.h_n = h_n.data(), forward.c_n = c_n.data();
  Asked<Real> asked(p, d);
  const bool recompute = asked.options.recompute;
  forward.c = c.data(), forward.gates = recompute ? nullptr : gates.data();
  forward.options = p.optional() ? &asked.options : nullptr;
  forward.any_order = true;
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
  asked.options.b_ih = forward.b_ih, asked.options.b_hh = forward.b_hh;
  backward.options = forward.options;
  if (recompute) backward.gates = backward.dgates = nullptr;
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
          p.projected ? wide(dw_hr) : Numbers(),
          wide(asked.dh_reset),
          wide(asked.dc_reset),
          wide(asked.dh_mask),
          wide(asked.dpeephole),
          {wide(asked.dof_input), wide(asked.dof_hidden), wide(asked.dgate_bias), wide(asked.dof_cell),
           wide(asked.dcell_bias)}};
}

template <typename Real>
bool check(const KernelTable& table, const Problem& p, const Data& d, const Results& truth) {
  const double bound = 1000 * static_cast<double>(std::numeric_limits<Real>::epsilon());
  const Results got = by_kernels<Real>(table, p, d);
  bool right = true;
  const auto compare = [&](const char* name, Numbers Results::*member) {
    right = agrees(name, got.*member, truth.*member, bound, p.describe(), table) && right;
  };
  const auto compare_norm = [&](const char* name, Numbers NormNumbers::*member) {
    right = agrees(name, got.dnorm.*member, truth.dnorm.*member, bound, p.describe(), table) && right;
  };
  compare("y", &Results::y), compare("h_n", &Results::h_n), compare("c_n", &Results::c_n);
  compare("dx", &Results::dx), compare("dh0", &Results::dh0), compare("dc0", &Results::dc0);
  compare("dw_ih", &Results::dw_ih), compare("dw_hh", &Results::dw_hh), compare("db", &Results::db);
  compare("dw_hr", &Results::dw_hr), compare("dh_reset", &Results::dh_reset), compare("dc_reset", &Results::dc_reset);
  compare("dh_mask", &Results::dh_mask), compare("dpeephole", &Results::dpeephole);
  compare_norm("dweight_ln of input", &NormNumbers::of_input);
  compare_norm("dweight_ln of hidden", &NormNumbers::of_hidden);
  compare_norm("dbias_ln_gates", &NormNumbers::gate_bias);
  compare_norm("dweight_ln_c", &NormNumbers::of_cell), compare_norm("dbias_ln_c", &NormNumbers::cell_bias);
  return right;
}

void draw_options(Problem& p, std::mt19937& random) {
  const auto one_of = [&](unsigned n) { return random() % n == 0; };
  p.reset_state = p.flags && one_of(2), p.reset_per_step = p.reset_state && one_of(2);
  p.h_mask = one_of(2), p.recompute = one_of(2);
  p.grad_clip = one_of(3) ? 0.7 : 0;
  if (!p.lstm) return;
  p.norm = one_of(2) ? (one_of(2) ? Norm::kHaste : Norm::kTorchaudio) : Norm::kNone;
  p.peephole = p.norm == Norm::kNone && one_of(2);
  p.zoneout = one_of(3);
  p.zoneout_rate = !p.zoneout && one_of(2) ? 0.25 : 0;
  p.cell_clip = one_of(3) ? 0.4 : 0;
  // Of a few numbers the variance may be next to nothing, and then their normalisation multiplies every rounding.
  if (p.norm != Norm::kNone) p.H += 8, p.P += p.projected ? 0 : 8;
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
  p.no_states = below(4) == 0;
  if (below(2)) draw_options(p, random);
  return p;
}

Data draw_data(const Problem& p, std::mt19937& random) {
  const auto draw = [&](int count, double scale) { return draw_normal(random, count, scale); };
  const int G = p.gates() * p.H;
  const double scale = 0.5 / std::sqrt(p.H);
  Data d;
  d.x = draw(p.T * p.B * p.I, 1), d.h0 = draw(p.B * p.P, p.no_states ? 0 : 1);
  d.c0 = draw(p.B * p.H, p.no_states ? 0 : 1);
  d.w_ih = draw(G * p.I, scale), d.w_hh = draw(G * p.P, scale), d.b_ih = draw(G, scale), d.b_hh = draw(G, scale);
  d.w_hr = draw(p.projected ? p.P * p.H : 0, scale);
  d.grad_y = draw(p.T * p.B * p.P, 1), d.grad_h_n = draw(p.B * p.P, 1), d.grad_c_n = draw(p.B * p.H, 1);
  d.flags.assign(p.T * p.B, 0);
  for (int b = 0; p.flags && b < p.B; ++b) {
    const int length = static_cast<int>(random() % static_cast<unsigned>(p.T + 1));
    for (int t = 0; t < p.T; ++t)
      d.flags[t * p.B + b] = t >= length ? kFlagPadding : random() % 4 == 0 ? kFlagReset : std::uint8_t{0};
  }
  const int reset_rows = p.reset_state ? (p.reset_per_step ? p.T : 1) * p.B : 0;
  d.h_reset = draw(reset_rows * p.P, 1), d.c_reset = draw(p.lstm ? reset_rows * p.H : 0, 1);
  d.peephole = draw(p.peephole ? 3 * p.H : 0, 0.5);
  d.h_mask = draw(p.h_mask ? p.B * p.P : 0, 1);
  for (double& m : d.h_mask) m = m > 0 ? 1.25 : 0;
  for (auto [mask, width] : {std::pair{&d.zoneout_h, p.P}, {&d.zoneout_c, p.H}}) {
    mask->resize(p.zoneout ? p.T * p.B * width : 0);
    for (std::uint8_t& keep : *mask) keep = random() % 3 == 0;
  }
  d.norm.of_input = draw(p.norm == Norm::kHaste ? G : 0, 0.5);
  d.norm.of_hidden = draw(p.norm != Norm::kNone ? G : 0, 0.5);
  d.norm.gate_bias = draw(p.norm == Norm::kTorchaudio ? G : 0, 0.5);
  d.norm.of_cell = draw(p.norm != Norm::kNone ? p.H : 0, 1), d.norm.cell_bias = draw(d.norm.of_cell.size(), 0.5);
  return d;
}

}  // namespace

int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::stoi(argv[1]) : 200;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::stoul(argv[2])) : std::random_device{}();
  std::mt19937 random(seed);
  int failed = 0;
  for (int i = 0; i < problems; ++i) {
    Problem p = draw_problem(random);
    const Data d = draw_data(p, random);
    Results truth = by_loops(p, d);
    while (truth.margin < 1e-5) p.cell_clip *= 1.01, truth = by_loops(p, d);
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
