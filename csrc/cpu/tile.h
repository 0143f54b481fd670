// The register tile that every matrix product here is made of.
//
//   acc[rows][vectors] += A[rows, K] * panel[K, vectors * lanes]
//
// A is read one number at a time and broadcast; the panel is packed so that its rows lie one behind the other. An Op
// says what becomes of the accumulators at the end, so that the cell's arithmetic runs on the registers that the
// product was summed in, and by kTall whether it takes tiles of more than kTileRows rows, which are long to compile.
// One that sums over a tile's rows must: how panels are cut, and so how wide they are, depends on the number of
// threads.
#pragma once

#include "simd.h"

namespace fastseq {
namespace {

enum class ALayout { kRows, kColumns };  // A(r, k) at a[r * lda + k], or at a[k * lda + r]

// A panel of more than kPart vectors lies in parts of that many, one behind the other, each [k][vectors][lanes], so
// that a tile that takes one part at a time reads it as it lies. Tiles of kColumns are never tall and need no parts.
template <ALayout kLayout>
constexpr int kPart = kLayout == ALayout::kColumns ? kTileVectors : kPartVectors;

// Where a vector of a panel of kRows lies.
struct Slot {
  int64_t first, step;  // its numbers for k = 0; from one k to the next
};
template <typename Real>
FASTSEQ_INLINE Slot slot_in_panel(int64_t vector, int64_t vectors, int64_t K) {
  const int64_t part = vectors < kPartVectors ? vectors : kPartVectors;
  return {(vector / part * part * K + vector % part) * kLanes<Real>, part * kLanes<Real>};
}

// One chain of so many fused multiply-adds, then a new one, and the sums are added: a single chain over a long K has a
// multiple of the rounding error of a blocked sum, and of a library's dot product, which sums in as many chains as a
// vector has lanes. Weight gradients (kColumns) sum thousands of numbers of like sign, for which the best block is
// about the cube root of twice their number.
template <ALayout kLayout>
constexpr int64_t kChain = kLayout == ALayout::kColumns ? 32 : 64;

// For products of few columns, where there is time for it: a library makes such a product of dot products, which are
// that much more exact.
constexpr int64_t kShortChain = 8;
template <typename Real>
constexpr int64_t chain_for(int64_t columns) {
  return columns < kLanes<Real> ? kShortChain : 0;
}

// Chains that run side by side, since with few rows there are too few accumulators to hide the latency of an FMA. It
// depends on the rows alone: the order of every sum must not change with the number of threads.
template <int kRows>
constexpr int kSideChains = kTileRows == 6 ? (kRows == 1   ? 4
                                              : kRows == 2 ? 2
                                                           : 1)
                                           : (kRows == 1 ? 2 : 1);

template <typename Real, int kRows, int kVectors>
FASTSEQ_INLINE void set_zero(Vec<Real> (&acc)[kRows][kVectors]) {
  FASTSEQ_UNROLL
  for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
  for (int v = 0; v < kVectors; ++v) acc[r][v] = zero<Real>();
}

// Vectors from one k to the next in a panel, or a part of one, of so many vectors.
template <int kVectors, ALayout kLayout>
constexpr int kStep = kVectors < kPart<kLayout> ? kVectors : kPart<kLayout>;

// One k; `part`: numbers from one part of the panel to the next. What there is less of, numbers of A or vectors of the
// panel, is held in registers and the other streamed: 3 by 4 accumulators with 4 vectors held would take 17 of AVX2's
// 16 registers, and a spill in this loop costs a third.
template <int kRows, int kVectors, ALayout kLayout, typename Real>
FASTSEQ_INLINE void multiply_step(Vec<Real> (&acc)[kRows][kVectors], const Real* panel, int64_t part, const Real* a,
                                  int64_t lda) {
  const auto vector = [&](int v) {
    return load(panel + v / kPart<kLayout> * part + v % kPart<kLayout> * kLanes<Real>);
  };
  const int64_t stride = kLayout == ALayout::kRows ? lda : 1;
  if constexpr (kRows < kVectors) {
    Vec<Real> b[kRows];
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) b[r] = broadcast(a[r * stride]);
    FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Vec<Real> w = vector(v);
      FASTSEQ_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][v] = fma(b[r], w, acc[r][v]);
    }
  } else {
    Vec<Real> w[kVectors];
    FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = vector(v);
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec<Real> b = broadcast(a[r * stride]);
      FASTSEQ_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(b, w[v], acc[r][v]);
    }
  }
}

template <int kRows, int kVectors, int kChains, ALayout kLayout, typename Real>
FASTSEQ_INLINE void multiply_chain(Vec<Real> (&acc)[kRows][kVectors], const Real* panel, int64_t part, int64_t K,
                                   const Real* a, int64_t lda) {
  constexpr int kWidth = kStep<kVectors, kLayout> * kLanes<Real>;
  Vec<Real> side[kChains][kRows][kVectors];
  FASTSEQ_UNROLL
  for (int s = 0; s < kChains; ++s) FASTSEQ_UNROLL
  for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
  for (int v = 0; v < kVectors; ++v) side[s][r][v] = s == 0 ? acc[r][v] : zero<Real>();

  const int64_t whole = K / kChains * kChains;
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k < whole; k += kChains) {
    FASTSEQ_UNROLL
    for (int s = 0; s < kChains; ++s) {
      multiply_step<kRows, kVectors, kLayout, Real>(side[s], panel + (k + s) * kWidth, part,
                                                    kLayout == ALayout::kRows ? a + k + s : a + (k + s) * lda, lda);
    }
  }
  for (; k < K; ++k)
    multiply_step<kRows, kVectors, kLayout, Real>(side[0], panel + k * kWidth, part,
                                                  kLayout == ALayout::kRows ? a + k : a + k * lda, lda);
  FASTSEQ_UNROLL
  for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    acc[r][v] = side[0][r][v];
    FASTSEQ_UNROLL
    for (int s = 1; s < kChains; ++s) acc[r][v] = acc[r][v] + side[s][r][v];
  }
}

template <int kRows, int kVectors, int kChains, ALayout kLayout, typename Real>
FASTSEQ_INLINE void multiply(Vec<Real> (&acc)[kRows][kVectors], const Real* panel, int64_t part, int64_t K,
                             const Real* a, int64_t lda, int64_t chain) {
  Vec<Real> total[kRows][kVectors];
  set_zero<Real>(total);
  const int64_t blocks = K / chain + (K % chain != 0);
  const int64_t block = (K / blocks + (K % blocks != 0) + kChains - 1) / kChains * kChains;
  for (int64_t k = 0;;) {
    const int64_t length = K - k < block ? K - k : block;
    multiply_chain<kRows, kVectors, kChains, kLayout, Real>(acc, panel + k * kStep<kVectors, kLayout> * kLanes<Real>,
                                                            part, length,
                                                            kLayout == ALayout::kRows ? a + k : a + k * lda, lda);
    k += length;
    if (k >= K) break;
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      total[r][v] = total[r][v] + acc[r][v];
      acc[r][v] = zero<Real>();
    }
  }
  if (blocks > 1) {
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = acc[r][v] + total[r][v];
  }
}

template <typename Real>
struct Product {  // K == 0: no product, the Op alone
  const Real* panel;
  int64_t K;
  const Real* a;
  int64_t lda;
  int64_t chain = 0;   // the longest chain of multiply-adds; 0: kChain
  int64_t packed = 0;  // rows of the packed panel, where the product takes K of more
};

// first: the row of the Op that is the product's first.
template <int kRows, int kVectors, int kChains, ALayout kLayout, typename Real, typename Op>
__attribute__((noinline)) void tile(const Op& op, const Product<Real>& product, int first) {
  constexpr int kHeld = kRows > kTileRows && kVectors > kPartVectors ? kPartVectors : kVectors;
  const int64_t part = kPart<kLayout> * (product.packed ? product.packed : product.K) * kLanes<Real>;
  Vec<Real> sums[kRows][kVectors];  // apart from acc: what an Op loops over lies in memory
  for (int vector = 0; vector < kVectors; vector += kHeld) {
    Vec<Real> acc[kRows][kHeld];
    set_zero<Real>(acc);
    if (product.K > 0)
      multiply<kRows, kHeld, kChains, kLayout, Real>(acc, product.panel + vector / kHeld * part, part, product.K,
                                                     product.a, product.lda,
                                                     product.chain ? product.chain : kChain<kLayout>);
    FASTSEQ_UNROLL
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kHeld; ++v) sums[r][vector + v] = acc[r][v];
  }
  op.finish(sums, first);
}

enum class Chains { kOne, kSide };

template <int kVectors, Chains kChains, ALayout kLayout, typename Real, typename Op>
FASTSEQ_INLINE void run_low_tile(int rows, const Op& op, const Product<Real>& product, int first) {
#define FASTSEQ_TILE(R) \
  case R:               \
    return tile < R, kVectors, kChains == Chains::kSide ? kSideChains<R> : 1, kLayout, Real, Op > (op, product, first)
  switch (rows) {
    FASTSEQ_TILE(1);
    FASTSEQ_TILE(2);
    FASTSEQ_TILE(3);
#if defined(__AVX512F__) || defined(__aarch64__)
    FASTSEQ_TILE(4);
    FASTSEQ_TILE(5);
    FASTSEQ_TILE(6);
#endif
    default:
      break;
  }
  __builtin_unreachable();
#undef FASTSEQ_TILE
}

template <int kVectors, Chains kChains, ALayout kLayout, typename Real, typename Op>
FASTSEQ_INLINE void run_tile_rows(int rows, const Op& op, const Product<Real>& product) {
  if constexpr (kTallRows > kTileRows && kLayout == ALayout::kRows)
    if (rows > kTileRows) {
      if constexpr (Op::kTall) {
#define FASTSEQ_TILE(R) \
  case R:               \
    return tile<R, kVectors, 1, kLayout, Real, Op>(op, product, 0)
        switch (rows) {
          FASTSEQ_TILE(7);
          FASTSEQ_TILE(8);
          FASTSEQ_TILE(9);
          FASTSEQ_TILE(10);
          FASTSEQ_TILE(11);
          FASTSEQ_TILE(12);
          default:
            __builtin_unreachable();
        }
#undef FASTSEQ_TILE
      } else {  // as two low ones
        const int upper = rows / 2;
        Product<Real> lower = product;
        lower.a += upper * product.lda;
        run_low_tile<kVectors, kChains, kLayout, Real>(upper, op, product, 0);
        return run_low_tile<kVectors, kChains, kLayout, Real>(rows - upper, op, lower, upper);
      }
    }
  run_low_tile<kVectors, kChains, kLayout, Real>(rows, op, product, 0);
}

// A tile of `rows` (1 to kTileRows; for kRows to kTallRows) by `vectors` (1, 2 or 4).
template <Chains kChains, ALayout kLayout, typename Real, typename Op>
FASTSEQ_INLINE void run_tile(int rows, int vectors, const Op& op, const Product<Real>& product) {
  switch (vectors) {
    case 1:
      return run_tile_rows<1, kChains, kLayout, Real, Op>(rows, op, product);
    case 2:
      return run_tile_rows<2, kChains, kLayout, Real, Op>(rows, op, product);
    case 4:
      return run_tile_rows<4, kChains, kLayout, Real, Op>(rows, op, product);
    default:
      __builtin_unreachable();
  }
}

FASTSEQ_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTSEQ_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// A range of rows cut into the fewest tiles of nearly equal height.
struct RowTiles {
  int64_t rows, most;
  explicit RowTiles(int64_t n, int64_t most_ = kTileRows) : rows(n), most(most_) {}
  int64_t count() const { return divide_up(rows, most); }
  int64_t first(int64_t tile) const { return rows * tile / count(); }
  int height(int64_t tile) const { return static_cast<int>(first(tile + 1) - first(tile)); }
};

// A range of column vectors cut into panels of 4, then 2, then 1, or into single vectors (LSTM forward, where the four
// gates of one vector of units make a panel). Where a panel begins in packed memory follows from its first vector,
// since every vector takes the same room.
struct Panel {
  int64_t first;
  int vectors;
};
struct PanelRange {
  int64_t begin, end;
  bool single = false;
  int64_t vectors() const { return end - begin; }
  int64_t count() const { return single ? vectors() : vectors() / 4 + (vectors() % 4 + 1) / 2; }
  Panel at(int64_t i) const {
    if (single) return {begin + i, 1};
    const int64_t whole = vectors() / 4;
    if (i < whole) return {begin + 4 * i, 4};
    if (i == whole && vectors() % 4 >= 2) return {begin + 4 * whole, 2};
    return {end - 1, 1};
  }
};

struct Range {
  int64_t begin, end;
};
FASTSEQ_INLINE Range split(int64_t n, int64_t parts, int64_t part) {
  return {n * part / parts, n * (part + 1) / parts};
}

}  // namespace
}  // namespace fastseq
