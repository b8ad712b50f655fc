// INT8 matrix product:  out = activation((a @ b^T) * a_scale * b_scale + bias), quantising a by row on the way if it is
// floating.
// Work:    first the rows of A are quantised and packed; then a task takes a block of rows (its A panels stay in L2)
//          and some panels of 32 columns of B. Within it k is cut into slices whose B fits L1; a tile's sums wait in
//          scratch.
// Memory:  B is read once per block of rows, straight from its packed form, or packed panel by panel into scratch.
// Numbers: int32 sums are exact; see int8_dot_cpu.h and int8_epilogue_cpu.h.
// Source:  the panel and block structure is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix
//          Multiplication", ACM TOMS 34(3), 2008.
#include "common/parallel.h"
#include "common/spin.h"
#include "int8_matmul/int8_dot_cpu.h"
#include "int8_matmul/int8_epilogue_cpu.h"
#include "int8_matmul/int8_matmul.h"
#include "int8_matmul/int8_pack_cpu.h"
#include "int8_matmul/quantize_int8_cpu.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// 1024 k of B, 32 columns, are 32 KiB: with the tile's A they fill an L1 of 48 KiB, and pass through one of 32 KiB.
constexpr int64_t kSliceGroups = 256;
// Half of a 1 MiB L2 for the A panels of a block.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kMaxBlockRows = 384;
// B comes from L3 or memory the first time, in a stream that the hardware prefetcher leaves at each 4 KiB page. But a
// row or two ask so little of each line that the prefetches themselves cost: they only pay where a thread's share of B
// is too large for most of it to have stayed in L2 since the last call.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kMaxRowsOfLittleWork = 2;
constexpr int64_t kMostlyInL2Bytes = 3 << 19;
// Products (or, when quantising, elements) that are not worth a second thread.
constexpr int64_t kSerialProducts = 1 << 18;
constexpr int64_t kSerialElements = 1 << 13;

// An output from here on is streamed past the caches. Smaller ones may still be there when they are read.
constexpr int64_t kStreamBytes = 1 << 20;

constexpr int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of the work and offsets into the workspace: A panels | A scales | per thread: B panel, sums, quantised rows.
struct Plan {
  int threads;
  int64_t groups, row_panels, a_panel_elems, b_panels;
  int64_t block_rows, blocks, panels_per_task, tasks_per_block, prefetch_bytes;
  int64_t preparations, panels_per_preparation, quantized_stride;
  int64_t a_scale_offset, thread_offset, thread_bytes, sums_offset, rows_offset, total_bytes;

  explicit Plan(const Int8MatmulParams& p) {
    threads = max_threads();
    groups = int8_groups(p.depth);
    row_panels = ceil_div(p.rows, Dot::kTileRows);
    a_panel_elems = groups * row_group(static_cast<int>(min_of<int64_t>(p.rows, Dot::kTileRows)));
    b_panels = int8_panels(p.columns);
    const int64_t a_panel_bytes = a_panel_elems * static_cast<int64_t>(sizeof(Dot::A));
    split_rows(p, a_panel_bytes);
    split_columns(p);

    const bool stays = panels_per_task * int8_panel_bytes(p.depth) <= kMostlyInL2Bytes;
    prefetch_bytes = p.rows <= kMaxRowsOfLittleWork && stays ? 0 : kPrefetchBytes;

    panels_per_preparation = kSerialElements / (Dot::kTileRows * max_of<int64_t>(p.depth, 1)) + 1;
    preparations = ceil_div(row_panels, panels_per_preparation);
    // An odd number of cache lines: rows a power of two apart would compete for the same cache sets.
    quantized_stride = align64(p.depth) | 64;
    a_scale_offset = align64(row_panels * a_panel_bytes);
    thread_offset = align64(a_scale_offset + p.rows * static_cast<int64_t>(sizeof(float)));
    sums_offset = align64(p.b_packed ? 0 : int8_panel_bytes(p.depth));
    const int64_t sums_rows = groups > kSliceGroups ? block_rows : Dot::kTileRows;
    rows_offset = sums_offset + sums_rows * kPanelColumns * static_cast<int64_t>(sizeof(int32_t));
    thread_bytes = rows_offset + min_of<int64_t>(p.rows, Dot::kTileRows) * quantized_stride;
    total_bytes = thread_offset + threads * thread_bytes;
  }

 private:
  void split_rows(const Int8MatmulParams& p, int64_t a_panel_bytes) {
    const int64_t fit = kBlockBytes / max_of<int64_t>(a_panel_bytes, 1);
    int64_t panels = max_of<int64_t>(1, min_of(fit, kMaxBlockRows / Dot::kTileRows));
    // Few columns: smaller blocks, so that every thread has some.
    while (panels > 1 && ceil_div(row_panels, panels) * b_panels < 4 * threads) panels = (panels + 1) / 2;
    // Blocks of equal size.
    panels = ceil_div(row_panels, max_of<int64_t>(ceil_div(row_panels, panels), 1));
    block_rows = panels * Dot::kTileRows;
    blocks = ceil_div(p.rows, max_of<int64_t>(block_rows, 1));
  }

  void split_columns(const Int8MatmulParams& p) {
    const bool serial = threads == 1 || p.rows * p.columns * p.depth < kSerialProducts;
    // One block of rows: one task a thread, so that it finds its share of B where it left it in the call before, in
    // its own L2. Several: more tasks than threads, for balance.
    const int64_t wanted = serial ? 1 : blocks == 1 ? threads : 4 * threads;
    panels_per_task = max_of<int64_t>(1, ceil_div(b_panels, wanted));
    tasks_per_block = ceil_div(b_panels, panels_per_task);
  }
};

char* thread_scratch(const Int8MatmulParams& p, const Plan& plan, int64_t thread) {
  return static_cast<char*>(p.workspace) + plan.thread_offset + thread * plan.thread_bytes;
}

// Packs one panel of A, quantising it first if it is floating; writes the scales.
void prepare_a_panel(const Int8MatmulParams& p, const Plan& plan, int64_t panel, int8_t* scratch) {
  const int64_t row = panel * Dot::kTileRows;
  const int rows = static_cast<int>(min_of<int64_t>(Dot::kTileRows, p.rows - row));
  Dot::A* target = static_cast<Dot::A*>(p.workspace) + panel * plan.a_panel_elems;
  float* scales = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.a_scale_offset) + row;
  if (p.a_dtype == DType::kInt8) {
    pack_a_panel(static_cast<const int8_t*>(p.a) + row * p.stride_a, p.stride_a, rows, p.depth, target);
    std::memcpy(scales, p.a_scale + row, static_cast<size_t>(rows) * sizeof(float));
    return;
  }
  dispatch_element(p.a_dtype, [&](auto element) {
    const auto* a = static_cast<const decltype(element)*>(p.a) + row * p.stride_a;
    for (int r = 0; r < rows; ++r) {
      scales[r] = quantize_row(a + r * p.stride_a, p.depth, scratch + r * plan.quantized_stride);
    }
  });
  pack_a_panel(scratch, plan.quantized_stride, rows, p.depth, target);
}

// A panel of B with what its sums start from.
struct BPanel {
  const int8_t* data;
  const int32_t* start;
  alignas(64) int32_t own_start[kPanelColumns];
};

void load_b_panel(const Int8MatmulParams& p, const Plan& plan, int64_t panel, char* scratch, BPanel& result) {
  const int64_t panel_bytes = int8_panel_bytes(p.depth);
  if (p.b_packed != nullptr) {
    const char* body = static_cast<const char*>(p.b_packed) + sizeof(PackedWeightHeader);
    const int64_t compensation_bytes = kPanelColumns * static_cast<int64_t>(sizeof(int32_t));
    result.data = reinterpret_cast<const int8_t*>(body + plan.b_panels * compensation_bytes + panel * panel_bytes);
    result.start = reinterpret_cast<const int32_t*>(body + panel * compensation_bytes);
  } else {
    int8_t* target = reinterpret_cast<int8_t*>(scratch);
    const int64_t column = panel * kPanelColumns;
    pack_b_panel(p.b + column * p.stride_b, p.stride_b, min_of(kPanelColumns, p.columns - column), p.depth, target);
    if (Dot::kZero != 0) panel_compensation(target, p.depth, result.own_start);
    result.data = target;
    result.start = result.own_start;
  }
  if (Dot::kZero == 0) {
    std::memset(result.own_start, 0, sizeof result.own_start);
    result.start = result.own_start;
  }
}

// What a panel's constants are where they cannot be read in place: in another type, or less than a panel.
struct OwnConstants {
  alignas(64) float scale[kPanelColumns];
  alignas(64) float bias[kPanelColumns];
};

PanelConstants load_constants(const Int8MatmulParams& p, int64_t column, int columns, OwnConstants& own) {
  PanelConstants result{p.b_scale + column, own.bias};
  if (columns < kPanelColumns) {
    std::memset(own.scale, 0, sizeof own.scale);
    std::memcpy(own.scale, p.b_scale + column, static_cast<size_t>(columns) * sizeof(float));
    result.scale = own.scale;
  } else if (p.bias != nullptr && p.bias_dtype == DType::kFloat32) {
    result.bias = static_cast<const float*>(p.bias) + column;
    return result;
  }
  std::memset(own.bias, 0, sizeof own.bias);
  if (p.bias == nullptr) return result;
  dispatch_element(p.bias_dtype, [&](auto element) {
    const auto* bias = static_cast<const decltype(element)*>(p.bias) + column;
    for (int c = 0; c < columns; ++c) own.bias[c] = to_float(bias[c]);
  });
  return result;
}

int64_t out_element_bytes(const Int8MatmulParams& p) { return p.out_dtype == DType::kFloat32 ? 4 : 2; }

// Whole vectors, aligned, and many.
bool streams_output(const Int8MatmulParams& p) {
  constexpr int64_t kLanes = Vec<float>::kLanes, kVecBytes = kLanes * static_cast<int64_t>(sizeof(float));
  return p.out_dtype == DType::kFloat32 && p.columns % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(p.out) % kVecBytes == 0 &&
         p.rows * p.columns * static_cast<int64_t>(sizeof(float)) >= kStreamBytes;
}

EpilogueFn choose_epilogue(const Int8MatmulParams& p) {
  if (streams_output(p)) return epilogue_for<float, true>(p.activation);
  EpilogueFn chosen = nullptr;
  dispatch_element(p.out_dtype, [&](auto element) { chosen = epilogue_for<decltype(element), false>(p.activation); });
  return chosen;
}

// Asks for the next panel's constants: each of them is a stream of two lines a panel, too thin for the hardware to see.
void prefetch_constants(const Int8MatmulParams& p, const BPanel& b, int64_t next_column) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(float));
  for (int64_t c = 0; c < kPanelColumns; c += kLine) {
    if (next_column + c >= p.columns) return;
    if (p.b_packed != nullptr) __builtin_prefetch(b.start + kPanelColumns + c);
    __builtin_prefetch(p.b_scale + next_column + c);
    if (p.bias_dtype == DType::kFloat32) __builtin_prefetch(static_cast<const float*>(p.bias) + next_column + c);
  }
}

// Rows [row_begin, row_end) of the output's columns [panel * 32, panel * 32 + 32).
void multiply_panel(const Int8MatmulParams& p, const Plan& plan, int64_t row_begin, int64_t row_end, int64_t panel,
                    EpilogueFn finish, char* scratch) {
  BPanel b;
  load_b_panel(p, plan, panel, scratch, b);
  const int64_t column = panel * kPanelColumns;
  const int columns = static_cast<int>(min_of(kPanelColumns, p.columns - column));
  OwnConstants own;
  const PanelConstants constants = load_constants(p, column, columns, own);
  prefetch_constants(p, b, column + kPanelColumns);

  int32_t* block_sums = reinterpret_cast<int32_t*>(scratch + plan.sums_offset);
  const float* a_scale = reinterpret_cast<const float*>(static_cast<char*>(p.workspace) + plan.a_scale_offset);
  const Dot::A* a = static_cast<const Dot::A*>(p.workspace);
  const bool sliced = plan.groups > kSliceGroups;
  int64_t slice = 0;
  do {
    const int64_t groups = min_of(kSliceGroups, plan.groups - slice);
    const bool last = slice + groups == plan.groups;
    for (int64_t row = row_begin; row < row_end; row += Dot::kTileRows) {
      const int rows = static_cast<int>(min_of<int64_t>(Dot::kTileRows, row_end - row));
      int32_t* sums = block_sums + (sliced ? (row - row_begin) * kPanelColumns : 0);
      const Dot::A* a_slice = a + row / Dot::kTileRows * plan.a_panel_elems + slice * row_group(rows);
      kDotTiles.tiles[rows - 1](a_slice, b.data + slice * kPanelColumnGroup, groups, plan.prefetch_bytes,
                                slice == 0 ? b.start : sums, slice == 0 ? 0 : kPanelColumns, sums);
      if (last) {
        char* out = static_cast<char*>(p.out) + (row * p.columns + column) * out_element_bytes(p);
        finish(sums, a_scale + row, constants, rows, columns, out, p.columns);
      }
    }
    slice += groups;
  } while (slice < plan.groups);
}

void multiply_task(const Int8MatmulParams& p, const Plan& plan, int64_t task, EpilogueFn finish, char* scratch) {
  const int64_t row_begin = task / plan.tasks_per_block * plan.block_rows;
  const int64_t row_end = min_of(row_begin + plan.block_rows, p.rows);
  const int64_t panel_begin = task % plan.tasks_per_block * plan.panels_per_task;
  const int64_t panel_end = min_of(panel_begin + plan.panels_per_task, plan.b_panels);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    multiply_panel(p, plan, row_begin, row_end, panel, finish, scratch);
  }
  fence_streams();
}

// What the threads of one call hand out among themselves: numbers of tasks, and how many panels of A are ready.
struct Counters {
  alignas(64) int64_t claimed = 0;
  alignas(64) int64_t prepared = 0;
  alignas(64) int64_t multiplied = 0;
};

int64_t claim(int64_t& counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }

// Takes part in preparing A and returns when all of it is ready. Preparing and multiplying are one parallel region: to
// end one and start the next takes longer than to prepare 8 rows. Nobody can wait in vain, even if all workers run one
// after the other: what is not ready has been claimed by somebody who is at work on it.
void prepare_a(const Int8MatmulParams& p, const Plan& plan, Counters& counters, char* scratch) {
  int8_t* rows = reinterpret_cast<int8_t*>(scratch + plan.rows_offset);
  int64_t task;
  while ((task = claim(counters.claimed)) < plan.preparations) {
    const int64_t end = min_of((task + 1) * plan.panels_per_preparation, plan.row_panels);
    for (int64_t panel = task * plan.panels_per_preparation; panel < end; ++panel) {
      prepare_a_panel(p, plan, panel, rows);
    }
    __atomic_fetch_add(&counters.prepared, 1, __ATOMIC_RELEASE);
  }
  spin_until([&] { return __atomic_load_n(&counters.prepared, __ATOMIC_ACQUIRE) == plan.preparations; });
}

}  // namespace

int64_t int8_matmul_workspace_bytes(const Int8MatmulParams& p) { return Plan(p).total_bytes; }

void int8_matmul_cpu(const Int8MatmulParams& p) {
  if (p.rows == 0 || p.columns == 0) return;
  const Plan plan(p);
  const EpilogueFn finish = choose_epilogue(p);
  const int64_t tasks = plan.blocks * plan.tasks_per_block;
  Counters counters;
  const auto work = [&](int64_t worker) {
    char* scratch = thread_scratch(p, plan, worker);
    prepare_a(p, plan, counters, scratch);
    if (tasks <= plan.threads) {
      if (worker < tasks) multiply_task(p, plan, worker, finish, scratch);
    } else {
      int64_t task;
      while ((task = claim(counters.multiplied)) < tasks) multiply_task(p, plan, task, finish, scratch);
    }
  };
  // A few rows are prepared before another thread has woken up.
  if (plan.preparations == 1) prepare_a(p, plan, counters, thread_scratch(p, plan, 0));
  const int64_t workers = min_of<int64_t>(plan.threads, max_of(tasks, plan.preparations));
  parallel_ranges(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

void int8_pack_weight_cpu(const int8_t* b, int64_t stride_b, int64_t columns, int64_t depth, void* packed) {
  char* body = static_cast<char*>(packed) + sizeof(PackedWeightHeader);
  int32_t* compensation = reinterpret_cast<int32_t*>(body);
  int8_t* panels = reinterpret_cast<int8_t*>(compensation + int8_panels(columns) * kPanelColumns);
  parallel_ranges(
      int8_panels(columns), kSerialElements / max_of<int64_t>(depth, 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t column = panel * kPanelColumns;
          int8_t* target = panels + panel * int8_panel_bytes(depth);
          pack_b_panel(b + column * stride_b, stride_b, min_of(kPanelColumns, columns - column), depth, target);
          panel_compensation(target, depth, compensation + column);
        }
      });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
