// Squared distances between points and centres, from the differences themselves.
//
// The expanded square |z|^2 - 2 z·mu + |mu|^2 would be one multiply-add a feature instead of a subtraction and a
// multiply-add, but it loses every digit where points lie much nearer to a centre than to the origin, and no common
// shift helps where clusters are tight and far apart. The differences are exact there.
//
// Points stand in the lanes, a group of kPointVectors vectors side by side, so the number of features and that of
// centres may be anything and no lane is wasted on either; what is summed over centres is summed without leaving its
// lane.
#pragma once

#include "storage.h"
#include "tile.h"

namespace fastseq {
namespace {

constexpr int kPointVectors = 4;
template <typename Real>
constexpr int kGroupPoints = kPointVectors * kLanes<Real>;
// What one feature, or one centre, of a group of points takes.
template <typename Real>
constexpr int64_t kGroupStride = kGroupPoints<Real>;

// Centres of one register tile: with kPointVectors vectors each they leave room for the operands.
constexpr int kTileCenters = kTileRows == 6 ? 4 : 2;
// Sums over centres are cut into blocks of so many, and these are added up.
constexpr int64_t kSumBlock = 64;

template <typename Real>
using Lanes = Vec<Real>[kPointVectors];

template <typename Real>
FASTSEQ_INLINE void fill(Lanes<Real>& to, Real value) {
  FASTSEQ_UNROLL
  for (int v = 0; v < kPointVectors; ++v) to[v] = broadcast(value);
}
template <typename Real>
FASTSEQ_INLINE void add(Lanes<Real>& to, const Lanes<Real>& from) {
  FASTSEQ_UNROLL
  for (int v = 0; v < kPointVectors; ++v) to[v] = to[v] + from[v];
}

// A compensated sum in every lane (Kahan 1965). A plain chain is not good enough for the sum that normalises q: where u
// is nearly the same for all centres, or 1 for one and small for the others, every addition errs to the same side, and
// the error is common to all that is made of q.
template <typename Real>
struct CarefulSum {
  Lanes<Real> value, excess;

  FASTSEQ_INLINE CarefulSum() {
    fill<Real>(value, 0);
    fill<Real>(excess, 0);
  }
  FASTSEQ_INLINE void add(int v, Vec<Real> x) {
    x = x - excess[v];
    const Vec<Real> sum = value[v] + x;
    excess[v] = (sum - value[v]) - x;
    value[v] = sum;
  }
};

template <typename Real, int kCount>
FASTSEQ_INLINE Vec<Real> sum_in_pairs(const Vec<Real> (&x)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the centres of a tile");
  if constexpr (kCount == 1)
    return x[0];
  else if constexpr (kCount == 2)
    return x[0] + x[1];
  else
    return (x[0] + x[1]) + (x[2] + x[3]);
}

enum class Beyond { kZero, kRepeat };  // what stands for the points behind the last: zeros, or the last one again

// Rows first ... of a [N, width] array, transposed: [width][kPointVectors][lanes].
template <Beyond kBeyond, typename Real>
void load_group(Storage storage, const void* from, int64_t first, int64_t N, int64_t width, Real* to) {
  constexpr int n = kLanes<Real>;
  for (int v = 0; v < kPointVectors; ++v) {
    const int64_t row = first + v * n;
    const bool whole = row + n <= N;
    for (int64_t k = 0; k < width; k += n) {
      const int inside = lanes_inside<Real>(width, k);
      Vec<Real> block[n];
      if (whole && !is_half(storage)) {  // apart, or every row would ask again
        const Real* corner = static_cast<const Real*>(from) + row * width + k;
        FASTSEQ_UNROLL
        for (int i = 0; i < n; ++i) block[i] = load_part(corner + i * width, inside);
      } else {
        FASTSEQ_UNROLL
        for (int i = 0; i < n; ++i) {
          const int64_t there = row + i < N ? row + i : N - 1;
          block[i] = there < row + i && kBeyond == Beyond::kZero
                         ? zero<Real>()
                         : load_as<Real>(storage, from, there * width + k, inside);
        }
      }
      transpose<Real>(block);
      Real* base = to + k * kGroupStride<Real> + v * n;
      FASTSEQ_UNROLL
      for (int i = 0; i < n; ++i)
        if (i < inside) store(base + i * kGroupStride<Real>, block[i]);
    }
  }
}

// The way back, for the points that are there, times a factor.
template <typename Real>
void store_group(Storage storage, const Real* from, Real factor, int64_t first, int64_t N, int64_t width, void* to) {
  constexpr int n = kLanes<Real>;
  for (int v = 0; v < kPointVectors; ++v) {
    const int64_t row = first + v * n;
    const int rows = lanes_inside<Real>(N, row);
    for (int64_t k = 0; k < width; k += n) {
      const int inside = lanes_inside<Real>(width, k);
      const Real* base = from + k * kGroupStride<Real> + v * n;
      Vec<Real> block[n];
      FASTSEQ_UNROLL
      for (int i = 0; i < n; ++i)
        block[i] = i < inside ? load(base + i * kGroupStride<Real>) * broadcast(factor) : zero<Real>();
      transpose<Real>(block);
      if (rows == n && !is_half(storage)) {  // apart, as above
        Real* corner = static_cast<Real*>(to) + row * width + k;
        FASTSEQ_UNROLL
        for (int i = 0; i < n; ++i) store_part(corner + i * width, block[i], inside);
      } else {
        FASTSEQ_UNROLL
        for (int i = 0; i < n; ++i)
          if (i < rows) store_as<Real>(storage, to, (row + i) * width + k, block[i], inside);
      }
    }
  }
}

// Rows of a [N, K] array that will be read once the distances are there: a few lines of them are asked for with every
// centre, since so many rows are more streams than the hardware follows.
struct Upcoming {
  const char* row = nullptr;  // the first one; null: nothing
  int64_t row_bytes = 0;
  int log_items = 0;  // a line has 2^log_items numbers

  template <typename Real>
  FASTSEQ_INLINE void prefetch(int64_t j) const {
    constexpr int64_t kLine = 64;
    if (!row) return;
    const int64_t rows = kGroupPoints<Real> >> log_items;
    const char* at = row + (j & ((int64_t{1} << log_items) - 1)) * rows * row_bytes + (j >> log_items) * kLine;
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(at + i * row_bytes);
  }
};

template <typename Real, int kCenters>
FASTSEQ_INLINE void add_squares(const Real* points, const Real* centers, int64_t d, int64_t begin, int64_t end,
                                Vec<Real> (&sum)[kCenters][kPointVectors]) {
#pragma GCC unroll 2
  for (int64_t k = begin; k < end; ++k) {
    Lanes<Real> z;
    FASTSEQ_UNROLL
    for (int v = 0; v < kPointVectors; ++v) z[v] = load(points + k * kGroupStride<Real> + v * kLanes<Real>);
    FASTSEQ_UNROLL
    for (int c = 0; c < kCenters; ++c) {
      const Vec<Real> mu = broadcast(centers[c * d + k]);
      FASTSEQ_UNROLL
      for (int v = 0; v < kPointVectors; ++v) {
        const Vec<Real> difference = z[v] - mu;
        sum[c][v] = fma(difference, difference, sum[c][v]);
      }
    }
  }
}

// Sums of more than kChainWhole squares are cut into blocks of kChainBlock, and those again, so that the rounding
// error of d = 4096 is little more than that of d = 16.
constexpr int64_t kChainWhole = 32, kChainBlock = 16;

template <typename Real, int kCenters>
FASTSEQ_INLINE void add_up(Vec<Real> (&to)[kCenters][kPointVectors], Vec<Real> (&from)[kCenters][kPointVectors]) {
  FASTSEQ_UNROLL
  for (int c = 0; c < kCenters; ++c) FASTSEQ_UNROLL
  for (int v = 0; v < kPointVectors; ++v) {
    to[c][v] = to[c][v] + from[c][v];
    from[c][v] = zero<Real>();
  }
}

template <int kCenters, typename Real, typename Op>
__attribute__((noinline)) void distance_tile(const Real* points, const Real* centers, int64_t d, int64_t j,
                                             const Op& op) {
  Vec<Real> sum[kCenters][kPointVectors];
  set_zero<Real>(sum);
  const Real* row = centers + j * d;
  if (d <= kChainWhole) {
    add_squares<Real>(points, row, d, 0, d, sum);
  } else {
    Vec<Real> total[kCenters][kPointVectors], part[kCenters][kPointVectors];
    set_zero<Real>(total);
    set_zero<Real>(part);
    for (int64_t begin = 0; begin < d; begin += kChainBlock) {
      add_squares<Real>(points, row, d, begin, begin + kChainBlock < d ? begin + kChainBlock : d, sum);
      add_up<Real>(part, sum);
      if (begin / kChainBlock % kChainBlock == kChainBlock - 1) add_up<Real>(total, part);
    }
    add_up<Real>(total, part);
    add_up<Real>(sum, total);
  }
  op(j, sum);
}

// Calls op(j, D) for the centres of a range in order, a tile of them at a time: D[c] are the squared distances of one
// group of points to centre j + c.
template <typename Real, typename Op>
FASTSEQ_INLINE void for_distances(const Real* points, const Real* centers, int64_t d, Range range, const Op& op) {
  int64_t j = range.begin;
  for (; j + kTileCenters <= range.end; j += kTileCenters) distance_tile<kTileCenters>(points, centers, d, j, op);
  for (; j < range.end; ++j) distance_tile<1>(points, centers, d, j, op);
}

// An op of tiles from one of single centres.
template <typename Op>
FASTSEQ_INLINE auto each_center(const Op& op) {
  return [op](int64_t j, const auto& distance) {
    FASTSEQ_UNROLL
    for (int c = 0; c < static_cast<int>(sizeof(distance) / sizeof(distance[0])); ++c) op(j + c, distance[c]);
  };
}

// Centres as numbers of the arithmetic type, as they are where that is how they are stored.
template <typename Real>
bool as_arithmetic(Storage storage) {
  return !is_half(storage);
}

}  // namespace
}  // namespace fastseq
