// A recurrent layer over a whole sequence in one direction, forward and back-propagation through time (BPTT).
//
// Forward: the input projection of a chunk of time, then per step one product with the packed recurrent weights per
// tile of kTileRows batch rows and four vectors, the cell on the tile's registers. Backward: per step one product
// dgates_{t+1} R per tile, the cell's derivative on its registers; the input's and the weights' gradients follow as
// large products. One parallel region holds it all. A Cell (lstm.h, rnn.h) says how many gates there are and how their
// weights are packed.
#pragma once

#include "direct.h"
#include "gradients.h"
#include "length_order.h"
#include "recompute.h"

namespace fastseq {
namespace {

template <typename Cell, typename Real, typename Params>
int64_t recurrent_bytes(const Params& p) {
  return Cell::kGates * p.H * p.P * static_cast<int64_t>(sizeof(Real));
}
template <typename Cell, typename Real, typename Params>
RowTiles layer_tiles(const Params& p) {
  return batch_tiles(p.B, recurrent_bytes<Cell, Real>(p));
}
template <typename Cell, typename Real, typename Params>
BatchCut layer_cut(const Params& p) {
  return {layer_tiles<Cell, Real>(p).most, recurrent_bytes<Cell, Real>(p) > kResidentBytes};
}

// Whether the products read the weights as they lie. Only plain layers do.
template <typename Real, Flags kFlags, typename Params>
bool is_direct(const Params& p) {
  return kFlags == kNoFlags && p.T * p.B <= kDirectRows && !is_half(p.storage) && p.w_hr == nullptr;
}

template <typename Cell, typename Real, Flags kFlags>
class RecurrentForward {
 public:
  explicit RecurrentForward(const ForwardParams& p)
      : p_(p),
        clock_{p.T, p.reverse},
        direct_(is_direct<Real, kFlags>(p)),
        batch_(layer_tiles<Cell, Real>(p)),
        width_(tape_width(p.H)),
        gates_stride_(gates_width(p.H, Cell::kGates)),
        vectors_(width_ / kLanes<Real>),
        out_vectors_(tape_width(p.P) / kLanes<Real>),
        chunk_(chunk_steps(p.T, p.B, gates_stride_ * static_cast<int64_t>(sizeof(Real)))),
        threads_(useful_threads(p.threads, p.T * p.B * Cell::kGates * p.H * (p.I + p.P), batch_.count(), vectors_)) {}

  int threads() const { return threads_; }

  void place(Carver& carver) {
    if (direct_) return place_state(carver);
    w_ = carver.take<Real>(Cell::kGates * width_ * p_.I);
    place_recurrent(carver);
    const int64_t staged = chunk_ * p_.B * p_.I;
    staged_stride_ = InputProjection<Real>::needs_staging(p_.storage, p_.B, p_.x_stride_t, p_.x_stride_b) ? staged : 0;
    staged_ = staged_stride_ ? carver.take<Real>(threads_ * staged_stride_) : nullptr;
    place_state(carver);
  }
  void place_recurrent(Carver& carver) {
    r_ = carver.take<Real>(Cell::kGates * width_ * p_.P);
    w_hr_ = p_.w_hr ? carver.take<Real>(out_vectors_ * p_.H * kLanes<Real>) : nullptr;
  }
  // All but the operands of products.
  void place_state(Carver& carver) {
    const int64_t B = p_.B;
    unprojected_ = p_.w_hr ? carver.take<Real>(B * width_) : nullptr;
    bias_ = carver.take<Real>(Cell::kGates * width_);
    c_ = Cell::kHasC ? carver.take<Real>(B * width_) : nullptr;
    gates_ = p_.gates ? nullptr : carver.take<Real>(chunk_ * B * gates_stride_);
    flags_ = kFlags == kWithOptions&& !p_.flags ? no_flags_ = carver.take<uint8_t>(p_.T * B) : p_.flags;
    hidden_ = {p_.storage,
               clock_,
               B,
               p_.P,
               flags_,
               p_.y,
               carver.take<Real>(B * tape_width(p_.P)),
               {nullptr, nullptr},
               p_.options,
               nullptr,
               {nullptr, nullptr}};
    if (hidden_.needs_slots(p_.storage))
      for (Real*& slot : hidden_.slots) slot = carver.take<Real>(B * hidden_.width());
    if (kFlags == kWithOptions) {
      if (p_.options->h_mask) {
        hidden_.mask = carver.take<Real>(B * hidden_.width());
        for (Real*& slot : hidden_.masked) slot = carver.take<Real>(B * hidden_.width());
      }
      if (p_.options->peephole) peephole_ = carver.take<Real>(3 * width_);
    }
    progress_stride_ = round_up(batch_.count(), 8);
    progress_ = carver.take<int64_t>(threads_ * progress_stride_);
  }

  void prepare() {
    memset(progress_, 0, static_cast<size_t>(threads_ * progress_stride_) * sizeof(int64_t));
    if (no_flags_) memset(no_flags_, 0, static_cast<size_t>(p_.T * p_.B));
    hidden_.prepare(p_.h0);
    if (peephole_) load_rows<Real>(p_.storage, p_.options->peephole, p_.H, peephole_, width_, 3, p_.H);
    if (Cell::kHasC) load_rows<Real>(p_.storage, p_.c0, p_.H, c_, width_, p_.B, p_.H);
    load_bias<Real>(p_.storage, p_.b_ih, p_.b_hh, Cell::kGates, p_.H, bias_);
  }

  void work(int thread, int threads) {
    run(thread, threads,
        [this](const Team& team, int64_t step, int64_t begin, int64_t& phase) { cells(team, step, begin, phase); });
  }
  // A thread's part of it all. through(team, step, begin, phase) takes a step from h_{t-1} and the projected input to
  // h_t before any projection, in as many phases as it likes.
  template <typename Through>
  void run(int thread, int threads, const Through& through) {
    const Team team = team_of(thread, threads);
    const Range units = team.slice(vectors_);
    if (!team.idle() && !direct_) {
      // Where groups read the same weights, the first packs those of the recurrence, the last those of the input.
      if (team.group == 0) pack_recurrent(team);
      if (team.group == team.groups - 1) Cell::template pack<Real>(p_.storage, p_.w_ih, p_.H, p_.I, units, w_);
    }
    if (team.groups > 1) barrier_.wait(threads);
    if (team.idle()) return;

    const InputProjection<Real> projection{p_.storage,
                                           p_.x,
                                           p_.x_stride_t,
                                           p_.x_stride_b,
                                           p_.B,
                                           p_.I,
                                           staged_ ? staged_ + thread * staged_stride_ : nullptr};
    const PanelRange panels = Cell::panels(units);
    const auto project_input = [&](int64_t begin, int64_t end) {
      if (direct_) return project_directly(begin, end, team, panels);
      projection.stage(begin, end, team, batch_);
      for (int64_t i = 0; i < panels.count(); ++i) {
        const Panel panel = panels.at(i);
        projection.sweep(begin, end, team, batch_, [&](Product<Real> product, int rows, int64_t row) {
          const int64_t column = panel.first * kLanes<Real>;
          product.panel = w_ + column * p_.I * Cell::kGates;
          product.chain = chain_for<Real>(p_.H);
          if (kFlags && all_padding(flags_ + begin * p_.B + row, rows)) product.K = 0;
          const ProjectionOp<Real> op{bias_ + column, gates(begin, begin) + row * gates_stride_ + column, gates_stride_,
                                      Cell::template slot_stride<Real>(width_)};
          Cell::template run<Chains::kOne, Real>(rows, panel, op, product);
        });
      }
    };
    run_chunks(team, project_input, through);
  }
  Team team_of(int thread, int threads) const {
    return Team(thread, threads, batch_.count(), vectors_ < out_vectors_ ? vectors_ : out_vectors_,
                recurrent_bytes<Cell, Real>(p_), progress_, progress_stride_);
  }
  void pack_recurrent(const Team& team) const {
    const Range units = team.slice(vectors_), outs = team.slice(out_vectors_);
    Cell::template pack<Real>(p_.storage, p_.w_hh, p_.H, p_.P, units, r_);
    if (p_.w_hr) pack_transposed<Real>(p_.storage, p_.w_hr, p_.P, p_.H, {outs.begin, outs.end}, w_hr_);
  }
  // Chunk by chunk the projection of the input at times [begin, end), and the steps.
  template <typename Projection>
  void run_chunks(const Team& team, const Projection& projection) const {
    run_chunks(team, projection, [this](const Team& team, int64_t step, int64_t begin, int64_t& phase) {
      cells(team, step, begin, phase);
    });
  }
  template <typename Projection, typename Through>
  void run_chunks(const Team& team, const Projection& projection, const Through& through) const {
    const Range outs = team.slice(out_vectors_);
    int64_t phase = 0;
    for (int64_t first = 0; first < p_.T; first += chunk_) {
      const int64_t last = first + chunk_ < p_.T ? first + chunk_ : p_.T;
      const int64_t begin = p_.reverse ? clock_.time(last - 1) : first;  // in time
      // Another member may still read the gates of the chunk before, where a step reads those of all units.
      for (int64_t tile = team.tiles.begin; tile < team.tiles.end; ++tile) team.await(tile, phase);
      projection(begin, begin + last - first);
      for (int64_t step = first; step < last; ++step) {
        through(team, step, begin, phase);
        if (p_.w_hr)
          team.sweep(phase++, {outs.begin, outs.end},
                     [&](const Panel& panel, int64_t tile) { project(step, panel, tile); });
      }
    }
  }

  void finish() const {
    hidden_.finish(p_.h_n);
    if (Cell::kHasC) store_rows<Real>(p_.storage, c_at(p_.T - 1), width_, p_.c_n, p_.H, p_.B, p_.H);
  }

 protected:
  // The gates of time t; without a tape the chunk that begins at time `begin` is all there is.
  Real* gates(int64_t t, int64_t begin) const {
    if (p_.gates) return static_cast<Real*>(p_.gates) + t * p_.B * gates_stride_;
    return gates_ + (t - begin) * p_.B * gates_stride_;
  }
  Real* c_at(int64_t step) const {
    return p_.c && step >= 0 ? static_cast<Real*>(p_.c) + clock_.time(step) * p_.B * width_ : c_;
  }

  void project_directly(int64_t begin, int64_t end, const Team& team, const PanelRange& panels) const {
    const int64_t first = batch_.first(team.tiles.begin), last = batch_.first(team.tiles.end);
    for (int64_t i = 0; i < panels.count(); ++i)
      for (int64_t t = begin; t < end; ++t) {
        const int64_t column = panels.at(i).first * kLanes<Real>;
        const ProjectionOp<Real> op{bias_ + column, gates(t, begin) + first * gates_stride_ + column, gates_stride_,
                                    Cell::template slot_stride<Real>(width_)};
        const Real* x = static_cast<const Real*>(p_.x) + t * p_.x_stride_t + first * p_.x_stride_b;
        direct_rows<Cell>(op, static_cast<const Real*>(p_.w_ih), p_.H, p_.I, panels.at(i),
                          static_cast<int>(last - first), x, p_.x_stride_b);
      }
  }
  void cells(const Team& team, int64_t step, int64_t begin, int64_t& phase) const {
    team.sweep(phase++, Cell::panels(team.slice(vectors_)), [&](const Panel& panel, int64_t tile) {
      const auto op = cell_op(step, begin, batch_.first(tile), panel.first * kLanes<Real>);
      if constexpr (kFlags == kNoFlags)
        if (direct_) {
          const int64_t stride = hidden_.read_stride(step);
          return direct_rows<Cell>(op, static_cast<const Real*>(p_.w_hh), p_.H, p_.P, panel, batch_.height(tile),
                                   hidden_.read(step) + batch_.first(tile) * stride, stride);
        }
      Cell::template run<Chains::kSide, Real>(batch_.height(tile), panel, op, recurrent(step, panel, tile));
    });
  }
  Product<Real> recurrent(int64_t step, const Panel& panel, int64_t tile) const {
    const int64_t row = batch_.first(tile), column = panel.first * kLanes<Real>, stride = hidden_.read_stride(step);
    const bool over = kFlags && all_padding(flags_ + clock_.time(step) * p_.B + row, batch_.height(tile));
    return {r_ + column * p_.P * Cell::kGates, over ? 0 : p_.P, hidden_.read(step) + row * stride, stride,
            chain_for<Real>(p_.H)};
  }
  // What becomes of the product for the tile at `row` and `column`.
  auto cell_op(int64_t step, int64_t begin, int64_t row, int64_t column) const {
    const int64_t t = clock_.time(step);
    Real* preactivation = gates(t, begin) + row * gates_stride_ + column;
    if constexpr (Cell::kHasC) {
      LstmCellOp<Real, kFlags> op{preactivation,
                                  gates_stride_,
                                  p_.gates ? preactivation : nullptr,
                                  gates_stride_,
                                  width_,
                                  c_at(step - 1) + row * width_ + column,
                                  c_at(step) + row * width_ + column,
                                  width_,
                                  unprojected_ ? unprojected_ + row * width_ + column : nullptr,
                                  unprojected_ ? Sink{} : hidden_.sink(step, row, column),
                                  kFlags ? flags_ + t * p_.B + row : nullptr,
                                  {}};
      if constexpr (kFlags == kWithOptions)
        op.extra = cell_options<Real>(*p_.options, p_.storage, peephole_, width_, t, p_.B, p_.H, row, column);
      return op;
    } else {
      return ElmanCellOp<Real, kFlags>{p_.activation, preactivation,
                                       gates_stride_, p_.gates ? preactivation : nullptr,
                                       gates_stride_, hidden_.sink(step, row, column)};
    }
  }
  void project(int64_t step, const Panel& panel, int64_t tile) const {
    const int64_t row = batch_.first(tile), column = panel.first * kLanes<Real>;
    const ProjectedHiddenOp<Real, kFlags> op{hidden_.sink(step, row, column)};
    run_tile<Chains::kSide, ALayout::kRows, Real>(
        batch_.height(tile), panel.vectors, op,
        Product<Real>{w_hr_ + column * p_.H, p_.H, unprojected_ + row * width_, width_, chain_for<Real>(p_.P)});
  }

  using Sink = typename HiddenState<Real, kFlags>::Sink;
  const ForwardParams& p_;
  Clock clock_;
  bool direct_;
  RowTiles batch_;
  int64_t width_, gates_stride_, vectors_, out_vectors_, chunk_;
  int threads_;
  Real *w_ = nullptr, *r_ = nullptr, *w_hr_ = nullptr, *unprojected_ = nullptr, *bias_ = nullptr, *c_ = nullptr;
  Real *gates_ = nullptr, *staged_ = nullptr;
  int64_t staged_stride_ = 0, progress_stride_ = 0;
  int64_t* progress_ = nullptr;
  const uint8_t* flags_ = nullptr;
  uint8_t* no_flags_ = nullptr;  // zeros, where there are options and no flags
  Real* peephole_ = nullptr;
  HiddenState<Real, kFlags> hidden_{};
  Barrier barrier_;
};

template <typename Cell, typename Real, Flags kFlags>
class RecurrentBackward {
 public:
  explicit RecurrentBackward(const BackwardParams& p)
      : p_(p),
        clock_{p.T, p.reverse},
        direct_(is_direct<Real, kFlags>(p)),
        batch_(layer_tiles<Cell, Real>(p)),
        width_(tape_width(p.H)),
        gates_stride_(gates_width(p.H, Cell::kGates)),
        dh_stride_(gates_width(p.P, 1)),
        vectors_(width_ / kLanes<Real>),
        out_vectors_(tape_width(p.P) / kLanes<Real>),
        chunk_(recomputes() ? Recompute<Cell, Real, kFlags>::steps(p.T, p.B) : p.T),
        threads_(useful_threads(p.threads, p.T * p.B * Cell::kGates * p.H * (p.I + p.P), batch_.count(), vectors_)) {}

  int threads() const { return threads_; }

  void place(Carver& carver) {
    place_state(carver);
    place_recurrent(carver);
    if constexpr (kFlags == kWithOptions)
      if (recomputes()) again_.place_weights(carver, threads_);
    place_products(carver);
  }
  // All but the operands of products.
  void place_state(Carver& carver) {
    const int64_t B = p_.B, T = p_.T;
    [[maybe_unused]] const int64_t K = Cell::kGates * width_;  // not where no gates are made again
    dc_ = Cell::kHasC ? carver.take<Real>(B * width_) : nullptr;
    c0_ = Cell::kHasC ? carver.take<Real>(B * width_) : nullptr;
    flags_ = kFlags == kWithOptions&& !p_.flags ? no_flags_ = carver.take<uint8_t>(T * B) : p_.flags;
    hidden_ = {p_.storage,
               clock_,
               B,
               p_.P,
               flags_,
               p_.grad_y,
               p_.grad_y_stride_t,
               p_.grad_y_stride_b,
               nullptr,
               nullptr,
               p_.options,
               previous_hidden(0),
               nullptr,
               nullptr,
               nullptr};
    gates_ = static_cast<const Real*>(p_.gates), dgates_ = static_cast<Real*>(p_.dgates);
    const int64_t hidden = B * hidden_.width(p_.P);
    if (kFlags)
      hidden_.carry = carver.take<Real>(hidden);
    else if (p_.grad_h_n)
      hidden_.last = carver.take<Real>(hidden);
    if constexpr (kFlags == kWithOptions) {
      const LayerOptions& options = *p_.options;
      if (options.h_mask) hidden_.mask = carver.take<Real>(hidden);
      if (options.dh_mask) hidden_.dmask = carver.take<Real>(hidden);
      if (options.dh_reset && !options.h_reset_per_step) hidden_.dreset = carver.take<Real>(hidden);
      if (options.dc_reset && !options.c_reset_per_step) dc_reset_ = carver.take<Real>(B * width_);
      if (options.peephole) peephole_ = carver.take<Real>(3 * width_);
      if (options.dpeephole) dpeephole_.place(carver, T, batch_.count(), 3, width_);
      if (recomputes()) {
        gates_ = dgates_ = carver.take<Real>(chunk_ * B * gates_stride_);
        edge_ = carver.take<Real>(B * gates_stride_);
        again_ = {p_.storage,
                  p_.activation,
                  clock_,
                  B,
                  p_.I,
                  p_.H,
                  p_.P,
                  {p_.storage, p_.x, p_.x_stride_t, p_.x_stride_b},
                  previous_hidden(0),
                  hidden_.mask,
                  static_cast<const Real*>(p_.c),
                  c0_,
                  peephole_,
                  p_.options,
                  carver.take<Real>(K)};
      }
    }
    if (weights() && kFlags && p_.flags && !recomputes()) valid_ = carver.take<int32_t>(T * B);
    if (weights() && p_.db) db_.place(carver, T, batch_.count(), Cell::kGates, width_);
    progress_stride_ = round_up(batch_.count(), 8);
    progress_ = carver.take<int64_t>(threads_ * progress_stride_);
  }
  void place_recurrent(Carver& carver) {
    if (!direct_) r_ = carver.take<Real>(Cell::kGates * width_ * out_vectors_ * kLanes<Real>);
    if (p_.w_hr) w_hr_ = carver.take<Real>(p_.P * width_);
    place_projected(carver);
  }
  void place_projected(Carver& carver) {
    if (p_.w_hr) {
      dh_ = carver.take<Real>(chunk_ * p_.B * dh_stride_);
      unprojected_ = carver.take<Real>(chunk_ * p_.B * width_);
    }
  }
  void place_products(Carver& carver) {
    const int64_t n = kLanes<Real>, K = Cell::kGates * width_;
    if (p_.dx && !direct_) {
      w_ = carver.take<Real>(K * round_up(p_.I, n));
      block_ = carver.take<Real>(threads_ * InputGradient<Real>::block_numbers());
    }
    if (weights()) {
      const int64_t of_gates = divide_up(p_.I, n) + divide_up(p_.P, n), of_h = p_.w_hr ? divide_up(p_.H, n) : 0;
      panels_ = carver.take<Real>(WeightGradient<Real>::panel_numbers(of_gates > of_h ? of_gates : of_h));
      packed_ = carver.take<Real>(threads_ * WeightGradient<Real>::packed_numbers());
      if (WeightGradient<Real>::needs_sums(p_.storage)) {
        sums_ih_ = carver.take<Real>(Cell::kGates * p_.H * p_.I);
        sums_hh_ = carver.take<Real>(Cell::kGates * p_.H * p_.P);
        if (p_.w_hr) sums_hr_ = carver.take<Real>(p_.P * p_.H);
      }
    }
  }

  void prepare() {
    memset(progress_, 0, static_cast<size_t>(threads_ * progress_stride_) * sizeof(int64_t));
    if (Cell::kHasC) {
      load_rows<Real>(p_.storage, p_.grad_c_n, p_.H, dc_, width_, p_.B, p_.H);
      load_rows<Real>(p_.storage, p_.c0, p_.H, c0_, width_, p_.B, p_.H);
    }
    if (Real* last = kFlags ? hidden_.carry : hidden_.last)
      load_rows<Real>(p_.storage, p_.grad_h_n, p_.P, last, hidden_.width(p_.P), p_.B, p_.P);
    if (valid_)
      for (int64_t row = 0; row < p_.T * p_.B; ++row)
        if (!(p_.flags[row] & kFlagPadding)) valid_[valid_rows_++] = static_cast<int32_t>(row);
    db_.clear();
    if (kFlags == kWithOptions) prepare_options();
  }

  void work(int thread, int threads) {
    const Team team = pack(thread, threads);
    int64_t phase = 0;
    run_chunks(
        thread, threads,
        [&]([[maybe_unused]] const Chunk& chunk) {
          if constexpr (kFlags == kWithOptions) again_.run(chunk, dgates_, gates_stride_, thread, threads);
        },
        [&](const Chunk& chunk) { through_time(team, chunk, phase); },
        [&](const Chunk& chunk) { large_products(chunk, thread, threads); });
  }
  // This thread's share of the weights that any product reads, and its team.
  Team pack(int thread, int threads) const {
    const Team team = team_of(thread, threads);
    pack_recurrent(team);
    const PanelRange inputs{0, divide_up(p_.I, kLanes<Real>)};
    if (p_.dx && !direct_)
      pack_plain<Real>(p_.storage, p_.w_ih, Cell::kGates, p_.H, width_, p_.I, inputs, split(width_, threads, thread),
                       w_);
    if constexpr (kFlags == kWithOptions)
      if (recomputes()) again_.pack(p_.w_ih, p_.w_hh, thread, threads);
    return team;
  }
  Team team_of(int thread, int threads) const {
    return Team(thread, threads, batch_.count(), vectors_ < out_vectors_ ? vectors_ : out_vectors_,
                recurrent_bytes<Cell, Real>(p_), progress_, progress_stride_);
  }
  void pack_recurrent(const Team& team) const {
    if (!team.idle() && !direct_) {
      const Range outs = team.slice(out_vectors_), units = team.slice(vectors_);
      if (p_.T > 1 || p_.dh0 || kFlags == kWithOptions)
        pack_plain<Real>(p_.storage, p_.w_hh, Cell::kGates, p_.H, width_, p_.P, {outs.begin, outs.end},
                         team.share({0, width_}), r_);
      if (p_.w_hr)
        pack_plain<Real>(p_.storage, p_.w_hr, 1, p_.P, p_.P, p_.H, {units.begin, units.end}, team.share({0, p_.P}),
                         w_hr_);
    }
  }
  // Calls, chunk by chunk and all threads together, what makes the gates again (where that is asked for), the reverse
  // loop and the large products.
  template <typename Again, typename Through, typename Large>
  void run_chunks(int thread, int threads, const Again& again, const Through& through, const Large& large) {
    barrier_.wait(threads);
    for (int64_t last = p_.T; last > 0; last -= chunk_) {
      const int64_t first = last > chunk_ ? last - chunk_ : 0;
      const Chunk chunk{first, last, p_.reverse ? clock_.time(last - 1) : first};
      if constexpr (kFlags == kWithOptions)
        if (recomputes()) {
          again(chunk);
          barrier_.wait(threads);
        }
      through(chunk);
      barrier_.wait(threads);
      large(chunk);
      if (kFlags == kWithOptions && first > 0) {
        const Range rows = split(p_.B, threads, thread);
        memcpy(edge_ + rows.begin * gates_stride_, dgates_at(first, chunk) + rows.begin * gates_stride_,
               static_cast<size_t>((rows.end - rows.begin) * gates_stride_) * sizeof(Real));
        barrier_.wait(threads);
      }
    }
  }

  void finish() const {
    if (Cell::kHasC && p_.dc0) store_rows<Real>(p_.storage, dc_, width_, p_.dc0, p_.H, p_.B, p_.H);
    db_.store_total(p_.storage, p_.H, p_.db);
    if (kFlags == kWithOptions) {
      const LayerOptions& options = *p_.options;
      const int64_t width = hidden_.width(p_.P);
      if (hidden_.dmask) store_rows<Real>(p_.storage, hidden_.dmask, width, options.dh_mask, p_.P, p_.B, p_.P);
      if (hidden_.dreset) store_rows<Real>(p_.storage, hidden_.dreset, width, options.dh_reset, p_.P, p_.B, p_.P);
      if (dc_reset_) store_rows<Real>(p_.storage, dc_reset_, width_, options.dc_reset, p_.H, p_.B, p_.H);
      dpeephole_.store_total(p_.storage, p_.H, options.dpeephole);
    }
  }

 protected:
  bool weights() const { return p_.dw_hh != nullptr; }
  PreviousHidden<kFlags> previous_hidden(int64_t begin) const {
    return {p_.storage, clock_, p_.B, p_.P, flags_, p_.y, p_.h0, p_.options, begin};
  }

  void prepare_options() {
    const LayerOptions& options = *p_.options;
    const size_t hidden = static_cast<size_t>(p_.B * hidden_.width(p_.P)) * sizeof(Real);
    if (no_flags_) memset(no_flags_, 0, static_cast<size_t>(p_.T * p_.B));
    if (hidden_.mask) load_rows<Real>(p_.storage, options.h_mask, p_.P, hidden_.mask, hidden_.width(p_.P), p_.B, p_.P);
    if (hidden_.dmask) memset(hidden_.dmask, 0, hidden);
    if (hidden_.dreset) memset(hidden_.dreset, 0, hidden);
    if (dc_reset_) memset(dc_reset_, 0, static_cast<size_t>(p_.B * width_) * sizeof(Real));
    if constexpr (kFlags == kWithOptions)
      if (recomputes()) load_bias<Real>(p_.storage, options.b_ih, options.b_hh, Cell::kGates, p_.H, again_.bias);
    if (peephole_) load_rows<Real>(p_.storage, options.peephole, p_.H, peephole_, width_, 3, p_.H);
    dpeephole_.clear();
  }

  bool recomputes() const { return kFlags == kWithOptions && p_.options->recompute; }

  GateGradients<Real> gate_gradients(const Real* dgates, const Chunk& chunk) const {
    return {dgates, gates_stride_, Cell::kGates, p_.H, width_, (chunk.last - chunk.first) * p_.B};
  }
  WeightGradient<Real> weight_gradient(const GateGradients<Real>& d, const Chunk& chunk) const {
    return {d, p_.B, p_.storage, chunk.last < p_.T, chunk.first == 0, valid_, valid_rows_};
  }
  Real* packed(int thread) const { return packed_ + thread * WeightGradient<Real>::packed_numbers(); }
  auto x_source(const Chunk& chunk) const {
    const InputRows x{p_.storage, at(p_.x, p_.storage, chunk.begin * p_.x_stride_t), p_.x_stride_t, p_.x_stride_b};
    return row_source(p_.storage, p_.I, x, p_.dw_ih, sums_ih_);
  }
  auto h_source(const Chunk& chunk) const {
    return row_source(p_.storage, p_.P, previous_hidden(chunk.begin), p_.dw_hh, sums_hh_, hidden_.mask,
                      hidden_.width(p_.P));
  }
  void input_gradient(const GateGradients<Real>& d, const Chunk& chunk, int thread, int threads) const {
    if (direct_) {
      const PanelRange columns{0, divide_up(p_.I, kLanes<Real>)};
      const Range mine = split(columns.count(), threads, thread);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t column = columns.at(i).first * kLanes<Real>;
        const AccumulateOp<Real> op{static_cast<Real*>(p_.dx) + column, p_.I, p_.I - column, false};
        direct_columns(op, DirectColumns<Real>{static_cast<const Real*>(p_.w_ih), Cell::kGates, p_.H, width_, p_.I},
                       columns.at(i), static_cast<int>(d.rows), d.data, d.stride);
      }
      return;
    }
    InputGradient<Real>{d,
                        p_.storage,
                        p_.I,
                        w_,
                        at(p_.dx, p_.storage, chunk.begin * p_.B * p_.I),
                        kFlags && p_.flags ? p_.flags + chunk.begin * p_.B : nullptr}
        .run(block_ + thread * InputGradient<Real>::block_numbers(), thread, threads);
  }
  void projection_gradient(const Chunk& chunk, int thread, int threads) {
    constexpr Storage kPlain = sizeof(Real) == 8 ? Storage::kFloat64 : Storage::kFloat32;
    const GateGradients<Real> dh{dh_, dh_stride_, 1, p_.P, tape_width(p_.P), (chunk.last - chunk.first) * p_.B};
    weight_gradient(dh, chunk).run(
        panels_, packed(thread), thread, threads, barrier_,
        row_source(kPlain, p_.H, InputRows{kPlain, unprojected_, p_.B * width_, width_}, p_.dw_hr, sums_hr_));
  }

  // The gradients of the input and the weights from a chunk, added to those of the chunks before.
  void large_products(const Chunk& chunk, int thread, int threads) {
    const GateGradients<Real> d = gate_gradients(dgates_, chunk);
    if (p_.dx) input_gradient(d, chunk, thread, threads);
    if (!weights()) return;
    weight_gradient(d, chunk).run(panels_, packed(thread), thread, threads, barrier_, x_source(chunk), h_source(chunk));
    if (p_.w_hr) projection_gradient(chunk, thread, threads);
  }

  void through_time(const Team& team, const Chunk& chunk, int64_t& phase) const {
    through_time(team, chunk, phase, [this](const Team& team, int64_t step, const Chunk& chunk, int64_t& phase) {
      const Range units = team.slice(vectors_);
      team.sweep(phase++, {units.begin, units.end},
                 [&](const Panel& panel, int64_t tile) { cell(step, chunk, panel, tile); });
    });
  }
  // through(team, step, chunk, phase) goes from dL/dh_t, or with a projection from what came before it, to the gates'
  // gradients.
  template <typename Through>
  void through_time(const Team& team, const Chunk& chunk, int64_t& phase, const Through& through) const {
    if (team.idle()) return;
    const Range outs = team.slice(out_vectors_);
    for (int64_t step = chunk.last - 1; step >= chunk.first; --step) {
      if (p_.w_hr)
        team.sweep(phase++, {outs.begin, outs.end},
                   [&](const Panel& panel, int64_t tile) { hidden(step, chunk, panel, tile); });
      through(team, step, chunk, phase);
    }
    if (chunk.first > 0) return;
    const bool of_options = kFlags == kWithOptions && (p_.options->dh_mask || p_.options->dh_reset);
    if (p_.dh0 || of_options)
      team.sweep(phase++, {outs.begin, outs.end},
                 [&](const Panel& panel, int64_t tile) { initial(chunk, panel, tile); });
  }

  // dgates_{t+1} R for the rows of a tile: no product at the last step.
  Product<Real> recurrent(int64_t step, const Chunk& chunk, const Panel& panel, int64_t tile) const {
    if (step == p_.T - 1) return {nullptr, 0, nullptr, 0, 0};
    const int64_t row = batch_.first(tile);
    // On padding the gates' gradients are zero.
    if (kFlags && all_padding(flags_ + clock_.time(step + 1) * p_.B + row, batch_.height(tile)))
      return {nullptr, 0, nullptr, 0, 0};
    const int64_t K = Cell::kGates * width_;
    const Real* after = step + 1 == chunk.last ? edge_ : dgates_at(step + 1, chunk);
    return {r_ + panel.first * kLanes<Real> * K, K, after + row * gates_stride_, gates_stride_, chain_for<Real>(p_.P)};
  }
  // Gates and their gradients lie chunk by chunk.
  int64_t in_chunk(int64_t step, const Chunk& chunk) const { return (clock_.time(step) - chunk.begin) * p_.B; }
  Real* dgates_at(int64_t step, const Chunk& chunk) const { return dgates_ + in_chunk(step, chunk) * gates_stride_; }
  const Real* c_at(int64_t step) const {
    return step < 0 ? c0_ : static_cast<const Real*>(p_.c) + clock_.time(step) * p_.B * width_;
  }

  void hidden(int64_t step, const Chunk& chunk, const Panel& panel, int64_t tile) const {
    run_tile<Chains::kSide, ALayout::kRows, Real>(
        batch_.height(tile), panel.vectors, hidden_op(step, chunk, batch_.first(tile), panel.first * kLanes<Real>),
        recurrent(step, chunk, panel, tile));
  }
  auto hidden_op(int64_t step, const Chunk& chunk, int64_t row, int64_t column) const {
    return HiddenGradOp<Real, kFlags>{hidden_.source(step, row, column),
                                      dh_ + (in_chunk(step, chunk) + row) * dh_stride_ + column, dh_stride_};
  }
  void cell(int64_t step, const Chunk& chunk, const Panel& panel, int64_t tile) const {
    const int64_t row = batch_.first(tile), column = panel.first * kLanes<Real>;
    const Product<Real> product =
        Cell::kHasC && p_.w_hr
            ? Product<Real>{w_hr_ + column * p_.P, p_.P, dh_ + (in_chunk(step, chunk) + row) * dh_stride_, dh_stride_}
            : recurrent(step, chunk, panel, tile);
    multiply_recurrent(panel, tile, cell_op(step, chunk, tile, row, column), product);
  }
  template <typename Op>
  void multiply_recurrent(const Panel& panel, int64_t tile, const Op& op, const Product<Real>& product) const {
    if constexpr (kFlags == kNoFlags)
      if (direct_)
        return direct_columns(op,
                              DirectColumns<Real>{static_cast<const Real*>(p_.w_hh), Cell::kGates, p_.H, width_, p_.P},
                              panel, batch_.height(tile), product.a, product.lda);
    run_tile<Chains::kSide, ALayout::kRows, Real>(batch_.height(tile), panel.vectors, op, product);
  }
  // What becomes of the product for the rows of a tile, which begin at `row`, and the columns from `column` on.
  auto cell_op(int64_t step, const Chunk& chunk, int64_t tile, int64_t row, int64_t column) const {
    const int64_t gate = row * gates_stride_ + column, rows = in_chunk(step, chunk);
    Real* db = db_ ? db_.at(step, tile) + column : nullptr;
    if constexpr (Cell::kHasC) {
      const int64_t t = clock_.time(step);
      const uint8_t* flags = kFlags ? flags_ + t * p_.B + row : nullptr;
      const int64_t cell = row * width_ + column;
      const bool projected = p_.w_hr != nullptr;
      LstmCellGradOp<Real, kFlags> op{projected,
                                      projected ? Source{} : hidden_.source(step, row, column),
                                      gates_ + rows * gates_stride_ + gate,
                                      dgates_at(step, chunk) + gate,
                                      gates_stride_,
                                      width_,
                                      c_at(step) + cell,
                                      c_at(step - 1) + cell,
                                      dc_ + cell,
                                      width_,
                                      db,
                                      projected ? unprojected_ + rows * width_ + cell : nullptr,
                                      flags,
                                      {}};
      if constexpr (kFlags == kWithOptions) op.extra = cell_grad_options(step, tile, row, column);
      return op;
    } else {
      return ElmanGradOp<Real, kFlags>{hidden_.source(step, row, column), gates_ + rows * gates_stride_ + gate,
                                       dgates_at(step, chunk) + gate, gates_stride_, db};
    }
  }
  void initial(const Chunk& chunk, const Panel& panel, int64_t tile) const {
    multiply_recurrent(panel, tile, initial_op(batch_.first(tile), panel.first * kLanes<Real>),
                       recurrent(-1, chunk, panel, tile));
  }
  auto initial_op(int64_t row, int64_t column) const {
    return InitialHiddenGradOp<Real, kFlags>{hidden_.source(-1, row, column), p_.storage,
                                             p_.dh0 ? at(p_.dh0, p_.storage, row * p_.P + column) : nullptr, p_.P};
  }

  CellGradOptions<Real> cell_grad_options(int64_t step, int64_t tile, int64_t row, int64_t column) const {
    const LayerOptions& options = *p_.options;
    const int64_t t = clock_.time(step), first = t * p_.B + row;
    CellGradOptions<Real> extra;
    static_cast<CellOptions<Real>&>(extra) =
        cell_options<Real>(options, p_.storage, peephole_, width_, t, p_.B, p_.H, row, column);
    extra.grad_c = options.grad_c ? static_cast<const Real*>(options.grad_c) + first * width_ + column : nullptr;
    extra.grad_gates =
        options.grad_gates ? static_cast<const Real*>(options.grad_gates) + first * gates_stride_ + column : nullptr;
    extra.dpeephole = dpeephole_ ? dpeephole_.at(step, tile) + column : nullptr;
    extra.dreset = dc_reset_ ? dc_reset_ + row * width_ + column : nullptr;
    extra.dreset_step = options.dc_reset && options.c_reset_per_step
                            ? at(options.dc_reset, p_.storage, first * p_.H + column)
                            : nullptr;
    return extra;
  }

  using Source = typename HiddenGradient<Real, kFlags>::Source;
  const BackwardParams& p_;
  Clock clock_;
  bool direct_;
  RowTiles batch_;
  int64_t width_, gates_stride_, dh_stride_, vectors_, out_vectors_, chunk_;
  int threads_;
  Real *r_ = nullptr, *w_ = nullptr, *w_hr_ = nullptr, *dc_ = nullptr, *c0_ = nullptr, *dh_ = nullptr;
  Real *unprojected_ = nullptr, *block_ = nullptr, *panels_ = nullptr, *packed_ = nullptr;
  Real *sums_ih_ = nullptr, *sums_hh_ = nullptr, *sums_hr_ = nullptr;
  int64_t progress_stride_ = 0;
  int64_t* progress_ = nullptr;
  const uint8_t* flags_ = nullptr;
  uint8_t* no_flags_ = nullptr;  // zeros, where there are options and no flags
  const Real* gates_ = nullptr;
  Real *dgates_ = nullptr, *edge_ = nullptr;  // edge_: of the first step of the chunk that is done, when recomputing
  WithOptions<kFlags, Recompute<Cell, Real, kFlags>> again_{};
  int32_t* valid_ = nullptr;  // the rows of T * B that are no padding, where there may be some
  int64_t valid_rows_ = 0;
  Real *dc_reset_ = nullptr, *peephole_ = nullptr;
  StepSums<Real> db_, dpeephole_;
  HiddenGradient<Real, kFlags> hidden_{};
  Barrier barrier_;
};

}  // namespace
}  // namespace fastseq
