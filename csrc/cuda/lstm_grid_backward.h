// The grid-wide LSTM's BPTT: one cooperative launch for the whole sequence.
//
// As in the forward a block owns units; here it keeps R's columns of them. It makes the gates' gradients of its units,
// which have to be written anyway, and raises its signal. A step begins when all signals are up: the gradient of a
// unit's h is the product of all gates' gradients of the step after with the unit's column. The rows of the batch are m
// here, so that eight units fill a product.
#pragma once

#include "cuda/grid.h"

namespace fastseq::cuda {

template <typename Number, int kGroups, bool kFlags>
FASTSEQ_KERNEL(kGridThreads)
lstm_grid_backward(const FASTSEQ_PARAMETER GridBackward p) {
  using Bits = typename Number::Bits;
  using machine::Words4;
  const GridShape s{kGroups};
  const int T = p.size.T, B = p.size.B, H = p.size.H, HP = p.size.HP, K = kGates * H;
  const GridShared regions = GridShared::backward(s, B, H);
  unsigned char* const shared = machine::shared_memory();
  Words4* const streamed = reinterpret_cast<Words4*>(shared + regions.weights);
  float* const partial = reinterpret_cast<float*>(shared + regions.partial);
  float* const slots = reinterpret_cast<float*>(shared + regions.slots);

  const int thread = machine::thread(), warp = thread / kLanes, lane = thread % kLanes;
  const int part = s.part_of(warp), pairs = s.pairs(K), chunks = ceil_div(B, kChunkRows);
  const int first_unit = machine::block() * s.units();
  const Walk walk{T, B, !p.reverse};

  // The weights of this warp, those of a pair of K tiles as two words of each.
  const auto weights_at = [&](int pair) {
    const int unit = first_unit + s.group_of(warp) * kGroupUnits + right_n(lane);
    std::uint32_t words[4];
    FASTSEQ_UNROLLED
    for (int j = 0; j < 4; ++j) {
      const int k = s.first_k(part, pairs, pair, lane) + s.within(j / 2, j % 2);
      const Bits* column = static_cast<const Bits*>(p.w_hh) + static_cast<std::int64_t>(k) * H + unit;
      words[j] = two_numbers<Number>(column, unit < H && k < K, column + H, unit < H && k + 1 < K);
    }
    return Words4{words[0], words[1], words[2], words[3]};
  };
  Words4 weights[kBackwardPairs];
  FASTSEQ_UNROLLED
  for (int pair = 0; pair < kBackwardPairs; ++pair)
    weights[pair] = pair < pairs ? weights_at(pair) : Words4{0u, 0u, 0u, 0u};
  const auto streamed_at = [&](int pair) -> Words4& {
    return streamed[(warp * s.streamed(pairs, kBackwardPairs) + pair - kBackwardPairs) * kLanes + lane];
  };
  FASTSEQ_ROLLED
  for (int pair = kBackwardPairs; pair < pairs; ++pair) streamed_at(pair) = weights_at(pair);

  // The cell that this thread has in every chunk.
  const GridCell cell = s.backward_cell(thread);
  const int unit = first_unit + cell.unit;
  const bool has_cell = thread < s.cells() && unit < H;
  const auto slot = [&](int chunk, int which) -> float& {
    return slots[s.slot_at(chunk, kBackwardSlots, which, thread)];
  };
  // What a step needs from memory: gates, the cell state before, the gradient of y, and the flags. Those of the step
  // after it, by the order of the forward, are there from the fetch before.
  const auto fetch = [&](int step) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int row = chunk * kChunkRows + cell.row;
      if (row >= B) continue;
      const float* a = p.gates + walk.row(step, row) * p.gates_stride + unit;
      FASTSEQ_UNROLLED
      for (int gate = 0; gate < kGates; ++gate) slot(chunk, kBackwardGates + gate) = a[gate * HP];
      slot(chunk, kCellBefore) = step + 1 < T ? p.c_tape[walk.row(step + 1, row) * HP + unit]
                                              : wide_at<Number>(p.c0, static_cast<std::int64_t>(row) * H + unit, true);
      slot(chunk, kGradOutput) = wide_at<Number>(p.grad_y, walk.row(step, row) * H + unit, p.grad_y);
      if constexpr (kFlags) {
        const std::uint32_t now = flag_at(p.flags, walk.row(step, row), true);
        const std::uint32_t after = flag_at(p.flags, walk.row(step - 1, row), step > 0);
        slot(chunk, kBackwardFlags) = bits_as<float>(now | after << 8);
      }
    }
  };
  if (has_cell) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int row = chunk * kChunkRows + cell.row;
      const std::int64_t at = static_cast<std::int64_t>(row) * H + unit;
      slot(chunk, kGradHidden) = row < B ? p.dh_state[at] : 0.0f;
      slot(chunk, kGradCell) = row < B ? p.dc_state[at] : 0.0f;
    }
    fetch(0);
  }

  int buffer = 0;  // of the parts of the sums
  for (int step = 0; step < T; ++step) {
    const bool last = step + 1 == T;
    if (step > 0) await_all(p.signals, step);

    for (int chunk = 0; chunk < chunks; ++chunk, buffer = 1 - buffer) {
      machine::warp_barrier();
      if (step > 0) {
        const int low = chunk * kChunkRows + lane / 4, high = low + kTileRows;
        const Bits* const read = static_cast<const Bits*>(p.dgates);
        const Bits* const low_row = read + walk.row(step - 1, low) * p.dgates_stride;
        const Bits* const high_row = read + walk.row(step - 1, high) * p.dgates_stride;
        float sums[GridShape::kBackwardSums] = {};
        const auto multiply_pair = [&](int pair, const Words4& weight) {
          const int k = s.first_k(part, pairs, pair, lane);
          const Words4 a = eight_numbers(low_row, k, low < B && k < p.dgates_stride);
          const Words4 b = eight_numbers(high_row, k, high < B && k < p.dgates_stride);
          machine::multiply<Number>(sums, Words4{a.x, b.x, a.y, b.y}, weight.x, weight.y);
          machine::multiply<Number>(sums, Words4{a.z, b.z, a.w, b.w}, weight.z, weight.w);
        };
        FASTSEQ_UNROLLED
        for (int pair = 0; pair < kBackwardPairs; ++pair)
          if (pair < pairs) multiply_pair(pair, weights[pair]);
        FASTSEQ_ROLLED
        for (int pair = kBackwardPairs; pair < pairs; ++pair) multiply_pair(pair, streamed_at(pair));
        FASTSEQ_UNROLLED
        for (int i = 0; i < GridShape::kBackwardSums; ++i)
          partial[s.partial_at(buffer, warp, GridShape::kBackwardSums, i, lane)] = sums[i];
      }
      machine::block_barrier();

      const int row = chunk * kChunkRows + cell.row;
      if (!has_cell || row >= B) continue;
      const std::uint32_t flags = kFlags ? bits_as<std::uint32_t>(slot(chunk, kBackwardFlags)) : 0u;
      const bool cut = flags & kCut, padding = flags & kPadding, cut_after = flags >> 8 & kCut;
      float arrived = 0.0f;
      if (step > 0 && !cut_after)
        for (int of = 0; of < s.parts(); ++of)  // in the order of the parts
          arrived += partial[s.partial_at(buffer, thread / kGroupCells * s.parts() + of, GridShape::kBackwardSums,
                                          s.backward_cell_sum(thread), lane)];
      const float total = slot(chunk, kGradHidden) + arrived + (padding ? 0.0f : slot(chunk, kGradOutput));
      const float dc = slot(chunk, kGradCell), c = cut ? 0.0f : slot(chunk, kCellBefore);
      const Gates gates{slot(chunk, kBackwardGates), slot(chunk, kBackwardGates + 1), slot(chunk, kBackwardGates + 2),
                        slot(chunk, kBackwardGates + 3)};
      CellBackward d = lstm_cell_gradient(gates, c, total, dc);
      if (padding) d = {{0.0f, 0.0f, 0.0f, 0.0f}, dc};
      slot(chunk, kGradHidden) = padding && !cut ? total : 0.0f;
      slot(chunk, kGradCell) = cut ? 0.0f : d.c;
      Bits* to = static_cast<Bits*>(p.dgates) + walk.row(step, row) * p.dgates_stride + unit;
      machine::store_published(to, Number::narrow(d.sums.i));
      machine::store_published(to + H, Number::narrow(d.sums.f));
      machine::store_published(to + 2 * H, Number::narrow(d.sums.g));
      machine::store_published(to + 3 * H, Number::narrow(d.sums.o));
    }
    if (!last) {
      publish_all(p.signals, step + 1);
      if (has_cell) fetch(step + 1);
    }
  }

  if (has_cell)
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int row = chunk * kChunkRows + cell.row;
      if (row >= B) continue;
      const std::int64_t at = static_cast<std::int64_t>(row) * H + unit;
      p.dh_state[at] = slot(chunk, kGradHidden);
      p.dc_state[at] = slot(chunk, kGradCell);
    }
}

}  // namespace fastseq::cuda
