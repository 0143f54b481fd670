// Exhaustive checks of cuda/layout.h, cuda/grid_layout.h and cuda/number.h, without a GPU: for every build and every
// hidden size that it serves, each weight, cell, chunk and sum has exactly one place and one owner; regions do not
// overlap; the accesses of a warp meet no more banks twice than is known; half types round as they should. Prints what
// was checked.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "cuda/grid_layout.h"
#include "cuda/layout.h"
#include "cuda/number.h"

namespace {

using namespace fastseq::cuda;

void require(bool right, const char* what, const ClusterShape& s) {
  if (right) return;
  std::printf("wrong: %s, with %d blocks of %d groups, %d tiles of the batch, %d register tiles\n", what, s.blocks,
              s.groups, s.batch_tiles, s.register_tiles);
  std::exit(1);
}

// Marks of things that must each be met exactly once.
struct Once {
  std::vector<unsigned char> met;
  explicit Once(std::size_t count) : met(count) {}
  bool meet(std::size_t at) { return at < met.size() && met[at]++ == 0; }
  bool all() const {
    for (const unsigned char count : met)
      if (count != 1) return false;
    return true;
  }
};

std::size_t at(int a) { return static_cast<std::size_t>(a); }

void check_forward(const ClusterShape& s) {
  // Every weight [gate, unit, k] is one number of one register of one lane, in a tile that is held or streamed.
  Once weights(at(kGates) * at(s.width()) * at(s.width()));
  for (int rank = 0; rank < s.blocks; ++rank)
    for (int warp = 0; warp < s.warps(); ++warp)
      for (int tile = 0; tile < s.forward_tiles(); ++tile)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int m = 0; m < 2; ++m)
            for (int j = 0; j < 4; ++j)
              for (int half = 0; half < 2; ++half) {
                const int unit = s.forward_unit(rank, s.group_of(warp), lane), gate = s.forward_gate(m, j);
                const int k = s.forward_k(s.part_of(warp), tile, lane, j, half);
                require(weights.meet((at(gate) * at(s.width()) + at(unit)) * at(s.width()) + at(k)),
                        "a weight of the forward has two places", s);
              }
  require(weights.all(), "a weight of the forward has no place", s);
  require(s.forward_tiles() % 2 == 0 && s.register_tiles % 2 == 0, "K tiles come in pairs", s);

  // Every cell (unit, row) has one thread; the sums that this thread ends up with are those of its cell's four gates.
  Once cells(at(s.width()) * at(s.rows()));
  for (int rank = 0; rank < s.blocks; ++rank)
    for (int warp = 0; warp < s.warps(); ++warp)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int n = 0; n < s.batch_tiles; ++n) {
          const int part = s.part_of(warp), unit = s.forward_unit(rank, s.group_of(warp), lane);
          require(cells.meet(at(s.forward_row(part, lane, n)) * at(s.width()) + at(unit)), "a cell has two threads", s);
          for (int gate = 0; gate < kGates; ++gate) {
            const int r = 2 * (gate % 2) + part;  // as the kernel picks them, from m tile gate / 2
            require(s.forward_gate(gate / 2, sum_row(lane, r) / 8) == gate && sum_row(lane, r) % 8 == lane / 4 &&
                        n * kTileRows + sum_n(lane, r) == s.forward_row(part, lane, n),
                    "a sum is not of its thread's cell", s);
          }
        }
  require(cells.all(), "a cell has no thread", s);

  // Every block receives every h of the other buffer once, and what it receives lies in rows that load_matrices reads.
  for (int receiver = 0; receiver < s.blocks; ++receiver) {
    Once received(at(s.rows()) * at(s.width()));
    for (int rank = 0; rank < s.blocks; ++rank)
      for (int warp = 0; warp < s.warps(); ++warp)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int n = 0; n < s.batch_tiles; ++n)
            for (int i = 0; i < s.blocks; i += ClusterShape::kReceiverStride) {
              if (s.first_receiver(lane) + i != receiver) continue;
              const int row = s.forward_row(s.part_of(warp), lane, n);
              const int k = rank * s.units() + s.group_of(warp) * kGroupUnits;
              require(s.h_at(1, row, k) % 8 == 0, "a chunk of h is not aligned", s);
              for (int u = 0; u < kGroupUnits; ++u)
                require(received.meet(at(row) * at(s.width()) + at(k + u)), "an h is received twice", s);
            }
    require(received.all(), "an h is not received", s);
  }

  const ForwardShared regions(s);
  const int ends[] = {regions.h, regions.exchange, regions.ring, regions.weights, regions.barriers, regions.bytes};
  for (int i = 0; i < 5; ++i) require(ends[i] <= ends[i + 1] && ends[i] % 16 == 0, "regions overlap", s);
  require(2 * (s.h_at(1, s.rows() - 1, s.width() - 1) + 1) <= regions.exchange, "h is larger than its region", s);
  require(16 * (s.exchange_at(s.warps() - 1, s.batch_tiles - 1, kLanes - 1) + 1) <= regions.ring - regions.exchange,
          "the exchange is larger than its region", s);
  require(
      4 * (s.gates_at(kRingSlots - 1, s.rows() - 1, kGates - 1, s.units() - 1) + 1) <= regions.weights - regions.ring,
      "the ring is larger than its region", s);
  if (s.forward_streamed() > 0)
    require(16 * (s.forward_weight_at(s.warps() - 1, s.forward_streamed() - 1, 1, kLanes - 1) + 1) ==
                regions.barriers - regions.weights,
            "the weights do not fill their region", s);

  // Banks: rows of matrices, and what the 32 cells of a warp read of the ring.
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::set<int> banks;
    for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane)
      banks.insert(s.h_at(0, named_row(lane), named_k(lane)) / 2 % 32 / 4);
    require(banks.size() == 8, "rows of h meet in a bank", s);
  }
  for (int part = 0; part < kParts; ++part) {
    std::set<int> banks;
    for (int lane = 0; lane < kLanes; ++lane)
      banks.insert(s.gates_at(0, s.forward_row(part, lane, 0), 0, lane / 4) % 32);
    require(banks.size() == 32, "cells of the forward meet in a bank", s);
  }
}

void check_backward(const ClusterShape& s) {
  // Every weight [gate row of a block, unit of the cluster] has one place.
  Once weights(at(s.blocks) * at(kGates * s.units()) * at(s.width()));
  for (int rank = 0; rank < s.blocks; ++rank)
    for (int warp = 0; warp < s.warps(); ++warp)
      for (int tile = 0; tile < s.backward_tiles(); ++tile)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int m = 0; m < s.backward_m_tiles(); ++m)
            for (int j = 0; j < 4; ++j)
              for (int half = 0; half < 2; ++half) {
                const int k = s.backward_k(tile, lane, j, half), unit = s.backward_unit(warp, m, lane, j);
                require(s.gate_of(k) < kGates && s.gate_of(k) * s.units() + s.unit_of(k) == k, "no such gate row", s);
                require(half == 0 || s.gate_of(k) == s.gate_of(k - 1), "a pair lies in two gates", s);
                require(weights.meet((at(rank) * at(kGates * s.units()) + at(k)) * at(s.width()) + at(unit)),
                        "a weight of the backward has two places", s);
              }
  require(weights.all(), "a weight of the backward has no place", s);
  require(s.backward_tiles() % 2 == 0 && s.register_tiles % 2 == 0, "K tiles come in pairs", s);

  // Every share of a block for (unit, row) goes to the owner of the unit, once.
  for (int sender = 0; sender < s.blocks; ++sender) {
    Once sent(at(s.width()) * at(s.rows()));
    for (int warp = 0; warp < s.warps(); ++warp)
      for (int m = 0; m < s.backward_m_tiles(); ++m)
        for (int high = 0; high < 2; ++high)
          for (int lane = 0; lane < kLanes; ++lane)
            for (int n = 0; n < s.batch_tiles; ++n)
              for (int two = 0; two < 2; ++two) {
                const int unit = s.owner(warp, m, high) * s.units() + s.owned_unit(warp, m, high, lane);
                require(unit == s.backward_unit(warp, m, lane, high), "a sum goes to another unit's owner", s);
                const int row = n * kTileRows + sum_n(lane, 2 * high + two);
                require(row == n * kTileRows + sum_n(lane, 0) + two, "the two sums are not side by side", s);
                require(sent.meet(at(unit) * at(s.rows()) + at(row)), "a share is sent twice", s);
              }
    require(sent.all(), "a share is not sent", s);
  }

  // Every cell has one thread, every place of what arrives is its own, and every eight gradients are written once.
  Once cells(at(s.units()) * at(s.rows()));
  for (int warp = 0; warp < s.warps(); ++warp)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int n = 0; n < s.batch_tiles; ++n)
        require(cells.meet(at(s.backward_cell_unit(warp, lane)) * at(s.rows()) + at(s.backward_cell_row(lane, n))),
                "a cell has two threads", s);
  require(cells.all(), "a cell has no thread", s);
  Once places(at(2 * s.blocks * s.units() * s.rows()));
  for (int buffer = 0; buffer < 2; ++buffer)
    for (int sender = 0; sender < s.blocks; ++sender)
      for (int unit = 0; unit < s.units(); ++unit)
        for (int row = 0; row < s.rows(); ++row)
          require(places.meet(at(s.arrived_at(buffer, sender, unit, row))), "two shares have one place", s);
  require(places.all(), "a place has no share", s);
  Once gradients(at(s.rows()) * at(kGates) * at(s.units()));
  require(s.chunks() <= s.threads(), "more chunks than threads", s);
  for (int chunk = 0; chunk < s.chunks(); ++chunk)
    for (int i = 0; i < kGroupUnits; ++i)
      require(gradients.meet((at(s.chunk_row(chunk)) * at(kGates) + at(s.chunk_gate(chunk))) * at(s.units()) +
                             at(s.chunk_unit(chunk) + i)),
              "a gradient is written twice", s);
  require(gradients.all(), "a gradient is not written", s);

  const BackwardShared regions(s);
  const int ends[] = {regions.arrived, regions.dgates,   regions.ring, regions.ring_c,
                      regions.weights, regions.barriers, regions.bytes};
  for (int i = 0; i < 6; ++i) require(ends[i] <= ends[i + 1] && ends[i] % 16 == 0, "regions overlap", s);
  require(4 * static_cast<int>(places.met.size()) == regions.dgates, "what arrives does not fill its region", s);
  require(2 * (s.dgates_at(s.rows() - 1, kGates * s.units() - 1) + 1) <= regions.ring - regions.dgates,
          "the gradients are larger than their region", s);
  require(
      4 * (s.gates_at(kRingSlots - 1, s.rows() - 1, kGates - 1, s.units() - 1) + 1) <= regions.ring_c - regions.ring,
      "the ring is larger than its region", s);
  require(4 * (s.c_at(kRingSlots - 1, s.rows() - 1, s.units() - 1) + 1) <= regions.weights - regions.ring_c,
          "the ring of c is larger than its region", s);
  if (s.backward_streamed() > 0)
    require(16 * (s.backward_weight_at(s.warps() - 1, s.backward_streamed() - 1, s.backward_m_tiles() - 1, kLanes - 1) +
                  1) ==
                regions.barriers - regions.weights,
            "the weights do not fill their region", s);

  for (int part = 0; part < kParts; ++part) {
    std::set<int> gates, c, sums;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int unit = s.backward_cell_unit(part, lane), row = s.backward_cell_row(lane, 0);
      gates.insert(s.gates_at(0, row, 0, unit) % 32);
      c.insert(s.c_at(0, row, unit) % 32);
      sums.insert(s.arrived_at(0, 0, unit, row) % 32);
    }
    require(gates.size() == 32 && c.size() == 32 && sums.size() == 32, "cells of the backward meet in a bank", s);
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::set<int> banks;
    for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane)
      banks.insert(s.dgates_at(named_row(lane), named_k(lane)) / 2 % 32 / 4);
    require(banks.size() == 8, "rows of gradients meet in a bank", s);
  }
}

void check_ring() {
  const ClusterShape none{};
  for (std::int64_t n = 0; n < 1000; ++n) {
    require(ring_slot(n) == n % kRingSlots, "slots do not go round", none);
    require(n < kRingSlots || ring_parity(n) != ring_parity(n - kRingSlots), "a slot keeps its parity", none);
    require(n >= kRingSlots || ring_parity(n) == 0, "the first round has the wrong parity", none);
  }
}

void require_grid(bool right, const char* what, const GridShape& s) {
  if (right) return;
  std::printf("wrong: %s, with blocks of %d groups in the grid\n", what, s.groups);
  std::exit(1);
}

// Each number of K has one part, pair, lane and place, and lanes read 16 bytes that lie together.
void check_grid_depth(const GridShape& s, int K) {
  const int pairs = s.pairs(K);
  require_grid(pairs * kPairK * s.parts() >= K && (pairs - 1) * kPairK * s.parts() < K, "too few or many pairs", s);
  Once numbers(at(pairs * kPairK * s.parts()));
  for (int part = 0; part < s.parts(); ++part)
    for (int pair = 0; pair < pairs; ++pair)
      for (int lane = 0; lane < 4; ++lane) {
        const int first = s.first_k(part, pairs, pair, lane);
        require_grid(first % 8 == 0 && s.first_k(part, pairs, pair, lane + 4) == first, "a load of 16 bytes", s);
        for (int tile = 0; tile < 2; ++tile)
          for (int high = 0; high < 2; ++high)
            for (int half = 0; half < 2; ++half)
              require_grid(numbers.meet(at(first + s.within(tile, high) + half)), "a number of K twice", s);
      }
  require_grid(numbers.all(), "a number of K without a place", s);
}

// Each cell of a chunk has one thread, and what it adds up is what the product has left of it.
void check_grid_cells(const GridShape& s) {
  Once forward(at(kChunkRows * s.units())), backward(at(kChunkRows * s.units()));
  require_grid(s.cells() == kChunkRows * s.units() && s.cells() <= kGridThreads, "cells without a thread", s);
  for (int thread = 0; thread < s.cells(); ++thread) {
    const int lane = thread % kLanes;
    const GridCell f = s.forward_cell(thread), b = s.backward_cell(thread);
    require_grid(forward.meet(at(f.row * s.units() + f.unit)), "a cell of the forward twice", s);
    require_grid(backward.meet(at(b.row * s.units() + b.unit)), "a cell of the backward twice", s);
    for (int gate = 0; gate < kGates; ++gate) {
      int found = 0;
      for (int n = 0; n < 2; ++n)
        for (int m = 0; m < 2; ++m)
          for (int r = 0; r < 4; ++r) {
            if (s.forward_sum(n, m, r) != s.forward_gate_sum(thread, gate)) continue;
            ++found;
            require_grid(n * kTileRows + sum_n(lane, r) == f.row, "sums of another row", s);
            require_grid(sum_row(lane, r) % kGroupUnits == f.unit % kGroupUnits, "sums of another unit", s);
            require_grid(ClusterShape::forward_gate(m, sum_row(lane, r) / kGroupUnits) == gate, "another gate", s);
          }
      require_grid(found == 1, "a gate without a sum", s);
    }
    const int r = s.backward_cell_sum(thread);
    require_grid(sum_row(lane, r) == b.row && sum_n(lane, r) == b.unit % kGroupUnits, "sums of another cell", s);
    require_grid(f.unit / kGroupUnits == thread / kGroupCells && b.unit / kGroupUnits == thread / kGroupCells,
                 "parts of another group", s);
  }
  require_grid(forward.all() && backward.all(), "a cell without a thread", s);
  for (int warp = 0; warp < kGridWarps; ++warp)
    require_grid(s.group_of(warp) * s.parts() + s.part_of(warp) == warp, "a part without a warp", s);
}

// Places of sums and of what threads keep do not overlap, and regions begin at 16 bytes.
void check_grid_shared(const GridShape& s, const GridShared& regions, int sums, int kinds, int batch) {
  require_grid(regions.weights % 16 == 0 && regions.partial % 16 == 0 && regions.slots % 16 == 0, "not aligned", s);
  const int chunks = ceil_div(batch, kChunkRows);
  Once partial(at(2 * kGridWarps * sums * kLanes)), slots(at(chunks * kinds * s.cells()));
  for (int buffer = 0; buffer < 2; ++buffer)
    for (int warp = 0; warp < kGridWarps; ++warp)
      for (int sum = 0; sum < sums; ++sum)
        for (int lane = 0; lane < kLanes; ++lane)
          require_grid(partial.meet(at(s.partial_at(buffer, warp, sums, sum, lane))), "a sum's place twice", s);
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int kind = 0; kind < kinds; ++kind)
      for (int thread = 0; thread < s.cells(); ++thread)
        require_grid(slots.meet(at(s.slot_at(chunk, kinds, kind, thread))), "a slot twice", s);
  require_grid(partial.all() && slots.all(), "places that nobody has", s);
  require_grid(regions.slots - regions.partial == 4 * 2 * kGridWarps * sums * kLanes &&
                   regions.bytes - regions.slots == std::int64_t{4} * chunks * kinds * s.cells(),
               "regions overlap", s);
}

void check_grid() {
  for (int groups = 1; groups <= kMaxGroups; ++groups) {
    const GridShape s{groups};
    check_grid_cells(s);
    for (int hidden = 1; hidden <= 2200; hidden += hidden < 300 ? 1 : 37) {
      const int width = ceil_div(hidden, kTapeLanes) * kTapeLanes;
      check_grid_depth(s, width);
      check_grid_depth(s, kGates * hidden);
      require_grid(s.blocks(width) * s.units() >= width, "columns of the tape without a block", s);
    }
    for (const int batch : {1, 16, 17, 100}) {
      check_grid_shared(s, GridShared::forward(s, batch, 1536), GridShape::kForwardSums, kForwardSlots, batch);
      check_grid_shared(s, GridShared::backward(s, batch, 1536), GridShape::kBackwardSums, kBackwardSlots, batch);
    }
  }
}

// Every number of a half type comes back from float as it was, and what lies between two is rounded to the nearer one.
template <typename Number>
void check_number(std::uint16_t infinity) {
  const ClusterShape none{};
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto x = static_cast<std::uint16_t>(bits);
    const bool number = (x & 0x7fff) <= infinity;
    require(number ? Number::narrow(Number::wide(x)) == x : std::isnan(Number::wide(x)), "a half number changes", none);
    if (std::isnan(Number::wide(x))) require(std::isnan(Number::wide(Number::narrow(Number::wide(x)))), "a NaN", none);
    if ((x & 0x7fff) >= infinity - 1) continue;
    const double low = Number::wide(x), high = Number::wide(static_cast<std::uint16_t>(x + 1));
    const double middle = (low + high) / 2;
    const auto even = static_cast<std::uint16_t>(x % 2 == 0 ? x : x + 1);
    require(Number::narrow(static_cast<float>(middle)) == even, "a tie is not rounded to even", none);
    const auto middle_float = static_cast<float>(middle);
    require(Number::narrow(std::nextafterf(middle_float, static_cast<float>(low))) == x, "not rounded to nearest",
            none);
    require(Number::narrow(std::nextafterf(middle_float, static_cast<float>(high))) == x + 1, "not rounded to nearest",
            none);
  }
}

}  // namespace

int main() {
  int shapes = 0;
  for (const Build& build : kBuilds)
    for (const bool backward : {false, true}) {
      const int most = build.threads / (kParts * kLanes);
      for (int groups = 1; groups <= most; ++groups) {
        const int hidden = groups * build.blocks * kGroupUnits;
        const ClusterShape s = cluster_shape(build, hidden, backward);
        require(s.groups == groups && cluster_shape(build, hidden - 1, backward).groups == groups, "groups", s);
        require(cluster_shape(build, most * build.blocks * kGroupUnits + 1, backward).groups == 0, "too many", s);
        int columns = 0;
        for (int rank = 0; rank < s.blocks; ++rank) columns += s.tape_columns(rank, ceil_div(hidden - 5, 16) * 16);
        require(columns == ceil_div(hidden - 5, 16) * 16, "columns of the tape", s);
        backward ? check_backward(s) : check_forward(s);
        ++shapes;
      }
    }
  check_ring();
  check_grid();
  check_number<Bfloat16>(0x7f80);
  check_number<Float16>(0x7c00);
  std::printf("%d shapes of clusters, the grid and 131072 half numbers: every index has one owner\n", shapes);
}
