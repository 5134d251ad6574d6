// What long_conv's Meta and CPU kernels share: checks, layouts and the names of sizes.
#pragma once

#include <ATen/ops/empty.h>
#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>

namespace spade_ext::long_conv_shapes {

// Kernels without a channel dimension are seen as one channel.
inline at::Tensor with_channels(const at::Tensor& t, const at::Tensor& k) {
  return k.dim() == 2 && t.defined() ? t.unsqueeze(0) : t;
}

inline void check_kernel(const char* name, const at::Tensor& t, const at::Tensor& u, const at::Tensor& k) {
  const char* letters = k.dim() == 2 ? "(H, Lk)" : "(C, H, Lk)";
  check_dim("long_conv", name, t, k.dim(), letters);
  check_like("long_conv", name, t, "u", u);
  check_size("long_conv", name, t, -2, u.sym_size(1), letters);
  if (k.dim() == 3) check_size("long_conv", name, t, 0, k.sym_size(0), letters);
}

inline void check(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
                  const OptionalTensor& k_reverse) {
  check_dim("long_conv", "u", u, 3, "(B, H, L)");
  check_float32_or_float64("long_conv", "u", u);
  TORCH_CHECK_VALUE(k.dim() == 2 || k.dim() == 3, "long_conv: k has shape ", shape_text(k),
                    ", expected (C, H, Lk) or (H, Lk)");
  check_kernel("k", k, u, k);
  if (is_given(k_reverse)) check_kernel("k_reverse", *k_reverse, u, k);
  if (is_given(skip)) {
    const char* letters = k.dim() == 2 ? "(H,)" : "(C, H)";
    check_dim("long_conv", "skip", *skip, k.dim() - 1, letters);
    check_like("long_conv", "skip", *skip, "u", u);
    check_size("long_conv", "skip", *skip, -1, u.sym_size(1), letters);
    if (k.dim() == 3) check_size("long_conv", "skip", *skip, 0, k.sym_size(0), letters);
  }
}

inline void check_backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& k,
                           const OptionalTensor& skip, const OptionalTensor& k_reverse,
                           std::array<bool, 4> output_mask) {
  check(u, k, skip, k_reverse);
  const bool channels = k.dim() == 3;
  const char* letters = channels ? "(B, C, H, L)" : "(B, H, L)";
  check_dim("long_conv", "grad_y", grad_y, channels ? 4 : 3, letters);
  check_like("long_conv", "grad_y", grad_y, "u", u);
  check_size("long_conv", "grad_y", grad_y, 0, u.sym_size(0), letters);
  if (channels) check_size("long_conv", "grad_y", grad_y, 1, k.sym_size(0), letters);
  for (int64_t dim : {1, 2}) check_size("long_conv", "grad_y", grad_y, dim - 3, u.sym_size(dim), letters);
  check_wanted("long_conv", "skip", output_mask[2], skip);
  check_wanted("long_conv", "k_reverse", output_mask[3], k_reverse);
}

inline bool is_channels_last(const at::Tensor& u) {
  return !u.is_contiguous() && u.transpose(1, 2).is_contiguous();
}

// An uninitialised y, (B, C, H, L) or (B, H, L), in u's layout.
inline at::Tensor empty_output(const at::Tensor& u, const at::Tensor& k) {
  const auto B = u.sym_size(0), H = u.sym_size(1), L = u.sym_size(2);
  if (k.dim() == 2) {
    return is_channels_last(u) ? at::empty_symint({B, L, H}, u.options()).transpose(1, 2)
                               : at::empty_symint({B, H, L}, u.options());
  }
  const auto C = k.sym_size(0);
  return is_channels_last(u) ? at::empty_symint({B, L, C, H}, u.options()).permute({0, 2, 3, 1})
                             : at::empty_symint({B, C, H, L}, u.options());
}

// An uninitialised gradient of u, in u's layout.
inline at::Tensor empty_grad_u(const at::Tensor& u) {
  return is_channels_last(u) ? at::empty_symint(u.transpose(1, 2).sym_sizes(), u.options()).transpose(1, 2)
                             : at::empty_symint(u.sym_sizes(), u.options());
}

}  // namespace spade_ext::long_conv_shapes
