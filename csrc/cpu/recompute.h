// The gates (LSTM) or slopes (Elman) of a chunk of time made again in the backward, where the forward kept y and c
// only.
//
// Every h_{t-1} is known by then, so all rows of the chunk are independent: two products over time and batch at once,
// which read the packed weights far more seldom than the forward's steps had to.
#pragma once

#include "lstm.h"
#include "rnn.h"

namespace fastseq {
namespace {

// Steps [first, last) in processing order, which are the times from `begin` on.
struct Chunk {
  int64_t first, last, begin;
};

template <typename Cell, typename Real, Flags kFlags>
struct Recompute {
  Storage storage;
  Activation activation;
  Clock clock;
  int64_t B, I, H, P;
  InputRows x;
  PreviousHidden<kFlags> previous;
  const Real* h_mask;  // [B, tape_width(P)], or null
  const Real *c, *c0;  // [T, B, tape_width(H)], [B, tape_width(H)]; both are read for peepholes only
  const Real* peephole;
  const LayerOptions* options;
  Real* bias;  // [gates, tape_width(H)]
  // Of place_weights: packed w_ih and w_hh, and staged_numbers() of each thread.
  Real *w = nullptr, *r = nullptr, *staged = nullptr;

  // So many rows share what is read of the weights.
  static constexpr int64_t kRows = 16 * kTileRows;
  // Rows of a chunk: enough for the large products after it, few enough that its gates stay in the second-level cache.
  static int64_t steps(int64_t T, int64_t B) {
    const int64_t wanted = divide_up(512, B);
    return wanted < T ? wanted : T;
  }
  static int64_t staged_numbers(int64_t I, int64_t H, int64_t P) {
    return round_up(kRows * (I + P + (Cell::kHasC ? tape_width(H) : 0)), 16);
  }

  void place_weights(Carver& carver, int threads) {
    w = carver.take<Real>(Cell::kGates * tape_width(H) * I);
    r = carver.take<Real>(Cell::kGates * tape_width(H) * P);
    staged = carver.take<Real>(threads * staged_numbers(I, H, P));
  }
  void pack(const void* w_ih, const void* w_hh, int thread, int threads) const {
    const Range units{0, tape_width(H) / kLanes<Real>};
    if (thread == 0) Cell::template pack<Real>(storage, w_hh, H, P, units, r);
    if (thread == threads - 1) Cell::template pack<Real>(storage, w_ih, H, I, units, w);
  }

  // This thread's share of the rows of a chunk, into gates [rows, gates_stride].
  void run(const Chunk& chunk, Real* gates, int64_t gates_stride, int thread, int threads) const {
    const PanelRange panels = Cell::panels({0, tape_width(H) / kLanes<Real>});
    stretches(chunk, thread, threads, [&](const RowTiles& tiles, Range part, const Real* xs, const Real* hs) {
      const Real* cs = hs + kRows * P;
      const int64_t row0 = tiles.first(part.begin);
      for (int64_t i = 0; i < panels.count(); ++i) {
        const Panel panel = panels.at(i);
        for (int64_t tile = part.begin; tile < part.end; ++tile)
          project(panel, tiles.height(tile), xs + (tiles.first(tile) - row0) * I,
                  gates + tiles.first(tile) * gates_stride, gates_stride);
        for (int64_t tile = part.begin; tile < part.end; ++tile) {
          const int64_t row = tiles.first(tile) - row0;
          activate_tile(panel, tiles.height(tile), hs + row * P, cs + row * tape_width(H),
                        gates + tiles.first(tile) * gates_stride, gates_stride);
        }
      }
    });
  }

  // Calls body(tiles, part, xs, hs) for each part of this thread's tiles of the chunk's rows, with the rows of x and of
  // h_{t-1} staged from the first of the part on.
  template <typename Body>
  void stretches(const Chunk& chunk, int thread, int threads, const Body& body) const {
    const RowTiles tiles((chunk.last - chunk.first) * B);
    const Range mine = split(tiles.count(), threads, thread);
    Real* xs = staged + thread * staged_numbers(I, H, P);
    Real* hs = xs + kRows * I;
    for (int64_t first = mine.begin; first < mine.end; first += kRows / kTileRows) {
      const int64_t last = first + kRows / kTileRows < mine.end ? first + kRows / kTileRows : mine.end;
      stage(chunk.begin, tiles.first(first), tiles.first(last), xs, hs, hs + kRows * P);
      body(tiles, Range{first, last}, xs, hs);
    }
  }
  // bias + W x, or `plus` + R h_{t-1}, of a tile's rows.
  void project(const Panel& panel, int rows, const Real* from, Real* gates, int64_t gates_stride) const {
    multiply(panel, rows, w, from, I, bias, gates, gates_stride);
  }
  void project_hidden(const Panel& panel, int rows, const Real* from, const Real* plus, Real* to,
                      int64_t to_stride) const {
    multiply(panel, rows, r, from, P, plus, to, to_stride);
  }

  // Of row `row` of the chunk that begins at time `begin`.
  void stage_row(int64_t begin, int64_t row, Real* xs, Real* hs, Real* cs) const {
    const int64_t t = begin + row / B, b = row % B;
    load_rows<Real>(storage, x(t, b), 0, xs, I, 1, I);
    load_rows<Real>(storage, previous(t, b), 0, hs, P, 1, P);
    if (h_mask) scale(hs, h_mask + b * tape_width(P));
    if (Cell::kHasC && peephole) stage_c(t, b, cs);
  }
  // What makes the gates of rows from the sums of their products: preactivation, stride included, is what is added.
  auto gates_op(int64_t column, const Real* preactivation, int64_t preactivation_stride, Real* gates,
                int64_t gates_stride, const Real* c_before) const {
    const int64_t width = tape_width(H);
    if constexpr (Cell::kHasC)
      return LstmGatesOp<Real>{
          preactivation,  preactivation_stride,
          gates + column, gates_stride,
          width,          peephole ? c_before + column : nullptr,
          width,          cell_options<Real>(*options, storage, peephole, width, 0, B, H, 0, column)};
    else
      return ElmanSlopesOp<Real>{activation, preactivation, preactivation_stride, gates + column, gates_stride};
  }

 private:
  void multiply(const Panel& panel, int rows, const Real* weights, const Real* from, int64_t K, const Real* plus,
                Real* to, int64_t to_stride) const {
    const int64_t column = panel.first * kLanes<Real>;
    const ProjectionOp<Real> op{plus + column, to + column, to_stride, Cell::template slot_stride<Real>(tape_width(H))};
    Cell::template run<Chains::kOne, Real>(
        rows, panel, op, Product<Real>{weights + column * K * Cell::kGates, K, from, K, chain_for<Real>(H)});
  }
  void stage(int64_t begin, int64_t first, int64_t last, Real* xs, Real* hs, Real* cs) const {
    for (int64_t row = first; row < last; ++row, xs += I, hs += P, cs += tape_width(H))
      stage_row(begin, row, xs, hs, cs);
  }
  void scale(Real* row, const Real* by) const {
    for (int64_t n = 0; n < P; n += kLanes<Real>) {
      const int inside = lanes_inside<Real>(P, n);
      store_part(row + n, load_part(row + n, inside) * load(by + n), inside);
    }
  }
  void stage_c(int64_t t, int64_t b, Real* to) const {
    const int64_t width = tape_width(H);
    if (previous.flags[t * B + b] & kFlagReset) {
      load_rows<Real>(storage, reset_row(options->c_reset, options->c_reset_per_step, storage, t, b, B, H), 0, to,
                      width, 1, H);
    } else {
      const Real* from = clock.is_first(t) ? c0 + b * width : c + (clock.before(t) * B + b) * width;
      memcpy(to, from, static_cast<size_t>(width) * sizeof(Real));
    }
  }
  void activate_tile(const Panel& panel, int rows, const Real* h, const Real* c_before, Real* gates,
                     int64_t gates_stride) const {
    const int64_t column = panel.first * kLanes<Real>;
    const Product<Real> product{r + column * P * Cell::kGates, P, h, P, chain_for<Real>(H)};
    Cell::template run<Chains::kOne, Real>(
        rows, panel, gates_op(column, gates + column, gates_stride, gates, gates_stride, c_before), product);
  }
};

}  // namespace
}  // namespace fastseq
