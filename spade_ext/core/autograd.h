#pragma once

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>

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

}  // namespace spade_ext
