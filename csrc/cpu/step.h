// One step of a stack of layers, from weights that were packed once: what a stream of single steps wants.
//
// A sequence of length one through recurrence.h spends nearly all of its time packing. Here a thread's work is a slice
// of all tiles of a layer; a tile multiplies x and h by the packed weights, one behind the other, and the cell ends it.
// Nothing is kept between tiles, so that a layer reads the states that came in and writes those that go out.
#pragma once

#include "launch.h"
#include "lstm.h"
#include "rnn.h"

namespace fastseq {
namespace {

// Where the parts of one packed layer lie.
template <typename Cell, typename Real>
struct PackedLayer {
  int64_t I;
  Real *w_ih, *w_hh, *w_hr, *bias;  // bias: as a panel of the product, slot by slot

  static PackedLayer take(Carver& carver, const StepShape& s, int64_t layer) {
    const int64_t n = kLanes<Real>, width = round_up(s.H, n);
    PackedLayer p{};
    p.I = layer == 0 ? s.I : s.P;
    p.w_ih = carver.take<Real>(Cell::kGates * width * p.I);
    p.w_hh = carver.take<Real>(Cell::kGates * width * s.P);
    p.w_hr = s.projected ? carver.take<Real>(round_up(s.P, n) * s.H) : nullptr;
    p.bias = carver.take<Real>(Cell::kGates * width);
    return p;
  }
};

template <typename Cell, typename Real>
int64_t step_bytes_of(const StepShape& s) {
  Carver carver(nullptr);
  for (int64_t layer = 0; layer < s.layers; ++layer) PackedLayer<Cell, Real>::take(carver, s, layer);
  return carver.used();
}

template <typename Cell, typename Real>
void step_pack_of(const StepShape& s, const StepWeights* weights, char* packed) {
  constexpr int n = kLanes<Real>;
  const int64_t vectors = divide_up(s.H, n);
  Carver carver(packed);
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    const PackedLayer<Cell, Real> to = PackedLayer<Cell, Real>::take(carver, s, layer);
    const StepWeights& from = weights[layer];
    Cell::template pack<Real>(s.storage, from.w_ih, s.H, to.I, {0, vectors}, to.w_ih);
    Cell::template pack<Real>(s.storage, from.w_hh, s.H, s.P, {0, vectors}, to.w_hh);
    if (s.projected) pack_transposed<Real>(s.storage, from.w_hr, s.P, s.H, {0, divide_up(s.P, n)}, to.w_hr);
    const void* const biases[] = {from.b_ih, from.b_hh};
    for (int64_t unit = 0; unit < vectors; ++unit)
      for (int64_t gate = 0; gate < Cell::kGates; ++gate) {
        const int inside = lanes_inside<Real>(s.H, unit * n);
        Vec<Real> sum = zero<Real>();
        for (const void* bias : biases)
          if (bias) sum = sum + load_as<Real>(s.storage, bias, gate * s.H + unit * n, inside);
        store(to.bias + (unit * Cell::kGates + gate) * n, sum);
      }
  }
}

template <typename Cell, typename Real>
class Step {
 public:
  explicit Step(const StepParams& p)
      : p_(p),
        batch_(p.B),
        vectors_(divide_up(p.shape.H, kLanes<Real>)),
        out_vectors_(divide_up(p.shape.P, kLanes<Real>)),
        width_(vectors_ * kLanes<Real>),
        out_width_(out_vectors_ * kLanes<Real>),
        threads_(useful_threads(
            p.threads, p.B * Cell::kGates * p.shape.H * (p.shape.I + p.shape.P + (p.shape.layers - 1) * 2 * p.shape.P),
            batch_.count(), vectors_)) {}

  int threads() const { return threads_; }

  void place(Carver& carver) {
    const int64_t B = p_.B, layers = p_.shape.layers;
    if (is_half(p_.shape.storage)) {
      x_ = carver.take<Real>(B * p_.shape.I);
      h_ = carver.take<Real>(layers * B * out_width_);
      h_next_ = carver.take<Real>(layers * B * out_width_);
    }
    if (Cell::kHasC && !c_is_direct()) c_ = carver.take<Real>(layers * B * width_);
    if (p_.shape.projected) unprojected_ = carver.take<Real>(B * width_);
  }

  void prepare() {
    const int64_t B = p_.B, layers = p_.shape.layers;
    if (x_) {
      load_rows<Real>(p_.shape.storage, p_.x, p_.shape.I, x_, p_.shape.I, B, p_.shape.I);
      load_rows<Real>(p_.shape.storage, p_.h, p_.shape.P, h_, out_width_, layers * B, p_.shape.P);
    }
    if (c_) load_rows<Real>(p_.shape.storage, p_.c, p_.shape.H, c_, width_, layers * B, p_.shape.H);
  }

  void work(int thread, int threads) {
    Carver carver(p_.packed);
    for (int64_t layer = 0; layer < p_.shape.layers; ++layer) {
      if (layer > 0) barrier_.wait(threads);
      const PackedLayer<Cell, Real> weights = PackedLayer<Cell, Real>::take(carver, p_.shape, layer);
      each_tile(Cell::panels({0, vectors_}), thread, threads,
                [&](const Panel& panel, int64_t tile) { cell(weights, layer, panel, tile); });
      if (!p_.shape.projected) continue;
      barrier_.wait(threads);
      each_tile({0, out_vectors_}, thread, threads,
                [&](const Panel& panel, int64_t tile) { project(weights, layer, panel, tile); });
    }
  }

  void finish() const {
    const StepShape& s = p_.shape;
    const int64_t bytes = p_.B * s.P * bytes_of(s.storage);
    memcpy(p_.y, static_cast<const char*>(p_.h_n) + (s.layers - 1) * bytes, static_cast<size_t>(bytes));
    if (c_) store_rows<Real>(s.storage, c_, width_, p_.c_n, s.H, s.layers * p_.B, s.H);
  }

 private:
  using Sink = typename HiddenState<Real, kNoFlags>::Sink;

  // The user's rows of c can be read and written a vector at a time.
  bool c_is_direct() const { return !is_half(p_.shape.storage) && p_.shape.H == width_; }

  // This thread's part of all tiles, those of a panel one behind the other.
  template <typename Body>
  void each_tile(const PanelRange& panels, int thread, int threads, const Body& body) const {
    const int64_t tiles = batch_.count();
    const Range mine = split(panels.count() * tiles, threads, thread);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t job = p_.backwards ? mine.begin + mine.end - 1 - i : i;
      body(panels.at(job / tiles), job % tiles);
    }
  }

  void cell(const PackedLayer<Cell, Real>& weights, int64_t layer, const Panel& panel, int64_t tile) const {
    const int64_t n = kLanes<Real>, B = p_.B, I = weights.I, P = p_.shape.P, H = p_.shape.H;
    const int64_t row = batch_.first(tile), column = panel.first * n;
    const int rows = batch_.height(tile);
    constexpr int64_t kSlots = kTileVectors;
    Real gates[kTileRows * kSlots * kLanes<Real>];
    const int64_t stride = kSlots * n;

    const bool below = layer > 0;  // reads what the layer below has just written
    const Real* x =
        h_ ? (below ? h_next_ + (layer - 1) * B * out_width_ : x_)
           : (below ? static_cast<const Real*>(p_.h_n) + (layer - 1) * B * P : static_cast<const Real*>(p_.x));
    const int64_t ldx = h_ && below ? out_width_ : I;
    const Real* h = h_ ? h_ + layer * B * out_width_ : static_cast<const Real*>(p_.h) + layer * B * P;
    const int64_t ldh = h_ ? out_width_ : P;

    const int64_t chain = chain_for<Real>(H);
    Cell::template run<Chains::kSide, Real>(
        rows, panel, ProjectionOp<Real>{weights.bias + column * Cell::kGates, gates, stride, n},
        Product<Real>{weights.w_ih + column * I * Cell::kGates, I, x + row * ldx, ldx, chain});
    const Product<Real> product{weights.w_hh + column * P * Cell::kGates, P, h + row * ldh, ldh, chain};
    if constexpr (Cell::kHasC) {
      const int64_t place = (layer * B + row) * width_ + column;
      const Real* before = c_ ? c_ : static_cast<const Real*>(p_.c);
      Real* now = c_ ? c_ : static_cast<Real*>(p_.c_n);
      const LstmCellOp<Real, kNoFlags> op{gates,
                                          stride,
                                          nullptr,
                                          stride,
                                          n,
                                          before + place,
                                          now + place,
                                          width_,
                                          unprojected_ ? unprojected_ + row * width_ + column : nullptr,
                                          unprojected_ ? Sink{} : sink(layer, row, column),
                                          nullptr,
                                          {}};
      Cell::template run<Chains::kSide, Real>(rows, panel, op, product);
    } else {
      const ElmanCellOp<Real, kNoFlags> op{p_.shape.activation,     gates, stride, nullptr, stride,
                                           sink(layer, row, column)};
      Cell::template run<Chains::kSide, Real>(rows, panel, op, product);
    }
  }

  void project(const PackedLayer<Cell, Real>& weights, int64_t layer, const Panel& panel, int64_t tile) const {
    const int64_t row = batch_.first(tile), column = panel.first * kLanes<Real>, H = p_.shape.H;
    const ProjectedHiddenOp<Real, kNoFlags> op{sink(layer, row, column)};
    run_tile<Chains::kSide, ALayout::kRows, Real>(
        batch_.height(tile), panel.vectors, op,
        Product<Real>{weights.w_hr + column * H, H, unprojected_ + row * width_, width_, chain_for<Real>(p_.shape.P)});
  }

  Sink sink(int64_t layer, int64_t row, int64_t column) const {
    const int64_t P = p_.shape.P, place = layer * p_.B + row;
    Sink s{};
    s.storage = p_.shape.storage;
    s.y = at(p_.h_n, s.storage, place * P + column);
    s.y_stride = P;
    s.slot_stride = out_width_;
    s.width = P - column;
    s.next = h_next_ ? h_next_ + place * out_width_ + column : nullptr;
    return s;
  }

  const StepParams& p_;
  RowTiles batch_;
  int64_t vectors_, out_vectors_, width_, out_width_;
  int threads_;
  // For half types x and h as numbers, and h as the layer above reads it; c where its rows are no whole vectors.
  Real *x_ = nullptr, *h_ = nullptr, *h_next_ = nullptr, *c_ = nullptr, *unprojected_ = nullptr;
  Barrier barrier_;
};

// Calls body with a cell and an arithmetic type, as values of no meaning.
template <typename Body>
auto with_step_types(const StepShape& s, const Body& body) {
  if (s.storage == Storage::kFloat64) return s.lstm ? body(LstmCell{}, double{}) : body(ElmanCell{}, double{});
  return s.lstm ? body(LstmCell{}, float{}) : body(ElmanCell{}, float{});
}

inline int64_t step_bytes(const StepShape& s) {
  return with_step_types(s, [&](auto cell, auto real) { return step_bytes_of<decltype(cell), decltype(real)>(s); });
}
inline void step_pack(const StepShape& s, const StepWeights* layers, char* packed) {
  with_step_types(s, [&](auto cell, auto real) { step_pack_of<decltype(cell), decltype(real)>(s, layers, packed); });
}
inline void step(const StepParams& p) {
  with_step_types(p.shape, [&](auto cell, auto real) { launch<Step<decltype(cell), decltype(real)>>(p); });
}

}  // namespace
}  // namespace fastseq
