// Strides of results: where a signal u (B, H, L) is a transposed contiguous (B, L, H), as modules give it,
// results are transposed contiguous too. All else is contiguous.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace spade_ext {

inline bool is_channels_last(const at::Tensor& u) {
  return !u.is_contiguous() && u.transpose(1, 2).is_contiguous();
}

// An uninitialised (B, H, L) in u's layout.
inline at::Tensor empty_signal(const at::Tensor& u) {
  return is_channels_last(u) ? at::empty_symint(u.transpose(1, 2).sym_sizes(), u.options()).transpose(1, 2)
                             : at::empty_symint(u.sym_sizes(), u.options());
}

// An uninitialised (B, C, H, L) in u's layout.
inline at::Tensor empty_outputs(const at::Tensor& u, const c10::SymInt& C) {
  const auto B = u.sym_size(0), H = u.sym_size(1), L = u.sym_size(2);
  return is_channels_last(u) ? at::empty_symint({B, L, C, H}, u.options()).permute({0, 2, 3, 1})
                             : at::empty_symint({B, C, H, L}, u.options());
}

}  // namespace spade_ext
