// What a CUDA graph would capture of emulated ops, and its replay: torch.classes.fastattn.EmulatedGraph.
//
// A graph holds the launches and PyTorch's own kernels of a call with their parameters: addresses and numbers. It runs
// them again on the same memory, whatever that holds by then, and without the host code around them. So a value that
// the host read from a tensor, or made, is baked in. Here a fallback for every op sees what passes the dispatcher:
// - our launches are steps (run_on_device), with the parameters that they had;
// - PyTorch's ops are steps as wholes, also those that our glue calls: run again on the same inputs, they write what
//   they made then. Views and allocations are no steps;
// - memory that came from an op while recording stays alive, and is full of NaN when a replay begins: a step that was
//   missed shows;
// - ops that wait for the device to tell the host a value cannot be captured, and raise.
#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

#include "common/device_launch.h"

namespace fastattn {
namespace {

constexpr c10::DispatchKey kKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

struct Graph {
  std::vector<std::function<void()>> steps;
  std::vector<c10::Storage> storages;  // of what ops made while recording
};
Graph* recorded = nullptr;  // the graph that is being recorded

std::vector<at::Tensor> tensors_of(const std::vector<c10::IValue>& values) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      if (value.toTensor().defined() && value.toTensor().has_storage()) tensors.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(tensor);
    }
  }
  return tensors;
}

std::vector<c10::IValue> last_of(const torch::jit::Stack& stack, size_t count) {
  return {stack.end() - static_cast<std::ptrdiff_t>(count), stack.end()};
}

bool reads_on_the_host(const std::string& name) {
  static const std::unordered_set<std::string> names = {"aten::item",    "aten::_local_scalar_dense",
                                                        "aten::nonzero", "aten::is_nonzero",
                                                        "aten::equal",   "aten::masked_select"};
  return names.count(name) > 0;
}

bool only_allocates(const std::string& name) {
  return name.rfind("aten::empty", 0) == 0 || name.rfind("aten::new_empty", 0) == 0;
}

// Runs one of PyTorch's ops and keeps it as a step, if it computes anything.
void record_op(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::string name = op.schema().name();
  TORCH_CHECK(!reads_on_the_host(name), name, " reads a tensor on the host: a CUDA graph cannot capture it.");
  const c10::impl::ExcludeDispatchKeyGuard whole(kKey);
  const std::vector<c10::IValue> inputs = last_of(*stack, op.schema().arguments().size());
  op.redispatchBoxed(keys, stack);
  const std::vector<at::Tensor> outputs = tensors_of(last_of(*stack, op.schema().returns().size()));
  std::vector<bool> fresh;
  for (const at::Tensor& output : outputs) {
    bool is_new = true;
    for (const at::Tensor& input : tensors_of(inputs)) is_new = is_new && !output.is_alias_of(input);
    if (is_new) recorded->storages.push_back(output.storage());
    fresh.push_back(is_new);
  }
  bool writes_inputs = false;
  for (const c10::Argument& argument : op.schema().arguments()) {
    writes_inputs = writes_inputs || (argument.alias_info() != nullptr && argument.alias_info()->isWrite());
  }
  const bool computes = writes_inputs || std::find(fresh.begin(), fresh.end(), true) != fresh.end();
  if (!computes || only_allocates(name)) return;
  recorded->steps.emplace_back([op, inputs, outputs, fresh] {
    torch::jit::Stack again(inputs);
    op.callBoxed(&again);
    const std::vector<at::Tensor> made = tensors_of(again);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (fresh[i]) at::Tensor(outputs[i]).copy_(made[i]);
    }
  });
}

void intercept(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const c10::DispatchKeySet below = keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kKey);
  // Of an op of ours the parts are recorded, which come here by themselves.
  if (recorded == nullptr || op.schema().name().rfind("fastattn::", 0) == 0) {
    op.redispatchBoxed(below, stack);
  } else {
    record_op(op, below, stack);
  }
}

class EmulatedGraph : public torch::CustomClassHolder {
 public:
  void begin() {
    TORCH_CHECK(recorded == nullptr, "EmulatedGraph: another one is being recorded.");
    recorded = &graph_;
    c10::impl::tls_set_dispatch_key_included(kKey, true);
  }
  void end() {
    c10::impl::tls_set_dispatch_key_included(kKey, false);
    recorded = nullptr;
  }
  void replay() {
    TORCH_CHECK(recorded == nullptr, "EmulatedGraph: it is still being recorded.");
    const at::NoGradGuard no_grad;
    for (const c10::Storage& storage : graph_.storages) {
      std::memset(storage.mutable_data(), 0xFF, storage.nbytes());
    }
    for (const std::function<void()>& step : graph_.steps) step();
  }
  int64_t steps() const { return static_cast<int64_t>(graph_.steps.size()); }

 private:
  Graph graph_;
};

}  // namespace

bool recording_graph() { return recorded != nullptr; }
void record_step(std::function<void()> step) { recorded->steps.push_back(std::move(step)); }

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&intercept>());
}

TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.class_<EmulatedGraph>("EmulatedGraph")
      .def(torch::init<>())
      .def("begin", [](const c10::intrusive_ptr<EmulatedGraph>& self) { self->begin(); })
      .def("end", [](const c10::intrusive_ptr<EmulatedGraph>& self) { self->end(); })
      .def("replay", [](const c10::intrusive_ptr<EmulatedGraph>& self) { self->replay(); })
      .def("steps", [](const c10::intrusive_ptr<EmulatedGraph>& self) { return self->steps(); });
}

}  // namespace fastattn
