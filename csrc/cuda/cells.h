// The cells of one step, fused: what lies between two products. A thread takes as many neighbouring units as 16 bytes
// of the layer's dtype hold, so that every access is 16 bytes wide; where rows do not allow it, one unit.
#pragma once

#include "cuda/cell.h"
#include "cuda/number.h"
#include "cuda/params.h"

namespace fastseq::cuda {

constexpr int kCellThreads = 256;

// Neighbouring numbers in float, from memory of a number type and back.
template <typename Number, int kCount>
struct Few {
  float v[kCount];

  FASTSEQ_DEVICE static Few zero() {
    Few few;
    FASTSEQ_UNROLLED
    for (int i = 0; i < kCount; ++i) few.v[i] = 0.0f;
    return few;
  }

  FASTSEQ_DEVICE static Few load(const void* values, std::int64_t at) {
    using Bits = typename Number::Bits;
    const Bits* from = static_cast<const Bits*>(values) + at;
    Few few;
    if constexpr (kCount % Number::kVector == 0) {
      constexpr int kEach = Number::kVector;
      FASTSEQ_UNROLLED
      for (int i = 0; i < kCount; i += kEach) {
        const machine::Words4 words = *reinterpret_cast<const machine::Words4*>(from + i);
        Bits bits[kEach];
        memcpy(bits, &words, sizeof(words));
        FASTSEQ_UNROLLED
        for (int j = 0; j < kEach; ++j) few.v[i + j] = Number::wide(bits[j]);
      }
    } else {
      FASTSEQ_UNROLLED
      for (int i = 0; i < kCount; ++i) few.v[i] = Number::wide(from[i]);
    }
    return few;
  }

  FASTSEQ_DEVICE void store(void* values, std::int64_t at) const {
    using Bits = typename Number::Bits;
    Bits* to = static_cast<Bits*>(values) + at;
    if constexpr (kCount % Number::kVector == 0) {
      constexpr int kEach = Number::kVector;
      FASTSEQ_UNROLLED
      for (int i = 0; i < kCount; i += kEach) {
        Bits bits[kEach];
        FASTSEQ_UNROLLED
        for (int j = 0; j < kEach; ++j) bits[j] = Number::narrow(v[i + j]);
        machine::Words4 words;
        memcpy(&words, bits, sizeof(words));
        *reinterpret_cast<machine::Words4*>(to + i) = words;
      }
    } else {
      FASTSEQ_UNROLLED
      for (int i = 0; i < kCount; ++i) to[i] = Number::narrow(v[i]);
    }
  }

  FASTSEQ_DEVICE Few operator+(const Few& other) const {
    Few sum;
    FASTSEQ_UNROLLED
    for (int i = 0; i < kCount; ++i) sum.v[i] = v[i] + other.v[i];
    return sum;
  }
};

// Where a thread works: a row of the batch and the first of its units, which may lie in the tape's padding.
struct Place {
  std::int64_t row;
  int unit;
  bool inside;  // of the batch
};
template <int kCount>
FASTSEQ_DEVICE Place place_of(const StepSizes& size) {
  const std::int64_t index = static_cast<std::int64_t>(machine::block()) * machine::block_threads() + machine::thread();
  const int across = size.HP / kCount;
  return {index / across, static_cast<int>(index % across) * kCount, index / across < size.B};
}

FASTSEQ_DEVICE std::uint8_t step_flag(const std::uint8_t* flags, std::int64_t row) {
  return flags ? machine::load_constant(flags + row) : std::uint8_t{0};
}

template <typename Number, int kCount>
FASTSEQ_DEVICE Few<Number, kCount> bias_of(const void* b_ih, const void* b_hh, std::int64_t at) {
  using Numbers = Few<Number, kCount>;
  const Numbers ih = b_ih ? Numbers::load(b_ih, at) : Numbers::zero();
  return ih + (b_hh ? Numbers::load(b_hh, at) : Numbers::zero());
}

template <typename Number, int kCount>
FASTSEQ_KERNEL(kCellThreads)
lstm_cell_forward(const FASTSEQ_PARAMETER LstmCellForward p) {
  using Floats = Few<Float32, kCount>;
  using Numbers = Few<Number, kCount>;
  const auto [b, u, inside] = place_of<kCount>(p.size);
  if (!inside) return;
  const int H = p.size.H, HP = p.size.HP;
  if (u >= H) {  // the gates there come from weights that are zero; c has to be written to be finite
    if (p.c_tape) Floats::zero().store(p.c_tape, b * HP + u);
    return;
  }
  const std::int64_t own = b * H + u, tape = b * p.gates_stride + u;
  const std::uint8_t flag = step_flag(p.flags, b), next_flag = step_flag(p.next_flags, b);
  Floats sums[kGates];
  FASTSEQ_UNROLLED
  for (int gate = 0; gate < kGates; ++gate) {
    sums[gate] = Floats::load(p.gates, tape + static_cast<std::int64_t>(gate) * HP);
    const Floats z = Floats::load(p.product, 4 * b * H + static_cast<std::int64_t>(gate) * H + u);
    const Numbers bias = bias_of<Number, kCount>(p.b_ih, p.b_hh, static_cast<std::int64_t>(gate) * H + u);
    FASTSEQ_UNROLLED
    for (int i = 0; i < kCount; ++i) sums[gate].v[i] += z.v[i] + bias.v[i];
  }
  Floats c = Floats::load(p.c_state, own);
  Numbers h = Numbers::load(p.h_state, own), y, next;
  FASTSEQ_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    if (flag & kCut) c.v[i] = h.v[i] = 0.0f;
    const CellForward cell = lstm_cell(sums[0].v[i], sums[1].v[i], sums[2].v[i], sums[3].v[i], c.v[i]);
    sums[0].v[i] = cell.gates.i, sums[1].v[i] = cell.gates.f, sums[2].v[i] = cell.gates.g, sums[3].v[i] = cell.gates.o;
    if (!(flag & kPadding)) c.v[i] = cell.c, h.v[i] = cell.h;
    y.v[i] = flag & kPadding ? 0.0f : h.v[i];
    next.v[i] = next_flag & kCut ? 0.0f : h.v[i];
  }
  c.store(p.c_state, own);
  h.store(p.h_state, own);
  y.store(p.y, own);
  if (p.h_next) next.store(p.h_next, own);
  if (p.c_tape) {
    c.store(p.c_tape, b * HP + u);
    FASTSEQ_UNROLLED
    for (int gate = 0; gate < kGates; ++gate) sums[gate].store(p.gates, tape + static_cast<std::int64_t>(gate) * HP);
  }
}

// What reaches h of this step: from the steps after by way of their product, unless they began anew, past it through
// padding, and from y.
template <typename Number, int kCount>
FASTSEQ_DEVICE Few<Float32, kCount> arriving(const void* grad_y, const float* product, const float* dh_state,
                                             std::int64_t own, std::uint8_t flag, std::uint8_t flag_after) {
  using Floats = Few<Float32, kCount>;
  using Numbers = Few<Number, kCount>;
  Floats dh = Floats::load(dh_state, own);
  if (product && !(flag_after & kCut)) dh = dh + Floats::load(product, own);
  if (grad_y && !(flag & kPadding)) {
    const Numbers dy = Numbers::load(grad_y, own);
    FASTSEQ_UNROLLED
    for (int i = 0; i < kCount; ++i) dh.v[i] += dy.v[i];
  }
  return dh;
}

template <typename Number, int kCount>
FASTSEQ_KERNEL(kCellThreads)
lstm_cell_backward(const FASTSEQ_PARAMETER LstmCellBackward p) {
  using Floats = Few<Float32, kCount>;
  using Numbers = Few<Number, kCount>;
  const auto [b, u, inside] = place_of<kCount>(p.size);
  const int H = p.size.H, HP = p.size.HP;
  if (!inside || u >= H) return;
  const std::int64_t own = b * H + u;
  const std::uint8_t flag = step_flag(p.flags, b), flag_after = step_flag(p.flags_after, b);
  const bool cut = flag & kCut, padding = flag & kPadding;
  Floats gates[kGates];
  FASTSEQ_UNROLLED
  for (int gate = 0; gate < kGates; ++gate)
    gates[gate] = Floats::load(p.gates, b * p.gates_stride + static_cast<std::int64_t>(gate) * HP + u);
  Floats c;
  if (p.c_before) {
    c = Floats::load(p.c_before, b * HP + u);
  } else {
    const Numbers first = Numbers::load(p.c0, own);
    FASTSEQ_UNROLLED
    for (int i = 0; i < kCount; ++i) c.v[i] = first.v[i];
  }
  Floats dh = arriving<Number, kCount>(p.grad_y, p.product, p.dh_state, own, flag, flag_after);
  Floats dc = Floats::load(p.dc_state, own);
  Numbers sums[kGates];
  FASTSEQ_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    CellBackward d = lstm_cell_gradient({gates[0].v[i], gates[1].v[i], gates[2].v[i], gates[3].v[i]},
                                        cut ? 0.0f : c.v[i], dh.v[i], dc.v[i]);
    if (padding) d = {{0.0f, 0.0f, 0.0f, 0.0f}, dc.v[i]};
    sums[0].v[i] = d.sums.i, sums[1].v[i] = d.sums.f, sums[2].v[i] = d.sums.g, sums[3].v[i] = d.sums.o;
    dc.v[i] = cut ? 0.0f : d.c;
    dh.v[i] = padding && !cut ? dh.v[i] : 0.0f;
  }
  FASTSEQ_UNROLLED
  for (int gate = 0; gate < kGates; ++gate)
    sums[gate].store(p.dgates, b * p.dgates_stride + static_cast<std::int64_t>(gate) * H + u);
  dh.store(p.dh_state, own);
  dc.store(p.dc_state, own);
}

template <typename Number, int kCount, Nonlinearity kNonlinearity>
FASTSEQ_KERNEL(kCellThreads)
rnn_cell_forward(const FASTSEQ_PARAMETER RnnCellForward p) {
  using Floats = Few<Float32, kCount>;
  using Numbers = Few<Number, kCount>;
  const auto [b, u, inside] = place_of<kCount>(p.size);
  const int H = p.size.H;
  if (!inside || u >= H) return;  // the tape's padding stays what the projection by zeros has left
  const std::int64_t own = b * H + u, tape = b * p.tape_stride + u;
  const std::uint8_t flag = step_flag(p.flags, b), next_flag = step_flag(p.next_flags, b);
  const Floats x = Floats::load(p.tape, tape), z = Floats::load(p.product, own);
  const Numbers bias = bias_of<Number, kCount>(p.b_ih, p.b_hh, u);
  Floats slope;
  Numbers h = Numbers::load(p.h_state, own), y, next;
  FASTSEQ_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    const Activated found = activate<kNonlinearity>(x.v[i] + z.v[i] + bias.v[i]);
    slope.v[i] = found.slope;
    if (!(flag & kPadding))
      h.v[i] = found.value;
    else if (flag & kCut)
      h.v[i] = 0.0f;
    y.v[i] = flag & kPadding ? 0.0f : h.v[i];
    next.v[i] = next_flag & kCut ? 0.0f : h.v[i];
  }
  h.store(p.h_state, own);
  y.store(p.y, own);
  if (p.h_next) next.store(p.h_next, own);
  if (p.save) slope.store(p.tape, tape);
}

template <typename Number, int kCount>
FASTSEQ_KERNEL(kCellThreads)
rnn_cell_backward(const FASTSEQ_PARAMETER RnnCellBackward p) {
  using Floats = Few<Float32, kCount>;
  using Numbers = Few<Number, kCount>;
  const auto [b, u, inside] = place_of<kCount>(p.size);
  const int H = p.size.H;
  if (!inside || u >= H) return;
  const std::int64_t own = b * H + u;
  const std::uint8_t flag = step_flag(p.flags, b), flag_after = step_flag(p.flags_after, b);
  const bool cut = flag & kCut, padding = flag & kPadding;
  const Floats slope = Floats::load(p.tape, b * p.tape_stride + u);
  Floats dh = arriving<Number, kCount>(p.grad_y, p.product, p.dh_state, own, flag, flag_after);
  Numbers sums;
  FASTSEQ_UNROLLED
  for (int i = 0; i < kCount; ++i) {
    sums.v[i] = padding ? 0.0f : dh.v[i] * slope.v[i];
    dh.v[i] = padding && !cut ? dh.v[i] : 0.0f;
  }
  sums.store(p.dsums, b * p.dsums_stride + u);
  dh.store(p.dh_state, own);
}

}  // namespace fastseq::cuda
