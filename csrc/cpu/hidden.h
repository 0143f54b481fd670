// What both recurrences share around h: where a step reads h_{t-1}, where it leaves h_t, and the gradient that comes
// back.
#pragma once

#include "activations.h"
#include "options.h"
#include "pack.h"
#include "team.h"

namespace fastseq {
namespace {

// Time in processing order: step s is time t, and `before` is the time whose h it reads.
struct Clock {
  int64_t T;
  bool reverse;
  int64_t time(int64_t step) const { return reverse ? T - 1 - step : step; }
  int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  bool is_first(int64_t t) const { return t == (reverse ? T - 1 : 0); }
};

// Whether the sequences of so many rows of the batch, from the row that `flags` belongs to on, are all over: then their
// products are not needed. Flags may be null.
FASTSEQ_INLINE bool all_padding(const uint8_t* flags, int rows) {
  if (flags == nullptr) return false;
  for (int r = 0; r < rows; ++r)
    if (!(flags[r] & kFlagPadding)) return false;
  return true;
}

// The h that steps hand on. In plain float and double that is y itself. With flags or half types two slots of
// arithmetic numbers take turns: they hold h_{t-1} as step t shall see it, rounded, with padding carried and resets
// already made. Where recurrent dropout masks h_{t-1}, two more slots hold it so for the product to read.
template <typename Real, Flags kFlags>
struct HiddenState {
  Storage storage;
  Clock clock;
  int64_t B, P;
  const uint8_t* flags;
  void* y;                      // [T, B, P]
  Real* initial;                // [B, slot_width]: h0
  Real* slots[2];               // or null
  const LayerOptions* options;  // with kWithOptions
  Real* mask;                   // [B, slot_width]: h_mask, or null
  Real* masked[2];              // likewise

  static bool needs_slots(Storage storage) { return kFlags || is_half(storage); }
  static int64_t slot_width(int64_t P) { return tape_width(P); }
  bool has_slots() const { return slots[0] != nullptr; }
  int64_t width() const { return slot_width(P); }

  void prepare(const void* h0) const {
    load_rows<Real>(storage, h0, P, initial, width(), B, P);
    if (kFlags)
      for (int64_t b = 0; b < B; ++b)
        if (flags[clock.time(0) * B + b] & kFlagReset) {
          const void* reset = kFlags == kWithOptions ? reset_row(options->h_reset, options->h_reset_per_step, storage,
                                                                 clock.time(0), b, B, P)
                                                     : nullptr;
          load_rows<Real>(storage, reset, P, initial + b * width(), width(), 1, P);
        }
    if (kFlags == kWithOptions && mask) {
      load_rows<Real>(storage, options->h_mask, P, mask, width(), B, P);
      for (int64_t n = 0; n < B * width(); n += kLanes<Real>) store(masked[0] + n, load(initial + n) * load(mask + n));
    }
  }
  // What the recurrent product reads.
  const Real* read(int64_t step) const { return kFlags == kWithOptions && mask ? masked[step % 2] : state(step); }
  const Real* state(int64_t step) const {
    if (step == 0) return initial;
    if (has_slots()) return slots[step % 2];
    return static_cast<const Real*>(y) + clock.time(step - 1) * B * P;
  }
  int64_t read_stride(int64_t step) const { return step == 0 || has_slots() ? width() : P; }

  // Where the tile of rows from `row` on, columns from `column` on, leaves its h at `step`.
  struct SinkOptions {
    Zoneout<Real> zoneout;
    Rows<Real> reset;  // of the next step
    const Real* mask;
    Real* next_masked;
  };
  struct Sink {
    Storage storage;
    void* y;
    int64_t y_stride, slot_stride, width;
    Real* next;
    const Real* previous;
    const uint8_t *flags, *next_flags;
    WithOptions<kFlags, SinkOptions> extra;

    __attribute__((noinline)) void put_apart(int r, int v, Vec<Real> h) const { put(r, v, h); }
    FASTSEQ_INLINE void put(int r, int v, Vec<Real> h) const {
      const int inside = lanes_inside<Real>(width, v * kLanes<Real>);
      if constexpr (kFlags == kWithOptions)
        if (extra.zoneout.is_on()) h = extra.zoneout.mix(r, v, load(previous + r * slot_stride + v * kLanes<Real>), h);
      Vec<Real> out = h;
      if (kFlags) {
        if (flags[r] & kFlagPadding) {
          out = zero<Real>();
          h = load(previous + r * slot_stride + v * kLanes<Real>);
        }
        if (next_flags && next_flags[r] & kFlagReset) {
          if constexpr (kFlags == kWithOptions)
            h = extra.reset.data ? extra.reset.load(r, v) : zero<Real>();
          else
            h = zero<Real>();
        }
      }
      if (inside > 0) store_as<Real>(storage, y, r * y_stride + v * kLanes<Real>, out, inside);
      if (next) store(next + r * slot_stride + v * kLanes<Real>, round_as(storage, h));
      if constexpr (kFlags == kWithOptions)
        if (extra.mask) {
          const int64_t at = r * slot_stride + v * kLanes<Real>;
          store(extra.next_masked + at, round_as(storage, h) * load(extra.mask + at));
        }
    }
  };
  Sink sink(int64_t step, int64_t row, int64_t column) const {
    const int64_t t = clock.time(step);
    Sink s;
    s.storage = storage;
    s.y = at(y, storage, (t * B + row) * P + column);
    s.y_stride = P;
    s.slot_stride = width();
    s.width = P - column;
    s.next = has_slots() ? slots[(step + 1) % 2] + row * width() + column : nullptr;
    s.previous = has_slots() ? (step == 0 ? initial : slots[step % 2]) + row * width() + column : nullptr;
    s.flags = kFlags ? flags + t * B + row : nullptr;
    s.next_flags = kFlags && step + 1 < clock.T ? flags + clock.time(step + 1) * B + row : nullptr;
    if constexpr (kFlags == kWithOptions) {
      s.extra.zoneout = zoneout_at<Real>(options->zoneout_h, options->zoneout_h_rate, t * B + row, column, P);
      s.extra.reset = reset_rows<Real>(s.next_flags ? options->h_reset : nullptr, options->h_reset_per_step, storage,
                                       clock.time(step + 1), B, P, row, column);
      s.extra.mask = mask ? mask + row * width() + column : nullptr;
      s.extra.next_masked = mask ? masked[(step + 1) % 2] + row * width() + column : nullptr;
    }
    return s;
  }
  void finish(void* h_n) const {
    const int64_t T = clock.T;
    store_rows<Real>(storage, state(T), read_stride(T), h_n, P, B, P);
  }
};

// h_{t-1} of row (t, b) as the weight gradient needs it, but for h_mask, told from y, h0 and the flags: null where it
// is zero by a reset.
template <Flags kFlags>
struct PreviousHidden {
  static constexpr bool kScaled = kFlags == kWithOptions;  // by h_mask
  Storage storage;
  Clock clock;
  int64_t B, P;
  const uint8_t* flags;
  const void *y, *h0;
  const LayerOptions* options;
  int64_t begin = 0;  // of the chunk that times are counted from

  const void* operator()(int64_t t, int64_t b) const {
    t += begin;
    if (kFlags && flags[t * B + b] & kFlagReset)
      return kFlags == kWithOptions ? reset_row(options->h_reset, options->h_reset_per_step, storage, t, b, B, P)
                                    : nullptr;
    const int64_t before = clock.before(t);
    // Padding is a suffix in time, so that a step next to it is the first of its sequence in the reverse direction.
    if (clock.is_first(t) || (kFlags && flags[before * B + b] & kFlagPadding)) return at(h0, storage, b * P);
    return at(y, storage, (before * B + b) * P);
  }
};

struct InputRows {
  static constexpr bool kScaled = false;
  Storage storage;
  const void* x;
  int64_t stride_t, stride_b;
  const void* operator()(int64_t t, int64_t b) const { return at(x, storage, t * stride_t + b * stride_b); }
};

// dL/dh_t of a tile: what comes from step t+1 through the recurrent weights, from y_t, and from h_n at the end of the
// sequence. With flags, `carry` [B, width] holds what passes a padded step by, or a step whose h is kept by zoneout; it
// begins as the gradient of h_n.
template <typename Real, Flags kFlags>
struct HiddenGradient {
  Storage storage;
  Clock clock;
  int64_t B, P;
  const uint8_t* flags;
  const void* grad_y;
  int64_t grad_y_stride_t, grad_y_stride_b;
  Real* last;   // [B, width]: gradient of h_n, or null
  Real* carry;  // [B, width] with flags, else null
  // With kWithOptions.
  const LayerOptions* options;
  PreviousHidden<kFlags> previous;
  Real* mask;    // [B, width]: h_mask, or null
  Real* dmask;   // [B, width]: the sums of its gradient, or null
  Real* dreset;  // [B, width]: the sums of that of the one reset state, or null

  static int64_t width(int64_t P) { return tape_width(P); }

  struct SourceOptions {
    Zoneout<Real> zoneout;
    Real clip;  // 0: none
    const Real* mask;
    Real *dmask, *dreset;
    void* dreset_step;  // the next step's own row of the user's [T, B, P], or null
    int64_t dreset_stride;
    const PreviousHidden<kFlags>* previous;
    int64_t next_time, row, column;
  };

  struct Source {
    Storage storage;
    const void* grad_y;
    int64_t grad_y_stride, columns, width;
    const Real* last;
    Real* carry;
    const uint8_t *flags, *next_flags;
    WithOptions<kFlags, SourceOptions> extra;

    // At the step itself.
    FASTSEQ_INLINE Vec<Real> at_step(int r, int v, Vec<Real> recurrent) const {
      const int inside = lanes_inside<Real>(columns, v * kLanes<Real>);
      Vec<Real> total = recurrent;
      if (kFlags) {
        total = before_step(r, v, recurrent);
        Real* kept = carry + r * width + v * kLanes<Real>;
        if (flags[r] & kFlagPadding) {
          store(kept, total);
          return zero<Real>();
        }
        store(kept, zero<Real>());
      } else if (last) {
        total = total + load(last + r * width + v * kLanes<Real>);
      }
      if (grad_y && inside > 0)
        total = total + load_as<Real>(storage, grad_y, r * grad_y_stride + v * kLanes<Real>, inside);
      if constexpr (kFlags == kWithOptions) {
        if (extra.clip > 0) total = clipped<Real>(total, extra.clip);
        if (extra.zoneout.is_on()) {
          Vec<Real> old = total;
          extra.zoneout.share(r, v, &old, &total);
          store(carry + r * width + v * kLanes<Real>, old);
        }
      }
      return total;
    }
    // Of the state that the next step (in processing order) read, before any padding or y is looked at.
    FASTSEQ_INLINE Vec<Real> before_step(int r, int v, Vec<Real> recurrent) const {
      if (!kFlags) return recurrent;
      if constexpr (kFlags == kWithOptions) return before_step_with_options(r, v, recurrent);
      const Vec<Real> through = next_flags && next_flags[r] & kFlagReset ? zero<Real>() : recurrent;
      return through + load(carry + r * width + v * kLanes<Real>);
    }
    // The same for tiles that would have a copy of all that for each of their vectors: out of line where it is long.
    FASTSEQ_INLINE Vec<Real> at_step_of_tile(int r, int v, Vec<Real> recurrent) const {
      return kFlags == kWithOptions ? at_step_apart(r, v, recurrent) : at_step(r, v, recurrent);
    }
    FASTSEQ_INLINE Vec<Real> before_step_of_tile(int r, int v, Vec<Real> recurrent) const {
      return kFlags == kWithOptions ? before_step_apart(r, v, recurrent) : before_step(r, v, recurrent);
    }

   private:
    __attribute__((noinline)) Vec<Real> at_step_apart(int r, int v, Vec<Real> recurrent) const {
      return at_step(r, v, recurrent);
    }
    __attribute__((noinline)) Vec<Real> before_step_apart(int r, int v, Vec<Real> recurrent) const {
      return before_step(r, v, recurrent);
    }
    FASTSEQ_INLINE Vec<Real> before_step_with_options(int r, int v, Vec<Real> recurrent) const {
      const int64_t column = v * kLanes<Real>, cell = r * width + column;
      Vec<Real> through = recurrent;
      if (extra.mask && next_flags) {
        if (extra.dmask) add_mask_gradient(r, column, recurrent);
        through = through * load(extra.mask + cell);
      }
      through = through + load(carry + cell);
      if (next_flags && next_flags[r] & kFlagReset) {
        if (extra.dreset) store(extra.dreset + cell, load(extra.dreset + cell) + through);
        const int inside = lanes_inside<Real>(columns, column);
        if (extra.dreset_step && inside > 0)
          store_as<Real>(storage, extra.dreset_step, r * extra.dreset_stride + column, through, inside);
        through = zero<Real>();
      }
      return through;
    }
    FASTSEQ_INLINE void add_mask_gradient(int r, int64_t column, Vec<Real> recurrent) const {
      const void* h = (*extra.previous)(extra.next_time, extra.row + r);
      const int inside = lanes_inside<Real>(columns, column);
      if (!h || inside <= 0) return;
      Real* sum = extra.dmask + r * width + column;
      store(sum, fma(recurrent, load_as<Real>(storage, h, extra.column + column, inside), load(sum)));
    }
  };
  // step == -1: the gradient of h0.
  Source source(int64_t step, int64_t row, int64_t column) const {
    const int64_t t = clock.time(step);
    Source s;
    s.storage = storage;
    s.grad_y =
        grad_y && step >= 0 ? at(grad_y, storage, t * grad_y_stride_t + row * grad_y_stride_b + column) : nullptr;
    s.grad_y_stride = grad_y_stride_b;
    s.columns = P - column;
    s.width = width(P);
    s.last = last && step == clock.T - 1 ? last + row * width(P) + column : nullptr;
    s.carry = carry ? carry + row * width(P) + column : nullptr;
    s.flags = kFlags && step >= 0 ? flags + t * B + row : nullptr;
    s.next_flags = kFlags && step + 1 < clock.T ? flags + clock.time(step + 1) * B + row : nullptr;
    if constexpr (kFlags == kWithOptions) {
      const int64_t of_tile = row * width(P) + column, next = s.next_flags ? clock.time(step + 1) : 0;
      s.extra.zoneout =
          zoneout_at<Real>(step >= 0 ? options->zoneout_h : nullptr, options->zoneout_h_rate, t * B + row, column, P);
      s.extra.clip = static_cast<Real>(options->grad_clip);
      s.extra.mask = mask ? mask + of_tile : nullptr;
      s.extra.dmask = dmask ? dmask + of_tile : nullptr;
      s.extra.dreset = dreset ? dreset + of_tile : nullptr;
      s.extra.dreset_step = options->dh_reset && options->h_reset_per_step
                                ? at(options->dh_reset, storage, (next * B + row) * P + column)
                                : nullptr;
      s.extra.dreset_stride = P;
      s.extra.previous = &previous;
      s.extra.next_time = next, s.extra.row = row, s.extra.column = column;
    }
    return s;
  }
};

// dL/dh_t of the projected h, kept for every step: the cell's derivative and the projection's weight gradient read it.
template <typename Real, Flags kFlags>
struct HiddenGradOp {
  static constexpr bool kTall = false;
  typename HiddenGradient<Real, kFlags>::Source source;
  Real* dh;
  int64_t dh_stride;
  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v)
      store(dh + (first + r) * dh_stride + v * kLanes<Real>, source.at_step_of_tile(first + r, v, acc[r][v]));
  }
};

// dL/dh_0: the last product of the reverse loop, straight to the user's storage.
template <typename Real, Flags kFlags>
struct InitialHiddenGradOp {
  static constexpr bool kTall = false;
  typename HiddenGradient<Real, kFlags>::Source source;
  Storage storage;
  void* dh0;
  int64_t stride;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int inside = lanes_inside<Real>(source.columns, v * kLanes<Real>);
      const Vec<Real> dh =
          source.before_step_of_tile(first + r, v, acc[r][v]);  // also where only the options' gradients are wanted
      if (inside > 0 && dh0) store_as<Real>(storage, dh0, (first + r) * stride + v * kLanes<Real>, dh, inside);
    }
  }
};

// The LSTM's projection: h is the product itself.
template <typename Real, Flags kFlags>
struct ProjectedHiddenOp {
  static constexpr bool kTall = false;
  typename HiddenState<Real, kFlags>::Sink sink;

  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first = 0) const {
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kFlags == kWithOptions)
        sink.put_apart(first + r, v, acc[r][v]);
      else
        sink.put(first + r, v, acc[r][v]);
    }
  }
};

// The input projection of one vector of units (LSTM: its four gates) for rows of x: bias + x W^T, into the gates.
template <typename Real>
struct ProjectionOp {
  static constexpr bool kTall = false;
  const Real* bias;
  Real* gates;
  int64_t gates_stride;
  int64_t vector_stride;  // from one vector of the panel to the next, in bias and in gates
  template <int kRows, int kVectors>
  FASTSEQ_INLINE void finish(const Vec<Real> (&acc)[kRows][kVectors], int first) const {
    for (int r = 0; r < kRows; ++r) FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v)
      store(gates + (first + r) * gates_stride + v * vector_stride, acc[r][v] + load(bias + v * vector_stride));
  }
};

// The sum of both biases, [gates, tape_width(H)] in the arithmetic type; either may be null.
template <typename Real>
void load_bias(Storage storage, const void* b_ih, const void* b_hh, int64_t gates, int64_t H, Real* to) {
  const int64_t width = tape_width(H);
  for (int64_t gate = 0; gate < gates; ++gate, to += width) {
    load_rows<Real>(storage, b_ih ? at(b_ih, storage, gate * H) : nullptr, 0, to, width, 1, H);
    if (b_hh)
      for (int64_t n = 0; n < width; n += kLanes<Real>) {
        const int inside = lanes_inside<Real>(H, n);
        if (inside) store(to + n, load(to + n) + load_as<Real>(storage, b_hh, gate * H + n, inside));
      }
  }
}

// Runs the input projection of a chunk of time, step by step or, where the batch is smaller than a tile, over all rows
// at once.
template <typename Real>
struct InputProjection {
  Storage storage;
  const void* x;
  int64_t stride_t, stride_b, B, I;
  Real* staged;  // this thread's: chunk rows x I, where x must be converted or gathered

  static bool all_at_once(int64_t B) { return B < kTileRows; }
  static bool needs_staging(Storage storage, int64_t B, int64_t stride_t, int64_t stride_b) {
    return is_half(storage) || (all_at_once(B) && B > 1 && stride_t != B * stride_b);
  }

  // Times [begin, end), rows of the team's tiles; calls body(product, rows' height, first row in the chunk) per tile of
  // rows with the product's panel yet to be filled in.
  template <typename Body>
  void sweep(int64_t begin, int64_t end, const Team& team, const RowTiles& batch, const Body& body) const {
    const int64_t first = batch.first(team.tiles.begin), last = batch.first(team.tiles.end);
    int64_t row_stride = stride_b, time_stride = stride_t;
    const Real* base = static_cast<const Real*>(x) + begin * stride_t + first * stride_b;
    if (staged) base = staged, row_stride = I, time_stride = (last - first) * I;
    if (all_at_once(B)) {
      const RowTiles rows((end - begin) * B);
      const int64_t stride = B == 1 ? time_stride : row_stride;
      for (int64_t j = 0; j < rows.count(); ++j)
        body(Product<Real>{nullptr, I, base + rows.first(j) * stride, stride}, rows.height(j), rows.first(j));
    } else {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t j = team.tiles.begin; j < team.tiles.end; ++j)
          body(Product<Real>{nullptr, I, base + (t - begin) * time_stride + (batch.first(j) - first) * row_stride,
                             row_stride},
               batch.height(j), (t - begin) * B + batch.first(j));
    }
  }
  void stage(int64_t begin, int64_t end, const Team& team, const RowTiles& batch) const {
    if (!staged) return;
    const int64_t first = batch.first(team.tiles.begin), rows = batch.first(team.tiles.end) - first;
    for (int64_t t = begin; t < end; ++t)
      load_rows<Real>(storage, at(x, storage, t * stride_t + first * stride_b), stride_b,
                      staged + (t - begin) * rows * I, I, rows, I);
  }
};

// Steps whose projected input is made at once: enough rows to reuse the packed weights, few enough that what is
// projected is still in the second-level cache when the recurrence comes to it.
inline int64_t chunk_steps(int64_t T, int64_t B, int64_t row_bytes) {
  constexpr int64_t kCacheBytes = int64_t{512} << 10;
  const int64_t for_reuse = 96 / B + 1;
  const int64_t for_cache = kCacheBytes / (B * row_bytes);
  const int64_t steps = for_reuse > for_cache ? for_reuse : for_cache;
  return steps < T ? steps : T;
}

}  // namespace
}  // namespace fastseq
