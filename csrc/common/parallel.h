// Threads for the CPU kernels, without torch headers. They are those of at::parallel_for, whose pool and rules
// parallel.cpp shares: torch.set_num_threads holds, and a region inside another has one thread.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastattn {

// How many threads a parallel region will have; 1 inside one.
int max_threads();

namespace detail {
using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context);
using TaskFn = void (*)(void* context, int64_t task, int thread);
void parallel_tasks(int64_t count, TaskFn fn, void* context);
}  // namespace detail

// fn(begin, end) over contiguous ranges of at least `grain` items: for equal work, where neighbours share cache lines.
template <typename Fn>
void parallel_ranges(int64_t count, int64_t grain, Fn&& fn) {
  using Body = std::remove_reference_t<Fn>;
  detail::parallel_ranges(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<std::remove_const_t<Body>*>(&fn));
}

// fn(task, thread) for each task, handed out one by one in rising order: for unequal work; put the longest tasks first.
// `thread` is below max_threads() and owned by one running thread at a time: use it to index scratch memory.
template <typename Fn>
void parallel_tasks(int64_t count, Fn&& fn) {
  using Body = std::remove_reference_t<Fn>;
  detail::parallel_tasks(
      count, [](void* context, int64_t task, int thread) { (*static_cast<Body*>(context))(task, thread); },
      const_cast<std::remove_const_t<Body>*>(&fn));
}

}  // namespace fastattn
