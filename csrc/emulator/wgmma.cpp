// wgmma (PTX ISA, "Asynchronous warpgroup level matrix instructions"): D (64 x N) = A (64 x K) B (K x N) [+ D].
//
// Warp w of a warpgroup owns rows 16 w to 16 w + 15, with the accumulator layout of mma.m16n8: so each warp carries out
// its own slice when its lanes have met, and the four warps may drift apart, which is harsher than the device. At the
// block's end the four must have issued the same sequence, of fences, commits and waits as of products: the manual asks
// for the same instruction in the whole warpgroup.
//
// A late wgmma reads its operands at the wait. Its accumulators are saved at issue and overwritten with a signalling
// NaN until then. Reading them early gives NaN; arithmetic on them changes the pattern (it sets the quiet bit), which
// is an error at completion.
#include <cstring>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

constexpr uint32_t kFullMask = 0xFFFFFFFFu;
constexpr uint32_t kInFlightPattern = 0x7FA5A5A5u;  // a signalling NaN in fp32
constexpr int kRows = 16;                           // of one warp
constexpr int kMaxColumns = 256;

struct WgmmaInFlight {
  WgmmaOperands operands;
  uint32_t a_registers[kWarpSize][4];  // copied at issue: the kernel's array may leave its scope
  uint32_t* d[kWarpSize];
  std::vector<uint32_t> saved;  // accumulators before the poison; empty if an earlier instruction holds them
  int group;
  Site site;
};

// ---- operands in shared memory (PTX ISA, "Matrix descriptor format")

struct Descriptor {
  uint32_t start, leading_bytes, stride_bytes;
  int swizzle_bytes;
};

static Descriptor parse_descriptor(uint64_t bits, const Site& site) {
  constexpr int kSwizzleBytes[4] = {0, 128, 64, 32};
  const auto field = [bits](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3FFF) << 4; };
  if ((bits >> 49 & 7) != 0) fail(site, "a descriptor with a base offset; align tiles to the swizzle pattern instead");
  return {field(0), field(16), field(32), kSwizzleBytes[bits >> 62]};
}

// 16 bytes of an operand as the asynchronous proxy sees them.
static const uint8_t* read_chunk(const Block& block, uint32_t address, int swizzle_bytes, const Site& site) {
  address = swizzle_address(address, swizzle_bytes);
  if (address < kSharedBase || address + 16 > kSharedBase + block.shared_bytes) {
    fail(site, "a descriptor reaches shared address %u, outside the block's memory", address);
  }
  const uint32_t offset = address - kSharedBase;
  tsan_read(block.shared + offset, 16);
  if (std::memcmp(block.shared + offset, block.async_view + offset, 16) != 0) {
    fail(site, "an operand at shared offset %zu was changed by ordinary stores without fence.proxy.async, or in flight",
         offset - kStaticSharedBytes);
  }
  return block.async_view + offset;
}

template <typename Value>
static Value decode(Element element, const uint8_t* chunk, int index) {
  if (element == Element::kInt8) return static_cast<Value>(reinterpret_cast<const int8_t*>(chunk)[index]);
  uint16_t bits;
  std::memcpy(&bits, chunk + 2 * index, sizeof bits);
  return static_cast<Value>(element == Element::kFloat16 ? __half2float({bits}) : __bfloat162float({bits}));
}

// Reads rows [first, first + rows) of M or N, for all k, into out[k][row]. A swizzle of s bytes arranges s-byte lines:
//   K-major   a line holds s bytes of k for one row; 8 rows follow one another, `stride` leads to the next 8.
//             Without swizzle a line is 16 bytes and `leading` leads to the next 16 bytes of k.
//   MN-major  a line holds s / 2 rows for one k; 8 k follow one another, `stride` leads to the next 8, and `leading`
//             to the next s / 2 rows. Without swizzle the two exchange their roles.
template <typename Value, int kStride>
static void read_operand(const Block& block, const WgmmaOperands& operands, bool is_a, int first, int rows,
                         Value (*out)[kStride], const Site& site) {
  const Descriptor at = parse_descriptor(is_a ? operands.a_descriptor : operands.b_descriptor, site);
  const Element element = operands.element;
  const bool transposed = is_a ? operands.a_is_transposed : operands.b_is_transposed;
  const int per_chunk = element == Element::kInt8 ? 16 : 8;
  const int depth = 2 * per_chunk;
  const uint32_t line = at.swizzle_bytes == 0 ? 16 : static_cast<uint32_t>(at.swizzle_bytes);
  if (!transposed) {
    const uint32_t next_chunk = at.swizzle_bytes == 0 ? at.leading_bytes : 16;
    for (int row = 0; row < rows; ++row) {
      const uint32_t r = static_cast<uint32_t>(first + row);
      for (uint32_t c = 0; c < 2; ++c) {
        const uint32_t address = at.start + r % 8 * line + r / 8 * at.stride_bytes + c * next_chunk;
        const uint8_t* chunk = read_chunk(block, address, at.swizzle_bytes, site);
        for (int i = 0; i < per_chunk; ++i) out[c * per_chunk + i][row] = decode<Value>(element, chunk, i);
      }
    }
    return;
  }
  const uint32_t next_rows = at.swizzle_bytes == 0 ? at.stride_bytes : at.leading_bytes;
  const uint32_t next_k = at.swizzle_bytes == 0 ? at.leading_bytes : at.stride_bytes;
  const uint32_t line_rows = line / 2;
  for (uint32_t k = 0; k < static_cast<uint32_t>(depth); ++k) {
    for (int row = 0; row < rows; row += 8) {
      const uint32_t r = static_cast<uint32_t>(first + row);
      const uint32_t address = at.start + r % line_rows * 2 + r / line_rows * next_rows + k % 8 * line + k / 8 * next_k;
      const uint8_t* chunk = read_chunk(block, address, at.swizzle_bytes, site);
      for (int i = 0; i < 8; ++i) out[k][row + i] = decode<Value>(element, chunk, i);
    }
  }
}

// ---- execution

template <typename Value>
static Value from_bits(uint32_t bits) {
  return std::bit_cast<Value>(bits);
}

template <typename Value, int kDepth>
static void execute(Warp& warp, WgmmaInFlight& op) {
  const WgmmaOperands& operands = op.operands;
  const int columns = operands.n;
  static thread_local Value* scratch = new Value[kDepth * (kMaxColumns + kRows)];  // lives as long as the OS thread
  auto* b = reinterpret_cast<Value(*)[kMaxColumns]>(scratch);
  auto* a = reinterpret_cast<Value(*)[kRows]>(scratch + kDepth * kMaxColumns);

  if (operands.a_registers != nullptr) {
    constexpr int kPerRegister = kDepth / 8, kBits = 32 / kPerRegister;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int q = 0; q < 4; ++q) {
        for (int i = 0; i < kPerRegister; ++i) {
          const uint32_t bits = op.a_registers[lane][q] >> (kBits * i);
          a[lane % 4 * kPerRegister + q / 2 * (kDepth / 2) + i][lane / 4 + q % 2 * 8] =
              decode<Value>(operands.element, reinterpret_cast<const uint8_t*>(&bits), 0);
        }
      }
    }
  } else {
    read_operand<Value, kRows>(*warp.block, operands, true, warp.id % 4 * kRows, kRows, a, op.site);
  }
  read_operand<Value, kMaxColumns>(*warp.block, operands, false, 0, columns, b, op.site);

  for (int row = 0; row < kRows; ++row) {
    Value sums[kMaxColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      const Value factor = a[k][row];
      for (int column = 0; column < columns; ++column) sums[column] += factor * b[k][column];
    }
    for (int column = 0; column < columns; ++column) {
      uint32_t& d = op.d[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
      const Value before = operands.accumulates ? from_bits<Value>(d) : Value{0};
      d = std::bit_cast<uint32_t>(before + sums[column]);
    }
  }
}

static void run(Warp& warp, WgmmaInFlight& op) {
  if (op.operands.element == Element::kInt8) {
    execute<int32_t, 32>(warp, op);
  } else {
    execute<float, 16>(warp, op);
  }
}

static void poison_accumulators(WgmmaInFlight& op) {
  const int registers = op.operands.n / 2;
  for (uint32_t* d : op.d) {
    op.saved.insert(op.saved.end(), d, d + registers);
    std::fill(d, d + registers, kInFlightPattern);
  }
}

static void restore_accumulators(WgmmaInFlight& op) {
  const int registers = op.operands.n / 2;
  const uint32_t* saved = op.saved.data();
  for (int lane = 0; lane < kWarpSize; ++lane, saved += registers) {
    for (int i = 0; i < registers; ++i) {
      if (op.d[lane][i] != kInFlightPattern) {
        fail(op.site, "accumulator %d of lane %d was modified while in flight", i, lane);
      }
      op.d[lane][i] = saved[i];
    }
  }
}

static bool shares_accumulators(const WgmmaInFlight& a, const WgmmaInFlight& b) { return a.d[0] == b.d[0]; }

static void finish_oldest(Warp& warp) {
  const std::shared_ptr<WgmmaInFlight> op = std::move(warp.wgmmas.front());
  warp.wgmmas.erase(warp.wgmmas.begin());
  restore_accumulators(*op);
  run(warp, *op);
  for (auto& later : warp.wgmmas) {  // an instruction in flight on the same registers keeps them poisoned
    if (!shares_accumulators(*later, *op)) continue;
    poison_accumulators(*later);
    break;
  }
}

// ---- instructions

struct WgmmaArgument {
  uint32_t* d;
  const WgmmaOperands* operands;
};

static void check_issue(Warp& warp, WgmmaArgument** lanes, const Site& site) {
  const WgmmaOperands& first = *lanes[0]->operands;
  if (!warp.wgmma_fenced) fail(site, "no wgmma.fence since the last wgmma.commit_group");
  for (int lane = 1; lane < kWarpSize; ++lane) {
    const WgmmaOperands& other = *lanes[lane]->operands;
    if (other.a_descriptor != first.a_descriptor || other.b_descriptor != first.b_descriptor ||
        other.accumulates != first.accumulates) {
      fail(site, "lane %d has other descriptors or another scale-d than lane 0", lane);
    }
  }
}

static uint64_t history_entry(const WgmmaOperands& operands) {
  return operands.a_descriptor * 0x9E3779B97F4A7C15ull ^ operands.b_descriptor * 0xD1B54A32D192ED03ull ^
         static_cast<uint64_t>(operands.n) << 1 ^ static_cast<uint64_t>(operands.accumulates);
}

void wgmma_mma_async(void* d, const WgmmaOperands& operands, Site site) {
  WgmmaArgument argument{static_cast<uint32_t*>(d), &operands};
  collective(kFullMask, site, argument, [&](WgmmaArgument** lanes, uint32_t) {
    Warp& warp = *current_thread().warp;
    check_issue(warp, lanes, site);
    warp.wgmma_history.push_back(history_entry(operands));
    auto op = std::make_shared<WgmmaInFlight>();
    op->operands = operands;
    op->group = warp.wgmma_group;
    op->site = site;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      op->d[lane] = lanes[lane]->d;
      if (operands.a_registers == nullptr) continue;
      std::memcpy(op->a_registers[lane], lanes[lane]->operands->a_registers, sizeof op->a_registers[lane]);
    }
    if (operands.at_once || (warp.wgmmas.empty() && !completes_late())) {
      run(warp, *op);
      return;
    }
    const bool chained = std::any_of(warp.wgmmas.begin(), warp.wgmmas.end(),
                                     [&](const auto& earlier) { return shares_accumulators(*earlier, *op); });
    if (!chained) poison_accumulators(*op);
    warp.wgmmas.push_back(std::move(op));
  });
}

// In the history, beside the products.
constexpr uint64_t kFence = 1, kCommit = 2, kWait = 3;  // the wait for n groups in flight is kWait + n

void wgmma_fence(Site site) {
  char nothing = 0;
  collective(kFullMask, site, nothing, [](char**, uint32_t) {
    current_thread().warp->wgmma_fenced = true;
    current_thread().warp->wgmma_history.push_back(kFence);
  });
}

void wgmma_commit_group(Site site) {
  char nothing = 0;
  collective(kFullMask, site, nothing, [](char**, uint32_t) {
    Warp& warp = *current_thread().warp;
    warp.wgmma_fenced = false;
    warp.wgmma_history.push_back(kCommit);
    ++warp.wgmma_group;
  });
}

void wgmma_wait_group(int groups_in_flight, Site site) {
  char nothing = 0;
  const auto finish = [=](char**, uint32_t) {
    Warp& warp = *current_thread().warp;
    warp.wgmma_history.push_back(kWait + static_cast<uint64_t>(groups_in_flight));
    while (!warp.wgmmas.empty() && warp.wgmmas.front()->group < warp.wgmma_group - groups_in_flight) {
      finish_oldest(warp);
    }
  };
  constexpr bool kOrdersMemory = true;  // any lane may then hand the tiles back
  collective(kFullMask, site, nothing, finish, kOrdersMemory);
}

void check_wgmmas_done(Thread& thread) {
  if (!thread.warp->wgmmas.empty()) fail(thread.warp->wgmmas[0]->site, "the warp exits while this is in flight");
}

std::string wgmma_disagreement(const Block& block) {
  for (size_t first = 0; first + 3 < block.warps.size(); first += 4) {
    for (size_t i = 1; i < 4; ++i) {
      if (block.warps[first + i].wgmma_history == block.warps[first].wgmma_history) continue;
      return "warps " + std::to_string(first) + " and " + std::to_string(first + i) +
             " of one warpgroup issued different wgmma sequences";
    }
  }
  return "";
}

}  // namespace fastattn::emu
