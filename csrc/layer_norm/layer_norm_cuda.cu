// Launchers of the layer norm kernels: which row shape serves which number of columns.
#include "common/device.h"
#include "layer_norm/layer_norm_bwd.cuh"
#include "layer_norm/layer_norm_fwd.cuh"

namespace fastattn {
namespace {

template <typename Shape>
struct ShapeTag {
  using type = Shape;
};

// fn(tag of the smallest shape whose threads keep a row of `chunks` chunks in registers).
template <typename Fn>
auto dispatch_fwd_shape(int64_t chunks, Fn&& fn) {
  if (chunks <= 8) return fn(ShapeTag<RowShape<8, 1>>{});
  if (chunks <= 32) return fn(ShapeTag<RowShape<32, 1>>{});
  if (chunks <= 128) return fn(ShapeTag<RowShape<32, 4>>{});
  if (chunks <= 512) return fn(ShapeTag<RowShape<128, 4>>{});
  if (chunks <= 2048) return fn(ShapeTag<RowShape<512, 4>>{});
  if (chunks <= 4096) return fn(ShapeTag<RowShape<1024, 4>>{});
  return fn(ShapeTag<RowShape<1024, 0>>{});
}

template <typename Fn>
auto dispatch_bwd_shape(int64_t chunks, Fn&& fn) {
  if (chunks <= 8) return fn(ShapeTag<RowShape<8, 1>>{});
  if (chunks <= 32) return fn(ShapeTag<RowShape<32, 1>>{});
  if (chunks <= 64) return fn(ShapeTag<RowShape<32, 2>>{});
  if (chunks <= 256) return fn(ShapeTag<RowShape<128, 2>>{});
  if (chunks <= 1024) return fn(ShapeTag<RowShape<512, 2>>{});
  return fn(ShapeTag<RowShape<1024, 0>>{});
}

template <typename Element, typename OutElement>
int64_t chunks_of(int64_t cols) {
  constexpr int kChunk = kChunkOf<Element, OutElement>;
  return (cols + kChunk - 1) / kChunk;
}

}  // namespace

const char* layer_norm_fwd_cuda(const LayerNormParams& p, const DeviceLaunch& launch) {
  if (p.rows == 0) return nullptr;
  return dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) -> const char* {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    return dispatch_fwd_shape(chunks_of<Element, OutElement>(p.cols), [&](auto shape) {
      return launch_layer_norm_fwd<LayerNormFwdTraits<Element, OutElement, typename decltype(shape)::type>>(p, launch);
    });
  });
}

size_t layer_norm_bwd_cuda_workspace_bytes(const LayerNormBwdParams& p, const DeviceLaunch& launch) {
  if (p.dweight == nullptr && p.dbias == nullptr) return 0;
  size_t bytes = 0;
  dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) -> const char* {
    const int64_t chunks = chunks_of<typename decltype(x)::type, typename decltype(out)::type>(p.cols);
    const int64_t blocks = dispatch_bwd_shape(
        chunks, [&](auto shape) { return backward_blocks<typename decltype(shape)::type>(p, launch); });
    bytes = static_cast<size_t>(blocks) * 2 * static_cast<size_t>(p.cols) * sizeof(float);
    return nullptr;
  });
  return bytes;
}

const char* layer_norm_bwd_cuda(const LayerNormBwdParams& p, const DeviceLaunch& launch) {
  if (p.cols == 0) return nullptr;
  return dispatch_elements(p.x_dtype, p.out_dtype, [&](auto x, auto out) -> const char* {
    using Element = typename decltype(x)::type;
    using OutElement = typename decltype(out)::type;
    return dispatch_bwd_shape(chunks_of<Element, OutElement>(p.cols), [&](auto shape) {
      return launch_layer_norm_bwd<LayerNormBwdTraits<Element, OutElement, typename decltype(shape)::type>>(p, launch);
    });
  });
}

}  // namespace fastattn
