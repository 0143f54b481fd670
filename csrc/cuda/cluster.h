// What both passes of the cluster-persistent LSTM share: the ring of steps on their way in, and loads at the edges.
#pragma once

#include "cuda/cell.h"
#include "cuda/layout.h"
#include "cuda/machine.h"
#include "cuda/params.h"

namespace fastseq::cuda {

// Number `index` of an array of the layer's dtype in float, or zero where it must not be read.
template <typename Number>
FASTSEQ_DEVICE float wide_at(const void* values, std::int64_t index, bool present) {
  if (!present) return 0.0f;
  return Number::wide(machine::load_constant(static_cast<const typename Number::Bits*>(values) + index));
}

// Two weights that follow one another in a fragment, as one word; zero outside of [0, rows) x [0, columns).
template <typename Number>
FASTSEQ_DEVICE std::uint32_t two_numbers(const typename Number::Bits* low, bool low_ok,
                                         const typename Number::Bits* high, bool high_ok) {
  const std::uint32_t first = low_ok ? machine::load_constant(low) : 0u;
  const std::uint32_t second = high_ok ? machine::load_constant(high) : 0u;
  return first | second << 16;
}

FASTSEQ_DEVICE std::uint8_t flag_at(const std::uint8_t* flags, std::int64_t row, bool present) {
  return present ? machine::load_constant(flags + row) : std::uint8_t{0};
}

// The order in which a pass walks through the steps, 0 the first that it comes to.
struct Walk {
  int T, B;
  bool from_the_end;

  // The row of a step and a sequence in a [T * B, ·] tensor.
  FASTSEQ_DEVICE std::int64_t row(int step, int sequence) const {
    return static_cast<std::int64_t>(from_the_end ? T - 1 - step : step) * B + sequence;
  }
};

// Steps whose columns of gates (backward: and of c, a step earlier in the direction) the copy engine brings. A warp
// fills a slot; every thread that reads one waits for it; a barrier of the block stands between the last read of a slot
// and the next filling.
struct Ring {
  float* gates;
  float* c;
  std::uint64_t* barriers;
  const float* from_gates;
  const float* from_c;  // null in the forward
  std::int64_t gates_stride;
  int tape_width;
  int first_unit, columns;  // of the tape, this block's

  // Lanes of one warp: row `row` of the tape has the first of `rows` sequences. `row_before` is that of c, negative
  // where there is none.
  FASTSEQ_DEVICE void fill(const ClusterShape& s, std::uint32_t n, int rows, std::int64_t row, std::int64_t row_before,
                           int lane) const {
    if (columns == 0) return;
    const int slot = ring_slot(n);
    const bool with_c = from_c != nullptr && row_before >= 0;
    const auto bytes = static_cast<std::uint32_t>(columns) * 4;
    if (lane == 0)
      machine::copy_barrier_expect(barriers + slot, static_cast<std::uint32_t>(rows) * bytes * (with_c ? 5 : 4));
    for (int i = lane; i < rows * kGates; i += kLanes) {
      const int r = i / kGates, gate = i % kGates;
      machine::bulk_copy(gates + s.gates_at(slot, r, gate, 0),
                         from_gates + (row + r) * gates_stride + gate * tape_width + first_unit, bytes,
                         barriers + slot);
    }
    if (with_c)
      for (int r = lane; r < rows; r += kLanes)
        machine::bulk_copy(c + s.c_at(slot, r, 0), from_c + (row_before + r) * tape_width + first_unit, bytes,
                           barriers + slot);
  }

  FASTSEQ_DEVICE void wait(std::uint32_t n) const {
    if (columns > 0) machine::copy_barrier_wait(barriers + ring_slot(n), ring_parity(n));
    machine::warp_barrier();
  }
};

// The barriers of a ring, ready for the copy engine after the next barrier of the block.
FASTSEQ_DEVICE void init_ring(std::uint64_t* barriers) {
  if (machine::thread() == 0) {
    for (int slot = 0; slot < kRingSlots; ++slot) machine::copy_barrier_init(barriers + slot);
    machine::copy_barrier_fence();
  }
}

}  // namespace fastseq::cuda
