// Philox4x32-10 and the rule that says which attention probabilities dropout keeps. Every backend uses this rule, so
// that the same seed keeps the same elements everywhere, in forward and backward, at any tile size. Source: Salmon et
// al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastattn {

struct PhiloxState {
  uint32_t word[4];
};

FASTATTN_HOST_DEVICE PhiloxState philox_4x32_10(PhiloxState counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Element (batch_head = batch * heads + head, row i, column j) of the attention matrix draws 16 bits.
//   key      (seed low, seed high)
//   counter  (4 * (j / 32) + (j / 2) % 4,  i,  batch_head,  offset)
//   bits     word (j / 8) % 4, low half for even j, high half for odd j
// One draw thus serves columns {2t, 2t+1} + {0, 8, 16, 24} of 32: just those that one thread of an mma accumulator
// holds.
FASTATTN_HOST_DEVICE uint32_t dropout_group(int64_t column) {
  return static_cast<uint32_t>(((column >> 5) << 2) | ((column >> 1) & 3));
}

FASTATTN_HOST_DEVICE uint32_t dropout_bits(const PhiloxState& draw, int64_t column) {
  const uint32_t word = draw.word[(column >> 3) & 3];
  return (column & 1) ? word >> 16 : word & 0xFFFFu;
}

// An element is kept if its bits are >= the threshold: p is rounded to a multiple of 2^-16, and p = 1 keeps nothing.
FASTATTN_HOST_DEVICE uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(dropout_p * 65536.0 + 0.5);
}

FASTATTN_HOST_DEVICE bool dropout_keeps(uint64_t seed, uint32_t offset, uint32_t batch_head, uint32_t row,
                                        int64_t column, uint32_t threshold) {
  const PhiloxState counter = {{dropout_group(column), row, batch_head, offset}};
  const PhiloxState draw = philox_4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return dropout_bits(draw, column) >= threshold;
}

}  // namespace fastattn
