// The arithmetic of the cells, for one number each, in float (kernels/lstm.py and kernels/rnn.py have the same).
#pragma once

#include <cmath>

#include "cuda/machine.h"

namespace fastseq::cuda {

// 1 / (1 + e^-x). e^-x may overflow to infinity, whose reciprocal is the 0 that is meant.
FASTSEQ_DEVICE float logistic(float x) { return machine::reciprocal(1.0f + machine::exponential(-x)); }

// 1 - 2 / (e^(2|x|) + 1) with the sign of x; near zero, where that cancels, x + x^3 P(x^2) (Moshier 1989).
FASTSEQ_DEVICE float hyperbolic_tangent(float x) {
  const float far = 1.0f - 2.0f * machine::reciprocal(machine::exponential(2.0f * fabsf(x)) + 1.0f);
  const float z = x * x;
  float p = -5.70498872745e-3f * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return fabsf(x) < 0.625f ? x + x * z * p : copysignf(far, x);
}

struct Gates {
  float i, f, g, o;
};

// The gates after activation from their sums, and the new cell state and h, before rounding, from the old cell state.
struct CellForward {
  Gates gates;
  float c, h;
};
FASTSEQ_DEVICE CellForward lstm_cell(float i, float f, float g, float o, float c) {
  CellForward r;
  r.gates = {logistic(i), logistic(f), hyperbolic_tangent(g), logistic(o)};
  r.c = r.gates.f * c + r.gates.i * r.gates.g;
  r.h = r.gates.o * hyperbolic_tangent(r.c);
  return r;
}

// The gradients of the four sums and of the old cell state `c` from those of the new h and the new cell state, which is
// made again from gates and old one: that costs less than reading it.
struct CellBackward {
  Gates sums;
  float c;
};
FASTSEQ_DEVICE CellBackward lstm_cell_gradient(const Gates& a, float c, float dh, float dc) {
  const float t = hyperbolic_tangent(a.f * c + a.i * a.g);
  const float d = dc + dh * a.o * (1.0f - t * t);
  CellBackward r;
  r.sums.o = dh * t * a.o * (1.0f - a.o);
  r.sums.i = d * a.g * a.i * (1.0f - a.i);
  r.sums.f = d * c * a.f * (1.0f - a.f);
  r.sums.g = d * a.i * (1.0f - a.g * a.g);
  r.c = d * a.f;
  return r;
}

// The nonlinearity of an Elman layer and its slope, both from the sum: where f saturates, its value lost the slope.
enum class Nonlinearity { kTanh, kRelu, kLogistic };
struct Activated {
  float value, slope;
};
template <Nonlinearity kind>
FASTSEQ_DEVICE Activated activate(float x) {
  if constexpr (kind == Nonlinearity::kRelu) {
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};  // a NaN stays one
  } else if constexpr (kind == Nonlinearity::kTanh) {
    const float e = machine::exponential(-2.0f * fabsf(x)), r = machine::reciprocal(1.0f + e);
    return {hyperbolic_tangent(x), 4.0f * e * r * r};
  } else {
    const float e = machine::exponential(-fabsf(x)), r = machine::reciprocal(1.0f + e);
    return {logistic(x), e * r * r};
  }
}

}  // namespace fastseq::cuda
