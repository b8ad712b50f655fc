// What happens to a tile of int32 sums:  out = cast(activation((sum * a_scale) * b_scale + bias)), in fp32 until the
// cast.
#pragma once

#include "common/activation_cpu.h"
#include "common/simd.h"
#include "common/stream.h"
#include "int8_matmul/int8_matmul.h"

namespace fastattn {
namespace FASTATTN_ISA {

FASTATTN_INLINE Vec<float> load_int32_as_float(const int32_t* p) {
#if defined(__AVX512F__)
  return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))};
#elif defined(__AVX2__)
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#else
  Vec<float> result;
  for (int i = 0; i < Vec<float>::kLanes; ++i) result.v[i] = static_cast<float>(p[i]);
  return result;
#endif
}

// Scale and bias of a panel's columns, as float, kPanelColumns of each.
struct PanelConstants {
  const float* scale;
  const float* bias;
};

template <Activation kActivation>
FASTATTN_INLINE Vec<float> finish_sums(const int32_t* sums, Vec<float> row_scale, Vec<float> scale, Vec<float> bias) {
  return activate<kActivation>(fma(load_int32_as_float(sums) * row_scale, scale, bias));
}

template <Activation kActivation, typename Out, bool kStream>
void epilogue(const int32_t* sums, const float* a_scale, const PanelConstants& constants, int rows, int columns,
              void* out, int64_t stride_out) {
  using V = Vec<float>;
  constexpr int kVecs = static_cast<int>(kPanelColumns) / V::kLanes;
  Out* out_row = static_cast<Out*>(out);
  if (columns == kPanelColumns) {
    // Unrolled, and with the constants in registers, this fits into what the next tile's products leave of the
    // processor's issue slots; as a loop over the columns it took 5 % of the whole product's time.
    V scale[kVecs], bias[kVecs];
    unroll<kVecs>(FASTATTN_LAMBDA(v) {
      scale[v] = V::load(constants.scale + v * V::kLanes);
      bias[v] = V::load(constants.bias + v * V::kLanes);
    });
    for (int r = 0; r < rows; ++r, sums += kPanelColumns, out_row += stride_out) {
      const V row_scale = V::set1(a_scale[r]);
      unroll<kVecs>(FASTATTN_LAMBDA(v) {
        const V value = finish_sums<kActivation>(sums + v * V::kLanes, row_scale, scale[v], bias[v]);
        if constexpr (kStream) {
          stream(value, out_row + v * V::kLanes);
        } else {
          value.store_as(out_row + v * V::kLanes);
        }
      });
    }
    return;
  }
  for (int r = 0; r < rows; ++r, sums += kPanelColumns, out_row += stride_out) {
    const V row_scale = V::set1(a_scale[r]);
    for (int c = 0; c < columns; c += V::kLanes) {
      const V value =
          finish_sums<kActivation>(sums + c, row_scale, V::load(constants.scale + c), V::load(constants.bias + c));
      if constexpr (kStream) {
        stream(value, out_row + c);
      } else {
        value.store_as_partial(out_row + c, columns - c);
      }
    }
  }
}

using EpilogueFn = void (*)(const int32_t*, const float*, const PanelConstants&, int, int, void*, int64_t);

template <typename Out, bool kStream>
EpilogueFn epilogue_for(Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return epilogue<Activation::kNone, Out, kStream>;
    case Activation::kRelu:
      return epilogue<Activation::kRelu, Out, kStream>;
    case Activation::kGelu:
      return epilogue<Activation::kGelu, Out, kStream>;
    case Activation::kGeluTanh:
      return epilogue<Activation::kGeluTanh, Out, kStream>;
    case Activation::kSilu:
      return epilogue<Activation::kSilu, Out, kStream>;
  }
  return nullptr;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
