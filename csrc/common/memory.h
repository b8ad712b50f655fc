// Memory for the CPU kernels, without torch headers, and hints about it to the operating system.
#pragma once

#include <cstdint>

namespace fastattn {

// From torch's allocator, on a cache line. Raises torch's error where there is no room.
void* allocate_aligned(int64_t bytes);
void free_aligned(void* memory);

// Asks for 2 MiB pages behind a buffer that is about to be written for the first time: a fault a 4 KiB page costs
// several times what writing the page does. Does nothing below 2 MiB, or where the system has no such hint.
void advise_huge_pages(void* data, int64_t bytes);

// Moves a buffer that is read again and again onto 2 MiB pages, and with it whatever else lies on the pages that it
// touches: no byte and no address changes. For products bound by memory, whose weights on 4 KiB pages take a walk of
// the page table every 64 lines. Half a millisecond a MiB; does nothing below 256 KiB, on Linux before 6.1, or where
// the system's setting (transparent_hugepage) is "never".
void gather_into_huge_pages(const void* data, int64_t bytes);

}  // namespace fastattn
