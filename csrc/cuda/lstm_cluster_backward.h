// The cluster-persistent LSTM's BPTT: one launch for the whole sequence.
//
// As in the forward a cluster keeps all of R on chip and owns a tile of the batch. A block makes the gates' gradients
// of its units, multiplies them by its own rows of R, transposed, and so gets its share of the gradient of every h:
// these shares go straight to the blocks that own the units, each sender into a place of its own, and are added there
// in the order of the senders. That moves H floats a block and row where giving everyone all gates' gradients would
// move 4H numbers, and no sum hangs on who comes first. One barrier of the cluster ends the step.
#pragma once

#include "cuda/cluster.h"

namespace fastseq::cuda {

// Beside the flags of a step: the step after it, in the order of the forward, began anew.
constexpr std::uint8_t kCutAfter = 4;

template <typename Number, int kBlocks, int kThreads, int kRegisterTiles, int kBatchTiles, bool kFlags>
FASTSEQ_KERNEL(kThreads)
lstm_cluster_backward(const FASTSEQ_PARAMETER ClusterBackward p) {
  using Bits = typename Number::Bits;
  using machine::Floats2;
  using machine::Words4;
  const ClusterShape s{kBlocks, p.groups, kBatchTiles, kRegisterTiles};
  const BackwardShared regions(s);
  constexpr int kMTiles = ClusterShape{kBlocks, 1, kBatchTiles, kRegisterTiles}.backward_m_tiles();
  unsigned char* const shared = machine::shared_memory();
  float* const arrived = reinterpret_cast<float*>(shared + regions.arrived);
  Bits* const dgates = reinterpret_cast<Bits*>(shared + regions.dgates);
  Words4* const streamed = reinterpret_cast<Words4*>(shared + regions.weights);

  const int T = p.size.T, B = p.size.B, H = p.size.H, HP = p.size.HP;
  const int rank = machine::cluster_rank(), warp = machine::thread() / kLanes, lane = machine::thread() % kLanes;
  const int own_unit = s.backward_cell_unit(warp, lane), unit = rank * s.units() + own_unit;
  const bool unit_ok = unit < H;
  const Walk walk{T, B, !p.reverse};

  const auto weights_at = [&](int tile, int m) {
    std::uint32_t words[4];
    FASTSEQ_UNROLLED
    for (int j = 0; j < 4; ++j) {
      const int of = s.backward_unit(warp, m, lane, j), k = s.backward_k(tile, lane, j, 0);
      // Two gate rows that follow one another: units are even in number, so both are of the same gate.
      const int gate_unit = rank * s.units() + s.unit_of(k);
      const Bits* low =
          static_cast<const Bits*>(p.w_hh) + (static_cast<std::int64_t>(s.gate_of(k)) * H + gate_unit) * H + of;
      words[j] = two_numbers<Number>(low, of < H && gate_unit < H, low + H, of < H && gate_unit + 1 < H);
    }
    return Words4{words[0], words[1], words[2], words[3]};
  };
  Words4 weights[kRegisterTiles][kMTiles];
  FASTSEQ_UNROLLED
  for (int tile = 0; tile < kRegisterTiles; ++tile) {
    FASTSEQ_UNROLLED
    for (int m = 0; m < kMTiles; ++m)
      weights[tile][m] = tile < s.backward_tiles() ? weights_at(tile, m) : Words4{0u, 0u, 0u, 0u};
  }
  FASTSEQ_ROLLED
  for (int i = 0; i < s.backward_streamed(); ++i)
    for (int m = 0; m < kMTiles; ++m)
      streamed[s.backward_weight_at(warp, i, m, lane)] = weights_at(kRegisterTiles + i, m);

  const Ring ring{reinterpret_cast<float*>(shared + regions.ring),
                  reinterpret_cast<float*>(shared + regions.ring_c),
                  reinterpret_cast<std::uint64_t*>(shared + regions.barriers),
                  p.gates,
                  p.c_tape,
                  p.gates_stride,
                  HP,
                  rank * s.units(),
                  s.tape_columns(rank, HP)};
  init_ring(ring.barriers);

  const int clusters = machine::blocks() / kBlocks;
  std::uint32_t gone = 0;  // steps of earlier tiles
  for (int first = machine::block() / kBlocks * s.rows(); first < B; first += clusters * s.rows(), gone += T) {
    const int rows = B - first < s.rows() ? B - first : s.rows();
    const auto fill = [&](int n) {
      ring.fill(s, gone + n, rows, walk.row(n, first), n + 1 < T ? walk.row(n + 1, first) : -1, lane);
    };

    machine::block_barrier();  // all reads of the tile before are done
    if (warp == 0)
      for (int n = 0; n < kRingSlots && n < T; ++n) fill(n);
    float dh[kBatchTiles], dc[kBatchTiles], dy[kBatchTiles];
    std::uint8_t flags[kBatchTiles];
    FASTSEQ_UNROLLED
    for (int n = 0; n < kBatchTiles; ++n) {
      const int row = s.backward_cell_row(lane, n);
      const bool ok = row < rows && unit_ok;
      const std::int64_t at = static_cast<std::int64_t>(first + row) * H + unit;
      dh[n] = ok ? p.dh_state[at] : 0.0f;
      dc[n] = ok ? p.dc_state[at] : 0.0f;
      dy[n] = wide_at<Number>(p.grad_y, walk.row(0, first + row) * H + unit, ok && p.grad_y);
      flags[n] = kFlags ? flag_at(p.flags, walk.row(0, first + row), row < rows) : std::uint8_t{0};
    }
    // All blocks have begun, and none still writes or reads for the tile before.
    machine::cluster_arrive();
    machine::cluster_wait();

    for (int step = 0; step < T; ++step) {
      const std::int64_t row0 = walk.row(step, first);
      const bool last = step + 1 == T;
      const int buffer = step & 1;

      ring.wait(gone + step);
      const int slot = ring_slot(gone + step);
      FASTSEQ_UNROLLED
      for (int n = 0; n < kBatchTiles; ++n) {
        const int row = s.backward_cell_row(lane, n);
        const bool ok = row < rows && unit_ok;
        const float* a = ring.gates + s.gates_at(slot, row, 0, own_unit);
        const bool cut = kFlags && (flags[n] & kCut), padding = kFlags && (flags[n] & kPadding);
        float c = last ? wide_at<Number>(p.c0, static_cast<std::int64_t>(first + row) * H + unit, ok)
                       : ring.c[s.c_at(slot, row, own_unit)];
        if (cut) c = 0.0f;
        // The shares of all blocks, in order; four sums at once, since one chain of 16 would be waited for.
        float share[4] = {};
        if (step > 0 && !(kFlags && (flags[n] & kCutAfter))) {
          FASTSEQ_UNROLLED
          for (int sender = 0; sender < kBlocks; ++sender)
            share[sender % 4] += arrived[s.arrived_at(1 - buffer, sender, own_unit, row)];
        }
        const float total = dh[n] + ((share[0] + share[1]) + (share[2] + share[3])) + (padding ? 0.0f : dy[n]);
        CellBackward d = lstm_cell_gradient({a[0], a[s.units()], a[2 * s.units()], a[3 * s.units()]}, c, total, dc[n]);
        dh[n] = 0.0f;
        if (padding) {
          d = {{0.0f, 0.0f, 0.0f, 0.0f}, dc[n]};
          dh[n] = total;
        }
        if (cut) dh[n] = d.c = 0.0f;
        if (!ok) d = {};  // the ring may hold anything there, and these gradients meet weights
        dc[n] = d.c;
        Bits* to = dgates + s.dgates_at(row, own_unit);
        to[0] = Number::narrow(d.sums.i);
        to[s.units()] = Number::narrow(d.sums.f);
        to[2 * s.units()] = Number::narrow(d.sums.g);
        to[3 * s.units()] = Number::narrow(d.sums.o);
      }
      machine::block_barrier();

      // Eight gradients of a gate for memory, taken before the next step may overwrite them.
      const int chunk = machine::thread();
      Words4 to_store{};
      if (chunk < s.chunks())
        to_store = *reinterpret_cast<const Words4*>(
            dgates + s.dgates_at(s.chunk_row(chunk), s.chunk_gate(chunk) * s.units() + s.chunk_unit(chunk)));

      if (!last) {
        float sums[kMTiles][kBatchTiles][4] = {};
        FASTSEQ_UNROLLED
        for (int tile = 0; tile < kRegisterTiles; tile += 2) {
          if (tile < s.backward_tiles()) {
            FASTSEQ_UNROLLED
            for (int n = 0; n < kBatchTiles; ++n) {
              const Words4 right = machine::load_matrices(
                  dgates + s.dgates_at(n * kTileRows + named_row(lane), tile * kTileK + named_k(lane)));
              FASTSEQ_UNROLLED
              for (int m = 0; m < kMTiles; ++m) {
                machine::multiply<Number>(sums[m][n], weights[tile][m], right.x, right.y);
                machine::multiply<Number>(sums[m][n], weights[tile + 1][m], right.z, right.w);
              }
            }
          }
        }
        // There are no registers for the weights of several rounds.
        FASTSEQ_ROLLED
        for (int i = 0; i < s.backward_streamed(); i += 2) {
          FASTSEQ_UNROLLED
          for (int n = 0; n < kBatchTiles; ++n) {
            const Words4 right = machine::load_matrices(
                dgates + s.dgates_at(n * kTileRows + named_row(lane), (kRegisterTiles + i) * kTileK + named_k(lane)));
            FASTSEQ_UNROLLED
            for (int m = 0; m < kMTiles; ++m) {
              machine::multiply<Number>(sums[m][n], streamed[s.backward_weight_at(warp, i, m, lane)], right.x, right.y);
              machine::multiply<Number>(sums[m][n], streamed[s.backward_weight_at(warp, i + 1, m, lane)], right.z,
                                        right.w);
            }
          }
        }
        FASTSEQ_UNROLLED
        for (int m = 0; m < kMTiles; ++m) {
          FASTSEQ_UNROLLED
          for (int high = 0; high < 2; ++high) {
            const int owner = s.owner(warp, m, high), owned = s.owned_unit(warp, m, high, lane);
            FASTSEQ_UNROLLED
            for (int n = 0; n < kBatchTiles; ++n)
              machine::store_remote(arrived + s.arrived_at(buffer, rank, owned, n * kTileRows + sum_n(lane, 0)), owner,
                                    Floats2{sums[m][n][2 * high], sums[m][n][2 * high + 1]});
          }
        }
        machine::cluster_arrive();
      }

      if (chunk < s.chunks() && s.chunk_row(chunk) < rows) {
        const int chunk_first = rank * s.units() + s.chunk_unit(chunk);
        Bits* to = static_cast<Bits*>(p.dgates) + (row0 + s.chunk_row(chunk)) * p.dgates_stride +
                   static_cast<std::int64_t>(s.chunk_gate(chunk)) * H + chunk_first;
        if (H % kGroupUnits == 0 && p.dgates_stride % kGroupUnits == 0) {
          if (chunk_first < H) *reinterpret_cast<Words4*>(to) = to_store;
        } else {
          const std::uint32_t words[] = {to_store.x, to_store.y, to_store.z, to_store.w};
          FASTSEQ_UNROLLED
          for (int i = 0; i < kGroupUnits; ++i)
            if (chunk_first + i < H) to[i] = static_cast<Bits>(words[i / 2] >> (16 * (i % 2)));
        }
      }
      // The slot of the step before: every thread has read it, since all have met since.
      if (warp == 0 && step > 0 && step - 1 + kRingSlots < T) fill(step - 1 + kRingSlots);
      if (!last) {
        FASTSEQ_UNROLLED
        for (int n = 0; n < kBatchTiles; ++n) {
          const int row = s.backward_cell_row(lane, n);
          const std::int64_t at = walk.row(step + 1, first + row);
          dy[n] = wide_at<Number>(p.grad_y, at * H + unit, p.grad_y && row < rows && unit_ok);
          if (kFlags) {
            const std::uint8_t cut_after = flags[n] & kCut ? kCutAfter : 0;
            flags[n] = flag_at(p.flags, at, row < rows) | cut_after;
          }
        }
        machine::cluster_wait();
      }
    }

    FASTSEQ_UNROLLED
    for (int n = 0; n < kBatchTiles; ++n) {
      const int row = s.backward_cell_row(lane, n);
      if (row < rows && unit_ok) {
        const std::int64_t at = static_cast<std::int64_t>(first + row) * H + unit;
        p.dh_state[at] = dh[n];
        p.dc_state[at] = dc[n];
      }
    }
  }
}

}  // namespace fastseq::cuda
