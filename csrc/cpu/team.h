// Who computes what, and who waits for whom.
//
// Threads form `groups` of `members`. Groups own tiles of the batch and never meet; the members of a group own slices
// of the hidden units and need each other's part of h at every step. They wait tile by tile on progress counters
// instead of a barrier per step, so that one may run ahead in one tile while another still works in the next.
#pragma once

#include <sched.h>

#include "parallel.h"
#include "tile.h"

namespace fastseq {
namespace {

FASTSEQ_INLINE void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins for some microseconds, then lets other threads run: the one waited for may have lost its core.
inline void wait_for(const int64_t* counter, int64_t value) {
  constexpr int kSpins = 64;
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value;) {
    if (++spins < kSpins)
      pause_cpu();
    else
      sched_yield();
  }
}

struct alignas(64) Barrier {
  int64_t arrived = 0;
  alignas(64) int64_t generation = 0;

  void wait(int threads) {
    if (threads == 1) return;
    const int64_t now = __atomic_load_n(&generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
    } else {
      wait_for(&generation, now + 1);
    }
  }
};

// A slice of recurrent weights no larger than this stays in a core's second-level cache beside the activations, and
// then whole sequences per thread, which never wait, beat slices of the hidden units.
constexpr int64_t kResidentBytes = 400 * 1024;
// Recurrent weights of more bytes are read from a third-level cache at every step, as often as the batch has tiles:
// there a tall tile saves half of it. Where the second level holds a member's slice, lower tiles were up to 1.06 times
// faster.
constexpr int64_t kTallBytes = int64_t{8} << 20;
inline RowTiles batch_tiles(int64_t B, int64_t weight_bytes) {
  return RowTiles(B, B <= kTallRows && weight_bytes > kTallBytes ? kTallRows : kTileRows);
}
// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kSerialWork = 1 << 18;

inline int useful_threads(int threads, int64_t multiply_adds, int64_t batch_tiles, int64_t unit_vectors) {
  if (multiply_adds < kSerialWork) return 1;
  const int64_t most = batch_tiles * unit_vectors;
  return static_cast<int>(threads < most ? threads : most);
}

struct Team {
  int thread, threads;
  int groups, members, group, member;
  Range tiles;        // of the batch, this group's
  int64_t* progress;  // [threads][stride]: phases that a thread has finished, per tile
  int64_t stride;

  // unit_vectors: the fewest hidden vectors that any phase shares among the members.
  Team(int thread_, int threads_, int64_t batch_tiles, int64_t unit_vectors, int64_t weight_bytes, int64_t* progress_,
       int64_t stride_, int64_t resident_bytes = kResidentBytes)
      : thread(thread_), threads(threads_), progress(progress_), stride(stride_) {
    members = 1;
    while (members < threads &&
           (weight_bytes / members > resident_bytes || batch_tiles < threads / members || threads % members != 0))
      ++members;
    if (members > unit_vectors) members = static_cast<int>(unit_vectors);
    groups = threads / members;
    if (groups > batch_tiles) groups = static_cast<int>(batch_tiles);
    group = thread / members;
    member = thread % members;
    tiles = group < groups ? split(batch_tiles, groups, group) : Range{0, 0};
  }

  // A thread left over when the threads do not divide evenly.
  bool idle() const { return group >= groups; }
  // The member's slice of so many vectors of units.
  Range slice(int64_t vectors) const { return split(vectors, members, member); }
  // The part of a range that this group packs, where the groups share what their members read.
  Range share(Range range) const {
    const Range part = split(range.end - range.begin, groups, group);
    return {range.begin + part.begin, range.begin + part.end};
  }

  // Calls body(panel, tile) for all of this thread's panels and tiles. Phase n of a tile begins when every member has
  // finished phase n - 1 of it. The panels are walked forwards and backwards by turns: what was read last is read
  // first, from cache.
  template <typename Body>
  void sweep(int64_t phase, const PanelRange& panels, const Body& body) const {
    const int64_t count = panels.count();
    if (count == 0)
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) publish(tile, phase + 1);
    for (int64_t i = 0; i < count; ++i) {
      const Panel panel = panels.at(phase % 2 == 0 ? i : count - 1 - i);
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        if (i == 0) await(tile, phase);
        body(panel, tile);
        if (i == count - 1) publish(tile, phase + 1);
      }
    }
  }

  // Calls body(row) for this thread's share of the rows of every tile of the group, as one phase.
  template <typename Body>
  void sweep_rows(int64_t phase, const RowTiles& batch, const Body& body) const {
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      await(tile, phase);
      const Range mine = slice(batch.height(tile));
      for (int64_t row = mine.begin; row < mine.end; ++row) body(batch.first(tile) + row);
      publish(tile, phase + 1);
    }
  }

  void await(int64_t tile, int64_t phase) const {
    if (members == 1) return;
    for (int other = 0; other < members; ++other)
      if (other != member) wait_for(progress + (group * members + other) * stride + tile, phase);
  }
  void publish(int64_t tile, int64_t phase) const {
    if (members > 1) __atomic_store_n(progress + thread * stride + tile, phase, __ATOMIC_RELEASE);
  }
};

// Hands out 64-byte aligned pieces of a block: once with no block to learn the size, once to place them.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <typename Item>
  Item* take(int64_t count) {
    Item* piece = base_ ? reinterpret_cast<Item*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace fastseq
