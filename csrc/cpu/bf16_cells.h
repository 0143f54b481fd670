// The cells of the bfloat16 recurrences: arithmetic in float32 on the sums of a product, forward and backward.
#pragma once

#include "bf16_product.h"
#include "lstm.h"
#include "rnn.h"

namespace fastseq {
namespace {

// A product's sums on their way to the cell: kBlockHeight rows of four vectors.
constexpr int64_t kSumsStride = 4 * kTileColumns;
FASTSEQ_INLINE Vec<float> sum_at(const float* sums, int r, int v) {
  return load(sums + r * kSumsStride + v * kTileColumns);
}

// Where a block of rows, columns from `column` on, leaves h_t: in y and where the next step reads it, columns beyond
// the hidden size untouched.
struct BF16Sink {
  BFloat16 *y, *next;
  int64_t y_stride, next_stride, columns;
  FASTSEQ_INLINE void put(int r, int v, Vec<float> h) const {
    const __mmask16 inside = mask_part(columns - v * kTileColumns);
    const __m256i half = round_bfloat16(h);
    _mm256_mask_storeu_epi16(y + r * y_stride + v * kTileColumns, inside, half);
    _mm256_mask_storeu_epi16(next + r * next_stride + v * kTileColumns, inside, half);
  }
};

// What a forward step reads and writes beside the product's sums, from the block's first row and the panel's column on.
struct BF16Forward {
  Activation activation;
  const float* bias;
  float* tape;  // activated gates, or slopes; null: none is kept
  int64_t gates_stride, gate_stride;
  const float* c_before;
  float* c;
  int64_t c_stride;
  BF16Sink sink;
};

// dL/dh_t beside what comes through the recurrent weights.
struct BF16HiddenGradient {
  const BFloat16* grad_y;  // or null
  int64_t grad_y_stride, columns;
  const float* last;  // gradient of h_n at the last step, or null
  int64_t last_stride;
  FASTSEQ_INLINE Vec<float> add(int r, int v, Vec<float> total) const {
    if (last) total = total + load(last + r * last_stride + v * kTileColumns);
    if (grad_y)
      total =
          total + load_bfloat16(grad_y + r * grad_y_stride + v * kTileColumns, mask_part(columns - v * kTileColumns));
    return total;
  }
};

// The gates' gradients in bfloat16 lie in the tape's own rows: the 32 units of a chunk in the first half of the room of
// its 32 float32 numbers, so that they may overwrite the gates while other units' are still to be read.
constexpr int64_t kGradientChunkBytes = kChunk * sizeof(float);
struct BF16GateGradients {
  char* row;                      // of the block's first row
  int64_t stride, gate_stride;    // in bytes
  int64_t first_vector, vectors;  // of the panel; of all units
  FASTSEQ_INLINE void put(int r, int gate, int v, Vec<float> gradient) const {
    const int64_t vector = first_vector + v;
    char* to = row + r * stride + gate * gate_stride + vector / 2 * kGradientChunkBytes + vector % 2 * 32;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_bfloat16(gradient));
    if (vector % 2 == 0 && vector + 1 == vectors)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_setzero_si256());
  }
};

struct BF16Backward {
  BF16HiddenGradient hidden;
  const float* tape;
  int64_t gates_stride, gate_stride;
  BF16GateGradients dgates;
  const float *c, *c_before;
  float* dc;
  int64_t c_stride;
  float* db;  // this block's sums, gate_stride apart, or null
};

// A forward panel is the four gates of one vector of units, in this order in the packed weights.
struct BF16LstmCell {
  static constexpr int kGates = 4;
  static constexpr bool kHasC = true;
  static PanelRange panels(Range units) { return {units.begin, units.end, true}; }
  static int64_t slot_stride(int64_t width) { return width; }

  // Calls between() now and again: calls(rows, vectors) times.
  static int64_t calls(int rows, int vectors) { return int64_t{rows} * vectors; }
  template <typename Between>
  static void forward(int rows, int, const float* sums, const BF16Forward& s, const Between& between) {
    Vec<float> bias[kGates];
    FASTSEQ_UNROLL
    for (int gate = 0; gate < kGates; ++gate) bias[gate] = load(s.bias + gate * s.gate_stride);
    for (int r = 0; r < rows; ++r) {
      between();
      const Vec<float> i = logistic<float>(sum_at(sums, r, kInput) + bias[kInput]);
      const Vec<float> f = logistic<float>(sum_at(sums, r, kForget) + bias[kForget]);
      const Vec<float> g = tanh<float>(sum_at(sums, r, kCell) + bias[kCell]);
      const Vec<float> o = logistic<float>(sum_at(sums, r, kOutput) + bias[kOutput]);
      const Vec<float> c = fma(f, load(s.c_before + r * s.c_stride), i * g);
      store(s.c + r * s.c_stride, c);
      s.sink.put(r, 0, o * tanh<float>(c));
      if (s.tape) {
        float* to = s.tape + r * s.gates_stride;
        store(to + kInput * s.gate_stride, i);
        store(to + kForget * s.gate_stride, f);
        store(to + kCell * s.gate_stride, g);
        store(to + kOutput * s.gate_stride, o);
      }
    }
  }

  template <typename Between>
  static void backward(int rows, int vectors, const float* sums, const BF16Backward& s, const Between& between) {
    for (int v = 0; v < vectors; ++v) {
      Vec<float> db[kGates] = {zero<float>(), zero<float>(), zero<float>(), zero<float>()};
      for (int r = 0; r < rows; ++r) {
        between();
        const int64_t cell = r * s.c_stride + v * kTileColumns;
        const float* from = s.tape + r * s.gates_stride + v * kTileColumns;
        const Vec<float> i = load(from + kInput * s.gate_stride), f = load(from + kForget * s.gate_stride);
        const Vec<float> g = load(from + kCell * s.gate_stride), o = load(from + kOutput * s.gate_stride);
        const Vec<float> tanh_c = tanh<float>(load(s.c + cell));
        const Vec<float> dh = s.hidden.add(r, v, sums ? sum_at(sums, r, v) : zero<float>());
        const Vec<float> dh_o = dh * o;
        const Vec<float> d = load(s.dc + cell) + fma(-(dh_o * tanh_c), tanh_c, dh_o), d_i = d * i;
        const Vec<float> gradients[kGates] = {d_i * g * (broadcast(1.0f) - i),
                                              d * load(s.c_before + cell) * fma(-f, f, f), fma(-(d_i * g), g, d_i),
                                              dh_o * tanh_c * (broadcast(1.0f) - o)};
        store(s.dc + cell, d * f);
        FASTSEQ_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          s.dgates.put(r, gate, v, gradients[gate]);
          db[gate] = db[gate] + gradients[gate];
        }
      }
      if (s.db) {
        FASTSEQ_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          float* sum = s.db + gate * s.gate_stride + v * kTileColumns;
          store(sum, load(sum) + db[gate]);
        }
      }
    }
  }
};

// A panel is up to four vectors of units.
struct BF16ElmanCell {
  static constexpr int kGates = 1;
  static constexpr bool kHasC = false;
  static PanelRange panels(Range units) { return {units.begin, units.end}; }
  static int64_t slot_stride(int64_t) { return kTileColumns; }

  static int64_t calls(int rows, int vectors) { return int64_t{rows} * vectors; }
  template <typename Between>
  static void forward(int rows, int vectors, const float* sums, const BF16Forward& s, const Between& between) {
    for (int v = 0; v < vectors; ++v) {
      const Vec<float> bias = load(s.bias + v * kTileColumns);
      for (int r = 0; r < rows; ++r) {
        between();
        Vec<float> slope;
        s.sink.put(r, v, activate<float>(s.activation, sum_at(sums, r, v) + bias, &slope));
        if (s.tape) store(s.tape + r * s.gates_stride + v * kTileColumns, slope);
      }
    }
  }

  template <typename Between>
  static void backward(int rows, int vectors, const float* sums, const BF16Backward& s, const Between& between) {
    for (int v = 0; v < vectors; ++v) {
      Vec<float> db = zero<float>();
      for (int r = 0; r < rows; ++r) {
        between();
        const Vec<float> dh = s.hidden.add(r, v, sums ? sum_at(sums, r, v) : zero<float>());
        const Vec<float> gradient = dh * load(s.tape + r * s.gates_stride + v * kTileColumns);
        s.dgates.put(r, 0, v, gradient);
        db = db + gradient;
      }
      if (s.db) store(s.db + v * kTileColumns, load(s.db + v * kTileColumns) + db);
    }
  }
};

}  // namespace
}  // namespace fastseq
