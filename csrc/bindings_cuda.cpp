// fastseq._cuda: the CUDA kernels for Python. Pointers, strides and sizes come in as integers (0 is the null pointer),
// the stream as its handle, so that one build serves every version of torch. The same file makes the module of the
// emulator. fastseq/cuda/ checks shapes and owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/facts.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace fastseq::cuda {
namespace {

using Address = std::uintptr_t;

template <typename Item = void>
Item* pointer(Address address) {
  return reinterpret_cast<Item*>(address);
}

void require(bool present, const char* what) {
  if (!present) throw std::invalid_argument(std::string(what) + " must not be null");
}

Dtype dtype_of(int code) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16})
    if (code == static_cast<int>(dtype)) return dtype;
  throw std::invalid_argument("the CUDA kernels serve float32, bfloat16 and float16");
}

// Kernels count steps, sequences and units in ints, and go past the last by less than the half that this leaves.
constexpr std::int64_t kMaxSize = std::numeric_limits<int>::max() / 2;

// (T, B, H) and the width of the tape.
Sizes sizes_of(const std::array<std::int64_t, 3>& given) {
  for (const std::int64_t size : given)
    if (size < 1 || size > kMaxSize) throw std::invalid_argument("a size is out of range");
  const auto number = [](std::int64_t size) { return static_cast<int>(size); };
  return {number(given[0]), number(given[1]), number(given[2]), ceil_div(number(given[2]), kTapeLanes) * kTapeLanes};
}

void check_tape(const Sizes& size, std::int64_t gates_stride) {
  if (gates_stride < std::int64_t{kGates} * size.HP || gates_stride % 4)
    throw std::invalid_argument("rows of gates must be a multiple of 4 floats apart, and no less than they hold");
}

// The copy engine reads the tapes from multiples of 16 bytes.
void check_aligned(Address address, const char* what) {
  if (address % 16) throw std::invalid_argument(std::string(what) + " must begin at a multiple of 16 bytes");
}

// What each build offers for H units in a pass, as (build, blocks, threads, rows of a tile of the batch, bytes of
// shared memory); those that have no room are left out.
std::vector<std::array<int, 5>> cluster_builds(int hidden, bool backward) {
  std::vector<std::array<int, 5>> found;
  for (int build = 0; build < kBuildCount; ++build) {
    const ClusterShape s = cluster_shape(kBuilds[build], hidden, backward);
    if (s.groups < 1) continue;
    const int bytes = backward ? BackwardShared(s).bytes : ForwardShared(s).bytes;
    found.push_back({build, s.blocks, s.threads(), s.rows(), bytes});
  }
  return found;
}

int resident_clusters(int dtype, bool backward, bool flags, int build, int hidden) {
  const ClusterChoice choice{build, hidden};
  return backward ? resident_backward_clusters(dtype_of(dtype), flags, choice)
                  : resident_forward_clusters(dtype_of(dtype), flags, choice);
}

void lstm_cluster_forward(int dtype, int build, int clusters, const std::array<std::int64_t, 3>& sizes, bool reverse,
                          bool save, Address gates, std::int64_t gates_stride, Address w_hh, Address b_ih, Address b_hh,
                          Address h_state, Address c_state, Address y, Address c_tape, Address flags, Address stream) {
  require(gates && w_hh && h_state && c_state && y && (c_tape || !save),
          "gates, w_hh, h_state, c_state, y, and with a tape c_tape");
  ClusterForward p{};
  p.size = sizes_of(sizes);
  check_tape(p.size, gates_stride);
  check_aligned(gates, "gates");
  const ClusterChoice choice{build, p.size.H};
  p.groups = choice.shape(/*backward=*/false).groups;
  p.reverse = reverse, p.save = save, p.gates_stride = gates_stride;
  p.gates = pointer<float>(gates), p.w_hh = pointer(w_hh), p.b_ih = pointer(b_ih), p.b_hh = pointer(b_hh);
  p.h_state = pointer(h_state), p.c_state = pointer<float>(c_state), p.y = pointer(y);
  p.c_tape = pointer<float>(c_tape), p.flags = pointer<const std::uint8_t>(flags);
  const py::gil_scoped_release release;
  launch_cluster_forward(dtype_of(dtype), choice, clusters, p, stream);
}

void lstm_cluster_backward(int dtype, int build, int clusters, const std::array<std::int64_t, 3>& sizes, bool reverse,
                           Address grad_y, Address w_hh, Address gates, std::int64_t gates_stride, Address c_tape,
                           Address c0, Address dgates, std::int64_t dgates_stride, Address dh_state, Address dc_state,
                           Address flags, Address stream) {
  require(w_hh && gates && c_tape && c0 && dgates && dh_state && dc_state,
          "w_hh, gates, c_tape, c0, dgates, dh_state, dc_state");
  ClusterBackward p{};
  p.size = sizes_of(sizes);
  check_tape(p.size, gates_stride);
  check_aligned(gates, "gates");
  check_aligned(c_tape, "c_tape");
  check_aligned(dgates, "dgates");
  if (dgates_stride < std::int64_t{kGates} * p.size.H) throw std::invalid_argument("rows of dgates overlap");
  const ClusterChoice choice{build, p.size.H};
  p.groups = choice.shape(/*backward=*/true).groups;
  p.reverse = reverse, p.gates_stride = gates_stride, p.dgates_stride = dgates_stride;
  p.grad_y = pointer(grad_y), p.w_hh = pointer(w_hh), p.gates = pointer<const float>(gates);
  p.c_tape = pointer<const float>(c_tape), p.c0 = pointer(c0), p.dgates = pointer(dgates);
  p.dh_state = pointer<float>(dh_state), p.dc_state = pointer<float>(dc_state);
  p.flags = pointer<const std::uint8_t>(flags);
  const py::gil_scoped_release release;
  launch_cluster_backward(dtype_of(dtype), choice, clusters, p, stream);
}

// What the grid-wide kernels offer for a layer in a pass, as (groups of a block, blocks, bytes of shared memory).
std::vector<std::array<std::int64_t, 3>> grid_builds(std::int64_t batch, std::int64_t hidden, bool backward) {
  const Sizes size = sizes_of({1, batch, hidden});
  std::vector<std::array<std::int64_t, 3>> found;
  for (int groups = 1; groups <= kMaxGroups; ++groups) {
    const GridChoice choice{groups, size.B, size.H};
    found.push_back({groups, choice.blocks(), static_cast<std::int64_t>(choice.shared_bytes(backward))});
  }
  return found;
}

int resident_blocks(int dtype, bool backward, bool flags, int groups, std::int64_t batch, std::int64_t hidden) {
  const Sizes size = sizes_of({1, batch, hidden});
  return resident_grid_blocks(dtype_of(dtype), backward, flags, {groups, size.B, size.H});
}

void lstm_grid_forward(int dtype, int groups, const std::array<std::int64_t, 3>& sizes, bool reverse, bool save,
                       Address gates, std::int64_t gates_stride, Address w_hh, Address b_ih, Address b_hh,
                       Address h_state, Address c_state, Address y, Address c_tape, Address flags, Address exchange,
                       Address signals, Address stream) {
  require(gates && w_hh && h_state && c_state && y && exchange && signals && (c_tape || !save),
          "gates, w_hh, h_state, c_state, y, exchange, signals, and with a tape c_tape");
  GridForward p{};
  p.size = sizes_of(sizes);
  check_tape(p.size, gates_stride);
  check_aligned(exchange, "exchange");
  p.reverse = reverse, p.save = save, p.gates_stride = gates_stride;
  p.gates = pointer<float>(gates), p.w_hh = pointer(w_hh), p.b_ih = pointer(b_ih), p.b_hh = pointer(b_hh);
  p.h_state = pointer(h_state), p.c_state = pointer<float>(c_state), p.y = pointer(y);
  p.c_tape = pointer<float>(c_tape), p.flags = pointer<const std::uint8_t>(flags);
  p.exchange = pointer(exchange), p.signals = pointer<std::uint32_t>(signals);
  const py::gil_scoped_release release;
  launch_grid_forward(dtype_of(dtype), {groups, p.size.B, p.size.H}, p, stream);
}

void lstm_grid_backward(int dtype, int groups, const std::array<std::int64_t, 3>& sizes, bool reverse, Address grad_y,
                        Address w_hh, Address gates, std::int64_t gates_stride, Address c_tape, Address c0,
                        Address dgates, std::int64_t dgates_stride, Address dh_state, Address dc_state, Address flags,
                        Address signals, Address stream) {
  require(w_hh && gates && c_tape && c0 && dgates && dh_state && dc_state && signals,
          "w_hh, gates, c_tape, c0, dgates, dh_state, dc_state, signals");
  GridBackward p{};
  p.size = sizes_of(sizes);
  check_tape(p.size, gates_stride);
  check_aligned(dgates, "dgates");
  if (dgates_stride < std::int64_t{kGates} * p.size.H || dgates_stride % 8)
    throw std::invalid_argument("rows of dgates must be a multiple of 8 numbers apart, and no less than they hold");
  p.reverse = reverse, p.gates_stride = gates_stride, p.dgates_stride = dgates_stride;
  p.grad_y = pointer(grad_y), p.w_hh = pointer(w_hh), p.gates = pointer<const float>(gates);
  p.c_tape = pointer<const float>(c_tape), p.c0 = pointer(c0), p.dgates = pointer(dgates);
  p.dh_state = pointer<float>(dh_state), p.dc_state = pointer<float>(dc_state);
  p.flags = pointer<const std::uint8_t>(flags), p.signals = pointer<std::uint32_t>(signals);
  const py::gil_scoped_release release;
  launch_grid_backward(dtype_of(dtype), {groups, p.size.B, p.size.H}, p, stream);
}

void cluster_barriers(int blocks, int clusters, int threads, std::int64_t steps, Address stream) {
  if ((blocks != 8 && blocks != 16) || clusters < 1 || threads < kLanes || threads > 1024 || threads % kLanes ||
      steps < 0)
    throw std::invalid_argument("blocks must be 8 or 16, threads whole warps of at most 1024");
  const py::gil_scoped_release release;
  launch_cluster_barriers(blocks, clusters, threads, steps, stream);
}

// (B, H) of one step, and the width of the tape.
StepSizes step_sizes(const std::array<std::int64_t, 2>& given) {
  const Sizes size = sizes_of({1, given[0], given[1]});
  return {size.B, size.H, size.HP};
}

// Whether rows of H numbers of a dtype, `stride` apart where one is given, all begin at multiples of 16 bytes.
bool wide_rows(Dtype dtype, std::int64_t H, std::initializer_list<Address> addresses,
               std::initializer_list<std::int64_t> strides) {
  const std::int64_t vector = dtype == Dtype::kFloat32 ? 4 : 8;
  if (H % vector) return false;
  for (const Address address : addresses)
    if (address % 16) return false;
  for (const std::int64_t stride : strides)
    if (stride % vector) return false;
  return true;
}

void lstm_cell_forward(int code, const std::array<std::int64_t, 2>& sizes, Address gates, std::int64_t gates_stride,
                       Address product, Address b_ih, Address b_hh, Address h_state, Address c_state, Address h_next,
                       Address y, Address c_tape, Address flags, Address next_flags, Address stream) {
  require(gates && product && h_state && c_state && y, "gates, product, h_state, c_state, y");
  const Dtype dtype = dtype_of(code);
  LstmCellForward p{};
  p.size = step_sizes(sizes), p.gates_stride = gates_stride;
  p.gates = pointer<float>(gates), p.product = pointer<const float>(product);
  p.b_ih = pointer(b_ih), p.b_hh = pointer(b_hh), p.h_state = pointer(h_state), p.c_state = pointer<float>(c_state);
  p.h_next = pointer(h_next), p.y = pointer(y), p.c_tape = pointer<float>(c_tape);
  p.flags = pointer<const std::uint8_t>(flags), p.next_flags = pointer<const std::uint8_t>(next_flags);
  const bool wide =
      wide_rows(dtype, p.size.H, {gates, product, b_ih, b_hh, h_state, c_state, h_next, y, c_tape}, {gates_stride});
  const py::gil_scoped_release release;
  launch_lstm_cell_forward(dtype, wide, p, stream);
}

void lstm_cell_backward(int code, const std::array<std::int64_t, 2>& sizes, Address grad_y, Address product,
                        Address gates, std::int64_t gates_stride, Address c_before, Address c0, Address dgates,
                        std::int64_t dgates_stride, Address dh_state, Address dc_state, Address flags,
                        Address flags_after, Address stream) {
  require(gates && (c_before || c0) && dgates && dh_state && dc_state, "gates, c_before or c0, dgates, states");
  const Dtype dtype = dtype_of(code);
  LstmCellBackward p{};
  p.size = step_sizes(sizes), p.gates_stride = gates_stride, p.dgates_stride = dgates_stride;
  p.grad_y = pointer(grad_y), p.product = pointer<const float>(product), p.gates = pointer<const float>(gates);
  p.c_before = pointer<const float>(c_before), p.c0 = pointer(c0), p.dgates = pointer(dgates);
  p.dh_state = pointer<float>(dh_state), p.dc_state = pointer<float>(dc_state);
  p.flags = pointer<const std::uint8_t>(flags), p.flags_after = pointer<const std::uint8_t>(flags_after);
  const bool wide = wide_rows(dtype, p.size.H, {grad_y, product, gates, c_before, c0, dgates, dh_state, dc_state},
                              {gates_stride, dgates_stride});
  const py::gil_scoped_release release;
  launch_lstm_cell_backward(dtype, wide, p, stream);
}

void rnn_cell_forward(int code, int nonlinearity, const std::array<std::int64_t, 2>& sizes, bool save, Address tape,
                      std::int64_t tape_stride, Address product, Address b_ih, Address b_hh, Address h_state,
                      Address h_next, Address y, Address flags, Address next_flags, Address stream) {
  require(tape && product && h_state && y, "tape, product, h_state, y");
  const Dtype dtype = dtype_of(code);
  RnnCellForward p{};
  p.size = step_sizes(sizes), p.tape_stride = tape_stride, p.save = save;
  p.tape = pointer<float>(tape), p.product = pointer<const float>(product);
  p.b_ih = pointer(b_ih), p.b_hh = pointer(b_hh), p.h_state = pointer(h_state), p.h_next = pointer(h_next);
  p.y = pointer(y);
  p.flags = pointer<const std::uint8_t>(flags), p.next_flags = pointer<const std::uint8_t>(next_flags);
  const bool wide = wide_rows(dtype, p.size.H, {tape, product, b_ih, b_hh, h_state, h_next, y}, {tape_stride});
  const py::gil_scoped_release release;
  launch_rnn_cell_forward(dtype, wide, nonlinearity, p, stream);
}

void rnn_cell_backward(int code, const std::array<std::int64_t, 2>& sizes, Address grad_y, Address product,
                       Address tape, std::int64_t tape_stride, Address dsums, std::int64_t dsums_stride,
                       Address dh_state, Address flags, Address flags_after, Address stream) {
  require(tape && dsums && dh_state, "tape, dsums, dh_state");
  const Dtype dtype = dtype_of(code);
  RnnCellBackward p{};
  p.size = step_sizes(sizes), p.tape_stride = tape_stride, p.dsums_stride = dsums_stride;
  p.grad_y = pointer(grad_y), p.product = pointer<const float>(product), p.tape = pointer<const float>(tape);
  p.dsums = pointer(dsums), p.dh_state = pointer<float>(dh_state);
  p.flags = pointer<const std::uint8_t>(flags), p.flags_after = pointer<const std::uint8_t>(flags_after);
  const bool wide = wide_rows(dtype, p.size.H, {grad_y, product, tape, dsums, dh_state}, {tape_stride, dsums_stride});
  const py::gil_scoped_release release;
  launch_rnn_cell_backward(dtype, wide, p, stream);
}

}  // namespace
}  // namespace fastseq::cuda

PYBIND11_MODULE(FASTSEQ_CUDA_MODULE, m) {
  using namespace fastseq::cuda;
  m.doc() = "CUDA kernels of fastseq. Call them through fastseq.functional, which checks what these do not.";
  m.def(
      "device_facts", &device_facts,
      "Of a device: compute capability (major, minor), multiprocessors, bytes of shared memory that a block may have.");
  m.def("cluster_builds", &cluster_builds);
  m.def("resident_clusters", &resident_clusters);
  m.def("lstm_cluster_forward", &lstm_cluster_forward);
  m.def("lstm_cluster_backward", &lstm_cluster_backward);
  m.def("grid_builds", &grid_builds);
  m.def("resident_blocks", &resident_blocks);
  m.def("lstm_grid_forward", &lstm_grid_forward);
  m.def("lstm_grid_backward", &lstm_grid_backward);
  m.def("cluster_barriers", &cluster_barriers);
  m.def("lstm_cell_forward", &lstm_cell_forward);
  m.def("lstm_cell_backward", &lstm_cell_backward);
  m.def("rnn_cell_forward", &rnn_cell_forward);
  m.def("rnn_cell_backward", &rnn_cell_backward);
#if defined(FASTSEQ_CUDA_EMULATED)
  m.attr("emulated") = true;
  m.def("set_schedule", &emulated::set_schedule);
  m.def("set_launcher", [](const py::object& launcher) {
    if (launcher.is_none()) return emulated::set_launcher(nullptr);
    emulated::set_launcher([launcher](std::uintptr_t kernel, const std::array<int, 3>& sizes, std::size_t shared_bytes,
                                      bool cooperative, const std::string& params) {
      const py::gil_scoped_acquire acquired;
      launcher(kernel, sizes, shared_bytes, cooperative, py::bytes(params));
    });
  });
#else
  m.attr("emulated") = false;
#endif
}
