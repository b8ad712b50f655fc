// cp.async (PTX ISA, "Non-bulk copy"): copies that belong to the thread that issued them. A late copy poisons its
// destination at issue and reads its source at the wait, so a missing wait, a buffer overwritten too early and a source
// that changes all show. What other threads see of it still needs a barrier.
#include <cstring>

#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

static void deliver(CopyAsync& copy) {
  if (copy.delivered) return;
  std::memcpy(copy.destination, copy.source, static_cast<size_t>(copy.valid_bytes));
  std::memset(copy.destination + copy.valid_bytes, 0, static_cast<size_t>(copy.bytes - copy.valid_bytes));
  copy.delivered = true;
}

void cp_async(uint32_t destination, const void* source, int bytes, int valid_bytes, Site site) {
  const size_t size = static_cast<size_t>(bytes);
  uint8_t* target = shared_pointer(destination, size, size, site);
  if (reinterpret_cast<uintptr_t>(source) % size != 0) {
    fail(site, "global address %p is not %d-byte aligned", source, bytes);
  }
  check_global(source, static_cast<size_t>(valid_bytes), site, "reads");
  tsan_read(source, static_cast<size_t>(valid_bytes));
  tsan_write(target, size);
  const IgnoreScope hidden;
  Thread& self = current_thread();
  CopyAsync copy{target, static_cast<const uint8_t*>(source), bytes, valid_bytes, self.copy_group, false, site};
  if (completes_late()) {
    std::memset(target, kPoisonByte, size);
  } else {
    deliver(copy);
  }
  self.copies.push_back(copy);
}

void cp_async_commit_group() { ++current_thread().copy_group; }

static void finish_copies_before(Thread& thread, int group) {
  size_t finished = 0;
  for (; finished < thread.copies.size() && thread.copies[finished].group < group; ++finished) {
    CopyAsync& copy = thread.copies[finished];
    tsan_write(copy.destination, static_cast<size_t>(copy.bytes));
    const IgnoreScope hidden;
    deliver(copy);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(finished));
}

void cp_async_wait_group(int groups_in_flight) {
  Thread& self = current_thread();
  finish_copies_before(self, self.copy_group - groups_in_flight);
}

// The arrival happens once the copies so far have landed by themselves, so both become an operation of the scheduler. A
// later cp.async.wait_group does not cover those copies: a thread waits for them at the mbarrier.
void cp_async_mbarrier_arrive_noinc(uint32_t barrier, Site site) {
  const IgnoreScope hidden;
  Thread& self = current_thread();
  find_mbarrier(barrier, site);
  tsan_release(&find_mbarrier(barrier, site));
  auto copies = std::make_shared<std::vector<CopyAsync>>(std::move(self.copies));
  self.copies.clear();
  Block& block = *self.block;
  const auto complete = [copies, &block, barrier, site] {
    for (CopyAsync& copy : *copies) deliver(copy);
    arrive_without_yield(find_mbarrier(block, barrier, site), 1, 0, site);
  };
  if (completes_late()) {
    start_operation(block, site, complete);
  } else {
    complete();
  }
}

void check_copies_done(Thread& thread) {
  if (!thread.copies.empty()) fail(thread.copies[0].site, "the thread exits while this copy is in flight");
}

}  // namespace fastattn::emu
