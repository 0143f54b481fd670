// The grid-wide LSTM forward: one cooperative launch for the whole sequence, of as many blocks as hold R between them.
//
// A block keeps its rows of R in registers and shared memory, makes 8 or 16 units of the new h for all rows of the
// batch, writes them to memory and raises its signal; a step begins when all signals are up. Two places for h suffice:
// who writes h of a step has seen every block publish the step before, and so finish reading the place that it writes
// to. What a step needs of the input is fetched while the others' signals are waited for.
#pragma once

#include "cuda/grid.h"

namespace fastseq::cuda {

template <typename Number, int kGroups, bool kFlags>
FASTSEQ_KERNEL(kGridThreads)
lstm_grid_forward(const FASTSEQ_PARAMETER GridForward p) {
  using Bits = typename Number::Bits;
  using machine::Words4;
  const GridShape s{kGroups};
  const int T = p.size.T, B = p.size.B, H = p.size.H, HP = p.size.HP;
  const GridShared regions = GridShared::forward(s, B, HP);
  unsigned char* const shared = machine::shared_memory();
  Words4* const streamed = reinterpret_cast<Words4*>(shared + regions.weights);
  float* const partial = reinterpret_cast<float*>(shared + regions.partial);
  float* const slots = reinterpret_cast<float*>(shared + regions.slots);

  const int thread = machine::thread(), warp = thread / kLanes, lane = thread % kLanes;
  const int part = s.part_of(warp), pairs = s.pairs(HP), chunks = ceil_div(B, kChunkRows);
  const int first_unit = machine::block() * s.units();
  const Walk walk{T, B, p.reverse};

  // The weights of this warp, those of a pair of K tiles as two K tiles of two m tiles.
  const auto weights_at = [&](int pair, int tile, int m) {
    const int unit = first_unit + s.group_of(warp) * kGroupUnits + lane / 4;
    std::uint32_t words[4];
    FASTSEQ_UNROLLED
    for (int j = 0; j < 4; ++j) {
      const int k = s.first_k(part, pairs, pair, lane) + s.within(tile, j / 2);
      const Bits* row = static_cast<const Bits*>(p.w_hh) +
                        (static_cast<std::int64_t>(ClusterShape::forward_gate(m, j)) * H + unit) * H + k;
      words[j] = two_numbers<Number>(row, unit < H && k < H, row + 1, unit < H && k + 1 < H);
    }
    return Words4{words[0], words[1], words[2], words[3]};
  };
  Words4 weights[kForwardPairs][2][2];
  FASTSEQ_UNROLLED
  for (int pair = 0; pair < kForwardPairs; ++pair) {
    FASTSEQ_UNROLLED
    for (int i = 0; i < 4; ++i)
      weights[pair][i / 2][i % 2] = pair < pairs ? weights_at(pair, i / 2, i % 2) : Words4{0u, 0u, 0u, 0u};
  }
  const auto streamed_at = [&](int pair, int tile, int m) -> Words4& {
    const int of = warp * s.streamed(pairs, kForwardPairs) + pair - kForwardPairs;
    return streamed[((of * 2 + tile) * 2 + m) * kLanes + lane];
  };
  FASTSEQ_ROLLED
  for (int pair = kForwardPairs; pair < pairs; ++pair)
    for (int i = 0; i < 4; ++i) streamed_at(pair, i / 2, i % 2) = weights_at(pair, i / 2, i % 2);

  // The cell that this thread has in every chunk.
  const GridCell cell = s.forward_cell(thread);
  const int unit = first_unit + cell.unit;
  const bool has_cell = thread < s.cells(), unit_ok = has_cell && unit < H, tape_ok = has_cell && unit < HP;
  float bias[kGates];
  FASTSEQ_UNROLLED
  for (int gate = 0; gate < kGates; ++gate) {
    const std::int64_t at = static_cast<std::int64_t>(gate) * H + unit;
    bias[gate] = wide_at<Number>(p.b_ih, at, unit_ok && p.b_ih) + wide_at<Number>(p.b_hh, at, unit_ok && p.b_hh);
  }
  const auto slot = [&](int chunk, int which) -> float& {
    return slots[s.slot_at(chunk, kForwardSlots, which, thread)];
  };
  // What a step needs from memory: the projected input, its flags, and those of the step after it.
  const auto fetch = [&](int step) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int row = chunk * kChunkRows + cell.row;
      const bool ok = tape_ok && row < B;
      const float* x = p.gates + walk.row(step, row) * p.gates_stride + unit;
      FASTSEQ_UNROLLED
      for (int gate = 0; gate < kGates; ++gate) slot(chunk, kForwardGates + gate) = ok ? x[gate * HP] : 0.0f;
      if constexpr (kFlags) {
        const std::uint32_t now = flag_at(p.flags, walk.row(step, row), row < B);
        const std::uint32_t next = flag_at(p.flags, walk.row(step + 1, row), row < B && step + 1 < T);
        slot(chunk, kForwardFlags) = bits_as<float>(now | next << 8);
      }
    }
  };
  if (has_cell) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int row = chunk * kChunkRows + cell.row;
      const bool ok = unit_ok && row < B;
      const std::int64_t at = static_cast<std::int64_t>(row) * H + unit;
      slot(chunk, kCell) = ok ? p.c_state[at] : 0.0f;
      slot(chunk, kHidden) = ok ? Number::wide(static_cast<const Bits*>(p.h_state)[at]) : 0.0f;
    }
    fetch(0);
  }

  int buffer = 0;  // of the parts of the sums
  for (int step = 0; step < T; ++step) {
    const bool last = step + 1 == T;
    // The launcher has put the first operand to place 1.
    const Bits* const read = static_cast<const Bits*>(p.exchange) + (step % 2 ? 0 : static_cast<std::int64_t>(B) * HP);
    Bits* const write = static_cast<Bits*>(p.exchange) + (step % 2 ? static_cast<std::int64_t>(B) * HP : 0);
    if (step > 0) await_all(p.signals, step);

    for (int chunk = 0; chunk < chunks; ++chunk, buffer = 1 - buffer) {
      machine::warp_barrier();
      const int low = chunk * kChunkRows + lane / 4, high = low + kTileRows;
      const bool two = B - chunk * kChunkRows > kTileRows;
      float sums[2][2][4] = {};
      const auto multiply_pair = [&](int pair, const auto& weight) {
        const int k = s.first_k(part, pairs, pair, lane);
        const Words4 a = eight_numbers(read + static_cast<std::int64_t>(low) * HP, k, low < B && k < HP);
        const Words4 b = eight_numbers(read + static_cast<std::int64_t>(high) * HP, k, high < B && k < HP);
        FASTSEQ_UNROLLED
        for (int m = 0; m < 2; ++m) {
          machine::multiply<Number>(sums[0][m], weight(0, m), a.x, a.y);
          machine::multiply<Number>(sums[0][m], weight(1, m), a.z, a.w);
          if (two) {
            machine::multiply<Number>(sums[1][m], weight(0, m), b.x, b.y);
            machine::multiply<Number>(sums[1][m], weight(1, m), b.z, b.w);
          }
        }
      };
      FASTSEQ_UNROLLED
      for (int pair = 0; pair < kForwardPairs; ++pair)
        if (pair < pairs) multiply_pair(pair, [&](int tile, int m) { return weights[pair][tile][m]; });
      FASTSEQ_ROLLED
      for (int pair = kForwardPairs; pair < pairs; ++pair)
        multiply_pair(pair, [&](int tile, int m) { return streamed_at(pair, tile, m); });
      FASTSEQ_UNROLLED
      for (int i = 0; i < GridShape::kForwardSums; ++i)
        partial[s.partial_at(buffer, warp, GridShape::kForwardSums, i, lane)] = sums[i / 8][i / 4 % 2][i % 4];
      machine::block_barrier();

      const int row = chunk * kChunkRows + cell.row;
      if (!has_cell || row >= B) continue;
      float a[kGates];
      FASTSEQ_UNROLLED
      for (int gate = 0; gate < kGates; ++gate) {
        a[gate] = slot(chunk, kForwardGates + gate) + bias[gate];
        const int sum = s.forward_gate_sum(thread, gate);
        for (int of = 0; of < s.parts(); ++of)  // in the order of the parts
          a[gate] +=
              partial[s.partial_at(buffer, thread / kGroupCells * s.parts() + of, GridShape::kForwardSums, sum, lane)];
      }
      const std::uint32_t flags = kFlags ? bits_as<std::uint32_t>(slot(chunk, kForwardFlags)) : 0u;
      const bool cut = flags & kCut, padding = flags & kPadding, next_cut = flags >> 8 & kCut;
      float c = cut ? 0.0f : slot(chunk, kCell);
      float h = cut ? 0.0f : slot(chunk, kHidden);
      const CellForward made = lstm_cell(a[0], a[1], a[2], a[3], c);
      if (!padding) c = made.c, h = Number::wide(Number::narrow(made.h));
      slot(chunk, kCell) = c;
      slot(chunk, kHidden) = h;
      const std::int64_t at = walk.row(step, row);
      if (unit_ok) {
        static_cast<Bits*>(p.y)[at * H + unit] = Number::narrow(padding ? 0.0f : h);
        if (!last)
          machine::store_published(write + static_cast<std::int64_t>(row) * HP + unit,
                                   Number::narrow(next_cut ? 0.0f : h));
      }
      if (p.save && tape_ok) {
        float* tape = p.gates + at * p.gates_stride + unit;
        tape[0] = made.gates.i;
        tape[HP] = made.gates.f;
        tape[2 * HP] = made.gates.g;
        tape[3 * HP] = made.gates.o;
        p.c_tape[at * HP + unit] = c;
      }
    }
    if (!last) {
      publish_all(p.signals, step + 1);
      if (has_cell) fetch(step + 1);
    }
  }

  if (unit_ok)
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int row = chunk * kChunkRows + cell.row;
      if (row >= B) continue;
      const std::int64_t at = static_cast<std::int64_t>(row) * H + unit;
      static_cast<Bits*>(p.h_state)[at] = Number::narrow(slot(chunk, kHidden));
      p.c_state[at] = slot(chunk, kCell);
    }
}

}  // namespace fastseq::cuda
