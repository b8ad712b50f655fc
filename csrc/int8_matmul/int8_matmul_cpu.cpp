// INT8 matrix product:  out = activation((a @ b^T) * a_scale * b_scale + bias), quantising a by row on the way if it is
// floating.
// Work:    a worker has a part of the output, some rows of some panels of 32 columns. It quantises and packs a block of
//          its rows (A panels that stay in L2), then takes its panels of B one by one. Within one k is cut into slices
//          whose B fits L1; a tile's sums wait in scratch.
// Memory:  B is read once per block of rows, straight from its packed form, or packed panel by panel into scratch.
// Numbers: int32 sums are exact; see int8_dot_cpu.h and int8_epilogue_cpu.h.
// Source:  the panel and block structure is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix
//          Multiplication", ACM TOMS 34(3), 2008.
#include "common/parallel.h"
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
// Products, or elements to pack, that are not worth a second thread.
constexpr int64_t kSerialProducts = 1 << 18;
constexpr int64_t kSerialElements = 1 << 13;
// Cycles: to quantise an element of A, to fetch one of B from L3 beside products, to pack one.
constexpr float kProductsPerCycle = 128, kQuantizeCost = 0.3f, kReadCost = 0.02f, kPackCost = 0.1f;

// An output from here on is streamed past the caches. Smaller ones may still be there when they are read.
constexpr int64_t kStreamBytes = 1 << 20;

constexpr int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Who does what, and offsets into a worker's scratch: A panels | A scales | B panel | sums | quantised rows.
struct Plan {
  int64_t groups, a_panel_elems, b_panels;
  int64_t row_parts = 1, column_parts = 1, part_rows, part_panels, block_rows, prefetch_bytes;
  int64_t quantized_stride, a_scale_offset, b_offset, sums_offset, rows_offset, worker_bytes;

  explicit Plan(const Int8MatmulParams& p) {
    groups = int8_groups(p.depth);
    a_panel_elems = groups * row_group(static_cast<int>(min_of<int64_t>(p.rows, Dot::kTileRows)));
    b_panels = int8_panels(p.columns);
    split_among_workers(p);
    split_into_blocks();

    const bool stays = part_panels * int8_panel_bytes(p.depth) <= kMostlyInL2Bytes;
    prefetch_bytes = p.rows <= kMaxRowsOfLittleWork && stays ? 0 : kPrefetchBytes;

    // An odd number of cache lines: rows a power of two apart would compete for the same cache sets.
    quantized_stride = align64(p.depth) | 64;
    a_scale_offset = align64(block_rows / Dot::kTileRows * a_panel_elems * static_cast<int64_t>(sizeof(Dot::A)));
    b_offset = align64(a_scale_offset + block_rows * static_cast<int64_t>(sizeof(float)));
    sums_offset = b_offset + align64(p.b_packed ? 0 : int8_panel_bytes(p.depth));
    const int64_t sums_rows = groups > kSliceGroups ? block_rows : Dot::kTileRows;
    rows_offset = sums_offset + sums_rows * kPanelColumns * static_cast<int64_t>(sizeof(int32_t));
    const int64_t quantized_rows = kQuantizesIntoPanel ? 0 : min_of<int64_t>(p.rows, Dot::kTileRows);
    worker_bytes = rows_offset + quantized_rows * quantized_stride;
  }

  int64_t workers() const { return row_parts * column_parts; }

 private:
  // Cuts the output into row_parts x column_parts, one part a worker.
  void split_among_workers(const Int8MatmulParams& p) {
    const int64_t threads = p.rows * p.columns * p.depth < kSerialProducts ? 1 : max_threads();
    const int64_t row_panels = ceil_div(p.rows, Dot::kTileRows);
    const float read_cost = p.b_packed != nullptr ? kReadCost : kPackCost;
    float best = 0;
    for (int64_t parts = 1; parts <= min_of(threads, row_panels); ++parts) {
      if (threads % parts != 0) continue;
      const int64_t rows = ceil_div(p.rows, parts), panels = ceil_div(b_panels, threads / parts);
      const float cost = static_cast<float>(rows) * static_cast<float>(panels * kPanelColumns) / kProductsPerCycle +
                         static_cast<float>(rows) * kQuantizeCost +
                         static_cast<float>(panels * kPanelColumns) * read_cost;
      if (parts > 1 && cost >= best) continue;
      best = cost;
      row_parts = parts;
    }
    part_rows = ceil_div(p.rows, row_parts);
    part_panels = ceil_div(b_panels, threads / row_parts);
    column_parts = ceil_div(b_panels, part_panels);
  }

  void split_into_blocks() {
    const int64_t panels = ceil_div(part_rows, Dot::kTileRows);
    const int64_t panel_bytes = a_panel_elems * static_cast<int64_t>(sizeof(Dot::A));
    const int64_t fit =
        max_of<int64_t>(1, min_of(kBlockBytes / max_of<int64_t>(panel_bytes, 1), kMaxBlockRows / Dot::kTileRows));
    // Blocks of equal size.
    block_rows = ceil_div(panels, ceil_div(panels, fit)) * Dot::kTileRows;
  }
};

// Packs rows [row, row + rows) of A, quantising them first if they are floating; writes their scales.
void prepare_a(const Int8MatmulParams& p, const Plan& plan, int64_t row, int64_t rows, char* scratch) {
  int8_t* quantized = reinterpret_cast<int8_t*>(scratch + plan.rows_offset);
  Dot::A* panel = reinterpret_cast<Dot::A*>(scratch);
  float* scales = reinterpret_cast<float*>(scratch + plan.a_scale_offset);
  for (const int64_t end = row + rows; row < end; row += Dot::kTileRows) {
    const int panel_rows = static_cast<int>(min_of<int64_t>(Dot::kTileRows, end - row));
    if (p.a_dtype == DType::kInt8) {
      pack_a_panel(static_cast<const int8_t*>(p.a) + row * p.stride_a, p.stride_a, panel_rows, p.depth, panel);
      std::memcpy(scales, p.a_scale + row, static_cast<size_t>(panel_rows) * sizeof(float));
    } else {
      dispatch_element(p.a_dtype, [&](auto element) {
        const auto* a = static_cast<const decltype(element)*>(p.a) + row * p.stride_a;
        quantize_a_panel(a, p.stride_a, panel_rows, p.depth, quantized, plan.quantized_stride, panel, scales);
      });
    }
    panel += plan.a_panel_elems;
    scales += panel_rows;
  }
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
    int8_t* target = reinterpret_cast<int8_t*>(scratch + plan.b_offset);
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

// A block of rows with their panels and scales.
struct ABlock {
  const Dot::A* panels;
  const float* scales;
  int64_t row, rows;
};

// The block's rows of the output's columns [panel * 32, panel * 32 + 32).
void multiply_panel(const Int8MatmulParams& p, const Plan& plan, const ABlock& a, int64_t panel, EpilogueFn finish,
                    char* scratch) {
  BPanel b;
  load_b_panel(p, plan, panel, scratch, b);
  const int64_t column = panel * kPanelColumns;
  const int columns = static_cast<int>(min_of(kPanelColumns, p.columns - column));
  OwnConstants own;
  const PanelConstants constants = load_constants(p, column, columns, own);
  prefetch_constants(p, b, column + kPanelColumns);

  int32_t* block_sums = reinterpret_cast<int32_t*>(scratch + plan.sums_offset);
  const bool sliced = plan.groups > kSliceGroups;
  int64_t slice = 0;
  do {
    const int64_t groups = min_of(kSliceGroups, plan.groups - slice);
    const bool last = slice + groups == plan.groups;
    for (int64_t row = 0; row < a.rows; row += Dot::kTileRows) {
      const int rows = static_cast<int>(min_of<int64_t>(Dot::kTileRows, a.rows - row));
      int32_t* sums = block_sums + (sliced ? row * kPanelColumns : 0);
      const Dot::A* a_slice = a.panels + row / Dot::kTileRows * plan.a_panel_elems + slice * row_group(rows);
      kDotTiles.tiles[rows - 1](a_slice, b.data + slice * kPanelColumnGroup, groups, plan.prefetch_bytes,
                                slice == 0 ? b.start : sums, slice == 0 ? 0 : kPanelColumns, sums);
      if (last) {
        char* out = static_cast<char*>(p.out) + ((a.row + row) * p.columns + column) * out_element_bytes(p);
        finish(sums, a.scales + row, constants, rows, columns, out, p.columns);
      }
    }
    slice += groups;
  } while (slice < plan.groups);
}

// One part of the output. Each worker prepares the rows it multiplies, also where others need the same ones, and be it
// one: lines that one core has written and others have read are slow to write again, far slower than to quantise what
// they hold.
void multiply_part(const Int8MatmulParams& p, const Plan& plan, int64_t worker, EpilogueFn finish) {
  char* scratch = static_cast<char*>(p.workspace) + worker * plan.worker_bytes;
  const int64_t row_begin = worker / plan.column_parts * plan.part_rows;
  const int64_t row_end = min_of(row_begin + plan.part_rows, p.rows);
  const int64_t panel_begin = worker % plan.column_parts * plan.part_panels;
  const int64_t panel_end = min_of(panel_begin + plan.part_panels, plan.b_panels);
  for (int64_t row = row_begin; row < row_end; row += plan.block_rows) {
    const ABlock a{reinterpret_cast<const Dot::A*>(scratch),
                   reinterpret_cast<const float*>(scratch + plan.a_scale_offset), row,
                   min_of(plan.block_rows, row_end - row)};
    prepare_a(p, plan, a.row, a.rows, scratch);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) multiply_panel(p, plan, a, panel, finish, scratch);
  }
  fence_streams();
}

}  // namespace

int64_t int8_matmul_workspace_bytes(const Int8MatmulParams& p) {
  if (p.rows == 0 || p.columns == 0) return 0;
  const Plan plan(p);
  return plan.workers() * plan.worker_bytes;
}

void int8_matmul_cpu(const Int8MatmulParams& p) {
  if (p.rows == 0 || p.columns == 0) return;
  const Plan plan(p);
  const EpilogueFn finish = choose_epilogue(p);
  parallel_ranges(plan.workers(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) multiply_part(p, plan, worker, finish);
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
