// The kernels of cells.h in every dtype, and their launches.
#include <stdexcept>
#include <type_traits>

#include "cuda/cells.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastseq::cuda {
namespace {

// Calls `use` with a value of the number type of a dtype, and with how many numbers a thread takes as a constant.
template <typename Use>
void with_numbers(Dtype dtype, bool wide, const Use& use) {
  const auto with_number = [&](auto number) {
    if (wide)
      use(number, std::integral_constant<int, decltype(number)::kVector>{});
    else
      use(number, std::integral_constant<int, 1>{});
  };
  if (dtype == Dtype::kFloat32) return with_number(Float32{});
  if (dtype == Dtype::kBfloat16) return with_number(Bfloat16{});
  with_number(Float16{});
}

template <typename Params>
void launch_cells(void (*kernel)(Params), int count, const Params& p, std::uintptr_t stream) {
  const std::int64_t threads = p.size.B * (p.size.HP / count);
  const Grid grid{1, static_cast<int>((threads + kCellThreads - 1) / kCellThreads), kCellThreads, 0};
  launch(kernel, grid, p, stream);
}

}  // namespace

void launch_lstm_cell_forward(Dtype dtype, bool wide, const LstmCellForward& p, std::uintptr_t stream) {
  with_numbers(dtype, wide, [&](auto number, auto count) {
    launch_cells(&lstm_cell_forward<decltype(number), decltype(count)::value>, count, p, stream);
  });
}

void launch_lstm_cell_backward(Dtype dtype, bool wide, const LstmCellBackward& p, std::uintptr_t stream) {
  with_numbers(dtype, wide, [&](auto number, auto count) {
    launch_cells(&lstm_cell_backward<decltype(number), decltype(count)::value>, count, p, stream);
  });
}

void launch_rnn_cell_forward(Dtype dtype, bool wide, int nonlinearity, const RnnCellForward& p, std::uintptr_t stream) {
  with_numbers(dtype, wide, [&](auto number, auto count) {
    using Number = decltype(number);
    constexpr int kCount = decltype(count)::value;
    void (*const kernels[])(RnnCellForward) = {
        &rnn_cell_forward<Number, kCount, Nonlinearity::kTanh>,
        &rnn_cell_forward<Number, kCount, Nonlinearity::kRelu>,
        &rnn_cell_forward<Number, kCount, Nonlinearity::kLogistic>,
    };
    if (nonlinearity < 0 || nonlinearity > 2) throw std::invalid_argument("there is no such nonlinearity");
    launch_cells(kernels[nonlinearity], count, p, stream);
  });
}

void launch_rnn_cell_backward(Dtype dtype, bool wide, const RnnCellBackward& p, std::uintptr_t stream) {
  with_numbers(dtype, wide, [&](auto number, auto count) {
    launch_cells(&rnn_cell_backward<decltype(number), decltype(count)::value>, count, p, stream);
  });
}

}  // namespace fastseq::cuda
