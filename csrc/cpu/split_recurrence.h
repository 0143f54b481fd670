// A recurrent layer over a sequence in float32 with every product made of bfloat16 terms by the tile unit: as
// recurrence.h, whose state, options and cells these classes share.
//
// What a product reads is split into terms where it is made: the weights when they are packed, x when its chunk of time
// comes, h and the gates' gradients by the thread whose cell has just left them in float32. The sums go through memory,
// a block of rows by four vectors, from where the cell takes them row by row, while the unit works on the next product.
#pragma once

#include "bf16_recurrence.h"

namespace fastseq {
namespace {

// An Op on the rows of a block, whose sums lie in memory; after(row) follows some rows behind, when what the Op stored
// there can be loaded again without a wait.
template <int kVectors, typename Op, typename After>
FASTSEQ_INLINE void finish_rows_of(const Op& op, int rows, const float* sums, Pace<float>& pace, const After& after) {
  constexpr int kBehind = 4;
  for (int r = 0; r < rows; ++r) {
    pace.next();
    Vec<float> acc[1][kVectors];
    FASTSEQ_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[0][v] = sum_at(sums, r, v);
    op.finish(acc, r);
    if (r >= kBehind) after(r - kBehind);
  }
  for (int r = rows > kBehind ? rows - kBehind : 0; r < rows; ++r) after(r);
}
template <bool kCellOfFour, typename Op, typename After>
FASTSEQ_INLINE void finish_rows(const Op& op, int rows, int vectors, const float* sums, BF16Unit<float>& unit,
                                const After& after) {
  Pace<float> pace(unit, rows);
  if constexpr (kCellOfFour) {
    finish_rows_of<4>(op, rows, sums, pace, after);
  } else {
    switch (vectors) {
      case 1:
        return finish_rows_of<1>(op, rows, sums, pace, after);
      case 2:
        return finish_rows_of<2>(op, rows, sums, pace, after);
      default:
        return finish_rows_of<4>(op, rows, sums, pace, after);
    }
  }
}

inline void clear_sums(float* sums) { memset(sums, 0, static_cast<size_t>(kSumsNumbers) * sizeof(float)); }

// Rows of a block, and the bytes of weights that a thread may have for itself. A core's tile unit is as fast with 16
// rows as with 32 where its operands come from the second-level cache; threads that share the units send each other
// their part of h, or of the gates' gradients, at every step. So where the weights that a step reads fit that cache
// each thread takes a part of the batch, however small.
constexpr int64_t kSplitResidentBytes = 1792 * 1024;
template <typename Params>
int64_t weight_bytes(const Params& p, int64_t gates, int64_t inputs) {
  return gates * p.H * inputs * kTerms<float> * static_cast<int64_t>(sizeof(BFloat16));
}
inline RowBlocks batch_blocks(int64_t B, int64_t weight_bytes) {
  const bool low = weight_bytes <= kSplitResidentBytes && B < 2 * kBlockHeight;
  return RowBlocks(B, low ? kBlockHeight / 2 : kBlockHeight);
}

// The terms of vectors [first, first + count) of a row.
template <typename Load>
FASTSEQ_INLINE void store_vectors(BFloat16* row, int64_t first, int count, const Load& vector) {
  int v = 0;
  if (first % 2 == 0)
    for (; v + 2 <= count; v += 2) {
      Vec<float> lines[kTerms<float>];
      chunk_terms(vector(v), vector(v + 1), lines);
      memcpy(row + (first + v) / 2 * kTerms<float> * kChunk, lines, sizeof(lines));
    }
  for (; v < count; ++v) {
    __m256i terms[kTerms<float>];
    split_terms(vector(v), terms);
    store_terms(row, first + v, terms);
  }
}

// Rows of a block of `height` that are worth a product, up to the last that is no padding; the sums of the others are
// zero. Flags may be null.
inline int rows_to_multiply(const uint8_t* flags, int height, float* sums) {
  int rows = height;
  if (flags)
    while (rows > 0 && flags[rows - 1] & kFlagPadding) --rows;
  if (rows < height) clear_sums(sums);
  return rows;
}

// The packed terms of a forward product: the units of `range`, their gates side by side.
template <typename Cell>
void pack_units(const void* w, int64_t H, int64_t K, Range units, BFloat16* to) {
  for (int64_t unit = units.begin; unit < units.end; ++unit)
    for (int64_t gate = 0; gate < Cell::kGates; ++gate)
      pack_columns_from_rows(static_cast<const float*>(w) + (gate * H + unit * kTileColumns) * K, K,
                             lanes_inside<float>(H, unit * kTileColumns), K,
                             to + (unit * Cell::kGates + gate) * vector_numbers<float>(K));
}

// With fewer rows in the batch than split_rows() the steps are those of recurrence.h, and only the large products, over
// many steps at once, are made of terms.
template <typename Cell, Flags kFlags>
class SplitForward : public RecurrentForward<Cell, float, kFlags> {
  using Base = RecurrentForward<Cell, float, kFlags>;
  using Base::hidden_, Base::flags_, Base::bias_, Base::progress_, Base::progress_stride_, Base::barrier_;
  using Base::out_vectors_, Base::unprojected_;
  using Base::p_, Base::clock_, Base::width_, Base::gates_stride_, Base::vectors_, Base::chunk_, Base::threads_;

 public:
  explicit SplitForward(const ForwardParams& p)
      : Base(p),
        in_tiles_(p.B >= split_rows()),
        blocks_(batch_blocks(p.B, weight_bytes(p, Cell::kGates, p.I + p.P))),
        h_stride_(row_numbers<float>(p.P)),
        x_stride_(row_numbers<float>(p.I)),
        u_stride_(row_numbers<float>(p.H)),
        w_numbers_(vector_numbers<float>(p.I)),
        r_numbers_(vector_numbers<float>(p.P)),
        w_hr_numbers_(vector_numbers<float>(p.H)) {}

  void place(Carver& carver) {
    Base::place_state(carver);
    w_ = carver.take<BFloat16>(Cell::kGates * vectors_ * w_numbers_);
    if (in_tiles_) {
      nothing_ = carver.take<float>(Cell::kGates * width_);
      r_ = carver.take<BFloat16>(Cell::kGates * vectors_ * r_numbers_);
      for (BFloat16*& h : h_) h = carver.take<BFloat16>(p_.B * h_stride_);
      if (p_.w_hr) {
        w_hr_ = carver.take<BFloat16>(out_vectors_ * w_hr_numbers_);
        u_ = carver.take<BFloat16>(p_.B * u_stride_);
      }
    } else {
      Base::place_recurrent(carver);
    }
    staged_ = carver.take<BFloat16>((in_tiles_ ? 1 : threads_) * chunk_ * p_.B * x_stride_);
  }

  void prepare() {
    Base::prepare();
    if (!in_tiles_) return;
    memset(nothing_, 0, static_cast<size_t>(Cell::kGates * width_) * sizeof(float));
    copy_rows(hidden_.read(0), hidden_.read_stride(0), h_[0], h_stride_, p_.B, p_.P);
    memset(h_[1], 0, static_cast<size_t>(p_.B * h_stride_) * sizeof(BFloat16));
    if (u_) memset(u_, 0, static_cast<size_t>(p_.B * u_stride_) * sizeof(BFloat16));
  }

  void work(int thread, int threads) {
    in_tiles_ ? steps_in_tiles(thread, threads) : steps_on_vectors(thread, threads);
  }

 private:
  void steps_on_vectors(int thread, int threads) {
    const Team team = Base::team_of(thread, threads);
    if (team.idle()) return;
    const Range units = team.slice(vectors_);
    Base::pack_recurrent(team);
    pack_units<Cell>(p_.w_ih, p_.H, p_.I, units, w_);
    BF16Unit<float> unit;
    BFloat16* staged = staged_ + thread * chunk_ * p_.B * x_stride_;
    Base::run_chunks(team, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        copy_rows(static_cast<const float*>(p_.x) + t * p_.x_stride_t, p_.x_stride_b,
                  staged + (t - begin) * p_.B * x_stride_, x_stride_, p_.B, p_.I);
      project(unit, Cell::panels(units), staged, begin, end, 0, p_.B);
    });
  }

  void steps_in_tiles(int thread, int threads) {
    const int64_t bytes = weight_bytes(p_, Cell::kGates, p_.I + p_.P);
    const Team team(thread, threads, blocks_.count(), vectors_ < out_vectors_ ? vectors_ : out_vectors_, bytes,
                    progress_, progress_stride_, kSplitResidentBytes);
    const Range units = team.slice(vectors_), outs = team.slice(out_vectors_);
    if (!team.idle()) {
      // Where groups read the same weights, the first packs those of the recurrence, the last those of the input.
      if (team.group == 0) pack_units<Cell>(p_.w_hh, p_.H, p_.P, units, r_);
      if (team.group == 0 && p_.w_hr) pack_units<ElmanCell>(p_.w_hr, p_.P, p_.H, outs, w_hr_);
      if (team.group == team.groups - 1) pack_units<Cell>(p_.w_ih, p_.H, p_.I, units, w_);
    }
    if (team.groups > 1) barrier_.wait(threads);
    if (team.idle()) return;

    BF16Unit<float> unit;
    alignas(64) float sums[2][kSumsNumbers];
    const PanelRange panels = Cell::panels(units);
    // One product of x and h where its weights stay in cache: the projected input need not be stored.
    const bool joined = p_.I > 0 && bytes / team.members <= kSplitResidentBytes;
    int64_t phase = 0;
    for (int64_t first = 0; first < p_.T; first += chunk_) {
      const int64_t last = first + chunk_ < p_.T ? first + chunk_ : p_.T;
      const int64_t begin = p_.reverse ? clock_.time(last - 1) : first, end = begin + last - first;  // in time
      stage(team, phase++, begin, end);
      if (!joined) {
        for (int64_t block = team.tiles.begin; block < team.tiles.end; ++block) team.await(block, phase);
        project(unit, panels, staged_, begin, end, blocks_.first(team.tiles.begin), blocks_.first(team.tiles.end));
        ++phase;
        for (int64_t block = team.tiles.begin; block < team.tiles.end; ++block) team.publish(block, phase);
      }
      for (int64_t step = first; step < last; ++step) {
        sweep_pipelined(
            unit, team, phase++, panels, sums,
            [&](const Panel& panel, int64_t block, float* to) {
              begin_product(unit, joined, step, begin, panel, block, to);
            },
            [&](const Panel& panel, int64_t block, const float* from) { cell(unit, from, step, begin, panel, block); });
        if (p_.w_hr)
          sweep_pipelined(
              unit, team, phase++, {outs.begin, outs.end}, sums,
              [&](const Panel& panel, int64_t block, float* to) { begin_projection(unit, step, panel, block, to); },
              [&](const Panel& panel, int64_t block, const float* from) {
                const int64_t row = blocks_.first(block), column = panel.first * kTileColumns;
                const ProjectedHiddenOp<float, kFlags> op{hidden_.sink(step, row, column)};
                finish_rows<false>(op, blocks_.height(block), panel.vectors, from, unit,
                                   [&](int r) { split_hidden(step, row + r, panel); });
              });
      }
    }
  }

  // The terms of x at times [begin, end), the members of a team each its share of a block's rows.
  void stage(const Team& team, int64_t phase, int64_t begin, int64_t end) const {
    for (int64_t block = team.tiles.begin; block < team.tiles.end; ++block) {
      team.await(block, phase);
      const Range rows = split(blocks_.height(block), team.members, team.member);
      const int64_t row = blocks_.first(block) + rows.begin;
      for (int64_t t = begin; t < end; ++t)
        copy_rows(static_cast<const float*>(p_.x) + t * p_.x_stride_t + row * p_.x_stride_b, p_.x_stride_b,
                  staged_ + ((t - begin) * p_.B + row) * x_stride_, x_stride_, rows.end - rows.begin, p_.I);
      team.publish(block, phase + 1);
    }
  }

  // bias + x W^T of times [begin, end) into the gates, for rows [first, last) of the batch.
  void project(BF16Unit<float>& unit, const PanelRange& panels, const BFloat16* staged, int64_t begin, int64_t end,
               int64_t first, int64_t last) const {
    // Rows of one step after another make blocks of even height where it is the whole batch.
    const bool whole = last - first == p_.B;
    const RowBlocks blocks(whole ? (end - begin) * p_.B : last - first);
    for (int64_t i = 0; i < panels.count(); ++i) {
      const Panel panel = panels.at(i);
      const int64_t column = panel.first * kTileColumns, vector_stride = Cell::template slot_stride<float>(width_);
      for (int64_t piece = 0; piece < (whole ? 1 : end - begin); ++piece)
        for (int64_t j = 0; j < blocks.count(); ++j) {
          const int64_t row = piece * p_.B + first + blocks.first(j);  // of the chunk
          multiply(unit, blocks.height(j), static_cast<int>(panel.vectors * Cell::kGates),
                   dense_left<float>(staged + row * x_stride_, x_stride_ * 2, chunks_of(p_.I)),
                   w_ + panel.first * Cell::kGates * w_numbers_, w_numbers_, {bias_ + column, 0, vector_stride},
                   {Base::gates(begin, begin) + row * gates_stride_ + column, gates_stride_, vector_stride});
        }
    }
  }

  // bias + x_t W^T + h_{t-1} R^T for a block, or what is left of it where the gates have the projected input.
  void begin_product(BF16Unit<float>& unit, bool joined, int64_t step, int64_t begin, const Panel& panel, int64_t block,
                     float* sums) const {
    const int64_t row = blocks_.first(block), t = clock_.time(step), column = panel.first * kTileColumns;
    const int rows = rows_of(step, block, sums);
    if (rows == 0) return;
    const int64_t vector_stride = Cell::template slot_stride<float>(width_);
    const LeftOperand h = dense_left<float>(h_[step % 2] + row * h_stride_, h_stride_ * 2, chunks_of(p_.P));
    const BFloat16* r = r_ + panel.first * Cell::kGates * r_numbers_;
    const Sums out{sums, kSumsStride, kTileColumns};
    const int vectors = static_cast<int>(panel.vectors * Cell::kGates);
    if (joined) {
      const BFloat16* x = staged_ + ((t - begin) * p_.B + row) * x_stride_;
      return unit.begin({rows,
                         vectors,
                         2,
                         {dense_left<float>(x, x_stride_ * 2, chunks_of(p_.I)), h},
                         {w_ + panel.first * Cell::kGates * w_numbers_, r},
                         {w_numbers_, r_numbers_},
                         {bias_ + column, 0, vector_stride},
                         out});
    }
    float* projected = Base::gates(t, begin) + row * gates_stride_ + column;
    unit.begin({rows,
                vectors,
                1,
                {h, {}},
                {r, nullptr},
                {r_numbers_, 0},
                {projected, gates_stride_, vector_stride},
                out,
                true});
  }

  void cell(BF16Unit<float>& unit, const float* sums, int64_t step, int64_t begin, const Panel& panel,
            int64_t block) const {
    const int64_t row = blocks_.first(block), column = panel.first * kTileColumns;
    auto op = Base::cell_op(step, begin, row, column);
    op.preactivation = nothing_, op.preactivation_stride = 0;  // the sums have it
    finish_rows<Cell::kHasC>(op, blocks_.height(block), panel.vectors, sums, unit, [&](int r) {
      if (!p_.w_hr) return split_hidden(step, row + r, panel);
      const float* from = unprojected_ + (row + r) * width_ + column;
      store_vectors(u_ + (row + r) * u_stride_, panel.first, panel.vectors,
                    [&](int v) { return load(from + v * kTileColumns); });
    });
  }
  // The terms of h_t for the next step to read.
  FASTSEQ_INLINE void split_hidden(int64_t step, int64_t row, const Panel& panel) const {
    if (step + 1 == p_.T) return;
    const int64_t column = panel.first * kTileColumns;
    const float* h = hidden_.read(step + 1) + row * hidden_.read_stride(step + 1) + column;
    store_vectors(h_[(step + 1) % 2] + row * h_stride_, panel.first, panel.vectors, [&](int v) {
      return load_numbers(h + v * kTileColumns, mask_part(p_.P - column - v * kTileColumns));
    });
  }
  // o tanh(c) W_hr^T for a block.
  void begin_projection(BF16Unit<float>& unit, int64_t step, const Panel& panel, int64_t block, float* sums) const {
    const int rows = rows_of(step, block, sums);
    if (rows == 0) return;
    unit.begin({rows,
                panel.vectors,
                1,
                {dense_left<float>(u_ + blocks_.first(block) * u_stride_, u_stride_ * 2, chunks_of(p_.H)), {}},
                {w_hr_ + panel.first * w_hr_numbers_, nullptr},
                {w_hr_numbers_, 0},
                {},
                {sums, kSumsStride, kTileColumns}});
  }
  int rows_of(int64_t step, int64_t block, float* sums) const {
    const uint8_t* flags = kFlags ? flags_ + clock_.time(step) * p_.B + blocks_.first(block) : nullptr;
    return rows_to_multiply(flags, blocks_.height(block), sums);
  }

  bool in_tiles_;
  RowBlocks blocks_;
  int64_t h_stride_, x_stride_, u_stride_, w_numbers_, r_numbers_, w_hr_numbers_;
  BFloat16 *w_ = nullptr, *r_ = nullptr, *w_hr_ = nullptr;
  BFloat16 *h_[2] = {nullptr, nullptr}, *u_ = nullptr, *staged_ = nullptr;  // u_: o tanh(c), to be projected
  float* nothing_ = nullptr;                                                // zeros, as many as the bias has
};

template <typename Cell, Flags kFlags>
class SplitBackward : public RecurrentBackward<Cell, float, kFlags> {
  using Base = RecurrentBackward<Cell, float, kFlags>;
  using Base::hidden_, Base::flags_, Base::progress_, Base::progress_stride_, Base::barrier_, Base::gates_,
      Base::dgates_;
  using Base::p_, Base::clock_, Base::width_, Base::gates_stride_, Base::vectors_, Base::chunk_, Base::threads_;
  using Base::valid_, Base::valid_rows_, Base::weights, Base::out_vectors_, Base::dh_, Base::dh_stride_,
      Base::unprojected_;

 public:
  explicit SplitBackward(const BackwardParams& p)
      : Base(p),
        in_tiles_(p.B >= split_rows()),
        blocks_(batch_blocks(p.B, weight_bytes(p, Cell::kGates, p.P))),
        dh_terms_stride_(row_numbers<float>(p.P)),
        d_stride_(row_numbers<float>(p.H, Cell::kGates)),
        numbers_(Cell::kGates * vector_numbers<float>(p.H)) {}

  void place(Carver& carver) {
    Base::place_state(carver);
    if (in_tiles_) {
      r_ = carver.take<BFloat16>(out_vectors_ * numbers_);
      Base::place_projected(carver);
      if (p_.w_hr) {
        w_hr_ = carver.take<BFloat16>(vectors_ * vector_numbers<float>(p_.P));
        dh_terms_ = carver.take<BFloat16>(p_.B * dh_terms_stride_);
      }
      for (BFloat16*& d : d_) d = carver.take<BFloat16>(p_.B * d_stride_);
      if (p_.db) db_step_ = carver.take<float>(threads_ * Cell::kGates * width_);
    } else {
      Base::place_recurrent(carver);
    }
    if (p_.dx) {
      w_ = carver.take<BFloat16>(vectors_of(p_.I) * numbers_);
      row_numbers_ = BF16InputGradient<FloatGradientRows>::staged_numbers(Cell::kGates, p_.H);
      rows_ = carver.take<BFloat16>(threads_ * row_numbers_);
    }
    if (weights()) {
      const int64_t all = p_.I + p_.P, of_h = p_.w_hr ? p_.H : 0;
      const int64_t most = Cell::kGates * vectors_ > out_vectors_ ? Cell::kGates * vectors_ : out_vectors_;
      columns_ = carver.take<char>(2 * (all > of_h ? all : of_h) * WeightGradient::kColumnBytes);
      packed_stride_ = divide_up(most, threads_) * WeightGradient::kVectorNumbers;
      packed_ = carver.take<BFloat16>(threads_ * packed_stride_);
      sums_ = carver.take<float>(all * WeightGradient::sums_stride(Cell::kGates, p_.H));
      sums_hr_ = carver.take<float>(of_h * WeightGradient::sums_stride(1, p_.P));
    }
    if (Base::recomputes()) {
      again_rows_ = divide_up(divide_up(chunk_ * p_.B, kBlockHeight), threads_) * kBlockHeight;
      again_w_ = carver.take<BFloat16>(Cell::kGates * vectors_ * vector_numbers<float>(p_.I));
      again_r_ = carver.take<BFloat16>(Cell::kGates * vectors_ * vector_numbers<float>(p_.P));
      again_x_ = carver.take<BFloat16>(threads_ * again_rows_ * row_numbers<float>(p_.I));
      again_h_ = carver.take<BFloat16>(threads_ * again_rows_ * row_numbers<float>(p_.P));
      again_numbers_ = round_up(p_.I, 16) + round_up(p_.P, 16) + again_rows_ * width_;
      again_floats_ = carver.take<float>(threads_ * again_numbers_);
    }
  }

  void prepare() {
    Base::prepare();
    if (in_tiles_)
      for (BFloat16* d : d_) memset(d, 0, static_cast<size_t>(p_.B * d_stride_) * sizeof(BFloat16));
    if (dh_terms_) memset(dh_terms_, 0, static_cast<size_t>(p_.B * dh_terms_stride_) * sizeof(BFloat16));
  }

  void work(int thread, int threads) {
    const Team team = in_tiles_
                          ? Team(thread, threads, blocks_.count(), vectors_ < out_vectors_ ? vectors_ : out_vectors_,
                                 weight_bytes(p_, Cell::kGates, p_.P), progress_, progress_stride_, kSplitResidentBytes)
                          : Base::team_of(thread, threads);
    const Range share = split(vectors_, threads, thread);
    if (!in_tiles_)
      Base::pack_recurrent(team);
    else
      pack_columns_from_matrix(static_cast<const float*>(p_.w_hh), Cell::kGates, p_.H, p_.P,
                               split(out_vectors_, threads, thread), numbers_, r_);
    if (in_tiles_ && p_.w_hr)
      pack_columns_from_matrix(static_cast<const float*>(p_.w_hr), 1, p_.P, p_.H, share, vector_numbers<float>(p_.P),
                               w_hr_);
    if (p_.dx)
      pack_columns_from_matrix(static_cast<const float*>(p_.w_ih), Cell::kGates, p_.H, p_.I,
                               split(vectors_of(p_.I), threads, thread), numbers_, w_);
    if (Base::recomputes()) {
      pack_units<Cell>(p_.w_hh, p_.H, p_.P, share, again_r_);
      pack_units<Cell>(p_.w_ih, p_.H, p_.I, share, again_w_);
    }
    BF16Unit<float> unit;
    alignas(64) float sums[2][kSumsNumbers];
    int64_t phase = 0;
    Base::run_chunks(
        thread, threads, [&](const Chunk& chunk) { make_gates(unit, sums[0], chunk, thread, threads); },
        [&](const Chunk& chunk) {
          if (in_tiles_)
            through_time(unit, sums, team, chunk, phase);
          else
            Base::through_time(team, chunk, phase);
        },
        [&](const Chunk& chunk) { large_products(unit, sums[0], chunk, thread, threads); });
  }

 private:
  using WeightGradient = BF16WeightGradient<FloatGradientRows>;

  // The gates of a chunk of time made again, as Recompute::run does: this thread's share of its rows.
  void make_gates(BF16Unit<float>& unit, float* sums, const Chunk& chunk, int thread, int threads) const {
    if constexpr (kFlags == kWithOptions) {
      const int64_t x_stride = row_numbers<float>(p_.I), h_stride = row_numbers<float>(p_.P);
      const RowBlocks blocks((chunk.last - chunk.first) * p_.B);
      const Range mine = split(blocks.count(), threads, thread);
      BFloat16 *x = again_x_ + thread * again_rows_ * x_stride, *h = again_h_ + thread * again_rows_ * h_stride;
      float *xs = again_floats_ + thread * again_numbers_, *hs = xs + round_up(p_.I, 16), *cs = hs + round_up(p_.P, 16);
      const int64_t first = blocks.first(mine.begin), last = blocks.first(mine.end);
      for (int64_t row = first; row < last; ++row) {
        Base::again_.stage_row(chunk.begin, row, xs, hs, cs + (row - first) * width_);
        copy_rows(xs, 0, x + (row - first) * x_stride, 0, 1, p_.I);
        copy_rows(hs, 0, h + (row - first) * h_stride, 0, 1, p_.P);
      }
      const PanelRange panels = Cell::panels({0, vectors_});
      for (int64_t i = 0; i < panels.count(); ++i) {
        const Panel panel = panels.at(i);
        const int64_t column = panel.first * kTileColumns, vector = panel.first * Cell::kGates;
        for (int64_t block = mine.begin; block < mine.end; ++block) {
          const int64_t row = blocks.first(block), local = row - first;
          unit.begin(
              {blocks.height(block),
               static_cast<int>(panel.vectors * Cell::kGates),
               p_.I > 0 ? 2 : 1,
               {dense_left<float>(h + local * h_stride, h_stride * 2, chunks_of(p_.P)),
                dense_left<float>(x + local * x_stride, x_stride * 2, chunks_of(p_.I))},
               {again_r_ + vector * vector_numbers<float>(p_.P), again_w_ + vector * vector_numbers<float>(p_.I)},
               {vector_numbers<float>(p_.P), vector_numbers<float>(p_.I)},
               {},
               {sums, kSumsStride, kTileColumns}});
          unit.finish();
          finish_rows<Cell::kHasC>(
              Base::again_.gates_op(column, Base::again_.bias + column, 0, dgates_ + row * gates_stride_, gates_stride_,
                                    cs + local * width_),
              blocks.height(block), panel.vectors, sums, unit, [](int) {});
        }
      }
    }
  }

  // The gradients of the input and the weights from a chunk, added to those of the chunks before.
  void large_products(BF16Unit<float>& unit, float* sums, const Chunk& chunk, int thread, int threads) {
    const int64_t rows = (chunk.last - chunk.first) * p_.B;
    const FloatGradientRows d{dgates_, gates_stride_, width_, Cell::kGates, p_.H, rows};
    if (p_.dx)
      BF16InputGradient<FloatGradientRows>{
          d, p_.I, w_, static_cast<float*>(p_.dx) + chunk.begin * p_.B * p_.I, valid_, valid_rows_}
          .run(unit, sums, rows_ + thread * row_numbers_, thread, threads);
    if (!weights()) return;
    const InputRows x{p_.storage, static_cast<const float*>(p_.x) + chunk.begin * p_.x_stride_t, p_.x_stride_t,
                      p_.x_stride_b};
    WeightGradient{d, p_.B, chunk.last < p_.T, chunk.first == 0, valid_, valid_rows_}.run(
        unit, columns_, packed_ + thread * packed_stride_, sums_, thread, threads, barrier_,
        BF16RowSource<float, InputRows>{p_.I, x, static_cast<float*>(p_.dw_ih)},
        BF16RowSource<float, PreviousHidden<kFlags>>{p_.P, Base::previous_hidden(chunk.begin),
                                                     static_cast<float*>(p_.dw_hh), hidden_.mask, hidden_.width(p_.P)});
    if (p_.w_hr)
      WeightGradient{{dh_, dh_stride_, tape_width(p_.P), 1, p_.P, rows},
                     p_.B,
                     chunk.last < p_.T,
                     chunk.first == 0,
                     valid_,
                     valid_rows_}
          .run(unit, columns_, packed_ + thread * packed_stride_, sums_hr_, thread, threads, barrier_,
               BF16RowSource<float, InputRows>{p_.H, InputRows{p_.storage, unprojected_, p_.B * width_, width_},
                                               static_cast<float*>(p_.dw_hr)});
  }

  void through_time(BF16Unit<float>& unit, float (*sums)[kSumsNumbers], const Team& team, const Chunk& chunk,
                    int64_t& phase) const {
    if (team.idle()) return;
    const Range units = team.slice(vectors_), outs = team.slice(out_vectors_);
    const PanelRange of_units{units.begin, units.end}, of_outs{outs.begin, outs.end};
    for (int64_t step = chunk.last - 1; step >= chunk.first; --step) {
      if (p_.w_hr)
        sweep_pipelined(
            unit, team, phase++, of_outs, sums,
            [&](const Panel& panel, int64_t block, float* to) { begin_product(unit, step, panel, block, to); },
            [&](const Panel& panel, int64_t block, const float* from) {
              hidden(unit, from, step, chunk, panel, block);
            });
      sweep_pipelined(
          unit, team, phase++, of_units, sums,
          [&](const Panel& panel, int64_t block, float* to) {
            p_.w_hr ? begin_projection(unit, step, panel, block, to) : begin_product(unit, step, panel, block, to);
          },
          [&](const Panel& panel, int64_t block, const float* from) {
            cell(unit, from, step, chunk, panel, block, team.thread);
          });
    }
    if (chunk.first > 0) return;
    const bool of_options = kFlags == kWithOptions && (p_.options->dh_mask || p_.options->dh_reset);
    if (p_.dh0 || of_options)
      sweep_pipelined(
          unit, team, phase++, of_outs, sums,
          [&](const Panel& panel, int64_t block, float* to) { begin_product(unit, -1, panel, block, to); },
          [&](const Panel& panel, int64_t block, const float* from) { initial(unit, from, panel, block); });
  }

  // dgates_{t+1} R for a block; there is none at the last step, and none on padding.
  void begin_product(BF16Unit<float>& unit, int64_t step, const Panel& panel, int64_t block, float* sums) const {
    const int64_t row = blocks_.first(block);
    if (step == p_.T - 1) return clear_sums(sums);
    const int rows = rows_of(step + 1, block, sums);
    if (rows == 0) return;
    unit.begin(
        {rows,
         panel.vectors,
         1,
         {dense_left<float>(d_[(step + 1) % 2] + row * d_stride_, d_stride_ * 2, Cell::kGates * chunks_of(p_.H)), {}},
         {r_ + panel.first * numbers_, nullptr},
         {numbers_, 0},
         {},
         {sums, kSumsStride, kTileColumns}});
  }

  void cell(BF16Unit<float>& unit, const float* sums, int64_t step, const Chunk& chunk, const Panel& panel,
            int64_t block, int thread) const {
    const int64_t row = blocks_.first(block), column = panel.first * kTileColumns, width = group_numbers<float>(p_.H);
    const float* gradients = Base::dgates_at(step, chunk) + row * gates_stride_ + column;
    BFloat16* to = d_[step % 2] + row * d_stride_;
    const bool needed = step > 0 || p_.dh0 || kFlags == kWithOptions;
    auto op = Base::cell_op(step, chunk, block, row, column);
    // The bias gradients of a step's rows are added up before they are added to those of the other steps.
    float *all = op.db, *of_step = db_step_ + thread * Cell::kGates * width_ + column;
    if (all) {
      op.db = of_step;
      for (int gate = 0; gate < Cell::kGates; ++gate)
        memset(of_step + gate * width_, 0, static_cast<size_t>(panel.vectors * kTileColumns) * sizeof(float));
    }
    finish_rows<false>(op, blocks_.height(block), panel.vectors, sums, unit, [&](int r) {
      if (!needed) return;
      for (int gate = 0; gate < Cell::kGates; ++gate)
        store_vectors(to + r * d_stride_ + gate * width, panel.first, panel.vectors,
                      [&](int v) { return load(gradients + r * gates_stride_ + gate * width_ + v * kTileColumns); });
    });
    if (all)
      for (int gate = 0; gate < Cell::kGates; ++gate)
        for (int v = 0; v < panel.vectors; ++v) {
          const int64_t at = gate * width_ + v * kTileColumns;
          store(all + at, load(all + at) + load(of_step + at));
        }
  }
  // dL/dh_t of the projected h, and its terms.
  void hidden(BF16Unit<float>& unit, const float* sums, int64_t step, const Chunk& chunk, const Panel& panel,
              int64_t block) const {
    const int64_t row = blocks_.first(block), column = panel.first * kTileColumns;
    const auto op = Base::hidden_op(step, chunk, row, column);
    finish_rows<false>(op, blocks_.height(block), panel.vectors, sums, unit, [&](int r) {
      store_vectors(dh_terms_ + (row + r) * dh_terms_stride_, panel.first, panel.vectors,
                    [&](int v) { return load(op.dh + r * dh_stride_ + v * kTileColumns); });
    });
  }
  // dL/dh_t W_hr for a block.
  void begin_projection(BF16Unit<float>& unit, int64_t step, const Panel& panel, int64_t block, float* sums) const {
    const int64_t row = blocks_.first(block), numbers = vector_numbers<float>(p_.P);
    const int rows = rows_of(step, block, sums);
    if (rows == 0) return;
    unit.begin({rows,
                panel.vectors,
                1,
                {dense_left<float>(dh_terms_ + row * dh_terms_stride_, dh_terms_stride_ * 2, chunks_of(p_.P)), {}},
                {w_hr_ + panel.first * numbers, nullptr},
                {numbers, 0},
                {},
                {sums, kSumsStride, kTileColumns}});
  }
  int rows_of(int64_t step, int64_t block, float* sums) const {
    const uint8_t* flags = kFlags ? flags_ + clock_.time(step) * p_.B + blocks_.first(block) : nullptr;
    return rows_to_multiply(flags, blocks_.height(block), sums);
  }
  void initial(BF16Unit<float>& unit, const float* sums, const Panel& panel, int64_t block) const {
    finish_rows<false>(Base::initial_op(blocks_.first(block), panel.first * kTileColumns), blocks_.height(block),
                       panel.vectors, sums, unit, [](int) {});
  }

  bool in_tiles_;
  RowBlocks blocks_;
  int64_t dh_terms_stride_, d_stride_, numbers_, row_numbers_ = 0, packed_stride_ = 0;
  BFloat16 *r_ = nullptr, *w_ = nullptr, *w_hr_ = nullptr, *rows_ = nullptr, *packed_ = nullptr;
  BFloat16 *d_[2] = {nullptr, nullptr}, *dh_terms_ = nullptr;
  char* columns_ = nullptr;
  float *sums_ = nullptr, *sums_hr_ = nullptr, *db_step_ = nullptr;
  // For gates that are made again: the weights, and this many rows for each thread.
  int64_t again_rows_ = 0, again_numbers_ = 0;
  BFloat16 *again_w_ = nullptr, *again_r_ = nullptr, *again_x_ = nullptr, *again_h_ = nullptr;
  float* again_floats_ = nullptr;
};

// Steps in tiles; else large products of at least so many rows; else nothing here is worth its packing.
constexpr int64_t kSplitLargeRows = 96;
inline bool may_split(const ForwardParams& p) {
  if (p.storage != Storage::kFloat32 || normalises(p.options)) return false;
  return p.B >= split_rows() || (p.B <= kTileRows && p.T * p.B >= kSplitLargeRows && p.w_hr == nullptr);
}
inline bool may_split(const BackwardParams& p) {
  if (p.storage != Storage::kFloat32 || normalises(p.options)) return false;
  return p.B >= split_rows() || p.T * p.B >= kSplitLargeRows;
}

// By the backward's blocks: forward and backward have one order, and the forward's may be higher.
template <typename Cell, typename Params>
BatchCut split_cut(const Params& p) {
  const int64_t bytes = weight_bytes(p, Cell::kGates, p.P);
  return {batch_blocks(p.B, bytes).most, bytes > kSplitResidentBytes};
}

template <template <typename, Flags> class Kernel, typename Cell, typename Params>
void launch_split(const Params& p) {
  if (p.options)
    launch<Kernel<Cell, kWithOptions>>(p);
  else if (p.flags)
    run_by_length(p, Cell::kGates, p.B >= split_rows() ? split_cut<Cell>(p) : layer_cut<Cell, float>(p),
                  &launch<Kernel<Cell, kWithFlags>>);
  else
    launch<Kernel<Cell, kNoFlags>>(p);
}

// float32 by terms, bfloat16 as it is, the rest as the avx512 set.
template <template <typename> class BF16Kernel, typename BF16Cell, template <typename, Flags> class Kernel,
          typename Cell, typename Params, void (*KernelTable::*kBase)(const Params&)>
void dispatch_split(const Params& p) {
  if (may_split(p))
    launch_split<Kernel, Cell>(p);
  else
    dispatch_bf16<BF16Kernel, BF16Cell, Params, kBase>(p);
}

constexpr RecurrentKernels make_split_kernels(const char* name) {
  return {name,
          &dispatch_split<BF16RecurrentForward, BF16LstmCell, SplitForward, LstmCell, ForwardParams,
                          &KernelTable::lstm_forward>,
          &dispatch_split<BF16RecurrentBackward, BF16LstmCell, SplitBackward, LstmCell, BackwardParams,
                          &KernelTable::lstm_backward>,
          &dispatch_split<BF16RecurrentForward, BF16ElmanCell, SplitForward, ElmanCell, ForwardParams,
                          &KernelTable::rnn_forward>,
          &dispatch_split<BF16RecurrentBackward, BF16ElmanCell, SplitBackward, ElmanCell, BackwardParams,
                          &KernelTable::rnn_backward>};
}

}  // namespace
}  // namespace fastseq
