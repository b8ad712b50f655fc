// Attention, its backward and its weights in scalar double arithmetic, one row after another: correct and slow. They
// are weak symbols: the real kernels replace them at link time as they arrive.
#include <cmath>

#include "attention/attention.h"
#include "common/philox.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

double element(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[offset];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[offset]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(data)[offset]);
    case DType::kBool:
      return static_cast<const bool*>(data)[offset];
    default:
      return static_cast<const float*>(data)[offset];
  }
}
double element(const AttentionTensor& t, DType dtype, int64_t b, int64_t h, int64_t row, int64_t d) {
  return element(t.data, dtype, b * t.stride_batch + h * t.stride_head + row * t.stride_row + d);
}
void add_element(void* data, DType dtype, int64_t offset, double x, bool overwrite = false) {
  const double sum = overwrite ? x : x + element(data, dtype, offset);
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[offset] = sum;
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(data)[offset] = from_float<BFloat16>(static_cast<float>(sum));
      break;
    case DType::kFloat16:
      static_cast<Float16*>(data)[offset] = from_float<Float16>(static_cast<float>(sum));
      break;
    default:
      static_cast<float*>(data)[offset] = static_cast<float>(sum);
  }
}
void add_element(const AttentionTensor& t, DType dtype, int64_t b, int64_t h, int64_t row, int64_t d, double x,
                 bool overwrite = false) {
  add_element(t.data, dtype, b * t.stride_batch + h * t.stride_head + row * t.stride_row + d, x, overwrite);
}
DType wide(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// The score of one element; slope_out = d score / d (scale * q.k).
double score(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t j, double* slope_out = nullptr) {
  double dot = 0;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    dot += element(p.q, p.dtype, b, h, i, d) * element(p.k, p.dtype, b, h / (p.heads / p.heads_kv), j, d);
  }
  double s = p.scale * dot, derivative = 1;
  if (p.softcap > 0) {
    const double t = std::tanh(s / p.softcap);
    s = p.softcap * t;
    derivative = 1 - t * t;
  }
  if (slope_out) *slope_out = derivative;
  const int64_t position = i + p.diagonal;
  if (p.alibi_slopes) s -= p.alibi_slopes[b * p.stride_alibi_batch + h] * std::fabs(double(position - j));
  if (j < position - p.window_left || j > position + p.window_right) return -INFINITY;
  if (p.mask.data) {
    const int64_t at = b * p.mask.stride_batch + h * p.mask.stride_head + i * p.mask.stride_q + j * p.mask.stride_k;
    const double m = element(p.mask.data, p.mask.dtype, at);
    if (p.mask.dtype == DType::kBool) return m != 0 ? s : -INFINITY;
    s += m;
  }
  return s;
}
double kept(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (p.dropout_p == 0) return 1;
  if (p.dropout_p == 1) return 0;
  return dropout_keeps(p.rng_state[0], p.rng_state[1], b * p.heads + h, i, j, dropout_threshold(p.dropout_p)) /
         (1 - p.dropout_p);
}
double row_lse(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
  return element(p.lse, wide(p.dtype), (b * p.heads + h) * p.seqlen_q + i);
}
double weight(double s, double lse) { return s == -INFINITY || lse == -INFINITY ? 0 : std::exp(s - lse); }
template <typename Fn>
void for_rows(const AttentionParams& p, Fn fn) {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t i = 0; i < p.seqlen_q; ++i) fn(b, h, i);
}

}  // namespace

__attribute__((weak)) void attention_fwd_cpu(const AttentionParams& p) {
  for_rows(p, [&](int64_t b, int64_t h, int64_t i) {
    double largest = p.sinks ? element(p.sinks, wide(p.dtype), h) : -INFINITY;
    for (int64_t j = 0; j < p.seqlen_k; ++j) largest = max_of(largest, score(p, b, h, i, j));
    double sum = p.sinks && largest > -INFINITY ? std::exp(element(p.sinks, wide(p.dtype), h) - largest) : 0;
    double out[256] = {};
    for (int64_t j = 0; j < p.seqlen_k && largest > -INFINITY; ++j) {
      const double e = std::exp(score(p, b, h, i, j) - largest), dropped = e * kept(p, b, h, i, j);
      sum += e;
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        out[d] += dropped * element(p.v, p.dtype, b, h / (p.heads / p.heads_kv), j, d);
      }
    }
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
      add_element(p.out, p.dtype, b, h, i, d, sum > 0 ? out[d] / sum : 0, true);
    }
    add_element(p.lse, wide(p.dtype), (b * p.heads + h) * p.seqlen_q + i, sum > 0 ? largest + std::log(sum) : -INFINITY,
                true);
  });
}

__attribute__((weak)) void attention_weights_cpu(const AttentionWeightsParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.seqlen_q; ++i) {
      for (int64_t j = 0; j < p.seqlen_k; ++j) {
        double sum = 0;
        for (int64_t h = 0; h < p.heads; ++h) {
          const double w = weight(score(p, b, h, i, j), row_lse(p, b, h, i)) * kept(p, b, h, i, j);
          sum += w;
          const int64_t at = ((b * p.heads + h) * p.seqlen_q + i) * p.seqlen_k + j;
          if (!p.average_heads) add_element(p.weights, p.dtype, at, w, true);
        }
        if (p.average_heads) {
          add_element(p.weights, p.dtype, (b * p.seqlen_q + i) * p.seqlen_k + j, sum / p.heads, true);
        }
      }
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
