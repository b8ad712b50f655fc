// A key/value cache: how many tokens a sequence has and where they lie. Lengths and tables come from the caller, and on
// a GPU nobody has looked at them, so everything that addresses a cache by them comes through here.
#pragma once

#include "attention/attention.h"
#include "common/host_device.h"

namespace fastattn {

FASTATTN_HOST_DEVICE bool is_cached(const AttentionParams& p) { return p.cache.block_size > 0; }

// Tokens that sequence `batch` had before the append: so few that the new ones fit, whatever `lengths` holds.
FASTATTN_HOST_DEVICE int tokens_before(const KvCache& cache, int64_t batch) {
  const int tokens = cache.lengths != nullptr ? cache.lengths[batch * cache.stride_length] : cache.length;
  const int most = cache.capacity - cache.appended;
  return tokens < 0 ? 0 : tokens > most ? most : tokens;
}

// The entry of the cache that holds block `block` of sequence `batch`: one that exists, whatever the table holds.
FASTATTN_HOST_DEVICE int64_t cache_entry(const KvCache& cache, int64_t batch, int block) {
  if (cache.table == nullptr) return batch;
  const int entry = cache.table[batch * cache.stride_table + block * cache.stride_block];
  return entry < 0 ? 0 : entry >= cache.entries ? cache.entries - 1 : entry;
}

}  // namespace fastattn
