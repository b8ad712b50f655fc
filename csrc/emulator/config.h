// How the next emulated launches run. One seed and one configuration give one execution, whatever `os_threads` is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::emu {

// Which ready thread runs next.
enum class Schedule : int {
  kInOrder,   // the lanes of a warp in turn, then the next warp
  kUniform,   // any ready thread
  kPriority,  // random priorities of warps, redrawn now and then: lets one warp race far ahead of the others
};

// When an asynchronous operation (cp.async, TMA, wgmma) reads its sources and delivers its results.
enum class AsyncMode : int {
  kEager,   // at once
  kLazy,    // as late as the waits of the kernel allow
  kRandom,  // a coin for each operation
};

constexpr size_t kMaxSharedBytes = 227 * 1024;  // what one block of compute capability 9.0 can ask for

struct Config {
  Schedule schedule = Schedule::kInOrder;
  AsyncMode async_mode = AsyncMode::kEager;
  uint64_t seed = 0;
  // Blocks, or clusters, are shared out between them; more than one also shows races between blocks.
  int os_threads = 1;
  // What a block of the card can ask for, static and dynamic shared memory together.
  size_t max_shared_bytes = kMaxSharedBytes;
  // Whether a turn that was passed over is an error: not where lengths that nobody has looked at decide who counts.
  bool exact_turns = true;
  // Whether the instructions of approximate.cpp err by up to what the manual allows, as the seed says; else exact.
  bool rough_approximations = false;
};

Config& config();

constexpr size_t kStackBytes = 256 * 1024;         // those of compiled.h keep thousands of registers there
constexpr size_t kUnaskedSharedBytes = 48 * 1024;  // what a block has, static and dynamic, that asks for nothing
constexpr size_t kStaticSharedBytes = 8 * 1024;    // room for static shared memory
constexpr uint32_t kSharedBase = 1024;             // 32-bit shared address of the block's first byte; 0 stays invalid
// Size of a block's window into shared::cluster; mapa gives rank + 1 of it.
constexpr uint32_t kClusterWindow = 1u << 24;
constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kMaxClusterBlocks = 8;  // what every card with clusters can run

}  // namespace fastattn::emu
