#include "common/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace fastattn {

int max_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

namespace detail {

void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context) {
  at::parallel_for(0, count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) { fn(context, begin, end); });
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
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) work(thread);
  });
}

}  // namespace detail
}  // namespace fastattn
