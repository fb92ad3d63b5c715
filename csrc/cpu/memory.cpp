#include "cpu/memory.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedres::cpu {
namespace {

constexpr int64_t kLeast = 1 << 20;
constexpr int64_t kHugePage = 2 << 20, kPage = 64 << 10;

struct Memory {
  void* data;
  int64_t bytes;
};

int64_t rounded_up(int64_t bytes, int64_t granule) { return (bytes + granule - 1) / granule * granule; }

// From the system; huge pages where it offers them to who asks.
Memory allocate(int64_t bytes) {
  const int64_t granule = bytes >= 4 * kHugePage ? kHugePage : kPage;
  bytes = rounded_up(bytes, granule);
  void* data = std::aligned_alloc(granule, bytes);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (granule == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

class Cache {
 public:
  Memory take(int64_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        const bool fits = it->bytes >= bytes && it->bytes - bytes <= bytes / 4;
        if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != kept_.end()) {
        const Memory memory = *best;
        kept_bytes_ -= memory.bytes;
        kept_.erase(best);
        return memory;
      }
    }
    return allocate(bytes);
  }

  // Never waits: in a child that was forked while another thread held the lock, the lock is never free again.
  void give(Memory memory) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return std::free(memory.data);
    kept_.push_front(memory);
    kept_bytes_ += memory.bytes;
    shrink();
  }

 private:
  static int64_t limit() {
    const char* mebibytes = std::getenv("FUSEDRES_CPU_CACHE_MIB");
    return (mebibytes == nullptr ? 1024 : std::atoll(mebibytes)) << 20;
  }

  // The longest unused goes first.
  void shrink() {
    while (kept_bytes_ > limit_) {
      kept_bytes_ -= kept_.back().bytes;
      std::free(kept_.back().data);
      kept_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<Memory> kept_;  // the last one given first: its lines may still be in the CPU's caches
  int64_t kept_bytes_ = 0;
  const int64_t limit_ = limit();
};

// Never destroyed: tensors may die after everything static.
Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Byte:
      return 1;
    default:
      return 2;
  }
}

Tensor recycled(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  const Memory memory = cache().take(bytes_of(sizes, element_size(dtype)));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(memory.data, sizes, strides, cpu, dtype, [memory](void*) { cache().give(memory); });
}

}  // namespace

Tensor new_activation(const Activation& a, ScalarType dtype) {
  const std::vector<int64_t> sizes{a.N, a.C, a.H, a.W};
  if (bytes_of(sizes, element_size(dtype)) >= kLeast)
    return recycled(sizes, {a.H * a.W * a.C, 1, a.W * a.C, a.C}, dtype);
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const int64_t bytes = bytes_of(sizes, element_size(dtype));
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  for (size_t i = sizes.size(); i-- > 0; numel *= sizes[i]) strides[i] = numel;
  if (bytes >= kLeast) return recycled(sizes, strides, dtype);
  return torch::stable::empty(sizes, dtype);
}

}  // namespace fusedres::cpu
