#include "workspace.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace fastseq {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

char* align_up(char* address) {
  const auto number = reinterpret_cast<std::uintptr_t>(address);
  return address + ((number + kHugePage - 1) / kHugePage * kHugePage - number);
}

struct Block {
  char* data;
  std::size_t size;
};

Block map(std::size_t size) {
  void* found = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(found);
  char* data = align_up(begin);
  if (data != begin) munmap(begin, static_cast<std::size_t>(data - begin));
  const auto behind = static_cast<std::size_t>(begin + kHugePage - data);
  if (behind != 0) munmap(data + size, behind);
  advise_huge_pages(data, size);
  return {data, size};
}

class Pool {
 public:
  Pool() : limit_(limit()) {}

  Block take(std::size_t bytes) {
    const std::size_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      std::size_t best = idle_.size();
      for (std::size_t i = 0; i < idle_.size(); ++i) {
        const bool fits = idle_[i].size >= wanted && idle_[i].size <= 2 * wanted;
        if (fits && (best == idle_.size() || idle_[i].size <= idle_[best].size)) best = i;  // of equals the youngest
      }
      if (best != idle_.size()) {
        const Block block = idle_[best];
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
        idle_bytes_ -= block.size;
        return block;
      }
    }
    try {
      return map(wanted);
    } catch (const std::bad_alloc&) {
      shrink(0);
      return map(wanted);
    }
  }
  void give(const Block& block) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      idle_.push_back(block);
      idle_bytes_ += block.size;
    }
    shrink(limit_);
  }
  // Gives the blocks that were idle longest back to the operating system.
  void shrink(std::size_t limit) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::size_t count = 0;
    for (; idle_bytes_ > limit; ++count) {
      munmap(idle_[count].data, idle_[count].size);
      idle_bytes_ -= idle_[count].size;
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(count));
  }
  std::size_t idle() {
    const std::lock_guard<std::mutex> lock(mutex);
    return idle_bytes_;
  }

  std::mutex mutex;

 private:
  // A sixteenth of the machine's memory.
  static std::size_t limit() {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? static_cast<std::size_t>(pages) / 16 * static_cast<std::size_t>(page)
                                 : std::size_t{256} << 20;
  }

  std::vector<Block> idle_;  // oldest first
  std::size_t idle_bytes_ = 0;
  const std::size_t limit_;
};

// Never destroyed, since tensors may outlive everything else at exit.
Pool& pool() {
  static Pool* only = [] {
    static Pool* made = new Pool;
    // A child must not inherit a mutex that another thread of its parent held.
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
    return made;
  }();
  return *only;
}

}  // namespace

Workspace::Workspace(std::size_t bytes) {
  const Block block = pool().take(bytes == 0 ? 1 : bytes);
  data_ = block.data;
  size_ = block.size;
}

Workspace::~Workspace() { pool().give({data_, size_}); }

std::size_t idle_bytes() { return pool().idle(); }

void release_idle() { pool().shrink(0); }

void advise_huge_pages(void* data, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  char* begin = align_up(static_cast<char*>(data));
  char* end = static_cast<char*>(data) + bytes;
  if (begin + kHugePage <= end)
    madvise(begin, static_cast<std::size_t>(end - begin) / kHugePage * kHugePage, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace fastseq
