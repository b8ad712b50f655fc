#include "common/device_launch.h"

namespace fastattn {

static thread_local bool emulation_is_on = false;

bool emulating() { return emulation_is_on; }

EmulationScope::EmulationScope(bool on) : before_(emulation_is_on) { emulation_is_on = on; }
EmulationScope::~EmulationScope() { emulation_is_on = before_; }

at::Tensor make_workspace(const at::Tensor& tensor, size_t bytes, DeviceLaunch& launch) {
  constexpr uintptr_t kAlignment = 256;  // what CUDA's allocator gives; the CPU's gives less
  if (bytes == 0) return {};
  const auto size = static_cast<int64_t>(bytes + kAlignment);
  const at::Tensor workspace = at::empty({size}, tensor.options().dtype(at::kByte));
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  launch.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  return workspace;
}

}  // namespace fastattn
