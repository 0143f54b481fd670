// A recurrent layer over a sequence in bfloat16, forward and back-propagation through time: as recurrence.h, with
// products of bfloat16 summed in float32.
//
// x, h and the weights are bfloat16 as they come, so that every product is exact; c, the gates and all sums are
// float32. The gates' gradients are rounded to bfloat16 where they enter a product (the bias gradients sum them
// unrounded): half a unit in the last place of what the results are stored in, at random. Step flags, options and
// projections are left to recurrence.h.
#pragma once

#include "bf16_gradients.h"
#include "launch.h"
#include "recurrence.h"

namespace fastseq {
namespace {

inline const BFloat16* half(const void* data) { return static_cast<const BFloat16*>(data); }
inline BFloat16* half(void* data) { return static_cast<BFloat16*>(data); }

// Weights that stay in a core's second-level cache beside the rest, so that one product may read them all at every
// step.
constexpr int64_t kSumsNumbers = kBlockHeight * kSumsStride;
constexpr int64_t kFusedBytes = 1200 * 1024;

// The panels are walked forwards and backwards by turns, as in Team::sweep.
FASTSEQ_INLINE Panel panel_at(const PanelRange& panels, int64_t phase, int64_t i) {
  return panels.at(phase % 2 == 0 ? i : panels.count() - 1 - i);
}

// Team::sweep with every product made during the cell before it: begin(panel, tile, sums) begins it,
// complete(panel, tile, sums) makes use of it and advances the next.
template <typename Number, typename Begin, typename Complete>
void sweep_pipelined(BF16Unit<Number>& unit, const Team& team, int64_t phase, const PanelRange& panels,
                     float (*sums)[kSumsNumbers], const Begin& begin, const Complete& complete) {
  const int64_t tiles = team.tiles.end - team.tiles.begin, count = panels.count() * tiles;
  if (panels.count() == 0)
    for (int64_t tile = team.tiles.begin; tile < team.tiles.end; ++tile) team.publish(tile, phase + 1);
  const auto start = [&](int64_t i) {
    const int64_t tile = team.tiles.begin + i % tiles;
    if (i < tiles) team.await(tile, phase);
    begin(panel_at(panels, phase, i / tiles), tile, sums[i % 2]);
  };
  if (count > 0) start(0);
  for (int64_t i = 0; i < count; ++i) {
    unit.finish();
    const Panel panel = panel_at(panels, phase, i / tiles);
    const int64_t tile = team.tiles.begin + i % tiles;
    if (i + 1 < count) start(i + 1);
    complete(panel, tile, sums[i % 2]);
    if (i / tiles == panels.count() - 1) team.publish(tile, phase + 1);
  }
}

template <typename Cell>
class BF16RecurrentForward {
 public:
  explicit BF16RecurrentForward(const ForwardParams& p)
      : p_(p),
        clock_{p.T, p.reverse},
        batch_(p.B),
        width_(tape_width(p.H)),
        gates_stride_(gates_width(p.H, Cell::kGates)),
        vectors_(vectors_of(p.H)),
        h_stride_(row_numbers<BFloat16>(p.H)),
        x_stride_(row_numbers<BFloat16>(p.I)),
        w_numbers_(vector_numbers<BFloat16>(p.I)),
        r_numbers_(vector_numbers<BFloat16>(p.H)),
        chunk_(chunk_steps(p.T, p.B, gates_stride_ * static_cast<int64_t>(sizeof(float)))),
        threads_(useful_threads(p.threads, p.T * p.B * Cell::kGates * p.H * (p.I + p.H), batch_.count(), vectors_)) {}

  int threads() const { return threads_; }

  void place(Carver& carver) {
    const int64_t B = p_.B;
    w_ = carver.take<BFloat16>(Cell::kGates * vectors_ * w_numbers_);
    r_ = carver.take<BFloat16>(Cell::kGates * vectors_ * r_numbers_);
    bias_ = carver.take<float>(Cell::kGates * width_);
    c_ = Cell::kHasC ? carver.take<float>(B * width_) : nullptr;
    gates_ = p_.gates ? nullptr : carver.take<float>(chunk_ * B * gates_stride_);
    for (BFloat16*& h : h_) h = carver.take<BFloat16>(B * h_stride_);
    staged_ = carver.take<BFloat16>(threads_ * chunk_ * B * x_stride_);
    progress_stride_ = round_up(batch_.count(), 8);
    progress_ = carver.take<int64_t>(threads_ * progress_stride_);
  }

  void prepare() {
    memset(progress_, 0, static_cast<size_t>(threads_ * progress_stride_) * sizeof(int64_t));
    if (p_.h0)
      copy_rows(half(p_.h0), p_.H, h_[0], h_stride_, p_.B, p_.H);
    else
      memset(h_[0], 0, static_cast<size_t>(p_.B * h_stride_) * sizeof(BFloat16));
    memset(h_[1], 0, static_cast<size_t>(p_.B * h_stride_) * sizeof(BFloat16));
    if (Cell::kHasC) load_rows<float>(p_.storage, p_.c0, p_.H, c_, width_, p_.B, p_.H);
    for (int64_t gate = 0; gate < Cell::kGates; ++gate)
      for (int64_t n = 0; n < width_; n += kTileColumns) {
        const __mmask16 inside = mask_part(p_.H - n);
        Vec<float> sum = zero<float>();
        if (p_.b_ih) sum = load_bfloat16(half(p_.b_ih) + gate * p_.H + n, inside);
        if (p_.b_hh) sum = sum + load_bfloat16(half(p_.b_hh) + gate * p_.H + n, inside);
        store(bias_ + gate * width_ + n, sum);
      }
  }

  void work(int thread, int threads) {
    const Team team(thread, threads, batch_.count(), vectors_, Cell::kGates * p_.H * p_.H * 2, progress_,
                    progress_stride_);
    const Range units = team.slice(vectors_);
    if (!team.idle()) {
      // Where groups read the same weights, the first packs those of the recurrence, the last those of the input.
      if (team.group == 0) pack(half(p_.w_hh), p_.H, units, r_, r_numbers_);
      if (team.group == team.groups - 1) pack(half(p_.w_ih), p_.I, units, w_, w_numbers_);
    }
    if (team.groups > 1) barrier_.wait(threads);
    if (team.idle()) return;

    BF16Unit<BFloat16> unit;
    alignas(64) float sums[2][kSumsNumbers];
    const PanelRange panels = Cell::panels(units);
    // One product of x and h, hidden behind the cells, where its weights stay in cache and blocks are high enough to
    // reuse them; the sums are the same.
    const int64_t weight_bytes = Cell::kGates * p_.H * (p_.I + p_.H) * 2;
    const bool fused = p_.I > 0 && weight_bytes / team.members <= kFusedBytes && p_.B > kTileColumns;
    int64_t phase = 0;
    for (int64_t first = 0; first < p_.T; first += chunk_) {
      const int64_t last = first + chunk_ < p_.T ? first + chunk_ : p_.T;
      const int64_t begin = p_.reverse ? clock_.time(last - 1) : first;  // in time
      const Staged x = stage(team, begin, begin + last - first, staged_ + thread * chunk_ * p_.B * x_stride_);
      if (!fused) project(unit, team, panels, begin, begin + last - first, x);
      for (int64_t step = first; step < last; ++step)
        sweep_pipelined(
            unit, team, phase++, panels, sums,
            [&](const Panel& panel, int64_t tile, float* to) {
              unit.begin(fused ? with_input(x, step, begin, panel, tile, to) : recurrent(step, begin, panel, tile, to));
            },
            [&](const Panel& panel, int64_t tile, const float* from) { cell(unit, from, step, begin, panel, tile); });
    }
  }

  void finish() const {
    for (int64_t b = 0; b < p_.B; ++b)
      memcpy(half(p_.h_n) + b * p_.H, h_[p_.T % 2] + b * h_stride_, static_cast<size_t>(p_.H) * sizeof(BFloat16));
    if (Cell::kHasC) store_rows<float>(p_.storage, c_at(p_.T - 1), width_, p_.c_n, p_.H, p_.B, p_.H);
  }

 private:
  void pack(const BFloat16* w, int64_t K, Range units, BFloat16* to, int64_t numbers) const {
    for (int64_t unit = units.begin; unit < units.end; ++unit)
      for (int64_t gate = 0; gate < Cell::kGates; ++gate)
        pack_columns_from_rows(w + (gate * p_.H + unit * kTileColumns) * K, K,
                               lanes_inside<float>(p_.H, unit * kTileColumns), K,
                               to + (unit * Cell::kGates + gate) * numbers);
  }

  // The gates of time t; without a tape the chunk that begins at time `begin` is all there is.
  float* gates(int64_t t, int64_t begin) const {
    if (p_.gates) return static_cast<float*>(p_.gates) + t * p_.B * gates_stride_;
    return gates_ + (t - begin) * p_.B * gates_stride_;
  }
  float* c_at(int64_t step) const {
    return p_.c && step >= 0 ? static_cast<float*>(p_.c) + clock_.time(step) * p_.B * width_ : c_;
  }

  // The rows of the team's blocks of x at a chunk's times, in whole chunks of K.
  struct Staged {
    const BFloat16* data;
    int64_t step_stride, row_stride, first;
  };
  Staged stage(const Team& team, int64_t begin, int64_t end, BFloat16* staged) const {
    const int64_t first = batch_.first(team.tiles.begin), rows = batch_.first(team.tiles.end) - first;
    const int64_t step_stride = p_.x_stride_t, row_stride = p_.x_stride_b;
    const BFloat16* x = half(p_.x) + begin * step_stride + first * row_stride;
    if (p_.I % kChunk == 0) return {x, step_stride, row_stride, first};
    for (int64_t t = begin; t < end; ++t)
      copy_rows(x + (t - begin) * step_stride, row_stride, staged + (t - begin) * rows * x_stride_, x_stride_, rows,
                p_.I);
    return {staged, rows * x_stride_, x_stride_, first};
  }

  // x W^T of times [begin, end) into the gates.
  void project(BF16Unit<BFloat16>& unit, const Team& team, const PanelRange& panels, int64_t begin, int64_t end,
               const Staged& x) const {
    const int64_t first = batch_.first(team.tiles.begin), rows = batch_.first(team.tiles.end) - first;
    // Rows of one step after another make higher blocks where they lie evenly.
    const bool one = rows == p_.B && (p_.B == 1 || x.step_stride == p_.B * x.row_stride);
    const int64_t row_stride = p_.B == 1 ? x.step_stride : x.row_stride;
    const int64_t pieces = one ? 1 : end - begin;
    const RowBlocks blocks(one ? (end - begin) * rows : rows);
    for (int64_t i = 0; i < panels.count(); ++i) {
      const Panel panel = panels.at(i);
      for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t j = 0; j < blocks.count(); ++j) {
          const int64_t row = blocks.first(j);
          float* to = gates(begin, begin) + (piece * p_.B + first + row) * gates_stride_ + panel.first * kTileColumns;
          multiply(
              unit, blocks.height(j), panel.vectors * Cell::kGates,
              dense_left<BFloat16>(x.data + piece * x.step_stride + row * row_stride, row_stride * 2, chunks_of(p_.I)),
              w_ + panel.first * Cell::kGates * w_numbers_, w_numbers_, {},
              {to, gates_stride_, Cell::slot_stride(width_)});
        }
    }
  }

  // h_{t-1} R^T for a block, added to the projected input.
  BF16Product recurrent(int64_t step, int64_t begin, const Panel& panel, int64_t tile, float* sums) const {
    const int64_t row = batch_.first(tile);
    float* projected = gates(clock_.time(step), begin) + row * gates_stride_ + panel.first * kTileColumns;
    return {batch_.height(tile),
            static_cast<int>(panel.vectors * Cell::kGates),
            1,
            {dense_left<BFloat16>(h_[step % 2] + row * h_stride_, h_stride_ * 2, chunks_of(p_.H)), {}},
            {r_ + panel.first * Cell::kGates * r_numbers_, nullptr},
            {r_numbers_, 0},
            {projected, gates_stride_, Cell::slot_stride(width_)},
            {sums, kSumsStride, kTileColumns}};
  }
  // x_t W^T + h_{t-1} R^T.
  BF16Product with_input(const Staged& x, int64_t step, int64_t begin, const Panel& panel, int64_t tile,
                         float* sums) const {
    BF16Product product = recurrent(step, begin, panel, tile, sums);
    product.sources = 2;
    product.left[1] = product.left[0], product.panel[1] = product.panel[0];
    product.vector_numbers[1] = product.vector_numbers[0];
    const int64_t t = clock_.time(step) - begin, row = batch_.first(tile) - x.first;
    product.left[0] =
        dense_left<BFloat16>(x.data + t * x.step_stride + row * x.row_stride, x.row_stride * 2, chunks_of(p_.I));
    product.panel[0] = w_ + panel.first * Cell::kGates * w_numbers_;
    product.vector_numbers[0] = w_numbers_;
    product.init = {};
    return product;
  }

  void cell(BF16Unit<BFloat16>& unit, const float* sums, int64_t step, int64_t begin, const Panel& panel,
            int64_t tile) const {
    const int64_t t = clock_.time(step), row = batch_.first(tile), column = panel.first * kTileColumns;
    const int rows = batch_.height(tile);
    const int64_t state = row * width_ + column, steps = unit.steps_in(Cell::calls(rows, panel.vectors));
    Cell::forward(rows, panel.vectors, sums,
                  {p_.activation,
                   bias_ + column,
                   p_.gates ? gates(t, begin) + row * gates_stride_ + column : nullptr,
                   gates_stride_,
                   width_,
                   Cell::kHasC ? c_at(step - 1) + state : nullptr,
                   Cell::kHasC ? c_at(step) + state : nullptr,
                   width_,
                   {half(p_.y) + (t * p_.B + row) * p_.H + column, h_[(step + 1) % 2] + row * h_stride_ + column, p_.H,
                    h_stride_, p_.H - column}},
                  [&] { unit.advance(steps); });
  }

  const ForwardParams& p_;
  Clock clock_;
  RowBlocks batch_;
  int64_t width_, gates_stride_, vectors_, h_stride_, x_stride_, w_numbers_, r_numbers_, chunk_;
  int threads_;
  BFloat16 *w_ = nullptr, *r_ = nullptr, *h_[2] = {nullptr, nullptr}, *staged_ = nullptr;
  float *bias_ = nullptr, *c_ = nullptr, *gates_ = nullptr;
  int64_t progress_stride_ = 0;
  int64_t* progress_ = nullptr;
  Barrier barrier_;
};

template <typename Cell>
class BF16RecurrentBackward {
 public:
  explicit BF16RecurrentBackward(const BackwardParams& p)
      : p_(p),
        clock_{p.T, p.reverse},
        batch_(p.B),
        width_(tape_width(p.H)),
        gates_stride_(gates_width(p.H, Cell::kGates)),
        vectors_(vectors_of(p.H)),
        numbers_(Cell::kGates * vector_numbers<BFloat16>(p.H)),
        threads_(useful_threads(p.threads, p.T * p.B * Cell::kGates * p.H * (p.I + p.H), batch_.count(),
                                divide_up(vectors_, 2))) {}

  int threads() const { return threads_; }

  void place(Carver& carver) {
    const int64_t B = p_.B;
    r_ = carver.take<BFloat16>(vectors_ * numbers_);
    w_ = p_.dx ? carver.take<BFloat16>(vectors_of(p_.I) * numbers_) : nullptr;
    dc_ = Cell::kHasC ? carver.take<float>(B * width_) : nullptr;
    c0_ = Cell::kHasC ? carver.take<float>(B * width_) : nullptr;
    last_ = p_.grad_h_n ? carver.take<float>(B * width_) : nullptr;
    if (weights()) {
      const int64_t all = p_.I + p_.H;
      columns_ = carver.take<char>(2 * all * WeightGradient::kColumnBytes);
      packed_stride_ = divide_up(Cell::kGates * vectors_, threads_) * WeightGradient::kVectorNumbers;
      packed_ = carver.take<BFloat16>(threads_ * packed_stride_);
      sums_ = carver.take<float>(all * WeightGradient::sums_stride(Cell::kGates, p_.H));
    }
    if (p_.db) db_.place(carver, p_.T, batch_.count(), Cell::kGates, width_);
    progress_stride_ = round_up(batch_.count(), 8);
    progress_ = carver.take<int64_t>(threads_ * progress_stride_);
  }

  void prepare() {
    memset(progress_, 0, static_cast<size_t>(threads_ * progress_stride_) * sizeof(int64_t));
    if (Cell::kHasC) {
      load_rows<float>(p_.storage, p_.grad_c_n, p_.H, dc_, width_, p_.B, p_.H);
      load_rows<float>(p_.storage, p_.c0, p_.H, c0_, width_, p_.B, p_.H);
    }
    if (last_) load_rows<float>(p_.storage, p_.grad_h_n, p_.H, last_, width_, p_.B, p_.H);
    db_.clear();
  }

  void work(int thread, int threads) {
    // Members share the units by pairs of vectors, since those of a pair share the room for their gates' gradients.
    const int64_t pairs = divide_up(vectors_, 2);
    const Team team(thread, threads, batch_.count(), pairs, Cell::kGates * p_.H * p_.H * 2, progress_,
                    progress_stride_);
    const Range share = split(vectors_, threads, thread);
    pack_columns_from_matrix(half(p_.w_hh), Cell::kGates, p_.H, p_.H, share, numbers_, r_);
    if (p_.dx)
      pack_columns_from_matrix(half(p_.w_ih), Cell::kGates, p_.H, p_.I, split(vectors_of(p_.I), threads, thread),
                               numbers_, w_);
    barrier_.wait(threads);
    BF16Unit<BFloat16> unit;
    alignas(64) float sums[2][kSumsNumbers];
    if (!team.idle()) {
      Range units = team.slice(pairs);
      units = {2 * units.begin, 2 * units.end < vectors_ ? 2 * units.end : vectors_};
      through_time(unit, sums, team, {units.begin, units.end});
    }
    barrier_.wait(threads);

    const BF16GradientRows d{
        static_cast<const char*>(p_.dgates), gates_stride_ * 4, width_ * 4, Cell::kGates, p_.H, p_.T * p_.B};
    if (p_.dx)
      BF16InputGradient<BF16GradientRows>{d, p_.I, w_, half(p_.dx)}.run(unit, sums[0], nullptr, thread, threads);
    if (!weights()) return;
    const InputRows x{p_.storage, p_.x, p_.x_stride_t, p_.x_stride_b};
    const PreviousHidden<kNoFlags> h{p_.storage, clock_, p_.B, p_.H, nullptr, p_.y, p_.h0, nullptr};
    WeightGradient{d, p_.B}.run(unit, columns_, packed_ + thread * packed_stride_, sums_, thread, threads, barrier_,
                                BF16RowSource<BFloat16, InputRows>{p_.I, x, half(p_.dw_ih)},
                                BF16RowSource<BFloat16, PreviousHidden<kNoFlags>>{p_.H, h, half(p_.dw_hh)});
  }

  void finish() const {
    if (Cell::kHasC && p_.dc0) store_rows<float>(p_.storage, dc_, width_, p_.dc0, p_.H, p_.B, p_.H);
    db_.store_total(p_.storage, p_.H, p_.db);
  }

 private:
  using WeightGradient = BF16WeightGradient<BF16GradientRows>;
  bool weights() const { return p_.dw_hh != nullptr; }

  void through_time(BF16Unit<BFloat16>& unit, float (*sums)[kSumsNumbers], const Team& team,
                    const PanelRange& panels) const {
    int64_t phase = 0;
    for (int64_t step = p_.T - 1; step >= 0; --step)
      sweep_pipelined(
          unit, team, phase++, panels, sums,
          [&](const Panel& panel, int64_t tile, float* to) {
            if (step < p_.T - 1) unit.begin(recurrent(step + 1, panel, tile, to));
          },
          [&](const Panel& panel, int64_t tile, const float* from) { cell(unit, from, step, panel, tile); });
    if (p_.dh0)
      sweep_pipelined(
          unit, team, phase++, panels, sums,
          [&](const Panel& panel, int64_t tile, float* to) { unit.begin(recurrent(0, panel, tile, to)); },
          [&](const Panel& panel, int64_t tile, const float* from) { initial(from, panel, tile); });
  }

  char* dgates_at(int64_t step, int64_t row) const {
    return static_cast<char*>(p_.dgates) + (clock_.time(step) * p_.B + row) * gates_stride_ * 4;
  }
  const float* c_at(int64_t step) const {
    return step < 0 ? c0_ : static_cast<const float*>(p_.c) + clock_.time(step) * p_.B * width_;
  }

  // dgates of the step R for the rows of a block.
  BF16Product recurrent(int64_t step, const Panel& panel, int64_t tile, float* sums) const {
    const LeftOperand left{dgates_at(step, batch_.first(tile)),
                           gates_stride_ * 4,
                           Cell::kGates,
                           chunks_of(p_.H),
                           kGradientChunkBytes,
                           width_ * 4};
    return {batch_.height(tile),
            panel.vectors,
            1,
            {left, {}},
            {r_ + panel.first * numbers_, nullptr},
            {numbers_, 0},
            {},
            {sums, kSumsStride, kTileColumns}};
  }
  void cell(BF16Unit<BFloat16>& unit, const float* sums, int64_t step, const Panel& panel, int64_t tile) const {
    const int64_t t = clock_.time(step), row = batch_.first(tile), column = panel.first * kTileColumns;
    const int rows = batch_.height(tile);
    const bool is_last = step == p_.T - 1;
    const int64_t steps = unit.steps_in(Cell::calls(rows, panel.vectors));
    const int64_t state = row * width_ + column;
    const BFloat16* grad_y =
        p_.grad_y ? half(p_.grad_y) + t * p_.grad_y_stride_t + row * p_.grad_y_stride_b + column : nullptr;
    Cell::backward(rows, panel.vectors, is_last ? nullptr : sums,
                   {{grad_y, p_.grad_y_stride_b, p_.H - column, is_last && last_ ? last_ + state : nullptr, width_},
                    static_cast<const float*>(p_.gates) + (t * p_.B + row) * gates_stride_ + column,
                    gates_stride_,
                    width_,
                    {dgates_at(step, row), gates_stride_ * 4, width_ * 4, panel.first, vectors_},
                    Cell::kHasC ? c_at(step) + state : nullptr,
                    Cell::kHasC ? c_at(step - 1) + state : nullptr,
                    Cell::kHasC ? dc_ + state : nullptr,
                    width_,
                    db_ ? db_.at(step, tile) + column : nullptr},
                   [&] { unit.advance(steps); });
  }
  void initial(const float* sums, const Panel& panel, int64_t tile) const {
    const int64_t row = batch_.first(tile), column = panel.first * kTileColumns;
    for (int r = 0; r < batch_.height(tile); ++r)
      for (int v = 0; v < panel.vectors; ++v)
        store_bfloat16(half(p_.dh0) + (row + r) * p_.H + column + v * kTileColumns, sum_at(sums, r, v),
                       mask_part(p_.H - column - v * kTileColumns));
  }

  const BackwardParams& p_;
  Clock clock_;
  RowBlocks batch_;
  int64_t width_, gates_stride_, vectors_, numbers_;
  int threads_;
  BFloat16 *r_ = nullptr, *w_ = nullptr, *packed_ = nullptr;
  char* columns_ = nullptr;
  float *dc_ = nullptr, *c0_ = nullptr, *last_ = nullptr, *sums_ = nullptr;
  StepSums<float> db_;
  int64_t packed_stride_ = 0, progress_stride_ = 0;
  int64_t* progress_ = nullptr;
  Barrier barrier_;
};

// A bfloat16 layer without flags, options or projection by the products above, any other by the kernels of `base`.
template <template <typename> class Kernel, typename Cell, typename Params, void (*KernelTable::*kBase)(const Params&)>
void dispatch_bf16(const Params& p) {
  if (p.storage == Storage::kBFloat16 && p.flags == nullptr && p.w_hr == nullptr && p.options == nullptr)
    launch<Kernel<Cell>>(p);
  else
    (kAvx512Kernels.*kBase)(p);
}

constexpr RecurrentKernels make_bf16_kernels(const char* name) {
  return {name, &dispatch_bf16<BF16RecurrentForward, BF16LstmCell, ForwardParams, &KernelTable::lstm_forward>,
          &dispatch_bf16<BF16RecurrentBackward, BF16LstmCell, BackwardParams, &KernelTable::lstm_backward>,
          &dispatch_bf16<BF16RecurrentForward, BF16ElmanCell, ForwardParams, &KernelTable::rnn_forward>,
          &dispatch_bf16<BF16RecurrentBackward, BF16ElmanCell, BackwardParams, &KernelTable::rnn_backward>};
}

}  // namespace
}  // namespace fastseq
