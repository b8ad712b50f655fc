// The activations behind a linear layer, on vectors.
#pragma once

#include "common/activation.h"
#include "common/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// x / (1 + exp(-y)). exp2 is defined up to 127; from 2^126 on the result is x * 0.
FASTATTN_INLINE Vec<float> times_sigmoid(Vec<float> x, Vec<float> y) {
  using V = Vec<float>;
  const V exponent = y * V::set1(-1.44269504f), most = V::set1(126.0f);
  const V product = x / (V::set1(1.0f) + exp2(min(exponent, most)));
  return select(less(most, exponent), x * V::zero(), product);
}

// x * Phi(x) = max(x, 0) - |x| * Phi(-|x|), without the cancellation of 1 + erf for negative x.
// Phi(-z) = exp(-z^2 / 2) * P(1 / (1 + 0.3 z)); P: least maximum relative error (6e-8) on 0 <= z <= 14, beyond which
// exp(-z^2 / 2) is 0. Fitted in extended precision by iteratively reweighted least squares.
FASTATTN_INLINE Vec<float> gelu(Vec<float> x) {
  using V = Vec<float>;
  constexpr float kCoefficients[] = {7.16896739e-6f, 0.119487688f, 0.121920355f,  0.0946834609f, 0.142535686f,
                                     -0.0765067339f, 0.228660315f, -0.169166237f, 0.0383783169f};
  const V z = abs(x);
  const V t = V::set1(1.0f) / fma(z, V::set1(0.3f), V::set1(1.0f));
  V p = V::set1(kCoefficients[8]);
  unroll<8>(FASTATTN_LAMBDA(i) { p = fma(p, t, V::set1(kCoefficients[7 - i])); });
  const V tail = p * exp2(z * z * V::set1(-0.72134752f));
  return fnma(z, tail, max(x, V::zero()));
}

template <Activation kActivation>
FASTATTN_INLINE Vec<float> activate(Vec<float> x) {
  using V = Vec<float>;
  if constexpr (kActivation == Activation::kRelu) {
    // Not max(): NaN has to stay NaN.
    return select(less(x, V::zero()), V::zero(), x);
  } else if constexpr (kActivation == Activation::kGelu) {
    return gelu(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // 1 + tanh(u) = 2 * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
    return times_sigmoid(x, x * fma(x * x, V::set1(0.071354816f), V::set1(1.5957691f)));
  } else if constexpr (kActivation == Activation::kSilu) {
    return times_sigmoid(x, x);
  } else {
    return x;
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
