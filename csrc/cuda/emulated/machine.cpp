// The emulator: fibers, barriers as counters that fibers wait for, and what a schedule decides.
#include "cuda/emulated/machine.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/facts.h"

namespace fastseq::cuda {
namespace {

using machine::Operands;
using machine::Words4;

constexpr std::size_t kStack = 64 * 1024;

struct Barrier {
  int expected = 0;
  int arrived = 0;
  std::uint64_t passed = 0;  // how often it has opened

  // The count of `passed` that opens it for who has arrived now.
  std::uint64_t arrive() {
    const std::uint64_t target = passed + 1;
    if (++arrived == expected) arrived = 0, ++passed;
    return target;
  }
};

struct Copy {
  void* to;
  const void* from;
  std::uint32_t bytes;
};

struct CopyBarrier {
  std::uint64_t passed = 0;
  bool arrived = false;
  bool wanted = false;       // somebody waits: what is late comes now
  std::int64_t missing = 0;  // bytes
  std::vector<Copy> waiting;

  void open_if_complete() {
    if (arrived && missing == 0) arrived = wanted = false, ++passed;
  }
  void finish() {
    for (const Copy& copy : waiting) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      missing -= copy.bytes;
    }
    waiting.clear();
    open_if_complete();
  }
};

// Two sets of what lanes have given, since a lane may be one exchange ahead of the others.
struct Warp {
  Barrier barrier;
  Operands given[2][kLanes];
  const void* rows[2][kLanes];
};

struct RemoteStore {
  void* to;
  unsigned char bytes[16];
  std::size_t count;
};

void finish(std::vector<RemoteStore>& stores) {
  for (const RemoteStore& store : stores) std::memcpy(store.to, store.bytes, store.count);
  stores.clear();
}

struct Block {
  std::vector<Words4> shared;
  std::vector<RemoteStore> unpublished;
  Barrier barrier;
  std::vector<Barrier> pairs;
  std::vector<Warp> warps;
  std::map<const void*, CopyBarrier> copies;

  unsigned char* memory() { return reinterpret_cast<unsigned char*>(shared.data()); }
};

struct Fiber {
  ucontext_t context;
  int thread = 0, rank = 0;
  bool done = false;
  const std::uint64_t* counter = nullptr;  // what it waits for, if anything
  std::uint64_t target = 0;
  const std::uint32_t* signal = nullptr;  // or this
  std::uint32_t signal_target = 0;
  std::uint64_t cluster_target = 0;
  bool cluster_arrived = false;
  std::uint64_t exchanges = 0;
  std::vector<RemoteStore> stores;

  bool waits() const {
    return (counter != nullptr && *counter < target) || (signal != nullptr && *signal < signal_target);
  }
};

struct Cluster {
  int index = 0, total_blocks = 0, threads = 0;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  ucontext_t scheduler;
  std::exception_ptr failure;
};

std::uint64_t g_schedule = 0;
std::mt19937_64 g_random;
emulated::Launcher g_launcher;
Cluster* g_cluster = nullptr;
Fiber* g_fiber = nullptr;
const std::function<void()>* g_kernel = nullptr;

Block& own_block() { return g_cluster->blocks[static_cast<std::size_t>(g_fiber->rank)]; }
Warp& own_warp() { return own_block().warps[static_cast<std::size_t>(g_fiber->thread / kLanes)]; }

bool late() { return g_schedule == 1 || g_schedule == 3 || (g_schedule > 3 && g_random() % 2 == 0); }

void require(bool right, const char* what) {
  if (!right) throw std::logic_error(std::string("emulated GPU: ") + what);
}

// Gives the CPU to the other threads until the fiber no longer waits.
void rest() {
  swapcontext(&g_fiber->context, &g_cluster->scheduler);
  if (g_cluster->failure) std::abort();  // never resumed after a failure
}

void wait_for(const std::uint64_t& counter, std::uint64_t target) {
  if (counter >= target) return;
  g_fiber->counter = &counter;
  g_fiber->target = target;
  rest();
}

// Gives an operand to the warp and returns which of its two sets has everybody's.
int exchange(const Operands* operands, const void* row) {
  Warp& warp = own_warp();
  const int set = static_cast<int>(g_fiber->exchanges++ % 2), lane = g_fiber->thread % kLanes;
  if (operands) warp.given[set][lane] = *operands;
  warp.rows[set][lane] = row;
  const std::uint64_t target = warp.barrier.arrive();
  wait_for(warp.barrier.passed, target);
  return set;
}

void enter() {
  try {
    (*g_kernel)();
    require(g_fiber->stores.empty(), "remote stores after the last arrival at the cluster's barrier");
    require(!g_fiber->cluster_arrived, "an arrival at the cluster's barrier that no wait follows");
  } catch (...) {
    if (!g_cluster->failure) g_cluster->failure = std::current_exception();
  }
  g_fiber->done = true;
  swapcontext(&g_fiber->context, &g_cluster->scheduler);
}

// Lets those of some threads that need not wait go on until they have to, and tells whether there was one.
bool let_run(Cluster& cluster, std::vector<Fiber*>& fibers) {
  bool moved = false;
  for (Fiber* fiber : fibers) {
    if (fiber->waits()) continue;
    moved = true;
    fiber->counter = nullptr, fiber->signal = nullptr;
    g_fiber = fiber;
    swapcontext(&cluster.scheduler, &fiber->context);
    if (cluster.failure) std::rethrow_exception(cluster.failure);
  }
  fibers.erase(std::remove_if(fibers.begin(), fibers.end(), [](Fiber* f) { return f->done; }), fibers.end());
  return moved;
}

void run_cluster(Cluster& cluster) {
  const bool ahead = g_schedule == 2 || g_schedule == 3;
  std::vector<std::vector<Fiber*>> warps(1);  // all threads as one, unless warps are to run ahead
  for (Fiber& fiber : cluster.fibers) {
    if (ahead && warps.back().size() == kLanes) warps.emplace_back();
    warps.back().push_back(&fiber);
  }
  if (g_schedule == 1) std::reverse(warps[0].begin(), warps[0].end());
  if (g_schedule == 3) std::reverse(warps.begin(), warps.end());
  while (!warps.empty()) {
    if (g_schedule > 3) std::shuffle(warps[0].begin(), warps[0].end(), g_random);
    const bool moved =
        std::any_of(warps.begin(), warps.end(), [&](std::vector<Fiber*>& warp) { return let_run(cluster, warp); });
    require(moved, "every thread waits: a deadlock");
    warps.erase(std::remove_if(warps.begin(), warps.end(), [](const auto& warp) { return warp.empty(); }), warps.end());
  }
}

struct Stacks {
  std::size_t bytes;
  unsigned char* memory;

  explicit Stacks(std::size_t count)
      : bytes(count * kStack),
        memory(static_cast<unsigned char*>(
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (memory == MAP_FAILED) throw std::bad_alloc();
  }
  ~Stacks() { munmap(memory, bytes); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
};

}  // namespace

namespace emulated {

void set_schedule(std::uint64_t schedule) {
  g_schedule = schedule;
  g_random.seed(schedule);
}

void set_launcher(Launcher launcher) { g_launcher = std::move(launcher); }

bool launched_elsewhere(const void* kernel, const std::array<int, 3>& sizes, std::size_t shared_bytes, bool cooperative,
                        const void* params, std::size_t params_bytes) {
  if (!g_launcher) return false;
  Dl_info module{};
  require(dladdr(kernel, &module) != 0, "a kernel is in no module");
  const auto place = reinterpret_cast<std::uintptr_t>(kernel) - reinterpret_cast<std::uintptr_t>(module.dli_fbase);
  g_launcher(place, sizes, shared_bytes, cooperative, {static_cast<const char*>(params), params_bytes});
  return true;
}

void run(int blocks, int cluster, int threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
  require(blocks % cluster == 0, "the blocks make no whole number of clusters");
  const Stacks stacks(static_cast<std::size_t>(cluster) * static_cast<std::size_t>(threads));
  for (int index = 0; index < blocks / cluster; ++index) {
    Cluster c;
    c.index = index, c.total_blocks = blocks, c.threads = threads;
    c.barrier.expected = cluster * threads;
    c.blocks.resize(static_cast<std::size_t>(cluster));
    for (Block& block : c.blocks) {
      block.shared.resize((shared_bytes + 15) / 16, Words4{~0u, ~0u, ~0u, ~0u});
      block.barrier.expected = threads;
      block.pairs.resize(static_cast<std::size_t>(threads / (kParts * kLanes)));
      for (Barrier& pair : block.pairs) pair.expected = kParts * kLanes;
      block.warps.resize(static_cast<std::size_t>(ceil_div(threads, kLanes)));
      for (Warp& warp : block.warps) warp.barrier.expected = kLanes;
    }
    c.fibers = std::vector<Fiber>(static_cast<std::size_t>(cluster) * static_cast<std::size_t>(threads));
    g_cluster = &c, g_kernel = &kernel;
    for (std::size_t i = 0; i < c.fibers.size(); ++i) {
      Fiber& fiber = c.fibers[i];
      fiber.thread = static_cast<int>(i) % threads, fiber.rank = static_cast<int>(i) / threads;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks.memory + i * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &enter, 0);
    }
    run_cluster(c);
    for (Block& block : c.blocks) finish(block.unpublished);
  }
}

}  // namespace emulated

namespace machine {

int thread() { return g_fiber->thread; }
int lane() { return g_fiber->thread % kLanes; }
int cluster_rank() { return g_fiber->rank; }
int block() { return g_cluster->index * static_cast<int>(g_cluster->blocks.size()) + g_fiber->rank; }
int blocks() { return g_cluster->total_blocks; }
int block_threads() { return g_cluster->threads; }
unsigned char* shared_memory() { return own_block().memory(); }

void block_barrier() {
  Barrier& barrier = own_block().barrier;
  const std::uint64_t target = barrier.arrive();
  wait_for(barrier.passed, target);
}

void pair_barrier(int pair) {
  Barrier& barrier = own_block().pairs.at(static_cast<std::size_t>(pair));
  require(g_fiber->thread / (kParts * kLanes) == pair, "a barrier of another pair of warps");
  const std::uint64_t target = barrier.arrive();
  wait_for(barrier.passed, target);
}

void cluster_arrive() {
  require(!g_fiber->cluster_arrived, "two arrivals at the cluster's barrier without a wait");
  finish(g_fiber->stores);
  g_fiber->cluster_target = g_cluster->barrier.arrive();
  g_fiber->cluster_arrived = true;
}

void cluster_wait() {
  require(g_fiber->cluster_arrived, "a wait at the cluster's barrier without an arrival");
  wait_for(g_cluster->barrier.passed, g_fiber->cluster_target);
  g_fiber->cluster_arrived = false;
}

const Operands* exchange_operands(const Operands& mine) {
  const int set = exchange(&mine, nullptr);
  return own_warp().given[set];
}

std::uint32_t shuffle(std::uint32_t word, int lane) {
  Operands mine{};
  mine.right[0] = word;
  return exchange_operands(mine)[lane].right[0];
}

std::uint32_t shuffle_xor(std::uint32_t word, int mask) { return shuffle(word, lane() ^ mask); }

Words4 load_matrices(const void* row) {
  const int set = exchange(nullptr, row), mine = lane();
  std::uint32_t words[4];
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* from = static_cast<const unsigned char*>(own_warp().rows[set][8 * matrix + mine / 4]);
    require(reinterpret_cast<std::uintptr_t>(from) % 16 == 0, "a matrix row that is not aligned");
    std::memcpy(&words[matrix], from + 4 * (mine % 4), 4);
  }
  return {words[0], words[1], words[2], words[3]};
}

namespace {

template <typename Value>
void remote(void* mine, int rank, const Value& v) {
  const auto offset = static_cast<std::size_t>(static_cast<unsigned char*>(mine) - own_block().memory());
  Block& other = g_cluster->blocks.at(static_cast<std::size_t>(rank));
  require(offset % sizeof(v) == 0, "a remote store that is not aligned");
  require(offset + sizeof(v) <= other.shared.size() * 16, "a remote store past the end of shared memory");
  RemoteStore store{other.memory() + offset, {}, sizeof(v)};
  std::memcpy(store.bytes, &v, sizeof(v));
  if (late())
    g_fiber->stores.push_back(store);
  else
    std::memcpy(store.to, store.bytes, store.count);
}

CopyBarrier& copy_barrier(std::uint64_t* barrier) {
  const auto found = own_block().copies.find(barrier);
  require(found != own_block().copies.end(), "a copy barrier that was not initialised");
  return found->second;
}

}  // namespace

void store_remote(void* mine, int rank, const Words4& v) { remote(mine, rank, v); }
void store_remote(void* mine, int rank, const Floats2& v) { remote(mine, rank, v); }

void store_bytes_published(void* to, const void* bytes, std::size_t count) {
  RemoteStore store{to, {}, count};
  std::memcpy(store.bytes, bytes, count);
  std::vector<RemoteStore>& unpublished = own_block().unpublished;
  unpublished.push_back(store);
  if (!late()) finish(unpublished);
}

void publish(std::uint32_t* signal, std::uint32_t value) {
  require(*signal < value, "a signal that does not rise");
  finish(own_block().unpublished);
  *signal = value;
}

void await(const std::uint32_t* signal, std::uint32_t value) {
  if (*signal >= value) return;
  g_fiber->signal = signal;
  g_fiber->signal_target = value;
  rest();
}

void copy_barrier_init(std::uint64_t* barrier) { own_block().copies[barrier] = CopyBarrier{}; }

void copy_barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  CopyBarrier& b = copy_barrier(barrier);
  require(!b.arrived, "a second arrival at a copy barrier in one phase");
  b.arrived = true;
  b.missing += bytes;
  b.open_if_complete();
}

void copy_barrier_wait(std::uint64_t* barrier, int parity) {
  CopyBarrier& b = copy_barrier(barrier);
  if (static_cast<int>(b.passed % 2) != parity) return;
  const std::uint64_t target = b.passed + 1;
  b.wanted = true;
  b.finish();
  wait_for(b.passed, target);
}

void bulk_copy(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier) {
  const auto in_shared = static_cast<std::size_t>(static_cast<unsigned char*>(to) - shared_memory());
  require(reinterpret_cast<std::uintptr_t>(from) % 16 == 0 && in_shared % 16 == 0 && bytes % 16 == 0 && bytes > 0,
          "a bulk copy that is not aligned");
  require(in_shared + bytes <= own_block().shared.size() * 16, "a bulk copy past the end of shared memory");
  CopyBarrier& b = copy_barrier(barrier);
  b.waiting.push_back({to, from, bytes});
  if (b.wanted || !late()) b.finish();
}

}  // namespace machine
}  // namespace fastseq::cuda
