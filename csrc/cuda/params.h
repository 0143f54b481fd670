// The plain structs between Python and the kernels. Tensors are dense but where a stride is named; T steps, B
// sequences, H units, HP = H rounded up to the lanes of the tape. Numbers of the layer's dtype are untyped here.
#pragma once

#include <cstdint>

namespace fastseq::cuda {

struct Sizes {
  int T, B, H, HP;
};

// The whole sequence of one layer in one direction, forward.
struct ClusterForward {
  Sizes size;
  int groups;  // of ClusterShape
  bool reverse, save;
  std::int64_t gates_stride;  // between rows of gates
  float* gates;               // [T, B, gates_stride]: in, the input projection; out, the gates after activation (save)
  const void* w_hh;           // [4H, H]
  const void* b_ih;           // [4H] or null
  const void* b_hh;           // [4H] or null
  void* h_state;              // [B, H]: in, h0; out, h_n
  float* c_state;             // [B, H]: in, c0; out, c_n
  void* y;                    // [T, B, H]
  float* c_tape;              // [T, B, HP] (save)
  const std::uint8_t* flags;  // [T, B] or null
};

// Its BPTT.
struct ClusterBackward {
  Sizes size;
  int groups;
  bool reverse;
  std::int64_t gates_stride, dgates_stride;
  const void* grad_y;         // [T, B, H] or null
  const void* w_hh;           // [4H, H]
  const float* gates;         // [T, B, gates_stride]
  const float* c_tape;        // [T, B, HP]
  const void* c0;             // [B, H]
  void* dgates;               // [T, B, dgates_stride], a gate every H columns: out
  float* dh_state;            // [B, H]: in, grad_h_n; out, what reaches h0 past the first step's product
  float* dc_state;            // [B, H]: in, grad_c_n; out, dc0
  const std::uint8_t* flags;  // [T, B] or null
};

// The same by blocks of the whole grid, which meet in global memory.
struct GridForward {
  Sizes size;
  bool reverse, save;
  std::int64_t gates_stride;
  float* gates;  // as of ClusterForward, and so are the others
  const void* w_hh;
  const void* b_ih;
  const void* b_hh;
  void* h_state;
  float* c_state;
  void* y;
  float* c_tape;
  const std::uint8_t* flags;
  void* exchange;  // [2, B, HP]: h as the next step's product reads it; place 1 that of the first, zeros beyond H
  std::uint32_t* signals;  // of each block, at zero
};

struct GridBackward {
  Sizes size;
  bool reverse;
  std::int64_t gates_stride, dgates_stride;
  const void* grad_y;  // as of ClusterBackward, and so are the others
  const void* w_hh;
  const float* gates;
  const float* c_tape;
  const void* c0;
  void* dgates;  // zeros after the four gates
  float* dh_state;
  float* dc_state;
  const std::uint8_t* flags;
  std::uint32_t* signals;  // of each block, at zero
};

// One step of a cell. Every pointer but the states and the weights is at the row of its step: [B, ·].
struct StepSizes {
  std::int64_t B;
  int H, HP;
};

struct LstmCellForward {
  StepSizes size;
  std::int64_t gates_stride;
  float* gates;               // [B, gates_stride]: in, the input projection; out, the gates (where there is c_tape)
  const float* product;       // [B, 4H]: h before, times w_hh
  const void* b_ih;           // [4H] or null
  const void* b_hh;           // [4H] or null
  void* h_state;              // [B, H]: carried
  float* c_state;             // [B, H]: carried
  void* h_next;               // [B, H] or null: what the next step's product reads, where next_flags may cut
  void* y;                    // [B, H]
  float* c_tape;              // [B, HP] or null
  const std::uint8_t* flags;  // [B] or null
  const std::uint8_t* next_flags;  // [B], of the step after, or null
};

struct LstmCellBackward {
  StepSizes size;
  std::int64_t gates_stride, dgates_stride;
  const void* grad_y;               // [B, H] or null
  const float* product;             // [B, H]: gradients of the gates of the step after, times w_hh, or null
  const float* gates;               // [B, gates_stride]
  const float* c_before;            // [B, HP], of the step before, or null: c0
  const void* c0;                   // [B, H]
  void* dgates;                     // [B, dgates_stride], a gate every H columns
  float* dh_state;                  // [B, H]: carried past products
  float* dc_state;                  // [B, H]: carried
  const std::uint8_t* flags;        // [B] or null
  const std::uint8_t* flags_after;  // [B], of the step after, or null
};

struct RnnCellForward {
  StepSizes size;
  std::int64_t tape_stride;
  bool save;
  float* tape;           // [B, tape_stride]: in, the input projection; out, the slopes (save)
  const float* product;  // [B, H]: h before, times w_hh
  const void* b_ih;      // [H] or null
  const void* b_hh;      // [H] or null
  void* h_state;         // [B, H]: carried
  void* h_next;          // as above
  void* y;               // [B, H]
  const std::uint8_t* flags;
  const std::uint8_t* next_flags;
};

struct RnnCellBackward {
  StepSizes size;
  std::int64_t tape_stride, dsums_stride;
  const void* grad_y;    // [B, H] or null
  const float* product;  // [B, H] or null
  const float* tape;     // [B, tape_stride]: the slopes
  void* dsums;           // [B, dsums_stride]
  float* dh_state;       // [B, H]: carried past products
  const std::uint8_t* flags;
  const std::uint8_t* flags_after;
};

}  // namespace fastseq::cuda
