#include "packed_step.h"

#include <cstring>

#include "select.h"

namespace fastseq {
namespace {

constexpr int64_t kSampled = 64;  // numbers of each weight

int64_t size_of(Storage storage) { return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2; }

}  // namespace

PackedStep::PackedStep(const StepShape& shape, const std::vector<StepWeights>& layers)
    : shape_(shape), kernels_(&current_kernels()), packed_(static_cast<std::size_t>(kernels_->step_bytes(shape))) {
  const int64_t size = size_of(shape.storage), G = shape.lstm ? 4 : 1;
  const auto sample = [&](const void* weight, int64_t numbers) {
    if (weight == nullptr || numbers == 0) return;
    const int64_t apart = (numbers / kSampled > 1 ? numbers / kSampled : 1) | 1;
    Sample s{static_cast<const char*>(weight), (numbers + apart - 1) / apart, apart * size, size, {}};
    for (int64_t i = 0; i < s.count; ++i)
      s.values.insert(s.values.end(), s.weight + i * s.stride, s.weight + i * s.stride + size);
    samples_.push_back(s);
  };
  // Sampled before they are packed: a write that comes between the two is noticed at the next step.
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const StepWeights& w = layers[layer];
    sample(w.w_ih, G * shape.H * (layer == 0 ? shape.I : shape.P));
    sample(w.w_hh, G * shape.H * shape.P);
    sample(w.b_ih, G * shape.H);
    sample(w.b_hh, G * shape.H);
    sample(w.w_hr, shape.P * shape.H);
  }
  kernels_->step_pack(shape, layers.data(), packed_.data());
}

bool PackedStep::Sample::holds() const {
  const auto compare = [this](auto zero) {
    using Bits = decltype(zero);
    Bits differing = 0;
    for (int64_t i = 0; i < count; ++i) {
      Bits now, then;
      std::memcpy(&now, weight + i * stride, sizeof(Bits));
      std::memcpy(&then, values.data() + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
      differing |= now ^ then;
    }
    return differing == 0;
  };
  return size == 8 ? compare(uint64_t{0}) : size == 4 ? compare(uint32_t{0}) : compare(uint16_t{0});
}

bool PackedStep::run(StepParams params) const {
  if (kernels_ != &current_kernels()) return false;
  for (const Sample& sample : samples_)
    if (!sample.holds()) return false;
  params.shape = shape_;
  params.packed = packed_.data();
  params.backwards = backwards_.load(std::memory_order_relaxed);
  backwards_.store(!params.backwards, std::memory_order_relaxed);
  kernels_->step(params);
  return true;
}

}  // namespace fastseq
