// setmaxnreg (PTX ISA, "Miscellaneous instructions"): what one warpgroup gives back of its registers another may take.
// Nothing else is known of registers here; ptxas sees to it that a warp's code does with what it has.
#include "emulator/instructions.h"
#include "emulator/runtime.h"

namespace fastattn::emu {

constexpr int kRegistersOfMultiprocessor = 64 * 1024;

// What a thread has at first: all that fit, if the kernel's __launch_bounds__ promise no second block. (ptxas gives
// less where no setmaxnreg of the kernel asks for as much: asking for more is then no more than it seems to be here.)
static int registers_of_launch(const Block& block) {
  constexpr int kMost = 256, kGranule = 8;
  const int share = kRegistersOfMultiprocessor / static_cast<int>(block.warps.size() * kWarpSize);
  return std::min(share, kMost) / kGranule * kGranule;
}

static int registers_of(const Warp& warp) {
  return warp.max_registers.empty() ? registers_of_launch(*warp.block) : warp.max_registers.back();
}

void setmaxnreg_dec(int registers, Site site) {
  char nothing = 0;
  collective(0xFFFFFFFFu, site, nothing, [&](char**, uint32_t) {
    Warp& warp = *current_thread().warp;
    Block& block = *warp.block;
    block.spare_registers += registers_of(warp) - registers;  // ptxas refuses to give back what is not there
    warp.max_registers.push_back(registers);
    for (Thread* thread : block.waiting_for_registers) make_ready(*thread);
    block.waiting_for_registers.clear();
  });
}

// The warp waits until others have given enough back.
void setmaxnreg_inc(int registers, Site site) {
  const IgnoreScope hidden;
  char nothing = 0;
  collective(0xFFFFFFFFu, site, nothing, [](char**, uint32_t) {
    Warp& warp = *current_thread().warp;
    warp.max_registers.push_back(registers_of(warp));  // until it gets more
  });
  Thread& self = current_thread();
  Block& block = *self.block;
  int& own = self.warp->max_registers.back();
  while (own < registers) {
    const int missing = registers - own;
    if (block.spare_registers >= missing) {
      block.spare_registers -= missing;
      own = registers;
    } else {
      block.waiting_for_registers.push_back(&self);
      wait_here(site);
    }
  }
}

std::string setmaxnreg_disagreement(const Block& block) {
  for (size_t i = 0; i < block.warps.size(); ++i) {
    const size_t first = i / 4 * 4;
    if (block.warps[i].max_registers == block.warps[first].max_registers) continue;
    return "warps " + std::to_string(first) + " and " + std::to_string(i) +
           " of one warpgroup executed different setmaxnreg";
  }
  return "";
}

}  // namespace fastattn::emu
