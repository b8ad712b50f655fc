// Device "cuda" for a PyTorch without CUDA, to run what was written for a GPU on a machine that has none: its memory is
// the processor's, its ops are those of the CPU, and fastattn's kernels are emulated. As on a GPU, an op whose tensors
// are on two devices is refused, and so is a generator of the CPU.
//
// A tensor of the device has a storage of its own, labelled "cuda", over memory that a storage of the CPU owns. An op
// runs on tensors of the CPU over the same memory; what it returns is labelled in turn.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

const c10::Device kGpu(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Device getDevice() const override { return kGpu; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

// What autograd asks of the device. The registry wants the name to be in at.
namespace at {
struct PretendedHooks final : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendedHooks)
}  // namespace at

namespace {

// --- One memory, two labels ------------------------------------------------------------------------------------------

c10::DataPtr labelled_data(const c10::Storage& storage, c10::Device device) {
  return {storage.mutable_data(), new c10::Storage(storage),
          [](void* owner) { delete static_cast<c10::Storage*>(owner); }, device};
}

c10::Storage labelled(const c10::Storage& storage, c10::Device device) {
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
                                               labelled_data(storage, device), c10::GetCPUAllocator(),
                                               /*resizable=*/true);
}

at::Tensor over(c10::Storage storage, const at::Tensor& tensor) {
  const auto key = storage.device().is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  at::Tensor result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

// The tensors of one call under both labels. Those that share memory do so under either.
class Call {
 public:
  at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (const auto& [gpu, cpu] : pairs_) {
      if (gpu.is_same(tensor)) return cpu;
    }
    const c10::Storage& storage = tensor.storage();
    auto found = cpu_of_.find(storage.unsafeGetStorageImpl());
    if (found == cpu_of_.end()) {
      found = cpu_of_.emplace(storage.unsafeGetStorageImpl(), labelled(storage, at::kCPU)).first;
      gpu_of_.emplace(found->second.unsafeGetStorageImpl(), storage);
    }
    return pairs_.emplace_back(tensor, over(found->second, tensor)).second;
  }

  at::Tensor on_gpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (const auto& [gpu, cpu] : pairs_) {
      if (cpu.is_same(tensor)) return updated(gpu, cpu);
    }
    const c10::Storage& storage = tensor.storage();
    auto found = gpu_of_.find(storage.unsafeGetStorageImpl());
    if (found == gpu_of_.end()) {
      found = gpu_of_.emplace(storage.unsafeGetStorageImpl(), labelled(storage, kGpu)).first;
    }
    return over(found->second, tensor);
  }

 private:
  // An argument that the op returns: it may have other sizes by now, and larger memory.
  static at::Tensor updated(const at::Tensor& gpu, const at::Tensor& cpu) {
    c10::StorageImpl* storage = gpu.storage().unsafeGetStorageImpl();
    if (cpu.storage().data() != storage->data()) {
      storage->set_data_ptr_noswap(labelled_data(cpu.storage(), kGpu));
      storage->set_nbytes(cpu.storage().nbytes());
    }
    gpu.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    return gpu;
  }

  std::unordered_map<const c10::StorageImpl*, c10::Storage> cpu_of_, gpu_of_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;  // on the GPU, on the CPU
};

// --- Every op --------------------------------------------------------------------------------------------------------

void change_tensors(c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor.has_value() ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    }
    value = list;
  }
}

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const std::string name = op.schema().name();
  const size_t first = stack->size() - op.schema().arguments().size();
  bool has_gpu = false, self_is_gpu = false, wants_cpu = false;
  std::string on_host;
  for (size_t i = first; i < stack->size(); ++i) {
    change_tensors((*stack)[i], [&](const at::Tensor& tensor) {
      has_gpu = has_gpu || (tensor.defined() && tensor.is_cuda());
      self_is_gpu = self_is_gpu || (tensor.defined() && tensor.is_cuda() && i == first);
      // A number's tensor may be anywhere.
      if (tensor.defined() && tensor.device().is_cpu() && tensor.dim() > 0) {
        on_host = op.schema().arguments()[i - first].name();
      }
      return tensor;
    });
  }
  const bool copies = name == "aten::copy_" || name == "aten::_copy_from" || name == "aten::set_";
  const bool indexes = self_is_gpu && (name == "aten::index" || name.find("index_put") != std::string::npos);
  TORCH_CHECK(!has_gpu || on_host.empty() || copies || indexes, name,
              ": Expected all tensors to be on the same device, but ", on_host, " is on cpu and another on ", kGpu);

  Call call;
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice()) {
      wants_cpu = value.toDevice().is_cpu();
      value = c10::Device(at::kCPU);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      TORCH_CHECK(value.toGenerator().device().is_cuda(), name,
                  ": Expected a 'cuda' device type for generator but found 'cpu'");
    } else {
      change_tensors(value, [&](const at::Tensor& tensor) { return call.on_cpu(tensor); });
    }
  }
  {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  if (wants_cpu || (copies && !self_is_gpu)) return;
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    change_tensors((*stack)[i], [&](const at::Tensor& tensor) { return call.on_gpu(tensor); });
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // It has a kernel for every device, which looks for one of the device's own.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

}  // namespace
