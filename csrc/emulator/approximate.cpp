// Approximate mathematics (PTX ISA, "ex2", "lg2", "rcp", "tanh", "div"): exact, or off by up to what the manual allows.
// Of ex2 and rcp it gives 2 and 1 ulp, for which 2^-22 and 2^-23 of the result stand here: as much just above a power
// of two, up to twice as much below the next.
#include <bit>

#include "emulator/config.h"
#include "emulator/instructions.h"

namespace fastattn::emu {

// From -1 to 1, of the bound. One operand always gives one result, as on a device.
static double error_of(char instruction, float operand) {
  uint64_t bits = config().seed << 40 ^ static_cast<uint64_t>(instruction) << 32 ^ std::bit_cast<uint32_t>(operand);
  bits = (bits ^ bits >> 31) * 0x9E3779B97F4A7C15ull;
  bits = (bits ^ bits >> 29) * 0xBF58476D1CE4E5B9ull;
  return static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-63;
}

// `exact` is not moved where the manual lists the result: of 0 and infinities, and of what is not a number.
static float approximation(char instruction, float operand, double exact, double bound) {
  const bool is_listed = operand == 0.0f || !std::isfinite(operand) || !std::isfinite(exact);
  const double error = config().rough_approximations && !is_listed ? error_of(instruction, operand) * bound : 0.0;
  return flush_denormal(static_cast<float>(exact + error));
}

float ex2_approx(float x) {
  const float exact = std::exp2(x);
  return approximation('e', x, exact, 0x1p-22 * exact);
}

float lg2_approx(float x) {
  x = flush_denormal(x);
  const float exact = std::log2(x);
  const bool is_near_1 = x > 0.5f && x < 2.0f;
  return approximation('l', x, exact, 0x1p-22 * (is_near_1 ? 1.0 : std::fabs(exact)));
}

float rcp_approx(float x) {
  x = flush_denormal(x);
  const float exact = 1.0f / x;
  return approximation('r', x, exact, 0x1p-23 * exact);
}

// Keeps denormals.
float tanh_approx(float x) {
  const float exact = std::tanh(x);
  return std::fabs(x) < 0x1p-126f ? exact : approximation('t', x, exact, 0x1p-11 * exact);
}

// Keeps denormals. Off by up to 2 ulp; how far, here, depends on the dividend.
float div_full(float a, float b) {
  const float exact = a / b;
  return std::fabs(exact) < 0x1p-126f ? exact : approximation('d', a, exact, 0x1p-22 * std::fabs(exact));
}

}  // namespace fastattn::emu
