// Who holds what in the grid-wide LSTM, which takes the sizes that no cluster holds. Plain index arithmetic, the same
// on the GPU and in the tests that check it on a CPU.
//
// Every block owns `units` of the hidden units for all rows of the batch, and its 8 warps cut the depth K of the
// product among themselves, so that R is spread over the whole GPU: a group of 8 units has 8 parts, two groups have 4
// each. The rows of the batch go through a step 16 at a time, a chunk, of which a thread has one cell.
//
// What other blocks have written is read 16 bytes a lane, 8 numbers of a row, as two K tiles of a product: which place
// of K a number takes does not matter as long as the weights take the same one. So no operand goes through shared
// memory.
#pragma once

#include "cuda/layout.h"

namespace fastseq::cuda {

constexpr int kGridThreads = 256;
constexpr int kGridWarps = kGridThreads / kLanes;
constexpr int kPairK = 2 * kTileK;  // depth of a pair of K tiles
constexpr int kChunkRows = 2 * kTileRows;
constexpr int kGroupCells = kChunkRows * kGroupUnits;  // of a chunk
// Pairs of K tiles whose weights a warp keeps in registers, 128 of them a thread.
constexpr int kForwardPairs = 8;
constexpr int kBackwardPairs = 32;
constexpr int kMaxGroups = 2;

struct GridCell {
  int row, unit;  // of the chunk, of the block
};

struct GridShape {
  int groups;  // of 8 units in a block

  FASTSEQ_HOST_DEVICE constexpr int units() const { return groups * kGroupUnits; }
  // All columns of the tape have a block.
  FASTSEQ_HOST_DEVICE constexpr int blocks(int tape_width) const { return ceil_div(tape_width, units()); }
  FASTSEQ_HOST_DEVICE constexpr int parts() const { return kGridWarps / groups; }
  FASTSEQ_HOST_DEVICE constexpr int group_of(int warp) const { return warp / parts(); }
  FASTSEQ_HOST_DEVICE constexpr int part_of(int warp) const { return warp % parts(); }
  FASTSEQ_HOST_DEVICE constexpr int cells() const { return groups * kGroupCells; }  // of a chunk, one a thread

  // Pairs of K tiles of a part, where the product is K deep; the last may reach beyond it.
  FASTSEQ_HOST_DEVICE constexpr int pairs(int K) const { return ceil_div(K, parts() * kPairK); }
  FASTSEQ_HOST_DEVICE static constexpr int streamed(int pairs, int kept) { return pairs > kept ? pairs - kept : 0; }
  // The first of the 8 numbers of K that a lane has of a pair; `pairs` of a part.
  FASTSEQ_HOST_DEVICE static constexpr int first_k(int part, int pairs, int pair, int lane) {
    return (part * pairs + pair) * kPairK + 8 * (lane % 4);
  }
  // Which of the 8 are in the lower (0) or upper (1) half of K of a pair's tile 0 or 1; the first of two.
  FASTSEQ_HOST_DEVICE static constexpr int within(int tile, int high) { return 4 * tile + 2 * high; }

  // Forward, the batch is n: a chunk is two products wide, two m tiles have the four gates, as in a cluster.
  static constexpr int kForwardSums = 16;  // of a lane and chunk
  FASTSEQ_HOST_DEVICE static constexpr int forward_sum(int n, int m, int r) { return (n * 2 + m) * 4 + r; }
  FASTSEQ_HOST_DEVICE static constexpr GridCell forward_cell(int thread) {
    const int lane = thread % kLanes, odd = thread / kLanes % 2, n = thread / (2 * kLanes) % 2;
    return {n * kTileRows + 2 * (lane % 4) + odd, thread / kGroupCells * kGroupUnits + lane / 4};
  }
  // Where the sum of a gate of a thread's cell is, among those of the lane that has the thread's own number.
  FASTSEQ_HOST_DEVICE static constexpr int forward_gate_sum(int thread, int gate) {
    return forward_sum(thread / (2 * kLanes) % 2, gate / 2, 2 * (gate % 2) + thread / kLanes % 2);
  }

  // Backward, the batch is m: a chunk is one product high, and n are the units of a group.
  static constexpr int kBackwardSums = 4;
  FASTSEQ_HOST_DEVICE static constexpr GridCell backward_cell(int thread) {
    const int lane = thread % kLanes, r = thread / kLanes % kBackwardSums;
    return {sum_row(lane, r), thread / kGroupCells * kGroupUnits + sum_n(lane, r)};
  }
  FASTSEQ_HOST_DEVICE static constexpr int backward_cell_sum(int thread) { return thread / kLanes % kBackwardSums; }

  // Offsets within the regions of shared memory, in numbers of the region's kind.
  FASTSEQ_HOST_DEVICE static constexpr int partial_at(int buffer, int warp, int sums, int sum, int lane) {
    return ((buffer * kGridWarps + warp) * sums + sum) * kLanes + lane;
  }
  FASTSEQ_HOST_DEVICE constexpr int slot_at(int chunk, int slots, int slot, int thread) const {
    return (chunk * slots + slot) * cells() + thread;
  }
};

// What a thread keeps of its cell in each chunk: its state, and what the step ahead needs from memory.
enum GridForwardSlot { kCell, kHidden, kForwardGates, kForwardFlags = kForwardGates + kGates, kForwardSlots };
enum GridBackwardSlot {
  kGradHidden,
  kGradCell,
  kBackwardGates,
  kCellBefore = kBackwardGates + kGates,
  kGradOutput,
  kBackwardFlags,
  kBackwardSlots
};

// The regions of shared memory, as offsets in bytes; each begins at a multiple of 16.
struct GridShared {
  int weights, partial, slots;
  std::int64_t bytes;

  FASTSEQ_HOST_DEVICE constexpr GridShared(const GridShape& s, int batch, int streamed, int fours, int sums, int kinds)
      : weights(0),
        partial(weights + kGridWarps * streamed * fours * kLanes * 16),
        slots(partial + 2 * kGridWarps * sums * kLanes * 4),
        bytes(slots + std::int64_t{ceil_div(batch, kChunkRows)} * kinds * s.cells() * 4) {}

  // Forward, K is the padded width of h; a pair has four fours of weights: two K tiles of two m tiles.
  FASTSEQ_HOST_DEVICE static constexpr GridShared forward(const GridShape& s, int batch, int width) {
    const int streamed = GridShape::streamed(s.pairs(width), kForwardPairs);
    return {s, batch, streamed, 4, GridShape::kForwardSums, kForwardSlots};
  }
  // Backward, K is four gates of all units; a pair has one four of weights: two K tiles of two words.
  FASTSEQ_HOST_DEVICE static constexpr GridShared backward(const GridShape& s, int batch, int hidden) {
    const int streamed = GridShape::streamed(s.pairs(kGates * hidden), kBackwardPairs);
    return {s, batch, streamed, 1, GridShape::kBackwardSums, kBackwardSlots};
  }
};

}  // namespace fastseq::cuda
