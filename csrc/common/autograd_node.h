// A shorter way from autograd's engine to the `backward` of a torch::autograd::Function.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/version.h>

#include <mutex>
#include <string>
#include <utility>

// It reaches into members that the node has in torch 2.11 to 2.13. Built with another, nodes go the long way.
#define FASTATTN_SHORTENS_NODES (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 11 && TORCH_VERSION_MINOR <= 13)

#if FASTATTN_SHORTENS_NODES
namespace fastattn {

// What CppNode<F>::apply does, without what it spends on every call whoever calls it: the node's name, which only error
// messages want, is demangled anew (4500 instructions, a tenth of a whole backward of one row), and each gradient is
// copied from list to list. To be called by an explicit specialization of CppNode<F>::apply, which holds the node's
// lock; all the rest of the node (saved tensors and their hooks, release, compiled autograd) is PyTorch's.
// F::backward returns a gradient for each argument of F::forward, as ever, and none for what is no tensor.
template <typename F>
torch::autograd::variable_list apply_backward(torch::autograd::CppNode<F>& node,
                                              torch::autograd::variable_list&& gradients) {
  for (const at::Tensor& gradient : gradients) {
    // PyTorch puts zeros in the place of a missing gradient, where F wants them.
    if (!gradient.defined()) {
      return torch::autograd::CppNode_apply_functional<F>(std::move(gradients), node.ctx_, node.is_variable_input_,
                                                          node.output_info_, node.name());
    }
  }
  torch::autograd::variable_list by_argument = F::backward(&node.ctx_, gradients);
  torch::autograd::variable_list by_edge;
  by_edge.reserve(node.input_info_.size());
  for (size_t i = 0; i < by_argument.size(); ++i) {
    if (node.is_variable_input_[i]) by_edge.push_back(std::move(by_argument[i]));
  }
  return by_edge;
}

}  // namespace fastattn
#endif
