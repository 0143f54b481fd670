// Who holds what in the cluster-persistent LSTM: which thread owns which weight, cell and row of the batch, where it
// lies in shared memory, and which block sends which slice to which. Plain index arithmetic, the same on the GPU and in
// the tests that check it exhaustively on a CPU.
//
// A cluster of blocks owns one tile of the batch and all of R. Its units are cut into groups of 8, a whole number of
// groups to each block, so the padded width (blocks * units) may exceed H; what lies beyond is zero. A group has two
// warps, its two parts.
//
// Products are mma.m16n8k16 with the batch as n. Forward, a group's 32 gate rows are two m tiles: rows 0-7 and 8-15 of
// the first are its input and forget gates, of the second cell and output gates. So the four sums of a cell end in one
// thread. The two warps of a group halve K and swap a column of sums each. Backward, a block multiplies R^T, all units
// by its own gate rows, with the gates' gradients of its own units, and every sum goes to the block that owns the unit.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSEQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTSEQ_HOST_DEVICE inline
#endif

namespace fastseq::cuda {

constexpr int kLanes = 32;
constexpr int kGates = 4;         // i, f, g, o
constexpr int kGroupUnits = 8;    // units of a group
constexpr int kTileRows = 8;      // rows of the batch that one product has
constexpr int kTileK = 16;        // depth of one product
constexpr int kParts = 2;         // warps of a group
constexpr int kRingSlots = 4;     // steps whose input is on its way or waiting
constexpr int kHalfPad = 8;       // numbers between rows of half type: shifts the banks by four words a row
constexpr int kFloatPad = 4;      // the same for rows of float
constexpr int kTapeLanes = 16;    // fastseq.ops.tape.LANES: the tape's columns are a multiple of it
constexpr std::uint8_t kCut = 1;  // step flags, as fastseq.ops.flags has them
constexpr std::uint8_t kPadding = 2;

FASTSEQ_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Place of number `half` of register `j` of a lane in the left operand of m16n8k16.
FASTSEQ_HOST_DEVICE constexpr int left_row(int lane, int j) { return lane / 4 + 8 * (j % 2); }
FASTSEQ_HOST_DEVICE constexpr int left_k(int lane, int j, int half) { return 2 * (lane % 4) + half + 8 * (j / 2); }
// Place of register `j` in the right operand: n is the lane's, k begins a pair.
FASTSEQ_HOST_DEVICE constexpr int right_n(int lane) { return lane / 4; }
FASTSEQ_HOST_DEVICE constexpr int right_k(int lane, int j) { return 2 * (lane % 4) + 8 * j; }
// Place of sum `r` of a lane.
FASTSEQ_HOST_DEVICE constexpr int sum_row(int lane, int r) { return lane / 4 + 8 * (r / 2); }
FASTSEQ_HOST_DEVICE constexpr int sum_n(int lane, int r) { return 2 * (lane % 4) + r % 2; }

// Where the row of the right operand begins that a lane names to load_matrices: four 8x8 matrices are two K tiles.
FASTSEQ_HOST_DEVICE constexpr int named_row(int lane) { return lane % 8; }
FASTSEQ_HOST_DEVICE constexpr int named_k(int lane) { return 8 * (lane / 8); }

struct ClusterShape {
  int blocks;          // of a cluster: 8 or 16
  int groups;          // of 8 units in a block
  int batch_tiles;     // of 8 rows in a cluster's tile of the batch
  int register_tiles;  // K tiles of its weights that a warp keeps in registers; even

  FASTSEQ_HOST_DEVICE constexpr int units() const { return groups * kGroupUnits; }    // of a block
  FASTSEQ_HOST_DEVICE constexpr int width() const { return blocks * units(); }        // of a cluster: H, padded
  FASTSEQ_HOST_DEVICE constexpr int rows() const { return batch_tiles * kTileRows; }  // of the batch
  FASTSEQ_HOST_DEVICE constexpr int warps() const { return groups * kParts; }         // of a block
  FASTSEQ_HOST_DEVICE constexpr int threads() const { return warps() * kLanes; }      // of a block
  FASTSEQ_HOST_DEVICE constexpr int group_of(int warp) const { return warp / kParts; }
  FASTSEQ_HOST_DEVICE constexpr int part_of(int warp) const { return warp % kParts; }
  // Columns of a tape of HP columns that a block reads and writes, from its first unit on.
  FASTSEQ_HOST_DEVICE constexpr int tape_columns(int rank, int tape_width) const {
    const int left = tape_width - rank * units();
    return left < 0 ? 0 : (left < units() ? left : units());
  }

  // Forward weights: K tile `tile` of a part, m tile 0 or 1, register j.
  FASTSEQ_HOST_DEVICE constexpr int forward_tiles() const { return width() / (kParts * kTileK); }
  FASTSEQ_HOST_DEVICE constexpr int forward_streamed() const {
    return forward_tiles() > register_tiles ? forward_tiles() - register_tiles : 0;
  }
  FASTSEQ_HOST_DEVICE static constexpr int forward_gate(int m, int j) { return 2 * m + j % 2; }
  FASTSEQ_HOST_DEVICE constexpr int forward_unit(int rank, int group, int lane) const {
    return rank * units() + group * kGroupUnits + lane / 4;
  }
  FASTSEQ_HOST_DEVICE constexpr int forward_k(int part, int tile, int lane, int j, int half) const {
    return (part * forward_tiles() + tile) * kTileK + left_k(lane, j, half);
  }
  // Forward cells: the column of sums that a part keeps; it gives the other to its partner.
  FASTSEQ_HOST_DEVICE static constexpr int forward_row(int part, int lane, int n) {
    return n * kTileRows + sum_n(lane, part);
  }
  // A lane sends the 8 units of its row to every eighth block.
  FASTSEQ_HOST_DEVICE static constexpr int first_receiver(int lane) { return lane / 4; }
  static constexpr int kReceiverStride = 8;

  // Backward weights: m tile `m` of a warp, K tile `tile` over the block's own gate rows.
  FASTSEQ_HOST_DEVICE constexpr int backward_m_tiles() const { return blocks / 4; }
  FASTSEQ_HOST_DEVICE constexpr int backward_tiles() const { return kGates * units() / kTileK; }
  FASTSEQ_HOST_DEVICE constexpr int backward_streamed() const {
    return backward_tiles() > register_tiles ? backward_tiles() - register_tiles : 0;
  }
  FASTSEQ_HOST_DEVICE constexpr int backward_unit(int warp, int m, int lane, int j) const {
    return (warp * backward_m_tiles() + m) * 16 + left_row(lane, j);
  }
  FASTSEQ_HOST_DEVICE static constexpr int backward_k(int tile, int lane, int j, int half) {
    return tile * kTileK + left_k(lane, j, half);
  }
  FASTSEQ_HOST_DEVICE constexpr int gate_of(int k) const { return k / units(); }
  FASTSEQ_HOST_DEVICE constexpr int unit_of(int k) const { return k % units(); }
  // The block that owns the sums of rows 8 * high to 8 * high + 7 of an m tile, and the unit there of a lane.
  FASTSEQ_HOST_DEVICE constexpr int owner(int warp, int m, int high) const {
    return ((warp * backward_m_tiles() + m) * 2 + high) / groups;
  }
  FASTSEQ_HOST_DEVICE constexpr int owned_unit(int warp, int m, int high, int lane) const {
    return ((warp * backward_m_tiles() + m) * 2 + high) % groups * kGroupUnits + lane / 4;
  }
  // Backward cells: eight rows of a unit side by side, as the sums arrive.
  FASTSEQ_HOST_DEVICE constexpr int backward_cell_unit(int warp, int lane) const {  // of the block's units
    return group_of(warp) * kGroupUnits + part_of(warp) * 4 + lane / 8;
  }
  FASTSEQ_HOST_DEVICE static constexpr int backward_cell_row(int lane, int n) { return n * kTileRows + lane % 8; }
  // The eight gradients of a gate that a thread writes to memory at once, if chunk < chunks().
  FASTSEQ_HOST_DEVICE constexpr int chunks() const { return rows() * kGates * groups; }
  FASTSEQ_HOST_DEVICE constexpr int chunk_row(int chunk) const { return chunk / (kGates * groups); }
  FASTSEQ_HOST_DEVICE constexpr int chunk_gate(int chunk) const { return chunk / groups % kGates; }
  FASTSEQ_HOST_DEVICE constexpr int chunk_unit(int chunk) const { return chunk % groups * kGroupUnits; }

  // Offsets within the regions of shared memory, in numbers of the region's kind.
  FASTSEQ_HOST_DEVICE constexpr int h_pitch() const { return width() + kHalfPad; }
  FASTSEQ_HOST_DEVICE constexpr int h_at(int buffer, int row, int k) const {
    return (buffer * rows() + row) * h_pitch() + k;
  }
  FASTSEQ_HOST_DEVICE constexpr int exchange_at(int warp, int n, int lane) const {  // in fours
    return (n * warps() + warp) * kLanes + lane;
  }
  FASTSEQ_HOST_DEVICE constexpr int gates_pitch() const { return kGates * units() + kFloatPad; }
  FASTSEQ_HOST_DEVICE constexpr int gates_at(int slot, int row, int gate, int unit) const {
    return (slot * rows() + row) * gates_pitch() + gate * units() + unit;
  }
  FASTSEQ_HOST_DEVICE constexpr int c_pitch() const { return units() + kFloatPad; }
  FASTSEQ_HOST_DEVICE constexpr int c_at(int slot, int row, int unit) const {
    return (slot * rows() + row) * c_pitch() + unit;
  }
  FASTSEQ_HOST_DEVICE constexpr int forward_weight_at(int warp, int streamed, int m, int lane) const {  // in fours
    return ((warp * forward_streamed() + streamed) * 2 + m) * kLanes + lane;
  }
  FASTSEQ_HOST_DEVICE constexpr int backward_weight_at(int warp, int streamed, int m, int lane) const {  // in fours
    return ((warp * backward_streamed() + streamed) * backward_m_tiles() + m) * kLanes + lane;
  }
  FASTSEQ_HOST_DEVICE constexpr int dgates_pitch() const { return kGates * units() + kHalfPad; }
  FASTSEQ_HOST_DEVICE constexpr int dgates_at(int row, int k) const { return row * dgates_pitch() + k; }
  // Four units one after the other, eight rows of each, are in 32 banks: of 16 rows every other pair of units has the
  // second half first.
  FASTSEQ_HOST_DEVICE constexpr int arrived_at(int buffer, int sender, int unit, int row) const {
    const int place = row ^ (unit / 2 % 2 * (rows() - kTileRows));
    return ((buffer * blocks + sender) * units() + unit) * rows() + place;
  }
};

// The regions of shared memory, as offsets in bytes; each begins at a multiple of 16.
struct ForwardShared {
  int h, exchange, ring, weights, barriers, bytes;

  FASTSEQ_HOST_DEVICE explicit constexpr ForwardShared(const ClusterShape& s)
      : h(0),
        exchange(h + 2 * s.rows() * s.h_pitch() * 2),
        ring(exchange + s.batch_tiles * s.warps() * kLanes * 16),
        weights(ring + kRingSlots * s.rows() * s.gates_pitch() * 4),
        barriers(weights + s.warps() * s.forward_streamed() * 2 * kLanes * 16),
        bytes(barriers + kRingSlots * 8) {}
};

struct BackwardShared {
  int arrived, dgates, ring, ring_c, weights, barriers, bytes;

  FASTSEQ_HOST_DEVICE explicit constexpr BackwardShared(const ClusterShape& s)
      : arrived(0),
        dgates(arrived + 2 * s.blocks * s.units() * s.rows() * 4),
        ring(dgates + s.rows() * s.dgates_pitch() * 2),
        ring_c(ring + kRingSlots * s.rows() * s.gates_pitch() * 4),
        weights(ring_c + kRingSlots * s.rows() * s.c_pitch() * 4),
        barriers(weights + s.warps() * s.backward_streamed() * s.backward_m_tiles() * kLanes * 16),
        bytes(barriers + kRingSlots * 8) {}
};

// Step `n` of those that a cluster has gone through, over all its tiles of the batch: its slot of the ring, and the
// parity of that slot's barrier. The count may begin anew, since 2^32 is a whole number of rounds of both parities.
static_assert((std::uint64_t{1} << 32) % (2 * kRingSlots) == 0);
FASTSEQ_HOST_DEVICE constexpr int ring_slot(std::uint32_t n) { return static_cast<int>(n % kRingSlots); }
FASTSEQ_HOST_DEVICE constexpr int ring_parity(std::uint32_t n) { return static_cast<int>(n / kRingSlots % 2); }

// What the kernels of both passes were compiled for: blocks of the cluster, threads that a block may have, K tiles of
// weights that fit their registers then, and eights of rows in a tile of the batch.
struct Build {
  int blocks, threads, forward_register_tiles, backward_register_tiles, batch_tiles;
};
constexpr Build kBuilds[] = {
    {16, 256, 16, 8, 1}, {16, 384, 12, 6, 1}, {8, 512, 6, 4, 1},
    {16, 256, 16, 8, 2}, {16, 384, 8, 4, 2},  {8, 512, 4, 2, 2},
};
constexpr int kBuildCount = sizeof(kBuilds) / sizeof(kBuilds[0]);

// The shape by which a build serves H units in a pass; it has no groups where the block would have too many threads.
FASTSEQ_HOST_DEVICE constexpr ClusterShape cluster_shape(const Build& build, int hidden, bool backward) {
  const int groups = ceil_div(hidden, build.blocks * kGroupUnits);
  const bool fits = groups * kParts * kLanes <= build.threads;
  return {build.blocks, fits ? groups : 0, build.batch_tiles,
          backward ? build.backward_register_tiles : build.forward_register_tiles};
}

}  // namespace fastseq::cuda
