// What long_conv's Meta and CPU kernels share: checks, layouts and the names of sizes.
#pragma once

#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>
#include <spade_ext/core/documents.h>
#include <spade_ext/core/layout.h>

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
                  const OptionalTensor& k_reverse, const OptionalTensor& segment_ids) {
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
  check_segment_ids("long_conv", segment_ids, u);
}

inline void check_backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& k,
                           const OptionalTensor& skip, const OptionalTensor& k_reverse,
                           const OptionalTensor& segment_ids, std::array<bool, 4> output_mask) {
  check(u, k, skip, k_reverse, segment_ids);
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

// An uninitialised y, (B, C, H, L) or (B, H, L), in u's layout.
inline at::Tensor empty_output(const at::Tensor& u, const at::Tensor& k) {
  return k.dim() == 2 ? empty_signal(u) : empty_outputs(u, k.sym_size(0));
}

}  // namespace spade_ext::long_conv_shapes
