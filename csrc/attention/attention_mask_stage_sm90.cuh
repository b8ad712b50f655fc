// Tiles of attn_mask in shared memory: on Hopper TMA brings them ahead of their use, as it does k and v, so that nobody
// waits for global memory between a product and its softmax.
//
// Layout:  the mask's own elements (a boolean tile is a quarter of an fp32 one; converting it would need a warpgroup),
//          in panels of 64 rows of 128 bytes, whose 16-byte chunks are permuted by the swizzle: lanes that read
//          together then meet in no bank, whether an accumulator's rows are queries or keys (fp32 with queries: in two
//          wavefronts more than the least). Columns and rows past the end of the mask are zeros.
// Served:  masks with contiguous keys and other strides of multiples of 16 bytes, or 0 where the mask broadcasts. One
//          row for all queries (key padding) is one row in each panel. Others are read from global memory, where
//          attention_scores.cuh needs them.
#pragma once

#include "attention/attention_bwd_scores.cuh"
#include "attention/attention_tile_sm90.cuh"

namespace fastattn {

constexpr int kMaskStageRows = 64, kMaskRowBytes = 128, kMaskPanelBytes = kMaskStageRows * kMaskRowBytes;
constexpr int kMaxMaskStages = 2;

// Of a tile of 64 rows and `cols` columns; a whole last panel is copied even where the tile needs a part of it.
constexpr int mask_panels(int cols, int element_bytes) {
  return (cols * element_bytes + kMaskRowBytes - 1) / kMaskRowBytes;
}
constexpr int mask_stage_bytes(int cols, int element_bytes) {
  return mask_panels(cols, element_bytes) * kMaskPanelBytes;
}

// How a kernel gets its mask; filled on the host.
struct MaskStages {
  TensorMap map;  // a box is a panel
  int count = 0;  // 1 or 2 stages; 0: the mask is read from global memory
  int panels = 0, panel_cols = 0;
  int stage_bytes = 0;
  bool one_row = false, per_head = false, per_batch = false;
};

// A place in the ring of `stages` (1 or 2), for producer and consumers as RingPosition is.
struct MaskRingPosition {
  uint32_t count = 0;
  FASTATTN_DEVICE int stage(const MaskStages& mask) const { return mask.count == 2 ? static_cast<int>(count & 1) : 0; }
  FASTATTN_DEVICE int parity(const MaskStages& mask) const {
    return static_cast<int>((mask.count == 2 ? count >> 1 : count) & 1);
  }
};

// ---- host

inline bool tma_can_address_mask(const ScoreArgs& scores, int batch, int heads) {
  const AttentionMask& mask = scores.mask;
  if (mask.data == nullptr || mask.stride_k != 1 || reinterpret_cast<uint64_t>(mask.data) % 16 != 0) return false;
  const int64_t bytes = mask_element_bytes(mask.dtype);
  const auto serves = [bytes](int64_t size, int64_t stride, int64_t least) {
    constexpr int64_t kLimitBytes = int64_t{1} << 40;
    return size <= 1 || stride == 0 || (stride >= least && stride * bytes % 16 == 0 && stride * bytes < kLimitBytes);
  };
  return scores.seqlen_k > 0 && serves(scores.seqlen_q, mask.stride_q, scores.seqlen_k) &&
         serves(heads, mask.stride_head, 1) && serves(batch, mask.stride_batch, 1);
}

template <typename Element>
const char* make_mask_map(MaskStages& stages, const ScoreArgs& scores, int batch, int heads) {
  const AttentionMask& mask = scores.mask;
  const int row_elems = (scores.seqlen_k + 15) / 16 * 16;  // any stride will do where there is one row
  const auto size = [](bool many, int n) { return static_cast<uint64_t>(many ? n : 1); };
  const auto stride = [&](bool many, int64_t elems) { return static_cast<uint64_t>(many ? elems : row_elems); };
  const uint64_t dim[4] = {static_cast<uint64_t>(scores.seqlen_k), size(!stages.one_row, scores.seqlen_q),
                           size(stages.per_head, heads), size(stages.per_batch, batch)};
  const uint64_t strides[4] = {1, stride(!stages.one_row, mask.stride_q), stride(stages.per_head, mask.stride_head),
                               stride(stages.per_batch, mask.stride_batch)};
  const uint32_t rows = stages.one_row ? 1 : kMaskStageRows;
  const uint32_t box[4] = {static_cast<uint32_t>(stages.panel_cols), rows, 1, 1};
  return make_tensor_map(stages.map, static_cast<const Element*>(mask.data), dim, strides, box, Swizzle::k128);
}

// As many stages of 64 x `cols`, for `pieces` warpgroups, as `spare_bytes` hold. Null, or the error.
inline const char* make_mask_stages(MaskStages& stages, const ScoreArgs& scores, int batch, int heads, int cols,
                                    int pieces, int spare_bytes) {
  if (!tma_can_address_mask(scores, batch, heads)) return nullptr;
  const AttentionMask& mask = scores.mask;
  const int element_bytes = static_cast<int>(mask_element_bytes(mask.dtype));
  stages.panels = mask_panels(cols, element_bytes);
  stages.panel_cols = kMaskRowBytes / element_bytes;
  stages.stage_bytes = mask_stage_bytes(cols, element_bytes);
  const int fitting = spare_bytes / (pieces * stages.stage_bytes);
  stages.count = fitting < kMaxMaskStages ? fitting : kMaxMaskStages;
  if (stages.count == 0) return nullptr;
  stages.one_row = mask.stride_q == 0 || scores.seqlen_q == 1;
  stages.per_head = mask.stride_head != 0 && heads > 1;
  stages.per_batch = mask.stride_batch != 0 && batch > 1;
  switch (mask.dtype) {
    case DType::kBool:
      return make_mask_map<int8_t>(stages, scores, batch, heads);
    case DType::kFloat32:
      return make_mask_map<float>(stages, scores, batch, heads);
    case DType::kBFloat16:
      return make_mask_map<bfloat16_t>(stages, scores, batch, heads);
    default:
      return make_mask_map<half_t>(stages, scores, batch, heads);
  }
}

// ---- the producer

// Copies the tile whose first element is (row, col), by one thread, and announces it at `full_smem`.
FASTATTN_DEVICE void load_mask_stage(uint8_t* stage_smem, const MaskStages& mask, uint64_t* full_smem, int row, int col,
                                     int head, int batch) {
  const int rows = mask.one_row ? 1 : kMaskStageRows;
  mbarrier_arrive_expect_tx(full_smem, static_cast<uint32_t>(mask.panels * rows * kMaskRowBytes));
#pragma unroll 1
  for (int panel = 0; panel < mask.panels; ++panel) {
    tma_load(
        stage_smem + panel * kMaskPanelBytes, &mask.map, full_smem,
        {col + panel * mask.panel_cols, mask.one_row ? 0 : row, mask.per_head ? head : 0, mask.per_batch ? batch : 0});
  }
}

// ---- the consumers

// Calls fn(Element{}) with the type of the mask's elements.
template <typename Fn>
FASTATTN_DEVICE void dispatch_mask_element(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kBool:
      return fn(BoolMaskElement{});
    case DType::kFloat32:
      return fn(float{});
    case DType::kBFloat16:
      return fn(bfloat16_t{});
    default:
      return fn(half_t{});
  }
}

// To accumulators whose rows are queries; `row` is this lane's first in the stage.
template <int kColTiles>
FASTATTN_DEVICE void apply_mask_stage(float (&s)[1][kColTiles][4], const ScoreArgs& scores, const MaskStages& mask,
                                      const uint8_t* stage_smem, int row) {
  dispatch_mask_element(scores.mask.dtype, [&](auto element) {
    using Element = decltype(element);
    constexpr int kBytes = static_cast<int>(sizeof(Element));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int stage_row = mask.one_row ? 0 : row + 8 * half;
      const uint8_t* row_smem = stage_smem + stage_row * kMaskRowBytes;
      // Of the lane's bytes in 128; what n adds to them never carries, so it may be added before the swizzle.
      const int permuted = (lane_column() * kBytes) ^ (stage_row % 8 * 16);
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        constexpr int kTileBytes = 8 * kBytes;
        const uint8_t* panel_smem = row_smem + n * kTileBytes / kMaskRowBytes * kMaskPanelBytes;
        const auto pair =
            load_vec<2>(reinterpret_cast<const Element*>(panel_smem + (permuted ^ (n * kTileBytes % kMaskRowBytes))));
        apply_mask_element(s[0][n][2 * half], pair[0]);
        apply_mask_element(s[0][n][2 * half + 1], pair[1]);
      }
    }
  });
}

// To a column tile of accumulators whose rows are keys: `key` and `query` are the stage's column and row of x[0][0][0].
FASTATTN_DEVICE void apply_mask_stage_transposed(float (&x)[1][1][4], const ScoreArgs& scores, const MaskStages& mask,
                                                 const uint8_t* stage_smem, int key, int query) {
  dispatch_mask_element(scores.mask.dtype, [&](auto element) {
    using Element = decltype(element);
    for_each_transposed(x, [&](float& score, int, int half, int e) {
      const int row = mask.one_row ? 0 : query + e, byte = (key + 8 * half) * static_cast<int>(sizeof(Element));
      const uint8_t* panel_smem = stage_smem + byte / kMaskRowBytes * kMaskPanelBytes + row * kMaskRowBytes;
      const int permuted = byte % kMaskRowBytes ^ (row % 8 * 16);
      apply_mask_element(score, *reinterpret_cast<const Element*>(panel_smem + permuted));
    });
  });
}

}  // namespace fastattn
