// Memory that an emulated block lives in: shared memory between guard pages, and the stacks of its threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::emu {

// Whole pages, readable and writable, with an inaccessible page on either side. Untouched pages cost nothing.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }  // rounded up to whole pages

 private:
  uint8_t* data_;
  size_t bytes_;
};

}  // namespace fastattn::emu
