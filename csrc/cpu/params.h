// What Python hands to a kernel: pointers, strides and sizes, nothing about torch.
//
// All arrays are dense and row-major but for x and grad_y, whose strides over time and batch are given in elements. T
// is the number of steps, B the batch, I the input size, H the hidden size, P the size of h (H, or the projection's).
// Storage is what the user's tensors hold; arithmetic is in float (double for double).
#pragma once

#include <stdint.h>

namespace fastseq {

enum class Storage : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Activation : int { kTanh = 0, kRelu = 1, kLogistic = 2 };

// Bits of a step flag, uint8 [T, B]: see fastseq/ops/flags.py.
constexpr uint8_t kFlagReset = 1;    // take the reset state (zero, unless there is one) before this step
constexpr uint8_t kFlagPadding = 2;  // carry the state, emit zeros

// Tape layout, the same for every instruction set: hidden sizes rounded up to 16, and 16 columns more behind
// the gates, so that rows of a power-of-two width do not fall on the same cache sets.
constexpr int64_t kTapeAlign = 16;
constexpr int64_t kTapePad = 16;
inline int64_t tape_width(int64_t hidden) { return (hidden + kTapeAlign - 1) / kTapeAlign * kTapeAlign; }
inline int64_t gates_width(int64_t hidden, int64_t gates) { return gates * tape_width(hidden) + kTapePad; }

// What a call asks for beyond the plain layer and step flags; fastseq/reference/lstm.py has the formulas. What is null
// or zero is not asked for.
struct LayerOptions {
  // In the user's storage.
  const void *h_reset, *c_reset;            // [1 or T, B, P], [1 or T, B, H]: what a step with kFlagReset takes
  bool h_reset_per_step, c_reset_per_step;  // T rows of it rather than one
  const void* h_mask;                       // [B, P]: multiplies h_{t-1} before the recurrent product
  const uint8_t *zoneout_h, *zoneout_c;     // bool [T, B, P], [T, B, H]: 1 keeps the old value
  double zoneout_h_rate, zoneout_c_rate;
  const void* peephole;  // [3, H]: of i, f, o
  // Layer normalisation, haste's with the first two or torchaudio's with the next two, and both with the last: [4H]
  // and [H]. Not with a peephole. A backward of it makes the gates again (`recompute`).
  const void *weight_ln_ih, *weight_ln_hh, *weight_ln_gates, *bias_ln_gates, *weight_ln_c, *bias_ln_c;
  double cell_clip;
  // Of the backward alone.
  double grad_clip;
  const void *grad_c, *grad_gates;                  // gradients that arrive at the tape, of its shapes and type
  bool recompute;                                   // make the gates again from y and c, since the forward kept none
  const void *b_ih, *b_hh;                          // [GH], for that
  void *dh_reset, *dc_reset, *dh_mask, *dpeephole;  // results like their inputs; rows of dh_reset and dc_reset that no
                                                    // step takes are left alone
  void *dweight_ln_ih, *dweight_ln_hh, *dweight_ln_gates, *dbias_ln_gates, *dweight_ln_c, *dbias_ln_c;
};

// One layer in one direction: an LSTM, or an Elman layer (`activation`, no c, no w_hr).
struct ForwardParams {
  Storage storage;
  Activation activation;
  int64_t T, B, I, H, P;
  int64_t x_stride_t, x_stride_b;
  const void *x, *h0, *c0;                       // [T, B, I], [B, P] or null for zeros, [B, H] or null for zeros
  const void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;  // [GH, I], [GH, P], [GH] or null, [GH] or null, [P, H] or null
  const uint8_t* flags;                          // [T, B] or null
  bool reverse;
  void *y, *h_n, *c_n;  // [T, B, P], [B, P], [B, H]
  void *c, *gates;  // tape [T, B, tape_width] and [T, B, gates_width] in arithmetic type, or null; Elman: f'(a), no c
  const LayerOptions* options;  // or null
  bool any_order;               // whether the tape may have the batch in another order, for a backward alone to read
  int threads;
};

struct BackwardParams {
  Storage storage;
  Activation activation;
  int64_t T, B, I, H, P;
  int64_t x_stride_t, x_stride_b, grad_y_stride_t, grad_y_stride_b;
  const void *grad_y, *grad_h_n, *grad_c_n;  // each may be null: no gradient came
  const void *x, *h0, *c0, *w_ih, *w_hh, *w_hr;
  const uint8_t* flags;
  bool reverse;
  const void *y, *c, *gates;         // gates null when they are made again
  void* dgates;                      // [T, B, gates_width]; may be `gates` itself, and is null where that is
  void *dx, *dh0, *dc0;              // each may be null: not asked for
  void *dw_ih, *dw_hh, *db, *dw_hr;  // likewise
  const LayerOptions* options;       // or null
  int threads;
};

// One step of a stack of layers in one direction, from weights that were packed before (step.h).
struct StepShape {
  Storage storage;
  bool lstm;
  Activation activation;    // of an Elman layer
  int64_t layers, I, H, P;  // layer 0 reads I numbers, the others P
  bool projected;
};
struct StepWeights {  // of one layer, as ForwardParams has them
  const void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};
struct StepParams {
  StepShape shape;
  char* packed;
  int64_t B;
  const void *x, *h, *c;  // [B, I], [layers, B, P], [layers, B, H] or null
  void *y, *h_n, *c_n;    // [B, P], [layers, B, P], [layers, B, H] or null
  bool backwards;         // walks the panels from the last to the first
  int threads;
};

// Soft assignment of N points to K centres, its gradients, and the clustering loss with its gradients.
enum class ClusterTask : int { kAssign = 0, kAssignBackward = 1, kTargetLoss = 2, kFrequencyLoss = 3 };
struct ClusterParams {
  ClusterTask task;
  Storage storage;           // of z, centers and q
  Storage given_storage;     // of given
  Storage gradient_storage;  // of dz and dcenters
  int64_t N, d, K;
  double alpha, scale;      // scale multiplies the loss and its gradients
  const void *z, *centers;  // [N, d], [K, d]
  const void* given;        // [N, K]: the target, or the gradient that arrives at q
  const void* freq;         // [K], in the arithmetic type
  void* q;                  // [N, K]
  double* loss;
  void *dz, *dcenters;  // [N, d], [K, d]; each may be null: not asked for
  int threads;
};

struct NearestParams {
  Storage storage;
  int64_t N, d, K;
  const void *z, *centers;  // [N, d], [K, d]
  int64_t* labels;          // [N]
  void* distance;           // [N]
  int threads;
};

struct TargetParams {
  Storage storage;
  int64_t N, K;
  const void *q, *freq;  // [N, K], [K] in the arithmetic type or null
  void* p;               // [N, K]
  int threads;
};

// For the loops in peaks.h, which reach a limit of the machine.
struct PeakParams {
  Storage storage;   // of the multiply-adds: float32 or float64
  const void* data;  // what is read
  int64_t bytes, repeats;
  int threads;
};

using ForwardFn = void (*)(const ForwardParams&);
using BackwardFn = void (*)(const BackwardParams&);
using PeakFn = double (*)(const PeakParams&);  // returns the operations done, or the bytes read

// What one instruction set exports.
struct KernelTable {
  const char* name;
  ForwardFn lstm_forward;
  BackwardFn lstm_backward;
  ForwardFn rnn_forward;
  BackwardFn rnn_backward;
  int64_t (*step_bytes)(const StepShape&);  // of the packed weights
  void (*step_pack)(const StepShape&, const StepWeights* layers, char* packed);
  void (*step)(const StepParams&);
  void (*cluster)(const ClusterParams&);
  void (*nearest)(const NearestParams&);
  void (*target)(const TargetParams&);
  PeakFn fma_loop, read_loop;
};

// What a set exports that differs from another only in these.
struct RecurrentKernels {
  const char* name;
  ForwardFn lstm_forward;
  BackwardFn lstm_backward;
  ForwardFn rnn_forward;
  BackwardFn rnn_backward;
};

#if defined(__x86_64__)
extern const KernelTable kAvx512Kernels;

// From how many rows of the batch on the amx set makes the products of a float32 step of bfloat16 terms
// (split_recurrence.h). Set by tests, so that small cases reach those kernels too.
int64_t split_rows();
void set_split_rows(int64_t rows);
#endif

}  // namespace fastseq
