#include "common/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>

#if AT_PARALLEL_OPENMP
// What GCC makes of `#pragma omp parallel`, called by name: Clang would call libomp, a second runtime beside torch's.
// The extension is linked to no OpenMP library, so these are of the one that torch is linked to: libgomp has them, and
// libomp and libiomp do, for code that GCC compiled.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace fastattn {

int max_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

namespace detail {
namespace {

#if AT_PARALLEL_OPENMP
// at::parallel_for as torch's own code has it: what each thread of a region does.
struct Region {
  int64_t count, grain;
  RangeFn fn;
  void* context;
  std::exception_ptr error = nullptr;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;

  void run_own_range() noexcept {
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), at::divup(count, grain));
    const int64_t length = at::divup(count, threads), thread = omp_get_thread_num();
    if (thread * length >= count) return;
    try {
      const at::internal::ThreadIdGuard thread_id(static_cast<int>(thread));
      const c10::ParallelGuard in_region(true);
      fn(context, thread * length, std::min(count, (thread + 1) * length));
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
};

void run_on_threads(int64_t count, int64_t grain, RangeFn fn, void* context) {
  Region region{count, grain, fn, context};
  GOMP_parallel([](void* data) { static_cast<Region*>(data)->run_own_range(); }, &region, 0, 0);
  if (region.error) std::rethrow_exception(region.error);
}
#else
void run_on_threads(int64_t count, int64_t grain, RangeFn fn, void* context) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
}
#endif

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (count > grain && max_threads() > 1) return run_on_threads(count, grain, fn, context);
  const at::internal::ThreadIdGuard thread_id(0);
  const c10::ParallelGuard in_region(true);
  fn(context, 0, count);
}

void parallel_tasks(int64_t count, TaskFn fn, void* context) {
  const int64_t workers = std::min<int64_t>(max_threads(), count);
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t thread) {
    for (int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1)) {
      fn(context, task, static_cast<int>(thread));
    }
  };
  if (workers <= 1) {
    if (count > 0) work(0);
    return;
  }
  fastattn::parallel_ranges(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) work(thread);
  });
}

}  // namespace detail
}  // namespace fastattn
