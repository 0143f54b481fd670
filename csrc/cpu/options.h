// What a recurrence can do beyond the plain layer: reset states, noise on h and c, peepholes, clips. The formulas and
// their sources are in fastseq/reference/lstm.py.
//
// Kernels are built three times: plain, with step flags, and with flags and every option, which are branches at run
// time there. So a plain layer pays nothing, an option little, and an object grows by one build instead of 2^n.
#pragma once

#include "storage.h"

namespace fastseq {
namespace {

using Flags = int;
constexpr Flags kNoFlags = 0, kWithFlags = 1, kWithOptions = 2;

// Whether the layer has the kernels of norm_recurrence.h instead.
FASTSEQ_INLINE bool normalises(const LayerOptions* options) { return options && options->weight_ln_c; }

// A member that only the build with options has.
struct Nothing {};
template <bool kThere, typename Options>
struct OnlyIf {
  using type = Nothing;
};
template <typename Options>
struct OnlyIf<true, Options> {
  using type = Options;
};
template <Flags kFlags, typename Options>
using WithOptions = typename OnlyIf<kFlags == kWithOptions, Options>::type;

// Bools as they lie in memory, one byte each, as lanes of zeros and ones; lanes from `count` on are zero.
template <typename Real>
FASTSEQ_INLINE Vec<Real> load_bools(const uint8_t* from, int count) {
  ByteVec<Real> bytes{};
  if (count >= kLanes<Real>)
    memcpy(&bytes, from, sizeof(bytes));
  else
    for (int lane = 0; lane < count; ++lane) bytes[lane] = from[lane];
  return __builtin_convertvector(bytes, Vec<Real>);
}

// Rows of the user's tensor [.., B, width], seen from the first row and column of a tile.
template <typename Real>
struct Rows {
  Storage storage;
  const void* data = nullptr;
  int64_t stride;
  int64_t width;  // columns from here on

  FASTSEQ_INLINE Vec<Real> load(int r, int v) const {
    const int inside = lanes_inside<Real>(width, v * kLanes<Real>);
    return inside > 0 ? load_as<Real>(storage, data, r * stride + v * kLanes<Real>, inside) : zero<Real>();
  }
};

// The row of h_reset or c_reset that step t of sequence b takes; null where there are none, and the state is zero.
FASTSEQ_INLINE const void* reset_row(const void* rows, bool per_step, Storage storage, int64_t t, int64_t b, int64_t B,
                                     int64_t width) {
  return rows ? at(rows, storage, ((per_step ? t : 0) * B + b) * width) : nullptr;
}
template <typename Real>
FASTSEQ_INLINE Rows<Real> reset_rows(const void* rows, bool per_step, Storage storage, int64_t t, int64_t B,
                                     int64_t width, int64_t row, int64_t column) {
  const void* first = rows ? at(reset_row(rows, per_step, storage, t, row, B, width), storage, column) : nullptr;
  return {storage, first, width, width - column};
}

// State that a step may keep from the one before instead of the fresh one (zoneout), of a tile: where the mask says so,
// or by a rate in its expectation.
template <typename Real>
struct Zoneout {
  const uint8_t* mask = nullptr;  // at the tile's first row and column
  Real rate = 0;                  // without a mask; 0: nothing is kept
  Real fresh_rate = 1;
  int64_t stride;
  int64_t width;  // columns from here on

  bool is_on() const { return mask != nullptr || rate != 0; }
  // What becomes of the two states, or, of a gradient given as both, its share for each.
  FASTSEQ_INLINE void share(int r, int v, Vec<Real>* old, Vec<Real>* fresh) const {
    if (mask) {
      const int64_t column = v * kLanes<Real>;
      const auto keeps = load_bools<Real>(mask + r * stride + column, lanes_inside<Real>(width, column)) > zero<Real>();
      *old = keeps ? *old : zero<Real>();
      *fresh = keeps ? zero<Real>() : *fresh;
    } else {
      *old = *old * broadcast(rate);
      *fresh = *fresh * broadcast(fresh_rate);
    }
  }
  FASTSEQ_INLINE Vec<Real> mix(int r, int v, Vec<Real> old, Vec<Real> fresh) const {
    share(r, v, &old, &fresh);
    return old + fresh;
  }
};

template <typename Real>
FASTSEQ_INLINE Zoneout<Real> zoneout_at(const uint8_t* mask, double rate, int64_t row, int64_t column, int64_t width) {
  Zoneout<Real> z;
  z.mask = mask ? mask + row * width + column : nullptr;
  z.rate = static_cast<Real>(rate), z.fresh_rate = static_cast<Real>(1 - rate);
  z.stride = width;
  z.width = width - column;
  return z;
}

// x within +-limit; a NaN stays.
template <typename Real>
FASTSEQ_INLINE Vec<Real> clipped(Vec<Real> x, Real limit) {
  return at_least(-limit, at_most(limit, x));
}

}  // namespace
}  // namespace fastseq
