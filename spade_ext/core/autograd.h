#pragma once

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <utility>

namespace spade_ext {

using OptionalTensor = std::optional<at::Tensor>;

// Which of N tensor arguments need a gradient. AutogradContext::needs_input_grad counts the tensors that were
// given; `given` says, in the order of the signature, which were.
template <size_t N>
std::array<bool, N> gradient_mask(const torch::autograd::AutogradContext* ctx,
                                  const std::array<bool, N>& given) {
  std::array<bool, N> mask{};
  size_t edge = 0;
  for (size_t i = 0; i < N; ++i) mask[i] = given[i] && ctx->needs_input_grad(edge++);
  return mask;
}

// An undefined tensor, as save_for_backward returns it for an argument that was not given, is absent.
inline OptionalTensor as_optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

inline bool is_given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// Room for the gradient of `like`, contiguous, or an undefined tensor where none is wanted.
inline at::Tensor empty_gradient(bool wanted, const OptionalTensor& like) {
  return wanted ? at::empty_symint(like->sym_sizes(), like->options()) : at::Tensor();
}

// A step has no gradient. Arguments: (name, tensor).
inline void refuse_gradients(const char* op,
                             std::initializer_list<std::pair<const char*, OptionalTensor>> arguments) {
  for (const auto& [name, t] : arguments) {
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::compute_requires_grad(t), op, ": ", name,
                                " requires a gradient, expected none: a step has no gradient, call it under "
                                "torch.no_grad()");
  }
}

// Calls the kernel of a step that overwrites `state`. The new version tells autograd of other ops that have
// saved the state.
template <class Step>
at::Tensor step_in_place(const at::Tensor& state, const Step& step) {
  const at::Tensor y = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return step();
  }();
  torch::autograd::impl::bump_version(state);
  return y;
}

}  // namespace spade_ext
