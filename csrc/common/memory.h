// Hints to the operating system.
#pragma once

#include <cstdint>

namespace fastattn {

// Asks for 2 MiB pages behind a buffer that is about to be written for the first time: a fault a 4 KiB page costs
// several times what writing the page does. Does nothing below 2 MiB, or where the system has no such hint.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fastattn
