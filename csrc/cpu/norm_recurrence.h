// The LSTM with layer normalisation over a whole sequence. A row's statistics need all of its sums, so the cell cannot
// run on the registers of a product: every step has two phases more than the plain layer's one, a product into memory,
// and the rows of each tile, which the members of a team share.
//
// The tape is y and c alone, whatever the layer was asked to keep: the derivative needs the sums before normalisation,
// up to twice as many numbers as the gates, and making them again by two products over all rows of a chunk of time
// costs less than a quarter of the layer's own products and no memory. It makes the gates on the way.
#pragma once

#include "norm.h"
#include "recurrence.h"

namespace fastseq {
namespace {

template <typename Real>
class NormForward : public RecurrentForward<LstmCell, Real, kWithOptions> {
  using Base = RecurrentForward<LstmCell, Real, kWithOptions>;
  using Base::batch_, Base::bias_, Base::clock_, Base::flags_, Base::gates_stride_, Base::hidden_, Base::p_,
      Base::threads_, Base::unprojected_, Base::vectors_, Base::width_;

 public:
  using Base::Base;

  void place(Carver& carver) {
    Base::place(carver);
    norm_.place(carver, *p_.options, p_.H);
    sums_ = carver.take<Real>(p_.B * gates_stride_);
    scratch_ = carver.take<Real>(threads_ * width_);
  }
  void prepare() {
    Base::prepare();
    bias_ = norm_.fill(p_.storage, *p_.options, bias_);
  }
  void work(int thread, int threads) {
    Real* scratch = scratch_ + thread * width_;
    Base::run(thread, threads, [&](const Team& team, int64_t step, int64_t begin, int64_t& phase) {
      const PanelRange panels = LstmCell::panels(team.slice(vectors_));
      team.sweep(phase++, panels, [&](const Panel& panel, int64_t tile) { multiply(step, panel, tile); });
      team.sweep_rows(phase++, batch_, [&](int64_t row) { cell(step, begin, row, scratch); });
    });
  }

 private:
  void multiply(int64_t step, const Panel& panel, int64_t tile) const {
    const int64_t column = panel.first * kLanes<Real>;
    const ProjectionOp<Real> op{norm_.zeros + column, sums_ + batch_.first(tile) * gates_stride_ + column,
                                gates_stride_, width_};
    LstmCell::run<Chains::kSide, Real>(batch_.height(tile), panel, op, Base::recurrent(step, panel, tile));
  }
  void cell(int64_t step, int64_t begin, int64_t row, Real* scratch) const {
    const int64_t t = clock_.time(step);
    Real* gates = Base::gates(t, begin) + row * gates_stride_;
    norm_.template activate<false>(gates, sums_ + row * gates_stride_, gates);
    NormCellRow<Real>{norm_,
                      gates,
                      Base::c_at(step - 1) + row * width_,
                      Base::c_at(step) + row * width_,
                      unprojected_ ? unprojected_ + row * width_ : nullptr,
                      hidden_.sink(step, row, 0),
                      flags_[t * p_.B + row],
                      cell_options<Real>(*p_.options, p_.storage, nullptr, width_, t, p_.B, p_.H, row, 0),
                      scratch}
        .run();
  }

  NormWeights<Real> norm_;
  Real *sums_ = nullptr, *scratch_ = nullptr;  // [B, gates_stride_]: R h_{t-1}
};

template <typename Real>
class NormBackward : public RecurrentBackward<LstmCell, Real, kWithOptions> {
  using Base = RecurrentBackward<LstmCell, Real, kWithOptions>;
  using Base::again_, Base::barrier_, Base::batch_, Base::chunk_, Base::clock_, Base::db_, Base::dc_, Base::dgates_,
      Base::dh_, Base::dh_stride_, Base::flags_, Base::gates_stride_, Base::hidden_, Base::p_, Base::panels_,
      Base::threads_, Base::unprojected_, Base::vectors_, Base::w_hr_, Base::width_;

 public:
  using Base::Base;

  void place(Carver& carver) {
    Base::place(carver);
    db_ = {};  // here the sums of rows give it
    norm_.place(carver, *p_.options, p_.H);
    const int64_t rows = chunk_ * p_.B * gates_stride_;
    of_hidden_ = carver.take<Real>(rows);
    if (norm_.haste) of_input_ = carver.take<Real>(rows);
    dcell_ = carver.take<Real>(p_.B * width_);
    scratch_ = carver.take<Real>(threads_ * 2 * width_);
    if (!Base::weights()) return;
    const auto place = [&](StepSums<Real>& sums, int64_t gates) { sums.place(carver, p_.T, p_.B, gates, width_); };
    if (norm_.haste) place(of_gates_[kOfInput], kGates);
    place(of_gates_[kOfHidden], kGates), place(gate_bias_, kGates);
    if (!norm_.haste && p_.db) place(bias_, kGates);
    place(of_cell_, 1), place(cell_bias_, 1);
  }

  void prepare() {
    Base::prepare();
    again_.bias = norm_.fill(p_.storage, *p_.options, again_.bias);
    for (const auto& sums : of_gates_) sums.clear();
    gate_bias_.clear(), bias_.clear(), of_cell_.clear(), cell_bias_.clear();
  }

  void work(int thread, int threads) {
    const Team team = Base::pack(thread, threads);
    const auto through = [&](const Team&, int64_t step, const Chunk& chunk, int64_t& phase) {
      const Range units = team.slice(vectors_);
      team.sweep(phase++, {units.begin, units.end},
                 [&](const Panel& panel, int64_t tile) { multiply(step, chunk, panel, tile); });
      team.sweep_rows(phase++, batch_, [&](int64_t row) { cell(step, chunk, row, thread); });
    };
    int64_t phase = 0;
    Base::run_chunks(
        thread, threads, [&](const Chunk& chunk) { again(chunk, thread, threads); },
        [&](const Chunk& chunk) { Base::through_time(team, chunk, phase, through); },
        [&](const Chunk& chunk) { products(chunk, thread, threads); });
  }

  void finish() const {
    Base::finish();
    const LayerOptions& options = *p_.options;
    const auto store = [this](const StepSums<Real>& sums, void* to) { sums.store_total(p_.storage, p_.H, to); };
    store(of_gates_[kOfInput], options.dweight_ln_ih);
    store(of_gates_[kOfHidden], norm_.haste ? options.dweight_ln_hh : options.dweight_ln_gates);
    store(gate_bias_, norm_.haste ? p_.db : options.dbias_ln_gates);
    store(bias_, p_.db);
    store(of_cell_, options.dweight_ln_c);
    store(cell_bias_, options.dbias_ln_c);
  }

 private:
  // The gates and the normalised sums of a chunk.
  void again(const Chunk& chunk, int thread, int threads) const {
    const PanelRange panels = LstmCell::panels({0, width_ / kLanes<Real>});
    Real* of_input = norm_.haste ? of_input_ : dgates_;
    again_.stretches(chunk, thread, threads, [&](const RowTiles& tiles, Range part, const Real* xs, const Real* hs) {
      const int64_t first = tiles.first(part.begin), last = tiles.first(part.end);
      for (int64_t i = 0; i < panels.count(); ++i)
        for (int64_t tile = part.begin; tile < part.end; ++tile) {
          const int64_t row = tiles.first(tile), at = row * gates_stride_;
          again_.project(panels.at(i), tiles.height(tile), xs + (row - first) * p_.I, of_input + at, gates_stride_);
          again_.project_hidden(panels.at(i), tiles.height(tile), hs + (row - first) * p_.P, norm_.zeros,
                                of_hidden_ + at, gates_stride_);
        }
      for (int64_t at = first * gates_stride_; at < last * gates_stride_; at += gates_stride_)
        norm_.template activate<true>(of_input + at, of_hidden_ + at, dgates_ + at);
    });
  }
  // dL/dh_t into memory, or with a projection dL/d(o tanh(.)).
  void multiply(int64_t step, const Chunk& chunk, const Panel& panel, int64_t tile) const {
    const int64_t row = batch_.first(tile), column = panel.first * kLanes<Real>;
    Real* to = dcell_ + row * width_ + column;
    if (p_.w_hr) {
      const Real* dh = dh_ + (Base::in_chunk(step, chunk) + row) * dh_stride_;
      run_tile<Chains::kSide, ALayout::kRows, Real>(batch_.height(tile), panel.vectors,
                                                    AccumulateOp<Real>{to, width_, width_ - column, false},
                                                    Product<Real>{w_hr_ + column * p_.P, p_.P, dh, dh_stride_});
    } else {
      run_tile<Chains::kSide, ALayout::kRows, Real>(
          batch_.height(tile), panel.vectors,
          HiddenGradOp<Real, kWithOptions>{hidden_.source(step, row, column), to, width_},
          Base::recurrent(step, chunk, panel, tile));
    }
  }
  void cell(int64_t step, const Chunk& chunk, int64_t row, int thread) const {
    const int64_t t = clock_.time(step), in_chunk = Base::in_chunk(step, chunk) + row;
    Real* scratch = scratch_ + thread * 2 * width_;
    NormGradRow<Real>{norm_,
                      dcell_ + row * width_,
                      dgates_ + in_chunk * gates_stride_,
                      of_hidden_ + in_chunk * gates_stride_,
                      norm_.haste ? of_input_ + in_chunk * gates_stride_ : nullptr,
                      Base::c_at(step - 1) + row * width_,
                      dc_ + row * width_,
                      p_.w_hr ? unprojected_ + in_chunk * width_ : nullptr,
                      flags_[t * p_.B + row],
                      Base::cell_grad_options(step, 0, row, 0),
                      sums_of(step, row),
                      scratch,
                      scratch + width_}
        .run();
  }
  NormSums<Real> sums_of(int64_t step, int64_t row) const {
    NormSums<Real> sums;
    for (int part = 0; part < kParts; ++part) sums.of_gates[part] = of_gates_[part].at(step, row);
    sums.gate_bias = gate_bias_.at(step, row), sums.bias = bias_.at(step, row);
    sums.of_cell = of_cell_.at(step, row), sums.cell_bias = cell_bias_.at(step, row);
    return sums;
  }
  void products(const Chunk& chunk, int thread, int threads) {
    if (!norm_.haste) return Base::large_products(chunk, thread, threads);
    // The sums of the input have gradients of their own.
    const auto of_input = Base::gate_gradients(of_input_, chunk), of_hidden = Base::gate_gradients(dgates_, chunk);
    if (p_.dx) Base::input_gradient(of_input, chunk, thread, threads);
    if (!Base::weights()) return;
    Real* packed = Base::packed(thread);
    Base::weight_gradient(of_input, chunk).run(panels_, packed, thread, threads, barrier_, Base::x_source(chunk));
    Base::weight_gradient(of_hidden, chunk).run(panels_, packed, thread, threads, barrier_, Base::h_source(chunk));
    if (p_.w_hr) Base::projection_gradient(chunk, thread, threads);
  }

  NormWeights<Real> norm_;
  StepSums<Real> of_gates_[kParts], gate_bias_, bias_, of_cell_, cell_bias_;  // a part for each row of the batch
  Real *of_hidden_ = nullptr, *of_input_ = nullptr;  // [chunk rows, gates_stride_]: normalised sums
  Real *dcell_ = nullptr, *scratch_ = nullptr;       // [B, width_]
};

}  // namespace
}  // namespace fastseq
