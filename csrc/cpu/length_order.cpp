#include "length_order.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "workspace.h"

namespace fastseq {
namespace {

// To copy one number of x or y costs as much as so many multiply-adds of the kernels.
constexpr int64_t kCopyCost = 64;
// Copies of fewer bytes are left to one thread.
constexpr int64_t kSerialBytes = int64_t{128} << 10;
constexpr int64_t kLineBytes = 64;

int64_t bytes_of(Storage storage) { return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2; }

// How the kernels cut the batch: RowTiles and RowBlocks.
struct Tiles {
  int64_t rows, most;
  int64_t count() const { return (rows + most - 1) / most; }
  int64_t first(int64_t tile) const { return rows * tile / count(); }
};

// A batch so large is not ordered: a float32 tape must hold the distance between two rows exactly.
constexpr int64_t kMostRows = int64_t{1} << 24;

// Behind the gates of row i of the tape's first step stands how far the caller's row is from row i. So a part of a tape
// or a row of copies, as vmap makes them, still tells the truth.
template <typename Tape>
struct Distances {
  Tape* first;
  int64_t stride;
  Distances(Tape* gates, int64_t H, int64_t count)
      : first(gates + count * tape_width(H)), stride(gates_width(H, count)) {}
  Tape& operator[](int64_t row) const { return first[row * stride]; }
};

// The caller's rows in the order of the kernel, or nothing where they are in their own order.
class LengthOrder {
 public:
  LengthOrder(const ForwardParams& p, int64_t gates, BatchCut cut)
      : flags_(p.flags), B_(p.B), length_(static_cast<size_t>(B_), 0) {
    const Tiles tiles{B_, cut.most};
    // Two threads with a tile each wait for the one whose sequences are longer.
    if (!p.any_order || tiles.count() < (cut.shared ? 2 : 3) || B_ > kMostRows) return;
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t b = 0; b < B_; ++b) length_[b] += is_padding(t, b) ? 0 : 1;
    std::vector<int64_t> longest_first(static_cast<size_t>(B_));
    std::iota(longest_first.begin(), longest_first.end(), 0);
    const int64_t before = steps(tiles, longest_first);
    std::stable_sort(longest_first.begin(), longest_first.end(),
                     [this](int64_t a, int64_t b) { return length_[a] > length_[b]; });
    const std::vector<int64_t> dealt = deal(tiles, longest_first);
    const int64_t valid = std::accumulate(length_.begin(), length_.end(), int64_t{0});
    if ((before - steps(tiles, dealt)) * gates * p.H > kCopyCost * valid) row_ = dealt;
  }
  // The order that the tape says it has.
  LengthOrder(const BackwardParams& p, int64_t gates) : flags_(p.flags), B_(p.B) {
    p.storage == Storage::kFloat64 ? read(Distances(static_cast<const double*>(p.gates), p.H, gates))
                                   : read(Distances(static_cast<const float*>(p.gates), p.H, gates));
  }

  explicit operator bool() const { return !row_.empty(); }
  int64_t row(int64_t place) const { return row_[place]; }
  bool is_padding(int64_t t, int64_t b) const { return flags_[t * B_ + b] & kFlagPadding; }

  void write(const ForwardParams& p, int64_t gates) const {
    if (p.gates == nullptr) return;
    p.storage == Storage::kFloat64 ? write(Distances(static_cast<double*>(p.gates), p.H, gates))
                                   : write(Distances(static_cast<float*>(p.gates), p.H, gates));
  }

 private:
  // Steps of single rows that the kernel takes in this order.
  int64_t steps(const Tiles& tiles, const std::vector<int64_t>& order) const {
    int64_t sum = 0;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      int64_t longest = 0;
      for (int64_t i = tiles.first(tile); i < tiles.first(tile + 1); ++i)
        longest = std::max(longest, length_[order[i]]);
      sum += longest * (tiles.first(tile + 1) - tiles.first(tile));
    }
    return sum;
  }
  // A tile of long sequences and one of short ones by turns, since threads share the tiles by halves, quarters and so
  // on. It does not depend on their number, nor may it: the order of sums follows from it.
  std::vector<int64_t> deal(const Tiles& tiles, const std::vector<int64_t>& longest_first) const {
    std::vector<int64_t> dealt(longest_first.size());
    const int64_t count = tiles.count();
    auto next = longest_first.begin();
    for (int64_t rank = 0; rank < count; ++rank) {
      const int64_t tile = 2 * rank < count ? 2 * rank : 2 * (count - 1 - rank) + 1;
      for (int64_t i = tiles.first(tile); i < tiles.first(tile + 1); ++i) dealt[i] = *next++;
    }
    return dealt;
  }

  template <typename Real>
  void write(const Distances<Real>& distances) const {
    for (int64_t i = 0; i < B_; ++i) distances[i] = static_cast<Real>(row_.empty() ? 0 : row_[i] - i);
  }
  template <typename Real>
  void read(const Distances<Real>& distances) {
    int64_t i = 0;
    while (i < B_ && distances[i] == 0) ++i;
    if (i == B_) return;
    row_.resize(static_cast<size_t>(B_));
    std::vector<bool> seen(static_cast<size_t>(B_), false);
    for (i = 0; i < B_; ++i) {
      const double row = static_cast<double>(distances[i]) + static_cast<double>(i);
      if (!(row >= 0 && row < static_cast<double>(B_)) || seen[row_[i] = static_cast<int64_t>(row)])
        throw std::invalid_argument("the tape is not one that a forward of this layer left");
      seen[row_[i]] = true;
    }
  }

  const uint8_t* flags_;
  int64_t B_;
  std::vector<int64_t> length_, row_;
};

// The arrays of one call that stand in the order of the batch, and their copies in the kernel's order.
class Copies {
 public:
  Copies(const LengthOrder& order, Storage storage, int64_t T, int64_t B, int threads)
      : order_(order), item_bytes_(bytes_of(storage)), T_(T), B_(B), threads_(threads) {}

  // [T, B, width], read or written by the kernel; null stays null. place() sets `pointer` to the copy.
  void read(const void*& pointer, int64_t width, int64_t& stride_t, int64_t& stride_b) {
    add({&pointer, pointer, false, T_, width * item_bytes_, stride_t * item_bytes_, stride_b * item_bytes_});
    stride_t = B_ * width, stride_b = width;
  }
  void read(const void*& pointer, int64_t width) { add(dense(&pointer, false, T_, width)); }
  void write(void*& pointer, int64_t width) { add(dense(const_cast<const void**>(&pointer), true, T_, width)); }
  // [B, width]
  void read_row(const void*& pointer, int64_t width) { add(dense(&pointer, false, 1, width)); }
  void write_row(void*& pointer, int64_t width) { add(dense(const_cast<const void**>(&pointer), true, 1, width)); }
  void read_flags(const uint8_t*& flags) {
    flags_at_ = bytes_;
    bytes_ += round_up(T_ * B_);
    flags_ = &flags;
  }

  int64_t bytes() const { return bytes_; }
  void place(char* base) {
    for (Array& array : arrays_) *array.pointer = array.copy = base + array.offset;
    uint8_t* flags = reinterpret_cast<uint8_t*>(base + flags_at_);
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t i = 0; i < B_; ++i) flags[t * B_ + i] = (*flags_)[t * B_ + order_.row(i)];
    *flags_ = flags;
  }
  void take_in() const { run(true); }
  void hand_back() const { run(false); }

 private:
  struct Array {
    const void** pointer;                  // what the kernel is told
    const void* callers;                   // the caller's array
    bool written;                          // by the kernel, or else read
    int64_t T, bytes, stride_t, stride_b;  // of the caller's array: steps, and bytes of a row and between rows
    int64_t offset = 0;
    char* copy = nullptr;
  };
  static int64_t round_up(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }
  Array dense(const void** pointer, bool written, int64_t T, int64_t width) const {
    const int64_t bytes = width * item_bytes_;
    return {pointer, *pointer, written, T, bytes, B_ * bytes, bytes};
  }
  void add(Array array) {
    if (array.callers == nullptr || array.bytes == 0) return;
    array.offset = bytes_;
    bytes_ += round_up(array.T * B_ * array.bytes);
    arrays_.push_back(array);
  }

  struct Pass {
    const Copies* copies;
    bool in;
  };
  void run(bool in) const {
    int64_t bytes = 0;
    for (const Array& array : arrays_)
      if (array.written != in) bytes += array.T * B_ * array.bytes;
    Pass pass{this, in};
    const ParallelBody body = [](void* context, int thread, int threads) {
      const Pass& pass = *static_cast<Pass*>(context);
      for (const Array& array : pass.copies->arrays_)
        if (array.written != pass.in) pass.copies->copy(array, thread, threads);
    };
    run_parallel(bytes < kSerialBytes ? 1 : threads_, body, &pass);
  }
  // This thread's share of the steps. What lies past the end of a sequence is zero on both sides.
  void copy(const Array& array, int thread, int threads) const {
    const auto bytes = static_cast<size_t>(array.bytes);
    for (int64_t t = array.T * thread / threads; t < array.T * (thread + 1) / threads; ++t)
      for (int64_t i = 0; i < B_; ++i) {
        const int64_t b = order_.row(i), there = t * array.stride_t + b * array.stride_b;
        char* copy = array.copy + (t * B_ + i) * array.bytes;
        char* callers = static_cast<char*>(const_cast<void*>(array.callers)) + there;
        char* to = array.written ? callers : copy;
        const char* from = array.written ? copy : callers;
        if (array.T > 1 && order_.is_padding(t, b))
          std::memset(to, 0, bytes);
        else
          std::memcpy(to, from, bytes);
      }
  }

  const LengthOrder& order_;
  int64_t item_bytes_, T_, B_;
  int threads_;
  std::vector<Array> arrays_;
  int64_t bytes_ = 0, flags_at_ = 0;
  const uint8_t** flags_ = nullptr;
};

// What forward and backward both read.
template <typename Params>
void read_inputs(Copies& copies, Params& ordered) {
  copies.read(ordered.x, ordered.I, ordered.x_stride_t, ordered.x_stride_b);
  copies.read_flags(ordered.flags);
  copies.read_row(ordered.h0, ordered.P);
  copies.read_row(ordered.c0, ordered.H);
}

template <typename Params>
void run_with(Copies& copies, const Params& p, void (*kernel)(const Params&)) {
  const Workspace workspace(static_cast<size_t>(copies.bytes()));
  copies.place(workspace.data());
  copies.take_in();
  kernel(p);
  copies.hand_back();
}

void run_in(const LengthOrder& order, const ForwardParams& p, ForwardFn kernel) {
  ForwardParams ordered = p;
  Copies copies(order, p.storage, p.T, p.B, p.threads);
  read_inputs(copies, ordered);
  copies.write(ordered.y, p.P);
  copies.write_row(ordered.h_n, p.P);
  copies.write_row(ordered.c_n, p.H);
  run_with(copies, ordered, kernel);
}

void run_in(const LengthOrder& order, const BackwardParams& p, BackwardFn kernel) {
  BackwardParams ordered = p;
  Copies copies(order, p.storage, p.T, p.B, p.threads);
  read_inputs(copies, ordered);
  copies.read(ordered.y, p.P);
  copies.read(ordered.grad_y, p.P, ordered.grad_y_stride_t, ordered.grad_y_stride_b);
  copies.read_row(ordered.grad_h_n, p.P);
  copies.read_row(ordered.grad_c_n, p.H);
  copies.write(ordered.dx, p.I);
  copies.write_row(ordered.dh0, p.P);
  copies.write_row(ordered.dc0, p.H);
  run_with(copies, ordered, kernel);
}

}  // namespace

void run_by_length(const ForwardParams& p, int64_t gates, BatchCut cut, ForwardFn kernel) {
  const LengthOrder order(p, gates, cut);
  order ? run_in(order, p, kernel) : kernel(p);
  order.write(p, gates);
}

void run_by_length(const BackwardParams& p, int64_t gates, BatchCut, BackwardFn kernel) {
  const LengthOrder order(p, gates);
  order ? run_in(order, p, kernel) : kernel(p);
}

}  // namespace fastseq
