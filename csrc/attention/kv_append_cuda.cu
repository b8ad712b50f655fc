// Launches kv_append_kernel: with vectors where every row can be read and written 16 bytes at a time.
#include "attention/kv_append.cuh"
#include "common/device.h"

namespace fastattn {
namespace {

constexpr int kAppendVec = 8;

bool has_vectors(const AttentionTensor& tensor) {
  return reinterpret_cast<uint64_t>(tensor.data) % 16 == 0 && tensor.stride_batch % kAppendVec == 0 &&
         tensor.stride_head % kAppendVec == 0 && tensor.stride_row % kAppendVec == 0;
}

// Vectors are whole on both sides of a row's rotated part, and in its halves.
bool takes_vectors(const KvAppendParams& p) {
  bool vectors = p.rotary_dim % (2 * kAppendVec) == 0;
  for (int i = 0; i < p.operand_count; ++i) {
    const AppendedRows& rows = p.operands[i];
    vectors = vectors && rows.head_dim % kAppendVec == 0 && has_vectors(rows.from) && has_vectors(rows.to);
  }
  return vectors;
}

template <typename Element, typename Angle, int kVec>
const char* launch_append(const KvAppendParams& p, cudaStream_t stream) {
  KvAppendArgs args;
  static_cast<KvAppendParams&>(args) = p;
  int64_t most = 0;
  for (int i = 0; i < p.operand_count; ++i) {
    const AppendedRows& rows = p.operands[i];
    const int64_t pieces = (rows.head_dim + 2 * kVec - 1) / (2 * kVec), threads = rows.tokens * rows.heads * pieces;
    most = threads > most ? threads : most;
  }
  const int64_t sequence_blocks = (most + kAppendThreads - 1) / kAppendThreads;
  if (most > INT32_MAX - kAppendThreads || p.batch * sequence_blocks > INT32_MAX)
    return "there are too many new tokens";
  args.sequence_blocks = static_cast<int>(sequence_blocks);
  const dim3 grid(static_cast<unsigned>(p.batch * sequence_blocks), static_cast<unsigned>(p.operand_count));
  return launch_kernel(kv_append_kernel<Element, Angle, kVec>, grid, kAppendThreads, 0, stream, args);
}

template <typename Element, typename Angle>
const char* launch_append_of(const KvAppendParams& p, cudaStream_t stream) {
  return takes_vectors(p) ? launch_append<Element, Angle, kAppendVec>(p, stream)
                          : launch_append<Element, Angle, 1>(p, stream);
}

template <typename Element>
const char* launch_append_of(const KvAppendParams& p, cudaStream_t stream) {
  return p.angle_dtype == DType::kFloat32 ? launch_append_of<Element, float>(p, stream)
                                          : launch_append_of<Element, Element>(p, stream);
}

}  // namespace

const char* kv_append_cuda(const KvAppendParams& p, const DeviceLaunch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return p.dtype == DType::kFloat16 ? launch_append_of<half_t>(p, stream) : launch_append_of<bfloat16_t>(p, stream);
}

}  // namespace fastattn
