// fastseq._cpu: the C++ CPU kernels for Python. Pointers, strides and sizes come in as integers (0 is the null
// pointer), so that one build serves every version of torch. fastseq/cpu/ checks shapes and owns the memory.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/packed_step.h"
#include "cpu/params.h"
#include "cpu/select.h"
#include "cpu/workspace.h"

namespace py = pybind11;

namespace fastseq {
namespace {

using Address = std::uintptr_t;

template <typename Item = void>
Item* pointer(Address address) {
  return reinterpret_cast<Item*>(address);
}

Storage storage_of(int storage) {
  if (storage < 0 || storage > static_cast<int>(Storage::kFloat16)) throw std::invalid_argument("unknown storage type");
  return static_cast<Storage>(storage);
}

template <typename Params>
void set_sizes(Params& p, int storage, int activation, const std::vector<std::int64_t>& sizes, int threads) {
  if (activation < 0 || activation > static_cast<int>(Activation::kLogistic))
    throw std::invalid_argument("unknown activation");
  if (sizes.size() != 5) throw std::invalid_argument("sizes must be (T, B, I, H, P)");
  for (std::size_t i = 0; i < sizes.size(); ++i)  // an input of no columns is allowed: a layer that hears only itself
    if (sizes[i] < (i == 2 ? 0 : 1)) throw std::invalid_argument("sizes (T, B, I, H, P) out of range");
  p.storage = storage_of(storage);
  p.activation = static_cast<Activation>(activation);
  p.T = sizes[0], p.B = sizes[1], p.I = sizes[2], p.H = sizes[3], p.P = sizes[4];
  p.threads = threads < 1 ? 1 : threads;
}

void require(bool present, const char* what) {
  if (!present) throw std::invalid_argument(std::string(what) + " must not be null");
}

// Writes one field of LayerOptions: a pointer as an address, a number as it is.
template <auto kField, typename Value>
void set_option(LayerOptions& options, Value value) {
  if constexpr (std::is_same_v<Value, Address>)
    options.*kField = reinterpret_cast<std::remove_reference_t<decltype(options.*kField)>>(value);
  else
    options.*kField = value;
}
template <auto kField, typename Value = Address>
void option(py::class_<LayerOptions>& options, const char* name) {
  options.def_property(name, nullptr, &set_option<kField, Value>);
}

ForwardParams forward_params(int storage, int activation, const std::vector<std::int64_t>& sizes, Address x,
                             std::int64_t x_stride_t, std::int64_t x_stride_b, Address h0, Address c0, Address w_ih,
                             Address w_hh, Address b_ih, Address b_hh, Address w_hr, Address flags, bool reverse,
                             Address y, Address h_n, Address c_n, Address c, Address gates, const LayerOptions* options,
                             bool any_order, int threads) {
  ForwardParams p{};
  set_sizes(p, storage, activation, sizes, threads);
  require(((x && w_ih) || sizes[2] == 0) && w_hh && y && h_n, "x, w_ih, w_hh, y and h_n");
  p.x_stride_t = x_stride_t, p.x_stride_b = x_stride_b;
  p.x = pointer(x), p.h0 = pointer(h0), p.c0 = pointer(c0);
  p.w_ih = pointer(w_ih), p.w_hh = pointer(w_hh), p.w_hr = pointer(w_hr);
  p.b_ih = pointer(b_ih), p.b_hh = pointer(b_hh);
  p.flags = pointer<std::uint8_t>(flags);
  p.reverse = reverse;
  p.y = pointer(y), p.h_n = pointer(h_n), p.c_n = pointer(c_n);
  p.c = pointer(c), p.gates = pointer(gates);
  p.options = options;
  p.any_order = any_order;
  return p;
}

BackwardParams backward_params(int storage, int activation, const std::vector<std::int64_t>& sizes, Address grad_y,
                               std::int64_t grad_y_stride_t, std::int64_t grad_y_stride_b, Address grad_h_n,
                               Address grad_c_n, Address x, std::int64_t x_stride_t, std::int64_t x_stride_b,
                               Address h0, Address c0, Address w_ih, Address w_hh, Address w_hr, Address flags,
                               bool reverse, Address y, Address c, Address gates, Address dgates, Address dx,
                               Address dh0, Address dc0, Address dw_ih, Address dw_hh, Address db, Address dw_hr,
                               const LayerOptions* options, int threads) {
  BackwardParams p{};
  set_sizes(p, storage, activation, sizes, threads);
  const bool recompute = options && options->recompute;
  require(((x && w_ih) || sizes[2] == 0) && h0 && w_hh && y, "x, h0, w_ih, w_hh and y");
  require(recompute || (gates && dgates), "gates and dgates");
  p.grad_y = pointer(grad_y), p.grad_h_n = pointer(grad_h_n), p.grad_c_n = pointer(grad_c_n);
  p.grad_y_stride_t = grad_y_stride_t, p.grad_y_stride_b = grad_y_stride_b;
  p.x_stride_t = x_stride_t, p.x_stride_b = x_stride_b;
  p.x = pointer(x), p.h0 = pointer(h0), p.c0 = pointer(c0);
  p.w_ih = pointer(w_ih), p.w_hh = pointer(w_hh), p.w_hr = pointer(w_hr);
  p.flags = pointer<std::uint8_t>(flags);
  p.reverse = reverse;
  p.y = pointer(y), p.c = pointer(c), p.gates = pointer(gates), p.dgates = pointer(dgates);
  p.dx = pointer(dx), p.dh0 = pointer(dh0), p.dc0 = pointer(dc0);
  p.dw_ih = pointer(dw_ih), p.dw_hh = pointer(dw_hh), p.db = pointer(db), p.dw_hr = pointer(dw_hr);
  if (p.dw_ih || p.dw_hh)
    require((dw_ih || sizes[2] == 0) && dw_hh && (!w_hr || dw_hr), "the weights' gradients, given in part,");
  p.options = options;
  if (options) {
    require(!options->dh_reset || options->h_reset, "h_reset, whose gradient is asked for,");
    require(!options->dc_reset || options->c_reset, "c_reset, whose gradient is asked for,");
    require(!options->dh_mask || options->h_mask, "h_mask, whose gradient is asked for,");
    require(!options->dpeephole || options->peephole, "peephole, whose gradient is asked for,");
  }
  return p;
}

// Layer normalisation is whole in one of its two forms, or not there.
void check_norm(const LayerOptions* options) {
  if (!options) return;
  const LayerOptions& o = *options;
  const bool haste = o.weight_ln_ih && o.weight_ln_hh, torchaudio = o.weight_ln_gates && o.bias_ln_gates;
  const bool any =
      o.weight_ln_ih || o.weight_ln_hh || o.weight_ln_gates || o.bias_ln_gates || o.weight_ln_c || o.bias_ln_c;
  if (!any) return;
  const bool one = haste ? !o.weight_ln_gates && !o.bias_ln_gates : torchaudio && !o.weight_ln_ih && !o.weight_ln_hh;
  if (!one || !o.weight_ln_c || !o.bias_ln_c || o.peephole)
    throw std::invalid_argument("layer normalisation: haste's four tensors or torchaudio's four, and no peephole");
}

void check_lstm_forward(const ForwardParams& p) {
  check_norm(p.options);
  require(p.c_n, "c_n");
  if (!p.c && p.gates) throw std::invalid_argument("the tape is c and gates, c alone, or neither");
  if (p.w_hr == nullptr && p.P != p.H) throw std::invalid_argument("without w_hr, P must be H");
}
void check_lstm_backward(const BackwardParams& p) {
  check_norm(p.options);
  if (p.options && p.options->weight_ln_c && !p.options->recompute)
    throw std::invalid_argument("a backward of layer normalisation makes its gates again: recompute must be set");
  require(p.c0 && p.c, "c0 and c");
  if (p.w_hr == nullptr && p.P != p.H) throw std::invalid_argument("without w_hr, P must be H");
}
void check_rnn(bool projected) {
  if (projected) throw std::invalid_argument("an Elman layer has no projection: P must be H");
}
void check_rnn_forward(const ForwardParams& p) { check_rnn(p.w_hr != nullptr || p.P != p.H); }
void check_rnn_backward(const BackwardParams& p) { check_rnn(p.w_hr != nullptr || p.P != p.H); }

void require_sizes(std::initializer_list<std::int64_t> sizes) {
  for (const std::int64_t size : sizes)
    if (size < 1) throw std::invalid_argument("sizes must be at least 1");
}

ClusterParams cluster_params(int task, int storage, int given_storage, int gradient_storage, std::int64_t N,
                             std::int64_t d, std::int64_t K, double alpha, double scale, Address z, Address centers,
                             Address given, Address freq, Address q, Address loss, Address dz, Address dcenters,
                             int threads) {
  ClusterParams p{};
  if (task < 0 || task > static_cast<int>(ClusterTask::kFrequencyLoss)) throw std::invalid_argument("unknown task");
  p.task = static_cast<ClusterTask>(task);
  p.storage = storage_of(storage), p.given_storage = storage_of(given_storage);
  p.gradient_storage = storage_of(gradient_storage);
  const bool wide = p.storage == Storage::kFloat64;
  if (wide != (p.given_storage == Storage::kFloat64) || wide != (p.gradient_storage == Storage::kFloat64))
    throw std::invalid_argument("double is not mixed with other types");
  p.N = N, p.d = d, p.K = K, p.alpha = alpha, p.scale = scale;
  p.z = pointer(z), p.centers = pointer(centers), p.given = pointer(given), p.freq = pointer(freq);
  p.q = pointer(q), p.loss = pointer<double>(loss), p.dz = pointer(dz), p.dcenters = pointer(dcenters);
  p.threads = threads < 1 ? 1 : threads;
  return p;
}
void check_cluster(const ClusterParams& p) {
  require_sizes({p.N, p.d, p.K});
  if (!(p.alpha > 0)) throw std::invalid_argument("alpha must be positive");
  require(p.z && p.centers, "z and centers");
  const bool with_given = p.task == ClusterTask::kAssignBackward || p.task == ClusterTask::kTargetLoss;
  const bool with_loss = p.task == ClusterTask::kTargetLoss || p.task == ClusterTask::kFrequencyLoss;
  require(!with_given || p.given, "given");
  require(p.task != ClusterTask::kFrequencyLoss || p.freq, "freq");
  require(!with_loss || p.loss, "loss");
  require(p.task != ClusterTask::kAssign || (p.q && !p.dz && !p.dcenters), "q alone");
}

NearestParams nearest_params(int storage, std::int64_t N, std::int64_t d, std::int64_t K, Address z, Address centers,
                             Address labels, Address distance, int threads) {
  return {
      storage_of(storage),      N, d, K, pointer(z), pointer(centers), pointer<std::int64_t>(labels), pointer(distance),
      threads < 1 ? 1 : threads};
}
void check_nearest(const NearestParams& p) {
  require_sizes({p.N, p.d, p.K});
  require(p.z && p.centers && p.labels && p.distance, "z, centers, labels and distance");
}

TargetParams target_params(int storage, std::int64_t N, std::int64_t K, Address q, Address freq, Address p,
                           int threads) {
  return {storage_of(storage), N, K, pointer(q), pointer(freq), pointer(p), threads < 1 ? 1 : threads};
}
void check_target(const TargetParams& p) {
  require_sizes({p.N, p.K});
  require(p.q && p.p, "q and p");
}

// A Python function that takes what `make` takes, checks the params it gives, and runs the kernel without the GIL.
template <auto kKernel, typename Params, typename... Arguments>
auto bind(Params (*make)(Arguments...), void (*check)(const Params&)) {
  return [make, check](Arguments... arguments) {
    const Params p = make(arguments...);
    check(p);
    const py::gil_scoped_release release;
    (current_kernels().*kKernel)(p);
  };
}

PeakParams peak_params(int storage, Address data, std::int64_t bytes, std::int64_t repeats, int threads) {
  if (storage != static_cast<int>(Storage::kFloat32) && storage != static_cast<int>(Storage::kFloat64))
    throw std::invalid_argument("multiply-adds are measured in float32 and float64");
  if (bytes < 0 || (bytes > 0 && !data) || repeats < 1 || threads < 1)
    throw std::invalid_argument("bytes, repeats or threads out of range");
  return {static_cast<Storage>(storage), pointer(data), bytes, repeats, threads};
}

template <auto kLoop>
double run_peak(int storage, Address data, std::int64_t bytes, std::int64_t repeats, int threads) {
  const PeakParams p = peak_params(storage, data, bytes, repeats, threads);
  const py::gil_scoped_release release;
  return (current_kernels().*kLoop)(p);
}

// weights: (w_ih, w_hh, b_ih, b_hh, w_hr) of each layer, 0 for those that are not there.
std::unique_ptr<PackedStep> pack_step(int storage, bool lstm, int activation, std::int64_t I, std::int64_t H,
                                      std::int64_t P, const std::vector<std::array<Address, 5>>& weights) {
  if (activation < 0 || activation > static_cast<int>(Activation::kLogistic))
    throw std::invalid_argument("unknown activation");
  require_sizes({static_cast<std::int64_t>(weights.size()), I, H, P});
  const bool projected = !weights.empty() && weights[0][4] != 0;
  if (!projected && P != H) throw std::invalid_argument("without w_hr, P must be H");
  if (projected && !lstm) throw std::invalid_argument("an Elman layer has no projection");
  std::vector<StepWeights> layers;
  for (const auto& w : weights) {
    require(w[0] && w[1] && (w[4] != 0) == projected, "w_ih, w_hh, and w_hr in every layer or in none,");
    layers.push_back({pointer(w[0]), pointer(w[1]), pointer(w[2]), pointer(w[3]), pointer(w[4])});
  }
  const StepShape shape{storage_of(storage),
                        lstm,
                        static_cast<Activation>(activation),
                        static_cast<std::int64_t>(layers.size()),
                        I,
                        H,
                        P,
                        projected};
  const py::gil_scoped_release release;
  return std::make_unique<PackedStep>(shape, layers);
}

bool run_step(const PackedStep& step, std::int64_t B, Address x, Address h, Address c, Address y, Address h_n,
              Address c_n, int threads) {
  StepParams p{};
  p.B = B;
  p.x = pointer(x), p.h = pointer(h), p.c = pointer(c);
  p.y = pointer(y), p.h_n = pointer(h_n), p.c_n = pointer(c_n);
  p.threads = threads < 1 ? 1 : threads;
  require_sizes({B});
  require(x && h && y && h_n && (!step.shape().lstm || (c && c_n)), "x, h, y, h_n, and an LSTM's c and c_n");
  const py::gil_scoped_release release;
  return step.run(p);
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const KernelTable* table : runnable_kernels()) found.emplace_back(table->name);
  return found;
}

}  // namespace
}  // namespace fastseq

PYBIND11_MODULE(_cpu, m) {
  using namespace fastseq;
  m.doc() = "C++ CPU kernels of fastseq. Call them through fastseq.functional, which checks what these do not.";
  m.def("isa", [] { return std::string(current_kernels().name); });
  m.def("isas", &names);
  m.def("use_isa", &use_kernels);
#if defined(__x86_64__)
  m.def("split_rows", &split_rows);
  m.def("set_split_rows", &set_split_rows);
#endif
  m.def("openmp_threads", &omp_get_max_threads);
  py::class_<Workspace>(m, "Block", py::buffer_protocol(),
                        "Memory from the pool, back to it when nothing refers to it.")
      .def(py::init<std::size_t>())
      .def_buffer([](Workspace& block) {
        return py::buffer_info(block.data(), static_cast<py::ssize_t>(block.size()), /*readonly=*/false);
      });
  m.def("idle_bytes", &idle_bytes);
  m.def("release_idle", &release_idle);
  m.def("advise_huge_pages", [](Address address, std::size_t bytes) { advise_huge_pages(pointer(address), bytes); });
  py::class_<LayerOptions> options(m, "Options", "What a recurrence is asked for beyond the plain layer.");
  options.def(py::init([] { return LayerOptions{}; }));
  option<&LayerOptions::h_reset>(options, "h_reset");
  option<&LayerOptions::c_reset>(options, "c_reset");
  option<&LayerOptions::h_reset_per_step, bool>(options, "h_reset_per_step");
  option<&LayerOptions::c_reset_per_step, bool>(options, "c_reset_per_step");
  option<&LayerOptions::h_mask>(options, "h_mask");
  option<&LayerOptions::zoneout_h>(options, "zoneout_h");
  option<&LayerOptions::zoneout_c>(options, "zoneout_c");
  option<&LayerOptions::zoneout_h_rate, double>(options, "zoneout_h_rate");
  option<&LayerOptions::zoneout_c_rate, double>(options, "zoneout_c_rate");
  option<&LayerOptions::peephole>(options, "peephole");
  option<&LayerOptions::cell_clip, double>(options, "cell_clip");
  option<&LayerOptions::grad_clip, double>(options, "grad_clip");
  option<&LayerOptions::grad_c>(options, "grad_c");
  option<&LayerOptions::grad_gates>(options, "grad_gates");
  option<&LayerOptions::recompute, bool>(options, "recompute");
  option<&LayerOptions::b_ih>(options, "b_ih");
  option<&LayerOptions::b_hh>(options, "b_hh");
  option<&LayerOptions::dh_reset>(options, "dh_reset");
  option<&LayerOptions::dc_reset>(options, "dc_reset");
  option<&LayerOptions::dh_mask>(options, "dh_mask");
  option<&LayerOptions::dpeephole>(options, "dpeephole");
  option<&LayerOptions::weight_ln_ih>(options, "weight_ln_ih");
  option<&LayerOptions::weight_ln_hh>(options, "weight_ln_hh");
  option<&LayerOptions::weight_ln_gates>(options, "weight_ln_gates");
  option<&LayerOptions::bias_ln_gates>(options, "bias_ln_gates");
  option<&LayerOptions::weight_ln_c>(options, "weight_ln_c");
  option<&LayerOptions::bias_ln_c>(options, "bias_ln_c");
  option<&LayerOptions::dweight_ln_ih>(options, "dweight_ln_ih");
  option<&LayerOptions::dweight_ln_hh>(options, "dweight_ln_hh");
  option<&LayerOptions::dweight_ln_gates>(options, "dweight_ln_gates");
  option<&LayerOptions::dbias_ln_gates>(options, "dbias_ln_gates");
  option<&LayerOptions::dweight_ln_c>(options, "dweight_ln_c");
  option<&LayerOptions::dbias_ln_c>(options, "dbias_ln_c");
  m.def("lstm_forward", bind<&KernelTable::lstm_forward>(&forward_params, &check_lstm_forward));
  m.def("lstm_backward", bind<&KernelTable::lstm_backward>(&backward_params, &check_lstm_backward));
  m.def("rnn_forward", bind<&KernelTable::rnn_forward>(&forward_params, &check_rnn_forward));
  m.def("rnn_backward", bind<&KernelTable::rnn_backward>(&backward_params, &check_rnn_backward));
  py::class_<PackedStep>(m, "PackedStep", "The packed weights of a stack of layers: one step of it at a time.")
      .def(py::init(&pack_step))
      .def("run", &run_step);
  m.def("fma_loop", &run_peak<&KernelTable::fma_loop>);
  m.def("read_loop", &run_peak<&KernelTable::read_loop>);
  m.def("cluster", bind<&KernelTable::cluster>(&cluster_params, &check_cluster));
  m.def("nearest", bind<&KernelTable::nearest>(&nearest_params, &check_nearest));
  m.def("target", bind<&KernelTable::target>(&target_params, &check_target));
}
