// The cluster-persistent LSTM forward: one launch for the whole sequence.
//
// A cluster of 8 or 16 multiprocessors keeps all of R on chip, in registers first and in shared memory what is left,
// and walks one tile of the batch through time. Nothing on the way from h to the next h touches global memory: the
// input projection came with the copy engine some steps ago, the new slice of h goes straight into the shared memory of
// every block, and one barrier of the cluster ends the step. Between arriving there and waiting lie the stores of y and
// of the tape, which nobody waits for. Two buffers of h suffice: who writes for the next step has seen every block
// arrive, and so finish reading, at the last. layout.h says who holds what.
#pragma once

#include "cuda/cluster.h"

namespace fastseq::cuda {

template <typename Number, int kBlocks, int kThreads, int kRegisterTiles, int kBatchTiles, bool kFlags>
FASTSEQ_KERNEL(kThreads)
lstm_cluster_forward(const FASTSEQ_PARAMETER ClusterForward p) {
  using Bits = typename Number::Bits;
  using machine::Floats4;
  using machine::Words4;
  const ClusterShape s{kBlocks, p.groups, kBatchTiles, kRegisterTiles};
  const ForwardShared regions(s);
  unsigned char* const shared = machine::shared_memory();
  Bits* const h_buffers = reinterpret_cast<Bits*>(shared + regions.h);
  Floats4* const swapped = reinterpret_cast<Floats4*>(shared + regions.exchange);
  Words4* const streamed = reinterpret_cast<Words4*>(shared + regions.weights);

  const int T = p.size.T, B = p.size.B, H = p.size.H, HP = p.size.HP;
  const int rank = machine::cluster_rank(), warp = machine::thread() / kLanes, lane = machine::thread() % kLanes;
  const int group = s.group_of(warp), part = s.part_of(warp);
  const int unit = s.forward_unit(rank, group, lane), own_unit = group * kGroupUnits + lane / 4;
  const bool unit_ok = unit < H;
  const Walk walk{T, B, p.reverse};

  // The weights of this warp: as many K tiles as fit in registers, the others in shared memory in the same form.
  const auto weights_at = [&](int tile, int m) {
    std::uint32_t words[4];
    FASTSEQ_UNROLLED
    for (int j = 0; j < 4; ++j) {
      const int k = s.forward_k(part, tile, lane, j, 0);
      const Bits* row =
          static_cast<const Bits*>(p.w_hh) + (static_cast<std::int64_t>(s.forward_gate(m, j)) * H + unit) * H + k;
      words[j] = two_numbers<Number>(row, unit_ok && k < H, row + 1, unit_ok && k + 1 < H);
    }
    return Words4{words[0], words[1], words[2], words[3]};
  };
  Words4 weights[kRegisterTiles][2];
  FASTSEQ_UNROLLED
  for (int tile = 0; tile < kRegisterTiles; ++tile) {
    FASTSEQ_UNROLLED
    for (int m = 0; m < 2; ++m)
      weights[tile][m] = tile < s.forward_tiles() ? weights_at(tile, m) : Words4{0u, 0u, 0u, 0u};
  }
  for (int i = 0; i < s.forward_streamed(); ++i)
    for (int m = 0; m < 2; ++m) streamed[s.forward_weight_at(warp, i, m, lane)] = weights_at(kRegisterTiles + i, m);

  float bias[kGates];
  FASTSEQ_UNROLLED
  for (int gate = 0; gate < kGates; ++gate) {
    const std::int64_t at = static_cast<std::int64_t>(gate) * H + unit;
    bias[gate] = wide_at<Number>(p.b_ih, at, unit_ok && p.b_ih) + wide_at<Number>(p.b_hh, at, unit_ok && p.b_hh);
  }

  const Ring ring{reinterpret_cast<float*>(shared + regions.ring),
                  nullptr,
                  reinterpret_cast<std::uint64_t*>(shared + regions.barriers),
                  p.gates,
                  nullptr,
                  p.gates_stride,
                  HP,
                  rank * s.units(),
                  s.tape_columns(rank, HP)};
  init_ring(ring.barriers);

  const int clusters = machine::blocks() / kBlocks;
  std::uint32_t gone = 0;  // steps of earlier tiles
  for (int first = machine::block() / kBlocks * s.rows(); first < B; first += clusters * s.rows(), gone += T) {
    const int rows = B - first < s.rows() ? B - first : s.rows();

    // Every block takes all of h0 itself, after its own last reads of what is there.
    machine::block_barrier();
    if (warp == 0)
      for (int n = 0; n < kRingSlots && n < T; ++n) ring.fill(s, gone + n, rows, walk.row(n, first), -1, lane);
    for (int i = machine::thread(); i < s.rows() * s.width(); i += s.threads()) {
      const int row = i / s.width(), k = i % s.width();
      bool present = row < rows && k < H;
      if (kFlags && present) present = (p.flags[walk.row(0, first + row)] & kCut) == 0;
      h_buffers[s.h_at(0, row, k)] =
          present ? static_cast<const Bits*>(p.h_state)[static_cast<std::int64_t>(first + row) * H + k]
                  : Number::narrow(0.0f);
    }
    float c[kBatchTiles];
    Bits h[kBatchTiles];
    std::uint8_t flags[kBatchTiles];
    FASTSEQ_UNROLLED
    for (int n = 0; n < kBatchTiles; ++n) {
      const int row = s.forward_row(part, lane, n);
      const bool ok = row < rows && unit_ok;
      const std::int64_t at = static_cast<std::int64_t>(first + row) * H + unit;
      c[n] = ok ? p.c_state[at] : 0.0f;
      h[n] = ok ? static_cast<const Bits*>(p.h_state)[at] : Number::narrow(0.0f);
      flags[n] = kFlags ? flag_at(p.flags, walk.row(0, first + row), row < rows) : std::uint8_t{0};
    }
    // All blocks have begun, and none still writes or reads for the tile before.
    machine::cluster_arrive();
    machine::cluster_wait();

    for (int step = 0; step < T; ++step) {
      const std::int64_t row0 = walk.row(step, first);
      const bool last = step + 1 == T;
      const int buffer = step & 1;

      std::uint8_t next_flags[kBatchTiles];
      if constexpr (kFlags) {
        FASTSEQ_UNROLLED
        for (int n = 0; n < kBatchTiles; ++n) {
          const int row = s.forward_row(part, lane, n);
          next_flags[n] = flag_at(p.flags, walk.row(step + 1, first + row), !last && row < rows);
        }
      }

      // The product: a chain of sums for each m tile and each eight rows, or two, of odd and even K tiles, where there
      // are registers to spare.
      constexpr int kChains = kBatchTiles == 1 && kThreads <= 256 ? 2 : 1;
      float sums[kChains][2][kBatchTiles][4] = {};
      FASTSEQ_UNROLLED
      for (int tile = 0; tile < kRegisterTiles; tile += 2) {
        if (tile < s.forward_tiles()) {
          FASTSEQ_UNROLLED
          for (int n = 0; n < kBatchTiles; ++n) {
            const Words4 right =
                machine::load_matrices(h_buffers + s.h_at(buffer, n * kTileRows + named_row(lane),
                                                          (part * s.forward_tiles() + tile) * kTileK + named_k(lane)));
            FASTSEQ_UNROLLED
            for (int m = 0; m < 2; ++m) {
              machine::multiply<Number>(sums[0][m][n], weights[tile][m], right.x, right.y);
              machine::multiply<Number>(sums[kChains - 1][m][n], weights[tile + 1][m], right.z, right.w);
            }
          }
        }
      }
      // There are no registers for the weights of several rounds.
      FASTSEQ_ROLLED
      for (int i = 0; i < s.forward_streamed(); i += 2) {
        FASTSEQ_UNROLLED
        for (int n = 0; n < kBatchTiles; ++n) {
          const int tile = part * s.forward_tiles() + kRegisterTiles + i;
          const Words4 right = machine::load_matrices(
              h_buffers + s.h_at(buffer, n * kTileRows + named_row(lane), tile * kTileK + named_k(lane)));
          FASTSEQ_UNROLLED
          for (int m = 0; m < 2; ++m) {
            machine::multiply<Number>(sums[0][m][n], streamed[s.forward_weight_at(warp, i, m, lane)], right.x, right.y);
            machine::multiply<Number>(sums[kChains - 1][m][n], streamed[s.forward_weight_at(warp, i + 1, m, lane)],
                                      right.z, right.w);
          }
        }
      }
      if constexpr (kChains == 2) {
        FASTSEQ_UNROLLED
        for (int m = 0; m < 2; ++m) {
          FASTSEQ_UNROLLED
          for (int r = 0; r < 4; ++r) sums[0][m][0][r] += sums[1][m][0][r];
        }
      }

      // Each part gives the partner's column of its half of the sums, and takes the other half of its own.
      const auto column = [&](int n, int which) {
        const auto& a = sums[0][0][n];
        const auto& b = sums[0][1][n];
        return which ? Floats4{a[1], a[3], b[1], b[3]} : Floats4{a[0], a[2], b[0], b[2]};
      };
      FASTSEQ_UNROLLED
      for (int n = 0; n < kBatchTiles; ++n) swapped[s.exchange_at(warp, n, lane)] = column(n, 1 - part);
      machine::pair_barrier(group);
      ring.wait(gone + step);

      CellForward cells[kBatchTiles];
      Bits out[kBatchTiles];
      FASTSEQ_UNROLLED
      for (int n = 0; n < kBatchTiles; ++n) {
        const int row = s.forward_row(part, lane, n);
        const Floats4 mine = column(n, part), other = swapped[s.exchange_at(warp ^ 1, n, lane)];
        const float* x = ring.gates + s.gates_at(ring_slot(gone + step), row, 0, own_unit);
        const bool cut = kFlags && (flags[n] & kCut), padding = kFlags && (flags[n] & kPadding);
        if (cut) c[n] = 0.0f, h[n] = Number::narrow(0.0f);
        cells[n] = lstm_cell(mine.x + other.x + x[0] + bias[0], mine.y + other.y + x[s.units()] + bias[1],
                             mine.z + other.z + x[2 * s.units()] + bias[2],
                             mine.w + other.w + x[3 * s.units()] + bias[3], c[n]);
        if (!padding) {
          c[n] = cells[n].c;
          // Rows and units beyond the edges may find anything in the ring. Their h must be zero: it meets weights.
          h[n] = Number::narrow(unit_ok && row < rows ? cells[n].h : 0.0f);
        }
        out[n] = padding ? Number::narrow(0.0f) : h[n];
      }

      if (!last) {
        FASTSEQ_UNROLLED
        for (int n = 0; n < kBatchTiles; ++n) {
          // What the next step's product will see: nothing where it begins anew. Lanes 4 apart hold units of one row.
          const bool cut = kFlags && (next_flags[n] & kCut);
          const std::uint32_t bits = cut ? Number::narrow(0.0f) : h[n];
          const std::uint32_t near = machine::shuffle_xor(bits, 4);
          const std::uint32_t word = lane & 4 ? near | bits << 16 : bits | near << 16;
          Words4 chunk;
          chunk.x = machine::shuffle(word, lane % 4);
          chunk.y = machine::shuffle(word, lane % 4 + 8);
          chunk.z = machine::shuffle(word, lane % 4 + 16);
          chunk.w = machine::shuffle(word, lane % 4 + 24);
          Bits* to =
              h_buffers + s.h_at(1 - buffer, s.forward_row(part, lane, n), rank * s.units() + group * kGroupUnits);
          FASTSEQ_UNROLLED
          for (int i = 0; i < kBlocks; i += ClusterShape::kReceiverStride)
            machine::store_remote(to, s.first_receiver(lane) + i, chunk);
        }
        machine::cluster_arrive();
      }

      FASTSEQ_UNROLLED
      for (int n = 0; n < kBatchTiles; ++n) {
        const int row = s.forward_row(part, lane, n);
        const std::int64_t at = row0 + row;
        if (row < rows && unit_ok) static_cast<Bits*>(p.y)[at * H + unit] = out[n];
        if (p.save && row < rows && unit < HP) {
          float* tape = p.gates + at * p.gates_stride + unit;
          tape[0] = cells[n].gates.i;
          tape[HP] = cells[n].gates.f;
          tape[2 * HP] = cells[n].gates.g;
          tape[3 * HP] = cells[n].gates.o;
          p.c_tape[at * HP + unit] = c[n];
        }
        if (kFlags) flags[n] = next_flags[n];
      }
      // The slot of the step before: every thread has read it, since all have met at the end of that step.
      if (warp == 0 && step > 0 && step - 1 + kRingSlots < T)
        ring.fill(s, gone + step - 1 + kRingSlots, rows, walk.row(step - 1 + kRingSlots, first), -1, lane);
      if (!last) machine::cluster_wait();
    }

    FASTSEQ_UNROLLED
    for (int n = 0; n < kBatchTiles; ++n) {
      const int row = s.forward_row(part, lane, n);
      if (row < rows && unit_ok) {
        const std::int64_t at = static_cast<std::int64_t>(first + row) * H + unit;
        static_cast<Bits*>(p.h_state)[at] = h[n];
        p.c_state[at] = c[n];
      }
    }
  }
}

}  // namespace fastseq::cuda
